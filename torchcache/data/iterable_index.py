"""Indices: how many records each shard holds and where they begin. Found once for each version of an object.

An index is kept in the pool, as a computed sample, under the identity of the object: a shard that changed has none, and
every host of the pool finds it. `torchcache index` makes it before a job starts; else the first process does.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from torchcache import environment
from torchcache.data import codec
from torchcache.data.formats import BlockFormat, Format, RecordFormat, codec_of
from torchcache.data.formats.base import damaged
from torchcache.data.formats.compression import held_whole, unpacked
from torchcache.data.iterable_file import open_parts, open_shard
from torchcache.data.progress import progress_bar
from torchcache.errors import (
    IntegrityError,
    ObjectNotFound,
    OutOfSpace,
    TransientError,
)
from torchcache.locks import LockFile
from torchcache.model import SAMPLES, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool
from torchcache.threads import Threads

_log = logging.getLogger("torchcache")

NAME: Final = "torchcache-index"
VERSION: Final = "1"
NAMESPACE: Final = f"{SAMPLES}:{NAME}@{VERSION}"
_THREADS: Final = 4
_KEPT_TOGETHER: Final = 64
"""Indices written at a time, while more are being made."""

_LOCK_S: Final = 3600.0

Access = Literal["records", "blocks", "stream"]
"""What of a shard can be read alone: a record, a block of rows, or only all that comes before, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What is known of one shard: `count` records.

    `starts` has, for access "records", where each begins and, last, where the last one ends. `rows` has, for "blocks",
    the records of each block.
    """

    count: int
    starts: NDArray[np.uint64] | None = None
    rows: NDArray[np.uint64] | None = None

    @property
    def access(self) -> Access:
        return "records" if self.starts is not None else "blocks" if self.rows is not None else "stream"

    def to_record(self) -> memoryview:
        return codec.encode({"count": self.count, "starts": self.starts, "rows": self.rows})

    @classmethod
    def of_record(cls, record: memoryview, size_bytes: int) -> ShardIndex:
        """Raises IntegrityError for what can't be the index of a shard of `size_bytes`."""
        value: Any = codec.decode(record)
        try:
            index = cls(count=value["count"], starts=value["starts"], rows=value["rows"])
            sound = index._is_sound(size_bytes)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise IntegrityError(f"the index of a shard is malformed: {error}") from error
        if not sound:
            raise IntegrityError("the index of a shard is malformed")
        return index

    def _is_sound(self, size_bytes: int) -> bool:
        arrays = [array for array in (self.starts, self.rows) if array is not None]
        if not isinstance(self.count, int) or self.count < 0 or len(arrays) > 1:
            return False
        if any(array.dtype != np.uint64 or array.ndim != 1 for array in arrays):
            return False
        if self.starts is not None:
            ascending = bool((self.starts[1:] > self.starts[:-1]).all())
            return len(self.starts) == self.count + 1 and ascending and int(self.starts[-1]) <= size_bytes
        return self.rows is None or sum(self.rows.tolist()) == self.count


def index_of(file: BinaryIO, info: ObjectInfo, format_: Format, where: str) -> ShardIndex:
    """Reads a shard for what its index holds. Raises IntegrityError."""
    packing = codec_of(info.id.key)
    if packing is not None:
        file = unpacked(file, packing, info.size, where)
    if isinstance(format_, RecordFormat):
        return _of_records(file, info, format_, where, packed=packing is not None)
    reader = format_.open(file if packing is None else held_whole(file, where), where)
    rows = reader.rows()
    if packing is not None or not reader.seekable:
        return ShardIndex(count=sum(rows))
    return ShardIndex(count=sum(rows), rows=np.array(rows, dtype=np.uint64))


def _of_records(
    file: BinaryIO, info: ObjectInfo, format_: RecordFormat, where: str, *, packed: bool
) -> ShardIndex:
    if packed:
        return ShardIndex(count=sum(1 for _ in format_.frames(file, where)))
    starts = format_.starts(info.size, where)
    if starts is None:
        found, end = [], 0
        for start, frame in format_.frames(file, where):
            found.append(start)
            end = start + len(frame)
        if end > info.size:
            raise damaged(where, "its records go beyond its end")
        starts = np.array([*found, end], dtype=np.uint64)
    return ShardIndex(count=len(starts) - 1, starts=starts)


class Indexing:
    """The indices of the shards of one dataset: those that the pool keeps, and the others made now."""

    def __init__(self, pool: Pool, format_: Format, namespace: str) -> None:
        self._pool = pool
        self._format = format_
        self._namespace = namespace

    def run(
        self, shards: Sequence[ObjectInfo], on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[ShardIndex], int]:
        """The indices of `shards`, and how many had to be made. Raises the first error that a shard has.

        Shows its progress by itself, unless `on_progress` is to do it.

        Of the processes of a host one makes them; the others wait for it.
        """
        found = self._kept(shards)
        if len(found) == len(shards):
            return [found[i] for i in range(len(shards))], 0
        with LockFile(self._lock()) as lock:
            lock.wait_exclusive(_LOCK_S)
            found = self._kept(shards)
            missing = [i for i in range(len(shards)) if i not in found]
            if missing:
                size = sum(shards[i].size for i in missing)
                _log.info(
                    "%s: %d shards, %d bytes, are read for their index", self._namespace, len(missing), size
                )
            found |= self._make(shards, missing, on_progress)
        return [found[i] for i in range(len(shards))], len(missing)

    def _lock(self) -> Any:
        folder = environment.home() / "locks"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = hashlib.sha256(f"{self._namespace} {self._format.identity}".encode()).hexdigest()[:32]
        return folder / f"index-{name}.lock"

    def _object(self, info: ObjectInfo) -> ObjectInfo:
        key = f"{NAME}/{self._format.identity}/{info.id.digest.hex()}"
        return ObjectInfo(ObjectId(SAMPLES, key, VERSION), UNKNOWN_SIZE)

    def _kept(self, shards: Sequence[ObjectInfo]) -> dict[int, ShardIndex]:
        extents = [Extent(self._object(info)) for info in shards]
        outcomes = self._pool.read_each(extents, namespace=NAMESPACE, resident_only=True)
        found = {}
        for number, (info, outcome) in enumerate(zip(shards, outcomes, strict=True)):
            if isinstance(outcome, memoryview):
                try:
                    found[number] = ShardIndex.of_record(outcome, info.size)
                except IntegrityError as error:
                    _log.warning("the index of %s is made again: %s", info.id, error)
            elif not isinstance(outcome, ObjectNotFound | TransientError | IntegrityError):
                raise outcome
        return found

    def _make(
        self,
        shards: Sequence[ObjectInfo],
        numbers: Sequence[int],
        on_progress: Callable[[int, int], None] | None,
    ) -> dict[int, ShardIndex]:
        made: dict[int, ShardIndex] = {}
        with ExitStack() as closing:
            if on_progress is None and numbers:
                size = sum(shards[i].size for i in numbers)
                what = f"index {len(numbers):,} shards"
                on_progress = closing.enter_context(progress_bar(what, len(numbers), size, "shards"))
            threads = closing.enter_context(Threads(_THREADS, name="torchcache-index"))
            futures = [(number, threads.submit(self._read, shards[number])) for number in numbers]
            kept = 0
            try:
                for number, future in futures:
                    made[number] = future.result()
                    if on_progress is not None:
                        on_progress(1, shards[number].size)
                    if len(made) - kept >= _KEPT_TOGETHER:
                        self._keep(shards, numbers[kept : len(made)], made)
                        kept = len(made)
            except BaseException:
                for _, future in futures:
                    future.cancel()
                raise
            finally:
                # Also what was made before a shard that is damaged, or Ctrl-C: the next start goes on from there.
                self._keep(shards, numbers[kept : len(made)], made)
        return made

    def _read(self, info: ObjectInfo) -> ShardIndex:
        where = self._pool.uri(info.id)
        in_parts = isinstance(self._format, BlockFormat) and codec_of(info.id.key) is None
        file = (open_parts if in_parts else open_shard)(self._pool, info, self._namespace)
        return index_of(file, info, self._format, where)

    def _keep(
        self, shards: Sequence[ObjectInfo], numbers: Sequence[int], made: Mapping[int, ShardIndex]
    ) -> None:
        try:
            self._pool.write(
                NAMESPACE, [(self._object(shards[i]).id, [made[i].to_record()]) for i in numbers]
            )
        except (OutOfSpace, TransientError, IntegrityError) as error:
            _log.warning(
                "the indices of %s are not kept, and made again next time: %s", self._namespace, error
            )
