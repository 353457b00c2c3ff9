//! A failing script made small: whatever can be left out while it fails at the same place is left out, field by field and
//! element by element, and numbers are made smaller.

use crate::run::Finished;
use crate::script::{Script, With, render};
use protocol::planted::{Bug, plant};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// Runs spent on one script at most, and turns of all of them together. They get shorter as it does.
const RUNS_MAX: u32 = 4_000;
const TURNS_MAX: u64 = 1_000_000;
/// Chances tried for a script that lost something: with fewer peers the same seed draws other faults.
const SEEDS_TRIED: u64 = 4;

/// Where and how a run failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    pub(crate) place: String,
    pub(crate) what: String,
}

thread_local! {
    /// Turns of all runs of this thread.
    pub(crate) static TURNS: Cell<u64> = const { Cell::new(0) };
    /// A run that takes more is not the one that is looked for.
    pub(crate) static TURNS_OF_A_RUN: Cell<u64> = const { Cell::new(u64::MAX) };
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static LAST: RefCell<Option<Failure>> = const { RefCell::new(None) };
}

/// Panics of runs that are expected to fail are noted instead of printed.
fn hear_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                return usual(panic);
            }
            let place = panic.location().map(|at| format!("{}:{}", at.file(), at.line())).unwrap_or_default();
            let what = panic.payload_as_str().unwrap_or_default().to_owned();
            // The first tells most.
            LAST.with_borrow_mut(|last| last.get_or_insert(Failure { place, what }).clone());
        }));
    });
}

/// Runs a script; its first panic, if it fails.
pub(crate) fn failure(script: &Script, with: With) -> Result<Finished, Failure> {
    hear_panics();
    LAST.take();
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(|| script.run(with)));
    QUIET.set(false);
    result.map_err(|_| LAST.take().unwrap_or(Failure { place: "nowhere".to_owned(), what: String::new() }))
}

/// What a run panicked with, with this bug in the core, if it did.
pub(crate) fn failure_of(bug: Bug, run: impl FnOnce()) -> Option<String> {
    hear_panics();
    LAST.take();
    QUIET.set(true);
    plant(Some(bug));
    let result = catch_unwind(AssertUnwindSafe(run));
    plant(None);
    QUIET.set(false);
    let what = LAST.take().map(|failure| format!("{}: {:.150}", failure.place, failure.what));
    result.err().map(|_| what.unwrap_or_default())
}

/// A failing script while it is made smaller.
struct Search {
    with: With,
    place: String,
    value: Value,
    runs: u32,
}

impl Search {
    /// Takes the candidate over if it fails at the same place, with this seed or one of a few others.
    fn try_instead(&mut self, candidate: Value, seeds: u64) -> bool {
        let Some(mut script) = Script::of_value(&candidate) else { return false };
        let first = script.seed;
        for nth in 0..seeds {
            if self.is_spent() {
                return false;
            }
            self.runs += 1;
            script.seed = if nth == 0 { first } else { nth };
            if failure(&script, self.with).is_err_and(|failure| failure.place == self.place) {
                self.value = script.to_value();
                return true;
            }
        }
        false
    }

    fn is_spent(&self) -> bool {
        self.runs >= RUNS_MAX || TURNS.get() >= TURNS_MAX
    }

    /// One attempt after the other at everything in the script; true if something helped.
    fn pass(&mut self) -> bool {
        let before = self.value.clone();
        for pointer in pointers(&self.value.clone()) {
            self.shrink(&pointer);
        }
        before != self.value
    }

    fn shrink(&mut self, pointer: &str) {
        let Some(at) = self.value.pointer(pointer) else { return };
        match at.clone() {
            Value::Array(elements) => {
                let mut chunk = elements.len();
                while chunk > 0 {
                    let mut from = 0;
                    while let Some(Value::Array(elements)) = self.value.pointer(pointer).cloned()
                        && from < elements.len()
                    {
                        let to = (from + chunk).min(elements.len());
                        let rest = [&elements[..from], &elements[to..]].concat();
                        if !self.try_instead(replaced(&self.value, pointer, Value::Array(rest)), SEEDS_TRIED)
                        {
                            from = to;
                        }
                    }
                    chunk /= 2;
                }
            }
            Value::Object(fields) => {
                for key in fields.keys() {
                    let Some(Value::Object(mut fields)) = self.value.pointer(pointer).cloned() else {
                        return;
                    };
                    fields.remove(key);
                    self.try_instead(replaced(&self.value, pointer, Value::Object(fields)), 2);
                }
            }
            Value::Number(number) => {
                let Some(mut number) = number.as_u64().filter(|_| pointer != "/seed") else { return };
                while number > 0 {
                    let smaller = if number > 10 { number / 4 } else { number - 1 };
                    if !self.try_instead(replaced(&self.value, pointer, smaller.into()), 1) {
                        break;
                    }
                    number = smaller;
                }
            }
            _ => {}
        }
    }
}

/// Every place in a value, containers before what they contain.
fn pointers(value: &Value) -> Vec<String> {
    let mut found = vec![String::new()];
    let children: Vec<(String, &Value)> = match value {
        Value::Array(elements) => {
            elements.iter().enumerate().map(|(nth, element)| (nth.to_string(), element)).collect()
        }
        Value::Object(fields) => fields.iter().map(|(key, field)| (key.clone(), field)).collect(),
        _ => Vec::new(),
    };
    for (name, child) in children {
        found.extend(pointers(child).into_iter().map(|rest| format!("/{name}{rest}")));
    }
    found
}

fn replaced(value: &Value, pointer: &str, by: Value) -> Value {
    let mut value = value.clone();
    if let Some(at) = value.pointer_mut(pointer) {
        *at = by;
    }
    value
}

/// The smallest script found that fails at the same place.
pub(crate) fn minimise(script: &Script, with: With, failure: &Failure) -> Value {
    TURNS.set(0);
    let again = crate::minimise::failure(script, with);
    assert!(again.is_err_and(|again| again == *failure), "a run that fails does so again");
    TURNS_OF_A_RUN.set(2 * TURNS.replace(0) + 1_000);
    let mut search = Search { with, place: failure.place.clone(), value: script.to_value(), runs: 0 };
    while !search.is_spent() && search.pass() {}
    TURNS_OF_A_RUN.set(u64::MAX);
    search.value
}

/// What is said of a failing run: the failure, and a script of it to commit.
pub(crate) fn report(script: &Script, with: With, failure: &Failure) -> String {
    let small = minimise(script, with, failure);
    format!(
        "{} at {}\n\nThe smallest run that fails there (to be committed in tests/sim/scripts/):\n{}",
        failure.what,
        failure.place,
        render(&small)
    )
}
