//! Response heads as backends send them: status line, framing by status and request method, event streams.
//! RFC 9112 sections 4 and 6.3. As strict as requests, but for reason phrases, which mean nothing to anyone.

use super::fields::{Declared, Fields, decimal, find, media_type};
use super::request::incomplete;
use super::scan::{fields, is_value, line_end, list, no_line_end, run, version};
use super::{Framing, HeadLimits, HeaderSlots, Refusal, Version};
use crate::limits::HEADERS_MAX;

/// A complete and legal response head; borrows the bytes it was parsed from.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ResponseHead<'h, 'b> {
    /// Three digits, 100 to 999.
    pub status: u16,
    /// The reason phrase; empty when it is missing or not UTF-8.
    pub reason: &'b str,
    /// The version of the status line.
    pub version: Version,
    /// How the body ends, given the method of the request that it answers.
    pub framing: Framing,
    /// Whether the connection can be used again after the body. Never after a body that ends by close.
    pub keep_alive: bool,
    /// Seconds that the backend says it keeps the idle connection (`Keep-Alive: timeout=5`).
    pub keep_alive_timeout_s: Option<u32>,
    /// The one Content-Type is `text/event-stream`, and no content coding but identity is applied.
    pub event_stream: bool,
    /// All fields in order, names as sent, values without surrounding whitespace.
    pub headers: &'h [httparse::Header<'b>],
    /// Bytes of the input that the head occupies.
    pub head_bytes: usize,
}

impl<'b> ResponseHead<'_, 'b> {
    /// The value of the first field of that name, compared without case.
    pub fn header(&self, name: &str) -> Option<&'b [u8]> {
        find(self.headers, name)
    }
}

/// Parses the response head at the start of `input`, as the answer to a request with `request_method`.
///
/// `Ok(None)`: the head is incomplete, and so far legal and within the limits. An interim (1xx) head is returned like
/// any other with [`Framing::None`], 101 included. The framing fields of 1xx, 204 and a 2xx to CONNECT are ignored
/// (RFC 9112 section 6.3); those of 304 and of answers to HEAD must be legal although no body follows.
pub fn parse_response<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    limits: &HeadLimits,
    request_method: &str,
) -> Result<Option<ResponseHead<'h, 'b>>, Refusal> {
    let window = &input[..input.len().min(limits.head_bytes)];
    let headers_max = limits.headers.min(HEADERS_MAX);
    let Some((line, after_line)) = status_line(window)? else { return incomplete(input, limits) };
    let Some(head_bytes) = fields(window, after_line, slots, headers_max)? else {
        return incomplete(input, limits);
    };
    head(line, slots.filled(), head_bytes, request_method).map(Some)
}

struct StatusLine<'b> {
    version: Version,
    status: u16,
    reason: &'b str,
}

fn status_line(bytes: &[u8]) -> Result<Option<(StatusLine<'_>, usize)>, Refusal> {
    let Some((version, version_end)) = version(bytes, 0, Refusal::BadStatusLine)? else { return Ok(None) };
    let mut status = 0u16;
    for offset in 0..4 {
        let at = version_end + offset;
        let Some(byte) = bytes.get(at) else { return Ok(None) };
        let fits = match offset {
            0 => *byte == b' ',
            1 => matches!(byte, b'1'..=b'9'),
            _ => byte.is_ascii_digit(),
        };
        if !fits {
            return no_line_end(bytes, at, Refusal::BadStatusLine);
        }
        if offset > 0 {
            status = status * 10 + u16::from(byte - b'0');
        }
    }
    let status_end = version_end + 4;
    // Some servers leave out the space too when they have no reason to give.
    let (reason, reason_end) = match bytes.get(status_end) {
        Some(b' ') => {
            let Some(reason_bytes) = run(&bytes[status_end + 1..], is_value) else { return Ok(None) };
            let reason_end = status_end + 1 + reason_bytes;
            (std::str::from_utf8(&bytes[status_end + 1..reason_end]).unwrap_or_default(), reason_end)
        }
        _ => ("", status_end),
    };
    let Some(end) = line_end(bytes, reason_end, Refusal::BadStatusLine)? else { return Ok(None) };
    Ok(Some((StatusLine { version, status, reason }, end)))
}

fn head<'h, 'b>(
    line: StatusLine<'b>,
    headers: &'h [httparse::Header<'b>],
    head_bytes: usize,
    request_method: &str,
) -> Result<ResponseHead<'h, 'b>, Refusal> {
    let mut shared = Fields::default();
    let mut content_types = 0;
    let mut event_stream = false;
    let mut encoded = false;
    let mut keep_alive_timeout_s = None;
    for header in headers {
        if shared.take(header)? {
            continue;
        }
        if header.name.eq_ignore_ascii_case("content-type") {
            content_types += 1;
            event_stream = media_type(header.value).eq_ignore_ascii_case(b"text/event-stream");
        } else if header.name.eq_ignore_ascii_case("content-encoding") {
            encoded |= list(header.value)
                .any(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity"));
        } else if header.name.eq_ignore_ascii_case("keep-alive") {
            keep_alive_timeout_s = keep_alive_timeout_s.or_else(|| list(header.value).find_map(timeout_s));
        }
    }
    let framing = framing(&line, &shared, request_method)?;
    Ok(ResponseHead {
        status: line.status,
        reason: line.reason,
        version: line.version,
        framing,
        keep_alive: shared.keeps_alive(line.version) && framing != Framing::UntilClose,
        keep_alive_timeout_s,
        event_stream: event_stream && content_types == 1 && !encoded,
        headers,
        head_bytes,
    })
}

/// RFC 9112 section 6.3, in its order.
fn framing(line: &StatusLine<'_>, fields: &Fields<'_>, request_method: &str) -> Result<Framing, Refusal> {
    if line.status < 200 || line.status == 204 {
        return Ok(Framing::None);
    }
    if request_method == "CONNECT" && (200..300).contains(&line.status) {
        return Ok(Framing::None);
    }
    let declared = fields.declared(line.version)?;
    if request_method == "HEAD" || line.status == 304 {
        return Ok(Framing::None);
    }
    Ok(match declared {
        Declared::Chunked => Framing::Chunked,
        Declared::Length(length) => Framing::Length(length),
        Declared::Nothing => Framing::UntilClose,
    })
}

/// Statuses that never have a body, whatever was asked (RFC 9110 section 6.4.1).
pub(super) fn is_bodiless(status: u16) -> bool {
    status < 200 || status == 204 || status == 304
}

/// One parameter of Keep-Alive; a timeout that is not a number of seconds is ignored.
fn timeout_s(parameter: &[u8]) -> Option<u32> {
    let (name, value) = parameter.split_at_checked("timeout=".len())?;
    let seconds = name.eq_ignore_ascii_case(b"timeout=").then(|| decimal(value))??;
    u32::try_from(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::super::header_slots;
    use super::super::testing::{Random, assert_prefixes_agree, mutate, response_outcome};
    use super::*;

    fn with_head<T>(input: &[u8], method: &str, look: impl FnOnce(&ResponseHead) -> T) -> T {
        let mut slots = header_slots();
        match parse_response(input, &mut slots, &HeadLimits::default(), method) {
            Ok(Some(head)) => look(&head),
            other => panic!("{other:?}: {}", input.escape_ascii()),
        }
    }

    const REFUSED: &[(&str, Refusal)] = &[
        ("HTTP/1.1 20 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 2000 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 099 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 2x0 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 +20 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1  200 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1\t200 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 200\tOK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1 200 O\0K\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/1.1\r\n\r\n", Refusal::BadStatusLine),
        ("http/1.1 200 OK\r\n\r\n", Refusal::BadStatusLine),
        ("ICY 200 OK\r\n\r\n", Refusal::BadStatusLine),
        ("data: {}\r\n\r\n", Refusal::BadStatusLine),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n", Refusal::BadStatusLine),
        ("HTTP/2.0 200 OK\r\n\r\n", Refusal::UnsupportedVersion),
        ("HTTP/1.1 200 OK\n\n", Refusal::BareLf),
        ("HTTP/1.1 200\n\n", Refusal::BareLf),
        ("HTTP/1.1 200 O\rK\r\n\r\n", Refusal::BareCr),
        ("HTTP/1.1 200\rOK\r\n\r\n", Refusal::BareCr),
        ("HTTP/1.1 200 OK\r\nX: y\n\r\n", Refusal::BareLf),
        ("HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n", Refusal::ObsFold),
        ("HTTP/1.1 200 OK\r\n X: y\r\n\r\n", Refusal::LeadingWhitespace),
        ("HTTP/1.1 200 OK\r\nX : y\r\n\r\n", Refusal::SpaceBeforeColon),
        ("HTTP/1.1 200 OK\r\nX: \0\r\n\r\n", Refusal::BadHeaderValue),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            Refusal::ConflictingLengths,
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", Refusal::RepeatedLength),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n", Refusal::RepeatedLength),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 1, 1\r\n\r\n", Refusal::RepeatedLength),
        ("HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n", Refusal::BadLength),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", Refusal::UnknownTransferCoding),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", Refusal::ChunkedNotLast),
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Refusal::TransferCodingInHttp10),
    ];

    #[test]
    fn every_rule_refuses_what_it_names_however_it_is_split() {
        for (input, refusal) in REFUSED {
            let outcome = |input: &[u8]| response_outcome(input, &HeadLimits::default(), "GET");
            assert_eq!(outcome(input.as_bytes()), Err(*refusal), "{input:?}");
            assert_prefixes_agree(input.as_bytes(), outcome);
        }
    }

    #[test]
    fn limits_are_enforced_before_the_head_is_complete() {
        let limits = HeadLimits { head_bytes: 32, headers: 1, target_bytes: 0 };
        for (input, expected) in [
            ("HTTP/1.1 200 OK\r\nX: yyyyyyyy\r\n\r\n", Ok(true)),
            ("HTTP/1.1 200 OK\r\nX: yyyyyyyyy\r\n\r\n", Err(Refusal::HeadTooLarge)),
            ("HTTP/1.1 200 and so on, and so on", Err(Refusal::HeadTooLarge)),
            ("HTTP/1.1 200 OK\r\nX: y\r\nY", Err(Refusal::TooManyHeaders)),
        ] {
            let outcome = |input: &[u8]| response_outcome(input, &limits, "GET");
            assert_eq!(outcome(input.as_bytes()).map(|head| head.is_some()), expected, "{input:?}");
            assert_prefixes_agree(input.as_bytes(), outcome);
        }
    }

    #[test]
    fn status_lines_may_lack_a_reason() {
        for (line, status, reason) in [
            ("HTTP/1.1 200 OK", 200, "OK"),
            ("HTTP/1.0 404 ", 404, ""),
            ("HTTP/1.1 599", 599, ""),
            ("HTTP/1.1 999  two\twords", 999, " two\twords"),
            ("HTTP/1.1 200 \u{e4}", 200, "\u{e4}"),
        ] {
            let input = format!("{line}\r\n\r\nrest");
            with_head(input.as_bytes(), "GET", |head| {
                assert_eq!((head.status, head.reason, head.head_bytes), (status, reason, line.len() + 4));
            });
            assert_prefixes_agree(input.as_bytes(), |input| {
                response_outcome(input, &HeadLimits::default(), "GET")
            });
        }
        with_head(b"HTTP/1.1 200 \xe4\r\n\r\n", "GET", |head| assert_eq!(head.reason, ""));
    }

    #[test]
    fn framing_follows_method_and_status() {
        let length = "Content-Length: 5\r\n";
        let chunked = "Transfer-Encoding: chunked\r\n";
        let both = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n";
        for (method, status, lines, expected) in [
            ("GET", 200, length, Framing::Length(5)),
            ("GET", 200, chunked, Framing::Chunked),
            ("GET", 200, "", Framing::UntilClose),
            ("POST", 500, "Content-Length: 0\r\n", Framing::Length(0)),
            ("HEAD", 200, length, Framing::None),
            ("HEAD", 200, chunked, Framing::None),
            ("HEAD", 200, "", Framing::None),
            ("head", 200, length, Framing::Length(5)),
            ("GET", 304, length, Framing::None),
            ("GET", 204, length, Framing::None),
            ("GET", 204, both, Framing::None),
            ("GET", 100, length, Framing::None),
            ("GET", 101, "", Framing::None),
            ("GET", 103, both, Framing::None),
            ("CONNECT", 200, length, Framing::None),
            ("CONNECT", 407, length, Framing::Length(5)),
        ] {
            let input = format!("HTTP/1.1 {status} x\r\n{lines}\r\n");
            with_head(input.as_bytes(), method, |head| {
                assert_eq!(head.framing, expected, "{method} {input:?}")
            });
        }
    }

    #[test]
    fn persistence_follows_version_fields_and_framing() {
        for (lines, keep_alive, timeout_s) in [
            ("1.1 200 OK\r\nContent-Length: 0\r\n", true, None),
            ("1.1 200 OK\r\n", false, None),
            ("1.1 204 x\r\n", true, None),
            ("1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n", false, None),
            ("1.0 200 OK\r\nContent-Length: 0\r\n", false, None),
            ("1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n", true, None),
            ("1.0 200 OK\r\nConnection: Keep-Alive\r\n", false, None),
            ("1.1 204 x\r\nKeep-Alive: timeout=5, max=100\r\n", true, Some(5)),
            ("1.1 204 x\r\nkeep-alive: max=100, Timeout=70\r\n", true, Some(70)),
            ("1.1 204 x\r\nKeep-Alive: timeout=\r\n", true, None),
            ("1.1 204 x\r\nKeep-Alive: timeout=-1\r\n", true, None),
            ("1.1 204 x\r\nKeep-Alive: timeout=99999999999\r\n", true, None),
        ] {
            let input = format!("HTTP/{lines}\r\n");
            with_head(input.as_bytes(), "GET", |head| {
                assert_eq!(
                    (head.keep_alive, head.keep_alive_timeout_s),
                    (keep_alive, timeout_s),
                    "{input:?}"
                );
            });
        }
    }

    #[test]
    fn event_streams_are_known_by_type_and_lack_of_coding() {
        for (lines, expected) in [
            ("Content-Type: text/event-stream\r\n", true),
            ("content-type: Text/Event-Stream ; charset=utf-8\r\n", true),
            ("Content-Type: text/event-stream\r\nContent-Encoding: Identity\r\n", true),
            ("Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\n", false),
            ("Content-Encoding: br\r\nContent-Type: text/event-stream\r\n", false),
            ("Content-Type: text/event-stream\r\nContent-Type: text/html\r\n", false),
            ("Content-Type: text/html\r\nContent-Type: text/event-stream\r\n", false),
            ("Content-Type: text/event-streams\r\n", false),
            ("Content-Type: application/json\r\n", false),
            ("", false),
        ] {
            let input = format!("HTTP/1.1 200 OK\r\n{lines}\r\n");
            with_head(input.as_bytes(), "GET", |head| assert_eq!(head.event_stream, expected, "{input:?}"));
        }
    }

    /// httparse, an independent parser, must split alike whatever we accept; and prefixes must agree on anything.
    #[test]
    fn whatever_is_accepted_another_parser_reads_alike() {
        let legal = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nX-Y_z: a b\r\n\r\n";
        let mut accepted = 0;
        for seed in 0..3000 {
            let mut random = Random(seed);
            let mut input = match random.below(3) {
                0 => random.pick(REFUSED).0.as_bytes().to_vec(),
                _ => legal.as_bytes().to_vec(),
            };
            mutate(&mut input, &mut random);
            assert_prefixes_agree(&input, |input| response_outcome(input, &HeadLimits::default(), "GET"));
            let mut slots = header_slots();
            let Ok(Some(head)) = parse_response(&input, &mut slots, &HeadLimits::default(), "GET") else {
                continue;
            };
            accepted += 1;
            let mut theirs = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut response = httparse::Response::new(&mut theirs);
            let parsed = response.parse(&input);
            assert_eq!(parsed, Ok(httparse::Status::Complete(head.head_bytes)), "seed {seed}");
            assert_eq!(response.code, Some(head.status), "seed {seed}");
            assert_eq!(response.headers, head.headers, "seed {seed}");
        }
        assert!(accepted > 600, "too few to mean something: {accepted}");
    }
}
