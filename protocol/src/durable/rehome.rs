//! Journals of a number of shards made those of another number: each stream goes to the shard of its path, each fork with its
//! source, before any shard runs.
//!
//! ```text
//!   found ─► agree ─► Rehoming::begin: those that go elsewhere written anew there ─► all synced
//!                                          └─► Rehoming::leave: forgotten where they were ─► all synced
//! ```
//! Whenever that is cut short, each stream is whole in one journal at least; it is begun anew with what is found then.

use super::journal::{Finding, Image, Job, Recovered};
use super::persist::write_anew_all;
use super::store::Store;
use super::{Now, Settings, home_of};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Longer than anything that is held.
const ALL_BYTES: u64 = 1 << 60;

/// Where journals contradict each other, which only damage or a re-homing that was cut short makes them, says what counts; and
/// lets the streams of all be numbered on from the greatest number of any.
pub fn agree(found: &mut BTreeMap<usize, Recovered>) {
    let created = found.values().map(|recovered| recovered.created).max().unwrap_or(0);
    let sources: HashSet<u64> = images(found).map(|(_, image)| image.facts.source).collect();
    // By their paths: whether it was not deleted, the later one.
    let mut owners: HashMap<Box<str>, (bool, u64)> = HashMap::new();
    for (_, image) in images(found) {
        let claim = (!image.deleted, image.created);
        let owner = owners.entry(image.facts.path.clone()).or_insert(claim);
        *owner = claim.max(*owner);
    }
    for recovered in found.values_mut() {
        recovered.created = created;
        for image in &mut recovered.images {
            if owners.get(&image.facts.path).is_none_or(|owner| owner.1 == image.created) {
                continue;
            }
            image.nameless = true;
            if !image.deleted {
                // Its end was lost.
                (image.deleted, image.damaged) = (true, true);
                let kept = if sources.contains(&image.created) { ", and kept for its forks" } else { "" };
                let what =
                    format!("{} is there once more, and later: this one is deleted{kept}", image.facts.path);
                recovered.findings.push(Finding { segment: image.segment, at: 0, what, lost: true });
            }
        }
    }
}

fn images(found: &BTreeMap<usize, Recovered>) -> impl Iterator<Item = (usize, &Image)> {
    found.iter().flat_map(|(&shard, recovered)| recovered.images.iter().map(move |image| (shard, image)))
}

impl Recovered {
    /// Paths of the streams that are here although their paths belong to other shards, with those.
    pub fn paths_away(&self, shards: usize, own: usize) -> impl Iterator<Item = (&str, usize)> {
        let named = self.images.iter().filter(|image| image.relay.is_none() && !image.nameless);
        named
            .map(move |image| (&*image.facts.path, home_of(&image.facts.path, shards)))
            .filter(move |(_, home)| *home != own)
    }
}

/// Streams on their way from journal to journal.
pub struct Rehoming {
    stores: BTreeMap<usize, Store>,
    /// What is to be forgotten where.
    leave: Vec<(usize, u64)>,
    moved: usize,
}

impl Rehoming {
    /// Begins to bring streams home; `None` where all are. Journals of shards that there are no more lose all they have to those
    /// that there are. `salt` is any number, and secret.
    pub fn begin(found: &mut BTreeMap<usize, Recovered>, shards: usize, salt: u32) -> Option<Self> {
        let homes = homes(found, shards);
        let is_home = |shard: usize, image: &Image| homes.get(&image.created) == Some(&shard);
        if images(found).all(|(shard, image)| is_home(shard, image)) {
            return None;
        }
        // Of several copies the whole one, or else the one that is at home.
        let mut best: HashMap<u64, (bool, bool, usize)> = HashMap::new();
        for (shard, image) in images(found) {
            let copy = (!image.damaged, is_home(shard, image), shard);
            let known = best.entry(image.created).or_insert(copy);
            *known = copy.max(*known);
        }
        let mut arriving: BTreeMap<usize, Vec<Image>> = BTreeMap::new();
        let mut leave: Vec<(usize, u64)> = Vec::new();
        for (&shard, recovered) in found.iter_mut() {
            for image in std::mem::take(&mut recovered.images) {
                let counts = best.get(&image.created).is_some_and(|best| best.2 == shard);
                let home = homes.get(&image.created).copied().unwrap_or(0);
                if home != shard {
                    leave.push((shard, image.created));
                }
                if counts && home != shard {
                    arriving.entry(home).or_default().push(image);
                } else if counts {
                    recovered.images.push(image);
                }
            }
        }
        let moved = arriving.values().map(Vec::len).sum();
        // Forks before their sources.
        leave.reverse();
        let settings =
            Settings { store_bytes_max: ALL_BYTES, stream_bytes_max: ALL_BYTES, ..Settings::default() };
        let mut stores = BTreeMap::new();
        for shard in 0..shards {
            let mut recovered = found.remove(&shard).unwrap_or_default();
            let anew: Vec<u64> =
                arriving.get(&shard).into_iter().flatten().map(|image| image.created).collect();
            recovered.images.extend(arriving.remove(&shard).unwrap_or_default());
            recovered.images.sort_by_key(|image| image.created);
            let mut store =
                Store::with_journal(settings.clone(), recovered, salt, Now { ms: 0, unix_ms: 0, random: 0 });
            store.keeps_segments = true;
            write_anew_all(&mut store, &anew);
            stores.insert(shard, store);
        }
        Some(Rehoming { stores, leave, moved })
    }

    /// How many streams are brought home.
    pub fn moved(&self) -> usize {
        self.moved
    }

    /// Everything is synced where it belongs: what was elsewhere is forgotten there.
    pub fn leave(&mut self) {
        for (shard, created) in std::mem::take(&mut self.leave) {
            if let Some(store) = self.stores.get_mut(&shard) {
                store.forget(created);
            }
        }
        for store in self.stores.values_mut() {
            store.keeps_segments = false;
            store.release_segments();
        }
    }

    /// What is to be done with a shard's files, one job after the other, each told of by [`Rehoming::job_done`], until there is
    /// none.
    pub fn next_job(&mut self, shard: usize) -> Option<Job> {
        self.stores.get_mut(&shard)?.last_job(0)
    }

    /// The job was done.
    pub fn job_done(&mut self, shard: usize) {
        if let Some(store) = self.stores.get_mut(&shard) {
            store.job_done(Ok(()), 0);
        }
    }
}

/// The shards of all streams, by their numbers: those of the paths of the first that they were forked from.
fn homes(found: &BTreeMap<usize, Recovered>, shards: usize) -> HashMap<u64, usize> {
    let all: HashMap<u64, &Image> = images(found).map(|(_, image)| (image.created, image)).collect();
    let root = |image: &Image| {
        let mut image = all.get(&image.created).copied()?;
        // A source is older than its forks, whoever has written the records.
        while let Some(source) = all.get(&image.facts.source).filter(|source| source.created < image.created)
        {
            image = source;
        }
        Some(home_of(&image.facts.path, shards))
    };
    all.values().filter_map(|image| Some((image.created, root(image)?))).collect()
}
