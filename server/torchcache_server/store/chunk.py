"""A stored chunk, as the store hands it out."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import pyarrow as pa

from torchcache.model import block_digests, chunk_digest

Payload: TypeAlias = bytes | bytearray | memoryview | pa.Buffer
"""What the store takes as a chunk's bytes: any contiguous buffer."""


class StoredChunk(NamedTuple):
    """A chunk and the checksums recorded when it was stored.

    `payload` is a view into the mapped segment and keeps the mapping alive, whatever happens to the record. It isn't
    verified: the reader does that, with `digest` (xxh3-64 of the payload) or `block_digests` (`model.block_digests`).
    `object_size` is in bytes, of the whole object.
    """

    object_size: int
    payload: pa.Buffer
    digest: int
    block_digests: bytes

    @classmethod
    def of(cls, payload: Payload, object_size: int) -> StoredChunk:
        """A chunk that passes through without being stored; its checksums are computed here."""
        view = byte_view(payload)
        return cls(object_size, pa.py_buffer(payload), chunk_digest(view), block_digests(view))

    def is_intact(self) -> bool:
        """Whether the payload matches both its checksums."""
        view = byte_view(self.payload)
        return chunk_digest(view) == self.digest and block_digests(view) == self.block_digests


def byte_view(payload: Payload) -> memoryview:
    """The payload's bytes, one unsigned byte an item, without copying."""
    view = memoryview(payload)
    return view.cast("B") if view.nbytes else memoryview(b"")
