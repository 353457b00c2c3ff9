//! Moving a client to the shard that has what it asks for: the connection goes to the data, and no data is copied between
//! shards.
//!
//! ```text
//!   this shard                                         its home
//!   head parsed ─► Moving: receive cancelled
//!                  no operation left
//!                  └─ Io::release ─► queue of the mesh ─► Io::adopt ─► the same bytes again, and on
//! ```
//! What moves is a socket, the bytes that were received and not used, and TLS at rest. It happens between two requests, because of the
//! next one or for the sake of load (`balance`), and in the middle of one kind of answer (`handover`).

use super::conn::{Client, Conn, Role, State};
use super::handover::Handover;
use super::{Leaving, Shard};
use crate::io::Io;
use crate::mesh::{Handed, Moved};
use crate::tls::Tls;
use protocol::http::RequestHead;
use protocol::limits::HANDED_ON_MAX;
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;

/// A client that is to go to another shard.
#[derive(Clone, Copy)]
struct Going {
    client: Key,
    /// If it goes for the sake of load alone: when it will have been idle for too long, ms.
    idle_due_ms: Option<u64>,
}

/// Clients that are to go to other shards.
#[derive(Default)]
pub(super) struct Moves {
    clients: Vec<Going>,
    /// How many of them go in the middle of an answer.
    pub(super) handovers: usize,
}

impl Moves {
    /// How many there are.
    pub(super) fn under_way(&self) -> usize {
        self.clients.len()
    }
}

/// A client that a shard is to serve.
pub(super) struct Newcomer<S> {
    pub(super) socket: S,
    /// Index of the listener it came from.
    pub(super) listener: usize,
    /// What another shard knew of it; none: nothing of it was read.
    pub(super) moved: Option<Box<Moved>>,
}

impl<S> Newcomer<S> {
    pub(super) fn fresh(socket: S, listener: usize) -> Self {
        Newcomer { socket, listener, moved: None }
    }
}

impl<I: Io> Shard<I> {
    /// The shard that a client's request must go to, if it is another one and takes clients; and whether what it asks for is there or
    /// nowhere.
    pub(super) fn home_elsewhere(&self, key: Key, head: &RequestHead<'_, '_>) -> Option<(usize, bool)> {
        let neighbours = self.neighbours.as_ref()?;
        let durable = self.settings.durable.covers(head.path());
        if !durable && let Some(home) = self.shard_of_stream(head.path()) {
            if self.reads_mirror(head) {
                return None;
            }
            return (self.leaving == Leaving::No && neighbours.is_open(home)).then_some((home, false));
        }
        if !durable && let Some(next) = self.next_for_response(key, head) {
            return Some((next, false));
        }
        if !durable || self.leaving != Leaving::No {
            return None;
        }
        self.durable_elsewhere(key, head.path()).filter(|(home, _)| neighbours.is_open(*home))
    }

    /// A client leaves for another shard as soon as the kernel holds nothing of it.
    pub(super) fn begin_move(&mut self, key: Key, to: usize, sent: bool) {
        self.set_out(Going { client: key, idle_due_ms: None }, to, sent);
    }

    /// The same of one that asks for nothing, and is there for so long.
    pub(super) fn begin_move_for_load(&mut self, key: Key, to: usize, idle_due_ms: u64) {
        self.set_out(Going { client: key, idle_due_ms: Some(idle_due_ms) }, to, false);
    }

    fn set_out(&mut self, going: Going, to: usize, sent: bool) {
        let key = going.client;
        let Some(conn) = self.conns.get_mut(key) else { return };
        if let Some(client) = conn.client() {
            client.sent = sent;
        }
        conn.state = State::Moving(to as u16);
        conn.receive_wanted = false;
        (conn.due_ms, conn.look_ms) = (u64::MAX, u64::MAX);
        if let Some(op) = conn.ops.hangup {
            self.io.cancel(op);
        }
        self.moves.clients.push(going);
        // No end of an operation will wake the shard for it.
        self.hurried |= conn.ops.none() || conn.deferred;
        self.follow_receive(key);
    }

    /// Hands over whom the kernel has let go of. Looked at in every turn, since what ends an operation also ends its sleep, and so does
    /// the bell of a shard that there is room on the way to.
    pub(super) fn follow_moves(&mut self) {
        if self.moves.clients.is_empty() {
            return;
        }
        self.moves.handovers = 0;
        for going in std::mem::take(&mut self.moves.clients) {
            let key = going.client;
            let Some(conn) = self.conns.get(key) else { continue };
            let State::Moving(to) = conn.state else { continue };
            let to = usize::from(to);
            let answered = conn.stream.is_some();
            let open = self.neighbours.as_ref().is_some_and(|neighbours| neighbours.is_open(to));
            if !conn.ops.none() || conn.waiting > 0 || conn.tls.as_ref().is_some_and(|tls| tls.has_unsent()) {
                self.moves.clients.push(going);
                self.moves.handovers += usize::from(answered);
            } else if answered {
                match self.follow_handover(key, to) {
                    Handover::Goes => self.hand_over(going, to),
                    Handover::Stays => self.stay_with_answer(key),
                    Handover::Waits => {
                        self.moves.clients.push(going);
                        self.moves.handovers += 1;
                    }
                }
            } else if let Some(idle_due_ms) = going.idle_due_ms {
                let asks = !conn.held.is_empty() || conn.peer_fin;
                let full = self.neighbours.as_ref().is_none_or(|neighbours| neighbours.is_full(to));
                if asks || full || self.leaving != Leaving::No || !open {
                    self.stay_idle(key, idle_due_ms);
                } else {
                    self.hand_over(going, to);
                }
            } else if self.leaving != Leaving::No || !open {
                self.stay(key);
            } else if self.awaits_room(to) {
                self.moves.clients.push(going);
            } else {
                self.hand_over(going, to);
            }
        }
    }

    /// Whether the queue to a shard is full; if so, that shard rings when it is not any more.
    pub(super) fn awaits_room(&self, to: usize) -> bool {
        let Some(neighbours) = &self.neighbours else { return false };
        if is_planted(Bug::MoveForgotten) { neighbours.is_full(to) } else { neighbours.awaits_room(to) }
    }

    /// It is not taken elsewhere, and is answered here.
    pub(super) fn stay(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(key) else { return };
        conn.state = State::Open;
        conn.receive_wanted = true;
        if let Some(client) = conn.client() {
            client.sent = false;
        }
        let (held, fin) = (conn.take_held(), std::mem::take(&mut conn.peer_fin));
        self.go_on(key, held, fin);
    }

    /// One that asked for nothing is not taken elsewhere.
    fn stay_idle(&mut self, key: Key, idle_due_ms: u64) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.due_ms = idle_due_ms;
        }
        self.stay(key);
        self.follow_conn_timer(key);
        if self.leaving != Leaving::No {
            self.leave_when_idle(key);
        }
    }

    /// Takes up a connection with what it has sent, as if it had just arrived.
    fn go_on(&mut self, key: Key, held: Vec<u8>, fin: bool) {
        self.client_held_input(key, held, 0);
        if fin {
            self.peer_finished(key);
        }
        self.follow_receive(key);
    }

    fn hand_over(&mut self, going: Going, to: usize) {
        let Going { client: key, idle_due_ms } = going;
        let Some(mut conn) = self.conns.remove(key) else { return };
        let answered = conn.stream.is_some();
        let answer = self.take_answer(&conn);
        debug_assert_eq!(answered, answer.is_some(), "an answer that cannot go on elsewhere");
        let mut held = conn.take_held();
        if is_planted(Bug::MovedBytesLost) {
            held.clear();
        } else if is_planted(Bug::MovedBytesTwice) {
            held.extend_from_within(..);
        }
        self.overdraft_bytes -= conn.drawn;
        if let Some((timer, _)) = conn.timer.take() {
            self.wheel.remove(timer);
        }
        let (requests, refused, sent) = match &conn.role {
            Role::Client(client) => (client.requests, client.refused, client.sent),
            Role::Backend(_) => (0, 0, false),
        };
        let hops = conn.hops() + self.neighbours.as_ref().map_or(0, |neighbours| neighbours.distance_to(to));
        let tls = conn.tls.map(|tls| tls.at_rest());
        let from = self.neighbours.as_ref().map_or(0, |neighbours| neighbours.own());
        let peer_fin = conn.peer_fin;
        let moved = Moved { held, tls, peer_fin, requests, refused, hops, from, sent, idle_due_ms, answer };
        let what = self.io.release(conn.socket);
        let handed = Handed { what, listener: 0, times: HANDED_ON_MAX, moved: Some(Box::new(moved)) };
        self.stats.counters.handed_away += 1;
        match idle_due_ms {
            Some(_) => self.stats.counters.moves_for_load += 1,
            None => self.stats.counters.moves += u64::from(!answered),
        }
        let result = self.neighbours.as_mut().map(|neighbours| neighbours.hand(to, handed));
        debug_assert!(matches!(result, Some(Ok(()))), "there was room, and nobody else fills the queue");
        self.slot_freed();
    }

    /// Serves a client that comes with a request of its own.
    pub(super) fn serve_moved(&mut self, socket: I::Socket, moved: Moved) {
        let Moved { held, tls, peer_fin, requests, refused, hops, from, sent, idle_due_ms, answer } = moved;
        let client = match (&answer, idle_due_ms) {
            (None, None) => {
                Client { hops, moved_from: Some(from as u16), sent, settled: true, ..Client::default() }
            }
            _ => Client::default(),
        };
        let client = Client { requests, refused, ..client };
        let mut conn = Conn::new(socket, Role::Client(client));
        conn.tls = tls.map(|tls| Box::new(Tls::from(tls)));
        conn.due_ms = idle_due_ms.unwrap_or_else(|| self.now_ms() + u64::from(self.idle_ms()));
        conn.receive_wanted = !peer_fin;
        let Some(answer) = answer else {
            let Some(key) = self.insert_client(conn) else { return };
            self.go_on(key, held, peer_fin);
            if idle_due_ms.is_some() && self.leaving != Leaving::No {
                self.leave_when_idle(key);
            }
            return;
        };
        // What it has sent meanwhile is looked at when it has been answered.
        conn.held = held;
        if let Some(key) = self.insert_client(conn) {
            self.resume_answer(key, *answer);
            self.held_grew(key);
            if peer_fin {
                self.peer_finished(key);
            }
        }
    }
}
