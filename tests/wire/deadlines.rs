//! Each deadline by itself: what the client is told, when, and the reason that is counted.

use crate::backend::Backend;
use crate::ends::expect_error;
use crate::events::streaming;
use crate::message::{chunk, get, ok};
use crate::peer::{Closed, Peer};
use crate::server::{SOON, Server, chat, stream_request};
use crate::sse::{DONE, LAST_CHUNK, STREAM, dialects, token};
use std::time::{Duration, Instant};

/// What is set, and what must have passed before it strikes.
const SHORT: Duration = Duration::from_millis(300);

#[track_caller]
fn took_its_time(since: Instant) {
    let took = since.elapsed();
    // Timers have slots of a millisecond.
    assert!(took >= SHORT - Duration::from_millis(2), "too early: {took:?}");
    assert!(took < SOON, "too late: {took:?}");
}

#[test]
fn head() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--head-ms", "300"]);
    let mut client = server.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n");
    let start = Instant::now();
    // A trickle does not extend it.
    let mut trickle = Peer::new(client.stream.try_clone().unwrap());
    let dripping = std::thread::spawn(move || {
        while trickle.try_send(b"X: y\r\n").is_ok() && start.elapsed() < SOON {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let response = client.response();
    took_its_time(start);
    assert_eq!((response.status(), response.error_code().as_str()), (408, "head_timeout"));
    assert_eq!(response.field("connection").as_deref(), Some("close"));
    drop(client);
    dripping.join().unwrap();
    backend.was_left_alone();
    server.expect_ends(&[("head_timeout", 1)]);
}

#[test]
fn keep_alive_before_the_first_and_between_requests() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--keep-alive-ms", "300"]);
    let start = Instant::now();
    let mut silent = server.connect();
    let mut client = server.connect();
    client.send(get("/"));
    let (mut upstream, _) = backend.request();
    upstream.send(ok("once"));
    assert_eq!(client.response().text(), "once");
    assert_eq!((silent.closed(), client.closed()), (Closed::Fin, Closed::Fin));
    took_its_time(start);
    server.expect_count("tokenring_keep_alive_closes_total", 2);
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn keep_alive_does_not_run_while_a_request_does() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--keep-alive-ms", "100"]);
    let mut client = server.connect();
    client.send(get("/slow"));
    let (mut upstream, _) = backend.request();
    client.silence(SHORT);
    upstream.send(ok("at last"));
    assert_eq!(client.response().text(), "at last");
}

#[test]
fn body() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--body-ms", "300"]);
    let mut client = server.connect();
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n");
    let start = Instant::now();
    let mut trickle = Peer::new(client.stream.try_clone().unwrap());
    let dripping = std::thread::spawn(move || {
        while trickle.try_send(b"x").is_ok() && start.elapsed() < SHORT * 2 {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let response = client.response();
    took_its_time(start);
    assert_eq!((response.status(), response.error_code().as_str()), (408, "body_timeout"));
    dripping.join().unwrap();
    assert!(backend.accept().try_request().is_err(), "never a whole request");
    server.expect_ends(&[("body_timeout", 1)]);
}

#[test]
fn upstream_head() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--upstream-head-ms", "300"]);
    for request in [get("/plain"), chat(), stream_request("/v1/messages")] {
        let mut client = server.connect();
        client.send(&request);
        let start = Instant::now();
        let (mut upstream, _) = backend.request();
        // Neither an interim answer nor half a head is one.
        upstream.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConte");
        let response = client.response();
        took_its_time(start - Duration::from_millis(5));
        assert_eq!((response.status(), response.error_code().as_str()), (504, "upstream_head_timeout"));
        upstream.closed();
    }
    server.expect_ends(&[("upstream_head_timeout", 3)]);
}

#[test]
fn first_token_without_a_head() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--first-token-ms", "300"]);
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (504, "first_token_timeout"));
    upstream.closed();
    server.expect_ends(&[("first_token_timeout", 1)]);
}

#[test]
fn first_token_of_a_stream() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--first-token-ms", "300", "--heartbeat-ms", "50"]);
    for dialect in dialects() {
        let request = if dialect.done.is_some() { stream_request(dialect.path) } else { get(dialect.path) };
        let (mut client, mut upstream) = streaming(&server, &backend, &request);
        if dialect.path == "/v1/chat/completions" {
            // A role is no token; nor are our own heartbeats.
            upstream
                .send(chunk("data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\"}}]}\n\n"));
        }
        let code = loop {
            let event = client.event();
            if event.data().contains("error") {
                break event.error_code();
            }
        };
        assert_eq!(code, "first_token_timeout", "{}", dialect.path);
        client.stream_end();
        client.closed();
        upstream.closed();
    }
    server.expect_ends(&[("first_token_timeout", 5)]);
}

#[test]
fn between_tokens() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--between-tokens-ms", "300"]);
    for dialect in dialects() {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        // Slower than the deadline as a whole, never between two.
        for _ in 0..4 {
            upstream.send(chunk(&dialect.token));
            client.event();
            std::thread::sleep(SHORT / 3);
        }
        upstream.send(chunk(&dialect.token));
        let start = Instant::now();
        client.event();
        // The backend's own comments and half an event are no progress.
        upstream.send(chunk(": still here"));
        let event = client.event();
        took_its_time(start - Duration::from_millis(5));
        assert_eq!(event.error_code(), "between_tokens_timeout");
        client.stream_end();
        upstream.closed();
    }
    server.expect_ends(&[("between_tokens_timeout", 5)]);
}

#[test]
fn between_pieces_of_an_ordinary_body() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--between-tokens-ms", "300"]);
    let mut client = server.connect();
    client.send(get("/download"));
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome");
    assert_eq!(client.head().status(), 200);
    assert_eq!(client.exactly(4), b"some");
    client.closed();
    upstream.closed();
    server.expect_ends(&[("between_tokens_timeout", 1)]);
}

#[test]
fn total() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--total-ms", "300"]);
    for dialect in dialects() {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        let mut talking = Peer::new(upstream.stream.try_clone().unwrap());
        let token = dialect.token.clone();
        let talk = std::thread::spawn(move || {
            while talking.try_send(&chunk(&token)).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut events = 0;
        loop {
            let event = client.event();
            if event.id().is_none() {
                assert_eq!(event.error_code(), "total_timeout");
                break;
            }
            events += 1;
        }
        assert!(events > 2, "{events}");
        client.stream_end();
        upstream.closed_after();
        drop(upstream);
        talk.join().unwrap();
    }
    server.expect_ends(&[("total_timeout", 5)]);
}

#[test]
fn total_before_anything_was_sent() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--total-ms", "300"]);
    let mut client = server.connect();
    client.send(get("/slow"));
    let (mut upstream, _) = backend.request();
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (504, "total_timeout"));
    upstream.closed();
    server.expect_ends(&[("total_timeout", 1)]);
}

#[test]
fn write_stall() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--write-stall-ms", "300", "--on-leave", "cancel"]);
    let client = server.connect();
    client.receive_little();
    let mut client = client;
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send(STREAM);
    let piece = chunk(token(&"x".repeat(1000)));
    upstream.send_until_stuck(&piece, Duration::from_millis(100), 32 << 20);
    // The reader that takes nothing is let go, and its backend with it.
    upstream.time_to_close();
    server.expect_ends(&[("write_stall", 1)]);
    assert_eq!(client.closed_after(), Closed::Reset);
}

#[test]
fn a_reader_that_needs_longer_than_the_deadline_for_one_send_is_not_a_stalled_one() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--write-stall-ms", "1500", "--notsent-lowat", "4096"]);
    // Segments as on Ethernet: with loopback's of 64 KiB a small window opens by the sender's probes alone.
    let mut client = server.connect_little(1400);
    client.send(get("/download"));
    let (mut upstream, _) = backend.request();
    const BYTES: usize = 192 << 10;
    upstream.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n"));
    upstream.send(vec![b'x'; BYTES]);
    client.head();
    // A send lends up to 64 KiB; at this pace one takes longer than the deadline.
    for _ in 0..48 {
        client.exactly(BYTES / 48);
        std::thread::sleep(Duration::from_millis(110));
    }
    server.expect_ends(&[("done", 1)]);
    drop(upstream);
}

#[test]
fn a_slow_reader_is_not_a_stalled_one() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--write-stall-ms", "700"]);
    let mut client = server.connect();
    client.send(get("/download"));
    let (mut upstream, _) = backend.request();
    const BYTES: usize = 32 << 20;
    upstream.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n"));
    let sender = std::thread::spawn(move || {
        upstream.send(vec![b'x'; BYTES]);
        upstream
    });
    client.head();
    // Longer in all than the deadline, with some progress in every part of it.
    for _ in 0..16 {
        client.exactly(BYTES / 16);
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(sender.join().unwrap());
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn a_backend_that_does_not_take_the_request() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--write-stall-ms", "300", "--body-ms", "0"]);
    let mut client = server.connect();
    client.send(format!("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", 32 << 20));
    let _upstream = backend.accept();
    client.send_until_stuck(&[b'u'; 65536], Duration::from_millis(100), 32 << 20);
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (504, "upstream_stalled"));
    server.expect_ends(&[("upstream_stalled", 1)]);
}

#[test]
fn a_deadline_of_zero_is_off() {
    let backend = Backend::listen();
    let flags =
        ["--first-token-ms", "0", "--upstream-head-ms", "0", "--between-tokens-ms", "0", "--total-ms", "0"];
    let server = Server::before(&backend, &flags);
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    client.silence(SHORT);
    upstream.send([STREAM, &chunk(token("a"))].concat());
    client.stream_head();
    client.event();
    client.silence(SHORT);
    upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
    assert_eq!(client.events().len(), 1);
}

#[test]
fn nothing_is_overdue_after_the_end_mark() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--between-tokens-ms", "200", "--finish-ms", "100"]);
    for dialect in dialects() {
        let Some(done) = &dialect.done else { continue };
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        upstream.send(chunk(done));
        assert_eq!(client.events().len(), 1, "the end, no error, although no token ever came");
        upstream.closed();
    }
    server.expect_ends(&[("done", 4)]);
}

#[test]
fn an_early_committed_stream_is_told_in_band() {
    let backend = Backend::listen();
    let flags = ["--commit-ms", "50", "--upstream-head-ms", "300"];
    let server = Server::before(&backend, &flags);
    for dialect in dialects().iter().filter(|dialect| dialect.done.is_some()) {
        let mut client = server.connect();
        client.send(stream_request(dialect.path));
        let (mut upstream, _) = backend.request();
        client.stream_head();
        assert_eq!(client.event().text(), dialect.heartbeat);
        expect_error(&mut client, dialect, "upstream_head_timeout");
        upstream.closed();
    }
    server.expect_ends(&[("upstream_head_timeout", 4)]);
}
