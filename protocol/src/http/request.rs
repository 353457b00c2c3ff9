//! Request heads: the request line, the target reduced to origin-form, and the rules that only requests have.
//! RFC 9112 sections 2.2, 3 and 6.3; every refusal is the first in the order of the bytes, however they were split.

use std::net::Ipv6Addr;

use super::fields::{Declared, Fields, decimal, find, media_type};
use super::scan::{ascii, fields, is_target, is_token, line_end, list, no_line_end, run, trim, version};
use super::{Framing, HeadLimits, HeaderSlots, LEADING_EMPTY_LINES_MAX, METHOD_BYTES_MAX, Refusal, Version};
use crate::limits::HEADERS_MAX;

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
        self.path().split('/').any(is_dot_segment)
    }
}

/// Whether a segment of a path is `.` or `..`, literally or percent-encoded.
pub fn is_dot_segment(segment: &str) -> bool {
    let mut rest = segment.as_bytes();
    let mut dots = 0;
    while let [b'.', tail @ ..] | [b'%', b'2', b'e' | b'E', tail @ ..] = rest {
        (rest, dots) = (tail, dots + 1);
    }
    rest.is_empty() && (dots == 1 || dots == 2)
}

/// Parses the request head at the start of `input`.
///
/// `Ok(None)`: the head is incomplete, and so far legal and within the limits. Empty lines before the request line
/// are tolerated, up to [`LEADING_EMPTY_LINES_MAX`]. A refusal does not depend on how the bytes were split: bytes
/// that are refused stay refused in the same way whatever follows them, and illegal ones are not waited upon.
///
/// Each call reads from the start, so a caller that receives a head in small pieces may wait for the next LF (no head
/// becomes complete without one).
pub fn parse_request<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    limits: &HeadLimits,
) -> Result<Option<RequestHead<'h, 'b>>, Refusal> {
    let window = &input[..input.len().min(limits.head_bytes)];
    let headers_max = limits.headers.min(HEADERS_MAX);
    let Some((line, after_line)) = request_line(window, limits)? else { return incomplete(input, limits) };
    let Some(head_bytes) = fields(window, after_line, slots, headers_max)? else {
        return incomplete(input, limits);
    };
    head(line, slots.filled(), head_bytes).map(Some)
}

/// The answer when the head does not end within the bytes that it may have.
pub(super) fn incomplete<T>(input: &[u8], limits: &HeadLimits) -> Result<Option<T>, Refusal> {
    if input.len() >= limits.head_bytes { Err(Refusal::HeadTooLarge) } else { Ok(None) }
}

struct RequestLine<'b> {
    method: &'b str,
    target: &'b str,
    target_authority: Option<&'b str>,
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
    let target_window =
        &bytes[target_at..bytes.len().min(target_at.saturating_add(limits.target_bytes).saturating_add(1))];
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
    // A target of no known form is refused here, before its fields have arrived.
    let method = ascii(&bytes[method_at..method_end], Refusal::BadRequestLine)?;
    let sent = ascii(&bytes[target_at..target_end], Refusal::BadTarget)?;
    let (target, target_authority) = reduce_target(method, sent)?;
    Ok(Some((RequestLine { method, target, target_authority, version }, end)))
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

/// The origin-form of a target, and the authority that an absolute-form names (RFC 9112 section 3.2).
fn reduce_target<'b>(method: &str, target: &'b str) -> Result<(&'b str, Option<&'b str>), Refusal> {
    if method == "CONNECT" {
        return Err(Refusal::ConnectUnsupported);
    }
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
        target: line.target,
        authority: line.target_authority.or(host).unwrap_or_default(),
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
