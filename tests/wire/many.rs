//! Thousands of connects and leaves, after which descriptors, memory, timers and streams are back where they were.

use crate::backend::Backend;
use crate::message::{chunk, get, ok};
use crate::peer::Peer;
use crate::server::{Server, chat};
use crate::sse::{DONE, LAST_CHUNK, STREAM, token};

/// Runs `visit` so many times on a few threads.
fn crowd(server: &Server, times: usize, visit: impl Fn(Peer, usize) + Sync) {
    const THREADS: usize = 8;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let visit = &visit;
            scope.spawn(move || {
                for nth in 0..times / THREADS {
                    visit(server.connect(), nth * THREADS + thread);
                }
            });
        }
    });
}

/// Answers streams and ordinary requests, for as long as the proxy wants.
fn talk(mut peer: Peer) {
    while let Ok(request) = peer.try_request() {
        let said = if request.first_line.contains("/v1/") {
            let body = [chunk(token("a")), chunk(token("b")), chunk(DONE), LAST_CHUNK.to_vec()].concat();
            peer.try_send(&[STREAM, &body].concat())
        } else {
            peer.try_send(&ok("fine"))
        };
        if said.is_err() {
            break;
        }
    }
}

/// One round of every way to come and go.
fn all_ways(server: &Server, each: usize) {
    // Nothing said.
    crowd(server, each, |client, nth| if nth % 2 == 0 { drop(client) } else { client.reset() });
    // Half a head.
    crowd(server, each, |mut client, nth| {
        client.send("GET / HTTP/1.1\r\nHos");
        if nth % 2 == 0 { drop(client) } else { client.reset() }
    });
    // Refused.
    crowd(server, each, |mut client, _| {
        client.send("GET / HTTP/3.0\r\n\r\n");
        assert_eq!(client.response().status(), 505);
    });
    // A request, and gone before its answer.
    crowd(server, each, |mut client, nth| {
        client.send(if nth % 3 == 0 { get("/gone") } else { chat() });
        if nth % 2 == 0 { drop(client) } else { client.reset() }
    });
    // Gone in the middle of a stream.
    crowd(server, each, |mut client, nth| {
        client.send(chat());
        client.stream_head();
        client.event();
        if nth % 2 == 0 { drop(client) } else { client.reset() }
    });
    // Served whole.
    crowd(server, each, |mut client, nth| {
        if nth % 2 == 0 {
            client.send(chat());
            client.stream_head();
            assert_eq!(client.events().len(), 3);
        } else {
            client.send(get("/fine"));
            assert_eq!(client.response().text(), "fine");
        }
    });
}

#[test]
fn twenty_thousand_come_and_go_and_leave_nothing_behind() {
    let backend = Backend::listen().serve(talk);
    let flags = ["--pool-idle-ms", "100", "--detach-ms", "20", "--keep-ms", "20"];
    let mut server = Server::start(&[backend], &flags);
    let at_rest = |server: &mut Server| {
        server.wait_for("all to be gone", |server| {
            ["connections", "upstream_connections", "kept_live_streams", "kept_over_streams"]
                .iter()
                .all(|gauge| server.count(&format!("tokenring_{gauge}")) == 0)
        });
    };
    // Once, for what is allocated on first use.
    all_ways(&server, 1200);
    at_rest(&mut server);
    let (descriptors, resident_kib) = (server.descriptors(), server.resident_kib());

    all_ways(&server, 2200);
    at_rest(&mut server);
    server.wait_for("descriptors to be closed", |server| server.descriptors() <= descriptors);
    let grown_kib = server.resident_kib().saturating_sub(resident_kib);
    assert!(grown_kib < 2048, "{grown_kib} KiB more than {resident_kib}");
    assert_eq!(server.count("tokenring_accepts_total"), 20_400);
    assert_eq!(server.count("tokenring_closes_total"), 20_400);
    assert_eq!(server.count("tokenring_log_bytes"), 0);
    assert_eq!(server.count("tokenring_kept_bytes"), 0);
    assert_eq!(server.count("tokenring_timers"), 0);
    assert_eq!(server.count("tokenring_accept_errors_total"), 0);
    server.signal("TERM");
    assert_eq!(server.exit_code(), 0);
}
