//! The dialects of token streams: what one event means to each, and how each says heartbeat, error and done. Conventions
//! were read out of the SDKs themselves: openai 3.54 (Python) and 6.49 (Node), @ai-sdk/openai 3.0, anthropic 2.12.

mod peek;

use crate::fault::{Fault, write_json_string, write_number};
use crate::sse::Block;
use peek::{Members, Value};

/// How a client and a backend speak about an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// OpenAI chat completions.
    Chat,
    /// OpenAI text completions (legacy).
    Completions,
    /// OpenAI responses.
    Responses,
    /// Anthropic messages.
    Messages,
    /// Any other event stream: no convention beyond SSE is assumed.
    Plain,
}

/// What one block says about the answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Meaning {
    /// A piece of the answer: counts as token progress.
    Token,
    /// Says something but no token yet or any more (`message_start`, `response.created`, a role-only delta, usage):
    /// progress on the between-token clock only.
    Preamble,
    /// Keeps alive, no progress (ping, comment-only block).
    Heartbeat,
    /// The dialect's end mark.
    Done,
    /// The backend reported a failure in-band.
    Error,
}

impl Dialect {
    /// Every dialect, once.
    pub const ALL: [Dialect; 5] =
        [Dialect::Chat, Dialect::Completions, Dialect::Responses, Dialect::Messages, Dialect::Plain];

    /// The dialect of a request path, told by its end (`/openai/v1/chat/completions` is chat); one trailing slash and
    /// a query are allowed. Any other path is `Plain`.
    pub fn of_path(path: &str) -> Dialect {
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.ends_with("/v1/chat/completions") {
            Dialect::Chat
        } else if path.ends_with("/v1/completions") {
            Dialect::Completions
        } else if path.ends_with("/v1/responses") {
            Dialect::Responses
        } else if path.ends_with("/v1/messages") {
            Dialect::Messages
        } else {
            Dialect::Plain
        }
    }

    /// The word for labels, logs and settings.
    pub const fn name(self) -> &'static str {
        match self {
            Dialect::Chat => "chat",
            Dialect::Completions => "completions",
            Dialect::Responses => "responses",
            Dialect::Messages => "messages",
            Dialect::Plain => "plain",
        }
    }

    /// Whether a model answers here.
    pub const fn is_model_endpoint(self) -> bool {
        !matches!(self, Dialect::Plain)
    }

    /// Whether a stream that ends without an end mark is truncated.
    pub const fn has_end_mark(self) -> bool {
        !matches!(self, Dialect::Plain)
    }

    /// What a block means. Looks at the event name and the first kilobyte of data, and allocates nothing.
    ///
    /// Chat and completions: `[DONE]` counts only as a whole data line, since the text can occur in an answer. An
    /// `error` member that is not empty and stands before `choices` is an error. A chunk is a token if its first choice
    /// carries anything but a role; where that cannot be told, it is a token. Responses: `response.failed` and
    /// `response.incomplete` are end marks as well, and a `[DONE]` that some servers add is not. Plain: every event is
    /// a token, but for `event: error` with an `{"error": ...}` object, which is what [`Dialect::write_error_event`]
    /// writes.
    pub fn meaning(self, block: &Block<'_>) -> Meaning {
        if !block.dispatches {
            // llama.cpp before 2025 wrote failures as a field of their own, `error: {...}`, which no client sees.
            let is_error_field = block.raw.starts_with(b"error:") && self.is_model_endpoint();
            return if is_error_field { Meaning::Error } else { Meaning::Heartbeat };
        }
        match self {
            Dialect::Chat | Dialect::Completions => completion_meaning(block),
            Dialect::Responses => match event_type(block) {
                b"response.completed" | b"response.failed" | b"response.incomplete" => Meaning::Done,
                b"error" => Meaning::Error,
                b"keepalive" | b"ping" => Meaning::Heartbeat,
                name if name.ends_with(b".delta") => Meaning::Token,
                b"" => error_or(block, Meaning::Preamble),
                _ => Meaning::Preamble,
            },
            Dialect::Messages => match event_type(block) {
                b"content_block_delta" => Meaning::Token,
                b"message_stop" => Meaning::Done,
                b"error" => Meaning::Error,
                b"ping" => Meaning::Heartbeat,
                b"" => error_or(block, Meaning::Preamble),
                _ => Meaning::Preamble,
            },
            Dialect::Plain if block.event() == Some(b"error") => error_or(block, Meaning::Token),
            Dialect::Plain => Meaning::Token,
        }
    }

    /// As [`Dialect::meaning`], for a stream that has brought its first token: what is neither an end nor an error counts as
    /// a token, told without a look at its members.
    pub fn meaning_after_first_token(self, block: &Block<'_>) -> Meaning {
        match self {
            Dialect::Chat | Dialect::Completions if peek::is_plain_chunk(block.raw) => Meaning::Token,
            _ => self.meaning(block),
        }
    }

    /// The `sequence_number` of a responses event, for [`Dialect::write_error_event_numbered`]; `None` in other
    /// dialects or where it does not stand in front.
    pub fn sequence_number(self, block: &Block<'_>) -> Option<u64> {
        if self != Dialect::Responses {
            return None;
        }
        match Members::of(block.data_lines().next()?)?.find(b"sequence_number")? {
            Value::Scalar(digits) => std::str::from_utf8(digits).ok()?.parse().ok(),
            _ => None,
        }
    }

    /// A complete SSE block that keeps a connection alive and that no SDK shows to its user. A comment where the
    /// dialect allows nothing better.
    ///
    /// Not for OpenAI streams that carry `id` lines: see [`Dialect::heartbeat_among_ids`].
    pub const fn heartbeat(self) -> &'static [u8] {
        match self {
            Dialect::Messages => b"event: ping\ndata: {\"type\": \"ping\"}\n\n",
            _ => b": keep-alive\n\n",
        }
    }

    /// The heartbeat for a stream in which a block with an `id` line has been sent: for the OpenAI dialects a comment
    /// line without a blank line, which becomes the first line of the next block.
    ///
    /// The Python SDK of OpenAI never forgets the last id, takes every blank line after it for an event, and raises
    /// `JSONDecodeError` on its empty data. For the same reason a comment-only block of the backend must not be passed
    /// on in such a stream.
    pub const fn heartbeat_among_ids(self) -> &'static [u8] {
        match self {
            Dialect::Chat | Dialect::Completions | Dialect::Responses => b": keep-alive\n",
            Dialect::Messages | Dialect::Plain => self.heartbeat(),
        }
    }

    /// Appends a complete in-band error block (SSE), on which this dialect's SDKs raise. No end mark may follow it.
    pub fn write_error_event(self, fault: &Fault, out: &mut Vec<u8>) {
        self.write_error_event_numbered(fault, None, out);
    }

    /// Like [`Dialect::write_error_event`], with the number that a responses event must carry: one more than the last
    /// one the client was sent, 0 if that is not known.
    pub fn write_error_event_numbered(self, fault: &Fault, sequence_number: Option<u64>, out: &mut Vec<u8>) {
        match self {
            Dialect::Chat | Dialect::Completions => {
                out.extend_from_slice(b"data: ");
                write_openai_body(fault, out);
            }
            Dialect::Responses => {
                // The members at the top are the documented event (ResponseErrorEvent). Both SDKs of OpenAI raise only
                // on an `error` member, and hand out the event as an ordinary one without it.
                out.extend_from_slice(b"event: error\ndata: {\"type\":\"error\",\"sequence_number\":");
                write_number(out, sequence_number.unwrap_or(0));
                out.extend_from_slice(b",\"code\":");
                write_json_string(out, fault.code);
                out.extend_from_slice(b",\"message\":");
                write_json_string(out, fault.message);
                out.extend_from_slice(b",\"param\":null,\"error\":");
                write_openai_error(fault, out);
                out.push(b'}');
            }
            Dialect::Messages => {
                out.extend_from_slice(b"event: error\ndata: ");
                write_anthropic_body(fault, out);
            }
            Dialect::Plain => {
                out.extend_from_slice(b"event: error\ndata: ");
                write_openai_body(fault, out);
            }
        }
        out.extend_from_slice(b"\n\n");
    }

    /// Appends the JSON body of an HTTP error answer.
    pub fn write_error_body(self, fault: &Fault, out: &mut Vec<u8>) {
        match self {
            Dialect::Messages => write_anthropic_body(fault, out),
            _ => write_openai_body(fault, out),
        }
    }
}

fn completion_meaning(block: &Block<'_>) -> Meaning {
    if block.event() == Some(b"error") {
        return Meaning::Error;
    }
    let Some(data) = block.data_lines().next() else { return Meaning::Heartbeat };
    if data == b"[DONE]" && block.data_is(b"[DONE]") {
        return Meaning::Done;
    }
    let Some(members) = peek::members_from_choices(data).or_else(|| Members::of(data)) else {
        return Meaning::Token;
    };
    for (key, value) in members {
        match key {
            b"error" if !value.is_empty() => return Meaning::Error,
            b"choices" if value.is_empty() => return Meaning::Preamble,
            b"choices" => return value.first_object().map_or(Meaning::Token, choice_meaning),
            _ => {}
        }
    }
    Meaning::Token
}

/// Of one choice: a token unless all that it says is the role, or nothing.
fn choice_meaning(choice: Members<'_>) -> Meaning {
    for (key, value) in choice {
        let is_empty = match key {
            b"delta" => value
                .members()
                .is_some_and(|mut delta| delta.all(|(key, value)| key == b"role" || value.is_empty())),
            b"text" => value.is_empty(),
            _ => continue,
        };
        return if is_empty { Meaning::Preamble } else { Meaning::Token };
    }
    Meaning::Token
}

/// The event's name, out of the `event` line or else the data's `type`; empty if it has none.
pub(crate) fn event_type<'a>(block: &Block<'a>) -> &'a [u8] {
    match block.event() {
        Some(name) if !name.is_empty() && name != b"message" => name,
        _ => {
            match block.data_lines().next().and_then(Members::of).and_then(|members| members.find(b"type")) {
                Some(Value::Text(name)) => name,
                _ => b"",
            }
        }
    }
}

/// A member of a data line's object that is a whole number, wherever it stands.
pub(crate) fn number_member(data: &[u8], name: &[u8]) -> Option<u64> {
    match Members::of_whole(data)?.find(name)? {
        Value::Scalar(digits) => std::str::from_utf8(digits).ok()?.parse().ok(),
        _ => None,
    }
}

/// `Error` if the data is an object with an `error` that is not empty.
fn error_or(block: &Block<'_>, otherwise: Meaning) -> Meaning {
    let error = block.data_lines().next().and_then(Members::of).and_then(|members| members.find(b"error"));
    if error.is_some_and(|value| !value.is_empty()) { Meaning::Error } else { otherwise }
}

fn write_openai_body(fault: &Fault, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"error\":");
    write_openai_error(fault, out);
    out.push(b'}');
}

fn write_openai_error(fault: &Fault, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"message\":");
    write_json_string(out, fault.message);
    out.extend_from_slice(b",\"type\":");
    write_json_string(out, fault.openai_type());
    out.extend_from_slice(b",\"param\":null,\"code\":");
    write_json_string(out, fault.code);
    out.push(b'}');
}

fn write_anthropic_body(fault: &Fault, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":\"error\",\"error\":{\"type\":");
    write_json_string(out, fault.anthropic_type());
    out.extend_from_slice(b",\"message\":");
    write_json_string(out, fault.message);
    // Not Anthropic's, whose types are coarse: the stable name for programs. SDKs pass unknown members on.
    out.extend_from_slice(b",\"code\":");
    write_json_string(out, fault.code);
    out.extend_from_slice(b"}}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Culprit;
    use crate::sse::Decoder;
    use serde_json::{Value as Json, json};

    const FAULT: Fault = Fault {
        status: 503,
        code: "upstream_reset",
        message: "The backend \"a\" closed the connection; a retry may help.",
        culprit: Culprit::Upstream,
        retry_helps: true,
    };

    fn with_block<T>(stream: &[u8], look: impl FnOnce(&Block<'_>) -> T) -> T {
        let mut decoder = Decoder::new(1 << 20);
        let mut input = stream;
        let seen = look(&decoder.next(&mut input).unwrap().expect("a whole block"));
        assert!(input.is_empty(), "one block only");
        seen
    }

    fn meaning(dialect: Dialect, stream: &str) -> Meaning {
        with_block(stream.as_bytes(), |block| {
            let meaning = dialect.meaning(block);
            // The short cut knows no preambles; everything else it must see alike.
            match (meaning, dialect.meaning_after_first_token(block)) {
                (Meaning::Preamble, Meaning::Token | Meaning::Preamble) => {}
                (whole, short_cut) => assert_eq!(whole, short_cut, "{dialect:?} {stream}"),
            }
            meaning
        })
    }

    #[test]
    fn a_path_names_its_dialect_by_its_end() {
        for (path, dialect) in [
            ("/v1/chat/completions", Dialect::Chat),
            ("/v1/chat/completions/", Dialect::Chat),
            ("/openai/v1/chat/completions?a=/v1/messages", Dialect::Chat),
            ("/v1/completions", Dialect::Completions),
            ("/v1/responses", Dialect::Responses),
            ("/v1/messages", Dialect::Messages),
            ("/v1/messages/count_tokens", Dialect::Plain),
            ("/v1/responses/resp_1", Dialect::Plain),
            ("/v1/chat/completions//", Dialect::Plain),
            ("/chat/completions", Dialect::Plain),
            ("/", Dialect::Plain),
            ("", Dialect::Plain),
        ] {
            assert_eq!(Dialect::of_path(path), dialect, "{path}");
        }
    }

    #[test]
    fn chat_events_mean_what_backends_mean_by_them() {
        use Meaning::*;
        for (stream, expected) in [
            // OpenAI, vLLM, llama.cpp, Ollama
            (
                r#"data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null}}]}"#,
                Preamble,
            ),
            // Nested members of that name are something else.
            (r#"data: {"usage":{"choices":[]},"choices":[{"delta":{"content":"x"}}]}"#, Token),
            (r#"data: {"kind":"choices","error":{"message":"x"}}"#, Error),
            (
                r#"data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}"#,
                Preamble,
            ),
            (
                r#"data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"}}]}"#,
                Token,
            ),
            (r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":" [DONE]"}}]}"#, Token),
            (r#"data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}"#, Token),
            (r#"data: {"choices":[{"index":0,"delta":{"content":"","reasoning_content":"hm"}}]}"#, Token),
            (r#"data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}]}"#, Preamble),
            (r#"data: {"id":"c","choices":[],"usage":{"total_tokens":9}}"#, Preamble),
            ("data: [DONE]", Done),
            ("data:[DONE]", Done),
            ("data: [DONE] ", Token),
            (r#"data: {"error":{"message":"m"}}"#, Error),
            (r#"data:  { "error" : "text"}"#, Error),
            (r#"data: {"id":"c","error":{"code":502},"choices":[{"delta":{"content":""}}]}"#, Error),
            (r#"data: {"error":null,"choices":[{"delta":{"content":"a"}}]}"#, Token),
            ("event: error\ndata: oops", Error),
            ("error: {\"code\":500}", Error),
            (": OPENROUTER PROCESSING", Heartbeat),
            ("retry: 5", Heartbeat),
            ("data: not json", Token),
            ("data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"error\\\":1}\"}}]}", Token),
        ] {
            assert_eq!(meaning(Dialect::Chat, &format!("{stream}\n\n")), expected, "{stream}");
        }
        assert_eq!(
            meaning(Dialect::Completions, "data: {\"choices\":[{\"text\":\"a\",\"index\":0}]}\n\n"),
            Token
        );
        assert_eq!(
            meaning(Dialect::Completions, "data: {\"choices\":[{\"index\":0,\"text\":\"\"}]}\n\n"),
            Preamble
        );
        assert_eq!(meaning(Dialect::Completions, "data: [DONE]\n\n"), Done);
    }

    #[test]
    fn a_long_event_is_judged_by_its_front() {
        let text = "x".repeat(100_000);
        let stream = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
        assert_eq!(meaning(Dialect::Chat, &stream), Meaning::Token);
        let stream = format!("data: {{\"id\":\"{text}\",\"error\":{{}}}}\n\n");
        assert_eq!(meaning(Dialect::Chat, &stream), Meaning::Token);
    }

    #[test]
    fn responses_events_are_told_by_name_or_type() {
        use Meaning::*;
        for (name, expected) in [
            ("response.created", Preamble),
            ("response.output_item.added", Preamble),
            ("response.output_text.delta", Token),
            ("response.reasoning_summary_text.delta", Token),
            ("response.output_text.done", Preamble),
            ("response.completed", Done),
            ("response.failed", Done),
            ("response.incomplete", Done),
            ("error", Error),
            ("keepalive", Heartbeat),
        ] {
            let both = format!("event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":1}}\n\n");
            let only_data = format!("data: {{\"sequence_number\":1, \"type\" : \"{name}\"}}\n\n");
            assert_eq!(meaning(Dialect::Responses, &both), expected, "{name}");
            assert_eq!(meaning(Dialect::Responses, &only_data), expected, "{name}");
        }
        assert_eq!(meaning(Dialect::Responses, "data: [DONE]\n\n"), Preamble);
        assert_eq!(meaning(Dialect::Responses, "data: {\"error\":{\"message\":\"m\"}}\n\n"), Error);
        let text = r#"data: {"type":"response.output_text.delta","delta":"response.completed"}"#;
        assert_eq!(meaning(Dialect::Responses, &format!("{text}\n\n")), Token);
    }

    #[test]
    fn messages_events_are_told_by_name_or_type() {
        use Meaning::*;
        for (name, expected) in [
            ("message_start", Preamble),
            ("content_block_start", Preamble),
            ("content_block_delta", Token),
            ("content_block_stop", Preamble),
            ("message_delta", Preamble),
            ("message_stop", Done),
            ("ping", Heartbeat),
            ("error", Error),
            ("something_new", Preamble),
        ] {
            let both = format!("event: {name}\ndata: {{\"type\": \"{name}\"}}\n\n");
            assert_eq!(meaning(Dialect::Messages, &both), expected, "{name}");
            assert_eq!(meaning(Dialect::Messages, &format!("data: {{\"type\":\"{name}\"}}\n\n")), expected);
        }
        assert_eq!(meaning(Dialect::Messages, "data: [DONE]\n\n"), Preamble);
        assert_eq!(meaning(Dialect::Messages, ": hello\n\n"), Heartbeat);
    }

    #[test]
    fn plain_streams_have_tokens_and_our_own_error() {
        assert_eq!(meaning(Dialect::Plain, "data: [DONE]\n\n"), Meaning::Token);
        assert_eq!(meaning(Dialect::Plain, "event: error\ndata: a topic of that name\n\n"), Meaning::Token);
        assert_eq!(
            meaning(Dialect::Plain, "event: error\ndata: {\"error\":{\"code\":\"c\"}}\n\n"),
            Meaning::Error
        );
        assert_eq!(meaning(Dialect::Plain, ": c\n\n"), Meaning::Heartbeat);
        assert_eq!(meaning(Dialect::Plain, "error: c\n\n"), Meaning::Heartbeat);
    }

    #[test]
    fn what_a_dialect_writes_it_understands() {
        for dialect in Dialect::ALL {
            with_block(dialect.heartbeat(), |block| {
                assert_eq!(dialect.meaning(block), Meaning::Heartbeat, "{dialect:?}");
            });
            let mut event = Vec::new();
            dialect.write_error_event(&FAULT, &mut event);
            with_block(&event, |block| assert_eq!(dialect.meaning(block), Meaning::Error, "{dialect:?}"));
            let after_heartbeat = [dialect.heartbeat_among_ids(), b"id: 3\ndata: [DONE]\n\n"].concat();
            let mut decoder = Decoder::new(1000);
            let mut input = &after_heartbeat[..];
            while let Some(block) = decoder.next(&mut input).unwrap() {
                assert!(block.has_id == block.data_is(b"[DONE]"));
            }
        }
    }

    fn data_of(event: &[u8]) -> Json {
        with_block(event, |block| serde_json::from_slice(block.data_lines().next().unwrap()).unwrap())
    }

    #[test]
    fn errors_have_the_shapes_that_sdks_expect() {
        let openai =
            json!({"message": FAULT.message, "type": "overloaded_error", "param": null, "code": FAULT.code});
        for dialect in Dialect::ALL {
            let (mut event, mut body) = (Vec::new(), Vec::new());
            dialect.write_error_event_numbered(&FAULT, Some(42), &mut event);
            dialect.write_error_body(&FAULT, &mut body);
            let (data, body): (Json, Json) = (data_of(&event), serde_json::from_slice(&body).unwrap());
            match dialect {
                Dialect::Chat | Dialect::Completions | Dialect::Plain => {
                    assert_eq!(data, json!({"error": openai}));
                    assert_eq!(body, data);
                }
                Dialect::Responses => {
                    let expected = json!({"type": "error", "sequence_number": 42, "code": FAULT.code,
                        "message": FAULT.message, "param": null, "error": openai});
                    assert_eq!(data, expected);
                    assert_eq!(body, json!({"error": openai}));
                    with_block(&event, |block| assert_eq!(dialect.sequence_number(block), Some(42)));
                }
                Dialect::Messages => {
                    assert_eq!(
                        body,
                        json!({"type": "error", "error": {"type": "overloaded_error",
                        "message": FAULT.message, "code": FAULT.code}})
                    );
                    assert_eq!(body, data);
                }
            }
        }
    }
}
