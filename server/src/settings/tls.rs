//! What the settings say of TLS: which listener shows which certificates, and how each backend's are checked. Only what can
//! be said without reading the files; `crate::tls` reads them.

use super::address::UpstreamUrl;
use super::file::{LISTENERS_MAX, ListenerTable, UpstreamTable};
use super::load::{Source, Values};
use super::table::{self, Default, Setting};
use super::value::Value;
use super::{Machine, Place, Problem};
use rustls::pki_types::ServerName;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// A listening address.
#[derive(Clone, Debug)]
pub(crate) struct ListenerValues {
    pub(crate) address: SocketAddr,
    pub(crate) source: Source,
    /// A `[[listener]]`.
    pub(crate) table: bool,
    /// `None`: plain HTTP.
    pub(crate) tls: Option<Values>,
}

/// An `https` backend.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamValues {
    pub(crate) values: Values,
    /// Whether a table of the file says something of its own.
    pub(crate) own: bool,
}

/// Certificates and rules of one or several listeners.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServerFiles {
    /// The first is the default.
    pub(crate) pairs: Vec<PairFiles>,
    pub(crate) client_auth: ClientAuth,
    /// TLS 1.3 alone.
    pub(crate) only_tls13: bool,
}

/// A certificate chain and its key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct PairFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

/// What clients are asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ClientAuth {
    Off,
    /// A certificate of these authorities, or none.
    Optional(PathBuf),
    Required(PathBuf),
}

/// How one or several backends are spoken to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ClientFiles {
    pub(crate) trust: Trust,
    /// Shown to backends that ask.
    pub(crate) identity: Option<PairFiles>,
}

/// Whose certificates are believed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Trust {
    /// Of the system's authorities.
    System,
    /// Of those in this file.
    File(PathBuf),
    /// Everybody's.
    Everybody,
}

impl ClientAuth {
    pub(crate) fn authorities(&self) -> Option<&Path> {
        match self {
            ClientAuth::Off => None,
            ClientAuth::Optional(path) | ClientAuth::Required(path) => Some(path),
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            ClientAuth::Off => "off",
            ClientAuth::Optional(_) => "optional",
            ClientAuth::Required(_) => "required",
        }
    }
}

impl ServerFiles {
    /// Of a listener's checked values.
    pub(crate) fn of(values: &Values) -> Self {
        let pairs = values.files(&table::TLS_CERT).iter().zip(values.files(&table::TLS_KEY));
        let authorities = values.file(&table::TLS_CLIENT_CA).map(Path::to_owned);
        ServerFiles {
            pairs: pairs
                .map(|(certificate, key)| PairFiles { certificate: certificate.clone(), key: key.clone() })
                .collect(),
            client_auth: match (values.choice(&table::TLS_CLIENT_AUTH), authorities) {
                ("required", Some(path)) => ClientAuth::Required(path),
                ("optional", Some(path)) => ClientAuth::Optional(path),
                _ => ClientAuth::Off,
            },
            only_tls13: values.choice(&table::TLS_MIN) == "1.3",
        }
    }
}

impl ClientFiles {
    /// Of a backend's checked values.
    pub(crate) fn of(values: &Values) -> Self {
        let trust = match values.file(&table::UPSTREAM_CA) {
            _ if values.switch(&table::UPSTREAM_TLS_INSECURE) => Trust::Everybody,
            Some(path) => Trust::File(path.to_owned()),
            None => Trust::System,
        };
        let identity = values.file(&table::UPSTREAM_CERT).zip(values.file(&table::UPSTREAM_KEY));
        let identity =
            identity.map(|(certificate, key)| PairFiles { certificate: certificate.into(), key: key.into() });
        ClientFiles { trust, identity }
    }
}

impl UpstreamValues {
    /// What the certificate must be for.
    pub(crate) fn name(&self, url: &UpstreamUrl) -> ServerName<'static> {
        self.values
            .server_name(&table::UPSTREAM_SERVER_NAME)
            .cloned()
            .or_else(|| url.host.server_name())
            .unwrap_or_else(|| unreachable!("checked when {url} was read"))
    }
}

/// Every listener, and what is wrong with them.
pub(super) fn listeners(
    tables: &[ListenerTable],
    overall: &Values,
    machine: &Machine,
    problems: &mut Vec<Problem>,
) -> Vec<ListenerValues> {
    let mut listeners: Vec<ListenerValues> = Vec::new();
    for (setting, tls) in [(&table::LISTEN, false), (&table::LISTEN_TLS, true)] {
        for &address in overall.listen(setting) {
            let tls =
                tls.then(|| inherit(overall, |setting| setting.per_listener.is_some(), &HashMap::new()));
            let source = overall.source(setting).clone();
            listeners.push(ListenerValues { address, source, table: false, tls });
        }
    }
    for table in tables {
        if table.tls == Some(false) && !table.values.is_empty() {
            let message =
                "tls is false, and yet there are certificates or rules of TLS: leave out one or the other";
            problems.push(Problem::at(&table.place, message));
        }
        let tls = table.tls.unwrap_or(!table.values.is_empty()).then(|| {
            let mut values = inherit(overall, |setting| setting.per_listener.is_some(), &table.values);
            alone(&table.values, &table::TLS_CERT, &table::TLS_KEY, Value::Files(Vec::new()), &mut values);
            if *values.source(&table::TLS_CLIENT_AUTH) == Source::Default {
                rederive(&table::TLS_CLIENT_AUTH, machine, &mut values);
            }
            values
        });
        let source = Source::File(table.place.clone());
        listeners.push(ListenerValues { address: table.address, source, table: true, tls });
    }
    check_listeners(&listeners, overall, problems);
    listeners
}

fn check_listeners(listeners: &[ListenerValues], overall: &Values, problems: &mut Vec<Problem>) {
    if listeners.is_empty() {
        problems.push(Problem::new(
            "listen: at least one address is needed, here or in listen_tls or a [[listener]]",
        ));
    }
    if listeners.len() > LISTENERS_MAX {
        problems.push(Problem::new(format!(
            "listen: at most {LISTENERS_MAX} listeners, found {}",
            listeners.len()
        )));
        return;
    }
    for (index, listener) in listeners.iter().enumerate() {
        let (address, source) = (listener.address, &listener.source);
        if address.port() != 0 && listeners[..index].iter().any(|other| other.address == address) {
            problems.push(Problem::new(format!("the listener {address} ({source}) is there twice")));
        }
        if let Some(values) = &listener.tls {
            check_listener(&format!("the TLS listener {address} ({source})"), values, problems);
        }
    }
    // One mistake, told once, though several listeners share it.
    let mut told = std::collections::HashSet::new();
    problems.retain(|problem| told.insert(problem.to_string()));
    if listeners.iter().all(|listener| listener.tls.is_none()) {
        for setting in [&table::TLS_CERT, &table::TLS_KEY, &table::TLS_CLIENT_CA] {
            let source = overall.source(setting);
            if overall.get(setting).says_something() {
                problems.push(Problem::new(format!(
                    "{} ({source}) is given, and no listener speaks TLS: give --listen-tls, or a [[listener]] with tls = true",
                    setting.key()
                )));
            }
        }
    }
}

fn check_listener(whose: &str, values: &Values, problems: &mut Vec<Problem>) {
    let (certificates, keys) = (values.files(&table::TLS_CERT), values.files(&table::TLS_KEY));
    let of = |setting| values.source(setting);
    if certificates.is_empty() {
        problems.push(Problem::new(format!(
            "{whose} has no certificate: give --tls-cert and --tls-key, or cert and key in its [[listener]]"
        )));
    } else if certificates.len() != keys.len() {
        problems.push(Problem::new(format!(
            "{whose} has {} in tls_cert ({}) and {} in tls_key ({}): each certificate needs its key, in the same place (a file \
             that holds both is given twice)",
            counted(certificates.len(), "certificate"),
            of(&table::TLS_CERT),
            counted(keys.len(), "key"),
            of(&table::TLS_KEY),
        )));
    }
    if values.choice(&table::TLS_CLIENT_AUTH) != "off" && values.file(&table::TLS_CLIENT_CA).is_none() {
        problems.push(Problem::new(format!(
            "{whose} asks for certificates of clients (tls_client_auth, {}) and has nothing to check them with: give \
             --tls-client-ca, or client_ca in its [[listener]]",
            of(&table::TLS_CLIENT_AUTH),
        )));
    }
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// What is said of every backend, and what is wrong with it.
pub(super) fn upstreams(
    tables: &[UpstreamTable],
    urls: &[UpstreamUrl],
    overall: &Values,
    problems: &mut Vec<Problem>,
) -> Vec<Option<UpstreamValues>> {
    for (index, table) in tables.iter().enumerate() {
        let said = |table: &UpstreamTable| -> Vec<_> {
            let mut said: Vec<_> =
                table.values.iter().map(|(name, (value, _))| (*name, value.to_string())).collect();
            said.sort();
            said
        };
        // A route that names a backend again need not repeat what was said of it.
        let differs = |other: &&UpstreamTable| {
            other.url == table.url && !table.values.is_empty() && said(other) != said(table)
        };
        if let Some(other) = tables[..index].iter().find(differs) {
            let message = format!("{} is told of differently at {}", table.url, other.place);
            problems.push(Problem::at(&table.place, &message));
        }
        if !table.url.tls && !table.values.is_empty() {
            let message = format!("{} is not https, so nothing of TLS can be said of it", table.url);
            problems.push(Problem::at(&table.place, &message));
        }
    }
    let all: Vec<_> = urls
        .iter()
        .map(|url| {
            url.tls.then(|| {
                let none = HashMap::new();
                let own = tables.iter().filter(|table| table.url == *url).map(|table| &table.values);
                let own = own.max_by_key(|values| values.len()).unwrap_or(&none);
                let mut values = inherit(overall, |setting| setting.per_upstream.is_some(), own);
                alone(own, &table::UPSTREAM_CERT, &table::UPSTREAM_KEY, Value::File(None), &mut values);
                // Whom one backend is to be trusted by is said whole, whatever holds for the others.
                let (trusted, insecure) = (&table::UPSTREAM_CA, &table::UPSTREAM_TLS_INSECURE);
                if own.contains_key(trusted.name) && !own.contains_key(insecure.name) {
                    values.0.insert(insecure.name, (Value::Switch(false), Source::Default));
                }
                let said = own.get(insecure.name).is_some_and(|(value, _)| *value == Value::Switch(true));
                if said && !own.contains_key(trusted.name) {
                    values.0.insert(trusted.name, (Value::File(None), Source::Default));
                }
                check_upstream(url, &values, problems);
                UpstreamValues { values, own: !own.is_empty() }
            })
        })
        .collect();
    let mut told = std::collections::HashSet::new();
    problems.retain(|problem| told.insert(problem.to_string()));
    if all.iter().all(Option::is_none) {
        for setting in table::ALL.iter().filter(|setting| setting.per_upstream.is_some()) {
            let source = overall.source(setting);
            if overall.get(setting).says_something() {
                let key = setting.key();
                problems
                    .push(Problem::new(format!("{key} ({source}) is given, and no upstream is https://")));
            }
        }
    }
    all
}

fn check_upstream(url: &UpstreamUrl, values: &Values, problems: &mut Vec<Problem>) {
    let source = |setting| values.source(setting);
    let (certificate, key) = (&table::UPSTREAM_CERT, &table::UPSTREAM_KEY);
    for (one, other) in [(certificate, key), (key, certificate)] {
        if values.file(one).is_some() && values.file(other).is_none() {
            problems.push(Problem::new(format!(
                "upstream {url}: {} ({}) needs {}",
                one.key(),
                source(one),
                other.key()
            )));
        }
    }
    if values.switch(&table::UPSTREAM_TLS_INSECURE) && values.file(&table::UPSTREAM_CA).is_some() {
        problems.push(Problem::new(format!(
            "upstream {url}: upstream_ca ({}) would never be looked at, since upstream_tls_insecure ({}) takes every certificate",
            source(&table::UPSTREAM_CA),
            source(&table::UPSTREAM_TLS_INSECURE),
        )));
    }
}

/// The overall values of some settings, under those of a table.
fn inherit(
    overall: &Values,
    which: fn(&Setting) -> bool,
    own: &HashMap<&'static str, (Value, Place)>,
) -> Values {
    let mut values = Values(HashMap::new());
    for setting in table::ALL.iter().filter(|setting| which(setting)) {
        let entry = match own.get(setting.name) {
            Some((value, place)) => (value.clone(), Source::File(place.clone())),
            None => (overall.get(setting).clone(), overall.source(setting).clone()),
        };
        values.0.insert(setting.name, entry);
    }
    values
}

/// A certificate and its key come from one place: with one of them in a table, the overall other is not taken.
fn alone(
    own: &HashMap<&'static str, (Value, Place)>,
    certificate: &'static Setting,
    key: &'static Setting,
    nothing: Value,
    values: &mut Values,
) {
    for (given, missing) in [(certificate, key), (key, certificate)] {
        if own.contains_key(given.name) && !own.contains_key(missing.name) {
            values.0.insert(missing.name, (nothing.clone(), Source::Default));
        }
    }
}

/// Works a default out again from a table's own values.
fn rederive(setting: &'static Setting, machine: &Machine, values: &mut Values) {
    if let Default::Derived(how, _) = &setting.default {
        let value = how(machine, values);
        values.0.insert(setting.name, (value, Source::Default));
    }
}
