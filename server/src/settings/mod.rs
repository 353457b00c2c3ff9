//! Configuration: one definition per setting (`table`), read from flags, environment and file (`file`, `load`), checked as
//! a whole and turned into what the shards are given (`plan`), and printed as documentation (`page`).

pub(crate) mod address;
pub(crate) mod file;
pub(crate) mod load;
pub(crate) mod page;
pub(crate) mod plan;
pub(crate) mod table;
pub(crate) mod tls;
pub(crate) mod value;

use protocol::limits::ACCEPTS_ARMED_MAX;
use std::borrow::Cow;
use std::fmt;

/// Descriptors of the process that belong to no connection: listeners, logs, admin clients, DNS, eventfds.
const DESCRIPTORS_RESERVED: u64 = 128;
/// Descriptors of one shard that belong to no connection: its rings, eventfds and listeners.
const DESCRIPTORS_PER_SHARD: u64 = 16;
/// More of them with several shards: clients that it accepts while others are handed to it.
const DESCRIPTORS_PARKED: u64 = ACCEPTS_ARMED_MAX as u64;
/// Descriptors of one relayed client: its own socket and its backend's.
const DESCRIPTORS_PER_CLIENT: u64 = 2;
/// Descriptors that a client may need: of one that no backend serves, its own socket is all.
pub(crate) fn descriptors_per_client(has_upstreams: bool) -> u64 {
    if has_upstreams { DESCRIPTORS_PER_CLIENT } else { 1 }
}
/// Bytes of a problem: it quotes what was found, whatever that is.
const PROBLEM_BYTES_MAX: usize = 1024;
/// Below this many connections per shard a server is of no use; the default never goes lower, the check then complains.
const CONNECTIONS_DEFAULT_MIN: u64 = 16;

/// Where something stands in a file; line and column count from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) file: String,
    pub(crate) line: usize,
    pub(crate) column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", one_line(&self.file), self.line, self.column)
    }
}

/// With control characters as Rust escapes them.
fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let escaped =
        text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() });
    Cow::Owned(escaped.collect())
}

/// A mistake of the operator, in one line: where, what was expected, what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Problem(String);

impl Problem {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        let message = message.into();
        let mut line = one_line(&message).into_owned();
        if line.len() > PROBLEM_BYTES_MAX {
            let end = (0..=PROBLEM_BYTES_MAX - 3).rev().find(|&end| line.is_char_boundary(end));
            line.truncate(end.unwrap_or_default());
            line.push_str("...");
        }
        Problem(line)
    }

    pub(crate) fn at(place: &Place, message: &str) -> Self {
        Problem::new(format!("{place}: {message}"))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `u64::MAX` where the system does not say.
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let total = total_kib.and_then(|kib| kib.parse::<u64>().ok()).map_or(u64::MAX, |kib| kib * 1024);
    // In a container this is its own; "max" is none.
    let cgroup = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    cgroup.trim().parse::<u64>().map_or(total, |limit| limit.min(total))
}

/// What defaults and checks need to know of the machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// CPUs' worth of time this process may use (affinity and cgroup quota).
    pub(crate) parallelism: usize,
    /// CPUs this process may run on.
    pub(crate) cpus: Vec<usize>,
    /// The hard limit of descriptors, to which the soft one is raised at start.
    pub(crate) descriptors: u64,
    /// Memory of the machine, or of the cgroup that this process is confined to, bytes.
    pub(crate) memory: u64,
}

/// Descriptors that are neither a client's nor its backend's.
pub(crate) fn descriptors_elsewhere(shards: u64) -> u64 {
    let parked = if shards > 1 { DESCRIPTORS_PARKED } else { 0 };
    DESCRIPTORS_RESERVED + shards * (DESCRIPTORS_PER_SHARD + parked)
}

impl Machine {
    pub(crate) fn detect() -> Self {
        let mut cpus: Vec<usize> =
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        cpus.sort_unstable();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        Machine {
            parallelism: std::thread::available_parallelism().map_or(1, usize::from),
            cpus,
            descriptors: limit.maximum.or(limit.current).unwrap_or(u64::MAX),
            memory: memory(),
        }
    }

    /// Client connections per shard that the descriptors allow beside full pools of idle backend connections.
    pub(crate) fn connections_default(&self, so_far: &load::Values) -> u64 {
        let shards = so_far.integer(&table::SHARDS);
        let upstreams = so_far.upstreams(&table::UPSTREAM).len() as u64;
        let pooled = shards * upstreams * so_far.integer(&table::POOL_IDLE_MAX);
        // Pools may take at most half: they are the part that can be given up.
        let left = self.left_for_connections(shards);
        let left = left - pooled.min(left / 2);
        (left / (DESCRIPTORS_PER_CLIENT * shards))
            .clamp(CONNECTIONS_DEFAULT_MIN, table::CONNECTIONS_DEFAULT_MAX)
    }

    /// Descriptors left for connections of all shards together.
    pub(crate) fn left_for_connections(&self, shards: u64) -> u64 {
        self.descriptors.saturating_sub(descriptors_elsewhere(shards))
    }
}
