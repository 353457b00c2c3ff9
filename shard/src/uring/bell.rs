//! The bell of a shard's mailbox: rung by any thread, heard by the data ring.
//!
//! Not an eventfd: the kernel does not ring a ring's completion event from inside another eventfd's write(2) but puts it off,
//! and loses it from the second time on (Linux 6.18, io_uring/eventfd.c: `IO_EVENTFD_OP_SIGNAL_BIT` is set and never
//! cleared), so that a shard asleep in glommio would not be woken. A socket pair has no such trouble.

use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Rings from any thread; ringing twice before it is heard may be heard once.
#[derive(Debug)]
pub struct Bell {
    /// O_NONBLOCK: ringing never waits.
    rope: UnixStream,
    /// Not O_NONBLOCK: io_uring waits by poll only on blocking descriptors.
    ear: UnixStream,
}

impl Bell {
    /// A new one.
    ///
    /// # Errors
    /// No descriptors (it takes two), no memory.
    pub fn new() -> io::Result<Self> {
        let (rope, ear) = UnixStream::pair()?;
        rope.set_nonblocking(true)?;
        Ok(Bell { rope, ear })
    }

    /// Rings. Costs one syscall; never blocks.
    pub fn ring(&self) {
        if let Err(error) = (&self.rope).write(&[1]) {
            // A full buffer rings already; the other end is open as long as this one.
            debug_assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted), "{error}");
        }
    }

    /// Whether it was rung since the last call, where no ring listens.
    pub(crate) fn take_rings(&self) -> bool {
        let mut rings = [0_u8; 64];
        let mut heard = false;
        // SAFETY: the pointer and the length name `rings`, which outlives the call.
        while unsafe {
            libc::recv(self.ear.as_raw_fd(), rings.as_mut_ptr().cast(), rings.len(), libc::MSG_DONTWAIT)
        } > 0
        {
            heard = true;
        }
        heard
    }

    /// Where to receive its rings.
    pub(super) fn ear(&self) -> BorrowedFd<'_> {
        self.ear.as_fd()
    }
}
