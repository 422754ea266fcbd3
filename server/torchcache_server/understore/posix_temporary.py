"""The temporary files of writers, and what those who were killed left of theirs.

A writer holds its file's lock until the file is in its place. So one that nobody holds was left behind.
"""

from __future__ import annotations

import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from torchcache_server.understore.posix_files import TEMPORARY_PREFIX, locked, open_up

_MOST_FOLDERS: Final = 65_536


class Temporaries:
    """Makes temporary files, with the mode that `umask` leaves of 0666. Sweeps each folder once, before it writes there
    first. Thread-safe; raises OSError."""

    def __init__(self, umask: int | None = None) -> None:
        self._umask = umask
        self._swept: set[tuple[int, int]] = set()

    @contextmanager
    def file(self, folder: int, uri: str, deadline: float) -> Iterator[tuple[str, int]]:
        """Name and descriptor of a new file in `folder`, for the time of the block. Raises DeadlineExceeded too."""
        name = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        # Under the folder's lock, or another's sweep might come between the file and its lock.
        with locked(folder, uri, deadline):
            self._sweep_once(folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o666, dir_fd=folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            open_up(file, 0o666, self._umask)
            yield name, file
        finally:
            remove(folder, name)
            os.close(file)

    def _sweep_once(self, folder: int) -> None:
        status = os.fstat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in self._swept:
            return
        for name in os.listdir(folder):
            if name.startswith(TEMPORARY_PREFIX):
                _remove_if_dead(folder, name)
        if len(self._swept) >= _MOST_FOLDERS:
            self._swept.clear()
        self._swept.add(identity)


def remove(folder: int, name: str) -> None:
    """Removes a name from a folder; one that is gone is fine."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _remove_if_dead(folder: int, name: str) -> None:
    try:
        file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:  # gone, or nothing of ours
        return
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder, name)
    except BlockingIOError:
        pass  # its writer lives
    finally:
        os.close(file)
