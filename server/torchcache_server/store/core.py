"""What the store's parts share: the open disk, index and space, one lock, and how segments leave.

Order of locks: that of the flags, `moving`, a namespace's `sync_lock`, the index's write transaction, `lock`, a
segment's `file_lock`.
`lock` guards the space and the spares; it is held for memory and for making, cutting and removing files, never while
payloads are written or synced.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from torchcache.errors import OutOfSpace, ServerUnavailable
from torchcache.records import Location, page_aligned
from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.disk import DiskCalls
from torchcache_server.store.folder import StoreFolder
from torchcache_server.store.health import Watch
from torchcache_server.store.index import Index
from torchcache_server.store.recycling import Spares
from torchcache_server.store.segments import Segment
from torchcache_server.store.space import Namespace, Space

_log = logging.getLogger(__name__)

MAX_KNOWN: Final = 32_768
"""Records remembered at a time: some 15 MB of small ones, 75 MB of full chunks."""

MAX_RESTING: Final = 128
"""Files that stay open for the next record of their namespaces."""


@dataclass(slots=True)
class Counts:
    """Since the store was opened. Its lock is held for nothing else, so that no look-up waits for a disk."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    evicted_chunks: int = 0
    expired_chunks: int = 0
    compacted_bytes: int = 0
    scrubbed_bytes: int = 0
    scrub_rounds: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def looked_up(self, *, hits: int, misses: int) -> None:
        """Counts look-ups."""
        with self._lock:
            self.hits += hits
            self.misses += misses

    def add(
        self,
        *,
        corrupt: int = 0,
        evicted_chunks: int = 0,
        expired_chunks: int = 0,
        compacted_bytes: int = 0,
        scrubbed_bytes: int = 0,
        scrub_rounds: int = 0,
    ) -> None:
        """Counts everything else."""
        with self._lock:
            self.corrupt += corrupt
            self.evicted_chunks += evicted_chunks
            self.expired_chunks += expired_chunks
            self.compacted_bytes += compacted_bytes
            self.scrubbed_bytes += scrubbed_bytes
            self.scrub_rounds += scrub_rounds


class Gate:
    """Lets calls in until it is closed, and closing wait for those inside."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inside = 0
        self._closed = False
        self._condition = threading.Condition(threading.Lock())

    def __enter__(self) -> None:
        with self._condition:
            if self._closed:
                raise ServerUnavailable(f"the store {self._name} is closed")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._inside -= 1
            if self._closed and not self._inside:
                self._condition.notify_all()

    def close(self) -> bool:
        """Returns once nobody is inside; False if it was closed already."""
        with self._condition:
            if self._closed:
                return False
            self._closed = True
            self._condition.wait_for(lambda: not self._inside)
            return True


class Known(NamedTuple):
    """A record whose header was found sound: what it is, and its chunk."""

    chunk_index: int
    identity: bytes
    chunk: StoredChunk


@dataclass
class Core:
    """The open store, without its public face."""

    disk: DiskCalls
    folder: StoreFolder
    index: Index
    space: Space
    spares: Spares
    min_free_bytes: int = 0  # of the file system, to be left alone
    watch: Watch = field(default_factory=Watch)
    lock: threading.Lock = field(default_factory=threading.Lock)
    moving: threading.Lock = field(default_factory=threading.Lock)  # one segment is emptied at a time
    counts: Counts = field(default_factory=Counts)
    clock: itertools.count[int] = field(
        default_factory=itertools.count
    )  # orders uses; no wall clock is asked
    resting: dict[int, Segment] = field(
        default_factory=dict
    )  # open for more records, written by nobody just now; those written longest ago come first

    damaged_kept: dict[Location, str] = field(
        default_factory=dict
    )  # records found damaged that must be kept all the same, and their namespaces
    known: dict[Location, Known] = field(default_factory=dict)  # read lately; replaced whole, never shrunk

    def learn(self, location: Location, segment: Segment, known: Known) -> None:
        """Remembers a sound record, so that the next look-up needn't read and check its header again."""
        if len(self.known) >= MAX_KNOWN:
            self.known = {}
        self.known[location] = known
        if segment.dropped:
            self.known = {}  # or the view would keep the file's space

    def touch(self, segment: Segment, key: bytes) -> None:
        """Notes that a chunk of the segment is in use, and with it its namespace."""
        namespace = self.space.namespaces.get(segment.header.namespace)
        if namespace is not None:
            self.used(namespace)
            if namespace.order is not None:
                namespace.order.used(key)

    def used(self, namespace: Namespace) -> None:
        """Notes that the namespace is in use."""
        namespace.last_used = next(self.clock)
        namespace.used_s = time.monotonic()

    def is_kept(self, segment: Segment) -> bool:
        """Whether what the segment holds may exist nowhere else."""
        namespace = self.space.namespaces.get(segment.header.namespace)
        return namespace is not None and namespace.kept

    def free_bytes(self) -> int:
        """What the file system has left."""
        try:
            return self.disk.free_bytes(self.folder.path)[0]
        except OSError as error:
            _log.warning("the room on the disk of %s can't be told: %s", self.folder.path, error)
            return self.min_free_bytes

    def remove(self, segments: Iterable[Segment], *, unless_in_use: bool = False) -> list[Segment]:
        """Unlinks segments; returns those that went by this call.

        Who reads one has its mapping still, who writes into one finishes and finds that nothing came of it. With
        `unless_in_use` those that are written to, pinned or kept by now are left out.
        """
        removed: list[Segment] = []
        try:
            with self.index.writing() as writer:
                with self.lock:
                    for segment in segments:
                        if not segment.dropped and not (unless_in_use and self._in_use(segment)):
                            self.space.remove(segment)
                            removed.append(segment)
                for segment in removed:
                    writer.delete_segment(segment.number)
        except OutOfSpace as error:
            # Harmless: what points to a segment that is gone is a miss. Freeing the room is what helps now.
            _log.warning("evicted chunks stay in the index: %s", error)
        self.known = {}  # their views would keep the files' space
        for segment in removed:
            self._retire(segment)
        return removed

    def rest(self, segment: Segment) -> None:
        """Closes the files written longest ago, where many are open: every namespace has one. Under `lock`."""
        if segment.writing or segment.sealed:
            return
        self.resting.pop(segment.number, None)
        self.resting[segment.number] = segment
        for number in list(self.resting)[:-MAX_RESTING]:
            idle = self.resting[number]
            if idle.writing or idle.try_close(self.disk):
                del self.resting[number]

    def close_if_done(self, segment: Segment) -> None:
        """Closes a sealed segment's file once nobody writes into it; one that must be kept is synced before."""
        with self.lock:
            if not segment.sealed or segment.writing:
                return
            self.resting.pop(segment.number, None)
            if segment.fd is None:
                return
            namespace = self.space.namespaces.get(segment.header.namespace)
        if namespace is not None and namespace.kept and not segment.dropped:
            # Spreads the cost of the sync that will come, and its descriptors need not pile up until then.
            try:
                segment.sync(self.disk)
            except OSError as error:
                # The segment remembers, and refuses whoever asks for durability.
                _log.error("segment %s can't be synced: %s", segment.path, error)
        if segment.floor_bytes > page_aligned(segment.tail) and segment.clear_behind(self.disk):
            with self.lock:
                self.space.trimmed(segment)
        segment.close(self.disk)

    def _in_use(self, segment: Segment) -> bool:
        return bool(segment.writing) or self.space.namespaces[segment.header.namespace].protected

    def _retire(self, segment: Segment) -> None:
        """Makes the file a spare, or unlinks it."""
        try:
            if not self._spared(segment):
                self.disk.unlink(segment.path)
                with self.lock:
                    self.spares.unlinked(segment.unmapped, segment.held_bytes)
        except OSError as error:
            # It is forgotten all the same: the next start finds a file that no index knows and reads it again.
            _log.warning("segment %s can't be unlinked: %s", segment.path, error)
        with self.lock:
            if self.space.forget_if_empty(segment.header.namespace):
                try:
                    self.disk.remove_dir(os.path.dirname(segment.path))
                except OSError as error:
                    _log.warning("an empty folder stays: %s", error)
        self.close_if_done(segment)

    def _spared(self, segment: Segment) -> bool:
        with self.lock:
            if segment.writing:  # somebody still writes into it
                return False
            if not segment.file_lock.acquire(
                blocking=False
            ):  # a sync may take seconds; `lock` is everybody's
                return False
            try:
                return self._keep_spare(segment)
            finally:
                segment.file_lock.release()

    def _keep_spare(self, segment: Segment) -> bool:
        held = self.space.used_bytes + self.spares.bytes + segment.held_bytes
        if held > self.space.capacity_bytes:  # it was emptied into a full store
            return False
        try:
            return self.spares.keep(segment)
        except OSError as error:
            _log.warning("segment %s can't be used again: %s", segment.path, error)
            return False
