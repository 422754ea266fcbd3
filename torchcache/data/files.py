"""Samples that are objects of an under-store: one object, one sample."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from torchcache import environment
from torchcache.data.buffer_pool import BufferPool, default_buffers
from torchcache.data.listing import Changes, changes, listed
from torchcache.data.manifest import Manifest
from torchcache.data.naming import each, numbered
from torchcache.data.outputs import Landing, checked_output
from torchcache.data.samples import OnMissing, OnProgress, residency_of, windows
from torchcache.errors import (
    ConfigurationError,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.heap import keep_freed_memory
from torchcache.model import Extent, ObjectInfo, whole
from torchcache.pool import Pool, Residency
from torchcache.pool.absent import absent
from torchcache.pool.storage_uris import at_storage

_log = logging.getLogger("torchcache")

OnChange = Literal["raise", "refresh"]

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
        on_change: OnChange = "raise",
    ) -> None:
        """Lists the objects. Raises ConfigurationError for wrong arguments, ObjectNotFound if there are no objects."""
        self.uri = checked_uri(at_storage(pool, checked_uri(uri)))
        self._pattern = pattern
        self._decode = decode
        self._output = checked_output(output, decode=decode, buffers=buffers)
        self._buffers = buffers
        if on_change not in ("raise", "refresh"):
            raise ConfigurationError(f"on_change={on_change!r}: it is 'raise' or 'refresh'")
        self._on_change = on_change
        self._pool = pool
        _, key = pool.resolve(self.uri)
        self._prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        self._adopt(self._listed())

    def _listed(self) -> Manifest:
        manifest, others = listed(self._pool, self.uri, self._pattern, environment.home() / "manifests")
        if not len(manifest):
            raise ObjectNotFound(_nothing_found(self.uri, self._pattern, others), object=self.uri)
        return manifest

    def _adopt(self, manifest: Manifest) -> None:
        """From here on these are the objects."""
        self._manifest = manifest
        self._renewed: dict[int, ObjectInfo] = {}

    def refresh(self) -> Changes:
        """Lists anew. Raises as the constructor does, and then nothing has changed."""
        manifest = self._listed()
        found = changes(self._manifest, manifest, self._prefix)
        self._adopt(manifest)
        return found

    def __len__(self) -> int:
        return len(self._manifest)

    @property
    def total_bytes(self) -> int:
        return self._manifest.total_bytes

    @property
    def stored_under(self) -> str:
        return self.uri

    def read(self, indices: Sequence[int]) -> list[Any]:
        if not indices:
            return []
        while True:
            try:
                return self._read_samples(indices)
            except ObjectChanged as error:
                if self._on_change == "raise" or not self._renew(indices, error.object):
                    raise

    def _renew(self, indices: Sequence[int], uri: str | None) -> bool:
        """Takes the object at `uri`, one of `indices`, as it is now. False if it isn't another than was asked for."""
        for index, known in zip(indices, self._objects(indices), strict=True):
            if self._pool.uri(known.id) == uri:
                now = self._pool.stat(uri)
                if now != known:
                    _log.info("%s has changed since it was listed: it is read as it is now", uri)
                    self._renewed[index] = now
                    return True
        return False

    def _objects(self, indices: Sequence[int]) -> list[ObjectInfo]:
        """What to read, as it was listed, or as it was found to be since."""
        objects = self._manifest.take(indices)
        if self._renewed:
            for place, index in enumerate(indices):
                objects[place] = self._renewed.get(index, objects[place])
        return objects

    def _read_samples(self, indices: Sequence[int]) -> list[Any]:
        if self._output in ("numpy", "tensor"):
            return self._read_into_buffers(indices).samples(self._output)
        extents = self.extents(indices)
        if self._decode is not None:
            return each(
                self._decode,
                self._read(extents, None),
                lambda n: numbered(indices[n], self.name(indices[n])),
            )
        if self._output == "view":
            return [*self._read(extents, None)]
        keep_freed_memory()  # 29 MB of bytes a batch
        return [*map(_as_bytes, self._read(extents, None, as_bytes=True))]

    def _read_into_buffers(self, indices: Sequence[int]) -> Landing:
        """The memory that the samples now lie in."""
        extents = self.extents(indices)
        sizes = [extent.end - extent.offset for extent in extents]
        landing = Landing(sizes, self._buffers or default_buffers)
        self._read(extents, landing.targets())
        return landing

    def extents(self, indices: Sequence[int]) -> list[Extent]:
        return whole(self._objects(indices))

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
            f"{uri} {happened} since this dataset was created: create it again or refresh() it, which lists anew",
            object=uri,
            server=error.server,
            request_id=error.request_id,
        )
        explained.__cause__ = error
        return explained

    def stage(
        self,
        indices: Sequence[int],
        *,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        on_missing: OnMissing | None = None,
    ) -> None:
        for window in windows(indices):
            if cancelled():
                return
            objects = self._objects(window)
            self._pool.stage(
                objects,
                namespace=self.uri,
                on_progress=on_progress,
                cancelled=cancelled,
                on_missing=on_missing,
            )

    def absent(self) -> Iterator[tuple[ObjectInfo, TorchCacheError]]:
        for window in windows(range(len(self._manifest))):
            yield from absent(self._pool, self._objects(window))

    def residency(self) -> Residency:
        return residency_of(self._pool, lambda index: self._objects([index])[0], len(self))

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

    def name(self, index: int) -> str:
        return self._pool.uri(self.extents([index])[0].object.id)

    def describe(self) -> str:
        return (
            f".from_files({self.uri!r}, pattern={self._pattern!r}: "
            f"{len(self):,} objects, {self.total_bytes:,} bytes)"
        )


def _as_bytes(view: memoryview) -> bytes:
    known = view.obj
    return known if type(known) is bytes and len(known) == len(view) else bytes(view)


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
