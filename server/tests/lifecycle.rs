//! The running process: admin pages, drain, signals, exit codes.

mod common;

use common::Server;
use rustix::process::Signal;
use std::io::Read;
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
fn reserved_signals_are_ignored() {
    let server = Server::start(&[]);
    for signal in [Signal::HUP, Signal::USR1, Signal::USR2] {
        server.signal(signal);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(server.get("/ready").0, 200);
    server.signal(Signal::TERM);
    let (code, log) = server.wait();
    assert_eq!(code, 0);
    assert_eq!(log.matches("is reserved and ignored").count(), 3, "{log}");
}

#[test]
fn without_a_resolved_upstream_it_is_not_ready() {
    let server = Server::start(&["--upstream", "http://no-such-name.invalid:1"]);
    let (status, page) = server.get("/ready");
    assert_eq!(status, 503);
    assert!(page.contains("\"no_upstream\""), "{page}");
}
