"""The HTTP edge against two real parsers: the same bytes go through tokenring to uvicorn and to llama.cpp. Whatever is let
through is read alike by both, and as tokenring meant it; everything else is refused. Nothing is smuggled past.

uvicorn (h11) says how it read a request. llama.cpp (cpp-httplib) does not: its answer must be the one that it gives to the
same request put plainly, and it must give as many answers as tokenring wrote requests.
"""

import hashlib
import json
import socket

import httpx
import pytest
from edge_cases import CASES, RANDOM, SMUGGLED
from harness import EchoBackend, Tokenring
from responses import RESPONSES, ScriptedBackend
from tap import Tap, read_requests, read_responses

pytestmark = pytest.mark.relay

# Statuses of `Refusal` that a malformed or unsupported request gets.
REFUSALS = {400, 405, 411, 413, 414, 417, 421, 431, 501, 505}


def exchange(port, data, seconds=10):
    """Send these bytes and nothing more; everything that comes back until the connection ends."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            # Refused, with more on its way than a lingering server reads.
            pass
    return answer


def without(fields, *names):
    return [(name, value) for name, value in fields if name not in names]


class Side:
    """One backend behind a tap behind its tokenring."""

    def __init__(self, backend, logs):
        self.backend = backend
        self.tap = Tap(backend.port)
        self.tokenring = Tokenring(logs, [self.tap.url], shards=1).ready()
        self.at, self.read = 0, 0
        self.direct = httpx.Client(base_url=backend.url)

    def send(self, data):
        """What the client got, the bytes that went to the backend and back meanwhile, line by line, and what a follower on
        a connection of its own, which may share the backend's, asked for and got."""
        before = [(line, len(line.asked), len(line.answered)) for line in self.tap.lines]
        answer = exchange(self.tokenring.port, data)
        target = f"/health?after={self.at}"
        follower = f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
        [(_, _, followed, _)], _ = read_responses(exchange(self.tokenring.port, follower), ["GET"])
        self.at += 1
        known = {id(line): (asked, answered) for line, asked, answered in before}
        news = []
        for line in self.tap.lines:
            asked, answered = known.get(id(line), (0, 0))
            if len(line.asked) > asked:
                news.append((bytes(line.asked[asked:]), bytes(line.answered[answered:])))
        return answer, news, target, json.loads(followed)

    def close(self):
        self.direct.close()
        self.tokenring.stop()
        self.tap.close()


@pytest.fixture(scope="module")
def echo(logs):
    side = Side(EchoBackend(logs), logs)
    yield side
    side.close()
    side.backend.stop()


@pytest.fixture(scope="module")
def llama_side(llama, logs):
    side = Side(llama, logs)
    yield side
    side.close()


def written(news, follower_target):
    """The whole requests in what was written, as h11 reads them; the follower's is checked and left out."""
    requests, followers = [], 0
    for asked, _ in news:
        read, error = read_requests(asked)
        assert error in (None, "closed"), f"tokenring wrote what h11 refuses: {error}\n{asked!r}"
        for method, target, fields, body, complete in read:
            if target == follower_target:
                followers += 1
            elif complete:
                requests.append((method, target, fields, body))
    assert followers == 1, f"{followers} followers"
    return requests


def client_side(answer, requests):
    """The statuses of the answers to the client."""
    methods = [method for method, *_ in requests]
    responses, rest = read_responses(answer, [*methods, "GET", "GET"])
    assert not rest, f"more than answers: {rest!r}"
    return [status for status, _, _, complete in responses if complete]


def check_echo(side, data):
    answer, news, target, follower = side.send(data)
    assert follower["target"] == target, "an answer out of turn"
    requests = written(news, target)
    read = side.direct.get(f"/.read?from={side.read}").json()
    side.read += len(read)
    whole = [told for told in read if told["complete"] and told["target"] != target]
    for told, (method, path, fields, body) in zip(whole, requests, strict=True):
        assert (told["method"], told["target"]) == (method, path)
        assert (told["length"], told["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
        assert [tuple(field) for field in told["headers"]] == fields
    # uvicorn's parser takes more than tokenring does. What both take is the same.
    direct, error = read_requests(data)
    if error is None:
        for (method, _, _, body, complete), (passed, _, _, relayed) in zip(direct, requests):
            assert not complete or (method, body) == (passed, relayed)
    return client_side(answer, requests), requests


PLAIN_ANSWERS = {}


def plain_answer(backend, method, target, fields, body):
    """What llama.cpp answers to the request put plainly, on a connection of its own."""
    kept = without(fields, "host", "content-length", "transfer-encoding", "via", "connection")
    lines = "".join(f"{name}: {value}\r\n" for name, value in kept).encode("latin-1")
    key = (method, target, lines, body)
    if key not in PLAIN_ANSWERS:
        framed = any(name in ("content-length", "transfer-encoding") for name, _ in fields)
        length = f"Content-Length: {len(body)}\r\n" if framed else ""
        head = f"{method} {target} HTTP/1.1\r\nHost: a\r\n{length}Connection: close\r\n".encode("latin-1")
        answer = exchange(backend.port, head + lines + b"\r\n" + body)
        (status, _, content, _), *more = read_responses(answer, [method])[0]
        assert not more
        PLAIN_ANSWERS[key] = (status, content)
    return PLAIN_ANSWERS[key]


def check_llama(side, data):
    answer, news, target, follower = side.send(data)
    assert follower == {"status": "ok"}, "an answer out of turn"
    requests = written(news, target)
    for asked, answered in news:
        read = read_requests(asked)[0]
        whole = [request for request in read if request[4]]
        responses, rest = read_responses(answered, [method for method, *_ in read], closed=False)
        assert not rest, f"more answers than requests: {rest!r}"
        assert len(responses) >= len(whole), "fewer answers than requests"
        for (method, path, fields, body, _), (status, _, content, _) in zip(whole, responses):
            assert (status, content) == plain_answer(side.backend, method, path, fields, body), path
    return client_side(answer, requests), requests


def blocks(cases, size):
    for start in range(0, len(cases), size):
        names = f"{cases[start][0]}..{cases[min(start + size, len(cases)) - 1][0]}"
        yield pytest.param(cases[start : start + size], id=names)


@pytest.mark.parametrize("cases", [*blocks(CASES, 100), *blocks(RANDOM, 500)])
def test_whatever_is_let_through_is_read_alike(cases, echo, llama_side):
    wrong = []
    for name, data, expected in cases:
        try:
            statuses, requests = check_echo(echo, data)
            others, same_requests = check_llama(llama_side, data)
            plain = [(method, path, without(fields, "host"), body) for method, path, fields, body in requests]
            assert plain == [(m, p, without(f, "host"), b) for m, p, f, b in same_requests], (
                "two backends, two requests"
            )
            if name != "random":
                assert not any("smuggled" in path for _, path, _, _ in requests), "a request was smuggled"
            if expected is not None:
                assert len(requests) == expected, f"{len(requests)} requests, answers {statuses}"
            refused = [status for status in statuses[len(requests) :]]
            assert len(refused) <= 1 and set(refused) <= REFUSALS, (
                f"answers {statuses} to {len(requests)} requests"
            )
            if not requests and name not in ("head-short-body", "random"):
                assert refused, "neither passed on nor refused"
            assert others == statuses or requests, "one is refused otherwise than the other"
        except AssertionError as error:
            wrong.append(f"{name}: {error}\n    {data[:300]!r}")
    assert not wrong, "\n".join(wrong)


def test_without_tokenring_the_two_parsers_disagree(echo, llama):
    """What is shown above is worth something only if it is not so anyway: both take much of what tokenring refuses, each
    something else, and requests are smuggled past one or the other."""
    taken_by_uvicorn, taken_by_llama, smuggled = set(), set(), set()
    for name, data, requests in CASES:
        if requests != 0:
            continue
        exchange(echo.backend.port, data)
        read = echo.direct.get(f"/.read?from={echo.read}").json()
        echo.read += len(read)
        answered = read_responses(exchange(llama.port, data), ["GET"] * 3)[0]
        if any(told["complete"] for told in read):
            taken_by_uvicorn.add(name)
        if any(status != 400 for status, *_ in answered):
            taken_by_llama.add(name)
        if any("smuggled" in told["target"] for told in read):
            smuggled.add(name)
    print(len(taken_by_uvicorn), len(taken_by_llama), len(smuggled), len(taken_by_uvicorn ^ taken_by_llama))
    assert min(len(taken_by_uvicorn), len(taken_by_llama)) > 20
    assert len(taken_by_uvicorn ^ taken_by_llama) > 50 and smuggled


def test_a_smuggled_request_would_be_seen(echo):
    """The rig itself: bytes that go past tokenring, straight into the tap, are found out."""
    exchange(echo.tap.port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED)
    read = echo.direct.get(f"/.read?from={echo.read}").json()
    echo.read += len(read)
    assert [told["target"] for told in read] == ["/health", "/smuggled"]


@pytest.fixture(scope="module")
def scripted(logs):
    backend = ScriptedBackend()
    tokenring = Tokenring(logs, [backend.url], shards=1).ready()
    yield backend, tokenring
    tokenring.stop()
    backend.close()


def test_a_backends_answer_is_read_as_h11_reads_it_or_refused(scripted):
    """The other direction: scripted answers, whole or not; a client gets what h11 makes of them, or a 502, never a whole
    answer out of half of one."""
    backend, tokenring = scripted
    wrong = []
    for name, data, readable in RESPONSES:
        backend.script = data
        request = b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        heard, rest = read_responses(exchange(tokenring.port, request), ["GET"])
        meant, _ = read_responses(data, ["GET"])
        try:
            assert not rest and len(heard) == 1, f"{heard} {rest}"
            status, _, body, complete = heard[0]
            if readable is False:
                assert (status, complete) == (502, True), f"{status}, complete: {complete}"
            elif (status, complete) != (502, True):
                assert meant, "passed on, though h11 reads no answer"
                assert status == meant[0][0]
                assert body == meant[0][2] if complete else meant[0][2].startswith(body)
                assert not complete or meant[0][3], "half an answer looks whole"
                assert readable is not None or not complete, "an unfinished answer looks whole"
            else:
                assert readable is not True, "a plain answer is refused"
        except AssertionError as error:
            wrong.append(f"{name}: {error}\n    {data[:300]!r}")
    assert not wrong, "\n".join(wrong)
