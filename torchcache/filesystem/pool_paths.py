"""What a path of the protocol means to a pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from torchcache.errors import ObjectNotFound, TorchCacheError
from torchcache.filesystem.entries import Entry, file_entry
from torchcache.model import ObjectId, ObjectInfo

if TYPE_CHECKING:
    from torchcache.pool import Pool

_STAT_THREADS = 8


class PoolPaths:
    """Paths `store/key`, without protocol, to URIs and objects of `pool`, and back."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def uri(self, path: str) -> str:
        """Raises ConfigurationError if the pool has no under-store of that name."""
        store, _, key = path.partition("/")
        return self._pool.uri(ObjectId(store, key, ""))

    def namespace(self, object: ObjectInfo) -> str:
        """The URI of the object's folder: what is read from one folder is stored, and evicted, together."""
        return self._pool.uri(object.id).rpartition("/")[0]

    def under_stores(self) -> list[str]:
        return sorted({u.name for server in self._pool.status() for u in server.under_stores})

    def object(self, path: str) -> ObjectInfo:
        """The object at `path`, at its current version. Raises ObjectNotFound."""
        if "/" not in path:
            raise ObjectNotFound(f"torchcache://{path} is not a file: a path is <under-store>/<key>")
        return self._pool.stat(self.uri(path))

    def objects_at(self, paths: Sequence[str]) -> dict[str, ObjectInfo | TorchCacheError]:
        """The object at each path, or the error in its place."""

        def attempt(path: str) -> ObjectInfo | TorchCacheError:
            try:
                return self.object(path)
            except TorchCacheError as error:
                return error

        unique = list(dict.fromkeys(paths))
        if len(unique) < 2:
            return {path: attempt(path) for path in unique}
        with ThreadPoolExecutor(min(_STAT_THREADS, len(unique))) as threads:
            return dict(zip(unique, threads.map(attempt, unique), strict=True))

    def entries(self, path: str) -> Iterator[Entry]:
        """Entries of all objects below the folder `path`. Raises ObjectNotFound if its bucket is missing."""
        folder = self.uri(path).rstrip("/") + "/"
        store = path.partition("/")[0]
        for object in self._pool.list(folder):
            if object.id.store == store:
                yield file_entry(f"{store}/{object.id.key}", object)
            else:  # a more particular under-store covers this folder
                yield file_entry(f"{path}/{self._pool.uri(object.id).removeprefix(folder)}", object)
