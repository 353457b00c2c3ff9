//! One stream: its messages, who has written them, when it ends.
//!
//! ```text
//!   0 ........ base ......... earliest ................ tail
//!     source's      dropped             held: log, ends
//! ```
//! Positions count bytes from the start of the stream, those of its source included. Of JSON, each message is stored with a
//! comma behind it, so that any range between two messages is the inside of an array as it lies.

use super::journal::Image;
use super::journal::record::Facts;
use super::request::{Create, Expiry, Fork, ProducerTag};
use super::retention::Marks;
use super::store::Id;
use super::{Form, Offset, refusals};
use crate::fault::Fault;
use crate::limits::{
    DURABLE_AWAY_COST_BYTES, DURABLE_PRODUCER_FORGET_MS, DURABLE_PRODUCERS_MAX, DURABLE_STREAM_COST_BYTES,
};
use crate::log::Log;
use crate::slots::Key;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

/// What is known of one producer (PROTOCOL.md section 5.2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Producer {
    pub(super) epoch: u64,
    /// The highest accepted.
    pub(super) sequence: u64,
    used_ms: u64,
}

/// What becomes of a producer's append.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Accepted,
    /// It was appended before; the highest sequence accepted since.
    Duplicate(u64),
    /// A later epoch has begun.
    Stale(u64),
    /// This sequence is expected.
    Gap(u64),
    Refused(Fault),
}

/// A stream.
pub(super) struct Stream {
    pub(super) path: Box<str>,
    /// Unique in its store, and not used before it.
    pub(super) created: u64,
    /// Of its offsets: `created` of the stream at the root of its forks.
    pub(super) generation: u64,
    pub(super) content_type: Box<str>,
    pub(super) form: Form,
    log: Log,
    /// Position of the log's first byte.
    log_base: u64,
    pub(super) base: u64,
    pub(super) earliest: u64,
    /// Where its own messages end, those that are held.
    ends: VecDeque<u64>,
    pub(super) source: Option<Id>,
    /// As it was asked for.
    fork: Option<Fork>,
    asked_expiry: Expiry,
    pub(super) expiry: Expiry,
    /// `Expiry::At` in the clock of the requests, ms.
    pub(super) expires_ms: u64,
    pub(super) closed: bool,
    closed_by: Option<ProducerTag>,
    /// Deleted, and kept for its forks.
    pub(super) deleted: bool,
    /// Its path belongs to another shard, which knows that it is here.
    pub(super) away: bool,
    /// Forks that have it as their source.
    pub(super) forks: u32,
    /// Readers of it and of the forks above it.
    pub(super) live: u32,
    /// Its own readers, to be woken.
    pub(super) readers: Slab<Key>,
    /// Its readers are to be told of something.
    pub(super) changed: bool,
    producers: BTreeMap<Box<str>, Producer>,
    producer_bytes: usize,
    pub(super) last_sequence: Option<Box<str>>,
    pub(super) used_ms: u64,
    pub(super) used_tick: u64,
    /// What the store has counted for it, bytes.
    pub(super) counted: u64,
    /// Where it stands in the store's orders.
    pub(super) queued: Option<(super::room::Class, u64)>,
    pub(super) queued_due_ms: Option<u64>,
    /// When it is looked at for old messages, in the clock of the requests.
    pub(super) queued_look_ms: Option<u64>,
    pub(super) marks: Marks,
    /// What readers may be shown, where that is not all.
    pub(super) hidden: Option<Hidden>,
    /// The first segment of the journal that it needs.
    pub(super) segment: u64,
}

/// Of a stream of which not all is acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hidden {
    /// The record with which all can be shown.
    pub(super) until: u64,
    /// What can be shown until then.
    pub(super) tail: u64,
    pub(super) closed: bool,
    /// Not even that there is such a stream.
    pub(super) unborn: bool,
}

/// Where a stream comes from, worked out.
pub(super) struct Origin {
    pub(super) source: Option<Id>,
    pub(super) base: u64,
    pub(super) generation: u64,
    pub(super) content_type: Box<str>,
    pub(super) expiry: Expiry,
}

impl Stream {
    pub(super) fn new(path: &str, created: u64, create: &Create, origin: Origin, now: super::Now) -> Self {
        let expires_ms = match origin.expiry {
            Expiry::At(unix_ms, _) => now.ms + unix_ms.saturating_sub(now.unix_ms),
            _ => u64::MAX,
        };
        Stream {
            path: path.into(),
            created,
            generation: origin.generation,
            form: Form::of(&origin.content_type),
            content_type: origin.content_type,
            log: Log::new(),
            log_base: origin.base,
            base: origin.base,
            earliest: origin.base,
            ends: VecDeque::new(),
            source: origin.source,
            fork: create.fork.clone(),
            asked_expiry: create.expiry.clone(),
            expiry: origin.expiry,
            expires_ms,
            closed: false,
            closed_by: None,
            deleted: false,
            away: false,
            forks: 0,
            live: 0,
            readers: Slab::new(),
            changed: false,
            producers: BTreeMap::new(),
            producer_bytes: 0,
            last_sequence: None,
            used_ms: now.ms,
            used_tick: 0,
            counted: 0,
            queued: None,
            queued_due_ms: None,
            queued_look_ms: None,
            marks: Marks::default(),
            hidden: None,
            segment: 0,
        }
    }

    /// As a journal has it. Its time to live begins anew.
    pub(super) fn restored(image: Image, source: Option<Id>, now: super::Now) -> Self {
        let facts = image.facts();
        let create =
            Create { content_type: None, expiry: facts.asked_expiry, closed: image.closed, fork: facts.fork };
        let origin = Origin {
            source,
            base: facts.base,
            generation: facts.generation,
            content_type: facts.content_type,
            expiry: facts.expiry,
        };
        let mut stream = Stream::new(&facts.path, image.created, &create, origin, now);
        stream.marks = Marks::restored(&image.marks);
        for tag in &facts.producers {
            stream.note_producer(tag, now.ms);
        }
        stream.closed = image.closed;
        stream.closed_by = facts.closed_by;
        stream.deleted = image.deleted;
        stream.last_sequence = facts.last_sequence;
        stream.earliest = facts.earliest;
        stream.log_base = facts.earliest;
        for (end, message) in image.messages() {
            // Of a first message of which the start was dropped, nothing is held.
            if stream.log.end() == 0 {
                stream.log_base = end - message.len() as u64;
                stream.earliest = stream.log_base;
            }
            stream.log.append(&[message]);
            stream.ends.push_back(end);
        }
        stream
    }

    /// What the journal is told of it. `source` is `created` of that, or 0.
    pub(super) fn facts(&self, source: u64) -> Facts {
        let producers = self.producers.iter().map(|(id, known)| ProducerTag {
            id: id.clone(),
            epoch: known.epoch,
            sequence: known.sequence,
        });
        Facts {
            path: self.path.clone(),
            content_type: self.content_type.clone(),
            generation: self.generation,
            base: self.base,
            earliest: self.earliest,
            source,
            fork: self.fork.clone(),
            asked_expiry: self.asked_expiry.clone(),
            expiry: self.expiry.clone(),
            closed_by: self.closed_by.clone(),
            last_sequence: self.last_sequence.clone(),
            producers: producers.collect(),
        }
    }

    /// Position behind the last byte.
    pub(super) fn tail(&self) -> u64 {
        self.log_base + self.log.end()
    }

    /// The end that readers are shown.
    pub(super) fn shown_tail(&self) -> u64 {
        self.hidden.map_or_else(|| self.tail(), |hidden| hidden.tail)
    }

    /// Whether readers are shown that it is closed.
    pub(super) fn is_shown_closed(&self) -> bool {
        self.hidden.map_or(self.closed, |hidden| hidden.closed)
    }

    /// Whether anybody but its creator may know of it.
    pub(super) fn is_shown(&self) -> bool {
        self.hidden.is_none_or(|hidden| !hidden.unborn)
    }

    /// Where its own messages end, of those that end behind `at`.
    pub(super) fn ends_behind(&self, at: u64) -> impl Iterator<Item = u64> {
        self.ends.range(self.ends.partition_point(|&end| end <= at)..).copied()
    }

    pub(super) fn offset(&self, position: u64) -> Offset {
        Offset { generation: self.generation, position }
    }

    /// Memory it takes, bytes.
    pub(super) fn cost(&self) -> u64 {
        // A place in the other shard's index.
        let known = if self.away { DURABLE_AWAY_COST_BYTES + self.path.len() } else { 0 };
        let texts = known + self.path.len() + self.content_type.len();
        let lists = self.ends.capacity() * size_of::<u64>() + self.producer_bytes;
        (DURABLE_STREAM_COST_BYTES + texts + lists + self.log.memory_bytes()) as u64
    }

    /// Whether messages of its own are held.
    pub(super) fn holds_data(&self) -> bool {
        self.earliest < self.tail()
    }

    /// When it ends by itself, ms; `u64::MAX`: not as things are.
    pub(super) fn due_ms(&self) -> u64 {
        match self.expiry {
            Expiry::Never => u64::MAX,
            // Who is reading it is using it; who reads a fork is not.
            Expiry::Ttl(_) if !self.readers.is_empty() => u64::MAX,
            Expiry::Ttl(_) => self.used_ms.saturating_add(self.ttl_ms()),
            Expiry::At(..) => self.expires_ms,
        }
    }

    /// How long it lives unused, ms; 0 where that ends nothing.
    pub(super) fn ttl_ms(&self) -> u64 {
        match self.expiry {
            Expiry::Ttl(seconds) => seconds.saturating_mul(1000),
            Expiry::Never | Expiry::At(..) => 0,
        }
    }

    /// Section 5.1: whether a PUT asks for what there is.
    pub(super) fn is_as_asked(&self, create: &Create) -> bool {
        let same_type = match &create.content_type {
            Some(asked) => {
                super::media_type(asked).eq_ignore_ascii_case(super::media_type(&self.content_type))
            }
            None if create.fork.is_some() => true,
            None => {
                super::media_type(&self.content_type).eq_ignore_ascii_case(super::store::DEFAULT_CONTENT_TYPE)
            }
        };
        let same_expiry = match (&create.expiry, &self.asked_expiry) {
            // However it was written.
            (Expiry::At(asked, _), Expiry::At(at, _)) => asked == at,
            (asked, is) => asked == is,
        };
        let same_fork = match (&create.fork, &self.fork) {
            (None, None) => true,
            (Some(asked), Some(is)) => {
                // An offset left out is the source's end at the time, whatever that was.
                let same_offset = asked.offset.is_none_or(|asked| {
                    let is = is.offset.unwrap_or(self.offset(self.base));
                    asked == is || (asked.position == 0 && is.position == 0)
                });
                asked.from == is.from && same_offset && asked.sub_offset == is.sub_offset
            }
            _ => false,
        };
        same_type && same_expiry && same_fork && create.closed == self.closed
    }

    /// Appends one message.
    pub(super) fn push(&mut self, message: &[u8]) {
        let comma: &[u8] = if self.form == Form::Json { b"," } else { b"" };
        self.log.append(&[message, comma]);
        self.ends.push_back(self.tail());
    }

    /// Drops its oldest messages until it holds no more bytes than that; true when it dropped any.
    pub(super) fn trim(&mut self, bytes_max: u64) -> bool {
        let tail = self.tail();
        self.drop_oldest(|earliest, _| tail - earliest > bytes_max)
    }

    /// Drops the messages that end at a position or before it; true when it dropped any.
    pub(super) fn trim_below(&mut self, position: u64) -> bool {
        self.drop_oldest(|_, end| end <= position)
    }

    /// Drops its oldest messages for as long as is said, of where the oldest begins and ends.
    fn drop_oldest(&mut self, goes: impl Fn(u64, u64) -> bool) -> bool {
        let before = self.earliest;
        while let Some(&end) = self.ends.front()
            && goes(self.earliest, end)
        {
            self.ends.pop_front();
            self.earliest = end;
        }
        if self.earliest == before {
            return false;
        }
        self.log.trim(self.earliest - self.log_base);
        if self.ends.capacity() > 4 * self.ends.len() + 64 {
            self.ends.shrink_to_fit();
        }
        true
    }

    /// A range of its own bytes, from `at` up to `end` at most.
    pub(super) fn lend(&self, at: u64, end: u64) -> Option<crate::log::Lent> {
        if at < self.earliest {
            return None;
        }
        self.log.lend(at - self.log_base, u32::try_from(end - at).unwrap_or(u32::MAX))
    }

    /// How many of its own messages are held.
    pub(super) fn held_messages(&self) -> usize {
        self.ends.len()
    }

    /// Where the message of its own ends that the byte at `at` belongs to; `None` at the tail.
    pub(super) fn message_end(&self, at: u64) -> Option<u64> {
        self.ends.get(self.ends.partition_point(|&end| end <= at)).copied()
    }

    /// Whether a message of its own begins at `at`, or the stream ends there.
    pub(super) fn is_boundary(&self, at: u64) -> bool {
        at == self.earliest || self.ends.binary_search(&at).is_ok()
    }

    /// What is to become of an append with this tag. Nothing is changed.
    pub(super) fn judge(&self, tag: &ProducerTag, now_ms: u64) -> Verdict {
        let Some(known) = self.producers.get(&tag.id) else {
            let forgotten = self.producers.len() < DURABLE_PRODUCERS_MAX
                || self.producers.values().any(|producer| producer.is_old(now_ms));
            return match tag.sequence {
                _ if !forgotten => Verdict::Refused(refusals::TOO_MANY_PRODUCERS),
                0 => Verdict::Accepted,
                _ => Verdict::Gap(0),
            };
        };
        match tag.epoch.cmp(&known.epoch) {
            std::cmp::Ordering::Less => Verdict::Stale(known.epoch),
            std::cmp::Ordering::Greater if tag.sequence == 0 => Verdict::Accepted,
            std::cmp::Ordering::Greater => Verdict::Refused(refusals::EPOCH_START),
            std::cmp::Ordering::Equal if tag.sequence <= known.sequence => Verdict::Duplicate(known.sequence),
            std::cmp::Ordering::Equal if tag.sequence == known.sequence + 1 => Verdict::Accepted,
            std::cmp::Ordering::Equal => Verdict::Gap(known.sequence + 1),
        }
    }

    /// Notes an append that was accepted.
    pub(super) fn note_producer(&mut self, tag: &ProducerTag, now_ms: u64) {
        // A node of the map has room for more than it holds.
        let cost = |id: &str| id.len() + 2 * size_of::<(Box<str>, Producer)>();
        let producer = Producer { epoch: tag.epoch, sequence: tag.sequence, used_ms: now_ms };
        if let Some(known) = self.producers.get_mut(&tag.id) {
            *known = producer;
            return;
        }
        if self.producers.len() >= DURABLE_PRODUCERS_MAX {
            self.producers.retain(|_, producer| !producer.is_old(now_ms));
            self.producer_bytes = self.producers.keys().map(|id| cost(id)).sum();
        }
        self.producer_bytes += cost(&tag.id);
        self.producers.insert(tag.id.clone(), producer);
    }

    /// Closes it, for good.
    pub(super) fn close(&mut self, by: Option<&ProducerTag>) {
        self.closed = true;
        self.closed_by = by.cloned();
    }

    /// Whether this very append closed it.
    pub(super) fn was_closed_by(&self, tag: &ProducerTag) -> bool {
        self.closed_by.as_ref() == Some(tag)
    }
}

impl Producer {
    fn is_old(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.used_ms) > DURABLE_PRODUCER_FORGET_MS
    }
}
