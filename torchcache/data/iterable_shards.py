"""Samples that lie many in a shard: which shards there are, and how a reader gets at a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from torchcache import environment
from torchcache.data.formats import Format, format_of
from torchcache.data.formats.base import place
from torchcache.data.iterable_index import Access, Indexing, ShardIndex
from torchcache.data.iterable_order import Ints
from torchcache.data.iterable_reading import BlockReading, Reading, RecordReading, StreamReading
from torchcache.data.iterable_sources import Source, common_folder, find_shards
from torchcache.data.manifest import Manifest
from torchcache.data.mapped_ints import MappedInts
from torchcache.errors import TorchCacheError
from torchcache.model import ObjectInfo
from torchcache.pool import Pool, Residency
from torchcache.pool.absent import absent


class ShardRecords:
    """The records of shards, numbered through all of them. Pickles.

    Where records begin takes 8 bytes each, in a file that all workers map.
    """

    def __init__(
        self,
        pool: Pool,
        source: Source,
        format: str | Format | None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Finds the shards and reads what has no index. Raises ConfigurationError, ObjectNotFound, IntegrityError."""
        self.pool = pool
        shards = find_shards(pool, source)
        self.format = format_of(format, (shard.id.key for shard in shards))
        self.namespace = common_folder([pool.uri(shard.id) for shard in shards])
        indices, self.made = Indexing(pool, self.format, self.namespace).run(shards, on_progress)
        folder = environment.home() / "manifests"
        self._manifest = Manifest.write(shards[0].id.store, shards, folder)
        self.access = _access(indices)
        self._counts = np.array([index.count for index in indices], dtype=np.int64)
        self._firsts = _summed(self._counts)
        self._rows = _joined([index.rows for index in indices])
        starts = _joined([index.starts for index in indices]) if self.access == "records" else None
        self._starts = None if starts is None else MappedInts.write(starts, folder)
        if self.access == "blocks":
            sizes = np.array([0 if i.rows is None else len(i.rows) for i in indices], dtype=np.int64)
            self._first_blocks = _summed(sizes)
        self._infos: dict[int, ObjectInfo] = {}
        self.count = int(self._firsts[-1])
        self.blocks: Ints = self._counts
        if self.access == "blocks" and self._rows is not None:
            self.blocks = self._rows
        text = f"{self._manifest.digest} {self.format.identity} {self._counts.tolist()}"
        self.digest = str(xxhash.xxh3_128_hexdigest(text.encode()))

    @property
    def shard_count(self) -> int:
        return len(self._counts)

    @property
    def total_bytes(self) -> int:
        return self._manifest.total_bytes

    def describe(self) -> str:
        return f"{self.shard_count:,} shards of {self.format.name} under {self.namespace}, {self.count:,} samples"

    def residency(self) -> Residency:
        return self.pool.residency(self.shards())

    def absent(self) -> Iterator[tuple[ObjectInfo, TorchCacheError]]:
        """The shards that the pool doesn't wholly hold now, and why."""
        return absent(self.pool, self.shards())

    def shards(self) -> list[ObjectInfo]:
        """All shards, in order."""
        return [self.info(number) for number in range(self.shard_count)]

    def name(self, number: int) -> str:
        shards, numbers = self.place(np.array([number]))
        return place(self.pool.uri(self.info(int(shards[0])).id), int(numbers[0]))

    def reading(self) -> Reading:
        if self.access == "records":
            return RecordReading(self)
        return BlockReading(self) if self.access == "blocks" else StreamReading(self)

    # ---- what readings ask ----

    def info(self, shard: int) -> ObjectInfo:
        info = self._infos.get(shard)
        if info is None:
            info = self._infos[shard] = self._manifest[shard]
        return info

    def place(self, ids: Ints) -> tuple[Ints, Ints]:
        """The shards of the samples `ids`, and their numbers within them."""
        firsts = self._firsts
        shard = np.searchsorted(firsts, ids, side="right") - 1
        return shard, ids - firsts[shard]

    def bounds(self, shard: Ints, number: Ints) -> tuple[Ints, Ints]:
        """Where records begin, and where the next ones do. For access "records"."""
        if self._starts is None:
            raise TypeError("only records that can be read alone have bounds")
        starts = self._starts.array()
        at = self._firsts[shard] + shard + number  # each shard has one entry more than records
        return starts[at], starts[at + 1]

    def rows_before(self, shard: int) -> Ints:
        """For each block of a shard the number of its first row, and behind the last the number of rows."""
        if self._rows is None:
            raise TypeError("only shards that are read by block have rows")
        first, stop = self._first_blocks[shard : shard + 2].tolist()
        found: Ints = _summed(self._rows[first:stop])
        return found

    def block_bounds(self, blocks: Ints) -> tuple[Ints, Ints, Ints]:
        """The shards of blocks, numbered through all of them, and about where in those they begin and end.

        As if all rows were equally long. For access "blocks".
        """
        shards = np.searchsorted(self._first_blocks, blocks, side="right") - 1
        bounds = np.array(
            [
                self.rows_before(shard)[block : block + 2]
                * (self.info(shard).size / max(1, self._counts[shard]))
                for shard, block in zip(shards.tolist(), blocks - self._first_blocks[shards], strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 2)
        return shards, bounds[:, 0], bounds[:, 1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_infos": {}}


def _access(indices: list[ShardIndex]) -> Access:
    """What can be done with all of the shards."""
    found = {index.access for index in indices}
    return found.pop() if len(found) == 1 else "stream"


def _summed(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _joined(arrays: list[Any]) -> Ints | None:
    """Arrays of u64 as one of i64: no offset or count is that large."""
    if any(array is None for array in arrays):
        return None
    return np.concatenate(arrays).astype(np.int64)
