//! Reads tokenring.toml. Every complaint names file, line and column, what was expected, and the key that was probably meant.

use super::address::{UpstreamUrl, parse_listen};
use super::table::{self, Setting};
use super::value::{Kind, Unit, Value};
use super::{Place, Problem};
use std::borrow::Cow;
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

/// Keys of a route that are not settings.
const ROUTE_KEYS: [&str; 3] = ["path", "name", "upstreams"];
/// What a route's `upstreams` is.
const ROUTE_UPSTREAMS: &str =
    "expected a list of URLs, tables with a `url`, or indexes into `upstream` from 0";
/// Keys of a listener that are not settings.
const LISTENER_KEYS: [&str; 2] = ["address", "tls"];
/// Listeners of a server: every shard binds each of them.
pub(super) const LISTENERS_MAX: usize = 64;
/// Routes of one file: every request is compared with each in turn.
const ROUTES_MAX: usize = 256;
/// Backends of one list: every request is compared with each in turn, too.
const UPSTREAMS_MAX: usize = 1024;
/// Mistakes that are told of one file, and of which the key that was meant is looked for; the others are counted.
const PROBLEMS_MAX: usize = 100;
/// Bytes of a key for which a similar one is looked for.
const GUESS_BYTES_MAX: usize = 64;
/// Bytes between two places of which line and column are kept.
const MARK_BYTES: usize = 256;

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

/// A place whose line and column are known, both from 1.
#[derive(Clone, Copy)]
struct Mark {
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
fn marks(text: &str) -> Vec<Mark> {
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

    fn routes(&mut self, value: &Spanned<DeValue<'_>>, file: &mut File) {
        let DeValue::Array(items) = value.get_ref() else {
            return self.complain(value.span(), "routes are written as [[route]], with two brackets");
        };
        if items.len() > ROUTES_MAX {
            return self
                .complain(value.span(), &format!("at most {ROUTES_MAX} routes, found {}", items.len()));
        }
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(table) => {
                    if let Some(route) = self.route(item.span(), table, &mut file.upstreams) {
                        file.routes.push(route);
                    }
                }
                other => self
                    .complain(item.span(), &format!("expected a [[route]] table, found {}", describe(other))),
            }
        }
    }

    fn route(
        &mut self,
        span: Range<usize>,
        table: &DeTable<'_>,
        upstreams: &mut Vec<UpstreamTable>,
    ) -> Option<RouteTable> {
        let mut route = RouteTable {
            place: self.place(span.start),
            path: String::new(),
            name: None,
            upstreams: None,
            values: HashMap::new(),
        };
        let problems = self.problems.len();
        for (key, value) in table {
            let name: &str = key.get_ref();
            match (name, value.get_ref()) {
                ("path", DeValue::String(path))
                    if path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic()) =>
                {
                    // "/v1/" and "/v1" match the same paths: prefixes match at a segment's boundary.
                    let trimmed = path.trim_end_matches('/');
                    route.path = if trimmed.is_empty() { "/" } else { trimmed }.to_owned();
                }
                ("path", other) => {
                    let message =
                        format!("path: expected a path such as \"/v1/chat\", found {}", describe(other));
                    self.complain(value.span(), &message);
                }
                ("name", DeValue::String(text)) if !text.is_empty() && text.len() <= 64 => {
                    route.name = Some(text.to_string());
                }
                ("name", other) => {
                    let message = format!("name: expected text of 1 to 64 bytes, found {}", describe(other));
                    self.complain(value.span(), &message);
                }
                ("upstreams", DeValue::Array(items)) if items.len() > UPSTREAMS_MAX => {
                    let message = format!("upstreams: at most {UPSTREAMS_MAX}, found {}", items.len());
                    self.complain(value.span(), &message);
                }
                ("upstreams", DeValue::Array(items)) => {
                    let mut references = Vec::new();
                    for item in items.iter() {
                        if let Some(reference) = self.route_upstream(item, upstreams) {
                            references.push((reference, self.place(item.span().start)));
                        }
                    }
                    route.upstreams = Some(references);
                }
                ("upstreams", other) => {
                    let message = format!("upstreams: {ROUTE_UPSTREAMS}, found {}", describe(other));
                    self.complain(value.span(), &message);
                }
                ("upstream", _) => {
                    self.complain(key.span(), "unknown key `upstream` in a route; did you mean `upstreams`?");
                }
                _ => match table::by_key(name) {
                    Some(setting) if setting.per_route => self.setting(setting, value, &mut route.values),
                    Some(_) => self.complain(
                        key.span(),
                        &format!(
                            "`{name}` is a setting of the whole server: move it above the first [[route]]"
                        ),
                    ),
                    None => {
                        let keys = table::ALL.iter().filter(|setting| setting.per_route).map(|s| s.key());
                        let message = self.unknown(name, keys.chain(ROUTE_KEYS.map(str::to_owned)));
                        self.complain(key.span(), &message);
                    }
                },
            }
        }
        if route.path.is_empty() && self.problems.len() == problems {
            self.complain(span, "a [[route]] needs a `path`, such as path = \"/v1\"");
        }
        (self.problems.len() == problems).then_some(route)
    }

    /// One of a route's upstreams.
    fn route_upstream(
        &mut self,
        item: &Spanned<DeValue<'_>>,
        upstreams: &mut Vec<UpstreamTable>,
    ) -> Option<UpstreamReference> {
        let mismatch = || format!("upstreams: {ROUTE_UPSTREAMS}, found {}", describe(item.get_ref()));
        let message = match item.get_ref() {
            DeValue::String(url) => match UpstreamUrl::parse(url) {
                Ok(url) => return Some(UpstreamReference::Url(url)),
                Err(message) => format!("upstreams: {message}"),
            },
            DeValue::Integer(index) => match index.as_str().parse() {
                Ok(index) => return Some(UpstreamReference::Index(index)),
                Err(_) => mismatch(),
            },
            DeValue::Table(table) => {
                let table = self.upstream(item.span(), table)?;
                let reference = UpstreamReference::Url(table.url.clone());
                upstreams.push(table);
                return Some(reference);
            }
            _ => mismatch(),
        };
        self.complain(item.span(), &message);
        None
    }

    /// The overall list, of URLs and tables.
    fn upstreams(&mut self, value: &Spanned<DeValue<'_>>, file: &mut File) {
        let DeValue::Array(items) = value.get_ref() else {
            return self.complain(value.span(), "upstreams are written as [[upstream]], with two brackets");
        };
        if items.len() > UPSTREAMS_MAX {
            let message = format!("upstream: at most {UPSTREAMS_MAX}, found {}", items.len());
            return self.complain(value.span(), &message);
        }
        let mut urls = Vec::new();
        for item in items.iter() {
            if let DeValue::Table(table) = item.get_ref() {
                if let Some(table) = self.upstream(item.span(), table) {
                    urls.push(table.url.clone());
                    file.upstreams.push(table);
                }
                continue;
            }
            match from_toml(&table::UPSTREAM.kind, item) {
                Ok(Value::Upstreams(some)) => urls.extend(some),
                Ok(other) => unreachable!("upstreams are not {other:?}"),
                Err((span, message)) => self.complain(span, &format!("upstream: {message}")),
            }
        }
        let place = self.place(value.span().start);
        file.values.insert(table::UPSTREAM.name, (Value::Upstreams(urls), place));
    }

    fn upstream(&mut self, span: Range<usize>, table: &DeTable<'_>) -> Option<UpstreamTable> {
        let mut url = None;
        let mut values = HashMap::new();
        let problems = self.problems.len();
        for (key, value) in table {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("url", DeValue::String(text)) => match UpstreamUrl::parse(text) {
                    Ok(parsed) => url = Some(parsed),
                    Err(message) => self.complain(value.span(), &format!("url: {message}")),
                },
                ("url", other) => {
                    let message = format!(
                        "url: expected {}, found {}",
                        table::UPSTREAM.kind.expectation(),
                        describe(other)
                    );
                    self.complain(value.span(), &message);
                }
                _ => {
                    self.inner("upstream", &["url"], |setting| setting.per_upstream, key, value, &mut values)
                }
            }
        }
        if url.is_none() && self.problems.len() == problems {
            self.complain(
                span.clone(),
                "an [[upstream]] needs a `url`, such as url = \"https://api.example.com\"",
            );
        }
        let place = self.place(span.start);
        url.filter(|_| self.problems.len() == problems).map(|url| UpstreamTable { place, url, values })
    }

    fn listeners(&mut self, value: &Spanned<DeValue<'_>>, listeners: &mut Vec<ListenerTable>) {
        let DeValue::Array(items) = value.get_ref() else {
            return self.complain(value.span(), "listeners are written as [[listener]], with two brackets");
        };
        if items.len() > LISTENERS_MAX {
            let message = format!("at most {LISTENERS_MAX} listeners, found {}", items.len());
            return self.complain(value.span(), &message);
        }
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(table) => listeners.extend(self.listener(item.span(), table)),
                other => {
                    let message = format!("expected a [[listener]] table, found {}", describe(other));
                    self.complain(item.span(), &message);
                }
            }
        }
    }

    fn listener(&mut self, span: Range<usize>, table: &DeTable<'_>) -> Option<ListenerTable> {
        let (mut address, mut tls) = (None, None);
        let mut values = HashMap::new();
        let problems = self.problems.len();
        for (key, value) in table {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("address", DeValue::String(text)) => match parse_listen(text) {
                    Ok(parsed) => address = Some(parsed),
                    Err(message) => self.complain(value.span(), &format!("address: {message}")),
                },
                ("tls", DeValue::Boolean(on)) => tls = Some(*on),
                (name @ ("address" | "tls"), other) => {
                    let kind = if name == "tls" { Kind::Switch } else { Kind::Listen };
                    let message =
                        format!("{name}: expected {}, found {}", kind.expectation(), describe(other));
                    self.complain(value.span(), &message);
                }
                _ => self.inner(
                    "listener",
                    &LISTENER_KEYS,
                    |setting| setting.per_listener,
                    key,
                    value,
                    &mut values,
                ),
            }
        }
        if address.is_none() && self.problems.len() == problems {
            self.complain(
                span.clone(),
                "a [[listener]] needs an `address`, such as address = \"0.0.0.0:443\"",
            );
        }
        let place = self.place(span.start);
        address.filter(|_| self.problems.len() == problems).map(|address| ListenerTable {
            place,
            address,
            tls,
            values,
        })
    }

    /// A key of a table within the file, where some settings have names of their own.
    fn inner(
        &mut self,
        table: &str,
        others: &[&str],
        inner: fn(&Setting) -> Option<&'static str>,
        key: &Spanned<Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
        into: &mut HashMap<&'static str, (Value, Place)>,
    ) {
        let name: &str = key.get_ref();
        if let Some(setting) = table::ALL.iter().find(|setting| inner(setting) == Some(name)) {
            return self.named_setting(name, setting, value, into);
        }
        let message = match table::by_key(name).map(inner) {
            Some(Some(short)) => format!("in a [[{table}]] `{name}` is called `{short}`"),
            Some(None) => {
                format!("`{name}` is a setting of the whole server: move it above the first table")
            }
            None => {
                let keys =
                    table::ALL.iter().filter_map(|setting| inner(setting)).chain(others.iter().copied());
                self.unknown(name, keys.map(str::to_owned))
            }
        };
        self.complain(key.span(), &message);
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

    fn complain(&mut self, span: Range<usize>, message: &str) {
        self.problems.push((span.start, message.to_owned()));
    }

    /// The mistakes in order of place, as far as they are told.
    fn told(&mut self) -> Vec<Problem> {
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

    fn unknown_overall(&self, name: &str, value: &DeValue<'_>) -> String {
        if matches!(value, DeValue::Table(_)) && name != "routes" {
            return format!(
                "unknown table `{name}`: settings stand at the top level, and there are [[route]], [[listener]] and [[upstream]]"
            );
        }
        let keys = table::ALL.iter().map(|setting| setting.key());
        self.unknown(name, keys.chain(["route".to_owned(), "listener".to_owned()]))
    }

    /// Complains of an unknown key and names the one that was probably meant.
    fn unknown(&self, name: &str, candidates: impl Iterator<Item = String>) -> String {
        // Comparing it with every key takes longer than all else.
        let wanted = self.problems.len() < PROBLEMS_MAX && name.len() <= GUESS_BYTES_MAX;
        match wanted.then(|| guess(name, candidates)).flatten() {
            Some(guess) => format!("unknown key `{name}`; did you mean `{guess}`?"),
            None => format!("unknown key `{name}`; docs/CONFIG.md (`tokenring config-doc`) lists them all"),
        }
    }

    fn place(&self, offset: usize) -> Place {
        let mark = self.marks[self.marks.partition_point(|mark| mark.offset <= offset).saturating_sub(1)];
        let Mark { line, column, .. } = mark.behind(self.text.get(mark.offset..offset).unwrap_or_default());
        Place { file: self.name.to_owned(), line, column }
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

/// The candidate nearest to `name`, if it is near enough to be a slip.
fn guess(name: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    // A third of the letters wrong is a slip; more is another word.
    let far = (name.len() / 3).max(2);
    nearest(&name, candidates, far)
}

/// The candidate at most `far` letters from `name`.
pub(super) fn nearest(name: &str, candidates: impl Iterator<Item = String>, far: usize) -> Option<String> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(name, &candidate), candidate))
        .filter(|(distance, _)| *distance <= far)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        read("tokenring.toml", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

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

    #[test]
    fn lists_of_backends_have_an_end() {
        let many = |count: usize| (0..count).map(|n| format!("\"http://a{n}\", ")).collect::<String>();
        assert!(read("f", &format!("upstream = [{}]", many(UPSTREAMS_MAX))).is_ok());
        for text in [
            format!("upstream = [{}]", many(UPSTREAMS_MAX + 1)),
            format!("[[route]]\npath = \"/\"\nupstreams = [{}]", many(UPSTREAMS_MAX + 1)),
        ] {
            assert!(problems(&text)[0].ends_with("at most 1024, found 1025"));
        }
    }

    #[test]
    fn broken_toml_names_its_place() {
        let problems = problems("backlog = 10\nlisten = = 3\n");
        assert!(problems[0].starts_with("tokenring.toml:2:10: not valid TOML"), "{problems:?}");
        let problems = self::problems("backlog = 1\nbacklog = 2");
        assert!(problems[0].starts_with("tokenring.toml:2:1: not valid TOML: duplicate key"), "{problems:?}");
    }

    #[test]
    fn routes() {
        let file = read(
            "f",
            "first_token_ms = \"2m\"\n[[route]]\npath = \"/v1/\"\nupstreams = [\"http://a:1\", 0]\ntotal_ms = 5\n",
        )
        .unwrap();
        assert_eq!(file.values["first-token-ms"].0, Value::Integer(120_000));
        let route = &file.routes[0];
        assert_eq!((route.path.as_str(), route.upstreams.as_ref().unwrap().len()), ("/v1", 2));
        assert_eq!(route.values["total-ms"].0, Value::Integer(5));
    }

    #[test]
    fn listeners_and_upstreams() {
        let text = "tls_min = \"1.3\"\n\
                    [[listener]]\naddress = \"[::1]:443\"\ncert = [\"a, b.pem\", \"c.pem\"]\nkey = \"k.pem,l.pem\"\n\
                    [[upstream]]\nurl = \"https://a\"\nca = \"ca.pem\"\n[[upstream]]\nurl = \"http://b\"\n\
                    [[route]]\npath = \"/\"\nupstreams = [{ url = \"https://c\", tls_insecure = true }, 0]\n";
        let file = read("f", text).unwrap();
        let listener = &file.listeners[0];
        assert_eq!((listener.address.to_string(), listener.tls), ("[::1]:443".to_owned(), None));
        let files = |names: &[&str]| Value::Files(names.iter().map(PathBuf::from).collect());
        assert_eq!(listener.values["tls-cert"].0, files(&["a, b.pem", "c.pem"]));
        assert_eq!(listener.values["tls-key"].0, files(&["k.pem", "l.pem"]));
        let urls = [UpstreamUrl::parse("https://a").unwrap(), UpstreamUrl::parse("http://b").unwrap()];
        assert_eq!(file.values["upstream"].0, Value::Upstreams(urls.to_vec()));
        let said: Vec<_> =
            file.upstreams.iter().map(|table| (table.url.url.as_str(), table.values.len())).collect();
        // In the order of the keys, as TOML's tables have none of their own.
        assert_eq!(said, [("https://c", 1), ("https://a", 1), ("http://b", 0)]);
        assert_eq!(file.routes[0].upstreams.as_ref().unwrap().len(), 2);
    }

    #[test]
    fn mistakes_in_listeners_and_upstreams() {
        for (text, expected) in [
            (
                "[[listener]]\ntls = true",
                "1:1: a [[listener]] needs an `address`, such as address = \"0.0.0.0:443\"",
            ),
            ("[[listener]]\naddress = \"x\"", "2:11: address: expected ADDRESS:PORT such as"),
            ("[[listener]]\naddress = 1", "2:11: address: expected ADDRESS:PORT such as"),
            ("[[listener]]\ntls = \"yes\"", "2:7: tls: expected on or off (true or false), found \"yes\""),
            ("[[listener]]\ntls_cert = \"a\"", "2:1: in a [[listener]] `tls_cert` is called `cert`"),
            ("[[listener]]\nserts = \"a\"", "2:1: unknown key `serts`; did you mean `cert`?"),
            (
                "[[listener]]\nbacklog = 1",
                "2:1: `backlog` is a setting of the whole server: move it above the first table",
            ),
            ("[listener]\naddress = \"a\"", "1:1: listeners are written as [[listener]], with two brackets"),
            ("listener = [1]", "1:13: expected a [[listener]] table, found 1"),
            ("[[upstream]]\nca = \"a\"", "1:1: an [[upstream]] needs a `url`, such as"),
            ("[[upstream]]\nurl = \"ftp://a\"", "2:7: url: expected http[s]://host[:port][/base], found"),
            (
                "[[upstream]]\nserver_name = \"a b\"",
                "2:15: server_name: expected a DNS name or an IP address, found",
            ),
            ("[[upstream]]\nupstream_ca = \"a\"", "2:1: in a [[upstream]] `upstream_ca` is called `ca`"),
            ("[upstream]\nurl = \"a\"", "1:1: upstreams are written as [[upstream]], with two brackets"),
            (
                "[[route]]\npath = \"/\"\nupstreams = [1.5]",
                "3:14: upstreams: expected a list of URLs, tables with",
            ),
            (
                "[[route]]\npath = \"/\"\nupstreams = \"http://a\"",
                "3:13: upstreams: expected a list of URLs, tables with",
            ),
            ("[[listener]]\naddress = \"[::]:1\"\ncert = [1]", "3:9: cert: expected the path of a file"),
        ] {
            let problems = problems(text);
            assert!(problems[0].starts_with(&format!("tokenring.toml:{expected}")), "{text}: {problems:?}");
        }
    }

    #[test]
    fn mistakes_in_routes() {
        assert_eq!(
            problems("[[route]]\npath = \"/a\"\nring_depth = 64"),
            [
                "tokenring.toml:3:1: `ring_depth` is a setting of the whole server: move it above the first [[route]]"
            ]
        );
        assert_eq!(
            problems("[[route]]\nname = \"a\""),
            ["tokenring.toml:1:1: a [[route]] needs a `path`, such as path = \"/v1\""]
        );
        assert_eq!(
            problems("[[route]]\npath = \"v1\""),
            ["tokenring.toml:2:8: path: expected a path such as \"/v1/chat\", found \"v1\""]
        );
        assert_eq!(
            problems("[[route]]\npath = \"/a\"\nupstream = []"),
            ["tokenring.toml:3:1: unknown key `upstream` in a route; did you mean `upstreams`?"]
        );
        assert_eq!(
            problems("[server]\nbacklog = 1"),
            [
                "tokenring.toml:1:2: unknown table `server`: settings stand at the top level, and there are [[route]], [[listener]] and [[upstream]]"
            ]
        );
        assert_eq!(
            problems("[route]\npath = \"/a\""),
            ["tokenring.toml:1:1: routes are written as [[route]], with two brackets"]
        );
    }
}
