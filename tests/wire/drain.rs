//! Leaving in peace: what signals do to clients in every state, and what the process says at its end.

use crate::backend::Backend;
use crate::ends::expect_error;
use crate::events::streaming;
use crate::message::{chunk, get, ok};
use crate::peer::Closed;
use crate::server::{Server, chat, stream_request};
use crate::sse::{DONE, LAST_CHUNK, dialects, token};
use std::time::{Duration, Instant};

#[track_caller]
fn draining(server: &mut Server) {
    server.wait_for("/ready to say 503", |server| {
        server.admin_get("/ready").is_none_or(|(status, _)| status == 503)
    });
}

#[test]
fn an_idle_server_leaves_at_once() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(&[], &[]);
        let start = Instant::now();
        server.signal(signal);
        assert_eq!(server.exit_code(), 0, "{signal}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

#[test]
fn streams_finish_and_idle_connections_go() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send(chunk(token("a")));
    client.event();
    let mut idle = server.connect();
    idle.send(get("/"));
    let (mut pooled, _) = backend.request();
    pooled.send(ok("once"));
    assert_eq!(idle.response().text(), "once");

    server.signal("TERM");
    assert_eq!(idle.closed(), Closed::Fin);
    pooled.closed();
    draining(&mut server);
    // The stream goes on as if nothing had happened.
    for _ in 0..5 {
        upstream.send(chunk(token("b")));
        assert_eq!(client.event().payload(), token("b").as_bytes());
    }
    assert!(server.is_running());
    upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
    assert_eq!(client.events().len(), 1);
    client.closed();
    assert_eq!(server.exit_code(), 0);
}

#[test]
fn an_answer_begun_during_the_drain_says_close() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(get("/slow"));
    let (mut upstream, _) = backend.request();
    server.signal("TERM");
    draining(&mut server);
    upstream.send(ok("still answered"));
    let response = client.response();
    assert_eq!(response.text(), "still answered");
    assert_eq!(response.field("connection").as_deref(), Some("close"));
    client.closed();
    assert_eq!(server.exit_code(), 0);
}

#[test]
fn what_the_kernel_has_queued_is_not_lost() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &["--conns-max", "1"]);
    // The only slot is taken, so the others wait in the backlog when the signal comes.
    let (mut seated, mut upstream) = streaming(&server, &backend, &chat());
    let mut queued: Vec<_> = (0..5).map(|_| server.connect()).collect();
    for (nth, client) in queued.iter_mut().enumerate().take(3) {
        client.send(get(&format!("/{nth}")));
    }
    server.signal("TERM");
    draining(&mut server);
    for (nth, client) in queued.iter_mut().enumerate().skip(3) {
        client.send(get(&format!("/{nth}")));
    }
    upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
    assert_eq!(seated.events().len(), 1);
    drop(seated);
    drop(upstream);
    for (nth, client) in queued.iter_mut().enumerate() {
        let (mut upstream, request) = backend.request();
        assert_eq!(request.first_line, format!("GET /{nth} HTTP/1.1"));
        upstream.send(ok("not lost"));
        assert_eq!(client.response().text(), "not lost");
        client.closed();
    }
    assert_eq!(server.exit_code(), 0);
}

#[test]
fn a_client_that_connected_before_the_signal_may_still_ask() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let mut fresh: Vec<_> = (0..20).map(|_| server.connect()).collect();
    server.signal("TERM");
    for client in &mut fresh {
        client.send(get("/"));
        let (mut upstream, _) = backend.request();
        upstream.send(ok("welcome"));
        assert_eq!(client.response().text(), "welcome");
        client.closed();
    }
    assert_eq!(server.exit_code(), 0);
}

#[test]
fn no_shards_queue_is_lost() {
    let server = |wait: &str| {
        let backend = Backend::listen();
        let server = Server::before(&backend, &["--shards", "3", "--conns-max", wait]);
        (
            server,
            backend
                .serve(|mut peer| while peer.try_request().is_ok() && peer.try_send(&ok("kept")).is_ok() {}),
        )
    };
    // With slots for all of them, and with none to spare, so that most wait in the queues of three listeners.
    for slots in ["100", "2"] {
        let (mut server, _) = server(slots);
        let mut clients: Vec<_> = (0..60).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.send(get("/"));
        }
        server.signal("TERM");
        for client in &mut clients {
            assert_eq!(client.response().text(), "kept");
            client.closed();
        }
        assert_eq!(server.exit_code(), 0);
    }
}

#[test]
fn no_one_is_accepted_after_the_queue_is_empty() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let (_client, _upstream) = streaming(&server, &backend, &chat());
    server.signal("TERM");
    server.wait_for("the listener to be closed", |server| {
        crate::peer::Peer::try_connect(server.address).is_err()
    });
    assert!(server.is_running());
    // Before its last client, or it would leave by itself.
    drop(server);
}

#[test]
fn the_drain_deadline_ends_streams_in_band() {
    for dialect in dialects() {
        let backend = Backend::listen();
        let mut server = Server::before(&backend, &["--drain-deadline-ms", "300"]);
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        let mut waiting = server.connect();
        waiting.send(get("/waiting"));
        let (_silent, _) = backend.request();
        let start = Instant::now();
        server.signal("TERM");
        upstream.send(chunk(&dialect.token));
        client.event();
        expect_error(&mut client, &dialect, "drain");
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
        let response = waiting.response();
        assert_eq!((response.status(), response.error_code().as_str()), (503, "drain"));
        upstream.closed();
        assert_eq!(server.exit_code(), 1, "streams were cut short");
    }
}

#[test]
fn a_second_signal_ends_it_now() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    server.signal("TERM");
    draining(&mut server);
    upstream.send(chunk(token("a")));
    client.event();
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(client.event().error_code(), "stopped");
    client.stream_end();
    upstream.closed();
    assert_eq!(server.exit_code(), 1);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_stuck_reader_does_not_hold_up_a_stop() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &["--drain-deadline-ms", "200"]);
    let mut client = server.connect();
    client.receive_little();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send(crate::sse::STREAM);
    upstream.send_until_stuck(&chunk(token(&"x".repeat(1000))), Duration::from_millis(150), 32 << 20);
    server.signal("TERM");
    assert_eq!(server.exit_code(), 1);
    drop(client);
}

#[test]
fn sigquit_dumps_the_state_and_stops() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let (_client, _upstream) = streaming(&server, &backend, &chat());
    server.signal("QUIT");
    assert_eq!(server.exit_code(), 1);
    let output = server.output();
    assert!(output.contains("{") && output.contains("shards"), "{output}");
    assert!(output.contains("await_first_token"), "{output}");
}

#[test]
fn reserved_signals_change_nothing() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    for signal in ["HUP", "USR1", "USR2"] {
        server.signal(signal);
    }
    for _ in 0..3 {
        upstream.send(chunk(token("a")));
        client.event();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.is_running());
    assert_eq!(server.admin_get("/ready").unwrap().0, 200);
}
