//! The tools against each other: a clean run is clean, directly and through the relay, and every fault is seen as what it is.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not take for tests")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A tool that listens, ended with the test.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(program: &str, more: &[&str]) -> Self {
        // Free a moment ago; the tools take an address, not a listener.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child =
            Command::new(program).arg("--listen").arg(address.to_string()).args(more).spawn().unwrap();
        let server = Self { child, address };
        for _ in 0..200 {
            if TcpStream::connect(address).is_ok() {
                return server;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        panic!("{program} does not listen");
    }

    fn backend() -> Self {
        Self::start(env!("CARGO_BIN_EXE_fake-backend"), &[])
    }

    fn relay(&self) -> Self {
        Self::start(env!("CARGO_BIN_EXE_bare-relay"), &["--upstream", &self.address.to_string()])
    }

    /// Runs the load generator against it: the exit code and the result.
    fn load(&self, arguments: &str) -> (i32, Value) {
        let output = Command::new(env!("CARGO_BIN_EXE_load"))
            .args(["--json", "--target", &self.address.to_string()])
            .args(arguments.split_whitespace())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        let line: Value = serde_json::from_slice(&output.stdout).expect("one line of JSON");
        (output.status.code().unwrap(), line["result"].clone())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn clean_runs_are_clean_directly_and_through_the_relay() {
    let backend = Server::backend();
    let relay = backend.relay();
    for server in [&backend, &relay] {
        for (arguments, complete, events) in [
            ("--streams 20 --rate 200 --events 20", 20, 400),
            ("--streams 20 --rate 200 --events 20 --place header --path /v1/completions", 20, 400),
            ("--streams 20 --rate 200 --events 20 --place query --path /v1/messages", 20, 400),
            ("--streams 8 --burst --events 5000", 8, 40_000),
            ("--streams 8 --burst --events 100 --params write=1", 8, 800),
            ("--streams 8 --burst --events 10 --payload 100000", 8, 80),
        ] {
            let (code, result) = server.load(arguments);
            assert_eq!(code, 0, "{arguments}: {result}");
            assert_eq!(
                (&result["complete"], &result["events"]),
                (&complete.into(), &events.into()),
                "{arguments}"
            );
        }
        let (code, result) = server.load("--streams 4 --short --duration 0.2");
        assert_eq!(code, 0, "{result}");
        assert!(result["complete"].as_u64().unwrap() > 8, "connections are used again: {result}");
        let (code, result) = server.load("--streams 20 --idle 0.2");
        assert_eq!((code, &result["left"]), (0, &20.into()), "{result}");
        let (code, result) = server.load("--streams 30 --leave 1 --rate 500 --events 50");
        assert_eq!(code, 0, "{result}");
        assert!(result["left"].as_u64().unwrap() > 0, "{result}");
    }
}

#[test]
fn stuck_readers_get_everything_once_they_read_again() {
    let backend = Server::backend();
    let relay = backend.relay();
    let (code, result) =
        relay.load("--streams 6 --stuck 3 --burst --loop --events 40000 --duration 0.3 --grace 30");
    assert_eq!(code, 0, "{result}");
    assert_eq!(result["left"], 0);
    assert_eq!(result["complete"], result["streams"]);
}

#[test]
fn every_fault_is_seen_as_what_it_is() {
    let backend = Server::backend();
    for (params, expected) in [
        ("cut=5", "lost 10 truncated 2"),
        ("half=5", "lost 10 truncated 2"),
        ("garbage=5", "lost 10 truncated 2 malformed 2"),
        ("nodone=5", "lost 10 truncated 2 silent 2"),
        ("nodone=10", "truncated 2 silent 2"),
        ("error=5", "lost 10 truncated 2 error_events 2"),
        ("stall=5", "lost 10 unfinished 2"),
        ("status=503", "status 2"),
        ("events=11&stream=99", "foreign 22 lost 20"),
    ] {
        let arguments = format!("--streams 2 --rate 500 --events 10 --grace 0.5 --params {params}");
        let (code, result) = backend.load(&arguments);
        assert_eq!(code, 1, "{params}: {result}");
        let mut seen: Vec<String> = result["faults"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, count)| **count != 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let words: Vec<&str> = expected.split(' ').collect();
        let mut expected: Vec<String> = words.chunks(2).map(|pair| pair.join(" ")).collect();
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected, "{params}");
    }
    let (code, result) = backend.load("--streams 2 --rate 500 --events 10 --params reset=5");
    assert_eq!((code, &result["faults"]["reset"]), (1, &2.into()), "{result}");
    let (code, _) = backend.load("--streams 2 --rate 500 --events 10 --params cut=5 --allow lost,truncated");
    assert_eq!(code, 0);
}

#[test]
fn a_backend_that_is_not_there_is_told() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_load"))
        .args(["--json", "--streams", "2", "--target", &address.to_string()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["result"]["faults"]["connect"], 2);
}
