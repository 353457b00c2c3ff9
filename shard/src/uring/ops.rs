//! The operations in flight: who each belongs to, and the memory that is the kernel's until its last completion.
//! An operation is named by a 64-bit id that is never used again (within 2^32 operations), and never 0.

use crate::io::OpId;
use protocol::log::Lent;
use protocol::slots::{Key, Slots};
use std::cell::Cell;
use std::num::NonZeroU32;
use std::os::fd::RawFd;

/// Marks the completions of deferred sends: a bit of an id that no slot number reaches.
pub(super) const DEFERRED: u64 = 1 << 31;

/// The id of operations whose completion says nothing that is not known already: cancel and close.
pub(super) const FORGOTTEN: u64 = 0;

/// Whose completion it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    Accept { listener: u32 },
    Connect(Key),
    Receive(Key),
    Send(Sending),
    Watch(Key),
    Wake,
}

/// A send, and how far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sending {
    pub(super) conn: Key,
    /// Bytes lent.
    pub(super) bytes: u32,
    /// Of these, bytes that a deferred attempt got rid of before it fell short; `0 <= accepted < bytes`.
    pub(super) accepted: u32,
    /// The kernel says nothing if the socket takes all at once.
    pub(super) deferred: bool,
    /// The cancel found nothing to end if the send is deferred: an attempt that fell short is not gone on with.
    pub(super) cancelled: bool,
}

impl Sending {
    pub(super) fn new(conn: Key, bytes: u32, deferred: bool) -> Self {
        Sending { conn, bytes, accepted: 0, deferred, cancelled: false }
    }
}

/// What the kernel reads while an operation is in flight; dropped with its last completion and not before.
#[allow(dead_code, reason = "held, never read here: the kernel reads it")]
#[derive(Debug)]
pub(super) enum Memory {
    Lent(Lent),
    Address(Option<Box<socket2::SockAddr>>),
}

impl Memory {
    pub(super) const NOTHING: Memory = Memory::Address(None);
}

#[derive(Debug)]
pub(super) struct Op {
    pub(super) owner: Owner,
    /// The socket it works on; -1: not a connection's.
    pub(super) fd: RawFd,
    memory: Memory,
}

const _: () = assert!(size_of::<Op>() <= 48, "every connection has one at least");

/// Operations from their request to their last completion.
pub(super) struct OpTable {
    ops: Slots<Op>,
    /// Bytes of logs lent to the kernel.
    lent_bytes: u64,
}

impl OpTable {
    pub(super) fn new() -> Self {
        // Bounded by what connections may have in flight (a few each), not here.
        OpTable { ops: Slots::new(DEFERRED as usize - 1), lent_bytes: 0 }
    }

    /// Operations in flight.
    pub(super) fn len(&self) -> usize {
        self.ops.len()
    }

    /// Bytes of logs lent to the kernel; 0 when no send is in flight.
    pub(super) fn lent_bytes(&self) -> u64 {
        self.lent_bytes
    }

    pub(super) fn start(&mut self, owner: Owner, fd: RawFd, memory: Memory) -> OpId {
        if let Owner::Send(sending) = owner {
            self.lent_bytes += u64::from(sending.bytes);
        }
        match self.ops.insert(Op { owner, fd, memory }) {
            Ok(key) => id_of(key),
            Err(op) => unreachable!("2^31 operations in flight, {:?} among them", op.owner),
        }
    }

    /// False for an operation that is over.
    pub(super) fn contains(&self, op: OpId) -> bool {
        op.number() != FORGOTTEN && self.ops.get(key_of(op)).is_some()
    }

    /// Who a completion belongs to. Ends the operation unless `more` completions follow.
    ///
    /// # Panics
    /// If there is no such operation: the kernel answered twice, or memory was freed under it.
    pub(super) fn complete(&mut self, op: OpId, more: bool) -> (Owner, RawFd) {
        let Some(found) = self.try_complete(op, more) else {
            panic!("completion of operation {:#x}, which is not in flight", op.number());
        };
        found
    }

    /// As [`OpTable::complete`], for the teardown after a failed assertion.
    pub(super) fn try_complete(&mut self, op: OpId, more: bool) -> Option<(Owner, RawFd)> {
        if op.number() == FORGOTTEN {
            return None;
        }
        let key = key_of(op);
        let found = self.ops.get(key).map(|op| (op.owner, op.fd))?;
        if !more {
            if let Owner::Send(sending) = found.0 {
                self.lent_bytes -= u64::from(sending.bytes);
            }
            self.ops.remove(key);
            assert!(self.len() > 0 || self.lent_bytes == 0, "bytes lent without an operation");
        }
        Some(found)
    }
}

impl OpTable {
    /// The send that this operation is, as long as it is in flight.
    pub(super) fn sending(&mut self, op: OpId) -> Option<&mut Sending> {
        match &mut self.ops.get_mut(key_of(op))?.owner {
            Owner::Send(sending) => Some(sending),
            _ => None,
        }
    }

    /// The socket and what is left to send of a deferred send that fell short.
    pub(super) fn rest(&self, op: OpId) -> Option<(RawFd, &[Cell<u8>])> {
        match self.ops.get(key_of(op))? {
            Op { owner: Owner::Send(sending), fd, memory: Memory::Lent(lent) } => {
                Some((*fd, &lent.cells()[sending.accepted as usize..]))
            }
            _ => None,
        }
    }
}

// Slot numbers count from 1 in an id, so that no id is `FORGOTTEN` whatever the generation.
fn id_of(key: Key) -> OpId {
    OpId::new(u64::from(key.generation.get()) << 32 | u64::from(key.slot + 1))
}

fn key_of(op: OpId) -> Key {
    match NonZeroU32::new((op.number() >> 32) as u32) {
        Some(generation) if op.number() as u32 > 0 => Key { slot: op.number() as u32 - 1, generation },
        _ => panic!("not an operation's id"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::log::Log;

    const CONN: Key = Key { slot: 3, generation: NonZeroU32::MIN };

    #[test]
    fn memory_is_held_until_the_last_completion_and_not_longer() {
        let mut log = Log::new();
        log.append(&[b"token"]);
        let lent = log.lend(0, 100).unwrap();
        let mut ops = OpTable::new();
        let op = ops.start(Owner::Send(Sending::new(CONN, 5, false)), 7, Memory::Lent(lent));
        drop(log);
        assert_eq!((ops.len(), ops.lent_bytes()), (1, 5));
        assert_eq!(ops.complete(op, true), (Owner::Send(Sending::new(CONN, 5, false)), 7));
        assert_eq!((ops.len(), ops.lent_bytes()), (1, 5), "more was announced");
        assert_eq!(ops.complete(op, false), (Owner::Send(Sending::new(CONN, 5, false)), 7));
        assert_eq!((ops.len(), ops.lent_bytes()), (0, 0));
        assert!(!ops.contains(op));
    }

    #[test]
    fn ids_name_one_use_of_a_slot_and_are_never_zero() {
        let mut ops = OpTable::new();
        let first = ops.start(Owner::Receive(CONN), 7, Memory::NOTHING);
        ops.complete(first, false);
        let second = ops.start(Owner::Receive(CONN), 7, Memory::NOTHING);
        assert_eq!(first.number() as u32, second.number() as u32, "the slot is used again");
        assert!(!ops.contains(first) && ops.contains(second) && !ops.contains(OpId::new(FORGOTTEN)));
        assert_ne!(id_of(Key { slot: 0, generation: NonZeroU32::MIN }).number(), FORGOTTEN);
    }

    #[test]
    #[should_panic(expected = "which is not in flight")]
    fn a_doubled_completion_is_a_bug_that_stops_the_shard() {
        let mut ops = OpTable::new();
        let op = ops.start(Owner::Watch(CONN), 7, Memory::NOTHING);
        ops.complete(op, false);
        // The slot is in use again, by somebody else.
        ops.start(Owner::Watch(CONN), 7, Memory::NOTHING);
        ops.complete(op, false);
    }
}
