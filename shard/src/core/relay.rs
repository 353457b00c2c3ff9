//! What a backend says: its head, its body, its events, its end, and how each reaches the client's log.

use super::Shard;
use super::background::note;
use super::conn::{Conn, Maybe, State};
use super::stream::{Answer, Stream};
use crate::io::Io;
use protocol::cors;
use protocol::dialect::{Dialect, Meaning};
use protocol::facts::Background;
use protocol::http::{
    BodyDecoder, ClientHead, Framing, Piece, ResponseHead, Version, header_slots, parse_response,
    write_client_response, write_own_response_head,
};
use protocol::ledger::Ledger;
use protocol::limits::{INTERIM_RESPONSES_MAX, LATE_ERROR_BYTES_MAX};
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;
use protocol::sse::{Block, Decoder};

/// Header lines of every event stream: no cache, no proxy in between may hold events back.
pub(super) const EVENT_STREAM_HEADERS: &str = "Content-Type: text/event-stream; charset=utf-8\r\n\
    Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n";

/// Bytes by which a relayed receive may grow besides an eighth of itself: header lines of ours, an id line, a chunk head.
const RELAY_ROOM_BYTES: usize = 96;

/// Header lines put together without allocation.
pub(super) struct ExtraLines {
    bytes: [u8; 512 + cors::LINES_BYTES_MAX],
    len: usize,
}

impl ExtraLines {
    pub(super) fn new(lines: &str) -> Self {
        let mut extra = ExtraLines { bytes: [0; 512 + cors::LINES_BYTES_MAX], len: 0 };
        extra.push(lines);
        extra
    }

    /// Lines of ours; all together they fit.
    pub(super) fn push(&mut self, lines: &str) {
        self.bytes[self.len..self.len + lines.len()].copy_from_slice(lines.as_bytes());
        self.len += lines.len();
    }

    pub(super) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl std::fmt::Write for ExtraLines {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text);
        Ok(())
    }
}

/// How a backend's body goes on after some of its bytes.
enum Flow {
    /// More is to come.
    More,
    /// The body is complete.
    Complete,
    /// It broke.
    Broken(End),
}

impl<I: Io> Shard<I> {
    pub(super) fn backend_received(&mut self, key: Key, bytes: &[u8]) {
        self.stats.counters.upstream_received_bytes += bytes.len() as u64;
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.state != State::Open {
            return;
        }
        if conn.stream.is_none() {
            // An answer to nothing: whatever it is, no later request may be given it.
            self.stats.counters.upstream_surplus += 1;
            return self.leave_pool(key, true);
        }
        let reused = conn.backend().is_some_and(|backend| backend.served > 0);
        if reused && conn.body.is_none() && conn.ledger.sent() == 0 && conn.ledger.may_lend() {
            // It was taken out of the pool in this turn, and not a byte of the request has left yet.
            self.stats.counters.upstream_surplus += 1;
            return self.backend_lost(key, End::UpstreamMalformed);
        }
        // What arrived together goes on together: framing and ids add little to it.
        if let Some(stream) = conn.stream.and_then(|key| self.streams.get_mut(key)) {
            stream.response.reserve(bytes.len() + bytes.len() / 8 + RELAY_ROOM_BYTES);
        }
        let head_bytes_max = self.settings.head.head_bytes;
        if waits_for_line_end(&mut conn.held, bytes, head_bytes_max) {
            return;
        }
        let mut held = std::mem::take(&mut conn.held);
        if let Some(backend) = conn.backend() {
            backend.answered = true;
        }
        if held.is_empty() {
            self.backend_input(key, bytes);
        } else {
            held.extend_from_slice(bytes);
            self.backend_input(key, &held);
        }
    }

    fn backend_input(&mut self, key: Key, mut input: &[u8]) {
        loop {
            let Some(conn) = self.conns.get_mut(key) else { return };
            let Some(stream) = conn.stream else { return };
            if conn.body.is_some() {
                return self.backend_body(key, stream, input);
            }
            let Some(head_only) = self.streams.get(stream).map(|stream| stream.head_only) else { return };
            let mut slots = header_slots();
            let method = if head_only { "HEAD" } else { "GET" };
            match parse_response(input, &mut slots, &self.settings.head, method) {
                Ok(Some(head)) => {
                    input = &input[head.head_bytes..];
                    if !self.backend_head(key, stream, &head) {
                        return;
                    }
                }
                Ok(None) => {
                    conn.held = input.to_vec();
                    return;
                }
                Err(_) => return self.end_stream(stream, End::UpstreamMalformed),
            }
        }
    }

    /// Takes a head. False when the stream has ended over it.
    fn backend_head(&mut self, key: Key, stream_key: Key, head: &ResponseHead<'_, '_>) -> bool {
        let now_us = self.now_us;
        let leaving = self.leaving != super::Leaving::No;
        let unix_time_s = self.unix_time_s();
        let Some(conn) = self.conns.get_mut(key) else { return false };
        let Some(backend) = conn.backend() else { return false };
        if (100..200).contains(&head.status) {
            backend.interim += 1;
            // 101 answers an Upgrade that was never forwarded.
            if head.status == 101 || u32::from(backend.interim) > INTERIM_RESPONSES_MAX {
                self.end_stream(stream_key, End::UpstreamMalformed);
                return false;
            }
            return true;
        }
        backend.keep_alive = head.keep_alive && head.framing != Framing::UntilClose;
        backend.keep_alive_s = head.keep_alive_timeout_s.unwrap_or(u32::MAX);
        conn.body = Some(BodyDecoder::new(head.framing, u64::MAX));
        let Some(stream) = self.streams.get_mut(stream_key) else { return false };
        let events = head.event_stream && head.status == 200 && head.framing != Framing::None;
        // Nothing of the request will be sent again.
        let sent = self.conns.get(key).map_or(0, |conn| conn.ledger.sent());
        let request = stream.request_mut();
        request.client_head = None;
        if !is_planted(Bug::RetryTooLate) {
            request.log.trim(sent);
        }
        if !events && matches!(stream.answer, Answer::Events { .. }) {
            // Committed early: what it says now can only be told in-band, in its own words if they are an error's.
            if head.status < 400 {
                self.end_stream(stream_key, End::UpstreamStatus);
                return false;
            }
            stream.request_mut().late_error = Some(Vec::new());
            stream.step(Step::PlainBody);
            stream.last_token_us = now_us;
            stream.token_due_ms = u64::MAX;
            self.follow_stream_timer(stream_key);
            return true;
        }
        let http11 = stream.version == Version::Http11;
        let framing = match head.framing {
            Framing::Chunked | Framing::UntilClose if http11 => Framing::Chunked,
            Framing::Chunked | Framing::UntilClose => Framing::UntilClose,
            Framing::Length(_) if events => {
                if http11 {
                    Framing::Chunked
                } else {
                    Framing::UntilClose
                }
            }
            same => same,
        };
        if events {
            stream.events = Some(Box::new(Decoder::new(self.settings.event_bytes_max)));
        }
        if events && stream.background == Background::Polls && stream.answer == Answer::None {
            if !self.begin_polled(stream_key) {
                return false;
            }
        } else if !matches!(stream.answer, Answer::Events { .. }) {
            stream.close |= leaving || framing == Framing::UntilClose || !stream.request_done;
            stream.status = head.status;
            self.scratch.clear();
            let mut extra = ExtraLines::new(if events { EVENT_STREAM_HEADERS } else { "" });
            if events {
                self.name_stream(stream_key, &mut extra);
            }
            let Some(stream) = self.streams.get_mut(stream_key) else { return false };
            if head.header("date").is_none() {
                // RFC 9110 section 6.6.1: who forwards a message without one adds it.
                extra.push(self.date.at(unix_time_s));
            }
            extra.push(stream.cors_lines());
            let how = ClientHead {
                client_version: stream.version,
                keep_alive: !stream.close,
                framing,
                event_stream: events,
                own_cors: stream.cors.is_some(),
                extra: extra.as_str(),
            };
            write_client_response(&mut self.scratch, head, &how);
            stream.append_response(&self.scratch, now_us);
            stream.answer = if events { Answer::Events { early: false } } else { Answer::Body(framing) };
            self.keep_log(stream_key);
        }
        let Some(stream) = self.streams.get_mut(stream_key) else { return false };
        stream.step(if events { Step::EventStream } else { Step::PlainBody });
        stream.last_token_us = now_us;
        if !events {
            // An ordinary body has no tokens, even if an event stream was asked for.
            stream.token_due_ms = u64::MAX;
        }
        if events && stream.token_due_ms == u64::MAX && stream.first_token_us.get().is_none() {
            // The request did not say that it would stream; its answer does.
            let first_token_ms = self.settings.routes[stream.route].deadlines.first_token_ms;
            if first_token_ms > 0 {
                stream.token_due_ms = stream.asked_us / 1000 + u64::from(first_token_ms);
            }
        }
        if events {
            self.forget_request(key, stream_key);
        }
        self.appended(stream_key);
        self.follow_stream_timer(stream_key);
        true
    }

    /// Once a model begins to answer, nothing of the request is needed any more, if it has all of it.
    fn forget_request(&mut self, key: Key, stream_key: Key) {
        let (Some(conn), Some(stream)) = (self.conns.get_mut(key), self.streams.get_mut(stream_key)) else {
            return;
        };
        let sent = conn.ledger.may_lend() && conn.ledger.lag(stream.request_end()) == 0;
        let owned = stream
            .request()
            .is_none_or(|request| request.waits_for.is_some() || request.late_error.is_some());
        if !sent || owned || !stream.request_done || is_planted(Bug::RetryTooLate) {
            return;
        }
        let model = stream.forget_request();
        if let Some(source) = stream.source.and_then(|source| self.kept.sources.get_mut(source)) {
            source.model = model;
        }
        // It counted the bytes of a log that is no more.
        conn.ledger = Ledger::default();
    }

    /// Takes bytes of a body as far as they go.
    fn backend_body(&mut self, key: Key, stream_key: Key, mut input: &[u8]) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        let Some(body) = conn.body.as_mut() else { return };
        let first_token = stream.first_token_us;
        let flow = loop {
            match body.next(&mut input) {
                Ok(Piece::Data(piece)) => {
                    self.stats.counters.pieces += 1;
                    if stream.events.is_some() {
                        if let Some(end) =
                            relay_events(stream, piece, self.now_us, &self.settings, &mut self.stats)
                        {
                            break Flow::Broken(end);
                        }
                    } else if let Some(error) = stream.late_error_mut() {
                        let room = LATE_ERROR_BYTES_MAX.saturating_sub(error.len());
                        error.extend_from_slice(&piece[..piece.len().min(room)]);
                    } else {
                        stream.append_body(piece, self.now_us);
                        stream.last_token_us = self.now_us;
                    }
                }
                Ok(Piece::NeedMore) => break Flow::More,
                Ok(Piece::End) => break Flow::Complete,
                Err(_) => break Flow::Broken(End::UpstreamMalformed),
            }
        };
        // Each brings a deadline that may be earlier than the one the timer is armed for.
        let earlier = stream.end_mark || first_token != stream.first_token_us;
        self.appended(stream_key);
        match flow {
            Flow::More => {
                if earlier {
                    self.follow_stream_timer(stream_key);
                }
                self.follow_marks(stream_key);
            }
            Flow::Complete => {
                if !input.is_empty() {
                    self.stats.counters.upstream_surplus += 1;
                    if let Some(backend) = self.conns.get_mut(key).and_then(Conn::backend) {
                        backend.keep_alive = false;
                    }
                }
                self.backend_done(key, stream_key);
            }
            Flow::Broken(end) => self.backend_broke(stream_key, end),
        }
    }

    /// The backend's body is complete by its framing; whether the answer is, the dialect says.
    fn backend_done(&mut self, key: Key, stream_key: Key) {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        finish_events(stream, now_us, &self.settings, &mut self.stats);
        let complete = !stream.has_events_answer() || stream.end_mark || !stream.dialect.has_end_mark();
        let end = match (complete, stream.error_seen) {
            _ if stream.fails_late() => End::UpstreamStatus,
            (true, _) => End::Done,
            (false, true) => End::UpstreamError,
            (false, false) => End::UpstreamTruncated,
        };
        let request_sent = stream.request_done
            && self.conns.get(key).is_some_and(|conn| conn.ledger.lag(stream.request_end()) == 0);
        if request_sent && end != End::UpstreamTruncated {
            self.retire(key);
        }
        self.end_stream(stream_key, end);
    }

    /// The backend's FIN.
    pub(super) fn backend_fin(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        let Some(stream_key) = conn.stream else { return self.backend_lost(key, End::UpstreamTruncated) };
        match &conn.body {
            None => self.backend_lost(key, End::UpstreamTruncated),
            Some(body) if body.eof_is_end() => {
                let open_ended = conn.is_cut();
                self.stats.counters.upstream_tls_truncations += u64::from(open_ended);
                let cut = open_ended
                    || self
                        .streams
                        .get(stream_key)
                        .and_then(|stream| stream.events.as_ref())
                        .is_some_and(|events| events.partial_bytes() > 0 && !events.is_at_boundary());
                if cut {
                    self.backend_broke(stream_key, End::UpstreamTruncated)
                } else {
                    self.backend_done(key, stream_key)
                }
            }
            Some(_) => self.backend_broke(stream_key, End::UpstreamTruncated),
        }
    }

    /// A backend's answer broke off. One that had said all it had to say has finished, if uncleanly.
    pub(super) fn backend_broke(&mut self, stream_key: Key, end: End) {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        finish_events(stream, now_us, &self.settings, &mut self.stats);
        let end = if stream.fails_late() {
            End::UpstreamStatus
        } else if stream.end_mark {
            self.stats.counters.unclean_ends += 1;
            End::Done
        } else if stream.error_seen && stream.has_events_answer() {
            End::UpstreamError
        } else {
            end
        };
        self.end_stream(stream_key, end);
    }

    /// Commits a streaming answer before the backend has answered, so that nothing in between takes the silence of a long
    /// prefill for a dead connection.
    pub(super) fn commit_early(&mut self, key: Key) {
        self.stats.counters.early_commits += 1;
        self.write_events_head(key, true);
        self.heartbeat(key);
    }

    pub(super) fn heartbeat(&mut self, key: Key) {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return };
        self.stats.counters.heartbeats += 1;
        if stream.durable.is_none() {
            stream.append_heartbeat(now_us);
        } else {
            self.durable_heartbeat(key);
        }
        self.appended(key);
    }

    /// The head of an event stream that no backend's head stands behind.
    pub(super) fn write_events_head(&mut self, key: Key, early: bool) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        let mut extra = ExtraLines::new(EVENT_STREAM_HEADERS);
        extra.push(self.date.at(unix_time_s));
        self.name_stream(key, &mut extra);
        let Some(stream) = self.streams.get_mut(key) else { return };
        extra.push(stream.cors_lines());
        let chunked = stream.events_chunked();
        stream.close |= !chunked;
        stream.status = 200;
        stream.answer = Answer::Events { early };
        let framing = if chunked { Framing::Chunked } else { Framing::UntilClose };
        self.scratch.clear();
        write_own_response_head(
            &mut self.scratch,
            200,
            stream.version,
            !stream.close,
            framing,
            extra.as_str(),
        );
        stream.append_response(&self.scratch, now_us);
        self.keep_log(key);
    }
}

/// A partial head that grows without a line end cannot have become complete: it is kept without being parsed again, so that
/// a head sent byte by byte costs no more than its lines.
pub(super) fn waits_for_line_end(held: &mut Vec<u8>, bytes: &[u8], head_bytes_max: usize) -> bool {
    let waits = !held.is_empty() && held.len() + bytes.len() < head_bytes_max && !bytes.contains(&b'\n');
    if waits {
        held.extend_from_slice(bytes);
    }
    waits
}

/// Forwards every event that is complete. `Some`: the stream cannot go on.
fn relay_events(
    stream: &mut Stream,
    mut piece: &[u8],
    now_us: u64,
    settings: &crate::settings::Settings,
    stats: &mut crate::stats::Stats,
) -> Option<End> {
    let mut events = stream.events.take()?;
    let ids = settings.routes[stream.route].event_ids;
    let outcome = loop {
        match events.next(&mut piece) {
            Ok(Some(block)) => relay_event(stream, &block, ids, now_us, settings, stats),
            Ok(None) => break None,
            Err(_) => break Some(End::UpstreamMalformed),
        }
    };
    stream.events = Some(events);
    outcome
}

/// At the end of the bytes: an event whose last line end could still have grown is complete now.
fn finish_events(
    stream: &mut Stream,
    now_us: u64,
    settings: &crate::settings::Settings,
    stats: &mut crate::stats::Stats,
) {
    if let Some(mut events) = stream.events.take() {
        let ids = settings.routes[stream.route].event_ids;
        if let Some(block) = events.finish() {
            relay_event(stream, &block, ids, now_us, settings, stats);
        }
        stream.events = Some(events);
    }
}

pub(super) fn relay_event(
    stream: &mut Stream,
    block: &Block<'_>,
    ids: bool,
    now_us: u64,
    settings: &crate::settings::Settings,
    stats: &mut crate::stats::Stats,
) {
    stats.counters.pieces += 1;
    let meaning = match stream.first_token_us.get() {
        None => stream.dialect.meaning(block),
        Some(_) => stream.dialect.meaning_after_first_token(block),
    };
    if stream.end_mark && !matches!(meaning, Meaning::Preamble | Meaning::Heartbeat) {
        stats.counters.upstream_surplus += 1;
        return;
    }
    let ended = stream.end_mark;
    if stream.note_event(meaning) {
        if meaning == Meaning::Token {
            if stream.first_token_us.get().is_none() {
                stream.first_token_us = Maybe::some(now_us - stream.asked_us);
                stream.token_due_ms = u64::MAX;
                stats.histograms.first_token_us.saturating_record(now_us - stream.asked_us);
                if stream.phase == Phase::AwaitFirstToken {
                    stream.step(Step::FirstToken);
                }
            } else {
                stats.histograms.between_tokens_us.saturating_record(now_us - stream.last_token_us);
            }
        }
        stream.last_token_us = now_us;
    }
    if stream.end_mark && !ended {
        // What is still owed is the end of the body.
        stream.token_due_ms = u64::MAX;
        let finish_ms = settings.routes[stream.route].deadlines.finish_ms;
        stream.finish_due_ms = if finish_ms == 0 { u64::MAX } else { now_us / 1000 + u64::from(finish_ms) };
    }
    if stream.dialect == Dialect::Responses {
        stream.sequence_number =
            stream.dialect.sequence_number(block).map_or(stream.sequence_number, Maybe::some);
    }
    stats.counters.events += u64::from(block.dispatches);
    stream.events_sent += u64::from(block.dispatches);
    let from = stream.response.end();
    stream.append_event(block, ids, now_us);
    let chunked = stream.events_chunked();
    if let Some(notes) = &mut stream.notes {
        note(notes, &stream.response, chunked, block, from);
    }
    if is_planted(Bug::EventTwice) && stream.retried && stream.events_sent == 1 {
        stream.append_event(block, ids, now_us);
    }
    if stream.end_mark && !ended {
        stream.end_mark_at = stream.response.end();
    }
}
