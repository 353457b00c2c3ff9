"""OpenAI's responses in background, by the SDKs' own means: created, cut, taken up again, polled, cancelled, before backends
that know nothing of it."""

import json
import time

import httpx
import openai
import pytest
from harness import run_node, wait_until
from sse import PROMPT

pytestmark = pytest.mark.relay


class Place:
    """tokenring before a backend, or with the demo model, and what a request to it says."""

    def __init__(self, relay, tokenring):
        self.relay, self.tokenring = relay, tokenring
        self.client = openai.OpenAI(
            base_url=f"{tokenring.url}/v1", api_key="sk-test", max_retries=0, timeout=30
        )

    def request(self, tokens, **pace):
        query, body = self.relay.ask("responses", tokens, **pace)
        return {"model": "fake-model", "input": PROMPT, "extra_query": query, "extra_body": body}


@pytest.fixture(params=["demo", "uvicorn", "slow_llama"])
def behind(request):
    """The demo model, a backend that refuses `background`, and llama.cpp's server, which does not know it."""
    return request.getfixturevalue("demo" if request.param == "demo" else f"via_{request.param}")


@pytest.fixture(params=[1, 2], ids=["1-shard", "2-shards"])
def place(behind, start_tokenring, request):
    tokenring = start_tokenring([behind.backend.url] if behind.backend else [], shards=request.param)
    place = Place(behind, tokenring)
    yield place
    place.client.close()


@pytest.fixture(params=[1, 2], ids=["1-shard", "2-shards"])
def before_uvicorn(via_uvicorn, start_tokenring, request):
    place = Place(via_uvicorn, start_tokenring([via_uvicorn.backend.url], shards=request.param))
    yield place
    place.client.close()


def take(events, count):
    """The next events of a stream, which is left behind then."""
    taken = []
    for event in events:
        taken.append(event)
        if len(taken) == count:
            break
    events.close()
    return taken


def last_seen(events):
    """The number behind which to go on; of a backend that numbers nothing, events are counted."""
    return getattr(events[-1], "sequence_number", None) or len(events)


def text_of(events):
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def assert_whole(events):
    numbers = [getattr(event, "sequence_number", None) for event in events]
    if numbers[0] is not None:
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert [event.type for event in events[:1]] == ["response.created"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert sum(event.type == events[-1].type for event in events) == 1
    assert text_of(events) == events[-1].response.output_text != ""


def test_a_stream_is_taken_up_where_it_was_cut(place):
    request = place.request(40, tokens_per_s=100)
    events = take(place.client.responses.create(background=True, stream=True, **request), 4)
    response_id = events[0].response.id
    cuts = 0
    while events[-1].type not in ("response.completed", "response.incomplete"):
        more = place.client.responses.retrieve(response_id, stream=True, starting_after=last_seen(events))
        events += take(more, 7)
        cuts += 1
        assert cuts < 40
    assert cuts > 3
    assert_whole(events)
    # It is over, and can still be read, from anywhere.
    again = list(place.client.responses.retrieve(response_id, stream=True))
    assert [event.to_dict() for event in again] == [event.to_dict() for event in events]
    assert list(place.client.responses.retrieve(response_id, stream=True, starting_after=last_seen(events))) == []
    whole = place.client.responses.retrieve(response_id)
    assert (whole.id, whole.status) == (response_id, events[-1].response.status)
    assert whole.background and whole.output_text == text_of(events)


def test_a_response_is_polled(place):
    response = place.client.responses.create(background=True, **place.request(30, tokens_per_s=100))
    assert response.status in ("queued", "in_progress") and response.background
    statuses = {response.status}
    while response.status in ("queued", "in_progress"):
        time.sleep(0.05)
        response = place.client.responses.retrieve(response.id)
        statuses.add(response.status)
    assert response.status in ("completed", "incomplete") and len(statuses) > 1
    events = list(place.client.responses.retrieve(response.id, stream=True))
    assert_whole(events)
    assert text_of(events) == response.output_text


def test_a_response_is_cancelled(place):
    request = place.request(2000, tokens_per_s=20)
    stream = place.client.responses.create(background=True, stream=True, **request)
    response_id = next(iter(stream)).response.id
    for _ in range(2):
        cancelled = place.client.responses.cancel(response_id)
        assert (cancelled.id, cancelled.status) == (response_id, "cancelled")
    with pytest.raises(openai.APIError, match="The stream was stopped"):
        for _ in stream:
            pass
    assert place.client.responses.retrieve(response_id).status == "cancelled"
    with pytest.raises(openai.APIStatusError) as raised:
        place.client.responses.retrieve(response_id, stream=True)
    assert (raised.value.status_code, raised.value.code) == (410, "stream_stopped")


def test_the_backend_is_let_go_when_a_response_is_cancelled(before_uvicorn, tag):
    request = before_uvicorn.request(2000, tokens_per_s=50)
    request["extra_query"] = {**request["extra_query"], "tag": tag}
    response = before_uvicorn.client.responses.create(background=True, **request)
    uvicorn = before_uvicorn.relay.backend
    # It goes on with nobody there.
    seen = uvicorn.seen(tag)["tokens"]
    wait_until(lambda: uvicorn.seen(tag)["tokens"] > seen + 5, 5, "more tokens without a client")
    assert uvicorn.seen(tag)["ended"] is None
    assert before_uvicorn.client.responses.cancel(response.id).status == "cancelled"
    wait_until(lambda: uvicorn.seen(tag)["ended"] == "disconnected", 5, "the backend to be let go")


def test_a_backend_that_dies_is_told_of(before_uvicorn):
    request = before_uvicorn.request(30, tokens_per_s=200)
    request["extra_query"] = {**request["extra_query"], "drop_after": 5}
    response = before_uvicorn.client.responses.create(background=True, **request)
    responses = before_uvicorn.client.responses
    failed = wait_until(
        lambda: (now := responses.retrieve(response.id)).status == "failed" and now, 5, "its failure"
    )
    assert failed.error.code in ("upstream_reset", "upstream_truncated")
    words = []
    with pytest.raises(openai.APIError):
        for event in responses.retrieve(response.id, stream=True):
            words += [event] if event.type == "response.output_text.delta" else []
    assert len(words) == 5


def test_the_backend_alone_refuses_it(via_uvicorn):
    """So that the tests above show something."""
    body = {"model": "fake-model", "input": PROMPT, "background": True, "stream": True}
    answer = httpx.post(f"{via_uvicorn.backend.url}/v1/responses", json=body)
    assert answer.status_code == 400 and "background" in answer.json()["error"]["message"]


def test_what_the_backend_cannot_be_made_to_stream_is_refused(before_uvicorn):
    body = json.dumps({"model": "fake-model", "stream": False, "input": PROMPT, "background": True})
    answer = httpx.post(f"{before_uvicorn.tokenring.url}/v1/responses", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "background_needs_stream")


def test_a_response_of_the_backends_own_is_asked_of_the_backend(before_uvicorn):
    with pytest.raises(openai.NotFoundError) as raised:
        before_uvicorn.client.responses.retrieve("resp_unknown")
    assert "tokenring" not in raised.value.response.text


def test_npm(place):
    query, body = place.relay.ask("responses", 40, tokens_per_s=100)
    slow_query, slow_body = place.relay.ask("responses", 2000, tokens_per_s=20)
    asked = {"query": query, "body": body, "slow": {"query": slow_query, "body": slow_body}}
    found = run_node("background.mjs", place.tokenring.url, json.dumps(asked))
    assert found["cuts"] > 3
    if found["numbers"][0] is not None:
        assert found["numbers"] == list(range(found["numbers"][0], found["numbers"][0] + len(found["numbers"])))
    assert found["types"][0] == "response.created"
    assert found["types"][-1] in ("response.completed", "response.incomplete")
    assert found["streamed"] == found["text"] == found["retrieved"]["text"] != ""
    assert found["retrieved"]["status"] in ("completed", "incomplete")
    assert found["atEnd"] == 0
    assert found["polled"][0] in ("queued", "in_progress")
    assert found["polled"][-1] in ("completed", "incomplete")
    assert found["cancelled"] == ["cancelled", "cancelled", "cancelled"]
    assert found["told"] == {"kind": "APIError", "code": "stream_stopped"}
