//! What the simulated kernel and network do wrong: probabilities and extents, drawn once per run; and bugs put into the
//! machine on purpose.

use shard::io::Errno;

pub(crate) const ECONNRESET: Errno = Errno(104);
pub(crate) const EPIPE: Errno = Errno(32);
pub(crate) const EMFILE: Errno = Errno(24);
pub(crate) const ECONNREFUSED: Errno = Errno(111);

/// Probabilities (per mille) and extents of what the kernel and the network do. Zero is a calm machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) delay_us: u64,
    /// Largest piece of one receive; 0: the buffer's size.
    pub(crate) receive_bytes: usize,
    pub(crate) receive_rearm: u32,
    pub(crate) receive_no_buffer: u32,
    pub(crate) hangup_ends: u32,
    pub(crate) send_piecewise: u32,
    pub(crate) send_short: u32,
    pub(crate) send_late: u32,
    pub(crate) cancel_late_us: u64,
    pub(crate) reorder: u32,
    pub(crate) accept_error: u32,
    pub(crate) accept_ends: u32,
    pub(crate) connect_refused: u32,
    pub(crate) connect_hangs: u32,
    pub(crate) socket_error: u32,
    pub(crate) overshoot_us: u64,
    pub(crate) work_us: u64,
    /// Completions of one turn; 0: the limit of the trait.
    pub(crate) turn_completions: usize,
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
