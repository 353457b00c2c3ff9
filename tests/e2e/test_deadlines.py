"""Backends that are slow, silent or broken: what the client is told, in its dialect, and when."""

import httpx
import pytest
import sse
from harness import free_port, wait_until
from sse import PATHS, body_of, is_end, is_error, text_of

pytestmark = pytest.mark.relay
DIALECTS = list(PATHS)


def assert_failed_in_band(answer, dialect, words=None):
    """An error event, nothing after it, no end mark, no half event: a truncated stream never looks finished."""
    assert answer.status == 200
    errors = [number for number, event in enumerate(answer.events) if is_error(dialect, event)]
    assert errors == [len(answer.events) - 1], [event.data for event in answer.events[-3:]]
    assert not any(is_end(dialect, event) for event in answer.events)
    assert not answer.unfinished
    if words is not None:
        deltas = [event for event in answer.events[:-1] if text_of(dialect, [event])]
        assert len(deltas) == words


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", [{"drop_after": 6}, {"end_mark": 0, "tokens": 6}], ids=["dropped", "no-end-mark"])
def test_a_cut_stream_never_looks_finished(via_uvicorn, dialect, fault):
    params = {"tokens": 20, "tokens_per_s": 50, **fault}
    assert_failed_in_band(sse.stream(via_uvicorn.url, dialect, params=params), dialect, words=6)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_drop_right_after_the_head(via_uvicorn, dialect):
    """Nothing reached the client yet: it may get an error status, or an error event if the 200 had gone out."""
    body = body_of(dialect)
    params = {"drop_after": 0, "first_token_ms": 100}
    answer = httpx.post(via_uvicorn.url + PATHS[dialect], json=body, params=params, timeout=20)
    if answer.status_code == 200:
        reader = sse.Reader()
        reader.feed(answer.content)
        assert [is_error(dialect, event) for event in reader.events] == [True]
    else:
        assert answer.status_code == 502
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stall_between_tokens(start_tokenring, uvicorn, tag, dialect):
    tokenring = start_tokenring([uvicorn.url], between_tokens_ms=500)
    params = {"tokens": 20, "stall_after": 5, "tag": tag}
    answer = sse.stream(tokenring.url, dialect, params=params)
    assert_failed_in_band(answer, dialect, words=5)
    assert 0.4 < answer.end_s - answer.events[-2].at_s < 1.5
    wait_until(lambda: uvicorn.seen(tag)["ended"] == "disconnected", 2, "the backend is let go")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("silence", ["head_ms", "first_token_ms"])
def test_no_first_token_in_time(start_tokenring, uvicorn, tag, dialect, silence):
    tokenring = start_tokenring([uvicorn.url], first_token_ms=500, commit_ms=0, heartbeat_ms=0)
    params = {silence: 20000, "tag": tag}
    answer = httpx.post(tokenring.url + PATHS[dialect], json=body_of(dialect), params=params, timeout=5)
    # With the backend's own head here, tokenring may have passed it on; without it, nobody has committed to a 200.
    if answer.status_code == 200 and silence == "first_token_ms":
        reader = sse.Reader()
        reader.feed(answer.content)
        assert [is_error(dialect, event) for event in reader.events] == [True]
    else:
        assert answer.status_code == 504
        error = answer.json()
        assert error["error"]["message"]
        assert (error.get("type") == "error") == (dialect == "messages"), "the shape of the path's API"
    wait_until(lambda: uvicorn.seen(tag)["ended"] == "disconnected", 2, "the backend is let go")


@pytest.mark.parametrize("silence", ["head_ms", "first_token_ms"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_heartbeats_during_a_long_prefill(start_tokenring, uvicorn, dialect, silence):
    """The 200 is there after the time to commit, heartbeats come at their interval, and the answer is whole."""
    tokenring = start_tokenring([uvicorn.url], commit_ms=300, heartbeat_ms=200)
    answer = sse.stream(tokenring.url, dialect, params={silence: 1500, "tokens": 5})
    assert answer.head_s - answer.sent_s < 0.8, "the 200 was not committed"
    direct = sse.stream(uvicorn.url, dialect, params={"tokens": 5})
    pings = [event for event in answer.events if event.event == "ping" or event.data == '{"type":"ping"}']
    if dialect == "messages":
        beats = [event.at_s for event in pings if event.at_s - answer.sent_s < 1.4]
    else:
        beats = [at_s for at_s, _ in answer.comments if at_s - answer.sent_s < 1.4]
    assert 2 <= len(beats) <= 8, f"{len(beats)} heartbeats in 1.5 s of silence"
    content = [event for event in answer.data() if event[0] != "ping"]
    assert content == [event for event in direct.data() if event[0] != "ping"]


def test_heartbeats_do_not_reset_the_models_deadline(start_tokenring, uvicorn):
    tokenring = start_tokenring([uvicorn.url], commit_ms=100, heartbeat_ms=100, first_token_ms=700)
    answer = sse.stream(tokenring.url, "chat", params={"first_token_ms": 20000})
    assert_failed_in_band(answer, "chat", words=0)
    assert answer.comments
    assert answer.end_s - answer.sent_s < 2


def test_heartbeats_between_tokens_stand_between_events(start_tokenring, uvicorn):
    """The reader of this suite refuses a comment inside an event."""
    tokenring = start_tokenring([uvicorn.url], heartbeat_ms=50)
    answer = sse.stream(tokenring.url, "chat", params={"tokens": 6, "tokens_per_s": 4})
    direct = sse.stream(uvicorn.url, "chat", params={"tokens": 6})
    assert answer.data() == direct.data()
    assert len(answer.comments) >= 5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_backend_error_after_the_commit_becomes_an_event(start_tokenring, uvicorn, dialect):
    tokenring = start_tokenring([uvicorn.url], commit_ms=200, heartbeat_ms=100)
    answer = sse.stream(tokenring.url, dialect, params={"head_ms": 800, "status": 500})
    content = [event for event in answer.events if event.event != "ping"]
    assert len(content) == 1 and is_error(dialect, content[0])
    assert "refused with 500, as asked" in content[0].data, "the backend's own words are kept"


def test_a_dead_backend_answers_502_in_the_paths_shape(start_tokenring):
    tokenring = start_tokenring([f"http://127.0.0.1:{free_port()}"])
    for dialect in DIALECTS:
        answer = httpx.post(tokenring.url + PATHS[dialect], json=body_of(dialect))
        assert answer.status_code in (502, 503)
        assert answer.headers["content-type"].startswith("application/json")
        assert (answer.json().get("type") == "error") == (dialect == "messages")
        assert answer.json()["error"]["message"] and answer.json()["error"]["type"]
