"""Fetching before use, by the orders that readers told: in their order, ahead by a bounded amount.

Readers name the chunks, a stretch of their order at a time, and ask again until all are here: nothing is queued for
long, so what a server remembers of a reader that went away is small, and is forgotten with its order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush
from typing import Final, NamedTuple

import numpy as np

from torchcache.errors import ConfigurationError, OutOfSpace, Overloaded, TorchCacheError, TransientError
from torchcache.marks import Marks
from torchcache.model import ChunkId, ObjectInfo
from torchcache_server.cache.fill_queue import Need
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import Store, StoredChunk
from torchcache_server.store.epochs import Epoch, Positions
from torchcache_server.store.foresight import Standing

LEASE_S: Final = 60.0
"""An order is forgotten when its reader hasn't called for so long."""

MAX_CHUNKS: Final = 24_000_000
"""Of all orders told: some 480 MB. A dataset of 10 million samples on one server, the running epoch and the next."""

MAX_ORDERS: Final = 1024

COMING: Final = 64
"""Chunks of one order being fetched at a time."""

WAIT_S: Final = 10.0
"""What isn't fetched by then, others being in front, is asked for again."""

_log = logging.getLogger(__name__)


class State(IntEnum):
    """How it is with a chunk, by the numbers of the wire."""

    HERE = 0
    COMING = 1
    LATER = 2
    READ = 3
    FAILED = 4


class Wanted(NamedTuple):
    """A chunk of an order: `position` is the number of the sample that reads it."""

    object: ObjectInfo
    chunk: int
    position: int


class Piece(NamedTuple):
    """A part of an order, as it is told. Checked already, but for what it needs to know of the others."""

    namespace: str
    order: str
    epoch: int
    length: int
    total: int
    first: int
    marks: Marks
    positions: Positions
    running: bool


class Ahead(NamedTuple):
    """How far a server is ahead of a reader."""

    namespace: str
    standing: Standing
    ahead_bytes: int
    coming_chunks: int
    fetched_bytes: int


@dataclass(slots=True)
class _Telling:
    """An epoch of which not all pieces have come."""

    marks: Marks
    positions: Positions
    begun_s: float
    filled: int = 0


@dataclass(slots=True)
class _Work:
    """What is done for one order."""

    coming: dict[ChunkId, Future[StoredChunk]] = field(default_factory=dict)
    failed: dict[ChunkId, TorchCacheError] = field(default_factory=dict)
    ahead: list[tuple[int, int, int]] = field(default_factory=list)  # a heap of epoch, position, bytes
    ahead_bytes: int = 0
    coming_bytes: int = 0
    fetched_bytes: int = 0

    def reached(self, standing: Standing) -> None:
        """What has been read is no longer ahead."""
        place = (standing.epoch, standing.position)
        while self.ahead and self.ahead[0][:2] < place:
            self.ahead_bytes -= heappop(self.ahead)[2]


class StageAhead:
    """Thread-safe."""

    def __init__(self, store: Store, read_through: ReadThrough) -> None:
        self._store = store
        self._read_through = read_through
        self._lock = threading.Lock()
        self._telling: dict[tuple[str, str, int], _Telling] = {}
        self._works: dict[tuple[str, str], _Work] = {}
        self._limit_bytes = store.usage().capacity_bytes // 2

    def tell(self, piece: Piece) -> None:
        """Takes in a piece of an order, and the epoch once all have come. Raises ConfigurationError, Overloaded."""
        key = piece[:3]
        with self._lock:
            if piece.first == 0:
                self._make_room(piece)
                self._telling[key] = _Telling(
                    np.empty(piece.total, np.uint64), np.empty(piece.total, np.uint32), time.monotonic()
                )
            told = self._telling.get(key)
            end = piece.first + len(piece.marks)
            if told is None or told.filled != piece.first or end > len(told.marks):
                self._telling.pop(key, None)
                raise ConfigurationError("a piece of an order that doesn't follow the one before")
            told.marks[piece.first : end], told.positions[piece.first : end] = piece.marks, piece.positions
            told.filled = end
            if end < len(told.marks):
                return
            del self._telling[key]
        if len(told.positions) > 1 and bool((told.positions[1:] < told.positions[:-1]).any()):
            raise ConfigurationError("an order whose positions don't ascend")
        epoch = Epoch(told.marks, told.positions, length=piece.length, running=piece.running)
        self._store.foresight(piece.namespace).tell(piece.order, piece.epoch, epoch, LEASE_S)

    def _make_room(self, piece: Piece) -> None:
        """Raises Overloaded if there are too many orders, or too large ones. Under the lock."""
        old = time.monotonic() - LEASE_S
        self._telling = {key: telling for key, telling in self._telling.items() if telling.begun_s > old}
        self._forget_gone()
        known = self._store.foresights()
        chunks = sum(foresight.chunks for foresight in known.values())
        chunks += sum(len(telling.marks) for telling in self._telling.values())
        orders = sum(len(foresight.standings()) for foresight in known.values())
        if chunks + piece.total > MAX_CHUNKS or orders >= MAX_ORDERS or len(self._telling) >= MAX_ORDERS:
            raise Overloaded(
                f"{orders} orders of {chunks:,} chunks are known: {MAX_ORDERS} of {MAX_CHUNKS:,} are the server's "
                "bounds. It goes without this one, as if nobody knew it"
            )

    def stage(
        self, namespace: str, order: str, epoch: int, wanted: Sequence[Wanted], *, running: int | None
    ) -> tuple[Standing, int, list[tuple[State, TorchCacheError | None]]] | None:
        """Has the chunks fetched, those first that come first. None: the order isn't known.

        Returns where the reader is, the bytes that are ahead of it, and how it is with each chunk.
        """
        foresight = self._store.foresights().get(namespace)
        if foresight is None or not foresight.renew(order, LEASE_S, running=running):
            return None
        standing = foresight.standing(order)
        if standing is None:
            return None
        with self._lock:
            work = self._works.setdefault((namespace, order), _Work())
            work.reached(standing)
        need: Need = "soon" if epoch == standing.epoch and standing.position >= 0 else "later"
        states: list[tuple[State, TorchCacheError | None]] = []
        go_on = True
        for one in wanted:
            state, error = State.READ, None
            if epoch > standing.epoch or (epoch == standing.epoch and one.position >= standing.position):
                state, error = self._state(namespace, work, epoch, one, need=need, start=go_on)
            go_on = go_on and state is not State.LATER
            states.append((state, error))
        return standing, work.ahead_bytes, states

    def forget(self, namespace: str, order: str) -> None:
        """The reader goes; unknown is fine."""
        foresight = self._store.foresights().get(namespace)
        if foresight is not None:
            foresight.forget(order)
        with self._lock:
            self._works.pop((namespace, order), None)

    def standings(self) -> list[Ahead]:
        """How it is with every order."""
        found: list[Ahead] = []
        with self._lock:
            self._forget_gone()
        for namespace, foresight in sorted(self._store.foresights().items()):
            for standing in foresight.standings():
                with self._lock:
                    work = self._works.get((namespace, standing.order)) or _Work()
                    work.reached(standing)
                    found.append(
                        Ahead(namespace, standing, work.ahead_bytes, len(work.coming), work.fetched_bytes)
                    )
        return found

    def _forget_gone(self) -> None:
        known = {
            (namespace, standing.order)
            for namespace, foresight in self._store.foresights().items()
            for standing in foresight.standings()
        }
        self._works = {key: work for key, work in self._works.items() if key in known}

    def _state(
        self, namespace: str, work: _Work, epoch: int, one: Wanted, *, need: Need, start: bool
    ) -> tuple[State, TorchCacheError | None]:
        chunk = ChunkId(one.object.id, one.chunk)
        with self._lock:
            failure = work.failed.pop(chunk, None)
            if failure is not None:
                late = isinstance(failure, OutOfSpace | TransientError)
                return (State.LATER, None) if late else (State.FAILED, failure)
            if chunk in work.coming:
                return State.COMING, None
            full = len(work.coming) >= COMING or work.ahead_bytes + work.coming_bytes >= self._limit_bytes
        if full or not start:
            return (State.HERE if self._store.contains(chunk) else State.LATER), None
        try:
            future = self._read_through.ahead(
                namespace, one.object, one.chunk, need=need, deadline=time.monotonic() + WAIT_S
            )
        except TorchCacheError as error:
            return State.FAILED, error
        if future is None:
            return State.HERE, None
        with self._lock:
            work.coming[chunk] = future
            work.coming_bytes += chunk.length(one.object.size)
        future.add_done_callback(
            lambda done: self._ended(work, chunk, done, (epoch, one.position, chunk.length(one.object.size)))
        )
        return State.COMING, None

    def _ended(
        self, work: _Work, chunk: ChunkId, done: Future[StoredChunk], place: tuple[int, int, int]
    ) -> None:
        error = done.exception()
        with self._lock:
            work.coming.pop(chunk, None)
            work.coming_bytes -= place[2]
            if error is None:
                heappush(work.ahead, place)  # fetches end in another order than they are read in
                work.ahead_bytes += place[2]
                work.fetched_bytes += place[2]
            elif isinstance(error, TorchCacheError):
                work.failed[chunk] = error
            else:
                _log.error(
                    "fetching chunk %d of %s ahead of use failed", chunk.index, chunk.object, exc_info=error
                )
                work.failed[chunk] = TorchCacheError("the server met an unexpected error; its log says more")
