//! The shard examined between two turns, for simulations: what the kernel holds of each connection, and whether what the
//! shard keeps agrees with itself. Nothing here runs in a serving process.

use super::conn::{Conn, Handshake, Role, State};
use super::durable::{self, Durable};
use super::stream::Stream;
use super::{Leaving, Shard};
use crate::io::{Completion, Io};
use protocol::slots::Key;

/// What the kernel holds of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Holding {
    /// A receive is armed, or its end has not been heard of.
    pub receive: bool,
    /// Bytes of the send in flight; none is in flight at 0.
    pub lent_bytes: u32,
    /// A connect is under way.
    pub connect: bool,
    /// A hangup watch is armed.
    pub hangup: bool,
}

/// Returns from an audit with what is wrong.
macro_rules! demand {
    ($holds:expr, $($what:tt)+) => {
        if !$holds {
            return Err(format!($($what)+));
        }
    };
}

impl<I: Io> Shard<I> {
    /// What the kernel holds of each connection, as the shard believes.
    pub fn holdings(&self) -> impl Iterator<Item = (Key, I::Socket, Holding)> {
        self.conns.iter().map(|(key, conn)| {
            let holding = Holding {
                // Of an end that waits for its turn the kernel has told.
                receive: conn.ops.receive.is_some() && !self.is_end_waiting(key),
                lent_bytes: conn.lent_bytes(),
                connect: conn.ops.connect.is_some(),
                hangup: conn.ops.hangup.is_some(),
            };
            (key, conn.socket, holding)
        })
    }

    fn is_end_waiting(&self, key: Key) -> bool {
        let ends = |waiting: &Completion<I::Socket, I::Buffer>| matches!(waiting, Completion::ReceiveEnded { conn, .. } if *conn == key);
        self.waiting.iter().any(ends)
    }

    /// Bytes of clients and of backends that were received and wait for a later turn: they are counted when it comes.
    pub fn waiting_bytes(&self) -> (u64, u64) {
        let mut bytes = (0, 0);
        for completion in &self.waiting {
            if let Completion::Received { conn, buffer } = completion {
                *(if self.role(*conn) == Some(true) { &mut bytes.0 } else { &mut bytes.1 }) +=
                    buffer.len() as u64;
            }
        }
        bytes
    }

    /// Whether everything that could go on does, and everything that is owned has one owner. To be asked right after a turn.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn audit(&self) -> Result<(), String> {
        demand!(self.dirty.is_empty() && self.starved.is_empty(), "a turn left work undone");
        let mut timers: usize =
            [self.leaving_timer.is_some(), self.handshakes.is_timer_armed(), self.durable.timer.is_some()]
                .into_iter()
                .map(usize::from)
                .sum();
        self.audit_directory()?;
        let mut handshakes = 0;
        let mut clients = 0;
        let mut active = vec![0; self.pool.upstreams.len()];
        let mut idle = 0;
        for (key, conn) in self.conns.iter() {
            timers += usize::from(conn.timer.is_some());
            clients += usize::from(conn.is_client());
            handshakes += usize::from(
                matches!(&conn.role, Role::Client(client) if client.handshake == Handshake::Active),
            );
            if let (Role::Backend(backend), Some(_)) = (&conn.role, conn.stream) {
                active[backend.upstream as usize] += 1;
            }
            if let Role::Backend(backend) = &conn.role
                && backend.idle
                && conn.state == State::Open
            {
                idle += 1;
                let pooled = self.pool.upstreams[backend.upstream as usize].idle.contains(&key);
                demand!(pooled && conn.stream.is_none(), "an idle connection out of the pool: {conn:?}");
            }
            self.audit_conn(key, conn)?;
        }
        for (key, stream) in self.streams.iter() {
            timers += usize::from(stream.timer.is_some());
            self.audit_stream(key)?;
        }
        timers += usize::from(self.kept.waiting_timer.is_some()) + self.audit_kept()? + self.audit_stored();
        timers += usize::from(self.kept.ages.timer.is_some());
        demand!(handshakes == self.handshakes.count, "{handshakes} handshakes: {}", self.handshakes.count);
        demand!(clients == self.clients, "{clients} clients hold {} slots", self.clients);
        for (upstream, (state, active)) in self.pool.upstreams.iter().zip(active).enumerate() {
            let counted = state.active;
            demand!(counted == active, "backend {upstream} has {active} streams, counted are {counted}");
            idle -= state.idle.len();
        }
        demand!(idle == 0, "the pool and its connections disagree");
        for (listener, acceptor) in self.acceptors.iter().enumerate() {
            timers += usize::from(acceptor.is_resting());
            let may = self.clients < self.settings.connections_max;
            demand!(!may || acceptor.is_at_work(), "listener {listener} does not accept: {acceptor:?}");
        }
        demand!(timers == self.wheel.len(), "{timers} timers have an owner, {} are armed", self.wheel.len());
        Ok(())
    }

    fn audit_conn(&self, key: Key, conn: &Conn<I::Socket>) -> Result<(), String> {
        let sending = conn.ops.send.is_some();
        demand!(sending == (conn.lent_bytes() > 0), "lent without a send, or sent without: {conn:?}");
        demand!(!conn.dirty, "marked and not looked at: {conn:?}");
        if let State::Joining(_) = conn.state {
            demand!(!conn.ops.none(), "nothing holds it, and it is not freed: {conn:?}");
            demand!(
                conn.timer.is_none() && conn.stream.is_none(),
                "it has ended, and keeps things: {conn:?}"
            );
            return Ok(());
        }
        let deaf = conn.receive_wanted && !conn.peer_fin && conn.ops.connect.is_none();
        demand!(!deaf || conn.ops.receive.is_some(), "it is to be read, and is not: {conn:?}");
        let moves_to = match conn.state {
            State::Moving(to) => Some(usize::from(to)),
            _ => None,
        };
        let moving = moves_to.is_some();
        let unwatched = conn.is_client() && !moving && !conn.peer_fin && conn.ops.receive.is_none();
        demand!(!unwatched || conn.ops.hangup.is_some(), "nobody would see it leave: {conn:?}");
        let held =
            !conn.ops.none() || conn.waiting > 0 || conn.tls.as_ref().is_some_and(|tls| tls.has_unsent());
        let awaited = moves_to.zip(self.neighbours.as_ref()).map(|(to, neighbours)| neighbours.awaited(to));
        let waits = awaited.is_some_and(|awaited| awaited.clients);
        demand!(
            !moving || held || waits || self.hurried,
            "it could be moved, and nobody looks again: {conn:?}"
        );
        let due_ms = Self::conn_due_ms(conn);
        let armed = due_ms == u64::MAX || conn.timer.is_some_and(|(_, armed_ms)| armed_ms <= due_ms);
        demand!(armed, "due at {due_ms} without a timer: {conn:?}");
        let Some(stream_key) = conn.stream else {
            let kept = match &conn.role {
                Role::Client(_) => true,
                Role::Backend(backend) => backend.idle,
            };
            demand!(kept || conn.state != State::Open, "a backend's connection serves nothing: {conn:?}");
            return Ok(());
        };
        let Some(stream) = self.streams.get(stream_key) else {
            return Err(format!("it serves a stream that is over: {conn:?}"));
        };
        let (log, link) = match conn.role {
            Role::Client(_) => (Some(&stream.response), stream.client),
            Role::Backend(_) => (stream.request().map(|request| &request.log), stream.backend),
        };
        demand!(link == Some(key), "its stream knows another: {conn:?}");
        let cursor = conn.ledger.sent() + u64::from(conn.ledger.in_flight());
        if let Some(reader) = &stream.reader {
            let (busy, idle) =
                (conn.ops.send.is_some(), conn.state == State::Open && conn.ops.send.is_none());
            demand!(
                !busy || conn.tls.is_some() || reader.is_sending(),
                "it sends nothing that it was lent: {conn:?}"
            );
            return match idle {
                true => self.audit_reader(stream),
                false => Ok(()),
            };
        }
        let Some(log) = log else {
            demand!(cursor == 0, "it counts the bytes of a request that is no more: {conn:?}");
            return Ok(());
        };
        demand!(cursor <= log.end(), "more was sent than the log has: {conn:?} {log:?}");
        // A backend's send may have failed, and its receive is to tell why.
        let idle = conn.state == State::Open && conn.is_client() && conn.ops.send.is_none();
        demand!(!idle || conn.ledger.lag(log.end()) == 0, "it owes bytes, and sends none: {conn:?} {log:?}");
        Ok(())
    }

    fn audit_stream(&self, key: Key) -> Result<(), String> {
        let Some(stream) = self.streams.get(key) else { return Ok(()) };
        let who = || format!("{:?} {:?} {:?}", stream.phase, stream.answer, stream.end);
        for conn in [stream.client, stream.backend].into_iter().flatten() {
            let linked = self.conns.get(conn).is_some_and(|conn| conn.stream == Some(key));
            demand!(linked, "a stream keeps a connection that is not its own: {}", who());
        }
        demand!(stream.client.is_some() || stream.source.is_some(), "a stream without a client: {}", who());
        let returns = |durable: &Durable| matches!(durable.state, durable::State::Returning(_));
        if stream.durable.as_deref().is_some_and(returns) && !stream.produced {
            let conn = stream.client.and_then(|client| self.conns.get(client));
            let goes = conn.is_some_and(|conn| matches!(conn.state, State::Moving(_)));
            demand!(goes, "it is to go home, and stays: {}", who());
        }
        if stream.reader.is_some() {
            demand!(
                stream.backend.is_none() && stream.source.is_none(),
                "a reader is no producer: {}",
                who()
            );
            return Ok(());
        }
        demand!(stream.end.is_some() == stream.produced, "an end that is none: {}", who());
        demand!(!stream.produced || stream.backend.is_none(), "it is over, and keeps its backend: {}", who());
        let due_ms = super::deadline::stream_due_ms(stream, self.route(stream.route));
        let armed = due_ms == u64::MAX || stream.timer.is_some_and(|(_, armed_ms)| armed_ms <= due_ms);
        demand!(armed, "due at {due_ms} without a timer: {}", who());
        let (lag, high) = self.owed_to_readers(stream).unwrap_or_else(|| {
            let client = stream.client.and_then(|key| self.conns.get(key));
            let sent = client.map_or(0, |conn| conn.ledger.sent());
            (stream.response.end() - sent, self.settings.lag_high_bytes)
        });
        if stream.paused {
            let follows = lag >= self.settings.lag_low_bytes || self.is_stirred(stream);
            demand!(follows, "paused for nothing, lag {lag}: {}", who());
        } else if !stream.produced && !self.is_stirred(stream) {
            demand!(lag <= high, "not paused, lag {lag}: {}", who());
        }
        if let Some(backend) = stream.backend.and_then(|key| self.conns.get(key)) {
            demand!(backend.receive_wanted != stream.paused, "its backend is not read: {}", who());
        } else if !stream.produced
            && stream.demo.is_none()
            && stream.durable.is_none()
            && stream.request().is_none_or(|request| request.waits_for.is_none())
            && !self.is_held_stop(key)
        {
            return Err(format!("nobody works for a stream: {}", who()));
        }
        Ok(())
    }

    /// Whether its readers are served in the next turn, which comes at once.
    fn is_stirred(&self, stream: &Stream) -> bool {
        stream.source.and_then(|source| self.kept.sources.get(source)).is_some_and(|source| source.stirred)
    }

    /// What it waits with for room on the way to another shard, although there is room; to be asked after any shard's turn. Its bell
    /// must be on its way.
    pub fn overslept(&self) -> Option<String> {
        let neighbours = self.neighbours.as_ref().filter(|_| !self.left)?;
        let may_go = |conn: &Conn<I::Socket>| {
            let held = !conn.ops.none() || conn.waiting > 0;
            let held = held || conn.tls.as_ref().is_some_and(|tls| tls.has_unsent());
            matches!(conn.state, State::Moving(to) if !held && !neighbours.is_full(to.into()))
        };
        if let Some(conn) = self.conns.iter().map(|(_, conn)| conn).find(|conn| may_go(conn)) {
            return Some(format!("a client that could go: {conn:?}"));
        }
        let full_of_letters = || (0..neighbours.shards()).any(|shard| neighbours.is_full_of_letters(shard));
        if self.has_unsent_letters() && !full_of_letters() {
            return Some("what it has to tell mirrors, or their homes".to_owned());
        }
        self.directory.could_send(neighbours).then(|| "letters about durable streams".to_owned())
    }

    /// Its end of the mesh is gone, as with a shard that fails.
    pub fn lose_mesh(&mut self) {
        self.neighbours = None;
    }

    /// Whether it has begun to leave.
    pub fn is_leaving(&self) -> bool {
        self.leaving != Leaving::No
    }
}
