//! The data directory: one process at a time, and what it holds read at the start (shards write it later, see `shard::disk`).

use crate::exit::{Exit, Fatal};
use protocol::durable::journal::{Finding, Recovered, Recovery, segment_name, segment_number};
use rustix::fs::{Access, FlockOperation, access, flock};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Held by the process that writes the directory; says its id.
const LOCK: &str = "lock";
/// Only the server's user: what is in there was said by its clients.
const MODE: u32 = 0o700;
const LOCK_MODE: u32 = 0o600;
/// Of a directory that is read while a server writes it, segments may go meanwhile; then it is read again.
const ATTEMPTS: usize = 5;
/// Findings logged one by one.
const FINDINGS_LOGGED: usize = 100;

/// A data directory that is this process's own for as long as this lives.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

fn fatal(path: &Path, why: impl std::fmt::Display) -> Fatal {
    Fatal::new(Exit::Configuration, format!("data directory {}: {why}", path.display()))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl DataDir {
    /// Makes it if it is not there, and takes it.
    pub(crate) fn open(path: &Path) -> Result<Self, Fatal> {
        match DirBuilder::new().mode(MODE).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(fatal(path, format_args!("cannot be made: {error}")));
            }
            Ok(()) => {
                // Or the loss of power could take it back, with all that was acknowledged in it.
                let entry = File::open(parent(path)).and_then(|parent| parent.sync_all());
                entry.map_err(|error| fatal(path, format_args!("cannot be made to last: {error}")))?;
            }
            _ => {}
        }
        if !path.is_dir() {
            return Err(fatal(path, "not a directory"));
        }
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(LOCK_MODE)
            .open(path.join(LOCK))
            .map_err(|error| fatal(path, format_args!("cannot be written: {error}")))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            lock.read_to_string(&mut holder).unwrap_or_default();
            return Err(Fatal::unavailable(format!(
                "data directory {}: another process writes it (id {}); each needs one of its own",
                path.display(),
                holder.trim()
            )));
        }
        // The lock counts, not what is in it. But a directory that takes nothing is told of now and not with the first append.
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .and_then(|()| lock.sync_all())
            .map_err(|error| fatal(path, format_args!("cannot be written: {error}")))?;
        Ok(DataDir { path: path.to_owned(), _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds; damage is logged.
    pub(crate) fn recover(&self) -> Result<Recovered, Fatal> {
        let recovered = read(&self.path)?;
        for finding in recovered.findings.iter().take(FINDINGS_LOGGED) {
            let text = describe(&self.path, finding);
            if finding.lost { log::error!("{text}") } else { log::warn!("{text}") }
        }
        if recovered.findings.len() > FINDINGS_LOGGED {
            log::error!(
                "{} findings more: `tokenring streams verify` shows all",
                recovered.findings.len() - FINDINGS_LOGGED
            );
        }
        log::info!(
            "{} durable streams in {} ({} records, {} segments, {} bytes)",
            recovered.streams().count(),
            self.path.display(),
            recovered.records,
            recovered.segments(),
            recovered.bytes(),
        );
        Ok(recovered)
    }
}

/// Where something was found, and what.
pub(crate) fn describe(path: &Path, finding: &Finding) -> String {
    format!("{}:{}: {}", path.join(segment_name(finding.segment)).display(), finding.at, finding.what)
}

/// Whether a server could take it, without changing anything.
pub(crate) fn check(path: &Path) -> Result<(), Fatal> {
    let writable = |path: &Path| access(path, Access::WRITE_OK | Access::EXEC_OK);
    if path.exists() {
        if !path.is_dir() {
            return Err(fatal(path, "not a directory"));
        }
        return writable(path).map_err(|error| fatal(path, format_args!("cannot be written: {error}")));
    }
    let parent = parent(path);
    writable(parent)
        .map_err(|error| fatal(path, format_args!("cannot be made: {}: {error}", parent.display())))
}

/// What a directory holds, whoever writes it.
pub(crate) fn read(path: &Path) -> Result<Recovered, Fatal> {
    for _ in 1..ATTEMPTS {
        match try_read(path) {
            // A segment went while it was read.
            Err((error, _)) if error.kind() == ErrorKind::NotFound && path.is_dir() => {}
            other => {
                return other
                    .map_err(|(error, file)| fatal(path, format_args!("{file}cannot be read: {error}")));
            }
        }
    }
    try_read(path).map_err(|(error, file)| fatal(path, format_args!("{file}cannot be read: {error}")))
}

fn try_read(path: &Path) -> Result<Recovered, (std::io::Error, String)> {
    let whole = |error| (error, String::new());
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(path).map_err(whole)? {
        segments.extend(entry.map_err(whole)?.file_name().to_str().and_then(segment_number));
    }
    segments.sort_unstable();
    let content = |number: u64| {
        let name = segment_name(number);
        std::fs::read(path.join(&name)).map_err(|error| (error, format!("{name} ")))
    };
    let mut recovery = Recovery::new();
    for &number in &segments {
        recovery.scan(number, &content(number)?);
    }
    for &number in &segments {
        recovery.apply(number, &content(number)?);
    }
    Ok(recovery.finish())
}

/// Whether a process has taken it.
pub(crate) fn is_in_use(path: &Path) -> bool {
    File::open(path.join(LOCK)).is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tokenring-data-{name}-{}", std::process::id()));
            std::fs::remove_dir_all(&path).unwrap_or_default();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap_or_default();
        }
    }

    #[test]
    fn a_directory_is_made_and_taken_by_one() {
        let folder = Folder::new("taken");
        check(&folder.0).unwrap();
        let first = DataDir::open(&folder.0).unwrap();
        assert!(is_in_use(&folder.0));
        let second = DataDir::open(&folder.0).unwrap_err();
        assert_eq!(second.exit, Exit::Unavailable);
        assert!(second.message.contains(&format!("(id {})", std::process::id())), "{}", second.message);
        assert_eq!(first.recover().unwrap().streams().count(), 0);
        drop(first);
        assert!(!is_in_use(&folder.0));
        DataDir::open(&folder.0).unwrap();
    }

    #[test]
    fn what_is_no_directory_is_refused() {
        let folder = Folder::new("file");
        std::fs::write(&folder.0, "").unwrap();
        for fatal in [DataDir::open(&folder.0).unwrap_err(), check(&folder.0).unwrap_err()] {
            assert!(fatal.exit == Exit::Configuration && fatal.message.ends_with("not a directory"));
        }
        std::fs::remove_file(&folder.0).unwrap();
        let below = folder.0.join("a/b");
        for fatal in [DataDir::open(&below).unwrap_err(), check(&below).unwrap_err()] {
            assert!(fatal.message.contains("cannot be made: "), "{}", fatal.message);
        }
    }
}
