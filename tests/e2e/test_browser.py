"""Headless Chromium: `fetch` with a streamed body, and EventSource. Pages report what they saw to the uvicorn backend."""

import json
import shutil
import threading
import time
from urllib.parse import urlencode

import httpx
import pytest
import sse
from harness import DIRECT, Process, wait_until
from sse import assert_arrives_over_time, assert_dense, body_of

CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
]


@pytest.fixture
def open_page(logs, uvicorn, tmp_path, tag):
    """Open a page and give what it reported."""
    opened = []

    def open_it(url, *flags, **query):
        query = urlencode({**query, "report": f"/results/{tag}"})
        # Without --dump-dom or the like headless Chromium stays until it is ended.
        command = [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0", *flags]
        browser = Process("chromium", [*command, f"{url}?{query}"], logs)
        opened.append(browser)
        return wait_until(lambda: uvicorn.result(tag), 30, f"a report of {url}", every=0.1)

    yield open_it
    for browser in opened:
        browser.stop()
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


def assert_streamed(found):
    assert found["error"] is None
    assert found["status"] == 200 and found["type"].startswith("text/event-stream")
    assert found["events"][-1] == "[DONE]" and found["unfinished"] == ""
    assert len(found["text"]) > 10
    if not DIRECT:
        assert_dense(found["ids"])


def test_fetch_from_a_page_behind_tokenring(open_page, via_uvicorn):
    """The page itself comes through tokenring, so the model is on its own origin and no rule of CORS is bent."""
    ask = {"tokens": 30, "tokens_per_s": 30}
    found = open_page(
        f"{via_uvicorn.url}/pages/stream.html", api="", ask=urlencode(ask), body=json.dumps(body_of("chat"))
    )
    assert_streamed(found)
    assert_arrives_over_time(found["times"], 29 / 30)
    direct = sse.stream(via_uvicorn.backend.url, "chat", params={"tokens": 30})
    assert found["events"] == [event.data for event in direct.events]


@pytest.mark.relay
def test_a_fetch_that_lags_is_told_of_a_failure(open_page, via_uvicorn):
    """The backend fails before the page reads anything: every token that came and the error reach it all the same."""
    found = open_page(
        f"{via_uvicorn.url}/pages/stream.html",
        api="",
        ask=urlencode({"tokens": 30, "drop_after": 10}),
        body=json.dumps(body_of("chat")),
        lag_ms=1500,
    )
    assert found["error"] is None and found["unfinished"] == ""
    *tokens, error = found["events"]
    assert len(tokens) >= 10 and len(found["text"]) > 10
    assert json.loads(error)["error"]["code"].startswith("upstream_")
    assert "[DONE]" not in found["events"]


@pytest.mark.parametrize("name", ["demo", "via_slow_llama"])
def test_fetch_from_a_page_elsewhere(open_page, uvicorn, request, name):
    """The demo model and llama.cpp serve no page of ours, so Chromium is told not to mind the origin."""
    relay = request.getfixturevalue(name)
    ask, more = relay.ask("chat", 30, tokens_per_s=30)
    found = open_page(
        f"{uvicorn.url}/pages/stream.html",
        "--disable-web-security",
        api=relay.url,
        ask=urlencode(ask),
        body=json.dumps(body_of("chat", **more)),
    )
    assert_streamed(found)
    if name == "demo":
        assert_arrives_over_time(found["times"], 29 / 30)
    else:
        assert found["times"][-1] - found["times"][0] > 0.2
        direct = sse.stream(relay.backend.url, "chat", body_of("chat", **more))
        assert found["text"] == sse.text_of("chat", direct.events)


def test_eventsource(open_page, via_uvicorn):
    ask = urlencode({"tokens": 20, "tokens_per_s": 40})
    found = open_page(f"{via_uvicorn.url}/pages/eventsource.html", ask=ask)
    assert found["words"] == list(range(20))
    assert (found["opened"], found["errors"]) == (1, 0)
    assert_arrives_over_time(found["times"], 19 / 40)


@pytest.mark.relay
def test_eventsource_of_a_durable_stream(open_page, uvicorn, start_tokenring):
    """Sent away after every third of a second, it comes back by itself until the stream is closed, and misses nothing."""
    tokenring = start_tokenring(shards=1, more=["--durable-events-ms", "300"])
    stream = f"{tokenring.url}/v1/durable/chat"
    json_type = {"Content-Type": "application/json"}
    assert httpx.put(stream, headers=json_type).status_code == 201

    def publish():
        for number in range(100):
            httpx.post(stream, headers=json_type, json={"n": number})
            time.sleep(0.15)
        httpx.post(stream, headers={"Stream-Closed": "true"})

    publisher = threading.Thread(target=publish)
    publisher.start()
    found = open_page(f"{uvicorn.url}/pages/durable.html", stream=stream)
    publisher.join()
    assert found["numbers"] == list(range(100))
    assert found["ids"] == sorted(set(found["ids"]))
    assert found["opened"] >= 8 and found["errors"] >= found["opened"]
