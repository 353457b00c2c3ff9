//! The one definition of every metric family: name, type, labels and help, from which /metrics and docs/METRICS.md come.
//! The shards' counters are defined where they are counted, in `shard::stats`.

use shard::stats::Counters;

/// A metric family.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) labels: &'static [&'static str],
    pub(crate) help: &'static str,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    /// Upper bounds of the buckets, seconds.
    Histogram(&'static [f64]),
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }
}

/// OpenTelemetry's GenAI conventions: time to first token.
const FIRST_TOKEN_S: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// OpenTelemetry's GenAI conventions: operation duration.
const DURATION_S: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// OpenTelemetry's GenAI conventions: time per output token, with finer steps below 10 ms.
const BETWEEN_TOKENS_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 10.0, 60.0,
];
/// From what an idle shard adds (tens of microseconds) to a client that reads slowly.
const RELAY_S: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0,
    10.0,
];
/// From nothing to what falls out of most windows.
const PENDING_BYTES: &[f64] = &[0.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 16777216.0];
/// A turn over 10 ms is a fault.
const TURN_S: &[f64] =
    &[0.000005, 0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1];

macro_rules! families {
    ($($id:ident = $name:literal, $kind:expr, $labels:expr, $help:literal;)*) => {
        $(pub(crate) static $id: Family = Family { name: $name, kind: $kind, labels: &$labels, help: $help };)*
        /// Every family but the shards' counters, in the order of the page.
        pub(crate) static ALL: &[&Family] = &[$(&$id),*];
    };
}

families! {
    BUILD_INFO = "tokenring_build_info", Kind::Gauge, ["version"], "Always 1; the label says what runs.";
    READY = "tokenring_ready", Kind::Gauge, [], "1 while /ready answers 200.";
    SHARD_UP = "tokenring_shard_up", Kind::Gauge, ["shard"], "1 while the shard answers the control thread within a second.";
    STREAMS = "tokenring_streams", Kind::Gauge, ["shard", "phase"], "Streams in each phase of their life.";
    ENDS = "tokenring_stream_ends_total", Kind::Counter, ["shard", "reason"], "Streams ended, by reason; each has exactly one.";
    REFUSALS = "tokenring_refusals_total", Kind::Counter, ["shard", "reason"], "Requests refused for breaking a rule or limit of HTTP.";
    FIRST_TOKEN = "tokenring_time_to_first_token_seconds", Kind::Histogram(FIRST_TOKEN_S), ["shard"], "From the complete request to the first token.";
    BETWEEN_TOKENS = "tokenring_inter_token_latency_seconds", Kind::Histogram(BETWEEN_TOKENS_S), ["shard"], "Between two events of a stream, as they arrive from the backend.";
    RELAY = "tokenring_relay_latency_seconds", Kind::Histogram(RELAY_S), ["shard"], "What tokenring adds: from the arrival of an event to the completion of the send that carried it, or to its submission where nothing waits for that.";
    READER_PENDING = "tokenring_reader_pending_bytes", Kind::Histogram(PENDING_BYTES), ["shard"], "What a reader of a stream by its id has not been confirmed, each time that something was.";
    DURATION = "tokenring_stream_duration_seconds", Kind::Histogram(DURATION_S), ["shard"], "From the complete request to the last byte delivered.";
    TURN = "tokenring_turn_seconds", Kind::Histogram(TURN_S), ["shard"], "Work of one turn of a shard's loop, sleep excluded.";
    CONNECTIONS = "tokenring_connections", Kind::Gauge, ["shard"], "Client connections open.";
    PARKED = "tokenring_parked_connections", Kind::Gauge, ["shard"], "Client connections accepted that wait for a slot.";
    CONNECTIONS_MAX = "tokenring_connections_max", Kind::Gauge, ["shard"], "Client connections the shard takes (conns_max).";
    UPSTREAM_CONNECTIONS = "tokenring_upstream_connections", Kind::Gauge, ["shard"], "Backend connections open, pooled ones included.";
    IN_FLIGHT = "tokenring_in_flight_bytes", Kind::Gauge, ["shard"], "Bytes lent to the kernel and not yet completed.";
    PENDING = "tokenring_pending_bytes", Kind::Gauge, ["shard"], "Bytes produced for clients and not confirmed sent.";
    TLS_BYTES = "tokenring_tls_bytes", Kind::Gauge, ["shard"], "Memory of TLS connections beside their sessions: partial records, and records on their way to sockets.";
    LOG_BYTES = "tokenring_log_bytes", Kind::Gauge, ["shard"], "Memory held by event logs.";
    OVERDRAFT = "tokenring_overdraft_bytes", Kind::Gauge, ["shard"], "Memory that streams and connections hold beyond the share of each.";
    OVERDRAFT_MAX = "tokenring_overdraft_bytes_max", Kind::Gauge, ["shard"], "The most they may (overdraft_bytes_max).";
    MEMORY_MAX = "tokenring_memory_worst_case_bytes", Kind::Gauge, [], "The most memory the process can come to hold with its settings, as `tokenring check` computes it.";
    LIVE = "tokenring_kept_live_streams", Kind::Gauge, ["shard"], "Streams under way that can be read by their ids.";
    OVER = "tokenring_kept_over_streams", Kind::Gauge, ["shard"], "Streams that are over and can still be read by their ids.";
    KEPT_BYTES = "tokenring_kept_bytes", Kind::Gauge, ["shard"], "Memory of what is kept of streams for those who come back.";
    KEPT_BYTES_MAX = "tokenring_kept_bytes_max", Kind::Gauge, ["shard"], "The most that may be (resume_bytes_max).";
    DETACHED = "tokenring_detached_streams", Kind::Gauge, ["shard"], "Streams that go on without a client.";
    STREAM_READERS = "tokenring_stream_readers", Kind::Gauge, ["shard"], "Readers of streams by their ids.";
    MIRRORS = "tokenring_mirrors", Kind::Gauge, ["shard"], "Streams of other shards of which the shard has a copy for its readers.";
    STREAM_READERS_WAITING = "tokenring_stream_readers_waiting", Kind::Gauge, ["shard"], "Those of them that wait for their turn to begin.";
    STORED = "tokenring_stored_streams", Kind::Gauge, ["shard"], "Relayed streams that are on disk.";
    UNSTORED = "tokenring_unstored_streams", Kind::Gauge, ["shard"], "Relayed streams that should be on disk and are not, because it did not take them.";
    STORED_SEGMENTS = "tokenring_stored_segments", Kind::Gauge, ["shard"], "Segment files of the journal of relayed streams.";
    STORED_DISK_BYTES = "tokenring_stored_disk_bytes", Kind::Gauge, ["shard"], "Their bytes.";
    STORED_BACKLOG = "tokenring_stored_backlog_bytes", Kind::Gauge, ["shard"], "Bytes of its records that are not synced.";
    STORED_FAILING = "tokenring_stored_disk_failing", Kind::Gauge, ["shard"], "1 while the disk does not take what is written of relayed streams, which go on without.";
    DURABLE_STREAMS = "tokenring_durable_streams", Kind::Gauge, ["shard"], "Durable streams held.";
    DURABLE_BYTES = "tokenring_durable_bytes", Kind::Gauge, ["shard"], "Memory that durable streams take.";
    DURABLE_BYTES_MAX = "tokenring_durable_bytes_max", Kind::Gauge, ["shard"], "The most they may: the shard's share of durable_store_bytes_max.";
    DURABLE_READERS = "tokenring_durable_readers", Kind::Gauge, ["shard"], "Reads of durable streams under way.";
    DURABLE_SEGMENTS = "tokenring_durable_segments", Kind::Gauge, ["shard"], "Segment files of the journal of durable streams.";
    DURABLE_DISK_BYTES = "tokenring_durable_disk_bytes", Kind::Gauge, ["shard"], "Their bytes.";
    DURABLE_BACKLOG = "tokenring_durable_backlog_bytes", Kind::Gauge, ["shard"], "Bytes of records that are not synced.";
    DURABLE_FAILING = "tokenring_durable_disk_failing", Kind::Gauge, ["shard"], "1 while the disk does not take what is written, and publishing is refused.";
    BUFFERS_FREE = "tokenring_receive_buffers_free", Kind::Gauge, ["shard"], "Receive buffers the kernel may fill.";
    RING_REFUSALS = "tokenring_ring_refusals_total", Kind::Counter, ["shard", "reason"], "Times that io_uring took nothing from a shard, which waits up to a millisecond then and asks again.";
    TIMERS = "tokenring_timers", Kind::Gauge, ["shard"], "Timers armed.";
    UPSTREAM_ACTIVE = "tokenring_upstream_streams", Kind::Gauge, ["shard", "upstream"], "Streams under way on a backend.";
    UPSTREAM_IDLE = "tokenring_upstream_pool_idle", Kind::Gauge, ["shard", "upstream"], "Idle connections to a backend kept for reuse.";
    UPSTREAM_FAILURES = "tokenring_upstream_failures", Kind::Gauge, ["shard", "upstream"], "Connection attempts to a backend that failed in a row.";
    UPSTREAM_ADDRESSES = "tokenring_upstream_addresses", Kind::Gauge, ["upstream"], "Addresses a backend's name resolves to; 0 while it cannot be resolved.";
    RESOLVE_FAILURES = "tokenring_resolve_failures_total", Kind::Counter, ["upstream"], "Look-ups of a backend's name that failed.";
    TLS_HANDSHAKING = "tokenring_tls_handshakes_under_way", Kind::Gauge, ["shard"], "Clients whose TLS handshake is under way.";
    TLS_EPOCH = "tokenring_tls_epoch", Kind::Gauge, [], "Counts up when certificates, roots or the keys of session tickets change.";
    TLS_RELOADS = "tokenring_tls_reloads_total", Kind::Counter, [], "Times that certificates and keys were read again without a fault.";
    TLS_RELOAD_FAILURES = "tokenring_tls_reload_failures_total", Kind::Counter, [], "Times that some file could not be taken when they were read again; what was read before stays in use.";
    TLS_FILES_REFUSED = "tokenring_tls_files_refused", Kind::Gauge, [], "Certificates, keys and roots whose files now hold what cannot be taken.";
    TLS_EXPIRY = "tokenring_tls_certificate_expiry_timestamp_seconds", Kind::Gauge, ["listener", "name"], "When a listener's certificate expires, seconds since 1970; the name is its first.";
    TLS_CLIENT_EXPIRY = "tokenring_tls_client_certificate_expiry_timestamp_seconds", Kind::Gauge, ["upstream"], "When the certificate shown to a backend expires, seconds since 1970.";
    TLS_UNVERIFIED = "tokenring_tls_verification_off", Kind::Gauge, ["upstream"], "1 where a backend's certificate is not verified (upstream_tls_insecure).";
    LOG_LINES_DROPPED = "tokenring_log_lines_dropped_total", Kind::Counter, [], "Log lines dropped because the reader of stderr did not keep up.";
    OPEN_FDS = "process_open_fds", Kind::Gauge, [], "Open descriptors.";
    MAX_FDS = "process_max_fds", Kind::Gauge, [], "The limit of open descriptors.";
    RESIDENT = "process_resident_memory_bytes", Kind::Gauge, [], "Resident memory.";
    VIRTUAL = "process_virtual_memory_bytes", Kind::Gauge, [], "Virtual memory.";
    THREADS = "process_threads", Kind::Gauge, [], "Threads.";
    CPU = "process_cpu_seconds_total", Kind::Counter, [], "User and system CPU time.";
    START_TIME = "process_start_time_seconds", Kind::Gauge, [], "Start of the process, seconds since 1970.";
}

/// The shards' counters that have a family of their own above, with more labels.
const REPLACED: &[&str] = &["tokenring_refusals_total"];

/// `(name, help, value)` of a shard's counters, help without the indentation of its source.
pub(crate) fn counters(counters: &Counters) -> Vec<(&'static str, String, u64)> {
    counters
        .all()
        .into_iter()
        .filter(|(name, _, _)| !REPLACED.contains(name))
        .map(|(name, help, value)| (name, help.split_whitespace().collect::<Vec<_>>().join(" "), value))
        .collect()
}

/// docs/METRICS.md.
pub(crate) fn metrics_page() -> String {
    let mut page = String::from(
        "# Metrics\n\
         \n\
         <!-- Generated by `tokenring metrics-doc > docs/METRICS.md`; a test fails when it is stale. -->\n\
         \n\
         `GET /metrics` on the admin address, in Prometheus' text format. Units are seconds and bytes. A shard that does not\n\
         answer within a second is left out of that scrape, and its `tokenring_shard_up` is 0. Sums of histograms are exact to\n\
         1 %, as are the values counted into buckets.\n\
         \n\
         | name | type | labels | meaning |\n\
         |---|---|---|---|\n",
    );
    let mut row = |name: &str, kind: &str, labels: &[&str], help: &str| {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        page.push_str(&format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", ")));
    };
    for family in ALL {
        row(family.name, family.kind.name(), family.labels, family.help);
    }
    for (name, help, _) in counters(&Counters::default()) {
        row(name, "counter", &["shard"], &help);
    }
    let list = |names: Vec<&str>| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let phases = list(protocol::phase::Phase::ALL.iter().map(|phase| phase.name()).collect());
    let of_ring = list(shard::io::Refusal::ALL.iter().map(|refusal| refusal.name()).collect());
    let refusals = list(protocol::http::Refusal::ALL.iter().map(|refusal| refusal.reason()).collect());
    page.push_str(&format!("\n## Phases\n\n`phase` is one of {phases}.\n\n## Reasons\n\n"));
    page.push_str("`reason` of `tokenring_stream_ends_total` is one of:\n\n");
    for end in protocol::phase::End::ALL {
        page.push_str(&format!("- `{}`: {}\n", end.name(), end.fault().message));
    }
    page.push_str(&format!(
        "\n`reason` of `tokenring_refusals_total` is one of {refusals}; of `tokenring_ring_refusals_total`, {of_ring}.\n\n\
         ## Buckets\n\n"
    ));
    for family in ALL {
        if let Kind::Histogram(bounds) = family.kind {
            let bounds: Vec<_> = bounds.iter().map(f64::to_string).collect();
            page.push_str(&format!("- `{}`: {}\n", family.name, bounds.join(", ")));
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_prometheus() {
        for family in ALL {
            assert_eq!(family.name.ends_with("_total"), family.kind == Kind::Counter, "{}", family.name);
            assert!(family.help.ends_with('.') && !family.help.contains('\n'));
            if let Kind::Histogram(bounds) = family.kind {
                assert!(bounds.is_sorted());
                assert!(family.name.ends_with("_seconds") || family.name.ends_with("_bytes"));
            }
        }
        for (name, help, _) in counters(&Counters::default()) {
            assert!(name.ends_with("_total") && !help.is_empty());
            assert!(ALL.iter().all(|family| family.name != name), "{name} twice");
        }
    }
}
