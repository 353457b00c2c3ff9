//! What a shard is told at its start and by snapshots later. Built and validated by `server`; immutable here.

use protocol::cors::Cors;
use protocol::demo::DemoSettings;
use protocol::durable;
use protocol::http::HeadLimits;
use protocol::phase::Deadlines;
use protocol::resume::Leave;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// Everything of one process that does not change while it runs; shared read-only by its shards.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Client connections of one shard at a time, > 0.
    pub connections_max: usize,
    /// What the listeners speak, in their order; those beyond speak plain HTTP.
    pub listeners: Vec<Listener>,
    /// Milliseconds from a client's connection to its complete TLS handshake; 0 is off.
    pub tls_handshake_ms: u32,
    /// Clients of one shard whose TLS handshake is under way at a time, > 0.
    pub tls_handshakes_max: usize,
    /// Pending connections in the kernel per listener (`listen(2)`).
    pub backlog: u32,
    /// Entries of the submission queue, a power of two; the completion queue has four times as many.
    pub ring_depth: u32,
    /// Receive buffers of one shard, a power of two <= 32768.
    pub buffers: u16,
    /// Bytes of one receive buffer.
    pub buffer_bytes: u32,
    /// `TCP_NOTSENT_LOWAT` of client sockets, bytes; 0 leaves the kernel's default.
    pub notsent_lowat_bytes: u32,
    /// Microseconds to spin for completions before sleeping; 0 sleeps at once.
    pub spin_us: u32,
    /// Milliseconds after which glommio's preemption timer fires.
    pub preempt_ms: u32,
    /// Where an idle shard sleeps.
    pub sleep: Sleep,
    /// Limits of request and response heads.
    pub head: HeadLimits,
    /// Bytes of one request body.
    pub body_bytes_max: u64,
    /// Bytes of one SSE event from a backend.
    pub event_bytes_max: usize,
    /// Lag in bytes above which the producer's receive is paused.
    pub lag_high_bytes: u64,
    /// Lag in bytes below which it is resumed; `< lag_high_bytes`.
    pub lag_low_bytes: u64,
    /// Bytes of a request kept for one more attempt on a fresh backend connection.
    pub retry_bytes_max: u64,
    /// Bytes that streams and connections of one shard may hold together beyond the share of each.
    pub overdraft_bytes_max: u64,
    /// Idle backend connections kept per upstream and shard.
    pub pool_idle_max: usize,
    /// Milliseconds an idle backend connection is kept.
    pub pool_idle_ms: u32,
    /// Milliseconds after which a backend connection is not used again; 0 is off.
    pub pool_age_ms: u32,
    /// Routes, most specific first; the last one matches every path.
    pub routes: Vec<Route>,
    /// Memory of what is kept of streams for those who come back, bytes of one shard.
    pub resume_bytes_max: u64,
    /// Streams of one shard that go on without a client at a time.
    pub detached_max: usize,
    /// Readers that begin on a shard within a second; the others wait their turn, > 0.
    pub resumes_per_s: u32,
    /// Readers that a stream has before clients of other shards read it there, without being moved; 0: they are always moved.
    pub mirror_readers: usize,
    /// Milliseconds that a response in background is kept when it is over, if its route keeps none longer.
    pub background_keep_ms: u32,
    /// Bytes of a response in background that are kept, if its route keeps no more.
    pub background_window_bytes: u64,
    /// Authenticates the ids of streams; the same in all shards.
    pub stream_key: [u8; 32],
    /// Number of the first stream that a shard names, > 0: no earlier process with this key has given it, or one beyond.
    pub stream_number_first: u64,
    /// Durable streams: where they are, and their limits.
    pub durable: durable::Settings,
    /// What the demo model does when a request does not say otherwise.
    pub demo: DemoSettings,
    /// Report every finished stream to the control thread (for the access log).
    pub records: bool,
    /// Seconds since 1970 at the start of the process.
    pub unix_time_at_start_s: u64,
    /// Milliseconds of that second, < 1000.
    pub unix_time_at_start_ms: u32,
    /// Seed of everything random in a shard (the shard's number is mixed in).
    pub seed: u64,
}

/// What is spoken on one listening address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Listener {
    /// TLS, as this one of [`TlsSet::servers`] says; `None`: plain HTTP.
    pub tls: Option<usize>,
}

/// Certificates, keys and roots as last read; a new one replaces the old one whole, for connections that begin after it.
#[derive(Clone, Debug, Default)]
pub struct TlsSet {
    /// Counts up with every change.
    pub epoch: u64,
    /// By [`Listener::tls`].
    pub servers: Vec<Arc<ServerConfig>>,
    /// By [`UpstreamTls::config`]. Each shard keeps sessions for resumption of its own, whatever store these name.
    pub clients: Vec<Arc<ClientConfig>>,
}

/// Where an idle shard sleeps (docs/decisions/002-where-a-shard-sleeps.md).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sleep {
    /// In the data ring; glommio is polled between turns.
    Ring,
    /// In glommio's reactor, woken by an eventfd of the data ring.
    Reactor,
}

/// How requests of one part of the path space are treated.
#[derive(Clone, Debug)]
pub struct Route {
    /// Name in logs and `/status`.
    pub name: String,
    /// Requests whose path starts with this, at a path segment's boundary; "/" matches all.
    pub path_prefix: String,
    /// Indexes into [`UpstreamSet::upstreams`]; empty: the demo model answers.
    pub upstreams: Vec<usize>,
    /// The deadlines.
    pub deadlines: Deadlines,
    /// Silence on the client's side after which a heartbeat is sent, ms; 0 is off.
    pub heartbeat_ms: u32,
    /// Time after the complete request at which a streaming answer is committed (200 and a first heartbeat) although the
    /// backend has not answered yet, ms; 0 is off.
    pub commit_ms: u32,
    /// What a FIN alone means on a streaming request.
    pub half_close: HalfClose,
    /// Add `id:` lines to events.
    pub event_ids: bool,
    /// Whose pages may use the route.
    pub cors: Cors,
    /// How streams outlive their connections; `None`: they do not.
    pub resume: Option<Resume>,
}

/// How the streams of a route outlive their connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resume {
    /// Bytes of what was delivered that are kept, > 0.
    pub window_bytes: u64,
    /// Milliseconds that it is kept while the stream is under way; 0: as long as the window has room.
    pub window_ms: u32,
    /// What becomes of a stream when its last client has left.
    pub on_leave: OnLeave,
    /// What a request may choose instead.
    pub leave_choices: LeaveChoices,
    /// Milliseconds that a stream which is over is kept.
    pub keep_ms: u32,
    /// What becomes of a reader that is too slow.
    pub slow_reader: SlowReader,
    /// Whether they are written to disk, where there is one.
    pub durable: bool,
    /// Milliseconds that it may be behind, besides the window's bytes; 0: for ever.
    pub reader_lag_ms: u32,
}

/// What becomes of a stream when its last client has left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnLeave {
    /// It ends, and its backend is let go at once.
    Cancel,
    /// It goes on for this long, ms, > 0, as far as its window; then it ends.
    Detach(u32),
    /// It goes on to its end, however long nobody reads it.
    Finish,
}

impl fmt::Display for OnLeave {
    /// As `Tokenring-On-Leave` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OnLeave::Cancel => f.write_str("cancel"),
            OnLeave::Detach(ms) => write!(f, "detach;ttl={}", ms.div_ceil(1000)),
            OnLeave::Finish => f.write_str("finish"),
        }
    }
}

/// What requests of a route may choose for when their last client has left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaveChoices {
    /// To end at once.
    pub cancel: bool,
    /// How long a stream goes on if its request does not say, ms, > 0.
    pub detach_ms: u32,
    /// How long it goes on at most, ms; 0: this cannot be chosen.
    pub detach_ms_max: u32,
    /// To go on to the end.
    pub finish: bool,
}

impl LeaveChoices {
    /// Where streams do not outlive their connections, only this can be asked for.
    pub const CANCEL: LeaveChoices =
        LeaveChoices { cancel: true, detach_ms: 1, detach_ms_max: 0, finish: false };

    /// What a request gets that asks for this; `None`: it may not. One that asks for more time than there is gets what there is.
    pub fn choose(&self, leave: Leave) -> Option<OnLeave> {
        match leave {
            Leave::Cancel => self.cancel.then_some(OnLeave::Cancel),
            Leave::Detach { .. } if self.detach_ms_max == 0 => None,
            Leave::Detach { ttl_s } => {
                let ms = ttl_s.map_or(self.detach_ms, |seconds| seconds.saturating_mul(1000));
                Some(OnLeave::Detach(ms.min(self.detach_ms_max)))
            }
            Leave::Finish => self.finish.then_some(OnLeave::Finish),
        }
    }
}

/// What becomes of a reader that is slower than its stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlowReader {
    /// As `Block` while it is the only one, as `Drop` where there are more.
    Auto,
    /// The backend is paused for it.
    Block,
    /// When the window has left it behind, it is told so and its connection closed; it may come back.
    Drop,
    /// When the window has left it behind, it is told which events it misses, and goes on with the newest.
    Skip,
}

/// What a FIN without RST means while a streaming answer is under way. On other requests the answer is always sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HalfClose {
    /// The client left.
    Leave,
    /// The client only closed its sending side; the answer is still sent.
    Serve,
}

/// The backends as last resolved; a new one replaces the old one whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamSet {
    /// Counts up with every change.
    pub epoch: u64,
    /// The backends; indexes are stable over the life of the process.
    pub upstreams: Vec<Upstream>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// As configured, for logs, metrics and `/status`.
    pub url: String,
    /// The `Host` it is sent.
    pub authority: String,
    /// Path prefixed to every request's target; empty or "/v" form without a trailing slash.
    pub base_path: String,
    /// Its addresses in order of preference; empty while its name cannot be resolved.
    pub addresses: Vec<SocketAddr>,
    /// `https`; `None`: `http`.
    pub tls: Option<UpstreamTls>,
}

/// How a backend is spoken to over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Which of [`TlsSet::clients`].
    pub config: usize,
    /// The name (or address) that its certificate must be for, sent as SNI if it is a name.
    pub name: ServerName<'static>,
}
