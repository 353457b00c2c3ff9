//! Durable streams on disk: an append-only journal of what changes in a store, in segment files. No I/O: a [`Journal`] says what
//! is to be written where ([`Job`]) and is told what became of it; a [`Recovery`] reads what files hold.
//!
//! ```text
//!   Store ── records ──► Journal: pending ──► Job::Write ──► disk ──► Journal::complete ──► acknowledged
//!                            ▲                                 │
//!                            └───── kept until synced ◄────────┘ failed: once more, after a failed sync in a new segment
//! ```
//!
//! **What may be lost.** A record is known to have been on the disk when a later one says so (`synced`). What is missing before
//! that was damaged: it costs its stream what the record held, and is reported. What is missing after that was being written: it
//! and all behind it never counted, and is cut.
//!
//! **Segments** are removed oldest first, and only when no stream needs one: each stream knows in which segment that what is
//! known of it begins. To free old ones, streams are written anew ([`record::Kind::Snapshot`]), bit by bit, from memory.

#[cfg(test)]
pub(super) mod disk;
mod image;
pub(super) mod record;
mod recovery;
#[cfg(test)]
pub(super) mod tests;
mod writer;

pub(super) use image::Image;
pub use image::StreamFacts;
pub use record::RelayFacts;
pub use recovery::{Finding, Recovered, Recovery};
pub use writer::{Failure, Job, Journal, JournalCounters, JournalState, Stage};

/// What a relayed stream is called where its id, by which it could be read, is not to be told: bits 48 and up are the shard that
/// named it, those below its number there.
pub(super) fn relayed_name(stream: u64) -> String {
    format!("stream {} of shard {}", stream & ((1 << 48) - 1), stream >> 48)
}

const SUFFIX: &str = ".segment";

/// The name of a segment's file.
pub fn segment_name(number: u64) -> String {
    format!("{number:020}{SUFFIX}")
}

/// The number of the segment with that name; `None`: it is none.
pub fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let number = digits.parse().ok()?;
    (segment_name(number) == name).then_some(number)
}
