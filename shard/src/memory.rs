//! The most memory that a shard can come to hold, computed from its settings: what an operator sizes a machine by, and what
//! the tests hold the measured memory against.

use crate::core::slab_entry_bytes;
use crate::settings::Settings;
use protocol::limits::{
    DURABLE_BACKLOG_BYTES_MAX, DURABLE_REWRITE_BACKLOG_BYTES_MAX, LATE_ERROR_BYTES_MAX,
    LOG_SEGMENT_BYTES_MAX, MIRROR_AHEAD_BYTES, MIRRORS_MAX, TLS_HANDSHAKE_BYTES_MAX, TLS_RECORD_BYTES_MAX,
};

/// Of a shard, whatever it serves: histograms, rings, executor, stack, records on their way to the control thread.
const SHARD_FIXED_BYTES: u64 = 12 << 20;
/// Of the process: its code, the control thread, the log, the admin pages.
const PROCESS_BYTES: u64 = 24 << 20;
/// Boxes of one stream besides its logs: the request's side, the decoder, the scanner of the request's facts, its description.
const STREAM_BOXES_BYTES: u64 = 4 << 10;
/// Operations in flight of one connection, an entry of 64 bytes and some each.
const OPS_BYTES: u64 = 4 * 96;
/// A TLS session: keys, what rustls keeps of the handshake, the peer's certificates.
const TLS_SESSION_BYTES: u64 = 16 << 10;
/// Beside it: a partial record in a buffer that grew by doubling, and a batch of records that replaces one still being sent.
const TLS_CONN_BYTES: u64 =
    TLS_SESSION_BYTES + 2 * TLS_RECORD_BYTES_MAX as u64 + 2 * LOG_SEGMENT_BYTES_MAX as u64;
/// A mirror beyond what is kept of its stream: what is on its way to it, and what its log must hold for its readers.
const MIRROR_BYTES: u64 = 2 * (MIRROR_AHEAD_BYTES + 2 * LOG_SEGMENT_BYTES_MAX as u64);
/// What the allocator loses between blocks of different sizes: one part of so many.
const ALLOCATOR_PART: u64 = 8;

impl Settings {
    /// Bytes of logs and partial events that each stream may have for itself: the lag that pauses its producer, the segment
    /// that is being sent, and the one that is being filled.
    pub fn share_bytes(&self) -> u64 {
        self.lag_high_bytes + 2 * LOG_SEGMENT_BYTES_MAX as u64
    }
}

/// The worst case in its parts, bytes of userland memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorstCase {
    /// Receive buffers of a shard.
    pub buffers: u64,
    /// What one client has at most before it draws on the overdraft, times all clients of a shard.
    pub clients: u64,
    /// A shard's share of durable streams.
    pub durable: u64,
    /// What is kept of a shard's streams for those who come back, mirrors of other shards' streams included.
    pub resume: u64,
    /// The overdraft of a shard, and what the last to draw may exceed it by.
    pub overdraft: u64,
    /// TLS of a shard's connections, both sides.
    pub tls: u64,
    /// Everything else of a shard.
    pub fixed: u64,
    /// Shards.
    pub shards: u64,
}

impl WorstCase {
    /// Of so many shards with these settings and so many backends, some of which may speak TLS.
    pub fn of(settings: &Settings, shards: usize, upstreams: usize, tls_upstreams: bool) -> Self {
        let head_bytes = settings.head.head_bytes as u64;
        let clients_max = settings.connections_max as u64;
        let pooled = (settings.pool_idle_max * upstreams) as u64;
        // Pipelined requests or a partial head, the head kept for another backend, the partial head of an answer.
        let heads = 2 * head_bytes + head_bytes + head_bytes + u64::from(settings.buffer_bytes);
        let client = settings.share_bytes() + heads + LATE_ERROR_BYTES_MAX as u64 + STREAM_BOXES_BYTES;
        // Slabs grow by doubling. Beside each client, its backend's connection and two that are being closed.
        // Streams without a client hold what those with one do.
        let detached_max = settings.detached_max as u64;
        let entries = 2 * (4 * clients_max + 2 * detached_max + pooled) * (slab_entry_bytes() + OPS_BYTES);
        let allocated = (clients_max + detached_max) * client + entries;
        let tls_clients = settings.listeners.iter().any(|listener| listener.tls.is_some());
        let handshakes = settings.tls_handshakes_max.min(settings.connections_max) as u64;
        // A handshake's message may be kept in a buffer that grew by doubling.
        let tls = u64::from(tls_clients)
            * (clients_max * TLS_CONN_BYTES + handshakes * 2 * TLS_HANDSHAKE_BYTES_MAX as u64)
            + u64::from(tls_upstreams) * (clients_max + pooled) * TLS_CONN_BYTES;
        // What waits for the disk, as for durable streams; beyond half of what may, streams go on without it.
        let durable = settings.routes.iter().any(|route| route.resume.is_some_and(|resume| resume.durable));
        let waiting = DURABLE_BACKLOG_BYTES_MAX / 2 + DURABLE_REWRITE_BACKLOG_BYTES_MAX;
        let stored = if durable { 4 * waiting } else { 0 };
        WorstCase {
            buffers: u64::from(settings.buffers) * u64::from(settings.buffer_bytes),
            clients: allocated + allocated / ALLOCATOR_PART,
            // The last one to draw may have its buffer doubled, be moved meanwhile, and be copied into its log.
            overdraft: settings.overdraft_bytes_max
                + settings.overdraft_bytes_max / ALLOCATOR_PART
                + 4 * settings.event_bytes_max as u64,
            resume: {
                let resumes = settings.routes.iter().any(|route| route.resume.is_some());
                let read = resumes || settings.durable.prefix.is_some();
                let mirrors = read && shards > 1 && settings.mirror_readers > 0;
                let kept = settings.resume_bytes_max + settings.resume_bytes_max / ALLOCATOR_PART + stored;
                u64::from(resumes) * kept + u64::from(mirrors) * MIRRORS_MAX as u64 * MIRROR_BYTES
            },
            // An append may end in a segment that is larger than it.
            durable: settings.durable.prefix.as_ref().map_or(0, |_| {
                let bytes = settings.durable.store_bytes_max + LOG_SEGMENT_BYTES_MAX as u64;
                // What waits for the disk: kept until it is synced and given to the kernel, each in a buffer that grew by
                // doubling.
                let waiting = DURABLE_BACKLOG_BYTES_MAX + settings.durable.body_bytes_max;
                let waiting = if settings.durable.on_disk { 4 * waiting } else { 0 };
                bytes + bytes / ALLOCATOR_PART + waiting
            }),
            tls: tls + tls / ALLOCATOR_PART,
            fixed: SHARD_FIXED_BYTES,
            shards: shards as u64,
        }
    }

    /// Of one shard.
    pub fn shard(&self) -> u64 {
        self.buffers + self.clients + self.overdraft + self.resume + self.durable + self.tls + self.fixed
    }

    /// Of the whole process.
    pub fn total(&self) -> u64 {
        self.shards.saturating_mul(self.shard()).saturating_add(PROCESS_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Listener;
    use crate::uring::tests::settings;

    #[test]
    fn every_setting_that_costs_memory_is_in_the_worst_case() {
        let of = |change: &dyn Fn(&mut Settings)| {
            let mut settings = settings();
            change(&mut settings);
            WorstCase::of(&settings, 1, 1, false).total()
        };
        let base = of(&|_| {});
        let more = |change: &dyn Fn(&mut Settings)| of(change) - base;
        assert_eq!(more(&|settings| settings.buffers *= 2), 64 * 4096);
        assert!(more(&|settings| settings.overdraft_bytes_max += 1 << 20) >= 1 << 20);
        assert!(more(&|settings| settings.lag_high_bytes += 1000) >= 100 * 1000);
        assert!(more(&|settings| settings.connections_max += 1) > settings().share_bytes());
        assert!(more(&|settings| settings.head.head_bytes += 1000) >= 100 * 3000);
        assert!(more(&|settings| settings.event_bytes_max += 1 << 20) >= 2 << 20);
        assert!(more(&|settings| settings.pool_idle_max += 100) > 0);
        assert!(more(&|settings| settings.durable.store_bytes_max += 1 << 20) >= 1 << 20);
        assert!(of(&|settings| settings.durable.prefix = None) < base);
        assert!(more(&|settings| settings.detached_max += 10) > 10 * settings().share_bytes());
        let resume = crate::settings::Resume {
            window_bytes: 1,
            window_ms: 0,
            reader_lag_ms: 0,
            leave_choices: crate::settings::LeaveChoices::CANCEL,
            on_leave: crate::settings::OnLeave::Cancel,
            keep_ms: 0,
            slow_reader: crate::settings::SlowReader::Auto,
            durable: false,
        };
        assert!(
            more(&|settings| settings.routes[0].resume = Some(resume)) >= settings().resume_bytes_max,
            "what is kept"
        );
        let stored = |settings: &mut Settings| {
            settings.routes[0].resume = Some(crate::settings::Resume { durable: true, ..resume });
        };
        assert!(
            more(&stored) >= settings().resume_bytes_max + 2 * DURABLE_BACKLOG_BYTES_MAX,
            "what waits for the disk"
        );
        assert!(more(&|settings| settings.durable.on_disk = true) > 2 * DURABLE_BACKLOG_BYTES_MAX);
        let listener = Listener { tls: Some(0) };
        let with_tls = |settings: &mut Settings| settings.listeners = vec![listener];
        assert!(more(&with_tls) > 100 * TLS_CONN_BYTES);
        let more_handshakes = |settings: &mut Settings| {
            with_tls(settings);
            settings.tls_handshakes_max = 50;
        };
        assert!(more(&more_handshakes) < more(&with_tls));
        assert!(WorstCase::of(&settings(), 1, 1, true).total() > base + 100 * TLS_CONN_BYTES);
        let kept_by = |shards: usize| {
            let mut settings = settings();
            settings.routes[0].resume = Some(resume);
            WorstCase::of(&settings, shards, 1, false).resume
        };
        assert_eq!(kept_by(2) - kept_by(1), MIRRORS_MAX as u64 * MIRROR_BYTES);
        let two = WorstCase::of(&settings(), 2, 1, false);
        assert_eq!(two.resume, MIRRORS_MAX as u64 * MIRROR_BYTES, "of durable streams");
        assert_eq!(two.total() - base, two.shard() + two.resume, "each shard has its own");
    }
}
