//! What this machine offers and lacks, for `tokenring doctor`: every item with what was found and what to do.

use io_uring::{Probe, opcode};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Locked memory that glommio's rings need per executor, bytes.
const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Descriptors below which a server is not worth starting.
const NOFILE_MIN: u64 = 1024;
/// Pending connections a listener asks for by default.
const BACKLOG_ADVISED: u64 = 4096;
/// The oldest kernel with DEFER_TASKRUN and all multishots.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// One thing looked at.
#[derive(Clone, Debug)]
pub struct ProbeItem {
    /// What.
    pub name: &'static str,
    /// Good enough to run.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// What to do about it; advice even where `ok`, or empty.
    pub remedy: String,
}

impl ProbeItem {
    fn new(name: &'static str, ok: bool, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        ProbeItem { name, ok, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at everything the data plane needs. Changes nothing; takes a few milliseconds.
pub fn probe() -> Vec<ProbeItem> {
    let mut items = vec![kernel(), io_uring_disabled()];
    items.extend(ring());
    items.extend([memlock(), nofile(), somaxconn(), migrate_requests()]);
    items
}

/// Raises the soft limit of open files to the hard one; returns `(soft before, soft now)`.
///
/// # Errors
/// When the kernel refuses to say or to change it.
pub fn raise_nofile() -> io::Result<(u64, u64)> {
    let (soft, hard) = limit(libc::RLIMIT_NOFILE)?;
    if soft < hard {
        let raised = libc::rlimit { rlim_cur: hard, rlim_max: hard };
        // SAFETY: the pointer names `raised`, which outlives the call.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok((soft, hard))
}

/// Makes the process's descriptor table large enough for `count` descriptors at once. The kernel grows it by doubling, and
/// each time waits for an RCU grace period (10 to 30 ms) when the table is shared between threads: a shard would stand still
/// in an accept or a connect. To be called before the shards are started.
///
/// # Errors
/// When the kernel refuses, as it does above the limit of open files.
pub fn reserve_descriptors(count: u64) -> io::Result<()> {
    let Some(last) = i32::try_from(count).ok().and_then(|count| count.checked_sub(1)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let any = std::fs::File::open("/dev/null")?;
    // SAFETY: `any` is open; the call makes a new descriptor and touches no memory of ours.
    let copy = unsafe { libc::fcntl(any.as_raw_fd(), libc::F_DUPFD_CLOEXEC, last) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours alone.
    drop(unsafe { OwnedFd::from_raw_fd(copy) });
    Ok(())
}

/// `(soft, hard)`.
fn limit(resource: libc::__rlimit_resource_t) -> io::Result<(u64, u64)> {
    let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer names `found`, which outlives the call.
    if unsafe { libc::getrlimit(resource, &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found.rlim_cur, found.rlim_max))
}

fn sysctl(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// As `uname -r`; "unknown" without /proc.
pub(super) fn kernel_release() -> String {
    sysctl("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned())
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel() -> ProbeItem {
    let release = kernel_release();
    let ok = version_of(&release).is_none_or(|version| version >= KERNEL_MIN);
    let remedy = if ok { "" } else { "run Linux 6.1 or newer (io_uring with deferred task work)" };
    ProbeItem::new("kernel >= 6.1", ok, release, remedy)
}

fn io_uring_disabled() -> ProbeItem {
    const NAME: &str = "sysctl kernel.io_uring_disabled";
    // 0: all may; 1: only CAP_SYS_ADMIN and the group kernel.io_uring_group; 2: nobody. Kernels before 6.6 have no such switch.
    match sysctl("/proc/sys/kernel/io_uring_disabled").as_deref() {
        None => ProbeItem::new(NAME, true, "not present", ""),
        Some("0") => ProbeItem::new(NAME, true, "0", ""),
        // Whether this process is among the privileged ones is shown by the ring itself.
        Some("1") => ProbeItem::new(
            NAME,
            true,
            "1 (privileged processes only)",
            "sysctl kernel.io_uring_disabled=0, or add the user to the group in kernel.io_uring_group",
        ),
        Some(other) => ProbeItem::new(NAME, false, other, "sysctl kernel.io_uring_disabled=0"),
    }
}

fn ring() -> Vec<ProbeItem> {
    let ring = match super::build_ring(8) {
        Ok(ring) => ring,
        Err(error) => return vec![ProbeItem::new("io_uring", false, "not usable", error.to_string())],
    };
    let mut items = vec![ProbeItem::new("io_uring", true, "usable, with deferred task work", "")];

    let needed = [
        ("ACCEPT", opcode::Accept::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
        ("CLOSE", opcode::Close::CODE),
        ("CONNECT", opcode::Connect::CODE),
        ("POLL_ADD", opcode::PollAdd::CODE),
        ("READ", opcode::Read::CODE),
        ("RECV", opcode::Recv::CODE),
        ("SEND", opcode::Send::CODE),
    ];
    let mut probe = Probe::new();
    let missing: Vec<&str> = match ring.submitter().register_probe(&mut probe) {
        Ok(()) => {
            needed.iter().filter(|(_, code)| !probe.is_supported(*code)).map(|(name, _)| *name).collect()
        }
        Err(_) => vec!["all (the kernel does not answer the probe)"],
    };
    let ok = missing.is_empty();
    items.push(ProbeItem::new(
        "io_uring operations",
        ok,
        if ok { "all there".to_owned() } else { format!("missing: {}", missing.join(", ")) },
        if ok { "" } else { "run Linux 6.1 or newer; a sandbox (gVisor) may implement io_uring in part" },
    ));

    let buffers = super::buffers::BufferRing::new(2, 4096).and_then(|buffers| {
        // SAFETY: two zeroed entries aligned to a page, which live until they are unregistered below.
        unsafe { ring.submitter().register_buf_ring_with_flags(buffers.address(), buffers.count(), 0, 0) }?;
        let result = ring.submitter().unregister_buf_ring(0);
        if result.is_err() {
            std::mem::forget(buffers);
        }
        result
    });
    items.push(match buffers {
        Ok(()) => ProbeItem::new("io_uring buffer ring", true, "usable", ""),
        Err(error) => ProbeItem::new(
            "io_uring buffer ring",
            false,
            error.to_string(),
            "run Linux 6.1 or newer; with ENOMEM raise the locked-memory limit (ulimit -l, LimitMEMLOCK=)",
        ),
    });
    items
}

fn memlock() -> ProbeItem {
    const NAME: &str = "locked memory (memlock) >= 512 KiB";
    match limit(libc::RLIMIT_MEMLOCK) {
        Ok((soft, hard)) => {
            let text = |bytes| {
                if bytes == libc::RLIM_INFINITY {
                    "unlimited".to_owned()
                } else {
                    format!("{} KiB", bytes / 1024)
                }
            };
            let ok = soft >= MEMLOCK_BYTES_MIN;
            let remedy = if ok { "" } else { "ulimit -l 8192, or LimitMEMLOCK=8M in the systemd unit" };
            ProbeItem::new(NAME, ok, format!("soft {}, hard {}", text(soft), text(hard)), remedy)
        }
        Err(error) => ProbeItem::new(NAME, false, error.to_string(), "allow getrlimit(2)"),
    }
}

fn nofile() -> ProbeItem {
    const NAME: &str = "open files (descriptors)";
    match limit(libc::RLIMIT_NOFILE) {
        Ok((soft, hard)) => ProbeItem::new(
            NAME,
            hard >= NOFILE_MIN,
            format!("soft {soft}, hard {hard}"),
            "each client takes one and its backend connection another; the soft limit is raised to the hard one at start, the \
             hard one by LimitNOFILE=1048576 in the systemd unit",
        ),
        Err(error) => ProbeItem::new(NAME, false, error.to_string(), "allow getrlimit(2)"),
    }
}

fn somaxconn() -> ProbeItem {
    let found = sysctl("/proc/sys/net/core/somaxconn").and_then(|text| text.parse::<u64>().ok());
    let remedy = match found {
        Some(found) if found >= BACKLOG_ADVISED => String::new(),
        _ => format!(
            "sysctl net.core.somaxconn={BACKLOG_ADVISED}: the kernel cuts every listener's backlog to it"
        ),
    };
    let found = found.map_or("unknown".to_owned(), |found| found.to_string());
    // A short backlog costs connections under a storm, not correctness.
    ProbeItem::new("sysctl net.core.somaxconn", true, found, remedy)
}

fn migrate_requests() -> ProbeItem {
    let found = sysctl("/proc/sys/net/ipv4/tcp_migrate_req");
    let remedy = match found.as_deref() {
        Some("1") => "",
        _ => {
            "net.ipv4.tcp_migrate_req=1 hands the accept queue of a closed listener to the others; without it connections \
             queued there are reset when a shard goes away"
        }
    };
    ProbeItem::new("sysctl net.ipv4.tcp_migrate_req", true, found.unwrap_or("not present".to_owned()), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_run_the_tests_of_this_folder() {
        for item in probe() {
            assert!(item.ok, "{item:?}");
        }
    }

    #[test]
    fn versions_are_read_out_of_releases() {
        assert_eq!(version_of("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version_of("5.10.0-26-amd64"), Some((5, 10)));
        assert_eq!(version_of("unknown"), None);
    }

    #[test]
    fn the_soft_limit_of_files_is_raised_to_the_hard_one() {
        let (_, now) = raise_nofile().unwrap();
        assert_eq!(limit(libc::RLIMIT_NOFILE).unwrap(), (now, now));
        assert_eq!(raise_nofile().unwrap(), (now, now));
    }

    #[test]
    fn descriptors_are_reserved_up_to_the_limit() {
        let (_, limit) = raise_nofile().unwrap();
        reserve_descriptors(limit).unwrap();
        // /proc tells the size of the table.
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(size.trim().parse::<u64>().unwrap() >= limit, "{size}");
        assert!(reserve_descriptors(limit + 1).is_err());
        assert!(reserve_descriptors(0).is_err());
    }
}
