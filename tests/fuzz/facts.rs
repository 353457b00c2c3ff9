//! What is read out of a request's body in passing, against a JSON parser, whatever the splits.

use super::input::for_each_split;
use protocol::facts::{Background, RequestFacts, Rewriter, Scanner};
use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

/// The dictionary.
pub const WORDS: &[&str] = &[
    "{\"model\":\"m\",\"stream\":true}",
    "\"model\":",
    "\"stream\":",
    "\"stream_options\":{",
    "\"include_usage\":",
    "\"background\":",
    "\"max_tokens\":",
    "\"max_output_tokens\":",
    "\"max_completion_tokens\":",
    "true",
    "false",
    "null",
    "\\u006d",
    "\\ud83d\\ude00",
    "\\ud83d",
    "\\\"",
    "\"messages\":[{\"content\":\"\\\"stream\\\": true\"}],",
    "99999999999",
    "-1",
    "1e3",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "\\",
    "\u{feff}",
];

/// The target: a body.
pub fn run(data: &[u8]) {
    let whole = scan(&[data]);
    for_each_split(data, |pieces| assert_eq!(scan(pieces), whole));
    // What lies beyond the prefix that is looked at says nothing.
    let half = data.len() / 2;
    let mut scanner = Scanner::new(half);
    scanner.feed(data);
    assert_eq!(scanner.facts(), &scan(&[&data[..half]]));
    let expected = expected(data);
    if let Some(expected) = &expected {
        assert_eq!(&whole, expected);
    }
    let rewritten = rewrite(&[data]);
    for_each_split(data, |pieces| assert_eq!(rewrite(pieces), rewritten));
    let (bytes, says) = rewritten;
    assert_eq!(bytes.len(), data.len());
    match says {
        Background::No if whole.background != Some(true) => {}
        Background::No => panic!("it was asked for"),
        Background::Undecided => assert_eq!(whole.background, Some(true)),
        Background::Streams | Background::Polls => {
            assert_eq!(whole.background, Some(true));
            let (mut given, mut expected) = (scan(&[&bytes]), whole);
            assert_ne!(given.background, Some(true), "the backend is not to know");
            (given.background, expected.background, expected.stream) = (None, None, Some(true));
            assert_eq!(given, expected);
        }
    }
}

fn rewrite(pieces: &[&[u8]]) -> (Vec<u8>, Background) {
    let (mut rewriter, mut out) = (Rewriter::new(), Vec::new());
    for piece in pieces {
        rewriter.feed(piece, |bytes| out.extend_from_slice(bytes));
    }
    let says = rewriter.background();
    rewriter.finish(|bytes| out.extend_from_slice(bytes));
    (out, says)
}

fn scan(pieces: &[&[u8]]) -> RequestFacts {
    let mut scanner = Scanner::new(1 << 20);
    let mut wants_more = true;
    for piece in pieces {
        let wants = scanner.feed(piece);
        assert!(wants_more || !wants, "it wanted no more");
        wants_more = wants;
    }
    let facts = scanner.into_facts();
    assert!(facts.model.as_ref().is_none_or(|model| model.len() <= 256));
    facts
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}

/// The members of a JSON object in their order; of two with the same name both. `None` for any other text.
pub(super) fn members_of(text: &[u8]) -> Option<Vec<(String, Value)>> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let members = json.deserialize_map(Members).ok()?;
    json.end().is_ok().then_some(members)
}

/// The documentation of [`RequestFacts`], on parsed JSON; `None` when it is none.
fn expected(body: &[u8]) -> Option<RequestFacts> {
    let members = members_of(body)?;
    let options_repeat = members.iter().filter(|(key, _)| key == "stream_options").count() > 1;
    let numbers_are_plain = members.iter().all(|(_, value)| {
        !value.is_number() || value.as_u64().is_some_and(|number| number.to_string().len() < 20)
    });
    if options_repeat || !numbers_are_plain {
        return None;
    }
    let last = |name: &str| members.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value);
    let number = |name: &str| {
        last(name).and_then(Value::as_u64).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
    };
    let model = last("model").and_then(Value::as_str).filter(|model| model.len() <= 256);
    Some(RequestFacts {
        model: model.map(Box::from),
        stream: last("stream").and_then(Value::as_bool),
        include_usage: last("stream_options")
            .and_then(|options| options.get("include_usage"))
            .and_then(Value::as_bool),
        background: last("background").and_then(Value::as_bool),
        max_tokens: number("max_completion_tokens")
            .or_else(|| number("max_output_tokens"))
            .or_else(|| number("max_tokens")),
    })
}
