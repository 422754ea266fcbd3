"""Reading all of a segment's file, and telling sound records from others. Changes nothing, and maps nothing: what the
disk can't read is said, where a mapping would end the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from torchcache.model import block_digests, chunk_digest
from torchcache.records import (
    ALIGN_BYTES,
    PAGE_BYTES,
    RECORD_MAGIC,
    RecordHeader,
    SegmentHeader,
    decode_record,
)
from torchcache_server.store.disk import UNREADABLE, DiskCalls

_MAGIC_WORD: Final = int.from_bytes(RECORD_MAGIC, "little")
_STEP_BYTES: Final = 4 << 20
_ANONYMOUS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Found(NamedTuple):
    """A record whose header is sound. `is_torn`: the end of its payload is wrong, as a write cut short leaves it."""

    offset: int
    header: RecordHeader
    is_intact: bool
    is_torn: bool


class SegmentBytes:
    """The bytes of one segment's file. `unreadable` is how many of them the disk can't read: they are zeros here."""

    def __init__(
        self, disk: DiskCalls, fd: int, header: SegmentHeader, *, advance: Callable[[int], None]
    ) -> None:
        """Reads what isn't a hole; `advance` gets the bytes of each step. Raises OSError."""
        self._header = header
        self.size = min(disk.size(fd), header.file_bytes)
        self.unreadable = 0
        self._memory = mmap.mmap(-1, max(self.size, 1), flags=_ANONYMOUS)  # a hole costs nothing
        at = 0
        while at < self.size and (start := disk.next_data(fd, at)) is not None:
            at = min(disk.next_hole(fd, start), self.size)
            for step in range(start, at, _STEP_BYTES):
                self._read(disk, fd, step, min(step + _STEP_BYTES, at))
                advance(min(step + _STEP_BYTES, at) - step)

    def records(self) -> Iterator[Found]:
        """Records with a sound header, by offset; past a torn one the next may start within its payload."""
        view = memoryview(self._memory)[: self.size]
        behind = self._header.length
        for at in possible_records(view):
            if at < behind:
                continue
            header = decode_record(view, self._header.nonce, at)
            if header is None:
                continue
            found = _check(view, at, header)
            behind = at + (ALIGN_BYTES if found.is_torn else header.record_bytes)
            yield found

    def _read(self, disk: DiskCalls, fd: int, start: int, end: int) -> None:
        """Reads a part; page by page once the disk has refused."""
        at, step = start, end - start
        while at < end:
            try:
                part = disk.pread(fd, min(step, end - at), at)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                if step > PAGE_BYTES:
                    step = PAGE_BYTES
                    continue
                self.unreadable += min(PAGE_BYTES, end - at)
                at += PAGE_BYTES
                continue
            if not part:
                return
            self._memory[at : at + len(part)] = part
            at += len(part)


def possible_records(view: memoryview) -> list[int]:
    """The aligned places of `view`, which starts at one, that a record's magic is at; rising. No more is checked.

    A file that was another segment before is full of them.
    """
    words = np.frombuffer(view[: len(view) // ALIGN_BYTES * ALIGN_BYTES], dtype="<u8")[:: ALIGN_BYTES // 8]
    found: list[int] = (np.flatnonzero(words == _MAGIC_WORD) * ALIGN_BYTES).tolist()
    return found


def _check(view: memoryview, at: int, header: RecordHeader) -> Found:
    payload = view[at + header.length : at + header.length + header.payload_bytes]
    digests = block_digests(payload)
    is_intact = digests == header.block_digests and chunk_digest(payload) == header.digest
    is_torn = bool(header.payload_bytes) and digests[-8:] != header.block_digests[-8:]
    return Found(at, header, is_intact, is_torn)


def identity_text(identity: bytes) -> str:
    """An object's encoded identity, for people."""
    parts, at = [], 0
    for _ in range(3):
        size = int.from_bytes(identity[at : at + 4], "little")
        parts.append(identity[at + 4 : at + 4 + size].decode(errors="replace"))
        at += 4 + size
    store, key, version = parts
    return f"{store}/{key}@{version}"
