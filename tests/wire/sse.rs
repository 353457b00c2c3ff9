//! Events as a client reads them, and the ones that scripted backends say.

use serde_json::{Value, json};

/// One event as received: comments in front, `id:` and blank line included.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) raw: Vec<u8>,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.raw))
    }
}

impl Event {
    /// Where the first event of the text ends: after its blank line. LF and CRLF only, as these tests' backends write.
    pub(crate) fn ends_in(text: &[u8]) -> Option<usize> {
        let mut line_start = 0;
        for (at, byte) in text.iter().enumerate() {
            if *byte == b'\n' {
                let line = &text[line_start..at];
                if line.is_empty() || line == b"\r" {
                    return Some(at + 1);
                }
                line_start = at + 1;
            }
        }
        None
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.raw).expect("UTF-8")
    }

    fn values(&self, name: &str) -> Vec<&str> {
        let lines = self.text().lines();
        let values = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        values.map(|value| value.strip_prefix(' ').unwrap_or(value)).collect()
    }

    /// The last `id:` line's number.
    pub(crate) fn id(&self) -> Option<u64> {
        self.values("id").last().map(|id| id.parse().unwrap())
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.values("event").last().copied()
    }

    pub(crate) fn data(&self) -> String {
        self.values("data").join("\n")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data()).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The event without its first `id:` line: what the backend said, if it said no id.
    pub(crate) fn payload(&self) -> Vec<u8> {
        let end = self.raw.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        assert!(self.raw.starts_with(b"id: "), "an id in front: {self:?}");
        self.raw[end..].to_vec()
    }

    /// `error.code` of an in-band error in any dialect's form.
    pub(crate) fn error_code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_else(|| panic!("an error: {self:?}")).to_owned()
    }
}

/// A backend's head of an event stream, chunked.
pub(crate) const STREAM: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
/// The same without framing: it ends with the connection.
pub(crate) const STREAM_UNTIL_CLOSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
pub(crate) const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// A chat chunk with this content.
pub(crate) fn token(content: &str) -> String {
    let data = json!({"id": "c", "choices": [{"index": 0, "delta": {"content": content}}]});
    format!("data: {data}\n\n")
}

/// An event with a name and a type, as Responses and Messages have them.
pub(crate) fn named(name: &str, mut data: Value) -> String {
    data["type"] = name.into();
    format!("event: {name}\ndata: {data}\n\n")
}

/// A dialect: where it lives, a token, its end, and how its heartbeat looks before and after the first id.
pub(crate) struct Dialect {
    pub(crate) path: &'static str,
    pub(crate) token: String,
    pub(crate) done: Option<String>,
    pub(crate) heartbeat: &'static str,
    pub(crate) heartbeat_among_ids: &'static str,
    pub(crate) error_name: Option<&'static str>,
}

pub(crate) fn dialects() -> [Dialect; 5] {
    let comment = ": keep-alive\n\n";
    let line = ": keep-alive\n";
    let ping = "event: ping\ndata: {\"type\": \"ping\"}\n\n";
    [
        Dialect {
            path: "/v1/chat/completions",
            token: token("a"),
            done: Some(DONE.to_owned()),
            heartbeat: comment,
            heartbeat_among_ids: line,
            error_name: None,
        },
        Dialect {
            path: "/v1/completions",
            token: format!("data: {}\n\n", json!({"choices": [{"text": "a", "index": 0}]})),
            done: Some(DONE.to_owned()),
            heartbeat: comment,
            heartbeat_among_ids: line,
            error_name: None,
        },
        Dialect {
            path: "/v1/responses",
            token: named("response.output_text.delta", json!({"sequence_number": 4, "delta": "a"})),
            done: Some(named("response.completed", json!({"sequence_number": 5}))),
            heartbeat: comment,
            heartbeat_among_ids: line,
            error_name: Some("error"),
        },
        Dialect {
            path: "/v1/messages",
            token: named(
                "content_block_delta",
                json!({"index": 0, "delta": {"type": "text_delta", "text": "a"}}),
            ),
            done: Some(named("message_stop", json!({}))),
            heartbeat: ping,
            heartbeat_among_ids: ping,
            error_name: Some("error"),
        },
        Dialect {
            path: "/events",
            token: "data: a\n\n".to_owned(),
            done: None,
            heartbeat: comment,
            heartbeat_among_ids: comment,
            error_name: Some("error"),
        },
    ]
}
