//! TLS of one connection, without I/O: ciphertext in, plaintext and records for the socket out. rustls does the protocol; this
//! is the bookkeeping between its records and the connection's completion accounting.
//!
//! ```text
//!   receive buffers ─► incoming (a part of a record) ─► rustls ─► plaintext ─► HTTP
//!   log of a stream ─► seal: one batch at a time ─► rustls ─► out (records) ─► one send in flight ─► confirmed
//! ```
//! A batch of plaintext counts as sent when the last byte of its records was: what lies in `out` is lent memory like any
//! other, and the stream's cursor has not moved.

use protocol::ledger::Ledger;
use protocol::limits::{TLS_HANDSHAKE_BYTES_MAX, TLS_RECORD_BYTES_MAX, TLS_SEALED_OVERHEAD_BYTES};
use protocol::log::Log;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error, HandshakeKind, ServerConfig};
use std::sync::Arc;

/// A fatal alert as a record of its own (RFC 8446 sections 5.1 and 6).
const fn fatal(alert: u8) -> [u8; 7] {
    [21, 3, 1, 0, 2, 2, alert]
}
/// What a TLS client understands when there is no TLS to be had.
pub(crate) const HANDSHAKE_FAILURE: [u8; 7] = fatal(40);
const UNEXPECTED_MESSAGE: [u8; 7] = fatal(10);
const DECODE_ERROR: [u8; 7] = fatal(50);
/// The first byte of every TLS connection: a record of the type `handshake`.
pub(crate) const HELLO_BYTE: u8 = 22;

/// Memory of a shard that its TLS connections use in turns.
#[derive(Default)]
pub(crate) struct Scratch {
    /// What was decrypted, or is to be encrypted.
    pub(crate) plain: Vec<u8>,
    /// Records on their way from rustls into a connection's log.
    records: Vec<u8>,
}

enum Side {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Handshake,
    Open,
    /// Our `close_notify` or a fatal alert is in `out`: nothing follows.
    Closed,
}

/// TLS of one connection.
pub(crate) struct Tls {
    side: Side,
    stage: Stage,
    /// Its handshake was completed.
    opened: bool,
    /// The peer's `close_notify` has come: what it had to say is whole.
    heard_close: bool,
    /// Received, and not yet to be taken: a part of a record, or of a handshake message.
    incoming: Vec<u8>,
    /// Records, ready for the socket.
    out: Log,
    /// What of `out` was sent.
    pub(crate) ledger: Ledger,
    /// Where in `out` the batch ends whose plaintext waits for its confirmation.
    batch_end: u64,
}

/// A session that owes its peer nothing, on its way to another shard.
pub(crate) struct TlsAtRest {
    side: Side,
    stage: Stage,
    opened: bool,
    heard_close: bool,
    incoming: Vec<u8>,
}

impl std::fmt::Debug for TlsAtRest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TlsAtRest({:?})", self.stage)
    }
}

impl From<TlsAtRest> for Tls {
    fn from(rest: TlsAtRest) -> Self {
        let TlsAtRest { side, stage, opened, heard_close, incoming } = rest;
        Tls { stage, opened, heard_close, incoming, ..Tls::new(side) }
    }
}

/// What is wanted of rustls once it has taken all that was received.
enum Task<'a> {
    Receive,
    Seal(&'a [u8]),
    Close,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (incoming, unsent) = (self.incoming.len(), self.out.end() - self.ledger.sent());
        write!(f, "Tls({:?}, {incoming} bytes of a record held, {unsent} unsent)", self.stage)
    }
}

impl Tls {
    fn new(side: Side) -> Self {
        Tls {
            side,
            stage: Stage::Handshake,
            opened: false,
            heard_close: false,
            incoming: Vec::new(),
            out: Log::new(),
            ledger: Ledger::default(),
            batch_end: 0,
        }
    }

    /// With a client.
    ///
    /// # Errors
    /// A configuration that cannot work.
    pub(crate) fn server(config: &Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Tls::new(Side::Server(Box::new(UnbufferedServerConnection::new(Arc::clone(config))?))))
    }

    /// With a backend of that name; its hello is ready for the socket.
    ///
    /// # Errors
    /// A configuration that cannot work.
    pub(crate) fn client(
        config: &Arc<ClientConfig>,
        name: &ServerName<'static>,
        scratch: &mut Scratch,
    ) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(Arc::clone(config), name.clone())?;
        let mut tls = Tls::new(Side::Client(Box::new(connection)));
        tls.receive(&mut [], scratch)?;
        Ok(tls)
    }

    fn common(&self) -> &CommonState {
        match &self.side {
            Side::Server(connection) => connection,
            Side::Client(connection) => connection,
        }
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.stage == Stage::Handshake
    }

    /// Its handshake was completed, whatever came then.
    pub(crate) fn was_open(&self) -> bool {
        self.opened
    }

    pub(crate) fn heard_close(&self) -> bool {
        self.heard_close
    }

    /// The handshake took up an earlier session.
    pub(crate) fn is_resumed(&self) -> bool {
        self.common().handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// The certificate that the peer showed, DER.
    pub(crate) fn peer_certificate(&self) -> Option<&[u8]> {
        self.common().peer_certificates()?.first().map(AsRef::as_ref)
    }

    /// What lies ready in `out` and was not sent.
    pub(crate) fn has_unsent(&self) -> bool {
        self.out.end() > self.ledger.sent()
    }

    pub(crate) fn out(&self) -> &Log {
        &self.out
    }

    /// Bytes held beyond the session itself.
    pub(crate) fn held_bytes(&self) -> usize {
        self.incoming.capacity() + self.out.memory_bytes()
    }

    /// Takes what was received, decrypting in place where it lies. Plaintext is appended to `scratch.plain`, answers of the
    /// protocol itself to `out`; gives the number of records that carried plaintext.
    ///
    /// # Errors
    /// The connection is over; an alert that says so to the peer is in `out`, and what was decrypted before is in
    /// `scratch.plain`.
    pub(crate) fn receive(&mut self, bytes: &mut [u8], scratch: &mut Scratch) -> Result<u64, Error> {
        if self.heard_close {
            // Whatever follows its own end is not the peer's.
            return Ok(0);
        }
        let (used, result) = if self.incoming.is_empty() {
            let (used, result) = self.drive(bytes, Task::Receive, scratch);
            self.incoming.extend_from_slice(&bytes[used..]);
            (used, result)
        } else {
            let mut incoming = std::mem::take(&mut self.incoming);
            incoming.extend_from_slice(bytes);
            let (used, result) = self.drive(&mut incoming, Task::Receive, scratch);
            incoming.drain(..used);
            self.incoming = incoming;
            (used, result)
        };
        if self.heard_close || result.is_err() {
            self.incoming.clear();
        }
        if self.incoming.is_empty() {
            // A connection at rest owns no buffer.
            self.incoming = Vec::new();
        }
        let most = if self.is_handshaking() { TLS_HANDSHAKE_BYTES_MAX } else { TLS_RECORD_BYTES_MAX };
        if result.is_ok() && used == 0 && self.incoming.len() > most {
            self.stage = Stage::Closed;
            self.incoming = Vec::new();
            if self.out.end() == 0 {
                self.out.append(&[&DECODE_ERROR]);
            }
            return Err(Error::General("a message of the handshake is too long".to_owned()));
        }
        result
    }

    /// Encrypts `scratch.plain` as the next batch.
    ///
    /// # Errors
    /// The keys are used up, or the peer has made it impossible.
    pub(crate) fn seal(&mut self, scratch: &mut Scratch) -> Result<(), Error> {
        let plain = std::mem::take(&mut scratch.plain);
        let result = self.drive_incoming(Task::Seal(&plain), scratch);
        scratch.plain = plain;
        self.batch_end = self.out.end();
        result
    }

    /// Says `close_notify`, once.
    pub(crate) fn say_close(&mut self, scratch: &mut Scratch) {
        if self.stage == Stage::Open && self.drive_incoming(Task::Close, scratch).is_ok() {
            self.stage = Stage::Closed;
        }
    }

    fn drive_incoming(&mut self, task: Task<'_>, scratch: &mut Scratch) -> Result<(), Error> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let (used, result) = self.drive(&mut incoming, task, scratch);
        incoming.drain(..used);
        self.incoming = incoming;
        result.map(drop)
    }

    fn drive(
        &mut self,
        bytes: &mut [u8],
        task: Task<'_>,
        scratch: &mut Scratch,
    ) -> (usize, Result<u64, Error>) {
        let mut drive = Drive { out: &mut self.out, scratch, open: false, heard_close: false, records: 0 };
        let (used, result) = match &mut self.side {
            Side::Server(connection) => drive.run(&mut **connection, bytes, task),
            Side::Client(connection) => drive.run(&mut **connection, bytes, task),
        };
        let Drive { open, heard_close, records, .. } = drive;
        self.heard_close |= heard_close;
        if open && self.stage == Stage::Handshake {
            self.stage = Stage::Open;
            self.opened = true;
        }
        if let Err(error) = &result {
            self.stage = Stage::Closed;
            if self.out.end() == 0 && !matches!(error, Error::AlertReceived(_)) {
                // rustls ends some hellos without a word; nothing is encrypted yet, so it can be said for it.
                let alert = match error {
                    Error::InvalidMessage(_) => DECODE_ERROR,
                    Error::PeerMisbehaved(_) => UNEXPECTED_MESSAGE,
                    _ => HANDSHAKE_FAILURE,
                };
                self.out.append(&[&alert]);
            }
        }
        (used, result.map(|()| records))
    }

    /// Everything of it but its log; nothing may be unsent.
    pub(crate) fn at_rest(self) -> TlsAtRest {
        assert!(!self.has_unsent(), "records are left behind");
        let Tls { side, stage, opened, heard_close, incoming, .. } = self;
        TlsAtRest { side, stage, opened, heard_close, incoming }
    }

    /// So many bytes of `out` were sent; true when the batch that waits for it is through.
    pub(crate) fn confirmed(&mut self, bytes: u32) -> bool {
        self.ledger.complete(bytes);
        self.out.release(self.ledger.sent());
        self.ledger.sent() >= self.batch_end
    }
}

/// rustls' two unbuffered connections, which differ by a type only.
trait Connection {
    type Data;
    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    /// Records of the protocol's own wait to be encoded.
    fn has_records(&self) -> bool;
}

impl Connection for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }
    fn has_records(&self) -> bool {
        self.wants_write()
    }
}

impl Connection for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }
    fn has_records(&self) -> bool {
        self.wants_write()
    }
}

/// One run of rustls' state machine.
struct Drive<'a> {
    out: &'a mut Log,
    scratch: &'a mut Scratch,
    open: bool,
    heard_close: bool,
    records: u64,
}

impl Drive<'_> {
    /// Goes on until nothing more can be taken from `bytes`, then does the task. Gives the bytes that are done with.
    fn run<C: Connection>(
        &mut self,
        connection: &mut C,
        bytes: &mut [u8],
        task: Task<'_>,
    ) -> (usize, Result<(), Error>) {
        let mut from = 0;
        let mut failed = None;
        loop {
            if failed.is_some() && !connection.has_records() {
                // The alert was the last; what is left of the input must not be looked at again.
                return (from, failed.map_or(Ok(()), Err));
            }
            let UnbufferedStatus { mut discard, state } = connection.process(&mut bytes[from..]);
            let mut done = false;
            match state {
                // The alert is what comes next.
                Err(error) => failed = failed.or(Some(error)),
                Ok(ConnectionState::EncodeTlsData(mut record)) => {
                    let records = &mut self.scratch.records;
                    let written = loop {
                        match record.encode(records) {
                            Ok(written) => break written,
                            Err(EncodeError::InsufficientSize(size)) => records.resize(size.required_size, 0),
                            Err(EncodeError::AlreadyEncoded) => break 0,
                        }
                    };
                    self.out.append(&[&records[..written]]);
                }
                Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                discard += record.discard;
                                self.records += 1;
                                self.scratch.plain.extend_from_slice(record.payload);
                            }
                            Err(error) => {
                                failed = Some(error);
                                break;
                            }
                        }
                    }
                }
                Ok(ConnectionState::PeerClosed) => self.heard_close = true,
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    self.open = true;
                    done = true;
                    let records = &mut self.scratch.records;
                    let written = match task {
                        Task::Receive => Ok(0),
                        Task::Seal(plain) => {
                            records.resize(sealed_bytes_max(plain.len()), 0);
                            traffic.encrypt(plain, records)
                        }
                        Task::Close => {
                            records.resize(sealed_bytes_max(2), 0);
                            traffic.queue_close_notify(records)
                        }
                    };
                    match written {
                        Ok(written) => {
                            self.out.append(&[&records[..written]]);
                        }
                        Err(error) => failed = Some(as_error(&error)),
                    }
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::Closed) => {
                    done = true;
                    if !matches!(task, Task::Receive) {
                        failed = failed.or(Some(Error::HandshakeNotComplete));
                    }
                }
                Ok(_) => {
                    // Early data is never accepted.
                    failed =
                        Some(Error::General("rustls is in a state that nothing here leads to".to_owned()));
                    done = true;
                }
            }
            from += discard;
            if done {
                return (from, failed.map_or(Ok(()), Err));
            }
        }
    }
}

/// Bytes that so many of plaintext take as records, and a queued message of the protocol's own in front of them.
fn sealed_bytes_max(plain: usize) -> usize {
    plain + (plain / (16 * 1024) + 2) * TLS_SEALED_OVERHEAD_BYTES
}

fn as_error(error: &EncryptError) -> Error {
    Error::General(error.to_string())
}

#[cfg(test)]
mod tests;
