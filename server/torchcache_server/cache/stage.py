"""Filling ahead of use, and saying how much is there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from torchcache.errors import DeadlineExceeded, OutOfSpace, TorchCacheError
from torchcache.model import ChunkId, ObjectInfo
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import Store, StoredChunk

_AHEAD = 64
_AHEAD_BYTES = 128 << 20
"""What a stage has in flight: enough to keep the fill threads busy, little enough not to bar other readers' way."""


def stage(
    read_through: ReadThrough, namespace: str, objects: Sequence[ObjectInfo], *, deadline: float
) -> list[TorchCacheError | None]:
    """Makes `objects` resident; tries each of them, and says in their order why one isn't held whole, if it isn't."""
    errors: list[TorchCacheError | None] = [None] * len(objects)
    pending: deque[tuple[int, ChunkId, Future[StoredChunk]]] = deque()
    pending_bytes = 0

    def finish() -> None:
        nonlocal pending_bytes
        number, chunk, future = pending.popleft()
        pending_bytes -= chunk.length(objects[number].size)
        try:
            _land(read_through.store, chunk, future, deadline)
        except TorchCacheError as error:
            errors[number] = errors[number] or error

    for number, chunk in _chunks(objects):
        if errors[number] is not None:
            continue
        try:
            answer = read_through.get(namespace, objects[number], chunk.index, deadline=deadline)
        except TorchCacheError as error:
            errors[number] = error
            continue
        if isinstance(answer, Future):
            pending.append((number, chunk, answer))
            pending_bytes += chunk.length(objects[number].size)
        while len(pending) >= _AHEAD or pending_bytes > _AHEAD_BYTES:
            finish()
    while pending:
        finish()
    return errors


def resident_bytes(store: Store, objects: Sequence[ObjectInfo]) -> list[int]:
    """Bytes of each object that are in the store, in their order. An object of unknown size counts as 0."""
    return [
        sum(chunk.length(object.size) for chunk in _chunks_of(object) if store.contains(chunk))
        for object in objects
    ]


def _land(store: Store, chunk: ChunkId, future: Future[StoredChunk], deadline: float) -> None:
    """Waits for a fill. Raises what it met, DeadlineExceeded, or OutOfSpace if the store didn't keep the chunk."""
    try:
        future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise DeadlineExceeded(
            f"{chunk.object} was not staged by the deadline", object=str(chunk.object)
        ) from None
    if not store.contains(chunk):
        raise OutOfSpace(
            f"the store has no room to keep {chunk.object}; raise its capacity, or stage less at a time",
            object=str(chunk.object),
        )


def _chunks(objects: Sequence[ObjectInfo]) -> Iterator[tuple[int, ChunkId]]:
    for number, object in enumerate(objects):
        for chunk in _chunks_of(object):
            yield number, chunk


def _chunks_of(object: ObjectInfo) -> Iterator[ChunkId]:
    return (ChunkId(object.id, index) for index in range(object.chunk_count))
