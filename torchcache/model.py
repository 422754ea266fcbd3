"""The nouns that client and server share: frozen values, no I/O.

An *object* is one immutable thing: a key in a named under-store, at one version. It is cut into *chunks* of
`CHUNK_BYTES`, the unit of caching and checksum; `STRIPE_CHUNKS` neighbouring chunks form a *stripe*, the unit of
placement. Within a chunk every *block* of `BLOCK_BYTES` has a checksum of its own, so that ranges verify too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import xxhash

BLOCK_BYTES = 16 * 1024
CHUNK_BYTES = 4 * 1024 * 1024
STRIPE_CHUNKS = 4
STRIPE_BYTES = STRIPE_CHUNKS * CHUNK_BYTES

UNKNOWN_SIZE = -1
"""Size of an object whose size only its stored record tells: a computed sample."""

_U32 = struct.Struct("<I").pack
_U32_BYTES = 4

_new = object.__new__
_digest = xxhash.xxh3_128_digest

SAMPLES = "samples"
"""Reserved under-store name of computed samples. Nothing stands behind it: a miss is a miss."""

SAVE_PREFIX = "save:"
"""Versions of checkpoint files before and while they are uploaded start so; the save's id follows."""


@dataclass(frozen=True)
class ObjectId:
    """One immutable object: key `key` of under-store `store`, at `version`.

    `version` is an ETag (quotes stripped), size and mtime_ns of a file, the user's version of a computed sample, or
    `save:<id>` for a file of a checkpoint.
    """

    store: str
    key: str
    version: str

    def __init__(self, store: str, key: str, version: str) -> None:
        # By hand, as one is made for every record read: that of a frozen dataclass takes three times as long.
        fields = self.__dict__
        fields["store"] = store
        fields["key"] = key
        fields["version"] = version

    @classmethod
    def from_encoded(cls, encoded: bytes) -> ObjectId:
        """The id whose `encoded` this is, taken apart only once a field is asked for: a local read asks for none."""
        id_ = cls.__new__(cls)
        id_.__dict__["_encoded"] = encoded
        return id_

    @classmethod
    def all_from_encoded(cls, encoded: Iterable[bytes]) -> list[ObjectId]:
        """`from_encoded` of each, with its `digest`, which every read asks for: so together they take less."""
        ids = []
        for one in encoded:
            id_ = _new(cls)
            fields = id_.__dict__
            fields["_encoded"] = one
            fields["_digest"] = _digest(one)
            ids.append(id_)
        return ids

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> str:
            """The fields of an id `from_encoded`, at first use. What has them is never asked."""
            encoded = self.__dict__.get("_encoded")
            if encoded is None or name not in ("store", "key", "version"):
                raise AttributeError(name)
            self.__init__(*_decoded(encoded))
            return self.__dict__[name]

    def __str__(self) -> str:
        return f"{self.store}/{self.key}@{self.version}"

    @property
    def fields(self) -> tuple[str, str, str]:
        """The three fields. Of an id `from_encoded` for less than one by one costs, where it is done once."""
        known = self.__dict__
        return (self.store, self.key, self.version) if "store" in known else _decoded(known["_encoded"])

    @property
    def encoded(self) -> bytes:
        """The three fields, each behind its length (u32 little-endian): equal only for equal ids."""
        # Kept in the instance by hand: functools.cached_property takes a lock, and this is asked for every chunk read.
        known: bytes | None = self.__dict__.get("_encoded")
        if known is None:
            store, key, version = self.store.encode(), self.key.encode(), self.version.encode()
            parts = (_U32(len(store)), store, _U32(len(key)), key, _U32(len(version)), version)
            known = self.__dict__["_encoded"] = b"".join(parts)
        return known

    @property
    def digest(self) -> bytes:
        """16 bytes, xxh3-128 of `encoded`. Finds a record; the record's header proves it is the right one."""
        known: bytes | None = self.__dict__.get("_digest")
        if known is None:
            known = self.__dict__["_digest"] = _digest(self.encoded)
        return known

    @property
    def is_sample(self) -> bool:
        return self.store == SAMPLES

    @property
    def is_save(self) -> bool:
        return self.version.startswith(SAVE_PREFIX)


def _decoded(encoded: bytes) -> tuple[str, str, str]:
    store_end = _U32_BYTES + int.from_bytes(encoded[:_U32_BYTES], "little")
    key = store_end + _U32_BYTES
    key_end = key + int.from_bytes(encoded[store_end:key], "little")
    version = key_end + _U32_BYTES
    return encoded[_U32_BYTES:store_end].decode(), encoded[key:key_end].decode(), encoded[version:].decode()


class ObjectInfo(NamedTuple):
    """An object and its size in bytes (`UNKNOWN_SIZE` where only the stored record tells)."""

    id: ObjectId
    size: int

    @property
    def chunk_count(self) -> int:
        """Number of chunks; an empty object has one, empty."""
        return max(1, -(-self.size // CHUNK_BYTES))


def object_infos(ids: Iterable[ObjectId], sizes: Iterable[int]) -> list[ObjectInfo]:
    """`ObjectInfo` of each, for half of what a NamedTuple's own constructor takes."""
    return [*map(partial(tuple.__new__, ObjectInfo), zip(ids, sizes, strict=True))]


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Chunk number `index` (from 0) of an object."""

    object: ObjectId
    index: int

    @property
    def offset(self) -> int:
        """First byte of the chunk within the object."""
        return self.index * CHUNK_BYTES

    def length(self, object_size: int) -> int:
        """Bytes in this chunk, given the object's size."""
        return max(0, min(CHUNK_BYTES, object_size - self.offset))


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, end): end exclusive."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Extent(NamedTuple):
    """Bytes [offset, offset + length) of an object: what a read asks for. `length` -1 is up to the end."""

    object: ObjectInfo
    offset: int = 0
    length: int = -1

    @property
    def end(self) -> int:
        """First byte after the extent; the object's size, which may be unknown, for length -1."""
        return self.object.size if self.length < 0 else self.offset + self.length


def whole(objects: Iterable[ObjectInfo]) -> list[Extent]:
    """Extents of all bytes of each, for half of what a NamedTuple's own constructor takes."""
    return [*map(partial(tuple.__new__, Extent), zip(objects, repeat(0), repeat(-1)))]


def block_cover(start: int, end: int, chunk_length: int) -> ByteRange:
    """The smallest block-aligned range of a chunk of `chunk_length` bytes that covers [start, end)."""
    if start >= end:
        return ByteRange(0, 0)
    return ByteRange(start - start % BLOCK_BYTES, min(chunk_length, -(-end // BLOCK_BYTES) * BLOCK_BYTES))


def block_digests(payload: memoryview | bytes) -> bytes:
    """xxh3-64 of every block of `payload`, packed as little-endian u64: 8 bytes a block."""
    view = memoryview(payload)
    digest = xxhash.xxh3_64_intdigest
    values = [digest(view[i : i + BLOCK_BYTES]) for i in range(0, len(view), BLOCK_BYTES)]
    return struct.pack(f"<{len(values)}Q", *values)


def chunk_digest(payload: memoryview | bytes) -> int:
    """xxh3-64 of a chunk's whole payload."""
    return int(xxhash.xxh3_64_intdigest(payload))
