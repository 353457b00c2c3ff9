//! Operation lists on the op table of the ring, against a map: an id names one operation, which ends once; what is lent
//! adds up.

use super::input::Choices;
use protocol::log::Log;
use protocol::slots::Key;
use shard::io::OpId;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use table::{FORGOTTEN, Memory, OpTable, Owner, Sending};

// The table is private to the ring, and stays so: its source is compiled in once more.
#[allow(dead_code, unreachable_pub, reason = "the ring uses what is not used here")]
#[path = "../../shard/src/uring/ops.rs"]
mod table;

/// The target.
pub fn run(data: &[u8]) {
    let mut choices = Choices::of(data);
    let mut ops = OpTable::new();
    let mut model: BTreeMap<u64, (Owner, i32)> = BTreeMap::new();
    let mut over: Vec<OpId> = Vec::new();
    let mut log = Log::new();
    while choices.any_left() {
        match choices.below(9) {
            0..=3 => {
                let conn = Key {
                    slot: u32::from(choices.byte()),
                    generation: NonZeroU32::MIN.saturating_add(choices.byte().into()),
                };
                let fd = i32::from(choices.byte()) - 1;
                let (owner, memory) = match choices.below(6) {
                    0 => (Owner::Accept { listener: 1 }, Memory::NOTHING),
                    1 => {
                        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
                        (Owner::Connect(conn), Memory::Address(Some(Box::new(address.into()))))
                    }
                    2 => (Owner::Receive(conn), Memory::NOTHING),
                    3 => (Owner::Watch(conn), Memory::NOTHING),
                    4 => (Owner::Wake, Memory::NOTHING),
                    _ => {
                        let at = log.append(&[&[b'x'; 300][..=choices.below(256)]]);
                        let Some(lent) = log.lend(at, u32::MAX) else { panic!("what was appended is lent") };
                        log.release(log.end());
                        let deferred = choices.byte() & 1 == 1;
                        (Owner::Send(Sending::new(conn, lent.len() as u32, deferred)), Memory::Lent(lent))
                    }
                };
                let op = ops.start(owner, fd, memory);
                assert_ne!(op.number(), FORGOTTEN);
                assert!(!over.contains(&op) && !model.contains_key(&op.number()), "an id is used again");
                model.insert(op.number(), (owner, fd));
            }
            4..=6 if !model.is_empty() => {
                let at = choices.below(model.len().min(256));
                let more = choices.byte() & 3 == 0;
                let Some((&id, &expected)) = model.iter().nth(at) else { continue };
                assert_eq!(ops.complete(OpId::new(id), more), expected);
                if !more {
                    model.remove(&id);
                    over.push(OpId::new(id));
                }
            }
            7 if !model.is_empty() => {
                let at = choices.below(model.len().min(256));
                let Some((&id, (owner, fd))) = model.iter_mut().nth(at) else { continue };
                let (Owner::Send(expected), Some(sending)) = (owner, ops.sending(OpId::new(id))) else {
                    assert!(ops.rest(OpId::new(id)).is_none(), "nothing is left of what was never a send");
                    continue;
                };
                assert_eq!(sending, expected);
                // A deferred attempt fell short.
                sending.accepted = u32::from(choices.byte()) % sending.bytes;
                *expected = *sending;
                let Some((socket, rest)) = ops.rest(OpId::new(id)) else {
                    panic!("a send without its bytes")
                };
                assert_eq!((socket, rest.len() as u32), (*fd, expected.bytes - expected.accepted));
                assert!(rest.iter().all(|byte| byte.get() == b'x'), "lent bytes were written again");
            }
            _ => {
                // Completions that nobody waits for change nothing.
                assert_eq!(ops.try_complete(OpId::new(FORGOTTEN), false), None);
                if !over.is_empty() {
                    let gone = over[choices.below(over.len().min(256))];
                    assert_eq!(ops.try_complete(gone, false), None, "an operation ended twice");
                }
            }
        }
        assert_eq!(ops.len(), model.len());
        let lent: u64 = model
            .values()
            .map(|(owner, _)| if let Owner::Send(sending) = owner { u64::from(sending.bytes) } else { 0 })
            .sum();
        assert_eq!(ops.lent_bytes(), lent);
        for op in over.iter().rev().take(16) {
            assert!(!ops.contains(*op), "an operation that is over");
        }
        assert!(model.keys().all(|id| ops.contains(OpId::new(*id))));
    }
}
