//! Heartbeats and early commits: signs of life in the dialect's own form, between events only, that extend no deadline.

use crate::backend::Backend;
use crate::ends::expect_error;
use crate::events::streaming;
use crate::message::{answer, chunk, get, ok};
use crate::server::{Server, chat, stream_request};
use crate::sse::{LAST_CHUNK, STREAM, dialects, token};
use std::time::{Duration, Instant};

#[test]
fn a_silent_stream_gets_heartbeats_in_its_dialects_form() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "100"]);
    for dialect in dialects() {
        let start = Instant::now();
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        for _ in 0..3 {
            assert_eq!(client.event().text(), dialect.heartbeat, "{}", dialect.path);
        }
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
        upstream.send(chunk(&dialect.token));
        assert_eq!(client.event().payload(), dialect.token.as_bytes());
        for line in dialect.heartbeat_among_ids.lines().chain(dialect.heartbeat_among_ids.lines()) {
            assert_eq!(client.line(), line, "{}", dialect.path);
        }
        if let Some(done) = &dialect.done {
            upstream.send(chunk(done));
        }
        upstream.send(LAST_CHUNK);
        let events = client.events();
        assert_eq!(
            events.iter().filter(|event| event.id().is_some()).count(),
            usize::from(dialect.done.is_some())
        );
    }
    server.expect_ends(&[("done", 5)]);
    server.expect_count("tokenring_heartbeats_total", 25);
}

#[test]
fn no_heartbeat_stands_inside_an_event() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "50"]);
    for dialect in dialects() {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        let (first, second) = dialect.token.split_at(dialect.token.len() / 2);
        upstream.send(chunk(first));
        // Heartbeats come while the event is half here, and are events of their own.
        assert_eq!(client.event().text(), dialect.heartbeat);
        assert_eq!(client.event().text(), dialect.heartbeat);
        upstream.send(chunk(second));
        loop {
            let event = client.event();
            if event.id().is_some() {
                assert_eq!(event.payload(), dialect.token.as_bytes());
                break;
            }
            assert_eq!(event.text(), dialect.heartbeat);
        }
    }
}

#[test]
fn a_talking_stream_gets_no_heartbeats() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "2000"]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    for _ in 0..25 {
        upstream.send(chunk(token("a")));
        assert_eq!(client.event().payload(), token("a").as_bytes());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(server.count("tokenring_heartbeats_total"), 0);
}

#[test]
fn heartbeats_can_be_off() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "0", "--commit-ms", "0"]);
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    client.silence(Duration::from_millis(200));
    upstream.send(STREAM);
    client.stream_head();
    client.silence(Duration::from_millis(200));
}

#[test]
fn heartbeats_do_not_extend_the_models_deadlines() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "50", "--between-tokens-ms", "400"]);
    for dialect in dialects() {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        upstream.send(chunk(&dialect.token));
        client.event();
        let event = loop {
            // The backend's own heartbeats do not either.
            if upstream.try_send(&chunk(": ping\n\n")).is_err() {
                break client.event();
            }
            let event = client.event();
            if event.data().contains("error") {
                break event;
            }
            assert_eq!(event.id(), None);
            assert!(event.data().is_empty() || event.name() == Some("ping"), "{event:?}");
        };
        assert_eq!(event.error_code(), "between_tokens_timeout");
        client.stream_end();
    }
    server.expect_ends(&[("between_tokens_timeout", 5)]);
}

#[test]
fn a_long_prefill_is_committed_and_kept_alive() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--commit-ms", "100", "--heartbeat-ms", "100"]);
    for dialect in dialects().iter().filter(|dialect| dialect.done.is_some()) {
        let mut client = server.connect();
        client.send(stream_request(dialect.path));
        let start = Instant::now();
        let (mut upstream, _) = backend.request();
        let head = client.stream_head();
        assert!(start.elapsed() >= Duration::from_millis(95));
        assert_eq!(head.field("content-type").as_deref(), Some("text/event-stream; charset=utf-8"));
        assert_eq!(head.field("cache-control").as_deref(), Some("no-cache, no-transform"));
        assert_eq!(client.event().text(), dialect.heartbeat);
        assert_eq!(client.event().text(), dialect.heartbeat);
        // Then the backend answers as if nothing had been said.
        let done = dialect.done.as_ref().unwrap();
        upstream.send([STREAM, &chunk([&dialect.token, done.as_str()].concat()), LAST_CHUNK].concat());
        let events: Vec<_> = client.events().into_iter().filter(|event| event.id().is_some()).collect();
        assert_eq!(events.len(), 2, "{events:?}");
        assert_eq!(events[0].payload(), dialect.token.as_bytes());
    }
    server.expect_ends(&[("done", 4)]);
    server.expect_count("tokenring_early_commits_total", 4);
}

#[test]
fn after_an_early_commit_every_failure_is_told_in_band() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--commit-ms", "50"]);
    for dialect in dialects().iter().filter(|dialect| dialect.done.is_some()) {
        for (failure, code) in [
            ("500", "upstream_status"),
            ("429", "upstream_status"),
            ("json", "upstream_status"),
            ("reset", "upstream_reset"),
            ("fin", "upstream_truncated"),
            ("garbage", "upstream_malformed"),
        ] {
            let mut client = server.connect();
            client.send(stream_request(dialect.path));
            let (mut upstream, _) = backend.request();
            client.stream_head();
            assert_eq!(client.event().text(), dialect.heartbeat);
            match failure {
                "500" => upstream.send(answer("500 Internal Server Error", "", "oops")),
                "429" => upstream.send(answer("429 Too Many Requests", "Retry-After: 1\r\n", "{}")),
                "json" => upstream.send(answer("200 OK", "Content-Type: application/json\r\n", "{}")),
                "reset" => upstream.reset(),
                "fin" => drop(upstream),
                _ => upstream.send("what?\r\n\r\n"),
            }
            expect_error(&mut client, dialect, code);
        }
    }
    server.expect_ends(&[
        ("upstream_malformed", 4),
        ("upstream_reset", 4),
        ("upstream_status", 12),
        ("upstream_truncated", 4),
    ]);
}

#[test]
fn only_streaming_requests_to_models_are_committed_early() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--commit-ms", "50"]);
    for request in [
        get("/v1/models"),
        crate::message::post("/v1/chat/completions", r#"{"model":"m"}"#),
        crate::message::post("/v1/chat/completions", r#"{"model":"m","stream":false}"#),
        crate::message::post("/v1/embeddings", r#"{"stream":true}"#),
    ] {
        let mut client = server.connect();
        client.send(&request);
        let (mut upstream, _) = backend.request();
        client.silence(Duration::from_millis(200));
        upstream.send(ok("{}"));
        assert_eq!(client.response().text(), "{}");
    }
    server.expect_ends(&[("done", 4)]);
}

#[test]
fn a_stuck_reader_is_sent_no_heartbeats() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--heartbeat-ms", "20", "--on-leave", "cancel"]);
    let client = server.connect();
    client.receive_little();
    let mut client = client;
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send(STREAM);
    let piece = chunk(token(&"x".repeat(1000)));
    upstream.send_until_stuck(&piece, Duration::from_millis(200), 32 << 20);
    let before = server.count("tokenring_heartbeats_total");
    std::thread::sleep(Duration::from_millis(300));
    assert!(server.count("tokenring_heartbeats_total") <= before + 1);
    drop(client);
    server.expect_ends(&[("client_left", 1)]);
    upstream.time_to_close();
}

#[test]
fn after_an_early_commit_the_backends_own_error_is_told_in_its_words() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--commit-ms", "50"]);
    let body = r#"{"error":{"message":"prompt too long","type":"invalid_request_error","code":"own"}}"#;
    for dialect in dialects().iter().filter(|dialect| dialect.done.is_some()) {
        let mut client = server.connect();
        client.send(stream_request(dialect.path));
        let (mut upstream, _) = backend.request();
        client.stream_head();
        assert_eq!(client.event().text(), dialect.heartbeat);
        upstream.send(answer("400 Bad Request", "Content-Type: application/json\r\n", body));
        let event = client.event();
        assert_eq!((event.error_code().as_str(), event.name()), ("own", dialect.error_name));
        client.stream_end();
        client.closed();
    }
    server.expect_ends(&[("upstream_status", 4)]);
}
