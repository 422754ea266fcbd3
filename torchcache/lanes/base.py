"""The contract of a lane: a way for bytes to travel between this process and one server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torchcache.errors import TorchCacheError
from torchcache.model import Extent, ObjectId

Buffer = bytes | bytearray | memoryview
"""What callers hand over: contiguous bytes."""

Outcome = memoryview | TorchCacheError
"""Of one extent: its bytes, or why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read. `resident_only`: nothing is fetched. `suspect`: the server first proves what it holds on disk."""

    namespace: str = ""
    resident_only: bool = False
    suspect: bool = False


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
        part of the buffer. Never raises an error of the server or the wire: extents that came before it are good,
        the others carry it.
        """

    def write(
        self,
        namespace: str,
        objects: Sequence[tuple[ObjectId, Sequence[Buffer]]],
        *,
        durable: bool,
        deadline: float,
    ) -> int:
        """Stores whole objects in one call; returns the bytes acknowledged."""
