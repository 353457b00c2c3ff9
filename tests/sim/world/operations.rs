//! Operations, from the shard's request to their completion: who owns lent memory meanwhile, and what the kernel does.

use super::faults::{ACCEPT_ERRORS, ECONNABORTED, ECONNREFUSED, ECONNRESET, EMFILE, EPIPE, Planted};
use super::sockets::Peer;
use super::{Done, Event, World, hash};
use crate::io::{SimBuffer, SimSocket};
use protocol::log::Lent;
use protocol::slots::Key;
use shard::io::{Completion, Errno, Hangup, OpId, ReceiveEnd};
use std::cell::Cell;
use std::net::SocketAddr;

#[derive(Debug)]
pub(super) enum Kind {
    Accept { listener: usize, multishot: bool },
    Connect { target: SocketAddr },
    Receive,
    Send { lent: Lent, hash: u64, accepted: usize, done: bool, deferred: bool },
    Hangup,
}

#[derive(Debug)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) socket: usize,
    pub(super) conn: Key,
    /// Of the shard that asked for it.
    pub(super) ring: usize,
}

#[derive(Debug)]
pub(super) enum Submission {
    Op(u64),
    Cancel(u64),
}

impl World {
    pub(super) fn op(&mut self, ring: usize, kind: Kind, socket: usize, conn: Key) -> u64 {
        let op = self.next_op;
        self.next_op += 1;
        if let Some(named) = self.sockets.get_mut(socket) {
            assert!(named.conn.is_none_or(|known| known == conn), "s{socket} changes its connection");
            named.conn = Some(conn);
            let owner = *self.rings[ring].owners.entry((conn.slot, conn.generation.get())).or_insert(socket);
            assert!(owner == socket, "{conn:?} names s{socket}, and was s{owner}");
            let holding = &mut named.holding;
            match &kind {
                Kind::Accept { .. } => {}
                Kind::Connect { .. } => holding.connect = true,
                Kind::Receive => holding.receive = true,
                Kind::Send { lent, .. } => holding.lent_bytes = lent.len() as u32,
                Kind::Hangup => holding.hangup = true,
            }
            named.hangup_told &= !matches!(kind, Kind::Hangup);
        }
        self.note(1, op ^ (socket as u64) << 32);
        self.ops.insert(op, Op { kind, socket, conn, ring });
        self.rings[ring].submissions.push(Submission::Op(op));
        op
    }

    pub(crate) fn accept(&mut self, listener: usize, multishot: bool) -> u64 {
        assert!(!self.listeners[listener].stopped, "accept on a stopped listener");
        let with_multishot = multishot || self.listeners[listener].multishot;
        let alone = self.listeners[listener].accepts.is_empty();
        assert!(alone || !with_multishot, "a multishot accept is alone on its listener");
        let conn = Key { slot: u32::MAX, generation: std::num::NonZeroU32::MIN };
        let ring = self.listeners[listener].ring;
        let op = self.op(ring, Kind::Accept { listener, multishot }, usize::MAX, conn);
        self.listeners[listener].accepts.push_back(op);
        self.listeners[listener].multishot = multishot;
        op
    }

    pub(crate) fn connect(
        &mut self,
        ring: usize,
        conn: Key,
        target: SocketAddr,
    ) -> Result<(usize, u64), Errno> {
        self.rings[ring].counts.connects += 1;
        if self.rng.chance(self.faults.socket_error) {
            self.connects_failed += 1;
            return Err(EMFILE);
        }
        let socket = self.new_socket(Peer::Nobody, ring);
        let op = self.op(ring, Kind::Connect { target }, socket, conn);
        self.sockets[socket].connect = Some(op);
        Ok((socket, op))
    }

    pub(crate) fn receive(&mut self, ring: usize, conn: Key, socket: usize) -> u64 {
        let open = self.open_socket(ring, socket);
        assert!(open.receive.is_none(), "two receives on s{socket}");
        assert!(open.connect.is_none(), "a receive on a socket that is being connected");
        let op = self.op(ring, Kind::Receive, socket, conn);
        let now = self.now;
        let open = &mut self.sockets[socket];
        open.receive = Some(op);
        if open.served_us == 0 {
            open.served_us = now;
        }
        op
    }

    pub(crate) fn send(&mut self, ring: usize, conn: Key, socket: usize, lent: Lent, deferred: bool) -> u64 {
        let open = self.open_socket(ring, socket);
        assert!(open.send.is_none(), "two sends on s{socket}");
        assert!(open.connect.is_none(), "a send on a socket that is being connected");
        let hash = hash(lent.cells().iter().map(Cell::get));
        let op = self.op(ring, Kind::Send { lent, hash, accepted: 0, done: false, deferred }, socket, conn);
        self.note(2, hash);
        self.sockets[socket].send = Some(op);
        op
    }

    pub(crate) fn watch_hangup(&mut self, ring: usize, conn: Key, socket: usize) -> u64 {
        let open = self.open_socket(ring, socket);
        assert!(open.hangup.is_none(), "two watches on s{socket}");
        let op = self.op(ring, Kind::Hangup, socket, conn);
        self.sockets[socket].hangup = Some(op);
        op
    }

    pub(crate) fn cancel(&mut self, ring: usize, op: u64) {
        self.note(3, op);
        if let Some(known) = self.ops.get(&op) {
            assert!(known.ring == ring, "op {op} is another shard's");
            self.rings[ring].submissions.push(Submission::Cancel(op));
        }
    }

    pub(super) fn submit(&mut self, submission: Submission) {
        match submission {
            Submission::Op(op) => {
                let Some(Op { kind, socket, .. }) = self.ops.get(&op) else { return };
                let socket = *socket;
                match kind {
                    Kind::Accept { .. } => {}
                    Kind::Connect { .. } => {
                        let delay = self.delay();
                        self.after(delay, Event::Connect(op));
                    }
                    Kind::Receive => self.receive_soon(socket),
                    // The ring knows its fate when the call that submits it returns (decision 010).
                    Kind::Send { deferred: true, .. } => self.send_progress(socket),
                    Kind::Send { .. } => self.send_soon(socket),
                    Kind::Hangup => self.hang_soon(socket),
                }
            }
            Submission::Cancel(op) => {
                // Those of receives would not be missed: a shutdown ends them too.
                let receives = matches!(self.ops.get(&op), Some(Op { kind: Kind::Receive, .. }));
                if !receives && self.strike(Planted::LostCancel) {
                    return;
                }
                if let Some(Op { kind: Kind::Receive, socket, .. }) = self.ops.get(&op) {
                    self.sockets[*socket].late_bytes.get_or_insert(0);
                }
                let accepts = matches!(self.ops.get(&op), Some(Op { kind: Kind::Accept { .. }, .. }));
                let late_us = match self.faults.cancel_late_us {
                    // A real ring cancels an accept at once.
                    late_us if accepts => late_us.min(5_000),
                    // What goes on arriving must fit into the bound on memory.
                    late_us if receives => late_us.min(5_000),
                    late_us => late_us,
                };
                let delay = self.rng.skewed(late_us);
                self.after(delay, Event::Cancel(op));
            }
        }
    }

    pub(super) fn complete(&mut self, op: u64, completion: Done) {
        let Some(Op { socket, kind, ring, .. }) = self.ops.remove(&op) else {
            panic!("op {op} completes twice");
        };
        let receives = matches!(kind, Kind::Receive);
        let gone = matches!(
            completion,
            Completion::ReceiveEnded { why: ReceiveEnd::Fin | ReceiveEnd::Error(ECONNRESET), .. }
                | Completion::Hangup { result: Ok(Hangup::Reset), .. }
        );
        if let Some(socket) = self.sockets.get_mut(socket) {
            if gone && socket.told_us == 0 {
                socket.told_us = self.now;
            }
            match kind {
                Kind::Accept { .. } => {}
                Kind::Connect { .. } => socket.connect = None,
                Kind::Receive => (socket.receive, socket.late_bytes) = (None, None),
                Kind::Send { .. } => socket.send = None,
                Kind::Hangup => socket.hangup = None,
            }
        }
        if let Kind::Accept { listener, .. } = kind {
            let listener = &mut self.listeners[listener];
            listener.accepts.retain(|&armed| armed != op);
            listener.multishot &= !listener.accepts.is_empty();
        }
        if matches!(kind, Kind::Send { .. }) {
            if self.strike(Planted::LostSent) {
                return;
            }
            if let Completion::Sent { conn, result } = completion
                && self.strike(Planted::DoubleSent)
            {
                self.rings[ring].ready.push_back(((socket, false), Completion::Sent { conn, result }));
            }
        }
        if matches!(completion, Completion::ReceiveEnded { why: ReceiveEnd::Fin, .. })
            && self.strike(Planted::LostWakeUp)
        {
            return;
        }
        self.rings[ring].ready.push_back(((socket, receives), completion));
    }

    pub(super) fn match_accepts(&mut self) {
        for index in 0..self.listeners.len() {
            let (ring, listener) = (self.listeners[index].ring, index % self.listeners_each());
            while let Some(&op) = self.listeners[index].accepts.front()
                && !self.rings[ring]
                    .submissions
                    .iter()
                    .any(|waiting| matches!(waiting, Submission::Op(new) if *new == op))
                && let Some(&socket) = self.listeners[index].backlog.front()
            {
                let multishot =
                    matches!(self.ops.get(&op), Some(Op { kind: Kind::Accept { multishot: true, .. }, .. }));
                if self.rng.chance(self.faults.accept_error) {
                    let error = Some(self.rng.pick(&ACCEPT_ERRORS));
                    self.complete(op, Completion::AcceptEnded { listener, op: OpId::new(op), error });
                    continue;
                }
                if self.rng.chance(self.faults.accept_aborts) {
                    self.listeners[index].backlog.pop_front();
                    self.abort(socket);
                    let error = Some(ECONNABORTED);
                    self.complete(op, Completion::AcceptEnded { listener, op: OpId::new(op), error });
                    continue;
                }
                self.listeners[index].backlog.pop_front();
                self.say(|| format!("s{socket} accepted"));
                let lane = (usize::MAX, false);
                let accepted = SimSocket(socket as u32);
                let accepted = Completion::Accepted { listener, socket: accepted };
                self.rings[ring].ready.push_back((lane, accepted));
                if !multishot || self.rng.chance(self.faults.accept_ends) {
                    self.complete(op, Completion::AcceptEnded { listener, op: OpId::new(op), error: None });
                }
            }
        }
    }

    pub(crate) fn receive_soon(&mut self, socket: usize) {
        let delay = self.delay();
        let receiver = &mut self.sockets[socket];
        if receiver.receive.is_some() && !receiver.receive_due {
            receiver.receive_due = true;
            self.after(delay, Event::Receive(socket));
        }
    }

    pub(super) fn send_soon(&mut self, socket: usize) {
        let delay = self.delay();
        let sender = &mut self.sockets[socket];
        if sender.send.is_some() && !sender.send_due {
            sender.send_due = true;
            self.after(delay, Event::Send(socket));
        }
    }

    pub(super) fn hang_soon(&mut self, socket: usize) {
        if self.sockets[socket].hangup.is_some() {
            let delay = self.delay();
            self.after(delay, Event::Hang(socket));
        }
    }

    pub(super) fn receive_progress(&mut self, index: usize) {
        self.sockets[index].receive_due = false;
        let Some(op) = self.sockets[index].receive else { return };
        let Some((conn, ring)) = self.ops.get(&op).map(|op| (op.conn, op.ring)) else { return };
        let socket = &self.sockets[index];
        let why = if !socket.inward.is_empty() {
            if self.buffers_free(ring) == 0 || self.rng.chance(self.faults.receive_no_buffer) {
                ReceiveEnd::Error(Errno::NO_BUFFERS)
            } else {
                let limit = match self.faults.receive_bytes {
                    0 => self.buffer_bytes,
                    bytes => (self.rng.skewed(bytes as u64) as usize + 1).min(self.buffer_bytes),
                };
                let mut from = index;
                if self.strike(Planted::OthersBytes) {
                    from = self.sockets.iter().position(|s| !s.inward.is_empty()).unwrap_or(index);
                }
                let inward = &mut self.sockets[from].inward;
                let bytes: Vec<u8> = inward.drain(..limit.min(inward.len())).collect();
                self.note(8, hash(bytes.iter().copied()));
                if let Some(late_bytes) = &mut self.sockets[index].late_bytes {
                    *late_bytes += bytes.len();
                    self.late_bytes_max = self.late_bytes_max.max(*late_bytes);
                }
                let buffer = SimBuffer::new(bytes, &self.rings[ring].buffers_used);
                self.rings[ring].ready.push_back(((index, true), Completion::Received { conn, buffer }));
                self.peer_writable(index);
                if !self.rng.chance(self.faults.receive_rearm) {
                    return self.receive_soon(index);
                }
                if self.strike(Planted::ForgottenReceive) {
                    self.sockets[index].receive_due = true;
                    return;
                }
                ReceiveEnd::Rearm
            }
        } else if let Some(error) = socket.inward_error {
            ReceiveEnd::Error(error)
        } else if socket.inward_fin || socket.shut_read {
            ReceiveEnd::Fin
        } else {
            return;
        };
        self.complete(op, Completion::ReceiveEnded { conn, why });
    }

    pub(super) fn send_progress(&mut self, index: usize) {
        self.sockets[index].send_due = false;
        let Some(op) = self.sockets[index].send else { return };
        let wrong = self.strike(Planted::WrongWindow);
        let piecewise = self.rng.chance(self.faults.send_piecewise);
        let short = self.rng.chance(self.faults.send_short);
        let late = if self.rng.chance(self.faults.send_late) { self.rng.skewed(20_000) } else { 0 };
        let nothing = self.rng.chance(self.faults.send_nothing);
        let fails = self.rng.chance(self.faults.send_fails);
        let part = self.rng.next();
        let Some(Op { kind: Kind::Send { lent, accepted, done, deferred, .. }, conn, ring, .. }) =
            self.ops.get_mut(&op)
        else {
            return;
        };
        if *done {
            return;
        }
        let (conn, ring) = (*conn, *ring);
        if nothing && *accepted == 0 {
            return self.complete(op, Completion::Sent { conn, result: Ok(0) });
        }
        if fails && self.sockets[index].inward_error.is_none() {
            self.break_socket(index);
            return self.send_progress(index);
        }
        let socket = &mut self.sockets[index];
        if socket.shut_write || socket.inward_error.is_some() {
            let error = if socket.shut_write { EPIPE } else { socket.inward_error.unwrap_or(ECONNRESET) };
            let result = if *accepted > 0 { Ok(*accepted as u32) } else { Err(error) };
            return self.complete(op, Completion::Sent { conn, result });
        }
        if socket.peer_closed {
            // The first send to a peer that is gone succeeds, and is answered by RST.
            *accepted = lent.len();
            *done = true;
            socket.inward_error = Some(ECONNRESET);
            self.after(late, Event::SendDone(op));
            self.receive_soon(index);
            return self.hang_soon(index);
        }
        let mut take = (lent.len() - *accepted).min(socket.outward_max.saturating_sub(socket.outward.len()));
        if piecewise && take > 1 {
            take = 1 + (part % take as u64) as usize;
        }
        let from = *accepted;
        socket.outward.extend(
            lent.cells()[from..from + take]
                .iter()
                .map(|cell| if wrong { cell.get().wrapping_add(1) } else { cell.get() }),
        );
        *accepted += take;
        let all = *accepted == lent.len();
        if all && from == 0 && late == 0 && *deferred {
            *done = true;
            self.rings[ring].deferred.push(op);
        } else if all || short {
            *done = true;
            self.after(late, Event::SendDone(op));
        } else if socket.outward.len() < socket.outward_max {
            self.send_soon(index);
        }
        if take > 0 {
            self.peer_readable(index);
        }
    }

    pub(super) fn send_done(&mut self, op: u64) {
        let Some(Op { kind: Kind::Send { lent, hash: before, accepted, .. }, conn, .. }) = self.ops.get(&op)
        else {
            return;
        };
        let after = hash(lent.cells().iter().map(Cell::get));
        assert!(*before == after, "memory lent to the kernel has changed");
        let completion = Completion::Sent { conn: *conn, result: Ok(*accepted as u32) };
        self.complete(op, completion);
    }

    pub(super) fn cancel_happens(&mut self, op: u64) {
        let Some(Op { kind, conn, .. }) = self.ops.get(&op) else { return };
        let conn = *conn;
        let completion = match kind {
            Kind::Accept { listener, .. } => Completion::AcceptEnded {
                listener: *listener % self.listeners_each(),
                op: OpId::new(op),
                error: Some(Errno::CANCELED),
            },
            Kind::Connect { .. } => Completion::Connected { conn, result: Err(Errno::CANCELED) },
            Kind::Receive => Completion::ReceiveEnded { conn, why: ReceiveEnd::Error(Errno::CANCELED) },
            Kind::Send { done: true, .. } => return,
            Kind::Send { accepted: 0, .. } => Completion::Sent { conn, result: Err(Errno::CANCELED) },
            Kind::Send { accepted, .. } => Completion::Sent { conn, result: Ok(*accepted as u32) },
            Kind::Hangup => Completion::Hangup { conn, result: Err(Errno::CANCELED), armed: false },
        };
        self.complete(op, completion);
    }

    pub(super) fn connect_happens(&mut self, op: u64) {
        let Some(Op { kind: Kind::Connect { target }, socket, conn, .. }) = self.ops.get(&op) else { return };
        let (target, socket, conn) = (*target, *socket, *conn);
        if self.rng.chance(self.faults.connect_hangs) {
            self.connects_failed += 1;
            return;
        }
        let host = self.hosts.iter().position(|host| host.address == target);
        let refuses = self.rng.chance(self.faults.connect_refused);
        let result = match host {
            Some(host) if self.hosts[host].hangs => return,
            Some(host) if !refuses && !self.hosts[host].refuses => {
                self.backend_accepts(host, socket);
                Ok(())
            }
            _ => {
                self.connects_failed += 1;
                Err(ECONNREFUSED)
            }
        };
        self.complete(op, Completion::Connected { conn, result });
    }

    pub(super) fn hang_happens(&mut self, index: usize) {
        let socket = &self.sockets[index];
        let Some(op) = socket.hangup else { return };
        let Some((conn, ring)) = self.ops.get(&op).map(|op| (op.conn, op.ring)) else { return };
        let result = if socket.inward_error.is_some() || (socket.shut_read && socket.inward_fin) {
            Hangup::Reset
        } else if (socket.inward_fin || socket.shut_read) && !socket.hangup_told {
            Hangup::Fin
        } else {
            return;
        };
        if result == Hangup::Fin && !self.rng.chance(self.faults.hangup_ends) {
            self.sockets[index].hangup_told = true;
            let told = Completion::Hangup { conn, result: Ok(result), armed: true };
            return self.rings[ring].ready.push_back(((index, false), told));
        }
        self.complete(op, Completion::Hangup { conn, result: Ok(result), armed: false });
    }
}
