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
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from torchcache.lanes.base import Data, parts_of, tell
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ObjectInfo
from torchcache.records import RecordHeader, aligned, encode_record, header_bytes, padding

PIECE_BYTES: Final = 1024 * 1024
"""Hashed and written at a time: little enough to stay in the processor's cache, a multiple of the block."""

_RUN_BYTES: Final = 1024 * 1024
_RUN_BUFFERS: Final = 900  # and those of one record more: below IOV_MAX

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
    data: Data
    offset: int

    @property
    def starts_at(self) -> int:
        """Where the chunk begins in its object."""
        return self.number * CHUNK_BYTES

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
        parts = parts_of(record.data)
        tell(record.data, record.starts_at)
        header = self._header(record, _digest(parts), _block_digests(parts))
        buffers: list[Bytes] = [header, *parts, padding(record.data.size)]
        if self._run_at + self._run_bytes != record.offset or self._run_bytes >= _RUN_BYTES:
            self.flush()
            self._run_at = record.offset
        self._run += [buffer for buffer in buffers if len(buffer)]
        self._run_bytes += sum(map(len, buffers))
        if len(self._run) >= _RUN_BUFFERS:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept. Raises OSError."""
        run, self._run, self._run_bytes = self._run, [], 0
        self._put(run, self._run_at)

    def _write_large(self, record: Record) -> None:
        whole, blocks = xxh3_64(), []
        payload_at = at = record.offset + record.header_bytes
        for piece in _pieces(parts_of(record.data)):
            tell(record.data, record.starts_at + at - payload_at, piece)
            blocks.append(_block_digests(piece))
            for part in piece:
                whole.update(part)
            size = sum(map(len, piece))
            self._put(piece, at)
            at += size
        if end := padding(record.data.size):
            self._put([end], at)
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

    def _put(self, given: Sequence[Bytes], offset: int) -> None:
        """All of `given`, in order, going on after short writes."""
        buffers = list(given)
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


def _pieces(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The bytes in pieces of `PIECE_BYTES`, the last one maybe shorter."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for part in parts:
        at = 0
        while at < len(part):
            taken = part[at : at + room]
            piece.append(taken)
            at += len(taken)
            room -= len(taken)
            if not room:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


def _digest(parts: Sequence[memoryview]) -> int:
    """As `model.chunk_digest`."""
    whole = xxh3_64()
    for part in parts:
        whole.update(part)
    return whole.intdigest()


def _block_digests(parts: Sequence[memoryview]) -> bytes:
    """As `model.block_digests`, of what starts with a block. Only a block that lies in several parts is copied."""
    digests: list[int] = []
    begun = b""
    for part in parts:
        at = 0
        if begun:
            at = min(BLOCK_BYTES - len(begun), len(part))
            begun += part[:at]
            if len(begun) < BLOCK_BYTES:
                continue
            digests.append(xxh3_64_intdigest(begun))
        whole = at + (len(part) - at) // BLOCK_BYTES * BLOCK_BYTES
        digests += [xxh3_64_intdigest(part[i : i + BLOCK_BYTES]) for i in range(at, whole, BLOCK_BYTES)]
        begun = bytes(part[whole:])
    if begun:
        digests.append(xxh3_64_intdigest(begun))
    return struct.pack(f"<{len(digests)}Q", *digests)
