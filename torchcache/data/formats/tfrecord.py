"""TFRecord: length (u64), its checksum (u32), the data, its checksum (u32), all little-endian.

Checksums are CRC-32C, masked: rotated right by 15 bits, plus 0xa282ead8. See TensorFlow, "TFRecord and
tf.train.Example", and core/lib/io/record_writer.h. Both are verified, whenever a record is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import ClassVar, Final

from torchcache.data.formats.base import MAX_RECORD_BYTES, RecordFormat, Stream, damaged, place, read_exactly
from torchcache.data.formats.crc32c import crc32c

_HEAD: Final = struct.Struct("<QI")
_TAIL: Final = struct.Struct("<I")


class TFRecord(RecordFormat):
    """A sample is the record's `bytes`, most often a serialised tf.train.Example."""

    name: ClassVar[str] = "tfrecord"
    suffixes: ClassVar[tuple[str, ...]] = (".tfrecord", ".tfrecords")

    def frames(self, stream: Stream, where: str) -> Iterator[tuple[int, bytes]]:
        at = 0
        while head := read_exactly(stream, _HEAD.size, where):
            length = _length(head, f"{where} at byte {at}")
            rest = read_exactly(stream, length + _TAIL.size, f"{where} at byte {at}")
            if len(rest) < length + _TAIL.size:
                raise damaged(where, f"it is cut short in the record at byte {at}, of {length:,} bytes")
            yield at, head + rest
            at += _HEAD.size + len(rest)

    def record(self, frame: memoryview, url: str, number: int) -> bytes:
        where = place(url, number)
        length = _length(frame[: _HEAD.size], where)
        if len(frame) < _HEAD.size + length + _TAIL.size:
            raise damaged(where, f"it has fewer than its {length:,} bytes")
        data = frame[_HEAD.size : _HEAD.size + length]
        [stored] = _TAIL.unpack_from(frame, _HEAD.size + length)
        if stored != masked(data):
            raise damaged(where, "the checksum of its data is wrong")
        return bytes(data)


def masked(data: bytes | memoryview) -> int:
    """The masked CRC-32C of `data`."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _length(head: bytes | memoryview, where: str) -> int:
    if len(head) < _HEAD.size:
        raise damaged(where, "it is cut short in the length of a record")
    length, stored = _HEAD.unpack(head)
    if stored != masked(head[:8]):
        raise damaged(where, "the checksum of a record's length is wrong: it is no TFRecord, or damaged")
    if length > MAX_RECORD_BYTES:
        raise damaged(where, f"a record claims {length:,} bytes; at most {MAX_RECORD_BYTES:,} are read")
    return int(length)
