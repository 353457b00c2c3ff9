//! One end of a TCP connection, scripted: what it says, what it expects to hear, and how it goes.

use crate::message::{Framing, Message, field};
use crate::server::SOON;
use crate::sse::Event;
use socket2::SockRef;
use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

pub(crate) struct Peer {
    pub(crate) stream: TcpStream,
    /// Bytes read and not yet looked at.
    raw: Vec<u8>,
    /// Of the message under way.
    framing: Option<Framing>,
    /// Payload of an event stream, freed of its chunks, not yet looked at.
    text: Vec<u8>,
    /// The payload's end was seen.
    ended: bool,
}

/// How the other side went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Closed {
    Fin,
    Reset,
}

impl Peer {
    pub(crate) fn new(stream: TcpStream) -> Peer {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Peer { stream, raw: Vec::new(), framing: None, text: Vec::new(), ended: false }
    }

    pub(crate) fn try_connect(address: SocketAddr) -> io::Result<Peer> {
        Ok(Peer::new(TcpStream::connect_timeout(&address, SOON)?))
    }

    #[track_caller]
    pub(crate) fn connect(address: SocketAddr) -> Peer {
        Peer::try_connect(address).unwrap()
    }

    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    #[track_caller]
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes.as_ref()).unwrap();
    }

    /// In two segments, far enough apart that they are most likely received apart.
    #[track_caller]
    pub(crate) fn send_split(&mut self, bytes: &[u8], at: usize) {
        self.send(&bytes[..at]);
        std::thread::sleep(Duration::from_millis(2));
        self.send(&bytes[at..]);
    }

    /// Every byte in a segment of its own.
    #[track_caller]
    pub(crate) fn send_bytewise(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.send([*byte]);
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    /// Sends until the other side takes no more for this long, or is gone; gives the bytes it took.
    pub(crate) fn send_until_stuck(&mut self, piece: &[u8], still: Duration, most: usize) -> usize {
        self.stream.set_write_timeout(Some(still)).unwrap();
        let mut sent = 0;
        while sent < most {
            match self.stream.write(&piece[sent % piece.len()..]) {
                Ok(bytes) => sent += bytes,
                Err(_) => break,
            }
        }
        self.stream.set_write_timeout(Some(SOON)).unwrap();
        sent
    }

    /// The FIN of a half-close.
    pub(crate) fn shut(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Leaves by RST.
    pub(crate) fn reset(self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    /// Small socket buffers: a reader that stops is felt soon.
    pub(crate) fn receive_little(&self) {
        SockRef::from(&self.stream).set_recv_buffer_size(16 * 1024).unwrap();
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut piece = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut piece) {
                Ok(bytes) => {
                    self.raw.extend_from_slice(&piece[..bytes]);
                    return Ok(bytes);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => {
                    let so_far = String::from_utf8_lossy(&self.raw[..self.raw.len().min(400)]).into_owned();
                    return Err(Error::new(ErrorKind::TimedOut, format!("no more than {so_far:?}")));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn fill_more(&mut self) -> io::Result<()> {
        if self.fill()? == 0 {
            let so_far = String::from_utf8_lossy(&self.raw[..self.raw.len().min(400)]).into_owned();
            return Err(Error::new(ErrorKind::UnexpectedEof, format!("closed after {so_far:?}")));
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize) -> Vec<u8> {
        self.raw.drain(..bytes).collect()
    }

    fn try_until(&mut self, mark: &[u8]) -> io::Result<Vec<u8>> {
        let mut from = 0;
        loop {
            if let Some(at) = find(&self.raw[from..], mark) {
                return Ok(self.take(from + at + mark.len()));
            }
            from = self.raw.len().saturating_sub(mark.len());
            self.fill_more()?;
        }
    }

    fn try_exactly(&mut self, bytes: usize) -> io::Result<Vec<u8>> {
        while self.raw.len() < bytes {
            self.fill_more()?;
        }
        Ok(self.take(bytes))
    }

    /// Exactly so many bytes as they come.
    #[track_caller]
    pub(crate) fn exactly(&mut self, bytes: usize) -> Vec<u8> {
        self.try_exactly(bytes).unwrap()
    }

    /// The head of the next message; its body is up to the caller.
    #[track_caller]
    pub(crate) fn head(&mut self) -> Message {
        Message::parse(&self.try_until(b"\r\n\r\n").unwrap())
    }

    /// A whole request.
    #[track_caller]
    pub(crate) fn request(&mut self) -> Message {
        self.try_request().unwrap()
    }

    pub(crate) fn try_request(&mut self) -> io::Result<Message> {
        let mut message = Message::parse(&self.try_until(b"\r\n\r\n")?);
        let framing = message.framing(None);
        self.try_body(&mut message, framing)?;
        Ok(message)
    }

    /// The whole answer to a GET, POST, ...
    #[track_caller]
    pub(crate) fn response(&mut self) -> Message {
        self.try_response("GET").unwrap()
    }

    /// The whole answer to a request of that method. An error when it is cut short.
    pub(crate) fn try_response(&mut self, method: &str) -> io::Result<Message> {
        let mut message = Message::parse(&self.try_until(b"\r\n\r\n")?);
        let framing = message.framing(Some(method));
        self.try_body(&mut message, framing)?;
        Ok(message)
    }

    fn try_body(&mut self, message: &mut Message, framing: Framing) -> io::Result<()> {
        match framing {
            Framing::None => {}
            Framing::Length(length) => message.body = self.try_exactly(length)?,
            Framing::Chunked => {
                while let Some(piece) = self.try_chunk()? {
                    message.body.extend_from_slice(&piece);
                }
                loop {
                    let line = self.try_until(b"\r\n")?;
                    if line == b"\r\n" {
                        break;
                    }
                    message.trailers.push(field(std::str::from_utf8(&line).unwrap().trim_end()));
                }
            }
            Framing::UntilClose => {
                while self.fill()? > 0 {}
                message.body = std::mem::take(&mut self.raw);
            }
        }
        Ok(())
    }

    /// One chunk's payload; `None` for the last one, whose trailers follow.
    fn try_chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.try_until(b"\r\n")?;
        let size = std::str::from_utf8(&line).unwrap().trim_end();
        let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("a chunk size: {size:?}"));
        if size == 0 {
            return Ok(None);
        }
        let mut payload = self.try_exactly(size + 2)?;
        assert_eq!(payload.split_off(size), b"\r\n", "a chunk's end");
        Ok(Some(payload))
    }

    /// The head of an event stream of status 200; [`Peer::event`] and [`Peer::line`] read on.
    #[track_caller]
    pub(crate) fn stream_head(&mut self) -> Message {
        let head = self.head();
        assert_eq!(head.status(), 200, "{head:?}");
        assert!(head.field("content-type").unwrap().starts_with("text/event-stream"), "{head:?}");
        self.framing = Some(head.framing(Some("GET")));
        self.ended = false;
        assert!(self.text.is_empty());
        head
    }

    /// More payload; false at its end.
    fn try_text(&mut self) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        match self.framing.expect("a stream's head was read") {
            Framing::Chunked => match self.try_chunk()? {
                Some(piece) => self.text.extend_from_slice(&piece),
                None => {
                    assert_eq!(self.try_until(b"\r\n")?, b"\r\n", "no trailers");
                    self.ended = true;
                }
            },
            _ => {
                self.ended = self.raw.is_empty() && self.fill()? == 0;
                self.text.append(&mut self.raw);
            }
        }
        Ok(!self.ended)
    }

    /// The next event, complete with the comments in front of it; `None` at a proper end.
    pub(crate) fn try_event(&mut self) -> io::Result<Option<Event>> {
        loop {
            if let Some(bytes) = Event::ends_in(&self.text) {
                return Ok(Some(Event { raw: self.text.drain(..bytes).collect() }));
            }
            if !self.try_text()? {
                let rest = String::from_utf8_lossy(&self.text).into_owned();
                let whole = |line: &str| line.starts_with(':') || line.starts_with("retry:");
                assert!(rest.lines().all(whole), "a partial event: {rest:?}");
                self.text.clear();
                return Ok(None);
            }
        }
    }

    #[track_caller]
    pub(crate) fn event(&mut self) -> Event {
        self.try_event().unwrap().expect("an event, not the end")
    }

    /// The next line of the payload without its LF.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        loop {
            if let Some(at) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=at).collect();
                return String::from_utf8(line[..at].to_vec()).unwrap();
            }
            assert!(self.try_text().unwrap(), "a line, not the end");
        }
    }

    /// Nothing but the stream's proper end is left; gives the number of events read on the way there: none.
    #[track_caller]
    pub(crate) fn stream_end(&mut self) {
        if let Some(event) = self.try_event().unwrap() {
            panic!("another event: {event:?}");
        }
    }

    /// Events up to the stream's proper end.
    #[track_caller]
    pub(crate) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.try_event().unwrap()).collect()
    }

    /// Nothing arrives for this long.
    #[track_caller]
    pub(crate) fn silence(&mut self, length: Duration) {
        assert!(self.raw.is_empty() && self.text.is_empty(), "not silent: {:?}", self.raw);
        self.stream.set_read_timeout(Some(length)).unwrap();
        let result = self.fill();
        self.stream.set_read_timeout(Some(SOON)).unwrap();
        let heard = String::from_utf8_lossy(&self.raw).into_owned();
        assert!(matches!(&result, Err(error) if is_timeout(error)), "not silent: {result:?} {heard:?}");
    }

    /// The other side closes without another byte.
    #[track_caller]
    pub(crate) fn closed(&mut self) -> Closed {
        let how = self.closed_after();
        let rest = String::from_utf8_lossy(&self.raw).into_owned();
        assert!(self.raw.is_empty() && self.text.is_empty(), "more before the close: {rest:?}");
        how
    }

    /// The other side closes; what it said before is thrown away.
    #[track_caller]
    pub(crate) fn closed_after(&mut self) -> Closed {
        loop {
            match self.fill() {
                Ok(0) => return Closed::Fin,
                Ok(_) => {}
                Err(error) if is_timeout(&error) => panic!("not closed: {error}"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                    return Closed::Reset;
                }
            }
        }
    }

    /// How long from now until the other side closes.
    #[track_caller]
    pub(crate) fn time_to_close(&mut self) -> Duration {
        let start = Instant::now();
        self.closed_after();
        start.elapsed()
    }

    /// Everything up to the end of the connection, and how it ended.
    #[track_caller]
    pub(crate) fn rest(&mut self) -> (Vec<u8>, Closed) {
        let how = self.closed_after();
        (std::mem::take(&mut self.raw), how)
    }
}

pub(crate) fn is_timeout(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}
