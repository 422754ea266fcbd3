"""Stand-ins for the store and the caches behind the services: in memory, and with fills that wait to be told.

The services only translate; what they are given here can be provoked to answer late, wrongly or not at all.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from torchcache_server.store import StoredChunk

from torchcache.errors import NotResident, TorchCacheError
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId, ObjectInfo


def content(size: int, seed: int = 0) -> bytes:
    """`size` bytes in which every place can be told from its neighbours."""
    period = bytes((i * 7 + seed) % 251 for i in range(251))
    return (period * (size // 251 + 1))[:size]


def file_object(key: str, size: int) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3", key, "v1"), size)


class MemoryStore:
    """Chunks in a dict; notes what was kept and synced."""

    server_id = "0" * 32

    def __init__(self) -> None:
        self.chunks: dict[ChunkId, StoredChunk] = {}
        self.kept: list[tuple[str, bool]] = []
        self.synced: list[str] = []
        self.groups: list[tuple[str, int]] = []
        self.error: Exception | None = None

    def add(self, info: ObjectInfo, data: bytes) -> None:
        for index in range(max(1, -(-len(data) // CHUNK_BYTES))):
            part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            self.chunks[ChunkId(info.id, index)] = StoredChunk.of(part, len(data))

    def put_many(self, namespace: str, rows: Sequence[tuple[ChunkId, int, pa.Buffer]]) -> list[StoredChunk]:
        if self.error:
            raise self.error
        self.groups.append((namespace, len(rows)))
        for chunk, object_size, payload in rows:
            self.chunks[chunk] = StoredChunk.of(payload.to_pybytes(), object_size)
        return [self.chunks[row[0]] for row in rows]

    def keep(self, namespace: str, keep: bool) -> None:
        self.kept.append((namespace, keep))

    def sync(self, namespace: str) -> None:
        self.synced.append(namespace)

    def contains(self, chunk: ChunkId) -> bool:
        return chunk in self.chunks

    def lookup(self, chunk: ChunkId) -> StoredChunk | None:
        return self.chunks.get(chunk)

    def content(self, info: ObjectInfo) -> bytes:
        return b"".join(
            self.chunks[ChunkId(info.id, i)].payload.to_pybytes() for i in range(info.chunk_count)
        )


class ScriptedReadThrough:
    """Answers from a `MemoryStore`; what isn't there is a fill that waits until `fill` is called."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.asked: list[ChunkId] = []
        self.fills: dict[ChunkId, Future[StoredChunk]] = {}
        self.refused: dict[ChunkId, Exception] = {}
        self.arguments: Counter[tuple[str, bool, bool]] = Counter()
        self.filling = threading.Condition()
        self.passed_through = 0
        self.filled_chunks = 0
        self.filled_bytes = 0
        self.filling_bytes = 0

    def get(
        self,
        namespace: str,
        object: ObjectInfo,
        index: int,
        *,
        deadline: float,
        resident_only: bool = False,
        suspect: bool = False,
    ) -> StoredChunk | Future[StoredChunk]:
        chunk = ChunkId(object.id, index)
        self.asked.append(chunk)
        self.arguments[namespace, resident_only, suspect] += 1
        if chunk in self.refused:
            raise self.refused[chunk]
        found = self.store.lookup(chunk)
        if found is not None:
            return found
        if resident_only or object.id.is_sample or object.id.is_save:
            raise NotResident("not held", object=str(object.id))
        with self.filling:
            self.filling.notify_all()
            return self.fills.setdefault(chunk, Future())

    def get_many(
        self,
        namespace: str,
        wanted: Sequence[tuple[ObjectInfo, int]],
        *,
        deadline: float,
        resident_only: bool = False,
    ) -> list[StoredChunk | Future[StoredChunk] | TorchCacheError]:
        answers: list[StoredChunk | Future[StoredChunk] | TorchCacheError] = []
        for info, index in wanted:
            try:
                answers.append(
                    self.get(namespace, info, index, deadline=deadline, resident_only=resident_only)
                )
            except TorchCacheError as error:
                answers.append(error)
        return answers

    def fill(self, info: ObjectInfo, index: int, outcome: bytes | TorchCacheError | Any) -> None:
        """Ends a fill, with the object's bytes of which the chunk is cut, or an error."""
        with self.filling:
            chunk = ChunkId(info.id, index)
            self.filling.wait_for(lambda: chunk in self.fills, 60)
        if isinstance(outcome, bytes):
            part = outcome[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            self.fills[chunk].set_result(StoredChunk.of(part, len(outcome)))
        else:
            self.fills[chunk].set_exception(outcome)
