//! What a shard counts: plain integers and histograms, owned by the shard and copied out on request.
//! One definition per counter gives its field, its metric name and its help text.

use hdrhistogram::Histogram;
use protocol::phase::{End, Phase};
use std::net::SocketAddr;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident => $metric:literal),* $(,)?) => {
        /// Monotonic counters since the start of the shard.
        #[derive(Clone, Default, Debug, PartialEq, Eq)]
        pub struct Counters { $($(#[doc = $doc])+ pub $field: u64),* }
        impl Counters {
            /// `(metric name, help, value)` of every counter. Names end in `_total`.
            pub fn all(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$(($metric, concat!($($doc),+), self.$field)),*]
            }
        }
    };
}

counters! {
    /// Client connections accepted.
    accepts => "tokenring_accepts_total",
    /// Times accepting was suspended because no connection slot was free.
    accept_pauses => "tokenring_accept_pauses_total",
    /// Client connections that came after the last free slot and were made to wait for the next.
    accept_parks => "tokenring_accept_parks_total",
    /// Client connections handed to a shard with fewer.
    handed_away => "tokenring_handed_away_total",
    /// Client connections taken over from a shard with more.
    handed_in => "tokenring_handed_in_total",
    /// Those of them that were moved because a request belonged to another shard.
    moves => "tokenring_moves_total",
    /// Those of them that were moved between two requests, because another shard had many fewer.
    moves_for_load => "tokenring_moves_for_load_total",
    /// Durable streams to be created of which other shards were asked.
    durable_errands => "tokenring_durable_errands_total",
    /// Those that were refused because they were not settled in time, or not taken by a disk.
    durable_errands_refused => "tokenring_durable_errands_refused_total",
    /// Accepts that failed (no descriptors, no memory).
    accept_errors => "tokenring_accept_errors_total",
    /// Client connections closed.
    closes => "tokenring_closes_total",
    /// Client connections closed while idle (keep-alive deadline).
    keep_alive_closes => "tokenring_keep_alive_closes_total",
    /// Requests whose head was complete.
    requests => "tokenring_requests_total",
    /// Requests refused for breaking a rule or limit of HTTP.
    refusals => "tokenring_refusals_total",
    /// Client connections closed without a request: connects that were followed by nothing, or by half a head.
    closes_unused => "tokenring_closes_unused_total",
    /// Client connections closed because too many of their requests were refused.
    refusal_closes => "tokenring_refusal_closes_total",
    /// Pieces of bodies taken apart: chunks of known size, and events.
    pieces => "tokenring_body_pieces_total",
    /// Receives that had to wait because their connection's pieces were too many and too small for one turn.
    receives_deferred => "tokenring_receives_deferred_total",
    /// Streams and connections that found no memory beyond their share: ended, cut, or their pipelined requests dropped.
    overdrafts_refused => "tokenring_overdrafts_refused_total",
    /// Events relayed to or produced for clients.
    events => "tokenring_events_total",
    /// Heartbeats written.
    heartbeats => "tokenring_heartbeats_total",
    /// Answers committed before the backend answered.
    early_commits => "tokenring_early_commits_total",
    /// Bytes received from clients.
    client_received_bytes => "tokenring_client_received_bytes_total",
    /// Bytes confirmed sent to clients.
    client_sent_bytes => "tokenring_client_sent_bytes_total",
    /// Bytes received from backends.
    upstream_received_bytes => "tokenring_upstream_received_bytes_total",
    /// Bytes confirmed sent to backends.
    upstream_sent_bytes => "tokenring_upstream_sent_bytes_total",
    /// Connections found reset though their receive had not been told.
    resets_unheard => "tokenring_resets_unheard_total",
    /// Sends completed.
    sends => "tokenring_sends_total",
    /// Sends that completed short of what was lent.
    sends_short => "tokenring_sends_short_total",
    /// Times a backend's receive was paused by its client's lag.
    pauses => "tokenring_pauses_total",
    /// Times a client's receive was paused by its backend's lag.
    upload_pauses => "tokenring_upload_pauses_total",
    /// Receives that ended because no receive buffer was free.
    buffer_shortages => "tokenring_buffer_shortages_total",
    /// Backend connections opened.
    upstream_connects => "tokenring_upstream_connects_total",
    /// Backend connections that could not be opened.
    upstream_connect_errors => "tokenring_upstream_connect_errors_total",
    /// Requests sent on a pooled backend connection.
    upstream_reuses => "tokenring_upstream_reuses_total",
    /// Requests sent again because a reused backend connection died before its first response byte.
    upstream_retries => "tokenring_upstream_retries_total",
    /// TLS handshakes with clients that were completed.
    tls_handshakes => "tokenring_tls_handshakes_total",
    /// Those of them that resumed an earlier session.
    tls_resumptions => "tokenring_tls_resumptions_total",
    /// TLS handshakes with clients that failed.
    tls_handshake_failures => "tokenring_tls_handshake_failures_total",
    /// TLS handshakes with clients that took too long.
    tls_handshake_timeouts => "tokenring_tls_handshake_timeouts_total",
    /// TLS handshakes with clients that had to wait because too many were under way.
    tls_handshakes_delayed => "tokenring_tls_handshakes_delayed_total",
    /// TLS handshakes with clients given up, slow ones first, for others that waited.
    tls_handshakes_displaced => "tokenring_tls_handshakes_displaced_total",
    /// Clients that spoke plain HTTP to a TLS port.
    tls_plain_refused => "tokenring_tls_plain_refused_total",
    /// Clients that spoke TLS to a plain port.
    tls_hello_refused => "tokenring_tls_hello_refused_total",
    /// TLS connections with clients or backends that broke off after the handshake: a broken record, a fatal alert.
    tls_failures => "tokenring_tls_failures_total",
    /// TLS handshakes with backends that were completed.
    upstream_tls_handshakes => "tokenring_upstream_tls_handshakes_total",
    /// Those of them that resumed an earlier session.
    upstream_tls_resumptions => "tokenring_upstream_tls_resumptions_total",
    /// TLS handshakes with backends that failed: not trusted, not understood, broken off.
    upstream_tls_handshake_failures => "tokenring_upstream_tls_handshake_failures_total",
    /// Answers of backends that were cut: the connection ended without TLS's own end (close_notify).
    upstream_tls_truncations => "tokenring_upstream_tls_truncations_total",
    /// Pooled backend connections closed by the idle, age or count limit.
    pool_evictions => "tokenring_pool_evictions_total",
    /// Pooled backend connections closed by the backend.
    pool_peer_closes => "tokenring_pool_peer_closes_total",
    /// Backends that sent the end mark but did not end their body properly.
    unclean_ends => "tokenring_upstream_unclean_ends_total",
    /// Events a backend sent after the end mark, or answers to nothing; dropped.
    upstream_surplus => "tokenring_upstream_surplus_total",
    /// Connections that were made to wait because the completion batch of a turn was full.
    turns_full => "tokenring_turns_full_total",
    /// Turns that took longer than 10 ms.
    turns_slow => "tokenring_turns_slow_total",
    /// Turns.
    turns => "tokenring_turns_total",
    /// Clients that left streams which went on without them.
    detaches => "tokenring_detaches_total",
    /// Readers of streams by their ids: clients that came back, or read with others.
    resumes => "tokenring_resumes_total",
    /// Those of them that had to wait because too many came at once.
    resumes_delayed => "tokenring_resumes_delayed_total",
    /// Requests for streams by their ids that were refused: unknown, expired, out of the window.
    resumes_refused => "tokenring_resumes_refused_total",
    /// Requests to stop a stream by its id.
    stream_stops => "tokenring_stream_stops_total",
    /// Readers that the window left behind, and that were told so and closed.
    readers_dropped => "tokenring_readers_dropped_total",
    /// Readers that the window left behind, and that were told so and went on with the newest event.
    readers_skipped => "tokenring_readers_skipped_total",
    /// Streams that were over and were given up before their time for want of memory.
    kept_evictions => "tokenring_kept_evictions_total",
    /// Bytes of streams under way that were given up for want of memory, and cannot be read again.
    kept_forgotten_bytes => "tokenring_kept_forgotten_bytes_total",
    /// Logs opened on other shards for streams of this one that many read.
    mirrors_opened => "tokenring_mirrors_opened_total",
    /// Those of them that ended: with their streams, or because nobody read them there any more.
    mirrors_closed => "tokenring_mirrors_closed_total",
    /// Bytes of streams sent to other shards for their readers there.
    mirror_bytes => "tokenring_mirror_bytes_total",
    /// Times such a log was left behind by its stream's window: its readers are told, as any that are left behind.
    mirrors_skipped => "tokenring_mirrors_skipped_total",
    /// Readers of streams of other shards that were not moved there.
    mirror_reads => "tokenring_mirror_reads_total",
    /// Bytes of streams under way that were let go because they were older than the window.
    kept_aged_bytes => "tokenring_kept_aged_bytes_total",
    /// Durable streams created, forks included.
    durable_creates => "tokenring_durable_creates_total",
    /// Appends to durable streams.
    durable_appends => "tokenring_durable_appends_total",
    /// Bytes appended to durable streams.
    durable_append_bytes => "tokenring_durable_append_bytes_total",
    /// Appends that their producers had made before; not appended again.
    durable_duplicates => "tokenring_durable_duplicates_total",
    /// Reads of durable streams begun: pages, long-polls, event streams.
    durable_reads => "tokenring_durable_reads_total",
    /// Durable streams that ended because their time to live was over.
    durable_expiries => "tokenring_durable_expiries_total",
    /// Durable streams given up for want of memory.
    durable_evictions => "tokenring_durable_evictions_total",
    /// Bytes dropped from the start of durable streams, beyond their window or for want of memory.
    durable_trimmed_bytes => "tokenring_durable_trimmed_bytes_total",
    /// Appends to durable streams, and creations of such, that found no memory.
    durable_full => "tokenring_durable_full_total",
    /// Live readers of durable streams that came to share what follows with others, because they had all there was.
    durable_shared => "tokenring_durable_readers_shared_total",
    /// Live readers of durable streams that fell behind what they shared with others, and went on by themselves.
    durable_parted => "tokenring_durable_readers_parted_total",
    /// Live readers of durable streams handed over to other shards in the middle of their answers.
    durable_handed_over => "tokenring_durable_readers_handed_over_total",
    /// Those of them that were handed back, because they had fallen behind, there was nothing for them, or many fewer clients there.
    durable_handed_back => "tokenring_durable_readers_handed_back_total",
    /// Records of durable streams made for the journal on disk.
    durable_journal_records => "tokenring_durable_journal_records_total",
    /// Bytes written to it.
    durable_journal_bytes => "tokenring_durable_journal_bytes_total",
    /// Syncs of it; each serves all that waits for one.
    durable_journal_syncs => "tokenring_durable_journal_syncs_total",
    /// Writes, syncs and removals of segments that failed.
    durable_journal_failures => "tokenring_durable_journal_failures_total",
    /// Segment files removed because no stream needed them any more.
    durable_segments_removed => "tokenring_durable_segments_removed_total",
    /// Bytes of streams written anew so that old segments can go.
    durable_rewritten_bytes => "tokenring_durable_rewritten_bytes_total",
    /// Durable streams found on disk at the start.
    durable_recovered => "tokenring_durable_recovered_total",
    /// Damages of durable streams found on disk at the start; the log says what each costs.
    durable_damages => "tokenring_durable_damages_total",
    /// Records of relayed streams made for the journals on disk.
    stored_records => "tokenring_stored_records_total",
    /// Bytes written to them.
    stored_bytes => "tokenring_stored_bytes_total",
    /// Syncs of them; each serves all that waits for one.
    stored_syncs => "tokenring_stored_syncs_total",
    /// Writes, syncs and removals of their segments that failed.
    stored_failures => "tokenring_stored_failures_total",
    /// Their segment files removed because no stream needed them any more.
    stored_segments_removed => "tokenring_stored_segments_removed_total",
    /// Bytes of relayed streams written anew, so that old segments can go or because the disk had not taken them before.
    stored_rewritten_bytes => "tokenring_stored_rewritten_bytes_total",
    /// Relayed streams found on disk at the start.
    stored_recovered => "tokenring_stored_recovered_total",
    /// Damages of relayed streams found on disk at the start; the log says what each costs.
    stored_damages => "tokenring_stored_damages_total",
    /// Times that a relayed stream went on without the disk, which did not take it.
    stored_left_off => "tokenring_stored_left_off_total",
    /// Records for the control thread dropped because it did not keep up.
    records_dropped => "tokenring_records_dropped_total",
}

/// Histograms, 2 significant digits.
#[derive(Clone, Debug)]
pub struct Histograms {
    /// Complete request to first token, µs.
    pub first_token_us: Histogram<u64>,
    /// Between two events of a stream, µs.
    pub between_tokens_us: Histogram<u64>,
    /// Arrival of an event to the completion of the send that carried it (its submission if that was deferred), µs.
    pub relay_us: Histogram<u64>,
    /// What readers of a stream by its id had not been confirmed, each time that something was; bytes.
    pub reader_pending_bytes: Histogram<u64>,
    /// Length of a turn's work, sleep excluded, µs.
    pub turn_us: Histogram<u64>,
    /// Complete request to last byte delivered, µs.
    pub stream_us: Histogram<u64>,
}

/// The longest time a histogram holds, µs (one day); longer ones count as this.
pub const HISTOGRAM_MAX_US: u64 = 86_400_000_000;

impl Default for Histograms {
    fn default() -> Self {
        // With its bounds from the start, some 30 KiB each: recording never allocates, and never takes a long time for a
        // short one (`saturating_record` does not resize, it clamps).
        let new = || {
            Histogram::new_with_bounds(1, HISTOGRAM_MAX_US, 2)
                .unwrap_or_else(|_| unreachable!("1 < 2 * 1 <= max, and 2 digits are within 0..=5"))
        };
        Histograms {
            first_token_us: new(),
            between_tokens_us: new(),
            relay_us: new(),
            reader_pending_bytes: new(),
            turn_us: new(),
            stream_us: new(),
        }
    }
}

/// Everything a shard measures.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Monotonic counters.
    pub counters: Counters,
    /// Streams ended, by [`End`] in order of [`End::ALL`].
    pub ends: [u64; End::COUNT],
    /// Refusals, by [`protocol::http::Refusal`] in order of `Refusal::ALL`.
    pub refusals: Vec<u64>,
    /// Histograms.
    pub histograms: Histograms,
}

impl Default for Stats {
    fn default() -> Self {
        Stats {
            counters: Counters::default(),
            ends: [0; End::COUNT],
            refusals: vec![0; protocol::http::Refusal::ALL.len()],
            histograms: Histograms::default(),
        }
    }
}

/// A copy of a shard's state at one instant, for `/metrics` and `/status`.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Index of the shard, from 0.
    pub shard: usize,
    /// What it has measured.
    pub stats: Stats,
    /// Client connections open.
    pub connections: usize,
    /// Clients whose TLS handshake is under way; among `connections`.
    pub handshakes: usize,
    /// Client connections accepted that wait for a slot; not among `connections`.
    pub parked: usize,
    /// Backend connections open, pooled ones included.
    pub upstream_connections: usize,
    /// Streams in each phase, in order of [`Phase::ALL`].
    pub phases: [u64; Phase::COUNT],
    /// Bytes lent to the kernel.
    pub in_flight_bytes: u64,
    /// Bytes in logs that completions have not confirmed.
    pub pending_bytes: u64,
    /// Memory held by event logs, bytes.
    pub log_bytes: u64,
    /// Memory of TLS connections beside their sessions: partial records, and records on their way to sockets; bytes.
    pub tls_bytes: u64,
    /// Memory that streams and connections hold beyond the share of each, bytes.
    pub overdraft_bytes: u64,
    /// What is kept of streams for those who come back.
    pub kept: crate::core::KeptTotals,
    /// What the durable streams hold.
    pub durable: protocol::durable::Totals,
    /// How their journal stands; none without a data directory, and on other shards.
    pub journal: Option<protocol::durable::journal::JournalState>,
    /// How that of its relayed streams stands; none without a data directory.
    pub stream_journal: Option<protocol::durable::journal::JournalState>,
    /// Receive buffers free, of [`crate::settings::Settings::buffers`].
    pub buffers_free: usize,
    /// How often the kernel took nothing from the ring, in order of [`crate::io::Refusal::ALL`].
    pub ring_refusals: [u64; crate::io::Refusal::COUNT],
    /// Timers armed.
    pub timers: usize,
    /// The shard accepts no new clients.
    pub draining: bool,
    /// Per upstream, in order of the upstream set.
    pub upstreams: Vec<UpstreamSnapshot>,
    /// The client connections with the most pending bytes, worst first, at most 10.
    pub slowest: Vec<SlowConnection>,
}

/// One backend as a shard sees it.
#[derive(Clone, Debug, Default)]
pub struct UpstreamSnapshot {
    /// Streams under way on it.
    pub active: u64,
    /// Idle connections in the pool.
    pub idle: u64,
    /// Connections that failed in a row.
    pub failures: u64,
}

/// A client connection that lags.
#[derive(Clone, Debug)]
pub struct SlowConnection {
    /// The client.
    pub peer: Option<SocketAddr>,
    /// Bytes appended but not confirmed.
    pub pending_bytes: u64,
    /// Bytes lent to the kernel.
    pub in_flight_bytes: u32,
    /// The stream's phase.
    pub phase: Phase,
    /// Age of the stream, ms.
    pub age_ms: u64,
}

/// A finished stream, for the access log.
#[derive(Clone, Debug)]
pub struct StreamRecord {
    /// Why it ended.
    pub end: End,
    /// The reason of a refusal, as in `Refusal::reason`.
    pub refusal: Option<&'static str>,
    /// Name of the route.
    pub route: u16,
    /// Dialect's name.
    pub dialect: &'static str,
    /// Status sent to the client; 0 when none was.
    pub status: u16,
    /// The certificate that the client showed, DER: its subject names the tenant.
    pub client_certificate: Option<Box<[u8]>>,
    /// Request method and path, shortened to 120 bytes, for the log.
    pub request: Box<str>,
    /// The model asked for.
    pub model: Option<Box<str>>,
    /// Index of the upstream, if one was used.
    pub upstream: Option<u16>,
    /// Events sent.
    pub events: u64,
    /// Bytes confirmed sent to the client.
    pub sent_bytes: u64,
    /// Complete head to first token, µs.
    pub first_token_us: Option<u64>,
    /// Complete head to end, µs.
    pub duration_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_hold_microseconds_to_a_day() {
        let mut histogram = Histograms::default().first_token_us;
        for value in [3, 250_000, 300_000_000, HISTOGRAM_MAX_US, u64::MAX] {
            histogram.saturating_record(value);
        }
        for value in [3, 250_000, 300_000_000] {
            assert_eq!(histogram.count_between(value - value / 100, value + value / 100), 1, "{value}");
        }
        assert!(histogram.max() >= HISTOGRAM_MAX_US, "what is longer counts as the longest");
    }
}
