//! HTTP/1.1 without I/O: strict heads (RFC 9112), body framing, and the heads that we write ourselves.
//! Whatever two parsers could read differently is refused, so nothing can be smuggled past a peer of ours.
//!
//! Heads are split here in one pass from left to right, instead of by `httparse` after a second, stricter pass: only
//! one reading of the bytes exists, and a refusal names the first offending byte however the bytes were split.
//! `httparse` lends the header type, and is the oracle that the tests compare with.

mod body;
mod chunk;
mod date;
mod fields;
mod refusal;
mod request;
#[cfg(test)]
mod request_tests;
mod response;
mod scan;
#[cfg(test)]
mod testing;
mod write;
#[cfg(test)]
mod write_tests;

pub use body::{BodyDecoder, Piece};
pub use chunk::{CHUNK_END, ChunkHead, LAST_CHUNK};
pub use date::DateLine;
pub use refusal::Refusal;
pub use request::{RequestHead, is_dot_segment, parse_request};
pub use response::{ResponseHead, parse_response};
pub use write::{
    ClientHead, reason_phrase, write_client_response, write_own_response_head, write_upstream_request,
};

use crate::limits;

/// Empty lines (CRLF) tolerated before a request line. RFC 9112 section 2.2 asks for at least one.
pub const LEADING_EMPTY_LINES_MAX: usize = 4;
/// Bytes of a method. The longest registered one (UPDATEREDIRECTREF) has 17; beyond, RFC 9112 section 3 asks for 501.
pub const METHOD_BYTES_MAX: usize = 32;
/// List elements of all Connection fields of a head together. Each is compared with every field name on forwarding.
pub const CONNECTION_TOKENS_MAX: usize = 32;
/// Bytes of chunk-size lines by which a body may exceed what its payload pays for (two bytes of line per byte of
/// payload, and 16 per chunk). Bounds the work that chunk extensions can cost without carrying anything.
pub const CHUNK_EXCESS_BYTES_MAX: u32 = 16 * 1024;

const _: () =
    assert!(LEADING_EMPTY_LINES_MAX * 2 < limits::HEAD_BYTES_MAX, "empty lines must leave room for a head");
const _: () =
    assert!(METHOD_BYTES_MAX < limits::HEAD_BYTES_MAX, "a method that fits must leave room for its head");
const _: () = assert!(
    CHUNK_EXCESS_BYTES_MAX as usize >= limits::CHUNK_LINE_BYTES_MAX,
    "a single line within its own limit is never an excess"
);

/// The two protocol versions that are spoken; every other is refused with 505.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// HTTP/1.0: no chunked coding, closes unless `Connection: keep-alive`.
    Http10,
    /// HTTP/1.1.
    Http11,
}

/// How the end of a message's body is found (RFC 9112 section 6.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// No body follows the head.
    None,
    /// Exactly this many bytes follow.
    Length(u64),
    /// The chunked transfer coding (RFC 9112 section 7.1).
    Chunked,
    /// Everything until the peer closes; responses only.
    UntilClose,
}

/// Bounds of one head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes of the whole head: leading empty lines, first line and final blank line included.
    pub head_bytes: usize,
    /// Header fields; values above [`limits::HEADERS_MAX`] mean that one.
    pub headers: usize,
    /// Bytes of the request target as sent; without meaning for responses.
    pub target_bytes: usize,
}

impl Default for HeadLimits {
    fn default() -> Self {
        HeadLimits {
            head_bytes: limits::HEAD_BYTES_MAX,
            headers: limits::HEADERS_MAX,
            target_bytes: limits::TARGET_BYTES_MAX,
        }
    }
}

/// Fields of a head that is parsed without an allocation: nearly every head has fewer, and slots for the most that one may have
/// take longer to lay out than most heads take to parse.
const HEADERS_FEW: usize = 32;

/// Storage for the parsed fields of one head, owned by the caller.
#[derive(Debug)]
pub struct HeaderSlots<'b> {
    few: [httparse::Header<'b>; HEADERS_FEW],
    /// All of them, where they are more.
    many: Vec<httparse::Header<'b>>,
    count: usize,
}

/// Empty slots for a call of [`parse_request`] or [`parse_response`].
pub fn header_slots<'b>() -> HeaderSlots<'b> {
    HeaderSlots { few: [httparse::EMPTY_HEADER; HEADERS_FEW], many: Vec::new(), count: 0 }
}

impl<'b> HeaderSlots<'b> {
    fn clear(&mut self) {
        self.many.clear();
        self.count = 0;
    }

    fn push(&mut self, header: httparse::Header<'b>) {
        if let Some(slot) = self.few.get_mut(self.count) {
            *slot = header;
        } else {
            if self.count == HEADERS_FEW {
                self.many.extend_from_slice(&self.few);
            }
            self.many.push(header);
        }
        self.count += 1;
    }

    fn filled(&self) -> &[httparse::Header<'b>] {
        self.few.get(..self.count).unwrap_or(&self.many)
    }
}
