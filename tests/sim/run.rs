//! A whole shard on a simulated machine: how it runs, and what must hold after every turn and at rest. What each client was
//! owed is in `oracle`.

use crate::backend::BackendHost;
use crate::client::ClientPlan;
use crate::disk::SimDisk;
use crate::io::{SimIo, SimSocket};
use crate::minimise::{TURNS, TURNS_OF_A_RUN};
use crate::plan::{Answer, Exchange, Fault, Request};
use crate::world::{Counts, Identity, Silence, Tongues, World};
use protocol::demo::DemoSettings;
use protocol::http::HeadLimits;
use protocol::phase::{Deadlines, End};
use shard::core::{JournalOf, Shard, Sleepy};
use shard::listing::Page;
use shard::mesh::{Command, Neighbours, Report, ShardPort, mailbox, neighbours};
use shard::settings::{HalfClose, LeaveChoices, OnLeave, Resume, Route, Settings, Sleep, SlowReader, TlsSet};
use shard::stats::StreamRecord;
use std::cell::{RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;

/// Turns of one run; beyond, something goes round in circles. Of one that is drawn, what it has to carry says how many: see
/// `Script::turns_max`.
const TURNS_MAX: u64 = 1_000_000;

/// Bytes of one record, in plain.
const TLS_RECORD_BYTES_MAX: usize = 16 << 10;

/// The two routes of every simulation: the demo model's, and the backends' for all else.
pub(crate) fn settings() -> Settings {
    let route = Route {
        name: "demo".to_owned(),
        path_prefix: "/demo".to_owned(),
        upstreams: Vec::new(),
        deadlines: Deadlines::default(),
        heartbeat_ms: 15_000,
        commit_ms: 10_000,
        half_close: HalfClose::Leave,
        event_ids: true,
        cors: protocol::cors::Cors::Off,
        // What is delivered is kept; who leaves is not waited for.
        resume: Some(Resume {
            window_bytes: 64 << 10,
            window_ms: 0,
            reader_lag_ms: 0,
            leave_choices: LeaveChoices::CANCEL,
            on_leave: OnLeave::Cancel,
            keep_ms: 1_000,
            slow_reader: SlowReader::Auto,
            durable: false,
        }),
    };
    let backends =
        Route { name: "all".to_owned(), path_prefix: "/".to_owned(), upstreams: vec![0], ..route.clone() };
    Settings {
        connections_max: 1000,
        listeners: Vec::new(),
        tls_handshake_ms: 10_000,
        tls_handshakes_max: 1000,
        backlog: 16,
        ring_depth: 64,
        buffers: 64,
        buffer_bytes: 4096,
        notsent_lowat_bytes: 16 * 1024,
        spin_us: 0,
        preempt_ms: 1,
        sleep: Sleep::Ring,
        head: HeadLimits::default(),
        body_bytes_max: 8 << 20,
        event_bytes_max: 256 << 10,
        lag_high_bytes: 64 << 10,
        lag_low_bytes: 16 << 10,
        resume_bytes_max: 1 << 20,
        detached_max: 100,
        mirror_readers: 64,
        resumes_per_s: 1_000,
        background_keep_ms: 600_000,
        background_window_bytes: 1 << 20,
        stream_key: [7; 32],
        stream_number_first: 1,
        retry_bytes_max: 64 << 10,
        overdraft_bytes_max: 64 << 20,
        pool_idle_max: 8,
        pool_idle_ms: 30_000,
        pool_age_ms: 0,
        routes: vec![route, backends],
        demo: DemoSettings::default(),
        records: true,
        durable: protocol::durable::Settings::default(),
        unix_time_at_start_s: 1_700_000_000,
        unix_time_at_start_ms: 0,
        seed: 1,
    }
}

/// How long a client may be left without a byte.
fn silence(settings: &Settings) -> Silence {
    let route = &settings.routes[1];
    let times = &route.deadlines;
    let waits = [
        times.connect_ms,
        times.upstream_head_ms,
        times.first_token_ms,
        times.between_tokens_ms,
        times.finish_ms,
    ];
    let total_us =
        if waits.contains(&0) { u64::MAX } else { waits.iter().map(|&ms| u64::from(ms) * 1000).sum() };
    let of = |ms: u32| if ms == 0 { total_us } else { u64::from(ms) * 1000 };
    Silence { heartbeat_us: of(route.heartbeat_ms), commit_us: of(route.commit_ms), total_us }
}

/// What the oracle may not demand.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lenience {
    /// Deadlines are so short, or peers so slow, that any answer may fail by one.
    pub(crate) impatient: bool,
    /// A peer breaks the rules of TLS.
    pub(crate) breach: bool,
    /// Streams outlive their connections.
    pub(crate) outlives: bool,
}

pub(crate) struct Sim {
    pub(crate) world: Rc<RefCell<World>>,
    /// The only one, or the first.
    pub(crate) shard: Shard<SimIo>,
    pub(crate) others: Vec<Shard<SimIo>>,
    /// Of several shards: where their bells are.
    pub(crate) ports: Vec<ShardPort>,
    pub(crate) tls: Option<Arc<TlsSet>>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) lenience: Lenience,
    pub(crate) records: Vec<StreamRecord>,
    /// Streams that did not end in peace, once all have left.
    pub(crate) forced: Option<u64>,
    /// What the control thread was told of streams, by ticket.
    pub(crate) pages: Vec<(u64, Page)>,
    /// A shard that always has fewer clients, and hands on to this one whatever it is given.
    mirror: Option<Neighbours<SimSocket>>,
    /// Of its durable streams.
    pub(crate) disk: Option<SimDisk>,
    /// Those of several shards, by shard.
    pub(crate) disks: Vec<SimDisk>,
    /// Reports for which there was no room: records, snapshots, and failures of TLS.
    records_dropped: u64,
    snapshots_dropped: u64,
    failures_dropped: u64,
    snapshots: u64,
    pub(crate) turns: u64,
    pub(crate) turns_max: u64,
    /// The most bytes that one response log held unconfirmed.
    pub(crate) lag_max: u64,
    pub(crate) log_bytes_max: u64,
    pub(crate) streams_max: usize,
}

/// What became of one exchange, as its client saw it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// Whole, as the backend meant it.
    Complete,
    /// An error answer of the shard's own.
    Error(u16, String),
    /// Some of its events and the dialect's error with this code.
    EventsThenError(usize, String),
    /// Some of its events; the body is visibly unfinished.
    EventsCut(usize),
    /// An ordinary body, visibly unfinished.
    BodyCut(usize),
    /// Nothing but perhaps a part of a head.
    Nothing,
}

impl Sim {
    pub(crate) fn new(seed: u64, settings: Settings, hosts: Vec<BackendHost>) -> Self {
        Sim::with_listeners(seed, settings, hosts, 1)
    }

    pub(crate) fn with_listeners(
        seed: u64,
        settings: Settings,
        hosts: Vec<BackendHost>,
        listeners: usize,
    ) -> Self {
        Sim::of_world(World::new(seed, listeners), settings, hosts)
    }

    /// With peers that speak TLS; on which listeners the shard does is for `settings` to say.
    pub(crate) fn secure(
        seed: u64,
        settings: Settings,
        hosts: Vec<BackendHost>,
        tongues: Tongues,
        identity: &Identity,
    ) -> Self {
        let mut world = World::new(seed, settings.listeners.len().max(1));
        world.tongues = tongues;
        let mut sim = Sim::of_world(world, settings, hosts);
        sim.certify(1, identity);
        sim
    }

    /// Certificate and trust from now on.
    pub(crate) fn certify(&mut self, epoch: u64, identity: &Identity) {
        let set = TlsSet {
            epoch,
            servers: vec![Arc::clone(&identity.server)],
            clients: vec![Arc::clone(&identity.client)],
        };
        let set = Arc::new(set);
        self.tls = Some(Arc::clone(&set));
        self.shard.command(Command::Tls(set));
    }

    fn of_world(mut world: World, settings: Settings, hosts: Vec<BackendHost>) -> Self {
        world.hosts = hosts;
        let upstreams = world.upstream_set(1, &(0..world.hosts.len()).collect::<Vec<_>>());
        world.silence = silence(&settings);
        world.buffers = usize::from(settings.buffers);
        world.buffer_bytes = settings.buffer_bytes as usize;
        world.backlog_max = settings.backlog as usize;
        world.log = std::env::var_os("SIM_LOG").is_some();
        let world = Rc::new(RefCell::new(world));
        let settings = Arc::new(settings);
        let shard = Shard::new(SimIo(Rc::clone(&world), 0), 0, Arc::clone(&settings), Arc::new(upstreams));
        Sim {
            world,
            shard,
            others: Vec::new(),
            ports: Vec::new(),
            tls: None,
            settings,
            lenience: Lenience::default(),
            records: Vec::new(),
            forced: None,
            pages: Vec::new(),
            mirror: None,
            disk: None,
            disks: Vec::new(),
            records_dropped: 0,
            snapshots_dropped: 0,
            failures_dropped: 0,
            snapshots: 0,
            turns: 0,
            turns_max: TURNS_MAX,
            lag_max: 0,
            log_bytes_max: 0,
            streams_max: 0,
        }
    }

    /// With durable streams on a disk, and what it holds.
    pub(crate) fn with_disk(mut self, disk: SimDisk) -> Self {
        match disk.of {
            JournalOf::Durable => self.shard.open_journal(disk.recover(), 7),
            JournalOf::Relayed => self.shard.open_stream_journal(disk.recover(), 7, 1 << 40),
        }
        self.disk = Some(disk);
        self
    }

    /// With a neighbour that gives back whatever it is handed.
    pub(crate) fn beside_a_mirror(mut self) -> Self {
        let ports: Vec<_> = (0..2).filter_map(|_| Some(mailbox().ok()?.1)).collect();
        let mut ends = neighbours(&ports).into_iter();
        if let (Some(own), Some(mut mirror)) = (ends.next(), ends.next()) {
            mirror.publish(Some(0));
            self.shard.meet(own);
            self.mirror = Some(mirror);
        }
        self
    }

    fn reflect(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        let mut rings = false;
        while let Some(socket) = mirror.take() {
            assert!(mirror.hand(1 - mirror.own(), socket).is_ok(), "there is room for what was given");
            rings = true;
        }
        if mirror.hand_no_more() {
            // The shard leaves, and so does this one.
            rings = true;
            self.mirror = None;
        }
        if rings {
            self.world().ring(0);
        }
    }

    pub(crate) fn world(&self) -> RefMut<'_, World> {
        self.world.borrow_mut()
    }

    pub(crate) fn exchange(&mut self, request: Request, answer: Answer) -> usize {
        let mut world = self.world();
        let id = world.exchanges.len();
        world.surplus_sent |= matches!(answer.fault, Fault::ShortLength(_));
        let exchange = Exchange::new(id, request, answer, &mut world.rng);
        world.exchanges.push(exchange);
        id
    }

    pub(crate) fn client(&mut self, plan: ClientPlan) -> usize {
        self.world().add_client(plan)
    }

    /// One client with one exchange.
    pub(crate) fn ask(&mut self, request: Request, answer: Answer) -> (usize, usize) {
        let id = self.exchange(request, answer);
        (self.client(ClientPlan::new(&[id])), id)
    }

    pub(crate) fn now_us(&self) -> u64 {
        self.world.borrow().now
    }

    pub(crate) fn turn(&mut self, sleepy: Sleepy) {
        self.turns += 1;
        TURNS.set(TURNS.get() + 1);
        assert!(self.turns < TURNS_OF_A_RUN.get(), "longer than the run that failed");
        assert!(self.turns < self.turns_max, "the run does not end");
        if !self.others.is_empty() {
            return self.turn_of_one(sleepy);
        }
        let mut sleepy = sleepy;
        let now_us = self.now_us();
        if let Some(disk) = &mut self.disk {
            disk.tell(&mut self.shard, now_us);
            sleepy = match (disk.due_us(), sleepy) {
                (Some(due_us), Sleepy::UntilUs(until_us)) => Sleepy::UntilUs(until_us.min(due_us)),
                (Some(due_us), Sleepy::Yes) => Sleepy::UntilUs(due_us),
                (_, sleepy) => sleepy,
            };
        }
        assert!(self.shard.turn(sleepy).is_ok(), "a simulated ring does not fail");
        let now_us = self.now_us();
        if let Some(disk) = &mut self.disk {
            disk.ask(&mut self.shard, now_us);
        }
        self.check_step(0);
        self.streams_max = self.streams_max.max(self.shard.population().2);
        if self.shard.take_woken() {
            loop {
                let next = self.world().next_command();
                let Some(command) = next else { break };
                self.shard.command(command);
            }
        }
        while let Some(report) = self.shard.next_report() {
            self.report(0, report);
        }
        self.reflect();
        if self.turns.is_multiple_of(128) {
            self.check_memory(0);
        }
    }

    /// As `host` does it: what finds no room is dropped and counted, except the news that the shard left.
    pub(crate) fn report(&mut self, ring: usize, report: Report) {
        if let Report::Left { forced } = report {
            let left = std::mem::replace(&mut self.world().rings[ring].left, true);
            assert!(!left, "a shard leaves once");
            self.forced = Some(self.forced.unwrap_or(0) + forced);
            if self.have_left() {
                self.world().shard_left();
            }
            return;
        }
        let room = self.world().takes_report();
        if !room {
            self.shard_mut(ring).report_dropped();
        }
        match report {
            Report::Ended(record) if room => self.records.push(*record),
            Report::Ended(_) => self.records_dropped += 1,
            Report::Snapshot { ticket, .. } => {
                assert_eq!(ticket, self.snapshots + self.snapshots_dropped, "each is answered, in order");
                *(if room { &mut self.snapshots } else { &mut self.snapshots_dropped }) += 1;
            }
            Report::TlsFailed(_) if !room => self.failures_dropped += 1,
            Report::TlsFailed(failure) => self.world().say(|| format!("TLS failed: {failure:?}")),
            Report::Streams { ticket, page } => self.pages.push((ticket, *page)),
            Report::Started | Report::Left { .. } | Report::Failed(_) => {}
        }
    }

    /// The oracle after every turn: what the shard keeps agrees with itself and with the machine.
    pub(crate) fn check_step(&self, ring: usize) {
        let world = self.world.borrow();
        let shard = self.shards().nth(ring).unwrap_or(&self.shard);
        let counters = &shard.stats().counters;
        let secure = world.tongues.clients.is_some() || world.tongues.backends.is_some();
        let (client_waiting_bytes, upstream_waiting_bytes) = shard.waiting_bytes();
        let mut counts = Counts {
            accepts: counters.accepts,
            client_received_bytes: counters.client_received_bytes + client_waiting_bytes,
            client_sent_bytes: counters.client_sent_bytes,
            upstream_received_bytes: counters.upstream_received_bytes + upstream_waiting_bytes,
            upstream_sent_bytes: counters.upstream_sent_bytes,
            sends: counters.sends,
            sends_short: counters.sends_short,
            connects: counters.upstream_connects,
        };
        if secure {
            // It counts what is said, and the machine what is sent.
            let Counts { accepts, sends, sends_short, connects, .. } = counts;
            counts = Counts { accepts, sends, sends_short, connects, ..world.rings[ring].counts };
        }
        assert_eq!(counts, world.rings[ring].counts, "what the shard has counted, and what happened");
        // It does not ask how a connect ended that it has given up.
        let errors = counters.upstream_connect_errors - counters.upstream_tls_handshake_failures;
        assert!(errors <= u64::from(world.connects_failed), "{errors} connects are said to have failed");
        // With thousands of connections not after every turn, or their number would be squared.
        let (clients, backends, ..) = shard.population();
        if !self.turns.is_multiple_of(1 + (clients + backends) as u64 / 64) {
            return;
        }
        if let Err(what) = shard.audit() {
            panic!("{what}");
        }
        let mut held = 0;
        for (key, socket, holding) in shard.holdings() {
            held += 1;
            let real = world.holding(socket);
            assert!(
                holding == real,
                "{key:?} on {socket:?}: the shard knows of {holding:?}, the kernel has {real:?}"
            );
        }
        assert_eq!(held, world.sockets_held(ring), "sockets that the shard has");
    }

    pub(crate) fn check_memory(&mut self, ring: usize) {
        let snapshot = self.shard_mut(ring).snapshot();
        let lag = snapshot.slowest.iter().map(|slow| slow.pending_bytes).max().unwrap_or(0);
        self.lag_max = self.lag_max.max(lag);
        self.log_bytes_max = self.log_bytes_max.max(snapshot.log_bytes);
        let world = self.world.borrow();
        // Above the mark: what arrives until the pause takes effect (at most every buffer once, and what comes
        // while a cancel is late), and what framing and ids add to small events (at most fourfold).
        // A record of TLS is opened when the last of it is there.
        let record = if world.tongues.backends.is_some() { TLS_RECORD_BYTES_MAX } else { 0 };
        let burst = (world.buffers * world.buffer_bytes + world.late_bytes_max + record) as u64;
        let largest =
            world.exchanges.iter().map(|exchange| exchange.answer.bytes as u64 + 200).max().unwrap_or(0);
        let bound = self.settings.lag_high_bytes + 4 * burst + largest;
        // Of what a reader has missed, nothing is held.
        let bound = if self.lenience.outlives { u64::MAX } else { bound };
        assert!(lag <= bound, "a response log holds {lag} bytes unconfirmed, of {bound} at most");
    }

    fn clients_wait(&self) -> bool {
        self.world.borrow().clients.iter().any(|client| client.waits())
    }

    /// Until every client has what it came for, or has gone.
    pub(crate) fn run(&mut self) {
        while self.clients_wait() && !self.have_left() {
            self.turn(Sleepy::Yes);
            let stuck = self.world.borrow().stuck && self.clients_wait();
            let state = if stuck { self.world.borrow().leftovers() } else { Vec::new() };
            assert!(!stuck, "the shard sleeps for ever while clients wait: {state:#?}");
        }
    }

    /// Until this many milliseconds from now have passed.
    pub(crate) fn run_ms(&mut self, ms: u64) {
        let until = self.now_us() + ms * 1000;
        while self.now_us() < until {
            self.turn(Sleepy::UntilUs(until));
        }
    }

    pub(crate) fn drain(&mut self, deadline_ms: u64) {
        let now = self.now_us();
        self.world().control.leaving_us.get_or_insert(now);
        self.command(&Command::Drain { deadline_ms });
    }

    pub(crate) fn stop(&mut self) {
        let now = self.now_us();
        self.world().control.leaving_us.get_or_insert(now);
        self.world().control.stopped = true;
        self.command(&Command::Stop);
    }

    /// Until the shard has left, after a drain or stop.
    pub(crate) fn run_until_left(&mut self) {
        while !self.have_left() {
            self.turn(Sleepy::Yes);
            assert!(!self.world.borrow().stuck || self.have_left(), "a draining shard sleeps for ever");
        }
        // Its last connections are joining; it does not sleep any more. What it has cancelled may end late.
        let late_ms = self.world().faults.cancel_late_us / 1_000;
        for ms in 0..200 + late_ms {
            if ms >= 200 && self.world.borrow().leftovers().is_empty() {
                break;
            }
            self.skip(1_000);
        }
    }

    /// Lets time pass for a shard that has left.
    pub(crate) fn skip(&mut self, us: u64) {
        self.world().pass(us);
        if self.others.is_empty() {
            return self.turn(Sleepy::No);
        }
        (0..=self.others.len()).for_each(|ring| self.turn_of(ring, Sleepy::No));
    }

    /// Runs to the end, drains, and checks everything that can be known.
    pub(crate) fn finish(mut self) -> Finished {
        self.run();
        if self.world().control.leaving_us.is_none() {
            self.drain(60_000);
        }
        self.run_until_left();
        self.settle();
        self.check()
    }

    /// Clients that are still there see what the shard's leaving means for them.
    pub(crate) fn settle(&mut self) {
        for _ in 0..3_600 {
            if !self.clients_wait() {
                return;
            }
            self.skip(1_000_000);
        }
    }

    /// The oracle at rest.
    pub(crate) fn check(self) -> Finished {
        let leftovers = self.world.borrow().leftovers();
        assert!(leftovers.is_empty(), "at rest there are left: {leftovers:#?}");
        self.shards().for_each(check_rest);
        let ends: u64 = self.shards().flat_map(|shard| shard.stats().ends).sum();
        let reported = self.records.len() as u64 + self.records_dropped;
        assert_eq!(ends, reported, "every stream ends once and is reported once");
        let dropped = self.records_dropped + self.snapshots_dropped + self.failures_dropped;
        assert_eq!(self.total(|counters| counters.records_dropped), dropped, "reports that found no room");
        let tickets = self.world.borrow().control.tickets;
        assert_eq!(self.snapshots + self.snapshots_dropped, tickets, "every question is answered");
        let mut outcomes = Vec::new();
        for index in 0..self.world.borrow().clients.len() {
            outcomes.push(self.check_client(index));
        }
        if !self.lenience.outlives {
            self.check_departures();
        }
        Finished { outcomes, sim: self }
    }
}

/// What a shard has left when all its clients have gone.
fn check_rest(shard: &Shard<SimIo>) {
    let (clients, backends, streams, _) = shard.population();
    assert_eq!((clients, backends, streams), (0, 0, 0), "clients, backends' connections and streams at rest");
    let snapshot = shard.snapshot();
    assert_eq!((snapshot.handshakes, snapshot.tls_bytes), (0, 0), "handshakes at rest, and what TLS holds");
    assert_eq!(snapshot.kept, shard::KeptTotals::default(), "what is kept of streams at rest");
    assert_eq!(snapshot.overdraft_bytes, 0, "what was drawn beyond all shares is back");
    let counters = &shard.stats().counters;
    let taken = counters.accepts + counters.handed_in - counters.handed_away;
    assert_eq!(taken, counters.closes, "every client that was taken was closed");
}

/// A run that kept all promises.
pub(crate) struct Finished {
    /// Per client, per exchange.
    pub(crate) outcomes: Vec<Vec<Outcome>>,
    pub(crate) sim: Sim,
}

impl Finished {
    pub(crate) fn ends(&self, end: End) -> u64 {
        self.sim.shards().map(|shard| shard.stats().ends[end as usize]).sum()
    }
}
