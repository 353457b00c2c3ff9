//! Mailboxes between a shard and the control thread: one bounded lock-free queue each way, and a bell to ring each side.
//! The shard never waits for the control thread: a report that finds its queue full is dropped and counted.
//!
//! And the mesh between shards: three bounded lock-free queues for each ordered pair, for clients, for what concerns mirrors and for
//! what concerns the places of durable streams, and a word in which each tells its load. Nobody waits for anybody: who finds a queue full keeps what it has,
//! and is rung when there is room, if it wants to be.

mod letters;
mod queue;

pub(crate) use letters::{About, Answering, Errand, ErrandLetter, Letter, Says, SharedPlace, Stage, Subject};
pub use letters::{Handed, Moved};

use crate::listing::{Inquiry, Page};
use crate::settings::{TlsSet, UpstreamSet};
use crate::stats::{Snapshot, StreamRecord};
use crate::uring::{Bell, EventFd};
use protocol::limits::{BALANCE_SLACK, HANDED_MAX, MIRROR_MESSAGES_MAX};
use protocol::planted::{Bug, is_planted};
use queue::{Inlet, Outlet, queue};
use rtrb::{Consumer, Producer, PushError, RingBuffer};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Commands waiting for one shard.
pub const COMMANDS_MAX: usize = 256;
/// Reports waiting for the control thread, per shard.
pub const REPORTS_MAX: usize = 8192;

/// What the control thread tells a shard.
#[derive(Clone, Debug)]
pub enum Command {
    /// The backends changed.
    Upstreams(Arc<UpstreamSet>),
    /// Certificates, keys or roots changed: connections that begin from now on use these.
    Tls(Arc<TlsSet>),
    /// Report a [`Snapshot`].
    Snapshot {
        /// Returned with it.
        ticket: u64,
    },
    /// Report a [`Page`].
    Streams {
        /// Returned with it.
        ticket: u64,
        /// Which.
        inquiry: Inquiry,
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
    /// As asked.
    Streams {
        /// Of the command.
        ticket: u64,
        /// Some of them.
        page: Box<Page>,
    },
    /// A stream ended.
    Ended(Box<StreamRecord>),
    /// A TLS handshake failed, or TLS broke off later. Not told of all when there are many; all are counted.
    TlsFailed(Box<TlsFailure>),
    /// The shard has drained or stopped, and its thread ends. `forced` streams were ended by the deadline.
    Left {
        /// Streams that did not end in peace.
        forced: u64,
    },
    /// The shard failed and is gone.
    Failed(String),
}

/// Why TLS with some peer failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFailure {
    /// The backend it was with; `None`: a client.
    pub upstream: Option<usize>,
    /// The peer's address.
    pub peer: Option<SocketAddr>,
    /// What was wrong, in words.
    pub error: String,
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

    /// Whether the bell has rung since the last call; for a shard whose ring is simulated.
    pub fn is_rung(&self) -> bool {
        self.shard_bell.take_rings()
    }

    /// The control thread's end is gone: nobody will ever say stop.
    pub fn is_abandoned(&self) -> bool {
        self.commands.is_abandoned()
    }
}

/// A load that takes no clients: not begun, leaving, or gone.
const CLOSED: u32 = u32::MAX;

/// How many clients a shard has. Written by its owner alone, when one comes or goes, on a cache line of its own (two, which
/// some CPUs fetch together); read by the others when they accept one.
#[repr(align(128))]
#[derive(Debug)]
struct Load(AtomicU32);

/// One shard's end of the mesh. `T` is what is handed over: a socket on its way.
#[derive(Debug)]
pub struct Neighbours<T> {
    own: usize,
    loads: Arc<[Load]>,
    /// What `loads` says of this shard.
    published: u32,
    /// By shard; none for itself.
    outward: Vec<Option<Outward<T>>>,
    inward: Vec<Inlet<Handed<T>>>,
    /// Of mirrors.
    letters: Vec<Inlet<Letter>>,
    /// Which of those queues is looked at first.
    letters_from: usize,
    /// Of durable streams.
    errands: Vec<Inlet<ErrandLetter>>,
    /// Something was taken out of a queue since the last [`Neighbours::ring`].
    taken: bool,
    /// Some bell is to be rung.
    unrung: bool,
}

#[derive(Debug)]
struct Outward<T> {
    queue: Outlet<Handed<T>>,
    letters: Outlet<Letter>,
    errands: Outlet<ErrandLetter>,
    bell: OnDrop<Bell>,
    unrung: bool,
}

/// Queues to a shard in which this one waits for room.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Awaited {
    pub(crate) clients: bool,
    pub(crate) errands: bool,
}

/// The mesh of the shards whose mailboxes these are, in their order. Each takes clients from its first
/// [`Neighbours::publish`] on.
pub fn neighbours<T>(ports: &[ShardPort]) -> Vec<Neighbours<T>> {
    neighbours_with(ports, (HANDED_MAX / ports.len().saturating_sub(1).max(1)).max(1))
}

/// The same, with room for so many on their way from each shard to each other, and for as many letters in proportion.
pub fn neighbours_with<T>(ports: &[ShardPort], room: usize) -> Vec<Neighbours<T>> {
    let shards = ports.len();
    let room_for_letters = room * (MIRROR_MESSAGES_MAX / HANDED_MAX);
    let loads: Arc<[Load]> = (0..shards).map(|_| Load(AtomicU32::new(CLOSED))).collect();
    let mut all: Vec<_> = (0..shards)
        .map(|own| Neighbours {
            own,
            loads: Arc::clone(&loads),
            published: CLOSED,
            outward: Vec::with_capacity(shards),
            inward: Vec::with_capacity(shards),
            letters: Vec::with_capacity(shards),
            letters_from: 0,
            errands: Vec::with_capacity(shards),
            taken: false,
            unrung: false,
        })
        .collect();
    for from in 0..shards {
        for (to, port) in ports.iter().enumerate() {
            let outward = (from != to).then(|| {
                let (clients, end) = queue(from, room);
                all[to].inward.push(end);
                let (letters, end) = queue(from, room_for_letters);
                all[to].letters.push(end);
                let (errands, end) = queue(from, room);
                all[to].errands.push(end);
                Outward {
                    queue: clients,
                    letters,
                    errands,
                    bell: OnDrop(port.bell(), Bell::ring),
                    unrung: false,
                }
            });
            all[from].outward.push(outward);
        }
    }
    all
}

impl<T> Neighbours<T> {
    /// The neighbour with the fewest clients, if it has fewer than `most`, room in its queue, and so many fewer than `own`
    /// that it should have the next one: more than one, and more than a sixteenth. What is on its way to it counts as its.
    pub fn emptier(&self, own: usize, most: usize) -> Option<usize> {
        let shards = self.loads.len();
        // From the next one on, so that not all prefer the first of equals.
        let others = (1..shards).map(|step| (self.own + step) % shards);
        let (least, to) = others
            .filter_map(|shard| {
                let load = self.loads[shard].0.load(Ordering::Relaxed);
                let queue = &self.outward[shard].as_ref()?.queue;
                (load != CLOSED && !queue.is_full()).then(|| (load as usize + queue.on_their_way(), shard))
            })
            .min_by_key(|&(load, _)| load)?;
        (least < most && own > least + 1 + least / 16).then_some(to)
    }

    /// Whether that neighbour has so many fewer clients than `own`; what is on its way to it counts as its.
    pub fn is_emptier(&self, shard: usize, own: usize) -> bool {
        let theirs = self.load_of(shard);
        self.is_open(shard) && own > theirs + 1 + theirs / 16
    }

    /// How many clients that neighbour has, and what is on its way to it.
    pub fn load_of(&self, shard: usize) -> usize {
        let on_their_way = self.outward[shard].as_ref().map_or(0, |outward| outward.queue.on_their_way());
        self.loads[shard].0.load(Ordering::Relaxed) as usize + on_their_way
    }

    /// Clients of a shard on average, if this one has `own`; of those that take any, and what is on its way to them is theirs.
    pub fn mean_load(&self, own: usize) -> usize {
        let others = (0..self.loads.len()).filter(|&shard| shard != self.own && self.is_open(shard));
        let (all, shards) =
            others.fold((own, 1), |(all, shards), shard| (all + self.load_of(shard), shards + 1));
        all / shards
    }

    /// The neighbour with the most clients is rung, if it has so many more than `own` that some should go: it will look.
    pub fn remind_fuller(&mut self, own: usize) {
        let others = (0..self.loads.len()).filter(|&shard| shard != self.own);
        let loads = others.map(|shard| (self.loads[shard].0.load(Ordering::Relaxed), shard));
        let Some((most, fuller)) = loads.filter(|&(load, _)| load != CLOSED).max() else { return };
        if let Some(Some(outward)) = self.outward.get_mut(fuller)
            && most as usize > own + own / 16 + 1 + BALANCE_SLACK
        {
            (outward.unrung, self.unrung) = (true, true);
        }
    }

    /// Hands one over; the neighbour hears of it with the next [`Neighbours::ring`].
    ///
    /// # Errors
    /// Gives it back when there is no room.
    pub fn hand(&mut self, to: usize, handed: Handed<T>) -> Result<(), Handed<T>> {
        let Some(outward) = &mut self.outward[to] else { return Err(handed) };
        (outward.unrung, self.unrung) = (true, true);
        outward.queue.push(handed)
    }

    /// Whether nothing more can be handed to that shard before it has taken something.
    pub fn is_full(&self, shard: usize) -> bool {
        self.outward.get(shard).and_then(Option::as_ref).is_none_or(|outward| outward.queue.is_full())
    }

    /// The same; if so, this shard is rung when that one has taken something.
    pub fn awaits_room(&self, shard: usize) -> bool {
        self.outward.get(shard).and_then(Option::as_ref).is_none_or(|outward| outward.queue.awaits_room())
    }

    /// For simulations: whether a queue of letters is full.
    pub(crate) fn is_full_of_letters(&self, shard: usize) -> bool {
        self.outward.get(shard).and_then(Option::as_ref).is_some_and(|outward| outward.letters.is_full())
    }

    /// For simulations: the same of what concerns the places of durable streams.
    pub(crate) fn is_full_of_errands(&self, shard: usize) -> bool {
        self.outward.get(shard).and_then(Option::as_ref).is_some_and(|outward| outward.errands.is_full())
    }

    /// For simulations: of which queues to that shard this one is rung when that one has taken something.
    pub(crate) fn awaited(&self, shard: usize) -> Awaited {
        let outward = self.outward.get(shard).and_then(Option::as_ref);
        outward.map_or_else(Awaited::default, |outward| Awaited {
            clients: outward.queue.is_awaited(),
            errands: outward.errands.is_awaited(),
        })
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.loads.len()
    }

    /// How many shards further that one is, counted round.
    pub fn distance_to(&self, shard: usize) -> u16 {
        let shards = self.shards();
        ((shard + shards - self.own) % shards) as u16
    }

    /// Which shard this end is.
    pub fn own(&self) -> usize {
        self.own
    }

    /// Whether that shard takes clients over; it may have stopped since.
    pub fn is_open(&self, shard: usize) -> bool {
        self.loads.get(shard).is_some_and(|load| load.0.load(Ordering::Relaxed) != CLOSED)
    }

    /// What the next [`Neighbours::take`] gives, unless more is handed over meanwhile.
    pub fn peek(&self) -> Option<&Handed<T>> {
        self.inward.iter().find_map(Inlet::peek)
    }

    /// The next of what was handed to this shard.
    pub fn take(&mut self) -> Option<Handed<T>> {
        let handed = self.inward.iter_mut().find_map(Inlet::take);
        self.taken |= handed.is_some();
        handed
    }

    /// Whether there is no room for a letter to that shard. If so, this shard is rung when that one has taken some; who is gone takes
    /// none.
    pub(crate) fn awaits_room_for_letters(&self, shard: usize) -> bool {
        let outward = self.outward.get(shard).and_then(Option::as_ref);
        outward.is_none_or(|outward| outward.letters.awaits_room() || outward.letters.is_abandoned())
    }

    /// Sends a letter, for which there is room; the neighbour hears of it with the next [`Neighbours::ring`].
    pub(crate) fn write(&mut self, to: usize, letter: Letter) {
        let Some(outward) = self.outward.get_mut(to).and_then(Option::as_mut) else { return };
        (outward.unrung, self.unrung) = (true, true);
        let result = outward.letters.push(letter);
        debug_assert!(result.is_ok(), "there was room, and nobody else fills the queue");
    }

    /// The next letter, and whose it is; from each shard in turn.
    pub(crate) fn read(&mut self) -> Option<(usize, Letter)> {
        let queues = self.letters.len();
        for step in 0..queues {
            let nth = (self.letters_from + step) % queues;
            let inlet = &mut self.letters[nth];
            if let Some(letter) = inlet.take() {
                (self.letters_from, self.taken) = (nth + 1, true);
                return Some((inlet.from, letter));
            }
        }
        None
    }

    /// The same of what concerns the places of durable streams; gives it back when there is no room, and this shard is rung when there
    /// is.
    pub(crate) fn write_errand(&mut self, to: usize, letter: ErrandLetter) -> Result<(), ErrandLetter> {
        let Some(outward) = self.outward.get_mut(to).and_then(Option::as_mut) else { return Err(letter) };
        if outward.errands.awaits_room() {
            return Err(letter);
        }
        (outward.unrung, self.unrung) = (true, true);
        outward.errands.push(letter)
    }

    /// Whether nobody will read what is written to that shard.
    pub(crate) fn is_gone(&self, shard: usize) -> bool {
        let outward = self.outward.get(shard).and_then(Option::as_ref);
        outward.is_none_or(|outward| outward.errands.is_abandoned())
    }

    /// The next of it, and whose it is; that of each shard is in order.
    pub(crate) fn read_errand(&mut self) -> Option<(usize, ErrandLetter)> {
        let read = self.errands.iter_mut().find_map(|inlet| Some((inlet.from, inlet.take()?)));
        self.taken |= read.is_some();
        read
    }

    /// Whether there is nothing to read of it.
    pub(crate) fn errands_read(&self) -> bool {
        self.errands.iter().all(Inlet::is_empty)
    }

    /// Shards that are gone, and whose letters have all been read.
    pub(crate) fn gone(&self) -> impl Iterator<Item = usize> {
        self.letters.iter().filter(|inlet| inlet.is_over()).map(|inlet| inlet.from)
    }

    /// How many this shard handed to others that have not taken them.
    pub fn on_their_way(&self) -> usize {
        self.outward.iter().flatten().map(|outward| outward.queue.on_their_way()).sum()
    }

    /// How many were handed to this shard and not taken.
    pub fn waiting(&self) -> usize {
        self.inward.iter().map(Inlet::len).sum()
    }

    /// Tells this shard's clients; `None`: it takes no more, and hands no more over.
    pub fn publish(&mut self, clients: Option<usize>) {
        let load = clients.map_or(CLOSED, |clients| u32::try_from(clients).unwrap_or(CLOSED).min(CLOSED - 1));
        if self.published != load {
            self.published = load;
            // Release: who sees `CLOSED` sees whatever was handed over before.
            self.loads[self.own].0.store(load, Ordering::Release);
            if load == CLOSED {
                // Who waits for it hears it.
                self.unrung = true;
                self.outward.iter_mut().flatten().for_each(|outward| outward.unrung = true);
            }
        }
    }

    /// Those who have not taken what they were handed are rung again.
    pub fn remind(&mut self) {
        for outward in self.outward.iter_mut().flatten() {
            let waits = outward.queue.on_their_way() > 0;
            outward.unrung |= waits;
            self.unrung |= waits;
        }
    }

    /// Rings whom something was handed to since the last call, and who waits for the room that there is since.
    pub fn ring(&mut self) {
        if std::mem::take(&mut self.taken) {
            self.tell_of_room();
        }
        if std::mem::take(&mut self.unrung) {
            for outward in self.outward.iter_mut().flatten() {
                if std::mem::take(&mut outward.unrung) {
                    outward.bell.ring();
                }
            }
        }
    }

    fn tell_of_room(&mut self) {
        let clients = self.inward.iter_mut().map(|inlet| (inlet.from, inlet.owes_a_ring()));
        let letters = self.letters.iter_mut().map(|inlet| (inlet.from, inlet.owes_a_ring()));
        let errands = self.errands.iter_mut().map(|inlet| (inlet.from, inlet.owes_a_ring()));
        for (from, owed) in clients.chain(letters).chain(errands) {
            if let Some(outward) =
                self.outward[from].as_mut().filter(|_| owed && !is_planted(Bug::RoomUntold))
            {
                (outward.unrung, self.unrung) = (true, true);
            }
        }
    }

    /// Every neighbour has said that it hands no more over, so that what is waiting now is all.
    pub fn hand_no_more(&self) -> bool {
        let mut loads = self.loads.iter().enumerate().filter(|(shard, _)| *shard != self.own);
        loads.all(|(_, load)| load.0.load(Ordering::Acquire) == CLOSED)
    }
}

impl<T> Drop for Neighbours<T> {
    fn drop(&mut self) {
        self.publish(None);
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn is_send<T: Send>(_: &T) {}

    impl<T: PartialEq> PartialEq for Handed<T> {
        fn eq(&self, other: &Self) -> bool {
            (&self.what, self.times, self.moved.is_none())
                == (&other.what, other.times, other.moved.is_none())
        }
    }

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

    fn once(what: u32) -> Handed<u32> {
        Handed { what, listener: 0, times: 1, moved: None }
    }

    fn mesh(shards: usize) -> Vec<Neighbours<u32>> {
        let ports: Vec<_> = (0..shards).map(|_| mailbox().unwrap().1).collect();
        neighbours(&ports)
    }

    #[test]
    fn the_least_loaded_neighbour_is_found_and_what_is_on_its_way_counts() {
        let mut mesh = mesh(3);
        assert_eq!(mesh[0].emptier(100, 1000), None, "nobody has begun");
        mesh[1].publish(Some(7));
        mesh[2].publish(Some(5));
        assert_eq!(mesh[0].emptier(100, 1000), Some(2));
        assert_eq!(mesh[0].emptier(6, 1000), None, "one more is no more than its share");
        assert_eq!(mesh[0].emptier(7, 1000), Some(2));
        assert_eq!(mesh[0].emptier(100, 5), None, "it has no free slot");
        for what in 0..3 {
            mesh[0].hand(2, once(what)).unwrap();
        }
        assert_eq!(mesh[0].emptier(100, 1000), Some(1));
        assert_eq!((mesh[0].on_their_way(), mesh[2].waiting()), (3, 3));
        assert_eq!([(); 4].map(|()| mesh[2].take()), [Some(once(0)), Some(once(1)), Some(once(2)), None]);
        assert_eq!((mesh[0].on_their_way(), mesh[2].waiting()), (0, 0));
        assert_eq!(mesh[0].emptier(100, 1000), Some(2));
    }

    #[test]
    fn a_difference_of_a_sixteenth_is_left_alone() {
        let mut mesh = mesh(2);
        mesh[1].publish(Some(1600));
        assert_eq!(mesh[0].emptier(1701, 10_000), None);
        assert_eq!(mesh[0].emptier(1702, 10_000), Some(1));
    }

    #[test]
    fn a_full_queue_gives_back_and_is_not_chosen() {
        let mut mesh = mesh(2);
        mesh[1].publish(Some(0));
        for what in 0..HANDED_MAX as u32 {
            assert_eq!(mesh[0].emptier(100_000, 100_000), Some(1));
            mesh[0].hand(1, once(what)).unwrap();
        }
        assert_eq!(mesh[0].emptier(100_000, 100_000), None);
        assert_eq!(mesh[0].hand(1, once(999)), Err(once(999)));
    }

    fn letter(stream: u64) -> Letter {
        Letter { subject: Subject::Stream(stream), opening: 0, says: Says::Left }
    }

    #[test]
    fn letters_come_from_each_shard_in_turn_and_in_order() {
        let mut mesh = mesh(3);
        for stream in [1, 2] {
            mesh[1].write(0, letter(stream));
            mesh[2].write(0, letter(10 + stream));
        }
        let mut read = || mesh[0].read().map(|(from, letter)| (from, letter.subject));
        let all = [(); 5].map(|()| read());
        let expected =
            [(1, 1), (2, 11), (1, 2), (2, 12)].map(|(from, stream)| (from, Subject::Stream(stream)));
        assert_eq!(all[..4], expected.map(Some));
        assert_eq!(all[4], None);
        let mut room = 0;
        while !mesh[0].awaits_room_for_letters(1) {
            mesh[0].write(1, letter(room));
            room += 1;
        }
        assert_eq!(room, MIRROR_MESSAGES_MAX as u64 / 2);
        assert!(!mesh[0].awaits_room_for_letters(2), "the others have room");
        assert!(
            mesh[0].awaits_room_for_letters(0) && mesh[0].awaits_room_for_letters(3),
            "there are none such"
        );
    }

    #[test]
    fn who_is_gone_is_known_when_its_last_letter_was_read() {
        let ports: Vec<_> = (0..2).map(|_| mailbox().unwrap().1).collect();
        let mut mesh = neighbours::<u32>(&ports);
        let mut leaving = mesh.remove(1);
        leaving.write(0, letter(7));
        assert_eq!(mesh[0].gone().next(), None);
        drop(leaving);
        assert_eq!(mesh[0].gone().next(), None, "it has said something");
        assert!(matches!(mesh[0].read(), Some((1, Letter { subject: Subject::Stream(7), .. }))));
        assert_eq!(mesh[0].gone().collect::<Vec<_>>(), [1]);
        assert!(mesh[0].awaits_room_for_letters(1), "nobody takes any");
    }

    #[test]
    fn the_room_for_what_is_handed_to_a_shard_does_not_grow_with_the_shards() {
        for shards in [3, 10, 40] {
            let mesh = mesh(shards);
            let room: usize = mesh[0].inward.iter().map(Inlet::capacity).sum();
            assert!((HANDED_MAX / 2..=HANDED_MAX).contains(&room), "{room} for {shards} shards");
        }
    }

    #[test]
    fn who_leaves_takes_no_more_and_what_it_handed_over_before_is_seen() {
        let mut mesh = mesh(2);
        let mut leaving = mesh.remove(1);
        mesh[0].publish(Some(50));
        leaving.publish(Some(1));
        assert_eq!(mesh[0].emptier(50, 1000), Some(1));
        assert!(!mesh[0].hand_no_more());
        leaving.hand(0, once(5)).unwrap();
        drop(leaving);
        assert_eq!(mesh[0].emptier(50, 1000), None);
        assert!(mesh[0].hand_no_more());
        assert_eq!((mesh[0].take(), mesh[0].take()), (Some(once(5)), None));
    }
}
