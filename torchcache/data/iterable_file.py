"""A shard as a file: one version of one object, read through the pool."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Final

from torchcache.errors import ObjectChanged, ObjectNotFound, TorchCacheError
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool

BUFFER_BYTES: Final = 4 * 1024 * 1024
"""What is read at once of a shard that is read from the front, and the memory it holds while it is open."""


def open_shard(pool: Pool, info: ObjectInfo, namespace: str) -> BinaryIO:
    """The shard `info`, to be read from the front. Raises ObjectChanged and ObjectNotFound naming it."""
    return io.BufferedReader(_Shard(pool, info, namespace), max(1, min(BUFFER_BYTES, info.size)))


def open_parts(pool: Pool, info: ObjectInfo, namespace: str) -> BinaryIO:
    """The shard `info`, of which just the bytes are read that are asked for. Raises as `open_shard`."""
    return io.BufferedReader(
        _Shard(pool, info, namespace), 1
    )  # it reads what is larger than its buffer as it is


class _Shard(io.RawIOBase):
    def __init__(self, pool: Pool, info: ObjectInfo, namespace: str) -> None:
        super().__init__()
        self._pool = pool
        self._info = info
        self._namespace = namespace
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._info.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")[: max(0, self._info.size - self._at)]
        if target:
            extent = Extent(self._info, self._at, len(target))
            try:
                self._pool.read([extent], namespace=self._namespace, into=[target])
            except (ObjectNotFound, ObjectChanged) as error:
                raise explained(self._pool, self._info, error) from error
        self._at += len(target)
        return len(target)


def explained(pool: Pool, info: ObjectInfo, error: ObjectNotFound | ObjectChanged) -> TorchCacheError:
    """That a shard is no longer what was listed, in the user's terms."""
    uri = pool.uri(info.id)
    happened = "is gone" if isinstance(error, ObjectNotFound) else "has changed"
    return type(error)(
        f"the shard {uri} {happened} since this dataset was created: create it again, it lists the shards anew",
        object=uri,
        server=error.server,
        request_id=error.request_id,
    )
