//! What clients and backends were owed, and whether they have it: the oracle at the end of a run, client by client.

use crate::client::{Client, Ended, How, Pace};
use crate::plan::{Fault, Method};
use crate::reader::{Frame, Message, read_events};
use crate::run::{Outcome, Sim};
use crate::world::World;
use protocol::dialect::Dialect;
use protocol::limits::{INTERIM_RESPONSES_MAX, LINGER_MS};
use shard::settings::HalfClose;

/// A clock that jumps by this much may let deadlines pass.
const JUMP_US_MIN: u64 = 500_000;
/// What a server says in a handshake: 590 bytes with the certificates here, and a little more in TLS 1.2.
const TLS_FLIGHT_BYTES: usize = 700;

impl Sim {
    /// Who has left visibly has had its backend stopped soon.
    pub(crate) fn check_departures(&self) {
        let world = self.world.borrow();
        let fin_leaves = self.settings.routes[1].half_close == HalfClose::Leave;
        for (id, exchange) in world.exchanges.iter().enumerate() {
            if exchange.left_how != Some(How::Reset) && !fin_leaves {
                continue;
            }
            let (Some(left_us), true) = (exchange.client_left_us, exchange.left_visibly) else { continue };
            if exchange.request.demo {
                continue;
            }
            for attempt in exchange.attempts.iter().filter(|attempt| !attempt.over) {
                let ended_us = world.sockets[attempt.socket].ended_us.unwrap_or(u64::MAX);
                let socket = exchange.left_socket.map(|socket| &world.sockets[socket]);
                let noticed_us = match socket.map_or((0, 0), |socket| (socket.served_us, socket.told_us)) {
                    // What came before the end has to be received first.
                    (served_us, 0) => left_us.max(served_us) + read_us(&world, exchange.left_unread),
                    (_, told_us) => left_us.max(told_us),
                };
                // A shard that is given few completions per turn has a queue of them.
                let queued_us = if world.faults.turn_completions > 0 { 1_000_000 } else { 0 };
                // Events on their way to the shard are late by at most the run's own delay, twice over.
                let limit = noticed_us
                    + 100_000
                    + 4 * world.faults.delay_us
                    + world.faults.overshoot_us
                    + world.jumped_us
                    + queued_us;
                assert!(
                    ended_us <= limit,
                    "exchange {id}: its client left at {left_us}, its backend's connection was closed at {ended_us}"
                );
            }
        }
    }

    /// What became of each of a client's exchanges, all of them judged.
    pub(crate) fn check_client(&self, index: usize) -> Vec<Outcome> {
        let world = self.world.borrow();
        let client = &world.clients[index];
        let who = format!("c{index} ({:?}, {:?})", client.ended, client.plan);
        assert!(client.reader.error.is_none(), "{who} cannot read its answer: {:?}", client.reader.error);
        if client.plan.raw.is_some() {
            return Vec::new();
        }
        let messages = &client.reader.messages;
        let asked = client.plan.exchanges.len();
        assert!(messages.len() <= asked, "{who} got {} answers to {asked} requests", messages.len());
        let mut outcomes: Vec<Outcome> = Vec::new();
        // A connection that ends with one answer leaves those behind it unanswered.
        let mut closing = false;
        for (nth, &id) in client.plan.exchanges.iter().enumerate() {
            let exchange = &world.exchanges[id];
            let who = format!("exchange {id} of {who}: {:?} {:?}", exchange.request, exchange.answer);
            let outcome = match messages.get(nth) {
                Some(message) => self.judge(&world, &who, id, message),
                None => Outcome::Nothing,
            };
            let told_status =
                matches!(&outcome, Outcome::EventsThenError(0, code) if code == "upstream_status");
            let committed_early = self.settings.routes[1].commit_ms > 0 && told_status;
            let excused = self.excused(&world, index, id, &outcome) || closing || committed_early;
            let failed = outcome != Outcome::Complete;
            assert!(!failed || excused, "{who} deserved its whole answer, and got {outcome:?}");
            if failed && !closing && client.ended == Some(Ended::Fin) && !client.half_closed {
                let jumped = client.jumped_us >= JUMP_US_MIN;
                let silent = matches!(outcome, Outcome::Nothing | Outcome::EventsCut(_));
                // An idle connection may be closed just as its next request is on its way.
                let leaving = world.control.leaving_us.is_some_and(|us| us < client.ended_us);
                let crossed = outcome == Outcome::Nothing
                    && (self.lenience.impatient || self.lenience.breach || leaving || jumped);
                let cut_by_stop = self.forced.is_some_and(|forced| forced > 0);
                // It was told so long ago that its connection has been closed since.
                let asleep = is_asleep(client, 50_000_000);
                assert!(
                    !silent || cut_by_stop || crossed || asleep,
                    "{who} was told nothing of its failure: {outcome:?}"
                );
            }
            if let Outcome::Error(_, code) | Outcome::EventsThenError(_, code) = &outcome
                && exchange.request.method != Method::Head
                && messages.get(nth).is_some_and(|message| message.complete)
            {
                assert!(self.plausible(&world, index, id, code), "{who} was told {code}");
            }
            closing |= failed
                || exchange.request.close
                || exchange.request.http10
                || exchange.answer.early_after.is_some()
                || messages.get(nth).is_some_and(|message| message.header("connection") == Some("close"));
            outcomes.push(outcome);
        }
        outcomes
    }

    /// Whether anything happened that allows this exchange not to be whole.
    fn excused(&self, world: &World, client: usize, id: usize, outcome: &Outcome) -> bool {
        let client = &world.clients[client];
        let exchange = &world.exchanges[id];
        let stays = matches!(client.ended, Some(Ended::Fin | Ended::Satisfied)) && !client.half_closed;
        let broken = client.socket.is_some_and(|socket| world.sockets[socket].broken);
        let forced = self.forced.is_some_and(|forced| forced > 0);
        // What has not begun when a shard leaves is refused, or its connection closed; what has is served.
        let left_out = matches!(outcome, Outcome::Nothing | Outcome::Error(503, _));
        let leaving = world.control.leaving_us.is_some_and(|us| us < client.ended_us);
        let code = match outcome {
            Outcome::Error(_, code) | Outcome::EventsThenError(_, code) => code.as_str(),
            _ => "",
        };
        // A connection to a backend may break within its handshake.
        let reset = matches!(code, "upstream_reset" | "upstream_truncated" | "upstream_tls" | "none" | "");
        let by_backend = !exchange.wire.whole
            || world.connects_failed > 0
            || world.control.unresolved
            || world.surplus_sent
            || reset && world.has_broken_backends();
        // Connections that are long in closing hold their slots, of which there are four per client.
        let closing = code == "overload" && self.has_few_slots(world);
        self.lenience.impatient
            || self.lenience.breach
            || self.lenience.outlives && matches!(code, "lagged" | "stream_stopped")
            || client.jumped_us >= JUMP_US_MIN
            || broken
            || closing
            || leaving && (forced || left_out)
            || !stays && client.ended != Some(Ended::Reset)
            || client.half_closed && (exchange.request.streaming || !client.has_sent(id))
            || !exchange.request.demo && by_backend
            || code == "body_timeout" && is_starved(world, exchange.request.body_bytes)
            // It went on sending behind its own `Connection: close`, and was answered by RST.
            || client.ended == Some(Ended::Reset)
                && client.plan.pipelined
                && (exchange.request.close || exchange.request.http10)
            // So it may be behind an answer that it has not read yet, if that is longer than a connection lingers.
            || client.ended == Some(Ended::Reset)
                && client.plan.pipelined
                && client.plan.exchanges.last() != Some(&id)
                && is_asleep(client, LINGER_MS * 1000)
            || exchange.answer.early_after.is_some()
            || is_asleep(client, 20_000_000)
            || *outcome == Outcome::Nothing && self.shakes_hands_slowly(world, client)
            || exchange.request.body_bytes as u64 + 500 > self.settings.retry_bytes_max
                && world.hosts.iter().any(|host| host.idle_us > 0)
            || client.plan.leave.is_some_and(|(_, how)| how == How::HalfClose) && exchange.request.streaming
    }

    /// Whether it reads what the shard says in a handshake for longer than a handshake may take.
    fn shakes_hands_slowly(&self, world: &World, client: &Client) -> bool {
        let us = match client.plan.pace {
            Pace::Slow { bytes, every_us } => TLS_FLIGHT_BYTES.div_ceil(bytes) as u64 * every_us,
            _ => 0,
        };
        world.tongues.clients.is_some() && us > u64::from(self.settings.tls_handshake_ms) * 1000
    }

    fn has_few_slots(&self, world: &World) -> bool {
        world.faults.cancel_late_us > 0 && self.settings.connections_max <= 20
    }

    /// Whether an error of this code may have been told.
    fn plausible(&self, world: &World, client: usize, id: usize, code: &str) -> bool {
        let exchange = &world.exchanges[id];
        let breach = self.lenience.breach && matches!(code, "plain_on_tls" | "upstream_tls");
        let by_fault: &[&str] = match exchange.answer.fault {
            Fault::Cut(_) | Fault::NoAnswer => &["upstream_truncated", "upstream_reset"],
            Fault::Reset(_) => &["upstream_reset", "upstream_truncated"],
            Fault::Stall(_) => &["between_tokens_timeout", "first_token_timeout", "upstream_head_timeout"],
            Fault::Garbage(_) | Fault::BadHead(_) | Fault::EndlessEvent(_) => &["upstream_malformed"],
            Fault::NoEndMark | Fault::LongLength => &["upstream_truncated", "upstream_reset"],
            Fault::InBandError => &["backend_says"],
            Fault::NoLastChunk | Fault::ShortLength(_) | Fault::None => &[],
        };
        let leaving = self.forced.is_some() && matches!(code, "drain" | "stopped");
        let connects = world.connects_failed > 0
            && matches!(code, "upstream_refused" | "connect_timeout" | "overload" | "no_upstream");
        let unresolved = world.control.unresolved && matches!(code, "no_upstream" | "upstream_refused");
        let late = code.ends_with("timeout") || code == "upstream_stalled";
        let starved = code == "body_timeout" && is_starved(world, exchange.request.body_bytes);
        let excused = self.lenience.impatient
            || is_asleep(&world.clients[client], 20_000_000)
            || world.clients[client].jumped_us >= JUMP_US_MIN;
        let broke = matches!(code, "upstream_reset" | "upstream_truncated");
        let dying = world.hosts.iter().any(|host| host.idle_us > 0) && broke;
        let broken = world.has_broken_backends() && broke;
        // What a backend said too much may have been taken for the answer to the next request.
        let surplus = world.surplus_sent && (late || broke || code == "upstream_malformed");
        let early = exchange.answer.early_after.is_some() && code == "upstream_reset";
        let status =
            code == "upstream_status" && (exchange.answer.status != 200 || exchange.answer.events.is_none());
        let interim = exchange.answer.interim > INTERIM_RESPONSES_MAX && code == "upstream_malformed";
        let closing = code == "overload" && self.has_few_slots(world);
        by_fault.contains(&code)
            || breach
            || starved
            || self.lenience.outlives && matches!(code, "lagged" | "stream_stopped")
            || world.has_broken_backends() && code == "upstream_tls"
            || closing
            || interim
            || leaving
            || connects
            || unresolved
            || excused && late
            || dying
            || broken
            || surplus
            || early
            || status
    }

    /// Compares an answer with what its backend meant.
    fn judge(&self, world: &World, who: &str, id: usize, message: &Message) -> Outcome {
        let exchange = &world.exchanges[id];
        let from_backend = message.header("x-sim-answer").is_some();
        let events = message.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
        if from_backend {
            assert_eq!(
                message.header("x-sim-answer"),
                Some(id.to_string().as_str()),
                "{who}: another's answer"
            );
            assert_eq!(message.status(), exchange.answer.status, "{who}: another status");
        }
        if exchange.request.method == Method::Head {
            return if from_backend || exchange.request.demo {
                Outcome::Complete
            } else {
                error_answer(who, message)
            };
        }
        if !events {
            if !from_backend && !exchange.request.demo {
                return error_answer(who, message);
            }
            if exchange.request.demo {
                return if message.complete {
                    Outcome::Complete
                } else {
                    Outcome::BodyCut(message.body.len())
                };
            }
            assert!(exchange.wire.body.starts_with(&message.body), "{who}: other bytes");
            let all = exchange.wire.body.len() == message.body.len();
            if message.complete && message.frame != Frame::Close {
                assert!(all, "{who}: a body that was cut looks whole");
                assert!(
                    exchange.wire.whole || exchange.wire.may_look_whole,
                    "{who}: whole, although its backend did not finish"
                );
            }
            return if message.complete && all {
                Outcome::Complete
            } else {
                Outcome::BodyCut(message.body.len())
            };
        }
        self.judge_events(world, who, id, message)
    }

    fn judge_events(&self, world: &World, who: &str, id: usize, message: &Message) -> Outcome {
        let exchange = &world.exchanges[id];
        let dialect = exchange.request.dialect;
        let read = match read_events(&message.body) {
            Ok(read) => read,
            Err(error) => panic!("{who}: {error}"),
        };
        let mut events = read.events;
        if self.lenience.outlives && events.iter().any(|event| event.name == "tokenring.gap") {
            // Which ones it has is judged where its place in the stream is known.
            return Outcome::EventsThenError(events.len(), "lagged".to_owned());
        }
        // Heartbeats of ours that are events.
        events.retain(|event| event.name != "ping" || event.id.is_some());
        let mut error = None;
        if let Some(last) = events.last()
            && is_error(dialect, &last.name, &last.data)
            && last.id.is_none()
        {
            error = Some(code_of(&last.data));
            events.pop();
        }
        assert!(!(message.complete && read.partial), "{who}: a partial event at the end of a whole body");
        if exchange.request.demo {
            for (nth, event) in events.iter().enumerate() {
                assert_eq!(event.id, Some(nth as u64 + 1), "{who}: ids are dense from 1");
            }
            return match error {
                Some(code) => Outcome::EventsThenError(events.len(), code),
                None if message.complete => Outcome::Complete,
                None => Outcome::EventsCut(events.len()),
            };
        }
        let owed = &exchange.wire.events;
        assert!(events.len() <= owed.len(), "{who}: {} events of {}", events.len(), owed.len());
        for (nth, (event, owed)) in events.iter().zip(owed).enumerate() {
            assert!(
                event.data == owed.data && event.name == owed.name,
                "{who}: event {nth} is {event:?}, owed {owed:?}"
            );
            assert_eq!(event.id, Some(nth as u64 + 1), "{who}: ids are dense from 1");
        }
        assert!(events.len() <= exchange.events_written(), "{who}: events that no backend wrote");
        let all = events.len() == owed.len();
        let looks_finished = match dialect {
            Dialect::Plain => message.complete && error.is_none(),
            _ => events.last().is_some_and(|last| is_end_mark(dialect, &last.data)),
        };
        if looks_finished {
            assert!(
                all && (exchange.wire.whole || exchange.wire.may_look_whole),
                "{who}: a stream that was cut looks finished"
            );
            assert!(error.is_none(), "{who}: an error behind the end mark");
        }
        match error {
            Some(code) => Outcome::EventsThenError(events.len(), code),
            None if message.complete && all && exchange.answer.fault == Fault::InBandError => {
                Outcome::EventsThenError(events.len() - 1, "backend_says".to_owned())
            }
            None if message.complete && looks_finished => Outcome::Complete,
            None => {
                assert!(!message.complete, "{who}: an unfinished stream in a finished body");
                Outcome::EventsCut(events.len())
            }
        }
    }
}

/// How long a shard may take to receive so much of one connection: a turn for each piece and one for each receive that is
/// armed again, where there are fewer buffers than connections for each time that others are given them.
fn read_us(world: &World, bytes: usize) -> u64 {
    let pieces = bytes.div_ceil(world.faults.piece_bytes(world.buffer_bytes)) as u64;
    let connections = 2 * world.clients.len();
    let turns = 2 * connections.div_ceil(world.buffers).max(1) as u64;
    pieces * turns * (world.faults.work_us + world.faults.delay_us + 1)
}

/// Whether it reads nothing for so long.
fn is_asleep(client: &Client, us: u64) -> bool {
    matches!(client.plan.pace, Pace::Stuck { for_us, .. } if for_us >= us)
}

fn error_answer(who: &str, message: &Message) -> Outcome {
    assert!(message.status() >= 400, "{who}: an answer of nobody: {message:?}");
    let body = String::from_utf8_lossy(&message.body).into_owned();
    Outcome::Error(message.status(), code_of(&body))
}

fn code_of(json: &str) -> String {
    let code = json.rsplit_once("\"code\":\"").and_then(|(_, rest)| rest.split('"').next());
    code.unwrap_or("none").to_owned()
}

fn is_error(dialect: Dialect, name: &str, data: &str) -> bool {
    match dialect {
        Dialect::Chat | Dialect::Completions => data.starts_with("{\"error\":"),
        _ => name == "error",
    }
}

fn is_end_mark(dialect: Dialect, data: &str) -> bool {
    match dialect {
        Dialect::Chat | Dialect::Completions => data == "[DONE]",
        Dialect::Responses => data.contains("response.completed"),
        Dialect::Messages => data.contains("message_stop"),
        Dialect::Plain => false,
    }
}

/// A long upload in tiny pieces, of which a turn takes few: its turns alone may last longer than it may.
fn is_starved(world: &World, body_bytes: usize) -> bool {
    world.faults.turn_completions > 0 && world.faults.receive_bytes > 0 && body_bytes > 100_000
}
