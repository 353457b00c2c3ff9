//! What is cheap for a peer and dear for the shard has a budget here: pieces of bodies within one turn, and memory beyond
//! the share of each stream and connection. The other budgets are limits of their own (`protocol::limits`).
//!
//! Pieces: a body in thousands of tiny chunks or events costs many times what its bytes cost otherwise. A connection whose
//! pieces were too many in a turn is not received from until what has arrived was taken apart, a bit per turn, after
//! everybody else.

use super::Shard;
use super::conn::Conn;
use crate::io::{Close, Completion, Io};
use protocol::limits::{
    PIECE_BYTES, PIECES_EXCESS_OF_WAITING_MAX, PIECES_EXCESS_PER_TURN_MAX, TLS_HANDSHAKE_STEPS_PER_TURN_MAX,
};
use protocol::log::Log;
use protocol::phase::End;
use protocol::slots::Key;

impl<I: Io> Shard<I> {
    /// Whether what this connection receives waits for what it received before.
    pub(super) fn is_waiting(&self, key: Key) -> bool {
        self.conns.get(key).is_some_and(|conn| conn.waiting > 0)
    }

    pub(super) fn received(&mut self, key: Key, mut buffer: I::Buffer) {
        let (turn, now_ms) = (self.stats.counters.turns, self.now_ms());
        let Some(conn) = self.conns.get_mut(key) else {
            debug_assert!(false, "a completion for a freed connection");
            return;
        };
        conn.heard_ms = now_ms;
        if conn.look_ms == u64::MAX {
            self.look_later(key);
        }
        let Some(conn) = self.conns.get(key) else { return };
        let this = turn as u32;
        let wait = conn.waiting > 0
            || (conn.excess.0 == this && u64::from(conn.excess.1) >= PIECES_EXCESS_PER_TURN_MAX);
        let handshaking = conn.is_handshaking();
        if wait || (handshaking && !self.handshakes.may_step(turn, TLS_HANDSHAKE_STEPS_PER_TURN_MAX)) {
            self.stats.counters.receives_deferred += 1;
            return self.make_wait(key, Completion::Received { conn: key, buffer });
        }
        let excess = self.take_apart(key, &mut buffer);
        if excess > 0
            && let Some(conn) = self.conns.get_mut(key)
        {
            let so_far = if conn.excess.0 == this { conn.excess.1 } else { 0 };
            conn.excess = (this, so_far.saturating_add(excess.try_into().unwrap_or(u32::MAX)));
        }
    }

    /// Handles received bytes; gives the pieces that were more than the bytes pay for.
    fn take_apart(&mut self, key: Key, bytes: &mut [u8]) -> u64 {
        let before = self.stats.counters.pieces;
        let tls = self.conns.get(key).is_some_and(|conn| conn.tls.is_some() || conn.is_handshaking());
        match self.role(key) {
            Some(_) if tls => self.tls_received(key, bytes),
            Some(true) => self.client_received(key, bytes),
            Some(false) => self.backend_received(key, bytes),
            None => {}
        }
        (self.stats.counters.pieces - before).saturating_sub((bytes.len() as u64).div_ceil(PIECE_BYTES))
    }

    /// Puts a completion of a receive off, and receives no more until it was handled.
    pub(super) fn make_wait(&mut self, key: Key, completion: Completion<I::Socket, I::Buffer>) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.waiting += 1;
            self.waiting.push_back(completion);
            self.follow_receive(key);
        }
    }

    /// Handles as many of the completions that wait as one turn has room for.
    pub(super) fn complete_waiting(&mut self) {
        let mut excess = 0;
        while excess < PIECES_EXCESS_OF_WAITING_MAX
            && let Some(completion) = self.waiting.pop_front()
        {
            match completion {
                Completion::Received { conn, mut buffer } => {
                    self.waited(conn);
                    if self.conns.get(conn).is_some_and(Conn::is_handshaking) {
                        excess += PIECES_EXCESS_OF_WAITING_MAX / u64::from(TLS_HANDSHAKE_STEPS_PER_TURN_MAX);
                    }
                    excess += self.take_apart(conn, &mut buffer);
                    self.follow_receive(conn);
                }
                Completion::ReceiveEnded { conn, why } => {
                    self.waited(conn);
                    self.receive_ended(conn, why);
                }
                _ => debug_assert!(false, "only receives wait"),
            }
        }
    }

    fn waited(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key) {
            conn.waiting -= 1;
        }
    }

    /// Accounts for what a stream holds beyond its share. Where the shard has no more to give, the stream that wants it
    /// ends: with an error in its dialect if that frees the memory, else its client is cut off.
    pub(super) fn follow_overdraft(&mut self, key: Key) {
        let grown = self.draw(key);
        if !grown || self.overdraft_bytes <= self.settings.overdraft_bytes_max {
            return;
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        // What is kept for one more attempt is given up first.
        let sent = stream.backend.and_then(|key| self.conns.get(key)).map_or(0, |conn| conn.ledger.sent());
        stream.release_request(sent);
        self.draw(key);
        if self.overdraft_bytes <= self.settings.overdraft_bytes_max {
            return;
        }
        self.stats.counters.overdrafts_refused += 1;
        self.end_stream(key, End::Overload);
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.events = None;
        stream.request_mut().log = Log::new();
        self.draw(key);
        let Some(stream) = self.streams.get(key) else { return };
        if stream.drawn > 0
            && let Some(client) = stream.client
        {
            self.override_end(key, End::Overload);
            self.settle(key);
            self.join(client, Close::Reset);
        }
    }

    /// True when the stream holds more than before.
    fn draw(&mut self, key: Key) -> bool {
        let share_bytes = self.settings.share_bytes();
        let Some(stream) = self.streams.get_mut(key) else { return false };
        // History is accounted for where it is kept.
        let held = stream.follow_memory_bytes().saturating_sub(stream.response.history_bytes());
        let drawn = held.saturating_sub(share_bytes);
        let before = std::mem::replace(&mut stream.drawn, drawn);
        self.overdraft_bytes = self.overdraft_bytes - before + drawn;
        drawn > before
    }

    /// The same for what a client has sent ahead. Where there is no room, it is dropped, and the connection closes after
    /// the answer under way: a client must expect that of requests it pipelines (RFC 9112 section 9.3.2).
    pub(super) fn follow_held(&mut self, key: Key) {
        let share_bytes = 2 * self.settings.head.head_bytes as u64;
        let Some(conn) = self.conns.get_mut(key) else { return };
        let drawn = (conn.held.capacity() as u64).saturating_sub(share_bytes);
        let before = std::mem::replace(&mut conn.drawn, drawn);
        self.overdraft_bytes = self.overdraft_bytes - before + drawn;
        if drawn <= before || self.overdraft_bytes <= self.settings.overdraft_bytes_max {
            return;
        }
        let Some(stream) = conn.stream else { return };
        self.overdraft_bytes -= std::mem::take(&mut conn.drawn);
        conn.drop_held();
        self.stats.counters.overdrafts_refused += 1;
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.close = true;
        }
        self.want_receive(key, false);
    }
}
