"""The bytes of a streamed answer: the same payload as the backend's, with dense ids, in time, on event boundaries."""

import statistics
import subprocess
import time

import httpx
import httpx_sse
import pytest
import sse
from sse import PATHS, assert_arrives_over_time, assert_dense, body_of, text_of

DIALECTS = list(PATHS)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("pace", [{}, {"tokens_per_s": 100}], ids=["burst", "paced"])
def test_payload_equals_the_backends_uvicorn(via_uvicorn, dialect, pace):
    """Every event and every byte of data, in order; only ids and comments may come on top."""
    params = {"tokens": 40, **pace}
    direct = sse.stream(via_uvicorn.backend.url, dialect, params=params)
    relayed = sse.stream(via_uvicorn.url, dialect, params=params)
    assert relayed.data() == direct.data()
    assert len(relayed.events) >= 40 and sse.is_end(dialect, relayed.events[-1])
    assert not relayed.cut and not relayed.unfinished
    assert relayed.status == 200


@pytest.mark.parametrize("dialect", DIALECTS)
def test_text_equals_the_backends_llama(via_llama, dialect):
    """Greedy decoding of the same model repeats, so the text through tokenring must be the text without it."""
    _, more = via_llama.ask(dialect, 64)
    texts = []
    for prompt in (sse.PROMPT, "hello there", "語" * 50):
        body = body_of(dialect, prompt, **more)
        # Where llama.cpp keeps the prompt's state, both answers shall be computed from the same.
        sse.stream(via_llama.backend.url, dialect, body)
        direct = sse.stream(via_llama.backend.url, dialect, body)
        relayed = sse.stream(via_llama.url, dialect, body)
        texts.append(text_of(dialect, relayed.events))
        assert texts[-1].encode() == text_of(dialect, direct.events).encode()
        assert [event.event for event in relayed.events] == [event.event for event in direct.events]
        assert sse.is_end(dialect, relayed.events[-1]) == sse.is_end(dialect, direct.events[-1])
    # Its Anthropic side knows no ignore_eos: an answer may be empty, but not all of them.
    assert len("".join(texts)) > 50


@pytest.mark.parametrize("dialect", DIALECTS)
def test_whole_answer_equals_the_backends(via_uvicorn, dialect):
    ask = {"params": {"tokens": 40}, "json": body_of(dialect, stream=False)}
    direct = httpx.post(via_uvicorn.backend.url + PATHS[dialect], **ask)
    relayed = httpx.post(via_uvicorn.url + PATHS[dialect], **ask)
    assert (relayed.status_code, relayed.content) == (200, direct.content)
    assert relayed.headers["content-type"] == direct.headers["content-type"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_long_answer_loses_nothing(via_uvicorn, dialect):
    params = {"tokens": 5000}
    direct = sse.stream(via_uvicorn.backend.url, dialect, params=params)
    relayed = sse.stream(via_uvicorn.url, dialect, params=params)
    assert relayed.data() == direct.data() and len(relayed.events) >= 5000


@pytest.mark.relay
@pytest.mark.parametrize("dialect", DIALECTS)
def test_ids_are_dense_from_one(any_relay, dialect):
    """As a browser's EventSource would read them: by httpx-sse, which keeps the last id where an event has none."""
    query, more = any_relay.ask(dialect, 32)
    with httpx.Client(timeout=20) as client:
        url, body = any_relay.url + PATHS[dialect], body_of(dialect, **more)
        with httpx_sse.connect_sse(client, "POST", url, json=body, params=query) as source:
            ids = [event.id for event in source.iter_sse()]
    assert len(ids) > 5
    assert_dense(ids)


@pytest.mark.relay
def test_head_of_a_stream(any_relay):
    query, more = any_relay.ask("chat", 4)
    head = sse.stream(any_relay.url, "chat", body_of("chat", **more), params=query).headers
    assert head["content-type"].startswith("text/event-stream")
    assert "no-cache" in head["cache-control"] or "no-store" in head["cache-control"]
    assert "content-encoding" not in head and "content-length" not in head
    # A relay takes the backend's connection headers for itself: llama.cpp's promise of 5 s is not ours to repeat.
    assert "timeout=5" not in head.get("keep-alive", "")


def test_tokens_arrive_over_time(via_uvicorn, demo):
    for relay in (via_uvicorn, demo):
        query, _ = relay.ask("chat", 30, tokens_per_s=30)
        answer = sse.stream(relay.url, "chat", params=query)
        assert_arrives_over_time([event.at_s for event in answer.events], 29 / 30)


def test_tokens_arrive_over_time_llama(via_slow_llama):
    _, more = via_slow_llama.ask("chat", 40)
    body = body_of("chat", **more)
    direct = sse.stream(via_slow_llama.backend.url, "chat", body)
    seconds = direct.events[-1].at_s - direct.events[0].at_s
    relayed = sse.stream(via_slow_llama.url, "chat", body)
    assert relayed.events[-1].at_s - relayed.events[0].at_s > 0.4 * seconds
    assert relayed.events[0].at_s - relayed.sent_s < direct.events[0].at_s - direct.sent_s + 0.3


def test_added_latency_of_an_event_is_small(via_uvicorn):
    """The backend writes into each chunk when it made it. A batching relay would add its whole interval here."""
    params = {"tokens": 60, "tokens_per_s": 60, "stamp": 1}
    answer = sse.stream(via_uvicorn.url, "chat", params=params)
    late = [event.at_s - event.json()["sent_s"] for event in answer.events if "sent_s" in event.data]
    assert len(late) > 60
    assert statistics.median(late) < 0.010, f"median {statistics.median(late) * 1000:.1f} ms"


def test_first_token_delay_of_the_demo_model(demo):
    query, _ = demo.ask("chat", 5, tokens_per_s=50, first_token_ms=600)
    answer = sse.stream(demo.url, "chat", params=query)
    words = [event for event in answer.events if event.data != "[DONE]" and text_of("chat", [event])]
    assert 0.55 < words[0].at_s - answer.sent_s < 1.2
    assert len(words) == 5


@pytest.mark.relay
def test_demo_model_flags(start_tokenring):
    tokenring = start_tokenring(demo_tokens=7, demo_tokens_per_s=50, demo_first_token_ms=300)
    answer = sse.stream(tokenring.url, "chat")
    words = [event for event in answer.events if event.data != "[DONE]" and text_of("chat", [event])]
    assert len(words) == 7
    assert words[0].at_s - answer.sent_s > 0.25
    assert words[-1].at_s - words[0].at_s > 0.8 * 6 / 50


def curl(*arguments):
    """Run curl and give its output in the pieces in which it was written, each with the time since the start."""
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "20", *arguments]
    pieces, start_s = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as child:
        while piece := child.stdout.read(65536):
            pieces.append((time.monotonic() - start_s, piece))
    assert child.returncode == 0, f"curl ended with {child.returncode}"
    return pieces


def test_curl_shows_tokens_as_they_arrive(via_uvicorn, demo):
    for relay in (via_uvicorn, demo):
        url = relay.url + PATHS["chat"] + "?tokens=20&tokens_per_s=20"
        body = '{"model": "fake-model", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
        pieces = curl(url, "-H", "content-type: application/json", "-d", body)
        assert_arrives_over_time([at_s for at_s, _ in pieces], 19 / 20)
        assert b"".join(piece for _, piece in pieces).rstrip().endswith(b"data: [DONE]")


def test_curl_head_and_http_1_0(via_uvicorn):
    head = b"".join(piece for _, piece in curl("-I", via_uvicorn.url + "/bytes/1000000"))
    assert head.startswith(b"HTTP/1.1 200") and b"content-length: 1000000" in head.lower()
    body = b"".join(piece for _, piece in curl("--http1.0", via_uvicorn.url + "/bytes/100000"))
    assert len(body) == 100000


def test_plain_events_of_a_get_are_relayed_in_time(via_uvicorn):
    """What a browser's EventSource asks for: a GET on a path that is no model's."""
    times, data = [], []
    with httpx.Client(timeout=20) as client:
        url = via_uvicorn.url + "/events"
        params = {"tokens": 20, "tokens_per_s": 40}
        with httpx_sse.connect_sse(client, "GET", url, params=params) as source:
            for event in source.iter_sse():
                times.append(time.monotonic())
                data.append((event.event, event.data))
    assert [name for name, _ in data] == ["word"] * 20 + ["end"]
    assert_arrives_over_time(times, 19 / 40)
