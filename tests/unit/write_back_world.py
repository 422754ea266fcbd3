"""A world for the save protocol: stores and an under-store in memory, through which every call can be counted, failed,
held up or made the last one of its server. What a real disk or S3 can't be made to do at a chosen instant.

Versions are those of S3, digests of the content, so the same bytes written again have the same version.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.store import NamespaceUsage, Policy, StoredChunk
from torchcache_server.understore.base import Counters, Listing

from torchcache.errors import AlreadyExists, ObjectChanged, ObjectNotFound
from torchcache.model import (
    ByteRange,
    ChunkId,
    ObjectId,
    ObjectInfo,
    chunk_digest,
)

KEY = SaveKey("s3", "run/step-1")
LEASE_S = 0.02


class Killed(BaseException):
    """What a killed server's calls end in: no `except Exception` catches it."""


@dataclass
class Gate:
    """Every call of one server to its store or the under-store passes here, twice: before it, and behind it."""

    calls: int = 0
    trap_at: int | None = None
    trap: Callable[[], None] = lambda: None
    dead: bool = False
    log: list[str] = field(default_factory=list)

    def passing(self, what: str) -> None:
        if self.dead:
            raise Killed(what)
        self.log.append(what)
        self.calls += 1
        if self.calls == self.trap_at:
            self.trap()

    def kill(self) -> None:
        self.dead = True
        raise Killed


class MemoryStore:
    """The store's contract, in memory. `power_cut` loses what was not synced."""

    def __init__(self, server_id: str) -> None:
        self.server_id = server_id
        self.gate = Gate()
        self.chunks: dict[str, dict[ChunkId, StoredChunk]] = {}
        self.synced: dict[str, set[ChunkId]] = {}
        self.kept: set[str] = set()
        self.record: dict[bytes, bytes] = {}
        self.set_aside: list[str] = []
        self.policies: dict[str, Policy] = {}

    def power_cut(self) -> None:
        for namespace, chunks in self.chunks.items():
            synced = self.synced.get(namespace, set())
            self.chunks[namespace] = {chunk: stored for chunk, stored in chunks.items() if chunk in synced}

    def put(self, namespace: str, chunk: ChunkId, object_size: int, payload: bytes) -> None:
        stored = StoredChunk(object_size, pa.py_buffer(payload), chunk_digest(payload), b"")
        self.chunks.setdefault(namespace, {})[chunk] = stored

    def lookup(self, chunk: ChunkId) -> StoredChunk | None:
        self.gate.passing(f"lookup {chunk.object.key} {chunk.index}")
        return next((chunks[chunk] for chunks in self.chunks.values() if chunk in chunks), None)

    read = lookup

    def lookup_many(self, chunks: Sequence[ChunkId]) -> list[StoredChunk | None]:
        return [self.lookup(chunk) for chunk in chunks]

    def sync(self, namespace: str) -> None:
        self.gate.passing("sync")
        self.synced[namespace] = set(self.chunks.get(namespace, {}))
        self.gate.passing("synced")

    def keep(self, namespace: str, keep: bool) -> None:
        self.gate.passing(f"keep {keep}")
        (self.kept.add if keep else self.kept.discard)(namespace)
        self.gate.passing(f"kept {keep}")

    def policy(self, namespace: str) -> Policy:
        return self.policies.get(namespace, Policy())

    def drop(self, namespace: str) -> int:
        self.gate.passing("drop")
        self.chunks.pop(namespace, None)
        self.kept.discard(namespace)
        self.policies.pop(namespace, None)
        self.gate.passing("dropped")
        return 0

    def namespaces(self) -> list[NamespaceUsage]:
        return [
            NamespaceUsage(name, sum(len(c.payload) for c in chunks.values()), len(chunks), name in self.kept)
            for name, chunks in sorted(self.chunks.items())
        ]

    def get_record(self, key: bytes) -> bytes | None:
        return self.record.get(key)

    def put_record(self, key: bytes, value: bytes) -> None:
        what = key.partition(b"/")[0].decode()
        self.gate.passing(f"put record {what}")
        self.record[key] = value
        self.gate.passing(f"have put record {what}")

    def delete_record(self, key: bytes) -> None:
        what = key.partition(b"/")[0].decode()
        self.gate.passing(f"delete record {what}")
        self.record.pop(key, None)
        self.gate.passing(f"have deleted record {what}")

    def records(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter([(key, value) for key, value in sorted(self.record.items()) if key.startswith(prefix)])


class Bucket:
    """What lies in the under-store, seen by all servers; `watch` is called after every change."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.watch: Callable[[], None] = lambda: None

    def version(self, key: str) -> str:
        data = self.objects.get(key)
        return "" if data is None else hashlib.md5(data, usedforsecurity=False).hexdigest()


class MemoryUnderStore:
    """One server's way to the bucket. `fail` is asked before every call and may raise."""

    name = "s3"
    uri = "s3://bucket"

    def __init__(self, bucket: Bucket, gate: Gate) -> None:
        self.bucket = bucket
        self.gate = gate
        self.counters = Counters()
        self.fail: Callable[[str, str], None] = lambda call, key: None

    def list(self, prefix: str, *, start_after: str, limit: int, deadline: float) -> Listing:
        self._enter("list", prefix)
        keys = sorted(key for key in self.bucket.objects if key.startswith(prefix) and key > start_after)
        return Listing([self._info(key) for key in keys[:limit]], len(keys) > limit)

    def stat(self, key: str, *, deadline: float) -> ObjectInfo:
        self._enter("stat", key)
        if key not in self.bucket.objects:
            raise ObjectNotFound("nothing there", object=key)
        return self._info(key)

    def read(self, object: ObjectInfo, range: ByteRange, *, deadline: float) -> bytearray:
        self._enter("read", object.id.key)
        if object.id.key not in self.bucket.objects:
            raise ObjectNotFound("nothing there", object=object.id.key)
        if self.bucket.version(object.id.key) != object.id.version:
            raise ObjectChanged("another version", object=object.id.key)
        return bytearray(self.bucket.objects[object.id.key][range.start : range.end])

    def write(
        self, key: str, parts: Iterator[memoryview], size: int, *, replaces: str | None, deadline: float
    ) -> ObjectInfo:
        data = b"".join(parts)
        assert len(data) == size
        self._enter("write", key)
        if replaces is not None and replaces != self.bucket.version(key):
            raise AlreadyExists("another version is there", object=key)
        self.bucket.objects[key] = data
        self.bucket.watch()
        info = self._info(key)
        self.gate.passing(f"have written {key}")
        return info

    def copy(
        self, source: ObjectInfo, key: str, *, replaces: str | None, deadline: float
    ) -> ObjectInfo | None:
        self._enter("copy", key)
        if self.bucket.version(source.id.key) != source.id.version:
            return None
        data = self.bucket.objects[source.id.key]
        return self.write(key, iter([memoryview(data)]), len(data), replaces=replaces, deadline=deadline)

    def delete(self, key: str, *, deadline: float) -> None:
        self._enter("delete", key)
        self.bucket.objects.pop(key, None)
        self.bucket.watch()
        self.gate.passing(f"have deleted {key}")

    def close(self) -> None:
        pass

    def _enter(self, call: str, key: str) -> None:
        self.gate.passing(f"{call} {key}")
        self.fail(call, key)

    def _info(self, key: str) -> ObjectInfo:
        return ObjectInfo(ObjectId("s3", key, self.bucket.version(key)), len(self.bucket.objects[key]))


def parts_of(save_id: str) -> dict[str, bytes]:
    """A save's shards: each says whose it is."""
    return {"__0_0.distcp": f"{save_id} first".encode() * 99, "__1_0.distcp": f"{save_id} second".encode()}


def metadata_of(save_id: str) -> bytes:
    return f"metadata of {save_id}".encode()


def manifest_of(save_id: str) -> bytes:
    files = [[name, len(data)] for name, data in parts_of(save_id).items()]
    return json.dumps({"body": {"save_id": save_id, "files": files, "created_unix_s": 12.5}}).encode()


class Server:
    """One server: its store survives `restart`, its memory doesn't."""

    def __init__(self, bucket: Bucket, server_id: str, *, threads: int = 0, lease_s: float = LEASE_S) -> None:
        self.bucket = bucket
        self._lease_s = lease_s
        self.store = MemoryStore(server_id)
        self._threads = threads
        self._open()

    def _open(self) -> None:
        self.store.gate = self.gate = Gate()
        self.under_store = MemoryUnderStore(self.bucket, self.gate)
        store: Any = self.store
        self.clock_ahead_s = 0.0
        self.write_back = WriteBack(
            store,
            {"s3": self.under_store},
            upload_threads=self._threads,
            lease_s=self._lease_s,
            retry_s=0.01,
            clock=lambda: time.monotonic() + self.clock_ahead_s,
        )

    def restart(self, *, power_cut: bool = False) -> None:
        """After a kill, or instead of one."""
        self.gate.dead = True
        self.write_back.close()
        if power_cut:
            self.store.power_cut()
        self._open()

    # ---- a writer ----

    def reserve(
        self, save_id: str, key: SaveKey = KEY, *, overwrite: bool = False, wait_s: float = 60.0
    ) -> None:
        self.write_back.reserve(
            key, save_id, writer=f"writer of {save_id}", overwrite=overwrite, deadline=soon(wait_s)
        )

    def put(self, save_id: str, key: SaveKey = KEY) -> None:
        namespace = key.namespace(save_id)
        for name, data in parts_of(save_id).items():
            object = ObjectId(key.store, f"{key.path}/{name}", f"save:{save_id}")
            self.store.put(namespace, ChunkId(object, 0), len(data), data)
        self.store.kept.add(namespace)

    def commit(
        self,
        save_id: str,
        key: SaveKey = KEY,
        *,
        files: Sequence[tuple[str, int]] | None = None,
        borrowed: Sequence[str] = (),
    ) -> str:
        files = [(name, len(data)) for name, data in parts_of(save_id).items()] if files is None else files
        status = self.write_back.commit(
            key,
            save_id,
            files,
            metadata_of(save_id),
            manifest_of(save_id),
            borrowed=borrowed,
            deadline=soon(),
        )
        return status.state

    def save(self, save_id: str, key: SaveKey = KEY, *, overwrite: bool = False) -> None:
        """Up to the commit."""
        self.reserve(save_id, key, overwrite=overwrite)
        self.put(save_id, key)
        self.commit(save_id, key)

    def hold_copy(
        self,
        save_id: str,
        key: SaveKey = KEY,
        *,
        owner: str,
        files: Sequence[tuple[str, int]] | None = None,
        borrowed: Sequence[str] = (),
    ) -> None:
        """Of what was put here, of a save that `owner` is about to commit."""
        self.write_back.prepare_copy(
            key,
            save_id,
            [(name, len(data)) for name, data in parts_of(save_id).items()] if files is None else files,
            metadata_of(save_id),
            manifest_of(save_id),
            replaceable=(),
            overwrite=False,
            writer=f"writer of {save_id}",
            owner=owner,
            borrowed=borrowed,
            deadline=soon(),
        )

    def upload(self, key: SaveKey = KEY) -> None:
        self.write_back.upload(key)

    def upload_half(self) -> None:
        """Uploads the shards, and is killed before the manifest."""

        def fail(call: str, key: str) -> None:
            if call == "write" and key == KEY.manifest_key:
                raise Killed

        self.under_store.fail = fail
        with pytest.raises(Killed):
            self.upload()
        self.under_store.fail = lambda call, key: None

    def state(self, key: SaveKey = KEY) -> str:
        """State and save id of what a reader is given."""
        status = self.write_back.get(key, deadline=soon())
        return f"{status.state} {status.save_id}"

    @property
    def namespaces(self) -> list[str]:
        return [usage.name for usage in self.store.namespaces()]


def soon(wait_s: float = 60.0) -> float:
    return time.monotonic() + wait_s


def published(bucket: Bucket, key: SaveKey = KEY) -> str | None:
    """The id of the save that a reader of our manifest finds in the bucket. Fails if the shards aren't all its own."""
    manifest = bucket.objects.get(key.manifest_key)
    if not manifest:
        return None
    save_id = str(json.loads(manifest)["body"]["save_id"])
    assert_shards(bucket, key, save_id, "the manifest")
    return save_id


def stock_published(bucket: Bucket, key: SaveKey = KEY) -> str | None:
    """The same for a reader of stock metadata."""
    metadata = bucket.objects.get(key.metadata_key)
    if not metadata:
        return None
    save_id = metadata.decode().removeprefix("metadata of ")
    assert_shards(bucket, key, save_id, "the metadata")
    return save_id


def assert_shards(bucket: Bucket, key: SaveKey, save_id: str, what: str) -> None:
    for name, data in parts_of(save_id).items():
        assert bucket.objects.get(f"{key.path}/{name}") == data, f"{what} is of {save_id}, {name} isn't"


def always_whole(bucket: Bucket, key: SaveKey = KEY) -> None:
    """From here on, after every single change: whoever reads finds one save, whole, or none (I3)."""

    def watch() -> None:
        published(bucket, key)
        stock_published(bucket, key)

    bucket.watch = watch


def assert_settled(bucket: Bucket, save_id: str | None, key: SaveKey = KEY) -> None:
    """The bucket holds exactly this save, to every reader, and no claim."""
    assert published(bucket, key) == save_id
    assert stock_published(bucket, key) == save_id
    assert key.claim_key not in bucket.objects
