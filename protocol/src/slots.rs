//! A slab whose keys carry a generation: a key that outlived its entry finds nothing instead of somebody else's entry.
//! The generation counts up over all slots of a slab, so that no two uses of a slot within 2^32 insertions share a key.

use crate::planted::{Bug, is_planted};
use slab::Slab;
use std::num::NonZeroU32;

/// Names one use of one slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Key {
    /// Index of the slot, `< capacity`.
    pub slot: u32,
    /// Which use of the slot; never 0, so that the absence of a key takes no room.
    pub generation: NonZeroU32,
}

/// A bounded slab with generations.
#[derive(Debug)]
pub struct Slots<T> {
    entries: Slab<(NonZeroU32, T)>,
    generation: NonZeroU32,
    capacity: usize,
}

impl<T> Slots<T> {
    /// At most `capacity` entries at a time; memory grows with use.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity < u32::MAX as usize, "slot numbers are 32 bits");
        Slots { entries: Slab::new(), generation: NonZeroU32::MAX, capacity }
    }

    /// Entries in use.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when no entry is in use.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Entries that may still be inserted.
    pub fn free(&self) -> usize {
        self.capacity - self.entries.len()
    }

    /// Inserts; gives the value back when full.
    pub fn insert(&mut self, value: T) -> Result<Key, T> {
        if self.free() == 0 {
            return Err(value);
        }
        self.generation = self.next_generation();
        let slot = self.entries.insert((self.generation, value));
        Ok(Key { slot: u32::try_from(slot).unwrap_or(u32::MAX), generation: self.generation })
    }

    /// The key that the next insertion will have, for operations that must be named before their entry exists; `None`
    /// when full.
    pub fn next_key(&self) -> Option<Key> {
        let slot = u32::try_from(self.entries.vacant_key()).unwrap_or(u32::MAX);
        (self.free() > 0).then(|| Key { slot, generation: self.next_generation() })
    }

    fn next_generation(&self) -> NonZeroU32 {
        if is_planted(Bug::SlotReuse) {
            return NonZeroU32::MIN;
        }
        self.generation.checked_add(1).unwrap_or(NonZeroU32::MIN)
    }

    /// The entry, unless this use of the slot is over.
    pub fn get(&self, key: Key) -> Option<&T> {
        self.entries.get(key.slot as usize).filter(|entry| entry.0 == key.generation).map(|entry| &entry.1)
    }

    /// The entry, unless this use of the slot is over.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.entries
            .get_mut(key.slot as usize)
            .filter(|entry| entry.0 == key.generation)
            .map(|entry| &mut entry.1)
    }

    /// Takes the entry out.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        Some(self.entries.remove(key.slot as usize).1)
    }

    /// The entry of a slot.
    pub fn at(&self, slot: u32) -> Option<(Key, &T)> {
        let entry = self.entries.get(slot as usize)?;
        Some((Key { slot, generation: entry.0 }, &entry.1))
    }

    /// No slot from here on has an entry.
    pub fn slots(&self) -> u32 {
        u32::try_from(self.entries.capacity()).unwrap_or(u32::MAX)
    }

    /// All entries in slot order.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.entries.iter().map(|(slot, entry)| {
            (Key { slot: u32::try_from(slot).unwrap_or(u32::MAX), generation: entry.0 }, &entry.1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_an_earlier_use_finds_nothing() {
        let mut slots = Slots::new(1);
        let foretold = slots.next_key();
        let first = slots.insert("a").unwrap();
        assert_eq!((foretold, slots.next_key()), (Some(first), None));
        assert_eq!(slots.insert("b"), Err("b"), "full");
        assert_eq!(slots.remove(first), Some("a"));
        let second = slots.insert("c").unwrap();
        assert_eq!(first.slot, second.slot, "the slot is reused");
        assert_eq!(slots.get(first), None);
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.get(second), Some(&"c"));
        assert_eq!(slots.iter().collect::<Vec<_>>(), vec![(second, &"c")]);
        assert_eq!((slots.at(second.slot), slots.at(slots.slots())), (Some((second, &"c")), None));
    }
}
