//! The one clock of the bench tools: CLOCK_MONOTONIC in nanoseconds, which all processes of a host share.
//!
//! So a time that the backend wrote into an event can be subtracted from the time the load generator received it.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of one second.
pub const SECOND_NS: u64 = 1_000_000_000;

/// CLOCK_MONOTONIC now, in nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The monotonic clock counts from boot: neither part is ever negative.
    now.tv_sec.unsigned_abs() * SECOND_NS + now.tv_nsec.unsigned_abs()
}

/// Seconds as nanoseconds; negative and non-finite values become 0.
pub fn seconds_ns(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}
