//! A stream: one request and its answer. Its request log feeds the backend, its response log feeds the client; this file
//! holds what a stream knows and how bytes get into its logs, ready for the wire.

use super::conn::Maybe;
use super::durable::Durable;
use super::reader::Reader;
use crate::settings::OnLeave;
use protocol::background::Notes;
use protocol::cors::Lines;
use protocol::demo::DemoModel;
use protocol::dialect::{Dialect, Meaning};
use protocol::facts::{Background, RequestFacts, Rewriter, Scanner};
use protocol::http::{CHUNK_END, ChunkHead, Framing, LAST_CHUNK, Version};
use protocol::limits::FACTS_PREFIX_BYTES_MAX;
use protocol::log::Log;
use protocol::phase::{End, Phase, Step};
use protocol::slots::Key;
use protocol::sse::{Block, Decoder};
use protocol::wheel::TimerId;

/// What the client has been given so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// Nothing but perhaps an interim response.
    None,
    /// An event stream's head; `early`: before the backend answered.
    Events { early: bool },
    /// An ordinary head; the body follows in this framing.
    Body(Framing),
}

/// What the access log wants to know, kept only while somebody reads it.
#[derive(Debug, Default)]
pub(crate) struct Description {
    pub(crate) request: Box<str>,
    pub(crate) refusal: Option<&'static str>,
    /// What the request's facts and its way to a backend were, once they are forgotten.
    pub(crate) model: Option<Box<str>>,
    pub(crate) upstream: Option<usize>,
}

/// The built-in model at work on a stream.
pub(crate) struct Demo {
    pub(crate) model: DemoModel,
    /// When the next token is due, µs.
    pub(crate) next_us: u64,
    pub(crate) preamble_written: bool,
}

/// How far a request's facts are.
#[derive(Default)]
pub(crate) enum Scanning {
    /// They are known, or nobody wants to.
    #[default]
    No,
    /// Nothing was looked at.
    Begins,
    /// More is wanted.
    GoesOn(Box<Scanner>),
}

/// What is known of a stream's request, and what it takes to have it answered: of no more use to most of what follows, so it lies
/// apart.
#[derive(Default)]
pub(crate) struct Request {
    /// Its bytes, for the backend.
    pub(crate) log: Log,
    /// Bytes of the log that are the head.
    pub(crate) head_bytes: u64,
    pub(crate) scanner: Scanning,
    /// In the scanner's place, where what asks for a response in background is not for the backend.
    pub(crate) rewriter: Option<Box<Rewriter>>,
    pub(crate) facts: RequestFacts,
    /// The client's own head, kept while another backend might need one written anew.
    pub(crate) client_head: Option<Box<[u8]>>,
    /// Backends tried.
    pub(crate) attempts: u32,
    /// One of them came as far as TLS and failed there, which says more than that another was refused.
    pub(crate) tls_failed: bool,
    pub(crate) upstream: Option<usize>,
    /// For a standing backend connection, over all attempts, ms.
    pub(crate) connect_due_ms: u64,
    /// It waits to be told the id of the response in background that this source produces.
    pub(crate) waits_for: Option<Key>,
    /// What it chose for when the last client has left; `None`: what its route says.
    pub(crate) on_leave: Option<OnLeave>,
    /// The body of a backend's error that came after an early commit.
    pub(crate) late_error: Option<Vec<u8>>,
}

impl Request {
    fn memory_bytes(&self) -> usize {
        self.log.memory_bytes() + self.rewriter.as_ref().map_or(0, |rewriter| rewriter.memory_bytes())
    }

    fn append(&mut self, piece: &[u8], chunked: bool) {
        if chunked {
            self.log.append(&[ChunkHead::new(piece.len()).as_bytes(), piece, CHUNK_END]);
        } else {
            self.log.append(&[piece]);
        }
    }
}

/// One request and its answer.
/// What each event needs comes first and lies together: between two of them, other streams push it out of the cache.
#[repr(C)]
pub(crate) struct Stream {
    pub(crate) response: Log,
    pub(crate) events: Option<Box<Decoder>>,
    pub(crate) last_token_us: u64,
    /// When something was last appended for the client, ms.
    pub(crate) spoke_ms: u64,
    /// When the oldest byte not yet lent was appended.
    pub(crate) pending_since_us: Maybe,
    /// The same of the bytes lent.
    pub(crate) lent_since_us: u64,
    pub(crate) first_token_us: Maybe,
    /// Events appended.
    pub(crate) events_sent: u64,
    /// Memory beyond the stream's share, bytes.
    pub(crate) drawn: u64,
    /// Memory of what is kept of it, accounted for, bytes.
    pub(crate) charged: u64,
    /// Those who know its id find it there.
    pub(crate) source: Option<Key>,
    /// It reads another stream.
    pub(crate) reader: Option<Box<Reader>>,
    /// What is remembered of a response in background.
    pub(crate) notes: Option<Box<Notes>>,
    /// A request of the Durable Streams protocol.
    pub(crate) durable: Option<Box<Durable>>,
    pub(crate) route: usize,
    pub(crate) answer: Answer,
    pub(crate) client: Option<Key>,
    pub(crate) backend: Option<Key>,
    /// Its source is told what is appended: somebody reads it by its id, or did, or it goes on to its end without a reader.
    pub(crate) followed: bool,
    pub(crate) dialect: Dialect,
    pub(crate) phase: Phase,
    pub(crate) version: Version,
    /// The request's method was HEAD.
    pub(crate) head_only: bool,
    pub(crate) request_done: bool,
    /// The request may hold memory of its own.
    pub(crate) request_held: bool,
    /// The request asks for an event stream.
    pub(crate) streaming: bool,
    /// The dialect's end mark was seen.
    pub(crate) end_mark: bool,
    /// The backend reported a failure in its stream.
    pub(crate) error_seen: bool,
    /// The last byte owed is in the log.
    pub(crate) produced: bool,
    /// The client's connection is not used again.
    pub(crate) close: bool,
    /// It is closed by RST once what is owed was sent.
    pub(crate) reset: bool,
    /// The backend's receive (or the demo model) is paused because the client lags.
    pub(crate) paused: bool,
    /// The client's receive is paused because the backend lags.
    pub(crate) upload_paused: bool,
    /// The request body goes out chunked.
    pub(crate) request_chunked: bool,
    pub(crate) retried: bool,
    /// Whether it is a response in background.
    pub(crate) background: Background,
    pub(crate) end: Option<End>,
    pub(crate) status: u16,
    pub(crate) timer: Option<(TimerId, u64)>,
    /// What pages of other origins are told in the head of the answer; none: nothing of ours.
    pub(crate) cors: Option<Lines>,
    /// When the first token is overdue, ms.
    pub(crate) token_due_ms: u64,
    /// Where in the response log the end mark's event ends.
    pub(crate) end_mark_at: u64,
    /// When the end of the backend's body is overdue after its end mark, ms.
    pub(crate) finish_due_ms: u64,
    /// When the whole stream is overdue, ms.
    pub(crate) total_due_ms: u64,
    pub(crate) demo: Option<Box<Demo>>,
    /// The `sequence_number` of the last event that had one (Responses).
    pub(crate) sequence_number: Maybe,
    /// None where nothing of it is needed any more: a reader's.
    request: Option<Box<Request>>,
    pub(crate) description: Option<Box<Description>>,
    pub(crate) started_us: u64,
    /// When the request was complete; what waiting for the model is measured from.
    pub(crate) asked_us: u64,
    /// When the rest of the request (body) or the backend's head is overdue, ms; `u64::MAX` never, as below.
    pub(crate) phase_due_ms: u64,
}

const _: () =
    assert!(size_of::<Stream>() <= 400, "every reader has one, and what each event needs must lie together");

impl Stream {
    pub(crate) fn new(client: Key, route: usize, dialect: Dialect, version: Version, now_us: u64) -> Self {
        Stream {
            client: Some(client),
            backend: None,
            route,
            dialect,
            phase: Phase::Head,
            version,
            head_only: false,
            request: None,
            description: None,
            request_held: false,
            request_chunked: false,
            request_done: true,
            notes: None,
            background: Background::No,
            streaming: false,
            retried: false,
            response: Log::new(),
            answer: Answer::None,
            status: 0,
            events: None,
            demo: None,
            durable: None,
            end_mark: false,
            end_mark_at: 0,
            error_seen: false,
            produced: false,
            close: false,
            reset: false,
            end: None,
            paused: false,
            upload_paused: false,
            sequence_number: Maybe::NONE,
            events_sent: 0,
            cors: None,
            drawn: 0,
            charged: 0,
            followed: false,
            source: None,
            reader: None,
            started_us: now_us,
            asked_us: now_us,
            first_token_us: Maybe::NONE,
            last_token_us: now_us,
            pending_since_us: Maybe::NONE,
            lent_since_us: now_us,
            spoke_ms: now_us / 1000,
            phase_due_ms: u64::MAX,
            token_due_ms: u64::MAX,
            finish_due_ms: u64::MAX,
            total_due_ms: u64::MAX,
            timer: None,
        }
    }

    pub(crate) fn request(&self) -> Option<&Request> {
        self.request.as_deref()
    }

    pub(crate) fn request_mut(&mut self) -> &mut Request {
        self.request_held = true;
        self.request.get_or_insert_default()
    }

    /// Nothing of the request is needed any more, but what the access log wants to know. Gives the model that it named.
    pub(crate) fn forget_request(&mut self) -> Option<Box<str>> {
        let request = self.request.take()?;
        if let Some(description) = &mut self.description {
            description.model = request.facts.model.clone().or(description.model.take());
            description.upstream = request.upstream.or(description.upstream);
        }
        request.facts.model
    }

    /// Bytes of the request for the backend so far.
    pub(crate) fn request_end(&self) -> u64 {
        self.request().map_or(0, |request| request.log.end())
    }

    /// Where what is still held of them begins.
    pub(crate) fn request_start(&self) -> u64 {
        self.request().map_or(0, |request| request.log.start())
    }

    /// The backend has the request's bytes below `sent`.
    pub(crate) fn release_request(&mut self, sent: u64) {
        if let Some(request) = &mut self.request {
            request.log.release(sent);
        }
    }

    /// The body so far of a backend's error that came after an early commit.
    pub(crate) fn late_error_mut(&mut self) -> Option<&mut Vec<u8>> {
        self.request.as_mut()?.late_error.as_mut()
    }

    /// Nothing more of the request's body is looked at.
    pub(crate) fn stop_scanning(&mut self) {
        if let Some(request) = &mut self.request {
            (request.scanner, request.rewriter) = (Scanning::No, None);
        }
    }

    /// Whether a backend's error came after an early commit.
    pub(crate) fn fails_late(&self) -> bool {
        self.request().is_some_and(|request| request.late_error.is_some())
    }

    pub(crate) fn model(&self) -> Option<&str> {
        self.request()?.facts.model.as_deref()
    }

    /// Moves on; a step the table does not know is a bug, and changes nothing in a release build.
    pub(crate) fn step(&mut self, step: Step) {
        match self.phase.after(step) {
            Some(next) => self.phase = next,
            None => debug_assert!(false, "{:?} in {:?}", step, self.phase),
        }
    }

    /// Memory that grows with what its peers send, bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let partial = self.events.as_ref().map_or(0, |events| events.memory_bytes());
        let body = self.durable.as_ref().map_or(0, |durable| durable.memory_bytes());
        let request = self.request().map_or(0, Request::memory_bytes);
        (request + self.response.memory_bytes() + partial + body) as u64
    }

    /// The same, without a look at a request that was seen to hold nothing.
    pub(crate) fn follow_memory_bytes(&mut self) -> u64 {
        let partial = self.events.as_ref().map_or(0, |events| events.memory_bytes());
        let mut bytes = self.response.memory_bytes() + partial;
        if self.request_held {
            let request = self.request().map_or(0, Request::memory_bytes);
            self.request_held = !self.request_done || request > 0;
            bytes += request;
        }
        bytes += self.durable.as_ref().map_or(0, |durable| durable.memory_bytes());
        debug_assert_eq!(bytes as u64, self.memory_bytes());
        bytes as u64
    }

    /// Whether an event stream goes to the client in chunks (HTTP/1.1) or bare until close (HTTP/1.0).
    pub(crate) fn events_chunked(&self) -> bool {
        self.version == Version::Http11
    }

    /// Whether nothing but the connection's end tells the client where the answer ends.
    pub(crate) fn ends_by_close(&self) -> bool {
        match self.answer {
            Answer::Events { .. } => !self.events_chunked(),
            Answer::Body(framing) => framing == Framing::UntilClose,
            Answer::None => false,
        }
    }

    pub(crate) fn cors_lines(&self) -> &str {
        self.cors.as_deref().unwrap_or_default()
    }

    /// Whether a backend produces it, whose silences have limits.
    pub(crate) fn has_backend_clock(&self) -> bool {
        self.demo.is_none() && self.durable.is_none() && self.reader.is_none()
    }

    /// Whether the client of a durable stream has been given a part of something that has no end yet.
    pub(crate) fn is_within_event(&self) -> bool {
        let within = |durable: &Durable| durable.is_within(self.reader.as_deref());
        self.durable.as_deref().is_some_and(within)
    }

    pub(crate) fn has_events_answer(&self) -> bool {
        matches!(self.answer, Answer::Events { .. })
    }

    /// Appends bytes that are ready as they are: heads, and bodies with a length.
    pub(crate) fn append_response(&mut self, bytes: &[u8], now_us: u64) {
        self.response.append(&[bytes]);
        self.spoke(now_us);
    }

    fn spoke(&mut self, now_us: u64) {
        if self.pending_since_us == Maybe::NONE {
            self.pending_since_us = Maybe::some(now_us);
        }
        self.spoke_ms = now_us / 1000;
    }

    /// Appends a heartbeat in the dialect's form.
    pub(crate) fn append_heartbeat(&mut self, now_us: u64) {
        let ids = self.response.last_event_id() > 0;
        let form = if ids { self.dialect.heartbeat_among_ids() } else { self.dialect.heartbeat() };
        self.append_block(form, now_us);
    }

    /// Appends one complete block that carries no id: a heartbeat, a comment, an in-band error.
    pub(crate) fn append_block(&mut self, raw: &[u8], now_us: u64) {
        if self.events_chunked() {
            self.response.append(&[ChunkHead::new(raw.len()).as_bytes(), raw, CHUNK_END]);
        } else {
            self.response.append(&[raw]);
        }
        self.spoke(now_us);
    }

    /// Appends one event, with its id when ids are on. The payload's bytes are not touched.
    pub(crate) fn append_event(&mut self, block: &Block<'_>, ids: bool, now_us: u64) {
        if !ids {
            return self.append_block(block.raw, now_us);
        }
        if !block.dispatches {
            // Comments and retry lines open the next event: behind an id, a blank line of their own would make some
            // clients (OpenAI's for Python) take them for an empty event.
            return block.lines_for_the_next().for_each(|line| self.append_block(line, now_us));
        }
        let id = IdLine::new(self.response.next_event_id());
        let [before, between, after] = block.with_id(id.as_bytes());
        if self.events_chunked() {
            let head = ChunkHead::new(before.len() + between.len() + after.len());
            self.response.append(&[head.as_bytes(), before, between, after, CHUNK_END]);
        } else {
            self.response.append(&[before, between, after]);
        }
        self.response.event_ends();
        self.spoke(now_us);
    }

    /// Appends a piece of an ordinary body in the framing the client was promised.
    pub(crate) fn append_body(&mut self, piece: &[u8], now_us: u64) {
        match self.answer {
            Answer::Body(Framing::Chunked) => {
                self.response.append(&[ChunkHead::new(piece.len()).as_bytes(), piece, CHUNK_END]);
            }
            _ => {
                self.response.append(&[piece]);
            }
        }
        self.spoke(now_us);
    }

    /// Appends what ends a chunked answer.
    pub(crate) fn append_last_chunk(&mut self, now_us: u64) {
        let chunked = match self.answer {
            Answer::Events { .. } => self.events_chunked(),
            Answer::Body(framing) => framing == Framing::Chunked,
            Answer::None => false,
        };
        if chunked {
            self.append_response(LAST_CHUNK, now_us);
        }
    }

    /// Appends a piece of the request's body for the backend.
    pub(crate) fn append_request(&mut self, piece: &[u8]) {
        let rewriter = self.request.as_mut().and_then(|request| request.rewriter.take());
        let Some(mut rewriter) = rewriter else { return self.append_request_as_it_is(piece) };
        rewriter.feed(piece, |bytes| self.append_request_as_it_is(bytes));
        let finished = rewriter.is_finished();
        self.request_mut().rewriter = Some(rewriter);
        if finished {
            self.take_facts();
        }
    }

    fn append_request_as_it_is(&mut self, piece: &[u8]) {
        let chunked = self.request_chunked;
        if self.demo.is_some() {
            // Nobody takes it out of the log again: the model wants to know the facts only.
        } else if let Some(durable) = &mut self.durable {
            durable.append_body(piece);
        } else {
            self.request_mut().append(piece, chunked);
        }
        let Some(request) = &mut self.request else { return };
        match &mut request.scanner {
            Scanning::No => {}
            Scanning::Begins => {
                // Most requests come whole, and what tells their facts is needed no longer than here.
                let mut scanner = Scanner::new(FACTS_PREFIX_BYTES_MAX);
                if scanner.feed(piece) {
                    request.scanner = Scanning::GoesOn(Box::new(scanner));
                } else {
                    request.scanner = Scanning::No;
                    self.take_facts_as(scanner.into_facts());
                }
            }
            Scanning::GoesOn(scanner) => {
                if !scanner.feed(piece) {
                    self.take_facts();
                }
            }
        }
    }

    /// Ends a request body that goes out in chunks.
    pub(crate) fn append_last_request_chunk(&mut self) {
        self.request_mut().log.append(&[LAST_CHUNK]);
    }

    /// The facts are as complete as they will be.
    pub(crate) fn take_facts(&mut self) {
        let Some(request) = &mut self.request else { return };
        let (rewriter, scanner) = (request.rewriter.take(), std::mem::take(&mut request.scanner));
        if let Some(mut rewriter) = rewriter {
            self.background = rewriter.background();
            rewriter.finish(|bytes| self.append_request_as_it_is(bytes));
            self.take_facts_as(rewriter.into_facts());
        }
        if let Scanning::GoesOn(scanner) = scanner {
            self.take_facts_as(scanner.into_facts());
        }
    }

    fn take_facts_as(&mut self, facts: RequestFacts) {
        self.streaming |= facts.stream == Some(true);
        self.request_mut().facts = facts;
    }

    /// The description for a stream of its client's own; the one that stays tells one from the other in the access log.
    pub(crate) fn split_description(&mut self) -> Option<Box<Description>> {
        let description = self.description.as_mut()?;
        let of_stream = format!("stream of {}", description.request).into();
        let request = std::mem::replace(&mut description.request, of_stream);
        let facts = self.request.as_ref();
        let (model, upstream) =
            facts.map_or((None, None), |request| (request.facts.model.clone(), request.upstream));
        Some(Box::new(Description { request, refusal: None, model, upstream }))
    }

    /// Notes what an event means; true when it is progress of the model.
    pub(crate) fn note_event(&mut self, meaning: Meaning) -> bool {
        match meaning {
            Meaning::Token | Meaning::Preamble => true,
            Meaning::Heartbeat => false,
            Meaning::Done => {
                self.end_mark = true;
                true
            }
            Meaning::Error => {
                self.error_seen = true;
                true
            }
        }
    }
}

/// The last block of an event stream, and what ends its body.
pub(crate) fn last_block(raw: &[u8], chunked: bool) -> Vec<u8> {
    match chunked {
        true => [ChunkHead::new(raw.len()).as_bytes(), raw, CHUNK_END, LAST_CHUNK].concat(),
        false => raw.to_vec(),
    }
}

/// Writes a backend's own error body as an event of the dialect. False when it is not an error object of an API.
pub(crate) fn write_late_error(dialect: Dialect, body: &[u8], out: &mut Vec<u8>) -> bool {
    let Ok(body) = std::str::from_utf8(body) else { return false };
    let body = body.trim();
    if !body.starts_with('{') || !body.ends_with('}') || !body.contains("\"error\"") {
        return false;
    }
    if !matches!(dialect, Dialect::Chat | Dialect::Completions) {
        out.extend_from_slice(b"event: error\n");
    }
    // JSON text has no line ends but between tokens, where those of several data lines mean the same (WHATWG 9.2.6).
    let untyped = matches!(dialect, Dialect::Responses | Dialect::Messages)
        && !body[1..].trim_start().starts_with("\"type\"");
    for (number, line) in body.lines().enumerate() {
        out.extend_from_slice(b"data: ");
        let line = match line.strip_prefix('{') {
            Some(rest) if untyped && number == 0 => {
                out.extend_from_slice(b"{\"type\":\"error\",");
                rest
            }
            _ => line,
        };
        out.extend_from_slice(line.trim_end_matches('\r').as_bytes());
        out.push(b'\n');
    }
    out.push(b'\n');
    true
}

/// `id: N\n` without allocation.
struct IdLine {
    bytes: [u8; 28],
    start: usize,
}

impl IdLine {
    // Inline, and written where it stays: to copy what was just written byte by byte waits for the bytes.
    #[inline(always)]
    fn new(mut id: u64) -> Self {
        let mut line = IdLine { bytes: [0; 28], start: 27 };
        line.bytes[27] = b'\n';
        loop {
            line.start -= 1;
            line.bytes[line.start] = b'0' + (id % 10) as u8;
            id /= 10;
            if id == 0 {
                break;
            }
        }
        line.start -= 4;
        line.bytes[line.start..line.start + 4].copy_from_slice(b"id: ");
        line
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_error_is_told_in_the_backends_words_if_they_are_an_error_object() {
        let mut out = Vec::new();
        assert!(write_late_error(Dialect::Chat, b"{\r\n \"error\": {\"message\":\"no\"}\n}\n", &mut out));
        assert_eq!(out, b"data: {\ndata:  \"error\": {\"message\":\"no\"}\ndata: }\n\n");
        out.clear();
        assert!(write_late_error(Dialect::Messages, b"{\"type\":\"error\",\"error\":{}}", &mut out));
        assert_eq!(out, b"event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n");
        out.clear();
        assert!(write_late_error(Dialect::Responses, b"{\"error\":{}}", &mut out));
        assert_eq!(out, b"event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n");
        out.clear();
        assert!(write_late_error(Dialect::Messages, b"{\"error\":{\"type\":\"t\"}}", &mut out));
        assert_eq!(out, b"event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"t\"}}\n\n");
        for not_one in [&b"<html>"[..], b"", b"{\"error\":", b"{\"detail\":1}", b"\xff"] {
            out.clear();
            assert!(!write_late_error(Dialect::Chat, not_one, &mut out) && out.is_empty());
        }
    }

    #[test]
    fn id_lines_of_any_width() {
        for id in [1, 9, 10, 12345, u64::MAX] {
            assert_eq!(IdLine::new(id).as_bytes(), format!("id: {id}\n").as_bytes());
        }
    }
}
