//! A stream's mirror: a second log of it on another shard, so that readers there are served by their own core. What the two ends
//! say to each other, and when; the queues between shards carry it.
//!
//! ```text
//!   home                                                             mirror
//!   Link ── Begin: the place of what comes first ────────────────────► Replica, its log in the home's offsets
//!     ◄────────────── Told: taken up to, readers ──────────────────────┤
//!     ├──── Bytes, as far ahead as it may be; Skip: left behind ───────►
//!     ├──── Over ──────────────────────────────────────────────────────►
//!     ◄────────────── left: nobody reads it ───────────────────────────┘
//! ```
//! To its home a mirror is one reader with a cursor: it is lent what the log has, so many bytes ahead of what it has taken
//! ([`MIRROR_AHEAD_BYTES`]), and is left behind by the window like any other. Each message is made when there is room for it, from
//! the state of its end; so a full queue loses nothing and delays only those whose queue it is.
//!
//! Offsets of the two logs are the same. A hole is one in both: a reader whose next byte lies in it is behind the window there
//! as it would be here.

use crate::limits::{MIRROR_AHEAD_BYTES, MIRROR_TELL_BYTES, MIRROR_TELL_MS};
use crate::log::{Log, Shown};
use crate::phase::End;
use crate::planted::{Bug, is_planted};
use std::cell::Cell;

/// What a home tells a mirror, in order. `A`: what else a mirror must know of the stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News<A> {
    /// The first of all.
    Begin {
        /// Of the stream.
        about: A,
        /// Offset of what comes first.
        at: u64,
        /// Id of the event before it; 0: it is the stream's first.
        last_event_id: u64,
    },
    /// What follows: whole appends.
    Bytes {
        /// As they are in the log; never empty.
        bytes: Box<[u8]>,
        /// Id of the last event that ends in them or before.
        last_event_id: u64,
    },
    /// What follows is not what the mirror has come to, which is not held any more.
    Skip {
        /// Offset of what follows.
        at: u64,
        /// Id of the event before it.
        last_event_id: u64,
    },
    /// That was all.
    Over(End),
}

/// What a mirror tells its home.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Told {
    /// Everything below this offset is taken: by the mirror, or by its slowest reader where the stream waits for its readers.
    pub taken: u64,
    /// How many read it.
    pub readers: u32,
    /// Bytes that the one of them that is behind most has not been confirmed.
    pub pending_bytes: u64,
}

/// The home's end.
#[derive(Debug)]
pub struct Link<A> {
    /// Until it has begun.
    about: Option<A>,
    /// Which mirror of this stream: a number that no other has.
    pub opening: u64,
    /// Offset of what is sent next.
    at: u64,
    last_event_id: u64,
    /// What was heard of it.
    pub told: Told,
    /// Something was: it has begun, and may be sent more.
    heard: bool,
    /// It was sent the end, and there is no more to be said.
    pub over: bool,
}

impl<A> News<A> {
    /// What is told instead where there is no memory for what was appended up to `to`: that it is missing.
    pub fn without_bytes(self, to: u64) -> Self {
        match self {
            News::Bytes { last_event_id, .. } => News::Skip { at: to, last_event_id },
            other => other,
        }
    }

    /// Bytes that are more than any mirror may be sent ahead: of one append.
    pub fn excess_bytes(&self) -> u64 {
        match self {
            News::Bytes { bytes, .. } => (bytes.len() as u64).saturating_sub(MIRROR_AHEAD_BYTES),
            _ => 0,
        }
    }
}

impl<A> Link<A> {
    /// A mirror of everything that a log holds.
    pub fn new(opening: u64, about: A, log: &Log) -> Self {
        let (at, last_event_id) = log.first_place();
        let told = Told { taken: at, ..Told::default() };
        Link { about: Some(about), opening, at, last_event_id, told, heard: false, over: false }
    }

    /// What is to be sent next, if there is anything; there must be room for it. `shown`: up to where the log may be read. `end`: the
    /// stream's, when the log has all of it.
    pub fn next(&mut self, log: &Log, shown: Shown, end: Option<End>) -> Option<News<A>> {
        if self.over {
            return None;
        }
        if let Some(about) = self.about.take() {
            return Some(News::Begin { about, at: self.at, last_event_id: self.last_event_id });
        }
        if !self.heard {
            return None;
        }
        if self.at < log.start() {
            (self.at, self.last_event_id) = log.first_place();
            return Some(News::Skip { at: self.at, last_event_id: self.last_event_id });
        }
        if self.at.saturating_sub(self.told.taken) >= MIRROR_AHEAD_BYTES {
            return None;
        }
        if is_planted(Bug::MirrorPieceLost)
            && self.told.taken > 0
            && let Some((lent, _)) = log.lend_appends(self.at, shown)
            && self.at + lent.len() as u64 == log.end()
            && lent.len() > 1_000
        {
            self.at += lent.len() as u64;
        }
        if self.at >= shown.to {
            return None;
        }
        if let Some((lent, last_event_id)) = log.lend_appends(self.at, shown) {
            (self.at, self.last_event_id) = (self.at + lent.len() as u64, last_event_id);
            return Some(News::Bytes { bytes: lent.cells().iter().map(Cell::get).collect(), last_event_id });
        }
        let end = end.filter(|_| self.at == log.end() && !is_planted(Bug::MirrorEndUntold))?;
        self.over = true;
        Some(News::Over(end))
    }

    /// Whether the mirror is there, and was sent everything up to this offset.
    pub fn has(&self, at: u64) -> bool {
        self.heard && !self.over && self.at >= at
    }

    /// Offset of what is sent next.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Bytes that the mirror was sent and has not taken, beyond those that any may be ahead.
    pub fn excess_bytes(&self) -> u64 {
        (self.at - self.told.taken.min(self.at)).saturating_sub(MIRROR_AHEAD_BYTES)
    }

    /// The mirror has spoken.
    pub fn hear(&mut self, told: Told) {
        self.heard = true;
        self.told = Told { taken: self.told.taken.max(told.taken.min(self.at)), ..told };
    }

    /// Bytes of a log that the mirror's slowest reader has not been confirmed, about.
    pub fn pending_bytes(&self, log: &Log) -> u64 {
        (log.end() - self.told.taken.min(log.end())).max(self.told.pending_bytes)
    }
}

/// The mirror's end, beside its log.
#[derive(Debug)]
pub struct Replica {
    /// Of the link at home.
    pub opening: u64,
    told: Told,
    told_ms: u64,
    /// It has begun, or was passed over a hole, and has not told yet.
    unheard: bool,
}

/// What a mirror has become by some news.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Its log has grown.
    Grown,
    /// Its log goes on behind a hole.
    Skipped,
    /// Its log has all there will be.
    Over(End),
    /// Nothing that can follow: the mirror must be given up.
    Broken,
}

impl Replica {
    /// A mirror, and its log, that begins there.
    pub fn begin(opening: u64, at: u64, last_event_id: u64, window_bytes: u64) -> (Self, Log) {
        let told = Told { taken: at, ..Told::default() };
        let replica = Replica { opening, told, told_ms: 0, unheard: true };
        (replica, Log::part(at, last_event_id, window_bytes))
    }

    /// Takes what followed the beginning.
    pub fn take<A>(&mut self, news: News<A>, log: &mut Log) -> Turn {
        match news {
            News::Bytes { bytes, last_event_id } => {
                log.append_part(&bytes, last_event_id);
                Turn::Grown
            }
            News::Skip { .. } if is_planted(Bug::MirrorHoleUnseen) => Turn::Grown,
            News::Skip { at, last_event_id } if at > log.end() => {
                log.skip_to(at, last_event_id);
                self.unheard = true;
                Turn::Skipped
            }
            News::Over(end) => Turn::Over(end),
            News::Begin { .. } | News::Skip { .. } => Turn::Broken,
        }
    }

    /// Whether something is to be told. `taken`: as in [`Told`]. `waits`: the stream waits for its readers, and so for what is told
    /// here. `end`: of its log.
    pub fn has_to_tell(&self, taken: u64, readers: u32, waits: bool, end: u64, now_ms: u64) -> bool {
        let news = taken.saturating_sub(self.told.taken);
        if is_planted(Bug::MirrorNotRead) && !self.unheard {
            return false;
        }
        self.unheard
            || news >= MIRROR_TELL_BYTES
            // Whoever waits for the last byte is told of it.
            || waits && news > 0 && taken == end
            || (readers == 0) != (self.told.readers == 0)
            || (news > 0 || readers != self.told.readers) && now_ms >= self.told_ms + MIRROR_TELL_MS
    }

    /// When what has changed of its readers is to be told at the latest, ms; none: nothing has.
    pub fn tell_due_ms(&self, readers: u32) -> Option<u64> {
        (readers != self.told.readers).then_some(self.told_ms + MIRROR_TELL_MS)
    }

    /// What is told, for which there must be room.
    pub fn tell(&mut self, told: Told, now_ms: u64) -> Told {
        (self.unheard, self.told_ms) = (false, now_ms);
        self.told = Told { taken: told.taken.max(self.told.taken), ..told };
        self.told
    }
}

/// Whether a reader with this cursor may begin at a mirror whose log this is. Where not, its home knows more.
pub fn may_begin(log: &Log, after: u64) -> bool {
    log.holds_behind(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::LOG_SEGMENT_BYTES_MAX;
    use crate::log::Place;
    use std::collections::VecDeque;

    /// Numbers from a seed.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % bound
        }
    }

    /// Who reads the mirror's log.
    struct Reader {
        at: u64,
        gaps: u32,
    }

    /// Two shards and two queues, and a list of all that was ever appended.
    struct Pair {
        home: Log,
        end: Option<End>,
        bytes: Vec<u8>,
        /// Where each event ends, by its id.
        ends: Vec<u64>,
        link: Link<()>,
        to_mirror: VecDeque<News<()>>,
        to_home: VecDeque<Told>,
        mirror: Option<(Replica, Log)>,
        over: Option<End>,
        readers: Vec<Reader>,
        waits: bool,
        window_bytes: u64,
        largest: u64,
        skips: u32,
        /// What may be delivered, and what will be next; of one that waits for nothing everything may be.
        shown: Shown,
        unshown: VecDeque<Shown>,
        gated: bool,
    }

    const ROOM: usize = 4;

    impl Pair {
        fn new(numbers: &mut Numbers) -> Self {
            let window_bytes = [2_000, 100_000, 1 << 30][numbers.below(3) as usize];
            let mut home = Log::new();
            home.append(&[b"head"]);
            home.keep(window_bytes);
            let mut pair = Pair {
                link: Link::new(1, (), &home),
                home,
                end: None,
                bytes: b"head".to_vec(),
                ends: vec![4],
                to_mirror: VecDeque::new(),
                to_home: VecDeque::new(),
                mirror: None,
                over: None,
                readers: Vec::new(),
                waits: numbers.below(3) == 0,
                window_bytes,
                largest: 0,
                skips: 0,
                shown: Shown::ALL,
                unshown: VecDeque::new(),
                gated: false,
            };
            // A mirror is made at any time of a stream's life.
            for _ in 0..numbers.below(300) {
                pair.append(numbers);
                pair.home.release(pair.home.end());
            }
            pair.link = Link::new(1, (), &pair.home);
            pair.gated = numbers.below(3) == 0;
            if pair.gated {
                pair.shown = pair.place();
            }
            pair
        }

        fn place(&self) -> Shown {
            Shown { to: self.home.end(), last_event_id: Some(self.home.last_event_id()) }
        }

        /// What was appended since is on its way to the disk, or has come there.
        fn record(&mut self, arrives: bool) {
            if arrives {
                self.shown = self.unshown.pop_front().unwrap_or(self.shown);
            } else if self.gated {
                self.unshown.push_back(if self.end.is_some() { Shown::ALL } else { self.place() });
            }
        }

        fn append(&mut self, numbers: &mut Numbers) {
            if self.end.is_some() {
                return;
            }
            if numbers.below(5) == 0 {
                self.home.append(&[b"3\r\n:\n\n\r\n"]);
                self.bytes.extend_from_slice(b"3\r\n:\n\n\r\n");
                return;
            }
            let bytes = match numbers.below(60) {
                0 => 200_000,
                1..=10 => 9_000,
                11..=30 => 400,
                _ => 20,
            };
            let block = format!("id: {}\ndata: {}\n\n", self.home.next_event_id(), "x".repeat(bytes));
            let event = format!("{:x}\r\n{block}\r\n", block.len());
            self.largest = self.largest.max(event.len() as u64);
            self.home.append(&[event.as_bytes()]);
            self.home.event_ends();
            self.bytes.extend_from_slice(event.as_bytes());
            self.ends.push(self.home.end());
        }

        /// As a shard follows its readers.
        fn follow(&mut self) {
            let owed = if self.waits { self.link.told.taken } else { self.home.end() };
            self.home.release(owed.min(self.home.end()).min(self.shown.to));
        }

        fn feed(&mut self) {
            while self.to_mirror.len() < ROOM
                && let Some(news) = self.link.next(&self.home, self.shown, self.end)
            {
                self.skips += u32::from(matches!(news, News::Skip { .. }));
                self.to_mirror.push_back(news);
            }
            let in_flight = self.link.at - self.link.told.taken;
            let most = MIRROR_AHEAD_BYTES + self.largest.max(LOG_SEGMENT_BYTES_MAX as u64);
            assert!(self.skips > 0 || in_flight <= most, "{in_flight} bytes are under way");
        }

        fn deliver(&mut self) {
            match (self.to_mirror.pop_front(), &mut self.mirror) {
                (None, _) => {}
                (Some(News::Begin { at, last_event_id, .. }), None) => {
                    self.mirror = Some(Replica::begin(1, at, last_event_id, self.window_bytes));
                }
                (Some(news), Some((replica, log))) => match replica.take(news, log) {
                    Turn::Over(end) => self.over = Some(end),
                    Turn::Grown | Turn::Skipped => {}
                    Turn::Broken => panic!("news that cannot follow"),
                },
                (Some(news), None) => panic!("{news:?} before the beginning"),
            }
        }

        fn subscribe(&mut self, numbers: &mut Numbers) {
            let Some((_, log)) = &self.mirror else { return };
            let (_, first) = log.first_place();
            let after = match numbers.below(4) {
                0 => numbers.below(self.ends.len() as u64 + 1),
                1 => log.last_event_id(),
                _ => first + numbers.below(log.last_event_id() - first + 1),
            };
            let place = log.behind(after, true);
            assert_eq!(may_begin(log, after), matches!(place, Place::At(_)), "behind {after}: {place:?}");
            if let Place::At(at) = place {
                let end = self.ends[after as usize];
                let between = &self.bytes[end as usize..at as usize];
                assert!(between.chunks(8).all(|chunk| chunk == b"3\r\n:\n\n\r\n"), "behind {after}");
                self.readers.push(Reader { at, gaps: 0 });
            }
        }

        /// A reader is given some more.
        fn read(&mut self, nth: usize) {
            let Some((_, log)) = &self.mirror else { return };
            let Some(reader) = self.readers.get_mut(nth) else { return };
            if reader.at < log.start() {
                (reader.at, reader.gaps) = (log.first_place().0, reader.gaps + 1);
            }
            if let Some(lent) = log.lend(reader.at, u32::MAX) {
                let from = reader.at as usize;
                assert!(lent.to_vec() == self.bytes[from..from + lent.len()], "other bytes than the home's");
                reader.at += lent.len() as u64;
                assert!(reader.at <= self.shown.to, "what may not be delivered yet");
            }
        }

        fn tell(&mut self, now_ms: u64) {
            let Some((replica, log)) = &mut self.mirror else { return };
            let slowest = self.readers.iter().map(|reader| reader.at).min().filter(|_| self.waits);
            let taken = slowest.unwrap_or(log.end());
            log.release(taken.min(log.end()));
            if self.to_home.len() < ROOM {
                let readers = self.readers.len() as u32;
                if replica.has_to_tell(taken, readers, self.waits, log.end(), now_ms) {
                    let told = Told { taken, readers, pending_bytes: 7 };
                    self.to_home.push_back(replica.tell(told, now_ms));
                }
            }
        }

        fn hear(&mut self) {
            if let Some(told) = self.to_home.pop_front() {
                self.link.hear(told);
            }
        }
    }

    #[test]
    fn at_any_interleaving_readers_get_the_bytes_of_the_home_or_a_gap() {
        let (mut skips, mut gaps, mut whole) = (0, 0, 0);
        for seed in 0..400 {
            let mut numbers = Numbers(seed * 2 + 1);
            let mut pair = Pair::new(&mut numbers);
            let patience = 1 + numbers.below(6);
            for step in 0..600 {
                match numbers.below(12 + patience) {
                    10 => pair.record(false),
                    11 => pair.record(true),
                    0..=2 => pair.append(&mut numbers),
                    3 => pair.follow(),
                    4 => pair.feed(),
                    5 => pair.deliver(),
                    6 => pair.subscribe(&mut numbers),
                    7 => pair.tell(step),
                    8 => pair.hear(),
                    9 if step > 500 => pair.end = Some(End::Done),
                    9 if step % 4 == 0 => {
                        let nth = numbers.below(pair.readers.len().max(1) as u64) as usize;
                        if nth < pair.readers.len() {
                            pair.readers.swap_remove(nth);
                        }
                    }
                    _ => pair.read(numbers.below(pair.readers.len().max(1) as u64) as usize),
                }
            }
            // And then everybody goes on to the end.
            pair.end = Some(End::Done);
            pair.record(false);
            for round in 0..100_000 {
                pair.record(true);
                pair.follow();
                pair.feed();
                pair.deliver();
                pair.tell(1_000 + round);
                pair.hear();
                (0..pair.readers.len()).for_each(|nth| pair.read(nth));
                let all = pair.readers.iter().all(|reader| reader.at == pair.home.end());
                if pair.over.is_some() && all {
                    break;
                }
            }
            assert_eq!(pair.over, Some(End::Done), "seed {seed}: the end does not come");
            let (_, log) = pair.mirror.as_ref().unwrap();
            assert_eq!((log.end(), log.last_event_id()), (pair.home.end(), pair.home.last_event_id()));
            for reader in &pair.readers {
                assert_eq!(reader.at, log.end(), "seed {seed}");
                (gaps, whole) = (gaps + reader.gaps, whole + u32::from(reader.gaps == 0));
            }
            skips += pair.skips;
        }
        assert!(skips > 100 && gaps > 100 && whole > 1_000, "{skips} skips, {gaps} gaps, {whole} without");
    }

    #[test]
    fn a_stream_that_waits_for_its_readers_waits_for_those_of_a_mirror() {
        let mut numbers = Numbers(5);
        let mut pair = Pair::new(&mut numbers);
        (pair.waits, pair.window_bytes) = (true, 1_000);
        pair.feed();
        pair.deliver();
        pair.readers.push(Reader { at: pair.link.at, gaps: 0 });
        let begun_at = pair.link.at;
        for now_ms in 0..2_000 {
            pair.append(&mut numbers);
            pair.feed();
            pair.deliver();
            pair.tell(now_ms);
            pair.hear();
            pair.follow();
        }
        assert_eq!((pair.link.told.taken, pair.skips), (begun_at, 0), "its reader has had nothing");
        assert!(pair.home.start() <= begun_at, "so all of it is held");
        assert!(pair.link.next(&pair.home, Shown::ALL, None).is_none(), "and no more is sent ahead");
    }

    #[test]
    fn what_cannot_follow_is_seen() {
        let (mut replica, mut log) = Replica::begin(3, 100, 5, 1_000);
        assert_eq!(
            replica.take(News::<()>::Bytes { bytes: Box::from(*b"123"), last_event_id: 6 }, &mut log),
            Turn::Grown
        );
        assert_eq!(replica.take(News::<()>::Skip { at: 103, last_event_id: 6 }, &mut log), Turn::Broken);
        assert_eq!(replica.take(News::<()>::Skip { at: 104, last_event_id: 6 }, &mut log), Turn::Skipped);
        assert_eq!((log.start(), log.end(), log.behind(6, true)), (104, 104, Place::At(104)));
        let again = News::Begin { about: (), at: 104, last_event_id: 6 };
        assert_eq!(replica.take(again, &mut log), Turn::Broken);
    }
}
