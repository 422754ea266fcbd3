"""The bytes of a save or of a published object on their way out of the store: every chunk verified once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from torchcache.errors import IntegrityError
from torchcache.model import ChunkId, ObjectId, ObjectInfo, chunk_digest
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore

_LOOKED_UP_AT_ONCE: Final = 1024


def write_out(
    store: Store,
    object: ObjectInfo,
    under_store: UnderStore,
    key: str,
    *,
    replaces: str | None,
    deadline: float,
    check: Callable[[], None],
) -> ObjectInfo:
    """Writes an object of the store to `key` of the under-store; `replaces` as in UnderStore.write.

    `check` is called before every chunk and raises to stop. Raises what ended the bytes, whatever the under-store made
    of it: IntegrityError if a chunk is bad or gone.
    """
    parts = _Parts(store, object, check)
    try:
        return under_store.write(key, parts, object.size, replaces=replaces, deadline=deadline)
    except Exception:
        if parts.failure is not None:
            raise parts.failure from None
        raise


class _Parts:
    """The chunks of one object, in order. `failure` keeps what ended them, whatever the consumer makes of it."""

    def __init__(self, store: Store, object: ObjectInfo, check: Callable[[], None]) -> None:
        self._chunks = _verified_chunks(store, object, check)
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[memoryview]:
        return self

    def __next__(self) -> memoryview:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise


def _verified_chunks(store: Store, object: ObjectInfo, check: Callable[[], None]) -> Iterator[memoryview]:
    """Raises IntegrityError if a chunk is bad or gone."""
    if not object.size:
        return
    for index in range(object.chunk_count):
        check()
        chunk = ChunkId(object.id, index)
        stored = store.read(chunk)
        if stored is None or len(stored.payload) != chunk.length(object.size):
            raise IntegrityError(
                f"chunk {index} of {object.id} is gone from the store", object=str(object.id)
            )
        payload = memoryview(stored.payload)
        if chunk_digest(payload) != stored.digest:
            raise IntegrityError(
                f"chunk {index} of {object.id} is damaged in the store, and it is the only copy: save again",
                object=str(object.id),
            )
        yield payload


def require_intact(store: Store, object: ObjectInfo, check: Callable[[], None]) -> None:
    """Reads all of an object; `check` as in `write_out`. Raises IntegrityError if a chunk of it is bad or gone."""
    for _ in _verified_chunks(store, object, check):
        pass


def missing_from(store: Store, object: ObjectInfo) -> str | None:
    """What keeps `object` from being whole in the store, in words; None if nothing does. Payloads aren't read."""
    if not object.size:
        return None
    for first in range(0, object.chunk_count, _LOOKED_UP_AT_ONCE):
        indices = range(first, min(first + _LOOKED_UP_AT_ONCE, object.chunk_count))
        found = store.lookup_many([ChunkId(object.id, index) for index in indices])
        for index, stored in zip(indices, found, strict=True):
            if stored is None:
                return f"chunk {index} of {object.chunk_count} isn't there"
            if stored.object_size != object.size:
                return f"it was written with {stored.object_size} bytes in all, not {object.size}"
    return None


def read_whole(store: Store, id: ObjectId) -> bytes | None:
    """All bytes of an object that was put, whose size its first chunk tells; None if that isn't there.

    Raises IntegrityError if another chunk is missing, or one is bad.
    """
    head = store.lookup(ChunkId(id, 0))
    if head is None:
        return None
    return b"".join(_verified_chunks(store, ObjectInfo(id, head.object_size), lambda: None))
