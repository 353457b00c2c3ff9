use super::*;
use protocol::limits::TLS_BATCH_BYTES_MAX;
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::PrivateKeyDer;
use rustls::{RootCertStore, SupportedProtocolVersion, version};

struct Pair {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

fn configs(versions: &[&'static SupportedProtocolVersion]) -> Pair {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let certificate =
        CertificateParams::new(vec!["model.test".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
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
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Pair { server: Arc::new(server), client: Arc::new(client) }
}

/// Two ends and what each has heard.
struct Wire {
    client: Tls,
    server: Tls,
    scratch: Scratch,
    heard_by_server: Vec<u8>,
    heard_by_client: Vec<u8>,
}

impl Wire {
    fn new(pair: &Pair) -> Self {
        let mut scratch = Scratch::default();
        let name = ServerName::try_from("model.test").unwrap();
        Wire {
            client: Tls::client(&pair.client, &name, &mut scratch).unwrap(),
            server: Tls::server(&pair.server).unwrap(),
            scratch,
            heard_by_server: Vec::new(),
            heard_by_client: Vec::new(),
        }
    }

    /// Carries all that lies ready on one side to the other, in pieces of so many bytes.
    fn carry(&mut self, to_server: bool, piece: usize) -> Result<bool, Error> {
        let (from, to, heard) = match to_server {
            true => (&mut self.client, &mut self.server, &mut self.heard_by_server),
            false => (&mut self.server, &mut self.client, &mut self.heard_by_client),
        };
        let mut moved = false;
        while let Some(range) = from.out().lend(from.ledger.sent(), u32::MAX) {
            let mut bytes = range.to_vec();
            drop(range);
            from.ledger.lend(bytes.len() as u32);
            from.confirmed(bytes.len() as u32);
            for bytes in bytes.chunks_mut(piece) {
                self.scratch.plain.clear();
                let result = to.receive(bytes, &mut self.scratch);
                heard.extend_from_slice(&self.scratch.plain);
                result?;
            }
            moved = true;
        }
        Ok(moved)
    }

    fn settle(&mut self, piece: usize) -> Result<(), Error> {
        while self.carry(true, piece)? | self.carry(false, piece)? {}
        Ok(())
    }

    fn say(&mut self, by_client: bool, plain: &[u8]) {
        self.scratch.plain.clear();
        self.scratch.plain.extend_from_slice(plain);
        let tls = if by_client { &mut self.client } else { &mut self.server };
        tls.seal(&mut self.scratch).unwrap();
    }
}

const BOTH: [&[&SupportedProtocolVersion]; 2] = [&[&version::TLS13], &[&version::TLS12]];

#[test]
fn records_may_arrive_in_pieces_of_any_size() {
    for versions in BOTH {
        let pair = configs(versions);
        for piece in [1, 2, 3, 5, 7, 64, 1000, 1 << 20] {
            let mut wire = Wire::new(&pair);
            wire.settle(piece).unwrap();
            assert!(!wire.client.is_handshaking() && !wire.server.is_handshaking());
            let large: Vec<u8> = (0..TLS_BATCH_BYTES_MAX).map(|byte| byte as u8).collect();
            wire.say(true, b"request");
            wire.say(false, &large);
            wire.settle(piece).unwrap();
            assert_eq!(wire.heard_by_server, b"request");
            assert!(wire.heard_by_client == large);
            assert_eq!(wire.client.held_bytes() + wire.server.held_bytes(), 0, "at rest nothing is held");
        }
    }
}

#[test]
fn a_batch_goes_out_as_one_range() {
    let mut wire = Wire::new(&configs(BOTH[0]));
    wire.settle(1 << 20).unwrap();
    wire.say(false, &vec![7; TLS_BATCH_BYTES_MAX]);
    let range = wire.server.out().lend(wire.server.ledger.sent(), u32::MAX).unwrap();
    assert_eq!(wire.server.ledger.sent() + range.len() as u64, wire.server.out().end());
}

#[test]
fn a_batch_counts_as_sent_with_its_last_byte() {
    let mut wire = Wire::new(&configs(BOTH[0]));
    wire.settle(1 << 20).unwrap();
    wire.say(false, b"token");
    let range = wire.server.out().lend(wire.server.ledger.sent(), u32::MAX).unwrap();
    wire.server.ledger.lend(range.len() as u32);
    assert!(!wire.server.confirmed(range.len() as u32 - 1));
    wire.server.ledger.lend(1);
    assert!(wire.server.confirmed(1));
}

#[test]
fn sessions_are_resumed() {
    let pair = configs(BOTH[0]);
    let mut first = Wire::new(&pair);
    first.settle(100).unwrap();
    assert!(!first.server.is_resumed());
    let mut second = Wire::new(&pair);
    second.settle(100).unwrap();
    assert!(second.client.is_resumed() && second.server.is_resumed());
}

#[test]
fn each_end_hears_the_other_ones_close() {
    for versions in BOTH {
        let mut wire = Wire::new(&configs(versions));
        wire.settle(1).unwrap();
        wire.say(true, b"last words");
        wire.client.say_close(&mut wire.scratch);
        wire.client.say_close(&mut wire.scratch);
        wire.carry(true, 1).unwrap();
        assert!(wire.server.heard_close() && !wire.client.heard_close());
        assert_eq!(wire.heard_by_server, b"last words");
        // The other direction goes on.
        wire.say(false, b"answer");
        wire.server.say_close(&mut wire.scratch);
        wire.carry(false, 3).unwrap();
        assert_eq!(wire.heard_by_client, b"answer");
        assert!(wire.client.heard_close());
        let after = wire.server.receive(&mut [1, 2, 3], &mut wire.scratch).unwrap();
        assert_eq!((after, wire.server.held_bytes()), (0, 0), "what follows the end is dropped");
    }
}

#[test]
fn garbage_is_answered_by_an_alert_and_costs_nothing() {
    let pair = configs(BOTH[0]);
    for garbage in
        [&b"\x16\x03\x01\x00\x05hello"[..], b"\x17\x03\x03\x00\x01x", b"SSH-2.0-x\r\n", &[0xFF; 600]]
    {
        let mut wire = Wire::new(&pair);
        wire.server.receive(&mut garbage.to_vec(), &mut wire.scratch).unwrap_err();
        let alert = wire
            .server
            .out()
            .lend(0, u32::MAX)
            .unwrap_or_else(|| panic!("no alert for {garbage:?}"))
            .to_vec();
        assert_eq!((alert[0], alert.len(), alert[5]), (21, 7, 2), "one fatal alert: {alert:?}");
        assert_eq!(wire.server.incoming.capacity(), 0);
        wire.server.say_close(&mut wire.scratch);
        assert_eq!(wire.server.out().end(), 7, "nothing follows it");
    }
}

#[test]
fn a_damaged_record_ends_it_after_what_was_whole() {
    let mut wire = Wire::new(&configs(BOTH[0]));
    wire.settle(1 << 20).unwrap();
    wire.say(true, b"whole");
    let mut bytes = wire.client.out().lend(wire.client.ledger.sent(), u32::MAX).unwrap().to_vec();
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    bytes.extend(damaged);
    wire.scratch.plain.clear();
    wire.server.receive(&mut bytes, &mut wire.scratch).unwrap_err();
    assert_eq!(wire.scratch.plain, b"whole");
    assert!(wire.server.has_unsent(), "the alert");
}

#[test]
fn a_hello_without_end_is_given_up() {
    let mut wire = Wire::new(&configs(BOTH[0]));
    // A client hello that announces 65,000 bytes, in records of 1000 that never complete it; then of 16 MB.
    for announced in [[0, 0xFD, 0xE8], [0xFF, 0xFF, 0xFF]] {
        let mut server = Tls::server(&configs(BOTH[0]).server).unwrap();
        let mut most = 0;
        let mut failed = false;
        for record in 0..400 {
            let mut bytes = vec![22, 3, 1, 3, 0xE8];
            bytes.extend(std::iter::repeat_n(0, 1000));
            if record == 0 {
                bytes[5] = 1;
                bytes[6..9].copy_from_slice(&announced);
            }
            failed = server.receive(&mut bytes, &mut wire.scratch).is_err();
            most = most.max(server.incoming.len());
            if failed {
                break;
            }
        }
        assert!(failed, "it must not go on for ever");
        assert!(most <= TLS_HANDSHAKE_BYTES_MAX + 1005, "{most}");
    }
}

#[test]
fn a_peer_that_is_not_trusted_is_named() {
    let (one, other) = (configs(BOTH[0]), configs(BOTH[0]));
    let mut wire = Wire::new(&Pair { server: one.server, client: other.client });
    let error = wire.settle(1 << 20).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(wire.client.has_unsent(), "the server is told");
    let error = wire.carry(true, 1).unwrap_err();
    assert!(matches!(error, Error::AlertReceived(_)), "{error}");
}
