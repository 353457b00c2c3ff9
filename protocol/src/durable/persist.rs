//! The store and its journal: what is recorded, what may be shown, what is written anew so that old segments can go, and how a
//! store begins with what a journal holds.
//!
//! A change is made in memory and recorded at once; its answer waits until its record is acknowledged, and readers are shown it
//! no earlier. So a crash takes nothing back that anybody was told.

use super::journal::record::{self, CLOSED, Deed, KEPT, Kind, RECORD_HEADER_BYTES};
use super::journal::{Failure, Image, Job, Journal, JournalCounters, JournalState, Recovered};
use super::request::Append;
use super::store::{Id, Store};
use super::stream::{Hidden, Stream};
use super::{Form, Now, Settings};
use crate::limits::{DURABLE_REWRITE_BACKLOG_BYTES_MAX, DURABLE_REWRITE_BYTES_PER_TURN};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};

/// Bytes of messages put into one record of a snapshot, unless a single one is longer.
const PIECE_BYTES: u64 = 64 << 10;
/// Segments kept before anything is written anew.
const SEGMENTS_FREE: u64 = 4;

/// Streams that are written anew.
#[derive(Debug, Default)]
pub(super) struct Rewriting {
    current: Option<Current>,
    /// Bytes so far.
    pub(super) bytes: u64,
}

#[derive(Debug)]
struct Current {
    id: Id,
    at: u64,
    end: u64,
    segment: u64,
}

impl Store {
    /// The streams that a journal held, and from now on every change is recorded. `salt` is any number, which must be secret.
    pub fn with_journal(settings: Settings, recovered: Recovered, salt: u32, now: Now) -> Self {
        let interval_ms = u64::from(settings.fsync_interval_ms);
        let journal = Journal::new(&recovered, settings.segment_bytes, interval_ms, salt);
        let mut store = Store::new(settings);
        store.journal = Some(journal);
        store.created = recovered.created;
        let mut ids = HashMap::new();
        let mut damaged = Vec::new();
        // A source was created before its forks.
        for image in recovered.images {
            let (created, is_damaged) = (image.created, image.damaged);
            if let Some(id) = store.restore(image, &ids, now) {
                ids.insert(created, id);
                damaged.extend(is_damaged.then_some(id));
            }
        }
        // What was concluded from damage does not depend on its being found again.
        for id in damaged {
            store.write_anew(id);
            if let Some(stream) = store.streams.get(id).filter(|stream| stream.deleted) {
                let kept = stream.forks > 0;
                store.record_delete(id, kept);
                if !kept {
                    store.remove(id);
                }
            }
        }
        store.give_up_for(0, None);
        store
    }

    /// Records that a stream is no more that is not among those of the store.
    pub(super) fn forget(&mut self, created: u64) {
        self.record(Deed { kind: Kind::Delete, flags: 0, stream: created, end: 0 }, |_| {});
    }

    /// Writes a stream anew as it is, all of it.
    fn write_anew(&mut self, id: Id) {
        self.begin_rewriting(id);
        while self.rewriting.current.is_some() {
            self.rewrite_piece();
        }
    }

    fn restore(&mut self, image: Image, ids: &HashMap<u64, Id>, now: Now) -> Option<Id> {
        let source = ids.get(&image.facts.source).copied();
        let path = image.facts.path.clone();
        let (segment, deleted, created) = (image.segment, image.deleted, image.created);
        let nameless = image.nameless;
        // Only after damage: the end of the older one was lost.
        if !deleted
            && !nameless
            && let Some(&older) = self.by_path.get(&path)
        {
            self.delete_or_keep(older);
        }
        let Ok(id) = self.streams.insert(Stream::restored(image, source, now)) else {
            self.counters.evictions += 1;
            self.forget(created);
            return None;
        };
        if !nameless && (!deleted || !self.by_path.contains_key(&path)) {
            self.by_path.insert(path, id);
        }
        self.hold_source(source, true);
        if let Some(stream) = self.streams.get_mut(id) {
            stream.segment = segment;
            let due_ms = stream.due_ms();
            self.by_segment.insert((segment, id));
            if due_ms != u64::MAX && !deleted {
                self.queue_due(id, due_ms);
            }
        }
        self.watch_age(id, now);
        self.used(id, now);
        self.recount(id);
        Some(id)
    }

    // ---- recording

    fn record(&mut self, deed: Deed, payload: impl FnOnce(&mut Vec<u8>)) -> Option<u64> {
        Some(self.journal.as_mut()?.record(deed, payload))
    }

    /// What a record of this kind says of a stream as it is now.
    fn deed(&self, kind: Kind, id: Id) -> Option<Deed> {
        let stream = self.streams.get(id)?;
        let flags = if stream.closed { CLOSED } else { 0 } | if stream.deleted { KEPT } else { 0 };
        Some(Deed { kind, flags, stream: stream.created, end: stream.tail() })
    }

    /// A stream was created, with these messages.
    pub(super) fn record_create(&mut self, id: Id, messages: &[&[u8]]) {
        let (Some(deed), Some(stream)) = (self.deed(Kind::Create, id), self.streams.get(id)) else { return };
        let Some(journal) = &mut self.journal else { return };
        let source =
            stream.source.and_then(|source| self.streams.get(source)).map_or(0, |source| source.created);
        let (facts, form, base) = (stream.facts(source), stream.form, stream.base);
        let number = journal.record(deed, |out| {
            record::put_facts(out, &facts);
            put_messages(out, form, base, messages);
        });
        let segment = journal.segment();
        self.by_segment.insert((segment, id));
        if let Some(stream) = self.streams.get_mut(id) {
            stream.segment = segment;
            stream.hidden = Some(Hidden { until: number, tail: base, closed: false, unborn: true });
        }
        self.unshown.push_back((number, id, deed.end, deed.flags & CLOSED != 0));
    }

    /// Messages were appended from `at` on.
    pub(super) fn record_append(&mut self, id: Id, append: &Append, at: u64, messages: &[&[u8]]) {
        let (Some(deed), Some(stream)) = (self.deed(Kind::Append, id), self.streams.get_mut(id)) else {
            return;
        };
        let Some(journal) = &mut self.journal else { return };
        let (earliest, form) = (stream.earliest, stream.form);
        let number = journal.record(deed, |out| {
            record::put_appended(out, earliest, append.producer.as_ref(), append.sequence.as_deref());
            put_messages(out, form, at, messages);
        });
        let shown = Hidden { until: number, tail: at, closed: false, unborn: false };
        stream.hidden = Some(Hidden { until: number, ..stream.hidden.unwrap_or(shown) });
        self.unshown.push_back((number, id, deed.end, stream.closed));
    }

    /// Its oldest messages were dropped, or how old they are was noted.
    pub(super) fn record_trim(&mut self, id: Id) {
        let (Some(deed), Some(stream)) = (self.deed(Kind::Trim, id), self.streams.get(id)) else { return };
        if let Some(journal) = &mut self.journal {
            journal.record(deed, |out| record::put_trimmed(out, stream.earliest, stream.marks.iter()));
        }
    }

    /// It ends; `kept` for its forks.
    pub(super) fn record_delete(&mut self, id: Id, kept: bool) {
        if let Some(deed) = self.deed(Kind::Delete, id) {
            self.record(
                Deed { flags: if kept { deed.flags | KEPT } else { deed.flags & !KEPT }, ..deed },
                |_| {},
            );
        }
    }

    // ---- what is done, and what may be shown

    /// The record whose acknowledgement an answer given now has to wait for, if it tells of a change. `None`: none.
    pub fn must_wait(&self) -> Option<u64> {
        let journal = self.journal.as_ref()?;
        (journal.acknowledged() < journal.last()).then(|| journal.last())
    }

    /// The record up to which answers may be given.
    pub fn acknowledged(&self) -> u64 {
        self.journal.as_ref().map_or(u64::MAX, Journal::acknowledged)
    }

    /// Whether a change would be refused for the disk's sake.
    pub fn refuses_changes(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.refusal().is_some())
    }

    /// Whether the disk does not take what is written.
    pub fn is_failing(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::is_failing)
    }

    /// Whether everything recorded is on the disk.
    pub fn is_synced(&self) -> bool {
        self.journal.as_ref().is_none_or(|journal| journal.synced() == journal.last())
    }

    /// How the journal stands; `None`: there is none.
    pub fn journal_state(&self) -> Option<JournalState> {
        self.journal.as_ref().map(Journal::state)
    }

    /// What the journal has counted, and bytes of streams written anew.
    pub fn journal_counters(&self) -> (JournalCounters, u64) {
        (self.journal.as_ref().map(Journal::counters).unwrap_or_default(), self.rewriting.bytes)
    }

    /// When [`Store::next_job`] may have one by the passing of time alone, ms.
    pub fn next_job_ms(&self) -> Option<u64> {
        self.journal.as_ref()?.due_ms()
    }

    /// What is to be done with the files next. One job at a time: it is under way until [`Store::job_done`].
    pub fn next_job(&mut self, now_ms: u64) -> Option<Job> {
        self.journal.as_ref()?;
        self.rewrite();
        self.journal.as_mut()?.next_job(now_ms)
    }

    /// The same for the end of the process: everything recorded is synced now, whatever the interval.
    pub fn last_job(&mut self, now_ms: u64) -> Option<Job> {
        let journal = self.journal.as_mut()?;
        journal.hurry(now_ms);
        journal.next_job(now_ms)
    }

    /// What became of the job.
    pub fn job_done(&mut self, result: Result<(), Failure>, now_ms: u64) {
        let Some(journal) = &mut self.journal else { return };
        journal.complete(result, now_ms);
        let acknowledged = journal.acknowledged();
        while let Some(&(number, id, tail, closed)) = self.unshown.front()
            && number <= acknowledged
        {
            self.unshown.pop_front();
            let Some(stream) = self.streams.get_mut(id) else { continue };
            stream.hidden = stream.hidden.filter(|hidden| hidden.until > number).map(|hidden| Hidden {
                tail,
                closed,
                unborn: false,
                ..hidden
            });
            self.tell(id);
        }
        let synced = self.synced();
        while self.vacated.front().is_some_and(|(record, _)| *record <= synced) {
            self.vacated.pop_front();
        }
        if !self.keeps_segments {
            self.release_segments();
        }
    }

    /// Segments that no stream needs may go.
    pub(super) fn release_segments(&mut self) {
        let needed = self.by_segment.first().map_or(u64::MAX, |(segment, _)| *segment);
        if let Some(journal) = &mut self.journal {
            journal.release(needed);
        }
    }

    // ---- writing anew

    /// Writes some of the stream that holds the oldest segment anew, if the journal is much larger than what it tells of.
    fn rewrite(&mut self) {
        let Some(journal) = &self.journal else { return };
        if journal.is_failing() || journal.backlog_bytes() > DURABLE_REWRITE_BACKLOG_BYTES_MAX {
            return;
        }
        let before = self.rewriting.bytes;
        while self.rewriting.bytes - before < DURABLE_REWRITE_BYTES_PER_TURN {
            if self.rewriting.current.is_some() {
                self.rewrite_piece();
                continue;
            }
            let Some(journal) = &self.journal else { return };
            let enough = 2 * self.bytes + SEGMENTS_FREE * self.settings.segment_bytes;
            match self.by_segment.first() {
                Some(&(segment, id)) if journal.bytes() > enough && segment < journal.segment() => {
                    self.begin_rewriting(id);
                }
                _ => return,
            }
        }
    }

    fn begin_rewriting(&mut self, id: Id) {
        let (Some(deed), Some(stream)) = (self.deed(Kind::Snapshot, id), self.streams.get(id)) else {
            return;
        };
        let source =
            stream.source.and_then(|source| self.streams.get(source)).map_or(0, |source| source.created);
        let (facts, at) = (stream.facts(source), stream.earliest);
        let Some(journal) = &mut self.journal else { return };
        journal.record(deed, |out| {
            let start = out.len();
            record::put_facts(out, &facts);
            self.rewriting.bytes += (RECORD_HEADER_BYTES + out.len() - start) as u64;
        });
        let segment = journal.segment();
        self.rewriting.current = Some(Current { id, at, end: deed.end, segment });
    }

    fn rewrite_piece(&mut self) {
        let Some(current) = &mut self.rewriting.current else { return };
        let id = current.id;
        let Some(stream) = self.streams.get(id) else {
            self.rewriting.current = None;
            return;
        };
        // What was dropped meanwhile need not be written.
        let at = current.at.max(stream.earliest);
        let mut lengths = Vec::new();
        let mut end = at;
        for next in stream.ends_behind(at).take_while(|end| *end <= current.end) {
            if end > at && next - at > PIECE_BYTES {
                break;
            }
            lengths.push(usize::try_from(next - end).unwrap_or(0));
            end = next;
        }
        current.at = end;
        let segment = current.segment;
        if lengths.is_empty() {
            self.rewriting.current = None;
            if let Some(deed) = self.deed(Kind::Whole, id) {
                self.record(deed, |_| {});
            }
            if self.streams.get(id).is_some_and(|stream| stream.marks.iter().len() > 0) {
                // The segments that are to go may hold the record that says how old its messages are.
                self.record_trim(id);
            }
            // Those before are removed only when all that is recorded so far is synced.
            if let Some(stream) = self.streams.get_mut(id) {
                self.by_segment.remove(&(stream.segment, id));
                stream.segment = segment;
                self.by_segment.insert((segment, id));
            }
            return;
        }
        let mut pieces = Vec::new();
        let mut from = at;
        while from < end
            && let Some(lent) = stream.lend(from, end)
        {
            from += lent.len() as u64;
            pieces.push(lent);
        }
        self.rewriting.bytes += end - at;
        if let Some(deed) = self.deed(Kind::Data, id) {
            self.record(deed, |out| {
                record::put_messages(out, at, lengths.iter().copied(), std::iter::empty());
                for piece in &pieces {
                    out.extend(piece.cells().iter().map(Cell::get));
                }
            });
        }
    }
}

/// Writes the streams anew that have these numbers.
pub(super) fn write_anew_all(store: &mut Store, created: &[u64]) {
    let created: HashSet<u64> = created.iter().copied().collect();
    let of = store.streams.iter().filter(|(_, stream)| created.contains(&stream.created));
    let mut ids: Vec<(u64, Id)> = of.map(|(id, stream)| (stream.created, id)).collect();
    // A source is known before its forks.
    ids.sort_unstable();
    for (_, id) in ids {
        store.write_anew(id);
    }
}

/// Messages as a stream of that form holds them.
fn put_messages(out: &mut Vec<u8>, form: Form, at: u64, messages: &[&[u8]]) {
    let comma: &[u8] = if form == Form::Json { b"," } else { b"" };
    let lengths = messages.iter().map(|message| message.len() + comma.len());
    record::put_messages(out, at, lengths, messages.iter().flat_map(|message| [*message, comma]));
}
