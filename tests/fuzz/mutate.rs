//! A small mutator and the bounded, seeded driver around it: no coverage, but the same inputs on every machine.

use super::Target;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Longest input that is made.
const BYTES_MAX: usize = 1024;

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `0 <= result < bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// An input made out of the corpus: one of its files, changed in up to eight places.
pub fn mutated(corpus: &[Vec<u8>], words: &[&str], random: &mut Random) -> Vec<u8> {
    let mut bytes = if corpus.is_empty() { Vec::new() } else { corpus[random.below(corpus.len())].clone() };
    for _ in 0..1 + random.below(8) {
        change(&mut bytes, corpus, words, random);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let to = (at + 1 + random.below(8)).min(bytes.len()).max(at);
    match random.below(9) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        1 if at < bytes.len() => bytes[at] = random.below(256) as u8,
        2 => bytes.insert(at, random.below(256) as u8),
        3 => drop(bytes.drain(at..to)),
        4 => {
            let doubled = bytes[at..to].to_vec();
            bytes.splice(at..at, doubled);
        }
        // The end of another input behind the start of this one.
        5 if !corpus.is_empty() => {
            let other = &corpus[random.below(corpus.len())];
            bytes.truncate(at);
            bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        6 => {
            const TELLING: &[u8] = b"\r\n :\t,;0aF+-\0\x0b\x7f\xff\"/?#*%{}[]\\";
            let byte = TELLING[random.below(TELLING.len())];
            if at < bytes.len() && random.below(2) == 0 { bytes[at] = byte } else { bytes.insert(at, byte) }
        }
        _ if !words.is_empty() => {
            let word = words[random.below(words.len())];
            let line_starts: Vec<usize> =
                (0..bytes.len()).filter(|at| bytes[*at] == b'\n').map(|at| at + 1).collect();
            // A line goes where a line begins, mostly.
            let replaced = match random.below(4) {
                0 => at..to,
                1 => at..at,
                _ if line_starts.is_empty() || !word.ends_with('\n') => at..at,
                _ => {
                    let start = line_starts[random.below(line_starts.len())];
                    start..start
                }
            };
            bytes.splice(replaced, word.bytes());
        }
        _ => bytes.push(random.below(256) as u8),
    }
}

/// The message of the panic that an input causes.
pub fn panic_of(run: fn(&[u8]), input: &[u8]) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(|| run(input))).err()?;
    Some(match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast_ref::<&str>().map_or("a panic", |text| text).to_owned(),
    })
}

/// A shorter input that still panics: pieces are left out for as long as that goes on.
pub fn minimised(run: fn(&[u8]), input: &[u8]) -> Vec<u8> {
    let mut least = input.to_vec();
    let mut length = least.len() / 2;
    while length > 0 {
        let mut at = 0;
        while at + length <= least.len() {
            let shorter = [&least[..at], &least[at + length..]].concat();
            if panic_of(run, &shorter).is_some() {
                least = shorter;
            } else {
                at += length;
            }
        }
        length /= 2;
    }
    least
}

/// What made a target panic.
#[derive(Debug)]
pub struct Found {
    /// How many inputs were tried before, corpus included.
    pub tried: usize,
    /// A minimal input.
    pub input: Vec<u8>,
    /// What it panics with.
    pub message: String,
}

/// Replays the corpus and then tries `runs` mutations of it. `None`: nothing panicked.
pub fn search(target: &Target, corpus: &[Vec<u8>], runs: usize, seed: u64) -> Option<Found> {
    let mut random = Random(seed);
    let made = (0..runs).map(|_| mutated(corpus, target.words, &mut random));
    for (tried, input) in corpus.iter().cloned().chain(made).enumerate() {
        if panic_of(target.run, &input).is_some() {
            let input = minimised(target.run, &input);
            let message = panic_of(target.run, &input).unwrap_or_default();
            return Some(Found { tried, input, message });
        }
    }
    None
}
