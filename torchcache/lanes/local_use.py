"""What a client read by itself, told to the server now and then: it can't see it, and must know who is in use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from torchcache.errors import TorchCacheError
from torchcache.lanes.local_store import LocalStore
from torchcache.wire.v1 import cache_pb2

EVERY_S: Final = 1.0
"""At most so often."""

CALL_S: Final = 2.0
"""How long a report may take, and closing a lane with it."""

MAX_NAMESPACES: Final = 4096
"""In a report: more the server refuses."""

_log = logging.getLogger(__name__)


class UseReports:
    """The reports of one lane. Thread-safe. Sending goes on beside the reads: a server that hangs stops none.

    `extents` and `bytes` are all that was read, `suspects` how many extents were found damaged,
    `writes` how many writes went into the store's files.
    """

    def __init__(
        self, store: LocalStore, send: Callable[[cache_pb2.ReportUseRequest, float], object]
    ) -> None:
        """`send` makes the call, by a deadline, a time.monotonic() value. It may raise TorchCacheError."""
        self._store = store
        self._send_call = send
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self.extents = 0
        self.suspects = 0
        self.bytes = 0
        self.writes = 0
        self._chunks = 0
        self._bytes = 0
        self._told_count = store.count
        self._due_s = time.monotonic() + EVERY_S

    def add_suspects(self, extents: int) -> None:
        """Counts what was found damaged."""
        with self._lock:
            self.suspects += extents

    def add(self, extents: int, chunks: int, read_bytes: int) -> None:
        """Counts what was read, and reports if it is time."""
        with self._lock:
            self.extents += extents
            self.bytes += read_bytes
            self._chunks += chunks
            self._bytes += read_bytes
            if time.monotonic() < self._due_s or not self._sending.acquire(blocking=False):
                return
            self._due_s = time.monotonic() + EVERY_S
        try:
            threading.Thread(target=self._send, name="torchcache use report", daemon=True).start()
        except RuntimeError:  # the interpreter ends
            self._sending.release()

    def wrote(self) -> None:
        """Counts a write; the server knows of it."""
        with self._lock:
            self.writes += 1

    def close(self) -> None:
        """Reports what wasn't yet."""
        if self._sending.acquire(timeout=CALL_S):
            self._send()

    def _send(self) -> None:
        """Makes the call; holding `_sending`, which it gives back."""
        try:
            request, count = self._taken()
            if request is None:
                return
            try:
                self._send_call(request, time.monotonic() + CALL_S)
                self._told_count = count
            except TorchCacheError as error:
                _log.debug("what was read from %s could not be reported: %s", self._store.path, error)
                self._give_back(request)
        finally:
            self._sending.release()

    def _taken(self) -> tuple[cache_pb2.ReportUseRequest | None, int]:
        count = self._store.count
        with self._lock:
            chunks, self._chunks = self._chunks, 0
            read_bytes, self._bytes = self._bytes, 0
        if not chunks:
            return None, count
        names = sorted(self._store.used_since(self._told_count))[:MAX_NAMESPACES]
        return cache_pb2.ReportUseRequest(namespaces=names, chunks=chunks, bytes=read_bytes), count

    def _give_back(self, request: cache_pb2.ReportUseRequest) -> None:
        with self._lock:
            self._chunks += request.chunks
            self._bytes += request.bytes
