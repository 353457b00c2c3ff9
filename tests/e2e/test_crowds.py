"""Many who read streams by their ids at once: kicked off again and again, on one stream, all back within a second.

TOKENRING_E2E_SUBSCRIBERS says how many read one stream (2000). Each takes two of the descriptors that a process may have here, and
one of tokenring's: of 20000, 9900 readers.
"""

import os
import random
import threading
import time

import pytest
from streams import Crowd, ask_chat, assert_words, come_back, resume, status
from test_resume import begin, metric

pytestmark = pytest.mark.relay

SUBSCRIBERS = int(os.environ.get("TOKENRING_E2E_SUBSCRIBERS", "2000"))


class Kicked:
    """A client that loses its connection all the time and comes back each time."""

    def __init__(self, port, crowd, stream=None):
        self.port, self.crowd, self.stream, self.had, self.ended, self.times = port, crowd, stream, 0, False, 0
        self.answer = crowd.add(come_back(port, stream, 0) if stream else ask_chat(port))
        self.seen, self.words = 0, []

    def follow(self):
        """Takes what has come, which goes on exactly behind what was there before."""
        assert self.answer.status in (None, 200), self.answer.body
        if self.answer.status and not self.stream:
            self.stream = self.answer.stream
        events = self.answer.reader.events
        for event in events[self.seen :]:
            assert event.id == str(self.had + 1), f"{event} behind {self.had}, connection {self.times}"
            self.had += 1
            self.ended |= event.data == "[DONE]"
            self.words.append(event.data)
        self.seen = len(events)

    def kick(self):
        self.crowd.drop(self.answer)
        self.times += 1
        self.answer, self.seen = self.crowd.add(come_back(self.port, self.stream, self.had)), 0


def test_a_recovery_storm(start_tokenring):
    """Three hundred clients, on streams of their own and shared ones, a hundred kicks a second: no gap, no repeat."""
    tokens = 150
    tokenring = start_tokenring(shards=2, demo_tokens=tokens, demo_tokens_per_s=20, demo_first_token_ms=100)
    chance, crowd = random.Random(11), Crowd()
    own = [Kicked(tokenring.port, crowd) for _ in range(200)]
    while not all(client.stream for client in own):
        crowd.pump(0.1)
        for client in own:
            client.follow()
    clients = own + [Kicked(tokenring.port, crowd, chance.choice(own).stream) for _ in range(100)]
    end_s = time.monotonic() + 45
    while not all(client.ended for client in clients):
        assert time.monotonic() < end_s, f"{sum(not client.ended for client in clients)} have not come to an end"
        crowd.pump(0.02)
        for client in clients:
            client.follow()
        for client in chance.sample(clients, 3):
            if not client.ended and client.answer.connection.fileno() in crowd.open:
                client.kick()
    by_stream = {client.stream: client.words for client in own}
    assert len(by_stream) == 200 and all(len(words) > tokens for words in by_stream.values())
    for client in clients:
        assert client.words == by_stream[client.stream]
    kicks = sum(client.times for client in clients)
    assert kicks > 300 and metric(tokenring, "tokenring_resumes_total") >= kicks - 100
    crowd.close()


def test_many_subscribers_on_one_stream(start, backend):  # noqa: F811
    """From one copy of its bytes."""
    tokenring = start("--conns-max", SUBSCRIBERS + 50, "--resumes-per-s", 100_000)
    client, said = begin(tokenring, backend, 5)
    before = tokenring.resident_bytes()
    crowd, readers = Crowd(), []
    for number in range(SUBSCRIBERS):
        readers.append((number % 6, crowd.add(come_back(tokenring.port, client.stream, number % 6))))
        if number % 50 == 0:
            crowd.pump(0)
    crowd.add(client)
    count = 25
    for _ in range(count):
        said.say()
        crowd.pump(0.1)
    while min(len(reader.events) for _, reader in readers) < count:
        crowd.pump(0.5)
    found = status(tokenring.port, client.stream)
    assert found["readers"] == SUBSCRIBERS + 1 and found["pending_bytes"][0] == 0
    each = (tokenring.resident_bytes() - before) / SUBSCRIBERS
    assert each < 16 << 10, f"{each} bytes for each reader"
    assert metric(tokenring, "tokenring_kept_bytes") < 256 << 10, "what they read is there once"
    said.done()
    crowd.read_all(60)
    for after, reader in readers:
        assert reader.status == 200 and reader.ids() == list(range(after + 1, count + 7))
        assert_words(reader.events, after + 1, count + 5)


def test_a_reconnect_storm(start, backend):  # noqa: F811
    """All are served, in the order of their coming and not at once; a stream beside them goes on."""
    per_s, many = 400, 2500
    tokenring = start("--resumes-per-s", per_s, "--heartbeat-ms", 500, "--conns-max", many + 50)
    client, said = begin(tokenring, backend, 20)
    beside, spoken = begin(tokenring, backend, 0)
    stop = threading.Event()

    def speak():
        while not stop.wait(0.05):
            spoken.say()
        spoken.done()

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    crowd, began_s = Crowd(), time.monotonic()
    crowd.add(beside)
    readers = [crowd.add(come_back(tokenring.port, client.stream, 10)) for _ in range(many)]
    due_s = began_s + 45
    while min(len(reader.events) for reader in readers) < 10:
        assert time.monotonic() < due_s
        crowd.pump(0.2)
    took_s = time.monotonic() - began_s
    # A tenth of a second's worth may begin at once.
    assert took_s > 0.8 * (many - 0.1 * per_s) / per_s, f"{many} had begun after {took_s} s"
    delayed = metric(tokenring, "tokenring_resumes_delayed_total")
    assert many * 0.8 < delayed <= many
    assert sum(len(reader.reader.comments) > 0 for reader in readers) >= delayed
    assert sum(len(reader.reader.comments) > 1 for reader in readers) > many // 4, "those who wait long hear more"
    assert metric(tokenring, "tokenring_stream_readers_waiting") == 0
    stop.set()
    speaker.join()
    said.done()
    crowd.read_all(30)
    for reader in readers:
        assert reader.ids() == list(range(11, 22)) and not reader.told
        assert reader.reader.retry_ms >= 500
    assert len({reader.reader.retry_ms for reader in readers}) > 100, "they are not told to come back all at once"
    assert_words(beside.events, 1, spoken.words)
    times = [event.at_s for event in beside.events]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(gaps) < 3, f"{max(gaps)} s without a word on a stream that was running"


def test_those_who_wait_may_leave_again(start, backend):  # noqa: F811
    tokenring = start("--resumes-per-s", 20, "--heartbeat-ms", 200)
    client, said = begin(tokenring, backend, 3)
    waiting = [come_back(tokenring.port, client.stream, 1) for _ in range(200)]
    for number, reader in enumerate(waiting):
        if number % 4:
            reader.leave("rst" if number % 2 else "fin")
    last = resume(tokenring.port, client.stream, 2).read(1)
    assert last.ids() == [3]
    said.done()
    for reader in waiting[::4]:
        assert reader.read_head().read_all().ids() == [2, 3, 4]
