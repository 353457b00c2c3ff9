//! Certificates, keys and roots: read from their files, watched, and made into what the shards use. Every part is kept on its
//! own: what cannot be read again stays as it was, and what can is taken.

pub(crate) mod certificate;
mod files;
mod sni;
pub(crate) mod status;
mod tickets;
mod verify;
mod watch;

pub(crate) use files::system_roots;
pub(crate) use tickets::KEY_AGE;

use crate::settings::plan::TlsPlan;
use crate::settings::tls::{ClientAuth, ClientFiles, PairFiles, ServerFiles, Trust};
use files::{Digest, Pair, Roots};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion, version};
use shard::settings::TlsSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tickets::Keys;
use watch::Stamp;

/// What is spoken inside TLS, on both sides (ALPN, RFC 7301).
const ALPN: &[u8] = b"http/1.1";
static BOTH: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];
static ONLY_13: &[&SupportedProtocolVersion] = &[&version::TLS13];

/// Everything read, and the configurations made of it.
#[derive(Debug)]
pub(crate) struct Store {
    provider: Arc<CryptoProvider>,
    pairs: Vec<Part<PairFiles, Pair>>,
    roots: Vec<Part<Trust, Roots>>,
    servers: Vec<Server>,
    clients: Vec<Client>,
    /// Counts up with every change.
    epoch: u64,
    /// What a change must look like twice in a row before it is read: files that belong together are not replaced at once.
    seen: Vec<Stamp>,
}

/// Something read from files.
#[derive(Debug)]
struct Part<F, T> {
    from: F,
    places: Vec<PathBuf>,
    /// Of the places, before they were last read.
    stamps: Vec<Stamp>,
    value: T,
    /// Why what stands in the files now is not taken.
    error: Option<String>,
}

#[derive(Debug)]
struct Server {
    files: ServerFiles,
    /// Into `pairs`.
    pairs: Vec<usize>,
    /// Into `roots`: of clients.
    roots: Option<usize>,
    keys: Keys,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Client {
    files: ClientFiles,
    /// Into `pairs`.
    identity: Option<usize>,
    /// Into `roots`; `None`: everybody is trusted.
    roots: Option<usize>,
    config: Arc<ClientConfig>,
}

/// What came of reading again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Reread {
    /// What is new, in words.
    pub(crate) changed: Vec<String>,
    /// What could not be taken, and why.
    pub(crate) failed: Vec<String>,
}

impl Store {
    /// Reads everything, or says what is wrong with what.
    pub(crate) fn load(plan: &TlsPlan) -> Result<Store, Vec<String>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut problems = Vec::new();
        let (mut pair_files, mut trusts): (Vec<PairFiles>, Vec<Trust>) = (Vec::new(), Vec::new());
        let authorities = |auth: &ClientAuth| auth.authorities().map(|path| Trust::File(path.to_owned()));
        let wanted = plan.servers.iter().flat_map(|files| &files.pairs);
        for files in wanted.chain(plan.clients.iter().filter_map(|files| files.identity.as_ref())) {
            if !pair_files.contains(files) {
                pair_files.push(files.clone());
            }
        }
        let wanted = plan.servers.iter().filter_map(|files| authorities(&files.client_auth));
        for trust in wanted.chain(plan.clients.iter().map(|files| files.trust.clone())) {
            if trust != Trust::Everybody && !trusts.contains(&trust) {
                trusts.push(trust);
            }
        }
        let mut pairs = Vec::new();
        for from in pair_files {
            match Part::load(from, |files| files::pair(files, &provider)) {
                Ok(part) => pairs.push(part),
                Err(error) => problems.push(error),
            }
        }
        let mut roots = Vec::new();
        for from in trusts {
            match Part::load(from, read_roots) {
                Ok(part) => roots.push(part),
                Err(error) => problems.push(error),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let pair = |files: &PairFiles| {
            let found = pairs.iter().position(|part| part.from == *files);
            found.unwrap_or_else(|| unreachable!("every pair of the plan was read"))
        };
        let root = |trust: Trust| roots.iter().position(|part| part.from == trust);
        let (mut servers, mut clients) = (Vec::new(), Vec::new());
        for files in &plan.servers {
            let of: Vec<usize> = files.pairs.iter().map(pair).collect();
            let authorities = authorities(&files.client_auth).and_then(root);
            let config = Keys::new().and_then(|keys| {
                let own: Vec<&Pair> = of.iter().map(|&index| &pairs[index].value).collect();
                let trusted = authorities.map(|index| &roots[index].value);
                Ok((server_config(files, &own, trusted, &keys, &provider)?, keys))
            });
            match config {
                Ok((config, keys)) => {
                    servers.push(Server {
                        files: files.clone(),
                        pairs: of,
                        roots: authorities,
                        keys,
                        config,
                    });
                }
                Err(error) => problems.push(error),
            }
        }
        for files in &plan.clients {
            let identity = files.identity.as_ref().map(pair);
            let trusted = root(files.trust.clone());
            let own = identity.map(|index| &pairs[index].value);
            match client_config(own, trusted.map(|index| &roots[index].value), &provider) {
                Ok(config) => clients.push(Client { files: files.clone(), identity, roots: trusted, config }),
                Err(error) => problems.push(error),
            }
        }
        if problems.is_empty() {
            Ok(Store { provider, pairs, roots, servers, clients, epoch: 1, seen: Vec::new() })
        } else {
            Err(problems)
        }
    }

    /// What the shards are given.
    pub(crate) fn set(&self) -> TlsSet {
        TlsSet {
            epoch: self.epoch,
            servers: self.servers.iter().map(|server| Arc::clone(&server.config)).collect(),
            clients: self.clients.iter().map(|client| Arc::clone(&client.config)).collect(),
        }
    }

    /// Whether there is anything to keep.
    pub(crate) fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.clients.is_empty()
    }

    /// Whether tickets are made.
    pub(crate) fn has_servers(&self) -> bool {
        !self.servers.is_empty()
    }

    /// Looks whether files have changed, and reads them once they have stayed the same from one call to the next.
    pub(crate) fn poll(&mut self) -> Option<Reread> {
        let now: Vec<Stamp> = self.places().map(|place| Stamp::of(place)).collect();
        let read = self
            .pairs
            .iter()
            .flat_map(|part| &part.stamps)
            .chain(self.roots.iter().flat_map(|part| &part.stamps));
        if now.iter().eq(read) {
            self.seen.clear();
            return None;
        }
        if self.seen != now {
            self.seen = now;
            return None;
        }
        Some(self.reread(false))
    }

    fn places(&self) -> impl Iterator<Item = &PathBuf> {
        let pairs = self.pairs.iter().flat_map(|part| &part.places);
        pairs.chain(self.roots.iter().flat_map(|part| &part.places))
    }

    /// Reads what has changed, or everything, and takes what can be taken.
    pub(crate) fn reread(&mut self, everything: bool) -> Reread {
        self.seen.clear();
        let mut news = Reread::default();
        let provider = Arc::clone(&self.provider);
        let (mut pair_news, mut root_news) = (Vec::new(), Vec::new());
        for part in &mut self.pairs {
            let read = |files: &PairFiles| files::pair(files, &provider);
            let is_new = part.reread(everything, read, |pair| &pair.digest, &mut news.failed);
            if is_new {
                let (path, facts) = (part.from.certificate.display(), &part.value.facts);
                news.changed.push(format!("certificate {path} {facts}, SHA-256 {}", facts.fingerprint));
            }
            pair_news.push(is_new);
        }
        for part in &mut self.roots {
            let is_new = part.reread(everything, read_roots, |roots| &roots.digest, &mut news.failed);
            if is_new {
                let roots = &part.value;
                news.changed.push(format!("authorities: {} of {}", roots.store.len(), roots.source));
            }
            root_news.push(is_new);
        }
        let is_new = |pairs: &[usize], roots: Option<usize>| {
            pairs.iter().any(|&index| pair_news[index]) || roots.is_some_and(|index| root_news[index])
        };
        for server in &mut self.servers {
            if !is_new(&server.pairs, server.roots) {
                continue;
            }
            // A session of a client that other authorities vouched for is not to be taken up again.
            let asks_others = server.roots.is_some_and(|index| root_news[index]);
            let keys = if asks_others { Keys::new() } else { Ok(server.keys.clone()) };
            let own: Vec<&Pair> = server.pairs.iter().map(|&index| &self.pairs[index].value).collect();
            let trusted = server.roots.map(|index| &self.roots[index].value);
            let made = keys.and_then(|keys| {
                Ok((server_config(&server.files, &own, trusted, &keys, &self.provider)?, keys))
            });
            match made {
                Ok((config, keys)) => (server.config, server.keys) = (config, keys),
                Err(error) => news.failed.push(error),
            }
        }
        for client in &mut self.clients {
            if !is_new(client.identity.as_slice(), client.roots) {
                continue;
            }
            let own = client.identity.map(|index| &self.pairs[index].value);
            match client_config(own, client.roots.map(|index| &self.roots[index].value), &self.provider) {
                Ok(config) => client.config = config,
                Err(error) => news.failed.push(error),
            }
        }
        if !news.changed.is_empty() {
            self.epoch += 1;
        }
        news
    }

    /// New keys for session tickets.
    pub(crate) fn rotate(&mut self) -> Result<(), String> {
        for server in &mut self.servers {
            let keys = server.keys.next()?;
            let mut config = ServerConfig::clone(&server.config);
            config.ticketer = Arc::new(keys.clone());
            (server.config, server.keys) = (Arc::new(config), keys);
        }
        self.epoch += 1;
        Ok(())
    }
}

impl<F, T> Part<F, T>
where
    F: Places,
{
    fn load(from: F, read: impl FnOnce(&F) -> Result<T, String>) -> Result<Self, String> {
        let places = from.places();
        let stamps = places.iter().map(|place| Stamp::of(place)).collect();
        let value = read(&from)?;
        Ok(Part { from, places, stamps, value, error: None })
    }

    /// True when there is a new value, and it differs.
    fn reread(
        &mut self,
        everything: bool,
        read: impl FnOnce(&F) -> Result<T, String>,
        digest: fn(&T) -> &Digest,
        failed: &mut Vec<String>,
    ) -> bool {
        // Before reading: a change that comes meanwhile is seen the next time.
        let stamps: Vec<Stamp> = self.places.iter().map(|place| Stamp::of(place)).collect();
        if !everything && stamps == self.stamps {
            return false;
        }
        self.stamps = stamps;
        match read(&self.from) {
            Ok(value) => {
                self.error = None;
                let differs = digest(&value) != digest(&self.value);
                self.value = value;
                differs
            }
            Err(error) => {
                failed.push(error.clone());
                self.error = Some(error);
                false
            }
        }
    }
}

/// What is to be watched.
trait Places {
    fn places(&self) -> Vec<PathBuf>;
}

impl Places for PairFiles {
    fn places(&self) -> Vec<PathBuf> {
        vec![self.certificate.clone(), self.key.clone()]
    }
}

impl Places for Trust {
    fn places(&self) -> Vec<PathBuf> {
        files::places(self)
    }
}

fn read_roots(trust: &Trust) -> Result<Roots, String> {
    match trust {
        Trust::System => files::system_roots(),
        Trust::File(path) => files::roots(path),
        Trust::Everybody => unreachable!("nothing is read to trust everybody"),
    }
}

/// How `tokenring streams` speaks to a server: trusting these authorities, or the system's.
pub(crate) fn client(authorities: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let roots = match authorities {
        Some(path) => files::roots(path)?,
        None => files::system_roots()?,
    };
    client_config(None, Some(&roots), &Arc::new(rustls::crypto::ring::default_provider()))
}

fn server_config(
    files: &ServerFiles,
    pairs: &[&Pair],
    roots: Option<&Roots>,
    keys: &Keys,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ServerConfig>, String> {
    let versions = if files.only_tls13 { ONLY_13 } else { BOTH };
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?;
    let builder = match roots {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots.store), Arc::clone(provider));
            let verifier = match files.client_auth {
                ClientAuth::Optional(_) => verifier.allow_unauthenticated(),
                ClientAuth::Off | ClientAuth::Required(_) => verifier,
            };
            let verifier = verifier.build().map_err(|error| format!("{}: {error}", roots.source))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(sni::ByName::new(pairs)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Tickets alone: a store of sessions would be shared between shards, and locked.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = Arc::new(keys.clone());
    // What was sent early could be sent again by anybody (RFC 8446 section 8).
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn client_config(
    identity: Option<&Pair>,
    roots: Option<&Roots>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ClientConfig>, String> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(BOTH)
        .map_err(|error| error.to_string())?
        .dangerous();
    let builder = match roots {
        None => builder.with_custom_certificate_verifier(Arc::new(verify::Anybody(Arc::clone(provider)))),
        Some(roots) => {
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots.store), Arc::clone(provider))
                    .build()
                    .map_err(|error| format!("{}: {error}", roots.source))?;
            let verifier = verify::Verifier::new(verifier, roots.source.clone());
            builder.with_custom_certificate_verifier(Arc::new(verifier))
        }
    };
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let key = rustls::sign::CertifiedKey::clone(&pair.certified);
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)))
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
pub(crate) mod tests;
