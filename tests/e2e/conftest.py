"""Fixtures: the backends, tokenring before each of them, and the logs of all of them when a test fails."""

import shutil
import subprocess
import uuid

import harness
import pytest
from harness import DIRECT, LlamaServer, Process, Tokenring, UvicornBackend
from streams import HeldBackend


def pytest_collection_modifyitems(config, items):
    if DIRECT:
        relay = [item for item in items if item.get_closest_marker("relay")]
        config.hook.pytest_deselected(items=relay)
        items[:] = [item for item in items if item not in relay]


def pytest_report_header():
    missing = [tool for tool in ("curl", "node", "chromium") if not shutil.which(tool)]
    if missing:
        raise pytest.UsageError(f"missing: {', '.join(missing)} (tests/run installs them)")
    return "tokenring: " + ("none: the backends themselves are tested" if DIRECT else harness.find_binary())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for process in Process.started:
            grown = process.log()[getattr(process, "told", 0) :]
            if grown.strip():
                state = "running" if process.alive() else f"ended with {process.child.returncode}"
                report.sections.append((f"log of {process.name} ({state}), its end", grown[-6000:]))
    return report


@pytest.fixture(autouse=True)
def remember_where_logs_were():
    """So that a failing test shows what was logged during it, and not during its predecessors."""
    for process in Process.started:
        process.told = len(process.log())


@pytest.fixture(autouse=True)
def shared_processes_survive(request):
    """A crash is the fault of the test it happened in, not of the next one."""
    shared = [process for process in Process.started if process.alive()]
    yield
    for process in shared:
        if process.name == "tokenring":
            assert process.alive(), f"tokenring ended with {process.child.returncode}\n{process.log()[-4000:]}"


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    yield tmp_path_factory.mktemp("logs")
    for process in Process.started:
        process.stop()


@pytest.fixture(scope="session")
def uvicorn(logs):
    return UvicornBackend(logs)


@pytest.fixture(scope="session")
def llama(logs):
    """Fast: thousands of tokens a second."""
    return LlamaServer(logs, 2, 64)


@pytest.fixture(scope="session")
def slow_llama(logs):
    """Slow enough to leave in mid-stream and during the prefill."""
    return LlamaServer(logs, 8, 384, slots=2, context=16384)


class Relay:
    """Where a test sends its requests: `url` is tokenring (or, with DIRECT, the backend); `backend` is behind it."""

    def __init__(self, name, url, backend, tokenring):
        self.name, self.url, self.backend, self.tokenring = name, url, backend, tokenring

    def ask(self, dialect, tokens, tokens_per_s=0, first_token_ms=0):
        """Query and extra body fields for an answer of `tokens` tokens; llama.cpp cannot be told its pace."""
        if self.name in ("llama", "slow-llama"):
            limit = "max_output_tokens" if dialect == "responses" else "max_tokens"
            exact = {"ignore_eos": True, "temperature": 0, "seed": 1, "cache_prompt": False}
            return {}, {limit: tokens, **exact}
        pace = {"tokens": tokens, "first_token_ms": first_token_ms}
        if tokens_per_s:
            pace["tokens_per_s"] = tokens_per_s
        # Anthropic's API has no default for it.
        return pace, {"max_tokens": tokens} if dialect == "messages" else {}


def relay_before(name, backend, logs, *more):
    if DIRECT:
        return Relay(name, backend.url, backend, None)
    tokenring = Tokenring(logs, [backend.url], more=more).ready()
    return Relay(name, tokenring.url, backend, tokenring)


@pytest.fixture(scope="session")
def via_uvicorn(uvicorn, logs):
    return relay_before("uvicorn", uvicorn, logs)


@pytest.fixture(scope="session")
def via_llama(llama, logs):
    return relay_before("llama", llama, logs)


@pytest.fixture(scope="session")
def via_slow_llama(slow_llama, logs):
    return relay_before("slow-llama", slow_llama, logs)


@pytest.fixture(scope="session")
def demo(request, logs):
    """tokenring's built-in model. The uvicorn backend stands in for it with DIRECT: it knows the same settings."""
    if DIRECT:
        return Relay("demo", request.getfixturevalue("uvicorn").url, None, None)
    tokenring = Tokenring(logs).ready()
    return Relay("demo", tokenring.url, None, tokenring)


@pytest.fixture(params=["demo", "uvicorn", "llama"])
def any_relay(request):
    """The demo model, and tokenring before each backend."""
    return request.getfixturevalue("demo" if request.param == "demo" else f"via_{request.param}")


@pytest.fixture
def start_tokenring(logs):
    """Start one more tokenring, with its own settings, for this test alone."""
    own = []

    def start(upstreams=(), ready=True, **settings):
        process = Tokenring(logs, upstreams, **settings)
        own.append(process)
        return process.ready() if ready else process

    yield start
    for process in own:
        process.stop()


@pytest.fixture
def tag():
    """A name for one request, under which the uvicorn backend tells what became of it."""
    return uuid.uuid4().hex


@pytest.fixture
def backend():
    """One whose answers a test says word by word."""
    held = HeldBackend()
    yield held
    held.close()


@pytest.fixture
def start(start_tokenring, backend):
    """tokenring before `backend`, with these flags."""

    def start_it(*flags, shards=1):
        return start_tokenring([backend.url], shards=shards, more=[str(flag) for flag in flags])

    return start_it


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
