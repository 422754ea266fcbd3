"""flock on files: who is alive, told by the kernel. A lock goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.01


class LockFile:
    """An open file that can be locked. The lock is this object's, and that of children forked from here."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Raises OSError if the file can't be opened or, with `create`, made (mode 0600)."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._descriptor = os.open(path, flags, 0o600)

    def __enter__(self) -> LockFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def is_at(self, path: Path) -> bool:
        """Whether `path` still names the file that is open."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except OSError:
            return False

    def try_exclusive(self) -> bool:
        """Takes the lock if nobody else holds it."""
        return self._try(fcntl.LOCK_EX)

    def try_shared(self) -> bool:
        """Takes the lock, to be shared, if nobody else holds it for himself."""
        return self._try(fcntl.LOCK_SH)

    def wait_exclusive(self, timeout_s: float) -> bool:
        """Takes the lock, waiting up to `timeout_s` for who holds it; False if that was too short."""
        deadline = time.monotonic() + timeout_s
        while not self.try_exclusive():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def release(self) -> None:
        """Lets the lock go, for children forked meanwhile too."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes the file; the lock goes unless a forked child holds it. May be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
