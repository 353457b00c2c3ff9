//! The streams of one shard: found by path, bounded in memory, ended when their time is over.
//!
//! Where memory runs out, it is given up in this order, least recently used first, and never where somebody is reading:
//! closed streams whole; the oldest messages of open ones; open streams of which nothing is held. All of it is counted.

use super::lines::{Lines, PREFLIGHT};
use super::reading::{Cursor, Reading, body_bytes};
use super::request::{Append, Create, Expiry, Fork, From, Live, Operation, Read, Request};
use super::stream::{Origin, Stream, Verdict};
use super::{Form, Now, Offset, Settings, json, refusals};
use crate::dialect::Dialect;
use crate::fault::Fault;
use crate::limits::{
    DURABLE_EXPIRY_STEP_MS, DURABLE_FORK_DEPTH_MAX, DURABLE_PAGE_BYTES_MAX, DURABLE_STREAM_COST_BYTES,
};
use crate::log::Lent;
use crate::slots::{Key, Slots};
use std::collections::{BTreeSet, HashMap};

/// Of streams that are created without one (PROTOCOL.md section 5.1).
pub(super) const DEFAULT_CONTENT_TYPE: &str = "application/octet-stream";

/// Names a stream for as long as it exists.
pub(super) type Id = Key;

/// A whole answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Of the response.
    pub status: u16,
    /// Complete field lines, each with its CRLF; no framing.
    pub lines: String,
    /// Empty where the status or the method allows none.
    pub body: Vec<u8>,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Reply {
    /// This.
    Answer(Answer),
    /// A head, and so many bytes of a body that are to be read.
    Body(Answer, u64, Reading),
    /// The head of an event stream, and events that are to be read.
    Events(Answer, Reading),
    /// Nothing yet.
    Wait(Poll),
}

/// A long-poll that waits. It is one of its stream's readers until [`Store::poll`] answers or [`Store::give_up`].
#[derive(Debug)]
pub struct Poll {
    id: Id,
    slot: usize,
    at: u64,
    cursor: Cursor,
    reader: Key,
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident),* $(,)?) => {
        /// What a store counts, since its beginning.
        #[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
        pub struct Counters { $($(#[doc = $doc])+ pub $field: u64),* }
    };
}

counters! {
    /// Streams created, forks included.
    creates,
    /// Appends accepted.
    appends,
    /// Bytes appended.
    append_bytes,
    /// Appends of producers that had been appended before.
    duplicates,
    /// Reads begun: pages, long-polls, event streams.
    reads,
    /// Streams whose time to live was over.
    expiries,
    /// Streams given up for want of memory.
    evictions,
    /// Bytes of messages dropped from streams: beyond their window, or for want of memory.
    trimmed_bytes,
    /// Appends and creations refused for want of memory.
    full,
}

/// What a store holds at this instant.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Totals {
    /// Streams, those included that are deleted and kept for their forks.
    pub streams: usize,
    /// Memory that they take, bytes.
    pub bytes: u64,
    /// Readers under way.
    pub readers: u64,
}

/// What can be given up, first to last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Class {
    /// Closed.
    Closed,
    /// Open, with messages.
    Open,
    /// Open, without.
    Empty,
}

/// The streams of one shard.
pub struct Store {
    settings: Settings,
    streams: Slots<Stream>,
    by_path: HashMap<Box<str>, Id>,
    bytes: u64,
    readers: u64,
    /// `created` of the newest stream.
    created: u64,
    /// Counts uses.
    tick: u64,
    /// All streams by the tick of their last use, as it was when they were put there.
    orders: [BTreeSet<(u64, Id)>; 3],
    /// Streams that can expire, by when, as it was when they were put there.
    due: BTreeSet<(u64, Id)>,
    /// Streams that have something to tell their readers.
    changed: Vec<Id>,
    /// Readers of streams that are no more.
    left_over: Vec<Key>,
    counters: Counters,
}

type Outcome = Result<Reply, Refused>;

/// A refusal, and the lines that go with it.
struct Refused(Fault, Lines);

impl Store {
    /// An empty one.
    pub fn new(settings: Settings) -> Self {
        let most = settings.store_bytes_max / DURABLE_STREAM_COST_BYTES as u64;
        Store {
            streams: Slots::new(usize::try_from(most).unwrap_or(usize::MAX).clamp(1, u32::MAX as usize - 1)),
            settings,
            by_path: HashMap::new(),
            bytes: 0,
            readers: 0,
            created: 0,
            tick: 0,
            orders: Default::default(),
            due: BTreeSet::new(),
            changed: Vec::new(),
            left_over: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// What it holds.
    pub fn totals(&self) -> Totals {
        Totals { streams: self.streams.len(), bytes: self.bytes, readers: self.readers }
    }

    /// What it has counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Carries a request out. `reader` is who will be named by [`Store::take_woken`], should it become a reader.
    pub fn handle(&mut self, request: &Request, body: &[u8], reader: Key, now: Now) -> Reply {
        let outcome = match &request.operation {
            Operation::Create(create) => self.create(request, create, body, now),
            Operation::Append(append) => self.append(request, append, body, now),
            Operation::Read(read) => self.begin_read(request, read, reader, now),
            Operation::Metadata => self.metadata(request, now),
            Operation::Delete => self.delete(request, now),
            Operation::Preflight => Ok(self.preflight()),
        };
        outcome.unwrap_or_else(|Refused(fault, lines)| Reply::Answer(refusal(&fault, lines)))
    }

    /// The answer to a request that could not be taken apart.
    pub fn refuse(&self, fault: &Fault) -> Answer {
        let mut lines = self.lines();
        if fault.status == 405 {
            lines.add("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS");
        }
        refusal(fault, lines)
    }

    /// Whether a long-poll can be answered; it must be when its time is `over`. It is no reader any more when it is.
    pub fn poll(&mut self, poll: &mut Poll, over: bool, now: Now) -> Option<Reply> {
        let stream = self.streams.get(poll.id).filter(|stream| !stream.deleted);
        let reply = match stream {
            None => Reply::Answer(self.refuse(&refusals::NOT_FOUND)),
            Some(stream) if poll.at < stream.tail() => {
                let (id, at, reader) = (poll.id, poll.at, poll.reader);
                self.page(id, at, From::Offset(stream.offset(at)), Some(&mut poll.cursor), None, reader, now)
                    .unwrap_or_else(|Refused(fault, lines)| Reply::Answer(refusal(&fault, lines)))
            }
            Some(stream) if stream.closed || over => self.nothing_new(poll.id, &mut poll.cursor, now),
            Some(_) => return None,
        };
        self.unsubscribe(poll.id, poll.slot, now);
        Some(reply)
    }

    /// Ends a long-poll whose client has left.
    pub fn give_up(&mut self, poll: &Poll, now: Now) {
        self.unsubscribe(poll.id, poll.slot, now);
    }

    /// Ends a reading, at its end or before.
    pub fn leave(&mut self, reading: &mut Reading, now: Now) {
        if let Some(slot) = reading.slot.take() {
            self.unsubscribe(reading.id, slot, now);
        }
    }

    /// Adds whom changes of their stream concern since the last call; some may be named twice, or have left.
    pub fn take_woken(&mut self, woken: &mut Vec<Key>) {
        woken.append(&mut self.left_over);
        for id in self.changed.drain(..) {
            if let Some(stream) = self.streams.get_mut(id) {
                stream.changed = false;
                woken.extend(stream.readers.iter().map(|(_, reader)| *reader));
            }
        }
    }

    /// When the next stream may have to be expired, ms; a little late, so that many are done at once.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|(due_ms, _)| {
            due_ms.saturating_add(DURABLE_EXPIRY_STEP_MS).next_multiple_of(DURABLE_EXPIRY_STEP_MS)
        })
    }

    /// Ends the streams whose time is over.
    pub fn expire(&mut self, now: Now) {
        while let Some(&(due_ms, id)) = self.due.first()
            && due_ms <= now.ms
        {
            self.due.pop_first();
            let Some(stream) = self.streams.get_mut(id) else { continue };
            stream.queued_due_ms = None;
            match stream.due_ms() {
                due_ms if due_ms <= now.ms => self.expire_one(id),
                // In use: looked at again when it could be over at the earliest.
                u64::MAX => {
                    let idle_ms = stream.ttl_ms().max(DURABLE_EXPIRY_STEP_MS);
                    self.queue_due(id, now.ms.saturating_add(idle_ms));
                }
                due_ms => self.queue_due(id, due_ms),
            }
        }
    }

    // ---- requests

    fn create(&mut self, request: &Request, create: &Create, body: &[u8], now: Now) -> Outcome {
        if let Some(id) = self.find(&request.path, now)
            && let Some(stream) = self.streams.get(id)
        {
            return if stream.deleted {
                Err(self.refused(refusals::PATH_HELD))
            } else if stream.is_as_asked(create) {
                Ok(self.created(200, id, request))
            } else {
                Err(self.refused(refusals::EXISTS))
            };
        }
        // Unique, later than any before, and the time wherever that is possible.
        let created = now.unix_ms.max(self.created + 1);
        let origin = self.origin(create, created, now).map_err(|fault| self.refused(fault))?;
        let form = Form::of(&origin.content_type);
        let messages = messages(form, body, true).map_err(|fault| self.refused(fault))?;
        let source = origin.source;
        let need = DURABLE_STREAM_COST_BYTES as u64 + request.path.len() as u64 + room_for(body, &messages);
        // The source must not be given up to make room for its fork.
        self.hold_source(source, true);
        if let Err(fault) = self.fits(body).and_then(|()| self.make_room(need, None, now)) {
            self.hold_source(source, false);
            return Err(self.refused(fault));
        }
        let Ok(id) = self.streams.insert(Stream::new(&request.path, created, create, origin, now)) else {
            self.hold_source(source, false);
            self.counters.full += 1;
            return Err(self.refused(refusals::FULL));
        };
        self.created = created;
        self.counters.creates += 1;
        self.by_path.insert(request.path.clone(), id);
        if let Some(stream) = self.streams.get_mut(id) {
            for message in &messages {
                stream.push(message);
            }
            if create.closed {
                stream.close(None);
            }
            self.counters.append_bytes += body.len() as u64;
            let due_ms = stream.due_ms();
            if due_ms != u64::MAX {
                self.queue_due(id, due_ms);
            }
        }
        self.used(id, now);
        self.settle_bytes(id);
        Ok(self.created(201, id, request))
    }

    /// Where a new stream comes from: from nothing, or from its source.
    fn origin(&mut self, create: &Create, created: u64, now: Now) -> Result<Origin, Fault> {
        let Some(fork) = &create.fork else {
            return Ok(Origin {
                source: None,
                base: 0,
                generation: created,
                content_type: create.content_type.clone().unwrap_or_else(|| DEFAULT_CONTENT_TYPE.into()),
                expiry: create.expiry.clone(),
            });
        };
        let id = self.find(&fork.from, now).ok_or(refusals::SOURCE_NOT_FOUND)?;
        let source = self.streams.get(id).ok_or(refusals::SOURCE_NOT_FOUND)?;
        if source.deleted {
            return Err(refusals::SOURCE_DELETED);
        }
        if let Some(asked) = &create.content_type
            && !super::media_type(asked).eq_ignore_ascii_case(super::media_type(&source.content_type))
        {
            return Err(refusals::CONTENT_TYPE_DIFFERS);
        }
        if self.depth(id) >= DURABLE_FORK_DEPTH_MAX {
            return Err(refusals::FORK_DEPTH);
        }
        Ok(Origin {
            source: Some(id),
            base: self.fork_point(id, fork)?,
            generation: source.generation,
            content_type: source.content_type.clone(),
            // Section 4.2: its own, or else its source's.
            expiry: match &create.expiry {
                Expiry::Never => source.expiry.clone(),
                own => own.clone(),
            },
        })
    }

    /// The position at which a fork leaves its source.
    fn fork_point(&self, id: Id, fork: &Fork) -> Result<u64, Fault> {
        let source = self.streams.get(id).ok_or(refusals::SOURCE_NOT_FOUND)?;
        let mut at = match fork.offset {
            None => source.tail(),
            Some(Offset { position: 0, .. }) => 0,
            Some(offset) if offset.generation != source.generation || offset.position > source.tail() => {
                return Err(refusals::FORK_BEYOND);
            }
            Some(offset) => offset.position,
        };
        if self.earliest(id).is_none_or(|earliest| earliest > at) {
            return Err(refusals::FORK_GONE);
        }
        if source.form == Form::Json {
            if !self.is_boundary(id, at) {
                return Err(refusals::BAD_FORK);
            }
            for _ in 0..fork.sub_offset {
                at = self.message_end(id, at).ok_or(refusals::FORK_BEYOND)?;
            }
        } else if fork.sub_offset > 0 {
            let end = self.message_end(id, at).ok_or(refusals::FORK_BEYOND)?;
            if fork.sub_offset > end - at {
                return Err(refusals::FORK_BEYOND);
            }
            at += fork.sub_offset;
        }
        Ok(at)
    }

    fn created(&self, status: u16, id: Id, request: &Request) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            if status == 201 && !request.authority.is_empty() {
                let scheme = if request.secure { "https" } else { "http" };
                lines.add("Location", format_args!("{scheme}://{}{}", request.authority, request.path));
            }
            lines
                .add("Content-Type", &stream.content_type)
                .add("Stream-Next-Offset", stream.offset(stream.tail()))
                .add_if(stream.closed, "Stream-Closed", "true");
        }
        Reply::Answer(Answer { status, lines: lines.0, body: Vec::new() })
    }

    fn append(&mut self, request: &Request, append: &Append, body: &[u8], now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        if body.is_empty() && !append.close {
            return Err(self.refused(refusals::EMPTY_BODY));
        }
        if !body.is_empty() && append.content_type.is_none() {
            return Err(self.refused(refusals::CONTENT_TYPE_REQUIRED));
        }
        let tag = append.producer.as_ref();
        if stream.closed {
            return self.append_to_closed(id, append, body, now);
        }
        let media = append.content_type.as_deref().map(super::media_type).unwrap_or_default();
        if !body.is_empty() && !media.eq_ignore_ascii_case(super::media_type(&stream.content_type)) {
            return Err(self.refused(refusals::CONTENT_TYPE_DIFFERS));
        }
        if let Some(tag) = tag {
            match stream.judge(tag, now.ms) {
                Verdict::Accepted => {}
                Verdict::Duplicate(highest) => {
                    self.counters.duplicates += 1;
                    self.used(id, now);
                    return Ok(self.appended(204, id, Some((tag.epoch, highest))));
                }
                verdict => return Err(self.verdict_refused(verdict, tag.sequence)),
            }
        }
        // Section 5.2: after the closed state and the content type; and a repeated append was answered already.
        if let (Some(sequence), Some(last)) = (&append.sequence, &stream.last_sequence)
            && sequence <= last
        {
            return Err(self.refused(refusals::SEQUENCE));
        }
        let messages = messages(stream.form, body, false).map_err(|fault| self.refused(fault))?;
        // What only closes needs no room.
        if !body.is_empty() {
            let need = room_for(body, &messages);
            self.fits(body)
                .and_then(|()| self.make_room(need, Some(id), now))
                .map_err(|fault| self.refused(fault))?;
        }
        let window = self.settings.stream_bytes_max;
        if let Some(stream) = self.streams.get_mut(id) {
            for message in &messages {
                stream.push(message);
            }
            if let Some(tag) = tag {
                stream.note_producer(tag, now.ms);
            }
            if append.sequence.is_some() {
                stream.last_sequence.clone_from(&append.sequence);
            }
            if append.close {
                stream.close(tag);
            }
            let earliest = stream.earliest;
            stream.trim(window);
            self.counters.trimmed_bytes += stream.earliest - earliest;
            self.counters.appends += u64::from(!body.is_empty());
            self.counters.append_bytes += body.len() as u64;
        }
        self.used(id, now);
        self.settle_bytes(id);
        self.tell(id);
        let status = if tag.is_some() && !body.is_empty() { 200 } else { 204 };
        Ok(self.appended(status, id, tag.map(|tag| (tag.epoch, tag.sequence))))
    }

    fn append_to_closed(&mut self, id: Id, append: &Append, body: &[u8], now: Now) -> Outcome {
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        match &append.producer {
            // Section 5.2.1: the very append that closed it, once more.
            Some(tag) if stream.was_closed_by(tag) => {
                self.counters.duplicates += 1;
                self.used(id, now);
                return Ok(self.appended(204, id, Some((tag.epoch, tag.sequence))));
            }
            Some(tag) => {
                if let verdict @ Verdict::Stale(_) = stream.judge(tag, now.ms) {
                    return Err(self.verdict_refused(verdict, tag.sequence));
                }
            }
            None if append.close && body.is_empty() => {
                self.used(id, now);
                return Ok(self.appended(204, id, None));
            }
            None => {}
        }
        let mut lines = self.lines();
        lines.add("Stream-Closed", "true").add("Stream-Next-Offset", stream.offset(stream.tail()));
        Err(Refused(refusals::CLOSED, lines))
    }

    fn appended(&self, status: u16, id: Id, producer: Option<(u64, u64)>) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            lines.add("Stream-Next-Offset", stream.offset(stream.tail())).add_if(
                stream.closed,
                "Stream-Closed",
                "true",
            );
        }
        if let Some((epoch, sequence)) = producer {
            lines.add("Producer-Epoch", epoch).add("Producer-Seq", sequence);
        }
        lines.add("Cache-Control", "no-store");
        Reply::Answer(Answer { status, lines: lines.0, body: Vec::new() })
    }

    fn verdict_refused(&self, verdict: Verdict, received: u64) -> Refused {
        let mut lines = self.lines();
        let fault = match verdict {
            Verdict::Stale(epoch) => {
                lines.add("Producer-Epoch", epoch);
                refusals::STALE_EPOCH
            }
            Verdict::Gap(expected) => {
                lines.add("Producer-Expected-Seq", expected).add("Producer-Received-Seq", received);
                refusals::SEQUENCE_GAP
            }
            Verdict::Refused(fault) => fault,
            Verdict::Accepted | Verdict::Duplicate(_) => refusals::BAD_PRODUCER,
        };
        Refused(fault, lines)
    }

    fn metadata(&mut self, request: &Request, now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let mut lines = self.lines();
        lines
            .add("Content-Type", &stream.content_type)
            .add("Stream-Next-Offset", stream.offset(stream.tail()))
            .add_if(stream.closed, "Stream-Closed", "true");
        match &stream.expiry {
            Expiry::Never => {}
            Expiry::Ttl(seconds) => _ = lines.add("Stream-TTL", seconds),
            Expiry::At(_, text) => _ = lines.add("Stream-Expires-At", text),
        }
        self.add_earliest(id, &mut lines);
        lines.add("Cache-Control", "no-store");
        Ok(Reply::Answer(Answer { status: 200, lines: lines.0, body: Vec::new() }))
    }

    fn delete(&mut self, request: &Request, now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        self.delete_or_keep(id);
        let lines = self.lines();
        Ok(Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() }))
    }

    fn preflight(&self) -> Reply {
        let mut lines = self.lines();
        if self.settings.cors {
            lines.0.push_str(PREFLIGHT);
        }
        lines.add("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS");
        Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() })
    }

    fn begin_read(&mut self, request: &Request, read: &Read, reader: Key, now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        self.counters.reads += 1;
        self.used(id, now);
        let at = self.resolve(id, read.from)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let (form, closed, at_end) = (stream.form, stream.closed, at == stream.tail());
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

    /// The position that a read is to begin at, if it is there.
    fn resolve(&self, id: Id, from: From) -> Result<u64, Refused> {
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        let at = match from {
            From::End => return Ok(stream.tail()),
            From::Start | From::Offset(Offset::ZERO) => 0,
            From::Offset(offset) if offset.generation != stream.generation => {
                return Err(self.refused(refusals::OTHER_STREAM));
            }
            From::Offset(offset) if offset.position > stream.tail() => {
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
    fn add_earliest(&self, id: Id, lines: &mut Lines) {
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
                .add("Stream-Next-Offset", stream.offset(stream.tail()))
                .add("Stream-Up-To-Date", "true")
                .add_if(stream.closed, "Stream-Closed", "true")
                .add("Cache-Control", "no-store");
            if stream.form == Form::Json {
                body.extend_from_slice(b"[]");
            }
        }
        Reply::Answer(Answer { status: 200, lines: lines.0, body })
    }

    /// Section 5.7: the end of a long-poll that has brought nothing.
    fn nothing_new(&self, id: Id, cursor: &mut Cursor, now: Now) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            lines
                .add("Stream-Next-Offset", stream.offset(stream.tail()))
                .add("Stream-Up-To-Date", "true")
                .add_if(stream.closed, "Stream-Closed", "true")
                .add_if(!stream.closed, "Stream-Cursor", cursor.next(now))
                .add("Cache-Control", "no-store");
        }
        Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() })
    }

    /// A page from `at` on (section 5.6).
    #[allow(clippy::too_many_arguments, reason = "the parts of one answer")]
    fn page(
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
        let at_end = end == stream.tail();
        let closed = stream.closed && at_end;
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
        if stream.tail() <= limit {
            return stream.tail();
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

    // ---- streams and their sources

    pub(super) fn stream(&self, id: Id) -> Option<&Stream> {
        self.streams.get(id)
    }

    /// Bytes from `at` up to `end` at most, wherever they lie.
    pub(super) fn lend(&self, mut id: Id, at: u64, mut end: u64) -> Option<Lent> {
        if at >= end {
            return None;
        }
        loop {
            let stream = self.streams.get(id)?;
            if at >= stream.base {
                return stream.lend(at, end);
            }
            end = end.min(stream.base);
            id = stream.source?;
        }
    }

    /// Where the message ends that the byte at `at` belongs to; `None` at the end of the stream.
    pub(super) fn message_end(&self, mut id: Id, at: u64) -> Option<u64> {
        let mut most = u64::MAX;
        loop {
            let stream = self.streams.get(id)?;
            if at >= stream.base {
                // A fork may end its source's message early.
                return stream.message_end(at).map(|end| end.min(most));
            }
            most = most.min(stream.base);
            id = stream.source?;
        }
    }

    fn is_boundary(&self, mut id: Id, at: u64) -> bool {
        while let Some(stream) = self.streams.get(id) {
            if at >= stream.base {
                return at == stream.base || stream.is_boundary(at);
            }
            match stream.source {
                Some(source) => id = source,
                None => break,
            }
        }
        false
    }

    /// The first position from which everything up to the end is held.
    pub(super) fn earliest(&self, mut id: Id) -> Option<u64> {
        let mut earliest = u64::MAX;
        loop {
            let stream = self.streams.get(id)?;
            if stream.earliest > stream.base || stream.source.is_none() {
                return Some(earliest.min(stream.earliest));
            }
            // All of its own is held, so its source decides; at worst it begins where the source was left.
            earliest = earliest.min(stream.base);
            id = stream.source?;
        }
    }

    /// How many sources one behind the other a stream has.
    fn depth(&self, id: Id) -> usize {
        self.with_sources(id).count() - 1
    }

    /// A stream, its source, the source of that.
    fn with_sources(&self, id: Id) -> impl Iterator<Item = Id> {
        std::iter::successors(Some(id), |&id| self.streams.get(id)?.source)
    }

    fn hold_source(&mut self, source: Option<Id>, hold: bool) {
        if let Some(stream) = source.and_then(|id| self.streams.get_mut(id)) {
            stream.forks = if hold { stream.forks + 1 } else { stream.forks - 1 };
        }
    }

    /// The stream at a path; one that is due is not.
    fn find(&mut self, path: &str, now: Now) -> Option<Id> {
        let id = *self.by_path.get(path)?;
        if self.streams.get(id)?.due_ms() <= now.ms && !self.streams.get(id)?.deleted {
            self.expire_one(id);
        }
        self.by_path.get(path).copied()
    }

    /// The same, where it can be used.
    fn open(&mut self, path: &str, now: Now) -> Result<Id, Refused> {
        match self.find(path, now) {
            None => Err(self.refused(refusals::NOT_FOUND)),
            Some(id) if self.streams.get(id).is_some_and(|stream| stream.deleted) => {
                Err(self.refused(refusals::DELETED))
            }
            Some(id) => Ok(id),
        }
    }

    fn lines(&self) -> Lines {
        Lines::new(self.settings.cors)
    }

    fn refused(&self, fault: Fault) -> Refused {
        Refused(fault, self.lines())
    }

    // ---- readers

    pub(super) fn subscribe(&mut self, id: Id, reader: Key) -> usize {
        let chain: Vec<Id> = self.with_sources(id).collect();
        for source in chain {
            if let Some(stream) = self.streams.get_mut(source) {
                stream.live += 1;
            }
        }
        self.readers += 1;
        self.streams.get_mut(id).map_or(0, |stream| stream.readers.insert(reader))
    }

    fn unsubscribe(&mut self, id: Id, slot: usize, now: Now) {
        self.readers -= 1;
        // With a stream that is gone, its readers are out of its sources too.
        let Some(stream) = self.streams.get_mut(id) else { return };
        stream.readers.try_remove(slot);
        if stream.readers.is_empty() {
            // Section 5.1: it does not expire while it is being read, and its time begins anew after.
            stream.used_ms = now.ms;
        }
        let chain: Vec<Id> = self.with_sources(id).collect();
        for source in chain {
            if let Some(stream) = self.streams.get_mut(source) {
                stream.live -= 1;
            }
        }
    }

    fn tell(&mut self, id: Id) {
        if let Some(stream) = self.streams.get_mut(id)
            && !stream.readers.is_empty()
            && !std::mem::replace(&mut stream.changed, true)
        {
            self.changed.push(id);
        }
    }

    // ---- the end of streams

    fn expire_one(&mut self, id: Id) {
        self.counters.expiries += 1;
        self.delete_or_keep(id);
    }

    /// Section 5.4: a stream with forks goes on to exist, for them alone.
    fn delete_or_keep(&mut self, id: Id) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        if stream.forks > 0 {
            stream.deleted = true;
            if let Some(due_ms) = stream.queued_due_ms.take() {
                self.due.remove(&(due_ms, id));
            }
            self.tell(id);
        } else {
            self.remove(id);
        }
    }

    /// Removes a stream without forks, and those of its sources that were only kept for it.
    fn remove(&mut self, id: Id) {
        let mut next = Some(id);
        while let Some(id) = next {
            let chain: Vec<Id> = self.with_sources(id).skip(1).collect();
            let Some(stream) = self.streams.remove(id) else { return };
            self.by_path.remove(&stream.path);
            self.bytes -= stream.counted;
            if let Some((class, tick)) = stream.queued {
                self.orders[class as usize].remove(&(tick, id));
            }
            if let Some(due_ms) = stream.queued_due_ms {
                self.due.remove(&(due_ms, id));
            }
            let own = stream.readers.len();
            self.left_over.extend(stream.readers.into_iter().map(|(_, reader)| reader));
            for source in chain {
                if let Some(source) = self.streams.get_mut(source) {
                    source.live -= u32::try_from(own).unwrap_or(u32::MAX);
                }
            }
            self.hold_source(stream.source, false);
            next = stream.source.filter(|&source| {
                self.streams.get(source).is_some_and(|source| source.deleted && source.forks == 0)
            });
        }
    }

    // ---- memory and time

    /// Notes a read or a write.
    fn used(&mut self, id: Id, now: Now) {
        self.tick += 1;
        if let Some(stream) = self.streams.get_mut(id) {
            stream.used_ms = now.ms;
            stream.used_tick = self.tick;
        }
    }

    /// Brings the sum, and the stream's place in the orders, up to date.
    fn recount(&mut self, id: Id) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        let cost = stream.cost();
        self.bytes = self.bytes - stream.counted + cost;
        stream.counted = cost;
        let class = match stream.closed {
            true => Class::Closed,
            false if stream.holds_data() => Class::Open,
            false => Class::Empty,
        };
        if stream.queued.is_some_and(|(queued, _)| queued == class) {
            return;
        }
        if let Some((class, tick)) = stream.queued.replace((class, stream.used_tick)) {
            self.orders[class as usize].remove(&(tick, id));
        }
        self.orders[class as usize].insert((stream.used_tick, id));
    }

    /// The same after an append. It may have ended in a segment larger than it: others make room for that, as far as they
    /// can, so that the sum is never beyond the limit by more than that segment.
    fn settle_bytes(&mut self, id: Id) {
        self.recount(id);
        self.give_up_for(0, Some(id));
    }

    fn queue_due(&mut self, id: Id, due_ms: u64) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.queued_due_ms = Some(due_ms);
            self.due.insert((due_ms, id));
        }
    }

    /// Whether a body can be a part of any stream.
    fn fits(&self, body: &[u8]) -> Result<(), Fault> {
        let most = self.settings.stream_bytes_max.min(self.settings.store_bytes_max);
        if body.len() as u64 > most { Err(refusals::TOO_LARGE) } else { Ok(()) }
    }

    /// Makes room for so many more bytes; `except` is not removed.
    fn make_room(&mut self, need: u64, except: Option<Id>, now: Now) -> Result<(), Fault> {
        if self.bytes + need > self.settings.store_bytes_max {
            self.expire(now);
        }
        if self.give_up_for(need, except) {
            return Ok(());
        }
        self.counters.full += 1;
        Err(refusals::FULL)
    }

    /// Gives up what may be given up until there is room for so many more bytes; false when there is nothing more.
    fn give_up_for(&mut self, need: u64, except: Option<Id>) -> bool {
        let max = self.settings.store_bytes_max;
        while self.bytes + need > max {
            let give_up = self.bytes + need - max;
            let found = [Class::Closed, Class::Open, Class::Empty].into_iter().any(|class| {
                self.least_used(class, except).is_some_and(|id| self.give_up_some(class, id, give_up))
            });
            if !found {
                return false;
            }
        }
        true
    }

    /// The least recently used of a class that nobody reads, and that may be removed or trimmed.
    fn least_used(&mut self, class: Class, except: Option<Id>) -> Option<Id> {
        // Each is looked at once at most, and put where it belongs if it was used since.
        for _ in 0..self.orders[class as usize].len() {
            let &(tick, id) = self.orders[class as usize].first()?;
            let stream = self.streams.get_mut(id)?;
            let removed = class != Class::Open;
            let kept = stream.live > 0 || (removed && (stream.forks > 0 || except == Some(id)));
            if stream.used_tick == tick && !kept {
                return Some(id);
            }
            if kept {
                self.tick += 1;
                stream.used_tick = self.tick;
            }
            self.orders[class as usize].remove(&(tick, id));
            self.orders[class as usize].insert((stream.used_tick, id));
            stream.queued = Some((class, stream.used_tick));
        }
        None
    }

    fn give_up_some(&mut self, class: Class, id: Id, bytes: u64) -> bool {
        if class != Class::Open {
            self.counters.evictions += 1;
            self.remove(id);
            return true;
        }
        let Some(stream) = self.streams.get_mut(id) else { return false };
        let earliest = stream.earliest;
        let held = stream.tail() - earliest;
        // Memory is given back by whole segments: at least half, so that it is not asked again for each append.
        let dropped = stream.trim(held.saturating_sub(bytes.max(held.div_ceil(2))));
        self.counters.trimmed_bytes += stream.earliest - earliest;
        self.recount(id);
        dropped
    }
}

/// The messages of a body; none in an empty one.
fn messages(form: Form, body: &[u8], create: bool) -> Result<Vec<&[u8]>, Fault> {
    match form {
        _ if body.is_empty() => Ok(Vec::new()),
        Form::Json => match json::messages(body)? {
            // Section 9.1.3: creates an empty stream, but is no append.
            none if none.is_empty() && !create => Err(refusals::EMPTY_ARRAY),
            messages => Ok(messages.into_iter().map(str::as_bytes).collect()),
        },
        Form::Text | Form::Binary => Ok(vec![body]),
    }
}

/// Memory that messages will take, bytes: themselves, and twice a place in the list of their ends.
fn room_for(body: &[u8], messages: &[&[u8]]) -> u64 {
    (body.len() + messages.len() * (1 + 2 * size_of::<u64>())) as u64
}

/// Whether an If-None-Match names this tag (RFC 9110 section 13.1.2; compared weakly).
fn names(known: &str, etag: &str) -> bool {
    known.split(',').map(str::trim).any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

fn refusal(fault: &Fault, mut lines: Lines) -> Answer {
    let mut body = Vec::with_capacity(192);
    Dialect::Plain.write_error_body(fault, &mut body);
    lines
        .add_if(fault.retry_helps, "Retry-After", 1)
        .add("Content-Type", "application/json")
        .add("Cache-Control", "no-store");
    Answer { status: fault.status, lines: lines.0, body }
}
