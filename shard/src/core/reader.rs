//! Those who read streams by their ids. Each is a stream of its own, with a head and errors of its own; its events are lent from
//! the log of the stream that it reads, which is the same memory for all. One whose next bytes the window has dropped finishes
//! what it was lent, which ends between two events, and is told there.

use super::conn::Maybe;
use super::kept::Source;
use super::stream::Stream;
use super::{Shard, TimerOf};
use crate::io::Io;
use crate::settings::SlowReader;
use protocol::background::Notes;
use protocol::limits::READERS_PER_TURN_MAX;
use protocol::log::{Lent, Log, Place};
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;
use std::hint::black_box;

/// A reader's place in a stream that another one fills.
pub(crate) struct Reader {
    pub(super) source: Key,
    /// Where among the source's readers.
    pub(super) place: u32,
    /// Next byte of the source's log to be lent.
    pub(super) at: u64,
    /// Of what was lent of it, which ends between two events: what is not confirmed, or with TLS not sealed.
    pub(super) lent: Option<Lent>,
    /// Next byte of its own log to be lent.
    pub(super) own_at: u64,
    /// The range in flight is of its own log.
    pub(super) own_lent: bool,
    /// Waits for its turn to begin.
    pub(super) waits: bool,
    /// When it began, or was last told of a gap, ms.
    pub(super) began_ms: u64,
    /// Of one that shares a tail: its position in the durable stream behind what it was lent, if that ends between two events.
    pub(super) behind: Maybe,
    /// Of the same: it ends with the event that it is being sent.
    pub(super) finishing: bool,
}

impl Reader {
    /// Whether a send of something that it was lent may be under way.
    pub(super) fn is_sending(&self) -> bool {
        self.own_lent || self.lent.is_some()
    }

    /// What has been confirmed of the source's log.
    pub(super) fn confirmed(&self) -> u64 {
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

impl<I: Io> Shard<I> {
    /// Takes the next range that a reader's connection is to send. What it is told of its own comes first, but never within
    /// an event.
    pub(super) fn next_of_reader(&mut self, key: Key, bytes_max: u32, sealed: bool) -> Option<Lent> {
        loop {
            let stream = self.streams.get_mut(key)?;
            let reader = stream.reader.as_mut()?;
            if let Some(rest) = reader.lent.take() {
                let range = rest.first(bytes_max);
                reader.lent = if sealed { rest.skip(bytes_max) } else { Some(rest) };
                return Some(range);
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
            if reader.finishing && reader.behind != Maybe::NONE {
                self.durable_end(key, End::Done);
                continue;
            }
            let (source, at, began_ms) = (reader.source, reader.at, reader.began_ms);
            match self.supply(source, at, began_ms) {
                Supply::Range(range) => {
                    let behind = self.position_behind(source, at + range.len() as u64);
                    let reader = self.streams.get_mut(key)?.reader.as_mut()?;
                    reader.at += range.len() as u64;
                    (reader.lent, reader.behind) = (Some(range), behind.into());
                }
                Supply::Later => return None,
                Supply::Over(end) => {
                    self.reader_over(key, end);
                    return None;
                }
                // What is sealed with it goes out first.
                Supply::Dropped if sealed && !self.tls_scratch.plain.is_empty() => return None,
                Supply::Dropped => self.reader_lagged(key),
            }
        }
    }

    fn supply(&self, key: Key, at: u64, began_ms: u64) -> Supply {
        let Some(source) = self.kept.sources.get(key) else { return Supply::Over(End::Gone) };
        let Some(log) = self.source_log(source) else { return Supply::Over(End::Gone) };
        if at < log.start() || at < source.stale_below && self.is_too_late(key, source, began_ms) {
            return Supply::Dropped;
        }
        let end = self.end_of(source);
        if at >= source.shown {
            return Supply::Later;
        }
        let bytes_max = u32::try_from(source.shown - at).unwrap_or(u32::MAX);
        match (log.lend(at, bytes_max), end) {
            (Some(range), _) => Supply::Range(range),
            (None, Some(end)) => Supply::Over(end),
            (None, None) => Supply::Later,
        }
    }

    /// How a source has ended, if nothing is added to its log any more.
    fn end_of(&self, source: &Source) -> Option<End> {
        match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(stream) if stream.produced => stream.end,
            Some(_) => None,
            None => source.end,
        }
    }

    /// How a source has ended of whose log nothing is left from there on; the disk may not know of its end yet.
    fn ended_at(&self, key: Key, at: u64) -> Option<End> {
        let Some(source) = self.kept.sources.get(key) else { return Some(End::Gone) };
        let Some(log) = self.source_log(source) else { return Some(End::Gone) };
        self.end_of(source).filter(|_| at == log.end())
    }

    /// Whether a reader has been lent its stream to the end; it is over then.
    pub(super) fn has_all_of_its_source(&mut self, key: Key) -> bool {
        let Some(stream) = self.streams.get(key) else { return false };
        let Some(reader) = stream.reader.as_ref().filter(|_| stream.end.is_none()) else { return false };
        let Some(end) = self.ended_at(reader.source, reader.at) else { return false };
        let client = stream.client;
        self.reader_over(key, end);
        if let Some(client) = client {
            self.mark_dirty(client);
        }
        true
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
        if self.leave_tail(key) {
            return;
        }
        let now_us = self.now_us;
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        let Some(source) = self.kept.sources.get(reader.source) else { return };
        let skip = self.settings.routes[source.route]
            .resume
            .is_some_and(|resume| resume.slow_reader == SlowReader::Skip);
        let newest = self.source_log(source).and_then(|log| newest_in(log, source.chunked));
        let (Some((at, last)), true) = (newest, skip) else {
            self.stats.counters.readers_dropped += 1;
            return self.end_stream(key, End::Lagged);
        };
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        if at <= reader.at {
            // It is late, but the newest event is in what it was lent: there is nothing to skip.
            reader.began_ms = now_us / 1000;
            return;
        }
        self.stats.counters.readers_skipped += 1;
        (reader.at, reader.began_ms) = (at, now_us / 1000);
        // A name of its own, so that only who knows it sees it.
        let gap = format!("event: tokenring.gap\ndata: {{\"last_event_id\":{last}}}\n\n");
        if is_planted(Bug::GapUntold) {
            return;
        }
        stream.append_block(gap.as_bytes(), now_us);
    }

    /// Whether a reader that is sent so many bytes of what it was lent (none: they are in records) has been sent all there is, so that
    /// nothing waits for its confirmation: no more of its own, no end, and no source that follows it.
    pub(super) fn is_reader_level(&self, stream: &Stream, bytes: Option<usize>) -> bool {
        let Some(reader) = &stream.reader else { return false };
        let Some(source) = self.kept.sources.get(reader.source) else { return false };
        let end = match source.producer.and_then(|producer| self.streams.get(producer)) {
            Some(producer) if !producer.produced => producer.response.end(),
            None if source.is_mirror() && source.end.is_none() => source.log.end(),
            _ => return false,
        };
        let own = reader.own_lent || reader.own_at < stream.response.end();
        let all = reader.lent.as_ref().map(Lent::len) == bytes;
        all && !own && !stream.produced && reader.at == end && !self.is_held_up(reader.source)
    }

    /// A send of a reader's has ended.
    pub(super) fn reader_confirmed(&mut self, key: Key, bytes: u32, sealed: bool) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let Some(reader) = &mut stream.reader else { return };
        let source = reader.source;
        if sealed {
            // Its cursors moved when the records were made.
        } else if std::mem::take(&mut reader.own_lent) {
            reader.own_at += u64::from(bytes);
            stream.response.release(reader.own_at);
        } else if let Some(lent) = reader.lent.take() {
            reader.lent = lent.skip(if is_planted(Bug::RestLost) { u32::MAX } else { bytes });
        }
        let stream = self.streams.get(key);
        let pending = stream.and_then(|stream| Some(self.owed_to(stream.reader.as_ref()?, stream)));
        self.stats.histograms.reader_pending_bytes.saturating_record(pending.unwrap_or(0));
        if self.is_held_up(source) {
            self.kept.stir(source);
        }
    }

    /// Bytes that a reader has not been confirmed.
    pub(super) fn owed_to(&self, reader: &Reader, stream: &Stream) -> u64 {
        let source = self.kept.sources.get(reader.source);
        let end = source.and_then(|source| self.source_log(source)).map_or(0, Log::end);
        end.saturating_sub(reader.confirmed()) + (stream.response.end() - reader.own_at)
    }

    /// Whether a source follows its readers, instead of leaving them behind.
    pub(super) fn is_held_up(&self, key: Key) -> bool {
        let Some(source) = self.kept.sources.get(key) else { return false };
        let slow_reader = self.resume_of(source.route).map(|resume| resume.slow_reader);
        let elsewhere = source.has_mirrors() || source.is_mirror();
        source.end.is_none()
            && source.tail.is_none()
            && match slow_reader {
                Some(SlowReader::Block) => true,
                Some(SlowReader::Auto) => source.readers.len() == 1 && !elsewhere,
                _ => false,
            }
    }

    /// A reader's stream is over, for whatever reason.
    pub(super) fn reader_left(&mut self, reader: &Reader) {
        let Some(source) = self.kept.sources.get_mut(reader.source) else { return };
        source.readers.swap_remove(reader.place as usize);
        if let Some(&moved) = source.readers.get(reader.place as usize)
            && let Some(moved) = self.streams.get_mut(moved).and_then(|stream| stream.reader.as_mut())
        {
            moved.place = reader.place;
        }
        if source.readers.is_empty() {
            source.owed_from = source.owed_from.max(reader.confirmed());
        }
        if self.forsaken(reader.source) {
            return self.remove_source(reader.source);
        }
        self.kept.stir(reader.source);
        self.orphan(reader.source);
        // Nobody holds it up any more.
        if let Some(source) = self.kept.sources.get(reader.source).filter(|source| source.detached)
            && let Some(producer) = source.producer
        {
            self.follow_marks(producer);
        }
    }

    // ---- once per turn

    /// Lets those readers send for whom there is something, as many as one turn has room for, and the sources follow them.
    pub(super) fn serve_readers(&mut self) {
        let mut room = READERS_PER_TURN_MAX;
        for _ in 0..self.kept.stirred.len() {
            let Some(key) = self.kept.stirred.pop_front() else { break };
            self.recall_readers(key);
            let Some(source) = self.kept.sources.get_mut(key) else { continue };
            if source.served == 0 {
                // A round begins. What comes while it lasts is for another one.
                source.stirred = false;
            }
            let all = source.readers.len();
            // Some of those that were served may have left.
            let from = source.served.min(all);
            let to = all.min(from + room);
            room -= to.saturating_sub(from);
            source.served = if to < all { to } else { 0 };
            let goes_on = source.served > 0 || source.stirred;
            self.feed_mirrors(key);
            self.spread_readers(key);
            self.touch_readers(key, from, to);
            for nth in from..to {
                if is_planted(Bug::ReaderForgotten) && nth > 0 && nth + 1 == all {
                    continue;
                }
                let reader = self.kept.sources.get(key).and_then(|source| source.readers.get(nth)).copied();
                if let Some(client) = reader.and_then(|reader| self.streams.get(reader)?.client) {
                    self.mark_dirty(client);
                }
            }
            if goes_on {
                // The others first, then the rest of its readers.
                self.kept.stirred.push_back(key);
            }
            self.follow_readers(key);
            if room == 0 {
                break;
            }
        }
        // Other shards serve their readers while this one serves its own.
        self.ring_neighbours();
    }

    /// Reads a little of everyone who is to be served, as `touch` does for a batch of completions: one miss beside the other.
    fn touch_readers(&self, key: Key, from: usize, to: usize) {
        let Some(source) = self.kept.sources.get(key) else { return };
        let streams = || source.readers[from..to].iter().filter_map(|&reader| self.streams.get(reader));
        for stream in streams() {
            black_box((stream.client, stream.response.end(), stream.produced, stream.route));
        }
        for stream in streams() {
            black_box(stream.reader.as_ref().map(|reader| reader.at));
            if let Some(conn) = stream.client.and_then(|client| self.conns.get(client)) {
                black_box((conn.dirty, conn.ledger, conn.ops.send, conn.timer));
            }
        }
    }

    /// What the slowest reader that counts has had is what the log need not hold for it.
    fn follow_readers(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get(key) else { return };
        if source.is_mirror() {
            return self.follow_mirror(key);
        }
        let Some(producer) = source.producer else { return };
        if self.streams.get(producer).is_none_or(|stream| stream.client.is_some()) {
            return;
        }
        if source.detached && !self.goes_on_alone(source) {
            // What its last reader had stays owed.
            return self.follow_marks(producer);
        }
        let Some(log) = self.source_log(source) else { return };
        let slowest = |readers: &[Key]| {
            let confirmed = |key: &Key| Some(self.streams.get(*key)?.reader.as_ref()?.confirmed());
            readers.iter().filter_map(confirmed).chain(source.slowest_mirror()).min()
        };
        let owed_from =
            if self.is_held_up(key) { slowest(&source.readers) } else { None }.unwrap_or(log.end());
        // What waits for the disk is owed to all of them.
        let owed_from = owed_from.min(source.shown);
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
        if source.tail.is_some() {
            // Who falls behind is left behind.
            return Some((0, self.settings.lag_high_bytes));
        }
        if self.goes_on_alone(source) {
            // It goes on whatever becomes of what nobody has read.
            return Some((0, self.settings.lag_high_bytes));
        }
        let window_bytes = self.resume_of_source(source).map_or(0, |resume| resume.window_bytes);
        let high = match source.detached {
            // Half of the window for what comes, half for what its client may not have seen.
            true => self.settings.lag_high_bytes.max(window_bytes / 2),
            false => self.settings.lag_high_bytes,
        };
        if source.owed_from < source.stale_below && !source.detached {
            // However little it is: its reader is further behind than it may be.
            return Some((u64::MAX, high));
        }
        Some((stream.response.end() - source.owed_from.min(stream.response.end()), high))
    }

    /// Whether somebody is there to be told that a stream without a client lives.
    pub(super) fn has_readers(&self, stream: &Stream) -> bool {
        let source = stream.source.and_then(|source| self.kept.sources.get(source));
        source.is_some_and(Source::is_read)
    }

    // ---- the pace of those who come back

    /// Takes one of the places that this moment has.
    pub(super) fn may_begin_reader(&mut self) -> bool {
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
        let now_ms = self.now_ms();
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
                (reader.waits, reader.began_ms) = (false, now_ms);
            }
            if let Some(client) = stream.client {
                self.mark_dirty(client);
            }
        }
        self.follow_waiting(now_ms);
    }

    pub(super) fn follow_waiting(&mut self, now_ms: u64) {
        if self.kept.waiting_timer.is_none() && !self.kept.waiting.is_empty() {
            let wait_ms = (1_000 / u64::from(self.settings.resumes_per_s)).max(1);
            self.kept.waiting_timer = Some(self.wheel.insert(now_ms + wait_ms, TimerOf::Resumes));
        }
    }
}

/// Where the newest event that a log still holds begins, and the id of the one before it.
fn newest_in(log: &Log, chunked: bool) -> Option<(u64, u64)> {
    let last = log.last_event_id();
    [last.saturating_sub(1), last].into_iter().find_map(|id| match log.behind(id, chunked) {
        Place::At(at) => Some((at, id)),
        _ => None,
    })
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
        let source = self.kept.sources.get(reader.source);
        let served = source.is_some_and(|source| source.stirred || source.served > 0);
        let waits = stream.produced || reader.waits || served;
        match self.supply(reader.source, reader.at, reader.began_ms) {
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
            let lonely = source.producer.is_some() && !client && !source.is_read();
            if lonely != source.detached {
                return Err(format!("detached is {}, and should be {lonely}", source.detached));
            }
            if source.producer.is_none() && source.timer.is_none() && !source.is_read() {
                return Err("a stream that is over is kept for ever".to_owned());
            }
            for (place, &reader) in source.readers.iter().enumerate() {
                let known = self.streams.get(reader).and_then(|stream| stream.reader.as_ref());
                if known.is_none_or(|reader| reader.source != key || reader.place as usize != place) {
                    return Err(format!("reader {place} does not know its place"));
                }
            }
            self.audit_mirror(key)?;
            if source.tail.is_none()
                && !source.is_mirror()
                && self.kept.by_number.get(&source.number) != Some(&key)
            {
                return Err("a stream cannot be found by its id".to_owned());
            }
        }
        for (id, &key) in &self.kept.by_response {
            let source = self.kept.sources.get(key);
            let notes = source.and_then(|source| match source.producer {
                Some(producer) => self.streams.get(producer)?.notes.as_deref(),
                None => source.notes.as_deref(),
            });
            if notes.and_then(Notes::id) != Some(id) {
                return Err(format!("the response {id} is not where it is looked for"));
            }
        }
        self.audit_mirrors()?;
        if detached != self.kept.detached || bytes != self.kept.bytes {
            let counted = (self.kept.detached, self.kept.bytes);
            return Err(format!("detached and bytes are {:?}, counted {counted:?}", (detached, bytes)));
        }
        Ok(timers)
    }
}
