//! Bytes in and out of connections: arming receives, one coalesced send in flight, completion accounting, the marks that
//! pause and resume the other side, and the three steps in which a connection ends.

use super::Shard;
use super::conn::{Handshake, Maybe, Role, State};
use crate::io::{Close, Confirm, Errno, Half, Hangup, Io, ReceiveEnd};
use crate::settings::HalfClose;
use protocol::limits::{
    LINGER_MS, LOG_SEGMENT_BYTES_MAX, LOG_SETTLED_BYTES_MAX, RESET_LOOK_MS, RESET_LOOK_STEP_MS, STALL_CHECKS,
};
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;

impl<I: Io> Shard<I> {
    /// Arms or cancels the receive, as it is wanted or not.
    pub(super) fn follow_receive(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if matches!(conn.state, State::Joining(_)) || conn.ops.connect.is_some() {
            return;
        }
        let wanted = conn.receive_wanted && conn.waiting == 0;
        match conn.ops.receive {
            None if wanted && !conn.peer_fin => {
                conn.ops.receive = Some(self.io.receive(key, conn.socket));
            }
            Some(op) if !wanted && !conn.receive_cancelled => {
                conn.receive_cancelled = true;
                self.io.cancel(op);
            }
            _ => {}
        }
        // A client that is not being read must still be seen to leave.
        let stays = !matches!(conn.state, State::Moving(_));
        if stays && !conn.receive_wanted && conn.is_client() && conn.ops.hangup.is_none() && !conn.peer_fin {
            conn.ops.hangup = Some(self.io.watch_hangup(key, conn.socket));
        }
    }

    pub(super) fn want_receive(&mut self, key: Key, wanted: bool) {
        if let Some(conn) = self.conns.get_mut(key)
            && conn.receive_wanted != wanted
        {
            conn.receive_wanted = wanted;
            self.follow_receive(key);
        }
    }

    pub(super) fn receive_ended(&mut self, key: Key, why: ReceiveEnd) {
        let Some(conn) = self.conns.get_mut(key) else {
            debug_assert!(false, "a completion for a freed connection");
            return;
        };
        conn.ops.receive = None;
        conn.receive_cancelled = false;
        if matches!(conn.state, State::Joining(_)) {
            return self.follow_join(key);
        }
        match why {
            ReceiveEnd::Rearm if is_planted(Bug::ForgottenReceive) => {}
            ReceiveEnd::Rearm | ReceiveEnd::Error(Errno::CANCELED) => self.follow_receive(key),
            ReceiveEnd::Error(Errno::NO_BUFFERS) => {
                self.stats.counters.buffer_shortages += 1;
                self.starved.push(key);
            }
            ReceiveEnd::Fin => self.peer_finished(key),
            ReceiveEnd::Error(_) => {
                conn.peer_fin = true;
                match conn.role {
                    Role::Client(_) => self.client_gone(key),
                    Role::Backend(_) => self.backend_lost(key, End::UpstreamReset),
                }
            }
        }
    }

    /// The peer's end, by FIN or by TLS's own: it says no more.
    pub(super) fn peer_finished(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.state == State::Lingering {
            conn.peer_fin = true;
            return self.join(key, Close::Orderly);
        }
        // On its way to another shard: it will be told there.
        if std::mem::replace(&mut conn.peer_fin, true) || matches!(conn.state, State::Moving(_)) {
            return;
        }
        match conn.role {
            Role::Client(_) => self.client_fin(key),
            Role::Backend(_) => self.backend_fin(key),
        }
    }

    /// A multishot receive may not be told of an RST that comes right behind the last bytes: where both wake it before it
    /// runs, Linux (to 6.19 at least) takes them for one event, and there will be no further one. So what is received is
    /// followed by one look at the socket, a while later.
    pub(super) fn look_later(&mut self, key: Key) {
        let now_ms = self.now_ms();
        if let Some(conn) = self.conns.get_mut(key) {
            conn.look_ms = look_ms(now_ms);
            self.follow_conn_timer(key);
        }
    }

    /// Looks, if it is time to; true when the connection turned out to be reset, and was dealt with.
    pub(super) fn was_reset_unheard(&mut self, key: Key) -> bool {
        let now_ms = self.now_ms();
        let Some(conn) = self.conns.get_mut(key) else { return false };
        if conn.look_ms > now_ms {
            return false;
        }
        conn.look_ms = u64::MAX;
        if conn.heard_ms + RESET_LOOK_MS > now_ms {
            // It has been heard since: what is looked for can only have come after that.
            conn.look_ms = look_ms(conn.heard_ms);
            return false;
        }
        // What waits was received before it, and its end is among what waits.
        let listens = conn.state == State::Open && conn.waiting == 0;
        let armed = conn.ops.receive.is_some() && !conn.receive_cancelled;
        if !listens || !armed || !self.io.is_reset(conn.socket) {
            return false;
        }
        self.stats.counters.resets_unheard += 1;
        conn.peer_fin = true;
        match conn.role {
            Role::Client(_) => self.client_gone(key),
            Role::Backend(_) => self.backend_lost(key, End::UpstreamReset),
        }
        true
    }

    /// At the end of a turn every buffer of its completions is back: receives that found none are armed again.
    pub(super) fn feed_starved(&mut self) {
        for key in std::mem::take(&mut self.starved) {
            self.follow_receive(key);
        }
    }

    pub(super) fn hung_up(&mut self, key: Key, result: Result<Hangup, Errno>, armed: bool) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if !armed {
            conn.ops.hangup = None;
        }
        let peer_fin = conn.peer_fin;
        match conn.state {
            State::Joining(_) => self.follow_join(key),
            State::Lingering | State::Moving(_) => {}
            // An armed receive tells it better, and in order.
            State::Open if conn.ops.receive.is_some() && !conn.receive_cancelled => {}
            State::Open => match result {
                Ok(Hangup::Reset) => self.client_gone(key),
                Ok(Hangup::Fin) if self.fin_means_left(key) => self.client_gone(key),
                // It stays, and may still reset.
                Ok(Hangup::Fin) if !armed && peer_fin => self.watch_served(key),
                Ok(Hangup::Fin) if !armed => self.follow_receive(key),
                Ok(Hangup::Fin) | Err(_) => {}
            },
        }
    }

    /// A client that has sent its FIN and is served all the same can still be seen to leave, by its RST.
    pub(super) fn watch_served(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && conn.state == State::Open
            && conn.ops.hangup.is_none()
        {
            conn.ops.hangup = Some(self.io.watch_hangup(key, conn.socket));
        }
    }

    /// A FIN cannot tell `close` from half-close; on a streaming answer it means "left" unless the route says otherwise.
    pub(super) fn fin_means_left(&self, key: Key) -> bool {
        let Some(stream) =
            self.conns.get(key).and_then(|conn| conn.stream).and_then(|key| self.streams.get(key))
        else {
            return true;
        };
        let streams_events = stream.streaming || stream.has_events_answer();
        stream.request_done && streams_events && self.route(stream.route).half_close == HalfClose::Leave
    }

    /// Starts the sends that have become possible.
    pub(super) fn pump_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        self.fetch_history(&dirty);
        for key in dirty.drain(..) {
            self.pump(key);
        }
        // Pumping may end a stream and so make another connection dirty; that one waits for no completion.
        while let Some(key) = self.dirty.pop() {
            self.pump(key);
        }
        self.dirty = dirty;
    }

    /// Asks for where history goes to once the sends are confirmed that are started now: it comes while the kernel sends. For
    /// all of them at once, since the pages of each have to be looked up, and the processor does several of that side by side.
    fn fetch_history(&self, dirty: &[Key]) {
        for &key in dirty {
            let Some(conn) = self.conns.get(key).filter(|conn| conn.is_client()) else { continue };
            let Some(stream) = conn.stream.and_then(|key| self.streams.get(key)) else { continue };
            let owed = stream.response.end().saturating_sub(conn.ledger.sent());
            let bytes = owed.min(LOG_SETTLED_BYTES_MAX as u64) as usize;
            stream.response.settles_at(bytes).for_each(|line| self.io.prefetch(line));
        }
    }

    fn pump(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.dirty = false;
        if conn.ops.send.is_some() {
            self.hurried |= conn.deferred;
            return;
        }
        if conn.tls.is_some() && conn.ops.connect.is_none() && !matches!(conn.state, State::Joining(_)) {
            if !self.pump_tls(key) {
                self.follow_delivered(key);
            }
            return;
        }
        if conn.state != State::Open || conn.ops.connect.is_some() {
            return;
        }
        let Some(stream) = conn.stream.and_then(|key| self.streams.get_mut(key)) else { return };
        if stream.reader.is_some() {
            return self.pump_reader(key);
        }
        let client = matches!(conn.role, Role::Client(_));
        let log = if client { Some(&stream.response) } else { stream.request().map(|request| &request.log) };
        let Some(log) = log else { return };
        let Some(range) = log.lend(conn.ledger.sent(), LOG_SEGMENT_BYTES_MAX as u32) else {
            if client && stream.produced {
                self.delivered(key);
            }
            return;
        };
        let bytes = range.len() as u32;
        // Waited for: by what is left of the log, by the side that was paused, by the end of the answer or the request.
        let (complete, paused) = match client {
            true => (!stream.produced, stream.paused),
            false => (stream.request_done, stream.upload_paused),
        };
        conn.deferred = complete && !paused && conn.ledger.sent() + u64::from(bytes) == log.end();
        let confirm = if conn.deferred { Confirm::Deferred } else { Confirm::Prompt };
        conn.ledger.lend(bytes);
        conn.ops.send = Some(self.io.send(key, conn.socket, range, confirm));
        let stall_ms = u64::from(self.settings.routes[stream.route].deadlines.write_stall_ms);
        conn.progress_ms = self.now_us / 1000;
        conn.stall_check_ms = stall_check_ms(conn.progress_ms, stall_ms);
        conn.acknowledged = Maybe::NONE;
        if client {
            stream.lent_since_us = stream.pending_since_us.take().unwrap_or(self.now_us);
        }
        self.follow_conn_timer(key);
    }

    /// Sends what is next for one who reads a stream by its id.
    fn pump_reader(&mut self, key: Key) {
        let Some(stream_key) = self.conns.get(key).and_then(|conn| conn.stream) else { return };
        let Some(range) = self.next_of_reader(stream_key, LOG_SEGMENT_BYTES_MAX as u32, false) else {
            // One that went on by itself has what follows in its own log, and is pumped again.
            let reads = self.streams.get(stream_key).is_none_or(|stream| stream.reader.is_some());
            return if reads { self.follow_delivered(key) } else { self.mark_dirty(key) };
        };
        let Some(stream) = self.streams.get(stream_key) else { return };
        let stall_ms = u64::from(self.settings.routes[stream.route].deadlines.write_stall_ms);
        let deferred = self.is_reader_level(stream, Some(range.len()));
        let confirm = if deferred { Confirm::Deferred } else { Confirm::Prompt };
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.deferred = deferred;
        conn.ledger.lend(range.len() as u32);
        conn.ops.send = Some(self.io.send(key, conn.socket, range, confirm));
        conn.progress_ms = self.now_us / 1000;
        conn.stall_check_ms = stall_check_ms(conn.progress_ms, stall_ms);
        conn.acknowledged = Maybe::NONE;
        self.follow_conn_timer(key);
    }

    /// Nothing is left to be sent on a connection: its answer may be delivered.
    fn follow_delivered(&mut self, key: Key) {
        let Some(conn) = self.conns.get(key) else { return };
        let produced =
            conn.stream.and_then(|key| self.streams.get(key)).is_some_and(|stream| stream.produced);
        if conn.is_client() && produced && conn.state == State::Open {
            self.delivered(key);
        }
    }

    pub(super) fn sent(&mut self, key: Key, result: Result<u32, Errno>) {
        let Some(conn) = self.conns.get_mut(key) else {
            debug_assert!(false, "a completion for a freed connection");
            return;
        };
        conn.ops.send = None;
        let deferred = std::mem::take(&mut conn.deferred);
        if conn.tls.is_some() {
            return self.tls_sent(key, result, deferred);
        }
        let lent = conn.ledger.in_flight();
        let bytes = *result.as_ref().unwrap_or(&0);
        self.stats.counters.sends += 1;
        self.stats.counters.sends_short += u64::from(bytes < lent);
        self.confirmed(key, bytes, result.is_err(), deferred);
    }

    /// So many bytes of a log were sent, of those that were lent.
    pub(super) fn confirmed(&mut self, key: Key, bytes: u32, failed: bool, deferred: bool) {
        let now_us = self.now_us;
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.ledger.complete(bytes);
        let (client, sealed) = (conn.is_client(), conn.tls.is_some());
        let counters = &mut self.stats.counters;
        *(if client { &mut counters.client_sent_bytes } else { &mut counters.upstream_sent_bytes }) +=
            u64::from(bytes);
        if matches!(conn.state, State::Joining(_)) {
            return self.follow_join(key);
        }
        if failed {
            return if client { self.client_gone(key) } else { self.backend_send_failed(key) };
        }
        let sent = conn.ledger.sent();
        let reused = conn.backend().is_some_and(|backend| backend.served > 0);
        let Some(stream_key) = conn.stream else { return };
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        if client && stream.reader.is_some() {
            self.reader_confirmed(stream_key, bytes, sealed);
            if !is_planted(Bug::LostWakeUp) {
                self.mark_dirty(key);
            }
            return;
        }
        if client {
            stream.response.release(sent);
            if stream.has_events_answer() {
                // When exactly the kernel took it was not told if that was deferred: no sooner than the turn's end.
                let taken_us = if deferred { self.handed_us } else { now_us };
                let relayed_us = taken_us.saturating_sub(stream.lent_since_us);
                self.stats.histograms.relay_us.saturating_record(relayed_us);
            }
            if stream.response.end() > sent && stream.pending_since_us == Maybe::NONE {
                // The rest of a longer backlog: it was appended no later than now.
                stream.pending_since_us = Maybe::some(now_us);
            }
        } else if !reused || !stream.may_repeat(self.settings.retry_bytes_max) {
            // Only a reused connection may have been closed by its backend before it saw the request.
            stream.release_request(sent);
        }
        self.follow_marks(stream_key);
        if is_planted(Bug::LostWakeUp) {
            return;
        }
        if client && !sealed && self.has_all(key) {
            // Before the next request, which may have come in the same turn, is put aside for it.
            return self.delivered(key);
        }
        // Not at once: what arrives later in this turn goes out with it.
        self.mark_dirty(key);
    }

    /// Whether a client was sent its answer to the end.
    fn has_all(&self, key: Key) -> bool {
        let Some(conn) = self.conns.get(key).filter(|conn| conn.state == State::Open) else { return false };
        let stream = conn.stream.and_then(|key| self.streams.get(key));
        stream.is_some_and(|stream| {
            let all =
                stream.produced && stream.reader.is_none() && stream.response.end() == conn.ledger.sent();
            all && conn.ops.send.is_none()
        })
    }

    /// Pauses or resumes the producers on both sides, as the lag of the consumers says.
    pub(super) fn follow_marks(&mut self, key: Key) {
        self.follow_overdraft(key);
        self.charge(key);
        let low = self.settings.lag_low_bytes;
        let Some(stream) = self.streams.get(key) else { return };
        if stream.reader.is_some() {
            return;
        }
        let (lag, high) = self.owed_to_readers(stream).unwrap_or_else(|| {
            let client = stream.client.and_then(|key| self.conns.get(key));
            let sent = client.map_or(0, |conn| conn.ledger.sent());
            (stream.response.end() - sent, self.settings.lag_high_bytes)
        });
        let Some(stream) = self.streams.get_mut(key) else { return };
        if !stream.paused && lag > high && !stream.produced {
            stream.paused = true;
            if matches!(stream.phase, Phase::Streaming | Phase::AwaitFirstToken) {
                stream.step(Step::LagHigh);
            }
            self.stats.counters.pauses += 1;
            if let Some(backend) = stream.backend {
                self.want_receive(backend, false);
            }
        } else if stream.paused && lag < low {
            stream.paused = false;
            if stream.phase == Phase::Paused {
                stream.step(Step::LagLow);
            }
            // The model was kept waiting: its own clock starts anew.
            stream.last_token_us = self.now_us;
            match stream.backend {
                Some(_) if is_planted(Bug::ForgottenResume) => {}
                Some(backend) => self.want_receive(backend, true),
                None if stream.durable.is_some() => self.durable_fill(key),
                None => self.resume_demo(key),
            }
            self.follow_stream_timer(key);
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        let (Some(client), false) = (stream.client, stream.request_done) else { return };
        let sent = stream.backend.and_then(|key| self.conns.get(key)).map_or(0, |conn| conn.ledger.sent());
        let upload_lag = stream.request_end() - sent.max(stream.request_start());
        if !stream.upload_paused && upload_lag > self.settings.lag_high_bytes {
            stream.upload_paused = true;
            self.stats.counters.upload_pauses += 1;
            self.want_receive(client, false);
        } else if stream.upload_paused && upload_lag < low {
            stream.upload_paused = false;
            stream.phase_due_ms = stream
                .phase_due_ms
                .max(self.now_us / 1000 + u64::from(self.settings.routes[stream.route].deadlines.body_ms));
            self.want_receive(client, true);
            self.follow_stream_timer(key);
        }
    }

    /// Everything was sent: FIN goes out, and what still arrives is dropped until the peer's FIN, or for a moment.
    pub(super) fn linger(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.state != State::Open {
            return;
        }
        if conn.peer_fin {
            return self.join(key, Close::Orderly);
        }
        conn.state = State::Lingering;
        conn.drop_held();
        conn.due_ms = now_ms + LINGER_MS;
        conn.receive_wanted = true;
        let socket = conn.socket;
        if self.say_close(key) {
            // Its FIN follows.
            self.mark_dirty(key);
        } else {
            self.io.shutdown(socket, Half::Write);
        }
        self.follow_held(key);
        self.follow_receive(key);
        self.follow_conn_timer(key);
    }

    /// Shuts a connection; it is closed and freed when its last operation has completed.
    pub(super) fn join(&mut self, key: Key, how: Close) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if matches!(conn.state, State::Joining(_)) {
            return;
        }
        if how == Close::Orderly {
            self.say_close_at_once(key);
        }
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.state = State::Joining(how);
        conn.stream = None;
        conn.drop_held();
        if let Some((timer, _)) = conn.timer.take() {
            self.wheel.remove(timer);
        }
        self.overdraft_bytes -= std::mem::take(&mut conn.drawn);
        let handshaking = matches!(&conn.role, Role::Client(client) if client.handshake == Handshake::Active);
        if !conn.ops.none() {
            if how == Close::Orderly {
                self.io.shutdown(conn.socket, Half::Both);
            }
            for op in conn.ops.iter() {
                self.io.cancel(op);
            }
            self.hurried |= conn.deferred;
        }
        if handshaking {
            self.stats.counters.tls_handshake_failures += 1;
        }
        self.handshake_over(key);
        self.follow_join(key);
    }

    pub(super) fn follow_join(&mut self, key: Key) {
        let Some(conn) = self.conns.get(key) else { return };
        let State::Joining(how) = conn.state else { return };
        if !conn.ops.none() {
            return;
        }
        assert!(conn.lent_bytes() == 0, "memory of a freed connection is lent");
        let client = conn.is_client();
        if matches!(&conn.role, Role::Client(client) if client.requests == 0) {
            self.stats.counters.closes_unused += 1;
        }
        self.io.close(conn.socket, how);
        self.conns.remove(key);
        if client {
            self.client_freed();
        }
    }
}

/// When a send that was started then is looked at first, ms.
pub(super) fn stall_check_ms(started_ms: u64, stall_ms: u64) -> u64 {
    if stall_ms == 0 { u64::MAX } else { started_ms + stall_ms.div_ceil(STALL_CHECKS) }
}

/// When to look at a connection that was heard then: at one of few times, so that a shard does not wake for each.
fn look_ms(heard_ms: u64) -> u64 {
    (heard_ms + RESET_LOOK_MS).next_multiple_of(RESET_LOOK_STEP_MS)
}
