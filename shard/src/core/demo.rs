//! The built-in demo model: a producer inside the shard, paced by the timer wheel, for routes without a backend.

use super::Shard;
use super::relay::relay_event;
use super::stream::Demo;
use crate::io::Io;
use protocol::demo::{DemoModel, DemoSettings, models_json};
use protocol::facts::Background;
use protocol::http::{Refusal, RequestHead};
use protocol::limits::DEMO_TOKENS_PER_TURN_MAX;
use protocol::phase::{End, Phase, Step};
use protocol::slots::Key;
use protocol::sse::Block;

impl<I: Io> Shard<I> {
    /// Looks at a request's head. False when it has been answered by that alone.
    pub(super) fn begin_demo(&mut self, key: Key, head: &RequestHead<'_, '_>) -> bool {
        let unix_time_s = self.unix_time_s();
        let (dialect, request_done) = match self.streams.get(key) {
            Some(stream) => (stream.dialect, stream.request_done),
            None => return false,
        };
        if !dialect.is_model_endpoint() {
            match (head.path(), head.method) {
                ("/v1/models", "GET" | "HEAD") if request_done => {
                    self.answer_json(key, 200, &models_json(unix_time_s));
                }
                ("/v1/models", _) => self.refuse(key, Refusal::MethodNotAllowed),
                _ => self.refuse(key, Refusal::NotFound),
            }
            return false;
        }
        if head.method != "POST" {
            self.refuse(key, Refusal::MethodNotAllowed);
            return false;
        }
        let Ok(settings) = self.settings.demo.with_query(head.query()) else {
            self.refuse(key, Refusal::BadDemoQuery);
            return false;
        };
        let seed = self.settings.seed ^ (self.index as u64) << 32 ^ self.begun;
        let Some(stream) = self.streams.get_mut(key) else { return false };
        // The facts of the body are not known yet; the model is made anew when they are.
        let model = DemoModel::new(dialect, settings, &stream.request_mut().facts, seed, unix_time_s);
        stream.demo = Some(Box::new(Demo { model, next_us: u64::MAX, preamble_written: false }));
        true
    }

    /// The request is whole: the model starts to think.
    pub(super) fn start_demo(&mut self, key: Key) {
        let unix_time_s = self.unix_time_s();
        let seed = self.settings.seed ^ (self.index as u64) << 32 ^ self.begun;
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return };
        let facts = stream.request().map(|request| request.facts.clone()).unwrap_or_default();
        let Some(demo) = &mut stream.demo else { return };
        let settings = demo.model.settings().clone();
        demo.next_us = now_us + u64::from(settings.first_token_ms) * 1000;
        let token_us = interval_us(&settings);
        demo.model = DemoModel::new(stream.dialect, settings, &facts, seed, unix_time_s);
        if stream.background == Background::Polls {
            stream.step(Step::EventStream);
            if !self.begin_polled(key) {
                return;
            }
        } else if stream.streaming {
            stream.step(Step::EventStream);
            self.write_events_head(key, false);
        } else {
            let tokens = demo.model.settings().tokens.min(facts.max_tokens.unwrap_or(u32::MAX));
            demo.next_us += u64::from(tokens) * token_us;
            stream.step(Step::PlainBody);
        }
        self.appended(key);
    }

    /// The next tokens are due.
    pub(super) fn demo_due(&mut self, key: Key) {
        let now_us = self.now_us;
        let settings = std::sync::Arc::clone(&self.settings);
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(mut demo) = stream.demo.take() else { return };
        if !stream.has_events_answer() {
            let body = demo.model.whole_answer();
            return self.answer_json(key, 200, &body);
        }
        let ids = settings.routes[stream.route].event_ids;
        let token_us = interval_us(demo.model.settings());
        let mut more = true;
        for _ in 0..DEMO_TOKENS_PER_TURN_MAX {
            if demo.next_us > now_us || !more {
                break;
            }
            let mut write = |raw: &[u8]| {
                let block = Block { raw, dispatches: true, has_id: false };
                relay_event(stream, &block, ids, now_us, &settings, &mut self.stats);
            };
            if !std::mem::replace(&mut demo.preamble_written, true) {
                demo.model.write_preamble(&mut write);
            }
            more = demo.model.write_next(&mut write);
            demo.next_us += token_us;
        }
        if more {
            // A shard that was busy does not make up for it with a burst longer than one turn's.
            demo.next_us = demo.next_us.max(now_us.saturating_sub(1_000_000));
            stream.demo = Some(demo);
            self.follow_marks(key);
        } else {
            if stream.phase == Phase::AwaitFirstToken {
                stream.step(Step::FirstToken);
            }
            self.end_stream(key, End::Done);
        }
        self.appended(key);
    }

    /// The client has caught up.
    pub(super) fn resume_demo(&mut self, key: Key) {
        let now_us = self.now_us;
        if let Some(demo) = self.streams.get_mut(key).and_then(|stream| stream.demo.as_mut()) {
            demo.next_us = demo.next_us.max(now_us);
        }
        self.follow_stream_timer(key);
    }
}

fn interval_us(settings: &DemoSettings) -> u64 {
    1_000_000 / u64::from(settings.tokens_per_s.max(1))
}
