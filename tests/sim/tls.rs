//! TLS on both legs of the relay: the same promises, with records cut anywhere, and ends that say whether they are whole.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, Ended, How, When};
use crate::plan::{Answer, Fault, Framed, Method, Request};
use crate::random;
use crate::run::{Finished, Outcome, Sim, settings};
use crate::world::{Identity, Tongues};
use protocol::dialect::Dialect;
use protocol::limits::TLS_HANDSHAKE_GRACE_MS;
use protocol::phase::End;
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use shard::settings::{Listener, Settings};
use shard::stats::Counters;
use std::sync::Arc;

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

fn chat() -> Request {
    Request::new(Dialect::Chat, true)
}

fn get() -> Request {
    Request { method: Method::Get, ..Request::new(Dialect::Plain, false) }
}

fn both(identity: &Identity) -> Tongues {
    Tongues {
        clients: Some(Arc::clone(&identity.client)),
        backends: Some(Arc::clone(&identity.server)),
        ..Tongues::default()
    }
}

fn with(identity: &Identity, tongues: Tongues, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    settings.listeners = vec![Listener { tls: Some(0) }];
    change(&mut settings);
    Sim::secure(7, settings, vec![BackendHost::new(0)], tongues, identity)
}

/// A run with TLS on both legs.
pub(crate) fn of_both(seed: u64, mut settings: Settings, hosts: Vec<BackendHost>) -> Sim {
    let identity = Identity::new(&TLS13);
    settings.listeners = vec![Listener { tls: Some(0) }];
    Sim::secure(seed, settings, hosts, both(&identity), &identity)
}

fn calm(change: impl FnOnce(&mut Tongues)) -> Sim {
    let identity = Identity::new(&TLS13);
    let mut tongues = both(&identity);
    change(&mut tongues);
    with(&identity, tongues, |_| {})
}

fn one(mut sim: Sim, request: Request, answer: Answer) -> (Outcome, Finished) {
    sim.ask(request, answer);
    let finished = sim.finish();
    (finished.outcomes[0][0].clone(), finished)
}

fn counters(finished: &Finished) -> &Counters {
    &finished.sim.shard.stats().counters
}

/// A client that writes these bytes and no TLS of its own.
fn bare(raw: &[u8]) -> ClientPlan {
    ClientPlan { raw: Some(raw.to_vec()), bare: true, ..ClientPlan::new(&[]) }
}

/// A hello that announces more than ever comes.
const HALF_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

#[track_caller]
fn assert_clean(finished: &Finished) {
    let heard = finished.sim.world().heard;
    assert_eq!((heard.errors, heard.unsaid_ends), (0, 0), "{heard:?}");
    let counters = counters(finished);
    assert_eq!((counters.tls_failures, counters.tls_handshake_failures), (0, 0));
    assert_eq!(counters.upstream_tls_handshake_failures, 0);
}

// ---- bytes

#[test]
fn answers_arrive_whole_through_both_legs_in_any_split() {
    for version in VERSIONS {
        let identity = Identity::new(version);
        for receive_bytes in [1, 7, 1000, 0] {
            for (nth, framed) in [Framed::Chunked, Framed::Length, Framed::Close].into_iter().enumerate() {
                let sim = with(&identity, both(&identity), |_| {});
                sim.world().faults.receive_bytes = receive_bytes;
                let request = Request { body_bytes: 3_000, chunked: nth == 1, ..chat() };
                let (outcome, finished) = one(sim, request, Answer { framed, ..Answer::events(40) });
                assert_eq!(outcome, Outcome::Complete, "{receive_bytes} {framed:?}");
                assert_clean(&finished);
                let counters = counters(&finished);
                assert_eq!((counters.tls_handshakes, counters.upstream_tls_handshakes), (1, 1));
            }
        }
    }
}

#[test]
fn large_bodies_pass_in_both_directions() {
    for version in VERSIONS {
        let identity = Identity::new(version);
        for receive_bytes in [1000, 0] {
            let sim = with(&identity, both(&identity), |_| {});
            sim.world().faults.receive_bytes = receive_bytes;
            let request = Request { method: Method::Put, body_bytes: 300_000, ..get() };
            let (outcome, finished) = one(sim, request, Answer::body(300_000, Framed::Length));
            assert_eq!(outcome, Outcome::Complete);
            assert_clean(&finished);
        }
    }
}

#[test]
fn sends_that_end_short_or_late_lose_nothing_and_repeat_nothing() {
    for version in VERSIONS {
        let identity = Identity::new(version);
        for seed in 0..10 {
            let mut settings = settings();
            settings.listeners = vec![Listener { tls: Some(0) }];
            let mut sim = Sim::secure(seed, settings, vec![BackendHost::new(0)], both(&identity), &identity);
            {
                let mut world = sim.world();
                world.pipe_bytes = if seed < 5 { 1_000 } else { 20_000 };
                let faults = &mut world.faults;
                (faults.send_piecewise, faults.send_short) = (700, 500);
                (faults.send_late, faults.send_nothing) = (500, 200);
                (faults.receive_bytes, faults.receive_rearm, faults.reorder) = (1_500, 300, 500);
                faults.delay_us = 300;
            }
            let stream = sim.exchange(chat(), Answer::events(50));
            let body = sim.exchange(get(), Answer::body(60_000, Framed::Chunked));
            sim.client(ClientPlan { pipelined: seed % 2 == 0, ..ClientPlan::new(&[stream, body]) });
            let finished = sim.finish();
            assert_eq!(finished.outcomes[0], [Outcome::Complete, Outcome::Complete], "seed {seed}");
            // A backend whose last send was not yet confirmed is left without a word.
            assert_eq!(finished.sim.world().heard.errors, 0, "seed {seed}");
            assert_eq!(counters(&finished).tls_failures, 0, "seed {seed}");
            assert!(counters(&finished).sends_short > 0, "seed {seed}");
        }
    }
}

#[test]
fn keys_change_in_the_middle_of_a_stream() {
    for receive_bytes in [7, 0] {
        let sim = calm(|tongues| tongues.keys_every = 2);
        sim.world().faults.receive_bytes = receive_bytes;
        let answer = Answer { gap_us: 2_000, piece_bytes: 300, ..Answer::events(200) };
        let request = Request { body_bytes: 20_000, ..chat() };
        let (outcome, finished) = one(sim, request, answer);
        assert_eq!(outcome, Outcome::Complete);
        assert_clean(&finished);
        let changes = finished.sim.world().heard.key_changes;
        assert!(changes > 10, "{changes}");
    }
}

#[test]
fn connections_live_on_while_certificates_change() {
    let (first, second) = (Identity::new(&TLS13), Identity::new(&TLS13));
    let mut sim = with(&first, both(&first), |_| {});
    let slow = Answer { gap_us: 50_000, piece_bytes: 100, ..Answer::events(50) };
    let (_, before) = sim.ask(chat(), slow.clone());
    sim.run_ms(300);
    assert_eq!(sim.world().exchanges[before].attempts.len(), 1, "it is under way");
    sim.certify(2, &second);
    let tongues = both(&second);
    sim.world().tongues = tongues;
    // It trusts the second certificate only, and so does the shard of its backends.
    sim.ask(chat(), slow);
    let finished = sim.finish();
    assert_eq!(finished.outcomes, [[Outcome::Complete], [Outcome::Complete]]);
    assert_clean(&finished);
    let counters = counters(&finished);
    assert_eq!((counters.tls_handshakes, counters.upstream_tls_handshakes), (2, 2));
    assert_eq!((counters.tls_resumptions, counters.upstream_tls_resumptions), (0, 0));
}

// ---- ends

#[test]
fn close_notify_comes_before_the_fin() {
    for (request, answer) in [
        (Request { close: true, ..chat() }, Answer::events(5)),
        (Request { close: true, ..get() }, Answer::body(100_000, Framed::Length)),
        (Request { http10: true, ..get() }, Answer::body(5_000, Framed::Chunked)),
    ] {
        for send_piecewise in [0, 1000] {
            let mut sim = calm(|_| {});
            sim.world().faults.send_piecewise = send_piecewise;
            let id = sim.exchange(request.clone(), answer.clone());
            // It waits for the shard to close.
            sim.client(ClientPlan { idle_us: 60_000_000, ..ClientPlan::new(&[id]) });
            let finished = sim.finish();
            assert_eq!(finished.outcomes[0][0], Outcome::Complete);
            assert_eq!(finished.sim.world().clients[0].ended, Some(Ended::Fin));
            assert_clean(&finished);
            assert!(finished.sim.world().heard.said_ends >= 1);
        }
    }
}

#[test]
fn an_answer_that_is_cut_does_not_end_as_if_it_were_whole() {
    // Until close: the client has nothing but TLS's own end to tell it.
    let request = Request { http10: true, ..get() };
    let cut = Answer { fault: Fault::Cut(600), ..Answer::body(50_000, Framed::Chunked) };
    let (outcome, finished) = one(calm(|_| {}), request, cut);
    assert!(matches!(outcome, Outcome::BodyCut(_)), "{outcome:?}");
    let ended = finished.sim.world().clients[0].ended;
    assert_eq!(ended, Some(Ended::Reset), "neither FIN behind a close_notify, nor one that is taken for it");
}

#[test]
fn a_backend_that_ends_without_close_notify_has_cut_its_answer() {
    for rude in [false, true] {
        let mut sim = calm(|tongues| tongues.rude_backends = rude);
        sim.lenience.breach = rude;
        let (outcome, finished) = one(sim, get(), Answer::body(5_000, Framed::Close));
        assert_eq!(counters(&finished).upstream_tls_truncations, u64::from(rude));
        if rude {
            assert!(matches!(outcome, Outcome::BodyCut(_)), "{outcome:?}");
            assert_eq!(finished.ends(End::UpstreamTruncated), 1);
        } else {
            assert_eq!(outcome, Outcome::Complete);
        }
        // Where the framing tells the end, nothing else has to.
        for framed in [Framed::Length, Framed::Chunked] {
            let sim = calm(|tongues| tongues.rude_backends = rude);
            let answer = Answer { closes_silently: true, ..Answer::body(5_000, framed) };
            let (outcome, finished) = one(sim, get(), answer);
            assert_eq!(outcome, Outcome::Complete);
            assert_eq!(counters(&finished).upstream_tls_truncations, 0);
        }
    }
}

#[test]
fn a_client_that_leaves_ends_its_backends_work() {
    for rude in [false, true] {
        for how in [How::Close, How::Reset, How::HalfClose] {
            let mut sim = calm(|tongues| tongues.rude_clients = rude);
            let answer = Answer { gap_us: 20_000, piece_bytes: 200, ..Answer::events(2_000) };
            let id = sim.exchange(chat(), answer);
            sim.client(ClientPlan { leave: Some((When::Bytes(2_000), how)), ..ClientPlan::new(&[id]) });
            let finished = sim.finish();
            assert_eq!(finished.ends(End::ClientLeft), 1, "{how:?} {rude} {:?}", finished.sim.records);
            let world = finished.sim.world();
            assert!(!world.exchanges[id].attempts[0].over, "it was stopped in the middle");
        }
    }
}

// ---- handshakes

#[test]
fn a_handshake_has_its_time() {
    for raw in [&HALF_HELLO[..1], HALF_HELLO, b""] {
        let identity = Identity::new(&TLS13);
        let mut sim = with(&identity, both(&identity), |settings| settings.tls_handshake_ms = 3_000);
        let begun_us = sim.now_us();
        sim.client(bare(raw));
        let finished = sim.finish();
        assert_eq!(counters(&finished).tls_handshake_timeouts, 1, "{raw:?}");
        let took_ms = (finished.sim.world().clients[0].ended_us - begun_us) / 1000;
        assert!((3_000..3_500).contains(&took_ms), "{took_ms}");
    }
}

#[test]
fn stalled_handshakes_make_room_for_those_that_wait() {
    let identity = Identity::new(&TLS13);
    let mut sim = with(&identity, both(&identity), |settings| settings.tls_handshakes_max = 3);
    for _ in 0..9 {
        sim.client(bare(HALF_HELLO));
    }
    let id = sim.exchange(chat(), Answer::events(5));
    sim.client(ClientPlan { start_us: 100_000, ..ClientPlan::new(&[id]) });
    sim.run_ms(500);
    assert_eq!(sim.shard.snapshot().handshakes, 3);
    let finished = sim.finish();
    assert_eq!(finished.outcomes[9], [Outcome::Complete]);
    let counters = counters(&finished);
    // Of three rounds of strangers each gives way to the next, and the last one's first to the client.
    assert_eq!(counters.tls_handshakes_delayed, 7);
    assert_eq!(counters.tls_handshakes_displaced, 7);
    let took_us = finished.sim.world().clients[9].ended_us - 1_000_000;
    let least_us = 3 * TLS_HANDSHAKE_GRACE_MS * 1000;
    assert!((least_us..least_us + 500_000).contains(&took_us), "{took_us}");
}

#[test]
fn those_that_wait_and_leave_are_forgotten() {
    for how in [How::Close, How::Reset] {
        let identity = Identity::new(&TLS13);
        let mut sim = with(&identity, both(&identity), |settings| settings.tls_handshakes_max = 1);
        sim.client(bare(HALF_HELLO));
        for _ in 0..10 {
            sim.client(ClientPlan {
                start_us: 10_000,
                leave: Some((When::AtUs(200_000), how)),
                ..bare(HALF_HELLO)
            });
        }
        let id = sim.exchange(chat(), Answer::events(5));
        sim.client(ClientPlan { start_us: 100_000, ..ClientPlan::new(&[id]) });
        sim.run_ms(600);
        assert_eq!(sim.shard.population().0, 2, "the one that stalls, and the one that waits");
        let finished = sim.finish();
        assert_eq!(finished.outcomes[11], [Outcome::Complete]);
        let counters = counters(&finished);
        assert_eq!((counters.tls_handshakes_delayed, counters.tls_handshakes_displaced), (11, 1));
    }
}

#[test]
fn a_handshake_that_ends_gives_its_place_at_once() {
    let identity = Identity::new(&TLS13);
    let mut sim = with(&identity, both(&identity), |settings| settings.tls_handshakes_max = 1);
    sim.world().faults.receive_bytes = 20;
    sim.world().faults.delay_us = 1_000;
    for _ in 0..10 {
        sim.ask(chat(), Answer::events(3));
    }
    let finished = sim.finish();
    for outcome in &finished.outcomes {
        assert_eq!(outcome[..], [Outcome::Complete]);
    }
    assert!(counters(&finished).tls_handshakes_delayed > 0);
    assert_eq!(counters(&finished).tls_handshakes_displaced, 0);
    assert_clean(&finished);
}

#[test]
fn a_backend_that_is_not_trusted_is_not_asked() {
    let identity = Identity::new(&TLS13);
    let mut tongues = both(&identity);
    tongues.backends = Some(Identity::new(&TLS13).server);
    for request in [chat(), Request::new(Dialect::Messages, true), get()] {
        let mut sim = with(&identity, tongues.clone(), |_| {});
        sim.lenience.breach = true;
        let (outcome, finished) = one(sim, request, Answer::events(3));
        assert_eq!(outcome, Outcome::Error(502, End::UpstreamTls.name().to_owned()));
        assert_eq!(finished.ends(End::UpstreamTls), 1);
        assert!(counters(&finished).upstream_tls_handshake_failures > 0);
        assert!(finished.sim.world().exchanges[0].attempts.is_empty());
    }
}

#[test]
fn plain_http_on_a_tls_port_is_told_so() {
    let mut sim = calm(|_| {});
    sim.lenience.breach = true;
    let id = sim.exchange(chat(), Answer::events(3));
    sim.client(ClientPlan { bare: true, ..ClientPlan::new(&[id]) });
    let finished = sim.finish();
    assert!(matches!(finished.outcomes[0][0], Outcome::Error(400, _)), "{:?}", finished.outcomes);
    assert_eq!(counters(&finished).tls_plain_refused, 1);
}

#[test]
fn tls_on_a_plain_port_is_told_so() {
    let identity = Identity::new(&TLS13);
    let mut sim = with(&identity, both(&identity), |settings| settings.listeners.clear());
    sim.lenience.breach = true;
    let id = sim.exchange(chat(), Answer::events(3));
    sim.client(ClientPlan::new(&[id]));
    let finished = sim.finish();
    assert_eq!(counters(&finished).tls_hello_refused, 1);
    let heard = finished.sim.world().heard;
    assert_eq!(heard.errors, 1, "a fatal alert, and then the end: {heard:?}");
    assert_eq!(finished.sim.world().clients[0].ended, Some(Ended::Fin));
}

// ---- on an ill machine

/// What a seed draws for plain connections, over TLS on both legs.
fn random(seed: u64) {
    let identity = Identity::new(VERSIONS[seed as usize % 2]);
    random::draw(seed).run_secure(both(&identity), &identity);
}

/// The first hundred seeds; with `SIM_TLS_RUNS`, so many from `SIM_SEED` on.
#[test]
fn random_runs_keep_their_promises_over_tls() {
    let asked: Option<u64> = std::env::var("SIM_TLS_RUNS").ok().map(|runs| runs.parse().unwrap());
    let (from, runs) = asked.map_or((0, 100), |runs| (random::seed_asked_for().unwrap_or(0), runs));
    for seed in from..from + runs {
        println!("seed {seed}");
        random(seed);
    }
}

/// Two of its connections to backends break within their handshakes, and those who waited for them are told.
#[test]
fn a_connection_to_a_backend_may_break_within_its_handshake() {
    random(770_002_425);
}

/// A head is late while the last bytes of a handshake are still being sent: what refuses it waits behind them, and so does the
/// next send, which would have armed the connection's timer again.
#[test]
fn a_late_head_may_be_refused_behind_the_last_send_of_a_handshake() {
    random(770_005_424);
}

/// With TLS all of a request is under way when its client leaves; its end is behind that, and there is one small buffer.
#[test]
fn what_a_client_has_sent_before_it_leaves_is_received_before_its_end() {
    random(880_000_046);
}

/// It reads a handshake of 590 bytes 45 at a time, one a second.
#[test]
fn who_reads_too_slowly_for_a_handshake_is_owed_nothing() {
    random(991_000_376);
}

/// Its client asks for new keys, and goes while the rest of a batch is still to be sent.
#[test]
fn a_connection_may_end_between_the_sends_of_one_batch() {
    let identity = Identity::new(&TLS13);
    let tongues = Tongues { keys_every: 5, ..both(&identity) };
    random::draw(712).run_secure(tongues, &identity);
}
