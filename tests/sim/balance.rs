//! Shards whose clients leave in numbers while those of others stay: who is between two requests goes where there are fewer, and so
//! do live readers of durable streams. Nobody notices.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How};
use crate::durable::{self, JSON, LAST, Requests};
use crate::plan::{Answer, Framed, Request};
use crate::random;
use crate::rng::{Rng, are_usual, seeds};
use crate::run::{Finished, Outcome, Sim};
use crate::shards::shards_with;
use crate::{run, tls};
use protocol::dialect::Dialect;
use protocol::durable::home_of;
use shard::settings::Settings;

const ROOM: usize = 64;
const PATH: &str = "/v1/durable/a";

fn of_shards(seed: u64, shards: usize, secure: bool, change: impl FnOnce(&mut Settings)) -> Sim {
    if !secure {
        return shards_with(seed, shards, ROOM, change);
    }
    let mut settings = run::settings();
    change(&mut settings);
    tls::of_both(seed, settings, vec![BackendHost::new(0)]).of_shards(shards, ROOM)
}

/// Asks so many times on one connection, with so long between two requests, and then no more.
fn asks(sim: &mut Sim, times: u64, pause_us: u64, start_us: u64) -> usize {
    let request = || Request::new(Dialect::Chat, false);
    let exchanges: Vec<usize> =
        (0..times).map(|_| sim.exchange(request(), Answer::body(100, Framed::Length))).collect();
    sim.client(ClientPlan { start_us, pause_us, ..ClientPlan::new(&exchanges) })
}

/// Whether all that a client has asked was answered, so many times.
fn is_whole(finished: &Finished, client: usize, times: usize) -> bool {
    finished.outcomes[client] == vec![Outcome::Complete; times]
}

fn clients_of(sim: &Sim) -> Vec<usize> {
    sim.shards().map(|shard| shard.population().0).collect()
}

/// Of these clients, those of one shard.
fn on_shard(sim: &Sim, clients: &[usize], shard: usize) -> Vec<usize> {
    clients.iter().copied().filter(|&client| sim.world().shard_of(client) == Some(shard)).collect()
}

/// All of one shard but so many leave; gives those that stay anywhere.
fn leave(sim: &mut Sim, clients: &[usize], shard: usize, but: usize) -> Vec<usize> {
    let leavers = on_shard(sim, clients, shard).split_off(but);
    leavers.iter().for_each(|&client| sim.world().leave_now(client, How::Close));
    clients.iter().copied().filter(|client| !leavers.contains(client)).collect()
}

fn are_even(loads: &[usize]) -> bool {
    let all: usize = loads.iter().sum();
    loads.iter().all(|load| (load * loads.len()).abs_diff(all) * 10 <= all)
}

#[test]
fn who_is_between_two_requests_goes_where_there_are_fewer() {
    for (shards, secure) in [(2, false), (3, false), (2, true)] {
        let mut sim = of_shards(1, shards, secure, |settings| settings.backlog = 300);
        let clients: Vec<usize> = (0..300).map(|nth| asks(&mut sim, 3, 10_000_000, nth * 1_000)).collect();
        sim.run_ms(5_000);
        assert!(are_even(&clients_of(&sim)), "{:?}", clients_of(&sim));
        assert_eq!(sim.total(|counters| counters.moves_for_load), 0, "they are shared when they come");
        let stay = leave(&mut sim, &clients, 0, 10);
        sim.run_ms(1_000);
        let (loads, moved) = (clients_of(&sim), sim.total(|counters| counters.moves_for_load));
        assert_eq!(loads.iter().sum::<usize>(), stay.len(), "{loads:?}");
        assert!(are_even(&loads), "{loads:?}, {moved} were moved");
        assert!(moved as usize <= stay.len() / 2, "{moved} were moved, some to and fro");
        let finished = sim.finish();
        assert!(stay.iter().all(|&client| is_whole(&finished, client, 3)));
    }
}

/// Their shard cannot let go of them while they are answered; it can when they have been.
#[test]
fn who_is_being_answered_goes_when_that_is_done() {
    let mut sim = shards_with(2, 2, ROOM, |settings| settings.backlog = 300);
    let clients: Vec<usize> = (0..100)
        .map(|_| {
            let answer = Answer { piece_bytes: 90, gap_us: 100_000, ..Answer::events(150) };
            let exchange = sim.exchange(Request::new(Dialect::Chat, true), answer);
            sim.client(ClientPlan { idle_us: 20_000_000, ..ClientPlan::new(&[exchange]) })
        })
        .collect();
    sim.run_ms(2_000);
    let stay = leave(&mut sim, &clients, 1, 5);
    sim.run_ms(1_000);
    assert!(!are_even(&clients_of(&sim)), "{:?} are in the middle of their answers", clients_of(&sim));
    sim.run_ms(8_000);
    assert!(are_even(&clients_of(&sim)), "{:?}", clients_of(&sim));
    let finished = sim.finish();
    assert!(stay.iter().all(|&client| is_whole(&finished, client, 1)));
}

#[test]
fn a_few_that_come_and_go_move_nobody() {
    let mut sim = shards_with(3, 2, ROOM, |settings| settings.backlog = 300);
    let clients: Vec<usize> = (0..200).map(|nth| asks(&mut sim, 3, 20_000_000, nth * 1_000)).collect();
    sim.run_ms(2_000);
    for round in 0..100 {
        asks(&mut sim, 1 + round % 2, 100_000, 0);
        sim.run_ms(50);
    }
    let there = on_shard(&sim, &clients, 0).len();
    let stay = leave(&mut sim, &clients, 0, there - 4);
    sim.run_ms(2_000);
    assert_eq!(sim.total(|counters| counters.moves_for_load), 0);
    let finished = sim.finish();
    assert!(stay.iter().all(|&client| is_whole(&finished, client, 3)));
}

/// All of them ask for what one shard has: if they were moved away, they would only come again.
#[test]
fn who_came_for_what_a_shard_has_stays_there() {
    let mut sim = shards_with(6, 2, ROOM, |settings| settings.backlog = 300);
    let publisher = sim.client(durable::publish(PATH, 5, 10).plan(0));
    sim.run_ms(1_000);
    let clients: Vec<usize> = (0..80)
        .map(|nth| {
            let asks = (0..10).fold(Requests::new(), |asks, nth| {
                let last = if nth == 9 { LAST } else { "" };
                asks.ask(&format!("GET {PATH}?offset=-1"), last, "")
            });
            sim.client(ClientPlan { write_bytes: 200, write_gap_us: 2_000_000, ..asks.plan(nth * 1_000) })
        })
        .collect();
    let finished = sim.finish();
    let (moves, moved) = (
        finished.sim.total(|counters| counters.moves),
        finished.sim.total(|counters| counters.moves_for_load),
    );
    assert!((30..=80).contains(&moves) && moved <= 50, "{moves} moved for what they ask, {moved} for load");
    let world = finished.sim.world();
    assert!(clients.iter().all(|&client| world.clients[client].reader.complete() == 10));
    assert_eq!(world.clients[publisher].reader.complete(), 6);
}

/// Idle clients are closed when they would have been, however often they were moved.
#[test]
fn going_where_there_are_fewer_makes_nobody_stay_longer() {
    let mut sim = shards_with(4, 2, ROOM, |settings| {
        settings.backlog = 300;
        settings.routes.iter_mut().for_each(|route| route.deadlines.keep_alive_ms = 8_000);
    });
    let clients: Vec<usize> = (0..100)
        .map(|_| {
            let exchange =
                sim.exchange(Request::new(Dialect::Chat, false), Answer::body(100, Framed::Length));
            sim.client(ClientPlan { idle_us: 60_000_000, ..ClientPlan::new(&[exchange]) })
        })
        .collect();
    sim.run_ms(6_000);
    leave(&mut sim, &clients, 0, 5);
    sim.run_ms(1_500);
    let moved = sim.total(|counters| counters.moves_for_load);
    assert!(moved > 15, "{:?}, {moved} were moved", clients_of(&sim));
    sim.run_ms(3_000);
    assert_eq!(clients_of(&sim), [0, 0]);
    sim.finish();
}

fn append(number: usize, at_us: u64) -> ClientPlan {
    let fields = format!("{JSON}{}{LAST}", if number == 79 { "Stream-Closed: true\n" } else { "" });
    Requests::new().ask(&format!("POST {PATH}"), &fields, &durable::message(number, 300)).plan(at_us)
}

#[test]
fn live_readers_go_home_when_there_are_many_fewer() {
    for secure in [false, true] {
        let mut sim = of_shards(5, 2, secure, |settings| {
            (settings.mirror_readers, settings.backlog) = (2, 300);
            settings.durable.events_ms = 0;
        });
        let home = home_of(PATH, 2);
        sim.client(Requests::new().ask(&format!("PUT {PATH}"), &format!("{JSON}{LAST}"), "").plan(0));
        (0..80).for_each(|number| _ = sim.client(append(number, 1_000_000 + 100_000 * number as u64)));
        let readers: Vec<usize> = (0..240)
            .map(|nth| sim.client(durable::read(PATH, "offset=-1&live=sse").plan(100_000 + nth * 500)))
            .collect();
        sim.run_ms(4_000);
        assert!(are_even(&clients_of(&sim)), "{:?}", clients_of(&sim));
        let back = |sim: &Sim| sim.total(|counters| counters.durable_handed_back);
        assert_eq!(back(&sim), 0, "there is no reason to");
        let stay = leave(&mut sim, &readers, home, 5);
        sim.run_ms(1_500);
        assert!(are_even(&clients_of(&sim)), "{:?}, {} went home", clients_of(&sim), back(&sim));
        let (went, moved) = (back(&sim), sim.total(|counters| counters.durable_handed_over));
        sim.run_ms(2_000);
        assert_eq!(
            (back(&sim), sim.total(|counters| counters.durable_handed_over)),
            (went, moved),
            "to and fro"
        );
        let finished = sim.finish();
        assert_eq!(durable::check(&finished, &stay, 80), stay.len());
        assert_eq!(finished.sim.total(|counters| counters.durable_parted), 0, "nobody was left behind");
    }
}

// ---- drawn from a seed

fn drawn(seed: u64) -> (u64, usize, Finished) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed ^ 0xBA1A);
    let shards = rng.range(2, 3) as usize;
    let mut sim = of_shards(seed, shards, seed.is_multiple_of(3), |settings| settings.backlog = 300);
    (sim.lenience.outlives, sim.lenience.impatient) = (true, true);
    let mut faults = random::faults(&mut rng);
    faults.receive_bytes = if faults.receive_bytes > 0 { faults.receive_bytes.max(500) } else { 0 };
    (faults.stall_us, faults.jump_us) = (rng.pick(&[0, 1_000, 100_000]), 0);
    sim.world().faults = faults;
    let pause_us = rng.pick(&[300_000, 2_000_000]);
    let clients: Vec<usize> = (0..rng.range(30, 120))
        .map(|_| asks(&mut sim, rng.range(1, 8), pause_us, rng.skewed(500_000)))
        .collect();
    for _ in 0..rng.range(1, 4) {
        sim.run_ms(rng.range(200, 2_000));
        let shard = rng.below(shards as u64) as usize;
        let there = on_shard(&sim, &clients, shard).len();
        leave(&mut sim, &clients, shard, rng.below(there as u64 + 1) as usize);
    }
    if rng.chance(300) {
        let leaver = rng.below(shards as u64) as usize;
        sim.drain_one(leaver, rng.skewed(100_000));
        sim.run_ms(rng.skewed(2_000));
        sim.drain(400_000);
    }
    let finished = sim.finish();
    let complete = |&client: &usize| {
        finished.outcomes[client].iter().filter(|outcome| **outcome == Outcome::Complete).count()
    };
    let whole = clients.iter().map(complete).sum();
    (finished.sim.total(|counters| counters.moves_for_load), whole, finished)
}

/// The first sixty seeds; with `SIM_BALANCE_RUNS`, so many from `SIM_BALANCE_FROM` on.
#[test]
fn who_goes_where_there_are_fewer_is_served_there_whatever_happens() {
    let seeds = seeds("BALANCE", 60);
    let (mut moved, mut whole) = (0, 0);
    for seed in seeds.clone() {
        let (one, answers, _) = drawn(seed);
        (moved, whole) = (moved + one, whole + answers);
    }
    println!("{moved} moved, {whole} answers");
    if are_usual(&seeds, 60) {
        assert!(moved > 100 && whole > 5_000, "{moved} moved, {whole} answers");
    }
}
