//! Durable streams on a whole shard: publishers and readers as scripted clients, on a calm machine and on ill ones. Each
//! reader must see what was published, from where it began, once and in order.

use crate::client::{ClientPlan, Ended, How, Pace, When};
use crate::disk::SimDisk;
use crate::random::faults;
use crate::reader::Message;
use crate::rng::{Rng, are_usual, seeds};
use crate::run::{Finished, Sim, settings};
use protocol::durable::home_of;
use protocol::phase::End;
use shard::core::JournalOf;
use shard::settings::Settings;
use shard::stats::Counters;

/// Requests as bytes, the last one closing its connection.
pub(crate) struct Requests(Vec<u8>);

impl Requests {
    pub(crate) fn new() -> Self {
        Requests(Vec::new())
    }

    pub(crate) fn ask(mut self, line: &str, fields: &str, body: &str) -> Self {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\n", body.len()) };
        let head = format!("{line} HTTP/1.1\nHost: sim\n{fields}{length}\n").replace('\n', "\r\n");
        self.0.extend_from_slice(head.as_bytes());
        self.0.extend_from_slice(body.as_bytes());
        self
    }

    pub(crate) fn plan(self, start_us: u64) -> ClientPlan {
        ClientPlan { start_us, raw: Some(self.0), ..ClientPlan::new(&[]) }
    }
}

pub(crate) const JSON: &str = "Content-Type: application/json\n";
pub(crate) const LAST: &str = "Connection: close\n";

/// Message `number` of a stream.
pub(crate) fn message(number: usize, pad: usize) -> String {
    format!("{{\"n\":{number},\"pad\":\"{}\"}}", "x".repeat((number * 37) % (pad + 1)))
}

/// Creates a stream, appends so many messages, each by itself, and closes it with the last.
pub(crate) fn publish(path: &str, messages: usize, pad: usize) -> Requests {
    let mut requests = Requests::new().ask(&format!("PUT {path}"), JSON, "");
    for number in 0..messages {
        let last = if number + 1 == messages { "Stream-Closed: true\nConnection: close\n" } else { "" };
        let fields = format!("{JSON}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {number}\n{last}");
        requests = requests.ask(&format!("POST {path}"), &fields, &message(number, pad));
    }
    requests
}

pub(crate) fn read(path: &str, query: &str) -> Requests {
    Requests::new().ask(&format!("GET {path}?{query}"), LAST, "")
}

/// Numbers of the messages in an answer, in their order, and whether it says that the stream is closed.
pub(crate) fn numbers(answer: &Message) -> (Vec<u64>, bool) {
    let text = String::from_utf8_lossy(&answer.body);
    let number = |value: &serde_json::Value| value["n"].as_u64().unwrap();
    if answer.header("content-type") != Some("text/event-stream") {
        let closed = answer.header("stream-closed").is_some();
        if !answer.complete || answer.status() != 200 {
            return (Vec::new(), false);
        }
        let values: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        return (values.iter().map(number).collect(), closed);
    }
    let (mut found, mut closed) = (Vec::new(), false);
    let mut events: Vec<&str> = text.split("\n\n").collect();
    let rest = events.pop();
    assert!(!answer.complete || rest == Some(""), "a whole body that ends within an event: {rest:?}");
    for event in events {
        let data: Vec<&str> = event.lines().filter_map(|line| line.strip_prefix("data:")).collect();
        let data = data.join("\n");
        if event.starts_with("event: control") {
            assert!(!closed, "something follows the end");
            closed = data.contains("streamClosed");
        } else if event.starts_with("event: data") {
            let values: Vec<serde_json::Value> = serde_json::from_str(&data).unwrap();
            found.extend(values.iter().map(number));
        }
    }
    (found, closed)
}

/// What every reader of a stream of so many messages must have seen; gives how many saw all of it.
pub(crate) fn check(finished: &Finished, readers: &[usize], messages: usize) -> usize {
    let world = finished.sim.world();
    let mut whole = 0;
    for &reader in readers {
        let client = &world.clients[reader];
        let Some(answer) = client.reader.messages.first() else { continue };
        let (found, closed) = numbers(answer);
        assert!(found.iter().copied().eq(0..found.len() as u64), "c{reader} has {found:?}");
        assert!(!closed || found.len() == messages, "c{reader} was told of the end after {}", found.len());
        whole += usize::from(found.len() == messages && closed);
    }
    whole
}

fn sim_with(seed: u64, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    change(&mut settings);
    Sim::new(seed, settings, Vec::new())
}

#[test]
fn readers_of_every_kind_see_all_and_are_told_of_the_end() {
    let mut sim = sim_with(1, |_| {});
    sim.client(ClientPlan {
        write_gap_us: 200_000,
        write_bytes: 300,
        ..publish("/v1/durable/a", 60, 100).plan(0)
    });
    let readers: Vec<usize> = (0..20)
        .map(|nth| sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(100_000 + nth * 150_000)))
        .collect();
    let late = sim.client(read("/v1/durable/a", "offset=-1").plan(59_000_000));
    let finished = sim.finish();
    assert_eq!(check(&finished, &readers, 60), 20);
    assert_eq!(check(&finished, &[late], 60), 1);
    assert_eq!(finished.ends(End::Done), 60 + 1 + 21);
}

#[test]
fn live_readers_share_what_comes_and_a_slow_one_goes_on_by_itself() {
    let mut sim = sim_with(14, |settings| settings.lag_high_bytes = 8_192);
    sim.client(ClientPlan {
        write_gap_us: 20_000,
        write_bytes: 2_000,
        ..publish("/v1/durable/a", 200, 2_000).plan(0)
    });
    let stuck = Pace::Stuck { after_bytes: 3_000, for_us: 4_000_000 };
    let readers: Vec<usize> = (0..40)
        .map(|nth| {
            let pace = if nth % 10 == 9 { stuck } else { Pace::Eager };
            sim.client(ClientPlan {
                pace,
                ..read("/v1/durable/a", "offset=-1&live=sse").plan(50_000 + 10_000 * nth)
            })
        })
        .collect();
    sim.run_ms(1_500);
    let snapshot = sim.shard.snapshot();
    assert_eq!((snapshot.durable.readers, snapshot.kept.live, snapshot.kept.readers), (40, 0, 0));
    assert_eq!(snapshot.stats.counters.durable_shared, 40);
    let finished = sim.finish();
    assert_eq!(check(&finished, &readers, 200), 40);
    let counters = &finished.sim.shard.stats().counters;
    assert_eq!(counters.durable_parted, 4, "those that were stuck");
    assert_eq!(finished.ends(End::Done), 200 + 1 + 40, "a tail is nobody's stream");
}

#[test]
fn those_who_share_are_sent_away_and_told_of_the_end_as_others_are() {
    for (line, fields) in
        [("DELETE /v1/durable/a", LAST), ("POST /v1/durable/a", "Stream-Closed: true\nConnection: close\n")]
    {
        let mut sim = sim_with(15, |settings| settings.durable.events_ms = 5_000);
        sim.client(Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), "").plan(0));
        let read = |at_us| read("/v1/durable/a", "offset=-1&live=sse").plan(at_us);
        let sent_away: Vec<usize> = (0..5).map(|nth| sim.client(read(10_000 + nth))).collect();
        let told: Vec<usize> = (0..5).map(|nth| sim.client(read(6_000_000 + nth))).collect();
        for number in 0..8 {
            let fields = format!("{JSON}{LAST}");
            let append = Requests::new().ask("POST /v1/durable/a", &fields, &message(number, 9));
            sim.client(append.plan(1_000_000 * (number as u64 + 1)));
        }
        sim.client(Requests::new().ask(line, fields, "").plan(9_000_000));
        let finished = sim.finish();
        assert_eq!(finished.sim.shard.stats().counters.durable_shared, 10);
        let closes = line.starts_with("POST");
        let seen = |reader: &usize| {
            let world = finished.sim.world();
            let answer = &world.clients[*reader].reader.messages[0];
            assert!(answer.complete, "it ends between two events");
            numbers(answer)
        };
        assert!(sent_away.iter().all(|reader| seen(reader) == ((0..5).collect(), false)));
        assert!(told.iter().all(|reader| seen(reader) == ((0..8).collect(), closes)), "{line}");
        assert_eq!(finished.sim.shard.snapshot().durable.readers, 0);
    }
}

#[test]
fn a_long_poll_is_answered_by_the_append_that_it_waits_for() {
    let mut sim = sim_with(2, |_| {});
    sim.client(Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), "").plan(0));
    let polls: Vec<usize> = (0..5)
        .map(|_| sim.client(read("/v1/durable/a", "offset=now&live=long-poll").plan(100_000)))
        .collect();
    sim.client(
        Requests::new().ask("POST /v1/durable/a", &format!("{JSON}{LAST}"), &message(0, 9)).plan(7_000_000),
    );
    let over = sim.client(read("/v1/durable/a", "offset=now&live=long-poll").plan(8_000_000));
    let finished = sim.finish();
    let world = finished.sim.world();
    for poll in polls {
        let client = &world.clients[poll];
        assert_eq!(numbers(&client.reader.messages[0]).0, [0]);
        assert!((7_000_000..8_500_000).contains(&client.ended_us), "{}", client.ended_us);
    }
    let client = &world.clients[over];
    assert_eq!(client.reader.messages[0].status(), 204);
    assert!(client.ended_us >= 28_000_000, "it waited for its 20 s: {}", client.ended_us);
}

#[test]
fn a_reader_that_leaves_a_long_poll_is_no_reader_any_more() {
    for how in [How::Close, How::Reset] {
        let mut sim = sim_with(3, |_| {});
        sim.client(Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), "").plan(0));
        for query in ["offset=now&live=long-poll", "offset=now&live=sse"] {
            let leave = Some((When::AtUs(500_000), how));
            sim.client(ClientPlan { leave, ..read("/v1/durable/a", query).plan(100_000) });
        }
        sim.run_ms(3_000);
        assert_eq!(sim.shard.snapshot().durable.readers, 0, "{how:?}");
        let finished = sim.finish();
        assert_eq!(finished.ends(End::ClientLeft), 2);
    }
}

#[test]
fn a_slow_reader_holds_no_more_than_its_marks() {
    let mut sim = sim_with(4, |settings| settings.durable.body_bytes_max = 4 << 20);
    sim.client(publish("/v1/durable/a", 400, 20_000).plan(0));
    let pace = Pace::Slow { bytes: 50_000, every_us: 20_000 };
    let readers: Vec<usize> = ["offset=-1&live=sse", "offset=-1&live=sse"]
        .iter()
        .map(|query| sim.client(ClientPlan { pace, ..read("/v1/durable/a", query).plan(10_000_000) }))
        .collect();
    let finished = sim.finish();
    assert_eq!(check(&finished, &readers, 400), 2);
    assert!(
        finished.sim.lag_max > 0 && finished.sim.lag_max <= finished.sim.settings.lag_high_bytes + (20 << 10)
    );
    let counters = &finished.sim.shard.stats().counters;
    assert!(counters.pauses > 4, "{} pauses", counters.pauses);
}

#[test]
fn event_streams_are_ended_for_their_readers_to_come_again() {
    let mut sim = sim_with(5, |settings| settings.durable.events_ms = 5_000);
    sim.client(Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), &message(0, 9)).plan(0));
    let reader = sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(1_000_000));
    let finished = sim.finish();
    let world = finished.sim.world();
    let answer = &world.clients[reader].reader.messages[0];
    assert!(answer.complete && world.clients[reader].ended == Some(Ended::Fin));
    assert_eq!(numbers(answer), (vec![0], false));
    assert!((6_000_000..8_000_000).contains(&world.clients[reader].ended_us));
}

#[test]
fn a_drain_sends_readers_away_in_peace() {
    let mut sim = sim_with(6, |_| {});
    sim.client(
        Requests::new()
            .ask("PUT /v1/durable/a", &format!("{JSON}Stream-TTL: 90\n{LAST}"), &message(0, 9))
            .plan(0),
    );
    let events = sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(1_000_000));
    let poll = sim.client(read("/v1/durable/a", "offset=now&live=long-poll").plan(1_000_000));
    sim.run_ms(5_000);
    sim.drain(60_000);
    let finished = sim.finish();
    assert_eq!(finished.sim.forced, Some(0));
    let world = finished.sim.world();
    let (events, poll) = (&world.clients[events], &world.clients[poll]);
    assert!(events.reader.messages[0].complete && events.ended_us < 8_000_000);
    assert_eq!(numbers(&events.reader.messages[0]).0, [0]);
    assert_eq!(
        (poll.reader.messages[0].status(), poll.reader.messages[0].header("stream-up-to-date")),
        (204, Some("true"))
    );
    assert!(poll.ended_us < 8_000_000);
}

#[test]
fn a_deleted_stream_ends_its_readers() {
    let mut sim = sim_with(7, |_| {});
    sim.client(Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), &message(0, 9)).plan(0));
    let events = sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(1_000_000));
    let poll = sim.client(read("/v1/durable/a", "offset=now&live=long-poll").plan(1_000_000));
    sim.client(Requests::new().ask("DELETE /v1/durable/a", LAST, "").plan(3_000_000));
    let finished = sim.finish();
    assert_eq!(finished.sim.shard.snapshot().durable, protocol::durable::Totals::default());
    let world = finished.sim.world();
    assert!(world.clients[events].reader.messages[0].complete && world.clients[events].ended_us < 6_000_000);
    assert_eq!(world.clients[poll].reader.messages[0].status(), 404);
}

#[test]
fn a_client_goes_to_the_home_of_streams_once_with_all_that_it_has_sent() {
    let mut sim = sim_with(11, |_| {}).of_shards(2, 64);
    sim.client(publish("/v1/durable/a", 50, 100).plan(0));
    let readers: Vec<usize> = (0..20)
        .map(|nth| sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(100_000 + nth)))
        .collect();
    let elsewhere = sim.client(Requests::new().ask("GET /v1/elsewhere", LAST, "").plan(0));
    let finished = sim.finish();
    assert_eq!(check(&finished, &readers, 50), readers.len());
    let home = home_of("/v1/durable/a", 2);
    let moves: Vec<u64> = finished.sim.shards().map(|shard| shard.stats().counters.moves).collect();
    assert!(
        moves[home] == 0 && (5..=21).contains(&moves[1 - home]),
        "each that comes elsewhere, once: {moves:?}"
    );
    assert!(!finished.sim.world().clients[elsewhere].reader.messages.is_empty());
}

/// While it is on its way, or about to be.
#[test]
fn a_client_that_leaves_on_its_way_to_the_home_is_let_go() {
    for at_us in 0..40 {
        for how in [How::Close, How::Reset, How::HalfClose] {
            let mut sim = sim_with(12 + at_us, |_| {}).of_shards(2, 64);
            let leave = Some((When::AtUs(at_us * 10), how));
            sim.client(ClientPlan { leave, ..read("/v1/durable/a", "offset=-1&live=sse").plan(0) });
            sim.finish();
        }
    }
}

#[test]
fn during_a_drain_nobody_is_moved() {
    let mut sim = sim_with(13, |_| {}).of_shards(2, 64);
    let puts = [(); 20].map(|()| {
        sim.client(ClientPlan {
            write_bytes: 10,
            write_gap_us: 20_000,
            ..Requests::new().ask("PUT /v1/durable/a", &format!("{JSON}{LAST}"), "").plan(0)
        })
    });
    sim.run_ms(2);
    sim.drain(10_000);
    let finished = sim.finish();
    let world = finished.sim.world();
    let told = |status: u16| {
        let answers = puts.iter().map(|put| &world.clients[*put].reader.messages[0]);
        answers.filter(|answer| answer.status() == status).count()
    };
    // One creates it, those who are at its home find it, the others are sent away.
    assert!(told(201) == 1 && told(200) > 0 && told(503) > 0 && told(201) + told(200) + told(503) == 20);
    assert_eq!(finished.sim.total(|counters| counters.moves), 0);
}

#[test]
fn streams_expire_while_nobody_asks_and_the_shard_sleeps_until_then() {
    let mut sim = sim_with(8, |_| {});
    for name in 0..20 {
        let fields = format!("{JSON}Stream-TTL: 30\n{LAST}");
        sim.client(
            Requests::new().ask(&format!("PUT /v1/durable/{name}"), &fields, &message(0, 9)).plan(name),
        );
    }
    sim.run_ms(20_000);
    let turns = sim.shard.stats().counters.turns;
    assert_eq!(sim.shard.snapshot().durable.streams, 20);
    sim.run_ms(5_000);
    assert!(sim.shard.stats().counters.turns - turns < 5, "an idle shard sleeps");
    sim.run_ms(10_000);
    assert_eq!(sim.shard.snapshot().durable.streams, 0);
    sim.finish();
}

#[test]
fn a_body_beyond_the_limit_is_refused_however_it_comes() {
    for chunked in [false, true] {
        let mut sim = sim_with(9, |settings| settings.durable.body_bytes_max = 1_000);
        let head = "POST /v1/durable/a HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n".to_owned();
        let raw = if chunked {
            format!("{head}Transfer-Encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n", "x".repeat(2_000))
        } else {
            format!("{head}Content-Length: 2000\r\n\r\n{}", "x".repeat(2_000))
        };
        let client = sim.client(ClientPlan { raw: Some(raw.into_bytes()), ..ClientPlan::new(&[]) });
        let finished = sim.finish();
        let world = finished.sim.world();
        assert_eq!(world.clients[client].reader.messages[0].status(), 413, "chunked: {chunked}");
        assert_eq!(finished.ends(End::Done), 1, "its body was read, and its connection kept");
    }
}

#[test]
fn who_asks_before_it_sends_too_much_is_told_before_it_sends() {
    let mut sim = sim_with(10, |settings| settings.durable.body_bytes_max = 1_000);
    let raw =
        "POST /v1/durable/a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n";
    let client = sim.client(ClientPlan { raw: Some(raw.into()), ..ClientPlan::new(&[]) });
    let finished = sim.finish();
    let world = finished.sim.world();
    let reader = &world.clients[client].reader;
    assert_eq!((reader.messages[0].status(), reader.interim), (413, 0));
    assert_eq!(finished.ends(End::Refused), 1);
}

/// A run drawn from a seed; gives how many readers saw a stream to its end, came to share what comes, and fell behind there.
fn random_run(seed: u64) -> [usize; 3] {
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut machine = faults(&mut rng);
    // Byte by byte, megabytes take more turns than a run has.
    machine.receive_bytes = if machine.receive_bytes > 0 { machine.receive_bytes.max(500) } else { 0 };
    let mut sim = sim_with(seed, |settings| {
        settings.lag_high_bytes = rng.pick(&[4_096, 65_536]);
        settings.lag_low_bytes = settings.lag_high_bytes / 4;
        settings.durable.events_ms = rng.pick(&[60_000, 0, 3_000]);
        settings.durable.long_poll_ms = rng.pick(&[20_000, 100]);
        settings.routes[1].heartbeat_ms = rng.pick(&[15_000, 500, 0]);
        // Who is still there then has waited for long enough.
        settings.routes[1].deadlines.total_ms = 300_000;
        settings.routes[1].upstreams = Vec::new();
    });
    if seed % 2 == 1 {
        sim = sim.of_shards(2, rng.pick(&[1, 64]));
    }
    sim.world().faults = machine;
    let streams = rng.range(1, 3);
    let mut checks = Vec::new();
    for stream in 0..streams {
        let path = format!("/v1/durable/{stream}");
        let (messages, pad) = (rng.range(1, 120) as usize, rng.pick(&[0, 200, 3_000]));
        let plan = publish(&path, messages, pad).plan(rng.skewed(100_000));
        sim.client(ClientPlan {
            write_bytes: rng.pick(&[1 << 20, 4_000, 700]),
            write_gap_us: rng.pick(&[0, 2_000, 50_000]),
            ..plan
        });
        let readers: Vec<usize> = (0..rng.range(1, 12))
            .map(|_| {
                let query = rng.pick(&[
                    "offset=-1&live=sse",
                    "offset=-1&live=sse",
                    "offset=-1",
                    "offset=-1&live=long-poll",
                ]);
                let mut plan = read(&path, query).plan(rng.skewed(5_000_000));
                plan.pace = match rng.below(5) {
                    0 => Pace::Slow {
                        bytes: rng.range(1_000, 20_000) as usize,
                        every_us: rng.skewed(20_000) + 1,
                    },
                    1 => Pace::Stuck {
                        after_bytes: rng.skewed(20_000) as usize,
                        for_us: rng.pick(&[10_000, 5_000_000]),
                    },
                    _ => Pace::Eager,
                };
                if rng.chance(200) {
                    let how = rng.pick(&[How::Close, How::Reset, How::HalfClose]);
                    plan.leave = Some((When::AtUs(rng.skewed(5_000_000)), how));
                }
                sim.client(plan)
            })
            .collect();
        checks.push((readers, messages));
    }
    if rng.chance(300) {
        sim.run_ms(rng.skewed(5_000));
        sim.drain(400_000);
    }
    let finished = sim.finish();
    let readers: u64 = finished.sim.shards().map(|shard| shard.snapshot().durable.readers).sum();
    assert_eq!(readers, 0, "who has left does not read");
    let whole = checks.iter().map(|(readers, messages)| check(&finished, readers, *messages)).sum();
    let total = |of: fn(&Counters) -> u64| finished.sim.total(of) as usize;
    [whole, total(|counters| counters.durable_shared), total(|counters| counters.durable_parted)]
}

#[test]
fn readers_see_what_was_published_whatever_the_machine_does() {
    let seeds = seeds("DURABLE", 200);
    let runs: Vec<[usize; 3]> = seeds.clone().map(random_run).collect();
    let [whole, shared, parted] = [0, 1, 2].map(|nth| runs.iter().map(|run| run[nth]).sum::<usize>());
    if are_usual(&seeds, 200) {
        assert!(whole > 100, "{whole} readers saw the end of their streams");
        assert!(shared > 100 && parted > 2, "{shared} shared, {parted} fell behind");
    }
}

/// What is known of a stream over all crashes.
#[derive(Clone, Copy, Default)]
struct Published {
    /// Messages that may have been taken, and those that were acknowledged.
    sent: u64,
    acknowledged: u64,
    /// Messages that a reader has seen.
    seen: u64,
}

/// Publishers and readers on a disk that fails, over several crashes; gives how many messages were acknowledged.
fn crash_run(seed: u64) -> u64 {
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let interval_ms = rng.pick(&[0, 0, 40]);
    let mut disk = SimDisk::new(JournalOf::Durable, seed);
    let mut streams = vec![Published::default(); rng.range(1, 4) as usize];
    for round in 0..5 {
        let last = round == 4;
        disk.latency_us = rng.pick(&[0, 200, 5_000, 300_000]);
        // What is written and not synced is promised as far as the cache goes, which a failed sync ends.
        disk.fails = if last || interval_ms > 0 { 0 } else { rng.pick(&[0, 0, 50, 400]) };
        let mut sim = sim_with(seed * 10 + round, |settings| {
            settings.routes[1].upstreams = Vec::new();
            settings.durable.fsync_interval_ms = interval_ms;
            settings.durable.segment_bytes = rng.pick(&[4_000, 1 << 20]);
            settings.unix_time_at_start_s += round * 1_000;
        });
        sim = sim.with_disk(disk);
        if !last && rng.chance(500) {
            sim.world().faults = faults(&mut rng);
        }
        let mut publishers = Vec::new();
        let mut readers = Vec::new();
        for (number, stream) in streams.iter_mut().enumerate() {
            let path = format!("/v1/durable/{number}");
            let first = stream.acknowledged;
            let count = rng.range(1, 60);
            let mut requests = Requests::new().ask(&format!("PUT {path}"), JSON, "");
            for number in first..first + count {
                let close = if number + 1 == first + count { LAST } else { "" };
                let fields =
                    format!("{JSON}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {number}\n{close}");
                requests = requests.ask(&format!("POST {path}"), &fields, &message(number as usize, 300));
            }
            publishers.push((sim.client(requests.plan(rng.skewed(10_000))), first));
            stream.sent = stream.sent.max(first + count);
            for _ in 0..rng.range(0, 3) {
                let query = rng.pick(&["offset=-1&live=sse", "offset=-1", "offset=-1&live=long-poll"]);
                readers.push((sim.client(read(&path, query).plan(rng.skewed(2_000_000))), number));
            }
        }
        if last {
            sim.run_ms(30_000);
        } else {
            sim.run_ms(1 + rng.skewed(3_000));
        }
        let world = sim.world.borrow();
        for (number, &(publisher, first)) in publishers.iter().enumerate() {
            let answers = &world.clients[publisher].reader.messages;
            for (nth, answer) in answers.iter().enumerate().skip(1) {
                if answer.complete && matches!(answer.status(), 200 | 204) {
                    streams[number].acknowledged = streams[number].acknowledged.max(first + nth as u64);
                }
            }
        }
        for &(reader, number) in &readers {
            let Some(answer) = world.clients[reader].reader.messages.first() else { continue };
            let (found, _) = numbers(answer);
            assert!(found.iter().copied().eq(0..found.len() as u64), "c{reader} has {found:?}");
            streams[number].seen = streams[number].seen.max(found.len() as u64);
        }
        drop(world);
        disk = sim.disk.take().unwrap();
        disk.crash(interval_ms == 0 && rng.chance(500));
        let recovered = disk.recover();
        assert!(recovered.findings.iter().all(|finding| !finding.lost), "{:?}", recovered.findings);
        for (number, stream) in streams.iter().enumerate() {
            let content = recovered.content(&format!("/v1/durable/{number}"));
            let content = content.unwrap_or_else(|| b"[]".to_vec());
            let values: Vec<serde_json::Value> = serde_json::from_slice(&content).unwrap();
            let is = values.len() as u64;
            assert!(values.iter().enumerate().all(|(nth, value)| *value == text(nth)), "wrong: {values:?}");
            let Published { sent, acknowledged, seen } = *stream;
            assert!(
                acknowledged <= is && seen <= is && is <= sent,
                "round {round}, stream {number}: {is} messages are there; {acknowledged} acknowledged, {seen} seen, {sent} sent"
            );
        }
    }
    streams.iter().map(|stream| stream.acknowledged).sum()
}

fn text(nth: usize) -> serde_json::Value {
    serde_json::from_str(&message(nth, 300)).unwrap()
}

#[test]
fn a_crash_takes_nothing_back_that_a_publisher_or_a_reader_was_told() {
    let seeds = seeds("DURABLE_CRASH", 100);
    let acknowledged: u64 = seeds.clone().map(crash_run).sum();
    assert!(!are_usual(&seeds, 100) || acknowledged > 5_000, "{acknowledged} were acknowledged");
}

#[test]
fn an_answer_waits_for_the_disk_and_a_reader_with_it() {
    let mut disk = SimDisk::new(JournalOf::Durable, 1);
    disk.latency_us = 4_000_000;
    let mut sim = sim_with(21, |_| {}).with_disk(disk);
    let publisher = sim.client(publish("/v1/durable/a", 3, 10).plan(0));
    let reader = sim.client(read("/v1/durable/a", "offset=-1&live=sse").plan(20_000_000));
    let finished = sim.finish();
    let world = finished.sim.world();
    assert!(world.clients[publisher].ended_us > 1_000, "{}", world.clients[publisher].ended_us);
    assert_eq!(numbers(&world.clients[reader].reader.messages[0]), (vec![0, 1, 2], true));
    assert_eq!(finished.ends(End::Done), 5);
}

#[test]
fn while_a_disk_fails_publishers_are_told_and_it_goes_on_by_itself() {
    let mut disk = SimDisk::new(JournalOf::Durable, 2);
    disk.fails = 1000;
    let mut sim = sim_with(22, |_| {}).with_disk(disk);
    let early = sim.client(publish("/v1/durable/a", 2, 10).plan(0));
    sim.run_ms(20_000);
    assert!(sim.shard.snapshot().journal.unwrap().failing.is_some());
    sim.disk.as_mut().unwrap().fails = 0;
    sim.run_ms(10_000);
    assert_eq!(sim.shard.snapshot().journal.unwrap().failing, None);
    let late = sim.client(publish("/v1/durable/b", 2, 10).plan(31_000_000));
    let finished = sim.finish();
    let world = finished.sim.world();
    let statuses = |client: usize| -> Vec<u16> {
        world.clients[client].reader.messages.iter().map(|answer| answer.status()).collect()
    };
    assert_eq!(statuses(early), [503, 503, 503]);
    let code =
        |nth: usize| String::from_utf8_lossy(&world.clients[early].reader.messages[nth].body).into_owned();
    assert!(code(0).contains("not_durable") && code(1).contains("disk_failed"), "{} {}", code(0), code(1));
    assert_eq!(statuses(late), [201, 200, 200]);
}
