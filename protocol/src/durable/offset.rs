//! Offsets (PROTOCOL.md section 8): which stream, and how many bytes of it come before.

use std::fmt;

/// Digits of either number.
const DIGITS: usize = 16;

/// A position in a stream, as clients are given it: `0001763783000123_0000000000004711`. Sorted as text or as numbers alike.
///
/// The generation is the time at which the stream (or the one it was forked from) was created, ms since 1970, and unique:
/// an offset that outlived its stream is known for what it is, and does not point into the next one at the same path.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Offset {
    /// Of the stream.
    pub generation: u64,
    /// Bytes before it, as stored.
    pub position: u64,
}

impl Offset {
    /// The start of any stream.
    pub const ZERO: Offset = Offset { generation: 0, position: 0 };

    /// Exactly what [`Display`](fmt::Display) writes; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (generation, position) = text.split_once('_')?;
        let number = |digits: &str| {
            let fits = digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit());
            fits.then(|| digits.parse().ok()).flatten()
        };
        Some(Offset { generation: number(generation)?, position: number(position)? })
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the machinery that fills a number up: every append is answered with one.
        let mut text = [b'_'; 2 * DIGITS + 1];
        for (number, digits) in [(self.generation, 0..DIGITS), (self.position, DIGITS + 1..2 * DIGITS + 1)] {
            let mut rest = number;
            for digit in text[digits].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
            debug_assert_eq!(rest, 0, "more digits than any offset has");
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_as_they_are_written_and_sort_as_text() {
        let offsets = [
            Offset::ZERO,
            Offset { generation: 0, position: 9_999_999_999_999_999 },
            Offset { generation: 1_763_783_000_123, position: 9 },
            Offset { generation: 1_763_783_000_123, position: 10 },
            Offset { generation: 1_763_783_000_124, position: 0 },
        ];
        let texts: Vec<String> = offsets.iter().map(ToString::to_string).collect();
        assert_eq!(texts[0], "0000000000000000_0000000000000000");
        assert!(texts.is_sorted() && offsets.is_sorted());
        for (offset, text) in offsets.iter().zip(&texts) {
            assert_eq!(Offset::parse(text), Some(*offset));
        }
    }

    #[test]
    fn nothing_else_is_an_offset() {
        for text in [
            "",
            "_",
            "-1",
            "0_0",
            "0000000000000000-0000000000000000",
            "000000000000000_00000000000000000",
            "+000000000000000_0000000000000000",
            "0000000000000000_0000000000000000_",
            "0000000000000000_000000000000000a",
            "0000000000000000_0000000000000000 ",
        ] {
            assert_eq!(Offset::parse(text), None, "{text:?}");
        }
    }
}
