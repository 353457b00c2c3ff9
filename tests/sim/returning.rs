//! Clients that leave streams and come back to them, drawn whole from a seed, in memory and on disk.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, When};
use crate::disk::SimDisk;
use crate::minimise::failure_of;
use crate::plan::{Answer, Fault, Framed, Request};
use crate::random::faults;
use crate::resume::{RESUME, Tale, answer, check, pace, raw, resume, sim_with};
use crate::rng::{Rng, are_usual, seeds};
use crate::run::settings;
use crate::tls;
use protocol::dialect::Dialect;
use protocol::planted::Bug;
use shard::core::JournalOf;
use shard::settings::{OnLeave, Resume, Settings, SlowReader};

#[derive(Default)]
struct Tally {
    whole: usize,
    resumed: usize,
    detached: u64,
    lagged: u64,
}

/// A run drawn from a seed.
fn random_run(seed: u64) -> Tally {
    random_run_on(seed, None)
}

/// The same with streams on a disk, that is asked for its syncs at this interval and takes so long.
fn random_run_on(seed: u64, disk: Option<(u32, u64)>) -> Tally {
    println!("seed {seed} {disk:?}");
    let mut rng = Rng::new(seed);
    let mut machine = faults(&mut rng);
    machine.receive_bytes = if machine.receive_bytes > 0 { machine.receive_bytes.max(300) } else { 0 };
    // A shard that is stopped waits no longer than `STOP_FLUSH_MS` for what it has cancelled.
    machine.cancel_late_us = machine.cancel_late_us.min(200_000);
    let resume_settings = Resume {
        window_bytes: rng.pick(&[256 << 10, 20_000, 1]),
        window_ms: rng.pick(&[0, 0, 2_000]),
        on_leave: rng.pick(&[
            OnLeave::Detach(30_000),
            OnLeave::Detach(500),
            OnLeave::Finish,
            OnLeave::Cancel,
        ]),
        keep_ms: rng.pick(&[60_000, 2_000, 0]),
        leave_choices: RESUME.leave_choices,
        slow_reader: rng.pick(&[
            SlowReader::Auto,
            SlowReader::Auto,
            SlowReader::Block,
            SlowReader::Drop,
            SlowReader::Skip,
        ]),
        durable: disk.is_some(),
        reader_lag_ms: rng.pick(&[0, 0, 1_500]),
    };
    let change = |settings: &mut Settings, rng: &mut Rng| {
        settings.durable.fsync_interval_ms = disk.map_or(0, |(interval_ms, _)| interval_ms);
        settings.routes.iter_mut().for_each(|route| route.resume = Some(resume_settings));
        settings.lag_high_bytes = rng.pick(&[4_096, 65_536]);
        settings.lag_low_bytes = settings.lag_high_bytes / 4;
        settings.resume_bytes_max = rng.pick(&[1 << 20, 64 << 10]);
        settings.detached_max = rng.pick(&[100, 1]);
        settings.resumes_per_s = rng.pick(&[1_000, 5]);
        let heartbeat_ms = rng.pick(&[15_000, 500, 0]);
        settings.routes.iter_mut().for_each(|route| route.heartbeat_ms = heartbeat_ms);
        settings.routes[1].deadlines.total_ms = 300_000;
    };
    let mut sim = if seed.is_multiple_of(4) {
        let mut with = settings();
        change(&mut with, &mut rng);
        let mut sim = tls::of_both(seed, with, vec![BackendHost::new(0)]);
        sim.lenience.outlives = true;
        sim
    } else {
        sim_with(seed, |settings| change(settings, &mut rng))
    };
    if let Some((_, latency_us)) = disk {
        let mut disk = SimDisk::new(JournalOf::Relayed, seed);
        disk.latency_us = latency_us;
        disk.fails = if seed.is_multiple_of(5) { 200 } else { 0 };
        sim = sim.with_disk(disk);
    }
    sim.lenience.impatient = true;
    sim.world().faults = machine;
    let mut tales = Vec::new();
    for _ in 0..rng.range(1, 4) {
        let dialect = rng.pick(&Dialect::ALL);
        let mut request = Request::new(dialect, true);
        request.demo = rng.chance(150) && dialect.is_model_endpoint();
        request.http10 = rng.chance(50);
        request.on_leave = rng.pick(&["", "", "cancel", "detach", "detach;ttl=1", "finish"]);
        let mut plan = Answer::events(rng.range(1, 120) as u32);
        plan.bytes = rng.pick(&[10, 10, 300, 5_000]);
        plan.piece_bytes = rng.pick(&[1 << 20, 4_096, 150]);
        plan.gap_us = rng.pick(&[0, 5_000, 50_000]);
        plan.framed = rng.pick(&[Framed::Chunked, Framed::Chunked, Framed::Close]);
        plan.comments = rng.chance(200);
        plan.crlf = rng.chance(200);
        if rng.chance(250) {
            let at = rng.below(1_000) as u32;
            plan.fault = rng.pick(&[Fault::Cut(at), Fault::Reset(at), Fault::Stall(at)]);
            if dialect.has_end_mark() {
                plan.fault = rng.pick(&[plan.fault, Fault::InBandError, Fault::NoEndMark]);
            } else {
                plan.framed = Framed::Chunked;
            }
        }
        let exchange = sim.exchange(request, plan);
        let mut client = ClientPlan { start_us: rng.skewed(500_000), ..ClientPlan::new(&[exchange]) };
        if rng.chance(600) {
            let how = rng.pick(&[How::Close, How::Reset]);
            client.leave = Some((
                if rng.chance(500) {
                    When::AtUs(rng.skewed(3_000_000))
                } else {
                    When::Bytes(rng.skewed(20_000) as usize)
                },
                how,
            ));
        }
        client.pace = pace(&mut rng);
        let client = sim.client(client);
        tales.push(Tale { exchange, client, id: None, readers: Vec::new(), stopped: false });
    }
    for _ in 0..rng.range(2, 25) {
        sim.run_ms(rng.skewed(2_000) + 1);
        for tale in &mut tales {
            if !tale.learn(&sim) || tale.readers.len() > 12 || rng.chance(300) {
                continue;
            }
            let id = tale.id.clone().unwrap();
            if rng.chance(25) {
                tale.stopped = true;
                sim.client(raw(&format!("DELETE /v1/streams/{id}"), ""));
            }
            if rng.chance(50) {
                sim.client(raw(&format!("GET /v1/streams/{id}/status"), ""));
            }
            // The last one who read it, or anybody.
            let all: Vec<usize> =
                tale.readers.iter().map(|&(client, _)| client).chain([tale.client]).collect();
            let who = if rng.chance(700) { all[all.len().saturating_sub(2)] } else { rng.pick(&all) };
            let last = answer(&sim, who).map_or(0, |seen| if seen.status == 200 { seen.last() } else { 0 });
            let after = if rng.chance(700) { last } else { rng.below(last + 1) };
            let mut plan = resume(&id, after);
            plan.pace = pace(&mut rng);
            if rng.chance(500) {
                let how = rng.pick(&[How::Close, How::Reset]);
                plan.leave = Some((When::AtUs(rng.skewed(3_000_000)), how));
            }
            tale.readers.push((sim.client(plan), after));
        }
    }
    if rng.chance(200) {
        sim.drain(rng.skewed(300_000));
    }
    let finished = sim.finish();
    let counters = &finished.sim.shard.stats().counters;
    Tally {
        whole: tales.iter().map(|tale| check(&finished, tale)).sum(),
        resumed: counters.resumes as usize,
        detached: counters.detaches,
        lagged: counters.readers_dropped + counters.readers_skipped,
    }
}

#[test]
fn readers_of_streams_on_disk_see_what_is_behind_their_cursors_too() {
    let seeds = seeds("STORED_RESUME", 200);
    let mut all = Tally::default();
    for seed in seeds.clone() {
        let (interval_ms, latency_us) = [(0, 300), (0, 40_000), (30, 5_000)][seed as usize % 3];
        let one = random_run_on(seed, Some((interval_ms, latency_us)));
        all.whole += one.whole;
        all.resumed += one.resumed;
    }
    if are_usual(&seeds, 200) {
        assert!(all.whole > 200 && all.resumed > 300, "{} {}", all.whole, all.resumed);
    }
}

#[test]
fn planted_bugs_are_found() {
    for &bug in Bug::OF_READERS {
        let found = (0..300).find_map(|seed| {
            failure_of(bug, || {
                random_run(seed);
            })
            .map(|what| (seed, what))
        });
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what}");
    }
}

#[test]
fn readers_see_what_is_behind_their_cursors_whatever_happens() {
    let seeds = seeds("RESUME", 300);
    let mut all = Tally::default();
    for seed in seeds.clone() {
        let one = random_run(seed);
        all.whole += one.whole;
        all.resumed += one.resumed;
        all.detached += one.detached;
        all.lagged += one.lagged;
    }
    if are_usual(&seeds, 300) {
        let Tally { whole, resumed, detached, lagged } = all;
        assert!(
            whole > 300 && resumed > 500 && detached > 50 && lagged > 10,
            "{whole} whole, {resumed} resumed, {detached} detached, {lagged} lagged"
        );
    }
}
