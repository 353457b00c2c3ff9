//! libFuzzer around one target, named in `TOKENRING_FUZZ_TARGET`. `run` builds and starts it.
#![no_main]

use std::sync::LazyLock;
use tests::fuzz::mutate::{Random, mutated};
use tests::fuzz::{Target, target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("TOKENRING_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| panic!("TOKENRING_FUZZ_TARGET is '{name}', not a target"))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| (TARGET.run)(data));

// libFuzzer knows no words of the language: every other change is made by the driver that does.
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], bytes: usize, bytes_max: usize, seed: u32| {
    if TARGET.words.is_empty() || seed % 2 == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, bytes, bytes_max);
    }
    let made = mutated(&[data[..bytes].to_vec()], TARGET.words, &mut Random(seed.into()));
    let bytes = made.len().min(bytes_max);
    data[..bytes].copy_from_slice(&made[..bytes]);
    bytes
});
