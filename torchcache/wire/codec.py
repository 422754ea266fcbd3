"""The data lane's Arrow batches.

A read's stream has the schema `READ_SCHEMA`. Each row is a piece of one chunk: the blocks that cover the part asked
for, with the checksums recorded when the chunk was stored, so that the reader proves every byte itself. Pieces are
views into mapped segments (Arrow's BinaryView with one variadic buffer a row): no byte is copied to make a batch. An
extent that failed has one row with `error` set. The rows of one extent come in order; extents may interleave.

A write's stream has the schema `WRITE_SCHEMA`, one row a chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from torchcache.errors import IntegrityError
from torchcache.model import CHUNK_BYTES, block_digests, chunk_digest

READ_SCHEMA = pa.schema(
    [
        ("extent", pa.uint32()),  # index of the extent in the request
        ("object_size", pa.int64()),  # bytes of the whole object
        ("offset", pa.int64()),  # of the piece's first byte, within the object; block-aligned
        ("whole", pa.bool_()),  # the piece is a whole chunk: `digests` is one xxh3-64 of it, else one a block
        ("digests", pa.binary()),  # xxh3-64, little-endian u64
        ("error", pa.string()),  # see wire/status.py
        ("data", pa.binary_view()),
    ]
)

WRITE_SCHEMA = pa.schema(
    [
        ("object", pa.uint32()),  # index of the object in the request
        ("chunk", pa.uint32()),  # number of the chunk in the object
        ("digest", pa.uint64()),  # xxh3-64 of the payload
        ("data", pa.binary_view()),
    ]
)

BATCH_BYTES = 2 * 1024 * 1024
"""A batch is closed when it holds this much. Small enough to stay in the CPU's cache on the way through gRPC."""

BATCH_ROWS = 1024


class Piece(NamedTuple):
    """Some blocks of one chunk, or the error in their place. `data` is any contiguous buffer (kept alive by Arrow)."""

    extent: int
    object_size: int
    offset: int
    whole: bool
    digests: bytes
    data: pa.Buffer
    error: str | None = None

    def verify(self) -> None:
        """Raises IntegrityError unless every byte matches its recorded checksum."""
        if len(self.digests) % 8 or (self.whole and len(self.digests) != 8):
            raise IntegrityError("a piece came with checksums of the wrong length")
        view = memoryview(self.data)
        if self.whole:
            good = chunk_digest(view) == int.from_bytes(self.digests, "little")
        else:
            good = block_digests(view) == self.digests
        if not good:
            raise IntegrityError("a piece does not match its checksums")


EMPTY = pa.py_buffer(b"")


def failed_piece(extent: int, error: str) -> Piece:
    """The row that tells that an extent failed."""
    return Piece(extent, 0, 0, False, b"", EMPTY, error)


_VIEW: Final = struct.Struct("<I4sII")  # size, first four bytes, number of the variadic buffer, offset in it
_INLINE_VIEW: Final = struct.Struct("<I12s")


def binary_view_array(buffers: Sequence[pa.Buffer]) -> pa.Array:
    """An array of type binary_view whose row i is `buffers[i]`, without copying those longer than 12 bytes.

    Layout: https://arrow.apache.org/docs/format/Columnar.html#variable-size-binary-view-layout
    """
    views = bytearray()
    variadic: list[pa.Buffer] = []
    for buffer in buffers:
        size = buffer.size
        if size <= 12:
            views += _INLINE_VIEW.pack(size, bytes(buffer))
        else:
            views += _VIEW.pack(size, bytes(memoryview(buffer)[:4]), len(variadic), 0)
            variadic.append(buffer)
    return pa.Array.from_buffers(pa.binary_view(), len(buffers), [None, pa.py_buffer(views), *variadic])


def binary_view_buffers(array: pa.Array) -> list[pa.Buffer]:
    """The rows of a binary_view array as buffers, without copying; bounds are checked, since a peer made it."""
    _, view_buffer, *variadic = array.buffers()
    start = array.offset
    views = np.frombuffer(view_buffer, dtype="<u4").reshape(-1, 4)[start : start + len(array)]
    out = []
    for row, (size, _, index, offset) in enumerate(views.tolist()):
        if size <= 12:
            out.append(view_buffer.slice((start + row) * 16 + 4, size))
        elif index >= len(variadic) or offset + size > variadic[index].size:
            raise IntegrityError("a batch points outside its buffers")
        else:
            out.append(variadic[index].slice(offset, size))
    return out


def _numbers(kind: pa.DataType, dtype: str, values: Sequence[int]) -> pa.Array:
    # Not pa.array: given a list or a numpy array it imports pandas, where that is installed.
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, dtype))])


def _bits(values: Sequence[bool]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(values, bool), bitorder="little"))


def _strings(kind: pa.DataType, values: Sequence[bytes | None]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, "<i4")
    np.cumsum([len(v) if v else 0 for v in values], out=offsets[1:])
    present = _bits([v is not None for v in values])
    data = b"".join(v for v in values if v)
    return pa.Array.from_buffers(kind, len(values), [present, pa.py_buffer(offsets), pa.py_buffer(data)])


def encode_pieces(pieces: Sequence[Piece]) -> pa.RecordBatch:
    """One batch of READ_SCHEMA."""
    errors = [p.error.encode() if p.error is not None else None for p in pieces]
    all_good = not any(errors)  # and then the column is made without looking at its rows
    columns = [
        _numbers(pa.uint32(), "<u4", [p.extent for p in pieces]),
        _numbers(pa.int64(), "<i8", [p.object_size for p in pieces]),
        _numbers(pa.int64(), "<i8", [p.offset for p in pieces]),
        pa.Array.from_buffers(pa.bool_(), len(pieces), [None, _bits([p.whole for p in pieces])]),
        _strings(pa.binary(), [p.digests for p in pieces]),
        pa.nulls(len(pieces), pa.string()) if all_good else _strings(pa.string(), errors),
        binary_view_array([p.data for p in pieces]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=READ_SCHEMA)


def decode_pieces(batch: pa.RecordBatch) -> Iterator[Piece]:
    """The rows of a batch of READ_SCHEMA, not yet verified. `data` are views into the batch."""
    if not batch.schema.equals(READ_SCHEMA):
        raise IntegrityError(f"a read answered with another schema: {batch.schema}")
    extents, sizes, offsets, whole, digests, error = (batch.column(i).to_pylist() for i in range(6))
    rows = zip(
        extents, sizes, offsets, whole, digests, binary_view_buffers(batch.column(6)), error, strict=True
    )
    return (Piece(*row) for row in rows)


def encode_chunks(rows: Sequence[tuple[int, int, int, pa.Buffer]]) -> pa.RecordBatch:
    """One batch of WRITE_SCHEMA from (object, chunk, digest, data) rows."""
    columns = [
        _numbers(pa.uint32(), "<u4", [r[0] for r in rows]),
        _numbers(pa.uint32(), "<u4", [r[1] for r in rows]),
        _numbers(pa.uint64(), "<u8", [r[2] for r in rows]),
        binary_view_array([r[3] for r in rows]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=WRITE_SCHEMA)


def decode_chunks(batch: pa.RecordBatch) -> Iterator[tuple[int, int, int, pa.Buffer]]:
    """The (object, chunk, digest, data) rows of a batch of WRITE_SCHEMA; sizes checked, digests not."""
    if not batch.schema.equals(WRITE_SCHEMA):
        raise IntegrityError(f"a write came with another schema: {batch.schema}")
    objects, chunks, digests = (batch.column(i).to_pylist() for i in range(3))
    data = binary_view_buffers(batch.column(3))
    if any(d.size > CHUNK_BYTES for d in data):
        raise IntegrityError(f"a chunk is larger than {CHUNK_BYTES} bytes")
    return iter(zip(objects, chunks, digests, data, strict=True))
