//! How a log line looks: text, or one JSON object.

use super::Line;
use serde_json::Value;
use std::fmt::Write;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Format {
    Text,
    Json,
}

impl Format {
    /// The line with its newline. Line breaks inside the text are escaped, so that a line stays one line.
    pub(super) fn render(self, line: &Line) -> String {
        let milliseconds = i64::try_from(line.since_1970.as_millis()).unwrap_or(i64::MAX);
        let time = jiff::Timestamp::from_millisecond(milliseconds).unwrap_or_default();
        let mut out = String::with_capacity(line.text.len() + 64);
        let result = match self {
            Format::Text => text(&mut out, &time, line),
            Format::Json => json(&mut out, &time, line),
        };
        result.unwrap_or_else(|_| unreachable!("String takes all"));
        out
    }
}

fn text(out: &mut String, time: &jiff::Timestamp, line: &Line) -> std::fmt::Result {
    write!(out, "[{time:.3} {:<5} {}] ", line.level, line.target)?;
    escape(out, &line.text);
    for (key, value) in &line.fields {
        match value {
            // Quoted where a reader could not tell where it ends.
            Value::String(text)
                if text.is_empty()
                    || text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"') =>
            {
                write!(out, " {key}={value}")?;
            }
            Value::String(text) => write!(out, " {key}={text}")?,
            other => write!(out, " {key}={other}")?,
        }
    }
    out.write_char('\n')
}

fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        if character.is_control() { out.extend(character.escape_default()) } else { out.push(character) }
    }
}

fn json(out: &mut String, time: &jiff::Timestamp, line: &Line) -> std::fmt::Result {
    let quoted = |text: &str| Value::String(text.to_owned());
    let level = line.level.as_str().to_ascii_lowercase();
    write!(
        out,
        "{{\"time\":\"{time:.3}\",\"level\":\"{level}\",\"target\":{},\"message\":{}",
        quoted(&line.target),
        quoted(&line.text)
    )?;
    for (key, value) in &line.fields {
        write!(out, ",{}:{value}", quoted(key))?;
    }
    out.write_str("}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        Line {
            since_1970: std::time::Duration::from_millis(1_700_000_000_042),
            level: log::Level::Info,
            target: "tokenring".to_owned(),
            text: "two\nlines".to_owned(),
            fields: vec![
                ("path".to_owned(), "/v1 \"x\"".into()),
                ("status".to_owned(), 200.into()),
                ("end".to_owned(), "done".into()),
            ],
        }
    }

    #[test]
    fn text_stays_on_one_line() {
        assert_eq!(
            Format::Text.render(&line()),
            "[2023-11-14T22:13:20.042Z INFO  tokenring] two\\nlines path=\"/v1 \\\"x\\\"\" status=200 end=done\n"
        );
    }

    #[test]
    fn json_is_one_object() {
        let parsed: Value = serde_json::from_str(&Format::Json.render(&line())).unwrap();
        assert_eq!(parsed["message"], "two\nlines");
        assert_eq!(parsed["level"], "info");
        assert_eq!(parsed["status"], 200);
        assert_eq!(parsed["time"], "2023-11-14T22:13:20.042Z");
    }
}
