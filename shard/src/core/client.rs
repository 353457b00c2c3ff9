//! The client's side: bytes in, requests begun, bodies handed on, and the client's leaving.

use super::Shard;
use super::conn::State;
use super::relay::waits_for_line_end;
use super::stream::{Answer, Scanning, Stream};
use crate::io::{Close, Io};
use crate::settings::{LeaveChoices, Route};
use crate::tls::{HANDSHAKE_FAILURE, HELLO_BYTE};
use protocol::background::NEEDS_STREAM;
use protocol::cors;
use protocol::dialect::Dialect;
use protocol::facts::{Background, Rewriter};
use protocol::http::{
    self, BodyDecoder, Framing, Piece, Refusal, RequestHead, Version, header_slots, parse_request,
};
use protocol::limits::{BODY_PROGRESS_BYTES, LINGER_BYTES_MAX};
use protocol::phase::{End, Step};
use protocol::resume::{Ask, Leave, NotALeave};
use protocol::slots::Key;

/// What the start of some input is.
enum Start {
    /// A head; its stream has begun.
    Begun,
    /// A head that is not complete.
    Partial,
    /// Nothing that is to be kept: empty lines, or bytes that were refused.
    Nothing,
}

/// Bytes of a request line kept for the access log.
const DESCRIPTION_BYTES_MAX: usize = 120;

impl<I: Io> Shard<I> {
    pub(super) fn client_received(&mut self, key: Key, bytes: &[u8]) {
        self.stats.counters.client_received_bytes += bytes.len() as u64;
        let Some(conn) = self.conns.get_mut(key) else { return };
        match conn.state {
            State::Joining(_) => return,
            State::Moving(_) => return conn.held.extend_from_slice(bytes),
            State::Lingering => {
                let dropped = conn.client().map_or(0, |client| {
                    client.dropped = client.dropped.saturating_add(bytes.len() as u32);
                    client.dropped
                });
                if u64::from(dropped) > LINGER_BYTES_MAX {
                    self.join(key, Close::Orderly);
                }
                return;
            }
            State::Open => {}
        }
        if bytes[0] == HELLO_BYTE && conn.tls.is_none() && conn.held.is_empty() && conn.stream.is_none() {
            return self.refuse_hello(key);
        }
        if conn.held.is_empty() {
            let left = self.client_input(key, bytes);
            return self.hold(key, bytes[bytes.len() - left..].to_vec(), 0);
        }
        if conn.stream.is_some() {
            // Behind a request under way more is only kept; it is looked at when its turn comes.
            conn.held.extend_from_slice(bytes);
            return self.held_grew(key);
        }
        let mut held = conn.take_held();
        if waits_for_line_end(&mut held, bytes, self.settings.head.head_bytes) {
            conn.held = held;
            return;
        }
        held.extend_from_slice(bytes);
        self.client_held_input(key, held, 0);
    }

    /// Takes what was held, from `from` on.
    pub(super) fn client_held_input(&mut self, key: Key, mut held: Vec<u8>, from: usize) {
        let left = self.client_input(key, &held[from..]);
        let mut from = held.len() - left;
        // Not with every request of many that came together, or each would move all that follow it.
        if from > left {
            held.drain(..from);
            from = 0;
        }
        self.hold(key, held, from);
    }

    /// Keeps what a connection is not ready for.
    fn hold(&mut self, key: Key, held: Vec<u8>, from: usize) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if from < held.len() && matches!(conn.state, State::Open | State::Moving(_)) {
            (conn.held, conn.held_from) = (held, from as u32);
        }
        self.held_grew(key);
    }

    /// What is pipelined has the limit of a head.
    pub(super) fn held_grew(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.stream.is_some() && conn.held().len() >= self.settings.head.head_bytes {
            self.want_receive(key, false);
        }
        self.follow_held(key);
    }

    /// Takes input as far as the connection's state allows; gives the bytes at its end that are to be held.
    fn client_input(&mut self, key: Key, mut input: &[u8]) -> usize {
        while !input.is_empty() {
            let Some(conn) = self.conns.get_mut(key) else { return 0 };
            if conn.state != State::Open {
                return 0;
            }
            let in_body = conn.body.is_some();
            match conn.stream {
                None => match self.client_head(key, &mut input) {
                    Start::Begun => {}
                    Start::Partial => return input.len(),
                    Start::Nothing => return 0,
                },
                Some(_) if in_body => {
                    self.client_body(key, &mut input);
                }
                // The next request, pipelined: it waits its turn.
                Some(_) => return input.len(),
            }
        }
        0
    }

    /// Parses a head and begins its stream.
    fn client_head(&mut self, key: Key, input: &mut &[u8]) -> Start {
        let mut slots = header_slots();
        match parse_request(input, &mut slots, &self.settings.head) {
            Ok(Some(head)) => {
                if let Some((home, sent)) = self.home_elsewhere(key, &head) {
                    self.begin_move(key, home, sent);
                    return Start::Partial;
                }
                let raw = &input[..head.head_bytes];
                *input = &input[head.head_bytes..];
                self.begin(key, &head, raw, !input.is_empty());
                Start::Begun
            }
            // Empty lines between requests (RFC 9112 section 2.2) are no beginning of one.
            Ok(None) if input.ends_with(b"\r\n") && input.iter().all(|byte| b"\r\n".contains(byte)) => {
                Start::Nothing
            }
            Ok(None) => {
                let head_ms = self.settings.routes.last().map_or(0, |route| route.deadlines.head_ms);
                let now_ms = self.now_ms();
                let Some(conn) = self.conns.get_mut(key) else { return Start::Nothing };
                // The head's own clock starts with its first byte and is not extended by later ones.
                if conn.client().is_some_and(|client| !std::mem::replace(&mut client.in_head, true)) {
                    conn.due_ms = if head_ms == 0 { u64::MAX } else { now_ms + u64::from(head_ms) };
                }
                self.follow_conn_timer(key);
                Start::Partial
            }
            Err(refusal) => {
                self.begin_refused(key, dialect_of_start(input), refusal);
                Start::Nothing
            }
        }
    }

    /// A stream that consists of nothing but its refusal.
    pub(super) fn begin_refused(&mut self, key: Key, dialect: Dialect, refusal: Refusal) {
        let route = self.settings.routes.len() - 1;
        let stream = Stream::new(key, route, dialect, Version::Http11, self.now_us);
        if let Some(stream) = self.attach(key, stream) {
            self.refuse(stream, refusal);
        }
    }

    /// TLS on a plain port is told so in its own words.
    fn refuse_hello(&mut self, key: Key) {
        self.stats.counters.tls_hello_refused += 1;
        let route = self.settings.routes.len() - 1;
        let stream = Stream::new(key, route, Dialect::Plain, Version::Http11, self.now_us);
        let Some(stream_key) = self.attach(key, stream) else { return };
        if let Some(stream) = self.streams.get_mut(stream_key) {
            stream.append_response(&HANDSHAKE_FAILURE, self.now_us);
            stream.answer = Answer::Body(Framing::Length(HANDSHAKE_FAILURE.len() as u64));
            (stream.produced, stream.close) = (true, true);
        }
        self.refuse(stream_key, Refusal::TlsOnPlain);
    }

    /// A head that did not arrive in time.
    pub(super) fn refuse_late_head(&mut self, key: Key) {
        let route = self.settings.routes.len() - 1;
        let dialect = self.conns.get(key).map_or(Dialect::Plain, |conn| dialect_of_start(conn.held()));
        let mut stream = Stream::new(key, route, dialect, Version::Http11, self.now_us);
        stream.close = true;
        if let Some(stream) = self.attach(key, stream) {
            self.end_stream(stream, End::HeadTimeout);
        }
    }

    /// Puts a new stream into its slot and on its connection.
    fn attach(&mut self, key: Key, mut stream: Stream) -> Option<Key> {
        self.begun += 1;
        if self.settings.records {
            stream.description = Some(Box::default());
        }
        let Ok(stream) = self.streams.insert(stream) else {
            // There are as many stream slots as client slots, and a client has one stream.
            debug_assert!(false, "no stream slot for a client that has a slot");
            self.join(key, Close::Reset);
            return None;
        };
        let conn = self.conns.get_mut(key)?;
        conn.stream = Some(stream);
        conn.ledger = protocol::ledger::Ledger::default();
        conn.due_ms = u64::MAX;
        if let Some(client) = conn.client() {
            client.requests += 1;
            client.in_head = false;
            client.hops = 0;
            client.sent = false;
        }
        Some(stream)
    }

    fn begin(&mut self, key: Key, head: &RequestHead<'_, '_>, raw: &[u8], more_input: bool) {
        self.stats.counters.requests += 1;
        let path = head.path();
        let Some(index) = self.settings.routes.iter().position(|route| route.matches(path)) else {
            return self.begin_refused(key, Dialect::of_path(path), Refusal::NotFound);
        };
        let route = &self.settings.routes[index];
        let relayed = !route.upstreams.is_empty();
        let durable = self.settings.durable.covers(path);
        let asks = !durable && super::resume::covers(head);
        let elsewhere = durable && self.durable_elsewhere(key, path).is_some();
        let dialect = if durable { Dialect::Plain } else { Dialect::of_path(path) };
        let mut stream = Stream::new(key, index, dialect, head.version, self.now_us);
        stream.step(Step::HeadDone);
        stream.head_only = head.method == "HEAD";
        stream.close = !head.keep_alive;
        stream.streaming = head.accepts_event_stream && !dialect.is_model_endpoint();
        stream.request_done = head.framing == Framing::None || head.framing == Framing::Length(0);
        stream.request_chunked = head.framing == Framing::Chunked;
        if dialect.is_model_endpoint() && !stream.request_done {
            if dialect == Dialect::Responses && route.resume.is_some() {
                stream.request_mut().rewriter = Some(Box::new(Rewriter::new()));
            } else {
                stream.request_mut().scanner = Scanning::Begins;
            }
        }
        let now_ms = self.now_ms();
        let due = |ms: u32| if ms == 0 { u64::MAX } else { now_ms + u64::from(ms) };
        stream.total_due_ms = due(route.deadlines.total_ms);
        stream.phase_due_ms = due(route.deadlines.body_ms);
        // Durable streams have a rule of their own.
        let cors = if durable { cors::Said::default() } else { route.cors.of(head) };
        stream.cors = cors.lines;
        let preflight = cors.preflight.filter(|_| stream.request_done);
        let Some(stream_key) = self.attach(key, stream) else { return };
        self.describe(stream_key, head);
        if !self.check_request(stream_key, relayed, head, raw) {
            return;
        }
        if let Some(told) = preflight {
            self.request_complete(stream_key);
            return self.answer_empty(stream_key, 204, told);
        }
        if elsewhere {
            // Its home takes nobody over any more.
            return self.end_stream(stream_key, End::Drain);
        }
        if asks {
            return self.begin_asking(stream_key, head);
        }
        if let Some((source, want)) = self.response_asked_for(index, head) {
            return self.ask_response(stream_key, source, want);
        }
        if !durable && !self.take_on_leave(stream_key, head) {
            return;
        }
        if durable {
            self.begin_durable(stream_key, head);
        } else if !relayed {
            if !self.begin_demo(stream_key, head) {
                return;
            }
        } else {
            self.begin_backend(stream_key, head, raw);
        }
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        if stream.end.is_some() {
            return;
        }
        if stream.request_done {
            return self.request_complete(stream_key);
        }
        // RFC 9110 section 10.1.1: not needed when the body is already on its way.
        if head.expect_continue && head.version == Version::Http11 && !more_input {
            stream.append_response(b"HTTP/1.1 100 Continue\r\n\r\n", self.now_us);
            self.mark_dirty(key);
        }
        if let Some(conn) = self.conns.get_mut(key) {
            conn.body = Some(BodyDecoder::new(head.framing, self.settings.body_bytes_max));
            if let Some(client) = conn.client() {
                client.body_progress = BODY_PROGRESS_BYTES;
            }
        }
        self.follow_stream_timer(stream_key);
    }

    /// A request for a stream by its id.
    fn begin_asking(&mut self, key: Key, head: &RequestHead<'_, '_>) {
        let done = self.streams.get(key).is_some_and(|stream| stream.request_done);
        if self.shard_of_stream(head.path()).is_some() && !self.reads_mirror(head) {
            // Its home takes nobody over any more.
            return self.end_stream(key, End::Drain);
        }
        if !done {
            // Nobody sends a body with these, and it would have to be read to its end.
            return self.refuse(key, Refusal::BodyTooLarge);
        }
        self.request_complete(key);
        self.ask(key, Ask::parse(head));
    }

    /// What a request says of its last client's leave. False: it was refused.
    fn take_on_leave(&mut self, key: Key, head: &RequestHead<'_, '_>) -> bool {
        let leave = match Leave::of(head) {
            Ok(Some(leave)) => leave,
            Ok(None) => return true,
            Err(NotALeave) => {
                self.refuse(key, Refusal::BadOnLeave);
                return false;
            }
        };
        let Some(stream) = self.streams.get_mut(key) else { return false };
        let resume = self.settings.routes[stream.route].resume;
        let choices = resume.map_or(LeaveChoices::CANCEL, |resume| resume.leave_choices);
        let chosen = choices.choose(leave);
        if chosen.is_none() {
            self.refuse(key, Refusal::OnLeaveForbidden);
            return false;
        }
        stream.request_mut().on_leave = chosen;
        true
    }

    fn describe(&mut self, key: Key, head: &RequestHead<'_, '_>) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if let Some(description) = &mut stream.description {
            let mut request = format!("{} {}", head.method, head.path());
            // Targets are ASCII (RFC 9112 section 3.2), so any byte is a boundary.
            request.truncate(DESCRIPTION_BYTES_MAX);
            description.request = request.into();
        }
    }

    /// What can be said of a request by its head alone. False: it was refused.
    fn check_request(&mut self, key: Key, relayed: bool, head: &RequestHead<'_, '_>, raw: &[u8]) -> bool {
        let durable = self.settings.durable.covers(head.path());
        let length = match head.framing {
            Framing::Length(length) => length,
            _ => 0,
        };
        let client = self.streams.get(key).and_then(|stream| self.conns.get(stream.client?));
        let secure = client.is_some_and(|conn| conn.tls.is_some());
        let refusal = if head.method == "CONNECT" || head.method == "TRACE" {
            Some(Refusal::MethodNotAllowed)
        } else if !secure
            && target_of_start(raw).get(..8).is_some_and(|start| start.eq_ignore_ascii_case(b"https://"))
        {
            // RFC 9110 section 7.4: this connection is not secured.
            Some(Refusal::Misdirected)
        } else if self.settings.routes.len() > 1 && head.has_dot_segments() {
            // The backend would read another path than the one that chose the route.
            Some(Refusal::BadTarget)
        } else if length > self.settings.body_bytes_max {
            Some(Refusal::BodyTooLarge)
        } else if head.method == "POST"
            && !durable
            && Dialect::of_path(head.path()).is_model_endpoint()
            && head.framing == Framing::None
        {
            Some(Refusal::LengthRequired)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            self.refuse(key, refusal);
            return false;
        }
        if (durable || relayed) && self.leaving_now() {
            self.end_stream(key, End::Stopped);
            return false;
        }
        true
    }

    /// Hands body bytes on to the backend's log; advances `input` past the body.
    fn client_body(&mut self, key: Key, input: &mut &[u8]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(stream_key) = conn.stream else { return };
        let Some(body) = &mut conn.body else { return };
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        // An answer that is already complete wants no more of the request.
        let wanted = !stream.produced;
        let mut progress = 0;
        let outcome = loop {
            match body.next(input) {
                Ok(Piece::Data(piece)) => {
                    self.stats.counters.pieces += 1;
                    progress += piece.len() as u32;
                    if wanted {
                        stream.append_request(piece);
                    }
                }
                Ok(Piece::End) => break Ok(true),
                Ok(Piece::NeedMore) => break Ok(false),
                Err(refusal) => break Err(refusal),
            }
        };
        let Some(client) = conn.client() else { return };
        client.body_progress = client.body_progress.saturating_sub(progress);
        if client.body_progress == 0 {
            client.body_progress = BODY_PROGRESS_BYTES;
            let body_ms = self.settings.routes[stream.route].deadlines.body_ms;
            if body_ms > 0 && stream.phase == protocol::phase::Phase::Body {
                stream.phase_due_ms = self.now_us / 1000 + u64::from(body_ms);
            }
        }
        let backend = stream.backend;
        match outcome {
            Ok(done) => {
                if done && wanted {
                    stream.take_facts();
                }
                let refused = wanted && stream.background == Background::Undecided;
                if done {
                    conn.body = None;
                    if refused {
                        stream.request_done = true;
                    } else if wanted {
                        if stream.request_chunked {
                            stream.append_last_request_chunk();
                        }
                        self.request_complete(stream_key);
                    } else {
                        stream.request_done = true;
                    }
                }
                if refused {
                    // Nothing of what came last has left for the backend.
                    return self.answer_error(stream_key, &NEEDS_STREAM, "");
                }
                if let Some(backend) = backend {
                    self.mark_dirty(backend);
                }
                self.follow_marks(stream_key);
            }
            Err(refusal) => {
                conn.body = None;
                *input = &[];
                self.refuse(stream_key, refusal);
            }
        }
    }

    /// The request is whole: from here on the model is waited for.
    pub(super) fn request_complete(&mut self, key: Key) {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.request_done = true;
        stream.take_facts();
        stream.asked_us = now_us;
        stream.step(Step::BodyDone);
        if stream.background != Background::No && self.leaving != super::Leaving::No {
            // Nobody could come back for it.
            return self.end_stream(key, End::Drain);
        }
        let deadlines = self.settings.routes[stream.route].deadlines;
        if stream.streaming && deadlines.first_token_ms > 0 {
            stream.token_due_ms = now_us / 1000 + u64::from(deadlines.first_token_ms);
        }
        if stream.phase == protocol::phase::Phase::Connect {
            stream.phase_due_ms = u64::MAX;
            let connected =
                stream.backend.and_then(|key| self.conns.get(key)).is_some_and(|conn| !conn.is_connecting());
            if connected {
                self.await_head(key);
            }
        }
        if self.streams.get(key).is_some_and(|stream| stream.demo.is_some()) {
            self.start_demo(key);
        }
        // An answer may have begun before.
        self.begin_storing(key);
        if self.streams.get(key).is_some_and(|stream| stream.durable.is_some()) {
            self.durable_complete(key);
        }
        self.follow_stream_timer(key);
    }

    /// The client's FIN: it left, or it only has nothing more to say.
    pub(super) fn client_fin(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(stream) = conn.stream.and_then(|key| self.streams.get_mut(key)) else {
            return self.join(key, Close::Orderly);
        };
        if !stream.request_done && !stream.produced {
            // A request that can never become whole.
            return self.client_gone(key);
        }
        if self.fin_means_left(key) && !self.stream_of(key).is_some_and(|stream| stream.produced) {
            return self.client_gone(key);
        }
        // The answer is still sent, and those to requests already here.
        self.watch_served(key);
        self.mark_dirty(key);
    }

    fn stream_of(&self, conn: Key) -> Option<&Stream> {
        self.conns.get(conn).and_then(|conn| conn.stream).and_then(|key| self.streams.get(key))
    }

    /// How a connection is closed whose answer may not have been delivered whole: to a client that is told the end of the
    /// body by nothing but FIN, a cut one must not look whole.
    pub(super) fn how_to_cut(&self, stream: Key) -> Close {
        match self.streams.get(stream) {
            Some(stream) if stream.ends_by_close() => Close::Reset,
            _ => Close::Orderly,
        }
    }

    /// The client is gone: its stream ends, and its backend is let go at once.
    pub(super) fn client_gone(&mut self, key: Key) {
        let how = self.client_cut(key);
        self.join(key, how);
    }

    /// Ends what a client that is gone was being told; gives how its connection is to be closed.
    pub(super) fn client_cut(&mut self, key: Key) -> Close {
        let stream = self.conns.get(key).and_then(|conn| conn.stream);
        let how = stream.map_or(Close::Orderly, |stream| self.how_to_cut(stream));
        if let Some(stream) = stream
            && self.may_detach(stream)
        {
            self.detach(stream);
        } else if let Some(stream) = stream {
            // One that left with the end mark in hand had all it was owed.
            let served = self.streams.get(stream).is_some_and(|stream| {
                let sent = self.conns.get(key).map_or(0, |conn| conn.ledger.sent());
                stream.end_mark && sent >= stream.end_mark_at
            });
            self.end_stream(stream, End::ClientLeft);
            // What was complete but not delivered was not delivered.
            self.override_end(stream, if served { End::Done } else { End::ClientLeft });
            self.settle(stream);
        }
        how
    }

    /// After an answer was delivered: the requests that were pipelined behind it, or the wait for the next one.
    pub(super) fn next_request(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let idle_ms = self.settings.routes.last().map_or(0, |route| route.deadlines.keep_alive_ms);
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.stream = None;
        conn.ledger = protocol::ledger::Ledger::default();
        conn.due_ms = if idle_ms == 0 { u64::MAX } else { now_ms + u64::from(idle_ms) };
        let (held, from) = (std::mem::take(&mut conn.held), std::mem::take(&mut conn.held_from));
        let fin = conn.peer_fin;
        self.follow_conn_timer(key);
        if !held.is_empty() {
            self.client_held_input(key, held, from as usize);
        }
        let Some(conn) = self.conns.get(key) else { return };
        if conn.state != State::Open {
            return;
        }
        if conn.stream.is_none() && (fin || self.leaving != super::Leaving::No) {
            return self.linger(key);
        }
        if fin {
            // For the request that was pipelined in front of it, the FIN means what it means for any.
            return self.client_fin(key);
        }
        // Unless the request that was just begun is held up by its backend already.
        let paused = self.stream_of(key).is_some_and(|stream| stream.upload_paused);
        if !paused
            && self.conns.get(key).is_some_and(|conn| conn.held().len() < self.settings.head.head_bytes)
        {
            self.want_receive(key, true);
        }
        self.leave_if_uneven(key);
    }

    fn leaving_now(&self) -> bool {
        matches!(self.leaving, super::Leaving::Stopping { .. })
    }
}

impl Route {
    /// Whether a request path belongs to this route: equal to the prefix, or below it at a segment's boundary. The
    /// prefix "/" has every target, `*` of OPTIONS too.
    pub fn matches(&self, path: &str) -> bool {
        if self.path_prefix == "/" {
            return true;
        }
        match path.strip_prefix(self.path_prefix.as_str()) {
            Some(rest) => rest.is_empty() || self.path_prefix.ends_with('/') || rest.starts_with('/'),
            None => false,
        }
    }
}

/// The target in a head that may be incomplete or refused; empty when it has none.
fn target_of_start(start: &[u8]) -> &[u8] {
    let line = start.trim_ascii_start().split(|byte| matches!(byte, b'\r' | b'\n')).next();
    line.and_then(|line| line.split(|byte| *byte == b' ').nth(1)).unwrap_or_default()
}

/// The dialect of such a head's path: an error has the shape of the path's API even when nothing else is known.
pub(super) fn dialect_of_start(start: &[u8]) -> Dialect {
    str::from_utf8(target_of_start(start)).map_or(Dialect::Plain, Dialect::of_path)
}

/// A head written for a backend, and its length.
pub(super) fn write_backend_head(
    out: &mut Vec<u8>,
    head: &RequestHead<'_, '_>,
    upstream: &crate::settings::Upstream,
    identity: bool,
) {
    out.clear();
    http::write_upstream_request(out, head, &upstream.authority, &upstream.base_path, identity);
}
