//! A small HTTP client for `tokenring streams`: one request for each connection, on a thread that waits. It reads answers as strictly
//! as the server reads its backends'.

use crate::settings::address::{Host, ServerAddress, UpstreamUrl};
use crate::tls;
use protocol::http::{BodyDecoder, HeadLimits, Piece, header_slots, parse_response};
use rustls::{ClientConnection, StreamOwned};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// For a connection to stand.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// For an answer that does not come, or does not go on: streams have heartbeats.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a whole answer, but an export's: 10,000 streams of a listing take about 5 MB.
const ANSWER_BYTES_MAX: usize = 64 << 20;

trait Connection: Read + Write {}
impl<C: Read + Write> Connection for C {}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) address: ServerAddress,
    /// Authorities that an https server's certificate must come from; `None`: the system's.
    pub(crate) authorities: Option<PathBuf>,
}

/// An answer, of which the body is still to be read.
pub(crate) struct Response {
    pub(crate) status: u16,
    fields: Vec<(String, Vec<u8>)>,
    connection: Box<dyn Connection>,
    body: BodyDecoder,
    held: Vec<u8>,
    from: usize,
}

impl Client {
    pub(crate) fn get(&self, path: &str, fields: &str) -> io::Result<Response> {
        self.ask("GET", path, fields)
    }

    /// Asks, and reads the head of the answer. `fields` are whole lines.
    pub(crate) fn ask(&self, method: &str, path: &str, fields: &str) -> io::Result<Response> {
        let mut connection = self.connect()?;
        let (authority, base_path) = match &self.address {
            ServerAddress::Url(url) => (url.authority.as_str(), url.base_path.as_str()),
            ServerAddress::Unix(_) => ("localhost", ""),
        };
        let head = format!(
            "{method} {base_path}{path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: tokenring/{}\r\n{fields}Connection: close\r\n\r\n",
            env!("CARGO_PKG_VERSION")
        );
        connection.write_all(head.as_bytes())?;
        connection.flush()?;
        let mut held = Vec::new();
        loop {
            let mut slots = header_slots();
            let head = parse_response(&held, &mut slots, &HeadLimits::default(), method);
            if let Some(head) = head.map_err(|refusal| broken(refusal.message()))? {
                let fields =
                    head.headers.iter().map(|field| (field.name.to_ascii_lowercase(), field.value.to_vec()));
                let (status, from) = (head.status, head.head_bytes);
                let (fields, body) = (fields.collect(), BodyDecoder::new(head.framing, u64::MAX));
                return Ok(Response { status, fields, connection, body, held, from });
            }
            if more(&mut *connection, &mut held)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn connect(&self) -> io::Result<Box<dyn Connection>> {
        let url = match &self.address {
            ServerAddress::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SILENCE_LIMIT))?;
                return Ok(Box::new(stream));
            }
            ServerAddress::Url(url) => url,
        };
        let addresses: Vec<_> = match &url.host {
            Host::Address(address) => vec![(*address, url.port).into()],
            Host::Name(name) => (name.as_str(), url.port).to_socket_addrs()?.collect(),
        };
        let mut failed = io::Error::new(ErrorKind::NotFound, "its name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
                    return self.secure(url, stream);
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn secure(&self, url: &UpstreamUrl, stream: TcpStream) -> io::Result<Box<dyn Connection>> {
        if !url.tls {
            return Ok(Box::new(stream));
        }
        let other = |error: String| io::Error::other(error);
        let name =
            url.host.server_name().ok_or_else(|| other("no certificate can be for this name".to_owned()))?;
        let config = tls::client(self.authorities.as_deref()).map_err(other)?;
        let session = ClientConnection::new(config, name).map_err(|error| other(error.to_string()))?;
        Ok(Box::new(StreamOwned::new(session, stream)))
    }
}

impl Response {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().find(|(known, _)| known == name)?;
        std::str::from_utf8(&field.1).ok()
    }

    /// Some bytes of the body; empty at its end.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] when it breaks off.
    pub(crate) fn some(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let mut input = &self.held[self.from..];
            let piece = self.body.next(&mut input).map_err(|refusal| broken(refusal.message()))?;
            let found = match piece {
                Piece::Data(data) => Some(data.to_vec()),
                Piece::End => Some(Vec::new()),
                Piece::NeedMore => None,
            };
            self.from = self.held.len() - input.len();
            if let Some(found) = found {
                return Ok(found);
            }
            self.held.clear();
            self.from = 0;
            if more(&mut *self.connection, &mut self.held)? == 0 {
                return if self.body.eof_is_end() {
                    Ok(Vec::new())
                } else {
                    Err(ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// The rest of the body.
    pub(crate) fn whole(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let some = self.some()?;
            if some.is_empty() {
                return Ok(all);
            }
            all.extend(some);
            if all.len() > ANSWER_BYTES_MAX {
                return Err(broken("the answer is too long"));
            }
        }
    }
}

fn broken(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// Reads what is there; 0 at the end.
fn more(connection: &mut dyn Connection, held: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 16 << 10];
    loop {
        match connection.read(&mut buffer) {
            Ok(bytes) => {
                held.extend_from_slice(&buffer[..bytes]);
                return Ok(bytes);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A session that ends without `close_notify`.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer_of(said: &'static [u8]) -> io::Result<(u16, io::Result<Vec<u8>>)> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ServerAddress::parse(&listener.local_addr().unwrap().to_string()).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                more(&mut stream, &mut asked).unwrap();
            }
            // In pieces, as long as anybody wants them.
            said.chunks(3).all(|piece| stream.write_all(piece).is_ok());
        });
        let client = Client { address, authorities: None };
        let response =
            client.get("/a", "X-Test: yes\r\n").map(|mut response| (response.status, response.whole()));
        server.join().unwrap();
        response
    }

    #[test]
    fn bodies_are_read_to_their_end_or_break_off() {
        let whole = |said| answer_of(said).unwrap().1.map_err(|error| error.kind());
        assert_eq!(whole(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").unwrap(), b"hello");
        assert_eq!(whole(b"HTTP/1.1 200 OK\r\n\r\nhello").unwrap(), b"hello");
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
        assert_eq!(whole(chunked).unwrap(), b"hello");
        assert_eq!(whole(&chunked[..chunked.len() - 3]), Err(ErrorKind::UnexpectedEof));
        assert_eq!(
            whole(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello"),
            Err(ErrorKind::UnexpectedEof)
        );
        assert_eq!(answer_of(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().0, 204);
        assert_eq!(answer_of(b"HTTP/1.1 20").unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(answer_of(b"SSH-2.0-OpenSSH\r\n\r\n").unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
