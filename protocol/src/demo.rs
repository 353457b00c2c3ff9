//! A built-in model that answers with believable prose in every dialect, so that tokenring can be tried and measured
//! without a backend. Pure: the same seed gives the same bytes, and the caller's timers pace them.

mod prose;

use crate::dialect::Dialect;
use crate::facts::RequestFacts;
use crate::fault::{write_json_string, write_json_text, write_number};
use prose::{Prose, next_random};

/// The model's name, unless the request names another.
const MODEL_NAME: &str = "tokenring-demo";
/// What usage says about the prompt, which the demo model does not read.
const PROMPT_TOKENS: u64 = 8;
/// What an answer ends with that is cut inside a sentence.
const CUT_MARK: &str = "…";

/// Pace and length of the demo model's answers.
#[derive(Clone, Debug, PartialEq)]
pub struct DemoSettings {
    /// Tokens per second after the first, 1 to 100000.
    pub tokens_per_s: u32,
    /// Milliseconds until the first token, 0 to 600000.
    pub first_token_ms: u32,
    /// Tokens of an answer, 1 to 100000; the request's own maximum may cut it shorter.
    pub tokens: u32,
}

impl Default for DemoSettings {
    fn default() -> Self {
        DemoSettings { tokens_per_s: 50, first_token_ms: 200, tokens: 120 }
    }
}

impl DemoSettings {
    /// These settings with what a URL's query overrides: `tokens_per_s`, `first_token_ms`, `tokens`. Other parameters
    /// are left alone; of two with the same name the last counts.
    ///
    /// # Errors
    /// A sentence that names the parameter and its range, when a value is not a whole number within it.
    pub fn with_query(&self, query: Option<&str>) -> Result<Self, String> {
        let mut settings = self.clone();
        for parameter in query.unwrap_or_default().split('&') {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let (setting, least, most) = match name {
                "tokens_per_s" => (&mut settings.tokens_per_s, 1, 100_000),
                "first_token_ms" => (&mut settings.first_token_ms, 0, 600_000),
                "tokens" => (&mut settings.tokens, 1, 100_000),
                _ => continue,
            };
            let digits = Some(value).filter(|value| value.bytes().all(|byte| byte.is_ascii_digit()));
            *setting = digits
                .and_then(|digits| digits.parse().ok())
                .filter(|number| (least..=most).contains(number))
                .ok_or_else(|| {
                    format!("query parameter {name}: expected a whole number from {least} to {most}")
                })?;
        }
        Ok(settings)
    }
}

/// One answer of the demo model. Commands, in order: [`DemoModel::write_preamble`] once, then
/// [`DemoModel::write_next`] until it returns false; or [`DemoModel::whole_answer`] alone.
#[derive(Debug)]
pub struct DemoModel {
    dialect: Dialect,
    settings: DemoSettings,
    /// Where the text begins, to write it once more at the end.
    beginning: Prose,
    prose: Prose,
    /// Tokens of the whole answer, and those written: `0 <= written <= tokens`.
    tokens: u32,
    written: u32,
    /// The request's maximum cuts the answer short.
    cut_by_client: bool,
    include_usage: bool,
    max_tokens: Option<u32>,
    unix_time_s: u64,
    /// Next `sequence_number` of the responses dialect.
    sequence_number: u64,
    ended: bool,
    /// The model's name as a JSON string.
    model: Vec<u8>,
    /// The part of the answer's ids that makes them unique.
    unique: String,
    /// What every chunk of this answer begins with.
    chunk_front: Vec<u8>,
    block: Vec<u8>,
}

impl DemoModel {
    /// An answer to a request of which `facts` are known. `seed` decides text and ids.
    pub fn new(
        dialect: Dialect,
        settings: DemoSettings,
        facts: &RequestFacts,
        seed: u64,
        unix_time_s: u64,
    ) -> Self {
        let tokens = facts.max_tokens.map_or(settings.tokens, |max| max.min(settings.tokens));
        let mut model = Vec::new();
        write_json_string(&mut model, facts.model.as_deref().unwrap_or(MODEL_NAME));
        let mut state = seed;
        let prose = Prose::new(next_random(&mut state));
        let unique = format!("{:016x}{:08x}", next_random(&mut state), next_random(&mut state) >> 32);
        let mut demo = DemoModel {
            dialect,
            tokens,
            cut_by_client: tokens < settings.tokens,
            settings,
            beginning: prose,
            prose,
            written: 0,
            include_usage: facts.include_usage == Some(true),
            max_tokens: facts.max_tokens,
            unix_time_s,
            sequence_number: 0,
            ended: false,
            model,
            unique,
            chunk_front: Vec::new(),
            block: Vec::with_capacity(512),
        };
        demo.block.extend_from_slice(b"data: ");
        match dialect {
            Dialect::Chat => demo.write_front("chatcmpl-", "chat.completion.chunk"),
            Dialect::Completions => demo.write_front("cmpl-", "text_completion"),
            _ => {}
        }
        demo.chunk_front = demo.block.clone();
        demo
    }

    /// Pace and length.
    pub fn settings(&self) -> &DemoSettings {
        &self.settings
    }

    /// The blocks that precede the first token: role delta, `message_start`, `response.created` and so on; none in
    /// the completions and plain dialects.
    pub fn write_preamble(&mut self, out: &mut dyn FnMut(&[u8])) {
        match self.dialect {
            Dialect::Chat => {
                self.begin_chunk();
                self.put(r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#);
                self.end_chunk(out);
            }
            Dialect::Messages => {
                self.begin_event("message_start");
                self.put(r#","message":"#);
                self.write_message(false);
                self.end_event(out);
                self.begin_event("content_block_start");
                self.put(r#","index":0,"content_block":{"type":"text","text":""}"#);
                self.end_event(out);
                self.begin_event("ping");
                self.end_event(out);
            }
            Dialect::Responses => {
                for name in ["response.created", "response.in_progress"] {
                    self.begin_event(name);
                    self.put(r#","response":"#);
                    self.write_response(false);
                    self.end_event(out);
                }
                self.begin_event("response.output_item.added");
                self.put(r#","output_index":0,"item":"#);
                self.write_item(false);
                self.end_event(out);
                self.begin_event("response.content_part.added");
                self.put_item_place();
                self.put(r#","part":"#);
                self.write_part(false);
                self.end_event(out);
            }
            Dialect::Completions | Dialect::Plain => {}
        }
    }

    /// The next token's block, and with the last one the blocks that end the answer: finish, usage where it was asked
    /// for, end mark. False when these were written; there are as many calls as tokens.
    pub fn write_next(&mut self, out: &mut dyn FnMut(&[u8])) -> bool {
        if self.ended {
            return false;
        }
        if self.written < self.tokens {
            self.write_token(out);
        }
        if self.written == self.tokens {
            self.ended = true;
            self.write_end(out);
        }
        !self.ended
    }

    /// The whole non-streaming JSON answer.
    pub fn whole_answer(&mut self) -> Vec<u8> {
        self.block.clear();
        self.written = self.tokens;
        match self.dialect {
            Dialect::Chat => {
                self.write_front("chatcmpl-", "chat.completion");
                self.put(r#"{"index":0,"message":{"role":"assistant","content":"#);
                self.write_text();
                self.put(r#","refusal":null},"logprobs":null,"finish_reason":"#);
                self.put_finish_reason();
                self.put("}],");
                self.write_openai_usage();
                self.put("}");
            }
            Dialect::Completions => {
                self.write_front("cmpl-", "text_completion");
                self.put(r#"{"index":0,"text":"#);
                self.write_text();
                self.put(r#","logprobs":null,"finish_reason":"#);
                self.put_finish_reason();
                self.put("}],");
                self.write_openai_usage();
                self.put("}");
            }
            Dialect::Responses => self.write_response(true),
            Dialect::Messages => self.write_message(true),
            Dialect::Plain => {
                self.put(r#"{"text":"#);
                self.write_text();
                self.put(r#","tokens":"#);
                write_number(&mut self.block, u64::from(self.tokens));
                self.put("}");
            }
        }
        self.ended = true;
        std::mem::take(&mut self.block)
    }

    fn write_token(&mut self, out: &mut dyn FnMut(&[u8])) {
        match self.dialect {
            Dialect::Chat => {
                self.begin_chunk();
                self.put(r#"{"index":0,"delta":{"content":"#);
                self.write_piece();
                self.put(r#"},"logprobs":null,"finish_reason":null}"#);
                self.end_chunk(out);
            }
            Dialect::Completions => {
                self.begin_chunk();
                self.put(r#"{"index":0,"text":"#);
                self.write_piece();
                self.put(r#","logprobs":null,"finish_reason":null}"#);
                self.end_chunk(out);
            }
            Dialect::Responses => {
                self.begin_event("response.output_text.delta");
                self.put_item_place();
                self.put(r#","delta":"#);
                self.write_piece();
                self.put(r#","logprobs":[]"#);
                self.end_event(out);
            }
            Dialect::Messages => {
                self.begin_event("content_block_delta");
                self.put(r#","index":0,"delta":{"type":"text_delta","text":"#);
                self.write_piece();
                self.put("}");
                self.end_event(out);
            }
            Dialect::Plain => {
                self.begin_chunk();
                self.put(r#"{"token":"#);
                self.write_piece();
                self.put("}\n\n");
                out(&self.block);
            }
        }
    }

    fn write_end(&mut self, out: &mut dyn FnMut(&[u8])) {
        match self.dialect {
            Dialect::Chat | Dialect::Completions => {
                self.begin_chunk();
                self.put(match self.dialect {
                    Dialect::Chat => r#"{"index":0,"delta":{},"logprobs":null,"finish_reason":"#,
                    _ => r#"{"index":0,"text":"","logprobs":null,"finish_reason":"#,
                });
                self.put_finish_reason();
                self.put("}");
                self.end_chunk(out);
                if self.include_usage {
                    self.begin_chunk();
                    self.put("],");
                    self.write_openai_usage();
                    self.put("}\n\n");
                    out(&self.block);
                }
                out(b"data: [DONE]\n\n");
            }
            Dialect::Responses => {
                self.begin_event("response.output_text.done");
                self.put_item_place();
                self.put(r#","text":"#);
                self.write_text();
                self.put(r#","logprobs":[]"#);
                self.end_event(out);
                self.begin_event("response.content_part.done");
                self.put_item_place();
                self.put(r#","part":"#);
                self.write_part(true);
                self.end_event(out);
                self.begin_event("response.output_item.done");
                self.put(r#","output_index":0,"item":"#);
                self.write_item(true);
                self.end_event(out);
                self.begin_event(if self.cut_by_client {
                    "response.incomplete"
                } else {
                    "response.completed"
                });
                self.put(r#","response":"#);
                self.write_response(true);
                self.end_event(out);
            }
            Dialect::Messages => {
                self.begin_event("content_block_stop");
                self.put(r#","index":0"#);
                self.end_event(out);
                self.begin_event("message_delta");
                self.put(r#","delta":{"stop_reason":"#);
                self.put_finish_reason();
                self.put(r#","stop_sequence":null},"usage":{"output_tokens":"#);
                write_number(&mut self.block, u64::from(self.written));
                self.put("}");
                self.end_event(out);
                self.begin_event("message_stop");
                self.end_event(out);
            }
            Dialect::Plain => {
                self.block.clear();
                self.put("event: done\ndata: {\"tokens\":");
                write_number(&mut self.block, u64::from(self.written));
                self.put("}\n\n");
                out(&self.block);
            }
        }
    }

    fn put(&mut self, text: &str) {
        self.block.extend_from_slice(text.as_bytes());
    }

    /// The front of a chat or completions object, up to the first choice.
    fn write_front(&mut self, id_prefix: &str, object: &str) {
        self.put(r#"{"id":""#);
        self.put(id_prefix);
        self.block.extend_from_slice(self.unique.as_bytes());
        self.put(r#"","object":""#);
        self.put(object);
        self.put(r#"","created":"#);
        write_number(&mut self.block, self.unix_time_s);
        self.put(r#","model":"#);
        self.block.extend_from_slice(&self.model);
        self.put(r#","system_fingerprint":"fp_tokenring","choices":["#);
    }

    fn begin_chunk(&mut self) {
        self.block.clear();
        self.block.extend_from_slice(&self.chunk_front);
    }

    fn end_chunk(&mut self, out: &mut dyn FnMut(&[u8])) {
        // OpenAI: asked for usage, every chunk has the member, null but in the last.
        self.put(if self.include_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" });
        out(&self.block);
    }

    /// Begins an event of the responses or messages dialect, whose data tells its type once more.
    fn begin_event(&mut self, name: &str) {
        self.block.clear();
        self.put("event: ");
        self.put(name);
        self.put("\ndata: {\"type\":\"");
        self.put(name);
        self.put("\"");
        if self.dialect == Dialect::Responses {
            self.put(r#","sequence_number":"#);
            write_number(&mut self.block, self.sequence_number);
            self.sequence_number += 1;
        }
    }

    fn end_event(&mut self, out: &mut dyn FnMut(&[u8])) {
        self.put("}\n\n");
        out(&self.block);
    }

    /// The next word piece as a JSON string.
    fn write_piece(&mut self) {
        self.block.push(b'"');
        self.written += 1;
        let ends = self.written == self.tokens;
        write_next_piece(&mut self.prose, ends && !self.cut_by_client, &mut self.block);
        self.block.push(b'"');
    }

    /// The text written so far as one JSON string: the whole answer at its end.
    fn write_text(&mut self) {
        self.block.push(b'"');
        let mut prose = self.beginning;
        for token in 1..=self.written {
            write_next_piece(&mut prose, token == self.tokens && !self.cut_by_client, &mut self.block);
        }
        self.block.push(b'"');
    }

    fn put_finish_reason(&mut self) {
        self.put(match (self.dialect, self.cut_by_client) {
            (Dialect::Messages, true) => r#""max_tokens""#,
            (Dialect::Messages, false) => r#""end_turn""#,
            (_, true) => r#""length""#,
            (_, false) => r#""stop""#,
        });
    }

    fn write_openai_usage(&mut self) {
        let written = u64::from(self.written);
        self.put(r#""usage":{"prompt_tokens":"#);
        write_number(&mut self.block, PROMPT_TOKENS);
        self.put(r#","completion_tokens":"#);
        write_number(&mut self.block, written);
        self.put(r#","total_tokens":"#);
        write_number(&mut self.block, PROMPT_TOKENS + written);
        self.put("}");
    }

    /// The messages dialect's message object: at the start without content, in the end with all.
    fn write_message(&mut self, ended: bool) {
        self.put(r#"{"id":"msg_"#);
        self.block.extend_from_slice(self.unique.as_bytes());
        self.put(r#"","type":"message","role":"assistant","model":"#);
        self.block.extend_from_slice(&self.model);
        if ended {
            self.put(r#","content":[{"type":"text","text":"#);
            self.write_text();
            self.put(r#"}],"stop_reason":"#);
            self.put_finish_reason();
        } else {
            self.put(r#","content":[],"stop_reason":null"#);
        }
        self.put(r#","stop_sequence":null,"usage":{"input_tokens":"#);
        write_number(&mut self.block, PROMPT_TOKENS);
        self.put(r#","cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":"#);
        // Anthropic counts one token at the start already.
        write_number(&mut self.block, if ended { u64::from(self.written) } else { 1 });
        self.put("}}");
    }

    fn put_item_place(&mut self) {
        self.put(r#","item_id":"msg_"#);
        self.block.extend_from_slice(self.unique.as_bytes());
        self.put(r#"","output_index":0,"content_index":0"#);
    }

    fn write_part(&mut self, ended: bool) {
        self.put(r#"{"type":"output_text","annotations":[],"logprobs":[],"text":"#);
        if ended {
            self.write_text()
        } else {
            self.put(r#""""#)
        }
        self.put("}");
    }

    fn write_item(&mut self, ended: bool) {
        self.put(r#"{"id":"msg_"#);
        self.block.extend_from_slice(self.unique.as_bytes());
        self.put(r#"","type":"message","status":"#);
        self.put_status(ended);
        self.put(r#","role":"assistant","content":["#);
        if ended {
            self.write_part(true);
        }
        self.put("]}");
    }

    fn put_status(&mut self, ended: bool) {
        self.put(match (ended, self.cut_by_client) {
            (false, _) => r#""in_progress""#,
            (true, true) => r#""incomplete""#,
            (true, false) => r#""completed""#,
        });
    }

    /// The responses dialect's response object.
    fn write_response(&mut self, ended: bool) {
        self.put(r#"{"id":"resp_"#);
        self.block.extend_from_slice(self.unique.as_bytes());
        self.put(r#"","object":"response","created_at":"#);
        write_number(&mut self.block, self.unix_time_s);
        self.put(r#","status":"#);
        self.put_status(ended);
        self.put(r#","background":false,"error":null,"incomplete_details":"#);
        let is_cut = ended && self.cut_by_client;
        self.put(if is_cut { r#"{"reason":"max_output_tokens"}"# } else { "null" });
        self.put(r#","instructions":null,"max_output_tokens":"#);
        match self.max_tokens {
            Some(max) => write_number(&mut self.block, u64::from(max)),
            None => self.put("null"),
        }
        self.put(r#","model":"#);
        self.block.extend_from_slice(&self.model);
        self.put(r#","output":["#);
        if ended {
            self.write_item(true);
        }
        self.put(concat!(
            r#"],"parallel_tool_calls":true,"previous_response_id":null,"reasoning":{"effort":null,"summary":null},"#,
            r#""store":false,"temperature":1.0,"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":[],"#,
            r#""top_p":1.0,"truncation":"disabled","user":null,"metadata":{},"usage":"#
        ));
        if ended {
            let written = u64::from(self.written);
            self.put(r#"{"input_tokens":"#);
            write_number(&mut self.block, PROMPT_TOKENS);
            self.put(
                r#","input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":"#,
            );
            write_number(&mut self.block, written);
            self.put(r#","output_tokens_details":{"reasoning_tokens":0},"total_tokens":"#);
            write_number(&mut self.block, PROMPT_TOKENS + written);
            self.put("}}");
        } else {
            self.put("null}");
        }
    }
}

/// One piece, escaped. The last piece of an answer that stops by itself inside a sentence says so with an ellipsis.
fn write_next_piece(prose: &mut Prose, is_last: bool, out: &mut Vec<u8>) {
    let (lead, piece) = prose.next_piece();
    write_json_text(out, lead);
    if is_last && !prose.is_at_sentence_end() {
        write_json_text(out, CUT_MARK);
    } else {
        write_json_text(out, piece);
    }
}

/// The body of `GET /v1/models`: the demo model, in the list format of OpenAI with the members that Anthropic's adds.
pub fn models_json(unix_time_s: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |text: &str| out.extend_from_slice(text.as_bytes());
    put(r#"{"object":"list","data":[{"id":""#);
    put(MODEL_NAME);
    put(r#"","object":"model","created":"#);
    put(&unix_time_s.to_string());
    put(
        r#","owned_by":"tokenring","type":"model","display_name":"tokenring demo"}],"has_more":false,"first_id":""#,
    );
    put(MODEL_NAME);
    put(r#"","last_id":""#);
    put(MODEL_NAME);
    put(r#""}"#);
    out
}

#[cfg(test)]
mod tests;
