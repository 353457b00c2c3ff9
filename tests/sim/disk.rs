//! The directory of a journal on a simulated disk: jobs take their time, fail in part or whole, and what was not synced is
//! lost, torn or reordered when the power goes.

use crate::io::SimIo;
use crate::rng::Rng;
use protocol::durable::journal::{Failure, Job, Recovered, Recovery, Stage};
use shard::core::{JournalOf, Shard};
use std::collections::BTreeMap;

/// Pieces that a power cut may lose each by itself, bytes.
const SECTOR: usize = 512;

#[derive(Clone, Default)]
struct File {
    synced: Vec<u8>,
    /// Its entry in the directory is synced.
    named: bool,
    /// Writes since.
    since: Vec<(usize, Vec<u8>)>,
}

impl File {
    fn content(&self) -> Vec<u8> {
        let mut content = self.synced.clone();
        for (at, bytes) in &self.since {
            overlay(&mut content, *at, bytes);
        }
        content
    }

    /// What of it may be on the disk.
    fn torn(&self, rng: &mut Rng) -> Vec<u8> {
        let mut content = self.synced.clone();
        let lost = rng.pick(&[0, 300, 1000]);
        for (at, bytes) in &self.since {
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                if !rng.chance(lost) {
                    overlay(&mut content, at + index * SECTOR, sector);
                }
            }
        }
        content
    }
}

fn overlay(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    content.resize(content.len().max(at + bytes.len()), 0);
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(crate) struct SimDisk {
    pub(crate) of: JournalOf,
    files: BTreeMap<u64, File>,
    rng: Rng,
    /// A job takes up to so long, µs.
    pub(crate) latency_us: u64,
    /// Of 1000 jobs so many fail.
    pub(crate) fails: u32,
    job: Option<(Job, u64)>,
    pub(crate) failures: u64,
}

impl SimDisk {
    pub(crate) fn new(of: JournalOf, seed: u64) -> Self {
        SimDisk {
            of,
            files: BTreeMap::new(),
            rng: Rng::new(seed),
            latency_us: 0,
            fails: 0,
            job: None,
            failures: 0,
        }
    }

    /// Whether something is done for a shard.
    pub(crate) fn carry_out(&mut self, job: &Job) {
        assert!(self.work(job, false).is_ok(), "it does not fail by itself");
    }

    /// When the job under way is done, µs.
    pub(crate) fn due_us(&self) -> Option<u64> {
        self.job.as_ref().map(|(_, due_us)| *due_us)
    }

    /// Before a turn.
    pub(crate) fn tell(&mut self, shard: &mut Shard<SimIo>, now_us: u64) {
        if let Some((job, _)) = self.job.take_if(|(_, due_us)| *due_us <= now_us) {
            let fails = self.rng.chance(self.fails);
            self.failures += u64::from(fails);
            shard.job_done(self.of, self.work(&job, fails));
        }
    }

    /// After it.
    pub(crate) fn ask(&mut self, shard: &mut Shard<SimIo>, now_us: u64) {
        if self.job.is_none()
            && let Some(job) = shard.next_job(self.of)
        {
            self.job = Some((job, now_us + self.rng.skewed(self.latency_us)));
        }
    }

    fn work(&mut self, job: &Job, fails: bool) -> Result<(), Failure> {
        let failed = |stage| Err(Failure { stage, reason: "a simulated fault".to_owned() });
        match job {
            Job::Write { segment, at, bytes, sync } => {
                let at = *at as usize;
                let file = self.files.entry(*segment).or_default();
                if at == 0 {
                    *file = File { named: file.named, ..File::default() };
                }
                if fails && self.rng.chance(500) {
                    let some = self.rng.below(bytes.len() as u64) as usize;
                    file.since.push((at, bytes[..some].to_vec()));
                    return failed(Stage::Write);
                }
                file.since.push((at, bytes.clone()));
                if fails && *sync {
                    let synced = file.torn(&mut self.rng);
                    *file = File { synced, named: file.named, since: Vec::new() };
                    return failed(Stage::Sync);
                }
                if *sync {
                    *file = File { synced: file.content(), named: true, since: Vec::new() };
                }
            }
            Job::Remove { .. } if fails => return failed(Stage::Write),
            Job::Remove { segment } => _ = self.files.remove(segment),
        }
        Ok(())
    }

    /// The machine ends here: with the process alone everything that was written is there, with the power what was synced.
    pub(crate) fn crash(&mut self, power: bool) {
        if let Some((job, _)) = self.job.take() {
            match &job {
                Job::Write { segment, at, bytes, .. } => {
                    let some = self.rng.below(bytes.len() as u64 + 1) as usize;
                    let part =
                        Job::Write { segment: *segment, at: *at, bytes: bytes[..some].to_vec(), sync: false };
                    self.work(&part, false).unwrap();
                }
                Job::Remove { .. } if self.rng.chance(500) => self.work(&job, false).unwrap(),
                Job::Remove { .. } => {}
            }
        }
        if power {
            let rng = &mut self.rng;
            self.files.retain(|_, file| file.named || rng.chance(500));
        }
        for file in self.files.values_mut() {
            let synced = if power { file.torn(&mut self.rng) } else { file.content() };
            *file = File { synced, named: true, since: Vec::new() };
        }
    }

    pub(crate) fn recover(&self) -> Recovered {
        let mut recovery = Recovery::new();
        for (number, file) in &self.files {
            recovery.scan(*number, &file.content());
        }
        for (number, file) in &self.files {
            recovery.apply(*number, &file.content());
        }
        recovery.finish()
    }
}
