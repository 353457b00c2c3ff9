//! The messages of a JSON body (PROTOCOL.md section 9.1): one value, or the elements of one array, as they were written.

use super::refusals;
use crate::fault::Fault;
use crate::limits::DURABLE_MESSAGES_MAX;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// The text of each message, without white space around it; empty for an empty array.
pub(super) fn messages(body: &[u8]) -> Result<Vec<&str>, Fault> {
    let is_array = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    if !is_array {
        let value: &RawValue = serde_json::from_slice(body).map_err(|_| refusals::BAD_JSON)?;
        return Ok(vec![value.get()]);
    }
    let Elements { elements, too_many } = serde_json::from_slice(body).map_err(|_| refusals::BAD_JSON)?;
    if too_many { Err(refusals::TOO_MANY_MESSAGES) } else { Ok(elements) }
}

/// The elements of an array, as far as they are not too many.
struct Elements<'a> {
    elements: Vec<&'a str>,
    too_many: bool,
}

impl<'a> Deserialize<'a> for Elements<'a> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'a> Visitor<'a> for Collect {
            type Value = Elements<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'a>>(self, mut array: A) -> Result<Self::Value, A::Error> {
                let mut found = Elements { elements: Vec::new(), too_many: false };
                while let Some(element) = array.next_element::<&RawValue>()? {
                    found.too_many |= found.elements.len() >= DURABLE_MESSAGES_MAX;
                    if !found.too_many {
                        found.elements.push(element.get());
                    }
                }
                Ok(found)
            }

            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Err(E::custom("not an array"))
            }
        }
        deserializer.deserialize_seq(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_level_of_an_array_is_flattened_and_nothing_is_written_anew() {
        for (body, expected) in [
            ("{\"event\": \"created\"}", vec!["{\"event\": \"created\"}"]),
            (" 1.0e5 ", vec!["1.0e5"]),
            ("\"\\u0041\"", vec!["\"\\u0041\""]),
            ("null", vec!["null"]),
            ("[]", vec![]),
            (" [ ] ", vec![]),
            ("[{\"a\":1}, {\"b\" : [ ]}\n]", vec!["{\"a\":1}", "{\"b\" : [ ]}"]),
            ("[[1,2],[3,4]]", vec!["[1,2]", "[3,4]"]),
            ("[[[1,2,3]]]", vec!["[[1,2,3]]"]),
            ("[[]]", vec!["[]"]),
            ("[1,\"a,]\",true]", vec!["1", "\"a,]\"", "true"]),
        ] {
            assert_eq!(messages(body.as_bytes()), Ok(expected), "{body}");
        }
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for body in
            [&b""[..], b"{", b"[1,]", b"[1", b"[1]]", b"1 2", b"{a:1}", b"\"\xff\"", b"nul", b"\xef\xbb\xbf1"]
        {
            assert_eq!(messages(body), Err(refusals::BAD_JSON), "{:?}", String::from_utf8_lossy(body));
        }
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert_eq!(messages(&deep).map(|found| found.len()), Ok(1), "depth costs no stack");
    }

    #[test]
    fn more_messages_than_allowed_are_refused() {
        let body = |count: usize| format!("[{}]", vec!["0"; count].join(","));
        assert_eq!(
            messages(body(DURABLE_MESSAGES_MAX).as_bytes()).map(|found| found.len()),
            Ok(DURABLE_MESSAGES_MAX)
        );
        assert_eq!(messages(body(DURABLE_MESSAGES_MAX + 1).as_bytes()), Err(refusals::TOO_MANY_MESSAGES));
    }
}
