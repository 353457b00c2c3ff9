//! The data directory: one process at a time, and what it holds read at the start (shards write it later, see `shard::disk`).
//!
//! ```text
//!   lock                   held by the process
//!   ids                    the key of streams' ids, and the first number that the next process may give
//!   *.segment              the journal of shard 0's durable streams
//!   durable-N/*.segment    that of shard N's
//!   relayed-N/*.segment    the journal of shard N's relayed streams
//! ```

use crate::exit::{Exit, Fatal};
use protocol::durable::journal::{Finding, Job, Recovered, Recovery, segment_name, segment_number};
use protocol::durable::relayed::{RelayJournal, Restored};
use protocol::durable::{Rehoming, agree};
use protocol::limits::{DURABLE_SEGMENT_BYTES, RELAYED_NUMBERS_RESERVED};
use rustix::fs::{Access, FlockOperation, access, flock};
use std::collections::{BTreeMap, HashMap};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Held by the process that writes the directory; says its id.
const LOCK: &str = "lock";
/// The key of ids and the numbers given: who has it can make up ids, and read by them.
const IDS: &str = "ids";
const RELAYED: &str = "relayed-";
const DURABLE: &str = "durable-";
/// Only the server's user: what is in there was said by its clients.
const MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
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
            .mode(FILE_MODE)
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

    /// The durable streams that it holds, for each of so many shards, with the directory of its journal; damage is logged. Streams
    /// that belong to other shards than before are brought there.
    pub(crate) fn recover(&self, shards: usize) -> Result<Vec<(PathBuf, Recovered)>, Fatal> {
        let mut found = BTreeMap::new();
        for shard in durable_shards(&self.path)? {
            let path = durable_path(&self.path, shard);
            make_last(&path)?;
            found.insert(shard, read(&path)?);
        }
        for shard in 0..shards {
            self.make(&durable_path(&self.path, shard))?;
        }
        agree(&mut found);
        for (&shard, recovered) in &found {
            tell(&durable_path(&self.path, shard), recovered, "durable", recovered.streams().count());
        }
        if let Some(rehoming) = Rehoming::begin(&mut found, shards, crate::serve::random_salt()?) {
            self.rehome(rehoming, shards)?;
            for shard in 0..shards {
                found.insert(shard, read(&durable_path(&self.path, shard))?);
            }
            agree(&mut found);
        }
        // They have nothing any more that belongs anywhere.
        for shard in durable_shards(&self.path)?.into_iter().filter(|shard| *shard >= shards) {
            self.remove(&durable_path(&self.path, shard))?;
        }
        let all = (0..shards)
            .map(|shard| (durable_path(&self.path, shard), found.remove(&shard).unwrap_or_default()));
        Ok(all.collect())
    }

    /// Writes streams where they belong, to the last byte, and then removes them where they were.
    fn rehome(&self, mut rehoming: Rehoming, shards: usize) -> Result<(), Fatal> {
        for leaving in [false, true] {
            if leaving {
                rehoming.leave();
            }
            for shard in 0..shards {
                let path = durable_path(&self.path, shard);
                while let Some(job) = rehoming.next_job(shard) {
                    work(&path, &job)
                        .map_err(|error| fatal(&path, format_args!("cannot be written: {error}")))?;
                    rehoming.job_done(shard);
                }
            }
        }
        log::info!("{} durable streams of other shards were brought home", rehoming.moved());
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), Fatal> {
        std::fs::remove_dir_all(path)
            .and_then(|()| sync_directory(&self.path))
            .map_err(|error| fatal(path, format_args!("cannot be removed: {error}")))
    }

    /// What it holds of relayed streams, for each of so many shards, with the directory of that; and the number below which any
    /// may have been given. Streams of shards that there are no more go to others.
    pub(crate) fn recover_relayed(&self, shards: usize) -> Result<(Vec<(PathBuf, Recovered)>, u64), Fatal> {
        let mut found: BTreeMap<usize, Recovered> = BTreeMap::new();
        for shard in relayed_shards(&self.path)? {
            let path = relayed_path(&self.path, shard);
            make_last(&path)?;
            let recovered = read(&path)?;
            tell(&path, &recovered, "relayed", recovered.relayed().count());
            found.insert(shard, recovered);
        }
        for shard in 0..shards {
            self.make(&relayed_path(&self.path, shard))?;
        }
        let given = found.values().map(Recovered::numbers_given).max().unwrap_or(0);
        self.bring_home(&mut found, shards)?;
        let all = (0..shards)
            .map(|shard| (relayed_path(&self.path, shard), found.remove(&shard).unwrap_or_default()))
            .collect();
        Ok((all, given))
    }

    fn make(&self, path: &Path) -> Result<(), Fatal> {
        if path == self.path {
            return Ok(());
        }
        match DirBuilder::new().mode(MODE).create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made
                .and_then(|()| sync_directory(&self.path))
                .map_err(|error| fatal(path, format_args!("cannot be made: {error}"))),
        }
    }

    /// Streams whose shard is another one now are written there, and then removed where they were.
    fn bring_home(&self, found: &mut BTreeMap<usize, Recovered>, shards: usize) -> Result<(), Fatal> {
        let home = |stream: u64| (stream >> 48) as usize % shards;
        let is_lost = |shard: usize, recovered: &Recovered| {
            let away = |stream: (u16, u64)| usize::from(stream.0) % shards != shard;
            shard >= shards || recovered.relayed().any(|stream| away(stream.stream()))
        };
        if !found.iter().any(|(shard, recovered)| is_lost(*shard, recovered)) {
            return Ok(());
        }
        let mut journals = BTreeMap::new();
        let mut logs: HashMap<u64, Restored> = HashMap::new();
        let mut moves: Vec<(usize, usize, u64)> = Vec::new();
        for (shard, recovered) in std::mem::take(found) {
            let (journal, restored) = relay_journal(recovered)?;
            journals.insert(shard, journal);
            for restored in restored {
                if home(restored.stream) != shard || shard >= shards {
                    moves.push((shard, home(restored.stream), restored.stream));
                }
                // Where one is in both, it was brought home before, and not yet removed.
                logs.entry(restored.stream).or_insert(restored);
            }
        }
        for &(_, to, stream) in &moves {
            let at_home = match journals.entry(to) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(none) => {
                    none.insert(relay_journal(Recovered::default())?.0)
                }
            };
            if let Some(restored) = logs.get(&stream).filter(|_| !at_home.holds(stream)) {
                at_home.adopt(restored);
            }
        }
        for (&shard, journal) in journals.iter_mut().filter(|(shard, _)| **shard < shards) {
            self.write_out(shard, journal, &logs)?;
        }
        for &(from, _, stream) in moves.iter().filter(|(from, ..)| *from < shards) {
            if let Some(journal) = journals.get_mut(&from) {
                journal.forget(stream);
            }
        }
        for (&shard, journal) in &mut journals {
            let path = relayed_path(&self.path, shard);
            if shard < shards {
                self.write_out(shard, journal, &logs)?;
                found.insert(shard, read(&path)?);
            } else {
                self.remove(&path)?;
            }
        }
        log::info!("{} relayed streams of other shards were brought home", moves.len());
        Ok(())
    }

    /// Writes what is recorded, to the last byte.
    fn write_out(
        &self,
        shard: usize,
        journal: &mut RelayJournal,
        logs: &HashMap<u64, Restored>,
    ) -> Result<(), Fatal> {
        let path = relayed_path(&self.path, shard);
        while let Some(job) = journal.next_job(|stream| logs.get(&stream).map(|restored| &restored.log), 0) {
            work(&path, &job).map_err(|error| fatal(&path, format_args!("cannot be written: {error}")))?;
            journal.job_done(Ok(()), 0);
        }
        Ok(())
    }

    /// The key of streams' ids, and the first number that this process may give; `given` may have been given already.
    pub(crate) fn ids(&self, given: u64) -> Result<Ids, Fatal> {
        let path = self.path.join(IDS);
        let refuse = |why: &str| {
            fatal(&path, format_args!("{why}; without it (remove it) no stream is found by its old id"))
        };
        let (key, first) = match std::fs::read_to_string(&path) {
            Ok(text) => read_ids(&text).ok_or_else(|| refuse("is damaged"))?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut key = [0; 32];
                rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())
                    .map_err(|error| Fatal::internal(format!("getrandom: {error}")))?;
                (key, 1)
            }
            Err(error) => return Err(refuse(&format!("cannot be read ({error})"))),
        };
        let first = first.max(given);
        let ids = Ids { key, first, reserved: first + RELAYED_NUMBERS_RESERVED };
        let part = self.path.join(format!("{IDS}.new"));
        let written = (|| {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(FILE_MODE).open(&part)?;
            file.write_all(write_ids(&ids.key, ids.reserved).as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&part, &path)?;
            sync_directory(&self.path)
        })();
        written.map_err(|error| fatal(&path, format_args!("cannot be written: {error}")))?;
        Ok(ids)
    }
}

/// What the ids of streams are made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ids {
    pub(crate) key: [u8; 32],
    /// The first number that this process may give.
    pub(crate) first: u64,
    /// The first that it may not.
    pub(crate) reserved: u64,
}

fn write_ids(key: &[u8; 32], next: u64) -> String {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!("tokenring ids 1\nkey {hex}\nnext {next}\n");
    let sum = crc32fast::hash(text.as_bytes());
    format!("{text}sum {sum:08x}\n")
}

fn read_ids(text: &str) -> Option<([u8; 32], u64)> {
    let mut lines = text.lines();
    (lines.next()? == "tokenring ids 1").then_some(())?;
    let hex = lines.next()?.strip_prefix("key ")?;
    let mut key = [0; 32];
    for (nth, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * nth..2 * nth + 2)?, 16).ok()?;
    }
    let next = lines.next()?.strip_prefix("next ")?.parse().ok()?;
    (write_ids(&key, next) == text).then_some((key, next))
}

/// The key of the ids of a directory's streams, if it can be read.
pub(crate) fn key_of_ids(path: &Path) -> Option<[u8; 32]> {
    read_ids(&std::fs::read_to_string(path.join(IDS)).ok()?).map(|(key, _)| key)
}

fn relayed_path(path: &Path, shard: usize) -> PathBuf {
    path.join(format!("{RELAYED}{shard}"))
}

/// The journal of a shard's durable streams. That of the first is where it was when there was no other.
fn durable_path(path: &Path, shard: usize) -> PathBuf {
    if shard == 0 { path.to_owned() } else { path.join(format!("{DURABLE}{shard}")) }
}

/// The shards of which there are journals of durable streams.
fn durable_shards(path: &Path) -> Result<Vec<usize>, Fatal> {
    let mut shards = shards_of(path, DURABLE)?;
    shards.retain(|shard| *shard > 0);
    shards.insert(0, 0);
    Ok(shards)
}

fn relayed_shards(path: &Path) -> Result<Vec<usize>, Fatal> {
    shards_of(path, RELAYED)
}

/// The numbers of the directories whose names begin so.
fn shards_of(path: &Path, prefix: &str) -> Result<Vec<usize>, Fatal> {
    let refuse = |error: std::io::Error| fatal(path, format_args!("cannot be read: {error}"));
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(path).map_err(refuse)? {
        let name = entry.map_err(refuse)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        shards.extend(number.and_then(|number| number.parse::<usize>().ok()));
    }
    shards.sort_unstable();
    Ok(shards)
}

/// The durable streams that a directory holds, whoever writes it, with the directories of their journals. Where one is in several, it
/// was being brought from one to the other when its process ended.
pub(crate) fn read_durable(path: &Path) -> Result<Vec<(PathBuf, Recovered)>, Fatal> {
    let mut found = BTreeMap::new();
    for shard in durable_shards(path)? {
        found.insert(shard, read(&durable_path(path, shard))?);
    }
    agree(&mut found);
    Ok(found.into_iter().map(|(shard, recovered)| (durable_path(path, shard), recovered)).collect())
}

/// The relayed streams that a directory holds, whoever writes it, with the directories of their journals.
pub(crate) fn read_relayed(path: &Path) -> Result<Vec<(PathBuf, Recovered)>, Fatal> {
    let paths = relayed_shards(path)?.into_iter().map(|shard| relayed_path(path, shard));
    paths.map(|path| Ok((path.clone(), read(&path)?))).collect()
}

/// A journal to be written here and now.
fn relay_journal(recovered: Recovered) -> Result<(RelayJournal, Vec<Restored>), Fatal> {
    /// Longer than any log, and its end plus this still a number.
    const ALL_BYTES: u64 = 1 << 60;
    let salt = crate::serve::random_salt()?;
    Ok(RelayJournal::new(recovered, DURABLE_SEGMENT_BYTES, 0, salt, 0, |_| ALL_BYTES))
}

/// Syncs what a process that was killed had written and not yet synced: what is read at the start counts as being on the disk,
/// and nobody else would see to that.
fn make_last(path: &Path) -> Result<(), Fatal> {
    let synced = (|| {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_name().to_str().and_then(segment_number).is_some() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        sync_directory(path)
    })();
    synced.map_err(|error: std::io::Error| fatal(path, format_args!("cannot be made to last: {error}")))
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Carries out a job of a journal, as a shard's disk would.
fn work(directory: &Path, job: &Job) -> std::io::Result<()> {
    match job {
        Job::Write { segment, at, bytes, sync } => {
            let path = directory.join(segment_name(*segment));
            let anew = *at == 0;
            let mut options = OpenOptions::new();
            let file = options.write(true).create(anew).truncate(anew).mode(FILE_MODE).open(path)?;
            file.write_all_at(bytes, *at)?;
            if *sync {
                file.sync_all()?;
                sync_directory(directory)?;
            }
            Ok(())
        }
        Job::Remove { segment } => {
            std::fs::remove_file(directory.join(segment_name(*segment)))?;
            sync_directory(directory)
        }
    }
}

/// Logs what was found.
fn tell(path: &Path, recovered: &Recovered, what: &str, streams: usize) {
    for finding in recovered.findings.iter().take(FINDINGS_LOGGED) {
        let text = describe(path, finding);
        if finding.lost { log::error!("{text}") } else { log::warn!("{text}") }
    }
    if recovered.findings.len() > FINDINGS_LOGGED {
        log::error!(
            "{} findings more: `tokenring streams verify` shows all",
            recovered.findings.len() - FINDINGS_LOGGED
        );
    }
    log::info!(
        "{streams} {what} streams in {} ({} records, {} segments, {} bytes)",
        path.display(),
        recovered.records,
        recovered.segments(),
        recovered.bytes(),
    );
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
fn read(path: &Path) -> Result<Recovered, Fatal> {
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
        assert_eq!(first.recover(1).unwrap()[0].1.streams().count(), 0);
        drop(first);
        assert!(!is_in_use(&folder.0));
        DataDir::open(&folder.0).unwrap();
    }

    #[test]
    fn each_process_gives_numbers_of_its_own_under_the_same_key() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("ids");
        let first = DataDir::open(&folder.0).unwrap().ids(0).unwrap();
        assert_eq!((first.first, first.reserved), (1, 1 + RELAYED_NUMBERS_RESERVED));
        assert!(first.key.iter().any(|byte| *byte != 0) && key_of_ids(&folder.0) == Some(first.key));
        let mode = std::fs::metadata(folder.0.join(IDS)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "who can read it can make up ids");
        let second = DataDir::open(&folder.0).unwrap().ids(5).unwrap();
        assert_eq!((second.key, second.first), (first.key, first.reserved));
        let third = DataDir::open(&folder.0).unwrap().ids(1 << 40).unwrap();
        assert_eq!((third.first, third.reserved), (1 << 40, (1 << 40) + RELAYED_NUMBERS_RESERVED));
        for at in [3, 25, 90, 110] {
            let whole = std::fs::read(folder.0.join(IDS)).unwrap();
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(folder.0.join(IDS), damaged).unwrap();
            let fatal = DataDir::open(&folder.0).unwrap().ids(0).unwrap_err();
            assert!(fatal.message.contains("/ids: is damaged; without it"), "{}", fatal.message);
            std::fs::write(folder.0.join(IDS), whole).unwrap();
        }
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
