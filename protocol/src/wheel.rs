//! A hierarchical timer wheel with 1 ms slots: insert and remove in O(1), and the time of the next non-empty slot, so that a
//! shard sleeps until there is something to do and never ticks.
//!
//! Level n has 64 slots of 64^n ms; five levels reach 12.4 days, later times wait in the last level and cascade again. A
//! timer is due when the wheel has been advanced to its millisecond or beyond, never before. Milliseconds are of the
//! caller's clock.

use slab::Slab;
use std::num::NonZeroU32;

const LEVELS: usize = 5;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
const NONE: u32 = u32::MAX;

/// Names an armed timer until it fires or is removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
// One above its index: so that the absence of one takes no room, of which each connection and stream has one.
pub struct TimerId(NonZeroU32);

impl TimerId {
    fn index(self) -> u32 {
        self.0.get() - 1
    }
}

struct Timer<K> {
    key: K,
    due_ms: u64,
    level: u8,
    slot: u8,
    previous: u32,
    next: u32,
}

/// The wheel; `K` says whose timer it is.
pub struct Wheel<K> {
    timers: Slab<Timer<K>>,
    heads: [[u32; SLOTS]; LEVELS],
    occupied: [u64; LEVELS],
    now_ms: u64,
}

impl<K: Copy> Wheel<K> {
    /// A wheel that stands at `now_ms`.
    pub fn new(now_ms: u64) -> Self {
        Wheel { timers: Slab::new(), heads: [[NONE; SLOTS]; LEVELS], occupied: [0; LEVELS], now_ms }
    }

    /// Armed timers.
    pub fn len(&self) -> usize {
        self.timers.len()
    }

    /// True when no timer is armed.
    pub fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    /// Arms a timer. One due now or in the past fires at the next advance to a later millisecond.
    pub fn insert(&mut self, due_ms: u64, key: K) -> TimerId {
        let due_ms = due_ms.max(self.now_ms + 1);
        let index = self.timers.insert(Timer { key, due_ms, level: 0, slot: 0, previous: NONE, next: NONE });
        let index = u32::try_from(index).unwrap_or(NONE);
        self.link(index);
        TimerId(NonZeroU32::MIN.saturating_add(index))
    }

    /// Where an armed timer lies, for fetching it ahead.
    pub fn apart(&self, timer: TimerId) -> Option<*const u8> {
        self.timers.get(timer.index() as usize).map(|timer| std::ptr::from_ref(timer).cast())
    }

    /// Disarms a timer that has neither fired nor been removed.
    pub fn remove(&mut self, timer: TimerId) -> K {
        self.unlink(timer.index());
        self.timers.remove(timer.index() as usize).key
    }

    /// When the wheel must be advanced next, in ms: the time of the first non-empty slot, which is the earliest timer's own
    /// time within 64 ms and the start of its slot (a cascade) beyond. `None` when nothing is armed.
    pub fn next_ms(&self) -> Option<u64> {
        (0..LEVELS)
            .filter(|&level| self.occupied[level] != 0)
            .map(|level| {
                let shift = SLOT_BITS * level as u32;
                let current = (self.now_ms >> shift) as u32 % SLOTS as u32;
                // Slots are searched from the one after the current: what is left in the current one is a whole round away.
                let ahead =
                    self.occupied[level].rotate_right((current + 1) % SLOTS as u32).trailing_zeros() + 1;
                ((self.now_ms >> shift) + u64::from(ahead)) << shift
            })
            .min()
    }

    /// Advances to `now_ms` and gives every timer that is due to `fire`, in order of time. Timers of one millisecond come in
    /// no particular order. The clock may jump; it is never turned back (an earlier `now_ms` does nothing).
    pub fn advance(&mut self, now_ms: u64, mut fire: impl FnMut(K)) {
        while let Some(next) = self.next_ms().filter(|&next| next <= now_ms) {
            self.now_ms = next;
            for level in (0..LEVELS).rev() {
                let shift = SLOT_BITS * level as u32;
                if level > 0 && !next.is_multiple_of(1 << shift) {
                    continue;
                }
                let slot = (next >> shift) as usize % SLOTS;
                let mut index = std::mem::replace(&mut self.heads[level][slot], NONE);
                self.occupied[level] &= !(1 << slot);
                while index != NONE {
                    let timer = &self.timers[index as usize];
                    let following = timer.next;
                    if timer.due_ms <= next {
                        fire(self.timers.remove(index as usize).key);
                    } else {
                        self.link(index);
                    }
                    index = following;
                }
            }
        }
        self.now_ms = self.now_ms.max(now_ms);
    }

    fn link(&mut self, index: u32) {
        let due_ms = self.timers[index as usize].due_ms;
        let reach = 1_u64 << (SLOT_BITS * LEVELS as u32);
        let at = due_ms.min(self.now_ms + reach - (reach >> SLOT_BITS));
        // The lowest level on which the due slot is less than a round ahead.
        let mut level = 0;
        while level + 1 < LEVELS
            && (at >> (SLOT_BITS * level as u32)) - (self.now_ms >> (SLOT_BITS * level as u32))
                >= SLOTS as u64
        {
            level += 1;
        }
        let slot = (at >> (SLOT_BITS * level as u32)) as usize % SLOTS;
        let head = std::mem::replace(&mut self.heads[level][slot], index);
        if head != NONE {
            self.timers[head as usize].previous = index;
        }
        self.occupied[level] |= 1 << slot;
        let timer = &mut self.timers[index as usize];
        (timer.level, timer.slot, timer.previous, timer.next) = (level as u8, slot as u8, NONE, head);
    }

    fn unlink(&mut self, index: u32) {
        let Timer { level, slot, previous, next, .. } = self.timers[index as usize];
        let (level, slot) = (level as usize, slot as usize);
        match previous {
            NONE => self.heads[level][slot] = next,
            _ => self.timers[previous as usize].next = next,
        }
        if next != NONE {
            self.timers[next as usize].previous = previous;
        }
        if self.heads[level][slot] == NONE {
            self.occupied[level] &= !(1 << slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn fires_on_its_millisecond_and_not_before() {
        let mut wheel = Wheel::new(1000);
        for due in [1001, 1063, 1064, 1065, 5096, 5097, 300_000, 1 << 31, 1 << 36] {
            wheel.insert(due, due);
        }
        let mut fired = Vec::new();
        while let Some(next) = wheel.next_ms() {
            wheel.advance(next - 1, |_| panic!("nothing is due before the next slot"));
            wheel.advance(next, |due| {
                assert_eq!(due, next);
                fired.push(due);
            });
        }
        assert_eq!(fired, [1001, 1063, 1064, 1065, 5096, 5097, 300_000, 1 << 31, 1 << 36]);
    }

    #[test]
    fn sleeps_without_ticking() {
        let mut wheel = Wheel::new(7);
        wheel.insert(60_007, ());
        let mut wakes = 0;
        while let Some(next) = wheel.next_ms() {
            wakes += 1;
            wheel.advance(next, |()| {});
        }
        assert!(wakes <= LEVELS, "a minute costs {wakes} wake-ups");
    }

    #[test]
    fn behaves_like_a_sorted_map() {
        let mut seed = 1_u64;
        let mut random = move |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
        for _ in 0..100 {
            let mut now = random(1 << 40);
            let mut wheel = Wheel::new(now);
            let mut model: BTreeMap<(u64, u32), TimerId> = BTreeMap::new();
            for name in 0..500_u32 {
                match random(3) {
                    0 => {
                        let bits = random(34) as u32;
                        let due = (now + random(1 << bits)).max(now + 1);
                        model.insert((due, name), wheel.insert(due, (due, name)));
                    }
                    1 if !model.is_empty() => {
                        let nth = random(model.len() as u64) as usize;
                        let key = *model.keys().nth(nth).unwrap();
                        assert_eq!(wheel.remove(model.remove(&key).unwrap()), key);
                    }
                    _ => {
                        let bits = random(30) as u32;
                        now += random(1 << bits);
                        let mut last = 0;
                        wheel.advance(now, |key| {
                            assert!(key.0 <= now && key.0 >= last, "in order of time");
                            last = key.0;
                            assert!(model.remove(&key).is_some());
                        });
                        assert!(model.keys().next().is_none_or(|key| key.0 > now), "nothing due is left");
                    }
                }
                assert_eq!(wheel.len(), model.len());
                let first = model.keys().next().map(|key| key.0);
                assert!(
                    wheel.next_ms().is_none_or(|next| next > now && first.is_some_and(|first| next <= first))
                );
            }
        }
    }
}
