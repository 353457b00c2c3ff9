//! OpenAI's responses in background: requests for one by its id, what is remembered of its answer, and the objects that tell
//! how it stands. The events themselves are in the stream's log; the request's side is in `facts`.
//!
//! ```text
//! GET    /v1/responses/{id}                              the response object, as it stands
//! GET    /v1/responses/{id}?stream=true&starting_after=N   the events behind the one with `sequence_number` N
//! POST   /v1/responses/{id}/cancel                       stop; the response object
//! DELETE /v1/responses/{id}                              stop, and forget
//! ```

use crate::dialect::{event_type, number_member};
use crate::fault::{Culprit, Fault, write_json_string};
use crate::http::RequestHead;
use crate::limits::RESPONSE_ID_BYTES_MAX;
use crate::sse::{Block, Decoder};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;

/// Runs of sequence numbers from which on those are forgotten that are not kept any more.
const RUNS_MANY: usize = 1024;
/// What follows the prefix of a route, before a response's id.
const RESPONSES: &str = "/v1/responses/";

/// What a request wants of a response.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// How it stands.
    Object,
    /// The events behind the one with this `sequence_number`; none: all of them.
    Events {
        /// `starting_after`.
        after: Option<u64>,
    },
    /// Its end.
    Cancel,
    /// Its end, and that nobody finds it any more.
    Delete,
}

/// A request for a response by its id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask<'a> {
    /// The backend's own.
    pub id: Cow<'a, str>,
    /// What for.
    pub want: Result<Want, Fault>,
}

impl<'a> Ask<'a> {
    /// Reads a request's head. `None`: it asks for nothing that could be ours.
    pub fn parse(head: &RequestHead<'_, 'a>) -> Option<Ask<'a>> {
        let (_, rest) = head.path().rsplit_once(RESPONSES)?;
        let (id, action) = rest.split_once('/').unwrap_or((rest, ""));
        let want = match (head.method, action) {
            ("GET", "") => want_of_query(head.query().unwrap_or_default()),
            ("DELETE", "") => Ok(Want::Delete),
            ("POST", "cancel" | "cancel/") => Ok(Want::Cancel),
            _ => return None,
        };
        let id = decoded(id)?;
        (!id.is_empty() && id.len() <= RESPONSE_ID_BYTES_MAX).then_some(Ask { id, want })
    }
}

fn want_of_query(query: &str) -> Result<Want, Fault> {
    let (mut streams, mut after) = (false, None);
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "stream" => streams = matches!(value, "true" | "True" | "1"),
            "starting_after" if value.is_empty() => after = None,
            "starting_after" if value.bytes().all(|byte| byte.is_ascii_digit()) => {
                after = Some(value.parse().map_err(|_| BAD_STARTING_AFTER)?);
            }
            "starting_after" => return Err(BAD_STARTING_AFTER),
            _ => {}
        }
    }
    Ok(if streams { Want::Events { after } } else { Want::Object })
}

/// Undoes the percent-encoding of one path segment.
fn decoded(segment: &str) -> Option<Cow<'_, str>> {
    if !segment.contains('%') {
        return Some(Cow::Borrowed(segment));
    }
    let (mut bytes, mut rest) = (Vec::with_capacity(segment.len()), segment.as_bytes());
    while let [byte, after @ ..] = rest {
        rest = after;
        match (byte, rest) {
            (b'%', [high, low, after @ ..]) => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                bytes.push((digit(*high)? << 4 | digit(*low)?) as u8);
                rest = after;
            }
            (b'%', _) => return None,
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

/// Events whose sequence numbers and ids count up together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    sequence_number: u64,
    id: u64,
    /// How many, > 0.
    events: u64,
}

/// What is remembered of an answer in background, event by event.
#[derive(Default, Debug)]
pub struct Notes {
    id: Option<Box<str>>,
    /// The response object as the backend first told it.
    first: Option<Box<str>>,
    /// Its status is still `queued`.
    queued: bool,
    /// Where in the log the event lies that ended it, and the status that it told.
    last: Option<(u64, u64, &'static str)>,
    runs: VecDeque<Run>,
}

impl Notes {
    /// Takes note of an event that was appended from `from` to `to` of the log with this id.
    pub fn take(&mut self, block: &Block<'_>, id: u64, (from, to): (u64, u64)) {
        if !block.dispatches {
            return;
        }
        if let Some(number) = block.data_lines().find_map(|line| number_member(line, b"sequence_number")) {
            self.number(number, id);
        }
        match event_type(block) {
            name @ (b"response.created" | b"response.queued" | b"response.in_progress") => {
                self.queued = name == b"response.queued";
                if self.id.is_none() {
                    self.begin(block);
                }
            }
            name @ (b"response.completed" | b"response.failed" | b"response.incomplete") => {
                let status = match name {
                    b"response.completed" => "completed",
                    b"response.failed" => "failed",
                    _ => "incomplete",
                };
                self.last = Some((from, to, status));
                if self.id.is_none() {
                    self.begin(block);
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, block: &Block<'_>) {
        let data = data_of(block);
        let Some(object) = response_of(&data) else { return };
        let Ok(Members(members)) = serde_json::from_str(object) else { return };
        let id = members.iter().find(|(name, _)| name == "id").map(|(_, value)| value.get());
        let Some(id) = id.and_then(|id| serde_json::from_str::<String>(id).ok()) else { return };
        if !id.is_empty() && id.len() <= RESPONSE_ID_BYTES_MAX {
            self.id = Some(id.into());
            self.first = Some(object.into());
        }
    }

    fn number(&mut self, sequence_number: u64, id: u64) {
        if let Some(run) = self.runs.back_mut()
            && run.sequence_number.checked_add(run.events) == Some(sequence_number)
            && run.id + run.events == id
        {
            run.events += 1;
        } else {
            self.runs.push_back(Run { sequence_number, id, events: 1 });
        }
    }

    /// Events up to this id are not kept any more: where they were needs not be known.
    pub fn forget(&mut self, id: u64) {
        while self.runs.len() > 1 && self.runs.front().is_some_and(|run| run.id + run.events <= id) {
            self.runs.pop_front();
        }
    }

    /// The backend's id of the response, once it is known.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// That id, and the response object as the backend first told it.
    pub fn first(&self) -> Option<(&str, &str)> {
        Some((self.id.as_deref()?, self.first.as_deref()?))
    }

    /// Takes note of that, where the event that told it is not kept any more.
    pub fn begun_as(&mut self, id: Box<str>, first: Box<str>) {
        (self.id, self.first) = (Some(id), Some(first));
    }

    /// Where in the log the event lies that ended it.
    pub fn last(&self) -> Option<(u64, u64)> {
        self.last.map(|(from, to, _)| (from, to))
    }

    /// Whether it is worth looking what can be forgotten; not after each event.
    pub fn is_long(&self) -> bool {
        self.runs.len() >= RUNS_MANY && self.runs.len().is_multiple_of(RUNS_MANY / 4)
    }

    /// The id of the event behind which a client goes on that has had this sequence number: of several with that number the
    /// last; of none, the last one before which it was not reached. Of a backend that numbers nothing, ids count.
    pub fn id_of(&self, sequence_number: u64, last_id: u64) -> Option<u64> {
        if self.runs.is_empty() {
            return (sequence_number <= last_id).then_some(sequence_number);
        }
        let within = |run: &&Run| {
            run.sequence_number <= sequence_number && sequence_number - run.sequence_number < run.events
        };
        if let Some(run) = self.runs.iter().rev().find(within) {
            return Some(run.id + (sequence_number - run.sequence_number));
        }
        let end = |run: &Run| run.sequence_number + (run.events - 1);
        if self.runs.iter().all(|run| end(run) < sequence_number) {
            return None;
        }
        let before = self.runs.iter().rev().find(|run| run.sequence_number < sequence_number);
        // Before the first one: all of it is wanted.
        Some(before.map_or(0, |run| run.id + (run.events - 1)))
    }

    /// Memory held, bytes.
    pub fn memory_bytes(&self) -> usize {
        let texts =
            self.id.as_ref().map_or(0, |id| id.len()) + self.first.as_ref().map_or(0, |text| text.len());
        size_of::<Self>() + texts + self.runs.capacity() * size_of::<Run>()
    }

    /// The response object as it began, with what is known since.
    pub fn object(&self, how: How) -> String {
        let status = match how {
            How::UnderWay if self.queued => "queued",
            How::UnderWay => "in_progress",
            How::Told => self.last.map_or("in_progress", |(_, _, status)| status),
            How::Cancelled => "cancelled",
            How::Failed(_) => "failed",
        };
        let fault = match how {
            How::Failed(fault) => Some(fault),
            _ => None,
        };
        written(self.first.as_deref().unwrap_or("{}"), self.id(), Some(status), fault)
    }
}

/// How a response stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// More is to come.
    UnderWay,
    /// Its backend has told its end.
    Told,
    /// Somebody has cancelled it.
    Cancelled,
    /// It broke off, for this reason.
    Failed(Fault),
}

/// The response object of the event that ended it, out of that event as it lies in the log.
pub fn last_object(event: &[u8], chunked: bool) -> Option<String> {
    let mut event = event;
    if chunked {
        let line = memchr::memchr(b'\n', event)?;
        event = &event[line + 1..];
    }
    let mut decoder = Decoder::new(event.len());
    let block = decoder.next(&mut event).ok()??;
    let data = data_of(&block);
    Some(written(response_of(&data)?, None, None, None))
}

/// What is told of one that was deleted.
pub fn deleted_object(id: &str) -> Vec<u8> {
    let mut out = b"{\"id\":".to_vec();
    write_json_string(&mut out, id);
    out.extend_from_slice(b",\"object\":\"response\",\"deleted\":true}\n");
    out
}

fn data_of(block: &Block<'_>) -> Vec<u8> {
    let mut data = Vec::with_capacity(block.raw.len());
    for line in block.data_lines() {
        data.extend_from_slice(line);
        data.push(b'\n');
    }
    data
}

/// The `response` of an event's data.
fn response_of(data: &[u8]) -> Option<&str> {
    let Members(members) = serde_json::from_slice(data).ok()?;
    let (_, response) = members.into_iter().find(|(name, _)| name == "response")?;
    response.get().starts_with('{').then(|| response.get())
}

/// A response object with what we know better; every other member as it was.
fn written(object: &str, id: Option<&str>, status: Option<&str>, fault: Option<Fault>) -> String {
    let members = serde_json::from_str(object).map_or(Vec::new(), |Members(members)| members);
    let string = |text: &str| {
        let mut out = Vec::new();
        write_json_string(&mut out, text);
        String::from_utf8(out).unwrap_or_default()
    };
    let error = fault
        .map(|fault| format!("{{\"code\":{},\"message\":{}}}", string(fault.code), string(fault.message)));
    let mut ours = vec![("background", "true".to_owned())];
    ours.extend(status.map(|status| ("status", string(status))));
    ours.extend(error.map(|error| ("error", error)));
    // What every client looks for is there.
    let defaults =
        [("id", id.map(string)), ("object", Some(string("response"))), ("output", Some("[]".to_owned()))];
    let missing = defaults.into_iter().filter(|(name, _)| !members.iter().any(|(known, _)| known == name));
    let mut out = String::with_capacity(object.len() + 128);
    let mut put = |name: &str, value: &str| {
        out.push(if out.is_empty() { '{' } else { ',' });
        out.push_str(&string(name));
        out.push(':');
        out.push_str(value);
    };
    for (name, value) in missing {
        if let Some(value) = value {
            put(name, &value);
        }
    }
    for (name, value) in &members {
        let ours = ours.iter().find(|(known, _)| known == name);
        put(name, ours.map_or(value.get(), |(_, value)| value));
    }
    for (name, value) in ours.iter().filter(|(name, _)| !members.iter().any(|(known, _)| known == name)) {
        put(name, value);
    }
    out.push('}');
    out
}

/// The members of an object, in order, with their values as they were written.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Deserialize<'a> for Members<'a> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'a> Visitor<'a> for Collect {
            type Value = Members<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    members.push((Cow::Owned(name), value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

const fn fault(code: &'static str, message: &'static str) -> Fault {
    Fault { status: 400, code, message, culprit: Culprit::Client, retry_helps: false }
}

/// Its backend cannot be made to stream.
pub const NEEDS_STREAM: Fault = fault(
    "background_needs_stream",
    "A response in background is streamed by its backend. Say stream: true; or say background in front of stream and of all \
     that is long.",
);
/// `starting_after` is none.
pub const BAD_STARTING_AFTER: Fault = fault(
    "bad_starting_after",
    "starting_after is a number: the sequence_number of the last event that was seen.",
);
/// The backend has told no id by which it could be asked for.
pub const NO_ID: Fault = Fault {
    status: 502,
    code: "response_without_id",
    message: "The model backend did not name the response, so that nobody could ask for it.",
    culprit: Culprit::Upstream,
    retry_helps: false,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{HeadLimits, header_slots, parse_request};
    use serde_json::{Value, json};

    fn ask(line: &str) -> Option<(String, Result<Want, Fault>)> {
        let bytes = format!("{line} HTTP/1.1\r\nHost: h\r\n\r\n");
        let mut slots = header_slots();
        let head = parse_request(bytes.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        Ask::parse(&head).map(|ask| (ask.id.into_owned(), ask.want))
    }

    fn some(id: &str, want: Want) -> Option<(String, Result<Want, Fault>)> {
        Some((id.to_owned(), Ok(want)))
    }

    #[test]
    fn what_is_asked_for() {
        assert_eq!(ask("GET /v1/responses/resp_1"), some("resp_1", Want::Object));
        assert_eq!(ask("GET /v1/responses/resp_1?include=a"), some("resp_1", Want::Object));
        assert_eq!(
            ask("GET /v1/responses/resp_1?stream=false&starting_after=2"),
            some("resp_1", Want::Object)
        );
        let events = |after| some("resp_1", Want::Events { after });
        assert_eq!(ask("GET /v1/responses/resp_1?stream=true"), events(None));
        assert_eq!(ask("GET /v1/responses/resp_1?stream=true&starting_after=0"), events(Some(0)));
        assert_eq!(ask("GET /v1/responses/resp_1?starting_after=17&stream=true"), events(Some(17)));
        assert_eq!(ask("POST /openai/v1/responses/resp_1/cancel"), some("resp_1", Want::Cancel));
        assert_eq!(ask("DELETE /v1/responses/resp_1"), some("resp_1", Want::Delete));
        assert_eq!(ask("GET /v1/responses/a%2Fb%c3%a9"), some("a/bé", Want::Object));
    }

    #[test]
    fn what_is_not_ours() {
        for line in [
            "GET /v1/responses",
            "GET /v1/responses/",
            "POST /v1/responses/resp_1",
            "GET /v1/responses/resp_1/cancel",
            "GET /v1/responses/resp_1/input_items",
            "POST /v1/responses/resp_1/cancel/all",
            "GET /v1/responses/a%2",
            "GET /v1/responses/a%zz",
            "GET /v1/responses/%ff",
            "GET /v1/chat/completions/resp_1",
            &format!("GET /v1/responses/{}", "x".repeat(RESPONSE_ID_BYTES_MAX + 1)),
        ] {
            assert_eq!(ask(line), None, "{line}");
        }
        for bad in ["-1", "x", "1.5", "99999999999999999999"] {
            let found = ask(&format!("GET /v1/responses/r?stream=true&starting_after={bad}"));
            assert_eq!(found, Some(("r".to_owned(), Err(BAD_STARTING_AFTER))));
        }
    }

    fn event(name: &str, mut data: Value) -> String {
        data["type"] = name.into();
        format!("event: {name}\ndata: {data}\n\n")
    }

    /// Notes of events with ids from 1 on, and where each lies.
    fn notes_of<'e>(events: impl IntoIterator<Item = &'e String>) -> Notes {
        let (mut notes, mut at) = (Notes::default(), 0);
        for (id, event) in (1..).zip(events) {
            let mut input = event.as_bytes();
            let mut decoder = Decoder::new(1 << 20);
            let block = decoder.next(&mut input).unwrap().unwrap();
            let to = at + event.len() as u64;
            notes.take(&block, id, (at, to));
            at = to;
        }
        notes
    }

    fn numbered(numbers: &[u64]) -> Notes {
        // Behind something long, as some backends write it.
        let pad = "x".repeat(5000);
        let event =
            |number: &u64| event("response.output_text.delta", json!({"a": pad, "sequence_number": number}));
        notes_of(&numbers.iter().map(event).collect::<Vec<_>>())
    }

    #[test]
    fn a_sequence_number_is_found_where_it_was_told() {
        let dense = numbered(&[0, 1, 2, 3, 4]);
        assert_eq!(dense.runs.len(), 1);
        for number in 0..5 {
            assert_eq!(dense.id_of(number, 5), Some(number + 1));
        }
        assert_eq!(dense.id_of(5, 5), None);
        // From 1 on; with holes; counted anew.
        let from_one = numbered(&[1, 2, 3]);
        assert_eq!([0, 1, 3, 4].map(|number| from_one.id_of(number, 3)), [Some(0), Some(1), Some(3), None]);
        let holes = numbered(&[0, 2, 3, 7]);
        assert_eq!(
            [0, 1, 2, 3, 4, 6, 7, 8].map(|number| holes.id_of(number, 4)),
            [Some(1), Some(1), Some(2), Some(3), Some(3), Some(3), Some(4), None]
        );
        let twice = numbered(&[0, 1, 1, 2]);
        assert_eq!([0, 1, 2].map(|number| twice.id_of(number, 4)), [Some(1), Some(3), Some(4)]);
        // Nothing is numbered: ids are what there is.
        let plain = notes_of(&vec![event("response.output_text.delta", json!({"delta": "a"})); 3]);
        assert_eq!([0, 1, 3, 4].map(|number| plain.id_of(number, 3)), [Some(0), Some(1), Some(3), None]);
    }

    #[test]
    fn events_without_a_number_are_behind_the_one_before() {
        let numbered = |number: u64| event("response.output_text.delta", json!({"sequence_number": number}));
        let events = [numbered(0), event("other", json!({})), numbered(1), numbered(2)];
        let notes = notes_of(&events);
        assert_eq!([0, 1, 2].map(|number| notes.id_of(number, 4)), [Some(1), Some(3), Some(4)]);
    }

    #[test]
    fn what_is_no_longer_kept_is_forgotten_but_for_the_last() {
        let mut notes = numbered(&[0, 5, 10, 15]);
        notes.forget(2);
        assert_eq!(notes.runs.len(), 3, "behind an id that is not kept others follow");
        assert_eq!([0, 5, 10, 15].map(|number| notes.id_of(number, 4)), [Some(0), Some(2), Some(3), Some(4)]);
        notes.forget(1000);
        assert_eq!(notes.runs.len(), 1);
    }

    #[test]
    fn the_object_tells_how_the_response_stands() {
        let first = json!({"id": "resp_é", "object": "response", "status": "queued", "background": false,
            "error": null, "model": "m", "output": [], "n": 1.50});
        let created = event("response.created", json!({"response": first}));
        let notes = notes_of([&created]);
        assert_eq!(notes.id(), Some("resp_é"));
        let told = |how| serde_json::from_str::<Value>(&notes.object(how)).unwrap();
        let mut expected = first.clone();
        (expected["background"], expected["status"]) = (true.into(), "in_progress".into());
        assert_eq!(told(How::UnderWay), expected);
        expected["status"] = "cancelled".into();
        assert_eq!(told(How::Cancelled), expected);
        expected["status"] = "failed".into();
        let fault = crate::phase::End::UpstreamReset.fault();
        expected["error"] = json!({"code": "upstream_reset", "message": fault.message});
        assert_eq!(told(How::Failed(fault)), expected);
        let queued = event("response.queued", json!({"response": {"id": "a"}}));
        let notes = notes_of([&created, &queued]);
        assert_eq!(serde_json::from_str::<Value>(&notes.object(How::UnderWay)).unwrap()["status"], "queued");
        // A backend that says little.
        let notes = notes_of([&queued]);
        let told: Value = serde_json::from_str(&notes.object(How::UnderWay)).unwrap();
        assert_eq!(
            told,
            json!({"id": "a", "object": "response", "status": "queued", "background": true, "output": []})
        );
    }

    #[test]
    fn the_event_that_ends_it_is_found_and_read() {
        let created = event("response.created", json!({"response": {"id": "r"}}));
        let object = json!({"id": "r", "object": "response", "status": "completed", "output": [{"a": "\u{2028}"}],
            "background": null});
        for name in ["response.completed", "response.failed", "response.incomplete"] {
            let last = event(name, json!({"response": object, "sequence_number": 1}));
            let notes = notes_of([&created, &last]);
            let (from, to) = notes.last().unwrap();
            assert_eq!((from, to - from), (created.len() as u64, last.len() as u64));
            let mut expected = object.clone();
            expected["background"] = true.into();
            for (event, chunked) in [
                (format!("id: 2\n{last}"), false),
                (format!("{:x}\r\nid: 2\n{last}\r\n", last.len() + 6), true),
            ] {
                let told = last_object(event.as_bytes(), chunked).unwrap();
                assert_eq!(serde_json::from_str::<Value>(&told).unwrap(), expected);
            }
        }
        assert_eq!(last_object(b"data: {}\n\n", false), None);
        assert_eq!(last_object(b"", true), None);
    }

    #[test]
    fn what_is_no_response_names_none() {
        for data in [
            "{}",
            "[]",
            "{\"response\":[]}",
            "{\"response\":{}}",
            "{\"response\":{\"id\":7}}",
            "{\"response\":{\"id\":\"\"}}",
            "{\"response\":{\"id\":\"a\"}",
            "x",
        ] {
            let notes = notes_of([&format!("event: response.created\ndata: {data}\n\n")]);
            assert_eq!(notes.id(), None, "{data}");
        }
        let cut_lines = "event: response.created\ndata: {\"response\":\ndata: {\"id\":\"a\"}}\n\n".to_owned();
        assert_eq!(notes_of([&cut_lines]).id(), Some("a"));
        assert_eq!(deleted_object("a\"b"), b"{\"id\":\"a\\\"b\",\"object\":\"response\",\"deleted\":true}\n");
    }
}
