"""TCP proxies between a client and a server: one that counts HTTP requests, one that harms what passes."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

PIECE_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST

Side = Literal["client", "server"]
"""Whose bytes."""

Passing = Callable[[bytes], Iterator[bytes]]


class Broken(Exception):
    """Said by what looks at the bytes: both ends of the connection are reset."""


class Proxy:
    """Forwards connections to 127.0.0.1:`port`, or where it shall `listen`, to `target`. Context manager.

    `target` may be changed: connections made from then on go to the other.
    """

    def __init__(self, target: tuple[str, int], *, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.target = target
        self._listener = socket.create_server(listen)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()

    def passing(self, side: Side) -> Passing:
        """What becomes of the pieces that `side` of a new connection sends; raises Broken to end it."""
        return lambda data: iter((data,))

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target)
            except OSError:
                _reset(client)
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            self._start(self._forward, client, server, self.passing("client"))
            self._start(self._forward, server, client, self.passing("server"))

    def _forward(self, source: socket.socket, sink: socket.socket, passing: Passing) -> None:
        try:
            while data := source.recv(PIECE_BYTES):
                for piece in passing(data):
                    sink.sendall(piece)
        except Broken:
            self._reset_both(source, sink)
            return
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _reset_both(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            _reset(end)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def cut(self) -> None:
        """Resets every connection there is."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _reset(end)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        _reset(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(10)


def _reset(end: socket.socket) -> None:
    """Closes `end` so that its peer sees a reset, and lets a thread go that waits at it: closing alone does not."""
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RD)
    except OSError:
        pass
    end.close()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the bytes that one side sends, from byte `after` on, counted from when the fault was set.

    `reset` ends the connection abruptly, `end` in good order; both once, so that the next connection is well.
    `corrupt` flips bit `after % 8` of that one byte. `stall` lets nothing pass any more, of either side, on new
    connections either. `delay` waits `delay_s` before every piece of `PIECE_BYTES` or less.
    """

    kind: Literal["reset", "end", "corrupt", "stall", "delay"]
    after: int = 0
    side: Side = "server"
    delay_s: float = 0.02


class FaultyProxy(Proxy):
    """A proxy that does no harm until `fault` is set, and from then on that, until it is None again.

    `hits` counts the faults that took place.
    """

    def __init__(self, target: tuple[str, int], *, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(target, listen=listen)
        self._well = threading.Condition()
        self._fault: Fault | None = None
        self._seen = 0
        self.hits = 0

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        with self._well:
            self._fault, self._seen, self.hits = fault, 0, 0
            self._well.notify_all()

    def passing(self, side: Side) -> Passing:
        return lambda data: self._harmed(side, data)

    def _harmed(self, side: Side, data: bytes) -> Iterator[bytes]:
        fault, at = self._place(side, data)
        if fault is None or not (at < len(data) or fault.kind == "stall"):
            yield data
            return
        if fault.kind == "stall":
            yield data[:at]
            self._wait_until_well()
            yield data[at:]
        elif fault.kind == "delay":
            time.sleep(fault.delay_s)
            yield data
        elif fault.kind == "corrupt":
            yield data[:at] + bytes([data[at] ^ 1 << fault.after % 8]) + data[at + 1 :]
        else:
            yield data[:at]
            raise Broken if fault.kind == "reset" else OSError("ended")

    def _place(self, side: Side, data: bytes) -> tuple[Fault | None, int]:
        """The fault that `data` meets, if any, and where in it. Sudden faults happen once."""
        with self._well:
            fault, seen = self._fault, self._seen
            if fault is None:
                return None, 0
            lasting = fault.kind in ("stall", "delay")
            if fault.side == side:
                self._seen += len(data)
            at = max(0, fault.after - seen)
            met = at < len(data) if fault.side == side else fault.kind == "stall" and self.hits > 0
            if not met or (self.hits and not lasting):
                return None, 0
            self.hits += 1
            return fault, at if fault.side == side else 0

    def _wait_until_well(self) -> None:
        with self._well:
            while self._fault is not None and self._fault.kind == "stall" and not self._closed.is_set():
                self._well.wait(0.1)
        if self._closed.is_set():
            raise Broken


class CountingProxy(Proxy):
    """Before an HTTP server; `requests` lists what passed as (method, path), by reading heads as they go by."""

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        assert target.hostname and target.port
        super().__init__((target.hostname, target.port))
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self.requests: list[tuple[str, str]] = []

    def passing(self, side: Side) -> Passing:
        heads = _Heads(self) if side == "client" else None

        def pass_on(data: bytes) -> Iterator[bytes]:
            if heads is not None:
                heads.feed(data)
            yield data

        return pass_on

    def saw(self, method: str, path: str) -> None:
        with self._lock:
            self.requests.append((method, path))


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
