//! The real [`Io`]: one io_uring per shard, created, used and dropped on the shard's own thread.
//! All unsafe code of the project lives in this folder.
//!
//! One `io_uring_enter` per turn submits, runs the deferred completion work and sleeps. Nothing here ever needs a kernel
//! worker thread: sockets are blocking ones (with O_NONBLOCK io_uring answers EAGAIN instead of waiting by poll), and
//! shutdown(2) is a plain syscall (its io_uring form is always handed to a worker: `REQ_F_FORCE_ASYNC` in io_uring/net.c).

mod bell;
mod buffers;
mod error;
mod eventfd;
mod ops;
mod probe;
mod refusals;
mod sockets;
mod take;

pub use bell::Bell;
pub use buffers::Buffer;
pub use error::RingError;
pub(crate) use eventfd::EventFd;
pub use probe::{DESCRIPTORS_ITEM, ProbeItem, probe, raise_nofile, reserve_descriptors};
pub use sockets::{Parcel, Socket, listen};

use crate::io::{Close, Completion, Confirm, Errno, Half, Io, OpId, Refusal, Wait};
use crate::settings::Settings;
use buffers::BufferRing;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use ops::{DEFERRED, FORGOTTEN, Memory, OpTable, Owner, Sending};
use protocol::limits::COMPLETIONS_PER_ENTRY;
use protocol::log::Lent;
use protocol::slots::Key;
use refusals::Refusals;
use sockets::Descriptors;
use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

/// The only buffer group of a ring.
const BUFFER_GROUP: u16 = 0;
/// Rings of the bell heard at once; one that rang more often is heard again.
const WAKE_RINGS: usize = 32;
/// How long the drop of a ring waits for its operations to end before it leaks their memory instead of freeing it.
const REAP_MS_MAX: u64 = 5_000;

/// What is to be done with a socket after everything queued before it was submitted.
enum Ending {
    Shutdown(Socket, Half),
    Close(Socket, Close),
}

/// One ring with its operations, buffers, listeners and sockets.
pub struct UringIo {
    ring: IoUring,
    ops: OpTable,
    buffers: Rc<BufferRing>,
    /// `None`: stopped.
    listeners: Vec<Option<TcpListener>>,
    descriptors: Descriptors,
    /// In order of request.
    endings: Vec<Ending>,
    /// Entries the kernel would not take yet; submitted before anything newer. Empty but under memory pressure.
    unsubmitted: VecDeque<squeue::Entry>,
    wake: Arc<Bell>,
    wake_armed: bool,
    /// The kernel writes the bell's rings here while `wake_armed`.
    wake_rings: Box<Cell<[u8; WAKE_RINGS]>>,
    /// Entries taken out of the ring and not yet handled.
    entries: VecDeque<cqueue::Entry>,
    /// Deferred sends of which nothing has been told.
    deferred: Vec<OpId>,
    /// Some of them were too many for the last turn, or could not be known yet.
    deferred_left: bool,
    /// The one completion that was too many for the last turn.
    carried: Option<Completion<Socket, Buffer>>,
    /// Rung by the kernel for completions; made when somebody first wants to sleep elsewhere.
    completion_event: Option<EventFd>,
    /// Turns do not sleep: their owner does, until the event rings.
    sleeps_elsewhere: bool,
    sleep_owed: Option<Wait>,
    refusals: Refusals,
    spin_us: u64,
    enter_flags: EnterFlags,
}

impl UringIo {
    /// A ring for the calling thread, which alone may use it. `wake` is heard as [`Completion::Woken`].
    ///
    /// # Errors
    /// When the kernel refuses; says why and what to do.
    pub fn new(settings: &Settings, listeners: Vec<TcpListener>, wake: Arc<Bell>) -> Result<Self, RingError> {
        let ring = build_ring(settings.ring_depth)?;
        let buffers = BufferRing::new(settings.buffers, settings.buffer_bytes)
            .map_err(|error| RingError::of("mapping receive buffers", error))?;
        // SAFETY: the address is that of `count` zeroed entries, aligned to a page; they live until the Drop of `UringIo`
        // unregistered them or leaked them.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(buffers.address(), buffers.count(), BUFFER_GROUP, 0)
        }
        .map_err(|error| RingError::of("a ring of receive buffers", error))?;
        for listener in &listeners {
            // io_uring waits by poll only on blocking descriptors.
            listener
                .set_nonblocking(false)
                .map_err(|error| RingError::Other("making a listener blocking", error))?;
        }
        let mut enter_flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        if ring.params().is_feature_no_iowait() {
            // Waiting for clients is idleness, not I/O wait, to the accounting of CPU time.
            enter_flags |= EnterFlags::NO_IOWAIT;
        }
        Ok(UringIo {
            ring,
            ops: OpTable::new(),
            buffers,
            listeners: listeners.into_iter().map(Some).collect(),
            descriptors: Descriptors::default(),
            endings: Vec::new(),
            unsubmitted: VecDeque::new(),
            wake,
            wake_armed: false,
            wake_rings: Box::new(Cell::new([0; WAKE_RINGS])),
            entries: VecDeque::new(),
            deferred: Vec::new(),
            deferred_left: false,
            carried: None,
            completion_event: None,
            sleeps_elsewhere: false,
            sleep_owed: None,
            refusals: Refusals::default(),
            spin_us: u64::from(settings.spin_us),
            enter_flags,
        })
    }

    /// A bell that the kernel rings for completions while [`UringIo::sleep_elsewhere`] is on; another descriptor of the same
    /// one each time.
    ///
    /// # Errors
    /// No descriptors, or the kernel refuses.
    pub(crate) fn completion_event(&mut self) -> std::io::Result<EventFd> {
        match &self.completion_event {
            Some(event) => event.try_clone(),
            None => {
                let event = EventFd::for_ring()?;
                self.ring.submitter().register_eventfd(event.as_fd().as_raw_fd())?;
                self.event_on(false);
                self.completion_event.insert(event).try_clone()
            }
        }
    }

    /// From the next turn on, turns do not sleep: one that would have leaves a [`UringIo::sleep_owed`], and the completion
    /// event rings when there is something to take (and now and then when there is nothing).
    pub fn sleep_elsewhere(&mut self, elsewhere: bool) {
        assert!(!elsewhere || self.completion_event.is_some(), "nobody would ring");
        self.sleeps_elsewhere = elsewhere;
    }

    /// The sleep that the last turn was told to take and did not: nothing had completed.
    pub fn sleep_owed(&self) -> Option<Wait> {
        self.sleep_owed
    }

    /// Whether the kernel took nothing in the last turn.
    pub fn is_refused(&self) -> bool {
        self.refusals.go_on()
    }

    /// Operations in flight, the wake-up's own included.
    pub fn operations(&self) -> usize {
        self.ops.len()
    }

    /// Bytes of logs lent to the kernel.
    pub fn lent_bytes(&self) -> u64 {
        self.ops.lent_bytes()
    }

    /// Sockets made or accepted and not closed.
    pub fn sockets(&self) -> usize {
        self.descriptors.open()
    }

    fn start(&mut self, owner: Owner, fd: RawFd, memory: Memory, entry: squeue::Entry) -> OpId {
        if fd >= 0 {
            self.descriptors.operation_started(fd);
        }
        let op = self.ops.start(owner, fd, memory);
        self.push(entry.user_data(op.number()));
        op
    }

    /// Queues an entry. Whatever memory it names must be held by the op table, or be used up by its submission.
    fn push(&mut self, entry: squeue::Entry) {
        if self.unsubmitted.is_empty() {
            // SAFETY: what the entry points to is owned by the op table (or this struct) until the last completion.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: submit and go on. A refusal (EBUSY, EAGAIN) leaves the queue as it is, and the turn tries again.
            if self.enter(0, 0, None).is_ok()
                // SAFETY: as above.
                && unsafe { self.ring.submission().push(&entry) }.is_ok()
            {
                return;
            }
        }
        self.unsubmitted.push_back(entry);
    }

    /// Moves what is left over into the submission queue as far as it goes; true if nothing remains.
    fn push_unsubmitted(&mut self) -> bool {
        while let Some(entry) = self.unsubmitted.front() {
            // SAFETY: as in `push`; the owner is still in the op table because it has had no completion.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                return false;
            }
            self.unsubmitted.pop_front();
        }
        true
    }

    /// Submits everything queued, left-overs included, without sleeping.
    fn submit(&mut self) -> Result<(), Errno> {
        loop {
            let all = self.push_unsubmitted();
            let queued = self.ring.submission().len();
            if queued > 0 {
                self.enter(0, 0, None)?;
            }
            if all || self.ring.submission().len() == queued {
                return Ok(());
            }
        }
    }

    /// One io_uring_enter: submits, runs deferred work, waits for `completions` or the timeout.
    fn enter(&mut self, flags: u32, completions: u32, timeout: Option<Duration>) -> Result<(), Errno> {
        let queued = self.ring.submission().len() as u32;
        self.enter_with(queued, flags, completions, timeout)
    }

    /// The same; of what is queued, at most `queued` entries are submitted.
    fn enter_with(
        &mut self,
        queued: u32,
        flags: u32,
        completions: u32,
        timeout: Option<Duration>,
    ) -> Result<(), Errno> {
        let timespec = timeout.map(Timespec::from);
        let mut arguments = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            arguments = arguments.timespec(timespec);
        }
        let flags = self.enter_flags.bits() | flags;
        // SAFETY: the argument is the structure that EXT_ARG announces, and lives across the call with what it points to. The
        // entries submitted name memory that the op table owns.
        let result = unsafe { self.ring.submitter().enter(queued, completions, flags, Some(&arguments)) };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // The time is up; a signal came. The next turn tries again.
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                // So it does when nothing is taken just now, but not at once: see `back_off`.
                Some(errno) => match Refusals::of(errno) {
                    Some(refusal) => {
                        self.refusals.count(refusal);
                        Ok(())
                    }
                    None => Err(Errno(errno)),
                },
                None => Err(Errno(libc::EIO)),
            },
        }
    }

    /// The kernel took nothing in this turn. Until it is asked again, the shard sleeps for a moment, unless there is something
    /// to be taken from it or to be done elsewhere.
    fn back_off(&mut self, wait: Wait) -> Result<(), Errno> {
        let pause = self.refusals.pause();
        if self.refusals.is_news(self.now_us()) {
            let [memory, completions] = self.refusals.counts();
            log::warn!(
                "the ring takes nothing (so far {memory} times for want of memory, {completions} for completions in the way): \
                 it is asked again every millisecond"
            );
        }
        let pause = self.sleep_of(wait).map_or(pause, |left| left.min(pause));
        if pause.is_zero() || self.has_completions() {
            return Ok(());
        }
        // Nothing is submitted: that may be what is refused, and who refuses it does not look for completions either.
        let before = self.refusals.total();
        self.enter_with(0, 0, 1, Some(pause))?;
        if self.refusals.total() != before && !self.has_completions() {
            std::thread::sleep(pause);
        }
        Ok(())
    }

    /// Whether there are completions to be taken without asking the kernel.
    fn has_completions(&mut self) -> bool {
        self.carried.is_some() || !self.entries.is_empty() || !self.ring.completion().is_empty()
    }

    fn submit_and_wait(&mut self, wait: Wait) -> Result<(), Errno> {
        let all = self.push_unsubmitted();
        // Completions left over from the last turn (its batch was full) are work that is there already.
        let left_over = self.deferred_left || self.has_completions();
        let sleep = self.sleep_of(wait);
        if !all || left_over || sleep == Some(Duration::ZERO) {
            return self.enter_if_needed();
        }
        if self.sleeps_elsewhere || self.spin_us > 0 {
            let refusals = self.refusals.total();
            self.enter_if_needed()?;
            if !self.deferred.is_empty() || self.refusals.total() != refusals {
                // The submission has been a syscall of its own: what it says is known, and so is a refusal.
                return Ok(());
            }
            if self.spin_until_ready(wait) {
                return self.enter_if_needed();
            }
            if self.sleeps_elsewhere {
                return self.owe_sleep(wait);
            }
            return self.enter(0, 1, self.sleep_of(wait));
        }
        self.enter(0, 1, sleep)
    }

    /// Turns the event on and looks for the last time. Between sleeps it is off, because the kernel rings it for deferred
    /// work and once more for the completion that the work posts, which would end the next sleep at once.
    fn owe_sleep(&mut self, wait: Wait) -> Result<(), Errno> {
        self.event_on(true);
        // The kernel queues deferred work (a full barrier) and then reads the switch; here the switch is written and then,
        // behind a barrier, the kernel looks at its queue: one of the two sees the other.
        fence(Ordering::SeqCst);
        let refusals = self.refusals.total();
        self.enter(0, 0, None)?;
        // Whoever sleeps elsewhere would not ask again.
        let nothing = self.ring.completion().is_empty() && self.refusals.total() == refusals;
        if nothing {
            self.sleep_owed = Some(wait);
        } else {
            self.event_on(false);
        }
        Ok(())
    }

    fn event_on(&mut self, on: bool) {
        let queue = self.ring.completion();
        match on {
            true => queue.enable_eventfd(),
            false => queue.disable_eventfd(),
        }
    }

    /// How long to sleep from now; `None`: for ever.
    fn sleep_of(&self, wait: Wait) -> Option<Duration> {
        match wait {
            Wait::Not => Some(Duration::ZERO),
            Wait::Until(until_us) => Some(Duration::from_micros(until_us.saturating_sub(self.now_us()))),
            Wait::Forever => None,
        }
    }

    /// Submits and runs deferred work, if there is any.
    fn enter_if_needed(&mut self) -> Result<(), Errno> {
        let queue = self.ring.submission();
        let idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        if idle { Ok(()) } else { self.enter(0, 0, None) }
    }

    /// Watches for completions without a syscall for `spin_us`, but not beyond the end of the sleep; true if there are some.
    fn spin_until_ready(&mut self, wait: Wait) -> bool {
        let mut until_us = self.now_us() + self.spin_us;
        if let Wait::Until(limit_us) = wait {
            until_us = until_us.min(limit_us);
        }
        loop {
            let queue = self.ring.submission();
            let deferred = queue.taskrun() || queue.cq_overflow();
            drop(queue);
            if deferred || !self.ring.completion().is_empty() {
                return true;
            }
            if self.now_us() >= until_us {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Carries out shutdowns and closes. Entries of the submission queue are issued in order, and a close is issued inline
    /// (sockets have no `flush`), so a close needs no care; a shutdown is a syscall of its own and would overtake a send
    /// queued before it, so everything queued is submitted first: once per turn, however many sockets end.
    fn end_sockets(&mut self) -> Result<(), Errno> {
        if self.endings.iter().any(|ending| matches!(ending, Ending::Shutdown(..)))
            && !(self.unsubmitted.is_empty() && self.ring.submission().is_empty())
        {
            self.submit()?;
        }
        let mut endings = std::mem::take(&mut self.endings);
        for ending in endings.drain(..) {
            match ending {
                Ending::Shutdown(socket, half) => sockets::shutdown(socket, half),
                Ending::Close(socket, how) => {
                    if how == Close::Reset {
                        sockets::reset_on_close(socket);
                    }
                    self.descriptors.closed(socket.fd());
                    let entry = opcode::Close::new(Fd(socket.fd())).build();
                    self.push(entry.user_data(FORGOTTEN).flags(squeue::Flags::SKIP_SUCCESS));
                }
            }
        }
        self.endings = endings;
        Ok(())
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            self.wake_armed = true;
            let fd = Fd(self.wake.ear().as_raw_fd());
            let entry = opcode::Recv::new(fd, self.wake_rings.as_ptr().cast(), WAKE_RINGS as u32).build();
            self.start(Owner::Wake, -1, Memory::NOTHING, entry);
        }
    }

    /// Cancels everything and waits until the kernel holds none of our memory. False if it still does.
    fn reap(&mut self) -> bool {
        let deadline_us = self.now_us() + REAP_MS_MAX * 1000;
        let mut cancel = true;
        while self.ops.len() > 0 {
            if self.now_us() >= deadline_us || self.submit().is_err() {
                return false;
            }
            if cancel {
                let any = io_uring::types::CancelBuilder::any().all();
                self.push(opcode::AsyncCancel2::new(any).build().user_data(FORGOTTEN));
            }
            let refusals = self.refusals.total();
            let tried = self.enter(0, 1, Some(Duration::from_millis(10)));
            if tried.is_err() || (self.refusals.total() != refusals && self.back_off(Wait::Forever).is_err())
            {
                return false;
            }
            let before = self.ops.len();
            let UringIo { ring, ops, descriptors, entries, deferred, .. } = self;
            let ended = !ring.submission().cq_overflow() && ring.submission().is_empty();
            for entry in entries.drain(..).chain(ring.completion()) {
                let more = cqueue::more(entry.flags());
                let op = OpId::new(entry.user_data() & !DEFERRED);
                let Some((owner, _)) = ops.try_complete(op, more) else { continue };
                if let Owner::Accept { .. } = owner
                    && entry.result() >= 0
                {
                    descriptors.opened(entry.result());
                }
            }
            if ended && self.unsubmitted.is_empty() {
                // Of the others that were deferred, nothing is left to be said.
                for op in deferred.drain(..) {
                    ops.try_complete(op, false);
                }
            }
            cancel = self.ops.len() == before;
        }
        true
    }
}

impl Drop for UringIo {
    fn drop(&mut self) {
        // What was asked for is still done: an orderly close flushes, a shutdown sends its FIN.
        if self.end_sockets().is_err() || self.submit().is_err() || !self.reap() {
            log::error!("{} operations do not end: their memory is leaked", self.ops.len());
            std::mem::forget(std::mem::replace(&mut self.ops, OpTable::new()));
            std::mem::forget(Rc::clone(&self.buffers));
            std::mem::forget(std::mem::take(&mut self.wake_rings));
        } else if let Err(error) = self.ring.submitter().unregister_buf_ring(BUFFER_GROUP) {
            log::error!("the receive buffers cannot be unregistered ({error}): they are leaked");
            std::mem::forget(Rc::clone(&self.buffers));
        }
        self.descriptors.close_all();
    }
}

fn build_ring(depth: u32) -> Result<IoUring, RingError> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(depth.saturating_mul(COMPLETIONS_PER_ENTRY))
        .build(depth)
        .map_err(|error| RingError::of("a ring with SINGLE_ISSUER, DEFER_TASKRUN and SUBMIT_ALL", error))
}

impl Io for UringIo {
    type Socket = Socket;
    type Parcel = Parcel;
    type Buffer = Buffer;

    #[inline]
    fn prefetch(&self, address: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: it is a hint to the caches; an address that cannot be read is passed over (Intel SDM, PREFETCHh).
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }

    fn now_us(&self) -> u64 {
        clock_us()
    }

    fn turn(&mut self, wait: Wait, completions: &mut Vec<Completion<Socket, Buffer>>) -> Result<(), Errno> {
        if self.sleep_owed.take().is_some() {
            self.event_on(false);
        }
        let refusals = self.refusals.total();
        self.buffers.publish();
        self.arm_wake();
        self.end_sockets()?;
        self.submit_and_wait(wait)?;
        if self.refusals.total() == refusals {
            self.refusals.over();
        } else {
            self.back_off(wait)?;
        }
        self.take(completions);
        Ok(())
    }

    fn listeners(&self) -> usize {
        self.listeners.len()
    }

    fn accept(&mut self, listener: usize, multishot: bool) -> OpId {
        let Some(socket) = &self.listeners[listener] else { panic!("accept on a stopped listener") };
        let fd = Fd(socket.as_raw_fd());
        let entry = if multishot {
            opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build()
        } else {
            opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build()
        };
        self.start(Owner::Accept { listener: listener as u32 }, -1, Memory::NOTHING, entry)
    }

    fn stop_listening(&mut self, listener: usize) {
        self.listeners[listener] = None;
    }

    fn connect(&mut self, conn: Key, address: SocketAddr) -> Result<(Socket, OpId), Errno> {
        let socket = sockets::unconnected(address)
            .map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))?;
        self.descriptors.opened(socket.fd());
        let address = Box::new(socket2::SockAddr::from(address));
        let entry = opcode::Connect::new(Fd(socket.fd()), address.as_ptr().cast(), address.len()).build();
        let op = self.start(Owner::Connect(conn), socket.fd(), Memory::Address(Some(address)), entry);
        Ok((socket, op))
    }

    fn receive(&mut self, conn: Key, socket: Socket) -> OpId {
        let entry = opcode::RecvMulti::new(Fd(socket.fd()), BUFFER_GROUP).build();
        self.start(Owner::Receive(conn), socket.fd(), Memory::NOTHING, entry)
    }

    fn send(&mut self, conn: Key, socket: Socket, range: Lent, confirm: Confirm) -> OpId {
        let deferred = confirm == Confirm::Deferred;
        let sending = Sending::new(conn, range.len() as u32, deferred);
        let flags = if deferred { libc::MSG_DONTWAIT } else { 0 };
        let entry = send_entry(socket.fd(), range.cells(), flags);
        self.descriptors.operation_started(socket.fd());
        let op = self.ops.start(Owner::Send(sending), socket.fd(), Memory::Lent(range));
        if deferred {
            self.deferred.push(op);
            self.push(entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(op.number() | DEFERRED));
        } else {
            self.push(entry.user_data(op.number()));
        }
        op
    }

    fn watch_hangup(&mut self, conn: Key, socket: Socket) -> OpId {
        let events = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        // Multishot: a poll for RST alone would be ended by a FIN that is known already, since POLL_ADD always waits for
        // RDHUP too; this one tells the FIN and goes on.
        let entry = opcode::PollAdd::new(Fd(socket.fd()), events as u32).multi(true).build();
        self.start(Owner::Watch(conn), socket.fd(), Memory::NOTHING, entry)
    }

    fn cancel(&mut self, op: OpId) {
        if self.ops.contains(op) {
            if let Some(sending) = self.ops.sending(op) {
                sending.cancelled = true;
            }
            let entry = opcode::AsyncCancel::new(op.number()).build();
            self.push(entry.user_data(FORGOTTEN).flags(squeue::Flags::SKIP_SUCCESS));
        }
    }

    fn shutdown(&mut self, socket: Socket, half: Half) {
        self.descriptors.assert_open(socket.fd());
        self.endings.push(Ending::Shutdown(socket, half));
    }

    fn close(&mut self, socket: Socket, how: Close) {
        self.descriptors.closing(socket.fd());
        self.endings.push(Ending::Close(socket, how));
    }

    fn release(&mut self, socket: Socket) -> Parcel {
        self.descriptors.released(socket.fd());
        Parcel::new(socket)
    }

    fn adopt(&mut self, parcel: Parcel) -> Socket {
        let socket = parcel.open();
        self.descriptors.opened(socket.fd());
        socket
    }

    fn peer(&self, socket: Socket) -> Option<SocketAddr> {
        sockets::peer(socket)
    }

    fn acknowledged(&self, socket: Socket) -> Option<u64> {
        sockets::acknowledged(socket)
    }

    fn is_reset(&self, socket: Socket) -> bool {
        sockets::is_reset(socket)
    }

    fn buffers_free(&self) -> usize {
        self.buffers.free()
    }

    fn refusals(&self) -> [u64; Refusal::COUNT] {
        self.refusals.counts()
    }
}

fn send_entry(fd: RawFd, bytes: &[Cell<u8>], flags: i32) -> squeue::Entry {
    let length =
        u32::try_from(bytes.len()).unwrap_or_else(|_| unreachable!("a range of a log is 32 bits long"));
    opcode::Send::new(Fd(fd), bytes.as_ptr().cast(), length)
        .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL | flags)
        .build()
}

/// The one clock of the data plane: CLOCK_MONOTONIC in microseconds, the same for every shard of a machine.
fn clock_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer names `now`, which outlives the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    debug_assert_eq!(result, 0, "CLOCK_MONOTONIC exists");
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

#[cfg(test)]
pub(crate) mod tests;
