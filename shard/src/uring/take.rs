//! Completions: from the ring's entries to what a shard is told.

use super::ops::{DEFERRED, FORGOTTEN, Owner, Sending};
use super::{Buffer, Socket, UringIo, send_entry};
use crate::io::{Completion, Errno, Hangup, OpId, ReceiveEnd};
use io_uring::cqueue;
use protocol::limits::COMPLETIONS_PER_TURN_MAX;
use std::hint::black_box;

impl UringIo {
    /// Takes completions out of the ring, at most as many as a turn handles.
    pub(super) fn take(&mut self, completions: &mut Vec<Completion<Socket, Buffer>>) {
        let full = completions.len() + COMPLETIONS_PER_TURN_MAX;
        completions.extend(self.carried.take());
        let room = COMPLETIONS_PER_TURN_MAX.saturating_sub(self.entries.len());
        self.entries.extend(self.ring.completion().take(room));
        if self.entries.len() > 1 {
            // As in `Shard::touch`: all at once, not one miss behind the other.
            for entry in &self.entries {
                black_box(self.ops.contains(OpId::new(entry.user_data() & !DEFERRED)));
            }
        }
        if !self.deferred.is_empty() {
            self.confirm_deferred(completions, full);
        }
        self.deferred_left = !self.deferred.is_empty();
        // Consecutive receives of one connection count once.
        let (mut heard, mut last_heard, mut short) = (0, None, false);
        while completions.len() < full {
            let Some(entry) = self.entries.pop_front() else { break };
            // A cancel that came too late has nothing to tell.
            if entry.user_data() == FORGOTTEN {
                continue;
            }
            if entry.user_data() & DEFERRED != 0 {
                completions.extend(self.fell_short(&entry));
                continue;
            }
            let UringIo { ops, buffers, descriptors, wake_armed, .. } = self;
            let (result, more) = (entry.result(), cqueue::more(entry.flags()));
            // Taken first: a buffer goes back whatever the completion says.
            let buffer = cqueue::buffer_select(entry.flags())
                .map(|id| buffers.take(id, u32::try_from(result).unwrap_or(0)));
            let (owner, fd) = ops.complete(OpId::new(entry.user_data()), more);
            if fd >= 0 && !more {
                descriptors.operation_ended(fd);
            }
            let outcome = u32::try_from(result).map_err(|_| Errno(-result));
            match owner {
                Owner::Accept { listener } => {
                    let listener = listener as usize;
                    if outcome.is_ok() {
                        descriptors.opened(result);
                        completions.push(Completion::Accepted { listener, socket: Socket(result) });
                    }
                    if !more {
                        let op = OpId::new(entry.user_data());
                        completions.push(Completion::AcceptEnded { listener, op, error: outcome.err() });
                    }
                }
                Owner::Connect(conn) => {
                    completions.push(Completion::Connected { conn, result: outcome.map(|_| ()) });
                }
                Owner::Receive(conn) => {
                    if last_heard.replace(conn) != Some(conn) {
                        heard += 1;
                    }
                    short |= outcome == Err(Errno::NO_BUFFERS);
                    let why = match (outcome, buffer) {
                        (Ok(0), _) => ReceiveEnd::Fin,
                        (Ok(_), Some(buffer)) => {
                            completions.push(Completion::Received { conn, buffer });
                            ReceiveEnd::Rearm
                        }
                        (Ok(_), None) => unreachable!("bytes received without a buffer"),
                        (Err(error), _) => ReceiveEnd::Error(error),
                    };
                    if !more {
                        completions.push(Completion::ReceiveEnded { conn, why });
                    }
                }
                Owner::Send(sending) => completions.push(sent(sending, outcome)),
                Owner::Watch(conn) => {
                    let reset = (libc::POLLERR | libc::POLLHUP) as u32;
                    let result = outcome.map(|e| if e & reset != 0 { Hangup::Reset } else { Hangup::Fin });
                    completions.push(Completion::Hangup { conn, result, armed: more });
                }
                Owner::Wake => {
                    *wake_armed = false;
                    if outcome.is_ok() {
                        completions.push(Completion::Woken);
                    }
                }
            }
        }
        if heard > 0 {
            self.buffers.reconsider(heard, short);
        }
        if completions.len() > full {
            // The last entry became two completions.
            self.carried = completions.pop();
        }
    }

    /// Tells of deferred sends that the kernel has said nothing about. It issues a submission where it stands, a deferred
    /// send is tried once and never waited with (MSG_DONTWAIT), and only one that fell short leaves an entry in the
    /// completion queue: so once everything queued has been submitted and the queue has been read to its end, silence means
    /// that the socket took the whole range.
    fn confirm_deferred(&mut self, completions: &mut Vec<Completion<Socket, Buffer>>, full: usize) {
        for entry in self.entries.iter().filter(|entry| entry.user_data() & DEFERRED != 0) {
            if let Some(sending) = self.ops.sending(OpId::new(entry.user_data() & !DEFERRED)) {
                sending.deferred = false;
            }
        }
        let queue = self.ring.submission();
        let unknown = !queue.is_empty() || queue.cq_overflow() || !self.unsubmitted.is_empty();
        drop(queue);
        if unknown || !self.ring.completion().is_empty() {
            return;
        }
        while completions.len() < full {
            let Some(op) = self.deferred.pop() else { break };
            // One that fell short is told of by its entry.
            if self.ops.sending(op).is_some_and(|sending| sending.deferred) {
                let (owner, fd) = self.ops.complete(op, false);
                self.descriptors.operation_ended(fd);
                if let Owner::Send(sending) = owner {
                    completions.push(sent(sending, Ok(sending.bytes)));
                }
            }
        }
    }

    /// A deferred send was not taken whole: the rest is sent without hurry, unless there is no sense in it.
    fn fell_short(&mut self, entry: &cqueue::Entry) -> Option<Completion<Socket, Buffer>> {
        let op = OpId::new(entry.user_data() & !DEFERRED);
        let outcome = u32::try_from(entry.result()).map_err(|_| Errno(-entry.result()));
        let Some(sending) = self.ops.sending(op) else { panic!("a deferred send fell short twice") };
        sending.deferred = false;
        sending.accepted = outcome.unwrap_or(0);
        let go_on = matches!(outcome, Ok(_) | Err(Errno::AGAIN)) && !sending.cancelled;
        if go_on && let Some((fd, rest)) = self.ops.rest(op) {
            let entry = send_entry(fd, rest, 0);
            self.push(entry.user_data(op.number()));
            return None;
        }
        let (owner, fd) = self.ops.complete(op, false);
        self.descriptors.operation_ended(fd);
        let Owner::Send(sending) = owner else { return None };
        let outcome = if outcome == Err(Errno::AGAIN) { Err(Errno::CANCELED) } else { outcome };
        Some(sent(Sending { accepted: 0, ..sending }, outcome))
    }
}

/// What a send's end says. Like the kernel's own: an error behind bytes that were taken is told by the next send.
fn sent(sending: Sending, outcome: Result<u32, Errno>) -> Completion<Socket, Buffer> {
    let result = match outcome {
        Ok(bytes) => Ok(sending.accepted + bytes),
        Err(_) if sending.accepted > 0 => Ok(sending.accepted),
        Err(error) => Err(error),
    };
    assert!(result.is_err() || result.is_ok_and(|sent| sent <= sending.bytes), "sent more than lent");
    Completion::Sent { conn: sending.conn, result }
}
