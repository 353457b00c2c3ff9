//! Limits in time of streams that can be read by their ids: what is older than the window is let go, and who is further behind than a
//! reader may be is as one whom the window has left behind. Nothing is noted with events: now and then one timer has a look at every
//! stream, some in a turn.

use super::kept::Source;
use super::{Shard, TimerOf};
use crate::io::Io;
use crate::settings::Settings;
use protocol::ages::Ages;
use protocol::limits::AGED_PER_TURN_MAX;
use protocol::slots::Key;

/// What is known of the age of a stream's log.
#[derive(Debug, Default)]
pub(super) struct SourceAges {
    window: Ages,
    readers: Ages,
}

/// The round over all streams.
pub(super) struct Round {
    /// Between the beginnings of two rounds, ms; 0: no route has limits in time.
    step_ms: u32,
    /// The slot that is looked at next.
    slot: u32,
    began_ms: u64,
    pub(super) timer: Option<protocol::wheel::TimerId>,
}

impl Round {
    pub(super) fn new(settings: &Settings) -> Self {
        let resumes = settings.routes.iter().filter_map(|route| route.resume);
        let limits = resumes.flat_map(|resume| [resume.window_ms, resume.reader_lag_ms]);
        let step_ms = limits.filter(|&limit_ms| limit_ms > 0).map(Ages::step_ms).min().unwrap_or(0);
        Round { step_ms, slot: 0, began_ms: 0, timer: None }
    }
}

impl<I: Io> Shard<I> {
    /// Sees to it that the streams there are will be looked at.
    pub(super) fn follow_ages(&mut self) {
        let (now_ms, round) = (self.now_ms(), &mut self.kept.ages);
        if round.step_ms > 0 && round.timer.is_none() && !self.kept.sources.is_empty() {
            let due_ms = match round.slot {
                0 => (round.began_ms + u64::from(round.step_ms)).max(now_ms + 1),
                // The rest of a round.
                _ => now_ms + 1,
            };
            round.timer = Some(self.wheel.insert(due_ms, TimerOf::Ages));
        }
    }

    /// Without a stream there is nothing to wake up for.
    pub(super) fn rest_ages(&mut self) {
        if self.kept.sources.is_empty()
            && let Some(timer) = self.kept.ages.timer.take()
        {
            self.wheel.remove(timer);
        }
    }

    pub(super) fn ages_due(&mut self) {
        let now_ms = self.now_ms();
        let round = &mut self.kept.ages;
        if round.slot == 0 {
            round.began_ms = now_ms;
        }
        let from = round.slot;
        let to = self.kept.sources.slots().min(from.saturating_add(AGED_PER_TURN_MAX));
        round.slot = if to == self.kept.sources.slots() { 0 } else { to };
        for slot in from..to {
            if let Some((key, _)) = self.kept.sources.at(slot) {
                self.look_at_ages(key, now_ms);
            }
        }
        self.follow_ages();
    }

    fn look_at_ages(&mut self, key: Key, now_ms: u64) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        let Some(resume) = self.settings.routes[source.route].resume else { return };
        if source.is_mirror() && source.end.is_none() && source.tail.is_none() {
            // What it holds, and how far its readers may be behind, is as at its home.
            let (end, background) = (source.log.end(), source.background);
            let ages = source.ages.get_or_insert_default();
            if resume.window_ms > 0
                && !background
                && let Some(old) = ages.window.look(end, resume.window_ms, now_ms)
            {
                source.log.forget(source.log.floor().saturating_sub(old));
            }
            if resume.reader_lag_ms > 0
                && let Some(old) = ages.readers.look(end, resume.reader_lag_ms, now_ms)
            {
                source.stale_below = old;
            }
            return self.kept.stir(key);
        }
        let (Some(producer), None) = (source.producer, &source.tail) else { return };
        let Some(stream) = self.streams.get_mut(producer) else { return };
        let end = stream.response.end();
        // A response in background has a window of its own, which ends with the response.
        let window_ms = if source.background { 0 } else { resume.window_ms };
        if window_ms == 0 && resume.reader_lag_ms == 0 {
            return;
        }
        let ages = source.ages.get_or_insert_default();
        if window_ms > 0
            && let Some(old) = ages.window.look(end, window_ms, now_ms)
        {
            let before = stream.response.history_bytes();
            stream.response.forget(stream.response.floor().saturating_sub(old));
            self.stats.counters.kept_aged_bytes += before - stream.response.history_bytes();
        }
        if resume.reader_lag_ms > 0
            && let Some(old) = ages.readers.look(end, resume.reader_lag_ms, now_ms)
        {
            source.stale_below = old;
        }
        // What is held counts as less now, and a backend whose readers are behind is paused.
        self.follow_marks(producer);
    }

    /// Whether what is too old for readers of a stream under way is so for one that has been one since `began_ms`.
    pub(super) fn is_too_late(&self, key: Key, source: &Source, began_ms: u64) -> bool {
        let lag_ms = self.resume_of(source.route).map_or(0, |resume| resume.reader_lag_ms);
        // One that began with what was old already has the same time as any.
        let had_time = self.now_ms() >= began_ms + u64::from(lag_ms);
        had_time && source.end.is_none() && !self.is_held_up(key)
    }
}
