"""A server whose every step is written down: the real store and the real saves, over a recorded disk."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from torchcache_server.cache import commits, uploader, write_back
from torchcache_server.cache.claims import DEAD_AFTER_LEASES, Claim, ClaimState
from torchcache_server.cache.saves import SaveKey, manifest_digest
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.store import DiskCalls, HandedOut, Policy, Store, handing_out, room, space

from tests.crash.promises import (
    Flags,
    FlagsChange,
    InBucket,
    MayGo,
    Opened,
    Promise,
    Promises,
    RecordChanges,
    SaveChanges,
    Stored,
    Synced,
)
from tests.crash.recorder import Item, Recorder
from tests.crash.volatile import Disk
from tests.unit.handed_out_parts import opened, write_records
from tests.unit.write_back_world import Bucket, Gate, MemoryUnderStore, manifest_of, metadata_of, soon
from torchcache.errors import DeadlineExceeded, NotCommitted, OutOfSpace
from torchcache.lanes import record_writing
from torchcache.model import BLOCK_BYTES, ChunkId, ObjectId
from torchcache.records import chunk_key

STORE: Final = "pool/store"
"""The store's place below the root: it makes both folders."""
KIB: Final = 1024
SEGMENT_BYTES: Final = 96 * KIB
CAPACITY_BYTES: Final = 6 * SEGMENT_BYTES
KEY: Final = SaveKey("s3", "run/step-1")
NEXT_KEY: Final = SaveKey("s3", "run/step-2")
OTHER_SERVER: Final = "another server"
FROZEN: Final = "__0_0.distcp"
"""The file that saves borrow."""

_LEASE_S: Final = 30.0
_SIZES: Final = (0, 1, 300, 512, 1000, 4000, 12_000, 16 * KIB, 16 * KIB + 1, 24_000, 40_000)


@contextmanager
def small_world(seed: int) -> Iterator[None]:
    """Segments that hold a few records, and no chance or time but the seed's, so that a trace can be had again."""
    rng = random.Random(f"world {seed}")
    still = SimpleNamespace(time=lambda: 12.5, monotonic=time.monotonic)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(space, "MIN_SEGMENT_BYTES", SEGMENT_BYTES))
        stack.enter_context(mock.patch("secrets.randbits", rng.getrandbits))
        stack.enter_context(
            mock.patch("uuid.uuid4", lambda: SimpleNamespace(hex=f"{rng.getrandbits(128):032x}"))
        )
        stack.enter_context(mock.patch.object(room, "random", rng))
        stack.enter_context(mock.patch.object(record_writing, "PIECE_BYTES", BLOCK_BYTES))
        for module in (commits, uploader, write_back):
            stack.enter_context(mock.patch.object(module, "time", still))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield


def chunk(number: int) -> ChunkId:
    return ChunkId(ObjectId("s3", f"bucket/key-{number}", "v1"), 0)


@lru_cache(maxsize=1000)
def payload(number: int) -> bytes:
    """The only bytes that chunk `number` ever has."""
    rng = random.Random(number)
    return rng.randbytes(rng.choice(_SIZES))


def borrowing_id(name: str, key: SaveKey, base_id: str) -> str:
    """The id of a save that borrows `FROZEN` of the save `base_id` at `key`: it says all of that."""
    return f"{name}--{key.path.rpartition('-')[2]}--{base_id}"


def origin_of(key: SaveKey, save_id: str, name: str) -> tuple[SaveKey, str]:
    """Where, and in which save, a file of a save was stored."""
    while name == FROZEN and "--" in save_id:
        _, step, save_id = save_id.split("--", 2)
        key = SaveKey(key.store, f"run/step-{step}")
    return key, save_id


@lru_cache(maxsize=1000)
def parts_of(save_id: str) -> dict[str, bytes]:
    """A save's files; one has several blocks, one is empty."""
    rng = random.Random(save_id)
    sizes = {FROZEN: rng.randrange(17_000, 40_000), "__0_1.distcp": 700, "__1_0.distcp": 0}
    parts = {name: rng.randbytes(size) for name, size in sizes.items()}
    _, stored_by = origin_of(KEY, save_id, FROZEN)
    return parts if stored_by == save_id else {**parts, FROZEN: parts_of(stored_by)[FROZEN]}


def saved_chunk(key: SaveKey, save_id: str, name: str) -> ChunkId:
    key, save_id = origin_of(key, save_id, name)
    return ChunkId(ObjectId(key.store, f"{key.path}/{name}", f"save:{save_id}"), 0)


@dataclass
class Trace:
    """What was done from a known state on, and all one needs to judge what a crash leaves of it."""

    name: str
    disk: Disk
    promises: Promises
    items: list[Item] = field(default_factory=list)
    payloads: dict[ChunkId, bytes] = field(default_factory=dict)
    indexes: dict[int, bytes] = field(
        default_factory=dict
    )  # node of a clean mark -> the index it vouches for
    saves: bool = False  # the cache's save protocol runs over the store


class _Objects(dict[str, bytes]):
    """What lies in the bucket; every change is a step of the trace."""

    def __init__(self, there: dict[str, bytes], promise: Any) -> None:
        super().__init__(there)
        self._promise = promise

    def __setitem__(self, key: str, data: bytes) -> None:
        super().__setitem__(key, data)
        self._promise(InBucket(key, data))

    def pop(self, key: str, *default: Any) -> Any:
        self._promise(InBucket(key, None))
        return super().pop(key, *default)


class _RecordedFiles(record_writing.FileCalls):
    """A client's calls, written down among the server's."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def open(self, path: str) -> int:
        return self._recorder.open(path)

    def close(self, fd: int) -> None:
        self._recorder.close(fd)

    def pwritev(self, fd: int, buffers: Sequence[record_writing.Bytes], offset: int) -> int:
        return self._recorder.pwritev(fd, buffers, offset)


class World:
    """One server, on folder `root`, which holds what `trace` starts from. Its calls extend the trace."""

    def __init__(self, root: str, trace: Trace) -> None:
        self.trace = trace
        self._root = root
        self._recorder = Recorder(root, trace.disk, self._before_create)
        trace.items = self._recorder.trace
        self._held = trace.promises.copy()
        self.bucket = Bucket()
        self.bucket.objects = _Objects(trace.promises.bucket, self._promise)
        self.store: Store | None = None
        self._flags: dict[str, Flags] = {}
        self._write_back: WriteBack | None = None
        self._clock = Clock()

    # ---- the server ----

    def open(self) -> Store:
        self.store = open_store(self._root, self._recorder)
        self._promise(Opened(self.store.server_id))
        self._flags = {usage.name: Flags(usage.kept, usage.policy) for usage in self.store.namespaces()}
        if self.trace.saves:
            self._write_back = open_saves(self.store, self.bucket, self._clock)
        return self.store

    def stop(self) -> None:
        """In order."""
        if self._write_back is not None:
            self._write_back.close()
        self.there.close()

    def kill(self) -> None:
        """Lets the folder go without a word; nothing is recorded."""
        if self._write_back is not None:
            self._write_back.close()
        if self.store is not None:
            abandon(self.store)

    @property
    def there(self) -> Store:
        if self.store is None:
            raise RuntimeError("the store isn't open")
        return self.store

    # ---- chunks ----

    def put(self, namespace: str, *numbers: int) -> None:
        rows = [(chunk(number), len(payload(number)), payload(number)) for number in numbers]
        self.put_rows(namespace, rows)

    def put_if_room(self, namespace: str, *numbers: int) -> None:
        """What need not be kept may have to yield to it."""
        for other in self.there.namespaces():
            if other.name != namespace and not other.kept and not other.policy.pinned:
                self.may_go(other.name)
        try:
            self.put(namespace, *numbers)
        except OutOfSpace:
            pass

    def put_rows(self, namespace: str, rows: Sequence[tuple[ChunkId, int, bytes]]) -> None:
        self.trace.payloads |= {id: data for id, _, data in rows}
        self.there.put_many(namespace, rows)
        self._promise(Stored(namespace, frozenset(id for id, _, _ in rows)))

    def client_writes(self, namespace: str, *numbers: int) -> None:
        """A client of this host writes chunks by itself, into files that it is handed."""
        got, rows = self._handed_out(namespace, numbers)
        self._fill(namespace, got, rows)
        self.there.commit_write(got.write_id)
        self._promise(Stored(namespace, frozenset(id for id, _, _ in rows)))

    def client_dies(self, namespace: str, *numbers: int, written: int) -> None:
        """So many of the chunks are written, and no commit ever comes."""
        got, rows = self._handed_out(namespace, numbers)
        self._fill(namespace, got, rows[:written])
        self.there._handing_out.expire(time.monotonic() + handing_out.OPENING_S)

    def _handed_out(
        self, namespace: str, numbers: Sequence[int]
    ) -> tuple[HandedOut, list[tuple[ChunkId, int, bytes]]]:
        rows = [(chunk(number), len(payload(number)), payload(number)) for number in numbers]
        self.trace.payloads |= {id: data for id, _, data in rows}
        got = self.there.prepare_write(namespace, [(id, size, size) for id, size, _ in rows], timeout_s=60)
        if got is None:
            raise ValueError("too little for files of its own")
        return got, rows

    def _fill(self, namespace: str, got: HandedOut, rows: Sequence[tuple[ChunkId, int, bytes]]) -> None:
        files = _RecordedFiles(self._recorder)
        with opened(Path(self._root, STORE), namespace, got, files) as fds:
            write_records(fds, got, rows, files)

    def sync(self, namespace: str) -> None:
        self.there.sync(namespace)
        self._promise(Synced(namespace))

    def drop(self, namespace: str) -> None:
        self.may_go(namespace)
        self._promise(FlagsChange(namespace, Flags(), done=False))
        self.there.drop(namespace)
        self._flags.pop(namespace, None)
        self._promise(FlagsChange(namespace, Flags(), done=True))

    def may_go(self, namespace: str) -> None:
        """What comes may evict it."""
        self._promise(MayGo(namespace))

    def evict(self, namespace: str) -> None:
        self.may_go(namespace)
        self.there.evict(namespace)

    def fill(self, namespace: str, *numbers: int) -> None:
        """As a miss is filled: room is reserved before the chunk is fetched. What can't be kept passes through."""
        for number in numbers:
            data = payload(number)
            self.trace.payloads[chunk(number)] = data
            try:
                promised = self.there.reserve(namespace, chunk(number), len(data))
            except OutOfSpace:
                continue
            try:
                self.there.put(namespace, chunk(number), len(data), data, promised=promised)
            finally:
                promised.release()
            self._promise(Stored(namespace, frozenset({chunk(number)})))

    def expect(self, namespace: str, *numbers: int) -> None:
        self.there.expect(namespace, [chunk(number) for number in numbers])

    def tidy(self, *may_go: str) -> None:
        """Upkeep; `may_go` are the namespaces whose segments it may move or drop."""
        for namespace in may_go:
            self.may_go(namespace)
        self.there.tidy()

    def scrub(self) -> None:
        while not self.there.scrub(1 << 20).finished:
            pass

    def quarantine(self, namespace: str, number: int) -> None:
        self._promise(MayGo(namespace, frozenset({chunk(number)})))
        self.there.quarantine(chunk(number))

    def damage(self, namespace: str, number: int) -> None:
        """The disk flips bits in a record's payload, for good."""
        self._promise(MayGo(namespace, frozenset({chunk(number)})))
        for folder, _, names in os.walk(os.path.join(self._root, STORE, "segments")):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    at = file.read().find(payload(number))
                if at >= 0:
                    self._overwrite(path, at + len(payload(number)) // 2)

    def _overwrite(self, path: str, at: int) -> None:
        fd = self._recorder.open(path)
        try:
            self._recorder.pwritev(fd, [b"flipped"], at)
            self._recorder.fsync(fd)
        finally:
            self._recorder.close(fd)

    def segment_of(self, number: int) -> int:
        """Number of the segment in which a chunk lies; 0 if it is nowhere."""
        location = self.there._core.index.get(chunk_key(chunk(number)))
        return 0 if location is None else location.segment

    # ---- flags and records ----

    def keep(self, namespace: str, keep: bool) -> None:
        self._set(namespace, self._flags.get(namespace, Flags())._replace(kept=keep))
        self.there.keep(namespace, keep)
        self._promise(FlagsChange(namespace, self._flags[namespace], done=True))

    def policy(self, namespace: str, policy: Policy) -> None:
        self._set(namespace, self._flags.get(namespace, Flags())._replace(policy=policy))
        self.there.set_policy(namespace, policy)
        self._promise(FlagsChange(namespace, self._flags[namespace], done=True))

    def _set(self, namespace: str, flags: Flags) -> None:
        self._flags[namespace] = flags
        self._promise(FlagsChange(namespace, flags, done=False))

    def record(self, key: bytes, value: bytes | None) -> None:
        self._promise(RecordChanges(key, value, done=False))
        if value is None:
            self.there.delete_record(key)
        else:
            self.there.put_record(key, value)
        self._promise(RecordChanges(key, value, done=True))

    def believe_what_is_there(self) -> None:
        """A value that was read after a restart is as good as one that was acknowledged."""
        store = self.there
        for key in self._held.records:
            self._promise(RecordChanges(key, store.get_record(key), done=True))
        for namespace in self._held.flags:
            self._promise(FlagsChange(namespace, self._flags.get(namespace, Flags()), done=True))
        if self.trace.saves:
            for key in self._held.saves:
                self._promise(SaveChanges(key, self.current(key), done=True))

    def sync_what_is_there(self) -> None:
        """Of all that a reader is given after a restart."""
        resident = self._resident()
        for namespace, stored in self._held.stored.items():
            unsynced = stored - self._held.durable.get(namespace, frozenset())
            self._promise(MayGo(namespace, unsynced - resident.get(namespace, frozenset())))
        for namespace, chunks in resident.items():
            self._promise(Stored(namespace, chunks))
            self.sync(namespace)

    def _resident(self) -> dict[str, frozenset[ChunkId]]:
        ids = list(self.trace.payloads)
        found = zip(ids, self.there.lookup_many(ids), strict=True)
        intact = {id for id, stored in found if stored is not None and stored.is_intact()}
        core = self.there._core
        places: dict[str, set[ChunkId]] = {}
        for id in intact:
            location = core.index.get(chunk_key(id))
            if location is not None:
                places.setdefault(core.space.segments[location.segment].header.namespace, set()).add(id)
        return {namespace: frozenset(ids) for namespace, ids in sorted(places.items())}

    # ---- saves ----

    @property
    def write_back(self) -> WriteBack:
        if self._write_back is None:
            raise RuntimeError("no saves are served")
        return self._write_back

    def current(self, key: SaveKey = KEY) -> str:
        return current_save(self.write_back, key)

    def save(self, save_id: str, key: SaveKey = KEY) -> None:
        """Reserve, write, commit: as the service does it."""
        self._take_path(save_id, key)
        namespace = key.namespace(save_id)
        self.there.keep(namespace, True)
        self._put_parts(save_id, key)
        self.there.sync(namespace)
        self.commit(save_id, key)

    def _take_path(self, save_id: str, key: SaveKey) -> None:
        if self.write_back._slots.slot(key).deletion is not None:
            self.upload(key)  # it goes on where the last server left it
        if OTHER_SERVER.encode() in self.bucket.objects.get(key.claim_key, b""):
            with suppress(DeadlineExceeded):  # it is looked at, and may be alive
                self._reserve(save_id, key, deadline=time.monotonic())
            self._clock.outlast_claims()
        self._reserve(save_id, key, deadline=soon())

    def _reserve(self, save_id: str, key: SaveKey, *, deadline: float) -> None:
        self.write_back.reserve(key, save_id, writer="a test", overwrite=True, deadline=deadline)

    def save_borrowing(self, name: str, key: SaveKey, base: SaveKey) -> None:
        """As `save`, but with a file of what lies at `base`; whole if that isn't lent."""
        base_id = self.current(base)
        save_id = borrowing_id(name, base, base_id)
        self._take_path(save_id, key)
        if not self.write_back.lend(key, save_id, base, base_id, [FROZEN], deadline=soon()):
            self.write_back.abandon(key, save_id)
            self.save(name, key)
            return
        self.there.keep(key.namespace(save_id), True)
        self._put_parts(save_id, key)
        self.there.sync(key.namespace(save_id))
        self.commit(save_id, key)

    def delete(self, key: SaveKey = KEY) -> None:
        self._promise(SaveChanges(key, "", done=False))
        self.write_back.delete(key, "", deadline=soon(), wait_s=0.0)
        self._promise(SaveChanges(key, "", done=True))
        self.upload(key)

    def _put_parts(self, save_id: str, key: SaveKey) -> None:
        for name, data in parts_of(save_id).items():
            if origin_of(key, save_id, name) != (key, save_id):
                continue
            self.put_rows(key.namespace(save_id), [(saved_chunk(key, save_id, name), len(data), data)])

    def commit(self, save_id: str, key: SaveKey = KEY) -> None:
        files = [(name, len(data)) for name, data in parts_of(save_id).items()]
        self._promise(SaveChanges(key, save_id, done=False))
        self.write_back.commit(
            key,
            save_id,
            files,
            metadata_of(save_id),
            manifest_of(save_id),
            borrowed=_borrowed(save_id),
            deadline=soon(),
        )
        self._promise(SaveChanges(key, save_id, done=True))

    def upload(self, key: SaveKey = KEY) -> None:
        self.write_back.upload(key)

    # ---- copies: of saves that another server owns ----

    def copy(self, save_id: str, key: SaveKey = KEY) -> None:
        """This server takes a copy of what a writer sends, that has reserved the path at the other."""
        if key.claim_key not in self.bucket.objects:
            self._claim(save_id, "reserved", key)
        if _borrowed(save_id):
            _, step, base_id = save_id.split("--", 2)
            base = SaveKey(key.store, f"run/step-{step}")
            self.write_back.lend(key, save_id, base, base_id, [FROZEN], deadline=soon())
        there = self.bucket.objects.get(key.manifest_key)
        self._put_parts(save_id, key)
        files = [(name, len(data)) for name, data in parts_of(save_id).items()]
        self.write_back.prepare_copy(
            key,
            save_id,
            files,
            metadata_of(save_id),
            manifest_of(save_id),
            replaceable=() if there is None else (manifest_digest(there),),
            overwrite=True,
            writer="a test",
            owner=OTHER_SERVER,
            borrowed=_borrowed(save_id),
            deadline=soon(),
        )

    def owner_commits(self, save_id: str, key: SaveKey = KEY, *, confirms: bool = True) -> None:
        """From here on it is acknowledged, and this server's copy may be all that is left of it."""
        self._promise(SaveChanges(key, save_id, done=False))
        self._claim(save_id, "committed", key)
        self._promise(SaveChanges(key, save_id, done=True))
        if confirms:
            self.write_back.confirm_copy(key, save_id, committed_unix_s=12.5, replicas=2, deadline=soon())

    def owner_uploads(self, save_id: str, key: SaveKey = KEY) -> None:
        for name, data in parts_of(save_id).items():
            self.bucket.objects[f"{key.path}/{name}"] = data
        self.bucket.objects[key.metadata_key] = metadata_of(save_id)
        self.bucket.objects[key.manifest_key] = manifest_of(save_id)
        self.bucket.objects.pop(key.claim_key, None)

    def owner_is_silent(self) -> None:
        """For so long that its saves are taken over."""
        outlast_claims(self.write_back, self._clock)

    def _claim(self, save_id: str, state: ClaimState, key: SaveKey) -> None:
        claim = Claim(OTHER_SERVER, save_id, state, "a test", _LEASE_S, nonce=f"{save_id} {state}")
        self.bucket.objects[key.claim_key] = claim.encode()

    # ---- inside ----

    def _promise(self, promise: Promise) -> None:
        promise.apply(self._held)
        self._recorder.promise(promise)

    def _before_create(self, path: str, node: int) -> None:
        """The index isn't seen at the seam; a clean mark vouches for it, as it is before the mark is made."""
        if os.path.basename(path).startswith("clean"):
            with open(os.path.join(self._root, STORE, "index", "data.mdb"), "rb") as file:
                self.trace.indexes[node] = file.read()


def _borrowed(save_id: str) -> list[str]:
    return [FROZEN] if "--" in save_id else []


def open_store(root: str, disk: DiskCalls, *, more_segments: int = 0) -> Store:
    return Store(
        Path(root, STORE),
        capacity_bytes=CAPACITY_BYTES + more_segments * SEGMENT_BYTES,
        segment_bytes=SEGMENT_BYTES,
        min_free_bytes=0,
        disk=disk,
    )


class Clock:
    """time.monotonic, and what a test has let pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.passed_s

    def outlast_claims(self) -> None:
        """Lets pass after what a claim that doesn't change is taken for a dead server's."""
        self.passed_s += (DEAD_AFTER_LEASES + 1) * _LEASE_S


def open_saves(store: Store, bucket: Bucket, clock: Clock) -> WriteBack:
    under_stores = {"s3": MemoryUnderStore(bucket, Gate())}
    return WriteBack(store, under_stores, upload_threads=0, lease_s=_LEASE_S, clock=clock)


def outlast_claims(write_back: WriteBack, clock: Clock) -> None:
    """Has the server look at the claims of what it has copies of, and again when their servers are taken for dead."""
    write_back.tidy()
    clock.outlast_claims()
    write_back.tidy()


def current_save(write_back: WriteBack, key: SaveKey) -> str:
    """Id of the save that a reader is given; "" for none."""
    try:
        return write_back.get(key, deadline=soon()).save_id
    except NotCommitted:
        return ""


def abandon(store: Store) -> None:
    """As if its process had been killed: no clean stop, and the kernel takes its descriptors and locks."""
    core = store._core
    core.known = {}
    core.index.close(None)
    for segment in core.space.segments.values():
        segment.close(core.disk)
    core.folder.unlock()
