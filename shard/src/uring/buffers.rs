//! Receive buffers lent to the kernel as one provided-buffer ring; each comes back by dropping its [`Buffer`].
//!
//! The kernel is shown only a window of the buffers: those that were used last. So an idle or quiet shard touches few pages
//! and stays within its caches, and one fast sender is given no more than a window in one turn (its receive ends for want
//! of buffers and is armed again in the next). The window doubles when many connections together find it too small, and
//! halves when little of it has been needed for long. Buffers given back during a turn are published to the kernel
//! together, by one store, before the next submission.

use io_uring::types::BufRingEntry;
use std::cell::{Cell, RefCell};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

/// The most buffers one ring can have: its tail and its ids are 16 bits (io_uring_register_buf_ring(3)).
pub(super) const BUFFERS_MAX: u16 = 1 << 15;

/// An anonymous private mapping: page-aligned, zero, and without physical memory until touched.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast())
            .map(|start| Mapping { start, bytes })
            .ok_or(io::ErrorKind::OutOfMemory.into())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one mmap returned, and the only owner of its addresses is going away.
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(result, 0, "unmapping what was mapped");
    }
}

/// The ring of descriptors that the kernel takes buffers from, and the buffers.
pub(super) struct BufferRing {
    entries: Mapping,
    data: Mapping,
    /// A power of two, `<= BUFFERS_MAX`.
    count: u16,
    buffer_bytes: u32,
    /// Where the next buffer is put; runs ahead of what is published.
    tail: Cell<u16>,
    published: Cell<u16>,
    /// Buffers held by [`Buffer`]s, `0 <= out <= count`.
    out: Cell<u16>,
    /// Buffers that nobody has, the last used on top. `shown + spare + out = count`.
    spare: RefCell<Vec<u16>>,
    /// Buffers the kernel has, or will have after the next publication.
    shown: Cell<u16>,
    /// How many it is shown, `WINDOW_MIN.min(count) <= window <= count`.
    window: Cell<u16>,
    /// The most that one turn used since the window was last reconsidered, and turns since then.
    peak: Cell<u16>,
    turns: Cell<u16>,
}

/// Buffers shown at least: a quiet shard's working set, and what one sender may deliver in a turn.
const WINDOW_MIN: u16 = 64;
/// Turns with receives after which a window that was too large is halved.
const WINDOW_TURNS: u16 = 1024;

impl BufferRing {
    /// Memory for `count` buffers of `buffer_bytes`, all of them put into the ring. To be registered by the caller.
    pub(super) fn new(count: u16, buffer_bytes: u32) -> io::Result<Rc<Self>> {
        assert!(
            count.is_power_of_two() && count <= BUFFERS_MAX,
            "the kernel masks positions by the ring's size"
        );
        assert!(
            buffer_bytes > 0 && i32::try_from(buffer_bytes).is_ok(),
            "a receive reports its length as i32"
        );
        let ring = BufferRing {
            entries: Mapping::new(usize::from(count) * size_of::<BufRingEntry>())?,
            data: Mapping::new(usize::from(count) * buffer_bytes as usize)?,
            count,
            buffer_bytes,
            tail: Cell::new(0),
            published: Cell::new(0),
            out: Cell::new(0),
            spare: RefCell::new((0..count).rev().collect()),
            shown: Cell::new(0),
            window: Cell::new(WINDOW_MIN.min(count)),
            peak: Cell::new(0),
            turns: Cell::new(0),
        };
        ring.publish();
        Ok(Rc::new(ring))
    }

    /// Address of the ring, for its registration.
    pub(super) fn address(&self) -> u64 {
        self.entries.start.as_ptr() as u64
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// Buffers that hold nothing.
    pub(super) fn free(&self) -> usize {
        usize::from(self.count - self.out.get())
    }

    fn put(&self, id: u16) {
        let position = usize::from(self.tail.get() & (self.count - 1));
        // SAFETY: `position < count` lies inside the mapping, which is aligned to a page and zeroed. The kernel reads an
        // entry only below the published tail, and this one is above it. The tail itself overlays the last field of
        // entry 0, which these setters leave alone.
        unsafe {
            let entry = &mut *self.entries.start.cast::<BufRingEntry>().add(position).as_ptr();
            entry.set_addr(self.memory(id).as_ptr() as u64);
            entry.set_len(self.buffer_bytes);
            entry.set_bid(id);
        }
        self.tail.set(self.tail.get().wrapping_add(1));
    }

    /// After a turn that received: `connections` were heard, and `short` says that one found no buffer.
    pub(super) fn reconsider(&self, connections: usize, short: bool) {
        let window = self.window.get();
        let used = window.saturating_sub(self.shown.get());
        self.peak.set(self.peak.get().max(used));
        self.turns.set(self.turns.get() + 1);
        if short && connections * 2 >= usize::from(window) {
            self.window.set(window.saturating_mul(2).min(self.count));
        } else if self.turns.get() < WINDOW_TURNS {
            return;
        } else if self.peak.get() < window / 4 {
            self.window.set((window / 2).max(WINDOW_MIN.min(self.count)));
        }
        self.peak.set(0);
        self.turns.set(0);
    }

    /// Fills the window with what came back since the last call, and shows it to the kernel.
    pub(super) fn publish(&self) {
        let mut spare = self.spare.borrow_mut();
        while self.shown.get() < self.window.get()
            && let Some(id) = spare.pop()
        {
            self.put(id);
            self.shown.set(self.shown.get() + 1);
        }
        let tail = self.tail.get();
        if tail == self.published.replace(tail) {
            return;
        }
        // SAFETY: entry 0 is inside the mapping; the field is 2-byte aligned, lives as long as the mapping, and is written
        // by nobody else (the kernel only reads it). Release: the entries must be visible before the tail.
        unsafe {
            let field = BufRingEntry::tail(self.entries.start.as_ptr().cast()).cast::<AtomicU16>();
            (*field).store(tail, Ordering::Release);
        }
    }

    fn memory(&self, id: u16) -> NonNull<u8> {
        assert!(id < self.count, "the kernel names only buffers it was given");
        // SAFETY: `id < count`, so the offset lies inside the mapping.
        unsafe { self.data.start.add(usize::from(id) * self.buffer_bytes as usize) }
    }

    /// The buffer that a completion names, filled with `bytes`.
    pub(super) fn take(self: &Rc<Self>, id: u16, bytes: u32) -> Buffer {
        assert!(bytes <= self.buffer_bytes, "the kernel filled more than the buffer");
        assert!(self.out.get() < self.count, "more buffers taken than there are");
        self.out.set(self.out.get() + 1);
        self.shown.set(self.shown.get() - 1);
        Buffer { memory: self.memory(id), ring: Rc::clone(self), id, bytes }
    }
}

/// Received bytes, in a buffer that goes back to its ring on drop.
pub struct Buffer {
    ring: Rc<BufferRing>,
    memory: NonNull<u8>,
    id: u16,
    bytes: u32,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `bytes <= buffer_bytes`, the mapping lives as long as `ring`, and the kernel writes the buffer only after it
        // was put back, which takes dropping `self`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes as usize) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; and between the kernel's completion and this buffer's drop nobody else reads or writes it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes as usize) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.ring.out.set(self.ring.out.get() - 1);
        self.ring.spare.borrow_mut().push(self.id);
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({}: {} bytes)", self.id, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_free_again_and_published_with_the_others_of_its_turn() {
        let ring = BufferRing::new(4, 64).unwrap();
        assert_eq!((ring.free(), ring.published.get()), (4, 4));
        let (first, second) = (ring.take(0, 64), ring.take(1, 0));
        assert_eq!((ring.free(), first.len(), second.len()), (2, 64, 0));
        drop((first, second));
        assert_eq!((ring.free(), ring.published.get()), (4, 4), "not before the next publication");
        ring.publish();
        assert_eq!(ring.published.get(), 6);
    }

    #[test]
    fn the_kernel_is_shown_a_window_of_what_was_used_last() {
        let ring = BufferRing::new(256, 16).unwrap();
        assert_eq!((ring.shown.get(), ring.published.get()), (WINDOW_MIN, WINDOW_MIN));
        // One connection that uses the whole window is given no larger one.
        let all: Vec<_> = (0..WINDOW_MIN).map(|id| ring.take(id, 1)).collect();
        ring.reconsider(1, true);
        drop(all);
        ring.publish();
        assert_eq!((ring.shown.get(), ring.free()), (WINDOW_MIN, 256));
        assert!(ring.spare.borrow().iter().all(|&id| id >= WINDOW_MIN), "the same ones are shown again");
        // Many that find it too small together get twice as much, up to all there are.
        for window in [128, 256, 256] {
            ring.reconsider(200, true);
            ring.publish();
            assert_eq!(ring.shown.get(), window);
        }
        // And it shrinks when little of it has been needed for long.
        for _ in 0..2 * WINDOW_TURNS {
            ring.reconsider(1, false);
        }
        assert_eq!(ring.window.get(), WINDOW_MIN);
    }

    #[test]
    fn positions_wrap_around_the_16_bits_of_the_tail() {
        let ring = BufferRing::new(2, 16).unwrap();
        for _ in 0..40_000 {
            drop((ring.take(0, 1), ring.take(1, 1)));
            ring.publish();
        }
        assert_eq!(ring.free(), 2);
    }

    #[test]
    fn a_buffer_may_outlive_everything_else() {
        let ring = BufferRing::new(2, 16).unwrap();
        let buffer = ring.take(1, 16);
        drop(ring);
        assert_eq!(buffer.to_vec(), [0; 16]);
    }
}
