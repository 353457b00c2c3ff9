//! The load of the publishing comparison: publishers that append to streams of the Durable Streams protocol, each the next
//! message as soon as the last one is acknowledged.
//!
//! One epoll thread. Afterwards every stream is read back by a plain GET: what was acknowledged must be there, in order.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use bench::clock::{SECOND_NS, now_ns, seconds_ns};
use bench::http::ResponseReader;
use bench::mark::Mark;
use bench::net::{self, Poller, Unsent};
use bench::report::{Report, Window};
use bench::sequence::Sequence;
use clap::Parser;

/// Bytes read at once.
const PIECE_BYTES: usize = 64 << 10;

/// Appends to streams as fast as each append is acknowledged. Exit code 1: an append failed, or what was acknowledged was not
/// there afterwards.
#[derive(Parser)]
struct Options {
    /// Where to.
    #[arg(long, default_value = "127.0.0.1:8000")]
    target: SocketAddr,
    /// Streams are created below this path, one for each publisher.
    #[arg(long, default_value = "/v1/durable/bench")]
    path: String,
    /// How many publishers, each with a connection.
    #[arg(long, default_value_t = 1)]
    publishers: usize,
    /// Bytes per message.
    #[arg(long, default_value_t = 180)]
    payload: usize,
    /// Length of the measured window in seconds.
    #[arg(long, default_value_t = 5.0)]
    duration: f64,
    /// Seconds of publishing before the window.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Do not read back: a server that drops a stream's oldest messages has not lost them.
    #[arg(long)]
    unread: bool,
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
    match run(&options) {
        Ok(report) => {
            report.print(json);
            if report.is_clean(&[]) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("append: {error}");
            ExitCode::from(2)
        }
    }
}

struct Publisher {
    socket: TcpStream,
    path: String,
    unsent: Unsent,
    answer: ResponseReader,
    sent_ns: u64,
    appended: u64,
    waiting: bool,
}

fn run(options: &Options) -> io::Result<Report> {
    net::raise_descriptor_limit();
    let mut poller = Poller::new()?;
    let mut publishers = Vec::new();
    for index in 0..options.publishers {
        let path = format!("{}/{index}", options.path);
        let mut socket = TcpStream::connect(options.target)?;
        socket.set_nodelay(true)?;
        let host = options.target;
        exchange(
            &mut socket,
            &format!(
                "PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
            ),
        )?;
        socket.set_nonblocking(true)?;
        poller.add_reader(&socket, index as u64)?;
        publishers.push(Publisher {
            socket,
            path,
            unsent: Unsent::default(),
            answer: ResponseReader::default(),
            sent_ns: 0,
            appended: 0,
            waiting: false,
        });
    }
    let (mut report, mut window) = (Report::new(), Window::new(options.marks));
    let mut piece = vec![0; PIECE_BYTES];
    let begin_ns = now_ns() + seconds_ns(options.warmup);
    let end_ns = begin_ns + seconds_ns(options.duration);
    for publisher in &mut publishers {
        publisher.append(options)?;
    }
    loop {
        let now = now_ns();
        if now >= begin_ns && !window.is_open() && !window.is_over() {
            window.begin(now, &report);
        }
        if now >= end_ns {
            window.end(now, &report);
        }
        if window.is_over() && publishers.iter().all(|publisher| !publisher.waiting) {
            break;
        }
        if now > end_ns + 10 * SECOND_NS {
            report.faults.unfinished +=
                publishers.iter().filter(|publisher| publisher.waiting).count() as u64;
            break;
        }
        for index in 0..poller.wait(Some(SECOND_NS / 100))? {
            let publisher = &mut publishers[poller.ready(index).token as usize];
            publisher.serve(&mut piece, &mut report, &window, options)?;
        }
    }
    report.window = window.summary();
    report.streams = publishers.len() as u64;
    for publisher in &publishers {
        if !options.unread {
            read_back(publisher, options, &mut report)?;
        }
    }
    Ok(report)
}

impl Publisher {
    fn append(&mut self, options: &Options) -> io::Result<()> {
        self.sent_ns = now_ns();
        let mut message = Vec::with_capacity(options.payload);
        Mark { stream: 0, sequence: self.appended + 1, due_ns: self.sent_ns, late_ns: 0 }
            .encode(&mut message);
        message.resize(options.payload.max(message.len()), b'x');
        let (path, host, length) = (&self.path, options.target, message.len());
        write!(
            self.unsent.end(),
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
        )?;
        self.unsent.end().extend_from_slice(&message);
        self.waiting = true;
        // One message never fills a socket.
        if self.unsent.flush(&self.socket)? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    fn serve(
        &mut self,
        piece: &mut [u8],
        report: &mut Report,
        window: &Window,
        options: &Options,
    ) -> io::Result<()> {
        loop {
            let count = match self.socket.read(piece) {
                Ok(0) => return Err(io::Error::other("a publisher's connection was closed")),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            report.bytes += count as u64;
            if !self.answer.feed(&piece[..count], |_, _| {}).map_err(io::Error::other)? {
                continue;
            }
            let status = self.answer.head().map_or(0, |head| head.status);
            self.answer.reset();
            self.waiting = false;
            if !(200..300).contains(&status) {
                report.faults.status += 1;
                *report.statuses.entry(status).or_default() += 1;
                return Ok(());
            }
            self.appended += 1;
            report.events += 1;
            if window.is_open() {
                report.answered.record(now_ns() - self.sent_ns);
            }
            if window.is_over() {
                return Ok(());
            }
            self.append(options)?;
        }
    }
}

/// Reads a stream page by page.
fn read_back(publisher: &Publisher, options: &Options, report: &mut Report) -> io::Result<()> {
    let mut socket = TcpStream::connect(options.target)?;
    let mut sequence = Sequence::new(0);
    let mut offset = "-1".to_owned();
    let mut text = Vec::new();
    while sequence.last() < publisher.appended {
        let (path, host) = (&publisher.path, options.target);
        let page =
            exchange(&mut socket, &format!("GET {path}?offset={offset} HTTP/1.1\r\nHost: {host}\r\n\r\n"))?;
        text.extend_from_slice(&page.body);
        let mut used = 0;
        while text.len() - used >= options.payload {
            match Mark::decode(&text[used..used + options.payload]) {
                Some(mark) => sequence.see(mark.stream, mark.sequence),
                None => report.faults.malformed += 1,
            }
            used += options.payload;
        }
        text.drain(..used);
        if page.body.is_empty() || page.next == offset {
            break;
        }
        offset = page.next;
    }
    let faults = sequence.finish(Some(publisher.appended));
    report.complete += u64::from(faults == Default::default());
    report.faults.sequence += faults;
    Ok(())
}

struct Page {
    body: Vec<u8>,
    /// The header `Stream-Next-Offset`.
    next: String,
}

/// One request and its whole answer, waiting; an error unless it is a 2xx.
fn exchange(socket: &mut TcpStream, request: &str) -> io::Result<Page> {
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.write_all(request.as_bytes())?;
    let mut answer = ResponseReader::default();
    let (mut head, mut body) = (Vec::new(), Vec::new());
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = socket.read(&mut piece)?;
        if answer.head().is_none() {
            head.extend_from_slice(&piece[..count]);
        }
        let complete = answer
            .feed(&piece[..count], |_, bytes| body.extend_from_slice(bytes))
            .map_err(io::Error::other)?;
        if complete {
            break;
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let status = answer.head().map_or(0, |head| head.status);
    if !(200..300).contains(&status) {
        return Err(io::Error::other(format!(
            "status {status} to {}",
            request.lines().next().unwrap_or_default()
        )));
    }
    let head = String::from_utf8_lossy(&head);
    let next = head
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("stream-next-offset"))
        .map_or(String::new(), |(_, value)| value.trim().to_owned());
    Ok(Page { body, next })
}
