"""What runs, how much of it at once, and whether anything may still start: shared by both services."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from torchcache.errors import Overloaded, ServerUnavailable

MAX_STREAMS: Final = 88
"""Data streams at a time, enough for one dataset to have 64. More would share the same two cores and disk, and hold
buffers meanwhile."""

MAX_WRITERS: Final = 32
"""Of the streams, those that write. While a batch is received it takes its size twice, in buffers of gRPC's that fill
whether or not anybody reads: their number is the bound of what writers take of the memory, some 33 MB each."""

CONTROL_THREADS: Final = 64
MAX_CALLS: Final = 56
ENDING_CALLS: Final = 4
"""Control calls at a time, and so many more that end what was begun. All of them may wait for storage; the threads that
are left tell how the server is."""

TIMES_THE_FREE: Final = 3
"""A dataset, or a save, may have so many times the streams that nobody has: three quarters, if it is the only one.
Others find room; see ahead_shares.py.
"""

RETRY_AFTER_S: Final = (0.05, 0.5)
"""Who finds no room is told to come again when a stream that begins now will have ended, within these."""

LATELY: Final = 0.1
"""How much the stream that ended last counts in how long they last."""


class Admission:
    """Counts what runs, and goes once from open over draining to closed.

    *draining* refuses what is new and lets finish what runs; *closed* also ends the streams that still run.
    """

    def __init__(
        self, max_streams: int = MAX_STREAMS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lasts_s = 0.0  # how long streams last, of late
        self._max_streams = max_streams
        self._streams = 0
        self._of: Counter[str] = Counter()  # streams by namespace
        self._writers: Counter[str] = Counter()  # those of them that write
        self._calls = 0
        self._begun = 0  # of the calls, those that a drain waits for
        self.refused_streams = 0
        """Told to come again, because there were as many as there may be."""
        self.refused_calls = 0
        """The same, of control calls."""
        self._changed = threading.Condition()
        self._state: Literal["open", "draining", "closed"] = "open"

    @property
    def streams(self) -> int:
        """Streams that run now."""
        return self._streams

    @contextmanager
    def stream(self, namespace: str) -> Iterator[None]:
        """Around one data stream of a namespace. Raises Overloaded above a bound, ServerUnavailable when draining."""
        with self._changed:
            self._check_open()
            mine = self._of[namespace]
            free = self._max_streams - self._streams
            if free <= 0 or mine >= TIMES_THE_FREE * free:
                self.refused_streams += 1
                raise Overloaded(
                    f"the server has {self._streams} streams open, {mine} of them for {namespace[:200]}, as many as it "
                    "may: try again",
                    retry_after_s=self._retry_after_s(),
                )
            self._streams += 1
            self._of[namespace] += 1
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._lasts_s += LATELY * (self._clock() - began - self._lasts_s)
                self._streams -= 1
                self._of[namespace] -= 1
                if not self._of[namespace]:
                    del self._of[namespace]
                self._changed.notify_all()

    @contextmanager
    def write_stream(self, namespace: str) -> Iterator[None]:
        """The same as `stream`, around one that writes: there may be fewer of them."""
        with self._changed:
            mine, writers = self._writers[namespace], self._writers.total()
            free = MAX_WRITERS - writers
            if free <= 0 or mine >= TIMES_THE_FREE * free:
                self.refused_streams += 1
                raise Overloaded(
                    f"the server has {writers} streams open that write, {mine} of them into {namespace[:200]}, as many "
                    "as it may: try again",
                    retry_after_s=self._retry_after_s(),
                )
            self._writers[namespace] += 1
        try:
            with self.stream(namespace):
                yield
        finally:
            with self._changed:
                self._writers[namespace] -= 1
                if not self._writers[namespace]:
                    del self._writers[namespace]

    def _retry_after_s(self) -> float:
        return min(max(self._lasts_s, RETRY_AFTER_S[0]), RETRY_AFTER_S[1])

    @contextmanager
    def call(self, *, begins: bool = False, ends: bool = False) -> Iterator[None]:
        """Around one control call. `begins`: it begins something, which is refused while draining. `ends`: it ends
        something, and gives back what that takes.

        Raises Overloaded above the bound, ServerUnavailable when draining.
        """
        with self._changed:
            if begins:
                self._check_open()
            if self._calls >= MAX_CALLS + (ENDING_CALLS if ends else 0):
                self.refused_calls += 1
                raise Overloaded(
                    f"the server has {self._calls} calls at work, as many as it may: try again",
                    retry_after_s=RETRY_AFTER_S[1],
                )
            self._calls += 1
            self._begun += begins
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._begun -= begins
                self._changed.notify_all()

    def _check_open(self) -> None:
        if self._state != "open":
            raise ServerUnavailable("the server is shutting down")

    def check_running(self) -> None:
        """Between the batches of a stream. Raises ServerUnavailable when closed."""
        if self._state == "closed":
            raise ServerUnavailable("the server shut down before this stream ended")

    def begin_drain(self) -> None:
        """Refuses what is new from now on."""
        with self._changed:
            if self._state == "open":
                self._state = "draining"

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits for what runs; False if something still does after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._streams or self._begun), max(0.0, timeout_s))

    def close(self) -> None:
        """Ends the streams that still run, at their next batch."""
        with self._changed:
            self._state = "closed"
