//! Dialogues with a store: requests as text, answers read whole.

mod reads;
mod room;

use super::*;
use crate::http::{HeadLimits, header_slots, parse_request};
use crate::slots::Key;

/// A store, a clock, and readers that are counted.
pub(super) struct Dialogue {
    pub(super) store: Store,
    pub(super) settings: Settings,
    pub(super) now: Now,
    readers: u32,
}

/// An answer as its client has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Heard {
    pub(super) status: u16,
    lines: String,
    pub(super) body: Vec<u8>,
}

impl Heard {
    /// The value of a field.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.lines.split("\r\n").find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub(super) fn next_offset(&self) -> String {
        self.field("Stream-Next-Offset").unwrap().to_owned()
    }

    pub(super) fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }

    fn code(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        body["error"]["code"].as_str().unwrap().to_owned()
    }
}

impl Dialogue {
    pub(super) fn new(settings: Settings) -> Self {
        let now = Now { ms: 5_000, unix_ms: 1_763_783_000_000, random: 7 };
        Dialogue { store: Store::new(settings.clone()), settings, now, readers: 0 }
    }

    pub(super) fn wait_ms(&mut self, ms: u64) {
        self.now.ms += ms;
        self.now.unix_ms += ms;
    }

    /// `line` is a method and a target; `fields` are lines.
    pub(super) fn reply(&mut self, line: &str, fields: &str, body: &[u8]) -> Reply {
        let text = format!("{line} HTTP/1.1\n{fields}Host: a\n\n").replace('\n', "\r\n");
        let mut slots = header_slots();
        let head = parse_request(text.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        self.readers += 1;
        match Request::parse(&head, &self.settings) {
            Ok(request) => self.store.handle(&request, body, self.reader(), self.now),
            Err(fault) => Reply::Answer(self.store.refuse(&fault)),
        }
    }

    /// Who the last request would be woken as.
    pub(super) fn reader(&self) -> Key {
        Key { slot: self.readers, generation: std::num::NonZeroU32::MIN }
    }

    pub(super) fn ask(&mut self, line: &str, fields: &str, body: &[u8]) -> Heard {
        let reply = self.reply(line, fields, body);
        self.hear(reply)
    }

    pub(super) fn hear(&mut self, reply: Reply) -> Heard {
        let (answer, mut body) = match reply {
            Reply::Answer(mut answer) => {
                let body = std::mem::take(&mut answer.body);
                (answer, body)
            }
            Reply::Body(answer, bytes, mut reading) => {
                let (body, progress) = self.read(&mut reading);
                assert_eq!((body.len() as u64, progress), (bytes, Progress::Ended));
                (answer, body)
            }
            Reply::Events(answer, mut reading) => {
                let (body, _) = self.read(&mut reading);
                self.store.leave(&mut reading, self.now);
                (answer, body)
            }
            Reply::Wait(_) => panic!("it waits"),
        };
        body.shrink_to_fit();
        Heard { status: answer.status, lines: answer.lines, body }
    }

    /// All that there is at present, in small bits.
    pub(super) fn read(&mut self, reading: &mut Reading) -> (Vec<u8>, Progress) {
        let mut body = Vec::new();
        for bytes_max in (1..40).cycle() {
            let progress = self.store.read(reading, self.now, &mut body, bytes_max);
            if progress != Progress::More {
                if matches!(progress, Progress::Ended | Progress::Gone) {
                    self.store.leave(reading, self.now);
                }
                return (body, progress);
            }
        }
        unreachable!("a cycle does not end")
    }

    fn events(&mut self, target: &str, fields: &str) -> (Heard, Reading) {
        match self.reply(&format!("GET {target}"), fields, b"") {
            Reply::Events(answer, mut reading) => {
                let (body, _) = self.read(&mut reading);
                (Heard { status: answer.status, lines: answer.lines, body }, reading)
            }
            other => panic!("{other:?}"),
        }
    }

    fn wait(&mut self, target: &str) -> Poll {
        match self.reply(&format!("GET {target}"), "", b"") {
            Reply::Wait(poll) => poll,
            other => panic!("{other:?}"),
        }
    }

    fn woken(&mut self) -> Vec<Key> {
        let mut woken = Vec::new();
        self.store.take_woken(&mut woken);
        woken
    }
}

fn dialogue() -> Dialogue {
    Dialogue::new(Settings::default())
}

const TEXT: &str = "Content-Type: text/plain\n";
const JSON: &str = "Content-Type: application/json\n";

#[test]
fn a_stream_is_created_appended_to_read_and_deleted() {
    let mut with = dialogue();
    let created = with.ask("PUT /v1/durable/a", TEXT, b"");
    assert_eq!((created.status, created.field("Location")), (201, Some("http://a/v1/durable/a")));
    let start = created.next_offset();
    assert_eq!(with.ask("PUT /v1/durable/a", "Content-Type: TEXT/plain; charset=x\n", b"").status, 200);
    assert_eq!(with.ask("PUT /v1/durable/a", JSON, b"").code(), "stream_exists");
    let appended = with.ask("POST /v1/durable/a", TEXT, b"one ");
    assert_eq!(appended.status, 204);
    assert!(appended.next_offset() > start);
    with.ask("POST /v1/durable/a", TEXT, b"two");
    let all = with.ask("GET /v1/durable/a", "", b"");
    assert_eq!(
        (all.text(), all.field("Stream-Up-To-Date"), all.field("Stream-Closed")),
        ("one two", Some("true"), None)
    );
    let rest = with.ask(&format!("GET /v1/durable/a?offset={}", appended.next_offset()), "", b"");
    assert_eq!(rest.text(), "two");
    let head = with.ask("HEAD /v1/durable/a", "", b"");
    assert_eq!((head.status, head.next_offset()), (200, all.next_offset()));
    assert_eq!(with.ask("DELETE /v1/durable/a", "", b"").status, 204);
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").code(), "stream_not_found");
    assert_eq!(with.ask("DELETE /v1/durable/a", "", b"").status, 404);
    assert_eq!(with.store.totals(), Totals::default());
}

#[test]
fn an_offset_does_not_point_into_the_next_stream_at_its_path() {
    let mut with = dialogue();
    let old = with.ask("PUT /v1/durable/a", TEXT, b"old data").next_offset();
    with.ask("DELETE /v1/durable/a", "", b"");
    with.ask("PUT /v1/durable/a", TEXT, b"new data, and more of it");
    let answer = with.ask(&format!("GET /v1/durable/a?offset={old}"), "", b"");
    assert_eq!((answer.status, answer.code().as_str()), (410, "offset_of_another_stream"));
    let beyond = with.ask("HEAD /v1/durable/a", "", b"").next_offset().replace("24", "25");
    assert_eq!(with.ask(&format!("GET /v1/durable/a?offset={beyond}"), "", b"").code(), "offset_beyond_end");
}

#[test]
fn json_is_kept_by_message_and_given_as_an_array() {
    let mut with = dialogue();
    let start = with.ask("PUT /v1/durable/a", JSON, b"[]").next_offset();
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").text(), "[]");
    let one = with.ask("POST /v1/durable/a", JSON, b" {\"n\": 1} ").next_offset();
    let three = with.ask("POST /v1/durable/a", JSON, b"[[2],\n3]").next_offset();
    let read = |with: &mut Dialogue, from: &str| {
        with.ask(&format!("GET /v1/durable/a?offset={from}"), "", b"").text().to_owned()
    };
    assert_eq!(read(&mut with, &start), "[{\"n\": 1},[2],3]");
    assert_eq!(read(&mut with, &one), "[[2],3]");
    assert_eq!(read(&mut with, &three), "[]");
    assert_eq!(read(&mut with, "now"), "[]");
    for (body, code) in [(&b"{"[..], "bad_json"), (b"[]", "empty_array"), (b"", "empty_body")] {
        assert_eq!(with.ask("POST /v1/durable/a", JSON, body).code(), code);
    }
    assert_eq!(with.ask("POST /v1/durable/a", TEXT, b"1").code(), "content_type_differs");
    assert_eq!(with.ask("POST /v1/durable/a", "", b"1").code(), "content_type_required");
    // Between two messages only.
    let inside = format!("{}{}", &one[..one.len() - 1], one[one.len() - 1..].parse::<u8>().unwrap() - 1);
    assert_eq!(with.ask(&format!("GET /v1/durable/a?offset={inside}"), "", b"").code(), "bad_offset");
}

#[test]
fn a_closed_stream_says_so_where_it_ends() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"one");
    let before = with.ask("GET /v1/durable/a", "", b"");
    let closed = with.ask("POST /v1/durable/a", "Stream-Closed: true\nContent-Type: x/y\n", b"");
    assert_eq!((closed.status, closed.field("Stream-Closed")), (204, Some("true")));
    assert_eq!(with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"").status, 204, "twice is as once");
    let refused = with.ask("POST /v1/durable/a", TEXT, b"two");
    assert_eq!((refused.status, refused.field("Stream-Closed")), (409, Some("true")));
    assert_eq!(refused.next_offset(), closed.next_offset());
    let after = with.ask("GET /v1/durable/a", "", b"");
    assert_eq!((after.text(), after.field("Stream-Closed")), ("one", Some("true")));
    assert_ne!(before.field("ETag"), after.field("ETag"), "the closing is news");
    let end = with.ask(&format!("GET /v1/durable/a?offset={}", after.next_offset()), "", b"");
    assert_eq!((end.status, end.body.len(), end.field("Stream-Closed")), (200, 0, Some("true")));
    assert_eq!(with.ask("PUT /v1/durable/a", TEXT, b"").status, 409);
    assert_eq!(
        with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-Closed: true\n", b"").status,
        200
    );
}

#[test]
fn appends_of_producers_count_once_and_zombies_are_fenced() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"");
    let mut append = |epoch: u64, sequence: u64, body: &str| {
        let fields = format!("{TEXT}Producer-Id: p\nProducer-Epoch: {epoch}\nProducer-Seq: {sequence}\n");
        with.ask("POST /v1/durable/a", &fields, body.as_bytes())
    };
    let first = append(0, 0, "a");
    assert_eq!(
        (first.status, first.field("Producer-Epoch"), first.field("Producer-Seq")),
        (200, Some("0"), Some("0"))
    );
    assert_eq!(append(0, 1, "b").status, 200);
    let again = append(0, 0, "a");
    assert_eq!((again.status, again.field("Producer-Seq")), (204, Some("1")), "the highest accepted");
    let gap = append(0, 3, "d");
    assert_eq!(
        (gap.status, gap.field("Producer-Expected-Seq"), gap.field("Producer-Received-Seq")),
        (409, Some("2"), Some("3"))
    );
    assert_eq!(append(1, 1, "x").code(), "epoch_start");
    assert_eq!(append(1, 0, "c").status, 200);
    let zombie = append(0, 2, "z");
    assert_eq!((zombie.status, zombie.field("Producer-Epoch")), (403, Some("1")));
    let other = "Content-Type: text/plain\nProducer-Id: q\nProducer-Epoch: 5\nProducer-Seq: 1\n";
    assert_eq!(with.ask("POST /v1/durable/a", other, b"q").field("Producer-Expected-Seq"), Some("0"));
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").text(), "abc");
    assert_eq!(with.store.counters().duplicates, 1);
}

#[test]
fn a_refused_append_moves_no_sequence_on() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", JSON, b"");
    let fields = |sequence: u64, text: &str| {
        format!("{JSON}Producer-Id: p\nProducer-Epoch: 0\nProducer-Seq: {sequence}\nStream-Seq: {text}\n")
    };
    assert_eq!(with.ask("POST /v1/durable/a", &fields(0, "b"), b"{").code(), "bad_json");
    assert_eq!(with.ask("POST /v1/durable/a", &fields(0, "b"), b"1").status, 200);
    assert_eq!(with.ask("POST /v1/durable/a", &fields(1, "B"), b"2").code(), "sequence_regression");
    assert_eq!(
        with.ask("POST /v1/durable/a", &fields(0, "a"), b"1").status,
        204,
        "a repeat is told before that"
    );
    assert_eq!(with.ask("POST /v1/durable/a", &fields(1, "c"), b"2").status, 200);
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").text(), "[1,2]");
}

#[test]
fn the_append_that_closed_a_stream_may_be_repeated() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"");
    let fields = |epoch: u64, sequence: u64| {
        format!(
            "{TEXT}Stream-Closed: true\nProducer-Id: p\nProducer-Epoch: {epoch}\nProducer-Seq: {sequence}\n"
        )
    };
    assert_eq!(with.ask("POST /v1/durable/a", &fields(1, 0), b"end").status, 200);
    let again = with.ask("POST /v1/durable/a", &fields(1, 0), b"other");
    assert_eq!((again.status, again.field("Stream-Closed")), (204, Some("true")));
    assert_eq!(with.ask("POST /v1/durable/a", &fields(1, 1), b"more").code(), "stream_closed");
    assert_eq!(with.ask("POST /v1/durable/a", &fields(0, 1), b"late").code(), "stale_epoch");
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").text(), "end");
}

#[test]
fn a_stream_forgets_no_producer_that_may_come_back() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"");
    let append = |with: &mut Dialogue, id: usize| {
        let fields = format!("{TEXT}Producer-Id: {id}\nProducer-Epoch: 0\nProducer-Seq: 0\n");
        with.ask("POST /v1/durable/a", &fields, b"x").status
    };
    for id in 0..limits::DURABLE_PRODUCERS_MAX {
        assert_eq!(append(&mut with, id), 200);
    }
    assert_eq!(append(&mut with, limits::DURABLE_PRODUCERS_MAX), 429);
    with.wait_ms(limits::DURABLE_PRODUCER_FORGET_MS + 1);
    assert_eq!(append(&mut with, limits::DURABLE_PRODUCERS_MAX), 200);
    assert_eq!(append(&mut with, 0), 200, "forgotten, so it is new");
}

#[test]
fn time_to_live_slides_with_reads_and_writes_and_not_with_looks() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-TTL: 10\n", b"x");
    for line in ["GET /v1/durable/a", "POST /v1/durable/a", "GET /v1/durable/a?offset=now"] {
        with.wait_ms(9_999);
        assert!(with.ask(line, TEXT, b"y").status < 300, "{line}");
    }
    with.wait_ms(9_999);
    assert_eq!(with.ask("HEAD /v1/durable/a", "", b"").field("Stream-TTL"), Some("10"));
    with.wait_ms(1);
    assert_eq!(with.ask("HEAD /v1/durable/a", "", b"").status, 404);
    assert_eq!((with.store.counters().expiries, with.store.totals().streams), (1, 0));
    assert_eq!(with.ask("PUT /v1/durable/a", TEXT, b"").status, 201, "the path is free");
}

#[test]
fn a_stream_that_is_being_read_does_not_expire() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-TTL: 10\n", b"x");
    let (_, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    for _ in 0..10 {
        with.wait_ms(9_000);
        with.store.expire(with.now);
    }
    with.store.leave(&mut reading, with.now);
    with.wait_ms(9_000);
    assert_eq!(with.ask("HEAD /v1/durable/a", "", b"").status, 200);
    // And expires without being looked at.
    with.wait_ms(20_000);
    assert!(with.store.next_due_ms().is_some_and(|due_ms| due_ms <= with.now.ms));
    with.store.expire(with.now);
    assert_eq!((with.store.totals().streams, with.store.next_due_ms()), (0, None));
}

#[test]
fn a_stream_ends_at_its_time_whoever_reads_it() {
    let mut with = dialogue();
    let at = "2025-11-22T03:43:21.5Z";
    with.now.unix_ms = timestamp::parse("2025-11-22T03:43:20Z").unwrap();
    with.ask("PUT /v1/durable/a", &format!("{TEXT}Stream-Expires-At: {at}\n"), b"x");
    assert_eq!(with.ask("HEAD /v1/durable/a", "", b"").field("Stream-Expires-At"), Some(at));
    let same = "Stream-Expires-At: 2025-11-22T04:43:21.500+01:00\n";
    assert_eq!(with.ask("PUT /v1/durable/a", &format!("{TEXT}{same}"), b"").status, 200);
    let (_, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let reader = with.reader();
    with.wait_ms(1_500);
    with.store.expire(with.now);
    assert_eq!(with.woken(), [reader]);
    assert_eq!(with.read(&mut reading).1, Progress::Gone);
    assert_eq!(with.store.totals(), Totals::default());
}

#[test]
fn a_fork_has_what_its_source_had_and_goes_its_own_way() {
    let mut with = dialogue();
    let source = "Stream-Forked-From: /v1/durable/a\n";
    let one = with.ask("PUT /v1/durable/a", JSON, b"[1,2]").next_offset();
    with.ask("POST /v1/durable/a", JSON, b"[3,4,5]");
    let fork = format!("{source}Stream-Fork-Offset: {one}\nStream-Fork-Sub-Offset: 2\n");
    assert_eq!(with.ask("PUT /v1/durable/b", &fork, b"").status, 201);
    assert_eq!(with.ask("PUT /v1/durable/b", &fork, b"").status, 200);
    assert_eq!(with.ask("PUT /v1/durable/b", source, b"").status, 409);
    with.ask("POST /v1/durable/b", JSON, b"\"b\"");
    with.ask("POST /v1/durable/a", JSON, b"6");
    let read =
        |with: &mut Dialogue, of: &str| with.ask(&format!("GET /v1/durable/{of}"), "", b"").text().to_owned();
    assert_eq!(
        (read(&mut with, "a"), read(&mut with, "b")),
        ("[1,2,3,4,5,6]".to_owned(), "[1,2,3,4,\"b\"]".to_owned())
    );
    let across = with.ask(&format!("GET /v1/durable/b?offset={one}"), "", b"");
    assert_eq!(across.text(), "[3,4,\"b\"]", "offsets of the source are those of the fork");
    // A fork of the fork, at a byte of the middle one.
    with.ask("PUT /v1/durable/t", TEXT, b"hello");
    let sub = "Stream-Forked-From: /v1/durable/t\nStream-Fork-Offset: 0000000000000000_0000000000000000\nStream-Fork-Sub-Offset: 3\n";
    with.ask("PUT /v1/durable/u", sub, b"XY");
    assert_eq!(read(&mut with, "u"), "helXY");
    let (heard, _) = with.events("/v1/durable/u?offset=-1", "Accept: text/event-stream\n");
    assert!(
        heard.text().starts_with("retry:507\ndata:hel\nid:") && heard.text().contains("\n\ndata:XY\nid:")
    );
    for (fields, code) in [
        ("Stream-Forked-From: /v1/durable/x\n", "source_not_found"),
        ("Stream-Forked-From: /v1/durable/t\nContent-Type: a/b\n", "content_type_differs"),
        ("Stream-Forked-From: /v1/durable/t\nStream-Fork-Sub-Offset: 1\n", "fork_beyond_end"),
        (
            "Stream-Forked-From: /v1/durable/t\nStream-Fork-Offset: 9999999999999999_9999999999999999\n",
            "fork_beyond_end",
        ),
        (&sub.replace('3', "6"), "fork_beyond_end"),
    ] {
        assert_eq!(with.ask("PUT /v1/durable/v", fields, b"").code(), code, "{fields}");
    }
}

#[test]
fn a_deleted_source_lives_on_for_its_forks_alone() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"A");
    with.ask("PUT /v1/durable/b", "Stream-Forked-From: /v1/durable/a\n", b"B");
    with.ask("PUT /v1/durable/c", "Stream-Forked-From: /v1/durable/b\n", b"C");
    let (_, mut reading) = with.events("/v1/durable/a?offset=now&live=sse", "");
    assert_eq!(with.ask("DELETE /v1/durable/a", "", b"").status, 204);
    assert_eq!(with.read(&mut reading).1, Progress::Gone);
    for line in ["GET /v1/durable/a", "HEAD /v1/durable/a", "POST /v1/durable/a", "DELETE /v1/durable/a"] {
        assert_eq!(with.ask(line, TEXT, b"x").status, 410, "{line}");
    }
    assert_eq!(with.ask("PUT /v1/durable/a", TEXT, b"").code(), "path_held");
    assert_eq!(
        with.ask("PUT /v1/durable/d", "Stream-Forked-From: /v1/durable/a\n", b"").code(),
        "source_deleted"
    );
    with.ask("DELETE /v1/durable/b", "", b"");
    assert_eq!(with.ask("GET /v1/durable/c", "", b"").text(), "ABC");
    assert_eq!(with.store.totals().streams, 3);
    with.ask("DELETE /v1/durable/c", "", b"");
    assert_eq!(with.store.totals(), Totals::default(), "the last fork takes its sources along");
}

#[test]
fn forks_live_as_long_as_their_sources_unless_told_otherwise() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-TTL: 10\n", b"A");
    let fork = "Stream-Forked-From: /v1/durable/a\n";
    with.ask("PUT /v1/durable/b", fork, b"");
    assert_eq!(with.ask("HEAD /v1/durable/b", "", b"").field("Stream-TTL"), Some("10"));
    assert_eq!(with.ask("PUT /v1/durable/b", fork, b"").status, 200, "as it was asked for");
    with.ask("PUT /v1/durable/c", &format!("{fork}Stream-TTL: 99\n"), b"");
    with.wait_ms(9_000);
    // Reading a fork does not keep its source.
    let (_, mut reading) = with.events("/v1/durable/c?offset=-1&live=sse", "");
    with.wait_ms(2_000);
    assert_eq!(with.ask("GET /v1/durable/a", "", b"").status, 410);
    assert_eq!(with.ask("GET /v1/durable/b", "", b"").status, 404);
    assert_eq!(with.ask("GET /v1/durable/c", "", b"").text(), "A");
    with.store.leave(&mut reading, with.now);
    with.wait_ms(100_000);
    with.store.expire(with.now);
    assert_eq!(with.store.totals(), Totals::default());
}

#[test]
fn forks_go_no_deeper_than_a_read_may() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/0", TEXT, b"x");
    for depth in 1..=limits::DURABLE_FORK_DEPTH_MAX {
        let from = format!("Stream-Forked-From: /v1/durable/{}\n", depth - 1);
        assert_eq!(with.ask(&format!("PUT /v1/durable/{depth}"), &from, b"y").status, 201);
    }
    let last = limits::DURABLE_FORK_DEPTH_MAX;
    assert_eq!(with.ask(&format!("GET /v1/durable/{last}"), "", b"").body.len(), last + 1);
    let from = format!("Stream-Forked-From: /v1/durable/{last}\n");
    assert_eq!(with.ask("PUT /v1/durable/x", &from, b"").code(), "fork_depth");
}

#[test]
fn answers_are_safe_to_show_to_a_browser() {
    let mut with = dialogue();
    for line in [
        "PUT /v1/durable/a",
        "GET /v1/durable/a",
        "GET /v1/durable/x",
        "PATCH /v1/durable/a",
        "OPTIONS /v1/durable/a",
    ] {
        let heard = with.ask(line, "", b"");
        assert_eq!(heard.field("X-Content-Type-Options"), Some("nosniff"), "{line}");
        assert_eq!(heard.field("Access-Control-Allow-Origin"), Some("*"), "{line}");
    }
    let mut closed = Dialogue::new(Settings { cors: false, ..Settings::default() });
    let heard = closed.ask("OPTIONS /v1/durable/a", "", b"");
    assert_eq!((heard.status, heard.field("Access-Control-Allow-Origin")), (204, None));
    assert_eq!(heard.field("Cross-Origin-Resource-Policy"), Some("same-origin"));
}
