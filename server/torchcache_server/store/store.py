"""The store's public face: chunks in, chunks out, and what must be kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torchcache.errors import ConfigurationError, OutOfSpace
from torchcache.model import ChunkId
from torchcache_server.store.appending import append, draft
from torchcache_server.store.chunk import Payload, StoredChunk
from torchcache_server.store.core import Gate
from torchcache_server.store.disk import OS, DiskCalls
from torchcache_server.store.folder import StoreFolder
from torchcache_server.store.index import SegmentNote, chunk_key
from torchcache_server.store.keeping import Flags, disk_errors, sync
from torchcache_server.store.layout import RECORDS
from torchcache_server.store.ledger import Ledger
from torchcache_server.store.opening import open_core
from torchcache_server.store.reading import find, find_many, quarantine
from torchcache_server.store.space import Space, segment_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamespaceUsage:
    """What a dataset or checkpoint holds. `kept`: not yet in the under-store; `pinned`: by a user's wish."""

    name: str
    bytes: int
    chunks: int
    pinned: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The store as it is, and what happened since it was opened."""

    capacity_bytes: int
    used_bytes: int
    chunks: int
    segments: int
    hits: int
    misses: int
    corrupt: int
    evicted_chunks: int


class Store:
    """Chunks on a local disk, in segments, found by an index. Thread-safe; one process owns the folder.

    Chunks are stored under a namespace, a dataset or checkpoint, and found without it. When the capacity is reached the
    namespace used longest ago yields, but never to itself, and never if kept or pinned.
    """

    def __init__(
        self, path: Path, *, capacity_bytes: int, segment_bytes: int | None = None, disk: DiskCalls = OS
    ) -> None:
        """Creates the store in folder `path`, or opens the one there and recovers what an unclean stop left.

        Raises ConfigurationError: the folder is in use, someone else's or not usable, or the capacity too small; or a
        durable record is damaged, in both its copies. `set_aside` names those that `torchcache doctor` took out.
        """
        space = Space(capacity_bytes, segment_size(capacity_bytes, segment_bytes))
        folder = StoreFolder(path, disk)
        with ExitStack() as undo:
            undo.callback(folder.unlock)
            try:
                # First what must not be lost: if it is damaged, nothing else is touched.
                flags, self._records = Ledger(disk, folder.flags), Ledger(disk, folder.records)
                self.set_aside = folder.set_aside(RECORDS)
                self._core = open_core(folder, disk, space)
                undo.callback(self._core.index.close, None)
                self._flags = Flags(self._core, flags)
            except (OSError, OutOfSpace) as error:
                raise ConfigurationError(f"the store {path} can't be opened: {error}") from error
            undo.pop_all()
        self._gate = Gate(str(path))
        self.server_id = folder.server_id
        over = space.used_bytes - capacity_bytes
        if over > 0 and not self._core.make_room(None, over):
            _log.warning("the store %s holds %d bytes more than its capacity, and may evict none", path, over)

    # ---- chunks ----

    def lookup(self, chunk: ChunkId) -> StoredChunk | None:
        """The chunk, or None. Its header is checked, its payload isn't: the reader does, with the digests.

        Counts a hit or a miss, and as a use of the chunk's namespace.
        """
        return self.lookup_many([chunk])[0]

    def lookup_many(self, chunks: Sequence[ChunkId]) -> list[StoredChunk | None]:
        """`lookup` for many chunks at once, for less than many look-ups cost."""
        with self._gate:
            found = find_many(self._core, chunks)
            misses = sum(chunk is None for chunk in found)
            self._core.counts.looked_up(hits=len(found) - misses, misses=misses)
            return found

    def contains(self, chunk: ChunkId) -> bool:
        """Whether the index knows the chunk. Counts nothing."""
        with self._gate:
            location = self._core.index.get(chunk_key(chunk))
            return location is not None and location.segment in self._core.space.segments

    def put(self, namespace: str, chunk: ChunkId, object_size: int, payload: Payload) -> StoredChunk:
        """Stores a chunk; one that is there already is returned as it is, whatever its namespace.

        `object_size` is in bytes, of the whole object. Raises OutOfSpace if the disk is full or nothing may be evicted.
        """
        return self.put_many(namespace, [(chunk, object_size, payload)])[0]

    def put_many(self, namespace: str, rows: Sequence[tuple[ChunkId, int, Payload]]) -> list[StoredChunk]:
        """`put` for many (chunk, object size, payload) at once, in one index transaction: all or none is stored."""
        with self._gate:
            found = find_many(self._core, [chunk for chunk, _, _ in rows])
            # One record a chunk, also where it comes twice: an older copy would come back when the index is rebuilt.
            missing: dict[ChunkId, tuple[ChunkId, int, Payload]] = {}
            for row, there in zip(rows, found, strict=True):
                if there is None:
                    missing.setdefault(row[0], row)
            stored = (
                append(self._core, namespace, [draft(*row) for row in missing.values()]) if missing else []
            )
            fresh = dict(zip(missing, stored, strict=True))
            return [fresh[row[0]] if there is None else there for row, there in zip(rows, found, strict=True)]

    def verify(self, chunk: ChunkId) -> bool:
        """Whether the chunk is there and its payload matches its checksums. Counts nothing."""
        with self._gate:
            found = find(self._core, chunk)
            return found is not None and found.is_intact()

    def quarantine(self, chunk: ChunkId) -> None:
        """Forgets a chunk that was found damaged, and counts it. Absent is fine."""
        with self._gate:
            quarantine(self._core, chunk)

    # ---- durability ----

    def sync(self, namespace: str) -> None:
        """Makes durable what was put under `namespace` by calls that have returned: files, then their names.

        The index needs none of it: it is rebuilt from the segments. Raises TorchCacheError if the disk fails, and then
        for this namespace always, until it is dropped: what a failed fsync left behind can't be known.
        """
        with self._gate:
            sync(self._core, namespace)

    def keep(self, namespace: str, keep: bool) -> None:
        """Says that `namespace` must not be evicted, being nowhere else; or that it may be. Survives a restart."""
        with self._gate:
            self._flags.set(namespace, kept=keep)

    def pin(self, namespace: str, pinned: bool) -> None:
        """Says that `namespace` is to stay, by a user's wish; or that it needn't. Survives a restart."""
        with self._gate:
            self._flags.set(namespace, pinned=pinned)

    def drop(self, namespace: str) -> int:
        """Removes all of a namespace, its flags too; returns the bytes freed."""
        with self._gate:
            self._flags.set(namespace, kept=False, pinned=False)
            with self._core.lock:
                found = self._core.space.namespaces.get(namespace)
                segments = list(found.segments.values()) if found is not None else []
            freed = sum(s.tail for s in self._core.remove(segments))
            with self._core.lock:
                self._core.space.forget_if_empty(namespace)
            return freed

    # ---- what is there ----

    def namespaces(self) -> list[NamespaceUsage]:
        """All namespaces, by name."""
        with self._gate, self._core.lock:
            found = sorted(self._core.space.namespaces.values(), key=lambda n: n.name)
            return [NamespaceUsage(n.name, n.bytes, n.chunks, n.pinned, n.kept) for n in found]

    def usage(self) -> StoreUsage:
        """Totals and counters."""
        with self._gate, self._core.lock:
            space, counts = self._core.space, self._core.counts
            return StoreUsage(
                capacity_bytes=space.capacity_bytes,
                used_bytes=space.used_bytes,
                chunks=sum(s.chunks for s in space.segments.values()),
                segments=len(space.segments),
                hits=counts.hits,
                misses=counts.misses,
                corrupt=counts.corrupt,
                evicted_chunks=counts.evicted_chunks,
            )

    # ---- durable records ----

    def get_record(self, key: bytes) -> bytes | None:
        """A record's value, or None."""
        with self._gate, disk_errors(f"read the record {key!r}"):
            return self._records.get(key)

    def put_record(self, key: bytes, value: bytes) -> None:
        """Stores a small record, durable on return; whole or not at all. Raises OutOfSpace, TorchCacheError."""
        with self._gate, disk_errors(f"write the record {key!r}"):
            self._records.put(key, value)

    def delete_record(self, key: bytes) -> None:
        """Removes a record, durably; absent is fine."""
        with self._gate, disk_errors(f"delete the record {key!r}"):
            self._records.delete(key)

    def records(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records whose key starts with `prefix`, by key."""
        with self._gate, disk_errors(f"read the record {prefix!r}"):
            return iter(list(self._records.items(prefix)))

    def close(self) -> None:
        """Waits for the calls under way and stops in order, so that the next start trusts the index. Idempotent."""
        if not self._gate.close():
            return
        core = self._core
        core.known = {}
        try:
            core.index.close(
                {
                    s.number: SegmentNote(
                        s.tail, s.chunks, core.space.namespaces[s.header.namespace].last_used
                    )
                    for s in core.space.segments.values()
                }
            )
            core.folder.mark_clean()
        except (OSError, OutOfSpace) as error:
            _log.warning("the store could not stop in order, the next start reads all segments: %s", error)
        finally:
            for segment in core.space.segments.values():
                segment.close(core.disk)
            core.folder.unlock()
