"""The memory that reads land in, and the cutting of what is written. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from torchcache.errors import ConfigurationError
from torchcache.lanes.base import Buffer, Data, Passing, Row, Scattered, contiguous, tell
from torchcache.model import CHUNK_BYTES, Extent, ObjectId, ObjectInfo

CALL_BYTES: Final = 256 * 1024 * 1024
"""Payload of one write call, about. So much fills four segments of the store."""

_MORE_BYTES: Final = 128 * 1024
"""A call may exceed it by: of a file that frames make a little longer the end isn't worth a call of its own."""

CALL_OBJECTS: Final = 16_384

_MOST_PARTS: Final = 64
"""Of one chunk. More, and handling each costs more than copying them."""


def flat(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous buffer. Raises ConfigurationError if it is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ConfigurationError("a buffer must be contiguous: copy it first")
    # An empty view of several dimensions can't be cast.
    return (
        view if view.format == "B" and view.ndim == 1 else view.cast("B") if view.nbytes else memoryview(b"")
    )


def targets(extents: Sequence[Extent], into: Sequence[memoryview] | None) -> list[memoryview | None]:
    """The buffers to fill, as writable bytes, one an extent; None where the caller gave none.

    Raises ConfigurationError for another number of buffers, one that is read-only or one that is too short.
    """
    if into is None:
        return [None] * len(extents)
    if len(into) != len(extents):
        raise ConfigurationError(f"{len(into)} buffers were given for {len(extents)} extents")
    views = [buffer if _is_flat(buffer) else flat(buffer) for buffer in into]
    for ((id_, size), offset, length), view in zip(extents, views, strict=True):
        needed = length if length >= 0 else size - offset  # below 0 where the size isn't known
        if len(view) < needed:
            raise ConfigurationError(
                f"{needed} bytes don't fit the buffer of {len(view)} given for them", object=str(id_)
            )
        if view.readonly and len(view):
            raise ConfigurationError("a buffer to read into is read-only", object=str(id_))
    return [*views]


def _is_flat(buffer: Buffer) -> bool:
    return type(buffer) is memoryview and buffer.format == "B" and buffer.ndim == 1 and buffer.c_contiguous


def allocate(length: int) -> memoryview:
    """Writable memory of `length` bytes, not cleared: Arrow's pool hands out pages that were used before."""
    return memoryview(pa.allocate_buffer(length)).cast("B") if length else memoryview(bytearray())


@dataclass(frozen=True, slots=True)
class WriteCall:
    """What one do_put carries. `rows` point into `objects`."""

    objects: list[ObjectInfo]
    rows: list[Row]


def write_calls(
    objects: Sequence[tuple[ObjectId, Sequence[Buffer]]], passing: Passing | None = None
) -> Iterator[WriteCall]:
    """The chunks of `objects`, in calls of about `CALL_BYTES`. A large object spans several.

    `passing` is of one object, and told of its bytes.
    """
    call = WriteCall([], [])
    size = 0
    for id_, parts in objects:
        views = [flat(part) for part in parts]
        info = ObjectInfo(id_, sum(len(view) for view in views))
        place = -1
        for index, data in enumerate(chunks(views, passing)):
            if size and (size + data.size > CALL_BYTES + _MORE_BYTES or len(call.objects) >= CALL_OBJECTS):
                yield call
                call, size, place = WriteCall([], []), 0, -1
            if place < 0:
                place = len(call.objects)
                call.objects.append(info)
            call.rows.append((place, index, data))
            size += data.size
    if call.rows:
        yield call


def chunks(views: Sequence[memoryview], passing: Passing | None = None) -> Iterator[Data]:
    """The concatenation of `views` in chunks, each of which may span several. Nothing is one chunk.

    Only what many small views make together is copied.
    """
    held: list[memoryview] = []
    start = held_bytes = 0
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + CHUNK_BYTES - held_bytes]
            held.append(part)
            held_bytes += len(part)
            at += len(part)
            if held_bytes == CHUNK_BYTES:
                yield _data(held, start, passing)
                start += CHUNK_BYTES
                held, held_bytes = [], 0
    if held or not any(len(view) for view in views):
        yield _data(held, start, passing)


def _data(parts: Sequence[memoryview], start: int, passing: Passing | None) -> Data:
    if passing is None and len(parts) <= 1:
        return pa.py_buffer(parts[0] if parts else b"")
    data = Scattered(parts, passing)
    if len(parts) <= _MOST_PARTS:
        return data
    tell(data, start)
    return contiguous(data)
