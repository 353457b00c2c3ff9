//! How targets read their bytes: as choices, one after the other, or as a text that arrives in pieces.

/// The input read as a list of choices; all are 0 once it is used up.
pub struct Choices<'a> {
    rest: &'a [u8],
}

impl<'a> Choices<'a> {
    /// All of the input.
    pub fn of(data: &'a [u8]) -> Self {
        Choices { rest: data }
    }

    /// False when every further choice is 0.
    pub fn any_left(&self) -> bool {
        !self.rest.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *byte
    }

    /// `0 <= result < bound <= 256`, out of one byte.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    /// Two bytes, the low one first.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A number of any magnitude: a mantissa of 5 bits, shifted.
    pub fn magnitude(&mut self, shift_max: u32) -> u64 {
        let byte = self.byte();
        u64::from(byte & 31) << (u32::from(byte >> 5) * shift_max / 7)
    }

    /// What has not been read.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }
}

/// Two-part splits tried at most; a longer text is split at evenly spaced places.
const SPLITS_MAX: usize = 48;

/// Calls `look` with the pieces of `text` for several ways of cutting it: whole, in two, byte by byte, and unevenly.
pub fn for_each_split<'t>(text: &'t [u8], mut look: impl FnMut(&[&'t [u8]])) {
    look(&[text]);
    let step = text.len() / SPLITS_MAX + 1;
    for at in (0..=text.len()).step_by(step) {
        let (front, back) = text.split_at(at);
        look(&[front, back]);
    }
    if text.is_empty() {
        return;
    }
    look(&text.chunks(1).collect::<Vec<_>>());
    let mut pieces = Vec::new();
    let (mut rest, mut length) = (text, 1);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(length.min(rest.len()));
        pieces.push(piece);
        rest = after;
        length = (length * 5 + 2) % 17 + 1;
    }
    look(&pieces);
}
