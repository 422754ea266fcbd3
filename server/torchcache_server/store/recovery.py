"""Finding the records of a segment again, by its file alone.

A process that is killed leaves gaps: several threads write into one segment, and none knows the others' fate. So a
scan goes on behind a gap at the next sound header. A record whose payload's end is missing is torn, and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from torchcache.model import BLOCK_BYTES, block_digests
from torchcache_server.store.disk import DiskCalls
from torchcache_server.store.record import ALIGN_BYTES, RECORD_MAGIC, RecordHeader
from torchcache_server.store.segments import Segment

_MAGIC_WORD: Final = int.from_bytes(RECORD_MAGIC, "little")
_SEARCH_BYTES: Final = 1 << 20


def find_records(disk: DiskCalls, segment: Segment) -> Iterator[tuple[int, RecordHeader]]:
    """The whole records of a segment with their offsets, by rising offset."""
    at = segment.header.length
    for start, end in _data_extents(disk, segment, at):
        at = max(at, start - start % ALIGN_BYTES)
        while at < end:
            record = segment.record(at)
            if record is None:
                at = _next_magic(segment.view, at + ALIGN_BYTES, end)
                continue
            if _end_is_written(segment.view, at, record):
                yield at, record
                at += record.record_bytes
            else:
                at += ALIGN_BYTES


def cut_tail(disk: DiskCalls, segment: Segment, tail: int) -> None:
    """Makes `tail` the segment's end: what lies behind it becomes a hole. The descriptor must be open."""
    if segment.fd is None:
        raise ValueError("a segment is cut while it is open")
    disk.truncate(segment.fd, tail)
    disk.truncate(segment.fd, segment.header.file_bytes)
    segment.tail = tail


def _data_extents(disk: DiskCalls, segment: Segment, at: int) -> Iterable[tuple[int, int]]:
    """Parts of the file from `at` on that are not holes."""
    if segment.fd is None:
        raise ValueError("a segment is scanned while it is open")
    size = segment.header.file_bytes
    while at < size and (start := disk.next_data(segment.fd, at)) is not None:
        at = min(size, disk.next_hole(segment.fd, start))
        yield start, at


def _next_magic(view: memoryview, at: int, end: int) -> int:
    """First aligned place from `at` on where a record might start; `end` if there is none."""
    while at < end:
        stop = min(at + _SEARCH_BYTES, end)
        whole = (stop - at) // ALIGN_BYTES * ALIGN_BYTES
        words = np.frombuffer(view[at : at + whole], dtype="<u8")[:: ALIGN_BYTES // 8]
        hits = np.flatnonzero(words == _MAGIC_WORD)
        if len(hits):
            return at + int(hits[0]) * ALIGN_BYTES
        at = stop if whole else end
    return end


def _end_is_written(view: memoryview, offset: int, record: RecordHeader) -> bool:
    """Whether the payload's last block is there.

    A write that was cut short by a kill lacks its end. What a power cut took elsewhere the readers find: they verify
    every block. Reading all payloads here would make a start take as long as reading the disk.
    """
    if not record.payload_bytes:
        return True
    start = offset + record.length
    last = (record.payload_bytes - 1) // BLOCK_BYTES * BLOCK_BYTES
    return block_digests(view[start + last : start + record.payload_bytes]) == record.block_digests[-8:]
