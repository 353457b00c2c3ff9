"""The Python `anthropic` SDK, unchanged but for its base URL."""

import json

import anthropic
import httpx
import pytest
from sse import PATHS, PROMPT, body_of

SAID = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def sdk():
    made = []

    def make(relay):
        client = anthropic.Anthropic(base_url=relay.url, api_key="sk-test", max_retries=0, timeout=20)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def ask(relay, tokens, **more):
    query, body = relay.ask("messages", tokens)
    return {
        "model": "fake-model",
        "messages": SAID,
        "max_tokens": body.pop("max_tokens"),
        "extra_query": {**query, **more},
        "extra_body": body,
    }


def test_messages_stream_and_whole(sdk, any_relay):
    with sdk(any_relay).messages.stream(**ask(any_relay, 24)) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = sdk(any_relay).messages.create(**ask(any_relay, 24))
    assert len(streamed) > 10
    assert streamed == final.content[0].text
    # The demo model says something else each time.
    assert any_relay.name == "demo" or streamed == whole.content[0].text
    assert final.stop_reason == whole.stop_reason and final.stop_reason in ("end_turn", "max_tokens")
    assert final.usage.output_tokens == whole.usage.output_tokens == 24


def test_raw_events_come_in_order(sdk, any_relay):
    kinds = [event.type for event in sdk(any_relay).messages.create(stream=True, **ask(any_relay, 8))]
    kinds = [kind for kind in kinds if kind not in ("ping", "content_block_delta", "future_event")]
    start, stop = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    assert kinds == start + stop


@pytest.mark.parametrize(
    "status, exception",
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (429, anthropic.RateLimitError),
        (529, anthropic.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_backend_error_before_the_stream_passes_unchanged(sdk, via_uvicorn, status, exception, stream):
    body = body_of("messages", stream=stream)
    direct = httpx.post(via_uvicorn.backend.url + PATHS["messages"], params={"status": status}, json=body)
    with pytest.raises(exception) as raised:
        sdk(via_uvicorn).messages.create(stream=stream, **ask(via_uvicorn, 4, status=status))
    answer = raised.value.response
    assert (answer.status_code, answer.content) == (status, direct.content)
    assert raised.value.body == json.loads(direct.content)


def test_backend_error_in_the_stream_passes_unchanged(sdk, via_uvicorn):
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        for _ in sdk(via_uvicorn).messages.create(stream=True, **ask(via_uvicorn, 8, error_after=4)):
            pass


@pytest.mark.relay
@pytest.mark.parametrize("fault", [{"drop_after": 5}, {"end_mark": 0}], ids=["dropped", "no-end-mark"])
def test_a_truncated_stream_raises(sdk, via_uvicorn, fault):
    words = []
    with pytest.raises(anthropic.APIStatusError):
        for event in sdk(via_uvicorn).messages.create(stream=True, **ask(via_uvicorn, 8, **fault)):
            if event.type == "content_block_delta":
                words.append(event.delta.text)
    assert len(words) == fault.get("drop_after", 8)
