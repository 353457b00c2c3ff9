//! A model backend that only pretends: streams of marked events at a given pace, and faults on demand.
//!
//! One epoll thread per `--threads`, all on one port by SO_REUSEPORT; paced by a heap of due times, so a stream costs no
//! thread and no timer descriptor. See bench/README.md for the parameters.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use bench::clock::now_ns;
use bench::dialect::Dialect;
use bench::http::{self, Body, HEAD_BYTES_MAX, Request};
use bench::mark::Mark;
use bench::net::{self, Poller, Slots, Unsent};
use bench::params::{Fault, Params};
use bench::tls::{self, Link, Piece};
use clap::Parser;
use rustls::ServerConfig;

/// Token of the listener; keys of connections are below 2^63.
const LISTENER: u64 = u64::MAX;
/// Unsent bytes above which a stream produces nothing more until its socket takes some.
const UNSENT_BYTES_MAX: usize = 64 << 10;
/// Steps, of that size at most, that one connection gets before the others have their turn.
const FILLS_PER_TURN: usize = 4;
/// Connections accepted before the others have their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// The largest request body.
const BODY_BYTES_MAX: usize = 16 << 20;

/// A model backend that only pretends.
#[derive(Parser)]
struct Options {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// Event loops, each a thread with its own listener (SO_REUSEPORT).
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Default events per stream.
    #[arg(long, default_value_t = 100)]
    events: u64,
    /// Default events per second and stream; 0: as fast as the socket takes them.
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// Default bytes per event.
    #[arg(long, default_value_t = 180)]
    payload: usize,
    /// Default time from request to first event, in ms.
    #[arg(long, default_value_t = 0)]
    first_ms: u64,
    /// More defaults, as in a request: name=value&name=value.
    #[arg(long, default_value = "")]
    params: String,
    /// Round due times up to multiples of this many µs, as a model that steps a batch does; 0: each stream on its own.
    #[arg(long, default_value_t = 0)]
    tick_us: u64,
    /// Speak TLS: the certificate chain, PEM, the server's own first.
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, PEM.
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
static STREAMS: AtomicU64 = AtomicU64::new(0);
static STREAMS_DONE: AtomicU64 = AtomicU64::new(0);
static CLIENTS_LEFT: AtomicU64 = AtomicU64::new(0);
static EVENTS: AtomicU64 = AtomicU64::new(0);
static HANDSHAKES_FULL: AtomicU64 = AtomicU64::new(0);
static HANDSHAKES_RESUMED: AtomicU64 = AtomicU64::new(0);
/// How many handshakes agreed on which version, suite and key exchange.
static AGREED: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

fn main() -> io::Result<()> {
    let options = Options::parse();
    net::raise_descriptor_limit();
    let mut defaults = Params::default();
    let flags = format!(
        "events={}&rate={}&payload={}&first_ms={}&{}",
        options.events, options.rate, options.payload, options.first_ms, options.params
    );
    defaults.read(&flags, true).map_err(|message| io::Error::new(io::ErrorKind::InvalidInput, message))?;
    let (address, tick_ns) = (options.listen, options.tick_us * 1000);
    let tls = match (&options.tls_cert, &options.tls_key) {
        (Some(certificate), Some(key)) => Some(tls::server_side(certificate, key)?),
        _ => None,
    };
    let threads: Vec<_> = (1..options.threads)
        .map(|_| {
            let (defaults, tls) = (defaults.clone(), tls.clone());
            std::thread::spawn(move || Server::new(address, defaults, tick_ns, tls)?.run())
        })
        .collect();
    Server::new(address, defaults, tick_ns, tls)?.run()?;
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("an event loop panicked"))??;
    }
    Ok(())
}

struct Server {
    poller: Poller,
    listener: TcpListener,
    connections: Slots<Connection>,
    /// (due, key). An entry whose time is not the connection's `timer_ns` is out of date.
    timers: BinaryHeap<Reverse<(u64, u64)>>,
    /// Connections that could go on at once, but had their share.
    ready: Vec<u64>,
    defaults: Params,
    tick_ns: u64,
    tls: Option<Arc<ServerConfig>>,
    piece: Piece,
}

struct Connection {
    link: Link,
    /// The handshake, if there is to be one, is not over or not counted.
    is_new: bool,
    input: Vec<u8>,
    unsent: Unsent,
    work: Work,
    keep_alive: bool,
    timer_ns: u64,
}

enum Work {
    /// Waits for a request, or for the rest of one.
    Request,
    Stream(Stream),
    /// A plain body of which this many bytes are still to be made.
    Download(u64),
    /// Keeps the connection and says nothing more.
    Silent,
    /// Closes once all is sent.
    Close,
}

struct Stream {
    params: Params,
    dialect: Dialect,
    chunked: bool,
    head_sent: bool,
    /// Events made so far.
    made: u64,
    /// When the response head, and then the first event, is due.
    head_ns: u64,
    first_ns: u64,
}

enum Step {
    /// Bytes were appended, or the work changed: go on.
    Again,
    /// Nothing to do before this time.
    Until(u64),
    /// Nothing to do before the client sends something.
    Wait,
    /// The connection is over.
    Drop,
}

impl Server {
    fn new(
        address: SocketAddr,
        defaults: Params,
        tick_ns: u64,
        tls: Option<Arc<ServerConfig>>,
    ) -> io::Result<Self> {
        let (poller, listener) = (Poller::new()?, net::listen(address)?);
        poller.add_listener(&listener, LISTENER)?;
        Ok(Self {
            poller,
            listener,
            connections: Slots::default(),
            timers: BinaryHeap::new(),
            ready: Vec::new(),
            defaults,
            tick_ns,
            tls,
            piece: Piece::default(),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let timeout = if self.ready.is_empty() {
                self.timers.peek().map(|Reverse((due, _))| due.saturating_sub(now_ns()))
            } else {
                Some(0)
            };
            for index in 0..self.poller.wait(timeout)? {
                let ready = self.poller.ready(index);
                if ready.token == LISTENER {
                    self.accept()?;
                } else {
                    self.serve(ready.token, ready.readable);
                }
            }
            let now = now_ns();
            while let Some(&Reverse((due, key))) = self.timers.peek() {
                if due > now {
                    break;
                }
                self.timers.pop();
                if self.connections.get_mut(key).is_some_and(|connection| connection.timer_ns == due) {
                    self.serve(key, false);
                }
            }
            for key in std::mem::take(&mut self.ready) {
                self.serve(key, false);
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(socket) = net::accept(&self.listener)? else { break };
            let connection = Connection {
                link: Link::server(socket, self.tls.as_ref())?,
                is_new: self.tls.is_some(),
                input: Vec::new(),
                unsent: Unsent::default(),
                work: Work::Request,
                keep_alive: true,
                timer_ns: 0,
            };
            let key = self.connections.insert(connection);
            CONNECTIONS.fetch_add(1, Relaxed);
            let Some(connection) = self.connections.get_mut(key) else { unreachable!("just inserted") };
            self.poller.add_connection(connection.link.socket(), key)?;
        }
        Ok(())
    }

    /// Reads if there is something to read, then goes on with the connection's work as far as it goes.
    fn serve(&mut self, key: u64, readable: bool) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let open = !readable || connection.receive(&mut self.piece);
        let mut next = if open { Step::Again } else { Step::Drop };
        let mut fills = 0;
        while !matches!(next, Step::Drop) {
            match connection.link.flush(&mut connection.unsent) {
                Ok(true) => {}
                Ok(false) => {
                    // The next writable event goes on.
                    next = Step::Wait;
                    break;
                }
                Err(_) => {
                    next = Step::Drop;
                    break;
                }
            }
            if !matches!(next, Step::Again) || fills == FILLS_PER_TURN {
                break;
            }
            next = connection.step(&self.defaults, self.tick_ns);
            fills += 1;
        }
        match next {
            Step::Again => self.ready.push(key),
            Step::Wait => {}
            Step::Until(due) => {
                if connection.timer_ns != due {
                    connection.timer_ns = due;
                    self.timers.push(Reverse((due, key)));
                }
            }
            Step::Drop => {
                if !open && matches!(connection.work, Work::Stream(_) | Work::Silent | Work::Download(_)) {
                    CLIENTS_LEFT.fetch_add(1, Relaxed);
                }
                if let Some(mut connection) = self.connections.remove(key)
                    && matches!(connection.work, Work::Close)
                {
                    connection.link.close();
                }
            }
        }
    }
}

impl Connection {
    /// Reads what is there; false when the client has gone.
    fn receive(&mut self, piece: &mut Piece) -> bool {
        loop {
            match self.link.read(piece) {
                Ok(received) => {
                    self.input.extend_from_slice(received.bytes);
                    if received.end.is_some() || self.input.len() > BODY_BYTES_MAX + HEAD_BYTES_MAX {
                        return false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        if self.is_new
            && let Some(agreed) = self.link.agreed()
        {
            self.is_new = false;
            let count = if agreed.resumed { &HANDSHAKES_RESUMED } else { &HANDSHAKES_FULL };
            count.fetch_add(1, Relaxed);
            let mut terms = AGREED.lock().unwrap_or_else(PoisonError::into_inner);
            *terms.entry(agreed.terms).or_default() += 1;
        }
        true
    }

    /// Does the next piece of work, with nothing unsent before it.
    fn step(&mut self, defaults: &Params, tick_ns: u64) -> Step {
        match &mut self.work {
            Work::Request => self.take_request(defaults),
            Work::Silent => Step::Wait,
            Work::Close => Step::Drop,
            Work::Download(0) => {
                self.work = if self.keep_alive { Work::Request } else { Work::Close };
                Step::Again
            }
            Work::Download(left) => {
                let size = (*left).min(UNSENT_BYTES_MAX as u64);
                *left -= size;
                let out = self.unsent.end();
                out.resize(out.len() + size as usize, b'x');
                Step::Again
            }
            Work::Stream(stream) => {
                let (next, fault) = stream.produce(self.unsent.end(), tick_ns);
                match (fault, next) {
                    (Some(Fault::Reset), _) => {
                        // What is still unsent is lost, as in a real reset.
                        return match net::reset_on_close(self.link.socket()) {
                            Ok(()) | Err(_) => Step::Drop,
                        };
                    }
                    (Some(Fault::Stall), _) => self.work = Work::Silent,
                    (Some(Fault::Cut | Fault::Half | Fault::Garbage), _) => self.work = Work::Close,
                    (Some(Fault::NoDone | Fault::Error), _) | (None, None) => {
                        STREAMS_DONE.fetch_add(1, Relaxed);
                        let keep = self.keep_alive && stream.chunked;
                        self.work = if keep { Work::Request } else { Work::Close };
                    }
                    (None, Some(next)) => return next,
                }
                Step::Again
            }
        }
    }

    /// Takes a whole request out of the input, if there is one, and begins its answer.
    fn take_request(&mut self, defaults: &Params) -> Step {
        let Some(head_end) = http::head_end(&self.input) else {
            return if self.input.len() > HEAD_BYTES_MAX { Step::Drop } else { Step::Wait };
        };
        let (head, rest) = self.input.split_at(head_end);
        let Ok(request) = Request::parse(head) else {
            plain(self.unsent.end(), 400, "{\"error\":{\"message\":\"not HTTP/1.1\"}}", false);
            self.work = Work::Close;
            return Step::Again;
        };
        let mut framing = request.body;
        let mut body = Vec::new();
        let Ok(used) = framing.feed(rest, |piece| body.extend_from_slice(piece)) else { return Step::Drop };
        if !matches!(framing, Body::Length(_) | Body::Chunked(_)) || !framing.ended() {
            return Step::Wait;
        }
        self.keep_alive = request.keep_alive;
        self.work = answer(&request, &body, defaults, self.unsent.end());
        self.input.drain(..head_end + used);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        Step::Again
    }
}

impl Stream {
    /// Appends what is due. Returns when to go on (`None`: the stream is complete), or the fault that ends it.
    fn produce(&mut self, out: &mut Vec<u8>, tick_ns: u64) -> (Option<Step>, Option<Fault>) {
        let now = now_ns();
        if !self.head_sent {
            if now < self.head_ns {
                return (Some(Step::Until(self.head_ns)), None);
            }
            self.head_sent = true;
            out.extend_from_slice(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n",
            );
            let framing: &[u8] = if self.chunked {
                b"Transfer-Encoding: chunked\r\n\r\n"
            } else {
                b"Connection: close\r\n\r\n"
            };
            out.extend_from_slice(framing);
            let mut begin = Vec::new();
            self.dialect.begin(&mut begin);
            self.chunk(&begin, out);
            if self.params.idle {
                return (None, Some(Fault::Stall));
            }
        }
        let paced = self.params.rate > 0.0;
        let made_before = self.made;
        let mut event = Vec::with_capacity(self.params.payload + 64);
        loop {
            if let Some((fault, after)) = self.params.fault
                && self.made == after
            {
                self.fail(fault, out);
                return (None, Some(fault));
            }
            if self.made == self.params.events {
                event.clear();
                self.dialect.end(&mut event);
                self.chunk(&event, out);
                if self.chunked {
                    out.extend_from_slice(b"0\r\n\r\n");
                }
                return (None, None);
            }
            let in_this_write = self.made - made_before;
            let write_is_full = !paced && self.params.write > 0 && in_this_write == self.params.write;
            if out.len() >= UNSENT_BYTES_MAX || write_is_full {
                return (Some(Step::Again), None);
            }
            let mut due = if paced {
                self.first_ns + (self.made as f64 * 1e9 / self.params.rate) as u64
            } else {
                self.first_ns.max(now)
            };
            if tick_ns > 0 && paced {
                due = due.div_ceil(tick_ns) * tick_ns;
            }
            if due > now {
                return (Some(Step::Until(due)), None);
            }
            self.made += 1;
            let mark = Mark {
                stream: self.params.stream,
                sequence: self.made,
                due_ns: due,
                late_ns: now_ns().saturating_sub(due),
            };
            event.clear();
            self.dialect.event(&self.params, &mark, &mut event);
            self.chunk(&event, out);
            EVENTS.fetch_add(1, Relaxed);
        }
    }

    fn fail(&self, fault: Fault, out: &mut Vec<u8>) {
        let mut event = Vec::new();
        match fault {
            Fault::Reset | Fault::Cut | Fault::Stall => {}
            Fault::Garbage => out.extend_from_slice(b"no chunk\r\nat all\r\n"),
            Fault::Half => {
                let mark = Mark {
                    stream: self.params.stream,
                    sequence: self.made + 1,
                    due_ns: now_ns(),
                    late_ns: 0,
                };
                self.dialect.event(&self.params, &mark, &mut event);
                let mut whole = Vec::new();
                self.chunk(&event, &mut whole);
                out.extend_from_slice(&whole[..whole.len() / 2]);
            }
            Fault::NoDone | Fault::Error => {
                if fault == Fault::Error {
                    self.dialect.error(&mut event);
                    self.chunk(&event, out);
                }
                if self.chunked {
                    out.extend_from_slice(b"0\r\n\r\n");
                }
            }
        }
    }

    /// Appends bytes as one chunk, if the body is chunked. Each event is a chunk of its own, as backends do it.
    fn chunk(&self, bytes: &[u8], out: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        if !self.chunked {
            out.extend_from_slice(bytes);
            return;
        }
        let size = bytes.len();
        let digits = (size.ilog2() / 4 + 1) as usize;
        out.extend((0..digits).rev().map(|digit| b"0123456789abcdef"[size >> (4 * digit) & 15]));
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(bytes);
        out.extend_from_slice(b"\r\n");
    }
}

/// Begins the answer to a request, and says what follows.
fn answer(request: &Request<'_>, body: &[u8], defaults: &Params, out: &mut Vec<u8>) -> Work {
    let keep_alive = request.keep_alive;
    let after = if keep_alive { Work::Request } else { Work::Close };
    let mut params = defaults.clone();
    let read = params
        .read(request.query, false)
        .and_then(|()| params.read(request.fake, true))
        .and_then(|()| params.read(Params::in_body(body), true));
    if let Err(message) = read {
        plain(out, 400, &format!("{{\"error\":{{\"message\":\"{message}\"}}}}"), keep_alive);
        return after;
    }
    if let Some(status) = params.status {
        plain(out, status, "{\"error\":{\"message\":\"asked for\",\"type\":\"server_error\"}}", keep_alive);
        return after;
    }
    let Some(dialect) = Dialect::of_path(request.path) else {
        return page(request, out).unwrap_or(after);
    };
    if request.method == "POST"
        && !Params::wants_stream(body)
        && Params::in_body(body).is_empty()
        && request.fake.is_empty()
    {
        let answer = "{\"id\":\"c0\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"fake\",\"choices\":[{\"index\":0,\
            \"message\":{\"role\":\"assistant\",\"content\":\"hello\"},\"finish_reason\":\"stop\"}],\
            \"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}}";
        plain(out, 200, answer, keep_alive);
        return after;
    }
    STREAMS.fetch_add(1, Relaxed);
    let head_ns = now_ns() + params.head.as_nanos() as u64;
    let first_ns = head_ns.max(now_ns() + params.first.as_nanos() as u64);
    let stream = Stream {
        params,
        dialect,
        chunked: request.chunked_allowed,
        head_sent: false,
        made: 0,
        head_ns,
        first_ns,
    };
    Work::Stream(stream)
}

/// Answers what is no stream. `Some`: more than the head is to follow.
fn page(request: &Request<'_>, out: &mut Vec<u8>) -> Option<Work> {
    let keep_alive = request.keep_alive;
    if let Some(size) = request.path.strip_prefix("/bytes/").and_then(|size| size.parse().ok()) {
        head(out, 200, "application/octet-stream", size, keep_alive);
        return Some(Work::Download(size));
    }
    match request.path {
        "/health" => plain(out, 200, "{\"status\":\"ok\"}", keep_alive),
        "/v1/models" => plain(
            out,
            200,
            "{\"object\":\"list\",\"data\":[{\"id\":\"fake\",\"object\":\"model\",\"created\":1,\"owned_by\":\"bench\"}]}",
            keep_alive,
        ),
        "/stats" => {
            let stats = serde_json::json!({
                "connections": CONNECTIONS.load(Relaxed),
                "streams": STREAMS.load(Relaxed),
                "streams_done": STREAMS_DONE.load(Relaxed),
                "clients_left": CLIENTS_LEFT.load(Relaxed),
                "events": EVENTS.load(Relaxed),
                "handshakes_full": HANDSHAKES_FULL.load(Relaxed),
                "handshakes_resumed": HANDSHAKES_RESUMED.load(Relaxed),
                "agreed": *AGREED.lock().unwrap_or_else(PoisonError::into_inner),
            });
            plain(out, 200, &stats.to_string(), keep_alive);
        }
        _ => plain(out, 404, "{\"error\":{\"message\":\"no such page\"}}", keep_alive),
    }
    None
}

fn plain(out: &mut Vec<u8>, status: u16, body: &str, keep_alive: bool) {
    head(out, status, "application/json", body.len() as u64, keep_alive);
    out.extend_from_slice(body.as_bytes());
}

fn head(out: &mut Vec<u8>, status: u16, content_type: &str, length: u64, keep_alive: bool) {
    let connection = if keep_alive { "" } else { "Connection: close\r\n" };
    out.extend_from_slice(
        format!("HTTP/1.1 {status} Fake\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{connection}\r\n")
            .as_bytes(),
    );
}
