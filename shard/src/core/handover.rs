//! Live readers of a durable stream on other shards than its home. Only the home has the stream, so each reader catches up there; of
//! those who have, and share a tail, some are handed over in the middle of their answers to shards with fewer clients, which read
//! mirrors of that tail.
//!
//! ```text
//!   home:    catches up ─► shares a tail ──(a neighbour has fewer clients, and a mirror)──► Moving ─► handed over
//!   mirror:  shares the mirror ──(its window has left it behind, or it is gone; home has many fewer)──► Moving ─► handed back, to catch up again
//! ```
//! What goes along is what its answer needs to go on: where it is, which is between two events, when it is to end, what is to be
//! said of it in the log. Its head was sent, and nothing of it is in flight.

use super::conn::{Conn, Maybe, State as ConnState};
use super::durable::{Durable, State};
use super::reader::Reader;
use super::stream::{Answer, Stream};
use super::{Leaving, Shard};
use crate::io::{Close, Io};
use crate::mesh::{Answering, SharedPlace, Subject};
use protocol::http::Version;
use protocol::limits::{HANDOVERS_AT_ONCE_MAX, HANDOVERS_LOOKED_AT_PER_TURN};
use protocol::phase::End;
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;

/// What becomes of one on its way, of whom the kernel holds nothing any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Handover {
    Goes,
    /// There is no room at present.
    Waits,
    /// It goes on here.
    Stays,
}

impl<I: Io> Shard<I> {
    /// If a source is a tail that many share, some of its readers go where there are fewer clients.
    pub(super) fn spread_readers(&mut self, source_key: Key) {
        let (enough, most) = (self.settings.mirror_readers, self.settings.connections_max);
        let Some(neighbours) = &self.neighbours else { return };
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let Some(tail) = source.tail.as_ref().filter(|_| enough > 0 && !source.is_mirror()) else { return };
        let all = source.readers.len();
        if source.producer.is_none()
            || all + source.readers_elsewhere() < enough
            || self.leaving != Leaving::No
            || self.moves.handovers >= HANDOVERS_AT_ONCE_MAX
        {
            return;
        }
        let load = self.load();
        // Each that goes makes two of difference.
        let Some(to) = neighbours.emptier(load.saturating_sub(2 * self.moves.handovers), most) else {
            return;
        };
        let first = tail.looked_at;
        match source.mirror_at(to) {
            None if tail.mirror_from_ms <= self.now_ms() => return self.open_mirror(source_key, to),
            None => return,
            Some(_) => {}
        }
        let looked = HANDOVERS_LOOKED_AT_PER_TURN.min(all);
        let mut go = Vec::new();
        for nth in (0..looked).map(|nth| (first + nth) % all) {
            if neighbours.emptier(load.saturating_sub(2 * (self.moves.handovers + go.len())), most)
                != Some(to)
                || self.moves.handovers + go.len() >= HANDOVERS_AT_ONCE_MAX
            {
                break;
            }
            let client = source.readers.get(nth).and_then(|&reader| self.may_leave(reader, to));
            go.extend(client);
        }
        if let Some(tail) = self.kept.sources.get_mut(source_key).and_then(|source| source.tail.as_mut()) {
            tail.looked_at = (first + looked) % all.max(1);
        }
        self.moves.handovers += go.len();
        for client in go {
            self.begin_move(client, to, false);
        }
    }

    /// If a source is a mirror of a tail, some of its readers go home while there are many fewer clients.
    pub(super) fn recall_readers(&mut self, source_key: Key) {
        let Some(source) = self.kept.sources.get(source_key) else { return };
        let (Some(home), Some(tail)) = (source.mirror_of(), &source.tail) else { return };
        let (all, first) = (source.readers.len(), tail.looked_at);
        if source.end.is_some() || all == 0 || !self.is_emptier(home) {
            return;
        }
        let looked = HANDOVERS_LOOKED_AT_PER_TURN.min(all);
        let readers: Vec<Key> = (0..looked).map(|nth| source.readers[(first + nth) % all]).collect();
        for key in readers {
            if self.moves.handovers >= HANDOVERS_AT_ONCE_MAX || !self.is_emptier(home) {
                break;
            }
            if self.may_part(key).is_some() && self.is_level_reader(key) {
                self.part_from_tail(key);
            }
        }
        if let Some(tail) = self.kept.sources.get_mut(source_key).and_then(|source| source.tail.as_mut()) {
            tail.looked_at = (first + looked) % all;
        }
    }

    /// The connection of a reader that could be handed over to that shard now, if the kernel let go of it.
    fn may_leave(&self, key: Key, to: usize) -> Option<Key> {
        self.may_part(key).filter(|_| self.is_handed_over(key, to))
    }

    /// The connection of a reader of which the kernel holds no more than a receive.
    fn may_part(&self, key: Key) -> Option<Key> {
        let client = self.streams.get(key)?.client?;
        let conn = self.conns.get(client)?;
        let idle = conn.state == ConnState::Open
            && conn.ops.send.is_none()
            && !conn.peer_fin
            && conn.tls.as_ref().is_none_or(|tls| !tls.has_unsent());
        idle.then_some(client)
    }

    /// Whether a reader of a tail is between two events, with nothing of its own to be sent.
    fn is_level_reader(&self, key: Key) -> bool {
        let Some(stream) = self.streams.get(key) else { return false };
        let Some(reader) = &stream.reader else { return false };
        reader.lent.is_none()
            && !reader.own_lent
            && reader.own_at == stream.response.end()
            && reader.behind != Maybe::NONE
            && !stream.produced
            && stream.durable.as_ref().is_some_and(|durable| matches!(durable.state, State::Sharing))
    }

    /// The same, and whether that shard's mirror has what it has had.
    fn is_handed_over(&self, key: Key, to: usize) -> bool {
        let reader = self.streams.get(key).and_then(|stream| stream.reader.as_ref());
        let source = reader.and_then(|reader| self.kept.sources.get(reader.source));
        let (Some(reader), Some(source)) = (reader, source) else { return false };
        self.is_level_reader(key)
            && source.producer.is_some()
            && source.mirror_at(to).is_some_and(|link| link.has(reader.at))
    }

    /// What becomes of a client that is to go to another shard in the middle of its answer.
    pub(super) fn follow_handover(&self, client: Key, to: usize) -> Handover {
        let stream_key = self.conns.get(client).and_then(|conn| conn.stream);
        let stream = stream_key.and_then(|key| self.streams.get(key));
        let (Some(key), Some(stream), Some(neighbours)) = (stream_key, stream, &self.neighbours) else {
            return Handover::Stays;
        };
        if stream.produced || self.leaving != Leaving::No || !neighbours.is_open(to) {
            return Handover::Stays;
        }
        let returns =
            matches!(stream.durable.as_ref().map(|durable| &durable.state), Some(State::Returning(_)));
        match returns {
            // It has nothing to wait for here.
            true if self.awaits_room(to) => Handover::Waits,
            false if neighbours.is_full(to) || !self.is_handed_over(key, to) => Handover::Stays,
            _ => Handover::Goes,
        }
    }

    /// A client goes on here with its answer.
    pub(super) fn stay_with_answer(&mut self, client: Key) {
        self.stay(client);
        let stream = self.conns.get(client).and_then(|conn| conn.stream);
        if let Some(key) = stream
            && let Some(stream) = self.streams.get(key)
            && !stream.produced
            && matches!(stream.durable.as_ref().map(|durable| &durable.state), Some(State::Returning(_)))
        {
            // It comes again and finds where it was.
            self.durable_end(key, End::Done);
        }
        self.follow_conn_timer(client);
        self.mark_dirty(client);
    }

    /// Takes an answer out of a connection that goes to another shard.
    pub(super) fn take_answer(&mut self, conn: &Conn<I::Socket>) -> Option<Box<Answering>> {
        let mut stream = self.streams.remove(conn.stream?)?;
        if let Some((timer, _)) = stream.timer.take() {
            self.wheel.remove(timer);
        }
        self.overdraft_bytes -= stream.drawn;
        let mut durable = stream.durable.take()?;
        let sent_bytes = durable.shared_bytes + conn.ledger.sent();
        let (due_ms, own) = (durable.due_ms, self.neighbours.as_ref()?.own());
        let place = match (&mut durable.state, stream.reader.take()) {
            (State::Returning(place), _) => **place,
            (_, Some(reader)) => {
                let source = self.kept.sources.get(reader.source)?;
                let (number, log_end) = (source.number, self.source_log(source)?.end());
                let shared = source.tail.as_ref()?.shared;
                let at = if is_planted(Bug::HandedOverAhead) { log_end } else { reader.at };
                let behind = reader.behind.get()?;
                self.reader_left(&reader);
                self.kept.stir(reader.source);
                self.stats.counters.durable_handed_over += 1;
                SharedPlace { home: own, tail: number, shared, at, behind }
            }
            (_, None) => return None,
        };
        Some(Box::new(Answering {
            place,
            route: stream.route,
            dialect: stream.dialect,
            phase: stream.phase,
            close: stream.close,
            due_ms,
            sent_bytes,
            events_sent: stream.events_sent,
            started_us: stream.started_us,
            asked_us: stream.asked_us,
            first_token_us: stream.first_token_us.get(),
            description: stream.description.take(),
        }))
    }

    /// Goes on with the answer of a client that came in the middle of it.
    pub(super) fn resume_answer(&mut self, client: Key, answer: Answering) {
        let Answering { place, route, dialect, .. } = answer;
        let mut stream = Stream::new(client, route, dialect, Version::Http11, answer.started_us);
        (stream.phase, stream.close, stream.status) = (answer.phase, answer.close, 200);
        stream.answer = Answer::Events { early: false };
        (stream.asked_us, stream.first_token_us) = (answer.asked_us, answer.first_token_us.into());
        (stream.events_sent, stream.description) = (answer.events_sent, answer.description);
        stream.spoke_ms = self.now_ms();
        stream.durable = Some(Box::new(Durable::shares(answer.due_ms, answer.sent_bytes)));
        let Ok(key) = self.streams.insert(stream) else {
            debug_assert!(false, "no stream slot for a client that has a slot");
            return self.join(client, Close::Reset);
        };
        if let Some(conn) = self.conns.get_mut(client) {
            conn.stream = Some(key);
            conn.due_ms = u64::MAX;
        }
        let own = self.neighbours.as_ref().map(|neighbours| neighbours.own());
        if own == Some(place.home) {
            self.catch_up(key, place);
        } else if let Some(source) = self.mirror_here(Subject::Tail(place.tail)) {
            self.share_mirror(key, source, place);
        } else {
            self.hand_back(key, place);
        }
        if self.leaving != Leaving::No {
            self.durable_due(key);
        }
        self.follow_stream_timer(key);
        self.mark_dirty(client);
    }

    /// One whom a window has left behind is at the home of its stream, and reads on by itself.
    fn catch_up(&mut self, key: Key, place: SharedPlace) {
        let behind = if is_planted(Bug::HandedBackAnew) { 0 } else { place.behind };
        let reading = self.durable.store.part(place.shared, behind, key);
        if let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) {
            durable.end_sharing(reading);
        }
        self.durable_fill(key);
    }

    fn share_mirror(&mut self, key: Key, source_key: Key, place: SharedPlace) {
        let now_ms = self.now_ms();
        let Some(source) = self.kept.sources.get_mut(source_key) else { return };
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.reader = Some(Box::new(Reader {
            source: source_key,
            place: source.readers.len() as u32,
            at: place.at,
            lent: None,
            own_at: 0,
            own_lent: false,
            waits: false,
            began_ms: now_ms,
            behind: Maybe::some(place.behind),
            finishing: false,
        }));
        source.readers.push(key);
        self.kept.stir(source_key);
    }

    /// What a reader shares is not here, or not any more: it goes where its stream is.
    pub(super) fn hand_back(&mut self, key: Key, place: SharedPlace) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let (Some(durable), Some(client)) = (&mut stream.durable, stream.client) else { return };
        durable.state = State::Returning(Box::new(place));
        self.stats.counters.durable_handed_back += 1;
        self.follow_stream_timer(key);
        if is_planted(Bug::HandBackForgotten) {
            return;
        }
        self.moves.handovers += 1;
        self.begin_move(client, place.home, false);
    }
}
