//! Backend connections: kept, reused, given up; and the one retry that no client sees.

use crate::backend::Backend;
use crate::message::{answer, chunk, get, ok, post};
use crate::peer::Peer;
use crate::server::{Server, chat};
use crate::sse::{DONE, LAST_CHUNK, STREAM, token};
use std::time::Duration;

/// A client and a backend connection that has served one request and is in the pool.
fn warmed(server: &Server, backend: &Backend) -> (Peer, Peer) {
    let mut client = server.connect();
    client.send(get("/warm"));
    let (mut upstream, _) = backend.request();
    upstream.send(ok("warm"));
    assert_eq!(client.response().text(), "warm");
    (client, upstream)
}

#[test]
fn a_backend_connection_is_reused_across_clients() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (_first, mut upstream) = warmed(&server, &backend);
    for nth in 0..5 {
        let mut client = server.connect();
        client.send(post(&format!("/{nth}"), "body"));
        assert_eq!(upstream.request().text(), "body");
        upstream.send(ok("again"));
        assert_eq!(client.response().text(), "again");
    }
    backend.was_left_alone();
    assert_eq!(server.count("tokenring_upstream_connects_total"), 1);
    assert_eq!(server.count("tokenring_upstream_reuses_total"), 5);
}

#[test]
fn the_connection_used_last_is_reused_first() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut one, mut two) = (server.connect(), server.connect());
    one.send(get("/1"));
    let (mut first, _) = backend.request();
    two.send(get("/2"));
    let (mut second, _) = backend.request();
    second.send(ok(""));
    two.response();
    first.send(ok(""));
    one.response();
    two.send(get("/3"));
    assert_eq!(first.request().first_line, "GET /3 HTTP/1.1");
}

#[test]
fn a_reused_connection_that_dies_before_its_answer_is_retried_once_unseen() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for (request, reset) in
        [(get("/r"), false), (get("/r"), true), (chat(), false), (post("/r", "body"), true)]
    {
        let (mut client, mut upstream) = warmed(&server, &backend);
        client.send(&request);
        let first = upstream.request();
        // It dies with the request on it: closed while idle, as far as anybody can tell.
        if reset {
            upstream.reset();
        } else {
            drop(upstream);
        }
        let (mut fresh, second) = backend.request();
        assert_eq!((first.first_line, first.body), (second.first_line, second.body));
        fresh.send(answer("200 OK", "Connection: close\r\n", "unseen"));
        assert_eq!(client.response().text(), "unseen");
    }
    server.expect_count("tokenring_upstream_retries_total", 4);
    server.expect_ends(&[("done", 8)]);
}

#[test]
fn a_request_is_retried_once_only() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = warmed(&server, &backend);
    client.send(get("/twice"));
    upstream.request();
    drop(upstream);
    let (fresh, _) = backend.request();
    drop(fresh);
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (502, "upstream_truncated"));
    backend.was_left_alone();
    server.expect_ends(&[("done", 1), ("upstream_truncated", 1)]);
}

#[test]
fn a_fresh_connection_that_dies_is_not_retried() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(get("/once"));
    drop(backend.request());
    assert_eq!(client.response().status(), 502);
    backend.was_left_alone();
    assert_eq!(server.count("tokenring_upstream_retries_total"), 0);
}

#[test]
fn an_answer_that_has_begun_is_not_retried() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = warmed(&server, &backend);
    client.send(get("/half"));
    upstream.request();
    upstream.send("HTTP/1.1 200");
    drop(upstream);
    assert_eq!(client.response().status(), 502);
    backend.was_left_alone();
}

#[test]
fn a_request_longer_than_what_is_kept_is_not_retried() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--retry-bytes-max", "10000"]);
    let (mut client, mut upstream) = warmed(&server, &backend);
    client.send(post("/long", &"x".repeat(20_000)));
    upstream.request();
    drop(upstream);
    assert_eq!(client.response().status(), 502);
    backend.was_left_alone();
}

#[test]
fn idle_connections_are_closed_in_time_and_when_the_backend_wants() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--pool-idle-ms", "200"]);
    let (mut client, mut upstream) = warmed(&server, &backend);
    upstream.closed();
    server.expect_count("tokenring_pool_evictions_total", 1);
    client.send(get("/again"));
    let (mut fresh, _) = backend.request();
    fresh.send(ok("fresh"));
    assert_eq!(client.response().text(), "fresh");
    drop(fresh);
    server.expect_count("tokenring_pool_peer_closes_total", 1);
}

#[test]
fn the_backends_own_promise_bounds_its_idle_connections() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--pool-idle-ms", "60000"]);
    let mut client = server.connect();
    client.send(get("/"));
    let (mut upstream, _) = backend.request();
    upstream.send(answer("200 OK", "Connection: keep-alive\r\nKeep-Alive: timeout=2, max=9\r\n", "x"));
    client.response();
    let took = upstream.time_to_close();
    assert!(took < Duration::from_secs(2), "after {took:?}");
}

#[test]
fn a_pool_of_none_keeps_nothing() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--pool-idle-max", "0"]);
    let (_client, mut upstream) = warmed(&server, &backend);
    upstream.closed();
}

#[test]
fn an_old_connection_takes_no_further_request() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--pool-age-ms", "100"]);
    let (mut client, mut upstream) = warmed(&server, &backend);
    std::thread::sleep(Duration::from_millis(150));
    client.send(get("/later"));
    let (mut fresh, _) = backend.request();
    fresh.send(ok("fresh"));
    assert_eq!(client.response().text(), "fresh");
    upstream.closed();
}

/// llama.cpp promises to keep the connection, and closes it right after the last chunk.
#[test]
fn a_backend_that_breaks_its_promise_costs_no_client_anything() {
    const REQUESTS: u64 = 300;
    let address = Backend::listen().serve(|mut peer: Peer| {
        // A client's own stream may end first, so nothing here is sure to be read.
        if peer.try_request().is_ok() {
            let head = "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5, max=100\r\nContent-Type: text/event-stream\r\n\
                        Transfer-Encoding: chunked\r\n\r\n";
            let body = [chunk(token("a")), chunk(DONE), LAST_CHUNK.to_vec()].concat();
            if peer.try_send(&[head.as_bytes(), &body].concat()).is_err() {
                eprintln!("the proxy was gone");
            }
        }
    });
    let server = Server::start(&[address], &[]);
    let mut client = server.connect();
    for nth in 0..REQUESTS {
        client.send(chat());
        client.stream_head();
        assert_eq!(client.events().len(), 2, "request {nth}");
    }
    server.expect_ends(&[("done", REQUESTS)]);
}

#[test]
fn a_stream_that_was_cut_leaves_no_connection_in_the_pool() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send([STREAM, &chunk(token("a")), LAST_CHUNK].concat());
    client.stream_head();
    client.event();
    assert_eq!(client.event().error_code(), "upstream_truncated");
    client.stream_end();
    upstream.closed();
}
