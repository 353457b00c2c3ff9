//! Server-Sent Events as the WHATWG standard reads them (HTML, section 9.2.6), cut into whole blocks. The bytes of a
//! block are passed on as they came; only the block that straddles two receives is copied, and only while it does.

mod find;

pub(crate) use find::{each_block, end_of_event};
use memchr::{memchr, memchr2};

/// Largest buffer that is kept for the next straddling block while one receive is being taken apart.
const KEPT_CAPACITY_BYTES: usize = 4 * 1024;
/// The byte order mark, UTF-8.
const BOM: [u8; 3] = [0xEF, 0xBB, 0xBF];

/// One complete block: everything up to and including its blank line, bytes exactly as received.
///
/// It holds at least one line that is not empty. In a stream that mixes line ends, the LF of a blank line's CRLF is
/// left out when the line before did not end in CRLF: the CR alone has ended the block by then.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// The bytes, blank line included; without the byte order mark of the stream.
    pub raw: &'a [u8],
    /// It has a data line (an empty one counts), so a client sees an event. False: only comments, `retry`, `id`, ....
    pub dispatches: bool,
    /// It carries an `id` line of its own that takes effect (one with a NUL does not).
    pub has_id: bool,
}

impl<'a> Block<'a> {
    /// Value of the last `event` line.
    pub fn event(&self) -> Option<&'a [u8]> {
        lines(self.raw).filter_map(|line| field_value(line, b"event")).last()
    }

    /// Values of the data lines in order.
    pub fn data_lines(&self) -> impl Iterator<Item = &'a [u8]> {
        lines(self.raw).filter_map(|line| field_value(line, b"data"))
    }

    /// Whether it has exactly one data line, and this is its whole value.
    pub fn data_is(&self, whole: &[u8]) -> bool {
        let mut values = self.data_lines();
        values.next() == Some(whole) && values.next().is_none()
    }

    /// The block with an id line put in, in parts: in front, or last where it has an id of its own, because the last one counts
    /// (WHATWG, "process the field"). No other byte is touched.
    pub fn with_id<'p>(&self, id_line: &'p [u8]) -> [&'p [u8]; 3]
    where
        'a: 'p,
    {
        if self.has_id {
            let (body, blank) = self.without_blank_line();
            [body, id_line, blank]
        } else {
            [b"", id_line, self.raw]
        }
    }

    /// Of a block that dispatches nothing, the lines that may open the next one instead of being a block of their own:
    /// comments and `retry`. Of the others `event` would name that one, `id` would stand where only ours may, and nobody
    /// knows the rest. Each with its terminator.
    pub fn lines_for_the_next(&self) -> impl Iterator<Item = &'a [u8]> {
        let body = self.without_blank_line().0;
        let mut start = 0;
        lines(body).filter_map(move |line| {
            let from = start;
            start += line.len() + if body[start + line.len()..].starts_with(b"\r\n") { 2 } else { 1 };
            (line.starts_with(b":") || line.starts_with(b"retry:")).then_some(&body[from..start])
        })
    }

    /// `raw` before the blank line, and the blank line's own terminator: a line written between the two is the
    /// block's last line.
    pub fn without_blank_line(&self) -> (&'a [u8], &'a [u8]) {
        // `\r\n` at the end is always one terminator: a line before that ended in a lone CR would have taken the LF.
        let terminator_bytes = if self.raw.ends_with(b"\r\n") { 2 } else { 1 };
        self.raw.split_at(self.raw.len().saturating_sub(terminator_bytes))
    }
}

/// Why a stream cannot be decoded further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SseError {
    /// A block is longer than the limit given to [`Decoder::new`]. Upstream's fault; the rest cannot be framed.
    EventTooLarge,
}

impl std::fmt::Display for SseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SseError::EventTooLarge => f.write_str("upstream: an SSE event is longer than the limit allows"),
        }
    }
}

impl std::error::Error for SseError {}

/// Cuts a byte stream into blocks, whatever the splits between receives. A stray blank line is swallowed, and so is every
/// byte order mark before the first line.
///
/// A block is complete the instant its last byte is here: at the LF of a blank line; at a blank line's CR, unless the
/// line before ended in CRLF, since then an LF is still to come ([`Decoder::finish`] ends that wait).
///
/// Call [`Decoder::next`] until it returns `None` for every receive; the buffer is freed then if no block is partial.
#[derive(Debug)]
pub struct Decoder {
    /// A partial block; or, while `returned`, the block lent to the caller by the last call.
    held: Vec<u8>,
    event_bytes_max: usize,
    /// Where in `held` its unfinished line begins: `0 <= line_start <= held.len()`.
    line_start: usize,
    seen: Seen,
    /// Bytes of a byte order mark that have matched; 3: no longer looked for.
    bom_matched: u8,
    returned: bool,
    failed: bool,
}

/// What the lines of the current block have shown so far.
#[derive(Clone, Copy, Default, Debug)]
struct Seen {
    dispatches: bool,
    has_id: bool,
    previous_ended_in_crlf: bool,
}

/// What a line end means, with the bytes of the terminator.
enum Line {
    Ends(usize),
    EndsBlock(usize),
    /// A CR whose LF may still come.
    Waits,
}

impl Seen {
    /// Takes in one line that ends in `ending` (CR or LF), with the byte after it where that is known.
    fn take(&mut self, line: &[u8], ending: u8, after: Option<u8>) -> Line {
        let blank = line.is_empty();
        let terminator_bytes = match (ending, after) {
            (b'\n', _) => 1,
            _ if blank && !self.previous_ended_in_crlf => 1,
            (_, Some(b'\n')) => 2,
            (_, Some(_)) => 1,
            (_, None) => return Line::Waits,
        };
        if blank {
            return Line::EndsBlock(terminator_bytes);
        }
        match line[0] {
            b'd' => self.dispatches |= field_value(line, b"data").is_some(),
            b'i' => {
                self.has_id |= field_value(line, b"id").is_some_and(|value| memchr(0, value).is_none());
            }
            _ => {}
        }
        self.previous_ended_in_crlf = terminator_bytes == 2;
        Line::Ends(terminator_bytes)
    }

    fn block(self, raw: &[u8]) -> Block<'_> {
        Block { raw, dispatches: self.dispatches, has_id: self.has_id }
    }
}

impl Decoder {
    /// A decoder at the start of a stream, for blocks of at most `event_bytes_max` bytes, blank line included.
    pub fn new(event_bytes_max: usize) -> Self {
        Decoder {
            held: Vec::new(),
            event_bytes_max,
            line_start: 0,
            seen: Seen::default(),
            bom_matched: 0,
            returned: false,
            failed: false,
        }
    }

    /// The next complete block, advancing `input` past it; `None` when all of `input` has been taken in without
    /// completing one. When the whole block lies in `input` no copy is made.
    ///
    /// # Errors
    /// A block outgrows the limit, complete or not. The decoder then stays in error.
    pub fn next<'s, 'i: 's>(&'s mut self, input: &mut &'i [u8]) -> Result<Option<Block<'s>>, SseError> {
        if self.failed {
            return Err(SseError::EventTooLarge);
        }
        self.take_back();
        if self.bom_matched < 3 {
            self.skip_bom(input);
        }
        if self.held.is_empty() { self.next_in_place(input) } else { self.next_held(input) }
    }

    /// Call at the end of the stream: the block whose blank line ended in a CR that was waiting for its LF. Any other
    /// partial block is not an event (WHATWG discards it); [`Decoder::partial_bytes`] tells that one was cut off.
    pub fn finish(&mut self) -> Option<Block<'_>> {
        self.take_back();
        if !self.held.ends_with(b"\r\n\r") || self.line_start + 1 != self.held.len() {
            return None;
        }
        self.returned = true;
        Some(std::mem::take(&mut self.seen).block(&self.held))
    }

    /// Bytes of a partial block held back.
    pub fn partial_bytes(&self) -> usize {
        let bom_bytes = usize::from(self.bom_matched % 3);
        if self.returned { bom_bytes } else { self.held.len() + bom_bytes }
    }

    /// Memory held for it, bytes; at most twice the limit of a block.
    pub fn memory_bytes(&self) -> usize {
        self.held.capacity()
    }

    /// Whether everything taken in so far is whole blocks, so that a block of our own may be put in.
    pub fn is_at_boundary(&self) -> bool {
        self.partial_bytes() == 0
    }

    /// Takes the buffer back from the block that was lent by the last call.
    fn take_back(&mut self) {
        if self.returned {
            self.returned = false;
            self.line_start = 0;
            self.held.clear();
            if self.held.capacity() > KEPT_CAPACITY_BYTES {
                self.held = Vec::new();
            }
        }
    }

    /// What comes before the first line says nothing: byte order marks (the standard knows one) and blank lines. None of it
    /// may be left in front of the first block, where a client would drop it.
    fn skip_bom(&mut self, input: &mut &[u8]) {
        while self.bom_matched < 3
            && let [byte, rest @ ..] = *input
        {
            if *byte == BOM[usize::from(self.bom_matched)] {
                self.bom_matched = (self.bom_matched + 1) % 3;
            } else if self.bom_matched > 0 || !matches!(byte, b'\r' | b'\n') {
                self.held.extend_from_slice(&BOM[..usize::from(self.bom_matched)]);
                self.bom_matched = 3;
                return;
            }
            *input = rest;
        }
    }

    /// The common path: nothing is held, so a whole block is returned as it lies in `input`.
    fn next_in_place<'s, 'i: 's>(&'s mut self, input: &mut &'i [u8]) -> Result<Option<Block<'s>>, SseError> {
        while let [b'\n' | b'\r', rest @ ..] = *input {
            *input = rest;
        }
        let bytes: &'i [u8] = input;
        let mut start = 0;
        while let Some(length) = line_length(&bytes[start..]) {
            let at = start + length;
            match self.seen.take(&bytes[start..at], bytes[at], bytes.get(at + 1).copied()) {
                Line::Ends(terminator_bytes) => start = at + terminator_bytes,
                Line::EndsBlock(terminator_bytes) => {
                    let (raw, rest) = bytes.split_at(at + terminator_bytes);
                    if raw.len() > self.event_bytes_max {
                        return self.fail();
                    }
                    *input = rest;
                    return Ok(Some(std::mem::take(&mut self.seen).block(raw)));
                }
                Line::Waits => break,
            }
        }
        if bytes.is_empty() {
            self.held = Vec::new();
            return Ok(None);
        }
        self.line_start = start;
        self.hold(input, bytes.len())?;
        Ok(None)
    }

    /// Completes the held block, line by line, taking no byte of the next one.
    fn next_held<'s>(&'s mut self, input: &mut &[u8]) -> Result<Option<Block<'s>>, SseError> {
        while !input.is_empty() {
            // A CR at the end of an unfinished line is that line's end, and waited to see what follows.
            let waiting = self.line_start < self.held.len() && self.held.ends_with(b"\r");
            if !waiting {
                let Some(length) = memchr2(b'\n', b'\r', input) else {
                    self.hold(input, input.len())?;
                    return Ok(None);
                };
                self.hold(input, length + 1)?;
            }
            let at = self.held.len() - 1;
            let line = &self.held[self.line_start..at];
            let (terminator_bytes, ends_block) =
                match self.seen.take(line, self.held[at], input.first().copied()) {
                    Line::Ends(terminator_bytes) => (terminator_bytes, false),
                    Line::EndsBlock(terminator_bytes) => (terminator_bytes, true),
                    Line::Waits => return Ok(None),
                };
            if terminator_bytes == 2 {
                self.hold(input, 1)?;
            }
            self.line_start = self.held.len();
            if ends_block {
                self.returned = true;
                return Ok(Some(std::mem::take(&mut self.seen).block(&self.held)));
            }
        }
        Ok(None)
    }

    /// Moves the first `count` bytes of `input` into `held`.
    fn hold(&mut self, input: &mut &[u8], count: usize) -> Result<(), SseError> {
        let (bytes, rest) = input.split_at(count);
        if self.held.len() + bytes.len() > self.event_bytes_max {
            return self.fail();
        }
        self.held.extend_from_slice(bytes);
        *input = rest;
        Ok(())
    }

    fn fail<T>(&mut self) -> Result<T, SseError> {
        self.failed = true;
        self.held = Vec::new();
        Err(SseError::EventTooLarge)
    }
}

/// Bytes before the first line end. Every event ends in a line of none, for which there is nothing to search.
fn line_length(bytes: &[u8]) -> Option<usize> {
    if let [b'\n' | b'\r', ..] = bytes { Some(0) } else { memchr2(b'\n', b'\r', bytes) }
}

/// The lines of a block without their terminators.
fn lines(raw: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = raw;
    std::iter::from_fn(move || {
        let at = memchr2(b'\n', b'\r', rest)?;
        let line = &rest[..at];
        let terminator_bytes = if rest[at..].starts_with(b"\r\n") { 2 } else { 1 };
        rest = &rest[at + terminator_bytes..];
        Some(line)
    })
}

/// The line's value if it is a field of this name. A line without a colon is a field with an empty value; one space
/// after the colon is dropped.
fn field_value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    match line.strip_prefix(name)? {
        [] => Some(b""),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Clone)]
    struct Owned {
        raw: Vec<u8>,
        dispatches: bool,
        has_id: bool,
    }

    fn decode_pieces<'p>(
        pieces: impl IntoIterator<Item = &'p [u8]>,
        event_bytes_max: usize,
    ) -> (Vec<Owned>, Decoder, Option<SseError>) {
        let mut decoder = Decoder::new(event_bytes_max);
        let mut blocks = Vec::new();
        for piece in pieces {
            let mut input = piece;
            loop {
                match decoder.next(&mut input) {
                    Ok(Some(block)) => blocks.push(Owned {
                        raw: block.raw.to_vec(),
                        dispatches: block.dispatches,
                        has_id: block.has_id,
                    }),
                    Ok(None) => break,
                    Err(error) => return (blocks, decoder, Some(error)),
                }
            }
            assert!(input.is_empty());
            if decoder.partial_bytes() == 0 {
                assert_eq!(decoder.held.capacity(), 0, "the buffer is freed when empty");
            }
        }
        (blocks, decoder, None)
    }

    fn raws(stream: &[u8]) -> Vec<Vec<u8>> {
        decode_pieces([stream], 1 << 20).0.into_iter().map(|block| block.raw).collect()
    }

    fn one(stream: &[u8]) -> Block<'_> {
        let mut input = stream;
        let mut decoder = Decoder::new(1 << 20);
        let (raw, dispatches, has_id) = {
            let block = decoder.next(&mut input).unwrap().expect("one block");
            (block.raw.len(), block.dispatches, block.has_id)
        };
        Block { raw: &stream[..raw], dispatches, has_id }
    }

    #[test]
    fn a_decoder_is_small() {
        assert!(size_of::<Decoder>() <= 64, "{}", size_of::<Decoder>());
    }

    #[test]
    fn blocks_come_out_as_they_came_in() {
        let stream = b"data: a\n\nevent: ping\ndata: {}\n\n: comment\n\nretry: 10\n\n";
        assert_eq!(
            raws(stream),
            [&b"data: a\n\n"[..], b"event: ping\ndata: {}\n\n", b": comment\n\n", b"retry: 10\n\n"]
        );
        let flags: Vec<bool> =
            decode_pieces([&stream[..]], 99).0.iter().map(|block| block.dispatches).collect();
        assert_eq!(flags, [true, true, false, false]);
    }

    #[test]
    fn a_whole_block_in_the_input_is_not_copied() {
        let stream = b"data: a\n\ndata: b\n\n";
        let mut input = &stream[..];
        let mut decoder = Decoder::new(100);
        let block = decoder.next(&mut input).unwrap().unwrap();
        assert_eq!(block.raw.as_ptr(), stream.as_ptr());
        assert_eq!(input, b"data: b\n\n");
    }

    #[test]
    fn every_way_of_ending_lines_completes_at_the_last_byte() {
        for (stream, blocks) in [
            (&b"data: a\n\n"[..], 1),
            (b"data: a\r\n\r\n", 1),
            (b"data: a\r\n\r", 0),
            (b"data: a\r\n\n", 1),
            (b"data: a\r\r", 1),
            (b"data: a\n\r", 1),
            (b"data: a\r", 0),
            (b"data: a\r\n", 0),
            (b"data: a\r\n\rdata: b", 1),
            (b"data: a\r\r\ndata: b\r\r\n", 2),
            (b"\n\n\r\n\r\r\ndata: a\n\n\n\n", 1),
            (b"", 0),
        ] {
            assert_eq!(raws(stream).len(), blocks, "{:?}", String::from_utf8_lossy(stream));
        }
    }

    #[test]
    fn a_cr_that_waits_for_its_lf_is_released_at_the_end_of_the_stream() {
        let (blocks, mut decoder, _) = decode_pieces([&b"data: a\r\n\r"[..]], 100);
        assert!(blocks.is_empty() && !decoder.is_at_boundary());
        assert_eq!(decoder.finish().unwrap().raw, b"data: a\r\n\r");
        assert!(decoder.finish().is_none() && decoder.is_at_boundary());
        let (_, mut decoder, _) = decode_pieces([&b"data: a\r\n"[..]], 100);
        assert!(decoder.finish().is_none());
        assert_eq!(decoder.partial_bytes(), 9);
    }

    #[test]
    fn byte_order_marks_are_stripped_before_the_first_line_only() {
        assert_eq!(raws(b"\xEF\xBB\xBFdata: a\n\n\xEF\xBB\xBFdata: b\n\n").len(), 2);
        assert_eq!(raws(b"\xEF\xBB\xBFdata: a\n\n")[0], b"data: a\n\n");
        assert_eq!(raws(b"\n\xEF\xBB\xBF\r\n\xEF\xBB\xBFdata: a\n\n")[0], b"data: a\n\n");
        assert_eq!(raws(b"\xEF\xBB\xBF\xEF\xBBdata: a\n\n")[0], b"\xEF\xBBdata: a\n\n");
        assert_eq!(raws(b"\xEF\xBBdata: a\n\n")[0], b"\xEF\xBBdata: a\n\n");
        assert!(!one(b"\xEF\xBBdata: a\n\n").dispatches);
        let (_, decoder, _) = decode_pieces([&b"\xEF\xBB"[..]], 100);
        assert_eq!((decoder.partial_bytes(), decoder.is_at_boundary()), (2, false));
    }

    #[test]
    fn fields_are_read_as_the_standard_says() {
        let block = one(b"event: one\nevent:two\ndata\ndata:  b\ndata:c\nid: 7\ndatum: x\n\n");
        assert_eq!(block.event(), Some(&b"two"[..]));
        assert_eq!(block.data_lines().collect::<Vec<_>>(), [&b""[..], b" b", b"c"]);
        assert!(block.dispatches && block.has_id && !block.data_is(b"c"));
        assert!(one(b"data: [DONE]\r\n\r\n").data_is(b"[DONE]"));
        assert!(!one(b"data: [DONE]\ndata: x\n\n").data_is(b"[DONE]"));
        assert!(!one(b"data: x [DONE]\n\n").data_is(b"[DONE]"));
        assert!(one(b"data\n\n").dispatches);
        assert!(!one(b"datax: 1\n\n").dispatches);
        assert!(!one(b"id: a\0b\n\n").has_id);
        assert!(one(b"id\n\n").has_id);
        assert!(!one(b"idx: 1\n\n").has_id);
    }

    #[test]
    fn an_id_line_fits_before_the_blank_line_whatever_the_line_ends() {
        for stream in
            [&b"data: a\n\n"[..], b"data: a\r\n\r\n", b"data: a\r\r", b"data: a\r\n\n", b"data: a\n\r"]
        {
            let (front, blank) = one(stream).without_blank_line();
            let with_id = [front, b"id: 7\n", blank].concat();
            let block = one(&with_id);
            assert!(block.has_id && block.data_is(b"a"), "{stream:?}");
            assert!(with_id[block.raw.len()..].iter().all(|&byte| byte == b'\n'), "one block: {stream:?}");
        }
    }

    #[test]
    fn a_block_without_data_neither_names_nor_numbers_the_next_event() {
        for (stream, kept) in [
            (&b"event: a\n\n"[..], &[][..]),
            (b": c\r\nevent: a\r\nretry: 1\r\nid: 7\r\n\r\n", &[&b": c\r\n"[..], b"retry: 1\r\n"]),
            (b": c\revent\r: d\r\r", &[b": c\r", b": d\r"]),
            (b"eventual: a\n\n", &[]),
        ] {
            assert_eq!(
                one(stream).lines_for_the_next().collect::<Vec<_>>(),
                kept,
                "{}",
                stream.escape_ascii()
            );
        }
    }

    #[test]
    fn a_block_longer_than_the_limit_fails_at_any_split() {
        let stream = b"data: 0123\n\ndata: 012345\n\n";
        for split in 0..=stream.len() {
            let (blocks, mut decoder, error) = decode_pieces([&stream[..split], &stream[split..]], 13);
            assert_eq!((blocks.len(), error), (1, Some(SseError::EventTooLarge)), "split {split}");
            assert!(decoder.next(&mut &b"data: a\n\n"[..]).is_err(), "stays in error");
            assert_eq!(decode_pieces([&stream[..split], &stream[split..]], 14).0.len(), 2);
        }
    }

    /// A model of the standard that holds the whole stream: counts events with data, by lines.
    fn dispatched_by_the_book(stream: &[u8]) -> Vec<Vec<u8>> {
        let mut rest = stream;
        while let Some(after) =
            rest.strip_prefix(&BOM).or(rest.strip_prefix(b"\n")).or(rest.strip_prefix(b"\r"))
        {
            rest = after;
        }
        let (mut events, mut data, mut dispatches) = (Vec::new(), Vec::new(), false);
        while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let line = &rest[..at];
            rest = if rest[at..].starts_with(b"\r\n") { &rest[at + 2..] } else { &rest[at + 1..] };
            if line.is_empty() {
                if dispatches {
                    events.push(std::mem::take(&mut data));
                }
                dispatches = false;
                data.clear();
            } else if let Some(value) = line.strip_prefix(b"data:") {
                dispatches = true;
                data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
                data.push(b'\n');
            }
        }
        events
    }

    #[test]
    fn random_streams_decode_alike_at_every_split() {
        let mut seed = 0x5EED_0001_u64;
        let mut below = |bound: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % bound
        };
        const PARTS: [&[u8]; 12] = [
            b"data: x",
            b"data:",
            b": c",
            b"id: 1",
            b"event: e",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n",
            b"\n\n",
            b"\r\n\r\n",
            b"z",
        ];
        for round in 0..4000 {
            let mut stream = if below(4) == 0 { BOM.to_vec() } else { Vec::new() };
            for _ in 0..below(24) {
                stream.extend_from_slice(PARTS[below(PARTS.len() as u64) as usize]);
            }
            let (whole, mut decoder, _) = decode_pieces([&stream[..]], 1 << 20);
            let mut events: Vec<Vec<u8>> = Vec::new();
            let mut take = |block: Block<'_>| {
                if block.dispatches {
                    events.push(block.data_lines().flat_map(|line| [line, b"\n"].concat()).collect());
                }
            };
            for block in &whole {
                take(Block { raw: &block.raw, dispatches: block.dispatches, has_id: block.has_id });
            }
            if let Some(block) = decoder.finish() {
                take(block);
            }
            assert_eq!(events, dispatched_by_the_book(&stream), "round {round}: {stream:?}");
            let mut pieces = Vec::new();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(1 + below(rest.len() as u64) as usize);
                pieces.push(piece);
                rest = after;
            }
            assert_eq!(decode_pieces(pieces, 1 << 20).0, whole, "round {round}: {stream:?}");
            assert_eq!(decode_pieces(stream.chunks(1), 1 << 20).0, whole, "round {round}: {stream:?}");
        }
    }
}
