//! Forks of durable streams, whose paths and sources belong to any of several shards. Each actor has paths of its own and asks for
//! one thing after the other, from whichever shard its connections come to: what it is told is exactly what a single store would
//! tell. Afterwards the shards of the paths know of every fork that is elsewhere, and of no other.

use crate::client::{ClientPlan, How, When};
use crate::disk::SimDisk;
use crate::durable::{JSON, LAST, Requests, message, numbers};
use crate::minimise::failure_of;
use crate::random;
use crate::rng::Rng;
use crate::run::{Finished, Sim, settings};
use protocol::durable::home_of;
use protocol::planted::Bug;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug)]
enum Deed {
    Create(String),
    Fork { path: String, source: String },
    Append(String, usize),
    Read(String),
    Delete(String),
}

impl Deed {
    fn ask(&self, requests: Requests, last: bool) -> Requests {
        let last = if last { LAST } else { "" };
        match self {
            Deed::Create(path) => requests.ask(&format!("PUT {path}"), &format!("{JSON}{last}"), ""),
            Deed::Fork { path, source } => {
                requests.ask(&format!("PUT {path}"), &format!("Stream-Forked-From: {source}\n{last}"), "")
            }
            Deed::Append(path, number) => {
                requests.ask(&format!("POST {path}"), &format!("{JSON}{last}"), &message(*number, 40))
            }
            Deed::Read(path) => requests.ask(&format!("GET {path}?offset=-1"), last, ""),
            Deed::Delete(path) => requests.ask(&format!("DELETE {path}"), last, ""),
        }
    }
}

#[derive(Clone, Debug)]
struct Known {
    numbers: Vec<u64>,
    source: Option<String>,
    deleted: bool,
}

/// What there is, by path.
#[derive(Clone, Default, Debug)]
struct Model(BTreeMap<String, Known>);

impl Model {
    fn forks(&self, path: &str) -> usize {
        self.0.values().filter(|known| known.source.as_deref() == Some(path)).count()
    }

    /// Carries it out; gives the status, and what a reader is given.
    fn act(&mut self, deed: &Deed) -> (u16, Vec<u64>) {
        let (Deed::Create(path) | Deed::Append(path, _) | Deed::Read(path) | Deed::Delete(path)) = deed
        else {
            let Deed::Fork { path, source } = deed else { unreachable!() };
            return (self.fork(path, source), Vec::new());
        };
        let known = self.0.get_mut(path);
        match (deed, known) {
            (Deed::Create(_), None) => {
                let fresh = Known { numbers: Vec::new(), source: None, deleted: false };
                self.0.insert(path.clone(), fresh);
                (201, Vec::new())
            }
            (Deed::Create(_), Some(known)) => {
                (if known.deleted || known.source.is_some() { 409 } else { 200 }, Vec::new())
            }
            (_, None) => (404, Vec::new()),
            (_, Some(known)) if known.deleted => (410, Vec::new()),
            (Deed::Append(_, number), Some(known)) => {
                known.numbers.push(*number as u64);
                (204, Vec::new())
            }
            (Deed::Read(_), Some(known)) => (200, known.numbers.clone()),
            (_, Some(_)) => {
                self.delete(path);
                (204, Vec::new())
            }
        }
    }

    fn fork(&mut self, path: &str, source: &str) -> u16 {
        if let Some(known) = self.0.get(path) {
            return if known.deleted || known.source.as_deref() != Some(source) { 409 } else { 200 };
        }
        match self.0.get(source) {
            None => 404,
            Some(known) if known.deleted => 409,
            Some(known) => {
                let fork =
                    Known { numbers: known.numbers.clone(), source: Some(source.to_owned()), deleted: false };
                self.0.insert(path.to_owned(), fork);
                201
            }
        }
    }

    fn delete(&mut self, path: &str) {
        if self.forks(path) > 0 {
            self.0.get_mut(path).unwrap().deleted = true;
            return;
        }
        let source = self.0.remove(path).and_then(|known| known.source);
        if let Some(source) = source
            && self.forks(&source) == 0
            && self.0.get(&source).is_some_and(|known| known.deleted)
        {
            self.delete(&source);
        }
    }
}

/// Asks for one thing after the other.
struct Actor {
    paths: Vec<String>,
    model: Model,
    /// What it has asked on the connection that it has now.
    asked: Option<(usize, Vec<Deed>)>,
    next: usize,
    /// Nothing is known of what it was not told.
    lost: bool,
    answered: usize,
    forked: usize,
}

impl Actor {
    fn new(nth: u64, paths: u64) -> Self {
        Actor {
            paths: (0..paths).map(|path| format!("/v1/durable/{nth}/{path}")).collect(),
            model: Model::default(),
            asked: None,
            next: 0,
            lost: false,
            answered: 0,
            forked: 0,
        }
    }

    fn draw(&mut self, rng: &mut Rng) -> Deed {
        let any = |rng: &mut Rng| self.paths[rng.below(self.paths.len() as u64) as usize].clone();
        let path = any(rng);
        match rng.below(12) {
            0..=2 => Deed::Create(path),
            3..=6 => {
                // Mostly of one that there is.
                let there: Vec<&String> = self.model.0.keys().collect();
                let source = match there.is_empty() || rng.chance(200) {
                    true => any(rng),
                    false => there[rng.below(there.len() as u64) as usize].clone(),
                };
                Deed::Fork { path, source }
            }
            7 | 8 => {
                self.next += 1;
                Deed::Append(path, self.next)
            }
            9 | 10 => Deed::Read(path),
            _ => Deed::Delete(path),
        }
    }

    fn ask(&mut self, sim: &mut Sim, rng: &mut Rng, start_us: u64) {
        let count = rng.range(1, 6) as usize;
        let deeds: Vec<Deed> = (0..count).map(|_| self.draw(rng)).collect();
        let mut requests = Requests::new();
        for (nth, deed) in deeds.iter().enumerate() {
            requests = deed.ask(requests, nth + 1 == count);
        }
        let plan = ClientPlan { write_bytes: rng.pick(&[1 << 20, 90]), ..requests.plan(start_us) };
        self.asked = Some((sim.client(plan), deeds));
    }

    /// If its connection is over: what it was told there. `strict`: nothing may be missing.
    fn hear(&mut self, sim: &Sim, strict: bool) -> bool {
        let Some((client, _)) = &self.asked else { return true };
        let world = sim.world();
        if world.clients[*client].ended.is_none() {
            return false;
        }
        let (client, deeds) = self.asked.take().unwrap();
        let answers = &world.clients[client].reader.messages;
        for (nth, deed) in deeds.iter().enumerate() {
            let answer = answers.get(nth).filter(|answer| answer.complete);
            let Some(answer) = answer.filter(|answer| strict || !matches!(answer.status(), 408 | 503)) else {
                assert!(!strict, "c{client}: {deed:?} was not answered");
                self.lost = true;
                return true;
            };
            let before = self.model.clone();
            let (status, given) = self.model.act(deed);
            let text = String::from_utf8_lossy(&answer.body);
            assert!(
                answer.status() == status,
                "c{client}: {deed:?} was answered {} and not {status}: {text}; there was {before:?}",
                answer.status()
            );
            if status == 200 && matches!(deed, Deed::Read(_)) {
                assert_eq!(numbers(answer).0, given, "c{client}: {deed:?}");
            }
            self.answered += 1;
            self.forked += usize::from(status == 201 && matches!(deed, Deed::Fork { .. }));
        }
        true
    }
}

/// Every fork that is not on the shard of its path is known there, and nothing else is.
fn check_directory(sim: &Sim, shards: usize) -> usize {
    let mut there = BTreeSet::new();
    for (ring, shard) in sim.shards().enumerate() {
        for path in shard.forks_here() {
            assert!(there.insert((path.clone(), ring)), "{path} is there twice");
        }
    }
    let mut known = BTreeSet::new();
    for (ring, shard) in sim.shards().enumerate() {
        for (path, at) in shard.forks_known() {
            assert_eq!(home_of(&path, shards), ring, "{path} is none of shard {ring}'s");
            let Some(at) = at else { panic!("{path} is reserved on shard {ring}, and nobody makes it") };
            known.insert((path, at));
        }
    }
    assert_eq!(known, there, "what is known of forks (left) is not what there is");
    there.len()
}

/// An actor whose server crashes: of what it was not told, some was done, up to somewhere.
struct Survivor {
    actor: Actor,
    /// Those that are possible.
    models: Vec<Model>,
}

impl Survivor {
    /// Takes in what it was told; `over`: nothing more will be.
    fn hear(&mut self, sim: &Sim, over: bool) -> bool {
        let Some((client, _)) = &self.actor.asked else { return true };
        let world = sim.world();
        if !over && world.clients[*client].ended.is_none() {
            return false;
        }
        let (client, deeds) = self.actor.asked.take().unwrap();
        let answers = &world.clients[client].reader.messages;
        let mut told = 0;
        for (deed, answer) in deeds.iter().zip(answers).take_while(|(_, answer)| answer.complete) {
            if answer.status() == 503 {
                break;
            }
            told += 1;
            let fits = |mut model: Model| {
                let (status, given) = model.act(deed);
                let reads = status == 200 && matches!(deed, Deed::Read(_));
                let same = answer.status() == status && (!reads || numbers(answer).0 == given);
                same.then_some(model)
            };
            let before = std::mem::take(&mut self.models);
            self.models = before.iter().cloned().filter_map(fits).collect();
            let text = String::from_utf8_lossy(&answer.body);
            assert!(
                !self.models.is_empty(),
                "c{client}: {deed:?} was answered {} {text}; there was one of {before:?}",
                answer.status()
            );
        }
        self.actor.answered += told;
        let mut possible = self.models.clone();
        for deed in &deeds[told..] {
            possible.iter_mut().for_each(|model| _ = model.act(deed));
            self.models.extend(possible.iter().cloned());
        }
        self.models.sort_by_key(|model| format!("{model:?}"));
        self.models.dedup_by_key(|model| format!("{model:?}"));
        true
    }
}

/// Paths that some give up while others already want them again: nobody is answered before the disk has it, but nobody waits for the
/// others' answers either. What is wrong shows when the journals are read.
fn race(sim: &mut Sim, rng: &mut Rng) {
    let base = |nth: u64| format!("/v1/durable/base/{nth}");
    for nth in 0..3 {
        sim.client(Deed::Create(base(nth)).ask(Requests::new(), true).plan(0));
    }
    for _ in 0..rng.range(0, 40) {
        let path = format!("/v1/durable/racy/{}", rng.below(2));
        let deed = match rng.below(4) {
            0 => Deed::Create(path),
            1 => Deed::Fork { path, source: base(rng.below(3)) },
            _ => Deed::Delete(path),
        };
        sim.client(deed.ask(Requests::new(), true).plan(rng.below(1_500_000)));
    }
}

/// Servers with other numbers of shards, one after the other, each ended by a crash.
fn crash_run(seed: u64) -> usize {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0xC4A5);
    let mut disks: Vec<SimDisk> = Vec::new();
    let mut survivors: Vec<Survivor> = (0..rng.range(1, 4))
        .map(|nth| Survivor { actor: Actor::new(nth, rng.range(2, 5)), models: vec![Model::default()] })
        .collect();
    let interval_ms = rng.pick(&[0, 0, 40]);
    for round in 0..5 {
        let mut with = settings();
        with.backlog = 128;
        with.durable.fsync_interval_ms = interval_ms;
        with.durable.segment_bytes = rng.pick(&[2_000, 1 << 20]);
        with.unix_time_at_start_s += round * 1_000;
        let shards = rng.range(2, 4) as usize;
        let sim = Sim::new(seed * 10 + round, with, Vec::new()).of_shards(shards, rng.pick(&[1, 2, 64]));
        let mut sim = sim.with_disks(std::mem::take(&mut disks));
        for disk in &mut sim.disks {
            disk.latency_us = rng.pick(&[0, 200, 5_000, 300_000]);
        }
        race(&mut sim, &mut rng);
        for _ in 0..rng.range(3, 25) {
            for survivor in &mut survivors {
                if survivor.hear(&sim, false) {
                    // What is possible at most is what paths are chosen from.
                    survivor.actor.model = survivor.models[0].clone();
                    survivor.actor.ask(&mut sim, &mut rng, 0);
                }
            }
            sim.run_ms(rng.skewed(600) + 1);
        }
        for survivor in &mut survivors {
            survivor.hear(&sim, true);
        }
        disks = std::mem::take(&mut sim.disks);
        let power = interval_ms == 0 && rng.chance(500);
        disks.iter_mut().for_each(|disk| disk.crash(power));
    }
    survivors.iter().map(|survivor| survivor.actor.answered).sum()
}

#[test]
fn a_crash_takes_no_fork_back_and_gives_no_path_twice() {
    let answered: usize = (0..100).map(crash_run).sum();
    assert!(answered > 5_000, "{answered} were answered");
}

#[test]
fn a_path_that_is_given_up_too_early_is_found() {
    let found = (0..300)
        .find_map(|seed| failure_of(Bug::GoneTooEarly, || _ = crash_run(seed)).map(|what| (seed, what)));
    let Some((seed, what)) = found else { panic!("it went unnoticed") };
    println!("seed {seed}, {what:.200}");
}

#[derive(Default)]
struct Tally {
    answered: usize,
    forked: usize,
    /// Forks that were away from their paths' shards at the end.
    away: usize,
    errands: u64,
}

fn run(seed: u64) -> (Tally, Finished) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0xF02C);
    let shards = rng.range(2, 4) as usize;
    let mut with = settings();
    with.backlog = 128;
    let mut sim = Sim::new(seed, with, Vec::new()).of_shards(shards, rng.pick(&[1, 1, 2, 64]));
    let calm = !seed.is_multiple_of(3);
    if !calm {
        let mut machine = random::faults(&mut rng);
        machine.receive_bytes = if machine.receive_bytes > 0 { machine.receive_bytes.max(500) } else { 0 };
        sim.world().faults = machine;
    }
    sim.world().faults.stall_us = rng.pick(&[0, 1_000, 100_000]);
    let mut actors: Vec<Actor> = (0..rng.range(1, 5)).map(|nth| Actor::new(nth, rng.range(2, 7))).collect();
    // They ask for the same fork at once, and some leave: all are told the same, or nothing.
    let base = Requests::new().ask("PUT /v1/durable/base", &format!("{JSON}{LAST}"), &message(0, 10));
    sim.client(base.plan(0));
    let crowd: Vec<usize> = (0..rng.range(0, 8))
        .map(|_| {
            let path = "/v1/durable/crowded".to_owned();
            let deed = Deed::Fork { path, source: "/v1/durable/base".to_owned() };
            let mut plan = deed.ask(Requests::new(), true).plan(2_000_000 + rng.skewed(2_000));
            if rng.chance(300) {
                let how = rng.pick(&[How::Close, How::Reset]);
                plan.leave = Some((When::AtUs(2_000_000 + rng.skewed(5_000)), how));
            }
            sim.client(plan)
        })
        .collect();
    let drains = seed.is_multiple_of(7);
    let rounds = rng.range(20, 60);
    for round in 0..rounds {
        if drains && round == rounds / 2 {
            sim.drain(400_000);
        }
        sim.run_ms(100 + rng.skewed(500));
        let strict = calm && !drains;
        for actor in &mut actors {
            if actor.hear(&sim, strict) && !actor.lost {
                let start_us = rng.skewed(20_000);
                actor.ask(&mut sim, &mut rng, start_us);
            }
        }
    }
    sim.run_ms(120_000);
    for actor in &mut actors {
        assert!(actor.hear(&sim, calm && !drains) || !calm || drains, "its connection does not end");
    }
    let away = if drains { 0 } else { check_directory(&sim, shards) };
    {
        let world = sim.world();
        let answers = crowd.iter().filter_map(|client| world.clients[*client].reader.messages.first());
        let statuses: Vec<u16> =
            answers.filter(|answer| answer.complete).map(|answer| answer.status()).collect();
        let made = statuses.iter().filter(|status| **status == 201).count();
        assert!(made <= 1, "one is made: {statuses:?}");
        let told = |status: &u16| {
            matches!(status, 200 | 201) || (!calm || drains) && matches!(status, 404 | 408 | 503)
        };
        assert!(statuses.iter().all(told), "{statuses:?}");
    }
    let finished = sim.finish();
    let tally = Tally {
        answered: actors.iter().map(|actor| actor.answered).sum(),
        forked: actors.iter().map(|actor| actor.forked).sum(),
        away,
        errands: finished.sim.total(|counters| counters.durable_errands),
    };
    (tally, finished)
}

/// The first 150 seeds; with `SIM_FORKS_RUNS`, so many from `SIM_FORKS_FROM` on.
#[test]
fn forks_are_found_wherever_they_are_and_their_paths_free_when_they_are_gone() {
    let asked = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let (from, runs) = (asked("SIM_FORKS_FROM").unwrap_or(0), asked("SIM_FORKS_RUNS").unwrap_or(150));
    let mut all = Tally::default();
    for seed in from..from + runs {
        let (one, _) = run(seed);
        all.answered += one.answered;
        all.forked += one.forked;
        all.away += one.away;
        all.errands += one.errands;
    }
    if from == 0 && runs >= 150 {
        let Tally { answered, forked, away, errands } = all;
        assert!(
            answered > 10_000 && forked > 800 && away > 150 && errands > 1_500,
            "{answered} answered, {forked} forks made, {away} away at the end, {errands} errands"
        );
    }
}

#[test]
fn planted_bugs_of_forks_are_found() {
    for &bug in Bug::OF_FORKS {
        let found = (0..150).find_map(|seed| failure_of(bug, || drop(run(seed))).map(|what| (seed, what)));
        let Some((seed, what)) = found else { panic!("{bug:?} went unnoticed") };
        println!("{bug:?}: seed {seed}, {what:.200}");
    }
}

#[test]
fn a_seed_of_forks_replays_bit_for_bit() {
    for seed in [1, 3, 7] {
        let traces = [0, 1].map(|_| run(seed).1.sim.world().trace);
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}
