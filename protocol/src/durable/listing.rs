//! The streams of a store, for who looks after it: some at a time, so that it is never long at work on it.

use super::Offset;
use super::request::Expiry;
use super::store::Store;
use super::stream::Stream;

/// What is told of one stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamLine {
    /// Where it is found.
    pub path: Box<str>,
    /// Of its messages.
    pub content_type: Box<str>,
    /// No more can be appended.
    pub closed: bool,
    /// Deleted, and kept for its forks.
    pub deleted: bool,
    /// When it was created, ms since 1970, or a little later.
    pub created_unix_ms: u64,
    /// Milliseconds since it was last read or written.
    pub idle_ms: u64,
    /// From where on it is held; what a fork shares with its source counts as held if its source holds it.
    pub earliest: Offset,
    /// Where it ends, as far as readers may know.
    pub tail: Offset,
    /// Its own messages that are held.
    pub messages: u64,
    /// Bytes of them.
    pub held_bytes: u64,
    /// Memory that it takes, bytes.
    pub memory_bytes: u64,
    /// Who reads it now, long-polls included.
    pub readers: u64,
    /// Streams that were forked from it.
    pub forks: u32,
    /// The path that it was forked from.
    pub source: Option<Box<str>>,
    /// Seconds that it lives unused.
    pub ttl_s: Option<u64>,
    /// When it ends, as it was asked for.
    pub expires_at: Option<Box<str>>,
}

impl Store {
    /// Streams from a slot on, at most so many of at most `slots_max` slots, and the slot to go on from if there are more.
    pub fn list(
        &self,
        from: u32,
        slots_max: u32,
        most: usize,
        now_ms: u64,
    ) -> (Vec<StreamLine>, Option<u32>) {
        let end = self.streams.slots();
        let mut lines = Vec::new();
        let mut slot = from;
        while slot < end && slot - from < slots_max && lines.len() < most {
            if let Some((_, stream)) = self.streams.at(slot)
                && stream.is_shown()
            {
                lines.push(self.line(stream, now_ms));
            }
            slot += 1;
        }
        (lines, (slot < end).then_some(slot))
    }

    /// The stream at a path.
    pub fn line_of(&self, path: &str, now_ms: u64) -> Option<StreamLine> {
        let stream = self.streams.get(*self.by_path.get(path)?)?;
        stream.is_shown().then(|| self.line(stream, now_ms))
    }

    fn line(&self, stream: &Stream, now_ms: u64) -> StreamLine {
        let source = stream.source.and_then(|id| self.streams.get(id));
        let id = self.by_path.get(&stream.path).copied();
        let earliest = id.and_then(|id| self.earliest(id)).unwrap_or(stream.earliest);
        StreamLine {
            path: stream.path.clone(),
            content_type: stream.content_type.clone(),
            closed: stream.is_shown_closed(),
            deleted: stream.deleted,
            created_unix_ms: stream.created,
            idle_ms: if stream.readers.is_empty() { now_ms.saturating_sub(stream.used_ms) } else { 0 },
            earliest: stream.offset(earliest),
            tail: stream.offset(stream.shown_tail()),
            messages: stream.held_messages() as u64,
            held_bytes: stream.tail() - stream.earliest,
            memory_bytes: stream.counted,
            readers: stream.readers.len() as u64,
            forks: stream.forks,
            source: source.map(|source| source.path.clone()),
            ttl_s: match stream.expiry {
                Expiry::Ttl(seconds) => Some(seconds),
                _ => None,
            },
            expires_at: match &stream.expiry {
                Expiry::At(_, text) => Some(text.clone()),
                _ => None,
            },
        }
    }
}
