//! HTTP/1.1 as the bench tools need it: request heads for the backend, whole responses for the load generator, chunked
//! bodies for both. Strict where a fault must be seen (chunk framing, lengths), plain elsewhere.

use std::fmt;

/// Bytes of a head that are accepted.
pub const HEAD_BYTES_MAX: usize = 64 << 10;

/// What is wrong with the bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The head is too large, or no head of HTTP/1.
    Head,
    /// A chunk has no valid size, or does not end where it said.
    Chunk,
    /// A length or transfer coding that cannot be understood.
    Length,
    /// Bytes after the end of a response that no request asked for.
    Surplus,
}

impl fmt::Display for Malformed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Head => "the head is too large, or not HTTP/1",
            Self::Chunk => "chunk framing is broken",
            Self::Length => "the body's length cannot be understood",
            Self::Surplus => "bytes follow the end of the response",
        })
    }
}

impl std::error::Error for Malformed {}

/// Takes chunked framing off, piece by piece.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChunkDecoder {
    state: ChunkState,
    /// Bytes of the current chunk that are still to come, or the size read so far.
    left: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    /// Before the first digit of a size.
    #[default]
    SizeStart,
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line; a CR here ends the body.
    TrailerStart,
    Trailer,
    EndLf,
    End,
}

impl ChunkDecoder {
    /// Takes bytes, hands over the body bytes among them, and returns how many it used: less than all only at the end.
    pub fn feed(&mut self, bytes: &[u8], mut on_body: impl FnMut(&[u8])) -> Result<usize, Malformed> {
        use ChunkState as S;
        let mut at = 0;
        while at < bytes.len() && self.state != S::End {
            if self.state == S::Data {
                let take = (bytes.len() - at).min(usize::try_from(self.left).unwrap_or(usize::MAX));
                on_body(&bytes[at..at + take]);
                at += take;
                self.left -= take as u64;
                if self.left == 0 {
                    self.state = S::DataCr;
                }
                continue;
            }
            let byte = bytes[at];
            at += 1;
            self.state = match (self.state, byte) {
                (S::SizeStart | S::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                    let digit = (byte as char).to_digit(16).map_or(0, u64::from);
                    if self.left >> 56 != 0 {
                        return Err(Malformed::Chunk);
                    }
                    self.left = self.left << 4 | digit;
                    S::Size
                }
                (S::Size, b'\r') => S::SizeLf,
                (S::Size, b';' | b' ' | b'\t') => S::Extension,
                (S::Extension, b'\r') => S::SizeLf,
                (S::Extension, _) if byte != b'\n' => S::Extension,
                (S::SizeLf, b'\n') if self.left == 0 => S::TrailerStart,
                (S::SizeLf, b'\n') => S::Data,
                (S::DataCr, b'\r') => S::DataLf,
                (S::DataLf, b'\n') => S::SizeStart,
                (S::TrailerStart, b'\r') => S::EndLf,
                (S::TrailerStart | S::Trailer, b'\n') if self.state == S::Trailer => S::TrailerStart,
                (S::TrailerStart | S::Trailer, _) if byte != b'\n' => S::Trailer,
                (S::EndLf, b'\n') => S::End,
                _ => return Err(Malformed::Chunk),
            };
        }
        Ok(at)
    }

    /// Whether the last chunk and its trailers have been read.
    pub fn ended(&self) -> bool {
        self.state == ChunkState::End
    }
}

/// How long a body is.
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// Chunked framing.
    Chunked(ChunkDecoder),
    /// This many bytes are still to come.
    Length(u64),
    /// Up to the end of the connection (responses only).
    UntilClose,
}

impl Body {
    /// Takes bytes, hands over the body bytes among them, and returns how many it used.
    pub fn feed(&mut self, bytes: &[u8], mut on_body: impl FnMut(&[u8])) -> Result<usize, Malformed> {
        match self {
            Self::Chunked(decoder) => decoder.feed(bytes, on_body),
            Self::Length(left) => {
                let take = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                if take > 0 {
                    on_body(&bytes[..take]);
                }
                *left -= take as u64;
                Ok(take)
            }
            Self::UntilClose => {
                on_body(bytes);
                Ok(bytes.len())
            }
        }
    }

    /// Whether the body is complete by its own framing.
    pub fn ended(&self) -> bool {
        match self {
            Self::Chunked(decoder) => decoder.ended(),
            Self::Length(left) => *left == 0,
            Self::UntilClose => false,
        }
    }
}

/// Finds the end of a head: the index after its blank line.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// A request's head.
#[derive(Debug)]
pub struct Request<'a> {
    /// GET, POST, …
    pub method: &'a str,
    /// The target before `?`.
    pub path: &'a str,
    /// The target after `?`, or empty.
    pub query: &'a str,
    /// The value of the header `x-fake`, or empty.
    pub fake: &'a str,
    /// How the body ends.
    pub body: Body,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
    /// HTTP/1.1 or later: chunked framing is understood.
    pub chunked_allowed: bool,
}

impl<'a> Request<'a> {
    /// Reads a whole head, blank line included.
    pub fn parse(head: &'a [u8]) -> Result<Self, Malformed> {
        let head = std::str::from_utf8(head).map_err(|_| Malformed::Head)?;
        let mut lines = head.split("\r\n");
        let mut words = lines.next().unwrap_or_default().split(' ');
        let (method, target, version) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        if !target.starts_with('/') || !version.starts_with("HTTP/1.") {
            return Err(Malformed::Head);
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let modern = version != "HTTP/1.0";
        let mut request = Self {
            method,
            path,
            query,
            fake: "",
            body: Body::Length(0),
            keep_alive: modern,
            chunked_allowed: modern,
        };
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            if name.eq_ignore_ascii_case("x-fake") {
                request.fake = value;
            } else if let Some(keep_alive) = connection_header(name, value) {
                request.keep_alive = keep_alive;
            } else if let Some(body) = body_header(name, value)? {
                request.body = body;
            }
        }
        Ok(request)
    }
}

/// What a response has been, once it is over or its head is there.
#[derive(Clone, Copy, Debug)]
pub struct ResponseHead {
    /// 200, 429, …
    pub status: u16,
    /// Whether `content-type` says text/event-stream.
    pub event_stream: bool,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
}

/// Reads one response after the other from a connection.
#[derive(Debug, Default)]
pub struct ResponseReader {
    /// A head whose end has not arrived.
    partial: Vec<u8>,
    current: Option<(ResponseHead, Body)>,
}

impl ResponseReader {
    /// Takes bytes and hands over body bytes with the head they belong to. `Ok(true)`: the response is complete, and no byte
    /// follows it. 1xx heads are skipped.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        mut on_body: impl FnMut(&ResponseHead, &[u8]),
    ) -> Result<bool, Malformed> {
        let kept;
        let mut rest = bytes;
        if self.current.is_none() {
            if self.partial.is_empty() && head_end(bytes).is_some() {
                // The usual case: the whole head in one piece needs no copy.
            } else {
                self.partial.extend_from_slice(bytes);
                if head_end(&self.partial).is_none() {
                    return if self.partial.len() > HEAD_BYTES_MAX {
                        Err(Malformed::Head)
                    } else {
                        Ok(false)
                    };
                }
                kept = std::mem::take(&mut self.partial);
                rest = &kept;
            }
        }
        loop {
            if self.current.is_none() {
                let Some(end) = head_end(rest) else {
                    self.partial = rest.to_vec();
                    return Ok(false);
                };
                let (head, body) = parse_response_head(&rest[..end])?;
                rest = &rest[end..];
                if (100..200).contains(&head.status) {
                    continue;
                }
                self.current = Some((head, body));
            }
            let Some((head, body)) = &mut self.current else { unreachable!("set above") };
            let used = body.feed(rest, |piece| on_body(head, piece))?;
            if !body.ended() {
                return Ok(false);
            }
            return if used == rest.len() { Ok(true) } else { Err(Malformed::Surplus) };
        }
    }

    /// The head of the response being read.
    pub fn head(&self) -> Option<ResponseHead> {
        self.current.map(|(head, _)| head)
    }

    /// Whether the end of the connection is a proper end of the response being read.
    pub fn may_close(&self) -> bool {
        matches!(self.current, Some((_, Body::UntilClose)))
    }

    /// Makes ready for the next response.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

fn parse_response_head(head: &[u8]) -> Result<(ResponseHead, Body), Malformed> {
    let head = std::str::from_utf8(head).map_err(|_| Malformed::Head)?;
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|digits| digits.parse().ok())
        .ok_or(Malformed::Head)?;
    let mut parsed =
        ResponseHead { status, event_stream: false, keep_alive: !status_line.starts_with("HTTP/1.0") };
    let mut body = Body::UntilClose;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-type") {
            parsed.event_stream = value.starts_with("text/event-stream");
        } else if let Some(keep_alive) = connection_header(name, value) {
            parsed.keep_alive = keep_alive;
        } else if let Some(framing) = body_header(name, value)? {
            body = framing;
        }
    }
    if status == 204 || status == 304 {
        body = Body::Length(0);
    }
    Ok((parsed, body))
}

fn connection_header(name: &str, value: &str) -> Option<bool> {
    if !name.eq_ignore_ascii_case("connection") {
        None
    } else if value.eq_ignore_ascii_case("close") {
        Some(false)
    } else if value.eq_ignore_ascii_case("keep-alive") {
        Some(true)
    } else {
        None
    }
}

fn body_header(name: &str, value: &str) -> Result<Option<Body>, Malformed> {
    if name.eq_ignore_ascii_case("content-length") {
        value.parse().map(|length| Some(Body::Length(length))).map_err(|_| Malformed::Length)
    } else if name.eq_ignore_ascii_case("transfer-encoding") {
        if value.eq_ignore_ascii_case("chunked") {
            Ok(Some(Body::Chunked(ChunkDecoder::default())))
        } else {
            Err(Malformed::Length)
        }
    } else {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n\
        5;x=y\r\nhello\r\n0006 \r\n world\r\n0\r\nTrailer: 1\r\n\r\n";

    fn read(pieces: &[&[u8]]) -> Result<(String, bool), Malformed> {
        let mut reader = ResponseReader::default();
        let mut body = Vec::new();
        let mut ended = false;
        for piece in pieces {
            assert!(!ended);
            ended = reader.feed(piece, |head, bytes| {
                assert!(head.status == 200 && head.event_stream && head.keep_alive);
                body.extend_from_slice(bytes);
            })?;
        }
        Ok((String::from_utf8(body).unwrap(), ended))
    }

    #[test]
    fn a_response_is_the_same_however_the_bytes_are_cut() {
        let expected = Ok(("hello world".to_owned(), true));
        assert_eq!(read(&[CHUNKED]), expected);
        assert_eq!(read(&CHUNKED.chunks(1).collect::<Vec<_>>()), expected);
        for cut in 0..CHUNKED.len() {
            assert_eq!(read(&[&CHUNKED[..cut], &CHUNKED[cut..]]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_response_that_is_cut_is_not_complete() {
        for cut in 0..CHUNKED.len() {
            assert!(!read(&[&CHUNKED[..cut]]).unwrap().1, "cut at {cut}");
        }
    }

    #[test]
    fn broken_chunks_are_malformed() {
        for chunks in ["zz\r\n", "\r\n", "5\nhello", "2\r\nhello", "1\r\na\n", "0\r\n\n", "5;\n", "0\r\na\nb"]
        {
            let mut decoder = ChunkDecoder::default();
            let result = decoder.feed(chunks.as_bytes(), |_| {});
            if chunks == "0\r\na\nb" {
                // A trailer line that ends with LF alone is of no interest here.
                assert!(result.is_ok());
            } else {
                assert_eq!(result, Err(Malformed::Chunk), "{chunks:?}");
            }
        }
    }

    #[test]
    fn bytes_after_the_end_are_surplus() {
        let mut reader = ResponseReader::default();
        let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokX";
        assert_eq!(reader.feed(response, |_, _| {}), Err(Malformed::Surplus));
    }

    #[test]
    fn a_request_says_what_it_asks_for() {
        let head = b"POST /v1/chat/completions?events=3 HTTP/1.1\r\nHost: a\r\nX-Fake: rate=5\r\nContent-Length: 7\r\nConnection: close\r\n\r\n";
        let request = Request::parse(head).unwrap();
        assert_eq!(
            (request.method, request.path, request.query),
            ("POST", "/v1/chat/completions", "events=3")
        );
        assert_eq!((request.fake, request.keep_alive), ("rate=5", false));
        assert!(matches!(request.body, Body::Length(7)));
        assert!(Request::parse(b"GET x HTTP/1.1\r\n\r\n").is_err());
        assert!(Request::parse(b"GET / HTTP/2\r\n\r\n").is_err());
        assert!(Request::parse(b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n").is_err());
    }
}
