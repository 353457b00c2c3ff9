//! What is wrong in a file, told in order of place: line and column, and the key that was probably meant.

use super::super::table;
use super::super::{Place, Problem};
use super::Reader;
use std::ops::Range;
use toml::de::DeValue;

/// Mistakes that are told of one file, and of which the key that was meant is looked for; the others are counted.
const PROBLEMS_MAX: usize = 100;
/// Bytes of a key for which a similar one is looked for.
const GUESS_BYTES_MAX: usize = 64;
/// Bytes between two places of which line and column are kept.
const MARK_BYTES: usize = 256;

/// A place whose line and column are known, both from 1.
#[derive(Clone, Copy)]
pub(super) struct Mark {
    offset: usize,
    line: usize,
    column: usize,
}

impl Mark {
    /// Behind `text`, which begins here. Columns count characters.
    fn behind(self, text: &str) -> Mark {
        let lines = text.bytes().filter(|byte| *byte == b'\n').count();
        let last = text.rfind('\n').map_or(text, |newline| &text[newline + 1..]);
        let from = if lines == 0 { self.column } else { 1 };
        Mark {
            offset: self.offset + text.len(),
            line: self.line + lines,
            column: from + last.chars().count(),
        }
    }
}

/// A mark about every [`MARK_BYTES`].
pub(super) fn marks(text: &str) -> Vec<Mark> {
    let mut last = Mark { offset: 0, line: 1, column: 1 };
    let mut marks = vec![last];
    for end in (MARK_BYTES..text.len()).step_by(MARK_BYTES) {
        if text.is_char_boundary(end) {
            last = last.behind(&text[last.offset..end]);
            marks.push(last);
        }
    }
    marks
}

impl Reader<'_> {
    pub(super) fn complain(&mut self, span: Range<usize>, message: &str) {
        self.problems.push((span.start, message.to_owned()));
    }

    /// The mistakes in order of place, as far as they are told.
    pub(super) fn told(&mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|(offset, _)| *offset);
        let more = self.problems.split_off(self.problems.len().min(PROBLEMS_MAX));
        let mut problems: Vec<_> = self
            .problems
            .iter()
            .map(|(offset, message)| Problem::at(&self.place(*offset), message))
            .collect();
        if let Some((offset, _)) = more.first() {
            problems.push(Problem::at(
                &self.place(*offset),
                &format!("and {} mistakes from here on", more.len()),
            ));
        }
        problems
    }

    pub(super) fn unknown_overall(&self, name: &str, value: &DeValue<'_>) -> String {
        if matches!(value, DeValue::Table(_)) && name != "routes" {
            return format!(
                "unknown table `{name}`: settings stand at the top level, and there are [[route]], [[listener]] and [[upstream]]"
            );
        }
        let keys = table::ALL.iter().map(|setting| setting.key());
        self.unknown(name, keys.chain(["route".to_owned(), "listener".to_owned()]))
    }

    /// Complains of an unknown key and names the one that was probably meant.
    pub(super) fn unknown(&self, name: &str, candidates: impl Iterator<Item = String>) -> String {
        // Comparing it with every key takes longer than all else.
        let wanted = self.problems.len() < PROBLEMS_MAX && name.len() <= GUESS_BYTES_MAX;
        match wanted.then(|| guess(name, candidates)).flatten() {
            Some(guess) => format!("unknown key `{name}`; did you mean `{guess}`?"),
            None => format!("unknown key `{name}`; docs/CONFIG.md (`tokenring config-doc`) lists them all"),
        }
    }

    pub(super) fn place(&self, offset: usize) -> Place {
        let mark = self.marks[self.marks.partition_point(|mark| mark.offset <= offset).saturating_sub(1)];
        let Mark { line, column, .. } = mark.behind(self.text.get(mark.offset..offset).unwrap_or_default());
        Place { file: self.name.to_owned(), line, column }
    }
}

/// The candidate nearest to `name`, if it is near enough to be a slip.
fn guess(name: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    // A third of the letters wrong is a slip; more is another word.
    let far = (name.len() / 3).max(2);
    nearest(&name, candidates, far)
}

/// The candidate at most `far` letters from `name`.
pub(in super::super) fn nearest(
    name: &str,
    candidates: impl Iterator<Item = String>,
    far: usize,
) -> Option<String> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(name, &candidate), candidate))
        .filter(|(distance, _)| *distance <= far)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::super::tests::problems;
    use super::*;

    #[test]
    fn unknown_keys_name_their_place_and_the_likely_key() {
        assert_eq!(
            problems("backlog = 10\nring_dept = 64\n"),
            ["tokenring.toml:2:1: unknown key `ring_dept`; did you mean `ring_depth`?"]
        );
        assert_eq!(
            problems("  ring-depth = 64"),
            ["tokenring.toml:1:3: unknown key `ring-depth`; did you mean `ring_depth`?"]
        );
        assert_eq!(
            problems("colour = 1"),
            [
                "tokenring.toml:1:1: unknown key `colour`; docs/CONFIG.md (`tokenring config-doc`) lists them all"
            ]
        );
        assert_eq!(
            problems("drain_deadline = 1"),
            ["tokenring.toml:1:1: unknown key `drain_deadline`; did you mean `drain_deadline_ms`?"]
        );
    }

    #[test]
    fn of_many_mistakes_the_first_are_told_and_the_others_counted() {
        // Some other program's file, as long as may be.
        let lines = (4 << 20) / 12;
        let text: String = (0..lines).map(|line| format!("a{line:06} = 1\n")).collect();
        let problems = problems(&text);
        assert_eq!(problems.len(), PROBLEMS_MAX + 1);
        assert!(problems[99].starts_with("tokenring.toml:100:1: unknown key `a000099`"), "{}", problems[99]);
        assert_eq!(problems[100], format!("tokenring.toml:101:1: and {} mistakes from here on", lines - 100));
    }

    #[test]
    fn a_mistake_is_one_line_that_can_be_read() {
        let long = "a".repeat(1 << 20);
        let told = problems(&format!("{long} = 1\n\"\\n\\u0007\" = 2"));
        assert!(told[0].len() <= 1024 && told[0].ends_with("aaa..."), "{}", told[0].len());
        assert!(told[1].starts_with("tokenring.toml:2:1: unknown key `\\n\\u{7}`"), "{}", told[1]);
    }

    #[test]
    fn places_are_counted_in_characters_however_far_they_are() {
        for (before, line) in [("", 1), ("# \u{e4}\n\n", 3), (&*"#\u{20ac}\n".repeat(999), 1000)] {
            let told = problems(&format!("{before}upstream = [{}]", "\"\u{e4}\u{20ac}\", ".repeat(90)));
            assert_eq!(told.len(), 90);
            for (number, complaint) in told.iter().enumerate() {
                let expected = format!("tokenring.toml:{line}:{}: upstream: ", 13 + 6 * number);
                assert!(complaint.starts_with(&expected), "{complaint}");
            }
        }
    }
}
