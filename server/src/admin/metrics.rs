//! /metrics: a view written in Prometheus' text format (version 0.0.4).

use super::families::{self, Family, Kind};
use super::process::Process;
use super::view::{ShardState, View};
use hdrhistogram::Histogram;
use protocol::http::Refusal;
use protocol::phase::{End, Phase};
use shard::stats::{Snapshot, UpstreamSnapshot};
use std::collections::BTreeMap;
use std::fmt::Write;

pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The whole page.
pub(crate) fn page(view: &View, process: &Process) -> String {
    let mut page = Page(String::with_capacity(16 * 1024));
    let start = view.fixed.plan.settings.unix_time_at_start_s;
    page.one(&families::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1);
    page.one(&families::READY, &[], u64::from(view.unready().is_none()));
    page.head_of(&families::SHARD_UP);
    for (shard, state) in view.shards.iter().enumerate() {
        let up = u64::from(matches!(state, ShardState::Answered(_)));
        page.sample(&families::SHARD_UP, &[&shard.to_string()], up);
    }
    let all = Phase::ALL.iter().map(|phase| phase.name()).enumerate();
    page.by_word(&families::STREAMS, view, all, |snapshot, index| snapshot.phases.get(index));
    let all = End::ALL.iter().map(|end| end.name()).enumerate();
    page.by_word(&families::ENDS, view, all, |snapshot, index| snapshot.stats.ends.get(index));
    let all = Refusal::ALL.iter().map(|refusal| refusal.reason()).enumerate();
    page.by_word(&families::REFUSALS, view, all, |snapshot, index| snapshot.stats.refusals.get(index));

    page.histogram(&families::FIRST_TOKEN, view, |snapshot| &snapshot.stats.histograms.first_token_us);
    page.histogram(&families::BETWEEN_TOKENS, view, |snapshot| &snapshot.stats.histograms.between_tokens_us);
    page.histogram(&families::RELAY, view, |snapshot| &snapshot.stats.histograms.relay_us);
    page.histogram(&families::READER_PENDING, view, |snapshot| {
        &snapshot.stats.histograms.reader_pending_bytes
    });
    page.histogram(&families::DURATION, view, |snapshot| &snapshot.stats.histograms.stream_us);
    page.histogram(&families::TURN, view, |snapshot| &snapshot.stats.histograms.turn_us);

    page.per_shard(&families::CONNECTIONS, view, |snapshot| snapshot.connections as u64);
    page.per_shard(&families::PARKED, view, |snapshot| snapshot.parked as u64);
    let connections_max = view.fixed.plan.settings.connections_max as u64;
    page.per_shard(&families::CONNECTIONS_MAX, view, |_| connections_max);
    page.per_shard(&families::UPSTREAM_CONNECTIONS, view, |snapshot| snapshot.upstream_connections as u64);
    page.per_shard(&families::IN_FLIGHT, view, |snapshot| snapshot.in_flight_bytes);
    page.per_shard(&families::PENDING, view, |snapshot| snapshot.pending_bytes);
    page.per_shard(&families::TLS_BYTES, view, |snapshot| snapshot.tls_bytes);
    page.per_shard(&families::LOG_BYTES, view, |snapshot| snapshot.log_bytes);
    page.per_shard(&families::OVERDRAFT, view, |snapshot| snapshot.overdraft_bytes);
    let overdraft_max = view.fixed.plan.settings.overdraft_bytes_max;
    page.per_shard(&families::OVERDRAFT_MAX, view, |_| overdraft_max);
    page.one(&families::MEMORY_MAX, &[], view.fixed.plan.worst_case().total());
    page.per_shard(&families::LIVE, view, |snapshot| snapshot.kept.live as u64);
    page.per_shard(&families::OVER, view, |snapshot| snapshot.kept.over as u64);
    page.per_shard(&families::KEPT_BYTES, view, |snapshot| snapshot.kept.bytes);
    let kept_max = view.fixed.plan.settings.resume_bytes_max;
    page.per_shard(&families::KEPT_BYTES_MAX, view, |_| kept_max);
    page.per_shard(&families::DETACHED, view, |snapshot| snapshot.kept.detached as u64);
    page.per_shard(&families::STREAM_READERS, view, |snapshot| snapshot.kept.readers as u64);
    page.per_shard(&families::MIRRORS, view, |snapshot| snapshot.kept.mirrors as u64);
    page.per_shard(&families::STREAM_READERS_WAITING, view, |snapshot| snapshot.kept.waiting as u64);
    page.per_shard(&families::STORED, view, |snapshot| snapshot.kept.stored as u64);
    page.per_shard(&families::UNSTORED, view, |snapshot| snapshot.kept.unstored as u64);
    let journal = |snapshot: &Snapshot| snapshot.stream_journal.clone().unwrap_or_default();
    page.per_shard(&families::STORED_SEGMENTS, view, |snapshot| journal(snapshot).segments as u64);
    page.per_shard(&families::STORED_DISK_BYTES, view, |snapshot| journal(snapshot).bytes);
    page.per_shard(&families::STORED_BACKLOG, view, |snapshot| journal(snapshot).backlog_bytes);
    page.per_shard(&families::STORED_FAILING, view, |snapshot| journal(snapshot).failing.is_some().into());
    page.per_shard(&families::DURABLE_STREAMS, view, |snapshot| snapshot.durable.streams as u64);
    page.per_shard(&families::DURABLE_BYTES, view, |snapshot| snapshot.durable.bytes);
    let durable_max = view.fixed.plan.settings.durable.store_bytes_max;
    page.per_shard(&families::DURABLE_BYTES_MAX, view, |_| durable_max);
    page.per_shard(&families::DURABLE_READERS, view, |snapshot| snapshot.durable.readers);
    let journal = |snapshot: &Snapshot| snapshot.journal.clone().unwrap_or_default();
    page.per_shard(&families::DURABLE_SEGMENTS, view, |snapshot| journal(snapshot).segments as u64);
    page.per_shard(&families::DURABLE_DISK_BYTES, view, |snapshot| journal(snapshot).bytes);
    page.per_shard(&families::DURABLE_BACKLOG, view, |snapshot| journal(snapshot).backlog_bytes);
    page.per_shard(&families::DURABLE_FAILING, view, |snapshot| journal(snapshot).failing.is_some().into());
    page.per_shard(&families::BUFFERS_FREE, view, |snapshot| snapshot.buffers_free as u64);
    let all = shard::io::Refusal::ALL.iter().map(|refusal| refusal.name()).enumerate();
    page.by_word(&families::RING_REFUSALS, view, all, |snapshot, index| snapshot.ring_refusals.get(index));
    page.per_shard(&families::TIMERS, view, |snapshot| snapshot.timers as u64);
    page.upstreams(view);
    page.per_shard(&families::TLS_HANDSHAKING, view, |snapshot| snapshot.handshakes as u64);
    page.tls(view);
    page.one(&families::LOG_LINES_DROPPED, &[], view.log_lines_dropped);

    page.one(&families::OPEN_FDS, &[], process.open_descriptors);
    page.one(&families::MAX_FDS, &[], process.max_descriptors);
    page.one(&families::RESIDENT, &[], process.resident_bytes);
    page.one(&families::VIRTUAL, &[], process.virtual_bytes);
    page.one(&families::THREADS, &[], process.threads);
    page.one(&families::CPU, &[], process.cpu_seconds);
    page.one(&families::START_TIME, &[], start);
    page.counters(view);
    page.0
}

struct Page(String);

impl Page {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.write_fmt(text).unwrap_or_else(|_| unreachable!("String takes all"));
        self.0.push('\n');
    }

    fn head_of(&mut self, family: &Family) {
        self.head(family.name, family.help, family.kind.name());
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn sample(&mut self, family: &Family, labels: &[&str], value: impl std::fmt::Display) {
        assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
        let labels = family.labels.iter().copied().zip(labels.iter().copied());
        self.line(format_args!("{}{} {value}", family.name, Labels(labels.collect())));
    }

    fn one(&mut self, family: &Family, labels: &[&str], value: impl std::fmt::Display) {
        self.head_of(family);
        self.sample(family, labels, value);
    }

    fn tls(&mut self, view: &View) {
        let (plan, tls) = (&view.fixed.plan, &view.tls);
        self.one(&families::TLS_EPOCH, &[], tls.status.epoch);
        self.one(&families::TLS_RELOADS, &[], tls.reloads);
        self.one(&families::TLS_RELOAD_FAILURES, &[], tls.reload_failures);
        self.one(&families::TLS_FILES_REFUSED, &[], tls.status.errors.len());
        self.head_of(&families::TLS_EXPIRY);
        for (address, server) in view.tls_listeners() {
            // Two certificates of one name, for two kinds of keys, are one series: the first to expire counts.
            let mut first: BTreeMap<&str, u64> = BTreeMap::new();
            for certificate in &server.certificates {
                let expiry = first.entry(certificate.facts.title()).or_insert(u64::MAX);
                *expiry = certificate.facts.not_after_s.min(*expiry);
            }
            for (name, expiry) in first {
                self.sample(&families::TLS_EXPIRY, &[&address.to_string(), name], expiry);
            }
        }
        let clients = || {
            let upstreams = plan.upstreams.iter().zip(&plan.upstream_tls);
            upstreams
                .filter_map(|(url, upstream)| Some((url, tls.status.clients.get(upstream.as_ref()?.config)?)))
        };
        self.head_of(&families::TLS_CLIENT_EXPIRY);
        for (url, client) in clients() {
            if let Some(certificate) = &client.certificate {
                self.sample(&families::TLS_CLIENT_EXPIRY, &[&url.url], certificate.facts.not_after_s);
            }
        }
        self.head_of(&families::TLS_UNVERIFIED);
        for (url, client) in clients() {
            self.sample(&families::TLS_UNVERIFIED, &[&url.url], u64::from(client.authorities.is_none()));
        }
    }

    fn per_shard(&mut self, family: &Family, view: &View, value: impl Fn(&Snapshot) -> u64) {
        self.head_of(family);
        for snapshot in view.snapshots() {
            self.sample(family, &[&snapshot.shard.to_string()], value(snapshot));
        }
    }

    /// One sample per shard and word of a closed list; all of them, so that rates begin at 0.
    fn by_word<'w>(
        &mut self,
        family: &Family,
        view: &View,
        words: impl Iterator<Item = (usize, &'w str)> + Clone,
        value: impl Fn(&Snapshot, usize) -> Option<&u64>,
    ) {
        self.head_of(family);
        for snapshot in view.snapshots() {
            for (index, word) in words.clone() {
                let value = value(snapshot, index).copied().unwrap_or(0);
                self.sample(family, &[&snapshot.shard.to_string(), word], value);
            }
        }
    }

    fn upstreams(&mut self, view: &View) {
        type Of = fn(&UpstreamSnapshot) -> u64;
        let gauges: [(&Family, Of); 3] = [
            (&families::UPSTREAM_ACTIVE, |upstream| upstream.active),
            (&families::UPSTREAM_IDLE, |upstream| upstream.idle),
            (&families::UPSTREAM_FAILURES, |upstream| upstream.failures),
        ];
        for (family, value) in gauges {
            self.head_of(family);
            for snapshot in view.snapshots() {
                for (upstream, named) in snapshot.upstreams.iter().zip(&view.upstreams.upstreams) {
                    self.sample(family, &[&snapshot.shard.to_string(), &named.url], value(upstream));
                }
            }
        }
        self.head_of(&families::UPSTREAM_ADDRESSES);
        for upstream in &view.upstreams.upstreams {
            self.sample(&families::UPSTREAM_ADDRESSES, &[&upstream.url], upstream.addresses.len());
        }
        self.head_of(&families::RESOLVE_FAILURES);
        for (upstream, failures) in view.upstreams.upstreams.iter().zip(&view.resolve_failures) {
            self.sample(&families::RESOLVE_FAILURES, &[&upstream.url], failures);
        }
    }

    /// One histogram per shard. Values are binned by the middle of what the HDR histogram cannot tell apart.
    fn histogram(&mut self, family: &Family, view: &View, of: impl Fn(&Snapshot) -> &Histogram<u64>) {
        let Kind::Histogram(bounds) = family.kind else { unreachable!("{} is a histogram", family.name) };
        self.head_of(family);
        // Times are recorded in microseconds and told in seconds.
        let scale = if family.name.ends_with("_seconds") { 1e6 } else { 1.0 };
        for snapshot in view.snapshots() {
            let histogram = of(snapshot);
            let mut counts = vec![0u64; bounds.len() + 1];
            let mut sum = 0u128;
            for step in histogram.iter_recorded() {
                let value = histogram.median_equivalent(step.value_iterated_to());
                let bucket = bounds.partition_point(|&bound| bound < value as f64 / scale);
                counts[bucket] += step.count_since_last_iteration();
                sum += u128::from(value) * u128::from(step.count_since_last_iteration());
            }
            let shard = snapshot.shard.to_string();
            let mut cumulative = 0;
            for (index, count) in counts.iter().enumerate() {
                cumulative += count;
                let bound = bounds.get(index).map_or_else(|| "+Inf".to_owned(), f64::to_string);
                let labels = Labels(vec![("shard", &shard), ("le", &bound)]);
                self.line(format_args!("{}_bucket{labels} {cumulative}", family.name));
            }
            let labels = Labels(vec![("shard", &shard)]);
            self.line(format_args!("{}_sum{labels} {}", family.name, sum as f64 / scale));
            self.line(format_args!("{}_count{labels} {cumulative}", family.name));
        }
    }

    /// The shards' plain counters, family by family as the format demands.
    fn counters(&mut self, view: &View) {
        let shards: Vec<_> = view
            .snapshots()
            .map(|snapshot| (snapshot.shard.to_string(), families::counters(&snapshot.stats.counters)))
            .collect();
        let Some((_, first)) = shards.first() else {
            return;
        };
        for (index, (name, help, _)) in first.iter().enumerate() {
            self.head(name, help, "counter");
            for (shard, values) in &shards {
                self.line(format_args!("{name}{} {}", Labels(vec![("shard", shard)]), values[index].2));
            }
        }
    }
}

struct Labels<'a>(Vec<(&'a str, &'a str)>);

impl std::fmt::Display for Labels<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (name, value)) in self.0.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            write!(f, "{open}{name}=\"{value}\"")?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_char('}') }
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::tests::{tls_view, view};
    use super::*;
    use std::collections::{HashMap, HashSet};

    /// A strict reader of the format: every sample belongs to the family announced last, families are not split, values are
    /// numbers, no series comes twice.
    fn parse(page: &str) -> HashMap<String, f64> {
        let mut samples = HashMap::new();
        let mut announced = HashSet::new();
        let (mut family, mut kind) = (String::new(), String::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split_once(' ').expect("help text").0.to_owned();
                assert!(announced.insert(family.clone()), "{family} announced twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, of) = rest.split_once(' ').unwrap();
                assert_eq!(name, family);
                kind = of.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                let base = if kind == "histogram" {
                    ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap()
                } else {
                    name
                };
                assert_eq!(base, family, "{line}");
                assert!(
                    samples.insert(series.to_owned(), value.parse().unwrap()).is_none(),
                    "{series} twice"
                );
            }
        }
        samples
    }

    #[test]
    fn the_page_parses_and_has_every_family() {
        let page = page(&view(), &Process::default());
        let samples = parse(&page);
        assert_eq!(samples["tokenring_accepts_total{shard=\"1\"}"], 7.0);
        assert_eq!(samples["tokenring_stream_ends_total{shard=\"0\",reason=\"done\"}"], 5.0);
        assert_eq!(samples["tokenring_streams{shard=\"0\",phase=\"head\"}"], 1.0);
        assert_eq!(samples["tokenring_upstream_pool_idle{shard=\"0\",upstream=\"http://ab:1\"}"], 2.0);
        assert_eq!(samples["tokenring_resolve_failures_total{upstream=\"http://ab:1\"}"], 3.0);
        assert_eq!(samples["tokenring_ready"], 1.0);
        assert_eq!(samples["tokenring_tls_handshakes_under_way{shard=\"1\"}"], 0.0);
        assert_eq!(samples["tokenring_ring_refusals_total{shard=\"0\",reason=\"completions\"}"], 1.0);
        for family in families::ALL {
            assert!(
                page.contains(&format!("# TYPE {} {}\n", family.name, family.kind.name())),
                "{}",
                family.name
            );
        }
    }

    #[test]
    fn certificates_have_an_expiry_and_what_is_not_verified_shows() {
        let samples = parse(&page(&tls_view(), &Process::default()));
        let expiry = |listener: &str, name: &str| {
            samples.get(&format!(
                "tokenring_tls_certificate_expiry_timestamp_seconds{{listener=\"{listener}\",name=\"{name}\"}}"
            ))
        };
        assert_eq!(expiry("127.0.0.1:443", "a.example"), Some(&4_102_444_800.0));
        assert_eq!(expiry("127.0.0.1:443", "b.example"), Some(&4_102_444_800.0));
        assert_eq!(expiry("127.0.0.1:80", "a.example"), None);
        assert_eq!(samples["tokenring_tls_reload_failures_total"], 2.0);
        assert_eq!(samples["tokenring_tls_files_refused"], 1.0);
        assert_eq!(samples["tokenring_tls_verification_off{upstream=\"https://open\"}"], 1.0);
        assert_eq!(samples["tokenring_tls_verification_off{upstream=\"https://model\"}"], 0.0);
        let client = "tokenring_tls_client_certificate_expiry_timestamp_seconds{upstream=\"https://model\"}";
        assert_eq!(samples[client], 4_102_444_800.0);
    }

    #[test]
    fn histograms_are_cumulative() {
        let samples = parse(&page(&view(), &Process::default()));
        let bucket = |le: &str| {
            samples[&format!("tokenring_time_to_first_token_seconds_bucket{{shard=\"0\",le=\"{le}\"}}")]
        };
        assert_eq!(
            [bucket("0.001"), bucket("0.005"), bucket("0.5"), bucket("10"), bucket("+Inf")],
            [1.0, 2.0, 3.0, 3.0, 4.0]
        );
        assert_eq!(samples["tokenring_time_to_first_token_seconds_count{shard=\"0\"}"], 4.0);
        let sum = samples["tokenring_time_to_first_token_seconds_sum{shard=\"0\"}"];
        assert!((sum - 20.252).abs() < 0.2, "{sum}");
    }

    #[test]
    fn a_silent_shard_is_down() {
        let mut view = view();
        view.shards[0] = ShardState::Silent;
        let samples = parse(&page(&view, &Process::default()));
        assert_eq!(samples["tokenring_shard_up{shard=\"0\"}"], 0.0);
        assert!(!samples.contains_key("tokenring_accepts_total{shard=\"0\"}"));
        assert_eq!(samples["tokenring_ready"], 0.0);
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(Labels(vec![("a", "x\"\\\n")]).to_string(), "{a=\"x\\\"\\\\\\n\"}");
    }
}
