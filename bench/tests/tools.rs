//! The tools against each other: a clean run is clean, directly and through the relay, plain and with TLS, and every fault is
//! seen as what it is.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not take for tests")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
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

/// Certificates by bench/certificates, gone with the test.
struct Certificates(PathBuf);

impl Certificates {
    fn new(test: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("tokenring-tools-{}-{test}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/certificates");
        assert!(Command::new(script).arg(&directory).status().unwrap().success(), "openssl is needed");
        Self(directory)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn backend(&self) -> Server {
        let (chain, key) = (self.path("chain.pem"), self.path("key.pem"));
        Server::start(env!("CARGO_BIN_EXE_fake-backend"), &["--tls-cert", &chain, "--tls-key", &key])
    }

    /// The flags of a client that trusts them.
    fn trusted(&self) -> String {
        format!("--tls --ca {}", self.path("ca.pem"))
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn clean_runs_are_clean_directly_and_through_the_relay() {
    let backend = Server::backend();
    clean_runs_are_clean(&[&backend, &backend.relay()], "");
}

#[test]
fn clean_runs_are_clean_with_tls() {
    let certificates = Certificates::new("clean");
    let backend = certificates.backend();
    // The relay knows nothing of TLS: it passes records on as it does anything.
    clean_runs_are_clean(&[&backend, &backend.relay()], &certificates.trusted());
}

fn clean_runs_are_clean(servers: &[&Server], more: &str) {
    for server in servers {
        for (arguments, complete, events) in [
            ("--streams 20 --rate 200 --events 20", 20, 400),
            ("--streams 20 --rate 200 --events 20 --place header --path /v1/completions", 20, 400),
            ("--streams 20 --rate 200 --events 20 --place query --path /v1/messages", 20, 400),
            ("--streams 8 --burst --events 5000", 8, 40_000),
            ("--streams 8 --burst --events 100 --params write=1", 8, 800),
            ("--streams 8 --burst --events 10 --payload 100000", 8, 80),
        ] {
            let (code, result) = server.load(&format!("{arguments} {more}"));
            assert_eq!(code, 0, "{arguments}: {result}");
            assert_eq!(
                (&result["complete"], &result["events"]),
                (&complete.into(), &events.into()),
                "{arguments}"
            );
        }
        let (code, result) = server.load(&format!("--streams 4 --short --duration 0.2 {more}"));
        assert_eq!(code, 0, "{result}");
        assert!(result["complete"].as_u64().unwrap() > 8, "connections are used again: {result}");
        let (code, result) = server.load(&format!("--streams 20 --idle 0.2 {more}"));
        assert_eq!((code, &result["left"]), (0, &20.into()), "{result}");
        let (code, result) = server.load(&format!("--streams 30 --leave 1 --rate 500 --events 50 {more}"));
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
    every_fault_is_seen(&Server::backend(), "");
}

#[test]
fn every_fault_is_seen_as_what_it_is_with_tls() {
    let certificates = Certificates::new("faults");
    every_fault_is_seen(&certificates.backend(), &certificates.trusted());
}

fn every_fault_is_seen(backend: &Server, more: &str) {
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
        let arguments = format!("--streams 2 --rate 500 --events 10 --grace 0.5 --params {params} {more}");
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
    let (code, result) = backend.load(&format!("--streams 2 --rate 500 --events 10 --params reset=5 {more}"));
    assert_eq!((code, &result["faults"]["reset"]), (1, &2.into()), "{result}");
    let arguments = "--streams 2 --rate 500 --events 10 --params cut=5 --allow lost,truncated";
    let (code, _) = backend.load(&format!("{arguments} {more}"));
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

#[test]
fn handshakes_are_full_or_resumed_as_asked_for() {
    let certificates = Certificates::new("handshakes");
    let backend = certificates.backend();
    let trusted = certificates.trusted();
    let fresh = format!("--streams 4 --burst --events 1 --loop --fresh --duration 0.3 {trusted}");
    for (more, resumed) in [("", false), (" --resume", true)] {
        let (code, result) = backend.load(&format!("{fresh}{more}"));
        assert_eq!(code, 0, "{result}");
        let handshakes = &result["handshakes"];
        let count = |kind: &str| handshakes[kind].as_u64().unwrap();
        assert_eq!(count("full") + count("resumed"), result["complete"].as_u64().unwrap(), "{result}");
        // The first ones know no ticket yet.
        assert!(if resumed { count("resumed") > count("full") } else { count("resumed") == 0 }, "{result}");
        assert!(handshakes["took"]["count"].as_u64().unwrap() > 0, "{result}");
        let terms: Vec<_> = handshakes["agreed"].as_object().unwrap().keys().collect();
        assert_eq!(terms, ["TLSv1_3 TLS13_AES_256_GCM_SHA384 X25519"]);
    }
    let (_, result) = backend.load(&format!("--streams 4 --short --duration 0.2 {trusted}"));
    assert_eq!(result["handshakes"]["full"], 4, "kept connections need no new handshake: {result}");
}

#[test]
fn who_is_not_trusted_is_told() {
    let certificates = Certificates::new("trust");
    let backend = certificates.backend();
    let streams = "--streams 2 --rate 500 --events 10";
    let stranger = format!("{streams} --tls --ca {}", certificates.path("stranger.pem"));
    let trusted = format!("{streams} {}", certificates.trusted());
    let (code, result) = backend.load(&format!("{trusted} --server-name localhost"));
    assert_eq!(code, 0, "{result}");
    for arguments in [stranger, format!("{trusted} --server-name elsewhere")] {
        let (code, result) = backend.load(&arguments);
        assert_eq!((code, &result["faults"]["tls"]), (1, &2.into()), "{arguments}: {result}");
        assert_eq!(result["complete"], 0, "{arguments}: {result}");
    }
    let (code, result) = backend.load(streams);
    assert_eq!((code, &result["complete"]), (1, &0.into()), "plain to a TLS port: {result}");
}
