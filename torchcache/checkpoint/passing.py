"""Checksums of large payloads, taken of the bytes while a lane reads them to send them.

A pass of its own over gigabytes costs as much as all other checksums together: memory is slower than xxh3 is.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from xxhash import xxh3_64

from torchcache.checkpoint.layout import GRANULE_BYTES


class PassingDigests:
    """The xxh3-64 of each granule of some payloads of a file. Thread-safe.

    Every byte is hashed before it is sent for the first time, in whatever order and however often pieces pass: of a
    tensor that is changed meanwhile the checksum is never that of a value which wasn't sent.
    """

    def __init__(self, payloads: Sequence[tuple[int, memoryview]]) -> None:
        """`payloads`: where each begins in the file, and its bytes; by rising offset, and none over another."""
        self._of_payload = {
            start: [
                _Granule(start + at, payload[at : at + GRANULE_BYTES])
                for at in range(0, len(payload), GRANULE_BYTES)
            ]
            for start, payload in payloads
        }
        self._granules = [granule for granules in self._of_payload.values() for granule in granules]
        self._starts = [granule.start for granule in self._granules]

    def __call__(self, offset: int, piece: memoryview) -> None:
        """`piece`, which begins at `offset` of the file, is about to be sent."""
        first = max(bisect_right(self._starts, offset) - 1, 0)
        behind = bisect_right(self._starts, offset + len(piece) - 1)
        for granule in self._granules[first:behind]:
            granule.take(offset, piece)

    def of(self, start: int) -> tuple[int, ...]:
        """Those of the payload that begins at `start`. What never passed is hashed now."""
        return tuple(granule.digest() for granule in self._of_payload[start])


class _Granule:
    """One checksum, of the bytes up to `at`."""

    __slots__ = ("_at", "_data", "_end", "_lock", "_state", "start")

    def __init__(self, start: int, data: memoryview) -> None:
        self.start = self._at = start
        self._end = start + len(data)
        self._data = data
        self._state = xxh3_64()
        self._lock = threading.Lock()

    def take(self, offset: int, piece: memoryview) -> None:
        end = min(offset + len(piece), self._end)
        with self._lock:
            if end <= self._at:  # it has passed before
                return
            if offset > self._at:  # what lies before it is another thread's, which isn't there yet
                self._finish()
                return
            self._state.update(piece[self._at - offset : end - offset])
            self._at = end

    def digest(self) -> int:
        with self._lock:
            self._finish()
            return self._state.intdigest()

    def _finish(self) -> None:
        if self._at < self._end:
            self._state.update(self._data[self._at - self.start :])
            self._at = self._end
