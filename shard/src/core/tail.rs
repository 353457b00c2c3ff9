//! What live readers of a durable stream share. A reader that has all there is waits for the same bytes as every other one in the
//! same form; so these are written once, and lent to all of them.
//!
//! ```text
//!   alone: reads the store by itself ──(has all, and somebody else has too)──► shares a tail
//!     └──◄──────(the tail's window has left it behind)────────────────────────────┘
//! ```
//! A tail is a stream without a client, which is itself a reader of the store and fills its log; those who share it are its
//! readers, as of any stream that is read by its id (`reader`). It is made for the second, and goes with the last.

use super::conn::Maybe;
use super::durable::Durable;
use super::kept::Source;
use super::stream::{Answer, Stream};
use super::{Leaving, Shard};
use crate::io::Io;
use crate::mesh::SharedPlace;
use protocol::durable::{Shared, Totals};
use protocol::http::Version;
use protocol::ledger::Ledger;
use protocol::limits::RESUME_STREAM_COST_BYTES;
use protocol::log::Log;
use protocol::phase::{End, Phase};
use protocol::slots::Key;
use std::collections::VecDeque;

/// Who has all there is of a stream, in one form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Level {
    /// One reader, for whom no tail is worth it.
    One(Key),
    /// Those of this source.
    Tail(Key),
}

/// What a source knows that is a tail.
pub(super) struct Tail {
    pub(super) shared: Shared,
    /// Where in its log events end, and the position in the durable stream behind each; of what is held.
    ends: VecDeque<(u64, u64)>,
    /// Which of its readers is looked at next for whether it could be served elsewhere.
    pub(super) looked_at: usize,
    /// When another shard may be asked again to read it, ms.
    pub(super) mirror_from_ms: u64,
}

impl Tail {
    pub(super) fn new(shared: Shared) -> Self {
        Tail { shared, ends: VecDeque::new(), looked_at: 0, mirror_from_ms: 0 }
    }

    /// Notes where events end in what was appended to a log that holds nothing below `start`.
    pub(super) fn grew(&mut self, ends: &[(u64, u64)], start: u64) {
        self.ends.extend(ends);
        while self.ends.front().is_some_and(|&(end, _)| end < start) {
            self.ends.pop_front();
        }
    }

    /// Where events end behind `from` and up to `to`.
    pub(super) fn ends_within(&self, from: u64, to: u64) -> Box<[(u64, u64)]> {
        // Nearly always the last ones.
        let behind = self.ends.iter().rev().skip_while(|&&(end, _)| end > to);
        let mut ends: Vec<(u64, u64)> = behind.take_while(|&&(end, _)| end > from).copied().collect();
        ends.reverse();
        ends.into()
    }

    /// The position in the durable stream behind what ends there in the log.
    fn position(&self, at: u64) -> Option<u64> {
        // Nearly always the last one.
        let nth = match self.ends.back() {
            Some(&(end, position)) if end == at => return Some(position),
            _ => self.ends.binary_search_by_key(&at, |&(end, _)| end).ok()?,
        };
        self.ends.get(nth).map(|&(_, position)| position)
    }
}

impl<I: Io> Shard<I> {
    /// A reader has all there is: from here on it shares what comes with others who have.
    pub(super) fn share(&mut self, key: Key) {
        let Some((shared, at)) = self.is_level(key) else { return };
        match self.durable.level.get(&shared) {
            Some(&Level::Tail(source)) => {
                let producer = self.kept.sources.get(source).and_then(|source| source.producer);
                if producer.and_then(|producer| self.reading_at(producer)) == Some(at) {
                    self.join_tail(key, source);
                }
            }
            Some(&Level::One(other)) if other != key && self.is_level(other) == Some((shared, at)) => {
                if let Some(source) = self.make_tail(key, shared, at) {
                    self.join_tail(other, source);
                    self.join_tail(key, source);
                }
            }
            Some(Level::One(_)) | None => {
                self.durable.level.insert(shared, Level::One(key));
            }
        }
    }

    /// What a reader waits for that it may share, and where it is.
    fn is_level(&self, key: Key) -> Option<(Shared, u64)> {
        let stream = self.streams.get(key)?;
        let conn = self.conns.get(stream.client?)?;
        let may = stream.reader.is_none()
            && stream.end.is_none()
            && stream.has_events_answer()
            && stream.events_chunked()
            // Its records are its own anyway; but they need not be made here.
            && (conn.tls.is_none() || self.neighbours.is_some() && self.settings.mirror_readers > 0)
            && self.leaving == Leaving::No;
        stream.durable.as_ref().filter(|_| may)?.reading()?.shares(self.durable_now())
    }

    fn reading_at(&self, key: Key) -> Option<u64> {
        self.streams.get(key)?.durable.as_ref()?.reading()?.between()
    }

    fn make_tail(&mut self, key: Key, shared: Shared, at: u64) -> Option<Key> {
        let now = self.durable_now();
        let stream = self.streams.get(key)?;
        let (client, route, dialect) = (stream.client?, stream.route, stream.dialect);
        let mut producer = Stream::new(client, route, dialect, Version::Http11, self.now_us);
        producer.client = None;
        producer.followed = true;
        producer.phase = Phase::Streaming;
        (producer.answer, producer.status) = (Answer::Events { early: false }, 200);
        producer.response.keep(self.settings.lag_high_bytes);
        let producer = self.streams.insert(producer).ok()?;
        let mut tail = Tail::new(shared);
        tail.grew(&[(0, at)], 0);
        let number = self.mirrors.number_tail(self.kept.shard);
        let source = Source {
            tail: Some(Box::new(tail)),
            ..Source::new(number, producer, route, dialect, true, self.now_us / 1000)
        };
        let Ok(source) = self.kept.sources.insert(source) else {
            self.streams.remove(producer);
            return None;
        };
        let store = &mut self.durable.store;
        let durable = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut());
        let reading = durable
            .and_then(|durable| durable.reading_mut())
            .map(|reading| store.share(reading, producer, now));
        if let Some(stream) = self.streams.get_mut(producer) {
            stream.durable = reading.map(|reading| Box::new(Durable::reads(reading)));
            stream.source = Some(source);
            stream.charged = RESUME_STREAM_COST_BYTES;
        }
        self.kept.bytes += RESUME_STREAM_COST_BYTES;
        self.durable.level.insert(shared, Level::Tail(source));
        self.follow_stream_timer(producer);
        Some(source)
    }

    fn join_tail(&mut self, key: Key, source_key: Key) {
        let now = self.durable_now();
        let Some(end) =
            self.kept.sources.get(source_key).and_then(|source| self.source_log(source)).map(Log::end)
        else {
            return;
        };
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(conn) = stream.client.and_then(|key| self.conns.get(key)) else { return };
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(mut reading) = stream.durable.as_mut().and_then(|durable| durable.begin_sharing()) else {
            return;
        };
        let at = reading.between();
        self.durable.store.leave(&mut reading, now);
        // What it was given so far is in its own log, and goes out first. With TLS what is in flight are records.
        let sealed = if conn.tls.is_some() { conn.ledger.in_flight() } else { 0 };
        let own_at = conn.ledger.sent() + u64::from(sealed);
        if sealed > 0 {
            stream.response.release(own_at);
        }
        stream.forget_request();
        stream.reader = Some(Box::new(super::reader::Reader {
            source: source_key,
            place: source.readers.len() as u32,
            at: end,
            lent: None,
            own_at,
            own_lent: conn.tls.is_none() && conn.ledger.in_flight() > 0,
            waits: false,
            began_ms: 0,
            behind: at.into(),
            finishing: false,
        }));
        source.readers.push(key);
        self.stats.counters.durable_shared += 1;
        if self.neighbours.is_some() {
            self.kept.stir(source_key);
        }
    }

    /// Notes where in a tail's log events end; the log has just grown.
    pub(super) fn tail_grew(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key) else { return };
        let Some(source) = stream.source.and_then(|source| self.kept.sources.get_mut(source)) else { return };
        let Some(tail) = &mut source.tail else { return };
        let (start, end) = (stream.response.start(), stream.response.end());
        if let Some(at) = stream.durable.as_ref().and_then(|durable| durable.reading()?.between())
            && tail.ends.back().is_none_or(|&(last, _)| last < end)
        {
            tail.grew(&[(end, at)], start);
        }
    }

    /// The position in the durable stream behind what a reader was lent, if it reads a tail.
    pub(super) fn position_behind(&self, source: Key, at: u64) -> Option<u64> {
        self.kept.sources.get(source)?.tail.as_ref()?.position(at)
    }

    /// Looks at all tails and their mirrors here, as if something had come.
    pub(super) fn stir_tails(&mut self) {
        let tails = self.durable.level.values().filter_map(|level| match level {
            Level::Tail(source) => Some(*source),
            Level::One(_) => None,
        });
        for key in tails.chain(self.mirrors.of_tails()).collect::<Vec<_>>() {
            self.kept.stir(key);
        }
    }

    /// If a reader shares a tail: its window has left it behind, and it goes on by itself. Called while nothing of it is in flight.
    pub(super) fn leave_tail(&mut self, key: Key) -> bool {
        let parted = self.part_from_tail(key);
        self.stats.counters.durable_parted += u64::from(parted);
        parted
    }

    /// The same, whyever it goes.
    pub(super) fn part_from_tail(&mut self, key: Key) -> bool {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return false };
        let Some(source) = stream.reader.as_ref().and_then(|reader| self.kept.sources.get(reader.source))
        else {
            return false;
        };
        let Some(shared) = source.tail.as_ref().map(|tail| tail.shared) else { return false };
        let (home, tail) = (source.mirror_of(), source.number);
        let Some(reader) = stream.reader.take() else { return false };
        let Some(durable) = &mut stream.durable else { return false };
        if let Some(conn) = stream.client.and_then(|key| self.conns.get_mut(key)) {
            assert!(conn.ledger.may_lend(), "a reader that is being sent something has a place");
            durable.shared_bytes += conn.ledger.sent() - reader.own_at;
            conn.ledger = Ledger::at(reader.own_at);
        }
        stream.pending_since_us = Maybe::some(now_us);
        if let (Some(behind), Some(home)) = (reader.behind.get(), home) {
            let place = SharedPlace { home, tail, shared, at: reader.at, behind };
            self.reader_left(&reader);
            self.hand_back(key, place);
        } else if let Some(behind) = reader.behind.get() {
            durable.end_sharing(self.durable.store.part(shared, behind, key));
            self.reader_left(&reader);
            self.durable_fill(key);
        } else {
            // It was within an event: its client must not take that for whole.
            stream.close = true;
            stream.produced = true;
            self.reader_left(&reader);
            self.end_stream(key, End::Gone);
        }
        true
    }

    /// Ends a stream that is a tail, for its readers too; false if it is none.
    pub(super) fn end_tail(&mut self, key: Key, end: End) -> bool {
        let now_us = self.now_us;
        let Some(stream) = self.streams.get(key).filter(|stream| self.is_tail(stream)) else { return false };
        let Some(source_key) = stream.source else { return false };
        let Some(mut stream) = self.remove_tail_stream(key) else { return true };
        let within = stream.durable.take().is_some_and(|durable| {
            let within = durable.is_within(None);
            self.durable_settle(key, *durable);
            within
        });
        // A reader comes again and finds where it was; only what is incomplete must not look whole.
        let end = if within { end } else { End::Done };
        if end == End::Done {
            stream.append_last_chunk(now_us);
        }
        let Some(source) = self.kept.sources.get_mut(source_key) else { return true };
        let mut log = std::mem::take(&mut stream.response);
        log.release(log.end());
        (source.producer, source.end, source.expired) = (None, Some(end), true);
        source.charged = log.memory_bytes() as u64 + RESUME_STREAM_COST_BYTES;
        self.kept.bytes += source.charged;
        source.log = log;
        match source.is_read() {
            true => self.kept.stir(source_key),
            false => self.remove_source(source_key),
        }
        true
    }

    /// If a source is a tail, and nobody shares it any longer, it goes; false if it is none.
    pub(super) fn drop_tail(&mut self, source_key: Key) -> bool {
        let source = self.kept.sources.get(source_key);
        let Some(source) = source.filter(|source| source.tail.is_some() && !source.is_mirror()) else {
            return false;
        };
        if !source.is_read() {
            if let Some(producer) = source.producer
                && let Some(mut stream) = self.remove_tail_stream(producer)
                && let Some(durable) = stream.durable.take()
            {
                self.durable_settle(producer, *durable);
            }
            self.remove_source(source_key);
        }
        true
    }

    fn remove_tail_stream(&mut self, key: Key) -> Option<Stream> {
        let mut stream = self.streams.remove(key)?;
        if let Some((timer, _)) = stream.timer.take() {
            self.wheel.remove(timer);
        }
        self.overdraft_bytes -= stream.drawn;
        self.kept.bytes -= std::mem::take(&mut stream.charged);
        let tail = stream.source.and_then(|source| self.kept.sources.get(source)?.tail.as_ref());
        if let Some(tail) = tail {
            self.durable.level.remove(&tail.shared);
        }
        Some(stream)
    }

    pub(super) fn is_tail(&self, stream: &Stream) -> bool {
        let source = stream.source.and_then(|source| self.kept.sources.get(source));
        source.is_some_and(|source| source.tail.is_some())
    }

    /// What there is of durable streams: of the store's readers, those that are tails stand for all who share them.
    pub(super) fn durable_totals(&self) -> Totals {
        let mut totals = self.durable.store.totals();
        for (_, source) in self.kept.sources.iter().filter(|(_, source)| source.tail.is_some()) {
            totals.readers += source.readers.len() as u64;
            totals.readers -= u64::from(source.producer.is_some());
        }
        totals
    }

    /// A reader of the store is gone.
    pub(super) fn forget_level(&mut self, key: Key, shared: Option<Shared>) {
        if let Some(shared) = shared
            && self.durable.level.get(&shared) == Some(&Level::One(key))
        {
            self.durable.level.remove(&shared);
        }
    }
}
