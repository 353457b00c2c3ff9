//! Readers of streams by their ids that are behind, stuck, too many or too dear, and a drain with readers: nobody waits for them
//! longer than is said, and each is told.

use crate::client::{ClientPlan, How, Pace};
use crate::plan::{Answer, Request};
use crate::resume::{RESUME, Tale, answer, chat, check, come_back, leaves, resume, sim_with};
use protocol::dialect::Dialect;
use protocol::limits::READERS_PER_TURN_MAX;
use protocol::phase::End;
use shard::settings::{Resume, SlowReader};

#[test]
fn a_reader_that_is_behind_for_too_long_is_told_so_however_little_it_is() {
    // Policy, whether it is dropped, whether it skips.
    for (slow_reader, drops, skips) in [
        (SlowReader::Auto, true, false),
        (SlowReader::Drop, true, false),
        (SlowReader::Skip, false, true),
        (SlowReader::Block, false, false),
    ] {
        let mut sim = sim_with(32, |settings| {
            let resume = Resume { slow_reader, reader_lag_ms: 2_000, window_bytes: 4 << 20, ..RESUME };
            settings.routes[1].resume = Some(resume);
            settings.lag_high_bytes = 4 << 20;
            settings.resume_bytes_max = 16 << 20;
        });
        // Some 40 KiB a second.
        let plan = Answer { bytes: 1_000, piece_bytes: 1_050, gap_us: 30_000, ..Answer::events(1_500) };
        let exchange = sim.exchange(Request::new(Dialect::Chat, true), plan);
        let client = sim.client(ClientPlan::new(&[exchange]));
        let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
        sim.run_ms(500);
        // It takes some bytes now and then: far less than comes, and far from what the window holds.
        let slow = come_back(&mut sim, &mut tale, 0);
        let fast = come_back(&mut sim, &mut tale, 0);
        sim.world().clients[slow].plan.pace = Pace::Slow { bytes: 8_000, every_us: 500_000 };
        sim.run_ms(1_500);
        let counters = &sim.shard.stats().counters;
        assert_eq!((counters.readers_dropped, counters.readers_skipped, counters.pauses), (0, 0, 0));
        sim.run_ms(18_000);
        let counters = sim.shard.stats().counters.clone();
        assert_eq!(counters.readers_dropped, u64::from(drops), "{slow_reader:?}");
        assert_eq!(counters.readers_skipped > 0, skips, "{slow_reader:?}");
        assert_eq!(counters.pauses > 0, slow_reader == SlowReader::Block, "{slow_reader:?}");
        if drops {
            // What it had taken before it is told, it still takes.
            sim.run_ms(120_000);
            assert_eq!(answer(&sim, slow).unwrap().code(), "lagged");
        }
        let seen = answer(&sim, fast).unwrap();
        assert!(seen.told.is_empty() && seen.gaps.is_empty(), "{slow_reader:?}: who keeps up is not meant");
        check(&sim.finish(), &tale);
    }
}

#[test]
fn one_that_begins_with_what_is_old_has_its_time_to_catch_up() {
    let mut sim = sim_with(33, |settings| {
        let resume = Resume { slow_reader: SlowReader::Drop, reader_lag_ms: 2_000, ..RESUME };
        settings.routes[1].resume = Some(resume);
    });
    let mut tale = chat(&mut sim, 1_500, 10_000, |plan| plan);
    for _ in 0..8 {
        sim.run_ms(1_000);
        come_back(&mut sim, &mut tale, 0);
    }
    let finished = sim.finish();
    assert_eq!(finished.sim.shard.stats().counters.readers_dropped, 0);
    assert_eq!(check(&finished, &tale), 9);
}

#[test]
fn a_stuck_reader_costs_the_others_nothing_and_is_told() {
    for slow_reader in [SlowReader::Auto, SlowReader::Drop, SlowReader::Skip, SlowReader::Block] {
        let mut sim = sim_with(7, |settings| {
            settings.routes[1].resume = Some(Resume { window_bytes: 100_000, slow_reader, ..RESUME });
        });
        let plan = Answer { bytes: 3_000, gap_us: 10_000, piece_bytes: 3_100, ..Answer::events(400) };
        let exchange = sim.exchange(Request::new(Dialect::Chat, true), plan);
        let client = sim.client(ClientPlan::new(&[exchange]));
        let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
        sim.run_ms(50);
        let stuck = Pace::Stuck { after_bytes: 5_000, for_us: 20_000_000 };
        assert!(tale.learn(&sim));
        for (nth, pace) in [Pace::Eager, stuck, Pace::Eager].into_iter().enumerate() {
            let plan = ClientPlan { pace, ..resume(tale.id.as_deref().unwrap(), nth as u64) };
            tale.readers.push((sim.client(plan), nth as u64));
        }
        sim.run_ms(10_000);
        let eager = answer(&sim, tale.readers[0].0).unwrap().last();
        let blocks = slow_reader == SlowReader::Block;
        assert_eq!(eager < 200, blocks, "{slow_reader:?}: {eager} events");
        let finished = sim.finish();
        let whole = check(&finished, &tale);
        assert_eq!(whole, if blocks { 4 } else { 3 }, "{slow_reader:?}");
        let counters = &finished.sim.shard.stats().counters;
        let (dropped, skipped) = (counters.readers_dropped, counters.readers_skipped);
        match slow_reader {
            SlowReader::Block => assert_eq!((dropped, skipped), (0, 0)),
            SlowReader::Skip => assert!(dropped == 0 && skipped > 0),
            SlowReader::Auto | SlowReader::Drop => assert_eq!((dropped, skipped), (1, 0)),
        }
        let told = answer(&finished.sim, tale.readers[1].0).unwrap();
        let expected = usize::from(!blocks);
        assert!(told.told.len() + told.gaps.len() >= expected, "{slow_reader:?}: {:?}", told.told);
    }
}

#[test]
fn thousands_who_come_back_at_once_begin_at_their_pace() {
    let mut sim = sim_with(8, |settings| {
        settings.resumes_per_s = 100;
        settings.routes[1].heartbeat_ms = 500;
        (settings.connections_max, settings.backlog) = (3_000, 1_024);
    });
    let mut tale = chat(&mut sim, 300, 20_000, |plan| plan);
    sim.run_ms(200);
    for _ in 0..500 {
        come_back(&mut sim, &mut tale, 0);
    }
    sim.run_ms(1_500);
    let begun = tale
        .readers
        .iter()
        .filter(|&&(client, _)| answer(&sim, client).is_some_and(|seen| seen.last() > 0))
        .count();
    assert!((100..300).contains(&begun), "{begun}");
    let told = tale.readers.iter().filter(|&&(client, _)| answer(&sim, client).is_some()).count();
    assert_eq!(told, 500, "all have an answer's head");
    let finished = sim.finish();
    assert_eq!(check(&finished, &tale), 501);
    assert!(finished.sim.shard.stats().counters.resumes_delayed > 300);
}

#[test]
fn more_readers_than_a_turn_has_room_for_all_get_every_event() {
    let mut sim = sim_with(11, |settings| {
        settings.resumes_per_s = 1_000_000;
        (settings.connections_max, settings.backlog) = (3_000, 2_048);
    });
    let mut tale = chat(&mut sim, 200, 20_000, |plan| plan);
    sim.run_ms(200);
    for _ in 0..2 * READERS_PER_TURN_MAX + 100 {
        come_back(&mut sim, &mut tale, 0);
    }
    sim.run_ms(2_000);
    for &(client, _) in &tale.readers {
        let seen = answer(&sim, client).map_or(0, |seen| seen.last());
        assert!(seen > 50, "a reader has {seen} events after two seconds");
    }
    let finished = sim.finish();
    assert_eq!(check(&finished, &tale), tale.readers.len() + 1);
}

#[test]
fn where_memory_runs_out_the_least_missed_goes_first() {
    let mut sim = sim_with(9, |settings| settings.resume_bytes_max = 300_000);
    let mut tales = Vec::new();
    for _ in 0..10 {
        let plan = Answer { bytes: 4_000, piece_bytes: 4_100, gap_us: 1_000, ..Answer::events(20) };
        let exchange = sim.exchange(Request::new(Dialect::Chat, true), plan);
        let client = sim.client(ClientPlan::new(&[exchange]));
        tales.push(Tale { exchange, client, id: None, readers: Vec::new(), stopped: false });
        sim.run_ms(500);
    }
    assert!(sim.shard.snapshot().kept.bytes <= 300_000);
    let evicted = sim.shard.stats().counters.kept_evictions;
    assert!((5..10).contains(&evicted), "{evicted}");
    let readers: Vec<usize> = tales.iter_mut().map(|tale| come_back(&mut sim, tale, 0)).collect();
    sim.run_ms(500);
    let found: Vec<bool> =
        readers.iter().map(|&reader| answer(&sim, reader).unwrap().status == 200).collect();
    assert!(found.is_sorted() && found[9] && !found[0], "the oldest are gone: {found:?}");
    let finished = sim.finish();
    for tale in &tales {
        check(&finished, tale);
    }
}

#[test]
fn what_is_kept_goes_as_others_end_and_not_many_at_once() {
    let mut sim = sim_with(9, |settings| settings.resume_bytes_max = 300_000);
    let mut evicted = 0;
    for _ in 0..400 {
        let exchange = sim.exchange(Request::new(Dialect::Chat, true), Answer::events(3));
        sim.client(ClientPlan::new(&[exchange]));
        sim.run_ms(50);
        let before = std::mem::replace(&mut evicted, sim.shard.stats().counters.kept_evictions);
        assert!(evicted - before <= 2, "{} at once", evicted - before);
    }
    assert!(evicted > 100, "{evicted}");
    assert!(sim.shard.snapshot().kept.bytes > 290_000, "as much is kept as may be");
    sim.finish();
}

#[test]
fn a_drain_waits_for_readers_and_for_nobody_else() {
    let mut sim = sim_with(10, |_| {});
    let mut tale = chat(&mut sim, 100, 20_000, leaves(300_000, How::Close));
    let forsaken = chat(&mut sim, 5_000, 20_000, leaves(300_000, How::Close));
    sim.run_ms(500);
    come_back(&mut sim, &mut tale, 0);
    sim.run_ms(100);
    sim.drain(60_000);
    let finished = sim.finish();
    assert_eq!((check(&finished, &tale), finished.sim.forced), (1, Some(0)));
    assert_eq!(finished.ends(End::Drain), 1, "the one without a client");
    check(&finished, &forsaken);
}
