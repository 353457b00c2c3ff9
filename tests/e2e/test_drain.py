"""SIGTERM: nobody new, everybody who is there served to the end, exit code 0."""

import signal
import socket
import time

import httpx
import pytest
import sse
from harness import EXIT_OK, wait_until
from sse import PATHS, Background, body_of, is_end, is_error

pytestmark = pytest.mark.relay


@pytest.fixture(params=["demo", "uvicorn"])
def own_tokenring(request, start_tokenring, uvicorn):
    return start_tokenring([uvicorn.url] if request.param == "uvicorn" else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_streams_finish_and_the_exit_is_clean(own_tokenring, number):
    streams = [
        Background(own_tokenring.url, "chat", tokens=40, tokens_per_s=25).wait_streaming() for _ in range(4)
    ]
    own_tokenring.signal(number)
    signalled_s = time.monotonic()

    def not_ready():
        return httpx.get(f"{own_tokenring.admin_url}/ready").status_code == 503

    wait_until(not_ready, 0.3, "/ready answers 503")
    assert httpx.get(f"{own_tokenring.admin_url}/live").status_code == 200
    for stream in streams:
        answer = stream.result()
        assert is_end("chat", answer.events[-1]) and not answer.cut
        assert len(sse.text_of("chat", answer.events)) > 10
        assert answer.end_s > signalled_s, "the stream was not under way any more: the test proves nothing"
    assert own_tokenring.wait(5) == EXIT_OK


def test_nobody_new_is_taken(own_tokenring):
    stream = Background(own_tokenring.url, "chat", tokens=30, tokens_per_s=20).wait_streaming()
    own_tokenring.drain()

    def refused():
        try:
            return httpx.post(own_tokenring.url + PATHS["chat"], json=body_of("chat")).status_code == 503
        except httpx.TransportError:
            return True

    wait_until(refused, 1, "new requests are refused")
    assert is_end("chat", stream.result().events[-1])
    assert own_tokenring.wait(5) == EXIT_OK


def test_idle_connections_hold_nothing_up(own_tokenring):
    """A client that keeps its connection, one that never said a word: neither is waited for."""
    with httpx.Client() as client:
        client.post(own_tokenring.url + PATHS["chat"], json=body_of("chat", stream=False), params={"tokens": 2})
        silent = socket.create_connection(("127.0.0.1", own_tokenring.port))
        time.sleep(0.1)
        own_tokenring.drain()
        assert own_tokenring.wait(3) == EXIT_OK
        silent.close()


def test_at_rest_it_goes_at_once(own_tokenring):
    start_s = time.monotonic()
    own_tokenring.drain()
    assert own_tokenring.wait(3) == EXIT_OK
    assert time.monotonic() - start_s < 1.5


@pytest.mark.parametrize("dialect", list(PATHS))
def test_the_deadline_ends_streams_with_an_error(start_tokenring, uvicorn, tag, dialect):
    tokenring = start_tokenring([uvicorn.url], drain_deadline_ms=700)
    stream = Background(tokenring.url, dialect, tokens=1000, tokens_per_s=20, tag=tag).wait_streaming()
    tokenring.drain()
    drained_s = time.monotonic()
    answer = stream.result()
    assert 0.5 < answer.end_s - drained_s < 2.5
    assert is_error(dialect, answer.events[-1]), answer.events[-1]
    assert not any(is_end(dialect, event) for event in answer.events)
    assert not answer.unfinished
    tokenring.wait(3)
    wait_until(lambda: uvicorn.seen(tag)["ended"] == "disconnected", 2, "the backend stops")


def test_a_second_signal_ends_now(own_tokenring):
    stream = Background(own_tokenring.url, "chat", tokens=1000, tokens_per_s=20).wait_streaming()
    own_tokenring.drain()
    time.sleep(0.3)
    assert own_tokenring.alive()
    own_tokenring.drain()
    own_tokenring.wait(2)
    try:
        answer = stream.result(3)
        assert not any(is_end("chat", event) for event in answer.events)
    except httpx.TransportError:
        pass


def test_reserved_signals_are_ignored(own_tokenring):
    stream = Background(own_tokenring.url, "chat", tokens=30, tokens_per_s=30).wait_streaming()
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        own_tokenring.signal(number)
    assert is_end("chat", stream.result().events[-1])
    assert own_tokenring.alive()
    assert httpx.get(f"{own_tokenring.admin_url}/ready").status_code == 200


def test_sigquit_stops_at_once_with_a_dump(own_tokenring):
    Background(own_tokenring.url, "chat", tokens=1000, tokens_per_s=20).wait_streaming()
    before = len(own_tokenring.log())
    own_tokenring.signal(signal.SIGQUIT)
    own_tokenring.wait(2)
    assert len(own_tokenring.log()) > before, "no state dump"
