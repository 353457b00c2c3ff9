//! Reads the few facts of a JSON request body that routing and deadlines need, as the body streams through: any split,
//! nothing kept but the model's name, nothing altered. Malformed JSON yields what was found until then.
//!
//! ```text
//! Before ─{─► Member ─"─► Key ─"─► Colon ─:─► Value ─┬─"─► Text | SkipText ─"─┐
//!               ▲  └─}─► Finished (depth 1)          ├─{[─► SkipNested ─}]────┤
//!               │                                    └─...─► Scalar ──────────┤
//!               └────────────────────── , ──────────────────── AfterValue ◄───┘    } ─► outer object or Finished
//! ```

mod rewrite;

use memchr::memchr2;
pub use rewrite::{Background, Rewriter};

/// Bytes of a key that matters; the longest is `max_completion_tokens`.
const KEY_BYTES_MAX: usize = 32;
/// Bytes of a model's name; a longer one counts as none.
const MODEL_BYTES_MAX: usize = 256;
/// Bytes of a number or literal; a longer one counts as none.
const SCALAR_BYTES_MAX: usize = 32;

/// What a request body says about the answer that it wants. `None`: not said, or not said in the expected type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestFacts {
    /// `model`, at most 256 bytes.
    pub model: Option<Box<str>>,
    /// `stream`.
    pub stream: Option<bool>,
    /// `stream_options.include_usage`.
    pub include_usage: Option<bool>,
    /// `background` (OpenAI responses).
    pub background: Option<bool>,
    /// `max_completion_tokens`, else `max_output_tokens`, else `max_tokens`; a greater number counts as `u32::MAX`.
    pub max_tokens: Option<u32>,
}

/// Scans one request body. Members of the top-level object and of its `stream_options` count; of two with the same name
/// the last. Constant memory: one buffer of at most 256 bytes.
#[derive(Debug, Default)]
pub struct Scanner {
    facts: RequestFacts,
    /// `max_completion_tokens`, `max_output_tokens`, `max_tokens`.
    max_tokens: [Option<u32>; 3],
    /// The key, string value or scalar that is being read.
    text: Vec<u8>,
    /// Bytes that may still be looked at.
    bytes_left: usize,
    /// Brackets open inside a value that is skipped.
    depth: u32,
    /// First half of a `\u` surrogate pair; 0: none.
    high_surrogate: u16,
    escape: Escape,
    state: State,
    field: Field,
    in_stream_options: bool,
    /// The object has ended as it should.
    closed: bool,
    /// The text has outgrown its limit.
    overflow: bool,
    /// The last scalar was null.
    was_null: bool,
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
enum State {
    #[default]
    Before,
    Member,
    Key,
    Colon,
    Value,
    Text,
    SkipText,
    SkipNested,
    Scalar,
    AfterValue,
    Finished,
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
enum Escape {
    #[default]
    None,
    /// After a backslash.
    Begun,
    /// After `\u` and so many digits.
    Unicode { digits: u8, unit: u16 },
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
enum Field {
    #[default]
    Other,
    Model,
    Stream,
    StreamOptions,
    IncludeUsage,
    Background,
    /// Index into `Scanner::max_tokens`.
    MaxTokens(u8),
}

impl Scanner {
    /// A scanner that looks at no more than the first `prefix_bytes_max` bytes of a body.
    pub fn new(prefix_bytes_max: usize) -> Self {
        Scanner { bytes_left: prefix_bytes_max, ..Scanner::default() }
    }

    /// Looks at the next bytes of the body. False when it wants no more: the object is closed, it is not an object or
    /// malformed, or the prefix is used up.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        let mut rest = &bytes[..bytes.len().min(self.bytes_left)];
        self.bytes_left -= rest.len();
        while !rest.is_empty() && self.state != State::Finished {
            rest = &rest[self.step(rest)..];
        }
        self.state != State::Finished && self.bytes_left > 0
    }

    /// Takes in some of `bytes`, which are not empty, up to the next change of state or less; gives how many.
    fn step(&mut self, bytes: &[u8]) -> usize {
        match self.state {
            State::Key => self.take_text(bytes, KEY_BYTES_MAX),
            State::Text => self.take_text(bytes, MODEL_BYTES_MAX),
            State::SkipText => self.skip_text(bytes),
            State::SkipNested => self.skip_nested(bytes),
            State::Scalar => self.take_scalar(bytes),
            _ => self.take_structure(bytes),
        }
    }

    /// What has been found so far.
    pub fn facts(&self) -> &RequestFacts {
        &self.facts
    }

    /// What has been found.
    pub fn into_facts(self) -> RequestFacts {
        self.facts
    }

    /// Between strings, scalars and skipped values: space, or one structural byte.
    fn take_structure(&mut self, bytes: &[u8]) -> usize {
        let space = bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        let Some(&byte) = bytes.get(space) else { return space };
        self.state = match (self.state, byte) {
            // A byte order mark is not JSON, but backends take it.
            (State::Before, 0xEF | 0xBB | 0xBF) => State::Before,
            (State::Before, b'{') => State::Member,
            (State::Member, b'"') => self.begin_text(State::Key),
            (State::Colon, b':') => State::Value,
            (State::Value, _) => {
                self.forget_field();
                match byte {
                    b'"' if self.field == Field::Model => self.begin_text(State::Text),
                    b'"' => State::SkipText,
                    b'{' if self.field == Field::StreamOptions => {
                        self.in_stream_options = true;
                        State::Member
                    }
                    b'{' | b'[' => {
                        self.depth = 1;
                        State::SkipNested
                    }
                    b',' | b'}' | b']' | b':' => State::Finished,
                    _ => {
                        self.begin_text(State::Scalar);
                        return space + self.take_scalar(&bytes[space..]);
                    }
                }
            }
            (State::AfterValue, b',') => State::Member,
            (State::AfterValue | State::Member, b'}') if self.in_stream_options => {
                self.in_stream_options = false;
                State::AfterValue
            }
            (State::AfterValue | State::Member, b'}') => {
                self.closed = true;
                State::Finished
            }
            _ => State::Finished,
        };
        space + 1
    }

    fn begin_text(&mut self, state: State) -> State {
        self.text.clear();
        (self.overflow, self.was_null) = (false, false);
        self.escape = Escape::None;
        self.high_surrogate = 0;
        state
    }

    /// A key or a string value up to its closing quote, unescaped.
    fn take_text(&mut self, bytes: &[u8], bytes_max: usize) -> usize {
        if self.escape != Escape::None {
            self.take_escape(bytes[0], bytes_max);
            return 1;
        }
        let plain = memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
        let is_fresh = self.text.is_empty() && self.high_surrogate == 0 && !self.overflow;
        if is_fresh && bytes.get(plain) == Some(&b'"') {
            // All of it lies here.
            self.overflow = plain > bytes_max;
            self.end_text(&bytes[..plain]);
            return plain + 1;
        }
        if plain > 0 {
            self.push(&bytes[..plain], bytes_max);
            return plain;
        }
        if bytes[0] == b'\\' {
            self.escape = Escape::Begun;
        } else {
            self.push(b"", bytes_max);
            let text = std::mem::take(&mut self.text);
            self.end_text(&text);
            self.text = text;
        }
        1
    }

    fn end_text(&mut self, text: &[u8]) {
        if self.state == State::Key {
            self.field = if self.overflow { Field::Other } else { self.field_of_key(text) };
            self.state = State::Colon;
        } else {
            if !self.overflow {
                self.facts.model = std::str::from_utf8(text).ok().map(Box::from);
            }
            self.state = State::AfterValue;
        }
    }

    fn field_of_key(&self, key: &[u8]) -> Field {
        if self.in_stream_options {
            return if key == b"include_usage" { Field::IncludeUsage } else { Field::Other };
        }
        match key {
            b"model" => Field::Model,
            b"stream" => Field::Stream,
            b"stream_options" => Field::StreamOptions,
            b"background" => Field::Background,
            b"max_completion_tokens" => Field::MaxTokens(0),
            b"max_output_tokens" => Field::MaxTokens(1),
            b"max_tokens" => Field::MaxTokens(2),
            _ => Field::Other,
        }
    }

    fn take_escape(&mut self, byte: u8, bytes_max: usize) {
        let (mut digits, mut unit) = match self.escape {
            Escape::Unicode { digits, unit } => (digits, unit),
            _ if byte == b'u' => {
                self.escape = Escape::Unicode { digits: 0, unit: 0 };
                return;
            }
            _ => {
                self.escape = Escape::None;
                let plain = match byte {
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    other => other,
                };
                return self.push(&[plain], bytes_max);
            }
        };
        let Some(digit) = char::from(byte).to_digit(16) else {
            self.state = State::Finished;
            return;
        };
        unit = unit << 4 | digit as u16;
        digits += 1;
        if digits < 4 {
            self.escape = Escape::Unicode { digits, unit };
            return;
        }
        self.escape = Escape::None;
        if (0xDC00..0xE000).contains(&unit) && self.high_surrogate != 0 {
            let pair = [std::mem::take(&mut self.high_surrogate), unit];
            for character in char::decode_utf16(pair).flatten() {
                self.push(character.encode_utf8(&mut [0; 4]).as_bytes(), bytes_max);
            }
        } else {
            self.push(b"", bytes_max);
            if (0xD800..0xDC00).contains(&unit) {
                self.high_surrogate = unit;
            } else {
                let character = char::from_u32(u32::from(unit)).unwrap_or(char::REPLACEMENT_CHARACTER);
                self.push(character.encode_utf8(&mut [0; 4]).as_bytes(), bytes_max);
            }
        }
    }

    /// Appends to the text within its limit; a high surrogate that found no partner comes first, as U+FFFD.
    fn push(&mut self, bytes: &[u8], bytes_max: usize) {
        if self.high_surrogate != 0 {
            self.high_surrogate = 0;
            self.push("\u{FFFD}".as_bytes(), bytes_max);
        }
        if self.overflow || self.text.len() + bytes.len() > bytes_max {
            self.overflow = true;
        } else {
            self.text.extend_from_slice(bytes);
        }
    }

    fn skip_text(&mut self, bytes: &[u8]) -> usize {
        if self.escape != Escape::None {
            self.escape = Escape::None;
            return 1;
        }
        let Some(at) = memchr2(b'"', b'\\', bytes) else { return bytes.len() };
        if bytes[at] == b'\\' {
            self.escape = Escape::Begun;
        } else {
            self.state = if self.depth > 0 { State::SkipNested } else { State::AfterValue };
        }
        at + 1
    }

    fn skip_nested(&mut self, bytes: &[u8]) -> usize {
        for (at, byte) in bytes.iter().enumerate() {
            match byte {
                b'"' => {
                    self.escape = Escape::None;
                    self.state = State::SkipText;
                    return at + 1;
                }
                b'{' | b'[' => self.depth = self.depth.saturating_add(1),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        self.state = State::AfterValue;
                        return at + 1;
                    }
                }
                _ => {}
            }
        }
        bytes.len()
    }

    fn take_scalar(&mut self, bytes: &[u8]) -> usize {
        self.state = State::Scalar;
        let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
        let end = bytes.iter().position(ends);
        let taken = end.unwrap_or(bytes.len());
        if end.is_some() && self.text.is_empty() && !self.overflow {
            // All of it lies here.
            if taken <= SCALAR_BYTES_MAX {
                self.note_scalar(&bytes[..taken]);
            }
            self.state = State::AfterValue;
            return taken;
        }
        self.push(&bytes[..taken], SCALAR_BYTES_MAX);
        if end.is_some() {
            if !self.overflow {
                let text = std::mem::take(&mut self.text);
                self.note_scalar(&text);
                self.text = text;
            }
            self.state = State::AfterValue;
        }
        taken
    }

    /// A member's value begins: an earlier one of the same name no longer counts.
    fn forget_field(&mut self) {
        self.depth = 0;
        self.escape = Escape::None;
        match self.field {
            Field::Other => {}
            Field::Model => self.facts.model = None,
            Field::Stream => self.facts.stream = None,
            Field::StreamOptions | Field::IncludeUsage => self.facts.include_usage = None,
            Field::Background => self.facts.background = None,
            Field::MaxTokens(index) => self.note_max_tokens(index, None),
        }
    }

    fn note_scalar(&mut self, text: &[u8]) {
        self.was_null = text == b"null";
        let truth = match text {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        };
        match self.field {
            Field::Stream => self.facts.stream = truth,
            Field::IncludeUsage => self.facts.include_usage = truth,
            Field::Background => self.facts.background = truth,
            Field::MaxTokens(index) => {
                let digits = Some(text).filter(|text| text.iter().all(u8::is_ascii_digit));
                let digits = digits.and_then(|text| std::str::from_utf8(text).ok());
                let number = digits.and_then(|digits| digits.parse::<u128>().ok());
                self.note_max_tokens(index, number.map(|number| u32::try_from(number).unwrap_or(u32::MAX)));
            }
            Field::Other | Field::Model | Field::StreamOptions => {}
        }
    }

    fn note_max_tokens(&mut self, index: u8, tokens: Option<u32>) {
        self.max_tokens[usize::from(index)] = tokens;
        let [completion, output, legacy] = self.max_tokens;
        self.facts.max_tokens = completion.or(output).or(legacy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn scan(body: &[u8]) -> RequestFacts {
        let mut scanner = Scanner::new(1 << 20);
        scanner.feed(body);
        scanner.into_facts()
    }

    #[test]
    fn a_chat_request_is_read() {
        let body = br#"{"model":"gpt-x","messages":[{"role":"user","content":"\"stream\": true, {\\"}],
            "stream" : true,"stream_options":{"other":[1],"include_usage":true},"max_tokens":64,"background":false}"#;
        let expected = RequestFacts {
            model: Some("gpt-x".into()),
            stream: Some(true),
            include_usage: Some(true),
            background: Some(false),
            max_tokens: Some(64),
        };
        assert_eq!(scan(body), expected);
        for split in 0..=body.len() {
            let mut scanner = Scanner::new(1 << 20);
            scanner.feed(&body[..split]);
            scanner.feed(&body[split..]);
            assert_eq!(scanner.facts(), &expected, "split {split}");
        }
    }

    #[test]
    fn only_members_of_the_request_itself_count() {
        assert_eq!(
            scan(br#"{"messages":[{"model":"a","stream":true}],"metadata":{"stream_options":{"include_usage":true}},
                "include_usage":true,"stream_options":{"model":"b","stream":true}}"#),
            RequestFacts::default()
        );
        assert_eq!(scan(br#"[{"model":"a"}]"#), RequestFacts::default());
        assert_eq!(scan(br#""model""#), RequestFacts::default());
    }

    #[test]
    fn escapes_are_read_in_keys_and_names() {
        let facts = scan(br#"{"\u006dod\u0065l":"a\u00e9\ud83e\udd80\n\/","str\u0065am":true}"#);
        assert_eq!(facts.model.as_deref(), Some("aé🦀\n/"));
        assert_eq!(facts.stream, Some(true));
        assert_eq!(scan(br#"{"model":"\ud83e!\udd80"}"#).model.as_deref(), Some("\u{FFFD}!\u{FFFD}"));
        assert_eq!(scan(br#"{"model":"\ud83e"}"#).model.as_deref(), Some("\u{FFFD}"));
    }

    #[test]
    fn the_last_of_two_counts_and_a_wrong_type_is_none() {
        assert_eq!(scan(br#"{"stream":true,"stream":false}"#).stream, Some(false));
        assert_eq!(scan(br#"{"stream":true,"stream":"yes"}"#).stream, None);
        assert_eq!(
            scan(br#"{"stream_options":{"include_usage":true},"stream_options":null}"#).include_usage,
            None
        );
        for (body, expected) in [
            (&br#"{"max_tokens":1,"max_completion_tokens":2}"#[..], Some(2)),
            (br#"{"max_completion_tokens":2,"max_tokens":null}"#, Some(2)),
            (br#"{"max_output_tokens":7}"#, Some(7)),
            (br#"{"max_tokens":99999999999}"#, Some(u32::MAX)),
            (br#"{"max_tokens":-1}"#, None),
            (br#"{"max_tokens":1.5}"#, None),
            (br#"{"max_tokens":"3"}"#, None),
        ] {
            assert_eq!(scan(body).max_tokens, expected, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn it_says_when_it_has_seen_enough() {
        let mut scanner = Scanner::new(100);
        assert!(scanner.feed(b""));
        assert!(scanner.feed(b" {\"stream\":true"));
        assert!(!scanner.feed(b"} "));
        assert!(!scanner.feed(b"{\"stream\":false}"));
        assert_eq!(scanner.facts().stream, Some(true));
        assert!(!Scanner::new(100).feed(b"[1]"));
        assert!(!Scanner::new(100).feed(b"{1"));
        let mut scanner = Scanner::new(20);
        assert!(!scanner.feed(br#"{"stream":true,    "stream":false}"#));
        assert_eq!(scanner.facts().stream, Some(true));
    }

    #[test]
    fn limits_hold() {
        let name = |bytes| format!("{{\"model\":\"{}\",\"stream\":true}}", "n".repeat(bytes));
        assert_eq!(scan(name(MODEL_BYTES_MAX).as_bytes()).model.unwrap().len(), MODEL_BYTES_MAX);
        let facts = scan(name(MODEL_BYTES_MAX + 1).as_bytes());
        assert_eq!((facts.model, facts.stream), (None, Some(true)));
        let deep = format!("{{\"a\":{}{},\"stream\":true}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(scan(deep.as_bytes()).stream, Some(true));
        let long_key = format!("{{\"stream{}\":true,\"stream\":false}}", "m".repeat(1000));
        let mut scanner = Scanner::new(1 << 20);
        scanner.feed(long_key.as_bytes());
        assert_eq!(scanner.facts().stream, Some(false));
        assert!(scanner.text.capacity() <= 2 * MODEL_BYTES_MAX);
    }

    #[test]
    fn malformed_bodies_yield_what_was_found() {
        for body in [
            "{\"stream\":true,]",
            "{\"stream\":true,\"a\":}",
            "{\"stream\":true \"b\"",
            "{\"stream\":true,\"\\uZ",
        ] {
            assert_eq!(scan(body.as_bytes()).stream, Some(true), "{body}");
        }
        assert_eq!(scan(b"{\"model\":\"\xFF\",\"stream\":true}").model, None);
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
            from[self.below(from.len() as u64) as usize]
        }

        fn value(&mut self, depth: u32) -> String {
            const SCALARS: [&str; 16] = [
                "true",
                "false",
                "null",
                "0",
                "17",
                "-3",
                "4294967296",
                "1.5e3",
                "\"\"",
                "\"m-1\"",
                "\"a\\\"b\\\\\"",
                "\"\\u00e9\\ud83e\\udd80\"",
                "\"{}[],:\"",
                "\"é→\"",
                "\"\\n\\t\\b\\f\\r\\/\"",
                "12345678901234567890",
            ];
            match self.below(if depth < 3 { 6 } else { 4 }) {
                4 => self.object(depth + 1),
                5 => {
                    let items: Vec<String> = (0..self.below(4)).map(|_| self.value(depth + 1)).collect();
                    format!("[{}]", items.join(self.pick(&[",", " , ", ",\n"])))
                }
                _ => self.pick(&SCALARS).to_owned(),
            }
        }

        fn object(&mut self, depth: u32) -> String {
            const KEYS: [&str; 12] = [
                "model",
                "stream",
                "stream_options",
                "include_usage",
                "background",
                "max_tokens",
                "max_output_tokens",
                "max_completion_tokens",
                "m\\u006fdel",
                "messages",
                "str\\\"eam",
                "a",
            ];
            let members: Vec<String> = (0..self.below(9))
                .map(|_| format!("\"{}\"{}{}", self.pick(&KEYS), self.pick(&[":", " : "]), self.value(depth)))
                .collect();
            format!("{{{}{}}}", self.pick(&["", " "]), members.join(self.pick(&[",", " ,\r\n"])))
        }
    }

    fn naive(body: &str) -> RequestFacts {
        let value: Value = serde_json::from_str(body).unwrap();
        let truth = |value: &Value| value.as_bool();
        let tokens = |name: &str| {
            let number = value.get(name)?.as_number()?;
            number.as_u64().map(|number| u32::try_from(number).unwrap_or(u32::MAX))
        };
        RequestFacts {
            model: value.get("model").and_then(Value::as_str).map(Box::from),
            stream: value.get("stream").and_then(truth),
            include_usage: value.get("stream_options").and_then(|o| o.get("include_usage")).and_then(truth),
            background: value.get("background").and_then(truth),
            max_tokens: tokens("max_completion_tokens")
                .or_else(|| tokens("max_output_tokens"))
                .or_else(|| tokens("max_tokens")),
        }
    }

    #[test]
    fn random_bodies_read_as_a_whole_parser_reads_them_at_any_split() {
        for seed in 1..6000_u64 {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let body = random.object(0);
            let expected = naive(&body);
            let mut scanner = Scanner::new(1 << 20);
            let mut rest = body.as_bytes();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(1 + random.below(rest.len().min(9) as u64) as usize);
                assert_eq!(scanner.feed(piece), !after.is_empty(), "seed {seed}: {body}");
                rest = after;
            }
            assert_eq!(scanner.facts(), &expected, "seed {seed}: {body}");
            assert_eq!(scan(body.as_bytes()), expected, "seed {seed}: {body}");
        }
    }
}
