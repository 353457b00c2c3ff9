//! Streams that many read on several shards: whoever reads a mirror is owed what it would be owed at the stream's home.

use crate::client::{ClientPlan, How, Pace, When};
use crate::disk::SimDisk;
use crate::io::SimIo;
use crate::minimise::failure_of;
use crate::plan::{Answer, Fault, Framed, Request};
use crate::resume::{self, Tale, answer, chat, come_back, raw};
use crate::rng::Rng;
use crate::run::{Finished, Sim};
use crate::shards::{self, shards_with};
use protocol::dialect::Dialect;
use protocol::planted::Bug;
use shard::core::{JournalOf, Shard};
use shard::listing::{Inquiry, Place};
use shard::mesh::Command;
use shard::settings::{OnLeave, Settings, SlowReader};

const ROOM: usize = 64;

/// A stream that each of two shards reads, and so many readers.
fn mirrored(seed: u64, events: u32, change: impl FnOnce(&mut Settings)) -> (Sim, Tale) {
    let mut sim = shards_with(seed, 2, ROOM, |settings| {
        settings.mirror_readers = 1;
        change(settings);
    });
    let mut tale = chat(&mut sim, events, 20_000, |plan| plan);
    sim.run_ms(200);
    for _ in 0..20 {
        come_back(&mut sim, &mut tale, 0);
        sim.run_ms(10);
    }
    assert!(sim.total(|counters| counters.mirror_reads) > 4, "some read the mirror");
    (sim, tale)
}

fn mirrors(sim: &Sim) -> usize {
    sim.shards().map(|shard| shard.snapshot().kept.mirrors).sum()
}

#[test]
fn those_who_read_a_mirror_see_what_those_at_home_see() {
    let (mut sim, mut tale) = mirrored(1, 90, |_| {});
    assert_eq!(mirrors(&sim), 1);
    for after in 0..20 {
        come_back(&mut sim, &mut tale, after % 12);
    }
    let finished = sim.finish();
    assert_eq!(resume::check(&finished, &tale), 41);
    let reads = finished.sim.total(|counters| counters.mirror_reads);
    let moves = finished.sim.total(|counters| counters.moves);
    assert!(reads > 12 && (1..=4).contains(&moves), "{reads} read the mirror, {moves} were moved");
    assert_eq!(finished.sim.total(|counters| counters.mirrors_opened), 1);
    assert_eq!(finished.sim.total(|counters| counters.mirrors_closed), 1);
    assert_eq!(mirrors(&finished.sim), 0);
}

#[test]
fn a_stream_lives_by_the_readers_of_its_mirrors_alone() {
    let (mut sim, mut tale) = mirrored(2, 200, |settings| {
        settings.routes.iter_mut().for_each(|route| {
            if let Some(resume) = &mut route.resume {
                resume.on_leave = OnLeave::Cancel;
            }
        });
    });
    // Everybody leaves in turn; whoever is left is told everything.
    let late = come_back(&mut sim, &mut tale, 0);
    let readers: Vec<usize> =
        tale.readers.iter().map(|&(reader, _)| reader).filter(|&reader| reader != late).collect();
    sim.run_ms(100);
    for client in readers.into_iter().chain([tale.client]) {
        sim.world().leave_now(client, How::Reset);
        sim.run_ms(20);
    }
    let finished = sim.finish();
    assert!(resume::check(&finished, &tale) >= 1, "the last one has all of it");
}

#[test]
fn a_mirror_goes_with_its_readers() {
    let (mut sim, tale) = mirrored(3, 400, |_| {});
    for &(client, _) in &tale.readers {
        sim.world().leave_now(client, How::Close);
    }
    sim.run_ms(1_500);
    assert_eq!(mirrors(&sim), 0);
    assert_eq!(sim.total(|counters| counters.mirrors_closed), 1);
    let finished = sim.finish();
    assert_eq!(resume::check(&finished, &tale), 1);
}

#[test]
fn a_stop_is_heard_at_every_mirror() {
    let (mut sim, mut tale) = mirrored(4, 400, |_| {});
    let id = tale.id.clone().unwrap();
    tale.stopped = true;
    sim.client(raw(&format!("DELETE /v1/streams/{id}"), ""));
    sim.run_ms(500);
    for &(reader, _) in &tale.readers {
        assert_eq!(answer(&sim, reader).unwrap().code(), "stream_stopped");
    }
    let again: Vec<usize> = (0..6).map(|_| come_back(&mut sim, &mut tale, 0)).collect();
    sim.run_ms(100);
    for reader in again {
        assert_eq!(answer(&sim, reader).unwrap().status, 410);
    }
    resume::check(&sim.finish(), &tale);
}

#[test]
fn a_reader_that_a_mirror_leaves_behind_is_told() {
    for policy in [SlowReader::Drop, SlowReader::Skip, SlowReader::Block] {
        let (mut sim, mut tale) = mirrored(5, 900, |settings| {
            settings.routes.iter_mut().for_each(|route| {
                if let Some(resume) = &mut route.resume {
                    (resume.slow_reader, resume.window_bytes) = (policy, 4_000);
                }
            });
        });
        let id = tale.id.clone().unwrap();
        for _ in 0..6 {
            let pace = Pace::Stuck { after_bytes: 3_000, for_us: 12_000_000 };
            let plan = ClientPlan { pace, ..resume::resume(&id, 0) };
            tale.readers.push((sim.client(plan), 0));
        }
        let finished = sim.finish();
        let whole = resume::check(&finished, &tale);
        let told = finished.sim.total(|counters| counters.readers_dropped + counters.readers_skipped);
        match policy {
            SlowReader::Block => assert_eq!((whole, told), (27, 0), "all wait for the slowest"),
            _ => assert!(whole >= 21 && told >= 4, "{policy:?}: {whole} whole, {told} told"),
        }
    }
}

#[test]
fn a_stream_is_listed_at_its_home_and_nowhere_else() {
    let mut homes = Vec::new();
    for seed in 10..16 {
        let (mut sim, tale) = mirrored(seed, 2_000, |_| {});
        let (home, mirror) = both(&sim);
        let id = tale.id.clone().unwrap();
        sim.run_ms(1_200);
        for (ring, found) in [(home, 1), (mirror, 0)] {
            for inquiry in [Inquiry::Id(id.parse().unwrap()), Inquiry::From(Place::default())] {
                sim.command_one(ring, Command::Streams { ticket: 0, inquiry });
                sim.run_ms(1);
                let (_, page) = sim.pages.pop().unwrap();
                assert_eq!(page.kept.len(), found, "seed {seed}, shard {ring}");
                assert!(page.kept.iter().all(|stream| (&stream.id, stream.readers) == (&id, 21)));
            }
        }
        homes.push(home);
    }
    assert!(homes.contains(&0) && homes.contains(&1), "{homes:?}");
}

#[test]
fn a_reader_of_a_mirror_may_be_behind_as_long_as_any() {
    let (mut sim, mut tale) = mirrored(8, 2_000, |settings| {
        settings.routes.iter_mut().for_each(|route| {
            if let Some(resume) = &mut route.resume {
                (resume.slow_reader, resume.reader_lag_ms) = (SlowReader::Drop, 2_000);
                resume.window_bytes = 1 << 20;
            }
        });
    });
    let id = tale.id.clone().unwrap();
    for _ in 0..6 {
        let pace = Pace::Stuck { after_bytes: 3_000, for_us: 12_000_000 };
        let plan = ClientPlan { pace, ..resume::resume(&id, 0) };
        tale.readers.push((sim.client(plan), 0));
    }
    let finished = sim.finish();
    let dropped: Vec<u64> =
        finished.sim.shards().map(|shard| shard.stats().counters.readers_dropped).collect();
    assert!(dropped.iter().all(|&dropped| dropped > 0), "{dropped:?}");
    assert_eq!(resume::check(&finished, &tale), 21, "the others have all of it");
}

/// The stream's home, and the shard that mirrors it.
fn both(sim: &Sim) -> (usize, usize) {
    let of = |mirror| {
        let is_it = |shard: &Shard<SimIo>| (shard.snapshot().kept.mirrors > 0) == mirror;
        sim.shards().position(is_it).unwrap()
    };
    (of(false), of(true))
}

#[test]
fn readers_of_a_home_that_is_gone_are_told() {
    let (mut sim, tale) = mirrored(6, 2_000, |_| {});
    let (home, mirror) = both(&sim);
    let reads = sim.shards().nth(mirror).unwrap().snapshot().kept.readers;
    sim.shard_mut(home).lose_mesh();
    sim.run_ms(200);
    let told = tale.readers.iter().filter(|&&(reader, _)| {
        let seen = answer(&sim, reader).unwrap();
        seen.code() == "stopped" && sim.world().clients[reader].reader.messages[0].complete
    });
    assert_eq!(told.count(), reads);
    let after = sim.shards().nth(mirror).unwrap().snapshot().kept;
    assert_eq!((after.mirrors, after.readers), (0, 0));
}

#[test]
fn a_mirror_that_is_gone_is_forgotten() {
    let (mut sim, mut tale) = mirrored(7, 2_000, |_| {});
    let (home, mirror) = both(&sim);
    sim.shard_mut(mirror).lose_mesh();
    sim.run_ms(200);
    assert_eq!(sim.shards().nth(home).unwrap().stats().counters.mirrors_closed, 1);
    assert!(!sim.shards().nth(home).unwrap().has_left());
    let alone = tale.readers.iter().filter(|&&(reader, _)| answer(&sim, reader).unwrap().last() > 20).count();
    assert!(alone > 0, "those at home go on");
    tale.readers.clear();
}

/// Their copies on the way to a mirror and in its log are drawn from the overdraft of either shard.
#[test]
fn long_events_are_mirrored_as_far_as_the_overdraft_goes() {
    // Of four mirrors one finds no room.
    for (shards, overdraft_bytes_max, policy) in
        [(2, 64 << 20, SlowReader::Block), (5, 420_000, SlowReader::Drop)]
    {
        let mut sim = shards_with(40, shards, ROOM, |settings| {
            settings.mirror_readers = 1;
            settings.overdraft_bytes_max = overdraft_bytes_max;
            settings.resume_bytes_max = 64 << 20;
            settings.routes.iter_mut().for_each(|route| {
                if let Some(resume) = &mut route.resume {
                    (resume.slow_reader, resume.window_bytes) = (policy, 1 << 20);
                }
            });
        });
        let events = Answer { bytes: 240_000, gap_us: 20_000, piece_bytes: 16_000, ..Answer::events(12) };
        let exchange = sim.exchange(Request::new(Dialect::Chat, true), events);
        let client = sim.client(ClientPlan::new(&[exchange]));
        let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
        sim.run_ms(500);
        for nth in 0..20 {
            come_back(&mut sim, &mut tale, 0);
            if nth % 2 == 0 && policy == SlowReader::Block {
                let id = tale.id.clone().unwrap();
                let pace = Pace::Stuck { after_bytes: 500_000, for_us: 1_000_000 };
                let plan = ClientPlan { pace, ..resume::resume(&id, 0) };
                tale.readers.push((sim.client(plan), 0));
            }
            sim.run_ms(10);
        }
        let mirror = sim.shards().position(|shard| shard.snapshot().kept.mirrors > 0).unwrap();
        let mut drawn = 0;
        for _ in 0..4_000 {
            sim.run_ms(1);
            drawn = drawn.max(sim.shards().nth(mirror).unwrap().snapshot().overdraft_bytes);
            assert!(sim.shards().all(|shard| shard.snapshot().overdraft_bytes <= overdraft_bytes_max));
        }
        let reads = sim.total(|counters| counters.mirror_reads) as usize;
        let finished = sim.finish();
        let whole = resume::check(&finished, &tale);
        let refused = finished.sim.total(|counters| counters.overdrafts_refused);
        assert!(reads > 4);
        match policy {
            SlowReader::Block => {
                assert_eq!((whole, refused), (31, 0));
                assert!(drawn > 30_000, "{drawn} bytes are owed beyond a stream's share");
            }
            _ => assert!(
                refused > 0 && (5..21).contains(&whole),
                "{whole} whole, {reads} read mirrors, {refused} refused, {drawn} drawn"
            ),
        }
    }
}

fn stores(settings: &mut Settings) {
    settings.routes.iter_mut().for_each(|route| {
        if let Some(resume) = &mut route.resume {
            resume.durable = true;
        }
    });
}

#[test]
fn what_waits_for_the_disk_is_delivered_at_no_mirror_before() {
    let mut waited = 0;
    for seed in 20..32 {
        let mut disk = SimDisk::new(JournalOf::Relayed, seed);
        disk.latency_us = 400_000;
        let mut sim = shards_with(seed, 2, ROOM, |settings| {
            settings.mirror_readers = 1;
            stores(settings);
        })
        .with_disk(disk);
        let mut tale = chat(&mut sim, 150, 20_000, |plan| plan);
        sim.run_ms(1_000);
        for _ in 0..20 {
            come_back(&mut sim, &mut tale, 0);
            sim.run_ms(10);
        }
        let at_home = sim.shards().position(|shard| shard.snapshot().kept.live > 0);
        for _ in 0..120 {
            sim.run_ms(20);
            let readers = tale.readers.iter().map(|&(reader, _)| reader).chain([tale.client]);
            let seen = readers.filter_map(|reader| Some(answer(&sim, reader)?.last())).max().unwrap();
            let written = sim.world().exchanges[tale.exchange].events_written() as u64;
            // The other shard has no disk.
            if at_home == Some(0) {
                waited += u64::from(seen + 5 < written);
                let recovered = sim.disk.as_ref().unwrap().recover();
                let stored = recovered.relayed().map(|stream| stream.ids().1).max();
                assert!(seen <= stored.unwrap_or(0), "seed {seed}: {seen} were seen, {stored:?} are stored");
            }
        }
        let finished = sim.finish();
        assert_eq!(resume::check(&finished, &tale), 21, "seed {seed}");
        let reads = finished.sim.total(|counters| counters.mirror_reads);
        assert!(reads > 4, "seed {seed}: {reads} read the mirror");
    }
    assert!(waited > 30, "{waited} times something waited for the disk");
}

// ---- drawn from a seed

#[derive(Default)]
struct Tally {
    whole: usize,
    reads: u64,
    opened: u64,
    skipped: u64,
    told: u64,
}

/// Long enough for many to come, and at times faster than they read.
fn stream(sim: &mut Sim, rng: &mut Rng) -> Tale {
    let mut plan = Answer::events(rng.range(30, 250) as u32);
    plan.bytes = rng.pick(&[10, 300, 3_000]);
    plan.piece_bytes = rng.pick(&[1 << 20, 4_096, 500]);
    plan.gap_us = rng.pick(&[0, 2_000, 20_000]);
    if rng.chance(200) {
        let at = rng.below(1_000) as u32;
        plan.fault = rng.pick(&[Fault::Cut(at), Fault::Reset(at), Fault::Stall(at)]);
        plan.framed = Framed::Chunked;
    }
    let exchange = sim.exchange(Request::new(Dialect::Chat, true), plan);
    let leave = shards::leave(rng, 300);
    let client = sim.client(ClientPlan { leave, ..ClientPlan::new(&[exchange]) });
    Tale { exchange, client, id: None, readers: Vec::new(), stopped: false }
}

fn run(seed: u64) -> (Tally, Finished) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0x3199);
    let (enough, window_bytes) = (rng.range(1, 3) as usize, rng.pick(&[2_000, 20_000, 256 << 10]));
    let mut sim = shards::shards_of(seed, &mut rng, |with| {
        with.mirror_readers = enough;
        with.connections_max = 1_000;
        with.backlog = 128;
        with.resumes_per_s = 1_000;
        with.resume_bytes_max = 4 << 20;
        if seed.is_multiple_of(3) {
            stores(with);
        }
        for route in &mut with.routes {
            if let Some(resume) = &mut route.resume {
                resume.window_bytes = window_bytes;
            }
        }
    });
    if seed.is_multiple_of(3) {
        let mut disk = SimDisk::new(JournalOf::Relayed, seed);
        (disk.latency_us, disk.fails) = (rng.pick(&[0, 2_000, 300_000]), rng.pick(&[0, 0, 100]));
        sim = sim.with_disk(disk);
    }
    let mut tales: Vec<Tale> = (0..rng.range(1, 2)).map(|_| stream(&mut sim, &mut rng)).collect();
    for _ in 0..rng.range(5, 30) {
        sim.run_ms(rng.skewed(200) + 1);
        for tale in &mut tales {
            if !tale.learn(&sim) || tale.readers.len() > 60 {
                continue;
            }
            let id = tale.id.clone().unwrap();
            if rng.chance(10) {
                tale.stopped = true;
                sim.client(raw(&format!("DELETE /v1/streams/{id}"), ""));
            }
            let last =
                answer(&sim, tale.client).map_or(0, |seen| if seen.status == 200 { seen.last() } else { 0 });
            for _ in 0..rng.skewed(8) {
                let after = if rng.chance(500) { last } else { rng.below(last + 1) };
                let leave = rng.chance(400).then(|| {
                    let at = sim.now_us() + rng.skewed(2_000_000);
                    (When::AtUs(at), rng.pick(&[How::Close, How::Reset]))
                });
                let plan = ClientPlan {
                    pace: shards::pace(&mut rng),
                    leave,
                    write_bytes: rng.pick(&[1 << 20, 40]),
                    ..resume::resume(&id, after)
                };
                tale.readers.push((sim.client(plan), after));
            }
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
    let total = |of: fn(&shard::stats::Counters) -> u64| finished.sim.total(of);
    let tally = Tally {
        whole: tales.iter().map(|tale| resume::check(&finished, tale)).sum(),
        reads: total(|counters| counters.mirror_reads),
        opened: total(|counters| counters.mirrors_opened),
        skipped: total(|counters| counters.mirrors_skipped),
        told: total(|counters| counters.readers_dropped + counters.readers_skipped),
    };
    (tally, finished)
}

/// They had the last chunk, the stream was stopped, the disk was not known to have that, and the server was drained.
#[test]
fn who_has_all_of_a_stream_is_told_nothing_more() {
    run(30510);
}

/// The first hundred seeds; with `SIM_MIRRORS_RUNS`, so many from `SIM_MIRRORS_FROM` on.
#[test]
fn readers_of_mirrors_are_owed_what_readers_are_owed_whatever_happens() {
    let asked = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let (from, runs) = (asked("SIM_MIRRORS_FROM").unwrap_or(0), asked("SIM_MIRRORS_RUNS").unwrap_or(100));
    let mut all = Tally::default();
    for seed in from..from + runs {
        let (one, _) = run(seed);
        all.whole += one.whole;
        all.reads += one.reads;
        all.opened += one.opened;
        all.skipped += one.skipped;
        all.told += one.told;
    }
    let Tally { whole, reads, opened, skipped, told } = all;
    println!(
        "{whole} whole, {reads} read mirrors, {opened} opened, {skipped} left behind, {told} told of gaps"
    );
    if from == 0 && runs >= 100 {
        assert!(whole > 500 && reads > 300 && opened > 40 && skipped > 2 && told > 20);
    }
}

#[test]
fn planted_bugs_of_mirrors_are_found() {
    for &bug in Bug::OF_MIRRORS {
        let found = (0..300).find_map(|seed| failure_of(bug, || drop(run(seed))).map(|what| (seed, what)));
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what}");
    }
}
