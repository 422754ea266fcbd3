"""What the two forms of CachedDataset have in common: the contract between the dataset and where its samples lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torchcache.errors import TorchCacheError
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool, Residency

OnProgress = Callable[[int, int], None]
"""Gets (samples, bytes) just done, in the caller's thread."""

OnMissing = Callable[[ObjectInfo, TorchCacheError], None]
"""Gets an object that can't be staged, and why."""

_WINDOW = 4096


class Samples(Protocol):
    """Samples behind the cache, by index from 0 to len - 1. Pickles; opens nothing before first use."""

    def __len__(self) -> int: ...

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all samples; None if not known beforehand."""

    def read(self, indices: Sequence[int]) -> list[Any]:
        """The samples of `indices`, in order, by one call to the pool. Each is the caller's own."""

    @property
    def stored_under(self) -> str | None:
        """The namespace that servers fetch the samples into; None where none can, since they are computed."""

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        """Where the samples lie."""

    def stage(
        self,
        indices: Sequence[int],
        *,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        on_missing: OnMissing | None = None,
    ) -> None:
        """Brings what is missing of `indices` into the pool, in that order.

        `on_missing` gets what can't be, and why; without it the first error is raised.
        """

    def absent(self) -> Iterator[tuple[ObjectInfo, TorchCacheError]]:
        """What the pool doesn't hold now, as if it had been staged."""

    def residency(self) -> Residency:
        """How much of the samples the pool holds now."""

    def identity(self) -> dict[str, str | int]:
        """What must be equal for two datasets to hold the same samples at the same indices. Values are plain."""

    def keys(self) -> list[str]:
        """What each sample is called. Raises ConfigurationError if they have no names."""

    def name(self, index: int) -> str:
        """What a sample is called in errors and logs."""

    def describe(self) -> str:
        """For repr: what stands behind the class's name."""


def windows(indices: Sequence[int], size: int = _WINDOW) -> Iterator[Sequence[int]]:
    """`indices` in pieces of `size`: no list of a million objects is ever made."""
    return (indices[at : at + size] for at in range(0, len(indices), size))


def residency_of(pool: Pool, objects: Callable[[int], ObjectInfo], count: int) -> Residency:
    """The residency of objects 0 to `count` - 1."""
    found = [pool.residency([objects(i) for i in window]) for window in windows(range(count))]
    return Residency(
        objects=sum(r.objects for r in found),
        resident_objects=sum(r.resident_objects for r in found),
        bytes=sum(r.bytes for r in found),
        resident_bytes=sum(r.resident_bytes for r in found),
    )
