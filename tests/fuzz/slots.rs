//! Operation lists on the generation slab, against a map that never uses a key twice.

use super::input::Choices;
use protocol::slots::{Key, Slots};
use std::collections::BTreeMap;

/// What looks a key up.
pub type Get = fn(&Slots<u32>, Key) -> Option<u32>;

/// The target.
pub fn run(data: &[u8]) {
    run_on(|slots, key| slots.get(key).copied(), data);
}

/// The target, with another look-up.
pub fn run_on(get: Get, data: &[u8]) {
    let mut choices = Choices::of(data);
    let capacity = choices.below(12);
    let mut slots = Slots::new(capacity);
    let mut model: BTreeMap<Key, u32> = BTreeMap::new();
    let mut ever: Vec<Key> = Vec::new();
    let mut value = 0;
    while choices.any_left() {
        match choices.below(4) {
            0 | 1 => {
                value += 1;
                let foretold = slots.next_key();
                match slots.insert(value) {
                    Ok(key) => {
                        assert_eq!(foretold, Some(key));
                        assert!(!ever.contains(&key), "a key is used again");
                        assert!((key.slot as usize) < capacity, "a slot beyond the capacity");
                        ever.push(key);
                        model.insert(key, value);
                    }
                    Err(back) => {
                        assert_eq!((back, foretold, model.len()), (value, None, capacity));
                    }
                }
            }
            2 if !ever.is_empty() => {
                let key = ever[choices.below(ever.len().min(256))];
                assert_eq!(slots.remove(key), model.remove(&key));
            }
            _ if !ever.is_empty() => {
                let key = ever[ever.len() - 1 - choices.below(ever.len().min(256))];
                if let Some(found) = slots.get_mut(key) {
                    *found += 1000;
                }
                model.entry(key).and_modify(|found| *found += 1000);
            }
            _ => {}
        }
        assert_eq!((slots.len(), slots.free()), (model.len(), capacity - model.len()));
        assert_eq!(slots.is_empty(), model.is_empty());
        for key in ever.iter().rev().take(32) {
            assert_eq!(get(&slots, *key), model.get(key).copied(), "{key:?}");
        }
        let mut listed: Vec<(Key, u32)> = slots.iter().map(|(key, value)| (key, *value)).collect();
        assert!(listed.is_sorted(), "in slot order");
        listed.sort();
        assert_eq!(listed, model.iter().map(|(key, value)| (*key, *value)).collect::<Vec<_>>());
    }
}
