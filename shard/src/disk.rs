//! The journal's files: carries out its jobs by glommio's file I/O, in a background task of the shard's own thread.
//!
//! One job at a time, each a task of its own that runs to its end. The shard sees what became of it between two turns.

use crate::host::Background;
use glommio::io::{BufferedFile, Directory, OpenOptions};
use protocol::durable::journal::{Failure, Job, Recovered, Stage, segment_name};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Readable by the server's own user only: what clients write is nobody else's business.
const FILE_MODE: u32 = 0o600;

/// Where a shard keeps a journal, and what it held at the start.
#[derive(Debug)]
pub struct JournalPlan {
    /// Of the segment files. Nobody else writes there.
    pub directory: PathBuf,
    /// What they hold.
    pub recovered: Recovered,
    /// Random, and secret.
    pub salt: u32,
}

/// The same of the journal of its relayed streams.
#[derive(Debug)]
pub struct StreamJournalPlan {
    /// Its files.
    pub journal: JournalPlan,
    /// Numbers of streams below this one may be given.
    pub reserved: u64,
}

/// The files of a journal.
struct Files {
    directory: PathBuf,
    /// The segment that is written.
    open: Option<(u64, BufferedFile)>,
    /// Its entry in the directory is not synced yet.
    unnamed: bool,
}

/// Jobs and their results, between the host's loop and the task that is under way.
pub(crate) struct Disk {
    shared: Rc<Shared>,
}

struct Shared {
    /// Taken by a task while it runs.
    files: RefCell<Option<Files>>,
    result: RefCell<Option<Result<(), Failure>>>,
    running: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Disk {
    pub(crate) fn new(directory: PathBuf) -> Self {
        let files = Files { directory, open: None, unnamed: false };
        let shared = Shared {
            files: RefCell::new(Some(files)),
            result: RefCell::new(None),
            running: Cell::new(false),
            waker: RefCell::new(None),
        };
        Disk { shared: Rc::new(shared) }
    }

    /// A job is under way, or its result was not taken yet.
    pub(crate) fn is_busy(&self) -> bool {
        self.shared.running.get()
    }

    /// Starts a job; none may be under way.
    pub(crate) fn start(&self, job: Job, background: &Background) {
        assert!(!self.shared.running.replace(true), "one job at a time");
        let shared = Rc::clone(&self.shared);
        background.start(async move {
            let files = shared.files.borrow_mut().take();
            let result = match files {
                Some(mut files) => {
                    let result = files.work(job).await;
                    *shared.files.borrow_mut() = Some(files);
                    result
                }
                None => Ok(()),
            };
            *shared.result.borrow_mut() = Some(result);
            if let Some(waker) = shared.waker.borrow_mut().take() {
                waker.wake();
            }
        });
    }

    /// What became of the job, once it is done.
    pub(crate) fn take_result(&self) -> Option<Result<(), Failure>> {
        let result = self.shared.result.borrow_mut().take()?;
        self.shared.running.set(false);
        Some(result)
    }

    /// Ends when a result can be taken; never while no job is under way.
    pub(crate) fn done(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|context| {
            if self.shared.result.borrow().is_some() {
                return Poll::Ready(());
            }
            *self.shared.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
    }

    /// Closes the file that is open. No job may be under way.
    pub(crate) async fn close(self) {
        let files = self.shared.files.borrow_mut().take();
        if let Some((_, file)) = files.and_then(|files| files.open)
            && let Err(error) = file.close().await
        {
            log::warn!("closing a segment: {error}");
        }
    }
}

impl Files {
    async fn work(&mut self, job: Job) -> Result<(), Failure> {
        let failed = |stage| move |error: io::Error| Failure { stage, reason: error.to_string() };
        match job {
            Job::Write { segment, at, bytes, sync } => {
                self.write(segment, at, bytes).await.map_err(failed(Stage::Write))?;
                if sync {
                    self.sync().await.map_err(failed(Stage::Sync))?;
                }
            }
            Job::Remove { segment } => self.remove(segment).await.map_err(failed(Stage::Write))?,
        }
        Ok(())
    }

    async fn write(&mut self, segment: u64, at: u64, bytes: Vec<u8>) -> io::Result<()> {
        if at == 0 || self.open.as_ref().is_none_or(|(number, _)| *number != segment) {
            self.open(segment, at == 0).await?;
        }
        let Some((_, file)) = &self.open else { return Ok(()) };
        let length = bytes.len();
        if length == 0 {
            return Ok(());
        }
        let written = file.write_at(bytes, at).await?;
        if written < length {
            // Why the rest was not taken, the next byte is told. All of it is written once more.
            file.write_at(vec![0], at + written as u64).await?;
            return Err(io::Error::new(io::ErrorKind::WriteZero, "only a part was written"));
        }
        Ok(())
    }

    async fn open(&mut self, segment: u64, anew: bool) -> io::Result<()> {
        if let Some((_, before)) = self.open.take() {
            before.close().await?;
        }
        let path = self.directory.join(segment_name(segment));
        let file = OpenOptions::new()
            .write(true)
            .create(anew)
            .truncate(anew)
            .mode(FILE_MODE)
            .buffered_open(&path)
            .await?;
        self.unnamed |= anew;
        self.open = Some((segment, file));
        Ok(())
    }

    async fn sync(&mut self) -> io::Result<()> {
        if let Some((_, file)) = &self.open {
            file.fdatasync().await?;
        }
        if self.unnamed {
            self.sync_directory().await?;
            self.unnamed = false;
        }
        Ok(())
    }

    async fn remove(&self, segment: u64) -> io::Result<()> {
        match glommio::io::remove(self.directory.join(segment_name(segment))).await.map_err(io::Error::from) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.sync_directory().await,
        }
    }

    async fn sync_directory(&self) -> io::Result<()> {
        let directory = Directory::open(&self.directory).await?;
        let synced = directory.sync().await;
        directory.close().await?;
        Ok(synced?)
    }
}
