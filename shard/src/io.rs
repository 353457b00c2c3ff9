//! The only door to the kernel: what a shard asks for, and what comes back. Implemented by `uring` and by the simulation.
//!
//! Every operation names the connection it belongs to and is answered by exactly one final completion (a multishot one by
//! any number before it). Memory and sockets belong to the implementation until that final completion. Nothing is
//! submitted to the kernel before the next [`Io::turn`].

use protocol::log::Lent;
use protocol::slots::Key;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::ops::DerefMut;

/// An error number of the kernel, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Errno(pub i32);

impl Errno {
    /// The operation was cancelled by us.
    pub const CANCELED: Errno = Errno(libc::ECANCELED);
    /// The socket takes nothing more at once.
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    /// The buffer ring had nothing to receive into; the receive is to be armed again when buffers are back.
    pub const NO_BUFFERS: Errno = Errno(libc::ENOBUFS);
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

/// Names an operation from its request to its final completion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
// One above its number: so that the absence of one takes no room, of which each connection has four.
pub struct OpId(NonZeroU64);

impl OpId {
    /// The operation with this number, below `u64::MAX`.
    pub const fn new(number: u64) -> Self {
        match NonZeroU64::new(number.wrapping_add(1)) {
            Some(above) => OpId(above),
            None => panic!("not an operation's number"),
        }
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self.0.get() - 1
    }
}

/// Which half of a connection to shut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Half {
    /// Send FIN; go on receiving.
    Write,
    /// Both; operations in flight end.
    Both,
}

/// How a socket is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Close {
    /// What was sent is still delivered.
    Orderly,
    /// With RST, so that a body without a length cannot look finished.
    Reset,
}

/// How long a turn may sleep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Submit, take what is there, come back.
    Not,
    /// Sleep until something completes or this time of [`Io::now_us`] is reached.
    Until(u64),
    /// Sleep until something completes.
    Forever,
}

/// What the kernel did.
#[derive(Debug)]
pub enum Completion<S, B> {
    /// A client was accepted. More follow while the accept is armed.
    Accepted {
        /// Index of the listener.
        listener: usize,
        /// The client's socket; belongs to the shard from here on.
        socket: S,
    },
    /// The accept is no longer armed (final).
    AcceptEnded {
        /// Index of the listener.
        listener: usize,
        /// Which accept.
        op: OpId,
        /// `None`: a one-shot accept is complete, or a multishot one ended without an error.
        error: Option<Errno>,
    },
    /// The connect ended (final).
    Connected {
        /// The connection.
        conn: Key,
        /// Whether it stands.
        result: Result<(), Errno>,
    },
    /// Bytes arrived; never empty. More follow while the receive is armed.
    Received {
        /// The connection.
        conn: Key,
        /// The bytes; the buffer goes back to the ring when this is dropped.
        buffer: B,
    },
    /// The receive is no longer armed (final).
    ReceiveEnded {
        /// The connection.
        conn: Key,
        /// Why.
        why: ReceiveEnd,
    },
    /// The send in flight ended (final); its memory is no longer the kernel's. Told when its [`Confirm`] says.
    Sent {
        /// The connection.
        conn: Key,
        /// Bytes the socket accepted, `0 <= bytes <= lent`; fewer than lent is followed by another send.
        result: Result<u32, Errno>,
    },
    /// The peer hung up, or the watch was cancelled. An RST may follow a FIN while the watch is armed.
    Hangup {
        /// The connection.
        conn: Key,
        /// `Err(CANCELED)` when the watch was cancelled.
        result: Result<Hangup, Errno>,
        /// Whether the watch goes on; if not, this is final.
        armed: bool,
    },
    /// Somebody rang: the mailbox has something.
    Woken,
}

impl<S, B> Completion<S, B> {
    /// The connection it is about.
    pub fn conn(&self) -> Option<Key> {
        match self {
            Completion::Connected { conn, .. }
            | Completion::Received { conn, .. }
            | Completion::ReceiveEnded { conn, .. }
            | Completion::Sent { conn, .. }
            | Completion::Hangup { conn, .. } => Some(*conn),
            Completion::Accepted { .. } | Completion::AcceptEnded { .. } | Completion::Woken => None,
        }
    }
}

/// What a hangup watch saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hangup {
    /// FIN: the peer sends no more, and may have left.
    Fin,
    /// RST or an error: the connection is gone.
    Reset,
}

/// Why a receive is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReceiveEnd {
    /// The peer sent FIN.
    Fin,
    /// The kernel ended the multishot for reasons of its own; arm again.
    Rearm,
    /// An error: `NO_BUFFERS` and `CANCELED` are ours, others the peer's or the network's.
    Error(Errno),
}

/// When the end of a send is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Confirm {
    /// As soon as it is known: it ends the sleep of a turn.
    Prompt,
    /// If the socket takes the range at once, by the next turn that returns for any other reason; else as soon as it is
    /// known. For a send that nothing waits for: it costs no completion, and a turn that sends can sleep in the same
    /// syscall.
    Deferred,
}

/// What a shard needs of the kernel.
pub trait Io: Sized {
    /// A connected socket; copying it copies the name, not the socket.
    type Socket: Copy + Eq + Debug;
    /// A socket on its way to another shard's `Io`; closed on drop.
    type Parcel: Debug;
    /// Received bytes in a lent buffer; given back on drop.
    type Buffer: DerefMut<Target = [u8]> + Debug;

    /// This memory is going to be needed soon: a hint, which reads nothing and waits for nothing.
    fn prefetch(&self, _address: *const u8) {}

    /// Microseconds of the monotonic clock. Called when a turn wakes and when its work is done, nowhere else.
    fn now_us(&self) -> u64;

    /// Submits everything queued, sleeps as told, and appends at most
    /// [`COMPLETIONS_PER_TURN_MAX`](protocol::limits::COMPLETIONS_PER_TURN_MAX) completions.
    ///
    /// # Errors
    /// Only what makes the ring itself unusable.
    fn turn(
        &mut self,
        wait: Wait,
        completions: &mut Vec<Completion<Self::Socket, Self::Buffer>>,
    ) -> Result<(), Errno>;

    /// Listeners of this shard.
    fn listeners(&self) -> usize;

    /// Arms accepting on a listener: multishot, or one client only. Any number of one-shots may be armed at once.
    fn accept(&mut self, listener: usize, multishot: bool) -> OpId;

    /// Closes a listener on which no accept is armed. Connections the kernel has queued on it are lost: accept them first.
    fn stop_listening(&mut self, listener: usize);

    /// Makes a socket and connects it.
    ///
    /// # Errors
    /// When no socket can be made (no descriptors, no memory); then nothing is in flight.
    fn connect(&mut self, conn: Key, address: SocketAddr) -> Result<(Self::Socket, OpId), Errno>;

    /// Arms a multishot receive. At most one per connection.
    fn receive(&mut self, conn: Key, socket: Self::Socket) -> OpId;

    /// Sends the whole range (MSG_WAITALL). At most one per connection. The range is the kernel's until `Sent`.
    fn send(&mut self, conn: Key, socket: Self::Socket, range: Lent, confirm: Confirm) -> OpId;

    /// Watches for the peer's FIN and RST without receiving, for a connection whose receive is not armed.
    fn watch_hangup(&mut self, conn: Key, socket: Self::Socket) -> OpId;

    /// Asks for an operation to end; its final completion still comes (possibly as a success). A stale id does nothing.
    fn cancel(&mut self, op: OpId);

    /// Shuts one or both directions.
    fn shutdown(&mut self, socket: Self::Socket, half: Half);

    /// Closes. No operation of the connection may be in flight. The name is void from here on.
    fn close(&mut self, socket: Self::Socket, how: Close);

    /// Gives a socket up for another shard to adopt. No operation of the connection may be in flight. The name is void from
    /// here on.
    fn release(&mut self, socket: Self::Socket) -> Self::Parcel;

    /// Takes over a socket that another shard released.
    fn adopt(&mut self, parcel: Self::Parcel) -> Self::Socket;

    /// The peer's address, for logs and `/status`. Costs a syscall: never on the hot path.
    fn peer(&self, socket: Self::Socket) -> Option<SocketAddr>;

    /// Bytes of this connection that its peer has acknowledged, which tells a slow reader from one that stopped while a long
    /// send is in flight. `None` when unknown. Costs a syscall: asked only when a send takes long.
    fn acknowledged(&self, socket: Self::Socket) -> Option<u64>;

    /// Whether the peer has reset the connection, receives aside. Costs a syscall: asked once a second at most, of those that
    /// received something since.
    fn is_reset(&self, socket: Self::Socket) -> bool;

    /// Free receive buffers, for the shortage policy and `/status`.
    fn buffers_free(&self) -> usize;

    /// How often the kernel took nothing, in order of [`Refusal::ALL`].
    fn refusals(&self) -> [u64; Refusal::COUNT] {
        [0; Refusal::COUNT]
    }
}

/// Why the kernel takes nothing for a while: neither operations nor, mostly, the question for completions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It has no memory for a request.
    Memory,
    /// Completions that were not taken are in the way.
    Completions,
}

impl Refusal {
    /// How many there are.
    pub const COUNT: usize = 2;
    /// All of them.
    pub const ALL: [Refusal; Refusal::COUNT] = [Refusal::Memory, Refusal::Completions];

    /// In metrics.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::Memory => "memory",
            Refusal::Completions => "completions",
        }
    }
}
