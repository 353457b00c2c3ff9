//! What an exchange is to be: the request a client sends, the answer a backend gives, its fault; and what came of it.

use crate::client::How;
use crate::rng::Rng;
use protocol::dialect::Dialect;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Method {
    Get,
    Head,
    Post,
    Put,
}

impl Method {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Post => "POST",
            Method::Put => "PUT",
        }
    }
}

/// Dialects by their names.
mod by_name {
    use protocol::dialect::Dialect;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    pub(super) fn serialize<S: Serializer>(dialect: &Dialect, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(dialect.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Dialect, D::Error> {
        let name = String::deserialize(from)?;
        let known = Dialect::ALL.into_iter().find(|dialect| dialect.name() == name);
        known.ok_or_else(|| D::Error::custom(format!("no dialect is called {name}")))
    }
}

/// A request as its client means it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Request {
    #[serde(with = "by_name")]
    pub(crate) dialect: Dialect,
    pub(crate) method: Method,
    /// Asks for an event stream.
    pub(crate) streaming: bool,
    pub(crate) body_bytes: usize,
    pub(crate) chunked: bool,
    /// Waits for `100 Continue` before its body.
    pub(crate) expect: bool,
    pub(crate) http10: bool,
    /// Says `Connection: close`.
    pub(crate) close: bool,
    /// Goes to the demo model instead of a backend.
    pub(crate) demo: bool,
    /// A response in background: one that is not `streaming` is polled.
    pub(crate) background: bool,
    /// What it says of its client's leave; empty: nothing.
    #[serde(skip)]
    pub(crate) on_leave: &'static str,
}

impl Default for Request {
    fn default() -> Self {
        Request::new(Dialect::Chat, true)
    }
}

impl Request {
    pub(crate) fn new(dialect: Dialect, streaming: bool) -> Self {
        Request {
            dialect,
            method: Method::Post,
            streaming,
            body_bytes: 80,
            chunked: false,
            expect: false,
            http10: false,
            close: false,
            demo: false,
            background: false,
            on_leave: "",
        }
    }

    fn has_body(&self) -> bool {
        matches!(self.method, Method::Post | Method::Put)
    }

    pub(crate) fn path(&self) -> String {
        let path = match self.dialect {
            Dialect::Chat => "/v1/chat/completions",
            Dialect::Completions => "/v1/completions",
            Dialect::Responses => "/v1/responses",
            Dialect::Messages => "/v1/messages",
            Dialect::Plain => "/files/any",
        };
        if self.demo {
            format!("/demo{path}?tokens=20&tokens_per_s=200&first_token_ms=5")
        } else {
            path.to_owned()
        }
    }

    pub(crate) fn body(&self, id: usize) -> Vec<u8> {
        let front = if self.background {
            let said = match (self.streaming, id.is_multiple_of(2)) {
                (true, _) => "\"background\":true,\"stream\":true",
                (false, true) => "\"background\":true,\"stream\":false",
                (false, false) => "\"background\":true",
            };
            format!("{{\"model\":\"sim-{id}\",{said},\"pad\":\"")
        } else if self.dialect.is_model_endpoint() {
            format!("{{\"model\":\"sim-{id}\",\"stream\":{},\"pad\":\"", self.streaming)
        } else {
            String::new()
        };
        let back = if self.dialect.is_model_endpoint() { "\"}" } else { "" };
        let mut body = front.into_bytes();
        while body.len() + back.len() < self.body_bytes {
            body.push(b'a' + ((body.len() * 7 + body.len() / 97 + id) % 26) as u8);
        }
        body.extend_from_slice(back.as_bytes());
        body
    }

    /// The body as a backend is to get it: one that knows nothing of background, and streams.
    fn body_passed_on(&self, id: usize) -> Vec<u8> {
        let body = self.body(id);
        if !self.background {
            return body;
        }
        let mut body = String::from_utf8(body).unwrap_or_default();
        for (from, to) in [
            ("\"background\":true,\"stream\":true", "\"background\":null,\"stream\":true"),
            ("\"background\":true,\"stream\":false", "\"background\":null,\"stream\":true "),
            ("\"background\":true,", "\"stream\"    :true,"),
        ] {
            if body.contains(from) {
                body = body.replace(from, to);
                break;
            }
        }
        body.into_bytes()
    }

    /// Head and body; and where the head ends.
    pub(crate) fn wire(&self, id: usize, rng: &mut Rng) -> (Vec<u8>, usize) {
        let version = if self.http10 { "1.0" } else { "1.1" };
        let mut head =
            format!("{} {} HTTP/{version}\r\nHost: sim\r\nX-Sim: {id}\r\n", self.method.name(), self.path());
        let has_body = self.has_body();
        let body = if has_body { self.body(id) } else { Vec::new() };
        if self.chunked && has_body {
            head += "Transfer-Encoding: chunked\r\n";
        } else if has_body {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        if self.expect {
            head += "Expect: 100-continue\r\n";
        }
        if self.streaming && !self.dialect.is_model_endpoint() {
            head += "Accept: text/event-stream\r\n";
        }
        if !self.on_leave.is_empty() {
            head += &format!("Tokenring-On-Leave: {}\r\n", self.on_leave);
        }
        if self.close {
            head += "Connection: close\r\n";
        }
        head += "\r\n";
        let mut wire = head.into_bytes();
        let head_bytes = wire.len();
        if self.chunked && has_body {
            let mut rest = &body[..];
            while !rest.is_empty() {
                let take = (rng.skewed(4096) as usize + 1).min(rest.len());
                wire.extend_from_slice(format!("{take:x}\r\n").as_bytes());
                wire.extend_from_slice(&rest[..take]);
                wire.extend_from_slice(b"\r\n");
                rest = &rest[take..];
            }
            wire.extend_from_slice(b"0\r\n\r\n");
        } else {
            wire.extend_from_slice(&body);
        }
        (wire, head_bytes)
    }
}

/// How a backend frames its body.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Framed {
    Length,
    Chunked,
    Close,
}

/// What a backend does wrong. Places are in thousandths of the body's bytes on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Fault {
    None,
    /// Closes before the answer's end.
    Cut(u32),
    /// Resets.
    Reset(u32),
    /// Says nothing more, and keeps the connection.
    Stall(u32),
    /// Breaks the chunked coding.
    Garbage(u32),
    /// Ends its body properly without the dialect's end mark.
    NoEndMark,
    /// Closes after the end mark, without the last chunk.
    NoLastChunk,
    /// Ends with the dialect's own error event.
    InBandError,
    /// Takes the request and closes without a byte.
    NoAnswer,
    /// Answers with bytes that are no head, of several kinds.
    BadHead(u32),
    /// Says more bytes (or a larger chunk) than it sends, and closes.
    LongLength,
    /// Says fewer bytes than it sends: the rest is an answer to nothing.
    ShortLength(u32),
    /// An event that does not end.
    EndlessEvent(u32),
}

/// What a backend answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) interim: u32,
    /// Number of events; `None`: an ordinary body.
    pub(crate) events: Option<u32>,
    /// Bytes of one event's text, or of an ordinary body.
    pub(crate) bytes: usize,
    pub(crate) framed: Framed,
    pub(crate) fault: Fault,
    pub(crate) head_delay_us: u64,
    /// Most bytes of one write, and most time between two.
    pub(crate) piece_bytes: usize,
    pub(crate) gap_us: u64,
    /// Silence before the first event.
    pub(crate) prefill_us: u64,
    /// Closes after the answer although it promised otherwise.
    pub(crate) closes_silently: bool,
    /// Answers when so many bytes of the request's body are here.
    pub(crate) early_after: Option<usize>,
    pub(crate) crlf: bool,
    pub(crate) comments: bool,
    /// In background: by how much `sequence_number` grows from event to event; 0: it has none.
    pub(crate) number_by: u64,
    /// In background: its last event tells of a failure.
    pub(crate) fails: bool,
}

impl Default for Answer {
    fn default() -> Self {
        Answer::events(3)
    }
}

impl Answer {
    pub(crate) fn events(count: u32) -> Self {
        Answer {
            status: 200,
            interim: 0,
            events: Some(count),
            bytes: 12,
            framed: Framed::Chunked,
            fault: Fault::None,
            head_delay_us: 1_000,
            piece_bytes: 1 << 20,
            gap_us: 0,
            prefill_us: 0,
            closes_silently: false,
            early_after: None,
            crlf: false,
            comments: false,
            number_by: 1,
            fails: false,
        }
    }

    pub(crate) fn body(bytes: usize, framed: Framed) -> Self {
        Answer { events: None, bytes, framed, ..Answer::events(0) }
    }
}

/// One event that a client is owed, and the byte of the wire with which it is complete.
#[derive(Clone, Debug)]
pub(crate) struct Owed {
    pub(crate) name: String,
    pub(crate) data: String,
    pub(crate) wire_end: usize,
}

/// What happens behind the last byte of a backend's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Then {
    KeepAlive,
    Close,
    Reset,
    Stall,
}

/// An answer's bytes.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) bytes: Vec<u8>,
    pub(crate) head_bytes: usize,
    pub(crate) events: Vec<Owed>,
    pub(crate) body: Vec<u8>,
    pub(crate) then: Then,
    /// The answer on the wire is whole, or as good as whole.
    pub(crate) whole: bool,
    /// It is not, but the dialect's end mark is on the wire, if all of it arrives.
    pub(crate) may_look_whole: bool,
}

/// A request, its answer, and what was seen of both.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) request: Request,
    /// The request's.
    pub(crate) body: Vec<u8>,
    pub(crate) answer: Answer,
    pub(crate) wire: Wire,
    pub(crate) attempts: Vec<Attempt>,
    /// When its client gave it up, if it did.
    pub(crate) client_left_us: Option<u64>,
    /// It left by RST, or by a FIN that means leaving; its request was complete.
    pub(crate) left_visibly: bool,
    pub(crate) left_how: Option<How>,
    pub(crate) left_socket: Option<usize>,
    /// What it had sent and the shard had not received when it left, bytes.
    pub(crate) left_unread: usize,
}

/// One backend connection that was given the request.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) socket: usize,
    pub(crate) body_complete: bool,
    /// Bytes of the answer that the backend has written.
    pub(crate) written: usize,
    /// The backend itself ended it, or finished the answer.
    pub(crate) over: bool,
}

fn text(id: usize, nth: u32, bytes: usize) -> String {
    let mut text = format!("e{id}.{nth} ");
    while text.len() < bytes {
        text.push(char::from(b'a' + ((text.len() + nth as usize) % 26) as u8));
    }
    text
}

fn event(dialect: Dialect, id: usize, nth: u32, bytes: usize) -> (String, String) {
    let text = text(id, nth, bytes);
    match dialect {
        Dialect::Chat => (
            String::new(),
            format!("{{\"id\":\"c\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}"),
        ),
        Dialect::Completions => {
            (String::new(), format!("{{\"choices\":[{{\"index\":0,\"text\":\"{text}\"}}]}}"))
        }
        Dialect::Responses => (
            "response.output_text.delta".to_owned(),
            format!(
                "{{\"type\":\"response.output_text.delta\",\"sequence_number\":{nth},\"delta\":\"{text}\"}}"
            ),
        ),
        Dialect::Messages => (
            "content_block_delta".to_owned(),
            format!("{{\"type\":\"content_block_delta\",\"delta\":{{\"text\":\"{text}\"}}}}"),
        ),
        Dialect::Plain => ("tick".to_owned(), text),
    }
}

fn end_mark(dialect: Dialect) -> Option<(String, String)> {
    match dialect {
        Dialect::Chat | Dialect::Completions => Some((String::new(), "[DONE]".to_owned())),
        Dialect::Responses => {
            Some(("response.completed".to_owned(), "{\"type\":\"response.completed\"}".to_owned()))
        }
        Dialect::Messages => Some(("message_stop".to_owned(), "{\"type\":\"message_stop\"}".to_owned())),
        Dialect::Plain => None,
    }
}

fn error_event(dialect: Dialect) -> (String, String) {
    let error =
        "{\"type\":\"error\",\"error\":{\"message\":\"it broke\",\"code\":\"backend_says\"}}".to_owned();
    match dialect {
        Dialect::Chat | Dialect::Completions => {
            (String::new(), "{\"error\":{\"message\":\"it broke\",\"code\":\"backend_says\"}}".to_owned())
        }
        _ => ("error".to_owned(), error),
    }
}

/// A backend's own name of a response.
pub(crate) fn response_id(id: usize) -> String {
    format!("resp_{id}")
}

fn background_data(nth: u32, answer: &Answer, name: &str, rest: &str) -> (String, String) {
    let number = match answer.number_by {
        0 => String::new(),
        by => format!("\"sequence_number\":{},", u64::from(nth) * by),
    };
    (name.to_owned(), format!("{{\"type\":\"{name}\",{number}{rest}}}"))
}

/// The response object in an event of the backend's, or in what its clients are told.
fn background_object(id: usize, status: &str) -> String {
    let output = if status == "in_progress" { "[]".to_owned() } else { format!("[\"of {id}\"]") };
    let name = response_id(id);
    format!("\"response\":{{\"id\":\"{name}\",\"status\":\"{status}\",\"output\":{output}}}")
}

fn background_event(id: usize, nth: u32, answer: &Answer) -> (String, String) {
    match nth {
        0 => background_data(nth, answer, "response.created", &background_object(id, "in_progress")),
        1 => background_data(nth, answer, "response.in_progress", &background_object(id, "in_progress")),
        _ => {
            let delta = format!("\"delta\":\"{}\"", text(id, nth, answer.bytes));
            background_data(nth, answer, "response.output_text.delta", &delta)
        }
    }
}

fn last_background_event(id: usize, nth: u32, answer: &Answer) -> (String, String) {
    let status = if answer.fails { "failed" } else { "completed" };
    background_data(nth, answer, &format!("response.{status}"), &background_object(id, status))
}

impl Exchange {
    pub(crate) fn new(id: usize, request: Request, answer: Answer, rng: &mut Rng) -> Self {
        let wire = render(id, &request, &answer, rng);
        let body = if request.has_body() { request.body_passed_on(id) } else { Vec::new() };
        Exchange {
            request,
            body,
            answer,
            wire,
            attempts: Vec::new(),
            client_left_us: None,
            left_visibly: false,
            left_how: None,
            left_socket: None,
            left_unread: 0,
        }
    }

    /// Events that the backend has written whole, at most, over all attempts.
    pub(crate) fn events_written(&self) -> usize {
        let written = self.attempts.iter().map(|attempt| attempt.written).max().unwrap_or(0);
        self.wire.events.iter().filter(|event| event.wire_end <= written).count()
    }
}

/// Bytes of an event that does not end: more than a shard takes.
const ENDLESS_BYTES: usize = 300 << 10;

fn bad_head(kind: u32) -> Vec<u8> {
    let head: &[u8] = match kind % 6 {
        0 => b"SSH-2.0-OpenSSH\r\n",
        1 => b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        2 => b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        3 => b"HTTP/1.1 99 Low\r\n\r\n",
        4 => b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
        _ => return [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 100_000]].concat(),
    };
    head.to_vec()
}

fn render(id: usize, request: &Request, answer: &Answer, rng: &mut Rng) -> Wire {
    let line = if answer.crlf { "\r\n" } else { "\n" };
    let mut body = Vec::new();
    let mut events = Vec::new();
    let endless = match answer.fault {
        Fault::EndlessEvent(at) => answer.events.unwrap_or(0) * at / 1000,
        _ => u32::MAX,
    };
    if let Some(count) = answer.events {
        let mut put = |body: &mut Vec<u8>, (name, data): (String, String)| {
            if !name.is_empty() {
                body.extend_from_slice(format!("event: {name}{line}").as_bytes());
            }
            body.extend_from_slice(format!("data: {data}{line}{line}").as_bytes());
            // The CR of a blank line ends it, if nothing else comes.
            events.push(Owed { name, data, wire_end: body.len() - usize::from(answer.crlf) });
        };
        if request.background {
            for nth in 0..2 {
                put(&mut body, background_event(id, nth, answer));
            }
        }
        for nth in 0..count.min(endless) {
            if answer.comments && rng.chance(100) {
                body.extend_from_slice(format!(": backend comment{line}{line}").as_bytes());
                // What no rule knows is nothing to a reader of event streams.
                body.extend_from_slice(
                    format!("\u{1}nonsense: \\x{line}:{line}again{line}{line}").as_bytes(),
                );
            }
            put(
                &mut body,
                match request.background {
                    true => background_event(id, nth + 2, answer),
                    false => event(request.dialect, id, nth, answer.bytes),
                },
            );
        }
        match (answer.fault, end_mark(request.dialect)) {
            (Fault::InBandError, _) => put(&mut body, error_event(request.dialect)),
            (Fault::NoEndMark, _) | (_, None) => {}
            (Fault::EndlessEvent(_), _) => {}
            _ if request.background => put(&mut body, last_background_event(id, count + 2, answer)),
            (_, Some(mark)) => put(&mut body, mark),
        }
        if endless < u32::MAX {
            body.extend_from_slice(b"data: ");
            body.resize(body.len() + ENDLESS_BYTES, b'x');
        }
    } else if answer.status != 204 {
        body = (0..answer.bytes).map(|at| ((at * 31 + at / 251 + id) % 256) as u8).collect();
    }

    let mut head = String::new();
    for nth in 0..answer.interim {
        head += if nth % 2 == 0 {
            "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        } else {
            "HTTP/1.1 102 Processing\r\n\r\n"
        };
    }
    let kind = if answer.events.is_some() { "text/event-stream" } else { "application/octet-stream" };
    head += &format!("HTTP/1.1 {} Whatever\r\nContent-Type: {kind}\r\nX-Sim-Answer: {id}\r\n", answer.status);
    let bodiless = request.method == Method::Head || answer.status == 204;
    let said = match answer.fault {
        Fault::LongLength => body.len() + 1000,
        Fault::ShortLength(at) => body.len() * at as usize / 1000,
        _ => body.len(),
    };
    match answer.framed {
        _ if answer.status == 204 => {}
        Framed::Length => head += &format!("Content-Length: {said}\r\n"),
        Framed::Chunked => head += "Transfer-Encoding: chunked\r\n",
        Framed::Close => head += "Connection: close\r\n",
    }
    head += "\r\n";
    let mut bytes = head.into_bytes();
    let head_bytes = bytes.len();
    let mut then =
        if answer.framed == Framed::Close || answer.closes_silently { Then::Close } else { Then::KeepAlive };
    let mut whole = true;
    let mut chunk_starts = Vec::new();
    if bodiless {
        body.clear();
    } else if answer.framed == Framed::Chunked {
        let mut from = 0;
        let mut ends = vec![0; body.len() + 1];
        let max = rng.pick(&[1 << 20, 4096, 100]);
        while from < body.len() {
            let take = (rng.skewed(max) as usize + 1).min(body.len() - from);
            chunk_starts.push(bytes.len());
            bytes.extend_from_slice(format!("{take:x}\r\n").as_bytes());
            for at in from..from + take {
                bytes.push(body[at]);
                ends[at + 1] = bytes.len();
            }
            bytes.extend_from_slice(b"\r\n");
            from += take;
        }
        for event in &mut events {
            event.wire_end = ends[event.wire_end];
        }
        if answer.fault == Fault::NoLastChunk {
            then = Then::Close;
        } else if answer.fault == Fault::LongLength {
            let less = b"less than was said";
            bytes.extend_from_slice(b"fff\r\n");
            bytes.extend_from_slice(less);
            body.extend_from_slice(less);
        } else {
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
    } else {
        for event in &mut events {
            event.wire_end += bytes.len();
        }
        bytes.extend_from_slice(&body);
    }
    let full_bytes = bytes.len();
    let place = |at: u32| head_bytes + (bytes.len() - head_bytes).saturating_sub(1) * at as usize / 1000;
    match answer.fault {
        Fault::Cut(at) => {
            bytes.truncate(place(at));
            (then, whole) = (Then::Close, false);
        }
        Fault::Reset(at) => {
            bytes.truncate(place(at));
            (then, whole) = (Then::Reset, false);
        }
        Fault::Stall(at) => {
            bytes.truncate(place(at));
            (then, whole) = (Then::Stall, false);
        }
        Fault::Garbage(at) => {
            let at = place(at);
            let chunk = chunk_starts.iter().copied().take_while(|&start| start <= at).last();
            bytes.truncate(chunk.unwrap_or(head_bytes));
            bytes.extend_from_slice(b"zz\r\nno chunk\r\n");
            (then, whole) = (Then::Stall, false);
        }
        Fault::NoEndMark | Fault::InBandError => whole = false,
        Fault::NoAnswer => {
            bytes.clear();
            (then, whole) = (Then::Close, false);
        }
        Fault::BadHead(kind) => {
            bytes = bad_head(kind);
            (then, whole) = (Then::Stall, false);
        }
        Fault::LongLength => (then, whole) = (Then::Close, false),
        Fault::ShortLength(_) => {
            body.truncate(said);
            then = Then::Close;
        }
        Fault::EndlessEvent(_) => (then, whole) = (Then::Stall, false),
        Fault::NoLastChunk | Fault::None => {}
    }
    // No more than so many are put up with.
    whole &= answer.interim <= protocol::limits::INTERIM_RESPONSES_MAX;
    let marked = !whole
        && request.dialect.has_end_mark()
        && answer.fault != Fault::NoEndMark
        && answer.fault != Fault::InBandError
        && events.last().is_some_and(|mark| mark.wire_end <= bytes.len());
    let untouched = matches!(answer.fault, Fault::Cut(_) | Fault::Reset(_) | Fault::Stall(_));
    let marked = marked || (untouched && bytes.len() == full_bytes);
    if then == Then::Stall && untouched && bytes.len() == full_bytes {
        then = Then::KeepAlive;
    }
    Wire { bytes, head_bytes, events, body, then, whole, may_look_whole: marked }
}
