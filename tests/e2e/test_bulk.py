"""Everything that is no model's answer: a plain proxy. Uploads, downloads, methods, headers, kept-alive connections."""

import hashlib
import json
import os
import subprocess
import time

import httpx
import pytest
from sse import PATHS, body_of

MIB = 1 << 20
UPLOAD = 20 * MIB
DOWNLOAD = 50 * MIB


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    path = tmp_path_factory.mktemp("upload") / "upload.bin"
    path.write_bytes(os.urandom(UPLOAD))
    return path


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_upload(via_uvicorn, upload, framing):
    content = upload.read_bytes()
    parts = (content[start : start + 100_000] for start in range(0, UPLOAD, 100_000))
    answer = httpx.post(
        via_uvicorn.url + "/echo", content=content if framing == "length" else parts, timeout=30
    ).json()
    assert (answer["length"], answer["sha256"]) == (UPLOAD, hashlib.sha256(content).hexdigest())


def test_upload_with_expect_100_continue(via_uvicorn, upload):
    """curl asks before it sends; without an answer it would wait a second."""
    command = ["curl", "-sS", "-H", "Expect: 100-continue", "-T", upload, via_uvicorn.url + "/echo/put"]
    start_s = time.monotonic()
    done = subprocess.run([*command, "--expect100-timeout", "10"], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["method"], answer["length"]) == ("PUT", UPLOAD)
    assert answer["sha256"] == hashlib.sha256(upload.read_bytes()).hexdigest()
    assert time.monotonic() - start_s < 9, "nobody answered 100 Continue"


@pytest.mark.parametrize("query", ["", "?chunked=1"], ids=["length", "chunked"])
def test_download(via_uvicorn, query):
    wanted = httpx.head(f"{via_uvicorn.backend.url}/bytes/{DOWNLOAD}?digest=1").headers["etag"]
    digest, length = hashlib.sha256(), 0
    with httpx.stream("GET", f"{via_uvicorn.url}/bytes/{DOWNLOAD}{query}", timeout=30) as answer:
        for part in answer.iter_raw():
            digest.update(part)
            length += len(part)
    assert (length, f'"{digest.hexdigest()}"') == (DOWNLOAD, wanted)
    assert answer.headers.get("content-length") == (None if query else str(DOWNLOAD))


@pytest.mark.relay
def test_a_reader_that_stops_costs_no_memory(via_uvicorn, tag):
    """The backend is held back instead: what is not read is not fetched."""
    before = via_uvicorn.tokenring.resident_bytes()
    with httpx.stream("GET", f"{via_uvicorn.url}/bytes/{400 * MIB}", params={"tag": tag}, timeout=20) as answer:
        pieces = answer.iter_raw(1024)  # kept: httpx closes the connection of an iterator that is gone
        next(pieces)
        time.sleep(2)
        grown = via_uvicorn.tokenring.resident_bytes() - before
        made = via_uvicorn.backend.seen(tag)["tokens"] * 65536
    assert grown < 8 * MIB, f"{grown / MIB:.1f} MiB more resident for one stuck reader"
    # Two kernels' worth of socket buffers, on both legs, and little else.
    assert made < 40 * MIB, f"{made / MIB:.1f} MiB fetched for a reader that took 1 KiB"


def test_target_headers_and_method_pass(via_uvicorn):
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        content = b"x" * 10 if method in ("POST", "PUT", "PATCH") else None
        answer = httpx.request(
            method,
            via_uvicorn.url + "/echo/a%20b/c?x=1&y=%C3%A9&x=2",
            content=content,
            headers={"X-Mixed-Case": "kept", "Accept": "application/x-odd", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
        ).json()
        headers = dict(answer["headers"])
        assert (answer["method"], answer["path"]) == (method, "/echo/a b/c")
        assert answer["query"] == "x=1&y=%C3%A9&x=2"
        assert answer["length"] == len(content or b"")
        assert headers["x-mixed-case"] == "kept" and headers["accept"] == "application/x-odd"
        assert headers["traceparent"].startswith(f"00-{'a' * 32}-")


@pytest.mark.relay
def test_hop_by_hop_headers_stay_on_their_hop(via_uvicorn):
    answer = httpx.get(
        via_uvicorn.url + "/echo",
        headers={"Connection": "keep-alive, X-Private", "X-Private": "for the next hop", "TE": "trailers", "X-Public": "yes"},
    ).json()
    headers = dict(answer["headers"])
    assert headers["x-public"] == "yes"
    assert "x-private" not in headers and "te" not in headers and "keep-alive" not in headers


@pytest.mark.parametrize("code", [200, 201, 202, 204, 301, 304, 400, 404, 418, 500, 502, 503])
def test_status_and_body_pass(via_uvicorn, code):
    direct = httpx.get(f"{via_uvicorn.backend.url}/status/{code}")
    relayed = httpx.get(f"{via_uvicorn.url}/status/{code}")
    assert (relayed.status_code, relayed.content) == (code, direct.content)
    assert relayed.headers["x-fake"] == "status"


class Connections:
    """Counts how often httpx opened a connection."""

    def __init__(self):
        self.opened = 0

    def __call__(self, name, info):
        self.opened += name == "connection.connect_tcp.complete"


def streams_back_to_back(url, count, body, client, connections):
    for number in range(count):
        with client.stream(
            "POST", url + PATHS["chat"], json=body, extensions={"trace": connections}
        ) as answer:
            content = answer.read()
        assert answer.status_code == 200, f"stream {number}: {answer.status_code} {content[:300]}"
        assert b"data: [DONE]" in content, f"stream {number} has no end: {content[-300:]}"
        assert b'"error"' not in content, f"stream {number}: {content[-300:]}"


@pytest.mark.relay
def test_200_streams_back_to_back_before_llama(via_llama):
    """llama.cpp promises to keep its connection and closes it after each stream. No client may notice."""
    _, more = via_llama.ask("chat", 4)
    connections = Connections()
    with httpx.Client(timeout=20) as client:
        streams_back_to_back(via_llama.url, 200, body_of("chat", **more), client, connections)
    assert connections.opened == 1, "the client's own connection is kept alive"


@pytest.mark.relay
def test_streams_and_plain_requests_in_turn_before_llama(via_llama):
    """Whatever the pool holds after one kind of answer is good for the other kind, or is not used."""
    _, more = via_llama.ask("chat", 2)
    streamed, whole = body_of("chat", **more), body_of("chat", stream=False, **more)
    connections = Connections()
    with httpx.Client(timeout=20) as client:
        for _ in range(40):
            streams_back_to_back(via_llama.url, 1, streamed, client, connections)
            assert client.post(via_llama.url + PATHS["chat"], json=whole).status_code == 200
            assert client.get(via_llama.url + "/v1/models").status_code == 200
    assert connections.opened <= 1


@pytest.mark.relay
def test_a_backend_connection_that_idled_out_is_replaced(via_uvicorn):
    """uvicorn closes an idle connection after 5 s: the request that finds it dead is sent again, unseen."""
    with httpx.Client(timeout=20) as client:
        for wait_s in (0, 0, 5.2, 0, 4.99, 0):
            time.sleep(wait_s)
            answer = client.post(via_uvicorn.url + PATHS["chat"], json=body_of("chat", stream=False))
            assert answer.status_code == 200


def test_pages_answer_while_streams_run(via_uvicorn):
    """Slow streams hold up nobody else on the same shard."""
    with httpx.Client(timeout=20) as client:
        slow = []
        for _ in range(20):
            request = client.build_request(
                "POST",
                via_uvicorn.url + PATHS["chat"],
                json=body_of("chat"),
                params={"tokens": 100, "tokens_per_s": 10},
            )
            slow.append(client.send(request, stream=True))
        times = []
        for _ in range(20):
            start_s = time.monotonic()
            assert client.get(via_uvicorn.url + "/v1/models").status_code == 200
            times.append(time.monotonic() - start_s)
        for answer in slow:
            answer.close()
    assert sorted(times)[10] < 0.2
