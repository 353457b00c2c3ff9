//! What operators are told of certificates: at start, by `tokenring check`, in /status and in metrics.

use super::certificate::{Facts, date, span};
use super::{Part, Store};
use crate::settings::plan::Plan;
use crate::settings::tls::{PairFiles, Trust};
use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

/// From this long before its end on, a certificate's expiry is warned of.
pub(crate) const EXPIRY_NOTICE: Duration = Duration::from_secs(14 * 86_400);

/// All of it, at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Status {
    pub(crate) epoch: u64,
    /// By `Listener::tls`.
    pub(crate) servers: Vec<ServerStatus>,
    /// By `UpstreamTls::config`.
    pub(crate) clients: Vec<ClientStatus>,
    /// Files that changed and cannot be taken; the old ones are in use.
    pub(crate) errors: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServerStatus {
    /// The first is the default.
    pub(crate) certificates: Vec<CertificateStatus>,
    /// Whether clients are asked for a certificate.
    pub(crate) client_auth: &'static str,
    pub(crate) client_authorities: Option<Authorities>,
    pub(crate) versions: &'static str,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ClientStatus {
    /// `None`: everybody is trusted.
    pub(crate) authorities: Option<Authorities>,
    pub(crate) certificate: Option<CertificateStatus>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CertificateStatus {
    pub(crate) files: PairFiles,
    pub(crate) facts: Facts,
    pub(crate) remarks: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Authorities {
    pub(crate) number: usize,
    /// Where they are from, in words.
    pub(crate) source: String,
    pub(crate) remarks: Vec<String>,
}

impl Store {
    pub(crate) fn status(&self) -> Status {
        let certificate = |&index: &usize| {
            let Part { from, value, .. } = &self.pairs[index];
            CertificateStatus {
                files: from.clone(),
                facts: value.facts.clone(),
                remarks: value.remarks.clone(),
            }
        };
        let authorities = |index: usize| {
            let roots = &self.roots[index].value;
            let (source, remarks) = (roots.source.clone(), roots.remarks.clone());
            Authorities { number: roots.store.len(), source, remarks }
        };
        let errors = self.pairs.iter().filter_map(|part| part.error.clone());
        Status {
            epoch: self.epoch,
            servers: self
                .servers
                .iter()
                .map(|server| ServerStatus {
                    certificates: server.pairs.iter().map(certificate).collect(),
                    client_auth: server.files.client_auth.name(),
                    client_authorities: server.roots.map(authorities),
                    versions: if server.files.only_tls13 { "1.3" } else { "1.2 and 1.3" },
                })
                .collect(),
            clients: self
                .clients
                .iter()
                .map(|client| ClientStatus {
                    authorities: match client.files.trust {
                        Trust::Everybody => None,
                        Trust::System | Trust::File(_) => client.roots.map(authorities),
                    },
                    certificate: client.identity.as_ref().map(certificate),
                })
                .collect(),
            errors: errors.chain(self.roots.iter().filter_map(|part| part.error.clone())).collect(),
        }
    }
}

impl fmt::Display for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.number == 1 { "y" } else { "ies" };
        write!(f, "vouched for by {} authorit{plural}: {}", self.number, self.source)
    }
}

impl CertificateStatus {
    /// What is wrong with its dates at this moment.
    pub(crate) fn expiry(&self, unix_time_s: u64) -> Option<String> {
        let Facts { not_before_s, not_after_s, .. } = self.facts;
        if unix_time_s > not_after_s {
            return Some(format!("it expired on {}: clients refuse it", date(not_after_s)));
        }
        if unix_time_s < not_before_s {
            return Some(format!(
                "it is not valid before {}; is this machine's clock right?",
                date(not_before_s)
            ));
        }
        let left = Duration::from_secs(not_after_s - unix_time_s);
        (left < EXPIRY_NOTICE).then(|| format!("it expires in {}, on {}", span(left), date(not_after_s)))
    }

    /// For `tokenring check`.
    fn lines(&self, unix_time_s: u64) -> Vec<String> {
        let facts = &self.facts;
        let left = Duration::from_secs(facts.not_after_s.saturating_sub(unix_time_s));
        vec![
            format!("    for {}", facts.names.join(", ")),
            format!(
                "    valid from {} to {} ({} left)",
                date(facts.not_before_s),
                date(facts.not_after_s),
                span(left)
            ),
            format!("    subject {:?}, issuer {:?}, serial {}", facts.subject, facts.issuer, facts.serial),
            format!("    SHA-256 {}", facts.fingerprint),
        ]
    }

    /// As a subject of messages.
    pub(crate) fn title(&self) -> String {
        format!("certificate {} ({})", self.files.certificate.display(), self.facts.names_in_words())
    }
}

impl Status {
    /// Every certificate once.
    pub(crate) fn certificates(&self) -> impl Iterator<Item = &CertificateStatus> {
        let mut told = HashSet::new();
        let servers = self.servers.iter().flat_map(|server| &server.certificates);
        let clients = self.clients.iter().filter_map(|client| client.certificate.as_ref());
        servers.chain(clients).filter(move |certificate| told.insert(&certificate.files))
    }

    /// Everything that is odd at this moment, in lines.
    pub(crate) fn warnings(&self, unix_time_s: u64) -> Vec<String> {
        let mut warnings = self.expiries(unix_time_s);
        for certificate in self.certificates() {
            let title = certificate.title();
            warnings.extend(certificate.remarks.iter().map(|remark| format!("{title}: {remark}")));
        }
        let servers = self.servers.iter().filter_map(|server| server.client_authorities.as_ref());
        let clients = self.clients.iter().filter_map(|client| client.authorities.as_ref());
        let mut told = HashSet::new();
        for authorities in servers.chain(clients) {
            if told.insert(&authorities.source) {
                let source = &authorities.source;
                warnings.extend(
                    authorities.remarks.iter().map(|remark| format!("authorities of {source}: {remark}")),
                );
            }
        }
        warnings
    }

    /// Those that are about dates.
    pub(crate) fn expiries(&self, unix_time_s: u64) -> Vec<String> {
        let of = |certificate: &CertificateStatus| {
            Some(format!("{}: {}", certificate.title(), certificate.expiry(unix_time_s)?))
        };
        self.certificates().filter_map(of).collect()
    }
}

/// What `tokenring check` says of all certificates, as comments behind the effective configuration.
pub(crate) fn page(status: &Status, plan: &Plan, unix_time_s: u64) -> String {
    if status.servers.is_empty() && status.clients.is_empty() {
        return String::new();
    }
    let mut lines = vec!["Certificates, as read; each fits its key".to_owned()];
    for (index, server) in status.servers.iter().enumerate() {
        let listeners = plan.listen.iter().zip(&plan.settings.listeners);
        let addresses = listeners.filter(|(_, listener)| listener.tls == Some(index));
        let addresses: Vec<_> = addresses.map(|(address, _)| address.to_string()).collect();
        lines.push(format!("{}: TLS {}", addresses.join(" "), server.versions));
        for (nth, certificate) in server.certificates.iter().enumerate() {
            let default = if nth == 0 { " (the default)" } else { "" };
            lines.push(format!("  {}{default}", certificate.files.certificate.display()));
            lines.extend(certificate.lines(unix_time_s));
        }
        if let Some(authorities) = &server.client_authorities {
            lines.push(format!("  certificates of clients: {}, {authorities}", server.client_auth));
        }
    }
    for (index, client) in status.clients.iter().enumerate() {
        let upstreams = plan.upstreams.iter().zip(&plan.upstream_tls);
        for (url, tls) in
            upstreams.filter_map(|(url, tls)| Some((url, tls.as_ref().filter(|tls| tls.config == index)?)))
        {
            let name = tls.name.to_str();
            lines.push(match &client.authorities {
                Some(authorities) => format!("{url}: must be {name}, {authorities}"),
                None => format!("{url}: NOT VERIFIED: every certificate is taken (upstream_tls_insecure)"),
            });
        }
        if let Some(certificate) = &client.certificate {
            lines.push(format!("  shows {}", certificate.files.certificate.display()));
            lines.extend(certificate.lines(unix_time_s));
        }
    }
    for warning in status.warnings(unix_time_s) {
        lines.push(format!("warning: {warning}"));
    }
    let lines: Vec<_> = lines.iter().map(|line| format!("# {line}\n")).collect();
    format!("\n{}", lines.concat())
}
