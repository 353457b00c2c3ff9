//! Proof that the rig sees: bugs planted into the machine under a shard are found by runs that pass without them.

use crate::random::random_run;
use crate::world::Planted;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs until one fails; each bug strikes once per run, if the run comes that far.
fn is_found(planted: Planted) -> bool {
    (0..60).any(|seed| catch_unwind(AssertUnwindSafe(|| random_run(seed, Some(planted)))).is_err())
}

#[test]
fn planted_bugs_are_found() {
    for planted in [
        Planted::DoubleSent,
        Planted::LostSent,
        Planted::LostCancel,
        Planted::LostWakeUp,
        Planted::ForgottenReceive,
        Planted::WrongWindow,
        Planted::OthersBytes,
    ] {
        assert!(is_found(planted), "{planted:?} went unnoticed");
    }
}
