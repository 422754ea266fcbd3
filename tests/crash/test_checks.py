"""Checks that another one backs up: each is proven by itself, for what remains must not depend on luck."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from torchcache_server.store import DiskCalls, Store, StoredChunk
from torchcache_server.store.ledger import PAGE_BYTES, encode_record, read_record, record_name
from torchcache_server.store.segment_scan import SegmentBytes

from torchcache import records
from torchcache.model import BLOCK_BYTES, ChunkId, ObjectId, block_digests, chunk_digest
from torchcache.records import chunk_key

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


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("other", [("a", 1), ("b", 0)])
def test_an_index_entry_that_points_to_another_chunk_is_not_believed(
    tmp_path: Path, other: tuple[str, int], known: bool
) -> None:
    """F9, I1: another object's, or another chunk of the same one; also where that record was read before."""
    key, index = other
    asked = ChunkId(ObjectId("s3", "a", "v1"), 0)
    wrong = ChunkId(ObjectId("s3", key, "v1"), index)
    store = Store(tmp_path / "s", capacity_bytes=64 << 20)
    store.put("ns", asked, 100, b"a" * 100)
    store.put("ns", wrong, 100, b"w" * 100)
    if known:
        assert store.lookup(wrong) is not None
    place = store._core.index.get(chunk_key(wrong))
    assert place is not None
    with store._core.index.writing() as writer:
        writer.put(chunk_key(asked), place)
    assert store.lookup(asked) is None
    found = store.lookup(wrong)
    assert found is not None and bytes(found.payload) == b"w" * 100
    store.close()


@pytest.mark.parametrize(
    ("spoilt", "intact", "torn"),
    [("nothing", True, False), ("digest", False, False), ("first", False, False), ("last", False, True)],
)
def test_the_doctor_looks_at_both_checksums_and_tells_what_was_cut_short(
    tmp_path: Path, spoilt: str, intact: bool, torn: bool
) -> None:
    """F4, F5."""
    digest, blocks = chunk_digest(PAYLOAD), bytearray(block_digests(PAYLOAD))
    if spoilt in ("first", "last"):
        blocks[0 if spoilt == "first" else -1] ^= 1
    length = records.header_bytes(1, len(PAYLOAD))
    header = records.RecordHeader(
        length, len(PAYLOAD), 0, len(PAYLOAD), digest ^ (spoilt == "digest"), b"x", bytes(blocks)
    )
    segment = records.SegmentHeader(1, 2, 1 << 20, "ns")
    at = segment.length
    file = tmp_path / "segment"
    file.write_bytes(
        (segment.encode() + records.encode_record(header, 2, at) + PAYLOAD).ljust(1 << 20, b"\0")
    )
    disk = DiskCalls()
    fd = disk.open(str(file))
    try:
        found = SegmentBytes(disk, fd, segment, advance=lambda _: None)
        assert [(one.offset, one.is_intact, one.is_torn) for one in found.records()] == [(at, intact, torn)]
    finally:
        disk.close(fd)


@pytest.mark.parametrize(("name", "other"), [("FORMAT_VERSION", 99), ("RECORD_MAGIC", b"tcRECOR2")])
def test_a_sound_record_of_another_format_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    """F40: its checksum holds, and its fields mean something else."""
    length = records.header_bytes(1, 10)
    header = records.RecordHeader(length, 10, 0, 10, 1, b"x", bytes(8))
    assert records.decode_record(_view(records.encode_record(header, 1, 0)), 1, 0) == header
    monkeypatch.setattr(records, name, other)
    raw = records.encode_record(header, 1, 0)
    monkeypatch.undo()
    assert records.decode_record(_view(raw), 1, 0) is None


@pytest.mark.parametrize(("name", "other"), [("FORMAT_VERSION", 99), ("SEGMENT_MAGIC", b"tcSEGMN2")])
def test_a_sound_segment_of_another_format_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    """F40."""
    header = records.SegmentHeader(1, 2, 4096, "ns")
    assert records.SegmentHeader.decode(_view(header.encode())) == header
    monkeypatch.setattr(records, name, other)
    raw = header.encode()
    monkeypatch.undo()
    assert records.SegmentHeader.decode(_view(raw)) is None


def _view(header: bytes) -> memoryview:
    return memoryview(header.ljust(4096, b"\0"))
