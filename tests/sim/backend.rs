//! Scripted backends: each connection reads requests at its own pace, checks their bytes, and gives the answer that the
//! request's exchange has planned, faults included.

use crate::control::{authority, base_path};
use crate::plan::{Answer, Attempt, Exchange, Framed, Method, Request, Then};
use crate::reader::Reader;
use crate::world::{Event, Peer, PeerRead, World};
use protocol::dialect::Dialect;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BackendHost {
    /// Given by its place among the hosts.
    #[serde(skip, default = "nowhere")]
    pub(crate) address: SocketAddr,
    /// Which of the backends it serves.
    pub(crate) upstream: usize,
    pub(crate) refuses: bool,
    pub(crate) hangs: bool,
    /// Idle connections are closed after at most so long; 0: never.
    pub(crate) idle_us: u64,
    pub(crate) read_bytes: usize,
    pub(crate) read_gap_us: u64,
    pub(crate) never_reads: bool,
    /// Its connections are reset then, and no new one is accepted before it is back; 0: it lives.
    pub(crate) dies_us: u64,
    pub(crate) dead_us: u64,
}

fn nowhere() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 8000))
}

impl Default for BackendHost {
    fn default() -> Self {
        BackendHost::new(0)
    }
}

impl BackendHost {
    pub(crate) fn new(nth: u16) -> Self {
        BackendHost {
            address: SocketAddr::from(([10, 0, 0, 1], 8000 + nth)),
            upstream: 0,
            refuses: false,
            hangs: false,
            idle_us: 0,
            read_bytes: 1 << 20,
            read_gap_us: 0,
            never_reads: false,
            dies_us: 0,
            dead_us: 0,
        }
    }
}

#[derive(Debug)]
struct Current {
    exchange: usize,
    attempt: usize,
    responding: bool,
    /// Bytes of the request's body that were right.
    checked: usize,
    cursor: usize,
}

#[derive(Debug)]
pub(crate) struct BackendConn {
    host: usize,
    pub(crate) socket: usize,
    reader: Reader,
    current: Option<Current>,
    served: usize,
    closed: bool,
    read_due: bool,
    write_due: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HostStep {
    Die,
    Return,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BackendStep {
    Read,
    Write,
    /// Dies if it has served no more than this since.
    Die(usize),
}

impl World {
    /// Puts the deaths of the hosts on the calendar.
    pub(crate) fn hosts_live(&mut self) {
        for host in 0..self.hosts.len() {
            let BackendHost { dies_us, dead_us, .. } = self.hosts[host];
            if dies_us > 0 {
                self.after(dies_us, Event::Host(host, HostStep::Die));
                self.after(dies_us + dead_us, Event::Host(host, HostStep::Return));
            }
        }
    }

    pub(crate) fn host_step(&mut self, host: usize, step: HostStep) {
        self.say(|| format!("host {host}: {step:?}"));
        self.hosts[host].refuses = step == HostStep::Die;
        if step == HostStep::Die {
            for index in 0..self.backends.len() {
                if self.backends[index].host == host && !self.backends[index].closed {
                    self.break_socket(self.backends[index].socket);
                }
            }
        }
    }

    pub(crate) fn backend_accepts(&mut self, host: usize, socket: usize) {
        let backend = self.backends.len();
        self.say(|| format!("b{backend} accepts s{socket}"));
        self.backends.push(BackendConn {
            host,
            socket,
            reader: Reader::new(false),
            current: None,
            served: 0,
            closed: false,
            read_due: false,
            write_due: false,
        });
        self.attach_peer(socket, Peer::Backend(backend));
    }

    pub(crate) fn backend_readable(&mut self, index: usize) {
        let host = &self.hosts[self.backends[index].host];
        let (gap, never) = (host.read_gap_us, host.never_reads);
        let delay = self.delay() + self.rng.skewed(gap);
        let backend = &mut self.backends[index];
        if !backend.read_due && !backend.closed && !never {
            backend.read_due = true;
            self.after(delay, Event::Backend(index, BackendStep::Read));
        }
    }

    pub(crate) fn backend_writable(&mut self, index: usize) {
        let responding = self.backends[index].current.as_ref().is_some_and(|current| current.responding);
        if responding {
            self.backend_writes_after(index, 0);
        }
    }

    fn backend_writes_after(&mut self, index: usize, delay: u64) {
        let backend = &mut self.backends[index];
        if !backend.write_due && !backend.closed {
            backend.write_due = true;
            self.after(delay, Event::Backend(index, BackendStep::Write));
        }
    }

    pub(crate) fn backend_step(&mut self, index: usize, step: BackendStep) {
        match step {
            BackendStep::Read => self.backend_reads(index),
            BackendStep::Write => self.backend_writes(index),
            BackendStep::Die(served) => {
                let backend = &mut self.backends[index];
                if backend.served == served && backend.current.is_none() && !backend.closed {
                    backend.closed = true;
                    let socket = backend.socket;
                    self.say(|| format!("b{index} dies idle"));
                    self.peer_close(socket);
                }
            }
        }
    }

    fn backend_reads(&mut self, index: usize) {
        let most = self.hosts[self.backends[index].host].read_bytes as u64;
        let most = self.rng.skewed(most) as usize + 1;
        let backend = &mut self.backends[index];
        backend.read_due = false;
        if backend.closed {
            return;
        }
        let socket = backend.socket;
        match self.peer_read(socket, most) {
            PeerRead::Nothing => {}
            PeerRead::Data(bytes) => {
                self.backends[index].reader.feed(&bytes);
                self.backend_understands(index);
                self.backend_readable(index);
            }
            PeerRead::Fin | PeerRead::Reset => {
                let backend = &mut self.backends[index];
                backend.closed = true;
                self.say(|| format!("b{index} is closed by the shard"));
                self.peer_close(socket);
            }
        }
    }

    fn backend_understands(&mut self, index: usize) {
        let backend = &mut self.backends[index];
        if let Some(error) = &backend.reader.error {
            panic!("b{index} cannot read its request: {error}");
        }
        let Some(message) = backend.reader.messages.get(backend.served) else { return };
        let current = match &mut backend.current {
            Some(current) => current,
            None => {
                let asked = message.start_line.split(' ').nth(1).unwrap_or_default().to_owned();
                let id = message.header("x-sim").and_then(|id| id.parse().ok());
                // What is not found here, the backend may know; in these runs it never does.
                let passed_on = id.is_none() && asked.starts_with("/v1/responses/");
                let id: usize = match id {
                    Some(id) => id,
                    None if passed_on => {
                        let mut request = Request::new(Dialect::Plain, false);
                        request.method = Method::Get;
                        let answer = Answer { status: 404, ..Answer::body(9, Framed::Length) };
                        let exchange = Exchange::new(self.exchanges.len(), request, answer, &mut self.rng);
                        self.exchanges.push(exchange);
                        self.exchanges.len() - 1
                    }
                    None => panic!("a request without its mark: {message:?}"),
                };
                let upstream = self.hosts[backend.host].upstream;
                let target = format!("{}{}", base_path(upstream), self.exchanges[id].request.path());
                assert!(
                    passed_on || asked == target,
                    "b{index} was asked for {asked}, which is {target} there"
                );
                assert_eq!(message.header("host"), Some(authority(upstream).as_str()), "b{index} has a name");
                let attempts = &mut self.exchanges[id].attempts;
                attempts.push(Attempt {
                    socket: backend.socket,
                    body_complete: false,
                    written: 0,
                    over: false,
                });
                let attempt = attempts.len() - 1;
                backend.current.insert(Current {
                    exchange: id,
                    attempt,
                    responding: false,
                    checked: 0,
                    cursor: 0,
                })
            }
        };
        let (id, attempt) = (current.exchange, current.attempt);
        let exchange = &mut self.exchanges[id];
        let expected = &exchange.body;
        let new = current.checked.min(message.body.len());
        let same = expected.get(new..message.body.len()) == Some(&message.body[new..]);
        assert!(same, "b{index} was given other bytes than exchange {id} has");
        current.checked = message.body.len();
        if message.complete {
            assert!(expected.len() == message.body.len(), "b{index}: the body of exchange {id} is cut");
            exchange.attempts[attempt].body_complete = true;
            if exchange.attempts[attempt].over {
                return self.backend_finishes(index, id, attempt);
            }
        }
        let early = exchange.answer.early_after.is_some_and(|bytes| message.body.len() >= bytes);
        let delay = exchange.answer.head_delay_us;
        if !current.responding && (message.complete || early) {
            current.responding = true;
            self.backend_writes_after(index, delay);
        }
    }

    fn backend_writes(&mut self, index: usize) {
        let backend = &mut self.backends[index];
        backend.write_due = false;
        if backend.closed {
            return;
        }
        let socket = backend.socket;
        let Some(Current { exchange: id, attempt, responding: true, cursor, .. }) = backend.current else {
            return;
        };
        let exchange = &self.exchanges[id];
        let (wire, answer) = (&exchange.wire, &exchange.answer);
        let mut end = wire.bytes.len();
        if cursor < wire.head_bytes && answer.prefill_us > 0 {
            end = end.min(wire.head_bytes);
        }
        let piece = self.rng.skewed(answer.piece_bytes as u64) as usize + 1;
        let bytes = wire.bytes[cursor..end.min(cursor + piece)].to_vec();
        let (gap, prefill) = (answer.gap_us, answer.prefill_us);
        let (head_bytes, wire_bytes) = (wire.head_bytes, wire.bytes.len());
        let taken = match self.peer_write(socket, &bytes) {
            Ok(taken) => taken,
            Err(_) => return self.backend_readable(index),
        };
        if taken == 0 && !bytes.is_empty() {
            return;
        }
        let cursor = cursor + taken;
        self.exchanges[id].attempts[attempt].written = cursor;
        if let Some(current) = &mut self.backends[index].current {
            current.cursor = cursor;
        }
        if cursor == wire_bytes {
            return self.backend_finishes(index, id, attempt);
        }
        let mut delay = self.rng.skewed(gap);
        if cursor == head_bytes {
            delay += prefill;
        }
        self.backend_writes_after(index, delay);
    }

    fn backend_finishes(&mut self, index: usize, id: usize, attempt: usize) {
        let then = self.exchanges[id].wire.then;
        self.say(|| format!("b{index} has answered {id}: {then:?}"));
        let idle = self.hosts[self.backends[index].host].idle_us;
        let backend = &mut self.backends[index];
        let socket = backend.socket;
        match then {
            Then::Stall => return,
            Then::KeepAlive => {
                // Before it is idle, the rest of an early answered request is read.
                self.exchanges[id].attempts[attempt].over = true;
                if self.exchanges[id].attempts[attempt].body_complete {
                    backend.current = None;
                    backend.served += 1;
                    let served = backend.served;
                    if idle > 0 {
                        let delay = self.rng.below(idle);
                        self.after(delay, Event::Backend(index, BackendStep::Die(served)));
                    }
                    self.backend_understands(index);
                }
                return;
            }
            Then::Close => {
                backend.closed = true;
                self.peer_close(socket);
            }
            Then::Reset => {
                backend.closed = true;
                self.peer_reset(socket);
            }
        }
        self.exchanges[id].attempts[attempt].over = true;
    }
}
