"""What lies in a store's folder, as far as server and client must both know it. Pure.

A segment file is called by its number and nonce, and lies in a folder called by the digest of its namespace. In it lie
its own header, then records, each a header and a payload. Little-endian. Headers, payloads and records start at
multiples of `ALIGN_BYTES` from the file's start.

Segment header: magic, checksum, version, flags, length, segment's number, nonce, file size, length of namespace
                | namespace.
Record header:  magic, checksum, version, length, payload length, chunk index, object size, chunk digest, identity
                length | identity (`ObjectId.encoded`) | digests of the payload's blocks | zeros.

The checksum is xxh3-64 of all of the header behind itself. A record's is seeded with the segment's random nonce and
the record's offset: zeros never validate, nor does a record's copy elsewhere, be it an older file's remains or the
payload of an object that is itself a segment.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

import xxhash

from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ChunkId

IDENTITY: Final = "store.json"
SEGMENTS: Final = "segments"
INDEX: Final = "index"
INDEX_FILES: Final = ("data.mdb", "lock.mdb")
"""What LMDB makes in the folder of the index, the database first."""

SUFFIX: Final = ".segment"
PAGE_BYTES: Final = 4096

CHUNKS_TABLE: Final = b"chunks"
MEMBERS_TABLE: Final = b"members"
NOTES_TABLE: Final = b"segments"
FILES_TABLE: Final = b"files"
"""The tables of the index; see `torchcache_server.store.index`."""

CHUNK_INDEX: Final = struct.Struct(">I")
MAX_READERS: Final = 2048
"""Processes that may have the index open. Whoever opens it first settles it for all."""

LOCATION: Final = struct.Struct(">QQ")  # big-endian: `members` sort by segment, then offset
SEGMENT_NUMBER: Final = struct.Struct(">Q")

ALIGN_BYTES: Final = 64
FORMAT_VERSION: Final = 1

RECORD_MAGIC: Final = b"tcRECORD"
DEAD_MAGIC: Final = b"tcDEAD\0\0"
SEGMENT_MAGIC: Final = b"tcSEGMNT"

_NAME: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})" + re.escape(SUFFIX))

_FILE: Final = struct.Struct(">Q32s")

_SEED: Final = 0x74_6F_72_63_68_63_61_63
_MASK: Final = (1 << 64) - 1
_CHECKED_FROM: Final = 16  # behind magic and checksum
_HANDED_OUT: Final = 1  # of a segment's flags

_RECORD: Final = struct.Struct("<8sQHHIIIqQI")
_SEGMENT: Final = struct.Struct("<8sQHHIQQQI")

IDENTITY_AT: Final = _RECORD.size
"""Where in a record's header the identity starts; the blocks' digests follow it."""

MAX_IDENTITY_BYTES: Final = 16 * 1024
"""Longest `ObjectId.encoded`: S3's keys have 1024 bytes, a path 4096."""

MAX_RECORD_BYTES: Final = CHUNK_BYTES + 2 * MAX_IDENTITY_BYTES
"""More than any record takes, header included."""


class Location(NamedTuple):
    """A record's place: number of its segment, offset of its header in bytes."""

    segment: int
    offset: int


def folder_name(namespace: str) -> str:
    """Name of a namespace's folder: a digest, so that no name ever becomes a path."""
    return hashlib.sha256(namespace.encode()).hexdigest()


def file_name(number: int, nonce: int) -> str:
    """Sorts by number."""
    return f"{number:016x}-{nonce:016x}{SUFFIX}"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """Number and nonce; None for a name that no segment has."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1], 16), int(found[2], 16))


def file_entry(nonce: int, namespace: str) -> bytes:
    """What the index says of a segment's file: from it and the number follows the path."""
    return _FILE.pack(nonce, hashlib.sha256(namespace.encode()).digest())


def file_at(number: int, entry: bytes) -> tuple[int, str]:
    """Nonce of a segment, and its file's path below the store's folder."""
    nonce, folder = _FILE.unpack(entry)
    return nonce, f"{SEGMENTS}/{folder.hex()}/{file_name(number, nonce)}"


def page_aligned(size: int) -> int:
    """`size`, rounded up to whole pages: what the file system gives for it."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def chunk_key(chunk: ChunkId) -> bytes:
    """The chunk's key in the index."""
    return chunk.object.digest + CHUNK_INDEX.pack(chunk.index)


def record_key(identity: bytes, index: int) -> bytes:
    """The same, from what a record's header says: `ObjectId.encoded` and the chunk's index."""
    return xxhash.xxh3_128_digest(identity) + CHUNK_INDEX.pack(index)


def aligned(size: int) -> int:
    """`size`, rounded up to `ALIGN_BYTES`."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Who a segment is. `file_bytes` is the size of the whole file, header included.

    `handed_out`: a client writes into it, and so the server appends nothing, ever.
    """

    number: int
    nonce: int
    file_bytes: int
    namespace: str
    handed_out: bool = False

    @property
    def length(self) -> int:
        return aligned(_SEGMENT.size + len(self.namespace.encode()))

    def encode(self) -> bytes:
        name = self.namespace.encode()
        flags = _HANDED_OUT if self.handed_out else 0
        fields = (FORMAT_VERSION, flags, self.length, self.number, self.nonce, self.file_bytes, len(name))
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
        fields = _SEGMENT.unpack_from(view)
        magic, checksum, version, flags, length, number, nonce, file_bytes, name_bytes = fields
        if magic != SEGMENT_MAGIC or version != FORMAT_VERSION:
            return None
        if length != aligned(_SEGMENT.size + name_bytes) or length > len(view):
            return None
        if _checksum(view[:length], _SEED) != checksum:
            return None
        namespace = bytes(view[_SEGMENT.size : _SEGMENT.size + name_bytes]).decode()
        return cls(number, nonce, file_bytes, namespace, bool(flags & _HANDED_OUT))


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


MAX_HEADER_BYTES: Final = header_bytes(MAX_IDENTITY_BYTES, CHUNK_BYTES)
"""Longest header of a record."""


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
    """The record at `offset` of a segment, `view` being the whole file; None if there is no sound header."""
    return record_header(view, offset, nonce, offset, len(view))


def record_header(view: memoryview, at: int, nonce: int, offset: int, file_bytes: int) -> RecordHeader | None:
    """The same of a segment of `file_bytes` of which only a part is in `view`, the record at `at`."""
    found = sound_record(view, at, nonce, offset, file_bytes)
    if found is None:
        return None
    length, payload_bytes, index, object_size, digest, identity_bytes = found
    header = view[at : at + length]
    digests_at = IDENTITY_AT + identity_bytes
    digests_end = digests_at + 8 * -(-payload_bytes // BLOCK_BYTES)
    identity = bytes(header[IDENTITY_AT:digests_at])
    return RecordHeader(
        length, payload_bytes, index, object_size, digest, identity, bytes(header[digests_at:digests_end])
    )


def sound_record(
    view: memoryview, at: int, nonce: int, offset: int, file_bytes: int
) -> tuple[int, int, int, int, int, int] | None:
    """The record at `offset` of a segment of `file_bytes`, which is at `at` in `view`; None if its header isn't sound.

    No length is used before it is known to lie within the view, none is believed before the checksum holds. The
    payload is promised to lie within the file too, but isn't looked at.

    Returns the header's length, payload length, chunk index, object size, chunk digest and identity length: a plain
    tuple, as a start asks for every record there is.
    """
    if at < 0 or offset % ALIGN_BYTES or at + IDENTITY_AT > len(view):
        return None
    fields = _RECORD.unpack_from(view, at)
    magic, checksum, version, _, length, payload_bytes, _, _, _, identity_bytes = fields
    if magic != RECORD_MAGIC or version != FORMAT_VERSION:
        return None
    if length != header_bytes(identity_bytes, payload_bytes) or at + length > len(view):
        return None
    if offset + length + payload_bytes > file_bytes:
        return None
    checked = view[at + _CHECKED_FROM : at + length]
    if xxhash.xxh3_64_intdigest(checked, seed=_seed_of(nonce, offset)) != checksum:
        return None
    return fields[4:]


def stated_length(view: memoryview, at: int) -> int:
    """Length of the header that seems to be at `at` in `view`, at most `MAX_HEADER_BYTES`; 0 if there is none.

    Nothing is checked but the magic: it says how much to read for `sound_record`.
    """
    if at + IDENTITY_AT > len(view):
        return 0
    magic, _, _, _, length, *_ = _RECORD.unpack_from(view, at)
    return min(length, MAX_HEADER_BYTES) if magic == RECORD_MAGIC else 0


def padding(payload_bytes: int) -> bytes:
    """Zeros between a payload's end and the next record."""
    return _ZEROS[: aligned(payload_bytes) - payload_bytes]


_ZEROS: Final = bytes(ALIGN_BYTES)


def _seed_of(nonce: int, offset: int) -> int:
    return (_SEED ^ nonce) + offset & _MASK


def _checksum(header: bytearray | memoryview, seed: int) -> int:
    return int(xxhash.xxh3_64_intdigest(memoryview(header)[_CHECKED_FROM:], seed=seed))
