//! Bodies in both directions: where they end, whatever the splits, and what a peer reads out of the frames that we write.

use super::heads::{is_content, is_token};
use super::input::{Choices, for_each_split};
use protocol::http::{
    BodyDecoder, CHUNK_END, CHUNK_EXCESS_BYTES_MAX, ChunkHead, Framing, LAST_CHUNK, Piece, Refusal,
};
use protocol::limits::{CHUNK_LINE_BYTES_MAX, TRAILER_BYTES_MAX};

/// The dictionary.
pub const WORDS: &[&str] = &[
    "\x02",
    "0\r\n\r\n",
    "5\r\nhello\r\n",
    "\r\n",
    "\n",
    "\r",
    ";",
    ";a=b",
    ";\"\r\n\"",
    "FFFFFFFFFFFFFFFF",
    "10000000000000000",
    "0x5",
    "+5",
    " 5",
    "5 ",
    "00000",
    "A\r\n0123456789\r\n",
    "0\r\nX: y\r\n\r\n",
    "0;x\r\n",
    "\t",
    "Transfer-Encoding: chunked\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "a: b\r\n",
    ": b\r\n",
    "1\r\nx\r\n",
    "7fffffff",
    "-1",
    "\0",
];

/// What decodes a body.
pub trait Decode: Clone {
    /// As [`BodyDecoder::new`].
    fn new(framing: Framing, body_bytes_max: u64) -> Self;
    /// As [`BodyDecoder::next`].
    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, Refusal>;
    /// As [`BodyDecoder::is_done`].
    fn is_done(&self) -> bool;
    /// As [`BodyDecoder::eof_is_end`].
    fn eof_is_end(&self) -> bool;
}

impl Decode for BodyDecoder {
    fn new(framing: Framing, body_bytes_max: u64) -> Self {
        BodyDecoder::new(framing, body_bytes_max)
    }

    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, Refusal> {
        BodyDecoder::next(self, input)
    }

    fn is_done(&self) -> bool {
        BodyDecoder::is_done(self)
    }

    fn eof_is_end(&self) -> bool {
        BodyDecoder::eof_is_end(self)
    }
}

/// What an input means.
#[derive(PartialEq, Debug)]
struct Meaning {
    payload: Vec<u8>,
    end: End,
}

#[derive(PartialEq, Debug)]
enum End {
    /// Complete, with so many bytes left for the next message.
    Complete(usize),
    /// More is to come; whether the end of the connection would end it.
    Open(bool),
    /// Illegal or too large.
    Refused,
}

/// The target: one byte for the framing, one for the limit and the length, then the bytes on the wire.
pub fn run(data: &[u8]) {
    run_on::<BodyDecoder>(data);
}

/// The target, on another decoder.
pub fn run_on<D: Decode>(data: &[u8]) {
    let mut choices = Choices::of(data);
    let kind = choices.below(4);
    let size = u64::from(choices.byte());
    let framing = [Framing::Chunked, Framing::Length(size % 40), Framing::UntilClose, Framing::None][kind];
    let bytes_max = if size >= 128 { 1 << 40 } else { size };
    let wire = choices.rest();

    let expected = model(framing, bytes_max, wire);
    let mut refusals = Vec::new();
    for_each_split(wire, |pieces| {
        let (meaning, refusal) = decode::<D>(framing, bytes_max, pieces);
        assert_eq!(meaning, expected);
        refusals.push(refusal);
    });
    refusals.dedup();
    assert_eq!(refusals.len(), 1, "the refusal depends on the split");
    if framing == Framing::Chunked {
        agrees_with_httparse(wire, &expected);
    }
    is_framed_as_decoded::<D>(&expected.payload, size);
}

fn decode<D: Decode>(framing: Framing, bytes_max: u64, pieces: &[&[u8]]) -> (Meaning, Option<Refusal>) {
    let mut decoder = D::new(framing, bytes_max);
    let mut payload = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let mut input = *piece;
        loop {
            match decoder.next(&mut input) {
                Ok(Piece::Data(data)) => {
                    assert!(!data.is_empty());
                    payload.extend_from_slice(data);
                    assert!(payload.len() as u64 <= bytes_max, "more than was allowed");
                }
                Ok(Piece::NeedMore) => {
                    assert!(input.is_empty() && !decoder.is_done());
                    break;
                }
                Ok(Piece::End) => {
                    assert!(decoder.is_done() && decoder.eof_is_end());
                    let left =
                        input.len() + pieces[index + 1..].iter().map(|piece| piece.len()).sum::<usize>();
                    return (Meaning { payload, end: End::Complete(left) }, None);
                }
                Err(refusal) => {
                    assert_eq!(decoder.next(&mut &b"0\r\n\r\n"[..]), Err(refusal), "a refusal is final");
                    assert!(!decoder.is_done() && !decoder.eof_is_end());
                    return (Meaning { payload, end: End::Refused }, Some(refusal));
                }
            }
        }
    }
    let end = End::Open(decoder.eof_is_end());
    (Meaning { payload, end }, None)
}

/// The same from the whole input, section by section of RFC 9112.
fn model(framing: Framing, bytes_max: u64, wire: &[u8]) -> Meaning {
    let allowed = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX).min(wire.len());
    match framing {
        Framing::None => Meaning { payload: Vec::new(), end: End::Complete(wire.len()) },
        Framing::Length(length) if length > bytes_max => Meaning { payload: Vec::new(), end: End::Refused },
        Framing::Length(length) => {
            let payload = wire[..allowed(length)].to_vec();
            let complete = payload.len() as u64 == length;
            let end = if complete { End::Complete(wire.len() - payload.len()) } else { End::Open(false) };
            Meaning { payload, end }
        }
        Framing::UntilClose => {
            let payload = wire[..allowed(bytes_max)].to_vec();
            let end = if payload.len() < wire.len() { End::Refused } else { End::Open(true) };
            Meaning { payload, end }
        }
        Framing::Chunked => {
            let mut payload = Vec::new();
            let end = match chunked(bytes_max, wire, &mut payload) {
                Ok(rest) => End::Complete(rest.len()),
                Err(Stop::Open) => End::Open(false),
                Err(Stop::Illegal) => End::Refused,
            };
            Meaning { payload, end }
        }
    }
}

enum Stop {
    Open,
    Illegal,
}

/// Whether `line` may be continued to a legal one, or, when `whole`, is one.
fn chunk_line(line: &[u8], whole: bool) -> Result<u64, Stop> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let extension = &line[digits..];
    let legal = digits <= 16
        && is_content(extension)
        && (extension.is_empty() || (extension[0] == b';' && digits > 0))
        && !(whole && digits == 0)
        // A line that can only become too long is told of with its next byte.
        && line.len() + if whole { 2 } else { 1 } <= CHUNK_LINE_BYTES_MAX;
    legal.then_some(()).ok_or(Stop::Illegal)?;
    let text = std::str::from_utf8(&line[..digits]).unwrap_or_default();
    Ok(u64::from_str_radix(text, 16).unwrap_or(0))
}

fn trailer_line(line: &[u8], whole: bool) -> Result<(), Stop> {
    let colon = line.iter().position(|byte| *byte == b':');
    let name = &line[..colon.unwrap_or(line.len())];
    let legal = match colon {
        None => (name.is_empty() || is_token(name)) && (!whole || line.is_empty()),
        Some(_) => is_token(name) && is_content(line),
    };
    if legal { Ok(()) } else { Err(Stop::Illegal) }
}

/// The line that `rest` begins with; checked by `check` as far as it is there.
fn line<'w, T>(
    rest: &mut &'w [u8],
    check: impl Fn(&[u8], bool) -> Result<T, Stop>,
) -> Result<(&'w [u8], T), Stop> {
    let end = rest.iter().position(|byte| *byte == b'\r' || *byte == b'\n').unwrap_or(rest.len());
    let (line, after) = rest.split_at(end);
    match after {
        [] => check(line, false).and(Err(Stop::Open)),
        [b'\r'] => check(line, true).and(Err(Stop::Open)),
        [b'\r', b'\n', next @ ..] => {
            *rest = next;
            Ok((line, check(line, true)?))
        }
        _ => Err(Stop::Illegal),
    }
}

fn chunked<'w>(bytes_max: u64, wire: &'w [u8], payload: &mut Vec<u8>) -> Result<&'w [u8], Stop> {
    let (mut rest, mut promised, mut excess) = (wire, 0_u64, 0_u64);
    loop {
        let (head, size) = line(&mut rest, chunk_line)?;
        // Extensions are paid for by payload.
        excess = (excess + head.len() as u64 + 2).saturating_sub(size.saturating_mul(2).saturating_add(16));
        if excess > u64::from(CHUNK_EXCESS_BYTES_MAX) {
            return Err(Stop::Illegal);
        }
        if size == 0 {
            break;
        }
        promised = promised.saturating_add(size);
        if promised > bytes_max {
            return Err(Stop::Illegal);
        }
        let here = usize::try_from(size).unwrap_or(usize::MAX).min(rest.len());
        payload.extend_from_slice(&rest[..here]);
        rest = &rest[here..];
        match rest {
            [] | [b'\r'] => return Err(Stop::Open),
            [b'\r', b'\n', next @ ..] => rest = next,
            _ => return Err(Stop::Illegal),
        }
    }
    let trailers = rest;
    loop {
        let taken = trailers.len() - rest.len();
        if taken + rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| at + 1)
            > TRAILER_BYTES_MAX
        {
            return Err(Stop::Illegal);
        }
        let (trailer, ()) = line(&mut rest, trailer_line)?;
        if trailer.is_empty() {
            return Ok(rest);
        }
    }
}

/// It is lenient about the first chunk-size line; where we have taken one, it has read the same number.
fn agrees_with_httparse(wire: &[u8], ours: &Meaning) {
    let Ok(httparse::Status::Complete((at, size))) = httparse::parse_chunk_size(wire) else {
        assert!(
            ours.payload.is_empty() && !matches!(ours.end, End::Complete(_)),
            "httparse sees no chunk size"
        );
        return;
    };
    if ours.payload.is_empty() {
        assert!(
            size == 0 || ours.end == End::Refused || at == wire.len(),
            "the first chunk has {size} bytes"
        );
    } else {
        let first = usize::try_from(size).unwrap_or(usize::MAX).min(ours.payload.len());
        assert!(first > 0 && wire[at..].starts_with(&ours.payload[..first]));
    }
}

/// Payload that we frame comes out as it went in, and ends where we say.
fn is_framed_as_decoded<D: Decode>(payload: &[u8], size: u64) {
    let mut wire = Vec::new();
    for piece in payload.chunks(1 + size as usize % 23) {
        wire.extend_from_slice(ChunkHead::new(piece.len()).as_bytes());
        wire.extend_from_slice(piece);
        wire.extend_from_slice(CHUNK_END);
    }
    wire.extend_from_slice(LAST_CHUNK);
    let (meaning, _) = decode::<D>(Framing::Chunked, payload.len() as u64, &[&wire, b"next"]);
    assert_eq!(meaning, Meaning { payload: payload.to_vec(), end: End::Complete(4) });
    // The least that a peer's decoder may do.
    let (mut rest, mut read) = (&wire[..], Vec::new());
    while let Ok(httparse::Status::Complete((at, size))) = httparse::parse_chunk_size(rest)
        && size > 0
    {
        let end = at + size as usize;
        read.extend_from_slice(&rest[at..end]);
        rest = &rest[end + 2..];
    }
    assert_eq!((&read[..], rest), (payload, LAST_CHUNK));
}
