"""A proxy, a process of its own, that makes a server far away: a latency before each request, one bandwidth for all."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

_PIECE_BYTES: Final = 1 << 18


class Line:
    """What all connections share: bytes leave one after the other, at `bytes_s`."""

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s = bytes_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_through(self, size: int) -> None:
        """Returns once `size` bytes have had their turn."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.005) + size / self._bytes_s
            wait_s = self._free_at - now
        if wait_s > 0:
            time.sleep(wait_s)


def serve(target: tuple[str, int], latency_s: float, bytes_s: float) -> None:
    """Forwards connections to `target`, for ever; prints its port first."""
    line = Line(bytes_s)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(target)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_requests, args=(client, server, latency_s), daemon=True).start()
        threading.Thread(target=_answers, args=(server, client, line), daemon=True).start()


def _requests(client: socket.socket, server: socket.socket, latency_s: float) -> None:
    """What a client sends arrives later: all of a request that comes at once, once."""
    try:
        while data := client.recv(_PIECE_BYTES):
            time.sleep(latency_s)
            server.sendall(data)
    except OSError:
        pass
    _end(client, server)


def _answers(server: socket.socket, client: socket.socket, line: Line) -> None:
    try:
        while data := server.recv(_PIECE_BYTES):
            line.pass_through(len(data))
            client.sendall(data)
    except OSError:
        pass
    _end(client, server)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@contextmanager
def far_away(url: str, *, latency_s: float, bytes_s: float) -> Iterator[str]:
    """The URL of the server at `url`, on this machine, as it is from far away."""
    port = urlsplit(url).port
    if port is None:
        raise ValueError(f"{url} has no port")
    command = [sys.executable, "-m", "benchmarks.slow_network", str(port), str(latency_s), str(bytes_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("the proxy says nothing")
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    serve(("127.0.0.1", int(sys.argv[1])), float(sys.argv[2]), float(sys.argv[3]))
