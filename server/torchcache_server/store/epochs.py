"""One epoch of an order that a reader told: which of its chunks are still to come, and when. No I/O, no locks."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

from torchcache.marks import Marks
from torchcache_server.store.eviction import NEVER

Positions = NDArray[np.uint32]
Distances = NDArray[np.int64]

_FIRST: Final = 32
_ENOUGH: Final = 16
"""An epoch that wasn't said to run has begun once so many of the first so many chunks were read ..."""

_LATELY: Final = 128
"""... within so many reads: of another epoch that runs, they come scattered."""

_WITNESSES: Final = 8
"""So many reads near each other show where reading is: one that was counted twice would be far off."""

_LATE: Final = 256
"""So many samples behind where reading is, at least, nobody is expected to read any more."""


class Epoch:
    """The chunks that one reader reads in one epoch, each with the positions at which it is read.

    20 bytes a chunk. Uses come in any order, and some never come: of what lies well behind, nobody waits for.
    """

    def __init__(self, chunks: Marks, positions: Positions, *, length: int, running: bool) -> None:
        """Chunk i is read at `positions[i]`, of `length` samples. `running`: its reads are next."""
        by_chunk = np.argsort(chunks, kind="stable")  # positions ascend, and stay so for each chunk
        ordered = chunks[by_chunk]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
        self._chunks = ordered[starts]
        self._ends = np.append(starts, len(ordered)).astype(np.uint32)[1:]
        self._next = starts.astype(np.uint32)
        self._positions = positions[by_chunk]
        self.count = len(chunks)
        self.length = length
        self.begun = running
        self.now = -1
        """The farthest position that was read, as far as that is plain: a chunk may be read by others too."""
        self._recent = np.empty(0, np.int64)
        self._opening = np.sort(positions)[min(_FIRST, len(positions)) - 1] if len(positions) else 0
        self._firsts: deque[int] = deque(maxlen=min(_ENOUGH, max(1, len(positions) // 2)))
        self._seen = 0

    def used(self, chunks: Marks, counts: Distances) -> Distances:
        """Chunks were read so many times, each here once; how many of these this epoch doesn't know of."""
        at, known = self._find(chunks)
        if not self.begun and not self._begins(at, known):
            return counts
        here = at[known]
        left = counts.copy()
        taken = np.minimum(counts[known], self._ends[here].astype(np.int64) - self._next[here])
        read = taken > 0
        if read.any():
            self._next[here] += taken.astype(np.uint32)
            self._move(self._positions[self._next[here[read]] - 1].astype(np.int64))
        left[known] -= taken
        return left

    def to_come(self, chunks: Marks) -> Distances:
        """How many samples from now each chunk is read next; NEVER."""
        found = np.full(len(chunks), NEVER, np.int64)
        at, known = self._find(chunks)
        here = at[known]
        behind = self.now - max(_LATE, self.length // 50) if self.begun else -1
        while True:
            ahead = self._next[here] < self._ends[here]
            if not ahead.any():
                return found
            positions = self._positions[np.where(ahead, self._next[here], 0)].astype(np.int64)
            missed = ahead & (positions < behind)
            if not missed.any():
                break
            self._next[np.unique(here[missed])] += 1
        distance = positions - self.now if self.begun else positions
        found[known] = np.where(ahead, np.maximum(distance, 0), NEVER)
        return found

    @property
    def left(self) -> int:
        """Samples of it that are still to come."""
        return self.length - 1 - self.now if self.begun else self.length

    @property
    def is_over(self) -> bool:
        """Whether reads that it doesn't know of are the next epoch's."""
        return self.begun and self.left <= self.length // 10

    def _find(self, chunks: Marks) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not len(self._chunks):
            return np.zeros(len(chunks), np.int64), np.zeros(len(chunks), bool)
        at = np.minimum(np.searchsorted(self._chunks, chunks), len(self._chunks) - 1)
        return at, self._chunks[at] == chunks

    def _move(self, positions: Distances) -> None:
        """Takes in positions that were read: `now` is the farthest that others near it bear out."""
        recent = np.sort(np.concatenate((self._recent, positions)))
        near = np.searchsorted(recent, recent - max(_LATE, self.length // 20))
        borne_out = np.flatnonzero(
            np.arange(len(recent)) - near + 1 >= min(_WITNESSES, max(1, self.length // 8))
        )
        if len(borne_out):
            self.now = max(self.now, int(recent[borne_out[-1]]))
        self._recent = np.concatenate((self._recent, positions))[-4 * _WITNESSES :]

    def _begins(self, at: NDArray[np.int64], known: NDArray[np.bool_]) -> bool:
        """Whether, with these reads, most of its first chunks were read lately."""
        for where, is_known in zip(at.tolist(), known.tolist(), strict=True):
            self._seen += 1
            if is_known and self._positions[self._next[where]] <= self._opening:
                self._firsts.append(self._seen)
        enough = self._firsts.maxlen
        self.begun = len(self._firsts) == enough and self._firsts[-1] - self._firsts[0] <= _LATELY
        return self.begun
