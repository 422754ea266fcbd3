"""Shards that are compressed as a whole: .zst and .gz. They have no random access: they are read as streams."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Final

import pyarrow as pa

from torchcache.data.formats.base import damaged
from torchcache.errors import TorchCacheError

CODECS: Final = {".zst": "zstd", ".gz": "gzip"}

MOST_TIMES: Final = 1000
MOST_FLOOR_BYTES: Final = 64 * 1024 * 1024
"""A shard may unpack to a thousand times its size and 64 MiB: more is taken for a bomb."""

MOST_HELD_BYTES: Final = 4 << 30
"""The most that a compressed shard of a block format, which is held whole, may unpack to."""


class Unpacked(io.RawIOBase):
    """What a compressed stream of `size_bytes` holds. Raises IntegrityError for a damaged one, and for a bomb."""

    def __init__(self, stream: BinaryIO, codec: str, size_bytes: int, where: str) -> None:
        super().__init__()
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)
        self._most_bytes = MOST_TIMES * size_bytes + MOST_FLOOR_BYTES
        self._where = where
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = int(self._stream.readinto(buffer))
        except TorchCacheError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise damaged(self._where, f"it can't be unpacked beyond byte {self._at:,}: {error}") from error
        self._at += count
        if self._at > self._most_bytes:
            raise damaged(
                self._where, f"it unpacks to more than {self._most_bytes:,} bytes: a compression bomb"
            )
        return count


def unpacked(stream: BinaryIO, codec: str, size_bytes: int, where: str) -> BinaryIO:
    """`stream`, unpacked, to be read from the front."""
    return io.BufferedReader(Unpacked(stream, codec, size_bytes, where), 1 << 20)


def held_whole(stream: BinaryIO, where: str) -> BinaryIO:
    """An unpacked stream in memory, so that one can seek in it."""
    whole = io.BytesIO()
    while data := stream.read(1 << 20):
        if whole.tell() + len(data) > MOST_HELD_BYTES:
            raise damaged(
                where, f"it unpacks to more than the {MOST_HELD_BYTES:,} bytes that are held in memory"
            )
        whole.write(data)
    whole.seek(0)
    return whole
