//! The one place of this crate that reads the clocks.
#![allow(clippy::disallowed_methods, reason = "the operator's side has one clock file, and this is it")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Time since 1970; zero when the system's clock is set before it.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
