"""Raw records of one size: no framing at all, as CIFAR's binary files or arrays of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcache.data.formats.base import MAX_RECORD_BYTES, RecordFormat, Stream, damaged, place, read_exactly
from torchcache.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Raw(RecordFormat):
    """Records of `record_bytes` each, behind `header_bytes` that belong to none. A sample is `bytes`."""

    name: ClassVar[str] = "raw"
    suffixes: ClassVar[tuple[str, ...]] = ()

    record_bytes: int
    header_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.record_bytes <= MAX_RECORD_BYTES or not 0 <= self.header_bytes <= MAX_RECORD_BYTES:
            raise ConfigurationError(
                f"record_bytes={self.record_bytes}, header_bytes={self.header_bytes}: a raw record has from 1 to "
                f"{MAX_RECORD_BYTES:,} bytes, and a header no more than that"
            )

    @property
    def identity(self) -> str:
        return f"raw-{self.header_bytes}-{self.record_bytes}"

    def frames(self, stream: Stream, where: str) -> Iterator[tuple[int, bytes]]:
        at = len(read_exactly(stream, self.header_bytes, where)) if self.header_bytes else 0
        while frame := read_exactly(stream, self.record_bytes, where):
            if len(frame) < self.record_bytes:
                raise damaged(
                    where, f"{len(frame)} bytes are left at byte {at}: no record of {self.record_bytes}"
                )
            yield at, frame
            at += len(frame)

    def starts(self, size_bytes: int, where: str) -> NDArray[np.uint64]:
        count, left = divmod(max(0, size_bytes - self.header_bytes), self.record_bytes)
        if left:
            end = size_bytes - left
            raise damaged(where, f"{left} bytes are left at byte {end}: no record of {self.record_bytes}")
        return np.arange(count + 1, dtype=np.uint64) * np.uint64(self.record_bytes) + np.uint64(
            self.header_bytes
        )

    def record(self, frame: memoryview, url: str, number: int) -> bytes:
        where = place(url, number)
        if len(frame) < self.record_bytes:
            raise damaged(where, f"it has {len(frame)} of {self.record_bytes} bytes")
        return bytes(frame[: self.record_bytes])
