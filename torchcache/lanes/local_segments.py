"""Segments of a store, mapped by a reader.

A reader takes a shared flock on the file, looks whether it is the segment that it came for, maps it, and keeps the lock
as long as the mapping: the server makes no other segment of a file that is locked (its `store/recycling.py`). The
mapping holds a descriptor of its own, and with it the lock, until the last view of it is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import weakref
from typing import Final

import numpy as np

from torchcache.records import MAX_IDENTITY_BYTES, PAGE_BYTES, SegmentHeader, file_at

_MOST_MAPPED: Final = 4096
_LEAST_MAPPED: Final = 8
_SHARE: Final = 4  # of the descriptors that a process may have
_TRIES: Final = 4

_alive: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""Every mapping there is in this process, wanted still or only looked at: each holds a descriptor."""


def most_mapped() -> int:
    """How many segments this process may have mapped at a time: each takes a descriptor, and one of 65,530 mappings."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_MAPPED
    return min(max(allowed // _SHARE, _LEAST_MAPPED), _MOST_MAPPED)


class Mapped:
    """A mapped segment. `used` is when it was last read, in the reader's own count; `gone`: it is wanted no more."""

    __slots__ = ("address", "gone", "namespace", "nonce", "number", "used", "view")

    def __init__(self, header: SegmentHeader, memory: mmap.mmap) -> None:
        self.number = header.number
        self.nonce = header.nonce
        self.namespace = header.namespace
        self.view = memoryview(memory)
        self.address: int = np.frombuffer(memory, np.uint8).ctypes.data
        self.used = 0
        self.gone = False


class MappedSegments:
    """The segments of one store that this process has mapped, by number. Not thread-safe."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._mapped: dict[int, Mapped] = {}

    def __len__(self) -> int:
        return len(self._mapped)

    def get(self, number: int, entry: bytes | None) -> Mapped | None:
        """The segment of that number, whose file is as `entry` of the index says; None if it can't be had.

        It has gone, is becoming another just now, or too many are being looked at.
        """
        if entry is None:
            return None
        nonce, file = file_at(number, entry)
        found = self._mapped.get(number)
        if found is not None:
            if found.nonce == nonce:
                return found
            self.drop(number)  # the number was given again by a server that was started anew
        if not self._make_room():
            return None
        try:
            found = map_segment(os.path.join(self._store, file), number, nonce)
        except OSError:
            return None
        if found is not None:
            self._mapped[number] = found
        return found

    def drop(self, number: int) -> None:
        """Wants it no more: it is unmapped, and its file unlocked, once the last view of it has gone."""
        found = self._mapped.pop(number, None)
        if found is not None:
            found.gone = True

    def clear(self) -> None:
        """Wants none any more."""
        for number in list(self._mapped):
            self.drop(number)

    def numbers(self) -> list[int]:
        """Which are mapped."""
        return list(self._mapped)

    def read_since(self, count: int) -> set[str]:
        """Namespaces that were read at `count` or later."""
        return {found.namespace for found in self._mapped.values() if found.used >= count}

    def _make_room(self) -> bool:
        """Lets go those read longest ago, if there are too many. What is looked at stays, and counts."""
        most = most_mapped()
        for _ in range(_TRIES):
            if len(_alive) < most:
                return True
            if not self._mapped:
                break
            self.drop(min(self._mapped.values(), key=lambda found: found.used).number)
        return len(_alive) < most


def map_segment(path: str, number: int, nonce: int) -> Mapped | None:
    """Maps the file at `path` if it is the segment with that number and nonce. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        header = SegmentHeader.decode(memoryview(os.pread(fd, PAGE_BYTES, 0)))
        if header is None:  # its namespace has a long name
            header = SegmentHeader.decode(memoryview(os.pread(fd, 2 * MAX_IDENTITY_BYTES, 0)))
        if header is None or (header.number, header.nonce) != (number, nonce):
            return None
        if os.fstat(fd).st_size < header.file_bytes:
            return None
        memory = mmap.mmap(fd, header.file_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)  # the mapping has one of its own, of the same lock
    _alive.add(memory)
    return Mapped(header, memory)
