//! Durable streams at work: requests of the protocol collected and carried out on the shard's store, answers given to their
//! clients bit by bit, readers woken by what concerns them. What anything means is `protocol::durable`.
//!
//! ```text
//!   Collecting ──(the request is whole)──► Answered, or Held until the journal has it (`journal`)
//!       ├──► Away, until other shards have said what becomes of it (`directory`) ──► Answered
//!       ├──► Reading ──(a page, or events, as the client takes them)──► Answered
//!       └──► Polling ──(woken, or over)──► Reading | Answered
//! ```

use super::conn::Maybe;
use super::reader::Reader;
use super::stream::{Answer, Stream};
use super::tail::Level;
use super::{Leaving, Shard, TimerOf};
use crate::io::Io;
use crate::mesh::SharedPlace;
use protocol::durable::journal::Failure;
use protocol::durable::{self, Now, Poll, Progress, Reading, Reply, Request, Shared, Store};
use protocol::fault::Fault;
use protocol::http::{Framing, Refusal, RequestHead, write_own_response_head};
use protocol::limits::{DURABLE_PIECE_BYTES, DURABLE_WAKES_PER_TURN_MAX};
use protocol::phase::{End, Step};
use protocol::slots::Key;
use protocol::wheel::TimerId;
use std::collections::{HashMap, VecDeque};

/// The durable streams of a shard.
pub(super) struct DurableStreams {
    pub(super) store: Store,
    /// Readers of whom something concerns their streams.
    woken: VecDeque<Key>,
    /// Who waits for what comes next, by what it is.
    pub(super) level: HashMap<Shared, Level>,
    /// For the next stream that may expire.
    pub(super) timer: Option<(TimerId, u64)>,
    /// Whose answers wait for which record of the journal, in their order.
    pub(super) held: VecDeque<(u64, Key)>,
    /// What became of the journal's last job.
    pub(super) done: Option<Result<(), Failure>>,
    /// What there was at the start: streams, and damage.
    pub(super) recovered_streams: u64,
    pub(super) recovered_damage: u64,
}

/// A request of the protocol.
pub(crate) struct Durable {
    pub(super) state: State,
    /// When a long-poll or an event stream is over, ms.
    pub(super) due_ms: u64,
    /// Among those who are woken.
    queued: bool,
    /// Bytes that it was sent of tails it shared before it went on by itself, and on other shards.
    pub(super) shared_bytes: u64,
}

pub(super) enum State {
    Collecting(Box<Collecting>),
    /// It waits for the journal.
    Held(Box<durable::Answer>),
    /// Other shards decide; so many bytes of it are with them.
    Away(usize),
    Polling(Box<Poll>),
    Reading(Box<Reading>),
    /// A tail is read for it ([`tail`](super::tail)).
    Sharing,
    /// It goes where the stream is, to read by itself ([`handover`](super::handover)).
    Returning(Box<SharedPlace>),
    Answered,
}

/// What has arrived of a request.
pub(super) struct Collecting {
    request: Result<Request, Fault>,
    body: Vec<u8>,
    body_bytes_max: u64,
}

impl Durable {
    fn new(state: State) -> Self {
        Durable { state, due_ms: u64::MAX, queued: false, shared_bytes: 0 }
    }

    pub(super) fn reads(reading: Reading) -> Self {
        Durable::new(State::Reading(Box::new(reading)))
    }

    /// Of one whose answer began elsewhere.
    pub(super) fn shares(due_ms: u64, shared_bytes: u64) -> Self {
        Durable { due_ms, shared_bytes, ..Durable::new(State::Sharing) }
    }

    pub(super) fn reading(&self) -> Option<&Reading> {
        match &self.state {
            State::Reading(reading) => Some(reading),
            _ => None,
        }
    }

    /// From here on others read for it; gives its own reading.
    pub(super) fn begin_sharing(&mut self) -> Option<Reading> {
        match std::mem::replace(&mut self.state, State::Sharing) {
            State::Reading(reading) => Some(*reading),
            other => {
                self.state = other;
                None
            }
        }
    }

    pub(super) fn end_sharing(&mut self, reading: Reading) {
        self.state = State::Reading(Box::new(reading));
    }

    pub(super) fn reading_mut(&mut self) -> Option<&mut Reading> {
        match &mut self.state {
            State::Reading(reading) => Some(reading),
            _ => None,
        }
    }

    /// Keeps a piece of the body.
    pub(super) fn append_body(&mut self, piece: &[u8]) {
        let State::Collecting(so_far) = &mut self.state else { return };
        if so_far.body.len() as u64 + piece.len() as u64 > so_far.body_bytes_max {
            so_far.request = Err(durable::TOO_LARGE);
        }
        // Of a request that is refused anyway nothing is kept. It is read to its end all the same: many clients do not look
        // for an answer before they have written all.
        if so_far.request.is_ok() {
            so_far.body.extend_from_slice(piece);
        } else {
            so_far.body = Vec::new();
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        match &self.state {
            State::Collecting(so_far) => so_far.body.capacity(),
            State::Away(bytes) => *bytes,
            _ => 0,
        }
    }

    /// Whether the client has been given a part of something that has no end yet, by itself or as one who shares.
    pub(super) fn is_within(&self, reader: Option<&Reader>) -> bool {
        match &self.state {
            State::Reading(reading) => reading.is_within(),
            State::Sharing => reader.is_some_and(|reader| reader.behind == Maybe::NONE),
            _ => false,
        }
    }
}

impl DurableStreams {
    pub(super) fn new(settings: durable::Settings) -> Self {
        DurableStreams {
            store: Store::new(settings),
            woken: VecDeque::new(),
            level: HashMap::new(),
            timer: None,
            held: VecDeque::new(),
            done: None,
            recovered_streams: 0,
            recovered_damage: 0,
        }
    }

    /// Whether readers wait for the next turn.
    pub(super) fn is_busy(&self) -> bool {
        !self.woken.is_empty() || self.done.is_some()
    }
}

impl<I: Io> Shard<I> {
    pub(super) fn durable_now(&self) -> Now {
        let since_start_ms = (self.now_us - self.started_us) / 1000;
        let at_start_ms =
            self.settings.unix_time_at_start_s * 1000 + u64::from(self.settings.unix_time_at_start_ms);
        let unix_ms = at_start_ms + since_start_ms;
        // Weyl's sequence through a mixer (splitmix64): enough to spread what must not come together.
        let mut random = (self.settings.seed ^ self.begun).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Now { ms: self.now_ms(), unix_ms, random: random ^ (random >> 31) }
    }

    /// Takes a request's head; its body is collected.
    pub(super) fn begin_durable(&mut self, key: Key, head: &RequestHead<'_, '_>) {
        let client = self.streams.get(key).and_then(|stream| self.conns.get(stream.client?));
        let secure = client.is_some_and(|conn| conn.tls.is_some());
        let mut request = Request::parse(head, &self.settings.durable);
        if let Ok(request) = &mut request {
            request.secure = secure;
        }
        if let Some(stream) = self.streams.get_mut(key) {
            let body_bytes_max = self.settings.durable.body_bytes_max;
            let collecting = Collecting { request, body: Vec::new(), body_bytes_max };
            let state = State::Collecting(Box::new(collecting));
            stream.durable = Some(Box::new(Durable::new(state)));
            // Who asks before it sends is told before it sends.
            let too_large = matches!(head.framing, Framing::Length(length) if length > body_bytes_max);
            if too_large && head.expect_continue {
                self.refuse(key, Refusal::BodyTooLarge);
            }
        }
    }

    /// The request is whole: it is carried out.
    pub(super) fn durable_complete(&mut self, key: Key) {
        let now = self.durable_now();
        let Some(stream) = self.streams.get_mut(key) else { return };
        // No model is waited for, and a stream may be read for as long as it lasts.
        let total_due_ms = std::mem::replace(&mut stream.total_due_ms, u64::MAX);
        (stream.token_due_ms, stream.phase_due_ms) = (u64::MAX, u64::MAX);
        stream.streaming = false;
        let Some(durable) = &mut stream.durable else { return };
        durable.due_ms = total_due_ms;
        let State::Collecting(whole) = std::mem::replace(&mut durable.state, State::Answered) else { return };
        // What was not even tried need not wait for anything.
        let refuses = self.durable.store.refuses_changes();
        let Collecting { request, body, .. } = *whole;
        let (reply, changes) = match request {
            Err(fault) => (Reply::Answer(self.durable.store.refuse(&fault)), false),
            Ok(request) => match self.run_errand_for(key, request, body) {
                Ok(()) => return,
                Err((request, body)) => {
                    let changes = request.operation.is_change();
                    (self.durable.store.handle(&request, &body, key, now), changes)
                }
            },
        };
        self.follow_overdraft(key);
        match (reply, self.durable.store.must_wait().filter(|_| changes && !refuses)) {
            (Reply::Answer(answer), Some(record)) => self.hold_answer(key, answer, record),
            (reply, _) => self.durable_reply(key, reply),
        }
        self.wake_durable();
        self.follow_durable_timer();
    }

    pub(super) fn durable_reply(&mut self, key: Key, reply: Reply) {
        let (now_ms, leaving) = (self.now_ms(), self.leaving != Leaving::No);
        let (events_ms, long_poll_ms) = (self.settings.durable.events_ms, self.settings.durable.long_poll_ms);
        match reply {
            // It waited, and has been told something else meanwhile.
            Reply::Answer(_) if self.streams.get(key).is_none_or(|stream| stream.end.is_some()) => return,
            Reply::Answer(mut answer) => {
                let framing = Framing::Length(answer.body.len() as u64);
                self.durable_head(key, &mut answer, framing);
                if let Some(stream) = self.streams.get_mut(key)
                    && !stream.head_only
                    && !answer.body.is_empty()
                {
                    stream.append_response(&answer.body, self.now_us);
                }
                self.end_stream(key, End::Done);
            }
            Reply::Body(mut head, bytes, reading) => {
                self.durable_head(key, &mut head, Framing::Length(bytes));
                self.durable_begin_reading(key, reading);
            }
            Reply::Events(mut head, mut reading) => {
                if leaving {
                    reading.finish();
                }
                let chunked = self.streams.get(key).is_some_and(Stream::events_chunked);
                self.durable_head(
                    key,
                    &mut head,
                    if chunked { Framing::Chunked } else { Framing::UntilClose },
                );
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.answer = Answer::Events { early: false };
                    if let Some(durable) = &mut stream.durable {
                        durable.due_ms = durable.due_ms.min(after(now_ms, events_ms));
                    }
                }
                self.durable_begin_reading(key, reading);
            }
            Reply::Wait(poll) => {
                if let Some(stream) = self.streams.get_mut(key) {
                    // Its client's FIN means that it left.
                    stream.streaming = true;
                    stream.step(Step::PlainBody);
                    if let Some(durable) = &mut stream.durable {
                        durable.state = State::Polling(Box::new(poll));
                        durable.due_ms = durable.due_ms.min(after(now_ms, long_poll_ms));
                    }
                }
                if leaving {
                    self.durable_due(key);
                }
                self.follow_stream_timer(key);
            }
        }
        if let Some(client) = self.streams.get(key).and_then(|stream| stream.client) {
            self.mark_dirty(client);
        }
    }

    fn durable_head(&mut self, key: Key, head: &mut durable::Answer, framing: Framing) {
        let unix_time_s = self.unix_time_s();
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.status = head.status;
        stream.answer = Answer::Body(framing);
        stream.close |= framing == Framing::UntilClose || !stream.request_done;
        // What a GET would have had is not known.
        let framing = if stream.head_only { Framing::None } else { framing };
        head.lines.push_str(self.date.at(unix_time_s));
        self.scratch.clear();
        write_own_response_head(
            &mut self.scratch,
            head.status,
            stream.version,
            !stream.close,
            framing,
            &head.lines,
        );
        stream.append_response(&self.scratch, self.now_us);
    }

    fn durable_begin_reading(&mut self, key: Key, reading: Reading) {
        if let Some(stream) = self.streams.get_mut(key) {
            if stream.phase == protocol::phase::Phase::Connect {
                stream.step(Step::PlainBody);
            }
            if let Some(durable) = &mut stream.durable {
                durable.state = State::Reading(Box::new(reading));
            }
        }
        self.durable_fill(key);
    }

    /// Gives a reader what there is for it, as far as its client takes it.
    pub(super) fn durable_fill(&mut self, key: Key) {
        let now = self.durable_now();
        let high = self.settings.lag_high_bytes;
        let mut piece = std::mem::take(&mut self.scratch);
        let mut progress = Progress::More;
        while progress == Progress::More {
            let Some(stream) = self.streams.get_mut(key) else { break };
            // A tail has no client, and leaves those behind who are slow.
            let end = stream.response.end();
            let client = stream.client.and_then(|key| self.conns.get(key));
            let sent = client.map_or(end, |conn| conn.ledger.sent());
            if stream.end.is_some() || stream.paused || end - sent > high {
                break;
            }
            let Some(mut durable) = stream.durable.take() else { break };
            piece.clear();
            let State::Reading(reading) = &mut durable.state else {
                stream.durable = Some(durable);
                break;
            };
            progress = self.durable.store.read(reading, now, &mut piece, DURABLE_PIECE_BYTES);
            let events = reading.take_events();
            self.stats.counters.events += events;
            stream.events_sent += events;
            stream.durable = Some(durable);
            if piece.is_empty() {
                continue;
            }
            if stream.has_events_answer() {
                stream.append_block(&piece, self.now_us);
            } else {
                stream.append_body(&piece, self.now_us);
            }
            self.tail_grew(key);
        }
        self.scratch = piece;
        match progress {
            Progress::More | Progress::Waiting => {
                self.follow_marks(key);
                self.follow_stream_timer(key);
                if progress == Progress::Waiting {
                    self.share(key);
                }
            }
            Progress::Ended => self.durable_end(key, End::Done),
            Progress::Gone => self.durable_end(key, End::Gone),
        }
        self.appended(key);
    }

    pub(super) fn durable_end(&mut self, key: Key, end: End) {
        let Some(stream) = self.streams.get(key) else { return };
        // Between two events nothing is missing: its reader comes again, and is told then.
        let whole = stream.has_events_answer() && stream.durable.is_some() && !stream.is_within_event();
        self.end_stream(key, if whole { End::Done } else { end });
        self.durable_leave(key);
    }

    /// It reads no longer.
    pub(super) fn durable_leave(&mut self, key: Key) {
        if let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) {
            let state = std::mem::replace(&mut durable.state, State::Answered);
            self.durable_left(key, state);
        }
    }

    /// The same of one that is being freed.
    pub(super) fn durable_settle(&mut self, key: Key, durable: Durable) {
        self.durable_left(key, durable.state);
    }

    fn durable_left(&mut self, key: Key, state: State) {
        let now = self.durable_now();
        match state {
            State::Polling(poll) => self.durable.store.give_up(&poll, now),
            State::Reading(mut reading) => {
                self.forget_level(key, reading.shared());
                self.durable.store.leave(&mut reading, now);
            }
            State::Collecting(_)
            | State::Held(_)
            | State::Away(_)
            | State::Sharing
            | State::Returning(_)
            | State::Answered => {}
        }
    }

    /// A long-poll or an event stream is over, or the time of a request.
    pub(super) fn durable_due(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(stream) = self.streams.get_mut(key) else { return };
        let within = stream.is_within_event();
        if let Some(reader) = stream.reader.as_mut().filter(|_| within) {
            reader.finishing = true;
        }
        let Some(durable) = &mut stream.durable else { return };
        if matches!(durable.state, State::Held(_)) {
            // What leaves waits for the disk, which is not long.
            if durable.due_ms <= now_ms {
                self.give_held(key, false);
            }
            return;
        }
        if matches!(durable.state, State::Away(_)) {
            // The others answer soon, or leave.
            if durable.due_ms <= now_ms {
                durable.state = State::Answered;
                let answer = self.durable.store.refuse(&durable::UNSETTLED);
                self.durable_reply(key, Reply::Answer(answer));
            }
            return;
        }
        durable.due_ms = u64::MAX;
        match &mut durable.state {
            State::Polling(_) => self.durable_poll(key, true),
            State::Reading(reading) => {
                reading.finish();
                self.durable_fill(key);
            }
            // It ends when it has been sent that.
            State::Sharing if within => {}
            State::Sharing | State::Returning(_) => self.durable_end(key, End::Done),
            State::Collecting(_) | State::Held(_) | State::Away(_) | State::Answered => {}
        }
    }

    fn durable_poll(&mut self, key: Key, over: bool) {
        let now = self.durable_now();
        let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) else {
            return;
        };
        let State::Polling(poll) = &mut durable.state else { return };
        if let Some(reply) = self.durable.store.poll(poll, over, now) {
            durable.state = State::Answered;
            durable.due_ms = u64::MAX;
            self.durable_reply(key, reply);
        }
    }

    /// A sign of life for a reader that waits.
    pub(super) fn durable_heartbeat(&mut self, key: Key) {
        let now = self.durable_now();
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(durable) = &mut stream.durable else { return };
        self.scratch.clear();
        if let State::Reading(reading) = &mut durable.state {
            reading.write_heartbeat(&self.durable.store, now, &mut self.scratch);
        }
        stream.spoke_ms = now.ms;
        if !self.scratch.is_empty() {
            stream.append_block(&self.scratch, self.now_us);
            self.tail_grew(key);
        }
    }

    /// Notes whom the changes so far concern.
    pub(super) fn wake_durable(&mut self) {
        let mut woken = Vec::new();
        self.durable.store.take_woken(&mut woken);
        for key in woken {
            if let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut())
                && !std::mem::replace(&mut durable.queued, true)
            {
                self.durable.woken.push_back(key);
            }
        }
    }

    /// Serves those who were woken, as many as one turn has room for.
    pub(super) fn serve_durable(&mut self) {
        for _ in 0..DURABLE_WAKES_PER_TURN_MAX {
            let Some(key) = self.durable.woken.pop_front() else { break };
            let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) else {
                continue;
            };
            durable.queued = false;
            match durable.state {
                State::Polling(_) => self.durable_poll(key, false),
                State::Reading(_) => self.durable_fill(key),
                State::Collecting(_)
                | State::Held(_)
                | State::Away(_)
                | State::Sharing
                | State::Returning(_)
                | State::Answered => {}
            }
        }
    }

    /// Arms the timer for the next stream that may expire, and for the journal, if it is to fire earlier than it would.
    pub(super) fn follow_durable_timer(&mut self) {
        if self.leaving != Leaving::No {
            return;
        }
        let store = &self.durable.store;
        let due_ms =
            [store.next_due_ms(), store.next_job_ms()].into_iter().flatten().min().unwrap_or(u64::MAX);
        super::deadline::arm(&mut self.wheel, &mut self.durable.timer, due_ms, TimerOf::Durable);
    }

    /// Streams may have expired.
    pub(super) fn durable_expire(&mut self) {
        let now = self.durable_now();
        self.durable.store.expire(now);
        self.wake_durable();
        self.follow_durable_timer();
    }

    /// The shard leaves: who waits is sent away with what the protocol has for it, and comes again elsewhere or later.
    pub(super) fn durable_drain(&mut self) {
        if let Some((timer, _)) = self.durable.timer.take() {
            self.wheel.remove(timer);
        }
        let readers: Vec<Key> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.durable.is_some() && stream.end.is_none())
            .map(|(key, _)| key)
            .collect();
        for key in readers {
            self.durable_due(key);
        }
    }
}

fn after(since_ms: u64, ms: u32) -> u64 {
    if ms == 0 { u64::MAX } else { since_ms + u64::from(ms) }
}
