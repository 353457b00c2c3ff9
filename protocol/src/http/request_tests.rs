//! Tests of request heads: one table row per rule, every split of every row, and httparse as a second opinion.
//! Apart from `request.rs` for length only.

use super::testing::{Random, assert_prefixes_agree, mutate, request_outcome};
use super::{
    CONNECTION_TOKENS_MAX, Framing, HeadLimits, METHOD_BYTES_MAX, Refusal, RequestHead, Version,
    header_slots, parse_request,
};
use crate::limits::HEADERS_MAX;

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
        hosts.map(|host| (format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(), Refusal::BadHost)),
    );
    refused.extend([
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), Refusal::MissingHost),
        (b"GET http://a/ HTTP/1.1\r\n\r\n".to_vec(), Refusal::MissingHost),
        (b"GET http://a/ HTTP/1.1\r\nHost: ,\r\n\r\n".to_vec(), Refusal::BadHost),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n".to_vec(), Refusal::RepeatedHost),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(), Refusal::TransferCodingInHttp10),
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
    for garbage in ["\x16\x03\x01", "{\"model\"", "GET /\x01", "GET / FTP", "\r\n\0", "GET / HTTP/3.0", "ä"]
    {
        assert!(request_outcome(garbage.as_bytes(), &HeadLimits::default()).is_err(), "{garbage:?}");
    }
}

#[test]
fn all_fields_are_read_in_order_however_many_there_are() {
    let counts = [HEADERS_MAX, 31, 32, 33, 1, 34, HEADERS_MAX];
    let names: Vec<String> = (1..HEADERS_MAX).map(|number| format!("X{number}")).collect();
    let inputs = counts.map(|count| {
        let lines: String = names[..count - 1].iter().map(|name| format!("{name}: {name}\r\n")).collect();
        format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
    });
    // The same slots again and again: nothing of the head before may be left in them.
    let mut slots = header_slots();
    for (count, input) in counts.into_iter().zip(&inputs) {
        let head = parse_request(input.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        let read: Vec<_> = head.headers.iter().map(|header| (header.name, header.value)).collect();
        let expected: Vec<_> =
            names[..count - 1].iter().map(|name| (name.as_str(), name.as_bytes())).collect();
        assert_eq!(read[0], ("Host", &b"a"[..]));
        assert_eq!(read[1..], expected);
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
        ("GET / HTTP/1.1\r\nHost: a\r\nX: 234567890123456789012345678901234567", Err(Refusal::HeadTooLarge)),
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
    with_head(&line("GET /p? HTTP/1.1"), |head| assert_eq!((head.path(), head.query()), ("/p", Some(""))));
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
        with_head(&with_lines(lines), |head| assert_eq!(head.accepts_event_stream, expected, "{lines:?}"));
    }
}

#[test]
fn legal_heads_keep_their_fields_and_leave_the_rest() {
    let head_text = "\r\n\r\nPOST /x HTTP/1.1\r\nHost: a\r\nX-Empty:\r\nX-Obs: \u{e4}\t b \r\nx-Y:z\r\n\r\n";
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
        let mut theirs = [httparse::EMPTY_HEADER; HEADERS_MAX];
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
