//! Live readers of durable streams on several shards: those who have caught up at the stream's home are handed over in the middle of
//! their answers, and are owed what they would be owed there.

use crate::client::{ClientPlan, How, Pace, When};
use crate::durable::{self, JSON, LAST, Requests, numbers};
use crate::minimise::failure_of;
use crate::rng::{Rng, are_usual, seeds};
use crate::run::{Finished, Sim};
use crate::shards::{self, shards_with};
use protocol::durable::home_of;
use protocol::planted::Bug;
use shard::settings::Settings;

const ROOM: usize = 64;
const PATH: &str = "/v1/durable/a";

fn read(start_us: u64) -> ClientPlan {
    durable::read(PATH, "offset=-1&live=sse").plan(start_us)
}

fn append(number: usize, pad: usize, fields: &str, at_us: u64) -> ClientPlan {
    let fields = format!("{JSON}{fields}{LAST}");
    Requests::new().ask(&format!("POST {PATH}"), &fields, &durable::message(number, pad)).plan(at_us)
}

/// A durable stream that many read live, on so many shards, with a message every 100 ms from 1 s on.
fn live(seed: u64, shards: usize, messages: usize, change: impl FnOnce(&mut Settings)) -> (Sim, Vec<usize>) {
    let mut sim = shards_with(seed, shards, ROOM, |settings| {
        settings.mirror_readers = 2;
        settings.durable.events_ms = 0;
        change(settings);
    });
    sim.client(Requests::new().ask(&format!("PUT {PATH}"), &format!("{JSON}{LAST}"), "").plan(0));
    for number in 0..messages {
        sim.client(append(number, 300, "", 1_000_000 + 100_000 * number as u64));
    }
    let readers = (0..30).map(|nth| sim.client(read(100_000 + nth * 1_000))).collect();
    (sim, readers)
}

/// Live readers of each shard.
fn reads(sim: &Sim) -> Vec<u64> {
    sim.shards().map(|shard| shard.snapshot().durable.readers).collect()
}

fn close(sim: &mut Sim, at_us: u64) {
    let fields = format!("Stream-Closed: true\n{LAST}");
    sim.client(Requests::new().ask(&format!("POST {PATH}"), &fields, "").plan(at_us));
}

#[test]
fn readers_that_have_caught_up_are_shared_by_all_shards() {
    for shards in [2, 3] {
        let (mut sim, readers) = live(1, shards, 40, |_| {});
        close(&mut sim, 5_500_000);
        sim.run_ms(2_000);
        let reads = reads(&sim);
        assert_eq!(reads.iter().sum::<u64>(), 30, "{reads:?}");
        assert!(reads.iter().all(|&reads| (6..=20).contains(&reads)), "{reads:?}");
        assert_eq!(sim.shards().map(|shard| shard.snapshot().kept.mirrors).sum::<usize>(), shards - 1);
        let finished = sim.finish();
        assert_eq!(durable::check(&finished, &readers, 40), 30);
        let handed = finished.sim.total(|counters| counters.durable_handed_over);
        assert!((10..=24).contains(&handed), "{handed} were handed over");
        assert_eq!(finished.sim.total(|counters| counters.durable_handed_back), 0);
        assert_eq!(finished.sim.shards().map(|shard| shard.snapshot().kept.mirrors).sum::<usize>(), 0);
    }
}

/// What a reader saw: its messages, whether it was told that there will be no more, and whether its answer ended as one ends.
fn seen(finished: &Finished, reader: usize) -> (Vec<u64>, bool, bool) {
    let world = finished.sim.world();
    let Some(answer) = world.clients[reader].reader.messages.first() else {
        return (Vec::new(), false, false);
    };
    let (found, closed) = numbers(answer);
    assert!(found.iter().copied().eq(0..found.len() as u64), "c{reader} has {found:?}");
    (found, closed, answer.complete)
}

#[test]
fn a_deleted_stream_ends_the_readers_of_its_mirrors_too() {
    let (mut sim, readers) = live(2, 2, 10, |_| {});
    sim.client(Requests::new().ask(&format!("DELETE {PATH}"), LAST, "").plan(2_500_000));
    let finished = sim.finish();
    assert!(finished.sim.total(|counters| counters.durable_handed_over) > 8);
    for &reader in &readers {
        assert_eq!(seen(&finished, reader), ((0..10).collect(), false, true));
        assert!(finished.sim.world().clients[reader].ended_us < 4_000_000);
    }
}

#[test]
fn a_stream_that_expires_is_one_that_nobody_reads_anywhere() {
    let (mut sim, readers) = live(3, 2, 10, |_| {});
    // It does not while a mirror alone is read.
    sim.run_ms(2_500);
    let home = reads(&sim)[0];
    assert!(home > 0 && home < 30);
    let expires = format!("{JSON}Stream-TTL: 5\n{LAST}");
    sim.client(Requests::new().ask("PUT /v1/durable/b", &expires, "").plan(0));
    let on_mirror: Vec<usize> = (0..8)
        .map(|nth| sim.client(durable::read("/v1/durable/b", "offset=-1&live=sse").plan(nth)))
        .collect();
    sim.run_ms(60_000);
    assert_eq!(sim.shards().map(|shard| shard.snapshot().durable.streams).sum::<usize>(), 2);
    for &reader in readers.iter().chain(&on_mirror) {
        sim.world().leave_now(reader, How::Close);
    }
    sim.run_ms(20_000);
    assert_eq!(sim.shards().map(|shard| shard.snapshot().durable.streams).sum::<usize>(), 1);
    assert_eq!(sim.shards().map(|shard| shard.snapshot().kept.mirrors).sum::<usize>(), 0);
    assert_eq!(reads(&sim).iter().sum::<u64>(), 0);
    sim.finish();
}

#[test]
fn readers_of_mirrors_are_sent_away_when_their_time_is_over() {
    let (mut sim, readers) = live(4, 2, 80, |settings| settings.durable.events_ms = 4_000);
    sim.run_ms(3_000);
    assert!(sim.total(|counters| counters.durable_handed_over) > 8);
    let finished = sim.finish();
    for &reader in &readers {
        let (found, closed, complete) = seen(&finished, reader);
        assert!(found.len() >= 30 && !closed && complete, "c{reader}: {}", found.len());
        let ended_us = finished.sim.world().clients[reader].ended_us;
        assert!((4_100_000..5_600_000).contains(&ended_us), "c{reader} ended at {ended_us}");
    }
}

#[test]
fn a_reader_that_a_mirror_leaves_behind_catches_up_at_home() {
    for shards in [2, 3] {
        let (mut sim, mut readers) = live(5, shards, 30, |settings| settings.lag_high_bytes = 4_096);
        let stuck: Vec<usize> = (0..12)
            .map(|nth| {
                let pace = Pace::Stuck { after_bytes: 5_000, for_us: 8_000_000 };
                sim.client(ClientPlan { pace, ..read(200_000 + nth * 1_000) })
            })
            .collect();
        // What the kernel takes of a stuck client is much: more comes than that.
        for number in 30..130 {
            sim.client(append(number, 20_000, "", 4_000_000 + 20_000 * number as u64));
        }
        close(&mut sim, 20_000_000);
        readers.extend(&stuck);
        let finished = sim.finish();
        assert_eq!(durable::check(&finished, &readers, 130), 42);
        let back = finished.sim.total(|counters| counters.durable_handed_back);
        let parted = finished.sim.total(|counters| counters.durable_parted);
        assert!(back > 2 && back <= parted, "{back} were handed back, {parted} left behind");
    }
}

#[test]
fn a_shard_that_leaves_sends_its_readers_away_in_peace() {
    for leaver in 0..2 {
        let (mut sim, readers) = live(6, 2, 10, |_| {});
        sim.run_ms(2_500);
        sim.drain_one(leaver, 60_000);
        sim.run_ms(500);
        assert_eq!(reads(&sim)[leaver], 0);
        if leaver == home_of(PATH, 2) {
            assert_eq!(reads(&sim)[1 - leaver], 0, "their stream has left");
        }
        sim.drain(60_000);
        let finished = sim.finish();
        assert_eq!(finished.sim.forced, Some(0));
        for &reader in &readers {
            assert_eq!(seen(&finished, reader), ((0..10).collect(), false, true));
        }
    }
}

#[test]
fn readers_of_a_home_that_is_gone_come_again() {
    let (mut sim, readers) = live(7, 2, 40, |_| {});
    sim.run_ms(2_500);
    let home = home_of(PATH, 2);
    let mirrored = reads(&sim)[1 - home];
    sim.shard_mut(home).lose_mesh();
    sim.run_ms(500);
    assert_eq!((reads(&sim)[1 - home], sim.shards().nth(1 - home).unwrap().snapshot().kept.mirrors), (0, 0));
    let world = sim.world();
    let away = readers.iter().filter(|&&reader| {
        let answer = &world.clients[reader].reader.messages[0];
        answer.complete && (10..20).contains(&numbers(answer).0.len())
    });
    assert_eq!(away.count() as u64, mirrored);
}

#[test]
fn a_mirror_that_is_gone_takes_its_readers_and_nobody_else() {
    let (mut sim, readers) = live(8, 2, 40, |_| {});
    sim.run_ms(2_500);
    let at = home_of(PATH, 2);
    let home = reads(&sim)[at];
    sim.shard_mut(1 - at).lose_mesh();
    sim.run_ms(3_000);
    assert_eq!(reads(&sim)[at], home);
    assert_eq!(sim.shards().nth(at).unwrap().stats().counters.mirrors_closed, 1);
    // What was to be appended through the shard that is gone was not.
    let world = sim.world();
    let last = |reader: usize| numbers(&world.clients[reader].reader.messages[0]).0.last().copied();
    assert_eq!(readers.iter().filter(|&&reader| last(reader) > Some(30)).count() as u64, home);
}

/// While it is on its way, or about to be.
#[test]
fn a_reader_that_leaves_on_its_way_to_a_mirror_is_let_go() {
    for step in 0..60 {
        for how in [How::Close, How::Reset] {
            let (mut sim, readers) = live(9 + step, 2, 3, |_| {});
            sim.world().faults.work_us = 100;
            sim.run_ms(998);
            for (nth, &reader) in readers.iter().enumerate() {
                sim.world().clients[reader].plan.leave = None;
                if nth % 2 == 0 {
                    let at_us = 1_000_000 + step * 60 + nth as u64 * 10;
                    sim.world().leave_at(reader, at_us, how);
                }
            }
            sim.run_ms(1_000);
            let left = reads(&sim);
            assert_eq!(left.iter().sum::<u64>(), 15, "{left:?}");
            close(&mut sim, 2_100_000);
            let finished = sim.finish();
            assert_eq!(durable::check(&finished, &readers, 3), 15);
        }
    }
}

#[test]
fn a_mirror_that_nobody_reads_any_more_goes_and_comes_again() {
    let (mut sim, readers) = live(10, 2, 100, |_| {});
    for round in 1..4 {
        sim.run_ms(2_500);
        assert_eq!(sim.total(|counters| counters.mirrors_opened), round);
        // All of them, wherever they are.
        let living: Vec<usize> = {
            let world = sim.world();
            (0..world.clients.len())
                .filter(|&client| world.clients[client].plan.raw.as_ref().unwrap().starts_with(b"GET"))
                .collect()
        };
        for reader in living {
            sim.world().leave_now(reader, How::Close);
        }
        sim.run_ms(1_300);
        assert_eq!(sim.shards().map(|shard| shard.snapshot().kept.mirrors).sum::<usize>(), 0);
        assert_eq!(sim.total(|counters| counters.mirrors_closed), round);
        for nth in 0..30 {
            sim.client(read(nth));
        }
    }
    assert_eq!(readers.len(), 30);
    close(&mut sim, 0);
    sim.finish();
}

/// An event longer than a segment of a log, of which they were sent a part.
#[test]
fn who_is_sent_away_within_an_event_is_sent_the_rest_of_it() {
    for secure in [false, true] {
        for shards in [1, 2] {
            let mut settings = crate::run::settings();
            settings.mirror_readers = 2;
            settings.lag_high_bytes = 1 << 20;
            let sim = match secure {
                true => crate::tls::of_both(11, settings, Vec::new()),
                false => Sim::new(11, settings, Vec::new()),
            };
            let mut sim = if shards > 1 { sim.of_shards(shards, ROOM) } else { sim };
            sim.lenience.outlives = true;
            sim.client(Requests::new().ask(&format!("PUT {PATH}"), &format!("{JSON}{LAST}"), "").plan(0));
            let pace = Pace::Slow { bytes: 3_000, every_us: 5_000 };
            let readers: Vec<usize> =
                (0..12).map(|nth| sim.client(ClientPlan { pace, ..read(100_000 + nth) })).collect();
            sim.run_ms(1_000);
            sim.client(append(0, 0, "", 0));
            let long = format!("{{\"n\":1,\"pad\":\"{}\"}}", "x".repeat(700_000));
            let ask = Requests::new().ask(&format!("POST {PATH}"), &format!("{JSON}{LAST}"), &long);
            sim.client(ask.plan(100_000));
            sim.run_ms(300);
            sim.drain(60_000);
            let finished = sim.finish();
            assert_eq!(finished.sim.forced, Some(0));
            for &reader in &readers {
                assert_eq!(seen(&finished, reader), (vec![0, 1], false, true), "c{reader} of {shards}");
            }
        }
    }
}

// ---- drawn from a seed

#[derive(Default)]
struct Tally {
    whole: usize,
    over: u64,
    back: u64,
    parted: u64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.whole += other.whole;
        self.over += other.over;
        self.back += other.back;
        self.parted += other.parted;
    }
}

/// A durable stream under way, and those who read it.
struct Published {
    readers: Vec<usize>,
    /// In the form of an `EventSource`.
    plain: Vec<usize>,
    messages: usize,
}

/// What readers of the plain form have: an id behind each message, and nothing else.
fn check_plain(finished: &Finished, readers: &[usize], messages: usize) -> usize {
    let world = finished.sim.world();
    let mut whole = 0;
    for &reader in readers {
        let Some(answer) = world.clients[reader].reader.messages.first() else { continue };
        if answer.status() != 200 {
            continue;
        }
        let text = String::from_utf8_lossy(&answer.body);
        let mut events: Vec<&str> = text.split("\n\n").collect();
        let rest = events.pop();
        assert!(!answer.complete || rest == Some(""), "c{reader}: a whole body that ends within an event");
        let data =
            |event: &&str| event.lines().find_map(|line| line.strip_prefix("data:").map(str::to_owned));
        let values = events.iter().filter_map(data).filter(|data| !data.is_empty());
        let found: Vec<u64> = values
            .map(|data| serde_json::from_str::<serde_json::Value>(&data).unwrap()["n"].as_u64().unwrap())
            .collect();
        assert!(found.iter().copied().eq(0..found.len() as u64), "c{reader} has {found:?}");
        assert!(found.len() <= messages);
        whole += usize::from(found.len() == messages && answer.complete);
    }
    whole
}

fn published(sim: &mut Sim, rng: &mut Rng, name: u64) -> Published {
    let path = format!("/v1/durable/{name}");
    let (messages, pad) = (rng.range(20, 150) as usize, rng.pick(&[0, 300, 3_000, 20_000]));
    let plan = durable::publish(&path, messages, pad).plan(rng.skewed(100_000));
    let write_bytes = rng.pick(&[4_000, 700, 1 << 20]);
    sim.client(ClientPlan { write_bytes, write_gap_us: rng.pick(&[2_000, 20_000, 50_000]), ..plan });
    let mut readers = (Vec::new(), Vec::new());
    for _ in 0..rng.range(5, 40) {
        let plain = rng.chance(300);
        let plan = match plain {
            false => durable::read(&path, "offset=-1&live=sse").plan(rng.skewed(1_500_000)),
            true => {
                let fields = format!("Accept: text/event-stream\n{LAST}");
                Requests::new().ask(&format!("GET {path}"), &fields, "").plan(rng.skewed(1_500_000))
            }
        };
        let leave = rng.chance(250).then(|| {
            (When::AtUs(rng.skewed(4_000_000)), rng.pick(&[How::Close, How::Reset, How::HalfClose]))
        });
        let pace = if rng.chance(500) { Pace::Eager } else { shards::pace(rng) };
        let write_bytes = rng.pick(&[1 << 20, 40]);
        let list = if plain { &mut readers.1 } else { &mut readers.0 };
        list.push(sim.client(ClientPlan { pace, leave, write_bytes, ..plan }));
    }
    Published { readers: readers.0, plain: readers.1, messages }
}

fn run(seed: u64) -> (Tally, Finished) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0x4A2D);
    let enough = rng.range(1, 4) as usize;
    let mut sim = shards::shards_of(seed, &mut rng, |with| {
        with.mirror_readers = enough;
        if with.connections_max > 8 {
            with.backlog = 128;
        }
    });
    let durables: Vec<Published> =
        (0..rng.range(1, 2)).map(|name| published(&mut sim, &mut rng, name)).collect();
    if rng.chance(150) {
        sim.run_ms(rng.skewed(5_000));
        sim.client(Requests::new().ask("DELETE /v1/durable/0", LAST, "").plan(0));
    }
    if rng.chance(250) {
        sim.run_ms(rng.skewed(5_000));
        let leaver = rng.below(sim.shards().count() as u64) as usize;
        sim.drain_one(leaver, rng.skewed(100_000));
        sim.run_ms(rng.skewed(5_000));
    }
    if rng.chance(300) || sim.world().control.leaving_us.is_some() {
        sim.run_ms(rng.skewed(5_000));
        sim.drain(400_000);
    }
    let finished = sim.finish();
    let readers: u64 = finished.sim.shards().map(|shard| shard.snapshot().durable.readers).sum();
    assert_eq!(readers, 0, "who has left does not read");
    let total = |of: fn(&shard::stats::Counters) -> u64| finished.sim.total(of);
    let whole = |published: &Published| {
        durable::check(&finished, &published.readers, published.messages)
            + check_plain(&finished, &published.plain, published.messages)
    };
    let tally = Tally {
        whole: durables.iter().map(whole).sum(),
        over: total(|counters| counters.durable_handed_over),
        back: total(|counters| counters.durable_handed_back),
        parted: total(|counters| counters.durable_parted),
    };
    (tally, finished)
}

/// The first hundred seeds; with `SIM_HANDOVER_RUNS`, so many from `SIM_HANDOVER_FROM` on.
#[test]
fn who_is_handed_over_is_owed_what_it_was_owed_whatever_happens() {
    let seeds = seeds("HANDOVER", 100);
    let mut all = Tally::default();
    for seed in seeds.clone() {
        all.add(&run(seed).0);
    }
    let Tally { whole, over, back, parted } = all;
    println!("{whole} whole, {over} handed over, {back} handed back, {parted} left behind");
    if are_usual(&seeds, 100) {
        assert!(whole > 500 && over > 300 && back > 20 && parted > 40);
    }
}

#[test]
fn planted_bugs_of_handovers_are_found() {
    for &bug in Bug::OF_HANDOVERS {
        let found = (0..150).find_map(|seed| failure_of(bug, || drop(run(seed))).map(|what| (seed, what)));
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what}");
    }
}
