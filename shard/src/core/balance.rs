//! Loads that have become uneven because clients left. Clients are shared when they come (`accept`); when many of one shard leave and
//! no others come, some of another go there: those that are between two requests, and live readers of durable streams (`handover`).
//! Who is being answered otherwise stays until that is done.
//!
//! ```text
//!   emptier: a sixteenth of its clients has left ─► somebody has many more? ─► its bell
//!   fuller:  bell ─► uneven ─► looks at its clients once, and at each whose answer ends ─► Moving ─► until it is even
//! ```
//! A little more or less is nobody's business: who comes and goes would be moved for nothing. Nor is who was moved here for what it asks
//! for: it would come again.

use super::conn::{Conn, Handshake, State};
use super::{Leaving, Shard};
use crate::io::Io;
use protocol::limits::{BALANCE_LOOKED_AT_PER_TURN, BALANCE_MOVES_AT_ONCE_MAX, BALANCE_SLACK};
use protocol::slots::Key;

/// What a shard knows of the others' loads beside its own.
#[derive(Default)]
pub(super) struct Balance {
    /// The most clients it had since it last looked whether others have many more.
    most: usize,
    /// Another has so many fewer that clients are to go there.
    uneven: bool,
    /// The next of its connections that is looked at for whether it can go; `None`: each has been.
    next: Option<u32>,
    /// How many clients the emptiest had when they were.
    least: usize,
}

impl<I: Io> Shard<I> {
    /// A client has left. If many have, a shard with many more clients is rung.
    pub(super) fn look_for_fuller(&mut self) {
        let Some(neighbours) = &mut self.neighbours else { return };
        let balance = &mut self.balance;
        balance.most = balance.most.max(self.clients + 1);
        if self.clients + self.clients / 16 + BALANCE_SLACK >= balance.most || self.leaving != Leaving::No {
            return;
        }
        balance.most = self.clients;
        neighbours.remind_fuller(self.clients);
    }

    /// The bell has rung: perhaps because another shard has fewer clients now.
    pub(super) fn look_for_emptier(&mut self) {
        let Some(to) = self.has_emptier() else { return self.may_be_even() };
        let least = self.neighbours.as_ref().map_or(0, |neighbours| neighbours.load_of(to));
        // Who could not go then cannot now, but for those that are looked at when they have been answered.
        if !self.balance.uneven || least + BALANCE_SLACK < self.balance.least {
            (self.balance.uneven, self.balance.next, self.balance.least) = (true, Some(0), least);
            self.stir_tails();
        }
    }

    /// The shard with the fewest clients, if it has many fewer, and this one more than its share: others may share theirs with the same
    /// one meanwhile, and together they would give it too many.
    fn has_emptier(&self) -> Option<usize> {
        let neighbours = self.neighbours.as_ref().filter(|_| self.leaving == Leaving::No)?;
        if self.load().saturating_sub(self.moves.under_way()) <= neighbours.mean_load(self.load()) {
            return None;
        }
        neighbours.emptier(self.load_to_share(), self.settings.connections_max)
    }

    /// Whether that shard has many fewer clients.
    pub(super) fn is_emptier(&self, shard: usize) -> bool {
        let neighbours = self.neighbours.as_ref().filter(|_| self.leaving == Leaving::No);
        neighbours.is_some_and(|neighbours| neighbours.is_emptier(shard, self.load_to_share()))
    }

    /// Its load without what it may have more than others, and without those that are to go already: each makes two of difference.
    fn load_to_share(&self) -> usize {
        self.load().saturating_sub(2 * self.moves.under_way() + BALANCE_SLACK)
    }

    /// In every turn, behind what goes already: more of the clients that are between two requests go where there are fewer.
    pub(super) fn follow_balance(&mut self) {
        if !self.balance.uneven {
            return;
        }
        for _ in 0..BALANCE_LOOKED_AT_PER_TURN {
            if self.moves.under_way() >= BALANCE_MOVES_AT_ONCE_MAX {
                // Their going wakes the shard.
                return;
            }
            let Some(slot) = self.balance.next else { return };
            let Some(to) = self.has_emptier() else { return self.may_be_even() };
            self.balance.next = (slot + 1 < self.conns.slots()).then_some(slot + 1);
            if let Some((key, _)) = self.conns.at(slot) {
                self.leave_if_idle(key, to);
            }
        }
        // The others in the next turn, which does not sleep.
        self.hurried = true;
    }

    /// A client has been answered.
    pub(super) fn leave_if_uneven(&mut self, key: Key) {
        if !self.balance.uneven || self.moves.under_way() >= BALANCE_MOVES_AT_ONCE_MAX {
            return;
        }
        match self.has_emptier() {
            Some(to) => self.leave_if_idle(key, to),
            None => self.may_be_even(),
        }
    }

    /// No shard has many fewer, unless those under way, which are counted as if they all went to one, go to several.
    fn may_be_even(&mut self) {
        self.balance.uneven &= self.moves.under_way() > 0;
    }

    fn leave_if_idle(&mut self, key: Key, to: usize) {
        if let Some(conn) = self.conns.get(key).filter(|conn| is_between_requests(conn)) {
            let idle_due_ms = conn.due_ms;
            self.begin_move_for_load(key, to, idle_due_ms);
        }
    }
}

/// Whether a client may go: there is nothing of it that is not at rest.
fn is_between_requests<S>(conn: &Conn<S>) -> bool {
    conn.state == State::Open
        && conn.as_client().is_some_and(|client| client.handshake == Handshake::None && !client.settled)
        && conn.stream.is_none()
        && conn.held.is_empty()
        && !conn.peer_fin
        && conn.waiting == 0
        && conn.tls.as_ref().is_none_or(|tls| !tls.has_unsent())
}
