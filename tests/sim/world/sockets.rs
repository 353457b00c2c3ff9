//! Sockets as pairs of bounded byte pipes, listeners with their queues, how both end, and what peers do with them.

use super::World;
use super::faults::{BREAKS, ECONNRESET};
use super::secure::PeerTls;
use protocol::slots::Key;
use shard::core::Holding;
use shard::io::{Close, Errno, Half};
use std::collections::VecDeque;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Peer {
    Client(usize),
    Backend(usize),
    Nobody,
}

#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) peer: Peer,
    /// Of the shard whose it is.
    pub(super) ring: usize,
    /// Peer to shard.
    pub(crate) inward: VecDeque<u8>,
    pub(crate) inward_max: usize,
    pub(super) inward_fin: bool,
    pub(super) inward_error: Option<Errno>,
    /// Shard to peer.
    pub(crate) outward: VecDeque<u8>,
    pub(super) outward_max: usize,
    pub(super) outward_fin: bool,
    pub(super) outward_reset: bool,
    /// The peer has closed its end and reads no more.
    pub(super) peer_closed: bool,
    pub(super) receive: Option<u64>,
    pub(super) send: Option<u64>,
    pub(super) connect: Option<u64>,
    pub(super) hangup: Option<u64>,
    /// The watch in force has told the FIN.
    pub(super) hangup_told: bool,
    pub(super) shut_read: bool,
    pub(super) shut_write: bool,
    pub(crate) closed: bool,
    /// On its way to another shard.
    away: bool,
    /// When the shard gave it up.
    pub(crate) ended_us: Option<u64>,
    pub(crate) served_us: u64,
    /// When the shard was told that its peer has gone.
    pub(crate) told_us: u64,
    /// The network broke it.
    pub(crate) broken: bool,
    /// Bytes that its peer has taken out.
    pub(super) read_bytes: u64,
    /// The receive in flight is being cancelled, and has brought so much since.
    pub(super) late_bytes: Option<usize>,
    pub(super) receive_due: bool,
    pub(super) send_due: bool,
    /// Whose it is, once an operation has named its connection.
    pub(super) conn: Option<Key>,
    /// What was asked for and has not been answered.
    pub(super) holding: Holding,
    /// Its peer speaks TLS.
    pub(super) tls: Option<Box<PeerTls>>,
}

#[derive(Debug)]
pub(super) enum Ending {
    Shutdown(usize, Half),
    Close(usize, Close),
}

#[derive(Debug, Default)]
pub(crate) struct Listener {
    pub(super) ring: usize,
    pub(super) accepts: VecDeque<u64>,
    pub(super) multishot: bool,
    pub(super) backlog: VecDeque<usize>,
    pub(crate) stopped: bool,
}

/// Why a client has no connection.
pub(crate) enum Unconnected {
    /// Nobody listens any more.
    Refused,
    /// The listener's queue is full.
    Full,
}

pub(crate) enum PeerRead {
    Data(Vec<u8>),
    Nothing,
    Fin,
    Reset,
}

impl World {
    pub(super) fn new_socket(&mut self, peer: Peer, ring: usize) -> usize {
        self.sockets.push(Socket {
            peer,
            ring,
            inward: VecDeque::new(),
            inward_max: self.rng.range(self.pipe_bytes as u64 / 2, self.pipe_bytes as u64) as usize,
            inward_fin: false,
            inward_error: None,
            outward: VecDeque::new(),
            outward_max: self.rng.range(self.pipe_bytes as u64 / 2, self.pipe_bytes as u64) as usize,
            outward_fin: false,
            outward_reset: false,
            peer_closed: false,
            receive: None,
            send: None,
            connect: None,
            hangup: None,
            hangup_told: false,
            shut_read: false,
            shut_write: false,
            closed: false,
            away: false,
            ended_us: None,
            served_us: 0,
            told_us: 0,
            broken: false,
            read_bytes: 0,
            late_bytes: None,
            receive_due: false,
            send_due: false,
            conn: None,
            holding: Holding::default(),
            tls: None,
        });
        self.sockets.len() - 1
    }

    pub(super) fn open_socket(&mut self, ring: usize, socket: usize) -> &mut Socket {
        let open = &mut self.sockets[socket];
        assert!(open.ring == ring, "an operation on s{socket}, which is another shard's");
        assert!(!open.closed && !open.away, "an operation on the closed socket s{socket}");
        open
    }

    pub(crate) fn shutdown(&mut self, ring: usize, socket: usize, half: Half) {
        self.note(4, socket as u64);
        self.open_socket(ring, socket);
        self.rings[ring].endings.push(Ending::Shutdown(socket, half));
    }

    pub(crate) fn close(&mut self, ring: usize, socket: usize, how: Close) {
        self.note(5, socket as u64);
        let open = self.open_socket(ring, socket);
        let in_flight = [open.receive, open.send, open.connect, open.hangup];
        assert!(in_flight == [None; 4], "s{socket} is closed with operations in flight: {in_flight:?}");
        open.closed = true;
        self.rings[ring].endings.push(Ending::Close(socket, how));
    }

    pub(crate) fn release(&mut self, ring: usize, socket: usize) {
        self.note(9, socket as u64);
        let open = self.open_socket(ring, socket);
        let in_flight = [open.receive, open.send, open.connect, open.hangup];
        assert!(in_flight == [None; 4], "s{socket} is given away with operations in flight: {in_flight:?}");
        open.away = true;
        open.conn = None;
        let ends = |ending: &Ending| matches!(ending, Ending::Shutdown(of, _) | Ending::Close(of, _) if *of == socket);
        assert!(!self.rings[ring].endings.iter().any(ends), "s{socket} is given away while it is shut down");
    }

    pub(crate) fn adopt(&mut self, ring: usize, socket: usize) {
        self.note(10, socket as u64);
        self.say(|| format!("s{socket} is adopted by shard {ring}"));
        let adopted = &mut self.sockets[socket];
        assert!(std::mem::take(&mut adopted.away), "s{socket} is adopted and was not given away");
        adopted.ring = ring;
    }

    pub(crate) fn stop_listening(&mut self, listener: usize) {
        let listener = &mut self.listeners[listener];
        assert!(listener.accepts.is_empty(), "the accept of a listener that is closed is armed");
        assert!(!listener.stopped, "a listener is closed twice");
        listener.stopped = true;
        for socket in std::mem::take(&mut listener.backlog) {
            self.backlog_lost += 1;
            self.say(|| format!("s{socket} lost in the backlog"));
            self.sockets[socket].closed = true;
            self.sockets[socket].outward_reset = true;
            self.peer_readable(socket);
        }
    }

    pub(super) fn end(&mut self, ending: Ending) {
        match ending {
            Ending::Shutdown(socket, half) => {
                let shut = &mut self.sockets[socket];
                shut.shut_write = true;
                shut.outward_fin = true;
                shut.shut_read |= half == Half::Both;
                if half == Half::Both {
                    shut.ended_us.get_or_insert(self.now);
                }
                self.peer_readable(socket);
                self.send_soon(socket);
                self.receive_soon(socket);
                self.hang_soon(socket);
            }
            Ending::Close(socket, how) => {
                let keep = self.rng.next();
                let closed = &mut self.sockets[socket];
                closed.ended_us.get_or_insert(self.now);
                // Linux answers unread bytes with RST, which may overtake what was sent.
                if how == Close::Reset || !closed.inward.is_empty() {
                    closed.outward_reset = true;
                    let keep = (keep % (closed.outward.len() as u64 + 1)) as usize;
                    closed.outward.truncate(keep);
                } else {
                    closed.outward_fin = true;
                }
                self.peer_readable(socket);
            }
        }
    }

    // ---- the peers' side

    pub(crate) fn peer_connects(&mut self, peer: Peer) -> Result<usize, Unconnected> {
        let listener = self.rng.below(self.listeners.len() as u64) as usize;
        if self.listeners[listener].stopped {
            return Err(Unconnected::Refused);
        }
        if self.listeners[listener].backlog.len() >= self.backlog_max {
            return Err(Unconnected::Full);
        }
        let socket = self.new_socket(peer, self.listeners[listener].ring);
        self.listeners[listener].backlog.push_back(socket);
        if let (Some(config), Peer::Client(client)) = (&self.tongues.clients, peer)
            && !self.clients[client].plan.bare
        {
            self.sockets[socket].tls = Some(PeerTls::client(config, self.tongues.rude_clients));
            self.tls_flush(socket);
        }
        Ok(socket)
    }

    pub(crate) fn attach_peer(&mut self, socket: usize, peer: Peer) {
        self.sockets[socket].peer = peer;
        if let (Some(config), Peer::Backend(_)) = (&self.tongues.backends, peer) {
            self.sockets[socket].tls = Some(PeerTls::server(config, self.tongues.rude_backends));
        }
    }

    pub(super) fn peer_readable(&mut self, socket: usize) {
        match self.sockets[socket].peer {
            Peer::Client(client) => self.client_readable(client),
            Peer::Backend(backend) => self.backend_readable(backend),
            Peer::Nobody => {}
        }
    }

    pub(super) fn peer_writable(&mut self, socket: usize) {
        self.tls_flush(socket);
        match self.sockets[socket].peer {
            Peer::Client(client) => self.client_writable(client),
            Peer::Backend(backend) => self.backend_writable(backend),
            Peer::Nobody => {}
        }
    }

    /// Bytes taken; an error when the connection is reset.
    pub(crate) fn peer_write(&mut self, index: usize, bytes: &[u8]) -> Result<usize, Errno> {
        if self.sockets[index].tls.is_none() {
            return self.pipe_write(index, bytes);
        }
        // An empty write tells of a reset.
        self.pipe_write(index, &[])?;
        Ok(self.tls_write(index, bytes))
    }

    pub(super) fn pipe_write(&mut self, index: usize, bytes: &[u8]) -> Result<usize, Errno> {
        let keep = self.rng.next();
        let socket = &mut self.sockets[index];
        if socket.outward_reset {
            return Err(ECONNRESET);
        }
        if socket.closed {
            // Answered by RST, which may overtake what was sent.
            socket.outward_reset = true;
            let keep = (keep % (socket.outward.len() as u64 + 1)) as usize;
            socket.outward.truncate(keep);
            self.peer_readable(index);
            return Err(ECONNRESET);
        }
        if socket.inward_error.is_some() {
            return Err(ECONNRESET);
        }
        let take = bytes.len().min(socket.inward_max.saturating_sub(socket.inward.len()));
        socket.inward.extend(&bytes[..take]);
        if take > 0 {
            self.receive_soon(index);
        }
        Ok(take)
    }

    pub(crate) fn peer_read(&mut self, index: usize, bytes_max: usize) -> PeerRead {
        let read = self.pipe_read(index, bytes_max);
        self.tls_read(index, read)
    }

    fn pipe_read(&mut self, index: usize, bytes_max: usize) -> PeerRead {
        let socket = &mut self.sockets[index];
        if !socket.outward.is_empty() {
            let take = bytes_max.min(socket.outward.len());
            socket.read_bytes += take as u64;
            let bytes = socket.outward.drain(..take).collect();
            self.send_soon(index);
            return PeerRead::Data(bytes);
        }
        match (socket.outward_reset, socket.outward_fin) {
            (true, _) => PeerRead::Reset,
            (false, true) => PeerRead::Fin,
            (false, false) => PeerRead::Nothing,
        }
    }

    pub(crate) fn peer_fin(&mut self, index: usize) {
        if !self.tls_end(index) {
            return;
        }
        self.sockets[index].inward_fin = true;
        self.receive_soon(index);
        self.hang_soon(index);
    }

    /// `close(2)`: FIN, or RST when something is unread.
    pub(crate) fn peer_close(&mut self, index: usize) {
        let socket = &mut self.sockets[index];
        if socket.outward.is_empty() {
            socket.peer_closed = true;
            self.peer_fin(index);
            self.send_soon(index);
        } else {
            self.peer_reset(index);
        }
    }

    pub(crate) fn peer_reset(&mut self, index: usize) {
        let drops = self.rng.chance(500);
        let socket = &mut self.sockets[index];
        socket.peer_closed = true;
        socket.inward_error = Some(ECONNRESET);
        if drops {
            socket.inward.clear();
        }
        self.receive_soon(index);
        self.send_soon(index);
        self.hang_soon(index);
    }

    /// The network takes a connection away from both of its ends.
    pub(crate) fn break_socket(&mut self, index: usize) {
        let error = self.rng.pick(&BREAKS);
        let keep = self.rng.next();
        self.say(|| format!("s{index} breaks: {error}"));
        let socket = &mut self.sockets[index];
        socket.broken = true;
        socket.peer_closed = true;
        socket.outward_reset = true;
        let keep = (keep % (socket.outward.len() as u64 + 1)) as usize;
        socket.outward.truncate(keep);
        socket.inward.clear();
        socket.inward_error = Some(error);
        self.receive_soon(index);
        self.send_soon(index);
        self.hang_soon(index);
        self.peer_readable(index);
    }

    /// Breaks some connection that has a peer.
    pub(super) fn break_one(&mut self) {
        let open = |socket: &Socket| {
            !socket.closed && !socket.peer_closed && socket.conn.is_some() && socket.peer != Peer::Nobody
        };
        let standing: Vec<usize> =
            (0..self.sockets.len()).filter(|&index| open(&self.sockets[index])).collect();
        if !standing.is_empty() {
            let index = self.rng.pick(&standing);
            self.break_socket(index);
        }
    }

    /// A connection that was never accepted is reset.
    pub(super) fn abort(&mut self, index: usize) {
        self.say(|| format!("s{index} is aborted in the queue"));
        let socket = &mut self.sockets[index];
        socket.closed = true;
        socket.broken = true;
        socket.outward_reset = true;
        self.peer_readable(index);
    }

    /// What the peer's kernel has confirmed: what was read, and what waits in its half of the pipe.
    pub(crate) fn acknowledged(&self, index: usize) -> u64 {
        let socket = &self.sockets[index];
        socket.read_bytes + socket.outward.len().min(socket.outward_max / 2) as u64
    }
}
