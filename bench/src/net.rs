//! Epoll, sockets and a slot table with generations, without unsafe code.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::clock::SECOND_NS;

/// Events taken from the kernel per wait; more stay there for the next one.
const EVENTS_PER_WAIT: usize = 1024;
/// Connections the kernel may hold for us until we accept them.
const BACKLOG: i32 = 4096;

/// What became of one registered descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The token it was registered with.
    pub token: u64,
    /// Bytes, a FIN or an error can be read.
    pub readable: bool,
    /// Bytes can be written, or a connect has been decided.
    pub writable: bool,
    /// A FIN or an error is among what can be read: it must be read now, it will not be told again.
    pub hangup: bool,
}

/// Edge-triggered epoll, except for listeners.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poller {
    /// A new epoll instance.
    pub fn new() -> io::Result<Self> {
        let idle = epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, events: vec![idle; EVENTS_PER_WAIT] })
    }

    /// Watches a connection for both directions, once and for all: readiness is told on each change only.
    pub fn add_connection(&self, socket: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(token), flags)?)
    }

    /// Watches a connection for what can be read only.
    pub fn add_reader(&self, socket: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(token), flags)?)
    }

    /// Watches a listener; told again as long as connections wait.
    pub fn add_listener(&self, socket: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(token), EventFlags::IN)?)
    }

    /// Waits for events, at most `timeout_ns` (for ever when `None`), and returns how many [`Poller::ready`] has.
    pub fn wait(&mut self, timeout_ns: Option<u64>) -> io::Result<usize> {
        let timeout = timeout_ns.map(|ns| Timespec {
            tv_sec: i64::try_from(ns / SECOND_NS).unwrap_or(i64::MAX),
            tv_nsec: (ns % SECOND_NS) as _,
        });
        match epoll::wait(&self.epoll, &mut self.events[..], timeout.as_ref()) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// The `index`-th event of the last wait.
    pub fn ready(&self, index: usize) -> Ready {
        let event = self.events[index];
        // Copied out: the kernel's struct is packed.
        let (flags, data) = (event.flags, event.data);
        let closed = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        Ready {
            token: data.u64(),
            readable: closed || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
            writable: closed || flags.contains(EventFlags::OUT),
            hangup: closed || flags.contains(EventFlags::RDHUP),
        }
    }
}

/// A non-blocking listener with SO_REUSEADDR, SO_REUSEPORT and a deep backlog.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = stream_socket(address)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// Accepts one connection, non-blocking and with TCP_NODELAY; `None` when none waits.
pub fn accept(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(socket) => {
            sockopt::set_tcp_nodelay(&socket, true)?;
            Ok(Some(TcpStream::from(socket)))
        }
        // A peer that left while it waited is no fault of the listener.
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Begins to connect, non-blocking and with TCP_NODELAY; the outcome is told by the first writable event.
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = stream_socket(address)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// Makes the close of this socket a RST.
pub fn reset_on_close(socket: &TcpStream) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(socket, Some(Duration::ZERO))?)
}

/// Raises the soft limit of open descriptors to the hard one and returns it.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(_) => limit.current.unwrap_or(u64::MAX),
    }
}

/// Bytes that could not be sent yet. Holds no memory while there are none.
#[derive(Debug, Default)]
pub struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
}

impl Unsent {
    /// Bytes not yet sent.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Where to append what is to be sent next.
    pub fn end(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Forgets everything unsent.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What is not yet sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// The first `count` of [`Unsent::bytes`] are sent.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        assert!(self.sent <= self.bytes.len(), "no more is sent than there was");
        if !self.is_empty() {
            return;
        }
        self.sent = 0;
        self.bytes.clear();
        // Thousands of paced streams each hold one event at most: keep that, give back a burst's buffer.
        if self.bytes.capacity() > 4096 {
            self.bytes = Vec::new();
        }
    }

    /// Writes as much as the socket takes; `Ok(true)` when all is sent.
    pub fn flush(&mut self, mut socket: &TcpStream) -> io::Result<bool> {
        use std::io::Write;
        while !self.is_empty() {
            match socket.write(self.bytes()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// Entries by index, each with a generation, so that a late event for a former entry is recognised.
pub struct Slots<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Puts an entry in and returns its key: below 2^63, so larger tokens are free for other uses.
    pub fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            u32::try_from(self.entries.len() - 1).expect("fewer than 2^32 connections")
        });
        let (generation, entry) = &mut self.entries[index as usize];
        assert!(entry.is_none(), "a free slot is empty");
        *entry = Some(value);
        u64::from(*generation) << 32 | u64::from(index)
    }

    /// The entry of a key, unless it is gone.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (generation, entry) = self.entries.get_mut(key as u32 as usize)?;
        if u64::from(*generation) == key >> 32 { entry.as_mut() } else { None }
    }

    /// Takes the entry of a key out, unless it is gone.
    pub fn remove(&mut self, key: u64) -> Option<T> {
        let (generation, entry) = self.entries.get_mut(key as u32 as usize)?;
        if u64::from(*generation) != key >> 32 {
            return None;
        }
        let value = entry.take()?;
        *generation = (*generation + 1) & 0x7fff_ffff;
        self.free.push(key as u32);
        Some(value)
    }

    /// Shows every entry to `keep` and removes those that it does not want.
    pub fn retain(&mut self, mut keep: impl FnMut(&mut T) -> bool) {
        for index in 0..self.entries.len() {
            let (generation, entry) = &mut self.entries[index];
            if entry.as_mut().is_some_and(|entry| !keep(entry)) {
                let key = u64::from(*generation) << 32 | index as u64;
                self.remove(key);
            }
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn stream_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_a_removed_entry_finds_nothing() {
        let mut slots = Slots::default();
        let first = slots.insert("a");
        assert_eq!(slots.remove(first), Some("a"));
        let second = slots.insert("b");
        assert_ne!(first, second);
        assert!(slots.get_mut(first).is_none());
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.get_mut(second), Some(&mut "b"));
        assert_eq!(slots.len(), 1);
    }

    #[test]
    fn what_is_not_retained_is_gone() {
        let mut slots = Slots::default();
        let keys = [1, 2, 3].map(|value| slots.insert(value));
        slots.retain(|value| *value != 2);
        assert_eq!(keys.map(|key| slots.get_mut(key).copied()), [Some(1), None, Some(3)]);
        slots.retain(|value| *value > 3);
        assert!(slots.is_empty());
    }

    #[test]
    fn unsent_bytes_survive_a_full_socket() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let client = connect(listener.local_addr().unwrap()).unwrap();
        let server = accept(&listener).unwrap().expect("the connect is done when it is on loopback");
        let mut unsent = Unsent::default();
        let sent: Vec<u8> = (0..20_000_000u32).map(|n| n as u8).collect();
        unsent.end().extend_from_slice(&sent);
        assert!(!unsent.flush(&server).unwrap(), "20 MB do not fit a socket buffer");
        let mut received = Vec::new();
        let mut piece = vec![0; 1 << 16];
        while received.len() < sent.len() {
            match std::io::Read::read(&mut (&client), &mut piece) {
                Ok(count) => received.extend_from_slice(&piece[..count]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            unsent.flush(&server).unwrap();
        }
        assert!(unsent.is_empty());
        assert!(received == sent);
    }
}
