//! Jobs of the journals handed to whoever runs the shard; of that of durable streams, the answers that wait for them.
//!
//! ```text
//!   Collecting ──(changed, and recorded)──► Held ──(acknowledged)──► Answered
//!                                             └───(the disk fails)──► Answered, 503
//! ```

use super::durable::State;
use super::{Leaving, Shard};
use crate::io::Io;
use protocol::durable::journal::{Failure, Job, Recovered};
use protocol::durable::{Answer, Reply, Store, UNCERTAIN};
use protocol::slots::Key;

/// Which of a shard's journals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JournalOf {
    /// That of durable streams.
    Durable,
    /// That of streams relayed from models.
    Relayed,
}

impl JournalOf {
    /// Both.
    pub const ALL: [JournalOf; 2] = [JournalOf::Durable, JournalOf::Relayed];
}

impl<I: Io> Shard<I> {
    /// From now on durable streams are those that a journal held, and every change of them is recorded. Before the first turn.
    pub fn open_journal(&mut self, recovered: Recovered, salt: u32) {
        let now = self.durable_now();
        let settings = self.settings.durable.clone();
        self.durable.recovered_streams = recovered.streams().count() as u64;
        self.durable.recovered_damage =
            recovered.findings.iter().filter(|finding| finding.lost).count() as u64;
        self.durable.store = Store::with_journal(settings, recovered, salt, now);
        if let Some(neighbours) = &self.neighbours {
            self.durable.store.be_placed(neighbours.own(), neighbours.shards());
        }
        self.follow_durable_timer();
    }

    /// What is to be done with a journal's files next, one at a time; asked after every turn while none is under way.
    pub fn next_job(&mut self, of: JournalOf) -> Option<Job> {
        if of == JournalOf::Relayed {
            return self.next_stored_job();
        }
        let now_ms = self.now_ms();
        let job = self.durable.store.next_job(now_ms);
        if job.is_none() {
            self.follow_durable_timer();
        }
        job
    }

    /// What became of the job. It is taken in with the next turn, which does not sleep.
    pub fn job_done(&mut self, of: JournalOf, result: Result<(), Failure>) {
        match (of, &mut self.kept.stored) {
            (JournalOf::Durable, _) => self.durable.done = Some(result),
            (JournalOf::Relayed, Some(stored)) => stored.done = Some(result),
            (JournalOf::Relayed, None) => {}
        }
    }

    /// Everything recorded is to be synced now, whatever the interval: the process ends.
    pub fn last_job(&mut self, of: JournalOf) -> Option<Job> {
        let now_ms = self.now_ms();
        match of {
            JournalOf::Durable => self.durable.store.last_job(now_ms),
            JournalOf::Relayed => self.kept.stored.as_mut()?.journal.last_job(now_ms),
        }
    }

    /// What became of it.
    pub fn last_job_done(&mut self, of: JournalOf, result: Result<(), Failure>) {
        let now_ms = self.now_ms();
        match (of, &mut self.kept.stored) {
            (JournalOf::Durable, _) => self.durable.store.job_done(result, now_ms),
            (JournalOf::Relayed, Some(stored)) => stored.journal.job_done(result, now_ms),
            (JournalOf::Relayed, None) => {}
        }
    }

    /// An answer that tells of a change waits until that is acknowledged.
    pub(super) fn hold_answer(&mut self, key: Key, answer: Answer, record: u64) {
        let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) else {
            return;
        };
        durable.state = State::Held(Box::new(answer));
        self.durable.held.push_back((record, key));
        self.follow_stream_timer(key);
    }

    /// In every turn: who may be answered now.
    pub(super) fn follow_journal(&mut self) {
        let Some(result) = self.durable.done.take() else { return };
        let was_failing = self.durable.store.is_failing();
        let now_ms = self.now_ms();
        self.durable.store.job_done(result, now_ms);
        let failing = self.durable.store.is_failing();
        if failing != was_failing {
            let state = self.durable.store.journal_state().unwrap_or_default();
            match state.failing {
                Some(reason) => log::error!("durable streams cannot be written: {reason}"),
                None => log::info!("durable streams are written again"),
            }
        }
        let acknowledged = self.durable.store.acknowledged();
        while let Some(&(record, key)) = self.durable.held.front()
            && (record <= acknowledged || failing)
        {
            self.durable.held.pop_front();
            self.give_held(key, record <= acknowledged);
        }
        self.wake_durable();
        if self.leaving == Leaving::No {
            self.follow_durable_timer();
        }
    }

    /// Answers who waits: what was promised is so, or it could not be.
    pub(super) fn give_held(&mut self, key: Key, acknowledged: bool) {
        let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) else {
            return;
        };
        if !matches!(durable.state, State::Held(_)) {
            return;
        }
        let State::Held(answer) = std::mem::replace(&mut durable.state, State::Answered) else { return };
        let answer = if acknowledged { *answer } else { self.durable.store.refuse(&UNCERTAIN) };
        self.durable_reply(key, Reply::Answer(answer));
    }
}
