//! Lays flags over environment over file over defaults, remembers where each value came from, and checks the relations
//! between values.

use super::address::UpstreamUrl;
use super::file::{self, File, RouteTable, UpstreamReference};
use super::table::{self, Default, Setting};
use super::tls::{self, ListenerValues, UpstreamValues};
use super::value::Value;
use super::{Machine, Place, Problem, descriptors_per_client};
use rustls::pki_types::ServerName;
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    Flag(&'static str),
    Variable(String),
    File(Place),
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag(name) => write!(f, "flag --{name}"),
            Source::Variable(name) => write!(f, "environment {name}"),
            Source::File(place) => place.fmt(f),
            Source::Default => f.write_str("default"),
        }
    }
}

/// Values of settings with their sources. Getters panic for a setting of another kind: that is a mistake in this crate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Values(pub(super) HashMap<&'static str, (Value, Source)>);

macro_rules! getter {
    ($name:ident, $variant:ident($pattern:ident) => $type:ty, $result:expr) => {
        pub(crate) fn $name(&self, setting: &Setting) -> $type {
            match self.get(setting) {
                Value::$variant($pattern) => $result,
                other => unreachable!("{} is {other:?}", setting.name),
            }
        }
    };
}

impl Values {
    pub(crate) fn get(&self, setting: &Setting) -> &Value {
        match self.0.get(setting.name) {
            Some((value, _)) => value,
            None => unreachable!("{} has no value", setting.name),
        }
    }

    pub(crate) fn source(&self, setting: &Setting) -> &Source {
        self.0.get(setting.name).map_or(&Source::Default, |(_, source)| source)
    }

    /// For tests of every bound.
    #[cfg(test)]
    pub(crate) fn set(&mut self, setting: &'static Setting, number: u64) {
        self.0.insert(setting.name, (Value::Integer(number), Source::Default));
    }

    getter!(integer, Integer(number) => u64, *number);
    getter!(switch, Switch(on) => bool, *on);
    getter!(choice, Choice(word) => &'static str, word);
    getter!(log_filter, LogFilter(filter) => &str, filter);
    getter!(listen, Listen(addresses) => &[SocketAddr], addresses);
    getter!(upstreams, Upstreams(urls) => &[UpstreamUrl], urls);
    getter!(file, File(path) => Option<&Path>, path.as_deref());
    getter!(files, Files(paths) => &[PathBuf], paths);
    getter!(server_name, ServerName(name) => Option<&ServerName<'static>>, name.as_ref());
    getter!(cpus, Cpus(cpus) => &[usize], cpus);
    getter!(prefix, Prefix(prefix) => Option<&str>, prefix.as_deref());
    getter!(cors, Cors(cors) => &protocol::cors::Cors, cors);
    getter!(admin, Admin(address) => &super::address::AdminAddress, address);
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    pub(crate) values: Values,
    /// Every backend named anywhere: the overall ones first, then those only routes name.
    pub(crate) upstreams: Vec<UpstreamUrl>,
    /// What is said of TLS with each of them; `None`: `http`.
    pub(crate) upstream_tls: Vec<Option<UpstreamValues>>,
    /// Those of `listen`, of `listen_tls`, and the `[[listener]]`s, in this order.
    pub(crate) listeners: Vec<ListenerValues>,
    /// Most specific first; the last matches every path.
    pub(crate) routes: Vec<RouteValues>,
}

/// A route with all its values.
#[derive(Clone, Debug)]
pub(crate) struct RouteValues {
    pub(crate) name: String,
    pub(crate) path: String,
    /// Indexes into [`Effective::upstreams`]; empty: the demo model.
    pub(crate) upstreams: Vec<usize>,
    pub(crate) values: Values,
}

/// Everything a configuration is made from.
pub(crate) struct Layers<'a> {
    pub(crate) flags: &'a HashMap<&'static str, Value>,
    pub(crate) variable: &'a dyn Fn(&str) -> Option<String>,
    /// Names of all variables, to find misspelt ones.
    pub(crate) variables: Vec<String>,
    pub(crate) file: File,
    pub(crate) machine: &'a Machine,
}

/// Works out the effective configuration, or lists everything that is wrong with it.
pub(crate) fn load(layers: Layers<'_>) -> Result<Effective, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut values = overall(&layers, &mut problems);
    if !layers.file.listeners.is_empty() && *values.source(&table::LISTEN) == Source::Default {
        values.0.insert(table::LISTEN.name, (Value::Listen(Vec::new()), Source::Default));
    }
    let mut upstreams: Vec<UpstreamUrl> = Vec::new();
    for url in values.upstreams(&table::UPSTREAM) {
        if upstreams.contains(url) {
            problems.push(Problem::new(format!("upstream {url} is given twice")));
        }
        upstreams.push(url.clone());
    }
    let routes = routes(&layers.file.routes, &values, &mut upstreams, &mut problems);
    let listeners = tls::listeners(&layers.file.listeners, &values, layers.machine, &mut problems);
    let upstream_tls = tls::upstreams(&layers.file.upstreams, &upstreams, &values, &mut problems);
    relations(&values, layers.machine, !upstreams.is_empty(), &mut problems);
    durable_relations(&values, &routes, &mut problems);
    misspelt(&layers.variables, &mut problems);
    if problems.is_empty() {
        Ok(Effective { values, upstreams, upstream_tls, listeners, routes })
    } else {
        Err(problems)
    }
}

fn overall(layers: &Layers<'_>, problems: &mut Vec<Problem>) -> Values {
    let mut values = Values(HashMap::new());
    let mut given = |setting: &'static Setting| {
        if let Some(value) = layers.flags.get(setting.name) {
            return Some((value.clone(), Source::Flag(setting.name)));
        }
        let names = std::iter::once(setting.variable()).chain(setting.also_variable.map(str::to_owned));
        for name in names {
            // An empty variable is one that a deployment left unset.
            if let Some(text) = (layers.variable)(&name).filter(|text| !text.trim().is_empty()) {
                match setting.kind.parse(&text) {
                    Ok(value) => return Some((value, Source::Variable(name))),
                    Err(message) => {
                        problems.push(Problem::new(format!("environment variable {name}: {message}")))
                    }
                }
            }
        }
        let (value, place) = layers.file.values.get(setting.name)?;
        Some((value.clone(), Source::File(place.clone())))
    };
    let mut derived = Vec::new();
    for setting in table::ALL {
        match (given(setting), &setting.default) {
            (Some(entry), _) => {
                values.0.insert(setting.name, entry);
            }
            (None, Default::Fixed(value)) => {
                values.0.insert(setting.name, (value(), Source::Default));
            }
            (None, Default::Derived(how, _)) => derived.push((setting, how)),
        }
    }
    for (setting, how) in derived {
        let value = how(layers.machine, &values);
        values.0.insert(setting.name, (value, Source::Default));
    }
    values
}

fn routes(
    tables: &[RouteTable],
    overall: &Values,
    upstreams: &mut Vec<UpstreamUrl>,
    problems: &mut Vec<Problem>,
) -> Vec<RouteValues> {
    let shared = overall.upstreams(&table::UPSTREAM).len();
    let mut routes: Vec<RouteValues> = Vec::new();
    for route in tables {
        if routes.iter().any(|other| other.path == route.path) {
            problems.push(Problem::at(&route.place, &format!("a second route for {:?}", route.path)));
        }
        let name = route.name.clone().unwrap_or_else(|| route.path.clone());
        if routes.iter().any(|other| other.name == name) {
            problems.push(Problem::at(&route.place, &format!("a second route with the name {name:?}")));
        }
        let indexes = match &route.upstreams {
            None => (0..shared).collect(),
            Some(references) => references
                .iter()
                .filter_map(|(to, place)| resolve(to, place, shared, upstreams, problems))
                .collect(),
        };
        let mut values = Values(HashMap::new());
        for setting in table::ALL.iter().filter(|setting| setting.per_route) {
            let entry = match route.values.get(setting.name) {
                Some((value, place)) => (value.clone(), Source::File(place.clone())),
                None => (overall.get(setting).clone(), overall.source(setting).clone()),
            };
            values.0.insert(setting.name, entry);
        }
        routes.push(RouteValues { name, path: route.path.clone(), upstreams: indexes, values });
    }
    if !routes.iter().any(|route| route.path == "/") {
        if !tables.is_empty() && shared == 0 {
            problems.push(Problem::new(
                "no route matches every path: give an overall `upstream`, or a [[route]] with path = \"/\" \
                 (upstreams = [] there lets the demo model answer)",
            ));
        }
        let mut values = overall.clone();
        values
            .0
            .retain(|name, _| table::ALL.iter().any(|setting| setting.name == *name && setting.per_route));
        let upstreams = (0..shared).collect();
        routes.push(RouteValues { name: "default".to_owned(), path: "/".to_owned(), upstreams, values });
    }
    // A longer prefix is more specific than any shorter one that matches the same path; "/" comes last.
    routes.sort_by_key(|route| std::cmp::Reverse(if route.path == "/" { 0 } else { route.path.len() }));
    routes
}

fn resolve(
    reference: &UpstreamReference,
    place: &Place,
    shared: usize,
    upstreams: &mut Vec<UpstreamUrl>,
    problems: &mut Vec<Problem>,
) -> Option<usize> {
    match reference {
        UpstreamReference::Index(index) => {
            let index = usize::try_from(*index).ok().filter(|&index| index < shared);
            if index.is_none() {
                let message = format!("upstreams: expected an index into the {shared} of `upstream`, from 0");
                problems.push(Problem::at(place, &message));
            }
            index
        }
        UpstreamReference::Url(url) => {
            Some(upstreams.iter().position(|known| known == url).unwrap_or_else(|| {
                upstreams.push(url.clone());
                upstreams.len() - 1
            }))
        }
    }
}

/// A variable one or two letters from one of ours is a slip. Others that begin alike are none of ours: Kubernetes sets
/// `TOKENRING_SERVICE_HOST` and the like for a service of that name.
fn misspelt(variables: &[String], problems: &mut Vec<Problem>) {
    let known = || table::ALL.iter().map(|setting| setting.variable()).chain(["TOKENRING_CONFIG".to_owned()]);
    for name in variables.iter().filter(|name| name.starts_with("TOKENRING_")) {
        if known().all(|known| known != **name) {
            let far = if name.len() > "TOKENRING_".len() + 6 { 2 } else { 1 };
            if let Some(guess) = file::nearest(name, known(), far) {
                problems.push(Problem::new(format!(
                    "unknown environment variable {name}; did you mean {guess}?"
                )));
            }
        }
    }
}

/// What must hold between the settings of durable streams.
fn durable_relations(values: &Values, routes: &[RouteValues], problems: &mut Vec<Problem>) {
    let durable: Vec<_> = routes.iter().filter(|route| route.values.switch(&table::DURABLE)).collect();
    for route in &durable {
        let problem = |what: &str| {
            let source = route.values.source(&table::DURABLE);
            Problem::new(format!("route {} is durable ({source}): {what}", route.name))
        };
        if values.file(&table::DATA_DIR).is_none() {
            problems.push(problem("give a data_dir, where its streams are written"));
        }
        let (window, ids) =
            (route.values.integer(&table::RESUME_WINDOW), route.values.switch(&table::EVENT_IDS));
        if window == 0 || !ids {
            problems.push(problem("without resume_window or event_ids its streams cannot be read again"));
        }
    }
    let nothing = durable.is_empty() && values.prefix(&table::DURABLE_PREFIX).is_none();
    if values.file(&table::DATA_DIR).is_some() && nothing {
        problems.push(Problem::new(format!(
            "data_dir ({}) is of no use while durable_prefix ({}) is off and no route is durable: nothing else is written there",
            values.source(&table::DATA_DIR),
            values.source(&table::DURABLE_PREFIX),
        )));
    }
    for (small, large) in [
        (&table::DURABLE_BODY_BYTES_MAX, &table::DURABLE_STREAM_BYTES_MAX),
        (&table::DURABLE_STREAM_BYTES_MAX, &table::DURABLE_STORE_BYTES_MAX),
    ] {
        if values.integer(small) > values.integer(large) {
            problems.push(Problem::new(format!(
                "{} ({}, {}) must not exceed {} ({}, {}): an append must fit into its stream, a stream into the store",
                small.key(),
                values.integer(small),
                values.source(small),
                large.key(),
                values.integer(large),
                values.source(large),
            )));
        }
    }
}

/// What must hold between settings.
fn relations(values: &Values, machine: &Machine, has_upstreams: bool, problems: &mut Vec<Problem>) {
    let mut less = |low: &Setting, high: &Setting, why: &str| {
        let (small, large) = (values.integer(low), values.integer(high));
        if small >= large {
            problems.push(Problem::new(format!(
                "{} ({small}, {}) must be less than {} ({large}, {}): {why}",
                low.key(),
                values.source(low),
                high.key(),
                values.source(high),
            )));
        }
    };
    less(&table::LAG_LOW, &table::LAG_HIGH, "without a gap, pause and resume alternate with every event");
    less(&table::TARGET_BYTES_MAX, &table::HEAD_BYTES_MAX, "a target that fits must leave room for its head");
    let (overdraft, event) =
        (values.integer(&table::OVERDRAFT_BYTES_MAX), values.integer(&table::EVENT_BYTES_MAX));
    if overdraft < 4 * event {
        problems.push(Problem::new(format!(
            "overdraft_bytes_max ({overdraft}, {}) must be at least four times event_bytes_max ({event}, {}): an event that is \
             allowed must find room for itself and its copies",
            values.source(&table::OVERDRAFT_BYTES_MAX),
            values.source(&table::EVENT_BYTES_MAX),
        )));
    }
    let cpus = values.cpus(&table::CPUS);
    for cpu in cpus.iter().filter(|cpu| !machine.cpus.is_empty() && !machine.cpus.contains(cpu)) {
        problems.push(Problem::new(format!(
            "cpus ({}): this process may not run on CPU {cpu}; it may use {}",
            values.source(&table::CPUS),
            super::address::format_cpus(&machine.cpus),
        )));
    }
    let shards = values.integer(&table::SHARDS);
    if !cpus.is_empty() && shards > cpus.len() as u64 {
        problems.push(Problem::new(format!(
            "shards ({shards}, {}) must not exceed the {} of cpus ({}): a shard needs a CPU of its own",
            values.source(&table::SHARDS),
            cpus.len(),
            values.source(&table::CPUS),
        )));
    }
    let connections = values.integer(&table::CONNS_MAX);
    let per_client = descriptors_per_client(has_upstreams);
    let left = machine.left_for_connections(shards);
    if shards.saturating_mul(connections).saturating_mul(per_client) > left {
        problems.push(Problem::new(format!(
            "conns_max ({connections}, {}) × {shards} shards × {per_client} descriptors exceeds what the limit of {} \
             descriptors leaves ({left}): raise the limit (ulimit -Hn, LimitNOFILE=){}",
            values.source(&table::CONNS_MAX),
            machine.descriptors,
            match left / (per_client * shards) {
                0 => String::new(),
                fewer => format!(", or lower conns_max to {fewer} or shards"),
            },
        )));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn machine() -> Machine {
        Machine { parallelism: 4, cpus: vec![0, 1, 2, 3], descriptors: 20_000, memory: 8 << 30 }
    }

    pub(crate) fn load_with(
        flags: &[(&'static str, &str)],
        variables: &[(&str, &str)],
        text: &str,
    ) -> Result<Effective, Vec<String>> {
        let flags = flags
            .iter()
            .map(|(name, text)| {
                let setting = table::ALL.iter().find(|setting| setting.name == *name).unwrap();
                (*name, setting.kind.parse(text).unwrap())
            })
            .collect();
        let variable = |name: &str| {
            variables.iter().find(|(variable, _)| *variable == name).map(|(_, text)| (*text).to_owned())
        };
        let words = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        let file = file::read("t.toml", text).map_err(words)?;
        let names = variables.iter().map(|(name, _)| (*name).to_owned()).collect();
        load(Layers { flags: &flags, variable: &variable, variables: names, file, machine: &machine() })
            .map_err(words)
    }

    #[test]
    fn flags_over_environment_over_file_over_default() {
        let text = "backlog = 3\nbuffers = 32\nring_depth = 64\n";
        let effective =
            load_with(&[("backlog", "1")], &[("TOKENRING_BACKLOG", "2"), ("TOKENRING_BUFFERS", "16")], text)
                .unwrap();
        let source =
            |setting| (effective.values.integer(setting), effective.values.source(setting).to_string());
        assert_eq!(source(&table::BACKLOG), (1, "flag --backlog".to_owned()));
        assert_eq!(source(&table::BUFFERS), (16, "environment TOKENRING_BUFFERS".to_owned()));
        assert_eq!(source(&table::RING_DEPTH), (64, "t.toml:3:14".to_owned()));
        assert_eq!(source(&table::PREEMPT_MS), (10, "default".to_owned()));
    }

    #[test]
    fn our_variable_goes_before_rust_log() {
        let both = [("RUST_LOG", "debug"), ("TOKENRING_LOG_LEVEL", "warn")];
        assert_eq!(load_with(&[], &both, "").unwrap().values.log_filter(&table::LOG_LEVEL), "warn");
        assert_eq!(load_with(&[], &both[..1], "").unwrap().values.log_filter(&table::LOG_LEVEL), "debug");
    }

    #[test]
    fn bad_variables_are_named_and_empty_ones_ignored() {
        assert_eq!(
            load_with(&[], &[("TOKENRING_SHARDS", "many")], "").unwrap_err(),
            ["environment variable TOKENRING_SHARDS: expected an integer from 1 to 1024, found \"many\""]
        );
        assert!(load_with(&[], &[("TOKENRING_SHARDS", "")], "").is_ok());
    }

    #[test]
    fn misspelt_variables_are_found_and_foreign_ones_left_alone() {
        assert_eq!(
            load_with(&[], &[("TOKENRING_RING_DEPHT", "64")], "").unwrap_err(),
            ["unknown environment variable TOKENRING_RING_DEPHT; did you mean TOKENRING_RING_DEPTH?"]
        );
        let foreign =
            ["TOKENRING_SERVICE_HOST", "TOKENRING_PORT", "TOKENRING_PORT_8080_TCP", "TOKENRING_BIN"];
        assert!(load_with(&[], &foreign.map(|name| (name, "x")), "").is_ok());
    }

    #[test]
    fn defaults_derive_from_the_machine() {
        let values = load_with(&[], &[], "").unwrap().values;
        assert_eq!(values.integer(&table::SHARDS), 4);
        // (20000 - 128 - 4 * (16 + 64)) / (2 * 4)
        assert_eq!(values.integer(&table::CONNS_MAX), 2444);
        let values = load_with(&[("cpus", "0-1"), ("upstream", "http://a")], &[], "").unwrap().values;
        assert_eq!(values.integer(&table::SHARDS), 2);
        assert_eq!(values.integer(&table::CONNS_MAX), (20_000 - 128 - 2 * (16 + 64) - 2 * 64) / 4);
    }

    #[test]
    fn the_overdraft_has_room_for_some_events() {
        let of = |flags: &[(&'static str, &str)]| {
            load_with(flags, &[], "").unwrap().values.integer(&table::OVERDRAFT_BYTES_MAX)
        };
        assert_eq!(of(&[]), 256 << 20);
        assert_eq!(of(&[("event-bytes-max", "1GiB")]), 4 << 30);
    }

    #[test]
    fn relations_between_settings() {
        let error = |flags: &[(&'static str, &str)]| load_with(flags, &[], "").unwrap_err().join("\n");
        assert!(
            error(&[("lag-low", "64KiB")])
                .contains("lag_low (65536, flag --lag-low) must be less than lag_high (65536")
        );
        assert!(error(&[("overdraft-bytes-max", "1MiB")]).contains("at least four times event_bytes_max"));
        assert!(
            error(&[("durable-body-bytes-max", "32MiB")])
                .contains("must not exceed durable_stream_bytes_max (16777216")
        );
        assert!(
            error(&[("data-dir", "/tmp"), ("durable-prefix", "off")])
                .contains("data_dir (flag --data-dir) is of no use")
        );
        assert!(error(&[("durable-store-bytes-max", "1MiB")]).contains("durable_store_bytes_max (1048576"));
        assert!(error(&[("cpus", "0,9")]).contains("may not run on CPU 9; it may use 0-3"));
        assert!(error(&[("cpus", "0"), ("shards", "2")]).contains("must not exceed the 1 of cpus"));
    }

    #[test]
    fn a_client_needs_a_second_descriptor_only_where_there_is_a_backend() {
        let of = |conns_max, more: &[(&'static str, &'static str)]| {
            load_with(&[&[("conns-max", conns_max)], more].concat(), &[], "")
        };
        let backend = [("upstream", "http://a")];
        let error = of("2445", &backend).unwrap_err().join("\n");
        assert!(error.contains("× 2 descriptors") && error.contains("lower conns_max to 2444"), "{error}");
        assert!(of("2444", &backend).is_ok() && of("4888", &[]).is_ok());
        let error = of("4889", &[]).unwrap_err().join("\n");
        assert!(error.contains("× 1 descriptors") && error.contains("lower conns_max to 4888"), "{error}");
    }

    #[test]
    fn a_listener_of_ones_own_takes_the_place_of_the_default() {
        let listeners = |flags: &[(&'static str, &str)], text: &str| -> Vec<String> {
            let listeners = load_with(flags, &[], text).unwrap().listeners;
            let words = |listener: &ListenerValues| {
                format!("{}{}", listener.address, if listener.tls.is_some() { " tls" } else { "" })
            };
            listeners.iter().map(words).collect()
        };
        let pair = [("tls-cert", "a"), ("tls-key", "b")];
        assert_eq!(listeners(&[], ""), ["127.0.0.1:8080"]);
        let tls = [&pair[..], &[("listen-tls", "[::]:443")]].concat();
        assert_eq!(listeners(&tls, ""), ["[::]:443 tls"]);
        let both = [&tls[..], &[("listen", "127.0.0.1:80")]].concat();
        assert_eq!(listeners(&both, ""), ["127.0.0.1:80", "[::]:443 tls"]);
        assert_eq!(listeners(&[], "[[listener]]\naddress = \"127.0.0.1:1\""), ["127.0.0.1:1"]);
        assert_eq!(
            listeners(&pair, "[[listener]]\naddress = \"127.0.0.1:1\"\ntls = true"),
            ["127.0.0.1:1 tls"]
        );
    }

    #[test]
    fn mistakes_in_tls() {
        let check = |flags: &[(&'static str, &str)], text: &str, expected: &str| {
            let errors = load_with(flags, &[], text).unwrap_err();
            assert!(errors.len() == 1 && errors[0].contains(expected), "{flags:?} {text}: {errors:?}");
        };
        let listen = ("listen-tls", "127.0.0.1:1");
        check(
            &[listen],
            "",
            "the TLS listener 127.0.0.1:1 (flag --listen-tls) has no certificate: give --tls-cert",
        );
        check(
            &[listen, ("tls-cert", "a")],
            "",
            "1 certificate in tls_cert (flag --tls-cert) and 0 keys in tls_key (default)",
        );
        check(&[listen, ("tls-cert", "a,b"), ("tls-key", "k")], "", "2 certificates in tls_cert");
        let pair = [listen, ("tls-cert", "a"), ("tls-key", "b")];
        check(&[&pair[..], &[("tls-client-auth", "optional")]].concat(), "", "nothing to check them with");
        check(
            &[&pair[..], &[("listen", "127.0.0.1:1")]].concat(),
            "",
            "127.0.0.1:1 (flag --listen-tls) is there twice",
        );
        check(&pair[1..2], "", "tls_cert (flag --tls-cert) is given, and no listener speaks TLS");
        check(&[("listen", "")], "", "listen: at least one address is needed");
        check(
            &[],
            "[[listener]]\naddress = \"[::]:1\"\ntls = false\ncert = \"a\"\nkey = \"b\"",
            "t.toml:1:1: tls is false",
        );
        // A key of all listeners is none of a listener that has a certificate of its own.
        let text = "tls_key = \"k\"\n[[listener]]\naddress = \"[::]:1\"\ncert = \"a\"";
        check(&[], text, "1 certificate in tls_cert (t.toml:4:8) and 0 keys in tls_key (default)");
        let https = ("upstream", "https://a");
        check(
            &[https, ("upstream-key", "k")],
            "",
            "upstream https://a: upstream_key (flag --upstream-key) needs upstream_cert",
        );
        check(
            &[https, ("upstream-ca", "c"), ("upstream-tls-insecure", "on")],
            "",
            "would never be looked at",
        );
        check(
            &[("upstream", "http://a"), ("upstream-ca", "c")],
            "",
            "upstream_ca (flag --upstream-ca) is given, and no upstream is https",
        );
        let text = "[[upstream]]\nurl = \"https://a\"\nca = \"x\"\n\
                    [[route]]\npath = \"/a\"\nupstreams = [{ url = \"https://a\", ca = \"y\" }]\n";
        check(&[], text, "https://a is told of differently at");
        check(&[], "[[upstream]]\nurl = \"http://a\"\nca = \"x\"", "t.toml:1:1: http://a is not https");
    }

    #[test]
    fn what_one_upstream_says_of_trust_takes_the_place_of_what_all_say() {
        let trust = |overall: &str, own: &str| {
            let text = format!("{overall}\n[[upstream]]\nurl = \"https://a\"\n{own}\n");
            let effective = load_with(&[], &[], &text).unwrap();
            super::tls::ClientFiles::of(&effective.upstream_tls[0].as_ref().unwrap().values).trust
        };
        use super::tls::Trust;
        assert_eq!(trust("", ""), Trust::System);
        assert_eq!(trust("upstream_ca = \"x\"", ""), Trust::File("x".into()));
        assert_eq!(trust("upstream_ca = \"x\"", "tls_insecure = true"), Trust::Everybody);
        assert_eq!(trust("upstream_tls_insecure = true", "ca = \"y\""), Trust::File("y".into()));
        assert_eq!(trust("upstream_ca = \"x\"", "ca = \"\""), Trust::System);
    }

    #[test]
    fn routes_inherit_and_are_ordered() {
        let text = "upstream = [\"http://a\", \"http://b\"]\nfirst_token_ms = 7\n\
                    [[route]]\npath = \"/v1\"\nupstreams = [1, \"http://c\"]\n\
                    [[route]]\npath = \"/v1/chat\"\nname = \"chat\"\nfirst_token_ms = 9\n";
        let effective = load_with(&[("total-ms", "5")], &[], text).unwrap();
        assert_eq!(effective.upstreams.len(), 3);
        let shape: Vec<_> = effective
            .routes
            .iter()
            .map(|route| {
                (route.name.as_str(), route.upstreams.clone(), route.values.integer(&table::FIRST_TOKEN_MS))
            })
            .collect();
        assert_eq!(shape, [("chat", vec![0, 1], 9), ("/v1", vec![1, 2], 7), ("default", vec![0, 1], 7)]);
        assert_eq!(effective.routes[0].values.integer(&table::TOTAL_MS), 5);
    }

    #[test]
    fn listeners_have_an_end() {
        let many = |count: u16| (1..=count).map(|port| format!("\"[::]:{port}\",")).collect::<String>();
        assert!(load_with(&[], &[], &format!("listen = [{}]", many(64))).is_ok());
        let problems = load_with(&[], &[], &format!("listen = [{}]", many(65))).unwrap_err();
        assert_eq!(problems, ["listen: at most 64 listeners, found 65"]);
    }

    #[test]
    fn mistakes_between_routes() {
        let error = |text: &str| load_with(&[], &[], text).unwrap_err().join("\n");
        assert!(error("[[route]]\npath = \"/a\"\n").contains("no route matches every path"));
        assert!(
            error("[[route]]\npath = \"/\"\n[[route]]\npath = \"/\"\n")
                .starts_with("t.toml:3:1: a second route for \"/\"")
        );
        assert!(
            error("upstream = \"http://a\"\n[[route]]\npath = \"/a\"\nupstreams = [1]")
                .contains("t.toml:4:14: upstreams: expected an index into the 1 of `upstream`, from 0")
        );
        assert!(error("upstream = [\"http://a\", \"http://A:80/\"]").contains("http://a is given twice"));
    }
}
