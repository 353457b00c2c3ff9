"""Streams relayed from a model on disk: after kill -9 they are found by their ids, with all that their clients had seen, and
end as what they are."""

import json
import random
import subprocess
import time

import httpx
import openai
import pytest
import sse
from harness import EXIT_CONFIG, EXIT_OK, find_binary, wait_until
from streams import Answer, Crowd, ask_chat, assert_words, come_back, resume, status

pytestmark = pytest.mark.relay

SOON_S = 5
EXIT_DATA = 65


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def serve(start_tokenring, data):
    """Starts a server whose streams are durable on the data directory of the test."""

    def start(*flags, upstreams=(), shards=1, **settings):
        more = ["--durable", "on", "--data-dir", data, *flags]
        return start_tokenring(upstreams, shards=shards, more=[str(flag) for flag in more], **settings)

    return start


def streams(data, *arguments):
    command = [find_binary(), "streams", *arguments, "--data-dir", str(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def counter(server, name):
    return sum(shard["counters"][name] for shard in server.status()["shards"])


def begin(server, backend, words=0):
    client = ask_chat(server.port)
    said = backend.accept()
    said.say(words)
    return client.read_head().read(words), said


def synced(server):
    """Waits until everything recorded is on the disk."""
    journals = lambda: [shard["stream_journal"] for shard in server.status()["shards"]]  # noqa: E731
    wait_until(lambda: all(journal["backlog_bytes"] <= 72 for journal in journals()), SOON_S, "all is synced")


@pytest.mark.parametrize("interval", ["0", "20"])
@pytest.mark.parametrize("shards", [1, 2])
def test_streams_are_found_after_kill_9(serve, backend, interval, shards):
    flags = ["--fsync-interval", interval]
    first = serve(*flags, upstreams=[backend.url], shards=shards)
    whole, said = begin(first, backend, 5)
    said.done()
    whole.read_all()
    half, said = begin(first, backend, 7)
    broken, cut = begin(first, backend, 2)
    cut.cut()
    broken.read_all()
    stopped, _ = begin(first, backend, 3)
    assert resume(first.port, stopped.stream, method="DELETE").status == 204
    left, said_on = begin(first, backend, 1)
    left.leave()
    said_on.say(3)
    wait_until(lambda: status(first.port, left.stream)["last_event_id"] == 4, SOON_S, "it goes on")
    synced(first)
    first.kill()

    second = serve(*flags, upstreams=[backend.url], shards=shards)
    for seen in range(6):
        back = resume(second.port, whole.stream, seen).read_all()
        assert back.status == 200 and back.ids() == list(range(seen + 1, 7)) and not back.told
        assert_words(back.events, seen + 1, 5)
    assert resume(second.port, whole.stream, 6).status == 204
    for seen in (0, 3, 7):
        back = resume(second.port, half.stream, seen).read_all()
        assert_words(back.events, seen + 1, 7)
        error = json.loads(back.told[-1].data)["error"]
        assert (error["code"], error["type"]) == ("interrupted", "overloaded_error")
    assert resume(second.port, half.stream, 8).read_all().code == "events_lost"
    assert resume(second.port, whole.stream, 7).read_all().code == "cursor_ahead"
    back = resume(second.port, broken.stream, 1).read_all()
    assert_words(back.events, 2, 2)
    assert json.loads(back.told[-1].data)["error"]["code"] == "upstream_truncated"
    gone = resume(second.port, stopped.stream, 1).read_all()
    assert (gone.status, gone.code) == (410, "stream_stopped")
    assert_words(resume(second.port, left.stream, 1).read_all().events, 2, 4)
    told = status(second.port, half.stream)
    assert (told["phase"], told["end"], told["last_event_id"], told["earliest_event_id"]) == ("over", "interrupted", 7, 1)
    assert told["dialect"] == "chat"
    assert counter(second, "stored_recovered") == 5
    # What is stopped now stays so.
    assert resume(second.port, half.stream, method="DELETE").status == 204
    fresh, said = begin(second, backend, 2)
    assert fresh.stream not in {whole.stream, half.stream, broken.stream, stopped.stream, left.stream}
    synced(second)
    second.kill()
    third = serve(*flags, upstreams=[backend.url], shards=shards)
    assert resume(third.port, half.stream, 1).read_all().code == "stream_stopped"
    assert_words(resume(third.port, whole.stream, 2).read_all().events, 3, 5)
    assert_words(resume(third.port, fresh.stream, 0).read_all().events, 1, 2)


def demo_request(tokens, rate):
    body = json.dumps(sse.body_of("chat"))
    path = f"/v1/chat/completions?tokens={tokens}&tokens_per_s={rate}&first_token_ms=0"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("interval", ["0", "20"])
def test_kill_9_under_load_takes_no_event_back_that_a_client_had_seen(serve, data, interval):
    rng, ids = random.Random(interval), set()
    flags = ["--fsync-interval", interval, "--resume-window", "8MiB"]
    server = serve(*flags)
    seen_in_all = 0
    for round in range(6):
        crowd, answers = Crowd(), []
        for _ in range(60):
            tokens, rate = rng.choice([(20, 400), (300, 200), (2000, 1000)])
            answers.append(crowd.add(Answer(server.port, demo_request(tokens, rate))))
        until = time.monotonic() + 0.5 + rng.random()
        while time.monotonic() < until:
            crowd.pump(0.05)
        server.kill()
        crowd.pump(0.2)
        crowd.close()
        named = [answer for answer in answers if answer.status == 200]
        assert len(named) > 30
        assert not ids & {answer.stream for answer in named}, "an id was given twice"
        ids |= {answer.stream for answer in named}
        # Sometimes on fewer or more shards.
        server = serve(*flags, shards=1 + round % 2)
        for answer in named:
            before = [(event.id, event.data) for event in answer.events]
            back = come_back(server.port, answer.stream, 0).read_all()
            if back.status == 410:
                # Its name was out, and not yet any event.
                assert back.code == "stream_expired" and (not before or interval != "0"), (back.code, len(before))
                continue
            after = [(event.id, event.data) for event in back.events]
            assert [id for id, _ in after] == [str(nth + 1) for nth in range(len(after))]
            both = min(len(before), len(after))
            assert after[:both] == before[:both]
            if interval == "0":
                assert len(after) >= len(before), "an event that its client had is gone"
            seen_in_all += both
            ended = after and after[-1][1] == "[DONE]"
            assert ended or json.loads(back.told[-1].data)["error"]["code"] == "interrupted"
            if both:
                rest = come_back(server.port, answer.stream, both).read_all()
                assert [(event.id, event.data) for event in rest.events] == after[both:]
    assert seen_in_all > 3000
    verified = streams(data, "verify")
    assert verified.returncode == EXIT_OK, verified.stdout


def test_streams_of_shards_that_there_are_no_more_are_found(serve, backend, data):
    first = serve(upstreams=[backend.url], shards=3)
    named = []
    for nth in range(12):
        client, said = begin(first, backend, 2 + nth)
        if nth % 2:
            said.done()
            client.read_all()
        named.append(client.stream)
    first.kill()
    for shards in (1, 2, 4, 1):
        server = serve(upstreams=[backend.url], shards=shards)
        for nth, stream in enumerate(named):
            back = resume(server.port, stream, 1).read_all()
            assert_words(back.events, 2, 2 + nth)
            assert bool(back.told) != bool(nth % 2)
        assert not [path for path in data.glob("relayed-*") if int(path.name[8:]) >= shards]
        server.kill()


def test_what_is_over_goes_with_its_time_also_over_a_restart(serve, backend, data):
    first = serve("--keep-ms", 3000, upstreams=[backend.url])
    client, said = begin(first, backend, 2)
    said.done()
    client.read_all()
    began = time.monotonic()
    first.kill()
    second = serve("--keep-ms", 3000, upstreams=[backend.url])
    assert resume(second.port, client.stream, 1).read_all().status == 200
    wait_until(lambda: resume(second.port, client.stream, 1).read_all().status == 410, 10, "its time is over")
    assert 2 < time.monotonic() - began < 9
    synced(second)
    second.kill()
    assert "ID" not in streams(data, "list").stdout
    third = serve("--keep-ms", 3000, upstreams=[backend.url])
    assert resume(third.port, client.stream, 1).read_all().code == "stream_expired"
    unknown = ("B" if client.stream[0] == "A" else "A") + client.stream[1:]
    assert resume(third.port, unknown, 1).read_all().status == 404


def test_a_drain_keeps_what_is_on_the_disk(serve, backend):
    first = serve(upstreams=[backend.url])
    whole, said = begin(first, backend, 3)
    said.done()
    whole.read_all()
    left, said = begin(first, backend, 2)
    left.leave()
    wait_until(lambda: status(first.port, left.stream)["phase"] == "detached", SOON_S, "it is left")
    first.drain()
    assert first.wait(10) == EXIT_OK
    second = serve(upstreams=[backend.url])
    assert_words(resume(second.port, whole.stream, 1).read_all().events, 2, 3)
    back = resume(second.port, left.stream, 1).read_all()
    assert_words(back.events, 2, 2)
    assert json.loads(back.told[-1].data)["error"]["code"] == "drain"


def test_the_window_is_the_same_on_disk(serve, backend):
    flags = ["--resume-window", 20000]
    first = serve(*flags, upstreams=[backend.url])
    client, said = begin(first, backend)
    for nth in range(200):
        said.say(1, size=1000)
        client.read(nth + 1)
    earliest = status(first.port, client.stream)["earliest_event_id"]
    assert earliest > 100
    synced(first)
    first.kill()
    second = serve(*flags, upstreams=[backend.url])
    told = status(second.port, client.stream)
    assert told["last_event_id"] == 200 and 100 < told["earliest_event_id"] <= 200
    gone = resume(second.port, client.stream, 5).read_all()
    assert (gone.status, gone.code) == (410, "before_window")
    earliest = int(gone.headers["tokenring-earliest-event-id"])
    assert_words(resume(second.port, client.stream, earliest).read_all().events, earliest + 1, 200)


@pytest.mark.parametrize("interval", ["0", "20"])
def test_a_response_in_background_is_found_after_a_restart(serve, interval):
    flags = ["--fsync-interval", interval]
    first = serve(*flags)
    client = lambda server: openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0, timeout=30)  # noqa: E731
    asked = {"model": "demo", "input": "Hello", "background": True, "stream": True}
    quick = {"tokens": 20, "tokens_per_s": 2000, "first_token_ms": 0}
    whole = list(client(first).responses.create(**asked, extra_query=quick))
    slow = client(first).responses.create(**asked, extra_query={**quick, "tokens": 2000, "tokens_per_s": 50})
    begun = [event for _, event in zip(range(10), slow)]
    deleted = list(client(first).responses.create(**asked, extra_query=quick))[0].response.id
    client(first).responses.delete(deleted)
    synced(first)
    first.kill()
    second = client(serve(*flags, shards=2))
    found = second.responses.retrieve(whole[0].response.id)
    assert found.status == "completed" and found.output_text == whole[-1].response.output_text
    after = whole[3].sequence_number
    rest = list(second.responses.retrieve(whole[0].response.id, stream=True, starting_after=after))
    assert [event.sequence_number for event in rest] == [event.sequence_number for event in whole[4:]]
    half = second.responses.retrieve(begun[0].response.id)
    assert half.status == "failed" and half.error.code == "interrupted"
    with pytest.raises(openai.NotFoundError):
        second.responses.retrieve(deleted)
    with pytest.raises(openai.APIError):
        list(second.responses.retrieve(begun[0].response.id, stream=True, starting_after=1))


def test_streams_can_be_looked_at_without_a_server(serve, backend, data):
    server = serve(upstreams=[backend.url])
    whole, said = begin(server, backend, 3)
    said.done()
    whole.read_all()
    half, said = begin(server, backend, 2)
    server.kill()
    listed = streams(data, "list").stdout
    rows = {line.split()[0]: line.split()[1:] for line in listed.splitlines() if line.strip()}
    assert rows[whole.stream][0] == "4" and "done" in rows[whole.stream]
    assert rows[half.stream][0] == "2" and "default" in rows[half.stream]
    shown = streams(data, "show", whole.stream).stdout
    assert "dialect       chat\n" in shown and "events        1 to 4\n" in shown and "state         done\n" in shown
    reader = sse.Reader()
    reader.feed(streams(data, "export", whole.stream).stdout.encode())
    assert_words([event for event in reader.events if event.id], 1, 3)
    assert "relayed-0: streams 2, " in streams(data, "verify").stdout


def test_a_flipped_byte_costs_its_own_stream_only(serve, backend, data):
    server = serve(upstreams=[backend.url])
    clients = [begin(server, backend, 4) for _ in range(3)]
    for client, said in clients:
        said.say(4)
        client.read(8)
    server.kill()
    segment = sorted((data / "relayed-0").glob("*.segment"))[0]
    content = bytearray(segment.read_bytes())
    at = [at for at in range(len(content)) if content.startswith(b"id: 4\n", at)][1]
    content[at + 12] ^= 0x20
    segment.write_bytes(content)
    assert streams(data, "verify").returncode == EXIT_DATA
    again = serve(upstreams=[backend.url])
    answers = [resume(again.port, client.stream, 0).read_all() for client, _ in clients]
    assert sorted(answer.status for answer in answers) == [200, 200, 410]
    [damaged] = [answer for answer in answers if answer.status == 410]
    earliest = int(damaged.headers["tokenring-earliest-event-id"])
    [(client, _)] = [pair for pair, answer in zip(clients, answers, strict=True) if answer.status == 410]
    assert_words(resume(again.port, client.stream, earliest).read_all().events, earliest + 1, 8)
    assert counter(again, "stored_damages") > 0


def test_what_durable_needs_is_said(tmp_path):
    def refused(*flags):
        arguments = [find_binary(), "check", "--listen", "127.0.0.1:0", "--admin", "off", "--durable", "on", *flags]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == EXIT_CONFIG
        return ended.stderr

    assert "route default is durable (flag --durable): give a data_dir" in refused()
    assert "cannot be read again" in refused("--data-dir", str(tmp_path), "--resume-window", "0")


def test_a_route_that_is_not_durable_leaves_nothing_on_the_disk(start_tokenring, backend, data):
    flags = ["--data-dir", data]
    first = start_tokenring([backend.url], shards=1, more=flags)
    client, said = begin(first, backend, 2)
    assert b"w1" not in b"".join(path.read_bytes() for path in data.rglob("*.segment"))
    first.kill()
    second = start_tokenring([backend.url], shards=1, more=flags)
    assert resume(second.port, client.stream, 1).read_all().code == "stream_expired"
    fresh, _ = begin(second, backend, 1)
    assert fresh.stream != client.stream


@pytest.mark.parametrize("interval", ["0", "20"])
def test_streams_go_on_when_the_disk_is_full_and_are_stored_again_when_it_is_not(
    start_tokenring, backend, small_disk, interval
):
    data = small_disk / "data"
    flags = ["--durable", "on", "--data-dir", data, "--fsync-interval", interval, "--resume-window", "1MiB"]
    start = lambda: start_tokenring([backend.url], shards=1, more=flags)  # noqa: E731
    server = start()
    client, said = begin(server, backend, 3)
    for nth in range(120):
        said.say(1, size=50_000)
        client.read(4 + nth)
    assert counter(server, "stored_left_off") > 0
    ready = httpx.get(f"{server.admin_url}/ready")
    assert ready.status_code == 503 and ready.json()["reason"] == "disk_failed"
    assert "No space left on device" in ready.json()["message"]
    wait_until(lambda: "streams cannot be written, and go on without" in server.log(), SOON_S, "the log says so")
    beside, other = begin(server, backend, 2)

    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    wait_until(lambda: httpx.get(f"{server.admin_url}/ready").status_code == 200, 20, "recovery")
    wait_until(lambda: server.status()["shards"][0]["kept"]["unstored"] == 0, 20, "all are stored again")
    said.say(1)
    other.say(1)
    client.read(124)
    beside.read(3)
    synced(server)
    server.kill()
    server = start()
    assert_words(resume(server.port, client.stream, 120).read_all().events, 121, 124)
    assert_words(resume(server.port, beside.stream, 0).read_all().events, 1, 3)
    assert "cannot be read" not in server.log()
