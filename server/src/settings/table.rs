//! The one definition of every setting. Flags, keys of tokenring.toml, environment variables, validation, the man page,
//! completions and docs/CONFIG.md all come from here.

use super::load::Values;
use super::value::{Kind, Unit, Value};
use super::{Machine, address::AdminAddress};
use protocol::cors::Cors;
use protocol::demo::DemoSettings;
use protocol::limits;
use protocol::phase::Deadlines;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// One setting.
pub(crate) struct Setting {
    /// Of the flag; the key has underscores for dashes, the variable is `TOKENRING_` and the key in capitals.
    pub(crate) name: &'static str,
    pub(crate) group: Group,
    pub(crate) kind: Kind,
    pub(crate) default: Default,
    /// May stand in a `[[route]]` too; overall it is the default of all routes.
    pub(crate) per_route: bool,
    /// Its key in a `[[listener]]`, where it may stand too; overall it is the default of all TLS listeners.
    pub(crate) per_listener: Option<&'static str>,
    /// Its key in an `[[upstream]]`, where it may stand too; overall it is the default of all `https` upstreams.
    pub(crate) per_upstream: Option<&'static str>,
    /// Another spelling of the flag.
    pub(crate) alias: Option<&'static str>,
    /// Another environment variable, read when ours is not set.
    pub(crate) also_variable: Option<&'static str>,
    /// Full sentences; the first one stands alone in the short help.
    pub(crate) doc: &'static str,
}

pub(crate) enum Default {
    Fixed(fn() -> Value),
    /// From the machine and the settings before this one in the table, and how, in words.
    Derived(fn(&Machine, &Values) -> Value, &'static str),
}

/// Headings of the help and of CONFIG.md, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    Serving,
    Tls,
    UpstreamTls,
    Shards,
    Limits,
    Deadlines,
    Streams,
    Pool,
    Durable,
    Demo,
    Logs,
}

impl Group {
    pub(crate) const ALL: [Group; 11] = [
        Group::Serving,
        Group::Tls,
        Group::UpstreamTls,
        Group::Shards,
        Group::Limits,
        Group::Deadlines,
        Group::Streams,
        Group::Pool,
        Group::Durable,
        Group::Demo,
        Group::Logs,
    ];

    pub(crate) fn heading(self) -> &'static str {
        match self {
            Group::Serving => "Serving",
            Group::Tls => "TLS with clients (docs/tls.md)",
            Group::UpstreamTls => "TLS with backends (docs/tls.md)",
            Group::Shards => "Shards (per CPU)",
            Group::Limits => "Limits",
            Group::Deadlines => "Deadlines (also per route; 0 is off)",
            Group::Streams => "Streams (also per route)",
            Group::Pool => "Backend connections (per upstream and shard)",
            Group::Durable => "Durable streams (per shard)",
            Group::Demo => "Built-in demo model",
            Group::Logs => "Logs",
        }
    }
}

impl Setting {
    const fn new(
        name: &'static str,
        group: Group,
        kind: Kind,
        default: fn() -> Value,
        doc: &'static str,
    ) -> Self {
        let default = Default::Fixed(default);
        Setting {
            name,
            group,
            kind,
            default,
            per_route: false,
            per_listener: None,
            per_upstream: None,
            alias: None,
            also_variable: None,
            doc,
        }
    }

    const fn derived(mut self, how: fn(&Machine, &Values) -> Value, words: &'static str) -> Self {
        self.default = Default::Derived(how, words);
        self
    }

    const fn per_route(mut self) -> Self {
        self.per_route = true;
        self
    }

    const fn per_listener(mut self, key: &'static str) -> Self {
        self.per_listener = Some(key);
        self
    }

    const fn per_upstream(mut self, key: &'static str) -> Self {
        self.per_upstream = Some(key);
        self
    }

    const fn alias(mut self, alias: &'static str) -> Self {
        self.alias = Some(alias);
        self
    }

    const fn also_variable(mut self, variable: &'static str) -> Self {
        self.also_variable = Some(variable);
        self
    }

    /// The key in tokenring.toml.
    pub(crate) fn key(&self) -> String {
        self.name.replace('-', "_")
    }

    /// The environment variable.
    pub(crate) fn variable(&self) -> String {
        format!("TOKENRING_{}", self.key().to_ascii_uppercase())
    }

    /// The first sentence of the doc, without its full stop, as short help shows it.
    pub(crate) fn summary(&self) -> &'static str {
        let sentence = self.doc.split_once(". ").map_or(self.doc, |(first, _)| first);
        sentence.trim_end_matches('.')
    }

    /// The default in words that are true on every machine.
    pub(crate) fn default_words(&self) -> String {
        match self.default {
            Default::Derived(_, words) => words.to_owned(),
            Default::Fixed(value) => match value() {
                Value::Integer(number) => number.to_string(),
                Value::Switch(on) => if on { "on" } else { "off" }.to_owned(),
                Value::Choice(word) => word.to_owned(),
                Value::Prefix(prefix) => prefix.unwrap_or_else(|| "off".to_owned()),
                Value::Cors(cors) => cors.to_string(),
                Value::LogFilter(filter) => filter,
                Value::Admin(address) => address.to_string(),
                Value::Listen(addresses) if addresses.is_empty() => "none".to_owned(),
                Value::Listen(addresses) => {
                    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
                }
                Value::Upstreams(_)
                | Value::Cpus(_)
                | Value::File(_)
                | Value::Files(_)
                | Value::ServerName(_) => "none".to_owned(),
            },
        }
    }
}

const fn count(name: &'static str, minimum: u64, maximum: u64) -> Kind {
    Kind::Integer { unit: Unit::Count(name), minimum, maximum, power_of_two: false }
}

const fn power_of_two(name: &'static str, minimum: u64, maximum: u64) -> Kind {
    Kind::Integer { unit: Unit::Count(name), minimum, maximum, power_of_two: true }
}

const fn bytes(minimum: u64, maximum: u64) -> Kind {
    Kind::Integer { unit: Unit::Bytes, minimum, maximum, power_of_two: false }
}

const fn milliseconds(minimum: u64, maximum: u64) -> Kind {
    Kind::Integer { unit: Unit::Milliseconds, minimum, maximum, power_of_two: false }
}

const fn microseconds(minimum: u64, maximum: u64) -> Kind {
    Kind::Integer { unit: Unit::Microseconds, minimum, maximum, power_of_two: false }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Where clients connect when nothing is said.
pub(crate) const LISTEN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
/// A week: longer than any stream, short enough for every type that holds milliseconds.
const DEADLINE_MS_MAX: u64 = 604_800_000;
/// Client connections per shard by default, however many descriptors there are: a million sockets cost the kernel 4 GB.
pub(crate) const CONNECTIONS_DEFAULT_MAX: u64 = 262_144;

macro_rules! settings {
    ($($id:ident = $setting:expr;)*) => {
        $(pub(crate) static $id: Setting = $setting;)*
        /// Every setting, in the order of help, CONFIG.md and of working out defaults.
        pub(crate) static ALL: &[&Setting] = &[$(&$id),*];
    };
}

macro_rules! deadline {
    ($name:literal, $field:ident, $doc:literal) => {
        Setting::new(
            $name,
            Group::Deadlines,
            milliseconds(0, DEADLINE_MS_MAX),
            || Value::Integer(Deadlines::default().$field.into()),
            $doc,
        )
        .per_route()
    };
}

settings! {
    LISTEN = Setting::new("listen", Group::Serving, Kind::Listen, || Value::Listen(Vec::new()),
        "Address clients connect to with plain HTTP. Repeatable; port 0 takes a free one. Every shard has its own listener on it (SO_REUSEPORT).")
        .derived(|_, so_far| Value::Listen(if so_far.listen(&LISTEN_TLS).is_empty() { vec![LISTEN_DEFAULT] } else { Vec::new() }),
            "127.0.0.1:8080, and none when there is a `listen_tls` or `[[listener]]`");
    LISTEN_TLS = Setting::new("listen-tls", Group::Serving, Kind::Listen, || Value::Listen(Vec::new()),
        "Address clients connect to with TLS. Repeatable; needs --tls-cert and --tls-key.");
    UPSTREAM = Setting::new("upstream", Group::Serving, Kind::Upstreams, || Value::Upstreams(Vec::new()),
        "A model backend: any server that speaks the OpenAI or Anthropic API. Repeatable; a path in the URL is put before every request's path. Without any upstream, a built-in demo model answers.");
    ADMIN = Setting::new("admin", Group::Serving, Kind::Admin,
        || Value::Admin(AdminAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 9180)))),
        "Where /live, /ready, /metrics, /status and /streams are served. It has no authentication: keep it off public networks.");
    DRAIN_DEADLINE_MS = Setting::new("drain-deadline-ms", Group::Serving, milliseconds(0, DEADLINE_MS_MAX),
        || Value::Integer(30_000),
        "How long streams may go on after SIGTERM or SIGINT. Those left are ended with an error in their own dialect; 0 ends them at once.")
        .alias("drain-deadline");

    TLS_CERT = Setting::new("tls-cert", Group::Tls, Kind::Files, || Value::Files(Vec::new()),
        "Certificate chain, PEM: the server's own certificate first, then those that lead to its root. Repeatable, each with its --tls-key: a client gets the one whose names (subjectAltName) cover the name it asks for, else the first.")
        .per_listener("cert");
    TLS_KEY = Setting::new("tls-key", Group::Tls, Kind::Files, || Value::Files(Vec::new()),
        "Private key of the --tls-cert in the same place, PEM, not encrypted. Repeatable.")
        .per_listener("key");
    TLS_CLIENT_CA = Setting::new("tls-client-ca", Group::Tls, Kind::File, || Value::File(None),
        "Certificates of the authorities that clients' certificates must come from, PEM.")
        .per_listener("client_ca");
    TLS_CLIENT_AUTH = Setting::new("tls-client-auth", Group::Tls, Kind::Choice(&["off", "optional", "required"]), || Value::Choice("off"),
        "Whether clients are asked for a certificate. With `optional` a client without one is served, and one with a certificate that does not hold is not.")
        .derived(|_, so_far| Value::Choice(if so_far.file(&TLS_CLIENT_CA).is_some() { "required" } else { "off" }),
            "required where there is a `tls_client_ca`, else off")
        .per_listener("client_auth");
    TLS_MIN = Setting::new("tls-min", Group::Tls, Kind::Choice(&["1.2", "1.3"]), || Value::Choice("1.2"),
        "The oldest version of TLS that clients may speak. The newest is 1.3.")
        .per_listener("tls_min");
    TLS_HANDSHAKE_MS = Setting::new("tls-handshake-ms", Group::Tls, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(10_000),
        "From a client's connection to its complete TLS handshake; 0 is off.");
    TLS_HANDSHAKES_MAX = Setting::new("tls-handshakes-max", Group::Tls, count("COUNT", 1, MIB), || Value::Integer(1024),
        "Clients of a shard whose TLS handshake is under way at a time. More wait until one is done.");

    UPSTREAM_CA = Setting::new("upstream-ca", Group::UpstreamTls, Kind::File, || Value::File(None),
        "Certificates of the authorities that backends' certificates must come from, PEM, instead of the system's.")
        .per_upstream("ca");
    UPSTREAM_CERT = Setting::new("upstream-cert", Group::UpstreamTls, Kind::File, || Value::File(None),
        "Certificate chain shown to backends that ask for one, PEM. Needs --upstream-key.")
        .per_upstream("cert");
    UPSTREAM_KEY = Setting::new("upstream-key", Group::UpstreamTls, Kind::File, || Value::File(None),
        "Private key of --upstream-cert, PEM, not encrypted.")
        .per_upstream("key");
    UPSTREAM_SERVER_NAME = Setting::new("upstream-server-name", Group::UpstreamTls, Kind::ServerName, || Value::ServerName(None),
        "Name or address that backends' certificates must be for, and that they are asked for (SNI). By default it is the host of the URL.")
        .per_upstream("server_name");
    UPSTREAM_TLS_INSECURE = Setting::new("upstream-tls-insecure", Group::UpstreamTls, Kind::Switch, || Value::Switch(false),
        "Takes every certificate of a backend: whoever is on the way may read and change everything. For tests only; it is told at start, in /status and in a metric.")
        .per_upstream("tls_insecure");

    CPUS = Setting::new("cpus", Group::Shards, Kind::Cpus, || Value::Cpus(Vec::new()),
        "CPUs to run shards on, shard 0 on the first. Without it, shards are pinned only when there is one for every CPU this process may use.");
    SHARDS = Setting::new("shards", Group::Shards, count("N", 1, 1024), || Value::Integer(1),
        "Shards: threads that each own a ring, a listener and their connections.")
        .derived(|machine, so_far| {
            let chosen = so_far.cpus(&CPUS).len();
            Value::Integer(if chosen > 0 { chosen } else { machine.parallelism } as u64)
        }, "one per CPU of --cpus, else one per CPU this process may use");
    RING_DEPTH = Setting::new("ring-depth", Group::Shards, power_of_two("ENTRIES", 64, 32_768), || Value::Integer(1024),
        "Entries of a shard's submission queue, a power of two. The completion queue has four times as many.");
    BUFFERS = Setting::new("buffers", Group::Shards, power_of_two("COUNT", 16, 32_768), || Value::Integer(1024),
        "Receive buffers of a shard, a power of two. They are shared by its connections; an idle connection holds none.");
    BUFFER_SIZE = Setting::new("buffer-size", Group::Shards, bytes(512, MIB), || Value::Integer(8 * KIB),
        "Bytes of one receive buffer.");
    CONNS_MAX = Setting::new("conns-max", Group::Shards, count("COUNT", 1, 16 * MIB), || Value::Integer(1024),
        "Client connections of a shard at a time. With all slots taken, new clients wait in the kernel's backlog. A relayed client needs two descriptors, its own and its backend's; where there is no upstream at all, one is enough, and this may be set to twice its default.")
        .derived(|machine, so_far| Value::Integer(machine.connections_default(so_far)),
            "what the descriptor limit allows, at most 262144");
    NOTSENT_LOWAT = Setting::new("notsent-lowat", Group::Shards, bytes(0, GIB), || Value::Integer(16 * KIB),
        "TCP_NOTSENT_LOWAT of client sockets. It keeps what the kernel takes ahead of a slow reader small, so that lag is seen; 0 leaves the kernel's default of some megabytes.");
    BACKLOG = Setting::new("backlog", Group::Shards, count("COUNT", 1, 65_535), || Value::Integer(4096),
        "Connections the kernel queues per listener. net.core.somaxconn caps it.");
    SPIN_US = Setting::new("spin-us", Group::Shards, microseconds(0, 1_000_000), || Value::Integer(0),
        "How long a shard polls for completions before it sleeps. Trades CPU for wake-up latency; 0 sleeps at once.");
    PREEMPT_MS = Setting::new("preempt-ms", Group::Shards, milliseconds(1, 1000), || Value::Integer(10),
        "Period of the executor's preemption timer. Background tasks of a shard yield to its connections this often.");
    SLEEP = Setting::new("sleep", Group::Shards, Kind::Choice(&["ring", "reactor"]), || Value::Choice("ring"),
        "Where an idle shard sleeps. In its own data ring, or in the executor's reactor with the ring's eventfd.");

    HEAD_BYTES_MAX = Setting::new("head-bytes-max", Group::Limits, bytes(KIB, MIB),
        || Value::Integer(limits::HEAD_BYTES_MAX as u64),
        "Bytes of a request or response head, its first line included. More is answered with 431.");
    HEADERS_MAX = Setting::new("headers-max", Group::Limits, count("COUNT", 8, limits::HEADERS_MAX as u64),
        || Value::Integer(limits::HEADERS_MAX as u64),
        "Header fields of one head. More is answered with 431.");
    TARGET_BYTES_MAX = Setting::new("target-bytes-max", Group::Limits, bytes(128, MIB),
        || Value::Integer(limits::TARGET_BYTES_MAX as u64),
        "Bytes of a request target. More is answered with 414.");
    BODY_BYTES_MAX = Setting::new("body-bytes-max", Group::Limits, bytes(0, 1 << 40),
        || Value::Integer(limits::BODY_BYTES_MAX),
        "Bytes of one request body. More is answered with 413. Bodies are streamed, never held whole.");
    EVENT_BYTES_MAX = Setting::new("event-bytes-max", Group::Limits, bytes(KIB, GIB),
        || Value::Integer(limits::EVENT_BYTES_MAX as u64),
        "Bytes of one event from a backend. A longer one ends its stream as malformed.");
    LAG_HIGH = Setting::new("lag-high", Group::Limits, bytes(KIB, GIB),
        || Value::Integer(limits::LAG_HIGH_BYTES),
        "Bytes produced for a client but not confirmed sent, above which its backend's receive is paused.");
    LAG_LOW = Setting::new("lag-low", Group::Limits, bytes(0, GIB),
        || Value::Integer(limits::LAG_LOW_BYTES),
        "Bytes below which it is resumed. Less than --lag-high.");
    RETRY_BYTES_MAX = Setting::new("retry-bytes-max", Group::Limits, bytes(0, 64 * MIB), || Value::Integer(MIB),
        "Bytes of a request kept until the first byte of its answer. With them it is sent again, once, when a reused backend connection turns out to be dead. A longer request is not; 0 turns it off.");
    OVERDRAFT_BYTES_MAX = Setting::new("overdraft-bytes-max", Group::Limits, bytes(0, 1 << 40), || Value::Integer(limits::OVERDRAFT_BYTES_MAX),
        "Bytes that the streams and connections of one shard may hold together beyond the share that each has (--lag-high and 128 KiB), for large events, bursts and requests kept for a retry. What finds no room ends with `overload`. At least four times --event-bytes-max.")
        .derived(|_, so_far| Value::Integer((4 * so_far.integer(&EVENT_BYTES_MAX)).max(limits::OVERDRAFT_BYTES_MAX)), "268435456, or four times `event_bytes_max` if that is more");

    HEAD_MS = deadline!("head-ms", head_ms,
        "From a request's first byte to its complete head.");
    BODY_MS = deadline!("body-ms", body_ms,
        "For each 64 KiB of a request body. A trickle does not extend it.");
    CONNECT_MS = deadline!("connect-ms", connect_ms,
        "From the first attempt to a standing backend connection, over all addresses.");
    UPSTREAM_HEAD_MS = deadline!("upstream-head-ms", upstream_head_ms,
        "From the complete request, on a standing connection, to the backend's response head. Many backends send it only with their first token.");
    FIRST_TOKEN_MS = deadline!("first-token-ms", first_token_ms,
        "From the complete request to the first token.");
    BETWEEN_TOKENS_MS = deadline!("between-tokens-ms", between_tokens_ms,
        "Between two events of a stream, or two pieces of an ordinary body.");
    TOTAL_MS = deadline!("total-ms", total_ms,
        "From the complete request head to the last byte produced.");
    WRITE_STALL_MS = deadline!("write-stall-ms", write_stall_ms,
        "How long a client may acknowledge nothing of what is being sent. A slow reader is not a stalled one.");
    KEEP_ALIVE_MS = deadline!("keep-alive-ms", keep_alive_ms,
        "Between two requests on a client's connection, and before its first byte.");
    FINISH_MS = deadline!("finish-ms", finish_ms,
        "From the end mark of a stream to the end of the backend's body. When it passes, the stream still ends well, and that connection is not used again.");

    HEARTBEAT_MS = Setting::new("heartbeat-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(15_000),
        "Silence on a stream after which the client is sent a heartbeat in its dialect's form; 0 is off. Heartbeats extend no deadline.")
        .per_route();
    COMMIT_MS = Setting::new("commit-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(10_000),
        "Time after the complete request at which a streaming answer is begun (200 and a heartbeat) although the backend is still silent; 0 is off. A later error of the backend is then told within the stream.")
        .per_route();
    HALF_CLOSE = Setting::new("half-close", Group::Streams, Kind::Choice(&["leave", "serve"]), || Value::Choice("leave"),
        "What it means when a client closes its sending side during a streaming answer. Either it left, or the answer is still sent. On other requests the answer is always sent.")
        .per_route();
    EVENT_IDS = Setting::new("event-ids", Group::Streams, Kind::Switch, || Value::Switch(true),
        "Adds an `id:` line with the event's sequence number to every event.")
        .per_route();

    CORS = Setting::new("cors", Group::Streams, Kind::Cors, || Value::Cors(Cors::Off),
        "Whose pages may use a route from their visitors' browsers (CORS): those of these origins, of any (*), or only those of its own (off). With it, browsers' preflights are answered here, and a backend's own Access-Control lines are replaced. Durable streams have --durable-cors.")
        .per_route();

    RESUME_WINDOW = Setting::new("resume-window", Group::Streams, bytes(0, GIB), || Value::Integer(limits::RESUME_WINDOW_BYTES),
        "Bytes of a streamed answer that are kept behind its readers, so that clients can come back for them (`GET /v1/streams/{id}`); 0 switches that off, as does event-ids off.")
        .per_route();
    RESUME_WINDOW_MS = Setting::new("resume-window-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(limits::RESUME_WINDOW_MS.into()),
        "How long what was delivered of a stream under way is kept, to a quarter; 0 keeps it as long as resume-window has room. When the stream is over, keep-ms counts. It does not hold for responses in background.")
        .per_route();
    ON_LEAVE = Setting::new("on-leave", Group::Streams, Kind::Choice(&["cancel", "detach", "finish"]), || Value::Choice("detach"),
        "What becomes of a stream that can be resumed when its last client leaves. It is cancelled at once; goes on for detach-ms; or goes on to its end.")
        .per_route();
    DETACH_MS = Setting::new("detach-ms", Group::Streams, milliseconds(1, DEADLINE_MS_MAX), || Value::Integer(limits::DETACH_MS.into()),
        "How long a stream goes on without a client before its backend is cancelled.")
        .per_route();
    ON_LEAVE_MAX = Setting::new("on-leave-max", Group::Streams, Kind::Choice(&["own", "off", "cancel", "detach", "finish"]), || Value::Choice("own"),
        "The most that a request may choose instead, by `Tokenring-On-Leave`: cancel costs a backend least, finish most. own is what on-leave says, and what costs less; with off requests choose nothing.")
        .per_route();
    DETACH_MS_MAX = Setting::new("detach-ms-max", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(0),
        "The longest time that a request may choose for detach; one that asks for more gets this. 0 is detach-ms.")
        .per_route();
    KEEP_MS = Setting::new("keep-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(limits::KEEP_MS.into()),
        "How long a stream that is over can still be read.")
        .per_route();
    SLOW_READER = Setting::new("slow-reader", Group::Streams, Kind::Choice(&["auto", "block", "drop", "skip"]), || Value::Choice("auto"),
        "What becomes of a reader that is slower than its stream. The backend is paused for it (block); or, when the window has left it behind, it is told so and closed (drop), or told which events it misses and given the newest (skip). auto blocks for a single reader and drops one of several.")
        .per_route();
    DURABLE = Setting::new("durable", Group::Streams, Kind::Switch, || Value::Switch(false),
        "Writes the streamed answers of a route that can be resumed to --data-dir, so that they can be resumed when the server was restarted, too (docs/streams.md).")
        .per_route();
    READER_LAG_MS = Setting::new("reader-lag-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(0),
        "How long a reader by id may be behind a stream under way, to a quarter, before slow-reader holds for it as if the window had left it behind, and with block its backend is paused; 0 is for ever. One that begins with what is older has this long to catch up.")
        .per_route();
    BACKGROUND_KEEP_MS = Setting::new("background-keep-ms", Group::Streams, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(limits::BACKGROUND_KEEP_MS.into()),
        "How long a response in background can still be read when it is over, at least; keep-ms of its route may say more.");
    BACKGROUND_WINDOW = Setting::new("background-window", Group::Streams, bytes(1, GIB), || Value::Integer(limits::BACKGROUND_WINDOW_BYTES),
        "Bytes of a response in background that are kept for those who come back, at least; resume-window of its route may say more.");
    RESUME_BYTES_MAX = Setting::new("resume-bytes-max", Group::Limits, bytes(64 * KIB, 1 << 40),
        || Value::Integer(limits::RESUME_BYTES_MAX),
        "Memory of one shard for what is kept of streams. For more, finished streams are given up, oldest first, then the oldest events of streams without a client, then what others have read.");
    DETACHED_MAX = Setting::new("detached-max", Group::Limits, count("COUNT", 0, 1 << 24),
        || Value::Integer(1024),
        "Streams of one shard that go on without a client at a time; those beyond are cancelled.");
    RESUMES_PER_S = Setting::new("resumes-per-s", Group::Limits, count("COUNT", 1, 1_000_000),
        || Value::Integer(limits::RESUMES_PER_S.into()),
        "Readers of kept streams that begin on one shard within a second. When more come back at once, the others wait, first come, first served, and are sent heartbeats.");
    MIRROR_READERS = Setting::new("mirror-readers", Group::Limits, count("COUNT", 0, 1 << 24),
        || Value::Integer(limits::MIRROR_READERS as u64),
        "Readers that a stream has on its own shard before clients of other shards read it there: from then on each shard has a copy of what is kept of the stream, and serves its own readers. Of live readers of durable streams some are handed over to other shards from then on. Below, all are on the stream's shard; 0: always.");

    POOL_IDLE_MAX = Setting::new("pool-idle-max", Group::Pool, count("COUNT", 0, 65_535), || Value::Integer(64),
        "Idle backend connections kept for reuse; 0 closes each after its answer.");
    POOL_IDLE_MS = Setting::new("pool-idle-ms", Group::Pool, milliseconds(1, DEADLINE_MS_MAX), || Value::Integer(4_000),
        "How long an idle backend connection is kept. Less than the backend's own keep-alive (5 s in uvicorn and llama.cpp) avoids retries.");
    POOL_AGE_MS = Setting::new("pool-age-ms", Group::Pool, milliseconds(0, DEADLINE_MS_MAX), || Value::Integer(300_000),
        "Age after which a backend connection takes no further request, so that load follows changes of the backends' addresses; 0 is off.");

    DURABLE_PREFIX = Setting::new("durable-prefix", Group::Durable, Kind::Prefix, || Value::Prefix(Some("/v1/durable".to_owned())),
        "Where durable streams are served. Requests under it go to no backend. Whoever can connect may publish and read; off serves none.");
    DURABLE_BODY_BYTES_MAX = Setting::new("durable-body-bytes-max", Group::Durable, bytes(KIB, GIB),
        || Value::Integer(limits::DURABLE_BODY_BYTES_MAX),
        "Bytes of one append. More is answered with 413.");
    DURABLE_STREAM_BYTES_MAX = Setting::new("durable-stream-bytes-max", Group::Durable, bytes(KIB, 1 << 40),
        || Value::Integer(limits::DURABLE_STREAM_BYTES_MAX),
        "Bytes of one stream that are held. Beyond, its oldest messages are dropped, and reading from before them is answered with 410.");
    DURABLE_RETENTION_MS = Setting::new("durable-retention-ms", Group::Durable, milliseconds(0, 365 * 86_400_000), || Value::Integer(0),
        "How long a message is held, to a quarter; then it is dropped like one that is beyond durable-stream-bytes-max, from memory and disk. What forks share with their source goes for all of them. 0 holds it as long as there is room.");
    DURABLE_STORE_BYTES_MAX = Setting::new("durable-store-bytes-max", Group::Durable, bytes(64 * KIB, 1 << 40),
        || Value::Integer(limits::DURABLE_STORE_BYTES_MAX),
        "Memory of all streams. Each shard has an equal share, but no less than durable-stream-bytes-max. For more, closed streams are given up, then the oldest messages of open ones, least recently used first and none that is being read; if that is not enough, publishing is answered with 503.");
    DURABLE_LONG_POLL_MS = Setting::new("durable-long-poll-ms", Group::Durable, milliseconds(1, 600_000),
        || Value::Integer(limits::DURABLE_LONG_POLL_MS.into()),
        "How long a long-poll waits for data.");
    DURABLE_EVENTS_MS = Setting::new("durable-events-ms", Group::Durable, milliseconds(0, DEADLINE_MS_MAX),
        || Value::Integer(limits::DURABLE_EVENTS_MS.into()),
        "After how long an event stream is ended, between two events, so that its reader comes again and caches can share it; 0 is never.");
    DURABLE_CORS = Setting::new("durable-cors", Group::Durable, Kind::Switch, || Value::Switch(true),
        "Lets pages of any origin use durable streams (CORS).");

    DATA_DIR = Setting::new("data-dir", Group::Durable, Kind::Folder, || Value::File(None),
        "Where streams are written, so that they outlive the process (docs/durable.md). Durable streams all, relayed ones of routes that say durable; without it they are held in memory only. The directory is made if it is not there; one process has it at a time.");
    FSYNC_INTERVAL = Setting::new("fsync-interval", Group::Durable, milliseconds(0, 60_000), || Value::Integer(0),
        "The longest time between a write to --data-dir and its sync. With 0 an append is answered, and an event of a durable route delivered, only when it is synced, and survives the loss of power; otherwise an append is answered when it is written, which survives a crash of the process, and events are delivered at once.");

    DEMO_TOKENS_PER_S = Setting::new("demo-tokens-per-s", Group::Demo, count("RATE", 1, 100_000), || Value::Integer(DemoSettings::default().tokens_per_s.into()),
        "Tokens per second of the demo model, when a request does not say otherwise.");
    DEMO_FIRST_TOKEN_MS = Setting::new("demo-first-token-ms", Group::Demo, milliseconds(0, 600_000), || Value::Integer(DemoSettings::default().first_token_ms.into()),
        "Time to its first token.");
    DEMO_TOKENS = Setting::new("demo-tokens", Group::Demo, count("COUNT", 1, 100_000), || Value::Integer(DemoSettings::default().tokens.into()),
        "Tokens of one answer.");

    LOG_LEVEL = Setting::new("log-level", Group::Logs, Kind::LogFilter, || Value::LogFilter("info".to_owned()),
        "What is logged to stderr: a level, or levels per target such as warn,shard=debug.")
        .also_variable("RUST_LOG");
    LOG_FORMAT = Setting::new("log-format", Group::Logs, Kind::Choice(&["text", "json"]), || Value::Choice("text"),
        "Lines of text, or one JSON object a line.");
    ACCESS_LOG = Setting::new("access-log", Group::Logs, Kind::Switch, || Value::Switch(false),
        "One line for every finished stream.");
}

/// The setting with this key of tokenring.toml.
pub(crate) fn by_key(key: &str) -> Option<&'static Setting> {
    ALL.iter().find(|setting| setting.key() == key).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_docs_are_sentences() {
        for (index, setting) in ALL.iter().enumerate() {
            assert!(ALL[..index].iter().all(|other| other.name != setting.name), "{} twice", setting.name);
            assert!(setting.doc.ends_with('.'), "{}", setting.name);
            assert!(
                setting.name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'),
                "{}",
                setting.name
            );
        }
    }

    #[test]
    fn defaults_obey_their_own_rules() {
        for setting in ALL {
            if let Default::Fixed(value) = setting.default {
                match value() {
                    Value::Integer(number) => {
                        assert!(setting.kind.integer(number).is_some(), "{}", setting.name)
                    }
                    Value::Choice(word) => assert!(setting.kind.parse(word).is_ok(), "{}", setting.name),
                    _ => {}
                }
            }
        }
    }
}
