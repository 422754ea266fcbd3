"""What must not be lost: the flags, which forbid eviction or limit it, and the sync that makes chunks durable."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from torchcache.errors import OutOfSpace, TorchCacheError
from torchcache.records import folder_name
from torchcache_server.store.core import Core
from torchcache_server.store.ledger import Ledger
from torchcache_server.store.policy import Policy
from torchcache_server.store.space import Namespace, check_name

_log = logging.getLogger(__name__)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns OSError into an error of ours that says `what` could not be done."""
    try:
        yield
    except OSError as error:
        kind = OutOfSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else TorchCacheError
        raise kind(f"the store's disk can't {what}: {error}; see to the disk") from error


class Flags:
    """Which namespaces are kept, and the policy of each; durable, each change before it holds."""

    def __init__(self, core: Core, ledger: Ledger) -> None:
        self._core = core
        self._ledger = ledger
        self._lock = threading.Lock()  # one change at a time
        for name, value in ledger.items(b""):
            namespace = core.space.namespace(name.decode())
            namespace.kept, namespace.policy = _decoded(value)

    def keep(self, name: str, kept: bool) -> None:
        """Says that `name` must be kept, or need not. Raises OutOfSpace, TorchCacheError: nothing has changed."""
        self._change(name, lambda _, policy: (kept, policy))

    def set_policy(self, name: str, change: Callable[[Policy], Policy]) -> None:
        """Changes the policy of `name`. Raises as `keep`, and what `change` raises."""
        self._change(name, lambda kept, policy: (kept, change(policy)))

    def clear(self, name: str) -> None:
        """Forgets all flags of `name`. Raises as `keep`."""
        self._change(name, lambda *_: (False, Policy()))

    def _change(self, name: str, change: Callable[[bool, Policy], tuple[bool, Policy]]) -> None:
        check_name(name)
        with self._lock:
            with self._core.lock:
                found = self._core.space.namespaces.get(name)
                before = (found.kept, found.policy) if found is not None else (False, Policy())
            after = change(*before)
            if after == before and not self._ledger.is_unsure(name.encode()):
                return
            with disk_errors(f"note what is to become of {name!r}"):
                if after == (False, Policy()):
                    self._ledger.delete(name.encode())
                else:
                    self._ledger.put(name.encode(), _encoded(*after))
            # Not while a segment is emptied: what goes with it was settled when nothing forbade that, and what was
            # moved must not be unsynced behind the back of who now waits for durability.
            with self._core.moving, self._core.lock:
                namespace = self._core.space.namespace(name)
                namespace.kept, namespace.policy = after
                self._core.space.forget_if_empty(name)


def kept_names(ledger: Ledger) -> list[str]:
    """The namespaces that must be kept."""
    return [name.decode() for name, value in ledger.items(b"") if is_kept(value)]


def _encoded(kept: bool, policy: Policy) -> bytes:
    return json.dumps({"kept": kept, **asdict(policy)}).encode()


def _decoded(value: bytes) -> tuple[bool, Policy]:
    """What another version wrote is taken for "keep it"."""
    try:
        fields = json.loads(value)
        return bool(fields.pop("kept")), Policy(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("flags that can't be read: what they speak of is kept: %r", error)
        return True, Policy()


def is_kept(value: bytes) -> bool:
    """Whether flags of this value forbid to lose the namespace."""
    return _decoded(value)[0]


def protecting_flags(*, kept: bool) -> bytes:
    """The value of flags that keep a namespace; or pin it, so that a user can undo it."""
    return _encoded(kept, Policy(pinned=not kept))


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
        sync_names(core, namespace)


def sync_names(core: Core, namespace: Namespace) -> None:
    """Makes the names of the namespace's files durable. Under its `sync_lock`. Raises OSError."""
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
