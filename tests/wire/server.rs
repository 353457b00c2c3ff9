//! The server under test: one process of the real binary, with a loopback address of its own.

use crate::backend::Backend;
use crate::message;
use crate::peer::Peer;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// For whatever has to happen soon; a loaded machine gets it late, a broken server never.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    log: PathBuf,
    exited: Option<ExitStatus>,
}

/// A loopback address that nobody else uses: no two processes, tests or servers can meet on a port.
pub(crate) fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let process = std::process::id();
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(nth < 1 << 12, "addresses of one run");
    // 127.0.x.y is left to everybody else: 11 bits of the process and 12 of the server, from 127.1.0.0 on.
    let host = (1 << 16) + (((process % 2000) << 12) | nth) + 1;
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 0, 0)) + host)
}

impl Server {
    /// In front of one backend.
    pub(crate) fn before(backend: &Backend, flags: &[&str]) -> Server {
        Server::start(&[backend.address], flags)
    }

    /// In front of these; none: the demo model answers.
    pub(crate) fn start(upstreams: &[SocketAddr], flags: &[&str]) -> Server {
        Server::start_until("/ready", upstreams, flags)
    }

    /// Waits for that admin page to say 200.
    pub(crate) fn start_until(page: &str, upstreams: &[SocketAddr], flags: &[&str]) -> Server {
        let host = own_address();
        let (address, admin) = (SocketAddr::from((host, 8080)), SocketAddr::from((host, 9180)));
        let log = std::env::temp_dir().join(format!("tokenring-wire-{host}.log"));
        let output = File::create(&log).unwrap();
        let mut command = Command::new(binary());
        command.arg("serve").args(["--listen", &address.to_string(), "--admin", &admin.to_string()]);
        // Few buffers: what one turn can bring before a pause takes effect is bounded by them.
        for (flag, value) in [("--shards", "1"), ("--buffers", "64")] {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        for upstream in upstreams {
            command.args(["--upstream", &format!("http://{upstream}")]);
        }
        command.args(flags).stdin(Stdio::null());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let child = command.spawn().unwrap();
        let mut server = Server { child, address, admin, log, exited: None };
        server.wait_for("the server to be ready", |server| {
            assert!(server.child.try_wait().unwrap().is_none(), "the server ended at its start");
            server.admin_get(page).is_some_and(|(status, _)| status == 200)
        });
        server
    }

    /// A client.
    pub(crate) fn connect(&self) -> Peer {
        Peer::connect(self.address)
    }

    /// A client with a small receive window and segments of this many bytes.
    pub(crate) fn connect_little(&self, segment_bytes: u32) -> Peer {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 * 1024).unwrap();
        socket.set_tcp_mss(segment_bytes).unwrap();
        socket.connect(&self.address.into()).unwrap();
        Peer::new(socket.into())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Status and body; `None` when nothing listens.
    pub(crate) fn admin_get(&self, path: &str) -> Option<(u16, String)> {
        let mut peer = Peer::try_connect(self.admin).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        peer.try_send(request.as_bytes()).ok()?;
        let answer = peer.try_response("GET").ok()?;
        Some((answer.status(), answer.text()))
    }

    /// Metrics by name with labels, as they stand in `/metrics`; of several shards or upstreams the sum.
    fn metrics(&self) -> BTreeMap<String, f64> {
        let (status, text) = self.admin_get("/metrics").expect("the admin listener answers");
        assert_eq!(status, 200);
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines.filter_map(|line| line.rsplit_once(' '));
        samples.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
    }

    /// One sample, by its name with labels.
    pub(crate) fn metric(&self, sample: &str) -> Option<f64> {
        self.metrics().get(sample).copied()
    }

    /// The sum of a metric over its labels.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let metrics = self.metrics();
        let of_name = metrics.iter().filter(|(sample, _)| {
            sample.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        });
        of_name.map(|(_, value)| *value as u64).sum()
    }

    /// Streams ended, by reason, where not zero.
    pub(crate) fn ends(&self) -> BTreeMap<String, u64> {
        let mut ends = BTreeMap::new();
        for (sample, value) in self.metrics() {
            let Some(labels) = sample.strip_prefix("tokenring_stream_ends_total{") else { continue };
            let Some((_, reason)) = labels.split_once("reason=\"") else { continue };
            let reason = reason.split('"').next().unwrap();
            if value > 0.0 {
                *ends.entry(reason.to_owned()).or_default() += value as u64;
            }
        }
        ends
    }

    /// Waits until the streams that ended are these and no others.
    #[track_caller]
    pub(crate) fn expect_ends(&self, expected: &[(&str, u64)]) {
        let expected: BTreeMap<String, u64> =
            expected.iter().map(|&(reason, count)| (reason.to_owned(), count)).collect();
        let due = Instant::now() + SOON;
        loop {
            let ends = self.ends();
            if ends == expected {
                return;
            }
            assert!(Instant::now() < due, "streams ended {ends:?}, not {expected:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a metric has at least this value.
    #[track_caller]
    pub(crate) fn expect_count(&self, name: &str, at_least: u64) {
        let due = Instant::now() + SOON;
        loop {
            let count = self.count(name);
            if count >= at_least {
                return;
            }
            assert!(Instant::now() < due, "{name} is {count}, not {at_least}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    pub(crate) fn wait_for(&mut self, what: &str, condition: impl Fn(&mut Server) -> bool) {
        let due = Instant::now() + SOON;
        while !condition(self) {
            assert!(Instant::now() < due, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `TERM`, `INT`, `QUIT`, `HUP`, ...
    pub(crate) fn signal(&self, name: &str) {
        let script = format!("kill -{name} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    }

    /// Waits for the process to end by itself and gives its exit code.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> i32 {
        self.wait_for("the server to exit", |server| {
            server.exited = server.child.try_wait().unwrap();
            server.exited.is_some()
        });
        self.exited.unwrap().code().expect("it was not killed by a signal")
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it has written to stdout and stderr.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Resident memory, KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ended = self.exited.or_else(|| self.child.try_wait().ok().flatten());
        if std::thread::panicking() {
            eprintln!("--- server {} wrote:\n{}---", self.address, self.output());
        }
        if ended.is_none() {
            // By its handle, so never another process.
            let killed = self.child.kill().and_then(|()| self.child.wait());
            assert!(killed.is_ok() || std::thread::panicking());
        }
        let output = self.output();
        if std::fs::remove_file(&self.log).is_err() {
            eprintln!("could not remove {}", self.log.display());
        }
        let crashed = ended.is_some() && self.exited.is_none();
        assert!(!crashed || std::thread::panicking(), "the server ended by itself ({ended:?}):\n{output}");
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TOKENRING_BIN") {
        return path.into();
    }
    // .../TARGET/PROFILE/deps/wire-HASH
    let own = std::env::current_exe().unwrap();
    let target = own.ancestors().nth(3).unwrap();
    let builds = ["bench-quick", "release", "debug"].map(|profile| target.join(profile).join("tokenring"));
    builds
        .iter()
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path.clone())
        .unwrap_or_else(|| {
            panic!("no tokenring in {}: `cargo build`, or set TOKENRING_BIN", target.display())
        })
}

/// A chat request that streams, as SDKs send it.
pub(crate) fn chat() -> Vec<u8> {
    stream_request("/v1/chat/completions")
}

/// A streaming request to a model endpoint.
pub(crate) fn stream_request(path: &str) -> Vec<u8> {
    message::post(path, r#"{"model":"m","stream":true}"#)
}
