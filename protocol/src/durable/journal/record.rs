//! Records and segment headers as they lie in a file.
//!
//! ```text
//!   segment   header: magic, number, follows, salt, checksum │ the same once more │ record │ record │ …
//!   record    "TRJ1" │ checksum of the rest of the head │ payload: bytes, checksum │ kind, flags │ number │ synced
//!             │ stream, end │ the record before: kind, flags, stream, end │ payload
//! ```
//! All numbers are little-endian. Checksums are CRC-32 begun with the segment's salt, which nobody outside knows: what a client
//! wrote into a stream is never taken for a record.

use super::super::Offset;
use super::super::request::{Expiry, Fork, ProducerTag};
use crc32fast::Hasher;

/// Bytes of a segment's header, both copies.
pub(crate) const SEGMENT_HEADER_BYTES: usize = 2 * COPY_BYTES;
/// Bytes of a record without its payload.
pub(crate) const RECORD_HEADER_BYTES: usize = 72;

const COPY_BYTES: usize = 32;
/// Counts up when the format changes.
const SEGMENT_MAGIC: [u8; 8] = *b"trsegm\x00\x01";
const RECORD_MAGIC: [u8; 4] = *b"TRJ1";

/// What a record tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A stream was created: all that is known of it, and its first messages.
    Create = 1,
    /// Messages were appended, or it was closed, or both.
    Append = 2,
    /// It ended: deleted, expired, or given up.
    Delete = 3,
    /// Its oldest messages were dropped.
    Trim = 4,
    /// All that is known of it but its messages, which follow; written to free the segments before.
    Snapshot = 5,
    /// Some of the messages of a snapshot.
    Data = 6,
    /// A snapshot is complete.
    Whole = 7,
    /// Everything so far is on the disk. It has the number of the record before.
    Mark = 8,
    /// The last record of a segment: the last record of each stream in it. It has the number of the record before.
    Seal = 9,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        use Kind::{Append, Create, Data, Delete, Mark, Seal, Snapshot, Trim, Whole};
        [Create, Append, Delete, Trim, Snapshot, Data, Whole, Mark, Seal]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// Whether it has a number of its own.
    pub(crate) fn counts(self) -> bool {
        !matches!(self, Kind::Mark | Kind::Seal)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Create => "creation",
            Kind::Append => "append",
            Kind::Delete => "deletion",
            Kind::Trim => "trim",
            Kind::Snapshot | Kind::Data | Kind::Whole => "snapshot",
            Kind::Mark | Kind::Seal => "mark",
        }
    }
}

/// The stream is closed.
pub(crate) const CLOSED: u8 = 1;
/// The stream was deleted, and is kept for its forks.
pub(crate) const KEPT: u8 = 2;
/// The stream is one that was relayed from a model: its records have other payloads.
pub(crate) const RELAYED: u8 = 4;

/// What a record did to which stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Deed {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// `created` of the stream; 0 for none.
    pub(crate) stream: u64,
    /// The position at which the stream ends after it.
    pub(crate) end: u64,
}

impl Deed {
    /// Nothing.
    pub(crate) const NONE: Deed = Deed { kind: Kind::Mark, flags: 0, stream: 0, end: 0 };
}

/// The head of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Head {
    pub(crate) deed: Deed,
    /// Records are numbered through all segments, from 1.
    pub(crate) number: u64,
    /// The record up to which everything was on the disk when this one was written.
    pub(crate) synced: u64,
    /// The record before, so that one that cannot be read is known all the same. [`Deed::NONE`] for the first of all.
    pub(crate) before: Deed,
    pub(crate) payload_bytes: u32,
    payload_sum: u32,
}

/// The head of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SegmentHead {
    pub(crate) number: u64,
    /// The last record of the segments before that counts. Any after it were never acknowledged, and do not.
    pub(crate) follows: u64,
    pub(crate) salt: u32,
}

fn checksum(salt: u32, bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new_with_initial(salt);
    hasher.update(bytes);
    hasher.finalize()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

impl SegmentHead {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&SEGMENT_MAGIC);
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.follows.to_le_bytes());
        out.extend_from_slice(&self.salt.to_le_bytes());
        let sum = checksum(0, &out[start..]);
        out.extend_from_slice(&sum.to_le_bytes());
        out.extend_from_within(start..);
    }

    /// Either of the two copies will do.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        [0, COPY_BYTES].into_iter().find_map(|at| {
            let copy = bytes.get(at..at + COPY_BYTES)?;
            let (rest, sum) = copy.split_at(COPY_BYTES - 4);
            let whole = rest.starts_with(&SEGMENT_MAGIC) && u32_at(sum, 0) == checksum(0, rest);
            whole.then(|| SegmentHead {
                number: u64_at(copy, 8),
                follows: u64_at(copy, 16),
                salt: u32_at(copy, 24),
            })
        })
    }
}

/// Writes a record whose payload `payload` appends.
pub(crate) fn write(
    out: &mut Vec<u8>,
    salt: u32,
    deed: Deed,
    (number, synced): (u64, u64),
    before: Deed,
    payload: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.resize(start + RECORD_HEADER_BYTES, 0);
    payload(out);
    let (head, payload) = out[start..].split_at_mut(RECORD_HEADER_BYTES);
    head[..4].copy_from_slice(&RECORD_MAGIC);
    head[8..12].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    head[12..16].copy_from_slice(&checksum(salt, payload).to_le_bytes());
    head[16..20].copy_from_slice(&[deed.kind as u8, deed.flags, before.kind as u8, before.flags]);
    let numbers = [number, synced, deed.stream, deed.end, before.stream, before.end];
    for (field, number) in head[24..].chunks_exact_mut(8).zip(numbers) {
        field.copy_from_slice(&number.to_le_bytes());
    }
    let sum = checksum(salt, &head[8..]);
    head[4..8].copy_from_slice(&sum.to_le_bytes());
}

impl Head {
    /// The head that begins `bytes`, if a whole one does.
    pub(crate) fn read(bytes: &[u8], salt: u32) -> Option<Self> {
        let head = bytes.get(..RECORD_HEADER_BYTES)?;
        if !head.starts_with(&RECORD_MAGIC) || u32_at(head, 4) != checksum(salt, &head[8..]) {
            return None;
        }
        let deed = |at: usize, numbers: usize| {
            let (stream, end) = (u64_at(head, numbers), u64_at(head, numbers + 8));
            Some(Deed { kind: Kind::of(head[at])?, flags: head[at + 1], stream, end })
        };
        Some(Head {
            deed: deed(16, 40)?,
            number: u64_at(head, 24),
            synced: u64_at(head, 32),
            before: deed(18, 56)?,
            payload_bytes: u32_at(head, 8),
            payload_sum: u32_at(head, 12),
        })
    }

    /// Whether the payload is what was written.
    pub(crate) fn vouches_for(&self, payload: &[u8], salt: u32) -> bool {
        payload.len() == self.payload_bytes as usize && checksum(salt, payload) == self.payload_sum
    }

    /// Bytes of the whole record.
    pub(crate) fn record_bytes(&self) -> usize {
        RECORD_HEADER_BYTES + self.payload_bytes as usize
    }
}

/// Where a record's head may begin next.
pub(crate) fn find_head(bytes: &[u8], from: usize) -> Option<usize> {
    Some(from + memchr::memmem::find(bytes.get(from..)?, &RECORD_MAGIC)?)
}

// ---- payloads

/// Messages of a stream as it holds them, one behind the other.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Messages {
    /// Where the first one begins.
    pub(crate) at: u64,
    pub(crate) lengths: Vec<u32>,
    pub(crate) bytes: Vec<u8>,
}

impl Messages {
    pub(crate) fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }
}

/// All that is known of a stream but its messages.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    pub(crate) path: Box<str>,
    pub(crate) content_type: Box<str>,
    pub(crate) generation: u64,
    pub(crate) base: u64,
    pub(crate) earliest: u64,
    /// `created` of the stream that it was forked from; 0 for none.
    pub(crate) source: u64,
    pub(crate) fork: Option<Fork>,
    pub(crate) asked_expiry: Expiry,
    pub(crate) expiry: Expiry,
    pub(crate) closed_by: Option<ProducerTag>,
    pub(crate) last_sequence: Option<Box<str>>,
    pub(crate) producers: Vec<ProducerTag>,
}

/// What an append changed beside the messages.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Appended {
    pub(crate) earliest: u64,
    pub(crate) producer: Option<ProducerTag>,
    pub(crate) sequence: Option<Box<str>>,
    pub(crate) messages: Messages,
}

/// What is known of a relayed stream from its beginning on.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct RelayFacts {
    /// Name of its route.
    pub route: Box<str>,
    /// Name of its dialect.
    pub dialect: Box<str>,
    /// Each append was one chunk.
    pub chunked: bool,
    /// A response in background.
    pub background: bool,
    /// When it began, ms since 1970.
    pub began_unix_ms: u64,
    /// Where in its log the events begin, behind the head of the answer.
    pub begin: u64,
}

/// What a record of a relayed stream tells, besides its events.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct RelayTold {
    /// Up to where its log had been let go.
    pub(crate) earliest: u64,
    /// Why it ended, and when, ms since 1970.
    pub(crate) end: Option<(Box<str>, u64)>,
    /// The id that a response in background was found to have, and how its backend first told it.
    pub(crate) response: Option<(Box<str>, Box<str>)>,
    /// Ids of the events before and at the end of the bytes.
    pub(crate) ids: (u64, u64),
}

/// An entry of a seal: the last record of a stream, and its number.
pub(crate) type Sealed = (u64, Deed);

fn put(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_option<T>(out: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    out.push(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn put_tag(out: &mut Vec<u8>, tag: &ProducerTag) {
    put_text(out, &tag.id);
    put(out, tag.epoch);
    put(out, tag.sequence);
}

fn put_expiry(out: &mut Vec<u8>, expiry: &Expiry) {
    match expiry {
        Expiry::Never => out.push(0),
        Expiry::Ttl(seconds) => {
            out.push(1);
            put(out, *seconds);
        }
        Expiry::At(unix_ms, text) => {
            out.push(2);
            put(out, *unix_ms);
            put_text(out, text);
        }
    }
}

/// The bytes come last, up to the end of the payload.
pub(crate) fn put_messages<'a>(
    out: &mut Vec<u8>,
    at: u64,
    lengths: impl ExactSizeIterator<Item = usize>,
    bytes: impl Iterator<Item = &'a [u8]>,
) {
    put(out, at);
    put(out, lengths.len() as u64);
    for length in lengths {
        out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    }
    for bytes in bytes {
        out.extend_from_slice(bytes);
    }
}

pub(crate) fn put_facts(out: &mut Vec<u8>, facts: &Facts) {
    put_text(out, &facts.path);
    put_text(out, &facts.content_type);
    for number in [facts.generation, facts.base, facts.earliest, facts.source] {
        put(out, number);
    }
    put_option(out, facts.fork.as_ref(), |out, fork| {
        put_text(out, &fork.from);
        put_option(out, fork.offset, |out, offset| {
            put(out, offset.generation);
            put(out, offset.position);
        });
        put(out, fork.sub_offset);
    });
    put_expiry(out, &facts.asked_expiry);
    put_expiry(out, &facts.expiry);
    put_option(out, facts.closed_by.as_ref(), put_tag);
    put_option(out, facts.last_sequence.as_deref(), put_text);
    put(out, facts.producers.len() as u64);
    for tag in &facts.producers {
        put_tag(out, tag);
    }
}

pub(crate) fn put_appended(
    out: &mut Vec<u8>,
    earliest: u64,
    producer: Option<&ProducerTag>,
    sequence: Option<&str>,
) {
    put(out, earliest);
    put_option(out, producer, put_tag);
    put_option(out, sequence, put_text);
}

pub(crate) fn put_relay_facts(out: &mut Vec<u8>, facts: &RelayFacts) {
    put_text(out, &facts.route);
    put_text(out, &facts.dialect);
    out.push(u8::from(facts.chunked) | u8::from(facts.background) << 1);
    put(out, facts.began_unix_ms);
    put(out, facts.begin);
}

/// The bytes follow, up to the end of the payload.
pub(crate) fn put_relay_told(out: &mut Vec<u8>, told: &RelayTold, at: u64) {
    put(out, told.earliest);
    put_option(out, told.end.as_ref(), |out, (end, unix_ms)| {
        put_text(out, end);
        put(out, *unix_ms);
    });
    put_option(out, told.response.as_ref(), |out, (id, first)| {
        put_text(out, id);
        put_text(out, first);
    });
    for number in [told.ids.0, told.ids.1, at] {
        put(out, number);
    }
}

/// `marks` are positions, and when the stream had come so far, ms since 1970.
pub(crate) fn put_trimmed(
    out: &mut Vec<u8>,
    earliest: u64,
    marks: impl ExactSizeIterator<Item = (u64, u64)>,
) {
    put(out, earliest);
    if marks.len() > 0 {
        put(out, marks.len() as u64);
    }
    for (position, unix_ms) in marks {
        put(out, position);
        put(out, unix_ms);
    }
}

pub(crate) fn put_seal(out: &mut Vec<u8>, entries: impl ExactSizeIterator<Item = Sealed>) {
    put(out, entries.len() as u64);
    for (number, deed) in entries {
        for number in [number, deed.stream, deed.end] {
            put(out, number);
        }
        out.extend_from_slice(&[deed.kind as u8, deed.flags]);
    }
}

/// Takes payloads apart. Whatever the bytes are, it gives `None` or a value, and takes no more memory than they do.
pub(crate) struct Payload<'a>(pub(crate) &'a [u8]);

impl<'a> Payload<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64_at(self.take(8)?, 0))
    }

    fn length(&mut self) -> Option<usize> {
        Some(u32_at(self.take(4)?, 0) as usize)
    }

    fn text(&mut self) -> Option<Box<str>> {
        let length = self.length()?;
        Some(str::from_utf8(self.take(length)?).ok()?.into())
    }

    fn option<T>(&mut self, value: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.byte()? {
            0 => Some(None),
            1 => Some(Some(value(self)?)),
            _ => None,
        }
    }

    fn tag(&mut self) -> Option<ProducerTag> {
        Some(ProducerTag { id: self.text()?, epoch: self.number()?, sequence: self.number()? })
    }

    fn expiry(&mut self) -> Option<Expiry> {
        match self.byte()? {
            0 => Some(Expiry::Never),
            1 => Some(Expiry::Ttl(self.number()?)),
            2 => Some(Expiry::At(self.number()?, self.text()?)),
            _ => None,
        }
    }

    pub(crate) fn facts(&mut self) -> Option<Facts> {
        let (path, content_type) = (self.text()?, self.text()?);
        let [generation, base, earliest, source] =
            [self.number()?, self.number()?, self.number()?, self.number()?];
        let fork = self.option(|payload| {
            let from = payload.text()?;
            let offset = payload.option(|payload| {
                Some(Offset { generation: payload.number()?, position: payload.number()? })
            })?;
            Some(Fork { from, offset, sub_offset: payload.number()? })
        })?;
        let (asked_expiry, expiry) = (self.expiry()?, self.expiry()?);
        let closed_by = self.option(Self::tag)?;
        let last_sequence = self.option(Self::text)?;
        let mut producers = Vec::new();
        for _ in 0..self.number()? {
            producers.push(self.tag()?);
        }
        Some(Facts {
            path,
            content_type,
            generation,
            base,
            earliest,
            source,
            fork,
            asked_expiry,
            expiry,
            closed_by,
            last_sequence,
            producers,
        })
    }

    pub(crate) fn messages(&mut self) -> Option<Messages> {
        let at = self.number()?;
        let count = usize::try_from(self.number()?).ok()?;
        let lengths: Vec<u32> =
            self.take(count.checked_mul(4)?)?.chunks_exact(4).map(|length| u32_at(length, 0)).collect();
        let bytes = std::mem::take(&mut self.0).to_vec();
        let sum: u64 = lengths.iter().map(|length| u64::from(*length)).sum();
        let fits = sum == bytes.len() as u64 && at.checked_add(sum).is_some();
        fits.then_some(Messages { at, lengths, bytes })
    }

    pub(crate) fn appended(&mut self) -> Option<Appended> {
        Some(Appended {
            earliest: self.number()?,
            producer: self.option(Self::tag)?,
            sequence: self.option(Self::text)?,
            messages: self.messages()?,
        })
    }

    pub(crate) fn relay_facts(&mut self) -> Option<RelayFacts> {
        let (route, dialect, flags) = (self.text()?, self.text()?, self.byte()?);
        Some(RelayFacts {
            route,
            dialect,
            chunked: flags & 1 != 0,
            background: flags & 2 != 0,
            began_unix_ms: self.number()?,
            begin: self.number()?,
        })
    }

    /// What is told, and the bytes.
    pub(crate) fn relay_told(&mut self) -> Option<(RelayTold, Messages)> {
        let earliest = self.number()?;
        let end = self.option(|payload| Some((payload.text()?, payload.number()?)))?;
        let response = self.option(|payload| Some((payload.text()?, payload.text()?)))?;
        let (ids, at) = ((self.number()?, self.number()?), self.number()?);
        let bytes = std::mem::take(&mut self.0).to_vec();
        at.checked_add(bytes.len() as u64).filter(|_| ids.0 <= ids.1)?;
        let lengths = if bytes.is_empty() { Vec::new() } else { vec![u32::try_from(bytes.len()).ok()?] };
        Some((RelayTold { earliest, end, response, ids }, Messages { at, lengths, bytes }))
    }

    /// Where it begins, and the marks; records without any have nothing behind that.
    pub(crate) fn trimmed(&mut self) -> Option<(u64, Vec<(u64, u64)>)> {
        let earliest = self.number()?;
        let mut marks = Vec::new();
        if !self.0.is_empty() {
            for _ in 0..self.number()? {
                marks.push((self.number()?, self.number()?));
            }
        }
        Some((earliest, marks))
    }

    pub(crate) fn seal(&mut self) -> Option<Vec<Sealed>> {
        let mut entries = Vec::new();
        for _ in 0..self.number()? {
            let [number, stream, end] = [self.number()?, self.number()?, self.number()?];
            let (kind, flags) = (Kind::of(self.byte()?)?, self.byte()?);
            entries.push((number, Deed { kind, flags, stream, end }));
        }
        Some(entries)
    }
}
