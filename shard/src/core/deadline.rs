//! Time: what each connection and stream waits for, and what happens when it has waited long enough.
//!
//! Each has one timer, armed for the earliest of its deadlines. A deadline that moves later (every token moves one) does not
//! touch the wheel: the timer fires at its old time, finds nothing due, and is armed again.

use super::conn::{Conn, Maybe, Role, State};
use super::stream::{Answer, Stream};
use super::{Shard, TimerOf};
use crate::io::{Close, Io};
use crate::settings::Route;
use protocol::limits::STALL_CHECKS;
use protocol::phase::{End, Phase};
use protocol::slots::Key;

/// What a stream's timer found due.
enum Due {
    End(End),
    Commit,
    Heartbeat,
    Demo,
    Durable,
}

impl<I: Io> Shard<I> {
    pub(super) fn fire_timers(&mut self) {
        let now_ms = self.now_ms();
        let mut fired = std::mem::take(&mut self.fired);
        self.wheel.advance(now_ms, |whose| fired.push(whose));
        // All of them are gone from the wheel before the first is acted upon, which may end what another belongs to.
        for &whose in &fired {
            match whose {
                TimerOf::Conn(key) => {
                    if let Some(conn) = self.conns.get_mut(key) {
                        conn.timer = None;
                    }
                }
                TimerOf::Stream(key) => {
                    if let Some(stream) = self.streams.get_mut(key) {
                        stream.timer = None;
                    }
                }
                TimerOf::Drain => self.leaving_timer = None,
                TimerOf::Handshakes => self.handshake_timer_gone(),
                TimerOf::Durable => self.durable.timer = None,
                TimerOf::Stored => self.forget_stored_timer(),
                TimerOf::Source(key) => {
                    if let Some(source) = self.kept.sources.get_mut(key) {
                        source.timer = None;
                    }
                }
                TimerOf::Resumes => self.kept.waiting_timer = None,
                TimerOf::Ages => self.kept.ages.timer = None,
                TimerOf::Acceptor(_) => {}
            }
        }
        for whose in fired.drain(..) {
            match whose {
                TimerOf::Conn(key) => self.conn_timer_fired(key),
                TimerOf::Stream(key) => self.stream_timer_fired(key),
                TimerOf::Acceptor(listener) => self.accept_rested(listener as usize),
                TimerOf::Handshakes => self.admit_handshakes(),
                TimerOf::Drain => self.leaving_due(),
                TimerOf::Durable => self.durable_expire(),
                TimerOf::Stored => self.stored_due(),
                TimerOf::Source(source) => self.source_due(source),
                TimerOf::Resumes => self.begin_waiting(),
                TimerOf::Ages => self.ages_due(),
            }
        }
        self.fired = fired;
    }

    fn write_stall_ms(&self, conn: &Conn<I::Socket>) -> u64 {
        let route = conn.stream.and_then(|key| self.streams.get(key)).map(|stream| stream.route);
        route.map_or(0, |route| u64::from(self.route(route).deadlines.write_stall_ms))
    }

    pub(super) fn conn_due_ms(conn: &Conn<I::Socket>) -> u64 {
        let stall_check_ms = if conn.ops.send.is_none() { u64::MAX } else { conn.stall_check_ms };
        conn.due_ms.min(stall_check_ms).min(conn.look_ms)
    }

    /// Looks whether a send that takes long makes progress: whether its peer goes on acknowledging. True when it has not for
    /// the whole write stall deadline.
    fn is_stalled(&mut self, key: Key) -> bool {
        let now_ms = self.now_ms();
        let Some(conn) = self.conns.get(key) else { return false };
        let stall_ms = self.write_stall_ms(conn);
        if conn.ops.send.is_none() || conn.stall_check_ms > now_ms || stall_ms == 0 {
            return false;
        }
        let acknowledged = Maybe::from(self.io.acknowledged(conn.socket));
        let Some(conn) = self.conns.get_mut(key) else { return false };
        if conn.acknowledged.get().is_some() && conn.acknowledged != acknowledged {
            conn.progress_ms = now_ms;
        }
        conn.acknowledged = acknowledged;
        conn.stall_check_ms = (now_ms + stall_ms.div_ceil(STALL_CHECKS)).min(conn.progress_ms + stall_ms);
        conn.progress_ms + stall_ms <= now_ms
    }

    /// Arms a connection's timer if it has to fire earlier than it would.
    pub(super) fn follow_conn_timer(&mut self, key: Key) {
        let Some(conn) = self.conns.get(key) else { return };
        if matches!(conn.state, State::Joining(_)) {
            return;
        }
        let due_ms = Self::conn_due_ms(conn);
        let Some(conn) = self.conns.get_mut(key) else { return };
        arm(&mut self.wheel, &mut conn.timer, due_ms, TimerOf::Conn(key));
    }

    /// Arms a stream's timer if it has to fire earlier than it would.
    pub(super) fn follow_stream_timer(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key) else { return };
        let due_ms = stream_due_ms(stream, self.route(stream.route));
        let Some(stream) = self.streams.get_mut(key) else { return };
        arm(&mut self.wheel, &mut stream.timer, due_ms, TimerOf::Stream(key));
    }

    fn conn_timer_fired(&mut self, key: Key) {
        let now_ms = self.now_ms();
        if self.was_reset_unheard(key) {
            return;
        }
        let stalled = self.is_stalled(key);
        let Some(conn) = self.conns.get(key) else { return };
        if !stalled && Self::conn_due_ms(conn) > now_ms {
            return self.follow_conn_timer(key);
        }
        let stream = conn.stream;
        match (&conn.role, conn.state) {
            (_, State::Moving(_)) if stream.is_some() => self.stay_with_answer(key),
            (_, State::Joining(_) | State::Moving(_)) => {}
            (_, State::Lingering) => self.join(key, Close::Orderly),
            (Role::Client(_), State::Open) => match stream {
                Some(stream) if stalled && self.may_detach(stream) => {
                    self.detach(stream);
                    self.join(key, Close::Reset);
                }
                Some(stream) if stalled => {
                    self.end_stream(stream, End::WriteStall);
                    self.override_end(stream, End::WriteStall);
                    self.settle(stream);
                    self.join(key, Close::Reset);
                }
                Some(_) => {}
                None if conn.is_handshaking() => {
                    self.stats.counters.tls_handshake_timeouts += 1;
                    self.handshake_over(key);
                    self.join(key, Close::Orderly);
                }
                None if conn.held.is_empty() => {
                    self.stats.counters.keep_alive_closes += 1;
                    self.linger(key);
                }
                None => {
                    self.refuse_late_head(key);
                    // What it is told may have to wait for a send of the handshake, and would arm it then.
                    self.follow_conn_timer(key);
                }
            },
            (Role::Backend(backend), State::Open) => match stream {
                Some(stream) if stalled => self.end_stream(stream, End::UpstreamStalled),
                Some(stream) if conn.is_connecting() => self.end_stream(stream, End::ConnectTimeout),
                Some(_) => {}
                None if backend.idle => self.leave_pool(key, false),
                None => self.join(key, Close::Orderly),
            },
        }
    }

    fn stream_timer_fired(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(stream) = self.streams.get(key) else { return };
        let route = &self.settings.routes[stream.route];
        if stream_due_ms(stream, route) <= now_ms {
            match what_is_due(stream, route, now_ms) {
                Some(Due::End(End::Done)) => self.backend_broke(key, End::Done),
                Some(Due::End(end)) => self.end_stream(key, end),
                Some(Due::Commit) => self.commit_early(key),
                Some(Due::Heartbeat) => {
                    // A client that has not taken what it was sent needs no sign of life, and must not cost memory.
                    let client = stream.client.and_then(|key| self.conns.get(key));
                    let idle = match (client, &stream.reader) {
                        (_, Some(reader)) => reader.waits,
                        (Some(client), None) => client.ledger.lag(stream.response.end()) == 0,
                        (None, None) => self.has_readers(stream),
                    };
                    if idle {
                        self.heartbeat(key);
                    } else if let Some(stream) = self.streams.get_mut(key) {
                        stream.spoke_ms = now_ms;
                    }
                }
                Some(Due::Demo) => self.demo_due(key),
                Some(Due::Durable) => self.durable_due(key),
                None => {}
            }
        }
        self.follow_stream_timer(key);
    }

    /// A later reason that outweighs the one on record: what was produced never reached the client.
    pub(super) fn override_end(&mut self, key: Key, end: End) {
        // What comes by its id is told how the stream ended, not how its client's reading did.
        self.release_source(key);
        if let Some(stream) = self.streams.get_mut(key) {
            stream.end = Some(end);
        }
    }
}

pub(super) fn arm(
    wheel: &mut protocol::wheel::Wheel<TimerOf>,
    timer: &mut Option<(protocol::wheel::TimerId, u64)>,
    due_ms: u64,
    whose: TimerOf,
) {
    if due_ms == u64::MAX || timer.is_some_and(|(_, armed_ms)| armed_ms <= due_ms) {
        return;
    }
    if let Some((earlier, _)) = timer.take() {
        wheel.remove(earlier);
    }
    *timer = Some((wheel.insert(due_ms, whose), due_ms));
}

fn after(since_ms: u64, ms: u32) -> u64 {
    if ms == 0 { u64::MAX } else { since_ms + u64::from(ms) }
}

/// When the stream's model has been silent for too long, ms.
fn model_due_ms(stream: &Stream, route: &Route) -> u64 {
    match stream.phase {
        Phase::Streaming if stream.end_mark => stream.finish_due_ms,
        // While we do not listen, silence is ours.
        Phase::Streaming if !stream.paused && stream.has_backend_clock() => {
            after(stream.last_token_us / 1000, route.deadlines.between_tokens_ms)
        }
        Phase::Body if !stream.upload_paused => stream.phase_due_ms,
        Phase::AwaitHead => stream.phase_due_ms,
        Phase::AwaitFirstToken if stream.end_mark => stream.finish_due_ms,
        _ => u64::MAX,
    }
}

fn commit_due_ms(stream: &Stream, route: &Route) -> u64 {
    let waits = stream.answer == Answer::None
        && stream.request_done
        && stream.streaming
        && stream.dialect.is_model_endpoint()
        && !stream.head_only;
    if waits { after(stream.asked_us / 1000, route.commit_ms) } else { u64::MAX }
}

fn heartbeat_due_ms(stream: &Stream, route: &Route) -> u64 {
    let of_its_own = stream.reader.as_ref().is_none_or(|reader| reader.waits);
    if stream.has_events_answer() && !stream.end_mark && of_its_own {
        after(stream.spoke_ms, route.heartbeat_ms)
    } else {
        u64::MAX
    }
}

fn demo_due_ms(stream: &Stream) -> u64 {
    match &stream.demo {
        Some(demo) if !stream.paused && demo.next_us != u64::MAX => demo.next_us.div_ceil(1000),
        _ => u64::MAX,
    }
}

fn durable_due_ms(stream: &Stream) -> u64 {
    stream.durable.as_ref().map_or(u64::MAX, |durable| durable.due_ms)
}

/// The earliest deadline of a stream; none once all is produced (what is left is its client's reading).
pub(super) fn stream_due_ms(stream: &Stream, route: &Route) -> u64 {
    if stream.produced {
        return u64::MAX;
    }
    model_due_ms(stream, route)
        .min(stream.token_due_ms)
        .min(stream.total_due_ms)
        .min(commit_due_ms(stream, route))
        .min(heartbeat_due_ms(stream, route))
        .min(demo_due_ms(stream))
        .min(durable_due_ms(stream))
}

fn what_is_due(stream: &Stream, route: &Route, now_ms: u64) -> Option<Due> {
    if stream.total_due_ms <= now_ms {
        return Some(Due::End(End::TotalTimeout));
    }
    if model_due_ms(stream, route) <= now_ms {
        return Some(Due::End(match stream.phase {
            _ if stream.end_mark => End::Done,
            Phase::Body => End::BodyTimeout,
            Phase::AwaitHead => End::UpstreamHeadTimeout,
            _ => End::BetweenTokensTimeout,
        }));
    }
    if stream.token_due_ms <= now_ms {
        return Some(Due::End(End::FirstTokenTimeout));
    }
    if demo_due_ms(stream) <= now_ms {
        return Some(Due::Demo);
    }
    if durable_due_ms(stream) <= now_ms {
        return Some(Due::Durable);
    }
    if commit_due_ms(stream, route) <= now_ms {
        return Some(Due::Commit);
    }
    (heartbeat_due_ms(stream, route) <= now_ms).then_some(Due::Heartbeat)
}
