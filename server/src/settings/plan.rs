//! Turns the effective configuration into what the shards and the control thread are given.

use super::Machine;
use super::address::{AdminAddress, UpstreamUrl};
use super::load::{Effective, RouteValues, Source, Values};
use super::table;
use super::tls::{ClientFiles, ServerFiles};
use protocol::demo::DemoSettings;
use protocol::durable;
use protocol::http::HeadLimits;
use protocol::phase::Deadlines;
use shard::memory::WorstCase;
use shard::settings::{
    HalfClose, LeaveChoices, Listener, OnLeave, Resume, Route, Settings, Sleep, SlowReader, UpstreamTls,
};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What `serve` carries out.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) settings: Settings,
    pub(crate) upstreams: Vec<UpstreamUrl>,
    /// Of each of them.
    pub(crate) upstream_tls: Vec<Option<UpstreamTls>>,
    /// The files that `settings.listeners` and `upstream_tls` stand for.
    pub(crate) tls: TlsPlan,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) admin: AdminAddress,
    /// One per shard: the CPU it is pinned to.
    pub(crate) cpus: Vec<Option<usize>>,
    pub(crate) drain_deadline_ms: u64,
    /// Where durable streams are written.
    pub(crate) data_dir: Option<PathBuf>,
}

/// What is to be read for TLS. Listeners and backends of which the same is said share one entry.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct TlsPlan {
    /// By `Listener::tls`.
    pub(crate) servers: Vec<ServerFiles>,
    /// By `UpstreamTls::config`.
    pub(crate) clients: Vec<ClientFiles>,
}

impl Plan {
    pub(crate) fn new(
        effective: &Effective,
        machine: &Machine,
        unix_time_at_start_s: u64,
        seed: u64,
    ) -> Self {
        let values = &effective.values;
        let mut tls = TlsPlan::default();
        let listeners = effective.listeners.iter().map(|listener| {
            let files = listener.tls.as_ref().map(ServerFiles::of);
            Listener { tls: files.map(|files| entry(&mut tls.servers, files)) }
        });
        let listeners = listeners.collect();
        let upstream_tls =
            effective.upstreams.iter().zip(&effective.upstream_tls).map(|(url, tls_values)| {
                let values = tls_values.as_ref()?;
                let config = entry(&mut tls.clients, ClientFiles::of(&values.values));
                Some(UpstreamTls { config, name: values.name(url) })
            });
        let upstream_tls = upstream_tls.collect();
        let cpus = placement(values, machine);
        let settings = Settings {
            connections_max: narrow(values.integer(&table::CONNS_MAX)),
            listeners,
            tls_handshake_ms: narrow(values.integer(&table::TLS_HANDSHAKE_MS)),
            tls_handshakes_max: narrow(values.integer(&table::TLS_HANDSHAKES_MAX)),
            backlog: narrow(values.integer(&table::BACKLOG)),
            ring_depth: narrow(values.integer(&table::RING_DEPTH)),
            buffers: narrow(values.integer(&table::BUFFERS)),
            buffer_bytes: narrow(values.integer(&table::BUFFER_SIZE)),
            notsent_lowat_bytes: narrow(values.integer(&table::NOTSENT_LOWAT)),
            spin_us: narrow(values.integer(&table::SPIN_US)),
            preempt_ms: narrow(values.integer(&table::PREEMPT_MS)),
            sleep: if values.choice(&table::SLEEP) == "reactor" { Sleep::Reactor } else { Sleep::Ring },
            head: HeadLimits {
                head_bytes: narrow(values.integer(&table::HEAD_BYTES_MAX)),
                headers: narrow(values.integer(&table::HEADERS_MAX)),
                target_bytes: narrow(values.integer(&table::TARGET_BYTES_MAX)),
            },
            body_bytes_max: values.integer(&table::BODY_BYTES_MAX),
            event_bytes_max: narrow(values.integer(&table::EVENT_BYTES_MAX)),
            lag_high_bytes: values.integer(&table::LAG_HIGH),
            lag_low_bytes: values.integer(&table::LAG_LOW),
            retry_bytes_max: values.integer(&table::RETRY_BYTES_MAX),
            overdraft_bytes_max: values.integer(&table::OVERDRAFT_BYTES_MAX),
            pool_idle_max: narrow(values.integer(&table::POOL_IDLE_MAX)),
            pool_idle_ms: narrow(values.integer(&table::POOL_IDLE_MS)),
            pool_age_ms: narrow(values.integer(&table::POOL_AGE_MS)),
            routes: effective.routes.iter().map(route).collect(),
            resume_bytes_max: values.integer(&table::RESUME_BYTES_MAX),
            detached_max: narrow(values.integer(&table::DETACHED_MAX)),
            mirror_readers: narrow(values.integer(&table::MIRROR_READERS)),
            resumes_per_s: narrow(values.integer(&table::RESUMES_PER_S)),
            background_keep_ms: narrow(values.integer(&table::BACKGROUND_KEEP_MS)),
            background_window_bytes: values.integer(&table::BACKGROUND_WINDOW),
            stream_key: [0; 32],
            stream_number_first: 1,
            durable: durable::Settings {
                prefix: values.prefix(&table::DURABLE_PREFIX).map(str::to_owned),
                body_bytes_max: values.integer(&table::DURABLE_BODY_BYTES_MAX),
                stream_bytes_max: values.integer(&table::DURABLE_STREAM_BYTES_MAX),
                retention_ms: values.integer(&table::DURABLE_RETENTION_MS),
                // Whatever fits into a stream must fit into any share.
                store_bytes_max: (values.integer(&table::DURABLE_STORE_BYTES_MAX) / cpus.len() as u64)
                    .max(values.integer(&table::DURABLE_STREAM_BYTES_MAX)),
                long_poll_ms: narrow(values.integer(&table::DURABLE_LONG_POLL_MS)),
                events_ms: narrow(values.integer(&table::DURABLE_EVENTS_MS)),
                cors: values.switch(&table::DURABLE_CORS),
                on_disk: values.file(&table::DATA_DIR).is_some(),
                fsync_interval_ms: narrow(values.integer(&table::FSYNC_INTERVAL)),
                ..durable::Settings::default()
            },
            demo: DemoSettings {
                tokens_per_s: narrow(values.integer(&table::DEMO_TOKENS_PER_S)),
                first_token_ms: narrow(values.integer(&table::DEMO_FIRST_TOKEN_MS)),
                tokens: narrow(values.integer(&table::DEMO_TOKENS)),
            },
            unix_time_at_start_s,
            unix_time_at_start_ms: 0,
            seed,
            records: values.switch(&table::ACCESS_LOG),
        };
        Plan {
            settings,
            upstreams: effective.upstreams.clone(),
            upstream_tls,
            tls,
            listen: effective.listeners.iter().map(|listener| listener.address).collect(),
            admin: values.admin(&table::ADMIN).clone(),
            cpus,
            drain_deadline_ms: values.integer(&table::DRAIN_DEADLINE_MS),
            data_dir: values.file(&table::DATA_DIR).map(Path::to_owned),
        }
    }
}

impl Plan {
    /// The most memory that the process can come to hold.
    pub(crate) fn worst_case(&self) -> WorstCase {
        let tls_upstreams = self.upstream_tls.iter().any(Option::is_some);
        WorstCase::of(&self.settings, self.cpus.len(), self.upstreams.len(), tls_upstreams)
    }
}

/// The place of `files` among `all`, where they are put if they are not there.
fn entry<T: PartialEq>(all: &mut Vec<T>, files: T) -> usize {
    all.iter().position(|known| *known == files).unwrap_or_else(|| {
        all.push(files);
        all.len() - 1
    })
}

/// Pins shards to the CPUs the operator chose; without a choice, only when every CPU gets exactly one shard, since
/// several processes that all pinned their few shards would pile up on the first CPUs.
fn placement(values: &Values, machine: &Machine) -> Vec<Option<usize>> {
    let shards: usize = narrow(values.integer(&table::SHARDS));
    let chosen = values.cpus(&table::CPUS);
    let cpus = if *values.source(&table::CPUS) != Source::Default && !chosen.is_empty() {
        chosen
    } else if shards == machine.cpus.len() {
        machine.cpus.as_slice()
    } else {
        &[]
    };
    (0..shards).map(|shard| cpus.get(shard).copied()).collect()
}

fn route(route: &RouteValues) -> Route {
    let values = &route.values;
    let ms = |setting| narrow(values.integer(setting));
    Route {
        name: route.name.clone(),
        path_prefix: route.path.clone(),
        upstreams: route.upstreams.clone(),
        deadlines: Deadlines {
            head_ms: ms(&table::HEAD_MS),
            body_ms: ms(&table::BODY_MS),
            connect_ms: ms(&table::CONNECT_MS),
            upstream_head_ms: ms(&table::UPSTREAM_HEAD_MS),
            first_token_ms: ms(&table::FIRST_TOKEN_MS),
            between_tokens_ms: ms(&table::BETWEEN_TOKENS_MS),
            total_ms: ms(&table::TOTAL_MS),
            write_stall_ms: ms(&table::WRITE_STALL_MS),
            keep_alive_ms: ms(&table::KEEP_ALIVE_MS),
            finish_ms: ms(&table::FINISH_MS),
        },
        heartbeat_ms: ms(&table::HEARTBEAT_MS),
        commit_ms: ms(&table::COMMIT_MS),
        half_close: if values.choice(&table::HALF_CLOSE) == "serve" {
            HalfClose::Serve
        } else {
            HalfClose::Leave
        },
        event_ids: values.switch(&table::EVENT_IDS),
        cors: values.cors(&table::CORS).clone(),
        resume: resume(values),
    }
}

/// Without ids nobody could say where to go on.
fn resume(values: &Values) -> Option<Resume> {
    let window_bytes = values.integer(&table::RESUME_WINDOW);
    let on_leave = match values.choice(&table::ON_LEAVE) {
        "cancel" => OnLeave::Cancel,
        "finish" => OnLeave::Finish,
        _ => OnLeave::Detach(narrow(values.integer(&table::DETACH_MS))),
    };
    let slow_reader = match values.choice(&table::SLOW_READER) {
        "block" => SlowReader::Block,
        "drop" => SlowReader::Drop,
        "skip" => SlowReader::Skip,
        _ => SlowReader::Auto,
    };
    let (own, most) = (values.choice(&table::ON_LEAVE), values.choice(&table::ON_LEAVE_MAX));
    let most = if most == "own" { own } else { most };
    let detach_ms: u32 = narrow(values.integer(&table::DETACH_MS));
    let detach_ms_max = match narrow(values.integer(&table::DETACH_MS_MAX)) {
        0 => detach_ms,
        longest => longest,
    };
    let leave_choices = LeaveChoices {
        cancel: most != "off",
        detach_ms,
        detach_ms_max: if matches!(most, "detach" | "finish") { detach_ms_max } else { 0 },
        finish: most == "finish",
    };
    let keep_ms = narrow(values.integer(&table::KEEP_MS));
    let window_ms = narrow(values.integer(&table::RESUME_WINDOW_MS));
    let reader_lag_ms = narrow(values.integer(&table::READER_LAG_MS));
    let on = window_bytes > 0 && values.switch(&table::EVENT_IDS);
    let durable = values.switch(&table::DURABLE);
    on.then_some(Resume {
        window_bytes,
        window_ms,
        on_leave,
        leave_choices,
        keep_ms,
        slow_reader,
        reader_lag_ms,
        durable,
    })
}

/// The table's ranges fit the types they go to; a mistake there is ours.
fn narrow<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number)
        .unwrap_or_else(|_| unreachable!("{number} is in its setting's range and must fit its type"))
}

#[cfg(test)]
mod tests {
    use super::super::load::tests::{load_with, machine};
    use super::super::table::ALL;
    use super::super::value::Kind;
    use super::*;

    #[test]
    fn defaults_are_those_of_the_data_plane() {
        let plan = Plan::new(&load_with(&[], &[], "").unwrap(), &machine(), 1, 2);
        assert_eq!(plan.settings.routes.len(), 1);
        assert_eq!(plan.settings.routes[0].deadlines, Deadlines::default());
        assert_eq!(plan.settings.lag_high_bytes, protocol::limits::LAG_HIGH_BYTES);
        assert_eq!(plan.cpus, [Some(0), Some(1), Some(2), Some(3)]);
    }

    #[test]
    fn listeners_and_upstreams_share_what_is_said_alike() {
        let text = "tls_cert = \"a\"\ntls_key = \"k\"\nlisten_tls = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\nlisten = \"127.0.0.1:3\"\n\
                    [[listener]]\naddress = \"127.0.0.1:4\"\nclient_ca = \"c\"\n\
                    [[upstream]]\nurl = \"https://a\"\n[[upstream]]\nurl = \"http://b\"\n\
                    [[upstream]]\nurl = \"https://10.0.0.1\"\nserver_name = \"C.example.\"\n\
                    [[upstream]]\nurl = \"https://d\"\nca = \"ca\"\n";
        let plan = Plan::new(&load_with(&[], &[], text).unwrap(), &machine(), 1, 2);
        let listeners: Vec<_> = plan.settings.listeners.iter().map(|listener| listener.tls).collect();
        assert_eq!(listeners, [None, Some(0), Some(0), Some(1)]);
        assert_eq!(plan.listen.iter().map(|address| address.port()).collect::<Vec<_>>(), [3, 1, 2, 4]);
        let auth: Vec<_> = plan.tls.servers.iter().map(|files| files.client_auth.name()).collect();
        assert_eq!(auth, ["off", "required"]);
        let upstreams: Vec<_> = plan
            .upstream_tls
            .iter()
            .map(|tls| tls.as_ref().map(|tls| (tls.config, tls.name.to_str().into_owned())))
            .collect();
        let tls = |config, name: &str| Some((config, name.to_owned()));
        assert_eq!(upstreams, [tls(0, "a"), None, tls(0, "c.example"), tls(1, "d")]);
        // Of a server with defaults alone nothing is to be read.
        assert_eq!(Plan::new(&load_with(&[], &[], "").unwrap(), &machine(), 1, 2).tls, TlsPlan::default());
    }

    #[test]
    fn shards_are_pinned_by_choice_or_when_they_fill_the_machine() {
        let plan = |flags: &[(&'static str, &str)]| {
            Plan::new(&load_with(flags, &[], "").unwrap(), &machine(), 1, 2).cpus
        };
        assert_eq!(plan(&[("shards", "2")]), [None, None]);
        assert_eq!(plan(&[("cpus", "3,1")]), [Some(3), Some(1)]);
        assert_eq!(plan(&[("cpus", "3,1"), ("shards", "1")]), [Some(3)]);
    }

    #[test]
    fn every_range_fits_its_type() {
        for bound in [0, 1] {
            for setting in ALL {
                let Kind::Integer { minimum, maximum, .. } = setting.kind else { continue };
                let number = if bound == 0 { minimum } else { maximum };
                let mut effective = load_with(&[], &[], "").unwrap();
                effective.values.set(setting, number);
                for route in &mut effective.routes {
                    route.values.set(setting, number);
                }
                Plan::new(&effective, &machine(), 1, 2);
            }
        }
    }
}
