//! Reads certificates and keys from PEM files, and says what is wrong with them in words that name the file and a remedy.

use super::certificate::Facts;
use crate::settings::tls::{PairFiles, Trust};
use ring::digest;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, RootCertStore};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of one file; the authorities of a whole system have less than half a megabyte.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Certificates of one chain: each is sent to every client.
const CHAIN_MAX: usize = 16;

/// A certificate chain and its key.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) certified: Arc<CertifiedKey>,
    /// Of the certificate itself, not of those that vouch for it.
    pub(crate) facts: Facts,
    /// What is odd about it, without being wrong.
    pub(crate) remarks: Vec<String>,
    /// Of both files.
    pub(super) digest: Digest,
}

/// Authorities.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    pub(crate) store: Arc<RootCertStore>,
    /// Where they are from, in words.
    pub(crate) source: String,
    pub(crate) remarks: Vec<String>,
    pub(super) digest: Digest,
}

pub(super) type Digest = Vec<u8>;

/// Reads a chain and its key.
pub(crate) fn pair(files: &PairFiles, provider: &CryptoProvider) -> Result<Pair, String> {
    let certificate_name = files.certificate.display();
    let text = read(&files.certificate)?;
    let key_text = read(&files.key)?;
    let chain = certificates(&files.certificate, &text)?;
    if chain.len() > CHAIN_MAX {
        return Err(format!(
            "{certificate_name}: {} certificates; a chain has at most {CHAIN_MAX}",
            chain.len()
        ));
    }
    let facts: Vec<Facts> = chain
        .iter()
        .enumerate()
        .map(|(index, der)| {
            let number = index + 1;
            Facts::of(der).map_err(|error| {
                format!("{certificate_name}: its certificate number {number} cannot be read: {error}")
            })
        })
        .collect::<Result<_, _>>()?;
    let own = facts.first().cloned().unwrap_or_else(|| unreachable!("a chain has a certificate"));
    let key = private_key(&files.key, &key_text)?;
    let certified = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            let belongs = facts.iter().skip(1).any(|facts| !facts.is_authority);
            let hint =
                if belongs { "; the server's own certificate must be the first of its file" } else { "" };
            format!(
                "{}: this key is not that of the certificate in {certificate_name} ({own}){hint}",
                files.key.display()
            )
        }
        Error::General(why) => format!("{}: this key cannot be used: {why}", files.key.display()),
        other => format!("{} and {certificate_name} cannot be used: {other}", files.key.display()),
    })?;
    let mut remarks = Vec::new();
    if own.names.is_empty() {
        remarks.push("it has no name (subjectAltName), so that clients will not trust it".to_owned());
    }
    for (issued, issuer) in facts.iter().zip(facts.iter().skip(1)) {
        if issued.issuer_der != issuer.subject_der {
            remarks.push(format!(
                "the chain is out of order: {:?} was not issued by {:?}, which follows it",
                issued.subject, issuer.subject
            ));
        }
    }
    let digest = digest_of(&[&text, &key_text]);
    Ok(Pair { certified: Arc::new(certified), facts: own, remarks, digest })
}

/// Reads the authorities of a file.
pub(crate) fn roots(path: &Path) -> Result<Roots, String> {
    let name = path.display();
    let text = read(path)?;
    let mut store = RootCertStore::empty();
    let mut remarks = Vec::new();
    for (index, der) in certificates(path, &text)?.into_iter().enumerate() {
        let number = index + 1;
        let unreadable = |error: &dyn std::fmt::Display| {
            format!("{name}: its certificate number {number} cannot be read: {error}")
        };
        let facts = Facts::of(&der).map_err(|error| unreadable(&error))?;
        if !facts.is_authority {
            remarks.push(format!(
                "{:?} is no authority's certificate (basicConstraints CA:TRUE)",
                facts.subject
            ));
        }
        store.add(der).map_err(|error| unreadable(&error))?;
    }
    Ok(Roots { store: Arc::new(store), source: name.to_string(), remarks, digest: digest_of(&[&text]) })
}

/// Where the system keeps its authorities: what `SSL_CERT_FILE` and `SSL_CERT_DIR` say, else where systems have them.
pub(crate) fn system_places() -> Vec<PathBuf> {
    let named = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
    let (file, folders) = (named("SSL_CERT_FILE"), named("SSL_CERT_DIR"));
    if file.is_some() || folders.is_some() {
        let folders = folders.iter().flat_map(std::env::split_paths);
        return file.iter().map(PathBuf::from).chain(folders).collect();
    }
    let found = openssl_probe::probe();
    found.cert_file.into_iter().chain(found.cert_dir).collect()
}

/// Reads the system's authorities.
pub(crate) fn system_roots() -> Result<Roots, String> {
    let places: Vec<_> = system_places().iter().map(|path| path.display().to_string()).collect();
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    let mut context = digest::Context::new(&digest::SHA256);
    for der in &found.certs {
        context.update(der);
    }
    let (taken, odd) = store.add_parsable_certificates(found.certs);
    let mut remarks: Vec<String> = found.errors.iter().take(3).map(ToString::to_string).collect();
    if odd > 0 {
        remarks.push(format!("{odd} certificates cannot be read and are left out"));
    }
    let places = if places.is_empty() { "no known place".to_owned() } else { places.join(", ") };
    if taken == 0 {
        return Err(format!(
            "no certificates of authorities on this system ({places}): install ca-certificates, or say who is to be trusted with \
             --upstream-ca"
        ));
    }
    let source = format!("the system's ({places})");
    Ok(Roots { store: Arc::new(store), source, remarks, digest: context.finish().as_ref().to_vec() })
}

/// What is to be watched for a trust.
pub(super) fn places(trust: &Trust) -> Vec<PathBuf> {
    match trust {
        Trust::System => system_places(),
        Trust::File(path) => vec![path.clone()],
        Trust::Everybody => Vec::new(),
    }
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let name = path.display();
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|error| broken(path, &error))?;
    if certificates.is_empty() {
        let found = match labels(text).as_slice() {
            [] if text.first() == Some(&0x30) => {
                "it looks like DER: openssl x509 -inform der -in FILE makes PEM of it".to_owned()
            }
            [] if text.is_empty() => "it is empty".to_owned(),
            [] => "it is not PEM".to_owned(),
            labels => format!("it holds {}", labels.join(", ")),
        };
        return Err(format!("{name}: no certificate (-----BEGIN CERTIFICATE-----): {found}"));
    }
    Ok(certificates)
}

fn private_key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    let name = path.display();
    let labels = labels(text);
    let encrypted = labels.iter().any(|label| label == "ENCRYPTED PRIVATE KEY")
        || text.windows(b"Proc-Type: 4,ENCRYPTED".len()).any(|window| window == b"Proc-Type: 4,ENCRYPTED");
    if encrypted {
        return Err(format!(
            "{name}: the key is encrypted, and nobody is there to give its password: openssl pkey -in FILE -out FILE decrypts it; \
             keep the result readable for tokenring alone"
        ));
    }
    match PrivateKeyDer::from_pem_slice(text) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => {
            let found = match labels.as_slice() {
                [] if text.is_empty() => "it is empty".to_owned(),
                [] => "it is not PEM".to_owned(),
                labels => format!("it holds {}", labels.join(", ")),
            };
            Err(format!("{name}: no private key (-----BEGIN PRIVATE KEY-----): {found}"))
        }
        Err(error) => Err(broken(path, &error)),
    }
}

fn broken(path: &Path, error: &pem::Error) -> String {
    let why = match error {
        pem::Error::MissingSectionEnd { .. } => {
            "a section has no end (-----END ...-----): the file is cut".to_owned()
        }
        pem::Error::IllegalSectionStart { .. } => "a section begins with a broken line".to_owned(),
        pem::Error::Base64Decode(_) => "what stands in a section is not base64".to_owned(),
        other => other.to_string(),
    };
    format!("{}: not valid PEM: {why}", path.display())
}

/// What the sections of a PEM file are called.
fn labels(text: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(text)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----").map(str::to_owned))
        .take(CHAIN_MAX)
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let name = path.display();
    let unreadable = |error: std::io::Error| {
        let who = rustix::process::geteuid().as_raw();
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                format!("{name}: user {who}, as whom tokenring runs, may not read it")
            }
            std::io::ErrorKind::NotFound => format!("{name}: there is no such file"),
            _ => format!("{name}: cannot be read: {error}"),
        }
    };
    // Opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(format!("{name}: this is no regular file"));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!(
            "{name}: more than {FILE_BYTES_MAX} bytes; this is another file given by mistake"
        ));
    }
    Ok(bytes)
}

fn digest_of(texts: &[&[u8]]) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    for text in texts {
        context.update(&(text.len() as u64).to_be_bytes());
        context.update(text);
    }
    context.finish().as_ref().to_vec()
}
