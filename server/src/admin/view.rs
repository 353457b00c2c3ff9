//! What the control thread hands to the admin pages: the shards' snapshots of one round and its own state.

use crate::settings::plan::Plan;
use crate::tls::status::{ServerStatus, Status};
use shard::settings::UpstreamSet;
use shard::stats::Snapshot;
use std::net::SocketAddr;
use std::sync::Arc;

/// One instant of the process.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) stage: Stage,
    pub(crate) shards: Vec<ShardState>,
    pub(crate) upstreams: Arc<UpstreamSet>,
    /// Failed look-ups since the start, per upstream.
    pub(crate) resolve_failures: Vec<u64>,
    pub(crate) log_lines_dropped: u64,
    pub(crate) tls: Arc<TlsView>,
    pub(crate) fixed: Arc<Fixed>,
}

/// What is known of TLS.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsView {
    pub(crate) status: Status,
    /// Files taken anew since the start, and attempts of which some part failed.
    pub(crate) reloads: u64,
    pub(crate) reload_failures: u64,
    /// Seconds since 1970 of the last of either.
    pub(crate) last_reload_unix_s: Option<u64>,
    /// The last reason for which a file was not taken, though it may have been taken since.
    pub(crate) last_error: Option<(u64, String)>,
    /// The last failure with each upstream, and when, seconds since 1970.
    pub(crate) upstream_errors: Vec<Option<(u64, String)>>,
}

/// What does not change while the process runs.
#[derive(Debug)]
pub(crate) struct Fixed {
    pub(crate) plan: Plan,
    /// As bound: port 0 replaced by the port taken.
    pub(crate) listening: Vec<SocketAddr>,
}

/// Where the process stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    Serving,
    Draining,
    Stopping,
}

impl Stage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Stage::Serving => "serving",
            Stage::Draining => "draining",
            Stage::Stopping => "stopping",
        }
    }
}

/// What is known of one shard.
#[derive(Clone, Debug)]
pub(crate) enum ShardState {
    Answered(Box<Snapshot>),
    /// It did not answer in time.
    Silent,
    /// It drained, stopped or failed, and is gone.
    Gone,
}

impl View {
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.shards.iter().filter_map(|shard| match shard {
            ShardState::Answered(snapshot) => Some(&**snapshot),
            ShardState::Silent | ShardState::Gone => None,
        })
    }

    /// The addresses that speak TLS, and what is shown there.
    pub(crate) fn tls_listeners(&self) -> impl Iterator<Item = (SocketAddr, &ServerStatus)> {
        let listeners = self.fixed.listening.iter().zip(&self.fixed.plan.settings.listeners);
        listeners
            .filter_map(|(&address, listener)| Some((address, self.tls.status.servers.get(listener.tls?)?)))
    }

    /// Why no new client should be sent here: a stable word and a sentence. `None`: ready.
    pub(crate) fn unready(&self) -> Option<(&'static str, String)> {
        if self.stage != Stage::Serving {
            return Some((self.stage.name(), "The server is shutting down.".to_owned()));
        }
        let upstreams = &self.upstreams.upstreams;
        if !upstreams.is_empty() && upstreams.iter().all(|upstream| upstream.addresses.is_empty()) {
            return Some(("no_upstream", "No upstream's name could be resolved.".to_owned()));
        }
        let silent: Vec<_> = (0..self.shards.len())
            .filter(|&shard| !matches!(self.shards[shard], ShardState::Answered(_)))
            .map(|shard| shard.to_string())
            .collect();
        if !silent.is_empty() {
            return Some(("shard_silent", format!("No answer from shard {}.", silent.join(", "))));
        }
        let failing = self.snapshots().find_map(|snapshot| snapshot.journal.as_ref()?.failing.as_ref());
        if let Some(reason) = failing {
            return Some(("disk_failed", format!("Durable streams cannot be written: {reason}.")));
        }
        let failing =
            self.snapshots().find_map(|snapshot| snapshot.stream_journal.as_ref()?.failing.as_ref());
        if let Some(reason) = failing {
            let text = format!("Relayed streams cannot be written, and go on without: {reason}.");
            return Some(("disk_failed", text));
        }
        None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::settings::load::tests::{load_with, machine};
    use crate::tls::Store;
    use crate::tls::tests::{Authority, Folder};
    use protocol::durable::journal::JournalState;
    use protocol::phase::Phase;
    use shard::settings::Upstream;
    use shard::stats::{SlowConnection, Stats, UpstreamSnapshot};

    pub(crate) fn view() -> View {
        let effective = load_with(&[("upstream", "http://ab:1"), ("shards", "2")], &[], "").unwrap();
        let plan = Plan::new(&effective, &machine(), 1_700_000_000, 1);
        let listening = plan.listen.clone();
        let upstream = Upstream {
            url: "http://ab:1".to_owned(),
            authority: "ab:1".to_owned(),
            base_path: String::new(),
            addresses: vec![([10, 0, 0, 1], 1).into()],
            tls: None,
        };
        View {
            stage: Stage::Serving,
            shards: (0..2).map(|shard| ShardState::Answered(Box::new(snapshot(shard)))).collect(),
            upstreams: Arc::new(UpstreamSet { epoch: 1, upstreams: vec![upstream] }),
            resolve_failures: vec![3],
            log_lines_dropped: 4,
            tls: Arc::default(),
            fixed: Arc::new(Fixed { plan, listening }),
        }
    }

    /// One plain listener and one with two certificates; a backend that is verified and one that is not.
    pub(crate) fn tls_view() -> View {
        let folder = Folder::new();
        let authority = Authority::new("authority of a test");
        folder.write("ca.pem", &authority.pem);
        for name in ["a", "b", "client"] {
            let issued = authority.issue(&[&format!("{name}.example")]);
            folder.pair(name, &issued.pem, &issued.key_pem);
        }
        let text = "[[listener]]\naddress = \"127.0.0.1:80\"\n\
                    [[listener]]\naddress = \"127.0.0.1:443\"\ncert = [\"DIR/a.pem\", \"DIR/b.pem\"]\n\
                    key = [\"DIR/a.key\", \"DIR/b.key\"]\nclient_ca = \"DIR/ca.pem\"\n\
                    [[upstream]]\nurl = \"https://model\"\nca = \"DIR/ca.pem\"\ncert = \"DIR/client.pem\"\nkey = \"DIR/client.key\"\n\
                    [[upstream]]\nurl = \"https://open\"\ntls_insecure = true\n";
        let effective =
            load_with(&[], &[], &text.replace("DIR", &folder.path().display().to_string())).unwrap();
        let plan = Plan::new(&effective, &machine(), 1_700_000_000, 1);
        let store = Store::load(&plan.tls).unwrap();
        let upstreams = crate::control::resolve::initial(&plan.upstreams, &plan.upstream_tls);
        let mut status = store.status();
        status.errors = vec!["a.pem: there is no such file".to_owned()];
        let tls = TlsView {
            status,
            reloads: 3,
            reload_failures: 2,
            last_reload_unix_s: Some(1_700_000_050),
            last_error: Some((1_700_000_040, "a.pem: there is no such file".to_owned())),
            upstream_errors: vec![Some((1_700_000_030, "it has expired".to_owned())), None],
        };
        let listening = plan.listen.clone();
        View {
            upstreams: Arc::new(upstreams),
            tls: Arc::new(tls),
            fixed: Arc::new(Fixed { plan, listening }),
            ..view()
        }
    }

    pub(crate) fn snapshot(shard: usize) -> Snapshot {
        let mut stats = Stats::default();
        stats.counters.accepts = 7;
        stats.ends[0] = 5;
        stats.refusals[0] = 2;
        for us in [900, 1_100, 250_000, 20_000_000] {
            stats.histograms.first_token_us.record(us).unwrap();
        }
        let mut phases = [0; Phase::COUNT];
        phases[Phase::Head as usize] = 1;
        Snapshot {
            shard,
            stats,
            connections: 3,
            handshakes: 0,
            parked: 1,
            upstream_connections: 1,
            phases,
            in_flight_bytes: 10,
            pending_bytes: 20,
            log_bytes: 30,
            tls_bytes: 0,
            overdraft_bytes: 35,
            kept: shard::KeptTotals {
                live: 31,
                over: 32,
                detached: 33,
                readers: 34,
                waiting: 3,
                mirrors: 36,
                bytes: 35,
                stored: 39,
                unstored: 4,
            },
            durable: protocol::durable::Totals { streams: 36, bytes: 37, readers: 38 },
            journal: (shard == 0).then_some(JournalState {
                segments: 2,
                bytes: 61,
                backlog_bytes: 62,
                failing: None,
            }),
            stream_journal: Some(JournalState { segments: 1, bytes: 63, backlog_bytes: 64, failing: None }),
            buffers_free: 40,
            ring_refusals: [3, 1],
            timers: 50,
            draining: false,
            upstreams: vec![UpstreamSnapshot { active: 1, idle: 2, failures: 0 }],
            slowest: vec![SlowConnection {
                peer: Some(([127, 0, 0, 1], 5000).into()),
                pending_bytes: 100 * (shard as u64 + 1),
                in_flight_bytes: 10,
                phase: Phase::Paused,
                age_ms: 1000,
            }],
        }
    }

    #[test]
    fn readiness_has_reasons() {
        assert_eq!(view().unready(), None);
        let reason = |change: &dyn Fn(&mut View)| {
            let mut view = view();
            change(&mut view);
            view.unready().map(|(word, _)| word)
        };
        assert_eq!(reason(&|view| view.stage = Stage::Draining), Some("draining"));
        assert_eq!(reason(&|view| view.stage = Stage::Stopping), Some("stopping"));
        assert_eq!(reason(&|view| view.shards[1] = ShardState::Silent), Some("shard_silent"));
        assert_eq!(
            reason(&|view| Arc::make_mut(&mut view.upstreams).upstreams[0].addresses.clear()),
            Some("no_upstream")
        );
        let fail = |view: &mut View| {
            let ShardState::Answered(snapshot) = &mut view.shards[0] else { return };
            snapshot.journal.as_mut().unwrap().failing =
                Some("1.segment: No space left on device".to_owned());
        };
        assert_eq!(reason(&fail), Some("disk_failed"));
        let fail = |view: &mut View| {
            let ShardState::Answered(snapshot) = &mut view.shards[1] else { return };
            snapshot.stream_journal.as_mut().unwrap().failing = Some("1.segment: EIO".to_owned());
        };
        assert_eq!(reason(&fail), Some("disk_failed"));
        // The demo model needs no upstream.
        assert_eq!(reason(&|view| Arc::make_mut(&mut view.upstreams).upstreams.clear()), None);
    }
}
