//! The floor of the comparison: relays bytes both ways between a client and its own backend connection, and reads none of them.
//!
//! One epoll thread, edge-triggered, TCP_NODELAY on both sides, one shared buffer; a direction holds memory only while its
//! reader is slower than its writer, and then at most one buffer's worth.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

use bench::net::{self, Poller, Slots, Unsent};
use clap::Parser;

/// Token of the listener; keys of pairs are below 2^63, shifted by one for the side.
const LISTENER: u64 = u64::MAX;
/// Connections accepted before the others have their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Bytes read at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces that one direction may move before the others have their turn.
const PIECES_PER_TURN: usize = 4;

/// Relays bytes, and nothing else: the floor of the comparison.
#[derive(Parser)]
struct Options {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Address of the backend.
    #[arg(long, default_value = "127.0.0.1:9000")]
    upstream: SocketAddr,
}

struct Pair {
    sockets: [TcpStream; 2],
    /// `flows[side]` takes bytes from `sockets[side]` to the other one.
    flows: [Flow; 2],
}

#[derive(Default)]
struct Flow {
    /// Read, but not taken by the reader: while there is some, nothing more is read.
    unsent: Unsent,
    /// The writer has sent its FIN, and it was passed on.
    finished: bool,
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    net::raise_descriptor_limit();
    let mut poller = Poller::new()?;
    let listener = net::listen(options.listen)?;
    poller.add_listener(&listener, LISTENER)?;
    let mut pairs: Slots<Pair> = Slots::default();
    let mut piece = vec![0; PIECE_BYTES];
    // (key, side) of flows that had their share and may have more to read.
    let mut ready: Vec<(u64, usize)> = Vec::new();
    loop {
        let timeout = if ready.is_empty() { None } else { Some(0) };
        for index in 0..poller.wait(timeout)? {
            let event = poller.ready(index);
            if event.token == LISTENER {
                accept(&listener, options.upstream, &poller, &mut pairs)?;
                continue;
            }
            let (key, side) = (event.token >> 1, (event.token & 1) as usize);
            if event.readable {
                relay(key, side, event.hangup, &mut pairs, &mut piece, &mut ready);
            }
            // Writable: only a flow that was held up has anything to gain.
            let held_up = |pair: &mut Pair| !pair.flows[1 - side].unsent.is_empty();
            if event.writable && pairs.get_mut(key).is_some_and(held_up) {
                relay(key, 1 - side, true, &mut pairs, &mut piece, &mut ready);
            }
        }
        for (key, side) in std::mem::take(&mut ready) {
            relay(key, side, true, &mut pairs, &mut piece, &mut ready);
        }
    }
}

fn accept(
    listener: &TcpListener,
    upstream: SocketAddr,
    poller: &Poller,
    pairs: &mut Slots<Pair>,
) -> io::Result<()> {
    for _ in 0..ACCEPTS_PER_TURN {
        let Some(client) = net::accept(listener)? else { break };
        // A backend that cannot be reached ends the client's connection; it is told no more by a relay of bytes.
        let Ok(backend) = net::connect(upstream) else { continue };
        let key = pairs.insert(Pair { sockets: [client, backend], flows: Default::default() });
        let Some(pair) = pairs.get_mut(key) else { unreachable!("just inserted") };
        for (side, socket) in pair.sockets.iter().enumerate() {
            poller.add_connection(socket, key << 1 | side as u64)?;
        }
    }
    Ok(())
}

/// Moves bytes that came from `side`, in the way of [`Pair::relay`]; drops the pair when it is over.
fn relay(
    key: u64,
    side: usize,
    until_empty: bool,
    pairs: &mut Slots<Pair>,
    piece: &mut [u8],
    ready: &mut Vec<(u64, usize)>,
) {
    let Some(pair) = pairs.get_mut(key) else { return };
    match pair.relay(side, until_empty, piece) {
        Ok(true) => ready.push((key, side)),
        Ok(false) if !pair.flows.iter().all(|flow| flow.finished) => {}
        Ok(false) | Err(_) => {
            pairs.remove(key);
        }
    }
}

impl Pair {
    /// Moves bytes; `Ok(true)` when there may be more at once. `until_empty`: a FIN may already wait behind the bytes.
    fn relay(&mut self, side: usize, until_empty: bool, piece: &mut [u8]) -> io::Result<bool> {
        let (mut from, mut to) = (&self.sockets[side], &self.sockets[1 - side]);
        let flow = &mut self.flows[side];
        if flow.finished || !flow.unsent.flush(to)? {
            return Ok(false);
        }
        for _ in 0..PIECES_PER_TURN {
            let count = match from.read(piece) {
                Ok(0) => {
                    flow.finished = true;
                    to.shutdown(Shutdown::Write)?;
                    return Ok(false);
                }
                Ok(count) => count,
                // Also while the connect to the backend is still under way.
                Err(error) if is_not_ready(&error) => return Ok(false),
                Err(error) => return Err(error),
            };
            let sent = match to.write(&piece[..count]) {
                Ok(sent) => sent,
                Err(error) if is_not_ready(&error) => 0,
                Err(error) => return Err(error),
            };
            if sent < count {
                flow.unsent.end().extend_from_slice(&piece[sent..count]);
                return Ok(false);
            }
            // Edge-triggered, and still safe: less than a whole piece means that the socket was empty, and a later
            // byte or FIN is a new event. What came before the event is told by `until_empty`.
            if count < piece.len() && !until_empty {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn is_not_ready(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::NotConnected
    )
}
