//! Journals of durable and of relayed streams whose files were damaged: bytes changed, stretches lost or copied elsewhere, ends cut off, whole
//! segments gone. Reading it never panics, and whatever it still gives out under an old offset is what was there.

use super::input::Choices;
use protocol::durable::journal::{Job, Recovered, Recovery, RelayFacts};
use protocol::durable::relayed::RelayJournal;
use protocol::durable::{Now, Reply, Request, Settings, Store};
use protocol::http::{HeadLimits, header_slots, parse_request};
use protocol::log::{Log, Place};
use protocol::slots::Key;
use std::collections::BTreeMap;
use std::sync::LazyLock;

const STREAMS: u64 = 4;
const NOW: Now = Now { ms: 1, unix_ms: 1_763_783_000_000, random: 1 };

type Files = BTreeMap<u64, Vec<u8>>;

/// A journal, and all that was ever appended to each stream.
static JOURNAL: LazyLock<(Files, Vec<Vec<u8>>)> = LazyLock::new(journal);

fn settings() -> Settings {
    Settings { segment_bytes: 3_000, ..Settings::default() }
}

fn ask(store: &mut Store, line: &str, body: &[u8]) {
    let text = format!("{line} HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n\r\n");
    let mut slots = header_slots();
    let head = parse_request(text.as_bytes(), &mut slots, &HeadLimits::default());
    let head = head.expect("a request").expect("a whole one");
    let request = Request::parse(&head, &settings()).expect("a request of the protocol");
    let reader = Key { slot: 0, generation: std::num::NonZeroU32::MIN };
    assert!(
        matches!(store.handle(&request, body, reader, NOW), Reply::Answer(answer) if answer.status < 300)
    );
}

fn journal() -> (Files, Vec<Vec<u8>>) {
    let mut store = Store::with_journal(settings(), Recovered::default(), 9, NOW);
    let mut files = Files::new();
    let mut contents = Vec::new();
    for stream in 0..STREAMS {
        ask(&mut store, &format!("PUT /v1/durable/{stream}"), b"");
        contents.push(Vec::new());
    }
    for number in 0..80_u64 {
        let stream = (number * number) % 7 % STREAMS;
        let message = format!("{number} of {stream};").repeat((number % 5) as usize + 1);
        ask(&mut store, &format!("POST /v1/durable/{stream}"), message.as_bytes());
        contents[stream as usize].extend_from_slice(message.as_bytes());
        while let Some(job) = store.next_job(number) {
            if let Job::Write { segment, at, bytes, .. } = job {
                let file = files.entry(segment).or_default();
                file.truncate(at as usize);
                file.extend_from_slice(&bytes);
            }
            store.job_done(Ok(()), number);
        }
    }
    (files, contents)
}

/// The same of relayed streams: what each log got.
static RELAYED: LazyLock<(Files, Vec<Vec<u8>>)> = LazyLock::new(relayed);

fn relay_facts(stream: u64) -> RelayFacts {
    let (route, dialect) = ("default".into(), "responses".into());
    RelayFacts {
        route,
        dialect,
        chunked: stream.is_multiple_of(2),
        background: true,
        began_unix_ms: 1,
        begin: 10,
    }
}

fn relayed() -> (Files, Vec<Vec<u8>>) {
    let (mut journal, _) = RelayJournal::new(Recovered::default(), 3_000, 0, 9, 1 << 20, |_| 1 << 30);
    let mut files = Files::new();
    let mut logs: Vec<Log> = Vec::new();
    for stream in 0..STREAMS {
        let mut log = Log::new();
        log.append(&[b"the head\r\n"]);
        log.keep(1 << 30);
        logs.push(log);
        journal.begin(stream, relay_facts(stream));
    }
    for number in 0..80_u64 {
        let stream = (number * number) % 7 % STREAMS;
        let log = &mut logs[stream as usize];
        let text = format!("{number} ").repeat((number % 5) as usize * 9 + 1);
        let event =
            format!("id: {}\nevent: response.created\ndata: {{\"a\":\"{text}\"}}\n\n", log.next_event_id());
        match stream % 2 {
            0 => log.append(&[format!("{:x}\r\n", event.len()).as_bytes(), event.as_bytes(), b"\r\n"]),
            _ => log.append(&[event.as_bytes()]),
        };
        log.event_ends();
        journal.follow(stream, log, None, None);
        while let Some(job) = journal.next_job(|stream| logs.get(stream as usize), number) {
            if let Job::Write { segment, at, bytes, .. } = job {
                let file = files.entry(segment).or_default();
                file.truncate(at as usize);
                file.extend_from_slice(&bytes);
            }
            journal.job_done(Ok(()), number);
        }
    }
    let bytes = |log: &Log| {
        let mut bytes = Vec::new();
        while let Some(lent) = log.lend(bytes.len() as u64, u32::MAX) {
            bytes.extend(lent.to_vec());
        }
        bytes
    };
    (files, logs.iter().map(bytes).collect())
}

fn run_relayed(data: &[u8]) {
    let (files, contents) = &*RELAYED;
    let mut files = files.clone();
    let mut choices = Choices::of(data);
    for _ in 0..8 {
        if files.is_empty() || !choices.any_left() {
            break;
        }
        damage(&mut files, &mut choices);
    }
    let recovered = recover(&files);
    for stream in recovered.relayed() {
        assert!(stream.content().len() as u64 <= stream.bytes());
    }
    let (mut journal, restored) = RelayJournal::new(recovered, 3_000, 0, 11, 1 << 20, |_| 1 << 30);
    for restored in &restored {
        let content = &contents[restored.stream as usize];
        let mut from = restored.log.start();
        while let Some(lent) = restored.log.lend(from, u32::MAX) {
            let to = from + lent.len() as u64;
            assert_eq!(lent.to_vec(), &content[from as usize..to as usize], "stream {}", restored.stream);
            from = to;
        }
        for id in 0..=restored.log.last_event_id() {
            assert!(restored.log.behind(id, restored.facts.chunked) != Place::Ahead);
        }
        restored.retell();
    }
    // A server would go on with it.
    let log_of = |stream: u64| restored.iter().find(|known| known.stream == stream).map(|known| &known.log);
    while journal.next_job(log_of, 1).is_some() {
        journal.job_done(Ok(()), 1);
    }
}

fn recover(files: &Files) -> Recovered {
    let mut recovery = Recovery::new();
    for (number, bytes) in files {
        recovery.scan(*number, bytes);
    }
    for (number, bytes) in files {
        recovery.apply(*number, bytes);
    }
    recovery.finish()
}

/// The target.
pub fn run(data: &[u8]) {
    run_relayed(data);
    let (files, contents) = &*JOURNAL;
    let whole = recover(files);
    assert!(whole.findings.is_empty(), "{:?}", whole.findings);
    let mut files = files.clone();
    let mut choices = Choices::of(data);
    let mut in_place = true;
    for _ in 0..8 {
        if files.is_empty() || !choices.any_left() {
            break;
        }
        in_place &= damage(&mut files, &mut choices);
    }
    let damaged = recover(&files);
    for stream in damaged.streams() {
        let Some(name) = stream.path().strip_prefix("/v1/durable/") else { panic!("{}", stream.path()) };
        let content = &contents[name.parse::<usize>().expect("a path that was created")];
        let before = whole.streams().find(|before| before.path() == stream.path()).expect("it was there");
        if stream.tail().generation != before.tail().generation {
            continue;
        }
        let (from, to) = (stream.earliest().position as usize, stream.tail().position as usize);
        assert!(to <= content.len(), "{} ends at {to}", stream.path());
        let held: Vec<u8> = stream.messages().flatten().copied().collect();
        assert_eq!(held, &content[from..to], "{}", stream.path());
        assert_eq!(damaged.content(stream.path()), Some(held));
        // An end that was cut off between two records is not seen to be missing.
        let differs = in_place && (from, to) != (0, content.len());
        assert!(
            !differs || !damaged.findings.is_empty(),
            "{} differs, and nothing is reported",
            stream.path()
        );
    }
    // A server would go on with it.
    let mut store = Store::with_journal(settings(), damaged, 11, NOW);
    while store.next_job(1).is_some() {
        store.job_done(Ok(()), 1);
    }
}

/// Does some damage; true when every byte that is left is in its place.
fn damage(files: &mut Files, choices: &mut Choices<'_>) -> bool {
    let (what, which) = (choices.below(10), choices.below(files.len()));
    let count = files.len() as u64;
    let Some(&number) = files.keys().nth(which) else { return true };
    let Some(bytes) = files.get_mut(&number) else { return true };
    let at = usize::from(choices.short()) % (bytes.len() + 1);
    let end = (at + usize::from(choices.short()) % 400).min(bytes.len());
    match what {
        0 | 1 => {
            let flip = 1 << choices.below(8);
            bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= flip);
        }
        2 => bytes[at..end].fill(0),
        3 => {
            let byte = choices.byte();
            bytes[at..end].fill(byte);
        }
        4 => bytes.truncate(at),
        5 => _ = bytes.drain(at..end),
        6 => {
            let copy = bytes[at..end].to_vec();
            let to = usize::from(choices.short()) % (bytes.len() + 1);
            bytes.splice(to..to, copy);
        }
        7 => bytes.extend_from_within(at..end),
        8 => _ = files.remove(&number),
        _ => {
            // One segment in the place of another.
            let copy = bytes.clone();
            files.insert(1 + choices.below(count as usize + 2) as u64, copy);
        }
    }
    what < 4
}
