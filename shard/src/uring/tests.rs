//! The real ring against real sockets on loopback; peers are std::net in this thread or others.
#![allow(clippy::disallowed_methods, reason = "tests measure how long the kernel took")]

mod deferred;
mod listening;
mod turns;

use super::*;
use crate::io::{Completion as C, Hangup, ReceiveEnd};
use crate::settings::Sleep;
use protocol::http::HeadLimits;
use protocol::limits::COMPLETIONS_PER_TURN_MAX;
use protocol::log::Log;
use protocol::phase::Deadlines;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

type Completions = Vec<Completion<Socket, Buffer>>;

/// Small, for one shard on this machine; the demo model answers every path.
pub(crate) fn settings() -> Settings {
    Settings {
        connections_max: 100,
        listeners: Vec::new(),
        tls_handshake_ms: 10_000,
        tls_handshakes_max: 1000,
        backlog: 128,
        ring_depth: 64,
        buffers: 64,
        buffer_bytes: 4096,
        notsent_lowat_bytes: 16 * 1024,
        spin_us: 0,
        preempt_ms: 10,
        sleep: Sleep::Ring,
        head: HeadLimits::default(),
        body_bytes_max: 1 << 20,
        event_bytes_max: 1 << 20,
        lag_high_bytes: 64 * 1024,
        lag_low_bytes: 16 * 1024,
        retry_bytes_max: 64 * 1024,
        overdraft_bytes_max: 64 << 20,
        pool_idle_max: 8,
        pool_idle_ms: 1000,
        pool_age_ms: 0,
        routes: vec![crate::settings::Route {
            name: "all".into(),
            path_prefix: "/".into(),
            upstreams: Vec::new(),
            deadlines: Deadlines::default(),
            heartbeat_ms: 0,
            commit_ms: 0,
            half_close: crate::settings::HalfClose::Leave,
            event_ids: false,
            cors: protocol::cors::Cors::Off,
            resume: None,
        }],
        resume_bytes_max: 4 << 20,
        detached_max: 10,
        mirror_readers: 64,
        resumes_per_s: 1000,
        background_keep_ms: 600_000,
        background_window_bytes: 1 << 20,
        stream_key: [7; 32],
        stream_number_first: 1,
        demo: protocol::demo::DemoSettings::default(),
        records: false,
        durable: protocol::durable::Settings::default(),
        unix_time_at_start_s: 0,
        unix_time_at_start_ms: 0,
        seed: 1,
    }
}

/// An `Io` with one listener, and what it has completed so far.
struct Bench {
    io: UringIo,
    address: SocketAddr,
    wake: Arc<Bell>,
    seen: Completions,
}

fn conn(slot: u32) -> Key {
    Key { slot, generation: std::num::NonZeroU32::MIN }
}

fn lent(bytes: &[u8]) -> Lent {
    let mut log = Log::new();
    log.append(&[bytes]);
    log.lend(0, u32::MAX).unwrap()
}

impl Bench {
    fn new() -> Self {
        Self::with(&settings())
    }

    fn with(settings: &Settings) -> Self {
        let listener =
            listen("127.0.0.1:0".parse().unwrap(), settings.backlog, settings.notsent_lowat_bytes).unwrap();
        let address = listener.local_addr().unwrap();
        let wake = Arc::new(Bell::new().unwrap());
        let io = UringIo::new(settings, vec![listener], Arc::clone(&wake)).unwrap();
        Bench { io, address, wake, seen: Vec::new() }
    }

    fn turn(&mut self, wait: Wait) {
        self.io.turn(wait, &mut self.seen).unwrap();
    }

    fn turn_ms(&mut self, ms: u64) {
        let until = self.io.now_us() + ms * 1000;
        self.turn(Wait::Until(until));
    }

    /// Turns until `pick` finds what it wants among the completions, which it takes out.
    fn until<T>(&mut self, pick: impl Fn(&Completion<Socket, Buffer>) -> Option<T>) -> T {
        let deadline_us = self.io.now_us() + 5_000_000;
        loop {
            if let Some((at, found)) =
                self.seen.iter().enumerate().find_map(|(at, completion)| Some((at, pick(completion)?)))
            {
                self.seen.remove(at);
                return found;
            }
            assert!(self.io.now_us() < deadline_us, "nothing of the kind within 5 s: {:?}", self.seen);
            self.turn(Wait::Until(deadline_us));
        }
    }

    fn accepted(&mut self) -> Socket {
        self.until(|completion| match completion {
            C::Accepted { listener: 0, socket } => Some(*socket),
            _ => None,
        })
    }

    /// A connected pair: ours, and the peer's end.
    fn pair(&mut self) -> (Socket, TcpStream) {
        let op = self.io.accept(0, false);
        let peer = TcpStream::connect(self.address).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let socket = self.accepted();
        assert_eq!(self.accept_ended(), None);
        assert!(!self.io.ops.contains(op));
        (socket, peer)
    }

    fn accept_ended(&mut self) -> Option<Errno> {
        self.until(|completion| match completion {
            C::AcceptEnded { listener: 0, error, .. } => Some(*error),
            _ => None,
        })
    }

    fn sent(&mut self, conn: Key) -> Result<u32, Errno> {
        self.until(|completion| match completion {
            C::Sent { conn: of, result } if *of == conn => Some(*result),
            _ => None,
        })
    }

    fn received(&mut self, conn: Key) -> Vec<u8> {
        self.until(|completion| match completion {
            C::Received { conn: of, buffer } if *of == conn => Some(buffer.to_vec()),
            _ => None,
        })
    }

    fn receive_ended(&mut self, conn: Key) -> ReceiveEnd {
        self.until(|completion| match completion {
            C::ReceiveEnded { conn: of, why } if *of == conn => Some(*why),
            _ => None,
        })
    }

    fn connected(&mut self, conn: Key) -> Result<(), Errno> {
        self.until(|completion| match completion {
            C::Connected { conn: of, result } if *of == conn => Some(*result),
            _ => None,
        })
    }

    fn hung_up(&mut self, conn: Key) -> Result<Hangup, Errno> {
        self.until(|completion| match completion {
            C::Hangup { conn: of, result, .. } if *of == conn => Some(*result),
            _ => None,
        })
    }
}

/// Threads that the kernel made to do io_uring work for this thread: named after it.
fn kernel_workers() -> Vec<String> {
    // SAFETY: gettid(2) takes nothing and cannot fail.
    let name = format!("iou-wrk-{}", unsafe { libc::gettid() });
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|found| found.trim() == name)
        .collect()
}

#[test]
fn a_client_is_accepted_heard_answered_and_seen_to_leave() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    assert_eq!(bench.io.peer(socket), Some(peer.local_addr().unwrap()));
    bench.io.receive(conn(1), socket);
    for round in 0..100_u32 {
        let text = format!("request {round}");
        peer.write_all(text.as_bytes()).unwrap();
        assert_eq!(bench.received(conn(1)), text.as_bytes());
        bench.io.send(conn(1), socket, lent(text.as_bytes()), Confirm::Prompt);
        assert_eq!(bench.sent(conn(1)), Ok(text.len() as u32));
        let mut answer = vec![0; text.len()];
        peer.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text.as_bytes());
    }
    assert_eq!(bench.io.operations(), 2, "the receive is still armed, and so is the wake-up");
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.receive_ended(conn(1)), ReceiveEnd::Fin);

    bench.io.shutdown(socket, Half::Write);
    bench.turn(Wait::Not);
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0, "our FIN");
    bench.io.close(socket, Close::Orderly);
    bench.turn(Wait::Not);
    assert_eq!((bench.io.sockets(), bench.io.lent_bytes()), (0, 0));
}

#[test]
fn a_reset_is_an_error_of_the_receive() {
    let mut bench = Bench::new();
    let (socket, peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    bench.turn(Wait::Not);
    assert!(!bench.io.is_reset(socket));
    SockRefOf(&peer).linger_zero();
    drop(peer);
    assert_eq!(bench.receive_ended(conn(1)), ReceiveEnd::Error(Errno(libc::ECONNRESET)));
    assert!(bench.io.is_reset(socket));
    bench.io.send(conn(1), socket, lent(b"to nobody"), Confirm::Prompt);
    assert_eq!(bench.sent(conn(1)), Err(Errno(libc::EPIPE)), "and no SIGPIPE");
}

/// A FIN is none: the other half of the connection lives.
#[test]
fn a_half_closed_connection_is_not_reset() {
    let mut bench = Bench::new();
    let (socket, peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.receive_ended(conn(1)), ReceiveEnd::Fin);
    assert!(!bench.io.is_reset(socket));
}

struct SockRefOf<'a>(&'a TcpStream);

impl SockRefOf<'_> {
    fn linger_zero(&self) {
        socket2::SockRef::from(self.0).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

#[test]
fn what_is_sent_before_a_shutdown_or_close_of_the_same_turn_arrives_before_it() {
    let mut bench = Bench::new();
    for _ in 0..20 {
        let (socket, mut peer) = bench.pair();
        bench.io.send(conn(1), socket, lent(b"last words"), Confirm::Prompt);
        bench.io.shutdown(socket, Half::Write);
        bench.turn(Wait::Not);
        assert_eq!(bench.sent(conn(1)), Ok(10));
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        // Both in one turn: the close acts after the shutdown.
        bench.io.shutdown(socket, Half::Both);
        bench.io.close(socket, Close::Orderly);
        bench.turn(Wait::Not);
        assert_eq!(bench.io.sockets(), 0);
    }
}

#[test]
fn a_close_acts_even_when_its_turn_sleeps() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    bench.io.close(socket, Close::Orderly);
    let wake = Arc::clone(&bench.wake);
    let reader = std::thread::spawn(move || {
        let read = peer.read(&mut [0; 8]).unwrap();
        wake.ring();
        read
    });
    bench.until(|completion| matches!(completion, C::Woken).then_some(()));
    assert_eq!(reader.join().unwrap(), 0, "the FIN left before the sleep");
}

#[test]
fn a_reset_close_is_seen_as_such() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    bench.io.close(socket, Close::Reset);
    bench.turn(Wait::Not);
    assert_eq!(peer.read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// The claim that completion accounting stands on: a send to a reader that stopped stays in flight, and the kernel's share
/// of what was appended stays small.
#[test]
fn a_send_to_a_reader_that_stopped_parks_and_completes_when_it_reads() {
    let mut bench = Bench::new();
    bench.io.accept(0, false);
    let peer = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    peer.set_recv_buffer_size(8 * 1024).unwrap();
    peer.connect(&bench.address.into()).unwrap();
    let mut peer = TcpStream::from(peer);
    let socket = bench.accepted();

    let (chunk, mut accepted) = (vec![7; 16 * 1024], 0_usize);
    let parked_at = loop {
        bench.io.send(conn(1), socket, lent(&chunk), Confirm::Prompt);
        bench.turn_ms(50);
        match bench.seen.iter().position(|completion| matches!(completion, C::Sent { .. })) {
            Some(at) => {
                bench.seen.remove(at);
                accepted += chunk.len();
            }
            None => break accepted,
        }
        assert!(accepted < 1 << 20, "the kernel swallows everything: NOTSENT_LOWAT is not in force");
    };
    let mut unsent = 0;
    // SAFETY: SIOCOUTQ writes an int; the socket is open.
    assert_eq!(unsafe { libc::ioctl(socket.fd(), libc::TIOCOUTQ, &raw mut unsent) }, 0);
    println!("accepted {parked_at} bytes before parking; {unsent} in the send queue");
    assert!(unsent < 64 * 1024, "{unsent} bytes in the kernel for one reader that stopped");
    assert_eq!(bench.io.lent_bytes(), chunk.len() as u64);

    let total = parked_at + chunk.len();
    let reader = std::thread::spawn(move || {
        let mut read = vec![0; total];
        peer.read_exact(&mut read).unwrap();
        read.iter().all(|&byte| byte == 7)
    });
    assert_eq!(bench.sent(conn(1)), Ok(chunk.len() as u32), "whole, because of MSG_WAITALL");
    assert!(reader.join().unwrap());
    assert_eq!(kernel_workers(), Vec::<String>::new());
}

/// Fills a connection until a send stays in flight.
fn park_a_send(bench: &mut Bench, socket: Socket) -> (OpId, u32) {
    loop {
        let range = lent(&[1; 64 * 1024]);
        let bytes = range.len() as u32;
        let op = bench.io.send(conn(1), socket, range, Confirm::Prompt);
        bench.turn_ms(20);
        match bench.seen.iter().position(|completion| matches!(completion, C::Sent { .. })) {
            Some(at) => drop(bench.seen.remove(at)),
            None => return (op, bytes),
        }
    }
}

#[test]
fn every_kind_of_operation_can_be_cancelled() {
    let mut bench = Bench::new();
    let (socket, _peer) = bench.pair();

    let (op, bytes) = park_a_send(&mut bench, socket);
    bench.io.cancel(op);
    match bench.sent(conn(1)) {
        Ok(sent) => assert!(sent < bytes, "some of it had gone"),
        Err(error) => assert_eq!(error, Errno::CANCELED),
    }
    assert_eq!(bench.io.lent_bytes(), 0);

    let op = bench.io.receive(conn(1), socket);
    bench.turn(Wait::Not);
    bench.io.cancel(op);
    assert_eq!(bench.receive_ended(conn(1)), ReceiveEnd::Error(Errno::CANCELED));

    let op = bench.io.watch_hangup(conn(1), socket);
    // In the same turn as its request, too.
    bench.io.cancel(op);
    assert_eq!(bench.hung_up(conn(1)), Err(Errno::CANCELED));

    for multishot in [true, false] {
        let op = bench.io.accept(0, multishot);
        bench.turn(Wait::Not);
        bench.io.cancel(op);
        assert_eq!(bench.accept_ended(), Some(Errno::CANCELED));
        // A stale id does nothing, now and when somebody else has the slot.
        bench.io.cancel(op);
        bench.turn(Wait::Not);
    }

    assert_eq!(bench.io.operations(), 1, "only the wake-up");
    bench.io.close(socket, Close::Orderly);
}

#[test]
fn a_connect_stands_is_refused_or_is_cancelled_while_it_waits() {
    let mut bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (socket, _) = bench.io.connect(conn(1), address).unwrap();
    assert_eq!(bench.connected(conn(1)), Ok(()));
    let (mut peer, _) = listener.accept().unwrap();
    bench.io.send(conn(1), socket, lent(b"hello"), Confirm::Prompt);
    assert_eq!(bench.sent(conn(1)), Ok(5));
    peer.read_exact(&mut [0; 5]).unwrap();
    drop(listener);
    let (refused, _) = bench.io.connect(conn(2), address).unwrap();
    assert_eq!(bench.connected(conn(2)), Err(Errno(libc::ECONNREFUSED)));

    // A listener with a full queue leaves the SYN unanswered: the connect waits.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    full.listen(1).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    for slot in 10..14 {
        waiting.push((slot, bench.io.connect(conn(slot), address).unwrap()));
        bench.turn_ms(50);
    }
    let (slot, (socket, op)) = waiting.pop().unwrap();
    assert!(bench.io.ops.contains(op), "it should be waiting for the SYN's answer");
    assert_eq!(kernel_workers(), Vec::<String>::new(), "a waiting connect is a poll, not a thread");
    bench.io.cancel(op);
    assert_eq!(bench.connected(conn(slot)), Err(Errno::CANCELED));
    bench.io.close(socket, Close::Orderly);
    bench.io.close(refused, Close::Orderly);
    bench.turn(Wait::Not);
}

#[test]
fn a_hangup_is_seen_without_receiving() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    bench.io.watch_hangup(conn(1), socket);
    peer.write_all(b"data is no hangup").unwrap();
    bench.turn_ms(30);
    assert!(bench.seen.is_empty(), "{:?}", bench.seen);
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.hung_up(conn(1)), Ok(Hangup::Fin));
    // And at once when it has already happened; and an RST behind it.
    let (socket, peer) = bench.pair();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    bench.turn_ms(10);
    bench.io.watch_hangup(conn(3), socket);
    assert_eq!(bench.hung_up(conn(3)), Ok(Hangup::Fin));
    bench.seen.clear();
    SockRefOf(&peer).linger_zero();
    drop(peer);
    assert_eq!(bench.hung_up(conn(3)), Ok(Hangup::Reset));

    let (socket, peer) = bench.pair();
    bench.io.watch_hangup(conn(2), socket);
    bench.turn(Wait::Not);
    SockRefOf(&peer).linger_zero();
    drop(peer);
    assert_eq!(bench.hung_up(conn(2)), Ok(Hangup::Reset));
}

#[test]
fn a_receive_without_buffers_ends_and_is_armed_again_when_they_are_back() {
    let mut bench = Bench::with(&Settings { buffers: 2, buffer_bytes: 16, ..settings() });
    let (socket, mut peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    let text: Vec<u8> = (0..100).collect();
    peer.write_all(&text).unwrap();
    let mut heard = Vec::new();
    let mut shortages = 0;
    while heard.len() < text.len() {
        match bench.receive_ended(conn(1)) {
            ReceiveEnd::Error(error) => assert_eq!(error, Errno::NO_BUFFERS),
            ReceiveEnd::Rearm => {}
            ReceiveEnd::Fin => panic!("the peer is there"),
        }
        shortages += 1;
        assert_eq!(bench.io.buffers_free(), 0, "both are held here");
        for completion in bench.seen.drain(..) {
            if let C::Received { buffer, .. } = completion {
                heard.extend_from_slice(&buffer);
            }
        }
        assert_eq!(bench.io.buffers_free(), 2);
        bench.io.receive(conn(1), socket);
        bench.turn_ms(20);
        if heard.len() + 32 > text.len() {
            while heard.len() < text.len() {
                heard.extend(bench.received(conn(1)));
            }
        }
    }
    assert_eq!(heard, text);
    assert!(shortages >= 3, "{shortages}");
}

#[test]
fn lent_memory_outlives_the_log_it_came_from() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    let (op, bytes) = park_a_send(&mut bench, socket);
    let pattern: Vec<u8> = (0..50_000_u32).map(|i| i as u8).collect();
    // Drain what parked, then send from a log that is gone before its send completes.
    let drain = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    assert_eq!(bench.sent(conn(1)), Ok(bytes));
    assert!(!bench.io.ops.contains(op));
    {
        let mut log = Log::new();
        log.append(&[&pattern]);
        bench.io.send(conn(1), socket, log.lend(0, u32::MAX).unwrap(), Confirm::Prompt);
        log.release(log.end());
    }
    // What the allocator would hand out next if the memory had been freed.
    let decoys: Vec<Vec<u8>> = (0..16).map(|_| vec![0xEE; 50_000]).collect();
    assert_eq!(bench.sent(conn(1)), Ok(50_000));
    drop(decoys);
    bench.io.close(socket, Close::Orderly);
    bench.turn(Wait::Not);
    let all = drain.join().unwrap();
    assert_eq!(all[all.len() - 50_000..], pattern);
}

#[test]
fn dropping_the_ring_ends_what_is_in_flight_and_closes_its_sockets() {
    let mut bench = Bench::new();
    let (first, mut first_peer) = bench.pair();
    let (second, mut second_peer) = bench.pair();
    park_a_send(&mut bench, first);
    bench.io.receive(conn(1), first);
    bench.io.receive(conn(2), second);
    bench.io.accept(0, true);
    bench.io.watch_hangup(conn(2), second);
    second_peer.write_all(b"never taken").unwrap();
    bench.turn_ms(5);
    // One that is queued but not submitted, and a buffer that outlives the ring.
    bench.io.send(conn(2), second, lent(b"bye"), Confirm::Prompt);
    let position = bench.seen.iter().position(|completion| matches!(completion, C::Received { .. })).unwrap();
    let C::Received { buffer, .. } = bench.seen.remove(position) else { unreachable!() };
    let Bench { io, address, .. } = bench;
    let started = Instant::now();
    drop(io);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(&*buffer, b"never taken");
    let mut text = Vec::new();
    // Data of ours that was never read by us turns the close into a reset; either way the peer sees the end.
    let end = second_peer.read_to_end(&mut text);
    assert!(end.is_ok() || end.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    assert!(text.is_empty() || text == b"bye");
    let end = first_peer.read_to_end(&mut text);
    assert!(end.is_ok() || end.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    assert!(TcpStream::connect(address).is_err(), "the listener is closed");
}

#[test]
#[should_panic(expected = "is closed twice or with operations in flight")]
fn a_close_with_operations_in_flight_is_a_bug_that_stops_the_shard() {
    let mut bench = Bench::new();
    let (socket, _peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    bench.io.close(socket, Close::Orderly);
}

#[test]
#[should_panic(expected = "is used after its close")]
fn a_socket_used_after_its_close_is_a_bug_that_stops_the_shard() {
    let mut bench = Bench::new();
    let (socket, _peer) = bench.pair();
    bench.io.close(socket, Close::Orderly);
    bench.io.receive(conn(1), socket);
}
