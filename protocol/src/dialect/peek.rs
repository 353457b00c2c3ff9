//! Looks at the first members of a JSON object without parsing it: what one event is, told from a bounded prefix.
//! Tolerant: where the text is cut or malformed, the walk ends.

use memchr::{memchr, memchr2, memmem::Finder};
use std::sync::LazyLock;

/// Bytes of one event that are looked at. What tells its kind (`type`, `error`, the first choice's `delta`) stands in
/// front in every backend's events; an image or a long text behind it must not cost a walk.
const PEEK_BYTES_MAX: usize = 1024;

static CHOICES: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"choices\""));
static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"error\""));

/// The members from `choices` on, where no `error` and nothing nested comes before: a short cut past what every chunk begins
/// with, for it is taken for each token. Neither name can match inside a string, where its quotes would be escaped; as a
/// whole string it has no colon behind it.
pub(super) fn members_from_choices(data: &[u8]) -> Option<Members<'_>> {
    let front = &data[..data.len().min(PEEK_BYTES_MAX)];
    let (before, from) = front.split_at(CHOICES.find(front)?);
    let is_member = after_space(&from[CHOICES.needle().len()..]).starts_with(b":");
    let is_outermost = memchr2(b'{', b'[', before.strip_prefix(b"{")?).is_none();
    match ERROR.find(before) {
        None if is_member && is_outermost => Some(Members { rest: from, at_nested: false }),
        _ => None,
    }
}

/// Whether a block is one data line with an object in it that has no `error` member near its front. (A short cut: another
/// answer than true says nothing.)
pub(super) fn is_plain_chunk(raw: &[u8]) -> bool {
    raw.starts_with(b"data: {")
        && raw.ends_with(b"}\n\n")
        && memchr(b'\n', raw) == Some(raw.len() - 2)
        && ERROR.find(&raw[..raw.len().min(PEEK_BYTES_MAX)]).is_none()
}

/// The value of one member.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    /// A string's inside, escapes as they are, perhaps cut.
    Text(&'a [u8]),
    /// An object or array from its bracket on, perhaps with more behind it.
    Nested(&'a [u8]),
    /// A number or literal.
    Scalar(&'a [u8]),
}

impl<'a> Value<'a> {
    /// Whether it says nothing: null, "", {} or [].
    pub(super) fn is_empty(self) -> bool {
        match self {
            Value::Text(text) => text.is_empty(),
            Value::Nested(from) => matches!(after_space(&from[1..]), [b'}' | b']', ..]),
            Value::Scalar(scalar) => scalar == b"null",
        }
    }

    /// The first element, if this is an array with an object in front.
    pub(super) fn first_object(self) -> Option<Members<'a>> {
        match self {
            Value::Nested([b'[', rest @ ..]) => Members::of_object(after_space(rest)),
            _ => None,
        }
    }

    /// The members, if this is an object.
    pub(super) fn members(self) -> Option<Members<'a>> {
        match self {
            Value::Nested(from) => Members::of_object(from),
            _ => None,
        }
    }
}

/// A walk over the members of an object. Keys come as written, escapes included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Members<'a> {
    rest: &'a [u8],
    /// `rest` begins with a nested value that was handed out; it is skipped only if the walk goes on.
    at_nested: bool,
}

impl<'a> Members<'a> {
    /// The members of the object that `data` begins with, as far as the prefix reaches.
    pub(super) fn of(data: &'a [u8]) -> Option<Self> {
        Members::of_object(after_space(&data[..data.len().min(PEEK_BYTES_MAX)]))
    }

    /// The members of the object that `data` begins with, all of them.
    pub(super) fn of_whole(data: &'a [u8]) -> Option<Self> {
        Members::of_object(after_space(data))
    }

    fn of_object(text: &'a [u8]) -> Option<Self> {
        text.strip_prefix(b"{").map(|rest| Members { rest, at_nested: false })
    }

    /// The first member of that name.
    pub(super) fn find(mut self, name: &[u8]) -> Option<Value<'a>> {
        self.find_map(|(key, value)| (key == name).then_some(value))
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = (&'a [u8], Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        if std::mem::take(&mut self.at_nested) {
            self.rest = after_nested(self.rest);
        }
        let mut text = after_space(self.rest);
        if let [b',', rest @ ..] = text {
            text = after_space(rest);
        }
        let (key, rest) = string(text.strip_prefix(b"\"")?);
        let text = after_space(after_space(rest).strip_prefix(b":")?);
        let value;
        (value, self.rest) = match *text.first()? {
            b'"' => {
                let (inside, rest) = string(&text[1..]);
                (Value::Text(inside), rest)
            }
            b'{' | b'[' => {
                self.at_nested = true;
                (Value::Nested(text), text)
            }
            _ => {
                let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t');
                let (scalar, rest) = text.split_at(text.iter().position(ends).unwrap_or(text.len()));
                (Value::Scalar(scalar), rest)
            }
        };
        Some((key, value))
    }
}

fn after_space(text: &[u8]) -> &[u8] {
    let mut rest = text;
    while let [b' ' | b'\t' | b'\n' | b'\r', after @ ..] = rest {
        rest = after;
    }
    rest
}

/// Splits the text after an opening quote into the string's inside and what follows its closing quote.
fn string(text: &[u8]) -> (&[u8], &[u8]) {
    let mut from = 0;
    while let Some(length) = memchr2(b'"', b'\\', text.get(from..).unwrap_or_default()) {
        let at = from + length;
        if text[at] == b'"' {
            return (&text[..at], &text[at + 1..]);
        }
        from = at + 2;
    }
    (text, &[])
}

fn after_nested(text: &[u8]) -> &[u8] {
    let (mut rest, mut depth) = (text, 0_u32);
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'"' => (_, rest) = string(after),
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            _ => {}
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_at_their_own_level_only() {
        let data = br#" { "a" : {"type":"inner","b":["}",{"c":1}]} ,"s":"q\"\\","n":null,"type" : "outer"}"#;
        let members = Members::of(data).unwrap();
        assert_eq!(members.find(b"type"), Some(Value::Text(b"outer")));
        assert_eq!(members.find(b"s"), Some(Value::Text(br#"q\"\\"#)));
        assert_eq!(members.find(b"n"), Some(Value::Scalar(b"null")));
        assert_eq!(members.find(b"c"), None);
        let inner = members.find(b"a").unwrap().members().unwrap();
        assert_eq!(inner.find(b"type"), Some(Value::Text(b"inner")));
        assert_eq!(inner.find(b"s"), None);
    }

    #[test]
    fn cut_and_malformed_text_ends_the_walk() {
        let data = br#"{"a":{"b":"c\"d"},"e":[1,2,{}],"f":"g"}"#;
        for end in 0..data.len() {
            if let Some(members) = Members::of(&data[..end]) {
                assert!(members.count() <= 3);
            }
        }
        for text in [&b"[1]"[..], b"", b"x", b"{]", b"{\"a\"}", b"{\"a\":", b"{\"a\\", b"{\"a\":]"] {
            assert!(Members::of(text).is_none_or(|members| members.count() <= 1));
        }
    }

    #[test]
    fn the_short_cut_finds_the_outermost_member_of_that_name_or_none() {
        for (data, found) in [
            (&br#"{"id":"c","choices" : [1]}"#[..], true),
            (br#"{"object":"choices","choices":[1]}"#, false),
            (br#"{"a":{"choices":[]},"choices":[1]}"#, false),
            (br#"{"a":[{"choices":[]}]}"#, false),
            (br#"{"error":null,"choices":[1]}"#, false),
            (br#"["choices"]"#, false),
            (br#"{"choices"#, false),
        ] {
            assert_eq!(members_from_choices(data).is_some(), found, "{}", data.escape_ascii());
        }
    }

    #[test]
    fn emptiness_is_null_or_nothing_inside() {
        let data = br#"{"a":null,"b":"","c":[ ],"d":{},"e":0,"f":" ","g":[0],"h":false}"#;
        let empty: Vec<bool> = Members::of(data).unwrap().map(|(_, value)| value.is_empty()).collect();
        assert_eq!(empty, [true, true, true, true, false, false, false, false]);
    }
}
