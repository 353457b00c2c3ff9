//! How streams end when the backend fails: an in-band error in the dialect, no end mark, a closed connection, one reason
//! counted. A truncated stream never looks finished.

use crate::backend::{Backend, BlackHole, nowhere};
use crate::events::streaming;
use crate::message::{chunk, get};
use crate::peer::Peer;
use crate::server::{Server, chat, stream_request};
use crate::sse::{DONE, Dialect, LAST_CHUNK, STREAM, STREAM_UNTIL_CLOSE, dialects, named, token};
use serde_json::json;

/// The stream ends here with this error in the dialect's form, and the connection with it.
#[track_caller]
pub(crate) fn expect_error(client: &mut Peer, dialect: &Dialect, code: &str) {
    let event = client.event();
    assert_eq!(event.error_code(), code, "{event:?}");
    assert_eq!(event.name(), dialect.error_name, "{event:?}");
    assert_eq!(event.id(), None, "an error is none of the backend's events");
    let body = event.json();
    match dialect.path {
        "/v1/messages" => assert_eq!(body["type"], "error"),
        "/v1/responses" => {
            assert_eq!((&body["type"], &body["code"]), (&json!("error"), &json!(code)));
            assert!(body["sequence_number"].is_u64(), "{body}");
        }
        _ => assert!(body.get("type").is_none(), "{body}"),
    }
    client.stream_end();
    client.closed();
}

/// What a backend does to a stream after one token and half of another, and the reason that is counted.
const CUTS: [(&str, &str); 4] = [
    ("fin", "upstream_truncated"),
    ("reset", "upstream_reset"),
    ("last chunk", "upstream_truncated"),
    ("malformed chunk", "upstream_malformed"),
];

#[test]
fn a_broken_stream_ends_with_an_error_in_every_dialect() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for dialect in dialects() {
        for (cut, code) in CUTS {
            let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
            upstream.send(chunk(&dialect.token));
            assert_eq!(client.event().payload(), dialect.token.as_bytes());
            upstream.send(chunk(&dialect.token[..dialect.token.len() - 1]));
            match cut {
                "fin" => drop(upstream),
                "reset" => upstream.reset(),
                "last chunk" if dialect.done.is_none() => {
                    // Without an end mark, the body's own end is the stream's; the partial event is dropped.
                    upstream.send(LAST_CHUNK);
                    client.stream_end();
                    continue;
                }
                "last chunk" => upstream.send(LAST_CHUNK),
                _ => upstream.send("-5\r\nhello\r\n"),
            }
            expect_error(&mut client, &dialect, code);
        }
    }
    server.expect_ends(&[
        ("done", 1),
        ("upstream_malformed", 5),
        ("upstream_reset", 5),
        ("upstream_truncated", 9),
    ]);
}

#[test]
fn a_responses_error_carries_the_next_sequence_number() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &stream_request("/v1/responses"));
    upstream.send(chunk(named("response.output_text.delta", json!({"sequence_number": 41, "delta": "a"}))));
    client.event();
    upstream.reset();
    assert_eq!(client.event().json()["sequence_number"], 42);
}

#[test]
fn a_stream_until_close_that_is_cut_inside_an_event_is_truncated() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for dialect in dialects() {
        let mut client = server.connect();
        client.send(stream_request(dialect.path));
        let (mut upstream, _) = backend.request();
        upstream.send(STREAM_UNTIL_CLOSE);
        upstream.send([&dialect.token, "data: {\"half"].concat());
        client.stream_head();
        assert_eq!(client.event().payload(), dialect.token.as_bytes());
        drop(upstream);
        expect_error(&mut client, &dialect, "upstream_truncated");
    }
    server.expect_ends(&[("upstream_truncated", 5)]);
}

#[test]
fn an_http_1_0_client_is_told_of_a_broken_stream_too() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: 15\r\n\r\n{\"stream\":true}");
    let (mut upstream, _) = backend.request();
    upstream.send([STREAM, &chunk(token("a"))].concat());
    client.stream_head();
    client.event();
    upstream.reset();
    assert_eq!(client.event().error_code(), "upstream_reset");
    client.stream_end();
}

#[test]
fn an_end_mark_without_a_last_chunk_is_a_clean_end_that_is_counted() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut ended = 0;
    for dialect in dialects() {
        let Some(done) = &dialect.done else { continue };
        for reset in [false, true] {
            let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
            upstream.send(chunk([&dialect.token, done.as_str()].concat()));
            assert_eq!(client.event().payload(), dialect.token.as_bytes());
            assert_eq!(client.event().payload(), done.as_bytes());
            if reset {
                upstream.reset();
            } else {
                drop(upstream);
            }
            client.stream_end();
            ended += 1;
            // The client's connection is as good as before; the backend's is not used again.
            client.send(get("/next"));
            let (mut upstream, _) = backend.request();
            upstream.send(crate::message::answer("200 OK", "Connection: close\r\n", "fine"));
            assert_eq!(client.response().text(), "fine");
        }
    }
    server.expect_count("tokenring_upstream_unclean_ends_total", ended);
    server.expect_ends(&[("done", 2 * ended)]);
}

#[test]
fn a_backend_that_does_not_end_its_body_after_the_end_mark_is_let_go() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--finish-ms", "150"]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send(chunk([&token("a"), DONE].concat()));
    assert_eq!(client.events().len(), 2);
    upstream.closed();
    server.expect_ends(&[("done", 1)]);
    server.expect_count("tokenring_upstream_unclean_ends_total", 1);
}

#[test]
fn all_end_marks_of_responses_end_it() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for name in ["response.completed", "response.failed", "response.incomplete"] {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request("/v1/responses"));
        upstream.send([chunk(named(name, json!({"sequence_number": 9}))), LAST_CHUNK.to_vec()].concat());
        assert_eq!(client.events().len(), 1);
        drop(upstream);
    }
    server.expect_ends(&[("done", 3)]);
}

#[test]
fn an_error_that_the_backend_tells_in_its_stream_is_passed_on_once() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for (path, error) in [
        (
            "/v1/chat/completions",
            "data: {\"error\":{\"message\":\"CUDA out of memory\",\"code\":500}}\n\n".to_owned(),
        ),
        ("/v1/responses", named("error", json!({"sequence_number": 1, "message": "m"}))),
        ("/v1/messages", named("error", json!({"error": {"type": "overloaded_error", "message": "m"}}))),
    ] {
        for clean in [true, false] {
            let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(path));
            upstream.send(chunk(&error));
            assert_eq!(client.event().payload(), error.as_bytes());
            if clean {
                upstream.send(LAST_CHUNK);
            } else {
                upstream.reset();
            }
            client.stream_end();
        }
    }
    server.expect_ends(&[("upstream_error", 6)]);
}

#[test]
fn a_backend_that_fails_before_its_head_is_a_bad_gateway() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for request in [chat(), get("/plain"), stream_request("/v1/messages")] {
        for (said, reset, code) in [
            ("", false, "upstream_truncated"),
            ("", true, "upstream_reset"),
            ("HTTP/1.1 200 OK\r\nContent-Ty", false, "upstream_truncated"),
            ("HTTP/1.1 200 OK\r\nContent-Ty", true, "upstream_reset"),
            ("HTTP/1.1 100 Continue\r\n\r\n", false, "upstream_truncated"),
        ] {
            let mut client = server.connect();
            client.send(&request);
            let (mut upstream, _) = backend.request();
            upstream.send(said);
            if reset {
                // Let what was said arrive first: RST may overtake it.
                std::thread::sleep(std::time::Duration::from_millis(5));
                upstream.reset();
            } else {
                drop(upstream);
            }
            let response = client.response();
            assert_eq!((response.status(), response.error_code().as_str()), (502, code), "{said:?}");
            // Nothing is wrong with the client.
            client.send(get("/again"));
            backend.request().0.send(crate::message::answer("200 OK", "Connection: close\r\n", "again"));
            assert_eq!(client.response().text(), "again");
        }
    }
    server.expect_ends(&[("done", 15), ("upstream_reset", 6), ("upstream_truncated", 9)]);
}

#[test]
fn a_backend_that_refuses_connections_is_a_bad_gateway() {
    let server = Server::start(&[nowhere()], &[]);
    let mut client = server.connect();
    for request in [chat(), get("/plain"), stream_request("/v1/messages")] {
        client.send(&request);
        let response = client.response();
        assert_eq!((response.status(), response.error_code().as_str()), (502, "upstream_refused"));
    }
    server.expect_ends(&[("upstream_refused", 3)]);
}

#[test]
fn a_backend_whose_name_is_unknown_is_unavailable() {
    let server = Server::start_until("/live", &[], &["--upstream", "http://no-such-host.invalid:80"]);
    let mut client = server.connect();
    for request in [get("/plain"), chat()] {
        client.send(request);
        let response = client.response();
        assert_eq!((response.status(), response.error_code().as_str()), (503, "no_upstream"));
        assert!(response.field("retry-after").is_some());
    }
    server.expect_ends(&[("no_upstream", 2)]);
}

#[test]
fn a_backend_that_refuses_is_passed_over_for_another() {
    let backend = Backend::listen();
    let server = Server::start(&[nowhere(), backend.address, nowhere()], &[]);
    let mut client = server.connect();
    for _ in 0..6 {
        client.send(chat());
        let (mut upstream, request) = backend.request();
        assert_eq!(request.field("host"), Some(backend.address.to_string()));
        assert_eq!(request.text(), r#"{"model":"m","stream":true}"#);
        upstream.send(crate::message::answer("200 OK", "Connection: close\r\n", "ok"));
        assert_eq!(client.response().text(), "ok");
    }
    server.expect_ends(&[("done", 6)]);
}

#[test]
fn a_backend_that_does_not_accept_is_a_gateway_timeout() {
    let hole = BlackHole::open();
    let server = Server::start(&[hole.address], &["--connect-ms", "300"]);
    for request in [chat(), get("/plain"), stream_request("/v1/messages")] {
        let mut client = server.connect();
        client.send(&request);
        let response = client.response();
        assert_eq!((response.status(), response.error_code().as_str()), (504, "connect_timeout"));
    }
    server.expect_ends(&[("connect_timeout", 3)]);
}

#[test]
fn an_answer_that_nobody_asked_for_closes_its_connection() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(get("/1"));
    let (mut upstream, _) = backend.request();
    upstream.send([crate::message::ok("one"), crate::message::ok("poison")].concat());
    assert_eq!(client.response().text(), "one");
    client.send(get("/2"));
    let (mut fresh, _) = backend.request();
    fresh.send(crate::message::ok("two"));
    assert_eq!(client.response().text(), "two");
    upstream.closed();
    server.expect_count("tokenring_upstream_surplus_total", 1);
}
