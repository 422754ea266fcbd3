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
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import pyarrow as pa
from xxhash import xxh3_64_intdigest

from torchcache.errors import IntegrityError
from torchcache.model import CHUNK_BYTES, block_digests

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

SERVER_ID: Final = b"server_id"
"""In the metadata of a stream's schema: the id of the server that sends it."""

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
        if self.whole:
            good = is_intact(self.data, self.digests)
        else:
            good = block_digests(memoryview(self.data)) == self.digests
        if not good:
            raise IntegrityError("a piece does not match its checksums")


_DIGEST: Final = struct.Struct("<Q")


def is_intact(data: pa.Buffer, digest: bytes) -> bool:
    """Whether all of a chunk matches its checksum, as a piece carries it."""
    return _DIGEST.pack(xxh3_64_intdigest(data)) == digest


EMPTY = pa.py_buffer(b"")


def failed_piece(extent: int, error: str) -> Piece:
    """The row that tells that an extent failed."""
    return Piece(extent, 0, 0, False, b"", EMPTY, error)


_WORD: Final = struct.Struct("<I")
_INLINE: Final = struct.Struct("<3I")


def binary_view_array(buffers: Sequence[pa.Buffer]) -> pa.Array:
    """An array of type binary_view whose row i is `buffers[i]`, without copying those longer than 12 bytes.

    Layout: https://arrow.apache.org/docs/format/Columnar.html#variable-size-binary-view-layout
    """
    words: list[
        int
    ] = []  # a view is four: size, first four bytes, number of the variadic buffer, offset in it
    variadic: list[pa.Buffer] = []
    for buffer in buffers:
        size = buffer.size
        if size <= 12:  # the bytes themselves stand behind the size
            words += (size, *_INLINE.unpack(bytes(buffer).ljust(12, b"\0")))
        else:
            words += (size, _WORD.unpack_from(buffer)[0], len(variadic), 0)
            variadic.append(buffer)
    views = pa.py_buffer(struct.pack(f"<{len(words)}I", *words))
    return pa.Array.from_buffers(pa.binary_view(), len(buffers), [None, views, *variadic])


def binary_view_buffers(array: pa.Array) -> list[pa.Buffer]:
    """The rows of a binary_view array as buffers, without copying; bounds are checked, since a peer made it."""
    _, view_buffer, *variadic = array.buffers()
    start = array.offset
    try:
        views = struct.unpack_from(f"<{4 * len(array)}I", view_buffer or b"", 16 * start)
    except struct.error:
        raise IntegrityError("a batch has a column that ends too early") from None
    out = []
    fields = zip(views[::4], views[2::4], views[3::4], strict=True)
    for row, (size, index, offset) in enumerate(fields):
        if size <= 12:
            out.append(view_buffer.slice((start + row) * 16 + 4, size))
            continue
        buffer = variadic[index] if index < len(variadic) else EMPTY
        if offset == 0 and buffer.size == size:  # as our servers send it
            out.append(buffer)
        elif offset + size <= buffer.size:
            out.append(buffer.slice(offset, size))
        else:
            raise IntegrityError("a batch points outside its buffers")
    return out


def _numbers(kind: pa.DataType, code: str, values: Sequence[int]) -> pa.Array:
    """`code` is struct's for one value. Not pa.array, which imports pandas where that is installed; and packing a few
    numbers takes struct a quarter of numpy's time."""
    packed = struct.pack(f"<{len(values)}{code}", *values)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(packed)])


def _bits(values: Sequence[bool]) -> pa.Buffer:
    bits = (
        sum(1 << at for at, value in enumerate(values) if value)
        if not all(values)
        else (1 << len(values)) - 1
    )
    return pa.py_buffer(bits.to_bytes(-(-len(values) // 8), "little"))


def _strings(kind: pa.DataType, values: Sequence[bytes | None]) -> pa.Array:
    present = None if None not in values else _bits([value is not None for value in values])
    rows = [value or b"" for value in values]
    offsets = struct.pack(f"<{len(rows) + 1}i", 0, *accumulate(map(len, rows)))
    data = b"".join(rows)
    return pa.Array.from_buffers(kind, len(values), [present, pa.py_buffer(offsets), pa.py_buffer(data)])


def encode_pieces(pieces: Sequence[Piece]) -> pa.RecordBatch:
    """One batch of READ_SCHEMA."""
    count = len(pieces)
    extents, sizes, offsets, wholes, digests, data, errors = zip(*pieces, strict=True) if count else [()] * 7
    all_good = not any(errors)  # and then the column is made without looking at its rows
    texts = () if all_good else [None if error is None else error.encode() for error in errors]
    columns = [
        _numbers(pa.uint32(), "I", extents),
        _numbers(pa.int64(), "q", sizes),
        _numbers(pa.int64(), "q", offsets),
        pa.Array.from_buffers(pa.bool_(), count, [None, _bits(wholes)]),
        _strings(pa.binary(), digests),
        pa.nulls(count, pa.string()) if all_good else _strings(pa.string(), texts),
        binary_view_array(data),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=READ_SCHEMA)


def decode_pieces(batch: pa.RecordBatch) -> Iterator[Piece]:
    """The rows of a batch of READ_SCHEMA, not yet verified. `data` are views into the batch.

    Raises IntegrityError for another schema, and for a column that isn't as long as the batch says: Arrow believes a
    peer's lengths, and would read beyond them.
    """
    if not batch.schema.equals(READ_SCHEMA):
        raise IntegrityError(f"a read answered with another schema: {batch.schema}")
    column = batch.column
    rows = zip(
        _integers(column(0), "I"),
        _integers(column(1), "q"),
        _integers(column(2), "q"),
        _flags(column(3).buffers()[1], column(3)),
        _binaries(column(4)),
        binary_view_buffers(column(6)),
        _texts(column(5)),
        strict=True,
    )
    return map(Piece._make, rows)


def _integers(array: pa.Array, code: str) -> Sequence[int]:
    """The values of a column of numbers; those of null rows are whatever lies there."""
    try:
        return struct.unpack_from(
            f"<{len(array)}{code}", array.buffers()[1] or b"", array.offset * struct.calcsize(code)
        )
    except struct.error:
        raise IntegrityError("a batch has a column that ends too early") from None


def _flags(buffer: pa.Buffer | None, array: pa.Array) -> Sequence[bool]:
    """The bits of `buffer` that belong to the rows of `array`."""
    start, end = array.offset, array.offset + len(array)
    bits = memoryview(buffer or b"")[: -(-end // 8)]
    if len(bits) * 8 < end:
        raise IntegrityError("a batch has a column that ends too early")
    number = int.from_bytes(bits, "little") >> start
    return [number >> at & 1 == 1 for at in range(len(array))]


def _binaries(array: pa.Array) -> Sequence[bytes]:
    """The rows of a binary column; those that are null are whatever lies there."""
    _, offsets, data = array.buffers()
    try:
        ends = (
            struct.unpack_from(f"<{len(array) + 1}i", offsets or b"", array.offset * 4)
            if len(array)
            else (0,)
        )
    except struct.error:
        raise IntegrityError("a batch has a column that ends too early") from None
    content = bytes(data or b"")
    rows = [content[start:end] for start, end in pairwise(ends)]
    if ends[0] < 0 or sum(map(len, rows)) != ends[-1] - ends[0]:
        raise IntegrityError("a batch points outside its buffers")
    return rows


def _texts(array: pa.Array) -> Sequence[str | None]:
    """The rows of a string column."""
    present = array.buffers()[0]
    if present is None:
        return [row.decode(errors="replace") for row in _binaries(array)]
    there = _flags(present, array)
    if not any(there):
        return [None] * len(array)
    rows = zip(_binaries(array), there, strict=True)
    return [row.decode(errors="replace") if is_there else None for row, is_there in rows]


def encode_chunks(rows: Sequence[tuple[int, int, int, pa.Buffer]]) -> pa.RecordBatch:
    """One batch of WRITE_SCHEMA from (object, chunk, digest, data) rows."""
    columns = [
        _numbers(pa.uint32(), "I", [r[0] for r in rows]),
        _numbers(pa.uint32(), "I", [r[1] for r in rows]),
        _numbers(pa.uint64(), "Q", [r[2] for r in rows]),
        binary_view_array([r[3] for r in rows]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=WRITE_SCHEMA)


def decode_chunks(batch: pa.RecordBatch) -> Iterator[tuple[int, int, int, pa.Buffer]]:
    """The (object, chunk, digest, data) rows of a batch of WRITE_SCHEMA; sizes checked, digests not.

    Raises IntegrityError as `decode_pieces`.
    """
    if not batch.schema.equals(WRITE_SCHEMA):
        raise IntegrityError(f"a write came with another schema: {batch.schema}")
    column = batch.column
    data = binary_view_buffers(column(3))
    if any(d.size > CHUNK_BYTES for d in data):
        raise IntegrityError(f"a chunk is larger than {CHUNK_BYTES} bytes")
    return zip(
        _integers(column(0), "I"), _integers(column(1), "I"), _integers(column(2), "Q"), data, strict=True
    )
