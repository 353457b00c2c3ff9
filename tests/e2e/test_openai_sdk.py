"""The Python `openai` SDK, unchanged but for its base URL."""

import asyncio
import json
import time

import httpx
import openai
import pytest
from harness import free_port
from sse import PATHS, PROMPT, body_of

SAID = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def sdk():
    made = []

    def make(relay, **options):
        client = openai.OpenAI(base_url=f"{relay.url}/v1", api_key="sk-test", max_retries=0, timeout=20, **options)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def test_chat_stream(sdk, any_relay):
    query, body = any_relay.ask("chat", 24)
    chunks = list(
        sdk(any_relay).chat.completions.create(
            model="fake-model", messages=SAID, stream=True, extra_query=query, extra_body=body
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert len("".join(choice.delta.content or "" for choice in choices)) > 10
    assert [choice.finish_reason for choice in choices if choice.finish_reason] in (["stop"], ["length"])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_chat_stream_with_usage(sdk, any_relay):
    query, body = any_relay.ask("chat", 12)
    chunks = list(
        sdk(any_relay).chat.completions.create(
            model="fake-model",
            messages=SAID,
            stream=True,
            stream_options={"include_usage": True},
            extra_query=query,
            extra_body=body,
        )
    )
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usages) == 1 and chunks[-1].usage is usages[0] and chunks[-1].choices == []
    assert usages[0].completion_tokens == 12


def test_chat_whole(sdk, any_relay):
    query, body = any_relay.ask("chat", 24)
    answer = sdk(any_relay).chat.completions.create(
        model="fake-model", messages=SAID, extra_query=query, extra_body=body
    )
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content) > 10
    assert answer.usage.completion_tokens == 24


def test_completions_stream_and_whole(sdk, any_relay):
    query, body = any_relay.ask("completions", 16)
    ask = {"model": "fake-model", "prompt": PROMPT, "extra_query": query, "extra_body": body}
    chunks = list(sdk(any_relay).completions.create(stream=True, **ask))
    streamed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    whole = sdk(any_relay).completions.create(**ask)
    # The demo model says something else each time.
    assert streamed and (any_relay.name == "demo" or streamed == whole.choices[0].text)


def test_responses_stream_and_whole(sdk, any_relay):
    query, body = any_relay.ask("responses", 16)
    ask = {"model": "fake-model", "input": PROMPT, "extra_query": query, "extra_body": body}
    events = list(sdk(any_relay).responses.create(stream=True, **ask))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert streamed and streamed == events[-1].response.output_text
    whole = sdk(any_relay).responses.create(**ask).output_text
    assert whole and (any_relay.name == "demo" or whole == streamed)


def test_models(sdk, via_uvicorn, via_llama):
    assert [model.id for model in sdk(via_uvicorn).models.list()] == ["fake-model", "fake-model-2"]
    assert len(list(sdk(via_llama).models.list())) == 1


def test_embeddings(sdk, via_uvicorn):
    answer = sdk(via_uvicorn).embeddings.create(model="fake-model", input=["one", "two"])
    assert [len(row.embedding) for row in answer.data] == [32, 32]
    assert answer.data[0].embedding != answer.data[1].embedding


def test_file_upload(sdk, via_uvicorn):
    content = bytes(range(256)) * 4096
    answer = sdk(via_uvicorn).files.create(file=("upload.bin", content), purpose="assistants")
    assert len(content) < answer.bytes < len(content) + 2000, "the file and its multipart framing"


@pytest.mark.parametrize(
    "status, exception",
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_backend_error_before_the_stream_passes_unchanged(sdk, via_uvicorn, status, exception, stream):
    body = body_of("chat", stream=stream)
    direct = httpx.post(via_uvicorn.backend.url + PATHS["chat"], params={"status": status}, json=body)
    with pytest.raises(exception) as raised:
        sdk(via_uvicorn).chat.completions.create(
            model="fake-model", messages=SAID, stream=stream, extra_query={"status": status}
        )
    answer = raised.value.response
    assert answer.status_code == status
    assert answer.content == direct.content
    for name in ("content-type", "retry-after", "x-request-id", "x-ratelimit-remaining-requests"):
        assert answer.headers[name] == direct.headers[name]
    assert raised.value.body == json.loads(direct.content)["error"]


def test_backend_error_in_the_stream_passes_unchanged(sdk, via_uvicorn):
    chunks = []
    with pytest.raises(openai.APIError, match="the fake model failed, as asked"):
        for chunk in sdk(via_uvicorn).chat.completions.create(
            model="fake-model", messages=SAID, stream=True, extra_query={"error_after": 5}
        ):
            chunks.append(chunk)
    assert len(chunks) == 6, "the role and five words"


@pytest.mark.relay
@pytest.mark.parametrize("fault", ["drop_after", "end_mark"])
def test_a_truncated_stream_raises(sdk, via_uvicorn, fault):
    """The backend dies, or ends without the dialect's end mark: an APIError after the words that came, never silence."""
    query = {"tokens": 8, "tokens_per_s": 100, fault: 0 if fault == "end_mark" else 5}
    words = []
    with pytest.raises(openai.APIError):
        for chunk in sdk(via_uvicorn).chat.completions.create(
            model="fake-model", messages=SAID, stream=True, extra_query=query
        ):
            words += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    assert len(words) == (8 if fault == "end_mark" else 5)


@pytest.mark.relay
def test_backend_that_is_not_there(sdk, start_tokenring):
    tokenring = start_tokenring([f"http://127.0.0.1:{free_port()}"])
    for stream in (True, False):
        with pytest.raises(openai.InternalServerError) as raised:
            sdk(tokenring).chat.completions.create(model="fake-model", messages=SAID, stream=stream)
        assert raised.value.status_code in (502, 503)
        assert raised.value.body["message"], "an error in OpenAI's shape"


def test_first_token_is_not_held_back(sdk, via_uvicorn):
    query = {"tokens": 3, "tokens_per_s": 1}
    sent_s = time.monotonic()
    stream = sdk(via_uvicorn).chat.completions.create(
        model="fake-model", messages=SAID, stream=True, extra_query=query
    )
    next(iter(stream))
    assert time.monotonic() - sent_s < 0.5
    stream.close()


def test_concurrent_streams_do_not_mix(via_uvicorn):
    """Forty prompts at once, each answered with its own words."""

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{via_uvicorn.url}/v1", api_key="sk-test", max_retries=0, timeout=30
        ) as client:

            async def one(number, stream):
                said = [{"role": "user", "content": f"question {number}"}]
                query = {"tokens": 20, "tokens_per_s": 20 if stream else 0}
                answer = await client.chat.completions.create(
                    model="fake-model", messages=said, stream=stream, extra_query=query
                )
                if not stream:
                    return answer.choices[0].message.content
                text = ""
                async for chunk in answer:
                    text += chunk.choices[0].delta.content or ""
                return text

            streamed = await asyncio.gather(*(one(number, True) for number in range(40)))
            whole = await asyncio.gather(*(one(number, False) for number in range(40)))
            return streamed, whole

    streamed, whole = asyncio.run(run())
    assert streamed == whole
    assert len(set(whole)) > 10
