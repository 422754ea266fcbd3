"""Segment files: append-only, mapped whole, one namespace each.

A segment is created at its full size, as a hole, so that it is mapped once and the mapping sees all that is written
later. It is freed by unlinking, or becomes another segment later (`recycling`); views that are still out keep the
mapping, and the bytes, alive. A file's name says its segment's number and nonce: a header that is damaged can be made
again where the namespace is known, and what must be kept isn't lost with its first 64 bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from torchcache.records import (
    DEAD_MAGIC,
    MAX_IDENTITY_BYTES,
    PAGE_BYTES,
    RecordHeader,
    SegmentHeader,
    decode_record,
    file_name,
    page_aligned,
    parse_file_name,
    stated_length,
)
from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.disk import Bytes, DiskCalls, write_all

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Segment:
    """One file and its state in memory. Guarded by the store's lock, but for reading records."""

    header: SegmentHeader
    path: str
    buffer: pa.Buffer  # the whole file
    view: memoryview  # the same, as unsigned bytes
    tail: int  # end of what is taken; the next record goes here
    fd: int | None = None  # open while the segment takes records
    chunks: int = 0  # records the index points to
    live_bytes: int = 0  # of these records; an estimate once one whose header is damaged has gone
    floor_bytes: int = 0  # what the file takes of the disk whatever the tail: it was another segment before
    hole_bytes: int = 0  # below the tail, of writes that failed
    unmapped: list[None] = field(default_factory=list)  # gets an item once the last view is gone
    writing: set[int] = field(default_factory=set)  # offsets of runs being written just now
    sealed: bool = False  # takes no more records
    doubtful: bool = (
        False  # parts could not be read, and the index may lack records: the next start looks again
    )
    listed: bool = False  # the index says where the file is
    dropped: bool = False  # unlinked, or about to be
    unsynced: bool = False  # written to since the last fsync
    synced: bool = False  # what it holds may have been promised to be durable
    sync_error: OSError | None = None  # an fsync failed
    file_lock: threading.Lock = field(
        default_factory=threading.Lock
    )  # while the file is synced, closed, renamed

    @property
    def number(self) -> int:
        return self.header.number

    @property
    def room_bytes(self) -> int:
        return 0 if self.sealed else self.header.file_bytes - self.tail

    @property
    def held_bytes(self) -> int:
        """What the file takes of the disk."""
        return max(self.floor_bytes, page_aligned(self.tail)) - self.hole_bytes

    @property
    def dead_bytes(self) -> int:
        """What the records take that the index doesn't point to."""
        return max(0, self.tail - self.header.length - self.live_bytes)

    def gain(self, record_bytes: int, *, chunks: int = 1) -> None:
        """The index points to one more record, or to `chunks` more that take `record_bytes` together."""
        self.chunks += chunks
        self.live_bytes += record_bytes

    def lose(self, record_bytes: int | None) -> None:
        """The index points to a record less; None where its header can't be read any more: an average one."""
        if record_bytes is None:
            record_bytes = self.live_bytes // max(1, self.chunks)
        self.chunks -= 1
        self.live_bytes = max(0, self.live_bytes - record_bytes) if self.chunks else 0

    @classmethod
    def create(cls, disk: DiskCalls, folder: str, header: SegmentHeader) -> Segment:
        """Makes the file. Raises OSError, and then leaves nothing behind."""
        path = os.path.join(folder, file_name(header.number, header.nonce))
        fd = disk.create(path)
        try:
            disk.truncate(fd, header.file_bytes)
            return cls.begin(disk, path, fd, header)
        except OSError:
            discard(disk, path, fd)
            raise

    @classmethod
    def begin(cls, disk: DiskCalls, path: str, fd: int, header: SegmentHeader) -> Segment:
        """Makes the open file at `path`, of the right size, an empty segment. Raises OSError."""
        write_all(disk, fd, [header.encode()], 0)
        return cls._mapped(disk, path, fd, header)

    @classmethod
    def open(cls, disk: DiskCalls, path: str, *, namespace: str | None = None) -> tuple[Segment, bool] | None:
        """Maps a file that is there; None if its header isn't sound. The flag says whether it has its full length.

        A file that lost its end gets its length back, as a hole. `tail` is still to be found. A damaged header is made
        again if `namespace`, to which the file belongs, is given.
        """
        fd = disk.open(path)
        try:
            size = disk.size(fd)
            header = read_header(disk, fd, path)
            if header is None and namespace is not None:
                header = remade_header(disk, fd, path, namespace)
                if header is not None:
                    _log.error("segment %s has a damaged header: made again from its name", path)
                    write_all(disk, fd, [header.encode()], 0)
            if header is None:
                disk.close(fd)
                return None
            if size != header.file_bytes:
                disk.truncate(fd, header.file_bytes)
            return cls._mapped(disk, path, fd, header), size == header.file_bytes
        except OSError:
            disk.close(fd)
            raise

    @classmethod
    def _mapped(cls, disk: DiskCalls, path: str, fd: int, header: SegmentHeader) -> Segment:
        unmapped: list[None] = []
        buffer = disk.map(fd, header.file_bytes, lambda: unmapped.append(None))
        return cls(header, path, buffer, memoryview(buffer).cast("B"), header.length, fd, unmapped=unmapped)

    def record(self, offset: int) -> RecordHeader | None:
        """The record at `offset`, its header checked; None if there is none."""
        return decode_record(self.view, self.header.nonce, offset)

    def populated_record(self, disk: DiskCalls, offset: int) -> RecordHeader | None:
        """`record`, with all of it brought into memory first. Raises OSError for what the disk can't read."""
        room = self.tail - offset  # behind the tail is a hole, which a look would fill on a tmpfs
        if room <= 0:
            return None
        disk.populate(self.buffer, offset, min(room, PAGE_BYTES))
        length = stated_length(self.view, offset)
        if length > PAGE_BYTES:
            disk.populate(self.buffer, offset, min(room, length))
        record = self.record(offset)
        if record is not None and record.payload_bytes:
            disk.populate(self.buffer, offset + record.length, record.payload_bytes)
        return record

    def chunk(self, offset: int, record: RecordHeader) -> StoredChunk:
        """The chunk in `record`, as a view."""
        payload = self.buffer.slice(offset + record.length, record.payload_bytes)
        return StoredChunk(record.object_size, payload, record.digest, record.block_digests)

    def write(self, disk: DiskCalls, buffers: Sequence[Bytes], offset: int) -> None:
        """Writes a run of records; the caller has taken the room and holds it in `writing`."""
        if self.fd is None:
            raise OSError(errno.EBADF, "the segment takes no records", self.path)
        write_all(disk, self.fd, buffers, offset)

    def bury(self, disk: DiskCalls, offset: int) -> None:
        """Marks a record as dead, so that no rebuilt index finds it again. Only an attempt: it isn't synced."""
        with self.file_lock:  # or the file might be another segment's by now
            if self.dropped:
                return
            try:
                fd = disk.open(self.path)
                try:
                    write_all(disk, fd, [DEAD_MAGIC], offset)
                finally:
                    disk.close(fd)
            except OSError as error:
                _log.warning("the record at %d in %s can't be marked as dead: %s", offset, self.path, error)

    def clear_behind(self, disk: DiskCalls) -> bool:
        """Makes a hole of what lies behind the tail; False if that can't be done."""
        end = page_aligned(self.tail)
        return end == self.header.file_bytes or self._deallocate(disk, end, self.header.file_bytes - end)

    def clear(self, disk: DiskCalls, offset: int, size: int) -> int:
        """Makes a hole of the whole pages of a part; returns their bytes, 0 if that can't be done."""
        start, end = page_aligned(offset), (offset + size) // PAGE_BYTES * PAGE_BYTES
        return end - start if start < end and self._deallocate(disk, start, end - start) else 0

    def _deallocate(self, disk: DiskCalls, offset: int, size: int) -> bool:
        with self.file_lock:  # or the file might be another segment's by now
            if self.dropped:
                return False
            try:
                fd = disk.open(self.path) if self.fd is None else self.fd
                try:
                    disk.deallocate(fd, offset, size)
                finally:
                    if self.fd is None:
                        disk.close(fd)
            except OSError as error:
                _log.warning("segment %s keeps its unused room: %s", self.path, error)
                return False
            return True

    def sync(self, disk: DiskCalls) -> None:
        """fsync, if anything was written since the last one.

        Raises OSError, and from then on always: the kernel may have dropped what it could not write and marked the
        rest clean, so that a second fsync would promise what isn't there.
        """
        with self.file_lock:
            if self.sync_error is not None:
                raise self.sync_error
            if not self.unsynced:
                return
            # Not being able to open it, for want of descriptors say, loses nothing: that may be tried again.
            fd = disk.open(self.path) if self.fd is None else self.fd
            self.unsynced, self.synced = False, True
            try:
                disk.fsync(fd)
            except OSError as error:
                self.sync_error = error
                raise
            finally:
                if self.fd is None:
                    disk.close(fd)

    def is_held(self, disk: DiskCalls) -> bool:
        """Whether anybody else holds a lock on the open file; also if that can't be told."""
        with self.file_lock:
            if self.fd is None:
                return True
            try:
                if disk.lock_alone(self.fd):
                    disk.unlock(self.fd)
                    return False
            except OSError as error:
                _log.warning("segment %s: whether a client holds it can't be told: %s", self.path, error)
            return True

    def reopen(self, disk: DiskCalls) -> None:
        """Opens the file for more records."""
        with self.file_lock:
            if self.fd is None:
                self.fd = disk.open(self.path)

    def close(self, disk: DiskCalls) -> None:
        """Closes the descriptor; the mapping stays."""
        with self.file_lock:
            self._close(disk)

    def try_close(self, disk: DiskCalls) -> bool:
        """As `close`; False, and nothing is done, while the file is being synced."""
        if not self.file_lock.acquire(blocking=False):
            return False
        try:
            self._close(disk)
        finally:
            self.file_lock.release()
        return True

    def discard(self, disk: DiskCalls) -> None:
        """Takes back a segment that was just made. Only an attempt."""
        if self.fd is not None:
            fd, self.fd = self.fd, None
            discard(disk, self.path, fd)

    def _close(self, disk: DiskCalls) -> None:
        if self.fd is not None:
            fd, self.fd = self.fd, None
            try:
                disk.close(fd)
            except OSError as error:
                # Only an fsync promises anything; what it couldn't write shows there.
                _log.warning("segment %s: close says %s", self.path, error)


def discard(disk: DiskCalls, path: str, fd: int) -> None:
    """Takes back a file that was just made. Only an attempt: what is left the next start takes for an empty segment."""
    try:
        try:
            disk.close(fd)
        finally:
            disk.unlink(path)
    except OSError as error:
        _log.warning("%s can't be taken back: %s", path, error)


def read_header(disk: DiskCalls, fd: int, path: str) -> SegmentHeader | None:
    """The header of a segment file; None if it isn't sound, or not the one that the name says. Raises OSError."""
    header = _decoded(disk, fd)
    if header is None or os.path.basename(path) != file_name(header.number, header.nonce):
        return None
    return header


def _decoded(disk: DiskCalls, fd: int) -> SegmentHeader | None:
    raw, most = b"", 2 * MAX_IDENTITY_BYTES
    while part := disk.pread(fd, most - len(raw), len(raw)):
        raw += part
    return SegmentHeader.decode(memoryview(raw))


def remade_header(disk: DiskCalls, fd: int, path: str, namespace: str) -> SegmentHeader | None:
    """The header of a segment file of which only name, size and namespace are known. Raises OSError.

    None if it isn't called as one, is too short to hold anything, or has become another segment: a power cut may leave
    a file that was recycled its old name too.
    """
    named = parse_file_name(os.path.basename(path))
    if named is None or _decoded(disk, fd) is not None:
        return None
    # Nobody knows any more whether a client may still write into it: so nobody else does.
    header = SegmentHeader(*named, disk.size(fd), namespace, handed_out=True)
    return header if header.length < header.file_bytes else None


def new_header(namespace: str, number: int, file_bytes: int, *, handed_out: bool = False) -> SegmentHeader:
    """The header of a new segment, with a nonce of its own."""
    return SegmentHeader(number, secrets.randbits(64), file_bytes, namespace, handed_out)
