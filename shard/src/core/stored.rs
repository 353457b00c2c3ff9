//! Kept streams on disk: what a turn has appended to those of routes that say `durable` is recorded, and what the journal has
//! is delivered. After a restart they are found by their ids as before.
//!
//! ```text
//!   Stream ─► log ── store_stirred ──► journal ──► disk ──► follow_stored: shown ──► readers
//!                                        └─ it does not take it: shown without
//! ```
//! Where nothing may be delivered before it is synced, the client that asked is a reader from the start: what a reader may be
//! lent ends where what is shown does.

use super::background::notes_bytes;
use super::kept::{Source, is_forsaken, numbered};
use super::{Leaving, Shard, TimerOf};
use crate::io::Io;
use protocol::durable::journal::{Failure, Job, Recovered, RelayFacts};
use protocol::durable::relayed::{Followed, RelayJournal, Restored};
use protocol::http::{CHUNK_END, ChunkHead, LAST_CHUNK};
use protocol::limits::{RESUME_STREAM_COST_BYTES, STORED_WAIT_MS_MAX};
use protocol::phase::End;
use protocol::resume::NUMBER_MAX;
use protocol::slots::Key;
use protocol::wheel::TimerId;
use std::collections::VecDeque;
use std::sync::Arc;

/// What a shard has of its streams on disk.
pub(super) struct Stored {
    pub(super) journal: RelayJournal,
    /// Nothing is delivered before it is synced.
    gates: bool,
    unshown: VecDeque<Unshown>,
    /// Answers that wait for a record: streams were stopped.
    held: VecDeque<(u64, Key)>,
    timer: Option<(TimerId, u64)>,
    /// What became of the last job.
    pub(super) done: Option<Result<(), Failure>>,
    /// What there was at the start: streams, and damage.
    pub(super) recovered_streams: u64,
    pub(super) recovered_damage: u64,
}

/// Something that may be delivered when its record is acknowledged.
struct Unshown {
    record: u64,
    source: Key,
    /// Up to here in its log, and the id of the last event there.
    to: u64,
    last_event_id: u64,
    since_ms: u64,
}

impl<I: Io> Shard<I> {
    /// From now on kept streams of routes that say so are written to a journal, and those that it held are there. Numbers below
    /// `reserved` may be given. Before the first turn.
    pub fn open_stream_journal(&mut self, recovered: Recovered, salt: u32, reserved: u64) {
        let settings = Arc::clone(&self.settings);
        let damage = recovered.findings.iter().filter(|finding| finding.lost).count() as u64;
        let window_of = |facts: &RelayFacts| {
            let source = source_of(facts, &settings);
            self.resume_of_source(&source).map_or(1, |resume| resume.window_bytes)
        };
        let (journal, restored) = RelayJournal::new(
            recovered,
            settings.durable.segment_bytes,
            settings.durable.fsync_interval_ms,
            salt,
            reserved,
            window_of,
        );
        self.kept.stored = Some(Box::new(Stored {
            journal,
            gates: settings.durable.fsync_interval_ms == 0,
            unshown: VecDeque::new(),
            held: VecDeque::new(),
            timer: None,
            done: None,
            recovered_streams: restored.len() as u64,
            recovered_damage: damage,
        }));
        for restored in restored {
            self.restore_source(restored);
        }
        self.make_room();
        self.follow_stored_timer();
    }

    /// A stream of an earlier process is over, whether it was or not.
    fn restore_source(&mut self, mut restored: Restored) {
        let (now_ms, now_unix_ms) = (self.now_ms(), self.durable_now().unix_ms);
        let number = restored.stream;
        let mut source = source_of(&restored.facts, &self.settings);
        source.number = number;
        let resume = self.resume_of_source(&source);
        let retold = (restored.end.is_none() || source.background).then(|| restored.retell());
        let (end, ended_unix_ms) = restored.end.unwrap_or_else(|| {
            let retold = retold.as_ref();
            let end = match retold {
                Some(retold) if retold.end_mark => End::Done,
                Some(retold) if retold.error_seen => End::UpstreamError,
                _ => End::Interrupted,
            };
            let last = retold.and_then(|retold| retold.sequence_number);
            finish_log(&mut restored, end, last);
            (end, now_unix_ms)
        });
        let Some(stored) = &mut self.kept.stored else { return };
        let gone_ms = now_unix_ms.saturating_sub(ended_unix_ms);
        let left_ms = resume.map_or(0, |resume| u64::from(resume.keep_ms)).saturating_sub(gone_ms);
        if left_ms == 0 || is_forsaken(end) {
            return stored.journal.forget(number);
        }
        let mut notes = retold.and_then(|retold| retold.notes);
        let response = restored.response.as_ref().map(|(id, first)| (&**id, &**first));
        stored.journal.follow(number, &restored.log, Some((end, ended_unix_ms)), response);
        if end == End::StreamStopped {
            restored.log = protocol::log::Log::new();
        }
        restored.log.release(restored.log.end());
        notes = notes.filter(|notes| notes.id().is_some());
        let response = notes.as_ref().and_then(|notes| notes.id()).map(Box::<str>::from);
        let began_ms = now_ms.saturating_sub(now_unix_ms.saturating_sub(restored.facts.began_unix_ms));
        let source = Source {
            end: Some(end),
            charged: restored.log.memory_bytes() as u64
                + RESUME_STREAM_COST_BYTES
                + notes_bytes(notes.as_deref()),
            log: restored.log,
            stored: true,
            found_by_id: response.is_some(),
            notes,
            began_ms,
            ended_ms: now_ms.saturating_sub(gone_ms),
            ..source
        };
        let charged = source.charged;
        let Ok(key) = self.kept.sources.insert(source) else {
            return stored.journal.forget(number);
        };
        self.kept.bytes += charged;
        self.kept.by_number.insert(number, key);
        self.kept.over.push_back(key);
        if let Some(id) = response {
            self.kept.by_response.insert(id, key);
        }
        if let Some(source) = self.kept.sources.get_mut(key) {
            let due_ms = now_ms + left_ms;
            super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(key));
        }
    }

    // ---- recording

    /// From here on what is appended to a stream is recorded, if its route says so. A stream that answers before it has been
    /// asked in full is stored from then on.
    pub(super) fn begin_storing(&mut self, key: Key) {
        let Some(stored) = self.kept.stored.as_deref() else { return };
        let gates = stored.gates;
        let Some(stream) = self.streams.get(key) else { return };
        let Some(source_key) = stream.source.filter(|_| stream.request_done && stream.end.is_none()) else {
            return;
        };
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let durable = self.resume_of_source(source).is_some_and(|resume| resume.durable);
        if !durable || source.stored || source.tail.is_some() || self.leaving != Leaving::No {
            return;
        }
        let facts = RelayFacts {
            route: self.route(source.route).name.as_str().into(),
            dialect: source.dialect.name().into(),
            chunked: source.chunked,
            background: source.background,
            began_unix_ms: self.durable_now().unix_ms,
            begin: stream.response.begin(),
        };
        let (number, begin) = (source.number, facts.begin);
        if let Some(source) = self.kept.sources.get_mut(source_key) {
            source.stored = true;
            source.shown = if gates { begin } else { u64::MAX };
        }
        if let Some(stored) = &mut self.kept.stored {
            stored.journal.begin(number, facts);
        }
        if let Some(stream) = self.streams.get_mut(key) {
            stream.followed = true;
        }
        if gates {
            self.split(source_key);
        }
        self.kept.stir(source_key);
    }

    /// In every turn, before readers are served: what was appended is recorded.
    pub(super) fn store_stirred(&mut self) {
        if self.kept.stored.is_none() {
            return;
        }
        for nth in 0..self.kept.stirred.len() {
            let key = self.kept.stirred[nth];
            self.store(key);
        }
        if !self.kept.stirred.is_empty() {
            self.follow_stored_timer();
        }
    }

    /// Records what is new of a stream.
    pub(super) fn store(&mut self, key: Key) {
        let now = self.durable_now();
        let Some(source) = self.kept.sources.get(key).filter(|source| source.stored) else { return };
        let producer = source.producer.and_then(|producer| self.streams.get(producer));
        let Some(log) = producer.map(|stream| &stream.response).or(Some(&source.log)) else { return };
        let end = match producer {
            Some(stream) => stream.end.filter(|_| stream.produced),
            None => source.end,
        };
        let notes = producer.map_or(source.notes.as_deref(), |stream| stream.notes.as_deref());
        let response = notes.and_then(|notes| notes.first());
        let Some(stored) = &mut self.kept.stored else { return };
        let number = source.number;
        let followed = stored.journal.follow(number, log, end.map(|end| (end, now.unix_ms)), response);
        let to = if end.is_some() { u64::MAX } else { log.end() };
        let last_event_id = log.last_event_id();
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        match followed {
            Followed::Nothing => {}
            Followed::Recorded { record, at } if stored.gates => {
                if at < source.shown {
                    (source.shown, source.shown_event_id) = (at, None);
                }
                let since_ms = now.ms;
                stored.unshown.push_back(Unshown { record, source: key, to, last_event_id, since_ms });
            }
            Followed::Recorded { .. } => {}
            Followed::Off => source.shown = u64::MAX,
        }
    }

    /// A stream is not to be found after a restart.
    pub(super) fn store_no_more(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if let Some(stored) = self.kept.stored.as_mut().filter(|_| std::mem::take(&mut source.stored)) {
            source.shown = u64::MAX;
            stored.journal.forget(source.number);
            self.kept.stir(key);
        }
    }

    /// An answer that tells that a stream was stopped waits until that is recorded. False: it need not.
    pub(super) fn hold_stop(&mut self, key: Key, source: Key) -> bool {
        self.store(source);
        let Some(stored) = self.kept.stored.as_mut().filter(|stored| stored.gates) else { return false };
        let Some(last) = stored.unshown.iter().rev().find(|unshown| unshown.source == source) else {
            return false;
        };
        stored.held.push_back((last.record, key));
        true
    }

    // ---- the journal

    /// What is to be done with the files next.
    pub(super) fn next_stored_job(&mut self) -> Option<Job> {
        let now_ms = self.now_ms();
        let mut stored = self.kept.stored.take()?;
        let log_of = |stream: u64| {
            let source = self.kept.sources.get(*self.kept.by_number.get(&stream)?)?;
            self.source_log(source)
        };
        let job = stored.journal.next_job(log_of, now_ms);
        self.kept.stored = Some(stored);
        self.follow_stored_timer();
        job
    }

    /// In every turn: what may be delivered now.
    pub(super) fn follow_stored(&mut self) {
        let now_ms = self.now_ms();
        let Some(stored) = &mut self.kept.stored else { return };
        let Some(result) = stored.done.take() else { return };
        let was_failing = stored.journal.is_failing();
        stored.journal.job_done(result, now_ms);
        let failing = stored.journal.is_failing();
        if failing != was_failing {
            match stored.journal.state().failing {
                Some(reason) => log::error!("streams cannot be written, and go on without: {reason}"),
                None => log::info!("streams are written again"),
            }
        }
        let acknowledged = stored.journal.acknowledged();
        self.show(acknowledged, failing);
    }

    /// Delivers what is acknowledged; with `all`, the rest as well, which is not known to be on the disk.
    fn show(&mut self, acknowledged: u64, all: bool) {
        let mut stirred = Vec::new();
        let Some(stored) = &mut self.kept.stored else { return };
        while let Some(&Unshown { record, source: key, to, last_event_id, .. }) = stored.unshown.front()
            && (all || record <= acknowledged)
        {
            stored.unshown.pop_front();
            let Some(source) = self.kept.sources.get_mut(key) else { continue };
            if record > acknowledged {
                source.shown = u64::MAX;
                stored.journal.leave_off(source.number);
            } else if source.stored && source.shown != u64::MAX {
                (source.shown, source.shown_event_id) = (to, Some(last_event_id));
            }
            stirred.push(key);
        }
        let mut answers = Vec::new();
        while let Some(&(record, key)) = stored.held.front()
            && (all || record <= acknowledged)
        {
            stored.held.pop_front();
            answers.push(key);
        }
        for key in stirred {
            self.kept.stir(key);
        }
        for key in answers {
            self.answer_empty(key, 204, "");
        }
    }

    /// Arms the timer for what the journal does by the passing of time alone, and for when a silent disk is waited for no more.
    pub(super) fn follow_stored_timer(&mut self) {
        let Some(stored) = self.kept.stored.as_mut().filter(|_| self.leaving == Leaving::No) else { return };
        let waited = stored.unshown.front().map(|unshown| unshown.since_ms + STORED_WAIT_MS_MAX);
        let due_ms = [waited, stored.journal.next_job_ms()].into_iter().flatten().min().unwrap_or(u64::MAX);
        super::deadline::arm(&mut self.wheel, &mut stored.timer, due_ms, TimerOf::Stored);
    }

    /// For simulations: whether an answer waits for the journal.
    pub(super) fn is_held_stop(&self, key: Key) -> bool {
        self.kept.stored.as_ref().is_some_and(|stored| stored.held.iter().any(|(_, held)| *held == key))
    }

    /// For simulations: whether it is armed.
    pub(super) fn audit_stored(&self) -> usize {
        self.kept.stored.as_ref().map_or(0, |stored| usize::from(stored.timer.is_some()))
    }

    /// It has fired.
    pub(super) fn forget_stored_timer(&mut self) {
        if let Some(stored) = &mut self.kept.stored {
            stored.timer = None;
        }
    }

    /// Tokens do not wait for a disk that is silent.
    pub(super) fn stored_due(&mut self) {
        let now_ms = self.now_ms();
        let Some(stored) = &mut self.kept.stored else { return };
        let acknowledged = stored.journal.acknowledged();
        if stored.unshown.front().is_some_and(|unshown| unshown.since_ms + STORED_WAIT_MS_MAX <= now_ms) {
            log::error!("the disk is silent: streams go on without it");
            stored.journal.fall_silent();
            self.show(acknowledged, true);
        }
        self.follow_stored_timer();
    }

    /// The shard leaves.
    pub(super) fn drain_stored(&mut self) {
        if let Some(stored) = &mut self.kept.stored
            && let Some((timer, _)) = stored.timer.take()
        {
            self.wheel.remove(timer);
        }
    }
}

/// A source as the first process knew it; of a route that there is no more, that of all paths.
fn source_of(facts: &RelayFacts, settings: &crate::settings::Settings) -> Source {
    let last = settings.routes.len() - 1;
    let route = settings.routes.iter().position(|route| *route.name == *facts.route).unwrap_or(last);
    let known = protocol::dialect::Dialect::ALL.into_iter();
    let dialect = known.rev().find(|dialect| *dialect.name() == *facts.dialect);
    let dialect = dialect.unwrap_or(protocol::dialect::Dialect::Plain);
    let source = Source::new(numbered(0, NUMBER_MAX), None, route, dialect, facts.chunked, 0);
    Source { background: facts.background, ..source }
}

/// Ends the log of a stream that its server did not live to end.
fn finish_log(restored: &mut Restored, end: End, last_sequence_number: Option<u64>) {
    let chunked = restored.facts.chunked;
    if end == End::Interrupted {
        let mut error = Vec::new();
        let next = last_sequence_number.map(|last| last + 1);
        restored.dialect().write_error_event_numbered(&end.fault(), next, &mut error);
        match chunked {
            true => {
                restored.log.append(&[ChunkHead::new(error.len()).as_bytes(), &error, CHUNK_END]);
            }
            false => _ = restored.log.append(&[&error]),
        }
    }
    if chunked {
        restored.log.append(&[LAST_CHUNK]);
    }
}
