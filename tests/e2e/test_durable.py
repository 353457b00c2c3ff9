"""Durable streams: the protocol's own conformance suite, and what it does not ask: many readers, slow ones, limits, restarts."""

import json
import os
import random
import selectors
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest
from harness import EXIT_CONFIG, NODE_SCRIPTS, durable_home, wait_until
from test_resume import metric

pytestmark = pytest.mark.relay

JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}
CLOSE = {"Stream-Closed": "true"}
MIB = 1 << 20

# What the suite asks of every server; the rest is for servers with subscriptions (webhooks), which it skips.
CONFORMANCE_TESTS, SUBSCRIPTION_TESTS = 332, 6


@pytest.fixture
def durable(start_tokenring):
    return start_tokenring(shards=1)


def url_of(tokenring, name="a"):
    return f"{tokenring.url}/v1/durable/{name}"


def shard_of(tokenring):
    return tokenring.status()["shards"][0]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("shards", "on_disk"), [(1, False), (2, False), (4, False), (1, True), (3, True)])
def test_the_protocols_conformance_suite(start_tokenring, tmp_path, shards, on_disk):
    long_poll_ms = "1500"
    flags = ["--durable-prefix", "/v1/stream", "--durable-long-poll-ms", long_poll_ms]
    flags += ["--data-dir", tmp_path / "data"] if on_disk else []
    tokenring = start_tokenring(shards=shards, more=flags)
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            NODE_SCRIPTS / "node_modules" / ".bin" / "vitest",
            "run",
            *("--root", NODE_SCRIPTS / "durable"),
            *("--reporter", "json", "--outputFile", report),
        ],
        env={**os.environ, "DURABLE_URL": tokenring.url, "DURABLE_LONG_POLL_MS": long_poll_ms},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    failed = [
        f"{test['fullName']}\n{test['failureMessages'][:1]}"
        for suite in found["testResults"]
        for test in suite["assertionResults"]
        if test["status"] == "failed"
    ]
    assert not failed, "\n".join(failed)
    assert (found["numPassedTests"], found["numPendingTests"]) == (CONFORMANCE_TESTS, SUBSCRIPTION_TESTS)


class Reader:
    """A reader of events on a bare socket: what comes is kept, and taken apart at the end."""

    def __init__(self, tokenring, target, fields="", receive_bytes=None):
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", tokenring.port))
        self.socket.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode())
        self.received = bytearray()

    def read_on(self):
        """False at the end."""
        piece = self.socket.recv(1 << 16)
        self.received += piece
        whole = self.received.endswith(b"0\r\n\r\n") or self.received.startswith(b"HTTP/1.1 204 ")
        return bool(piece) and not whole

    def events(self):
        """`(name, data, id)` of every whole event."""
        head, _, rest = bytes(self.received).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        body = bytearray()
        while (at := rest.find(b"\r\n")) > 0:
            size = int(rest[:at], 16)
            body += rest[at + 2 : at + 2 + size]
            rest = rest[at + 2 + size + 2 :]
        found = []
        for block in body.decode().split("\n\n")[:-1]:
            fields = [line.partition(":")[::2] for line in block.split("\n")]
            values = {name: [value for key, value in fields if key == name] for name in ("event", "data", "id")}
            if values["data"]:
                found.append(("".join(values["event"]).strip(), "\n".join(values["data"]), "".join(values["id"])))
        return found

    def numbers(self):
        """Of JSON messages with an `n`, in either kind of events; and whether the stream's end was told."""
        found, closed = [], False
        for name, data, _ in self.events():
            value = json.loads(data)
            if name == "control":
                closed |= value.get("streamClosed", False)
            else:
                found += [message["n"] for message in value] if name == "data" else [value["n"]]
        return found, closed


@pytest.mark.timeout(120)
def test_a_thousand_readers_see_every_event_once_and_in_order(durable):
    """Most of them from the start, some of them when half is published already, while appends go on."""
    stream, messages = url_of(durable), 150
    with httpx.Client() as publisher:
        assert publisher.put(stream, headers=JSON).status_code == 201
        readers = [Reader(durable, "/v1/durable/a?offset=-1&live=sse") for _ in range(900)]
        wait_until(lambda: shard_of(durable)["durable"]["readers"] == 900, 20, "900 readers")

        def publish():
            for number in range(messages):
                fields = {"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Seq": str(number)}
                answer = publisher.post(stream, headers={**JSON, **fields}, json={"n": number, "pad": "x" * 50})
                assert answer.status_code == 200
                if number == messages // 2:
                    halfway.set()
            publisher.post(stream, headers=CLOSE)

        halfway = threading.Event()
        thread = threading.Thread(target=publish)
        thread.start()
        with selectors.DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader.socket, selectors.EVENT_READ, reader)
            late = 100
            while selector.get_map():
                if halfway.is_set() and late:
                    for _ in range(late):
                        reader = Reader(durable, "/v1/durable/a?offset=-1&live=sse")
                        readers.append(reader)
                        selector.register(reader.socket, selectors.EVENT_READ, reader)
                    late = 0
                ready = selector.select(20)
                assert ready, "readers wait for what does not come"
                for key, _ in ready:
                    if not key.data.read_on():
                        selector.unregister(key.fileobj)
        thread.join()
    assert len(readers) == 1000
    for reader in readers:
        assert reader.numbers() == (list(range(messages)), True)
        reader.socket.close()
    wait_until(lambda: shard_of(durable)["durable"]["readers"] == 0, 10, "all readers to have left")
    assert shard_of(durable)["durable"]["streams"] == 1


def test_a_reader_that_is_cut_off_again_and_again_misses_nothing(start_tokenring):
    """As an EventSource does it: it comes back with the last id that it saw, wherever its connection broke."""
    durable = start_tokenring(shards=1, more=["--durable-events-ms", "150"])
    stream, messages = url_of(durable), 400
    httpx.put(stream, headers=JSON)

    def publish():
        with httpx.Client() as publisher:
            for number in range(messages):
                publisher.post(stream, headers=JSON, json={"n": number})
                time.sleep(0.005)
            publisher.post(stream, headers=CLOSE)

    thread = threading.Thread(target=publish)
    thread.start()
    found, last_id, comings = [], "", 0
    chance = random.Random(7)
    while True:
        comings += 1
        fields = "Accept: text/event-stream\r\n" + (f"Last-Event-ID: {last_id}\r\n" if last_id else "")
        reader = Reader(durable, "/v1/durable/a", fields)
        enough = chance.randrange(200, 4000)
        while reader.read_on() and len(reader.received) < enough:
            pass
        reader.socket.close()
        if reader.received.startswith(b"HTTP/1.1 204 "):
            break
        for name, data, id in reader.events():
            assert name == ""
            found.append(json.loads(data)["n"])
            last_id = id
    thread.join()
    assert found == list(range(messages))
    assert comings > 12


def test_slow_readers_of_a_long_stream_cost_little(durable):
    """Readers that stand still hold what their marks allow, not the 12 MiB that they are owed; all of it reaches them later."""
    stream, readers, chunk = url_of(durable), 40, "0123456789abcdef" * (MIB // 16)
    httpx.put(stream, headers=TEXT)
    for _ in range(12):
        assert httpx.post(stream, headers=TEXT, content=chunk).status_code == 204
    before = durable.resident_bytes()
    stuck = [Reader(durable, "/v1/durable/a?offset=-1&live=sse") for _ in range(readers)]
    pages = [Reader(durable, "/v1/durable/a?offset=-1") for _ in range(readers)]
    wait_until(lambda: shard_of(durable)["durable"]["readers"] == 2 * readers, 10, "the readers")
    wait_until(lambda: shard_of(durable)["in_flight_bytes"] > 0, 10, "sends that stand still")
    time.sleep(0.5)
    state = shard_of(durable)
    # Each: the high mark and two segments.
    assert state["log_bytes"] <= 2 * readers * (64 + 2 * 64) * 1024
    assert state["overdraft_bytes"] == 0
    assert durable.resident_bytes() - before < 2 * readers * 256 * 1024
    # Somebody else is served at once.
    assert httpx.get(f"{stream}?offset=now").status_code == 200
    reader = stuck[0]
    while reader.received.count(b"upToDate") == 0:
        reader.read_on()
    data = "".join(data for name, data, _ in reader.events() if name == "data")
    assert data == chunk * 12
    page = pages[0]
    while len(page.received) < MIB:
        page.read_on()
    head, _, body = bytes(page.received).partition(b"\r\n\r\n")
    while len(body) < MIB:
        body += page.socket.recv(1 << 16)
    assert b"\r\nStream-Up-To-Date: true" not in head and body.decode() == chunk
    for reader in [*stuck, *pages]:
        reader.socket.close()
    wait_until(lambda: shard_of(durable)["durable"]["readers"] == 0, 10, "all to have left")


def test_streams_expire_without_being_asked(durable):
    for name in range(10):
        httpx.put(url_of(durable, name), headers={**TEXT, "Stream-TTL": "1"}, content="x")
    httpx.put(url_of(durable, "kept"), headers=TEXT, content="x")
    assert shard_of(durable)["durable"]["streams"] == 11
    wait_until(lambda: shard_of(durable)["durable"]["streams"] == 1, 10, "ten streams to expire")
    assert shard_of(durable)["counters"]["durable_expiries"] == 10
    assert httpx.get(url_of(durable, "kept")).text == "x"


def test_memory_is_bounded_and_what_was_given_up_is_counted(start_tokenring):
    flags = ["--durable-store-bytes-max", "2MiB", "--durable-stream-bytes-max", "1MiB", "--durable-body-bytes-max", "256KiB"]
    durable = start_tokenring(shards=1, more=flags)
    body = "x" * 200_000
    with httpx.Client() as client:
        for name in range(20):
            assert client.put(url_of(durable, name), headers={**TEXT, **CLOSE}, content=body).status_code == 201
        found = [client.head(url_of(durable, name)).status_code for name in range(20)]
        assert found == sorted(found, reverse=True) and 5 < found.count(200) < 15, found
        state = shard_of(durable)
        assert state["durable"]["bytes"] <= state["durable"]["bytes_max"] == 2 * MIB
        assert state["counters"]["durable_evictions"] == found.count(404)
        # One stream beyond its window: the start is gone, and said to be.
        client.put(url_of(durable, "long"), headers=TEXT)
        for _ in range(10):
            assert client.post(url_of(durable, "long"), headers=TEXT, content=body).status_code == 204
        gone = client.get(url_of(durable, "long"))
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "offset_gone")
        rest = client.get(f"{url_of(durable, 'long')}?offset={gone.headers['Stream-Earliest-Offset']}")
        assert rest.status_code == 200 and set(rest.text) == {"x"}
        assert client.post(url_of(durable, "long"), headers=TEXT, content=body * 2).status_code == 413
        assert shard_of(durable)["counters"]["durable_trimmed_bytes"] >= 5 * 200_000
        # Readers are spared, so there is nothing to give up.
        client.delete(url_of(durable, "long"))
        readers = []
        for name in range(30):
            if client.put(url_of(durable, f"read-{name}"), headers=TEXT, content=body).status_code == 503:
                break
            readers.append(Reader(durable, f"/v1/durable/read-{name}?offset=now&live=sse"))
            wait_until(lambda: shard_of(durable)["durable"]["readers"] == len(readers), 10, "a reader")  # noqa: B023
        assert 5 < len(readers) < 15
        for name in range(len(readers)):
            assert client.get(url_of(durable, f"read-{name}")).text == body
        assert shard_of(durable)["counters"]["durable_full"] == 1
    for reader in readers:
        reader.socket.close()


def test_a_restart_loses_the_streams_and_says_so(start_tokenring):
    first = start_tokenring(shards=1)
    httpx.put(url_of(first), headers=TEXT, content="before")
    offset = httpx.head(url_of(first)).headers["Stream-Next-Offset"]
    first.drain()
    assert first.wait(10) == 0
    second = start_tokenring(shards=1)
    assert httpx.get(f"{url_of(second)}?offset={offset}").status_code == 404
    httpx.put(url_of(second), headers=TEXT, content="after, and longer than before")
    gone = httpx.get(f"{url_of(second)}?offset={offset}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "offset_of_another_stream")


def test_a_drain_ends_readers_at_once_and_in_peace(durable):
    stream = url_of(durable)
    httpx.put(stream, headers=JSON, json=[{"n": 0}])
    events = Reader(durable, "/v1/durable/a?offset=-1&live=sse")
    poll = Reader(durable, "/v1/durable/a?offset=now&live=long-poll")
    wait_until(lambda: shard_of(durable)["durable"]["readers"] == 2, 10, "the readers")
    durable.drain()
    while events.read_on():
        pass
    while poll.read_on():
        pass
    assert events.received.endswith(b"\r\n0\r\n\r\n") and events.numbers() == ([0], False)
    assert poll.received.startswith(b"HTTP/1.1 204 ") and b"Stream-Up-To-Date: true" in poll.received
    # Long before the deadline of 30 s.
    assert durable.wait(10) == 0


def test_only_paths_under_the_prefix_are_taken_from_backends(start_tokenring, uvicorn):
    tokenring = start_tokenring([uvicorn.url], shards=1)
    assert httpx.get(url_of(tokenring, "none")).json()["error"]["code"] == "stream_not_found"
    assert httpx.get(f"{tokenring.url}/health").status_code == 200
    away = start_tokenring([uvicorn.url], shards=1, more=["--durable-prefix", "/elsewhere/streams"])
    assert httpx.put(f"{away.url}/elsewhere/streams/a", headers=TEXT).status_code == 201
    off = start_tokenring([uvicorn.url], shards=1, more=["--durable-prefix", "off"])
    for server in (away, off):
        answer = httpx.put(url_of(server), headers=TEXT)
        assert answer.status_code in (404, 405) and "stream" not in answer.text


def test_a_client_goes_to_the_shard_that_has_the_stream(start_tokenring, uvicorn):
    tokenring = start_tokenring([uvicorn.url], shards=2)
    assert httpx.put(url_of(tokenring), headers=TEXT).status_code == 201
    clients = [httpx.Client() for _ in range(40)]
    # Every other request is the backend's, and is served wherever the client is.
    for number, client in enumerate(clients):
        assert client.get(f"{tokenring.url}/v1/models").status_code == 200
        assert client.post(url_of(tokenring), headers=TEXT, content=f"{number};").status_code == 204
        assert client.get(f"{tokenring.url}/v1/models").status_code == 200
    expected = "".join(f"{number};" for number in range(len(clients)))
    for client in clients:
        assert client.get(url_of(tokenring)).text == expected
        client.close()
    home = durable_home("/v1/durable/a", 2)
    shards = tokenring.status()["shards"]
    home, other = shards[home], shards[1 - home]
    assert (home["durable"]["streams"], other["durable"]["streams"]) == (1, 0)
    assert other["counters"]["moves"] > 0 and home["counters"]["moves"] == 0
    wait_until(lambda: sum(s["connections"] for s in tokenring.status()["shards"]) == 0, 10, "all to have left")


def test_requests_pipelined_behind_one_that_moves_its_client_come_along(start_tokenring):
    tokenring = start_tokenring(shards=2)
    put = "PUT /v1/durable/a HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
    post = "POST /v1/durable/a HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nab"
    get = "GET /v1/durable/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for round in range(30):
        with socket.create_connection(("127.0.0.1", tokenring.port)) as client:
            client.settimeout(20)
            text = (put + post + get).encode()
            # The rest, or the FIN behind it, may come while the client is on its way.
            client.sendall(text[: len(text) - round])
            client.sendall(text[len(text) - round :])
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.count(b"HTTP/1.1 2") == 3, answer
        assert answer.endswith(b"ab" * (round + 1)), answer
    assert tokenring.status()["shards"][1 - durable_home("/v1/durable/a", 2)]["counters"]["moves"] > 0


# ---- live readers on several shards


class Live:
    """Live readers of a durable stream, read side by side; each in one of the two forms."""

    def __init__(self, tokenring, target="/v1/durable/a"):
        self.tokenring, self.target, self.selector, self.readers = tokenring, target, selectors.DefaultSelector(), []

    def add(self, plain=False, receive_bytes=None):
        if plain:
            reader = Reader(self.tokenring, self.target, "Accept: text/event-stream\r\n", receive_bytes)
        else:
            reader = Reader(self.tokenring, f"{self.target}?offset=-1&live=sse", "", receive_bytes)
        reader.plain, reader.over = plain, False
        self.selector.register(reader.socket, selectors.EVENT_READ, reader)
        self.readers.append(reader)
        return reader

    def drop(self, reader):
        self.selector.unregister(reader.socket)
        self.readers.remove(reader)
        reader.socket.close()

    def pump(self, seconds):
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) >= 0:
            ready = self.selector.select(left_s)
            if not ready:
                break
            for key, _ in ready:
                if not key.data.read_on():
                    key.data.over = True
                    self.selector.unregister(key.fileobj)

    def until(self, holds, seconds, what):
        due_s = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < due_s, what
            self.pump(0.05)


def shards_reads(tokenring):
    return [shard["durable"]["readers"] for shard in tokenring.status()["shards"]]


def spread(tokenring, live, count):
    """So many readers, who have caught up and are read on both shards."""
    for nth in range(count):
        live.add(plain=nth % 3 == 0)

    def shared():
        reads = shards_reads(tokenring)
        return sum(reads) == count and min(reads) >= count // 4

    live.until(shared, 20, f"readers on both shards: {shards_reads(tokenring)}")


def append(publisher, stream, number, pad=50):
    assert publisher.post(stream, headers=JSON, json={"n": number, "pad": "x" * pad}).status_code < 300


def caught_up(reader, last):
    """It has the message with that number."""
    return b'"n":%d,' % last in reader.received[-50_000:].replace(b" ", b"")


def has(reader, messages, closed):
    """It has what was published, once and in order, in either form."""
    found, told = reader.numbers()
    return found == list(range(messages)) and (reader.plain or told == closed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["closed", "deleted", "drained"])
def test_live_readers_are_shared_by_the_shards(start_tokenring, end):
    """Handed over in the middle of their answers; some are kicked again and again."""
    tokenring = start_tokenring(shards=2, more=["--mirror-readers", 8, "--conns-max", 1200])
    stream, chance, live = url_of(tokenring), random.Random(5), Live(tokenring)
    with httpx.Client() as publisher:
        assert publisher.put(stream, headers=JSON).status_code == 201
        append(publisher, stream, 0)
        spread(tokenring, live, 300)
        assert metric(tokenring, "tokenring_durable_readers_handed_over_total") > 50
        for number in range(1, 60):
            append(publisher, stream, number, chance.choice([20, 500, 20_000]))
            live.pump(0.01)
            for reader in chance.sample(live.readers, 4):
                live.drop(reader)
                live.add(plain=reader.plain)
        assert len(live.readers) == 300
        if end == "closed":
            publisher.post(stream, headers=CLOSE)
        elif end == "deleted":
            live.until(lambda: all(caught_up(reader, 59) for reader in live.readers), 20, "all have all")
            publisher.delete(stream)
        else:
            live.until(lambda: all(caught_up(reader, 59) for reader in live.readers), 20, "all have all")
            tokenring.signal(signal.SIGTERM)
        live.until(lambda: all(reader.over for reader in live.readers), 20, "the end comes to all")
    assert all(reader.received.endswith(b"0\r\n\r\n") for reader in live.readers)
    assert all(has(reader, 60, end == "closed") for reader in live.readers)
    if end != "drained":
        wait_until(lambda: metric(tokenring, "tokenring_mirrors") == 0, 5, "no mirror is left")
        assert metric(tokenring, "tokenring_mirrors_opened_total") == metric(tokenring, "tokenring_mirrors_closed_total")


@pytest.mark.timeout(120)
def test_a_live_reader_that_a_mirror_leaves_behind_misses_nothing(start_tokenring):
    tokenring = start_tokenring(shards=2, more=["--mirror-readers", 8, "--write-stall-ms", 0])
    stream, live, count = url_of(tokenring), Live(tokenring), 300
    with httpx.Client() as publisher:
        assert publisher.put(stream, headers=JSON).status_code == 201
        append(publisher, stream, 0)
        spread(tokenring, live, 60)
        stuck = [live.add(receive_bytes=4096) for _ in range(40)]
        live.until(lambda: sum(shards_reads(tokenring)) == 100 and min(shards_reads(tokenring)) > 40, 20, "all are shared")
        for reader in stuck:
            live.selector.unregister(reader.socket)
        for number in range(1, count):
            append(publisher, stream, number, 8_000)
            live.pump(0.002)
        publisher.post(stream, headers=CLOSE)
        for reader in stuck:
            live.selector.register(reader.socket, selectors.EVENT_READ, reader)
        live.until(lambda: all(reader.over for reader in live.readers), 60, "all come to the end")
    assert all(has(reader, count, True) for reader in live.readers)
    assert metric(tokenring, "tokenring_durable_readers_handed_back_total") > 0
