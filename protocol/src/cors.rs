//! Which pages may use a route from their visitors' browsers (CORS, Fetch standard section 3.2): those of any origin, of a few, or
//! only of our own. They ask without the browser's credentials; a key they send themselves is a header like any other.

use crate::http::RequestHead;
use std::fmt::{self, Display, Formatter};
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

/// Bytes of an origin: a scheme, a DNS name, a port.
pub const ORIGIN_BYTES_MAX: usize = 272;
/// Bytes of the lines that an answer gets, at most.
pub const LINES_BYTES_MAX: usize = ORIGIN_BYTES_MAX + 256;

/// What pages see of an answer's head besides the fields that they always see.
const EXPOSED: &str = "Access-Control-Expose-Headers: Tokenring-Stream, Tokenring-Last-Event-ID, Tokenring-Earliest-Event-ID, \
    Tokenring-On-Leave, Retry-After, X-Request-Id\r\n";
const ANY: &str = "Access-Control-Allow-Origin: *\r\n\
    Access-Control-Expose-Headers: Tokenring-Stream, Tokenring-Last-Event-ID, Tokenring-Earliest-Event-ID, \
    Tokenring-On-Leave, Retry-After, X-Request-Id\r\n";
const VARY: &str = "Vary: Origin\r\n";
/// What a preflight is told (section 3.2.3). The asterisk never stands for Authorization; the others are named for browsers
/// that do not know it.
const PREFLIGHT: &str = "Access-Control-Allow-Methods: GET, HEAD, POST, PUT, DELETE, OPTIONS\r\n\
    Access-Control-Allow-Headers: Authorization, Content-Type, Last-Event-ID, Tokenring-On-Leave, *\r\n\
    Access-Control-Max-Age: 7200\r\n";

/// Whose pages may use a route.
#[derive(Clone, PartialEq, Debug, Default)]
pub enum Cors {
    /// Nothing is said of it, and what a backend says of it is passed on.
    #[default]
    Off,
    /// Everybody's.
    Any,
    /// Those of these origins.
    Origins(Vec<Origin>),
}

/// An origin, and what its pages are told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    name: String,
    lines: Arc<str>,
}

/// Neither off, nor an asterisk, nor origins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotCors;

impl FromStr for Cors {
    type Err = NotCors;

    /// Origins are parted by spaces or commas.
    fn from_str(text: &str) -> Result<Self, NotCors> {
        match text.trim() {
            "off" => return Ok(Cors::Off),
            "*" => return Ok(Cors::Any),
            _ => {}
        }
        let names = text.split([' ', ',', '\t', '\n']).filter(|name| !name.is_empty());
        let origins = names.map(Origin::new).collect::<Option<Vec<_>>>().ok_or(NotCors)?;
        if origins.is_empty() { Err(NotCors) } else { Ok(Cors::Origins(origins)) }
    }
}

impl Display for Cors {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Cors::Off => f.write_str("off"),
            Cors::Any => f.write_str("*"),
            Cors::Origins(origins) => {
                let names: Vec<_> = origins.iter().map(|origin| origin.name.as_str()).collect();
                f.write_str(&names.join(" "))
            }
        }
    }
}

impl Origin {
    /// As browsers write it: `scheme://host[:port]`, in lower case, without a path and without the scheme's own port.
    fn new(name: &str) -> Option<Origin> {
        let (scheme, authority) = name.split_once("://")?;
        let scheme_fits = scheme.starts_with(|first: char| first.is_ascii_lowercase())
            && scheme
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte));
        let host = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_:[]".contains(&byte);
        let own_port = matches!(scheme, "http" if authority.ends_with(":80"))
            || matches!(scheme, "https" if authority.ends_with(":443"));
        let fits = scheme_fits && !authority.is_empty() && authority.bytes().all(host) && !own_port;
        (fits && name.len() <= ORIGIN_BYTES_MAX).then(|| Origin {
            name: name.to_owned(),
            lines: format!("Access-Control-Allow-Origin: {name}\r\n{EXPOSED}{VARY}").into(),
        })
    }
}

/// Complete header lines, each with its CRLF.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lines {
    /// The same for everybody.
    Fixed(&'static str),
    /// Those of an origin.
    Of(Arc<str>),
}

impl Deref for Lines {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Lines::Fixed(lines) => lines,
            Lines::Of(lines) => lines,
        }
    }
}

/// What a route's rule says of one request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Said {
    /// For the head of its answer; none: the rule is off, and a backend's own are passed on.
    pub lines: Option<Lines>,
    /// It is a browser's question whether it may ask, and is answered with these lines.
    pub preflight: Option<&'static str>,
}

impl Cors {
    /// Whether a request may be answered to a page, and with which lines.
    pub fn of(&self, head: &RequestHead<'_, '_>) -> Said {
        let origin = head.header("origin");
        let (lines, allowed) = match self {
            Cors::Off => return Said::default(),
            Cors::Any => (Lines::Fixed(ANY), true),
            Cors::Origins(origins) => {
                let known = origins.iter().find(|known| origin == Some(known.name.as_bytes()));
                // Caches must know that others get another answer.
                let told = known.map(|known| (Lines::Of(Arc::clone(&known.lines)), true));
                told.unwrap_or((Lines::Fixed(VARY), false))
            }
        };
        let asks = head.method == "OPTIONS"
            && origin.is_some()
            && head.header("access-control-request-method").is_some();
        let told = if allowed { PREFLIGHT } else { "" };
        Said { lines: Some(lines), preflight: asks.then_some(told) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{HeadLimits, header_slots, parse_request};

    fn of(cors: &str, request: &str) -> Said {
        let bytes = format!("{request}Host: h\r\n\r\n");
        let mut slots = header_slots();
        let head = parse_request(bytes.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        cors.parse::<Cors>().unwrap().of(&head)
    }

    #[test]
    fn rules_are_read_and_written() {
        for text in
            ["off", "*", "https://a.example", "http://a:8080 https://b http://[::1]:3000", "app://local"]
        {
            assert_eq!(text.parse::<Cors>().unwrap().to_string(), text);
        }
        assert_eq!("https://a, https://b".parse::<Cors>().unwrap().to_string(), "https://a https://b");
        for text in [
            "",
            "on",
            "a.example",
            "https://",
            "https://a/",
            "https://A.example",
            "HTTPS://a",
            "https://a:443",
            "http://a:80",
            "https://a\r\nX: y",
            "* https://a",
            "null",
            "https://ä.example",
        ] {
            assert_eq!(text.parse::<Cors>(), Err(NotCors), "{text}");
        }
    }

    #[test]
    fn everybody() {
        for origin in ["", "Origin: https://a\r\n"] {
            let said = of("*", &format!("GET / HTTP/1.1\r\n{origin}"));
            let lines = said.lines.unwrap();
            assert!(lines.starts_with("Access-Control-Allow-Origin: *\r\n") && lines.ends_with(EXPOSED));
            assert_eq!(said.preflight, None);
        }
    }

    #[test]
    fn only_some() {
        let rule = "https://a https://b:8443";
        let lines = |origin: &str| of(rule, &format!("GET / HTTP/1.1\r\n{origin}")).lines.unwrap();
        let told = lines("Origin: https://b:8443\r\n");
        assert!(told.starts_with("Access-Control-Allow-Origin: https://b:8443\r\n"));
        assert!(told.contains("Tokenring-Stream") && told.ends_with("Vary: Origin\r\n"));
        assert!(told.len() <= LINES_BYTES_MAX);
        for other in ["", "Origin: https://b\r\n", "Origin: null\r\n", "Origin: https://a.evil\r\n"] {
            assert_eq!(&*lines(other), "Vary: Origin\r\n", "{other}");
        }
    }

    #[test]
    fn preflights() {
        let asks = "Origin: https://a\r\nAccess-Control-Request-Method: POST\r\n";
        assert!(
            of("https://a", &format!("OPTIONS / HTTP/1.1\r\n{asks}"))
                .preflight
                .unwrap()
                .contains("Last-Event-ID")
        );
        assert_eq!(of("https://b", &format!("OPTIONS / HTTP/1.1\r\n{asks}")).preflight, Some(""));
        assert_eq!(of("off", &format!("OPTIONS / HTTP/1.1\r\n{asks}")), Said::default());
        assert_eq!(of("*", &format!("POST / HTTP/1.1\r\n{asks}")).preflight, None);
        assert_eq!(
            of("*", "OPTIONS / HTTP/1.1\r\nOrigin: https://a\r\n").preflight,
            None,
            "an ordinary request"
        );
    }

    #[test]
    fn the_longest_lines_fit() {
        let name = format!("https://{}", "a".repeat(ORIGIN_BYTES_MAX - 8));
        let Ok(Cors::Origins(origins)) = name.parse() else { panic!("an origin") };
        assert!(origins[0].lines.len() <= LINES_BYTES_MAX, "{}", origins[0].lines.len());
        assert!(format!("{name}a").parse::<Cors>().is_err());
    }
}
