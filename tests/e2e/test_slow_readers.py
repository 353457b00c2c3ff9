"""Readers of one stream that do not keep up: what becomes of them is said, and the others lose nothing."""

import threading
import time

import pytest
from harness import wait_until
from streams import Crowd, ask_chat, assert_words, resume, status, words
from test_resume import SOON_S, begin, metric, tls  # noqa: F401 (fixtures)

pytestmark = pytest.mark.relay


def say_later(said, count, size):
    """On a thread of its own, for the test is to read meanwhile."""

    def say():
        said.say(count, size)
        said.done()

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    return thread


def read_with_gaps(reader, last):
    """What a reader that was left behind has: whole words, in their order; and what it was told, with where it was then."""
    found, told, before = [], [], 0
    for event in reader.reader.events:
        if event.id is None:
            told.append((event, before))
            continue
        number = int(event.id)
        if event.data != "[DONE]":
            assert words([event]) == [f"w{number}"], f"event {number} is not whole: {event.data[:200]}"
        if number != before + 1:
            skipped = told and told[-1][0].event == "tokenring.gap" and told[-1][0].json()["last_event_id"] == number - 1
            assert skipped, f"{number} follows {before}, and nothing says why"
        before = number
        found.append(number)
    assert not reader.reader.unfinished() and found[-1] <= last
    return found, told


@pytest.mark.parametrize("size", [1000, 150_000])
@pytest.mark.parametrize("over", ["tcp", "tls"])
@pytest.mark.parametrize("policy", ["drop", "skip"])
def test_left_behind_between_two_events(start, backend, tls, policy, over, size):  # noqa: F811
    port, flags, trust = tls
    tokenring = start("--slow-reader", policy, *flags, "--event-bytes-max", "1MiB")
    client, said = begin(tokenring, backend, 1)
    line = {"trust": trust} if over == "tls" else {}
    stuck = resume(port if line else tokenring.port, client.stream, 0, receive_bytes=4096, **line)
    # At a pace that the other one keeps; the stuck one does for a while.
    count, step = 3_000_000 // size, max(1, 50_000 // size)
    for _ in range(count // step):
        said.say(step, size)
        client.read(said.words)
        if said.words * size < 400_000:
            stuck.read(said.words)
    said.done()
    assert_words(client.read_all().events, 1, count + 1)
    found, told = read_with_gaps(stuck.read_all(), count + 2)
    if policy == "drop":
        [(error, at)] = told
        assert error.json()["error"]["code"] == "lagged" and at == found[-1] < count
        assert metric(tokenring, "tokenring_readers_dropped_total") == 1
        # It may go on from there, or is told that it cannot.
        again = resume(tokenring.port, client.stream, at).read_all()
        assert (again.status, again.code) == (410, "before_window")
        back = resume(tokenring.port, client.stream, again.headers["tokenring-earliest-event-id"]).read_all()
        assert back.ids()[-1] == count + 2
    else:
        assert told and {event.event for event, _ in told} == {"tokenring.gap"}
        assert found[-1] == count + 2 and stuck.events[-1].data == "[DONE]"
        assert metric(tokenring, "tokenring_readers_skipped_total") == len(told)


def test_blocks_the_backend(start, backend):  # noqa: F811
    """For whoever asks for it: all readers get everything, at the pace of the slowest."""
    tokenring = start("--slow-reader", "block")
    client, said = begin(tokenring, backend, 1)
    stuck = resume(tokenring.port, client.stream, 0, receive_bytes=4096)
    sender = say_later(said, 4000, 1000)
    crowd, end_s = Crowd(), time.monotonic() + 1.5
    crowd.add(client)
    while time.monotonic() < end_s:
        crowd.pump(0.1)
    assert 1 < len(client.events) < 3500 and sender.is_alive(), "the backend waits for the one that is stuck"
    found = status(tokenring.port, client.stream)
    assert max(found["pending_bytes"]) > 32 << 10 and found["readers"] == 2
    crowd.add(stuck)
    crowd.read_all(30)
    for reader in (client, stuck):
        assert_words(reader.events, 1, 4001)
        assert reader.ids() == list(range(1, 4003))


def test_a_single_reader_holds_the_backend_and_one_of_several_does_not(start, backend):  # noqa: F811
    """The default. What the backend has said and nobody has taken stays bounded."""
    tokenring = start()
    client, said = begin(tokenring, backend, 1)
    client.leave()
    stuck = resume(tokenring.port, client.stream, 1, receive_bytes=4096)
    taken = said.say_until_stuck()
    found = status(tokenring.port, client.stream)
    assert max(found["pending_bytes"]) < 1 << 20 and taken < 32 << 20
    said.done_later()
    last = said.words
    assert_words(stuck.read_all().events, 2, last)


def test_a_stuck_reader_among_many_costs_them_nothing(start, backend):  # noqa: F811
    """Nor more memory than the window and what the kernel has."""
    tokenring = start("--slow-reader", "drop", "--write-stall-ms", 0)
    client, said = begin(tokenring, backend, 1)
    crowd = Crowd()
    readers = [crowd.add(resume(tokenring.port, client.stream, 0)) for _ in range(100)]
    crowd.add(client)
    crowd.pump(0.5)
    before = tokenring.resident_bytes()
    stuck = [resume(tokenring.port, client.stream, 0, receive_bytes=4096) for _ in range(5)]
    count, most = 2000, 0
    for _ in range(count // 20):
        said.say(20, 1500)
        while min(len(reader.events) for reader in [client, *readers]) < said.words:
            crowd.pump(1)
        most = max(most, tokenring.resident_bytes() - before)
    said.done()
    crowd.read_all(20)
    for reader in [client, *readers]:
        assert_words(reader.events, 1, count + 1)
        assert reader.ids() == list(range(1, count + 3)) and not reader.told
    assert most < 24 << 20, f"{most} bytes"
    for reader in stuck:
        found, told = read_with_gaps(reader.read_all(), count + 2)
        assert [event.json()["error"]["code"] for event, _ in told] == ["lagged"]
    wait_until(lambda: metric(tokenring, "tokenring_readers_dropped_total") == 5, SOON_S, "five were left behind")


def test_one_who_takes_nothing_at_all_is_let_go(start, backend):  # noqa: F811
    """The stream goes on without it."""
    tokenring = start("--write-stall-ms", 800, "--slow-reader", "block")
    client = ask_chat(tokenring.port, receive_bytes=4096)
    said = backend.accept()
    client.read_head()
    said.say_until_stuck(quiet_s=0.3)
    wait_until(lambda: metric(tokenring, "tokenring_detached_streams") == 1, 10, "its connection is closed")
    back = resume(tokenring.port, client.stream, 0)
    said.done_later()
    last = said.words
    assert_words(back.read_all().events, 1, last)
