"""The real recovery over an image: what a server finds that is started where the power went."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, Final

import xxhash
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.store import DiskCalls, Store, StoredChunk

from tests.crash.promises import Flags, Found, Observation, SaveChanges, SaveSeen
from tests.crash.volatile import Image
from tests.crash.world import (
    STORE,
    Clock,
    Trace,
    abandon,
    current_save,
    open_saves,
    open_store,
    origin_of,
    outlast_claims,
    parts_of,
    saved_chunk,
)
from tests.unit.write_back_world import Bucket, manifest_of
from torchcache.errors import ConfigurationError
from torchcache.model import ChunkId, ObjectId

_CLEAN: Final = f"{STORE}/clean"
_INDEX: Final = f"{STORE}/index"
_NEW: Final = ChunkId(ObjectId("s3", "bucket/after the restart", "v1"), 0)
_NEW_BYTES: Final = b"stored after the restart" * 30
_SPARE_SEGMENTS: Final = 3  # so that what is stored after the restart evicts nothing


def materialise(image: Image, root: str, trace: Trace, rng: random.Random) -> None:
    """Writes the image into `root`, which doesn't exist.

    The index isn't behind the seam: with a clean mark it is as it was then, without one it may be anything.
    """
    os.mkdir(root, 0o700)
    for path in sorted(image.folders):
        os.mkdir(f"{root}/{path}", 0o700)
    first: dict[int, str] = {}
    for path, node, content in image.files:
        full = f"{root}/{path}"
        if node in first:
            os.link(first[node], full)
            continue
        first[node] = full
        write_file(full, content.data, content.size)
    if _INDEX in image.folders:
        index = _index_of(image, trace, rng)
        if index is not None:
            write_file(f"{root}/{_INDEX}/data.mdb", index, len(index))


def _index_of(image: Image, trace: Trace, rng: random.Random) -> bytes | None:
    vouched = image.nodes.get(_CLEAN)
    if vouched is not None:
        return trace.indexes.get(vouched)
    choice = rng.randrange(4)
    if choice == 0 and trace.indexes:
        return rng.choice(list(trace.indexes.values()))  # of an earlier stop
    return rng.randbytes(8192) if choice == 1 else None


def write_file(path: str, data: bytes | bytearray, size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if data:
            os.pwrite(fd, data, 0)
        if size != len(data):
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def remove_tree(path: str) -> None:
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(path)


class Restart:
    """Starts servers over images of one trace, on scratch folder `root`."""

    def __init__(self, trace: Trace, root: str) -> None:
        self._trace = trace
        self._root = root
        self._chunks = list(trace.payloads)
        self._digests = [xxhash.xxh3_64_intdigest(data) for data in trace.payloads.values()]
        self._keys = sorted({key for key in _save_keys(trace)})
        self.chunks = {chunk: place for place, chunk in enumerate(self._chunks)}
        self._clock = Clock()

    def over(self, image: Image, bucket: dict[str, bytes], rng: random.Random) -> Observation:
        """What the server finds: at its start, and again after it stored something and was stopped or killed."""
        materialise(image, self._root, self._trace, rng)
        try:
            return self._twice(bucket, rng)
        except Exception as error:
            return Observation(trouble=f"the restart raised {error!r}")
        finally:
            remove_tree(self._root)

    def _twice(self, bucket: dict[str, bytes], rng: random.Random) -> Observation:
        objects = dict(bucket)

        def first(store: Store, write_back: WriteBack | None) -> Observation:
            seen = self._observe(store, write_back, objects)
            store.put("after", _NEW, len(_NEW_BYTES), _NEW_BYTES)
            return seen

        killed = rng.random() < 0.5
        trusted = os.path.exists(f"{self._root}/{_CLEAN}")
        seen = self._serving(objects, first, killed=killed)
        again = self._serving(objects, lambda *with_: self._again(rng, objects, *with_), killed=True)
        if trusted and killed:
            # The segments may tell more than the first index: that a chunk was quarantined isn't durable. Or less.
            pairs = zip(seen.chunks, again.chunks, strict=False)
            again = again._replace(
                chunks=tuple(now if was == "good" or now == "WRONG" else was for was, now in pairs)
            )
        if again != seen:
            how = "a kill" if killed else "a stop"
            return Observation(trouble=f"the start after {how} finds {_difference(seen, again)}")
        return seen

    def _again(
        self, rng: random.Random, objects: dict[str, bytes], store: Store, write_back: WriteBack | None
    ) -> Observation:
        seen = self._observe(store, write_back, objects)
        new = store.lookup(_NEW)
        if new is None or not new.is_intact() or bytes(new.payload) != _NEW_BYTES:
            return Observation(trouble="what was stored after the restart is gone")
        for namespace, flags in seen.flags:
            if (flags.kept or flags.policy.pinned) and _may_be_evicted(store, namespace):
                return Observation(trouble=f"I6: {namespace} has {flags}, and can be evicted")
        if write_back is not None and rng.random() < 0.2:
            trouble = self._finish(write_back, objects, dict(seen.saves))
            if trouble:
                return Observation(trouble=trouble)
        return seen

    def _serving(
        self,
        objects: dict[str, bytes],
        call: Callable[[Store, WriteBack | None], Observation],
        *,
        killed: bool,
    ) -> Observation:
        store = open_store(self._root, DiskCalls(), more_segments=_SPARE_SEGMENTS)
        write_back = None
        try:
            if self._trace.saves:
                bucket = Bucket()
                bucket.objects = objects
                write_back = open_saves(store, bucket, self._clock)
            return call(store, write_back)
        finally:
            if write_back is not None:
                write_back.close()
            if killed:
                abandon(store)
            else:
                store.close()

    def _observe(self, store: Store, write_back: WriteBack | None, objects: dict[str, bytes]) -> Observation:
        found = store.lookup_many(self._chunks)
        chunks = tuple(_judge(*pair) for pair in zip(found, self._digests, strict=True))
        flags = {
            usage.name: Flags(usage.kept, usage.policy)
            for usage in store.namespaces()
            if usage.name != "after"
        }
        saves: dict[SaveKey, SaveSeen] = {}
        if write_back is not None:
            by_id = dict(zip(self._chunks, chunks, strict=True))
            for key in self._keys:
                saves[key] = _save_seen(write_back, key, by_id, flags, objects)
        held = tuple((name, flag) for name, flag in flags.items() if flag != Flags())
        return Observation("", store.server_id, chunks, held, tuple(store.records(b"")), tuple(saves.items()))

    def _finish(
        self, write_back: WriteBack, objects: dict[str, bytes], saves: dict[SaveKey, SaveSeen]
    ) -> str:
        """Uploads what is left; the under-store must come to hold the same saves."""
        outlast_claims(write_back, self._clock)
        for key, save in saves.items():
            if not save.save_id:
                continue
            write_back.upload(key)
            write_back.tidy()
            if objects.get(key.manifest_key) != manifest_of(save.save_id):
                return f"I3: {key} comes to hold another save than {save.save_id}"
            for name, data in parts_of(save.save_id).items():
                if objects.get(f"{key.path}/{name}") != data:
                    return f"I1: {key} comes to hold wrong bytes in {name}"
        return ""


def _save_keys(trace: Trace) -> set[SaveKey]:
    changed = {item.key for item in trace.items if isinstance(item, SaveChanges)}
    return changed | set(trace.promises.saves)


def _judge(stored: StoredChunk | None, digest: int) -> Found:
    if stored is None:
        return "missing"
    if not stored.is_intact():
        return "damaged"
    view: Any = memoryview(stored.payload)
    return "good" if xxhash.xxh3_64_intdigest(view) == digest else "WRONG"


def _save_seen(
    write_back: WriteBack,
    key: SaveKey,
    chunks: dict[ChunkId, Found],
    flags: dict[str, Flags],
    objects: dict[str, bytes],
) -> SaveSeen:
    """A committed save must be in the store, and kept; of a durable one the under-store may give the files."""
    save_id = current_save(write_back, key)
    if not save_id:
        return SaveSeen("", True)
    in_store = {
        name: not data or chunks.get(saved_chunk(key, save_id, name)) == "good"
        for name, data in parts_of(save_id).items()
    }
    if objects.get(key.manifest_key) == manifest_of(save_id):
        in_bucket = {
            name: objects.get(f"{key.path}/{name}") == data for name, data in parts_of(save_id).items()
        }
        return SaveSeen(save_id, all(in_store[name] or in_bucket[name] for name in in_store))
    origins = [origin_of(key, save_id, name) for name in in_store]
    kept = all(flags.get(at.namespace(stored_by), Flags()).kept for at, stored_by in origins)
    return SaveSeen(save_id, all(in_store.values()) and kept)


def _may_be_evicted(store: Store, namespace: str) -> bool:
    try:
        store.evict(namespace)
    except ConfigurationError:
        return False
    return True


def _difference(before: Observation, after: Observation) -> str:
    if after.trouble:
        return after.trouble
    parts = [
        f"{field}: {was} and then {now}"
        for field, was, now in zip(Observation._fields, before, after, strict=True)
        if was != now
    ]
    return "; ".join(parts)[:2000]
