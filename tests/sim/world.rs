//! The simulated machine under a shard: virtual clock, sockets as pairs of bounded byte pipes, operations that own the
//! memory lent to them, and the faults a seed draws. Peers (`client`, `backend`) live in it and act by its events.

use crate::backend::{BackendConn, BackendHost, BackendStep};
use crate::client::{Client, ClientStep};
use crate::io::{SimBuffer, SimSocket};
use crate::plan::Exchange;
use crate::rng::Rng;
use protocol::log::Lent;
use protocol::slots::Key;
use shard::io::{Close, Completion, Errno, Half, Hangup, ReceiveEnd, Wait};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

pub(crate) const ECONNRESET: Errno = Errno(104);
pub(crate) const EPIPE: Errno = Errno(32);
pub(crate) const EMFILE: Errno = Errno(24);
pub(crate) const ECONNREFUSED: Errno = Errno(111);

pub(crate) type Done = Completion<SimSocket, SimBuffer>;

/// Probabilities (per mille) and extents of what the kernel and the network do. Zero is a calm machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) delay_us: u64,
    /// Largest piece of one receive; 0: the buffer's size.
    pub(crate) receive_bytes: usize,
    pub(crate) receive_rearm: u32,
    pub(crate) receive_no_buffer: u32,
    pub(crate) send_piecewise: u32,
    pub(crate) send_short: u32,
    pub(crate) send_late: u32,
    pub(crate) cancel_late_us: u64,
    pub(crate) reorder: u32,
    pub(crate) accept_error: u32,
    pub(crate) accept_ends: u32,
    pub(crate) connect_refused: u32,
    pub(crate) connect_hangs: u32,
    pub(crate) socket_error: u32,
    pub(crate) overshoot_us: u64,
    pub(crate) work_us: u64,
    /// Completions of one turn; 0: the limit of the trait.
    pub(crate) turn_completions: usize,
}

/// A bug put into the machine on purpose, to prove that the rig finds such.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Planted {
    DoubleSent,
    LostSent,
    LostCancel,
    LostWakeUp,
    ForgottenReceive,
    WrongWindow,
    OthersBytes,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    Receive(usize),
    Send(usize),
    SendDone(u64),
    Cancel(u64),
    Connect(u64),
    Hang(usize),
    Client(usize, ClientStep),
    Backend(usize, BackendStep),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Peer {
    Client(usize),
    Backend(usize),
    Nobody,
}

#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) peer: Peer,
    /// Peer to shard.
    pub(crate) inward: VecDeque<u8>,
    pub(crate) inward_max: usize,
    inward_fin: bool,
    inward_error: Option<Errno>,
    /// Shard to peer.
    pub(crate) outward: VecDeque<u8>,
    outward_max: usize,
    outward_fin: bool,
    outward_reset: bool,
    /// The peer has closed its end and reads no more.
    peer_closed: bool,
    receive: Option<u64>,
    send: Option<u64>,
    connect: Option<u64>,
    hangup: Option<u64>,
    shut_read: bool,
    shut_write: bool,
    pub(crate) closed: bool,
    /// When the shard gave it up.
    pub(crate) ended_us: Option<u64>,
    pub(crate) accepted_us: u64,
    /// When the shard was told that its peer has gone.
    pub(crate) told_us: u64,
    receive_due: bool,
    send_due: bool,
}

#[derive(Debug)]
enum Kind {
    Accept { listener: usize, multishot: bool },
    Connect { target: SocketAddr },
    Receive,
    Send { lent: Lent, hash: u64, accepted: usize, done: bool },
    Hangup,
}

#[derive(Debug)]
struct Op {
    kind: Kind,
    socket: usize,
    conn: Key,
}

#[derive(Debug)]
enum Submission {
    Op(u64),
    Cancel(u64),
}

#[derive(Debug)]
enum Ending {
    Shutdown(usize, Half),
    Close(usize, Close),
}

#[derive(Debug, Default)]
pub(crate) struct Listener {
    accept: Option<u64>,
    backlog: VecDeque<usize>,
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

/// Completions keep their order within a lane.
type Lane = (usize, bool);

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    pub(crate) faults: Faults,
    pub(crate) planted: Option<Planted>,
    /// Places passed at which a planted bug could strike.
    planted_passed: u32,
    events: BTreeMap<(u64, u64), Event>,
    event_seq: u64,
    pub(crate) sockets: Vec<Socket>,
    ops: BTreeMap<u64, Op>,
    next_op: u64,
    submissions: Vec<Submission>,
    endings: Vec<Ending>,
    ready: VecDeque<(Lane, Done)>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) clients: Vec<Client>,
    pub(crate) hosts: Vec<BackendHost>,
    pub(crate) backends: Vec<BackendConn>,
    pub(crate) exchanges: Vec<Exchange>,
    pub(crate) buffers: usize,
    pub(crate) buffer_bytes: usize,
    pub(crate) buffers_used: Rc<Cell<usize>>,
    pub(crate) pipe_bytes: usize,
    pub(crate) backlog_max: usize,
    /// FNV of everything asked and answered, with its time: two runs of a seed agree.
    pub(crate) trace: u64,
    /// The shard would sleep forever and nothing will ever happen.
    pub(crate) stuck: bool,
    /// Connections that were queued when their listener was closed.
    pub(crate) backlog_lost: u32,
    /// Connects that failed, by the world's doing.
    pub(crate) connects_failed: u32,
    turns_idle: u32,
    pub(crate) log: bool,
}

fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

impl World {
    pub(crate) fn new(seed: u64, listeners: usize) -> Self {
        World {
            now: 1_000_000,
            rng: Rng::new(seed),
            faults: Faults::default(),
            planted: None,
            planted_passed: 0,
            events: BTreeMap::new(),
            event_seq: 0,
            sockets: Vec::new(),
            ops: BTreeMap::new(),
            next_op: 1,
            submissions: Vec::new(),
            endings: Vec::new(),
            ready: VecDeque::new(),
            listeners: (0..listeners).map(|_| Listener::default()).collect(),
            clients: Vec::new(),
            hosts: Vec::new(),
            backends: Vec::new(),
            exchanges: Vec::new(),
            buffers: 64,
            buffer_bytes: 4096,
            buffers_used: Rc::new(Cell::new(0)),
            pipe_bytes: 64 * 1024,
            backlog_max: 128,
            trace: 0,
            stuck: false,
            backlog_lost: 0,
            connects_failed: 0,
            turns_idle: 0,
            log: false,
        }
    }

    pub(crate) fn note(&mut self, what: u64, value: u64) {
        for part in [self.now, what, value] {
            self.trace = (self.trace ^ part).wrapping_mul(0x100_0000_01B3).rotate_left(5);
        }
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.log {
            println!("{:>12} {}", self.now, what());
        }
    }

    pub(crate) fn at(&mut self, time: u64, event: Event) {
        self.event_seq += 1;
        self.events.insert((time.max(self.now), self.event_seq), event);
    }

    pub(crate) fn after(&mut self, delay_us: u64, event: Event) {
        self.at(self.now + delay_us, event);
    }

    /// Mostly none, else up to the run's bound.
    pub(crate) fn delay(&mut self) -> u64 {
        if self.rng.chance(500) { 0 } else { self.rng.skewed(self.faults.delay_us) }
    }

    fn strike(&mut self, planted: Planted) -> bool {
        if self.planted != Some(planted) {
            return false;
        }
        self.planted_passed += 1;
        self.planted_passed == if planted == Planted::LostCancel { 1 } else { 20 }
    }

    // ---- what the shard asks for

    fn op(&mut self, kind: Kind, socket: usize, conn: Key) -> u64 {
        let op = self.next_op;
        self.next_op += 1;
        self.note(1, op ^ (socket as u64) << 32);
        self.ops.insert(op, Op { kind, socket, conn });
        self.submissions.push(Submission::Op(op));
        op
    }

    pub(crate) fn accept(&mut self, listener: usize, multishot: bool) -> u64 {
        assert!(!self.listeners[listener].stopped, "accept on a stopped listener");
        assert!(self.listeners[listener].accept.is_none(), "two accepts on a listener");
        let conn = Key { slot: u32::MAX, generation: 0 };
        let op = self.op(Kind::Accept { listener, multishot }, usize::MAX, conn);
        self.listeners[listener].accept = Some(op);
        op
    }

    pub(crate) fn stop_listening(&mut self, listener: usize) {
        let listener = &mut self.listeners[listener];
        assert!(listener.accept.is_none(), "the accept of a listener that is closed is armed");
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

    pub(crate) fn connect(&mut self, conn: Key, target: SocketAddr) -> Result<(usize, u64), Errno> {
        if self.rng.chance(self.faults.socket_error) {
            self.connects_failed += 1;
            return Err(EMFILE);
        }
        let socket = self.new_socket(Peer::Nobody);
        let op = self.op(Kind::Connect { target }, socket, conn);
        self.sockets[socket].connect = Some(op);
        Ok((socket, op))
    }

    fn new_socket(&mut self, peer: Peer) -> usize {
        self.sockets.push(Socket {
            peer,
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
            shut_read: false,
            shut_write: false,
            closed: false,
            ended_us: None,
            accepted_us: 0,
            told_us: 0,
            receive_due: false,
            send_due: false,
        });
        self.sockets.len() - 1
    }

    fn open_socket(&mut self, socket: usize) -> &mut Socket {
        let open = &mut self.sockets[socket];
        assert!(!open.closed, "an operation on the closed socket s{socket}");
        open
    }

    pub(crate) fn receive(&mut self, conn: Key, socket: usize) -> u64 {
        let open = self.open_socket(socket);
        assert!(open.receive.is_none(), "two receives on s{socket}");
        assert!(open.connect.is_none(), "a receive on a socket that is being connected");
        let op = self.op(Kind::Receive, socket, conn);
        self.sockets[socket].receive = Some(op);
        op
    }

    pub(crate) fn send(&mut self, conn: Key, socket: usize, lent: Lent) -> u64 {
        let open = self.open_socket(socket);
        assert!(open.send.is_none(), "two sends on s{socket}");
        assert!(open.connect.is_none(), "a send on a socket that is being connected");
        let hash = hash(lent.cells().iter().map(Cell::get));
        let op = self.op(Kind::Send { lent, hash, accepted: 0, done: false }, socket, conn);
        self.note(2, hash);
        self.sockets[socket].send = Some(op);
        op
    }

    pub(crate) fn watch_hangup(&mut self, conn: Key, socket: usize) -> u64 {
        let open = self.open_socket(socket);
        assert!(open.hangup.is_none(), "two watches on s{socket}");
        let op = self.op(Kind::Hangup, socket, conn);
        self.sockets[socket].hangup = Some(op);
        op
    }

    pub(crate) fn cancel(&mut self, op: u64) {
        self.note(3, op);
        if self.ops.contains_key(&op) {
            self.submissions.push(Submission::Cancel(op));
        }
    }

    pub(crate) fn shutdown(&mut self, socket: usize, half: Half) {
        self.note(4, socket as u64);
        self.open_socket(socket);
        self.endings.push(Ending::Shutdown(socket, half));
    }

    pub(crate) fn close(&mut self, socket: usize, how: Close) {
        self.note(5, socket as u64);
        let open = self.open_socket(socket);
        let in_flight = [open.receive, open.send, open.connect, open.hangup];
        assert!(in_flight == [None; 4], "s{socket} is closed with operations in flight: {in_flight:?}");
        open.closed = true;
        self.endings.push(Ending::Close(socket, how));
    }

    pub(crate) fn buffers_free(&self) -> usize {
        self.buffers - self.buffers_used.get()
    }

    // ---- the turn

    pub(crate) fn turn(&mut self, wait: Wait, completions: &mut Vec<Done>) {
        self.note(6, self.ready.len() as u64);
        self.stuck = false;
        self.now += 1 + self.rng.below(self.faults.work_us + 1);
        for ending in std::mem::take(&mut self.endings) {
            self.end(ending);
        }
        for submission in std::mem::take(&mut self.submissions) {
            self.submit(submission);
        }
        self.happen_until(self.now);
        // Accepts happen when the ring is entered: no more at once than the queue holds.
        if self.ready.len() < 64 {
            self.match_accepts();
        }
        while self.ready.is_empty() {
            let next = self.events.keys().next().map(|&(time, _)| time);
            let until = match (wait, next) {
                (Wait::Not, _) => break,
                (Wait::Until(deadline), Some(next)) if next <= deadline => next,
                (Wait::Until(deadline), _) => {
                    if deadline > self.now {
                        let overshoot = self.rng.skewed(self.faults.overshoot_us);
                        self.now = deadline + overshoot;
                        self.happen_until(self.now);
                    }
                    break;
                }
                (Wait::Forever, Some(next)) => next,
                (Wait::Forever, None) => {
                    self.stuck = true;
                    return;
                }
            };
            self.now = self.now.max(until);
            self.happen_until(self.now);
            self.match_accepts();
        }
        self.turns_idle = if self.ready.is_empty() { self.turns_idle + 1 } else { 0 };
        assert!(self.turns_idle < 20_000, "the shard spins: turn after turn without a completion ({wait:?})");
        let limit = match self.faults.turn_completions {
            0 => protocol::limits::COMPLETIONS_PER_TURN_MAX,
            limit => limit,
        };
        if self.rng.chance(self.faults.reorder) {
            self.reorder();
        }
        for _ in 0..limit.min(self.ready.len()) {
            if let Some(((socket, receives), completion)) = self.ready.pop_front() {
                self.note(7, (socket as u64) << 1 | u64::from(receives));
                self.say(|| format!("  => s{} {completion:?}", socket as isize));
                completions.push(completion);
            }
        }
    }

    /// Time passes while the shard looks elsewhere.
    pub(crate) fn pass(&mut self, us: u64) {
        let until = self.now + us;
        while let Some(&(time, _)) = self.events.keys().next()
            && time <= until
        {
            self.now = self.now.max(time);
            self.happen_until(self.now);
        }
        self.now = self.now.max(until);
        self.turns_idle = 0;
    }

    /// Mixes the lanes, and keeps the order within each.
    fn reorder(&mut self) {
        let mut lanes: BTreeMap<Lane, VecDeque<Done>> = BTreeMap::new();
        for (lane, completion) in std::mem::take(&mut self.ready) {
            lanes.entry(lane).or_default().push_back(completion);
        }
        while !lanes.is_empty() {
            let keys: Vec<Lane> = lanes.keys().copied().collect();
            let lane = self.rng.pick(&keys);
            let Some(queue) = lanes.get_mut(&lane) else { continue };
            if let Some(completion) = queue.pop_front() {
                self.ready.push_back((lane, completion));
            }
            if queue.is_empty() {
                lanes.remove(&lane);
            }
        }
    }

    fn happen_until(&mut self, time: u64) {
        loop {
            let Some((&key, &event)) = self.events.iter().next() else { return };
            if key.0 > time {
                return;
            }
            self.events.remove(&key);
            self.happen(event);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Receive(socket) => self.receive_progress(socket),
            Event::Send(socket) => self.send_progress(socket),
            Event::SendDone(op) => self.send_done(op),
            Event::Cancel(op) => self.cancel_happens(op),
            Event::Connect(op) => self.connect_happens(op),
            Event::Hang(socket) => self.hang_happens(socket),
            Event::Client(client, step) => self.client_step(client, step),
            Event::Backend(backend, step) => self.backend_step(backend, step),
        }
    }

    fn submit(&mut self, submission: Submission) {
        match submission {
            Submission::Op(op) => {
                let Some(Op { kind, socket, .. }) = self.ops.get(&op) else { return };
                let socket = *socket;
                match kind {
                    Kind::Accept { .. } => {}
                    Kind::Connect { .. } => {
                        let delay = self.delay();
                        self.after(delay, Event::Connect(op));
                    }
                    Kind::Receive => self.receive_soon(socket),
                    Kind::Send { .. } => self.send_soon(socket),
                    Kind::Hangup => self.hang_soon(socket),
                }
            }
            Submission::Cancel(op) => {
                // Those of receives would not be missed: a shutdown ends them too.
                let receives = matches!(self.ops.get(&op), Some(Op { kind: Kind::Receive, .. }));
                if !receives && self.strike(Planted::LostCancel) {
                    return;
                }
                let accepts = matches!(self.ops.get(&op), Some(Op { kind: Kind::Accept { .. }, .. }));
                let late_us = if accepts { 0 } else { self.faults.cancel_late_us };
                let delay = self.rng.skewed(late_us);
                self.after(delay, Event::Cancel(op));
            }
        }
    }

    fn end(&mut self, ending: Ending) {
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

    fn complete(&mut self, op: u64, completion: Done) {
        let Some(Op { socket, kind, .. }) = self.ops.remove(&op) else {
            panic!("op {op} completes twice");
        };
        let receives = matches!(kind, Kind::Receive);
        let gone = matches!(
            completion,
            Completion::ReceiveEnded { why: ReceiveEnd::Fin | ReceiveEnd::Error(ECONNRESET), .. }
                | Completion::Hangup { result: Ok(Hangup::Reset), .. }
        );
        if let Some(socket) = self.sockets.get_mut(socket) {
            if gone && socket.told_us == 0 {
                socket.told_us = self.now;
            }
            match kind {
                Kind::Accept { .. } => {}
                Kind::Connect { .. } => socket.connect = None,
                Kind::Receive => socket.receive = None,
                Kind::Send { .. } => socket.send = None,
                Kind::Hangup => socket.hangup = None,
            }
        }
        if let Kind::Accept { listener, .. } = kind {
            self.listeners[listener].accept = None;
        }
        if matches!(kind, Kind::Send { .. }) {
            if self.strike(Planted::LostSent) {
                return;
            }
            if let Completion::Sent { conn, result } = completion
                && self.strike(Planted::DoubleSent)
            {
                self.ready.push_back(((socket, false), Completion::Sent { conn, result }));
            }
        }
        if matches!(completion, Completion::ReceiveEnded { why: ReceiveEnd::Fin, .. })
            && self.strike(Planted::LostWakeUp)
        {
            return;
        }
        self.ready.push_back(((socket, receives), completion));
    }

    // ---- the kernel's side of each operation

    fn match_accepts(&mut self) {
        for index in 0..self.listeners.len() {
            while let Some(op) = self.listeners[index].accept
                && !self
                    .submissions
                    .iter()
                    .any(|waiting| matches!(waiting, Submission::Op(new) if *new == op))
                && let Some(&socket) = self.listeners[index].backlog.front()
            {
                let multishot =
                    matches!(self.ops.get(&op), Some(Op { kind: Kind::Accept { multishot: true, .. }, .. }));
                if self.rng.chance(self.faults.accept_error) {
                    self.complete(op, Completion::AcceptEnded { listener: index, error: Some(EMFILE) });
                    continue;
                }
                self.listeners[index].backlog.pop_front();
                self.sockets[socket].accepted_us = self.now;
                self.say(|| format!("s{socket} accepted"));
                let lane = (usize::MAX, false);
                let accepted = SimSocket(socket as u32);
                self.ready.push_back((lane, Completion::Accepted { listener: index, socket: accepted }));
                if !multishot || self.rng.chance(self.faults.accept_ends) {
                    self.complete(op, Completion::AcceptEnded { listener: index, error: None });
                }
            }
        }
    }

    pub(crate) fn receive_soon(&mut self, socket: usize) {
        let delay = self.delay();
        let receiver = &mut self.sockets[socket];
        if receiver.receive.is_some() && !receiver.receive_due {
            receiver.receive_due = true;
            self.after(delay, Event::Receive(socket));
        }
    }

    fn send_soon(&mut self, socket: usize) {
        let delay = self.delay();
        let sender = &mut self.sockets[socket];
        if sender.send.is_some() && !sender.send_due {
            sender.send_due = true;
            self.after(delay, Event::Send(socket));
        }
    }

    fn hang_soon(&mut self, socket: usize) {
        if self.sockets[socket].hangup.is_some() {
            let delay = self.delay();
            self.after(delay, Event::Hang(socket));
        }
    }

    fn receive_progress(&mut self, index: usize) {
        self.sockets[index].receive_due = false;
        let Some(op) = self.sockets[index].receive else { return };
        let Some(conn) = self.ops.get(&op).map(|op| op.conn) else { return };
        let socket = &self.sockets[index];
        let why = if !socket.inward.is_empty() {
            if self.buffers_free() == 0 || self.rng.chance(self.faults.receive_no_buffer) {
                ReceiveEnd::Error(Errno::NO_BUFFERS)
            } else {
                let limit = match self.faults.receive_bytes {
                    0 => self.buffer_bytes,
                    bytes => (self.rng.skewed(bytes as u64) as usize + 1).min(self.buffer_bytes),
                };
                let mut from = index;
                if self.strike(Planted::OthersBytes) {
                    from = self.sockets.iter().position(|s| !s.inward.is_empty()).unwrap_or(index);
                }
                let inward = &mut self.sockets[from].inward;
                let bytes: Vec<u8> = inward.drain(..limit.min(inward.len())).collect();
                self.note(8, hash(bytes.iter().copied()));
                let buffer = SimBuffer::new(bytes, &self.buffers_used);
                self.ready.push_back(((index, true), Completion::Received { conn, buffer }));
                self.peer_writable(index);
                if !self.rng.chance(self.faults.receive_rearm) {
                    return self.receive_soon(index);
                }
                if self.strike(Planted::ForgottenReceive) {
                    self.sockets[index].receive_due = true;
                    return;
                }
                ReceiveEnd::Rearm
            }
        } else if let Some(error) = socket.inward_error {
            ReceiveEnd::Error(error)
        } else if socket.inward_fin || socket.shut_read {
            ReceiveEnd::Fin
        } else {
            return;
        };
        self.complete(op, Completion::ReceiveEnded { conn, why });
    }

    fn send_progress(&mut self, index: usize) {
        self.sockets[index].send_due = false;
        let Some(op) = self.sockets[index].send else { return };
        let wrong = self.strike(Planted::WrongWindow);
        let piecewise = self.rng.chance(self.faults.send_piecewise);
        let short = self.rng.chance(self.faults.send_short);
        let late = if self.rng.chance(self.faults.send_late) { self.rng.skewed(20_000) } else { 0 };
        let part = self.rng.next();
        let Some(Op { kind: Kind::Send { lent, accepted, done, .. }, conn, .. }) = self.ops.get_mut(&op)
        else {
            return;
        };
        if *done {
            return;
        }
        let conn = *conn;
        let socket = &mut self.sockets[index];
        if socket.shut_write || socket.inward_error.is_some() {
            let error = if socket.shut_write { EPIPE } else { socket.inward_error.unwrap_or(ECONNRESET) };
            let result = if *accepted > 0 { Ok(*accepted as u32) } else { Err(error) };
            return self.complete(op, Completion::Sent { conn, result });
        }
        if socket.peer_closed {
            // The first send to a peer that is gone succeeds, and is answered by RST.
            *accepted = lent.len();
            *done = true;
            socket.inward_error = Some(ECONNRESET);
            self.after(late, Event::SendDone(op));
            self.receive_soon(index);
            return self.hang_soon(index);
        }
        let mut take = (lent.len() - *accepted).min(socket.outward_max.saturating_sub(socket.outward.len()));
        if piecewise && take > 1 {
            take = 1 + (part % take as u64) as usize;
        }
        let from = *accepted;
        socket.outward.extend(
            lent.cells()[from..from + take]
                .iter()
                .map(|cell| if wrong { cell.get().wrapping_add(1) } else { cell.get() }),
        );
        *accepted += take;
        let all = *accepted == lent.len();
        if all || short {
            *done = true;
            self.after(late, Event::SendDone(op));
        } else if socket.outward.len() < socket.outward_max {
            self.send_soon(index);
        }
        if take > 0 {
            self.peer_readable(index);
        }
    }

    fn send_done(&mut self, op: u64) {
        let Some(Op { kind: Kind::Send { lent, hash: before, accepted, .. }, conn, .. }) = self.ops.get(&op)
        else {
            return;
        };
        let after = hash(lent.cells().iter().map(Cell::get));
        assert!(*before == after, "memory lent to the kernel has changed");
        let completion = Completion::Sent { conn: *conn, result: Ok(*accepted as u32) };
        self.complete(op, completion);
    }

    fn cancel_happens(&mut self, op: u64) {
        let Some(Op { kind, conn, .. }) = self.ops.get(&op) else { return };
        let conn = *conn;
        let completion = match kind {
            Kind::Accept { listener, .. } => {
                Completion::AcceptEnded { listener: *listener, error: Some(Errno::CANCELED) }
            }
            Kind::Connect { .. } => Completion::Connected { conn, result: Err(Errno::CANCELED) },
            Kind::Receive => Completion::ReceiveEnded { conn, why: ReceiveEnd::Error(Errno::CANCELED) },
            Kind::Send { done: true, .. } => return,
            Kind::Send { accepted: 0, .. } => Completion::Sent { conn, result: Err(Errno::CANCELED) },
            Kind::Send { accepted, .. } => Completion::Sent { conn, result: Ok(*accepted as u32) },
            Kind::Hangup => Completion::Hangup { conn, result: Err(Errno::CANCELED), armed: false },
        };
        self.complete(op, completion);
    }

    fn connect_happens(&mut self, op: u64) {
        let Some(Op { kind: Kind::Connect { target }, socket, conn }) = self.ops.get(&op) else { return };
        let (target, socket, conn) = (*target, *socket, *conn);
        if self.rng.chance(self.faults.connect_hangs) {
            self.connects_failed += 1;
            return;
        }
        let host = self.hosts.iter().position(|host| host.address == target);
        let refuses = self.rng.chance(self.faults.connect_refused);
        let result = match host {
            Some(host) if self.hosts[host].hangs => return,
            Some(host) if !refuses && !self.hosts[host].refuses => {
                self.backend_accepts(host, socket);
                Ok(())
            }
            _ => {
                self.connects_failed += 1;
                Err(ECONNREFUSED)
            }
        };
        self.complete(op, Completion::Connected { conn, result });
    }

    fn hang_happens(&mut self, index: usize) {
        let socket = &self.sockets[index];
        let Some(op) = socket.hangup else { return };
        let Some(conn) = self.ops.get(&op).map(|op| op.conn) else { return };
        let result = if socket.inward_error.is_some() || (socket.shut_read && socket.inward_fin) {
            Hangup::Reset
        } else if socket.inward_fin || socket.shut_read {
            Hangup::Fin
        } else {
            return;
        };
        self.complete(op, Completion::Hangup { conn, result: Ok(result), armed: false });
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
        let socket = self.new_socket(peer);
        self.listeners[listener].backlog.push_back(socket);
        Ok(socket)
    }

    pub(crate) fn attach_peer(&mut self, socket: usize, peer: Peer) {
        self.sockets[socket].peer = peer;
    }

    fn peer_readable(&mut self, socket: usize) {
        match self.sockets[socket].peer {
            Peer::Client(client) => self.client_readable(client),
            Peer::Backend(backend) => self.backend_readable(backend),
            Peer::Nobody => {}
        }
    }

    fn peer_writable(&mut self, socket: usize) {
        match self.sockets[socket].peer {
            Peer::Client(client) => self.client_writable(client),
            Peer::Backend(backend) => self.backend_writable(backend),
            Peer::Nobody => {}
        }
    }

    /// Bytes taken; an error when the connection is reset.
    pub(crate) fn peer_write(&mut self, index: usize, bytes: &[u8]) -> Result<usize, Errno> {
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
        let socket = &mut self.sockets[index];
        if !socket.outward.is_empty() {
            let take = bytes_max.min(socket.outward.len());
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

    /// What is not as it was before the first client: operations, sockets, buffers.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (op, Op { kind, socket, .. }) in &self.ops {
            left.push(format!("op {op} on s{socket}: {kind:?}"));
        }
        for (index, socket) in self.sockets.iter().enumerate() {
            if !socket.closed {
                left.push(format!(
                    "s{index} of {:?} is open: {} bytes for the shard, {} for its peer, receive {:?}, send {:?}, watch {:?}",
                    socket.peer,
                    socket.inward.len(),
                    socket.outward.len(),
                    socket.receive,
                    socket.send,
                    socket.hangup,
                ));
            }
        }
        if self.buffers_used.get() > 0 {
            left.push(format!("{} receive buffers are out", self.buffers_used.get()));
        }
        left
    }
}
