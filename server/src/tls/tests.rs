//! Certificates made for tests, and the store with them: what is read, what is refused, what changes, and handshakes between
//! what it makes.

use super::certificate::Facts;
use super::*;
use crate::settings::tls::ServerFiles;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Error, HandshakeKind, ProtocolVersion, ServerConnection};

/// A certificate authority of a test.
pub(crate) struct Authority {
    pub(crate) certificate: Vec<u8>,
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
pub(crate) struct Issued {
    pub(crate) certificate: Vec<u8>,
    pub(crate) pem: String,
    pub(crate) key_pem: String,
}

/// Valid from 2020 to 2100.
pub(crate) fn params(names: &[&str]) -> CertificateParams {
    let mut params =
        CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2100, 1, 1);
    params.distinguished_name.push(DnType::CommonName, "tokenring test");
    params
}

impl Authority {
    pub(crate) fn new(name: &str) -> Authority {
        let mut params = params(&[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Authority {
            certificate: certificate.der().to_vec(),
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn issue(&self, names: &[&str]) -> Issued {
        self.issue_with(&params(names))
    }

    pub(crate) fn issue_with(&self, params: &CertificateParams) -> Issued {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            certificate: certificate.der().to_vec(),
            pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        }
    }
}

impl Issued {
    /// As read from files.
    pub(super) fn pair(&self) -> Pair {
        let folder = Folder::new();
        let files = folder.pair("one", &self.pem, &self.key_pem);
        files::pair(&files, &rustls::crypto::ring::default_provider()).unwrap()
    }
}

/// A folder of one test, removed at its end.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Folder {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tokenring-tls-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn pair(&self, name: &str, certificate: &str, key: &str) -> PairFiles {
        let certificate = self.write(&format!("{name}.pem"), certificate);
        PairFiles { certificate, key: self.write(&format!("{name}.key"), key) }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Files of one listener with these certificates.
fn listener(pairs: &[&PairFiles], client_auth: ClientAuth) -> ServerFiles {
    ServerFiles { pairs: pairs.iter().map(|&pair| pair.clone()).collect(), client_auth, only_tls13: false }
}

fn store(servers: Vec<ServerFiles>, clients: Vec<ClientFiles>) -> Store {
    Store::load(&TlsPlan { servers, clients }).unwrap()
}

/// A client's configuration that trusts the authorities in a file.
fn trusting(path: PathBuf, identity: Option<PairFiles>) -> ClientFiles {
    ClientFiles { trust: Trust::File(path), identity }
}

/// What came of a handshake: the connections, or whose mistake it was.
type Outcome = Result<(ClientConnection, ServerConnection), (&'static str, Error)>;

/// Carries bytes from one to the other until neither has any left.
fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, name: &str) -> Outcome {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    loop {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().map_err(|error| ("server", error))?;
        }
        let mut answer = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut answer).unwrap();
        }
        let mut rest = answer.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().map_err(|error| ("client", error))?;
        }
        if bytes.is_empty() && answer.is_empty() {
            assert!(!client.is_handshaking() && !server.is_handshaking());
            return Ok((client, server));
        }
    }
}

/// The name of the certificate that a client is shown.
fn shown(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, name: &str) -> String {
    let (client, _) = handshake(client, server, name).unwrap();
    Facts::of(&client.peer_certificates().unwrap()[0]).unwrap().title().to_owned()
}

/// A folder with an authority's certificate, and a store whose only listener shows one issued by it for `a.example`.
struct Simple {
    folder: Folder,
    authority: Authority,
    pair: PairFiles,
    store: Store,
}

fn simple() -> Simple {
    let folder = Folder::new();
    let authority = Authority::new("authority");
    let trusted = folder.write("ca.pem", &authority.pem);
    let issued = authority.issue(&["a.example"]);
    let pair = folder.pair("a", &issued.pem, &issued.key_pem);
    let store = store(vec![listener(&[&pair], ClientAuth::Off)], vec![trusting(trusted, None)]);
    Simple { folder, authority, pair, store }
}

#[test]
fn what_the_store_makes_shakes_hands() {
    let Simple { store, .. } = simple();
    let set = store.set();
    assert_eq!((set.epoch, set.servers.len(), set.clients.len()), (1, 1, 1));
    let (client, server) = handshake(&set.clients[0], &set.servers[0], "a.example").unwrap();
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(ALPN), Some(ALPN)));
    assert_eq!(set.servers[0].max_early_data_size, 0);
    assert!(!set.clients[0].enable_early_data);
}

#[test]
fn a_client_that_speaks_tls_1_2_alone_is_served_unless_1_3_is_the_oldest() {
    let Simple { folder, pair, .. } = simple();
    let old = ServerFiles { only_tls13: false, ..listener(&[&pair], ClientAuth::Off) };
    let new = ServerFiles { only_tls13: true, ..old.clone() };
    let store = store(vec![old, new], Vec::new());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = files::roots(&folder.path().join("ca.pem")).unwrap();
    let client =
        ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&version::TLS12]).unwrap();
    let client = Arc::new(client.with_root_certificates(roots.store).with_no_client_auth());
    let set = store.set();
    let (connection, _) = handshake(&client, &set.servers[0], "a.example").unwrap();
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_2));
    assert_eq!(handshake(&client, &set.servers[1], "a.example").unwrap_err().0, "server");
}

#[test]
fn a_client_is_shown_the_certificate_of_the_name_it_asks_for() {
    let Simple { folder, authority, pair, store: first } = simple();
    let other = authority.issue(&["b.example", "*.b.example"]);
    let other = folder.pair("b", &other.pem, &other.key_pem);
    let store = store(vec![listener(&[&pair, &other], ClientAuth::Off)], Vec::new());
    let (set, client) = (store.set(), &first.set().clients[0]);
    assert_eq!(shown(client, &set.servers[0], "a.example"), "a.example");
    assert_eq!(shown(client, &set.servers[0], "x.b.example"), "b.example");
    // Nobody's name: the first, which is then not trusted.
    let (whose, error) = handshake(client, &set.servers[0], "c.example").unwrap_err();
    assert!(whose == "client" && error.to_string().contains("for a.example"), "{error}");
}

/// The kind of the second handshake of two with the same client.
fn second(client: &Arc<ClientConfig>, first: &Arc<ServerConfig>, then: &Arc<ServerConfig>) -> HandshakeKind {
    let (connection, _) = handshake(client, first, "a.example").unwrap();
    assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full));
    let (connection, _) = handshake(client, then, "a.example").unwrap();
    connection.handshake_kind().unwrap()
}

/// With an empty memory of sessions.
fn fresh(client: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(client);
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    Arc::new(config)
}

#[test]
fn sessions_are_resumed_until_the_second_change_of_keys() {
    let Simple { mut store, .. } = simple();
    let first = store.set();
    let client = &first.clients[0];
    assert_eq!(second(&fresh(client), &first.servers[0], &first.servers[0]), HandshakeKind::Resumed);
    store.rotate().unwrap();
    let set = store.set();
    assert_eq!(set.epoch, 2);
    assert_eq!(second(&fresh(client), &first.servers[0], &set.servers[0]), HandshakeKind::Resumed);
    assert!(Arc::ptr_eq(client, &set.clients[0]), "what has not changed is the same");
    store.rotate().unwrap();
    assert_eq!(second(&fresh(client), &first.servers[0], &store.set().servers[0]), HandshakeKind::Full);
}

#[test]
fn a_session_of_one_listener_is_none_of_another() {
    let Simple { folder, pair, store: first, .. } = simple();
    let authorities = folder.path().join("ca.pem");
    let servers =
        vec![listener(&[&pair], ClientAuth::Off), listener(&[&pair], ClientAuth::Optional(authorities))];
    let store = store(servers, Vec::new());
    let (set, client) = (store.set(), &first.set().clients[0]);
    assert_eq!(second(&fresh(client), &set.servers[0], &set.servers[1]), HandshakeKind::Full);
}

#[test]
fn a_session_outlives_a_new_certificate_but_not_new_authorities_of_clients() {
    let Simple { folder, authority, pair, store: first } = simple();
    let authorities = folder.write("clients.pem", &authority.pem);
    let mut store = store(vec![listener(&[&pair], ClientAuth::Optional(authorities))], Vec::new());
    let client = &first.set().clients[0];
    let before = store.set();
    let issued = authority.issue(&["a.example"]);
    folder.pair("a", &issued.pem, &issued.key_pem);
    assert_eq!(store.reread(true).failed, Vec::<String>::new());
    assert_eq!(second(&fresh(client), &before.servers[0], &store.set().servers[0]), HandshakeKind::Resumed);
    folder.write("clients.pem", &Authority::new("another").pem);
    let news = store.reread(true);
    assert!(news.changed[0].starts_with("authorities: 1 of "), "{news:?}");
    assert_eq!(second(&fresh(client), &before.servers[0], &store.set().servers[0]), HandshakeKind::Full);
}

#[test]
fn clients_show_certificates_where_they_are_asked_to() {
    let Simple { folder, authority, pair, .. } = simple();
    let authorities = folder.path().join("ca.pem");
    let own = authority.issue(&["client.example"]);
    let own = folder.pair("client", &own.pem, &own.key_pem);
    let strangers = Authority::new("strangers").issue(&["client.example"]);
    let strange = folder.pair("strange", &strangers.pem, &strangers.key_pem);
    let auth = [
        ClientAuth::Off,
        ClientAuth::Optional(authorities.clone()),
        ClientAuth::Required(authorities.clone()),
    ];
    let clients = [None, Some(own), Some(strange)].map(|identity| trusting(authorities.clone(), identity));
    let store = store(auth.map(|auth| listener(&[&pair], auth)).to_vec(), clients.to_vec());
    let set = store.set();
    let names = |client: usize, server: usize| match handshake(
        &set.clients[client],
        &set.servers[server],
        "a.example",
    ) {
        Ok((_, server)) => server
            .peer_certificates()
            .map_or("none".to_owned(), |chain| Facts::of(&chain[0]).unwrap().title().to_owned()),
        Err((whose, error)) => format!("{whose}: {error}"),
    };
    // Off, optional, required.
    assert_eq!([names(0, 0), names(0, 1)], ["none", "none"]);
    assert!(names(0, 2).starts_with("server: peer sent no certificates"), "{}", names(0, 2));
    assert_eq!([names(1, 0), names(1, 1), names(1, 2)], ["none", "client.example", "client.example"]);
    assert_eq!(names(2, 0), "none");
    for server in [1, 2] {
        assert!(
            names(2, server).starts_with("server: invalid peer certificate: UnknownIssuer"),
            "{}",
            names(2, server)
        );
    }
}

#[test]
fn a_certificate_that_is_not_trusted_is_told_of_with_its_name_its_dates_and_the_reason() {
    let Simple { folder, authority, .. } = simple();
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = params(&["a.example"]);
        change(&mut params);
        params
    };
    let plain = params(&["a.example"]);
    let self_signed = {
        let key = KeyPair::generate().unwrap();
        let certificate = plain.self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    let of = |issued: Issued| (issued.pem, issued.key_pem);
    let cases = [
        (
            "name",
            of(authority.issue(&["b.example", "10.0.0.1"])),
            "it is not for the name \"a.example\". The certificate is for b.example, 10.0.0.1, subject ",
        ),
        (
            "old",
            of(authority.issue_with(&with(&|params| params.not_after = date_time_ymd(2021, 2, 3)))),
            "it has expired. The certificate is for a.example, ",
        ),
        (
            "new",
            of(authority.issue_with(&with(&|params| params.not_before = date_time_ymd(2099, 1, 1)))),
            "it is not valid yet; is this machine's clock right?",
        ),
        ("self", self_signed, "it is self-signed, and not among the trusted authorities, "),
        (
            "stranger",
            of(Authority::new("stranger").issue(&["a.example"])),
            "its issuer is unknown: no further certificates that it came with lead to none",
        ),
        (
            "purpose",
            of(authority.issue_with(&with(&|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]
            }))),
            "it is not for servers (extendedKeyUsage)",
        ),
    ];
    for (name, (certificate, key), expected) in cases {
        let pair = folder.pair(name, &certificate, &key);
        let clients = vec![
            trusting(folder.path().join("ca.pem"), None),
            ClientFiles { trust: Trust::Everybody, identity: None },
        ];
        let set = store(vec![listener(&[&pair], ClientAuth::Off)], clients).set();
        let (whose, error) = handshake(&set.clients[0], &set.servers[0], "a.example").unwrap_err();
        let text = error.to_string();
        assert_eq!(whose, "client");
        assert!(
            text.contains("the certificate of \"a.example\" is not trusted: ") && text.contains(expected),
            "{name}: {text}"
        );
        for part in ["issuer \"CN=", "serial ", "valid from 20"] {
            assert!(text.contains(part), "{name}: {text}");
        }
        // And who trusts everybody takes it.
        assert!(handshake(&set.clients[1], &set.servers[0], "a.example").is_ok(), "{name}");
    }
}

/// What `openssl req -x509` makes is an authority's certificate, and shown as a server's it is refused, even where it is trusted.
#[test]
fn a_self_signed_certificate_is_trusted_by_itself_unless_it_is_an_authoritys() {
    let folder = Folder::new();
    let shake = |name: &str, is_ca: IsCa| {
        let mut params = params(&["a.example"]);
        params.is_ca = is_ca;
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let pair = folder.pair(name, &certificate, &key.serialize_pem());
        let clients = vec![trusting(pair.certificate.clone(), None)];
        let set = store(vec![listener(&[&pair], ClientAuth::Off)], clients).set();
        handshake(&set.clients[0], &set.servers[0], "a.example").map(|_| ())
    };
    assert_eq!(shake("server", IsCa::ExplicitNoCa), Ok(()));
    let (_, error) = shake("authority", IsCa::Ca(BasicConstraints::Unconstrained)).unwrap_err();
    assert!(
        error.to_string().contains("it is an authority's own (CA:TRUE), which cannot be a server's"),
        "{error}"
    );
}

#[test]
fn a_new_pair_is_taken_and_a_bad_one_leaves_the_old_one_in_use() {
    let Simple { folder, authority, pair, .. } = simple();
    let other = authority.issue(&["b.example"]);
    let second = folder.pair("b", &other.pem, &other.key_pem);
    let trusted = folder.path().join("ca.pem");
    let mut store = store(vec![listener(&[&pair, &second], ClientAuth::Off)], vec![trusting(trusted, None)]);
    let serial = |store: &Store, name: &str| {
        let set = store.set();
        let (client, _) = handshake(&fresh(&set.clients[0]), &set.servers[0], name).unwrap();
        Facts::of(&client.peer_certificates().unwrap()[0]).unwrap().serial
    };
    let (first_a, first_b) = (serial(&store, "a.example"), serial(&store, "b.example"));
    assert_eq!(store.reread(true), Reread::default(), "nothing has changed");
    assert_eq!(store.set().epoch, 1);

    // One bad, the other good: each on its own.
    let issued = authority.issue(&["b.example"]);
    folder.pair("b", &issued.pem, &issued.key_pem);
    folder.write("a.key", &issued.key_pem);
    let news = store.reread(true);
    assert!(news.changed.len() == 1 && news.changed[0].contains("b.pem for b.example"), "{news:?}");
    assert!(news.failed.len() == 1 && news.failed[0].contains("a.key: this key is not that of"), "{news:?}");
    assert_eq!(serial(&store, "a.example"), first_a);
    assert_ne!(serial(&store, "b.example"), first_b);
    assert_eq!((store.set().epoch, store.status().errors.len()), (2, 1));

    let issued = authority.issue(&["a.example"]);
    folder.pair("a", &issued.pem, &issued.key_pem);
    assert_eq!(store.reread(false).failed, Vec::<String>::new());
    assert_ne!(serial(&store, "a.example"), first_a);
    assert_eq!((store.set().epoch, store.status().errors.len()), (3, 0));
}

#[test]
fn a_change_is_read_once_it_has_settled() {
    let Simple { folder, authority, mut store, .. } = simple();
    assert_eq!(store.poll(), None);
    // A certificate and its key are not replaced at one instant.
    let issued = authority.issue(&["a.example"]);
    folder.write("a.pem", &issued.pem);
    assert_eq!(store.poll(), None);
    folder.write("a.key", &issued.key_pem);
    assert_eq!(store.poll(), None);
    let news = store.poll().unwrap();
    assert!(news.failed.is_empty() && news.changed.len() == 1, "{news:?}");
    assert_eq!(store.poll(), None);

    // What cannot be read is told of once.
    std::fs::remove_file(folder.path().join("a.key")).unwrap();
    assert_eq!(store.poll(), None);
    let news = store.poll().unwrap();
    assert!(news.failed[0].contains("a.key: there is no such file"), "{news:?}");
    assert_eq!((store.poll(), store.poll()), (None, None));
    folder.write("a.key", &issued.key_pem);
    assert_eq!(store.poll(), None);
    assert_eq!(store.poll(), Some(Reread::default()), "as it was");
    assert_eq!(store.status().errors.len(), 0);
}

/// As Kubernetes does it: `tls.crt -> ..data/tls.crt`, `..data -> ..1`, and `..data` is swapped.
#[test]
fn a_swapped_link_is_a_change() {
    let Simple { folder, authority, .. } = simple();
    for folder_name in ["..1", "..2"] {
        let issued = authority.issue(&["a.example"]);
        std::fs::create_dir(folder.path().join(folder_name)).unwrap();
        folder.write(&format!("{folder_name}/tls.crt"), &issued.pem);
        folder.write(&format!("{folder_name}/tls.key"), &issued.key_pem);
    }
    let link =
        |target: &str, name: &str| std::os::unix::fs::symlink(target, folder.path().join(name)).unwrap();
    link("..1", "..data");
    link("..data/tls.crt", "tls.crt");
    link("..data/tls.key", "tls.key");
    let pair = PairFiles { certificate: folder.path().join("tls.crt"), key: folder.path().join("tls.key") };
    let mut store = store(vec![listener(&[&pair], ClientAuth::Off)], Vec::new());
    link("..2", "..new");
    std::fs::rename(folder.path().join("..new"), folder.path().join("..data")).unwrap();
    assert_eq!(store.poll(), None);
    assert_eq!(store.poll().unwrap().changed.len(), 1);
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let Simple { folder, pair, .. } = simple();
    let missing = PairFiles { certificate: folder.path().join("no.pem"), key: folder.path().join("no.key") };
    let servers = vec![listener(&[&pair, &missing], ClientAuth::Required(folder.write("empty.pem", "")))];
    let problems = Store::load(&TlsPlan { servers, clients: Vec::new() }).unwrap_err();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].ends_with("no.pem: there is no such file"), "{problems:?}");
    assert!(
        problems[1].contains("empty.pem: no certificate") && problems[1].ends_with("it is empty"),
        "{problems:?}"
    );
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let folder = Folder::new();
    let authority = Authority::new("authority");
    let (one, other) = (authority.issue(&["a.example"]), authority.issue(&["b.example"]));
    let certificate = folder.write("good.pem", &one.pem);
    let key = folder.write("good.key", &one.key_pem);
    let provider = rustls::crypto::ring::default_provider();
    let encrypted = one.key_pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let legacy =
        one.key_pem.replace("KEY-----\n", "KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n");
    let cut = one.pem.replace("-----END CERTIFICATE-----", "");
    let odd = one.pem.replacen("\nMII", "\n!!!", 1);
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let no_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let many = one.pem.repeat(17);
    let cases: [(&str, &[u8], &str); 9] = [
        (
            "der",
            &one.certificate,
            "no certificate (-----BEGIN CERTIFICATE-----): it looks like DER: openssl x509",
        ),
        ("empty", b"", "no certificate (-----BEGIN CERTIFICATE-----): it is empty"),
        ("text", b"hello", "no certificate (-----BEGIN CERTIFICATE-----): it is not PEM"),
        ("key", one.key_pem.as_bytes(), "no certificate (-----BEGIN CERTIFICATE-----): it holds PRIVATE KEY"),
        ("cut", cut.as_bytes(), "not valid PEM: a section has no end"),
        ("odd", odd.as_bytes(), "not valid PEM: what stands in a section is not base64"),
        ("garbage", garbage.as_bytes(), "its certificate number 1 cannot be read"),
        ("many", many.as_bytes(), "17 certificates; a chain has at most 16"),
        ("large", &vec![b'\n'; (8 << 20) + 1], "more than 8388608 bytes"),
    ];
    for (name, text, expected) in cases {
        let path = folder.write(name, text);
        let error =
            files::pair(&PairFiles { certificate: path.clone(), key: key.clone() }, &provider).unwrap_err();
        assert!(
            error.starts_with(&format!("{}: ", path.display())) && error.contains(expected),
            "{name}: {error}"
        );
    }
    let cases = [
        ("encrypted", encrypted.as_str(), "the key is encrypted, and nobody is there to give its password"),
        ("legacy", legacy.as_str(), "the key is encrypted, and nobody is there to give its password"),
        (
            "certificate",
            one.pem.as_str(),
            "no private key (-----BEGIN PRIVATE KEY-----): it holds CERTIFICATE",
        ),
        ("nothing", "", "no private key (-----BEGIN PRIVATE KEY-----): it is empty"),
        ("text", "hello", "no private key (-----BEGIN PRIVATE KEY-----): it is not PEM"),
        ("no-key", no_key, "this key cannot be used: "),
        ("other", other.key_pem.as_str(), "this key is not that of the certificate in "),
    ];
    for (name, text, expected) in cases {
        let path = folder.write(name, text);
        let files = PairFiles { certificate: certificate.clone(), key: path.clone() };
        let error = files::pair(&files, &provider).unwrap_err();
        assert!(
            error.starts_with(&format!("{}: ", path.display())) && error.contains(expected),
            "{name}: {error}"
        );
    }
    let error =
        files::pair(&PairFiles { certificate: folder.path().to_owned(), key }, &provider).unwrap_err();
    assert!(error.ends_with(": this is no regular file"), "{error}");
    let error = files::roots(&folder.write("none.pem", "hello")).unwrap_err();
    assert!(
        error.contains("none.pem: no certificate (-----BEGIN CERTIFICATE-----): it is not PEM"),
        "{error}"
    );
}

#[test]
fn odd_pairs_are_taken_with_a_remark() {
    let folder = Folder::new();
    let authority = Authority::new("authority");
    let remarks = |name: &str, certificate: &str, key: &str| {
        let files = folder.pair(name, certificate, key);
        files::pair(&files, &rustls::crypto::ring::default_provider()).map(|pair| pair.remarks)
    };
    let issued = authority.issue(&["a.example"]);
    let chain = format!("{}{}", issued.pem, authority.pem);
    assert_eq!(remarks("good", &chain, &issued.key_pem).unwrap(), Vec::<String>::new());
    // One file with both, as HAProxy has it.
    let both = format!("{}{chain}", issued.key_pem);
    assert_eq!(remarks("both", &both, &both).unwrap(), Vec::<String>::new());
    let stranger = format!("{}{}", issued.pem, Authority::new("stranger").pem);
    let found = remarks("order", &stranger, &issued.key_pem).unwrap();
    assert!(found.len() == 1 && found[0].contains("was not issued by \"CN=stranger\""), "{found:?}");
    let nameless = authority.issue(&[]);
    let found = remarks("nameless", &nameless.pem, &nameless.key_pem).unwrap();
    assert!(found.len() == 1 && found[0].starts_with("it has no name"), "{found:?}");
    // The wrong way round is a mistake, and it is named.
    let reversed = format!("{}{}", authority.pem, issued.pem);
    let error = remarks("reversed", &reversed, &issued.key_pem).unwrap_err();
    assert!(error.ends_with("the server's own certificate must be the first of its file"), "{error}");
    let found = files::roots(&folder.write("leaf.pem", &issued.pem)).unwrap().remarks;
    assert!(found.len() == 1 && found[0].contains("is no authority's certificate"), "{found:?}");
}

#[test]
fn an_expiry_is_warned_of_two_weeks_before() {
    let Simple { store, .. } = simple();
    let status = store.status();
    let expiry = status.servers[0].certificates[0].facts.not_after_s;
    let day = 86_400;
    assert_eq!(status.warnings(expiry - 14 * day), Vec::<String>::new());
    let told = |unix_time_s| status.warnings(unix_time_s).join("\n");
    assert!(
        told(expiry - 14 * day + 1)
            .ends_with("a.pem (a.example): it expires in 13 days, on 2100-01-01 00:00 UTC")
    );
    assert!(told(expiry - 3600).ends_with("it expires in 60 min, on 2100-01-01 00:00 UTC"));
    assert!(told(expiry + 1).ends_with("it expired on 2100-01-01 00:00 UTC: clients refuse it"));
    assert!(told(0).ends_with("it is not valid before 2020-01-01 00:00 UTC; is this machine's clock right?"));
}
