"""Who holds how much: namespaces, their segments, and room for new records. No I/O, no locks of its own.

The room that counts is what segments' files take of the disk: whole pages up to the tail, behind which a file is a
hole; more where it was another segment's before, less where writes failed. Two sums stay within the capacity: what
segments take and what is promised to fills that are on their way; and what segments and spare files take. So a promise
costs no spare, and spares cost nobody room. Only while a segment is emptied it counts as gone already (`compaction`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from torchcache.errors import ConfigurationError
from torchcache.model import CHUNK_BYTES
from torchcache.records import MAX_RECORD_BYTES, PAGE_BYTES, page_aligned
from torchcache_server.store.eviction import Candidate
from torchcache_server.store.ordering import Order
from torchcache_server.store.policy import Policy
from torchcache_server.store.segments import Segment

DEFAULT_SEGMENT_BYTES: Final = 16 * MAX_RECORD_BYTES
"""64 MiB of full chunks, whatever their names."""

MAX_NAME_BYTES: Final = 16 * 1024
"""Longest name of a namespace."""

MIN_SEGMENT_BYTES: Final = MAX_RECORD_BYTES + 2 * MAX_NAME_BYTES
"""Room for a segment's header and one full record."""

_MAX_SEGMENTS: Final = 16384  # a quarter of the mappings that Linux gives a process


def segment_size(capacity_bytes: int, segment_bytes: int | None) -> int:
    """Bytes of a segment file: as asked, else 64 MiB and some, less in a small store and more in a huge one.

    Raises ConfigurationError where a full record would not fit.
    """
    if capacity_bytes < MIN_SEGMENT_BYTES:
        raise ConfigurationError(
            f"a capacity of {capacity_bytes} bytes is less than one segment holds: give at least {MIN_SEGMENT_BYTES}"
            f" bytes (a chunk of {CHUNK_BYTES} and its header)"
        )
    if segment_bytes is None:
        wanted = min(DEFAULT_SEGMENT_BYTES, max(capacity_bytes // 8, MIN_SEGMENT_BYTES))
        segment_bytes = max(wanted, -(-capacity_bytes // _MAX_SEGMENTS))
    if segment_bytes < MIN_SEGMENT_BYTES:
        raise ConfigurationError(
            f"segments of {segment_bytes} bytes are too small for a chunk: give at least {MIN_SEGMENT_BYTES} bytes"
        )
    if segment_bytes > capacity_bytes:
        raise ConfigurationError(
            f"a capacity of {capacity_bytes} bytes is less than one segment of {segment_bytes} bytes: raise the "
            "capacity or make segments smaller"
        )
    return -(-segment_bytes // PAGE_BYTES) * PAGE_BYTES


def check_name(namespace: str) -> None:
    """Raises ConfigurationError for a namespace that no segment's header can hold."""
    if len(namespace.encode()) > MAX_NAME_BYTES:
        raise ConfigurationError(
            f"the namespace {namespace[:100]}… is too long: at most {MAX_NAME_BYTES} bytes are possible"
        )


class Run(NamedTuple):
    """Records `first` up to `last` (exclusive) of a batch, one behind the other from `offset`.

    `segment` counts from the batch's first: 0 is the segment that is open now, if there is one, 1 the next, new one.
    """

    segment: int
    offset: int
    first: int
    last: int


class Layout(NamedTuple):
    """Where a batch goes. `bytes` is what it takes in all, the headers of new segments included.

    `ends` is where the open segment, the first one, and each new one end then.
    """

    runs: list[Run]
    new_segments: int
    bytes: int
    ends: list[int]

    def taken_bytes(self, open_segment: Segment | None, spares: Sequence[int]) -> int:
        """What segments take more then, files that hold `spares` bytes each being made the first new ones."""
        grown = 0
        if open_segment is not None:
            grown = max(0, page_aligned(self.ends[0]) - open_segment.held_bytes)
        new = [page_aligned(end) for end in self.ends[1:]]
        recycled = [max(held, end) for held, end in zip(spares, new, strict=False)]
        return grown + sum(recycled) + sum(new[len(recycled) :])


def lay_out(sizes: Sequence[int], *, tail: int, room_bytes: int, start: int, segment_bytes: int) -> Layout:
    """Puts records of these sizes into the open segment, which has `room_bytes` from `tail` on, then into new ones.

    `start` is where a new segment's first record goes. No size may be larger than a new segment's room.
    """
    runs: list[Run] = []
    ends = [tail]
    segment, at, end = 0, tail, tail + room_bytes
    first = 0
    for i, size in enumerate(sizes):
        if at + size > end:
            if i > first:
                runs.append(Run(segment, at - sum(sizes[first:i]), first, i))
            segment, at, end, first = segment + 1, start, segment_bytes, i
            ends.append(at)
        at += size
        ends[-1] = at
    if len(sizes) > first:
        runs.append(Run(segment, at - sum(sizes[first:]), first, len(sizes)))
    return Layout(runs, segment, sum(sizes) + segment * start, ends)


@dataclass(slots=True, eq=False)
class Namespace:
    """A dataset or checkpoint, and the segments that are its own."""

    name: str
    segments: dict[int, Segment] = field(default_factory=dict)
    open: Segment | None = None  # takes the next records
    policy: Policy = Policy()  # noqa: RUF009 - frozen
    kept: bool = False
    last_used: int = 0  # orders namespaces
    promised_bytes: int = 0  # to fills that are on their way
    used_s: float = field(default_factory=time.monotonic)  # for the policy's time to live
    order: Order | None = None  # in which it will be read, where that is known
    names_unsynced: bool = False  # files were created since the folder's last fsync
    sync_lock: threading.Lock = field(
        default_factory=threading.Lock
    )  # one sync at a time: who comes later waits for its outcome

    @property
    def protected(self) -> bool:
        return self.policy.pinned or self.kept

    @property
    def bytes(self) -> int:
        return sum(s.held_bytes for s in self.segments.values())

    @property
    def chunks(self) -> int:
        return sum(s.chunks for s in self.segments.values())


@dataclass(slots=True)
class Space:
    """All namespaces and segments of a store. Guarded by the store's lock."""

    capacity_bytes: int
    segment_bytes: int
    used_bytes: int = 0  # by segments
    promised_bytes: int = 0  # to fills that are on their way
    namespaces: dict[str, Namespace] = field(default_factory=dict)
    segments: dict[int, Segment] = field(default_factory=dict)
    next_number: int = 1

    def namespace(self, name: str) -> Namespace:
        """The namespace of that name, made if there is none yet."""
        found = self.namespaces.get(name)
        if found is None:
            found = self.namespaces[name] = Namespace(name)
        return found

    def add(self, segment: Segment) -> None:
        """Takes a segment in."""
        self.namespace(segment.header.namespace).segments[segment.number] = segment
        self.segments[segment.number] = segment
        self.used_bytes += segment.held_bytes
        self.next_number = max(self.next_number, segment.number + 1)

    def remove(self, segment: Segment) -> None:
        """Lets a segment go; its namespace stays, maybe empty."""
        segment.dropped = True
        segment.sealed = True
        del self.segments[segment.number]
        namespace = self.namespaces[segment.header.namespace]
        del namespace.segments[segment.number]
        if namespace.open is segment:
            namespace.open = None
        self.used_bytes -= segment.held_bytes

    def take(self, segment: Segment, size: int) -> None:
        """Takes the next `size` bytes of a segment."""
        self._resize(segment, segment.tail + size, segment.floor_bytes)

    def give_back(self, segment: Segment, offset: int, size: int) -> bool:
        """Returns what `take` took, if nobody has taken what follows; says whether it did."""
        if segment.tail != offset + size or segment.dropped:
            return False
        self._resize(segment, offset, segment.floor_bytes)
        return True

    def trimmed(self, segment: Segment) -> None:
        """What lies behind the segment's tail has become a hole."""
        self._resize(segment, segment.tail, 0)

    def holed(self, segment: Segment, hole_bytes: int) -> None:
        """So much of what the segment's tail has passed takes no room."""
        before = segment.held_bytes
        segment.hole_bytes += hole_bytes
        if not segment.dropped:
            self.used_bytes += segment.held_bytes - before

    def _resize(self, segment: Segment, tail: int, floor_bytes: int) -> None:
        before = segment.held_bytes
        segment.tail, segment.floor_bytes = tail, floor_bytes
        if not segment.dropped:
            self.used_bytes += segment.held_bytes - before

    def forget_if_empty(self, name: str) -> bool:
        """Drops a namespace that holds nothing and has nothing to remember; says whether it has no segments."""
        namespace = self.namespaces.get(name)
        if namespace is None:
            return True
        if (
            not namespace.segments
            and not namespace.kept
            and namespace.policy == Policy()
            and not namespace.order
            and not namespace.promised_bytes
        ):
            del self.namespaces[name]
        return not namespace.segments

    def candidates(self, name: str | None, priority: int | None) -> Iterator[Candidate]:
        """Segments of namespaces that may yield to `name`, which has `priority`, as eviction sees them.

        Asked at every miss of a full store: of what can't yield, often all of many thousand, none is looked at.
        """
        for namespace in self.namespaces.values():
            above = priority is not None and namespace.policy.priority > priority
            if namespace.protected or namespace.name == name or above:
                continue
            for segment in namespace.segments.values():
                yield Candidate(
                    segment=segment.number,
                    namespace=namespace.name,
                    bytes=segment.held_bytes,
                    last_used=namespace.last_used,
                    priority=namespace.policy.priority,
                    protected=bool(segment.writing),
                )
