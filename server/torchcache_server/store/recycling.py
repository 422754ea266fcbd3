"""Files of segments that are gone, kept to become new ones: writing into pages that are there costs half.

A file is used again only once nobody can see its old content: in this process the last view is gone (the mapping says
so), and no reader of another process holds it. Such a reader takes a shared flock on the file, then looks whether it
still has the number and nonce it came for, then maps it, and keeps the lock as long as the mapping. Here the lock is
taken alone until the header of the next segment is written; its nonce makes every record of the old one invalid.

Spares lie in a folder of their own, count as taken room, go first when room is short, and a start empties the folder.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from torchcache_server.store.disk import DiskCalls
from torchcache_server.store.segments import Segment

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Spare:
    path: str
    file_bytes: int
    held_bytes: int
    unmapped: list[None]  # has an item once no view of this process is left


@dataclass(slots=True)
class Spares:
    """The spare files, oldest first. Guarded by the store's lock. `bytes` is what they take of the disk."""

    disk: DiskCalls
    folder: str
    bytes: int = 0
    recycled: int = 0
    _spares: list[_Spare] = field(default_factory=list)
    _leaving: list[tuple[list[None], int]] = field(default_factory=list)

    def keep(self, segment: Segment) -> bool:
        """Takes the file of a segment that has gone; False if it isn't worth it, and the caller unlinks it.

        Raises OSError, and then the file is where it was.
        """
        if 2 * segment.held_bytes < segment.header.file_bytes or segment.sync_error is not None:
            return False
        if segment.hole_bytes:  # the next tail would fill them, and nobody count that
            return False
        path = os.path.join(self.folder, os.path.basename(segment.path))
        self.disk.rename(segment.path, path)
        self._spares.append(_Spare(path, segment.header.file_bytes, segment.held_bytes, segment.unmapped))
        self.bytes += segment.held_bytes
        return True

    @property
    def leaving_bytes(self) -> int:
        """What unlinked files still take of the disk: somebody of this process looks at them."""
        self._drop_unmapped()
        return sum(size for _, size in self._leaving)

    def unlinked(self, unmapped: list[None], held_bytes: int) -> None:
        """Notes a file whose room comes back once `unmapped` has an item."""
        self._drop_unmapped()
        self._leaving.append((unmapped, held_bytes))

    def ready(self, file_bytes: int) -> list[int]:
        """What those of `file_bytes` hold that nobody of this process sees any more, in the order of `take`."""
        return [s.held_bytes for s in self._spares if s.unmapped and s.file_bytes == file_bytes]

    def take(self, path: str, file_bytes: int) -> tuple[int, int] | None:
        """Gives a spare the name `path`: its descriptor, locked alone, and the room it holds; None if there is none."""
        for spare in [s for s in self._spares if s.unmapped and s.file_bytes == file_bytes]:
            fd = self._open(spare)
            if fd is None:
                continue
            try:
                self.disk.rename(spare.path, path)
            except OSError as error:
                _log.warning("the spare %s can't be used: %s", spare.path, error)
                self.disk.close(fd)
                continue
            self._forget(spare)
            self.recycled += 1
            return fd, spare.held_bytes
        return None

    def trim(self, need_bytes: int) -> int:
        """Removes spares until `need_bytes` are free, or none is left; returns what that gave."""
        freed = 0
        for spare in list(self._spares):
            if freed >= need_bytes:
                break
            try:
                self.disk.unlink(spare.path)
            except OSError as error:
                _log.warning("the spare %s can't be removed: %s", spare.path, error)
                continue
            self._forget(spare)
            self.unlinked(spare.unmapped, spare.held_bytes)
            freed += spare.held_bytes
        return freed

    def _drop_unmapped(self) -> None:
        self._leaving = [(unmapped, size) for unmapped, size in self._leaving if not unmapped]

    def _open(self, spare: _Spare) -> int | None:
        """Its descriptor, locked alone; None if a reader of another process holds it, or the disk won't."""
        try:
            fd = self.disk.open(spare.path)
        except OSError as error:
            _log.warning("the spare %s can't be opened: %s", spare.path, error)
            return None
        try:
            if self.disk.lock_alone(fd) and self.disk.size(fd) == spare.file_bytes:
                return fd
        except OSError as error:
            _log.warning("the spare %s can't be used: %s", spare.path, error)
        self.disk.close(fd)
        return None

    def _forget(self, spare: _Spare) -> None:
        self._spares.remove(spare)
        self.bytes -= spare.held_bytes
