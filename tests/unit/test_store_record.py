"""Headers on disk: nothing but the very header written, at its very place, is believed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.model import BLOCK_BYTES, CHUNK_BYTES
from torchcache.records import (
    ALIGN_BYTES,
    RecordHeader,
    SegmentHeader,
    decode_record,
    encode_record,
    header_bytes,
    padding,
    record_bytes,
)

NONCES = st.integers(0, 2**64 - 1)
NONCE = 0x1234_5678_9ABC_DEF0


@st.composite
def headers(draw: st.DrawFn) -> RecordHeader:
    payload_bytes = draw(st.integers(0, 5 * BLOCK_BYTES))
    identity = draw(st.binary(max_size=300))
    blocks = -(-payload_bytes // BLOCK_BYTES)
    return RecordHeader(
        length=header_bytes(len(identity), payload_bytes),
        payload_bytes=payload_bytes,
        chunk_index=draw(st.integers(0, 2**32 - 1)),
        object_size=draw(st.integers(-1, 2**62)),
        digest=draw(NONCES),
        identity=identity,
        block_digests=draw(st.binary(min_size=8 * blocks, max_size=8 * blocks)),
    )


def file_with(header: RecordHeader, offset: int, nonce: int = NONCE) -> bytearray:
    """A segment's bytes with one record, its payload all zeros."""
    out = bytearray(offset + header.record_bytes)
    out[offset : offset + header.length] = encode_record(header, nonce, offset)
    return out


def an_example() -> RecordHeader:
    return RecordHeader(header_bytes(9, 20_000), 20_000, 3, 60_000, 77, b"identity!", bytes(range(16)))


@given(headers(), st.integers(0, 50), NONCES)
def test_a_record_comes_back(header: RecordHeader, place: int, nonce: int) -> None:
    offset = place * ALIGN_BYTES
    assert decode_record(memoryview(file_with(header, offset, nonce)), nonce, offset) == header


@given(st.integers(0, 300), st.integers(0, CHUNK_BYTES))
def test_everything_is_aligned(identity_bytes: int, payload_bytes: int) -> None:
    total = record_bytes(identity_bytes, payload_bytes)
    assert total % ALIGN_BYTES == 0
    assert header_bytes(identity_bytes, payload_bytes) % ALIGN_BYTES == 0
    assert total == header_bytes(identity_bytes, payload_bytes) + payload_bytes + len(padding(payload_bytes))


def test_no_flipped_bit_of_a_header_is_believed() -> None:
    """F6: every single bit of it."""
    header = an_example()
    good = file_with(header, 128)
    for bit in range(8 * header.length):
        bad = bytearray(good)
        bad[128 + bit // 8] ^= 1 << bit % 8
        assert decode_record(memoryview(bad), NONCE, 128) is None, f"bit {bit}"


def test_no_truncation_is_believed() -> None:
    """F7: down to the payload's last byte."""
    header = an_example()
    whole = file_with(header, 0)[: header.length + header.payload_bytes]
    assert decode_record(memoryview(whole), NONCE, 0) == header
    for size in [*range(header.length + 1), len(whole) - 1]:
        assert decode_record(memoryview(whole)[:size], NONCE, 0) is None, f"{size} bytes"


@given(st.integers(1, 4096), NONCES)
def test_zeros_are_no_record(words: int, nonce: int) -> None:
    """F8."""
    assert decode_record(memoryview(bytes(8 * words)), nonce, 0) is None


@given(headers(), st.integers(1, 20), NONCES)
@settings(max_examples=50)
def test_a_copy_elsewhere_is_no_record(header: RecordHeader, moved: int, other_nonce: int) -> None:
    """Neither at another place of its segment, nor at its place in another segment."""
    raw = encode_record(header, NONCE, 0)
    offset = moved * ALIGN_BYTES
    view = memoryview(bytes(offset) + raw + bytes(header.record_bytes))
    assert decode_record(view, NONCE, offset) is None
    if other_nonce != NONCE:
        assert decode_record(memoryview(raw + bytes(header.record_bytes)), other_nonce, 0) is None


@given(st.binary(max_size=400), st.integers(-100, 500))
def test_garbage_never_raises(data: bytes, offset: int) -> None:
    assert decode_record(memoryview(data), NONCE, offset) is None
    assert SegmentHeader.decode(memoryview(data)) is None


@given(
    st.integers(0, 2**64 - 1),
    NONCES,
    st.integers(0, 2**62),
    st.text(st.characters(codec="utf-8"), max_size=300),
)
def test_a_segment_header_comes_back(number: int, nonce: int, file_bytes: int, namespace: str) -> None:
    header = SegmentHeader(number, nonce, file_bytes, namespace)
    raw = header.encode()
    assert len(raw) == header.length
    assert SegmentHeader.decode(memoryview(raw + bytes(100))) == header


def test_no_flipped_bit_of_a_segment_header_is_believed() -> None:
    raw = SegmentHeader(7, NONCE, 1 << 26, "samples:digits@1").encode()
    for bit in range(8 * len(raw)):
        bad = bytearray(raw)
        bad[bit // 8] ^= 1 << bit % 8
        assert SegmentHeader.decode(memoryview(bad)) is None, f"bit {bit}"
