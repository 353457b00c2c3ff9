//! Several shards in one world: clients come to any of them, are shared by load, and are moved to the shard that has what they
//! ask for. Whoever they are, and wherever they end up, they are owed what they would be owed by an only shard.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, Pace, When};
use crate::durable::{self, JSON, LAST, Requests};
use crate::minimise::failure_of;
use crate::plan::{Answer, Fault, Framed, Request};
use crate::random;
use crate::reader::Message;
use crate::resume::{self, Tale, answer, chat, come_back, leaves, raw};
use crate::rng::Rng;
use crate::run::{Finished, Outcome, Sim, settings};
use crate::script::Ask;
use crate::tls;
use protocol::dialect::Dialect;
use protocol::durable::home_of;
use protocol::planted::Bug;
use shard::KeptTotals;
use shard::settings::{LeaveChoices, OnLeave, Resume, Settings, SlowReader};

/// So many on their way from shard to shard that queues are never full.
const ROOM: usize = 64;

pub(crate) fn shards_with(seed: u64, shards: usize, room: usize, change: impl FnOnce(&mut Settings)) -> Sim {
    resume::sim_with(seed, change).of_shards(shards, room)
}

fn clients_of(sim: &Sim) -> Vec<usize> {
    sim.shards().map(|shard| shard.population().0).collect()
}

#[test]
fn readers_come_to_the_stream_from_whichever_shard_they_came_to() {
    for shards in [2, 3] {
        let mut sim = shards_with(1, shards, ROOM, |_| {});
        let mut tales: Vec<Tale> = (0..6).map(|_| chat(&mut sim, 60, 20_000, |plan| plan)).collect();
        sim.run_ms(300);
        for tale in &mut tales {
            for after in 0..4 {
                come_back(&mut sim, tale, after);
            }
        }
        sim.run_ms(300);
        let kept: Vec<KeptTotals> = sim.shards().map(|shard| shard.snapshot().kept).collect();
        assert!(kept.iter().all(|kept| kept.live + kept.over > 0), "each shard has some: {kept:?}");
        let finished = sim.finish();
        let whole: usize = tales.iter().map(|tale| resume::check(&finished, tale)).sum();
        assert_eq!(whole, 6 * 5);
        let moves = finished.sim.total(|counters| counters.moves);
        assert!((6..24).contains(&moves), "{moves} of 24 readers were moved");
    }
}

#[test]
fn a_client_that_left_finds_its_stream_again_from_any_shard() {
    let mut sim = shards_with(2, 2, ROOM, |_| {});
    let mut tale = chat(&mut sim, 90, 20_000, leaves(400_000, How::Reset));
    sim.run_ms(450);
    let seen = answer(&sim, tale.client).unwrap().last();
    for after in 0..=seen {
        come_back(&mut sim, &mut tale, after);
    }
    let finished = sim.finish();
    assert_eq!(resume::check(&finished, &tale), seen as usize + 1);
    assert!(finished.sim.total(|counters| counters.moves) > 0);
}

#[test]
fn durable_streams_are_written_and_read_through_every_shard() {
    let mut sim = shards_with(3, 3, ROOM, |_| {});
    sim.client(durable::publish("/v1/durable/a", 50, 100).plan(0));
    let readers: Vec<usize> = (0..30)
        .map(|nth| sim.client(durable::read("/v1/durable/a", "offset=-1&live=sse").plan(100_000 + nth)))
        .collect();
    let finished = sim.finish();
    assert_eq!(durable::check(&finished, &readers, 50), 30);
    let home = finished.sim.shards().nth(home_of("/v1/durable/a", 3)).unwrap().snapshot().stats.counters;
    assert_eq!((home.moves, home.durable_appends), (0, 50), "all of it at home");
    assert!(finished.sim.total(|counters| counters.moves) >= 10);
}

#[test]
fn clients_are_shared_by_load() {
    let mut sim = shards_with(4, 2, ROOM, |settings| settings.backlog = 128);
    for nth in 0..200 {
        let id = sim.exchange(Request::new(Dialect::Chat, true), Answer::events(3));
        sim.client(ClientPlan { start_us: nth * 2_000, idle_us: 5_000_000, ..ClientPlan::new(&[id]) });
    }
    sim.run_ms(2_000);
    let clients = clients_of(&sim);
    assert!(clients.iter().all(|clients| (90..=110).contains(clients)), "{clients:?}");
    let finished = sim.finish();
    assert!(finished.outcomes.iter().all(|outcomes| outcomes[..] == [Outcome::Complete]));
}

#[test]
fn one_shard_leaves_while_the_other_serves() {
    for leaver in 0..2 {
        let mut sim = shards_with(5, 2, ROOM, |_| {});
        let mut tales: Vec<Tale> = (0..4).map(|_| chat(&mut sim, 60, 20_000, |plan| plan)).collect();
        sim.run_ms(300);
        sim.drain_one(leaver, 60_000);
        sim.run_ms(100);
        for tale in &mut tales {
            come_back(&mut sim, tale, 0);
        }
        let asked = sim.exchange(Request::new(Dialect::Chat, true), Answer::events(5));
        let late = sim.client(ClientPlan::new(&[asked]));
        sim.run_ms(10_000);
        assert!(!sim.have_left(), "it waits for the other to say that it hands nothing over");
        sim.drain(60_000);
        let finished = sim.finish();
        assert_eq!(finished.sim.forced, Some(0));
        let whole: usize = tales.iter().map(|tale| resume::check(&finished, tale)).sum();
        assert!(whole >= 4, "{whole}");
        assert!(matches!(finished.outcomes[late][0], Outcome::Complete | Outcome::Nothing));
    }
}

#[test]
fn a_full_queue_between_shards_holds_up_and_loses_nobody() {
    let mut sim = shards_with(6, 2, 1, |settings| settings.backlog = 128);
    sim.world().faults.stall_us = 50_000;
    sim.client(durable::publish("/v1/durable/a", 20, 100).plan(0));
    let readers: Vec<usize> = (0..60)
        .map(|nth| sim.client(durable::read("/v1/durable/a", "offset=-1&live=sse").plan(100_000 + nth)))
        .collect();
    let finished = sim.finish();
    assert_eq!(durable::check(&finished, &readers, 20), 60);
}

/// Nothing looks again and again for room: who waits for it sleeps until the other shard has taken something, and goes then.
#[test]
fn who_waits_for_room_on_its_way_is_woken_when_there_is_and_not_before() {
    for seed in 0..20 {
        let mut sim = shards_with(seed, 2, 1, |settings| settings.backlog = 128);
        let (home, other) = (home_of("/v1/durable/a", 2), 1 - home_of("/v1/durable/a", 2));
        sim.client(durable::publish("/v1/durable/a", 20, 10).plan(0));
        sim.run_ms(2_000);
        sim.world().hold_up(home, 3_000_000);
        let readers: Vec<usize> = (0..40)
            .map(|_| sim.client(durable::read("/v1/durable/a", "offset=-1&live=sse").plan(0)))
            .collect();
        sim.run_ms(500);
        let counters = |sim: &Sim| sim.shards().nth(other).unwrap().snapshot().stats.counters;
        let (before, waiting) = (counters(&sim), clients_of(&sim)[other]);
        assert!(waiting > 10, "seed {seed}: {waiting} wait for room");
        sim.run_ms(2_400);
        let after = counters(&sim);
        let turns = after.turns - before.turns;
        assert!(turns < 10, "seed {seed}: {turns} turns, of which the wheel's coarser slots explain some");
        assert_eq!(after.moves, before.moves, "seed {seed}: there is no room");
        // Each takes two rings and a turn of either shard, and no shard waits for a clock.
        sim.run_ms(150);
        assert_eq!(clients_of(&sim)[other], 0, "seed {seed}: {waiting} waited, and there is room");
        let finished = sim.finish();
        assert_eq!(durable::check(&finished, &readers, 20), 40);
    }
}

/// Requests of every home on one connection: each is answered, in their order, wherever the client is moved for it.
#[test]
fn a_client_that_asks_here_and_there_is_answered_in_order() {
    for write_bytes in [1 << 20, 100, 7] {
        let mut sim = shards_with(7, 3, ROOM, |_| {});
        sim.client(durable::publish("/v1/durable/a", 5, 10).plan(0));
        let mut tales: Vec<Tale> = (0..6).map(|_| chat(&mut sim, 300, 20_000, |plan| plan)).collect();
        sim.run_ms(1_000);
        let wanderers: Vec<Wanderer> = (0..10)
            .map(|_| {
                tales.iter_mut().for_each(|tale| assert!(tale.learn(&sim), "it has begun"));
                let ids = tales.iter().filter_map(|tale| tale.id.clone());
                let asks: Vec<Wish> =
                    ids.flat_map(|id| [Wish::Status(id), Wish::Durable("a".to_owned())]).collect();
                let plan = Wanderer::plan(&asks);
                Wanderer { client: sim.client(ClientPlan { write_bytes, ..plan }), asks }
            })
            .collect();
        let finished = sim.finish();
        for wanderer in &wanderers {
            assert_eq!(wanderer.check(&finished), 12, "all are answered");
        }
        let moves = finished.sim.total(|counters| counters.moves);
        assert!(moves > 60, "{moves}");
    }
}

/// Its answer's last byte was confirmed and its next request looked at when its receive had just ended: nothing else would
/// wake the shard for it.
#[test]
fn a_client_whose_next_request_belongs_elsewhere_goes_there_at_once() {
    for seed in 0..100 {
        let mut sim = shards_with(seed, 2, ROOM, |_| {});
        sim.client(durable::publish("/v1/durable/a", 5, 10).plan(0));
        let mut tales: Vec<Tale> = (0..4).map(|_| chat(&mut sim, 3, 0, |plan| plan)).collect();
        sim.run_ms(1_000);
        sim.world().faults.receive_no_buffer = 500;
        sim.world().faults.work_us = 500;
        sim.world().faults.receive_bytes = 60;
        sim.world().faults.send_late = 500;
        tales.iter_mut().for_each(|tale| assert!(tale.learn(&sim), "it has begun"));
        let ids = tales.iter().filter_map(|tale| tale.id.clone());
        let asks: Vec<Wish> = ids.flat_map(|id| [Wish::Status(id), Wish::Durable("a".to_owned())]).collect();
        let client = sim.client(ClientPlan { write_bytes: 50, ..Wanderer::plan(&asks) });
        sim.run_ms(500);
        let answers = sim.world().clients[client].reader.complete();
        assert_eq!(answers, asks.len(), "seed {seed}: it waits, and nobody looks");
        Wanderer { client, asks }.check(&sim.finish());
    }
}

// ---- drawn from a seed

#[derive(Clone, Debug)]
enum Wish {
    /// Of a stream.
    Status(String),
    /// All there is of a durable one.
    Durable(String),
}

/// A client whose requests belong to different shards.
struct Wanderer {
    client: usize,
    asks: Vec<Wish>,
}

impl Wanderer {
    fn plan(asks: &[Wish]) -> ClientPlan {
        let mut requests = Requests::new();
        for (nth, wish) in asks.iter().enumerate() {
            let last = if nth + 1 == asks.len() { LAST } else { "" };
            requests = match wish {
                Wish::Status(id) => requests.ask(&format!("GET /v1/streams/{id}/status"), last, ""),
                Wish::Durable(name) => requests.ask(&format!("GET /v1/durable/{name}?offset=-1"), last, ""),
            };
        }
        requests.plan(0)
    }

    /// Each answer is one to its own request; gives how many were answered with what was asked for.
    fn check(&self, finished: &Finished) -> usize {
        let world = finished.sim.world();
        let client = &world.clients[self.client];
        let answers = &client.reader.messages;
        let who = || format!("c{} {:?} {:?}", self.client, client.ended, self.asks);
        assert!(answers.len() <= self.asks.len(), "{}: {} answers", who(), answers.len());
        let mut found = 0;
        for (wish, answer) in self.asks.iter().zip(answers).filter(|(_, answer)| answer.complete) {
            let text = String::from_utf8_lossy(&answer.body);
            match (wish, answer.status()) {
                (Wish::Status(id), 200) => {
                    assert!(text.contains(&format!("\"{id}\"")), "{}: {id} is {text}", who());
                    found += 1;
                }
                (Wish::Durable(name), 200) => {
                    let (numbers, _) = durable::numbers(answer);
                    assert!(numbers.iter().copied().eq(0..numbers.len() as u64), "{}: {name} {text}", who());
                    assert!(answer.header("stream-next-offset").is_some(), "{}: {name} {answer:?}", who());
                    found += 1;
                }
                (Wish::Status(_), 404 | 410) | (Wish::Durable(_), 404) | (_, 408 | 503) => {}
                (wish, status) => panic!("{}: {wish:?} was answered {status} {text}", who()),
            }
        }
        found
    }
}

/// Creates a stream and appends to it on one connection, with nothing by which a repeat could be told.
fn publish_plainly(path: &str, messages: usize, pad: usize) -> Requests {
    let mut requests = Requests::new().ask(&format!("PUT {path}"), JSON, "");
    for number in 0..messages {
        let last = if number + 1 == messages { "Stream-Closed: true\nConnection: close\n" } else { "" };
        let fields = format!("{JSON}{last}");
        requests = requests.ask(&format!("POST {path}"), &fields, &durable::message(number, pad));
    }
    requests
}

/// A durable stream, its publisher, and its readers.
struct Published {
    publisher: usize,
    readers: Vec<usize>,
    messages: usize,
}

#[derive(Default)]
struct Tally {
    whole: usize,
    moves: u64,
    handed: u64,
    complete: usize,
}

pub(crate) fn pace(rng: &mut Rng) -> Pace {
    resume::pace(rng)
}

pub(crate) fn leave(rng: &mut Rng, chance: u32) -> Option<(When, How)> {
    let how = rng.pick(&[How::Close, How::Reset]);
    rng.chance(chance).then(|| (When::AtUs(rng.skewed(3_000_000)), how))
}

pub(crate) fn shards_of(seed: u64, rng: &mut Rng, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut with = settings();
    let resume_settings = Resume {
        window_bytes: rng.pick(&[256 << 10, 20_000]),
        window_ms: if seed.is_multiple_of(3) { 2_000 } else { 0 },
        reader_lag_ms: if seed.is_multiple_of(5) { 1_500 } else { 0 },
        leave_choices: LeaveChoices::CANCEL,
        on_leave: rng.pick(&[OnLeave::Detach(30_000), OnLeave::Finish, OnLeave::Cancel]),
        keep_ms: rng.pick(&[60_000, 2_000]),
        slow_reader: rng.pick(&[SlowReader::Auto, SlowReader::Block, SlowReader::Drop, SlowReader::Skip]),
        durable: false,
    };
    with.routes.iter_mut().for_each(|route| route.resume = Some(resume_settings));
    with.lag_high_bytes = rng.pick(&[4_096, 65_536]);
    with.lag_low_bytes = with.lag_high_bytes / 4;
    with.connections_max = rng.pick(&[1_000, 1_000, 8]);
    with.backlog = rng.pick(&[16, 128]);
    with.resume_bytes_max = rng.pick(&[1 << 20, 64 << 10]);
    with.resumes_per_s = rng.pick(&[1_000, 20]);
    with.durable.events_ms = rng.pick(&[60_000, 3_000]);
    with.durable.long_poll_ms = rng.pick(&[20_000, 100]);
    with.routes[1].heartbeat_ms = rng.pick(&[15_000, 500]);
    with.routes[1].deadlines.total_ms = 300_000;
    change(&mut with);
    let hosts = vec![BackendHost::new(0)];
    let sim =
        if seed.is_multiple_of(4) { tls::of_both(seed, with, hosts) } else { Sim::new(seed, with, hosts) };
    let mut sim = sim.of_shards(rng.range(2, 3) as usize, rng.pick(&[1, 2, ROOM]));
    (sim.lenience.outlives, sim.lenience.impatient) = (true, true);
    let mut machine = random::faults(rng);
    machine.receive_bytes = if machine.receive_bytes > 0 { machine.receive_bytes.max(500) } else { 0 };
    machine.stall_us = rng.pick(&[0, 1_000, 100_000]);
    sim.world().faults = machine;
    sim
}

fn stream(sim: &mut Sim, rng: &mut Rng) -> Tale {
    let dialect = rng.pick(&Dialect::ALL);
    let request = Request::new(dialect, true);
    let mut plan = Answer::events(rng.range(1, 100) as u32);
    plan.bytes = rng.pick(&[10, 300, 3_000]);
    plan.piece_bytes = rng.pick(&[1 << 20, 4_096, 150]);
    plan.gap_us = rng.pick(&[0, 5_000, 50_000]);
    if rng.chance(200) {
        let at = rng.below(1_000) as u32;
        plan.fault = rng.pick(&[Fault::Cut(at), Fault::Reset(at), Fault::Stall(at)]);
        plan.framed = Framed::Chunked;
    }
    let exchange = sim.exchange(request, plan);
    let client = ClientPlan {
        start_us: rng.skewed(500_000),
        leave: leave(rng, 500),
        pace: pace(rng),
        ..ClientPlan::new(&[exchange])
    };
    Tale { exchange, client: sim.client(client), id: None, readers: Vec::new(), stopped: false }
}

fn published(sim: &mut Sim, rng: &mut Rng, name: u64) -> Published {
    let path = format!("/v1/durable/{name}");
    let (messages, pad) = (rng.range(1, 60) as usize, rng.pick(&[0, 200, 2_000]));
    let requests = match rng.chance(500) {
        true => durable::publish(&path, messages, pad),
        false => publish_plainly(&path, messages, pad),
    };
    let publisher = sim.client(ClientPlan {
        write_bytes: rng.pick(&[1 << 20, 4_000, 700]),
        write_gap_us: rng.pick(&[0, 2_000, 50_000]),
        ..requests.plan(rng.skewed(100_000))
    });
    let readers = (0..rng.range(1, 8))
        .map(|_| {
            let query = rng.pick(&["offset=-1&live=sse", "offset=-1", "offset=-1&live=long-poll"]);
            let plan = durable::read(&path, query).plan(rng.skewed(4_000_000));
            sim.client(ClientPlan {
                pace: pace(rng),
                leave: leave(rng, 200),
                write_bytes: rng.pick(&[1 << 20, 30]),
                ..plan
            })
        })
        .collect();
    Published { publisher, readers, messages }
}

/// What a publisher was acknowledged is what there is, and no more than it asked for was answered.
fn check_publisher(finished: &Finished, published: &Published) {
    let world = finished.sim.world();
    let answers = &world.clients[published.publisher].reader.messages;
    assert!(answers.len() <= published.messages + 1, "c{}: {} answers", published.publisher, answers.len());
    let taken = |answer: &&Message| answer.complete && matches!(answer.status(), 200 | 204);
    let acknowledged = answers.iter().skip(1).filter(taken).count();
    for &reader in &published.readers {
        let Some(answer) = world.clients[reader].reader.messages.first() else { continue };
        let (found, closed) = durable::numbers(answer);
        assert!(!closed || found.len() >= acknowledged, "c{reader} was told of the end too early");
    }
}

/// A run drawn from a seed.
fn run(seed: u64) -> (Tally, Finished) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0x5AAD);
    let mut sim =
        shards_of(seed, &mut rng, |with| with.mirror_readers = [0, 1, 2, 64][(seed / 4 % 4) as usize]);
    let mut tales: Vec<Tale> = (0..rng.range(1, 5)).map(|_| stream(&mut sim, &mut rng)).collect();
    let names = rng.range(1, 2);
    let durables: Vec<Published> = (0..names).map(|name| published(&mut sim, &mut rng, name)).collect();
    let mut ordinary = Vec::new();
    for _ in 0..rng.skewed(12) {
        let asks: Vec<Ask> = (0..rng.range(1, 3))
            .map(|_| {
                let request = random::request(&mut rng);
                let answer = random::answer(&mut rng, &request, 100);
                Ask { request, answer }
            })
            .collect();
        let plan = random::client_plan(&mut rng, &asks);
        let ids: Vec<usize> =
            asks.iter().map(|ask| sim.exchange(ask.request.clone(), ask.answer.clone())).collect();
        ordinary.push(sim.client(ClientPlan { exchanges: ids, ..plan }));
    }
    let mut wanderers = Vec::new();
    for _ in 0..rng.range(2, 15) {
        sim.run_ms(rng.skewed(1_500) + 1);
        for tale in &mut tales {
            if !tale.learn(&sim) || tale.readers.len() > 10 || rng.chance(300) {
                continue;
            }
            let id = tale.id.clone().unwrap();
            if rng.chance(25) {
                tale.stopped = true;
                sim.client(raw(&format!("DELETE /v1/streams/{id}"), ""));
            }
            if rng.chance(200) {
                let name = rng.below(names).to_string();
                let asks: Vec<Wish> = (0..rng.range(2, 6))
                    .map(|_| match rng.chance(500) {
                        true => Wish::Status(id.clone()),
                        false => Wish::Durable(name.clone()),
                    })
                    .collect();
                let plan = ClientPlan {
                    write_bytes: rng.pick(&[1 << 20, 50]),
                    leave: leave(&mut rng, 200),
                    ..Wanderer::plan(&asks)
                };
                wanderers.push(Wanderer { client: sim.client(plan), asks });
            }
            let last =
                answer(&sim, tale.client).map_or(0, |seen| if seen.status == 200 { seen.last() } else { 0 });
            let after = if rng.chance(500) { last } else { rng.below(last + 1) };
            let plan = ClientPlan {
                pace: pace(&mut rng),
                leave: leave(&mut rng, 400),
                write_bytes: rng.pick(&[1 << 20, 40]),
                ..resume::resume(&id, after)
            };
            tale.readers.push((sim.client(plan), after));
        }
    }
    if rng.chance(300) {
        let leaver = rng.below(sim.shards().count() as u64) as usize;
        sim.drain_one(leaver, rng.skewed(100_000));
        sim.run_ms(rng.skewed(5_000));
    }
    if rng.chance(300) || sim.world().control.leaving_us.is_some() {
        sim.drain(400_000);
    }
    let finished = sim.finish();
    let mut tally = Tally {
        moves: finished.sim.total(|counters| counters.moves),
        handed: finished.sim.total(|counters| counters.handed_in),
        ..Tally::default()
    };
    tally.whole += tales.iter().map(|tale| resume::check(&finished, tale)).sum::<usize>();
    for published in &durables {
        tally.whole += durable::check(&finished, &published.readers, published.messages);
        check_publisher(&finished, published);
    }
    tally.whole += wanderers.iter().map(|wanderer| wanderer.check(&finished)).sum::<usize>();
    let complete = |&&client: &&usize| finished.outcomes[client].contains(&Outcome::Complete);
    tally.complete = ordinary.iter().filter(complete).count();
    let readers: u64 = finished.sim.shards().map(|shard| shard.snapshot().durable.readers).sum();
    assert_eq!(readers, 0, "who has left does not read");
    (tally, finished)
}

/// The first hundred seeds; with `SIM_SHARDS_RUNS`, so many from `SIM_SHARDS_FROM` on.
#[test]
fn shards_keep_their_promises_together_whatever_happens() {
    let asked = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let (from, runs) = (asked("SIM_SHARDS_FROM").unwrap_or(0), asked("SIM_SHARDS_RUNS").unwrap_or(100));
    let mut all = Tally::default();
    for seed in from..from + runs {
        let (one, _) = run(seed);
        all.whole += one.whole;
        all.moves += one.moves;
        all.handed += one.handed;
        all.complete += one.complete;
    }
    if from == 0 && runs >= 100 {
        let Tally { whole, moves, handed, complete } = all;
        assert!(
            whole > 500 && moves > 500 && handed > 1_000 && complete > 100,
            "{whole} whole, {moves} moved, {handed} handed over, {complete} ordinary ones complete"
        );
    }
}

/// It was stuck for longer than readers may be behind, with the newest event in what it was lent.
#[test]
fn a_late_reader_is_not_sent_again_what_it_was_lent() {
    run(1150);
}

#[test]
fn a_seed_of_several_shards_replays_bit_for_bit() {
    for seed in [1, 2, 3, 5] {
        let traces = [0, 1].map(|_| run(seed).1.sim.world().trace);
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}

#[test]
fn planted_bugs_are_found() {
    for &bug in Bug::OF_MOVES {
        let found = (0..100).find_map(|seed| failure_of(bug, || drop(run(seed))).map(|what| (seed, what)));
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what}");
    }
}
