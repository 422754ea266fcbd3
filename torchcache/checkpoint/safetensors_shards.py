"""The files of a safetensors checkpoint: which there are, and their headers, each read once and when it is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from torchcache.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    MAX_INDEX_BYTES,
    Entry,
    Header,
    header_end,
    parse_header,
    parse_index,
)
from torchcache.checkpoint.safetensors_layout import StoredTensor
from torchcache.checkpoint.source import Source
from torchcache.errors import IntegrityError
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool
from torchcache.threads import Threads

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"

_FIRST_READ_BYTES: Final = 256 * 1024
"""Holds the header of most files: they need no second read."""

_OPENERS: Final = 8


class Shards:
    """One file, or all files of an index, in one folder of an under-store. `names` are the tensors'."""

    def __init__(
        self, pool: Pool, uri: str, files: dict[str, str] | None, metadata: dict[str, Any] | None
    ) -> None:
        self.uri = uri
        self.metadata = metadata
        self._pool = pool
        self._folder, _, self._only = uri.rpartition("/")
        self._files = files
        self._headers: dict[str, Header] = {}
        self.source = Source(pool, self._folder, None, durable=True)

    @classmethod
    def open(cls, pool: Pool, uri: str) -> Shards:
        """Reads the index, or the header of the one file. Raises IntegrityError for one that makes no sense."""
        if uri.endswith(INDEX_SUFFIX):
            info = pool.stat(uri)
            if info.size > MAX_INDEX_BYTES:
                raise IntegrityError(f"{uri} has {info.size} bytes: too many for an index", object=uri)
            data = pool.read([Extent(info)], namespace=uri.rpartition("/")[0])[0] if info.size else b""
            index = parse_index(bytes(data), where=uri)
            return cls(pool, uri, index.files, index.metadata)
        shards = cls(pool, uri, None, None)
        shards.metadata = shards._header(shards._only).metadata
        return shards

    @property
    def names(self) -> Collection[str]:
        return self._header(self._only).tensors.keys() if self._files is None else self._files.keys()

    def located(self, names: Iterable[str]) -> list[StoredTensor]:
        """Where each of `names`, which are all there, lies. Raises IntegrityError where the index is wrong."""
        files = {name: self._only if self._files is None else self._files[name] for name in names}
        self._read_headers({file for file in files.values() if file not in self._headers})
        entries = [(name, file, self._entry(file, name)) for name, file in files.items()]
        return [StoredTensor(file, entry.bytes.start, name, entry) for name, file, entry in entries]

    def _entry(self, file: str, name: str) -> Entry:
        entry = self._headers[file].tensors.get(name)
        if entry is None:
            raise IntegrityError(
                f"{self.uri} says that {name!r} lies in {file}, and it does not",
                object=f"{self._folder}/{file}",
            )
        return entry

    def _read_headers(self, files: Collection[str]) -> None:
        with Threads(min(_OPENERS, max(len(files), 1)), name="torchcache-headers") as threads:
            reads = [threads.submit(self._header, file) for file in sorted(files)]
            try:
                for read in reads:
                    read.result()
            finally:
                for read in reads:
                    read.cancel()

    def _header(self, file: str) -> Header:
        header = self._headers.get(file)
        if header is None:
            header = self._headers[file] = self._read_header(self.source.stored_object(file))
        return header

    def _read_header(self, info: ObjectInfo) -> Header:
        where = self._pool.uri(info.id)
        start = self._bytes(info, 0, min(info.size, _FIRST_READ_BYTES))
        end = header_end(start, info.size, where=where)
        if end > len(start):
            start += self._bytes(info, len(start), end)
        return parse_header(start[LENGTH_BYTES:end], info.size, where=where)

    def _bytes(self, info: ObjectInfo, start: int, end: int) -> bytes:
        if start == end:
            return b""
        return bytes(self._pool.read([Extent(info, start, end - start)], namespace=self._folder)[0])
