"""How much runs at once, and whether anything may still start: shared by both services."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

from torchcache.errors import Overloaded, ServerUnavailable

MAX_STREAMS: Final = 64
"""Data streams at a time. More would share the same two cores and disk, and hold buffers meanwhile."""


class Admission:
    """Counts the data streams, and goes once from open over draining to closed.

    *draining* refuses what is new and lets finish what runs; *closed* also ends the streams that still run.
    """

    def __init__(self, max_streams: int = MAX_STREAMS) -> None:
        self._max_streams = max_streams
        self._streams = 0
        self._changed = threading.Condition()
        self._state: Literal["open", "draining", "closed"] = "open"

    @property
    def streams(self) -> int:
        """Streams that run now."""
        return self._streams

    @property
    def is_open(self) -> bool:
        return self._state == "open"

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around one data stream. Raises Overloaded above the bound, ServerUnavailable when draining."""
        with self._changed:
            self.check_open()
            if self._streams >= self._max_streams:
                raise Overloaded(f"the server has {self._streams} streams open, as many as it may: try again")
            self._streams += 1
        try:
            yield
        finally:
            with self._changed:
                self._streams -= 1
                self._changed.notify_all()

    def check_open(self) -> None:
        """Before a call that begins something. Raises ServerUnavailable when draining."""
        if self._state != "open":
            raise ServerUnavailable("the server is shutting down")

    def check_running(self) -> None:
        """Between the batches of a stream. Raises ServerUnavailable when closed."""
        if self._state == "closed":
            raise ServerUnavailable("the server shut down before this stream ended")

    def drain(self, timeout_s: float) -> bool:
        """Refuses new streams and waits for those that run; True if none is left."""
        with self._changed:
            self._state = "draining"
            return self._changed.wait_for(lambda: not self._streams, timeout_s)

    def close(self) -> None:
        """Ends the streams that still run, at their next batch."""
        with self._changed:
            self._state = "closed"
