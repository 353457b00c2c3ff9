//! The store against a naive one that copies everything, by random lists of operations: each page and each reader must see
//! exactly what was appended, from where it began, once and in order.

use super::tests::{Dialogue, Heard};
use super::{Progress, Reading, Reply, Settings};
use std::collections::HashMap;

/// What the naive store knows of a stream.
struct Naive {
    path: usize,
    form: usize,
    /// Messages of JSON; single bytes of anything else.
    units: Vec<Vec<u8>>,
    closed: bool,
    /// Deleted for everybody but its forks.
    deleted: bool,
    source: Option<usize>,
    /// Offsets given out, by how many units come before them.
    offsets: Vec<(String, usize)>,
    /// Next sequence of its only producer, and what it sent last.
    sequence: u64,
    last: Option<Vec<u8>>,
}

/// Somebody who reads on and on.
struct Reader {
    stream: usize,
    from: usize,
    reading: Reading,
    heard: Vec<u8>,
}

const FORMS: [&str; 3] = ["application/json", "text/plain", "application/octet-stream"];
const PATHS: usize = 5;

struct Run {
    with: Dialogue,
    streams: HashMap<usize, Naive>,
    by_path: [Option<usize>; PATHS],
    next: usize,
    readers: Vec<Reader>,
    /// Streams may be given up, and their oldest messages.
    scarce: bool,
    random: u64,
    pages: usize,
    seed: u64,
}

impl Run {
    fn new(seed: u64, scarce: bool) -> Self {
        let small = Settings {
            body_bytes_max: 4 << 10,
            stream_bytes_max: 2 << 10,
            store_bytes_max: 10 << 10,
            ..Settings::default()
        };
        let settings = if scarce { small } else { Settings::default() };
        Run {
            with: Dialogue::new(settings),
            streams: HashMap::new(),
            by_path: [None; PATHS],
            next: 0,
            readers: Vec::new(),
            scarce,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            pages: 0,
            seed,
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % limit as u64).unwrap()
    }

    /// A body, and the units that it is.
    fn body(&mut self, form: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
        if form == 0 {
            let count = 1 + self.below(4);
            let units: Vec<Vec<u8>> = (0..count)
                .map(|_| match self.below(3) {
                    0 => format!("{{\"n\": \n{}}}", self.below(1000)),
                    1 => format!("[{}]", self.below(9)),
                    _ => format!("\"{}\"", "x".repeat(self.below(300))),
                })
                .map(String::into_bytes)
                .collect();
            return (format!("[{}]", str::from_utf8(&units.join(&b", "[..])).unwrap()).into_bytes(), units);
        }
        let words: [&[u8]; 5] = [b"token", b"\xe2\x82\xac", b"\xe2\x82", b" ", b"ab cd"];
        let count = 1 + self.below(90);
        let bytes: Vec<u8> = (0..count).flat_map(|_| words[self.below(words.len())].to_vec()).collect();
        let units = bytes.iter().map(|byte| vec![*byte]).collect();
        (bytes, units)
    }

    fn step(&mut self) {
        self.with.wait_ms(1);
        if self.scarce {
            self.follow();
        }
        let path = self.below(PATHS);
        match self.below(20) {
            0..3 => self.create(path),
            3..9 => self.append(path),
            9 => self.close(path),
            10 if self.below(2) == 0 => self.delete(path),
            10..13 => self.fork(path),
            13..16 => self.page(path),
            16..18 => self.begin_reading(path),
            _ => self.read_on(),
        }
        let totals = self.with.store.totals();
        assert_eq!(totals.readers, self.readers.len() as u64);
        // An append may end in a segment that is larger than it.
        let most = self.with.settings.store_bytes_max + (4 << 10);
        assert!(!self.scarce || totals.bytes <= most, "{} bytes", totals.bytes);
    }

    /// Where memory is scarce, the model follows what was given up.
    fn follow(&mut self) {
        for path in 0..PATHS {
            let Some(id) = self.by_path[path] else { continue };
            match self.ask(&format!("HEAD /v1/durable/{path}"), "", b"").status {
                404 => self.remove(id),
                410 => self.streams.get_mut(&id).unwrap().deleted = true,
                _ => {}
            }
        }
    }

    fn ask(&mut self, line: &str, fields: &str, body: &[u8]) -> Heard {
        self.with.ask(line, fields, body)
    }

    fn has_forks(&self, id: usize) -> bool {
        self.streams.values().any(|stream| stream.source == Some(id))
    }

    fn remove(&mut self, id: usize) {
        let stream = self.streams.remove(&id).unwrap();
        self.by_path[stream.path] = None;
        if let Some(source) = stream.source
            && self.streams.get(&source).is_some_and(|stream| stream.deleted)
            && !self.has_forks(source)
        {
            self.remove(source);
        }
    }

    /// The stream at a path that can be used; what is asked of others is checked here.
    fn usable(&mut self, path: usize) -> Option<usize> {
        let heard = self.ask(&format!("HEAD /v1/durable/{path}"), "", b"");
        let id = self.by_path[path];
        let expected = id.map_or(404, |id| if self.streams[&id].deleted { 410 } else { 200 });
        assert_eq!(heard.status, expected);
        let id = id.filter(|_| expected == 200)?;
        assert_eq!(heard.field("Stream-Closed").is_some(), self.streams[&id].closed);
        Some(id)
    }

    fn insert(&mut self, naive: Naive, heard: &Heard) {
        let mut naive = naive;
        naive.offsets.push((heard.next_offset(), naive.units.len()));
        self.by_path[naive.path] = Some(self.next);
        self.streams.insert(self.next, naive);
        self.next += 1;
    }

    fn create(&mut self, path: usize) {
        let form = self.below(3);
        let (body, units) = self.body(form);
        let heard =
            self.ask(&format!("PUT /v1/durable/{path}"), &format!("Content-Type: {}\n", FORMS[form]), &body);
        match self.by_path[path] {
            None if self.scarce && heard.status == 503 => {}
            None => {
                assert_eq!(heard.status, 201, "{heard:?}");
                let naive = Naive {
                    path,
                    form,
                    units,
                    closed: false,
                    deleted: false,
                    source: None,
                    offsets: vec![("-1".to_owned(), 0), ("0000000000000000_0000000000000000".to_owned(), 0)],
                    sequence: 0,
                    last: None,
                };
                self.insert(naive, &heard);
            }
            Some(id) => {
                let is = &self.streams[&id];
                let same = !is.deleted && is.form == form && !is.closed && is.source.is_none();
                assert_eq!(heard.status, if same { 200 } else { 409 });
            }
        }
    }

    fn append(&mut self, path: usize) {
        let Some(id) = self.usable(path) else { return };
        let (form, sequence, again) =
            (self.streams[&id].form, self.streams[&id].sequence, self.streams[&id].last.clone());
        let (body, units) = self.body(form);
        let close = if self.below(20) == 0 { "Stream-Closed: true\n" } else { "" };
        let content_type = format!("Content-Type: {}\n", FORMS[form]);
        let line = format!("POST /v1/durable/{path}");
        let closed = self.streams[&id].closed;
        let (heard, tagged) = match self.below(3) {
            0 => {
                let fields = format!(
                    "{content_type}{close}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {sequence}\n"
                );
                (self.ask(&line, &fields, &body), true)
            }
            // The same once more, after whatever came in between.
            1 if again.is_some() && !closed => {
                let fields = format!(
                    "{content_type}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {}\n",
                    sequence - 1
                );
                let heard = self.ask(&line, &fields, &again.unwrap());
                assert_eq!(heard.status, 204);
                return;
            }
            _ => (self.ask(&line, &format!("{content_type}{close}"), &body), false),
        };
        if closed {
            assert_eq!(heard.status, 409);
            return;
        }
        if self.scarce && heard.status == 503 {
            return;
        }
        assert_eq!(heard.status, if tagged { 200 } else { 204 });
        let stream = self.streams.get_mut(&id).unwrap();
        stream.units.extend(units);
        stream.offsets.push((heard.next_offset(), stream.units.len()));
        stream.closed = !close.is_empty();
        if tagged {
            stream.sequence += 1;
            stream.last = Some(body);
        }
        let sorted = stream.offsets[2..].windows(2).all(|pair| pair[0].0 <= pair[1].0);
        assert!(sorted || stream.source.is_some(), "offsets grow");
    }

    fn close(&mut self, path: usize) {
        let Some(id) = self.usable(path) else { return };
        assert_eq!(self.ask(&format!("POST /v1/durable/{path}"), "Stream-Closed: true\n", b"").status, 204);
        self.streams.get_mut(&id).unwrap().closed = true;
    }

    fn delete(&mut self, path: usize) {
        let Some(id) = self.usable(path) else { return };
        assert_eq!(self.ask(&format!("DELETE /v1/durable/{path}"), "", b"").status, 204);
        if self.has_forks(id) {
            self.streams.get_mut(&id).unwrap().deleted = true;
        } else {
            self.remove(id);
        }
    }

    fn fork(&mut self, path: usize) {
        let from = self.below(PATHS);
        let Some(source) = self.usable(from) else { return };
        let which = self.below(self.streams[&source].offsets.len() - 1) + 1;
        let (offset, at) = self.streams[&source].offsets[which].clone();
        let held = self.streams[&source].units.len() - at;
        // Within the next message: of bytes, one of those appended together, at least the first.
        let sub = if held > 0 { self.below(2) } else { 0 };
        let fields = format!(
            "Stream-Forked-From: /v1/durable/{from}\nStream-Fork-Offset: {offset}\nStream-Fork-Sub-Offset: {sub}\n"
        );
        let taken = self.by_path[path].is_some();
        let heard = self.ask(&format!("PUT /v1/durable/{path}"), &fields, b"");
        if taken {
            assert!(matches!(heard.status, 200 | 409), "{heard:?}");
            return;
        }
        if self.scarce && matches!(heard.status, 503 | 410 | 404) {
            return;
        }
        assert_eq!(heard.status, 201, "{heard:?}");
        let of = &self.streams[&source];
        let naive = Naive {
            path,
            form: of.form,
            units: of.units[..at + sub].to_vec(),
            closed: false,
            deleted: false,
            source: Some(source),
            offsets: of.offsets.iter().filter(|(_, before)| *before <= at).cloned().collect(),
            sequence: 0,
            last: None,
        };
        self.insert(naive, &heard);
    }

    fn page(&mut self, path: usize) {
        let Some(id) = self.usable(path) else { return };
        let which = self.below(self.streams[&id].offsets.len());
        let (offset, at) = self.streams[&id].offsets[which].clone();
        let heard = self.ask(&format!("GET /v1/durable/{path}?offset={offset}"), "", b"");
        if self.scarce && heard.status == 410 {
            return;
        }
        assert_eq!(heard.status, 200, "{heard:?}");
        self.pages += 1;
        let stream = &self.streams[&id];
        let expected = match stream.form {
            0 => [b"[", stream.units[at..].join(&b","[..]).as_slice(), b"]"].concat(),
            _ => stream.units[at..].concat(),
        };
        assert_eq!(heard.body, expected);
        assert_eq!(heard.field("Stream-Up-To-Date"), Some("true"));
        assert_eq!(heard.field("Stream-Closed").is_some(), stream.closed);
        let end = stream.offsets[2..].iter().find(|(_, before)| *before == stream.units.len());
        assert_eq!(heard.next_offset(), end.unwrap().0);
    }

    fn begin_reading(&mut self, path: usize) {
        let Some(id) = self.usable(path) else { return };
        let which = self.below(self.streams[&id].offsets.len());
        let (offset, from) = self.streams[&id].offsets[which].clone();
        let (query, fields) = match self.below(2) {
            0 => ("&live=sse", ""),
            _ => ("", "Accept: text/event-stream\n"),
        };
        match self.with.reply(&format!("GET /v1/durable/{path}?offset={offset}{query}"), fields, b"") {
            Reply::Events(_, reading) => {
                self.readers.push(Reader { stream: id, from, reading, heard: Vec::new() });
            }
            Reply::Answer(answer) if answer.status == 204 => {
                assert!(self.streams[&id].closed && from == self.streams[&id].units.len());
            }
            Reply::Answer(answer) => assert!(self.scarce && answer.status == 410, "{answer:?}"),
            other => panic!("{other:?}"),
        }
    }

    fn read_on(&mut self) {
        if self.readers.is_empty() {
            return;
        }
        let index = self.below(self.readers.len());
        let enough = self.below(900) + 1;
        let Run { with, readers, .. } = self;
        let reader = &mut readers[index];
        let progress = with.store.read(&mut reader.reading, with.now, &mut reader.heard, enough);
        if matches!(progress, Progress::Ended | Progress::Gone) {
            self.finish(index, progress);
        }
    }

    /// Compares what a reader has heard with what it was owed.
    fn finish(&mut self, index: usize, progress: Progress) {
        let mut reader = self.readers.swap_remove(index);
        self.with.store.leave(&mut reader.reading, self.with.now);
        let whole = !reader.reading.is_within();
        let Some(stream) = self.streams.get(&reader.stream) else {
            assert_ne!(progress, Progress::Waiting, "of a stream that is gone");
            return;
        };
        let expected = match stream.form {
            0 => stream.units[reader.from..].join(&b"\n"[..]),
            _ => stream.units[reader.from..].concat(),
        };
        let heard = decode(&reader.heard, stream.form);
        match progress {
            Progress::Gone => assert!(expected.starts_with(&heard), "a part of it, in order"),
            Progress::Waiting if stream.form == 1 => {
                // The beginning of a character may be held back.
                assert!(whole && expected.starts_with(&heard) && expected.len() - heard.len() <= 3);
            }
            _ => {
                let (heard, expected) = (String::from_utf8_lossy(&heard), String::from_utf8_lossy(&expected));
                assert_eq!(heard, expected, "seed {}, a reader from {}", self.seed, reader.from);
            }
        }
    }

    /// Everybody reads to the end.
    fn end(&mut self) {
        while let Some(mut reader) = self.readers.pop() {
            let progress = loop {
                let progress =
                    self.with.store.read(&mut reader.reading, self.with.now, &mut reader.heard, 700);
                if progress != Progress::More {
                    break progress;
                }
            };
            self.readers.push(reader);
            self.finish(self.readers.len() - 1, progress);
        }
        assert_eq!(self.with.store.totals().readers, 0);
    }
}

/// The data of events, JSON messages one a line. Incomplete events are left out.
fn decode(heard: &[u8], form: usize) -> Vec<u8> {
    let mut pieces = Vec::new();
    let complete = heard.windows(2).rposition(|pair| pair == b"\n\n").map_or(0, |at| at + 2);
    let mut start = 0;
    for at in 0..complete.saturating_sub(1) {
        if &heard[at..at + 2] != b"\n\n" || at < start {
            continue;
        }
        let event = &heard[start..at];
        start = at + 2;
        let data: Vec<&[u8]> = event
            .split(|byte| *byte == b'\n')
            .filter_map(|line| line.strip_prefix(b"data:"))
            .map(|line| line.strip_prefix(b" ").unwrap_or(line))
            .collect();
        if data.is_empty() || event.starts_with(b"event: control") {
            continue;
        }
        let data = data.join(&b"\n"[..]);
        match form {
            0 if event.starts_with(b"event: data") => {
                let values: Vec<&serde_json::value::RawValue> = serde_json::from_slice(&data).unwrap();
                pieces.extend(values.iter().map(|value| value.get().as_bytes().to_vec()));
            }
            2 => {
                use base64::Engine;
                pieces.push(base64::engine::general_purpose::STANDARD.decode(data).unwrap());
            }
            _ => pieces.push(data),
        }
    }
    let between: &[u8] = if form == 0 { b"\n" } else { b"" };
    pieces.join(between)
}

fn run(seed: u64, scarce: bool) -> (usize, u64) {
    println!("seed {seed}");
    let mut run = Run::new(seed, scarce);
    for _ in 0..400 {
        run.step();
    }
    run.end();
    (run.pages, run.with.store.counters().trimmed_bytes)
}

#[test]
fn behaves_like_a_store_that_copies_everything() {
    let pages: usize = (0..60).map(|seed| run(seed, false).0).sum();
    assert!(pages > 500, "{pages} pages compared");
}

#[test]
fn where_memory_is_scarce_what_is_given_is_still_right() {
    let (mut pages, mut trimmed_bytes) = (0, 0);
    for seed in 1000..1060 {
        let found = run(seed, true);
        pages += found.0;
        trimmed_bytes += found.1;
    }
    assert!(pages > 100 && trimmed_bytes > 10_000, "{pages} pages compared, {trimmed_bytes} bytes trimmed");
}
