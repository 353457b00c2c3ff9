"""What bench/soak and bench/abuse share: processes that end with the script, and a tokenring that is watched from outside."""

import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_binaries(bin_dir):
    """Paths of tokenring, load and fake-backend."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    folder = pathlib.Path(bin_dir) if bin_dir else target / "bench-quick"
    names = ("tokenring", "load", "fake-backend")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        sys.exit(f"no {', '.join(missing)} in {folder}: cargo build --profile bench-quick -p tokenring -p tokenring-bench --bins")
    return [str(folder / name) for name in names]


def spawn(command, cpus=None, nice=0, **more):
    def prepare():
        die_with_parent()
        os.nice(nice)
        if cpus:
            os.sched_setaffinity(0, cpus)

    return subprocess.Popen([str(part) for part in command], preexec_fn=prepare, stdin=subprocess.DEVNULL, text=True, **more)


def end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_listening(port, seconds=10):
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                sys.exit(f"nothing listens on port {port}")
            time.sleep(0.02)


class Tokenring:
    """The server under test."""

    def __init__(self, binary, log, arguments, cpus=None):
        self.port, self.admin = free_port(), free_port()
        listen = ["--listen", f"127.0.0.1:{self.port}", "--admin", f"127.0.0.1:{self.admin}"]
        self.process = spawn([binary, "serve", *listen, *arguments], cpus, stdout=log, stderr=log)
        wait_until_listening(self.admin)
        wait_until_listening(self.port)

    def metrics(self):
        """Sums over all labels, by name."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=10).read().decode()
        sums = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                sample, value = line.rsplit(" ", 1)
                name = sample.split("{")[0].removeprefix("tokenring_")
                sums[name] = sums.get(name, 0) + float(value)
        return sums

    def ends(self):
        """Streams ended, by reason, where not zero."""
        status = json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/status", timeout=10))
        return {reason: count for reason, count in status["ends"].items() if count}

    def pss_kib(self):
        rollup = pathlib.Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def result_of(load):
    """What `load --json` printed, once it has ended."""
    output, _ = load.communicate()
    for line in output.splitlines():
        if line.startswith('{"result"'):
            return json.loads(line)["result"]
    return None
