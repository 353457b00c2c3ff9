"""Pages of other origins: preflights are answered, answers name what pages may see, and a backend's own word on it is replaced."""

import httpx
import pytest
from harness import wait_until
from sse import body_of
from streams import HeldBackend, ask_chat, resume

pytestmark = pytest.mark.relay

PAGE = "https://chat.example"
ALLOWED, EXPOSED = "access-control-allow-origin", "access-control-expose-headers"
ROUTES = """
[[route]]
path = "/v1/streams"
cors = "https://chat.example http://localhost:3000"

[[route]]
path = "/v1/chat"
cors = "*"
"""


@pytest.fixture
def start(start_tokenring, uvicorn):
    def start_it(*flags, upstream=uvicorn.url, **settings):
        return start_tokenring([upstream], shards=1, more=flags, **settings)

    return start_it


def preflight(tokenring, path="/v1/chat/completions", origin=PAGE, method="POST"):
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    return httpx.options(tokenring.url + path, headers={**headers, "Access-Control-Request-Headers": "authorization"})


def test_preflights(start):
    tokenring = start("--cors", f"{PAGE}, http://localhost:3000")
    for origin in (PAGE, "http://localhost:3000"):
        for path in ("/v1/chat/completions", "/v1/streams/x", "/v1/models"):
            told = preflight(tokenring, path, origin)
            assert (told.status_code, told.content) == (204, b"")
            assert told.headers[ALLOWED] == origin and told.headers["vary"] == "Origin"
            assert "DELETE" in told.headers["access-control-allow-methods"]
            named = told.headers["access-control-allow-headers"].split(", ")
            assert {"Authorization", "Content-Type", "Last-Event-ID", "Tokenring-On-Leave", "*"} == set(named)
            assert int(told.headers["access-control-max-age"]) > 0
    for origin in ("https://other.example", "http://localhost:3001", "null"):
        told = preflight(tokenring, origin=origin)
        assert told.status_code == 204 and ALLOWED not in told.headers and told.headers["vary"] == "Origin"
        assert "access-control-allow-methods" not in told.headers


def test_answers(start):
    tokenring = start("--cors", PAGE)
    url = f"{tokenring.url}/v1/chat/completions?tokens=3"
    with httpx.stream("POST", url, json=body_of("chat"), headers={"Origin": PAGE}) as answer:
        assert answer.headers[ALLOWED] == PAGE and answer.headers["vary"] == "Origin"
        assert "Tokenring-Stream" in answer.headers[EXPOSED]
        stream = answer.headers["tokenring-stream"]
        answer.read()
    back = resume(tokenring.port, stream, 1, fields=f"Origin: {PAGE}\r\n").read_all()
    assert back.headers[ALLOWED] == PAGE and back.ids()[0] == 2
    for path, status in [
        (f"/v1/streams/{stream}/status", 200),
        (f"/v1/streams/{stream}?after=99", 400),
        ("/v1/streams/x", 404),
        ("/v1/models", 200),
        ("/nowhere", 404),
    ]:
        answer = httpx.get(tokenring.url + path, headers={"Origin": PAGE})
        assert (answer.status_code, answer.headers[ALLOWED]) == (status, PAGE), path
    stopped = httpx.delete(f"{tokenring.url}/v1/streams/{stream}", headers={"Origin": PAGE})
    assert (stopped.status_code, stopped.headers[ALLOWED]) == (204, PAGE)
    for headers in ({}, {"Origin": "https://other.example"}):
        answer = httpx.post(url, json=body_of("chat"), headers=headers)
        assert answer.status_code == 200 and ALLOWED not in answer.headers and answer.headers["vary"] == "Origin"


def test_errors_of_a_backend_can_be_read_by_pages(start):
    tokenring = start("--cors", "*")
    url = f"{tokenring.url}/v1/chat/completions?status=429"
    refused = httpx.post(url, json=body_of("chat"), headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers[ALLOWED]) == (429, "*")
    assert "Retry-After" in refused.headers[EXPOSED] and "vary" not in refused.headers


def test_an_early_answer(start):
    """Begun before the backend has said anything."""
    tokenring = start("--cors", "*", "--commit-ms", "50")
    url = f"{tokenring.url}/v1/chat/completions?head_ms=400&tokens=2"
    answer = httpx.post(url, json=body_of("chat"), headers={"Origin": PAGE})
    assert answer.headers[ALLOWED] == "*" and "[DONE]" in answer.text


def test_a_rule_of_each_route(start, tmp_path):
    config = tmp_path / "tokenring.toml"
    config.write_text(ROUTES)
    tokenring = start(config=config)
    assert preflight(tokenring).headers[ALLOWED] == "*"
    assert preflight(tokenring, "/v1/streams/x").headers[ALLOWED] == PAGE
    assert ALLOWED not in preflight(tokenring, "/v1/streams/x", "https://other.example").headers
    assert preflight(tokenring, "/v1/completions").status_code == 405, "uvicorn's own answer"


def test_off_leaves_it_to_the_backend(start, via_llama, llama):
    off = preflight(via_llama.tokenring)
    direct = httpx.options(
        f"{llama.url}/v1/chat/completions", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    )
    assert off.status_code == direct.status_code and off.headers.get(ALLOWED) == direct.headers.get(ALLOWED)
    on = start("--cors", PAGE, upstream=llama.url)
    body = {**body_of("chat"), **via_llama.ask("chat", 3)[1]}
    answer = httpx.post(f"{on.url}/v1/chat/completions", json=body, headers={"Origin": PAGE}, timeout=30)
    assert answer.headers.get_list(ALLOWED) == [PAGE], "llama.cpp's own line is gone"


def test_durable_streams_keep_their_own_rule(start):
    tokenring = start("--cors", PAGE)
    told = preflight(tokenring, "/v1/durable/a", "https://other.example", "PUT")
    assert told.headers[ALLOWED] == "*"
    off = start("--cors", "*", "--durable-cors", "off")
    assert ALLOWED not in preflight(off, "/v1/durable/a", method="PUT").headers


def test_a_page_reads_with_others(start):
    """Each of them is told what its own origin is."""
    backend = HeldBackend()
    tokenring = start("--cors", f"{PAGE} https://b.example", upstream=backend.url)
    client = ask_chat(tokenring.port, fields=f"Origin: {PAGE}\r\n")
    said = backend.accept()
    said.say(2)
    client.read_head().read(2)
    beside = resume(tokenring.port, client.stream, 0, fields="Origin: https://b.example\r\n")
    assert (client.headers[ALLOWED], beside.headers[ALLOWED]) == (PAGE, "https://b.example")
    said.done()
    assert client.read_all().ids() == beside.read_all().ids() == [1, 2, 3]
    wait_until(lambda: not said.connection.recv(1), 5, "the backend's connection is over")
    backend.close()
