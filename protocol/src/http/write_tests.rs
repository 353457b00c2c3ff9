//! Tests of the heads that we write: fixed examples, then random heads that are parsed, written and parsed again.
//! Apart from `write.rs` for length only.

use super::testing::{Random, mutate};
use super::{
    ClientHead, Framing, HeadLimits, RequestHead, ResponseHead, Version, header_slots, parse_request,
    parse_response, reason_phrase, write_client_response, write_own_response_head, write_upstream_request,
};

fn with_request<T>(input: &[u8], look: impl FnOnce(&RequestHead) -> T) -> Option<T> {
    let mut slots = header_slots();
    parse_request(input, &mut slots, &HeadLimits::default()).ok().flatten().map(|head| look(&head))
}

fn with_response<T>(input: &[u8], method: &str, look: impl FnOnce(&ResponseHead) -> T) -> Option<T> {
    let mut slots = header_slots();
    parse_response(input, &mut slots, &HeadLimits::default(), method).ok().flatten().map(|head| look(&head))
}

fn upstream(input: &str, base_path: &str, identity_encoding: bool) -> String {
    let mut out = Vec::new();
    with_request(input.as_bytes(), |head| {
        write_upstream_request(&mut out, head, "backend:8000", base_path, identity_encoding);
    })
    .unwrap_or_else(|| panic!("must parse: {input:?}"));
    String::from_utf8(out).unwrap()
}

fn client(input: &str, method: &str, how: &ClientHead) -> String {
    let mut out = Vec::new();
    with_response(input.as_bytes(), method, |head| write_client_response(&mut out, head, how))
        .unwrap_or_else(|| panic!("must parse: {input:?}"));
    String::from_utf8(out).unwrap()
}

fn own(status: u16, version: Version, keep_alive: bool, framing: Framing, extra: &str) -> String {
    let mut out = Vec::new();
    write_own_response_head(&mut out, status, version, keep_alive, framing, extra);
    String::from_utf8(out).unwrap()
}

const KEPT: ClientHead = ClientHead {
    client_version: Version::Http11,
    keep_alive: true,
    framing: Framing::None,
    event_stream: false,
    own_cors: false,
    extra: "",
};

#[test]
fn a_request_is_forwarded_without_what_concerns_one_connection() {
    let input = "POST http://other/v1/chat?x=1 HTTP/1.1\r\nHost: front\r\nauthorization:  Bearer k \r\n\
        Connection: close, X-Foo\r\nX-Foo: 1\r\nx-FOO: 2\r\nX-Food: 3\r\nConnection: x-bar\r\nX-Bar: 4\r\n\
        Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\n\
        Proxy-Authenticate: Basic\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\
        Expect: 100-continue\r\nAccept-Encoding: gzip\r\nVia: 1.1 front\r\nX-Same: a\r\nx-same: b\r\n\
        Content_Length: 9\r\nTransfer_encoding: chunked\r\nContent-Length: 0012\r\n\r\n";
    let expected = "POST /base/v1/chat?x=1 HTTP/1.1\r\nHost: backend:8000\r\nauthorization: Bearer k\r\n\
        X-Food: 3\r\nVia: 1.1 front\r\nX-Same: a\r\nx-same: b\r\nAccept-Encoding: identity\r\n\
        Content-Length: 12\r\nVia: 1.1 tokenring\r\n\r\n";
    assert_eq!(upstream(input, "/base", true), expected);
    assert_eq!(upstream(input, "/base/", true), expected);
}

#[test]
fn a_request_keeps_its_encodings_unless_told_otherwise() {
    let input = "POST /a HTTP/1.1\r\nHost: h\r\nAccept-Encoding: gzip\r\nTransfer-Encoding: Chunked\r\n\r\n";
    let expected = "POST /a HTTP/1.1\r\nHost: backend:8000\r\nAccept-Encoding: gzip\r\n\
        Transfer-Encoding: chunked\r\nVia: 1.1 tokenring\r\n\r\n";
    assert_eq!(upstream(input, "", false), expected);
    assert_eq!(upstream(input, "/", false), expected);
}

#[test]
fn asterisks_take_no_base_path_and_the_version_received_is_told() {
    let expected = "OPTIONS * HTTP/1.1\r\nHost: backend:8000\r\nVia: 1.0 tokenring\r\n\r\n";
    assert_eq!(upstream("OPTIONS * HTTP/1.0\r\n\r\n", "/base", false), expected);
}

#[test]
fn a_response_is_forwarded_without_what_concerns_one_connection() {
    let input = "HTTP/1.0 200 Fine\r\nServer: s\r\nConnection: keep-alive, X-Foo\r\nX-Foo: 1\r\nKeep-Alive: timeout=5\r\n\
        Content-Type: text/plain\r\nCache-Control: no-store\r\nTrailer: X\r\nContent-Length: 007\r\nX-A:\r\n\r\n";
    let how = ClientHead { framing: Framing::Length(7), extra: "X-Request-Id: r\r\n", ..KEPT };
    let expected = "HTTP/1.1 200 Fine\r\nServer: s\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\nX-A: \r\n\
        X-Request-Id: r\r\nContent-Length: 7\r\n\r\n";
    assert_eq!(client(input, "GET", &how), expected);
}

#[test]
fn an_event_stream_has_our_fields_instead_of_the_backends() {
    let input = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ncache-control: public\r\nX-Accel-Buffering: yes\r\n\
        Content-Length: 7\r\nX-Model: m\r\n\r\n";
    let extra = "Content-Type: text/event-stream; charset=utf-8\r\n";
    let how = ClientHead { framing: Framing::Chunked, event_stream: true, extra, ..KEPT };
    let expected = "HTTP/1.1 200 OK\r\nX-Model: m\r\nContent-Type: text/event-stream; charset=utf-8\r\n\
        Transfer-Encoding: chunked\r\n\r\n";
    assert_eq!(client(input, "GET", &how), expected);
}

#[test]
fn what_a_backend_says_of_cors_gives_way_to_what_we_say() {
    let lines = "access-control-allow-origin:\r\nAccess-Control-Allow-Headers: a\r\n";
    let input =
        format!("HTTP/1.1 200 OK\r\n{lines}X-Model: m\r\nAccess-Controls: b\r\nContent-Length: 0\r\n\r\n");
    let extra = "Access-Control-Allow-Origin: *\r\n";
    let how = ClientHead { framing: Framing::Length(0), own_cors: true, extra, ..KEPT };
    let expected =
        format!("HTTP/1.1 200 OK\r\nX-Model: m\r\nAccess-Controls: b\r\n{extra}Content-Length: 0\r\n\r\n");
    assert_eq!(client(&input, "GET", &how), expected);
    let passed = client(&input, "GET", &ClientHead { framing: Framing::Length(0), ..KEPT });
    assert!(passed.to_ascii_lowercase().contains("access-control-allow-origin:"));
}

#[test]
fn the_connection_field_follows_version_and_framing() {
    let close = "Connection: close\r\n";
    let keep = "Connection: keep-alive\r\n";
    for (client_version, keep_alive, framing, expected) in [
        (Version::Http11, true, Framing::None, ""),
        (Version::Http11, false, Framing::None, close),
        (Version::Http11, true, Framing::UntilClose, close),
        (Version::Http10, true, Framing::None, keep),
        (Version::Http10, false, Framing::None, close),
        (Version::Http10, true, Framing::UntilClose, close),
    ] {
        let how = ClientHead { client_version, keep_alive, framing, ..KEPT };
        let head = format!("HTTP/1.1 404 Not Found\r\n{expected}\r\n");
        assert_eq!(client("HTTP/1.1 404\r\nConnection: x\r\n\r\n", "GET", &how), head);
        assert_eq!(own(404, client_version, keep_alive, framing, ""), head);
    }
}

#[test]
fn a_length_without_a_body_is_passed_on_for_head_and_304_only() {
    let lines = "content-length: 12\r\n\r\n";
    for (method, status, passed) in
        [("HEAD", "200 OK", true), ("GET", "304 Not Modified", true), ("GET", "204 No Content", false)]
    {
        let written = client(&format!("HTTP/1.1 {status}\r\n{lines}"), method, &KEPT);
        assert_eq!(written, format!("HTTP/1.1 {status}\r\n{}", if passed { lines } else { "\r\n" }));
    }
    let stream = ClientHead { event_stream: true, ..KEPT };
    assert_eq!(
        client("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", "HEAD", &stream),
        "HTTP/1.1 200 OK\r\n\r\n"
    );
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(client(chunked, "HEAD", &KEPT), "HTTP/1.1 200 OK\r\n\r\n");
}

#[test]
fn our_own_heads_are_legal_for_every_status() {
    assert_eq!(
        own(
            503,
            Version::Http11,
            false,
            Framing::Length(20),
            "Retry-After: 1\r\nContent-Type: application/json\r\n"
        ),
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\n\
         Content-Length: 20\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(own(100, Version::Http11, true, Framing::None, ""), "HTTP/1.1 100 Continue\r\n\r\n");
    for status in 100..600 {
        assert!(!reason_phrase(status).is_empty());
        let head = own(status, Version::Http11, true, Framing::Length(u64::MAX), "");
        let bodiless = status < 200 || status == 204 || status == 304;
        assert_eq!(head.contains("Content-Length: 18446744073709551615\r\n"), !bodiless, "{status}");
        let expected = if bodiless { Framing::None } else { Framing::Length(u64::MAX) };
        with_response(head.as_bytes(), "GET", |head| {
            assert_eq!((head.status, head.framing), (status, expected))
        })
        .unwrap();
    }
}

#[test]
#[should_panic(expected = "HTTP/1.0 has no chunks")]
fn chunks_to_an_http10_client_are_a_bug() {
    own(200, Version::Http10, false, Framing::Chunked, "");
}

#[test]
#[should_panic(expected = "must not inject lines")]
fn a_configured_authority_cannot_inject() {
    with_request(b"GET / HTTP/1.0\r\n\r\n", |head| {
        write_upstream_request(&mut Vec::new(), head, "a\r\nX: y", "", true)
    });
}

/// A legal head, or one damaged in a few bytes.
fn random_head(first_line: &str, random: &mut Random) -> Vec<u8> {
    const LINES: &[&str] = &[
        "Content-Length: 3\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Connection: close, X-Foo\r\n",
        "Connection: keep-alive\r\n",
        "X-Foo: bar\r\n",
        "Authorization: Bearer \u{e4} x\r\n",
        "Keep-Alive: timeout=3\r\n",
        "Te: trailers\r\n",
        "Upgrade: websocket\r\n",
        "Content-Type: text/event-stream\r\n",
        "Accept-Encoding: gzip, br\r\n",
        "Via: 1.1 a\r\n",
        "X-Empty:\r\n",
        "Trailer: X-Foo\r\n",
        "Host_: a\r\n",
    ];
    let mut input = first_line.as_bytes().to_vec();
    for _ in 0..random.below(6) {
        input.extend_from_slice(random.pick(LINES).as_bytes());
    }
    input.extend_from_slice(b"\r\n");
    if random.below(2) == 0 {
        mutate(&mut input, random);
    }
    input
}

const HOP_BY_HOP: &[&str] = &[
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

/// What a plain reading of the rules forwards.
fn forwarded(headers: &[httparse::Header], more: &[&str]) -> Vec<(String, Vec<u8>)> {
    let mut dropped: Vec<String> = HOP_BY_HOP.iter().chain(more).map(|name| name.to_string()).collect();
    for header in headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection")) {
        let options = String::from_utf8_lossy(header.value).to_lowercase();
        dropped.extend(options.split(',').map(|option| option.trim_matches([' ', '\t']).to_owned()));
    }
    let kept = |header: &&httparse::Header| {
        let name = header.name.to_lowercase();
        !dropped.contains(&name)
            && !dropped[..HOP_BY_HOP.len() + more.len()].contains(&name.replace('_', "-"))
    };
    headers.iter().filter(kept).map(|header| (header.name.to_owned(), header.value.to_vec())).collect()
}

fn pairs(headers: &[httparse::Header]) -> Vec<(String, Vec<u8>)> {
    headers.iter().map(|header| (header.name.to_owned(), header.value.to_vec())).collect()
}

fn pair(name: &str, value: &str) -> (String, Vec<u8>) {
    (name.to_owned(), value.as_bytes().to_vec())
}

/// So no byte of a request can add a field, end the head early, or change the framing.
#[test]
fn whatever_request_is_accepted_reaches_the_backend_as_exactly_its_fields() {
    let mut accepted = 0;
    for seed in 0..10_000 {
        let mut random = Random(seed);
        let input = random_head("POST /v1/x?y=%0d%0a HTTP/1.1\r\nHost: front\r\n", &mut random);
        let checked = with_request(&input, |head| {
            let mut out = Vec::new();
            write_upstream_request(&mut out, head, "backend", "/b", true);
            let mut expected = vec![pair("Host", "backend")];
            expected.extend(forwarded(head.headers, &["host", "expect", "accept-encoding"]));
            expected.push(pair("Accept-Encoding", "identity"));
            match head.framing {
                Framing::Length(length) => expected.push(pair("Content-Length", &length.to_string())),
                Framing::Chunked => expected.push(pair("Transfer-Encoding", "chunked")),
                _ => {}
            }
            expected.push(pair(
                "Via",
                if head.version == Version::Http11 { "1.1 tokenring" } else { "1.0 tokenring" },
            ));
            with_request(&out, |written| {
                assert_eq!(pairs(written.headers), expected, "seed {seed}");
                assert_eq!(written.head_bytes, out.len(), "seed {seed}");
                assert_eq!((written.method, written.framing), (head.method, head.framing), "seed {seed}");
                assert_eq!(written.target.strip_prefix("/b"), Some(head.target), "seed {seed}");
                assert!(written.keep_alive && !written.expect_continue, "seed {seed}");
            })
            .unwrap_or_else(|| panic!("seed {seed}: what we write must be legal"));
        });
        accepted += u32::from(checked.is_some());
    }
    assert!(accepted > 2_000, "too few to mean something: {accepted}");
}

#[test]
fn whatever_response_is_accepted_reaches_the_client_as_exactly_its_fields() {
    let mut accepted = 0;
    for seed in 0..10_000 {
        let mut random = Random(seed);
        let input = random_head("HTTP/1.1 200 All right\r\n", &mut random);
        let event_stream = random.below(2) == 0;
        let checked = with_response(&input, "GET", |head| {
            let mut out = Vec::new();
            let how = ClientHead { framing: head.framing, event_stream, extra: "X-Extra: e\r\n", ..KEPT };
            write_client_response(&mut out, head, &how);
            let ours: &[&str] =
                if event_stream { &["content-type", "cache-control", "x-accel-buffering"] } else { &[] };
            let mut expected = forwarded(head.headers, ours);
            expected.push(pair("X-Extra", "e"));
            match head.framing {
                Framing::Length(length) => expected.push(pair("Content-Length", &length.to_string())),
                Framing::Chunked => expected.push(pair("Transfer-Encoding", "chunked")),
                Framing::UntilClose => expected.push(pair("Connection", "close")),
                Framing::None => {}
            }
            with_response(&out, "GET", |written| {
                assert_eq!(pairs(written.headers), expected, "seed {seed}");
                assert_eq!(written.head_bytes, out.len(), "seed {seed}");
                assert_eq!((written.status, written.framing), (head.status, head.framing), "seed {seed}");
            })
            .unwrap_or_else(|| panic!("seed {seed}: what we write must be legal"));
        });
        accepted += u32::from(checked.is_some());
    }
    assert!(accepted > 2_000, "too few to mean something: {accepted}");
}
