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
