//! The settings that name places: upstream URLs, listen and admin addresses, CPU lists.

use super::value::server_name;
use rustls::pki_types::ServerName;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// The highest CPU number accepted; Linux' own limit (`CONFIG_NR_CPUS`) on the largest machines.
const CPU_MAX: usize = 8191;

/// A backend as configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct UpstreamUrl {
    /// Normalised: lower-case scheme and host, no default port, no trailing slash.
    pub(crate) url: String,
    /// `https`.
    pub(crate) tls: bool,
    pub(crate) host: Host,
    pub(crate) port: u16,
    /// What `Host` says.
    pub(crate) authority: String,
    /// Empty, or "/v" without a trailing slash.
    pub(crate) base_path: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    /// What a certificate of this host must be for.
    pub(crate) fn server_name(&self) -> Option<ServerName<'static>> {
        match self {
            Host::Address(address) => Some(ServerName::from(*address)),
            Host::Name(name) => server_name(name),
        }
    }
}

impl UpstreamUrl {
    /// Parses `http[s]://host[:port][/base]`. The error says what was expected and what to do.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let expected = |why: &str| format!("expected http[s]://host[:port][/base], found {text:?}: {why}");
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(expected("it has no scheme"));
        };
        let tls = scheme.eq_ignore_ascii_case("https");
        if !tls && !scheme.eq_ignore_ascii_case("http") {
            return Err(expected("only the schemes http and https are served"));
        }
        if rest.contains(['?', '#']) {
            return Err(expected("a query or fragment has no place here"));
        }
        let (authority, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        if authority.contains('@') {
            return Err(expected("user and password have no place here"));
        }
        let (host, port) =
            split_port(authority).ok_or_else(|| expected("the port must be from 1 to 65535"))?;
        let host = if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            let address = inner.parse().map_err(|_| expected("the brackets do not hold an IPv6 address"))?;
            Host::Address(IpAddr::V6(address))
        } else if let Ok(address) = host.parse::<Ipv4Addr>() {
            Host::Address(IpAddr::V4(address))
        } else if is_name(host) {
            Host::Name(host.to_ascii_lowercase())
        } else {
            return Err(expected("the host is not a name or an address (IPv6 goes in brackets)"));
        };
        if tls && host.server_name().is_none() {
            return Err(expected("a certificate cannot be for this name"));
        }
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(expected("the base path must be visible ASCII"));
        }
        let base_path = path.trim_end_matches('/').to_owned();
        let (scheme, default) = if tls { ("https", 443) } else { ("http", 80) };
        let port = port.unwrap_or(default);
        let host_text = match &host {
            Host::Address(IpAddr::V6(address)) => format!("[{address}]"),
            Host::Address(address) => address.to_string(),
            Host::Name(name) => name.clone(),
        };
        let authority = if port == default { host_text } else { format!("{host_text}:{port}") };
        let url = format!("{scheme}://{authority}{base_path}");
        Ok(UpstreamUrl { url, tls, host, port, authority, base_path })
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// Splits the port off; `None` when there is one and it is not a port.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let after_host = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    match authority[after_host..].find(':') {
        None => Some((authority, None)),
        Some(colon) => {
            let (host, port) = authority.split_at(after_host + colon);
            let port = port[1..]
                .parse()
                .ok()
                .filter(|&port| port > 0 && port_digits(&authority[host.len() + 1..]))?;
            Some((host, Some(port)))
        }
    }
}

/// `u16::from_str` takes a plus sign; a port has digits only.
fn port_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_name(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
        && !host.starts_with(['.', '-'])
        // "1.2.3" or "999.1.1.1" is a mistyped address, not a name (no top-level domain is all digits).
        && !host.trim_end_matches('.').rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit()))
}

/// Where the admin listener is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum AdminAddress {
    Off,
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl AdminAddress {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("off") {
            return Ok(AdminAddress::Off);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(format!("expected unix:PATH, found {text:?}"));
            }
            return Ok(AdminAddress::Unix(PathBuf::from(path)));
        }
        parse_listen(text).map(AdminAddress::Tcp).map_err(|_| {
            format!("expected off, ADDRESS:PORT such as 127.0.0.1:9180, or unix:PATH, found {text:?}")
        })
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminAddress::Off => f.write_str("off"),
            AdminAddress::Tcp(address) => address.fmt(f),
            AdminAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where `tokenring streams` asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ServerAddress {
    Url(UpstreamUrl),
    Unix(PathBuf),
}

impl ServerAddress {
    /// `http[s]://host[:port]` or `unix:PATH`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("expected unix:PATH, found no path".to_owned()),
            Some(path) => Ok(ServerAddress::Unix(path.into())),
            None if text.contains("://") => UpstreamUrl::parse(text).map(ServerAddress::Url),
            None => UpstreamUrl::parse(&format!("http://{text}")).map(ServerAddress::Url),
        }
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerAddress::Url(url) => url.fmt(f),
            ServerAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Parses an address to listen on. `localhost` is 127.0.0.1.
pub(crate) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let literal = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    literal.parse().map_err(|_| {
        format!("expected ADDRESS:PORT such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80, found {text:?}")
    })
}

/// Parses a CPU list such as `0-3,8`; order is kept, since shard 0 runs on the first.
pub(crate) fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    let expected = |why: &str| format!("expected a list of CPUs such as 0-3,8, found {text:?}: {why}");
    let number = |part: &str| {
        part.parse::<usize>()
            .ok()
            .filter(|&cpu| cpu <= CPU_MAX && part.bytes().all(|byte| byte.is_ascii_digit()))
            .ok_or_else(|| expected(&format!("{part:?} is not a CPU number up to {CPU_MAX}")))
    };
    let mut cpus = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first.trim())?, number(last.trim())?),
            None => (number(part)?, number(part)?),
        };
        if last < first {
            return Err(expected(&format!("the range {part:?} runs backwards")));
        }
        for cpu in first..=last {
            if cpus.contains(&cpu) {
                return Err(expected(&format!("CPU {cpu} is listed twice")));
            }
            cpus.push(cpu);
        }
    }
    Ok(cpus)
}

/// The inverse of [`parse_cpus`].
pub(crate) fn format_cpus(cpus: &[usize]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut rest = cpus;
    while let [first, ..] = rest {
        let run = rest.iter().enumerate().take_while(|&(offset, &cpu)| cpu == first + offset).count();
        parts.push(if run < 3 {
            rest[..run].iter().map(usize::to_string).collect::<Vec<_>>().join(",")
        } else {
            format!("{first}-{}", first + run - 1)
        });
        rest = &rest[run..];
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_urls() {
        let url = UpstreamUrl::parse("HTTP://Model.Internal:8000/api/").unwrap();
        assert_eq!(url.url, "http://model.internal:8000/api");
        assert_eq!(
            (url.authority.as_str(), url.port, url.base_path.as_str()),
            ("model.internal:8000", 8000, "/api")
        );
        let url = UpstreamUrl::parse("http://[::1]").unwrap();
        assert_eq!((url.authority.as_str(), url.port, url.base_path.as_str()), ("[::1]", 80, ""));
        assert_eq!(url.host, Host::Address("::1".parse().unwrap()));
        assert_eq!(UpstreamUrl::parse("http://10.0.0.1:80/").unwrap().url, "http://10.0.0.1");
        let url = UpstreamUrl::parse("HTTPS://API.example.com./v1").unwrap();
        assert_eq!((url.authority.as_str(), url.port, url.tls), ("api.example.com.", 443, true));
        assert_eq!(url.host.server_name(), ServerName::try_from("api.example.com").ok());
        assert_eq!(UpstreamUrl::parse("https://a:80").unwrap().url, "https://a:80");
        assert_eq!(UpstreamUrl::parse("https://[::1]:443").unwrap().url, "https://[::1]");
    }

    #[test]
    fn bad_upstream_urls_say_why() {
        for (text, why) in [
            ("localhost:8000", "it has no scheme"),
            ("https://a..b", "a certificate cannot be for this name"),
            ("ftp://x", "only the schemes http and https"),
            ("http://x:0", "the port must be"),
            ("http://x:+80", "the port must be"),
            ("http://x:99999/", "the port must be"),
            ("http://user:secret@x", "user and password"),
            ("http://x/?a=b", "a query or fragment"),
            ("http://", "the host is not"),
            ("http://::1", "the port must be"),
            ("http://[::1", "the port must be"),
            ("http://[fe80", "the host is not"),
            ("http://10.0.0.300", "the host is not"),
            ("http://a b", "the host is not"),
            ("http://x/a b", "visible ASCII"),
        ] {
            let error = UpstreamUrl::parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0-3,8").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_cpus("5, 1").unwrap(), [5, 1]);
        assert_eq!(format_cpus(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(format_cpus(&[5, 1, 2]), "5,1,2");
        for (text, why) in [
            ("", "not a CPU number"),
            ("3-1", "backwards"),
            ("0-2,1", "CPU 1 is listed twice"),
            ("a", "not a CPU number"),
            ("1-", "not a CPU number"),
            ("9999", "up to 8191"),
        ] {
            let error = parse_cpus(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn admin_addresses() {
        assert_eq!(AdminAddress::parse("off").unwrap(), AdminAddress::Off);
        assert_eq!(AdminAddress::parse("localhost:9").unwrap().to_string(), "127.0.0.1:9");
        assert_eq!(
            AdminAddress::parse("unix:/run/t.sock").unwrap(),
            AdminAddress::Unix("/run/t.sock".into())
        );
        assert!(AdminAddress::parse("9180").unwrap_err().contains("expected off, ADDRESS:PORT"));
    }

    #[test]
    fn addresses_of_servers_are_read_and_written() {
        for (text, expected) in [
            ("127.0.0.1:9180", "http://127.0.0.1:9180"),
            ("http://Localhost:80/", "http://localhost"),
            ("https://[::1]:8443/base", "https://[::1]:8443/base"),
            ("unix:/run/tokenring.sock", "unix:/run/tokenring.sock"),
        ] {
            assert_eq!(ServerAddress::parse(text).unwrap().to_string(), expected);
        }
        for text in ["", "unix:", "ftp://a", "a b", "http://a:0"] {
            assert!(ServerAddress::parse(text).is_err(), "{text}");
        }
    }
}
