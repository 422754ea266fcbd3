"""Segments of a store, mapped by a reader.

A reader takes a shared flock on the file, looks whether it is the segment that it came for, maps it, and keeps the lock
as long as the mapping: the server makes no other segment of a file that is locked (its `store/recycling.py`). On most
file systems the mapping keeps the lock by itself, as it keeps the file open; where it doesn't, a descriptor stays too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import weakref
from pathlib import Path
from typing import Final

import pyarrow as pa

from torchcache.mappings import Mapping
from torchcache.records import MAX_IDENTITY_BYTES, PAGE_BYTES, SegmentHeader, file_at

_SHARE: Final = 4  # of the mappings, or descriptors, that a process may have
_MAPPINGS: Final = 65_530  # Linux's own limit, where it isn't told
_LEAST: Final = 8
_TRIES: Final = 4

_alive: weakref.WeakSet[Mapping] = weakref.WeakSet()
"""Every mapping there is in this process, wanted still or only looked at."""


class Mapped:
    """A mapped segment. `used` is when it was last read, in the reader's own count; `gone`: it is wanted no more."""

    __slots__ = ("address", "gone", "is_own", "namespace", "nonce", "number", "used", "view")

    def __init__(self, header: SegmentHeader, mapping: Mapping) -> None:
        self.number = header.number
        self.nonce = header.nonce
        self.namespace = header.namespace
        self.address = mapping.address
        self.is_own = mapping.is_own
        buffer = pa.foreign_buffer(mapping.address, mapping.size, base=mapping)
        self.view = memoryview(buffer).cast("B")
        self.used = 0
        self.gone = False


class MappedSegments:
    """The segments of one store that this process has mapped, by number. Not thread-safe."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._mapped: dict[int, Mapped] = {}
        self._locks_stay: bool | None = None  # with mappings alone; None: not tried yet

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
        if self._locks_stay is None:
            self._locks_stay = locks_stay_with_mappings(self._store)
        if not self._make_room():
            return None
        try:
            found = map_segment(
                os.path.join(self._store, file), number, nonce, keep_open=not self._locks_stay
            )
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
        most = most_mapped(keep_open=not self._locks_stay)
        for _ in range(_TRIES):
            if len(_alive) < most or not self._mapped:
                break
            self.drop(min(self._mapped.values(), key=lambda found: found.used).number)
        return len(_alive) < most


def most_mapped(*, keep_open: bool) -> int:
    """How many segments this process may have mapped at a time: part of what the system allows it."""
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        allowed = _MAPPINGS
    if keep_open:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = allowed if files == resource.RLIM_INFINITY else min(allowed, files)
    return max(allowed // _SHARE, _LEAST)


def map_segment(path: str, number: int, nonce: int, *, keep_open: bool) -> Mapped | None:
    """Maps the file at `path` if it is the segment with that number and nonce. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    kept = False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        header = SegmentHeader.decode(memoryview(os.pread(fd, PAGE_BYTES, 0)))
        if header is None:  # its namespace has a long name
            header = SegmentHeader.decode(memoryview(os.pread(fd, 2 * MAX_IDENTITY_BYTES, 0)))
        if header is None or (header.number, header.nonce) != (number, nonce):
            return None
        if os.fstat(fd).st_size < header.file_bytes:
            return None
        mapping = Mapping(fd, header.file_bytes, (lambda: os.close(fd)) if keep_open else None)
        kept = keep_open
    finally:
        if not kept:
            os.close(fd)
    _alive.add(mapping)
    return Mapped(header, mapping)


def locks_stay_with_mappings(folder: str) -> bool:
    """Whether a flock lasts as long as a mapping of its file, its descriptor closed, on the file system of `folder`.

    Linux lets go of a flock with the last reference to the open file, of which a mapping is one. An overlay, for one,
    maps another file than the one that was opened. So it is tried, with a file that has no name.
    """
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # it knows no such files
        return False
    try:
        os.ftruncate(fd, PAGE_BYTES)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(again, fcntl.LOCK_SH)
            mapping = Mapping(again, PAGE_BYTES)
        finally:
            os.close(again)
        stays = not _is_free(fd)
        del mapping
        return stays and _is_free(fd)
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_free(fd: int) -> bool:
    """Whether nobody else holds a lock on the file. Raises OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True
