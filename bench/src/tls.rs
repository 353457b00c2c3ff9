//! A connection as the tools see it: plain, or TLS by rustls's buffered interface over the same non-blocking socket.
//!
//! The plain one costs what a bare socket does. The server under test may use the same library, but none of this code.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue, WebPkiServerVerifier,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, HandshakeKind, NamedGroup,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};

use crate::net::Unsent;

/// Bytes read from a socket at once.
const PIECE_BYTES: usize = 64 << 10;
/// Tickets that the client keeps: as many as it may have connections that begin at the same time.
const TICKETS_MAX: usize = 1024;

/// Room for what one read brings, shared by all connections of a thread.
pub struct Piece {
    wire: Vec<u8>,
    plain: Vec<u8>,
}

impl Default for Piece {
    fn default() -> Self {
        Self { wire: vec![0; PIECE_BYTES], plain: Vec::new() }
    }
}

/// What one read brought.
#[derive(Debug)]
pub struct Received<'a> {
    /// The peer's bytes, decrypted; none if there were only records of the handshake.
    pub bytes: &'a [u8],
    /// Whether the socket had no more: what comes later is told by a new event. A FIN may still wait.
    pub emptied: bool,
    /// How the connection ended, if it did.
    pub end: Option<End>,
}

/// How the peer ended a connection that was not reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a FIN, and in TLS a close_notify before it.
    Proper,
    /// In TLS, by a FIN alone: whoever is on the path may have cut it.
    Cut,
}

/// A connection, plain or TLS.
pub enum Link {
    /// Bytes as they are.
    Plain(TcpStream),
    /// Bytes in records.
    Tls(Box<Secured>),
}

/// A TLS session and its socket.
pub struct Secured {
    socket: TcpStream,
    session: Connection,
}

/// What a handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Whether it went on with an earlier session, so that no certificate was needed.
    pub resumed: bool,
    /// Version, cipher suite and key exchange, as in `TLSv1_3 TLS13_AES_256_GCM_SHA384 X25519`.
    pub terms: String,
}

impl Link {
    /// The client's side of a connection whose connect has begun.
    pub fn client(socket: TcpStream, tls: Option<&ClientSide>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(Self::Plain(socket)) };
        let session = ClientConnection::new(tls.config.clone(), tls.name.clone()).map_err(broken)?;
        Ok(Self::Tls(Box::new(Secured { socket, session: session.into() })))
    }

    /// The server's side of an accepted connection.
    pub fn server(socket: TcpStream, tls: Option<&Arc<ServerConfig>>) -> io::Result<Self> {
        let Some(config) = tls else { return Ok(Self::Plain(socket)) };
        let session = ServerConnection::new(config.clone()).map_err(broken)?;
        Ok(Self::Tls(Box::new(Secured { socket, session: session.into() })))
    }

    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(secured) => &secured.socket,
        }
    }

    /// Reads once from the socket. Errors of the kind `InvalidData` are TLS's own; the alert has been sent.
    pub fn read<'a>(&mut self, piece: &'a mut Piece) -> io::Result<Received<'a>> {
        let count = loop {
            match self.socket().read(&mut piece.wire) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        let emptied = count < piece.wire.len();
        match self {
            Self::Plain(_) => {
                let end = (count == 0).then_some(End::Proper);
                Ok(Received { bytes: &piece.wire[..count], emptied, end })
            }
            Self::Tls(secured) => {
                piece.plain.clear();
                let end = secured.decrypt(&piece.wire[..count], &mut piece.plain)?;
                Ok(Received { bytes: &piece.plain, emptied, end })
            }
        }
    }

    /// Writes as much as the socket takes; `Ok(true)` when all is sent.
    pub fn flush(&mut self, unsent: &mut Unsent) -> io::Result<bool> {
        match self {
            Self::Plain(socket) => unsent.flush(socket),
            Self::Tls(secured) => secured.flush(unsent),
        }
    }

    /// Whether records wait for room in the socket, beside what is not yet encrypted.
    pub fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(secured) => secured.session.wants_write(),
        }
    }

    /// What the handshake agreed on, once it is over; `None` for ever if the connection is plain.
    pub fn agreed(&self) -> Option<Agreed> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => secured.agreed(),
        }
    }

    /// Says farewell, if the connection has a way to and the socket room.
    pub fn close(&mut self) {
        if let Self::Tls(secured) = self {
            secured.session.send_close_notify();
            // The peer that has gone needs none.
            match secured.push() {
                Ok(_) | Err(_) => {}
            }
        }
    }
}

impl Secured {
    /// Takes what was read, appends what it says to `plain`, and sends what the handshake answers.
    fn decrypt(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> io::Result<Option<End>> {
        if wire.is_empty() {
            return Ok(Some(End::Cut));
        }
        while !wire.is_empty() {
            // Takes some KiB at a time, so that what it decrypts never exceeds what it holds for us.
            self.session.read_tls(&mut wire)?;
            let state = match self.session.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The alert is a courtesy; the peer may have gone.
                    match self.push() {
                        Ok(_) | Err(_) => return Err(broken(error)),
                    }
                }
            };
            let (at, more) = (plain.len(), state.plaintext_bytes_to_read());
            if more > 0 {
                plain.resize(at + more, 0);
                self.session.reader().read_exact(&mut plain[at..])?;
            }
            if state.peer_has_closed() {
                return Ok(Some(End::Proper));
            }
        }
        self.push()?;
        Ok(None)
    }

    fn flush(&mut self, unsent: &mut Unsent) -> io::Result<bool> {
        loop {
            if unsent.is_empty() {
                return self.push();
            }
            let taken = self.session.writer().write(unsent.bytes())?;
            unsent.sent(taken);
            // Before the handshake is over the session keeps some of it and sends that by itself, and takes no more.
            if !self.push()? || taken == 0 {
                return Ok(false);
            }
        }
    }

    /// Writes records; `Ok(true)` when there are no more.
    fn push(&mut self) -> io::Result<bool> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut (&self.socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn agreed(&self) -> Option<Agreed> {
        if self.session.is_handshaking() {
            return None;
        }
        let (version, suite) = (self.session.protocol_version()?, self.session.negotiated_cipher_suite()?);
        // A resumed session of TLS 1.2 has no key exchange.
        let group = self.session.negotiated_key_exchange_group();
        let group = group.map_or_else(|| "none".to_owned(), |group| format!("{:?}", group.name()));
        Some(Agreed {
            resumed: self.session.handshake_kind()? == HandshakeKind::Resumed,
            terms: format!("{version:?} {:?} {group}", suite.suite()),
        })
    }
}

/// What a client needs for its connections: roots, and the name that it expects.
pub struct ClientSide {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl ClientSide {
    /// `resume`: connections after the first use its tickets.
    pub fn new(ca: &Path, name: &str, resume: bool) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca)? {
            roots.add(certificate).map_err(broken)?;
        }
        let provider = Arc::new(ring::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(broken)?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(broken)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(VerifiedOnce { inner, seen: OnceLock::new() }))
            .with_no_client_auth();
        config.resumption =
            if resume { Resumption::store(Arc::new(Tickets::default())) } else { Resumption::disabled() };
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self { config: Arc::new(config), name })
    }
}

/// What a server needs for its connections: certificate chain and key as PEM. Sessions are resumed by tickets.
pub fn server_side(certificate: &Path, key: &Path) -> io::Result<Arc<ServerConfig>> {
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(broken)?
        .with_no_client_auth()
        .with_single_cert(certificates(certificate)?, key)
        .map_err(broken)?;
    config.ticketer = ring::Ticketer::new().map_err(broken)?;
    Ok(Arc::new(config))
}

/// A chain that was found good is good the next time: a client that opens thousands of connections to one server would
/// otherwise spend more on it than the server on the handshake. The handshake's own signature is checked each time.
#[derive(Debug)]
struct VerifiedOnce {
    inner: Arc<WebPkiServerVerifier>,
    seen: OnceLock<(Vec<CertificateDer<'static>>, ServerName<'static>)>,
}

impl ServerCertVerifier for VerifiedOnce {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = || std::iter::once(leaf).chain(intermediates);
        if let Some((seen, seen_name)) = self.seen.get()
            && seen_name == name
            && seen.iter().eq(chain())
        {
            return Ok(ServerCertVerified::assertion());
        }
        let verified = self.inner.verify_server_cert(leaf, intermediates, name, ocsp, now)?;
        // Another chain later on is verified each time.
        self.seen.get_or_init(|| (chain().map(|item| item.clone().into_owned()).collect(), name.to_owned()));
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// The tickets of the one server that a client knows, each used once, the newest first. The library's own store keeps eight,
/// with which dozens of connections at a time would be full handshakes for the most part.
#[derive(Debug)]
struct Tickets {
    unused: Mutex<VecDeque<Tls13ClientSessionValue>>,
    /// All that is no ticket of TLS 1.3.
    others: ClientSessionMemoryCache,
}

impl Default for Tickets {
    fn default() -> Self {
        Self { unused: Mutex::default(), others: ClientSessionMemoryCache::new(1) }
    }
}

impl Tickets {
    fn unused(&self) -> MutexGuard<'_, VecDeque<Tls13ClientSessionValue>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.others.set_kx_hint(name, group);
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.others.kx_hint(name)
    }

    fn set_tls12_session(&self, name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.others.set_tls12_session(name, value);
    }

    fn tls12_session(&self, name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.others.tls12_session(name)
    }

    fn remove_tls12_session(&self, name: &ServerName<'static>) {
        self.others.remove_tls12_session(name);
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut unused = self.unused();
        if unused.len() == TICKETS_MAX {
            unused.pop_front();
        }
        unused.push_back(value);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.unused().pop_back()
    }
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(path, &error))?;
    if found.is_empty() { Err(unreadable(path, &"no certificate in it")) } else { Ok(found) }
}

fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// Both sides of a connection, blocking, after their handshake.
    fn pair(test: &str) -> (Link, Link) {
        let directory = std::env::temp_dir().join(format!("tokenring-tls-{}-{test}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/certificates");
        let made = std::process::Command::new(script).arg(&directory).status().unwrap();
        assert!(made.success(), "openssl is needed");
        let client = ClientSide::new(&directory.join("ca.pem"), "localhost", false).unwrap();
        let server = server_side(&directory.join("chain.pem"), &directory.join("key.pem")).unwrap();
        std::fs::remove_dir_all(directory).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut client = Link::client(socket, Some(&client)).unwrap();
        let mut server = Link::server(listener.accept().unwrap().0, Some(&server)).unwrap();
        let mut piece = Piece::default();
        let mut hello = Unsent::default();
        hello.end().extend_from_slice(b"hello");
        assert!(client.flush(&mut hello).unwrap(), "what the handshake holds back is the session's");
        let mut seen = Vec::new();
        while seen.is_empty() {
            seen.extend_from_slice(server.read(&mut piece).unwrap().bytes);
            if client.agreed().is_none() {
                assert_eq!(client.read(&mut piece).unwrap().bytes, b"");
            }
        }
        assert_eq!(seen, b"hello");
        assert!(server.agreed().is_some() && client.agreed().is_some());
        (client, server)
    }

    /// All that the other side sent, and how it ended.
    fn read_to_end(link: &mut Link) -> (Vec<u8>, End) {
        let (mut piece, mut seen) = (Piece::default(), Vec::new());
        loop {
            let received = link.read(&mut piece).unwrap();
            seen.extend_from_slice(received.bytes);
            if let Some(end) = received.end {
                return (seen, end);
            }
        }
    }

    #[test]
    fn many_records_come_whole_through_a_small_socket() {
        let (mut client, mut server) = pair("records");
        server.socket().set_nonblocking(true).unwrap();
        let mut unsent = Unsent::default();
        let sent: Vec<u8> = (0..20_000_000u32).map(|n| (n * 7) as u8).collect();
        unsent.end().extend_from_slice(&sent);
        assert!(!server.flush(&mut unsent).unwrap(), "20 MB do not fit a socket buffer");
        let (mut piece, mut received) = (Piece::default(), Vec::new());
        while received.len() < sent.len() {
            received.extend_from_slice(client.read(&mut piece).unwrap().bytes);
            server.flush(&mut unsent).unwrap();
        }
        assert!(unsent.is_empty() && !server.has_unsent());
        assert!(received == sent);
    }

    #[test]
    fn an_end_without_a_farewell_is_a_cut() {
        let (mut client, server) = pair("cut");
        drop(server);
        assert_eq!(read_to_end(&mut client), (Vec::new(), End::Cut));
        let (mut client, mut server) = pair("farewell");
        let mut unsent = Unsent::default();
        unsent.end().extend_from_slice(b"bye");
        assert!(server.flush(&mut unsent).unwrap());
        server.close();
        drop(server);
        assert_eq!(read_to_end(&mut client), (b"bye".to_vec(), End::Proper));
    }

    #[test]
    fn what_is_no_record_is_an_error_of_tls() {
        let (mut client, server) = pair("garbage");
        let mut bare = server.socket();
        bare.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        // Tickets may come first.
        let mut piece = Piece::default();
        let error = loop {
            match client.read(&mut piece) {
                Ok(received) => assert_eq!((received.bytes, received.end), (&b""[..], None)),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
