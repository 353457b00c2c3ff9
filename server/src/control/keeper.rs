//! Keeps certificates and keys: looks whether their files have changed, makes new keys for session tickets, warns of what is
//! about to expire, and remembers what went wrong. Time is an argument.

use crate::admin::view::TlsView;
use crate::settings::plan::Plan;
use crate::tls::certificate::date;
use crate::tls::{KEY_AGE, Reread, Store};
use shard::mesh::TlsFailure;
use shard::settings::TlsSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often files are looked at. One that changed is read when it is the same the next time.
const POLL: Duration = Duration::from_secs(2);
/// How often an expiry is warned of.
const NOTICE: Duration = Duration::from_secs(86_400);
/// The target of lines about TLS.
const TARGET: &str = "tokenring::tls";

pub(crate) struct Keeper {
    store: Store,
    next_poll: Instant,
    next_keys: Instant,
    next_notice: Instant,
    view: Arc<TlsView>,
}

impl Keeper {
    /// Says what was read at start.
    pub(crate) fn new(store: Store, plan: &Plan, now: Instant, unix_time_s: u64) -> Self {
        let status = store.status();
        for certificate in status.certificates() {
            let facts = &certificate.facts;
            log::info!(target: TARGET, "{}: valid to {}", certificate.title(), date(facts.not_after_s));
        }
        for warning in status.warnings(unix_time_s) {
            log::warn!(target: TARGET, "{warning}");
        }
        for (url, tls) in plan.upstreams.iter().zip(&plan.upstream_tls) {
            let client = tls.as_ref().and_then(|tls| status.clients.get(tls.config));
            if client.is_some_and(|client| client.authorities.is_none()) {
                log::warn!(
                    target: TARGET,
                    "THE CERTIFICATE OF {url} IS NOT VERIFIED (upstream_tls_insecure): whoever is on the way to it may read and \
                     change everything"
                );
            }
        }
        let view =
            TlsView { status, upstream_errors: vec![None; plan.upstreams.len()], ..TlsView::default() };
        Keeper {
            store,
            next_poll: now + POLL,
            next_keys: now + KEY_AGE,
            next_notice: now + NOTICE,
            view: Arc::new(view),
        }
    }

    /// What the shards are given.
    pub(crate) fn set(&self) -> TlsSet {
        self.store.set()
    }

    pub(crate) fn view(&self) -> Arc<TlsView> {
        Arc::clone(&self.view)
    }

    /// A name that clients may ask the first TLS listener for.
    pub(crate) fn name(&self) -> Option<String> {
        let certificate = self.view.status.servers.first()?.certificates.first()?;
        certificate.facts.names.iter().find(|name| !name.starts_with("*.")).cloned()
    }

    /// When [`Keeper::tick`] has something to do; `None`: never.
    pub(super) fn next(&self) -> Option<Instant> {
        (!self.store.is_empty()).then(|| self.next_poll.min(self.next_keys).min(self.next_notice))
    }

    /// Does what is due. True when the shards need the set anew.
    pub(super) fn tick(&mut self, now: Instant, unix_time_s: u64) -> bool {
        if self.store.is_empty() {
            return false;
        }
        let mut changed = false;
        if now >= self.next_keys {
            self.next_keys = now + KEY_AGE;
            if self.store.has_servers() {
                match self.store.rotate() {
                    Ok(()) => {
                        log::debug!(target: TARGET, "session tickets have a new key");
                        changed = true;
                    }
                    Err(error) => log::error!(target: TARGET, "session tickets keep their key: {error}"),
                }
            }
        }
        if now >= self.next_notice {
            self.next_notice = now + NOTICE;
            for warning in self.view.status.expiries(unix_time_s) {
                log::warn!(target: TARGET, "{warning}");
            }
        }
        if now >= self.next_poll {
            self.next_poll = now + POLL;
            if let Some(news) = self.store.poll() {
                changed |= self.take(&news, unix_time_s);
            }
        }
        if changed {
            Arc::make_mut(&mut self.view).status.epoch = self.store.set().epoch;
        }
        changed
    }

    /// Reads everything again. True when the shards need the set anew.
    pub(super) fn reload(&mut self, unix_time_s: u64) -> bool {
        if self.store.is_empty() {
            log::info!(target: TARGET, "nothing to read again: neither a listener nor an upstream speaks TLS");
            return false;
        }
        let news = self.store.reread(true);
        if news == Reread::default() {
            log::info!(target: TARGET, "certificates and keys read again: nothing has changed");
        }
        self.take(&news, unix_time_s)
    }

    fn take(&mut self, news: &Reread, unix_time_s: u64) -> bool {
        let view = Arc::make_mut(&mut self.view);
        view.status = self.store.status();
        view.last_reload_unix_s = Some(unix_time_s);
        for error in &news.failed {
            log::error!(target: TARGET, "what was read before stays in use: {error}");
            view.last_error = Some((unix_time_s, error.clone()));
        }
        if news.failed.is_empty() {
            view.reloads += 1;
        } else {
            view.reload_failures += 1;
        }
        if news.changed.is_empty() {
            return false;
        }
        for change in &news.changed {
            log::info!(target: TARGET, "new connections from now on: {change}");
        }
        for warning in view.status.warnings(unix_time_s) {
            log::warn!(target: TARGET, "{warning}");
        }
        true
    }

    /// Tells of TLS that failed with a client or with the upstream `url`.
    pub(super) fn peer_failed(&mut self, failure: &TlsFailure, url: Option<&str>, unix_time_s: u64) {
        let peer = failure.peer.map(|peer| peer.to_string());
        let (peer, error) = (peer.as_deref(), &failure.error);
        // The peer is no part of the text, so that lines which are otherwise alike are held back when there are many.
        match failure.upstream {
            None => log::info!(target: TARGET, peer = peer; "TLS with a client failed: {error}"),
            Some(index) => {
                log::warn!(target: TARGET, peer = peer; "TLS with upstream {} failed: {error}", url.unwrap_or("?"));
                let view = Arc::make_mut(&mut self.view);
                if let Some(last) = view.upstream_errors.get_mut(index) {
                    *last = Some((unix_time_s, error.clone()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::load::tests::{load_with, machine};
    use crate::tls::tests::{Authority, Folder};

    /// Of a listener with a certificate that is valid until 2100, and a backend.
    fn keeper(folder: &Folder, authority: &Authority, now: Instant) -> Keeper {
        let issued = authority.issue(&["*.a.example", "a.example"]);
        let pair = folder.pair("a", &issued.pem, &issued.key_pem);
        let (certificate, key) = (pair.certificate.display().to_string(), pair.key.display().to_string());
        let authorities = folder.write("ca.pem", &authority.pem).display().to_string();
        let flags = [
            ("listen-tls", "127.0.0.1:443"),
            ("tls-cert", certificate.as_str()),
            ("tls-key", key.as_str()),
            ("upstream", "http://plain https://model"),
            ("upstream-ca", authorities.as_str()),
        ];
        let plan = Plan::new(&load_with(&flags, &[], "").unwrap(), &machine(), 1, 1);
        Keeper::new(Store::load(&plan.tls).unwrap(), &plan, now, 0)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn files_are_looked_at_every_two_seconds_and_read_when_they_have_settled() {
        let (folder, authority, begin) = (Folder::new(), Authority::new("authority"), crate::clock::now());
        let mut keeper = keeper(&folder, &authority, begin);
        assert_eq!(keeper.name().as_deref(), Some("a.example"));
        assert_eq!(keeper.next(), Some(begin + POLL));
        let issued = authority.issue(&["b.example"]);
        folder.pair("a", &issued.pem, &issued.key_pem);
        assert!(!keeper.tick(begin + SECOND, 10), "not yet looked at");
        assert!(!keeper.tick(begin + POLL, 11), "seen for the first time");
        assert!(keeper.tick(begin + 2 * POLL, 12));
        let view = keeper.view();
        assert_eq!((view.status.epoch, view.reloads, view.reload_failures), (2, 1, 0));
        assert_eq!((view.last_reload_unix_s, &view.last_error), (Some(12), &None));
        assert_eq!(view.status.servers[0].certificates[0].facts.title(), "b.example");
        assert_eq!(keeper.set().epoch, 2);

        folder.write("a.key", "nonsense");
        assert!(!keeper.tick(begin + 3 * POLL, 13) && !keeper.tick(begin + 4 * POLL, 14));
        let view = keeper.view();
        assert_eq!((view.status.epoch, view.reloads, view.reload_failures), (2, 1, 1));
        assert_eq!(view.status.errors.len(), 1);
        let (when, error) = view.last_error.clone().unwrap();
        assert!(when == 14 && error.contains("a.key: no private key"), "{error}");

        // On a signal all is read, changed or not.
        folder.write("a.key", &issued.key_pem);
        assert!(!keeper.reload(15), "it is what is in use");
        let view = keeper.view();
        assert_eq!((view.reloads, view.reload_failures, view.status.errors.len()), (2, 1, 0));
        assert!(view.last_error.is_some(), "the last one is remembered");
    }

    #[test]
    fn tickets_have_new_keys_every_six_hours() {
        let (folder, authority, begin) = (Folder::new(), Authority::new("authority"), crate::clock::now());
        let mut keeper = keeper(&folder, &authority, begin);
        let before = keeper.set();
        assert!(!keeper.tick(begin + KEY_AGE - SECOND, 0));
        assert!(keeper.tick(begin + KEY_AGE, 0));
        let set = keeper.set();
        assert_eq!((set.epoch, keeper.view().status.epoch), (2, 2));
        assert!(!Arc::ptr_eq(&before.servers[0].ticketer, &set.servers[0].ticketer));
        assert_eq!(keeper.view().reloads, 0);
        assert!(!keeper.tick(begin + 2 * KEY_AGE - SECOND, 0));
        assert!(keeper.tick(begin + 2 * KEY_AGE, 0));
    }

    #[test]
    fn what_failed_with_a_backend_is_remembered_and_what_failed_with_a_client_is_not() {
        let (folder, authority) = (Folder::new(), Authority::new("authority"));
        let mut keeper = keeper(&folder, &authority, crate::clock::now());
        let failure = |upstream| TlsFailure { upstream, peer: None, error: "it has expired".to_owned() };
        keeper.peer_failed(&failure(None), None, 6);
        assert_eq!(keeper.view().upstream_errors, [None, None]);
        keeper.peer_failed(&failure(Some(1)), Some("https://model"), 7);
        assert_eq!(keeper.view().upstream_errors, [None, Some((7, "it has expired".to_owned()))]);
    }

    #[test]
    fn without_tls_nothing_is_ever_due() {
        let now = crate::clock::now();
        let plan = Plan::new(&load_with(&[], &[], "").unwrap(), &machine(), 1, 1);
        let mut keeper = Keeper::new(Store::load(&plan.tls).unwrap(), &plan, now, 0);
        assert_eq!((keeper.next(), keeper.name()), (None, None));
        assert!(!keeper.tick(now + 10 * KEY_AGE, 0) && !keeper.reload(0));
    }
}
