//! The load generator: opens streams, reads them as a client does, and judges every single event.
//!
//! One epoll thread, thousands of connections. Latencies are counted from the time at which the backend *meant* to send an
//! event (open loop), so a proxy that holds the load up does not hide it (coordinated omission); beside it stands the
//! time since the backend really wrote it. See bench/README.md.
#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;

use bench::clock::{now_ns, seconds_ns};
use bench::dialect::Meaning;
use bench::http::ResponseReader;
use bench::net::{self, Poller, Unsent};
use bench::report::{Report, Window};
use bench::sequence::Sequence;
use bench::sse::Decoder;
use bench::tls::{self, ClientSide, Link, Piece};
use clap::{Parser, ValueEnum};

/// Pieces read from one connection before the others have their turn.
const PIECES_PER_TURN: usize = 4;
/// Attempts of one client in a row that may fail before it gives up.
const FAILURES_IN_A_ROW_MAX: u32 = 3;

/// Opens streams, reads them, and judges every event. Exit code 1: something was lost, doubled, out of order, or failed.
#[derive(Parser)]
struct Options {
    /// Where to send requests: [http://|https://]host:port
    #[arg(long, default_value = "127.0.0.1:8000")]
    target: String,
    /// Path to post to.
    #[arg(long, default_value = "/v1/chat/completions")]
    path: String,
    /// Concurrent streams, each on its own connection.
    #[arg(long, default_value_t = 10)]
    streams: usize,
    /// Events per second and stream.
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// Events per stream; left out: as many as fill the ramp, the warm-up and the duration.
    #[arg(long)]
    events: Option<u64>,
    /// Bytes per event.
    #[arg(long, default_value_t = 180)]
    payload: usize,
    /// Length of the measured window in seconds; left out: from the first request to the last end.
    #[arg(long)]
    duration: Option<f64>,
    /// Seconds over which the streams are opened; left out: 1 s per 2000 streams, but at least one event's interval.
    #[arg(long)]
    ramp: Option<f64>,
    /// Seconds between the ramp and the window.
    #[arg(long, default_value_t = 0.0)]
    warmup: f64,
    /// Events as fast as they can be taken.
    #[arg(long)]
    burst: bool,
    /// Each client begins a new stream as soon as one has ended, until --duration is over.
    #[arg(long = "loop")]
    again: bool,
    /// Short streams back to back on kept-alive connections: --loop --burst --events 16.
    #[arg(long)]
    short: bool,
    /// Speak TLS.
    #[arg(long, requires = "ca")]
    tls: bool,
    /// Whom to trust: certificates, PEM.
    #[arg(long, requires = "tls")]
    ca: Option<PathBuf>,
    /// The name that the server's certificate must have; left out: the target's host.
    #[arg(long, requires = "tls")]
    server_name: Option<String>,
    /// Resume sessions by the server's tickets; else each handshake is a full one.
    #[arg(long, requires = "tls")]
    resume: bool,
    /// Each stream on a connection of its own, which this side closes after it.
    #[arg(long)]
    fresh: bool,
    /// Streams of which only the head comes; they are held for this many seconds.
    #[arg(long)]
    idle: Option<f64>,
    /// How many of the streams stop reading after their first event.
    #[arg(long, default_value_t = 0)]
    stuck: usize,
    /// When the window is over, close the stuck streams instead of reading them to their end.
    #[arg(long)]
    abandon_stuck: bool,
    /// Part of the streams (0 to 1) whose client leaves at a random event.
    #[arg(long, default_value_t = 0.0)]
    leave: f64,
    /// More parameters for the fake backend: name=value&name=value.
    #[arg(long, default_value = "")]
    params: String,
    /// Where the parameters for the fake backend are put.
    #[arg(long, value_enum, default_value_t = Place::Body)]
    place: Place,
    /// A backend that is not the fake one: count its events, check only that streams end.
    #[arg(long)]
    unmarked: bool,
    /// Seconds that streams may take after the time at which they should have ended.
    #[arg(long, default_value_t = 10.0)]
    grace: f64,
    /// Faults that do not make the exit code 1 (comma-separated names of the report's `faults`).
    #[arg(long, value_delimiter = ',')]
    allow: Vec<String>,
    /// Seed of who leaves and when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one line of JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Print a line of JSON at the beginning and at the end of the window, as they happen.
    #[arg(long)]
    marks: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Place {
    Body,
    Header,
    Query,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let json = options.json;
    let allow = options.allow.clone();
    let run = Run::new(options).and_then(Run::run);
    match run {
        Ok(report) => {
            report.print(json);
            if report.is_clean(&allow) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::from(2)
        }
    }
}

struct Run {
    options: Options,
    address: SocketAddr,
    tls: Option<ClientSide>,
    poller: Poller,
    clients: Vec<Client>,
    /// Clients that were opened so far, and those that want to go on in the next turn.
    opened: usize,
    restart: Vec<usize>,
    ready: Vec<usize>,
    /// What every stream is owed.
    events: u64,
    start_ns: u64,
    ramp_ns: u64,
    next_stream: u64,
    random: u64,
    /// Streams that are neither finished nor stuck.
    active: usize,
    over: bool,
    window: Window,
    report: Report,
}

struct Client {
    link: Option<Link>,
    /// When its connect began, until the handshake that follows, if there is one, has been counted.
    shaking_since_ns: Option<u64>,
    /// Rises with each connection, so that late events of a former one are recognised.
    generation: u32,
    request: Unsent,
    reader: ResponseReader,
    decoder: Decoder,
    sequence: Sequence,
    /// When the request was to be sent.
    start_ns: u64,
    first_seen: bool,
    done: bool,
    error: bool,
    used: bool,
    /// Whether it never reads beyond its first event, and whether it is at that now.
    is_stuck: bool,
    stopped: bool,
    /// The event at which it leaves.
    leaves_at: Option<u64>,
    state: State,
    failures_in_a_row: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unopened,
    Streaming,
    Finished,
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The response is complete.
    Complete,
    /// The connection ended first.
    Closed,
    Reset,
    ConnectFailed,
    /// TLS could not be agreed on, or was broken.
    TlsFailed,
    Malformed,
    /// This client left, as it was to.
    Left,
    /// It was still going when time was up.
    Unfinished,
}

impl Run {
    fn new(mut options: Options) -> io::Result<Self> {
        let invalid = |message: &str| io::Error::new(io::ErrorKind::InvalidInput, message.to_owned());
        if options.short {
            options.again = true;
            options.burst = true;
            options.events.get_or_insert(16);
        }
        if options.again && options.duration.is_none() {
            return Err(invalid("--loop and --short need --duration"));
        }
        if options.stuck > options.streams {
            return Err(invalid("--stuck is more than --streams"));
        }
        if options.rate <= 0.0 {
            options.burst = true;
        }
        let limit = net::raise_descriptor_limit();
        if options.streams as u64 + 16 > limit {
            return Err(invalid(&format!(
                "{} streams need more than the {limit} descriptors a process may have",
                options.streams
            )));
        }
        if options.target.starts_with("https://") && !options.tls {
            return Err(invalid("https:// needs --tls and --ca"));
        }
        let host = options.target.trim_start_matches("https://").trim_start_matches("http://");
        let host = host.trim_end_matches('/').to_owned();
        let address = host.to_socket_addrs()?.next().ok_or_else(|| invalid("the target has no address"))?;
        let tls = match &options.ca {
            Some(ca) => {
                let of_target = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
                let name = options.server_name.as_deref().unwrap_or(of_target);
                Some(ClientSide::new(ca, name.trim_matches(['[', ']']), options.resume)?)
            }
            None => None,
        };
        options.target = host;
        let ramp = options.ramp.unwrap_or_else(|| {
            let interval = if options.burst { 0.0 } else { 1.0 / options.rate };
            interval.max(options.streams as f64 / 2000.0)
        });
        let events = options.events.unwrap_or_else(|| match options.duration {
            Some(duration) if !options.burst => {
                // One second more, in case that the last streams begin late.
                (options.rate * (ramp + options.warmup + duration + 1.0)).ceil() as u64
            }
            _ => 100,
        });
        let clients = (0..options.streams).map(|index| Client::new(index < options.stuck)).collect();
        Ok(Self {
            address,
            tls,
            poller: Poller::new()?,
            clients,
            opened: 0,
            restart: Vec::new(),
            ready: Vec::new(),
            events,
            start_ns: now_ns(),
            ramp_ns: seconds_ns(ramp),
            next_stream: 0,
            random: options.seed,
            active: options.streams,
            over: false,
            window: Window::new(options.marks),
            report: Report::new(),
            options,
        })
    }

    fn run(mut self) -> io::Result<Report> {
        let mut piece = Piece::default();
        let hold = self.options.idle.or(self.options.duration);
        let whole_run = hold.is_none();
        self.start_ns = now_ns();
        if whole_run {
            self.window.begin(self.start_ns, &self.report);
        }
        let mut deadline_ns =
            self.start_ns + self.ramp_ns + seconds_ns(self.options.warmup + self.options.grace);
        if !self.options.burst {
            deadline_ns += seconds_ns(self.events as f64 / self.options.rate);
        }
        loop {
            let now = now_ns();
            self.open_due(now);
            self.mark(now, hold, &mut deadline_ns);
            // A window that ends by the clock is held open even when no stream is left to fill it.
            let held_open = !whole_run && self.window.is_open();
            if !held_open && (self.active == 0 || now > deadline_ns) {
                break;
            }
            let timeout = if self.ready.is_empty() && self.restart.is_empty() {
                self.next_wake(now, deadline_ns)
            } else {
                0
            };
            for index in 0..self.poller.wait(Some(timeout))? {
                let event = self.poller.ready(index);
                let client = event.token as u32 as usize;
                if u64::from(self.clients[client].generation) == event.token >> 32 {
                    self.serve(client, event.readable, event.hangup, &mut piece);
                }
            }
            for client in std::mem::take(&mut self.ready) {
                self.serve(client, true, true, &mut piece);
            }
            for client in std::mem::take(&mut self.restart) {
                self.begin(client, now_ns());
            }
        }
        for client in 0..self.clients.len() {
            if self.clients[client].state == State::Streaming {
                let end = if self.clients[client].stopped { End::Left } else { End::Unfinished };
                self.finish(client, end);
            }
            if self.clients[client].state == State::Unopened {
                self.report.faults.unfinished += 1;
            }
        }
        self.window.end(now_ns(), &self.report);
        self.report.window = self.window.summary();
        Ok(self.report)
    }

    fn next_wake(&self, now: u64, deadline_ns: u64) -> u64 {
        let mut wake = deadline_ns;
        if self.opened < self.clients.len() {
            wake = wake.min(self.open_at(self.opened));
        }
        if let Some(end) = self.window.planned_end() {
            wake = wake.min(end);
        } else if !self.window.is_over() {
            // Waits for a condition, not for a time: look again soon.
            wake = wake.min(now + 5_000_000);
        }
        wake.saturating_sub(now).min(1_000_000_000)
    }

    /// When a client is to send its first request: spread evenly, so that the streams' phases are too.
    fn open_at(&self, client: usize) -> u64 {
        self.start_ns + (self.ramp_ns as u128 * client as u128 / self.clients.len() as u128) as u64
    }

    fn open_due(&mut self, now: u64) {
        while self.opened < self.clients.len() && self.open_at(self.opened) <= now {
            let at = self.open_at(self.opened);
            self.begin(self.opened, at);
            self.opened += 1;
        }
    }

    /// Begins and ends the window, when their time has come.
    fn mark(&mut self, now: u64, hold: Option<f64>, deadline_ns: &mut u64) {
        let Some(hold) = hold else { return };
        if !self.window.is_open() && !self.window.is_over() {
            let by_time = now >= self.start_ns + self.ramp_ns + seconds_ns(self.options.warmup);
            let all_begun = self.opened == self.clients.len()
                && self.clients.iter().all(|client| {
                    client.state == State::Finished
                        || client.used
                        || client.first_seen
                        || (self.options.idle.is_some() && client.reader.head().is_some())
                });
            if by_time && (all_begun || now > *deadline_ns) {
                self.window.begin(now, &self.report);
                self.window.plan_end(now + seconds_ns(hold));
                *deadline_ns = (*deadline_ns).max(now + seconds_ns(hold + self.options.grace));
            }
        } else if self.window.planned_end().is_some_and(|end| now >= end) {
            self.window.end(now, &self.report);
            self.over = true;
            for client in 0..self.clients.len() {
                if self.clients[client].state != State::Streaming {
                    continue;
                }
                if self.options.idle.is_some() || (self.clients[client].stopped && self.options.abandon_stuck)
                {
                    self.finish(client, End::Left);
                } else if self.clients[client].stopped {
                    self.clients[client].stopped = false;
                    self.ready.push(client);
                }
            }
        }
    }

    /// Begins a stream: on the kept connection if there is one, else on a new one.
    fn begin(&mut self, index: usize, at_ns: u64) {
        let stream = self.next_stream;
        self.next_stream += 1;
        let leaves_at = (self.options.leave > 0.0 && self.draw() < self.options.leave)
            .then(|| 1 + (self.draw() * self.events as f64) as u64);
        let request = self.request(stream);
        self.report.streams += 1;
        let client = &mut self.clients[index];
        client.request.clear();
        client.request.end().extend_from_slice(&request);
        client.reader.reset();
        client.decoder = Decoder::default();
        client.sequence = Sequence::new(stream);
        client.start_ns = at_ns;
        client.first_seen = false;
        client.done = false;
        client.error = false;
        client.leaves_at = leaves_at;
        client.state = State::Streaming;
        if let Some(link) = &mut client.link {
            if link.flush(&mut client.request).is_err() {
                self.finish(index, End::Reset);
            }
            return;
        }
        client.generation = client.generation.wrapping_add(1);
        let token = u64::from(client.generation) << 32 | index as u64;
        client.shaking_since_ns = self.tls.is_some().then(now_ns);
        let connected = net::connect(self.address).and_then(|socket| {
            self.poller.add_connection(&socket, token)?;
            Link::client(socket, self.tls.as_ref())
        });
        match connected {
            // The request goes out with the first writable event.
            Ok(link) => client.link = Some(link),
            Err(_) => self.finish(index, End::ConnectFailed),
        }
    }

    fn request(&self, stream: u64) -> Vec<u8> {
        let options = &self.options;
        let rate = if options.burst { 0.0 } else { options.rate };
        let mut params =
            format!("stream={stream}&events={}&rate={rate}&payload={}", self.events, options.payload);
        if options.idle.is_some() {
            params.push_str("&idle=1");
        }
        if !options.params.is_empty() {
            params.push('&');
            params.push_str(&options.params);
        }
        let (mut query, mut header, mut metadata) = (String::new(), String::new(), String::new());
        match options.place {
            Place::Query => query = format!("?{params}"),
            Place::Header => header = format!("x-fake: {params}\r\n"),
            Place::Body => metadata = format!(",\"metadata\":{{\"fake\":\"{params}\"}}"),
        }
        let body = format!(
            "{{\"model\":\"fake\",\"stream\":true,\"max_tokens\":{}{metadata},\"messages\":[{{\"role\":\"user\",\"content\":\"hello\"}}]}}",
            self.events
        );
        let separator = if options.path.contains('?') { query.replacen('?', "&", 1) } else { query };
        format!(
            "POST {}{separator} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n{header}Content-Length: {}\r\n\r\n{body}",
            options.path,
            options.target,
            body.len()
        )
        .into_bytes()
    }

    /// Sends and reads what can be. `until_empty`: a FIN may already wait behind the bytes.
    fn serve(&mut self, index: usize, readable: bool, until_empty: bool, piece: &mut Piece) {
        let client = &mut self.clients[index];
        let Some(link) = &mut client.link else { return };
        if client.state == State::Finished {
            return;
        }
        if !client.request.is_empty() || link.has_unsent() {
            match link.flush(&mut client.request) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return,
                Err(error) => return self.finish(index, end_by(&error)),
            }
        }
        if !readable {
            return;
        }
        for _ in 0..PIECES_PER_TURN {
            let client = &mut self.clients[index];
            if client.stopped || client.state != State::Streaming {
                return;
            }
            let Some(link) = &mut client.link else { return };
            match link.read(piece) {
                Ok(received) => {
                    if let Some(since_ns) = client.shaking_since_ns
                        && let Some(agreed) = link.agreed()
                    {
                        client.shaking_since_ns = None;
                        let in_window = self.window.is_open().then(|| now_ns().saturating_sub(since_ns));
                        self.report.handshakes.see(agreed, in_window);
                    }
                    if !received.bytes.is_empty()
                        && let Some(end) = self.take(index, received.bytes)
                    {
                        return self.finish(index, end);
                    }
                    if let Some(end) = received.end {
                        let whole = end == tls::End::Proper && self.clients[index].reader.may_close();
                        return self.finish(index, if whole { End::Complete } else { End::Closed });
                    }
                    // What comes later is a new event.
                    if received.emptied && !until_empty {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.finish(index, end_by(&error)),
            }
        }
        self.ready.push(index);
    }

    /// Takes bytes that a stream received; says how the stream ended, if it did.
    fn take(&mut self, index: usize, bytes: &[u8]) -> Option<End> {
        let now = now_ns();
        let measured = self.window.is_open();
        let client = &mut self.clients[index];
        let report = &mut self.report;
        let (decoder, sequence) = (&mut client.decoder, &mut client.sequence);
        let mut leaves = false;
        let leaves_at = client.leaves_at;
        report.bytes += bytes.len() as u64;
        let complete = client.reader.feed(bytes, |head, body| {
            if head.status != 200 || !head.event_stream {
                return;
            }
            decoder.feed(body, |event| {
                if client.done {
                    report.faults.after_done += 1;
                }
                report.events_with_id += u64::from(event.id.is_some());
                match Meaning::of(event.data) {
                    Meaning::Marked(mark) => {
                        report.events += 1;
                        sequence.see(mark.stream, mark.sequence);
                        leaves |= leaves_at.is_some_and(|at| mark.sequence >= at);
                        if measured {
                            report.added.record(now.saturating_sub(mark.due_ns));
                            report.hop.record(now.saturating_sub(mark.due_ns + mark.late_ns));
                        }
                    }
                    Meaning::Done => client.done = true,
                    Meaning::Error => {
                        client.error = true;
                        report.faults.error_events += 1;
                    }
                    Meaning::Other => report.events_other += 1,
                }
                if !client.first_seen {
                    client.first_seen = true;
                    report.first.record(now.saturating_sub(client.start_ns));
                }
            });
        });
        if client.is_stuck && client.first_seen && !self.over {
            client.stopped = true;
        }
        match complete {
            Err(_) => Some(End::Malformed),
            Ok(true) => Some(End::Complete),
            Ok(false) if leaves => Some(End::Left),
            Ok(false) => None,
        }
    }

    /// Judges a stream that has ended, and lets the client go on or stop.
    fn finish(&mut self, index: usize, end: End) {
        let client = &mut self.clients[index];
        let faults = &mut self.report.faults;
        let head = client.reader.head();
        self.report.comments += client.decoder.comments();
        faults.malformed += u64::from(end == End::Malformed || client.decoder.overlong());
        faults.reset += u64::from(end == End::Reset);
        faults.connect += u64::from(end == End::ConnectFailed);
        faults.tls += u64::from(end == End::TlsFailed);
        faults.unfinished += u64::from(end == End::Unfinished);
        let refused = head.is_some_and(|head| head.status != 200);
        if let Some(head) = head.filter(|head| head.status != 200) {
            faults.status += 1;
            *self.report.statuses.entry(head.status).or_default() += 1;
        }
        let owed = match end {
            _ if self.options.unmarked || end == End::Left || refused || end == End::ConnectFailed => None,
            _ => Some(self.events),
        };
        faults.sequence += client.sequence.finish(owed);
        if end == End::Left {
            self.report.left += 1;
        } else if client.done && end == End::Complete {
            self.report.complete += 1;
        } else if !refused && end != End::ConnectFailed && end != End::Unfinished {
            // The client would take what it has for the whole answer, or be left without one.
            faults.truncated += 1;
            if end == End::Complete && !client.error {
                faults.silent += 1;
            }
        }
        client.used = true;
        client.stopped = false;
        client.failures_in_a_row =
            if end == End::Complete || end == End::Left { 0 } else { client.failures_in_a_row + 1 };
        let keep = end == End::Complete
            && head.is_some_and(|head| head.keep_alive)
            && !client.reader.may_close()
            && !self.options.fresh;
        if !keep {
            if let Some(mut link) = client.link.take() {
                link.close();
            }
            client.generation = client.generation.wrapping_add(1);
        }
        let goes_on = self.options.again && !self.over && client.failures_in_a_row < FAILURES_IN_A_ROW_MAX;
        if goes_on {
            self.restart.push(index);
        } else {
            client.state = State::Finished;
            self.active -= 1;
        }
    }

    /// The next random number in [0, 1): splitmix64.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn end_by(error: &io::Error) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => End::ConnectFailed,
        io::ErrorKind::InvalidData => End::TlsFailed,
        _ => End::Reset,
    }
}

impl Client {
    fn new(is_stuck: bool) -> Self {
        Self {
            link: None,
            shaking_since_ns: None,
            generation: 0,
            request: Unsent::default(),
            reader: ResponseReader::default(),
            decoder: Decoder::default(),
            sequence: Sequence::default(),
            start_ns: 0,
            first_seen: false,
            done: false,
            error: false,
            used: false,
            is_stuck,
            stopped: false,
            leaves_at: None,
            state: State::Unopened,
            failures_in_a_row: 0,
        }
    }
}
