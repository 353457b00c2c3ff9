//! One scenario per promise of the relay, on a calm machine: what the client is told, what is counted, and when.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, Pace, When};
use crate::control::Order;
use crate::plan::{Answer, Fault, Framed, Method, Request};
use crate::run::{Finished, Outcome, Sim, settings};
use crate::script::{Ask, ClientScript, Script, With};
use protocol::dialect::Dialect;
use protocol::phase::{Deadlines, End};
use shard::settings::{HalfClose, Settings};

pub(crate) fn chat() -> Request {
    Request::new(Dialect::Chat, true)
}

pub(crate) fn plain(name: &str) -> Request {
    let methods = [Method::Get, Method::Head, Method::Post, Method::Put];
    let method = methods.into_iter().find(|method| method.name() == name).unwrap();
    Request { method, ..Request::new(Dialect::Plain, false) }
}

pub(crate) fn sim_with(change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    change(&mut settings);
    Sim::new(7, settings, vec![BackendHost::new(0)])
}

pub(crate) fn calm() -> Sim {
    sim_with(|_| {})
}

fn deadlines(change: impl Fn(&mut Deadlines)) -> Sim {
    sim_with(|settings| settings.routes.iter_mut().for_each(|route| change(&mut route.deadlines)))
}

/// One client, one exchange; the outcome and the run.
pub(crate) fn one(mut sim: Sim, request: Request, answer: Answer) -> (Outcome, Finished) {
    sim.ask(request, answer);
    let finished = sim.finish();
    (finished.outcomes[0][0].clone(), finished)
}

pub(crate) fn ended_us(finished: &Finished, client: usize) -> u64 {
    finished.sim.world().clients[client].ended_us
}

#[track_caller]
pub(crate) fn assert_end(finished: &Finished, end: End) {
    assert_eq!(finished.ends(end), 1, "{:?}", finished.sim.records);
    assert_eq!(finished.sim.records.len(), 1, "{:?}", finished.sim.records);
}

#[test]
fn every_dialect_arrives_whole_in_every_framing_and_any_split() {
    for dialect in Dialect::ALL {
        for framed in [Framed::Chunked, Framed::Length, Framed::Close] {
            for piece_bytes in [0, 2, 1 << 20] {
                for crlf in [false, true] {
                    let answer = Answer { framed, piece_bytes, crlf, comments: true, ..Answer::events(20) };
                    let (outcome, finished) = one(calm(), Request::new(dialect, true), answer);
                    assert_eq!(outcome, Outcome::Complete, "{dialect:?} {framed:?}");
                    assert_end(&finished, End::Done);
                }
            }
        }
    }
}

#[test]
fn ordinary_bodies_pass_in_both_directions() {
    for framed in [Framed::Chunked, Framed::Length, Framed::Close] {
        for chunked in [false, true] {
            let request = Request { body_bytes: 700_000, chunked, ..plain("PUT") };
            let (outcome, finished) = one(calm(), request, Answer::body(700_000, framed));
            assert_eq!(outcome, Outcome::Complete);
            assert!(finished.sim.lag_max <= finished.sim.settings.lag_high_bytes + 64 * 4096 + 4096);
        }
    }
}

#[test]
fn http_1_0_clients_get_a_body_until_close() {
    for request in [chat(), plain("GET")] {
        let request = Request { http10: true, ..request };
        let answer = if request.streaming { Answer::events(5) } else { Answer::body(5000, Framed::Chunked) };
        let (outcome, _) = one(calm(), request, answer);
        assert_eq!(outcome, Outcome::Complete);
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let mut sim = calm();
    let mut ids = Vec::new();
    for nth in 0..6 {
        let answer = if nth % 2 == 0 { Answer::events(5) } else { Answer::body(3000, Framed::Length) };
        let request = if nth % 2 == 0 { chat() } else { plain("GET") };
        ids.push(sim.exchange(request, answer));
    }
    sim.client(ClientPlan { pipelined: true, write_bytes: 64, ..ClientPlan::new(&ids) });
    let finished = sim.finish();
    assert_eq!(finished.outcomes[0], vec![Outcome::Complete; 6]);
}

#[test]
fn a_client_that_expects_100_continue_is_told_to() {
    let (outcome, _) =
        one(calm(), Request { expect: true, ..plain("PUT") }, Answer::body(10, Framed::Length));
    assert_eq!(outcome, Outcome::Complete);
}

#[test]
fn interim_responses_are_swallowed_up_to_a_limit() {
    let (outcome, _) = one(calm(), chat(), Answer { interim: 8, ..Answer::events(3) });
    assert_eq!(outcome, Outcome::Complete);
    let answer = Answer { interim: 9, ..Answer::events(3) };
    let (outcome, finished) = one(calm(), chat(), answer);
    assert_eq!(outcome, Outcome::Error(502, "upstream_malformed".to_owned()));
    assert_end(&finished, End::UpstreamMalformed);
}

#[test]
fn an_error_status_of_the_backend_passes_unchanged() {
    for status in [204, 400, 429, 500, 503] {
        let (outcome, finished) = one(calm(), chat(), Answer { status, ..Answer::body(200, Framed::Length) });
        assert_eq!(outcome, Outcome::Complete);
        assert_end(&finished, End::Done);
    }
}

// ---- deadlines, each with its own reason

#[test]
fn head_deadline() {
    let mut sim = deadlines(|deadlines| deadlines.head_ms = 2_000);
    let raw = Some(b"POST /v1/chat/completions HTT".to_vec());
    sim.client(ClientPlan { raw, ..ClientPlan::new(&[]) });
    let finished = sim.finish();
    assert_end(&finished, End::HeadTimeout);
    let text = format!("{:?}", finished.sim.world().clients[0].reader.messages);
    assert!(text.contains("408"), "{text}");
    assert!((2_000_000..2_100_000).contains(&(ended_us(&finished, 0) - 1_000_000)));
}

#[test]
fn body_deadline() {
    let mut sim = deadlines(|deadlines| deadlines.body_ms = 2_000);
    let raw =
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Sim: 0\r\nContent-Length: 99\r\n\r\n{".to_vec();
    sim.exchange(Request { body_bytes: 99, ..chat() }, Answer::events(1));
    sim.world().exchanges[0].body = vec![b'{'; 99];
    sim.client(ClientPlan { raw: Some(raw), ..ClientPlan::new(&[]) });
    let finished = sim.finish();
    assert_end(&finished, End::BodyTimeout);
}

#[test]
fn connect_deadline() {
    let sim = deadlines(|deadlines| deadlines.connect_ms = 2_000);
    sim.world().hosts[0].hangs = true;
    sim.world().connects_failed = 1;
    let (outcome, finished) = one(sim, chat(), Answer::events(1));
    assert_eq!(outcome, Outcome::Error(504, "connect_timeout".to_owned()));
    assert_end(&finished, End::ConnectTimeout);
}

#[test]
fn refused_by_all_addresses() {
    let sim = Sim::new(1, settings(), vec![BackendHost::new(0), BackendHost::new(1)]);
    for host in &mut sim.world().hosts {
        host.refuses = true;
    }
    let (outcome, finished) = one(sim, chat(), Answer::events(1));
    assert_eq!(outcome, Outcome::Error(502, "upstream_refused".to_owned()));
    assert_eq!(finished.sim.shard.stats().counters.upstream_connects, 2, "each address is tried");
}

#[test]
fn an_address_that_refuses_is_made_up_for_by_the_next() {
    let sim = Sim::new(1, settings(), vec![BackendHost::new(0), BackendHost::new(1)]);
    sim.world().hosts[0].refuses = true;
    let (outcome, _) = one(sim, chat(), Answer::events(1));
    assert_eq!(outcome, Outcome::Complete);
}

#[test]
fn upstream_head_deadline() {
    let sim = sim_with(|settings| {
        for route in &mut settings.routes {
            route.deadlines.upstream_head_ms = 2_000;
            route.commit_ms = 0;
        }
    });
    let answer = Answer { fault: Fault::Stall(0), head_delay_us: 60_000_000, ..Answer::events(3) };
    let (outcome, finished) = one(sim, chat(), answer);
    assert_eq!(outcome, Outcome::Error(504, "upstream_head_timeout".to_owned()));
    assert_end(&finished, End::UpstreamHeadTimeout);
}

#[test]
fn first_token_deadline_that_heartbeats_do_not_extend() {
    let sim = sim_with(|settings| {
        for route in &mut settings.routes {
            route.deadlines.first_token_ms = 5_000;
            route.heartbeat_ms = 500;
        }
    });
    let answer = Answer { fault: Fault::Stall(0), ..Answer::events(3) };
    let (outcome, finished) = one(sim, chat(), answer);
    assert_eq!(outcome, Outcome::EventsThenError(0, "first_token_timeout".to_owned()));
    assert_end(&finished, End::FirstTokenTimeout);
    assert!(finished.sim.shard.stats().counters.heartbeats >= 8);
    assert!(ended_us(&finished, 0) < 1_000_000 + 5_200_000);
}

#[test]
fn between_tokens_deadline() {
    let sim = sim_with(|settings| {
        for route in &mut settings.routes {
            route.deadlines.between_tokens_ms = 3_000;
            route.heartbeat_ms = 500;
        }
    });
    let answer = Answer { fault: Fault::Stall(600), ..Answer::events(10) };
    let (outcome, finished) = one(sim, chat(), answer);
    let Outcome::EventsThenError(events, code) = outcome else { panic!("{outcome:?}") };
    assert!((1..10).contains(&events) && code == "between_tokens_timeout");
    assert_end(&finished, End::BetweenTokensTimeout);
}

#[test]
fn total_deadline() {
    let mut sim = deadlines(|deadlines| deadlines.total_ms = 3_000);
    sim.lenience.impatient = true;
    let answer = Answer { piece_bytes: 10, gap_us: 400_000, ..Answer::events(200) };
    let (outcome, finished) = one(sim, chat(), answer);
    assert!(matches!(outcome, Outcome::EventsThenError(_, code) if code == "total_timeout"));
    assert_end(&finished, End::TotalTimeout);
}

#[test]
fn a_long_ordinary_answer_is_not_held_to_the_first_token() {
    let sim = deadlines(|deadlines| deadlines.first_token_ms = 1_000);
    let answer = Answer { piece_bytes: 3_000, gap_us: 600_000, ..Answer::body(60_000, Framed::Length) };
    let (outcome, finished) = one(sim, chat(), answer);
    assert_eq!(outcome, Outcome::Complete, "it asked for a stream, and was answered with a body");
    assert_end(&finished, End::Done);
}

#[test]
fn write_stall_deadline() {
    let mut sim = sim_with(|settings| {
        settings.routes[1].deadlines.write_stall_ms = 3_000;
        settings.buffers = 8;
    });
    let id = sim.exchange(chat(), Answer { bytes: 1000, ..Answer::events(400) });
    let pace = Pace::Stuck { after_bytes: 1000, for_us: 100_000_000 };
    sim.client(ClientPlan { pace, ..ClientPlan::new(&[id]) });
    let finished = sim.finish();
    assert_end(&finished, End::WriteStall);
    assert!(finished.sim.shard.stats().counters.pauses >= 1, "its backend was paused");
    let world = finished.sim.world();
    assert!(
        world.exchanges[id].attempts[0].written < 300_000,
        "what a stuck client does not read is not taken"
    );
    let closed_us = world.sockets[world.exchanges[id].attempts[0].socket].ended_us;
    assert!(closed_us.is_some_and(|us| us < 1_000_000 + 3_500_000), "{closed_us:?}");
}

#[test]
fn a_backend_that_does_not_take_the_request_in_time() {
    let mut sim = deadlines(|deadlines| {
        deadlines.write_stall_ms = 3_000;
        deadlines.body_ms = 0;
    });
    sim.world().hosts[0].never_reads = true;
    sim.lenience.impatient = true;
    let (outcome, finished) =
        one(sim, Request { body_bytes: 500_000, ..plain("PUT") }, Answer::body(1, Framed::Length));
    assert_eq!(outcome, Outcome::Error(504, "upstream_stalled".to_owned()));
    assert_end(&finished, End::UpstreamStalled);
    assert!(finished.sim.shard.stats().counters.upload_pauses >= 1);
    assert!(finished.sim.log_bytes_max < 300_000, "{}", finished.sim.log_bytes_max);
}

#[test]
fn idle_clients_are_closed_by_the_keep_alive_deadline() {
    let mut sim = deadlines(|deadlines| deadlines.keep_alive_ms = 4_000);
    let id = sim.exchange(plain("GET"), Answer::body(10, Framed::Length));
    sim.client(ClientPlan { idle_us: 60_000_000, ..ClientPlan::new(&[id]) });
    sim.client(ClientPlan { raw: Some(Vec::new()), ..ClientPlan::new(&[]) });
    let finished = sim.finish();
    assert_eq!(finished.sim.shard.stats().counters.keep_alive_closes, 2);
    assert!(ended_us(&finished, 0) < 1_000_000 + 4_200_000);
    assert!(ended_us(&finished, 1) < 1_000_000 + 4_200_000);
}

#[test]
fn deadlines_that_pass_in_one_turn_do_not_trip_over_one_another() {
    // The client's stalled send, the silent backend, the stream as a whole: each may end what the others belong to.
    for (write_stall_ms, between_tokens_ms, total_ms) in
        [(3_000, 3_000, 3_000), (3_000, 0, 3_001), (3_002, 3_001, 0)]
    {
        let mut sim = deadlines(|deadlines| {
            deadlines.write_stall_ms = write_stall_ms;
            deadlines.between_tokens_ms = between_tokens_ms;
            deadlines.total_ms = total_ms;
        });
        sim.lenience.impatient = true;
        for _ in 0..4 {
            let fault = Fault::Stall(900);
            let id = sim.exchange(chat(), Answer { fault, bytes: 1000, ..Answer::events(200) });
            let pace = Pace::Stuck { after_bytes: 1000, for_us: 100_000_000 };
            sim.client(ClientPlan { pace, ..ClientPlan::new(&[id]) });
        }
        sim.run_ms(500);
        // The shard does not get to run for ten seconds.
        sim.skip(10_000_000);
        assert_eq!(sim.shard.population().2, 0, "all are over in that one turn");
        let finished = sim.finish();
        assert_eq!(finished.sim.records.len(), 4);
    }
}

// ---- heartbeats and the early commit

#[test]
fn heartbeats_fill_silence_at_event_boundaries_only() {
    for dialect in Dialect::ALL {
        let answer = Answer { prefill_us: 40_000_000, ..Answer::events(3) };
        let (outcome, finished) = one(calm(), Request::new(dialect, true), answer);
        assert_eq!(outcome, Outcome::Complete, "{dialect:?}");
        assert_eq!(finished.sim.shard.stats().counters.heartbeats, 2, "at 15 s and 30 s");
        // The silence falls into the middle of an event: its first half waits, and heartbeats go out in front of it.
        let answer = Answer { fault: Fault::Stall(500), ..Answer::events(3) };
        let (outcome, finished) = one(calm(), Request::new(dialect, true), answer);
        assert!(matches!(outcome, Outcome::EventsThenError(_, code) if code == "between_tokens_timeout"));
        assert_eq!(finished.sim.shard.stats().counters.heartbeats, 3, "at 15 s, 30 s and 45 s");
    }
}

#[test]
fn a_long_prefill_is_committed_early_and_its_late_error_is_told_in_band() {
    let answer = Answer { head_delay_us: 40_000_000, ..Answer::events(3) };
    let (outcome, finished) = one(calm(), chat(), answer);
    assert_eq!(outcome, Outcome::Complete);
    let counters = &finished.sim.shard.stats().counters;
    assert_eq!((counters.early_commits, counters.heartbeats), (1, 3), "at 10 s, 25 s and 40 s");

    let answer = Answer { head_delay_us: 40_000_000, status: 500, ..Answer::body(100, Framed::Length) };
    let mut sim = calm();
    sim.lenience.impatient = true;
    sim.ask(chat(), answer);
    let finished = sim.finish();
    assert!(matches!(finished.outcomes[0][0], Outcome::EventsThenError(0, _)));
    assert_end(&finished, End::UpstreamStatus);
}

// ---- backends that fail

#[test]
fn every_way_to_break_a_stream_is_told_and_counted() {
    for dialect in [Dialect::Chat, Dialect::Completions, Dialect::Responses, Dialect::Messages] {
        for (fault, end) in [
            (Fault::Cut(500), End::UpstreamTruncated),
            (Fault::Reset(500), End::UpstreamReset),
            (Fault::Garbage(500), End::UpstreamMalformed),
            (Fault::NoEndMark, End::UpstreamTruncated),
            (Fault::InBandError, End::UpstreamError),
        ] {
            let answer = Answer { fault, piece_bytes: 30, gap_us: 100, ..Answer::events(20) };
            let (outcome, finished) = one(calm(), Request::new(dialect, true), answer);
            assert!(matches!(outcome, Outcome::EventsThenError(..)), "{dialect:?} {fault:?}: {outcome:?}");
            assert_end(&finished, end);
        }
    }
}

#[test]
fn an_ordinary_body_that_breaks_off_is_visibly_cut() {
    for framed in [Framed::Length, Framed::Chunked, Framed::Close] {
        for http10 in [false, true] {
            for fault in [Fault::Reset(500), Fault::Cut(500)] {
                if framed == Framed::Close && fault == Fault::Cut(500) {
                    continue;
                }
                // In pieces: a reset takes the last of them along.
                let answer =
                    Answer { fault, piece_bytes: 5_000, gap_us: 5_000, ..Answer::body(50_000, framed) };
                let (outcome, _) = one(calm(), Request { http10, ..plain("GET") }, answer);
                assert!(matches!(outcome, Outcome::BodyCut(_)), "{framed:?} {http10} {fault:?}: {outcome:?}");
            }
        }
    }
}

#[test]
fn an_end_mark_without_the_last_chunk_is_an_end() {
    for fault in [Fault::NoLastChunk, Fault::Stall(999)] {
        let (_, finished) = one(calm(), chat(), Answer { fault, ..Answer::events(5) });
        assert_end(&finished, End::Done);
        assert_eq!(finished.sim.shard.stats().counters.unclean_ends, 1, "{fault:?}");
        assert_eq!(finished.sim.world().clients[0].reader.complete(), 1);
    }
    // A reset may take what was sent before it along.
    let ends = (0..10).map(|seed| {
        let sim = Sim::new(seed, settings(), vec![BackendHost::new(0)]);
        let (_, finished) = one(sim, chat(), Answer { fault: Fault::Reset(999), ..Answer::events(5) });
        let done = finished.ends(End::Done);
        assert_eq!(finished.sim.shard.stats().counters.unclean_ends, done);
        assert_eq!(finished.ends(End::UpstreamReset), 1 - done);
        done
    });
    assert!((1..10).contains(&ends.sum::<u64>()));
}

#[test]
fn nothing_follows_an_end_mark_not_even_at_the_total_deadline() {
    let sim = deadlines(|deadlines| {
        deadlines.total_ms = 1_000;
        deadlines.finish_ms = 5_000;
    });
    let (_, finished) = one(sim, chat(), Answer { fault: Fault::Stall(999), ..Answer::events(5) });
    assert_end(&finished, End::Done);
}

#[test]
fn a_reused_connection_that_has_died_is_made_up_for_once() {
    let mut sim = calm();
    sim.world().hosts[0].idle_us = 1;
    sim.world().faults.delay_us = 2_000;
    let mut ids = Vec::new();
    for _ in 0..40 {
        ids.push(sim.exchange(plain("GET"), Answer::body(100, Framed::Length)));
    }
    sim.client(ClientPlan::new(&ids));
    let finished = sim.finish();
    assert_eq!(finished.outcomes[0], vec![Outcome::Complete; 40]);
    let counters = &finished.sim.shard.stats().counters;
    assert!(counters.upstream_retries > 0, "some died under their request: {counters:?}");
}

#[test]
fn a_fresh_connection_that_answers_nothing_is_not_tried_again() {
    let (outcome, finished) = one(calm(), chat(), Answer { fault: Fault::NoAnswer, ..Answer::events(1) });
    assert_eq!(outcome, Outcome::Error(502, "upstream_truncated".to_owned()));
    assert_eq!(finished.sim.shard.stats().counters.upstream_connects, 1);
}

#[test]
fn kept_alive_backends_are_reused_and_their_time_is_limited() {
    let mut sim = sim_with(|settings| settings.pool_idle_ms = 2_000);
    let ids: Vec<usize> = (0..5).map(|_| sim.exchange(chat(), Answer::events(2))).collect();
    sim.client(ClientPlan::new(&ids));
    sim.run();
    sim.run_ms(3_000);
    assert_eq!(sim.shard.population().1, 0, "the idle one is gone");
    let finished = sim.finish();
    let counters = &finished.sim.shard.stats().counters;
    assert_eq!((counters.upstream_connects, counters.upstream_reuses, counters.pool_evictions), (1, 4, 1));
}

#[test]
fn connections_that_are_still_closing_leave_room_for_the_next() {
    let mut sim = sim_with(|settings| (settings.connections_max, settings.pool_idle_max) = (1, 0));
    sim.world().faults.cancel_late_us = 5_000;
    for _ in 0..20 {
        let ids: Vec<usize> =
            (0..3).map(|_| sim.exchange(chat(), Answer { head_delay_us: 0, ..Answer::events(1) })).collect();
        sim.client(ClientPlan::new(&ids));
    }
    let finished = sim.finish();
    assert!(finished.outcomes.iter().flatten().all(|outcome| *outcome == Outcome::Complete));
}

#[test]
fn a_backend_whose_name_is_gone_is_made_up_for_by_another() {
    let mut retries = 0;
    for at_us in (0..20_000).step_by(500) {
        let ask = Ask {
            request: plain("GET"),
            answer: Answer { head_delay_us: 0, ..Answer::body(100, Framed::Length) },
        };
        let host = |upstream| BackendHost { upstream, idle_us: 1, ..BackendHost::default() };
        let mut script = Script {
            hosts: vec![host(0), host(1)],
            clients: vec![ClientScript { asks: vec![ask; 20], ..ClientScript::default() }],
            // First the one has an address, then the other: often just when a connection turns out to be dead.
            orders: (0..100).map(|nth| (at_us + nth as u64 * 700, Order::Hosts(vec![nth % 2]))).collect(),
            ..Script::default()
        };
        script.faults.delay_us = 2_000;
        let finished = script.run(With::NoBug);
        assert_eq!(finished.outcomes[0], vec![Outcome::Complete; 20], "{at_us}");
        retries += finished.sim.shard.stats().counters.upstream_retries;
    }
    assert!(retries > 10, "{retries}");
}

#[test]
fn reports_that_find_no_room_are_dropped_and_counted() {
    let ask = Ask { request: plain("GET"), answer: Answer::body(100, Framed::Length) };
    let script = Script {
        clients: vec![ClientScript { asks: vec![ask; 10], ..ClientScript::default() }],
        orders: vec![
            (0, Order::Deaf { for_us: 3_600_000_000 }),
            (0, Order::Snapshots(8)),
            (1, Order::Drain { deadline_ms: 60_000 }),
        ],
        commands_max: 4,
        reports_max: 3,
        ..Script::default()
    };
    let finished = script.run(With::NoBug);
    assert!(finished.sim.world().control.refused >= 4, "the mailbox was full");
    assert!(finished.sim.shard.stats().counters.records_dropped >= 2);
    assert_eq!(finished.sim.forced, Some(0), "that it left is said all the same");
}

#[test]
fn a_slow_reader_that_goes_on_acknowledging_is_not_stalled() {
    let mut sim = deadlines(|deadlines| deadlines.write_stall_ms = 2_000);
    let id = sim.exchange(plain("GET"), Answer::body(300_000, Framed::Length));
    let pace = Pace::Slow { bytes: 2_000, every_us: 400_000 };
    sim.client(ClientPlan { pace, ..ClientPlan::new(&[id]) });
    let finished = sim.finish();
    assert_eq!(finished.outcomes[0][0], Outcome::Complete, "one send takes far longer than the deadline");
}

// ---- clients that leave

#[test]
fn a_client_that_leaves_takes_its_backend_with_it() {
    for how in [How::Close, How::Reset] {
        for (prefill_us, head_delay_us) in [(0, 50_000_000), (50_000_000, 0), (0, 0)] {
            let mut sim = calm();
            let answer =
                Answer { prefill_us, head_delay_us, piece_bytes: 10, gap_us: 300_000, ..Answer::events(200) };
            let id = sim.exchange(chat(), answer);
            let leave = Some((When::AtUs(3_000_000), how));
            sim.client(ClientPlan { leave, ..ClientPlan::new(&[id]) });
            let finished = sim.finish();
            assert_end(&finished, End::ClientLeft);
            let world = finished.sim.world();
            let ended_us = world.sockets[world.exchanges[id].attempts[0].socket].ended_us;
            assert!(ended_us.is_some_and(|us| us < 4_100_000), "{how:?}: {ended_us:?}");
        }
    }
}

#[test]
fn a_half_closed_client_is_served_where_the_route_says_so() {
    for (half_close, expected) in
        [(HalfClose::Serve, Outcome::Complete), (HalfClose::Leave, Outcome::Nothing)]
    {
        let mut sim = sim_with(|settings| settings.routes[1].half_close = half_close);
        let id = sim.exchange(chat(), Answer { head_delay_us: 1_000_000, ..Answer::events(3) });
        let leave = Some((When::Written, How::HalfClose));
        sim.client(ClientPlan { leave, ..ClientPlan::new(&[id]) });
        let finished = sim.finish();
        assert_eq!(finished.outcomes[0][0], expected);
    }
    let mut sim = calm();
    let id =
        sim.exchange(plain("GET"), Answer { head_delay_us: 1_000_000, ..Answer::body(10, Framed::Length) });
    sim.client(ClientPlan { leave: Some((When::Written, How::HalfClose)), ..ClientPlan::new(&[id]) });
    assert_eq!(sim.finish().outcomes[0][0], Outcome::Complete, "what does not stream is always served");
}

#[test]
fn a_pipelined_request_that_a_fin_cuts_is_given_up() {
    let mut sim = calm();
    let id =
        sim.exchange(plain("GET"), Answer { head_delay_us: 500_000, ..Answer::body(10, Framed::Length) });
    let (mut raw, _) = sim.world().exchanges[id].request.clone().wire(id, &mut crate::rng::Rng::new(1));
    raw.extend_from_slice(
        b"PUT /files/any HTTP/1.1\r\nHost: a\r\nX-Sim: 1\r\nContent-Length: 1000\r\n\r\nhalf",
    );
    sim.exchange(Request { body_bytes: 1000, ..plain("PUT") }, Answer::body(1, Framed::Length));
    sim.world().exchanges[1].body = b"half".to_vec();
    let leave = Some((When::Written, How::HalfClose));
    sim.client(ClientPlan { raw: Some(raw), leave, ..ClientPlan::new(&[]) });
    let finished = sim.finish();
    assert_eq!((finished.ends(End::Done), finished.ends(End::ClientLeft)), (1, 1));
    assert!(ended_us(&finished, 0) < 2_000_000, "not by a deadline");
}

#[test]
fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let mut sim = calm();
    let request = Request { body_bytes: 400_000, ..plain("PUT") };
    let answer = Answer { early_after: Some(1000), status: 503, ..Answer::body(100, Framed::Length) };
    let id = sim.exchange(request, answer);
    sim.client(ClientPlan { write_bytes: 2_000, write_gap_us: 500, ..ClientPlan::new(&[id]) });
    let finished = sim.finish();
    assert_eq!(finished.outcomes[0][0], Outcome::Complete);
}

#[test]
fn a_demo_answer_to_a_large_request_streams() {
    for body_bytes in [100, 500_000] {
        for dialect in [Dialect::Chat, Dialect::Messages, Dialect::Responses, Dialect::Completions] {
            let request = Request { demo: true, body_bytes, ..Request::new(dialect, true) };
            let (outcome, finished) = one(calm(), request, Answer::events(0));
            assert_eq!(outcome, Outcome::Complete);
            assert_end(&finished, End::Done);
        }
    }
}

// ---- slow readers

#[test]
fn lag_pauses_and_resumes_the_backend() {
    let mut sim = calm();
    let id = sim.exchange(chat(), Answer { bytes: 2000, ..Answer::events(500) });
    let pace = Pace::Slow { bytes: 20_000, every_us: 10_000 };
    sim.client(ClientPlan { pace, ..ClientPlan::new(&[id]) });
    let finished = sim.finish();
    assert_eq!(finished.outcomes[0][0], Outcome::Complete);
    let counters = &finished.sim.shard.stats().counters;
    assert!(counters.pauses > 3, "{}", counters.pauses);
    let sim = &finished.sim;
    assert!(sim.lag_max <= sim.settings.lag_high_bytes + 40_000, "{}", sim.lag_max);
}
