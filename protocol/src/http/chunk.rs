//! What frames the chunks that we write (RFC 9112 section 7.1), without allocation.
//! A chunk is [`ChunkHead`], payload, [`CHUNK_END`]; the body ends with [`LAST_CHUNK`].

/// Follows the payload of each chunk.
pub const CHUNK_END: &[u8] = b"\r\n";
/// Ends a chunked body; no trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Sixteen hex digits and CRLF.
const BYTES_MAX: usize = 18;

/// The chunk-size line of one chunk: upper-case hex digits without leading zeros, then CRLF.
#[derive(Clone, Copy, Debug)]
pub struct ChunkHead {
    bytes: [u8; BYTES_MAX],
    start: u8,
}

impl ChunkHead {
    /// The line for a chunk of `len` bytes. `len` must not be 0: that would end the body.
    // Inline, and written where it stays: to copy what was just written byte by byte waits for the bytes.
    #[inline]
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "a chunk of no bytes ends the body");
        let mut head = ChunkHead { bytes: [0; BYTES_MAX], start: BYTES_MAX as u8 - 2 };
        head.bytes[BYTES_MAX - 2..].copy_from_slice(b"\r\n");
        let mut rest = len;
        while rest > 0 {
            head.start -= 1;
            head.bytes[usize::from(head.start)] = b"0123456789ABCDEF"[rest % 16];
            rest /= 16;
        }
        head
    }

    /// The line, CRLF included: 3 to 18 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_upper_case_hex_without_leading_zeros() {
        for len in [1, 9, 10, 15, 16, 26, 255, 256, 4095, 65536, usize::MAX - 1, usize::MAX] {
            assert_eq!(ChunkHead::new(len).as_bytes(), format!("{len:X}\r\n").as_bytes());
        }
    }

    #[test]
    #[should_panic(expected = "ends the body")]
    fn a_chunk_of_no_bytes_is_a_bug() {
        ChunkHead::new(0);
    }
}
