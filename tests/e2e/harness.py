"""Starting, watching and stopping the processes under test: tokenring and the backends behind it."""

import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
UPSTREAMS = ROOT / "tests" / "upstreams"
CACHE = ROOT / ".cache"
NODE_SCRIPTS = Path(__file__).resolve().parent / "node"

# With it the same tests run against the backends themselves: a test that fails there is wrong about the backend.
DIRECT = os.environ.get("TOKENRING_E2E_DIRECT") == "1"

# tokenring's settings as this suite names them -> as the command line has them. The only place that knows.
FLAGS = {
    "listen": "--listen",
    "admin": "--admin",
    "upstream": "--upstream",
    "shards": "--shards",
    "config": "--config",
    "buffers": "--buffers",
    "first_token_ms": "--first-token-ms",
    "between_tokens_ms": "--between-tokens-ms",
    "heartbeat_ms": "--heartbeat-ms",
    "commit_ms": "--commit-ms",
    "drain_deadline_ms": "--drain-deadline-ms",
    "demo_tokens": "--demo-tokens",
    "demo_tokens_per_s": "--demo-tokens-per-s",
    "demo_first_token_ms": "--demo-first-token-ms",
}

# Exit codes as the operator's documentation has them.
EXIT_OK, EXIT_USAGE, EXIT_CANNOT_BIND, EXIT_INTERNAL, EXIT_CONFIG = 0, 64, 69, 70, 78


def find_binary():
    """TOKENRING_BIN, else the build in the target folder that was made last."""
    named = os.environ.get("TOKENRING_BIN")
    if named:
        if not os.access(named, os.X_OK):
            raise RuntimeError(f"TOKENRING_BIN={named} is not an executable file")
        return named
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    builds = [target / profile / "tokenring" for profile in ("release", "bench-quick", "debug")]
    built = [path for path in builds if path.exists()]
    if not built:
        places = ", ".join(map(str, builds))
        raise RuntimeError(f"no tokenring binary at {places}: cargo build --release, or set TOKENRING_BIN")
    return str(max(built, key=lambda path: path.stat().st_mtime))


GIVEN_PORTS = set()


def free_port():
    """A port that nothing listens on, outside the range the kernel hands to outgoing connections; never the same one twice."""
    for _ in range(200):
        port = random.randint(20000, 32000)
        if port in GIVEN_PORTS:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        GIVEN_PORTS.add(port)
        return port
    raise RuntimeError("no free port found between 20000 and 32000")


def wait_until(condition, seconds, what, every=0.01):
    """Poll until `condition()` gives something true, and return that; the test fails after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)


def connections_to(port):
    """How many established connections this machine has to that local port, seen from their connecting end."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


class Process:
    """A child process with its output in a log file; ended by its own process id and nothing else."""

    started = []

    def __init__(self, name, arguments, log_folder, environment=None, confine=None):
        self.name, self.arguments = name, [str(argument) for argument in arguments]
        self.log_path = Path(log_folder) / f"{len(Process.started):03}-{name}.log"
        with open(self.log_path, "wb") as log:
            self.child = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                preexec_fn=confine,
            )
        Process.started.append(self)

    @property
    def pid(self):
        return self.child.pid

    def log(self):
        return self.log_path.read_text(errors="replace")

    def alive(self):
        return self.child.poll() is None

    def signal(self, number):
        self.child.send_signal(number)

    def wait(self, seconds):
        """The exit code, once it has ended."""
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds} s\n{self.log()[-4000:]}") from None

    def kill(self):
        """As a crash ends it: nothing is flushed, nobody is told."""
        self.child.kill()
        self.child.wait(10)

    def stop(self):
        if self.alive():
            self.child.terminate()
            try:
                self.child.wait(3)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def wait_ready(self, url, seconds, verify=True):
        """Wait for a 200 from `url`."""

        def answers():
            if not self.alive():
                raise AssertionError(
                    f"{self.name} ended with {self.child.returncode} before it was ready\n"
                    f"$ {' '.join(self.arguments)}\n{self.log()[-4000:]}"
                )
            try:
                return httpx.get(url, timeout=2, verify=verify).status_code == 200
            except httpx.HTTPError:
                return False

        try:
            wait_until(answers, seconds, f"{self.name} ready at {url}", every=0.05)
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"{error}\n$ {' '.join(self.arguments)}\n{self.log()[-4000:]}") from None

    def resident_bytes(self):
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{self.name}: no VmRSS")


class Tokenring(Process):
    """`tokenring serve` on free ports. Settings are keyword arguments by the names in FLAGS."""

    def __init__(self, log_folder, upstreams=(), query="", environment=None, more=(), confine=None, **settings):
        self.port, self.admin_port = free_port(), free_port()
        settings = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": f"127.0.0.1:{self.admin_port}",
            "shards": 2,
            **settings,
        }
        arguments = [find_binary(), "serve"]
        for name, value in settings.items():
            if value is not None:
                arguments += [FLAGS[name], value]
        for upstream in upstreams:
            arguments += [FLAGS["upstream"], upstream]
        arguments += more
        super().__init__("tokenring", arguments, log_folder, environment, confine)
        self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"

    def ready(self, seconds=10):
        self.wait_ready(f"{self.admin_url}/ready", seconds)
        return self

    def drain(self):
        self.signal(signal.SIGTERM)

    def metrics(self):
        return httpx.get(f"{self.admin_url}/metrics")

    def status(self):
        return httpx.get(f"{self.admin_url}/status").json()


def durable_home(path, shards):
    """The shard that a durable stream's path belongs to (protocol/src/durable/home.rs)."""
    all_bits = (1 << 64) - 1
    number = 0xCBF29CE484222325
    for byte in path.encode():
        number = (number ^ byte) * 0x100000001B3 & all_bits
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & all_bits
    number = (number ^ number >> 27) * 0x94D049BB133111EB & all_bits
    return (number ^ number >> 31) % shards


class UvicornBackend(Process):
    """tests/upstreams/uvicorn_backend.py; with a certificate (of `certificates.Issued`) and who vouches for it, over TLS."""

    def __init__(self, log_folder, pair=None, ca=None):
        self.port = free_port()
        self.url = f"{'https' if pair else 'http'}://127.0.0.1:{self.port}"
        arguments = [sys.executable, UPSTREAMS / "uvicorn_backend.py", self.port]
        arguments += [pair.certificate, pair.key] if pair else []
        super().__init__("uvicorn", arguments, log_folder)
        self.wait_ready(f"{self.url}/health", 20, ssl.create_default_context(cafile=ca))

    def seen(self, tag):
        """What became of the request with that tag; None while it has not arrived."""
        answer = httpx.get(f"{self.url}/seen/{tag}")
        return answer.json() if answer.status_code == 200 else None

    def result(self, tag):
        """What a browser's page left under that tag."""
        answer = httpx.get(f"{self.url}/results/{tag}")
        return answer.json() if answer.status_code == 200 else None


class EchoBackend(Process):
    """tests/upstreams/echo_backend.py"""

    def __init__(self, log_folder):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__("echo", [sys.executable, UPSTREAMS / "echo_backend.py", self.port], log_folder)
        self.wait_ready(f"{self.url}/.read?from=0", 20)


class LlamaServer(Process):
    """llama.cpp's own server on a random-weight model, which is made once and kept under .cache/models."""

    def __init__(self, log_folder, layers, width, slots=4, context=8192):
        model = CACHE / "models" / f"random-{layers}x{width}.gguf"
        if not model.exists():
            model.parent.mkdir(parents=True, exist_ok=True)
            make = [sys.executable, UPSTREAMS / "make_gguf.py", model, layers, width]
            subprocess.run([str(argument) for argument in make], check=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        server = [sys.executable, UPSTREAMS / "llama_server.py", model, self.port, slots, context]
        super().__init__("llama", server, log_folder)
        self.wait_ready(f"{self.url}/health", 40)

    def busy_slots(self):
        return sum(bool(slot["is_processing"]) for slot in httpx.get(f"{self.url}/slots").json())


def run_node(script, *arguments, seconds=30):
    """Run one of the .mjs clients and return the JSON that it prints."""
    command = ["node", str(NODE_SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"$ {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)
