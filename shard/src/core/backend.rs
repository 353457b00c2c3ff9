//! Backends' connections: which one, the pool of idle ones, connecting, the single retry of a reused one that died.
//! What a backend says is handled in `relay`.

use super::Shard;
use super::client::write_backend_head;
use super::conn::{Backend, Conn, Role, State};
use super::stream::{Answer, Stream};
use crate::io::{Close, Errno, Io};
use protocol::http::{RequestHead, header_slots, parse_request};
use protocol::ledger::Ledger;
use protocol::limits::{CONNECT_ATTEMPTS_MAX, UPSTREAM_BACKOFF_MS};
use protocol::log::Log;
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;
use std::collections::VecDeque;

/// Backends' connections that wait for their next request, and how each backend fares.
#[derive(Default, Debug)]
pub(super) struct Pool {
    pub(super) upstreams: Vec<UpstreamState>,
}

/// One backend as this shard sees it.
#[derive(Default, Debug)]
pub(super) struct UpstreamState {
    /// Idle connections, the most recently used last.
    pub(super) idle: VecDeque<Key>,
    /// Streams under way.
    pub(super) active: u64,
    /// Connections that failed in a row.
    pub(super) failures: u64,
    /// Tried last until then, ms.
    resting_until_ms: u64,
    /// Address to connect to next.
    address: usize,
}

impl Pool {
    /// Indexes are stable: a new upstream set never has fewer entries.
    pub(super) fn follow(&mut self, upstreams: usize) {
        self.upstreams.resize_with(upstreams.max(self.upstreams.len()), UpstreamState::default);
    }
}

impl Stream {
    /// Whether the request is still whole in its log and may be sent again.
    pub(super) fn may_repeat(&self, retry_bytes_max: u64) -> bool {
        (self.answer == Answer::None || is_planted(Bug::RetryTooLate))
            && self.request().is_some()
            && self.request_start() == 0
            && self.request_end() <= retry_bytes_max
    }
}

impl<I: Io> Shard<I> {
    /// Writes the request's head for a backend and gets a connection for it.
    pub(super) fn begin_backend(&mut self, key: Key, head: &RequestHead<'_, '_>, raw: &[u8]) {
        let Some(stream) = self.streams.get(key) else { return };
        let (route, identity) = (stream.route, stream.dialect.is_model_endpoint());
        let Some(upstream) = self.pick(route, None) else {
            return self.end_stream(key, End::NoUpstream);
        };
        write_backend_head(&mut self.scratch, head, &self.upstreams.upstreams[upstream], identity);
        if let Some(stream) = self.streams.get_mut(key) {
            let others = self.settings.routes[stream.route].upstreams.len() > 1;
            let request = stream.request_mut();
            request.log.append(&[&self.scratch]);
            request.head_bytes = request.log.end();
            request.client_head = others.then(|| raw.into());
        }
        self.engage(key, upstream);
    }

    /// The backend with the fewest streams of this shard, resting ones last; `not` only if there is no other.
    fn pick(&self, route: usize, not: Option<usize>) -> Option<usize> {
        let now_ms = self.now_ms();
        let candidates = &self.settings.routes[route].upstreams;
        let rotate = (self.begun as usize) % candidates.len().max(1);
        (0..candidates.len())
            .map(|nth| candidates[(nth + rotate) % candidates.len()])
            .filter(|&upstream| {
                self.upstreams.upstreams.get(upstream).is_some_and(|u| !u.addresses.is_empty())
            })
            .min_by_key(|&upstream| {
                let state = &self.pool.upstreams[upstream];
                (Some(upstream) == not, state.resting_until_ms > now_ms, state.active)
            })
    }

    /// Puts a stream on a connection of this backend: a pooled one, or a new one.
    fn engage(&mut self, key: Key, upstream: usize) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.request_mut().upstream = Some(upstream);
        if !stream.retried
            && let Some(conn_key) = self.take_idle(upstream)
        {
            self.stats.counters.upstream_reuses += 1;
            self.occupy(conn_key, key);
            return self.ready(conn_key);
        }
        self.connect(key, upstream);
    }

    /// The most recently used idle connection that is still good.
    fn take_idle(&mut self, upstream: usize) -> Option<Key> {
        let now_ms = self.now_ms();
        while let Some(key) = self.pool.upstreams[upstream].idle.pop_back() {
            let age_ms = u64::from(self.settings.pool_age_ms);
            let Some(conn) = self.conns.get_mut(key) else { continue };
            let due_ms = conn.due_ms;
            let Some(backend) = conn.backend() else { continue };
            backend.idle = false;
            if due_ms <= now_ms || (age_ms > 0 && backend.opened_ms + age_ms <= now_ms) {
                self.stats.counters.pool_evictions += 1;
                self.join(key, Close::Orderly);
                continue;
            }
            return Some(key);
        }
        None
    }

    fn occupy(&mut self, conn_key: Key, stream_key: Key) {
        if let Some(conn) = self.conns.get_mut(conn_key) {
            conn.stream = Some(stream_key);
            conn.ledger = Ledger::default();
            conn.due_ms = u64::MAX;
            conn.body = None;
            if let Some(backend) = conn.backend() {
                self.pool.upstreams[backend.upstream as usize].active += 1;
                backend.answered = false;
                backend.interim = 0;
            }
        }
        if let Some(stream) = self.streams.get_mut(stream_key) {
            stream.backend = Some(conn_key);
        }
    }

    fn connect(&mut self, key: Key, upstream: usize) {
        let now_ms = self.now_ms();
        let Some(stream) = self.streams.get_mut(key) else { return };
        let connect_ms = self.settings.routes[stream.route].deadlines.connect_ms;
        let request = stream.request_mut();
        request.attempts += 1;
        if request.attempts == 1 {
            request.connect_due_ms = if connect_ms > 0 { now_ms + u64::from(connect_ms) } else { u64::MAX };
        }
        let due_ms = request.connect_due_ms;
        let addresses = &self.upstreams.upstreams[upstream].addresses;
        let address = self.pool.upstreams[upstream].address % addresses.len().max(1);
        let Some(&target) = addresses.get(address) else {
            return self.end_stream(key, End::NoUpstream);
        };
        let backend = Backend {
            upstream: upstream as u32,
            address: address as u16,
            served: 0,
            opened_ms: now_ms,
            answered: false,
            interim: 0,
            keep_alive: false,
            keep_alive_s: u32::MAX,
            idle: false,
        };
        let Some(conn_key) = self.conns.next_key() else {
            return self.end_stream(key, End::Overload);
        };
        self.stats.counters.upstream_connects += 1;
        match self.io.connect(conn_key, target) {
            Ok((socket, op)) => {
                let mut conn = Conn::new(socket, Role::Backend(backend));
                conn.ops.connect = Some(op);
                conn.receive_wanted = true;
                let inserted = self.conns.insert(conn);
                debug_assert!(inserted.is_ok_and(|inserted| inserted == conn_key), "the key was foretold");
                self.occupy(conn_key, key);
                if let Some(conn) = self.conns.get_mut(conn_key) {
                    conn.due_ms = due_ms;
                }
                self.follow_conn_timer(conn_key);
            }
            Err(_) => {
                self.stats.counters.upstream_connect_errors += 1;
                self.end_stream(key, End::Overload);
            }
        }
    }

    pub(super) fn connected(&mut self, key: Key, result: Result<(), Errno>) {
        let Some(conn) = self.conns.get_mut(key) else {
            debug_assert!(false, "a completion for a freed connection");
            return;
        };
        conn.ops.connect = None;
        if matches!(conn.state, State::Joining(_)) {
            return self.follow_join(key);
        }
        match result {
            Ok(()) => self.begin_upstream_tls(key),
            Err(_) => self.unconnected(key, End::UpstreamRefused),
        }
    }

    /// The connection stands, TLS included.
    pub(super) fn stands(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.due_ms = u64::MAX;
        let Some(backend) = conn.backend() else { return };
        let state = &mut self.pool.upstreams[backend.upstream as usize];
        (state.failures, state.resting_until_ms) = (0, 0);
        self.ready(key);
    }

    /// A connection could not be made: the stream gets another, or ends with `end`.
    pub(super) fn unconnected(&mut self, key: Key, end: End) {
        let now_ms = self.now_ms();
        let Some(conn) = self.conns.get_mut(key) else { return };
        let stream = conn.stream;
        let Some(backend) = conn.backend() else { return };
        let (upstream, address) = (backend.upstream as usize, usize::from(backend.address));
        self.stats.counters.upstream_connect_errors += 1;
        let addresses = self.upstreams.upstreams.get(upstream).map_or(1, |upstream| upstream.addresses.len());
        let state = &mut self.pool.upstreams[upstream];
        state.failures += 1;
        state.address = address + 1;
        // A backend rests when all its addresses have refused in a row.
        if state.failures >= addresses as u64 {
            state.resting_until_ms = now_ms + UPSTREAM_BACKOFF_MS;
        }
        self.disengage(key, Close::Orderly);
        if let Some(stream) = stream {
            self.engage_another(stream, upstream, end);
        }
    }

    /// After a connection could not be made: another address or another backend, within the attempts allowed.
    fn engage_another(&mut self, key: Key, failed: usize, end: End) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.end.is_some() {
            return;
        }
        let request = stream.request_mut();
        request.tls_failed |= end == End::UpstreamTls;
        let end = if request.tls_failed { End::UpstreamTls } else { end };
        let (attempts, begun) = (request.attempts, request.log.start() > 0);
        let addresses: usize = self.settings.routes[stream.route]
            .upstreams
            .iter()
            .filter_map(|&upstream| self.upstreams.upstreams.get(upstream))
            .map(|upstream| upstream.addresses.len())
            .sum();
        if attempts >= CONNECT_ATTEMPTS_MAX.min(addresses as u32) || begun {
            return self.end_stream(key, end);
        }
        stream.step(Step::Retry);
        let route = stream.route;
        // The failed backend's next address while it is not resting, else another backend.
        let Some(upstream) = self.pick(route, self.is_resting(failed).then_some(failed)) else {
            return self.end_stream(key, end);
        };
        if upstream != failed && !self.rewrite_head(key, upstream) {
            return self.end_stream(key, end);
        }
        self.engage(key, upstream);
    }

    fn is_resting(&self, upstream: usize) -> bool {
        self.pool.upstreams[upstream].resting_until_ms > self.now_ms()
    }

    /// Writes the head anew for another backend's name and path, in front of the body bytes that are already here.
    fn rewrite_head(&mut self, key: Key, upstream: usize) -> bool {
        let Some(stream) = self.streams.get_mut(key) else { return false };
        let identity = stream.dialect.is_model_endpoint();
        let request = stream.request_mut();
        let Some(raw) = &request.client_head else { return false };
        let mut slots = header_slots();
        let Ok(Some(head)) = parse_request(raw, &mut slots, &self.settings.head) else { return false };
        write_backend_head(&mut self.scratch, &head, &self.upstreams.upstreams[upstream], identity);
        let mut log = Log::new();
        log.append(&[&self.scratch]);
        let mut from = request.head_bytes;
        request.head_bytes = log.end();
        while let Some(range) = request.log.lend(from, u32::MAX) {
            from += range.len() as u64;
            log.append(&[&range.to_vec()]);
        }
        request.log = log;
        true
    }

    /// The connection stands and its stream's request can go out.
    fn ready(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.receive_wanted = true;
        let Some(stream_key) = conn.stream else { return };
        self.follow_receive(key);
        self.mark_dirty(key);
        if self.streams.get(stream_key).is_some_and(|stream| stream.phase == Phase::Connect) {
            self.await_head(stream_key);
        }
        self.follow_conn_timer(key);
    }

    /// The request is whole and on its way: the backend's head is awaited.
    pub(super) fn await_head(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.step(Step::Connected);
        let head_ms = self.settings.routes[stream.route].deadlines.upstream_head_ms;
        stream.phase_due_ms = if head_ms == 0 { u64::MAX } else { now_ms + u64::from(head_ms) };
        self.follow_stream_timer(key);
    }

    /// Takes a connection off its stream and closes it.
    pub(super) fn disengage(&mut self, key: Key, how: Close) {
        self.release(key);
        self.join(key, how);
    }

    /// Takes a connection off its stream.
    fn release(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(stream) = conn.stream.take() else { return };
        let Some(backend) = conn.backend() else { return };
        if !is_planted(Bug::PermitLost) {
            self.pool.upstreams[backend.upstream as usize].active -= 1;
        }
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.backend = None;
        }
    }

    /// After a complete exchange: back into the pool if both sides allow it, else closed.
    pub(super) fn retire(&mut self, key: Key) {
        self.release(key);
        let now_ms = self.now_ms();
        let leaving = self.leaving != super::Leaving::No;
        let pool_idle_ms = u64::from(self.settings.pool_idle_ms);
        let Some(conn) = self.conns.get_mut(key) else { return };
        let reusable =
            conn.state == State::Open && !conn.peer_fin && conn.held.is_empty() && conn.ops.send.is_none();
        let Some(backend) = conn.backend() else { return };
        // A backend that names its own patience is left a second before it runs out.
        let promised_ms = u64::from(backend.keep_alive_s.saturating_sub(1)) * 1000;
        let idle_ms = pool_idle_ms.min(promised_ms);
        if !reusable || !backend.keep_alive || leaving || idle_ms == 0 || self.settings.pool_idle_max == 0 {
            return self.join(key, Close::Orderly);
        }
        backend.idle = true;
        backend.served += 1;
        let upstream = backend.upstream as usize;
        conn.body = None;
        conn.due_ms = now_ms + idle_ms;
        conn.receive_wanted = true;
        self.follow_receive(key);
        self.follow_conn_timer(key);
        let idle = &mut self.pool.upstreams[upstream].idle;
        idle.push_back(key);
        if idle.len() > self.settings.pool_idle_max
            && let Some(oldest) = idle.pop_front()
        {
            self.stats.counters.pool_evictions += 1;
            self.join(oldest, Close::Orderly);
        }
    }

    /// An idle connection ended: by its peer, or because its time is over.
    pub(super) fn leave_pool(&mut self, key: Key, by_peer: bool) {
        if let Some(backend) = self.conns.get_mut(key).and_then(Conn::backend) {
            backend.idle = false;
            let upstream = backend.upstream as usize;
            self.pool.upstreams[upstream].idle.retain(|&idle| idle != key);
        }
        let counters = &mut self.stats.counters;
        *(if by_peer { &mut counters.pool_peer_closes } else { &mut counters.pool_evictions }) += 1;
        self.join(key, Close::Orderly);
    }

    pub(super) fn close_pool(&mut self) {
        for upstream in 0..self.pool.upstreams.len() {
            for key in std::mem::take(&mut self.pool.upstreams[upstream].idle) {
                self.join(key, Close::Orderly);
            }
        }
    }

    /// A connection under way broke. If it was a reused one and nothing of the answer had come, the backend had most likely
    /// closed it while idle: the request goes out once more on a fresh one. Else the stream ends with `end`.
    pub(super) fn backend_lost(&mut self, key: Key, end: End) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if matches!(conn.state, State::Joining(_)) {
            return;
        }
        let stream_key = conn.stream;
        if stream_key.is_some() && conn.is_handshaking() {
            self.stats.counters.upstream_tls_handshake_failures += 1;
            self.tell_failure(key, format!("the connection ended during the handshake ({})", end.name()));
            return self.unconnected(key, End::UpstreamTls);
        }
        let Some(backend) = conn.backend() else { return };
        if backend.idle {
            return self.leave_pool(key, true);
        }
        let (reused, answered, upstream) = (backend.served > 0, backend.answered, backend.upstream as usize);
        let retry_bytes_max = self.settings.retry_bytes_max;
        let Some(stream_key) = stream_key else { return self.join(key, Close::Orderly) };
        let repeat = self.streams.get_mut(stream_key).is_some_and(|stream| {
            let too_late = is_planted(Bug::RetryTooLate) && stream.has_events_answer() && !stream.end_mark;
            let repeat =
                reused && (!answered || too_late) && !stream.retried && stream.may_repeat(retry_bytes_max);
            if repeat && too_late {
                stream.phase = Phase::Connect;
            }
            if repeat {
                stream.retried = true;
                stream.step(Step::Retry);
            }
            repeat
        });
        if repeat {
            self.stats.counters.upstream_retries += 1;
            self.disengage(key, Close::Orderly);
            // Its name may have lost its addresses meanwhile.
            let addresses = self.upstreams.upstreams.get(upstream).map_or(0, |known| known.addresses.len());
            return if addresses > 0 {
                self.engage(stream_key, upstream)
            } else {
                self.engage_another(stream_key, upstream, end)
            };
        }
        self.backend_broke(stream_key, end);
    }

    /// A send failed. What the backend said before it closed may still be on its way (an early error answer): the receive
    /// tells how it ends.
    pub(super) fn backend_send_failed(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.ops.receive.is_none() {
            self.backend_lost(key, End::UpstreamReset);
        }
    }
}
