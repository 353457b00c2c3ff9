//! Operation lists on the event log, against a plain vector: what was lent stays as it is, and memory is bounded.

use super::input::Choices;
use protocol::limits::{LOG_SEGMENT_BYTES_MAX, LOG_SEGMENT_FIRST_BYTES};
use protocol::log::{Lent, Log};

/// What is tested besides appending.
pub trait Lending {
    /// As [`Log::lend`].
    fn lend(log: &Log, from: u64, bytes_max: u32) -> Option<Lent>;
}

/// The log as it is.
pub struct AsItIs;

impl Lending for AsItIs {
    fn lend(log: &Log, from: u64, bytes_max: u32) -> Option<Lent> {
        log.lend(from, bytes_max)
    }
}

/// The target.
pub fn run(data: &[u8]) {
    run_on::<AsItIs>(data);
}

/// The target, with another way of lending.
pub fn run_on<L: Lending>(data: &[u8]) {
    let mut choices = Choices::of(data);
    let (mut log, mut model) = (Log::new(), Vec::new());
    let mut held: Vec<(u64, Lent)> = Vec::new();
    let (mut cursors, mut released, mut events) = ([0_u64; 3], 0_u64, 0_u64);
    while choices.any_left() {
        match choices.below(8) {
            0 | 1 => {
                // Up to 32 KiB mostly; now and then more than a segment.
                let bytes = (choices.magnitude(11) as usize).min(2 * LOG_SEGMENT_BYTES_MAX);
                let piece: Vec<u8> =
                    (model.len()..model.len() + bytes).map(|at| (at ^ at >> 8) as u8).collect();
                let (front, back) = piece.split_at(bytes / 3);
                assert_eq!(log.append(&[front, b"", back]), model.len() as u64);
                model.extend(piece);
            }
            2 => log.reserve(choices.magnitude(14) as usize),
            3 | 4 => {
                let cursor = &mut cursors[choices.below(3)];
                let bytes_max = choices.magnitude(13) as u32 + 1;
                match L::lend(&log, *cursor, bytes_max) {
                    None => {
                        assert_eq!(*cursor, model.len() as u64, "nothing is lent though something is owed")
                    }
                    Some(lent) => {
                        assert!(lent.len() > 0 && lent.len() <= bytes_max as usize);
                        held.push((*cursor, lent.clone()));
                        // A partial completion moves the cursor by less.
                        *cursor += (lent.len() as u64 * u64::from(choices.byte() % 5)).div_ceil(4);
                    }
                }
            }
            5 => {
                released = cursors.into_iter().min().unwrap_or_default();
                log.release(released);
            }
            6 => {
                released = cursors.into_iter().min().unwrap_or_default();
                log.trim(released);
                if released == model.len() as u64 {
                    assert_eq!(
                        (log.memory_bytes(), log.start()),
                        (0, log.end()),
                        "an empty log owns nothing"
                    );
                }
            }
            _ => {
                held.truncate(choices.below(4));
                events += 1;
                assert_eq!(log.next_event_id(), events);
                log.event_ends();
            }
        }
        for (from, lent) in held.iter().rev().take(4) {
            let from = *from as usize;
            assert!(lent.to_vec() == model[from..from + lent.len()], "lent bytes were written again");
        }
        assert_eq!((log.end(), log.last_event_id()), (model.len() as u64, events));
        assert!(log.start() <= cursors.into_iter().min().unwrap_or_default(), "released what is still owed");
        // Whole segments only are released, and an append has at most one of its own beside them.
        let bound = 3 * (model.len() - released as usize) + 5 * LOG_SEGMENT_BYTES_MAX;
        assert!(log.memory_bytes() <= bound, "{} bytes for {} owed", log.memory_bytes(), model.len());
        if log.start() == log.end() && released == model.len() as u64 && held.is_empty() {
            assert!(log.memory_bytes() <= LOG_SEGMENT_BYTES_MAX.max(2 * LOG_SEGMENT_FIRST_BYTES));
        }
    }
    for (from, lent) in &held {
        let from = *from as usize;
        assert!(lent.to_vec() == model[from..from + lent.len()], "lent bytes were written again");
    }
    for mut cursor in cursors {
        while let Some(lent) = L::lend(&log, cursor, u32::MAX) {
            let from = cursor as usize;
            assert!(lent.to_vec() == model[from..from + lent.len()], "what is owed is not what was appended");
            cursor += lent.len() as u64;
        }
        assert_eq!(cursor, log.end());
    }
}
