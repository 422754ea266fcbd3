"""What a rank will read of shards, in which order: for the pool, which fetches by it. A hint, and no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from torchcache.data.iterable_order import Ints, Order
from torchcache.data.iterable_pass import Epoch
from torchcache.data.iterable_shards import ShardRecords
from torchcache.model import Extent

_STEP: Final = 4096
"""Samples looked at at a time; what is read twice among them is told once."""


class ShardParts:
    """The parts of shards that are read as one, by number: records, blocks of rows, or shards that are read whole."""

    def __init__(self, records: ShardRecords) -> None:
        self._records = records
        self._ends = np.cumsum(records.blocks, dtype=np.int64)

    def __len__(self) -> int:
        return self._records.count if self._records.access == "records" else len(self._ends)

    def of(self, ids: Ints) -> Ints:
        """The part that each sample lies in."""
        return ids if self._records.access == "records" else np.searchsorted(self._ends, ids, side="right")

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        """Where the parts lie. Of blocks it is only known how many rows they have: about there."""
        records, numbers = self._records, np.asarray(indices, np.int64)
        if records.access == "records":
            shards, within = records.place(numbers)
            firsts, stops = records.bounds(shards, within)
        elif records.access == "blocks":
            shards, firsts, stops = records.block_bounds(numbers)
        else:
            return [Extent(records.info(shard)) for shard in numbers.tolist()]
        return [
            Extent(records.info(shard), first, stop - first)
            for shard, first, stop in zip(shards.tolist(), firsts.tolist(), stops.tolist(), strict=True)
        ]


def parts_in_order(parts: ShardParts, order: Order, epoch: Epoch, rank: int) -> Ints:
    """The parts that a rank reads in an epoch, those of its workers taking turns."""
    split = epoch.split
    step = order.reach or _STEP
    # Places that are dealt out one by one are read about in their order, however many workers there are.
    workers = range(split.workers if split.contiguous else 1)
    split = split if split.contiguous else split.with_workers(1)
    shares = [split.share(epoch.total, rank, worker) for worker in workers]
    found = [np.empty(0, np.int64)]
    for at in range(0, max(shares), step):
        for worker, share in zip(workers, shares, strict=True):
            places = split.places(epoch.total, rank, worker, at, min(at + step, share))
            read = parts.of(order.ids(epoch.rest.positions(places) % max(1, order.count)))
            _, first = np.unique(read, return_index=True)
            found.append(read[np.sort(first)])
    return np.concatenate(found)
