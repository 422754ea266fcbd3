"""The local lane: a client on the server's machine reads the store's files itself. No call, and every byte verified.

One transaction of the index for a batch, then for each extent a slice of a mapped segment and a checksum over it. What
isn't there, isn't sound or isn't as asked, the flight lane reads within the same call: it has it fetched or mended, or
says what is wrong. Large writes go into the store's files too (`local_writing`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import xxhash

from torchcache.errors import TorchCacheError
from torchcache.lanes.base import Lane, Outcome, ReadOptions, Row
from torchcache.lanes.copying import hashed_copy
from torchcache.lanes.local_ranges import Damaged, lent, read_range
from torchcache.lanes.local_store import LocalStore
from torchcache.lanes.local_use import UseReports
from torchcache.lanes.local_writing import LocalWriter, NotWritable
from torchcache.model import CHUNK_BYTES, UNKNOWN_SIZE, Extent, ObjectInfo
from torchcache.records import CHUNK_INDEX

_log = logging.getLogger(__name__)

_packed = CHUNK_INDEX.pack
_hash = xxhash.xxh3_64_intdigest


class LocalLane:
    """Reads and writes the store of one server. What it can't, `flight` does."""

    name = "local"

    def __init__(self, store: LocalStore, flight: Lane, *, writer: LocalWriter, reports: UseReports) -> None:
        self.store = store
        self._flight = flight
        self._writer = writer
        self._reports = reports

    def behind(self, flight: Lane) -> LocalLane:
        """The same, with another flight lane for what it can't do."""
        return LocalLane(self.store, flight, writer=self._writer, reports=self._reports)

    def read(
        self,
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        options: ReadOptions,
        *,
        deadline: float,
    ) -> list[Outcome]:
        """See `Lane.read`."""
        if options.suspect:
            return self._flight.read(extents, into, options, deadline=deadline)
        outcomes: list[Outcome | None] = [None] * len(extents)
        damaged, read_bytes, more_chunks = self._read_here(extents, into, outcomes, options)
        left = [number for number, outcome in enumerate(outcomes) if outcome is None]
        if here := len(outcomes) - len(left):
            read = (
                extents if not left else [e for e, o in zip(extents, outcomes, strict=True) if o is not None]
            )
            self._reports.add(here, here + more_chunks, read_bytes, read)
        if damaged:
            self._reports.add_suspects(len(damaged))
        if left:
            suspects = replace(options, suspect=True)
            for numbers, how in (
                ([n for n in left if n not in damaged], options),
                (sorted(damaged), suspects),
            ):
                if numbers:
                    self._read_there(numbers, extents, into, outcomes, options=how, deadline=deadline)
        return cast(list[Outcome], outcomes)

    def _read_here(  # noqa: PLR0912 - each branch is a few instructions of what every record costs
        self,
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        outcomes: list[Outcome | None],
        options: ReadOptions,
    ) -> tuple[set[int], int, int]:
        """Puts what can be read here in its place.

        Returns which extents were found damaged, the bytes read, and how many chunks beyond the first of each extent.
        """
        store, as_bytes, lend = self.store, options.as_bytes, options.lend
        found = store.look_up([e[0].id.digest + _packed(e[1] // CHUNK_BYTES & 0xFFFFFFFF) for e in extents])
        warm, count = found.warm, found.count
        damaged: set[int] = set()
        read_bytes = more_chunks = 0
        for number, (extent, place, target) in enumerate(zip(extents, found.places, into, strict=True)):
            try:
                known = warm.get(place) or found.learn(place)
                if known is None:
                    continue
                identity, chunk_index, object_size, view, start, end, digest, mapped, _ = known
                info, offset, length = extent
                if identity != info.id.encoded or chunk_index != offset // CHUNK_BYTES:
                    store.records.forget(place)  # by the index it should be another's
                    continue
                if info.size not in (object_size, UNKNOWN_SIZE):
                    continue
                mapped.used = count
                got: memoryview | None = lent(known, extent) if lend and target is not None else None
                if got is not None:
                    pass  # the caller verifies it
                elif offset or end - start != object_size or 0 <= length != object_size:
                    got = read_range(store, known, extent, target)
                    if got is None:
                        continue
                    more_chunks += len(got) // CHUNK_BYTES
                elif target is None:
                    got = view[start:end]
                    if as_bytes:  # before the checksum: what was just written is in the CPU's cache
                        got = memoryview(bytes(got))
                    if _hash(got) != digest:
                        raise Damaged
                else:
                    if len(target) < object_size:
                        continue
                    got = target[:object_size]
                    if hashed_copy(view[start:end], got) != digest:
                        raise Damaged
            except (Damaged, OSError):
                damaged.add(number)
                store.records.forget(place)
            else:
                outcomes[number] = got
                read_bytes += len(got)
        return damaged, read_bytes, more_chunks

    def _read_there(
        self,
        numbers: Sequence[int],
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        outcomes: list[Outcome | None],
        *,
        options: ReadOptions,
        deadline: float,
    ) -> None:
        """Puts what the flight lane says of these extents in their places."""
        asked, targets = [extents[n] for n in numbers], [into[n] for n in numbers]
        try:
            answers = self._flight.read(asked, targets, options, deadline=deadline)
        except TorchCacheError as error:  # nothing could be asked; what was read here is good all the same
            answers = [error] * len(numbers)
        for number, answer in zip(numbers, answers, strict=True):
            outcomes[number] = answer

    def write(
        self,
        namespace: str,
        objects: Sequence[ObjectInfo],
        rows: Iterable[Row],
        *,
        durable: bool,
        deadline: float,
    ) -> int:
        """See `Lane.write`. Much is written into the store's files; little, and what can't be, goes by `flight`."""
        rows = list(rows)
        try:
            written = self._writer.write(namespace, objects, rows, durable=durable, deadline=deadline)
        except NotWritable as error:
            _log.debug("a write goes by the flight lane: %s", error)
            return self._flight.write(namespace, objects, rows, durable=durable, deadline=deadline)
        self._reports.wrote()
        return written

    def close(self) -> None:
        """See `Lane.close`."""
        self._reports.close()
        self.store.close()
        self._flight.close()
