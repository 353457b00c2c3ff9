"""The JavaScript SDKs: npm `openai`, `ai` with `@ai-sdk/openai-compatible`, and `@anthropic-ai/sdk`."""

import json

from harness import run_node
from sse import assert_arrives_over_time


def extra(relay, dialect, tokens, **pace):
    query, body = relay.ask(dialect, tokens, **pace)
    # The scripts send the limit of Anthropic's API themselves, and one body to both APIs of OpenAI.
    body = {key: value for key, value in body.items() if dialect != "messages" or key != "max_tokens"}
    if dialect == "chat" and "max_tokens" in body:
        body["max_output_tokens"] = body["max_tokens"]
    return json.dumps({"query": query, "body": body, "refuses": relay.name == "uvicorn"})


def test_openai(any_relay):
    found = run_node("openai.mjs", any_relay.url, 24, extra(any_relay, "chat", 24))
    assert len(found["chat"]["streamed"]) > 10
    # The demo model says something else each time.
    assert any_relay.name == "demo" or found["chat"]["streamed"] == found["chat"]["whole"]
    assert found["chat"]["finish"] in ("stop", "length")
    assert found["responses"]["streamed"]
    assert found["responses"]["last"] in ("response.completed", "response.incomplete")
    if any_relay.name == "uvicorn":
        assert found["error"]["kind"] == "RateLimitError" and found["error"]["status"] == 429
        assert found["error"]["body"]["message"] == "refused with 429, as asked"


def test_openai_tokens_arrive_over_time(via_uvicorn):
    found = run_node("openai.mjs", via_uvicorn.url, 20, extra(via_uvicorn, "chat", 20, tokens_per_s=40))
    assert_arrives_over_time(found["chat"]["times"], 19 / 40)


def test_ai_sdk(via_uvicorn):
    query = {"tokens": "20", "tokens_per_s": "40"}
    found = run_node("ai.mjs", via_uvicorn.url, json.dumps(query))
    assert len(found["streamed"]) > 10
    assert found["streamed"] == found["whole"]
    assert (found["finish"], found["tokens"]) == ("stop", 20)
    assert_arrives_over_time(found["times"], 19 / 40)
    assert len(found["errors"]) == 1 and "the fake model failed, as asked" in found["errors"][0]


def test_ai_sdk_with_the_demo_model(demo):
    query = {"tokens": "20", "tokens_per_s": "40"}
    found = run_node("ai.mjs", demo.url, json.dumps(query))
    assert len(found["streamed"]) > 10
    assert found["finish"] in ("stop", "length")
    assert_arrives_over_time(found["times"], 19 / 40)


def test_anthropic(any_relay):
    found = run_node("anthropic.mjs", any_relay.url, 24, extra(any_relay, "messages", 24))
    messages = found["messages"]
    assert len(messages["streamed"]) > 10
    assert messages["streamed"] == messages["final"]
    assert any_relay.name == "demo" or messages["streamed"] == messages["whole"]
    assert messages["tokens"] == 24
    if any_relay.name == "uvicorn":
        assert found["error"]["kind"] == "RateLimitError" and found["error"]["status"] == 429
        assert found["error"]["body"]["error"]["message"] == "refused with 429, as asked"
