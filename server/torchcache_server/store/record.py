"""What lies in a segment file: its own header, then records, each a header and a payload. Pure.

Little-endian. Headers, payloads and records start at multiples of `ALIGN_BYTES` from the file's start.

Segment header: magic, checksum, version, length, segment's number, nonce, file size, length of namespace | namespace.
Record header:  magic, checksum, version, length, payload length, chunk index, object size, chunk digest, identity
                length | identity (`ObjectId.encoded`) | digests of the payload's blocks | zeros.

The checksum is xxh3-64 of all of the header behind itself. A record's is seeded with the segment's random nonce and
the record's offset: zeros never validate, nor does a record's copy elsewhere, be it an older file's remains or the
payload of an object that is itself a segment.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

import xxhash

from torchcache.model import BLOCK_BYTES, CHUNK_BYTES

ALIGN_BYTES: Final = 64
FORMAT_VERSION: Final = 1

RECORD_MAGIC: Final = b"tcRECORD"
DEAD_MAGIC: Final = b"tcDEAD\0\0"
SEGMENT_MAGIC: Final = b"tcSEGMNT"

_SEED: Final = 0x74_6F_72_63_68_63_61_63
_MASK: Final = (1 << 64) - 1
_CHECKED_FROM: Final = 16  # behind magic and checksum

_RECORD: Final = struct.Struct("<8sQHHIIIqQI")
_SEGMENT: Final = struct.Struct("<8sQHHIQQQI")

MAX_IDENTITY_BYTES: Final = 16 * 1024
"""Longest `ObjectId.encoded`: S3's keys have 1024 bytes, a path 4096."""

MAX_RECORD_BYTES: Final = CHUNK_BYTES + 2 * MAX_IDENTITY_BYTES
"""More than any record takes, header included."""


def aligned(size: int) -> int:
    """`size`, rounded up to `ALIGN_BYTES`."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Who a segment is. `file_bytes` is the size of the whole file, header included."""

    number: int
    nonce: int
    file_bytes: int
    namespace: str

    @property
    def length(self) -> int:
        return aligned(_SEGMENT.size + len(self.namespace.encode()))

    def encode(self) -> bytes:
        name = self.namespace.encode()
        fields = (FORMAT_VERSION, 0, self.length, self.number, self.nonce, self.file_bytes, len(name))
        header = bytearray(self.length)
        _SEGMENT.pack_into(header, 0, SEGMENT_MAGIC, 0, *fields)
        header[_SEGMENT.size : _SEGMENT.size + len(name)] = name
        struct.pack_into("<Q", header, 8, _checksum(header, _SEED))
        return bytes(header)

    @classmethod
    def decode(cls, view: memoryview) -> SegmentHeader | None:
        """The header at the start of `view`, or None if there is no sound one."""
        if len(view) < _SEGMENT.size:
            return None
        magic, checksum, version, _, length, number, nonce, file_bytes, name_bytes = _SEGMENT.unpack_from(
            view
        )
        if magic != SEGMENT_MAGIC or version != FORMAT_VERSION:
            return None
        if length != aligned(_SEGMENT.size + name_bytes) or length > len(view):
            return None
        if _checksum(view[:length], _SEED) != checksum:
            return None
        return cls(
            number, nonce, file_bytes, bytes(view[_SEGMENT.size : _SEGMENT.size + name_bytes]).decode()
        )


class RecordHeader(NamedTuple):
    """What a record says of itself. Sizes in bytes."""

    length: int  # of the header; the payload follows
    payload_bytes: int
    chunk_index: int
    object_size: int
    digest: int
    identity: bytes
    block_digests: bytes

    @property
    def record_bytes(self) -> int:
        """From this record's start to the next one's."""
        return self.length + aligned(self.payload_bytes)


def header_bytes(identity_bytes: int, payload_bytes: int) -> int:
    """Length of a record's header."""
    return aligned(_RECORD.size + identity_bytes + 8 * -(-payload_bytes // BLOCK_BYTES))


def record_bytes(identity_bytes: int, payload_bytes: int) -> int:
    """Room a record takes in a segment."""
    return header_bytes(identity_bytes, payload_bytes) + aligned(payload_bytes)


def encode_record(header: RecordHeader, nonce: int, offset: int) -> bytes:
    """The bytes of a record's header, for the place `offset` of the segment with `nonce`."""
    identity = header.identity
    out = bytearray(header.length)
    fields = (FORMAT_VERSION, 0, header.length, header.payload_bytes, header.chunk_index, header.object_size)
    _RECORD.pack_into(out, 0, RECORD_MAGIC, 0, *fields, header.digest, len(identity))
    variable = identity + header.block_digests
    out[_RECORD.size : _RECORD.size + len(variable)] = variable
    struct.pack_into("<Q", out, 8, _checksum(out, _seed_of(nonce, offset)))
    return bytes(out)


def decode_record(view: memoryview, nonce: int, offset: int) -> RecordHeader | None:
    """The record at `offset` of a segment, `view` being the whole file; None if there is no sound header.

    No length is used before it is known to lie within the file, none is believed before the checksum holds. The
    payload is promised to lie within the file too, but isn't looked at.
    """
    if offset < 0 or offset % ALIGN_BYTES or offset + _RECORD.size > len(view):
        return None
    fields = _RECORD.unpack_from(view, offset)
    magic, checksum, version, _, length, payload_bytes, index, object_size, digest, identity_bytes = fields
    if magic != RECORD_MAGIC or version != FORMAT_VERSION:
        return None
    if length != header_bytes(identity_bytes, payload_bytes) or offset + length + payload_bytes > len(view):
        return None
    header = view[offset : offset + length]
    if _checksum(header, _seed_of(nonce, offset)) != checksum:
        return None
    digests_at = _RECORD.size + identity_bytes
    digests_end = digests_at + 8 * -(-payload_bytes // BLOCK_BYTES)
    identity = bytes(header[_RECORD.size : digests_at])
    return RecordHeader(
        length, payload_bytes, index, object_size, digest, identity, bytes(header[digests_at:digests_end])
    )


def peek_header_bytes(view: memoryview, offset: int) -> int:
    """What the record at `offset` claims its header takes, unchecked, but no more than one can."""
    if offset + _RECORD.size > len(view):
        return 0
    return min(int(_RECORD.unpack_from(view, offset)[4]), MAX_RECORD_BYTES - CHUNK_BYTES)


def padding(payload_bytes: int) -> bytes:
    """Zeros between a payload's end and the next record."""
    return _ZEROS[: aligned(payload_bytes) - payload_bytes]


_ZEROS: Final = bytes(ALIGN_BYTES)


def _seed_of(nonce: int, offset: int) -> int:
    return (_SEED ^ nonce) + offset & _MASK


def _checksum(header: bytearray | memoryview, seed: int) -> int:
    return int(xxhash.xxh3_64_intdigest(memoryview(header)[_CHECKED_FROM:], seed=seed))
