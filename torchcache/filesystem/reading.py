"""Objects opened for reading."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from torchcache.filesystem.entries import Entry, file_entry
from torchcache.model import Extent, ObjectInfo

if TYPE_CHECKING:
    from torchcache.pool import Pool

READ_AHEAD_BYTES = 4 * 1024 * 1024
"""The most that is read beyond what was asked for, and the memory an open file holds."""

FIRST_READ_BYTES = 256 * 1024
"""What a first read, or one after a jump, fetches. It doubles as long as the reader goes straight on."""


class _ExtentReader(io.RawIOBase):
    """Raw reads of one version of one object, each one call of the pool, straight into the caller's buffer."""

    def __init__(self, pool: Pool, object: ObjectInfo, *, namespace: str, buffer_bytes: int) -> None:
        super().__init__()
        self._pool = pool
        self._object = object
        self._namespace = namespace
        self._buffer_bytes = buffer_bytes
        self._position = 0
        self._expected = -1  # the position from which a read would go straight on
        self._ahead_bytes = FIRST_READ_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._object.size}[whence]
        if base + offset < 0:
            raise ValueError(f"can't seek to {base + offset}, before the start of {self._object.id}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer`; where it is the reader's own look-ahead, perhaps only the front of it."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._object.size - self._position))
        if len(view) <= self._buffer_bytes:
            self._adapt()
            wanted = min(wanted, self._ahead_bytes)
        if wanted:
            extent = Extent(self._object, self._position, wanted)
            self._pool.read([extent], namespace=self._namespace, into=[view[:wanted]])
        self._position += wanted
        self._expected = self._position
        return wanted

    def readall(self) -> bytes:
        rest = self._object.size - self._position
        if rest <= 0:
            return b""
        [data] = self._pool.read([Extent(self._object, self._position, rest)], namespace=self._namespace)
        self._position = self._expected = self._object.size
        return bytes(data)

    def _adapt(self) -> None:
        if self._position == self._expected:
            self._ahead_bytes = min(2 * self._ahead_bytes, self._buffer_bytes)
        else:
            self._ahead_bytes = FIRST_READ_BYTES


class ObjectFile(io.BufferedReader):
    """An object opened for reading, pinned to the version it had when it was opened.

    Reads ahead by at most `READ_AHEAD_BYTES`; a read larger than that goes into the caller's memory without passing
    through the look-ahead. A read raises ObjectChanged when the object was replaced and the pool doesn't hold the
    version that was opened.
    """

    mode = "rb"

    def __init__(self, pool: Pool, object: ObjectInfo, *, path: str, namespace: str) -> None:
        buffer_bytes = max(1, min(READ_AHEAD_BYTES, object.size))
        super().__init__(
            _ExtentReader(pool, object, namespace=namespace, buffer_bytes=buffer_bytes),
            buffer_size=buffer_bytes,
        )
        self.path = path
        self.size = object.size
        self.details: Entry = file_entry(path, object)

    def info(self) -> Entry:
        """fsspec's entry of the version that is open."""
        return self.details
