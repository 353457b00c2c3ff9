"""A tap between tokenring and a backend: what tokenring wrote and what came back, byte for byte, in order."""

import selectors
import socket
import threading

import h11


class Line:
    """One connection: the two sockets, and what went each way."""

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.asked, self.answered = bytearray(), bytearray()


class Tap:
    """Listens on `port` and passes everything on to a backend's port."""

    def __init__(self, backend_port):
        self.backend_port = backend_port
        self.lines = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ended, self.end = socket.socketpair()
        self.thread = threading.Thread(target=self._pump, daemon=True)
        self.thread.start()

    def close(self):
        self.end.close()
        self.thread.join()

    def _pump(self):
        ready = selectors.DefaultSelector()
        ready.register(self.listener, selectors.EVENT_READ)
        ready.register(self.ended, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is self.ended:
                    return
                if key.fileobj is self.listener:
                    near, _ = self.listener.accept()
                    line = Line(near, socket.create_connection(("127.0.0.1", self.backend_port)))
                    for end in (line.near, line.far):
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.lines.append(line)
                    ready.register(line.near, selectors.EVENT_READ, (line.asked, line.far))
                    ready.register(line.far, selectors.EVENT_READ, (line.answered, line.near))
                    continue
                record, other = key.data
                try:
                    data = key.fileobj.recv(65536)
                    record += data
                    if data:
                        other.sendall(data)
                    else:
                        other.shutdown(socket.SHUT_WR)
                except OSError:
                    data = b""
                    # A reset is passed on as an end in both directions.
                    for end in (key.fileobj, other):
                        try:
                            end.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            pass
                if not data:
                    ready.unregister(key.fileobj)


def read_requests(data):
    """The requests that `data` is to h11 as a server, (method, target, headers, body, complete), and why it went no further."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    requests = []
    try:
        conn.receive_data(bytes(data))
        while True:
            event = conn.next_event()
            if event is h11.NEED_DATA:
                return requests, None
            if event is h11.PAUSED:
                conn.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                conn.send(h11.EndOfMessage())
                if conn.our_state is not h11.DONE or conn.their_state is not h11.DONE:
                    return requests, "closed"
                conn.start_next_cycle()
            elif isinstance(event, h11.Request):
                method, target = event.method.decode(), event.target.decode("latin-1")
                fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
                requests.append([method, target, fields, b"", False])
            elif isinstance(event, h11.Data):
                requests[-1][3] += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                requests[-1][4] = True
                if conn.their_state is h11.MUST_CLOSE:
                    return requests, "closed"
                if not conn.trailing_data[0]:
                    return requests, None
    except h11.RemoteProtocolError as error:
        return requests, str(error)


def read_responses(data, methods, closed=True):
    """The responses that `data` is to h11 as a client that asked with these methods, one after the other:
    (status, headers, body, complete). Interim ones are left out."""
    responses, rest = [], bytes(data)
    for method in methods:
        conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        conn.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        conn.send(h11.EndOfMessage())
        conn.receive_data(rest)
        if closed:
            conn.receive_data(b"")
        status, fields, body, complete = None, [], b"", False
        try:
            while True:
                event = conn.next_event()
                if isinstance(event, h11.Response):
                    status = event.status_code
                    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers]
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    complete = True
                    break
                elif isinstance(event, h11.ConnectionClosed) or event in (h11.NEED_DATA, h11.PAUSED):
                    break
        except h11.RemoteProtocolError:
            pass
        if status is None:
            break
        responses.append((status, fields, body, complete))
        rest = conn.trailing_data[0] if complete else b""
        if not complete:
            break
    return responses, rest
