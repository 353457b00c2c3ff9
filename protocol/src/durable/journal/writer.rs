//! Writing a journal: what is to be written next, and what of it is on the disk.
//!
//! ```text
//!   kept (in memory until synced)                        pending
//!   ┌───────────────────────┬──────────────────────────┬─────────────┐
//!   │ written               │ being written, or failed │ not yet     │
//!   └───────────────────────┴──────────────────────────┴─────────────┘
//!   record synced + 1        written + 1                             last
//! ```
//! One job at a time. What comes meanwhile goes with the next, so that one sync serves all who wait (group commit). A write that
//! fails is done once more in the same place. After a sync that failed nobody knows what is on the disk, and the kernel does not
//! try again: all that is kept goes into a new segment.

use super::super::refusals;
use super::record::{self, Deed, Kind, Sealed, SegmentHead};
use super::recovery::Recovered;
use super::segment_name;
use crate::fault::Fault;
use crate::limits::{
    DURABLE_BACKLOG_BYTES_MAX, DURABLE_RETRY_MS, DURABLE_RETRY_MS_MAX, DURABLE_WRITE_BYTES_MAX,
};
use std::collections::{HashMap, VecDeque};

/// Something to be done with files of the directory; one at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Job {
    /// Write all of `bytes` at `at`, then sync the data if so asked. At 0 the file is made, or made empty, and its entry in the
    /// directory is synced with the next sync.
    Write {
        /// Of the segment.
        segment: u64,
        /// Offset in its file.
        at: u64,
        /// May be none.
        bytes: Vec<u8>,
        /// Only when this is done are they safe.
        sync: bool,
    },
    /// Remove a segment's file, then sync the directory.
    Remove {
        /// Of the segment.
        segment: u64,
    },
}

/// Where a job failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Before any sync was tried.
    Write,
    /// In a sync.
    Sync,
}

/// A job failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Where.
    pub stage: Stage,
    /// The system's words.
    pub reason: String,
}

/// How a journal stands.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct JournalState {
    /// Segment files.
    pub segments: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of records that are not synced.
    pub backlog_bytes: u64,
    /// Why nothing can be written at present.
    pub failing: Option<String>,
}

/// What a journal counts.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct JournalCounters {
    /// Records written.
    pub records: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Syncs.
    pub syncs: u64,
    /// Writes, syncs and removals that failed.
    pub failures: u64,
    /// Segments removed.
    pub removed: u64,
}

#[derive(Debug)]
struct Failing {
    reason: String,
    retry_ms: u64,
    pause_ms: u64,
}

#[derive(Debug)]
enum Running {
    Write { last: u64, kept: usize, bytes: u64, sync: bool },
    Remove { segment: u64 },
}

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    segment_bytes: u64,
    interval_ms: u64,
    salt: u32,
    /// The segment that is written, and how far.
    segment: u64,
    at: u64,
    /// Something of it was synced.
    segment_synced: bool,
    /// Its seal is among what is kept or pending.
    sealing: bool,
    /// The last record of each stream in it.
    touched: HashMap<u64, Sealed>,
    last: u64,
    last_deed: Deed,
    written: u64,
    synced: u64,
    kept: Vec<u8>,
    kept_written: usize,
    pending: Vec<u8>,
    running: Option<Running>,
    failing: Option<Failing>,
    sync_due_ms: Option<u64>,
    /// Segments, oldest first; those that wait for their removal are not among them.
    segments: VecDeque<(u64, u64)>,
    /// Segments to be removed once this record is synced.
    removals: VecDeque<(u64, u64)>,
    removal_after_ms: u64,
    /// A removal has its turn before the next write.
    remove_next: bool,
    counters: JournalCounters,
}

impl Journal {
    /// Goes on after what was recovered, in a new segment. `interval_ms` is the longest time between a write and its sync; 0
    /// syncs each.
    pub(in super::super) fn new(
        recovered: &Recovered,
        segment_bytes: u64,
        interval_ms: u64,
        salt: u32,
    ) -> Self {
        let last = recovered.last;
        Journal {
            segment_bytes,
            interval_ms,
            salt,
            segment: recovered.segments.last().map_or(1, |(number, _)| number + 1),
            at: 0,
            segment_synced: false,
            sealing: false,
            touched: HashMap::new(),
            last,
            last_deed: recovered.last_deed,
            written: last,
            synced: last,
            kept: Vec::new(),
            kept_written: 0,
            pending: Vec::new(),
            running: None,
            failing: None,
            sync_due_ms: None,
            segments: recovered.segments.iter().copied().collect(),
            removals: VecDeque::new(),
            removal_after_ms: 0,
            remove_next: false,
            counters: JournalCounters::default(),
        }
    }

    /// Adds a record; gives its number.
    pub(in super::super) fn record(&mut self, deed: Deed, payload: impl FnOnce(&mut Vec<u8>)) -> u64 {
        let number = self.last + 1;
        record::write(&mut self.pending, self.salt, deed, (number, self.synced), self.last_deed, payload);
        self.touched.insert(deed.stream, (number, deed));
        self.counters.records += 1;
        self.last = number;
        self.last_deed = deed;
        number
    }

    /// Adds a record without a number of its own.
    fn remark(&mut self, kind: Kind, payload: impl FnOnce(&mut Vec<u8>)) {
        let deed = Deed { kind, ..Deed::NONE };
        record::write(&mut self.pending, self.salt, deed, (self.last, self.synced), self.last_deed, payload);
    }

    /// The last record.
    pub(in super::super) fn last(&self) -> u64 {
        self.last
    }

    /// The record up to which everything may be acknowledged.
    pub(in super::super) fn acknowledged(&self) -> u64 {
        if self.interval_ms == 0 { self.synced } else { self.written.max(self.synced) }
    }

    /// The record up to which everything is synced.
    pub(in super::super) fn synced(&self) -> u64 {
        self.synced
    }

    /// The segment that the next record goes into, or one before that.
    pub(in super::super) fn segment(&self) -> u64 {
        self.segment
    }

    /// Bytes in segments.
    pub(in super::super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of records that are not synced.
    pub(in super::super) fn backlog_bytes(&self) -> u64 {
        (self.kept.len() + self.pending.len()) as u64
    }

    /// Why nothing new may be recorded at present.
    pub(in super::super) fn refusal(&self) -> Option<Fault> {
        match &self.failing {
            Some(_) => Some(refusals::JOURNAL_FAILED),
            None if self.backlog_bytes() > DURABLE_BACKLOG_BYTES_MAX => Some(refusals::JOURNAL_BEHIND),
            None => None,
        }
    }

    /// Whether the disk does not take what is written.
    pub(in super::super) fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    pub(in super::super) fn state(&self) -> JournalState {
        JournalState {
            segments: self.segments.len() + self.removals.len(),
            bytes: self.bytes(),
            backlog_bytes: self.backlog_bytes(),
            failing: self.failing.as_ref().map(|failing| failing.reason.clone()),
        }
    }

    pub(in super::super) fn counters(&self) -> JournalCounters {
        self.counters
    }

    /// Segments before this one are needed by no stream.
    pub(in super::super) fn release(&mut self, needed: u64) {
        while let Some(&(number, _)) = self.segments.front()
            && number < needed.min(self.segment)
        {
            self.segments.pop_front();
            self.removals.push_back((self.last, number));
        }
    }

    /// When [`Journal::next_job`] may have one by the passing of time alone, ms.
    pub(in super::super) fn due_ms(&self) -> Option<u64> {
        if self.running.is_some() {
            return None;
        }
        if let Some(failing) = &self.failing {
            return Some(failing.retry_ms);
        }
        let removal = self.removals.front().filter(|(number, _)| *number <= self.synced);
        let removal = removal.map(|_| self.removal_after_ms);
        [self.sync_due_ms, removal].into_iter().flatten().min()
    }

    /// What is to be done next. It is under way until [`Journal::complete`].
    pub(in super::super) fn next_job(&mut self, now_ms: u64) -> Option<Job> {
        if self.running.is_some() || self.failing.as_ref().is_some_and(|failing| now_ms < failing.retry_ms) {
            return None;
        }
        if let Some(&(number, segment)) = self.removals.front()
            && (self.remove_next || !self.has_writes(now_ms))
            && self.failing.is_none()
            && number <= self.synced
            && now_ms >= self.removal_after_ms
        {
            self.removals.pop_front();
            self.running = Some(Running::Remove { segment });
            return Some(Job::Remove { segment });
        }
        if !self.has_writes(now_ms) {
            return None;
        }
        let length = self.kept.len() - self.kept_written + self.pending.len();
        if !self.sealing && self.at + length as u64 >= self.segment_bytes {
            self.sealing = true;
            let touched = std::mem::take(&mut self.touched);
            self.remark(Kind::Seal, |out| record::put_seal(out, touched.values().copied()));
            self.touched = touched;
        }
        let mut bytes = Vec::new();
        if self.at == 0 {
            SegmentHead { number: self.segment, follows: self.synced, salt: self.salt }.write(&mut bytes);
        }
        self.kept.append(&mut self.pending);
        let kept = self.kept.len().min(self.kept_written + DURABLE_WRITE_BYTES_MAX);
        bytes.extend_from_slice(&self.kept[self.kept_written..kept]);
        // Of much, each piece but the last ends somewhere in a record, and promises nothing.
        let whole = kept == self.kept.len();
        let last = if whole { self.last } else { self.written };
        let due = self.sync_due_ms.is_some_and(|due_ms| due_ms <= now_ms);
        let much = self.kept.len() as u64 > DURABLE_BACKLOG_BYTES_MAX / 2;
        let wanted = self.sealing || self.last > self.synced && (self.interval_ms == 0 || due || much);
        let sync = whole && wanted;
        self.running = Some(Running::Write { last, kept, bytes: bytes.len() as u64, sync });
        Some(Job::Write { segment: self.segment, at: self.at, bytes, sync })
    }

    /// What was written is synced with the next job.
    pub(in super::super) fn hurry(&mut self, now_ms: u64) {
        if self.written > self.synced || self.last > self.synced {
            self.sync_due_ms = Some(now_ms);
        }
    }

    fn has_writes(&self, now_ms: u64) -> bool {
        !self.pending.is_empty()
            || self.kept_written < self.kept.len()
            || self.sync_due_ms.is_some_and(|due_ms| due_ms <= now_ms)
    }

    /// What became of the job.
    pub(in super::super) fn complete(&mut self, result: Result<(), Failure>, now_ms: u64) {
        match (self.running.take(), result) {
            (Some(Running::Write { last, kept, bytes, sync }), Ok(())) => {
                self.wrote(last, kept, bytes, now_ms);
                if sync {
                    self.synced_up_to(last, kept);
                }
            }
            (Some(Running::Write { .. }), Err(failure)) => {
                self.counters.failures += 1;
                let pause_ms = self.failing.take().map_or(DURABLE_RETRY_MS, |failing| failing.pause_ms * 2);
                let pause_ms = pause_ms.min(DURABLE_RETRY_MS_MAX);
                let reason = format!("{}: {}", segment_name(self.segment), failure.reason);
                self.failing = Some(Failing { reason, retry_ms: now_ms + pause_ms, pause_ms });
                if failure.stage == Stage::Sync {
                    self.leave_segment();
                }
            }
            (Some(Running::Remove { .. }), Ok(())) => {
                self.counters.removed += 1;
                self.remove_next = false;
            }
            (Some(Running::Remove { segment }), Err(_)) => {
                self.counters.failures += 1;
                self.removals.push_front((self.synced, segment));
                self.removal_after_ms = now_ms + DURABLE_RETRY_MS_MAX;
                self.remove_next = false;
            }
            (None, _) => {}
        }
    }

    fn wrote(&mut self, last: u64, kept: usize, bytes: u64, now_ms: u64) {
        self.failing = None;
        self.remove_next = true;
        self.counters.bytes += bytes;
        match self.segments.back_mut() {
            Some((number, so_far)) if *number == self.segment => *so_far = self.at + bytes,
            _ => self.segments.push_back((self.segment, self.at + bytes)),
        }
        self.at += bytes;
        self.kept_written = kept;
        self.written = self.written.max(last);
        if last > self.synced && self.sync_due_ms.is_none() {
            self.sync_due_ms = Some(now_ms + self.interval_ms);
        }
    }

    fn synced_up_to(&mut self, last: u64, kept: usize) {
        self.counters.syncs += 1;
        self.kept.drain(..kept);
        self.kept_written -= kept;
        self.synced = last;
        self.sync_due_ms = None;
        self.segment_synced = true;
        if self.kept.capacity() > DURABLE_BACKLOG_BYTES_MAX as usize / 8 {
            self.kept.shrink_to_fit();
        }
        if self.sealing {
            self.sealing = false;
            self.touched.clear();
            self.begin_segment();
        } else if self.pending.is_empty() {
            // So that whoever reads this next knows that it was synced.
            self.remark(Kind::Mark, |_| {});
        }
    }

    fn begin_segment(&mut self) {
        self.segment += 1;
        self.at = 0;
        self.segment_synced = false;
    }

    /// After a failed sync. What this segment holds of what is kept does not count any more: the next follows from before it.
    fn leave_segment(&mut self) {
        self.kept_written = 0;
        if !self.segment_synced {
            // Nothing in it counts.
            self.segments.retain(|(number, _)| *number != self.segment);
            self.removals.push_back((self.synced + 1, self.segment));
        }
        self.begin_segment();
    }
}
