//! The end of streams, and the memory and time that they may take.
//!
//! Where memory runs out, it is given up in this order, least recently used first, and never where somebody is reading:
//! closed streams whole; the oldest messages of open ones; open streams of which nothing is held. All of it is counted.

use super::store::{Id, Store};
use super::{Now, refusals};
use crate::fault::Fault;

/// What can be given up, first to last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Class {
    /// Closed.
    Closed,
    /// Open, with messages.
    Open,
    /// Open, without.
    Empty,
}

impl Store {
    // ---- the end of streams

    pub(super) fn expire_one(&mut self, id: Id) {
        self.counters.expiries += 1;
        self.delete_or_keep(id);
    }

    /// Section 5.4: a stream with forks goes on to exist, for them alone.
    pub(super) fn delete_or_keep(&mut self, id: Id) {
        let kept = self.streams.get(id).is_some_and(|stream| stream.forks > 0);
        self.record_delete(id, kept);
        let Some(stream) = self.streams.get_mut(id) else { return };
        if kept {
            stream.deleted = true;
            if let Some(due_ms) = stream.queued_due_ms.take() {
                self.due.remove(&(due_ms, id));
            }
            self.tell(id);
        } else {
            self.remove(id);
        }
    }

    /// Removes a stream without forks, and those of its sources that were only kept for it.
    pub(super) fn remove(&mut self, id: Id) {
        let mut next = Some(id);
        while let Some(id) = next {
            let chain: Vec<Id> = self.with_sources(id).skip(1).collect();
            let Some(stream) = self.streams.remove(id) else { return };
            if self.by_path.get(&stream.path) == Some(&id) {
                self.by_path.remove(&stream.path);
                self.vacate(stream.path);
            }
            self.by_segment.remove(&(stream.segment, id));
            self.bytes -= stream.counted;
            if let Some((class, tick)) = stream.queued {
                self.orders[class as usize].remove(&(tick, id));
            }
            if let Some(due_ms) = stream.queued_due_ms {
                self.due.remove(&(due_ms, id));
            }
            if let Some(due_ms) = stream.queued_look_ms {
                self.looks.remove(&(due_ms, id));
            }
            let own = stream.readers.len();
            self.left_over.extend(stream.readers.into_iter().map(|(_, reader)| reader));
            for source in chain {
                if let Some(source) = self.streams.get_mut(source) {
                    source.live -= u32::try_from(own).unwrap_or(u32::MAX);
                }
            }
            self.hold_source(stream.source, false);
            next = stream.source.filter(|&source| {
                self.streams.get(source).is_some_and(|source| source.deleted && source.forks == 0)
            });
            if let Some(source) = next {
                // Something may have been recorded of it since it was deleted: what it began with may go from the journal now.
                self.record_delete(source, false);
            }
        }
    }

    // ---- memory and time

    /// Notes a read or a write.
    pub(super) fn used(&mut self, id: Id, now: Now) {
        self.tick += 1;
        if let Some(stream) = self.streams.get_mut(id) {
            stream.used_ms = now.ms;
            stream.used_tick = self.tick;
        }
    }

    /// Brings the sum, and the stream's place in the orders, up to date.
    pub(super) fn recount(&mut self, id: Id) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        let cost = stream.cost();
        self.bytes = self.bytes - stream.counted + cost;
        stream.counted = cost;
        let class = match stream.closed {
            true => Class::Closed,
            false if stream.holds_data() => Class::Open,
            false => Class::Empty,
        };
        if stream.queued.is_some_and(|(queued, _)| queued == class) {
            return;
        }
        if let Some((class, tick)) = stream.queued.replace((class, stream.used_tick)) {
            self.orders[class as usize].remove(&(tick, id));
        }
        self.orders[class as usize].insert((stream.used_tick, id));
    }

    /// The same after an append. It may have ended in a segment larger than it: others make room for that, as far as they
    /// can, so that the sum is never beyond the limit by more than that segment.
    pub(super) fn settle_bytes(&mut self, id: Id) {
        self.recount(id);
        self.give_up_for(0, Some(id));
    }

    pub(super) fn queue_due(&mut self, id: Id, due_ms: u64) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.queued_due_ms = Some(due_ms);
            self.due.insert((due_ms, id));
        }
    }

    /// Whether a body can be a part of any stream.
    pub(super) fn fits(&self, body: &[u8]) -> Result<(), Fault> {
        let most = self.settings.stream_bytes_max.min(self.settings.store_bytes_max);
        if body.len() as u64 > most { Err(refusals::TOO_LARGE) } else { Ok(()) }
    }

    /// Makes room for so many more bytes; `except` is not removed.
    pub(super) fn make_room(&mut self, need: u64, except: Option<Id>, now: Now) -> Result<(), Fault> {
        if self.bytes + need > self.settings.store_bytes_max {
            self.expire(now);
        }
        if self.give_up_for(need, except) {
            return Ok(());
        }
        self.counters.full += 1;
        Err(refusals::FULL)
    }

    /// Gives up what may be given up until there is room for so many more bytes; false when there is nothing more.
    pub(super) fn give_up_for(&mut self, need: u64, except: Option<Id>) -> bool {
        let max = self.settings.store_bytes_max;
        while self.bytes + need > max {
            let give_up = self.bytes + need - max;
            let found = [Class::Closed, Class::Open, Class::Empty].into_iter().any(|class| {
                self.least_used(class, except).is_some_and(|id| self.give_up_some(class, id, give_up))
            });
            if !found {
                return false;
            }
        }
        true
    }

    /// The least recently used of a class that nobody reads, and that may be removed or trimmed.
    fn least_used(&mut self, class: Class, except: Option<Id>) -> Option<Id> {
        // Each is looked at once at most, and put where it belongs if it was used since.
        for _ in 0..self.orders[class as usize].len() {
            let &(tick, id) = self.orders[class as usize].first()?;
            let stream = self.streams.get_mut(id)?;
            let removed = class != Class::Open;
            let kept = stream.live > 0 || (removed && (stream.forks > 0 || except == Some(id)));
            if stream.used_tick == tick && !kept {
                return Some(id);
            }
            if kept {
                self.tick += 1;
                stream.used_tick = self.tick;
            }
            self.orders[class as usize].remove(&(tick, id));
            self.orders[class as usize].insert((stream.used_tick, id));
            stream.queued = Some((class, stream.used_tick));
        }
        None
    }

    fn give_up_some(&mut self, class: Class, id: Id, bytes: u64) -> bool {
        if class != Class::Open {
            self.counters.evictions += 1;
            self.record_delete(id, false);
            self.remove(id);
            return true;
        }
        let Some(stream) = self.streams.get_mut(id) else { return false };
        let earliest = stream.earliest;
        let held = stream.tail() - earliest;
        // Memory is given back by whole segments: at least half, so that it is not asked again for each append.
        let dropped = stream.trim(held.saturating_sub(bytes.max(held.div_ceil(2))));
        self.counters.trimmed_bytes += stream.earliest - earliest;
        self.recount(id);
        if dropped {
            self.record_trim(id);
        }
        dropped
    }
}
