//! Streams relayed from a model, on disk: what of their logs is recorded, what of it may be delivered, what is written anew so
//! that old segments can go, and how they are told again after a restart. The journal is that of durable streams, one for
//! each shard; a stream's bytes are recorded as they lie in its log, ready for the wire.
//!
//! ```text
//!   log ── what a turn appended ──► follow ──► record ──► Job::Write ──► job_done ──► acknowledged
//!            the disk fails, or is behind: Off, for now ──► once it is well again, written anew as it then is
//! ```

use super::journal::record::{self, CLOSED, Deed, Kind, RELAYED, RelayTold};
use super::journal::{Failure, Image, Job, Journal, JournalCounters, JournalState, Recovered, RelayFacts};
use crate::background::Notes;
use crate::dialect::{Dialect, Meaning};
use crate::limits::{
    DURABLE_BACKLOG_BYTES_MAX, DURABLE_REWRITE_BACKLOG_BYTES_MAX, DURABLE_REWRITE_BYTES_PER_TURN,
    RELAYED_NUMBERS_RESERVED,
};
use crate::log::Log;
use crate::phase::End;
use crate::sse::{Decoder, each_block};
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Segments kept before anything is written anew.
const SEGMENTS_FREE: u64 = 4;

/// Not a stream: its end is the number below which any may have been given.
const COUNTER: u64 = u64::MAX;

/// A stream as the journal knows it.
#[derive(Debug, Default)]
struct Known {
    facts: RelayFacts,
    end: Option<(End, u64)>,
    response: Option<(Box<str>, Box<str>)>,
    /// The first segment that it needs.
    segment: u64,
    /// What is recorded of its log, and the id of the last event in that.
    from: u64,
    to: u64,
    last_id: u64,
    /// Nothing is recorded of it at present.
    off: bool,
}

#[derive(Debug)]
struct Rewriting {
    stream: u64,
    at: u64,
    to: u64,
    last_id: u64,
    segment: u64,
}

/// What became of an attempt to record what is new of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Followed {
    /// There is nothing new.
    Nothing,
    /// It is this record, and begins here in the log.
    Recorded {
        /// The record's number.
        record: u64,
        /// Offset in the log.
        at: u64,
    },
    /// The disk does not take it. The stream goes on without.
    Off,
}

/// A stream that a journal held.
#[derive(Debug)]
pub struct Restored {
    /// The shard that named it, and its number there.
    pub stream: u64,
    /// What is known of it.
    pub facts: RelayFacts,
    /// Why it ended, and when, ms since 1970; `None`: the server did not live to see it.
    pub end: Option<(End, u64)>,
    /// What is kept of it.
    pub log: Log,
    /// What a response in background was found to be.
    pub response: Option<(Box<str>, Box<str>)>,
}

/// The journal of a shard's relayed streams.
#[derive(Debug)]
pub struct RelayJournal {
    journal: Journal,
    segment_bytes: u64,
    streams: HashMap<u64, Known>,
    by_segment: BTreeSet<(u64, u64)>,
    /// Of their logs, as recorded.
    bytes: u64,
    rewriting: Option<Rewriting>,
    rewritten_bytes: u64,
    /// Streams of which nothing is recorded, to be written anew when that is possible.
    off: VecDeque<u64>,
    left_off: u64,
    /// A job has been under way for too long.
    silent: bool,
    /// Numbers below it may be given.
    reserved: u64,
    /// The record that reserves more, and up to where.
    reserving: Option<(u64, u64)>,
}

impl RelayJournal {
    /// Goes on with what a journal held. Numbers below `reserved` may be given. `salt` is any number, which must be secret.
    pub fn new(
        recovered: Recovered,
        segment_bytes: u64,
        fsync_interval_ms: u32,
        salt: u32,
        reserved: u64,
        window_of: impl Fn(&RelayFacts) -> u64,
    ) -> (Self, Vec<Restored>) {
        let mut relayed = RelayJournal {
            journal: Journal::new(&recovered, segment_bytes, u64::from(fsync_interval_ms), salt),
            segment_bytes,
            streams: HashMap::new(),
            by_segment: BTreeSet::new(),
            bytes: 0,
            rewriting: None,
            rewritten_bytes: 0,
            off: VecDeque::new(),
            left_off: 0,
            silent: false,
            reserved,
            reserving: None,
        };
        let mut all = Vec::new();
        for image in recovered.images {
            let (stream, segment, damaged) = (image.created, image.segment, image.damaged);
            let known = Known { segment, to: image.tail, from: image.facts.earliest, ..Known::default() };
            relayed.by_segment.insert((segment, stream));
            relayed.bytes += known.to - known.from;
            relayed.streams.insert(stream, known);
            if stream == COUNTER {
                continue;
            }
            let Some(restored) = restore(image, &window_of) else {
                relayed.forget(stream);
                continue;
            };
            if let Some(known) = relayed.streams.get_mut(&stream) {
                (known.facts, known.end) = (restored.facts.clone(), restored.end);
                (known.response, known.last_id) = (restored.response.clone(), restored.log.last_event_id());
            }
            if damaged {
                // What was concluded from damage does not depend on its being found again.
                relayed.leave_off(stream);
            }
            all.push(restored);
        }
        relayed.journal.release(relayed.by_segment.first().map_or(u64::MAX, |(segment, _)| *segment));
        (relayed, all)
    }

    /// Whether this number may be given to a stream; further ones are reserved in good time.
    pub fn may_give(&mut self, number: u64) -> bool {
        let known_to = self.reserving.map_or(self.reserved, |(_, to)| to);
        if number + RELAYED_NUMBERS_RESERVED / 2 >= known_to && self.reserving.is_none() {
            let to = number.max(self.reserved) + RELAYED_NUMBERS_RESERVED;
            let first = !self.streams.contains_key(&COUNTER);
            let facts = RelayFacts::default();
            let kind = if first { Kind::Create } else { Kind::Append };
            let record = self.record(kind, COUNTER, to, false, |out| {
                if first {
                    record::put_relay_facts(out, &facts);
                }
                let told = RelayTold { earliest: to, ..RelayTold::default() };
                record::put_relay_told(out, &told, to);
            });
            if first {
                self.place(COUNTER, Known { segment: self.journal.segment(), ..Known::default() });
            }
            if let Some(counter) = self.streams.get_mut(&COUNTER) {
                (counter.from, counter.to) = (to, to);
            }
            self.reserving = Some((record, to));
        }
        number < self.reserved
    }

    /// A stream begins. Of its log what is there at the next [`RelayJournal::follow`] is recorded from `facts.begin` on.
    pub fn begin(&mut self, stream: u64, facts: RelayFacts) {
        let (at, segment) = (facts.begin, self.journal.segment());
        let known = Known { facts, segment, from: at, to: at, ..Known::default() };
        if self.is_overwhelmed() {
            self.streams.insert(stream, known);
            return self.leave_off(stream);
        }
        self.record(Kind::Create, stream, at, false, |out| {
            record::put_relay_facts(out, &known.facts);
            let told = RelayTold { earliest: at, ..RelayTold::default() };
            record::put_relay_told(out, &told, at);
        });
        self.place(stream, known);
    }

    /// Whether it has this stream.
    pub fn holds(&self, stream: u64) -> bool {
        self.streams.contains_key(&stream)
    }

    /// Takes in a stream of another journal; its log is asked for with the next jobs.
    pub fn adopt(&mut self, restored: &Restored) {
        let (log, off) = (&restored.log, true);
        let known = Known {
            facts: restored.facts.clone(),
            end: restored.end,
            response: restored.response.clone(),
            segment: 0,
            from: log.end(),
            to: log.end(),
            last_id: log.last_event_id(),
            off,
        };
        self.streams.insert(restored.stream, known);
        self.off.push_back(restored.stream);
    }

    fn place(&mut self, stream: u64, known: Known) {
        self.by_segment.insert((known.segment, stream));
        self.streams.insert(stream, known);
    }

    /// Records what a stream's log has got since, its end, and what a response in background was found to be.
    pub fn follow(
        &mut self,
        stream: u64,
        log: &Log,
        end: Option<(End, u64)>,
        response: Option<(&str, &str)>,
    ) -> Followed {
        let overwhelmed = self.is_overwhelmed();
        let Some(known) = self.streams.get_mut(&stream) else { return Followed::Nothing };
        // What was stopped is not held any more.
        let emptied = log.end() < known.to;
        let (at, to) = if emptied { (known.to, known.to) } else { (known.to.max(log.start()), log.end()) };
        let ends = end.is_some_and(|(end, _)| known.end.is_none_or(|(before, _)| before != end));
        let found = response.filter(|_| known.response.is_none());
        known.end = if ends { end } else { known.end };
        if let Some((id, first)) = found {
            known.response = Some((id.into(), first.into()));
        }
        if at == to && !ends && found.is_none() {
            return Followed::Nothing;
        }
        if known.off || overwhelmed {
            self.leave_off(stream);
            return Followed::Off;
        }
        let before = match at > known.to {
            true => log.id_at(at, known.facts.chunked).unwrap_or(known.last_id),
            false => known.last_id,
        };
        let last = if emptied { known.last_id } else { log.last_event_id() };
        let told = RelayTold {
            earliest: if emptied { to } else { log.start().max(known.from) },
            end: end.filter(|_| ends).map(|(end, unix_ms)| (end.name().into(), unix_ms)),
            response: found.map(|(id, first)| (id.into(), first.into())),
            ids: (before, last),
        };
        let held = known.to - known.from;
        (known.from, known.to, known.last_id) = (told.earliest, to, last);
        self.bytes = self.bytes - held + (to - told.earliest);
        let record = self.record(Kind::Append, stream, to, end.is_some(), |out| {
            record::put_relay_told(out, &told, at);
            put_range(out, log, at, to);
        });
        Followed::Recorded { record, at }
    }

    /// Nothing more of a stream is recorded, until it is written anew.
    pub fn leave_off(&mut self, stream: u64) {
        if let Some(known) = self.streams.get_mut(&stream)
            && !std::mem::replace(&mut known.off, true)
        {
            self.off.push_back(stream);
            self.left_off += 1;
        }
    }

    /// Nobody is to find it any more.
    pub fn forget(&mut self, stream: u64) {
        let Some(known) = self.streams.remove(&stream) else { return };
        self.bytes -= known.to - known.from;
        // Of one that began while nothing was recorded nothing is there.
        if self.by_segment.remove(&(known.segment, stream)) {
            self.record(Kind::Delete, stream, known.to, true, |_| {});
        }
    }

    fn record(
        &mut self,
        kind: Kind,
        stream: u64,
        end: u64,
        closed: bool,
        payload: impl FnOnce(&mut Vec<u8>),
    ) -> u64 {
        let flags = RELAYED | if closed { CLOSED } else { 0 };
        self.journal.record(Deed { kind, flags, stream, end }, payload)
    }

    // ---- what is done

    /// The record up to which everything may be delivered.
    pub fn acknowledged(&self) -> u64 {
        self.journal.acknowledged()
    }

    /// Whether everything recorded is on the disk.
    pub fn is_synced(&self) -> bool {
        self.journal.synced() == self.journal.last()
    }

    /// Whether the disk does not take what is written.
    pub fn is_failing(&self) -> bool {
        self.journal.is_failing() || self.silent
    }

    /// The job under way is not waited for any more: until it is done, nothing is recorded.
    pub fn fall_silent(&mut self) {
        self.silent = true;
    }

    fn is_overwhelmed(&self) -> bool {
        self.journal.is_failing()
            || self.silent
            || self.journal.backlog_bytes() > DURABLE_BACKLOG_BYTES_MAX / 2
    }

    /// How the journal stands.
    pub fn state(&self) -> JournalState {
        let mut state = self.journal.state();
        if self.silent && state.failing.is_none() {
            state.failing = Some("what is written takes too long".to_owned());
        }
        state
    }

    /// What the journal has counted, and bytes of streams written anew.
    pub fn counters(&self) -> (JournalCounters, u64) {
        (self.journal.counters(), self.rewritten_bytes)
    }

    /// How often a stream has gone on without the disk.
    pub fn left_off(&self) -> u64 {
        self.left_off
    }

    /// Whether a stream is not on the disk, or not all of it, for its sake.
    pub fn is_off(&self, stream: u64) -> bool {
        self.streams.get(&stream).is_some_and(|known| known.off)
    }

    /// When [`RelayJournal::next_job`] may have one by the passing of time alone, ms.
    pub fn next_job_ms(&self) -> Option<u64> {
        self.journal.due_ms()
    }

    /// What is to be done with the files next. One job at a time: it is under way until [`RelayJournal::job_done`].
    pub fn next_job<'l>(&mut self, log_of: impl Fn(u64) -> Option<&'l Log>, now_ms: u64) -> Option<Job> {
        self.rewrite(log_of);
        self.journal.next_job(now_ms)
    }

    /// The same for the end of the process: everything recorded is synced now, whatever the interval.
    pub fn last_job(&mut self, now_ms: u64) -> Option<Job> {
        self.journal.hurry(now_ms);
        self.journal.next_job(now_ms)
    }

    /// What became of the job.
    pub fn job_done(&mut self, result: Result<(), Failure>, now_ms: u64) {
        self.silent = false;
        self.journal.complete(result, now_ms);
        if let Some((_, to)) = self.reserving.take_if(|(record, _)| *record <= self.journal.synced()) {
            self.reserved = to;
        }
        self.journal.release(self.by_segment.first().map_or(u64::MAX, |(segment, _)| *segment));
    }

    // ---- writing anew

    /// Writes some of a stream anew: of one of which nothing was recorded for a while, or, if the journal is much larger than
    /// what it tells of, of the one that holds the oldest segment.
    fn rewrite<'l>(&mut self, log_of: impl Fn(u64) -> Option<&'l Log>) {
        if self.journal.is_failing() || self.journal.backlog_bytes() > DURABLE_REWRITE_BACKLOG_BYTES_MAX {
            return;
        }
        let before = self.rewritten_bytes;
        while self.rewritten_bytes - before < DURABLE_REWRITE_BYTES_PER_TURN {
            if self.rewriting.is_some() {
                self.rewrite_piece(&log_of);
                continue;
            }
            if let Some(stream) = self.off.pop_front() {
                self.begin_rewriting(stream, log_of(stream));
                continue;
            }
            let enough = 2 * self.bytes + SEGMENTS_FREE * self.segment_bytes;
            match self.by_segment.first() {
                Some(&(segment, stream))
                    if self.journal.bytes() > enough && segment < self.journal.segment() =>
                {
                    self.begin_rewriting(stream, log_of(stream));
                }
                _ => return,
            }
        }
    }

    fn begin_rewriting(&mut self, stream: u64, log: Option<&Log>) {
        let Some(known) = self.streams.get_mut(&stream) else { return };
        let held = known.to - known.from;
        if let Some(log) = log.filter(|log| log.end() >= known.to) {
            let start = log.start().max(known.facts.begin);
            if std::mem::take(&mut known.off) {
                // From here on what comes is recorded again.
                (known.to, known.last_id) = (log.end(), log.last_event_id());
            }
            known.from = start.min(known.to);
        } else {
            (known.off, known.from) = (false, known.to);
        }
        self.bytes = self.bytes - held + (known.to - known.from);
        let (at, to, last_id) = (known.from, known.to, known.last_id);
        let told = RelayTold {
            earliest: at,
            end: known.end.map(|(end, unix_ms)| (end.name().into(), unix_ms)),
            response: known.response.clone(),
            ids: (last_id, last_id),
        };
        let (facts, closed) = (known.facts.clone(), known.end.is_some());
        self.rewritten_bytes += record::RECORD_HEADER_BYTES as u64;
        self.record(Kind::Snapshot, stream, to, closed, |out| {
            record::put_relay_facts(out, &facts);
            record::put_relay_told(out, &told, at);
        });
        let segment = self.journal.segment();
        if let Some(known) = self.streams.get_mut(&stream)
            && !self.by_segment.contains(&(known.segment, stream))
        {
            known.segment = segment;
            self.by_segment.insert((segment, stream));
        }
        self.rewriting = Some(Rewriting { stream, at, to, last_id, segment });
    }

    fn rewrite_piece<'l>(&mut self, log_of: impl Fn(u64) -> Option<&'l Log>) {
        let Some(current) = &mut self.rewriting else { return };
        let stream = current.stream;
        let Some(chunked) = self.streams.get(&stream).map(|known| known.facts.chunked) else {
            self.rewriting = None;
            return;
        };
        let log = log_of(stream).filter(|log| log.end() >= current.to);
        // What was let go meanwhile need not be written.
        let at = log.map_or(current.to, |log| current.at.max(log.start()));
        let range = log.filter(|_| at < current.to).and_then(|log| {
            let bytes = u32::try_from(current.to - at).unwrap_or(u32::MAX);
            Some((log.lend(at, bytes)?, log.id_at(at, chunked)?, log))
        });
        let Some((range, before, log)) = range else { return self.end_rewriting() };
        let to = at + range.len() as u64;
        let last = if to == current.to { Some(current.last_id) } else { log.id_at(to, chunked) };
        current.at = to;
        let told = RelayTold { ids: (before, last.unwrap_or(before)), ..RelayTold::default() };
        self.rewritten_bytes += range.len() as u64;
        self.record(Kind::Data, stream, to, false, |out| {
            record::put_relay_told(out, &told, at);
            out.extend(range.cells().iter().map(Cell::get));
        });
    }

    fn end_rewriting(&mut self) {
        let Some(Rewriting { stream, to, segment, .. }) = self.rewriting.take() else { return };
        self.record(Kind::Whole, stream, to, false, |_| {});
        // Those before are removed only when all that is recorded so far is synced.
        if let Some(known) = self.streams.get_mut(&stream) {
            self.by_segment.remove(&(known.segment, stream));
            known.segment = segment;
            self.by_segment.insert((segment, stream));
        }
    }
}

fn put_range(out: &mut Vec<u8>, log: &Log, mut from: u64, to: u64) {
    while from < to
        && let Some(lent) = log.lend(from, u32::try_from(to - from).unwrap_or(u32::MAX))
    {
        from += lent.len() as u64;
        out.extend(lent.cells().iter().map(Cell::get));
    }
}

/// A stream as its records have it; `None` where they contradict each other.
fn restore(image: Image, window_of: impl Fn(&RelayFacts) -> u64) -> Option<Restored> {
    let relay = image.relay?;
    let at = image.pieces.first_key_value().map_or(image.tail, |(at, _)| *at);
    let before = if image.pieces.is_empty() { relay.last_id } else { *relay.ids.get(&at)? };
    let mut log = Log::restored(at, relay.facts.begin, before, window_of(&relay.facts));
    for piece in image.pieces.values() {
        log.append(&[&piece.bytes]);
        let mut events = 0;
        each_block(&piece.bytes, relay.facts.chunked, log.next_event_id(), |_, _, id| {
            events += u64::from(id.is_some());
        });
        (0..events).for_each(|_| log.event_ends());
    }
    if log.end() != image.tail || log.last_event_id() != relay.last_id {
        return None;
    }
    let end = relay.end.map(|(name, unix_ms)| {
        let known = End::ALL.iter().copied().find(|end| *end.name() == *name);
        (known.unwrap_or(End::Interrupted), unix_ms)
    });
    Some(Restored { stream: image.created, facts: relay.facts, end, log, response: relay.response })
}

/// What the events of a log say, read once more.
#[derive(Debug, Default)]
pub struct Retold {
    /// The dialect's end mark is among them.
    pub end_mark: bool,
    /// The backend's own report of a failure is.
    pub error_seen: bool,
    /// The `sequence_number` of the last event that had one.
    pub sequence_number: Option<u64>,
    /// What is to be remembered of a response in background.
    pub notes: Option<Box<Notes>>,
}

impl Restored {
    /// Its dialect.
    pub fn dialect(&self) -> Dialect {
        let known = Dialect::ALL.into_iter().find(|dialect| *dialect.name() == *self.facts.dialect);
        known.unwrap_or(Dialect::Plain)
    }

    /// Reads its events once more.
    pub fn retell(&self) -> Retold {
        let (dialect, mut retold) = (self.dialect(), Retold::default());
        if self.facts.background {
            let mut notes = Notes::default();
            if let Some((id, first)) = self.response.clone() {
                notes.begun_as(id, first);
            }
            retold.notes = Some(Box::new(notes));
        }
        let mut from = self.log.start();
        while let Some(lent) = self.log.lend(from, u32::MAX) {
            let first_id = self.log.id_at(from, self.facts.chunked).map_or(1, |before| before + 1);
            each_block(&lent.to_vec(), self.facts.chunked, first_id, |(begin, end), block, id| {
                let mut rest = block;
                let mut decoder = Decoder::new(block.len());
                let (Some(id), Ok(Some(block))) = (id, decoder.next(&mut rest)) else { return };
                match dialect.meaning(&block) {
                    Meaning::Done => retold.end_mark = true,
                    Meaning::Error => retold.error_seen = true,
                    _ => {}
                }
                retold.sequence_number = dialect.sequence_number(&block).or(retold.sequence_number);
                if let Some(notes) = &mut retold.notes {
                    notes.take(&block, id, (from + begin as u64, from + end as u64));
                }
            });
            from += lent.len() as u64;
        }
        retold
    }
}

/// A relayed stream in a journal, for who looks at it from outside.
#[derive(Clone, Copy, Debug)]
pub struct RelayedFacts<'a>(&'a Image);

impl Recovered {
    /// The streams relayed from models, in the order of their numbers.
    pub fn relayed(&self) -> impl Iterator<Item = RelayedFacts<'_>> {
        let relayed = self.images.iter().filter(|image| image.relay.is_some() && image.created != COUNTER);
        relayed.map(RelayedFacts)
    }

    /// The number below which any may have been given to a relayed stream, as far as the journal knows.
    pub fn numbers_given(&self) -> u64 {
        let number = |image: &Image| match image.created {
            COUNTER => image.tail,
            stream => (stream & ((1 << 48) - 1)) + 1,
        };
        self.images.iter().filter(|image| image.relay.is_some()).map(number).max().unwrap_or(0)
    }
}

impl<'a> RelayedFacts<'a> {
    /// The shard that named it, and its number there.
    pub fn stream(&self) -> (u16, u64) {
        ((self.0.created >> 48) as u16, self.0.created & ((1 << 48) - 1))
    }

    /// What is known of it from its beginning on.
    pub fn facts(&self) -> &'a RelayFacts {
        static NONE: std::sync::LazyLock<RelayFacts> = std::sync::LazyLock::new(RelayFacts::default);
        self.0.relay.as_ref().map_or(&NONE, |relay| &relay.facts)
    }

    /// Why it ended, by its name, and when, ms since 1970.
    pub fn end(&self) -> Option<(&'a str, u64)> {
        let relay = self.0.relay.as_ref()?;
        relay.end.as_ref().map(|(end, unix_ms)| (&**end, *unix_ms))
    }

    /// Ids of the first and the last event held; the first is beyond the last when none is.
    pub fn ids(&self) -> (u64, u64) {
        let Some(relay) = self.0.relay.as_ref() else { return (1, 0) };
        let first = self.0.pieces.first_key_value().and_then(|(at, _)| relay.ids.get(at));
        (first.map_or(relay.last_id, |before| *before) + 1, relay.last_id)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.0.pieces.values().map(|piece| piece.bytes.len() as u64).sum()
    }

    /// Something of it was damaged.
    pub fn is_damaged(&self) -> bool {
        self.0.damaged
    }

    /// The first segment that it needs.
    pub fn segment(&self) -> u64 {
        self.0.segment
    }

    /// Its events as a reader would be sent them, without chunks.
    pub fn content(&self) -> Vec<u8> {
        let mut content = Vec::new();
        for piece in self.0.pieces.values() {
            match self.facts().chunked {
                true => each_block(&piece.bytes, true, 0, |_, block, _| content.extend_from_slice(block)),
                false => content.extend_from_slice(&piece.bytes),
            }
        }
        content
    }
}
