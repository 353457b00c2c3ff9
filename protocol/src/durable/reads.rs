//! Answers to reads: where they begin, how far a page goes, what their heads say (PROTOCOL.md sections 5.6 to 5.8).

use super::lines::Lines;
use super::reading::{Cursor, Reading, body_bytes};
use super::request::{Expiry, From, Live, Read, Request};
use super::store::{Answer, Id, Outcome, Poll, Refused, Reply, Store};
use super::{Form, Now, Offset, refusals};
use crate::limits::DURABLE_PAGE_BYTES_MAX;
use crate::slots::Key;

impl Store {
    pub(super) fn begin_read(&mut self, request: &Request, read: &Read, reader: Key, now: Now) -> Outcome {
        let id = self.open_shown(&request.path, now)?;
        self.counters.reads += 1;
        self.used(id, now);
        let at = self.resolve(id, read.from)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let (form, closed, at_end) = (stream.form, stream.is_shown_closed(), at == stream.shown_tail());
        let mut cursor = Cursor::new(read.cursor);
        match read.live {
            Live::No if read.from == From::End => Ok(self.nothing_yet(id)),
            Live::No => self.page(id, at, read.from, None, read.if_none_match.as_deref(), reader, now),
            Live::LongPoll if !at_end => {
                let etag = read.if_none_match.as_deref();
                self.page(id, at, read.from, Some(&mut cursor), etag, reader, now)
            }
            Live::LongPoll if closed => Ok(self.nothing_new(id, &mut cursor, now)),
            Live::LongPoll => {
                let slot = self.subscribe(id, reader);
                Ok(Reply::Wait(Poll { id, slot, at, cursor, reader }))
            }
            // 204 is what tells an EventSource not to come back (WHATWG HTML section 9.2.2).
            Live::Events | Live::PlainEvents
                if closed && at_end && (read.resumed || read.live == Live::PlainEvents) =>
            {
                Ok(self.nothing_new(id, &mut cursor, now))
            }
            Live::Events | Live::PlainEvents => {
                let plain = read.live == Live::PlainEvents;
                let mut reading = Reading::events(id, form, at, plain, cursor, now);
                reading.slot = Some(self.subscribe(id, reader));
                let mut lines = self.lines();
                // The name alone: clients compare the whole value.
                lines
                    .add("Content-Type", "text/event-stream")
                    .add("Cache-Control", "no-cache, no-transform")
                    .add("X-Accel-Buffering", "no")
                    .add_if(form == Form::Binary, "Stream-SSE-Data-Encoding", "base64");
                Ok(Reply::Events(Answer { status: 200, lines: lines.0, body: Vec::new() }, reading))
            }
        }
    }

    pub(super) fn metadata(&mut self, request: &Request, now: Now) -> Outcome {
        let id = self.open_shown(&request.path, now)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let mut lines = self.lines();
        lines
            .add("Content-Type", &stream.content_type)
            .add("Stream-Next-Offset", stream.offset(stream.shown_tail()))
            .add_if(stream.is_shown_closed(), "Stream-Closed", "true");
        match &stream.expiry {
            Expiry::Never => {}
            Expiry::Ttl(seconds) => _ = lines.add("Stream-TTL", seconds),
            Expiry::At(_, text) => _ = lines.add("Stream-Expires-At", text),
        }
        self.add_earliest(id, &mut lines);
        lines.add("Cache-Control", "no-store");
        Ok(Reply::Answer(Answer { status: 200, lines: lines.0, body: Vec::new() }))
    }

    /// The position that a read is to begin at, if it is there.
    pub(super) fn resolve(&self, id: Id, from: From) -> Result<u64, Refused> {
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let at = match from {
            From::End => return Ok(stream.shown_tail()),
            From::Start | From::Offset(Offset::ZERO) => 0,
            From::Offset(offset) if offset.generation != stream.generation => {
                return Err(self.refused(refusals::OTHER_STREAM));
            }
            From::Offset(offset) if offset.position > stream.shown_tail() => {
                return Err(self.refused(refusals::OFFSET_BEYOND));
            }
            From::Offset(offset) => offset.position,
        };
        if self.earliest(id).is_none_or(|earliest| earliest > at) {
            let mut lines = self.lines();
            self.add_earliest(id, &mut lines);
            return Err(Refused(refusals::OFFSET_GONE, lines));
        }
        if stream.form == Form::Json && !self.is_boundary(id, at) {
            return Err(self.refused(refusals::BAD_OFFSET));
        }
        Ok(at)
    }

    /// Not in the protocol: from where on a stream can be read whose start was dropped.
    pub(super) fn add_earliest(&self, id: Id, lines: &mut Lines) {
        if let (Some(stream), Some(earliest)) = (self.streams.get(id), self.earliest(id)) {
            lines.add_if(earliest > 0, "Stream-Earliest-Offset", stream.offset(earliest));
        }
    }

    /// Section 8, `offset=now` without a live mode: where the end is, and no more.
    fn nothing_yet(&self, id: Id) -> Reply {
        let mut lines = self.lines();
        let mut body = Vec::new();
        if let Some(stream) = self.streams.get(id) {
            lines
                .add("Content-Type", &stream.content_type)
                .add("Stream-Next-Offset", stream.offset(stream.shown_tail()))
                .add("Stream-Up-To-Date", "true")
                .add_if(stream.is_shown_closed(), "Stream-Closed", "true")
                .add("Cache-Control", "no-store");
            if stream.form == Form::Json {
                body.extend_from_slice(b"[]");
            }
        }
        Reply::Answer(Answer { status: 200, lines: lines.0, body })
    }

    /// Section 5.7: the end of a long-poll that has brought nothing.
    pub(super) fn nothing_new(&self, id: Id, cursor: &mut Cursor, now: Now) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            lines
                .add("Stream-Next-Offset", stream.offset(stream.shown_tail()))
                .add("Stream-Up-To-Date", "true")
                .add_if(stream.is_shown_closed(), "Stream-Closed", "true")
                .add_if(!stream.is_shown_closed(), "Stream-Cursor", cursor.next(now))
                .add("Cache-Control", "no-store");
        }
        Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() })
    }

    /// A page from `at` on (section 5.6).
    #[allow(clippy::too_many_arguments, reason = "the parts of one answer")]
    pub(super) fn page(
        &mut self,
        id: Id,
        at: u64,
        from: From,
        cursor: Option<&mut Cursor>,
        if_none_match: Option<&str>,
        reader: Key,
        now: Now,
    ) -> Outcome {
        let end = self.page_end(id, at);
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let form = stream.form;
        let at_end = end == stream.shown_tail();
        let closed = stream.is_shown_closed() && at_end;
        let start = match from {
            From::Start => "-1".to_owned(),
            _ => stream.offset(at).to_string(),
        };
        // Section 10.1: it differs with the closing, so that nobody misses that for having the data.
        let etag = format!(
            "\"{}:{start}:{}{}\"",
            stream.created,
            stream.offset(end),
            if closed { ":c" } else { "" }
        );
        let mut lines = self.lines();
        lines
            .add("ETag", &etag)
            .add("Stream-Next-Offset", stream.offset(end))
            .add_if(at_end, "Stream-Up-To-Date", "true")
            .add_if(closed, "Stream-Closed", "true")
            // What lies between two offsets never changes. That nothing lies there yet does, at any time.
            .add(
                "Cache-Control",
                if at < end {
                    "private, max-age=60, stale-while-revalidate=300"
                } else {
                    "private, no-cache"
                },
            );
        if let Some(cursor) = cursor {
            lines.add("Stream-Cursor", cursor.next(now));
        }
        if if_none_match.is_some_and(|known| names(known, &etag)) {
            return Ok(Reply::Answer(Answer { status: 304, lines: lines.0, body: Vec::new() }));
        }
        lines.add("Content-Type", &stream.content_type);
        let head = Answer { status: 200, lines: lines.0, body: Vec::new() };
        let mut reading = Reading::page(id, form, at, end);
        reading.slot = Some(self.subscribe(id, reader));
        Ok(Reply::Body(head, body_bytes(form, at, end), reading))
    }

    /// Whole messages, as many as a page holds; of bytes, less than one if that is longer.
    fn page_end(&self, id: Id, at: u64) -> u64 {
        let Some(stream) = self.streams.get(id) else { return at };
        let limit = at + DURABLE_PAGE_BYTES_MAX;
        if stream.shown_tail() <= limit {
            return stream.shown_tail();
        }
        if stream.form != Form::Json {
            return limit;
        }
        let mut end = self.message_end(id, at).unwrap_or(at);
        while let Some(next) = self.message_end(id, end)
            && next <= limit
        {
            end = next;
        }
        end
    }
}

/// Whether an If-None-Match names this tag (RFC 9110 section 13.1.2; compared weakly).
fn names(known: &str, etag: &str) -> bool {
    known.split(',').map(str::trim).any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}
