"""What must not be lost: the flags that forbid eviction, and the sync that makes chunks durable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torchcache.errors import OutOfSpace, TorchCacheError
from torchcache_server.store.core import Core
from torchcache_server.store.ledger import Ledger
from torchcache_server.store.segments import folder_name
from torchcache_server.store.space import Namespace, check_name

_KEPT: Final = "kept"
_PINNED: Final = "pinned"


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns OSError into an error of ours that says `what` could not be done."""
    try:
        yield
    except OSError as error:
        kind = OutOfSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else TorchCacheError
        raise kind(f"the store's disk can't {what}: {error}; see to the disk") from error


class Flags:
    """Which namespaces are kept or pinned; durable, each change before it holds."""

    def __init__(self, core: Core, ledger: Ledger) -> None:
        self._core = core
        self._ledger = ledger
        self._lock = threading.Lock()  # one change at a time
        for name, value in ledger.items(b""):
            words = value.decode().split()
            namespace = core.space.namespace(name.decode())
            namespace.kept, namespace.pinned = _KEPT in words, _PINNED in words

    def set(self, name: str, *, kept: bool | None = None, pinned: bool | None = None) -> None:
        """Changes the flags that are given. Raises OutOfSpace, TorchCacheError: nothing has changed."""
        check_name(name)
        with self._lock:
            with self._core.lock:
                found = self._core.space.namespaces.get(name)
                before = (found.kept, found.pinned) if found is not None else (False, False)
            after = (before[0] if kept is None else kept, before[1] if pinned is None else pinned)
            if after == before:
                return
            words = [word for word, is_set in zip((_KEPT, _PINNED), after, strict=True) if is_set]
            with disk_errors(f"note that {name!r} is to be kept"):
                if words:
                    self._ledger.put(name.encode(), " ".join(words).encode())
                else:
                    self._ledger.delete(name.encode())
            with self._core.lock:
                namespace = self._core.space.namespace(name)
                namespace.kept, namespace.pinned = after
                self._core.space.forget_if_empty(name)


def sync(core: Core, name: str) -> None:
    """Makes the namespace's chunks durable: its files, then their names. Raises OutOfSpace, TorchCacheError."""
    with core.lock:
        namespace = core.space.namespaces.get(name)
    if namespace is None:
        return
    with namespace.sync_lock, disk_errors(f"make {name!r} durable"):
        with core.lock:
            segments = list(namespace.segments.values())
        for segment in segments:
            try:
                segment.sync(core.disk)
            except OSError:
                segment.sealed = True
                if not segment.dropped:
                    raise
        _sync_names(core, namespace)


def _sync_names(core: Core, namespace: Namespace) -> None:
    with core.lock:
        if not namespace.names_unsynced:
            return
        namespace.names_unsynced = False
    try:
        core.disk.fsync_dir(os.path.join(core.folder.segments, folder_name(namespace.name)))
        core.disk.fsync_dir(core.folder.segments)
    except FileNotFoundError:
        return  # dropped meanwhile
    except OSError:
        namespace.names_unsynced = True
        raise
