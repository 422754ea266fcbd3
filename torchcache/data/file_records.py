"""Samples that are records of a fixed size within the objects of an under-store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchcache import environment
from torchcache.data.buffer_pool import default_buffers
from torchcache.data.files import FileSamples
from torchcache.data.formats.base import place
from torchcache.data.manifest import Manifest
from torchcache.data.mapped_ints import MappedInts
from torchcache.data.outputs import Landing
from torchcache.data.samples import OnMissing, OnProgress, residency_of, windows
from torchcache.errors import ConfigurationError
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Residency


class FileRecords(FileSamples):
    """The records of the objects that FileSamples would hold, in their order: `record_bytes` each, end to end."""

    def __init__(self, *arguments: Any, record_bytes: int, **options: Any) -> None:
        """As FileSamples. Raises ConfigurationError too where an object isn't a whole number of records."""
        if not isinstance(record_bytes, int) or record_bytes <= 0:
            raise ConfigurationError(
                f"record_bytes={record_bytes!r} is no size: it is a number of bytes above 0"
            )
        self._record_bytes = record_bytes
        super().__init__(*arguments, **options)

    def _adopt(self, manifest: Manifest) -> None:
        firsts = np.zeros(len(manifest) + 1, np.int64)
        at = 0
        for sizes in manifest.size_parts():
            counts, beyond = np.divmod(sizes, self._record_bytes)
            if len(torn := np.flatnonzero(beyond)):
                raise self._torn(manifest[at + int(torn[0])])
            firsts[at + 1 : at + 1 + len(counts)] = counts
            at += len(counts)
        np.cumsum(firsts, out=firsts)
        # Of each object the number of its first record, and at the end that of all records.
        self._firsts = MappedInts.write(firsts, environment.home() / "manifests")
        self._count = int(firsts[-1])
        super()._adopt(manifest)

    def _torn(self, object: ObjectInfo) -> ConfigurationError:
        uri = self._pool.uri(object.id)
        return ConfigurationError(
            f"{uri} has {object.size} bytes, which is no whole number of records of {self._record_bytes}: give the "
            "right record_bytes=, or a pattern= that leaves it out",
            object=uri,
        )

    def _files(self, records: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The object that each record lies in."""
        return np.searchsorted(self._firsts.array(), records, side="right") - 1

    def _renew(self, indices: Sequence[int], uri: str | None) -> bool:
        """Never: it may have other records."""
        return False

    def __len__(self) -> int:
        return self._count

    def _read_into_buffers(self, indices: Sequence[int]) -> Landing:
        """Records that follow one another in an object are read as one: so its chunks come whole, for the most part."""
        records = np.asarray(indices, dtype=np.int64)
        files = self._files(records)
        follows = (np.diff(records) == 1) & (np.diff(files) == 0)
        starts = np.flatnonzero(np.concatenate(([True], ~follows)))
        counts = np.diff(np.append(starts, len(records))).tolist()
        firsts = self.extents(records[starts].tolist())
        runs = [
            Extent(object, offset, size * count)
            for (object, offset, size), count in zip(firsts, counts, strict=True)
        ]
        landing = Landing([self._record_bytes] * len(indices), self._buffers or default_buffers)
        self._read(runs, landing.joined_targets(counts))
        return landing

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        records = np.asarray(indices, dtype=np.int64)
        files = self._files(records)
        offsets = ((records - self._firsts.array()[files]) * self._record_bytes).tolist()
        objects = self._manifest.take(files.tolist())
        size = self._record_bytes
        return [Extent(object, offset, size) for object, offset in zip(objects, offsets, strict=True)]

    def stage(
        self,
        indices: Sequence[int],
        *,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        on_missing: OnMissing | None = None,
    ) -> None:
        """Brings the objects of these records, whole, in the order in which they are first needed."""
        staged: set[int] = set()
        for window in windows(indices):
            if cancelled():
                return
            files = self._files(window)
            new = [file for file in dict.fromkeys(files.tolist()) if file not in staged]
            staged.update(new)
            self._pool.stage(
                self._manifest.take(new),
                namespace=self.uri,
                on_progress=lambda _, size_bytes: on_progress(0, size_bytes),
                cancelled=cancelled,
                on_missing=on_missing,
            )
            on_progress(len(window), 0)

    def residency(self) -> Residency:
        """Of the objects."""
        return residency_of(self._pool, self._manifest.__getitem__, len(self._manifest))

    def identity(self) -> dict[str, str | int]:
        return {**super().identity(), "record_bytes": self._record_bytes}

    def keys(self) -> list[str]:
        """Of each record the key of its object."""
        counts = np.diff(self._firsts.array()).tolist()
        return [key for key, count in zip(super().keys(), counts, strict=True) for _ in range(count)]

    def name(self, index: int) -> str:
        object, offset, _ = self.extents([index])[0]
        return place(self._pool.uri(object.id), offset // self._record_bytes)

    def describe(self) -> str:
        return (
            f".from_files({self.uri!r}, pattern={self._pattern!r}, record_bytes={self._record_bytes}: {len(self):,} "
            f"records in {len(self._manifest):,} objects, {self.total_bytes:,} bytes)"
        )
