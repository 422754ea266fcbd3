"""Small records that must survive anything: one file each, durable when a call returns.

Each file holds magic, checksum, length of key, key, value; its name is the key's digest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
from collections.abc import Iterator
from typing import Final

import xxhash

from torchcache_server.store.disk import DiskCalls, read_file, replace_file

_MAGIC: Final = b"tcLEDGER"
_HEAD: Final = struct.Struct("<8sQI")
_SEED: Final = 0x6C_65_64_67_65_72
RECORD_SUFFIX: Final = ".record"

_log = logging.getLogger(__name__)


class Ledger:
    """Keys to values, both bytes, in the folder `path`. Thread-safe. Methods raise OSError."""

    def __init__(self, disk: DiskCalls, path: str) -> None:
        self._disk = disk
        self._path = path
        self._lock = threading.Lock()
        self._keys: set[bytes] = set()
        disk.make_dir(path)
        for name in disk.names(path):
            full = os.path.join(path, name)
            if name.endswith(".tmp"):
                disk.unlink(full)
            elif name.endswith(RECORD_SUFFIX):
                self._load(full)

    def _load(self, path: str) -> None:
        entry = _decode(read_file(self._disk, path))
        if entry is None:
            _log.error("record %s is damaged and left out", path)
        else:
            self._keys.add(entry[0])

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        with self._lock:
            if key not in self._keys:
                return None
            entry = _decode(read_file(self._disk, self._file(key)))
        if entry is None or entry[0] != key:
            _log.error("record %s is damaged and left out", self._file(key))
            return None
        return entry[1]

    def put(self, key: bytes, value: bytes) -> None:
        """Stores a value: the old one or the new one is there, whatever happens meanwhile."""
        body = struct.pack("<I", len(key)) + key + value
        head = _MAGIC + struct.pack("<Q", xxhash.xxh3_64_intdigest(body, seed=_SEED))
        with self._lock:
            replace_file(self._disk, self._path, os.path.basename(self._file(key)), [head, body])
            self._keys.add(key)

    def delete(self, key: bytes) -> None:
        """Removes a value; absent is fine."""
        with self._lock:
            if key in self._keys:
                self._disk.unlink(self._file(key))
                self._keys.discard(key)
                self._disk.fsync_dir(self._path)

    def items(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys that start with `prefix`, in order, with their values; those deleted meanwhile are left out."""
        with self._lock:
            keys = sorted(k for k in self._keys if k.startswith(prefix))
        for key in keys:
            value = self.get(key)
            if value is not None:
                yield key, value

    def _file(self, key: bytes) -> str:
        return os.path.join(self._path, hashlib.sha256(key).hexdigest() + RECORD_SUFFIX)


def _decode(data: bytes) -> tuple[bytes, bytes] | None:
    if len(data) < _HEAD.size:
        return None
    magic, checksum, key_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(memoryview(data)[16:], seed=_SEED) != checksum:
        return None
    end = _HEAD.size + key_bytes
    return data[_HEAD.size : end], data[end:]
