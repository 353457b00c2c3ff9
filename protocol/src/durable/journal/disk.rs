//! A simulated disk for tests: it loses, tears and reorders what was not synced, and fails.

use super::{Failure, Job, Recovered, Recovery, Stage};
use std::collections::BTreeMap;

/// Pieces of an unsynced write that a power cut may lose each by itself, bytes.
const SECTOR: usize = 128;

/// A file: what is surely on the disk, and writes since.
#[derive(Clone, Default)]
pub(in super::super) struct File {
    synced: Vec<u8>,
    named: bool,
    since: Vec<(usize, Vec<u8>)>,
}

impl File {
    pub(in super::super) fn content(&self) -> Vec<u8> {
        let mut content = self.synced.clone();
        for (at, bytes) in &self.since {
            overlay(&mut content, *at, bytes);
        }
        content
    }
}

fn overlay(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    content.resize(content.len().max(at + bytes.len()), 0);
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(in super::super) struct Random(u64);

impl Random {
    pub(in super::super) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(in super::super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }

    pub(in super::super) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// A directory on a disk that can be made to fail.
#[derive(Clone, Default)]
pub(in super::super) struct Disk {
    pub(in super::super) files: BTreeMap<u64, File>,
    /// After a failed sync not even the cache has what was written; systems differ in that.
    pub(in super::super) forgets: bool,
}

impl Disk {
    /// Does a job, or some of it.
    pub(in super::super) fn work(
        &mut self,
        job: &Job,
        random: &mut Random,
        ill: bool,
    ) -> Result<(), Failure> {
        let failed = |stage| Err(Failure { stage, reason: "the disk is ill".to_owned() });
        match job {
            Job::Write { segment, at, bytes, sync } => {
                let file = self.files.entry(*segment).or_default();
                let at = usize::try_from(*at).unwrap();
                if at == 0 {
                    assert!(
                        !file.named || file.synced.is_empty(),
                        "a segment with something in it is not made anew"
                    );
                    *file = File { named: file.named, ..File::default() };
                }
                assert!(at <= file.content().len(), "no gaps");
                if ill && random.one_in(2) {
                    let some = random.below(bytes.len() + 1);
                    file.since.push((at, bytes[..some].to_vec()));
                    return failed(Stage::Write);
                }
                file.since.push((at, bytes.clone()));
                if *sync && ill {
                    if self.forgets {
                        file.synced = torn(file, random);
                        file.since.clear();
                    }
                    return failed(Stage::Sync);
                }
                if *sync {
                    *file = File { synced: file.content(), named: true, since: Vec::new() };
                }
            }
            Job::Remove { segment } => {
                if ill {
                    return failed(Stage::Write);
                }
                self.files.remove(segment);
            }
        }
        Ok(())
    }

    /// Who reads a journal at the start syncs it first: what is read is on the disk.
    pub(in super::super) fn sync(&mut self) {
        for file in self.files.values_mut() {
            *file = File { synced: file.content(), named: true, since: Vec::new() };
        }
    }

    /// Everything that was written is there.
    pub(in super::super) fn contents(&self) -> BTreeMap<u64, Vec<u8>> {
        self.files.iter().map(|(number, file)| (*number, file.content())).collect()
    }

    /// What is left after a power cut.
    pub(in super::super) fn cut_power(&mut self, random: &mut Random) {
        self.files.retain(|_, file| file.named || random.one_in(2));
        for file in self.files.values_mut() {
            *file = File { synced: torn(file, random), named: true, since: Vec::new() };
        }
    }
}

/// A file's content of which some sectors that were not synced are lost.
fn torn(file: &File, random: &mut Random) -> Vec<u8> {
    let mut content = file.synced.clone();
    let whole = random.one_in(3);
    for (at, bytes) in &file.since {
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            if whole || !random.one_in(3) {
                overlay(&mut content, at + index * SECTOR, sector);
            }
        }
    }
    content
}

pub(in super::super) fn recover(contents: &BTreeMap<u64, Vec<u8>>) -> Recovered {
    let mut recovery = Recovery::new();
    for (number, bytes) in contents {
        recovery.scan(*number, bytes);
    }
    for (number, bytes) in contents {
        recovery.apply(*number, bytes);
    }
    recovery.finish()
}
