"""Headless Chromium: `fetch` with a streamed body, and EventSource. Pages report what they saw to the uvicorn backend."""

import json
import shutil
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlencode

import httpx
import pytest
import sse
from cutter import Cutter
from harness import DIRECT, ROOT, Process, wait_until
from sse import assert_arrives_over_time, assert_dense, body_of
from streams import HeldBackend

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
def browse(logs, tmp_path):
    """Open a page."""
    opened = []

    def open_it(url, *flags):
        # Without --dump-dom or the like headless Chromium stays until it is ended.
        command = [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0", *flags]
        opened.append(Process("chromium", [*command, url], logs))

    yield open_it
    for browser in opened:
        browser.stop()
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@pytest.fixture
def open_page(browse, uvicorn, tag):
    """Open a page and give what it reported."""

    def open_it(url, *flags, **query):
        browse(f"{url}?{urlencode({**query, 'report': f'/results/{tag}'})}", *flags)
        return wait_until(lambda: uvicorn.result(tag), 45, f"a report of {url}", every=0.1)

    return open_it


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


class Pages(SimpleHTTPRequestHandler):
    """The files of the repository, and a place for what pages report."""

    reports = None

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=ROOT)

    def do_POST(self):
        self.reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.relay
def test_an_answer_cut_off_ten_times_is_complete(browse, start_tokenring):
    """The example of docs/examples: every token once, over eleven connections; and once more when it is loaded again."""
    backend, reports = HeldBackend(), []
    pages = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnPages", (Pages,), {"reports": reports}))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    origin = "http://127.0.0.1:%d" % pages.server_port
    tokenring = start_tokenring([backend.url], shards=2, more=["--cors", origin])
    cutter = Cutter(tokenring.port, cuts=10)
    query = urlencode({"api": cutter.url, "report": "/report"})
    browse(f"{origin}/tests/e2e/pages/resume.html?{query}")
    said = backend.accept(20)
    while cutter.done < 10:
        assert said.words < 1000, f"cut off {cutter.done} times"
        said.say()
        time.sleep(0.05)
    said.say(20)
    said.done()
    [found] = wait_until(lambda: reports, 30, "the page's report", every=0.1)
    words = "".join(f"w{number} " for number in range(1, said.words + 1))
    assert found["first"]["answer"] == words and found["first"]["ended"] == "complete"
    assert "after 11 connections" in found["first"]["state"]
    assert found["reloaded"]["answer"] == words and "after 1 connection " in found["reloaded"]["state"]
    cutter.close()
    pages.shutdown()
    backend.close()
