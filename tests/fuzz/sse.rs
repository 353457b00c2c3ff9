//! Event streams: what a browser dispatches comes through, whatever the splits, the ids and the heartbeats put in.

use super::input::{Choices, for_each_split};
use protocol::dialect::Dialect;
use protocol::sse::{Block, Decoder};

/// The dictionary.
pub const WORDS: &[&str] = &[
    "data: x\n\n",
    "data:",
    "data",
    "data: [DONE]\r\n\r\n",
    "event: e\n",
    "event",
    "id: 7\n",
    "id",
    "id: \0\n",
    "retry: 10\n",
    ": c\n",
    ":\n",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\r\n\r\n",
    "\r\r",
    "\r\n\r",
    "\n\r",
    "\u{feff}",
    "\u{feff}data: a\n\n",
    "datax: 1\n",
    "data : 1\n",
    "  ",
    "error: {}\n\n",
];

/// What cuts a stream into blocks: the blocks of `pieces`, and that of the stream's end. `None`: one was too large.
pub type Cut = fn(pieces: &[&[u8]], event_bytes_max: usize) -> Option<Vec<Cutout>>;

/// One block.
#[derive(Clone, PartialEq, Debug)]
pub struct Cutout {
    /// [`Block::raw`].
    pub raw: Vec<u8>,
    /// [`Block::dispatches`].
    pub dispatches: bool,
    /// [`Block::has_id`].
    pub has_id: bool,
}

impl Cutout {
    fn block(&self) -> Block<'_> {
        Block { raw: &self.raw, dispatches: self.dispatches, has_id: self.has_id }
    }
}

/// What a reader of the stream dispatches.
#[derive(Clone, PartialEq, Debug, Default)]
struct Event {
    kind: Vec<u8>,
    data: Vec<u8>,
    /// The last id set when it is dispatched.
    last_id: Vec<u8>,
}

/// The target: one byte for limits and heartbeats, then the stream.
pub fn run(data: &[u8]) {
    run_on(cut, data);
}

/// The target, on another decoder.
pub fn run_on(cut: Cut, data: &[u8]) {
    let mut choices = Choices::of(data);
    let settings = choices.byte();
    let stream = choices.rest();
    let event_bytes_max = if settings & 0x80 == 0 { 1 << 20 } else { 24 };

    let whole = cut(&[stream], event_bytes_max);
    for_each_split(stream, |pieces| assert_eq!(cut(pieces, event_bytes_max), whole));
    let Some(blocks) = whole else {
        assert!(stream.len() > event_bytes_max);
        return;
    };
    let said = by_the_book(stream);
    assert_eq!(blocks.iter().filter(|block| block.dispatches).count(), said.len());
    for (block, event) in blocks.iter().filter(|block| block.dispatches).zip(&said) {
        let lines: Vec<&[u8]> = block.block().data_lines().collect();
        assert_eq!(lines.join(&b'\n'), event.data);
        assert_eq!(block.block().event().unwrap_or_default(), event.kind);
        assert_eq!(block.block().data_is(&event.data), lines.len() == 1);
    }
    for block in &blocks {
        assert!(block.raw.len() <= event_bytes_max);
        let (body, blank) = block.block().without_blank_line();
        assert_eq!([body, blank].concat(), block.raw);
        assert!(!blank.is_empty() && blank.iter().all(|byte| matches!(byte, b'\r' | b'\n')));
    }
    passes_on_what_was_said(&blocks, &said);
    for dialect in Dialect::ALL {
        keeps_its_events_among_ids(&blocks, &said, dialect, settings & 0x7f);
    }
}

/// The decoder's blocks.
pub fn cut(pieces: &[&[u8]], event_bytes_max: usize) -> Option<Vec<Cutout>> {
    let mut decoder = Decoder::new(event_bytes_max);
    let mut blocks = Vec::new();
    let cutout = |block: Block<'_>| Cutout {
        raw: block.raw.to_vec(),
        dispatches: block.dispatches,
        has_id: block.has_id,
    };
    let mut boundary = true;
    for piece in pieces {
        let mut input = *piece;
        while let Some(block) = decoder.next(&mut input).ok()? {
            blocks.push(cutout(block));
        }
        assert!(input.is_empty());
        assert_eq!(decoder.is_at_boundary(), decoder.partial_bytes() == 0);
        assert!(decoder.partial_bytes() <= event_bytes_max + 2);
        boundary = decoder.is_at_boundary();
    }
    let last = decoder.finish().map(cutout);
    assert!(last.is_none() || !boundary, "a block out of nothing");
    blocks.extend(last);
    Some(blocks)
}

/// A stream of the blocks as they came dispatches the same events.
fn passes_on_what_was_said(blocks: &[Cutout], said: &[Event]) {
    let relayed: Vec<u8> = blocks.iter().flat_map(|block| block.raw.clone()).collect();
    let heard = by_the_book(&relayed);
    assert_eq!(heard, said);
}

/// As `Stream::append_event` puts ids in, with heartbeats between the events: the ids are ours, and nothing else changes.
fn keeps_its_events_among_ids(blocks: &[Cutout], said: &[Event], dialect: Dialect, every: u8) {
    let mut relayed = Vec::new();
    let mut ids = 0_u64;
    for (index, block) in blocks.iter().enumerate() {
        if every > 0 && index % usize::from(every) == 0 {
            let beat = if ids > 0 { dialect.heartbeat_among_ids() } else { dialect.heartbeat() };
            // Messages beat with an event of their own; it is not one of the answer's, and left out here.
            if dialect != Dialect::Messages {
                relayed.extend_from_slice(beat);
            }
        }
        if !block.dispatches {
            relayed.extend(block.block().lines_for_the_next().flatten());
            continue;
        }
        ids += 1;
        relayed.extend(block.block().with_id(format!("id: {ids}\n").as_bytes()).concat());
    }
    let (heard, last_ids) = read(&relayed);
    assert_eq!(heard.len(), said.len(), "{dialect:?}: {}", relayed.escape_ascii());
    for (number, (heard, said)) in heard.iter().zip(said).enumerate() {
        assert_eq!((&heard.kind, &heard.data), (&said.kind, &said.data), "{dialect:?}");
        assert_eq!(heard.last_id, (number + 1).to_string().as_bytes(), "{dialect:?}");
    }
    // What a client would resume from, at any time.
    let ours: Vec<Vec<u8>> =
        (0..=ids).map(|id| if id > 0 { id.to_string().into() } else { Vec::new() }).collect();
    assert!(last_ids.iter().all(|id| ours.contains(id)), "{dialect:?}: an id that is not ours");
}

/// The events of a stream.
fn by_the_book(stream: &[u8]) -> Vec<Event> {
    read(stream).0
}

/// The WHATWG standard (HTML, section 9.2.6) read naively, from the whole stream: the events, and the last event id as it
/// stands after each blank line.
fn read(stream: &[u8]) -> (Vec<Event>, Vec<Vec<u8>>) {
    let mut rest = stream;
    // It knows one byte order mark. A second one would be the first to whoever is sent what we pass on.
    while let Some(after) =
        [&b"\xEF\xBB\xBF"[..], b"\r", b"\n"].iter().find_map(|nothing| rest.strip_prefix(*nothing))
    {
        rest = after;
    }
    let (mut events, mut next, mut any_data) = (Vec::new(), Event::default(), false);
    let (mut last_id, mut last_ids) = (Vec::new(), Vec::new());
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
        let line = &rest[..at];
        rest = if rest[at..].starts_with(b"\r\n") { &rest[at + 2..] } else { &rest[at + 1..] };
        if line.is_empty() {
            last_ids.push(last_id.clone());
            if any_data {
                next.data.pop();
                next.last_id = last_id.clone();
                events.push(std::mem::take(&mut next));
            }
            (next, any_data) = (Event::default(), false);
            continue;
        }
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            b"data" => {
                any_data = true;
                next.data.extend_from_slice(value);
                next.data.push(b'\n');
            }
            b"event" => next.kind = value.to_vec(),
            b"id" if !value.contains(&0) => last_id = value.to_vec(),
            _ => {}
        }
    }
    (events, last_ids)
}
