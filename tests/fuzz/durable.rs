//! Requests of the Durable Streams protocol, one after the other on one store. Whatever they say: answers are well formed and
//! carry no line of a client's, bodies are as long as announced, arrays and control events are JSON, each offset given out
//! is one that can be read from, memory keeps its bound, and who has left is no reader.

use protocol::durable::{Answer, Now, Offset, Progress, Reading, Reply, Request, Settings, Store};
use protocol::http::{HeadLimits, header_slots, parse_request};
use protocol::slots::Key;
use std::num::NonZeroU32;

/// Lines of requests. Between two requests stands a NUL.
pub const WORDS: &[&str] = &[
    "\0PUT /v1/durable/a\n",
    "\0POST /v1/durable/a\n",
    "\0GET /v1/durable/a\n",
    "\0GET /v1/durable/a?offset=-1&live=sse\n",
    "\0GET /v1/durable/a?offset=now&live=long-poll\n",
    "\0HEAD /v1/durable/a\n",
    "\0DELETE /v1/durable/a\n",
    "\0PUT /v1/durable/b\n",
    "\0GET /v1/durable/b?offset=0000000000000000_0000000000000000\n",
    "Content-Type: application/json\n",
    "Content-Type: text/plain\n",
    "Content-Type: a/b\n",
    "Stream-Closed: true\n",
    "Stream-TTL: 1\n",
    "Stream-Expires-At: 2024-10-09T00:00:01Z\n",
    "Stream-Seq: a\n",
    "Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: 0\n",
    "Producer-Seq: 1\n",
    "Stream-Forked-From: /v1/durable/a\n",
    "Stream-Fork-Offset: 0000000000000000_0000000000000000\n",
    "Stream-Fork-Sub-Offset: 1\n",
    "Accept: text/event-stream\n",
    "Last-Event-ID: 0001728432000000_0000000000000002\n",
    "If-None-Match: *\n",
    "offset=0001728432000000_0000000000000001",
    "&cursor=1",
    "\n[1,{\"a\":2}]",
    "\n\"x\"",
    "\nab\r\ncd\n\nevent: control",
    "\n\u{20ac}",
];

/// Small enough that inputs fill it.
fn settings() -> Settings {
    Settings { body_bytes_max: 512, stream_bytes_max: 256, store_bytes_max: 6 << 10, ..Settings::default() }
}

/// The target.
pub fn run(data: &[u8]) {
    let settings = settings();
    let mut store = Store::new(settings.clone());
    // Shortly after the epoch of cursors, so that small ones collide.
    let mut now = Now { ms: 1, unix_ms: 1_728_432_000_000, random: 1 };
    for (number, request) in data.split(|byte| *byte == 0).enumerate() {
        now.ms += 300;
        now.unix_ms += 300;
        now.random = number as u64;
        store.expire(now);
        if let Some(offset) = exchange(&mut store, &settings, request, number as u32, now) {
            // Given out for this path: it can be read from, unless it has been dropped since.
            let line = String::from_utf8_lossy(request);
            let path = line.split([' ', '?', '\n']).nth(1).unwrap_or_default();
            let again = format!("GET {path}?offset={offset}\n");
            let status =
                ask(&mut store, &settings, again.as_bytes(), number as u32, now).map(|reply| reply.1);
            // Some streams are created with their time over already.
            let lower = String::from_utf8_lossy(data).to_ascii_lowercase();
            let timed = lower.contains("stream-ttl") || lower.contains("stream-expires-at");
            let gone = timed && status == Some(404);
            assert!(gone || matches!(status, Some(200 | 410)), "{status:?} for the offset {offset}");
        }
        let totals = store.totals();
        // An append may end in a segment that is larger than it.
        assert!(totals.bytes <= settings.store_bytes_max + 1024, "{} bytes are held", totals.bytes);
        assert_eq!(totals.readers, 0, "somebody who has left reads on");
    }
    store.take_woken(&mut Vec::new());
}

/// Carries one request out; gives the offset that it was told for the next.
fn exchange(store: &mut Store, settings: &Settings, text: &[u8], number: u32, now: Now) -> Option<Offset> {
    let (offset, _) = ask(store, settings, text, number, now)?;
    offset
}

/// The same, and its status.
fn ask(
    store: &mut Store,
    settings: &Settings,
    text: &[u8],
    number: u32,
    now: Now,
) -> Option<(Option<Offset>, u16)> {
    let (line, rest) = split(text, b"\n");
    let (fields, body) = if rest.starts_with(b"\n") { (&b""[..], &rest[1..]) } else { split(rest, b"\n\n") };
    let mut head = [line, b" HTTP/1.1\r\nHost: a\r\n"].concat();
    for field in fields.split(|byte| *byte == b'\n').filter(|field| !field.is_empty()) {
        head.extend_from_slice(&[field, b"\r\n"].concat());
    }
    head.extend_from_slice(b"\r\n");
    let mut slots = header_slots();
    let Ok(Some(head)) = parse_request(&head, &mut slots, &HeadLimits::default()) else { return None };
    if !settings.covers(head.path()) {
        return None;
    }
    let body = &body[..body.len().min(settings.body_bytes_max as usize)];
    let reply = match Request::parse(&head, settings) {
        Ok(request) => store.handle(&request, body, Key { slot: number, generation: NonZeroU32::MIN }, now),
        Err(fault) => Reply::Answer(store.refuse(&fault)),
    };
    hear(store, reply, now)
}

fn hear(store: &mut Store, reply: Reply, now: Now) -> Option<(Option<Offset>, u16)> {
    match reply {
        Reply::Answer(answer) => {
            let has_json = field(&answer, "Content-Type") == Some("application/json");
            if has_json && !answer.body.is_empty() {
                is_json(&answer.body);
            }
            Some((well_formed(&answer), answer.status))
        }
        Reply::Body(head, bytes, mut reading) => {
            let body = read(store, &mut reading, now);
            assert_eq!(body.len() as u64, bytes, "a body as long as announced");
            let kind =
                field(&head, "Content-Type").and_then(|kind| kind.split(';').next()).unwrap_or_default();
            if kind.trim().eq_ignore_ascii_case("application/json") {
                // By the grammar alone: a number may be larger than any that a reader of ours could hold.
                let read = serde_json::from_slice::<serde::de::IgnoredAny>(&body);
                assert!(
                    read.is_ok() && body.starts_with(b"["),
                    "{read:?}: {:?}",
                    body.escape_ascii().to_string()
                );
            }
            Some((well_formed(&head), head.status))
        }
        Reply::Events(head, mut reading) => {
            assert_eq!(field(&head, "Content-Type"), Some("text/event-stream"));
            let body = read(store, &mut reading, now);
            store.leave(&mut reading, now);
            assert!(!reading.is_within() && body.ends_with(b"\n\n"));
            let offset = well_formed(&head);
            controls(&body);
            Some((offset, head.status))
        }
        Reply::Wait(mut poll) => {
            assert!(store.poll(&mut poll, false, now).is_none(), "it waits for nothing");
            let reply = store.poll(&mut poll, true, now)?;
            hear(store, reply, now)
        }
    }
}

/// Everything there is, in bits of odd sizes.
fn read(store: &mut Store, reading: &mut Reading, now: Now) -> Vec<u8> {
    let mut body = Vec::new();
    for bytes_max in (1..20).cycle() {
        if store.read(reading, now, &mut body, bytes_max) != Progress::More {
            break;
        }
        assert!(body.len() < 1 << 16, "a reading that does not end");
    }
    store.leave(reading, now);
    body
}

/// Every line of a head is a field of ours; gives the next offset, if it names one.
fn well_formed(answer: &Answer) -> Option<Offset> {
    assert!((200..600).contains(&answer.status));
    assert!(answer.body.is_empty() || !matches!(answer.status, 204 | 304));
    for line in answer.lines.split_terminator("\r\n") {
        let (name, value) = line.split_once(": ").unwrap_or_default();
        assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{line:?}");
        assert!(!name.is_empty() && value.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{line:?}");
    }
    assert!(field(answer, "X-Content-Type-Options") == Some("nosniff"));
    let text = field(answer, "Stream-Next-Offset")?;
    let offset = Offset::parse(text);
    assert!(offset.is_some(), "{text:?} is no offset");
    offset.filter(|_| answer.status < 300)
}

fn field<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    answer.lines.split("\r\n").find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn is_json(body: &[u8]) -> serde_json::Value {
    match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(error) => panic!("{error}: {:?}", String::from_utf8_lossy(body)),
    }
}

/// Control events are ours: what is published cannot look like one.
fn controls(body: &[u8]) {
    assert!(!body.contains(&b'\r'), "a line end that is not ours");
    let mut last = None;
    for block in split_all(body, b"\n\n") {
        let Some(data) = block.strip_prefix(b"event: control\ndata:") else {
            let first = block.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let known = [&b"event: data"[..], b"data:", b"id:", b"retry:"];
            assert!(
                known.iter().any(|start| first.starts_with(start)),
                "{:?}",
                block.escape_ascii().to_string()
            );
            continue;
        };
        let (data, _) = split(data, b"\nid:");
        let value = is_json(data);
        let next = value["streamNextOffset"].as_str().and_then(Offset::parse);
        assert!(next.is_some() && next >= last, "offsets grow");
        last = next;
    }
}

fn split<'a>(bytes: &'a [u8], at: &[u8]) -> (&'a [u8], &'a [u8]) {
    match bytes.windows(at.len()).position(|window| window == at) {
        Some(found) => (&bytes[..found], &bytes[found + at.len()..]),
        None => (bytes, b""),
    }
}

fn split_all<'a>(mut bytes: &'a [u8], at: &[u8]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        let (part, rest) = split(bytes, at);
        parts.push(part);
        bytes = rest;
    }
    parts
}
