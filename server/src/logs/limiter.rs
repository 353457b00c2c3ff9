//! Limits identical log lines: a few a second pass, the rest are counted and summed up in one line. No clock: time is an
//! argument.

use super::Line;
use std::collections::HashMap;

/// Identical lines that pass in one window.
const PER_WINDOW: u32 = 5;
/// Length of a window, ms.
pub(super) const WINDOW_MS: u64 = 1000;
/// Different lines watched at a time; when full, further ones pass unlimited until windows end.
const WATCHED_MAX: usize = 256;

#[derive(Default)]
pub(super) struct Limiter {
    watched: HashMap<(log::Level, String, String), Window>,
}

struct Window {
    since_ms: u64,
    passed: u32,
    held_back: u64,
}

impl Limiter {
    /// Whether this line is to be written.
    pub(super) fn admits(&mut self, line: &Line, now_ms: u64) -> bool {
        let key = (line.level, line.target.clone(), line.text.clone());
        if let Some(window) = self.watched.get_mut(&key) {
            if window.passed < PER_WINDOW {
                window.passed += 1;
                return true;
            }
            window.held_back += 1;
            return false;
        }
        if self.watched.len() < WATCHED_MAX {
            self.watched.insert(key, Window { since_ms: now_ms, passed: 1, held_back: 0 });
        }
        true
    }

    /// Ends windows that are over, and returns how often each line was held back in them.
    pub(super) fn expire(&mut self, now_ms: u64) -> Vec<(log::Level, String, String, u64)> {
        let mut summaries = Vec::new();
        self.watched.retain(|(level, target, text), window| {
            let over = now_ms >= window.since_ms + WINDOW_MS;
            if over && window.held_back > 0 {
                summaries.push((*level, target.clone(), text.clone(), window.held_back));
            }
            !over
        });
        summaries
    }

    /// True while a window is open, so that [`Limiter::expire`] must be called again.
    pub(super) fn is_watching(&self) -> bool {
        !self.watched.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line {
            since_1970: std::time::Duration::ZERO,
            level: log::Level::Warn,
            target: "shard".to_owned(),
            text: text.to_owned(),
            fields: Vec::new(),
        }
    }

    #[test]
    fn repeated_lines_are_held_back_and_summed_up() {
        let mut limiter = Limiter::default();
        let passed = (0..100).filter(|_| limiter.admits(&line("no buffers"), 10)).count();
        assert_eq!(passed, 5);
        assert!(limiter.admits(&line("another"), 10));
        assert!(limiter.expire(1009).is_empty());
        let summaries = limiter.expire(1010);
        assert_eq!(summaries, [(log::Level::Warn, "shard".to_owned(), "no buffers".to_owned(), 95)]);
        assert!(limiter.admits(&line("no buffers"), 1010));
    }

    #[test]
    fn what_is_watched_is_bounded() {
        let mut limiter = Limiter::default();
        for number in 0..1000 {
            assert!(limiter.admits(&line(&number.to_string()), 0));
        }
        assert_eq!(limiter.watched.len(), WATCHED_MAX);
        limiter.expire(WINDOW_MS);
        assert!(!limiter.is_watching());
    }
}
