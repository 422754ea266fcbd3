"""The store's folder: made or recognised, locked against a second server, and marked as cleanly stopped or not."""

from __future__ import annotations

import json
import logging
import os
import stat
import uuid
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError
from torchcache.locks import LockFile
from torchcache_server.store.disk import DiskCalls, read_file, replace_file
from torchcache_server.store.index import remove_index
from torchcache_server.store.ledger import RECORD_SUFFIX
from torchcache_server.store.segments import SUFFIX

_FORMAT: Final = "torchcache store 1"
_IDENTITY: Final = "store.json"
_LOCK: Final = "store.lock"
_CLEAN: Final = "clean"

_log = logging.getLogger(__name__)


class StoreFolder:
    """An open store folder. `was_clean` says whether the last server that used it stopped in order.

    Raises ConfigurationError if the folder is in use, someone else's, or can't be made.
    """

    def __init__(self, path: Path, disk: DiskCalls) -> None:
        self.path = os.path.abspath(path)
        self._disk = disk
        try:
            self._make(self.path)
            self._lock = self._take_lock()
            try:
                self._enter()
            except BaseException:
                self.unlock()
                raise
        except OSError as error:
            raise ConfigurationError(
                f"the store {self.path} can't be opened: {error}; choose another folder or mend this one"
            ) from error

    @property
    def segments(self) -> str:
        return os.path.join(self.path, "segments")

    @property
    def index(self) -> str:
        return os.path.join(self.path, "index")

    @property
    def records(self) -> str:
        return os.path.join(self.path, "records")

    @property
    def flags(self) -> str:
        return os.path.join(self.path, "flags")

    @property
    def spares(self) -> str:
        return os.path.join(self.path, "spares")

    def mark_clean(self) -> None:
        """Notes that everything is in order; the last thing a server does before `unlock`. Raises OSError."""
        replace_file(self._disk, self.path, _CLEAN, [b"1\n"])

    def unlock(self) -> None:
        """Lets others use the folder."""
        self._lock.close()

    def _make(self, path: str) -> None:
        missing = []
        at = path
        while not os.path.lexists(at):
            missing.append(at)
            at = os.path.dirname(at)
        for folder in reversed(missing):
            self._disk.make_dir(folder)
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigurationError(f"the store {path} is not a folder: choose another path")
        if status.st_uid != os.geteuid():
            raise ConfigurationError(
                f"the store {path} belongs to user {status.st_uid}, this server runs as user {os.geteuid()}: "
                "choose a folder of your own"
            )
        if status.st_mode & stat.S_IWOTH:
            raise ConfigurationError(
                f"everyone may write to the store {path}: chmod 700 it or choose another folder"
            )

    def _take_lock(self) -> LockFile:
        lock = LockFile(Path(self.path, _LOCK))
        if not lock.try_exclusive():
            lock.close()
            raise ConfigurationError(
                f"the store {self.path} is in use by another server: stop that one or choose another folder"
            )
        return lock

    def _enter(self) -> None:
        identity = self._read_identity()
        if identity is None:
            self._refuse_to_lose()
            self._empty()
            identity = uuid.uuid4().hex
            data = json.dumps({"format": _FORMAT, "server_id": identity}).encode()
            replace_file(self._disk, self.path, _IDENTITY, [data])
        self.server_id = identity
        for folder in (self.segments, self.index, self.records, self.flags):
            self._disk.make_dir(folder)
        clean = os.path.join(self.path, _CLEAN)
        self.was_clean = os.path.exists(clean)
        self._disk.unlink(clean)
        self._disk.fsync_dir(self.path)

    def _read_identity(self) -> str | None:
        """The server's id, or None for a new folder and for one that another version wrote."""
        path = os.path.join(self.path, _IDENTITY)
        if not os.path.lexists(path):
            return None
        try:
            content = json.loads(read_file(self._disk, path))
            found, server_id = str(content["format"]), str(content["server_id"])
        except (ValueError, KeyError, TypeError):
            found, server_id = "damaged", ""
        if found == _FORMAT and server_id:
            return server_id
        _log.warning("the store %s has the format %r, not %r: it is emptied", self.path, found, _FORMAT)
        return None

    def _refuse_to_lose(self) -> None:
        """Raises ConfigurationError if the folder holds what must be kept: it may be an acknowledged checkpoint."""
        flags = self._disk.names(self.flags) if os.path.isdir(self.flags) else []
        if any(name.endswith(RECORD_SUFFIX) for name in flags):
            raise ConfigurationError(
                f"the store {self.path} is damaged or of another version, and holds checkpoints that may not have been "
                "uploaded yet: start the version of torchcache that wrote it until they are, or remove the folder"
            )

    def _empty(self) -> None:
        """Removes what a store writes, and nothing else that may lie in the folder."""
        disk = self._disk
        for name in (_IDENTITY, _CLEAN):
            disk.unlink(os.path.join(self.path, name))
        remove_index(self.index)
        for namespace in disk.names(self.segments):
            self._remove_files(os.path.join(self.segments, namespace), SUFFIX)
        for folder in (self.records, self.flags):
            self._remove_files(folder, RECORD_SUFFIX)

    def _remove_files(self, folder: str, suffix: str) -> None:
        if not os.path.isdir(folder) or os.path.islink(folder):
            return
        for name in self._disk.names(folder):
            if name.endswith(suffix):
                self._disk.unlink(os.path.join(folder, name))
        self._disk.remove_dir(folder)
