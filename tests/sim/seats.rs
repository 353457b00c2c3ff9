//! Client slots, accepts, neighbours and leaving, on a calm machine: what happens between connections, not within one.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, Ended};
use crate::directed::{assert_end, calm, chat, ended_us, one, plain, sim_with};
use crate::plan::{Answer, Fault, Framed, Request};
use crate::run::{Finished, Outcome, Sim, settings};

use protocol::phase::End;

// ---- slots, accepts

#[test]
fn a_watch_that_ended_with_a_fin_is_armed_again() {
    let mut sim = calm();
    // Each watch that tells a FIN is over with it, half of the time.
    sim.world().faults.hangup_ends = 500;
    sim.world().hosts[0].never_reads = true;
    let request = Request { body_bytes: 400_000, ..plain("PUT") };
    let id = sim.exchange(request, Answer::body(1, Framed::Length));
    let (raw, _) = sim.world().exchanges[id].request.clone().wire(id, &mut crate::rng::Rng::new(1));
    let client = sim.client(ClientPlan { raw: Some(raw), ..ClientPlan::new(&[]) });
    sim.run_ms(2_000);
    let socket = sim.world().clients[client].socket.unwrap();
    assert!(sim.shard.stats().counters.upload_pauses > 0, "it is not read any more");
    for _ in 0..20 {
        // FINs do not repeat on the wire; the watch tells this one whenever it is armed.
        sim.world().peer_fin(socket);
        sim.run_ms(10);
    }
    sim.world().peer_reset(socket);
    sim.run_ms(100);
    assert_eq!(sim.shard.population(), (0, 0, 0, 0), "its RST was seen, and its backend is let go");
    assert_eq!(sim.finish().ends(End::ClientLeft), 1);
}

#[test]
fn slots_bound_the_clients_and_the_queue_waits() {
    for listeners in [1, 2, 3] {
        let mut settings = settings();
        (settings.connections_max, settings.backlog) = (2, 100);
        let mut sim = Sim::with_listeners(11, settings, vec![BackendHost::new(0)], listeners);
        for _ in 0..20 {
            let id = sim.exchange(chat(), Answer { head_delay_us: 50_000, ..Answer::events(2) });
            sim.client(ClientPlan::new(&[id]));
        }
        for _ in 0..500 {
            sim.run_ms(1);
            assert!(sim.shard.population().0 <= 2);
            assert!(sim.shard.snapshot().parked < listeners);
        }
        let finished = sim.finish();
        assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
        assert!(finished.sim.shard.stats().counters.accept_pauses > 0);
        assert_eq!(finished.sim.shard.stats().counters.accept_parks > 0, listeners > 2);
    }
}

#[test]
fn a_burst_is_accepted_in_few_turns_however_few_slots_there_are() {
    let mut settings = settings();
    (settings.connections_max, settings.backlog) = (120, 200);
    let mut sim = Sim::with_listeners(11, settings, vec![BackendHost::new(0)], 1);
    for _ in 0..200 {
        let id = sim.exchange(chat(), Answer { head_delay_us: 5_000_000, ..Answer::events(2) });
        sim.client(ClientPlan::new(&[id]));
    }
    // They connect while the shard looks elsewhere.
    sim.world().pass(10);
    let before = sim.shard.stats().counters.turns;
    while sim.shard.population().0 < 120 {
        sim.run_ms(1);
    }
    let turns = sim.shard.stats().counters.turns - before;
    assert!(turns < 20, "{turns} turns for 120 clients");
    let finished = sim.finish();
    assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
}

#[test]
fn a_multishot_accept_never_brings_more_than_there_are_slots() {
    let mut settings = settings();
    // 256 completions fit into the ring: above that, the accept is multishot.
    (settings.connections_max, settings.backlog) = (300, 400);
    let mut sim = Sim::with_listeners(11, settings, vec![BackendHost::new(0)], 1);
    sim.world().faults.cancel_late_us = 3_000;
    for _ in 0..400 {
        let id = sim.exchange(chat(), Answer { head_delay_us: 50_000, ..Answer::events(2) });
        sim.client(ClientPlan::new(&[id]));
    }
    let finished = sim.finish();
    assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
    assert!(finished.sim.shard.stats().counters.accept_errors == 0);
}

// ---- sharing with other shards

#[test]
fn clients_beyond_the_share_are_handed_to_a_neighbour_and_those_it_hands_over_are_served() {
    for connections_max in [1000, 4] {
        let mut sim = sim_with(|settings| settings.connections_max = connections_max).beside_a_mirror();
        for _ in 0..30 {
            sim.ask(chat(), Answer { head_delay_us: 100_000, ..Answer::events(3) });
        }
        for _ in 0..500 {
            sim.run_ms(1);
            assert!(sim.shard.population().0 <= connections_max);
        }
        let finished = sim.finish();
        assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
        let counters = &finished.sim.shard.stats().counters;
        assert_eq!(counters.accepts, 30);
        assert_eq!(counters.handed_away, counters.handed_in);
        assert!(counters.handed_away > 0, "{counters:?}");
    }
}

#[test]
fn a_shard_alone_with_its_share_keeps_its_clients() {
    let mut sim = calm().beside_a_mirror();
    sim.ask(chat(), Answer::events(3));
    let finished = sim.finish();
    assert_eq!(finished.sim.shard.stats().counters.handed_away, 0);
}

#[test]
fn accepting_recovers_when_descriptors_run_out() {
    let mut sim = calm();
    sim.world().faults.accept_error = 700;
    for _ in 0..10 {
        sim.ask(chat(), Answer::events(2));
    }
    let finished = sim.finish();
    assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
    assert!(finished.sim.shard.stats().counters.accept_errors > 0);
}

#[test]
fn a_backend_socket_that_cannot_be_made_is_an_overload() {
    let sim = calm();
    sim.world().faults.socket_error = 1000;
    let (outcome, finished) = one(sim, chat(), Answer::events(2));
    assert_eq!(outcome, Outcome::Error(503, "overload".to_owned()));
    assert_end(&finished, End::Overload);
    let active = finished.sim.shard.snapshot().upstreams[0].active;
    assert_eq!(active, 0, "a stream that got no connection is none of its backend's");
}

// ---- leaving

fn draining(answer: Answer) -> Sim {
    let mut sim = calm();
    sim.lenience.impatient = true;
    sim.ask(chat(), answer);
    sim.run_ms(500);
    sim
}

fn leave(mut sim: Sim) -> Finished {
    sim.run_until_left();
    sim.settle();
    sim.check()
}

#[test]
fn a_drain_lets_streams_finish() {
    let mut sim = draining(Answer { piece_bytes: 20, gap_us: 200_000, ..Answer::events(30) });
    sim.drain(600_000);
    let finished = leave(sim);
    assert_eq!(finished.outcomes[0][0], Outcome::Complete);
    assert_eq!(finished.sim.forced, Some(0));
}

#[test]
fn a_drain_ends_what_is_left_at_its_deadline_in_band() {
    let mut sim = draining(Answer { fault: Fault::Stall(500), ..Answer::events(30) });
    sim.drain(5_000);
    let begun_us = sim.now_us();
    let finished = leave(sim);
    assert!(matches!(&finished.outcomes[0][0], Outcome::EventsThenError(_, code) if code == "drain"));
    assert_end(&finished, End::Drain);
    assert_eq!(finished.sim.forced, Some(1));
    assert!((4_900_000..5_400_000).contains(&(ended_us(&finished, 0) - begun_us)));
}

#[test]
fn a_stop_ends_streams_at_once_in_band() {
    let mut sim = draining(Answer { fault: Fault::Stall(500), ..Answer::events(30) });
    sim.stop();
    let begun_us = sim.now_us();
    let finished = leave(sim);
    assert!(matches!(&finished.outcomes[0][0], Outcome::EventsThenError(_, code) if code == "stopped"));
    assert_end(&finished, End::Stopped);
    assert!(ended_us(&finished, 0) - begun_us < 300_000);
}

#[test]
fn a_stop_during_a_drain_is_told_in_band_too() {
    let mut sim = draining(Answer { fault: Fault::Stall(500), ..Answer::events(30) });
    sim.drain(600_000);
    sim.run_ms(3_000);
    sim.stop();
    let finished = leave(sim);
    assert!(matches!(&finished.outcomes[0][0], Outcome::EventsThenError(_, code) if code == "stopped"));
}

#[test]
fn a_body_that_only_fin_ends_is_not_ended_by_fin_when_the_shard_stops() {
    let mut sim = calm();
    sim.lenience.impatient = true;
    let answer = Answer { piece_bytes: 1_000, gap_us: 100_000, ..Answer::body(100_000, Framed::Close) };
    sim.ask(Request { http10: true, ..plain("GET") }, answer);
    sim.run_ms(500);
    sim.stop();
    let finished = leave(sim);
    assert!(matches!(finished.outcomes[0][0], Outcome::BodyCut(_)), "{:?}", finished.outcomes);
    assert_eq!(finished.sim.world().clients[0].ended, Some(Ended::Reset));
}

#[test]
fn a_drain_accepts_what_the_kernel_has_queued() {
    for (accept_error, connections_max, listeners) in
        [(0, 1000, 1), (0, 3, 1), (500, 1000, 1), (0, 3, 3), (500, 3, 2)]
    {
        let mut settings = settings();
        (settings.backlog, settings.connections_max) = (64, connections_max);
        let mut sim = Sim::with_listeners(7, settings, vec![BackendHost::new(0)], listeners);
        sim.world().faults.accept_error = accept_error;
        for _ in 0..30 {
            sim.ask(chat(), Answer { head_delay_us: 100_000, ..Answer::events(3) });
        }
        // They connect in this turn, and are in the queue when the drain begins.
        sim.world().pass(10);
        sim.drain(60_000);
        let finished = leave(sim);
        assert_eq!(finished.sim.world().backlog_lost, 0);
        assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
    }
}

#[test]
fn an_idle_shard_drains_at_once_and_leaves_no_timer() {
    let mut sim = calm();
    let id = sim.exchange(chat(), Answer::events(2));
    sim.client(ClientPlan { idle_us: 50_000_000, ..ClientPlan::new(&[id]) });
    sim.run_ms(1_000);
    sim.drain(30_000);
    let begun_us = sim.now_us();
    sim.run_until_left();
    assert!(sim.now_us() - begun_us < 1_500_000, "{}", sim.now_us() - begun_us);
    assert_eq!(sim.shard.population(), (0, 0, 0, 0));
    sim.settle();
    assert_eq!(sim.check().outcomes[0][0], Outcome::Complete);
}

#[test]
fn a_stop_resets_the_clients_that_wait_for_a_slot() {
    let mut settings = settings();
    (settings.backlog, settings.connections_max) = (64, 1);
    let mut sim = Sim::with_listeners(7, settings, vec![BackendHost::new(0)], 3);
    sim.lenience.impatient = true;
    for _ in 0..10 {
        sim.ask(chat(), Answer { head_delay_us: 10_000_000, ..Answer::events(3) });
    }
    sim.run_ms(500);
    assert!(sim.shard.snapshot().parked > 0);
    sim.stop();
    assert_eq!(sim.shard.snapshot().parked, 0);
    leave(sim);
}

#[test]
fn a_shard_does_not_leave_before_its_neighbour_has_stopped_handing_over() {
    let mut sim = sim_with(|settings| settings.backlog = 64).beside_a_mirror();
    for _ in 0..30 {
        sim.ask(chat(), Answer { head_delay_us: 100_000, ..Answer::events(3) });
    }
    // Some are with the neighbour when the drain begins.
    sim.world().pass(10);
    while sim.shard.stats().counters.handed_away == 0 {
        sim.run_ms(1);
    }
    sim.drain(60_000);
    let finished = leave(sim);
    assert!(finished.outcomes.iter().all(|outcomes| outcomes[0] == Outcome::Complete));
    assert!(finished.sim.shard.stats().counters.handed_in > 0);
}
