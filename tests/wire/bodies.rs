//! Ordinary bodies, both ways, in every framing: whole when they are, visibly cut when they are not.

use crate::backend::Backend;
use crate::message::{answer, chunk, get, ok, post};
use crate::peer::{Closed, Peer};
use crate::server::Server;
use std::io::ErrorKind;

#[test]
fn answers_in_every_framing_arrive_whole_and_keep_the_client() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    for framing in ["length", "chunked", "until close", "1.0"] {
        client.send(get("/body"));
        let (mut upstream, _) = backend.request();
        match framing {
            "length" => {
                upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nabcdef")
            }
            "chunked" => {
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
                upstream.send_bytewise(
                    format!("{head}4;ext=1\r\nabcd\r\n2\r\nef\r\n0\r\nX-T: t\r\n\r\n").as_bytes(),
                );
            }
            "until close" => upstream.send("HTTP/1.1 200 OK\r\n\r\nabcdef"),
            _ => upstream.send("HTTP/1.0 200 OK\r\nX: y\r\n\r\nabcdef"),
        }
        drop(upstream);
        let response = client.response();
        assert_eq!(response.text(), "abcdef", "{framing}");
        assert_eq!(response.field("connection"), None, "{framing}");
    }
    server.expect_ends(&[("done", 4)]);
}

#[test]
fn request_bodies_in_every_framing_arrive_whole() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(post("/1", "by length"));
    let (mut upstream, request) = backend.request();
    assert_eq!(request.text(), "by length");
    assert_eq!(request.field("content-length").as_deref(), Some("9"));
    upstream.send(ok(""));
    client.response();
    client.send("POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send_bytewise(b"3\r\nin \r\n6;x=\"y\"\r\nchunks\r\n0\r\nX-Trailer: dropped\r\n\r\n");
    let request = upstream.request();
    assert_eq!(request.text(), "in chunks");
    assert_eq!(request.field("transfer-encoding").as_deref(), Some("chunked"));
    upstream.send(ok(""));
    client.response();
    client.send("PUT /3 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(upstream.request().text(), "");
    upstream.send(ok(""));
    assert_eq!(client.response().status(), 200);
}

#[test]
fn a_request_body_is_streamed_not_held() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nfirst");
    let mut upstream = backend.accept();
    upstream.head();
    assert_eq!(upstream.exactly(5), b"first", "before the rest was sent");
    client.send("again");
    assert_eq!(upstream.exactly(5), b"again");
    // An answer may begin before the request is whole.
    upstream.send(ok("done"));
    assert_eq!(client.response().text(), "done");
}

#[test]
fn a_large_upload_and_a_large_download_arrive_byte_for_byte() {
    const BYTES: usize = 24 << 20;
    let pattern: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 251) as u8).collect();
    let expected = pattern.clone();
    let backend = Backend::listen().serve(|mut peer: Peer| {
        let request = peer.request();
        peer.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", request.body.len()));
        peer.send(&request.body);
    });
    let server = Server::start(&[backend], &[]);
    let mut client = server.connect();
    let mut writer = Peer::new(client.stream.try_clone().unwrap());
    let sender = std::thread::spawn(move || {
        writer.send(format!("POST /mirror HTTP/1.1\r\nHost: a\r\nContent-Length: {BYTES}\r\n\r\n"));
        writer.send(&pattern);
    });
    let response = client.response();
    sender.join().unwrap();
    assert!(response.body == expected, "{} bytes of {BYTES}", response.body.len());
    assert!(server.resident_kib() < 64 * 1024, "{} KiB", server.resident_kib());
}

#[test]
fn the_bytes_of_a_request_body_are_not_altered() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    let body = "{ \"stream\" : false,\n\t\"model\":\"\\u00e9\", \"x\": 1.0e+5, \"model\": \"twice\", \"é\": [ ] } trailing";
    client.send(post("/v1/chat/completions", body));
    let (mut upstream, request) = backend.request();
    assert_eq!(request.text(), body);
    upstream.send(ok("{}"));
    assert_eq!(client.response().text(), "{}");
    client.send(post("/v1/embeddings", "not json at all \u{1F980}"));
    assert_eq!(upstream.request().text(), "not json at all \u{1F980}");
}

#[test]
fn a_cut_ordinary_body_looks_cut() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for (said, by_reset) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this", true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n", false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n", true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nonly this", false),
        ("HTTP/1.1 200 OK\r\n\r\nonly this", true),
    ] {
        let mut client = server.connect();
        client.send(get("/cut"));
        let (mut upstream, _) = backend.request();
        upstream.send(said);
        // The client has what there is before the cut.
        let head = client.head();
        assert_eq!(head.status(), 200);
        if by_reset {
            if head.field("transfer-encoding").is_none() {
                assert_eq!(client.exactly(9), b"only this");
            } else {
                assert_eq!(client.exactly(14), b"9\r\nonly this\r\n");
            }
            upstream.reset();
        } else {
            drop(upstream);
        }
        let (rest, how) = client.rest();
        assert!(!rest.ends_with(b"0\r\n\r\n"), "a last chunk: {said:?}");
        let framed = head.field("transfer-encoding").is_some() || head.field("content-length").is_some();
        assert!(framed || how == Closed::Reset, "nothing tells this cut from the end: {said:?}");
    }
    server.expect_ends(&[("upstream_reset", 3), ("upstream_truncated", 3)]);
}

#[test]
fn a_cut_body_to_an_http_1_0_client_ends_in_a_reset() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("GET /cut HTTP/1.0\r\n\r\n");
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n");
    client.head();
    assert_eq!(client.exactly(9), b"only this");
    upstream.reset();
    assert_eq!(client.closed(), Closed::Reset);
}

#[test]
fn the_backends_own_errors_pass_unchanged() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    for (status, fields, body) in [
        (
            "429 Too Many Requests",
            "Retry-After: 7\r\nX-RateLimit-Remaining: 0\r\nContent-Type: application/json\r\n",
            "{\"error\":{\"message\":\"slow down\"}}",
        ),
        (
            "400 Bad Request",
            "Content-Type: application/json\r\n",
            "{\"error\":{\"message\":\"no such model\",\"code\":\"x\"}}",
        ),
        ("500 Internal Server Error", "Content-Type: text/html\r\n", "<h1>Oops</h1>"),
        ("503 Sleepy", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n", ""),
        ("200 OK", "Content-Type: application/json\r\n", "{\"choices\":[]}"),
    ] {
        for request in [crate::server::chat(), get("/v1/models")] {
            client.send(&request);
            let (mut upstream, _) = backend.request();
            upstream.send(answer(status, &format!("{fields}Connection: close\r\n"), body));
            let response = client.response();
            assert_eq!(response.first_line, format!("HTTP/1.1 {status}"));
            assert_eq!(response.text(), body);
            for line in fields.lines() {
                let (name, value) = crate::message::field(line);
                assert_eq!(response.field(&name), Some(value));
            }
        }
    }
    server.expect_ends(&[("done", 10)]);
}

#[test]
fn a_chunked_error_of_the_backend_passes_too() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(crate::server::chat());
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n");
    upstream.send([chunk("half of "), chunk("it"), b"0\r\n\r\n".to_vec()].concat());
    let response = client.response();
    assert_eq!((response.status(), response.text().as_str()), (502, "half of it"));
}

#[test]
fn an_early_answer_to_an_upload_reaches_the_client() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome of it");
    let mut upstream = backend.accept();
    upstream.head();
    upstream.send(answer("401 Unauthorized", "Connection: close\r\n", "who are you"));
    drop(upstream);
    let response = client.response();
    assert_eq!((response.status(), response.text().as_str()), (401, "who are you"));
    assert_eq!(response.field("connection").as_deref(), Some("close"), "the rest of the upload is unread");
    client.shut();
    client.closed();
}

#[test]
fn a_request_that_is_cut_never_looks_whole_to_the_backend() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for request in [
        "POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\npart",
        "POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
    ] {
        let mut client = server.connect();
        client.send(request);
        let mut upstream = backend.accept();
        client.shut();
        let error = upstream.try_request().expect_err("a cut request");
        assert!(matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{error}");
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn an_answer_split_at_any_byte_is_one_answer() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let said = b"HTTP/1.1 200 OK\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n4;e=1\r\nabcd\r\n2\r\nef\r\n0\r\nT: t\r\n\r\n";
    let (mut client, mut upstream) = (server.connect(), None);
    for at in 1..said.len() {
        client.send(get("/split"));
        let mut peer: Peer = upstream.take().unwrap_or_else(|| backend.accept());
        peer.request();
        peer.send_split(said, at);
        assert_eq!(client.response().text(), "abcdef", "split at {at}");
        upstream = Some(peer);
    }
    server.expect_ends(&[("done", said.len() as u64 - 1)]);
    assert_eq!(server.count("tokenring_upstream_connects_total"), 1);
}

#[test]
fn a_client_that_still_uploads_gets_the_early_answer_whole() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\nsome of it");
    let mut upstream = backend.accept();
    upstream.head();
    let body = "too much ".repeat(10_000);
    upstream.send(answer("413 Content Too Large", "Connection: close\r\n", &body));
    // It sends on, as clients do that do not listen while they send.
    client.send(vec![b'u'; 500_000]);
    let response = client.response();
    assert_eq!((response.status(), response.text().as_str()), (413, body.as_str()));
}

#[test]
fn a_head_of_the_backend_beyond_the_limits_is_malformed() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for head in [
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(40_000)),
        format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(200)),
        format!("HTTP/1.1 200 {}", "OK ".repeat(20_000)),
    ] {
        let mut client = server.connect();
        client.send(get("/"));
        let (mut upstream, _) = backend.request();
        // The proxy may hang up before it has heard it all.
        if upstream.try_send(head.as_bytes()).is_err() {
            eprintln!("hung up early");
        }
        assert_eq!(client.response().error_code(), "upstream_malformed");
    }
}

#[test]
fn encodings_are_the_clients_business_except_for_models() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for (path, expected) in [("/plain", "gzip, br"), ("/v1/chat/completions", "identity")] {
        let mut client = server.connect();
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip, br\r\n\r\n"));
        let (mut upstream, request) = backend.request();
        assert_eq!(request.field("accept-encoding").as_deref(), Some(expected));
        upstream.send(answer(
            "200 OK",
            "Content-Encoding: gzip\r\nConnection: close\r\n",
            "\u{1}\u{2}zipped",
        ));
        let response = client.response();
        assert_eq!(response.field("content-encoding").as_deref(), Some("gzip"));
        assert_eq!(response.text(), "\u{1}\u{2}zipped");
    }
}
