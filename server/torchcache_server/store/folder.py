"""The store's folder: made or recognised, locked against a second server, and marked as cleanly stopped or not."""

from __future__ import annotations

import logging
import os
import stat
import uuid
from pathlib import Path
from typing import Final

import xxhash

from torchcache.errors import ConfigurationError
from torchcache.locks import LockFile
from torchcache.records import SUFFIX
from torchcache_server.store import anchors, layout
from torchcache_server.store.disk import UNREADABLE, DiskCalls, read_file, replace_file
from torchcache_server.store.identity import (
    DAMAGED,
    FORMAT,
    NOTHING,
    Identity,
    mend,
    read_identity,
    write_identity,
)
from torchcache_server.store.index import remove_index
from torchcache_server.store.ledger import RECORD_SUFFIX

_READ_BYTES: Final = 4 << 20

_log = logging.getLogger(__name__)


class StoreFolder:
    """An open store folder. `was_clean` says whether the last server that used it stopped in order.

    Raises ConfigurationError if the folder is in use, someone else's, or can't be made; and if it isn't this version's,
    or has lost its notes, and may hold an acknowledged checkpoint.
    """

    def __init__(self, path: Path, disk: DiskCalls) -> None:
        self.path = os.path.abspath(path)
        self._disk = disk
        try:
            self._make(self.path)
            self._lock = take_lock(self.path)
            try:
                anchors.hold(self.path)
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
        return os.path.join(self.path, layout.SEGMENTS)

    @property
    def index(self) -> str:
        return os.path.join(self.path, layout.INDEX)

    @property
    def records(self) -> str:
        return os.path.join(self.path, layout.RECORDS)

    @property
    def flags(self) -> str:
        return os.path.join(self.path, layout.FLAGS)

    @property
    def spares(self) -> str:
        """Files that once were segments. Empty after a start."""
        return os.path.join(self.path, layout.SPARES)

    def set_aside(self, kind: str) -> list[str]:
        """Names of the records of folder `kind` that `torchcache doctor` set aside as damaged. Raises OSError.

        A flag's is the digest of its namespace, as its folder of segments is called, and `.record`.
        """
        return layout.set_aside(self.path, kind)

    def mark_clean(self) -> None:
        """Notes that everything is in order; the last thing a server does before `unlock`, its index closed.

        The note is a checksum of the index: LMDB has none, and ends the process over a page that isn't what it was.
        Raises OSError.
        """
        digest = index_digest(self._disk, self.path)
        replace_file(self._disk, self.path, layout.CLEAN, [f"{digest}\n".encode()])

    def unlock(self) -> None:
        """Lets others use the folder."""
        anchors.let_go(self.path)
        self._lock.close()

    def _make(self, path: str) -> None:
        missing = []
        at = path
        while not os.path.lexists(at):
            missing.append(at)
            at = os.path.dirname(at)
        self._sync_name(at)  # a server that was killed may have made it, and no more
        for folder in reversed(missing):
            self._disk.make_dir(folder)
            self._sync_name(folder)
        check_folder(path)

    def _sync_name(self, folder: str) -> None:
        """Makes a folder's own name durable: with it everything in the store would be gone."""
        try:
            self._disk.fsync_dir(os.path.dirname(folder))
        except PermissionError:
            pass  # a folder that isn't ours to read is none in which we made one

    def _enter(self) -> None:
        self._refuse_what_is_odd()
        identity = read_identity(self._disk, self.path)
        if identity.server_id is None:
            self._begin_anew(identity)
        else:
            self.server_id = identity.server_id
            self._refuse_lost_ledgers()
            mend(self._disk, self.path, identity)
            self._make_folders()
        for name in self._disk.names(self.spares):
            self._disk.unlink(os.path.join(self.spares, name))
        self.was_clean, why_not = index_trust(self._disk, self.path)
        if why_not:
            _log.warning("the index %s is made anew: %s", self.index, why_not)
        self._disk.unlink(os.path.join(self.path, layout.CLEAN))
        self._disk.fsync_dir(self.path)

    def _begin_anew(self, identity: Identity) -> None:
        """Empties the folder of what a store writes and makes it this version's."""
        left = any(os.path.isdir(os.path.join(self.path, name)) for name in layout.FOLDERS)
        if left or identity.found != NOTHING:
            self._refuse_to_lose(identity)
            if identity.found != NOTHING or self._disk.names(self.segments):
                _log.warning(
                    "the store %s has the format %r, not %r: it is emptied", self.path, identity.found, FORMAT
                )
            self._empty()
        self.server_id = uuid.uuid4().hex
        # Before the identity: where that is there and a folder isn't, somebody removed it.
        self._make_folders()
        self._disk.fsync_dir(self.path)
        write_identity(self._disk, self.path, self.server_id)

    def _make_folders(self) -> None:
        for name in layout.FOLDERS:
            self._disk.make_dir(os.path.join(self.path, name))

    def _refuse_what_is_odd(self) -> None:
        for oddity in layout.oddities(self.path):
            raise ConfigurationError(
                f"the store {self.path} can't be opened: {oddity.path} {oddity.what}, which no server made: remove it "
                "or choose another folder"
            )

    def _refuse_lost_ledgers(self) -> None:
        """Raises ConfigurationError if a folder is gone that said what must be kept, and there is something to keep."""
        for name in layout.LEDGERS:
            folder = os.path.join(self.path, name)
            if not os.path.isdir(folder) and self._disk.names(self.segments):
                raise ConfigurationError(
                    f"the store {self.path} has lost its folder {name!r}, which said what checkpoints it holds: put it "
                    f"back from a backup, or let `torchcache doctor --store {self.path} --repair` make it anew; all "
                    "checkpoints are kept then"
                )

    def _refuse_to_lose(self, identity: Identity) -> None:
        """Raises ConfigurationError if the folder holds what must be kept: it may be an acknowledged checkpoint."""
        if not self._may_hold_checkpoints():
            return
        if identity.found in (NOTHING, DAMAGED):
            state = "missing" if identity.found == NOTHING else "damaged"
            what = f"its files {layout.IDENTITY} and {layout.IDENTITY_COPY} are {state}: put one back from a backup"
        else:
            what = (
                f"its format is {identity.found!r}, not {FORMAT!r}: start the version of torchcache that wrote it until"
                " they are"
            )
        raise ConfigurationError(
            f"the store {self.path} holds checkpoints that may not have been uploaded yet, and {what}, or remove the "
            "folder"
        )

    def _may_hold_checkpoints(self) -> bool:
        """Whether there are flags; or, where their folder is gone, records. Or damaged ones of either."""
        if self._disk.names(os.path.join(self.path, layout.DAMAGED)):
            return True
        ledger = self.flags if os.path.isdir(self.flags) else self.records
        return any(name.endswith(RECORD_SUFFIX) for name in self._disk.names(ledger))

    def _empty(self) -> None:
        """Removes what a store writes, and nothing else that may lie in the folder."""
        disk = self._disk
        for name in (layout.IDENTITY, layout.IDENTITY_COPY, layout.CLEAN):
            disk.unlink(os.path.join(self.path, name))
        remove_index(self.index)
        for namespace in disk.names(self.segments):
            self._remove_files(os.path.join(self.segments, namespace), SUFFIX)
        for folder in (self.records, self.flags):
            self._remove_files(folder, RECORD_SUFFIX)

    def _remove_files(self, folder: str, suffix: str) -> None:
        for name in self._disk.names(folder):
            if name.endswith(suffix):
                self._disk.unlink(os.path.join(folder, name))
        self._disk.remove_dir(folder)


def check_folder(path: str) -> None:
    """Raises ConfigurationError unless `path` is a folder, no symlink, of this user and for his writing alone."""
    if check_owner(path) & stat.S_IWOTH:
        raise ConfigurationError(
            f"everyone may write to the store {path}: chmod 700 it or choose another folder"
        )


def check_owner(path: str) -> int:
    """The mode of `path`. Raises ConfigurationError unless it is a folder, no symlink, of this user."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise ConfigurationError(
            f"the store {path} is a symlink: give the folder that it leads to, {os.path.realpath(path)}"
        )
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigurationError(f"the store {path} is not a folder: choose another path")
    if status.st_uid != os.geteuid():
        raise ConfigurationError(
            f"the store {path} belongs to user {status.st_uid}, this server runs as user {os.geteuid()}: "
            "choose a folder of your own"
        )
    return status.st_mode


def index_trust(disk: DiskCalls, path: str) -> tuple[bool, str]:
    """Whether the last server stopped in order and its index is as it was then. If only the former: why not."""
    try:
        noted = read_file(disk, os.path.join(path, layout.CLEAN))
    except FileNotFoundError:
        return False, ""
    try:
        is_noted = noted == f"{index_digest(disk, path)}\n".encode()
        return is_noted, "" if is_noted else "it isn't as the last server left it"
    except FileNotFoundError:
        return False, "it is missing"
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return False, f"it can't be read: {error}"


def index_digest(disk: DiskCalls, path: str) -> str:
    """Checksum of a store's index, which must not be open. Raises OSError."""
    fd = disk.open(os.path.join(path, layout.INDEX, layout.INDEX_FILES[0]))
    try:
        digest, at = xxhash.xxh3_128(), 0
        while part := disk.pread(fd, _READ_BYTES, at):
            digest.update(part)
            at += len(part)
        return digest.hexdigest()
    finally:
        disk.close(fd)


def take_lock(path: str, *, create: bool = True) -> LockFile:
    """The lock of the store at `path`. Raises ConfigurationError if a server has it, OSError if it can't be opened."""
    lock = LockFile(Path(path, layout.LOCK), create=create)
    if not lock.try_exclusive():
        lock.close()
        raise ConfigurationError(
            f"the store {path} is in use by another server: stop that one or choose another folder"
        )
    return lock
