//! Fuzz targets. Each takes any bytes, does with them what the server would, and panics when a promise is broken: the one
//! of an independent parser, of a naive model written by the letter of the standard, or that splits do not matter.
//!
//! Two drivers run them: `main.rs` replays the corpus and tries bounded, seeded mutations on every test run; `guided/` is
//! libFuzzer, for hours. See `README.md`.

pub mod body;
pub mod dialect;
pub mod durable;
pub mod facts;
mod heads;
pub mod input;
pub mod ledger;
pub mod log;
pub mod mutate;
pub mod ops;
pub mod request_head;
pub mod response_head;
pub mod resume;
pub mod segments;
pub mod settings;
pub mod slots;
pub mod sse;
pub mod values;
pub mod wheel;

// The settings belong to the binary, which is no library: their sources are compiled in once more.
#[allow(dead_code, unreachable_pub, unused_imports, reason = "the server uses what is not used here")]
#[path = "../../server/src/settings/mod.rs"]
mod configuration;

/// One fuzz target.
pub struct Target {
    /// Its name, and that of its folder under `tests/corpus`.
    pub name: &'static str,
    /// Panics on an input that shows a bug.
    pub run: fn(&[u8]),
    /// What mutations put in: tokens of the language that is parsed.
    pub words: &'static [&'static str],
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "body", run: body::run, words: body::WORDS },
    Target { name: "dialect", run: dialect::run, words: dialect::WORDS },
    Target { name: "durable", run: durable::run, words: durable::WORDS },
    Target { name: "facts", run: facts::run, words: facts::WORDS },
    Target { name: "ledger", run: ledger::run, words: &[] },
    Target { name: "log", run: log::run, words: &[] },
    Target { name: "ops", run: ops::run, words: &[] },
    Target { name: "request_head", run: request_head::run, words: heads::WORDS },
    Target { name: "response_head", run: response_head::run, words: heads::WORDS },
    Target { name: "resume", run: resume::run, words: resume::WORDS },
    Target { name: "segments", run: segments::run, words: &[] },
    Target { name: "settings", run: settings::run, words: settings::WORDS },
    Target { name: "slots", run: slots::run, words: &[] },
    Target { name: "sse", run: sse::run, words: sse::WORDS },
    Target { name: "values", run: values::run, words: values::WORDS },
    Target { name: "wheel", run: wheel::run, words: &[] },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
