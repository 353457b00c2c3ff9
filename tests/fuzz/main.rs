//! Every target on its corpus and on seeded mutations of it: the same inputs on every run. A failure prints a minimal
//! input; put it into the target's folder under `tests/corpus` together with the fix.
//!
//! `TOKENRING_FUZZ_RUNS` multiplies the mutations, `TOKENRING_FUZZ_SEED` makes other ones.

mod planted;

use std::path::{Path, PathBuf};
use tests::fuzz::mutate::{panic_of, search};
use tests::fuzz::{TARGETS, target};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
}

/// The files of a target's corpus, in the order of their names.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = folder(name);
    let entries = std::fs::read_dir(folder).expect("a folder for every target");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a readable file")).collect()
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Mutations of the corpus on one test run.
fn search_from(name: &str, runs: usize) {
    let target = target(name).expect("one of the targets");
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "an empty corpus proves nothing");
    for input in &corpus {
        // Outside the search first: with its backtrace.
        (target.run)(input);
    }
    let runs = runs * number("TOKENRING_FUZZ_RUNS", 1) as usize;
    let seed = number("TOKENRING_FUZZ_SEED", 1);
    std::panic::set_hook(Box::new(|_| {}));
    let found = search(target, &corpus, runs, seed);
    drop(std::panic::take_hook());
    if let Some(found) = found {
        panic!(
            "seed {seed}, input {} of {name}: {}\nminimal input: b\"{}\"",
            found.tried,
            found.message,
            found.input.escape_ascii()
        );
    }
}

macro_rules! targets {
    ($($name:ident $runs:literal)*) => {
        $(
            #[test]
            fn $name() {
                search_from(stringify!($name), $runs);
            }
        )*

        #[test]
        fn every_target_runs_here() {
            let run = [$(stringify!($name)),*];
            let all: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(run[..], all);
        }
    };
}

targets! {
    body 100000
    dialect 100000
    durable 60000
    facts 100000
    ledger 20000
    log 10000
    ops 100000
    request_head 100000
    response_head 100000
    resume 100000
    segments 8000
    settings 20000
    slots 100000
    sse 100000
    values 100000
    wheel 100000
}

#[test]
fn the_corpus_is_small() {
    for target in TARGETS {
        let files = corpus(target.name);
        let bytes: usize = files.iter().map(Vec::len).sum();
        assert!(
            files.len() <= 600 && bytes <= 128 * 1024,
            "{}: {} files, {bytes} bytes",
            target.name,
            files.len()
        );
    }
}

#[test]
fn a_target_says_what_is_wrong() {
    let never = |_: &[u8]| {};
    assert_eq!(panic_of(never, b"anything"), None);
    let message = panic_of(|data| assert!(data.len() < 3, "{} bytes", data.len()), b"four");
    assert_eq!(message.as_deref(), Some("4 bytes"));
}
