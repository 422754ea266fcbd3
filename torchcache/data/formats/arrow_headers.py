"""How many rows each record batch of an Arrow IPC file has, by the batches' headers alone.

pyarrow reads a batch whole to say. The footer and the headers are flatbuffers, of the tables `Footer` and `Message` in
Arrow's format/File.fbs and format/Message.fbs; read is one number of each.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from torchcache.data.formats.base import damaged, read_exactly
from torchcache.errors import TorchCacheError

_MAGIC: Final = b"ARROW1"
_RECORD_BATCHES: Final = 3  # fields of Footer,
_HEADER_TYPE, _HEADER = 1, 2  # of Message,
_LENGTH: Final = 0  # and of RecordBatch
_IS_RECORD_BATCH: Final = 3
_BLOCK: Final = struct.Struct("<qi4xq")
_CONTINUED: Final = 0xFFFFFFFF

_AT_ONCE_BYTES: Final = 16 * 1024
"""Read at once: headers of small batches come together, and little of a large one's body with its header."""


def batch_rows(file: BinaryIO, where: str) -> list[int]:
    """The rows of each record batch, in order. Raises IntegrityError."""
    size = file.seek(0, io.SEEK_END)
    buffered = io.BufferedReader(cast(io.RawIOBase, file), _AT_ONCE_BYTES)
    try:
        blocks = list(_blocks(buffered, where))
        if any(min(block) < 0 for block in blocks):
            raise ValueError("a batch has a negative place or length")  # such would offset others in the sum
        if sum(header_bytes for _, header_bytes, _ in blocks) > size:
            raise ValueError("its headers come to more than all of it")  # one might be named a million times
        return [_rows(_header(buffered, block, size, where)) for block in blocks]
    except TorchCacheError:
        raise
    except (struct.error, ValueError, OSError) as error:
        raise damaged(where, f"its record batches can't be counted: {error}") from error
    finally:
        buffered.detach()


def _blocks(file: BinaryIO, where: str) -> Iterator[tuple[int, int, int]]:
    """The offset of each batch, and the bytes of its header and of its body."""
    end = file.seek(-(4 + len(_MAGIC)), io.SEEK_END)
    length = _number("<i", file.read(4), 0)
    if not 0 < length <= end:
        raise ValueError(f"a footer of {length} bytes")
    file.seek(end - length)
    footer = read_exactly(file, length, where)
    at = _Table.root(footer).referred(_RECORD_BATCHES)
    if at is None:
        return
    count = _number("<I", footer, at)
    blocks = footer[at + 4 : at + 4 + count * _BLOCK.size]
    if len(blocks) != count * _BLOCK.size:
        raise ValueError("the footer is cut short")
    yield from _BLOCK.iter_unpack(blocks)


def _header(file: BinaryIO, block: tuple[int, int, int], size: int, where: str) -> bytes:
    """A batch's header, without what stands before it."""
    offset, header_bytes, body_bytes = block
    if offset + header_bytes + body_bytes > size:
        raise ValueError("a batch goes beyond the end")
    file.seek(offset)
    header = read_exactly(file, header_bytes, where)
    return header[8 if _number("<I", header, 0) == _CONTINUED else 4 :]  # 4 before Arrow 0.15


def _rows(header: bytes) -> int:
    message = _Table.root(header)
    kind, batch = message.field(_HEADER_TYPE), message.referred(_HEADER)
    if kind is None or batch is None or _number("<B", message.data, kind) != _IS_RECORD_BATCH:
        raise ValueError("what should be a batch is none")
    length = _Table(message.data, batch).field(_LENGTH)
    rows = 0 if length is None else _number("<q", message.data, length)
    if rows < 0:
        raise ValueError(f"a batch has {rows} rows")
    return rows


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a flatbuffer, at a place in it. All places are checked when they are read."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _number("<I", data, 0))

    def field(self, number: int) -> int | None:
        """Where a field is; None if it has its default."""
        fields = self.at - _number("<i", self.data, self.at)
        entry = 4 + 2 * number
        if entry + 2 > _number("<H", self.data, fields):
            return None
        offset = _number("<H", self.data, fields + entry)
        return self.at + offset if offset else None

    def referred(self, number: int) -> int | None:
        """Where the table or vector is that a field refers to."""
        at = self.field(number)
        return None if at is None else at + _number("<I", self.data, at)


def _number(kind: str, data: bytes, at: int) -> int:
    if at < 0:  # struct counts such from the end
        raise ValueError("a place before the beginning")
    number: int = struct.unpack_from(kind, data, at)[0]
    return number
