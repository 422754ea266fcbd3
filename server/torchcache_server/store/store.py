"""The store's public face: chunks in, chunks out, and what must be kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torchcache.errors import ConfigurationError, IntegrityError, OutOfSpace
from torchcache.marks import Marks
from torchcache.model import ChunkId
from torchcache.records import chunk_key, page_aligned
from torchcache_server.store.appending import append
from torchcache_server.store.chunk import Payload, StoredChunk
from torchcache_server.store.core import Core, Gate
from torchcache_server.store.disk import OS, DiskCalls
from torchcache_server.store.folder import StoreFolder
from torchcache_server.store.foresight import Foresight
from torchcache_server.store.handing_out import Committed, HandedOut, HandingOut
from torchcache_server.store.health import Health, WatchedDisk
from torchcache_server.store.index import SegmentNote
from torchcache_server.store.keeping import Flags, disk_errors, kept_names, sync
from torchcache_server.store.layout import RECORDS
from torchcache_server.store.ledger import Ledger
from torchcache_server.store.opening import open_core
from torchcache_server.store.ordering import ReadingOrder
from torchcache_server.store.policy import Policy
from torchcache_server.store.reading import find_in_memory, find_many, quarantine
from torchcache_server.store.room import Promise, evict_others, look_up_use, note_use, promise
from torchcache_server.store.scrubbing import Scrub, ScrubStep
from torchcache_server.store.space import Space, segment_size
from torchcache_server.store.tidying import tidy
from torchcache_server.store.usage import NamespaceUsage, StoreUsage, measured, namespaces
from torchcache_server.store.writing import draft

_MAX_MIN_FREE_BYTES = 1 << 30

_log = logging.getLogger(__name__)


class Store:
    """Chunks on a local disk, in segments, found by an index. Thread-safe; one process owns the folder.

    Chunks are stored under a namespace, a dataset or checkpoint, and found without it. When the capacity is reached
    namespaces of lower priority yield first, of equal ones the one used longest ago; none to itself unless the order of
    reading is known, and none that is kept or pinned.
    """

    def __init__(
        self,
        path: Path,
        *,
        capacity_bytes: int,
        segment_bytes: int | None = None,
        min_free_bytes: int | None = None,
        disk: DiskCalls = OS,
    ) -> None:
        """Creates the store in folder `path`, or opens the one there and recovers what an unclean stop left.

        `min_free_bytes` stay free on the file system, whatever the capacity; by default a hundredth, at most 1 GiB.
        Raises ConfigurationError: the folder is in use, someone else's or not usable, or the capacity too small; or a
        durable record is damaged, in both its copies. `set_aside` names those that `torchcache doctor` took out.
        """
        space = Space(capacity_bytes, segment_size(capacity_bytes, segment_bytes))
        watched = WatchedDisk(disk)
        folder = StoreFolder(path, watched)
        with ExitStack() as undo:
            undo.callback(folder.unlock)
            try:
                # First what must not be lost: if it is damaged, nothing else is touched.
                flags, self._records = Ledger(watched, folder.flags), Ledger(watched, folder.records)
                self.set_aside = folder.set_aside(RECORDS)
                self._core = open_core(folder, watched, space, kept=kept_names(flags))
                undo.callback(self._core.index.close, None)
                self._flags = Flags(self._core, flags)
            except (OSError, OutOfSpace, IntegrityError) as error:
                raise ConfigurationError(f"the store {path} can't be opened: {error}") from error
            undo.pop_all()
        watched.watch = self._core.watch
        self._core.min_free_bytes = _min_free_bytes(self._core, min_free_bytes)
        self._scrub = Scrub(self._core)
        self._handing_out = HandingOut(self._core)
        self._gate = Gate(str(path))
        self.server_id = folder.server_id
        over = space.used_bytes - capacity_bytes
        if over > 0 and not evict_others(self._core, None, over):
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

    def read(self, chunk: ChunkId) -> StoredChunk | None:
        """The chunk for who reads it in this process, all of it in memory; or None. Not verified. Counts nothing."""
        with self._gate:
            return find_in_memory(self._core, chunk)

    def used(self, namespaces: Iterable[str], *, chunks: int, marks: Marks | None = None) -> None:
        """Counts `chunks` that clients found in the files by themselves, and the namespaces as used. Unknown is fine.

        `marks` are those of the chunks, as far as they are told: orders of reading go on by them.
        """
        with self._gate:
            core = self._core
            with core.lock:
                for name in namespaces:
                    if (namespace := core.space.namespaces.get(name)) is not None:
                        core.used(namespace)
                        if marks is not None and len(marks) and isinstance(namespace.order, Foresight):
                            namespace.order.used_marks(marks)
            core.counts.looked_up(hits=chunks, misses=0)

    def contains(self, chunk: ChunkId) -> bool:
        """Whether the index knows the chunk. Counts nothing."""
        with self._gate:
            location = self._core.index.get(chunk_key(chunk))
            return location is not None and location.segment in self._core.space.segments

    def reserve(
        self, namespace: str, chunk: ChunkId, size_bytes: int, *, ahead_of_use: bool = False
    ) -> Promise:
        """Room for a chunk of `size_bytes` that is about to be fetched, for `put`; to be released in the end.

        It counts as a use of the chunk, unless it is `ahead_of_use`.
        Raises OutOfSpace if it could not be kept: the store is full, the quota used up, the disk out of service, or all
        that is here is needed sooner.
        """
        with self._gate:
            note = look_up_use if ahead_of_use else note_use
            return promise(self._core, namespace, size_bytes, chunk_key(chunk), note=note)

    def note_use(self, namespace: str, chunk: ChunkId) -> None:
        """The chunk, which isn't here, was asked for. Counts as no miss."""
        with self._gate:
            note_use(self._core, namespace, chunk_key(chunk))

    def put(
        self,
        namespace: str,
        chunk: ChunkId,
        object_size: int,
        payload: Payload,
        *,
        promised: Promise | None = None,
    ) -> StoredChunk:
        """Stores a chunk; one that is there already is returned as it is, whatever its namespace.

        `object_size` is in bytes, of the whole object; `promised` what `reserve` gave. Raises OutOfSpace if the disk is
        full or nothing may be evicted.
        """
        return self.put_many(namespace, [(chunk, object_size, payload)], promised=promised)[0]

    def put_many(
        self,
        namespace: str,
        rows: Sequence[tuple[ChunkId, int, Payload]],
        *,
        promised: Promise | None = None,
    ) -> list[StoredChunk]:
        """`put` for many (chunk, object size, payload) at once, in one index transaction: all or none is stored."""
        with self._gate:
            found = find_many(self._core, [chunk for chunk, _, _ in rows])
            # One record a chunk, also where it comes twice: an older copy would come back when the index is rebuilt.
            missing: dict[ChunkId, tuple[ChunkId, int, Payload]] = {}
            for row, there in zip(rows, found, strict=True):
                if there is None:
                    missing.setdefault(row[0], row)
            drafts = [draft(*row) for row in missing.values()]
            stored = append(self._core, namespace, drafts, promised) if drafts else []
            fresh = dict(zip(missing, stored, strict=True))
            return [fresh[row[0]] if there is None else there for row, there in zip(rows, found, strict=True)]

    # ---- chunks that a client of this host writes by itself ----

    def prepare_write(
        self, namespace: str, chunks: Sequence[tuple[ChunkId, int, int]], *, timeout_s: float
    ) -> HandedOut | None:
        """Hands files out for chunks: (chunk, object size, chunk size), sizes in bytes. None: they are better put.

        Raises as `put_many`; Overloaded too, while too much is handed out. What isn't committed in `timeout_s`, or by
        who holds a flock on the files, is given back.
        """
        with self._gate:
            return self._handing_out.prepare(namespace, chunks, timeout_s=timeout_s)

    def commit_write(self, write_id: str) -> Committed:
        """Makes all chunks of a prepared write visible, or none.

        Raises TransientError if the write isn't known (any more), IntegrityError if it isn't what was announced,
        OutOfSpace: it is over then.
        """
        with self._gate:
            return self._handing_out.commit(write_id)

    def abandon_write(self, write_id: str) -> None:
        """Gives back what a prepared write took; one that isn't known is fine."""
        with self._gate:
            self._handing_out.abandon(write_id)

    def verify(self, chunk: ChunkId) -> bool:
        """Whether the chunk is there and its payload matches its checksums. Counts nothing."""
        with self._gate:
            found = find_in_memory(self._core, chunk)
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
            self._flags.keep(namespace, keep)

    # ---- who stays and who goes ----

    def policy(self, namespace: str) -> Policy:
        """How the namespace is treated when room is short."""
        with self._gate, self._core.lock:
            found = self._core.space.namespaces.get(namespace)
            return found.policy if found is not None else Policy()

    def set_policy(self, namespace: str, policy: Policy) -> None:
        """Says how the namespace, which may be empty yet, is treated when room is short. Survives a restart."""
        with self._gate:
            self._flags.set_policy(namespace, lambda _: policy)

    def pin(self, namespace: str, pinned: bool) -> None:
        """Says that `namespace` is to stay, by a user's wish; or that it needn't. Survives a restart."""
        with self._gate:
            self._flags.set_policy(namespace, lambda policy: replace(policy, pinned=pinned))

    def expect(self, namespace: str, chunks: Iterable[ChunkId] | None) -> None:
        """Says in which order the namespace's chunks will be read from now on; None: nobody knows any more.

        A chunk that is read several times comes as often. Then what is needed farthest in the future yields first.
        """
        order = None if chunks is None else ReadingOrder(map(chunk_key, chunks))
        with self._gate, self._core.lock:
            self._core.space.namespace(namespace).order = order
            self._core.space.forget_if_empty(namespace)

    def foresight(self, namespace: str) -> Foresight:
        """What readers told of the order in which they will read the namespace; they may tell more."""
        with self._gate, self._core.lock:
            owner = self._core.space.namespace(namespace)
            if not isinstance(owner.order, Foresight):
                owner.order = Foresight()
            return owner.order

    def foresights(self) -> dict[str, Foresight]:
        """All that was told, by namespace."""
        with self._gate, self._core.lock:
            found = self._core.space.namespaces.items()
            return {name: n.order for name, n in found if isinstance(n.order, Foresight)}

    def evict(self, namespace: str) -> int:
        """Drops what the namespace holds, but not its policy; returns the bytes freed. One that isn't there has none.

        Raises ConfigurationError if it is pinned, or not yet in the under-store.
        """
        with self._gate:
            core = self._core
            with core.lock:
                found = core.space.namespaces.get(namespace)
                if found is not None and found.protected:
                    raise ConfigurationError(
                        f"{namespace!r} is pinned: unpin it first"
                        if found.policy.pinned
                        else f"{namespace!r} isn't in the under-store yet, and its only copy is here: it stays"
                    )
                segments = list(found.segments.values()) if found is not None else []
            gone = core.remove(segments, unless_in_use=True)
            freed = sum(s.held_bytes for s in gone)
            with core.lock:
                core.spares.trim(freed)  # who evicts by hand wants the disk back
            core.counts.add(evicted_chunks=sum(s.chunks for s in gone))
            return freed

    def drop(self, namespace: str) -> int:
        """Removes all of a namespace, its flags and policy too; returns the bytes freed."""
        with self._gate:
            self._flags.clear(namespace)
            core = self._core
            with core.moving:  # or what is moved just now would stay
                with core.lock:
                    found = core.space.namespaces.get(namespace)
                    segments = list(found.segments.values()) if found is not None else []
                freed = sum(s.held_bytes for s in core.remove(segments))
            with core.lock:
                for location in [at for at, name in list(core.damaged_kept.items()) if name == namespace]:
                    core.damaged_kept.pop(location, None)
                if found is not None:
                    found.order = None
                core.space.forget_if_empty(namespace)
            return freed

    # ---- upkeep ----

    def tidy(self) -> None:
        """Drops what is too old, compacts what is mostly dead, keeps the disk from filling. For every second or so."""
        with self._gate:
            self._handing_out.expire(time.monotonic())
            tidy(self._core)

    def scrub(self, max_bytes: int) -> ScrubStep:
        """Verifies the next `max_bytes` or so of the store, going round; what is bad and may go is quarantined."""
        with self._gate:
            return self._scrub.step(max_bytes)

    def health(self) -> Health:
        """Whether the disk is in service."""
        return self._core.watch.health

    # ---- what is there ----

    def namespaces(self) -> list[NamespaceUsage]:
        """All namespaces, by name."""
        with self._gate, self._core.lock:
            return namespaces(self._core)

    def usage(self) -> StoreUsage:
        """Totals and counters."""
        with self._gate:
            return measured(self._core)

    # ---- durable records ----

    def get_record(self, key: bytes) -> bytes | None:
        """A record's value, or None."""
        with self._gate, disk_errors(f"read {_said(key)}"):
            return self._records.get(key)

    def put_record(self, key: bytes, value: bytes) -> None:
        """Stores a small record, durable on return; whole or not at all. Raises OutOfSpace, TorchCacheError."""
        with self._gate, disk_errors(f"write {_said(key)}"):
            self._records.put(key, value)

    def delete_record(self, key: bytes) -> None:
        """Removes a record, durably; absent is fine."""
        with self._gate, disk_errors(f"delete {_said(key)}"):
            self._records.delete(key)

    def records(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records whose key starts with `prefix`, by key."""
        with self._gate, disk_errors(f"read {_said(prefix)}"):
            return iter(list(self._records.items(prefix)))

    def close(self) -> None:
        """Waits for the calls under way and stops in order, so that the next start trusts the index. Idempotent."""
        if not self._gate.close():
            return
        core = self._core
        core.known = {}
        self._handing_out.close()
        try:
            _cut_recycled(core)
            core.index.close(
                {
                    s.number: SegmentNote(
                        s.tail, s.chunks, s.live_bytes, core.space.namespaces[s.header.namespace].last_used
                    )
                    for s in core.space.segments.values()
                    if not s.doubtful
                }
            )
            core.folder.mark_clean()
        except (OSError, OutOfSpace) as error:
            _log.warning("the store could not stop in order, the next start reads all segments: %s", error)
        finally:
            for segment in core.space.segments.values():
                segment.close(core.disk)
            core.folder.unlock()


def _cut_recycled(core: Core) -> None:
    """Frees what recycled files hold behind their tails: the next start counts up to there. Raises OSError."""
    for segment in core.space.segments.values():
        if segment.floor_bytes > page_aligned(segment.tail):
            segment.reopen(core.disk)
            segment.clear_behind(core.disk)


def _min_free_bytes(core: Core, asked: int | None) -> int:
    if asked is not None:
        return asked
    try:
        return min(core.disk.free_bytes(core.folder.path)[1] // 100, _MAX_MIN_FREE_BYTES)
    except OSError as error:
        _log.warning("the size of the disk of %s can't be told: %s", core.folder.path, error)
        return 0


def _said(key: bytes) -> str:
    """A record in words; behind the slash of its key is a digest."""
    return f"the {key.partition(b'/')[0].decode(errors='replace')} record"
