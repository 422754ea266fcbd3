"""Reads of chunks: from the store, else from the under-store, once for all who ask at the same time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final

from torchcache.errors import ConfigurationError, IntegrityError, NotResident, OutOfSpace, TorchCacheError
from torchcache.model import ByteRange, ChunkId, ObjectInfo
from torchcache_server.cache.fill_queue import Fill, FillQueue, Loan, Need
from torchcache_server.store import Promise, Store, StoredChunk
from torchcache_server.understore import UnderStore, choose

_LOG = logging.getLogger(__name__)

_MIB = 1024 * 1024
_FILL_S = 30.0
"""What a fill may take once it has started, if those who wait have less patience: it is of use to the next."""

FILL_THREADS: Final = 128
"""How many small objects are fetched at a time. 200 MB/s from storage that is 50 ms away are 87 of 114,660 B under way,
and others are being stored meanwhile."""

SLOW_FETCH_S: Final = 5.0
"""A fetch that takes longer is logged."""


class ReadThrough:
    """Hands out chunks. Thread-safe."""

    def __init__(
        self,
        store: Store,
        under_stores: Mapping[str, UnderStore],
        *,
        fill_threads: int = FILL_THREADS,
        inflight_bytes: int = 512 * _MIB,
    ) -> None:
        self.store = store
        self.tell_damaged: Callable[[ChunkId], None] = lambda chunk: None
        """Called with a chunk of a save that a reader found damaged here."""
        self._under_stores = under_stores
        self._queue = FillQueue(threads=fill_threads, limit_bytes=inflight_bytes)
        self._flights: dict[ChunkId, Fill] = {}
        self._lock = threading.Lock()
        self._passed_through = 0
        self._filled_chunks = 0
        self._filled_bytes = 0

    @property
    def passed_through(self) -> int:
        """Chunks served without being kept, because the store had no room."""
        return self._passed_through

    @property
    def filled_chunks(self) -> int:
        """Chunks fetched from under-stores."""
        return self._filled_chunks

    @property
    def filled_bytes(self) -> int:
        """Bytes fetched from under-stores."""
        return self._filled_bytes

    @property
    def filling_bytes(self) -> int:
        """Bytes being fetched from under-stores now."""
        return self._queue.running_bytes

    @property
    def waiting_fills(self) -> int:
        """Chunks that are to be fetched from under-stores, and wait for their turn."""
        return self._queue.waiting

    @property
    def refused_fills(self) -> int:
        """Chunks whose turn to be fetched didn't come by the deadline of those who waited."""
        return self._queue.refused

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
        """Chunk `index` of `object`: itself if it is resident, else the future of its fill. Never blocks on a fill.

        The future is shared by all who asked: it can't be cancelled, and it may end after `deadline`, so give its
        `result` a timeout. `suspect`: a reader saw a wrong checksum; the chunk is verified, and filled again if bad.

        Raises NotResident for what isn't here and can't be fetched (computed samples, files of saves) or must not be
        (`resident_only`), IntegrityError for a damaged file of a save, ConfigurationError, ServerUnavailable.
        """
        chunk = ChunkId(object.id, index)
        if suspect:
            self._verify(chunk)
        found = self.store.lookup(chunk)
        if found is not None:
            return found
        return self._miss(namespace, object, chunk, deadline, resident_only=resident_only)

    def get_many(
        self,
        namespace: str,
        wanted: Sequence[tuple[ObjectInfo, int]],
        *,
        deadline: float,
        resident_only: bool = False,
    ) -> list[StoredChunk | Future[StoredChunk] | TorchCacheError]:
        """`get` for many (object, index) at once, for less than many calls cost; what it would raise is an answer."""
        chunks = [ChunkId(object.id, index) for object, index in wanted]
        answers: list[StoredChunk | Future[StoredChunk] | TorchCacheError] = []
        for (object, _), chunk, found in zip(wanted, chunks, self.store.lookup_many(chunks), strict=True):
            if found is not None:
                answers.append(found)
                continue
            try:
                answers.append(self._miss(namespace, object, chunk, deadline, resident_only=resident_only))
            except TorchCacheError as error:
                answers.append(error)
        return answers

    def ahead(
        self, namespace: str, object: ObjectInfo, index: int, *, need: Need, deadline: float
    ) -> Future[StoredChunk] | None:
        """Fetches chunk `index` before it is read; None if it is here. Counts as no use of it.

        The future ends with OutOfSpace, and nothing is fetched, if all that is here is needed sooner, or must stay.
        Raises NotResident for what has no under-store, ConfigurationError, ServerUnavailable.
        """
        chunk = ChunkId(object.id, index)
        if self.store.contains(chunk):
            return None
        if object.id.is_sample or object.id.is_save:
            raise _not_resident(object)
        with self._lock:
            flight = self._flights.get(chunk)
            if flight is not None:
                return flight.future
            if self.store.contains(chunk):
                return None
            flight = self._start(namespace, object, chunk, need=need, deadline=deadline)
        flight.future.add_done_callback(lambda landed: self._land(chunk, landed))
        return flight.future

    def close(self) -> None:
        """Fails the fills that wait. May be called twice."""
        self._queue.close()

    def _miss(
        self, namespace: str, object: ObjectInfo, chunk: ChunkId, deadline: float, *, resident_only: bool
    ) -> StoredChunk | Future[StoredChunk]:
        if resident_only or object.id.is_sample or object.id.is_save:
            raise _not_resident(object)
        return self._fly(namespace, object, chunk, deadline)

    def _verify(self, chunk: ChunkId) -> None:
        """Takes a damaged chunk out of the store."""
        if not self.store.contains(chunk) or self.store.verify(chunk):
            return
        if chunk.object.is_save:
            # Not quarantined: it may be the only copy.
            self.tell_damaged(chunk)
            raise IntegrityError(
                f"chunk {chunk.index} of {chunk.object} is damaged on this server's disk; load another checkpoint",
                object=str(chunk.object),
            )
        _LOG.warning("chunk %d of %s is damaged on disk: quarantined", chunk.index, chunk.object)
        self.store.quarantine(chunk)

    def _fly(
        self, namespace: str, object: ObjectInfo, chunk: ChunkId, deadline: float
    ) -> StoredChunk | Future[StoredChunk]:
        """Joins the chunk's flight, or starts one."""
        with self._lock:
            flight = self._flights.get(chunk)
            if flight is not None:
                if flight.need != "now":
                    self.store.note_use(namespace, chunk)  # once: who joins later is served by the same fetch
                self._queue.extend(flight, deadline)
                return flight.future
            # A flight may have landed since the look-up.
            if self.store.contains(chunk) and (found := self.store.lookup(chunk)) is not None:
                return found
            flight = self._start(namespace, object, chunk, need="now", deadline=deadline)
        flight.future.add_done_callback(lambda landed: self._land(chunk, landed))
        return flight.future

    def _start(
        self, namespace: str, object: ObjectInfo, chunk: ChunkId, *, need: Need, deadline: float
    ) -> Fill:
        """Starts the chunk's flight. Under the lock."""
        under_store = self._under_store(object)

        # It is told its flight, and refers to none: in a cycle both would keep the chunk until they are collected.
        def work(flight: Fill, loan: Loan, until: float) -> StoredChunk:
            room = self._room(flight, namespace, chunk, ahead_of_use=need != "now")
            return self._fill(
                namespace, object, chunk, under_store=under_store, room=room, loan=loan, deadline=until
            )

        name, length = f"chunk {chunk.index} of {object.id}", chunk.length(object.size)
        flight = Fill(name, length, work, deadline, need=need)
        self._queue.submit(flight)
        self._flights[chunk] = flight
        return flight

    def _land(self, chunk: ChunkId, landed: Future[StoredChunk]) -> None:
        with self._lock:
            flight = self._flights.get(chunk)
            if flight is not None and flight.future is landed:
                del self._flights[chunk]

    def _fill(
        self,
        namespace: str,
        object: ObjectInfo,
        chunk: ChunkId,
        *,
        under_store: UnderStore,
        room: Promise | None,
        loan: Loan,
        deadline: float,
    ) -> StoredChunk:
        """Fetches a chunk and stores it; where there is no room for it, hands it on as it is."""
        length, began = chunk.length(object.size), time.monotonic()
        try:
            data = under_store.read(
                object,
                ByteRange(chunk.offset, chunk.offset + length),
                deadline=max(deadline, began + _FILL_S),
            )
            _tell_fetch(chunk, len(data), time.monotonic() - began)
            with self._lock:
                self._filled_chunks += 1
                self._filled_bytes += len(data)
            stored = self._kept(namespace, object, chunk, data, room)
        finally:
            if room is not None:
                room.release()
        if stored is None:
            with self._lock:
                self._passed_through += 1
            return StoredChunk.of(loan.tie_to(data), object.size)
        loan.release()
        return stored

    def _room(self, flight: Fill, namespace: str, chunk: ChunkId, *, ahead_of_use: bool) -> Promise | None:
        """Asked for before the fetch: many fills at once could never all be kept.

        Without any, what a reader waits for is fetched all the same; for what nobody does, OutOfSpace is raised.
        """
        try:
            return self.store.reserve(namespace, chunk, flight.bytes, ahead_of_use=ahead_of_use)
        except OutOfSpace as error:
            with self._lock:
                if flight.need != "now":
                    self._flights.pop(chunk, None)  # or a reader could still join
                    raise
            _LOG.debug("chunk %d of %s will not be kept: %s", chunk.index, chunk.object, error)
            return None

    def _kept(
        self, namespace: str, object: ObjectInfo, chunk: ChunkId, data: bytearray, room: Promise | None
    ) -> StoredChunk | None:
        if room is None:
            return None
        try:
            return self.store.put(namespace, chunk, object.size, data, promised=room)
        except OutOfSpace as error:
            _LOG.debug("chunk %d of %s is not kept: %s", chunk.index, chunk.object, error)
            return None

    def _under_store(self, object: ObjectInfo) -> UnderStore:
        under_store = choose(self._under_stores, object.id.store, object=str(object.id))
        if object.size < 0:
            raise ConfigurationError(f"the size of {object.id} is needed to read it", object=str(object.id))
        return under_store


def _tell_fetch(chunk: ChunkId, size: int, took_s: float) -> None:
    level = logging.INFO if took_s >= SLOW_FETCH_S else logging.DEBUG
    if _LOG.isEnabledFor(level):
        text = "chunk %d of %s, %d bytes, came from the under-store in %.3f s"
        _LOG.log(level, text, chunk.index, chunk.object, size, took_s)


def _not_resident(object: ObjectInfo) -> NotResident:
    if object.id.is_sample:
        what = "is a computed sample that isn't in the pool (any more); compute it again"
    elif object.id.is_save:
        what = "isn't held by this server (any more); read it from the under-store"
    else:
        what = "isn't resident, and the read was to stay within the pool; stage it first"
    return NotResident(f"{object.id} {what}", object=str(object.id))
