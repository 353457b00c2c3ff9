"""A strict reader of server-sent events (WHATWG, section 9.2.6) that keeps what the SDKs hide: ids, comments, times."""

import dataclasses
import itertools
import json
import threading
import time

import httpx
from harness import wait_until


@dataclasses.dataclass
class Event:
    """One dispatched event. `id` is the one its own block carried, not one inherited from an event before."""

    data: str
    event: str = ""
    id: str | None = None
    at_s: float = 0.0

    def json(self):
        return json.loads(self.data)


class Reader:
    """Takes bytes as they arrive, split anywhere, and keeps the events and comments found so far."""

    def __init__(self):
        self.events, self.comments, self.retry_ms = [], [], None
        self.pending, self.block = b"", None

    def feed(self, data, at_s=None):
        at_s = time.monotonic() if at_s is None else at_s
        self.pending += data
        # A CR at the very end may be half of a CRLF.
        while (end := self.line_end()) is not None:
            line, self.pending = self.pending[: end[0]], self.pending[end[1] :]
            self.line(line.decode(), at_s)

    def line_end(self):
        found = [place for place in (self.pending.find(b"\r"), self.pending.find(b"\n")) if place >= 0]
        if not found:
            return None
        place = min(found)
        if self.pending[place : place + 1] == b"\r":
            if place + 1 == len(self.pending):
                return None
            if self.pending[place + 1 : place + 2] == b"\n":
                return place, place + 2
        return place, place + 1

    def line(self, line, at_s):
        if not line:
            if self.block and self.block["data"]:
                data = "\n".join(self.block["data"])
                self.events.append(Event(data, self.block["event"], self.block["id"], at_s))
            self.block = None
        elif line.startswith(":"):
            # Between events a comment is a heartbeat; inside one it would be a relay that does not know the boundary.
            assert self.block is None, f"a comment inside an event: {line!r} after {self.block}"
            self.comments.append((at_s, line[1:].strip()))
        else:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "retry":
                # Takes effect at once, and is part of no event.
                self.retry_ms = int(value)
                return
            self.block = self.block or {"data": [], "event": "", "id": None}
            if name == "data":
                self.block["data"].append(value)
            elif name in ("event", "id"):
                self.block[name] = value

    def unfinished(self):
        """What was received of an event that never ended; \\r is the second half of a finished line end."""
        return self.block is not None or self.pending not in (b"", b"\r")


@dataclasses.dataclass
class Stream:
    """A whole streamed answer; `cut` tells that the body ended against HTTP's rules."""

    status: int
    headers: httpx.Headers
    events: list
    comments: list
    sent_s: float
    head_s: float
    end_s: float
    cut: bool
    unfinished: bool

    def data(self):
        """The payload as the backend made it: event names and data, without ids and comments."""
        return [(event.event, event.data) for event in self.events]

    def ids(self):
        return [event.id for event in self.events]


PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
PROMPT = "Tell me about rings, é日🚀, and data: [DONE]."


def body_of(dialect, prompt=PROMPT, stream=True, **more):
    """A request body in that dialect."""
    said = [{"role": "user", "content": prompt}]
    asks = {
        "chat": {"messages": said},
        "completions": {"prompt": prompt},
        "responses": {"input": prompt},
        "messages": {"messages": said, "max_tokens": 4096},
    }
    return {"model": "fake-model", "stream": stream, **asks[dialect], **more}


def stream(url, dialect, body=None, client=None, params=None, headers=None, on_event=None, timeout=30):
    """POST a streaming request and read it to its end. `on_event(reader)` is called after each piece received."""
    body = body_of(dialect) if body is None else body
    own = client or httpx.Client(timeout=timeout)
    reader, cut, sent_s = Reader(), False, time.monotonic()
    try:
        with own.stream("POST", url + PATHS[dialect], json=body, params=params, headers=headers) as answer:
            head_s = time.monotonic()
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                answer.read()
                raise AssertionError(f"no event stream: {answer.status_code} {answer.headers} {answer.text[:500]}")
            try:
                for piece in answer.iter_raw():
                    reader.feed(piece)
                    if on_event:
                        on_event(reader)
            except httpx.RemoteProtocolError:
                cut = True
            return Stream(
                answer.status_code,
                answer.headers,
                reader.events,
                reader.comments,
                sent_s,
                head_s,
                time.monotonic(),
                cut,
                reader.unfinished(),
            )
    finally:
        if client is None:
            own.close()


class Background:
    """One streaming request on a thread of its own."""

    def __init__(self, url, dialect, **params):
        self.answer, self.failure, self.received = None, None, 0
        self.thread = threading.Thread(target=self.run, args=(url, dialect, params), daemon=True)
        self.thread.start()

    def run(self, url, dialect, params):
        def on_event(reader):
            self.received = len(reader.events)

        try:
            self.answer = stream(url, dialect, params=params, on_event=on_event)
        except Exception as failure:  # noqa: BLE001 (told by `result`)
            self.failure = failure

    def wait_streaming(self):
        wait_until(lambda: self.received > 2 or self.failure, 5, "the stream flows")
        return self

    def result(self, seconds=15):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the stream hangs after {self.received} events"
        if self.failure:
            raise self.failure
        return self.answer


def text_of(dialect, events):
    """The words that a client of that dialect shows."""
    text = ""
    for event in events:
        if event.data == "[DONE]":
            continue
        value = event.json()
        if dialect == "chat" and value.get("choices"):
            text += value["choices"][0]["delta"].get("content") or ""
        elif dialect == "completions" and "choices" in value:
            text += "".join(choice["text"] for choice in value["choices"])
        elif dialect == "completions" and "content" in value:
            text += value["content"]
        elif dialect == "responses" and value.get("type") == "response.output_text.delta":
            text += value["delta"]
        elif dialect == "messages" and value.get("type") == "content_block_delta":
            text += value["delta"].get("text", "")
    return text


def is_end(dialect, event):
    """Whether the event is the one that ends an answer well."""
    if dialect in ("chat", "completions"):
        return event.data == "[DONE]"
    ends = {
        "responses": ("response.completed", "response.failed", "response.incomplete"),
        "messages": ("message_stop",),
    }
    return event.json().get("type") in ends[dialect]


def is_error(dialect, event):
    """Whether the event says, in that dialect, that the answer failed."""
    if event.data == "[DONE]":
        return False
    value = event.json()
    if dialect in ("responses", "messages"):
        return value.get("type") in ("error", "response.failed")
    return isinstance(value.get("error"), dict) and isinstance(value["error"].get("message"), str)


def assert_dense(ids):
    assert ids == [str(number) for number in range(1, len(ids) + 1)], f"ids are not dense from 1: {ids}"


def assert_arrives_over_time(times, seconds):
    """The events of an answer that takes `seconds` came one after another and not in a heap at the end."""
    assert len(times) >= 5, times
    span = times[-1] - times[0]
    assert span > 0.7 * seconds, f"{len(times)} events within {span:.3f} s, made over {seconds:.3f} s"
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) < 0.5 * seconds, f"a gap of {max(gaps):.3f} s in a stream of {seconds:.3f} s"
    assert len({round(at_s, 2) for at_s in times}) >= 0.4 * len(times), f"events came in heaps: {times}"
