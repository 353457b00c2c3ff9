//! Runs drawn whole from a seed: how many peers, what they do, and how ill the machine behaves. Most faults are wholly off
//! in most runs, and frequent in some.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, Pace, When};
use crate::control::Order;
use crate::minimise::{failure, report};
use crate::plan::{Answer, Fault, Framed, Method, Request};
use crate::rng::Rng;
use crate::run::{Finished, Outcome};
use crate::script::{Ask, ClientScript, Script, Times, Tuning, With};
use crate::world::Faults;
use protocol::dialect::Dialect;
use serde_json::Value;

/// A probability, per mille: none at all in half of all runs, rare in some, up to `high` in the rest.
fn swarm(rng: &mut Rng, high: u32) -> u32 {
    match rng.below(10) {
        0..=4 => 0,
        5..=6 => rng.below(u64::from(high / 20 + 2)) as u32,
        _ => rng.below(u64::from(high)) as u32,
    }
}

pub(crate) fn faults(rng: &mut Rng) -> Faults {
    // Many small steps must not add up to deadlines.
    let tiny = rng.chance(200);
    let seldom = |rng: &mut Rng, high: u32| if rng.chance(250) { swarm(rng, high) } else { 0 };
    Faults {
        delay_us: if tiny { rng.pick(&[0, 20]) } else { rng.pick(&[0, 50, 2_000, 20_000]) },
        receive_bytes: if tiny { rng.pick(&[8, 64, 300]) } else { rng.pick(&[0, 0, 4096]) },
        receive_rearm: swarm(rng, 300),
        receive_no_buffer: swarm(rng, 200),
        hangup_ends: swarm(rng, 700),
        send_piecewise: swarm(rng, 1000),
        send_short: swarm(rng, 500),
        send_nothing: swarm(rng, 500),
        send_fails: seldom(rng, 40),
        send_late: swarm(rng, 500),
        cancel_late_us: rng.pick(&[0, 0, 100, 5_000, 2_000_000]),
        reorder: swarm(rng, 1000),
        accept_error: swarm(rng, 300),
        accept_aborts: seldom(rng, 300),
        accept_ends: swarm(rng, 300),
        connect_refused: if rng.chance(200) { 300 } else { 0 },
        connect_hangs: if rng.chance(100) { 100 } else { 0 },
        socket_error: if rng.chance(100) { 100 } else { 0 },
        break_every_us: if rng.chance(200) { rng.pick(&[5_000, 200_000, 5_000_000]) } else { 0 },
        overshoot_us: rng.pick(&[0, 0, 300, 20_000]),
        jump_us: if rng.chance(150) { rng.pick(&[300_000, 5_000_000, 600_000_000]) } else { 0 },
        work_us: rng.pick(&[0, 10, 500]),
        stall_us: 0,
        turn_completions: rng.pick(&[0, 0, 0, 2, 20]),
    }
}

pub(crate) fn answer(rng: &mut Rng, request: &Request, faulty: u32) -> Answer {
    let mut answer = if request.streaming {
        Answer::events(rng.skewed(60) as u32)
    } else {
        let high = rng.pick(&[100, 5_000, 300_000]);
        Answer::body(rng.skewed(high) as usize, Framed::Length)
    };
    if rng.chance(100) {
        // An error status, with an ordinary body.
        answer = Answer { status: rng.pick(&[204, 400, 429, 500, 503]), ..Answer::body(200, Framed::Length) };
    }
    answer.framed = rng.pick(&[Framed::Chunked, Framed::Chunked, Framed::Length, Framed::Close]);
    answer.interim = if rng.chance(100) { rng.below(10) as u32 } else { 0 };
    if answer.events.is_some() {
        answer.bytes = rng.pick(&[10, 10, 40, 500, 5_000, 40_000]);
    }
    answer.head_delay_us = rng.pick(&[0, 100, 20_000, 2_000_000]);
    answer.piece_bytes = rng.pick(&[1 << 20, 1 << 20, 4096, 200, 30]);
    answer.gap_us = rng.pick(&[0, 0, 500, 20_000]);
    answer.prefill_us = rng.pick(&[0, 0, 1_000_000, 40_000_000]);
    let wire = answer.bytes * answer.events.unwrap_or(1).max(1) as usize;
    if wire / answer.piece_bytes.max(1) > 5_000 {
        answer.piece_bytes = 4096;
    }
    answer.closes_silently = rng.chance(100);
    answer.crlf = rng.chance(200);
    answer.comments = rng.chance(200);
    if request.body_bytes > 2000 && rng.chance(100) {
        answer.early_after = Some(rng.below(request.body_bytes as u64) as usize);
    }
    if rng.chance(faulty) {
        let at = rng.below(1000) as u32;
        let streams = answer.events.is_some();
        answer.fault = match rng.below(14) {
            0 | 1 => Fault::Cut(at),
            2 | 3 => Fault::Reset(at),
            4 => Fault::Stall(at),
            5 => {
                answer.framed = Framed::Chunked;
                Fault::Garbage(at)
            }
            6 if streams && request.dialect.has_end_mark() => Fault::NoEndMark,
            7 if streams => {
                if request.dialect.has_end_mark() && answer.framed == Framed::Chunked {
                    Fault::NoLastChunk
                } else {
                    Fault::Reset(at)
                }
            }
            8 if streams && request.dialect.has_end_mark() => Fault::InBandError,
            8 => Fault::NoAnswer,
            9 => rng.pick(&[Fault::BadHead(at), Fault::NoAnswer]),
            10 => Fault::BadHead(at),
            11 if answer.framed != Framed::Close => Fault::LongLength,
            12 if streams => {
                answer.piece_bytes = 1 << 20;
                Fault::EndlessEvent(at)
            }
            13 if !streams && answer.framed == Framed::Length && answer.status == 200 => {
                Fault::ShortLength(at)
            }
            _ => Fault::Cut(at),
        };
        // Without a length or an end mark, a cut cannot be told from an end.
        let tellable = answer.framed != Framed::Close || (streams && request.dialect.has_end_mark());
        let bodiless = answer.status == 204 || request.method == Method::Head;
        let empty = !streams && answer.bytes == 0 && answer.framed == Framed::Length;
        if matches!(answer.fault, Fault::Cut(_)) && !tellable {
            answer.fault = Fault::Reset(at);
        }
        if bodiless || empty || (answer.framed == Framed::Close && matches!(answer.fault, Fault::Stall(_))) {
            answer.fault = Fault::None;
        }
    }
    answer
}

pub(crate) fn request(rng: &mut Rng) -> Request {
    let dialect = rng.pick(&Dialect::ALL);
    let mut request = Request::new(dialect, rng.chance(700));
    request.body_bytes = rng.pick(&[60, 60, 300, 3_000, 200_000]);
    request.chunked = rng.chance(200);
    request.expect = rng.chance(100);
    request.http10 = rng.chance(100);
    if request.http10 {
        (request.chunked, request.expect) = (false, false);
    }
    request.close = rng.chance(100);
    request.demo = dialect.is_model_endpoint() && rng.chance(50);
    if dialect == Dialect::Plain {
        request.method = rng.pick(&[Method::Get, Method::Put, Method::Post, Method::Head, Method::Get]);
        if request.method == Method::Head {
            request.streaming = false;
        }
        if matches!(request.method, Method::Get | Method::Head) {
            (request.chunked, request.expect) = (false, false);
        }
    }
    request
}

pub(crate) fn client_plan(rng: &mut Rng, asks: &[Ask]) -> ClientPlan {
    let mut plan = ClientPlan::new(&[]);
    plan.start_us = rng.skewed(3_000_000);
    plan.pipelined = rng.chance(200);
    let large = asks.iter().any(|ask| ask.request.body_bytes > 3_000);
    let slow = asks.iter().all(|ask| ask.answer.bytes * ask.answer.events.unwrap_or(1) as usize <= 3_000);
    plan.write_bytes = rng.pick(&[1 << 20, 1 << 20, 2_000, if large { 1_000 } else { 100 }]);
    plan.write_gap_us = rng.pick(&[0, 0, 100, 2_000]);
    plan.idle_us = if rng.chance(100) { rng.skewed(100_000_000) } else { 0 };
    plan.pace = match rng.below(10) {
        // A trickle: for minutes on end.
        0 if slow => Pace::Slow { bytes: rng.range(30, 300) as usize, every_us: rng.skewed(2_000_000) + 1 },
        0 | 1 => Pace::Slow { bytes: rng.range(1_000, 20_000) as usize, every_us: rng.skewed(20_000) + 1 },
        2 => Pace::Stuck {
            after_bytes: rng.skewed(20_000) as usize,
            for_us: rng.pick(&[10_000, 5_000_000, 30_000_000, 90_000_000]),
        },
        _ => Pace::Eager,
    };
    if rng.chance(250) {
        let how = rng.pick(&[How::Close, How::Close, How::Reset, How::HalfClose]);
        let when = match rng.below(4) {
            0 => When::Written,
            1 => When::Bytes(rng.skewed(20_000) as usize + 1),
            _ => When::AtUs(rng.skewed(5_000_000)),
        };
        plan.leave = Some((when, how));
    }
    plan
}

fn orders(rng: &mut Rng, hosts: usize) -> Vec<(u64, Order)> {
    let mut orders = Vec::new();
    if rng.chance(300) {
        for _ in 0..rng.skewed(20) + 1 {
            // Mostly a change that leaves nobody without an address.
            let all: Vec<usize> = (0..hosts).collect();
            let mut some = all.clone();
            if rng.chance(300) {
                some.retain(|_| rng.chance(600));
            }
            let at = rng.below(some.len() as u64 + 1) as usize;
            some.rotate_left(at);
            orders.push((rng.skewed(10_000_000), Order::Hosts(some)));
        }
    }
    if rng.chance(200) {
        orders.push((rng.skewed(5_000_000), Order::Deaf { for_us: rng.skewed(100_000_000) }));
        orders.push((rng.skewed(10_000_000), Order::Snapshots(rng.skewed(400))));
    }
    if rng.chance(250) {
        for _ in 0..rng.range(1, 3) {
            let order =
                if rng.chance(300) { Order::Stop } else { Order::Drain { deadline_ms: rng.skewed(100_000) } };
            orders.push((rng.skewed(8_000_000), order));
        }
    }
    orders
}

fn tuning(rng: &mut Rng) -> Tuning {
    let mut tuning = Tuning {
        connections_max: rng.pick(&[1, 3, 20, 1000]),
        backlog: rng.pick(&[1, 16, 128]),
        buffers: rng.pick(&[1, 4, 64]),
        buffer_bytes: rng.pick(&[256, 4096, 16_384]),
        lag_high_bytes: rng.pick(&[4_096, 65_536]),
        pool_idle_max: rng.pick(&[0, 1, 8]),
        pool_idle_ms: rng.pick(&[5, 1_000, 30_000]),
        pool_age_ms: rng.pick(&[0, 0, 500]),
        serves_half_closed: rng.chance(500),
        heartbeat_ms: rng.pick(&[15_000, 15_000, 100, 0]),
        commit_ms: rng.pick(&[0, 10_000, 500]),
        times: Times::default(),
    };
    if rng.chance(100) {
        let times = &mut tuning.times;
        for time in [
            &mut times.head_ms,
            &mut times.body_ms,
            &mut times.connect_ms,
            &mut times.upstream_head_ms,
            &mut times.first_token_ms,
            &mut times.between_tokens_ms,
            &mut times.total_ms,
            &mut times.write_stall_ms,
            &mut times.keep_alive_ms,
            &mut times.finish_ms,
        ] {
            *time = rng.skewed(5_000) as u32 + 1;
        }
    }
    tuning
}

/// The run of a seed.
pub(crate) fn draw(seed: u64) -> Script {
    let mut rng = Rng::new(seed);
    let mut tuning = tuning(&mut rng);
    let upstreams = rng.range(1, 3);
    // Connections of backends that die just as they are used again.
    let churn = rng.chance(200);
    let hosts: Vec<BackendHost> = (0..rng.range(upstreams, 4) as u16)
        .map(|nth| {
            let mut host = BackendHost::new(0);
            host.upstream = usize::from(nth) % upstreams as usize;
            host.idle_us = match rng.below(10) {
                _ if churn => rng.skewed(20_000) + 1,
                0..=2 => rng.skewed(10_000_000),
                _ => 0,
            };
            host.read_bytes = rng.pick(&[1 << 20, 4096, 500]);
            host.read_gap_us = rng.pick(&[0, 0, 1_000]);
            if rng.chance(100) {
                (host.dies_us, host.dead_us) = (rng.skewed(5_000_000) + 1, rng.skewed(30_000_000));
            }
            host
        })
        .collect();
    let mut faults = faults(&mut rng);
    if (1..1000).contains(&faults.receive_bytes) {
        // Hundreds of thousands of receives that find no buffer would prove nothing.
        tuning.buffers = tuning.buffers.max(4);
    }
    let faulty = rng.pick(&[0, 0, 200, 700]);
    let pipe_bytes = rng.pick(&[2_000, 16_000, 64 << 10]);
    if pipe_bytes == 2_000 || tuning.buffer_bytes == 256 {
        // Else the delays of many small steps add up to deadlines.
        faults.delay_us = faults.delay_us.min(50);
    }
    let clients = (0..rng.skewed(30) + 1)
        .map(|_| {
            let asks: Vec<Ask> = (0..rng.skewed(if churn { 20 } else { 5 }) + 1)
                .map(|_| {
                    let request = request(&mut rng);
                    let mut answer = answer(&mut rng, &request, faulty);
                    answer.closes_silently |= churn && rng.chance(300);
                    if churn && answer.events.is_some() && answer.fault == Fault::None && rng.chance(150) {
                        answer.fault = Fault::Reset(rng.below(1000) as u32);
                        answer.piece_bytes = answer.piece_bytes.min(answer.bytes.max(100));
                    }
                    Ask { request, answer }
                })
                .collect();
            ClientScript { plan: client_plan(&mut rng, &asks), asks }
        })
        .collect();
    let orders = orders(&mut rng, hosts.len());
    Script {
        seed: rng.next(),
        listeners: rng.range(1, 2) as usize,
        pipe_bytes,
        faults,
        tuning,
        hosts,
        clients,
        orders,
        commands_max: rng.pick(&[1, 4, 256]),
        reports_max: rng.pick(&[1, 10, 8192]),
    }
}

/// Thousands of streams at once.
fn draw_many(seed: u64, clients: u64) -> Script {
    let mut rng = Rng::new(seed);
    let mut script = draw(seed);
    script.hosts = vec![BackendHost::default(); 2];
    script.pipe_bytes = 16_000;
    script.orders.clear();
    script.tuning = Tuning { connections_max: 5_000, backlog: 2_000, buffers: 512, ..Tuning::default() };
    script.faults.delay_us = script.faults.delay_us.min(2_000);
    script.faults.break_every_us = 10_000;
    script.faults.jump_us = 0;
    script.faults.turn_completions = 0;
    script.faults.receive_bytes = 0;
    // A silent backend is the same in thousands of streams: it costs only time.
    script.faults.connect_hangs = 0;
    script.clients = (0..clients)
        .map(|_| {
            let request = Request::new(rng.pick(&Dialect::ALL), true);
            let fault = match rng.below(20) {
                0 => Fault::Cut(rng.below(1000) as u32),
                1 => Fault::Reset(rng.below(1000) as u32),
                2 => Fault::NoLastChunk,
                _ => Fault::None,
            };
            let fault = if request.dialect.has_end_mark() { fault } else { Fault::None };
            let answer = Answer {
                fault,
                head_delay_us: 3_000_000,
                piece_bytes: 300,
                gap_us: 50_000,
                ..Answer::events(rng.skewed(16) as u32)
            };
            let mut plan = ClientPlan { start_us: rng.below(2_000_000), ..ClientPlan::default() };
            plan.pace = match rng.below(10) {
                0 => Pace::Slow { bytes: 500, every_us: 20_000 },
                1 => Pace::Stuck { after_bytes: rng.below(500) as usize, for_us: 5_000_000 },
                _ => Pace::Eager,
            };
            if rng.chance(100) {
                plan.leave = Some((When::AtUs(rng.below(6_000_000)), rng.pick(&[How::Close, How::Reset])));
            }
            ClientScript { plan, asks: vec![Ask { request, answer }] }
        })
        .collect();
    script
}

/// Runs a seed; one that fails is made as small as it can be, and told.
fn run_seed(seed: u64) -> Finished {
    try_seed(seed).unwrap_or_else(|what| panic!("{what}"))
}

fn try_seed(seed: u64) -> Result<Finished, String> {
    let script = draw(seed);
    match failure(&script, With::NoBug) {
        Ok(finished) => Ok(finished),
        Err(failure) => {
            eprintln!(
                "FAILING SEED: {seed} (SIM_SEED={seed} cargo test -p tokenring-tests --test sim seed_of_env)"
            );
            eprintln!("{} at {}", failure.what, failure.place);
            Err(report(&script, With::NoBug, &failure))
        }
    }
}

#[test]
fn random_runs() {
    for seed in 0..1_000 {
        run_seed(seed);
    }
}

/// `SIM_SEED`: a number, or a commit's hash.
pub(crate) fn seed_asked_for() -> Option<u64> {
    let text = std::env::var("SIM_SEED").ok()?;
    let digits = text.trim();
    let hash = || u64::from_str_radix(digits.get(..12).unwrap_or(digits), 16);
    Some(digits.parse().or_else(|_| hash()).expect("SIM_SEED is a number, or a hash"))
}

/// `SIM_SEED` runs that one, and `SIM_RUNS` so many from there on, until `SIM_FAILURES` (1) of them have failed; CI sets it to
/// the commit's hash.
#[test]
fn seed_of_env() {
    let first = seed_asked_for().unwrap_or(1_000_000);
    let count = std::env::var("SIM_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1);
    let failures_max = std::env::var("SIM_FAILURES").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1);
    let mut failures = 0;
    for seed in first..first + count {
        match try_seed(seed) {
            Ok(finished) if count == 1 => println!("seed {seed}: {:#?}", finished.outcomes),
            Ok(_) => {}
            Err(what) => {
                println!("{what}");
                failures += 1;
            }
        }
        if failures == failures_max {
            break;
        }
    }
    assert!(failures == 0, "{failures} seeds fail");
}

/// The clock jumps over a stop's whole time before the next turn, with accepts still armed.
#[test]
fn the_clock_may_jump_over_the_time_of_a_stop() {
    run_seed(5_166_761_558_056);
}

/// Six megabytes, received eight bytes at a time at most, with two completions a turn.
#[test]
fn a_run_may_take_as_many_turns_as_it_has_to_carry() {
    let turns = run_seed(880_000_999).sim.turns;
    assert!(turns > 1_000_000, "{turns} turns are not many");
}

#[test]
fn a_seed_replays_bit_for_bit() {
    for seed in [3, 17, 99, 256] {
        let traces = [0, 1].map(|_| run_seed(seed).sim.world().trace);
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}

#[test]
fn thousands_of_streams_at_once() {
    for seed in [1, 2] {
        let script = draw_many(seed, 4_500);
        let finished = match failure(&script, With::NoBug) {
            Ok(finished) => finished,
            Err(failure) => panic!("seed {seed}: {}", report(&script, With::NoBug, &failure)),
        };
        let most = finished.sim.streams_max;
        assert!(most >= 4_000, "seed {seed}: {most} streams at once");
        let complete = finished.outcomes.iter().filter(|outcomes| outcomes[0] == Outcome::Complete).count();
        assert!(complete >= 3_000, "seed {seed}: {complete} were served whole");
    }
}

/// What once failed, or shows a planted bug, one file each: see `CONTRIBUTING.md`.
#[test]
fn committed_scripts_pass() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sim/scripts");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let value: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let script = Script::of_value(&value).unwrap_or_else(|| panic!("{path:?} is no script"));
        if let Err(failure) = failure(&script, With::NoBug) {
            panic!("{path:?}: {} at {}", failure.what, failure.place);
        }
        if let Some(bug) = value.get("finds").and_then(Value::as_str) {
            let with = With::all().find(|with| format!("{with:?}").contains(&format!("({bug})")));
            let with = with.unwrap_or_else(|| panic!("{path:?} finds {bug}, which is no bug"));
            assert!(failure(&script, with).is_err(), "{path:?} does not find {bug}");
        }
        count += 1;
    }
    assert!(count >= 3, "the scripts are not where they were");
}

/// What is committed of a script is the script.
#[test]
fn a_script_is_read_back_as_it_was_written() {
    for seed in 0..100 {
        let script = draw(seed);
        assert_eq!(Script::of_value(&script.to_value()), Some(script));
    }
}
