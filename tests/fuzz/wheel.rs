//! Operation lists on the timer wheel, against a list of timers.

use super::input::Choices;
use protocol::wheel::{TimerId, Wheel};

/// What is tested.
pub trait Timers {
    /// As [`Wheel::new`].
    fn new(now_ms: u64) -> Self;
    /// As [`Wheel::insert`].
    fn insert(&mut self, due_ms: u64, key: u32) -> TimerId;
    /// As [`Wheel::remove`].
    fn remove(&mut self, timer: TimerId) -> u32;
    /// As [`Wheel::next_ms`].
    fn next_ms(&self) -> Option<u64>;
    /// As [`Wheel::advance`].
    fn advance(&mut self, now_ms: u64, fire: &mut dyn FnMut(u32));
    /// As [`Wheel::len`].
    fn count(&self) -> usize;
}

impl Timers for Wheel<u32> {
    fn new(now_ms: u64) -> Self {
        Wheel::new(now_ms)
    }

    fn insert(&mut self, due_ms: u64, key: u32) -> TimerId {
        Wheel::insert(self, due_ms, key)
    }

    fn remove(&mut self, timer: TimerId) -> u32 {
        Wheel::remove(self, timer)
    }

    fn next_ms(&self) -> Option<u64> {
        Wheel::next_ms(self)
    }

    fn advance(&mut self, now_ms: u64, fire: &mut dyn FnMut(u32)) {
        Wheel::advance(self, now_ms, fire);
    }

    fn count(&self) -> usize {
        let armed = self.len();
        assert_eq!(self.is_empty(), armed == 0);
        armed
    }
}

struct Armed {
    key: u32,
    due_ms: u64,
    timer: TimerId,
}

/// The target.
pub fn run(data: &[u8]) {
    run_on::<Wheel<u32>>(data);
}

/// The target, on another wheel.
pub fn run_on<W: Timers>(data: &[u8]) {
    let mut choices = Choices::of(data);
    let mut now_ms = choices.magnitude(42) + u64::from(choices.byte());
    let mut wheel = W::new(now_ms);
    let mut armed: Vec<Armed> = Vec::new();
    let mut keys = 0;
    while choices.any_left() {
        match choices.below(8) {
            0..=3 => {
                // At any distance, also just before and behind the edges of slots, and in the past.
                let ahead = choices.magnitude(38);
                let due_ms = (now_ms + ahead + choices.below(4) as u64).saturating_sub(2);
                keys += 1;
                let timer = wheel.insert(due_ms, keys);
                armed.push(Armed { key: keys, due_ms: due_ms.max(now_ms + 1), timer });
            }
            4 if !armed.is_empty() => {
                let gone = armed.swap_remove(choices.below(armed.len().min(256)));
                assert_eq!(wheel.remove(gone.timer), gone.key, "another timer was removed");
            }
            5 => {
                // As a shard does: to where the wheel says.
                if let Some(next_ms) = wheel.next_ms() {
                    assert!(next_ms > now_ms, "the wheel wants to be advanced to the past");
                    advance(&mut wheel, &mut armed, next_ms - 1);
                    advance(&mut wheel, &mut armed, next_ms);
                    now_ms = next_ms;
                }
            }
            6 => {
                now_ms += choices.magnitude(38);
                advance(&mut wheel, &mut armed, now_ms);
            }
            // A clock that is turned back changes nothing.
            _ => advance(&mut wheel, &mut armed, now_ms.saturating_sub(u64::from(choices.byte()))),
        }
        assert_eq!(wheel.count(), armed.len());
        let earliest_ms = armed.iter().map(|timer| timer.due_ms).min();
        match (wheel.next_ms(), earliest_ms) {
            (None, None) => {}
            (Some(next_ms), Some(earliest_ms)) => {
                assert!(next_ms <= earliest_ms, "sleeps until {next_ms}, past {earliest_ms}");
                assert!(now_ms < next_ms);
                // Woken early only by a cascade, which is never within the slots of 1 ms.
                assert!(next_ms == earliest_ms || earliest_ms - now_ms >= 64 || next_ms.is_multiple_of(64));
            }
            (next_ms, earliest_ms) => panic!("next {next_ms:?}, earliest {earliest_ms:?}"),
        }
    }
    // In a bounded number of wakes everything fires.
    for _ in 0..=armed.len() * 8 {
        let Some(next_ms) = wheel.next_ms() else { break };
        advance(&mut wheel, &mut armed, next_ms);
    }
    assert!(armed.len() == wheel.count() && (armed.is_empty() || wheel.next_ms() > Some(1 << 30)));
}

fn advance<W: Timers>(wheel: &mut W, armed: &mut Vec<Armed>, to_ms: u64) {
    let mut last_ms = 0;
    let mut fired = Vec::new();
    wheel.advance(to_ms, &mut |key| fired.push(key));
    for key in fired {
        let at = armed.iter().position(|timer| timer.key == key);
        let Some(at) = at else { panic!("timer {key} fired twice, or was removed") };
        let due_ms = armed.swap_remove(at).due_ms;
        assert!(due_ms <= to_ms, "a timer of {due_ms} fired at {to_ms}");
        assert!(last_ms <= due_ms, "a timer of {due_ms} fired after one of {last_ms}");
        last_ms = due_ms;
    }
    let late = armed.iter().find(|timer| timer.due_ms <= to_ms);
    assert!(late.is_none(), "a timer of {:?} is late at {to_ms}", late.map(|timer| timer.due_ms));
}
