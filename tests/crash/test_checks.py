"""Checks that another one backs up: each is proven by itself, for what remains must not depend on luck."""

from __future__ import annotations

import pyarrow as pa
from torchcache_server.store import StoredChunk

from torchcache.model import BLOCK_BYTES, block_digests, chunk_digest

PAYLOAD = bytes(range(256)) * 200


def stored(*, digest: int, blocks: bytes) -> StoredChunk:
    return StoredChunk(len(PAYLOAD), pa.py_buffer(PAYLOAD), digest, blocks)


def test_a_chunk_must_match_both_its_checksums() -> None:
    """F5, I1: of the whole, which goes with it to other servers, and of the blocks, by which ranges are verified."""
    digest, blocks = chunk_digest(PAYLOAD), block_digests(PAYLOAD)
    assert len(PAYLOAD) > 2 * BLOCK_BYTES
    assert stored(digest=digest, blocks=blocks).is_intact()
    assert not stored(digest=digest ^ 1, blocks=blocks).is_intact()
    assert not stored(digest=digest, blocks=blocks[:-1] + bytes([blocks[-1] ^ 1])).is_intact()
