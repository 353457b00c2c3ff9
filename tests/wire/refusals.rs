//! What is refused, with which status, and that the backend never hears of it.

use crate::backend::Backend;
use crate::message::{Message, get, ok, post};
use crate::peer::Closed;
use crate::server::Server;
use std::time::Duration;

/// Sends each request on a connection of its own, and expects its refusal, a close, and a backend that knows nothing.
#[track_caller]
fn all_refused(flags: &[&str], table: &[(&str, u16, &str)]) {
    let backend = Backend::listen();
    let server = Server::before(&backend, flags);
    for &(request, status, code) in table {
        let shown = &request[..request.len().min(100)];
        let mut client = server.connect();
        client.send(request);
        let response = client.response();
        assert_eq!((response.status(), response.error_code().as_str()), (status, code), "{shown:?}");
        assert_eq!(response.field("connection").as_deref(), Some("close"), "{shown:?}");
        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.ends_with('.'), "a sentence: {message}");
        assert_eq!(client.closed(), Closed::Fin, "{shown:?}");
    }
    backend.was_left_alone();
    server.expect_ends(&[("refused", table.len() as u64)]);
    server.expect_count("tokenring_refusals_total", table.len() as u64);
}

#[test]
fn what_two_parsers_could_read_differently() {
    all_refused(
        &[],
        &[
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
                "conflicting_lengths",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
                400,
                "conflicting_lengths",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
                400,
                "repeated_length",
            ),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\nx", 400, "repeated_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx", 400, "bad_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\nx", 400, "bad_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\nx", 400, "bad_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 1\r\n\r\nx", 400, "bad_length"),
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\nx", 400, "bad_length"),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\nx",
                400,
                "bad_length",
            ),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 1\nY: 2\r\n\r\n", 400, "bare_lf"),
            ("GET / HTTP/1.1\nHost: a\n\n", 400, "bare_lf"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 1\rY: 2\r\n\r\n", 400, "bare_cr"),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "space_before_colon"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX\t: a\r\n\r\n", 400, "space_before_colon"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n folded\r\n\r\n", 400, "obs_fold"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n\tfolded\r\n\r\n", 400, "obs_fold"),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400, "leading_whitespace"),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400, "bad_header_value"),
            ("GET / HTTP/1.1\r\nHost: a\r\n: no name\r\n\r\n", 400, "bad_header_name"),
            ("GET / HTTP/1.1\r\nHost: a\r\nnocolon\r\n\r\n", 400, "bad_header_name"),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_request_line"),
            ("GET /\r\n\r\n", 400, "bad_request_line"),
            ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_request_line"),
            ("GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
            ("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
            ("\r\n\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "empty_lines"),
        ],
    );
}

#[test]
fn host_rules() {
    all_refused(
        &[],
        &[
            ("GET / HTTP/1.1\r\n\r\n", 400, "missing_host"),
            ("GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400, "repeated_host"),
            ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400, "bad_host"),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "bad_host"),
            ("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", 400, "bad_host"),
            ("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400, "bad_host"),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400, "bad_host"),
            ("GET http://a/ HTTP/1.1\r\n\r\n", 400, "missing_host"),
        ],
    );
}

#[test]
fn transfer_codings() {
    all_refused(
        &[],
        &[
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
                501,
                "unknown_transfer_coding",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
                501,
                "unknown_transfer_coding",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
                501,
                "unknown_transfer_coding",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
                400,
                "chunked_not_last",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
                400,
                "chunked_twice",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
                "chunked_twice",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
                400,
                "bad_transfer_coding",
            ),
            (
                "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
                "transfer_coding_in_http10",
            ),
        ],
    );
}

#[test]
fn methods_versions_expectations() {
    all_refused(
        &[],
        &[
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, "unsupported_version"),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505, "unsupported_version"),
            ("GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505, "unsupported_version"),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "unsupported_version"),
            ("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501, "connect_unsupported"),
            (
                "AMETHODLONGERTHANANYONEHASEVERSEENANYWHERE / HTTP/1.1\r\nHost: a\r\n\r\n",
                501,
                "method_too_long",
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\nx",
                417,
                "expectation_unknown",
            ),
            ("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n", 411, "length_required"),
            ("GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421, "misdirected"),
        ],
    );
}

#[test]
fn a_method_that_is_not_allowed_leaves_the_connection_open() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (405, "method_not_allowed"));
    backend.was_left_alone();
    client.send(get("/"));
    backend.request().0.send(ok("fine"));
    assert_eq!(client.response().text(), "fine");
}

#[test]
fn limits_of_heads() {
    let target = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "t".repeat(300));
    let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(2000));
    let endless = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(2000));
    let count = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: 1\r\n".repeat(20));
    let tokens = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: {}\r\n\r\n", "x, ".repeat(40));
    all_refused(
        &["--head-bytes-max", "1024", "--headers-max", "16", "--target-bytes-max", "256"],
        &[
            (&target, 414, "target_too_long"),
            (&bytes, 431, "head_too_large"),
            (&endless, 431, "head_too_large"),
            (&count, 431, "too_many_headers"),
            (&tokens, 400, "too_many_connection_tokens"),
        ],
    );
}

/// Bodies are streamed, so the backend may know of such a request; but never that it was whole.
#[track_caller]
fn body_refused(flags: &[&str], table: &[(String, u16, &str)]) {
    let backend = Backend::listen();
    let server = Server::before(&backend, flags);
    for (body, status, code) in table {
        let shown = &body[..body.len().min(60)];
        let mut client = server.connect();
        client.send(format!("POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}"));
        let response = client.response();
        assert_eq!((response.status(), response.error_code().as_str()), (*status, *code), "{shown:?}");
        assert_eq!(response.field("connection").as_deref(), Some("close"));
        client.closed();
        if let Some(mut upstream) = backend.try_accept(Duration::from_millis(50)) {
            let (heard, _) = upstream.rest();
            assert!(!heard.ends_with(b"0\r\n\r\n"), "the backend got a whole request: {shown:?}");
        }
    }
    server.expect_ends(&[("refused", table.len() as u64)]);
}

#[test]
fn chunked_bodies_are_read_strictly() {
    body_refused(
        &[],
        &[
            ("10000000000000000\r\n".into(), 400, "chunk_size_overflow"),
            ("-1\r\nx\r\n".into(), 400, "bad_chunk_size"),
            ("0x1\r\nx\r\n".into(), 400, "bad_chunk_size"),
            (" 1\r\nx\r\n".into(), 400, "bad_chunk_size"),
            ("1 \r\nx\r\n".into(), 400, "bad_chunk_size"),
            ("\r\nx\r\n".into(), 400, "bad_chunk_size"),
            ("1\nx\r\n".into(), 400, "bare_lf"),
            ("1\rx\r\n".into(), 400, "bare_cr"),
            ("1\r\nxy\r\n".into(), 400, "bad_chunk_end"),
            ("1;a=\0\r\nx\r\n".into(), 400, "bad_chunk_extension"),
            (format!("1;{}", "e".repeat(5000)), 400, "chunk_line_too_long"),
            (format!("1;{}\r\nx\r\n", "e".repeat(200)).repeat(2000), 400, "chunk_excess"),
            (format!("0\r\nX: {}\r\n\r\n", "t".repeat(20_000)), 431, "trailers_too_large"),
            ("0\r\nno colon\r\n\r\n".into(), 400, "bad_trailer"),
            ("0\r\nX : y\r\n\r\n".into(), 400, "bad_trailer"),
        ],
    );
}

#[test]
fn bodies_beyond_the_limit() {
    body_refused(
        &["--body-bytes-max", "1000"],
        &[
            (format!("3E9\r\n{}\r\n0\r\n\r\n", "b".repeat(1001)), 413, "body_too_large"),
            ("100\r\n".to_owned() + &"b".repeat(256) + "\r\nFFFFFFFF\r\n", 413, "body_too_large"),
        ],
    );
    let declared = post("/b", &"b".repeat(1001));
    all_refused(
        &["--body-bytes-max", "1000"],
        &[(std::str::from_utf8(&declared).unwrap(), 413, "body_too_large")],
    );
}

/// The error bodies of OpenAI and Anthropic.
fn assert_shape(response: &Message, anthropic: bool) {
    let body = response.json();
    assert!(body["error"]["type"].is_string() && body["error"]["message"].is_string(), "{body}");
    if anthropic {
        assert_eq!(body["type"], "error", "{body}");
    } else {
        assert!(body.get("type").is_none() && body["error"].get("param").is_some(), "{body}");
    }
}

#[test]
fn errors_have_the_shape_of_the_paths_api() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--head-ms", "200"]);
    for (path, anthropic) in [
        ("/v1/messages", true),
        ("/v1/messages?beta=true", true),
        ("/anthropic/v1/messages", true),
        ("/v1/chat/completions", false),
        ("/v1/completions", false),
        ("/v1/responses", false),
        ("/anything", false),
    ] {
        for (request, status) in [
            // Found by the head alone, in its fields, in the body, by the backend's absence.
            (format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n"), 413),
            (format!("POST {path} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), 400),
            (format!("POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx"), 400),
            (format!("POST {path} HTTP/1.1\r\nHost: a\r\nX:"), 408),
        ] {
            let mut client = server.connect();
            client.send(&request);
            let response = client.response();
            assert_eq!(response.status(), status, "{request:?}");
            assert_shape(&response, anthropic);
        }
    }
}
