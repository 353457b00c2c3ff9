//! Mailboxes between a shard and the control thread: one bounded lock-free queue each way, an eventfd to ring each side.
//! The shard never waits for the control thread: a report that finds its queue full is dropped and counted.

use crate::settings::UpstreamSet;
use crate::stats::{Snapshot, StreamRecord};
use std::sync::Arc;

/// Commands waiting for one shard.
pub const COMMANDS_MAX: usize = 256;
/// Reports waiting for the control thread, per shard.
pub const REPORTS_MAX: usize = 8192;

/// What the control thread tells a shard.
#[derive(Clone, Debug)]
pub enum Command {
    /// The backends changed.
    Upstreams(Arc<UpstreamSet>),
    /// Report a [`Snapshot`].
    Snapshot {
        /// Returned with it.
        ticket: u64,
    },
    /// Accept what the kernel has queued, then no more; end every stream that is left after `deadline_ms`.
    Drain {
        /// Milliseconds from now; 0 ends streams at once.
        deadline_ms: u64,
    },
    /// End every stream now, with an in-band error where possible, and leave.
    Stop,
}

/// What a shard tells the control thread.
#[derive(Clone, Debug)]
pub enum Report {
    /// The shard accepts clients.
    Started,
    /// As asked.
    Snapshot {
        /// Of the command.
        ticket: u64,
        /// The state.
        snapshot: Box<Snapshot>,
    },
    /// A stream ended.
    Ended(Box<StreamRecord>),
    /// The shard has drained or stopped, and its thread ends. `forced` streams were ended by the deadline.
    Left {
        /// Streams that did not end in peace.
        forced: u64,
    },
    /// The shard failed and is gone.
    Failed(String),
}
