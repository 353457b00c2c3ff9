//! What a certificate says of itself, for people: names, dates, who issued it.

use ring::digest;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};

/// Characters kept of a name in a certificate. Those of backends are whatever their owner wrote.
const NAME_CHARS_MAX: usize = 200;
/// Names kept of one certificate.
pub(crate) const NAMES_MAX: usize = 1024;
/// Names told in one line.
const NAMES_TOLD: usize = 5;

/// A certificate in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    /// DNS names and addresses (subjectAltName), lower case; clients look at nothing else.
    pub(crate) names: Vec<String>,
    pub(crate) subject: String,
    pub(crate) issuer: String,
    /// Hexadecimal.
    pub(crate) serial: String,
    /// Seconds since 1970.
    pub(crate) not_before_s: u64,
    /// Seconds since 1970.
    pub(crate) not_after_s: u64,
    /// SHA-256 of the whole, hexadecimal.
    pub(crate) fingerprint: String,
    pub(crate) is_authority: bool,
    /// Subject and issuer as they are encoded, to see whether one certificate was issued by the next.
    pub(crate) subject_der: Vec<u8>,
    pub(crate) issuer_der: Vec<u8>,
}

impl Facts {
    /// Reads a certificate.
    pub(crate) fn of(der: &[u8]) -> Result<Facts, String> {
        let certificate = Certificate::from_der(der).map_err(|error| error.to_string())?;
        let body = &certificate.tbs_certificate;
        let names = match body.get::<SubjectAltName>() {
            Ok(Some((_, names))) => names.0.iter().filter_map(name).take(NAMES_MAX).collect(),
            _ => Vec::new(),
        };
        let is_authority =
            matches!(body.get::<BasicConstraints>(), Ok(Some((_, constraints))) if constraints.ca);
        let encoded = |name: &x509_cert::name::Name| x509_cert::der::Encode::to_der(name).unwrap_or_default();
        Ok(Facts {
            names,
            subject: printable(&body.subject.to_string()),
            issuer: printable(&body.issuer.to_string()),
            serial: hexadecimal(body.serial_number.as_bytes()),
            not_before_s: body.validity.not_before.to_unix_duration().as_secs(),
            not_after_s: body.validity.not_after.to_unix_duration().as_secs(),
            fingerprint: fingerprint(der),
            is_authority,
            subject_der: encoded(&body.subject),
            issuer_der: encoded(&body.issuer),
        })
    }

    /// What it is for, in few words.
    pub(crate) fn names_in_words(&self) -> String {
        match self.names.as_slice() {
            [] => "no name".to_owned(),
            names if names.len() <= NAMES_TOLD => names.join(", "),
            names => format!("{} and {} more", names[..NAMES_TOLD].join(", "), names.len() - NAMES_TOLD),
        }
    }

    /// The name it goes by in metrics and messages.
    pub(crate) fn title(&self) -> &str {
        self.names.first().map_or(self.subject.as_str(), String::as_str)
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "for {}, subject {:?}, issuer {:?}, serial {}, valid from {} to {}",
            self.names_in_words(),
            self.subject,
            self.issuer,
            self.serial,
            date(self.not_before_s),
            date(self.not_after_s)
        )
    }
}

/// SHA-256, hexadecimal.
pub(crate) fn fingerprint(der: &[u8]) -> String {
    hexadecimal(digest::digest(&digest::SHA256, der).as_ref())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn name(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(printable(name.as_str()).to_ascii_lowercase()),
        GeneralName::IpAddress(bytes) => match *bytes.as_bytes() {
            [a, b, c, d] => Some(IpAddr::from([a, b, c, d]).to_string()),
            ref bytes => <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    }
}

/// Without what would break a line of a log or a terminal.
fn printable(text: &str) -> String {
    let clean = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    clean.take(NAME_CHARS_MAX).collect()
}

/// A moment as it stands in messages, to the minute.
pub(crate) fn date(unix_time_s: u64) -> String {
    let time = i64::try_from(unix_time_s).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(
        || format!("{unix_time_s} s after 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M UTC").to_string(),
    )
}

/// A span of time for people: days, else hours, else minutes.
pub(crate) fn span(time: Duration) -> String {
    let minutes = time.as_secs() / 60;
    match minutes {
        0..=119 => format!("{minutes} min"),
        120..=2879 => format!("{} h", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Authority;
    use super::*;

    #[test]
    fn a_certificate_in_words() {
        let authority = Authority::new("Test Authority");
        let issued = authority.issue(&["A.example", "*.b.example", "10.0.0.1", "::1"]);
        let facts = Facts::of(&issued.certificate).unwrap();
        assert_eq!(facts.names, ["a.example", "*.b.example", "10.0.0.1", "::1"]);
        assert_eq!((facts.title(), facts.is_authority), ("a.example", false));
        assert_eq!(facts.issuer_der, Facts::of(&authority.certificate).unwrap().subject_der);
        assert!(Facts::of(&authority.certificate).unwrap().is_authority);
        assert_eq!(facts.fingerprint.len(), 64);
        let words = facts.to_string();
        assert!(words.starts_with("for a.example, *.b.example, 10.0.0.1, ::1, subject "), "{words}");
        assert!(words.contains("issuer \"CN=Test Authority\", serial "), "{words}");
        assert!(words.contains(" valid from 2020-01-01 00:00 UTC to 2100-01-01 00:00 UTC"), "{words}");
        assert!(Facts::of(b"0\x03abc").is_err());
        assert!(Facts::of(&issued.certificate[..100]).is_err());
    }

    #[test]
    fn many_names_are_cut_and_odd_ones_cleaned() {
        let authority = Authority::new("a\x1b[31m\nb");
        let names: Vec<String> = (0..9).map(|index| format!("n{index}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let facts = Facts::of(&authority.issue(&names).certificate).unwrap();
        assert_eq!(facts.names_in_words(), "n0, n1, n2, n3, n4 and 4 more");
        assert!(!facts.issuer.contains(['\x1b', '\n']), "{:?}", facts.issuer);
        assert_eq!(printable(&"x".repeat(1000)).len(), NAME_CHARS_MAX);
    }

    /// A backend's certificate is read before it is trusted.
    #[test]
    fn no_changed_certificate_is_more_than_an_error() {
        let issued = Authority::new("authority").issue(&["a.example", "10.0.0.1"]);
        let mut read = 0;
        for bit in 0..issued.certificate.len() * 8 {
            let mut changed = issued.certificate.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if let Ok(facts) = Facts::of(&changed) {
                assert!(facts.to_string().chars().all(|c| !c.is_control()));
                read += 1;
            }
        }
        // Most of it is a key and a signature, which are nobody's words.
        assert!(read > 1000, "{read}");
    }

    #[test]
    fn dates_and_spans() {
        assert_eq!(date(1_700_000_000), "2023-11-14 22:13 UTC");
        assert_eq!(date(u64::MAX), format!("{} s after 1970", u64::MAX));
        let spans = [59, 7_199, 7_200, 172_799, 172_800].map(|seconds| span(Duration::from_secs(seconds)));
        assert_eq!(spans, ["0 min", "119 min", "2 h", "47 h", "2 days"]);
    }
}
