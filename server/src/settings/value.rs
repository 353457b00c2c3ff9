//! What kinds of values settings have: how each is written, checked, described and printed.

use super::address::{AdminAddress, UpstreamUrl, format_cpus, parse_cpus, parse_listen};
use protocol::cors::Cors;
use rustls::pki_types::ServerName;
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The unit of an integer setting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    /// A plain count of what the value name says.
    Count(&'static str),
    Bytes,
    Milliseconds,
    Microseconds,
}

/// The type of a setting.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// `minimum..=maximum`, and a power of two where said.
    Integer {
        unit: Unit,
        minimum: u64,
        maximum: u64,
        power_of_two: bool,
    },
    /// on or off.
    Switch,
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// A part of the path space, or off.
    Prefix,
    /// Origins, all or none.
    Cors,
    /// Addresses to listen on.
    Listen,
    Admin,
    Upstreams,
    Cpus,
    /// A path, or none.
    File,
    /// The path of a directory, or none.
    Folder,
    /// Paths.
    Files,
    /// A DNS name or an address, or none.
    ServerName,
    /// `level` or `target=level`, separated by commas.
    LogFilter,
}

/// A checked value of a setting.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Value {
    Integer(u64),
    Switch(bool),
    Choice(&'static str),
    Prefix(Option<String>),
    Cors(Cors),
    Listen(Vec<SocketAddr>),
    Admin(AdminAddress),
    Upstreams(Vec<UpstreamUrl>),
    Cpus(Vec<usize>),
    File(Option<PathBuf>),
    Files(Vec<PathBuf>),
    ServerName(Option<ServerName<'static>>),
    LogFilter(String),
}

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

impl Kind {
    /// The placeholder in `--help`.
    pub(crate) fn value_name(&self) -> &'static str {
        match self {
            Kind::Integer { unit: Unit::Count(name), .. } => name,
            Kind::Integer { unit: Unit::Bytes, .. } => "BYTES",
            Kind::Integer { unit: Unit::Milliseconds, .. } => "MS",
            Kind::Integer { unit: Unit::Microseconds, .. } => "US",
            Kind::Switch => "on|off",
            Kind::Choice(_) => "CHOICE",
            Kind::Prefix => "PATH|off",
            Kind::Cors => "ORIGINS|*|off",
            Kind::Listen => "ADDRESS:PORT",
            Kind::Admin => "ADDRESS:PORT|unix:PATH|off",
            Kind::Upstreams => "URL",
            Kind::Cpus => "LIST",
            Kind::File | Kind::Files => "FILE",
            Kind::Folder => "DIR",
            Kind::ServerName => "NAME",
            Kind::LogFilter => "LEVEL",
        }
    }

    /// Whether a flag may be given more than once.
    pub(crate) fn repeatable(&self) -> bool {
        matches!(self, Kind::Listen | Kind::Upstreams | Kind::Files)
    }

    /// What a value must look like, for messages and the CONFIG page.
    pub(crate) fn expectation(&self) -> String {
        match *self {
            Kind::Integer { unit, minimum, maximum, power_of_two } => {
                let what = if power_of_two { "a power of two" } else { "an integer" };
                let (of, forms) = match unit {
                    Unit::Count(_) => ("", ""),
                    Unit::Bytes => (" of bytes", " (or text such as 64KiB, 8MiB)"),
                    Unit::Milliseconds => (" of milliseconds", " (or text such as 500ms, 30s, 5m)"),
                    Unit::Microseconds => (" of microseconds", ""),
                };
                format!("{what}{of} from {minimum} to {maximum}{forms}")
            }
            Kind::Switch => "on or off (true or false)".to_owned(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Prefix => "off, or a path such as /v1/durable, without a final slash".to_owned(),
            Kind::Cors => "off, * or origins such as https://chat.example, in lower case and without a path, separated by spaces or commas".to_owned(),
            Kind::Listen => "ADDRESS:PORT such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80".to_owned(),
            Kind::Admin => "off, ADDRESS:PORT such as 127.0.0.1:9180, or unix:PATH".to_owned(),
            Kind::Upstreams => "http[s]://host[:port][/base]".to_owned(),
            Kind::Cpus => "a list of CPUs such as 0-3,8".to_owned(),
            Kind::File => "the path of a file, from the working directory if relative".to_owned(),
            Kind::Folder => "the path of a directory, from the working directory if relative".to_owned(),
            Kind::Files => {
                "the path of a file, from the working directory if relative; several in one text are separated by commas"
                    .to_owned()
            }
            Kind::ServerName => "a DNS name or an IP address".to_owned(),
            Kind::LogFilter => {
                "off, error, warn, info, debug or trace, or a list such as warn,shard=debug".to_owned()
            }
        }
    }

    /// Parses what a flag, an environment variable or a string in the file says.
    pub(crate) fn parse(&self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        let mismatch = || format!("expected {}, found {text:?}", self.expectation());
        match *self {
            Kind::Integer { unit, .. } => {
                self.integer(parse_integer(text, unit).ok_or_else(mismatch)?).ok_or_else(mismatch)
            }
            Kind::Switch => match text.to_ascii_lowercase().as_str() {
                "on" | "true" => Ok(Value::Switch(true)),
                "off" | "false" => Ok(Value::Switch(false)),
                _ => Err(mismatch()),
            },
            Kind::Choice(words) => words
                .iter()
                .find(|word| word.eq_ignore_ascii_case(text))
                .map(|&word| Value::Choice(word))
                .ok_or_else(mismatch),
            Kind::Prefix if text == "off" => Ok(Value::Prefix(None)),
            Kind::Prefix if is_prefix(text) => Ok(Value::Prefix(Some(text.to_owned()))),
            Kind::Prefix => Err(mismatch()),
            Kind::Cors => text.parse().map(Value::Cors).map_err(|_| mismatch()),
            Kind::Listen => split_list(text).map(parse_listen).collect::<Result<_, _>>().map(Value::Listen),
            Kind::Admin => AdminAddress::parse(text).map(Value::Admin),
            Kind::Upstreams => {
                split_list(text).map(UpstreamUrl::parse).collect::<Result<_, _>>().map(Value::Upstreams)
            }
            Kind::Cpus => parse_cpus(text).map(Value::Cpus),
            Kind::File | Kind::Folder => {
                Ok(Value::File(Some(text).filter(|text| !text.is_empty()).map(PathBuf::from)))
            }
            // Paths may hold spaces, so that only commas part them.
            Kind::Files => Ok(Value::Files(
                text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(PathBuf::from).collect(),
            )),
            Kind::ServerName if text.is_empty() => Ok(Value::ServerName(None)),
            Kind::ServerName => {
                server_name(text).map(|name| Value::ServerName(Some(name))).ok_or_else(mismatch)
            }
            Kind::LogFilter => {
                if log_filter_is_valid(text) {
                    Ok(Value::LogFilter(text.to_owned()))
                } else {
                    Err(mismatch())
                }
            }
        }
    }

    /// The value of an integer that the file gives as such; `None` when out of range or of another kind.
    pub(crate) fn integer(&self, number: u64) -> Option<Value> {
        let Kind::Integer { minimum, maximum, power_of_two, .. } = *self else {
            return None;
        };
        let fits = (minimum..=maximum).contains(&number) && (!power_of_two || number.is_power_of_two());
        fits.then_some(Value::Integer(number))
    }
}

impl Value {
    /// False for no file, no name and off: what stands where nothing was meant.
    pub(super) fn says_something(&self) -> bool {
        match self {
            Value::File(path) => path.is_some(),
            Value::Files(paths) => !paths.is_empty(),
            Value::ServerName(name) => name.is_some(),
            Value::Switch(on) => *on,
            _ => true,
        }
    }
}

/// A name as certificates have it: lower case, without the dot of the root.
pub(super) fn server_name(text: &str) -> Option<ServerName<'static>> {
    let text = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    // rustls would take away one more.
    ServerName::try_from(text).ok().filter(|name| !name.to_str().ends_with('.'))
}

/// The parts of a list given as one text: separated by commas or spaces.
fn split_list(text: &str) -> impl Iterator<Item = &str> {
    text.split([',', ' ', '\t', '\n']).filter(|part| !part.is_empty())
}

/// Digits (underscores allowed between them) and a unit's suffix, where the unit has any.
fn parse_integer(text: &str, unit: Unit) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    if digits.is_empty() || digits.starts_with('_') || digits.ends_with('_') {
        return None;
    }
    let number: u64 = digits.replace('_', "").parse().ok()?;
    let factor = match (unit, suffix.trim().to_ascii_lowercase().as_str()) {
        (_, "") => 1,
        (Unit::Bytes, "b") => 1,
        (Unit::Bytes, "k" | "kib") => 1 << 10,
        (Unit::Bytes, "m" | "mib") => 1 << 20,
        (Unit::Bytes, "g" | "gib") => 1 << 30,
        (Unit::Milliseconds, "ms") | (Unit::Microseconds, "us") => 1,
        (Unit::Milliseconds, "s") | (Unit::Microseconds, "ms") => 1_000,
        (Unit::Milliseconds, "m" | "min") => 60_000,
        (Unit::Milliseconds, "h") => 3_600_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// Whole segments, in characters that a request target may have as they are.
fn is_prefix(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte);
    let segments = text.strip_prefix('/').map(|rest| rest.split('/'));
    text.bytes().all(allowed)
        && segments.is_some_and(|mut segments| segments.all(|segment| !matches!(segment, "" | "." | "..")))
}

/// A bare word that is not a level is a typing error more often than a module, so modules are given as `module=level`.
fn log_filter_is_valid(text: &str) -> bool {
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word.trim()));
    let is_target = |word: &str| {
        !word.is_empty()
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':'))
    };
    text.split(',').all(|part| match part.split_once('=') {
        Some((target, level)) => is_target(target.trim()) && is_level(level),
        None => is_level(part),
    })
}

/// A text as a basic string of TOML.
pub(super) struct Quoted<'a>(pub(super) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for letter in self.0.chars() {
            match letter {
                '"' | '\\' => write!(f, "\\{letter}")?,
                letter if letter.is_control() => write!(f, "\\u{:04x}", u32::from(letter))?,
                letter => f.write_char(letter)?,
            }
        }
        f.write_char('"')
    }
}

impl fmt::Display for Value {
    /// As the value of a TOML key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, parts: Vec<String>| {
            let quoted: Vec<_> = parts.iter().map(|part| Quoted(part).to_string()).collect();
            write!(f, "[{}]", quoted.join(", "))
        };
        match self {
            Value::Integer(number) => number.fmt(f),
            Value::Switch(on) => on.fmt(f),
            Value::Choice(word) => Quoted(word).fmt(f),
            Value::Prefix(prefix) => Quoted(prefix.as_deref().unwrap_or("off")).fmt(f),
            Value::Cors(cors) => Quoted(&cors.to_string()).fmt(f),
            Value::LogFilter(filter) => Quoted(filter).fmt(f),
            Value::Listen(addresses) => list(f, addresses.iter().map(ToString::to_string).collect()),
            Value::Upstreams(urls) => list(f, urls.iter().map(ToString::to_string).collect()),
            Value::Admin(address) => Quoted(&address.to_string()).fmt(f),
            Value::File(path) => Quoted(&path.as_deref().unwrap_or("".as_ref()).to_string_lossy()).fmt(f),
            Value::Files(paths) => list(f, paths.iter().map(|path| path.display().to_string()).collect()),
            Value::ServerName(name) => {
                Quoted(&name.as_ref().map(ServerName::to_str).unwrap_or_default()).fmt(f)
            }
            Value::Cpus(cpus) if cpus.is_empty() => f.write_str("[]"),
            Value::Cpus(cpus) => Quoted(&format_cpus(cpus)).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: Kind =
        Kind::Integer { unit: Unit::Bytes, minimum: 1, maximum: 1 << 30, power_of_two: false };
    const MS: Kind =
        Kind::Integer { unit: Unit::Milliseconds, minimum: 0, maximum: 600_000, power_of_two: false };

    #[test]
    fn integers_take_units_and_keep_ranges() {
        assert_eq!(BYTES.parse("64KiB").unwrap(), Value::Integer(65_536));
        assert_eq!(BYTES.parse("1_000").unwrap(), Value::Integer(1_000));
        assert_eq!(MS.parse("30s").unwrap(), Value::Integer(30_000));
        assert_eq!(MS.parse("0").unwrap(), Value::Integer(0));
        for text in ["", "-1", "+5", "1.5s", "10 parsecs", "99999999999999999999", "11m", "_1"] {
            let error = MS.parse(text).unwrap_err();
            assert!(
                error.starts_with("expected an integer of milliseconds from 0 to 600000"),
                "{text}: {error}"
            );
        }
        assert!(BYTES.parse("30s").is_err());
    }

    #[test]
    fn powers_of_two() {
        let kind =
            Kind::Integer { unit: Unit::Count("ENTRIES"), minimum: 8, maximum: 64, power_of_two: true };
        assert_eq!(kind.parse("16").unwrap(), Value::Integer(16));
        assert_eq!(kind.parse("48").unwrap_err(), "expected a power of two from 8 to 64, found \"48\"");
    }

    #[test]
    fn prefixes() {
        assert_eq!(Kind::Prefix.parse("off").unwrap(), Value::Prefix(None));
        assert_eq!(Kind::Prefix.parse("/v1/durable").unwrap(), Value::Prefix(Some("/v1/durable".to_owned())));
        for text in ["", "/", "v1", "/v1/", "//v1", "/v1/../a", "/v1?a", "/v1 a", "/v\u{e4}"] {
            assert!(Kind::Prefix.parse(text).is_err(), "{text}");
        }
        assert_eq!(Value::Prefix(None).to_string(), "\"off\"");
    }

    #[test]
    fn log_filters() {
        assert!(Kind::LogFilter.parse("warn,shard=debug,tokenring::access=off").is_ok());
        assert!(Kind::LogFilter.parse("inof").is_err());
        assert!(Kind::LogFilter.parse("shard=loud").is_err());
    }

    #[test]
    fn values_print_as_toml() {
        assert_eq!(Kind::Cpus.parse("0,1,2,3,8").unwrap().to_string(), "\"0-3,8\"");
        assert_eq!(
            Kind::Upstreams.parse("http://a:1, http://b:2/").unwrap().to_string(),
            "[\"http://a:1\", \"http://b:2\"]"
        );
        assert_eq!(Kind::Switch.parse("ON").unwrap().to_string(), "true");
    }

    #[test]
    fn names_have_at_most_one_dot_at_their_end() {
        let of = |text: &str| Kind::ServerName.parse(text).ok().map(|value| value.to_string());
        assert_eq!(of("X.example."), Some("\"x.example\"".to_owned()));
        assert_eq!(of("x.."), None);
    }

    #[test]
    fn texts_print_as_strings_of_toml() {
        let of = |text: &str| Kind::Folder.parse(text).unwrap().to_string();
        assert_eq!(of("/a \"b\" \\c"), r#""/a \"b\" \\c""#);
        // Rust would escape these too, in its own way.
        assert_eq!(of("\u{7f}e\u{301}\u{200b}\u{1}."), "\"\\u007fe\u{301}\u{200b}\\u0001.\"");
    }
}
