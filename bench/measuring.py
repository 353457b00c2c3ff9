"""What bench/compare and bench/streams share: a network namespace of one's own, processes pinned to CPUs, and what the kernel
says of a process over a window: CPU time, wake-ups, system calls, memory.
"""

import glob
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

from running import ROOT, die_with_parent

INSIDE = "TOKENRING_BENCH_NAMESPACE"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# The part of the window by which CPU and events may be counted over different times, before a run is repeated.
SKEW_MAX = 0.02

# What is counted by name in the last round; the others are summed up.
SYSCALLS = ["io_uring_enter", "epoll_wait", "epoll_pwait", "epoll_pwait2", "epoll_ctl", "clock_gettime", "recvfrom", "recvmsg", "read", "readv", "sendto", "sendmsg", "write", "writev", "futex"]
# Where a package has no program of its name.
FILES = {"libnginx-mod-nchan": "/usr/lib/nginx/modules/ngx_nchan_module.so"}

# More arguments of tokenring, by the name behind the plus of a server such as `tokenring+stored`.
VARIANTS = {
    # Relayed streams on disk: each event delivered when it is synced (the default), or written and synced within 100 ms.
    "synced": ["--durable", "on", "--data-dir", "{directory}/data", "--fsync-interval", "0"],
    "stored": ["--durable", "on", "--data-dir", "{directory}/data", "--fsync-interval", "100"],
    # Limits in time: of what is kept of a stream, of how far a reader may be behind.
    "window": ["--resume-window-ms", "60000"],
    "lag": ["--reader-lag-ms", "5000"],
}


def variant_arguments(name, directory):
    """Of a server's name, what it says behind the plus."""
    # Behind an at sign, a plus stands between CPUs.
    variant = name.partition("+")[2] if "@" not in name else ""
    return [argument.format(directory=directory) for argument in VARIANTS[variant]] if variant else []


def cpu_list(text):
    return [int(cpu) for cpu in text.split(",")]


def install_missing(packages):
    missing = [name for name in packages if not (os.path.exists(FILES[name]) if name in FILES else shutil.which(name))]
    if missing:
        if os.geteuid() != 0:
            sys.exit(f"{', '.join(missing)} not found: install them, or leave them out by --only")
        # No service must start: it would take ports and CPU.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        subprocess.run(["apt-get", "install", "-y", "-q", *missing], check=True, env=environment, stdout=subprocess.DEVNULL)


def find_binaries(options):
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    if not options.bin_dir:
        options.bin_dir = str(target / "bench-quick")
        command = ["cargo", "build", "-q", "--profile", "bench-quick", "-p", "tokenring-bench"]
        subprocess.run(command, check=True, cwd=ROOT)
    if "tokenring" in options.kinds and not options.tokenring:
        found = [path for profile in ("release", "bench-quick") if (path := target / profile / "tokenring").exists()]
        if not found:
            sys.exit("no tokenring binary: build one (cargo build --release), name one by --tokenring, or leave it out by --only")
        options.tokenring = str(max(found, key=lambda path: path.stat().st_mtime))


def enter_namespace():
    """Runs this script again in namespaces (network, mounts) of its own, which end with its last process: nothing is left behind."""
    if os.environ.get(INSIDE):
        subprocess.run(["ip", "link", "set", "lo", "mtu", "1500", "up"], check=True)
        if not os.path.exists("/sys/kernel/tracing/events"):
            # For perf. Without it (not in the kernel, not allowed) system calls are not counted.
            subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], stderr=subprocess.DEVNULL)
        return
    if os.geteuid() != 0:
        sys.exit("root is needed for the namespaces (unshare --net --mount)")
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "--net", "--mount", "--", sys.executable, *sys.argv])


class Process:
    """A process on given CPUs, which ends with this block, whatever happens."""

    def __init__(self, command, cpus, log, stdout=None):
        def prepare():
            os.sched_setaffinity(0, cpus)
            die_with_parent()

        self.name = pathlib.Path(command[0]).name
        self.child = subprocess.Popen(command, preexec_fn=prepare, stdin=subprocess.DEVNULL, stdout=stdout or log, stderr=log, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pids = self.pids()
        self.child.terminate()
        try:
            self.child.wait(3)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for pid in pids[1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def pids(self):
        """The process and its descendants."""
        found = [self.child.pid]
        for pid in found:
            for path in glob.glob(f"/proc/{pid}/task/*/children"):
                try:
                    found += [int(child) for child in read(path).split()]
                except OSError:
                    pass
        return found

    def assert_alive(self):
        if self.child.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self.child.returncode}")


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_or_empty(path):
    try:
        return read(path)
    except OSError:
        return ""


def wait_until_listening(address, process):
    host, port = address.split(":")
    for _ in range(200):
        process.assert_alive()
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.name} does not listen on {address}")


class Sample:
    """CPU times at one instant: of processes, of the kernel's threads that work for them, of CPUs."""

    def __init__(self, mark, server, backend, load, server_cpus, cpus):
        self.wakeups = voluntary_switches(server.pids()) if server else 0
        self.at = time.monotonic()
        # How long after the load generator's mark this sample was taken: the events are counted up to the mark.
        self.late_s = self.at - mark["at_ns"] / 1e9
        self.has_server = server is not None
        self.server_ns = on_cpu_ns(server.pids()) if server else 0
        self.server_stat_ns = stat_ns(server.pids()) if server else 0
        self.backend_ns = on_cpu_ns(backend.pids()) if backend else 0
        self.load_ns = on_cpu_ns(load.pids())
        self.softirq_ns = on_cpu_ns(softirq_threads(server_cpus))
        self.cpus = cpu_times(cpus)


def on_cpu_ns(pids):
    """Nanoseconds on a CPU, over all threads: io_uring's workers are threads of the process too."""
    total = 0
    for pid in pids:
        for path in glob.glob(f"/proc/{pid}/task/*/schedstat"):
            try:
                total += int(read(path).split()[0])
            except OSError:
                pass  # a thread that has just ended
    return total


def voluntary_switches(pids):
    """How often threads went to sleep, each of which is one wake-up later."""
    total = 0
    for pid in pids:
        for path in glob.glob(f"/proc/{pid}/task/*/status"):
            for line in read_or_empty(path).splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


class SyscallCount:
    """perf stat on all threads of the server for some seconds. Each call costs a little more meanwhile."""

    def __init__(self, server, seconds, cpus, log):
        events = ["raw_syscalls:sys_enter", *(f"syscalls:sys_enter_{call}" for call in SYSCALLS)]
        command = ["perf", "stat", "-x,", "-e", ",".join(events), "-p", ",".join(map(str, server.pids())), "--", "sleep", str(seconds)]
        self.seconds = seconds
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cpus))

    def per(self, units_per_s):
        """Calls per unit by name, and in all; none if perf cannot count."""
        text = self.child.communicate()[1]
        counts = {}
        for line in text.splitlines():
            words = line.split(",")
            if len(words) > 2 and words[0].isdigit():
                counts[words[2].split("sys_enter_")[-1]] = int(words[0]) / self.seconds / units_per_s
        total = counts.pop("raw_syscalls:sys_enter", None)
        if total is None:
            return None
        named = {call: count for call, count in counts.items() if count > 0}
        return {"all": total, **named, "others": max(0.0, total - sum(named.values()))}


def stat_ns(pids):
    """utime + stime of the processes, ended threads included, in steps of a tick: the check of `on_cpu_ns`."""
    total = 0
    for pid in pids:
        try:
            fields = read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        except OSError:
            pass
    return total * 10**9 // TICKS_PER_S


_softirq_threads = None


def softirq_threads(cpus):
    global _softirq_threads
    if _softirq_threads is None:
        names = {f"ksoftirqd/{cpu}" for cpu in cpus}
        _softirq_threads = [int(path.split("/")[2]) for path in glob.glob("/proc/[0-9]*/comm") if read_or_empty(path).strip() in names]
    return _softirq_threads


def cpu_times(cpus):
    """Per CPU: ticks that were idle, and those that the hypervisor stole. Idle time is measured by the kernel, busy time only
    sampled at ticks (and a server that wakes for microseconds slips through), so busy is what is left of the window."""
    times = {}
    for line in read("/proc/stat").splitlines():
        words = line.split()
        if words[0].startswith("cpu") and words[0] != "cpu" and int(words[0][3:]) in cpus:
            times[int(words[0][3:])] = {"idle": int(words[4]) + int(words[5]), "steal": int(words[8])}
    return times


def pss_kib(server):
    total = 0
    for pid in server.pids() if server else []:
        for line in read_or_empty(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def tcp_memory_kib():
    """What all of the host's TCP sockets hold in the kernel."""
    for line in read("/proc/net/sockstat").splitlines():
        if line.startswith("TCP:"):
            return int(line.split()[-1]) * resource.getpagesize() // 1024
    return 0


def spread(values, form):
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)}–{format(max(values), form)})"


def output_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
        return (done.stdout or done.stderr).strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def loopback_mtu():
    """Asked of the namespace itself: /sys still shows the one outside."""
    return int(json.loads(subprocess.check_output(["ip", "-json", "link", "show", "lo"]))[0]["mtu"])
