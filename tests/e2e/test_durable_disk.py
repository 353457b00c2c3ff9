"""Durable streams on disk: what was acknowledged is there after kill -9, damage is found and costs its own stream, a disk that
is full or may not be written is told of and recovers."""

import json
import os
import random
import subprocess
import threading
import time

import httpx
import pytest

from harness import EXIT_CONFIG, EXIT_OK, find_binary, wait_until

TEXT = {"Content-Type": "text/plain"}
JSON = {"Content-Type": "application/json"}
EXIT_DATA, EXIT_UNAVAILABLE = 65, 69


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def serve(start_tokenring, data):
    """Starts a server on the data directory of the test."""

    def start(shards=1, more=(), **settings):
        return start_tokenring(shards=shards, more=["--data-dir", data, *more], **settings)

    return start


def url_of(server, name="a"):
    return f"{server.url}/v1/durable/{name}"


def streams(data, *arguments):
    command = [find_binary(), "streams", *arguments, "--data-dir", str(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def segments(data):
    return sorted(data.glob("*.segment"))


def counters(server):
    """Of all shards together."""
    all = [shard["counters"] for shard in server.status()["shards"]]
    return {name: sum(counters[name] for counters in all) for name in all[0]}


class Publisher(threading.Thread):
    """Appends numbered messages as an idempotent producer, one after the other, and remembers which were acknowledged. One that
    was not is sent again after the restart, as the protocol has it."""

    def __init__(self, name):
        super().__init__(daemon=True)
        self.stream, self.sent, self.acknowledged, self.offset = name, 0, 0, None
        self.rng = random.Random(name)

    def at(self, server):
        self.url, self.over = url_of(server, self.stream), False
        threading.Thread.__init__(self, daemon=True)
        self.start()
        return self

    def body(self, number):
        return json.dumps({"n": number, "pad": "x" * (number * 37 % 700)})

    def run(self):
        with httpx.Client(timeout=30) as client:
            while not self.over:
                number = self.acknowledged
                producer = {"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Seq": str(number)}
                try:
                    answer = client.post(self.url, headers={**JSON, **producer}, content=self.body(number))
                except httpx.HTTPError:
                    return
                if answer.status_code == 503:
                    continue
                assert answer.status_code in (200, 204), answer.text
                self.offset = answer.headers["Stream-Next-Offset"]
                self.acknowledged += 1

    def check(self, server):
        """Everything acknowledged is there, once and in order; of what was not, the next at most."""
        url, numbers, offset = url_of(server, self.stream), [], "-1"
        while True:
            page = httpx.get(url, params={"offset": offset}, timeout=30)
            assert page.status_code == 200, page.text
            for message in page.json():
                assert message == json.loads(self.body(message["n"]))
                numbers.append(message["n"])
            offset = page.headers["Stream-Next-Offset"]
            if "Stream-Up-To-Date" in page.headers:
                break
        assert numbers in (list(range(self.acknowledged)), list(range(self.acknowledged + 1)))
        if self.offset:
            assert httpx.get(url, params={"offset": self.offset}).status_code == 200
        return len(numbers)


@pytest.mark.parametrize("interval", ["0", "20"])
def test_kill_9_under_load_loses_nothing_that_was_acknowledged(serve, data, interval):
    more = ["--fsync-interval", interval]
    server = serve(more=more)
    publishers = [Publisher(f"s{number}") for number in range(8)]
    for publisher in publishers:
        assert httpx.put(url_of(server, publisher.stream), headers=JSON).status_code == 201
    rng, acknowledged = random.Random(interval), 0
    for round in range(8):
        for publisher in publishers:
            publisher.at(server)
        before = sum(publisher.acknowledged for publisher in publishers)
        wait_until(lambda: sum(p.acknowledged for p in publishers) > before + 40, 30, "appends")  # noqa: B023
        time.sleep(rng.random() / 5)
        server.kill()
        for publisher in publishers:
            publisher.over = True
            publisher.join(30)
        # On another number of shards: each has those of its paths.
        server = serve(shards=1 + round % 3, more=more)
        for publisher in publishers:
            publisher.check(server)
        acknowledged = sum(publisher.acknowledged for publisher in publishers)
    assert acknowledged > 8 * 40
    verified = streams(data, "verify")
    assert verified.returncode == EXIT_OK, verified.stdout


def test_one_sync_serves_all_who_wait_for_one(serve):
    server = serve()
    publishers = [Publisher(f"s{number}") for number in range(16)]
    for publisher in publishers:
        httpx.put(url_of(server, publisher.stream), headers=JSON)
        publisher.at(server)
    wait_until(lambda: sum(p.acknowledged for p in publishers) > 600, 60, "appends")
    for publisher in publishers:
        publisher.over = True
        publisher.join(30)
    counted = counters(server)
    assert counted["durable_journal_syncs"] < counted["durable_appends"], counted


def test_everything_goes_on_after_a_restart_as_if_there_had_been_none(serve):
    first = serve()
    producer = {"Producer-Id": "p", "Producer-Epoch": "2"}
    httpx.put(url_of(first), headers={**TEXT, "Stream-TTL": "3600"})
    append = {**TEXT, **producer, "Stream-Seq": "b"}
    assert httpx.post(url_of(first), headers={**append, "Producer-Seq": "0"}, content="one;").status_code == 200
    offset = httpx.head(url_of(first)).headers["Stream-Next-Offset"]
    httpx.put(url_of(first, "closed"), headers={**JSON, "Stream-Closed": "true"}, content="[1,2]")
    httpx.put(url_of(first, "fork"), headers={"Stream-Forked-From": "/v1/durable/a"})
    httpx.post(url_of(first, "fork"), headers=TEXT, content="of the fork")
    httpx.put(url_of(first, "gone"), headers=TEXT, content="x")
    gone = httpx.head(url_of(first, "gone")).headers["Stream-Next-Offset"]
    assert httpx.delete(url_of(first, "gone")).status_code == 204
    first.drain()
    assert first.wait(10) == EXIT_OK

    second = serve(shards=2)
    head = httpx.head(url_of(second)).headers
    assert (head["Stream-Next-Offset"], head["Stream-TTL"]) == (offset, "3600")
    assert httpx.put(url_of(second), headers={**TEXT, "Stream-TTL": "3600"}).status_code == 200
    again = httpx.post(url_of(second), headers={**append, "Producer-Seq": "0"}, content="one;")
    assert again.status_code == 204, "it was appended before"
    stale = httpx.post(url_of(second), headers={**TEXT, **producer, "Producer-Epoch": "1", "Producer-Seq": "0"}, content="x")
    assert stale.status_code == 403 and stale.headers["Producer-Epoch"] == "2"
    back = httpx.post(url_of(second), headers={**TEXT, "Stream-Seq": "a"}, content="x")
    assert back.json()["error"]["code"] == "sequence_regression"
    next = httpx.post(url_of(second), headers={**TEXT, **producer, "Producer-Seq": "1"}, content="two;")
    assert next.status_code == 200 and next.headers["Stream-Next-Offset"] > offset
    assert httpx.get(f"{url_of(second)}?offset={offset}").text == "two;"
    assert httpx.get(url_of(second, "fork")).text == "one;of the fork"
    closed = httpx.post(url_of(second, "closed"), headers=JSON, content="[3]")
    assert closed.status_code == 409 and closed.headers["Stream-Closed"] == "true"
    assert httpx.get(url_of(second, "gone")).status_code == 404
    httpx.put(url_of(second, "gone"), headers=TEXT, content="another, and longer")
    assert httpx.get(f"{url_of(second, 'gone')}?offset={gone}").json()["error"]["code"] == "offset_of_another_stream"
    assert counters(second)["durable_recovered"] == 3


def fill(server, names, messages=5):
    for name in names:
        assert httpx.put(url_of(server, name), headers=JSON).status_code == 201
        for number in range(messages):
            assert httpx.post(url_of(server, name), headers=JSON, content=f'["{name} {number}"]').status_code == 204


def test_a_torn_tail_is_cut_and_reported(serve, data):
    server = serve()
    fill(server, "abc")
    server.kill()
    last = segments(data)[-1]
    content = last.read_bytes()
    last.write_bytes(content + content[64:164])
    verified = streams(data, "verify")
    assert verified.returncode == EXIT_OK
    assert f"{last}:{len(content)}: the end was being written: 100 bytes" in verified.stdout
    again = serve()
    assert f"{last}:{len(content)}: the end was being written" in again.log()
    for name in "abc":
        assert httpx.get(url_of(again, name)).json() == [f"{name} {number}" for number in range(5)]
    fill(again, "d")
    again.kill()
    third = serve()
    assert httpx.get(url_of(third, "d")).status_code == 200


def test_a_flipped_byte_in_the_middle_costs_its_own_stream_only(serve, data):
    server = serve()
    fill(server, "abc")
    offsets = {name: httpx.head(url_of(server, name)).headers["Stream-Next-Offset"] for name in "abc"}
    server.kill()
    segment = segments(data)[0]
    content = bytearray(segment.read_bytes())
    content[content.index(b'"b 2"') + 2] ^= 0x20
    segment.write_bytes(content)
    verified = streams(data, "verify")
    assert verified.returncode == EXIT_DATA
    assert f"{segment}:" in verified.stdout and "append of /v1/durable/b" in verified.stdout

    again = serve()
    assert "a record is damaged: append of /v1/durable/b" in again.log()
    assert counters(again)["durable_damages"] > 0
    for name in "ac":
        assert httpx.get(url_of(again, name)).json() == [f"{name} {number}" for number in range(5)]
    gone = httpx.get(url_of(again, "b"))
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "offset_gone")
    earliest = gone.headers["Stream-Earliest-Offset"]
    assert httpx.get(f"{url_of(again, 'b')}?offset={earliest}").json() == ["b 3", "b 4"]
    for name in "abc":
        assert httpx.head(url_of(again, name)).headers["Stream-Next-Offset"] == offsets[name]
        assert httpx.post(url_of(again, name), headers=JSON, content='["more"]').status_code == 204


def test_a_second_process_is_refused(serve, data):
    server = serve()
    second = subprocess.run(
        [find_binary(), "serve", "--listen", "127.0.0.1:0", "--admin", "off", "--data-dir", str(data)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == EXIT_UNAVAILABLE
    assert f"another process writes it (id {server.pid})" in second.stderr
    assert httpx.put(url_of(server), headers=TEXT).status_code == 201
    server.kill()
    assert httpx.get(url_of(serve())).status_code == 200, "a lock does not outlive its process"


def test_a_directory_that_cannot_be_used_is_told_of_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    places = {tmp_path / "file": "not a directory", tmp_path / "none" / "below": "cannot be made", "/proc/self": "cannot be"}
    for place, why in places.items():
        for command in ["serve", "check"]:
            arguments = [find_binary(), command, "--listen", "127.0.0.1:0", "--admin", "off", "--data-dir", str(place)]
            ended = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
            # Whoever is root may write where others may not, so that `check` cannot know of all.
            if command == "serve" or place != "/proc/self":
                assert ended.returncode == EXIT_CONFIG, (command, place, ended.stderr)
                assert f"data directory {place}: {why}" in ended.stderr


def test_a_full_disk_refuses_publishers_and_recovers_by_itself(start_tokenring, small_disk):
    start = lambda: start_tokenring(shards=1, more=["--data-dir", small_disk / "data"])  # noqa: E731
    server = start()
    acknowledged = []
    with httpx.Client(timeout=30) as client:
        assert client.put(url_of(server), headers=JSON).status_code == 201

        def append(number):
            producer = {"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Seq": str(number)}
            body = json.dumps({"n": number, "pad": "x" * 50_000})
            return client.post(url_of(server), headers={**JSON, **producer}, content=body)

        for number in range(200):
            answer = append(number)
            if answer.status_code == 503:
                break
            acknowledged.append(number)
        assert 10 < len(acknowledged) < 100
        assert answer.json()["error"]["code"] == "not_durable" and "Retry-After" in answer.headers
        refused = client.put(url_of(server, "other"), headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "disk_failed")
        # Whatever is there is served.
        assert [message["n"] for message in read_all(client, url_of(server))] == acknowledged
        ready = client.get(f"{server.admin_url}/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "disk_failed"
        assert "No space left on device" in ready.json()["message"]
        wait_until(lambda: "durable streams cannot be written" in server.log(), 5, "the log says so")

        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        wait_until(lambda: client.get(f"{server.admin_url}/ready").status_code == 200, 20, "recovery")
        # The one that was under way is there once, whether it is sent again or not.
        assert append(len(acknowledged)).status_code == 204
        acknowledged.append(len(acknowledged))
        assert append(len(acknowledged)).status_code == 200
        acknowledged.append(len(acknowledged))
        assert [message["n"] for message in read_all(client, url_of(server))] == acknowledged
        server.kill()
        server = start()
        assert [message["n"] for message in read_all(client, url_of(server))] == acknowledged


def read_all(client, url):
    messages, offset = [], "-1"
    while True:
        page = client.get(url, params={"offset": offset})
        messages += page.json()
        offset = page.headers["Stream-Next-Offset"]
        if "Stream-Up-To-Date" in page.headers:
            return messages


def test_segments_that_nobody_needs_go(serve, data):
    server = serve(more=["--durable-stream-bytes-max", "2MiB", "--durable-store-bytes-max", "4MiB"])
    body = os.urandom(900_000)
    binary = {"Content-Type": "application/octet-stream"}
    with httpx.Client(timeout=60) as client:
        client.put(url_of(server, "quiet"), headers=TEXT, content="from long ago")
        client.put(url_of(server), headers=binary)
        for _ in range(160):
            assert client.post(url_of(server), headers=binary, content=body).status_code == 204
    wait_until(lambda: sum(path.stat().st_size for path in segments(data)) < 110_000_000, 20, "segments to go")
    assert counters(server)["durable_segments_removed"] > 0
    assert not (data / "00000000000000000001.segment").exists()
    assert server.status()["shards"][0]["counters"]["durable_rewritten_bytes"] > 0
    server.kill()
    again = serve()
    assert httpx.get(url_of(again, "quiet")).text == "from long ago"


def test_streams_of_a_directory_can_be_looked_at_without_a_server(serve, data):
    server = serve()
    fill(server, "ab", messages=3)
    httpx.put(url_of(server, "text"), headers={**TEXT, "Stream-Closed": "true"}, content="all of it")
    producer = {"Producer-Id": "p", "Producer-Epoch": "1", "Producer-Seq": "0"}
    httpx.post(url_of(server, "a"), headers={**JSON, **producer}, content="[3]")
    live = streams(data, "verify")
    assert live.returncode == EXIT_OK and live.stdout.startswith("a server writes this directory")
    server.drain()
    assert server.wait(10) == EXIT_OK
    listed = streams(data, "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["PATH", "/v1/durable/a", "/v1/durable/b", "/v1/durable/text"]
    assert listed[3].split()[1:] == ["1", "9", "closed", "text/plain"]
    shown = streams(data, "show", "/v1/durable/a").stdout
    assert "messages      4\n" in shown and "producer      p, epoch 1, sequence 0\n" in shown
    assert streams(data, "export", "/v1/durable/a").stdout == '["a 0","a 1","a 2",3]'
    assert streams(data, "export", "/v1/durable/text").stdout == "all of it"
    none = streams(data, "show", "/v1/durable/none")
    assert none.returncode != EXIT_OK and "there is no stream /v1/durable/none" in none.stderr


def test_what_is_published_lies_on_the_disk(serve, data):
    server = serve()
    httpx.put(url_of(server), headers=TEXT, content="on the disk")
    assert b"on the disk" in segments(data)[0].read_bytes()


def test_messages_go_when_they_are_old_and_a_restart_brings_none_back(serve, data):
    server = serve(more=["--durable-retention-ms", "2000"])
    url = url_of(server)
    text = {"Content-Type": "text/plain"}
    httpx.put(url, headers=text).raise_for_status()
    old = httpx.post(url, headers=text, content="old").headers["stream-next-offset"]

    def gone():
        answer = httpx.get(url)
        return answer if answer.status_code == 410 else None

    assert httpx.get(url).text == "old"
    wait_until(gone, 20, "it is old", every=0.2)
    assert gone().json()["error"]["code"] == "offset_gone" and gone().headers["stream-earliest-offset"] == old
    httpx.post(url, headers=text, content="new").raise_for_status()
    assert httpx.get(url, params={"offset": old}).text == "new"
    server.kill()
    server = serve(more=["--durable-retention-ms", "2000"])
    url = url_of(server)
    assert httpx.get(url).headers["stream-earliest-offset"] >= old
    wait_until(lambda: httpx.get(url, params={"offset": old}).status_code == 410, 20, "the other is old, too", every=0.2)
    assert streams(data, "verify").returncode == 0
