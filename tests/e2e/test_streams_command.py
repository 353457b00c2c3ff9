"""`tokenring streams` on a server that runs: what it lists, and that a tail has every event once, whatever breaks in between."""

import json
import subprocess

import httpx
import pytest
from cutter import Cutter
from harness import find_binary, wait_until
from streams import ask_chat, resume, status

pytestmark = pytest.mark.relay


def command(*arguments):
    return [find_binary(), "streams", *map(str, arguments)]


def streams(*arguments, exits=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == exits, done.stderr
    return done


def admin(tokenring):
    return f"http://127.0.0.1:{tokenring.admin_port}"


def clients(tokenring):
    return f"http://127.0.0.1:{tokenring.port}"


def listed(tokenring):
    all_of_them = json.loads(streams("list", "--json", "--server", admin(tokenring)).stdout)
    assert all_of_them["silent_shards"] == []
    return {stream.get("id") or stream["path"]: stream for stream in all_of_them["streams"]}


def begin(tokenring, backend, words, **more):
    client = ask_chat(tokenring.port, **more)
    said = backend.accept()
    said.say(words)
    return client.read_head().read(words), said


def durable(tokenring, path, *messages, content_type="application/json"):
    url = f"{clients(tokenring)}/v1/durable/{path}"
    httpx.put(url, headers={"Content-Type": content_type}).raise_for_status()
    for message in messages:
        httpx.post(url, headers={"Content-Type": content_type}, content=message).raise_for_status()
    return url


@pytest.mark.parametrize("shards", [1, 2])
def test_all_streams_are_listed(start, backend, shards):
    tokenring = start("--on-leave-max", "finish", shards=shards)
    live, said = begin(tokenring, backend, 3)
    alone, other = begin(tokenring, backend, 2, fields="Tokenring-On-Leave: finish\r\n")
    over, third = begin(tokenring, backend, 1)
    beside = resume(tokenring.port, live.stream, 0)
    alone.leave()
    third.done()
    over.read_all()
    durable(tokenring, "a", '["one","two"]', "3")
    durable(tokenring, "b/c", "text", content_type="text/plain")
    wait_until(lambda: status(tokenring.port, alone.stream)["phase"] == "detached", 5, "it is noticed")
    found = listed(tokenring)
    assert set(found) == {live.stream, alone.stream, over.stream, "/v1/durable/a", "/v1/durable/b/c"}
    of = found[live.stream]
    assert (of["kind"], of["phase"], of["readers"], of["last_event_id"]) == ("kept", "streaming", 2, 3)
    assert (of["earliest_event_id"], of["dialect"], of["route"], of["model"]) == (1, "chat", "default", "fake-model")
    assert of["on_leave"] == "detach;ttl=30" and of["held_bytes"] > 300 and of["age_ms"] >= of["quiet_ms"]
    assert (found[alone.stream]["phase"], found[alone.stream]["on_leave"]) == ("detached", "finish")
    assert (found[over.stream]["phase"], found[over.stream]["end"]) == ("over", "done")
    path = found["/v1/durable/a"]
    assert (path["kind"], path["state"], path["messages"], path["content_type"]) == ("durable", "open", 3, "application/json")
    # As a table, one at a time, and some at a time.
    table = streams("list", "--server", admin(tokenring)).stdout.splitlines()
    assert len(table) == 6 and table[0].split()[:3] == ["STREAM", "STATE", "READERS"]
    assert any(line.startswith(over.stream) and "over: done" in line for line in table)
    one = json.loads(streams("show", live.stream, "--json", "--server", admin(tokenring)).stdout)
    assert one["last_event_id"] == 3 and len(one["pending_bytes"]) == 2
    shown = streams("show", "/v1/durable/b/c", "--server", admin(tokenring)).stdout
    assert "content type  text/plain" in shown and "messages      1" in shown
    pages, after = [], ""
    while after is not None:
        page = httpx.get(f"{admin(tokenring)}/streams?limit=1&after={after}" if after else f"{admin(tokenring)}/streams?limit=1")
        pages += page.json()["streams"]
        after = page.json()["next"]
    assert len(pages) == 5
    # What concerns one stream may be asked where clients ask.
    assert json.loads(streams("show", live.stream, "--json", "--server", clients(tokenring)).stdout)["readers"] == 2
    assert "state         open" in streams("show", "/v1/durable/a", "--server", clients(tokenring)).stdout
    beside.leave()
    said.done()


def test_many_streams_are_listed_whole(start):
    tokenring = start("--durable-store-bytes-max", "64MiB", shards=2)
    with httpx.Client() as client:
        for nth in range(700):
            client.put(f"{clients(tokenring)}/v1/durable/{nth}").raise_for_status()
    assert len(listed(tokenring)) == 700


def test_what_cannot_be_had_is_told(start, tmp_path):
    tokenring = start()
    none = "AAAAAQAAAAAAATcpzzuQpC5D3PSDqBJKjNo"
    for url in [admin(tokenring), clients(tokenring)]:
        for what in ["show", "tail", "export"]:
            refused = streams(what, none, "--server", url, exits=64)
            assert "no such stream" in refused.stderr.lower() or "no stream" in refused.stderr, refused.stderr
            streams(what, "/v1/durable/none", "--server", url, exits=64)
            streams(what, "neither", "--server", url, exits=64)
    assert "not an admin address" in streams("list", "--server", clients(tokenring), exits=64).stderr
    assert "--server URL" in streams("tail", "-f", "/v1/durable/a", "--data-dir", tmp_path, exits=64).stderr
    streams("verify", "--server", admin(tokenring), exits=64)
    streams("list", "--server", admin(tokenring), "--data-dir", tmp_path, exits=64)
    tokenring.stop()
    streams("list", "--server", admin(tokenring), exits=69)
    streams("tail", none, "--server", clients(tokenring), exits=69)


def test_a_tail_has_every_event_once_however_often_it_is_cut(start, backend):
    tokenring = start("--heartbeat-ms", 100)
    client, said = begin(tokenring, backend, 5)
    way = Cutter(tokenring.port, cuts=6, after_s=0.2)
    tail = subprocess.Popen(
        command("tail", client.stream, "--data", "--server", way.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    client.leave()

    def say():
        said.say(2)
        return way.done >= 6

    wait_until(say, 40, "it was cut six times", every=0.1)
    said.done()
    out, errors = tail.communicate(timeout=60)
    way.close()
    assert tail.returncode == 0, errors
    *words, last = out.splitlines()
    assert last == "[DONE]" and len(words) == said.words
    contents = [json.loads(word)["choices"][0]["delta"]["content"] for word in words]
    assert contents == [f"w{nth} " for nth in range(1, said.words + 1)]


def test_a_tail_ends_as_its_stream_does(start, backend):
    tokenring = start()
    # By the admin address, with ids and all.
    client, said = begin(tokenring, backend, 2)
    said.done()
    client.read_all()
    whole = streams("tail", client.stream, "--server", admin(tokenring)).stdout
    assert whole.count("id: ") == 3 and whole.endswith("id: 3\ndata: [DONE]\n\n")
    assert streams("tail", client.stream, "--after", 3, "--server", admin(tokenring)).stdout == ""
    assert streams("export", client.stream, "--server", admin(tokenring)).stdout == whole
    broken, said = begin(tokenring, backend, 2)
    said.cut()
    broken.read_all()
    ended = streams("tail", broken.stream, "--server", admin(tokenring), exits=1)
    assert "upstream_truncated" in ended.stderr and ended.stdout.count("data: ") == 3
    # One that is under way is exported as far as it is.
    live, said = begin(tokenring, backend, 4)
    assert streams("export", live.stream, "--server", clients(tokenring)).stdout.count("id: ") == 4
    stopped = subprocess.Popen(
        command("tail", live.stream, "--server", admin(tokenring)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: status(tokenring.port, live.stream)["readers"] == 2, 10, "it reads")
    httpx.delete(f"{clients(tokenring)}/v1/streams/{live.stream}").raise_for_status()
    assert "stream_stopped" in stopped.communicate(timeout=30)[1] and stopped.returncode == 1


def test_a_tail_tells_of_events_that_are_gone(start, backend):
    tokenring = start("--resume-window", "4KiB")
    client, said = begin(tokenring, backend, 0)
    said.say(100, size=1000)
    said.done()
    client.read_all()
    # Where it begins is no loss, and said.
    begun = streams("tail", client.stream, "--server", admin(tokenring))
    first = int(begun.stdout.split("id: ", 1)[1].split("\n", 1)[0])
    assert first > 30 and f"before {first - 1} " in begun.stderr
    assert begun.stdout.count("id: ") == 101 - first + 1


def test_a_durable_stream_is_followed_until_it_is_closed(start):
    tokenring = start("--durable-events-ms", 300)
    url = durable(tokenring, "a", '["one","two"]')
    tail = subprocess.Popen(
        command("tail", "/v1/durable/a", "--data", "--server", admin(tokenring)), stdout=subprocess.PIPE, text=True
    )
    lines = [tail.stdout.readline() for _ in range(2)]
    for nth in range(10):
        httpx.post(url, headers={"Content-Type": "application/json"}, content=str(nth)).raise_for_status()
        lines.append(tail.stdout.readline())
    httpx.post(url, headers={"Stream-Closed": "true"}).raise_for_status()
    rest = tail.communicate(timeout=30)[0]
    assert [json.loads(line) for line in lines] == ["one", "two", *range(10)] and rest == ""
    assert tail.returncode == 0
    assert streams("tail", "/v1/durable/a", "--after", "now", "--server", clients(tokenring)).stdout == ""
    streams("tail", "/v1/durable/none", "--after", "now", "--server", clients(tokenring), exits=64)
    whole = streams("export", "/v1/durable/a", "--server", admin(tokenring)).stdout
    assert json.loads(whole) == ["one", "two", *range(10)]
    durable(tokenring, "long", *["x" * 1_000_000] * 3, content_type="text/plain")
    assert streams("export", "/v1/durable/long", "--server", clients(tokenring)).stdout == "x" * 3_000_000


def test_the_last_messages_of_a_directorys_stream(start, tmp_path):
    data = tmp_path / "data"
    tokenring = start("--data-dir", data)
    durable(tokenring, "a", *[str(nth) for nth in range(20)])
    assert streams("tail", "/v1/durable/a", "--data-dir", data).stdout.split() == [str(nth) for nth in range(10, 20)]
    assert streams("tail", "/v1/durable/a", "-n", 2, "--data-dir", data).stdout == "18\n19\n"
    listing = json.loads(streams("list", "--json", "--data-dir", data).stdout)["streams"]
    assert [(stream["path"], stream["messages"]) for stream in listing] == [("/v1/durable/a", 20)]
