//! Request heads: the request line, the target reduced to origin-form, and the rules that only requests have.
//! RFC 9112 sections 2.2, 3 and 6.3; every refusal is the first in the order of the bytes, however they were split.

use std::net::Ipv6Addr;

use super::fields::{Declared, Fields, decimal, find, media_type};
use super::scan::{ascii, fields, is_target, is_token, line_end, list, no_line_end, run, trim, version};
use super::{Framing, HeadLimits, HeaderSlots, LEADING_EMPTY_LINES_MAX, METHOD_BYTES_MAX, Refusal, Version};

/// A complete and legal request head; borrows the bytes it was parsed from.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RequestHead<'h, 'b> {
    /// An RFC 9110 token, case-sensitive; at most [`METHOD_BYTES_MAX`] bytes, never CONNECT.
    pub method: &'b str,
    /// Origin-form path and query, or `*` (only for OPTIONS). An absolute-form has been reduced to it.
    pub target: &'b str,
    /// The Host field, or the authority of an absolute-form target, which wins. Empty only in HTTP/1.0.
    pub authority: &'b str,
    /// The version of the request line.
    pub version: Version,
    /// How the body ends; never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client is willing to use the connection again.
    pub keep_alive: bool,
    /// The client waits for a 100 before it sends the body: asked for, in HTTP/1.1, and a body is to come.
    pub expect_continue: bool,
    /// An Accept field names `text/event-stream` itself, with a weight other than 0. Wildcards do not count.
    pub accepts_event_stream: bool,
    /// All fields in order, names as sent, values without surrounding whitespace.
    pub headers: &'h [httparse::Header<'b>],
    /// Bytes of the input that the head occupies, empty lines before it included.
    pub head_bytes: usize,
}

impl<'b> RequestHead<'_, 'b> {
    /// The target up to its query.
    pub fn path(&self) -> &'b str {
        self.target.split_once('?').map_or(self.target, |(path, _)| path)
    }

    /// What follows the first `?` of the target; `Some("")` when nothing does.
    pub fn query(&self) -> Option<&'b str> {
        self.target.split_once('?').map(|(_, query)| query)
    }

    /// The value of the first field of that name, compared without case.
    pub fn header(&self, name: &str) -> Option<&'b [u8]> {
        find(self.headers, name)
    }

    /// Whether a segment of the path is `.` or `..`, literally or percent-encoded. Such a path could leave the prefix
    /// that a route was chosen by, or the base path that is put before it: a route by prefix must refuse it.
    pub fn has_dot_segments(&self) -> bool {
        self.path().split('/').any(|segment| {
            let mut rest = segment.as_bytes();
            let mut dots = 0;
            while let [b'.', tail @ ..] | [b'%', b'2', b'e' | b'E', tail @ ..] = rest {
                (rest, dots) = (tail, dots + 1);
            }
            rest.is_empty() && (dots == 1 || dots == 2)
        })
    }
}

/// Parses the request head at the start of `input`.
///
/// `Ok(None)`: the head is incomplete, and so far legal and within the limits. Empty lines before the request line
/// are tolerated, up to [`LEADING_EMPTY_LINES_MAX`]. A refusal does not depend on how the bytes were split: bytes that
/// are refused stay refused in the same way whatever follows them, and illegal ones are not waited upon.
///
/// Each call reads from the start, so a caller that receives a head in small pieces may wait for the next LF (no head
/// becomes complete without one).
pub fn parse_request<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    limits: &HeadLimits,
) -> Result<Option<RequestHead<'h, 'b>>, Refusal> {
    let window = &input[..input.len().min(limits.head_bytes)];
    let headers_max = limits.headers.min(slots.len());
    let Some((line, after_line)) = request_line(window, limits)? else { return incomplete(input, limits) };
    let Some((count, head_bytes)) = fields(window, after_line, &mut slots[..headers_max])? else {
        return incomplete(input, limits);
    };
    head(line, &slots[..count], head_bytes).map(Some)
}

/// The answer when the head does not end within the bytes that it may have.
pub(super) fn incomplete<T>(input: &[u8], limits: &HeadLimits) -> Result<Option<T>, Refusal> {
    if input.len() >= limits.head_bytes { Err(Refusal::HeadTooLarge) } else { Ok(None) }
}

struct RequestLine<'b> {
    method: &'b str,
    target: &'b str,
    version: Version,
}

fn request_line<'b>(
    bytes: &'b [u8],
    limits: &HeadLimits,
) -> Result<Option<(RequestLine<'b>, usize)>, Refusal> {
    let Some(method_at) = empty_lines(bytes)? else { return Ok(None) };

    let method_window = &bytes[method_at..bytes.len().min(method_at + METHOD_BYTES_MAX + 1)];
    let method_bytes = match run(method_window, is_token) {
        Some(method_bytes) => method_bytes,
        None if method_window.len() > METHOD_BYTES_MAX => return Err(Refusal::MethodTooLong),
        None => return Ok(None),
    };
    let method_end = method_at + method_bytes;
    if bytes[method_end] != b' ' || method_bytes == 0 {
        return no_line_end(bytes, method_end, Refusal::BadRequestLine);
    }

    let target_at = method_end + 1;
    let target_window = &bytes[target_at..bytes.len().min(target_at + limits.target_bytes + 1)];
    let target_bytes = match run(target_window, is_target) {
        Some(target_bytes) => target_bytes,
        None if target_window.len() > limits.target_bytes => return Err(Refusal::TargetTooLong),
        None => return Ok(None),
    };
    let target_end = target_at + target_bytes;
    match bytes[target_end] {
        b' ' if target_bytes > 0 => {}
        b' ' | b'\r' => return no_line_end(bytes, target_end, Refusal::BadRequestLine),
        _ => return no_line_end(bytes, target_end, Refusal::BadTarget),
    }

    let Some((version, version_end)) = version(bytes, target_end + 1, Refusal::BadRequestLine)? else {
        return Ok(None);
    };
    let Some(end) = line_end(bytes, version_end, Refusal::BadRequestLine)? else { return Ok(None) };
    let line = RequestLine {
        method: ascii(&bytes[method_at..method_end], Refusal::BadRequestLine)?,
        target: ascii(&bytes[target_at..target_end], Refusal::BadTarget)?,
        version,
    };
    check_target_form(&line)?;
    Ok(Some((line, end)))
}

/// RFC 9112 section 2.2: an empty line before the request line is ignored (old clients send one after a body).
fn empty_lines(bytes: &[u8]) -> Result<Option<usize>, Refusal> {
    let mut at = 0;
    for _ in 0..=LEADING_EMPTY_LINES_MAX {
        match bytes.get(at) {
            Some(b'\r' | b'\n') => match line_end(bytes, at, Refusal::BareCr)? {
                Some(end) => at = end,
                None => return Ok(None),
            },
            Some(_) => return Ok(Some(at)),
            None => return Ok(None),
        }
    }
    Err(Refusal::EmptyLines)
}

/// RFC 9112 section 3.2, so that a target of no known form is refused before its fields have arrived.
fn check_target_form(line: &RequestLine<'_>) -> Result<(), Refusal> {
    if line.method == "CONNECT" {
        return Err(Refusal::ConnectUnsupported);
    }
    reduce_target(line.method, line.target).map(|_| ())
}

/// The origin-form of a target, and the authority that an absolute-form names (RFC 9112 section 3.2).
fn reduce_target<'b>(method: &str, target: &'b str) -> Result<(&'b str, Option<&'b str>), Refusal> {
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((target, None));
    }
    let scheme_bytes = ["http://", "https://"].iter().find_map(|scheme| {
        target.get(..scheme.len()).filter(|start| start.eq_ignore_ascii_case(scheme)).map(str::len)
    });
    let rest = &target[scheme_bytes.ok_or(Refusal::BadTarget)?..];
    let authority_bytes = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_bytes);
    if !is_authority(authority) {
        return Err(Refusal::BadTarget);
    }
    match path {
        // RFC 9112 section 3.2.4: the absolute-form of `OPTIONS *` has no path.
        "" if method == "OPTIONS" => Ok(("*", Some(authority))),
        "" => Ok(("/", Some(authority))),
        // A query without a path ("http://host?q") has no origin-form among the bytes received, and no sender.
        _ if !path.starts_with('/') => Err(Refusal::BadTarget),
        _ => Ok((path, Some(authority))),
    }
}

/// `uri-host [ ":" port ]` (RFC 9110 section 7.2). Narrower than the grammar: the host is not empty and has no comma
/// (two Host fields joined look the same), a port is at most 65535.
fn is_authority(authority: &str) -> bool {
    let (host_is_valid, port) = if let Some(rest) = authority.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        (address.parse::<Ipv6Addr>().is_ok(), port)
    } else {
        let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
        (is_reg_name(host.as_bytes()), port)
    };
    host_is_valid && port.strip_prefix(':').map_or(port.is_empty(), is_port)
}

fn is_reg_name(mut host: &[u8]) -> bool {
    let mut any = false;
    loop {
        match host {
            [] => return any,
            [b'%', high, low, rest @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                host = rest
            }
            [b'-' | b'.' | b'_' | b'~', rest @ ..] => host = rest,
            [b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b';' | b'=', rest @ ..] => host = rest,
            [byte, rest @ ..] if byte.is_ascii_alphanumeric() => host = rest,
            _ => return false,
        }
        any = true;
    }
}

fn is_port(port: &str) -> bool {
    port.is_empty() || decimal(port.as_bytes()).is_some_and(|port| port <= u64::from(u16::MAX))
}

fn head<'h, 'b>(
    line: RequestLine<'b>,
    headers: &'h [httparse::Header<'b>],
    head_bytes: usize,
) -> Result<RequestHead<'h, 'b>, Refusal> {
    let (target, target_authority) = reduce_target(line.method, line.target)?;
    let mut shared = Fields::default();
    let mut host = None;
    let mut expects_continue = false;
    let mut accepts_event_stream = false;
    for header in headers {
        if shared.take(header)? {
            continue;
        }
        if header.name.eq_ignore_ascii_case("host") {
            if host.is_some() {
                return Err(Refusal::RepeatedHost);
            }
            let value = ascii(header.value, Refusal::BadHost)?;
            if !is_authority(value) {
                return Err(Refusal::BadHost);
            }
            host = Some(value);
        } else if header.name.eq_ignore_ascii_case("expect") {
            if !list(header.value).all(|expectation| expectation.eq_ignore_ascii_case(b"100-continue")) {
                return Err(Refusal::ExpectationUnknown);
            }
            expects_continue = true;
        } else if header.name.eq_ignore_ascii_case("accept") {
            accepts_event_stream |= list(header.value).any(names_event_stream);
        }
    }
    if host.is_none() && line.version == Version::Http11 {
        return Err(Refusal::MissingHost);
    }
    let framing = match shared.declared(line.version)? {
        Declared::Nothing => Framing::None,
        Declared::Length(length) => Framing::Length(length),
        Declared::Chunked => Framing::Chunked,
    };
    // RFC 9110 section 10.1.1: no 100 to an HTTP/1.0 client, nor where no content is to come.
    let body_follows = !matches!(framing, Framing::None | Framing::Length(0));
    Ok(RequestHead {
        method: line.method,
        target,
        authority: target_authority.or(host).unwrap_or_default(),
        version: line.version,
        framing,
        keep_alive: shared.keeps_alive(line.version),
        expect_continue: expects_continue && body_follows && line.version == Version::Http11,
        accepts_event_stream,
        headers,
        head_bytes,
    })
}

/// One element of Accept (RFC 9110 section 12.5.1).
fn names_event_stream(range: &[u8]) -> bool {
    let unacceptable = range.split(|byte| *byte == b';').skip(1).map(trim).any(|parameter| {
        matches!(parameter, [b'q' | b'Q', b'=', weight @ ..]
            if weight.starts_with(b"0") && weight.iter().all(|byte| matches!(byte, b'0' | b'.')))
    });
    media_type(range).eq_ignore_ascii_case(b"text/event-stream") && !unacceptable
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, assert_prefixes_agree, mutate, request_outcome};
    use super::super::{CONNECTION_TOKENS_MAX, header_slots};
    use super::*;

    fn with_head<T>(input: &[u8], look: impl FnOnce(&RequestHead) -> T) -> T {
        let mut slots = header_slots();
        match parse_request(input, &mut slots, &HeadLimits::default()) {
            Ok(Some(head)) => look(&head),
            other => panic!("{other:?}: {}", input.escape_ascii()),
        }
    }

    /// A head whose request line is given.
    fn line(line: &str) -> Vec<u8> {
        format!("{line}\r\nHost: a\r\n\r\n").into_bytes()
    }

    /// A head of HTTP/1.1 with Host and the given further lines.
    fn with_lines(lines: &str) -> Vec<u8> {
        format!("POST /v1/x HTTP/1.1\r\nHost: a\r\n{lines}\r\n").into_bytes()
    }

    fn refused() -> Vec<(Vec<u8>, Refusal)> {
        let lines = [
            ("GET", Refusal::BadRequestLine),
            ("GET /", Refusal::BadRequestLine),
            ("GET / ", Refusal::BadRequestLine),
            ("GET  / HTTP/1.1", Refusal::BadRequestLine),
            ("GET /  HTTP/1.1", Refusal::BadRequestLine),
            ("GET / HTTP/1.1 ", Refusal::BadRequestLine),
            ("GET /a b HTTP/1.1", Refusal::BadRequestLine),
            (" GET / HTTP/1.1", Refusal::BadRequestLine),
            ("G@T / HTTP/1.1", Refusal::BadRequestLine),
            ("GET\t/ HTTP/1.1", Refusal::BadRequestLine),
            ("GET / http/1.1", Refusal::BadRequestLine),
            ("GET / HTTP/11", Refusal::BadRequestLine),
            ("GET / HTTP/1.10", Refusal::BadRequestLine),
            ("GET / HTTP/2", Refusal::BadRequestLine),
            ("GET / XTTP/1.1", Refusal::BadRequestLine),
            ("\x16\x03\x01 a TLS hello", Refusal::BadRequestLine),
            ("GET / HTTP/2.0", Refusal::UnsupportedVersion),
            ("GET / HTTP/0.9", Refusal::UnsupportedVersion),
            ("GET / HTTP/1.2", Refusal::UnsupportedVersion),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n", Refusal::UnsupportedVersion),
            ("CONNECT a:443 HTTP/1.1", Refusal::ConnectUnsupported),
            ("CONNECT / HTTP/1.1", Refusal::ConnectUnsupported),
            ("GET a:443 HTTP/1.1", Refusal::BadTarget),
            ("GET a HTTP/1.1", Refusal::BadTarget),
            ("GET * HTTP/1.1", Refusal::BadTarget),
            ("GET /# HTTP/1.1", Refusal::BadTarget),
            ("GET /\u{e4} HTTP/1.1", Refusal::BadTarget),
            ("GET /\t HTTP/1.1", Refusal::BadTarget),
            ("GET /\0 HTTP/1.1", Refusal::BadTarget),
            ("GET /\x7f HTTP/1.1", Refusal::BadTarget),
            ("GET ftp://a/ HTTP/1.1", Refusal::BadTarget),
            ("GET http:/a/ HTTP/1.1", Refusal::BadTarget),
            ("GET http:///a HTTP/1.1", Refusal::BadTarget),
            ("GET http:// HTTP/1.1", Refusal::BadTarget),
            ("GET http://u@a/ HTTP/1.1", Refusal::BadTarget),
            ("GET http://u:p@a/ HTTP/1.1", Refusal::BadTarget),
            ("GET http://a:b/ HTTP/1.1", Refusal::BadTarget),
            ("GET http://a?q HTTP/1.1", Refusal::BadTarget),
            ("GET https://[::1/ HTTP/1.1", Refusal::BadTarget),
            ("GET / HTTP/1.1\rX: y", Refusal::BareCr),
            ("GET /\r HTTP/1.1", Refusal::BareCr),
            ("GET / HTTP/1.1\nX: y", Refusal::BareLf),
            ("GET /\n", Refusal::BareLf),
            ("GET\n", Refusal::BareLf),
            ("\nGET / HTTP/1.1", Refusal::BareLf),
            ("\r\r\nGET / HTTP/1.1", Refusal::BareCr),
            ("\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1", Refusal::EmptyLines),
            ("GET / HTTP/1.1\r\n X: y", Refusal::LeadingWhitespace),
            ("GET / HTTP/1.1\r\n\tX: y", Refusal::LeadingWhitespace),
            ("GET / HTTP/1.1\r\n ", Refusal::LeadingWhitespace),
            (&"M".repeat(METHOD_BYTES_MAX + 1), Refusal::MethodTooLong),
        ];
        let fields = [
            ("X : y\r\n", Refusal::SpaceBeforeColon),
            ("X\t: y\r\n", Refusal::SpaceBeforeColon),
            ("X y: z\r\n", Refusal::SpaceBeforeColon),
            ("Content-Length : 5\r\n", Refusal::SpaceBeforeColon),
            ("X: y\r\n z\r\n", Refusal::ObsFold),
            ("X: y\r\n\tz\r\n", Refusal::ObsFold),
            ("X: y\r\n \r\n", Refusal::ObsFold),
            (": y\r\n", Refusal::BadHeaderName),
            ("X\r\n", Refusal::BadHeaderName),
            ("X(: y\r\n", Refusal::BadHeaderName),
            ("X\u{e4}: y\r\n", Refusal::BadHeaderName),
            ("X\0: y\r\n", Refusal::BadHeaderName),
            ("X: y\0z\r\n", Refusal::BadHeaderValue),
            ("X: y\x0bz\r\n", Refusal::BadHeaderValue),
            ("X: y\x7f\r\n", Refusal::BadHeaderValue),
            ("X: y\nZ: a\r\n", Refusal::BareLf),
            ("X: y\n\r\n", Refusal::BareLf),
            ("X\nY: z\r\n", Refusal::BareLf),
            ("\n", Refusal::BareLf),
            ("X: y\rz\r\n", Refusal::BareCr),
            ("X: y\r\r\n", Refusal::BareCr),
            ("X\rY: z\r\n", Refusal::BareCr),
            ("\rX: y\r\n", Refusal::BareCr),
            ("Host: a\r\n", Refusal::RepeatedHost),
            ("hOST: b\r\n", Refusal::RepeatedHost),
            ("Expect: 200-ok\r\n", Refusal::ExpectationUnknown),
            ("Expect: 100-continue, x\r\n", Refusal::ExpectationUnknown),
            ("Expect:\r\n", Refusal::ExpectationUnknown),
            ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", Refusal::ConflictingLengths),
            ("Transfer-Encoding: chunked\r\ncontent-length: 5\r\n", Refusal::ConflictingLengths),
            ("Content-Length: 5\r\nContent-Length: 5\r\n", Refusal::RepeatedLength),
            ("Content-Length: 5\r\nContent-Length: 6\r\n", Refusal::RepeatedLength),
            ("Content-Length: 5, 5\r\n", Refusal::RepeatedLength),
            ("Content-Length: 5,\r\n", Refusal::RepeatedLength),
            ("Content-Length:\r\n", Refusal::BadLength),
            ("Content-Length: +5\r\n", Refusal::BadLength),
            ("Content-Length: -5\r\n", Refusal::BadLength),
            ("Content-Length: 0x5\r\n", Refusal::BadLength),
            ("Content-Length: 5 5\r\n", Refusal::BadLength),
            ("Content-Length: 5.0\r\n", Refusal::BadLength),
            ("Content-Length: \"5\"\r\n", Refusal::BadLength),
            ("Content-Length: 1_000\r\n", Refusal::BadLength),
            ("Content-Length: 18446744073709551616\r\n", Refusal::BadLength),
            ("Content-Length: 99999999999999999999999\r\n", Refusal::BadLength),
            ("Transfer-Encoding:\r\n", Refusal::BadTransferCoding),
            ("Transfer-Encoding: chunked,\r\n", Refusal::BadTransferCoding),
            ("Transfer-Encoding: , chunked\r\n", Refusal::BadTransferCoding),
            ("Transfer-Encoding: gzip\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: identity\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: xchunked\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: chunked;x=1\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: \"chunked\"\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: gzip, chunked\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", Refusal::UnknownTransferCoding),
            ("Transfer-Encoding: \x0bchunked\r\n", Refusal::BadHeaderValue),
            ("Transfer-Encoding: chunked, gzip\r\n", Refusal::ChunkedNotLast),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n", Refusal::ChunkedNotLast),
            ("Transfer-Encoding: chunked, chunked\r\n", Refusal::ChunkedTwice),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", Refusal::ChunkedTwice),
            (
                &format!("Connection: {}\r\n", "a,".repeat(CONNECTION_TOKENS_MAX)),
                Refusal::TooManyConnectionTokens,
            ),
            (&"Connection: a\r\n".repeat(CONNECTION_TOKENS_MAX + 1), Refusal::TooManyConnectionTokens),
            (&"X: y\r\n".repeat(100), Refusal::TooManyHeaders),
        ];
        let hosts = [
            "",
            "a,b",
            "a b",
            "a/b",
            "a@b",
            "a?b",
            "a#b",
            "a:b",
            "a:65536",
            "a:-1",
            "a:1:2",
            ":80",
            "a%2",
            "a%zz",
            "::1",
            "[::1",
            "[]",
            "[a]",
            "[::1]x",
            "[::1%25eth0]",
            "a\\b",
            "a\"",
            "<a>",
            "\u{e4}",
        ];
        let mut refused = Vec::new();
        refused.extend(lines.map(|(text, refusal)| (line(text), refusal)));
        refused.extend(fields.map(|(text, refusal)| (with_lines(text), refusal)));
        refused.extend(
            hosts.map(|host| {
                (format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(), Refusal::BadHost)
            }),
        );
        refused.extend([
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), Refusal::MissingHost),
            (b"GET http://a/ HTTP/1.1\r\n\r\n".to_vec(), Refusal::MissingHost),
            (b"GET http://a/ HTTP/1.1\r\nHost: ,\r\n\r\n".to_vec(), Refusal::BadHost),
            (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n".to_vec(), Refusal::RepeatedHost),
            (
                b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
                Refusal::TransferCodingInHttp10,
            ),
            (b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n".to_vec(), Refusal::BadHost),
        ]);
        refused
    }

    #[test]
    fn every_rule_refuses_what_it_names_however_it_is_split() {
        for (input, refusal) in refused() {
            let outcome = request_outcome(&input, &HeadLimits::default());
            assert_eq!(outcome, Err(refusal), "{}", input.escape_ascii());
            assert_prefixes_agree(&input, |input| request_outcome(input, &HeadLimits::default()));
        }
    }

    #[test]
    fn garbage_is_refused_before_its_line_ends() {
        for garbage in
            ["\x16\x03\x01", "{\"model\"", "GET /\x01", "GET / FTP", "\r\n\0", "GET / HTTP/3.0", "ä"]
        {
            assert!(request_outcome(garbage.as_bytes(), &HeadLimits::default()).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn limits_are_enforced_before_the_head_is_complete() {
        let limits = HeadLimits { head_bytes: 64, headers: 2, target_bytes: 16 };
        let cases: &[(&str, Result<bool, Refusal>)] = &[
            ("GET /234567890123456 HTTP/1.1\r\nHost: a\r\n\r\n", Ok(true)),
            ("GET /234567890123456", Ok(false)),
            ("GET /2345678901234567", Err(Refusal::TargetTooLong)),
            ("GET http://a/23456789", Err(Refusal::TargetTooLong)),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 23456789012345678901234567890", Ok(false)),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 2345678901234567890123456789012345", Ok(false)),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nX: 234567890123456789012345678901234567",
                Err(Refusal::HeadTooLarge),
            ),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 23456789012345678901234567890123\r\n\r\n", Ok(true)),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nX: 234567890123456789012345678901234\r\n\r\n",
                Err(Refusal::HeadTooLarge),
            ),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r", Ok(false)),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nZ", Err(Refusal::TooManyHeaders)),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nZ: a\r\n\r\n", Err(Refusal::TooManyHeaders)),
        ];
        for (input, expected) in cases {
            let outcome = request_outcome(input.as_bytes(), &limits);
            assert_eq!(outcome.map(|head| head.is_some()), *expected, "{input:?} of {}", input.len());
            assert_prefixes_agree(input.as_bytes(), |input| request_outcome(input, &limits));
        }
    }

    #[test]
    fn targets_are_reduced_to_origin_form() {
        let cases = [
            ("GET", "/", "/", "a"),
            ("GET", "/a/b?c=d&e", "/a/b?c=d&e", "a"),
            ("GET", "//a", "//a", "a"),
            ("OPTIONS", "*", "*", "a"),
            ("GET", "http://b", "/", "b"),
            ("GET", "HTTP://b:80/", "/", "b:80"),
            ("GET", "https://[::1]:8080/x?y=http://z/", "/x?y=http://z/", "[::1]:8080"),
            ("OPTIONS", "http://b", "*", "b"),
            ("OPTIONS", "http://b/", "/", "b"),
            ("get", "/", "/", "a"),
        ];
        for (method, sent, target, authority) in cases {
            with_head(&line(&format!("{method} {sent} HTTP/1.1")), |head| {
                assert_eq!((head.method, head.target, head.authority), (method, target, authority));
            });
        }
        with_head(&line("GET /p/q?r?s HTTP/1.1"), |head| {
            assert_eq!((head.path(), head.query()), ("/p/q", Some("r?s")));
        });
        with_head(&line("GET /p? HTTP/1.1"), |head| {
            assert_eq!((head.path(), head.query()), ("/p", Some("")))
        });
        with_head(&line("GET /p HTTP/1.1"), |head| assert_eq!((head.path(), head.query()), ("/p", None)));
    }

    #[test]
    fn dot_segments_are_seen_in_every_spelling() {
        for (path, expected) in [
            ("/..", true),
            ("/a/../b", true),
            ("/a/./b", true),
            ("/%2e%2E/b", true),
            ("/.%2e", true),
            ("/...", false),
            ("/a..b/.c/d.", false),
            ("/a?/../", false),
            ("/%2e%2e%2e", false),
        ] {
            with_head(&line(&format!("GET {path} HTTP/1.1")), |head| {
                assert_eq!(head.has_dot_segments(), expected, "{path}");
            });
        }
    }

    #[test]
    fn hosts_of_every_legal_form_are_accepted() {
        for host in [
            "a",
            "a.b-c_d.",
            "127.0.0.1:8080",
            "[::1]",
            "[::ffff:1.2.3.4]:65535",
            "a:",
            "a%20b",
            "xn--4ca",
            "a:0",
        ] {
            let input = format!("GET / HTTP/1.1\r\nHost:{host}  \r\n\r\n");
            with_head(input.as_bytes(), |head| assert_eq!(head.authority, host));
        }
        with_head(b"GET / HTTP/1.0\r\n\r\n", |head| assert_eq!(head.authority, ""));
    }

    #[test]
    fn framing_and_persistence_follow_the_fields() {
        let none = Framing::None;
        let cases = [
            ("1.1", "", none, true),
            ("1.1", "Content-Length: 0\r\n", Framing::Length(0), true),
            ("1.1", "content-LENGTH: \t 18446744073709551615 \r\n", Framing::Length(u64::MAX), true),
            ("1.1", "Transfer-Encoding: Chunked\r\n", Framing::Chunked, true),
            ("1.1", "transfer-encoding:\tCHUNKED\t\r\n", Framing::Chunked, true),
            ("1.1", "Connection: close\r\n", none, false),
            ("1.1", "Connection: foo, CLOSE\r\n", none, false),
            ("1.1", "Connection: keep-alive\r\nConnection: x , Close\r\n", none, false),
            ("1.1", "Connection: closed\r\n", none, true),
            ("1.0", "", none, false),
            ("1.0", "Connection: Keep-Alive\r\n", none, true),
            ("1.0", "Connection: x\r\nConnection: keep-alive\r\n", none, true),
            ("1.0", "Connection: keep-alive, close\r\n", none, false),
            ("1.0", "Content-Length: 7\r\n", Framing::Length(7), false),
        ];
        for (version, lines, framing, keep_alive) in cases {
            let input = format!("POST / HTTP/{version}\r\nHost: a\r\n{lines}\r\n");
            with_head(input.as_bytes(), |head| {
                assert_eq!((head.framing, head.keep_alive), (framing, keep_alive), "{input:?}");
            });
        }
    }

    #[test]
    fn a_100_is_expected_only_where_it_has_a_meaning() {
        for (version, lines, expected) in [
            ("1.1", "Expect: 100-Continue\r\nContent-Length: 1\r\n", true),
            ("1.1", "expect: 100-continue\r\nTransfer-Encoding: chunked\r\n", true),
            ("1.1", "Expect: 100-continue\r\n", false),
            ("1.1", "Expect: 100-continue\r\nContent-Length: 0\r\n", false),
            ("1.0", "Expect: 100-continue\r\nContent-Length: 1\r\n", false),
            ("1.1", "Content-Length: 1\r\n", false),
        ] {
            let input = format!("POST / HTTP/{version}\r\nHost: a\r\n{lines}\r\n");
            with_head(input.as_bytes(), |head| assert_eq!(head.expect_continue, expected, "{input:?}"));
        }
    }

    #[test]
    fn an_event_stream_is_accepted_when_it_is_named() {
        for (lines, expected) in [
            ("Accept: text/event-stream\r\n", true),
            ("Accept: application/json, Text/Event-Stream;q=0.9\r\n", true),
            ("Accept: application/json\r\nAccept: text/event-stream\r\n", true),
            ("Accept: text/event-stream; q=0\r\n", false),
            ("Accept: text/event-stream;Q=0.000\r\n", false),
            ("Accept: text/event-stream;q=0.001\r\n", true),
            ("Accept: */*\r\n", false),
            ("Accept: text/event-streams\r\n", false),
            ("", false),
        ] {
            with_head(&with_lines(lines), |head| {
                assert_eq!(head.accepts_event_stream, expected, "{lines:?}")
            });
        }
    }

    #[test]
    fn legal_heads_keep_their_fields_and_leave_the_rest() {
        let head_text =
            "\r\n\r\nPOST /x HTTP/1.1\r\nHost: a\r\nX-Empty:\r\nX-Obs: \u{e4}\t b \r\nx-Y:z\r\n\r\n";
        let input = format!("{head_text}GET / HTTP/1.1\n");
        with_head(input.as_bytes(), |head| {
            assert_eq!(head.head_bytes, head_text.len());
            let fields: Vec<_> = head.headers.iter().map(|header| (header.name, header.value)).collect();
            let obs = "\u{e4}\t b".as_bytes();
            assert_eq!(fields, [("Host", &b"a"[..]), ("X-Empty", b""), ("X-Obs", obs), ("x-Y", b"z")]);
            assert_eq!(head.header("X-y"), Some(&b"z"[..]));
            assert_eq!(head.header("x"), None);
        });
        assert_prefixes_agree(input.as_bytes(), |input| request_outcome(input, &HeadLimits::default()));
        with_head(&with_lines(&"X: y\r\n".repeat(99)), |head| assert_eq!(head.headers.len(), 100));
    }

    /// httparse, an independent parser, must split alike whatever we accept; and prefixes must agree on anything.
    #[test]
    fn whatever_is_accepted_another_parser_reads_alike() {
        let mut accepted = 0;
        let mut seeds: Vec<Vec<u8>> = refused().into_iter().map(|(input, _)| input).collect();
        seeds.retain(|input| input.len() < 500);
        for _ in 0..200 {
            seeds.push(with_lines("Content-Length: 12\r\nAccept: text/event-stream, */*\r\nX-Y_z: a b\r\n"));
            seeds.push(line("\r\nGET https://example.com:8080/v1/models?a=%20b HTTP/1.1"));
        }
        for seed in 0..4000 {
            let mut random = Random(seed);
            let mut input = random.pick(&seeds).clone();
            mutate(&mut input, &mut random);
            assert_prefixes_agree(&input, |input| request_outcome(input, &HeadLimits::default()));
            let mut slots = header_slots();
            let Ok(Some(head)) = parse_request(&input, &mut slots, &HeadLimits::default()) else { continue };
            accepted += 1;
            let mut theirs = header_slots();
            let mut request = httparse::Request::new(&mut theirs);
            let parsed = request.parse(&input);
            assert_eq!(parsed, Ok(httparse::Status::Complete(head.head_bytes)), "seed {seed}");
            assert_eq!(request.method, Some(head.method), "seed {seed}");
            assert!(request.path.is_some_and(|path| path.ends_with(head.target) || head.target.len() == 1));
            assert_eq!(request.version, Some(u8::from(head.version == Version::Http11)), "seed {seed}");
            assert_eq!(request.headers, head.headers, "seed {seed}");
        }
        assert!(accepted > 400, "too few to mean something: {accepted}");
    }
}
