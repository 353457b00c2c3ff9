//! Texts of single settings, as a flag or a variable gives them: `name=text`. A value is what the letter of the
//! documentation says, is written so that the file gives it again, and fits where it goes; anything else is told in one
//! readable line.

use super::configuration::address::{AdminAddress, ServerAddress, UpstreamUrl, format_cpus, parse_cpus};
use super::configuration::file;
use super::configuration::table::ALL;
use super::configuration::value::{Kind, Unit, Value};
use protocol::http::{HeadLimits, header_slots, parse_request};
use std::net::SocketAddr;

/// Names of settings of every kind, and what stands in their values.
pub const WORDS: &[&str] = &[
    "ring-depth=",
    "body-bytes-max=",
    "total-ms=",
    "spin-us=",
    "access-log=",
    "slow-reader=",
    "durable-prefix=",
    "cors=",
    "listen=",
    "admin=",
    "upstream=",
    "cpus=",
    "data-dir=",
    "tls-cert=",
    "upstream-server-name=",
    "log-level=",
    "server=",
    "http://",
    "https://",
    "a.example",
    "127.0.0.1",
    "[::1]",
    "[fe80::1%1]",
    "localhost",
    ":8080",
    ":443",
    ":80",
    "/v1",
    "unix:",
    "off",
    "on",
    "*",
    "KiB",
    "MiB",
    "ms",
    "s",
    "m",
    "18446744073709551615",
    "0-3",
    ",8",
    "1024",
    "warn",
    "shard=debug",
    "tokenring::access",
    "xn--",
    "..",
    "@",
    "%00",
    "\u{e4}",
];

/// The target.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some((name, text)) = text.split_once('=') else { return };
    if name == "server" {
        return server(text);
    }
    let Some(setting) = ALL.iter().find(|setting| setting.name == name) else { return };
    let value = match setting.kind.parse(text) {
        Ok(value) => value,
        Err(message) => return one_line(&message),
    };
    assert_eq!(setting.kind.parse(&format!(" {text}\t")), Ok(value.clone()), "space around it says nothing");
    let line = format!("{} = {value}\n", setting.key());
    let again = file::read("again", &line);
    let again = again.unwrap_or_else(|problems| panic!("{line:?}: {}", problems[0]));
    assert_eq!(again.values.get(setting.name).map(|(value, _)| value), Some(&value), "{line:?}");
    by_the_letter(&setting.kind, text.trim(), &value);
}

/// Says something, in one line.
pub(super) fn one_line(message: &str) {
    assert!(!message.is_empty() && !message.contains(char::is_control), "{message:?}");
}

fn by_the_letter(kind: &Kind, text: &str, value: &Value) {
    match (kind, value) {
        (Kind::Integer { unit, minimum, maximum, power_of_two }, Value::Integer(number)) => {
            assert_eq!(naive_integer(text, *unit), Some(u128::from(*number)));
            assert!((*minimum..=*maximum).contains(number) && (!power_of_two || number.count_ones() == 1));
        }
        (Kind::Switch, Value::Switch(on)) => {
            let words = if *on { ["on", "true"] } else { ["off", "false"] };
            assert!(words.contains(&text.to_lowercase().as_str()));
        }
        (Kind::Choice(words), Value::Choice(word)) => {
            assert!(words.contains(word) && *word == text.to_lowercase());
        }
        (Kind::Prefix, Value::Prefix(None)) => assert_eq!(text, "off"),
        (Kind::Prefix, Value::Prefix(Some(prefix))) => {
            assert_eq!(prefix, text);
            assert_eq!(path_of(&format!("{prefix}/a"), "h").as_deref(), Some(format!("{prefix}/a").as_str()));
            assert!(!prefix.ends_with('/') && !prefix.contains("//"));
        }
        (Kind::Cors, Value::Cors(cors)) => assert_eq!(cors.to_string().parse(), Ok(cors.clone())),
        (Kind::Listen, Value::Listen(addresses)) => {
            let parts = text.split([',', ' ', '\t', '\n']).filter(|part| !part.is_empty());
            let naive = parts.map(|part| part.replace("localhost", "127.0.0.1").parse::<SocketAddr>());
            assert_eq!(naive.collect::<Result<Vec<_>, _>>().as_deref(), Ok(addresses.as_slice()));
        }
        (Kind::Admin, Value::Admin(address)) => {
            assert_eq!(AdminAddress::parse(&address.to_string()).as_ref(), Ok(address));
        }
        (Kind::Upstreams, Value::Upstreams(urls)) => urls.iter().for_each(url),
        (Kind::Cpus, Value::Cpus(cpus)) => {
            assert_eq!(parse_cpus(&format_cpus(cpus)).as_ref(), Ok(cpus));
            let mut sorted = cpus.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), cpus.len(), "no CPU twice");
        }
        (Kind::File | Kind::Folder, Value::File(path)) => {
            assert_eq!(path.as_deref().unwrap_or("".as_ref()).to_str(), Some(text));
        }
        (Kind::Files, Value::Files(paths)) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            assert!(paths.iter().map(|path| path.to_str()).eq(parts.map(Some)));
        }
        (Kind::ServerName, Value::ServerName(name)) => assert_eq!(name.is_none(), text.is_empty()),
        (Kind::LogFilter, Value::LogFilter(filter)) => {
            let read = env_filter::Builder::new().try_parse(filter).map(|_| ());
            assert!(read.is_ok(), "the log would not take {filter:?}: {read:?}");
        }
        (kind, value) => panic!("{value:?} for {kind:?}"),
    }
}

/// Digits, underscores between them, and a unit.
fn naive_integer(text: &str, unit: Unit) -> Option<u128> {
    let units: &[(&str, u128)] = match unit {
        Unit::Count(_) => &[],
        Unit::Bytes => &[
            ("kib", 1024),
            ("k", 1024),
            ("mib", 1024 * 1024),
            ("m", 1024 * 1024),
            ("gib", 1 << 30),
            ("g", 1 << 30),
            ("b", 1),
        ],
        Unit::Milliseconds => &[("ms", 1), ("min", 60_000), ("m", 60_000), ("s", 1000), ("h", 3_600_000)],
        Unit::Microseconds => &[("us", 1), ("ms", 1000)],
    };
    let text = text.to_lowercase();
    let (digits, factor) = units
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?.trim_end(), *factor)))
        .unwrap_or((&text, 1));
    let digits: String = digits.chars().filter(|letter| *letter != '_').collect();
    digits.parse::<u128>().ok()?.checked_mul(factor)
}

/// A backend's URL: written the same again, and its parts fit into a request's head.
fn url(url: &UpstreamUrl) {
    assert_eq!(UpstreamUrl::parse(&url.url).as_ref(), Ok(url), "written and read again");
    let scheme = if url.tls { "https" } else { "http" };
    assert_eq!(url.url, format!("{scheme}://{}{}", url.authority, url.base_path));
    assert!(url.port > 0 && !url.base_path.ends_with('/'));
    assert!(!url.tls || url.host.server_name().is_some());
    let path = format!("{}/v1/a", url.base_path);
    assert_eq!(path_of(&path, &url.authority).as_deref(), Some(path.as_str()), "{url:?}");
}

fn server(text: &str) {
    match ServerAddress::parse(text) {
        Ok(address) => {
            assert_eq!(ServerAddress::parse(&address.to_string()).as_ref(), Ok(&address));
            if let ServerAddress::Url(inner) = &address {
                url(inner);
            }
        }
        Err(message) => one_line(&message),
    }
}

/// The path that a strict reader finds in a request that is written with it.
fn path_of(target: &str, authority: &str) -> Option<String> {
    let head = format!("GET {target} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    let mut slots = header_slots();
    let head = parse_request(head.as_bytes(), &mut slots, &HeadLimits::default()).ok()??;
    assert_eq!(head.header("host"), Some(authority.as_bytes()));
    Some(head.path().to_owned())
}
