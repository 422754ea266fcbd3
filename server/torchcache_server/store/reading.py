"""Finding chunks, and forgetting those that are damaged."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torchcache.errors import OutOfSpace
from torchcache.model import ChunkId
from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.core import Core, Known
from torchcache_server.store.index import Location, chunk_key

_log = logging.getLogger(__name__)


def find(core: Core, chunk: ChunkId) -> StoredChunk | None:
    """The chunk, its record's header checked; a record that is damaged, or another's, is forgotten, and a miss."""
    key = chunk_key(chunk)
    return _at(core, chunk, key, core.index.get(key))


def find_many(core: Core, chunks: Sequence[ChunkId]) -> list[StoredChunk | None]:
    """`find` for many chunks, in one transaction of the index."""
    keys = [chunk_key(chunk) for chunk in chunks]
    locations = core.index.get_many(keys)
    return [_at(core, *found) for found in zip(chunks, keys, locations, strict=True)]


def _at(core: Core, chunk: ChunkId, key: bytes, location: Location | None) -> StoredChunk | None:
    if location is None:
        return None
    segment = core.space.segments.get(location.segment)
    if segment is None:
        return None
    known = core.known.get(location)
    if known is not None and known.chunk_index == chunk.index and known.identity == chunk.object.encoded:
        core.touch(segment)
        return known.chunk
    record = segment.record(location.offset)
    if record is None:
        _forget(core, key, location)
        return None
    if record.chunk_index != chunk.index or record.identity != chunk.object.encoded:
        _disbelieve(core, key, location)
        return None
    core.touch(segment)
    found = segment.chunk(location.offset, record)
    core.learn(location, segment, Known(chunk.index, record.identity, found))
    return found


def _disbelieve(core: Core, key: bytes, location: Location) -> None:
    """Takes an entry out that points to another chunk's record, which is sound, and stays."""
    try:
        with core.index.writing() as writer:
            if writer.get(key) == location:
                writer.delete(key)
    except OutOfSpace as error:
        _log.warning("a wrong entry stays in the index: %s", error)
        return
    core.counts.add(corrupt=1)
    _log.warning("an index entry pointed to another chunk's record and is dropped")


def quarantine(core: Core, chunk: ChunkId) -> None:
    """Forgets the chunk's record, which was found damaged."""
    key = chunk_key(chunk)
    location = core.index.get(key)
    if location is not None:
        core.known.pop(location, None)
        _forget(core, key, location)


def _forget(core: Core, key: bytes, location: Location) -> None:
    """Takes the record at `location` out, unless the chunk has been stored anew meanwhile."""
    try:
        with core.index.writing() as writer:
            if writer.get(key) != location:
                return
            writer.delete(key)
    except OutOfSpace as error:
        # Found damaged again by the next who asks; counted as gone only once it is.
        _log.warning("a damaged chunk stays in the index: %s", error)
        return
    segment = core.space.segments.get(location.segment)
    if segment is None:
        return
    core.counts.add(corrupt=1)
    with core.lock:
        segment.chunks -= 1
        is_empty = segment.sealed and not segment.writing and not segment.chunks
    _log.warning("a damaged record at %d in %s is dropped", location.offset, segment.path)
    segment.bury(core.disk, location.offset)
    if is_empty:
        core.remove([segment])
