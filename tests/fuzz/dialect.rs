//! Dialects: what an event means, against a JSON parser; and that the errors we write are JSON on which the dialect agrees.

use super::facts::members_of;
use super::sse::cut;
use protocol::dialect::{Dialect, Meaning};
use protocol::fault::{Culprit, Fault, write_json_string};
use protocol::sse::Block;
use serde_json::Value;

/// The dictionary.
pub const WORDS: &[&str] = &[
    "data: ",
    "\n\n",
    "event: ",
    "event: error\n",
    "event: ping\n",
    "event: message_stop\ndata: {}\n\n",
    "data: [DONE]\n\n",
    "[DONE]",
    "{\"choices\":[{\"delta\":{\"content\":\"x\"}}]}",
    "\"choices\"",
    "\"error\"",
    "\"delta\"",
    "\"role\"",
    "\"text\"",
    "\"type\"",
    "\"sequence_number\":",
    "response.completed",
    "response.output_text.delta",
    "content_block_delta",
    "message_stop",
    "keepalive",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "\\\"",
    "\\",
    "null",
    "{}",
    "[]",
    "\"\"",
    "1",
    "error: {}\n\n",
    " ",
    "\"error\":{\"message\":\"m\"}",
    "\"choices\":[],",
    "data: {",
    "}\n\n",
];

/// What the meaning of a block is looked up with.
pub type Look = fn(Dialect, &Block<'_>) -> Meaning;

/// The target: a stream.
pub fn run(data: &[u8]) {
    run_on(Dialect::meaning_after_first_token, data);
}

/// The target, on another short cut.
pub fn run_on(short_cut: Look, data: &[u8]) {
    for cutout in cut(&[data], 1 << 20).unwrap_or_default() {
        let block = Block { raw: &cutout.raw, dispatches: cutout.dispatches, has_id: cutout.has_id };
        let object = object_of(&block);
        for dialect in Dialect::ALL {
            let meaning = dialect.meaning(&block);
            match (meaning, short_cut(dialect, &block)) {
                (Meaning::Preamble, Meaning::Token | Meaning::Preamble) => {}
                (whole, short) => assert_eq!(whole, short, "{dialect:?}"),
            }
            assert_eq!(dialect.meaning(&block), meaning, "asked twice");
            if !block.dispatches {
                assert!(matches!(meaning, Meaning::Heartbeat | Meaning::Error));
            }
            if let Some(object) = &object {
                if let Some(expected) = expected(dialect, &block, object) {
                    assert_eq!(meaning, expected, "{dialect:?}");
                }
                let number = member(object, "sequence_number").and_then(Value::as_u64);
                let number = number.filter(|_| dialect == Dialect::Responses);
                assert_eq!(dialect.sequence_number(&block), number);
            }
        }
    }
    writes_errors_that_are_read_as_errors(data);
}

/// The members of the data, if it is one line and a JSON object in which the prefix walk has no excuse: it lies within the
/// prefix that is looked at, and no name is escaped or comes twice.
fn object_of(block: &Block<'_>) -> Option<Vec<(String, Value)>> {
    let mut lines = block.data_lines();
    let (line, None) = (lines.next()?, lines.next()) else { return None };
    if line.len() > 1000 || line.contains(&b'\\') {
        return None;
    }
    let object = members_of(line)?;
    // The parser keeps one of two nested members with the same name.
    let written = line.windows(2).filter(|two| two == b"\":").count();
    let kept: usize = object.iter().map(|(_, value)| 1 + members(value)).sum();
    let unique = object.iter().enumerate().all(|(at, (key, _))| member(&object[..at], key).is_none());
    (unique && written == kept).then_some(object)
}

fn member<'o>(object: &'o [(String, Value)], name: &str) -> Option<&'o Value> {
    object.iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

/// Members at any depth.
fn members(value: &Value) -> usize {
    match value {
        Value::Object(object) => object.values().map(|value| 1 + members(value)).sum(),
        Value::Array(values) => values.iter().map(members).sum(),
        _ => 0,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    }
}

/// The documentation of [`Dialect::meaning`], on parsed JSON; `None` where it leaves the answer open.
fn expected(dialect: Dialect, block: &Block<'_>, object: &[(String, Value)]) -> Option<Meaning> {
    let named = block.event().unwrap_or_default();
    let error = object.iter().position(|(key, value)| key == "error" && !is_empty(value));
    let kind = match member(object, "type") {
        _ if !named.is_empty() && named != b"message" => named,
        Some(Value::String(kind)) => kind.as_bytes(),
        _ => b"",
    };
    Some(match dialect {
        Dialect::Chat | Dialect::Completions => {
            let choices = object.iter().position(|(key, _)| key == "choices");
            if named == b"error" || error.is_some_and(|error| choices.is_none_or(|choices| error < choices)) {
                return Some(Meaning::Error);
            }
            match choices.map(|at| &object[at].1) {
                Some(choices) if is_empty(choices) => match error {
                    None => Meaning::Preamble,
                    Some(_) => return None,
                },
                Some(Value::Array(choices)) => return choice(&choices[0]),
                _ => Meaning::Token,
            }
        }
        Dialect::Responses => match kind {
            b"response.completed" | b"response.failed" | b"response.incomplete" => Meaning::Done,
            b"error" => Meaning::Error,
            b"keepalive" | b"ping" => Meaning::Heartbeat,
            kind if kind.ends_with(b".delta") => Meaning::Token,
            b"" if error.is_some() => Meaning::Error,
            _ => Meaning::Preamble,
        },
        Dialect::Messages => match kind {
            b"content_block_delta" => Meaning::Token,
            b"message_stop" => Meaning::Done,
            b"error" => Meaning::Error,
            b"ping" => Meaning::Heartbeat,
            b"" if error.is_some() => Meaning::Error,
            _ => Meaning::Preamble,
        },
        Dialect::Plain if named == b"error" && error.is_some() => Meaning::Error,
        Dialect::Plain => Meaning::Token,
    })
}

fn choice(choice: &Value) -> Option<Meaning> {
    let says_nothing = match (choice.get("delta"), choice.get("text")) {
        (Some(_), Some(_)) => return None,
        (Some(Value::Object(delta)), None) => {
            delta.iter().all(|(key, value)| key == "role" || is_empty(value))
        }
        (None, Some(text)) => is_empty(text),
        _ => false,
    };
    Some(if says_nothing { Meaning::Preamble } else { Meaning::Token })
}

fn writes_errors_that_are_read_as_errors(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut json = Vec::new();
    write_json_string(&mut json, &text);
    assert_eq!(serde_json::from_slice::<Value>(&json).ok(), Some(Value::from(&*text)));
    assert!(!json.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)), "fits on one data line");

    let status = 400 + (data.iter().map(|byte| u32::from(*byte)).sum::<u32>() % 200) as u16;
    const MESSAGES: [&str; 3] = ["The backend \"a\" is gone.\r\n\n", "\u{0}\u{2028}é", "data: [DONE]\n\n"];
    let message = MESSAGES[data.len() % MESSAGES.len()];
    let fault = Fault { status, code: "a_code", message, culprit: Culprit::Upstream, retry_helps: false };
    for dialect in Dialect::ALL {
        let mut event = Vec::new();
        dialect.write_error_event_numbered(&fault, data.first().map(|byte| u64::from(*byte)), &mut event);
        let blocks = cut(&[&event], event.len()).unwrap_or_default();
        let [only] = &blocks[..] else { panic!("{} blocks", blocks.len()) };
        let block = Block { raw: &only.raw, dispatches: only.dispatches, has_id: only.has_id };
        assert_eq!((dialect.meaning(&block), only.raw.len()), (Meaning::Error, event.len()), "{dialect:?}");
        let line: Vec<u8> = block.data_lines().collect::<Vec<_>>().join(&b'\n');
        let Ok(value) = serde_json::from_slice::<Value>(&line) else { panic!("{dialect:?} writes no JSON") };
        assert_eq!(value["error"]["message"], message);
        let mut body = Vec::new();
        dialect.write_error_body(&fault, &mut body);
        assert!(serde_json::from_slice::<Value>(&body).is_ok_and(|body| body["error"]["code"] == "a_code"));
    }
}
