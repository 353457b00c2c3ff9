"""A backend that answers with scripted bytes and closes, and scripts for it.

Each script is (name, bytes, readable): True where a client must get the answer, False where it must get a 502, None where
the answer breaks off and must not look whole, "either" where strictness is a matter of taste.
"""

import socket
import threading


class ScriptedBackend:
    """Answers every request with `script`, then closes."""

    def __init__(self):
        self.script = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer:
                asked = b""
                try:
                    while b"\r\n\r\n" not in asked and (part := peer.recv(65536)):
                        asked += part
                    if asked:
                        peer.sendall(self.script)
                        peer.shutdown(socket.SHUT_WR)
                        while peer.recv(65536):
                            pass
                except OSError:
                    # Refused in the middle, by a reset.
                    pass

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

RESPONSES = [
    ("length", OK + b"Content-Length: 5\r\n\r\nhello", True),
    ("length-zero", OK + b"Content-Length: 0\r\n\r\n", True),
    ("length-more", OK + b"Content-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
    ("length-short", OK + b"Content-Length: 9\r\n\r\nhello", None),
    ("length-twice", OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "either"),
    ("length-two", OK + b"Content-Length: 5\r\nContent-Length: 3\r\n\r\nhello", False),
    ("length-list", OK + b"Content-Length: 5, 5\r\n\r\nhello", "either"),
    ("length-plus", OK + b"Content-Length: +5\r\n\r\nhello", False),
    ("length-hex", OK + b"Content-Length: 0x5\r\n\r\nhello", False),
    ("length-negative", OK + b"Content-Length: -5\r\n\r\nhello", False),
    ("length-empty", OK + b"Content-Length:\r\n\r\nhello", False),
    ("length-huge", OK + b"Content-Length: 99999999999999999999\r\n\r\nhello", False),
    ("length-space", OK + b"Content-Length : 5\r\n\r\nhello", False),
    ("close", OK + b"\r\nhello", True),
    ("close-1.0", b"HTTP/1.0 200 OK\r\n\r\nhello", True),
    ("close-empty", OK + b"Connection: close\r\n\r\n", True),
    ("chunked", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", True),
    ("chunked-extension", CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n", True),
    ("chunked-trailer", CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 3\r\n\r\n", True),
    ("chunked-more", CHUNKED + b"5\r\nhello\r\n0\r\n\r\nHTTP/1.1 404 No\r\n\r\n", True),
    ("chunked-upper", OK + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n", True),
    ("chunked-no-last", CHUNKED + b"5\r\nhello\r\n", None),
    ("chunked-half-last", CHUNKED + b"5\r\nhello\r\n0\r\n", None),
    ("chunked-half-chunk", CHUNKED + b"5\r\nhel", None),
    ("chunked-lf", CHUNKED + b"5\nhello\n0\n\n", None),
    ("chunked-bad-size", CHUNKED + b"5\r\nhello\r\nx\r\n\r\n", None),
    ("chunked-overflow", CHUNKED + b"5\r\nhello\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", None),
    ("chunked-prefix", CHUNKED + b"5\r\nhello\r\n0x0\r\n\r\n", None),
    ("chunked-too-long", CHUNKED + b"6\r\nhello\r\n0\r\n\r\n", None),
    ("chunked-1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "either"),
    (
        "chunked-and-length",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "either",
    ),
    ("gzip-chunked", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False),
    ("identity", OK + b"Transfer-Encoding: identity\r\n\r\nhello", "either"),
    ("chunked-twice", OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False),
    ("no-content", b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ("no-content-length", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", True),
    ("not-modified", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", True),
    (
        "interim",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        + OK
        + b"Content-Length: 2\r\n\r\nhi",
        True,
    ),
    ("interim-many", b"HTTP/1.1 102 Processing\r\n\r\n" * 50 + OK + b"Content-Length: 2\r\n\r\nhi", "either"),
    ("interim-only", b"HTTP/1.1 100 Continue\r\n\r\n", False),
    ("status-only", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", True),
    ("status-space", b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi", True),
    ("status-high", b"HTTP/1.1 200 \xc3\xa9t\xe9\r\nContent-Length: 2\r\n\r\nhi", True),
    ("status-999", b"HTTP/1.1 599 X\r\nContent-Length: 2\r\n\r\nhi", True),
    ("status-two-digits", b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nhi", False),
    ("status-four-digits", b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nhi", False),
    ("status-letters", b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nhi", False),
    ("version-2", b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\nhi", False),
    ("version-icy", b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nhi", False),
    ("no-head", b"hello", False),
    ("nothing", b"", False),
    ("lf", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", "either"),
    ("cr", b"HTTP/1.1 200 OK\rContent-Length: 2\r\rhi", False),
    ("half-head", OK + b"Content-Le", False),
    ("fold", OK + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\nhi", "either"),
    ("nul", OK + b"X: a\x00b\r\nContent-Length: 2\r\n\r\nhi", False),
    ("no-colon", OK + b"X\r\nContent-Length: 2\r\n\r\nhi", False),
    ("no-name", OK + b": x\r\nContent-Length: 2\r\n\r\nhi", False),
    ("leading-space", OK + b" X: y\r\nContent-Length: 2\r\n\r\nhi", False),
    ("empty-line", b"\r\n" + OK + b"Content-Length: 2\r\n\r\nhi", "either"),
    ("connection-names-length", OK + b"Connection: content-length\r\nContent-Length: 2\r\n\r\nhi", True),
    ("switching", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello", False),
    ("huge-head", OK + b"X: " + b"a" * 100000 + b"\r\nContent-Length: 2\r\n\r\nhi", False),
    ("many-fields", OK + b"X: a\r\n" * 300 + b"Content-Length: 2\r\n\r\nhi", False),
    ("binary", OK + b"Content-Length: 256\r\n\r\n" + bytes(range(256)), True),
    ("compressed", OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x00", True),
]
