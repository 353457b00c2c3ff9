//! OpenAI's responses in background, for backends that need to know nothing of it. Such a response is a kept stream whose
//! backend goes on without a client, and that is also found by the id that its backend gave it.
//!
//! ```text
//!   stream: true    client ◄── events ── Stream ◄── backend         the client leaves, and comes back for the rest
//!   else            client ◄── object ── waiter ◄─ id ─ Stream ◄── backend       nobody reads it at first
//! ```
//! The id does not name a shard: a request for one that this shard does not know goes round, and is the backend's in the end.

use super::kept::{Source, push_id_line};
use super::relay::ExtraLines;
use super::stream::{Answer, Stream};
use super::{Leaving, Shard};
use crate::io::Io;
use crate::settings::{OnLeave, Resume};
use protocol::background::{Ask, How, NO_ID, Notes, Want, deleted_object, last_object};
use protocol::fault::Fault;
use protocol::http::{Refusal, RequestHead};
use protocol::log::{Log, Place};
use protocol::phase::{End, Phase};
use protocol::planted::{Bug, is_planted};
use protocol::resume::{AHEAD, NOT_FOUND};
use protocol::slots::Key;
use protocol::sse::Block;

impl<I: Io> Shard<I> {
    /// How a stream outlives its connections.
    pub(super) fn resume_of_source(&self, source: &Source) -> Option<Resume> {
        let resume = self.resume_of(source.route)?;
        if !source.background {
            return Some(Resume { on_leave: source.on_leave.unwrap_or(resume.on_leave), ..resume });
        }
        Some(Resume {
            window_bytes: resume.window_bytes.max(self.settings.background_window_bytes),
            on_leave: OnLeave::Finish,
            keep_ms: resume.keep_ms.max(self.settings.background_keep_ms),
            ..resume
        })
    }

    /// Whether nobody reads a stream, and it goes on to its end all the same.
    pub(super) fn goes_on_alone(&self, source: &Source) -> bool {
        let on_leave = self.resume_of_source(source).map(|resume| resume.on_leave);
        source.detached && on_leave == Some(OnLeave::Finish)
    }

    // ---- requests for responses

    /// The shard where a client is to ask next for a response that is not known here; none: it is known, or all were asked.
    pub(super) fn next_for_response(&self, key: Key, head: &RequestHead<'_, '_>) -> Option<usize> {
        let neighbours = self.neighbours.as_ref().filter(|_| self.leaving == Leaving::No)?;
        let ask = Ask::parse(head)?;
        let route = self.settings.routes.iter().find(|route| route.matches(head.path()))?;
        if route.resume.is_none() || self.kept.by_response.contains_key(&*ask.id) {
            return None;
        }
        let shards = neighbours.shards();
        let hops = usize::from(self.conns.get(key)?.hops());
        (hops + 1..shards)
            .map(|hop| (neighbours.own() + hop - hops) % shards)
            .find(|&shard| neighbours.is_open(shard))
    }

    /// The response that a request to this route asks for, if it is one of ours.
    pub(super) fn response_asked_for(
        &self,
        route: usize,
        head: &RequestHead<'_, '_>,
    ) -> Option<(Key, Result<Want, Fault>)> {
        if self.kept.by_response.is_empty() {
            return None;
        }
        let ask = Ask::parse(head)?;
        let key = *self.kept.by_response.get(&*ask.id)?;
        let source = self.kept.sources.get(key)?;
        (source.route == route).then_some((key, ask.want))
    }

    /// Answers a request for a response.
    pub(super) fn ask_response(&mut self, key: Key, source: Key, want: Result<Want, Fault>) {
        if self.streams.get(key).is_some_and(|stream| !stream.request_done) {
            // Nobody sends a body with these, and it would have to be read to its end.
            return self.refuse(key, Refusal::BodyTooLarge);
        }
        self.request_complete(key);
        if let Some(stream) = self.streams.get_mut(key) {
            stream.streaming = false;
            (stream.token_due_ms, stream.phase_due_ms, stream.total_due_ms) = (u64::MAX, u64::MAX, u64::MAX);
        }
        match want {
            Err(fault) => self.answer_fault(key, &fault, ""),
            Ok(Want::Object) => self.answer_object(key, source),
            Ok(Want::Events { after }) => self.answer_events(key, source, after),
            Ok(Want::Cancel) => {
                let cancelled = self.response_object(source, Some(How::Cancelled));
                self.cancel(source);
                // One that is not kept is gone by now.
                match self.response_object(source, None).or(cancelled) {
                    Some(object) => self.answer_json(key, 200, object.as_bytes()),
                    None => self.answer_fault(key, &NOT_FOUND, ""),
                }
            }
            Ok(Want::Delete) => {
                let id = self.notes_of(source).and_then(|(notes, _)| notes.id()).map(Box::<str>::from);
                self.cancel(source);
                self.store_no_more(source);
                if let Some(id) = id {
                    self.kept.by_response.remove(&id);
                    self.answer_json(key, 200, &deleted_object(&id));
                }
            }
        }
    }

    /// Ends one that is under way.
    fn cancel(&mut self, source: Key) {
        if let Some(producer) = self.kept.sources.get(source).and_then(|source| source.producer) {
            self.stats.counters.stream_stops += 1;
            self.end_stream(producer, End::StreamStopped);
        }
    }

    fn answer_object(&mut self, key: Key, source: Key) {
        match self.response_object(source, None) {
            Some(object) => self.answer_json(key, 200, object.as_bytes()),
            None => self.answer_fault(key, &NOT_FOUND, ""),
        }
    }

    fn answer_events(&mut self, key: Key, source_key: Key, after: Option<u64>) {
        let source = self.kept.sources.get(source_key);
        let last_id = source.and_then(|source| self.source_log(source)).map_or(0, Log::last_event_id);
        let id = match (after, self.notes_of(source_key)) {
            (None, _) => Some(0),
            (Some(number), Some((notes, _))) => {
                let number = number + u64::from(is_planted(Bug::SequenceShifted));
                notes.id_of(number, last_id)
            }
            (Some(_), None) => None,
        };
        match id {
            // An SDK takes an answer without a body for a broken one.
            Some(id) => self.begin_reading(key, source_key, id, false),
            None => self.answer_fault(key, &AHEAD, ""),
        }
    }

    /// What is remembered of a response, and why it has ended, if it has.
    fn notes_of(&self, source: Key) -> Option<(&Notes, Option<End>)> {
        let source = self.kept.sources.get(source)?;
        match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(stream) => Some((stream.notes.as_deref()?, stream.end)),
            None => Some((source.notes.as_deref()?, source.end)),
        }
    }

    /// The response object, as it stands, or as it would if it stood so.
    fn response_object(&self, source_key: Key, how: Option<How>) -> Option<String> {
        let (notes, end) = self.notes_of(source_key)?;
        let source = self.kept.sources.get(source_key)?;
        let log = self.source_log(source)?;
        let how = match (how, end) {
            (Some(how), _) => how,
            (None, Some(End::StreamStopped)) if !is_planted(Bug::CancelForgotten) => How::Cancelled,
            (None, _) if notes.last().is_some() => How::Told,
            (None, None) => How::UnderWay,
            (None, Some(end)) => How::Failed(end.fault()),
        };
        let event = match (how, notes.last()) {
            // It was appended as one range.
            (How::Told, Some((from, to))) if from >= log.start() => log.lend(from, (to - from) as u32),
            _ => None,
        };
        let told = event.and_then(|event| last_object(&event.to_vec(), source.chunked));
        Some(told.unwrap_or_else(|| notes.object(how)))
    }

    // ---- the answer

    /// A response that is not streamed to its client has begun: the client will be told its id. False: it is over.
    pub(super) fn begin_polled(&mut self, key: Key) -> bool {
        if self.kept.detached >= self.settings.detached_max {
            self.end_stream(key, End::Overload);
            return false;
        }
        self.name_stream(key, &mut ExtraLines::new(""));
        let Some(stream) = self.streams.get(key) else { return false };
        let (Some(source_key), Some(client)) = (stream.source, stream.client) else {
            self.end_stream(key, if self.leaving == Leaving::No { End::Overload } else { End::Drain });
            return false;
        };
        let mut waiter = Stream::new(client, stream.route, stream.dialect, stream.version, stream.started_us);
        waiter.phase = Phase::AwaitHead;
        (waiter.close, waiter.asked_us) = (stream.close, stream.asked_us);
        waiter.cors = stream.cors.clone();
        waiter.request_mut().waits_for = Some(source_key);
        let Ok(waiter_key) = self.streams.insert(waiter) else {
            self.end_stream(key, End::Overload);
            return false;
        };
        let Some(stream) = self.streams.get_mut(key) else { return false };
        let (response, description) = (std::mem::take(&mut stream.response), stream.split_description());
        stream.client = None;
        (stream.answer, stream.status) = (Answer::Events { early: false }, 200);
        if let Some(waiter) = self.streams.get_mut(waiter_key) {
            // What its client was sent so far (an interim response) is in there.
            (waiter.response, waiter.description) = (response, description);
        }
        if let Some(conn) = self.conns.get_mut(client) {
            conn.stream = Some(waiter_key);
        }
        if let Some(source) = self.kept.sources.get_mut(source_key) {
            source.waiter = Some(waiter_key);
        }
        self.keep_log(key);
        self.orphan(source_key);
        true
    }

    /// Something has been noted of a response: from the first event that names it on, it is found by its id.
    pub(super) fn follow_notes(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key) else { return };
        let (Some(notes), Some(source_key)) = (&stream.notes, stream.source) else { return };
        let (Some(id), Some(source)) = (notes.id(), self.kept.sources.get_mut(source_key)) else { return };
        if std::mem::replace(&mut source.found_by_id, true) {
            return;
        }
        let (number, waiter) = (source.number, source.waiter.take());
        self.kept.by_response.insert(id.into(), source_key);
        let Some(waiter) = waiter else { return };
        let object = self.response_object(source_key, None).unwrap_or_default();
        let mut lines = ExtraLines::new("");
        push_id_line(&mut lines, &self.kept.id(number));
        if let Some(waiter) = self.streams.get_mut(waiter) {
            waiter.request_mut().waits_for = None;
        }
        self.answer_json_with(waiter, 200, object.as_bytes(), lines.as_str());
    }

    /// A response has ended that nobody could ask for.
    pub(super) fn answer_waiter_of_none(&mut self, source: Key, end: End) {
        let Some(source) = self.kept.sources.get_mut(source) else { return };
        let Some(waiter) = source.waiter.take() else { return };
        if let Some(waiter) = self.streams.get_mut(waiter) {
            waiter.request_mut().waits_for = None;
        }
        let fault = if end == End::Done { NO_ID } else { end.fault() };
        self.answer_error(waiter, &fault, "");
    }

    /// Who was to be told the id is gone, and nobody else will ever know it.
    pub(super) fn waiter_left(&mut self, source: Key) {
        let Some(source) = self.kept.sources.get_mut(source) else { return };
        source.waiter = None;
        if let Some(producer) = source.producer {
            self.end_stream(producer, End::ClientLeft);
        }
    }

    /// A kept stream is gone, and its response with it, unless another has been given the same id.
    pub(super) fn forget_response(&mut self, key: Key, notes: Option<&Notes>) {
        if let Some(id) = notes.and_then(Notes::id)
            && self.kept.by_response.get(id) == Some(&key)
            && !is_planted(Bug::ResponseLeft)
        {
            self.kept.by_response.remove(id);
        }
    }
}

/// Takes note of an event that was just appended, from `from` on.
pub(super) fn note(notes: &mut Notes, log: &Log, chunked: bool, block: &Block<'_>, from: u64) {
    notes.take(block, log.last_event_id(), (from, log.end()));
    if notes.is_long()
        && let Place::Gone(first) = log.behind(0, chunked)
    {
        notes.forget(first);
    }
}

/// Memory of what is remembered, bytes.
pub(super) fn notes_bytes(notes: Option<&Notes>) -> u64 {
    notes.map_or(0, |notes| notes.memory_bytes() as u64)
}
