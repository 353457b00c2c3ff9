//! Reading a stream bit by bit: one page of it as a body, or all of it as Server-Sent Events (PROTOCOL.md sections 5.6 to 5.8).

use super::store::{Id, Store};
use super::{Form, Now};
use crate::limits::{DURABLE_BATCH_BYTES, DURABLE_BATCH_MESSAGES};
use crate::log::Lent;
use crate::slots::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use memchr::memchr2;
use std::cell::Cell;
use std::io::Write;

/// What a step of reading has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// There is more.
    More,
    /// There is no more at present; the reader is woken when there is.
    Waiting,
    /// All was given.
    Ended,
    /// The stream was deleted or expired, or its window has left the reader behind.
    Gone,
}

/// What a reader is given, and how far it has come. It is one of the stream's readers until [`Store::leave`].
#[derive(Debug)]
pub struct Reading {
    pub(super) id: Id,
    /// Among the stream's readers; `None` after it has left.
    pub(super) slot: Option<usize>,
    at: u64,
    form: Form,
    shape: Shape,
    /// Events written.
    events: u64,
    /// To end at the next event's end.
    finishing: bool,
}

#[derive(Debug)]
enum Shape {
    /// One body.
    Page { end: u64, begun: bool },
    /// Events, with control events between them or without.
    Events {
        plain: bool,
        cursor: Cursor,
        event: Option<Event>,
        told: Option<(u64, bool)>,
        /// Not yet told when to come again, ms.
        retry_ms: Option<u64>,
    },
}

/// An event that is being written.
#[derive(Clone, Copy, Debug)]
struct Event {
    end: u64,
    /// The next byte is the first of a line.
    line_start: bool,
    /// The last byte was a CR: a LF behind it ends no line of its own.
    after_cr: bool,
}

/// Cursors, by which caches tell one wait from the next (section 10.1).
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor {
    last: Option<u64>,
    of_client: Option<u64>,
}

/// Seconds of one interval, and when they are counted from: October 9, 2024.
const CURSOR_INTERVAL_S: u64 = 20;
const CURSOR_EPOCH_S: u64 = 1_728_432_000;
/// When an `EventSource` is to come again, and up to how much later.
const RETRY_MS: u64 = 500;
const RETRY_JITTER_MS: u64 = 1000;
/// A cursor that would go back goes on by up to so much.
const CURSOR_JITTER_S: u64 = 3600;

/// What live readers can share: the events of a stream, in one of their forms.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Shared {
    id: Id,
    plain: bool,
}

impl Cursor {
    pub(super) fn new(of_client: Option<u64>) -> Self {
        Cursor { last: None, of_client }
    }

    fn current(now: Now) -> u64 {
        (now.unix_ms / 1000).saturating_sub(CURSOR_EPOCH_S) / CURSOR_INTERVAL_S
    }

    /// Whether it is where time is, as those of most readers are.
    fn is_common(&self, now: Now) -> bool {
        self.last.is_none_or(|last| last <= Self::current(now))
    }

    pub(super) fn next(&mut self, now: Now) -> u64 {
        let current = Self::current(now);
        let next = match (self.last, self.of_client) {
            (Some(last), _) => last.max(current),
            (None, Some(theirs)) if theirs >= current => {
                let jitter_s = 1 + now.random % CURSOR_JITTER_S;
                theirs.saturating_add(jitter_s.div_ceil(CURSOR_INTERVAL_S))
            }
            _ => current,
        };
        self.last = Some(next);
        next
    }
}

impl Reading {
    /// A body of the bytes from `at` up to `end`, a message's end in JSON.
    pub(super) fn page(id: Id, form: Form, at: u64, end: u64) -> Self {
        let shape = Shape::Page { end, begun: false };
        Reading { id, slot: None, at, form, shape, events: 0, finishing: false }
    }

    /// Events from `at` on.
    pub(super) fn events(id: Id, form: Form, at: u64, plain: bool, cursor: Cursor, now: Now) -> Self {
        // Those who are sent away together do not come back together.
        let retry_ms = plain.then_some(RETRY_MS + now.random % RETRY_JITTER_MS);
        let shape = Shape::Events { plain, cursor, event: None, told: None, retry_ms };
        Reading { id, slot: None, at, form, shape, events: 0, finishing: false }
    }

    /// If it waits for what comes, and that will be the same for whoever is where it is: what, and where that is.
    pub fn shares(&self, now: Now) -> Option<(Shared, u64)> {
        let Shape::Events { plain, cursor, event: None, told: Some((told, false)), retry_ms: None } =
            &self.shape
        else {
            return None;
        };
        let common = *told == self.at && !self.finishing && (*plain || cursor.is_common(now));
        common.then_some((Shared { id: self.id, plain: *plain }, self.at))
    }

    /// What it would share if it waited, if it is one of events.
    pub fn shared(&self) -> Option<Shared> {
        match self.shape {
            Shape::Events { plain, .. } => Some(Shared { id: self.id, plain }),
            Shape::Page { .. } => None,
        }
    }

    /// The position in the stream behind what was given so far, if that ends between two events.
    pub fn between(&self) -> Option<u64> {
        (!self.is_within()).then_some(self.at)
    }

    /// Events written since the last call; control events are not counted.
    pub fn take_events(&mut self) -> u64 {
        std::mem::take(&mut self.events)
    }

    /// From now on it ends with the event that is being written, or the next.
    pub fn finish(&mut self) {
        self.finishing = true;
    }

    /// Whether what was given so far ends in the middle of something.
    pub fn is_within(&self) -> bool {
        match &self.shape {
            Shape::Page { .. } => true,
            Shape::Events { event, .. } => event.is_some(),
        }
    }

    /// Writes a sign of life that means nothing: a comment, or the last control event again. Only while waiting.
    pub fn write_heartbeat(&mut self, store: &Store, now: Now, out: &mut Vec<u8>) {
        match &mut self.shape {
            Shape::Events { event: None, plain: true, .. } => out.extend_from_slice(b":\n\n"),
            Shape::Events { event: None, told: Some(_), cursor, .. } => {
                write_control(store, self.id, self.at, cursor, now, out);
            }
            _ => {}
        }
    }
}

/// Bytes of a body that are the JSON array's own, beside those stored.
pub(super) fn body_bytes(form: Form, at: u64, end: u64) -> u64 {
    match form {
        // `[` and `]`, and no comma behind the last message.
        Form::Json if at == end => 2,
        Form::Json => end - at + 1,
        _ => end - at,
    }
}

impl Store {
    /// A reading of what comes, for all who are where this one is; `reader` is woken for it. This one leaves.
    pub fn share(&mut self, reading: &mut Reading, reader: Key, now: Now) -> Reading {
        let shape = match &reading.shape {
            Shape::Events { plain, cursor, told, .. } => {
                Shape::Events { plain: *plain, cursor: *cursor, event: None, told: *told, retry_ms: None }
            }
            Shape::Page { end, begun } => Shape::Page { end: *end, begun: *begun },
        };
        let slot = Some(self.subscribe(reading.id, reader));
        self.leave(reading, now);
        Reading {
            id: reading.id,
            slot,
            at: reading.at,
            form: reading.form,
            shape,
            events: 0,
            finishing: false,
        }
    }

    /// One that has left, for what others read for it, goes on by itself behind the last event that it was given.
    pub fn part(&mut self, reading: &mut Reading, behind: u64, reader: Key) {
        reading.at = behind;
        if let Shape::Events { told, .. } = &mut reading.shape {
            *told = Some((behind, false));
        }
        if reading.slot.is_none() {
            reading.slot = Some(self.subscribe(reading.id, reader));
        }
    }

    /// Appends to `out` what comes next, no more than about `bytes_max`.
    pub fn read(&self, reading: &mut Reading, now: Now, out: &mut Vec<u8>, bytes_max: usize) -> Progress {
        let full = out.len() + bytes_max;
        if self.stream(reading.id).is_none_or(|stream| stream.deleted) {
            return Progress::Gone;
        }
        while out.len() < full {
            let step = match reading.shape {
                Shape::Page { .. } => self.page_step(reading, out, full),
                Shape::Events { .. } => self.events_step(reading, now, out, full),
            };
            if step != Progress::More {
                return step;
            }
        }
        Progress::More
    }

    fn page_step(&self, reading: &mut Reading, out: &mut Vec<u8>, full: usize) -> Progress {
        let Shape::Page { end, begun } = &mut reading.shape else { return Progress::Ended };
        let json = reading.form == Form::Json;
        if !std::mem::replace(begun, true) && json {
            out.push(b'[');
        }
        // Without the comma behind the last message.
        let last = if json && reading.at < *end { *end - 1 } else { *end };
        if reading.at < last {
            let room = (full - out.len()).max(1) as u64;
            let Some(lent) = self.lend(reading.id, reading.at, last.min(reading.at + room)) else {
                return Progress::Gone;
            };
            out.extend(lent.cells().iter().map(Cell::get));
            reading.at += lent.len() as u64;
            return Progress::More;
        }
        if json {
            out.push(b']');
        }
        reading.at = *end;
        Progress::Ended
    }

    fn events_step(&self, reading: &mut Reading, now: Now, out: &mut Vec<u8>, full: usize) -> Progress {
        let Shape::Events { plain, cursor, event, told, retry_ms } = &mut reading.shape else {
            return Progress::Ended;
        };
        let plain = *plain;
        let Some(stream) = self.stream(reading.id) else { return Progress::Gone };
        let tail = stream.shown_tail();
        let Some(current) = event else {
            if reading.finishing && told.is_some() {
                return Progress::Ended;
            }
            if self.earliest(reading.id).is_none_or(|earliest| earliest > reading.at) {
                return Progress::Gone;
            }
            let next = if reading.at < tail {
                self.event_end(reading.id, reading.form, reading.at, plain)
            } else {
                None
            };
            if let Some(retry_ms) = retry_ms.take() {
                // In front of the first event, without a blank line of its own: some clients would take that for one.
                writeln!(out, "retry:{retry_ms}").ok();
            }
            if let Some(end) = next {
                if !plain {
                    out.extend_from_slice(b"event: data\n");
                }
                out.extend_from_slice(b"data:");
                if reading.form == Form::Json && !plain {
                    out.push(b'[');
                }
                *event = Some(Event { end, line_start: true, after_cr: false });
                return Progress::More;
            }
            // At the end: the reader is told so once, and once more when nothing can follow.
            let state = (reading.at, stream.is_shown_closed() && reading.at == tail);
            if *told != Some(state) {
                *told = Some(state);
                if plain {
                    write_id(stream.offset(reading.at), out);
                    out.push(b'\n');
                } else {
                    write_control(self, reading.id, reading.at, cursor, now, out);
                }
                return Progress::More;
            }
            return if state.1 { Progress::Ended } else { Progress::Waiting };
        };
        let json = reading.form == Form::Json;
        let last = if json { current.end - 1 } else { current.end };
        if reading.at < last {
            let room = (full - out.len()).max(3) as u64;
            let Some(lent) = self.lend(reading.id, reading.at, last.min(reading.at + room)) else {
                return Progress::Gone;
            };
            reading.at += match reading.form {
                Form::Binary => self.write_base64(reading.id, reading.at, last, &lent, out),
                _ => write_lines(current, &lent, out),
            };
            return Progress::More;
        }
        if json && !plain {
            out.push(b']');
        }
        out.push(b'\n');
        reading.at = current.end;
        *event = None;
        reading.events += 1;
        write_id(stream.offset(reading.at), out);
        out.push(b'\n');
        *told = Some((reading.at, stream.is_shown_closed() && reading.at == tail));
        if !plain {
            write_control(self, reading.id, reading.at, cursor, now, out);
        }
        Progress::More
    }

    /// Where an event ends that begins at `at`: after one message, or after as many as make a batch. `None`: what there is
    /// is the beginning of a character whose rest is still to come.
    fn event_end(&self, id: Id, form: Form, at: u64, plain: bool) -> Option<u64> {
        let closed = self.stream(id)?.is_shown_closed();
        let mut end = self.message_end(id, at)?;
        let mut messages = 1;
        let whole = |end: u64| if form == Form::Text { end - self.broken_bytes(id, at, end) } else { end };
        while let Some(next) = self.message_end(id, end) {
            let full = plain || messages >= DURABLE_BATCH_MESSAGES || next - at > DURABLE_BATCH_BYTES;
            if full && whole(end) > at {
                break;
            }
            (end, messages) = (next, messages + 1);
        }
        let at_tail = self.stream(id).is_some_and(|stream| stream.shown_tail() == end);
        if closed && at_tail {
            return Some(end);
        }
        Some(whole(end)).filter(|&end| end > at)
    }

    /// Bytes at the end of a range that begin a character of UTF-8 and do not end it.
    fn broken_bytes(&self, id: Id, at: u64, end: u64) -> u64 {
        let mut bytes = [0; 3];
        let mut count = 0;
        while count < bytes.len() && end - count as u64 > at {
            let position = end - 1 - count as u64;
            let Some(lent) = self.lend(id, position, position + 1) else { return 0 };
            let byte = lent.cells()[0].get();
            bytes[count] = byte;
            count += 1;
            let needs = match byte {
                0b1100_0000..=0b1101_1111 => 2,
                0b1110_0000..=0b1110_1111 => 3,
                0b1111_0000..=0b1111_0111 => 4,
                0b1000_0000..=0b1011_1111 => continue,
                _ => return 0,
            };
            return if needs > count { count as u64 } else { 0 };
        }
        0
    }

    /// Writes as many bytes of what is lent as make whole groups of three, or all if they are the last; a group that lies
    /// in two places is put together. Gives how many.
    fn write_base64(&self, id: Id, at: u64, last: u64, lent: &Lent, out: &mut Vec<u8>) -> u64 {
        let mut bytes: Vec<u8> = lent.to_vec();
        while !bytes.len().is_multiple_of(3)
            && let Some(more) = self.lend(id, at + bytes.len() as u64, last)
        {
            let missing = 3 - bytes.len() % 3;
            bytes.extend(more.cells().iter().take(missing).map(Cell::get));
        }
        let start = out.len();
        out.resize(start + bytes.len().div_ceil(3) * 4, 0);
        let written = BASE64.encode_slice(&bytes, &mut out[start..]).unwrap_or(0);
        out.truncate(start + written);
        bytes.len() as u64
    }
}

/// Writes bytes as lines of data: each line end of theirs begins a new one. Gives how many were written.
fn write_lines(event: &mut Event, lent: &Lent, out: &mut Vec<u8>) -> u64 {
    let bytes = lent.to_vec();
    let mut rest = bytes.as_slice();
    if std::mem::take(&mut event.after_cr) && rest.first() == Some(&b'\n') {
        rest = &rest[1..];
    }
    while let Some(&first) = rest.first() {
        // One space after the colon is dropped by who reads it.
        if std::mem::take(&mut event.line_start) && first == b' ' {
            out.push(b' ');
        }
        let Some(end) = memchr2(b'\n', b'\r', rest) else {
            out.extend_from_slice(rest);
            break;
        };
        out.extend_from_slice(&rest[..end]);
        out.extend_from_slice(b"\ndata:");
        event.line_start = true;
        let cr = rest[end] == b'\r';
        rest = &rest[end + 1..];
        match rest.first() {
            Some(b'\n') if cr => rest = &rest[1..],
            None => event.after_cr = cr,
            _ => {}
        }
    }
    bytes.len() as u64
}

/// The line by which an `EventSource` knows where to go on.
fn write_id(offset: super::Offset, out: &mut Vec<u8>) {
    // Writing to a vector does not fail.
    writeln!(out, "id:{offset}").ok();
}

fn write_control(store: &Store, id: Id, at: u64, cursor: &mut Cursor, now: Now, out: &mut Vec<u8>) {
    let Some(stream) = store.stream(id) else { return };
    let offset = stream.offset(at);
    let at_tail = at == stream.shown_tail();
    write!(out, "event: control\ndata:{{\"streamNextOffset\":\"{offset}\"").ok();
    if at_tail && stream.is_shown_closed() {
        out.extend_from_slice(b",\"upToDate\":true,\"streamClosed\":true");
    } else {
        write!(out, ",\"streamCursor\":\"{}\"", cursor.next(now)).ok();
        if at_tail {
            out.extend_from_slice(b",\"upToDate\":true");
        }
    }
    out.extend_from_slice(b"}\n");
    write_id(offset, out);
    out.push(b'\n');
}
