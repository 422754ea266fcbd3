"""Who is there, told by the kernel: flock on files in the embedded pool's folder.

A lock goes with its process, however that ends; there is no pid to look up and nothing to clean up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.locks import LockFile
from torchcache.server_process import ServerProcess


@contextmanager
def pool_lock(root: Path, deadline: float) -> Iterator[None]:
    """Holds `pool.lock`. Raises ServerUnavailable if another process keeps it until the deadline."""
    with _open(root / "pool.lock") as lock:
        if not lock.wait_exclusive(deadline - time.monotonic()):
            raise ServerUnavailable(f"another process has been attaching to the pool {root} for too long")
        try:
            yield
        finally:
            lock.release()  # not by closing alone: a child forked meanwhile would keep the lock


def _open(path: Path) -> LockFile:
    try:
        return LockFile(path)
    except OSError as error:
        raise ConfigurationError(f"the lock file {path} can't be opened: {error.strerror}") from error


def locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        lock = LockFile(path, create=False)
    except OSError:
        return False
    with lock:
        return not lock.try_shared()


class Presence:
    """The pools this process uses, and the servers it started. Used inside `connections.call()` only.

    A forked child shares its parent's lock: the pool is in use until both have ended. The parent's servers are not
    its to wait for.
    """

    def __init__(self) -> None:
        self._held: dict[Path, LockFile] = {}
        self._children: dict[Path, ServerProcess] = {}

    def hold(self, root: Path) -> None:
        """Holds the pool's `clients.lock`, for the life of this process. Under `pool.lock`."""
        path = root / "clients.lock"
        held = self._held.get(root)
        if held is not None and held.is_at(path):
            return
        lock = _open(path)
        if not lock.try_shared():
            lock.close()
            raise ServerUnavailable(f"the pool {root} is being closed by somebody who doesn't hold its lock")
        self._held[root] = lock
        if held is not None:
            held.close()

    def leave(self, root: Path) -> bool:
        """Gives the pool's `clients.lock` up. True if nobody uses the pool now. Under `pool.lock`."""
        held = self._held.pop(root, None)
        if held is not None:
            held.close()  # children forked from here keep theirs
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


def used(path: Path) -> bool:
    """Whether a living process holds the lock, shared or not."""
    with _open(path) as lock:
        return not lock.try_exclusive()


presence: Final = Presence()
os.register_at_fork(after_in_child=presence.forget_children)
