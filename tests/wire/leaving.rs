//! The client leaves: by FIN or RST, in every phase. Its backend's connection is closed at once, also where its stream could go
//! on without it, if the route says so.

use crate::backend::{Backend, BlackHole};
use crate::events::streaming;
use crate::message::{Message, chunk, get, ok, post};
use crate::peer::Peer;
use crate::server::{Server, chat, stream_request};
use crate::sse::{DONE, LAST_CHUNK, STREAM, dialects, token};
use std::time::Duration;

/// The promise is 100 ms; this machine may be busy with other tests.
const AT_ONCE: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum By {
    Fin,
    Reset,
}
const WAYS: [By; 2] = [By::Fin, By::Reset];

/// Streams that have begun would go on for a while by default.
const CANCEL: [&str; 2] = ["--on-leave", "cancel"];

fn leave(client: Peer, by: By) {
    match by {
        By::Fin => drop(client),
        By::Reset => client.reset(),
    }
}

#[track_caller]
fn let_go(upstream: &mut Peer) {
    let took = upstream.time_to_close();
    assert!(took < AT_ONCE, "the backend was kept for {took:?}");
}

#[test]
fn before_the_head_is_complete() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    for by in WAYS {
        for said in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: a\r\n"] {
            let mut client = server.connect();
            client.send(said);
            leave(client, by);
        }
    }
    server.wait_for("all connections to be closed", |server| server.count("tokenring_closes_total") == 6);
    backend.was_left_alone();
    server.expect_ends(&[]);
}

#[test]
fn during_an_upload() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for by in WAYS {
        let mut client = server.connect();
        client.send("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\npart");
        let mut upstream = backend.accept();
        upstream.head();
        assert_eq!(upstream.exactly(4), b"part");
        leave(client, by);
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn while_a_connection_is_being_made() {
    let hole = BlackHole::open();
    let mut server = Server::start(&[hole.address], &["--connect-ms", "60000"]);
    let idle = server.descriptors();
    for by in WAYS {
        let mut client = server.connect();
        client.send(chat());
        server.wait_for("a connect", |server| server.descriptors() > idle);
        leave(client, by);
        server.wait_for("its end", |server| server.descriptors() <= idle);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn during_a_silent_prefill() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut left = 0;
    for by in WAYS {
        for dialect in dialects().iter().filter(|dialect| dialect.done.is_some()) {
            let mut client = server.connect();
            client.send(stream_request(dialect.path));
            let (mut upstream, _) = backend.request();
            leave(client, by);
            let_go(&mut upstream);
            left += 1;
        }
    }
    server.expect_ends(&[("client_left", left)]);
}

#[test]
fn between_the_streams_head_and_its_first_token() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &CANCEL);
    for by in WAYS {
        for dialect in dialects() {
            let (client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
            leave(client, by);
            let_go(&mut upstream);
        }
    }
    server.expect_ends(&[("client_left", 10)]);
}

#[test]
fn while_streaming() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &CANCEL);
    for by in WAYS {
        for dialect in dialects() {
            let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
            upstream.send(chunk(&dialect.token));
            client.event();
            leave(client, by);
            let_go(&mut upstream);
        }
    }
    server.expect_ends(&[("client_left", 10)]);
}

#[test]
fn after_an_early_commit() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[&CANCEL[..], &["--commit-ms", "20"]].concat());
    for by in WAYS {
        let mut client = server.connect();
        client.send(chat());
        let (mut upstream, _) = backend.request();
        client.stream_head();
        leave(client, by);
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn while_it_does_not_read() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &CANCEL);
    for by in WAYS {
        let client = server.connect();
        client.receive_little();
        let mut client = client;
        client.send(chat());
        let (mut upstream, _) = backend.request();
        upstream.send(STREAM);
        upstream.send_until_stuck(&chunk(token(&"x".repeat(1000))), Duration::from_millis(150), 32 << 20);
        leave(client, by);
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn with_more_requests_pipelined_than_are_read() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--head-bytes-max", "1024", "--target-bytes-max", "256"]);
    for by in WAYS {
        let mut client = server.connect();
        client.send(chat());
        let (mut upstream, _) = backend.request();
        // So much that the client is not read from any more.
        client.send(get("/next").repeat(400));
        std::thread::sleep(Duration::from_millis(50));
        leave(client, by);
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn by_reset_during_an_ordinary_answer() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for said in ["", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"] {
        let mut client = server.connect();
        client.send(get("/plain"));
        let (mut upstream, _) = backend.request();
        if !said.is_empty() {
            upstream.send(said);
            client.head();
        }
        client.reset();
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn a_half_close_means_left_on_a_streaming_request() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[&CANCEL[..], &["--half-close", "leave"]].concat());
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    client.shut();
    let_go(&mut upstream);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send(chunk(token("a")));
    client.event();
    client.shut();
    let_go(&mut upstream);
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn a_half_close_can_be_served() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--half-close", "serve"]);
    for early in [true, false] {
        let mut client = server.connect();
        client.send(chat());
        if early {
            client.shut();
        }
        let (mut upstream, _) = backend.request();
        upstream.send([STREAM, &chunk(token("a"))].concat());
        client.stream_head();
        client.event();
        if !early {
            client.shut();
        }
        upstream.send(chunk(token("b")));
        assert_eq!(client.event().payload(), token("b").as_bytes());
        upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
        assert_eq!(client.events().len(), 1);
        client.closed();
    }
    server.expect_ends(&[("done", 2)]);
}

#[test]
fn a_half_closed_client_that_is_served_is_still_seen_to_go() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--half-close", "serve"]);
    for request in [chat(), get("/plain")] {
        let mut client = server.connect();
        client.send(&request);
        let (mut upstream, _) = backend.request();
        client.shut();
        std::thread::sleep(Duration::from_millis(50));
        client.reset();
        let_go(&mut upstream);
    }
    server.expect_ends(&[("client_left", 2)]);
}

#[test]
fn a_half_close_on_any_other_request_is_answered() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--half-close", "leave"]);
    for request in [get("/plain"), post("/v1/chat/completions", r#"{"stream":false}"#)] {
        let mut client = server.connect();
        client.send(&request);
        client.shut();
        let (mut upstream, _) = backend.request();
        std::thread::sleep(Duration::from_millis(50));
        upstream.send(ok("answered"));
        assert_eq!(client.response().text(), "answered");
        client.closed();
    }
    // Those that were pipelined before it too.
    let mut client = server.connect();
    client.send([get("/1"), get("/2"), get("/3")].concat());
    client.shut();
    let mut upstream = None;
    for _ in 0..3 {
        let mut peer = upstream.take().unwrap_or_else(|| backend.accept());
        peer.request();
        peer.send(ok("in turn"));
        assert_eq!(client.response().text(), "in turn");
        upstream = Some(peer);
    }
    client.closed();
    server.expect_ends(&[("done", 5)]);
}

/// A request of a dialect that says this of its client's leave.
fn saying(path: &str, on_leave: &str) -> Vec<u8> {
    let request = String::from_utf8(stream_request(path)).unwrap();
    request.replacen("\r\n", &format!("\r\nTokenring-On-Leave: {on_leave}\r\n"), 1).into_bytes()
}

/// A stream of which something was said, whose client leaves then.
fn begun(server: &Server, backend: &Backend, on_leave: &str) -> (Message, Peer) {
    let mut client = server.connect();
    client.send(saying("/v1/chat/completions", on_leave));
    let (mut upstream, request) = backend.request();
    assert_eq!(request.field("tokenring-on-leave"), None, "it is said to us alone");
    upstream.send([STREAM, &chunk(token("a"))].concat());
    let head = client.stream_head();
    client.event();
    leave(client, By::Fin);
    (head, upstream)
}

#[test]
fn as_the_request_says_that_it_is_to_be_taken() {
    let backend = Backend::listen();
    let server = Server::before(
        &backend,
        &["--on-leave-max", "finish", "--detach-ms-max", "1500", "--pool-idle-max", "0"],
    );
    let told = |head: &Message| head.field("tokenring-on-leave");
    let (head, mut upstream) = begun(&server, &backend, "cancel");
    assert_eq!(told(&head).as_deref(), Some("cancel"));
    let_go(&mut upstream);
    // No more than the route allows, which it is told.
    for (said, granted) in [("detach;ttl=1", "detach;ttl=1"), ("detach;ttl=86400", "detach;ttl=2")] {
        let (head, mut upstream) = begun(&server, &backend, said);
        assert_eq!(told(&head).as_deref(), Some(granted));
        let took = upstream.time_to_close();
        assert!(took > Duration::from_millis(700) && took < Duration::from_secs(5), "{said}: {took:?}");
    }
    let (head, mut upstream) = begun(&server, &backend, "finish");
    assert_eq!(told(&head).as_deref(), Some("finish"));
    upstream.silence(Duration::from_secs(2));
    upstream.send([&chunk(DONE)[..], LAST_CHUNK].concat());
    server.expect_ends(&[("client_left", 1), ("abandoned", 2), ("done", 1)]);
    // Nothing said, nothing told.
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send([STREAM, &chunk(DONE)[..], LAST_CHUNK].concat());
    assert_eq!(told(&client.stream_head()), None);
}

#[test]
fn what_a_request_may_not_say_of_it_is_refused_in_its_dialect_before_its_backend_is_asked() {
    let backend = Backend::listen();
    for (flags, said, status) in [
        (&["--on-leave", "detach"][..], "finish", 403),
        (&["--on-leave", "cancel"], "detach", 403),
        (&["--on-leave", "finish", "--on-leave-max", "off"], "cancel", 403),
        (&["--resume-window", "0"], "detach", 403),
        (&[], "stop", 400),
        (&[], "detach;ttl=0", 400),
        (&["--resume-window", "0"], "for ever", 400),
    ] {
        let server = Server::before(&backend, flags);
        let all = dialects();
        for dialect in &all {
            let mut client = server.connect();
            client.send(saying(dialect.path, said));
            let refused = client.response();
            assert_eq!(refused.status(), status, "{flags:?} {said}: {refused:?}");
            let code = if status == 400 { "bad_on_leave" } else { "on_leave_forbidden" };
            if dialect.path.starts_with("/v1/messages") {
                assert_eq!(refused.json()["type"], "error", "{refused:?}");
            }
            assert!(refused.text().contains(code), "{refused:?}");
        }
        server.expect_ends(&[("refused", all.len() as u64)]);
    }
    backend.was_left_alone();
}
