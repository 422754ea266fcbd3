"""flock on files: who is alive, told by the kernel. A lock goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


class LockFile:
    """An open file that can be locked. The lock is this object's; `close` lets it go."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file can't be opened or made (mode 0600)."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> LockFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def try_exclusive(self) -> bool:
        """Takes the lock if nobody else holds it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait_exclusive(self, timeout_s: float) -> bool:
        """Takes the lock, waiting up to `timeout_s` for who holds it; False if that was too short."""
        deadline = time.monotonic() + timeout_s
        while not self.try_exclusive():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def close(self) -> None:
        """Lets the lock go. May be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
