//! Sockets: names, options, and which descriptors are open with how many operations in flight.

use crate::io::Half;
use socket2::{Domain, Protocol, SockAddr, SockRef, Type};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The name of a connected socket of one [`UringIo`](super::UringIo).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Socket(pub(super) RawFd);

impl Socket {
    pub(super) fn fd(self) -> RawFd {
        self.0
    }
}

/// A socket between two shards: belongs to no [`UringIo`](super::UringIo), and is closed on drop.
#[derive(Debug)]
pub struct Parcel(OwnedFd);

impl Parcel {
    /// Of a socket that its `UringIo` has just given up.
    pub(super) fn new(socket: Socket) -> Self {
        // SAFETY: the descriptor is open, and `Descriptors::released` asserted that nothing else will close it.
        Parcel(unsafe { OwnedFd::from_raw_fd(socket.0) })
    }

    pub(super) fn open(self) -> Socket {
        Socket(self.0.into_raw_fd())
    }
}

/// A listener that shares its address with those of the other shards (SO_REUSEPORT). What is set here is inherited by the
/// sockets it accepts: TCP_NODELAY, and TCP_NOTSENT_LOWAT unless 0, so that completions follow the reader. An IPv6
/// address serves IPv6 only: an address means what it says whatever the sysctl net.ipv6.bindv6only.
///
/// # Errors
/// Address in use, no permission, no such address.
pub fn listen(address: SocketAddr, backlog: u32, notsent_lowat: u32) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    if notsent_lowat > 0 {
        socket.set_tcp_notsent_lowat(notsent_lowat)?;
    }
    socket.bind(&SockAddr::from(address))?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// A blocking socket, ready to be connected to `address`.
pub(super) fn unconnected(address: SocketAddr) -> io::Result<Socket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    Ok(Socket(socket.into_raw_fd()))
}

fn with<T>(socket: Socket, act: impl FnOnce(SockRef<'_>) -> T) -> T {
    // SAFETY: the descriptor is open: `Descriptors` asserts it for every use of a `Socket`, and only `UringIo` closes it. The
    // borrow ends with this call.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.fd()) };
    act(SockRef::from(&fd))
}

/// shutdown(2). A peer that is gone already (ENOTCONN) is as good.
pub(super) fn shutdown(socket: Socket, half: Half) {
    let how = match half {
        Half::Write => Shutdown::Write,
        Half::Both => Shutdown::Both,
    };
    let result = with(socket, |socket| socket.shutdown(how));
    debug_assert!(
        result.as_ref().err().is_none_or(|error| error.raw_os_error() == Some(libc::ENOTCONN)),
        "shutdown of a socket: {result:?}"
    );
}

/// The close that follows sends RST and discards what was not sent (SO_LINGER with no time).
pub(super) fn reset_on_close(socket: Socket) {
    let result = with(socket, |socket| socket.set_linger(Some(Duration::ZERO)));
    debug_assert!(result.is_ok(), "SO_LINGER: {result:?}");
}

pub(super) fn peer(socket: Socket) -> Option<SocketAddr> {
    with(socket, |socket| socket.peer_addr()).ok()?.as_socket()
}

/// `tcpi_bytes_acked` of TCP_INFO (RFC 4898 tcpEStatsAppHCThruOctetsAcked).
pub(super) fn acknowledged(socket: Socket) -> Option<u64> {
    tcp_info(socket).map(|info| info.tcpi_bytes_acked)
}

/// Whether nothing is left of the connection (`TCP_CLOSE`): while we have sent no FIN, that was an RST.
pub(super) fn is_reset(socket: Socket) -> bool {
    const TCP_CLOSE: u8 = 7;
    tcp_info(socket).is_some_and(|info| info.tcpi_state == TCP_CLOSE)
}

fn tcp_info(socket: Socket) -> Option<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `info`, which is that long and outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.0,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SAFETY: all-zero is a value of this struct of integers, and the kernel has overwritten a prefix of it.
    (result == 0).then(|| unsafe { info.assume_init() })
}

/// Open sockets by descriptor: 0 is not open, `1 + n` is open with n operations in flight, `CLOSING` is on its way out.
#[derive(Default)]
pub(super) struct Descriptors {
    states: Vec<u8>,
    open: usize,
}

const CLOSING: u8 = u8::MAX;

impl Descriptors {
    /// Sockets that are not closed.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    fn state(&mut self, fd: RawFd) -> &mut u8 {
        let index = usize::try_from(fd).unwrap_or_else(|_| unreachable!("descriptors are not negative"));
        if index >= self.states.len() {
            self.states.resize(index + 1, 0);
        }
        &mut self.states[index]
    }

    pub(super) fn opened(&mut self, fd: RawFd) {
        let state = self.state(fd);
        assert_eq!(*state, 0, "the kernel opened descriptor {fd} twice");
        *state = 1;
        self.open += 1;
    }

    pub(super) fn assert_open(&mut self, fd: RawFd) {
        let state = *self.state(fd);
        assert!(state > 0 && state < CLOSING, "descriptor {fd} is used after its close");
    }

    pub(super) fn operation_started(&mut self, fd: RawFd) {
        self.assert_open(fd);
        *self.state(fd) += 1;
    }

    pub(super) fn operation_ended(&mut self, fd: RawFd) {
        self.assert_open(fd);
        *self.state(fd) -= 1;
    }

    /// Its close was asked for.
    pub(super) fn closing(&mut self, fd: RawFd) {
        let state = self.state(fd);
        assert_eq!(*state, 1, "descriptor {fd} is closed twice or with operations in flight");
        *state = CLOSING;
    }

    /// It was given up, open.
    pub(super) fn released(&mut self, fd: RawFd) {
        let state = self.state(fd);
        assert_eq!(*state, 1, "descriptor {fd} is given up after its close or with operations in flight");
        *state = 0;
        self.open -= 1;
    }

    /// Its close is queued for the kernel.
    pub(super) fn closed(&mut self, fd: RawFd) {
        let state = self.state(fd);
        assert_eq!(*state, CLOSING, "descriptor {fd} was not to be closed");
        *state = 0;
        self.open -= 1;
    }

    /// Closes what is open, when the ring is gone.
    pub(super) fn close_all(&mut self) {
        for (fd, state) in self.states.iter_mut().enumerate() {
            if std::mem::take(state) != 0 {
                // SAFETY: the descriptor was made for this `UringIo`, which is being dropped, and is not closed yet.
                drop(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
            }
        }
        self.open = 0;
    }
}
