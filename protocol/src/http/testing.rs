//! What the tests of this module share: a seeded generator, and the check that splits do not matter.
//! A failing random test prints its seed.

use super::{HeadLimits, Refusal, RequestHead, ResponseHead, header_slots, parse_request, parse_response};

/// splitmix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 <= result < bound.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(super) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Changes a few bytes: replaced, removed, doubled or inserted out of those that matter to parsers.
pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const TELLING: &[u8] = b"\r\n :\t,;0aF+-\0\x0b\x7f\xff\"/?#*%";
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] = *random.pick(TELLING),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, bytes[at]),
            _ => bytes.insert(at, *random.pick(TELLING)),
        }
        if bytes.is_empty() {
            bytes.push(b'\r');
        }
    }
}

/// The outcome of a parse, comparable across inputs: a description of the head, or why it was refused.
pub(super) type Outcome = Result<Option<(usize, String)>, Refusal>;

pub(super) fn request_outcome(input: &[u8], limits: &HeadLimits) -> Outcome {
    let mut slots = header_slots();
    let head: Option<RequestHead> = parse_request(input, &mut slots, limits)?;
    Ok(head.map(|head| (head.head_bytes, format!("{head:?}"))))
}

pub(super) fn response_outcome(input: &[u8], limits: &HeadLimits, method: &str) -> Outcome {
    let mut slots = header_slots();
    let head: Option<ResponseHead> = parse_response(input, &mut slots, limits, method)?;
    Ok(head.map(|head| (head.head_bytes, format!("{head:?}"))))
}

/// Every prefix is either incomplete or has the outcome of the whole, and once it has it, it keeps it.
pub(super) fn assert_prefixes_agree(input: &[u8], outcome: impl Fn(&[u8]) -> Outcome) {
    let whole = outcome(input);
    let mut decided = false;
    for length in 0..=input.len() {
        let prefix = outcome(&input[..length]);
        match &prefix {
            Ok(None) => assert!(!decided, "undecided again at {length}: {}", input.escape_ascii()),
            _ => {
                assert_eq!(prefix, whole, "at {length}: {}", input.escape_ascii());
                decided = true;
                if let Ok(Some((head_bytes, _))) = &prefix {
                    assert!(length >= *head_bytes);
                }
            }
        }
        if let Ok(Some((head_bytes, _))) = &whole {
            assert_eq!(decided, length >= *head_bytes, "at {length}: {}", input.escape_ascii());
        }
    }
}
