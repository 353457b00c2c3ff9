//! What this machine offers and lacks, for `tokenring doctor`: every item with what was found and what to do.

use super::RingError;
use io_uring::{IoUring, Probe, opcode};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Locked memory that glommio's rings need per executor, bytes.
const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Name of the item about descriptors.
pub const DESCRIPTORS_ITEM: &str = "open files (descriptors)";
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
    judge(&Found::here())
}

/// What a machine says of itself, before it is judged.
struct Found {
    /// As `uname -r`.
    release: String,
    /// The sysctl `kernel.io_uring_disabled`; kernels before 6.6 have none.
    disabled: Option<String>,
    /// Of a ring with all the flags that the data plane needs.
    ring: Result<(), RingError>,
    /// An operation that does nothing, submitted and completed.
    enter: io::Result<()>,
    /// Codes of the operations that the kernel knows.
    operations: io::Result<Vec<u8>>,
    buffer_ring: io::Result<()>,
    /// `(soft, hard)`, as the next.
    memlock: io::Result<(u64, u64)>,
    nofile: io::Result<(u64, u64)>,
    somaxconn: Option<String>,
    migrate_requests: Option<String>,
}

impl Found {
    fn here() -> Self {
        let mut found = Found {
            release: kernel_release(),
            disabled: sysctl("/proc/sys/kernel/io_uring_disabled"),
            ring: Ok(()),
            enter: Ok(()),
            operations: Ok(Vec::new()),
            buffer_ring: Ok(()),
            memlock: limit(libc::RLIMIT_MEMLOCK),
            nofile: limit(libc::RLIMIT_NOFILE),
            somaxconn: sysctl("/proc/sys/net/core/somaxconn"),
            migrate_requests: sysctl("/proc/sys/net/ipv4/tcp_migrate_req"),
        };
        match super::build_ring(8) {
            Ok(mut ring) => {
                found.operations = operations(&ring);
                found.buffer_ring = buffer_ring(&ring);
                found.enter = enter(&mut ring);
            }
            Err(error) => found.ring = Err(error),
        }
        found
    }
}

fn operations(ring: &IoUring) -> io::Result<Vec<u8>> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    Ok((0..=u8::MAX).filter(|&code| probe.is_supported(code)).collect())
}

fn buffer_ring(ring: &IoUring) -> io::Result<()> {
    let buffers = super::buffers::BufferRing::new(2, 4096)?;
    // SAFETY: two zeroed entries aligned to a page, which live until they are unregistered below.
    unsafe { ring.submitter().register_buf_ring_with_flags(buffers.address(), buffers.count(), 0, 0) }?;
    let result = ring.submitter().unregister_buf_ring(0);
    if result.is_err() {
        std::mem::forget(buffers);
    }
    result
}

fn enter(ring: &mut IoUring) -> io::Result<()> {
    // SAFETY: the operation names no memory.
    unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    ring.completion().next().map(|_| ()).ok_or(io::ErrorKind::WriteZero.into())
}

fn judge(found: &Found) -> Vec<ProbeItem> {
    let mut items = vec![kernel(&found.release), io_uring_disabled(found.disabled.as_deref())];
    items.extend(ring(found));
    items.extend([
        memlock(&found.memlock),
        nofile(&found.nofile),
        somaxconn(found.somaxconn.as_deref()),
        migrate_requests(found.migrate_requests.as_deref()),
    ]);
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

fn kernel(release: &str) -> ProbeItem {
    let ok = version_of(release).is_none_or(|version| version >= KERNEL_MIN);
    let remedy = if ok { "" } else { "run Linux 6.1 or newer (io_uring with deferred task work)" };
    ProbeItem::new("kernel >= 6.1", ok, release, remedy)
}

fn io_uring_disabled(found: Option<&str>) -> ProbeItem {
    const NAME: &str = "sysctl kernel.io_uring_disabled";
    // 0: all may; 1: only CAP_SYS_ADMIN and the group kernel.io_uring_group; 2: nobody. Kernels before 6.6 have no such switch.
    match found {
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

fn ring(found: &Found) -> Vec<ProbeItem> {
    if let Err(error) = &found.ring {
        return vec![ProbeItem::new("io_uring", false, "not usable", error.to_string())];
    }
    if let Err(error) = &found.enter {
        let remedy =
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile";
        return vec![ProbeItem::new("io_uring", false, format!("io_uring_enter fails: {error}"), remedy)];
    }
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
    let missing: Vec<&str> = match &found.operations {
        Ok(known) => needed.iter().filter(|(_, code)| !known.contains(code)).map(|(name, _)| *name).collect(),
        Err(_) => vec!["all (the kernel does not answer the probe)"],
    };
    let ok = missing.is_empty();
    items.push(ProbeItem::new(
        "io_uring operations",
        ok,
        if ok { "all there".to_owned() } else { format!("missing: {}", missing.join(", ")) },
        if ok { "" } else { "run Linux 6.1 or newer; a sandbox (gVisor) may implement io_uring in part" },
    ));
    items.push(match &found.buffer_ring {
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

fn memlock(found: &io::Result<(u64, u64)>) -> ProbeItem {
    const NAME: &str = "locked memory (memlock) >= 512 KiB";
    match found {
        &Ok((soft, hard)) => {
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

fn nofile(found: &io::Result<(u64, u64)>) -> ProbeItem {
    match found {
        &Ok((soft, hard)) => ProbeItem::new(
            DESCRIPTORS_ITEM,
            hard >= NOFILE_MIN,
            format!("soft {soft}, hard {hard}"),
            "each client takes one and its backend connection another; the soft limit is raised to the hard one at start, the \
             hard one by LimitNOFILE=1048576 in the systemd unit",
        ),
        Err(error) => ProbeItem::new(DESCRIPTORS_ITEM, false, error.to_string(), "allow getrlimit(2)"),
    }
}

fn somaxconn(found: Option<&str>) -> ProbeItem {
    let found = found.and_then(|text| text.parse::<u64>().ok());
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

fn migrate_requests(found: Option<&str>) -> ProbeItem {
    let remedy = match found {
        Some("1") => "",
        _ => {
            "net.ipv4.tcp_migrate_req=1 hands the accept queue of a closed listener to the others; without it connections \
             queued there are reset when a shard goes away"
        }
    };
    ProbeItem::new("sysctl net.ipv4.tcp_migrate_req", true, found.unwrap_or("not present"), remedy)
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

    /// What stands out as missing on a machine that is like this one but for one thing.
    fn missing(change: impl FnOnce(&mut Found)) -> Vec<(&'static str, String, String)> {
        let mut found = Found::here();
        change(&mut found);
        let missing = judge(&found).into_iter().filter(|item| !item.ok);
        missing.map(|item| (item.name, item.found, item.remedy)).collect()
    }

    #[test]
    fn a_kernel_below_the_floor_is_named_with_what_it_lacks() {
        let einval =
            || RingError::of("IORING_SETUP_DEFER_TASKRUN", io::Error::from_raw_os_error(libc::EINVAL));
        let items = missing(|found| {
            found.release = "5.10.0-26-amd64".to_owned();
            found.ring = Err(einval());
        });
        assert_eq!(items.len(), 2, "{items:?}");
        assert_eq!((items[0].0, items[0].1.as_str()), ("kernel >= 6.1", "5.10.0-26-amd64"));
        assert!(items[1].2.contains("refuses IORING_SETUP_DEFER_TASKRUN: Linux 6.1 or newer"), "{items:?}");

        let items = missing(|found| {
            found.operations = Ok(vec![opcode::Accept::CODE, opcode::Recv::CODE]);
            found.buffer_ring = Err(io::Error::from_raw_os_error(libc::EINVAL));
        });
        assert_eq!(items[0].1, "missing: ASYNC_CANCEL, CLOSE, CONNECT, POLL_ADD, READ, SEND");
        assert_eq!((items[1].0, items.len()), ("io_uring buffer ring", 2));
        let items = missing(|found| found.operations = Err(io::Error::from_raw_os_error(libc::EINVAL)));
        assert!(items[0].1.contains("does not answer"), "{items:?}");
        // A release that says nothing is not held against it: the ring itself shows what it can do.
        assert_eq!(missing(|found| found.release = "unknown".to_owned()), []);
    }

    #[test]
    fn refusals_are_told_from_lack() {
        let error = |number| RingError::of("io_uring_setup", io::Error::from_raw_os_error(number));
        for (number, word) in [
            (libc::EPERM, "seccomp"),
            (libc::ENOSYS, "io_uring_disabled"),
            (libc::ENOMEM, "locked-memory"),
            (libc::EMFILE, "LimitNOFILE"),
        ] {
            let items = missing(|found| found.ring = Err(error(number)));
            assert!(items.len() == 1 && items[0].2.contains(word), "{items:?}");
        }
        let items = missing(|found| found.enter = Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert!(items[0].1.contains("io_uring_enter") && items[0].2.contains("seccomp"), "{items:?}");
        let items = missing(|found| found.disabled = Some("2".to_owned()));
        assert!(items[0].2.contains("sysctl kernel.io_uring_disabled=0"), "{items:?}");
        assert_eq!(missing(|found| found.disabled = Some("1".to_owned())), []);
        let items = missing(|found| found.memlock = Ok((65_536, 65_536)));
        assert!(items[0].1.contains("soft 64 KiB") && items[0].2.contains("ulimit -l"), "{items:?}");
        let items = missing(|found| found.nofile = Ok((256, 512)));
        assert!(items[0].1.contains("hard 512"), "{items:?}");
        // Advice is no obstacle.
        assert_eq!(missing(|found| found.somaxconn = Some("128".to_owned())), []);
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
