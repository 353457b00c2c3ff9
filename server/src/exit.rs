//! How the process ends: exit codes as in sysexits.h, and the one error type of the operator's side.

use std::fmt;
use std::process::ExitCode;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// All streams ended in peace.
    Success = 0,
    /// Streams were ended by the drain deadline or by a second signal.
    Forced = 1,
    /// The command line is wrong.
    Usage = 64,
    /// What a data directory holds is damaged (`tokenring streams verify`).
    Damaged = 65,
    /// An address cannot be bound, another process has the data directory, or the kernel refuses io_uring.
    Unavailable = 69,
    /// A shard failed; a mistake of ours.
    Internal = 70,
    /// The configuration is wrong.
    Configuration = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Ends the process; the message says what was expected and what to do.
#[derive(Debug)]
pub(crate) struct Fatal {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Fatal {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Fatal { exit, message: message.into() }
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Fatal::new(Exit::Unavailable, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Fatal::new(Exit::Internal, message)
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
