"""A pool in memory, for tests of what stands on top of the pool and needs no server: the CLI's and fsspec's logic."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    NotCommitted,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement
from torchcache.pool import (
    NamespaceStatus,
    PoolStatistics,
    Residency,
    SaveInfo,
    ServerStatus,
    UnderStoreStatus,
)
from torchcache.pool.members import UnderStoreName
from torchcache.pool.objects import BY_NAME, split_uri
from torchcache.pool.orders import AheadChunk, OrderKey, StagedAhead, State, ToldOrder


@functools.lru_cache(maxsize=8)
def _version(data: bytes) -> str:
    """Of an object that holds `data`: a shard is asked for at every read of it."""
    return hashlib.md5(data).hexdigest()


class MemoryPool:
    """What the CLI and fsspec use of `Pool`, over dicts. Buckets are the first segments of keys."""

    address = "memory"
    is_open = True

    def __init__(self, roots: dict[str, str] | None = None) -> None:
        self.roots = roots or {"s3": "s3://", "file": "file:///"}
        self.objects: dict[tuple[str, str], bytes] = {}
        self.saved: dict[tuple[str, str, str], SaveInfo] = {}
        self.save_files: dict[ObjectId, bytes] = {}
        self.resident: set[ObjectId] = set()
        self.staged_under: set[str] = set()  # namespaces
        self.holds: dict[str, str] = {}  # reader -> save id
        self.errors: dict[str, TorchCacheError] = {}  # by URI: what reading it raises
        self.held_errors: dict[str, TorchCacheError] = {}  # by server's id
        self.reads: list[list[Extent]] = []
        self.namespaces: dict[str, NamespaceStatus] = {}
        self.addresses: dict[str, str] | TorchCacheError = {"server": "127.0.0.1:7440"}  # by id
        self.lanes = {"127.0.0.1:7440": "flight"}  # by address
        self.told: dict[int, ToldOrder] = {}
        self.ahead: list[ObjectId] = []  # in the order in which they came
        self.ahead_states: dict[str, State] = {}
        self.order_error: TorchCacheError | None = None
        self.disk: dict[str, Any] = {}  # fields of its status that are to be others

    # ---- names ----

    def uri(self, object: ObjectId) -> str:
        root = self.roots.get(object.store)
        if root is None:
            raise ConfigurationError(f"no under-store {object.store!r}; there are {sorted(self.roots)}")
        return root + object.key if root.endswith("/") else f"{root}/{object.key}"

    def resolve(self, uri: str) -> tuple[str, str]:
        if uri.startswith(BY_NAME):
            return split_uri(uri, [UnderStoreName(name, root) for name, root in self.roots.items()])
        uri = f"file://{uri}" if uri.startswith("/") else uri
        for store, root in sorted(self.roots.items(), key=lambda item: -len(item[1])):
            prefix = root if root.endswith("/") else root + "/"
            if uri.startswith(prefix):
                return store, uri[len(prefix) :]
        raise ConfigurationError(f"no under-store for {uri}")

    # ---- objects ----

    def put(self, uri: str, data: bytes) -> ObjectInfo:
        store, key = self.resolve(uri)
        self.objects[store, key] = data
        return self.stat(uri)

    def stat(self, uri: str) -> ObjectInfo:
        store, key = self.resolve(uri)
        if self.roots[store] == "s3://" and "/" not in key:
            raise ConfigurationError(f"{uri} names a bucket, not an object")
        if (store, key) not in self.objects:
            raise ObjectNotFound(f"there is no {uri}", object=uri)
        data = self.objects[store, key]
        return ObjectInfo(ObjectId(store, key, _version(data)), len(data))

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        store, key = self.resolve(uri if uri.endswith("/") else uri + "/")
        bucket = key.partition("/")[0]
        if self.roots[store] == "s3://" and not any(
            s == store and k.startswith(bucket + "/") for s, k in self.objects
        ):
            raise ObjectNotFound(f"there is no bucket {bucket}", object=uri)
        for found_store, found in sorted(self.objects, key=lambda item: item[1].encode()):
            if found_store == store and found.startswith(key):
                yield self.stat(self.uri(ObjectId(store, found, "")))

    def list_in_any_order(self, uri: str) -> Iterator[ObjectInfo]:
        return self.list(uri)

    def delete(self, uri: str) -> None:
        self.objects.pop(self.resolve(uri), None)

    def publish(self, uri: str, data: Sequence[memoryview], *, create_only: bool = False) -> ObjectInfo:
        if create_only and self.resolve(uri) in self.objects:
            raise AlreadyExists(f"{uri} exists", object=uri)
        return self.put(uri, b"".join(data))

    # ---- bytes ----

    def read(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        timeout_s: float = 60.0,
    ) -> list[memoryview]:
        outcomes = self.read_each(extents, namespace=namespace, into=into, timeout_s=timeout_s)
        for outcome in outcomes:
            if isinstance(outcome, TorchCacheError):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, memoryview)]

    def read_each(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        resident_only: bool = False,
        as_bytes: bool = False,
        lend: bool = False,
        timeout_s: float = 60.0,
    ) -> list[memoryview | TorchCacheError]:
        self.reads.append(list(extents))
        outcomes: list[memoryview | TorchCacheError] = []
        for i, extent in enumerate(extents):
            try:
                data = memoryview(self._content(extent.object.id))[extent.offset : extent.end]
            except TorchCacheError as error:
                outcomes.append(error.with_traceback(None))  # else it would keep `into` alive
                continue
            if into is not None and not lend:
                into[i][: len(data)] = data
                data = into[i][: len(data)]
            outcomes.append(data)
        return outcomes

    def read_held(
        self, server: str, extents: Sequence[Extent], *, namespace: str, timeout_s: float = 60.0
    ) -> list[memoryview | TorchCacheError]:
        """Of the files of saves; all servers hold the same, but for those in `held_errors`."""
        if server in self.held_errors:
            raise self.held_errors[server]
        held = [extent for extent in extents if extent.object.id in self.save_files]
        if held:
            self.reads.append(held)
        return [
            memoryview(self.save_files[e.object.id])[e.offset : e.end]
            if e.object.id in self.save_files
            else NotResident(f"{e.object.id} isn't here")
            for e in extents
        ]

    def _content(self, object: ObjectId) -> bytes:
        if object in self.save_files:
            return self.save_files[object]
        uri = self.uri(object)
        if uri in self.errors:
            raise self.errors[uri]
        if self.stat(uri).id != object:
            raise ObjectChanged(f"{uri} changed", object=uri)
        return self.objects[object.store, object.key]

    def stage(
        self,
        objects: Sequence[ObjectInfo],
        *,
        namespace: str,
        on_progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_missing: Callable[[ObjectInfo, TorchCacheError], None] | None = None,
    ) -> None:
        self.staged_under.add(namespace)
        failed: list[TorchCacheError] = []
        for object in objects:
            uri = self.uri(object.id)
            if uri in self.errors:
                failed.append(self.errors[uri])
                if on_missing is not None:
                    on_missing(object, failed.pop())
                continue
            self.resident.add(object.id)
            if on_progress:
                on_progress(1, object.size)
        if failed:
            raise failed[0]

    def resident_bytes(self, objects: Sequence[ObjectInfo]) -> Sequence[int]:
        return [o.size if o.id in self.resident else 0 for o in objects]

    def residency(self, objects: Sequence[ObjectInfo]) -> Residency:
        held = [o for o in objects if o.id in self.resident]
        return Residency(
            objects=len(objects),
            resident_objects=len(held),
            bytes=sum(o.size for o in objects),
            resident_bytes=sum(o.size for o in held),
        )

    # ---- policies ----

    def hold(self, name: str, size: int, *, dirty: bool = False) -> None:
        self.namespaces[name] = NamespaceStatus(name=name, bytes=size, chunks=1, pinned=False, dirty=dirty)

    def set_policy(
        self,
        namespace: str,
        *,
        pinned: bool | None = None,
        priority: int | None = None,
        quota_bytes: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, NamespaceStatus]:
        nothing = NamespaceStatus(name=namespace, bytes=0, chunks=0, pinned=False, dirty=False)
        before = self.namespaces.get(namespace, nothing)
        after = self.namespaces[namespace] = dataclasses.replace(
            before,
            pinned=before.pinned if pinned is None else pinned,
            priority=before.priority if priority is None else priority,
            quota_bytes=before.quota_bytes if quota_bytes is None else quota_bytes or None,
            ttl_s=before.ttl_s if ttl_s is None else ttl_s or None,
        )
        return {"127.0.0.1:7440": after}

    def evict(self, namespace: str) -> int:
        held = self.namespaces.get(namespace)
        if held is None:
            return 0
        if held.pinned or held.dirty:
            raise ConfigurationError(f"{namespace} is {'pinned' if held.pinned else 'not yet durable'}")
        self.namespaces[namespace] = dataclasses.replace(held, bytes=0, chunks=0)
        return held.bytes

    # ---- saves ----

    def hold_save(self, save: SaveInfo, reader_id: str, reader: str) -> float:
        self.holds[reader_id] = save.save_id
        return 60.0

    def release_save(self, save: SaveInfo, reader_id: str) -> None:
        self.holds.pop(reader_id, None)

    def get_save(self, store: str, path: str, part: str = "", *, manifest: bool = True) -> SaveInfo:
        try:
            return self.saved[store, path, part]
        except KeyError:
            raise NotCommitted(f"no committed checkpoint at {path}", object=path) from None

    def list_saves(self, uri: str) -> list[SaveInfo]:
        store, prefix = self.resolve(uri)
        return [s for s in self.saved.values() if s.store == store and f"{s.path}/".startswith(prefix)]

    # ---- the pool ----

    def status(self) -> list[ServerStatus]:
        namespaces = tuple(self.namespaces.values())
        return [dataclasses.replace(server_status(self.roots), namespaces=namespaces, **self.disk)]

    def tell_order(self, server: str, told: ToldOrder) -> None:
        if self.order_error is not None:
            raise self.order_error
        self.told[told.epoch] = told

    def stage_ahead(
        self,
        server: str,
        key: OrderKey,
        epoch: int,
        chunks: Sequence[AheadChunk],
        *,
        running: int | None = None,
    ) -> StagedAhead | None:
        """All is there once it is asked for, but for what `ahead_states` says of a key."""
        if epoch not in self.told:
            return None
        states = [self.ahead_states.get(chunk.object.id.key, "here") for chunk in chunks]
        new = [c.object.id for c, s in zip(chunks, states, strict=True) if s == "here"]
        self.ahead += [id_ for id_ in new if id_ not in self.resident]
        self.resident.update(new)
        errors = {at: ObjectNotFound("it is gone") for at, state in enumerate(states) if state == "failed"}
        return StagedAhead(states=states, errors=errors, epoch=epoch, position=-1, ahead_bytes=0)

    def forget_order(self, server: str, key: OrderKey) -> None:
        self.told.clear()

    def servers(self, *, opens: bool = True) -> dict[str, str]:
        if isinstance(self.addresses, TorchCacheError):
            raise self.addresses
        return self.addresses

    def placement(self, servers: Iterable[str], *, opens: bool = True) -> Placement:
        return Placement(servers)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(lanes=self.lanes, lane_reasons={"127.0.0.1:7440": "it is far away"})

    def unreachable(self) -> list[str]:
        return []

    def answers_s(self) -> dict[str, float | None]:
        return {"127.0.0.1:7440": 0.0012}

    def close(self) -> None:
        pass


def server_status(roots: dict[str, str]) -> ServerStatus:
    """A server with numbers that can be told apart."""
    under_stores = tuple(
        UnderStoreStatus(
            name=name,
            uri=uri,
            read_requests=7,
            read_bytes=7_000_000,
            write_requests=3,
            write_bytes=3_000,
            meta_requests=2,
            retries=1,
        )
        for name, uri in roots.items()
    )
    return ServerStatus(
        address="127.0.0.1:7440",
        server_id="f00",
        instance="1",
        version="0.1.0",
        store_path="/nvme/store",
        uptime_s=3661.0,
        capacity_bytes=100_000_000_000,
        used_bytes=25_000_000_000,
        chunks=6000,
        segments=400,
        hits=900,
        misses=100,
        corrupt=0,
        evicted_chunks=0,
        passed_through=0,
        filled_chunks=0,
        filled_bytes=0,
        served_bytes=5_000_000_000,
        local_chunks=3,
        local_bytes=6_000_000_000,
        read_calls=40,
        write_calls=4,
        upload_pending_bytes=1_500_000,
        spare_bytes=11_000_000,
        dead_bytes=12_000_000,
        overhead_bytes=13_000_000,
        free_bytes=14_000_000_000,
        recycled_segments=15,
        compacted_bytes=16,
        expired_chunks=17,
        scrubbed_bytes=18_000_000_000,
        scrub_rounds=19,
        damaged_kept=0,
        disk_errors=0,
        out_of_service="",
        under_stores=under_stores,
        namespaces=(),
    )
