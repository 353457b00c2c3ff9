//! Attacks: each ends as documented and is counted, costs memory within its budget, and other streams go on beside it,
//! complete and in order. Whether they are slowed down is measured by `bench/abuse`, not judged here.

use crate::backend::Backend;
use crate::message::{chunk, get, ok};
use crate::peer::{Closed, Peer};
use crate::server::{SOON, Server, stream_request};
use crate::sse::{DONE, LAST_CHUNK, STREAM, token};
use std::io::Read;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Streams beside every attack, and their events.
const INNOCENTS: usize = 4;
const EVENTS: u64 = 150;
/// What is left of a stream's memory that no budget counts: allocations come in pages.
const SLACK_KIB: u64 = 4 * 1024;

/// A streaming chat request, the last of its connection, that the backend answers in the way named.
fn ask(how: &str) -> Vec<u8> {
    let request = stream_request(&format!("/v1/chat/completions?{how}"));
    String::from_utf8(request).unwrap().replacen("\r\n", "\r\nConnection: close\r\n", 1).into_bytes()
}

/// Sends this over and over, until the other side has had enough.
fn endless(peer: &mut Peer, piece: &[u8]) {
    let piece = piece.repeat(60_000 / piece.len() + 1);
    while peer.try_send(&piece).is_ok() {}
}

/// A backend that answers as its request's query says.
fn backend() -> SocketAddr {
    Backend::listen().serve(|mut peer| {
        while let Ok(request) = peer.try_request() {
            let how = request.first_line.split(['?', ' ']).nth(2).unwrap().to_owned();
            let streams = matches!(
                how.as_str(),
                "innocent" | "full" | "tiny" | "comments" | "pieces" | "line" | "marks"
            );
            if streams && peer.try_send(STREAM).is_err() {
                return;
            }
            match how.as_str() {
                "innocent" => {
                    for nth in 1..=EVENTS {
                        std::thread::sleep(Duration::from_millis(3));
                        if peer.try_send(&chunk(token(&nth.to_string()))).is_err() {
                            return;
                        }
                    }
                    if peer.try_send(&[chunk(DONE), LAST_CHUNK.to_vec()].concat()).is_err() {
                        return;
                    }
                }
                "full" => endless(&mut peer, &chunk(token(&"x".repeat(1000)))),
                "tiny" => endless(&mut peer, &chunk("data\n\n".repeat(10_000))),
                "comments" => endless(&mut peer, &chunk(":\n\n".repeat(10_000))),
                "pieces" => {
                    endless(&mut peer, &token("x").bytes().flat_map(|byte| chunk([byte])).collect::<Vec<_>>())
                }
                "line" => endless(
                    &mut peer,
                    &chunk("data: xxxxxxxxxxxxxxxxxxxxxxxxxxxx".repeat(1000).replace('\n', "")),
                ),
                "marks" => {
                    if peer.try_send(&[chunk(token("a")), chunk(DONE)].concat()).is_ok() {
                        endless(&mut peer, &chunk(token("more")));
                    }
                }
                "extensions" => {
                    if peer.try_send(STREAM).is_ok() {
                        endless(&mut peer, format!("1;{}\r\nx\r\n", "e".repeat(200)).as_bytes());
                    }
                }
                "trailers" => {
                    if peer.try_send(&[STREAM, &chunk(token("a")), &chunk(DONE), b"0\r\n"].concat()).is_ok() {
                        endless(&mut peer, b"X: y\r\n");
                    }
                }
                "interim" => endless(&mut peer, b"HTTP/1.1 102 Processing\r\n\r\n"),
                "head" => {
                    if peer.try_send(b"HTTP/1.1 200 OK\r\nX: ").is_ok() {
                        endless(&mut peer, b"xxxxxxxx");
                    }
                }
                "after" => {
                    let whole = [STREAM, &chunk(token("a")), &chunk(DONE), LAST_CHUNK].concat();
                    if peer.try_send(&whole).is_ok() {
                        endless(&mut peer, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                    }
                }
                "silent" => {
                    let mut rest = Vec::new();
                    // Until the proxy lets go.
                    peer.stream.read_to_end(&mut rest).ok();
                    return;
                }
                _ => {
                    if peer.try_send(&ok(&how)).is_err() {
                        return;
                    }
                }
            }
        }
    })
}

/// Runs an attack again and again while innocent streams run beside it; each of them must be complete and in order.
fn beside_innocents(server: &Server, attack: impl Fn() + Sync) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let innocents: Vec<_> = (0..INNOCENTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = server.connect();
                    client.send(ask("innocent"));
                    client.stream_head();
                    for nth in 1..=EVENTS {
                        let event = client.event();
                        assert_eq!(
                            (event.id(), event.payload()),
                            (Some(nth), token(&nth.to_string()).into_bytes())
                        );
                    }
                    assert_eq!(client.event().data(), "[DONE]");
                    client.stream_end();
                })
            })
            .collect();
        let attacker = scope.spawn(|| {
            attack();
            while !over.load(Ordering::Relaxed) {
                attack();
            }
        });
        let results: Vec<_> = innocents.into_iter().map(|innocent| innocent.join()).collect();
        over.store(true, Ordering::Relaxed);
        attacker.join().unwrap();
        for result in results {
            result.unwrap();
        }
    });
}

/// Reads until that much has come or the other side closes; gives the end of it.
fn drink(client: &mut Peer, bytes: usize) -> String {
    let mut piece = vec![0; 1 << 16];
    let (mut so_far, mut end) = (0, Vec::new());
    while so_far < bytes {
        match client.stream.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                so_far += count;
                end.extend_from_slice(&piece[..count]);
                end.drain(..end.len().saturating_sub(2000));
            }
        }
    }
    String::from_utf8_lossy(&end).into_owned()
}

/// An attack by a backend that must end its stream in this way: what the client is told, and the reason counted.
fn backend_is_ended(how: &str, flags: &[&str], told: &str, reason: &str) {
    let server = Server::start(&[backend()], flags);
    let before_kib = server.resident_kib();
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send(ask(how));
        let end = drink(&mut client, usize::MAX);
        assert!(end.contains(told), "{how}: {end:?}");
    });
    server.wait_for_end(reason);
    server.wait_for_gauge("tokenring_overdraft_bytes", 0);
    assert!(
        server.resident_kib() < before_kib + 4 * 8192 + SLACK_KIB,
        "{how}: {} KiB",
        server.resident_kib()
    );
}

impl Server {
    #[track_caller]
    fn wait_for_end(&self, reason: &str) {
        let due = Instant::now() + SOON;
        while !self.ends().contains_key(reason) {
            assert!(Instant::now() < due, "streams ended {:?}, none by {reason}", self.ends());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn wait_for_gauge(&self, name: &str, value: u64) {
        let due = Instant::now() + SOON;
        while self.count(name) != value {
            assert!(Instant::now() < due, "{name} is {}, not {value}", self.count(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Proportional set size, KiB: what the process costs the machine.
    fn pss_kib(&self) -> u64 {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).unwrap();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap()
    }
}

#[test]
fn a_backend_with_an_endless_line() {
    backend_is_ended("line", &["--event-bytes-max", "1MiB"], "upstream_malformed", "upstream_malformed");
}

#[test]
fn a_backend_with_endless_interim_answers() {
    backend_is_ended("interim", &[], "upstream_malformed", "upstream_malformed");
}

#[test]
fn a_backend_with_an_endless_head() {
    backend_is_ended("head", &[], "upstream_malformed", "upstream_malformed");
}

#[test]
fn a_backend_with_more_chunk_extensions_than_payload() {
    backend_is_ended("extensions", &[], "upstream_malformed", "upstream_malformed");
}

/// All the client is owed has come, so it gets its end.
#[test]
fn a_backend_with_endless_trailers() {
    backend_is_ended("trailers", &[], "0\r\n\r\n", "done");
}

#[test]
fn a_backend_that_goes_on_after_its_end() {
    // What it says while a request is on its way to it cannot be told from an answer: such a backend must not be reused.
    let server = Server::start(&[backend()], &["--pool-idle-max", "0"]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send(ask("after"));
        client.stream_head();
        assert_eq!(client.events().len(), 2);
    });
    server.expect_count("tokenring_upstream_surplus_total", 1);
}

#[test]
fn a_backend_that_goes_on_after_its_end_mark() {
    let server = Server::start(&[backend()], &["--finish-ms", "200"]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send(ask("marks"));
        client.stream_head();
        assert_eq!(client.events().len(), 2);
    });
    server.expect_count("tokenring_upstream_surplus_total", 1000);
    server.expect_count("tokenring_upstream_unclean_ends_total", 1);
}

/// Comments are no tokens: the model's clock runs on, however many there are.
#[test]
fn a_backend_with_endless_comments() {
    let server = Server::start(&[backend()], &["--first-token-ms", "500"]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send(ask("comments"));
        assert!(drink(&mut client, usize::MAX).contains("first_token_timeout"));
    });
    server.wait_for_end("first_token_timeout");
    server.expect_count("tokenring_receives_deferred_total", 1);
}

/// Legal, so they go on; but in turns.
#[test]
fn backends_with_endless_tiny_events_or_chunks() {
    for how in ["tiny", "pieces"] {
        let server = Server::start(&[backend()], &["--on-leave", "cancel"]);
        let before_kib = server.resident_kib();
        beside_innocents(&server, || {
            let mut clients: Vec<_> = (0..4).map(|_| server.connect()).collect();
            for client in &mut clients {
                client.send(ask(how));
            }
            for client in &mut clients {
                drink(client, 4 << 20);
            }
        });
        server.expect_count("tokenring_receives_deferred_total", 1);
        server.wait_for_gauge("tokenring_connections", 0);
        server.wait_for_gauge("tokenring_log_bytes", 0);
        assert!(
            server.resident_kib() < before_kib + 4 * 4096 + SLACK_KIB,
            "{how}: {} KiB",
            server.resident_kib()
        );
    }
}

#[test]
fn an_upload_in_one_byte_chunks() {
    let server = Server::start(&[backend()], &["--body-bytes-max", "1MiB"]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send("POST /?fine HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        endless(&mut client, b"1\r\nx\r\n");
        let (said, _) = client.rest();
        assert!(String::from_utf8_lossy(&said).contains("body_too_large"));
    });
    server.expect_count("tokenring_receives_deferred_total", 1);
    server.wait_for_end("refused");
}

#[test]
fn uploads_with_more_extensions_or_trailers_than_payload() {
    let server = Server::start(&[backend()], &[]);
    beside_innocents(&server, || {
        for (start, piece, code) in [
            ("", format!("1;{}\r\nx\r\n", "e".repeat(200)), "chunk_excess"),
            ("0\r\n", "X: y\r\n".to_owned(), "trailers_too_large"),
        ] {
            let mut client = server.connect();
            client.send(format!(
                "POST /?fine HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{start}"
            ));
            endless(&mut client, piece.as_bytes());
            let (said, _) = client.rest();
            assert!(String::from_utf8_lossy(&said).contains(code), "{said:?}");
        }
    });
}

#[test]
fn floods_of_header_fields() {
    let server = Server::start(&[backend()], &[]);
    beside_innocents(&server, || {
        for (piece, code) in [("X: y\r\n", "too_many_headers"), ("xxxxxxxx", "head_too_large")] {
            let mut client = server.connect();
            client.send("GET / HTTP/1.1\r\nHost: a\r\nX: ");
            endless(&mut client, piece.as_bytes());
            let (said, _) = client.rest();
            assert!(String::from_utf8_lossy(&said).contains(code), "{said:?}");
        }
    });
    server.expect_count("tokenring_refusals_total", 2);
}

/// A crowd of clients that drip bytes, each until it is told off.
fn drips(server: &Server, start: &str, drop: &str, status: u16) {
    let mut crowd: Vec<_> = (0..100).map(|_| server.connect()).collect();
    for client in &mut crowd {
        client.send(start);
    }
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(300) {
        for client in &mut crowd {
            // Those that were answered early are not listening any more.
            client.try_send(drop.as_bytes()).ok();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for client in &mut crowd {
        assert_eq!(client.response().status(), status);
    }
}

#[test]
fn crowds_of_slow_heads_and_bodies() {
    let server = Server::start(&[backend()], &["--head-ms", "400", "--body-ms", "400"]);
    beside_innocents(&server, || drips(&server, "GET / HTTP/1.1\r\nHost: a\r\n", "X: y\r\n", 408));
    beside_innocents(&server, || {
        drips(&server, "POST /?fine HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\n", "x", 408);
    });
    server.wait_for_end("head_timeout");
    server.wait_for_end("body_timeout");
}

#[test]
fn a_head_in_segments_of_one_byte_is_served() {
    let server = Server::start(&[backend()], &[]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        client.send_bytewise(&get("/?fine"));
        assert_eq!(client.response().text(), "fine");
    });
}

#[test]
fn connects_without_a_request() {
    let server = Server::start(&[backend()], &["--keep-alive-ms", "300"]);
    beside_innocents(&server, || {
        let mut crowd: Vec<_> = (0..200).map(|_| server.connect()).collect();
        for client in &mut crowd {
            assert_eq!(client.closed(), Closed::Fin);
        }
    });
    server.expect_count("tokenring_keep_alive_closes_total", 200);
    server.expect_count("tokenring_closes_unused_total", 200);
}

#[test]
fn connects_and_resets() {
    let server = Server::start(&[backend()], &[]);
    beside_innocents(&server, || {
        for nth in 0..200 {
            let mut client = server.connect();
            if nth % 2 == 1 {
                client.send("GET / HT");
            }
            client.reset();
        }
    });
    server.wait_for_gauge("tokenring_connections", 0);
    server.expect_count("tokenring_closes_unused_total", 200);
    server.expect_ends(&[("done", INNOCENTS as u64)]);
    assert_eq!(server.count("tokenring_accepts_total"), server.count("tokenring_closes_total"));
}

#[test]
fn requests_that_are_refused_again_and_again() {
    let server = Server::start(&[backend()], &[]);
    beside_innocents(&server, || {
        let mut client = server.connect();
        // More than are answered; those behind are not looked at.
        client.send("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(500));
        for nth in 1..=100 {
            let response = client.response();
            assert_eq!(response.status(), 405);
            assert_eq!(response.field("connection").as_deref() == Some("close"), nth == 100, "{nth}");
        }
        assert_eq!(client.closed(), Closed::Fin);
    });
    server.expect_count("tokenring_refusal_closes_total", 1);
}

#[test]
fn floods_of_pipelined_requests() {
    const REQUESTS: usize = 5000;
    let server = Server::start(&[backend()], &["--write-stall-ms", "500"]);
    let flood: String = (0..REQUESTS).map(|nth| format!("GET /?{nth} HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
    beside_innocents(&server, || {
        let mut client = server.connect();
        let mut writer = Peer::new(client.stream.try_clone().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| writer.send(&flood));
            for nth in 0..REQUESTS {
                assert_eq!(client.response().text(), nth.to_string(), "in order, each once");
            }
        });
    });
    // One that never reads its answers is cut off.
    let mut client = server.connect();
    client.receive_little();
    client.send_until_stuck(flood.as_bytes(), Duration::from_secs(2), usize::MAX);
    server.wait_for_end("write_stall");
}

/// What is kept of pipelined requests is bounded, by the overdraft of all.
#[test]
fn pipelined_bytes_beyond_all_budgets_are_dropped_and_the_connection_closes() {
    let backend = Backend::listen();
    let flags = ["--head-bytes-max", "2KiB", "--target-bytes-max", "256", "--event-bytes-max", "1KiB"];
    let server = Server::before(&backend, &[&flags[..], &["--overdraft-bytes-max", "8KiB"]].concat());
    let mut client = server.connect();
    client.send(get("/first"));
    let (mut upstream, _) = backend.request();
    client.send_until_stuck(&get("/more").repeat(10_000), Duration::from_secs(2), 2 << 20);
    server.expect_count("tokenring_overdrafts_refused_total", 1);
    upstream.send(ok("one"));
    assert_eq!(client.response().text(), "one");
    let (rest, _) = client.rest();
    assert!(rest.is_empty(), "nothing but the answer to the first: {rest:?}");
    server.wait_for_gauge("tokenring_overdraft_bytes", 0);
    backend.was_left_alone();
}

/// Events that are allowed one by one must not add up to more than the shard may hold.
#[test]
fn large_partial_events_of_many_backends_have_one_budget() {
    const STREAMS: usize = 30;
    let backend = Backend::listen();
    let flags = ["--event-bytes-max", "512KiB", "--overdraft-bytes-max", "4MiB"];
    let server = Server::before(&backend, &flags);
    let mut streams = Vec::new();
    let half = [b"7a120\r\ndata: ".as_slice(), &vec![b'x'; 400_000]].concat();
    for _ in 0..STREAMS {
        let (client, mut upstream) = crate::events::streaming(&server, &backend, &crate::server::chat());
        // Those that are refused are hung up on.
        upstream.try_send(&half).ok();
        streams.push((client, upstream));
    }
    server.expect_count("tokenring_overdrafts_refused_total", 1);
    let mut refused = 0;
    for (client, _) in &mut streams {
        client.stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        if let Ok(Some(event)) = client.try_event() {
            assert_eq!(event.error_code(), "overload");
            client.stream_end();
            refused += 1;
        }
    }
    assert_eq!(server.count("tokenring_overdrafts_refused_total"), refused);
    assert!(refused >= 10 && refused < STREAMS as u64, "{refused} of {STREAMS} found no room");
    assert!(server.count("tokenring_overdraft_bytes") <= 4 << 20);
    server.expect_ends(&[("overload", refused)]);
    // What was given back can be had again.
    drop(streams);
    server.wait_for_gauge("tokenring_overdraft_bytes", 0);
    let (mut client, mut upstream) = crate::events::streaming(&server, &backend, &crate::server::chat());
    let large = token(&"x".repeat(500_000));
    upstream.send(chunk(&large));
    assert_eq!(client.event().payload(), large.as_bytes());
}

/// The backends of clients that do not read are paused, and what is held for all of them stays within what the settings
/// allow, as computed.
#[test]
fn a_thousand_stuck_readers_cost_no_more_than_computed() {
    const READERS: usize = 1000;
    let flags = ["--conns-max", "1100", "--event-bytes-max", "1MiB", "--overdraft-bytes-max", "16MiB"];
    let server = Server::start(&[backend()], &[&flags[..], &["--on-leave", "cancel"]].concat());
    let computed_kib = server.count("tokenring_memory_worst_case_bytes") / 1024;
    let mut crowd = Vec::new();
    for nth in 0..READERS {
        let mut client = server.connect_little(1000);
        client.send(ask(if nth % 10 == 0 { "tiny" } else { "full" }));
        crowd.push(client);
    }
    server.expect_count("tokenring_pauses_total", READERS as u64 * 9 / 10);
    beside_innocents(&server, || {
        let pss_kib = server.pss_kib();
        assert!(pss_kib < computed_kib, "{pss_kib} KiB, computed {computed_kib} KiB");
        let overdraft = server.count("tokenring_overdraft_bytes");
        assert!(overdraft <= (16 << 20) + (1 << 20), "{overdraft} bytes of overdraft");
    });
    let ends = server.ends();
    assert!(ends.keys().all(|reason| reason == "done" || reason == "overload"), "{ends:?}");
    drop(crowd);
    server.wait_for_gauge("tokenring_connections", 0);
    server.wait_for_gauge("tokenring_overdraft_bytes", 0);
    server.wait_for_gauge("tokenring_log_bytes", 0);
}
