//! Completion accounting of one subscriber: what the kernel has confirmed, and what it holds of ours.
//! `0 <= sent <= sent + in_flight <= end of the log`; `in_flight` rises when a range is lent and falls only by its completion.

use crate::planted::{Bug, is_planted};

/// A subscriber's cursors into a [`crate::log::Log`], in bytes of the log.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Ledger {
    sent: u64,
    in_flight: u32,
}

impl Ledger {
    /// A subscriber that starts at byte `cursor`.
    pub fn at(cursor: u64) -> Self {
        Ledger { sent: cursor, in_flight: 0 }
    }

    /// Everything below this byte has been confirmed by completions.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes lent to the kernel and not yet completed.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// True when a send may be started: at most one is in flight.
    pub fn may_lend(&self) -> bool {
        self.in_flight == 0
    }

    /// Bytes of a log that ends at `end` which the kernel has not confirmed.
    pub fn lag(&self, end: u64) -> u64 {
        end - self.sent
    }

    /// A range of `bytes` (> 0) at `sent` was lent.
    pub fn lend(&mut self, bytes: u32) {
        assert!(self.in_flight == 0, "one send in flight per connection");
        assert!(bytes > 0, "an empty send never completes usefully");
        self.in_flight = bytes;
    }

    /// The send in flight completed with `bytes` accepted; `0 <= bytes <= in_flight`. What was not accepted is lent again.
    pub fn complete(&mut self, bytes: u32) {
        assert!(bytes <= self.in_flight, "a completion confirms no more than was lent");
        self.sent += u64::from(bytes);
        if is_planted(Bug::DoubleCompletion) {
            self.sent += u64::from(bytes);
        }
        self.in_flight = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_completion_leaves_the_rest_to_be_lent_again() {
        let mut ledger = Ledger::at(10);
        ledger.lend(100);
        assert!(!ledger.may_lend());
        assert_eq!(ledger.lag(200), 190, "in flight is not yet sent");
        ledger.complete(40);
        assert_eq!((ledger.sent(), ledger.in_flight(), ledger.lag(200)), (50, 0, 150));
        ledger.lend(60);
        ledger.complete(0);
        assert_eq!(ledger.sent(), 50, "an error confirms nothing");
    }

    #[test]
    #[should_panic(expected = "one send in flight")]
    fn two_sends_at_once_are_a_bug() {
        let mut ledger = Ledger::default();
        ledger.lend(1);
        ledger.lend(1);
    }

    #[test]
    #[should_panic(expected = "no more than was lent")]
    fn a_doubled_completion_is_a_bug() {
        let mut ledger = Ledger::default();
        ledger.lend(10);
        ledger.complete(10);
        ledger.complete(10);
    }
}
