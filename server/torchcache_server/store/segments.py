"""Segment files: append-only, mapped whole, one namespace each.

A segment is created at its full size, as a hole, so that it is mapped once and the mapping sees all that is written
later. It is freed by unlinking; views that are still out keep the mapping, and the bytes, alive.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.disk import Bytes, DiskCalls, write_all
from torchcache_server.store.record import (
    DEAD_MAGIC,
    MAX_IDENTITY_BYTES,
    RecordHeader,
    SegmentHeader,
    decode_record,
)

SUFFIX: Final = ".segment"

_log = logging.getLogger(__name__)


def folder_name(namespace: str) -> str:
    """Name of a namespace's folder: a digest, so that no name ever becomes a path."""
    return hashlib.sha256(namespace.encode()).hexdigest()


def file_name(number: int) -> str:
    return f"{number:016x}{SUFFIX}"


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
    writing: set[int] = field(default_factory=set)  # offsets of runs being written just now
    sealed: bool = False  # takes no more records
    dropped: bool = False  # unlinked, or about to be
    unsynced: bool = False  # written to since the last fsync
    sync_error: OSError | None = None  # an fsync failed
    file_lock: threading.Lock = field(default_factory=threading.Lock)  # held while `fd` is synced or closed

    @property
    def number(self) -> int:
        return self.header.number

    @property
    def room_bytes(self) -> int:
        return 0 if self.sealed else self.header.file_bytes - self.tail

    @classmethod
    def create(cls, disk: DiskCalls, folder: str, header: SegmentHeader) -> Segment:
        """Makes the file. Raises OSError, and then leaves nothing behind."""
        path = os.path.join(folder, file_name(header.number))
        fd = disk.create(path)
        try:
            disk.truncate(fd, header.file_bytes)
            write_all(disk, fd, [header.encode()], 0)
            return cls._mapped(disk, path, fd, header, tail=header.length)
        except OSError:
            disk.close(fd)
            disk.unlink(path)
            raise

    @classmethod
    def open(cls, disk: DiskCalls, path: str) -> tuple[Segment, bool] | None:
        """Maps a file that is there; None if its header isn't sound. The flag says whether it has its full length.

        A file that lost its end gets its length back, as a hole. `tail` is still to be found.
        """
        fd = disk.open(path)
        try:
            raw = disk.pread(fd, 2 * MAX_IDENTITY_BYTES, 0)
            header = SegmentHeader.decode(memoryview(raw))
            if header is None or os.path.basename(path) != file_name(header.number):
                disk.close(fd)
                return None
            size = disk.size(fd)
            if size != header.file_bytes:
                disk.truncate(fd, header.file_bytes)
            return cls._mapped(disk, path, fd, header, tail=header.length), size == header.file_bytes
        except OSError:
            disk.close(fd)
            raise

    @classmethod
    def _mapped(cls, disk: DiskCalls, path: str, fd: int, header: SegmentHeader, *, tail: int) -> Segment:
        buffer = disk.map(fd, header.file_bytes)
        return cls(header, path, buffer, memoryview(buffer).cast("B"), tail, fd)

    def record(self, offset: int) -> RecordHeader | None:
        """The record at `offset`, its header checked; None if there is none."""
        return decode_record(self.view, self.header.nonce, offset)

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
            self.unsynced = False
            fd = None
            try:
                fd = disk.open(self.path) if self.fd is None else self.fd
                disk.fsync(fd)
            except OSError as error:
                self.sync_error = error
                raise
            finally:
                if self.fd is None and fd is not None:
                    disk.close(fd)

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

    def _close(self, disk: DiskCalls) -> None:
        if self.fd is not None:
            fd, self.fd = self.fd, None
            try:
                disk.close(fd)
            except OSError as error:
                # Only an fsync promises anything; what it couldn't write shows there.
                _log.warning("segment %s: close says %s", self.path, error)


def new_header(namespace: str, number: int, file_bytes: int) -> SegmentHeader:
    """The header of a new segment, with a nonce of its own."""
    return SegmentHeader(number, secrets.randbits(64), file_bytes, namespace)
