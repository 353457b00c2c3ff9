//! Whether a file is still the one that was read.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What tells two states of a file apart without reading it. Links are followed: certbot and Kubernetes swap them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp(Option<State>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct State {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    /// Of a file as it is now; one that is not there has a stamp, too.
    pub(super) fn of(path: &Path) -> Stamp {
        let state = std::fs::metadata(path).map(|metadata| State {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        });
        Stamp(state.ok())
    }
}
