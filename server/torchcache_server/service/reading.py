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
from concurrent.futures import Future, wait
from copy import copy
from typing import Final, NamedTuple, TypeAlias

import pyarrow as pa

from torchcache.errors import ConfigurationError, DeadlineExceeded, ObjectChanged, TorchCacheError
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ObjectInfo, block_cover
from torchcache.wire.codec import BATCH_BYTES, BATCH_ROWS, Piece, encode_pieces, failed_piece
from torchcache.wire.liveness import HEARTBEAT_S
from torchcache.wire.status import encode_error
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import StoredChunk

from .ahead_shares import AheadShare, AheadShares
from .interceptors import UNEXPECTED
from .request_log import level_of
from .requests import ReadPlan

AHEAD_CHUNKS: Final = 1024
"""Chunks looked up before a batch goes out."""

LOOK_UP_AT_ONCE: Final = 256

GUESSED_BYTES: Final = 128 * 1024
"""What a chunk of an object of unknown size is taken for until it is looked up."""

AHEAD_BYTES: Final = 32 * CHUNK_BYTES
"""Bytes of one request that may be on their way from the under-store, or wait for the client, at a time. Less where
other requests of the same dataset have much of that: see ahead_shares.py.
"""

_LOG = logging.getLogger(__name__)
_DIGEST: Final = struct.Struct("<Q")

WINDOW_BYTES: Final = 16 * BATCH_BYTES
"""Resident bytes looked up at once, from the fourth round on; the first is one batch, so that the client has work."""

NOTHING: Final = encode_pieces([])
"""A batch without rows."""

SLOW_S: Final = 0.5
"""A look-up that takes longer brings its records from a slow disk: what it found goes out, and the next is short. The
client takes silence for death."""

Answer: TypeAlias = StoredChunk | Future[StoredChunk] | TorchCacheError


class _Part(NamedTuple):
    """The part [start, end) of an object that lies in chunk number `chunk`. `end` -1: to the end, size unknown.

    `length` is the chunk's, in bytes; a guess where the object's size is unknown.
    """

    extent: int
    object: ObjectInfo
    chunk: int
    start: int
    end: int
    length: int


class Read:
    """The pieces of one request. `batches` may be taken once."""

    def __init__(self, plan: ReadPlan, read_through: ReadThrough, share: AheadShare | None = None) -> None:
        """`share` is of what all reads of the dataset may have on its way; None: it is the only one."""
        self._plan = plan
        self._read_through = read_through
        self._share = share if share is not None else AheadShares().begin(plan.namespace)
        self._deadline = time.monotonic() + plan.timeout_s
        self._parts = self._all_parts()
        self._waiting: deque[tuple[_Part, Answer]] = deque()
        self._failed: set[int] = set()
        self.sent_bytes = 0
        """Of payload, in the batches taken so far."""
        self.has_waited = False
        """Whether something had to come from an under-store before it could go out."""
        self.failure: TorchCacheError | None = None
        """The first of the gravest of the extents' errors."""

    @property
    def failures(self) -> int:
        """Extents that ended with an error, so far."""
        return len(self._failed)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The stream's batches. An extent that fails has a row that says so; nothing is raised for it.

        While something has to come from an under-store, one without rows says so, at once and every `HEARTBEAT_S`.
        """
        for pieces in self._rounds():
            if not pieces:
                yield NOTHING
            # All of a round is encoded before any is sent: sending 2 MiB leaves nothing of Python in the CPU's cache.
            for batch, size in [encoded(group) for group in batched(pieces)]:
                self.sent_bytes += size
                yield batch

    def _rounds(self) -> Iterator[list[Piece]]:
        """Pieces, in portions: what is found resident, more each time, then what the fills bring; none meanwhile."""
        window_bytes = BATCH_BYTES
        has_said = False
        while True:
            started = time.monotonic()
            pieces = self._look_ahead(window_bytes)
            is_slow = time.monotonic() - started > SLOW_S
            window_bytes = BATCH_BYTES if is_slow else min(2 * window_bytes, WINDOW_BYTES)
            if not pieces and self._waiting:
                self.has_waited = True
                if not has_said and not self._has_come(0.0):
                    has_said = True
                    yield []
                while not self._has_come(HEARTBEAT_S):
                    yield []
                pieces = self._filled()
            elif not pieces:
                return
            yield pieces

    def _look_ahead(self, window_bytes: int) -> list[Piece]:
        """The next pieces that are there, about `window_bytes` of them.

        From the first that isn't there on it goes as far as it may, so that fills start.
        """
        ready: list[Piece] = []
        ready_bytes = 0
        self._share.bytes = sum(part.length for part, answer in self._waiting if isinstance(answer, Future))
        slow_from = time.monotonic() + SLOW_S
        while len(ready) + len(self._waiting) < AHEAD_CHUNKS:
            if (ready or self._waiting) and time.monotonic() > slow_from:
                break
            budget_bytes = min(AHEAD_BYTES, window_bytes - ready_bytes)
            if self._waiting:
                budget_bytes = self._share.left(AHEAD_BYTES)
            parts = self._next_parts(min(budget_bytes, WINDOW_BYTES))
            if not parts:
                break
            for part, answer in self._answered(parts):
                if isinstance(answer, Future):
                    self._waiting.append((part, answer))
                    self._share.bytes += part.length
                elif self._waiting and self._waiting[-1][0].extent == part.extent:
                    self._waiting.append((part, answer))  # the rows of an extent come in order
                elif part.extent not in self._failed:
                    ready.append(self._piece(part, answer))
                    ready_bytes += ready[-1].data.size
        return ready

    def _has_come(self, timeout_s: float) -> bool:
        """Whether the first that waits comes within `timeout_s`, or will not by the read's deadline."""
        answer = self._waiting[0][1]
        if not isinstance(answer, Future):
            return True
        left_s = self._deadline - time.monotonic()
        return bool(wait([answer], max(0.0, min(timeout_s, left_s))).done) or left_s <= timeout_s

    def _filled(self) -> list[Piece]:
        """The first that waits, as soon as it is there, and those behind it that are there too: at most a batch."""
        pieces: list[Piece] = []
        size = 0
        while self._waiting and size < BATCH_BYTES:
            part, answer = self._waiting[0]
            if pieces and isinstance(answer, Future) and not answer.done():
                break
            self._waiting.popleft()
            if part.extent in self._failed:
                continue
            pieces.append(self._piece(part, self._settled(answer, part.object)))
            size += part.length
        return pieces

    def _all_parts(self) -> Iterator[_Part]:
        plan = self._plan
        for extent, (number, start, end) in enumerate(zip(plan.object, plan.start, plan.end, strict=True)):
            info = plan.objects[number]
            size = info.size
            if (
                size <= CHUNK_BYTES
            ):  # the only chunk; or, of unknown size, the one that tells how many there are
                yield _Part(extent, info, 0, start, end, size if size >= 0 else GUESSED_BYTES)
                continue
            for chunk in chunks_of(start, end, size):
                if extent in self._failed:
                    break
                yield _Part(extent, info, chunk, start, end, chunk_length(chunk, size))

    def _next_parts(self, budget_bytes: int) -> list[_Part]:
        """The next parts, until they make `budget_bytes`; none if the budget is used up."""
        parts: list[_Part] = []
        if budget_bytes <= 0:
            return parts
        for part in self._parts:
            parts.append(part)
            budget_bytes -= part.length
            if budget_bytes <= 0 or len(parts) >= LOOK_UP_AT_ONCE:
                break
        return parts

    def _answered(self, parts: list[_Part]) -> Iterator[tuple[_Part, Answer]]:
        """The parts' chunks, looked up, or their fills started; parts of objects whose size was unknown with it."""
        for part, answer in zip(parts, self._get(parts), strict=True):
            if part.object.size >= 0:
                yield part, answer
            else:
                yield from self._sized(part, self._settled(answer, part.object))

    def _sized(self, part: _Part, head: StoredChunk | TorchCacheError) -> Iterator[tuple[_Part, Answer]]:
        """The parts of an extent of an object whose size its first chunk, `head`, tells."""
        if isinstance(head, TorchCacheError):
            yield part, head
            return
        size = head.object_size
        start, end = part.start, size if part.end < 0 else part.end
        info = ObjectInfo(part.object.id, size)
        if max(start, end) > size:
            message = f"bytes {start} to {end} do not lie within the object's {size}"
            yield part, ConfigurationError(message, object=str(info.id))
            return
        for chunk in chunks_of(start, end, size):
            of_size = _Part(part.extent, info, chunk, start, end, chunk_length(chunk, size))
            yield of_size, head if chunk == 0 else self._get([of_size])[0]

    def _get(self, parts: list[_Part]) -> Sequence[Answer]:
        plan, wanted = self._plan, [(part.object, part.chunk) for part in parts]
        try:
            if plan.suspect:
                return [self._suspect(*each) for each in wanted]
            return self._read_through.get_many(
                plan.namespace, wanted, deadline=self._deadline, resident_only=plan.resident_only
            )
        except Exception as error:  # noqa: BLE001 - told as an error of these extents
            return [_as_ours(error, info) for info, _ in wanted]

    def _suspect(self, info: ObjectInfo, chunk: int) -> Answer:
        """The chunk, proven against the disk first: its reader saw a wrong checksum."""
        plan = self._plan
        try:
            return self._read_through.get(
                plan.namespace,
                info,
                chunk,
                deadline=self._deadline,
                resident_only=plan.resident_only,
                suspect=True,
            )
        except TorchCacheError as error:
            return error

    def _settled(self, answer: Answer, info: ObjectInfo) -> StoredChunk | TorchCacheError:
        if not isinstance(answer, Future):
            return answer
        try:
            return answer.result(max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            return DeadlineExceeded("the fill did not arrive before the read's deadline", object=str(info.id))
        except Exception as error:  # noqa: BLE001 - one extent's failure is not the stream's
            return _as_ours(error, info)

    def _piece(self, part: _Part, answer: StoredChunk | TorchCacheError) -> Piece:
        """The part's piece; the error's row in its place, after which the extent has no more."""
        if isinstance(answer, StoredChunk):
            if answer.object_size == part.object.size:
                return cut(part.extent, answer, part.chunk, part.start, part.end)
            message = f"the object has {answer.object_size} bytes, not {part.object.size}"
            answer = ObjectChanged(message, object=str(part.object.id))
        self._failed.add(part.extent)
        if self.failure is None or level_of(answer) > level_of(self.failure):
            self.failure = copy(answer)  # without its frames, which may hold this read
        return failed_piece(part.extent, encode_error(answer))


def chunks_of(start: int, end: int, size: int) -> range:
    """Numbers of the chunks that bytes [start, end) of an object of `size` bytes touch; one at least."""
    first = min(start, max(size - 1, 0)) // CHUNK_BYTES
    return range(first, max(first + 1, -(-end // CHUNK_BYTES)))


def chunk_length(chunk: int, size: int) -> int:
    """Bytes of chunk number `chunk` of an object of `size` bytes."""
    return min(CHUNK_BYTES, size - chunk * CHUNK_BYTES)


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
