//! Why a ring cannot be made here, and what to do about it.

use std::fmt;

/// A shard's ring could not be made.
#[derive(Debug)]
pub enum RingError {
    /// io_uring is switched off here (EPERM, ENOSYS).
    Disabled(std::io::Error),
    /// Too little memory, or the locked-memory limit is too low (ENOMEM).
    Memory(std::io::Error),
    /// The kernel does not know what is needed (EINVAL).
    KernelTooOld {
        /// What was asked for.
        missing: &'static str,
        /// Release of the running kernel.
        found: String,
    },
    /// No descriptors left (EMFILE, ENFILE).
    Descriptors(std::io::Error),
    /// Anything else.
    Other(&'static str, std::io::Error),
}

impl RingError {
    pub(super) fn of(doing: &'static str, error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => RingError::Disabled(error),
            Some(libc::ENOMEM) => RingError::Memory(error),
            Some(libc::EINVAL) => {
                RingError::KernelTooOld { missing: doing, found: super::probe::kernel_release() }
            }
            Some(libc::EMFILE | libc::ENFILE) => RingError::Descriptors(error),
            _ => RingError::Other(doing, error),
        }
    }
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingError::Disabled(error) => write!(
                f,
                "io_uring is disabled here ({error}): set the sysctl kernel.io_uring_disabled to 0, and allow \
                 io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
            ),
            RingError::Memory(error) => write!(
                f,
                "no memory for the ring ({error}): raise the locked-memory limit to at least 512 KiB (ulimit -l, LimitMEMLOCK=), \
                 or lower ring_depth and buffers"
            ),
            RingError::KernelTooOld { missing, found } => {
                write!(f, "the kernel refuses {missing}: Linux 6.1 or newer is needed, this is {found}")
            }
            RingError::Descriptors(error) => {
                write!(
                    f,
                    "no file descriptor for the ring ({error}): raise the limit (ulimit -n, LimitNOFILE=)"
                )
            }
            RingError::Other(doing, error) => write!(f, "{doing}: {error}"),
        }
    }
}

impl std::error::Error for RingError {}
