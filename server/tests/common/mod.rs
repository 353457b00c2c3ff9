//! Starts the built binary and talks to it, for the tests of this crate.
#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// The binary, without the settings of whoever runs the tests.
pub(crate) fn tokenring() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenring"));
    for (name, _) in std::env::vars() {
        if name.starts_with("TOKENRING_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// Runs it to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    tokenring().args(arguments).output().unwrap()
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running server; killed when the test fails.
pub(crate) struct Server {
    child: Option<Child>,
    pub(crate) client: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) banner: String,
}

impl Server {
    /// Starts one on free ports and waits for its banner.
    pub(crate) fn start(arguments: &[&str]) -> Server {
        let mut child = tokenring()
            .args([
                "--listen",
                "127.0.0.1:0",
                "--admin",
                "127.0.0.1:0",
                "--shards",
                "1",
                "--conns-max",
                "100",
            ])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut banner = String::new();
        let (mut client, mut admin) = (None, None);
        while !banner.contains("curl") {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap() == 0 {
                let output = child.wait_with_output().unwrap();
                panic!("no banner, {}: {}", output.status, stderr(&output));
            }
            let address = |line: &str| line.rsplit("http://").next().unwrap().trim().parse().unwrap();
            if line.contains("listening") {
                client = Some(address(&line));
            } else if line.contains("admin") {
                admin = Some(address(&line));
            }
            banner.push_str(&line);
        }
        Server { child: Some(child), client: client.unwrap(), admin: admin.unwrap(), banner }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Its exit code and what it wrote to stderr.
    pub(crate) fn wait(mut self) -> (i32, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        (code(&output), stderr(&output))
    }

    /// Status, head and body of a GET on the admin address.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut socket = TcpStream::connect(self.admin).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Begins a stream of the demo model that takes some ten minutes, and waits for its first event.
    pub(crate) fn begin_stream(&self) -> TcpStream {
        let mut socket = TcpStream::connect(self.client).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let body = r#"{"model":"demo","stream":true,"messages":[]}"#;
        write!(
            socket,
            "POST /v1/chat/completions?tokens=6000&tokens_per_s=10&first_token_ms=0 HTTP/1.1\r\nHost: a\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut text = String::new();
        while !text.contains("\ndata:") {
            let mut piece = [0; 4096];
            let read = socket.read(&mut piece).unwrap();
            assert!(read > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&piece[..read]));
        }
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
