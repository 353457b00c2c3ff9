//! The heads that we write: requests to backends, backends' responses to clients, and our own answers.
//! Nothing that a peer sent is written but what the parser accepted, so no byte of it can start a line or a message.

use super::fields::length;
use super::response::is_bodiless;
use super::scan::list;
use super::{CONNECTION_TOKENS_MAX, Framing, RequestHead, ResponseHead, Version};
use crate::resume::ON_LEAVE_FIELD;

/// Fields that concern one connection only (RFC 9110 section 7.6.1), or that we write ourselves.
const NOT_FORWARDED: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "content-length",
];

/// Fields of a response that the head of an event stream sets itself (by [`ClientHead::extra`]).
const SET_BY_EVENT_STREAM: &[&str] =
    &["content-type", "cache-control", "x-accel-buffering", "content-length"];

/// Writes the head of a request to a backend.
///
/// End-to-end fields keep their order and case. Hop-by-hop fields, those that Connection names, Host, Expect and what is said
/// to us alone are left out, also when spelled with `_` for `-`, which CGI-like backends read as the same name. The framing is
/// written anew from `head.framing`. With `identity_encoding`, Accept-Encoding is replaced by `identity`.
///
/// `upstream_authority` and `base_path` are the operator's, in visible ASCII. The base path precedes the target (but
/// not `*`); it may be empty, and its final `/` is ignored. See [`RequestHead::has_dot_segments`].
pub fn write_upstream_request(
    out: &mut Vec<u8>,
    head: &RequestHead,
    upstream_authority: &str,
    base_path: &str,
    identity_encoding: bool,
) {
    assert!(is_plain(upstream_authority) && is_plain(base_path), "the configuration must not inject lines");
    out.reserve(head.head_bytes + upstream_authority.len() + base_path.len() + 128);
    put(out, &[head.method, " "]);
    if head.target != "*" {
        put(out, &[base_path.strip_suffix('/').unwrap_or(base_path)]);
    }
    put(out, &[head.target, " HTTP/1.1\r\nHost: ", upstream_authority, "\r\n"]);
    let named = ConnectionTokens::of(head.headers);
    for header in head.headers {
        let left_out = is_one_of(header.name, NOT_FORWARDED)
            || is_one_of(header.name, &["host", "expect", ON_LEAVE_FIELD])
            || (identity_encoding && is_one_of(header.name, &["accept-encoding"]))
            || named.contains(header.name);
        if !left_out {
            put_header(out, header);
        }
    }
    if identity_encoding {
        put(out, &["Accept-Encoding: identity\r\n"]);
    }
    put_framing(out, head.framing);
    // RFC 9110 section 7.6.3; a further line of a list field continues the list.
    let received = match head.version {
        Version::Http10 => "1.0",
        Version::Http11 => "1.1",
    };
    put(out, &["Via: ", received, " tokenring\r\n\r\n"]);
}

/// How a backend's response is passed on to a client.
#[derive(Clone, Copy, Debug)]
pub struct ClientHead<'a> {
    /// The version that the client speaks.
    pub client_version: Version,
    /// Whether we keep the client's connection; ignored (never kept) with [`Framing::UntilClose`].
    pub keep_alive: bool,
    /// How we end the body; never [`Framing::Chunked`] to an HTTP/1.0 client.
    pub framing: Framing,
    /// The body is an event stream that we write: the backend's Content-Type, Cache-Control, X-Accel-Buffering and
    /// Content-Length are left out, `extra` has ours.
    pub event_stream: bool,
    /// What the backend says of CORS is left out, `extra` has what we say.
    pub own_cors: bool,
    /// Complete field lines, each with its CRLF, that follow the backend's.
    pub extra: &'a str,
}

/// Writes the head of a backend's response to a client.
///
/// Hop-by-hop fields and those that Connection names are left out; the framing is written anew. The Content-Length of
/// an answer to HEAD or of a 304 is passed on when `how.framing` is [`Framing::None`], unless the head is that of an
/// event stream. The version written is always ours, HTTP/1.1 (RFC 9110 section 6.2).
pub fn write_client_response(out: &mut Vec<u8>, backend: &ResponseHead, how: &ClientHead) {
    out.reserve(backend.head_bytes + how.extra.len() + 128);
    let reason = if backend.reason.is_empty() { reason_phrase(backend.status) } else { backend.reason };
    put_status_line(out, backend.status, reason);
    let named = ConnectionTokens::of(backend.headers);
    let describes_absent_body = how.framing == Framing::None
        && backend.framing == Framing::None
        && !(backend.status < 200 || backend.status == 204)
        && !how.event_stream;
    for header in backend.headers {
        if describes_absent_body
            && header.name.eq_ignore_ascii_case("content-length")
            && length(header.value).is_ok()
        {
            put_header(out, header);
            continue;
        }
        let left_out = is_one_of(header.name, NOT_FORWARDED)
            || (how.event_stream && is_one_of(header.name, SET_BY_EVENT_STREAM))
            || (how.own_cors && is_of_cors(header.name))
            || named.contains(header.name);
        if !left_out {
            put_header(out, header);
        }
    }
    finish_response(out, backend.status, how.client_version, how.keep_alive, how.framing, how.extra);
}

/// Writes the head of an answer of our own: an error, a 100, a stream begun before its backend answered.
///
/// `extra` are complete field lines, each with its CRLF. Statuses that cannot have a body (1xx, 204, 304) get no
/// framing field, whatever `framing` says (RFC 9110 section 8.6).
pub fn write_own_response_head(
    out: &mut Vec<u8>,
    status: u16,
    client_version: Version,
    keep_alive: bool,
    framing: Framing,
    extra: &str,
) {
    out.reserve(extra.len() + 128);
    put_status_line(out, status, reason_phrase(status));
    finish_response(out, status, client_version, keep_alive, framing, extra);
}

/// The registered reason phrase of a status; `Unknown` for others.
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        102 => "Processing",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        208 => "Already Reported",
        226 => "IM Used",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        305 => "Use Proxy",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        423 => "Locked",
        424 => "Failed Dependency",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        506 => "Variant Also Negotiates",
        507 => "Insufficient Storage",
        508 => "Loop Detected",
        511 => "Network Authentication Required",
        _ => "Unknown",
    }
}

/// The options of all Connection fields, gathered once per head; the parser bounds their number.
struct ConnectionTokens<'b> {
    tokens: [&'b [u8]; CONNECTION_TOKENS_MAX],
    count: usize,
}

impl<'b> ConnectionTokens<'b> {
    fn of(headers: &[httparse::Header<'b>]) -> Self {
        let mut named = ConnectionTokens { tokens: [&[]; CONNECTION_TOKENS_MAX], count: 0 };
        for header in headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection")) {
            for token in list(header.value) {
                assert!(named.count < CONNECTION_TOKENS_MAX, "the parser refuses more");
                named.tokens[named.count] = token;
                named.count += 1;
            }
        }
        named
    }

    fn contains(&self, name: &str) -> bool {
        self.tokens[..self.count].iter().any(|token| token.eq_ignore_ascii_case(name.as_bytes()))
    }
}

/// Whether a field of a response is one of CORS.
fn is_of_cors(name: &str) -> bool {
    const PREFIX: &str = "access-control-";
    name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
}

/// Whether a field's name is one of these lower-case names, `_` read as `-`.
fn is_one_of(name: &str, names: &[&str]) -> bool {
    let same =
        |known: &u8, byte: &u8| *known == byte.to_ascii_lowercase() || (*known == b'-' && *byte == b'_');
    names.iter().any(|known| {
        known.len() == name.len() && known.bytes().zip(name.bytes()).all(|(known, byte)| same(&known, &byte))
    })
}

/// Visible ASCII only.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn put(out: &mut Vec<u8>, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

fn put_header(out: &mut Vec<u8>, header: &httparse::Header) {
    put(out, &[header.name, ": "]);
    out.extend_from_slice(header.value);
    put(out, &["\r\n"]);
}

fn put_status_line(out: &mut Vec<u8>, status: u16, reason: &str) {
    assert!((100..1000).contains(&status), "a status has three digits");
    put(out, &["HTTP/1.1 "]);
    put_decimal(out, u64::from(status));
    put(out, &[" ", reason, "\r\n"]);
}

fn put_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::None | Framing::UntilClose => {}
        Framing::Length(length) => {
            put(out, &["Content-Length: "]);
            put_decimal(out, length);
            put(out, &["\r\n"]);
        }
        Framing::Chunked => put(out, &["Transfer-Encoding: chunked\r\n"]),
    }
}

fn put_decimal(out: &mut Vec<u8>, value: u64) {
    // 2^64 - 1 has 20 digits.
    let mut digits = [0; 20];
    let mut start = digits.len();
    let mut rest = value;
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// Everything after the fields of the backend: `extra`, framing, Connection, blank line.
fn finish_response(
    out: &mut Vec<u8>,
    status: u16,
    client_version: Version,
    keep_alive: bool,
    framing: Framing,
    extra: &str,
) {
    assert!(framing != Framing::Chunked || client_version == Version::Http11, "HTTP/1.0 has no chunks");
    debug_assert!(
        extra.is_empty()
            || (extra.ends_with("\r\n") && extra.split_terminator("\r\n").all(|line| line.contains(':'))),
        "extra must be complete field lines"
    );
    put(out, &[extra]);
    if !is_bodiless(status) {
        put_framing(out, framing);
    }
    if status >= 200 {
        // What an interim head says of the connection means nothing: the final one decides.
        if !keep_alive || framing == Framing::UntilClose {
            put(out, &["Connection: close\r\n"]);
        } else if client_version == Version::Http10 {
            put(out, &["Connection: keep-alive\r\n"]);
        }
    }
    put(out, &["\r\n"]);
}
