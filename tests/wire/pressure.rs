//! Readers that stop: the other side is paused within bounds, nobody else notices, and nothing is lost.

use crate::backend::Backend;
use crate::events::streaming;
use crate::message::{chunk, get, ok};
use crate::peer::Peer;
use crate::server::{SOON, Server, chat};
use crate::sse::{DONE, LAST_CHUNK, STREAM, token};
use socket2::SockRef;
use std::time::{Duration, Instant};

/// What the proxy may have read for somebody who reads nothing: the high mark, a send, and all receive buffers of a turn.
const READ_MAX: u64 = 1 << 20;
/// How long a sender that is not being read from is watched.
const STILL: Duration = Duration::from_millis(200);

/// A backend connection whose kernel buffers are small on our side, so that what is taken was taken by the proxy.
fn small_sender(peer: &Peer) {
    SockRef::from(&peer.stream).set_send_buffer_size(32 * 1024).unwrap();
}

#[test]
fn a_stuck_reader_pauses_its_backend_and_gets_every_byte_later() {
    let backend = Backend::listen();
    let mut server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.receive_little();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    small_sender(&upstream);
    upstream.send(STREAM);
    let before_kib = server.resident_kib();
    let event = token(&"x".repeat(1000));
    let piece = chunk(&event);
    let taken = upstream.send_until_stuck(&piece, STILL, 64 << 20);
    // What the proxy itself has read is bounded, not only what the kernel's buffers on its way leave over.
    let read = server.count("tokenring_upstream_received_bytes_total");
    assert!(read < READ_MAX, "{read} bytes were read for a reader that takes none");
    assert!(taken < 16 << 20, "{taken} bytes were taken from the backend");
    assert_eq!(server.count("tokenring_upstream_received_bytes_total"), read, "nor does it go on");
    server.wait_for("the pause", |server| server.count("tokenring_pauses_total") >= 1);
    assert!(server.resident_kib() < before_kib + 4096, "{} KiB", server.resident_kib());

    // Others are served as ever, meanwhile.
    let (mut other, mut its_backend) = streaming(&server, &backend, &chat());
    let mut worst = Duration::ZERO;
    for _ in 0..100 {
        let start = Instant::now();
        its_backend.send(chunk(token("a")));
        other.event();
        worst = worst.max(start.elapsed());
    }
    assert!(worst < Duration::from_millis(500), "{worst:?}");

    // The reader wakes up.
    let rest = piece.len() - taken % piece.len();
    let sender = std::thread::spawn(move || {
        upstream.send(&piece[piece.len() - rest..]);
        upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
        upstream
    });
    client.stream_head();
    let count = (taken + rest) / chunk(&event).len();
    for nth in 1..=count as u64 {
        let received = client.event();
        assert_eq!(received.id(), Some(nth));
        assert!(received.payload() == event.as_bytes(), "event {nth} of {count}");
    }
    assert_eq!(client.event().data(), "[DONE]");
    client.stream_end();
    drop(sender.join().unwrap());
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn a_stuck_reader_of_an_ordinary_body_pauses_its_backend() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.receive_little();
    client.send(get("/download"));
    let (mut upstream, _) = backend.request();
    small_sender(&upstream);
    const BYTES: usize = 64 << 20;
    upstream.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n"));
    upstream.send_until_stuck(&[b'x'; 65536], STILL, BYTES);
    let read = server.count("tokenring_upstream_received_bytes_total");
    assert!(read < READ_MAX, "{read} bytes were read for a reader that takes none");
}

/// The kernel takes little ahead of a reader with TCP_NOTSENT_LOWAT, and some megabytes without.
#[test]
fn notsent_lowat_keeps_what_the_kernel_takes_small() {
    let mut sent = Vec::new();
    for lowat in ["16384", "0"] {
        let backend = Backend::listen();
        let server = Server::before(&backend, &["--notsent-lowat", lowat]);
        let mut client = server.connect();
        client.receive_little();
        client.send(get("/download"));
        let (mut upstream, _) = backend.request();
        upstream.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 64 << 20));
        upstream.send_until_stuck(&[b'x'; 65536], STILL, 64 << 20);
        sent.push(server.count("tokenring_client_sent_bytes_total"));
    }
    assert!(sent[0] < 256 * 1024, "{} bytes sent to a reader that takes none", sent[0]);
    assert!(sent[1] > 4 * sent[0], "{sent:?}: the flag has no effect");
}

#[test]
fn an_upload_to_a_backend_that_does_not_read_is_paused_and_resumed() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--retry-bytes-max", "0"]);
    let mut client = server.connect();
    small_sender(&client);
    const BYTES: usize = 16 << 20;
    client.send(format!("POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: {BYTES}\r\n\r\n"));
    let mut upstream = backend.accept();
    let piece = vec![b'u'; 65536];
    let taken = client.send_until_stuck(&piece, STILL, BYTES);
    let (read, sent) = (
        server.count("tokenring_client_received_bytes_total"),
        server.count("tokenring_upstream_sent_bytes_total"),
    );
    assert!(read < sent + READ_MAX, "{read} bytes were read, {sent} sent");
    assert!(taken < BYTES, "all of {BYTES} bytes were taken for a backend that reads none");
    server.expect_count("tokenring_upload_pauses_total", 1);
    let mut writer = Peer::new(client.stream.try_clone().unwrap());
    let sender = std::thread::spawn(move || writer.send(vec![b'u'; BYTES - taken]));
    let request = upstream.request();
    assert_eq!(request.body.len(), BYTES);
    upstream.send(ok("all of it"));
    assert_eq!(client.response().text(), "all of it");
    sender.join().unwrap();
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn many_stuck_readers_cost_little_each() {
    const READERS: usize = 50;
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--on-leave", "cancel"]);
    let before_kib = server.resident_kib();
    let mut stuck = Vec::new();
    let piece = chunk(token(&"x".repeat(1000)));
    for _ in 0..READERS {
        let mut client = server.connect();
        client.receive_little();
        client.send(chat());
        let (mut upstream, _) = backend.request();
        small_sender(&upstream);
        upstream.send(STREAM);
        stuck.push((client, upstream));
    }
    let senders: Vec<_> = stuck
        .into_iter()
        .map(|(client, mut upstream)| {
            let piece = piece.clone();
            std::thread::spawn(move || {
                upstream.send_until_stuck(&piece, STILL, 16 << 20);
                (client, upstream)
            })
        })
        .collect();
    let stuck: Vec<_> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
    let grown_kib = server.resident_kib().saturating_sub(before_kib);
    assert!(grown_kib < 512 * READERS as u64, "{grown_kib} KiB for {READERS} readers");
    drop(stuck);
    server.expect_ends(&[("client_left", READERS as u64)]);
}

#[test]
fn clients_beyond_the_slots_wait_in_the_backlog_and_are_served_later() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--conns-max", "4", "--on-leave", "cancel"]);
    let mut seated: Vec<_> = (0..4).map(|_| streaming(&server, &backend, &chat())).collect();
    let mut waiting: Vec<_> = (0..3)
        .map(|nth| {
            let mut client = server.connect();
            client.send(get(&format!("/{nth}")));
            client
        })
        .collect();
    waiting[0].silence(Duration::from_millis(100));
    backend.was_left_alone();
    server.expect_count("tokenring_accept_pauses_total", 1);
    assert_eq!(server.count("tokenring_accepts_total"), 4);
    for (nth, next) in waiting.iter_mut().enumerate() {
        let (client, mut upstream) = seated.remove(0);
        drop(client);
        assert!(upstream.time_to_close() < SOON);
        let (mut upstream, request) = backend.request();
        assert_eq!(request.first_line, format!("GET /{nth} HTTP/1.1"), "in the order of their coming");
        upstream.send(ok("seated"));
        assert_eq!(next.response().text(), "seated");
    }
    server.expect_ends(&[("client_left", 3), ("done", 3)]);
}
