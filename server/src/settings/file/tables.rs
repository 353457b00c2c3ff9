//! Tables of the file: routes, listeners, backends.

use super::super::Place;
use super::super::address::{UpstreamUrl, parse_listen};
use super::super::table::{self, Setting};
use super::super::value::{Kind, Value};
use super::{File, ListenerTable, Reader, RouteTable, UpstreamReference, UpstreamTable, describe, from_toml};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Keys of a route that are not settings.
const ROUTE_KEYS: [&str; 3] = ["path", "name", "upstreams"];
/// What a route's `upstreams` is.
const ROUTE_UPSTREAMS: &str =
    "expected a list of URLs, tables with a `url`, or indexes into `upstream` from 0";
/// Keys of a listener that are not settings.
const LISTENER_KEYS: [&str; 2] = ["address", "tls"];
/// Listeners of a server: every shard binds each of them.
pub(in super::super) const LISTENERS_MAX: usize = 64;
/// Routes of one file: every request is compared with each in turn.
const ROUTES_MAX: usize = 256;
/// Backends of one list: every request is compared with each in turn, too.
const UPSTREAMS_MAX: usize = 1024;

impl Reader<'_> {
    pub(super) fn routes(&mut self, value: &Spanned<DeValue<'_>>, file: &mut File) {
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
    pub(super) fn upstreams(&mut self, value: &Spanned<DeValue<'_>>, file: &mut File) {
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

    pub(super) fn listeners(&mut self, value: &Spanned<DeValue<'_>>, listeners: &mut Vec<ListenerTable>) {
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
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use super::super::tests::problems;
    use super::*;
    use std::path::PathBuf;

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
