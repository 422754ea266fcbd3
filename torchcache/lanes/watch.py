"""A read under way, as another thread sees it: whether it gives signs of life, and how to end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Ended(Exception):
    """Said to the thread that reads: nobody waits for it any more."""


class Watch:
    """Of one read by the flight lane. `end` may be called by any thread, all else is called by the one that reads.

    `asked` is when the server was asked, a time.monotonic() value, infinite before: a fork that is under way holds
    calls back. `last_sign` is when it was last heard of. `spoke`: it has answered at all. `filling`: it has said that
    something is on its way from an under-store.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: Cancellable | None = None
        self.ended = False
        self.spoke = False
        self.filling = False
        self.asked = self.last_sign = float("inf")

    def asking(self) -> None:
        """The server is about to be asked."""
        self.asked = self.last_sign = time.monotonic()

    def opened(self, stream: Cancellable) -> bool:
        """`stream` may be cancelled, until `closed`. False if the read was ended."""
        self.last_sign = time.monotonic()
        self.spoke = True
        with self._lock:
            if not self.ended:
                self._stream = stream
            return not self.ended

    def closed(self) -> None:
        """No reference to the stream is kept."""
        with self._lock:
            self._stream = None

    @contextmanager
    def landing(self, rows: int) -> Iterator[None]:
        """Around the writing of what came: it isn't begun once the read is ended. Raises Ended."""
        self.last_sign = time.monotonic()
        self.filling = self.filling or not rows
        with self._lock:
            if self.ended:
                raise Ended
            yield

    def end(self) -> None:
        """Ends the read: when this returns, nothing more is written into its buffers."""
        with self._lock:
            self.ended = True
            if self._stream is not None:
                self._stream.cancel()
