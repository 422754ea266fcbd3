"""The fsspec protocol `torchcache`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.spec import AbstractFileSystem

from torchcache.errors import AlreadyExists, ConfigurationError, ObjectNotFound, TorchCacheError
from torchcache.filesystem.entries import Entry, entries_under, file_entry, folder_entry
from torchcache.filesystem.pool_paths import PoolPaths
from torchcache.filesystem.reading import ObjectFile
from torchcache.filesystem.writing import LayeredWriter, SpoolFile, TextWriter
from torchcache.model import Extent, ObjectInfo

if TYPE_CHECKING:
    from torchcache.local_pool import LocalPool
    from torchcache.pool import Pool

_COPY_BYTES = 32 * 1024 * 1024

OnError = Literal["raise", "omit", "return"]


class TorchCacheFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Objects of the under-stores, read and written through a pool: `torchcache://s3/bucket/key`.

    The first segment of a path is the name of an under-store as the pool's servers know it; an embedded pool has `s3`
    and `file`. Reads come from the cache and fill it; a file is pinned to the version it had when it was opened.
    Writes go through the pool to the under-store and are visible, whole, when `close` returns.

    `pool` is what `torchcache.connect` takes: an address, a `Pool`, or None for `TORCHCACHE_POOL` or the embedded
    pool. Nothing is opened before the first use; the file system pickles, and may be used after a fork.

    There are no folders but those that keys imply: `mkdir`, `makedirs` and `rmdir` do nothing. `mv` is a copy and a
    delete, not atomic. Appending is not possible. A missing path is FileNotFoundError (ObjectNotFound), one that must
    not exist FileExistsError; anything else is an error of `torchcache.errors`. Unlike fsspec's base class, `exists`,
    `isfile` and `isdir` answer False only where nothing is there, and raise when that can't be found out.
    """

    protocol = "torchcache"

    def __init__(self, pool: str | Pool | LocalPool | None = None, **storage_options: Any) -> None:
        super().__init__(pool=pool, **storage_options)
        self._address = pool
        self._connected: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The pool behind the file system."""
        if self._connected is None:
            from torchcache.connecting import connect

            self._connected = connect(self._address)
        return self._connected

    @property
    def _paths(self) -> PoolPaths:
        return PoolPaths(self.pool)

    # ---- what is there ----

    def info(self, path: str, **kwargs: Any) -> Entry:
        path = self._strip_protocol(path)
        if not path or ("/" not in path and path in self._paths.under_stores()):
            return folder_entry(path)
        try:
            return file_entry(path, self._paths.object(path))
        except ObjectNotFound:
            is_folder = any(True for _ in self._paths.entries(path))
        except ConfigurationError:
            # A bucket is a folder, though an empty one, if it can be listed. Anything else is as wrong for a listing.
            is_folder = any(True for _ in self._paths.entries(path)) or path.count("/") == 1
        if not is_folder:
            raise ObjectNotFound(f"there is no {self.unstrip_protocol(path)}", object=self._paths.uri(path))
        return folder_entry(path)

    def exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        return self._type_of(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type_of(path) == "directory"

    def _type_of(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path:
            files, folders = entries_under(path, self._paths.entries(path), maxdepth=1)
            found = files | folders
        else:
            found = {name: folder_entry(name) for name in self._paths.under_stores()}
        if not found:
            entry = self.info(path)
            found = {path: entry} if entry["type"] == "file" else {}
        entries = [found[name] for name in sorted(found)]
        return entries if detail else [entry["name"] for entry in entries]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        path = self._strip_protocol(path)
        if not path:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **kwargs)
        try:
            files, folders = entries_under(path, self._paths.entries(path), maxdepth=maxdepth)
        except FileNotFoundError:
            files, folders = {}, {}
        if withdirs and (files or folders):
            files |= folders | {path: folder_entry(path)}
        if not files and self.isfile(path):
            files = {path: file_entry(path, self._paths.object(path))}
        return {name: files[name] for name in sorted(files)} if detail else sorted(files)

    def du(
        self,
        path: str,
        total: bool = True,
        maxdepth: int | None = None,
        withdirs: bool = False,
        **kwargs: Any,
    ) -> Any:
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True)
        sizes = {name: entry["size"] for name, entry in found.items()}
        return sum(sizes.values()) if total else sizes

    def ukey(self, path: str) -> str:
        """The version of a file: equal only for equal contents."""
        return str(self._paths.object(self._strip_protocol(path)).id)

    # ---- reading ----

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        object = self._paths.object(self._strip_protocol(path))
        [data] = self.pool.read([_extent(object, start, end)], namespace=self._paths.namespace(object))
        return bytes(data)

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | Sequence[int | None] | None,
        ends: int | Sequence[int | None] | None,
        max_gap: int | None = None,
        on_error: OnError = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """The bytes [start, end) of each path, all fetched together; an exception in the place of one that failed.

        `max_gap` changes nothing: a request carries many ranges, so that none need be merged.
        """
        first = [starts] * len(paths) if starts is None or isinstance(starts, int) else list(starts)
        last = [ends] * len(paths) if ends is None or isinstance(ends, int) else list(ends)
        if not len(paths) == len(first) == len(last):
            raise ConfigurationError(
                f"{len(paths)} paths, {len(first)} starts and {len(last)} ends don't match"
            )
        names = [self._strip_protocol(path) for path in paths]
        objects = self._paths.objects_at(names)
        outcomes = self._read_each([objects[name] for name in names], first, last)
        return _raise_first(outcomes) if on_error == "raise" else outcomes

    def cat(self, path: Any, recursive: bool = False, on_error: OnError = "raise", **kwargs: Any) -> Any:
        paths = self.expand_path(path, recursive=recursive)
        if isinstance(path, str) and paths == [self._strip_protocol(path)]:
            return self.cat_file(paths[0], **kwargs)
        objects = {
            name: object
            for name, object in self._paths.objects_at(paths).items()
            if not (isinstance(object, ObjectNotFound) and self.isdir(name))
        }
        nones = [None] * len(objects)
        outcomes = self._read_each(list(objects.values()), nones, nones)
        if on_error == "raise":
            _raise_first(outcomes)
        return {
            name: outcome
            for name, outcome in zip(objects, outcomes, strict=True)
            if on_error != "omit" or isinstance(outcome, bytes)
        }

    def _read_each(
        self,
        objects: Sequence[ObjectInfo | TorchCacheError],
        starts: Sequence[int | None],
        ends: Sequence[int | None],
    ) -> list[bytes | TorchCacheError]:
        """[start, end) of each object in one call of the pool; errors stay in their places."""
        ranges = zip(objects, starts, ends, strict=True)
        extents = [_extent(o, start, end) for o, start, end in ranges if isinstance(o, ObjectInfo)]
        namespace = self._paths.namespace(extents[0].object) if extents else ""
        data = iter(self.pool.read_each(extents, namespace=namespace) if extents else [])
        outcomes = [o if isinstance(o, TorchCacheError) else next(data) for o in objects]
        return [o if isinstance(o, TorchCacheError) else bytes(o) for o in outcomes]

    # ---- writing ----

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """As fsspec's `open`; in text mode and with `compression` too, an exception in `with` discards the file."""
        if "r" in mode:
            return super().open(path, mode, **kwargs)
        if "b" not in mode:
            text = {k: kwargs.pop(k) for k in ("encoding", "errors", "newline") if k in kwargs}
            return TextWriter(self.open(path, mode.replace("t", "") + "b", **kwargs), **text)
        compression = get_compression(path, kwargs.pop("compression", None))
        file = super().open(path, mode, **kwargs)
        return LayeredWriter(compr[compression](file, mode="w"), file) if compression else file

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: Any
    ) -> ObjectFile | SpoolFile:
        if mode == "rb":
            object = self._paths.object(path)
            return ObjectFile(self.pool, object, path=path, namespace=self._paths.namespace(object))
        if mode not in ("wb", "xb"):
            raise io.UnsupportedOperation(
                f"{self.unstrip_protocol(path)} can't be opened with mode {mode!r}: objects are written whole, with "
                "'wb' or 'xb'"
            )
        if mode == "xb" and self.exists(path):
            raise FileExistsError(f"{self.unstrip_protocol(path)} exists")
        return SpoolFile(
            lambda data: self._publish(path, data, mode=mode), path=path, mode=mode, autocommit=autocommit
        )

    def pipe_file(
        self, path: str, value: Any, mode: Literal["overwrite", "create"] = "overwrite", **kwargs: Any
    ) -> None:
        self._publish(
            self._strip_protocol(path), [memoryview(value)], mode="xb" if mode == "create" else "wb"
        )

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        if self._type_of(path1) == "directory":
            return
        with self.open(path1, "rb") as source, self.open(path2, "wb") as target:
            while data := source.read(_COPY_BYTES):
                target.write(data)

    def rm_file(self, path: str) -> None:
        self.pool.delete(self._paths.uri(self._strip_protocol(path)))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Deletes files, and with `recursive` all files below folders. Raises FileNotFoundError if there is nothing."""
        entries = {p: self.info(p) for p in self.expand_path(path)}
        for name, entry in entries.items():
            if entry["type"] == "file":
                self.rm_file(name)
            elif not recursive:
                raise IsADirectoryError(f"{self.unstrip_protocol(name)} is a folder: pass recursive=True")
            else:
                for below in self.find(name, maxdepth=maxdepth):
                    self.rm_file(below)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing: folders are there when files are."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: folders are there when files are."""

    def rmdir(self, path: str) -> None:
        """Nothing: a folder is gone when its files are."""

    def _publish(self, path: str, data: Sequence[memoryview], *, mode: str) -> None:
        try:
            self.pool.publish(self._paths.uri(path), data, create_only=mode == "xb")
        except AlreadyExists as error:
            raise FileExistsError(str(error)) from error


def _extent(object: ObjectInfo, start: int | None, end: int | None) -> Extent:
    """[start, end) as Python's slices mean it."""
    first, last, _ = slice(start, end).indices(object.size)
    return Extent(object, first, max(0, last - first))


def _raise_first(outcomes: list[bytes | TorchCacheError]) -> list[bytes | TorchCacheError]:
    for outcome in outcomes:
        if isinstance(outcome, TorchCacheError):
            raise outcome
    return outcomes
