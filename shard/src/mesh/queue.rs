//! A bounded lock-free queue from one shard to another. Who finds it full says so, and is rung when something was taken out of it:
//! nobody looks again and again.
//!
//! ```text
//!   outlet: full ─► awaited ─► fence ─► still full? ─► sleeps            inlet: takes ─► fence ─► awaited? ─► rings
//! ```
//! Whichever of the two fences comes first, the other side sees what was done before it: either the outlet finds room, or the
//! inlet finds that it is awaited.

use rtrb::{Consumer, Producer, PushError, RingBuffer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Where a shard puts in what is for another.
#[derive(Debug)]
pub(super) struct Outlet<M> {
    queue: Producer<M>,
    /// Somebody waits for room. Set at this end, cleared at the other.
    awaited: Arc<AtomicBool>,
}

/// Where a shard takes out what comes from another.
#[derive(Debug)]
pub(super) struct Inlet<M> {
    /// Which shard it comes from.
    pub(super) from: usize,
    queue: Consumer<M>,
    awaited: Arc<AtomicBool>,
    /// Something was taken since the last [`Inlet::owes_a_ring`].
    taken: bool,
}

/// A queue from shard `from`, with room for so many.
pub(super) fn queue<M>(from: usize, room: usize) -> (Outlet<M>, Inlet<M>) {
    let (outlet, inlet) = RingBuffer::new(room);
    let awaited = Arc::new(AtomicBool::new(false));
    (
        Outlet { queue: outlet, awaited: Arc::clone(&awaited) },
        Inlet { from, queue: inlet, awaited, taken: false },
    )
}

impl<M> Outlet<M> {
    pub(super) fn push(&mut self, message: M) -> Result<(), M> {
        self.queue.push(message).map_err(|PushError::Full(message)| message)
    }

    pub(super) fn is_full(&self) -> bool {
        self.queue.is_full()
    }

    /// Whether it is full; if so, this shard is rung when something has been taken out of it.
    pub(super) fn awaits_room(&self) -> bool {
        if !self.queue.is_full() {
            return false;
        }
        self.awaited.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.queue.is_full()
    }

    /// Whether it is full and this shard will be rung for it.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed)
    }

    /// How many were put in and not taken out.
    pub(super) fn on_their_way(&self) -> usize {
        self.queue.buffer().capacity() - self.queue.slots()
    }

    /// The other end is gone: nobody takes anything any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.queue.is_abandoned()
    }
}

impl<M> Inlet<M> {
    pub(super) fn take(&mut self) -> Option<M> {
        let message = self.queue.pop().ok()?;
        self.taken = true;
        Some(message)
    }

    /// What the next [`Inlet::take`] gives.
    pub(super) fn peek(&self) -> Option<&M> {
        self.queue.peek().ok()
    }

    /// Whether the other end waits for the room that there is since the last call.
    pub(super) fn owes_a_ring(&mut self) -> bool {
        if !std::mem::take(&mut self.taken) {
            return false;
        }
        fence(Ordering::SeqCst);
        self.awaited.load(Ordering::Relaxed) && self.awaited.swap(false, Ordering::Relaxed)
    }

    pub(super) fn len(&self) -> usize {
        self.queue.slots()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The other end is gone, and everything that it has put in was taken.
    pub(super) fn is_over(&self) -> bool {
        self.queue.is_abandoned() && {
            // What was put in before the end is seen with it.
            fence(Ordering::Acquire);
            self.queue.is_empty()
        }
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.queue.buffer().capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn who_found_no_room_is_owed_one_ring_when_something_was_taken() {
        let (mut outlet, mut inlet) = queue(0, 2);
        outlet.push(1).unwrap();
        assert!(!outlet.awaits_room() && !inlet.owes_a_ring(), "there is room");
        inlet.take().unwrap();
        assert!(!inlet.owes_a_ring(), "nobody waits");
        outlet.push(2).unwrap();
        outlet.push(3).unwrap();
        assert!(outlet.push(4).is_err() && outlet.awaits_room() && outlet.is_awaited());
        assert!(!inlet.owes_a_ring(), "nothing was taken since");
        inlet.take().unwrap();
        inlet.take().unwrap();
        assert!(inlet.owes_a_ring() && !inlet.owes_a_ring() && !outlet.is_awaited());
    }

    /// One place, two threads, each of which sleeps until the other rings it: a ring that is lost ends in a hang.
    #[test]
    fn no_ring_for_room_is_lost_between_threads() {
        const MESSAGES: u64 = 100_000;
        let (mut outlet, mut inlet) = queue(0, 1);
        let rings = Arc::new(AtomicU64::new(0));
        let taker = std::thread::spawn({
            let (rings, sender) = (Arc::clone(&rings), std::thread::current());
            move || {
                for expected in 0..MESSAGES {
                    let got = std::iter::repeat_with(|| inlet.take()).find_map(|got| {
                        got.or_else(|| {
                            std::thread::yield_now();
                            None
                        })
                    });
                    assert_eq!(got, Some(expected));
                    if inlet.owes_a_ring() {
                        rings.fetch_add(1, Ordering::Relaxed);
                        sender.unpark();
                    }
                }
            }
        });
        for message in 0..MESSAGES {
            while outlet.awaits_room() {
                std::thread::park();
            }
            outlet.push(message).unwrap();
        }
        taker.join().unwrap();
        assert!(rings.load(Ordering::Relaxed) > 0, "it never had to wait");
    }
}
