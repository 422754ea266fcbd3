"""Finding the records of a segment again, by its file alone.

A process that is killed leaves gaps: several threads write into one segment, and none knows the others' fate. So a
scan goes on behind a gap at the next sound header. A record whose payload's end is missing is torn, and left out.

Nothing is read through the mapping: what a disk can't read is an error here, there it would end the process.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from torchcache.model import BLOCK_BYTES
from torchcache.records import ALIGN_BYTES, IDENTITY_AT, PAGE_BYTES, sound_record, stated_length
from torchcache_server.store.disk import UNREADABLE, DiskCalls
from torchcache_server.store.index import pack_place
from torchcache_server.store.segment_scan import possible_records
from torchcache_server.store.segments import Segment

_DIGEST: Final = struct.Struct("<Q").unpack_from
_HEAD_BYTES: Final = 1024  # most headers are shorter
_AHEAD_BYTES: Final = 1 << 20  # read at a time where records are close together, or searched for
_CLOSE_BYTES: Final = 32 * 1024  # two records of less than this are read in one go
_MAX_ERRORS: Final = 8  # each may take the disk seconds


class Scan(NamedTuple):
    """What a segment's file holds: its whole records as bytes of `PLACE`s, and where the next one may go.

    `error` is what the disk said of some part, if it did. Then there may be more than was found, up to `tail`.
    """

    places: bytearray
    tail: int
    error: OSError | None = None


def scan_and_cut(disk: DiskCalls, segment: Segment) -> Scan:
    """Finds the records of a segment and makes a hole of what lies behind the last. The descriptor must be open.

    Nothing is cut if parts of the file can't be read: there may be good records behind them. Raises OSError for what
    isn't only about a part of the file.
    """
    if segment.fd is None:
        raise ValueError("a segment is scanned while it is open")
    reader = _Reader(disk, segment.fd, segment)
    places, tail = reader.records(), reader.tail
    if reader.error is None:
        try:
            disk.truncate(segment.fd, tail)
            disk.truncate(segment.fd, segment.header.file_bytes)
            return Scan(places, tail)
        except OSError as error:
            reader.note(error)
    return Scan(places, max(tail, reader.data_end), reader.error)


def _data_extents(disk: DiskCalls, fd: int, at: int, size: int) -> Iterable[tuple[int, int]]:
    """Parts of the file from `at` on that are not holes."""
    while at < size and (start := disk.next_data(fd, at)) is not None:
        at = min(size, disk.next_hole(fd, start))
        yield start, at


class _Reader:
    """Walks through a segment, and reads no more of it than headers and the ends of payloads if those are long."""

    def __init__(self, disk: DiskCalls, fd: int, segment: Segment) -> None:
        self._disk = disk
        self._fd = fd
        self._number = segment.number
        self._nonce = segment.header.nonce
        self._size = segment.header.file_bytes
        self._start = 0  # of what is in `_view`, in the file
        self._view = memoryview(b"")
        self._magics: list[int] | None = (
            None  # where in the file `_view` has a record's first word, once asked for
        )
        self.places = bytearray()
        self.tail = segment.header.length
        self._readable = 0  # end of what the last read gave
        self._errors = 0
        self.error: OSError | None = None
        self.data_end = segment.header.length

    def records(self) -> bytearray:
        """The segment's whole records, but for those in parts that can't be read. Raises OSError."""
        at = self.data_end
        for start, end in _data_extents(self._disk, self._fd, at, self._size):
            self.data_end = end
            at = max(at, start - start % ALIGN_BYTES)
            while at < end:
                try:
                    at = self._walk(at, end)
                    if at < end:
                        at = self._next_magic(at + ALIGN_BYTES, end)
                except OSError as error:
                    self.note(error)
                    behind = self._readable // PAGE_BYTES * PAGE_BYTES + PAGE_BYTES
                    at = behind if self._errors < _MAX_ERRORS else end
        return self.places

    def note(self, error: OSError) -> None:
        """Remembers what is wrong with parts of the file; raises what isn't of that kind."""
        if error.errno not in UNREADABLE:
            raise error
        self.error = error
        self._errors += 1

    def _walk(self, at: int, end: int) -> int:
        """Takes in records from `at` on, one behind the other; returns where there is no whole one, or `end`."""
        while at < end:
            here = at - self._start
            header = sound_record(self._view, here, self._nonce, at, self._size)
            if header is None:
                if self._in_view(here, ALIGN_BYTES) and self._in_view(here, stated_length(self._view, here)):
                    return at  # read again, it would be the same
                header, here = self._read_header(at), 0
                if header is None:
                    return at
            length, payload_bytes, index, _, _, identity_bytes = header
            identity = self._view[here + IDENTITY_AT : here + IDENTITY_AT + identity_bytes]
            size = length + -(-payload_bytes // ALIGN_BYTES) * ALIGN_BYTES
            place = pack_place(identity, index, (self._number, at), size)
            if payload_bytes and not self._end_is_written(at, here, length, payload_bytes, identity_bytes):
                return at
            self.places += place
            self.tail = at = at + size
        return at

    def _read_header(self, at: int) -> tuple[int, int, int, int, int, int] | None:
        """The sound header at `at`, then at the start of `_view`."""
        self._read(at, ALIGN_BYTES, _HEAD_BYTES)
        length = stated_length(self._view, 0)
        if length > len(self._view):
            self._read(at, length, length)
        return sound_record(self._view, 0, self._nonce, at, self._size)

    def _end_is_written(
        self, at: int, here: int, length: int, payload_bytes: int, identity_bytes: int
    ) -> bool:
        """Whether the payload's last block is there, of the record at `at`, whose header is at `here` in `_view`.

        A write that was cut short by a kill lacks its end. What a power cut took elsewhere the readers find: they
        verify every block. Reading all payloads here would make a start take as long as reading the disk.
        """
        last = (payload_bytes - 1) // BLOCK_BYTES
        [wanted] = _DIGEST(self._view, here + IDENTITY_AT + identity_bytes + 8 * last)
        first, end = length + last * BLOCK_BYTES, length + payload_bytes
        if here + end > len(self._view):
            # The next record's header comes along, and more records if they are close.
            self._read(
                at + first, end - first, _AHEAD_BYTES if end < _CLOSE_BYTES else end - first + _HEAD_BYTES
            )
            here = -first
        return bool(xxh3_64_intdigest(self._view[here + first : here + end]) == wanted)

    def _next_magic(self, at: int, end: int) -> int:
        """First aligned place from `at` on where a record might start; `end` if there is none.

        A file that was another segment before is full of them.
        """
        while at < end:
            if not self._in_view(at - self._start, ALIGN_BYTES):
                self._read(at, ALIGN_BYTES, _AHEAD_BYTES)
            whole = len(self._view) // ALIGN_BYTES * ALIGN_BYTES
            if self._magics is None:
                self._magics = [self._start + here for here in possible_records(self._view)]
            nearest = bisect_left(self._magics, at)
            if nearest < len(self._magics):
                return min(self._magics[nearest], end)
            at = max(at + ALIGN_BYTES, self._start + whole)
        return end

    def _in_view(self, here: int, size: int) -> bool:
        return here >= 0 and here + size <= len(self._view)

    def _read(self, start: int, size: int, ahead: int) -> None:
        """Puts the file from `start` on into `_view`. Asks for `ahead` bytes; `size`, or the file's end, will do."""
        stop, wanted = min(start + size, self._size), min(start + ahead, self._size)
        self._start, self._view, self._readable = start, memoryview(b""), start
        self._magics = None
        parts: list[bytes] = []
        while self._readable < stop:
            part = self._disk.pread(self._fd, wanted - self._readable, self._readable)
            if not part:
                break
            parts.append(part)
            self._readable += len(part)
        self._view = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
