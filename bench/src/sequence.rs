//! Judges the events of one stream: none lost, none doubled, none out of order, none of another stream.

use std::ops::AddAssign;

/// What was wrong with a stream, or with many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Owed events that never came.
    pub lost: u64,
    /// Events that came again.
    pub doubled: u64,
    /// Events that came after a later one.
    pub reordered: u64,
    /// Events of another stream.
    pub foreign: u64,
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.reordered += other.reordered;
        self.foreign += other.foreign;
    }
}

/// The sequence numbers of one stream, as they arrive.
///
/// Inequality: every number in `missing` is below `next`.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    stream: u64,
    /// One below the next number that is due.
    last: u64,
    missing: Vec<u64>,
    faults: Faults,
}

/// Numbers remembered as missing per stream; beyond it a late event counts as doubled, and the run has failed anyway.
const MISSING_MAX: usize = 4096;

impl Sequence {
    /// A stream of which nothing has arrived.
    pub fn new(stream: u64) -> Self {
        Self { stream, ..Self::default() }
    }

    /// The highest number seen.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Takes note of one event.
    pub fn see(&mut self, stream: u64, sequence: u64) {
        if stream != self.stream {
            self.faults.foreign += 1;
        } else if sequence == self.last + 1 {
            self.last = sequence;
        } else if sequence > self.last {
            self.faults.lost += sequence - self.last - 1;
            let room = MISSING_MAX.saturating_sub(self.missing.len());
            self.missing.extend((self.last + 1..sequence).take(room));
            self.last = sequence;
        } else if let Some(index) = self.missing.iter().position(|&number| number == sequence) {
            self.missing.swap_remove(index);
            self.faults.lost -= 1;
            self.faults.reordered += 1;
        } else {
            self.faults.doubled += 1;
        }
    }

    /// The verdict when the stream has ended and `owed` events were due; `None` when it was left early on purpose.
    pub fn finish(&self, owed: Option<u64>) -> Faults {
        let mut faults = self.faults;
        faults.lost += owed.map_or(0, |owed| owed.saturating_sub(self.last));
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(numbers: &[u64], owed: Option<u64>) -> Faults {
        let mut sequence = Sequence::new(9);
        for &number in numbers {
            sequence.see(9, number);
        }
        sequence.finish(owed)
    }

    #[test]
    fn a_whole_stream_has_no_faults() {
        assert_eq!(judge(&[1, 2, 3], Some(3)), Faults::default());
        assert_eq!(judge(&[1, 2], None), Faults::default());
    }

    #[test]
    fn each_fault_is_told_apart() {
        assert_eq!(judge(&[1, 4, 5], Some(5)), Faults { lost: 2, ..Faults::default() });
        assert_eq!(judge(&[1, 2], Some(5)), Faults { lost: 3, ..Faults::default() });
        assert_eq!(judge(&[1, 2, 2, 1], Some(2)), Faults { doubled: 2, ..Faults::default() });
        assert_eq!(judge(&[1, 3, 2, 4], Some(4)), Faults { reordered: 1, ..Faults::default() });
        assert_eq!(judge(&[2, 1, 1], Some(2)), Faults { reordered: 1, doubled: 1, ..Faults::default() });
    }

    #[test]
    fn an_event_of_another_stream_is_foreign_and_moves_nothing() {
        let mut sequence = Sequence::new(1);
        sequence.see(1, 1);
        sequence.see(2, 2);
        assert_eq!(sequence.finish(Some(2)), Faults { lost: 1, foreign: 1, ..Faults::default() });
    }
}
