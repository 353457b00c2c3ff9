//! TLS of the simulated peers: a rustls connection between what a peer says and the bytes in its pipe. The peers themselves
//! know nothing of it, except how they end.

use super::sockets::Ending;
use super::{PeerRead, World};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    SupportedProtocolVersion,
};
use std::io::{Read, Write};
use std::sync::Arc;

/// The name in every certificate.
const NAME: &str = "sim.test";

/// Of one peer. Of more than 32 requests without data between them rustls takes the peer to be malicious.
const KEY_CHANGES_MAX: u32 = 30;

pub(crate) fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

/// A certificate and who trusts it. Keys and signatures are of Ed25519: of one length, so that a seed means one run.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: Arc<ClientConfig>,
}

impl Identity {
    pub(crate) fn new(version: &'static SupportedProtocolVersion) -> Self {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let certificate = CertificateParams::new(vec![NAME.to_owned()]).unwrap().self_signed(&key).unwrap();
        let provider = Arc::new(default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Identity { server: Arc::new(server), client: Arc::new(client) }
    }
}

/// What the peers of a run speak.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tongues {
    /// Clients, unless they are bare.
    pub(crate) clients: Option<Arc<ClientConfig>>,
    /// Backends.
    pub(crate) backends: Option<Arc<ServerConfig>>,
    /// Clients end without `close_notify`.
    pub(crate) rude_clients: bool,
    pub(crate) rude_backends: bool,
    /// Every so many reads a peer changes its keys, and asks the shard to change its own; 0: never.
    pub(crate) keys_every: u32,
}

/// What became of TLS on all connections.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Heard {
    /// Ends of the shard's with `close_notify`, and without, of connections whose handshake was done.
    pub(crate) said_ends: u32,
    pub(crate) unsaid_ends: u32,
    /// Records of the shard's that a peer could not take, fatal alerts among them.
    pub(crate) errors: u32,
    pub(crate) key_changes: u32,
}

/// One peer's end.
#[derive(Debug)]
pub(crate) struct PeerTls {
    connection: Connection,
    /// For the pipe, which had no room.
    waiting: Vec<u8>,
    rude: bool,
    reads: u32,
    key_changes: u32,
    /// It has closed its half, as far as it knows.
    fin_due: bool,
    ended: bool,
}

impl PeerTls {
    pub(super) fn client(config: &Arc<ClientConfig>, rude: bool) -> Box<Self> {
        Self::new(ClientConnection::new(Arc::clone(config), name()).unwrap().into(), rude)
    }

    pub(super) fn server(config: &Arc<ServerConfig>, rude: bool) -> Box<Self> {
        Self::new(ServerConnection::new(Arc::clone(config)).unwrap().into(), rude)
    }

    fn new(mut connection: Connection, rude: bool) -> Box<Self> {
        connection.set_buffer_limit(None);
        Box::new(PeerTls {
            connection,
            waiting: Vec::new(),
            rude,
            reads: 0,
            key_changes: 0,
            fin_due: false,
            ended: false,
        })
    }

    fn encode(&mut self) {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.waiting).unwrap();
        }
    }
}

impl World {
    /// What a peer's TLS has to say goes into the pipe, as far as there is room; true when all of it is there.
    pub(super) fn tls_flush(&mut self, index: usize) -> bool {
        if self.sockets[index].inward_fin {
            return true;
        }
        let Some(mut tls) = self.sockets[index].tls.take() else { return true };
        tls.encode();
        let taken = match tls.waiting.is_empty() {
            true => 0,
            // An error shows where it is read.
            false => self.pipe_write(index, &tls.waiting).unwrap_or(0),
        };
        tls.waiting.drain(..taken);
        let all = tls.waiting.is_empty();
        self.sockets[index].tls = Some(tls);
        all
    }

    pub(super) fn tls_write(&mut self, index: usize, bytes: &[u8]) -> usize {
        if !self.tls_flush(index) {
            return 0;
        }
        let Some(tls) = &mut self.sockets[index].tls else { return 0 };
        let taken = tls.connection.writer().write(bytes).unwrap();
        self.tls_flush(index);
        taken
    }

    /// What was read of the pipe, in plain.
    pub(super) fn tls_read(&mut self, index: usize, read: PeerRead) -> PeerRead {
        let Some(mut tls) = self.sockets[index].tls.take() else { return read };
        let heard = &mut self.heard;
        let read = match read {
            PeerRead::Data(bytes) => {
                let mut rest = &bytes[..];
                let mut plain = Vec::new();
                let mut failed = tls.ended;
                while !rest.is_empty() && !failed {
                    tls.connection.read_tls(&mut rest).unwrap();
                    failed = tls.connection.process_new_packets().is_err();
                    // Errors are no more for now, or an end without `close_notify`, which the FIN tells.
                    let mut piece = [0; 4096];
                    while let Ok(bytes @ 1..) = tls.connection.reader().read(&mut piece) {
                        plain.extend_from_slice(&piece[..bytes]);
                    }
                }
                if failed && !tls.ended {
                    tls.ended = true;
                    heard.errors += 1;
                }
                tls.reads += 1;
                if self.tongues.keys_every > 0
                    && tls.reads.is_multiple_of(self.tongues.keys_every)
                    && !tls.connection.is_handshaking()
                    && !tls.ended
                    && tls.key_changes < KEY_CHANGES_MAX
                {
                    tls.key_changes += 1;
                    tls.connection.refresh_traffic_keys().unwrap();
                    heard.key_changes += 1;
                }
                PeerRead::Data(plain)
            }
            PeerRead::Fin => {
                if !tls.ended && !tls.connection.is_handshaking() {
                    tls.ended = true;
                    // A FIN alone may be anybody's.
                    let said =
                        tls.connection.process_new_packets().is_ok_and(|state| state.peer_has_closed());
                    *(if said { &mut heard.said_ends } else { &mut heard.unsaid_ends }) += 1;
                    if said { PeerRead::Fin } else { PeerRead::Reset }
                } else {
                    PeerRead::Fin
                }
            }
            other => other,
        };
        let fin = tls.fin_due && !tls.connection.is_handshaking();
        tls.fin_due &= !fin;
        self.sockets[index].tls = Some(tls);
        self.tls_flush(index);
        if fin {
            self.peer_fin(index);
        }
        read
    }

    /// What was submitted before a shutdown is tried before it, as by the ring: a `close_notify` above all.
    pub(super) fn send_last_words(&mut self, ring: usize) {
        let shut: Vec<usize> = self.rings[ring]
            .endings
            .iter()
            .filter_map(|ending| match ending {
                Ending::Shutdown(socket, _) if self.sockets[*socket].tls.is_some() => Some(*socket),
                _ => None,
            })
            .collect();
        // A ring takes what there is room for.
        let faults = self.faults.clone();
        (self.faults.send_piecewise, self.faults.send_short, self.faults.send_nothing) = (0, 0, 0);
        for socket in shut {
            self.send_progress(socket);
        }
        self.faults = faults;
    }

    /// Its last words go into the pipe whether there is room or not: the kernel keeps them. False if they are to come: who
    /// goes on reading ends when its handshake is done.
    pub(super) fn tls_end(&mut self, index: usize) -> bool {
        let Some(mut tls) = self.sockets[index].tls.take() else { return true };
        if tls.connection.is_handshaking() && !self.sockets[index].peer_closed && !tls.ended {
            tls.fin_due = true;
            self.sockets[index].tls = Some(tls);
            return false;
        }
        if !tls.rude && !tls.connection.is_handshaking() {
            tls.connection.send_close_notify();
        }
        tls.encode();
        let socket = &mut self.sockets[index];
        if !socket.closed && !socket.outward_reset && socket.inward_error.is_none() && !socket.inward_fin {
            socket.inward.extend(tls.waiting.drain(..));
        }
        socket.tls = Some(tls);
        self.receive_soon(index);
        true
    }
}
