//! Responses in background: clients create them streamed or to be polled, leave, come back by their ids to any shard, read on
//! behind what they have seen, cancel and delete. What one is told of a response, all who ask later must be told as well.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, Pace, When};
use crate::minimise::failure_of;
use crate::plan::{Answer, Fault, Framed, Request, response_id};
use crate::random::faults;
use crate::reader::Message;
use crate::resume::{RESUME, Seen, Tale, answer, check_reader, pace, raw};
use crate::rng::{Rng, are_usual, seeds};
use crate::run::{Finished, Sim, settings};
use crate::tls;
use protocol::dialect::Dialect;
use protocol::phase::End;
use protocol::planted::Bug;
use serde_json::Value;
use shard::settings::{OnLeave, Resume, Settings};

/// What somebody asks of a response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Want {
    Object,
    Cancel,
    Delete,
    /// Behind the event with this id, if any; and what is said for it.
    Events(u64, Option<u64>),
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    client: usize,
    want: Want,
    at_us: u64,
}

/// A response, the client that asked for it, and those who came by its id.
struct Told {
    tale: Tale,
    polled: bool,
    asked: Vec<Asked>,
}

impl Told {
    fn begin(
        sim: &mut Sim,
        polled: bool,
        plan: Answer,
        change: impl FnOnce(ClientPlan) -> ClientPlan,
    ) -> Told {
        let request = Request { background: true, close: true, ..Request::new(Dialect::Responses, !polled) };
        let exchange = sim.exchange(request.clone(), plan);
        let wire = request.wire(exchange, &mut sim.world().rng).0;
        let client = sim.client(change(ClientPlan { raw: Some(wire), ..ClientPlan::new(&[]) }));
        let tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
        Told { tale, polled, asked: Vec::new() }
    }

    /// Whether its client has been told what it is called.
    fn is_named(&mut self, sim: &Sim) -> bool {
        if !self.polled {
            let seen = events_of(sim, self.tale.client);
            self.tale.id = seen.as_ref().and_then(|seen| seen.id.clone());
            // Before its first event it may be no more than the head of an answer that is long in coming.
            return seen.is_some_and(|seen| seen.last() > 0);
        }
        let world = sim.world();
        let Some(message) = world.clients[self.tale.client].reader.messages.first() else { return false };
        self.tale.id = message.header("tokenring-stream").map(str::to_owned);
        self.tale.id.is_some() && message.complete && message.status() == 200
    }

    fn ask(&mut self, sim: &mut Sim, want: Want, change: impl FnOnce(ClientPlan) -> ClientPlan) -> usize {
        let path = format!("/v1/responses/{}", response_id(self.tale.exchange));
        let plan = match want {
            Want::Object => raw(&format!("GET {path}"), ""),
            Want::Cancel => raw(&format!("POST {path}/cancel"), "Content-Length: 0\r\n"),
            Want::Delete => raw(&format!("DELETE {path}"), ""),
            Want::Events(_, None) => raw(&format!("GET {path}?stream=true"), ""),
            Want::Events(_, Some(after)) => {
                raw(&format!("GET {path}?stream=true&starting_after={after}"), "")
            }
        };
        let client = sim.client(change(plan));
        self.asked.push(Asked { client, want, at_us: sim.now_us() });
        if let Want::Events(cursor, _) = want {
            self.tale.readers.push((client, cursor));
        }
        client
    }

    /// A place to go on from, which somebody has seen: the id of an event, and how the client says it.
    fn behind(&self, sim: &Sim, rng: &mut Rng) -> Want {
        let readers = self.tale.readers.iter().map(|&(client, _)| client);
        let creator = (!self.polled).then_some(self.tale.client);
        let seen = |client| events_of(sim, client).map_or(0, |seen| seen.last());
        let last = readers.chain(creator).map(seen).max().unwrap_or(0);
        let by = sim.world().exchanges[self.tale.exchange].answer.number_by;
        let id = if rng.chance(500) { last } else { rng.below(last + 1) };
        match (id, by) {
            (0, _) => Want::Events(0, None),
            (_, 0) => Want::Events(id, Some(id)),
            // Between two numbers, where there is something between, and the next one was seen.
            (_, by) => {
                let beside = if id + 1 < last { rng.below(by) } else { 0 };
                Want::Events(id, Some((id - 1) * by + beside))
            }
        }
    }
}

/// What a reader has of its events, if that is what it was given.
fn events_of(sim: &Sim, client: usize) -> Option<Seen> {
    let is_events = |message: &Message| {
        message.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"))
    };
    let events = sim.world().clients[client].reader.messages.first().is_some_and(is_events);
    events.then(|| answer(sim, client)).flatten()
}

/// A response object that was told whole, and by when.
#[derive(Debug)]
struct Object {
    client: usize,
    from_us: u64,
    to_us: u64,
    status: String,
}

impl Object {
    fn is_final(&self) -> bool {
        !matches!(self.status.as_str(), "queued" | "in_progress")
    }
}

/// A whole answer from us to a request for an object.
fn object_of(finished: &Finished, client: usize, from_us: u64, id: usize) -> Option<Object> {
    let world = finished.sim.world();
    let asker = &world.clients[client];
    let message = asker.reader.messages.first()?;
    if message.status() != 200 || !message.complete || message.header("x-sim-answer").is_some() {
        return None;
    }
    let value: Value = serde_json::from_slice(&message.body).ok()?;
    let status = value["status"].as_str()?.to_owned();
    let exchange = &world.exchanges[id];
    let who = || format!("c{client}, response {id}, {:?}: {value}", exchange.answer);
    assert_eq!(value["id"], response_id(id), "{}", who());
    assert_eq!(value["background"], true, "{}", who());
    let told = value["output"] == serde_json::json!([format!("of {id}")]);
    assert!(told || value["output"] == serde_json::json!([]), "{}", who());
    let written = exchange.events_written() == exchange.wire.events.len();
    match status.as_str() {
        "queued" | "in_progress" | "cancelled" => assert!(!told, "{}", who()),
        "completed" => assert!(written && !exchange.answer.fails, "{}", who()),
        // What was stopped was cancelled.
        "failed" if value["error"]["code"].is_string() => {
            assert!(!told && value["error"]["code"] != "stream_stopped", "{}", who());
        }
        "failed" => assert!(written && exchange.answer.fails, "{}", who()),
        _ => panic!("{}", who()),
    }
    Some(Object { client, from_us, to_us: asker.ended_us, status })
}

/// Everything that was told of a response agrees. Gives how many readers had all of it, and how many objects were told.
fn check(finished: &Finished, told: &Told, unknown: bool) -> (usize, Vec<String>) {
    let id = told.tale.exchange;
    let world = finished.sim.world();
    let polled = told.polled.then_some(Asked { client: told.tale.client, want: Want::Object, at_us: 0 });
    let mut objects: Vec<Object> = Vec::new();
    let mut readers = Vec::new();
    let deleted = told.asked.iter().any(|asked| asked.want == Want::Delete);
    for &Asked { client, want, .. } in polled.iter().chain(&told.asked) {
        let Some(message) = world.clients[client].reader.messages.first() else { continue };
        let who = format!("c{client} {want:?} of response {id}: {}", message.start_line);
        if message.header("x-sim-answer").is_some() {
            assert!(unknown || deleted, "{who} is not known any more");
            continue;
        }
        match (want, message.status()) {
            (Want::Delete, 200) if message.complete => {
                let value: Value = serde_json::from_slice(&message.body).unwrap_or_default();
                assert_eq!(
                    (&value["id"], &value["deleted"]),
                    (&response_id(id).into(), &true.into()),
                    "{who}"
                );
            }
            (Want::Object | Want::Cancel, 200) => {}
            (Want::Events(..), 200 | 400 | 410) => readers.push(client),
            (_, 408 | 502 | 503 | 504) => {}
            (Want::Delete, 200) => {}
            (_, status) => panic!("{who}: {status} {}", String::from_utf8_lossy(&message.body)),
        }
    }
    let asked: Vec<Asked> = polled.iter().chain(&told.asked).copied().collect();
    drop(world);
    for &Asked { client, want, at_us } in &asked {
        if matches!(want, Want::Object | Want::Cancel) {
            objects.extend(object_of(finished, client, at_us, id));
        }
        let cancelled =
            objects.last().is_some_and(|told| told.client == client && told.status == "cancelled");
        if want == Want::Cancel && cancelled {
            let world = finished.sim.world();
            let (by_us, attempts) = (world.clients[client].ended_us, &world.exchanges[id].attempts);
            for attempt in attempts.iter().filter(|attempt| !attempt.over) {
                let ended_us = world.sockets[attempt.socket].ended_us.unwrap_or(u64::MAX);
                assert!(ended_us <= by_us, "response {id} is cancelled, and its backend works on");
            }
        }
        if want == Want::Cancel
            && let Some(told) = objects.last().filter(|told| told.client == client)
        {
            assert!(told.is_final(), "response {id} was cancelled, and is {told:?}");
        }
    }
    let mut whole = 0;
    let creator = (!told.polled).then_some((told.tale.client, None));
    let by_id = told.tale.readers.iter().map(|&(client, cursor)| (client, Some(cursor)));
    for (client, cursor) in creator.into_iter().chain(by_id.filter(|(client, _)| readers.contains(client))) {
        whole += usize::from(check_reader(finished, &told.tale, client, cursor));
        // Who has seen its end knows how it stands.
        let last =
            events_of(&finished.sim, client).and_then(|seen| seen.events.last().map(|last| last.1.clone()));
        let world = finished.sim.world();
        let status = ["completed", "failed"].into_iter().find(|status| {
            last.as_ref().is_some_and(|last| last.contains(&format!("\"response.{status}\"")))
        });
        objects.extend(status.map(|status| Object {
            client,
            from_us: u64::MAX,
            to_us: world.clients[client].ended_us,
            status: status.to_owned(),
        }));
    }
    for earlier in objects.iter().filter(|earlier| earlier.is_final()) {
        for later in objects.iter().filter(|later| later.from_us < u64::MAX && later.from_us > earlier.to_us)
        {
            assert_eq!(
                earlier.status,
                later.status,
                "response {id}: {earlier:?}, then {later:?}, {:?}",
                finished.sim.world().exchanges[id].answer
            );
        }
    }
    let statuses = objects.into_iter().map(|object| object.status).collect();
    (whole, statuses)
}

fn sim_with(seed: u64, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    settings.routes.iter_mut().for_each(|route| route.resume = Some(RESUME));
    change(&mut settings);
    let mut sim = Sim::new(seed, settings, vec![BackendHost::new(0)]);
    (sim.lenience.outlives, sim.lenience.impatient) = (true, true);
    sim
}

fn slowly(events: u32) -> Answer {
    Answer { piece_bytes: 150, gap_us: 20_000, ..Answer::events(events) }
}

#[test]
fn a_response_that_is_polled_goes_on_to_its_end_and_is_read_from_any_event() {
    for number_by in [1, 2, 0] {
        let mut sim = sim_with(1, |_| {});
        let mut told = Told::begin(&mut sim, true, Answer { number_by, ..slowly(30) }, |plan| plan);
        sim.run_ms(200);
        assert!(told.is_named(&sim), "its client is told at once");
        told.ask(&mut sim, Want::Object, |plan| plan);
        told.ask(&mut sim, Want::Events(0, None), |plan| plan);
        sim.run_ms(20_000);
        for id in 1..=33 {
            let after = if number_by == 0 { id } else { (id - 1) * number_by };
            told.ask(&mut sim, Want::Events(id, Some(after)), |plan| plan);
        }
        told.ask(&mut sim, Want::Object, |plan| plan);
        sim.run_ms(1_000);
        let finished = sim.finish();
        let (whole, statuses) = check(&finished, &told, false);
        assert_eq!(whole, 34);
        assert_eq!(statuses[..3], ["in_progress", "in_progress", "completed"], "{statuses:?}");
    }
}

#[test]
fn a_response_is_cancelled_once_and_stays_so() {
    for polled in [true, false] {
        let mut sim = sim_with(2, |_| {});
        let mut told = Told::begin(&mut sim, polled, slowly(500), |plan| plan);
        sim.run_ms(500);
        assert!(told.is_named(&sim), "its client is told at once");
        for want in [Want::Events(0, None), Want::Cancel, Want::Cancel, Want::Object] {
            told.ask(&mut sim, want, |plan| plan);
            sim.run_ms(100);
        }
        assert_eq!(sim.shard.population().1, 0, "its backend is let go");
        let finished = sim.finish();
        let (whole, statuses) = check(&finished, &told, false);
        let asked = if polled { 4 } else { 3 };
        assert_eq!((whole, statuses.len()), (0, asked), "{statuses:?}");
        assert!(statuses.ends_with(&[
            "cancelled".to_owned(),
            "cancelled".to_owned(),
            "cancelled".to_owned()
        ]));
        assert_eq!(finished.ends(End::StreamStopped), 1 + u64::from(!polled) + 1);
    }
}

#[test]
fn a_response_that_was_deleted_is_not_known() {
    let mut sim = sim_with(3, |_| {});
    let mut told = Told::begin(&mut sim, true, slowly(500), |plan| plan);
    sim.run_ms(500);
    assert!(told.is_named(&sim), "its client is told at once");
    told.ask(&mut sim, Want::Delete, |plan| plan);
    sim.run_ms(100);
    let late: Vec<usize> = [Want::Object, Want::Cancel, Want::Events(0, None)]
        .map(|want| told.ask(&mut sim, want, |plan| plan))
        .to_vec();
    let finished = sim.finish();
    check(&finished, &told, false);
    let world = finished.sim.world();
    for client in late {
        assert_eq!(world.clients[client].reader.messages[0].status(), 404, "the backend was asked");
    }
}

#[test]
fn a_response_whose_backend_dies_has_failed() {
    for fault in [Fault::Reset(500), Fault::Cut(500), Fault::InBandError, Fault::NoEndMark] {
        let mut sim = sim_with(4, |_| {});
        let mut told = Told::begin(&mut sim, true, Answer { fault, ..slowly(40) }, |plan| plan);
        sim.run_ms(20_000);
        assert!(told.is_named(&sim), "its client is told at once");
        told.ask(&mut sim, Want::Object, |plan| plan);
        told.ask(&mut sim, Want::Events(0, None), |plan| plan);
        sim.run_ms(1_000);
        let finished = sim.finish();
        let (_, statuses) = check(&finished, &told, false);
        assert_eq!(statuses, ["in_progress", "failed"], "{fault:?}");
    }
}

#[test]
fn a_response_is_found_from_every_shard() {
    for shards in [2, 3] {
        let mut sim = sim_with(5, |_| {}).of_shards(shards, 64);
        let mut all: Vec<Told> =
            (0..4).map(|nth| Told::begin(&mut sim, nth % 2 == 0, slowly(60), |plan| plan)).collect();
        sim.run_ms(500);
        for told in &mut all {
            assert!(told.is_named(&sim), "its client is told at once");
            for _ in 0..8 {
                told.ask(&mut sim, Want::Object, |plan| plan);
                told.ask(&mut sim, Want::Events(0, None), |plan| plan);
            }
        }
        sim.run_ms(10_000);
        let finished = sim.finish();
        for told in &all {
            let (whole, statuses) = check(&finished, told, false);
            assert_eq!(whole, 8 + usize::from(!told.polled));
            assert!(statuses.len() >= 8);
        }
        assert!(finished.sim.total(|counters| counters.moves) > 20);
    }
}

#[derive(Default)]
struct Tally {
    whole: usize,
    completed: usize,
    failed: usize,
    cancelled: usize,
}

/// A run drawn from a seed.
fn run(seed: u64) -> Tally {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0xBAC6);
    let mut machine = faults(&mut rng);
    machine.receive_bytes = if machine.receive_bytes > 0 { machine.receive_bytes.max(300) } else { 0 };
    let mut with = settings();
    let resume = Resume {
        window_bytes: rng.pick(&[256 << 10, 20_000]),
        on_leave: rng.pick(&[OnLeave::Detach(500), OnLeave::Cancel]),
        keep_ms: rng.pick(&[60_000, 2_000]),
        ..RESUME
    };
    with.routes.iter_mut().for_each(|route| route.resume = Some(resume));
    with.background_window_bytes = rng.pick(&[1 << 20, 20_000]);
    with.background_keep_ms = rng.pick(&[600_000, 600_000, 3_000]);
    with.detached_max = rng.pick(&[100, 100, 1]);
    with.resume_bytes_max = rng.pick(&[1 << 20, 1 << 20, 64 << 10]);
    with.lag_high_bytes = rng.pick(&[4_096, 65_536]);
    with.lag_low_bytes = with.lag_high_bytes / 4;
    with.routes[1].heartbeat_ms = rng.pick(&[15_000, 500]);
    with.routes[1].commit_ms = rng.pick(&[10_000, 500]);
    with.routes[1].deadlines.total_ms = 300_000;
    let scarce = with.background_keep_ms == 3_000 || with.detached_max == 1;
    let hosts = vec![BackendHost::new(0)];
    let mut sim =
        if seed.is_multiple_of(4) { tls::of_both(seed, with, hosts) } else { Sim::new(seed, with, hosts) };
    if seed.is_multiple_of(3) {
        sim = sim.of_shards(rng.range(2, 3) as usize, 8);
    }
    (sim.lenience.outlives, sim.lenience.impatient) = (true, true);
    sim.world().faults = machine;
    let mut all: Vec<Told> = Vec::new();
    for _ in 0..rng.range(1, 5) {
        let mut plan = Answer::events(rng.range(0, 80) as u32);
        plan.bytes = rng.pick(&[10, 10, 300, 3_000]);
        plan.piece_bytes = rng.pick(&[1 << 20, 4_096, 150]);
        plan.gap_us = rng.pick(&[0, 5_000, 50_000]);
        plan.head_delay_us = rng.pick(&[0, 1_000, 1_000_000]);
        plan.framed = rng.pick(&[Framed::Chunked, Framed::Chunked, Framed::Close]);
        plan.number_by = rng.pick(&[1, 1, 3, 0]);
        plan.fails = rng.chance(150);
        if rng.chance(300) {
            let at = rng.below(1_000) as u32;
            plan.fault = rng.pick(&[
                Fault::Cut(at),
                Fault::Reset(at),
                Fault::Stall(at),
                Fault::InBandError,
                Fault::NoEndMark,
                Fault::NoAnswer,
            ]);
        }
        let leave = rng.chance(500).then(|| leaving(&mut rng));
        let (start_us, pace) = (rng.skewed(500_000), pace(&mut rng));
        let write_bytes = rng.pick(&[1 << 20, 30]);
        let polled = rng.chance(500);
        all.push(Told::begin(&mut sim, polled, plan, |plan| ClientPlan {
            start_us,
            leave,
            pace,
            write_bytes,
            ..plan
        }));
    }
    for _ in 0..rng.range(2, 20) {
        sim.run_ms(rng.skewed(2_000) + 1);
        for told in &mut all {
            if told.asked.len() > 12 || rng.chance(300) || !told.is_named(&sim) {
                continue;
            }
            let want = match rng.below(20) {
                0 | 1 => Want::Cancel,
                2 => Want::Delete,
                3..8 => Want::Object,
                _ => told.behind(&sim, &mut rng),
            };
            let leave = rng.chance(300).then(|| leaving(&mut rng));
            let pace = if matches!(want, Want::Events(..)) { pace(&mut rng) } else { Pace::Eager };
            told.ask(&mut sim, want, |plan| ClientPlan { leave, pace, ..plan });
        }
    }
    if rng.chance(150) {
        sim.drain(rng.skewed(100_000));
    }
    let left = sim.world().control.leaving_us.is_some();
    let finished = sim.finish();
    let evicted = finished.sim.total(|counters| counters.kept_evictions) > 0;
    let broken = finished.sim.world().jumped_us > 0 || finished.sim.world().has_broken_backends();
    let mut tally = Tally::default();
    for told in &all {
        let (whole, statuses) = check(&finished, told, scarce || left || evicted || broken);
        tally.whole += whole;
        for status in statuses {
            match status.as_str() {
                "completed" => tally.completed += 1,
                "failed" => tally.failed += 1,
                "cancelled" => tally.cancelled += 1,
                _ => {}
            }
        }
    }
    tally
}

fn leaving(rng: &mut Rng) -> (When, How) {
    let when = match rng.chance(500) {
        true => When::AtUs(rng.skewed(3_000_000)),
        false => When::Bytes(rng.skewed(10_000) as usize),
    };
    (when, rng.pick(&[How::Close, How::Reset]))
}

#[test]
fn what_is_told_of_a_response_agrees_whatever_happens() {
    let seeds = seeds("BACKGROUND", 200);
    let mut all = Tally::default();
    for seed in seeds.clone() {
        let one = run(seed);
        all.whole += one.whole;
        all.completed += one.completed;
        all.failed += one.failed;
        all.cancelled += one.cancelled;
    }
    if are_usual(&seeds, 200) {
        let Tally { whole, completed, failed, cancelled } = all;
        assert!(
            whole > 300 && completed > 300 && failed > 50 && cancelled > 50,
            "{whole} whole, {completed} completed, {failed} failed, {cancelled} cancelled"
        );
    }
}

#[test]
fn planted_bugs_are_found() {
    for &bug in Bug::OF_RESPONSES {
        let found = (0..200).find_map(|seed| failure_of(bug, || _ = run(seed)).map(|what| (seed, what)));
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what}");
    }
}
