//! The load of the fan-out comparison: one publisher, thousands of readers, every delivery judged and timed.
//!
//! One epoll thread, so that it can be given one CPU. Of a delivery it reads the mark and nothing else: a body's framing is
//! stepped over, for at 100,000 deliveries/s and more the reader must not be what is measured. Latencies are counted from the
//! time at which an event was *to be* published, whatever held the publisher up (no coordinated omission).
#![forbid(unsafe_code)]

mod reader;
mod returns;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use bench::clock::{SECOND_NS, now_ns, seconds_ns};
use bench::http::{ResponseReader, head_end};
use bench::mark::Mark;
use bench::net::{self, Poller, Unsent};
use bench::report::{Report, Window};
use clap::Parser;
use reader::Reader;
use returns::Returns;

/// Token of the publisher; readers have their index, and those who return are counted on behind them.
const PUBLISHER: u64 = u64::MAX;
/// Bytes read at once.
const PIECE_BYTES: usize = 64 << 10;
/// Readers that may have been opened and not yet answered.
const UNANSWERED_MAX: usize = 256;
/// The window's edges lie this long before an event, so that none is being delivered there by a server that keeps up.
const EDGE_NS: u64 = 2_000_000;

/// Publishes to one stream at a steady rate, reads it on many connections, and judges every delivery. Exit code 1: something
/// was lost, doubled, out of order, or failed.
#[derive(Parser)]
struct Options {
    /// Where readers connect to.
    #[arg(long, default_value = "127.0.0.1:8000")]
    target: SocketAddr,
    /// What they ask for.
    #[arg(long, default_value = "/v1/durable/bench")]
    read: String,
    /// What is posted to, on the same address.
    #[arg(long, default_value = "/v1/durable/bench")]
    publish: String,
    /// What is created first, by a PUT.
    #[arg(long)]
    create: Option<String>,
    /// Publish whole events, as bare-fanout takes them, on a connection to this address.
    #[arg(long, conflicts_with_all = ["publish", "create"])]
    raw: Option<SocketAddr>,
    /// Instead of publishing: have the fake backend stream through the target, and read that stream by its id.
    #[arg(long, conflicts_with_all = ["raw", "create"])]
    relayed: bool,
    /// So many relayed streams; readers take them in turn. With `--returns` it is the readers themselves who leave and come back.
    #[arg(long, default_value_t = 1, requires = "relayed")]
    streams: usize,
    /// How many readers.
    #[arg(long, default_value_t = 100)]
    readers: usize,
    /// Readers that come back, per second, each on a connection of its own with the id of an event that it has had, read until
    /// they have caught up, and leave.
    #[arg(long, default_value_t = 0.0)]
    returns: f64,
    /// So many come back at one instant, in the middle of the window.
    #[arg(long, default_value_t = 0, conflicts_with = "returns")]
    storm: usize,
    /// Events that one who comes back has missed.
    #[arg(long, default_value_t = 40)]
    behind: u64,
    /// Of several streams: seconds for which a reader that leaves stays away.
    #[arg(long, default_value_t = 1.0)]
    away: f64,
    /// Events per second.
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Bytes per message.
    #[arg(long, default_value_t = 180)]
    payload: usize,
    /// Length of the measured window in seconds.
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    /// Seconds of publishing before the window.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Seconds that may pass until every reader is answered, and after the last event until all have it.
    #[arg(long, default_value_t = 20.0)]
    grace: f64,
    /// Print one line of JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Print a line of JSON at the beginning and at the end of the window, as they happen.
    #[arg(long)]
    marks: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let json = options.json;
    match Run::new(options).and_then(Run::run) {
        Ok(report) => {
            report.print(json);
            if report.is_clean(&[]) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("fanout: {error}");
            ExitCode::from(2)
        }
    }
}

struct Run {
    options: Options,
    /// What readers ask for, in turn.
    paths: Vec<String>,
    poller: Poller,
    readers: Vec<Reader>,
    /// Readers that were opened, and those of them that have their head.
    opened: usize,
    answered: usize,
    /// Readers that are still to get something.
    owed: usize,
    publisher: Publisher,
    returns: Returns,
    /// Events that every reader is owed. Of a relayed stream, which goes on: those that any has seen in the window.
    events: u64,
    /// The last that any reader has seen.
    newest: u64,
    report: Report,
    window: Window,
    /// Events of which the latency counts: those due between the window's edges.
    measured: std::ops::Range<u64>,
}

struct Publisher {
    socket: TcpStream,
    unsent: Unsent,
    /// The answer that is awaited; raw events are answered with a byte.
    answer: ResponseReader,
    /// When what is being answered was to be published.
    awaited_ns: Option<u64>,
    published: u64,
    /// When the first event is due.
    start_ns: u64,
}

impl Run {
    fn new(mut options: Options) -> io::Result<Self> {
        let limit = net::raise_descriptor_limit();
        if options.readers as u64 + 16 > limit {
            let message =
                format!("{} readers need more than {limit} descriptors a process may have", options.readers);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if let Some(path) = &options.create {
            create(options.target, path)?;
        }
        let paths = if options.relayed {
            (0..options.streams)
                .map(|stream| open_relayed(&options, stream))
                .collect::<io::Result<Vec<_>>>()?
        } else {
            vec![options.read.clone()]
        };
        // Those who return to the only one ask for it by its path.
        options.read.clone_from(&paths[0]);
        let poller = Poller::new()?;
        let socket = TcpStream::connect(options.raw.unwrap_or(options.target))?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        poller.add_connection(&socket, PUBLISHER)?;
        let publisher = Publisher {
            socket,
            unsent: Unsent::default(),
            answer: ResponseReader::default(),
            awaited_ns: None,
            published: 0,
            start_ns: u64::MAX,
        };
        Ok(Self {
            poller,
            readers: (0..options.readers).map(|index| Reader::new((index % paths.len()) as u64)).collect(),
            paths,
            opened: 0,
            answered: 0,
            owed: options.readers,
            publisher,
            returns: Returns::default(),
            events: if options.relayed {
                u64::MAX
            } else {
                (options.rate * (options.warmup + options.duration)).ceil() as u64
            },
            newest: 0,
            report: Report::new(),
            window: Window::new(options.marks),
            measured: 0..0,
            options,
        })
    }

    fn run(mut self) -> io::Result<Report> {
        let mut piece = vec![0; PIECE_BYTES];
        let grace_ns = seconds_ns(self.options.grace);
        let mut deadline_ns = now_ns() + grace_ns;
        let (mut begin_ns, mut end_ns) = (u64::MAX, u64::MAX);
        loop {
            let now = now_ns();
            self.open();
            if self.answered == self.readers.len() && self.publisher.start_ns == u64::MAX {
                let start_ns = now + SECOND_NS / 10;
                begin_ns = start_ns + seconds_ns(self.options.warmup) - EDGE_NS;
                end_ns = begin_ns + seconds_ns(self.options.duration);
                deadline_ns = end_ns + grace_ns;
                self.publisher.start_ns = start_ns;
                self.measured = begin_ns..end_ns;
                self.returns.plan(&self.options, begin_ns, end_ns);
            }
            if now >= begin_ns {
                begin_ns = u64::MAX;
                self.window.begin(now, &self.report);
            }
            if now >= end_ns {
                end_ns = u64::MAX;
                self.window.end(now, &self.report);
                if self.options.streams > 1 {
                    // Of each, what its own readers have seen.
                    self.owed = 0;
                } else if self.options.relayed {
                    self.events = self.newest;
                    let behind = |reader: &&Reader| {
                        reader.socket.is_some() && reader.received.sequence.last() < self.newest
                    };
                    self.owed = self.readers.iter().filter(behind).count();
                }
            }
            self.publish(now)?;
            if self.options.streams > 1 {
                self.send_away(now)?;
            } else {
                self.bring_back(now)?;
            }
            if (self.owed == 0 && self.returns.are_over() && self.window.is_over()) || now > deadline_ns {
                break;
            }
            let wake = begin_ns.min(end_ns).min(deadline_ns).min(self.due_ns()).min(self.returns.wake_ns());
            let timeout = wake.saturating_sub(now).min(SECOND_NS);
            for index in 0..self.poller.wait(Some(timeout))? {
                let event = self.poller.ready(index);
                if event.token == PUBLISHER {
                    self.answer(&mut piece)?;
                } else if event.token >= self.readers.len() as u64 {
                    self.serve_returned(event.token as usize - self.readers.len(), &mut piece)?;
                } else {
                    self.serve(event.token as usize, event.hangup, &mut piece);
                }
            }
        }
        self.window.end(now_ns(), &self.report);
        self.report.window = self.window.summary();
        self.report.streams = self.opened as u64;
        // Of what readers have seen beyond what they are owed, nothing is asked.
        let published =
            if self.options.relayed { self.events.min(self.newest) } else { self.publisher.published };
        if !self.options.relayed {
            self.report.faults.unfinished += self.events - published;
        }
        self.report.faults.unfinished += (self.readers.len() - self.answered) as u64;
        self.report.faults.unfinished += self.returns.unfinished();
        for reader in &mut self.readers {
            let owed = if self.options.streams > 1 { reader.received.sequence.last() } else { published };
            let faults = reader.received.sequence.finish(Some(owed));
            self.report.complete += u64::from(faults == Default::default());
            self.report.faults.sequence += faults;
            // Thousands of sockets in TIME_WAIT would be in the way of the next run.
            if let Some(socket) = reader.socket.take() {
                net::reset_on_close(&socket)?;
            }
        }
        Ok(self.report)
    }

    /// Opens readers, as many as may wait for their answer at once.
    fn open(&mut self) {
        while self.opened < self.readers.len() && self.opened - self.answered < UNANSWERED_MAX {
            let token = self.opened as u64;
            let opened = net::connect(self.options.target).and_then(|socket| {
                // The first event is that it can be written to; the request goes out then.
                self.poller.add_connection(&socket, token)?;
                Ok(socket)
            });
            match opened {
                Ok(socket) => self.readers[self.opened].socket = Some(socket),
                Err(_) => self.report.faults.connect += 1,
            }
            self.opened += 1;
        }
    }

    /// When the next event is to be published; never while the last one has no answer.
    fn due_ns(&self) -> u64 {
        let publisher = &self.publisher;
        if publisher.start_ns == u64::MAX
            || self.options.relayed
            || publisher.awaited_ns.is_some()
            || publisher.published == self.events
        {
            return u64::MAX;
        }
        publisher.start_ns + seconds_ns(publisher.published as f64 / self.options.rate)
    }

    fn publish(&mut self, now: u64) -> io::Result<()> {
        while self.due_ns() <= now {
            let due_ns = self.due_ns();
            let publisher = &mut self.publisher;
            publisher.published += 1;
            let mark = Mark {
                stream: 0,
                sequence: publisher.published,
                due_ns,
                late_ns: now_ns().saturating_sub(due_ns),
            };
            let mut message = Vec::with_capacity(self.options.payload);
            mark.encode(&mut message);
            message.resize(self.options.payload.max(message.len()), b'x');
            let out = publisher.unsent.end();
            if self.options.raw.is_some() {
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(&message);
                out.extend_from_slice(b"\n\n");
            } else {
                let (path, host, length) = (&self.options.publish, self.options.target, message.len());
                write!(
                    out,
                    "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
                )?;
                out.extend_from_slice(&message);
            }
            publisher.awaited_ns = Some(due_ns);
            publisher.unsent.flush(&publisher.socket)?;
        }
        Ok(())
    }

    /// Reads what the publisher is told.
    fn answer(&mut self, piece: &mut [u8]) -> io::Result<()> {
        let publisher = &mut self.publisher;
        publisher.unsent.flush(&publisher.socket)?;
        loop {
            let count = match publisher.socket.read(piece) {
                // It has nothing to do.
                Ok(0) if self.options.relayed => return Ok(()),
                Ok(0) => return Err(io::Error::other("the publisher's connection was closed")),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            let (complete, status) = if self.options.raw.is_some() {
                (true, 200)
            } else {
                let complete = publisher.answer.feed(&piece[..count], |_, _| {}).map_err(io::Error::other)?;
                (complete, publisher.answer.head().map_or(0, |head| head.status))
            };
            if complete && let Some(due_ns) = publisher.awaited_ns.take() {
                if !(200..300).contains(&status) {
                    self.report.faults.status += 1;
                    *self.report.statuses.entry(status).or_default() += 1;
                }
                if self.measured.contains(&due_ns) {
                    self.report.answered.record(now_ns().saturating_sub(due_ns));
                }
                publisher.answer.reset();
            }
        }
    }

    fn serve(&mut self, index: usize, hangup: bool, piece: &mut [u8]) {
        let returning = self.options.returns > 0.0 || self.options.storm > 0;
        let reader = &mut self.readers[index];
        let Some(mut socket) = reader.socket.as_ref() else { return };
        if !reader.asked {
            let (path, host) = (&self.paths[index % self.paths.len()], self.options.target);
            let cursor = match (&reader.coming_back, reader.received.ids.back()) {
                (Some(_), Some((_, id))) => format!("Last-Event-ID: {id}\r\n"),
                _ => String::new(),
            };
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n{cursor}\r\n");
            match socket.write(request.as_bytes()) {
                // A fresh socket has room for it.
                Ok(_) => reader.asked = true,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return,
                Err(_) => return self.lose(index),
            }
        }
        loop {
            match socket.read(piece) {
                Ok(0) => return self.lose(index),
                Ok(count) => {
                    let whole = count == piece.len() || hangup;
                    let received = &mut reader.received;
                    let had_head = received.has_head;
                    let last = received.sequence.last();
                    let measured = self.measured.start.max(reader.live_from_ns)..self.measured.end;
                    received.take(&piece[..count], &mut self.report, &measured);
                    // The first one remembers the ids of events for those who return; of several streams, each its own.
                    if returning && (index == 0 || self.paths.len() > 1) {
                        received.remember(&piece[..count]);
                    }
                    if let Some(back) = &mut reader.coming_back {
                        let took_ns = now_ns().saturating_sub(back.due_ns);
                        if received.sequence.last() > last && !std::mem::replace(&mut back.has_first, true) {
                            self.report.first.record(took_ns);
                        }
                        // The next one was not due yet when it came back.
                        let interval_ns = (1e9 / self.options.rate) as u64;
                        if back.has_first && received.last_due_ns + interval_ns > back.due_ns {
                            self.report.caught_up.record(took_ns);
                            self.returns.ended += 1;
                            reader.coming_back = None;
                        }
                    } else {
                        self.answered += usize::from(received.has_head && !had_head);
                    }
                    let done = last < self.events && received.sequence.last() >= self.events;
                    self.newest = self.newest.max(received.sequence.last());
                    self.owed -= usize::from(done);
                    // Edge-triggered: what comes later is a new event.
                    if !whole {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.lose(index),
            }
        }
    }

    /// The server has ended what has no end.
    fn lose(&mut self, index: usize) {
        let reader = &mut self.readers[index];
        if reader.socket.take().is_some() {
            self.report.faults.truncated += 1;
            self.owed -= usize::from(reader.received.sequence.last() < self.events);
        }
    }
}

/// Asks for a stream that lasts longer than all of this, reads its head, and leaves. Gives the path of the stream.
fn open_relayed(options: &Options, stream: usize) -> io::Result<String> {
    let events = (options.rate * (options.warmup + options.duration + 2.0 * options.grace)).ceil() as u64;
    let fake = format!("stream={stream}&events={events}&rate={}&payload={}", options.rate, options.payload);
    let body = format!(
        "{{\"model\":\"fake\",\"stream\":true,\"metadata\":{{\"fake\":\"{fake}\"}},\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}"
    );
    let mut socket = TcpStream::connect(options.target)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        options.target,
        body.len()
    )?;
    let (mut head, mut piece) = (Vec::new(), [0; 4096]);
    while head_end(&head).is_none() {
        match socket.read(&mut piece)? {
            0 => break,
            count => head.extend_from_slice(&piece[..count]),
        }
    }
    String::from_utf8_lossy(&head)
        .split("\r\n")
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("tokenring-stream"))
        .map(|(_, id)| format!("/v1/streams/{id}"))
        .ok_or_else(|| io::Error::other("the stream has no id"))
}

/// Creates the stream, waiting for the answer.
fn create(target: SocketAddr, path: &str) -> io::Result<()> {
    let mut socket = TcpStream::connect(target)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let head = format!(
        "PUT {path} HTTP/1.1\r\nHost: {target}\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
    );
    socket.write_all(head.as_bytes())?;
    let mut answer = ResponseReader::default();
    let mut piece = [0; 4096];
    loop {
        let count = socket.read(&mut piece)?;
        let complete = answer.feed(&piece[..count], |_, _| {}).map_err(io::Error::other)?;
        let status = answer.head().map_or(0, |head| head.status);
        if complete && (200..300).contains(&status) {
            return Ok(());
        }
        if complete || count == 0 {
            return Err(io::Error::other(format!("{path} was not created: status {status}")));
        }
    }
}
