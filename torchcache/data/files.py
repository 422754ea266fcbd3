"""Samples that are objects of an under-store: one object, one sample."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from torchcache import environment
from torchcache.data.buffer_pool import BufferPool, default_buffers
from torchcache.data.manifest import Manifest
from torchcache.data.outputs import Landing, checked_output
from torchcache.data.samples import OnProgress, residency_of, windows
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.heap import keep_freed_memory
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool, Residency

_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")


class FileSamples:
    """The objects under a URI whose keys match a pattern, as they were when this was made."""

    def __init__(
        self,
        pool: Pool,
        uri: str | os.PathLike[str],
        pattern: str,
        *,
        decode: Callable[[memoryview], Any] | None = None,
        output: str = "bytes",
        buffers: BufferPool | None = None,
    ) -> None:
        """Lists the objects. Raises ConfigurationError for wrong arguments, ObjectNotFound if there are no objects."""
        self.uri = checked_uri(uri)
        self._pattern = pattern
        self._decode = decode
        self._output = checked_output(output, decode=decode, buffers=buffers)
        self._buffers = buffers
        self._pool = pool
        store, key = pool.resolve(self.uri)
        self._prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        try:
            listing = _Listing(pool.list(self.uri), self._prefix, pattern)
            self._manifest = Manifest.write(store, listing, environment.home() / "manifests")
        except _OutOfOrderError:
            # Not every S3 lists bytewise by key: SeaweedFS goes folder by folder.
            by_key = sorted(pool.list(self.uri), key=lambda object: object.id.key)
            listing = _Listing(iter(by_key), self._prefix, pattern)
            self._manifest = Manifest.write(store, listing, environment.home() / "manifests")
        if not len(self._manifest):
            raise ObjectNotFound(_nothing_found(self.uri, pattern, listing.others), object=self.uri)

    def __len__(self) -> int:
        return len(self._manifest)

    @property
    def total_bytes(self) -> int:
        return self._manifest.total_bytes

    def read(self, indices: Sequence[int]) -> list[Any]:
        if not indices:
            return []
        extents = self.extents(indices)
        if self._output in ("numpy", "tensor"):
            sizes = [extent.end - extent.offset for extent in extents]
            landing = Landing(sizes, self._buffers or default_buffers)
            self._read(extents, landing.targets())
            return landing.samples(self._output)
        if self._decode is not None:
            return [*map(self._decode, self._read(extents, None))]
        if self._output == "view":
            return [*self._read(extents, None)]
        keep_freed_memory()  # 29 MB of bytes a batch
        return [*map(_as_bytes, self._read(extents, None, as_bytes=True))]

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        return list(map(Extent, self._manifest.take(indices)))

    def _read(
        self, extents: Sequence[Extent], into: Sequence[memoryview] | None, *, as_bytes: bool = False
    ) -> list[memoryview]:
        """The bytes of `extents`. Raises the error of the first that failed."""
        outcomes = self._pool.read_each(extents, namespace=self.uri, into=into, as_bytes=as_bytes)
        views = [outcome for outcome in outcomes if isinstance(outcome, memoryview)]
        if len(views) == len(outcomes):
            return views
        number, error = next((n, e) for n, e in enumerate(outcomes) if isinstance(e, TorchCacheError))
        error = self._explained(extents[number].object, error)
        try:
            raise error
        finally:
            # An error that a frame of its traceback refers to would keep the buffers until the next collection.
            del error, outcomes

    def _explained(self, object: ObjectInfo, error: TorchCacheError) -> TorchCacheError:
        """An object that is no longer what was listed, in the user's terms; other errors as they are."""
        if not isinstance(error, ObjectNotFound | ObjectChanged):
            return error
        uri = self._pool.uri(object.id)
        happened = "is gone" if isinstance(error, ObjectNotFound) else "has changed"
        explained = type(error)(
            f"{uri} {happened} since this dataset was created: create it again, from_files lists anew",
            object=uri,
            server=error.server,
        )
        explained.__cause__ = error
        return explained

    def stage(
        self, indices: Sequence[int], *, on_progress: OnProgress, cancelled: Callable[[], bool]
    ) -> None:
        for window in windows(indices):
            if cancelled():
                return
            objects = self._manifest.take(window)
            self._pool.stage(objects, namespace=self.uri, on_progress=on_progress, cancelled=cancelled)

    def residency(self) -> Residency:
        return residency_of(self._pool, self._manifest.__getitem__, len(self))

    def identity(self) -> dict[str, str | int]:
        return {
            "files": self.uri,
            "pattern": self._pattern,
            "count": len(self),
            "digest": self._manifest.digest,
        }

    def keys(self) -> list[str]:
        """The objects' keys relative to the URI, in order."""
        return [key.removeprefix(self._prefix) for key in self._manifest.keys()]  # noqa: SIM118 - no mapping

    def describe(self) -> str:
        return (
            f".from_files({self.uri!r}, pattern={self._pattern!r}: "
            f"{len(self):,} objects, {self.total_bytes:,} bytes)"
        )


def _as_bytes(view: memoryview) -> bytes:
    known = view.obj
    return known if type(known) is bytes and len(known) == len(view) else bytes(view)


class _OutOfOrderError(IntegrityError):
    """A listing that isn't ordered bytewise by key, or that names an object twice."""


class _Listing:
    """The objects of a listing that are samples: `others` counts the rest, once it has been gone through."""

    def __init__(self, objects: Iterator[ObjectInfo], prefix: str, pattern: str) -> None:
        self._objects = objects
        self._prefix = prefix
        self._matches = re.compile(fnmatch.translate(pattern)).match
        self.others = 0

    def __iter__(self) -> Iterator[ObjectInfo]:
        last = ""
        for object in self._objects:
            key = object.id.key
            # Python orders strings by code point, which is the order of their UTF-8 bytes.
            if key <= last:
                raise _OutOfOrderError(f"a listing has {key!r} behind {last!r}", object=key)
            last = key
            if key.endswith("/"):
                continue  # a marker that consoles make for an empty folder
            if self._matches(key.removeprefix(self._prefix)):
                yield object
            else:
                self.others += 1


def checked_uri(uri: str | os.PathLike[str]) -> str:
    """The URI of a folder, without slashes at its end, from its URI or its absolute path on this machine.

    Raises ConfigurationError if it can't be one.
    """
    form = "it takes a URI as s3://bucket/folder, or an absolute path as /folder"
    text = os.fspath(uri) if isinstance(uri, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"from_files got {uri!r} as its URI; {form}")
    if text.startswith("/"):
        # Links stay as they are: what `torchcache stage` fetched by the same name is then found.
        text = f"file:///{PurePosixPath(text).as_posix().lstrip('/')}"
    scheme, separator, rest = text.partition("://")
    if not separator or not scheme:
        collapsed = _COLLAPSED.match(text)
        hint = (
            f"; a URI must not go through pathlib, pass it as a str: '{collapsed[1]}://...'"
            if collapsed
            else ""
        )
        raise ConfigurationError(f"from_files got {uri!r}, which is no URI; {form}{hint}")
    if not rest.strip("/"):
        raise ConfigurationError(f"from_files got {uri!r}, which names no bucket or folder; {form}")
    return text.rstrip("/")


def _nothing_found(uri: str, pattern: str, others: int) -> str:
    if others:
        return (
            f"none of the {others} objects under {uri}/ match pattern={pattern!r}: it is matched against the key "
            "behind that folder, and * crosses slashes"
        )
    return f"there are no objects under {uri}/ (looked for pattern={pattern!r}): is the folder's name right?"
