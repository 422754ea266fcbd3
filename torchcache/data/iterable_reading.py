"""From the numbers of samples to samples: one reading for each way in which shards can be got at.

A reading belongs to one pass over a dataset. It is asked for some samples at a time, in the order of the epoch, and
answers with an outcome for each: the sample, or the error that it ended with. Errors of the pool, and shards that are
gone or changed, are raised: they are no matter of one sample.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from torchcache.data.formats import BlockFormat, RecordFormat, codec_of
from torchcache.data.formats.base import BlockReader, damaged, place, rows_of
from torchcache.data.formats.compression import held_whole, unpacked
from torchcache.data.iterable_file import explained, open_parts, open_shard
from torchcache.data.iterable_index import Access
from torchcache.data.iterable_order import Ints
from torchcache.errors import IntegrityError, ObjectChanged, ObjectNotFound, TorchCacheError
from torchcache.model import Extent
from torchcache.pool import Residency

if TYPE_CHECKING:
    from torchcache.data.iterable_shards import ShardRecords

AT_ONCE_BYTES: Final = 16 * 1024 * 1024
"""Of one request to the pool for records."""

HELD_BYTES: Final = 128 * 1024 * 1024
"""Blocks kept decoded for samples still to come; one is kept whatever its size."""

_OPEN: Final = 2
"""Shards held open at a time: the one that ends in a window and the next."""


class Reading(Protocol):
    """One pass's way to samples. Not for several threads."""

    at_once: int
    """How many samples are asked for at once, where the order leaves that open."""

    def cut(self, ids: Ints) -> int:
        """How many of `ids`, from the front, are to be asked for at once; at least one."""

    def fetch(self, ids: Ints) -> list[Any]:
        """An outcome for each of `ids`, in order: its sample, or an IntegrityError."""


class Records(Protocol):
    """Samples that lie somewhere, numbered from 0. Pickles."""

    access: Access
    count: int
    blocks: Ints
    """The samples of each part that is shuffled as one: of what is read at once where possible."""

    digest: str
    """Equal for the same samples under the same numbers."""

    def describe(self) -> str:
        """What they are, for people."""

    def name(self, number: int) -> str:
        """What a sample is called in errors and logs."""

    def reading(self) -> Reading:
        """A reader, for one pass in one thread."""

    def residency(self) -> Residency:
        """How much of them the pool holds now."""


class RecordReading:
    """Records read alone, many in one request to the pool."""

    at_once = 256

    def __init__(self, records: ShardRecords) -> None:
        self._records = records
        self._urls: dict[int, str] = {}

    def cut(self, ids: Ints) -> int:
        first, stop = self._records.bounds(*self._records.place(ids))
        return max(1, int(np.searchsorted(np.cumsum(stop - first), AT_ONCE_BYTES, side="right")))

    def fetch(self, ids: Ints) -> list[Any]:
        records = self._records
        shards, numbers = records.place(ids)
        first, stop = records.bounds(shards, numbers)
        extents = [
            Extent(records.info(shard), start, end - start)
            for shard, start, end in zip(shards.tolist(), first.tolist(), stop.tolist(), strict=True)
        ]
        outcomes = records.pool.read_each(extents, namespace=records.namespace)
        return [
            self._sample(outcome, shard, number)
            for outcome, shard, number in zip(outcomes, shards.tolist(), numbers.tolist(), strict=True)
        ]

    def _sample(self, outcome: memoryview | TorchCacheError, shard: int, number: int) -> Any:
        format_ = self._records.format
        if isinstance(outcome, IntegrityError):
            return outcome
        if isinstance(outcome, ObjectNotFound | ObjectChanged):
            raise explained(self._records.pool, self._records.info(shard), outcome) from outcome
        if isinstance(outcome, TorchCacheError):
            raise outcome
        if not isinstance(format_, RecordFormat):
            raise TypeError(f"{format_.name} has no records that are read alone")
        url = self._urls.get(shard)
        if url is None:
            url = self._urls[shard] = self._records.pool.uri(self._records.info(shard).id)
        try:
            return format_.record(outcome, url, number)
        except IntegrityError as error:
            return error


class BlockReading:
    """Rows of blocks: each block is read once for all that is wanted of it, and kept while that is likely to go on."""

    at_once = 256

    def __init__(self, records: ShardRecords) -> None:
        self._records = records
        self._readers: OrderedDict[int, BlockReader] = OrderedDict()
        self._held: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def cut(self, ids: Ints) -> int:
        return len(ids)

    def fetch(self, ids: Ints) -> list[Any]:
        outcomes: list[Any] = [None] * len(ids)
        shards, numbers = self._records.place(ids)
        for shard in _in_order(shards):
            wanted = np.flatnonzero(shards == shard)
            before = self._records.rows_before(shard)
            blocks = np.searchsorted(before, numbers[wanted], side="right") - 1
            for block in _in_order(blocks):
                places = wanted[blocks == block]
                found = self._rows(shard, block, numbers[places] - before[block])
                for at, outcome in zip(places.tolist(), found, strict=True):
                    outcomes[at] = outcome
        return outcomes

    def _rows(self, shard: int, block: int, rows: Ints) -> Sequence[Any]:
        try:
            url = self._records.pool.uri(self._records.info(shard).id)
            return rows_of(self._block(shard, block), rows, url)
        except IntegrityError as error:
            return [error] * len(rows)

    def _block(self, shard: int, block: int) -> Any:
        table = self._held.pop((shard, block), None)
        if table is None:
            table = self._reader(shard).read(block)
        self._held[shard, block] = table
        while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return table

    def _reader(self, shard: int) -> BlockReader:
        reader = self._readers.pop(shard, None)
        if reader is None:
            records, info = self._records, self._records.info(shard)
            if not isinstance(records.format, BlockFormat):
                raise TypeError(f"{records.format.name} has no blocks")
            file = open_parts(records.pool, info, records.namespace)
            reader = records.format.open(file, records.pool.uri(info.id))
        self._readers[shard] = reader
        while len(self._readers) > _OPEN:
            self._readers.popitem(last=False)
        return reader


class StreamReading:
    """Shards read from the front: what is wanted must come within the samples asked for at once, or after them."""

    at_once = 64

    def __init__(self, records: ShardRecords) -> None:
        self._records = records
        self._open: OrderedDict[int, _Cursor] = OrderedDict()

    def cut(self, ids: Ints) -> int:
        return len(ids)

    def fetch(self, ids: Ints) -> list[Any]:
        outcomes: list[Any] = [None] * len(ids)
        shards, numbers = self._records.place(ids)
        for shard in _in_order(shards):
            wanted = np.flatnonzero(shards == shard)
            wanted = wanted[np.argsort(numbers[wanted], kind="stable")]
            for at, number in zip(wanted.tolist(), numbers[wanted].tolist(), strict=True):
                outcomes[at] = self._cursor(shard, number).take(number)
        return outcomes

    def _cursor(self, shard: int, number: int) -> _Cursor:
        cursor = self._open.pop(shard, None)
        if cursor is None or cursor.next > number + 1:
            cursor = _Cursor(self._records, shard)
        self._open[shard] = cursor
        while len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return cursor


class _Cursor:
    """A place in a shard that is read from the front. The last sample can be taken again."""

    def __init__(self, records: ShardRecords, shard: int) -> None:
        self.next = 0
        self._url = records.pool.uri(records.info(shard).id)
        self._samples = _streamed(records, shard)
        self._last: Any = None
        self._failed: IntegrityError | None = None

    def take(self, number: int) -> Any:
        """The outcome of sample `number`. What can't be read on fails for all that is behind it."""
        while self.next <= number and self._failed is None:
            try:
                self._last = next(self._samples)
                self.next += 1
            except IntegrityError as error:
                self._failed = error
            except StopIteration:
                self._failed = damaged(self._url, f"it ends before its record {number}")
        if self._failed is not None and self.next <= number:
            return self._failed
        make = self._last
        try:
            return make()
        except IntegrityError as error:
            return error


def _streamed(records: ShardRecords, shard: int) -> Iterator[Any]:
    """A function for each sample of a shard, which makes it: what isn't wanted isn't decoded."""
    info, format_ = records.info(shard), records.format
    url = records.pool.uri(info.id)
    file = open_shard(records.pool, info, records.namespace)
    packing = codec_of(info.id.key)
    if packing is not None:
        file = unpacked(file, packing, info.size, url)
    if isinstance(format_, RecordFormat):
        for number, (_, frame) in enumerate(format_.frames(file, url)):
            yield lambda frame=frame, number=number: format_.record(memoryview(frame), url, number)
        return
    reader = format_.open(file if packing is None else held_whole(file, url), url)
    for block in range(len(reader.rows())):
        table = reader.read(block)
        for number in range(table.num_rows):
            yield lambda table=table, number=number: rows_of(table, [number], place(url, number))[0]


def _in_order(values: Ints) -> list[int]:
    """Each value once, in order of first appearance."""
    return list(dict.fromkeys(values.tolist()))
