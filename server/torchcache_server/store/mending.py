"""Repairs of what an inspection found, while no server has the store. What must be kept is never removed.

A repair may be cut short anywhere, and made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torchcache.records import DEAD_MAGIC
from torchcache_server.store import layout
from torchcache_server.store.disk import DiskCalls, replace_file, write_all
from torchcache_server.store.findings import Finding
from torchcache_server.store.identity import read_identity, write_one
from torchcache_server.store.index import remove_index
from torchcache_server.store.ledger import RECORD_SUFFIX, read_record, readable_bytes, write_record
from torchcache_server.store.segments import Segment


class Mender:
    """Repairs findings of the store at `root`. Methods raise OSError.

    `namespaces` are those that are known, by their folders; `protecting` gives the flag of one whose own was lost, or
    nothing if it needs none.
    """

    def __init__(
        self,
        disk: DiskCalls,
        root: str,
        *,
        namespaces: Mapping[str, str],
        protecting: Callable[[str], bytes],
    ) -> None:
        self._disk = disk
        self._root = root
        self._namespaces = namespaces
        self._protecting = protecting
        self._repairs: dict[str, Callable[[Finding], None]] = {
            "identity": self._identity,
            "mode": self._mode,
            "temporary": self._remove,
            "lost-ledger": self._lost_ledger,
            "record-copy": self._record_copy,
            "flag": self._set_aside,
            "record": self._set_aside,
            "header": self._header,
            "payload": self._bury,
            "torn": self._bury,
            "index": self._index,
        }
        self._segments_changed = False

    def mend(self, finding: Finding) -> None:
        """Does what `finding.repair` says, which isn't empty."""
        self._repairs[finding.kind](finding)

    def finish(self) -> None:
        """What follows from the repairs, once all were made: no trust in an index of segments that were changed."""
        if self._segments_changed:
            self._forget_index()

    def _identity(self, finding: Finding) -> None:
        server_id = read_identity(self._disk, self._root).server_id
        if server_id is not None:
            write_one(self._disk, self._root, os.path.basename(finding.path), server_id)

    def _mode(self, finding: Finding) -> None:
        fd = os.open(finding.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fchmod(fd, 0o700 if os.path.isdir(finding.path) else 0o600)
        finally:
            os.close(fd)

    def _remove(self, finding: Finding) -> None:
        self._disk.unlink(finding.path)
        self._disk.fsync_dir(os.path.dirname(finding.path))

    def _record_copy(self, finding: Finding) -> None:
        reading = read_record(self._disk, finding.path)
        if reading.key is not None:
            write_record(self._disk, os.path.dirname(finding.path), reading.key, reading.value)

    def _set_aside(self, finding: Finding) -> None:
        """Moves a record to `damaged`; a flag makes room for one that protects, if its namespace is known.

        The damaged one is there until its successor is, and keeps a server from starting.
        """
        folder, name = os.path.split(finding.path)
        kind = os.path.basename(folder)
        aside = self._make_damaged()
        target, number = f"{kind}-{name}", 1
        while os.path.lexists(os.path.join(aside, target)):
            target, number = f"{kind}-{name}.{number}", number + 1
        namespace = self._namespaces.get(name.removesuffix(RECORD_SUFFIX)) if kind == layout.FLAGS else None
        if namespace is None:
            self._disk.rename(finding.path, os.path.join(aside, target))
            self._disk.fsync_dir(aside)
            self._disk.fsync_dir(folder)
        else:
            replace_file(self._disk, aside, target, [readable_bytes(self._disk, finding.path)])
            self._protect(folder, namespace)

    def _lost_ledger(self, finding: Finding) -> None:
        """Makes the folder anew, whole or not at all. First the notes of what was lost, as if it had been set aside."""
        kind = os.path.basename(finding.path)
        folders = self._disk.names(os.path.join(self._root, layout.SEGMENTS)) if kind == layout.FLAGS else []
        aside = self._make_damaged()
        for name in ("folder", *folders):
            replace_file(self._disk, aside, f"{kind}-{name}{RECORD_SUFFIX}", [])
        made = f"{finding.path}.new"
        self._disk.make_dir(made)
        for folder in folders:
            if folder in self._namespaces:
                self._protect(made, self._namespaces[folder])
        self._disk.rename(made, finding.path)
        self._disk.fsync_dir(self._root)

    def _protect(self, ledger: str, namespace: str) -> None:
        value = self._protecting(namespace)
        if value:
            write_record(self._disk, ledger, namespace.encode(), value)

    def _make_damaged(self) -> str:
        aside = os.path.join(self._root, layout.DAMAGED)
        self._disk.make_dir(aside)
        self._disk.fsync_dir(self._root)
        return aside

    def _header(self, finding: Finding) -> None:
        self._segments_changed = True
        if finding.namespace:
            opened = Segment.open(self._disk, finding.path, namespace=finding.namespace)
            if opened is not None:
                segment, _ = opened
                segment.unsynced = True
                try:
                    segment.sync(self._disk)
                finally:
                    segment.close(self._disk)
        else:
            self._remove(finding)

    def _bury(self, finding: Finding) -> None:
        self._segments_changed = True
        fd = self._disk.open(finding.path)
        try:
            write_all(self._disk, fd, [DEAD_MAGIC], finding.offset)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)

    def _index(self, _: Finding) -> None:
        self._forget_index()

    def _forget_index(self) -> None:
        """First the word that it is to be trusted."""
        self._disk.unlink(os.path.join(self._root, layout.CLEAN))
        self._disk.fsync_dir(self._root)
        remove_index(os.path.join(self._root, layout.INDEX))
