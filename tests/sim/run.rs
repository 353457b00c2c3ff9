//! A whole shard on a simulated machine, and the oracle that says what its clients and backends were owed.

use crate::backend::BackendHost;
use crate::client::{Client, ClientPlan, Ended, How, Pace};
use crate::disk::SimDisk;
use crate::io::{SimIo, SimSocket};
use crate::minimise::{TURNS, TURNS_OF_A_RUN};
use crate::plan::{Answer, Exchange, Fault, Method, Request};
use crate::reader::{Message, read_events};
use crate::world::{Counts, Identity, Silence, Tongues, World};
use protocol::demo::DemoSettings;
use protocol::dialect::Dialect;
use protocol::http::HeadLimits;
use protocol::limits::INTERIM_RESPONSES_MAX;
use protocol::phase::{Deadlines, End};
use shard::core::{JournalOf, Shard, Sleepy};
use shard::listing::Page;
use shard::mesh::{Command, Neighbours, Report, ShardPort, mailbox, neighbours};
use shard::settings::{HalfClose, LeaveChoices, OnLeave, Resume, Route, Settings, Sleep, SlowReader, TlsSet};
use shard::stats::StreamRecord;
use std::cell::{RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;

/// Turns of one run; beyond, something goes round in circles.
const TURNS_MAX: u64 = 1_000_000;

/// A clock that jumps by this much may let deadlines pass.
const JUMP_US_MIN: u64 = 500_000;

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
    /// Reports for which there was no room: records, snapshots, and failures of TLS.
    records_dropped: u64,
    snapshots_dropped: u64,
    failures_dropped: u64,
    snapshots: u64,
    pub(crate) turns: u64,
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
            records_dropped: 0,
            snapshots_dropped: 0,
            failures_dropped: 0,
            snapshots: 0,
            turns: 0,
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
    pub(crate) fn beside_a_mirror(self) -> Self {
        self.with_mirror(0)
    }

    /// The same, and the neighbour is the home of durable streams: who asks for one goes there, comes back, and is served.
    pub(crate) fn beside_a_home(self) -> Self {
        self.with_mirror(1)
    }

    fn with_mirror(mut self, own: usize) -> Self {
        let ports: Vec<_> = (0..2).filter_map(|_| Some(mailbox().ok()?.1)).collect();
        let mut ends = neighbours(&ports);
        ends.rotate_left(own);
        let mut ends = ends.into_iter();
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
        assert!(self.turns < TURNS_MAX, "the run does not end");
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
        let mut counts = Counts {
            accepts: counters.accepts,
            client_received_bytes: counters.client_received_bytes,
            client_sent_bytes: counters.client_sent_bytes,
            upstream_received_bytes: counters.upstream_received_bytes,
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
        // Above the mark: what arrives until the pause takes effect (at most every buffer once, and what the pipe
        // holds while a cancel is late), and what framing and ids add to small events (at most fourfold).
        let burst = (world.buffers * world.buffer_bytes).max(2 * world.pipe_bytes) as u64;
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
        // Its last connections are joining; it does not sleep any more.
        for _ in 0..200 {
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

    fn check_departures(&self) {
        let world = self.world.borrow();
        let fin_leaves = self.settings.routes[1].half_close == HalfClose::Leave;
        for (id, exchange) in world.exchanges.iter().enumerate() {
            if exchange.left_how != Some(How::Reset) && !fin_leaves {
                continue;
            }
            let (Some(left_us), true) = (exchange.client_left_us, exchange.left_visibly) else { continue };
            if exchange.request.demo {
                continue;
            }
            for attempt in exchange.attempts.iter().filter(|attempt| !attempt.over) {
                let ended_us = world.sockets[attempt.socket].ended_us.unwrap_or(u64::MAX);
                // Events on their way to the shard are late by at most the run's own delay, twice over.
                let noticed_us = exchange
                    .left_socket
                    .map_or(0, |socket| world.sockets[socket].served_us.max(world.sockets[socket].told_us));
                // A shard that is given few completions per turn has a queue of them.
                let queued_us = if world.faults.turn_completions > 0 { 1_000_000 } else { 0 };
                // What came before the end is received first, in pieces as small as the run has them.
                let pieces = match world.faults.receive_bytes {
                    0 => 0,
                    bytes => 2 * world.pipe_bytes as u64 / bytes as u64,
                };
                let read_us = pieces * (world.faults.work_us + world.faults.delay_us + 1);
                let limit = left_us.max(noticed_us)
                    + read_us
                    + 100_000
                    + 4 * world.faults.delay_us
                    + world.faults.overshoot_us
                    + world.jumped_us
                    + queued_us;
                assert!(
                    ended_us <= limit,
                    "exchange {id}: its client left at {left_us}, its backend's connection was closed at {ended_us}"
                );
            }
        }
    }

    fn check_client(&self, index: usize) -> Vec<Outcome> {
        let world = self.world.borrow();
        let client = &world.clients[index];
        let who = format!("c{index} ({:?}, {:?})", client.ended, client.plan);
        assert!(client.reader.error.is_none(), "{who} cannot read its answer: {:?}", client.reader.error);
        if client.plan.raw.is_some() {
            return Vec::new();
        }
        let messages = &client.reader.messages;
        let asked = client.plan.exchanges.len();
        assert!(messages.len() <= asked, "{who} got {} answers to {asked} requests", messages.len());
        let mut outcomes: Vec<Outcome> = Vec::new();
        // A connection that ends with one answer leaves those behind it unanswered.
        let mut closing = false;
        for (nth, &id) in client.plan.exchanges.iter().enumerate() {
            let exchange = &world.exchanges[id];
            let who = format!("exchange {id} of {who}: {:?} {:?}", exchange.request, exchange.answer);
            let outcome = match messages.get(nth) {
                Some(message) => self.judge(&world, &who, id, message),
                None => Outcome::Nothing,
            };
            let told_status =
                matches!(&outcome, Outcome::EventsThenError(0, code) if code == "upstream_status");
            let committed_early = self.settings.routes[1].commit_ms > 0 && told_status;
            let excused = self.excused(&world, index, id, &outcome) || closing || committed_early;
            let failed = outcome != Outcome::Complete;
            assert!(!failed || excused, "{who} deserved its whole answer, and got {outcome:?}");
            if failed && !closing && client.ended == Some(Ended::Fin) && !client.half_closed {
                let jumped = client.jumped_us >= JUMP_US_MIN;
                let silent = matches!(outcome, Outcome::Nothing | Outcome::EventsCut(_));
                // An idle connection may be closed just as its next request is on its way.
                let leaving = world.control.leaving_us.is_some_and(|us| us < client.ended_us);
                let crossed = outcome == Outcome::Nothing
                    && (self.lenience.impatient || self.lenience.breach || leaving || jumped);
                let cut_by_stop = self.forced.is_some_and(|forced| forced > 0);
                // It was told so long ago that its connection has been closed since.
                let asleep = is_asleep(client, 50_000_000);
                assert!(
                    !silent || cut_by_stop || crossed || asleep,
                    "{who} was told nothing of its failure: {outcome:?}"
                );
            }
            if let Outcome::Error(_, code) | Outcome::EventsThenError(_, code) = &outcome
                && exchange.request.method != Method::Head
                && messages.get(nth).is_some_and(|message| message.complete)
            {
                assert!(self.plausible(&world, index, id, code), "{who} was told {code}");
            }
            closing |= failed
                || exchange.request.close
                || exchange.request.http10
                || exchange.answer.early_after.is_some()
                || messages.get(nth).is_some_and(|message| message.header("connection") == Some("close"));
            outcomes.push(outcome);
        }
        outcomes
    }

    /// Whether anything happened that allows this exchange not to be whole.
    fn excused(&self, world: &World, client: usize, id: usize, outcome: &Outcome) -> bool {
        let client = &world.clients[client];
        let exchange = &world.exchanges[id];
        let stays = matches!(client.ended, Some(Ended::Fin | Ended::Satisfied)) && !client.half_closed;
        let broken = client.socket.is_some_and(|socket| world.sockets[socket].broken);
        let forced = self.forced.is_some_and(|forced| forced > 0);
        // What has not begun when a shard leaves is refused, or its connection closed; what has is served.
        let left_out = matches!(outcome, Outcome::Nothing | Outcome::Error(503, _));
        let leaving = world.control.leaving_us.is_some_and(|us| us < client.ended_us);
        let code = match outcome {
            Outcome::Error(_, code) | Outcome::EventsThenError(_, code) => code.as_str(),
            _ => "",
        };
        let reset = matches!(code, "upstream_reset" | "upstream_truncated" | "none" | "");
        let by_backend = !exchange.wire.whole
            || world.connects_failed > 0
            || world.control.unresolved
            || world.surplus_sent
            || reset && world.has_broken_backends();
        // Connections that are long in closing hold their slots, of which there are four per client.
        let closing = code == "overload" && self.has_few_slots(world);
        self.lenience.impatient
            || self.lenience.breach
            || self.lenience.outlives && matches!(code, "lagged" | "stream_stopped")
            || client.jumped_us >= JUMP_US_MIN
            || broken
            || closing
            || leaving && (forced || left_out)
            || !stays && client.ended != Some(Ended::Reset)
            || client.half_closed && exchange.request.streaming
            || !exchange.request.demo && by_backend
            // It went on sending behind its own `Connection: close`, and was answered by RST.
            || client.ended == Some(Ended::Reset)
                && client.plan.pipelined
                && (exchange.request.close || exchange.request.http10)
            || exchange.answer.early_after.is_some()
            || is_asleep(client, 20_000_000)
            || exchange.request.body_bytes as u64 + 500 > self.settings.retry_bytes_max
                && world.hosts.iter().any(|host| host.idle_us > 0)
            || client.plan.leave.is_some_and(|(_, how)| how == How::HalfClose) && exchange.request.streaming
    }

    fn has_few_slots(&self, world: &World) -> bool {
        world.faults.cancel_late_us > 0 && self.settings.connections_max <= 20
    }

    /// Whether an error of this code may have been told.
    fn plausible(&self, world: &World, client: usize, id: usize, code: &str) -> bool {
        let exchange = &world.exchanges[id];
        let breach = self.lenience.breach && matches!(code, "plain_on_tls" | "upstream_tls");
        let by_fault: &[&str] = match exchange.answer.fault {
            Fault::Cut(_) | Fault::NoAnswer => &["upstream_truncated", "upstream_reset"],
            Fault::Reset(_) => &["upstream_reset", "upstream_truncated"],
            Fault::Stall(_) => &["between_tokens_timeout", "first_token_timeout", "upstream_head_timeout"],
            Fault::Garbage(_) | Fault::BadHead(_) | Fault::EndlessEvent(_) => &["upstream_malformed"],
            Fault::NoEndMark | Fault::LongLength => &["upstream_truncated", "upstream_reset"],
            Fault::InBandError => &["backend_says"],
            Fault::NoLastChunk | Fault::ShortLength(_) | Fault::None => &[],
        };
        let leaving = self.forced.is_some() && matches!(code, "drain" | "stopped");
        let connects = world.connects_failed > 0
            && matches!(code, "upstream_refused" | "connect_timeout" | "overload" | "no_upstream");
        let unresolved = world.control.unresolved && matches!(code, "no_upstream" | "upstream_refused");
        let late = code.ends_with("timeout") || code == "upstream_stalled";
        let excused = self.lenience.impatient
            || is_asleep(&world.clients[client], 20_000_000)
            || world.clients[client].jumped_us >= JUMP_US_MIN;
        let broke = matches!(code, "upstream_reset" | "upstream_truncated");
        let dying = world.hosts.iter().any(|host| host.idle_us > 0) && broke;
        let broken = world.has_broken_backends() && broke;
        // What a backend said too much may have been taken for the answer to the next request.
        let surplus = world.surplus_sent && (late || broke || code == "upstream_malformed");
        let early = exchange.answer.early_after.is_some() && code == "upstream_reset";
        let status =
            code == "upstream_status" && (exchange.answer.status != 200 || exchange.answer.events.is_none());
        let interim = exchange.answer.interim > INTERIM_RESPONSES_MAX && code == "upstream_malformed";
        let closing = code == "overload" && self.has_few_slots(world);
        by_fault.contains(&code)
            || breach
            || self.lenience.outlives && matches!(code, "lagged" | "stream_stopped")
            || world.has_broken_backends() && code == "upstream_tls"
            || closing
            || interim
            || leaving
            || connects
            || unresolved
            || excused && late
            || dying
            || broken
            || surplus
            || early
            || status
    }

    /// Compares an answer with what its backend meant.
    fn judge(&self, world: &World, who: &str, id: usize, message: &Message) -> Outcome {
        let exchange = &world.exchanges[id];
        let from_backend = message.header("x-sim-answer").is_some();
        let events = message.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
        if from_backend {
            assert_eq!(
                message.header("x-sim-answer"),
                Some(id.to_string().as_str()),
                "{who}: another's answer"
            );
            assert_eq!(message.status(), exchange.answer.status, "{who}: another status");
        }
        if exchange.request.method == Method::Head {
            return if from_backend || exchange.request.demo {
                Outcome::Complete
            } else {
                error_answer(who, message)
            };
        }
        if !events {
            if !from_backend && !exchange.request.demo {
                return error_answer(who, message);
            }
            if exchange.request.demo {
                return if message.complete {
                    Outcome::Complete
                } else {
                    Outcome::BodyCut(message.body.len())
                };
            }
            assert!(exchange.wire.body.starts_with(&message.body), "{who}: other bytes");
            let all = exchange.wire.body.len() == message.body.len();
            if message.complete && message.frame != crate::reader::Frame::Close {
                assert!(all, "{who}: a body that was cut looks whole");
                assert!(
                    exchange.wire.whole || exchange.wire.may_look_whole,
                    "{who}: whole, although its backend did not finish"
                );
            }
            return if message.complete && all {
                Outcome::Complete
            } else {
                Outcome::BodyCut(message.body.len())
            };
        }
        self.judge_events(world, who, id, message)
    }

    fn judge_events(&self, world: &World, who: &str, id: usize, message: &Message) -> Outcome {
        let exchange = &world.exchanges[id];
        let dialect = exchange.request.dialect;
        let read = match read_events(&message.body) {
            Ok(read) => read,
            Err(error) => panic!("{who}: {error}"),
        };
        let mut events = read.events;
        if self.lenience.outlives && events.iter().any(|event| event.name == "tokenring.gap") {
            // Which ones it has is judged where its place in the stream is known.
            return Outcome::EventsThenError(events.len(), "lagged".to_owned());
        }
        // Heartbeats of ours that are events.
        events.retain(|event| event.name != "ping" || event.id.is_some());
        let mut error = None;
        if let Some(last) = events.last()
            && is_error(dialect, &last.name, &last.data)
            && last.id.is_none()
        {
            error = Some(code_of(&last.data));
            events.pop();
        }
        assert!(!(message.complete && read.partial), "{who}: a partial event at the end of a whole body");
        if exchange.request.demo {
            for (nth, event) in events.iter().enumerate() {
                assert_eq!(event.id, Some(nth as u64 + 1), "{who}: ids are dense from 1");
            }
            return match error {
                Some(code) => Outcome::EventsThenError(events.len(), code),
                None if message.complete => Outcome::Complete,
                None => Outcome::EventsCut(events.len()),
            };
        }
        let owed = &exchange.wire.events;
        assert!(events.len() <= owed.len(), "{who}: {} events of {}", events.len(), owed.len());
        for (nth, (event, owed)) in events.iter().zip(owed).enumerate() {
            assert!(
                event.data == owed.data && event.name == owed.name,
                "{who}: event {nth} is {event:?}, owed {owed:?}"
            );
            assert_eq!(event.id, Some(nth as u64 + 1), "{who}: ids are dense from 1");
        }
        assert!(events.len() <= exchange.events_written(), "{who}: events that no backend wrote");
        let all = events.len() == owed.len();
        let looks_finished = match dialect {
            Dialect::Plain => message.complete && error.is_none(),
            _ => events.last().is_some_and(|last| is_end_mark(dialect, &last.data)),
        };
        if looks_finished {
            assert!(
                all && (exchange.wire.whole || exchange.wire.may_look_whole),
                "{who}: a stream that was cut looks finished"
            );
            assert!(error.is_none(), "{who}: an error behind the end mark");
        }
        match error {
            Some(code) => Outcome::EventsThenError(events.len(), code),
            None if message.complete && all && exchange.answer.fault == Fault::InBandError => {
                Outcome::EventsThenError(events.len() - 1, "backend_says".to_owned())
            }
            None if message.complete && looks_finished => Outcome::Complete,
            None => {
                assert!(!message.complete, "{who}: an unfinished stream in a finished body");
                Outcome::EventsCut(events.len())
            }
        }
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

/// Whether it reads nothing for so long.
fn is_asleep(client: &Client, us: u64) -> bool {
    matches!(client.plan.pace, Pace::Stuck { for_us, .. } if for_us >= us)
}

fn error_answer(who: &str, message: &Message) -> Outcome {
    assert!(message.status() >= 400, "{who}: an answer of nobody: {message:?}");
    let body = String::from_utf8_lossy(&message.body).into_owned();
    Outcome::Error(message.status(), code_of(&body))
}

fn code_of(json: &str) -> String {
    let code = json.rsplit_once("\"code\":\"").and_then(|(_, rest)| rest.split('"').next());
    code.unwrap_or("none").to_owned()
}

fn is_error(dialect: Dialect, name: &str, data: &str) -> bool {
    match dialect {
        Dialect::Chat | Dialect::Completions => data.starts_with("{\"error\":"),
        _ => name == "error",
    }
}

fn is_end_mark(dialect: Dialect, data: &str) -> bool {
    match dialect {
        Dialect::Chat | Dialect::Completions => data == "[DONE]",
        Dialect::Responses => data.contains("response.completed"),
        Dialect::Messages => data.contains("message_stop"),
        Dialect::Plain => false,
    }
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
