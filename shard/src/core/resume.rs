//! Requests for streams by their ids: read, status, stop. A stream that a second one comes to read has its first client made
//! a reader as well, so that neither can hold up the other.

use super::Shard;
use super::conn::Maybe;
use super::kept::{Source, numbered, push_id_line};
use super::reader::Reader;
use super::relay::{EVENT_STREAM_HEADERS, ExtraLines};
use super::stream::{Answer, Stream};
use crate::io::Io;
use crate::mesh::{Neighbours, Subject};
use protocol::fault::Fault;
use protocol::http::{Framing, RequestHead, Version, write_own_response_head};
use protocol::log::{Log, Place};
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::resume::{self, Ask, StreamId, Want};
use protocol::slots::Key;

impl<I: Io> Shard<I> {
    /// The shard that a stream's path names, if that is another one.
    pub(super) fn shard_of_stream(&self, path: &str) -> Option<usize> {
        let id = Ask::id_of(path)?;
        let shards = self.neighbours.as_ref().map_or(1, Neighbours::shards);
        // Of a shard that there was in an earlier process, another one has the streams.
        let home = usize::from(id.shard) % shards;
        (home != usize::from(self.kept.shard) && self.kept.is_ours(&id)).then_some(home)
    }

    /// Answers a request for a stream.
    pub(super) fn ask(&mut self, key: Key, ask: Result<Ask, Fault>) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.streaming = false;
            (stream.token_due_ms, stream.phase_due_ms, stream.total_due_ms) = (u64::MAX, u64::MAX, u64::MAX);
        }
        let found = ask.and_then(|ask| self.find(&ask.id).map(|source| (source, ask.want)));
        match found {
            Err(fault) => self.answer_fault(key, &fault, ""),
            Ok((source, Want::Status)) => self.answer_status(key, source),
            Ok((source, Want::Stop)) => self.stop_stream(key, source),
            Ok((source, Want::Events { after })) => {
                // Who asks by another name is always answered at home.
                let client = self.streams.get(key).and_then(|stream| stream.client);
                self.begin_reading(key, source, after, true);
                if let Some(client) = client {
                    self.mirror_for(source, client);
                }
            }
        }
    }

    fn find(&self, id: &StreamId) -> Result<Key, Fault> {
        if !self.kept.is_ours(id) {
            return Err(resume::NOT_FOUND);
        }
        let number = numbered(id.shard, id.number);
        let here = self.kept.by_number.get(&number).copied();
        let here = here.or_else(|| self.mirror_here(Subject::Stream(number)));
        here.ok_or(resume::EXPIRED)
    }

    pub(super) fn source_log<'s>(&'s self, source: &'s Source) -> Option<&'s Log> {
        match source.producer {
            Some(producer) => self.streams.get(producer).map(|stream| &stream.response),
            None => Some(&source.log),
        }
    }

    /// Somebody wants a stream to end.
    fn stop_stream(&mut self, key: Key, source_key: Key) {
        self.stats.counters.stream_stops += 1;
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        match source.producer {
            Some(producer) => self.end_stream(producer, End::StreamStopped),
            None => {
                // It was over: from now on it cannot be read.
                source.end = Some(End::StreamStopped);
                if !source.is_read() {
                    let freed = source.log.memory_bytes() as u64;
                    source.log = Log::new();
                    source.charged -= freed.min(source.charged);
                    self.kept.bytes -= freed.min(self.kept.bytes);
                }
            }
        }
        if !self.hold_stop(key, source_key) {
            self.answer_empty(key, 204, "");
        }
    }

    /// Answers with the events behind one. Who has had all of them may be told so, or is given none.
    pub(super) fn begin_reading(&mut self, key: Key, source_key: Key, after: u64, tell_end: bool) {
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let stopped = match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(stream) => stream.end == Some(End::StreamStopped),
            None => source.end == Some(End::StreamStopped),
        };
        if stopped {
            return self.answer_fault(key, &resume::STOPPED, "");
        }
        let Some(log) = self.source_log(source) else { return };
        let from = if is_planted(Bug::ReplaySkips) {
            (after + 1).min(log.last_event_id())
        } else if is_planted(Bug::ReplayRepeats) {
            after.saturating_sub(1)
        } else {
            after
        };
        let (place, last, done) =
            (log.behind(from, source.chunked), log.last_event_id(), source.end == Some(End::Done));
        let Some(stream) = self.streams.get(key) else { return };
        if source.chunked && stream.version == Version::Http10 {
            return self.answer_fault(key, &resume::NEEDS_HTTP_1_1, "");
        }
        match place {
            // All of it was seen: to an `EventSource` this says not to come back.
            Place::At(_) if tell_end && done && after == last && last > 0 => self.answer_empty(key, 204, ""),
            Place::At(at) => self.attach_reader(key, source_key, at, after),
            Place::Ahead if source.end == Some(End::Interrupted) => self.answer_fault(key, &resume::LOST, ""),
            Place::Ahead => self.answer_fault(key, &resume::AHEAD, ""),
            Place::Gone(first) => {
                let line = format!("Tokenring-Earliest-Event-ID: {first}\r\n");
                self.answer_fault(key, &resume::BEFORE_WINDOW, &line);
            }
        }
    }

    fn attach_reader(&mut self, key: Key, source_key: Key, at: u64, after: u64) {
        let (now_us, now_ms, unix_time_s) = (self.now_us, self.now_ms(), self.unix_time_s());
        self.stats.counters.resumes += 1;
        self.split(source_key);
        self.adopt(source_key);
        let retry_ms = 500 + self.durable_now().random % 1000;
        let may_begin = self.may_begin_reader();
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(stream) = self.streams.get_mut(key) else { return };
        let place = source.readers.len();
        source.readers.push(key);
        let (dialect, chunked, number) = (source.dialect, source.chunked, source.number);
        let mirror = source.is_mirror();
        let id = self.kept.id(number);
        let framing = if chunked { Framing::Chunked } else { Framing::UntilClose };
        stream.close |= !chunked;
        stream.status = 200;
        stream.answer = Answer::Events { early: false };
        stream.forget_request();
        let mut lines = ExtraLines::new(EVENT_STREAM_HEADERS);
        lines.push(self.date.at(unix_time_s));
        push_id_line(&mut lines, &id);
        lines.push("Tokenring-Last-Event-ID: ");
        lines.push(&after.to_string());
        lines.push("\r\n");
        lines.push(stream.cors_lines());
        self.scratch.clear();
        write_own_response_head(
            &mut self.scratch,
            200,
            stream.version,
            !stream.close,
            framing,
            lines.as_str(),
        );
        stream.append_response(&self.scratch, now_us);
        // From here on it speaks as the stream does that it reads.
        stream.dialect = dialect;
        stream.version = if chunked { Version::Http11 } else { Version::Http10 };
        // Without a blank line of its own: it opens the first event.
        stream.append_block(format!("retry: {retry_ms}\n").as_bytes(), now_us);
        if !may_begin {
            stream.append_block(dialect.heartbeat(), now_us);
            self.stats.counters.resumes_delayed += 1;
            self.kept.waiting.push_back(key);
        }
        stream.step(Step::EventStream);
        stream.step(Step::FirstToken);
        stream.reader = Some(Box::new(Reader {
            source: source_key,
            place: place as u32,
            at,
            lent: None,
            own_at: 0,
            own_lent: false,
            waits: !may_begin,
            began_ms: now_ms,
            behind: Maybe::NONE,
            finishing: false,
        }));
        let client = stream.client;
        self.stats.counters.mirror_reads += u64::from(mirror);
        self.kept.stir(source_key);
        self.follow_waiting(now_ms);
        self.follow_stream_timer(key);
        if let Some(client) = client {
            self.mark_dirty(client);
        }
    }

    /// The client that a stream was asked for by becomes one of its readers.
    pub(super) fn split(&mut self, source_key: Key) {
        let now_us = self.now_us;
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(producer_key) = source.producer else { return };
        let Some(producer) = self.streams.get_mut(producer_key) else { return };
        producer.followed = true;
        let Some(client) = producer.client else { return };
        // One that is still sending its request is needed where it is.
        if !producer.request_done || producer.end.is_some() {
            return;
        }
        let Some(conn) = self.conns.get(client) else { return };
        let (sent, in_flight) = (conn.ledger.sent(), conn.ledger.in_flight());
        // With TLS what is in flight are records. What it is within of is lent to its end, which is an event's.
        let from = if conn.tls.is_some() { sent + u64::from(in_flight) } else { sent };
        let lent = producer.response.lend(from, u32::MAX);
        let at = from + lent.as_ref().map_or(0, |lent| lent.len() as u64);
        let mut stream = Stream::new(client, producer.route, producer.dialect, producer.version, now_us);
        stream.phase = Phase::Streaming;
        stream.answer = producer.answer;
        (stream.status, stream.close, stream.streaming) = (producer.status, producer.close, true);
        (stream.started_us, stream.asked_us) = (producer.started_us, producer.asked_us);
        stream.first_token_us = producer.first_token_us;
        stream.description = producer.split_description();
        stream.reader = Some(Box::new(Reader {
            source: source_key,
            place: source.readers.len() as u32,
            at,
            lent,
            own_at: 0,
            own_lent: false,
            waits: false,
            began_ms: now_us / 1000,
            behind: Maybe::NONE,
            finishing: false,
        }));
        let Ok(reader_key) = self.streams.insert(stream) else { return };
        source.readers.push(reader_key);
        if let Some(producer) = self.streams.get_mut(producer_key) {
            producer.client = None;
        }
        if let Some(conn) = self.conns.get_mut(client) {
            conn.stream = Some(reader_key);
        }
        self.kept.stir(source_key);
    }

    /// Refuses a request for a stream.
    pub(super) fn answer_fault(&mut self, key: Key, fault: &Fault, lines: &str) {
        self.stats.counters.resumes_refused += 1;
        self.answer_error(key, fault, lines);
    }
}

/// Whether a request's path is one of streams.
pub(super) fn covers(head: &RequestHead<'_, '_>) -> bool {
    Ask::covers(head.path())
}
