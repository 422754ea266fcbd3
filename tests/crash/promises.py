"""What the store has promised at an instant, and whether what a restart finds keeps it (I1, I2, I3, I6). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torchcache_server.cache.saves import SaveKey
from torchcache_server.store import Policy

from torchcache.model import ChunkId

Found = Literal["good", "damaged", "missing", "WRONG"]
"""`damaged` is what a reader's checksums tell; `WRONG` passes for good, and isn't."""


class Flags(NamedTuple):
    kept: bool = False
    policy: Policy = Policy()


class SaveSeen(NamedTuple):
    """The save that a reader of a path is given, and whether all its files can be read; id "" if there is none."""

    save_id: str
    is_whole: bool


NO_SAVE = SaveSeen("", True)


@dataclass(slots=True)
class Promises:
    """Sets hold what is allowed: two values while a change is under way, one before and behind it."""

    server_id: str = ""
    stored: dict[str, frozenset[ChunkId]] = field(default_factory=dict)  # by namespace: put has returned
    durable: dict[str, frozenset[ChunkId]] = field(default_factory=dict)  # ... and so has a later sync
    flags: dict[str, frozenset[Flags]] = field(default_factory=dict)
    records: dict[bytes, frozenset[bytes | None]] = field(default_factory=dict)
    saves: dict[SaveKey, frozenset[str]] = field(default_factory=dict)
    bucket: dict[str, bytes] = field(default_factory=dict)  # not promised: what the under-store holds

    def copy(self) -> Promises:
        return Promises(
            self.server_id,
            dict(self.stored),
            dict(self.durable),
            dict(self.flags),
            dict(self.records),
            dict(self.saves),
            dict(self.bucket),
        )


class Promise:
    """One step of a workload, between two calls of the seam."""

    def apply(self, to: Promises) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Opened(Promise):
    server_id: str

    def apply(self, to: Promises) -> None:
        to.server_id = self.server_id


@dataclass(frozen=True)
class Stored(Promise):
    """`put` returned."""

    namespace: str
    chunks: frozenset[ChunkId]

    def apply(self, to: Promises) -> None:
        to.stored[self.namespace] = to.stored.get(self.namespace, frozenset()) | self.chunks


@dataclass(frozen=True)
class Synced(Promise):
    """`sync` returned: what was stored is durable."""

    namespace: str

    def apply(self, to: Promises) -> None:
        stored = to.stored.get(self.namespace, frozenset())
        to.durable[self.namespace] = to.durable.get(self.namespace, frozenset()) | stored


@dataclass(frozen=True)
class MayGo(Promise):
    """From here on the namespace may be dropped or evicted; of `chunks` only, if any are given."""

    namespace: str
    chunks: frozenset[ChunkId] | None = None

    def apply(self, to: Promises) -> None:
        for held in (to.stored, to.durable):
            there = held.get(self.namespace, frozenset())
            held[self.namespace] = frozenset() if self.chunks is None else there - self.chunks


@dataclass(frozen=True)
class FlagsChange(Promise):
    """The old flags or these; with `done` these."""

    namespace: str
    after: Flags
    done: bool

    def apply(self, to: Promises) -> None:
        before = to.flags.get(self.namespace, frozenset({Flags()}))
        to.flags[self.namespace] = frozenset({self.after}) | (frozenset() if self.done else before)


@dataclass(frozen=True)
class RecordChanges(Promise):
    """The old value or this one; with `done` this one."""

    key: bytes
    after: bytes | None
    done: bool

    def apply(self, to: Promises) -> None:
        before: frozenset[bytes | None] = to.records.get(self.key, frozenset({None}))
        after: frozenset[bytes | None] = frozenset({self.after})
        to.records[self.key] = after if self.done else after | before


@dataclass(frozen=True)
class SaveChanges(Promise):
    """A reader of the path gets the old save or this one; with `done` this one."""

    key: SaveKey
    save_id: str
    done: bool

    def apply(self, to: Promises) -> None:
        before = to.saves.get(self.key, frozenset({""}))
        to.saves[self.key] = frozenset({self.save_id}) | (frozenset() if self.done else before)


@dataclass(frozen=True)
class InBucket(Promise):
    """The under-store holds other bytes at `key`; None: nothing any more."""

    key: str
    data: bytes | None

    def apply(self, to: Promises) -> None:
        if self.data is None:
            to.bucket.pop(self.key, None)
        else:
            to.bucket[self.key] = self.data


class Observation(NamedTuple):
    """What a restarted server makes of an image. `chunks` are in the order of the trace's."""

    trouble: str = ""  # why it didn't come up, or isn't fit to go on
    server_id: str = ""
    chunks: tuple[Found, ...] = ()
    flags: tuple[tuple[str, Flags], ...] = ()
    records: tuple[tuple[bytes, bytes], ...] = ()
    saves: tuple[tuple[SaveKey, SaveSeen], ...] = ()


def broken(promises: Promises, chunks: Mapping[ChunkId, int], seen: Observation) -> Iterator[str]:
    """The promises that a restart breaks, in words. `chunks` gives each chunk's place in `seen.chunks`."""
    if seen.trouble:
        yield seen.trouble
        return
    if "WRONG" in seen.chunks:
        yield f"I1: {_named(chunks, seen.chunks, 'WRONG')} are wrong and pass for good"
    if promises.server_id and seen.server_id != promises.server_id:
        yield "F19: the store is another one than before"
    for namespace, durable in promises.durable.items():
        lost = [chunk for chunk in durable if seen.chunks[chunks[chunk]] != "good"]
        if lost:
            states = {str(chunk.object): seen.chunks[chunks[chunk]] for chunk in lost}
            yield f"I2: of {namespace}, synced, {states}"
    flags = dict(seen.flags)
    for namespace, allowed in promises.flags.items():
        if flags.get(namespace, Flags()) not in allowed:
            yield f"I6: {namespace} has {flags.get(namespace)}, not one of {set(allowed)}"
    records = dict(seen.records)
    for key, values in promises.records.items():
        if records.get(key) not in values:
            yield f"I2: record {key!r} is {records.get(key)!r}, not one of {set(values)}"
    yield from _broken_saves(promises, dict(seen.saves))


def _broken_saves(promises: Promises, saves: Mapping[SaveKey, SaveSeen]) -> Iterator[str]:
    for key, ids in promises.saves.items():
        found = saves.get(key, NO_SAVE)
        if found.save_id not in ids:
            yield f"I3: {key} gives save {found.save_id!r}, not one of {set(ids)}"
        elif not found.is_whole:
            yield f"I3: {key} gives save {found.save_id!r}, and not all of it"


def _named(chunks: Mapping[ChunkId, int], found: Sequence[Found], state: Found) -> list[str]:
    return [str(chunk.object) for chunk, place in chunks.items() if found[place] == state]
