"""One read: from a plan to the batches of its stream.

As long as what is asked for is resident, batches go out as they are looked up, first one, then two, four and so on:
the client has work at once, and Python runs in long stretches. From the first chunk that misses on, all the rest are
looked up before anything goes out and their fills started, so that a cold request waits for its slowest fill and not
for the sum of them. How far ahead is bounded. Resident extents go first; those that wait for a fill follow in their
order, as they become ready.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple, TypeAlias

import pyarrow as pa

from torchcache.errors import ConfigurationError, DeadlineExceeded, ObjectChanged, TorchCacheError
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ObjectInfo, block_cover
from torchcache.wire.codec import BATCH_BYTES, BATCH_ROWS, Piece, encode_pieces, failed_piece
from torchcache.wire.status import encode_error
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import StoredChunk

from .interceptors import UNEXPECTED
from .requests import ReadPlan

AHEAD_CHUNKS: Final = 1024
"""Chunks looked up before a batch goes out."""

AHEAD_BYTES: Final = 32 * CHUNK_BYTES
"""Bytes of one request that may be on their way from the under-store, or wait for the client, at a time."""

_LOG = logging.getLogger(__name__)
_DIGEST: Final = struct.Struct("<Q")

WINDOW_BYTES: Final = 16 * BATCH_BYTES
"""Resident bytes looked up at once, from the fourth round on; the first is one batch, so that the client has work."""

Answer: TypeAlias = StoredChunk | Future[StoredChunk] | TorchCacheError


class _Part(NamedTuple):
    """The part [start, end) of an object that lies in chunk number `chunk`."""

    extent: int
    object: ObjectInfo
    chunk: int
    start: int
    end: int
    answer: Answer

    @property
    def length(self) -> int:
        """Bytes of the chunk."""
        return max(0, min(CHUNK_BYTES, self.object.size - self.chunk * CHUNK_BYTES))


class Read:
    """The pieces of one request. `batches` may be taken once."""

    def __init__(self, plan: ReadPlan, read_through: ReadThrough) -> None:
        self._plan = plan
        self._read_through = read_through
        self._deadline = time.monotonic() + plan.timeout_s
        self._failed: set[int] = set()
        self.sent_bytes = 0
        """Of payload, in the batches taken so far."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The stream's batches. An extent that fails has a row that says so; nothing is raised for it."""
        for pieces in self._rounds():
            # All of a round is encoded before any is sent: sending 2 MiB leaves nothing of Python in the CPU's cache.
            for batch, size in [encoded(group) for group in batched(pieces)]:
                self.sent_bytes += size
                yield batch

    def _rounds(self) -> Iterator[list[Piece]]:
        """Pieces, in portions: what is found resident, more each time, then what the fills bring."""
        parts = self._parts()
        waiting: deque[_Part] = deque()
        window_bytes = BATCH_BYTES
        while True:
            ready = self._look_ahead(parts, waiting, window_bytes)
            window_bytes = min(2 * window_bytes, WINDOW_BYTES)
            if ready:
                yield [self._piece(part, found) for part, found in ready]
            elif waiting:
                yield self._filled(waiting)
            else:
                return

    def _look_ahead(
        self, parts: Iterator[_Part], waiting: deque[_Part], window_bytes: int
    ) -> list[tuple[_Part, StoredChunk | TorchCacheError]]:
        """The next parts that are there, about `window_bytes` of them; those that aren't are put behind `waiting`."""
        ready: list[tuple[_Part, StoredChunk | TorchCacheError]] = []
        ready_bytes = 0
        filling_bytes = sum(part.length for part in waiting if isinstance(part.answer, Future))
        while len(ready) + len(waiting) < AHEAD_CHUNKS and filling_bytes < AHEAD_BYTES:
            if ready_bytes >= window_bytes and not waiting:
                break
            part = next(parts, None)
            if part is None:
                break
            answer = part.answer
            if isinstance(answer, Future):
                waiting.append(part)
                filling_bytes += part.length
            elif waiting and waiting[-1].extent == part.extent:
                waiting.append(part)  # the rows of an extent come in order
            else:
                ready.append((part, answer))
                ready_bytes += part.length
        return ready

    def _filled(self, waiting: deque[_Part]) -> list[Piece]:
        """The first of `waiting`, as soon as it is there, and those behind it that are there too: at most a batch."""
        pieces: list[Piece] = []
        size = 0
        while waiting and size < BATCH_BYTES:
            answer = waiting[0].answer
            if pieces and isinstance(answer, Future) and not answer.done():
                break
            part = waiting.popleft()
            if part.extent in self._failed:
                continue
            if isinstance(answer, Future):
                answer = self._result(answer, part.object)
            pieces.append(self._piece(part, answer))
            size += part.length
        return pieces

    def _parts(self) -> Iterator[_Part]:
        """Every part of every extent, its chunk looked up, or its fill started, when the part is taken."""
        plan = self._plan
        for extent, (number, start, asked_end) in enumerate(
            zip(plan.object, plan.start, plan.end, strict=True)
        ):
            info, end = plan.objects[number], asked_end
            head: StoredChunk | None = None
            if info.size < 0:
                found = self._head(info, start, end)
                if isinstance(found, TorchCacheError):
                    yield _Part(extent, info, 0, 0, 0, found)
                    continue
                head, info = found, ObjectInfo(info.id, found.object_size)
                end = info.size if end < 0 else end
            first = min(start, max(info.size - 1, 0)) // CHUNK_BYTES
            for index in range(first, max(first + 1, -(-end // CHUNK_BYTES))):
                if extent in self._failed:
                    break
                answer = head if head is not None and index == 0 else self._get(info, index)
                yield _Part(extent, info, index, start, end, answer)

    def _get(self, info: ObjectInfo, index: int) -> Answer:
        try:
            return self._read_through.get(
                self._plan.namespace,
                info,
                index,
                deadline=self._deadline,
                resident_only=self._plan.resident_only,
                suspect=self._plan.suspect,
            )
        except Exception as error:  # noqa: BLE001 - one extent's failure is not the stream's
            return _as_ours(error, info)

    def _head(self, info: ObjectInfo, start: int, end: int) -> StoredChunk | TorchCacheError:
        """Chunk 0 of an object whose size only it tells, the extent checked against that size."""
        answer = self._get(info, 0)
        if isinstance(answer, Future):
            answer = self._result(answer, info)
        if isinstance(answer, StoredChunk) and max(start, end) > answer.object_size:
            return ConfigurationError(
                f"bytes {start} to {end} do not lie within the object's {answer.object_size}",
                object=str(info.id),
            )
        return answer

    def _result(self, future: Future[StoredChunk], info: ObjectInfo) -> StoredChunk | TorchCacheError:
        try:
            return future.result(max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            return DeadlineExceeded("the fill did not arrive before the read's deadline", object=str(info.id))
        except Exception as error:  # noqa: BLE001 - one extent's failure is not the stream's
            return _as_ours(error, info)

    def _piece(self, part: _Part, answer: StoredChunk | TorchCacheError) -> Piece:
        """The part's piece; the error's row in its place."""
        if isinstance(answer, StoredChunk) and answer.object_size != part.object.size:
            answer = ObjectChanged(
                f"the object has {answer.object_size} bytes, not {part.object.size}",
                object=str(part.object.id),
            )
        if isinstance(answer, TorchCacheError):
            self._failed.add(part.extent)
            return failed_piece(part.extent, encode_error(answer))
        return cut(part.extent, answer, part.chunk, part.start, part.end)


def batched(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Cuts a round into batches: each is closed by the piece that fills it."""
    start = size = 0
    for end, piece in enumerate(pieces, start=1):
        size += piece.data.size
        if size >= BATCH_BYTES or end - start >= BATCH_ROWS:
            yield pieces[start:end]
            start, size = end, 0
    if start < len(pieces):
        yield pieces[start:]


def encoded(pieces: Sequence[Piece]) -> tuple[pa.RecordBatch, int]:
    """A batch and its payload's bytes."""
    return encode_pieces(pieces), sum(piece.data.size for piece in pieces)


def cut(extent: int, chunk: StoredChunk, index: int, start: int, end: int) -> Piece:
    """The blocks of chunk `index` that cover bytes [start, end) of its object: a view, not a copy."""
    offset = index * CHUNK_BYTES
    length = chunk.payload.size
    if start <= offset and end >= offset + length:
        return Piece(extent, chunk.object_size, offset, True, _DIGEST.pack(chunk.digest), chunk.payload)
    cover = block_cover(max(start - offset, 0), min(end - offset, length), length)
    if cover.length == length:
        return Piece(extent, chunk.object_size, offset, True, _DIGEST.pack(chunk.digest), chunk.payload)
    digests = chunk.block_digests[cover.start // BLOCK_BYTES * 8 : -(-cover.end // BLOCK_BYTES) * 8]
    data = chunk.payload.slice(cover.start, cover.length)
    return Piece(extent, chunk.object_size, offset + cover.start, False, digests, data)


def _as_ours(error: Exception, info: ObjectInfo) -> TorchCacheError:
    if isinstance(error, TorchCacheError):
        return error
    _LOG.error("reading %s failed unexpectedly", info.id, exc_info=error)
    return TorchCacheError(UNEXPECTED, object=str(info.id))
