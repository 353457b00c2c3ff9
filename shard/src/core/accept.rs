//! Accepting clients against slot permits, sharing them out between shards, and leaving: drain and stop.
//!
//! A permit is a free client slot. With more permits than a turn can bring clients, the accept is multishot. With fewer, as
//! many one-shot accepts are armed as there are permits; with none all are cancelled and the kernel's backlog waits. What
//! comes all the same (from a listener whose cancel was late, or from a neighbour) is parked: it is served before the backlog
//! is.

use super::conn::{Client, Conn, Handshake, Role, State};
use super::moves::Newcomer;
use super::{Leaving, Shard, TimerOf};
use crate::io::{Close, Errno, Io, OpId};
use crate::mesh::{Handed, Neighbours, Report};
use protocol::limits::{
    ACCEPT_RETRY_MS, ACCEPTS_ARMED_MAX, COMPLETIONS_PER_ENTRY, DRAIN_FRESH_MS, HANDED_MAX, HANDED_ON_MAX,
    STOP_FLUSH_MS,
};
use protocol::phase::End;
use protocol::planted::{Bug, is_planted};

/// The accepts of one listener.
#[derive(Default, Debug)]
pub(super) struct Acceptor {
    /// In flight: one multishot, or any number of one-shots.
    armed: Vec<OpId>,
    multishot: bool,
    /// All of them are being cancelled.
    cancelled: bool,
    /// Waits for the retry timer, after an error or for clients on their way to neighbours.
    resting: bool,
    /// The last one failed: one at a time, until one succeeds.
    probing: bool,
    paused: bool,
    /// Clients were accepted, or an accept was armed, since the drain's last look; the queue is empty after a turn
    /// without either.
    accepted_in_turn: bool,
    /// The listener is closed.
    closed: bool,
    /// Draining: its accepts have been cancelled, because a whole turn brought no client.
    closing: bool,
}

impl Acceptor {
    pub(super) fn is_resting(&self) -> bool {
        self.resting
    }

    /// Accepts, or has a reason not to that is not the number of clients.
    pub(super) fn is_at_work(&self) -> bool {
        !self.armed.is_empty() || self.resting || self.closed || self.closing
    }

    fn cancel(&mut self, io: &mut impl Io) {
        if !std::mem::replace(&mut self.cancelled, true) {
            for &op in &self.armed {
                io.cancel(op);
            }
        }
    }

    fn arm(&mut self, io: &mut impl Io, listener: usize, multishot: bool) {
        self.armed.push(io.accept(listener, multishot));
        self.multishot = multishot;
        // What is queued is brought in the next turn at the earliest: a drain must not take this one for empty.
        self.accepted_in_turn = true;
    }
}

impl<I: Io> Shard<I> {
    fn has_free_slot(&self) -> bool {
        self.clients < self.settings.connections_max
    }

    /// Clients that may be accepted: free slots, less the clients that this shard has handed over and no neighbour has taken
    /// yet, since they hold descriptors. Who has a free slot takes what it is handed all the same: if both sides of a swap
    /// waited for permits, both would wait for ever.
    fn permits(&self) -> usize {
        let handed = self.neighbours.as_ref().map_or(0, Neighbours::on_their_way);
        self.settings.connections_max.saturating_sub(self.clients + handed)
    }

    /// Arms, disarms or leaves alone, as the permits say.
    pub(super) fn follow_accept(&mut self, listener: usize) {
        let permits = self.permits();
        // A multishot takes all that is queued, and what has filled the queue again, until the completion queue is full;
        // nothing can cancel it meanwhile.
        let handed_in = if self.neighbours.is_some() { HANDED_MAX } else { 0 };
        let plenty = permits > (self.settings.ring_depth * COMPLETIONS_PER_ENTRY) as usize + handed_in;
        // Each listener waits with one accept for the last slot, or one of them might wait forever for a client while the
        // others' queue.
        let share = (permits.min(ACCEPTS_ARMED_MAX) / self.acceptors.len()).max(1);
        let (io, acceptor) = (&mut self.io, &mut self.acceptors[listener]);
        if acceptor.closed || acceptor.resting || acceptor.closing {
            return;
        }
        if permits == 0 {
            acceptor.cancel(io);
            if self.clients < self.settings.connections_max {
                // Nobody tells when those on their way have arrived; who has no room for them may hand them back.
                if let Some(neighbours) = &mut self.neighbours {
                    neighbours.remind();
                }
                acceptor.resting = true;
                self.wheel.insert(self.now_us / 1000 + ACCEPT_RETRY_MS, TimerOf::Acceptor(listener as u32));
                return;
            }
            if !std::mem::replace(&mut acceptor.paused, true) {
                self.stats.counters.accept_pauses += 1;
            }
            return;
        }
        acceptor.paused = false;
        let (plenty, share) = if acceptor.probing { (false, 1) } else { (plenty, share) };
        if acceptor.armed.is_empty() {
            acceptor.cancelled = false;
            if plenty {
                return acceptor.arm(io, listener, true);
            }
        }
        if acceptor.cancelled {
            // Armed anew when the last of them has ended.
        } else if acceptor.multishot && !acceptor.armed.is_empty() {
            if !plenty {
                acceptor.cancel(io);
            }
        } else if !plenty {
            while acceptor.armed.len() < share {
                acceptor.arm(io, listener, false);
            }
        }
    }

    pub(super) fn follow_accepts(&mut self) {
        for listener in 0..self.acceptors.len() {
            self.follow_accept(listener);
        }
    }

    pub(super) fn accepted(&mut self, listener: usize, socket: I::Socket) {
        self.acceptors[listener].accepted_in_turn = true;
        self.acceptors[listener].probing = false;
        self.stats.counters.accepts += 1;
        if let Some(socket) = self.hand_away(socket, listener) {
            self.take_in(Newcomer::fresh(socket, listener));
        }
        if self.permits() == 0 {
            self.follow_accepts();
        } else {
            self.follow_accept(listener);
        }
    }

    /// Clients of this shard: served, parked, and handed to it but not taken yet.
    pub(super) fn load(&self) -> usize {
        let handed = self.neighbours.as_ref().map_or(0, Neighbours::waiting);
        self.clients + self.parked.len() + handed
    }

    /// Hands a client just accepted to a neighbour, if this shard has more than its share; gives it back if not.
    fn hand_away(&mut self, socket: I::Socket, listener: usize) -> Option<I::Socket> {
        let with_it = self.load() + 1;
        let (Leaving::No, Some(neighbours)) = (self.leaving, &mut self.neighbours) else {
            return Some(socket);
        };
        let Some(to) = neighbours.emptier(with_it, self.settings.connections_max) else {
            return Some(socket);
        };
        match neighbours.hand(to, Handed { what: self.io.release(socket), listener, times: 1, moved: None }) {
            Ok(()) => {
                self.stats.counters.handed_away += 1;
                None
            }
            Err(handed) => Some(self.io.adopt(handed.what)),
        }
    }

    /// Takes in what neighbours have handed over, or hands it on, as far as there are slots here or there.
    pub(super) fn take_handed(&mut self) {
        for _ in 0..HANDED_MAX {
            let load = self.load();
            let Some(neighbours) = &mut self.neighbours else { return };
            let Some((times, moved)) = neighbours.peek().map(|handed| (handed.times, handed.moved.is_some()))
            else {
                break;
            };
            // Who was moved has come to its home.
            let may_go_on = self.leaving == Leaving::No && times < HANDED_ON_MAX && !moved;
            let most = self.settings.connections_max;
            let onward = if may_go_on { neighbours.emptier(load, most) } else { None };
            // One that found no room anywhere is parked, so that its sender's slot is free again.
            let homeless = (times >= HANDED_ON_MAX || moved) && self.parked.len() < ACCEPTS_ARMED_MAX;
            if onward.is_none() && !self.has_free_slot() && !homeless {
                break;
            }
            let Some(mut handed) = self.next_handed() else { break };
            if let (Some(to), Some(neighbours)) = (onward, &mut self.neighbours) {
                handed.times = handed.times.saturating_add(1);
                match neighbours.hand(to, handed) {
                    Ok(()) => {
                        self.stats.counters.handed_away += 1;
                        continue;
                    }
                    Err(back) => handed = back,
                }
            }
            let socket = self.io.adopt(handed.what);
            self.take_in(Newcomer { socket, listener: handed.listener, moved: handed.moved });
        }
        if self.permits() == 0 {
            self.follow_accepts();
        }
    }

    fn next_handed(&mut self) -> Option<Handed<I::Parcel>> {
        let handed = self.neighbours.as_mut()?.take()?;
        self.stats.counters.handed_in += 1;
        Some(handed)
    }

    /// Neighbours see the load at once.
    pub(super) fn publish_load(&mut self) {
        // Without those that are parked: a slot that waits for a client on its way is free to the one who has that client.
        let load = (self.leaving == Leaving::No).then_some(self.clients);
        if let Some(neighbours) = &mut self.neighbours {
            neighbours.publish(load);
        }
    }

    /// Neighbours hear once per turn of what was handed to them.
    pub(super) fn ring_neighbours(&mut self) {
        if let Some(neighbours) = &mut self.neighbours
            && !is_planted(Bug::BellForgotten)
        {
            neighbours.ring();
        }
    }

    /// Serves a client, or parks it until a slot is free.
    fn take_in(&mut self, newcomer: Newcomer<I::Socket>) {
        if self.has_free_slot() {
            self.serve(newcomer);
        } else if matches!(self.leaving, Leaving::Stopping { .. }) {
            self.io.close(newcomer.socket, Close::Reset);
            self.stats.counters.closes += 1;
        } else {
            self.stats.counters.accept_parks += 1;
            self.parked.push_back(newcomer);
            self.publish_load();
        }
    }

    fn serve(&mut self, newcomer: Newcomer<I::Socket>) {
        let Newcomer { socket, listener, moved } = newcomer;
        if let Some(moved) = moved {
            return self.serve_moved(socket, *moved);
        }
        let tls = self.settings.listeners.get(listener).and_then(|listener| listener.tls);
        let handshake = tls.map_or(Handshake::None, |server| Handshake::Awaited(server as u16));
        let mut conn = Conn::new(socket, Role::Client(Client { handshake, ..Client::default() }));
        let first_ms = match (tls, self.settings.tls_handshake_ms) {
            (Some(_), 0) => u32::MAX,
            (Some(_), ms) => ms,
            (None, _) => self.idle_ms(),
        };
        conn.due_ms = self.now_ms() + u64::from(first_ms);
        if self.leaving != Leaving::No {
            conn.due_ms = conn.due_ms.min(self.now_ms() + DRAIN_FRESH_MS);
        }
        conn.receive_wanted = true;
        self.insert_client(conn);
    }

    pub(super) fn insert_client(&mut self, conn: Conn<I::Socket>) -> Option<protocol::slots::Key> {
        match self.conns.insert(conn) {
            Ok(key) => {
                self.clients += 1;
                self.publish_load();
                self.follow_receive(key);
                self.follow_conn_timer(key);
                Some(key)
            }
            Err(conn) => {
                self.io.close(conn.socket, Close::Reset);
                self.stats.counters.closes += 1;
                None
            }
        }
    }

    /// Those that wait for a slot, in their order: parked ones, then those that neighbours have handed over.
    pub(super) fn serve_waiting(&mut self) {
        while self.has_free_slot()
            && let Some(newcomer) = self.parked.pop_front()
        {
            self.serve(newcomer);
        }
        if self.parked.is_empty() {
            self.take_handed();
        }
    }

    /// What the kernel does with the clients in its backlog when their listener is closed.
    fn reset_waiting(&mut self) {
        while let Some(handed) = self.next_handed() {
            self.parked.push_back(Newcomer::fresh(self.io.adopt(handed.what), handed.listener));
        }
        for Newcomer { socket, .. } in std::mem::take(&mut self.parked) {
            self.io.close(socket, Close::Reset);
            self.stats.counters.closes += 1;
        }
    }

    /// Before a request's head is known, the last route (which matches everything) says how long a client may idle.
    pub(super) fn idle_ms(&self) -> u32 {
        match self.settings.routes.last().map_or(0, |route| route.deadlines.keep_alive_ms) {
            0 => u32::MAX,
            ms => ms,
        }
    }

    pub(super) fn accept_ended(&mut self, listener: usize, op: OpId, error: Option<Errno>) {
        let now_ms = self.now_ms();
        let acceptor = &mut self.acceptors[listener];
        acceptor.armed.retain(|&armed| armed != op);
        if acceptor.closing {
            if acceptor.armed.is_empty() {
                acceptor.closed = true;
                self.io.stop_listening(listener);
            }
            return;
        }
        if error.is_some_and(|error| error != Errno::CANCELED) {
            self.stats.counters.accept_errors += 1;
            // The others would fail alike.
            acceptor.cancel(&mut self.io);
            acceptor.probing = true;
            if !std::mem::replace(&mut acceptor.resting, true) {
                self.wheel.insert(now_ms + ACCEPT_RETRY_MS, TimerOf::Acceptor(listener as u32));
            }
            return;
        }
        self.follow_accept(listener);
    }

    pub(super) fn accept_rested(&mut self, listener: usize) {
        self.acceptors[listener].resting = false;
        self.serve_waiting();
        self.follow_accept(listener);
    }

    /// A client slot is free again.
    pub(super) fn client_freed(&mut self) {
        self.stats.counters.closes += 1;
        self.slot_freed();
    }

    pub(super) fn slot_freed(&mut self) {
        self.clients -= 1;
        if !is_planted(Bug::ForgottenAccept) {
            self.serve_waiting();
            self.publish_load();
            self.follow_accepts();
        }
        self.look_for_fuller();
    }

    /// Takes what the kernel has queued, then no more; idle clients go, streams finish.
    pub(super) fn drain(&mut self, deadline_ms: u64) {
        if self.left {
            return;
        }
        let deadline_ms = self.now_ms() + deadline_ms;
        match self.leaving {
            Leaving::Stopping { .. } => return,
            Leaving::No | Leaving::Draining { .. } => self.leaving = Leaving::Draining { deadline_ms },
        }
        self.publish_load();
        self.arm_leaving(deadline_ms);
        self.durable_drain();
        self.drain_stored();
        self.drain_kept();
        for acceptor in &mut self.acceptors {
            acceptor.accepted_in_turn = true;
        }
        for key in self.client_conns() {
            self.leave_when_idle(key);
        }
        self.close_pool();
    }

    /// A client that is between two requests goes now; one that has not made its first gets a moment for it.
    pub(super) fn leave_when_idle(&mut self, key: protocol::slots::Key) {
        let fresh_ms = self.now_ms() + DRAIN_FRESH_MS;
        let Some(conn) = self.conns.get_mut(key) else { return };
        if conn.state != State::Open || conn.stream.is_some() || !conn.held.is_empty() {
            return;
        }
        if conn.client().is_some_and(|client| client.requests == 0) {
            conn.due_ms = conn.due_ms.min(fresh_ms);
            self.follow_conn_timer(key);
        } else {
            self.linger(key);
        }
    }

    /// Ends everything with an in-band error and leaves a moment later.
    pub(super) fn stop(&mut self) {
        if self.left {
            return;
        }
        let deadline_ms = self.now_ms() + STOP_FLUSH_MS;
        if !matches!(self.leaving, Leaving::Stopping { .. }) {
            self.leaving = Leaving::Stopping { deadline_ms };
            self.publish_load();
            self.arm_leaving(deadline_ms);
            for acceptor in &mut self.acceptors {
                acceptor.accepted_in_turn = false;
            }
            self.reset_waiting();
            self.durable_drain();
            self.drain_stored();
            self.drain_kept();
            self.force_streams(End::Stopped);
            self.close_pool();
        }
    }

    fn force_streams(&mut self, end: End) {
        let keys: Vec<_> = self.streams.iter().map(|(key, _)| key).collect();
        for key in keys {
            if self.streams.get(key).is_some_and(|stream| !stream.produced) {
                self.forced += 1;
                self.end_stream(key, end);
            }
        }
    }

    /// The drain's (or stop's) own time is over.
    pub(super) fn leaving_due(&mut self) {
        let now_ms = self.now_ms();
        self.leaving_timer = None;
        match self.leaving {
            Leaving::Draining { deadline_ms } if deadline_ms <= now_ms => {
                self.reset_waiting();
                self.force_streams(End::Drain);
                self.leaving = Leaving::Stopping { deadline_ms: now_ms + STOP_FLUSH_MS };
                self.arm_leaving(now_ms + STOP_FLUSH_MS);
            }
            // The clock has jumped: listeners are closed at the end of this turn, and with them what the kernel holds for them.
            Leaving::Stopping { deadline_ms } if deadline_ms <= now_ms && !self.has_closed() => {
                self.arm_leaving(now_ms + 1);
            }
            Leaving::Stopping { deadline_ms } if deadline_ms <= now_ms => {
                for key in self.client_conns() {
                    let stream = self.conns.get(key).and_then(|conn| conn.stream);
                    let how = stream.map_or(Close::Orderly, |stream| self.how_to_cut(stream));
                    if let Some(stream) = stream {
                        let end = self.streams.get(stream).and_then(|stream| stream.end);
                        if !matches!(end, Some(End::Drain | End::Stopped)) {
                            // Begun since the others were ended; or all was said, and the client has not heard it.
                            self.forced += 1;
                            self.end_stream(stream, End::Stopped);
                            self.override_end(stream, End::Stopped);
                        }
                        self.settle(stream);
                    }
                    self.join(key, how);
                }
                self.leave();
            }
            _ => {}
        }
    }

    /// At the end of each turn while leaving: closes listeners whose queue is empty, and leaves when nothing is left.
    pub(super) fn follow_leaving(&mut self) {
        if self.leaving == Leaving::No || self.left {
            return;
        }
        for listener in 0..self.acceptors.len() {
            let draining = matches!(self.leaving, Leaving::Draining { .. });
            let acceptor = &mut self.acceptors[listener];
            if acceptor.closed || acceptor.closing || std::mem::take(&mut acceptor.accepted_in_turn) {
                continue;
            }
            // Without a free slot or descriptor the queue waits for one, as long as the drain lasts.
            if (acceptor.paused || acceptor.resting) && draining {
                continue;
            }
            acceptor.closing = true;
            if acceptor.armed.is_empty() {
                acceptor.closed = true;
                self.io.stop_listening(listener);
            } else {
                acceptor.cancel(&mut self.io);
            }
        }
        if !self.has_closed() || !self.parked.is_empty() {
            return;
        }
        // A neighbour that has not heard of the drain yet may hand a client over; it rings when it has.
        if self.neighbours.as_ref().is_some_and(|neighbours| !neighbours.hand_no_more()) {
            return;
        }
        self.serve_waiting();
        let told = self.mirrors_told() && self.errands_done();
        let over = self.conns.is_empty() && self.streams.is_empty() && told;
        if self.load() == 0 && over {
            self.leave();
        }
    }

    fn has_closed(&self) -> bool {
        self.acceptors.iter().all(|acceptor| acceptor.closed)
    }

    /// While leaving, a turn must not sleep until the listeners are closed.
    pub(super) fn is_closing_listeners(&self) -> bool {
        self.leaving != Leaving::No
            && self.acceptors.iter().any(|acceptor| {
                !acceptor.closed && !acceptor.closing && !acceptor.paused && !acceptor.resting
            })
    }

    fn arm_leaving(&mut self, due_ms: u64) {
        self.disarm_leaving();
        self.leaving_timer = Some(self.wheel.insert(due_ms, TimerOf::Drain));
    }

    fn disarm_leaving(&mut self) {
        if let Some(timer) = self.leaving_timer.take() {
            self.wheel.remove(timer);
        }
    }

    fn leave(&mut self) {
        self.disarm_leaving();
        self.left = true;
        self.reports.push_back(Report::Left { forced: self.forced });
    }
}
