//! A stream's event log: append-only, contiguous, wire-ready; the only path from a producer to a socket.
//! Bytes are appended once and lent to the kernel from where they lie, for any number of subscribers.
//!
//! ```text
//!   start (oldest byte held)             end (next byte appended)
//!     │                                    │
//!     ▼                                    ▼
//!   ┌─────────┬───────────────────┬────────┬ ─ ─ ─ ┐
//!   │ segment │ segment           │ segment   free │    each append lies in one segment whole
//!   └─────────┴───────────────────┴────────┴ ─ ─ ─ ┘
//! ```
//!
//! A log that is kept ([`Log::keep`]) holds on to what was delivered, as far as its window reaches, and knows where each event
//! ends, so that a subscriber can begin behind any of them:
//!
//! ```text
//!   start ──── history, up to the window ──── floor ──── owed to somebody ──── end
//! ```
//! What everybody has had is copied from small segments to large ones, behind one another, and the small ones are used again at
//! once: producing and sending stay in memory that is in the cache, and only the copy goes where nothing was for a window's
//! length.
//!
//! A segment is `Rc<[Cell<u8>]>`: its address is stable, whoever was lent a range keeps it alive, and appending behind a
//! lent range needs no unsafe code. Filled bytes are never written again while somebody else holds the segment.

use crate::limits::{LOG_SEGMENT_BYTES_MAX, LOG_SEGMENT_FIRST_BYTES, LOG_SETTLED_BYTES_MAX};
use crate::planted::{Bug, is_planted};
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

/// What memory is fetched by.
const CACHE_LINE_BYTES: usize = 64;

/// A contiguous range of a log, lent out (to the kernel): holds its memory until dropped.
#[derive(Clone)]
pub struct Lent {
    memory: Rc<[Cell<u8>]>,
    start: u32,
    end: u32,
}

impl Lent {
    /// The bytes. Nobody writes them while this value lives.
    pub fn cells(&self) -> &[Cell<u8>] {
        &self.memory[self.start as usize..self.end as usize]
    }

    /// Length in bytes, > 0.
    #[allow(clippy::len_without_is_empty, reason = "a lent range is never empty")]
    pub fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// The first `bytes` of it, or all if it has no more.
    pub fn first(&self, bytes: u32) -> Lent {
        let end = self.end.min(self.start.saturating_add(bytes));
        Lent { memory: Rc::clone(&self.memory), start: self.start, end }
    }

    /// What is left behind the first `bytes`; `None`: nothing.
    pub fn skip(mut self, bytes: u32) -> Option<Lent> {
        self.start = self.start.saturating_add(bytes);
        (self.start < self.end).then_some(self)
    }

    /// A copy of the bytes, for simulations and tests.
    pub fn to_vec(&self) -> Vec<u8> {
        self.cells().iter().map(Cell::get).collect()
    }
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lent({} bytes)", self.len())
    }
}

struct Segment {
    memory: Rc<[Cell<u8>]>,
    /// Log offset of `memory[0]`.
    base: u64,
    /// Id of the first event in it, or of the next one if there is none.
    first_id: u64,
    /// `0 <= filled <= memory.len()`
    filled: u32,
}

impl Segment {
    fn with_capacity(base: u64, first_id: u64, bytes: usize, from: spare::End) -> Self {
        Segment { memory: spare::take(bytes, from), base, first_id, filled: 0 }
    }

    fn end(&self) -> u64 {
        self.base + u64::from(self.filled)
    }

    fn room(&self) -> usize {
        self.memory.len() - self.filled as usize
    }

    fn push_cells(&mut self, bytes: &[Cell<u8>]) {
        let start = self.filled as usize;
        for (cell, byte) in self.memory[start..start + bytes.len()].iter().zip(bytes) {
            cell.set(byte.get());
        }
        self.filled += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    }

    fn push(&mut self, bytes: &[u8]) {
        let start = self.filled as usize;
        for (cell, byte) in self.memory[start..start + bytes.len()].iter().zip(bytes) {
            cell.set(*byte);
        }
        self.filled += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    }
}

/// Memory of segments that nobody holds any more, kept for the next ones: a stream that keeps up with its model owns memory
/// only while its bytes are on the way, and finds the memory of the last one's still in the cache.
mod spare {
    use super::{Cell, LOG_SEGMENT_BYTES_MAX, LOG_SEGMENT_FIRST_BYTES, Rc};
    use crate::limits::LOG_SPARE_BYTES_MAX;
    use std::cell::RefCell;
    use std::collections::VecDeque;

    /// One list for each size: the first, its double, and so on.
    const SIZES: usize = (LOG_SEGMENT_BYTES_MAX / LOG_SEGMENT_FIRST_BYTES).ilog2() as usize + 1;
    const _: () =
        assert!(LOG_SEGMENT_FIRST_BYTES.is_power_of_two() && LOG_SEGMENT_BYTES_MAX.is_power_of_two());

    type Spares = [VecDeque<Rc<[Cell<u8>]>>; SIZES];

    thread_local! {
        static SPARES: RefCell<Spares> = const { RefCell::new([const { VecDeque::new() }; SIZES]) };
    }

    /// Which end of a list: what producing and sending have just used is in the cache, and is used again for that; what history
    /// has let go is not, and serves for history.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(super) enum End {
        Warm,
        Cold,
    }

    /// Bytes kept.
    #[cfg(test)]
    pub(super) fn bytes() -> usize {
        SPARES.with(|spares| spares.borrow().iter().flatten().map(|memory| memory.len()).sum())
    }

    fn list_of(bytes: usize) -> Option<usize> {
        let list = (bytes / LOG_SEGMENT_FIRST_BYTES).checked_ilog2()? as usize;
        (bytes == LOG_SEGMENT_FIRST_BYTES << list && list < SIZES).then_some(list)
    }

    /// At least `bytes`, of any content.
    pub(super) fn take(bytes: usize, from: End) -> Rc<[Cell<u8>]> {
        // Beyond the greatest size: made to measure, and not kept.
        let bytes = match bytes {
            0..=LOG_SEGMENT_BYTES_MAX => bytes.next_power_of_two().max(LOG_SEGMENT_FIRST_BYTES),
            large => large,
        };
        list_of(bytes)
            .and_then(|list| {
                let spares = |spares: &RefCell<Spares>| match from {
                    End::Warm => spares.borrow_mut()[list].pop_back(),
                    End::Cold => spares.borrow_mut()[list].pop_front(),
                };
                SPARES.try_with(spares).ok()?
            })
            .unwrap_or_else(|| std::iter::repeat_n(Cell::new(0), bytes).collect())
    }

    /// Memory that its log is done with; somebody else may still hold it.
    pub(super) fn give(memory: Rc<[Cell<u8>]>, to: End) {
        let bytes = memory.len();
        if let Some(list) = list_of(bytes)
            && Rc::strong_count(&memory) == 1
        {
            // While the thread ends there is nowhere to keep it.
            SPARES
                .try_with(|spares| {
                    let spares = &mut spares.borrow_mut()[list];
                    if (spares.len() + 1) * bytes <= LOG_SPARE_BYTES_MAX {
                        match to {
                            End::Warm => spares.push_back(memory),
                            End::Cold => spares.push_front(memory),
                        }
                    }
                })
                .ok();
        }
    }
}

/// Where in a log a subscriber is to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// At this offset, which is held.
    At(u64),
    /// It was, once; what is held begins behind the event with this id.
    Gone(u64),
    /// There is no such event yet.
    Ahead,
}

/// The log of one stream.
/// What each append, lend and release needs lies together; each line of memory more that they touch is one more that others have
/// pushed out of the cache meanwhile.
#[derive(Default)]
pub struct Log {
    end: u64,
    /// The segment that is being filled; none when nothing is held, or only history.
    last: Option<Segment>,
    /// Memory of all segments, bytes.
    memory_bytes: usize,
    last_event_id: u64,
    /// Of a log that is kept.
    kept: Option<Box<Kept>>,
    /// The segments before the last and the one of history, oldest first.
    older: VecDeque<Segment>,
}

/// Up to where a log may be read, which is between two appends, and the id of the last event there, where it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// Offset.
    pub to: u64,
    /// 0: there is none.
    pub last_event_id: Option<u64>,
}

impl Shown {
    /// Everything.
    pub const ALL: Shown = Shown { to: u64::MAX, last_event_id: None };
}

/// What a log knows that holds on to what was delivered.
struct Kept {
    /// Bytes of history that are held on to, > 0.
    window_bytes: u64,
    /// Everything below was delivered to all who are owed it.
    floor: u64,
    /// Offset of the oldest byte held.
    start: u64,
    /// With the floor there, the oldest segment lies outside of the window.
    forget_at: u64,
    /// The segment before the last that what is delivered is copied to.
    history: Option<Segment>,
    /// Where the events' own bytes begin, behind the head of the answer.
    begin: u64,
}

impl Kept {
    /// The oldest segment that may be let go ends there.
    fn follow_first(&mut self, end: Option<u64>) {
        self.forget_at = end.map_or(u64::MAX, |end| end + self.window_bytes);
    }
}

impl Log {
    /// An empty log; owns no memory until something is appended.
    pub fn new() -> Self {
        Self::default()
    }

    /// A log that is kept, as if all below `at` had been appended and let go, its events up to this id among it. The events
    /// themselves began at `begin`.
    pub fn restored(at: u64, begin: u64, last_event_id: u64, window_bytes: u64) -> Self {
        let mut log = Log::new();
        (log.end, log.last_event_id) = (at, last_event_id);
        let window_bytes = window_bytes.max(1);
        let kept = Kept { window_bytes, floor: at, start: at, forget_at: u64::MAX, history: None, begin };
        log.kept = Some(Box::new(kept));
        log
    }

    /// The id of the newest event that ends at or before `at`, where an append ended; `None`: nothing there is held.
    pub fn id_at(&self, at: u64, chunked: bool) -> Option<u64> {
        if at == self.end {
            return Some(self.last_event_id);
        }
        let segment = self.segments().rfind(|segment| segment.base <= at)?;
        let (mut id, from) = (segment.first_id - 1, segment.base.max(self.begin()));
        if from < at {
            let within = (from - segment.base) as usize..(at - segment.base) as usize;
            let bytes: Vec<u8> = segment.memory.get(within)?.iter().map(Cell::get).collect();
            crate::sse::each_block(&bytes, chunked, id + 1, |_, _, found| id = found.unwrap_or(id));
        }
        Some(id)
    }

    /// Where the events' own bytes begin, of a log that is kept.
    pub fn begin(&self) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.begin)
    }

    /// Offset of the next byte to be appended = bytes ever appended.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Offset of the oldest byte still held; equals `end` when nothing is held.
    pub fn start(&self) -> u64 {
        self.kept.as_ref().map_or_else(|| self.oldest(), |kept| kept.start)
    }

    fn oldest(&self) -> u64 {
        self.segments().next().map_or(self.end, |segment| segment.base)
    }

    /// Oldest first.
    fn segments(&self) -> impl DoubleEndedIterator<Item = &Segment> {
        self.older.iter().chain(self.history()).chain(&self.last)
    }

    fn history(&self) -> Option<&Segment> {
        self.kept.as_ref()?.history.as_ref()
    }

    /// Id of the newest event (0: none yet). Ids are dense from 1.
    pub fn last_event_id(&self) -> u64 {
        self.last_event_id
    }

    /// The id of the event that is appended next.
    pub fn next_event_id(&self) -> u64 {
        self.last_event_id + 1
    }

    /// What was appended last was that event.
    pub fn event_ends(&mut self) {
        self.last_event_id += 1;
    }

    /// Where a log that is kept has what lending and releasing need besides the log itself, for fetching it ahead.
    pub fn apart(&self) -> Option<*const u8> {
        self.kept.as_ref().map(|kept| std::ptr::from_ref(&**kept).cast())
    }

    /// Where the newest of what is kept lies, for fetching it ahead.
    pub fn history_apart(&self) -> Option<*const u8> {
        self.history().map(|history| history.memory.as_ptr().cast())
    }

    /// Where the next `bytes` that are delivered are copied to, line by line, for fetching it ahead: nobody has looked at that
    /// memory for long.
    pub fn settles_at(&self, bytes: usize) -> impl Iterator<Item = *const u8> {
        let room = self.history().map_or(&[][..], |history| &history.memory[history.filled as usize..]);
        room[..bytes.min(room.len())].chunks(CACHE_LINE_BYTES).map(|line| line.as_ptr().cast())
    }

    /// Bytes of memory held in segments, filled or not.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// Bytes held that nobody is owed: history.
    pub fn history_bytes(&self) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.floor - kept.start)
    }

    /// From here on, what is delivered is held on to, about the last `window_bytes` (> 0) of it. What was appended so far is
    /// the head of the answer; events follow.
    pub fn keep(&mut self, window_bytes: u64) {
        let start = self.oldest();
        self.kept = Some(Box::new(Kept {
            window_bytes: window_bytes.max(1),
            floor: start,
            start,
            forget_at: u64::MAX,
            history: None,
            begin: self.end,
        }));
        self.follow_window();
    }

    /// Notes what is the oldest byte held, and where the floor must be for the oldest segment to be let go.
    fn follow_window(&mut self) {
        let start = self.oldest();
        let Some(kept) = &mut self.kept else { return };
        kept.start = start;
        kept.follow_first(self.older.front().or(kept.history.as_ref()).map(Segment::end));
    }

    /// A log for a part of another one, in its offsets: what is appended first lies at `at` there, behind the event with this id
    /// (0: none, so that it is the other's first event). Kept, as by [`Log::keep`].
    pub fn part(at: u64, last_event_id: u64, window_bytes: u64) -> Self {
        let mut log = Log::new();
        (log.end, log.last_event_id) = (at, last_event_id);
        log.keep(window_bytes);
        if let Some(kept) = log.kept.as_mut().filter(|_| last_event_id > 0) {
            // Behind another event, what is held is never the start.
            kept.begin = 0;
        }
        log
    }

    /// What is appended next to a part of another log is not what follows there: it lies at `at`, beyond the end, behind the event
    /// with this id. Nothing before it is held any more.
    pub fn skip_to(&mut self, at: u64, last_event_id: u64) {
        debug_assert!(at > self.end && last_event_id >= self.last_event_id, "{self:?} skips to {at}");
        let is = self.older_is();
        let history = self.kept.as_mut().and_then(|kept| kept.history.take());
        for segment in self.older.drain(..).chain(history).chain(self.last.take()) {
            spare::give(segment.memory, is);
        }
        (self.memory_bytes, self.end, self.last_event_id) = (0, at, last_event_id);
        if let Some(kept) = &mut self.kept {
            kept.floor = kept.floor.max(at);
        }
        self.follow_window();
    }

    /// Appends to a part of another log what [`Log::lend_appends`] lent there.
    pub fn append_part(&mut self, bytes: &[u8], last_event_id: u64) {
        self.append(&[bytes]);
        self.last_event_id = last_event_id;
    }

    /// A range as [`Log::lend`] lends it, of as many whole appends as lie in one segment and are shown, and the id of the last event
    /// that ends in it or before it. `from` lies between two appends.
    pub fn lend_appends(&self, from: u64, shown: Shown) -> Option<(Lent, u64)> {
        let room = shown.to.checked_sub(from).filter(|&room| room > 0)?;
        let lent = self.lend(from, u32::MAX)?;
        if lent.len() as u64 > room {
            return Some((lent.first(room as u32), shown.last_event_id?));
        }
        let end = from + lent.len() as u64;
        let next = self.segments().find(|segment| segment.base == end && end < self.end);
        Some((lent, next.map_or(self.last_event_id, |segment| segment.first_id - 1)))
    }

    /// The first place in what is held where an event may begin, and the id of the last one before it.
    pub fn first_place(&self) -> (u64, u64) {
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.begin >= kept.start) {
            return (kept.begin, 0);
        }
        let first = self.segments().next();
        first.map_or((self.end, self.last_event_id), |segment| (segment.base, segment.first_id - 1))
    }

    /// Whether what follows the event with this id is held, as [`Log::behind`] would find.
    pub fn holds_behind(&self, id: u64) -> bool {
        let (_, first) = self.first_place();
        self.kept.is_some() && (first..=self.last_event_id).contains(&id)
    }

    /// Where a subscriber begins that has had the event with this id, and those before it (0: none). `chunked`: each append was
    /// one chunk.
    pub fn behind(&self, id: u64, chunked: bool) -> Place {
        if id > self.last_event_id {
            return Place::Ahead;
        }
        let Some(kept) = &self.kept else { return Place::Gone(self.last_event_id) };
        if id == 0 && kept.begin >= kept.start {
            return Place::At(kept.begin);
        }
        let Some(first) = self.segments().next() else {
            // All of it was let go, and nothing followed.
            return if id == self.last_event_id {
                Place::At(self.end)
            } else {
                Place::Gone(self.last_event_id)
            };
        };
        if id < first.first_id {
            // The end of that event is gone, but nothing that follows it.
            return match id + 1 == first.first_id {
                true => Place::At(first.base),
                false => Place::Gone(first.first_id - 1),
            };
        }
        let Some(segment) = self.segments().rfind(|segment| segment.first_id <= id) else {
            return Place::Gone(first.first_id - 1);
        };
        let bytes: Vec<u8> = segment.memory[..segment.filled as usize].iter().map(Cell::get).collect();
        let begin = kept.begin.saturating_sub(segment.base) as usize;
        match crate::sse::end_of_event(&bytes[begin.min(bytes.len())..], chunked, segment.first_id, id) {
            Some(end) => Place::At(segment.base + (begin + end) as u64),
            None => {
                debug_assert!(false, "event {id} is not where it should be");
                Place::Gone(self.last_event_id)
            }
        }
    }

    /// Everything below is delivered; a log that is not kept holds nothing below it.
    pub fn floor(&self) -> u64 {
        self.kept.as_ref().map_or_else(|| self.oldest(), |kept| kept.floor)
    }

    /// Lets history go until no more than `bytes` of it are held, in whole segments.
    pub fn forget(&mut self, bytes: u64) {
        let floor = self.floor();
        let over = |first: &mut Segment| first.end() <= floor && floor - first.end() >= bytes;
        while self.older.front_mut().is_some_and(&over) {
            self.drop_first();
        }
        if self.older.is_empty()
            && let Some(history) = self.kept.as_mut().and_then(|kept| kept.history.take_if(over))
        {
            self.give(history, spare::End::Cold);
        }
        self.follow_window();
    }

    fn drop_first(&mut self) {
        if let Some(segment) = self.older.pop_front() {
            self.give(segment, self.older_is());
        }
    }

    /// Where the memory of what is let go from the front is: what was kept has not been looked at for long.
    fn older_is(&self) -> spare::End {
        if self.kept.is_some() { spare::End::Cold } else { spare::End::Warm }
    }

    fn give(&mut self, segment: Segment, to: spare::End) {
        self.memory_bytes -= segment.memory.len();
        spare::give(segment.memory, to);
    }

    /// What is delivered of a small segment becomes history, and the segment is free for the next append, of whatever log. The
    /// head of the answer does not: nobody begins before the first event.
    fn settle(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        let settled = |last: &mut Segment| {
            last.memory.len() <= LOG_SETTLED_BYTES_MAX && last.filled > 0 && last.end() <= kept.floor
        };
        let Some(last) = self.last.take_if(settled) else { return };
        let head = if self.older.is_empty() && kept.history.is_none() {
            kept.begin.saturating_sub(last.base).min(u64::from(last.filled))
        } else {
            0
        };
        let bytes = last.filled as usize - head as usize;
        if bytes > 0 && kept.history.as_ref().is_none_or(|history| history.room() < bytes) {
            let before = kept.history.take();
            let size = before.as_ref().map_or(0, |before| before.memory.len());
            // A stream that is idle behind its first words holds no more memory than those need.
            let size = (size * 2).clamp(LOG_SEGMENT_FIRST_BYTES, LOG_SEGMENT_BYTES_MAX).max(bytes);
            self.older.extend(before);
            let history = Segment::with_capacity(last.base + head, last.first_id, size, spare::End::Cold);
            self.memory_bytes += history.memory.len();
            kept.history = Some(history);
        }
        kept.start += head;
        if let Some(history) = &mut kept.history {
            history.push_cells(&last.memory[head as usize..last.filled as usize]);
            if self.older.is_empty() {
                let end = history.end();
                kept.follow_first(Some(end));
            }
        }
        self.give(last, spare::End::Warm);
    }

    /// The segment becomes one of the older ones.
    fn push_older(&mut self, segment: Segment) {
        if let Some(kept) = &mut self.kept {
            self.older.extend(kept.history.take());
            let first = self.older.front().map_or(segment.end(), Segment::end);
            kept.follow_first(Some(first));
        }
        self.older.push_back(segment);
    }

    /// Appends the concatenation of `parts` as one contiguous range; returns its offset.
    // Inline, so that parts and their lengths stay in registers.
    #[inline]
    pub fn append<const PARTS: usize>(&mut self, parts: &[&[u8]; PARTS]) -> u64 {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let at = self.end;
        if bytes == 0 {
            return at;
        }
        if self.last.as_ref().is_none_or(|segment| segment.room() < bytes) {
            self.grow(bytes);
        }
        if let Some(segment) = &mut self.last {
            for part in parts {
                segment.push(part);
            }
        }
        self.end += bytes as u64;
        at
    }

    /// Makes room for about `bytes` in one segment, so that what is appended next goes out as one send. Less of it may come:
    /// a segment of full size is left behind only half full or fuller, or little that is owed would hold much memory.
    pub fn reserve(&mut self, bytes: usize) {
        let bytes = bytes.min(LOG_SEGMENT_BYTES_MAX);
        let has_room = |segment: &Segment| {
            let size = segment.memory.len();
            segment.room() >= bytes || (size >= LOG_SEGMENT_BYTES_MAX && segment.room() > size / 2)
        };
        if !self.last.as_ref().is_some_and(has_room) {
            self.grow(bytes);
        }
    }

    fn grow(&mut self, bytes: usize) {
        let last = match self.last.take() {
            // Never filled: of no more use.
            Some(segment) if segment.filled == 0 => {
                self.give(segment, spare::End::Warm);
                0
            }
            Some(segment) => {
                let size = segment.memory.len();
                self.push_older(segment);
                size
            }
            None => 0,
        };
        let next = (last * 2).clamp(LOG_SEGMENT_FIRST_BYTES, LOG_SEGMENT_BYTES_MAX);
        // An append larger than a segment gets one of its own.
        let segment =
            Segment::with_capacity(self.end, self.last_event_id + 1, next.max(bytes), spare::End::Warm);
        self.memory_bytes += segment.memory.len();
        self.last = Some(segment);
    }

    /// A contiguous range from `from` (`start <= from < end`) to the end of its segment, at most `bytes_max`; `None` at the end.
    pub fn lend(&self, from: u64, bytes_max: u32) -> Option<Lent> {
        if from >= self.end {
            return None;
        }
        assert!(from >= self.start(), "the range was released while a subscriber still owed it");
        // Subscribers are near the end, or at the start of a short list: search from the back.
        let segment = self.segments().rfind(|segment| segment.base <= from)?;
        let start = u32::try_from(from - segment.base).unwrap_or(u32::MAX);
        let end = segment.filled.min(start.saturating_add(bytes_max));
        debug_assert!(start < end, "an empty segment below the end");
        Some(Lent { memory: Rc::clone(&segment.memory), start, end })
    }

    /// Gives all memory back if everything below `below` is everything there is, lent or not.
    pub fn trim(&mut self, below: u64) {
        self.release(below);
        if below >= self.end
            && self.kept.is_none()
            && let Some(last) = self.last.take()
        {
            self.memory_bytes -= last.memory.len();
        }
    }

    /// Releases what lies below `below` (the lowest cursor of all subscribers, or the start of the window), in whole segments.
    pub fn release(&mut self, below: u64) {
        if let Some(kept) = &mut self.kept {
            kept.floor = kept.floor.max(below);
            let (forgets, window_bytes) = (kept.floor >= kept.forget_at, kept.window_bytes);
            self.settle();
            if forgets {
                self.forget(window_bytes);
            }
            return;
        }
        let early = is_planted(Bug::WindowEdge);
        while self
            .older
            .front()
            .is_some_and(|segment| segment.end() <= below || early && segment.base < below)
        {
            self.drop_first();
        }
        if !self.older.is_empty() || self.last.as_ref().is_none_or(|last| last.end() > below) {
            return;
        }
        // Drained: what a stream at rest owns is nothing. A small segment that is still lent goes on being filled behind
        // what was lent.
        if let Some(last) = self.last.take_if(|last| {
            last.memory.len() > 2 * LOG_SEGMENT_FIRST_BYTES || Rc::strong_count(&last.memory) == 1
        }) {
            self.give(last, spare::End::Warm);
        }
        if self.older.capacity() > 0 {
            self.older = VecDeque::new();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let is = self.older_is();
        let history = self.kept.as_mut().and_then(|kept| kept.history.take());
        for segment in self.older.drain(..).chain(history).chain(self.last.take()) {
            spare::give(segment.memory, is);
        }
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({}..{}, {} bytes held)", self.start(), self.end, self.memory_bytes())
    }
}

#[cfg(test)]
mod tests;
