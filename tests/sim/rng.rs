//! The one source of chance in a simulation: SplitMix64, so that a seed is a run; and which seeds are run.

use std::ops::Range;

#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Rng(seed ^ 0x5DEE_CE66_D1CE_4E5B)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// `0 <= result < bound`; 0 for a bound of 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// `low <= result <= high`.
    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// Small values are likelier: the number of bits is drawn first.
    pub(crate) fn skewed(&mut self, high: u64) -> u64 {
        let bits = self.range(0, u64::from(64 - high.leading_zeros()));
        self.below(1 << bits.min(62)).min(high)
    }

    /// What [`Rng::skewed`] draws on average, rounded down.
    pub(crate) fn skewed_mean(high: u64) -> u64 {
        let bits_max = u64::from(64 - high.leading_zeros());
        let mean = |bits: u64| {
            let bound = 1 << bits.min(62);
            // Of `0..bound`, so many are `high` or become it.
            let most = bound - high.min(bound);
            let below = bound - most;
            (below * below.saturating_sub(1) / 2 + most * high) / bound
        };
        (0..=bits_max).map(mean).sum::<u64>() / (bits_max + 1)
    }

    pub(crate) fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < u64::from(per_mille)
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// The first `usual` seeds; with `SIM_{of}_RUNS`, so many from `SIM_{of}_FROM` on.
pub(crate) fn seeds(of: &str, usual: u64) -> Range<u64> {
    let asked = |what: &str| {
        let text = std::env::var(format!("SIM_{of}_{what}")).ok()?;
        Some(text.parse::<u64>().expect("a number"))
    };
    let from = asked("FROM").unwrap_or(0);
    from..from + asked("RUNS").unwrap_or(usual)
}

/// Whether at least the first `usual` are among them: of others, nothing is known of how often each thing happens.
pub(crate) fn are_usual(seeds: &Range<u64>, usual: u64) -> bool {
    seeds.start == 0 && seeds.end >= usual
}
