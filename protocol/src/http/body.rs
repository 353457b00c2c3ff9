//! Where a body ends: fed on any split of the bytes, it hands out payload without keeping any of it.
//! Chunked bodies follow RFC 9112 section 7.1 strictly; trailers are checked, bounded and dropped.
//!
//! ```text
//! Size ─digit─► Size ─";"─► Extension        Data ─last byte─► DataCr ─CR─► DataLf ─LF─► Size
//!   └──CR──► SizeLf ◄──CR──────┘
//!               ├─LF, size > 0─► Data
//!               └─LF, size = 0─► TrailerStart ─tchar─► TrailerName ─":"─► TrailerValue ─CR─► TrailerLf ─LF─┐
//!                                  │  ▲────────────────────────────────────────────────────────────────────┘
//!                                  └─CR─► EndLf ─LF─► Done           any other byte, any state ─► Refused(why)
//! ```

use super::scan::{is_token, is_value};
use super::{CHUNK_EXCESS_BYTES_MAX, Framing, Refusal};
use crate::limits::{CHUNK_LINE_BYTES_MAX, TRAILER_BYTES_MAX};

/// Digits of a chunk size: those of 2^64 - 1.
const SIZE_DIGITS_MAX: u8 = 16;
/// Of those that are read at once.
const PLAIN_SIZE_DIGITS_MAX: usize = 8;
/// Bytes of line that each chunk is granted before they count as excess.
const CHUNK_GRANT_BYTES: u64 = 16;

/// What [`BodyDecoder::next`] found at the start of its input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece<'a> {
    /// Payload, never empty.
    Data(&'a [u8]),
    /// The body is complete; the rest of the input belongs to the next message.
    End,
    /// All input has been consumed, and the body goes on.
    NeedMore,
}

/// Incremental decoder of one body.
///
/// Trailer fields are dropped: RFC 9110 section 6.5.1 forbids merging them into the head unless their definition is
/// known to permit it, and no field of the protocols relayed here is sent as a trailer.
///
/// A refusal is final: every further call repeats it. Neither it nor the payload before it depends on how the bytes
/// were split.
#[derive(Clone, Debug)]
pub struct BodyDecoder {
    state: State,
    /// Hex digits read of the chunk size at hand; 0 <= digits <= SIZE_DIGITS_MAX.
    digits: u8,
    /// Bytes read of the chunk-size line or trailer section at hand.
    line_bytes: u16,
    /// Line bytes not paid for by payload; 0 <= excess <= CHUNK_EXCESS_BYTES_MAX.
    excess: u32,
    /// Payload bytes that must still come: of the body (Length), of the chunk (Chunked, its size while being read).
    remaining: u64,
    /// Payload bytes that may still come before the body is too large.
    allowed: u64,
}

const _: () = assert!(size_of::<BodyDecoder>() <= 48, "one per connection in the slab");
const _: () = assert!(CHUNK_LINE_BYTES_MAX < u16::MAX as usize, "line_bytes counts one past it");
const _: () = assert!(TRAILER_BYTES_MAX < u16::MAX as usize, "line_bytes counts one past it");

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Length,
    UntilClose,
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
    Refused(Refusal),
}

impl BodyDecoder {
    /// A decoder for one body of at most `body_bytes_max` bytes of payload. A length above that is refused by the
    /// first call of [`next`](Self::next), before any byte of the body has arrived.
    pub fn new(framing: Framing, body_bytes_max: u64) -> Self {
        let (state, remaining) = match framing {
            Framing::None | Framing::Length(0) => (State::Done, 0),
            Framing::Length(length) if length > body_bytes_max => (State::Refused(Refusal::BodyTooLarge), 0),
            Framing::Length(length) => (State::Length, length),
            Framing::Chunked => (State::Size, 0),
            Framing::UntilClose => (State::UntilClose, 0),
        };
        BodyDecoder { state, digits: 0, line_bytes: 0, excess: 0, remaining, allowed: body_bytes_max }
    }

    /// The next piece; advances `input` past what it consumed. Call until `NeedMore` (the input is then empty) or
    /// `End`.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, Refusal> {
        loop {
            match self.state {
                State::Done => return Ok(Piece::End),
                State::Refused(refusal) => return Err(refusal),
                State::Length | State::Data | State::UntilClose => {
                    if input.is_empty() {
                        return Ok(Piece::NeedMore);
                    }
                    if self.state != State::UntilClose {
                        return Ok(Piece::Data(self.payload(input)));
                    }
                    let (data, rest) = input.split_at(at_most(input.len(), self.allowed));
                    if !data.is_empty() {
                        self.allowed -= data.len() as u64;
                        *input = rest;
                        return Ok(Piece::Data(data));
                    }
                    self.state = State::Refused(Refusal::BodyTooLarge);
                }
                State::DataCr if input.starts_with(b"\r\n") => {
                    *input = &input[2..];
                    self.state = State::Size;
                }
                _ => {
                    if self.state == State::Size && self.line_bytes == 0 && self.take_plain_size(input) {
                        continue;
                    }
                    let [byte, rest @ ..] = *input else { return Ok(Piece::NeedMore) };
                    *input = rest;
                    self.state = self.step(*byte).unwrap_or_else(State::Refused);
                }
            }
        }
    }

    /// The body is complete.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the transport's end, if it came now, would be a legal end of the body rather than a truncation.
    pub fn eof_is_end(&self) -> bool {
        matches!(self.state, State::Done | State::UntilClose)
    }

    /// Payload of a known length; `remaining` > 0 and the input is not empty.
    fn payload<'a>(&mut self, input: &mut &'a [u8]) -> &'a [u8] {
        let (data, rest) = input.split_at(at_most(input.len(), self.remaining));
        *input = rest;
        self.remaining -= data.len() as u64;
        if self.remaining == 0 {
            self.state = if self.state == State::Data { State::DataCr } else { State::Done };
        }
        data
    }

    /// A chunk-size line that is here whole, of few digits and nothing else: what nearly all are. False: it is none, and nothing was
    /// taken.
    fn take_plain_size(&mut self, input: &mut &[u8]) -> bool {
        let mut size = 0;
        for digits in 0..=PLAIN_SIZE_DIGITS_MAX {
            match input.get(digits) {
                Some(b'\r') if digits > 0 && input.get(digits + 1) == Some(&b'\n') => {
                    // As the digits and the CR would have been counted.
                    self.line_bytes = digits as u16 + 1;
                    self.remaining = size;
                    *input = &input[digits + 2..];
                    self.state = self.begin_chunk().unwrap_or_else(State::Refused);
                    return true;
                }
                Some(&byte) => match hex_digit(byte) {
                    Some(digit) => size = size << 4 | u64::from(digit),
                    None => return false,
                },
                None => return false,
            }
        }
        false
    }

    /// One byte of framing.
    fn step(&mut self, byte: u8) -> Result<State, Refusal> {
        match self.state {
            State::Size => {
                self.count_line_byte()?;
                match (byte, hex_digit(byte)) {
                    (_, Some(_)) if self.digits == SIZE_DIGITS_MAX => Err(Refusal::ChunkSizeOverflow),
                    (_, Some(digit)) => {
                        self.digits += 1;
                        self.remaining = self.remaining << 4 | u64::from(digit);
                        Ok(State::Size)
                    }
                    (b'\r', _) if self.digits > 0 => Ok(State::SizeLf),
                    (b';', _) if self.digits > 0 => Ok(State::Extension),
                    (b'\n', _) => Err(Refusal::BareLf),
                    _ => Err(Refusal::BadChunkSize),
                }
            }
            State::Extension => {
                self.count_line_byte()?;
                match byte {
                    b'\r' => Ok(State::SizeLf),
                    b'\n' => Err(Refusal::BareLf),
                    _ if is_value(byte) => Ok(State::Extension),
                    _ => Err(Refusal::BadChunkExtension),
                }
            }
            State::SizeLf if byte == b'\n' => self.begin_chunk(),
            State::DataCr => match byte {
                b'\r' => Ok(State::DataLf),
                b'\n' => Err(Refusal::BareLf),
                _ => Err(Refusal::BadChunkEnd),
            },
            State::DataLf if byte == b'\n' => Ok(State::Size),
            State::SizeLf | State::DataLf => Err(Refusal::BareCr),
            _ => self.step_trailer(byte),
        }
    }

    fn step_trailer(&mut self, byte: u8) -> Result<State, Refusal> {
        self.line_bytes += 1;
        if usize::from(self.line_bytes) > TRAILER_BYTES_MAX {
            return Err(Refusal::TrailersTooLarge);
        }
        match (self.state, byte) {
            (State::TrailerLf, b'\n') => Ok(State::TrailerStart),
            (State::EndLf, b'\n') => Ok(State::Done),
            (State::TrailerLf | State::EndLf, _) => Err(Refusal::BareCr),
            (_, b'\n') => Err(Refusal::BareLf),
            (State::TrailerStart, b'\r') => Ok(State::EndLf),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLf),
            (State::TrailerName, b':') => Ok(State::TrailerValue),
            (State::TrailerStart | State::TrailerName, _) if is_token(byte) => Ok(State::TrailerName),
            (State::TrailerValue, _) if is_value(byte) => Ok(State::TrailerValue),
            _ => Err(Refusal::BadTrailer),
        }
    }

    fn count_line_byte(&mut self) -> Result<(), Refusal> {
        self.line_bytes += 1;
        // The LF is still to come, and counts.
        if usize::from(self.line_bytes) >= CHUNK_LINE_BYTES_MAX {
            return Err(Refusal::ChunkLineTooLong);
        }
        Ok(())
    }

    /// The chunk-size line is complete. Extensions cost work and carry nothing, so payload must pay for them; the
    /// rule is that of Go's net/http (CVE-2023-39326).
    fn begin_chunk(&mut self) -> Result<State, Refusal> {
        let line_bytes = u64::from(self.line_bytes) + 1;
        let paid = CHUNK_GRANT_BYTES.saturating_add(self.remaining.saturating_mul(2));
        let excess = (u64::from(self.excess) + line_bytes).saturating_sub(paid);
        if excess > u64::from(CHUNK_EXCESS_BYTES_MAX) {
            return Err(Refusal::ChunkExcess);
        }
        self.excess = excess as u32;
        (self.digits, self.line_bytes) = (0, 0);
        if self.remaining == 0 {
            return Ok(State::TrailerStart);
        }
        self.allowed = self.allowed.checked_sub(self.remaining).ok_or(Refusal::BodyTooLarge)?;
        Ok(State::Data)
    }
}

/// The smaller of the two, as a length of a slice.
fn at_most(len: usize, bound: u64) -> usize {
    usize::try_from(bound).map_or(len, |bound| bound.min(len))
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, mutate};
    use super::super::{CHUNK_END, ChunkHead, LAST_CHUNK};
    use super::*;

    /// What a whole input means: payload, then how it ended, and the bytes left for the next message.
    #[derive(PartialEq, Eq, Debug)]
    struct Meaning {
        payload: Vec<u8>,
        end: Result<bool, Refusal>,
        left: usize,
    }

    /// Feeds the pieces that `cut` makes of the input.
    fn decode(
        framing: Framing,
        bytes_max: u64,
        input: &[u8],
        mut cut: impl FnMut(usize) -> usize,
    ) -> Meaning {
        let mut decoder = BodyDecoder::new(framing, bytes_max);
        let (mut payload, mut at) = (Vec::new(), 0);
        loop {
            let whole = &input[at..at + cut(input.len() - at)];
            let mut part = whole;
            loop {
                match decoder.next(&mut part) {
                    Ok(Piece::Data(data)) => {
                        assert!(!data.is_empty());
                        payload.extend_from_slice(data);
                    }
                    Ok(Piece::NeedMore) => {
                        assert!(part.is_empty() && !decoder.is_done());
                        break;
                    }
                    Ok(Piece::End) => {
                        assert!(decoder.is_done() && decoder.eof_is_end());
                        return Meaning {
                            payload,
                            end: Ok(true),
                            left: input.len() - at - whole.len() + part.len(),
                        };
                    }
                    Err(refusal) => {
                        assert_eq!(decoder.next(&mut part), Err(refusal), "a refusal is final");
                        assert!(!decoder.is_done() && !decoder.eof_is_end());
                        return Meaning { payload, end: Err(refusal), left: 0 };
                    }
                }
            }
            at += whole.len();
            if at == input.len() {
                return Meaning { payload, end: Ok(decoder.eof_is_end()), left: 0 };
            }
        }
    }

    fn whole(framing: Framing, bytes_max: u64, input: &[u8]) -> Meaning {
        decode(framing, bytes_max, input, |left| left)
    }

    /// The same by the letter of RFC 9112 section 7.1, from the complete input; `None` when it is not legal.
    fn model(input: &[u8]) -> Option<(Vec<u8>, usize)> {
        let mut payload = Vec::new();
        let mut at = 0;
        loop {
            let end = at + input[at..].windows(2).position(|pair| pair == b"\r\n")?;
            let line = String::from_utf8_lossy(&input[at..end]);
            let (size, extension) = line.split_once(';').unwrap_or((&line, ""));
            let hex =
                !size.is_empty() && size.len() <= 16 && size.bytes().all(|byte| byte.is_ascii_hexdigit());
            let legal = extension.chars().all(|c| c == '\t' || !c.is_ascii_control());
            if !hex || !legal || end + 2 - at > CHUNK_LINE_BYTES_MAX {
                return None;
            }
            let size = usize::from_str_radix(size, 16).ok()?;
            at = end + 2;
            if size == 0 {
                break;
            }
            payload.extend_from_slice(input.get(at..at.checked_add(size)?)?);
            at += size;
            input[at..].starts_with(b"\r\n").then_some(())?;
            at += 2;
        }
        loop {
            let end = at + input[at..].windows(2).position(|pair| pair == b"\r\n")?;
            let line = &input[at..end];
            at = end + 2;
            if line.is_empty() {
                return Some((payload, at));
            }
            let colon = line.iter().position(|byte| *byte == b':')?;
            let legal =
                colon > 0 && line[..colon].iter().all(|b| is_token(*b)) && line.iter().all(|b| is_value(*b));
            legal.then_some(())?;
        }
    }

    #[test]
    fn a_decoder_is_small() {
        assert!(size_of::<BodyDecoder>() <= 32);
    }

    #[test]
    fn bodies_without_chunks_end_where_they_say() {
        let data = |payload: &[u8], end, left| Meaning { payload: payload.to_vec(), end, left };
        let large = Err(Refusal::BodyTooLarge);
        for (framing, bytes_max, input, meaning) in [
            (Framing::None, 0, &b"next"[..], data(b"", Ok(true), 4)),
            (Framing::Length(0), 0, b"", data(b"", Ok(true), 0)),
            (Framing::Length(3), 3, b"abcnext", data(b"abc", Ok(true), 4)),
            (Framing::Length(3), 3, b"abc", data(b"abc", Ok(true), 0)),
            (Framing::Length(3), 3, b"ab", data(b"ab", Ok(false), 0)),
            (Framing::Length(4), 3, b"", data(b"", large, 0)),
            (Framing::Length(u64::MAX), u64::MAX, b"ab", data(b"ab", Ok(false), 0)),
            (Framing::UntilClose, 3, b"", data(b"", Ok(true), 0)),
            (Framing::UntilClose, 3, b"abc", data(b"abc", Ok(true), 0)),
            (Framing::UntilClose, 3, b"abcd", data(b"abc", large, 0)),
        ] {
            assert_eq!(whole(framing, bytes_max, input), meaning, "{framing:?}");
            assert_eq!(decode(framing, bytes_max, input, |left| left.min(1)), meaning, "{framing:?}");
        }
    }

    fn refused() -> Vec<(Vec<u8>, Refusal)> {
        let long = format!("1;{}\r\n", "x".repeat(CHUNK_LINE_BYTES_MAX - 3));
        let trailers = format!("0\r\nX: {}\r\n\r\n", "y".repeat(TRAILER_BYTES_MAX));
        let excess = format!("1;{}\r\nx\r\n", "x".repeat(CHUNK_LINE_BYTES_MAX - 4)).repeat(80);
        let mut refused: Vec<(Vec<u8>, Refusal)> = [
            ("\r\n", Refusal::BadChunkSize),
            ("x\r\n", Refusal::BadChunkSize),
            ("+1\r\n", Refusal::BadChunkSize),
            ("-1\r\n", Refusal::BadChunkSize),
            ("0x1\r\n", Refusal::BadChunkSize),
            (" 1\r\n", Refusal::BadChunkSize),
            ("1 \r\n", Refusal::BadChunkSize),
            ("1 ;x\r\n", Refusal::BadChunkSize),
            ("1\t\r\n", Refusal::BadChunkSize),
            (";x\r\n", Refusal::BadChunkSize),
            ("1g\r\n", Refusal::BadChunkSize),
            ("00000000000000001\r\n", Refusal::ChunkSizeOverflow),
            ("10000000000000000\r\n", Refusal::ChunkSizeOverflow),
            ("ffffffffffffffff\r\n", Refusal::BodyTooLarge),
            ("65\r\n", Refusal::BodyTooLarge),
            ("1\nx\r\n", Refusal::BareLf),
            ("1\rx\r\n", Refusal::BareCr),
            ("1;a\nb\r\n", Refusal::BareLf),
            ("1;a\rb\r\n", Refusal::BareCr),
            ("1;a\0\r\n", Refusal::BadChunkExtension),
            (&long, Refusal::ChunkLineTooLong),
            (&excess, Refusal::ChunkExcess),
            ("1\r\nxy\r\n", Refusal::BadChunkEnd),
            ("1\r\nx\n", Refusal::BareLf),
            ("1\r\nx\r1", Refusal::BareCr),
            ("0\r\n\n", Refusal::BareLf),
            ("0\r\n\rx", Refusal::BareCr),
            ("0\r\nX: y\n\r\n", Refusal::BareLf),
            ("0\r\nX: y\rz\r\n", Refusal::BareCr),
            ("0\r\nX\n", Refusal::BareLf),
            ("0\r\n X: y\r\n\r\n", Refusal::BadTrailer),
            ("0\r\nX: y\r\n z\r\n\r\n", Refusal::BadTrailer),
            ("0\r\nX : y\r\n\r\n", Refusal::BadTrailer),
            ("0\r\n: y\r\n\r\n", Refusal::BadTrailer),
            ("0\r\nX\r\n\r\n", Refusal::BadTrailer),
            ("0\r\nX: \0\r\n\r\n", Refusal::BadTrailer),
            (&trailers, Refusal::TrailersTooLarge),
        ]
        .map(|(input, refusal)| (input.as_bytes().to_vec(), refusal))
        .into();
        refused.push((b"3\r\nabc\r\n".repeat(34), Refusal::BodyTooLarge));
        refused
    }

    const LEGAL: &[(&str, &str)] = &[
        ("0\r\n\r\n", ""),
        ("5\r\nhello\r\n0\r\n\r\n", "hello"),
        ("00000005\r\nhello\r\n000\r\n\r\n", "hello"),
        ("A;a=b;c=\"d e\"\r\n0123456789\r\n1\r\n\n\r\n0;x\r\n\r\n", "0123456789\n"),
        (
            "a;\r\n\r\n\r\n\r\n0\r\n\r\r\n0\r\nX:\r\nDigest: \u{e4} b\t\r\nContent-Length: 7\r\n\r\n",
            "\r\n\r\n\r\n0\r\n\r",
        ),
    ];

    #[test]
    fn every_chunk_rule_refuses_what_it_names_at_every_split() {
        for (input, refusal) in refused() {
            let meaning = whole(Framing::Chunked, 100, &input);
            assert_eq!(meaning.end, Err(refusal), "{}", input.escape_ascii());
            assert_eq!(decode(Framing::Chunked, 100, &input, |left| left.min(1)), meaning);
            for split in 1..input.len() {
                let mut parts = [split].into_iter();
                assert_eq!(
                    decode(Framing::Chunked, 100, &input, |left| parts.next().unwrap_or(left)),
                    meaning
                );
            }
        }
    }

    #[test]
    fn legal_chunks_are_decoded_and_trailers_dropped_at_every_split() {
        for (input, payload) in LEGAL {
            let input = [input.as_bytes(), b"GET"].concat();
            let expected = Meaning { payload: payload.as_bytes().to_vec(), end: Ok(true), left: 3 };
            for split in 0..=input.len() {
                let mut parts = [split].into_iter();
                let meaning = decode(Framing::Chunked, 100, &input, |left| parts.next().unwrap_or(left));
                assert_eq!(meaning, expected, "{} split at {split}", input.escape_ascii());
            }
            for length in 0..input.len() - 3 {
                assert_eq!(
                    whole(Framing::Chunked, 100, &input[..length]).end,
                    Ok(false),
                    "a truncation is not an end"
                );
            }
        }
    }

    #[test]
    fn long_extensions_pass_where_payload_pays_for_them() {
        let chunk = format!("80;{}\r\n{}\r\n", "x".repeat(200), "y".repeat(128));
        let input = format!("{}0\r\n\r\n", chunk.repeat(1000));
        let meaning = whole(Framing::Chunked, u64::MAX, input.as_bytes());
        assert_eq!((meaning.payload.len(), meaning.end), (128_000, Ok(true)));
    }

    #[test]
    fn what_we_write_as_chunks_is_what_is_read() {
        for seed in 0..300 {
            let mut random = Random(seed);
            let mut input = Vec::new();
            let mut payload = Vec::new();
            for _ in 0..random.below(6) {
                let length = 1 + random.below(600);
                let data: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                input.extend_from_slice(ChunkHead::new(data.len()).as_bytes());
                input.extend_from_slice(&data);
                input.extend_from_slice(CHUNK_END);
                payload.extend_from_slice(&data);
            }
            input.extend_from_slice(LAST_CHUNK);
            input.extend_from_slice(b"5\r\n");
            let meaning = decode(Framing::Chunked, u64::MAX, &input, |left| random.below(left.min(40) + 1));
            assert_eq!(meaning, Meaning { payload, end: Ok(true), left: 3 }, "seed {seed}");
        }
    }

    #[test]
    fn random_bodies_mean_what_the_model_says_however_they_are_split() {
        let mut legal = 0;
        for seed in 0..20_000 {
            let mut random = Random(seed);
            let mut input = random.pick(LEGAL).0.as_bytes().to_vec();
            mutate(&mut input, &mut random);
            let meaning = whole(Framing::Chunked, u64::MAX, &input);
            let split = decode(Framing::Chunked, u64::MAX, &input, |left| random.below(left.min(7) + 1));
            assert_eq!(split, meaning, "seed {seed}: {}", input.escape_ascii());
            let decoded = (meaning.end == Ok(true)).then(|| (meaning.payload, input.len() - meaning.left));
            legal += u32::from(decoded.is_some());
            assert_eq!(decoded, model(&input), "seed {seed}: {}", input.escape_ascii());
        }
        assert!((5_000..19_000).contains(&legal), "both kinds must occur: {legal}");
    }
}
