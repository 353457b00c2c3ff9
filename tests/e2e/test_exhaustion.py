"""What the system does not give: at start a message with cause and remedy and its exit code, later a degradation that is
counted and over when the want is."""

import json
import os
import resource
import socket
import subprocess
import threading
import time

import httpx
import pytest
from confine import Supervised, all_of, errno, limit, only_cpu, refuse, unprivileged
from harness import EXIT_CANNOT_BIND, EXIT_CONFIG, EXIT_INTERNAL, EXIT_OK, EXIT_USAGE, find_binary, wait_until

pytestmark = pytest.mark.relay

CHAT = b'{"model":"m","stream":true,"messages":[]}'


def start(*arguments, confine=None, command="serve", seconds=15):
    """The binary run to its end."""
    if command == "serve":
        if "--admin" not in arguments:
            arguments = ("--admin", "off", *arguments)
        if "--listen" not in arguments:
            arguments = ("--listen", "127.0.0.1:0", *arguments)
    return subprocess.run(
        [find_binary(), command, *map(str, arguments)],
        preexec_fn=confine,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def refused(done, code, *words):
    """It ended with that code and says each of these; and nothing panicked."""
    said = done.stderr + done.stdout
    assert done.returncode == code, done
    assert "panicked" not in said, said
    for word in words:
        assert word in said, f"{word!r} in: {said}"


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EPERM, ["io_uring is disabled here", "seccomp", "kernel.io_uring_disabled"]),
        (errno.ENOSYS, ["io_uring is disabled here", "seccomp"]),
        (errno.ENOMEM, ["no memory for the ring", "ulimit -l", "LimitMEMLOCK="]),
        (errno.EINVAL, ["Linux 6.1 or newer is needed, this is"]),
        (errno.EMFILE, ["no file descriptor for the ring", "LimitNOFILE="]),
    ],
)
def test_io_uring_is_refused(number, words):
    confine = refuse(number, "io_uring_setup")
    refused(start(confine=confine), EXIT_CANNOT_BIND, "cannot start", *words)
    refused(start(confine=confine, command="doctor"), EXIT_CANNOT_BIND, "MISSING", "remedy", *words)


def test_only_half_of_io_uring_is_allowed():
    confine = refuse(errno.EPERM, "io_uring_enter")
    refused(start(confine=confine), EXIT_CANNOT_BIND, "io_uring_enter fails", "seccomp")


@pytest.mark.parametrize("kib", [0, 64])
def test_locked_memory_is_short(kib):
    confine = all_of(unprivileged, limit(resource.RLIMIT_MEMLOCK, kib * 1024))
    refused(start(confine=confine), EXIT_CANNOT_BIND, f"soft {kib} KiB", "ulimit -l 8192", "LimitMEMLOCK=8M")


def test_there_is_no_memory_for_the_buffers():
    confine = limit(resource.RLIMIT_AS, 3 << 30)
    done = start("--buffers", 32768, "--buffer-size", "1MiB", "--shards", 1, confine=confine)
    refused(done, EXIT_CANNOT_BIND, "no memory for the ring", "lower ring_depth and buffers")


def test_threads_are_refused():
    done = start(confine=refuse(errno.EAGAIN, "clone", "clone3"))
    refused(done, EXIT_CANNOT_BIND, "thread", "Resource temporarily unavailable", "TasksMax=")


def test_few_descriptors():
    refused(start(confine=limit(resource.RLIMIT_NOFILE, 64)), EXIT_CONFIG, "limit of 64 descriptors", "LimitNOFILE=")
    # A client may need a backend's connection besides its own.
    upstream = ("--upstream", "http://127.0.0.1:9")
    done = start("--shards", 1, *upstream, confine=limit(resource.RLIMIT_NOFILE, 170))
    refused(done, EXIT_CONFIG, "limit of 170 descriptors", "lower conns_max to 13")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--cpus", "8000"], EXIT_CONFIG, ["may not run on CPU 8000; it may use"]),
        (["--cpus", "0,0"], EXIT_USAGE, ["CPU 0 is listed twice"]),
        (["--cpus", "0-"], EXIT_USAGE, ["expected a list of CPUs such as 0-3,8"]),
        (["--cpus", "1-0"], EXIT_USAGE, ["runs backwards"]),
        (["--cpus", "0", "--shards", "2"], EXIT_CONFIG, ["must not exceed the 1 of cpus"]),
        (["--shards", "500"], EXIT_CONFIG, ["500 shards", "limit"]),
        (["--listen", "192.0.2.1:80"], EXIT_CANNOT_BIND, ["192.0.2.1:80", "--listen takes another address"]),
        (["--admin", "unix:/nonexistent/socket"], EXIT_CANNOT_BIND, ["/nonexistent/socket", "--admin takes another"]),
        (["--config", "/nonexistent.toml"], EXIT_CONFIG, ["/nonexistent.toml", "cannot read", "No such file"]),
        (["--config", "/"], EXIT_CONFIG, ["cannot read", "Is a directory"]),
    ],
)
def test_settings_that_this_machine_cannot_follow(arguments, code, words):
    def confine():
        # Whatever this machine has.
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))

    refused(start(*arguments, confine=confine), code, *words)


def test_a_cpu_outside_of_what_the_process_may_use():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        # With one CPU there is none outside; the one that does not exist is tested above.
        assert start("--cpus", cpus[0] + 1).returncode == EXIT_CONFIG
        return
    done = start("--cpus", cpus[1], confine=only_cpu(cpus[0]))
    refused(done, EXIT_CONFIG, f"may not run on CPU {cpus[1]}; it may use {cpus[0]}")


def test_an_address_family_that_is_not_there():
    confine = refuse(errno.EAFNOSUPPORT, "socket", first_argument=socket.AF_INET6)
    refused(start("--listen", "[::1]:0", confine=confine), EXIT_CANNOT_BIND, "[::1]:0", "Address family not supported")


def test_files_and_ports_of_others(tmp_path):
    secret = tmp_path / "secret.toml"
    secret.write_text("shards = 1\n")
    secret.chmod(0)
    garbage = tmp_path / "garbage.toml"
    garbage.write_bytes(b"\xff\xfe\x00")
    refused(start("--config", garbage), EXIT_CONFIG, str(garbage), "valid UTF-8")
    # Its folder belongs to this user alone, so the file cannot even be looked at by another.
    refused(start("--config", secret, confine=unprivileged), EXIT_CONFIG, str(secret), "Permission denied")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = "127.0.0.1:%d" % taken.getsockname()[1]
        refused(start("--listen", place), EXIT_CANNOT_BIND, place, "Address already in use")
        refused(start("--admin", place), EXIT_CANNOT_BIND, place, "Address already in use")


def test_a_full_stdout_is_no_reason_not_to_serve(start_tokenring):
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [find_binary(), "serve", "--listen", "127.0.0.1:0", "--admin", "off", "--shards", "1"],
            stdout=full,
            stderr=subprocess.DEVNULL,
        )
    try:
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == EXIT_OK
    finally:
        process.kill()
        process.wait()


def count(tokenring, name):
    """The sum of a metric over its labels."""
    lines = (line.rsplit(" ", 1) for line in tokenring.metrics().text.splitlines() if not line.startswith("#"))
    return sum(float(value) for sample, value in lines if sample.split("{")[0] == name)


def lowest_free_descriptor(tokenring):
    """A limit of this many leaves none to be had."""
    used = set(map(int, os.listdir(f"/proc/{tokenring.pid}/fd")))
    return next(number for number in range(len(used) + 1) if number not in used)


class Admin:
    """Connections to the admin page that were made while there were descriptors for them."""

    def __init__(self, tokenring):
        self.client = httpx.Client(base_url=tokenring.admin_url)
        self.tokenring = tokenring

    def metrics(self):
        return self.client.get("/metrics")


def test_no_descriptors_for_clients(start_tokenring, uvicorn):
    """Accepting rests, the others are served on, and those who wait are served once there are descriptors again."""
    # With few slots accepts are one-shot; each goes by the limit of the time when it was armed.
    tokenring = start_tokenring([uvicorn.url], shards=1, more=["--conns-max", "100"])
    admin = Admin(tokenring)
    assert admin.metrics().status_code == 200
    before = resource.prlimit(tokenring.pid, resource.RLIMIT_NOFILE)
    seated = socket.create_connection(("127.0.0.1", tokenring.port))
    seated.settimeout(10)
    wait_until(lambda: count(admin, "tokenring_connections") == 1, 10, "the first client")
    resource.prlimit(tokenring.pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(tokenring), before[1]))
    # More than are armed at a time (64).
    waiting = [socket.create_connection(("127.0.0.1", tokenring.port)) for _ in range(90)]
    try:
        wait_until(lambda: count(admin, "tokenring_accept_errors_total") >= 3, 10, "accepting to be tried again and again")
        assert count(admin, "tokenring_accepts_total") < 91, "those whose accept was armed before, and no more"
        # No descriptor for a backend either: the answer says so in the API's own form, and the connection lives.
        for _ in range(2):
            seated.sendall(b"GET /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = seated.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503 "), answer
            assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "overload"
        assert count(admin, "tokenring_upstream_connect_errors_total") == 2
        # Those that were armed before have all failed or succeeded.
        time.sleep(0.5)
        errors = count(admin, "tokenring_accept_errors_total")
        time.sleep(1)
        # Ten tries a second, and no faster.
        assert count(admin, "tokenring_accept_errors_total") - errors <= 15
    finally:
        resource.prlimit(tokenring.pid, resource.RLIMIT_NOFILE, before)
    wait_until(lambda: count(admin, "tokenring_accepts_total") == 91, 10, "those who waited to be accepted")
    for client in [seated, *waiting]:
        client.settimeout(10)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.close()
    wait_until(lambda: count(admin, "tokenring_connections") == 0, 10, "all to be gone")
    assert count(admin, "tokenring_accepts_total") == count(admin, "tokenring_closes_total")


def test_few_receive_buffers(start_tokenring, uvicorn, logs):
    """Many uploads at once find too few buffers: counted, and all of them arrive."""
    tokenring = start_tokenring([uvicorn.url], shards=1, buffers=16)
    admin = Admin(tokenring)
    body = b"x" * 200_000
    head = b"POST /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    crowd = [socket.create_connection(("127.0.0.1", tokenring.port)) for _ in range(100)]
    for client in crowd:
        client.settimeout(20)
        client.sendall(head + body[:1000])
    for client in crowd:
        client.sendall(body[1000:])
    for client in crowd:
        answer = client.recv(65536)
        # uvicorn may not allow the method; that it was asked is what counts.
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 405 ")), answer
        client.close()
    assert count(admin, "tokenring_buffer_shortages_total") >= 1
    wait_until(lambda: count(admin, "tokenring_connections") == 0, 10, "all to be gone")
    assert count(admin, "tokenring_receive_buffers_free") == 16


def streaming(tokenring, tokens):
    """A client in the middle of an answer of the demo model."""
    client = socket.create_connection(("127.0.0.1", tokenring.port))
    client.settimeout(20)
    client.sendall(
        b"POST /v1/chat/completions?tokens=%d&first_token_ms=0&tokens_per_s=100 HTTP/1.1\r\nHost: a\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (tokens, len(CHAT), CHAT)
    )
    return client, client.recv(65536)


def rest_of(client):
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    return answer


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR], ids=errno.errorcode.get)
def test_the_ring_takes_nothing_for_a_while(start_tokenring, number):
    """What the kernel may say when memory or room for completions is short: streams wait, and go on whole."""
    with Supervised("io_uring_enter") as kernel:
        tokenring = start_tokenring(shards=1, confine=kernel.confine)
        client, begin = streaming(tokenring, 200)
        kernel.refuse(number)
        time.sleep(0.5)
        assert kernel.refused > 0 and tokenring.alive()
        kernel.refuse(0)
        answer = begin + rest_of(client)
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), answer[-200:]
        ids = [int(line[4:]) for line in answer.split(b"\n") if line.startswith(b"id: ")]
        assert ids == list(range(1, len(ids) + 1)) and len(ids) > 200
        tokenring.drain()
        assert tokenring.wait(15) == EXIT_OK
        assert "panicked" not in tokenring.log()


@pytest.mark.parametrize("sleep", ["ring", "reactor"])
@pytest.mark.parametrize("number,reason", [(errno.EAGAIN, "memory"), (errno.EBUSY, "completions")])
def test_a_ring_that_takes_nothing_is_asked_at_leisure(start_tokenring, number, reason, sleep):
    """Asking at once again and again would take a whole CPU, which is short then as well."""
    with Supervised("io_uring_enter") as kernel:
        tokenring = start_tokenring(shards=1, confine=kernel.confine, more=["--sleep", sleep])
        client, begin = streaming(tokenring, 200)
        # Within glommio, which knows no leisure, a refusal would last until glommio itself is served again.
        kernel.refuse_from_a_turn_on(number)
        began = time.monotonic()
        time.sleep(1)
        asked, lasted = kernel.refused, time.monotonic() - began
        kernel.refuse(0)
        answer = begin + rest_of(client)
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), answer[-200:]
        # Twice a millisecond, once it has gone on for a little: with what is to be sent, and for what has come without it.
        assert 50 < asked < 2000 * lasted + 100, asked
        samples = tokenring.metrics().text.splitlines()
        [told] = [float(line.split()[1]) for line in samples if f'ring_refusals_total{{shard="0",reason="{reason}"}}' in line]
        assert 50 < told <= kernel.refused
        assert tokenring.log().count("the ring takes nothing") == 1, tokenring.log()
        tokenring.drain()
        assert tokenring.wait(15) == EXIT_OK


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY], ids=errno.errorcode.get)
def test_glommio_is_not_asked_while_the_ring_takes_nothing(start_tokenring, tmp_path, number):
    """Its rings are refused as well, and it would ask at once until it panics. What is written to disk waits meanwhile."""
    with Supervised("io_uring_enter") as kernel:
        more = ["--data-dir", tmp_path / "data", "--fsync-interval", "0"]
        tokenring = start_tokenring(shards=1, confine=kernel.confine, more=more)
        over, told = threading.Event(), []

        def publish(name):
            with httpx.Client(base_url=tokenring.url, timeout=30, headers={"Content-Type": "text/plain"}) as client:
                assert client.put(f"/v1/durable/{name}").status_code == 201
                count = 0
                while not over.is_set():
                    assert client.post(f"/v1/durable/{name}", content=b"x").status_code == 204
                    count += 1
                told.append((client.get(f"/v1/durable/{name}").text, count))

        publishers = [threading.Thread(target=publish, args=(name,)) for name in "abcd"]
        for publisher in publishers:
            publisher.start()
        try:
            # A job of the journal is under way in some of them.
            for _ in range(8):
                time.sleep(0.1)
                before = kernel.refused
                kernel.refuse_from_a_turn_on(number)
                began = time.monotonic()
                time.sleep(0.2)
                asked, lasted = kernel.refused - before, time.monotonic() - began
                kernel.refuse(0)
                assert 0 < asked < 2000 * lasted + 100, asked
        finally:
            kernel.refuse(0)
            over.set()
            for publisher in publishers:
                publisher.join(30)
        assert len(told) == 4 and all(text == "x" * count and count > 0 for text, count in told), told
        tokenring.drain()
        assert tokenring.wait(15) == EXIT_OK


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOMEM, errno.EBADF], ids=errno.errorcode.get)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_ring_fails_while_streams_run(start_tokenring, number, shards):
    """Nothing can be served without it: the process says so and ends, so that whoever watches over it starts another."""
    with Supervised("io_uring_enter") as kernel:
        tokenring = start_tokenring(shards=shards, confine=kernel.confine)
        clients = [streaming(tokenring, 10_000)[0] for _ in range(4)]
        kernel.refuse(number)
        assert tokenring.wait(20) == EXIT_INTERNAL
        said = tokenring.log()
        assert "panicked" not in said, said
        assert f"shard 0 failed: the shard's ring failed: {os.strerror(number)}" in said, said
        for client in clients:
            # Cut, and not as if it were whole.
            try:
                assert not rest_of(client).endswith(b"0\r\n\r\n")
            except ConnectionResetError:
                pass


@pytest.mark.parametrize("shards", [1, 2])
def test_several_addresses_of_both_families(start_tokenring, shards):
    """Every address is served by every shard, each with clients of its own."""
    tokenring = start_tokenring(shards=shards, listen=None, more=["--listen", "[::1]:0", "--listen", "127.0.0.1:0"])
    listening = tokenring.status()["listen"]
    assert len(listening) == 2 and listening[0].startswith("[::1]:"), listening
    for address in listening:
        for _ in range(20):
            answer = httpx.post(f"http://{address}/v1/chat/completions?tokens=3&first_token_ms=0", content=CHAT)
            assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]")
    shards_seen = [shard for shard in tokenring.status()["shards"] if shard["counters"]["accepts"] > 0]
    assert len(shards_seen) == shards, "connections are spread over all shards"
    tokenring.drain()
    assert tokenring.wait(15) == EXIT_OK
    for address in listening:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{address}/")


def test_an_ipv6_backend(start_tokenring):
    """The demo model of one process is the backend of another, over IPv6."""
    model = start_tokenring(shards=1, listen="[::1]:0")
    place = model.status()["listen"][0]
    relay = start_tokenring([f"http://{place}"], shards=2)
    answer = httpx.post(f"{relay.url}/v1/chat/completions?tokens=5&first_token_ms=0", content=CHAT)
    assert answer.status_code == 200 and "data: [DONE]\n" in answer.text
    assert relay.status()["upstreams"][0]["addresses"] == [place]
