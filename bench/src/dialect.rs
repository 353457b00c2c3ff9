//! The events of the fake backend, in the dialects that gateways know.

use crate::mark::{Mark, push_number};
use crate::params::Params;

/// How a stream's events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI chat completions.
    Chat,
    /// OpenAI completions.
    Completions,
    /// Anthropic messages.
    Messages,
}

impl Dialect {
    /// The dialect of a path, if it is one that streams.
    pub fn of_path(path: &str) -> Option<Self> {
        match path {
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/messages" => Some(Self::Messages),
            _ => None,
        }
    }

    /// Appends what precedes the first event with text, without chunk framing.
    pub fn begin(self, out: &mut Vec<u8>) {
        if self == Self::Messages {
            out.extend_from_slice(
                concat!(
                    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_fake\",\"type\":\"message\",",
                    "\"role\":\"assistant\",\"model\":\"fake\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,",
                    "\"usage\":{\"input_tokens\":1,\"output_tokens\":1}}}\n\n",
                    "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,",
                    "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
                )
                .as_bytes(),
            );
        }
    }

    /// Appends one event with its mark, filled up to `params.payload` bytes.
    pub fn event(self, params: &Params, mark: &Mark, out: &mut Vec<u8>) {
        let start = out.len();
        match self {
            Self::Chat | Self::Completions => {
                out.extend_from_slice(b"data: {\"id\":\"c");
                push_number(out, params.stream);
                out.extend_from_slice(match self {
                    Self::Chat if mark.sequence == 1 => {
                        b"\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"fake\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"".as_slice()
                    }
                    Self::Chat => {
                        b"\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"fake\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\""
                    }
                    _ => b"\",\"object\":\"text_completion\",\"created\":1,\"model\":\"fake\",\"choices\":[{\"index\":0,\"text\":\"",
                });
            }
            Self::Messages => out.extend_from_slice(
                b"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"",
            ),
        }
        mark.encode(out);
        let last = mark.sequence == params.events;
        let tail: &[u8] = match (self, last) {
            (Self::Chat, false) => b"\"},\"finish_reason\":null}]}\n\n",
            (Self::Chat, true) => b"\"},\"finish_reason\":\"stop\"}]}\n\n",
            (Self::Completions, false) => b"\",\"finish_reason\":null}]}\n\n",
            (Self::Completions, true) => b"\",\"finish_reason\":\"stop\"}]}\n\n",
            (Self::Messages, _) => b"\"}}\n\n",
        };
        let fill = params.payload.saturating_sub(out.len() - start + tail.len());
        out.resize(out.len() + fill, b'x');
        out.extend_from_slice(tail);
    }

    /// Appends what ends a stream that went well.
    pub fn end(self, out: &mut Vec<u8>) {
        out.extend_from_slice(match self {
            Self::Chat | Self::Completions => b"data: [DONE]\n\n".as_slice(),
            Self::Messages => concat!(
                "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
                "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",",
                "\"stop_sequence\":null},\"usage\":{\"output_tokens\":1}}\n\n",
                "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
            )
            .as_bytes(),
        });
    }

    /// Appends an error in the middle of a stream.
    pub fn error(self, out: &mut Vec<u8>) {
        out.extend_from_slice(match self {
            Self::Chat | Self::Completions => {
                b"data: {\"error\":{\"message\":\"asked for\",\"type\":\"server_error\",\"param\":null,\"code\":null}}\n\n".as_slice()
            }
            Self::Messages => {
                b"event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"asked for\"}}\n\n"
            }
        });
    }
}

/// What an event's data means to the checks of the load generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// An event with a mark.
    Marked(Mark),
    /// The end that the dialect promises.
    Done,
    /// An error in the dialect.
    Error,
    /// Anything else: role, usage, ping, a demo's words.
    Other,
}

impl Meaning {
    /// Reads an event's data.
    pub fn of(data: &[u8]) -> Self {
        if data.starts_with(b"{\"error\"") || data.starts_with(b"{\"type\":\"error\"") {
            return Self::Error;
        }
        if data == b"[DONE]" || data.starts_with(b"{\"type\":\"message_stop\"") {
            return Self::Done;
        }
        Mark::decode(data).map_or(Self::Other, Self::Marked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sse::Decoder;

    #[test]
    fn every_dialect_is_understood_and_filled_to_its_size() {
        for dialect in [Dialect::Chat, Dialect::Completions, Dialect::Messages] {
            let params = Params { events: 3, payload: 220, stream: 5, ..Params::default() };
            let mut wire = Vec::new();
            dialect.begin(&mut wire);
            for sequence in 1..=3 {
                let before = wire.len();
                dialect.event(&params, &Mark { stream: 5, sequence, due_ns: 1 << 47, late_ns: 9 }, &mut wire);
                assert_eq!(wire.len() - before, 220);
            }
            dialect.error(&mut wire);
            dialect.end(&mut wire);
            let mut meanings = Vec::new();
            Decoder::default().feed(&wire, |event| {
                let json = event.data == b"[DONE]"
                    || serde_json::from_slice::<serde_json::Value>(event.data).is_ok();
                assert!(json, "{}", String::from_utf8_lossy(event.data));
                meanings.push(Meaning::of(event.data));
            });
            let marks: Vec<u64> = meanings
                .iter()
                .filter_map(
                    |meaning| if let Meaning::Marked(mark) = meaning { Some(mark.sequence) } else { None },
                )
                .collect();
            assert_eq!(marks, [1, 2, 3]);
            assert_eq!(meanings.iter().filter(|&&meaning| meaning == Meaning::Error).count(), 1);
            assert_eq!(meanings.last(), Some(&Meaning::Done));
        }
    }
}
