//! How old the bytes of a log are, without a note for each: where its end was at a few instants, a quarter of the time that is asked
//! about apart.

/// Instants remembered.
const MARKS: usize = 4;

/// Where a log's end was.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Ages {
    /// The oldest is replaced next.
    marks: [u64; MARKS],
    oldest: u8,
    due_ms: u64,
}

impl Ages {
    /// How far apart its instants are, for an age of `age_ms`.
    pub fn step_ms(age_ms: u32) -> u32 {
        age_ms.div_ceil(MARKS as u32).max(1)
    }

    /// Looks at a log that ends at `end`. Gives an offset, when there is a new one, below which everything is `age_ms` old or older; what
    /// lies behind it is younger than that and a quarter of it, if this is called often enough.
    pub fn look(&mut self, end: u64, age_ms: u32, now_ms: u64) -> Option<u64> {
        if now_ms < self.due_ms {
            return None;
        }
        self.due_ms = now_ms + u64::from(Self::step_ms(age_ms));
        let mark = &mut self.marks[usize::from(self.oldest)];
        self.oldest = (self.oldest + 1) % MARKS as u8;
        Some(std::mem::replace(mark, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte a millisecond, looked at every so often: what is said to be old is, and not much more is.
    #[test]
    fn what_is_old_is_known_to_a_quarter() {
        for (age_ms, every_ms) in [(1_000, 1), (1_000, 50), (1_000, 250), (7, 1), (1, 1), (60_000, 15_000)] {
            let mut ages = Ages::default();
            let mut told = 0;
            for now_ms in (0..10 * u64::from(age_ms)).step_by(every_ms as usize) {
                if let Some(old) = ages.look(now_ms, age_ms, now_ms) {
                    assert!(old == 0 || old + u64::from(age_ms) <= now_ms, "{age_ms}: {old} at {now_ms}");
                    assert!(old >= told);
                    told = old;
                }
                // As often as it asks for, or as it is looked at.
                let late_ms =
                    u64::from(age_ms) + u64::from(Ages::step_ms(age_ms).next_multiple_of(every_ms) * 5);
                assert!(told + late_ms >= now_ms, "{age_ms}, {every_ms}: {told} at {now_ms}");
            }
            assert!(told > 0);
        }
    }

    #[test]
    fn nothing_is_old_that_was_not_there_long_enough_ago() {
        let mut ages = Ages::default();
        // Looked at late: the log is there for an hour, but nobody knows since when.
        assert_eq!(ages.look(500, 1_000, 3_600_000), Some(0));
        assert_eq!(ages.look(500, 1_000, 3_600_249), None);
        for step in 1..4 {
            assert_eq!(ages.look(500, 1_000, 3_600_000 + 250 * step), Some(0));
        }
        assert_eq!(ages.look(900, 1_000, 3_601_000), Some(500));
    }
}
