//! Whether a backend's certificate is to be trusted. When it is not, the error says which name was asked for, which
//! certificate came, and why; rustls alone says only the last.

use super::certificate::{Facts, fingerprint};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme};
use std::fmt;
use std::sync::Arc;

/// Trusts what one of some authorities vouches for.
#[derive(Debug)]
pub(super) struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    /// Where the authorities are from, in words.
    source: String,
}

/// Why a backend's certificate is not trusted.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct NotTrusted(String);

/// The same as to display it: rustls' own error shows what is within it in this form alone.
impl fmt::Debug for NotTrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NotTrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotTrusted {}

impl Verifier {
    pub(super) fn new(inner: Arc<WebPkiServerVerifier>, source: String) -> Self {
        Verifier { inner, source }
    }

    fn explain(
        &self,
        error: &CertificateError,
        name: &ServerName<'_>,
        end_entity: &CertificateDer<'_>,
        intermediates: usize,
    ) -> NotTrusted {
        let name = name.to_str();
        let facts = Facts::of(end_entity);
        let self_signed = facts.as_ref().is_ok_and(|facts| facts.subject_der == facts.issuer_der);
        let source = &self.source;
        use CertificateError as E;
        let why = match error {
            E::NotValidForName | E::NotValidForNameContext { .. } => {
                format!("it is not for the name {name:?}")
            }
            E::Expired | E::ExpiredContext { .. } => "it has expired".to_owned(),
            E::NotValidYet | E::NotValidYetContext { .. } => {
                "it is not valid yet; is this machine's clock right?".to_owned()
            }
            E::UnknownIssuer if self_signed => {
                format!("it is self-signed, and not among the trusted authorities, {source}")
            }
            E::UnknownIssuer => format!(
                "its issuer is unknown: {} it came with lead to none of the trusted authorities, {source}",
                match intermediates {
                    0 => "no further certificates that".to_owned(),
                    1 => "the one further certificate that".to_owned(),
                    many => format!("the {many} further certificates that"),
                }
            ),
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
                "it is not for servers (extendedKeyUsage)".to_owned()
            }
            E::BadSignature => "its signature is not that of its issuer".to_owned(),
            E::Other(_) if facts.as_ref().is_ok_and(|facts| facts.is_authority) => {
                "it is an authority's own (CA:TRUE), which cannot be a server's".to_owned()
            }
            other => other.to_string(),
        };
        let certificate = match facts {
            Ok(facts) => facts.to_string(),
            Err(error) => format!("one that cannot be read ({error}), SHA-256 {}", fingerprint(end_entity)),
        };
        NotTrusted(format!(
            "the certificate of {name:?} is not trusted: {why}. The certificate is {certificate}"
        ))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).map_err(
            |error| {
                let Error::InvalidCertificate(error) = error else { return error };
                let why = self.explain(&error, server_name, end_entity, intermediates.len());
                // The alert that the backend gets is then certificate_unknown, whatever the reason.
                Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
            },
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Takes every certificate (`upstream_tls_insecure`). That the backend has its key is checked all the same.
#[derive(Debug)]
pub(super) struct Anybody(pub(super) Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
