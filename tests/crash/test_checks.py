"""Checks that another one backs up: each is proven by itself, for what remains must not depend on luck."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from torchcache_server.store import DiskCalls, StoredChunk
from torchcache_server.store.ledger import PAGE_BYTES, encode_record, read_record, record_name

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


def test_of_two_sound_copies_of_a_record_that_differ_the_first_counts_and_the_other_is_to_be_mended(
    tmp_path: Path,
) -> None:
    """No server leaves that behind; a disk that mixes up sectors may (F9)."""
    old, new = (b"".join(encode_record(b"key", value)) for value in (b"old", b"new"))
    file = tmp_path / record_name(b"key")
    file.write_bytes(new[:PAGE_BYTES] + old[PAGE_BYTES:])
    assert read_record(DiskCalls(), str(file)) == (b"key", b"new", 1)
