//! Accepting clients against slot permits, and leaving: drain and stop.
//!
//! A permit is a free client slot. While there are more permits than twice what the kernel's backlogs can hold, the accept is
//! multishot and cannot overrun them; with fewer it accepts one at a time; with none it is disarmed and the backlog waits.

use super::conn::{Client, Conn, Role, State};
use super::{Leaving, Shard, TimerOf};
use crate::io::{Close, Errno, Io, OpId};
use crate::mesh::Report;
use protocol::limits::{ACCEPT_RETRY_MS, DRAIN_FRESH_MS, STOP_FLUSH_MS};
use protocol::phase::End;
use protocol::planted::{Bug, is_planted};

/// The accept of one listener.
#[derive(Default, Debug)]
pub(super) struct Acceptor {
    armed: Option<(OpId, Multishot)>,
    /// Waits for the retry timer after an error.
    resting: bool,
    paused: bool,
    /// Clients were accepted, or the accept was armed, since the drain's last look; the queue is empty after a turn
    /// without either.
    accepted_in_turn: bool,
    /// The listener is closed.
    closed: bool,
    /// Draining: its accept has been cancelled, because a whole turn brought no client.
    closing: bool,
}

impl Acceptor {
    pub(super) fn is_resting(&self) -> bool {
        self.resting
    }

    /// Accepts, or has a reason not to that is not the number of clients.
    pub(super) fn is_at_work(&self) -> bool {
        self.armed.is_some() || self.resting || self.closed || self.closing
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Multishot {
    Yes,
    No,
    /// Being cancelled.
    Cancelled,
}

impl<I: Io> Shard<I> {
    fn permits(&self) -> usize {
        self.settings.connections_max.saturating_sub(self.clients)
    }

    /// Arms, disarms or leaves alone, as the permits say.
    pub(super) fn follow_accept(&mut self, listener: usize) {
        let permits = self.permits();
        // Until a cancel takes effect every listener may bring its queue, and what has filled it again.
        let plenty = permits > 2 * self.settings.backlog as usize * self.acceptors.len();
        let acceptor = &mut self.acceptors[listener];
        if acceptor.closed || acceptor.resting || acceptor.closing {
            return;
        }
        match acceptor.armed {
            Some((op, Multishot::Yes)) if !plenty => {
                acceptor.armed = Some((op, Multishot::Cancelled));
                self.io.cancel(op);
            }
            None if permits > 0 => {
                acceptor.paused = false;
                let kind = if plenty { Multishot::Yes } else { Multishot::No };
                acceptor.armed = Some((self.io.accept(listener, plenty), kind));
                // What is queued is brought in the next turn at the earliest: a drain must not take this one for empty.
                acceptor.accepted_in_turn = true;
            }
            None if !acceptor.paused => {
                acceptor.paused = true;
                self.stats.counters.accept_pauses += 1;
            }
            _ => {}
        }
    }

    pub(super) fn follow_accepts(&mut self) {
        for listener in 0..self.acceptors.len() {
            self.follow_accept(listener);
        }
    }

    pub(super) fn accepted(&mut self, listener: usize, socket: I::Socket) {
        self.acceptors[listener].accepted_in_turn = true;
        self.stats.counters.accepts += 1;
        // Each listener waits with one accept for the last slot, or one of them might wait forever for a client while the
        // others' queue; so there may be as many clients too many as there are other listeners.
        if self.clients >= self.settings.connections_max + self.acceptors.len() - 1 {
            // Only an accept that was cancelled too late can bring one more.
            self.io.close(socket, Close::Reset);
            self.stats.counters.accept_errors += 1;
            return;
        }
        let mut conn = Conn::new(socket, Role::Client(Client::default()));
        conn.due_ms = self.now_ms() + u64::from(self.idle_ms());
        if self.leaving != Leaving::No {
            conn.due_ms = conn.due_ms.min(self.now_ms() + DRAIN_FRESH_MS);
        }
        conn.receive_wanted = true;
        match self.conns.insert(conn) {
            Ok(key) => {
                self.clients += 1;
                self.follow_receive(key);
                self.follow_conn_timer(key);
            }
            Err(conn) => self.io.close(conn.socket, Close::Reset),
        }
        self.follow_accept(listener);
    }

    /// Before a request's head is known, the last route (which matches everything) says how long a client may idle.
    fn idle_ms(&self) -> u32 {
        match self.settings.routes.last().map_or(0, |route| route.deadlines.keep_alive_ms) {
            0 => u32::MAX,
            ms => ms,
        }
    }

    pub(super) fn accept_ended(&mut self, listener: usize, error: Option<Errno>) {
        let now_ms = self.now_ms();
        let acceptor = &mut self.acceptors[listener];
        acceptor.armed = None;
        if acceptor.closing {
            acceptor.closed = true;
            self.io.stop_listening(listener);
            return;
        }
        if error.is_some_and(|error| error != Errno::CANCELED) {
            self.stats.counters.accept_errors += 1;
            acceptor.resting = true;
            self.wheel.insert(now_ms + ACCEPT_RETRY_MS, TimerOf::Acceptor(listener));
            return;
        }
        self.follow_accept(listener);
    }

    pub(super) fn accept_rested(&mut self, listener: usize) {
        self.acceptors[listener].resting = false;
        self.follow_accept(listener);
    }

    /// A client slot is free again.
    pub(super) fn client_freed(&mut self) {
        self.clients -= 1;
        self.stats.counters.closes += 1;
        if !is_planted(Bug::ForgottenAccept) {
            self.follow_accepts();
        }
    }

    /// Takes what the kernel has queued, then no more; idle clients go, streams finish.
    pub(super) fn drain(&mut self, deadline_ms: u64) {
        let deadline_ms = self.now_ms() + deadline_ms;
        match self.leaving {
            Leaving::Stopping { .. } => return,
            Leaving::No | Leaving::Draining { .. } => self.leaving = Leaving::Draining { deadline_ms },
        }
        self.arm_leaving(deadline_ms);
        for acceptor in &mut self.acceptors {
            acceptor.accepted_in_turn = true;
        }
        for key in self.client_conns() {
            self.leave_when_idle(key);
        }
        self.close_pool();
    }

    /// A client that is between two requests goes now; one that has not made its first gets a moment for it.
    fn leave_when_idle(&mut self, key: protocol::slots::Key) {
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
        let deadline_ms = self.now_ms() + STOP_FLUSH_MS;
        if !matches!(self.leaving, Leaving::Stopping { .. }) {
            self.leaving = Leaving::Stopping { deadline_ms };
            self.arm_leaving(deadline_ms);
            for acceptor in &mut self.acceptors {
                acceptor.accepted_in_turn = false;
            }
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
                self.force_streams(End::Drain);
                self.leaving = Leaving::Stopping { deadline_ms: now_ms + STOP_FLUSH_MS };
                self.arm_leaving(now_ms + STOP_FLUSH_MS);
            }
            Leaving::Stopping { deadline_ms } if deadline_ms <= now_ms => {
                for key in self.client_conns() {
                    let stream = self.conns.get(key).and_then(|conn| conn.stream);
                    let how = stream.map_or(Close::Orderly, |stream| self.how_to_cut(stream));
                    if let Some(stream) = stream {
                        self.end_stream(stream, End::Stopped);
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
            match acceptor.armed {
                Some((op, _)) => self.io.cancel(op),
                None => {
                    acceptor.closed = true;
                    self.io.stop_listening(listener);
                }
            }
        }
        if self.clients == 0 && self.acceptors.iter().all(|acceptor| acceptor.closed) && self.conns.is_empty()
        {
            self.leave();
        }
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
