"""Progress for where there is no terminal: a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 10.0


class ProgressLines:
    """Says how far something is, at most every `EVERY_S`; call it with (items, bytes) just done."""

    def __init__(
        self, what: str, items: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._items = items
        self._say = say
        self._clock = clock
        self._began_s = self._due_s = clock()
        self._due_s += EVERY_S
        self._done = self._bytes = 0

    def __call__(self, items: int, size_bytes: int) -> None:
        """Counts, and says so if it is time."""
        self._done += items
        self._bytes += size_bytes
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + EVERY_S
        took_s = max(now_s - self._began_s, 1e-9)
        left_s = (self._items - self._done) * took_s / self._done if self._done else None
        eta = f", {left_s:,.0f} s to go" if left_s is not None else ""
        share = self._done / self._items if self._items else 1.0
        self._say(
            f"{self._what}: {self._done:,} of {self._items:,} ({share:.0%}), {self._bytes / 1e6:,.0f} MB at "
            f"{self._bytes / 1e6 / took_s:,.0f} MB/s{eta}"
        )
