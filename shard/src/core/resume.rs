//! Streams that outlive their connections. A streamed answer gets an id, and its log is kept: its client may leave and come
//! back, others may read with it, and anyone who knows the id may stop it.
//!
//! ```text
//!   backend ─► Stream (producer) ─► its log ─┬─► the client that asked, straight from the log
//!                  │ named by                ├─► reader: a stream of its own (head, errors), events from that log
//!               Source ──────────────────────┴─► reader
//!                  └─ over: takes the log, keeps it for a while
//! ```
//! When a second one comes to read, the first becomes a reader as well, so that neither can hold up the other. All lend the same
//! bytes. A reader whose range the window drops finishes what it was lent, which ends between two events, and is told there.

use super::relay::{EVENT_STREAM_HEADERS, ExtraLines};
use super::stream::{Answer, Stream};
use super::{Leaving, Shard, TimerOf};
use crate::io::Io;
use crate::settings::{OnLeave, Resume, Settings, SlowReader};
use protocol::dialect::Dialect;
use protocol::fault::{Fault, write_json_string};
use protocol::http::{Framing, RequestHead, Version, write_own_response_head};
use protocol::limits::{READERS_PER_TURN_MAX, RESUME_STREAM_COST_BYTES};
use protocol::log::{Lent, Log, Place};
use protocol::phase::{End, Phase, Step};
use protocol::resume::{self, Ask, StreamId, TAG_BYTES, Want};
use protocol::slots::{Key, Slots};
use protocol::wheel::TimerId;
use ring::hmac;
use std::collections::{HashMap, VecDeque};
use std::fmt::Write;

/// The streams of a shard that can be resumed.
pub(super) struct Kept {
    /// Authenticates their ids.
    key: hmac::Key,
    shard: u16,
    /// Of the next stream.
    next_number: u64,
    pub(super) sources: Slots<Source>,
    by_number: HashMap<u64, Key>,
    /// Those that are over, in the order in which they ended; some are gone by now.
    over: VecDeque<Key>,
    /// Those that are not, in the order in which they are made to forget; some are over by now.
    live: VecDeque<Key>,
    /// Those whose readers have something to do in this turn.
    stirred: VecDeque<Key>,
    /// Readers that wait for their turn to begin.
    waiting: VecDeque<Key>,
    /// How many may begin, in millionths, and when that was reckoned, µs.
    allowance: (u64, u64),
    pub(super) waiting_timer: Option<TimerId>,
    /// Memory of what is kept.
    bytes: u64,
    /// Where the next attempt to make room is worth it.
    make_room_at: u64,
    detached: usize,
}

/// A stream as those know it who come by its id.
pub(super) struct Source {
    number: u64,
    route: usize,
    dialect: Dialect,
    /// Its log is in chunks.
    chunked: bool,
    /// Who fills the log, and has it; none when it is over.
    producer: Option<Key>,
    /// When it is over: the log.
    log: Log,
    end: Option<End>,
    /// Streams that read it, each of which knows its place here.
    pub(super) readers: Vec<Key>,
    /// How many of them this round has served.
    served: usize,
    stirred: bool,
    /// Nobody reads it, and it goes on.
    detached: bool,
    /// What its slowest reader that counts has had; what the one that left had.
    owed_from: u64,
    began_ms: u64,
    ended_ms: u64,
    /// Memory accounted for, once it is over.
    charged: u64,
    /// For its end without a client, or its removal.
    pub(super) timer: Option<(TimerId, u64)>,
    /// Its time is over; it goes when its last reader has.
    expired: bool,
}

/// A reader's place in a stream that another one fills.
pub(crate) struct Reader {
    pub(super) source: Key,
    /// Where among the source's readers.
    place: usize,
    /// Next byte of the source's log to be lent.
    at: u64,
    /// Of what was lent of it: what is in flight, or is left of it.
    lent: Option<Lent>,
    /// Next byte of its own log to be lent.
    own_at: u64,
    /// The range in flight is of its own log.
    own_lent: bool,
    /// Waits for its turn to begin.
    pub(super) waits: bool,
}

impl Reader {
    /// Whether a send of something that it was lent may be under way.
    pub(super) fn is_sending(&self) -> bool {
        self.own_lent || self.lent.is_some()
    }

    /// What has been confirmed of the source's log.
    fn confirmed(&self) -> u64 {
        self.at - self.lent.as_ref().map_or(0, |lent| lent.len() as u64)
    }
}

/// What a source has for a reader at a place.
enum Supply {
    Range(Lent),
    /// Nothing yet.
    Later,
    /// Nothing more.
    Over(End),
    /// The window has left it behind.
    Dropped,
}

/// What there is of kept streams at an instant.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct KeptTotals {
    /// Streams under way that have an id.
    pub live: usize,
    /// Streams that are over and can still be read.
    pub over: usize,
    /// Streams under way without a client.
    pub detached: usize,
    /// Readers by id.
    pub readers: usize,
    /// Readers that wait for their turn to begin.
    pub waiting: usize,
    /// Memory, bytes.
    pub bytes: u64,
}

impl Kept {
    pub(super) fn new(settings: &Settings, shard: usize) -> Self {
        // What each costs at least bounds how many there can be.
        let most = settings.resume_bytes_max / RESUME_STREAM_COST_BYTES;
        let most = usize::try_from(most).unwrap_or(usize::MAX).max(settings.connections_max);
        Kept {
            key: hmac::Key::new(hmac::HMAC_SHA256, &settings.stream_key),
            shard: u16::try_from(shard).unwrap_or(u16::MAX),
            next_number: 1,
            sources: Slots::new(most.min(u32::MAX as usize)),
            by_number: HashMap::new(),
            over: VecDeque::new(),
            live: VecDeque::new(),
            stirred: VecDeque::new(),
            waiting: VecDeque::new(),
            allowance: (0, 0),
            waiting_timer: None,
            bytes: 0,
            make_room_at: settings.resume_bytes_max,
            detached: 0,
        }
    }

    fn tag(&self, shard: u16, number: u64) -> [u8; TAG_BYTES] {
        let tag = hmac::sign(&self.key, &StreamId::authenticated(0, shard, number));
        let mut short = [0; TAG_BYTES];
        short.copy_from_slice(&tag.as_ref()[..TAG_BYTES]);
        short
    }

    fn id(&self, number: u64) -> StreamId {
        StreamId { node: 0, shard: self.shard, number, tag: self.tag(self.shard, number) }
    }

    /// Whether it is the id of a stream that there was.
    fn is_ours(&self, id: &StreamId) -> bool {
        let tag = self.tag(id.shard, id.number);
        // Without an early end: how long it takes must not tell how much was right.
        let differ = tag.iter().zip(&id.tag).fold(0, |differ, (a, b)| differ | (a ^ b));
        id.node == 0 && differ == 0
    }

    /// Whether readers wait for the next turn.
    pub(super) fn is_busy(&self) -> bool {
        !self.stirred.is_empty()
    }

    fn stir(&mut self, key: Key) {
        if let Some(source) = self.sources.get_mut(key)
            && !std::mem::replace(&mut source.stirred, true)
        {
            self.stirred.push_back(key);
        }
    }

    pub(super) fn totals(&self) -> KeptTotals {
        let live = self.sources.iter().filter(|(_, source)| source.producer.is_some()).count();
        KeptTotals {
            live,
            over: self.sources.len() - live,
            detached: self.detached,
            readers: self.sources.iter().map(|(_, source)| source.readers.len()).sum(),
            waiting: self.waiting.len(),
            bytes: self.bytes,
        }
    }
}

impl<I: Io> Shard<I> {
    fn resume_of(&self, route: usize) -> Option<Resume> {
        self.settings.routes[route].resume
    }

    /// Gives a stream that is about to answer with events its id, and writes the head line that tells it.
    pub(super) fn name_stream(&mut self, key: Key, lines: &mut ExtraLines) {
        let now_ms = self.now_ms();
        if self.leaving != Leaving::No {
            return;
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        if self.settings.routes[stream.route].resume.is_none() || stream.head_only || stream.source.is_some()
        {
            return;
        }
        let number = self.kept.next_number;
        let source = Source {
            number,
            route: stream.route,
            dialect: stream.dialect,
            chunked: stream.events_chunked(),
            producer: Some(key),
            log: Log::new(),
            end: None,
            readers: Vec::new(),
            served: 0,
            stirred: false,
            detached: false,
            owed_from: 0,
            began_ms: now_ms,
            ended_ms: 0,
            charged: 0,
            timer: None,
            expired: false,
        };
        let Ok(source) = self.kept.sources.insert(source) else { return };
        self.kept.next_number += 1;
        self.kept.by_number.insert(number, source);
        self.kept.live.push_back(source);
        stream.source = Some(source);
        stream.charged = RESUME_STREAM_COST_BYTES;
        self.kept.bytes += RESUME_STREAM_COST_BYTES;
        push_id_line(lines, &self.kept.id(number));
    }

    /// From here on a named stream's log is kept; what it holds so far is the head.
    pub(super) fn keep_log(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if let (Some(_), Some(resume)) = (stream.source, self.settings.routes[stream.route].resume) {
            stream.response.keep(resume.window_bytes);
        }
    }

    /// Something was appended for whoever reads a stream.
    pub(super) fn appended(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key) else { return };
        let source = stream.source;
        if let Some(client) = stream.client {
            self.mark_dirty(client);
        }
        if let Some(source) = source {
            self.kept.stir(source);
        }
    }

    // ---- the client leaves

    /// Whether a stream goes on when this connection, its client's, is gone.
    pub(super) fn may_detach(&self, key: Key) -> bool {
        let Some(stream) = self.streams.get(key) else { return false };
        let Some(source) = stream.source.and_then(|source| self.kept.sources.get(source)) else {
            return false;
        };
        // One that was not even sent the head does not know the id.
        let knows =
            stream.client.and_then(|key| self.conns.get(key)).is_some_and(|conn| conn.ledger.sent() > 0);
        let wanted = match self.resume_of(stream.route).map(|resume| resume.on_leave) {
            None => false,
            Some(OnLeave::Cancel) => !source.readers.is_empty(),
            Some(OnLeave::Detach(_) | OnLeave::Finish) => {
                knows && (self.kept.detached < self.settings.detached_max || !source.readers.is_empty())
            }
        };
        wanted && stream.end.is_none() && stream.request_done && self.leaving == Leaving::No
    }

    /// The client is gone, the stream goes on.
    pub(super) fn detach(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(source_key) = stream.source else { return };
        let Some(client) = stream.client.take() else { return };
        let sent = self.conns.get(client).map_or(0, |conn| conn.ledger.sent());
        if let Some(conn) = self.conns.get_mut(client) {
            conn.stream = None;
        }
        self.stats.counters.detaches += 1;
        if let Some(source) = self.kept.sources.get_mut(source_key) {
            source.owed_from = sent;
        }
        self.orphan(source_key);
        self.follow_marks(key);
    }

    /// If nobody reads a stream under way, its route says what becomes of it.
    fn orphan(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        let Some(producer) = source.producer else { return };
        let read = self.streams.get(producer).is_some_and(|stream| stream.client.is_some());
        if read || !source.readers.is_empty() || source.detached {
            return;
        }
        let on_leave = self.settings.routes[source.route].resume.map(|resume| resume.on_leave);
        let room = self.leaving == Leaving::No && self.kept.detached < self.settings.detached_max;
        match on_leave {
            Some(OnLeave::Detach(ms)) if room => {
                let due_ms = now_ms + u64::from(ms);
                source.detached = true;
                self.kept.detached += 1;
                super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(key));
            }
            Some(OnLeave::Finish) if room => {
                source.detached = true;
                self.kept.detached += 1;
            }
            _ => self.end_stream(producer, End::ClientLeft),
        }
    }

    /// Somebody reads it again.
    fn adopt(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if std::mem::take(&mut source.detached) {
            self.kept.detached -= 1;
            if let Some((timer, _)) = source.timer.take() {
                self.wheel.remove(timer);
            }
        }
    }

    // ---- the stream ends

    /// A stream is over: who comes by its id finds its log here.
    pub(super) fn release_source(&mut self, key: Key) {
        let now_ms = self.now_ms();
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(source_key) = stream.source.take() else { return };
        let (mut log, charged) = (std::mem::take(&mut stream.response), std::mem::take(&mut stream.charged));
        let end = stream.end.unwrap_or(End::ClientLeft);
        self.adopt(source_key);
        let resume = self.resume_of(self.streams.get(key).map_or(0, |stream| stream.route));
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        log.release(log.end());
        if end == End::StreamStopped && source.readers.is_empty() {
            log = Log::new();
        }
        let forsaken = matches!(end, End::ClientLeft | End::WriteStall | End::Abandoned);
        let keep_ms = resume.map_or(0, |resume| resume.keep_ms);
        source.producer = None;
        source.charged = log.memory_bytes() as u64 + RESUME_STREAM_COST_BYTES;
        self.kept.bytes = self.kept.bytes - charged + source.charged;
        source.log = log;
        (source.end, source.ended_ms) = (Some(end), now_ms);
        source.expired = forsaken || keep_ms == 0 || self.leaving != Leaving::No;
        if source.expired && source.readers.is_empty() {
            return self.remove_source(source_key);
        }
        let due_ms = now_ms + u64::from(keep_ms);
        super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(source_key));
        self.kept.over.push_back(source_key);
        self.kept.stir(source_key);
        self.make_room();
    }

    pub(super) fn source_due(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if let Some(producer) = source.producer {
            // Somebody may have come back in this very turn.
            if source.detached {
                self.end_stream(producer, End::Abandoned);
            }
            return;
        }
        source.expired = true;
        if source.readers.is_empty() {
            self.remove_source(key);
        }
    }

    fn remove_source(&mut self, key: Key) {
        let Some(source) = self.kept.sources.remove(key) else { return };
        if let Some((timer, _)) = source.timer {
            self.wheel.remove(timer);
        }
        self.kept.by_number.remove(&source.number);
        self.kept.bytes -= source.charged;
        // Names of those that are gone are not kept for ever.
        for names in [&mut self.kept.over, &mut self.kept.live] {
            if names.len() > 64 && names.len() > 2 * self.kept.sources.len() {
                names.retain(|&name| self.kept.sources.get(name).is_some());
            }
        }
    }

    /// Nobody can come back to a shard that leaves: what nobody reads now is let go.
    pub(super) fn drain_kept(&mut self) {
        let keys: Vec<Key> = self.kept.sources.iter().map(|(key, _)| key).collect();
        for key in keys {
            let Some(source) = self.kept.sources.get_mut(key) else { continue };
            match source.producer {
                Some(producer) if source.detached => self.end_stream(producer, End::Drain),
                Some(_) => {}
                None => {
                    source.expired = true;
                    if source.readers.is_empty() {
                        self.remove_source(key);
                    }
                }
            }
        }
    }

    // ---- memory

    /// What a stream's history takes; called when it may have changed.
    pub(super) fn charge(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.source.is_none() {
            return;
        }
        let now = stream.response.history_bytes() + RESUME_STREAM_COST_BYTES;
        let before = std::mem::replace(&mut stream.charged, now);
        self.kept.bytes = self.kept.bytes - before + now;
        if self.kept.bytes > self.kept.make_room_at {
            self.make_room();
        }
    }

    /// Gives up what is kept, the least missed first, until there is some room again: streams that are over, oldest first; then
    /// the oldest half of the events of streams without a client; then that of what others have read.
    fn make_room(&mut self) {
        let most = self.settings.resume_bytes_max;
        if self.kept.bytes <= most {
            self.kept.make_room_at = most;
            return;
        }
        let enough = most - most / 16;
        for _ in 0..self.kept.over.len() {
            if self.kept.bytes <= enough {
                break;
            }
            let Some(key) = self.kept.over.pop_front() else { break };
            match self.kept.sources.get(key) {
                None => {}
                Some(source) if source.readers.is_empty() => {
                    self.stats.counters.kept_evictions += 1;
                    self.remove_source(key);
                }
                Some(_) => self.kept.over.push_back(key),
            }
        }
        for detached in [true, false] {
            for _ in 0..self.kept.live.len() {
                if self.kept.bytes <= enough {
                    break;
                }
                let Some(key) = self.kept.live.pop_front() else { break };
                let Some(source) = self.kept.sources.get(key) else { continue };
                let Some(producer) = source.producer else { continue };
                self.kept.live.push_back(key);
                if source.detached == detached {
                    self.forget_half(producer);
                }
            }
        }
        // Where nothing can be given up, another attempt is worth it only when there is more.
        self.kept.make_room_at = most.max(self.kept.bytes + most / 16);
    }

    fn forget_half(&mut self, producer: Key) {
        let Some(stream) = self.streams.get_mut(producer) else { return };
        let history = stream.response.history_bytes();
        stream.response.forget(history / 2);
        let left = stream.response.history_bytes();
        self.stats.counters.kept_forgotten_bytes += history - left;
        self.kept.bytes -= stream.charged - (left + RESUME_STREAM_COST_BYTES).min(stream.charged);
        stream.charged = (left + RESUME_STREAM_COST_BYTES).min(stream.charged);
    }

    // ---- requests for streams

    /// The shard that a stream's path names, if that is another one.
    pub(super) fn shard_of_stream(&self, path: &str) -> Option<usize> {
        let id = Ask::id_of(path)?;
        (id.shard != self.kept.shard && self.kept.is_ours(&id)).then_some(usize::from(id.shard))
    }

    /// Answers a request for a stream.
    pub(super) fn ask(&mut self, key: Key, ask: Result<Ask, Fault>) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.streaming = false;
            (stream.token_due_ms, stream.phase_due_ms, stream.total_due_ms) = (u64::MAX, u64::MAX, u64::MAX);
        }
        let found = ask.and_then(|ask| self.find(&ask.id).map(|source| (source, ask.want)));
        match found {
            Err(fault) => self.answer_fault(key, &fault, ""),
            Ok((source, Want::Status)) => self.answer_status(key, source),
            Ok((source, Want::Stop)) => self.stop_stream(key, source),
            Ok((source, Want::Events { after })) => self.begin_reading(key, source, after),
        }
    }

    fn find(&self, id: &StreamId) -> Result<Key, Fault> {
        if !self.kept.is_ours(id) {
            return Err(resume::NOT_FOUND);
        }
        let here = self.kept.by_number.get(&id.number).filter(|_| id.shard == self.kept.shard);
        here.copied().ok_or(resume::EXPIRED)
    }

    fn source_log<'s>(&'s self, source: &'s Source) -> Option<&'s Log> {
        match source.producer {
            Some(producer) => self.streams.get(producer).map(|stream| &stream.response),
            None => Some(&source.log),
        }
    }

    fn answer_status(&mut self, key: Key, source_key: Key) {
        let now_ms = self.now_ms();
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let Some(log) = self.source_log(source) else { return };
        let producer = source.producer.and_then(|producer| self.streams.get(producer));
        let pending = |reader: &Key| {
            let reader = self.streams.get(*reader).and_then(|stream| stream.reader.as_ref());
            reader.map(|reader| log.end() - reader.confirmed())
        };
        let client = producer.and_then(|stream| self.conns.get(stream.client?));
        let client_pending = client.map(|conn| conn.ledger.lag(log.end()));
        let mut readers: Vec<u64> = source.readers.iter().filter_map(pending).chain(client_pending).collect();
        readers.sort_unstable_by(|a, b| b.cmp(a));
        let phase = match producer {
            Some(_) if source.detached => "detached",
            Some(stream) => stream.phase.name(),
            None => "over",
        };
        let earliest = match log.behind(0) {
            Place::Gone(first) => first + 1,
            _ => 1,
        };
        let quiet_since_ms = producer.map_or(source.ended_ms, |stream| stream.last_token_us / 1000);
        let mut body = String::from("{\"id\":\"");
        // Into a string nothing fails.
        let _ = write!(body, "{}\",\"phase\":\"{phase}\",\"end\":", self.kept.id(source.number));
        match source.end {
            Some(end) => {
                let _ = write!(body, "\"{}\"", end.name());
            }
            None => body.push_str("null"),
        }
        let _ = write!(
            body,
            ",\"dialect\":\"{}\",\"earliest_event_id\":{earliest},\"last_event_id\":{},\"bytes\":{},\"held_bytes\":{},\
             \"age_ms\":{},\"quiet_ms\":{},\"readers\":{},\"pending_bytes\":[",
            source.dialect.name(),
            log.last_event_id(),
            log.end(),
            log.end() - log.start(),
            now_ms - source.began_ms,
            now_ms.saturating_sub(quiet_since_ms),
            readers.len(),
        );
        // The worst are enough to see who is stuck.
        for (nth, pending) in readers.iter().take(10).enumerate() {
            let _ = write!(body, "{}{pending}", if nth > 0 { "," } else { "" });
        }
        body.push_str("],\"model\":");
        match producer.and_then(|stream| stream.facts.model.as_deref()) {
            Some(model) => {
                let mut text = Vec::new();
                write_json_string(&mut text, model);
                body.push_str(std::str::from_utf8(&text).unwrap_or("null"));
            }
            None => body.push_str("null"),
        }
        body.push_str("}\n");
        self.answer_json(key, 200, body.as_bytes());
    }

    /// Somebody wants a stream to end.
    fn stop_stream(&mut self, key: Key, source_key: Key) {
        self.stats.counters.stream_stops += 1;
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        match source.producer {
            Some(producer) => self.end_stream(producer, End::StreamStopped),
            None => {
                // It was over: from now on it cannot be read.
                source.end = Some(End::StreamStopped);
                if source.readers.is_empty() {
                    let freed = source.log.memory_bytes() as u64;
                    source.log = Log::new();
                    source.charged -= freed.min(source.charged);
                    self.kept.bytes -= freed.min(self.kept.bytes);
                }
            }
        }
        self.answer_empty(key, 204);
    }

    fn begin_reading(&mut self, key: Key, source_key: Key, after: u64) {
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let stopped = match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(stream) => stream.end == Some(End::StreamStopped),
            None => source.end == Some(End::StreamStopped),
        };
        if stopped {
            return self.answer_fault(key, &resume::STOPPED, "");
        }
        let Some(log) = self.source_log(source) else { return };
        let (place, last, done) = (log.behind(after), log.last_event_id(), source.end == Some(End::Done));
        let Some(stream) = self.streams.get(key) else { return };
        if source.chunked && stream.version == Version::Http10 {
            return self.answer_fault(key, &resume::NEEDS_HTTP_1_1, "");
        }
        match place {
            // All of it was seen: to an `EventSource` this says not to come back.
            Place::At(_) if done && after == last && last > 0 => self.answer_empty(key, 204),
            Place::At(at) => self.attach_reader(key, source_key, at, after),
            Place::Ahead => self.answer_fault(key, &resume::AHEAD, ""),
            Place::Gone(first) => {
                let line = format!("Tokenring-Earliest-Event-ID: {first}\r\n");
                self.answer_fault(key, &resume::BEFORE_WINDOW, &line);
            }
        }
    }

    fn attach_reader(&mut self, key: Key, source_key: Key, at: u64, after: u64) {
        let (now_us, now_ms, unix_time_s) = (self.now_us, self.now_ms(), self.unix_time_s());
        self.stats.counters.resumes += 1;
        self.split(source_key);
        self.adopt(source_key);
        let retry_ms = 500 + self.durable_now().random % 1000;
        let may_begin = self.may_begin_reader();
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(stream) = self.streams.get_mut(key) else { return };
        let place = source.readers.len();
        source.readers.push(key);
        let (dialect, chunked, number) = (source.dialect, source.chunked, source.number);
        let id = self.kept.id(number);
        let framing = if chunked { Framing::Chunked } else { Framing::UntilClose };
        stream.close |= !chunked;
        stream.status = 200;
        stream.answer = Answer::Events { early: false };
        let mut lines = ExtraLines::new(EVENT_STREAM_HEADERS);
        lines.push(self.date.at(unix_time_s));
        push_id_line(&mut lines, &id);
        lines.push("Tokenring-Last-Event-ID: ");
        lines.push(&after.to_string());
        lines.push("\r\n");
        self.scratch.clear();
        write_own_response_head(
            &mut self.scratch,
            200,
            stream.version,
            !stream.close,
            framing,
            lines.as_str(),
        );
        stream.append_response(&self.scratch, now_us);
        // From here on it speaks as the stream does that it reads.
        stream.dialect = dialect;
        stream.version = if chunked { Version::Http11 } else { Version::Http10 };
        // Without a blank line of its own: it opens the first event.
        stream.append_block(format!("retry: {retry_ms}\n").as_bytes(), now_us);
        if !may_begin {
            stream.append_block(dialect.heartbeat(), now_us);
            self.stats.counters.resumes_delayed += 1;
            self.kept.waiting.push_back(key);
        }
        stream.step(Step::EventStream);
        stream.step(Step::FirstToken);
        stream.reader = Some(Box::new(Reader {
            source: source_key,
            place,
            at,
            lent: None,
            own_at: 0,
            own_lent: false,
            waits: !may_begin,
        }));
        let client = stream.client;
        self.kept.stir(source_key);
        self.follow_waiting(now_ms);
        self.follow_stream_timer(key);
        if let Some(client) = client {
            self.mark_dirty(client);
        }
    }

    /// The client that a stream was asked for by becomes one of its readers.
    fn split(&mut self, source_key: Key) {
        let now_us = self.now_us;
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(producer_key) = source.producer else { return };
        let Some(producer) = self.streams.get_mut(producer_key) else { return };
        let Some(client) = producer.client else { return };
        // One that is still sending its request is needed where it is.
        if !producer.request_done || producer.end.is_some() {
            return;
        }
        let Some(conn) = self.conns.get(client) else { return };
        let (sent, in_flight) = (conn.ledger.sent(), conn.ledger.in_flight());
        // With TLS what is in flight are records: nothing of the log is lent.
        let lent =
            if conn.tls.is_none() && in_flight > 0 { producer.response.lend(sent, in_flight) } else { None };
        let mut stream = Stream::new(client, producer.route, producer.dialect, producer.version, now_us);
        stream.phase = Phase::Streaming;
        stream.answer = producer.answer;
        (stream.status, stream.close, stream.streaming) = (producer.status, producer.close, true);
        (stream.started_us, stream.asked_us) = (producer.started_us, producer.asked_us);
        (stream.upstream, stream.first_token_us) = (producer.upstream, producer.first_token_us);
        stream.description = producer.description.take();
        stream.facts.model = producer.facts.model.clone();
        stream.reader = Some(Box::new(Reader {
            source: source_key,
            place: source.readers.len(),
            at: sent + u64::from(in_flight),
            lent,
            own_at: 0,
            own_lent: false,
            waits: false,
        }));
        let Ok(reader_key) = self.streams.insert(stream) else { return };
        source.readers.push(reader_key);
        if let Some(producer) = self.streams.get_mut(producer_key) {
            producer.client = None;
        }
        if let Some(conn) = self.conns.get_mut(client) {
            conn.stream = Some(reader_key);
        }
        self.kept.stir(source_key);
    }

    // ---- reading

    /// Takes the next range that a reader's connection is to send. What it is told of its own comes first, but never within
    /// an event.
    pub(super) fn next_of_reader(&mut self, key: Key, bytes_max: u32, sealed: bool) -> Option<Lent> {
        loop {
            let stream = self.streams.get_mut(key)?;
            let reader = stream.reader.as_mut()?;
            if let Some(rest) = &reader.lent {
                return Some(rest.clone());
            }
            if let Some(range) = stream.response.lend(reader.own_at, bytes_max) {
                if sealed {
                    reader.own_at += range.len() as u64;
                    stream.response.release(reader.own_at);
                } else {
                    reader.own_lent = true;
                }
                return Some(range);
            }
            if stream.produced || reader.waits {
                return None;
            }
            let (source, at) = (reader.source, reader.at);
            match self.supply(source, at, bytes_max) {
                Supply::Range(range) => {
                    let reader = self.streams.get_mut(key)?.reader.as_mut()?;
                    reader.at += range.len() as u64;
                    reader.lent = (!sealed).then(|| range.clone());
                    return Some(range);
                }
                Supply::Later => return None,
                Supply::Over(end) => {
                    self.reader_over(key, end);
                    return None;
                }
                Supply::Dropped => self.reader_lagged(key),
            }
        }
    }

    fn supply(&self, source: Key, at: u64, bytes_max: u32) -> Supply {
        let Some(source) = self.kept.sources.get(source) else { return Supply::Over(End::Gone) };
        let Some(log) = self.source_log(source) else { return Supply::Over(End::Gone) };
        if at < log.start() {
            return Supply::Dropped;
        }
        let end = match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(stream) if stream.produced => stream.end,
            Some(_) => None,
            None => source.end,
        };
        match (log.lend(at, bytes_max), end) {
            (Some(range), _) => Supply::Range(range),
            (None, Some(end)) => Supply::Over(end),
            (None, None) => Supply::Later,
        }
    }

    /// It has all of its stream, the end included.
    fn reader_over(&mut self, key: Key, end: End) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.end = Some(end);
        stream.produced = true;
        stream.close |= end != End::Done;
        if stream.phase != Phase::Finishing {
            stream.step(Step::ProducerDone);
        }
    }

    /// The window has left a reader behind.
    fn reader_lagged(&mut self, key: Key) {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        let Some(source) = self.kept.sources.get(reader.source) else { return };
        let skip = self.settings.routes[source.route]
            .resume
            .is_some_and(|resume| resume.slow_reader == SlowReader::Skip);
        let log = match source.producer {
            Some(producer) => self
                .streams
                .get(producer)
                .map(|stream| (stream.response.end(), stream.response.last_event_id())),
            None => Some((source.log.end(), source.log.last_event_id())),
        };
        let (Some((end, last)), true) = (log, skip) else {
            self.stats.counters.readers_dropped += 1;
            return self.end_stream(key, End::Lagged);
        };
        self.stats.counters.readers_skipped += 1;
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        reader.at = end;
        // A name of its own, so that only who knows it sees it.
        let gap = format!("event: tokenring.gap\ndata: {{\"last_event_id\":{last}}}\n\n");
        stream.append_block(gap.as_bytes(), now_us);
    }

    /// A send of a reader's has ended.
    pub(super) fn reader_confirmed(&mut self, key: Key, bytes: u32) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        let source = reader.source;
        if std::mem::take(&mut reader.own_lent) {
            reader.own_at += u64::from(bytes);
            stream.response.release(reader.own_at);
        } else if let Some(lent) = reader.lent.take() {
            reader.lent = lent.skip(bytes);
        }
        if self.is_held_up(source) {
            self.kept.stir(source);
        }
    }

    /// Whether a source follows its readers, instead of leaving them behind.
    fn is_held_up(&self, key: Key) -> bool {
        let Some(source) = self.kept.sources.get(key) else { return false };
        let slow_reader = self.resume_of(source.route).map(|resume| resume.slow_reader);
        source.producer.is_some()
            && match slow_reader {
                Some(SlowReader::Block) => true,
                Some(SlowReader::Auto) => source.readers.len() == 1,
                _ => false,
            }
    }

    /// A reader's stream is over, for whatever reason.
    pub(super) fn reader_left(&mut self, reader: &Reader) {
        let Some(source) = self.kept.sources.get_mut(reader.source) else { return };
        source.readers.swap_remove(reader.place);
        if let Some(&moved) = source.readers.get(reader.place)
            && let Some(moved) = self.streams.get_mut(moved).and_then(|stream| stream.reader.as_mut())
        {
            moved.place = reader.place;
        }
        if source.readers.is_empty() {
            source.owed_from = source.owed_from.max(reader.confirmed());
        }
        if source.producer.is_none() && source.expired && source.readers.is_empty() {
            return self.remove_source(reader.source);
        }
        self.kept.stir(reader.source);
        self.orphan(reader.source);
    }

    // ---- once per turn

    /// Lets those readers send for whom there is something, as many as one turn has room for, and the sources follow them.
    pub(super) fn serve_readers(&mut self) {
        let mut room = READERS_PER_TURN_MAX;
        for _ in 0..self.kept.stirred.len() {
            let Some(key) = self.kept.stirred.pop_front() else { break };
            let Some(source) = self.kept.sources.get_mut(key) else { continue };
            if source.served == 0 {
                source.stirred = false;
            }
            let (from, all) = (source.served, source.readers.len());
            let to = all.min(from + room);
            room -= to.saturating_sub(from);
            source.served = if to < all { to } else { 0 };
            let unfinished = source.served > 0;
            for nth in from..to {
                let reader = self.kept.sources.get(key).and_then(|source| source.readers.get(nth)).copied();
                if let Some(client) = reader.and_then(|reader| self.streams.get(reader)?.client) {
                    self.mark_dirty(client);
                }
            }
            if unfinished {
                // The others first, then the rest of its readers.
                if let Some(source) = self.kept.sources.get_mut(key) {
                    source.stirred = true;
                }
                self.kept.stirred.push_back(key);
            }
            self.follow_readers(key);
            if room == 0 {
                break;
            }
        }
    }

    /// What the slowest reader that counts has had is what the log need not hold for it.
    fn follow_readers(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get(key) else { return };
        let Some(producer) = source.producer else { return };
        if source.detached || self.streams.get(producer).is_none_or(|stream| stream.client.is_some()) {
            return;
        }
        let Some(log) = self.source_log(source) else { return };
        let slowest = |readers: &[Key]| {
            let confirmed = |key: &Key| Some(self.streams.get(*key)?.reader.as_ref()?.confirmed());
            readers.iter().filter_map(confirmed).min()
        };
        let owed_from =
            if self.is_held_up(key) { slowest(&source.readers) } else { None }.unwrap_or(log.end());
        if let Some(source) = self.kept.sources.get_mut(key) {
            source.owed_from = owed_from;
        }
        if let Some(stream) = self.streams.get_mut(producer) {
            stream.response.release(owed_from);
        }
        self.charge(producer);
        self.follow_marks(producer);
    }

    /// What of a stream's log is owed to readers by id, and from which lag on its backend is paused; none: it has a client.
    pub(super) fn owed_to_readers(&self, stream: &Stream) -> Option<(u64, u64)> {
        let source = stream.source.filter(|_| stream.client.is_none())?;
        let source = self.kept.sources.get(source)?;
        let window_bytes = self.resume_of(stream.route).map_or(0, |resume| resume.window_bytes);
        let high = match source.detached {
            // Half of the window for what comes, half for what its client may not have seen.
            true => self.settings.lag_high_bytes.max(window_bytes / 2),
            false => self.settings.lag_high_bytes,
        };
        Some((stream.response.end() - source.owed_from.min(stream.response.end()), high))
    }

    /// Whether somebody is there to be told that a stream without a client lives.
    pub(super) fn has_readers(&self, stream: &Stream) -> bool {
        let source = stream.source.and_then(|source| self.kept.sources.get(source));
        source.is_some_and(|source| !source.readers.is_empty())
    }

    // ---- the pace of those who come back

    /// Takes one of the places that this moment has.
    fn may_begin_reader(&mut self) -> bool {
        let (mut parts, since_us) = self.kept.allowance;
        let per_s = u64::from(self.settings.resumes_per_s);
        // A tenth of a second's worth may begin at once.
        parts =
            (parts + (self.now_us - since_us).min(1_000_000) * per_s).min((per_s * 100_000).max(1_000_000));
        let may = parts >= 1_000_000;
        self.kept.allowance = (if may { parts - 1_000_000 } else { parts }, self.now_us);
        may
    }

    pub(super) fn begin_waiting(&mut self) {
        while let Some(&key) = self.kept.waiting.front() {
            let waits = self
                .streams
                .get(key)
                .and_then(|stream| stream.reader.as_ref())
                .is_some_and(|reader| reader.waits);
            if waits && !self.may_begin_reader() {
                break;
            }
            self.kept.waiting.pop_front();
            let Some(stream) = self.streams.get_mut(key).filter(|_| waits) else { continue };
            if let Some(reader) = &mut stream.reader {
                reader.waits = false;
            }
            if let Some(client) = stream.client {
                self.mark_dirty(client);
            }
        }
        self.follow_waiting(self.now_ms());
    }

    fn follow_waiting(&mut self, now_ms: u64) {
        if self.kept.waiting_timer.is_none() && !self.kept.waiting.is_empty() {
            let wait_ms = (1_000 / u64::from(self.settings.resumes_per_s)).max(1);
            self.kept.waiting_timer = Some(self.wheel.insert(now_ms + wait_ms, TimerOf::Resumes));
        }
    }

    // ---- answers

    /// Refuses a request for a stream.
    fn answer_fault(&mut self, key: Key, fault: &Fault, lines: &str) {
        self.stats.counters.resumes_refused += 1;
        self.answer_error(key, fault, lines);
    }
}

/// For simulations: whether what is kept agrees with itself.
impl<I: Io> Shard<I> {
    /// A reader's connection sends nothing: whether that is right.
    pub(super) fn audit_reader(&self, stream: &Stream) -> Result<(), String> {
        let Some(reader) = &stream.reader else { return Ok(()) };
        let own = stream.response.end() - reader.own_at;
        if reader.lent.is_some() || own > 0 {
            return Err(format!("a reader is owed {own} bytes of its own, or the rest of what it was lent"));
        }
        let served = self.kept.sources.get(reader.source).is_some_and(|source| source.stirred);
        let waits = stream.produced || reader.waits || served;
        match self.supply(reader.source, reader.at, u32::MAX) {
            Supply::Later => Ok(()),
            _ if waits => Ok(()),
            _ => Err(format!("a reader at {} is owed something, and is sent nothing", reader.at)),
        }
    }

    /// Gives the timers of what is kept.
    pub(super) fn audit_kept(&self) -> Result<usize, String> {
        let (mut timers, mut detached, mut bytes) = (0, 0, 0);
        for (key, source) in self.kept.sources.iter() {
            timers += usize::from(source.timer.is_some());
            detached += usize::from(source.detached);
            let producer = source.producer.map(|producer| self.streams.get(producer));
            match producer {
                Some(Some(stream)) if stream.source == Some(key) => bytes += stream.charged,
                Some(_) => return Err("a source's producer is another's, or gone".to_owned()),
                None => bytes += source.charged,
            }
            let client = producer.flatten().is_some_and(|stream| stream.client.is_some());
            let lonely = source.producer.is_some() && !client && source.readers.is_empty();
            if lonely != source.detached {
                return Err(format!("detached is {}, and should be {lonely}", source.detached));
            }
            if source.producer.is_none() && source.timer.is_none() && source.readers.is_empty() {
                return Err("a stream that is over is kept for ever".to_owned());
            }
            for (place, &reader) in source.readers.iter().enumerate() {
                let known = self.streams.get(reader).and_then(|stream| stream.reader.as_ref());
                if known.is_none_or(|reader| reader.source != key || reader.place != place) {
                    return Err(format!("reader {place} does not know its place"));
                }
            }
            if self.kept.by_number.get(&source.number) != Some(&key) {
                return Err("a stream cannot be found by its id".to_owned());
            }
        }
        if detached != self.kept.detached || bytes != self.kept.bytes {
            let counted = (self.kept.detached, self.kept.bytes);
            return Err(format!("detached and bytes are {:?}, counted {counted:?}", (detached, bytes)));
        }
        Ok(timers)
    }
}

fn push_id_line(lines: &mut ExtraLines, id: &StreamId) {
    lines.push("Tokenring-Stream: ");
    lines.push(&id.to_string());
    lines.push("\r\n");
}

/// Whether a request's path is one of streams.
pub(super) fn covers(head: &RequestHead<'_, '_>) -> bool {
    Ask::covers(head.path())
}
