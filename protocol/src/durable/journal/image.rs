//! What the records of one stream say of it, while they are read.

use super::super::request::ProducerTag;
use super::super::{Form, Offset};
use super::record::{Appended, CLOSED, Deed, Facts, Messages, RelayFacts, RelayTold};
use std::collections::BTreeMap;

/// Messages are put together to pieces of about so many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Positions and times of creation have 16 digits in offsets.
const POSITION_MAX: u64 = 9_999_999_999_999_999;

/// A stream as its records have it so far.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) created: u64,
    pub(crate) facts: Facts,
    pub(crate) tail: u64,
    pub(crate) closed: bool,
    pub(crate) deleted: bool,
    /// Its messages, by position; holes where records are missing.
    pub(crate) pieces: BTreeMap<u64, Messages>,
    /// Those of a snapshot that is not yet known to be whole, where it began, and up to where it goes.
    fresh: Option<(BTreeMap<u64, Messages>, u64, u64)>,
    producers: BTreeMap<Box<str>, (u64, u64)>,
    /// How old its messages are: positions, and when it had come so far.
    pub(crate) marks: Vec<(u64, u64)>,
    /// The first segment that it needs.
    pub(crate) segment: u64,
    /// The last record of it.
    pub(crate) last_number: u64,
    /// Something of it was lost: it is to be written anew as it now is.
    pub(crate) damaged: bool,
    /// Its path belongs to a later stream, of another shard's journal.
    pub(crate) nameless: bool,
    /// What more is known of one that was relayed from a model.
    pub(crate) relay: Option<Box<Relay>>,
}

/// Why a stream ended, and when, ms since 1970.
type Ended = (Box<str>, u64);

/// What is known of a relayed stream besides its bytes.
#[derive(Clone, Default, Debug)]
pub(crate) struct Relay {
    pub(crate) facts: RelayFacts,
    pub(crate) end: Option<Ended>,
    pub(crate) response: Option<(Box<str>, Box<str>)>,
    /// The ids of the events before the pieces, by the pieces' positions, and that of the last one.
    pub(crate) ids: BTreeMap<u64, u64>,
    pub(crate) last_id: u64,
    /// What a snapshot tells that is not known to be whole.
    fresh: RelayTold,
    /// It went on without the disk, and not all that it was then is there.
    holed: bool,
}

impl Image {
    pub(crate) fn new(deed: Deed, number: u64, facts: Facts, messages: Messages, segment: u64) -> Self {
        let mut image = Image {
            created: deed.stream,
            producers: BTreeMap::new(),
            tail: deed.end,
            closed: deed.flags & CLOSED != 0,
            deleted: false,
            pieces: BTreeMap::new(),
            fresh: None,
            marks: Vec::new(),
            segment,
            last_number: number,
            damaged: false,
            nameless: false,
            relay: None,
            facts: Facts::default(),
        };
        image.know(facts);
        image.hold(messages);
        image
    }

    /// One that was relayed from a model. `path` is what it is called in findings.
    pub(crate) fn relayed(deed: Deed, number: u64, facts: RelayFacts, path: String, segment: u64) -> Self {
        let (path, end) = (path.into(), facts.begin);
        let known = Facts { path, earliest: end, ..Facts::default() };
        let mut image = Image::new(Deed { end, ..deed }, number, known, Messages::default(), segment);
        image.relay = Some(Box::new(Relay { facts, ..Relay::default() }));
        image
    }

    /// A snapshot of a relayed stream begins. What it tells counts when it is whole: of one that had gone on without the disk, the
    /// rest is not there before.
    pub(crate) fn begin_relay_snapshot(&mut self, deed: Deed, told: RelayTold, segment: u64) {
        if let Some(relay) = &mut self.relay {
            relay.fresh = told;
            self.fresh = Some((BTreeMap::new(), segment, deed.end));
        }
    }

    /// A piece of it.
    pub(crate) fn refresh_relay(&mut self, told: &RelayTold, messages: Messages) {
        if let (Some(relay), false) = (&mut self.relay, messages.bytes.is_empty()) {
            relay.ids.insert(messages.at, told.ids.0);
            self.refresh(messages);
        }
    }

    /// What was appended to a relayed stream.
    pub(crate) fn append_relayed(&mut self, deed: Deed, told: RelayTold, messages: Messages) {
        if self.fresh.as_ref().is_some_and(|(_, _, end)| messages.at < *end) {
            // Its process did not live to write the snapshot; the next one went on from before it.
            self.fresh = None;
        }
        let Some(relay) = &mut self.relay else { return };
        relay.end = told.end.or(relay.end.take());
        relay.response = told.response.or(relay.response.take());
        if !messages.bytes.is_empty() {
            relay.ids.insert(messages.at, told.ids.0);
        }
        relay.last_id = relay.last_id.max(told.ids.1);
        self.tail = self.tail.max(deed.end);
        self.hold(messages);
        self.trim(told.earliest);
    }

    fn know(&mut self, mut facts: Facts) {
        let producers = std::mem::take(&mut facts.producers);
        self.producers = producers.into_iter().map(|tag| (tag.id, (tag.epoch, tag.sequence))).collect();
        self.facts = facts;
    }

    pub(crate) fn append(&mut self, deed: Deed, appended: Appended) {
        if let Some(tag) = &appended.producer {
            self.producers.insert(tag.id.clone(), (tag.epoch, tag.sequence));
        }
        if deed.flags & CLOSED != 0 && !self.closed {
            self.closed = true;
            self.facts.closed_by = appended.producer;
        }
        if appended.sequence.is_some() {
            self.facts.last_sequence = appended.sequence;
        }
        self.tail = self.tail.max(deed.end);
        self.hold(appended.messages);
        self.trim(appended.earliest);
    }

    /// A snapshot begins.
    pub(crate) fn begin_snapshot(&mut self, deed: Deed, facts: Facts, segment: u64) {
        self.closed |= deed.flags & CLOSED != 0;
        self.tail = self.tail.max(deed.end);
        let earliest = facts.earliest.max(self.facts.earliest);
        self.know(facts);
        self.facts.earliest = earliest;
        self.fresh = Some((BTreeMap::new(), segment, deed.end));
    }

    /// Messages of a snapshot.
    pub(crate) fn refresh(&mut self, messages: Messages) {
        if let Some((fresh, ..)) = &mut self.fresh {
            fresh.insert(messages.at, messages);
        }
    }

    /// All of a snapshot is there: what was read before it is not needed.
    pub(crate) fn end_snapshot(&mut self) {
        let Some((fresh, segment, end)) = self.fresh.take() else { return };
        if let Some(relay) = &mut self.relay {
            let told = std::mem::take(&mut relay.fresh);
            relay.end = told.end.or(relay.end.take());
            relay.response = told.response.or(relay.response.take());
            relay.last_id = relay.last_id.max(told.ids.1);
            self.tail = self.tail.max(end);
            self.facts.earliest = self.facts.earliest.max(told.earliest);
        }
        let later = self.pieces.split_off(&end);
        self.pieces = fresh;
        self.pieces.extend(later);
        self.segment = segment;
        self.trim(self.facts.earliest);
    }

    /// Takes a snapshot that was not finished for what it is, where there is nothing better.
    pub(crate) fn settle_snapshot(&mut self) {
        if let Some(relay) = &mut self.relay {
            // It is what it was before, or what was recorded since, whichever is later.
            relay.holed = self.fresh.take().is_some();
            return;
        }
        let begins = self.pieces.first_key_value().map_or(self.tail, |(at, _)| *at);
        if begins > self.facts.earliest {
            self.end_snapshot();
        }
        self.fresh = None;
    }

    /// Whether what is not there of it is known not to have been written.
    pub(crate) fn is_holed(&self) -> bool {
        self.relay.as_ref().is_some_and(|relay| relay.holed)
    }

    pub(crate) fn trim(&mut self, earliest: u64) {
        self.facts.earliest = self.facts.earliest.max(earliest).min(self.tail);
        while let Some(first) = self.pieces.first_entry() {
            if first.get().end() > self.facts.earliest {
                break;
            }
            first.remove();
        }
    }

    fn hold(&mut self, messages: Messages) {
        if messages.lengths.is_empty() {
            return;
        }
        // What a snapshot will replace stays apart from what comes after it.
        let barrier = self.fresh.as_ref().map(|(_, _, end)| *end);
        if let Some(mut last) = self.pieces.last_entry()
            && last.get().end() == messages.at
            && last.get().bytes.len() + messages.bytes.len() <= PIECE_BYTES
            && barrier != Some(messages.at)
        {
            last.get_mut().lengths.extend_from_slice(&messages.lengths);
            last.get_mut().bytes.extend_from_slice(&messages.bytes);
            return;
        }
        self.pieces.insert(messages.at, messages);
    }

    /// Drops what lies before a hole; true where there was one.
    pub(crate) fn mend(&mut self) -> bool {
        let mut begins = self.tail;
        for (at, piece) in self.pieces.iter().rev() {
            if piece.end() != begins {
                break;
            }
            begins = *at;
        }
        // A piece may reach over what was trimmed.
        if begins <= self.facts.earliest {
            return false;
        }
        self.pieces = self.pieces.split_off(&begins);
        self.facts.earliest = begins;
        self.damaged = true;
        true
    }

    /// Whether all of it fits together, which it does unless somebody else has written the records.
    pub(crate) fn is_sound(&self) -> bool {
        let end = self.pieces.last_key_value().map_or(0, |(_, piece)| piece.end());
        let source = self.facts.source;
        if let Some(relay) = &self.relay {
            let ids = relay.ids.values().all(|id| *id <= POSITION_MAX) && relay.last_id <= POSITION_MAX;
            let within = self.facts.earliest <= self.tail && end <= self.tail && self.tail <= POSITION_MAX;
            return ids && within;
        }
        self.facts.base <= self.facts.earliest
            && self.facts.earliest <= self.tail
            && end <= self.tail
            && self.tail <= POSITION_MAX
            && self.created <= POSITION_MAX
            && self.facts.generation <= POSITION_MAX
            && (source == 0 && self.facts.base == 0 || source < self.created)
    }

    /// What is known of it but its messages.
    pub(crate) fn facts(&self) -> Facts {
        let producers = self.producers.iter().map(|(id, &(epoch, sequence))| ProducerTag {
            id: id.clone(),
            epoch,
            sequence,
        });
        Facts { producers: producers.collect(), ..self.facts.clone() }
    }

    /// Its messages that count, oldest first, as they are stored, each with the position behind it.
    pub(crate) fn messages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let earliest = self.facts.earliest;
        self.pieces
            .values()
            .flat_map(|piece| {
                let mut at = 0;
                piece.lengths.iter().map(move |&length| {
                    let start = at;
                    at += length as usize;
                    (piece.at + at as u64, piece.bytes.get(start..at).unwrap_or_default())
                })
            })
            .filter(move |(end, _)| *end > earliest)
    }
}

/// A stream in a journal, for who looks at it from outside.
#[derive(Clone, Copy, Debug)]
pub struct StreamFacts<'a>(pub(super) &'a Image);

impl<'a> StreamFacts<'a> {
    /// Its path, prefix included.
    pub fn path(&self) -> &'a str {
        &self.0.facts.path
    }

    /// Of its messages.
    pub fn content_type(&self) -> &'a str {
        &self.0.facts.content_type
    }

    /// Where it ends.
    pub fn tail(&self) -> Offset {
        Offset { generation: self.0.facts.generation, position: self.0.tail }
    }

    /// From where on it is held. What a fork shares with its source is not counted to it.
    pub fn earliest(&self) -> Offset {
        Offset { generation: self.0.facts.generation, position: self.0.facts.earliest }
    }

    /// When it was created, ms since 1970.
    pub fn created_unix_ms(&self) -> u64 {
        self.0.created
    }

    /// Nothing more can be appended.
    pub fn is_closed(&self) -> bool {
        self.0.closed
    }

    /// It was deleted, and is kept for its forks.
    pub fn is_deleted(&self) -> bool {
        self.0.deleted
    }

    /// Something of it was damaged.
    pub fn is_damaged(&self) -> bool {
        self.0.damaged
    }

    /// The path that it was forked from.
    pub fn forked_from(&self) -> Option<&'a str> {
        self.0.facts.fork.as_ref().map(|fork| &*fork.from)
    }

    /// Producers, each with its epoch and its highest sequence.
    pub fn producers(&self) -> impl Iterator<Item = (&'a str, u64, u64)> {
        self.0.producers.iter().map(|(id, &(epoch, sequence))| (&**id, epoch, sequence))
    }

    /// The first segment that it needs.
    pub fn segment(&self) -> u64 {
        self.0.segment
    }

    /// Its own messages, oldest first, each as it was appended.
    pub fn messages(&self) -> impl Iterator<Item = &'a [u8]> {
        let json = Form::of(self.content_type()) == Form::Json;
        self.0.messages().map(move |(_, bytes)| match bytes {
            [message @ .., b','] if json => message,
            bytes => bytes,
        })
    }
}
