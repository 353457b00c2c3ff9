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

// ---- bytes of strangers

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(256) as u8).collect()
    }

    /// Bytes that look like a record, with a handshake message's head in front more often than not.
    fn record(&mut self) -> Vec<u8> {
        let kind = [20, 21, 22, 22, 22, 23, 24, 0x80][self.below(8)];
        let length = [0, 1, 2, 4, 40, 600, 16_384, 16_640, 18_432, 18_433, 65_535][self.below(11)];
        let mut record = vec![kind, 3, self.below(5) as u8, (length >> 8) as u8, length as u8];
        let here = if self.below(3) > 0 { length } else { self.below(length + 1) };
        let mut body = self.bytes(here);
        if let [message, high, ..] = &mut body[..] {
            *message = [1, 2, 4, 8, 11, 20, 24][self.below(7)];
            *high = if self.below(8) > 0 { 0 } else { *high };
        }
        record.extend(body);
        record
    }

    /// Somebody sits on the wire.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let end = at + self.below(bytes.len() - at + 1);
        match self.below(7) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let record = self.record();
                let at = if self.below(2) == 0 { bytes.len() } else { at };
                bytes.splice(at..at, record);
            }
            _ => {
                // Another length, or another kind, of the first record.
                let at = self.below(5);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = self.below(256) as u8;
                }
            }
        }
    }
}

/// Takes bytes in pieces until they are taken or refused, and looks at what is held after each.
fn feed(tls: &mut Tls, scratch: &mut Scratch, bytes: &mut [u8], dice: &mut Dice) -> Result<Vec<u8>, Error> {
    const PIECE_BYTES_MAX: usize = 4096;
    let mut heard = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = [1, 50, PIECE_BYTES_MAX][dice.below(3)];
        let (piece, after) = rest.split_at_mut((1 + dice.below(most)).min(rest.len()));
        scratch.plain.clear();
        let result = tls.receive(piece, scratch);
        heard.extend_from_slice(&scratch.plain);
        let most = if tls.is_handshaking() { TLS_HANDSHAKE_BYTES_MAX } else { TLS_RECORD_BYTES_MAX };
        assert!(tls.incoming.len() <= most + PIECE_BYTES_MAX, "{} bytes are held", tls.incoming.len());
        assert!(tls.out.end() - tls.ledger.sent() <= 16 * 1024, "answers to strangers are short");
        if let Err(error) = result {
            assert_eq!((tls.stage, tls.incoming.capacity()), (Stage::Closed, 0), "{error}");
            tls.say_close(scratch);
            return Err(error);
        }
        rest = after;
    }
    Ok(heard)
}

fn take_out(tls: &mut Tls) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(range) = tls.out().lend(tls.ledger.sent(), u32::MAX) {
        bytes.extend(range.to_vec());
        tls.ledger.lend(range.len() as u32);
        tls.confirmed(range.len() as u32);
    }
    bytes
}

#[test]
fn whoever_sits_on_the_wire_can_only_cut_it() {
    let (mut whole, mut cut) = (0, 0);
    for versions in BOTH {
        let pair = configs(versions);
        for seed in 1..600 {
            let mut dice = Dice(seed * 0x9E37_79B9);
            let mut wire = Wire::new(&pair);
            // Where in the exchange it strikes; beyond its end in some runs.
            let strike = dice.below(12);
            let closer = dice.below(2);
            let said = [dice.bytes(20_000), dice.bytes(40_000)];
            let mut heard = [Vec::new(), Vec::new()];
            let mut told = [false, false];
            let mut quiet = 0;
            let mut step = 0;
            'run: while quiet < 2 {
                let to_server = step % 2 == 0;
                let (from, to) = match to_server {
                    true => (&mut wire.client, &mut wire.server),
                    false => (&mut wire.server, &mut wire.client),
                };
                let who = usize::from(!to_server);
                if from.stage == Stage::Open && !std::mem::replace(&mut told[who], true) {
                    wire.scratch.plain.clear();
                    wire.scratch.plain.extend_from_slice(&said[who]);
                    from.seal(&mut wire.scratch).unwrap();
                }
                // One of them has the last word, once it was answered.
                if who == closer && told[who] && !heard[1 - who].is_empty() {
                    from.say_close(&mut wire.scratch);
                }
                let mut bytes = take_out(from);
                quiet = if bytes.is_empty() { quiet + 1 } else { 0 };
                if step == strike {
                    dice.mutate(&mut bytes);
                }
                if to.stage == Stage::Closed {
                    // What comes now is dropped, and rustls is not asked: it holds its own end for an alert that was sent.
                    bytes.clear();
                }
                match feed(to, &mut wire.scratch, &mut bytes, &mut dice) {
                    Ok(plain) => heard[who].extend(plain),
                    Err(_) => {
                        cut += 1;
                        break 'run;
                    }
                }
                step += 1;
                assert!(step < 100, "it does not end");
            }
            for (who, tls) in [&wire.server, &wire.client].into_iter().enumerate() {
                assert!(said[who].starts_with(&heard[who]), "seed {seed}: heard what was not said");
                assert!(
                    !tls.heard_close() || heard[who] == said[who],
                    "seed {seed}: cut, and taken for whole"
                );
                whole += usize::from(tls.heard_close());
            }
        }
    }
    assert!(whole > 200 && cut > 200, "{whole} directions came through, {cut} connections did not");
}

#[test]
fn records_of_strangers_cost_little_and_end_soon() {
    let pair = configs(&[&version::TLS13, &version::TLS12]);
    let name = ServerName::try_from("model.test").unwrap();
    let mut scratch = Scratch::default();
    let mut refused = 0;
    for seed in 1..2_000 {
        let mut dice = Dice(seed * 0x9E37_79B9);
        let mut tls = match seed % 2 {
            0 => Tls::server(&pair.server).unwrap(),
            _ => Tls::client(&pair.client, &name, &mut scratch).unwrap(),
        };
        for _ in 0..40 {
            let mut bytes = match dice.below(3) {
                0 => {
                    let count = 1 + dice.below(2_000);
                    dice.bytes(count)
                }
                _ => dice.record(),
            };
            match feed(&mut tls, &mut scratch, &mut bytes, &mut dice) {
                Ok(plain) => assert!(plain.is_empty() && !tls.was_open(), "seed {seed}: nobody was there"),
                Err(_) => {
                    refused += 1;
                    break;
                }
            }
        }
    }
    assert!(refused > 1_900, "{refused}");
}
