"""Bytes of which a lane lends its own memory: hashed and copied piece by piece, while a piece is in the cache.

Both the store and a manifest have checksums of them. Here the manifest's are compared, and the lane's needn't be too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from torchcache.checkpoint.layout import GRANULE_BYTES
from torchcache.checkpoint.manifest import Item
from torchcache.errors import TorchCacheError
from torchcache.lanes.copying import STEP_BYTES, copy, copy_and_hash
from torchcache.model import CHUNK_BYTES, ByteRange, Extent, ObjectInfo


class Granule(NamedTuple):
    """One granule of a payload: its checksum, where it goes, and the extents it is read as, none across two chunks."""

    digest: int
    into: memoryview
    extents: list[Extent]

    @property
    def targets(self) -> list[memoryview]:
        """The buffer of each extent."""
        if len(self.extents) == 1:
            return [self.into]
        cut = self.extents[0].length
        return [self.into[:cut], self.into[cut:]]

    def land(self, outcomes: Sequence[memoryview | TorchCacheError]) -> bool:
        """Whether `into` has the bytes now, and they are as the checksum says."""
        if len(outcomes) == 1 and len(self.into) <= STEP_BYTES:  # most items of a state of many
            (view,) = outcomes
            if not isinstance(view, memoryview):
                return False
            if view.readonly:
                copy(view, self.into)
            return bool(xxh3_64_intdigest(self.into) == self.digest)
        views = [outcome for outcome in outcomes if isinstance(outcome, memoryview)]
        if len(views) < len(outcomes):
            return False
        if not any(view.readonly for view in views):
            return bool(xxh3_64_intdigest(self.into) == self.digest)
        return _land(self.digest, self.into, views)


def granules_of(item: Item, part: ByteRange, into: memoryview, file: ObjectInfo) -> Iterable[Granule] | None:
    """The granules of a part of an item's payload; None if it isn't of whole ones, or has no checksums."""
    whole_end = part.end == item.payload_length or not part.end % GRANULE_BYTES
    if not item.digests or part.start % GRANULE_BYTES or not whole_end:
        return None
    at, size = item.start + item.payload_start + part.start, part.length
    if size <= GRANULE_BYTES and at % CHUNK_BYTES + size <= CHUNK_BYTES:
        return (Granule(item.digests[part.start // GRANULE_BYTES], into, [Extent(file, at, size)]),)
    return _granules(item, part, into, file)


def _granules(item: Item, part: ByteRange, into: memoryview, file: ObjectInfo) -> Iterator[Granule]:
    payload_start = item.start + item.payload_start
    for start in range(part.start, part.end, GRANULE_BYTES):
        end = min(start + GRANULE_BYTES, part.end)
        extents, at, stop = [], payload_start + start, payload_start + end
        while at < stop:
            after = min(stop, at - at % CHUNK_BYTES + CHUNK_BYTES)
            extents.append(Extent(file, at, after - at))
            at = after
        where = into if end - start == len(into) else into[start - part.start : end - part.start]
        yield Granule(item.digests[start // GRANULE_BYTES], where, extents)


def _land(digest: int, into: memoryview, views: Sequence[memoryview]) -> bool:
    """Copies what `views` hold one behind the other into `into`, and says whether what then lies there is right."""
    hasher, at = xxh3_64(), 0
    for view in views:
        target = into[at : at + len(view)]
        if view.readonly:
            copy_and_hash(view, target, hasher)
        else:  # a lane has filled it
            hasher.update(target)
        at += len(view)
    return bool(hasher.intdigest() == digest)
