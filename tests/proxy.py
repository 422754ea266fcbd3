"""A TCP proxy before an HTTP server: counts the requests that pass, by reading their heads as they go by."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit


class CountingProxy:
    """Forwards 127.0.0.1:<own port> to `target`; `requests` lists what passed as (method, path). Context manager."""

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        self._target = (target.hostname, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._forward, args=(client, server, _Heads(self)), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, None), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, heads: _Heads | None) -> None:
        try:
            while data := source.recv(256 * 1024):
                if heads is not None:
                    heads.feed(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def saw(self, method: str, path: str) -> None:
        with self._lock:
            self.requests.append((method, path))

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        with self._lock:
            for end in self._open:
                end.close()


class _Heads:
    """Finds the request heads in one connection's stream: a head, then `Content-Length` bytes of body, again."""

    def __init__(self, proxy: CountingProxy) -> None:
        self._proxy = proxy
        self._pending = b""
        self._body_left = 0

    def feed(self, data: bytes) -> None:
        self._pending += data
        while True:
            skipped = min(self._body_left, len(self._pending))
            self._pending, self._body_left = self._pending[skipped:], self._body_left - skipped
            head, end, rest = self._pending.partition(b"\r\n\r\n")
            if self._body_left or not end:
                return
            lines = head.decode("latin-1").split("\r\n")
            method, path, _ = lines[0].split(" ", 2)
            fields = dict(line.lower().split(": ", 1) for line in lines[1:])
            self._body_left = int(fields.get("content-length", 0))
            self._pending = rest
            self._proxy.saw(method, path)
