//! An eventfd: rung by the kernel or a thread, heard by a poller or a READ. Ringing twice before it is heard is heard once.

use glommio::io::BufferedFile;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

/// A counting eventfd.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    /// One to be read through io_uring, which must not be O_NONBLOCK: io_uring would fail its READ with EAGAIN instead of
    /// waiting for the bell.
    ///
    /// # Errors
    /// No descriptors, no memory.
    pub(crate) fn for_ring() -> io::Result<Self> {
        Self::with_flags(libc::EFD_CLOEXEC)
    }

    /// One to be polled (epoll, tokio's `AsyncFd`) and cleared by [`EventFd::clear`].
    ///
    /// # Errors
    /// No descriptors, no memory.
    pub(crate) fn for_poller() -> io::Result<Self> {
        Self::with_flags(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
    }

    fn with_flags(flags: i32) -> io::Result<Self> {
        // SAFETY: eventfd(2) takes no pointers.
        let fd = unsafe { libc::eventfd(0, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and nobody else knows it.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Rings. Costs one syscall; never blocks: the counter would have to reach 2^64 - 1.
    pub(crate) fn ring(&self) {
        let one = 1_u64;
        // SAFETY: the pointer and the length name `one`, which outlives the call.
        let written = unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
        // EAGAIN means that the counter is full: the bell rings already.
        debug_assert!(
            written == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock,
            "an eventfd accepts 8 bytes"
        );
    }

    /// Makes it silent; true if it had been rung. Only for [`EventFd::for_poller`]: the other kind would block.
    pub(crate) fn clear(&self) -> bool {
        let mut count = 0_u64;
        // SAFETY: the pointer and the length name `count`, which outlives the call.
        let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
        read == 8
    }

    /// Waits until it has been rung, at most `timeout_ms`; true if so. Leaves it rung.
    pub(crate) fn wait(&self, timeout_ms: u16) -> bool {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer names one pollfd, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, i32::from(timeout_ms)) == 1 }
    }

    /// To be heard through glommio's reactor, by `read_at(0, 8)`. Inside an executor only.
    pub(crate) fn into_file(self) -> BufferedFile {
        // SAFETY: the descriptor is open and its ownership moves into the file.
        unsafe { BufferedFile::from_raw_fd(self.0.into_raw_fd()) }
    }

    /// Another descriptor of the same bell.
    ///
    /// # Errors
    /// No descriptors.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(EventFd)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
