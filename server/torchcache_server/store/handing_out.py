"""Segments handed out: a client of this host fills them itself, and what it wrote becomes real by one commit.

A handed-out segment is for one write alone. Its header says so for good: nobody appends to it, neither this server
nor, after a crash, the next one. So whoever still writes into it, a client that was stopped for an hour, say, can only
hurt what it promised itself. The client holds a shared flock on each file as long as it writes; a file that anybody
holds never becomes another segment (`recycling`).

A write ends by its commit, by being abandoned, when its time is over, or when its client is gone: that is when nobody
holds its files. Then all that it took is given back.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    Overloaded,
    TorchCacheError,
    TransientError,
)
from torchcache.model import ChunkId
from torchcache.records import record_header
from torchcache_server.store.appending import check_room, take_room
from torchcache_server.store.core import Core
from torchcache_server.store.keeping import disk_errors
from torchcache_server.store.reading import find_many
from torchcache_server.store.segments import Segment
from torchcache_server.store.writing import Draft, Reserved, commit, place, planned, release

MAX_WRITES: Final = 64
"""Handed out at a time, as many as data streams run."""

MAX_SEGMENTS: Final = 512
"""Handed out at a time: each is an open file."""

OPENING_S: Final = 10.0
"""What a client may take until it holds its files."""

_log = logging.getLogger(__name__)


class HandedFile(NamedTuple):
    """A segment's file, as its client has to find it. `size_bytes` of the whole file."""

    number: int
    nonce: int
    size_bytes: int


class Place(NamedTuple):
    """Where a record goes: which of the files, and the offset of its header."""

    file: int
    offset: int


class HandedOut(NamedTuple):
    """What a client gets: files to write into, and a place for each chunk; None for one that is there already."""

    write_id: str
    files: list[HandedFile]
    places: list[Place | None]


class Committed(NamedTuple):
    """A write that has become real. `bytes` of the chunks' payloads."""

    namespace: str
    bytes: int


@dataclass(slots=True)
class _Write:
    namespace: str
    drafts: list[Draft]
    reserved: Reserved
    bytes: int  # of the files
    opened_by_s: float
    ends_s: float
    was_held: bool = False  # its client had the files open when we last looked

    @property
    def segments(self) -> list[Segment]:
        return [part.segment for part in self.reserved.parts]


class HandingOut:
    """The writes that clients are in the middle of. Thread-safe."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = threading.Lock()  # of what follows; held for memory only
        self._writes: dict[str, _Write] = {}
        self._preparing = 0
        self._preparing_bytes = 0

    def prepare(
        self, namespace: str, chunks: Sequence[tuple[ChunkId, int, int]], *, timeout_s: float
    ) -> HandedOut | None:
        """Room for (chunk, object size, chunk size), distinct ones. Nobody sees them before the commit.

        None if what is missing of them would leave most of a segment unused: better put it. Raises OutOfSpace as
        `append` does, Overloaded at one of the bounds, ConfigurationError for what no record can hold.
        """
        core = self._core
        there = find_many(core, [chunk for chunk, _, _ in chunks])
        drafts = [planned(*chunk) for chunk, found in zip(chunks, there, strict=True) if found is None]
        if len({draft.key for draft in drafts}) != len(drafts):
            raise ConfigurationError("a write names a chunk twice")
        size_bytes = sum(draft.header.record_bytes for draft in drafts)
        if 2 * size_bytes < core.space.segment_bytes:
            return None
        self._begin(size_bytes)
        try:
            check_room(core, namespace, size_bytes)
            reserved = take_room(core, namespace, drafts, alone=True)
            for part in reserved.parts:
                place(part)
            write_id, now = secrets.token_hex(16), time.monotonic()
            write = _Write(namespace, drafts, reserved, size_bytes, now + OPENING_S, now + timeout_s)
            with self._lock:
                self._writes[write_id] = write
        finally:
            with self._lock:
                self._preparing -= 1
                self._preparing_bytes -= size_bytes
        return _handed_out(write_id, write, [found is None for found in there])

    def commit(self, write_id: str) -> Committed:
        """Makes the chunks of a write visible, all or none.

        Looks at their headers and not at their payloads: who reads verifies those. Raises TransientError for a write
        that isn't known any more, IntegrityError for one whose records aren't what was promised: it is over then.
        """
        write = self._take(write_id)
        try:
            with disk_errors("read back what a client wrote"):
                for draft in write.drafts:
                    self._check(draft)
            for segment in write.segments:
                segment.unsynced = True  # whatever was synced until now, the client may have written since
            commit(self._core, write.drafts)
        except BaseException:
            self._give_back(write)
            raise
        release(self._core, write.reserved)
        return Committed(write.namespace, sum(draft.header.payload_bytes for draft in write.drafts))

    def abandon(self, write_id: str) -> None:
        """Gives back all that a write took. One that isn't known is fine."""
        try:
            write = self._take(write_id)
        except TransientError:
            return
        self._give_back(write)

    def expire(self, now: float) -> None:
        """Gives back what was taken by writes whose time is over, or whose client is gone."""
        with self._lock:
            writes = list(self._writes.items())
        for write_id, write in writes:
            is_held = self._is_held(write)
            gone = not is_held and (write.was_held or now >= write.opened_by_s)
            write.was_held |= is_held
            if gone or now >= write.ends_s:
                _log.warning("a client's write into %r was never committed: given back", write.namespace)
                self.abandon(write_id)

    def close(self) -> None:
        """Gives back everything."""
        with self._lock:
            ids = list(self._writes)
        for write_id in ids:
            self.abandon(write_id)

    @property
    def bytes(self) -> int:
        """Room that is handed out now."""
        with self._lock:
            return self._bytes()

    # ---- within ----

    def _bytes(self) -> int:
        return sum(write.bytes for write in self._writes.values())

    def _begin(self, size_bytes: int) -> None:
        self.expire(time.monotonic())
        with self._lock:
            writes = len(self._writes) + self._preparing
            held = self._bytes() + self._preparing_bytes
            segments = sum(len(write.segments) for write in self._writes.values())
            segment_bytes, capacity = self._core.space.segment_bytes, self._core.space.capacity_bytes
            # One alone may be as large as the store takes; several leave others half of it, which may be evicted.
            too_many = writes and (
                writes >= MAX_WRITES
                or segments + size_bytes // segment_bytes >= MAX_SEGMENTS
                or held + size_bytes > capacity // 2
            )
            if too_many:
                raise Overloaded(f"{writes} writes of clients hold {held} bytes of the store: try again")
            self._preparing += 1
            self._preparing_bytes += size_bytes

    def _take(self, write_id: str) -> _Write:
        with self._lock:
            write = self._writes.pop(write_id, None)
        if write is None:
            raise TransientError(
                "the server doesn't know this write any more (its time was over, or the server was started anew): "
                "write again"
            )
        return write

    def _check(self, draft: Draft) -> None:
        """Raises IntegrityError if the record that was promised isn't there, OSError."""
        segment, length = draft.segment, draft.header.length
        if segment is None or segment.fd is None or segment.dropped:
            return  # dropped with its namespace: nothing comes of it, as of any other write
        raw = b""
        while len(raw) < length and (
            part := self._core.disk.pread(segment.fd, length - len(raw), draft.offset + len(raw))
        ):
            raw += part
        found = record_header(
            memoryview(raw), 0, segment.header.nonce, draft.offset, segment.header.file_bytes
        )
        if found is None or found._replace(digest=0, block_digests=b"") != draft.header:
            raise IntegrityError(
                "a record that a client was to write isn't there as promised: write it again"
            )

    def _is_held(self, write: _Write) -> bool:
        return any(segment.is_held(self._core.disk) for segment in write.segments)

    def _give_back(self, write: _Write) -> None:
        core, reserved = self._core, write.reserved
        with core.lock:
            for part in reserved.parts:
                # Beyond what the file had before, nobody knows which pages the client has filled: no spare then.
                if part.segment.held_bytes > part.segment.floor_bytes:
                    core.space.trimmed(part.segment)
                core.space.give_back(part.segment, part.offset, part.size)
                part.segment.writing.discard(part.offset)
        core.remove(write.segments)
        for segment in reserved.touched:
            core.close_if_done(segment)


def _handed_out(write_id: str, write: _Write, missing: Sequence[bool]) -> HandedOut:
    """What the client is told."""
    segments = write.segments
    numbers = {segment.number: file for file, segment in enumerate(segments)}
    files = [HandedFile(s.number, s.header.nonce, s.header.file_bytes) for s in segments]
    drafts = iter(write.drafts)
    places = [_place(next(drafts), numbers) if is_missing else None for is_missing in missing]
    return HandedOut(write_id, files, places)


def _place(draft: Draft, files: dict[int, int]) -> Place:
    if draft.segment is None:
        raise TorchCacheError("a chunk was handed out before it got a place")
    return Place(files[draft.segment.number], draft.offset)
