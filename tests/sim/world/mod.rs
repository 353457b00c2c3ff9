//! The simulated machine under a shard: virtual clock, sockets as pairs of bounded byte pipes, operations that own the
//! memory lent to them, and the faults a seed draws. Peers (`client`, `backend`) live in it and act by its events.

mod faults;
mod operations;
mod rings;
mod secure;
mod sockets;

pub(crate) use faults::{Faults, Planted};
pub(crate) use secure::{Heard, Identity, Tongues, name};
pub(crate) use sockets::{Peer, PeerRead, Unconnected};

use crate::backend::{BackendConn, BackendHost, BackendStep, HostStep};
use crate::client::{Client, ClientStep};
use crate::control::Control;
use crate::io::{SimBuffer, SimSocket};
use crate::plan::Exchange;
use crate::rng::Rng;
use operations::Op;
use rings::Ring;
use shard::core::Holding;
use shard::io::{Completion, Errno, ReceiveEnd, Wait};
use sockets::{Listener, Socket};
use std::collections::{BTreeMap, VecDeque};

/// How long a client may hear nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    /// In a stream.
    pub(crate) heartbeat_us: u64,
    /// Before it.
    pub(crate) commit_us: u64,
    /// Whatever it asked for.
    pub(crate) total_us: u64,
}

/// What the shard was told, to be compared with what it has counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Counts {
    pub(crate) accepts: u64,
    pub(crate) client_received_bytes: u64,
    pub(crate) client_sent_bytes: u64,
    pub(crate) upstream_received_bytes: u64,
    pub(crate) upstream_sent_bytes: u64,
    pub(crate) sends: u64,
    pub(crate) sends_short: u64,
    pub(crate) connects: u64,
}

pub(crate) type Done = Completion<SimSocket, SimBuffer>;

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
    /// A backend's machine dies, or is there again.
    Host(usize, HostStep),
    /// Some connection breaks.
    Break,
    /// The control thread's next order.
    Order(usize),
    /// A shard hears its bell.
    Bell(usize),
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
    /// One for each shard.
    pub(crate) rings: Vec<Ring>,
    next_op: u64,
    /// Those of the first shard, then those of the next, as many of each.
    pub(crate) listeners: Vec<Listener>,
    pub(crate) clients: Vec<Client>,
    pub(crate) hosts: Vec<BackendHost>,
    pub(crate) backends: Vec<BackendConn>,
    pub(crate) exchanges: Vec<Exchange>,
    pub(crate) buffers: usize,
    pub(crate) buffer_bytes: usize,
    pub(crate) pipe_bytes: usize,
    /// The most that a receive has brought while it was being cancelled.
    pub(crate) late_bytes_max: usize,
    pub(crate) backlog_max: usize,
    /// FNV of everything asked and answered, with its time: two runs of a seed agree.
    pub(crate) trace: u64,
    /// The shard would sleep forever and nothing will ever happen.
    pub(crate) stuck: bool,
    /// Connections that were queued when their listener was closed.
    pub(crate) backlog_lost: u32,
    /// Connects that failed, by the world's doing.
    pub(crate) connects_failed: u32,
    /// Some backend sends more than it said.
    pub(crate) surplus_sent: bool,
    /// By how much the clock has jumped, all together.
    pub(crate) jumped_us: u64,
    /// The same without the jump that is under way.
    pub(crate) jumped_before_us: u64,
    pub(crate) control: Control,
    pub(crate) silence: Silence,
    pub(crate) log: bool,
    pub(crate) tongues: Tongues,
    pub(crate) heard: Heard,
}

/// Turns one after the other that bring nothing any further. Timers of a silent minute with many clients are a thousand.
const TURNS_BARREN_MAX: u32 = 20_000;

/// Whether something has got further by it.
fn moves(completion: &Done) -> bool {
    match completion {
        Completion::Accepted { .. } | Completion::Connected { .. } | Completion::Received { .. } => true,
        Completion::ReceiveEnded { why, .. } => {
            !matches!(why, ReceiveEnd::Rearm | ReceiveEnd::Error(Errno::NO_BUFFERS))
        }
        Completion::Sent { result, .. } => *result != Ok(0),
        Completion::AcceptEnded { .. } | Completion::Hangup { .. } | Completion::Woken => false,
    }
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
            rings: vec![Ring::default()],
            next_op: 1,
            listeners: (0..listeners).map(|_| Listener::default()).collect(),
            clients: Vec::new(),
            hosts: Vec::new(),
            backends: Vec::new(),
            exchanges: Vec::new(),
            buffers: 64,
            buffer_bytes: 4096,
            pipe_bytes: 64 * 1024,
            late_bytes_max: 0,
            backlog_max: 128,
            trace: 0,
            stuck: false,
            backlog_lost: 0,
            connects_failed: 0,
            surplus_sent: false,
            jumped_us: 0,
            jumped_before_us: 0,
            control: Control::default(),
            silence: Silence { heartbeat_us: u64::MAX, commit_us: u64::MAX, total_us: u64::MAX },
            log: false,
            tongues: Tongues::default(),
            heard: Heard::default(),
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

    pub(crate) fn buffers_free(&self, ring: usize) -> usize {
        self.buffers - self.rings[ring].buffers_used.get()
    }

    // ---- the turn

    /// A turn of the shard with this ring.
    pub(crate) fn turn(&mut self, ring: usize, wait: Wait, completions: &mut Vec<Done>) {
        self.note(6, self.rings[ring].ready.len() as u64);
        self.stuck = false;
        self.now += 1 + self.rng.below(self.faults.work_us + 1);
        self.jump();
        self.send_last_words(ring);
        for ending in std::mem::take(&mut self.rings[ring].endings) {
            self.end(ending);
        }
        for submission in std::mem::take(&mut self.rings[ring].submissions) {
            self.submit(submission);
        }
        self.happen_until(self.now);
        self.hear_control();
        // Accepts happen when the ring is entered: no more at once than the queue holds.
        if self.rings[ring].ready.len() < 64 {
            self.match_accepts();
        }
        let awake = if self.rings.len() == 1 { self.sleep(wait) } else { self.lie_down(ring, wait) };
        if !awake {
            return;
        }
        // They had ended before anything came that answers them.
        let behind = std::mem::take(&mut self.rings[ring].ready);
        for op in std::mem::take(&mut self.rings[ring].deferred) {
            self.send_done(op);
        }
        self.rings[ring].ready.extend(behind);
        let limit = match self.faults.turn_completions {
            0 => protocol::limits::COMPLETIONS_PER_TURN_MAX,
            limit => limit,
        };
        if self.rng.chance(self.faults.reorder) {
            self.reorder(ring);
        }
        let mut moved = false;
        for _ in 0..limit.min(self.rings[ring].ready.len()) {
            if let Some(((socket, receives), completion)) = self.rings[ring].ready.pop_front() {
                moved |= moves(&completion);
                self.note(7, (socket as u64) << 1 | u64::from(receives));
                self.say(|| format!("  => s{} {completion:?}", socket as isize));
                self.tell(ring, socket, &completion);
                completions.push(completion);
            }
        }
        let ring = &mut self.rings[ring];
        ring.turns_barren = if moved { 0 } else { ring.turns_barren + 1 };
        assert!(
            ring.turns_barren < TURNS_BARREN_MAX,
            "the shard spins: turn after turn of which nothing comes ({wait:?})"
        );
    }

    /// The only shard sleeps, and the world goes on. False: for ever.
    fn sleep(&mut self, wait: Wait) -> bool {
        let hour_later = self.now + 3_600_000_000;
        while self.rings[0].ready.is_empty() {
            if wait == Wait::Forever && self.now > hour_later {
                // Connections go on breaking for a client that waits for ever.
                self.stuck = true;
                return false;
            }
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
                    return false;
                }
            };
            self.now = self.now.max(until);
            self.happen_until(self.now);
            self.hear_control();
            self.match_accepts();
        }
        true
    }

    fn hear_control(&mut self) {
        if std::mem::take(&mut self.control.rung) {
            self.ring(0);
        }
    }

    /// Notes what the shard is told.
    fn tell(&mut self, ring: usize, socket: usize, completion: &Done) {
        let counts = &mut self.rings[ring].counts;
        let Some(told) = self.sockets.get_mut(socket) else {
            counts.accepts += u64::from(matches!(completion, Completion::Accepted { .. }));
            return;
        };
        let client = matches!(told.peer, Peer::Client(_));
        match completion {
            Completion::Received { buffer, .. } if client => {
                counts.client_received_bytes += buffer.len() as u64
            }
            Completion::Received { buffer, .. } => counts.upstream_received_bytes += buffer.len() as u64,
            Completion::ReceiveEnded { .. } => told.holding.receive = false,
            Completion::Connected { .. } => told.holding.connect = false,
            Completion::Sent { result, .. } => {
                let (lent, bytes) = (told.holding.lent_bytes, *result.as_ref().unwrap_or(&0));
                told.holding.lent_bytes = 0;
                counts.sends += 1;
                counts.sends_short += u64::from(bytes < lent);
                *(if client { &mut counts.client_sent_bytes } else { &mut counts.upstream_sent_bytes }) +=
                    u64::from(bytes);
            }
            Completion::Hangup { armed, .. } => told.holding.hangup &= armed,
            Completion::Accepted { .. } | Completion::AcceptEnded { .. } | Completion::Woken => {}
        }
    }

    /// What the kernel holds of this socket, and has not told the end of.
    pub(crate) fn holding(&self, socket: SimSocket) -> Holding {
        self.sockets[socket.0 as usize].holding
    }

    /// Whether any connection between the shard and a backend was broken by the network.
    pub(crate) fn has_broken_backends(&self) -> bool {
        self.sockets.iter().any(|socket| socket.broken && !matches!(socket.peer, Peer::Client(_)))
    }

    /// Sockets that a shard has not closed and of which it knows.
    pub(crate) fn sockets_held(&self, ring: usize) -> usize {
        let held = |socket: &&Socket| !socket.closed && socket.conn.is_some() && socket.ring == ring;
        self.sockets.iter().filter(held).count()
    }

    /// The clock jumps: the shard slept on while the world went on, or everything stood still.
    fn jump(&mut self) {
        if self.faults.jump_us == 0 || !self.rng.chance(5) {
            return;
        }
        let by_us = self.rng.skewed(self.faults.jump_us);
        self.say(|| format!("the clock jumps by {by_us} us"));
        self.jumped_us += by_us;
        if self.rng.chance(500) {
            self.pass(by_us);
        } else {
            self.now += by_us;
        }
        self.jumped_before_us = self.jumped_us;
    }

    pub(crate) fn break_later(&mut self) {
        if self.faults.break_every_us > 0 && self.clients.iter().any(Client::waits) {
            // Not so often that time stands still: a minimised script may say anything.
            let delay = self.rng.below(2 * self.faults.break_every_us.max(1_000));
            self.after(delay, Event::Break);
        }
    }

    /// A shard hears its bell.
    pub(crate) fn ring(&mut self, ring: usize) {
        self.rings[ring].ready.push_back(((usize::MAX, true), Completion::Woken));
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
        self.rings.iter_mut().for_each(|ring| ring.turns_barren = 0);
    }

    /// Mixes the lanes, and keeps the order within each.
    fn reorder(&mut self, ring: usize) {
        let mut lanes: BTreeMap<Lane, VecDeque<Done>> = BTreeMap::new();
        for (lane, completion) in std::mem::take(&mut self.rings[ring].ready) {
            lanes.entry(lane).or_default().push_back(completion);
        }
        // Each lane has as many places as completions, anywhere.
        let mut places: Vec<Lane> =
            lanes.iter().flat_map(|(&lane, queue)| queue.iter().map(move |_| lane)).collect();
        for last in (1..places.len()).rev() {
            places.swap(last, self.rng.below(last as u64 + 1) as usize);
        }
        for lane in places {
            let next = lanes.get_mut(&lane).and_then(VecDeque::pop_front);
            self.rings[ring].ready.extend(next.map(|completion| (lane, completion)));
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
            Event::Host(host, step) => self.host_step(host, step),
            Event::Break => {
                self.break_one();
                self.break_later();
            }
            Event::Order(order) => self.gives_order(order),
            Event::Bell(ring) => self.ring(ring),
        }
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
        for ring in &self.rings {
            if ring.buffers_used.get() > 0 {
                left.push(format!("{} receive buffers are out", ring.buffers_used.get()));
            }
        }
        left
    }
}
