//! The tools for streams with many readers and for appends: a clean run is clean, and every fault is seen as what it is.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not take for tests")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bench::mark::Mark;
use serde_json::Value;

/// Runs a tool: the exit code and the result.
fn run(program: &str, arguments: &str) -> (i32, Value) {
    let output = Command::new(program)
        .arg("--json")
        .args(arguments.split_whitespace())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let line: Value = serde_json::from_slice(&output.stdout).expect("one line of JSON");
    (output.status.code().unwrap(), line["result"].clone())
}

fn fanout(arguments: &str) -> (i32, Value) {
    {
        let window = if arguments.contains("--duration") { "" } else { "--duration 0.3" };
        run(env!("CARGO_BIN_EXE_fanout"), &format!("--warmup 0.1 {window} {arguments}"))
    }
}

fn faults(result: &Value) -> HashMap<String, u64> {
    let counts = result["faults"].as_object().unwrap().iter();
    counts
        .map(|(name, count)| (name.clone(), count.as_u64().unwrap()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Ended with the test.
struct Bare(Child);

impl Drop for Bare {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn every_reader_of_the_bare_fanout_gets_every_event() {
    let (readers, publishers) = (free(), free());
    let command = format!("--listen {readers} --publish {publishers}");
    let _bare =
        Bare(Command::new(env!("CARGO_BIN_EXE_bare-fanout")).args(command.split(' ')).spawn().unwrap());
    while TcpStream::connect(publishers).is_err() {
        std::thread::sleep(Duration::from_millis(25));
    }
    // Twice: a publisher and readers that left are in nobody's way.
    for _ in 0..2 {
        let (code, result) =
            fanout(&format!("--target {readers} --raw {publishers} --readers 50 --rate 100"));
        assert_eq!(code, 0, "{result}");
        assert_eq!((&result["complete"], &result["events"]), (&50.into(), &2000.into()), "{result}");
        assert!(
            result["added"]["count"].as_u64().unwrap() > 0
                && result["answered"]["count"].as_u64().unwrap() > 0
        );
    }
}

/// Which events come in an event's place, by their sequence numbers.
type Change = fn(u64) -> Vec<u64>;

/// Gives each event to one reader as `change` says.
fn tampering(change: Change) -> (SocketAddr, SocketAddr) {
    let readers = TcpListener::bind("127.0.0.1:0").unwrap();
    let publishers = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = (readers.local_addr().unwrap(), publishers.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut publisher, _) = publishers.accept().unwrap();
        let (mut reader, _) = readers.accept().unwrap();
        reader.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        let mut piece = [0; 4096];
        loop {
            let count = publisher.read(&mut piece).unwrap_or(0);
            let Some(mark) = Mark::decode(&piece[..count]) else { break };
            publisher.write_all(b"+").unwrap();
            for sequence in change(mark.sequence) {
                let mut event = Vec::new();
                Mark { sequence, ..mark }.encode(&mut event);
                // In two pieces, so that a mark is put together again.
                for half in [&event[..5], &event[5..]] {
                    reader.write_all(half).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    });
    addresses
}

#[test]
fn what_is_lost_doubled_or_reordered_is_told() {
    let cases: [(Change, &[(&str, u64)]); 4] = [
        (|sequence| vec![sequence], &[]),
        (|sequence| if sequence == 5 { vec![] } else { vec![sequence] }, &[("lost", 1)]),
        (|sequence| if sequence == 5 { vec![5, 5] } else { vec![sequence] }, &[("doubled", 1)]),
        (
            |sequence| match sequence {
                5 => vec![],
                6 => vec![6, 5],
                other => vec![other],
            },
            &[("reordered", 1)],
        ),
    ];
    for (change, expected) in cases {
        let (readers, publishers) = tampering(change);
        let (code, result) =
            fanout(&format!("--target {readers} --raw {publishers} --readers 1 --rate 50 --grace 5"));
        let expected = expected.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        assert_eq!(faults(&result), expected, "{result}");
        assert_eq!(code, i32::from(!faults(&result).is_empty()), "{result}");
    }
}

/// Gives every reader the events behind the one that its `Last-Event-ID` names, or so many behind that.
fn replaying(shift: usize) -> (SocketAddr, SocketAddr) {
    let readers = TcpListener::bind("127.0.0.1:0").unwrap();
    let publishers = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = (readers.local_addr().unwrap(), publishers.local_addr().unwrap());
    let events: &'static std::sync::Mutex<Vec<Vec<u8>>> = Box::leak(Box::default());
    std::thread::spawn(move || {
        let (mut publisher, _) = publishers.accept().unwrap();
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = publisher.read(&mut piece) {
            let mut events = events.lock().unwrap();
            let id = format!("id: {}\n", events.len() + 1);
            events.push([id.as_bytes(), &piece[..count]].concat());
            publisher.write_all(b"+").unwrap();
        }
    });
    std::thread::spawn(move || {
        for socket in readers.incoming() {
            std::thread::spawn(move || {
                let mut socket = socket.unwrap();
                let mut head = [0; 4096];
                let count = socket.read(&mut head).unwrap();
                let head = String::from_utf8_lossy(&head[..count]).into_owned();
                let cursor = head.lines().find_map(|line| line.strip_prefix("Last-Event-ID: "));
                let mut at = cursor.map_or(0, |id| id.parse::<usize>().unwrap() + shift);
                socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
                loop {
                    let new = events.lock().unwrap().get(at..).unwrap_or_default().concat();
                    at += new.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"id: ")).count();
                    if socket.write_all(&new).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
    });
    addresses
}

#[test]
fn those_who_come_back_are_timed_and_get_what_they_missed() {
    for how in ["--returns 40", "--storm 20"] {
        for shift in [0, 1] {
            let (readers, publishers) = replaying(shift);
            let arguments = format!(
                "--target {readers} --raw {publishers} --readers 2 --rate 100 --behind 5 --duration 0.5 {how}"
            );
            let (code, result) = fanout(&arguments);
            assert_eq!(code, i32::from(shift > 0), "{result}");
            if shift == 0 {
                assert_eq!(result["caught_up"]["count"], 20, "{result}");
                assert_eq!(result["first_event"]["count"], 20, "{result}");
            } else {
                assert_eq!(faults(&result)["lost"], 20, "{result}");
            }
        }
    }
}

/// A server of the protocol for one stream per path, which loses the messages that `loses` names.
fn durable(loses: fn(usize) -> bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let streams: &'static std::sync::Mutex<HashMap<String, (usize, Vec<u8>)>> = Box::leak(Box::default());
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut writer = socket.unwrap();
            let mut reader = BufReader::new(writer.try_clone().unwrap());
            std::thread::spawn(move || {
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
                    let words: Vec<String> = line.split([' ', '?']).map(str::to_owned).collect();
                    let mut length = 0;
                    loop {
                        line.clear();
                        reader.read_line(&mut line).unwrap();
                        if let Some(value) = line.strip_prefix("Content-Length: ") {
                            length = value.trim().parse().unwrap();
                        }
                        if line == "\r\n" {
                            break;
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    let answer = {
                        let mut streams = streams.lock().unwrap();
                        let (appends, bytes) = streams.entry(words[1].clone()).or_default();
                        match (words[0].as_str(), words[2].as_str()) {
                            ("GET", "offset=-1") => [
                                format!("HTTP/1.1 200 OK\r\nStream-Next-Offset: end\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes(),
                                bytes,
                            ]
                            .concat(),
                            ("GET", _) => b"HTTP/1.1 200 OK\r\nStream-Next-Offset: end\r\nContent-Length: 0\r\n\r\n".to_vec(),
                            ("POST", _) => {
                                *appends += 1;
                                if !loses(*appends) {
                                    bytes.extend_from_slice(&body);
                                }
                                b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()
                            }
                            _ => b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n".to_vec(),
                        }
                    };
                    writer.write_all(&answer).unwrap();
                    line.clear();
                }
            });
        }
    });
    address
}

#[test]
fn what_was_acknowledged_must_be_there() {
    for (loses, expected) in [((|_| false) as fn(usize) -> bool, 0), (|append| append == 3, 3)] {
        let target = durable(loses);
        let arguments = format!("--target {target} --publishers 3 --warmup 0 --duration 0.2");
        let (code, result) = run(env!("CARGO_BIN_EXE_append"), &arguments);
        assert!(result["events"].as_u64().unwrap() > 9, "{result}");
        assert_eq!(
            (code, faults(&result).get("lost").copied().unwrap_or(0)),
            (i32::from(expected > 0), expected)
        );
        assert!(result["answered"]["count"].as_u64().unwrap() > 0, "{result}");
    }
}
