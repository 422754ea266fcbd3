"""Filling the pool ahead of use, and asking what it holds."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torchcache.errors import TorchCacheError
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.flight import object_refs
from torchcache.model import CHUNK_BYTES, STRIPE_BYTES, UNKNOWN_SIZE, Extent, ObjectInfo
from torchcache.placement import placement_key
from torchcache.pool.reads import Reading
from torchcache.pool.reports import Residency
from torchcache.pool.retry import Retry
from torchcache.pool.session import Session
from torchcache.wire.status import decode_error
from torchcache.wire.v1 import cache_pb2

STAGE_S: Final = 120.0
RESIDENCY_S: Final = 30.0

BATCH_OBJECTS: Final = 128
BATCH_BYTES: Final = 64 * 1024 * 1024
"""Of one stage call: small, so that progress shows, cancelling works, and a fork does not wait long."""

REF_BYTES: Final = 1024 * 1024
"""Of the references in one residency call, well below a control message's bound."""

WORKERS: Final = 4
"""Calls under way at a time: while one waits for its last object the others keep the servers busy."""


OnMissing = Callable[[ObjectInfo, TorchCacheError], object]
"""Gets an object that can't be staged, and why, in the caller's thread; a large one for each of its parts."""

Failures = Sequence[tuple[ObjectInfo, TorchCacheError]]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call stages: whole small objects of one owner, or some chunks of a large one (`last`: the last)."""

    objects: Sequence[ObjectInfo]
    chunks: range | None = None
    last: bool = True

    @property
    def bytes(self) -> int:
        if self.chunks is None:
            return sum(max(o.size, 0) for o in self.objects)
        size = self.objects[0].size
        return min(size, self.chunks.stop * CHUNK_BYTES) - self.chunks.start * CHUNK_BYTES


def batches(objects: Sequence[ObjectInfo], owner: Callable[[ObjectInfo], str]) -> Iterator[Batch]:
    """The calls that stage `objects`, nearly in their order. Objects of more than a stripe go chunk by chunk."""
    open_batches: dict[str, tuple[list[ObjectInfo], int]] = {}
    for info in objects:
        if info.size > STRIPE_BYTES:
            step = BATCH_BYTES // CHUNK_BYTES
            for first in range(0, info.chunk_count, step):
                stop = min(first + step, info.chunk_count)
                yield Batch([info], range(first, stop), stop == info.chunk_count)
            continue
        server = owner(info)
        held, size = open_batches.get(server, ([], 0))
        held.append(info)
        size += max(info.size, 0)
        if len(held) >= BATCH_OBJECTS or size >= BATCH_BYTES:
            yield Batch(held)
            open_batches.pop(server, None)
        else:
            open_batches[server] = (held, size)
    for held, _ in open_batches.values():
        yield Batch(held)


class Staging:
    """One `stage`: workers take batches and report; the caller's thread counts, shows progress and may cancel."""

    def __init__(self, session: Session, namespace: str) -> None:
        self._session = session
        self._namespace = namespace
        self._stopped = threading.Event()
        self._reports: queue.SimpleQueue[tuple[Batch, Failures] | BaseException | None] = queue.SimpleQueue()

    def run(
        self,
        objects: Sequence[ObjectInfo],
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
        on_missing: OnMissing | None,
    ) -> None:
        """See `Pool.stage`."""
        deadline = time.monotonic() + STAGE_S
        members = self._session.first_members(Retry(self._session.budget, deadline), deadline)
        ordering = self._session.ordering
        todo = deque(batches(objects, lambda info: ordering.owner(placement_key(info.id, 0), members)))
        threads = [
            threading.Thread(target=self._work, args=(todo,), daemon=True)
            for _ in range(min(WORKERS, len(todo)))
        ]
        for thread in threads:
            thread.start()
        try:
            failure = self._collect(len(threads), on_progress, cancelled, on_missing)
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()
        if failure is not None:
            raise failure

    def _collect(
        self,
        workers: int,
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
        on_missing: OnMissing | None,
    ) -> BaseException | None:
        failure: BaseException | None = None
        while workers:
            if cancelled is not None and cancelled():
                self._stopped.set()
            report = self._reports.get()
            if report is None:
                workers -= 1
            elif isinstance(report, BaseException):
                failure = failure or report
            else:
                batch, failures = report
                for info, error in failures:
                    if on_missing is None:
                        failure = failure or error
                    else:
                        on_missing(info, error)
                if on_progress is not None:
                    on_progress(len(batch.objects) if batch.last else 0, batch.bytes)
        return failure

    def _work(self, todo: deque[Batch]) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    batch = todo.popleft()
                except IndexError:
                    break
                self._reports.put((batch, self._stage(batch)))
        except BaseException as error:  # noqa: BLE001 - raised again where the caller waits
            self._reports.put(error)
        finally:
            self._reports.put(None)

    def _stage(self, batch: Batch) -> Failures:
        """Stages one batch; what can't be, and why."""
        try:
            return self._touch(batch) if batch.chunks is not None else self._fill(batch)
        except TorchCacheError as error:
            return [(info, error) for info in batch.objects]

    def _fill(self, batch: Batch) -> Failures:
        refs, _ = object_refs(batch.objects)
        request = cache_pb2.StageRequest(namespace=self._namespace, objects=refs)
        key = placement_key(batch.objects[0].id, 0)
        asked = self._session.ask("Stage", request, key=key, timeout_s=STAGE_S)
        return [
            (info, decode_error(text, server=asked.member.address))
            for info, text in zip(batch.objects, asked.reply.errors, strict=False)
            if text
        ]

    def _touch(self, batch: Batch) -> Failures:
        """Reads one byte of each chunk: every chunk is filled by its own owner, and little of it travels."""
        info = batch.objects[0]
        extents = [Extent(info, index * CHUNK_BYTES, 1) for index in batch.chunks or ()]
        deadline = time.monotonic() + STAGE_S
        outcomes = Reading(
            self._session, extents, None, ReadOptions(namespace=self._namespace), deadline
        ).run()
        return [(info, outcome) for outcome in outcomes if isinstance(outcome, TorchCacheError)][:1]


def residency(session: Session, objects: Sequence[ObjectInfo]) -> Residency:
    """See `Pool.residency`."""
    held_bytes, whole = _held(session, objects)
    sizes = [max(info.size, 0) for info in objects]
    known = [info.size != UNKNOWN_SIZE for info in objects]
    return Residency(
        objects=len(objects),
        resident_objects=sum(
            w or (k and size > 0 and held >= size)
            for w, k, size, held in zip(whole, known, sizes, held_bytes, strict=True)
        ),
        bytes=sum(sizes),
        resident_bytes=sum(map(min, sizes, held_bytes)),
    )


def resident_bytes(session: Session, objects: Sequence[ObjectInfo]) -> list[int]:
    """See `Pool.resident_bytes`."""
    held_bytes, _ = _held(session, objects)
    return [min(max(info.size, 0), held) for info, held in zip(objects, held_bytes, strict=True)]


def _held(session: Session, objects: Sequence[ObjectInfo]) -> tuple[list[int], list[bool]]:
    """Of each object the bytes held by all servers together, and whether one holds it whole."""
    held_bytes = [0] * len(objects)
    whole = [False] * len(objects)
    for numbers in _reference_batches(objects):
        request = cache_pb2.ResidencyRequest()
        for number in numbers:
            request.objects.append(_ref(objects[number]))
        for asked in session.ask_each("GetResidency", request, timeout_s=RESIDENCY_S):
            for number, held in zip(numbers, asked.reply.resident_bytes, strict=False):
                held_bytes[number] += held
            for index in asked.reply.resident_objects:
                if index < len(numbers):
                    whole[numbers[index]] = True
    return held_bytes, whole


def _ref(info: ObjectInfo) -> cache_pb2.ObjectRef:
    id_ = info.id
    return cache_pb2.ObjectRef(store=id_.store, key=id_.key, version=id_.version, size=info.size)


def _reference_batches(objects: Sequence[ObjectInfo]) -> Iterator[range]:
    """The objects' numbers, in runs whose references fit one call."""
    first = size = 0
    for number, info in enumerate(objects):
        size += len(info.id.encoded) + 24
        if size >= REF_BYTES:
            yield range(first, number + 1)
            first, size = number + 1, 0
    if first < len(objects):
        yield range(first, len(objects))
