"""Who is there, told by the kernel: flock on files in the embedded pool's folder.

A lock goes with its process, however that ends; there is no pid to look up and nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.server_process import ServerProcess

_POLL_S: Final = 0.01


@contextmanager
def pool_lock(root: Path, deadline: float) -> Iterator[None]:
    """Holds `pool.lock`. Raises ServerUnavailable if another process keeps it until the deadline."""
    descriptor = _open_lock(root / "pool.lock")
    try:
        while not _lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ServerUnavailable(f"another process has been attaching to the pool {root} for too long")
            time.sleep(_POLL_S)
        yield
    finally:
        # Not by closing alone: a child forked meanwhile would keep the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"the lock file {path} can't be opened: {error.strerror}") from error


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


class Presence:
    """The pools this process uses, and the servers it started. Used inside `connections.call()` only.

    A forked child shares its parent's lock: the pool is in use until both have ended. The parent's servers are not
    its to wait for.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}
        self._children: dict[Path, ServerProcess] = {}

    def hold(self, root: Path) -> None:
        """Holds the pool's `clients.lock`, for the life of this process. Under `pool.lock`."""
        path = root / "clients.lock"
        held = self._held.get(root)
        if held is not None and _same_file(held, path):
            return
        descriptor = _open_lock(path)
        if not _lock(descriptor, fcntl.LOCK_SH):
            os.close(descriptor)
            raise ServerUnavailable(f"the pool {root} is being closed by somebody who doesn't hold its lock")
        self._held[root] = descriptor
        if held is not None:
            os.close(held)

    def leave(self, root: Path) -> bool:
        """Gives the pool's `clients.lock` up. True if nobody uses the pool now. Under `pool.lock`."""
        held = self._held.pop(root, None)
        if held is not None:
            os.close(held)  # children forked from here keep theirs
        return not used(root / "clients.lock")

    def child(self, folder: Path) -> ServerProcess | None:
        """The server this process started in `folder`, if it did."""
        return self._children.get(folder)

    def adopt(self, folder: Path, child: ServerProcess) -> None:
        """Remembers a server that this process started."""
        self._children[folder] = child

    def children(self, root: Path) -> list[ServerProcess]:
        """The servers this process started in the pool, no longer remembered."""
        return [self._children.pop(folder) for folder in list(self._children) if folder.parent == root]

    def forget_children(self) -> None:
        """After a fork, in the child."""
        self._children.clear()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def used(path: Path) -> bool:
    """Whether a living process holds the lock, shared or not."""
    descriptor = _open_lock(path)
    try:
        return not _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


presence: Final = Presence()
os.register_at_fork(after_in_child=presence.forget_children)
