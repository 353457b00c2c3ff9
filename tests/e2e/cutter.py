"""A way to a server on which connections break."""

import selectors
import socket
import struct
import threading
import time


class Cutter:
    """Passes connections on to `port`. Of those that ask for a stream by its id, the first `cuts` are broken off `after_s` behind
    the first byte that comes back, by a reset and by an ordinary close in turn."""

    def __init__(self, port, cuts, after_s=0.3):
        self.port, self.cuts, self.after_s, self.done = port, cuts, after_s, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self._pass, args=(near, far), daemon=True).start()

    def _pass(self, near, far):
        due_s, cut = None, False
        ready = selectors.DefaultSelector()
        ready.register(near, selectors.EVENT_READ, far)
        ready.register(far, selectors.EVENT_READ, near)
        with near, far, ready:
            while due_s is None or time.monotonic() < due_s:
                for key, _ in ready.select(0.05):
                    try:
                        data = key.fileobj.recv(65536)
                    except ConnectionResetError:
                        return
                    if not data:
                        return
                    if key.fileobj is near:
                        cut = data.startswith(b"GET /v1/streams/") and self.done < self.cuts
                    elif cut and due_s is None:
                        due_s = time.monotonic() + self.after_s
                    key.data.sendall(data)
            if self.done % 2:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.done += 1
