"""Streams that outlive their connections: whoever comes back gets what follows, once and in order, or is told why not."""

import json
import random
import signal
import ssl
import time

import httpx
import openai
import pytest
import sse
from certificates import Authority
from harness import free_port, wait_until
from openai.types.chat import ChatCompletionChunk
from streams import Answer, Crowd, ask_chat, assert_words, come_back, resume, status

pytestmark = pytest.mark.relay

# What is to happen at once; a busy machine is late.
SOON_S = 5
GONE = {"stream_expired", "stream_stopped", "before_window"}


@pytest.fixture
def tls(tmp_path):
    """A port, the flags to serve TLS on it, and who is to be trusted then."""
    authority, port = Authority(tmp_path), free_port()
    pair = authority.issue("localhost", file="served")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    return port, ["--listen-tls", f"127.0.0.1:{port}", *pair.flags()], trust


def metric(tokenring, name):
    lines = tokenring.metrics().text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


def begin(tokenring, backend, words=0, **more):
    """A stream, its backend's side, and its client, who has had so many words."""
    client = ask_chat(tokenring.port, **more)
    said = backend.accept()
    said.say(words)
    return client.read_head().read(words), said


def left_alone(tokenring, stream):
    """Waits until its last client's leave was noticed."""
    wait_until(lambda: status(tokenring.port, stream)["phase"] == "detached", SOON_S, "the stream is detached")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_leaves_and_comes_back_at_every_event(start, backend, shards, how):
    """Also among events of before and after the leave, and to a stream of another shard."""
    tokenring = start(shards=shards)
    client, said = begin(tokenring, backend, 3)
    stream = client.stream
    client.leave(how)
    for seen in range(12):
        back = resume(tokenring.port, stream, seen)
        assert (back.status, back.stream, back.headers["tokenring-last-event-id"]) == (200, stream, str(seen))
        said.say(1 if seen >= 2 else 0)
        held = max(3, seen + 2)
        back.read(held - seen)
        assert back.ids() == list(range(seen + 1, held + 1))
        assert_words(back.events, seen + 1, held)
        back.leave(how)
    last = resume(tokenring.port, stream, 0)
    said.done()
    last.read_all()
    assert last.ids() == list(range(1, 15)) and not last.told
    assert_words(last.events, 1, 13)
    assert last.events[-1].data == "[DONE]"


def test_over_tls(start, backend, tls):
    port, flags, trust = tls
    start(*flags, shards=2)
    client = ask_chat(port, trust=trust)
    said = backend.accept()
    said.say(3)
    client.read_head().read(3)
    for seen in range(12):
        client.leave()
        client = resume(port, client.stream, seen, trust=trust)
        said.say(1 if seen >= 3 else 0)
        client.read(1)
        assert client.ids()[0] == seen + 1
    beside = resume(port, client.stream, 2, trust=trust)
    said.say(60, size=3000)
    said.done()
    assert_words(client.read_all().events, 12, 72)
    assert_words(beside.read_all().events, 3, 72)


def test_many_join_while_the_model_streams_at_full_speed(start_tokenring):
    """Replay and what is live are joined anywhere in the stream without a gap or a repeat."""
    tokens = 3000
    tokenring = start_tokenring(
        shards=2, demo_tokens=tokens, demo_tokens_per_s=1000, demo_first_token_ms=0, more=["--resume-window", "8MiB"]
    )
    chance, crowd = random.Random(5), Crowd()
    first = crowd.add(ask_chat(tokenring.port).read_head())
    joined = []
    end_s = time.monotonic() + 4
    while time.monotonic() < end_s and not first.ended:
        crowd.pump(0.01)
        seen = len(first.events)
        for _ in range(3 if seen and len(joined) < 60 else 0):
            after = chance.choice([0, seen, chance.randrange(seen), max(0, seen - 1)])
            joined.append((after, crowd.add(resume(tokenring.port, first.stream, after))))
    crowd.read_all(30)
    assert first.events[-1].data == "[DONE]" and len(joined) == 60
    whole = [(event.id, event.data) for event in first.events]
    assert first.ids() == list(range(1, len(whole) + 1))
    for after, reader in joined:
        assert [(event.id, event.data) for event in reader.events] == whole[after:], f"behind {after}"
        assert not reader.told


def test_forms_of_the_cursor(start, backend):
    tokenring = start()
    client, said = begin(tokenring, backend, 6)
    said.done()
    client.read_all()
    for query, after, begins in [
        ("", None, 1),
        ("", 2, 3),
        ("?last_event_id=3", None, 4),
        ("?after=4", None, 5),
        ("?after=1&last_event_id=3", None, 4),
        # What an EventSource sends that was opened with a cursor and lost its connection later.
        ("?last_event_id=1", 5, 6),
        ("", " 5 ", 6),
        ("", "", 1),
    ]:
        back = resume(tokenring.port, client.stream, after, query).read_all()
        assert back.ids() == list(range(begins, 8)), (query, after)
        assert back.headers["tokenring-last-event-id"] == str(begins - 1)
    for query, after, code in [
        ("?after=x", None, "bad_cursor"),
        ("", "-1", "bad_cursor"),
        ("?after=1e3", None, "bad_cursor"),
        ("", "18446744073709551616", "bad_cursor"),
        ("", "18446744073709551615", "cursor_ahead"),
        ("?after=8", None, "cursor_ahead"),
    ]:
        back = resume(tokenring.port, client.stream, after, query).read_all()
        assert (back.status, back.code) == (400, code), (query, after)


def test_a_finished_stream_is_read_again_until_its_time_is_over(start, backend):
    tokenring = start("--keep-ms", 2500)
    client, said = begin(tokenring, backend, 5)
    said.done()
    client.read_all()
    for after in range(6):
        back = resume(tokenring.port, client.stream, after).read_all()
        assert back.ids() == list(range(after + 1, 7))
    # All of it was seen: this makes an EventSource stop.
    assert resume(tokenring.port, client.stream, 6).read_all().status == 204
    found = status(tokenring.port, client.stream)
    assert (found["phase"], found["end"], found["readers"]) == ("over", "done", 0)
    gone = wait_until(
        lambda: (answer := resume(tokenring.port, client.stream, 2).read_all()).status != 200 and answer, 15, "its end"
    )
    assert (gone.status, gone.code) == (410, "stream_expired")
    for method, query in [("DELETE", ""), ("GET", "/status")]:
        gone = resume(tokenring.port, client.stream, method=method, query=query).read_all()
        assert (gone.status, gone.code) == (410, "stream_expired")
    assert metric(tokenring, "tokenring_kept_bytes") == 0


def test_ids_that_were_never_given(start, start_tokenring, backend):
    tokenring, other = start(), start_tokenring([backend.url], shards=1)
    client, said = begin(tokenring, backend, 1)
    stream = client.stream
    swapped = {at: "B" if stream[at] != "B" else "C" for at in range(len(stream))}
    forged = [stream[:at] + letter + stream[at + 1 :] for at, letter in swapped.items()]
    for unknown in [*forged, "x", "A" * 35, stream + "A", stream[:-1], "%41" + stream[1:], ""]:
        for method, query in [("GET", ""), ("GET", "/status"), ("DELETE", "")]:
            answer = resume(tokenring.port, unknown, method=method, query=query).read_all()
            assert (answer.status, answer.code) == (404, "stream_not_found"), unknown
    answer = resume(other.port, stream).read_all()
    assert (answer.status, answer.code) == (404, "stream_not_found"), "an id of another process"
    # Nobody has harmed the one that there is.
    said.say()
    said.done()
    assert_words(client.read_all().events, 1, 2)
    assert metric(tokenring, "tokenring_resumes_refused_total") > 3 * len(forged)


def test_a_cursor_before_the_window(start, backend):
    tokenring = start("--resume-window", "8KiB")
    client, said = begin(tokenring, backend, 1)
    for _ in range(60):
        said.say(10, size=500)
        client.read(said.words)
    gone = resume(tokenring.port, client.stream, 1).read_all()
    assert (gone.status, gone.code) == (410, "before_window")
    earliest = int(gone.headers["tokenring-earliest-event-id"])
    assert 1 < earliest < 600
    assert status(tokenring.port, client.stream)["earliest_event_id"] == earliest + 1
    back = resume(tokenring.port, client.stream, earliest).read(601 - earliest)
    assert_words(back.events, earliest + 1, 601)
    gone = resume(tokenring.port, client.stream, earliest - 1).read_all()
    assert (gone.status, gone.headers["tokenring-earliest-event-id"]) == (410, str(earliest))
    said.done()
    assert_words(client.read_all().events, 1, 601)


@pytest.mark.parametrize("detached", [False, True])
def test_stop(start, backend, detached):
    """The backend is let go, who reads is told in the stream's dialect, and nobody comes back."""
    tokenring = start()
    client, said = begin(tokenring, backend, 3)
    stream, readers = client.stream, []
    if detached:
        client.leave()
        left_alone(tokenring, stream)
    else:
        readers = [client, resume(tokenring.port, stream, 1), resume(tokenring.port, stream, 3)]
    stopped = resume(tokenring.port, stream, method="DELETE").read_all()
    assert (stopped.status, stopped.body) == (204, b"")
    wait_until(said.is_gone, SOON_S, "the backend is let go")
    for reader, seen in zip(readers, [0, 1, 3], strict=False):
        reader.read_all()
        assert_words(reader.events, seen + 1, 3)
        [error] = reader.told
        assert error.json()["error"]["code"] == "stream_stopped"
    for _ in range(2):
        gone = resume(tokenring.port, stream, 3).read_all()
        assert (gone.status, gone.code) == (410, "stream_stopped")
        assert resume(tokenring.port, stream, method="DELETE").read_all().status == 204, "again, and nothing happens"


def test_stop_of_a_stream_that_is_over(start, backend):
    tokenring = start()
    client, said = begin(tokenring, backend, 3)
    said.done()
    client.read_all()
    assert resume(tokenring.port, client.stream, 1).read_all().ids() == [2, 3, 4]
    assert resume(tokenring.port, client.stream, method="DELETE").read_all().status == 204
    gone = resume(tokenring.port, client.stream, 1).read_all()
    assert (gone.status, gone.code) == (410, "stream_stopped")


def test_status(start, backend):
    tokenring = start()
    client, said = begin(tokenring, backend, 4)
    found = status(tokenring.port, client.stream)
    wanted = {
        "id": client.stream,
        "phase": "streaming",
        "end": None,
        "dialect": "chat",
        "earliest_event_id": 1,
        "last_event_id": 4,
        "readers": 1,
        "model": "fake-model",
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["bytes"] >= found["held_bytes"] > 400 and found["pending_bytes"] == [0]
    readers = [resume(tokenring.port, client.stream, 2).read(2) for _ in range(2)]
    assert status(tokenring.port, client.stream)["readers"] == 3
    for reader in [client, *readers]:
        reader.leave()
    left_alone(tokenring, client.stream)
    found = status(tokenring.port, client.stream)
    assert (found["readers"], found["pending_bytes"], found["last_event_id"]) == (0, [], 4)
    said.say(2)
    wait_until(lambda: status(tokenring.port, client.stream)["last_event_id"] == 6, SOON_S, "it goes on")
    for method, query, code in [
        ("POST", "", 405),
        ("DELETE", "/status", 405),
        ("GET", "/other", 404),
    ]:
        assert resume(tokenring.port, client.stream, method=method, query=query).read_all().status == code


def test_cancelled_when_its_client_leaves(start, backend):
    tokenring = start("--on-leave", "cancel")
    client, said = begin(tokenring, backend, 2)
    client.leave()
    wait_until(said.is_gone, SOON_S, "the backend is let go")
    gone = resume(tokenring.port, client.stream, 1).read_all()
    assert gone.status == 410 and gone.code in GONE
    # While somebody reads it, it goes on.
    client, said = begin(tokenring, backend, 2)
    other = resume(tokenring.port, client.stream, 0).read(2)
    client.leave()
    wait_until(lambda: status(tokenring.port, client.stream)["readers"] == 1, SOON_S, "the leave is noticed")
    said.say(2)
    assert_words(other.read(4).events, 1, 4)
    other.leave()
    wait_until(said.is_gone, SOON_S, "the backend is let go")


def test_abandoned_when_nobody_comes_back(start, backend):
    tokenring = start("--detach-ms", 600)
    client, said = begin(tokenring, backend, 2)
    client.leave()
    left_alone(tokenring, client.stream)
    back = resume(tokenring.port, client.stream, 2)
    # Its time begins anew with each leave.
    time.sleep(2)
    said.say()
    assert_words(back.read(1).events, 3, 3)
    back.leave()
    wait_until(said.is_gone, 10, "the backend is let go")
    gone = resume(tokenring.port, client.stream, 3).read_all()
    if gone.status == 200:
        [error] = gone.told
        assert error.json()["error"]["code"] == "abandoned"
    else:
        assert gone.status == 410 and gone.code in GONE


def test_finished_without_a_client(start, backend):
    tokenring = start("--on-leave", "finish", "--detach-ms", 1)
    client, said = begin(tokenring, backend, 2)
    client.leave()
    left_alone(tokenring, client.stream)
    said.say(100)
    time.sleep(0.5)
    said.say(100)
    said.done()
    wait_until(lambda: status(tokenring.port, client.stream)["phase"] == "over", SOON_S, "its end")
    back = resume(tokenring.port, client.stream, 2).read_all()
    assert_words(back.events, 3, 202)
    assert back.events[-1].data == "[DONE]" and back.ids()[-1] == 203


def test_finished_though_it_is_longer_than_the_window(start, backend):
    """Nobody comes for so long that the window leaves what was not read behind: the backend is not held up by that."""
    tokenring = start("--on-leave", "finish")
    client, said = begin(tokenring, backend, 2)
    client.leave()
    left_alone(tokenring, client.stream)
    said.say(3000, size=1000)
    said.done()
    found = wait_until(
        lambda: (now := status(tokenring.port, client.stream))["phase"] == "over" and now, 20, "its end"
    )
    assert (found["end"], found["last_event_id"]) == ("done", 3003) and found["held_bytes"] < 1 << 20
    gone = resume(tokenring.port, client.stream, 2).read_all()
    assert (gone.status, gone.code) == (410, "before_window")
    earliest = int(gone.headers["tokenring-earliest-event-id"])
    rest = resume(tokenring.port, client.stream, earliest).read_all()
    assert_words(rest.events, earliest + 1, 3002)


def test_a_response_in_background_keeps_no_more_than_its_window(start, backend):
    """Nobody reads it, and it does not grow with what it says."""
    tokenring = start("--background-window", "256KiB")
    body = json.dumps({"model": "m", "input": "a", "background": True})
    head = f"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    waiter = Answer(tokenring.port, f"{head}\r\n\r\n{body}".encode())
    said = backend.accept()
    response = {"id": "resp_long", "object": "response", "status": "in_progress", "output": []}
    created = {"type": "response.created", "sequence_number": 0, "response": response}
    said.chunk(f"event: response.created\ndata: {json.dumps(created)}\n\n")
    assert waiter.read_head().status == 200
    for number in range(1, 3000):
        delta = {"type": "response.output_text.delta", "sequence_number": number, "delta": "x" * 1000}
        said.chunk(f"event: response.output_text.delta\ndata: {json.dumps(delta)}\n\n")
    wait_until(lambda: status(tokenring.port, waiter.stream)["last_event_id"] == 3000, 20, "all of it is here")
    assert metric(tokenring, "tokenring_kept_bytes") < 1 << 20
    assert metric(tokenring, "tokenring_log_bytes") < 1 << 20


def test_without_a_client_its_window_fills_and_then_the_backend_is_paused(start, backend):
    tokenring = start("--detach-ms", 120_000, "--resume-window", "512KiB")
    client, said = begin(tokenring, backend, 2)
    client.leave()
    left_alone(tokenring, client.stream)
    # What the kernel holds on the way is not in the log.
    taken = said.say_until_stuck()
    found = status(tokenring.port, client.stream)
    assert 128 << 10 < found["bytes"] < 1 << 20, found
    assert taken < 32 << 20 and found["earliest_event_id"] == 1, "what nobody has seen is not given up"
    again = status(tokenring.port, client.stream)
    assert again["bytes"] == found["bytes"], "it stands still"
    back = resume(tokenring.port, client.stream, 2)
    said.done_later()
    back.read_all()
    end = said.words
    assert_words(back.events, 3, end)
    assert back.ids() == list(range(3, end + 2)) and not back.told


def test_a_truncated_answer_never_looks_finished(start, backend):
    tokenring = start()
    client, said = begin(tokenring, backend, 3)
    beside = resume(tokenring.port, client.stream, 1)
    said.cut()
    for reader, seen in [(client, 0), (beside, 1)]:
        reader.read_all()
        assert_words(reader.events, seen + 1, 3)
        [error] = reader.told
        assert error.json()["error"]["code"].startswith("upstream_")
    for seen in range(4):
        late = resume(tokenring.port, client.stream, seen).read_all()
        assert late.status == 200
        assert_words(late.events, seen + 1, 3)
        [error] = late.told
        assert error.json()["error"]["code"].startswith("upstream_")


def test_http_1_0(start, backend):
    tokenring = start()
    client, said = begin(tokenring, backend, 2, version="1.0")
    assert "transfer-encoding" not in client.headers
    for version in ("1.0", "1.1"):
        back = resume(tokenring.port, client.stream, 1, version=version).read(1)
        assert "transfer-encoding" not in back.headers and back.ids() == [2]
        back.leave()
    back = resume(tokenring.port, client.stream, 0, version="1.0")
    said.say()
    said.done()
    assert_words(back.read_all().events, 1, 3)
    client, said = begin(tokenring, backend, 2)
    refused = resume(tokenring.port, client.stream, 1, version="1.0").read_all()
    assert (refused.status, refused.code) == (505, "needs_http_1_1")


def test_openais_sdk_reads_the_rest(start, backend):
    tokenring = start(shards=2)
    client, said = begin(tokenring, backend, 4)
    client.leave()
    left_alone(tokenring, client.stream)
    sdk = openai.OpenAI(base_url=f"{tokenring.url}/v1", api_key="none", max_retries=0)
    rest = sdk.get(
        f"/streams/{client.stream}",
        cast_to=ChatCompletionChunk,
        stream=True,
        stream_cls=openai.Stream[ChatCompletionChunk],
        options={"headers": {"Last-Event-ID": "4"}},
    )
    said.say(6)
    said.done()
    assert [chunk.choices[0].delta.content.strip() for chunk in rest] == [f"w{number}" for number in range(5, 11)]
    with pytest.raises(openai.NotFoundError) as failure:
        sdk.get(f"/streams/{'A' * 35}", cast_to=ChatCompletionChunk)
    assert failure.value.code == "stream_not_found"


def test_a_drain_does_not_wait_for_those_who_may_come_back(start, backend):
    tokenring = start("--drain-deadline", 30_000, shards=2)
    over, said = begin(tokenring, backend, 2)
    said.done()
    over.read_all()
    client, said = begin(tokenring, backend, 2)
    client.leave()
    left_alone(tokenring, client.stream)
    began_s = time.monotonic()
    tokenring.signal(signal.SIGTERM)
    assert tokenring.wait(10) == 0
    assert time.monotonic() - began_s < SOON_S
    wait_until(said.is_gone, SOON_S, "the backend is let go")


def test_a_drain_lets_those_finish_who_read(start, backend):
    tokenring = start("--drain-deadline", 30_000)
    client, said = begin(tokenring, backend, 2)
    beside = resume(tokenring.port, client.stream, 1)
    tokenring.signal(signal.SIGTERM)
    time.sleep(0.5)
    said.say(3)
    said.done()
    assert_words(client.read_all().events, 1, 5)
    assert_words(beside.read_all().events, 2, 5)
    assert tokenring.wait(10) == 0


def test_off(start, backend):
    tokenring = start("--resume-window", 0)
    client, said = begin(tokenring, backend, 1)
    assert "tokenring-stream" not in client.headers
    client.leave()
    wait_until(said.is_gone, SOON_S, "the backend is let go")
    answer = resume(tokenring.port, "A" * 35).read_all()
    assert answer.status == 404


def test_every_dialect(via_uvicorn):
    """Each is resumed in its own words, and each names its stream."""
    for path, body in [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 99}),
    ]:
        url = f"{via_uvicorn.url}{path}?tokens=20"
        with httpx.stream("POST", url, json={"model": "m", "stream": True, **body}) as answer:
            stream, whole = answer.headers["tokenring-stream"], answer.read()
        back = httpx.get(f"{via_uvicorn.url}/v1/streams/{stream}", headers={"Last-Event-ID": "5"}).content
        events = [read(part) for part in (whole, back)]
        assert len(events[0]) > 20 and events[0][5:] == events[1], path


def read(body):
    reader = sse.Reader()
    reader.feed(body)
    assert not reader.unfinished()
    return [(event.id, event.event, event.data) for event in reader.events]


def test_what_is_too_old_leaves_the_window(start, backend):
    tokenring = start("--resume-window-ms", 800, "--resume-window", "16MiB")
    client, said = begin(tokenring, backend)
    said.say(10, size=20_000)
    client.read(10)
    wait_until(lambda: status(tokenring.port, client.stream)["earliest_event_id"] > 6, 20, "it is old", every=0.2)
    told = come_back(tokenring.port, client.stream, 1, fields="Connection: close\r\n").read_all()
    assert (told.status, told.code) == (410, "before_window")
    earliest = int(told.headers["tokenring-earliest-event-id"])
    assert 5 < earliest <= 10
    said.say(1)
    back = resume(tokenring.port, client.stream, earliest)
    back.read(11 - earliest)
    assert back.ids() == list(range(earliest + 1, 12))
    said.done()
    assert metric(tokenring, "tokenring_kept_aged_bytes_total") > 50_000
    assert metric(tokenring, "tokenring_kept_forgotten_bytes_total") == 0
