//! How long messages are held. Where a stream ended is noted every quarter of that time while it holds any, in the journal too, so that
//! a restart makes no message younger.

use super::Now;
use super::store::{Id, Store};
use crate::limits::DURABLE_LOOKS_PER_TURN_MAX;
use std::collections::VecDeque;

/// Notes of one stream. There are five of one time to live; more only after that has been made shorter.
const MARKS_MAX: usize = 8;

/// Where a stream ended, oldest first: position, ms since 1970.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Marks(VecDeque<(u64, u64)>);

impl Marks {
    /// As a journal has them.
    pub(super) fn restored(marks: &[(u64, u64)]) -> Self {
        let mut restored = Marks::default();
        for &(position, unix_ms) in marks.iter().take(MARKS_MAX) {
            restored.note(position, unix_ms);
        }
        restored
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (u64, u64)> {
        self.0.iter().copied()
    }

    fn note(&mut self, position: u64, unix_ms: u64) {
        if self.0.len() == MARKS_MAX {
            // What was noted before is taken for younger than it is.
            self.0.pop_front();
        }
        self.0.push_back((position, unix_ms));
    }

    /// The position below which everything was there at that time.
    fn take_before(&mut self, unix_ms: u64) -> u64 {
        let mut below = 0;
        while let Some(&(position, at_ms)) = self.0.front()
            && at_ms <= unix_ms
        {
            below = position;
            self.0.pop_front();
        }
        below
    }

    /// When there is something to do again, ms since 1970.
    fn due_unix_ms(&self, retention_ms: u64) -> u64 {
        let (first, last) = (self.0.front(), self.0.back());
        let old = first.map_or(u64::MAX, |(_, at_ms)| at_ms.saturating_add(retention_ms));
        old.min(last.map_or(u64::MAX, |(_, at_ms)| at_ms.saturating_add(step_ms(retention_ms))))
    }
}

fn step_ms(retention_ms: u64) -> u64 {
    retention_ms.div_ceil(4)
}

impl Store {
    /// Sees to it that a stream that holds messages is looked at.
    pub(super) fn watch_age(&mut self, id: Id, now: Now) {
        let retention_ms = self.settings.retention_ms;
        let Some(stream) = self.streams.get_mut(id) else { return };
        if retention_ms == 0 || stream.queued_look_ms.is_some() || !stream.holds_data() {
            return;
        }
        let first_unix_ms = now.unix_ms + step_ms(retention_ms);
        let due_unix_ms = stream.marks.due_unix_ms(retention_ms).min(first_unix_ms);
        let due_ms = now.ms + due_unix_ms.saturating_sub(now.unix_ms);
        stream.queued_look_ms = Some(due_ms);
        self.looks.insert((due_ms, id));
    }

    /// Drops what is too old of the streams that are due, of some hundred of them.
    pub(super) fn drop_old(&mut self, now: Now) {
        for _ in 0..DURABLE_LOOKS_PER_TURN_MAX {
            let Some(&(due_ms, id)) = self.looks.first() else { return };
            if due_ms > now.ms {
                return;
            }
            self.looks.pop_first();
            self.look(id, now);
        }
    }

    fn look(&mut self, id: Id, now: Now) {
        let retention_ms = self.settings.retention_ms;
        // A disk that takes nothing is not given more.
        let later = self.refuses_changes();
        let Some(stream) = self.streams.get_mut(id) else { return };
        stream.queued_look_ms = None;
        if later {
            let due_ms = now.ms + step_ms(retention_ms);
            stream.queued_look_ms = Some(due_ms);
            self.looks.insert((due_ms, id));
            return;
        }
        let last = stream.marks.0.back().map_or(0, |(_, at_ms)| *at_ms);
        let noted = now.unix_ms.saturating_sub(last) >= step_ms(retention_ms);
        if noted {
            stream.marks.note(stream.tail(), now.unix_ms);
        }
        let below = stream.marks.take_before(now.unix_ms.saturating_sub(retention_ms));
        let earliest = stream.earliest;
        let dropped = stream.trim_below(below.min(stream.shown_tail()));
        self.counters.trimmed_bytes += stream.earliest - earliest;
        if dropped {
            self.recount(id);
        }
        if dropped || noted {
            self.record_trim(id);
        }
        self.watch_age(id, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_longest_ago_goes_first() {
        let mut marks = Marks::restored(&[(10, 1_000), (20, 2_000)]);
        marks.note(30, 3_000);
        assert_eq!(marks.due_unix_ms(10_000), 5_500, "a note is due first");
        assert_eq!(marks.due_unix_ms(1_500), 2_500);
        assert_eq!((marks.take_before(999), marks.take_before(2_500), marks.take_before(2_500)), (0, 20, 0));
        assert_eq!(marks.iter().collect::<Vec<_>>(), [(30, 3_000)]);
        (0..100).for_each(|nth| marks.note(nth, nth));
        assert_eq!(marks.iter().len(), MARKS_MAX);
        assert_eq!(Marks::default().due_unix_ms(1_000), u64::MAX);
    }
}
