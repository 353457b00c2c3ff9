//! What is told of streams that outlive their connections: to whoever asks for one's status, and to the control thread of all, some
//! in a turn.

use super::Shard;
use super::kept::{Source, numbered};
use super::stream::Stream;
use crate::io::Io;
use crate::listing::{Inquiry, KeptStream, Page, Place};
use protocol::fault::write_json_string;
use protocol::limits::{LISTED_PER_TURN_MAX, LISTED_SLOTS_PER_TURN_MAX};
use protocol::log::Place as LogPlace;
use protocol::phase::End;
use protocol::resume::StreamId;
use protocol::slots::Key;
use std::fmt::Write;

/// Readers whose lag is told; enough to see who is stuck.
const SLOWEST_TOLD: usize = 10;

impl<I: Io> Shard<I> {
    /// Answers the control thread.
    pub(super) fn list_streams(&self, inquiry: &Inquiry) -> Page {
        let now_ms = self.now_ms();
        match inquiry {
            Inquiry::From(place) if place.durable => self.list_durable(place.slot, Page::default()),
            Inquiry::From(place) => self.list_kept(place.slot),
            Inquiry::Id(id) => {
                let kept = self.source_of(id).and_then(|key| self.kept_stream(key, true));
                Page { kept: kept.into_iter().collect(), ..Page::default() }
            }
            Inquiry::Path(path) => {
                let line = self.durable.store.line_of(path, now_ms);
                Page { durable: line.into_iter().collect(), ..Page::default() }
            }
        }
    }

    fn list_kept(&self, from: u32) -> Page {
        let mut page = Page::default();
        let end = self.kept.sources.slots();
        let mut slot = from;
        while slot < end && slot - from < LISTED_SLOTS_PER_TURN_MAX && page.kept.len() < LISTED_PER_TURN_MAX {
            let key = self.kept.sources.at(slot);
            let key = key.filter(|(_, source)| source.tail.is_none() && !source.is_mirror());
            page.kept.extend(key.and_then(|(key, _)| self.kept_stream(key, false)));
            slot += 1;
        }
        if slot < end {
            page.next = Some(Place { durable: false, slot });
            return page;
        }
        page.next = Some(Place { durable: true, slot: 0 });
        page
    }

    fn list_durable(&self, from: u32, mut page: Page) -> Page {
        let (slots, most, now_ms) = (LISTED_SLOTS_PER_TURN_MAX, LISTED_PER_TURN_MAX, self.now_ms());
        let (lines, next) = self.durable.store.list(from, slots, most, now_ms);
        (page.durable, page.next) = (lines, next.map(|slot| Place { durable: true, slot }));
        page
    }

    fn source_of(&self, id: &StreamId) -> Option<Key> {
        let known = self.kept.by_number.get(&numbered(id.shard, id.number)).copied();
        known.filter(|_| self.kept.is_ours(id))
    }

    /// How a stream stands; `pending`: and how far its readers are behind, each of whom is looked at.
    pub(super) fn kept_stream(&self, key: Key, pending: bool) -> Option<KeptStream> {
        let now_ms = self.now_ms();
        let source = self.kept.sources.get(key)?;
        let log = self.source_log(source)?;
        let producer = source.producer.and_then(|producer| self.streams.get(producer));
        let client = producer.and_then(|stream| self.conns.get(stream.client?));
        let earliest_event_id = match log.behind(0, source.chunked) {
            LogPlace::Gone(first) => first + 1,
            _ => 1,
        };
        let quiet_since_ms = producer.map_or(source.ended_ms, |stream| stream.last_token_us / 1000);
        let (elsewhere, pending_elsewhere) = source.read_elsewhere(log);
        let mut pending_bytes = Vec::new();
        if pending {
            pending_bytes = self.pending_of(source);
            // Of each mirror the one that is behind most.
            pending_bytes.extend(pending_elsewhere);
            pending_bytes.extend(client.map(|conn| conn.ledger.lag(log.end())));
            pending_bytes.sort_unstable_by(|a, b| b.cmp(a));
            pending_bytes.truncate(SLOWEST_TOLD);
        }
        Some(KeptStream {
            id: self.kept.id(source.number).to_string(),
            route: source.route,
            phase: match producer {
                Some(_) if source.detached => "detached",
                Some(stream) => stream.phase.name(),
                None => "over",
            },
            end: source.end,
            dialect: source.dialect.name(),
            model: producer.and_then(Stream::model).or(source.model.as_deref()).map(str::to_owned),
            on_leave: self.resume_of_source(source)?.on_leave,
            background: source.background,
            earliest_event_id,
            last_event_id: log.last_event_id(),
            bytes: log.end(),
            held_bytes: log.end() - log.start(),
            age_ms: now_ms.saturating_sub(source.began_ms),
            quiet_ms: now_ms.saturating_sub(quiet_since_ms),
            readers: source.readers.len() + elsewhere + usize::from(client.is_some()),
            pending_bytes,
        })
    }

    fn pending_of(&self, source: &Source) -> Vec<u64> {
        let pending = |reader: &Key| {
            let stream = self.streams.get(*reader)?;
            Some(self.owed_to(stream.reader.as_ref()?, stream))
        };
        source.readers.iter().filter_map(pending).collect()
    }

    /// Answers a client's request for a stream's status.
    pub(super) fn answer_status(&mut self, key: Key, source: Key) {
        let Some(stream) = self.kept_stream(source, true) else { return };
        let mut body = String::new();
        write_status(&stream, &mut body);
        self.answer_json(key, 200, body.as_bytes());
    }
}

/// Into a string nothing fails.
fn write_status(stream: &KeptStream, body: &mut String) {
    let KeptStream { id, phase, dialect, earliest_event_id, last_event_id, bytes, held_bytes, .. } = stream;
    let KeptStream { age_ms, quiet_ms, readers, .. } = stream;
    write!(body, "{{\"id\":\"{id}\",\"phase\":\"{phase}\",\"end\":").ok();
    match stream.end.map(End::name) {
        Some(end) => write!(body, "\"{end}\"").ok(),
        None => write!(body, "null").ok(),
    };
    write!(
        body,
        ",\"dialect\":\"{dialect}\",\"on_leave\":\"{}\",\"earliest_event_id\":{earliest_event_id},\
         \"last_event_id\":{last_event_id},\"bytes\":{bytes},\"held_bytes\":{held_bytes},\"age_ms\":{age_ms},\
         \"quiet_ms\":{quiet_ms},\"readers\":{readers},\"pending_bytes\":[",
        stream.on_leave,
    )
    .ok();
    for (nth, pending) in stream.pending_bytes.iter().enumerate() {
        write!(body, "{}{pending}", if nth > 0 { "," } else { "" }).ok();
    }
    body.push_str("],\"model\":");
    match stream.model.as_deref() {
        Some(model) => {
            let mut text = Vec::new();
            write_json_string(&mut text, model);
            body.push_str(std::str::from_utf8(&text).unwrap_or("null"));
        }
        None => body.push_str("null"),
    }
    body.push_str("}\n");
}
