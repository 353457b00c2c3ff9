//! libFuzzer around one target, named in `TOKENRING_FUZZ_TARGET`. `run` builds and starts it.
#![no_main]

use std::sync::LazyLock;
use tests::fuzz::target;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("TOKENRING_FUZZ_TARGET").unwrap_or_default();
    match target(&name) {
        Some(target) => target.run,
        None => panic!("TOKENRING_FUZZ_TARGET is '{name}', not a target"),
    }
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| RUN(data));
