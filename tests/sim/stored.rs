//! Relayed streams on a simulated disk: whole shards that crash, with their machine's power or without. What a client has been
//! given is there afterwards, under the same ids, and a stream that nobody ended says so.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, When};
use crate::disk::SimDisk;
use crate::plan::{Answer, Request};
use crate::random::faults;
use crate::resume::{RESUME, Tale, answer, chat, check, come_back, pace, raw, resume};
use crate::rng::{Rng, are_usual, seeds};
use crate::run::{Sim, settings};
use protocol::dialect::Dialect;
use shard::core::JournalOf;
use shard::settings::{OnLeave, Resume, Settings};
use std::collections::BTreeMap;

fn sim_on(disk: SimDisk, seed: u64, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    let resume = Some(Resume { durable: true, ..RESUME });
    settings.routes.iter_mut().for_each(|route| route.resume = resume);
    settings.resumes_per_s = 10_000;
    change(&mut settings);
    let mut sim = Sim::new(seed, settings, vec![BackendHost::new(0)]);
    sim.lenience.outlives = true;
    sim.with_disk(disk)
}

/// What a log has of an event beyond its name and data: its id, fields, the chunk around it.
const FRAMING_BYTES: usize = 60;

/// A stream over several lives of its server.
#[derive(Default)]
struct Life {
    id: String,
    /// What anybody was given of it.
    seen: BTreeMap<u64, String>,
    /// The bytes of each of its events, at most.
    sizes: Vec<usize>,
    /// Its end was told.
    over: bool,
    stopped: bool,
}

impl Life {
    /// Takes in what a client was given; what was given before is the same.
    fn take(&mut self, events: &[(u64, String)], who: &str) {
        for (id, data) in events {
            let known = self.seen.entry(*id).or_insert_with(|| data.clone());
            assert!(known == data, "{who}: event {id} was another");
        }
    }

    /// Nothing is owed of it but its end.
    fn is_whole(&self) -> bool {
        self.last() == self.sizes.len() as u64
    }

    /// What is behind an event may be more than is kept.
    fn outgrows_window(&self, after: u64) -> bool {
        self.sizes.iter().skip(after as usize).sum::<usize>() as u64 > RESUME.window_bytes
    }

    fn last(&self) -> u64 {
        self.seen.last_key_value().map_or(0, |(id, _)| *id)
    }
}

#[derive(Default)]
struct Tally {
    resumed: usize,
    interrupted: usize,
    whole: usize,
}

fn crash_run(seed: u64, tally: &mut Tally) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let interval_ms = rng.pick(&[0, 0, 40]);
    let ill = interval_ms == 0 && rng.chance(250);
    let mut disk = SimDisk::new(JournalOf::Relayed, seed);
    let mut lives: Vec<Life> = Vec::new();
    for round in 0..4 {
        disk.latency_us = rng.pick(&[0, 200, 5_000, 300_000]);
        disk.fails = if ill { rng.pick(&[0, 50, 400]) } else { 0 };
        let segment_bytes = rng.pick(&[4_000, 1 << 20]);
        let mut sim = sim_on(disk, seed * 10 + round, |settings| {
            settings.durable.fsync_interval_ms = interval_ms;
            settings.durable.segment_bytes = segment_bytes;
            settings.unix_time_at_start_s += round * 10;
            settings.stream_number_first = round * 1_000_000 + 1;
            let on_leave = rng.pick(&[OnLeave::Detach(30_000), OnLeave::Finish]);
            let resume = Some(Resume { durable: true, on_leave, ..RESUME });
            settings.routes.iter_mut().for_each(|route| route.resume = resume);
        });
        if rng.chance(500) {
            let mut machine = faults(&mut rng);
            machine.receive_bytes =
                if machine.receive_bytes > 0 { machine.receive_bytes.max(300) } else { 0 };
            sim.world().faults = machine;
            sim.lenience.impatient = true;
        }
        // Those of before are there, from any event on.
        let mut back = Vec::new();
        for (nth, life) in lives.iter().enumerate() {
            for _ in 0..rng.range(1, 3) {
                let after = if rng.chance(500) { life.last() } else { rng.below(life.last() + 1) };
                back.push((nth, after, sim.client(resume(&life.id, after))));
            }
        }
        let mut tales = Vec::new();
        for _ in 0..rng.range(1, 5) {
            let mut plan = Answer::events(rng.range(1, 120) as u32);
            plan.bytes = rng.pick(&[10, 300, 3_000]);
            plan.piece_bytes = rng.pick(&[1 << 20, 4_096, 150]);
            plan.gap_us = rng.pick(&[0, 5_000, 50_000]);
            let dialect = rng.pick(&[Dialect::Chat, Dialect::Messages, Dialect::Responses]);
            let exchange = sim.exchange(Request::new(dialect, true), plan);
            let mut client = ClientPlan { start_us: rng.skewed(500_000), ..ClientPlan::new(&[exchange]) };
            client.pace = pace(&mut rng);
            if rng.chance(400) {
                client.leave = Some((When::AtUs(rng.skewed(2_000_000)), rng.pick(&[How::Close, How::Reset])));
            }
            let client = sim.client(client);
            tales.push(Tale { exchange, client, id: None, readers: Vec::new(), stopped: false });
        }
        let mut stops = Vec::new();
        for _ in 0..rng.range(1, 8) {
            sim.run_ms(rng.skewed(1_000) + 1);
            for (nth, tale) in tales.iter_mut().enumerate() {
                if tale.learn(&sim) && rng.chance(400) {
                    let last = answer(&sim, tale.client).map_or(0, |seen| seen.last());
                    come_back(&mut sim, tale, rng.below(last + 1));
                }
                if tale.id.is_some() && rng.chance(20) {
                    let line = format!("DELETE /v1/streams/{}", tale.id.as_deref().unwrap_or_default());
                    stops.push((nth, sim.client(raw(&line, ""))));
                }
            }
        }
        for &(nth, after, client) in &back {
            let life = &mut lives[nth];
            let who = format!("round {round}, c{client} behind {after} of {}", life.last());
            let Some(seen) = answer(&sim, client) else { continue };
            if seen.status != 200 && !seen.complete {
                // It was still on its way.
                continue;
            }
            if seen.status != 200 {
                let code = seen.code();
                let nothing = life.seen.is_empty() && !life.over;
                assert!(
                    life.stopped && code == "stream_stopped"
                        || (life.over || life.is_whole()) && seen.status == 204 && after == life.last()
                        || (ill || interval_ms > 0 || nothing)
                            && ["events_lost", "stream_expired", "before_window"].contains(&code)
                        || code == "before_window" && life.outgrows_window(after)
                        || sim.lenience.impatient && code.ends_with("timeout")
                        || code == "stream_expired" && seen.status == 410,
                    "{who}: {} {}",
                    seen.status,
                    seen.body
                );
                continue;
            }
            let expected: Vec<u64> = (after + 1..).take(seen.events.len()).collect();
            let ids: Vec<u64> = seen.events.iter().map(|(id, _)| *id).collect();
            assert_eq!(ids, expected, "{who}");
            life.take(&seen.events, &who);
            tally.resumed += 1;
            if seen.complete {
                // All of it, and how it ended.
                if interval_ms == 0 && !ill {
                    assert!(
                        seen.last() >= life.last(),
                        "{who}: it had {} events, and has {}",
                        life.last(),
                        seen.last()
                    );
                }
                let told = seen.told();
                tally.interrupted += usize::from(told && seen.code() == "interrupted");
                tally.whole += usize::from(!told);
                assert!(told || !life.over || seen.last() == life.last(), "{who}");
                life.over |= !told;
            }
        }
        for tale in &mut tales {
            if !tale.learn(&sim) {
                continue;
            }
            let sizes = {
                let world = sim.world();
                let owed = &world.exchanges[tale.exchange].wire.events;
                owed.iter().map(|event| event.name.len() + event.data.len() + FRAMING_BYTES).collect()
            };
            let mut life = Life { id: tale.id.clone().unwrap_or_default(), sizes, ..Life::default() };
            for client in tale.readers.iter().map(|&(client, _)| client).chain([tale.client]) {
                if let Some(seen) = answer(&sim, client).filter(|seen| seen.status == 200) {
                    life.take(&seen.events, &format!("round {round}, c{client}"));
                    life.over |= seen.complete && !seen.told();
                }
            }
            lives.push(life);
        }
        let base = lives.len() - tales.iter().filter(|tale| tale.id.is_some()).count();
        let named: Vec<usize> = (0..tales.len()).filter(|&nth| tales[nth].id.is_some()).collect();
        for (nth, client) in stops {
            let place = named.iter().position(|&named| named == nth).map(|place| base + place);
            // Whether it is, if nobody was told, is open.
            if let Some(life) = place.and_then(|place| lives.get_mut(place))
                && answer(&sim, client).is_none_or(|seen| seen.status == 204)
            {
                life.stopped = true;
            }
        }
        disk = sim.disk.take().unwrap_or_else(|| SimDisk::new(JournalOf::Relayed, 0));
        drop(sim);
        disk.crash(interval_ms == 0 && rng.chance(500));
        let recovered = disk.recover();
        assert!(recovered.findings.iter().all(|finding| !finding.lost), "{:?}", recovered.findings);
    }
    let mut ids: Vec<&String> = lives.iter().map(|life| &life.id).collect();
    ids.sort_unstable();
    let all = ids.len();
    ids.dedup();
    assert_eq!(ids.len(), all, "an id was given twice");
}

#[test]
fn a_crash_takes_nothing_back_that_a_client_was_given() {
    let seeds = seeds("STORED_CRASH", 120);
    let mut tally = Tally::default();
    for seed in seeds.clone() {
        crash_run(seed, &mut tally);
    }
    let Tally { resumed, interrupted, whole } = tally;
    if are_usual(&seeds, 120) {
        assert!(resumed > 500 && interrupted > 100 && whole > 100, "{resumed} {interrupted} {whole}");
    }
}

#[test]
fn an_event_is_delivered_when_it_is_on_the_disk_and_not_before() {
    for (interval_ms, waits) in [(0, true), (1_000, false)] {
        let mut disk = SimDisk::new(JournalOf::Relayed, 1);
        disk.latency_us = 2_000_000;
        let mut sim = sim_on(disk, 31, |settings| settings.durable.fsync_interval_ms = interval_ms);
        let tale = chat(&mut sim, 20, 10_000, |plan| plan);
        let mut waited = false;
        for _ in 0..100 {
            sim.run_ms(20);
            let seen = answer(&sim, tale.client).map_or(0, |seen| seen.last());
            let world = sim.world();
            let written = world.exchanges[tale.exchange].events_written() as u64;
            drop(world);
            waited |= seen + 5 < written;
            let stored = sim.disk.as_ref().map(|disk| disk.recover()).into_iter();
            let stored = stored
                .flat_map(|recovered| recovered.relayed().map(|stream| stream.ids().1).collect::<Vec<_>>());
            assert!(!waits || seen <= stored.max().unwrap_or(0), "{seen} were seen");
        }
        assert_eq!(waited, waits);
        let finished = sim.finish();
        assert_eq!(check(&finished, &tale), 1);
    }
}

#[test]
fn tokens_do_not_wait_for_a_disk_that_is_silent_or_broken() {
    for fails in [0, 1_000] {
        let mut disk = SimDisk::new(JournalOf::Relayed, 5);
        (disk.latency_us, disk.fails) = (if fails == 0 { 500_000_000 } else { 100 }, fails);
        let mut sim = sim_on(disk, 32, |_| {});
        let tale = chat(&mut sim, 400, 10_000, |plan| plan);
        sim.run_ms(3_900);
        let seen = answer(&sim, tale.client).map_or(0, |seen| seen.last());
        assert!(seen > 200, "{seen} events in four seconds");
        assert_eq!(sim.shard.snapshot().kept.unstored, 1);
        assert!(sim.shard.snapshot().stream_journal.is_some_and(|journal| journal.failing.is_some()));
        sim.drain(10_000);
        let finished = sim.finish();
        check(&finished, &tale);
    }
}

#[test]
fn what_the_disk_did_not_take_is_written_when_it_does() {
    let mut disk = SimDisk::new(JournalOf::Relayed, 6);
    disk.fails = 1_000;
    let mut sim = sim_on(disk, 33, |_| {});
    let mut tale = chat(&mut sim, 900, 20_000, |plan| plan);
    sim.run_ms(2_000);
    assert_eq!(sim.shard.snapshot().kept.unstored, 1);
    if let Some(disk) = &mut sim.disk {
        disk.fails = 0;
    }
    sim.run_ms(4_000);
    assert_eq!(sim.shard.snapshot().kept.unstored, 0);
    assert!(tale.learn(&sim));
    let seen = answer(&sim, tale.client).map_or(0, |seen| seen.last());
    let Some(mut disk) = sim.disk.take() else { return };
    drop(sim);
    disk.crash(true);
    let mut sim = sim_on(disk, 34, |settings| settings.stream_number_first = 1_000);
    let client = sim.client(resume(tale.id.as_deref().unwrap_or_default(), 0));
    sim.run_ms(1_000);
    let back = answer(&sim, client).unwrap();
    assert!(back.last() >= seen && back.events.len() as u64 == back.last(), "{} of {seen}", back.last());
    assert_eq!(back.code(), "interrupted");
    sim.finish();
}
