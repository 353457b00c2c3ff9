//! Operation lists on ledgers: subscribers of one log, with sends that complete in parts or fail, each get its bytes.

use super::input::Choices;
use protocol::ledger::Ledger;
use protocol::log::{Lent, Log};

/// One subscriber, and what its socket took.
struct Subscriber {
    ledger: Ledger,
    started_at: u64,
    in_flight: Option<Lent>,
    received: Vec<u8>,
}

/// The target.
pub fn run(data: &[u8]) {
    let mut choices = Choices::of(data);
    let (mut log, mut model) = (Log::new(), Vec::new());
    let mut subscribers: Vec<Subscriber> = Vec::new();
    while choices.any_left() {
        let which = choices.byte();
        let at = if subscribers.is_empty() { 0 } else { usize::from(which >> 3) % subscribers.len() };
        match which & 7 {
            0 | 1 => {
                let bytes = choices.magnitude(8) as usize;
                model.extend((model.len()..model.len() + bytes).map(|at| (at * 7) as u8));
                log.append(&[&model[model.len() - bytes..]]);
            }
            // Joins where the log still begins, or at its end; then a subscriber leaves.
            2 if subscribers.len() < 4 => {
                let cursor = if choices.byte() & 1 == 0 { log.start() } else { log.end() };
                let ledger = Ledger::at(cursor);
                assert!(ledger.may_lend() && ledger.lag(log.end()) == log.end() - cursor);
                let in_flight = None;
                subscribers.push(Subscriber { ledger, started_at: cursor, in_flight, received: Vec::new() });
            }
            3 if subscribers.len() > 1 => drop(subscribers.swap_remove(at)),
            4 | 5 if !subscribers.is_empty() => {
                send(&log, &mut subscribers[at], choices.magnitude(11) as u32 + 1)
            }
            6 if !subscribers.is_empty() => {
                let share = choices.byte();
                complete(&mut subscribers[at], share);
            }
            _ => {
                // What every subscriber has confirmed is not kept.
                let lowest = subscribers.iter().map(|subscriber| subscriber.ledger.sent()).min();
                log.release(lowest.unwrap_or(log.end()));
            }
        }
        for subscriber in &subscribers {
            let Subscriber { ledger, started_at, in_flight, received } = subscriber;
            assert_eq!(ledger.sent(), started_at + received.len() as u64, "sent is what was confirmed");
            assert_eq!(ledger.in_flight() as usize, in_flight.as_ref().map_or(0, Lent::len));
            assert!(ledger.sent() + u64::from(ledger.in_flight()) <= log.end());
            assert_eq!(ledger.lag(log.end()), log.end() - ledger.sent());
            assert_eq!(ledger.may_lend(), in_flight.is_none());
        }
    }
    for subscriber in &mut subscribers {
        complete(subscriber, 255);
        while subscriber.ledger.lag(log.end()) > 0 {
            send(&log, subscriber, u32::MAX);
            complete(subscriber, 255);
        }
        assert!(subscriber.received == model[subscriber.started_at as usize..], "not what was appended");
    }
}

fn send(log: &Log, subscriber: &mut Subscriber, bytes_max: u32) {
    if !subscriber.ledger.may_lend() {
        return;
    }
    if let Some(lent) = log.lend(subscriber.ledger.sent(), bytes_max) {
        subscriber.ledger.lend(lent.len() as u32);
        subscriber.in_flight = Some(lent);
    }
}

/// `share` of 255 of the send is taken; of 0 none, as by an error.
fn complete(subscriber: &mut Subscriber, share: u8) {
    let Some(lent) = subscriber.in_flight.take() else { return };
    let taken = lent.len() * usize::from(share) / 255;
    subscriber.received.extend_from_slice(&lent.to_vec()[..taken]);
    subscriber.ledger.complete(taken as u32);
}
