//! When the kernel takes nothing for a while (`EAGAIN`, `EBUSY`): how often, how long to wait until it is asked again, and
//! what the log is told. No clock: time is an argument.

use crate::io::Refusal;
use std::time::Duration;

/// The first wait; each further one is twice as long.
const PAUSE_US_MIN: u64 = 60;
/// The longest wait. What comes meanwhile may have to wait as long.
const PAUSE_US_MAX: u64 = 1_000;
/// Between two lines of the log that say the same.
const TOLD_US: u64 = 60_000_000;

/// How often the kernel took nothing, and since when.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    counts: [u64; Refusal::COUNT],
    /// Of the refusal that goes on; 0: none does.
    pause_us: u64,
    /// When the log was told last, if it was.
    told_us: Option<u64>,
}

impl Refusals {
    /// Which of the two it is, for `errno`.
    pub(super) fn of(errno: i32) -> Option<Refusal> {
        match errno {
            libc::EAGAIN => Some(Refusal::Memory),
            libc::EBUSY => Some(Refusal::Completions),
            _ => None,
        }
    }

    pub(super) fn count(&mut self, refusal: Refusal) {
        self.counts[refusal as usize] += 1;
    }

    /// In order of [`Refusal::ALL`].
    pub(super) fn counts(&self) -> [u64; Refusal::COUNT] {
        self.counts
    }

    pub(super) fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Whether the last turn was refused something.
    pub(super) fn go_on(&self) -> bool {
        self.pause_us > 0
    }

    /// The turn was refused something: how long to wait.
    pub(super) fn pause(&mut self) -> Duration {
        self.pause_us = (self.pause_us * 2).clamp(PAUSE_US_MIN, PAUSE_US_MAX);
        Duration::from_micros(self.pause_us)
    }

    /// The turn was refused nothing.
    pub(super) fn over(&mut self) {
        self.pause_us = 0;
    }

    /// Whether the log is to be told: of a refusal that goes on, now and then.
    pub(super) fn is_news(&mut self, now_us: u64) -> bool {
        let news =
            self.pause_us == PAUSE_US_MAX && self.told_us.is_none_or(|told_us| now_us >= told_us + TOLD_US);
        if news {
            self.told_us = Some(now_us);
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_millisecond_and_begin_anew_with_the_next_refusal() {
        let mut refusals = Refusals::default();
        let mut pauses = || (0..7).map(|_| refusals.pause().as_micros()).collect::<Vec<_>>();
        assert_eq!(pauses(), [60, 120, 240, 480, 960, 1000, 1000]);
        assert_eq!(pauses()[0], 1000);
        refusals.over();
        assert_eq!(refusals.pause().as_micros(), 60);
    }

    #[test]
    fn one_that_goes_on_is_told_once_a_minute() {
        let mut refusals = Refusals::default();
        let mut told = 0;
        // Two minutes, with an end of it every second.
        for ms in 0..120_000_u64 {
            if ms % 1000 == 0 {
                refusals.over();
            }
            refusals.pause();
            told += u32::from(refusals.is_news(ms * 1000));
        }
        assert_eq!(told, 2);
        let mut short = Refusals::default();
        short.pause();
        assert!(!short.is_news(5), "over before anybody would have noticed");
    }

    #[test]
    fn each_is_counted_by_its_reason() {
        let mut refusals = Refusals::default();
        for errno in [libc::EAGAIN, libc::EBUSY, libc::EAGAIN, libc::EINTR, libc::ETIME, libc::ENOMEM] {
            if let Some(refusal) = Refusals::of(errno) {
                refusals.count(refusal);
            }
        }
        assert_eq!((refusals.counts(), refusals.total()), ([2, 1], 3));
    }
}
