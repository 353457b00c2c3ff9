//! The streams of one shard: found by path, written to, read by whoever asks. What becomes of writes is in `writes`, what answers
//! to reads say in `reads`, how streams end and what memory they take in `room`, what is told the journal in `persist`.

use super::journal::Journal;
use super::lines::{Lines, PREFLIGHT};
use super::persist::Rewriting;
use super::reading::{Cursor, Reading};
use super::request::{From, Operation, Request};
use super::stream::Stream;
use super::{Now, Settings, home_of, refusals};
use crate::dialect::Dialect;
use crate::fault::Fault;
use crate::limits::{DURABLE_EXPIRY_STEP_MS, DURABLE_STREAM_COST_BYTES};
use crate::log::Lent;
use crate::planted::{Bug, is_planted};
use crate::slots::{Key, Slots};
use std::collections::{BTreeSet, HashMap, VecDeque};

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
    pub(super) id: Id,
    pub(super) slot: usize,
    pub(super) at: u64,
    pub(super) cursor: Cursor,
    pub(super) reader: Key,
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

/// The streams of one shard.
pub struct Store {
    pub(super) settings: Settings,
    pub(super) streams: Slots<Stream>,
    pub(super) by_path: HashMap<Box<str>, Id>,
    pub(super) bytes: u64,
    pub(super) readers: u64,
    /// `created` of the newest stream.
    pub(super) created: u64,
    /// Counts uses.
    pub(super) tick: u64,
    /// All streams by the tick of their last use, as it was when they were put there.
    pub(super) orders: [BTreeSet<(u64, Id)>; 3],
    /// Streams that can expire, by when, as it was when they were put there.
    pub(super) due: BTreeSet<(u64, Id)>,
    /// Streams that hold messages which will be too old, by when they are looked at.
    pub(super) looks: BTreeSet<(u64, Id)>,
    /// Streams that have something to tell their readers.
    pub(super) changed: Vec<Id>,
    /// Readers of streams that are no more.
    pub(super) left_over: Vec<Key>,
    pub(super) counters: Counters,
    /// Where every change is written; none without a data directory.
    pub(super) journal: Option<Journal>,
    /// What is recorded and may not be shown yet: the record, and what may be shown when it is acknowledged.
    pub(super) unshown: VecDeque<(u64, Id, u64, bool)>,
    /// Streams by the first segment that they need.
    pub(super) by_segment: BTreeSet<(u64, Id)>,
    pub(super) rewriting: Rewriting,
    /// No segment goes, whoever needs it.
    pub(super) keeps_segments: bool,
    pub(super) place: Place,
    /// Paths that are free again, each from when this record is on the disk.
    pub(super) vacated: VecDeque<(u64, Box<str>)>,
    /// Those of them that belong to other shards.
    pub(super) gone: VecDeque<(u64, Box<str>)>,
}

/// Which of how many shards a store belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    own: usize,
    shards: usize,
}

impl Place {
    /// Whether a path belongs to another shard.
    pub(super) fn is_away(self, path: &str) -> bool {
        self.shards > 1 && home_of(path, self.shards) != self.own
    }

    /// The first number from `least` on that no other shard gives.
    pub(super) fn number_from(self, least: u64) -> u64 {
        let (own, shards) = (self.own as u64, self.shards as u64);
        least + (own + shards - least % shards) % shards
    }
}

pub(super) type Outcome = Result<Reply, Refused>;

/// A refusal, and the lines that go with it.
pub(super) struct Refused(pub(super) Fault, pub(super) Lines);

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
            looks: BTreeSet::new(),
            changed: Vec::new(),
            left_over: Vec::new(),
            counters: Counters::default(),
            journal: None,
            unshown: VecDeque::new(),
            by_segment: BTreeSet::new(),
            rewriting: Rewriting::default(),
            keeps_segments: false,
            place: Place { own: 0, shards: 1 },
            vacated: VecDeque::new(),
            gone: VecDeque::new(),
        }
    }

    /// From now on it is that of one shard of so many. Before the first request.
    pub fn be_placed(&mut self, own: usize, shards: usize) {
        self.place = Place { own, shards };
        let ids: Vec<Id> = self.streams.iter().map(|(id, _)| id).collect();
        for id in ids {
            if let Some(stream) = self.streams.get_mut(id) {
                stream.away = self.place.is_away(&stream.path);
            }
            self.recount(id);
        }
    }

    /// Whether a request for that path finds something here, be it a stream that is due.
    pub fn holds(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    /// Whether there is a stream at a path, or what is kept of one.
    pub fn has(&mut self, path: &str, now: Now) -> bool {
        self.find(path, now).is_some()
    }

    /// Whether a path was given up here, and the disk may still take that back.
    pub fn is_vacated(&self, path: &str) -> bool {
        !is_planted(Bug::GoneTooEarly) && self.vacated.iter().any(|(_, vacated)| **vacated == *path)
    }

    /// Whether there was a stream at a path of another shard, which has not been told yet that it is gone.
    pub fn is_going(&self, path: &str) -> bool {
        self.gone.iter().any(|(_, gone)| **gone == *path)
    }

    /// The next path of another shard of which that is to be told that it is free: nothing takes it back any more.
    pub fn take_gone(&mut self) -> Option<Box<str>> {
        let synced = self.synced();
        let may_go = |record: u64| record <= synced || is_planted(Bug::GoneTooEarly);
        self.gone.front().filter(|(record, _)| may_go(*record))?;
        self.gone.pop_front().map(|(_, path)| path)
    }

    /// Paths of other shards at which there are streams here.
    pub fn paths_away(&self) -> impl Iterator<Item = &str> {
        self.by_path.keys().map(|path| &**path).filter(|path| self.place.is_away(path))
    }

    /// The answer to a change that the journal could not take.
    pub fn change_refusal(&self) -> Option<Answer> {
        Some(self.refuse(&self.journal.as_ref()?.refusal()?))
    }

    /// The record up to which everything is on the disk.
    pub(super) fn synced(&self) -> u64 {
        self.journal.as_ref().map_or(u64::MAX, Journal::synced)
    }

    /// A path is free; what is recorded so far says so.
    pub(super) fn vacate(&mut self, path: Box<str>) {
        if self.place.shards == 1 {
            return;
        }
        let record = self.journal.as_ref().map_or(0, Journal::last);
        if self.place.is_away(&path) {
            self.gone.push_back((record, path));
        } else if self.journal.is_some() {
            self.vacated.push_back((record, path));
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
        if let Some(fault) = self.write_refusal(&request.operation) {
            return Reply::Answer(self.refuse(&fault));
        }
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

    /// Why a change is not even tried: the journal could not take it.
    fn write_refusal(&self, operation: &Operation) -> Option<Fault> {
        if operation.is_change() { self.journal.as_ref()?.refusal() } else { None }
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
            Some(stream) if poll.at < stream.shown_tail() => {
                let (id, at, reader) = (poll.id, poll.at, poll.reader);
                self.page(id, at, From::Offset(stream.offset(at)), Some(&mut poll.cursor), None, reader, now)
                    .unwrap_or_else(|Refused(fault, lines)| Reply::Answer(refusal(&fault, lines)))
            }
            Some(stream) if stream.is_shown_closed() || over => {
                self.nothing_new(poll.id, &mut poll.cursor, now)
            }
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

    /// When the next stream may have to be expired, or messages are too old, ms; a little late, so that many are done at once.
    pub fn next_due_ms(&self) -> Option<u64> {
        let first =
            [self.due.first(), self.looks.first()].into_iter().flatten().map(|(due_ms, _)| due_ms).min();
        first.map(|due_ms| {
            due_ms.saturating_add(DURABLE_EXPIRY_STEP_MS).next_multiple_of(DURABLE_EXPIRY_STEP_MS)
        })
    }

    /// Ends the streams whose time is over, and drops messages whose time is.
    pub fn expire(&mut self, now: Now) {
        self.drop_old(now);
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

    fn preflight(&self) -> Reply {
        let mut lines = self.lines();
        if self.settings.cors {
            lines.0.push_str(PREFLIGHT);
        }
        lines.add("Allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS");
        Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() })
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
                let end = stream.message_end(at)?.min(most);
                return Some(end).filter(|&end| end <= stream.shown_tail());
            }
            most = most.min(stream.base);
            id = stream.source?;
        }
    }

    pub(super) fn is_boundary(&self, mut id: Id, at: u64) -> bool {
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
    pub(super) fn depth(&self, id: Id) -> usize {
        self.with_sources(id).count() - 1
    }

    /// A stream, its source, the source of that.
    pub(super) fn with_sources(&self, id: Id) -> impl Iterator<Item = Id> {
        std::iter::successors(Some(id), |&id| self.streams.get(id)?.source)
    }

    pub(super) fn hold_source(&mut self, source: Option<Id>, hold: bool) {
        if let Some(stream) = source.and_then(|id| self.streams.get_mut(id)) {
            stream.forks = if hold { stream.forks + 1 } else { stream.forks - 1 };
        }
    }

    /// The stream at a path; one that is due is not.
    pub(super) fn find(&mut self, path: &str, now: Now) -> Option<Id> {
        let id = *self.by_path.get(path)?;
        let stream = self.streams.get(id)?;
        if stream.due_ms() > now.ms || stream.deleted {
            return Some(id);
        }
        self.expire_one(id);
        // There for its forks, perhaps.
        self.by_path.get(path).copied()
    }

    /// The same, where it can be used.
    pub(super) fn open(&mut self, path: &str, now: Now) -> Result<Id, Refused> {
        match self.find(path, now) {
            None => Err(self.refused(refusals::NOT_FOUND)),
            Some(id) if self.streams.get(id).is_some_and(|stream| stream.deleted) => {
                Err(self.refused(refusals::DELETED))
            }
            Some(id) => Ok(id),
        }
    }

    /// The same, where readers may know of it.
    pub(super) fn open_shown(&mut self, path: &str, now: Now) -> Result<Id, Refused> {
        let id = self.open(path, now)?;
        let shown = self.streams.get(id).is_some_and(Stream::is_shown);
        if shown { Ok(id) } else { Err(self.refused(refusals::NOT_FOUND)) }
    }

    pub(super) fn lines(&self) -> Lines {
        Lines::new(self.settings.cors)
    }

    pub(super) fn refused(&self, fault: Fault) -> Refused {
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

    pub(super) fn unsubscribe(&mut self, id: Id, slot: usize, now: Now) {
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

    pub(super) fn tell(&mut self, id: Id) {
        if let Some(stream) = self.streams.get_mut(id)
            && !stream.readers.is_empty()
            && !std::mem::replace(&mut stream.changed, true)
        {
            self.changed.push(id);
        }
    }
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
