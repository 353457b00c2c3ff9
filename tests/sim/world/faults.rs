//! What the simulated kernel and network do wrong: probabilities and extents, drawn once per run; and bugs put into the
//! machine on purpose.

use crate::rng::Rng;
use serde::{Deserialize, Serialize};
use shard::io::Errno;

pub(crate) const ECONNRESET: Errno = Errno(104);
pub(crate) const EPIPE: Errno = Errno(32);
pub(crate) const ETIMEDOUT: Errno = Errno(110);
pub(crate) const EHOSTUNREACH: Errno = Errno(113);
pub(crate) const EMFILE: Errno = Errno(24);
const ENFILE: Errno = Errno(23);
const ENOMEM: Errno = Errno(12);
const ENOBUFS: Errno = Errno(105);
pub(crate) const ECONNABORTED: Errno = Errno(103);

/// What an accept may fail with that finds no room for one more.
pub(crate) const ACCEPT_ERRORS: [Errno; 4] = [EMFILE, ENFILE, ENOMEM, ENOBUFS];
/// What a connection may break with.
pub(crate) const BREAKS: [Errno; 4] = [ECONNRESET, EPIPE, ETIMEDOUT, EHOSTUNREACH];
pub(crate) const ECONNREFUSED: Errno = Errno(111);

/// Probabilities (per mille) and extents of what the kernel and the network do. Zero is a calm machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Faults {
    pub(crate) delay_us: u64,
    /// Largest piece of one receive; 0: the buffer's size.
    pub(crate) receive_bytes: usize,
    pub(crate) receive_rearm: u32,
    pub(crate) receive_no_buffer: u32,
    pub(crate) hangup_ends: u32,
    pub(crate) send_piecewise: u32,
    pub(crate) send_short: u32,
    /// Completions of nothing at all.
    pub(crate) send_nothing: u32,
    /// Sends that fail, with their connection.
    pub(crate) send_fails: u32,
    pub(crate) send_late: u32,
    pub(crate) cancel_late_us: u64,
    pub(crate) reorder: u32,
    pub(crate) accept_error: u32,
    /// Clients that are gone before they are accepted.
    pub(crate) accept_aborts: u32,
    pub(crate) accept_ends: u32,
    pub(crate) connect_refused: u32,
    pub(crate) connect_hangs: u32,
    pub(crate) socket_error: u32,
    /// About once in so long some connection breaks; 0: never.
    pub(crate) break_every_us: u64,
    pub(crate) overshoot_us: u64,
    /// The clock jumps by up to so much, in one turn of about two hundred; 0: never.
    pub(crate) jump_us: u64,
    pub(crate) work_us: u64,
    /// Of several shards now and then one is held up by so long; 0: never.
    pub(crate) stall_us: u64,
    /// Completions of one turn; 0: the limit of the trait.
    pub(crate) turn_completions: usize,
}

impl Faults {
    /// Bytes that a receive brings on average, if they are there.
    pub(crate) fn piece_bytes(&self, buffer_bytes: usize) -> usize {
        match self.receive_bytes {
            0 => buffer_bytes,
            bytes => (Rng::skewed_mean(bytes as u64) as usize + 1).min(buffer_bytes),
        }
    }
}

/// A bug put into the machine on purpose, to prove that the rig finds such.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Planted {
    DoubleSent,
    LostSent,
    LostCancel,
    LostWakeUp,
    ForgottenReceive,
    WrongWindow,
    OthersBytes,
}

impl Planted {
    pub(crate) const ALL: &'static [Planted] = &[
        Planted::DoubleSent,
        Planted::LostSent,
        Planted::LostCancel,
        Planted::LostWakeUp,
        Planted::ForgottenReceive,
        Planted::WrongWindow,
        Planted::OthersBytes,
    ];
}
