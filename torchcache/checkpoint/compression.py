"""Items compressed one by one, as DCP's ZStandard extension has them: stock torch reads them where zstandard is there.

A compressed item is one zstd frame around what the item would have been. The frame says how much is in it, and is
believed only as far as the item's shape bears it out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import zstandard

from torchcache.errors import ConfigurationError, IntegrityError

DESCRIPTOR: Final = "stream.zstd/1"
"""How `.metadata` names the extension; see torch/distributed/checkpoint/_extension.py."""

_WORTH_IT: Final = 0.9
"""What stays larger than this part of itself is stored as it is: loading that costs no time and no copy."""

LEAST_BYTES: Final = 4096
"""Smaller ones aren't tried: a small tensor is above all its frame, and loads ten times faster without."""

_MOST_OF_AN_OBJECT: Final = 64 * 1024 * 1024
_MOST_RATIO: Final = 256
_AROUND_A_TENSOR: Final = 1024 * 1024

_LEVELS: Final = range(-50, zstandard.MAX_COMPRESSION_LEVEL + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zstd:
    """How to compress. `level` as zstd has it: 1 is fast, 3 usual, 19 slow. `threads` for each item, beside the files,
    of which several are written at a time anyway; -1 is one for each core. Raises ConfigurationError."""

    level: int = 3
    threads: int = 0

    def __post_init__(self) -> None:
        if type(self.level) is not int or self.level not in _LEVELS:
            raise ConfigurationError(
                f"zstd has levels from {_LEVELS[0]} to {_LEVELS[-1]}, and no {self.level!r}"
            )
        if type(self.threads) is not int or not -1 <= self.threads <= 256:
            raise ConfigurationError(f"threads is a number from -1 to 256, not {self.threads!r}")

    @classmethod
    def of(cls, wanted: str | Zstd | None) -> Zstd | None:
        """What users give as `compression`."""
        if wanted is None or isinstance(wanted, Zstd):
            return wanted
        if wanted != "zstd":
            raise ConfigurationError(f"compression must be None, 'zstd' or a Zstd, not {wanted!r}")
        return cls()

    def compress(self, parts: Sequence[bytes | memoryview]) -> bytes | None:
        """One frame around `parts`, one behind the other; None if it isn't worth it."""
        size = sum(map(len, parts))
        threads = (os.cpu_count() or 1) if self.threads < 0 else self.threads
        compressor = zstandard.ZstdCompressor(
            level=self.level, threads=threads, write_content_size=True, write_checksum=False
        ).compressobj(size=size)
        made: list[bytes] = []
        room = int(size * _WORTH_IT)
        for part in parts:
            for at in range(0, len(part), _AROUND_A_TENSOR):
                made.append(compressor.compress(part[at : at + _AROUND_A_TENSOR]))
                room -= len(made[-1])
                if room < 0:
                    return None
        made.append(compressor.flush())
        return b"".join(made) if len(made[-1]) <= room else None


def decompressed_limit(size: int, *, tensor_bytes: int | None) -> int:
    """The most bytes that an item of `size` stored bytes may become: see `decompress`."""
    any_object = max(_MOST_OF_AN_OBJECT, _MOST_RATIO * size)
    return any_object if tensor_bytes is None else tensor_bytes + _AROUND_A_TENSOR


def decompress(blob: bytes | bytearray, *, tensor_bytes: int | None, name: str) -> bytes:
    """What is in the frame. `tensor_bytes` is the size of the tensor that has to be in it; None of another object.

    Raises IntegrityError for what is no frame, or holds more than it may: then no memory is made for it.
    """
    most = decompressed_limit(len(blob), tensor_bytes=tensor_bytes)
    try:
        size = zstandard.frame_content_size(blob)
        if size < 0:  # other writers' frames may not say it
            with zstandard.ZstdDecompressor().stream_reader(blob) as reader:
                found: bytes = reader.read(most + 1)
        elif size > most:
            raise IntegrityError(f"{name!r} says that it is {size} bytes compressed to {len(blob)}: refused")
        else:
            found = zstandard.ZstdDecompressor().decompress(blob)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{name!r} can't be decompressed: {error}") from error
    if len(found) > most:
        raise IntegrityError(f"{name!r} decompresses to more than {most} bytes: refused")
    return found
