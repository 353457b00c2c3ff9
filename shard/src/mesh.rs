//! Mailboxes between a shard and the control thread: one bounded lock-free queue each way, and a bell to ring each side.
//! The shard never waits for the control thread: a report that finds its queue full is dropped and counted.

use crate::settings::UpstreamSet;
use crate::stats::{Snapshot, StreamRecord};
use crate::uring::{Bell, EventFd};
use rtrb::{Consumer, Producer, PushError, RingBuffer};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
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

/// A new mailbox: the control thread's end and the shard's. Both may be sent to their threads.
///
/// # Errors
/// No descriptors.
pub fn mailbox() -> io::Result<(ControlPort, ShardPort)> {
    let (commands, commands_out) = RingBuffer::new(COMMANDS_MAX);
    let (reports, reports_out) = RingBuffer::new(REPORTS_MAX);
    let shard_bell = Arc::new(Bell::new()?);
    let control_bell = Arc::new(EventFd::for_poller()?);
    Ok((
        ControlPort {
            commands,
            reports: reports_out,
            shard_bell: OnDrop(Arc::clone(&shard_bell), Bell::ring),
            control_bell: Arc::clone(&control_bell),
        },
        ShardPort {
            commands: commands_out,
            reports,
            shard_bell,
            control_bell: OnDrop(control_bell, EventFd::ring),
            unrung: false,
        },
    ))
}

/// The other end's bell. Rings once more when it is dropped, so that the other end looks and finds this one gone; declared
/// after the queues, which must be gone by then.
#[derive(Debug)]
struct OnDrop<B>(Arc<B>, fn(&B));

impl<B> OnDrop<B> {
    fn ring(&self) {
        (self.1)(&self.0);
    }
}

impl<B> Drop for OnDrop<B> {
    fn drop(&mut self) {
        self.ring();
    }
}

/// The control thread's end. Dropping it tells the shard to stop.
///
/// To wait for reports: poll [`ControlPort::wake_fd`], then [`ControlPort::clear`], then [`ControlPort::receive`] until it
/// is empty; in this order no report is slept on.
#[derive(Debug)]
pub struct ControlPort {
    commands: Producer<Command>,
    reports: Consumer<Report>,
    shard_bell: OnDrop<Bell>,
    control_bell: Arc<EventFd>,
}

impl ControlPort {
    /// Sends and rings. One syscall.
    ///
    /// # Errors
    /// Gives the command back when the shard has not taken [`COMMANDS_MAX`] of them, or is gone.
    pub fn send(&mut self, command: Command) -> Result<(), Command> {
        if self.commands.is_abandoned() {
            return Err(command);
        }
        let result = self.commands.push(command).map_err(|PushError::Full(command)| command);
        self.shard_bell.ring();
        result
    }

    /// Readable when reports wait; not blocking. Edge- and level-triggered pollers both do.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.control_bell.as_fd()
    }

    /// Makes [`ControlPort::wake_fd`] unreadable until the shard rings again.
    pub fn clear(&self) {
        self.control_bell.clear();
    }

    /// Waits until reports wait, at most `timeout_ms`; true if so. For callers without a poller.
    pub fn wait(&self, timeout_ms: u16) -> bool {
        self.control_bell.wait(timeout_ms)
    }

    /// The oldest report.
    pub fn receive(&mut self) -> Option<Report> {
        self.reports.pop().ok()
    }

    /// The shard's end is gone: no report will follow those that wait.
    pub fn is_abandoned(&self) -> bool {
        self.reports.is_abandoned()
    }
}

/// The shard's end.
#[derive(Debug)]
pub struct ShardPort {
    commands: Consumer<Command>,
    reports: Producer<Report>,
    shard_bell: Arc<Bell>,
    control_bell: OnDrop<EventFd>,
    /// Reports were queued since the last flush.
    unrung: bool,
}

impl ShardPort {
    /// The oldest command.
    pub fn receive(&mut self) -> Option<Command> {
        self.commands.pop().ok()
    }

    /// Queues a report; the control thread hears of it with the next [`ShardPort::flush`].
    ///
    /// # Errors
    /// Gives the report back when the control thread has not taken [`REPORTS_MAX`] of them.
    #[allow(clippy::result_large_err, reason = "the report given back is what was passed in")]
    pub fn report(&mut self, report: Report) -> Result<(), Report> {
        self.unrung = true;
        self.reports.push(report).map_err(|PushError::Full(report)| report)
    }

    /// Rings, once for all reports since the last call. One syscall, none without reports.
    pub fn flush(&mut self) {
        if std::mem::take(&mut self.unrung) {
            self.control_bell.ring();
        }
    }

    /// The bell that commands ring, for [`UringIo::new`](crate::uring::UringIo::new).
    pub fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.shard_bell)
    }

    /// The control thread's end is gone: nobody will ever say stop.
    pub fn is_abandoned(&self) -> bool {
        self.commands.is_abandoned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn is_send<T: Send>(_: &T) {}

    #[test]
    fn what_is_sent_arrives_in_order_and_a_full_queue_gives_it_back() {
        let (mut control, mut shard) = mailbox().unwrap();
        is_send(&control);
        is_send(&shard);
        for ticket in 0..COMMANDS_MAX as u64 {
            control.send(Command::Snapshot { ticket }).unwrap();
        }
        assert!(matches!(control.send(Command::Stop), Err(Command::Stop)));
        for expected in 0..COMMANDS_MAX as u64 {
            assert!(matches!(shard.receive(), Some(Command::Snapshot { ticket }) if ticket == expected));
        }
        assert!(shard.receive().is_none());
        for _ in 0..REPORTS_MAX {
            shard.report(Report::Started).unwrap();
        }
        assert!(matches!(shard.report(Report::Left { forced: 3 }), Err(Report::Left { forced: 3 })));
        for _ in 0..REPORTS_MAX {
            assert!(matches!(control.receive(), Some(Report::Started)));
        }
        assert!(control.receive().is_none());
    }

    #[test]
    fn the_control_thread_is_rung_once_per_flush_and_only_for_reports() {
        let (control, mut shard) = mailbox().unwrap();
        shard.flush();
        assert!(!control.control_bell.clear(), "nothing to tell");
        shard.report(Report::Started).unwrap();
        shard.report(Report::Started).unwrap();
        assert!(!control.control_bell.clear(), "not before the flush");
        shard.flush();
        assert!(control.wake_fd().as_raw_fd() >= 0 && control.control_bell.clear());
        shard.flush();
        assert!(!control.control_bell.clear());
    }

    #[test]
    fn each_end_hears_that_the_other_is_gone() {
        let (mut control, shard) = mailbox().unwrap();
        assert!(!control.is_abandoned() && !shard.is_abandoned());
        drop(shard);
        assert!(control.is_abandoned() && control.control_bell.clear());
        assert!(control.send(Command::Stop).is_err());
        let (control, shard) = mailbox().unwrap();
        drop(control);
        assert!(shard.is_abandoned());
    }
}
