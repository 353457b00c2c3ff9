//! Answers to writes: streams made, from nothing or as forks; appended to, and by whom again; ended (PROTOCOL.md sections 4 and 5).

use super::request::{Append, Create, Expiry, Fork, Request};
use super::store::{Answer, DEFAULT_CONTENT_TYPE, Id, Outcome, Refused, Reply, Store};
use super::stream::{Origin, Stream, Verdict};
use super::{Form, Now, Offset, json, refusals};
use crate::fault::Fault;
use crate::limits::{DURABLE_FORK_DEPTH_MAX, DURABLE_STREAM_COST_BYTES};
use std::borrow::Cow;

impl Store {
    pub(super) fn create(&mut self, request: &Request, create: &Create, body: &[u8], now: Now) -> Outcome {
        if let Some(id) = self.find(&request.path, now)
            && let Some(stream) = self.streams.get(id)
        {
            return if stream.deleted {
                Err(self.refused(refusals::PATH_HELD))
            } else if stream.is_as_asked(create) {
                Ok(self.created(200, id, request))
            } else {
                Err(self.refused(refusals::EXISTS))
            };
        }
        // Unique, later than any before, and the time wherever that is possible.
        let created = self.place.number_from(now.unix_ms.max(self.created + 1));
        let origin = self.origin(create, created, now).map_err(|fault| self.refused(fault))?;
        let form = Form::of(&origin.content_type);
        let messages = messages(form, &body, true).map_err(|fault| self.refused(fault))?;
        let source = origin.source;
        let need = DURABLE_STREAM_COST_BYTES as u64 + request.path.len() as u64 + room_for(body, &messages);
        // The source must not be given up to make room for its fork.
        self.hold_source(source, true);
        if let Err(fault) = self.fits(body).and_then(|()| self.make_room(need, None, now)) {
            self.hold_source(source, false);
            return Err(self.refused(fault));
        }
        let Ok(id) = self.streams.insert(Stream::new(&request.path, created, create, origin, now)) else {
            self.hold_source(source, false);
            self.counters.full += 1;
            return Err(self.refused(refusals::FULL));
        };
        self.created = created;
        self.counters.creates += 1;
        self.by_path.insert(request.path.clone(), id);
        if let Some(stream) = self.streams.get_mut(id) {
            stream.away = self.place.is_away(&request.path);
            for message in messages.iter() {
                stream.push(message);
            }
            if create.closed {
                stream.close(None);
            }
            self.counters.append_bytes += body.len() as u64;
            let due_ms = stream.due_ms();
            if due_ms != u64::MAX {
                self.queue_due(id, due_ms);
            }
        }
        self.record_create(id, &messages);
        self.watch_age(id, now);
        self.used(id, now);
        self.settle_bytes(id);
        Ok(self.created(201, id, request))
    }

    /// Where a new stream comes from: from nothing, or from its source.
    fn origin(&mut self, create: &Create, created: u64, now: Now) -> Result<Origin, Fault> {
        let Some(fork) = &create.fork else {
            return Ok(Origin {
                source: None,
                base: 0,
                generation: created,
                content_type: create.content_type.clone().unwrap_or_else(|| DEFAULT_CONTENT_TYPE.into()),
                expiry: create.expiry.clone(),
            });
        };
        let id = self.find(&fork.from, now).ok_or(refusals::SOURCE_NOT_FOUND)?;
        let source = self.streams.get(id).ok_or(refusals::SOURCE_NOT_FOUND)?;
        if source.deleted {
            return Err(refusals::SOURCE_DELETED);
        }
        if let Some(asked) = &create.content_type
            && !super::media_type(asked).eq_ignore_ascii_case(super::media_type(&source.content_type))
        {
            return Err(refusals::CONTENT_TYPE_DIFFERS);
        }
        if self.depth(id) >= DURABLE_FORK_DEPTH_MAX {
            return Err(refusals::FORK_DEPTH);
        }
        Ok(Origin {
            source: Some(id),
            base: self.fork_point(id, fork)?,
            generation: source.generation,
            content_type: source.content_type.clone(),
            // Section 4.2: its own, or else its source's.
            expiry: match &create.expiry {
                Expiry::Never => source.expiry.clone(),
                own => own.clone(),
            },
        })
    }

    /// The position at which a fork leaves its source.
    fn fork_point(&self, id: Id, fork: &Fork) -> Result<u64, Fault> {
        let source = self.streams.get(id).ok_or(refusals::SOURCE_NOT_FOUND)?;
        let mut at = match fork.offset {
            None => source.shown_tail(),
            Some(Offset { position: 0, .. }) => 0,
            Some(offset)
                if offset.generation != source.generation || offset.position > source.shown_tail() =>
            {
                return Err(refusals::FORK_BEYOND);
            }
            Some(offset) => offset.position,
        };
        if self.earliest(id).is_none_or(|earliest| earliest > at) {
            return Err(refusals::FORK_GONE);
        }
        if source.form == Form::Json {
            if !self.is_boundary(id, at) {
                return Err(refusals::BAD_FORK);
            }
            for _ in 0..fork.sub_offset {
                at = self.message_end(id, at).ok_or(refusals::FORK_BEYOND)?;
            }
        } else if fork.sub_offset > 0 {
            let end = self.message_end(id, at).ok_or(refusals::FORK_BEYOND)?;
            if fork.sub_offset > end - at {
                return Err(refusals::FORK_BEYOND);
            }
            at += fork.sub_offset;
        }
        Ok(at)
    }

    fn created(&self, status: u16, id: Id, request: &Request) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            if status == 201 && !request.authority.is_empty() {
                let scheme = if request.secure { "https" } else { "http" };
                lines.add("Location", format_args!("{scheme}://{}{}", request.authority, request.path));
            }
            lines
                .add("Content-Type", &stream.content_type)
                .add("Stream-Next-Offset", stream.offset(stream.tail()))
                .add_if(stream.closed, "Stream-Closed", "true");
        }
        Reply::Answer(Answer { status, lines: lines.0, body: Vec::new() })
    }

    pub(super) fn append(&mut self, request: &Request, append: &Append, body: &[u8], now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        if body.is_empty() && !append.close {
            return Err(self.refused(refusals::EMPTY_BODY));
        }
        if !body.is_empty() && append.content_type.is_none() {
            return Err(self.refused(refusals::CONTENT_TYPE_REQUIRED));
        }
        let tag = append.producer.as_ref();
        if stream.closed {
            return self.append_to_closed(id, append, body, now);
        }
        let media = append.content_type.as_deref().map(super::media_type).unwrap_or_default();
        if !body.is_empty() && !media.eq_ignore_ascii_case(super::media_type(&stream.content_type)) {
            return Err(self.refused(refusals::CONTENT_TYPE_DIFFERS));
        }
        if let Some(tag) = tag {
            match stream.judge(tag, now.ms) {
                Verdict::Accepted => {}
                Verdict::Duplicate(highest) => {
                    self.counters.duplicates += 1;
                    self.used(id, now);
                    return Ok(self.appended(204, id, Some((tag.epoch, highest))));
                }
                verdict => return Err(self.verdict_refused(verdict, tag.sequence)),
            }
        }
        // Section 5.2: after the closed state and the content type; and a repeated append was answered already.
        if let (Some(sequence), Some(last)) = (&append.sequence, &stream.last_sequence)
            && sequence <= last
        {
            return Err(self.refused(refusals::SEQUENCE));
        }
        let messages = messages(stream.form, &body, false).map_err(|fault| self.refused(fault))?;
        // What only closes needs no room.
        if !body.is_empty() {
            let need = room_for(body, &messages);
            self.fits(body)
                .and_then(|()| self.make_room(need, Some(id), now))
                .map_err(|fault| self.refused(fault))?;
        }
        let window = self.settings.stream_bytes_max;
        let at = self.streams.get(id).map_or(0, Stream::tail);
        if let Some(stream) = self.streams.get_mut(id) {
            for message in messages.iter() {
                stream.push(message);
            }
            if let Some(tag) = tag {
                stream.note_producer(tag, now.ms);
            }
            if append.sequence.is_some() {
                stream.last_sequence.clone_from(&append.sequence);
            }
            if append.close {
                stream.close(tag);
            }
            let earliest = stream.earliest;
            stream.trim(window);
            self.counters.trimmed_bytes += stream.earliest - earliest;
            self.counters.appends += u64::from(!body.is_empty());
            self.counters.append_bytes += body.len() as u64;
        }
        self.record_append(id, append, at, &messages);
        self.watch_age(id, now);
        self.used(id, now);
        self.settle_bytes(id);
        self.tell(id);
        let status = if tag.is_some() && !body.is_empty() { 200 } else { 204 };
        Ok(self.appended(status, id, tag.map(|tag| (tag.epoch, tag.sequence))))
    }

    pub(super) fn append_to_closed(&mut self, id: Id, append: &Append, body: &[u8], now: Now) -> Outcome {
        let Some(stream) = self.streams.get(id) else { return Err(self.refused(refusals::NOT_FOUND)) };
        match &append.producer {
            // Section 5.2.1: the very append that closed it, once more.
            Some(tag) if stream.was_closed_by(tag) => {
                self.counters.duplicates += 1;
                self.used(id, now);
                return Ok(self.appended(204, id, Some((tag.epoch, tag.sequence))));
            }
            Some(tag) => {
                if let verdict @ Verdict::Stale(_) = stream.judge(tag, now.ms) {
                    return Err(self.verdict_refused(verdict, tag.sequence));
                }
            }
            None if append.close && body.is_empty() => {
                self.used(id, now);
                return Ok(self.appended(204, id, None));
            }
            None => {}
        }
        let mut lines = self.lines();
        lines.add("Stream-Closed", "true").add("Stream-Next-Offset", stream.offset(stream.tail()));
        Err(Refused(refusals::CLOSED, lines))
    }

    fn appended(&self, status: u16, id: Id, producer: Option<(u64, u64)>) -> Reply {
        let mut lines = self.lines();
        if let Some(stream) = self.streams.get(id) {
            lines.add("Stream-Next-Offset", stream.offset(stream.tail())).add_if(
                stream.closed,
                "Stream-Closed",
                "true",
            );
        }
        if let Some((epoch, sequence)) = producer {
            lines.add("Producer-Epoch", epoch).add("Producer-Seq", sequence);
        }
        lines.add("Cache-Control", "no-store");
        Reply::Answer(Answer { status, lines: lines.0, body: Vec::new() })
    }

    fn verdict_refused(&self, verdict: Verdict, received: u64) -> Refused {
        let mut lines = self.lines();
        let fault = match verdict {
            Verdict::Stale(epoch) => {
                lines.add("Producer-Epoch", epoch);
                refusals::STALE_EPOCH
            }
            Verdict::Gap(expected) => {
                lines.add("Producer-Expected-Seq", expected).add("Producer-Received-Seq", received);
                refusals::SEQUENCE_GAP
            }
            Verdict::Refused(fault) => fault,
            Verdict::Accepted | Verdict::Duplicate(_) => refusals::BAD_PRODUCER,
        };
        Refused(fault, lines)
    }

    pub(super) fn delete(&mut self, request: &Request, now: Now) -> Outcome {
        let id = self.open(&request.path, now)?;
        self.delete_or_keep(id);
        let lines = self.lines();
        Ok(Reply::Answer(Answer { status: 204, lines: lines.0, body: Vec::new() }))
    }
}

/// The messages of a body; none in an empty one.
fn messages<'b>(form: Form, body: &'b &'b [u8], create: bool) -> Result<Cow<'b, [&'b [u8]]>, Fault> {
    match form {
        _ if body.is_empty() => Ok(Cow::default()),
        Form::Json => match json::messages(body)? {
            // Section 9.1.3: creates an empty stream, but is no append.
            none if none.is_empty() && !create => Err(refusals::EMPTY_ARRAY),
            messages => Ok(messages.into_iter().map(str::as_bytes).collect()),
        },
        Form::Text | Form::Binary => Ok(Cow::Borrowed(std::slice::from_ref(body))),
    }
}

/// Memory that messages will take, bytes: themselves, and twice a place in the list of their ends.
fn room_for(body: &[u8], messages: &[&[u8]]) -> u64 {
    (body.len() + messages.len() * (1 + 2 * size_of::<u64>())) as u64
}
