"""Objects written through the pool: from the store to the under-store, while the writer asks whether it is done.

A published object isn't a save: the under-store has it or not, nothing of it survives a restart of the server, and
the writer that asked is there to be told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torchcache.errors import ConfigurationError, NotResident, TorchCacheError, TransientError
from torchcache.model import SAVE_PREFIX, ObjectId, ObjectInfo
from torchcache.save_names import PUT_PREFIX, put_namespace
from torchcache_server.cache.shard_source import missing_from, write_out
from torchcache_server.cache.upload_attempt import write_deadline
from torchcache_server.cache.work_queue import WorkQueue, retry_delay_s
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore, object_uri

_REMEMBERED_S: Final = 600.0
"""So long a finished write answers a repeated call."""
_UNASKED_S: Final = 120.0
"""A write that keeps failing and that nobody has asked about for so long is given up."""


@dataclass(slots=True)
class _Write:
    under_store: UnderStore
    object: ObjectInfo  # as the pool holds it
    create_only: bool
    asked_s: float
    done_s: float | None = None
    published: ObjectInfo | None = None
    error: TorchCacheError | None = None

    @property
    def uri(self) -> str:
        return object_uri(self.under_store.uri, self.object.id.key)

    @property
    def namespace(self) -> str:
        return put_namespace(self.object.id)


class Publisher:
    """Uploads objects that were put into the pool under `put:` namespaces. Thread-safe."""

    def __init__(
        self, store: Store, *, threads: int, retry_s: float, check_running: Callable[[], None]
    ) -> None:
        self._store = store
        self._retry_s = retry_s
        self._check_running = check_running
        self._writes: dict[ObjectId, _Write] = {}
        self._failures: dict[ObjectId, int] = {}
        self._changed = threading.Condition()
        for usage in store.namespaces():
            if usage.name.startswith(PUT_PREFIX):
                store.drop(usage.name)
        self._queue: WorkQueue[ObjectId] = WorkQueue(self._work, threads=threads, name="publish")

    def publish(
        self,
        under_store: UnderStore,
        key: str,
        write_id: str,
        size: int,
        *,
        create_only: bool,
        wait_s: float,
    ) -> ObjectInfo | None:
        """The published object, or None if it isn't done within `wait_s`: call again.

        Raises NotResident if its bytes aren't all in the store, AlreadyExists if it was to be created and is there.
        """
        if not key or size < 0:
            raise ConfigurationError(f"an object of {size} bytes can't be published as {key!r}")
        id = ObjectId(under_store.name, key, f"{SAVE_PREFIX}{write_id}")
        deadline = time.monotonic() + wait_s
        with self._changed:
            if id not in self._writes:
                self._begin(_Write(under_store, ObjectInfo(id, size), create_only, 0.0))
            write = self._writes[id]
            write.asked_s = time.monotonic()
            self._changed.wait_for(lambda: write.done_s is not None, max(0.0, deadline - time.monotonic()))
            if write.error is not None:
                raise write.error
            return write.published

    @property
    def pending_bytes(self) -> int:
        with self._changed:
            return sum(write.object.size for write in self._writes.values() if write.done_s is None)

    @property
    def namespaces(self) -> set[str]:
        """Namespaces that are being uploaded."""
        with self._changed:
            return {write.namespace for write in self._writes.values() if write.done_s is None}

    def pending_uris(self) -> list[str]:
        with self._changed:
            return [write.uri for write in self._writes.values() if write.done_s is None]

    def wait_until_idle(self, timeout_s: float) -> None:
        self._queue.hurry()
        with self._changed:
            self._changed.wait_for(
                lambda: all(write.done_s is not None for write in self._writes.values()), timeout_s
            )

    def tidy(self) -> None:
        """Forgets writes that ended long ago."""
        now = time.monotonic()
        with self._changed:
            self._writes = {
                id: write
                for id, write in self._writes.items()
                if write.done_s is None or now < max(write.done_s, write.asked_s) + _REMEMBERED_S
            }

    def close(self, *, timeout_s: float) -> None:
        self._queue.close(timeout_s=timeout_s)

    def _begin(self, write: _Write) -> None:
        lack = missing_from(self._store, write.object)
        if lack is not None:
            raise NotResident(
                f"{write.uri} can't be published: {lack}. If the server was restarted meanwhile: write it again",
                object=write.uri,
            )
        self._writes[write.object.id] = write
        self._queue.add(write.object.id)

    def _work(self, id: ObjectId) -> float | None:
        with self._changed:
            write = self._writes.get(id)
        if write is None or write.done_s is not None:
            return None
        try:
            published = self._upload(write)
        except TransientError as error:
            if time.monotonic() < write.asked_s + _UNASKED_S:
                self._failures[id] = self._failures.get(id, 0) + 1
                return retry_delay_s(self._failures[id], first_s=self._retry_s, longest_s=10.0)
            self._end(write, None, error)
        except TorchCacheError as error:
            self._end(write, None, error)
        else:
            self._end(write, published, None)
        return None

    def _upload(self, write: _Write) -> ObjectInfo:
        return write_out(
            self._store,
            write.object,
            write.under_store,
            write.object.id.key,
            replaces="" if write.create_only else None,
            deadline=write_deadline(write.object.size),
            check=self._check_running,
        )

    def _end(self, write: _Write, published: ObjectInfo | None, error: TorchCacheError | None) -> None:
        self._store.drop(write.namespace)
        self._failures.pop(write.object.id, None)
        with self._changed:
            write.published, write.error, write.done_s = published, error, time.monotonic()
            self._changed.notify_all()
