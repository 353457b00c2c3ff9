//! Streams that outlive their connections. A streamed answer gets an id, and its log is kept: its client may leave and come
//! back, others may read with it, and anyone who knows the id may stop it.
//!
//! ```text
//!   backend ─► Stream (producer) ─► its log ─┬─► the client that asked, straight from the log
//!                  │ named by                ├─► reader: a stream of its own (head, errors), events from that log
//!               Source ──────────────────────┴─► reader
//!                  └─ over: takes the log, keeps it for a while
//! ```
//! Here: their names, what becomes of them when their clients leave and when they end, and the memory they take. `resume` has
//! the requests for them, `reader` those who read them.

use super::ages::{Round, SourceAges};
use super::background::notes_bytes;
use super::mirror::Mirrored;
use super::relay::ExtraLines;
use super::stored::Stored;
use super::tail::Tail;
use super::{Leaving, Shard, TimerOf};
use crate::io::Io;
use crate::settings::{OnLeave, Resume, Settings};
use protocol::background::Notes;
use protocol::dialect::Dialect;
use protocol::facts::Background;
use protocol::limits::RESUME_STREAM_COST_BYTES;
use protocol::log::Log;
use protocol::phase::End;
use protocol::resume::{NUMBER_MAX, StreamId, TAG_BYTES};
use protocol::slots::{Key, Slots};
use protocol::wheel::TimerId;
use ring::hmac;
use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::hash::{BuildHasherDefault, Hasher};

/// Names of streams that are gone are cleared away no sooner than there are so many.
const NAMES_MIN: usize = 64;

/// The streams of a shard that can be resumed.
pub(super) struct Kept {
    /// Authenticates their ids.
    key: hmac::Key,
    pub(super) shard: u16,
    /// Of the next stream, as [`Source::number`].
    next_number: u64,
    /// Their journal, where there is one.
    pub(super) stored: Option<Box<Stored>>,
    pub(super) sources: Slots<Source>,
    pub(super) by_number: HashMap<u64, Key, BuildHasherDefault<NumberHasher>>,
    /// Responses in background, by the ids that their backends gave them.
    pub(super) by_response: HashMap<Box<str>, Key>,
    /// Those that are over, in the order in which they ended; some are gone by now.
    pub(super) over: VecDeque<Key>,
    /// Those that are not, in the order in which they are made to forget; some are over by now.
    live: VecDeque<Key>,
    /// Where either is so long that those who are gone are taken out.
    over_names_max: usize,
    live_names_max: usize,
    /// Those whose readers have something to do in this turn.
    pub(super) stirred: VecDeque<Key>,
    /// Readers that wait for their turn to begin.
    pub(super) waiting: VecDeque<Key>,
    /// How many may begin, in millionths, and when that was reckoned, µs.
    pub(super) allowance: (u64, u64),
    pub(super) waiting_timer: Option<TimerId>,
    /// Memory of what is kept.
    pub(super) bytes: u64,
    /// Where the next attempt to make room is worth it.
    make_room_at: u64,
    pub(super) detached: usize,
    pub(super) ages: Round,
}

/// A stream as those know it who come by its id.
pub(super) struct Source {
    /// The shard that named it (bits 48 and up), and its number there.
    pub(super) number: u64,
    pub(super) route: usize,
    pub(super) dialect: Dialect,
    /// Its log is in chunks.
    pub(super) chunked: bool,
    /// Who fills the log, and has it; none when it is over.
    pub(super) producer: Option<Key>,
    /// When it is over: the log.
    pub(super) log: Log,
    pub(super) end: Option<End>,
    /// It is in the journal.
    pub(super) stored: bool,
    /// Up to where its log may be delivered: what is not safe on the disk yet may not be, where that is promised.
    pub(super) shown: u64,
    /// The id of the last event there, where it is known.
    pub(super) shown_event_id: Option<u64>,
    /// Streams that read it, each of which knows its place here.
    pub(super) readers: Vec<Key>,
    /// How many of them this round has served.
    pub(super) served: usize,
    pub(super) stirred: bool,
    /// Nobody reads it, and it goes on.
    pub(super) detached: bool,
    /// What its slowest reader that counts has had; what the one that left had.
    pub(super) owed_from: u64,
    pub(super) began_ms: u64,
    pub(super) ended_ms: u64,
    /// Memory accounted for, once it is over.
    pub(super) charged: u64,
    /// Memory of it, or on its way to its mirrors, that is counted in the overdraft, bytes.
    pub(super) drawn: u64,
    /// For its end without a client, or its removal.
    pub(super) timer: Option<(TimerId, u64)>,
    /// Its time is over; it goes when its last reader has.
    pub(super) expired: bool,
    /// What live readers of a durable stream share: it has no id.
    pub(super) tail: Option<Box<Tail>>,
    /// It is a mirror, or has some.
    pub(super) mirrored: Option<Box<Mirrored>>,
    /// What its request chose for when its last client has left.
    pub(super) on_leave: Option<OnLeave>,
    /// Everything below is older than a reader may be behind; 0: that is not limited, or nothing is.
    pub(super) stale_below: u64,
    pub(super) ages: Option<Box<SourceAges>>,
    /// A response in background.
    pub(super) background: bool,
    /// It has been told its id, by which it is found.
    pub(super) found_by_id: bool,
    /// Waits to be told that id.
    pub(super) waiter: Option<Key>,
    /// The model that its request named.
    pub(super) model: Option<Box<str>>,
    /// When it is over: what is remembered of a response in background.
    pub(super) notes: Option<Box<Notes>>,
}

impl Source {
    pub(super) fn new(
        number: u64,
        producer: impl Into<Option<Key>>,
        route: usize,
        dialect: Dialect,
        chunked: bool,
        now_ms: u64,
    ) -> Self {
        Source {
            number,
            route,
            dialect,
            chunked,
            producer: producer.into(),
            log: Log::new(),
            end: None,
            stored: false,
            shown: u64::MAX,
            shown_event_id: None,
            readers: Vec::new(),
            served: 0,
            stirred: false,
            detached: false,
            owed_from: 0,
            began_ms: now_ms,
            ended_ms: 0,
            charged: 0,
            drawn: 0,
            timer: None,
            expired: false,
            tail: None,
            mirrored: None,
            on_leave: None,
            stale_below: 0,
            ages: None,
            background: false,
            found_by_id: false,
            waiter: None,
            model: None,
            notes: None,
        }
    }
}

/// For numbers that count up and that nobody else chooses: those that follow one another lie beside one another, so that a stream
/// that begins or goes finds the place in the cache.
#[derive(Clone, Copy, Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(self.0 << 8 | u64::from(byte)));
    }

    fn write_u64(&mut self, number: u64) {
        // The table's place comes from the low bits, the mark that tells neighbours apart from the uppermost seven.
        let mark = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57;
        self.0 = mark << 57 | number & NUMBER_MAX;
    }

    fn finish(&self) -> u64 {
        self.0
    }
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
    /// Logs of streams of other shards, for readers on this one.
    pub mirrors: usize,
    /// Memory, bytes.
    pub bytes: u64,
    /// Streams that are on the disk.
    pub stored: usize,
    /// Streams that should be, and are not for its sake.
    pub unstored: usize,
}

impl Kept {
    pub(super) fn new(settings: &Settings, shard: usize) -> Self {
        // What each costs at least bounds how many there can be.
        let most = settings.resume_bytes_max / RESUME_STREAM_COST_BYTES;
        let most = usize::try_from(most).unwrap_or(usize::MAX).max(settings.connections_max);
        let shard = u16::try_from(shard).unwrap_or(u16::MAX);
        Kept {
            key: hmac::Key::new(hmac::HMAC_SHA256, &settings.stream_key),
            shard,
            next_number: numbered(shard, settings.stream_number_first),
            stored: None,
            sources: Slots::new(most.min(u32::MAX as usize)),
            by_number: HashMap::default(),
            by_response: HashMap::new(),
            over: VecDeque::new(),
            live: VecDeque::new(),
            over_names_max: NAMES_MIN,
            live_names_max: NAMES_MIN,
            stirred: VecDeque::new(),
            waiting: VecDeque::new(),
            allowance: (0, 0),
            waiting_timer: None,
            bytes: 0,
            make_room_at: settings.resume_bytes_max,
            detached: 0,
            ages: Round::new(settings),
        }
    }

    fn tag(&self, shard: u16, number: u64) -> [u8; TAG_BYTES] {
        tag(&self.key, shard, number)
    }

    /// The id of a [`Source::number`].
    pub(super) fn id(&self, number: u64) -> StreamId {
        let (shard, number) = ((number >> 48) as u16, number & NUMBER_MAX);
        StreamId { node: 0, shard, number, tag: self.tag(shard, number) }
    }

    /// Names of those that are gone are not kept for ever. Each list by itself: beside many that are over, those that are not
    /// would be looked for among as many names, in one turn.
    fn forget_names(&mut self) {
        if self.over.len() > self.over_names_max {
            self.over.retain(|&name| self.sources.get(name).is_some());
            self.over_names_max = NAMES_MIN.max(2 * self.over.len());
        }
        if self.live.len() > self.live_names_max {
            let is_live = |source: &Source| source.producer.is_some() || source.is_mirror();
            self.live.retain(|&name| self.sources.get(name).is_some_and(is_live));
            self.live_names_max = NAMES_MIN.max(2 * self.live.len());
        }
    }

    /// One that others come by is made to forget in its turn.
    pub(super) fn live_too(&mut self, key: Key) {
        self.live.push_back(key);
    }

    /// Whether it is the id of a stream that there was.
    pub(super) fn is_ours(&self, id: &StreamId) -> bool {
        let tag = self.tag(id.shard, id.number);
        // Without an early end: how long it takes must not tell how much was right.
        let differ = tag.iter().zip(&id.tag).fold(0, |differ, (a, b)| differ | (a ^ b));
        id.node == 0 && differ == 0
    }

    /// Whether readers wait for the next turn.
    pub(super) fn is_busy(&self) -> bool {
        !self.stirred.is_empty() || self.stored.as_ref().is_some_and(|stored| stored.done.is_some())
    }

    pub(super) fn stir(&mut self, key: Key) {
        if let Some(source) = self.sources.get_mut(key)
            && !std::mem::replace(&mut source.stirred, true)
            // Within a round it is queued already.
            && source.served == 0
        {
            self.stirred.push_back(key);
        }
    }

    pub(super) fn totals(&self) -> KeptTotals {
        let named = || self.sources.iter().map(|(_, source)| source).filter(|source| source.tail.is_none());
        let is_off = |source: &&Source| {
            self.stored.as_ref().is_some_and(|stored| stored.journal.is_off(source.number))
        };
        let stored = named().filter(|source| source.stored).count();
        let unstored = named().filter(|source| source.stored).filter(is_off).count();
        let live = named().filter(|source| source.producer.is_some()).count();
        let named_mirrors = named().filter(|source| source.is_mirror()).count();
        let mirrors = self.sources.iter().filter(|(_, source)| source.is_mirror()).count();
        KeptTotals {
            live,
            over: named().count() - live - named_mirrors,
            detached: self.detached,
            readers: named().map(|source| source.readers.len()).sum(),
            waiting: self.waiting.len(),
            mirrors,
            bytes: self.bytes,
            stored: stored - unstored,
            unstored,
        }
    }
}

impl<I: Io> Shard<I> {
    pub(super) fn resume_of(&self, route: usize) -> Option<Resume> {
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
        // A number that an earlier process may have given, or a later one will, is no name.
        let may_give = |stored: &mut Box<Stored>| stored.journal.may_give(number & NUMBER_MAX);
        if number & NUMBER_MAX == NUMBER_MAX || !self.kept.stored.as_mut().is_none_or(may_give) {
            return;
        }
        let chunked = stream.events_chunked();
        let background = stream.background != Background::No;
        let source = Source::new(number, key, stream.route, stream.dialect, chunked, now_ms);
        let on_leave = stream.request().and_then(|request| request.on_leave).filter(|_| !background);
        let source = Source { background, on_leave, ..source };
        let Ok(source) = self.kept.sources.insert(source) else { return };
        self.kept.next_number += 1;
        self.kept.by_number.insert(number, source);
        self.kept.live.push_back(source);
        stream.source = Some(source);
        if stream.background != Background::No {
            stream.notes = Some(Box::default());
        }
        stream.charged = RESUME_STREAM_COST_BYTES;
        self.kept.bytes += RESUME_STREAM_COST_BYTES;
        push_id_line(lines, &self.kept.id(number));
        if let Some(on_leave) = on_leave {
            push_on_leave_line(lines, on_leave);
        }
    }

    /// From here on a named stream's log is kept; what it holds so far is the head.
    pub(super) fn keep_log(&mut self, key: Key) {
        let source = self.streams.get(key).and_then(|stream| self.kept.sources.get(stream.source?));
        let resume = source.and_then(|source| self.resume_of_source(source));
        if let (Some(resume), Some(stream)) = (resume, self.streams.get_mut(key)) {
            stream.response.keep(resume.window_bytes);
            self.begin_storing(key);
        }
        self.follow_ages();
    }

    /// Something was appended for whoever reads a stream.
    pub(super) fn appended(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key) else { return };
        let (source, noted) = (stream.source.filter(|_| stream.followed), stream.notes.is_some());
        if let Some(client) = stream.client {
            self.mark_dirty(client);
        }
        if let Some(source) = source {
            self.kept.stir(source);
        }
        if noted {
            self.follow_notes(key);
        }
    }

    // ---- the client leaves

    /// Whether a stream goes on when this connection, its client's, is gone.
    pub(super) fn may_detach(&self, key: Key) -> bool {
        let Some(stream) = self.streams.get(key) else { return false };
        let Some(source) = stream.source.and_then(|source| self.kept.sources.get(source)) else {
            return false;
        };
        // One that was not even sent the head does not know the id; of what is in flight it may have read all.
        let client = stream.client.and_then(|key| self.conns.get(key));
        let knows = client.is_some_and(|conn| conn.ledger.sent() > 0 || conn.ledger.in_flight() > 0);
        let wanted = match self.resume_of_source(source).map(|resume| resume.on_leave) {
            None => false,
            Some(OnLeave::Cancel) => source.is_read(),
            Some(OnLeave::Detach(_) | OnLeave::Finish) => {
                knows && (self.kept.detached < self.settings.detached_max || source.is_read())
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
    pub(super) fn orphan(&mut self, key: Key) {
        if self.drop_tail(key) || self.mirror_orphaned(key) {
            return;
        }
        let now_ms = self.now_ms();
        let resume = self.kept.sources.get(key).and_then(|source| self.resume_of_source(source));
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        let Some(producer) = source.producer else { return };
        let read = self.streams.get(producer).is_some_and(|stream| stream.client.is_some());
        if read || source.is_read() || source.detached {
            return;
        }
        let room = self.leaving == Leaving::No && self.kept.detached < self.settings.detached_max;
        match resume.map(|resume| resume.on_leave) {
            Some(OnLeave::Detach(ms)) if room => {
                let due_ms = now_ms + u64::from(ms);
                source.detached = true;
                self.kept.detached += 1;
                super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(key));
            }
            Some(OnLeave::Finish) if room => {
                source.detached = true;
                self.kept.detached += 1;
                if let Some(producer) = self.streams.get_mut(producer) {
                    // Nobody else lets go of what has left the window.
                    producer.followed = true;
                }
                self.kept.stir(key);
            }
            _ => self.end_stream(producer, End::ClientLeft),
        }
    }

    /// Somebody reads it again.
    pub(super) fn adopt(&mut self, key: Key) {
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
        if let Some(source) = self.streams.get(key).and_then(|stream| stream.source) {
            self.store(source);
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(source_key) = stream.source.take() else { return };
        let (mut log, charged) = (std::mem::take(&mut stream.response), std::mem::take(&mut stream.charged));
        let (end, notes) = (stream.end.unwrap_or(End::ClientLeft), stream.notes.take());
        let client = stream.client;
        self.adopt(source_key);
        self.answer_waiter_of_none(source_key, end);
        let resume = self.kept.sources.get(source_key).and_then(|source| self.resume_of_source(source));
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        // The rest may be longer than the window; whoever was owed it still is.
        let client = client.map(|client| self.conns.get(client).map_or(log.end(), |conn| conn.ledger.sent()));
        log.release(client.unwrap_or(source.owed_from).min(log.end()));
        if end == End::StreamStopped && !source.is_read() {
            log = Log::new();
        }
        let keep_ms = resume.map_or(0, |resume| resume.keep_ms);
        source.producer = None;
        source.charged = log.memory_bytes() as u64 + RESUME_STREAM_COST_BYTES + notes_bytes(notes.as_deref());
        source.notes = notes;
        self.kept.bytes = self.kept.bytes - charged + source.charged;
        source.log = log;
        (source.end, source.ended_ms) = (Some(end), now_ms);
        source.expired = is_forsaken(end) || keep_ms == 0 || self.leaving != Leaving::No;
        if source.expired && !source.is_read() {
            return self.remove_source(source_key);
        }
        let due_ms = now_ms + u64::from(keep_ms);
        super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(source_key));
        self.kept.over.push_back(source_key);
        self.kept.stir(source_key);
        self.make_room();
    }

    pub(super) fn source_due(&mut self, key: Key) {
        if self.mirror_due(key) {
            return;
        }
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if let Some(producer) = source.producer {
            // Somebody may have come back in this very turn.
            if source.detached {
                self.end_stream(producer, End::Abandoned);
            }
            return;
        }
        source.expired = true;
        if !source.is_read() {
            self.remove_source(key);
        }
    }

    pub(super) fn remove_source(&mut self, key: Key) {
        self.forget_mirror(key);
        self.mirrors.blocked.remove(&key);
        let Some(source) = self.kept.sources.remove(key) else { return };
        if let Some((timer, _)) = source.timer {
            self.wheel.remove(timer);
        }
        if source.tail.is_none() && !source.is_mirror() {
            self.kept.by_number.remove(&source.number);
        }
        // What a shard that leaves lets go is there for the next process.
        let stays = self.leaving != Leaving::No && !source.end.is_none_or(is_forsaken);
        if let Some(stored) = self.kept.stored.as_mut().filter(|_| source.stored && !stays) {
            stored.journal.forget(source.number);
        }
        self.rest_ages();
        self.forget_response(key, source.notes.as_deref());
        self.kept.bytes -= source.charged;
        self.overdraft_bytes -= source.drawn;
        self.kept.forget_names();
    }

    /// Nobody can come back to a shard that leaves: what nobody reads now is let go.
    pub(super) fn drain_kept(&mut self) {
        let keys: Vec<Key> = self.kept.sources.iter().map(|(key, _)| key).collect();
        for key in keys {
            if self.close_mirror(key) {
                continue;
            }
            let Some(source) = self.kept.sources.get_mut(key) else { continue };
            match source.producer {
                Some(producer) if source.detached => self.end_stream(producer, End::Drain),
                Some(_) => {}
                None => {
                    source.expired = true;
                    if !source.is_read() {
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
        let now =
            stream.response.history_bytes() + RESUME_STREAM_COST_BYTES + notes_bytes(stream.notes.as_deref());
        let before = std::mem::replace(&mut stream.charged, now);
        self.kept.bytes = self.kept.bytes - before + now;
        self.make_room_if_full();
    }

    pub(super) fn make_room_if_full(&mut self) {
        if self.kept.bytes > self.kept.make_room_at {
            self.make_room();
        }
    }

    /// Gives up what is kept, the least missed first, until there is some room again: streams that are over, oldest first; then
    /// the oldest half of the events of streams without a client; then that of what others have read.
    pub(super) fn make_room(&mut self) {
        let most = self.settings.resume_bytes_max;
        if self.kept.bytes <= most {
            self.kept.make_room_at = most;
            return;
        }
        // One at a time, as others end: the memory of one that goes is that of the next one that comes, and no turn has many to
        // let go.
        for _ in 0..self.kept.over.len() {
            if self.kept.bytes <= most {
                break;
            }
            let Some(key) = self.kept.over.pop_front() else { break };
            match self.kept.sources.get(key) {
                None => {}
                Some(source) if !source.is_read() => {
                    self.stats.counters.kept_evictions += 1;
                    self.remove_source(key);
                    self.fetch_next_evicted();
                }
                Some(_) => self.kept.over.push_back(key),
            }
        }
        let enough = if self.kept.bytes > most { most - most / 16 } else { most };
        for detached in [true, false] {
            for _ in 0..self.kept.live.len() {
                if self.kept.bytes <= enough {
                    break;
                }
                let Some(key) = self.kept.live.pop_front() else { break };
                let Some(source) = self.kept.sources.get(key) else { continue };
                if source.is_mirror() {
                    self.kept.live.push_back(key);
                    if !detached {
                        self.mirror_forgets_half(key);
                    }
                    continue;
                }
                let Some(producer) = source.producer else { continue };
                self.kept.live.push_back(key);
                if source.detached == detached {
                    self.forget_half(producer);
                }
            }
        }
        // Where nothing can be given up, another attempt is worth it only when there is more.
        self.kept.make_room_at = if self.kept.bytes > most { self.kept.bytes + most / 16 } else { most };
    }

    /// What is given up next has not been looked at for long: its memory comes while other things are done, each step of the way
    /// one eviction earlier than the next.
    fn fetch_next_evicted(&self) {
        let mut next = self.kept.over.iter().map(|&key| self.kept.sources.get(key));
        let history = next.next().flatten().and_then(|source| source.log.history_apart());
        let then = next.next().flatten();
        let log = then.and_then(|source| source.log.apart());
        let timer = then.and_then(|source| self.wheel.apart(source.timer?.0));
        for address in history.into_iter().chain(log).chain(timer) {
            self.io.prefetch(address);
        }
        if let Some(source) = next.next().flatten() {
            let start: *const u8 = std::ptr::from_ref(source).cast();
            for line in 0..size_of::<Source>().div_ceil(64) {
                self.io.prefetch(start.wrapping_add(64 * line));
            }
        }
    }

    fn mirror_forgets_half(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        source.log.forget(source.log.history_bytes() / 2);
        let charged = source.mirror_bytes();
        let before = std::mem::replace(&mut source.charged, charged);
        // Its home still has it.
        self.kept.bytes = self.kept.bytes - before + charged;
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
}

fn tag(key: &hmac::Key, shard: u16, number: u64) -> [u8; TAG_BYTES] {
    let tag = hmac::sign(key, &StreamId::authenticated(0, shard, number));
    let mut short = [0; TAG_BYTES];
    short.copy_from_slice(&tag.as_ref()[..TAG_BYTES]);
    short
}

/// The id of a stream of that shard, with the key of [`Settings::stream_key`].
pub fn stream_id(key: &[u8; 32], shard: u16, number: u64) -> StreamId {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    StreamId { node: 0, shard, number, tag: tag(&key, shard, number) }
}

/// Whether nobody is to come back for a stream that ended so.
pub(super) fn is_forsaken(end: End) -> bool {
    matches!(end, End::ClientLeft | End::WriteStall | End::Abandoned)
}

/// A [`Source::number`].
pub(super) fn numbered(shard: u16, number: u64) -> u64 {
    u64::from(shard) << 48 | number & NUMBER_MAX
}

pub(super) fn push_id_line(lines: &mut ExtraLines, id: &StreamId) {
    write!(lines, "Tokenring-Stream: {id}\r\n").ok();
}

/// Tells what a request has chosen, and how much it got of it.
fn push_on_leave_line(lines: &mut ExtraLines, on_leave: OnLeave) {
    write!(lines, "Tokenring-On-Leave: {on_leave}\r\n").ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A turn that clears names looks at as many as there are streams under way, not at all that are kept.
    #[test]
    fn the_names_of_streams_that_ended_are_cleared_however_many_are_kept() {
        let mut kept = Kept::new(&crate::uring::tests::settings(), 0);
        let mut producers = Slots::new(1);
        let producer = producers.insert(()).unwrap();
        let mut longest = 0;
        for number in 1..=1000 {
            let source = Source::new(number, producer, 0, Dialect::Plain, true, 0);
            let key = kept.sources.insert(source).ok().unwrap();
            kept.live.push_back(key);
            kept.sources.get_mut(key).unwrap().producer = None;
            kept.over.push_back(key);
            kept.forget_names();
            longest = longest.max(kept.live.len());
        }
        assert_eq!(kept.over.len(), 1000, "all of them are kept");
        assert!(longest <= NAMES_MIN, "{longest} names of streams under way, of which there is one");
        for key in kept.over.iter().take(900) {
            kept.sources.remove(*key).unwrap();
        }
        kept.over_names_max = 1;
        kept.forget_names();
        assert_eq!((kept.over.len(), kept.over_names_max), (100, 200), "no names of those that are gone");
    }
}
