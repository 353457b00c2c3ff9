//! Dialogues with a store: requests as text, answers read whole.

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
fn what_is_known_already_is_not_sent_again() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"one");
    let etag = with.ask("GET /v1/durable/a", "", b"").field("ETag").unwrap().to_owned();
    for known in [etag.clone(), format!("\"x\", W/{etag}"), "*".to_owned()] {
        let again = with.ask("GET /v1/durable/a", &format!("If-None-Match: {known}\n"), b"");
        assert_eq!((again.status, again.body.len(), again.field("ETag")), (304, 0, Some(etag.as_str())));
    }
    with.ask("POST /v1/durable/a", TEXT, b"two");
    assert_eq!(with.ask("GET /v1/durable/a", &format!("If-None-Match: {etag}\n"), b"").text(), "onetwo");
    assert_eq!(with.store.totals().readers, 0);
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
fn a_long_poll_waits_for_what_comes_and_no_longer() {
    let mut with = dialogue();
    let tail = with.ask("PUT /v1/durable/a", TEXT, b"one").next_offset();
    assert_eq!(with.ask("GET /v1/durable/a?offset=-1&live=long-poll", "", b"").text(), "one");
    let mut poll = with.wait(&format!("/v1/durable/a?offset={tail}&live=long-poll"));
    let reader = with.reader();
    assert!(with.store.poll(&mut poll, false, with.now).is_none());
    with.ask("POST /v1/durable/a", TEXT, b"two");
    assert_eq!(with.woken(), [reader]);
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    let heard = with.hear(reply);
    assert_eq!((heard.status, heard.text(), heard.field("Stream-Cursor").is_some()), (200, "two", true));
    // Nothing comes.
    let mut poll = with.wait("/v1/durable/a?offset=now&live=long-poll");
    let reply = with.store.poll(&mut poll, true, with.now).unwrap();
    let over = with.hear(reply);
    assert_eq!(
        (over.status, over.next_offset(), over.field("Stream-Up-To-Date")),
        (204, heard.next_offset(), Some("true"))
    );
    // It is closed meanwhile, or deleted.
    let mut poll = with.wait("/v1/durable/a?offset=now&live=long-poll");
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    let closed = with.hear(reply);
    assert_eq!(
        (closed.status, closed.field("Stream-Closed"), closed.field("Stream-Cursor")),
        (204, Some("true"), None)
    );
    assert_eq!(with.ask("GET /v1/durable/a?offset=now&live=long-poll", "", b"").status, 204, "at once");
    with.ask("PUT /v1/durable/b", TEXT, b"");
    let mut poll = with.wait("/v1/durable/b?offset=now&live=long-poll");
    with.ask("DELETE /v1/durable/b", "", b"");
    assert_eq!(with.woken().len(), 1);
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    assert_eq!(with.hear(reply).status, 404);
    let poll = {
        with.ask("PUT /v1/durable/c", TEXT, b"");
        with.wait("/v1/durable/c?offset=now&live=long-poll")
    };
    with.store.give_up(&poll, with.now);
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn cursors_never_go_back() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"x");
    let cursor = |with: &mut Dialogue, echoed: u64| -> u64 {
        let heard = with.ask(&format!("GET /v1/durable/a?offset=-1&live=long-poll&cursor={echoed}"), "", b"");
        heard.field("Stream-Cursor").unwrap().parse().unwrap()
    };
    let first = cursor(&mut with, 0);
    let second = cursor(&mut with, first);
    assert!(second > first && second <= first + 180);
    with.wait_ms(3_700_000);
    assert!(cursor(&mut with, second) > second);
    assert_eq!(cursor(&mut with, u64::MAX), cursor(&mut with, 0), "what cannot be counted is ignored");
}

#[test]
fn events_come_with_their_offsets_and_end_with_the_stream() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", JSON, b"[1,{\"a\":\n2}]");
    let (first, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let reader = with.reader();
    assert_eq!(first.field("Content-Type"), Some("text/event-stream"));
    let offset = with.ask("HEAD /v1/durable/a", "", b"").next_offset();
    let control = |offset: &str, rest: &str| {
        format!("event: control\ndata:{{\"streamNextOffset\":\"{offset}\"{rest}}}\nid:{offset}\n\n")
    };
    let cursor = ",\"streamCursor\":\"1767550\",\"upToDate\":true";
    assert_eq!(
        first.text(),
        format!("event: data\ndata:[1,{{\"a\":\ndata:2}}]\nid:{offset}\n\n{}", control(&offset, cursor))
    );
    let second = with.ask("POST /v1/durable/a", JSON, b"3").next_offset();
    assert_eq!(with.woken(), [reader]);
    let (body, progress) = with.read(&mut reading);
    assert_eq!(progress, Progress::Waiting);
    assert_eq!(
        String::from_utf8(body).unwrap(),
        format!("event: data\ndata:[3]\nid:{second}\n\n{}", control(&second, cursor))
    );
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let (body, progress) = with.read(&mut reading);
    let last = control(&second, ",\"upToDate\":true,\"streamClosed\":true");
    assert_eq!((String::from_utf8(body).unwrap(), progress), (last, Progress::Ended));
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn an_append_that_closes_is_told_with_the_closing() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"");
    let (first, mut reading) = with.events("/v1/durable/a?offset=now&live=sse", "");
    assert!(first.text().starts_with("event: control\n") && first.text().contains("\"upToDate\":true"));
    with.ask("POST /v1/durable/a", "Content-Type: text/plain\nStream-Closed: true\n", b"last");
    let (body, progress) = with.read(&mut reading);
    let text = String::from_utf8(body).unwrap();
    assert!(text.starts_with("event: data\ndata:last\n") && text.contains("\"streamClosed\":true"), "{text}");
    assert_eq!((text.matches("event:").count(), progress), (2, Progress::Ended));
}

#[test]
fn text_stays_text_whatever_lines_it_has() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b" a\r\n\r\nevent: control\rdata: {}\n\n  b\r");
    let (heard, _) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let data = heard.text().split("id:").next().unwrap();
    assert_eq!(
        data,
        "event: data\ndata:  a\ndata:\ndata:event: control\ndata:data: {}\ndata:\ndata:   b\ndata:\n"
    );
}

#[test]
fn a_character_in_two_appends_is_told_in_one_event() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"10 \xe2\x82");
    let (first, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    assert!(first.text().starts_with("event: data\ndata:10 \nid:") && !first.text().contains("upToDate"));
    with.ask("POST /v1/durable/a", TEXT, b"\xac!");
    let (body, _) = with.read(&mut reading);
    assert!(String::from_utf8(body).unwrap().starts_with("event: data\ndata:\u{20ac}!\n"));
    with.ask("POST /v1/durable/a", TEXT, b"\xf0\x9f");
    assert_eq!(with.read(&mut reading).1, Progress::Waiting);
    // What stays broken is given as it is.
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let (body, progress) = with.read(&mut reading);
    assert!(body.starts_with(b"event: data\ndata:\xf0\x9f\n") && progress == Progress::Ended);
}

#[test]
fn binary_events_are_base64_each_by_itself() {
    let mut with = dialogue();
    let bytes: Vec<u8> = (0..=255).collect();
    with.ask("PUT /v1/durable/a", "", &bytes);
    with.ask("POST /v1/durable/a", "Content-Type: application/octet-stream\n", b"\x00");
    let (heard, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    assert_eq!(heard.field("Stream-SSE-Data-Encoding"), Some("base64"));
    let decode = |text: &str| {
        use base64::Engine;
        let data = text.strip_prefix("event: data\ndata:").unwrap().split('\n').next().unwrap();
        base64::engine::general_purpose::STANDARD.decode(data).unwrap()
    };
    assert_eq!(decode(heard.text()), [&bytes[..], b"\x00"].concat());
    with.ask("POST /v1/durable/a", "Content-Type: application/octet-stream\n", b"xy");
    let (body, _) = with.read(&mut reading);
    assert_eq!(decode(str::from_utf8(&body).unwrap()), b"xy");
}

#[test]
fn an_event_source_sees_messages_and_comes_back_where_it_was() {
    let mut with = dialogue();
    let one = with.ask("PUT /v1/durable/a", JSON, b"{\"n\":1}").next_offset();
    let two = with.ask("POST /v1/durable/a", JSON, b"2").next_offset();
    let accept = "Accept: text/event-stream\n";
    let (heard, mut reading) = with.events("/v1/durable/a", accept);
    assert_eq!(heard.text(), format!("retry:507\ndata:{{\"n\":1}}\nid:{one}\n\ndata:2\nid:{two}\n\n"));
    let mut beat = Vec::new();
    reading.write_heartbeat(&with.store, with.now, &mut beat);
    assert_eq!(beat, b":\n\n");
    with.store.leave(&mut reading, with.now);
    let (heard, mut reading) = with.events("/v1/durable/a", &format!("{accept}Last-Event-ID: {one}\n"));
    assert_eq!(heard.text(), format!("retry:507\ndata:2\nid:{two}\n\n"));
    with.store.leave(&mut reading, with.now);
    // Before the first event it knows where it began.
    let (heard, mut reading) = with.events("/v1/durable/a?offset=now", accept);
    assert_eq!(heard.text(), format!("retry:507\nid:{two}\n\n"));
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    assert_eq!(with.read(&mut reading).1, Progress::Ended);
    // 204 is what it does not come back from.
    for target in ["/v1/durable/a", "/v1/durable/a?offset=-1&live=sse"] {
        let end = with.ask(&format!("GET {target}"), &format!("{accept}Last-Event-ID: {two}\n"), b"");
        assert_eq!((end.status, end.field("Stream-Closed")), (204, Some("true")));
    }
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn an_event_stream_ends_between_two_events() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, &[b'x'; 40_000]);
    let Reply::Events(_, mut reading) = with.reply("GET /v1/durable/a?offset=-1&live=sse", "", b"") else {
        panic!("events");
    };
    let mut body = Vec::new();
    assert_eq!(with.store.read(&mut reading, with.now, &mut body, 100), Progress::More);
    assert!(reading.is_within());
    reading.finish();
    assert_eq!(with.read(&mut reading).1, Progress::Ended);
    assert!(!reading.is_within());
}

#[test]
fn a_page_holds_whole_messages_and_of_bytes_no_more_than_its_size() {
    let settings = Settings { body_bytes_max: 8 << 20, ..Settings::default() };
    let mut with = Dialogue::new(settings);
    let page = usize::try_from(limits::DURABLE_PAGE_BYTES_MAX).unwrap();
    with.ask("PUT /v1/durable/a", "", &vec![7; 2 * page + 1]);
    let mut offset = "-1".to_owned();
    let mut sizes = Vec::new();
    loop {
        let heard = with.ask(&format!("GET /v1/durable/a?offset={offset}"), "", b"");
        sizes.push(heard.body.len());
        offset = heard.next_offset();
        if heard.field("Stream-Up-To-Date").is_some() {
            break;
        }
    }
    assert_eq!(sizes, [page, page, 1]);
    let long = [b"\"", vec![b'x'; page].as_slice(), b"\""].concat();
    with.ask("PUT /v1/durable/b", JSON, &[b"[1,", long.as_slice(), b",2]"].concat());
    let first = with.ask("GET /v1/durable/b", "", b"");
    assert_eq!((first.text(), first.field("Stream-Up-To-Date")), ("[1]", None));
    let second = with.ask(&format!("GET /v1/durable/b?offset={}", first.next_offset()), "", b"");
    assert_eq!(second.body.len(), long.len() + 2, "one message is never split");
    let third = with.ask(&format!("GET /v1/durable/b?offset={}", second.next_offset()), "", b"");
    assert_eq!((third.text(), third.field("Stream-Up-To-Date")), ("[2]", Some("true")));
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
fn a_stream_keeps_its_newest_messages_and_says_what_is_gone() {
    let settings = Settings { stream_bytes_max: 10_000, ..Settings::default() };
    let mut with = Dialogue::new(settings);
    let start = with.ask("PUT /v1/durable/a", TEXT, b"").next_offset();
    let (_, mut slow) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let mut ends = vec![start.clone()];
    for number in 0..30 {
        ends.push(with.ask("POST /v1/durable/a", TEXT, &[number; 1000]).next_offset());
    }
    assert_eq!(with.store.counters().trimmed_bytes, 20_000);
    for from in [start.as_str(), "-1", &ends[19]] {
        let gone = with.ask(&format!("GET /v1/durable/a?offset={from}"), "", b"");
        assert_eq!(
            (gone.status, gone.field("Stream-Earliest-Offset")),
            (410, Some(ends[20].as_str())),
            "{from}"
        );
    }
    let rest = with.ask(&format!("GET /v1/durable/a?offset={}", ends[20]), "", b"");
    assert_eq!((rest.body.len(), rest.body[0]), (10_000, 20));
    // Who was left behind learns it by coming again.
    assert_eq!(with.read(&mut slow), (Vec::new(), Progress::Gone));
}

/// Every second for so long, what the passing of time does.
fn pass(with: &mut Dialogue, ms: u64) {
    for _ in 0..ms / 1_000 {
        with.wait_ms(1_000);
        if with.store.next_due_ms().is_some_and(|due_ms| due_ms <= with.now.ms) {
            with.store.expire(with.now);
        }
    }
}

#[test]
fn messages_that_are_too_old_are_dropped_and_none_that_are_not() {
    let mut with = Dialogue::new(Settings { retention_ms: 40_000, ..Settings::default() });
    let start = with.ask("PUT /v1/durable/a", TEXT, b"").next_offset();
    let mut ends = vec![start];
    // One every 5 s, of which the last has its number.
    for number in 0..60 {
        ends.push(with.ask("POST /v1/durable/a", TEXT, &[number; 1000]).next_offset());
        pass(&mut with, 5_000);
        let held = with.store.line_of("/v1/durable/a", with.now.ms).unwrap();
        // 40 s old at least, and 10 s more, and what a timer is late.
        assert!(held.messages >= 8.min(u64::from(number) + 1), "{number}: {}", held.messages);
        assert!(held.messages <= 11, "{number}: {}", held.messages);
    }
    let held = with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages as usize;
    assert_eq!(with.store.counters().trimmed_bytes as usize, (60 - held) * 1_000);
    for from in ["-1", &ends[60 - held - 1]] {
        let gone = with.ask(&format!("GET /v1/durable/a?offset={from}"), "", b"");
        assert_eq!((gone.status, gone.code()), (410, "offset_gone".to_owned()));
        assert_eq!(gone.field("Stream-Earliest-Offset"), Some(ends[60 - held].as_str()));
    }
    let rest = with.ask(&format!("GET /v1/durable/a?offset={}", ends[60 - held]), "", b"");
    assert_eq!((rest.body.len(), rest.body[0] as usize), (held * 1_000, 60 - held));
    // In silence it comes to nothing, and then there is nothing to do.
    pass(&mut with, 60_000);
    let line = with.store.line_of("/v1/durable/a", with.now.ms).unwrap();
    assert_eq!((line.messages, with.store.next_due_ms()), (0, None));
    assert_eq!(with.ask(&format!("GET /v1/durable/a?offset={}", ends[60]), "", b"").status, 200);
    // What comes later has its own time.
    pass(&mut with, 100_000);
    with.ask("POST /v1/durable/a", TEXT, b"later");
    pass(&mut with, 39_000);
    assert_eq!(with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages, 1);
    pass(&mut with, 14_000);
    assert_eq!(with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages, 0);
    // And nothing is left of those that are gone.
    with.ask("POST /v1/durable/a", TEXT, b"more");
    with.ask("DELETE /v1/durable/a", "", b"");
    assert_eq!(with.store.next_due_ms(), None);
}

#[test]
fn what_forks_share_grows_old_for_all_of_them_and_their_own_by_itself() {
    let mut with = Dialogue::new(Settings { retention_ms: 40_000, ..Settings::default() });
    with.ask("PUT /v1/durable/a", JSON, b"[1,2,3]");
    pass(&mut with, 30_000);
    let shared = with.ask("PUT /v1/durable/b", "Stream-Forked-From: /v1/durable/a\n", b"").next_offset();
    with.ask("POST /v1/durable/b", JSON, b"[4]");
    with.ask("POST /v1/durable/a", JSON, b"[5]");
    assert_eq!(with.ask("GET /v1/durable/b", "", b"").text(), "[1,2,3,4]");
    pass(&mut with, 25_000);
    for (path, own) in [("a", "[5]"), ("b", "[4]")] {
        let gone = with.ask(&format!("GET /v1/durable/{path}"), "", b"");
        assert_eq!(
            (gone.status, gone.field("Stream-Earliest-Offset")),
            (410, Some(shared.as_str())),
            "{path}"
        );
        assert_eq!(with.ask(&format!("GET /v1/durable/{path}?offset={shared}"), "", b"").text(), own);
    }
    // Also where the source is kept for its fork alone.
    with.ask("DELETE /v1/durable/a", "", b"");
    pass(&mut with, 40_000);
    assert_eq!(with.store.line_of("/v1/durable/b", with.now.ms).unwrap().messages, 0);
    assert_eq!(with.store.next_due_ms(), None);
    with.ask("POST /v1/durable/b", JSON, b"[6]");
    let line = with.store.line_of("/v1/durable/b", with.now.ms).unwrap();
    let read = with.ask(&format!("GET /v1/durable/b?offset={}", line.earliest), "", b"");
    assert_eq!(read.text(), "[6]");
}

/// Small enough that a few streams fill it.
fn small() -> Settings {
    Settings {
        body_bytes_max: 8 << 10,
        stream_bytes_max: 64 << 10,
        store_bytes_max: 64 << 10,
        ..Settings::default()
    }
}

#[test]
fn closed_streams_make_room_least_recently_used_first() {
    let mut with = Dialogue::new(small());
    for name in 0..7 {
        with.ask(
            &format!("PUT /v1/durable/{name}"),
            "Content-Type: text/plain\nStream-Closed: true\n",
            &[b'x'; 7_000],
        );
    }
    with.ask("GET /v1/durable/0", "", b"");
    let (_, mut reading) = with.events("/v1/durable/1?offset=-1&live=sse", "");
    let Reply::Body(_, _, mut page) = with.reply("GET /v1/durable/2", "", b"") else { panic!("a page") };
    assert_eq!(with.store.counters().evictions, 0);
    with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]);
    with.ask("POST /v1/durable/new", TEXT, &[b'x'; 7_000]);
    let left: Vec<u16> =
        (0..7).map(|name| with.ask(&format!("HEAD /v1/durable/{name}"), "", b"").status).collect();
    assert_eq!(left, [200, 200, 200, 404, 404, 404, 200], "neither the one used last nor those being read");
    assert_eq!(with.store.counters().evictions, 3);
    assert!(with.store.totals().bytes <= 64 << 10);
    assert_eq!(with.read(&mut page).0.len(), 7_000);
    with.store.leave(&mut reading, with.now);
}

#[test]
fn open_streams_lose_their_oldest_messages_and_then_themselves() {
    let mut with = Dialogue::new(small());
    let mut ends = Vec::new();
    for name in 0..5 {
        with.ask(&format!("PUT /v1/durable/{name}"), TEXT, b"");
        for _ in 0..10 {
            ends.push(with.ask(&format!("POST /v1/durable/{name}"), TEXT, &[b'x'; 1_000]).next_offset());
        }
    }
    let counters = with.store.counters();
    assert!(counters.trimmed_bytes > 0 && counters.evictions == 0 && counters.full == 0, "{counters:?}");
    let status =
        |with: &mut Dialogue, name: usize| with.ask(&format!("GET /v1/durable/{name}"), "", b"").status;
    assert_eq!((status(&mut with, 0), status(&mut with, 4)), (410, 200));
    // Whoever reads, is spared.
    let (_, mut reading) = with.events("/v1/durable/4?offset=-1&live=sse", "");
    for name in 5..60 {
        let created = with.ask(&format!("PUT /v1/durable/{name}"), TEXT, &[b'y'; 500]);
        assert_eq!(created.status, 201, "{name}");
        assert!(with.store.totals().bytes <= 64 << 10);
    }
    assert_eq!(status(&mut with, 4), 200);
    assert!(with.store.counters().evictions > 0);
    with.store.leave(&mut reading, with.now);
}

#[test]
fn with_readers_everywhere_nothing_is_taken_from_them() {
    let mut with = Dialogue::new(small());
    let mut readings = Vec::new();
    for name in 0..7 {
        with.ask(&format!("PUT /v1/durable/{name}"), TEXT, &[b'x'; 7_000]);
        readings.push(with.events(&format!("/v1/durable/{name}?offset=now&live=sse"), "").1);
    }
    let full = with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]);
    assert_eq!(
        (full.status, full.code().as_str(), full.field("Retry-After")),
        (503, "store_full", Some("1"))
    );
    let full = with.ask("POST /v1/durable/0", TEXT, &[b'x'; 8_000]);
    assert_eq!((full.status, with.store.counters().full), (503, 2));
    assert_eq!(with.ask("GET /v1/durable/0", "", b"").body.len(), 7_000);
    with.store.leave(&mut readings[3], with.now);
    assert_eq!(with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]).status, 201);
    for mut reading in readings {
        with.store.leave(&mut reading, with.now);
    }
}

#[test]
fn a_source_is_not_given_up_while_it_has_forks() {
    let mut with = Dialogue::new(small());
    with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-Closed: true\n", &[b'a'; 7_000]);
    with.ask("PUT /v1/durable/b", "Stream-Forked-From: /v1/durable/a\n", b"b");
    let (_, mut reading) = with.events("/v1/durable/b?offset=now&live=sse", "");
    for name in 0..20 {
        with.ask(
            &format!("PUT /v1/durable/{name}"),
            "Content-Type: text/plain\nStream-Closed: true\n",
            &[b'x'; 8_000],
        );
    }
    assert_eq!(with.ask("GET /v1/durable/b", "", b"").body.len(), 7_001);
    with.store.leave(&mut reading, with.now);
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
