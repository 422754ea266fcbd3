"""Of every sample of a dataset the chunks it is read from: which server owns each, and its mark."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from torchcache.data.samples import windows
from torchcache.marks import Marks, marks
from torchcache.model import CHUNK_BYTES, Extent
from torchcache.placement import Placement, placement_key
from torchcache.records import CHUNK_INDEX

Ints = NDArray[np.int64]

_WINDOW = 256
_PAUSE_S = 0.0005
"""Between windows: the table is made beside training, which must not wait for the interpreter."""


class ChunkTable:
    """18 bytes a sample of one chunk. Chunk number `firsts[i] + k` of the table is the k-th of sample i."""

    def __init__(
        self,
        extents: Callable[[Sequence[int]], list[Extent]],
        count: int,
        placement: Placement,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Of samples 0 to `count` - 1. Takes some microseconds a sample; incomplete if `stopped`, asked meanwhile.

        Servers are counted as in `placement.members`.
        """
        self._extents = extents
        numbers = {server: number for number, server in enumerate(placement.members)}
        owners: list[NDArray[np.int16]] = []
        found: list[Marks] = []
        counts = np.zeros(count, np.int64)
        for window in windows(range(count), _WINDOW):
            if stopped():
                break
            keys: list[bytes] = []
            own: list[int] = []
            for index, extent in zip(window, extents(window), strict=True):
                chunks = chunks_of(extent)
                counts[index] = len(chunks)
                for chunk in chunks:
                    keys.append(extent.object.id.digest + CHUNK_INDEX.pack(chunk))
                    key = placement_key(extent.object.id, chunk * CHUNK_BYTES)
                    own.append(numbers[placement.owner(key)])
            found.append(marks(keys))
            owners.append(np.array(own, np.int16))
            time.sleep(_PAUSE_S)
        self.firsts: Ints = np.concatenate(([0], np.cumsum(counts)))
        self.owners = np.concatenate(owners) if owners else np.empty(0, np.int16)
        self.marks: Marks = np.concatenate(found) if found else np.empty(0, np.uint64)

    def of(self, order: Ints) -> tuple[Ints, Ints]:
        """Of samples read in this order: for each chunk the position of its sample, and its number in the table."""
        counts = self.firsts[order + 1] - self.firsts[order]
        positions = np.repeat(np.arange(len(order)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        return positions, self.firsts[order[positions]] + within

    def extents(self, samples: Sequence[int]) -> list[Extent]:
        """Where samples lie."""
        return self._extents(samples)


def chunks_of(extent: Extent) -> range:
    """The numbers of the chunks that an extent touches."""
    first = extent.offset // CHUNK_BYTES
    return range(first, max(first, (extent.end - 1) // CHUNK_BYTES) + 1)
