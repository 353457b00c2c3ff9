//! `Shard<I: Io>`: accepts clients, runs their streams, keeps backends' connections. Drives the machines of `protocol`;
//! knows neither kernel nor clock, and runs unchanged on the simulated `Io`.
//!
//! One turn: all completions out of the ring, each to its connection, due timers, then the sends that have become possible.

mod accept;
mod ages;
mod audit;
mod backend;
mod background;
mod balance;
mod budget;
mod client;
mod conn;
mod deadline;
mod demo;
mod directory;
mod durable;
mod finish;
mod handover;
mod journal;
mod kept;
mod listing;
mod mirror;
mod moves;
mod reader;
mod relay;
mod resume;
mod secure;
mod stored;
mod stream;
mod tail;
mod transfer;

use crate::io::{Completion, Errno, Io, Wait};
use crate::mesh::{Command, Neighbours, Report};
use crate::settings::{Route, Settings, TlsSet, UpstreamSet};
use crate::stats::{SlowConnection, Snapshot, Stats, UpstreamSnapshot};
use crate::tls::Scratch;
use accept::Acceptor;
pub use audit::Holding;
use backend::Pool;
use balance::Balance;
use conn::{Conn, Role};
use directory::Directory;
use durable::DurableStreams;
pub use journal::JournalOf;
use kept::Kept;
pub use kept::{KeptTotals, stream_id};
use mirror::Mirrors;
use moves::{Moves, Newcomer};
use protocol::http::DateLine;
use protocol::limits::{COMPLETIONS_PER_TURN_MAX, SLOWEST_LISTED, TURN_FAULT_MS};
use protocol::phase::Phase;
use protocol::slots::{Key, Slots};
use protocol::wheel::{TimerId, Wheel};
use secure::Handshakes;
use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
pub(crate) use stream::Description;
use stream::Stream;

/// How long the caller lets a turn sleep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sleepy {
    /// Until there is something to do.
    Yes,
    /// Not at all.
    No,
    /// At most until this time of [`Io::now_us`].
    UntilUs(u64),
}

/// Whose timer it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TimerOf {
    Conn(Key),
    Stream(Key),
    Acceptor(u32),
    Handshakes,
    Durable,
    Drain,
    /// A stream without a client, or one that is over, has had its time.
    Source(Key),
    /// Readers wait for their turn to begin.
    Resumes,
    /// The journal of kept streams has something to do.
    Stored,
    /// Limits in time of streams that can be resumed.
    Ages,
}

/// What the shard has been told about its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leaving {
    No,
    /// Streams may finish until then, ms.
    Draining {
        deadline_ms: u64,
    },
    /// In-band errors are going out until then, ms.
    Stopping {
        deadline_ms: u64,
    },
}

/// Bytes that one connection and its stream take in the slabs and the wheel; sockets of `Io` are small.
pub(crate) const fn slab_entry_bytes() -> u64 {
    (size_of::<Conn<u64>>() + size_of::<Stream>() + 2 * 64) as u64
}

/// One core's data plane.
pub struct Shard<I: Io> {
    io: I,
    index: usize,
    settings: Arc<Settings>,
    upstreams: Arc<UpstreamSet>,
    tls: Arc<TlsSet>,
    /// The clock, read once when a turn wakes.
    now_us: u64,
    started_us: u64,
    conns: Slots<Conn<I::Socket>>,
    streams: Slots<Stream>,
    wheel: Wheel<TimerOf>,
    acceptors: Vec<Acceptor>,
    pool: Pool,
    durable: DurableStreams,
    kept: Kept,
    clients: usize,
    /// Accepted on a listener, and waiting for a slot: nothing of theirs has been read.
    parked: VecDeque<Newcomer<I::Socket>>,
    moves: Moves,
    balance: Balance,
    mirrors: Mirrors,
    directory: Directory,
    handshakes: Handshakes,
    tls_scratch: Scratch,
    /// None: the only shard.
    neighbours: Option<Neighbours<I::Parcel>>,
    stats: Stats,
    completions: Vec<Completion<I::Socket, I::Buffer>>,
    /// Connections that may have something to send.
    dirty: Vec<Key>,
    /// Completions of receives that wait for a later turn, in their order.
    waiting: VecDeque<Completion<I::Socket, I::Buffer>>,
    /// Memory that streams and connections hold beyond the share of each, bytes.
    overdraft_bytes: u64,
    /// Connections whose receive found no buffer.
    starved: Vec<Key>,
    fired: Vec<TimerOf>,
    /// Heads and errors are put together here.
    scratch: Vec<u8>,
    date: DateLine,
    reports: VecDeque<Report>,
    leaving: Leaving,
    leaving_timer: Option<TimerId>,
    /// Streams that a drain or stop ended.
    forced: u64,
    left: bool,
    woken: bool,
    /// Something waits for a send whose confirmation is deferred, or for nothing but the next turn, which does not sleep.
    hurried: bool,
    /// The clock at the end of the last turn: what was sent in it was handed to the kernel then.
    handed_us: u64,
    /// Streams begun; seeds the demo model and rotates between equal backends.
    begun: u64,
}

impl<I: Io> Shard<I> {
    /// A shard that accepts on all listeners of its `Io` from its first turn on.
    pub fn new(io: I, index: usize, settings: Arc<Settings>, upstreams: Arc<UpstreamSet>) -> Self {
        let now_us = io.now_us();
        let listeners = io.listeners();
        let clients_max = settings.connections_max;
        // Each client may hold a backend's connection, while those of its earlier requests or attempts are still being
        // closed; the pool's idle ones come on top.
        let conns_max = clients_max * 4
            + settings.detached_max
            + settings.pool_idle_max * upstreams.upstreams.len().max(1);
        let mut shard = Shard {
            io,
            index,
            conns: Slots::new(conns_max),
            // Each client has one, or reads one that lost its client meanwhile; some have none.
            streams: Slots::new(2 * clients_max + settings.detached_max),
            wheel: Wheel::new(now_us / 1000),
            acceptors: (0..listeners).map(|_| Acceptor::default()).collect(),
            pool: Pool::default(),
            durable: DurableStreams::new(settings.durable.clone()),
            kept: Kept::new(&settings, index),
            clients: 0,
            parked: VecDeque::new(),
            moves: Moves::default(),
            balance: Balance::default(),
            mirrors: Mirrors::default(),
            directory: Directory::default(),
            handshakes: Handshakes::default(),
            tls_scratch: Scratch::default(),
            neighbours: None,
            stats: Stats::default(),
            completions: Vec::with_capacity(COMPLETIONS_PER_TURN_MAX),
            dirty: Vec::new(),
            waiting: VecDeque::new(),
            overdraft_bytes: 0,
            starved: Vec::new(),
            fired: Vec::new(),
            scratch: Vec::with_capacity(1024),
            date: DateLine::default(),
            reports: VecDeque::new(),
            leaving: Leaving::No,
            leaving_timer: None,
            forced: 0,
            left: false,
            woken: false,
            hurried: false,
            handed_us: now_us,
            begun: 0,
            now_us,
            started_us: now_us,
            settings,
            upstreams,
            tls: Arc::default(),
        };
        shard.pool.follow(shard.upstreams.upstreams.len());
        for listener in 0..listeners {
            shard.follow_accept(listener);
        }
        shard.reports.push_back(Report::Started);
        shard
    }

    /// From now on clients are shared with other shards.
    pub fn meet(&mut self, neighbours: Neighbours<I::Parcel>) {
        self.durable.store.be_placed(neighbours.own(), neighbours.shards());
        self.neighbours = Some(neighbours);
        self.publish_load();
    }

    /// One turn. Sleeps no longer than the next timer and the caller allow.
    ///
    /// # Errors
    /// When the ring itself is unusable; the shard is lost then.
    pub fn turn(&mut self, sleepy: Sleepy) -> Result<(), Errno> {
        let wait = self.wait(sleepy);
        let mut completions = std::mem::take(&mut self.completions);
        let result = self.io.turn(wait, &mut completions);
        self.now_us = self.io.now_us();
        self.hurried = false;
        self.stats.counters.turns += 1;
        if completions.len() >= COMPLETIONS_PER_TURN_MAX {
            self.stats.counters.turns_full += 1;
        }
        self.touch(&completions);
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        self.complete_waiting();
        self.read_letters();
        self.fire_timers();
        self.follow_journal();
        self.follow_stored();
        self.serve_durable();
        self.store_stirred();
        self.serve_readers();
        self.follow_directory();
        self.follow_moves();
        self.follow_balance();
        self.pump_dirty();
        self.feed_starved();
        if !self.parked.is_empty() {
            self.serve_waiting();
            // Who was moved here comes with a request.
            self.pump_dirty();
        }
        self.follow_leaving();
        self.ring_neighbours();
        self.handed_us = self.io.now_us();
        let turn_us = self.handed_us.saturating_sub(self.now_us);
        self.stats.histograms.turn_us.saturating_record(turn_us);
        if turn_us > TURN_FAULT_MS * 1000 {
            self.stats.counters.turns_slow += 1;
        }
        result
    }

    /// Reads a little of every connection and stream that a batch is about, so that the memory of all of them comes into the
    /// cache at once, not one miss behind the other: between two events of a stream, others have pushed it out. What is needed
    /// a little later is only asked for.
    fn touch(&self, completions: &[Completion<I::Socket, I::Buffer>]) {
        for completion in completions {
            if let Some(conn) = completion.conn().and_then(|key| self.conns.get(key)) {
                black_box((conn.ledger, conn.excess, conn.ops.receive, conn.timer));
            }
        }
        let streams = || {
            completions
                .iter()
                .filter_map(|completion| self.conns.get(completion.conn()?)?.stream)
                .filter_map(|key| self.streams.get(key))
        };
        for stream in streams() {
            black_box((stream.response.end(), stream.first_token_us, stream.phase, stream.timer));
            let events = stream.events.as_ref().map(|events| std::ptr::from_ref(&**events).cast());
            for apart in stream.response.apart().into_iter().chain(events) {
                self.io.prefetch(apart);
                self.io.prefetch(apart.wrapping_add(64));
            }
        }
        // Whom it will be sent to.
        for conn in streams().filter_map(|stream| self.conns.get(stream.client?)) {
            black_box((conn.dirty, conn.ledger, conn.timer));
        }
    }

    fn wait(&self, sleepy: Sleepy) -> Wait {
        let busy = self.hurried
            || !self.dirty.is_empty()
            || !self.reports.is_empty()
            || !self.waiting.is_empty()
            || self.durable.is_busy()
            || self.kept.is_busy()
            || self.mirrors.rung
            || self.directory.rung
            || self.left
            || self.is_closing_listeners();
        if busy || sleepy == Sleepy::No {
            return Wait::Not;
        }
        let timer_us = self.wheel.next_ms().map(|ms| ms * 1000);
        let limit_us = match sleepy {
            Sleepy::UntilUs(limit_us) => Some(limit_us),
            _ => None,
        };
        match (timer_us, limit_us) {
            (None, None) => Wait::Forever,
            (Some(until), None) | (None, Some(until)) => Wait::Until(until),
            (Some(timer_us), Some(limit_us)) => Wait::Until(timer_us.min(limit_us)),
        }
    }

    /// When the next timer is due, µs of [`Io::now_us`].
    pub fn next_deadline_us(&self) -> Option<u64> {
        self.wheel.next_ms().map(|ms| ms * 1000)
    }

    /// Whether the mailbox rang since the last call.
    pub fn take_woken(&mut self) -> bool {
        std::mem::take(&mut self.woken)
    }

    /// The next report for the control thread.
    pub fn next_report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// A report could not be delivered.
    pub fn report_dropped(&mut self) {
        self.stats.counters.records_dropped += 1;
    }

    /// The shard has ended all it had; its thread may end.
    pub fn has_left(&self) -> bool {
        self.left
    }

    /// The `Io`, for its owner's own business (simulations, hosts).
    pub fn io_mut(&mut self) -> &mut I {
        &mut self.io
    }

    /// The counters so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Client connections, backend connections, streams and timers that exist; all zero at rest after a drain.
    pub fn population(&self) -> (usize, usize, usize, usize) {
        (self.clients, self.conns.len() - self.clients, self.streams.len(), self.wheel.len())
    }

    /// Carries out what the control thread says.
    pub fn command(&mut self, command: Command) {
        match command {
            Command::Upstreams(upstreams) => {
                self.pool.follow(upstreams.upstreams.len());
                self.upstreams = upstreams;
            }
            Command::Tls(tls) => {
                self.handshakes.follow(&tls);
                self.tls = tls;
            }
            Command::Snapshot { ticket } => {
                let snapshot = Box::new(self.snapshot());
                self.reports.push_back(Report::Snapshot { ticket, snapshot });
            }
            Command::Streams { ticket, inquiry } => {
                let page = Box::new(self.list_streams(&inquiry));
                self.reports.push_back(Report::Streams { ticket, page });
            }
            Command::Drain { deadline_ms } => self.drain(deadline_ms),
            Command::Stop => self.stop(),
        }
        // The next turn may sleep.
        self.ring_neighbours();
    }

    fn complete(&mut self, completion: Completion<I::Socket, I::Buffer>) {
        match completion {
            Completion::Accepted { listener, socket } => self.accepted(listener, socket),
            Completion::AcceptEnded { listener, op, error } => self.accept_ended(listener, op, error),
            Completion::Connected { conn, result } => self.connected(conn, result),
            Completion::Received { conn, buffer } => self.received(conn, buffer),
            Completion::ReceiveEnded { conn, why } if self.is_waiting(conn) => {
                self.make_wait(conn, Completion::ReceiveEnded { conn, why });
            }
            Completion::ReceiveEnded { conn, why } => self.receive_ended(conn, why),
            Completion::Sent { conn, result } => self.sent(conn, result),
            Completion::Hangup { conn, result, armed } => self.hung_up(conn, result, armed),
            Completion::Woken => {
                self.woken = true;
                self.mirrors.rung = self.neighbours.is_some();
                self.directory.rung = self.neighbours.is_some();
                self.serve_waiting();
                self.look_for_emptier();
            }
        }
    }

    /// `Some(true)`: a client's connection.
    fn role(&self, conn: Key) -> Option<bool> {
        self.conns.get(conn).map(Conn::is_client)
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }

    /// Seconds since 1970.
    fn unix_time_s(&self) -> u64 {
        self.settings.unix_time_at_start_s + (self.now_us - self.started_us) / 1_000_000
    }

    fn route(&self, index: usize) -> &Route {
        &self.settings.routes[index]
    }

    fn mark_dirty(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && !conn.dirty
        {
            conn.dirty = true;
            self.dirty.push(key);
        }
    }

    /// The state at this instant.
    pub fn snapshot(&self) -> Snapshot {
        let mut phases = [0; Phase::COUNT];
        let (mut log_bytes, mut pending_bytes, mut in_flight_bytes) = (0, 0, 0);
        for (_, stream) in self.streams.iter() {
            // A tail is nobody's stream.
            phases[stream.phase as usize] += u64::from(!self.is_tail(stream));
            let request = stream.request().map_or(0, |request| request.log.memory_bytes());
            log_bytes += (request + stream.response.memory_bytes()) as u64;
        }
        let (mut lagging, mut tls_bytes) = (Vec::new(), 0);
        for (key, conn) in self.conns.iter() {
            in_flight_bytes += u64::from(conn.lent_bytes());
            tls_bytes += conn.tls.as_ref().map_or(0, |tls| tls.held_bytes() as u64);
            let Some(stream) = conn.stream.and_then(|key| self.streams.get(key)) else {
                if conn.is_client() {
                    let phase = match conn.held.is_empty() {
                        _ if conn.is_handshaking() => Phase::Handshake,
                        true => Phase::KeptAlive,
                        false => Phase::Head,
                    };
                    phases[phase as usize] += 1;
                }
                continue;
            };
            let lag = match &stream.reader {
                Some(reader) => self.owed_to(reader, stream),
                None if conn.is_client() => conn.ledger.lag(stream.response.end()),
                None => conn.ledger.lag(stream.request_end()),
            };
            pending_bytes += lag;
            if conn.is_client() && lag > 0 {
                lagging.push((lag, key));
            }
        }
        lagging.sort_unstable_by_key(|&(lag, _)| std::cmp::Reverse(lag));
        lagging.truncate(SLOWEST_LISTED);
        Snapshot {
            shard: self.index,
            stats: self.stats_at_present(),
            connections: self.clients,
            handshakes: self.handshakes.count,
            parked: self.parked.len(),
            upstream_connections: self.conns.len() - self.clients,
            phases,
            in_flight_bytes,
            pending_bytes,
            log_bytes,
            tls_bytes,
            overdraft_bytes: self.overdraft_bytes,
            kept: self.kept.totals(),
            durable: self.durable_totals(),
            journal: self.durable.store.journal_state(),
            stream_journal: self.kept.stored.as_ref().map(|stored| stored.journal.state()),
            buffers_free: self.io.buffers_free(),
            ring_refusals: self.io.refusals(),
            timers: self.wheel.len(),
            draining: self.leaving != Leaving::No,
            upstreams: self
                .pool
                .upstreams
                .iter()
                .map(|upstream| UpstreamSnapshot {
                    active: upstream.active,
                    idle: upstream.idle.len() as u64,
                    failures: upstream.failures,
                })
                .collect(),
            slowest: lagging.into_iter().filter_map(|(lag, key)| self.slow_connection(lag, key)).collect(),
        }
    }

    /// What is counted elsewhere is taken in.
    fn stats_at_present(&self) -> Stats {
        let mut stats = self.stats.clone();
        let durable = self.durable.store.counters();
        let counters = &mut stats.counters;
        counters.durable_creates = durable.creates;
        counters.durable_appends = durable.appends;
        counters.durable_append_bytes = durable.append_bytes;
        counters.durable_duplicates = durable.duplicates;
        counters.durable_reads = durable.reads;
        counters.durable_expiries = durable.expiries;
        counters.durable_evictions = durable.evictions;
        counters.durable_trimmed_bytes = durable.trimmed_bytes;
        counters.durable_full = durable.full;
        let (journal, rewritten_bytes) = self.durable.store.journal_counters();
        counters.durable_journal_records = journal.records;
        counters.durable_journal_bytes = journal.bytes;
        counters.durable_journal_syncs = journal.syncs;
        counters.durable_journal_failures = journal.failures;
        counters.durable_segments_removed = journal.removed;
        counters.durable_rewritten_bytes = rewritten_bytes;
        counters.durable_recovered = self.durable.recovered_streams;
        counters.durable_damages = self.durable.recovered_damage;
        if let Some(stored) = &self.kept.stored {
            let (journal, rewritten_bytes) = stored.journal.counters();
            counters.stored_records = journal.records;
            counters.stored_bytes = journal.bytes;
            counters.stored_syncs = journal.syncs;
            counters.stored_failures = journal.failures;
            counters.stored_segments_removed = journal.removed;
            counters.stored_rewritten_bytes = rewritten_bytes;
            counters.stored_recovered = stored.recovered_streams;
            counters.stored_damages = stored.recovered_damage;
            counters.stored_left_off = stored.journal.left_off();
        }
        stats
    }

    fn slow_connection(&self, pending_bytes: u64, key: Key) -> Option<SlowConnection> {
        let conn = self.conns.get(key)?;
        let stream = self.streams.get(conn.stream?)?;
        Some(SlowConnection {
            peer: self.io.peer(conn.socket),
            pending_bytes,
            in_flight_bytes: conn.ledger.in_flight(),
            phase: stream.phase,
            age_ms: (self.now_us - stream.started_us) / 1000,
        })
    }

    fn client_conns(&self) -> Vec<Key> {
        self.conns
            .iter()
            .filter(|(_, conn)| matches!(conn.role, Role::Client(_)))
            .map(|(key, _)| key)
            .collect()
    }
}
