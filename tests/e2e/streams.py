"""Streams by their ids, from both sides: a backend that says what a test wants when it wants it, and those who leave an answer
and come back for the rest."""

import json
import select
import socket
import struct
import threading
import time

import sse

CONTENT = '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%s"}}]}'
DONE = "data: [DONE]\n\n"


class HeldBackend:
    """Listens; each request's answer is said by the test, word by word."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]

    def accept(self, seconds=10):
        self.listener.settimeout(seconds)
        connection, _ = self.listener.accept()
        return HeldAnswer(connection, seconds)

    def close(self):
        self.listener.close()


class HeldAnswer:
    """One answer of a `HeldBackend`; its head is sent at once."""

    def __init__(self, connection, seconds):
        self.connection, self.words = connection, 0
        connection.settimeout(seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += connection.recv(65536)
        head, _, body = asked.partition(b"\r\n\r\n")
        lines = [line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:]]
        length = int(next((value for name, value in lines if name == b"content-length"), 0))
        while len(body) < length:
            body += connection.recv(65536)
        self.request = json.loads(body) if body else None
        self.send(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    def send(self, text):
        self.connection.sendall(text.encode())

    def chunk(self, text):
        self.send(f"{len(text.encode()):x}\r\n{text}\r\n")

    def say(self, count=1, size=0):
        """So many words more: `w1 `, `w2 `, ..., each made longer to about `size` bytes."""
        for _ in range(count):
            self.chunk("data: " + CONTENT % self.word(size) + "\n\n")

    def word(self, size=0):
        self.words += 1
        return f"w{self.words}".ljust(size, "x") + " "

    def say_until_stuck(self, size=1000, quiet_s=0.5, bytes_max=64 << 20):
        """Goes on until nobody has taken anything for a while; gives the bytes that were taken."""
        self.connection.setblocking(False)
        taken, rest = 0, b""
        try:
            while taken < bytes_max:
                if not rest:
                    text = "data: " + CONTENT % self.word(size) + "\n\n"
                    rest = f"{len(text):x}\r\n{text}\r\n".encode()
                if not select.select([], [self.connection], [], quiet_s)[1]:
                    break
                sent = self.connection.send(rest)
                taken, rest = taken + sent, rest[sent:]
        finally:
            self.connection.settimeout(20)
            self.rest = rest
        return taken

    def done_later(self):
        """What `say_until_stuck` had begun, and the end, on a thread of their own."""

        def finish():
            self.connection.sendall(self.rest)
            self.done()

        threading.Thread(target=finish, daemon=True).start()

    def done(self):
        self.chunk(DONE)
        self.send("0\r\n\r\n")

    def cut(self):
        """Ends in the middle of the body."""
        self.connection.close()

    def is_gone(self):
        """Whether the other side has closed."""
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True


class Chunks:
    """Takes a chunked body apart, fed in any pieces."""

    def __init__(self):
        self.pending, self.ended = b"", False

    def feed(self, data):
        self.pending += data
        parts = []
        while not self.ended:
            size, mark, rest = self.pending.partition(b"\r\n")
            if not mark:
                break
            length = int(size, 16)
            if len(rest) < length + 2:
                break
            assert rest[length : length + 2] == b"\r\n", f"a chunk of {length} bytes ends with {rest[length : length + 2]!r}"
            self.pending, self.ended = rest[length + 2 :], length == 0
            parts.append(rest[:length])
        return b"".join(parts)


class Answer:
    """A streamed answer on a connection of its own, read when the test wants it."""

    def __init__(self, port, request, trust=None, receive_bytes=None, seconds=20):
        self.connection = socket.socket()
        if receive_bytes:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.connection.settimeout(seconds)
        self.connection.connect(("127.0.0.1", port))
        if trust:
            self.connection = trust.wrap_socket(self.connection, server_hostname="localhost")
        self.connection.sendall(request)
        self.head_bytes, self.status, self.headers, self.body = b"", None, {}, b""
        self.chunks, self.reader, self.ended = None, sse.Reader(), False

    def feed(self, piece):
        """Takes what was received; empty: the other side closed."""
        if not piece:
            self.ended = True
            return
        if self.status is None:
            self.head_bytes += piece
            head, mark, piece = self.head_bytes.partition(b"\r\n\r\n")
            if not mark:
                return
            first, *lines = head.decode().split("\r\n")
            self.status = int(first.split()[1])
            self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            self.chunks = Chunks() if self.headers.get("transfer-encoding") == "chunked" else None
        if self.chunks:
            piece = self.chunks.feed(piece)
            self.ended = self.chunks.ended
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            self.reader.feed(piece)
        else:
            self.body += piece
            self.ended |= len(self.body) >= int(self.headers.get("content-length", 1 << 60))
        self.ended |= self.status == 204

    def receive(self):
        try:
            self.feed(self.connection.recv(65536))
        except ConnectionResetError:
            self.feed(b"")

    def read_head(self):
        while self.status is None and not self.ended:
            self.receive()
        return self

    def read(self, count):
        """Until there are so many numbered events."""
        while len(self.events) < count:
            assert not self.ended, f"ended after {len(self.events)} of {count} events, {self.status} {self.body!r}"
            self.receive()
        return self

    def read_all(self):
        while not self.ended:
            self.receive()
        return self

    def leave(self, how="fin"):
        if how == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    @property
    def stream(self):
        return self.headers["tokenring-stream"]

    @property
    def events(self):
        return [event for event in self.reader.events if event.id is not None]

    @property
    def told(self):
        """What tokenring says of its own: errors, gaps."""
        return [event for event in self.reader.events if event.id is None]

    @property
    def code(self):
        """Of an error that is the whole answer."""
        return json.loads(self.body)["error"]["code"]

    def ids(self):
        return [int(event.id) for event in self.events]

    def words(self):
        """What a client shows."""
        return words(self.events)


def words(events):
    text = sse.text_of("chat", [event for event in events if event.id is not None])
    return [word.rstrip("x") for word in text.split()]


def assert_words(events, first, last):
    """Exactly the words from w`first` to w`last`, in their order."""
    found, wanted = words(events), [f"w{number}" for number in range(first, last + 1)]
    if found != wanted:
        at = next((at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), min(len(found), len(wanted)))
        raise AssertionError(f"{len(found)} words instead of {len(wanted)}; from the {at}th on {found[at : at + 5]}, not {wanted[at : at + 5]}")


def ask_chat(port, version="1.1", fields="", **more):
    """A chat to be streamed."""
    body = json.dumps(sse.body_of("chat"))
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: a\r\nContent-Type: application/json\r\n{fields}"
    return Answer(port, f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode(), **more)


def resume(*arguments, **more):
    """Comes back to a stream, having seen the event `after`, and waits for the head of the answer."""
    return come_back(*arguments, **more).read_head()


def come_back(port, stream, after=None, query="", version="1.1", method="GET", fields="", **more):
    """The same without waiting."""
    fields += "" if after is None else f"Last-Event-ID: {after}\r\n"
    request = f"{method} /v1/streams/{stream}{query} HTTP/{version}\r\nHost: a\r\n{fields}\r\n"
    return Answer(port, request.encode(), **more)


def status(port, stream):
    return json.loads(resume(port, stream, query="/status", fields="Connection: close\r\n").read_all().body)


class Crowd:
    """Many answers at once, all read by one thread."""

    def __init__(self):
        self.ready, self.open = select.epoll(), {}

    def add(self, answer):
        answer.connection.setblocking(False)
        self.ready.register(answer.connection, select.EPOLLIN)
        self.open[answer.connection.fileno()] = answer
        return answer

    def drop(self, answer):
        self.open.pop(answer.connection.fileno(), None)
        self.ready.unregister(answer.connection)
        answer.leave("rst")

    def pump(self, seconds):
        """What there is to be read now, or within that time."""
        for descriptor, _ in self.ready.poll(seconds, 4096):
            answer = self.open[descriptor]
            try:
                answer.receive()
            except BlockingIOError:
                continue
            if answer.ended:
                self.open.pop(descriptor)
                self.ready.unregister(descriptor)
                answer.connection.close()

    def read_all(self, seconds):
        """All of them to their ends."""
        due_s = time.monotonic() + seconds
        while self.open:
            assert time.monotonic() < due_s, f"{len(self.open)} answers have not ended after {seconds} s"
            self.pump(0.5)

    def close(self):
        for answer in self.open.values():
            answer.leave("rst")
        self.open = {}
        self.ready.close()
