"""Threads that work on keys: each key by one thread at a time, again after a delay if the work asks for it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)

K = TypeVar("K")


def retry_delay_s(failures: int, *, first_s: float, longest_s: float, jitter: float | None = None) -> float:
    """How long to wait after the `failures`-th failure in a row (from 1): doubling, between half and whole.

    `jitter` in [0, 1) is drawn unless given.
    """
    whole = min(longest_s, first_s * 2.0 ** min(failures - 1, 30))
    drawn = random.random() if jitter is None else jitter  # noqa: S311
    return whole * (0.5 + drawn / 2)


class WorkQueue(Generic[K]):
    """`work(key)` returns None when the key is done, or in how many seconds to work on it again."""

    def __init__(self, work: Callable[[K], float | None], *, threads: int, name: str) -> None:
        self._work = work
        self._due_s: dict[K, float] = {}
        self._running: set[K] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, key: K, *, after_s: float = 0.0) -> None:
        """A key that is being worked on is worked on once more; the earlier of two times holds."""
        with self._changed:
            due_s = time.monotonic() + after_s
            self._due_s[key] = min(due_s, self._due_s.get(key, due_s))
            self._changed.notify()

    def hurry(self) -> None:
        """Makes everything that waits for its time due now."""
        with self._changed:
            self._due_s = dict.fromkeys(self._due_s, time.monotonic())
            self._changed.notify_all()

    def close(self, *, timeout_s: float) -> None:
        """No key is begun after this; waits for those that are being worked on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self) -> None:
        while (key := self._next()) is not None:
            again_s: float | None = None
            try:
                again_s = self._work(key[0])
            except Exception:  # noqa: BLE001 - logged; the thread serves other keys
                _log.exception("work on %s failed in a way nobody foresaw", key[0])
                again_s = 30.0
            finally:
                with self._changed:
                    self._running.discard(key[0])
                    self._changed.notify_all()
            if again_s is not None:
                self.add(key[0], after_s=again_s)

    def _next(self) -> tuple[K] | None:
        """The key that has been due longest, as a 1-tuple; None when closed."""
        with self._changed:
            while not self._closed:
                free = [(due_s, key) for key, due_s in self._due_s.items() if key not in self._running]
                due_s, key = min(free, key=lambda pair: pair[0], default=(None, None))
                now = time.monotonic()
                if due_s is not None and key is not None and due_s <= now:
                    del self._due_s[key]
                    self._running.add(key)
                    return (key,)
                self._changed.wait(None if due_s is None else due_s - now)
            return None
