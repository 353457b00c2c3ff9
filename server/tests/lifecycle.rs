//! The running process: admin pages, drain, signals, exit codes.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod common;

use common::Server;
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

#[test]
fn the_banner_and_the_admin_pages() {
    let server = Server::start(&[]);
    assert!(server.banner.contains("built-in demo model"), "{}", server.banner);
    assert_eq!(server.get("/live").0, 200);
    assert_eq!(server.get("/ready").0, 200);
    assert_eq!(server.get("/none").0, 404);
    let _stream = server.begin_stream();
    let (status, page) = server.get("/metrics");
    assert_eq!(status, 200);
    assert!(page.contains("tokenring_streams{shard=\"0\",phase=\"streaming\"} 1\n"), "{page}");
    let (status, page) = server.get("/status");
    assert_eq!(status, 200);
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    assert_eq!(page["streams"]["streaming"], 1);
    assert_eq!(page["shards"][0]["connections"], 1);
    assert_eq!(page["listen"][0], server.client.to_string());
}

#[test]
fn an_idle_server_drains_at_once_and_in_peace() {
    let server = Server::start(&[]);
    server.signal(Signal::TERM);
    let (code, log) = server.wait();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("all streams ended in peace"), "{log}");
}

#[test]
fn while_draining_it_is_not_ready_and_the_deadline_forces_streams() {
    let server = Server::start(&["--drain-deadline-ms", "700"]);
    let mut stream = server.begin_stream();
    server.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(200));
    let (status, page) = server.get("/ready");
    assert_eq!(status, 503);
    assert!(page.contains("\"draining\""), "{page}");
    assert_eq!(server.get("/live").0, 200);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"error\"") && !rest.contains("[DONE]"), "{rest}");
    let (code, log) = server.wait();
    assert_eq!(code, 1, "{log}");
}

#[test]
fn a_second_signal_ends_streams_now() {
    let server = Server::start(&["--drain-deadline-ms", "600000"]);
    let _stream = server.begin_stream();
    server.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(200));
    server.signal(Signal::TERM);
    let (code, log) = server.wait();
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("second signal"), "{log}");
}

#[test]
fn quit_dumps_the_state_and_stops() {
    let server = Server::start(&[]);
    let _stream = server.begin_stream();
    server.signal(Signal::QUIT);
    let (code, log) = server.wait();
    assert_eq!(code, 1, "{log}");
    let dump = &log[log.find("\n{").unwrap()..=log.rfind("\n}").unwrap() + 1];
    let dump: serde_json::Value = serde_json::from_str(dump).unwrap();
    assert_eq!(dump["streams"]["streaming"], 1);
}

#[test]
fn signals_without_a_meaning_are_ignored() {
    let server = Server::start(&[]);
    for signal in [Signal::HUP, Signal::USR1, Signal::USR2] {
        server.signal(signal);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(server.get("/ready").0, 200);
    server.signal(Signal::TERM);
    let (code, log) = server.wait();
    assert_eq!(code, 0);
    assert_eq!(log.matches("is reserved and ignored").count(), 2, "{log}");
    assert!(log.contains("nothing to read again: neither a listener nor an upstream speaks TLS"), "{log}");
}

#[test]
fn without_a_resolved_upstream_it_is_not_ready() {
    let server = Server::start(&["--upstream", "http://no-such-name.invalid:1"]);
    let (status, page) = server.get("/ready");
    assert_eq!(status, 503);
    assert!(page.contains("\"no_upstream\""), "{page}");
}

/// A full pipe blocks the writer of logs, and nothing else; what does not fit into its queue is counted.
#[test]
fn a_reader_of_logs_that_is_stuck_stops_nothing() {
    const REQUESTS: usize = 12_000;
    let server = Server::start(&["--access-log", "on"]);
    let mut socket = TcpStream::connect(server.client).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut reader = socket.try_clone().unwrap();
    let answers = std::thread::spawn(move || {
        let (mut seen, mut buffer, mut rest) = (0, vec![0; 65_536], Vec::new());
        while seen < REQUESTS {
            let read = reader.read(&mut buffer).unwrap();
            assert!(read > 0, "closed after {seen}");
            rest.extend_from_slice(&buffer[..read]);
            seen += rest.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
            rest.drain(..rest.len().saturating_sub(8));
        }
    });
    for _ in 0..REQUESTS {
        socket.write_all(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    }
    answers.join().unwrap();
    let (_, page) = server.get("/metrics");
    let dropped =
        page.lines().find_map(|line| line.strip_prefix("tokenring_log_lines_dropped_total ")).unwrap();
    assert!(dropped.parse::<u64>().unwrap() > 0, "{dropped}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0, 0);
}
