"""The limit on one machine: records of one flat file, by preadv into buffers that are used again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class FlatFile:
    """Records of equal `size`, one behind the other."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = size

    def read(self, numbers: Sequence[int], into: Sequence[memoryview]) -> int:
        """Fills one buffer a record; returns the bytes."""
        size, file = self._size, self._file
        done = 0
        for number, buffer in zip(numbers, into, strict=False):
            done += read_whole(file, buffer[:size], number * size)
        return done

    def __enter__(self) -> FlatFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read_whole(file: int, buffer: memoryview, offset: int) -> int:
    """Fills the buffer from `offset` on: one call gives at most 2 GiB, and may give less."""
    done = os.preadv(file, [buffer], offset)
    while done < len(buffer):
        more = os.preadv(file, [buffer[done:]], offset + done)
        if not more:
            raise EOFError(f"the file ends at {offset + done}")
        done += more
    return done


def buffers(count: int, size: int) -> list[memoryview]:
    """Memory that is there: every page of it was written."""
    return [memoryview(bytearray(b"\xff") * size) for _ in range(count)]
