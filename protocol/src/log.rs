//! A stream's event log: append-only, contiguous, wire-ready; the only path from a producer to a socket.
//! Bytes are appended once and lent to the kernel from where they lie, for any number of subscribers.
//!
//! ```text
//!   start (oldest byte held)             end (next byte appended)
//!     │                                    │
//!     ▼                                    ▼
//!   ┌─────────┬───────────────────┬────────┬ ─ ─ ─ ┐
//!   │ segment │ segment           │ segment   free │    each append lies in one segment whole
//!   └─────────┴───────────────────┴────────┴ ─ ─ ─ ┘
//! ```
//!
//! A segment is `Rc<[Cell<u8>]>`: its address is stable, whoever was lent a range keeps it alive, and appending behind a
//! lent range needs no unsafe code. Filled bytes are never written again while somebody else holds the segment.

use crate::limits::{LOG_SEGMENT_BYTES_MAX, LOG_SEGMENT_FIRST_BYTES};
use crate::planted::{Bug, is_planted};
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

/// A contiguous range of a log, lent out (to the kernel): holds its memory until dropped.
#[derive(Clone)]
pub struct Lent {
    memory: Rc<[Cell<u8>]>,
    start: u32,
    end: u32,
}

impl Lent {
    /// The bytes. Nobody writes them while this value lives.
    pub fn cells(&self) -> &[Cell<u8>] {
        &self.memory[self.start as usize..self.end as usize]
    }

    /// Length in bytes, > 0.
    #[allow(clippy::len_without_is_empty, reason = "a lent range is never empty")]
    pub fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// A copy of the bytes, for simulations and tests.
    pub fn to_vec(&self) -> Vec<u8> {
        self.cells().iter().map(Cell::get).collect()
    }
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lent({} bytes)", self.len())
    }
}

struct Segment {
    memory: Rc<[Cell<u8>]>,
    /// Log offset of `memory[0]`.
    base: u64,
    /// `0 <= filled <= memory.len()`
    filled: u32,
}

impl Segment {
    fn with_capacity(base: u64, bytes: usize) -> Self {
        Segment { memory: std::iter::repeat_n(Cell::new(0), bytes).collect(), base, filled: 0 }
    }

    fn end(&self) -> u64 {
        self.base + u64::from(self.filled)
    }

    fn room(&self) -> usize {
        self.memory.len() - self.filled as usize
    }

    fn push(&mut self, bytes: &[u8]) {
        let start = self.filled as usize;
        for (cell, byte) in self.memory[start..start + bytes.len()].iter().zip(bytes) {
            cell.set(*byte);
        }
        self.filled += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    }
}

/// The log of one stream.
#[derive(Default)]
pub struct Log {
    segments: VecDeque<Segment>,
    end: u64,
    last_event_id: u64,
}

impl Log {
    /// An empty log; owns no memory until something is appended.
    pub fn new() -> Self {
        Self::default()
    }

    /// Offset of the next byte to be appended = bytes ever appended.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Offset of the oldest byte still held; equals `end` when nothing is held.
    pub fn start(&self) -> u64 {
        self.segments.front().map_or(self.end, |segment| segment.base)
    }

    /// Id of the newest event (0: none yet). Ids are dense from 1.
    pub fn last_event_id(&self) -> u64 {
        self.last_event_id
    }

    /// Takes the next event id. The caller appends that event's bytes next.
    pub fn next_event_id(&mut self) -> u64 {
        self.last_event_id += 1;
        self.last_event_id
    }

    /// Bytes of memory held in segments, filled or not.
    pub fn memory_bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.memory.len()).sum()
    }

    /// Appends the concatenation of `parts` as one contiguous range; returns its offset.
    pub fn append(&mut self, parts: &[&[u8]]) -> u64 {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let at = self.end;
        if bytes == 0 {
            return at;
        }
        if self.segments.back().is_none_or(|segment| segment.room() < bytes) {
            self.grow(bytes);
        }
        if let Some(segment) = self.segments.back_mut() {
            for part in parts {
                segment.push(part);
            }
        }
        self.end += bytes as u64;
        at
    }

    /// Makes room for about `bytes` in one segment, so that what is appended next goes out as one send. Less of it may come:
    /// a segment of full size is left behind only half full or fuller, or little that is owed would hold much memory.
    pub fn reserve(&mut self, bytes: usize) {
        let bytes = bytes.min(LOG_SEGMENT_BYTES_MAX);
        let has_room = |segment: &Segment| {
            let size = segment.memory.len();
            segment.room() >= bytes || (size >= LOG_SEGMENT_BYTES_MAX && segment.room() > size / 2)
        };
        if !self.segments.back().is_some_and(has_room) {
            self.grow(bytes);
        }
    }

    fn grow(&mut self, bytes: usize) {
        // A segment that was never filled, or is drained, is of no more use.
        let last = match self.segments.back() {
            Some(segment) if segment.filled == 0 => {
                self.segments.pop_back();
                0
            }
            Some(segment) => segment.memory.len(),
            None => 0,
        };
        let next = (last * 2).clamp(LOG_SEGMENT_FIRST_BYTES, LOG_SEGMENT_BYTES_MAX);
        // An append larger than a segment gets one of its own.
        self.segments.push_back(Segment::with_capacity(self.end, next.max(bytes)));
    }

    /// A contiguous range from `from` (`start <= from < end`) to the end of its segment, at most `bytes_max`; `None` at the end.
    pub fn lend(&self, from: u64, bytes_max: u32) -> Option<Lent> {
        if from >= self.end {
            return None;
        }
        assert!(from >= self.start(), "the range was released while a subscriber still owed it");
        // Subscribers are near the end, or at the start of a short list: search from the back.
        let segment = self.segments.iter().rev().find(|segment| segment.base <= from)?;
        let start = u32::try_from(from - segment.base).unwrap_or(u32::MAX);
        let end = segment.filled.min(start.saturating_add(bytes_max));
        debug_assert!(start < end, "an empty segment below the end");
        Some(Lent { memory: Rc::clone(&segment.memory), start, end })
    }

    /// Gives all memory back if everything below `below` is everything there is: for a log that will hardly grow again.
    pub fn trim(&mut self, below: u64) {
        self.release(below);
        if below >= self.end {
            self.segments.clear();
        }
    }

    /// Releases what lies below `below` (the lowest cursor of all subscribers, or the start of the window), in whole segments.
    pub fn release(&mut self, below: u64) {
        let early = is_planted(Bug::WindowEdge);
        while self.segments.len() > 1
            && (self.segments[0].end() <= below || early && self.segments[0].base < below)
        {
            self.segments.pop_front();
        }
        if let [only] = self.segments.make_contiguous()
            && only.end() <= below
        {
            // Drained. A small segment that nobody else holds is written again from its start; a large one is given
            // back, so that a stream at rest owns little; a lent one goes on being filled behind what was lent.
            if only.memory.len() > 2 * LOG_SEGMENT_FIRST_BYTES {
                self.segments.clear();
            } else if Rc::strong_count(&only.memory) == 1 {
                only.base = self.end;
                only.filled = 0;
            }
        }
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({}..{}, {} bytes held)", self.start(), self.end, self.memory_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &Log, mut from: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(lent) = log.lend(from, u32::MAX) {
            from += lent.len() as u64;
            bytes.extend(lent.to_vec());
        }
        bytes
    }

    #[test]
    fn an_append_is_contiguous_and_a_lent_range_survives_what_follows() {
        let mut log = Log::new();
        assert_eq!((log.memory_bytes(), log.lend(0, 10).is_none()), (0, true));
        log.append(&[b"5\r\n", b"hello", b"\r\n"]);
        let lent = log.lend(0, u32::MAX).unwrap();
        assert_eq!(lent.to_vec(), b"5\r\nhello\r\n");
        for _ in 0..10_000 {
            log.append(&[b"more"]);
        }
        log.release(log.end());
        log.append(&[b"and again"]);
        assert_eq!(lent.to_vec(), b"5\r\nhello\r\n", "the lender's memory is his until he drops it");
        assert_eq!(read(&log, log.end() - 9), b"and again");
    }

    #[test]
    fn segments_grow_and_a_large_append_gets_its_own() {
        let mut log = Log::new();
        log.append(&[b"x"]);
        assert_eq!(log.memory_bytes(), LOG_SEGMENT_FIRST_BYTES, "the first segment is small");
        let large = vec![7; LOG_SEGMENT_BYTES_MAX * 3];
        log.append(&[&large]);
        assert_eq!(log.lend(1, u32::MAX).unwrap().len(), large.len());
        assert_eq!(log.lend(1, 100).unwrap().len(), 100);
    }

    #[test]
    fn what_was_reserved_for_is_contiguous() {
        let mut log = Log::new();
        log.append(&[b"head"]);
        log.release(4);
        log.reserve(3000);
        for _ in 0..30 {
            log.append(&[&[7; 100]]);
        }
        assert_eq!(log.lend(4, u32::MAX).unwrap().len(), 3000);
        log.release(log.end());
        assert!(log.memory_bytes() <= LOG_SEGMENT_FIRST_BYTES * 2, "and it is not kept");
        log.reserve(usize::MAX);
        assert!(log.memory_bytes() <= LOG_SEGMENT_BYTES_MAX + 2 * LOG_SEGMENT_FIRST_BYTES, "within bounds");
    }

    #[test]
    fn a_drained_log_owns_at_most_a_small_segment() {
        let mut log = Log::new();
        for round in 0..1000_u32 {
            for _ in 0..round % 40 {
                log.append(&[&[1; 180]]);
            }
            log.release(log.end());
            assert!(
                log.memory_bytes() <= LOG_SEGMENT_FIRST_BYTES * 2,
                "round {round}: {}",
                log.memory_bytes()
            );
        }
    }

    #[test]
    fn reserving_more_than_is_appended_costs_no_more_than_twice_what_is_held() {
        let mut log = Log::new();
        for _ in 0..2000 {
            log.reserve(LOG_SEGMENT_BYTES_MAX);
            log.append(&[&[1; 30]]);
        }
        let bound = 2 * log.end() as usize + 3 * LOG_SEGMENT_BYTES_MAX;
        assert!(log.memory_bytes() <= bound, "{} for {}", log.memory_bytes(), log.end());
    }

    #[test]
    fn a_trimmed_log_owns_nothing_and_goes_on() {
        let mut log = Log::new();
        log.append(&[b"request"]);
        log.trim(3);
        assert_eq!(log.lend(3, 9).unwrap().to_vec(), b"uest", "what is still owed stays");
        log.trim(7);
        assert_eq!((log.memory_bytes(), log.start(), log.end()), (0, 7, 7));
        log.append(&[b"more"]);
        assert_eq!(read(&log, 7), b"more");
    }

    /// Random appends, sends, partial completions and releases against a plain vector.
    #[test]
    fn behaves_like_a_plain_byte_vector() {
        let mut seed = 42_u64;
        let mut random = move |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
        for _ in 0..200 {
            let (mut log, mut model, mut sent) = (Log::new(), Vec::new(), 0_u64);
            let mut held: Vec<(u64, Lent)> = Vec::new();
            for step in 0..400_u64 {
                match random(5) {
                    4 => log.reserve(random(5000) as usize),
                    0 | 1 => {
                        let exponent = random(12);
                        let piece: Vec<u8> = (0..random(1 << exponent)).map(|i| (i + step) as u8).collect();
                        assert_eq!(
                            log.append(&[&piece[..piece.len() / 2], &piece[piece.len() / 2..]]),
                            model.len() as u64
                        );
                        model.extend(piece);
                    }
                    2 => {
                        if let Some(lent) = log.lend(sent, random(70_000) as u32 + 1) {
                            let taken = random(lent.len() as u64 + 1);
                            held.push((sent, lent));
                            sent += taken;
                            log.release(sent);
                        }
                    }
                    _ => held.truncate(random(3) as usize),
                }
                for (from, lent) in &held {
                    assert_eq!(lent.to_vec(), model[*from as usize..*from as usize + lent.len()]);
                }
                assert!(log.start() <= sent && log.end() == model.len() as u64);
            }
            assert_eq!(read(&log, sent), model[sent as usize..]);
        }
    }
}
