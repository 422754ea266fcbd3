"""Files under one root, opened so that neither a key nor a symlink nor a FIFO leads or hangs anywhere else."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ObjectNotFound,
    OutOfSpace,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache_server.understore.base import check_key, object_uri

TEMPORARY_PREFIX = ".torchcache-tmp-"
"""Names of files that are being written. Not listed, and removed once their writer is dead."""

_PATH_BYTES = 4096  # PATH_MAX, with the NUL at its end
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOCK_PAUSE_S = 0.005
_SAID = {
    errno.EACCES: "this process may not; check the permissions of the file and its folders",
    errno.EPERM: "this process may not; check the permissions of the file and its folders",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EISDIR: "a folder is in the way",
    errno.ENOTDIR: "a file is in the way of a folder",
}


class Root:
    """The folder that is the root of an under-store. Keys are relative to it. `umask`: of folders that are made."""

    def __init__(self, path: str, umask: int | None = None) -> None:
        self.path = path
        self._umask = umask

    @property
    def uri(self) -> str:
        return f"file://{self.path}"

    def uri_of(self, key: str) -> str:
        return object_uri(self.uri, key)

    def path_of(self, key: str) -> str:
        """Raises ConfigurationError for a key that isn't a plain relative path."""
        check_key(key, self.uri_of(key))
        if "" in key.split("/"):
            raise ConfigurationError(
                f"the key of {self.uri_of(key)!r} has an empty segment: no file is named so"
            )
        if key.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
            raise ConfigurationError(
                f"{self.uri_of(key)} is the name of a file that is being written: choose another"
            )
        path = os.path.join(self.path, key)
        if len(os.fsencode(path)) >= _PATH_BYTES:
            # It could be made, folder by folder, and then not be opened.
            raise ConfigurationError(
                f"the path of {self.uri_of(key)} is too long for the file system", object=key
            )
        return path

    def open(self) -> int:
        """A descriptor of the root itself. Raises ObjectNotFound."""
        try:
            return os.open(self.path, _FOLDER)
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(
                f"there is no folder {self.uri}; check the under-store's URI", object=self.uri
            ) from None

    @contextmanager
    def opened(self, key: str) -> Iterator[int]:
        """A descriptor of the regular file `key`. Symlinks are followed as long as they end beneath the root.

        Raises ObjectNotFound, ConfigurationError.
        """
        # O_PATH opens without effect; only once it is known to be a file, and where, is it opened for reading.
        handle = os.open(self.path_of(key), os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ObjectNotFound(f"{self.uri_of(key)} is not a file; name one", object=self.uri_of(key))
            self._check_beneath(handle, key)
            file = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(handle)
        try:
            yield file
        finally:
            os.close(file)

    @contextmanager
    def folder_of(self, key: str, *, create: bool) -> Iterator[int]:
        """A descriptor of the folder that holds `key`; with `create`, made where it is missing."""
        *folders, _ = os.path.relpath(self.path_of(key), self.path).split("/")
        folder = self.open()
        try:
            for name in folders:
                inner = self._enter(folder, name) if create else os.open(name, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
                self._check_beneath(folder, key)
            yield folder
        finally:
            os.close(folder)

    def remove_if_empty(self, folder: int, key: str) -> None:
        """Removes the folder that holds `key`, `folder` its descriptor: if it is empty, not the root, and no symlink
        leads to it. Under its lock; who opened it before can't make a file in it any more, and opens it anew."""
        *folders, _ = key.split("/")
        path = os.path.join(os.path.realpath(self.path), *folders)
        if not folders or str(Path(f"/proc/self/fd/{folder}").readlink()) != path:
            return
        with suppress(OSError):  # something is in it, or it may not be removed
            above = os.open(os.path.dirname(path), _FOLDER | os.O_NOFOLLOW)
            try:
                os.rmdir(folders[-1], dir_fd=above)
                os.fsync(above)
            finally:
                os.close(above)

    def is_beneath(self, path: str) -> bool:
        """True if `path`, resolved, lies under the root."""
        root = os.path.realpath(self.path).rstrip("/")
        return os.path.realpath(path).startswith(root + "/")

    def _enter(self, folder: int, name: str) -> int:
        """A descriptor of a folder in `folder`, made if it is missing."""
        with suppress(FileNotFoundError):
            return os.open(name, _FOLDER, dir_fd=folder)
        with suppress(FileExistsError):  # Another writer made it, or a file is there: opening it says which.
            os.mkdir(name, dir_fd=folder)
            _open_up_folder(folder, name, self._umask)
            os.fsync(folder)
        return os.open(name, _FOLDER, dir_fd=folder)

    def _check_beneath(self, handle: int, key: str) -> None:
        if not self.is_beneath(str(Path(f"/proc/self/fd/{handle}").readlink())):
            raise ConfigurationError(
                f"{self.uri_of(key)} is a symlink that leads out of {self.uri}; "
                "configure an under-store for the place it points to",
                object=self.uri_of(key),
            )


@contextmanager
def locked(folder: int, uri: str, deadline: float) -> Iterator[None]:
    """Holds the folder's lock, by which all writers of torchcache compare and swap. Raises DeadlineExceeded."""
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"the folder of {uri} was locked up to the deadline", object=uri
                ) from None
            time.sleep(_LOCK_PAUSE_S)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def version_of(status: os.stat_result) -> str:
    """A file's version: size and mtime_ns."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def translate(error: OSError, action: str, uri: str) -> TorchCacheError:
    """What `error`, met while doing `action` to `uri`, is to our caller."""
    if error.errno == errno.ENOENT or (error.errno == errno.ENOTDIR and action != "write"):
        return ObjectNotFound(f"there is no {uri}; check the name", object=uri)
    if error.errno == errno.ELOOP:
        return ConfigurationError(f"can't {action} {uri}: its symlinks lead in a circle", object=uri)
    if error.errno in _SAID:
        return ConfigurationError(f"can't {action} {uri}: {_SAID[error.errno]}", object=uri)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfSpace(f"can't {action} {uri}: {error.strerror}; make room in the under-store", object=uri)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return Overloaded(f"can't {action} {uri}: {error.strerror}; raise the server's limit", object=uri)
    return ServerUnavailable(f"can't {action} {uri}: {error.strerror}; check its file system", object=uri)


def _open_up_folder(folder: int, name: str, umask: int | None) -> None:
    with suppress(OSError):  # another writer put something else there: that keeps its mode
        made = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        try:
            open_up(made, 0o777, umask)
        finally:
            os.close(made)


def open_up(made: int, mode: int, umask: int | None) -> None:
    """Gives what this process just made the mode that `umask` leaves of `mode`. None: it has that already.

    The process's own umask keeps all that a server makes to its user. Where others have rights nevertheless, a default
    ACL or the file system itself has said which. What can't be changed stays as it is.
    """
    if umask is None:
        return
    found = stat.S_IMODE(os.fstat(made).st_mode)
    wanted = mode & ~umask | found & ~0o777  # a folder's set-group-ID is its parent's
    if not found & 0o077 and wanted != found:
        with suppress(PermissionError):
            os.fchmod(made, wanted)
