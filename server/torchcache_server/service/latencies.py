"""How long calls take: counted by length, for a histogram each."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Upper ends, inclusive, of all lengths but the last, which has none."""


@dataclass
class Histogram:
    """Of one kind of call. `counts` are one for each of `BOUNDS_S`, and one for what took longer."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0


class Latencies:
    """Thread-safe."""

    def __init__(self, kinds: Iterable[str] = ()) -> None:
        """`kinds` are known before the first call of each."""
        self._lock = threading.Lock()
        self._known = {kind: Histogram() for kind in kinds}

    def add(self, kind: str, took_s: float) -> None:
        """One call, whose end was an answer or an error."""
        with self._lock:
            known = self._known.setdefault(kind, Histogram())
            known.counts[bisect_left(BOUNDS_S, took_s)] += 1
            known.total_s += took_s

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Around one call."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, time.perf_counter() - began)

    def read(self) -> dict[str, Histogram]:
        """All kinds that are known, as they are now."""
        with self._lock:
            return {kind: Histogram([*one.counts], one.total_s) for kind, one in sorted(self._known.items())}
