//! Journals of several shards that become those of another number, cut short anywhere, once and again, with the machine's power or
//! without: afterwards each stream is where it belongs, whole, and nowhere else.

use super::journal::disk::{Disk, Random, recover};
use super::journal::tests::{State, state_of};
use super::journal::{Job, Recovered};
use super::rehome::{Rehoming, agree};
use super::store::Store;
use super::tests::Dialogue;
use super::{Settings, home_of};
use std::collections::BTreeMap;

type Disks = BTreeMap<usize, Disk>;

fn settings() -> Settings {
    Settings { segment_bytes: 2_000, ..Settings::default() }
}

fn write_all(disk: &mut Disk, random: &mut Random, mut next: impl FnMut() -> Option<Job>) {
    while let Some(job) = next() {
        disk.work(&job, random, false).unwrap();
    }
}

/// A directory in which one shard has all streams: some closed, forks of forks, sources that were deleted and are kept.
fn written_by_one(random: &mut Random) -> (Disk, State) {
    let mut with = Dialogue::new(settings());
    with.store = Store::with_journal(settings(), Recovered::default(), 7, with.now);
    let mut disk = Disk::default();
    for number in 0..40 {
        let path = format!("/v1/durable/{number}");
        match random.below(3) {
            0 => _ = with.ask(&format!("PUT {path}"), "Content-Type: text/plain\n", b"first"),
            _ => {
                let fork = format!("Stream-Forked-From: /v1/durable/{}\n", random.below(number + 1));
                with.ask(&format!("PUT {path}"), &fork, b"");
            }
        }
        for _ in 0..random.below(6) {
            let to = random.below(number + 1);
            let body = vec![b'x'; 1 + random.below(300)];
            let producer = format!("Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {number}\n");
            let fields =
                format!("Content-Type: text/plain\n{}", if random.one_in(3) { &*producer } else { "" });
            with.ask(&format!("POST /v1/durable/{to}"), &fields, &body);
        }
        if random.one_in(8) {
            with.ask(&format!("DELETE /v1/durable/{}", random.below(number + 1)), "", b"");
        }
        if random.one_in(9) {
            with.ask(&format!("POST {path}"), "Stream-Closed: true\n", b"");
        }
        while let Some(job) = with.store.last_job(0) {
            disk.work(&job, random, false).unwrap();
            with.store.job_done(Ok(()), 0);
        }
    }
    (disk, state_of(&with.store))
}

fn found(disks: &mut Disks) -> BTreeMap<usize, Recovered> {
    let read = |(shard, disk): (&usize, &mut Disk)| {
        disk.sync();
        (*shard, recover(&disk.contents()))
    };
    let mut found = disks.iter_mut().map(read).collect();
    agree(&mut found);
    found
}

/// A start with so many shards, which ends within its `last`th job; gives how many it did, if that was all.
fn start(disks: &mut Disks, shards: usize, random: &mut Random, last: usize) -> Option<usize> {
    (0..shards).for_each(|shard| _ = disks.entry(shard).or_default());
    let mut found = found(disks);
    let mut jobs = 0;
    if let Some(mut rehoming) = Rehoming::begin(&mut found, shards, 99) {
        for leaving in [false, true] {
            if leaving {
                rehoming.leave();
            }
            for shard in 0..shards {
                while let Some(job) = rehoming.next_job(shard) {
                    jobs += 1;
                    let disk = disks.get_mut(&shard).unwrap();
                    if jobs == last {
                        if let Job::Write { segment, at, bytes, .. } = job {
                            let some = random.below(bytes.len() + 1);
                            let part = Job::Write { segment, at, bytes: bytes[..some].to_vec(), sync: false };
                            disk.work(&part, random, false).unwrap();
                        }
                        if random.one_in(2) {
                            disks.values_mut().for_each(|disk| disk.cut_power(random));
                        }
                        return None;
                    }
                    disk.work(&job, random, false).unwrap();
                    rehoming.job_done(shard);
                }
            }
        }
    }
    disks.retain(|shard, _| *shard < shards);
    Some(jobs)
}

/// What the shards have, each stream once.
fn state(disks: &mut Disks, shards: usize) -> State {
    let mut all = State::new();
    for (shard, recovered) in found(disks) {
        assert!(recovered.findings.iter().all(|finding| !finding.lost), "{:?}", recovered.findings);
        let away: Vec<String> =
            recovered.paths_away(shards, shard).map(|(path, _)| path.to_owned()).collect();
        let store = Store::with_journal(settings(), recovered, 5, Dialogue::new(settings()).now);
        for (id, stream) in store.streams.iter() {
            let root = store.with_sources(id).last().and_then(|root| store.streams.get(root)).unwrap();
            assert_eq!(home_of(&root.path, shards), shard, "{} of {} is not at home", stream.path, root.path);
            assert_eq!(away.contains(&stream.path.to_string()), home_of(&stream.path, shards) != shard);
        }
        for (key, state) in state_of(&store) {
            assert!(all.insert(key.clone(), state).is_none(), "{key:?} is there twice");
        }
    }
    all
}

#[test]
fn a_re_homing_that_is_cut_short_anywhere_loses_and_doubles_nothing() {
    let mut cuts = 0;
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let (disk, expected) = written_by_one(&mut random);
        let whole = Disks::from([(0, disk)]);
        let mut calm = whole.clone();
        let jobs = start(&mut calm, 3, &mut random, usize::MAX).unwrap();
        assert!(jobs >= 6, "{jobs} jobs");
        assert_eq!(state(&mut calm, 3), expected, "seed {seed}");
        assert_eq!(start(&mut calm, 3, &mut random, usize::MAX), Some(0), "at home nothing is done");
        // Each job at several places.
        for last in (1..=jobs).flat_map(|last| [last; 4]) {
            let mut disks = whole.clone();
            assert_eq!(start(&mut disks, 3, &mut random, last), None);
            cuts += 1;
            // The next start may have another number, and be cut short too.
            let shards = loop {
                let (shards, last) = (1 + random.below(4), 1 + random.below(2 * jobs));
                if start(&mut disks, shards, &mut random, last).is_some() {
                    break shards;
                }
                cuts += 1;
            };
            assert_eq!(
                state(&mut disks, shards),
                expected,
                "seed {seed}, cut within job {last}, {shards} shards"
            );
        }
    }
    assert!(cuts > 200, "{cuts}");
}

#[test]
fn streams_are_brought_home_from_any_number_of_shards_to_any() {
    let mut random = Random::new(77);
    let (disk, expected) = written_by_one(&mut random);
    let mut disks = Disks::from([(0, disk)]);
    for shards in [4, 1, 3, 2, 7, 1] {
        start(&mut disks, shards, &mut random, usize::MAX).unwrap();
        assert_eq!(state(&mut disks, shards), expected, "{shards} shards");
    }
}

/// Only damage brings it about: the end of one was lost, and there is a later one at its path on another shard.
#[test]
fn of_two_streams_at_a_path_the_later_one_counts() {
    let written = |place: (usize, usize), unix_ms: u64, asks: &[(&str, &str)]| {
        let mut with = Dialogue::new(settings());
        with.now.unix_ms = unix_ms;
        with.store = Store::with_journal(settings(), Recovered::default(), 7, with.now);
        with.store.be_placed(place.0, place.1);
        for (line, fields) in asks {
            assert_eq!(
                with.ask(line, &format!("Content-Type: text/plain\n{fields}"), b"").status,
                201,
                "{line}"
            );
        }
        let (mut disk, mut random) = (Disk::default(), Random::new(1));
        write_all(&mut disk, &mut random, || {
            let job = with.store.last_job(0)?;
            with.store.job_done(Ok(()), 0);
            Some(job)
        });
        disk
    };
    let path =
        (0..).map(|number| format!("/v1/durable/{number}")).find(|path| home_of(path, 2) == 1).unwrap();
    let root =
        (0..).map(|number| format!("/v1/durable/r{number}")).find(|path| home_of(path, 2) == 0).unwrap();
    let fork = |of: &str| format!("Stream-Forked-From: {of}\n");
    let asks = [
        (format!("PUT {root}"), String::new()),
        (format!("PUT {path}"), fork(&root)),
        ("PUT /v1/durable/z".to_owned(), fork(&path)),
    ];
    let asks: Vec<(&str, &str)> =
        asks.iter().map(|(line, fields)| (line.as_str(), fields.as_str())).collect();
    let early = written((0, 2), 1_000_000, &asks);
    let late = written((1, 2), 2_000_000, &[(&format!("PUT {path}"), "")]);
    let mut disks = Disks::from([(0, early), (1, late)]);
    for _ in 0..2 {
        let mut found = found(&mut disks);
        assert!(found[&0].findings.iter().any(|finding| finding.lost && finding.what.contains(&path)));
        assert!(Rehoming::begin(&mut found, 2, 9).is_none(), "all are at home");
        let away: Vec<&str> = found[&0].paths_away(2, 0).map(|(path, _)| path).collect();
        assert!(!away.contains(&path.as_str()), "{away:?}");
        let of_one = found.remove(&0).unwrap();
        let mut with = Dialogue::new(settings());
        with.store = Store::with_journal(settings(), of_one, 5, with.now);
        with.store.be_placed(0, 2);
        assert!(!with.store.holds(&path) && with.store.holds("/v1/durable/z"));
        assert_eq!(with.store.totals().streams, 3, "it is kept for its fork");
        assert_eq!(with.ask("GET /v1/durable/z", "", b"").status, 200);
        let mut later = Dialogue::new(settings());
        later.store = Store::with_journal(settings(), found.remove(&1).unwrap(), 5, later.now);
        assert_eq!(later.ask(&format!("GET {path}"), "", b"").status, 200);
    }
}

#[test]
fn no_two_shards_give_a_stream_the_same_number() {
    let mut given = std::collections::BTreeSet::new();
    for own in 0..5 {
        let mut with = Dialogue::new(settings());
        with.store.be_placed(own, 5);
        for number in 0..50 {
            let made = with.ask(&format!("PUT /v1/durable/{own}/{number}"), "", b"");
            let generation = made.next_offset().split('_').next().unwrap().to_owned();
            assert!(given.insert(generation.clone()), "{generation}");
            with.wait_ms(number % 3);
        }
    }
}

/// Or a crash could leave streams at it in two journals.
#[test]
fn a_path_is_given_up_when_the_disk_cannot_take_that_back() {
    for (own, away) in [(0, false), (1, true)] {
        let path = "/v1/durable/b";
        assert_eq!(home_of(path, 2), 0);
        let mut with = Dialogue::new(settings());
        let interval = Settings { fsync_interval_ms: 1_000, ..settings() };
        with.store = Store::with_journal(interval, Recovered::default(), 7, with.now);
        with.store.be_placed(own, 2);
        let (mut disk, mut random) = (Disk::default(), Random::new(1));
        assert_eq!(with.ask(&format!("PUT {path}"), "", b"").status, 201);
        assert_eq!(with.store.paths_away().count(), usize::from(away));
        assert_eq!(with.ask(&format!("DELETE {path}"), "", b"").status, 204);
        let held = |store: &Store| if away { store.is_going(path) } else { store.is_vacated(path) };
        let mut written = 0;
        while let Some(job) = with.store.next_job(with.now.ms) {
            assert!(held(&with.store) && with.store.take_gone().is_none(), "written is not synced");
            disk.work(&job, &mut random, false).unwrap();
            with.store.job_done(Ok(()), with.now.ms);
            written += 1;
        }
        assert!(written > 0 && held(&with.store) && with.store.take_gone().is_none());
        with.wait_ms(1_000);
        while let Some(job) = with.store.next_job(with.now.ms) {
            disk.work(&job, &mut random, false).unwrap();
            with.store.job_done(Ok(()), with.now.ms);
        }
        assert_eq!(with.store.take_gone().as_deref(), away.then_some(path));
        assert!(!held(&with.store));
    }
}
