//! Streams with many readers are read on every shard: each has a mirror of its own, a log that the stream's home fills through the
//! mesh, and whose readers it serves as those of any stream (`reader`). What the two ends tell each other is
//! [`protocol::mirror`]'s; here: who opens mirrors, who reads them, and their end.
//!
//! ```text
//!   home                                              another shard
//!   Source ─ readers                                  Source ─ readers          no producer: its log grows by news
//!     └─ Mirrored::Home: a Link for each ◄─ mesh ─►     └─ Mirrored::Mirror: a Replica
//! ```
//! A client is moved to the home of what it asks for, as long as its own shard has no mirror of it, or not from its cursor on. The home
//! opens one when a client is moved there from a shard that has none, and the stream has readers enough. To the home an open mirror
//! is a reader. It goes when nobody reads it, after a moment.

use super::kept::{Source, numbered};
use super::tail::Tail;
use super::{Leaving, Shard, TimerOf};
use crate::io::Io;
use crate::mesh::{About, Letter, Neighbours, Says, Subject};
use crate::settings::OnLeave;
use protocol::fault::Fault;
use protocol::http::{Framing, RequestHead};
use protocol::limits::{MIRROR_IDLE_MS, MIRROR_MESSAGES_PER_TURN_MAX, MIRRORS_MAX, RESUME_STREAM_COST_BYTES};
use protocol::log::{Log, Shown};
use protocol::mirror::{Link, News, Replica, Told, Turn, may_begin};
use protocol::phase::End;
use protocol::planted::{Bug, is_planted};
use protocol::resume::{Ask, Want};
use protocol::slots::Key;
use std::collections::{BTreeSet, HashMap};

/// What a source has to do with other shards.
pub(super) enum Mirrored {
    /// It is at home, and these are its mirrors, with their shards.
    Home(Vec<(usize, Link<About>)>),
    /// It is a mirror of a stream on this shard. When nobody reads it, it waits until then, ms.
    Mirror(usize, Replica, u64),
}

/// What a shard knows of mirrors.
#[derive(Default)]
pub(super) struct Mirrors {
    /// Those that are here and live.
    here: HashMap<Subject, Key>,
    /// Tails of this shard that have some.
    tails: HashMap<u64, Key>,
    /// How many tails this shard has made.
    tails_made: u64,
    /// Of the next that is opened for a stream of this shard.
    next_opening: u64,
    /// How many there are of streams of this shard.
    links: usize,
    /// Streams that found a queue full.
    pub(super) blocked: BTreeSet<Key>,
    /// Last letters that did: of mirrors that are gone, or never were.
    unsent: Vec<(usize, Letter)>,
    /// Letters may have come.
    pub(super) rung: bool,
}

impl Mirrors {
    /// Mirrors of tails that are here.
    pub(super) fn of_tails(&self) -> impl Iterator<Item = Key> {
        let tails = self.here.iter().filter(|(subject, _)| matches!(subject, Subject::Tail(_)));
        tails.map(|(_, &key)| key)
    }

    /// A number that no other tail has.
    pub(super) fn number_tail(&mut self, shard: u16) -> u64 {
        self.tails_made += 1;
        numbered(shard, self.tails_made)
    }
}

impl Source {
    /// What mirrors of it are mirrors of.
    pub(super) fn subject(&self) -> Subject {
        match &self.tail {
            Some(_) => Subject::Tail(self.number),
            None => Subject::Stream(self.number),
        }
    }

    /// Whether it is a mirror.
    pub(super) fn is_mirror(&self) -> bool {
        self.mirrored.as_ref().is_some_and(|mirrored| matches!(**mirrored, Mirrored::Mirror(..)))
    }

    /// The shard that has the stream, if it is a mirror.
    pub(super) fn mirror_of(&self) -> Option<usize> {
        match self.mirrored.as_deref() {
            Some(Mirrored::Mirror(home, ..)) => Some(*home),
            _ => None,
        }
    }

    fn links(&self) -> &[(usize, Link<About>)] {
        match self.mirrored.as_deref() {
            Some(Mirrored::Home(links)) => links,
            _ => &[],
        }
    }

    fn links_mut(&mut self) -> Option<&mut Vec<(usize, Link<About>)>> {
        match self.mirrored.as_deref_mut() {
            Some(Mirrored::Home(links)) => Some(links),
            _ => None,
        }
    }

    pub(super) fn has_mirrors(&self) -> bool {
        !self.links().is_empty()
    }

    /// Its mirror on that shard.
    pub(super) fn mirror_at(&self, shard: usize) -> Option<&Link<About>> {
        self.links().iter().find(|(to, _)| *to == shard).map(|(_, link)| link)
    }

    /// Memory of a mirror that counts as kept.
    pub(super) fn mirror_bytes(&self) -> u64 {
        (self.log.memory_bytes() as u64).saturating_sub(self.drawn) + RESUME_STREAM_COST_BYTES
    }

    /// How many read its mirrors, as far as they have said.
    pub(super) fn readers_elsewhere(&self) -> usize {
        self.links().iter().map(|(_, link)| link.told.readers as usize).sum()
    }

    /// Whether somebody reads it by its id, here or elsewhere.
    pub(super) fn is_read(&self) -> bool {
        !self.readers.is_empty() || self.has_mirrors() && !is_planted(Bug::MirrorCountsNot)
    }

    /// What the mirror that has taken least has taken.
    pub(super) fn slowest_mirror(&self) -> Option<u64> {
        self.links().iter().map(|(_, link)| link.told.taken).min()
    }

    /// What its mirrors say of their readers: how many, and what the slowest of each is behind by.
    pub(super) fn read_elsewhere(&self, log: &Log) -> (usize, Vec<u64>) {
        let read = || self.links().iter().map(|(_, link)| link).filter(|link| link.told.readers > 0);
        let pending = read().map(|link| link.pending_bytes(log)).collect();
        (read().map(|link| link.told.readers as usize).sum(), pending)
    }
}

impl<I: Io> Shard<I> {
    // ---- at home

    /// A client that was moved here begins to read: if its stream has readers enough, the shard it came from is given a mirror.
    pub(super) fn mirror_for(&mut self, source_key: Key, client: Key) {
        let moved_from = self.conns.get_mut(client).and_then(|conn| conn.client()?.moved_from.take());
        let (Some(shard), enough) = (moved_from.map(usize::from), self.settings.mirror_readers) else {
            return;
        };
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let wanted = enough > 0
            && source.readers.len() > enough
            && source.producer.is_some()
            && source.tail.is_none()
            && self.leaving == Leaving::No
            && source.mirror_at(shard).is_none();
        if wanted {
            self.open_mirror(source_key, shard);
        }
    }

    /// A shard is to have a mirror that has none.
    pub(super) fn open_mirror(&mut self, source_key: Key, shard: usize) {
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let open = self.neighbours.as_ref().is_some_and(|neighbours| neighbours.is_open(shard));
        let Some(log) = self.source_log(source).filter(|_| open) else { return };
        let about = About {
            route: source.route,
            dialect: source.dialect,
            chunked: source.chunked,
            background: source.background,
            on_leave: source.on_leave,
            began_ms: source.began_ms,
            shared: source.tail.as_ref().map(|tail| tail.shared),
        };
        let opening = self.mirrors.next_opening;
        let link = Link::new(opening, about, log);
        self.mirrors.next_opening += 1;
        self.mirrors.links += 1;
        self.stats.counters.mirrors_opened += 1;
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        match source.links_mut() {
            Some(links) => links.push((shard, link)),
            None => source.mirrored = Some(Box::new(Mirrored::Home(vec![(shard, link)]))),
        }
        if source.tail.is_some() {
            self.mirrors.tails.insert(source.number, source_key);
        }
        self.kept.stir(source_key);
    }

    /// Sends a stream's mirrors what has been appended.
    pub(super) fn feed_mirrors(&mut self, source_key: Key) {
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        if !source.has_mirrors() {
            return;
        }
        // Taken out while the log is looked at.
        let Some(mut mirrored) = source.mirrored.take() else { return };
        let (subject, mut blocked, mut drawn) = (source.subject(), false, 0);
        if let (Mirrored::Home(links), Some(neighbours), Some(source)) =
            (&mut *mirrored, &mut self.neighbours, self.kept.sources.get(source_key))
        {
            let producer = source.producer.and_then(|producer| self.streams.get(producer));
            let (log, end) = match producer {
                Some(stream) if stream.produced => (&stream.response, stream.end),
                Some(stream) => (&stream.response, None),
                None => (&source.log, source.end),
            };
            let shown = Shown { to: source.shown, last_event_id: source.shown_event_id };
            for (shard, link) in links {
                loop {
                    if neighbours.awaits_room_for_letters(*shard) {
                        blocked = true;
                        break;
                    }
                    let Some(mut news) = link.next(log, shown, end) else { break };
                    let excess_bytes = news.excess_bytes();
                    if excess_bytes > 0
                        && self.overdraft_bytes + excess_bytes > self.settings.overdraft_bytes_max
                    {
                        self.stats.counters.overdrafts_refused += 1;
                        news = news.without_bytes(link.at());
                    }
                    self.overdraft_bytes += news.excess_bytes();
                    drawn += news.excess_bytes();
                    let counters = &mut self.stats.counters;
                    let mut ends = Box::default();
                    match &news {
                        News::Bytes { bytes, .. } => {
                            counters.mirror_bytes += bytes.len() as u64;
                            if let Some(tail) = &source.tail {
                                ends = tail.ends_within(link.at() - bytes.len() as u64, link.at());
                            }
                        }
                        News::Skip { .. } => counters.mirrors_skipped += 1,
                        News::Begin { .. } | News::Over(_) => {}
                    }
                    let says = Says::News(news, ends);
                    neighbours.write(*shard, Letter { subject, opening: link.opening, says });
                }
            }
        }
        if let Some(source) = self.kept.sources.get_mut(source_key) {
            source.mirrored = Some(mirrored);
            source.drawn += drawn;
        }
        self.draw_for_mirrors(source_key);
        if blocked {
            self.mirrors.blocked.insert(source_key);
        }
        self.forget_links(source_key, |_, link| link.over);
    }

    /// Accounts for what its mirrors were sent beyond what any may be ahead: of events longer than that.
    fn draw_for_mirrors(&mut self, source_key: Key) {
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let drawn = source.links().iter().map(|(_, link)| link.excess_bytes()).sum();
        self.draw_for(source_key, drawn);
    }

    fn draw_for(&mut self, source_key: Key, drawn: u64) {
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let before = std::mem::replace(&mut source.drawn, drawn);
        self.overdraft_bytes = self.overdraft_bytes - before + drawn;
    }

    /// A mirror is none any more: its home is told, as soon as it can be.
    fn write_left(&mut self, home: usize, letter: Letter) {
        match &mut self.neighbours {
            _ if is_planted(Bug::MirrorLeftUntold) => {}
            Some(neighbours) if !neighbours.awaits_room_for_letters(home) => neighbours.write(home, letter),
            // Who is gone misses nobody.
            Some(neighbours) if neighbours.gone().any(|shard| shard == home) => {}
            _ => self.mirrors.unsent.push((home, letter)),
        }
    }

    /// Those that found a queue full try again.
    fn retry_mirrors(&mut self) {
        if is_planted(Bug::MirrorForgotten) {
            return;
        }
        for (home, letter) in std::mem::take(&mut self.mirrors.unsent) {
            self.write_left(home, letter);
        }
        for key in std::mem::take(&mut self.mirrors.blocked) {
            self.kept.stir(key);
        }
    }

    /// Mirrors of a stream are none any more.
    fn forget_links(&mut self, source_key: Key, gone: impl Fn(usize, &Link<About>) -> bool) {
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(links) = source.links_mut() else { return };
        let (mut forgotten, mut taken) = (0, 0);
        links.retain(|(shard, link)| {
            let goes = gone(*shard, link);
            if goes {
                (forgotten, taken) = (forgotten + 1, link.told.taken.max(taken));
            }
            !goes
        });
        if forgotten == 0 {
            return;
        }
        self.mirrors.links -= forgotten;
        self.draw_for_mirrors(source_key);
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        self.stats.counters.mirrors_closed += forgotten as u64;
        if !source.is_read() {
            source.owed_from = source.owed_from.max(taken);
        }
        if self.forsaken(source_key) {
            return self.remove_source(source_key);
        }
        self.kept.stir(source_key);
        self.orphan(source_key);
    }

    /// Whether a stream is over, its time too, and nobody reads it.
    pub(super) fn forsaken(&self, source_key: Key) -> bool {
        let Some(source) = self.kept.sources.get(source_key) else { return false };
        let over = source.producer.is_none() && source.expired;
        over && !source.is_read()
    }

    fn at_home(&self, letter: &Letter) -> Option<Key> {
        let &key = match letter.subject {
            Subject::Stream(number) => self.kept.by_number.get(&number)?,
            Subject::Tail(number) => self.mirrors.tails.get(&number)?,
        };
        let source = self.kept.sources.get(key)?;
        source.links().iter().any(|(_, link)| link.opening == letter.opening).then_some(key)
    }

    /// A shard does not read a tail, or not any more: it is not asked again at once.
    fn rest_from_mirrors(&mut self, source_key: Key) {
        let from_ms = self.now_ms() + MIRROR_IDLE_MS;
        if let Some(tail) = self.kept.sources.get_mut(source_key).and_then(|source| source.tail.as_mut()) {
            tail.mirror_from_ms = from_ms;
        }
    }

    fn heard_of_mirror(&mut self, letter: &Letter, told: Told) {
        let Some(key) = self.at_home(letter) else { return };
        let links = self.kept.sources.get_mut(key).and_then(Source::links_mut);
        let link = links.and_then(|links| links.iter_mut().find(|(_, link)| link.opening == letter.opening));
        if let Some((_, link)) = link {
            link.hear(told);
        }
        self.kept.stir(key);
    }

    /// Whether all that is to be told of streams of this shard has been told.
    pub(super) fn mirrors_told(&self) -> bool {
        self.mirrors.links == 0
    }

    // ---- once per turn, at both ends

    /// Reads what other shards have written.
    pub(super) fn read_letters(&mut self) {
        if !std::mem::take(&mut self.mirrors.rung) {
            return;
        }
        self.retry_mirrors();
        for _ in 0..MIRROR_MESSAGES_PER_TURN_MAX {
            let Some((from, letter)) = self.neighbours.as_mut().and_then(Neighbours::read) else {
                return self.miss_neighbours();
            };
            match letter {
                Letter { subject, opening, says: Says::News(news, ends) } => {
                    self.take_news(from, subject, opening, news, &ends);
                }
                Letter { says: Says::Told(told), .. } => self.heard_of_mirror(&letter, told),
                Letter { says: Says::Left, opening, .. } => {
                    if let Some(key) = self.at_home(&letter) {
                        self.rest_from_mirrors(key);
                        self.forget_links(key, |_, link| link.opening == opening);
                    }
                }
            }
        }
        // The others wait for the next turn, which does not sleep.
        self.mirrors.rung = true;
    }

    /// Shards that are gone have no mirrors, and no streams.
    fn miss_neighbours(&mut self) {
        if self.mirrors.links == 0 && self.mirrors.here.is_empty() {
            return;
        }
        let Some(neighbours) = &self.neighbours else { return };
        for shard in neighbours.gone().collect::<Vec<_>>() {
            let keys: Vec<Key> = self.kept.sources.iter().map(|(key, _)| key).collect();
            for key in keys {
                self.forget_links(key, |to, _| to == shard);
                let live = self.kept.sources.get(key).is_some_and(|source| source.end.is_none());
                if live && self.kept.sources.get(key).and_then(Source::mirror_of) == Some(shard) {
                    self.break_mirror(key);
                }
            }
        }
    }

    // ---- at the mirror

    /// The mirror of something of another shard.
    pub(super) fn mirror_here(&self, subject: Subject) -> Option<Key> {
        self.mirrors.here.get(&subject).copied()
    }

    /// Whether a request for a stream of another shard is answered from a mirror here.
    pub(super) fn reads_mirror(&self, head: &RequestHead<'_, '_>) -> bool {
        if self.mirrors.here.is_empty() || !matches!(head.framing, Framing::None | Framing::Length(0)) {
            return false;
        }
        let asked: Result<Ask, Fault> = Ask::parse(head);
        let Ok(Ask { id, want: Want::Events { after } }) = asked else { return false };
        let subject = Subject::Stream(numbered(id.shard, id.number));
        let source = self.mirror_here(subject).and_then(|key| self.kept.sources.get(key));
        self.kept.is_ours(&id)
            && source.is_some_and(|source| source.end.is_none() && may_begin(&source.log, after))
    }

    fn take_news(
        &mut self,
        from: usize,
        subject: Subject,
        opening: u64,
        news: News<About>,
        ends: &[(u64, u64)],
    ) {
        if let News::Begin { about, at, last_event_id } = news {
            return self.begin_mirror(from, subject, opening, about, (at, last_event_id));
        }
        let Some(key) = self.mirror_here(subject) else { return };
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        let Some(Mirrored::Mirror(home, replica, _)) = source.mirrored.as_deref_mut() else { return };
        if (*home, replica.opening) != (from, opening) {
            return;
        }
        // As at home, only that what is missing is so for the readers of one shard.
        let excess_bytes = news.excess_bytes();
        let news = if excess_bytes > 0
            && self.overdraft_bytes + excess_bytes > self.settings.overdraft_bytes_max
            && let News::Bytes { bytes, .. } = &news
        {
            self.stats.counters.overdrafts_refused += 1;
            let to = source.log.end() + bytes.len() as u64;
            news.without_bytes(to)
        } else {
            news
        };
        let turn = replica.take(news, &mut source.log);
        if let Some(tail) = &mut source.tail {
            tail.grew(ends, source.log.start());
        }
        match turn {
            Turn::Grown | Turn::Skipped => self.kept.stir(key),
            Turn::Over(end) => self.mirror_over(key, end),
            Turn::Broken => {
                debug_assert!(false, "news that cannot follow");
                self.break_mirror(key);
            }
        }
    }

    fn begin_mirror(&mut self, from: usize, subject: Subject, opening: u64, about: About, at: (u64, u64)) {
        let About { route, dialect, chunked, background, on_leave, began_ms, shared } = about;
        let (Subject::Stream(number) | Subject::Tail(number)) = subject;
        let mut source = Source::new(number, None, route, dialect, chunked, began_ms);
        (source.background, source.on_leave) = (background, on_leave);
        source.tail = shared.map(|shared| Box::new(Tail::new(shared)));
        let window_bytes = match shared {
            Some(_) => self.settings.lag_high_bytes,
            None => self.resume_of_source(&source).map_or(0, |resume| resume.window_bytes),
        };
        let (replica, log) = Replica::begin(opening, at.0, at.1, window_bytes);
        source.log = log;
        source.mirrored = Some(Box::new(Mirrored::Mirror(from, replica, 0)));
        source.charged = RESUME_STREAM_COST_BYTES;
        let known = self.mirrors.here.contains_key(&subject);
        debug_assert!(!known, "a stream has one mirror on a shard");
        let room = self.mirrors.here.len() < MIRRORS_MAX;
        let key = match self.leaving == Leaving::No && room && !known {
            true => self.kept.sources.insert(source).ok(),
            false => None,
        };
        let Some(key) = key else {
            return self.write_left(from, Letter { subject, opening, says: Says::Left });
        };
        self.kept.bytes += RESUME_STREAM_COST_BYTES;
        if shared.is_none() {
            self.kept.live_too(key);
            self.follow_ages();
        }
        self.mirrors.here.insert(subject, key);
        self.mirror_idle(key, MIRROR_IDLE_MS);
        // Its home hears that it is here.
        self.kept.stir(key);
    }

    /// A mirror waits for readers for so long.
    fn mirror_idle(&mut self, key: Key, wait_ms: u64) {
        let due_ms = self.now_ms() + wait_ms;
        if let Some(source) = self.kept.sources.get_mut(key)
            && let Some(Mirrored::Mirror(.., idle_until_ms)) = source.mirrored.as_deref_mut()
        {
            *idle_until_ms = due_ms;
            super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(key));
        }
    }

    /// If a source is a mirror: its last reader may have left. False if it is none.
    pub(super) fn mirror_orphaned(&mut self, key: Key) -> bool {
        let Some(source) = self.kept.sources.get(key).filter(|source| source.is_mirror()) else {
            return false;
        };
        if source.readers.is_empty() && source.end.is_none() {
            let resume = self.resume_of_source(source);
            let cancels =
                source.tail.is_none() && resume.is_none_or(|resume| resume.on_leave == OnLeave::Cancel);
            // The backend of a stream that is to end with its last reader is not kept waiting.
            if cancels || self.leaving != Leaving::No {
                self.close_mirror(key);
            } else {
                self.mirror_idle(key, MIRROR_IDLE_MS);
            }
        }
        true
    }

    /// If a source is a live mirror, its timer has fired: it has waited for a reader, or has news of those that it has. False if it is
    /// none.
    pub(super) fn mirror_due(&mut self, key: Key) -> bool {
        let now_ms = self.now_ms();
        let Some(source) = self.kept.sources.get_mut(key).filter(|source| source.end.is_none()) else {
            return false;
        };
        let Some(Mirrored::Mirror(.., idle_until_ms)) = source.mirrored.as_deref() else { return false };
        let idle_until_ms = *idle_until_ms;
        if !source.readers.is_empty() {
            self.kept.stir(key);
        } else if idle_until_ms <= now_ms {
            self.close_mirror(key);
        } else {
            super::deadline::arm(&mut self.wheel, &mut source.timer, idle_until_ms, TimerOf::Source(key));
        }
        true
    }

    /// If a source is a live mirror, and nobody reads it, it goes. False if it is none.
    pub(super) fn close_mirror(&mut self, key: Key) -> bool {
        let Some(source) = self.kept.sources.get(key) else { return false };
        let Some(Mirrored::Mirror(home, replica, _)) = source.mirrored.as_deref() else { return false };
        if source.end.is_some() {
            return false;
        }
        if source.readers.is_empty() {
            let letter = Letter { subject: source.subject(), opening: replica.opening, says: Says::Left };
            let home = *home;
            self.write_left(home, letter);
            self.remove_source(key);
        }
        true
    }

    /// A mirror has all there will be of its stream.
    fn mirror_over(&mut self, key: Key, end: End) {
        let now_ms = self.now_ms();
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        (source.end, source.ended_ms, source.expired) = (Some(end), now_ms, true);
        if let Some((timer, _)) = source.timer.take() {
            self.wheel.remove(timer);
        }
        self.forget_mirror(key);
        match self.forsaken(key) {
            true => self.remove_source(key),
            false => self.kept.stir(key),
        }
    }

    /// The home is gone with its streams: whoever reads this one is told, as by a shard that stops.
    fn break_mirror(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if source.tail.is_some() {
            return self.break_tail(key);
        }
        self.scratch.clear();
        source.dialect.write_error_event_numbered(&End::Stopped.fault(), None, &mut self.scratch);
        let last_event_id = source.log.last_event_id();
        let block = super::stream::last_block(&self.scratch, source.chunked);
        source.log.append_part(&block, last_event_id);
        self.mirror_over(key, End::Stopped);
    }

    /// Its readers come again and find where they were; only who is within an event must not take that for whole.
    fn break_tail(&mut self, key: Key) {
        let readers = self.kept.sources.get(key).map(|source| source.readers.clone());
        for reader in readers.into_iter().flatten() {
            self.durable_end(reader, End::Gone);
        }
        self.mirror_over(key, End::Gone);
    }

    /// Nobody finds a mirror any more, nor the mirrors of a tail.
    pub(super) fn forget_mirror(&mut self, key: Key) {
        let Some(source) = self.kept.sources.get(key) else { return };
        let subject = source.subject();
        if source.is_mirror() {
            if self.mirrors.here.get(&subject) == Some(&key) {
                self.mirrors.here.remove(&subject);
            }
        } else if source.tail.is_some() {
            self.mirrors.tails.remove(&source.number);
        }
    }

    /// What a mirror's readers have had is what its log need not hold for them, and what its home may hear.
    pub(super) fn follow_mirror(&mut self, key: Key) {
        let (waits, now_ms) = (self.is_held_up(key), self.now_ms());
        let Some(source) = self.kept.sources.get(key) else { return };
        let (end, readers) = (source.log.end(), source.readers.len() as u32);
        let confirmed = |key: &Key| Some(self.streams.get(*key)?.reader.as_ref()?.confirmed());
        let slowest = || source.readers.iter().filter_map(confirmed).min().unwrap_or(end).min(end);
        let taken = if waits { slowest() } else { end };
        let told = match source.mirrored.as_deref() {
            Some(Mirrored::Mirror(_, replica, _))
                if source.end.is_none() && replica.has_to_tell(taken, readers, waits, end, now_ms) =>
            {
                Some(Told { taken, readers, pending_bytes: end - slowest() })
            }
            _ => None,
        };
        let tell_due_ms = match source.mirrored.as_deref() {
            Some(Mirrored::Mirror(_, replica, _)) if told.is_none() && source.end.is_none() => {
                replica.tell_due_ms(readers)
            }
            _ => None,
        };
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        if let Some(due_ms) = tell_due_ms {
            super::deadline::arm(&mut self.wheel, &mut source.timer, due_ms, TimerOf::Source(key));
        }
        if source.end.is_none() {
            // Of one that is over, whoever was owed it still is.
            source.log.release(taken);
        }
        // What is owed to readers beyond what any stream may hold for itself: events longer than that.
        let owed = (source.log.memory_bytes() as u64).saturating_sub(source.log.history_bytes());
        let drawn = owed.saturating_sub(self.settings.share_bytes());
        self.draw_for(key, drawn);
        let Some(source) = self.kept.sources.get_mut(key) else { return };
        let charged = source.mirror_bytes();
        let before = std::mem::replace(&mut source.charged, charged);
        self.kept.bytes = self.kept.bytes - before + charged;
        if let (Some(told), Some(Mirrored::Mirror(home, replica, _)), Some(neighbours)) =
            (told, source.mirrored.as_deref_mut(), &mut self.neighbours)
        {
            if neighbours.awaits_room_for_letters(*home) {
                self.mirrors.blocked.insert(key);
            } else {
                let (home, opening) = (*home, replica.opening);
                let says = Says::Told(replica.tell(told, now_ms));
                neighbours.write(home, Letter { subject: source.subject(), opening, says });
            }
        }
        self.make_room_if_full();
    }
}

/// For simulations: whether what is mirrored agrees with itself.
impl<I: Io> Shard<I> {
    /// Whether letters have found no room.
    pub(super) fn has_unsent_letters(&self) -> bool {
        !self.mirrors.blocked.is_empty() || !self.mirrors.unsent.is_empty()
    }

    pub(super) fn audit_mirror(&self, key: Key) -> Result<(), String> {
        let Some(source) = self.kept.sources.get(key) else { return Ok(()) };
        if source.is_mirror() {
            let found = self.mirrors.here.get(&source.subject()) == Some(&key);
            if found != source.end.is_none() {
                return Err("a mirror is found by its stream as long as that goes on".to_owned());
            }
            let waits = source.timer.is_some() || source.end.is_some() || !source.readers.is_empty();
            if source.producer.is_some() || !waits {
                return Err("a mirror that nobody reads waits for nothing".to_owned());
            }
        }
        Ok(())
    }

    /// The mirrors that there are must be those that are counted.
    pub(super) fn audit_mirrors(&self) -> Result<(), String> {
        let links: usize = self.kept.sources.iter().map(|(_, source)| source.links().len()).sum();
        let live = self.kept.sources.iter().filter(|(_, source)| source.is_mirror() && source.end.is_none());
        if links != self.mirrors.links || live.count() != self.mirrors.here.len() {
            return Err(format!("{links} mirrors elsewhere, {} are counted", self.mirrors.links));
        }
        Ok(())
    }
}
