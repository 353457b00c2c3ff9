//! TLS on connections of both sides: hellos, handshakes and their bound, what was decrypted on its way to HTTP, batches on
//! their way to the socket, and how it ends: with `close_notify`, with an alert, or cut.

use super::conn::{Conn, Handshake, Maybe, Role, State};
use super::{Shard, TimerOf};
use crate::io::{Close, Confirm, Errno, Half, Io};
use crate::mesh::{Report, TlsFailure};
use crate::settings::TlsSet;
use crate::tls::{HELLO_BYTE, Tls};
use protocol::http::Refusal;
use protocol::limits::{
    LOG_SEGMENT_BYTES_MAX, TLS_BATCH_BYTES_MAX, TLS_FAILURES_TOLD_PER_TURN_MAX, TLS_HANDSHAKE_GRACE_MS,
    TLS_SESSIONS_MAX,
};
use protocol::phase::End;
use protocol::slots::Key;
use rustls::client::Resumption;
use rustls::{CertificateError, ClientConfig, Error, OtherError};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

/// TLS handshakes of clients, and the configurations of this shard's own.
#[derive(Default)]
pub(super) struct Handshakes {
    /// Those under way, oldest first, with when they began, ms; some of them are over already.
    active: VecDeque<(Key, u64)>,
    /// How many are under way.
    pub(super) count: usize,
    /// Clients whose hello waits until there is room, in their order; some may have left.
    waiting: VecDeque<Key>,
    timer_armed: bool,
    /// Steps taken in the turn with this number.
    steps: (u64, u32),
    /// Failures told in the turn with this number.
    told: (u64, usize),
    /// As [`TlsSet::clients`], each with a memory for sessions of its own.
    clients: Vec<Arc<ClientConfig>>,
}

impl Handshakes {
    /// Sessions are remembered per shard, so that nothing is shared between them.
    pub(super) fn follow(&mut self, set: &TlsSet) {
        let own = |config: &Arc<ClientConfig>| {
            let mut config = ClientConfig::clone(config);
            config.resumption = Resumption::in_memory_sessions(TLS_SESSIONS_MAX);
            Arc::new(config)
        };
        self.clients = set.clients.iter().map(own).collect();
    }

    pub(super) fn is_timer_armed(&self) -> bool {
        self.timer_armed
    }

    /// Whether another step of a handshake may be taken in this turn; counts it if so.
    pub(super) fn may_step(&mut self, turn: u64, most: u32) -> bool {
        if self.steps.0 != turn {
            self.steps = (turn, 0);
        }
        let may = self.steps.1 < most;
        self.steps.1 += u32::from(may);
        may
    }
}

impl<S> Conn<S> {
    /// Whether its handshake is under way, or is to come.
    pub(super) fn is_handshaking(&self) -> bool {
        let awaited = matches!(&self.role, Role::Client(client) if client.handshake != Handshake::None);
        awaited || self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Bytes that the kernel holds of it.
    pub(super) fn lent_bytes(&self) -> u32 {
        self.tls.as_ref().map_or(self.ledger.in_flight(), |tls| tls.ledger.in_flight())
    }

    /// A backend's connection that cannot take a request yet.
    pub(super) fn is_connecting(&self) -> bool {
        self.ops.connect.is_some() || self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Whether its peer ended without saying so in TLS: what came before may have been cut short by anybody.
    pub(super) fn is_cut(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| !tls.heard_close())
    }
}

impl<I: Io> Shard<I> {
    /// Received bytes of a connection that speaks TLS, or is to.
    pub(super) fn tls_received(&mut self, key: Key, bytes: &mut [u8]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if !matches!(conn.state, State::Open | State::Moving(_)) {
            // What is dropped need not be decrypted.
            return if conn.is_client() {
                self.client_received(key, bytes)
            };
        }
        let handshake = conn.client().map_or(Handshake::None, |client| client.handshake);
        match handshake {
            Handshake::None | Handshake::Active => self.tls_input(key, bytes),
            Handshake::Waiting(_) => {
                // More behind the hello, received before the receive was cancelled.
                conn.held.extend_from_slice(bytes);
            }
            Handshake::Awaited(server) => {
                if bytes[0].is_ascii_alphabetic() {
                    return self.refuse_plain(key, bytes);
                }
                if bytes[0] == HELLO_BYTE && !self.may_begin_handshake() {
                    return self.delay_handshake(key, usize::from(server), bytes);
                }
                self.begin_handshake(key, usize::from(server), bytes);
            }
        }
    }

    /// A plain request on a TLS port is answered in its own words.
    fn refuse_plain(&mut self, key: Key, bytes: &[u8]) {
        self.stats.counters.tls_plain_refused += 1;
        self.handshake_over(key);
        self.begin_refused(key, super::client::dialect_of_start(bytes), Refusal::PlainOnTls);
    }

    fn may_begin_handshake(&mut self) -> bool {
        self.handshakes.count < self.settings.tls_handshakes_max || self.displace_handshake()
    }

    /// Gives up the oldest handshake, if it has had its time.
    fn displace_handshake(&mut self) -> bool {
        let now_ms = self.now_ms();
        while let Some(&(key, began_ms)) = self.handshakes.active.front() {
            if !self.is_active(key) {
                self.handshakes.active.pop_front();
                continue;
            }
            if began_ms + TLS_HANDSHAKE_GRACE_MS > now_ms {
                return false;
            }
            self.stats.counters.tls_handshakes_displaced += 1;
            self.handshake_over(key);
            self.join(key, Close::Orderly);
            return true;
        }
        false
    }

    fn is_active(&self, key: Key) -> bool {
        let role = self.conns.get(key).map(|conn| &conn.role);
        matches!(role, Some(Role::Client(client)) if client.handshake == Handshake::Active)
    }

    fn is_waiting_to_begin(&mut self, key: Key) -> Option<usize> {
        match self.conns.get_mut(key)?.client()?.handshake {
            Handshake::Waiting(server) => Some(usize::from(server)),
            _ => None,
        }
    }

    /// Keeps a hello until there is room for its handshake.
    fn delay_handshake(&mut self, key: Key, server: usize, bytes: &[u8]) {
        self.stats.counters.tls_handshakes_delayed += 1;
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.held.extend_from_slice(bytes);
        if let Some(client) = conn.client() {
            client.handshake = Handshake::Waiting(server as u16);
        }
        self.handshakes.waiting.push_back(key);
        self.want_receive(key, false);
        self.watch_handshakes();
    }

    /// While hellos wait, the oldest handshake is looked at when its time is over.
    fn watch_handshakes(&mut self) {
        if self.handshakes.waiting.is_empty() || self.handshakes.timer_armed {
            return;
        }
        if let Some(&(_, began_ms)) = self.handshakes.active.front() {
            let due_ms = (began_ms + TLS_HANDSHAKE_GRACE_MS).max(self.now_ms() + 1);
            self.wheel.insert(due_ms, TimerOf::Handshakes);
            self.handshakes.timer_armed = true;
        }
    }

    pub(super) fn handshake_timer_gone(&mut self) {
        self.handshakes.timer_armed = false;
    }

    /// Takes the hellos that have waited, as far as there is room for them.
    pub(super) fn admit_handshakes(&mut self) {
        while let Some(&key) = self.handshakes.waiting.front() {
            if let Some(server) = self.is_waiting_to_begin(key) {
                if !self.may_begin_handshake() {
                    break;
                }
                let mut held = self.conns.get_mut(key).map(Conn::take_held).unwrap_or_default();
                self.want_receive(key, true);
                self.begin_handshake(key, server, &mut held);
            }
            self.handshakes.waiting.pop_front();
        }
        self.watch_handshakes();
    }

    fn begin_handshake(&mut self, key: Key, server: usize, bytes: &mut [u8]) {
        let now_ms = self.now_ms();
        let Some(config) = self.tls.servers.get(server) else {
            // The control thread gives a listener and its certificate together.
            debug_assert!(false, "a TLS listener without a configuration");
            return self.join(key, Close::Reset);
        };
        let tls = match Tls::server(config) {
            Ok(tls) => tls,
            Err(error) => return self.tls_failed(key, &error),
        };
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.tls = Some(Box::new(tls));
        if let Some(client) = conn.client() {
            client.handshake = Handshake::Active;
        }
        self.handshakes.count += 1;
        self.handshakes.active.push_back((key, now_ms));
        self.tls_input(key, bytes);
    }

    /// The client's handshake is no longer under way, whatever became of it.
    pub(super) fn handshake_over(&mut self, key: Key) {
        let Some(client) = self.conns.get_mut(key).and_then(Conn::client) else { return };
        if std::mem::replace(&mut client.handshake, Handshake::None) == Handshake::Active {
            self.handshakes.count -= 1;
            while let Some(&(key, _)) = self.handshakes.active.front()
                && !self.is_active(key)
            {
                self.handshakes.active.pop_front();
            }
            if !self.handshakes.waiting.is_empty() {
                self.admit_later();
            }
        }
    }

    /// Not at once: what ends a handshake may be in the middle of something.
    fn admit_later(&mut self) {
        if !self.handshakes.timer_armed {
            self.wheel.insert(self.now_ms(), TimerOf::Handshakes);
            self.handshakes.timer_armed = true;
        }
    }

    /// Decrypts, and hands on what it was.
    fn tls_input(&mut self, key: Key, bytes: &mut [u8]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let client = conn.is_client();
        let Some(tls) = &mut conn.tls else { return };
        let was_handshaking = tls.is_handshaking();
        let heard_close = tls.heard_close();
        self.tls_scratch.plain.clear();
        let result = tls.receive(bytes, &mut self.tls_scratch);
        let closed = !heard_close && tls.heard_close();
        let done = was_handshaking && !tls.is_handshaking() && result.is_ok();
        if tls.has_unsent() {
            self.mark_dirty(key);
        }
        if done {
            self.handshake_done(key);
        }
        if let Ok(records) = result {
            self.stats.counters.pieces += records;
        }
        if !self.tls_scratch.plain.is_empty() {
            let plain = std::mem::take(&mut self.tls_scratch.plain);
            if client {
                self.client_received(key, &plain);
            } else {
                self.backend_received(key, &plain);
            }
            self.tls_scratch.plain = plain;
        }
        if let Err(error) = result {
            self.tls_failed(key, &error);
        } else if closed {
            self.peer_finished(key);
        }
    }

    fn handshake_done(&mut self, key: Key) {
        self.handshake_over(key);
        let now_ms = self.now_ms();
        let (idle_ms, leaving) = (u64::from(self.idle_ms()), self.leaving != super::Leaving::No);
        let Some(conn) = self.conns.get_mut(key) else { return };
        let resumed = u64::from(conn.tls.as_ref().is_some_and(|tls| tls.is_resumed()));
        if conn.is_client() {
            self.stats.counters.tls_handshakes += 1;
            self.stats.counters.tls_resumptions += resumed;
            if !leaving {
                conn.due_ms = now_ms + idle_ms;
            }
            return self.follow_conn_timer(key);
        }
        self.stats.counters.upstream_tls_handshakes += 1;
        self.stats.counters.upstream_tls_resumptions += resumed;
        self.stands(key);
    }

    /// A backend's connection stands: TLS begins on it, if it is to. False if that failed.
    pub(super) fn begin_upstream_tls(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(backend) = conn.backend() else { return };
        let upstream = self.upstreams.upstreams.get(backend.upstream as usize);
        let Some(how) = upstream.and_then(|upstream| upstream.tls.as_ref()) else {
            return self.stands(key);
        };
        let Some(config) = self.handshakes.clients.get(how.config) else {
            debug_assert!(false, "a backend that speaks TLS without a configuration");
            return self.unconnected(key, End::UpstreamTls);
        };
        match Tls::client(config, &how.name, &mut self.tls_scratch) {
            Ok(tls) => {
                conn.tls = Some(Box::new(tls));
                conn.receive_wanted = true;
                self.follow_receive(key);
                self.mark_dirty(key);
                self.follow_conn_timer(key);
            }
            Err(error) => self.tls_failed(key, &error),
        }
    }

    /// TLS cannot go on. The alert, if there is one, is in the connection's records and still goes out.
    fn tls_failed(&mut self, key: Key, error: &rustls::Error) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if matches!(conn.state, State::Moving(_)) {
            self.stats.counters.tls_failures += 1;
            if conn.stream.is_some() {
                self.client_cut(key);
            }
            return self.join(key, Close::Orderly);
        }
        if conn.state != State::Open {
            return;
        }
        // What failed is closed by now, so that its stage tells nothing.
        let opened = conn.tls.as_ref().is_some_and(|tls| tls.was_open());
        let handshaking = conn.is_handshaking() || (!conn.is_client() && !opened);
        let counters = &mut self.stats.counters;
        match (conn.is_client(), handshaking) {
            (true, true) => counters.tls_handshake_failures += 1,
            (false, true) => counters.upstream_tls_handshake_failures += 1,
            (_, false) => counters.tls_failures += 1,
        }
        self.tell_failure(key, words(error));
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(backend) = conn.backend() else {
            self.handshake_over(key);
            self.client_cut(key);
            return self.linger(key);
        };
        // A certificate of ours may be refused when the handshake is complete on our side (TLS 1.3).
        let first = backend.served == 0 && !backend.answered;
        if handshaking {
            self.unconnected(key, End::UpstreamTls);
        } else {
            self.backend_lost(key, if first { End::UpstreamTls } else { End::UpstreamMalformed });
        }
    }

    /// The control thread hears why, if it was not told of too many already.
    pub(super) fn tell_failure(&mut self, key: Key, error: String) {
        let turn = self.stats.counters.turns;
        let told = &mut self.handshakes.told;
        if told.0 != turn {
            *told = (turn, 0);
        }
        if told.1 >= TLS_FAILURES_TOLD_PER_TURN_MAX {
            return;
        }
        told.1 += 1;
        let Some(conn) = self.conns.get(key) else { return };
        let upstream = match &conn.role {
            Role::Client(_) => None,
            Role::Backend(backend) => Some(backend.upstream as usize),
        };
        let peer = self.io.peer(conn.socket);
        self.reports.push_back(Report::TlsFailed(Box::new(TlsFailure { upstream, peer, error })));
    }

    /// Sends the records that lie ready, or encrypts the next batch. Gives false if there was nothing to send.
    pub(super) fn pump_tls(&mut self, key: Key) -> bool {
        let level = self.is_sealing_reader(key) && {
            self.fill_for_reader(key);
            let stream = self.conns.get(key).and_then(|conn| self.streams.get(conn.stream?));
            stream.is_some_and(|stream| self.is_reader_level(stream, None))
        };
        let Some(conn) = self.conns.get_mut(key) else { return true };
        let Some(tls) = &mut conn.tls else { return false };
        let mut confirm = Confirm::Prompt;
        if !tls.has_unsent() && conn.state == State::Open && !tls.is_handshaking() {
            let Some(stream) = conn.stream.and_then(|key| self.streams.get_mut(key)) else { return true };
            let client = matches!(conn.role, Role::Client(_));
            let log =
                if client { Some(&stream.response) } else { stream.request().map(|request| &request.log) };
            let Some(log) = log else { return false };
            let (mut at, plain) = (conn.ledger.sent(), &mut self.tls_scratch.plain);
            let reads = stream.reader.is_some();
            if !reads {
                plain.clear();
            }
            while !reads
                && plain.len() < TLS_BATCH_BYTES_MAX
                && let Some(range) = log.lend(at, (TLS_BATCH_BYTES_MAX - plain.len()) as u32)
            {
                at += range.len() as u64;
                plain.extend(range.cells().iter().map(Cell::get));
            }
            if plain.is_empty() {
                return false;
            }
            let bytes = plain.len() as u32;
            let whole = if reads { level } else { at == log.end() };
            let (complete, paused) = match client {
                true => (!stream.produced, stream.paused),
                false => (stream.request_done, stream.upload_paused),
            };
            let stall_ms = u64::from(self.settings.routes[stream.route].deadlines.write_stall_ms);
            if client {
                stream.lent_since_us = stream.pending_since_us.take().unwrap_or(self.now_us);
            }
            if let Err(error) = tls.seal(&mut self.tls_scratch) {
                self.tls_failed(key, &error);
                return true;
            }
            if whole && complete && !paused {
                confirm = Confirm::Deferred;
            }
            conn.ledger.lend(bytes);
            conn.stall_check_ms = super::transfer::stall_check_ms(self.now_us / 1000, stall_ms);
        }
        let Some(range) = tls.out().lend(tls.ledger.sent(), LOG_SEGMENT_BYTES_MAX as u32) else {
            return true;
        };
        if tls.ledger.sent() + (range.len() as u64) < tls.out().end() {
            confirm = Confirm::Prompt;
        }
        tls.ledger.lend(range.len() as u32);
        conn.deferred = confirm == Confirm::Deferred;
        conn.ops.send = Some(self.io.send(key, conn.socket, range, confirm));
        conn.progress_ms = self.now_us / 1000;
        conn.acknowledged = Maybe::NONE;
        self.follow_conn_timer(key);
        true
    }

    /// Whether the next batch of a connection is put together for one who reads a stream by its id.
    fn is_sealing_reader(&self, key: Key) -> bool {
        let Some(conn) = self.conns.get(key) else { return false };
        let stream = conn.stream.and_then(|key| self.streams.get(key));
        let ready = conn.tls.as_ref().is_some_and(|tls| !tls.has_unsent() && !tls.is_handshaking());
        ready && conn.state == State::Open && stream.is_some_and(|stream| stream.reader.is_some())
    }

    fn fill_for_reader(&mut self, key: Key) {
        let Some(stream) = self.conns.get(key).and_then(|conn| conn.stream) else { return };
        self.tls_scratch.plain.clear();
        while let room = TLS_BATCH_BYTES_MAX - self.tls_scratch.plain.len()
            && room > 0
            && let Some(range) = self.next_of_reader(stream, room as u32, true)
        {
            self.tls_scratch.plain.extend(range.cells().iter().map(Cell::get));
        }
    }

    /// A send of records ended.
    pub(super) fn tls_sent(&mut self, key: Key, result: Result<u32, Errno>, deferred: bool) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(tls) = &mut conn.tls else { return };
        let (lent, bytes) = (tls.ledger.in_flight(), *result.as_ref().unwrap_or(&0));
        self.stats.counters.sends += 1;
        self.stats.counters.sends_short += u64::from(bytes < lent);
        let through = tls.confirmed(bytes);
        let unsent = tls.has_unsent();
        let plain = conn.ledger.in_flight();
        let client = conn.is_client();
        if plain > 0 && (through || result.is_err() || matches!(conn.state, State::Joining(_))) {
            let confirmed = if through { plain } else { 0 };
            return self.confirmed(key, confirmed, result.is_err(), deferred);
        }
        match conn.state {
            State::Joining(_) => self.follow_join(key),
            _ if result.is_err() && client => self.client_gone(key),
            _ if result.is_err() => self.backend_send_failed(key),
            State::Lingering if !unsent => self.io.shutdown(conn.socket, Half::Write),
            _ => self.mark_dirty(key),
        }
    }

    /// Our end of TLS is said before the socket's. True if there are records that must go out first.
    pub(super) fn say_close(&mut self, key: Key) -> bool {
        let Some(conn) = self.conns.get_mut(key) else { return false };
        let Some(tls) = &mut conn.tls else { return false };
        tls.say_close(&mut self.tls_scratch);
        tls.has_unsent()
    }

    /// The same of a connection that is shut at once: what the socket takes now is sent, and nothing waited for.
    pub(super) fn say_close_at_once(&mut self, key: Key) {
        if !self.say_close(key) {
            return;
        }
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(tls) = &mut conn.tls else { return };
        if conn.ops.send.is_none()
            && conn.ops.connect.is_none()
            && let Some(range) = tls.out().lend(tls.ledger.sent(), LOG_SEGMENT_BYTES_MAX as u32)
        {
            tls.ledger.lend(range.len() as u32);
            conn.ops.send = Some(self.io.send(key, conn.socket, range, Confirm::Prompt));
        }
    }
}

/// What went wrong. Who verifies a certificate says it in full; what rustls would put around that are names of its own types.
fn words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => why.to_string(),
        other => other.to_string(),
    }
}
