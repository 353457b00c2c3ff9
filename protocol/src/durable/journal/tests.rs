//! A store on a simulated disk that loses, tears and reorders what was not synced, and fails. After each crash the store must
//! be what it was after some record, none of those acknowledged missing.

mod damage;

use super::super::store::Store;
use super::super::stream::Stream;
use super::super::tests::{Dialogue, Heard};
use super::super::{Now, Reply, Settings};
use super::disk::{Disk, Random, recover};
use super::*;
use std::collections::BTreeMap;

/// Messages by the position behind them.
type Messages = BTreeMap<u64, Vec<u8>>;

/// Everything that a store must still know after a crash, by path.
pub(in super::super) type State = BTreeMap<(String, u64), String>;

fn messages_of(stream: &Stream) -> Vec<(u64, Vec<u8>)> {
    let mut at = stream.earliest;
    let mut messages = Vec::new();
    for end in stream.ends_behind(at) {
        let mut message = Vec::new();
        while at < end {
            let lent = stream.lend(at, end).unwrap();
            at += lent.len() as u64;
            message.extend(lent.to_vec());
        }
        messages.push((end, message));
    }
    messages
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes);
    hasher.finalize()
}

pub(in super::super) fn state_of(store: &Store) -> State {
    let state = |stream: &Stream| {
        let source = stream.source.and_then(|id| store.streams.get(id)).map_or(0, |source| source.created);
        let deleted = (stream.deleted, stream.closed, stream.tail());
        let messages: Vec<_> = messages_of(stream)
            .iter()
            .map(|(end, message)| (*end, message.len(), checksum(message)))
            .collect();
        format!("{:?} {deleted:?} {messages:?}", stream.facts(source))
    };
    store
        .streams
        .iter()
        .map(|(_, stream)| ((stream.path.to_string(), stream.created), state(stream)))
        .collect()
}

struct Run {
    with: Dialogue,
    random: Random,
    disk: Disk,
    job: Option<Job>,
    /// What the store was after each record, as far as a record is the last of its request.
    states: BTreeMap<u64, State>,
    /// Up to where something was promised.
    promised: u64,
    producers: BTreeMap<String, u64>,
    salt: u32,
    crashes: usize,
}

fn small(interval_ms: u32) -> Settings {
    Settings { segment_bytes: 2_500, fsync_interval_ms: interval_ms, ..Settings::default() }
}

fn store_on(contents: &BTreeMap<u64, Vec<u8>>, settings: &Settings, salt: u32, now: Now) -> Store {
    Store::with_journal(settings.clone(), recover(contents), salt, now)
}

impl Run {
    fn new(seed: u64, settings: Settings) -> Self {
        let mut with = Dialogue::new(settings.clone());
        with.store = store_on(&BTreeMap::new(), &settings, 77, with.now);
        Run {
            with,
            random: Random::new(seed),
            // Where more is promised than what is synced, it is promised as far as the cache goes.
            disk: Disk { forgets: settings.fsync_interval_ms == 0, ..Disk::default() },
            job: None,
            states: BTreeMap::from([(0, State::new())]),
            promised: 0,
            producers: BTreeMap::new(),
            salt: 77,
            crashes: 0,
        }
    }

    fn last(&self) -> u64 {
        self.with.store.journal.as_ref().unwrap().last()
    }

    /// Notes what the store is now.
    fn note(&mut self) {
        self.states.insert(self.last(), state_of(&self.with.store));
        self.promised = self.promised.max(self.with.store.acknowledged().min(self.last()));
        assert!(self.with.store.must_wait().is_some() == (self.with.store.acknowledged() < self.last()));
    }

    fn ask(&mut self, line: &str, fields: &str, body: &[u8]) -> Heard {
        let heard = self.with.ask(line, fields, body);
        self.note();
        heard
    }

    fn change(&mut self) {
        self.with.wait_ms(1);
        self.with.store.expire(self.with.now);
        self.note();
        let path = format!("/v1/durable/{}", self.random.below(6));
        let form = ["application/json", "text/plain", "application/octet-stream"][self.random.below(3)];
        let body = match form {
            "application/json" => {
                format!("[{},\"{}\"]", self.random.below(1000), "x".repeat(self.random.below(400)))
            }
            _ => "TRJ1".repeat(1 + self.random.below(200)),
        };
        let content = format!("Content-Type: {form}\n");
        match self.random.below(16) {
            0..2 => {
                let more = [
                    "Stream-TTL: 1\n",
                    "Stream-Expires-At: 2030-01-01T00:00:00Z\n",
                    "",
                    "",
                    "Stream-Closed: true\n",
                ];
                let more = more[self.random.below(5)];
                self.ask(&format!("PUT {path}"), &format!("{content}{more}"), body.as_bytes());
            }
            2 => {
                let from = format!("Stream-Forked-From: /v1/durable/{}\n", self.random.below(6));
                self.ask(&format!("PUT {path}"), &from, b"");
            }
            3 if self.random.one_in(3) => _ = self.ask(&format!("DELETE {path}"), "", b""),
            4 if self.random.one_in(2) => {
                let close = "Stream-Closed: true\nProducer-Id: last\nProducer-Epoch: 3\nProducer-Seq: 0\n";
                self.ask(&format!("POST {path}"), close, b"");
            }
            5 => {
                let sequence = format!("{content}Stream-Seq: {:08}\n", self.with.now.ms);
                self.ask(&format!("POST {path}"), &sequence, body.as_bytes());
            }
            6..9 => {
                let next = self.producers.entry(path.clone()).or_default();
                let tag = format!("{content}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {next}\n");
                let heard = self.with.ask(&format!("POST {path}"), &tag, body.as_bytes());
                let expected = heard.field("Producer-Expected-Seq").map(|next| next.parse().unwrap());
                let next = self.producers.get_mut(&path).unwrap();
                *next = expected.unwrap_or(if heard.status == 200 { *next + 1 } else { *next });
                self.note();
            }
            _ => _ = self.ask(&format!("POST {path}"), &content, body.as_bytes()),
        }
    }

    /// The disk does a bit.
    fn work(&mut self, ill: bool) {
        if self.job.is_none() {
            self.job = self.with.store.next_job(self.with.now.ms);
            self.note();
        } else if let Some(job) = self.job.take() {
            let result = self.disk.work(&job, &mut self.random, ill);
            self.with.store.job_done(result, self.with.now.ms);
            self.note();
        }
    }

    /// All that is recorded is synced, and the end is marked.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            self.work(false);
            self.with.wait_ms(10);
            if self.with.store.is_synced() && self.with.store.next_job_ms().is_none() && self.job.is_none() {
                self.job = self.with.store.next_job(self.with.now.ms);
                if self.job.is_none() {
                    return;
                }
            }
        }
        panic!("it is never done: {:?}", self.with.store.journal_state());
    }

    fn crash(&mut self) {
        self.crashes += 1;
        let power = self.with.settings.fsync_interval_ms == 0 && self.random.one_in(2);
        if let Some(job) = self.job.take() {
            // It may have come to anything.
            match &job {
                Job::Write { segment, at, bytes, .. } if !power => {
                    let some = self.random.below(bytes.len() + 1);
                    let part =
                        Job::Write { segment: *segment, at: *at, bytes: bytes[..some].to_vec(), sync: false };
                    self.disk.work(&part, &mut self.random, false).unwrap();
                }
                _ if self.random.one_in(2) => _ = self.disk.work(&job, &mut self.random, false),
                _ => {}
            }
        }
        if power {
            self.disk.cut_power(&mut self.random);
        }
        let contents = self.disk.contents();
        self.disk.sync();
        let recovered = recover(&contents);
        assert!(recovered.findings.iter().all(|finding| !finding.lost), "{:?}", recovered.findings);
        let last = recovered.last;
        assert!(last >= self.promised, "{last} of {} promised records are there", self.promised);
        self.salt += 1;
        self.with.wait_ms(1_000);
        self.with.store =
            Store::with_journal(self.with.settings.clone(), recovered, self.salt, self.with.now);
        if let Some(state) = self.states.get(&last) {
            // Without the limits by which the other may have given something up.
            let unlimited = Settings { segment_bytes: 6_000, ..Settings::default() };
            let is = state_of(&store_on(&contents, &unlimited, 1, self.with.now));
            assert!(is == *state, "record {last}: {is:#?}\nis not\n{state:#?}");
        }
        self.states.split_off(&(last + 1));
        self.promised = last;
        self.note();
    }
}

#[test]
fn after_any_crash_everything_that_was_promised_is_there_and_nothing_else() {
    let (mut crashes, mut removed) = (0, 0);
    for seed in 0..150 {
        println!("seed {seed}");
        let mut run = Run::new(seed, small([0, 0, 50][usize::try_from(seed % 3).unwrap()]));
        for _ in 0..900 {
            let step = run.random.below(70);
            // Ill for a while, and well again.
            let ill = (run.with.now.ms / 40).is_multiple_of(5) && seed % 2 == 1;
            match step {
                0 => {
                    removed += run.with.store.journal_counters().0.removed;
                    run.crash();
                }
                1..25 => run.change(),
                25 => run.with.wait_ms(300),
                _ => run.work(ill),
            }
        }
        run.settle();
        run.crash();
        assert_eq!(run.promised, run.last());
        crashes += run.crashes;
    }
    assert!(crashes > 1_000 && removed > 100, "{crashes} crashes, {removed} segments removed");
}

#[test]
fn where_memory_is_scarce_the_same_holds() {
    for seed in 1000..1060 {
        println!("seed {seed}");
        let scarce = Settings {
            body_bytes_max: 4 << 10,
            stream_bytes_max: 3 << 10,
            store_bytes_max: 12 << 10,
            ..small(0)
        };
        let mut run = Run::new(seed, scarce);
        for _ in 0..400 {
            match run.random.below(30) {
                0 => run.crash(),
                1..15 => run.change(),
                _ => run.work(false),
            }
        }
        run.settle();
        run.crash();
        assert!(run.disk.contents().values().map(Vec::len).sum::<usize>() < 100_000, "segments are freed");
    }
}

#[test]
fn where_messages_grow_old_the_same_holds() {
    let mut dropped = 0;
    for seed in 2000..2060 {
        println!("seed {seed}");
        let mut run = Run::new(seed, Settings { retention_ms: 1_500, ..small(0) });
        for _ in 0..500 {
            match run.random.below(40) {
                0 => run.crash(),
                1..15 => run.change(),
                15..18 => run.with.wait_ms(300),
                _ => run.work(false),
            }
        }
        dropped += run.with.store.counters().trimmed_bytes;
        run.settle();
        run.crash();
    }
    assert!(dropped > 20_000, "{dropped}");
}

#[test]
fn a_restart_makes_no_message_younger_and_brings_none_back() {
    let settings = Settings { retention_ms: 40_000, ..small(0) };
    let mut run = Run::new(1, settings.clone());
    let messages = |run: &Run| run.with.store.line_of("/v1/durable/a", run.with.now.ms).unwrap().messages;
    let pass = |run: &mut Run, ms: u64| {
        for _ in 0..ms / 1_000 {
            run.with.wait_ms(1_000);
            run.with.store.expire(run.with.now);
            run.work(false);
        }
    };
    let restart = |run: &mut Run, away_ms: u64| {
        run.settle();
        run.with.wait_ms(away_ms);
        run.with.store = store_on(&run.disk.contents(), &settings, 5, run.with.now);
    };
    run.ask("PUT /v1/durable/a", "Content-Type: text/plain\n", b"");
    run.ask("POST /v1/durable/a", "Content-Type: text/plain\n", b"old");
    // Again and again, each time for less than a message lives.
    for _ in 0..3 {
        pass(&mut run, 12_000);
        restart(&mut run, 0);
        assert_eq!(messages(&run), 1);
    }
    run.ask("POST /v1/durable/a", "Content-Type: text/plain\n", b"new");
    // What else is written makes that its segments are written anew, and the notes with them.
    for _ in 0..30 {
        run.ask("PUT /v1/durable/b", "Content-Type: text/plain\n", &[b'x'; 1_000]);
        run.ask("DELETE /v1/durable/b", "", b"");
        pass(&mut run, 1_000);
    }
    assert!(run.with.store.journal_counters().1 > 0, "something was written anew");
    assert_eq!(messages(&run), 1, "the old one was there for 66 s");
    restart(&mut run, 0);
    assert_eq!(messages(&run), 1);
    let read = run.with.store.line_of("/v1/durable/a", run.with.now.ms).unwrap();
    assert_eq!(run.ask(&format!("GET /v1/durable/a?offset={}", read.earliest), "", b"").text(), "new");
    // While nobody was there, time has passed as well.
    restart(&mut run, 30_000);
    pass(&mut run, 2_000);
    assert_eq!(messages(&run), 0);
    restart(&mut run, 0);
    assert_eq!(messages(&run), 0);
}

fn reply(run: &mut Run, line: &str, fields: &str, body: &[u8]) -> Reply {
    run.with.reply(line, fields, body)
}

#[test]
fn readers_are_shown_what_is_acknowledged_and_no_more() {
    let mut run = Run::new(1, small(0));
    let text = "Content-Type: text/plain\n";
    assert_eq!(run.ask("PUT /v1/durable/a", text, b"one").status, 201);
    assert_eq!(run.with.store.must_wait(), Some(1));
    assert_eq!(run.ask("GET /v1/durable/a", "", b"").status, 404, "nobody may know of it yet");
    run.settle();
    assert_eq!(run.with.store.must_wait(), None);
    assert_eq!(run.ask("GET /v1/durable/a", "", b"").text(), "one");
    let Reply::Wait(mut poll) = reply(&mut run, "GET /v1/durable/a?offset=now&live=long-poll", "", b"")
    else {
        panic!("it does not wait")
    };
    let poller = run.with.reader();
    assert_eq!(run.ask("POST /v1/durable/a", &format!("{text}Stream-Closed: true\n"), b"two").status, 204);
    let head = run.ask("HEAD /v1/durable/a", "", b"");
    assert!(head.next_offset().ends_with("3") && head.field("Stream-Closed").is_none());
    assert_eq!(run.ask("GET /v1/durable/a", "", b"").text(), "one");
    assert!(run.with.store.poll(&mut poll, false, run.with.now).is_none());
    let mut woken = Vec::new();
    run.with.store.take_woken(&mut woken);
    run.settle();
    run.with.store.take_woken(&mut woken);
    assert!(woken.contains(&poller), "who waits is told when it is acknowledged");
    let answer = run.with.store.poll(&mut poll, false, run.with.now).unwrap();
    assert_eq!(run.with.hear(answer).text(), "two");
    assert_eq!(run.ask("HEAD /v1/durable/a", "", b"").field("Stream-Closed"), Some("true"));
}

#[test]
fn while_the_disk_fails_changes_are_refused_and_what_was_under_way_is_kept() {
    for interval_ms in [0, 20] {
        let mut run = Run::new(2, small(interval_ms));
        let text = "Content-Type: text/plain\n";
        run.ask("PUT /v1/durable/a", text, b"one");
        run.settle();
        run.ask("POST /v1/durable/a", text, b"two");
        run.with.wait_ms(100);
        while !run.with.store.is_failing() {
            run.work(true);
            run.with.wait_ms(10);
        }
        assert!(run.with.store.journal_state().unwrap().failing.unwrap().contains("the disk is ill"));
        let refused = run.ask("POST /v1/durable/a", text, b"three");
        assert_eq!((refused.status, refused.field("Retry-After")), (503, Some("1")));
        assert!(refused.text().contains("disk_failed"), "{}", refused.text());
        assert_eq!(run.ask("GET /v1/durable/a", "", b"").status, 200, "what is there is served");
        for _ in 0..50 {
            run.work(true);
            run.with.wait_ms(500);
        }
        assert!(run.with.store.is_failing());
        run.with.wait_ms(10_000);
        run.settle();
        assert_eq!(run.ask("GET /v1/durable/a", "", b"").text(), "onetwo");
        assert_eq!(run.ask("POST /v1/durable/a", text, b"four").status, 204);
        run.settle();
        run.crash();
        assert_eq!(run.ask("GET /v1/durable/a", "", b"").text(), "onetwofour");
        let most = run.disk.files.len();
        assert!(most <= 4, "failed segments are removed: {most}");
    }
}

#[test]
fn segments_go_when_what_lives_in_them_was_written_anew() {
    let mut run = Run::new(3, Settings { stream_bytes_max: 2_000, segment_bytes: 4_000, ..small(0) });
    let text = "Content-Type: text/plain\n";
    for path in 0..5 {
        run.ask(&format!("PUT /v1/durable/quiet-{path}"), text, b"from long ago");
    }
    run.settle();
    let fork = "Stream-Forked-From: /v1/durable/quiet-0\n";
    run.ask("PUT /v1/durable/fork", fork, b"");
    assert_eq!(run.ask("DELETE /v1/durable/quiet-0", "", b"").status, 204);
    run.ask("PUT /v1/durable/loud", text, b"");
    for round in 0..1_000 {
        assert_eq!(run.ask("POST /v1/durable/loud", text, &[b'a' + (round % 26) as u8; 100]).status, 204);
        run.settle();
        let store = &run.with.store;
        let bytes: usize = run.disk.contents().values().map(Vec::len).sum();
        let most = 2 * store.totals().bytes + 8 * store.settings.segment_bytes;
        assert!(bytes as u64 <= most, "round {round}: {bytes} bytes");
    }
    let (counters, rewritten) = run.with.store.journal_counters();
    assert!(counters.removed > 20 && rewritten > 0, "{counters:?}, {rewritten}");
    assert!(!run.disk.files.contains_key(&1));
    let before = state_of(&run.with.store);
    run.crash();
    assert_eq!(state_of(&run.with.store), before);
    assert_eq!(run.ask("GET /v1/durable/fork", "", b"").text(), "from long ago");
    assert_eq!(run.ask("GET /v1/durable/quiet-0", "", b"").status, 410);
}

#[test]
fn much_is_written_in_pieces_and_promised_with_the_last() {
    for jobs in [0, 1, 2, 4, 9] {
        let mut run = Run::new(4, Settings::default());
        let binary = "Content-Type: application/octet-stream\n";
        run.ask("PUT /v1/durable/a", binary, b"");
        for byte in 0..8 {
            assert_eq!(run.ask("POST /v1/durable/a", binary, &vec![byte; 1 << 20]).status, 204);
        }
        let mut done = 0;
        while done < jobs && (run.job.is_some() || run.with.store.must_wait().is_some()) {
            run.work(false);
            if let Some(Job::Write { bytes, sync, .. }) = &run.job {
                assert!(bytes.len() <= crate::limits::DURABLE_WRITE_BYTES_MAX + 64);
                assert!(!sync || run.with.store.journal_state().unwrap().backlog_bytes < 9 << 20);
                done += 1;
            }
        }
        assert!(done < 2 || run.disk.files[&1].content().len() > 1 << 20);
        // With jobs for all of it, all of it is promised; what is there after a crash is checked there.
        assert_eq!(run.with.store.must_wait().is_none(), run.promised == 9);
        run.crash();
        run.settle();
    }
}

#[test]
fn names_of_segments_are_read_as_they_are_written() {
    assert_eq!(segment_name(7), "00000000000000000007.segment");
    assert_eq!(segment_number("00000000000000000007.segment"), Some(7));
    for name in ["7.segment", "00000000000000000007", "lock", "+0000000000000000007.segment", ".segment"] {
        assert_eq!(segment_number(name), None, "{name}");
    }
}
