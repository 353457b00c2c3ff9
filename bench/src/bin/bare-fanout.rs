//! The floor of the fan-out comparison: what comes from one publisher is answered with a byte and written to every reader, and
//! nothing is looked at.
//!
//! One epoll thread, edge-triggered, TCP_NODELAY. A reader gets a response head when it is accepted, whatever it asks for; it
//! holds memory only while it is slower than the publisher.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use bench::net::{self, Poller, Slots, Unsent};
use clap::Parser;

/// Tokens of the listeners and of the publisher; keys of readers are below 2^63.
const READERS: u64 = u64::MAX;
const PUBLISHERS: u64 = u64::MAX - 1;
const PUBLISHER: u64 = u64::MAX - 2;
/// Connections accepted before the others have their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Bytes read at once.
const PIECE_BYTES: usize = 64 << 10;
/// What the publisher is told for whatever it sent.
const ANSWER: &[u8] = b"+";
const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n";

/// Writes what one publisher sends to every reader, and nothing else: the floor of the comparison.
#[derive(Parser)]
struct Options {
    /// Address for readers.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Address for the publisher.
    #[arg(long, default_value = "127.0.0.1:8001")]
    publish: SocketAddr,
}

struct Reader {
    socket: TcpStream,
    unsent: Unsent,
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    net::raise_descriptor_limit();
    let mut poller = Poller::new()?;
    let (readers_listener, publish_listener) = (net::listen(options.listen)?, net::listen(options.publish)?);
    poller.add_listener(&readers_listener, READERS)?;
    poller.add_listener(&publish_listener, PUBLISHERS)?;
    let mut readers: Slots<Reader> = Slots::default();
    let mut publisher: Option<TcpStream> = None;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        for index in 0..poller.wait(None)? {
            let event = poller.ready(index);
            match event.token {
                READERS => accept(&readers_listener, &poller, &mut readers)?,
                PUBLISHERS => {
                    if let Some(socket) = net::accept(&publish_listener)? {
                        poller.add_connection(&socket, PUBLISHER)?;
                        // The one before it, if there was one, is closed.
                        publisher = Some(socket);
                    }
                }
                PUBLISHER => {
                    if publisher.as_ref().is_some_and(|socket| !publish(socket, &mut piece, &mut readers)) {
                        publisher = None;
                    }
                }
                key => {
                    if readers.get_mut(key).is_some_and(|reader| !reader.serve(event.readable, &mut piece)) {
                        readers.remove(key);
                    }
                }
            }
        }
    }
}

fn accept(listener: &TcpListener, poller: &Poller, readers: &mut Slots<Reader>) -> io::Result<()> {
    for _ in 0..ACCEPTS_PER_TURN {
        let Some(socket) = net::accept(listener)? else { break };
        let mut reader = Reader { socket, unsent: Unsent::default() };
        if reader.send(HEAD) {
            let key = readers.insert(reader);
            let Some(reader) = readers.get_mut(key) else { unreachable!("just inserted") };
            poller.add_connection(&reader.socket, key)?;
        }
    }
    Ok(())
}

/// Takes what the publisher has sent and gives it to every reader. `false`: the publisher is gone.
fn publish(mut publisher: &TcpStream, piece: &mut [u8], readers: &mut Slots<Reader>) -> bool {
    loop {
        match publisher.read(piece) {
            Ok(0) => return false,
            Ok(count) => {
                // The publisher waits for it, as for any server's answer.
                if publisher.write(ANSWER).is_err() {
                    return false;
                }
                readers.retain(|reader| reader.send(&piece[..count]));
            }
            Err(error) => {
                return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            }
        }
    }
}

impl Reader {
    /// Writes as much as the socket takes and keeps the rest. `false`: the reader is gone.
    fn send(&mut self, bytes: &[u8]) -> bool {
        let mut sent = 0;
        if self.unsent.is_empty() {
            match (&self.socket).write(bytes) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
        self.unsent.end().extend_from_slice(&bytes[sent..]);
        true
    }

    /// The socket takes more, or has something to read: a request, of which nothing is of interest, or the end.
    fn serve(&mut self, readable: bool, piece: &mut [u8]) -> bool {
        if !self.unsent.is_empty() && self.unsent.flush(&self.socket).is_err() {
            return false;
        }
        if !readable {
            return true;
        }
        loop {
            match (&self.socket).read(piece) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }
}
