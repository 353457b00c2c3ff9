//! Reads tokenring.toml. Every complaint names file, line and column, what was expected, and the key that was probably meant.

mod complaints;
mod tables;

pub(super) use complaints::nearest;
pub(super) use tables::LISTENERS_MAX;

use super::address::UpstreamUrl;
use super::table::{self, Setting};
use super::value::{Kind, Unit, Value};
use super::{Place, Problem};
use complaints::{Mark, marks};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What the file says, checked value by value; relations between values are checked later.
#[derive(Debug, Default)]
pub(crate) struct File {
    pub(crate) values: HashMap<&'static str, (Value, Place)>,
    pub(crate) routes: Vec<RouteTable>,
    pub(crate) listeners: Vec<ListenerTable>,
    /// What is said of single backends, in `[[upstream]]` or in a route's list.
    pub(crate) upstreams: Vec<UpstreamTable>,
}

/// One `[[listener]]`.
#[derive(Debug)]
pub(crate) struct ListenerTable {
    pub(crate) place: Place,
    pub(crate) address: SocketAddr,
    /// `None`: TLS if it has a setting of TLS.
    pub(crate) tls: Option<bool>,
    pub(crate) values: HashMap<&'static str, (Value, Place)>,
}

/// One `[[upstream]]`, or a table in a list of upstreams.
#[derive(Debug)]
pub(crate) struct UpstreamTable {
    pub(crate) place: Place,
    pub(crate) url: UpstreamUrl,
    pub(crate) values: HashMap<&'static str, (Value, Place)>,
}

/// One `[[route]]`.
#[derive(Debug)]
pub(crate) struct RouteTable {
    pub(crate) place: Place,
    pub(crate) path: String,
    pub(crate) name: Option<String>,
    /// `None`: the overall ones.
    pub(crate) upstreams: Option<Vec<(UpstreamReference, Place)>>,
    pub(crate) values: HashMap<&'static str, (Value, Place)>,
}

/// How a route names a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum UpstreamReference {
    Url(UpstreamUrl),
    /// Index into the overall `upstream` list, from 0.
    Index(u64),
}

/// Parses the whole file and reports every mistake in it, in order of place.
pub(crate) fn read(name: &str, text: &str) -> Result<File, Vec<Problem>> {
    let mut reader = Reader { name, text, marks: marks(text), problems: Vec::new() };
    let file = reader.file();
    if reader.problems.is_empty() { Ok(file) } else { Err(reader.told()) }
}

struct Reader<'t> {
    name: &'t str,
    text: &'t str,
    /// In order; the first is the start.
    marks: Vec<Mark>,
    /// With the byte at which each was found, to report them in order.
    problems: Vec<(usize, String)>,
}

/// A complaint about a part of the file.
type Complaint = (Range<usize>, String);

impl Reader<'_> {
    fn file(&mut self) -> File {
        let mut file = File::default();
        let root = match DeTable::parse(self.text) {
            Ok(root) => root,
            Err(error) => {
                let message = error.message().trim().replace('\n', ", ");
                self.complain(error.span().unwrap_or_default(), &format!("not valid TOML: {message}"));
                return file;
            }
        };
        for (key, value) in root.get_ref() {
            let name: &str = key.get_ref();
            if name == "route" {
                self.routes(value, &mut file);
            } else if name == "listener" {
                self.listeners(value, &mut file.listeners);
            } else if name == "upstream" && matches!(value.get_ref(), DeValue::Array(_) | DeValue::Table(_)) {
                self.upstreams(value, &mut file);
            } else if let Some(setting) = table::by_key(name) {
                self.setting(setting, value, &mut file.values);
            } else {
                let message = self.unknown_overall(name, value.get_ref());
                self.complain(key.span(), &message);
            }
        }
        file
    }

    fn setting(
        &mut self,
        setting: &'static Setting,
        value: &Spanned<DeValue<'_>>,
        into: &mut HashMap<&'static str, (Value, Place)>,
    ) {
        self.named_setting(&setting.key(), setting, value, into);
    }

    fn named_setting(
        &mut self,
        name: &str,
        setting: &'static Setting,
        value: &Spanned<DeValue<'_>>,
        into: &mut HashMap<&'static str, (Value, Place)>,
    ) {
        match from_toml(&setting.kind, value) {
            Ok(parsed) => {
                let place = self.place(value.span().start);
                into.insert(setting.name, (parsed, place));
            }
            Err((span, message)) => self.complain(span, &format!("{name}: {message}")),
        }
    }
}

/// The value of a key, or what is wrong with which part of it.
fn from_toml(kind: &Kind, value: &Spanned<DeValue<'_>>) -> Result<Value, Complaint> {
    let mismatch = |value: &Spanned<DeValue<'_>>| {
        (value.span(), format!("expected {}, found {}", kind.expectation(), describe(value.get_ref())))
    };
    let text = |value: &Spanned<DeValue<'_>>, text: &str| {
        kind.parse(text).map_err(|message| (value.span(), message))
    };
    match (kind, value.get_ref()) {
        (Kind::Integer { unit: Unit::Count(_), .. }, DeValue::String(_)) => Err(mismatch(value)),
        (Kind::Integer { .. }, DeValue::Integer(integer)) => {
            u64::from_str_radix(integer.as_str().trim_start_matches('+'), integer.radix())
                .ok()
                .and_then(|number| kind.integer(number))
                .ok_or_else(|| mismatch(value))
        }
        (Kind::Switch, DeValue::Boolean(on)) => Ok(Value::Switch(*on)),
        (Kind::Cpus, DeValue::Integer(integer)) => text(value, integer.as_str()),
        (Kind::Cpus, DeValue::Array(items)) => {
            let mut cpus = Vec::new();
            for item in items.iter() {
                let DeValue::Integer(integer) = item.get_ref() else {
                    return Err(mismatch(item));
                };
                cpus.push(integer.as_str());
            }
            if cpus.is_empty() { Ok(Value::Cpus(Vec::new())) } else { text(value, &cpus.join(",")) }
        }
        (Kind::Listen, DeValue::Array(items)) => {
            let mut all = Vec::new();
            for item in items.iter() {
                match from_toml(kind, item)? {
                    Value::Listen(some) => all.extend(some),
                    _ => return Err(mismatch(item)),
                }
            }
            Ok(Value::Listen(all))
        }
        (Kind::Files, DeValue::Array(items)) => {
            let mut all = Vec::new();
            for item in items.iter() {
                match item.get_ref() {
                    DeValue::String(path) if !path.is_empty() => all.push(PathBuf::from(path.as_ref())),
                    _ => return Err(mismatch(item)),
                }
            }
            Ok(Value::Files(all))
        }
        (_, DeValue::String(string)) => text(value, string),
        _ => Err(mismatch(value)),
    }
}

fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(on) => on.to_string(),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn problems(text: &str) -> Vec<String> {
        read("tokenring.toml", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn wrong_types_and_ranges_name_their_place_and_what_was_expected() {
        assert_eq!(
            problems("ring_depth = 1000"),
            ["tokenring.toml:1:14: ring_depth: expected a power of two from 64 to 32768, found 1000"]
        );
        assert_eq!(
            problems("ring_depth = \"1024\"\nbacklog = -4"),
            [
                "tokenring.toml:1:14: ring_depth: expected a power of two from 64 to 32768, found \"1024\"",
                "tokenring.toml:2:11: backlog: expected an integer from 1 to 65535, found -4",
            ]
        );
        assert_eq!(
            problems("upstream = [\"http://ok\", \"ftp://x\"]")[0].split(": ").next(),
            Some("tokenring.toml:1:26")
        );
        assert_eq!(
            problems("event_ids = 1"),
            ["tokenring.toml:1:13: event_ids: expected on or off (true or false), found 1"]
        );
        assert_eq!(
            problems("half_close = 'maybe'"),
            ["tokenring.toml:1:14: half_close: expected one of leave, serve, found \"maybe\""]
        );
    }

    #[test]
    fn broken_toml_names_its_place() {
        let problems = problems("backlog = 10\nlisten = = 3\n");
        assert!(problems[0].starts_with("tokenring.toml:2:10: not valid TOML"), "{problems:?}");
        let problems = self::problems("backlog = 1\nbacklog = 2");
        assert!(problems[0].starts_with("tokenring.toml:2:1: not valid TOML: duplicate key"), "{problems:?}");
    }
}
