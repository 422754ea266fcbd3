"""Records from a caller's memory into a segment's file: checksums on the way, no copy of a payload.

A large record is written piece by piece, each hashed while it is in the processor's cache; its header comes last, so
that a writer that is killed leaves no record that looks whole. Small ones go many to a call, in the file's order, of
which a kill leaves a beginning: there the payload's end is missing, and that is looked at (`store/recovery.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import pyarrow as pa
from xxhash import xxh3_64, xxh3_64_intdigest

from torchcache.model import BLOCK_BYTES, ObjectInfo
from torchcache.records import RecordHeader, aligned, encode_record, header_bytes, padding

PIECE_BYTES: Final = 1024 * 1024
"""Hashed and written at a time: little enough to stay in the processor's cache, a multiple of the block."""

_RUN_BYTES: Final = 1024 * 1024
_RUN_BUFFERS: Final = 1000  # below IOV_MAX

Bytes = bytes | memoryview


class FileCalls:
    """The calls to the store's files. Tests put theirs in its place. All methods raise OSError."""

    def open(self, path: str) -> int:
        """Opens an existing file for reading and writing; symlinks are refused."""
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def hold(self, fd: int) -> bool:
        """Takes a shared flock; False if somebody has the file alone just now."""
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self, fd: int) -> None:
        """Lets go of the file, also where a forked child has the descriptor too."""
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """One call; may read less."""
        return os.pread(fd, size, offset)

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        """One call; may write less. Other threads run meanwhile."""
        return os.pwritev(fd, buffers, offset)


FILES: Final = FileCalls()
"""Those of production."""


class Record(NamedTuple):
    """A chunk that is to be written: its object, its number there, its bytes, and where its header goes."""

    object: ObjectInfo
    number: int
    data: pa.Buffer
    offset: int

    @property
    def header_bytes(self) -> int:
        return header_bytes(len(self.object.id.encoded), self.data.size)

    @property
    def end(self) -> int:
        """Where the next record may start."""
        return self.offset + self.header_bytes + aligned(self.data.size)


class SegmentWriter:
    """Writes records into one open segment file with `nonce`."""

    def __init__(self, files: FileCalls, fd: int, nonce: int) -> None:
        self._files = files
        self._fd = fd
        self._nonce = nonce
        self._run: list[Bytes] = []
        self._run_at = 0
        self._run_bytes = 0

    def write(self, record: Record) -> None:
        """Writes a record, or keeps a small one until `flush`. Raises OSError."""
        if record.data.size > PIECE_BYTES:
            self._write_large(record)
            return
        payload = memoryview(record.data).cast("B") if record.data.size else memoryview(b"")
        header = self._header(record, xxh3_64_intdigest(payload), _block_digests(payload))
        if self._run_at + self._run_bytes != record.offset or self._run_bytes >= _RUN_BYTES:
            self.flush()
            self._run_at = record.offset
        end = padding(len(payload))
        self._run += [part for part in (header, payload, end) if len(part)]
        self._run_bytes += len(header) + len(payload) + len(end)
        if len(self._run) >= _RUN_BUFFERS:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept. Raises OSError."""
        run, self._run, self._run_bytes = self._run, [], 0
        self._put(run, self._run_at)

    def _write_large(self, record: Record) -> None:
        payload = memoryview(record.data).cast("B")
        whole, blocks = xxh3_64(), []
        at = record.offset + record.header_bytes
        for start in range(0, len(payload), PIECE_BYTES):
            piece = payload[start : start + PIECE_BYTES]
            blocks.append(_block_digests(piece))
            whole.update(piece)
            self._put([piece], at + start)
        if end := padding(len(payload)):
            self._put([end], at + len(payload))
        self._put([self._header(record, whole.intdigest(), b"".join(blocks))], record.offset)

    def _header(self, record: Record, digest: int, block_digests: bytes) -> bytes:
        header = RecordHeader(
            record.header_bytes,
            record.data.size,
            record.number,
            record.object.size,
            digest,
            record.object.id.encoded,
            block_digests,
        )
        return encode_record(header, self._nonce, record.offset)

    def _put(self, buffers: list[Bytes], offset: int) -> None:
        """All of `buffers`, in order, going on after short writes."""
        left = sum(map(len, buffers))
        while left:
            written = self._files.pwritev(self._fd, buffers, offset)
            if not written:
                raise OSError(errno.EIO, "the disk took nothing, and said nothing")
            offset += written
            left -= written
            while left and written >= len(buffers[0]):
                written -= len(buffers[0])
                del buffers[0]
            if left and written:
                buffers[0] = memoryview(buffers[0])[written:]


def _block_digests(payload: memoryview) -> bytes:
    """As `model.block_digests`, for what starts with a block."""
    digests = [
        xxh3_64_intdigest(payload[at : at + BLOCK_BYTES]) for at in range(0, len(payload), BLOCK_BYTES)
    ]
    return struct.pack(f"<{len(digests)}Q", *digests)
