"""The contract of a lane: a way for bytes to travel between this process and one server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import pyarrow as pa

from torchcache.errors import TorchCacheError
from torchcache.model import Extent, ObjectInfo

Buffer = bytes | bytearray | memoryview
"""What callers hand over: contiguous bytes."""

Outcome = memoryview | TorchCacheError
"""Of one extent: its bytes, or why not."""


Passing: TypeAlias = Callable[[int, memoryview], None]
"""Told of each piece of an object before it is sent, or copied to be sent: where it begins in the object, and itself.

From several threads, in any order, and again if it is sent again."""


class Scattered:
    """Bytes that lie in several places, one behind the other. `size` of all of them.

    Whoever sends them tells `passing` of each piece first; see `tell`.
    """

    __slots__ = ("parts", "passing", "size")

    def __init__(self, parts: Sequence[memoryview], passing: Passing | None = None) -> None:
        self.parts = tuple(parts)
        self.passing = passing
        self.size = sum(map(len, self.parts))

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)


Data: TypeAlias = pa.Buffer | Scattered

Row = tuple[int, int, Data]
"""A chunk to write: the place of its object in the call, the number of the chunk in the object, its bytes."""


def parts_of(data: Data) -> tuple[memoryview, ...]:
    """The bytes where they lie. None of no bytes."""
    if isinstance(data, Scattered):
        return data.parts
    return (memoryview(data).cast("B"),) if data.size else ()


def contiguous(data: Data) -> pa.Buffer:
    """The bytes in one place: copied if they aren't yet."""
    if not isinstance(data, Scattered):
        return data
    return pa.py_buffer(data.parts[0] if len(data.parts) == 1 else bytes(data))


def tell(data: Data, offset: int, pieces: Iterable[memoryview] | None = None) -> None:
    """Says that `data`, or `pieces` of it, are about to be sent, from `offset` of the object on."""
    if isinstance(data, Scattered) and data.passing is not None:
        for piece in data.parts if pieces is None else pieces:
            data.passing(offset, piece)
            offset += len(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read. `resident_only`: nothing is fetched. `suspect`: the server first proves what it holds on disk.

    `as_bytes`: the reader makes `bytes` of every view. A lane may do it, more cheaply: then the view is of all of a
    `bytes`, its `obj`. `lend`: where a buffer was given, a lane may return a read-only view of its own memory instead
    of filling it, and leaves it to the caller to verify that. `hedge`: another server is late with the same.
    `passed_over` are ids of servers that are asked last, and why: the server tells people. `request_id` is what its
    log calls the read; "": the lane makes one up.
    """

    namespace: str = ""
    resident_only: bool = False
    suspect: bool = False
    as_bytes: bool = False
    lend: bool = False
    hedge: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()
    request_id: str = ""


class Lane(Protocol):
    """One server's data door. Thread-safe; `deadline` is a time.monotonic() value."""

    @property
    def name(self) -> str:
        """The lane's name in statistics."""

    def read(
        self,
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        options: ReadOptions,
        *,
        deadline: float,
    ) -> list[Outcome]:
        """One call for all `extents`; every byte of the answer verified, complete and in bounds.

        `into` holds, an extent, the writable buffer to fill or None. An outcome is a read-only view, or the filled
        part of the buffer; with `lend` it may be a view that nobody has verified. Never raises an error of the server
        or the wire: extents that came before it are good, the others carry it.
        """

    def write(
        self,
        namespace: str,
        objects: Sequence[ObjectInfo],
        rows: Iterable[Row],
        *,
        durable: bool,
        deadline: float,
    ) -> int:
        """Stores chunks of `objects`, whose sizes are known, in one call; returns the bytes acknowledged.

        `objects` are distinct. Raises what the server or the wire met.
        """

    def close(self) -> None:
        """Closes this process's connection; the next call opens another."""
