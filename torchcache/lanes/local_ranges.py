"""Parts of chunks, and extents of several chunks, out of mapped segments."""

from __future__ import annotations

import pyarrow as pa

from torchcache.lanes.copying import copy, hashed_copy
from torchcache.lanes.local_records import Known, is_intact
from torchcache.lanes.local_store import LocalStore
from torchcache.model import CHUNK_BYTES, Extent
from torchcache.records import CHUNK_INDEX


class Damaged(Exception):
    """The bytes aren't as they were stored."""


def lent(known: Known, extent: Extent) -> memoryview | None:
    """A view of an extent that lies in the record `known`, not verified; None if it doesn't."""
    _, offset, length = extent
    stop = known.object_size if length < 0 else offset + length
    start = known.start + offset - known.chunk_index * CHUNK_BYTES
    end = start + stop - offset
    return known.view[start:end] if known.start <= start <= end <= known.end else None


def read_range(
    store: LocalStore, first: Known, extent: Extent, target: memoryview | None
) -> memoryview | None:
    """The bytes of an extent, whose first byte lies in the record `first`: a view, or the filled part of `target`.

    None if they aren't all here, or aren't to be had: beyond the object, or too many for `target`. Raises Damaged;
    OSError for what the disk can't read.
    """
    _, offset, length = extent
    size = first.object_size
    stop = size if length < 0 else offset + length
    if not 0 <= offset <= stop <= size or (target is not None and len(target) < stop - offset):
        return None
    if stop <= (first.chunk_index + 1) * CHUNK_BYTES:
        return _part(first, offset, stop, target if target is None else target[: stop - offset])
    records = _rest(store, first, extent, stop)
    if records is None:
        return None
    whole = target[: stop - offset] if target is not None else _allocated(stop - offset)
    at = 0
    for known in (first, *records):
        chunk_start = known.chunk_index * CHUNK_BYTES
        start = max(offset, chunk_start)
        end = min(stop, chunk_start + known.end - known.start)
        _part(known, start, end, whole[at : at + end - start])
        at += end - start
    return whole if target is not None else whole.toreadonly()


def _part(known: Known, offset: int, stop: int, target: memoryview | None) -> memoryview:
    """The bytes [offset, stop) of the object, which lie in one record."""
    start = known.start + offset - known.chunk_index * CHUNK_BYTES
    end = start + stop - offset
    is_whole = (start, end) == (known.start, known.end)
    source = known.view[start:end]
    if target is None or not is_whole:
        if not is_intact(known, start, end):
            raise Damaged
        if target is None:
            return source
    if not is_whole:
        copy(source, target)
    elif hashed_copy(source, target) != known.digest:
        raise Damaged
    return target


def _rest(store: LocalStore, first: Known, extent: Extent, stop: int) -> list[Known] | None:
    """The records behind the first, up to the one that holds the byte before `stop`; None if one isn't here."""
    id_ = extent.object.id
    chunks = range(first.chunk_index + 1, (stop - 1) // CHUNK_BYTES + 1)
    found = store.look_up([id_.digest + CHUNK_INDEX.pack(index) for index in chunks])
    records = []
    for index, place in zip(chunks, found.places, strict=True):
        known = found.warm.get(place) or found.learn(place)
        if (
            known is None
            or (known.identity, known.chunk_index) != (id_.encoded, index)
            or known.object_size != first.object_size
        ):
            return None
        known.mapped.used = found.count
        records.append(known)
    return records


def _allocated(size: int) -> memoryview:
    """Memory that is not cleared: Arrow's pool hands out pages that were used before."""
    return memoryview(pa.allocate_buffer(size)).cast("B")
