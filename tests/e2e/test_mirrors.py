"""Streams that are read on every shard: who reads a mirror sees what it would see at the stream's home."""

import random
import signal
import time

import pytest
from harness import wait_until
from streams import Crowd, assert_words, come_back, resume, status
from test_resume import SOON_S, begin, metric, tls  # noqa: F401 (fixtures)
from test_slow_readers import read_with_gaps, say_later

pytestmark = pytest.mark.relay


def mirrored(start, backend, *flags, words=1):  # noqa: F811
    """A stream that both shards have, with its client and those who were needed for that. Who comes next is spread over both."""
    tokenring = start("--mirror-readers", 2, *flags, shards=2)
    client, said = begin(tokenring, backend, words)
    crowd = Crowd()
    crowd.add(client)
    readers = [client]
    due_s = time.monotonic() + 10
    while metric(tokenring, "tokenring_mirrors") == 0 or metric(tokenring, "tokenring_mirror_reads_total") < 3:
        assert time.monotonic() < due_s and len(readers) < 200, "no mirror is opened"
        readers.append(crowd.add(come_back(tokenring.port, client.stream, 0)))
        crowd.pump(0.05)
    return tokenring, client.stream, said, crowd, readers


def caught_up(crowd, readers, events, seconds=20):
    due_s = time.monotonic() + seconds
    while min(len(reader.events) for reader in readers) < events:
        assert time.monotonic() < due_s, f"the slowest has {min(len(reader.events) for reader in readers)} of {events}"
        crowd.pump(0.2)


def test_hundreds_come_and_go(start, backend):  # noqa: F811
    """From whatever event each wants, some kicked off again and again: each event once, in order, on either shard."""
    tokenring = start("--mirror-readers", 16, "--resumes-per-s", 100_000, "--conns-max", 1200, shards=2)
    client, said = begin(tokenring, backend, 20)
    chance, crowd = random.Random(3), Crowd()
    crowd.add(client)
    stream, count = client.stream, 220

    class Reader:
        def __init__(self, after):
            self.had, self.times, self.ended = after, 0, False
            self.come()

        def come(self):
            self.answer, self.seen = crowd.add(come_back(tokenring.port, stream, self.had)), 0

        def follow(self):
            assert self.answer.status in (None, 200), self.answer.body
            for event in self.answer.events[self.seen :]:
                self.had += 1
                assert event.id == str(self.had), f"{event} instead of {self.had}, connection {self.times}"
                self.ended |= event.data == "[DONE]"
            self.seen = len(self.answer.events)

        def kick(self):
            crowd.drop(self.answer)
            self.times += 1
            self.come()

    readers = [Reader(chance.randrange(20)) for _ in range(100)]
    while said.words < count:
        said.say(2)
        crowd.pump(0.01)
        readers += [Reader(chance.randrange(len(client.events))) for _ in range(4)]
        for reader in chance.sample(readers, 20):
            reader.follow()
            if not reader.ended and reader.answer.status:
                reader.kick()
    assert len(readers) == 500
    caught_up(crowd, [client], count)

    def counted():
        crowd.pump(0)
        return status(tokenring.port, stream)["readers"] == 501

    wait_until(counted, 10, "readers of both shards are counted")
    assert metric(tokenring, "tokenring_mirrors") == 1
    said.done()
    due_s = time.monotonic() + 30
    while not all(reader.ended for reader in readers):
        assert time.monotonic() < due_s, f"{sum(not reader.ended for reader in readers)} have not come to the end"
        crowd.pump(0.2)
        for reader in readers:
            reader.follow()
    crowd.read_all(20)
    assert_words(client.events, 1, count)
    assert metric(tokenring, "tokenring_mirror_reads_total") > 200, "about half of them were not moved"
    assert metric(tokenring, "tokenring_mirror_bytes_total") > 0 and metric(tokenring, "tokenring_mirrors_skipped_total") == 0
    wait_until(lambda: metric(tokenring, "tokenring_mirrors") == 0, SOON_S, "the mirror is gone with its stream")
    assert metric(tokenring, "tokenring_mirrors_opened_total") == metric(tokenring, "tokenring_mirrors_closed_total") >= 1


@pytest.mark.parametrize("how", ["stopped", "cut", "drained"])
def test_the_end_comes_to_all(start, backend, how):  # noqa: F811
    """And is the same everywhere."""
    flags = ["--drain-deadline-ms", 600] if how == "drained" else []
    tokenring, stream, said, crowd, readers = mirrored(start, backend, *flags)
    readers += [crowd.add(come_back(tokenring.port, stream, 0)) for _ in range(20)]
    said.say(5)
    caught_up(crowd, readers, 6)
    if how == "stopped":
        assert resume(tokenring.port, stream, method="DELETE").status == 204
    elif how == "cut":
        said.cut()
    else:
        tokenring.signal(signal.SIGTERM)
    crowd.read_all(10)
    codes = {reader.told[-1].json()["error"]["code"] for reader in readers if reader.told}
    assert all(reader.told for reader in readers) and len(codes) == 1, codes
    assert how != "stopped" or codes == {"stream_stopped"}
    for reader in readers:
        assert_words(reader.events, 1, 6)
        assert not reader.reader.unfinished()
    if how == "stopped":
        wait_until(lambda: resume(tokenring.port, stream, 0).status == 410, SOON_S, "nobody can read it any more")


def test_the_last_reader_may_be_one_of_a_mirror(start, backend):  # noqa: F811
    """Those who read at home leave, and the stream goes on; when all have left, its backend is let go."""
    tokenring, stream, said, crowd, readers = mirrored(start, backend, "--on-leave", "cancel")
    readers += [crowd.add(come_back(tokenring.port, stream, 0)) for _ in range(20)]
    caught_up(crowd, readers, 1)
    reads = metric(tokenring, "tokenring_mirror_reads_total")
    # One after the other leaves; whoever is left gets what is said, at home or elsewhere.
    while len(readers) > 1:
        crowd.drop(readers.pop(0))
        said.say()
        caught_up(crowd, readers, said.words)
    assert not said.is_gone() and metric(tokenring, "tokenring_mirror_reads_total") == reads
    crowd.drop(readers.pop())
    wait_until(said.is_gone, SOON_S, "the backend is let go")
    wait_until(lambda: metric(tokenring, "tokenring_mirrors") == 0, SOON_S, "and the mirror is gone")


def test_a_mirror_goes_with_its_readers_and_comes_again(start, backend):  # noqa: F811
    """What was said meanwhile is in the next one."""
    tokenring, stream, said, crowd, readers = mirrored(start, backend)
    for round in range(3):
        crowd.close()
        wait_until(lambda: metric(tokenring, "tokenring_mirrors") == 0, SOON_S, "the mirror is gone")
        said.say(3)
        crowd, opened = Crowd(), metric(tokenring, "tokenring_mirrors_opened_total")
        readers = []
        while metric(tokenring, "tokenring_mirror_reads_total") < 3 * (round + 2) or len(readers) < 20:
            assert len(readers) < 200
            readers.append(crowd.add(come_back(tokenring.port, stream, len(readers) % said.words)))
            crowd.pump(0.02)
        assert metric(tokenring, "tokenring_mirrors_opened_total") == opened + 1
    said.done()
    crowd.read_all(10)
    for reader in readers:
        assert reader.ids()[-1] == said.words + 1 and reader.ids() == list(range(reader.ids()[0], said.words + 2))


@pytest.mark.parametrize("policy", ["drop", "skip"])
def test_left_behind_at_a_mirror(start, backend, policy):  # noqa: F811
    """A gap is told between two events, and the others lose nothing."""
    tokenring, stream, said, crowd, readers = mirrored(start, backend, "--slow-reader", policy, "--write-stall-ms", 0)
    readers += [crowd.add(come_back(tokenring.port, stream, 0)) for _ in range(20)]
    # As many on either shard, about; that some are is certain.
    before = metric(tokenring, "tokenring_mirror_reads_total")
    stuck = [resume(tokenring.port, stream, 0, receive_bytes=4096) for _ in range(16)]
    assert before < metric(tokenring, "tokenring_mirror_reads_total") < before + 16
    count = 3000
    while said.words < count:
        said.say(50, 1000)
        caught_up(crowd, readers, said.words)
    said.done()
    crowd.read_all(20)
    for reader in readers:
        assert_words(reader.events, 1, said.words)
        assert reader.ids() == list(range(1, said.words + 2)) and not reader.told
    for reader in stuck:
        found, told = read_with_gaps(reader.read_all(), said.words + 1)
        if policy == "drop":
            [(error, at)] = told
            assert error.json()["error"]["code"] == "lagged" and at == found[-1] < count
        else:
            assert told and found[-1] == said.words + 1
    name = "tokenring_readers_dropped_total" if policy == "drop" else "tokenring_readers_skipped_total"
    assert metric(tokenring, name) >= 16


def test_a_stream_waits_for_the_readers_of_its_mirrors(start, backend):  # noqa: F811
    tokenring, stream, said, crowd, readers = mirrored(start, backend, "--slow-reader", "block", "--write-stall-ms", 0)
    caught_up(crowd, readers, 1)
    # One that is stuck on the mirror.
    stuck = None
    while not stuck:
        before = metric(tokenring, "tokenring_mirror_reads_total")
        one = resume(tokenring.port, stream, 0, receive_bytes=4096)
        if metric(tokenring, "tokenring_mirror_reads_total") > before:
            stuck = one
        else:
            one.leave("rst")
    sender = say_later(said, 6000, 1000)
    end_s = time.monotonic() + 2
    while time.monotonic() < end_s:
        crowd.pump(0.1)
    assert 1 < len(readers[0].events) < 5500 and sender.is_alive(), "the backend waits for the one that is stuck"
    assert max(status(tokenring.port, stream)["pending_bytes"]) > 32 << 10
    crowd.add(stuck)
    crowd.read_all(40)
    for reader in [*readers, stuck]:
        assert_words(reader.events, 1, 6001)
        assert reader.ids() == list(range(1, 6003)) and not reader.told


def test_from_before_what_a_mirror_has(start, backend):  # noqa: F811
    """The home says what there is."""
    tokenring, stream, said, crowd, readers = mirrored(start, backend, "--resume-window", "16KiB", "--slow-reader", "drop")
    while said.words < 400:
        said.say(20, 500)
        caught_up(crowd, readers, said.words)
    for _ in range(12):
        gone = resume(tokenring.port, stream, 3).read_all()
        assert (gone.status, gone.code) == (410, "before_window")
        ahead = resume(tokenring.port, stream, said.words + 5).read_all()
        assert (ahead.status, ahead.code) == (400, "cursor_ahead")
        back = resume(tokenring.port, stream, gone.headers["tokenring-earliest-event-id"])
        assert back.status == 200
        readers.append(crowd.add(back))
    said.done()
    crowd.read_all(10)
    for reader in readers:
        assert reader.ids() == list(range(reader.ids()[0], said.words + 2))


def test_streams_on_disk_are_read_on_every_shard(start, backend, tmp_path):  # noqa: F811
    """With an event delivered when it is synced, as by default."""
    tokenring, stream, said, crowd, readers = mirrored(start, backend, "--durable", "on", "--data-dir", tmp_path / "data")
    readers += [crowd.add(come_back(tokenring.port, stream, 0)) for _ in range(20)]
    for _ in range(50):
        said.say(2, 300)
        caught_up(crowd, readers, said.words)
    said.done()
    crowd.read_all(10)
    for reader in readers:
        assert_words(reader.events, 1, said.words)
        assert reader.ids() == list(range(1, said.words + 2))
    assert metric(tokenring, "tokenring_stored_streams") == 1 and metric(tokenring, "tokenring_unstored_streams") == 0


def test_over_tls(start, backend, tls):  # noqa: F811
    port, flags, trust = tls
    tokenring, stream, said, crowd, readers = mirrored(start, backend, *flags)
    before = metric(tokenring, "tokenring_mirror_reads_total")
    secure = [resume(port, stream, 0, trust=trust) for _ in range(12)]
    assert before < metric(tokenring, "tokenring_mirror_reads_total") < before + 12
    sender = say_later(said, 300, 200)
    for reader in secure:
        assert_words(reader.read_all().events, 1, 301)
    crowd.read_all(10)
    sender.join()
    for reader in readers:
        assert_words(reader.events, 1, 301)


def test_never_if_so_set(start, backend):  # noqa: F811
    tokenring = start("--mirror-readers", 0, shards=2)
    client, said = begin(tokenring, backend, 3)
    readers = [resume(tokenring.port, client.stream, 0) for _ in range(100)]
    said.done()
    for reader in readers:
        assert_words(reader.read_all().events, 1, 3)
    assert metric(tokenring, "tokenring_mirrors_opened_total") == 0 < metric(tokenring, "tokenring_moves_total")
