//! Runs drawn whole from a seed: how many peers, what they do, and how ill the machine behaves.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, How, Pace, When};
use crate::plan::{Answer, Fault, Framed, Request};
use crate::rng::Rng;
use crate::run::{Finished, Sim, settings};
use crate::world::{Faults, Planted};
use protocol::dialect::Dialect;
use shard::settings::HalfClose;

fn faults(rng: &mut Rng) -> Faults {
    let sometimes =
        |rng: &mut Rng, high: u32| if rng.chance(500) { rng.below(u64::from(high)) as u32 } else { 0 };
    // Many small steps must not add up to deadlines.
    let tiny = rng.chance(200);
    Faults {
        delay_us: if tiny { rng.pick(&[0, 20]) } else { rng.pick(&[0, 50, 2_000, 20_000]) },
        receive_bytes: if tiny { rng.pick(&[8, 64, 300]) } else { rng.pick(&[0, 0, 4096]) },
        receive_rearm: sometimes(rng, 300),
        receive_no_buffer: sometimes(rng, 200),
        send_piecewise: sometimes(rng, 1000),
        send_short: sometimes(rng, 500),
        send_late: sometimes(rng, 500),
        cancel_late_us: rng.pick(&[0, 0, 100, 5_000]),
        reorder: sometimes(rng, 1000),
        accept_error: sometimes(rng, 300),
        accept_ends: sometimes(rng, 300),
        connect_refused: if rng.chance(200) { 300 } else { 0 },
        connect_hangs: if rng.chance(100) { 100 } else { 0 },
        socket_error: if rng.chance(100) { 100 } else { 0 },
        overshoot_us: rng.pick(&[0, 0, 300, 20_000]),
        work_us: rng.pick(&[0, 10, 500]),
        turn_completions: rng.pick(&[0, 0, 0, 2, 20]),
    }
}

fn answer(rng: &mut Rng, request: &Request, faulty: u32) -> Answer {
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
    answer.interim = if rng.chance(100) { rng.below(9) as u32 } else { 0 };
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
        answer.fault = match rng.below(10) {
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
            9 => rng.pick(&[Fault::BadHead, Fault::NoAnswer]),
            _ => Fault::Cut(at),
        };
        // Without a length or an end mark, a cut cannot be told from an end.
        let tellable = answer.framed != Framed::Close || (streams && request.dialect.has_end_mark());
        let bodiless = answer.status == 204 || request.method == "HEAD";
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

fn request(rng: &mut Rng) -> Request {
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
        request.method = rng.pick(&["GET", "PUT", "POST", "HEAD", "GET"]);
        if request.method == "HEAD" {
            request.streaming = false;
        }
        if matches!(request.method, "GET" | "HEAD") {
            (request.chunked, request.expect) = (false, false);
        }
    }
    request
}

fn client_plan(rng: &mut Rng, exchanges: &[usize]) -> ClientPlan {
    let mut plan = ClientPlan::new(exchanges);
    plan.start_us = rng.skewed(3_000_000);
    plan.pipelined = rng.chance(200);
    plan.write_bytes = rng.pick(&[1 << 20, 1 << 20, 2_000, 100]);
    plan.write_gap_us = rng.pick(&[0, 0, 100, 2_000]);
    plan.idle_us = if rng.chance(100) { rng.skewed(100_000_000) } else { 0 };
    plan.pace = match rng.below(10) {
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

pub(crate) fn random_run(seed: u64, planted: Option<Planted>) -> Finished {
    let mut rng = Rng::new(seed);
    let mut settings = settings();
    settings.connections_max = rng.pick(&[1, 3, 20, 1000]);
    settings.backlog = rng.pick(&[1, 16, 128]);
    settings.buffers = rng.pick(&[1, 4, 64]);
    settings.buffer_bytes = rng.pick(&[256, 4096, 16_384]);
    settings.lag_high_bytes = rng.pick(&[4_096, 65_536]);
    settings.lag_low_bytes = settings.lag_high_bytes / 4;
    settings.pool_idle_max = rng.pick(&[0, 1, 8]);
    settings.pool_idle_ms = rng.pick(&[5, 1_000, 30_000]);
    settings.pool_age_ms = rng.pick(&[0, 0, 500]);
    let half_close = rng.pick(&[HalfClose::Leave, HalfClose::Serve]);
    for route in &mut settings.routes {
        route.half_close = half_close;
        route.deadlines.between_tokens_ms = 60_000;
        route.heartbeat_ms = rng.pick(&[15_000, 15_000, 100, 0]);
        route.commit_ms = rng.pick(&[0, 10_000, 500]);
    }
    let impatient = rng.chance(100);
    if impatient {
        for route in &mut settings.routes {
            let deadlines = &mut route.deadlines;
            for deadline in [
                &mut deadlines.head_ms,
                &mut deadlines.body_ms,
                &mut deadlines.connect_ms,
                &mut deadlines.upstream_head_ms,
                &mut deadlines.first_token_ms,
                &mut deadlines.between_tokens_ms,
                &mut deadlines.total_ms,
                &mut deadlines.write_stall_ms,
                &mut deadlines.keep_alive_ms,
                &mut deadlines.finish_ms,
            ] {
                *deadline = rng.skewed(5_000) as u32 + 1;
            }
        }
    }
    let hosts: Vec<BackendHost> = (0..rng.range(1, 3) as u16)
        .map(|nth| {
            let mut host = BackendHost::new(nth);
            host.idle_us = if rng.chance(300) { rng.skewed(10_000_000) } else { 0 };
            host.read_bytes = rng.pick(&[1 << 20, 4096, 500]);
            host.read_gap_us = rng.pick(&[0, 0, 1_000]);
            host
        })
        .collect();
    let faults = faults(&mut rng);
    if (1..1000).contains(&faults.receive_bytes) {
        // Hundreds of thousands of receives that find no buffer would prove nothing.
        settings.buffers = settings.buffers.max(4);
    }
    let faulty = rng.pick(&[0, 0, 200, 700]);
    let listeners = rng.range(1, 2) as usize;
    let mut sim = Sim::with_listeners(rng.next(), settings, hosts, listeners);
    if seed.is_multiple_of(5) {
        sim = sim.beside_a_mirror();
    }
    sim.world().faults = faults;
    sim.world().planted = planted;
    sim.world().pipe_bytes = rng.pick(&[2_000, 16_000, 64 << 10]);
    if sim.world().pipe_bytes == 2_000 || sim.settings.buffer_bytes == 256 {
        // Else the delays of many small steps add up to deadlines.
        let delay_us = sim.world().faults.delay_us.min(50);
        sim.world().faults.delay_us = delay_us;
    }
    sim.lenience.any_answer_may_fail = impatient;
    for _ in 0..rng.skewed(30) + 1 {
        let ids: Vec<usize> = (0..rng.skewed(5) + 1)
            .map(|_| {
                let request = request(&mut rng);
                let answer = answer(&mut rng, &request, faulty);
                sim.exchange(request, answer)
            })
            .collect();
        let plan = client_plan(&mut rng, &ids);
        sim.client(plan);
    }
    if rng.chance(200) {
        sim.lenience.any_answer_may_fail = true;
        sim.run_ms(rng.skewed(5_000));
        if rng.chance(300) {
            sim.stop();
        } else {
            sim.drain(rng.skewed(20_000));
        }
        sim.run_until_left();
        sim.settle();
        return sim.check();
    }
    sim.finish()
}

/// Says which seed failed.
pub(crate) struct Blame(pub(crate) u64);

impl Drop for Blame {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "FAILING SEED: {} (SIM_SEED={} cargo test -p tokenring-tests --test sim seed_of_env)",
                self.0, self.0
            );
        }
    }
}

#[test]
fn random_runs() {
    for seed in 0..1_000 {
        let _blame = Blame(seed);
        random_run(seed, None);
    }
}

/// `SIM_SEED` runs that one; CI sets it from the commit's hash.
#[test]
fn seed_of_env() {
    let seed = std::env::var("SIM_SEED").ok().and_then(|text| {
        let digits = text.trim();
        digits.parse().ok().or_else(|| u64::from_str_radix(digits.get(..12).unwrap_or(digits), 16).ok())
    });
    let first: u64 = seed.unwrap_or(1_000_000);
    let count = if seed.is_some() {
        std::env::var("SIM_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
    } else {
        1
    };
    for seed in first..first + count {
        let _blame = Blame(seed);
        let finished = random_run(seed, None);
        if count == 1 {
            println!("seed {seed}: {:#?}", finished.outcomes);
        }
    }
}

#[test]
fn a_seed_replays_bit_for_bit() {
    for seed in [3, 17, 99, 256] {
        let _blame = Blame(seed);
        let traces = [0, 1].map(|_| random_run(seed, None).sim.world().trace);
        assert_eq!(traces[0], traces[1]);
    }
}
