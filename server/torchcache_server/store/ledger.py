"""Small records that must survive anything: one file each, durable when a call returns.

Such a record is the only note of an acknowledged checkpoint, so its file holds it twice. Each copy is magic, checksum,
length of key, length of value, key, value; the second starts at the first multiple of `PAGE_BYTES` behind the first,
zeros between them: neither a flipped bit nor a sector that can't be read takes both. The checksum is xxh3-64 of all
that follows it, seeded differently for each copy. The file's name is the key's digest.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
import threading
from collections.abc import Iterator
from typing import Final, NamedTuple

import xxhash

from torchcache.errors import ConfigurationError, IntegrityError
from torchcache_server.store.disk import UNREADABLE, DiskCalls, replace_file

_MAGIC: Final = b"tcLEDGR2"
_HEAD: Final = struct.Struct("<8sQII")
_CHECKED_FROM: Final = 16
_SEEDS: Final = (0x6C_65_64_67_65_72, 0x63_6F_70_79)
RECORD_SUFFIX: Final = ".record"
TEMPORARY_SUFFIX: Final = ".tmp"
PAGE_BYTES: Final = 4096

_log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """What a record's file was found to hold. `key` and `value` are None if neither copy is sound."""

    key: bytes | None
    value: bytes
    sound_copies: int


class Ledger:
    """Keys to values, both bytes, in the folder `path`. Thread-safe. Methods raise OSError."""

    def __init__(self, disk: DiskCalls, path: str) -> None:
        """Mends records that have one sound copy left. Raises ConfigurationError if one has none."""
        self._disk = disk
        self._path = path
        self._lock = threading.Lock()
        self._keys: set[bytes] = set()
        self._unsure: set[bytes] = set()  # what became of them is not known, a call having failed
        disk.make_dir(path)
        damaged = []
        for name in disk.names(path):
            if name.endswith(TEMPORARY_SUFFIX):
                disk.unlink(os.path.join(path, name))
            elif name.endswith(RECORD_SUFFIX) and not self._load(name):
                damaged.append(name)
        if damaged:
            raise ConfigurationError(
                f"the record {os.path.join(path, damaged[0])} is damaged"
                + (f", and {len(damaged) - 1} more are" if damaged[1:] else "")
                + ", and may speak of a checkpoint that is nowhere else: put it back from a backup, or let `torchcache "
                f"doctor --store {os.path.dirname(path)} --repair` set it aside; what it may speak of is kept then"
            )
        # A server that was killed may have left names that aren't durable: what they say is acted upon from here on.
        disk.fsync_dir(path)

    def _load(self, name: str) -> bool:
        reading = read_record(self._disk, os.path.join(self._path, name))
        if reading.key is None:
            return False
        self._keys.add(reading.key)
        if reading.sound_copies < 2:
            self._mend(reading.key, reading.value)
        return True

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. Raises IntegrityError if the record was damaged since it was written."""
        with self._lock:
            if key not in self._keys:
                return None
            reading = read_record(self._disk, os.path.join(self._path, record_name(key)))
            if reading.key is not None and reading.sound_copies < 2:
                self._mend(key, reading.value)
        if reading.key is None:
            raise IntegrityError(
                f"the record {os.path.join(self._path, record_name(key))} is damaged: run `torchcache doctor`",
                object=repr(key),
            )
        return reading.value

    def put(self, key: bytes, value: bytes) -> None:
        """Stores a value: the old one or the new one is there, whatever happens meanwhile."""
        with self._lock:
            self._unsure.add(key)
            write_record(self._disk, self._path, key, value)
            self._keys.add(key)
            self._unsure.discard(key)

    def is_unsure(self, key: bytes) -> bool:
        """Whether a call for this key failed, and a later start may find another value than `get` gives."""
        with self._lock:
            return key in self._unsure

    def delete(self, key: bytes) -> None:
        """Removes a value; absent is fine."""
        with self._lock:
            if key in self._keys or key in self._unsure:
                self._unsure.add(key)
                self._disk.unlink(os.path.join(self._path, record_name(key)))
                self._keys.discard(key)
                self._disk.fsync_dir(self._path)
                self._unsure.discard(key)

    def items(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys that start with `prefix`, in order, with their values; those deleted meanwhile are left out.

        Raises IntegrityError at a record that was damaged since it was written.
        """
        with self._lock:
            keys = sorted(k for k in self._keys if k.startswith(prefix))
        for key in keys:
            value = self.get(key)
            if value is not None:
                yield key, value

    def _mend(self, key: bytes, value: bytes) -> None:
        path = os.path.join(self._path, record_name(key))
        try:
            write_record(self._disk, self._path, key, value)
        except OSError as error:
            # The copy that is left will do until the disk takes another.
            _log.error("record %s has one sound copy left, which can't be doubled: %s", path, error)
        else:
            _log.warning("record %s had a damaged copy: mended from the other", path)


def record_name(key: bytes) -> str:
    """Name of the file that holds the record of `key`."""
    return hashlib.sha256(key).hexdigest() + RECORD_SUFFIX


def write_record(disk: DiskCalls, folder: str, key: bytes, value: bytes) -> None:
    """Writes a record's file, whole or not at all, and durable on return. Raises OSError."""
    replace_file(disk, folder, record_name(key), encode_record(key, value))


def encode_record(key: bytes, value: bytes) -> list[bytes]:
    """The bytes of a record's file, in parts."""
    lengths = struct.pack("<II", len(key), len(value))
    checked = lengths + key + value
    first, second = (
        _MAGIC + struct.pack("<Q", xxhash.xxh3_64_intdigest(checked, seed=seed)) for seed in _SEEDS
    )
    gap = bytes(-(len(first) + len(checked)) % PAGE_BYTES)
    return [first, checked, gap, second, checked]


def read_record(disk: DiskCalls, path: str) -> Reading:
    """Both copies of a record, checked against each other and the file's name. Changes nothing.

    Anything that isn't a file counts as damaged, and so does what the disk can't read. Raises OSError for other causes.
    """
    data = readable_bytes(disk, path)
    # The end of a file of twice the same length, the second at a page's start, tells where that start is.
    second_at = -(-len(data) // (2 * PAGE_BYTES)) * PAGE_BYTES
    copies = (_decode(data, 0, _SEEDS[0]), _decode(data, second_at, _SEEDS[1]))
    sound = [copy for copy in copies if copy and record_name(copy[0]) == os.path.basename(path)]
    if not sound:
        return Reading(None, b"", 0)
    return Reading(*sound[0], sum(copy == sound[0] for copy in sound))


def _decode(data: bytes, at: int, seed: int) -> tuple[bytes, bytes] | None:
    if len(data) < at + _HEAD.size:
        return None
    magic, checksum, key_bytes, value_bytes = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    end = start + key_bytes + value_bytes
    if magic != _MAGIC or end > len(data):
        return None
    if xxhash.xxh3_64_intdigest(memoryview(data)[at + _CHECKED_FROM : end], seed=seed) != checksum:
        return None
    return data[start : start + key_bytes], data[start + key_bytes : end]


def readable_bytes(disk: DiskCalls, path: str) -> bytes:
    """The file's bytes; zeros for pages that the disk can't read, nothing for what is no file."""
    try:
        fd = disk.open(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            return b""
        raise
    try:
        size, parts, at = disk.size(fd), [], 0
        while at < size:
            part = _read_page_by_page(disk, fd, size, at)
            if not part:
                break
            parts.append(part)
            at += len(part)
        return b"".join(parts)
    finally:
        disk.close(fd)


def _read_page_by_page(disk: DiskCalls, fd: int, size: int, at: int) -> bytes:
    """All from `at` on if that can be read, else a page."""
    try:
        return disk.pread(fd, size - at, at)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    page = min(PAGE_BYTES - at % PAGE_BYTES, size - at)
    try:
        return disk.pread(fd, page, at)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    return bytes(page)
