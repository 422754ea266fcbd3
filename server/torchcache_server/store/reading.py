"""Finding chunks, and forgetting those that are damaged."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torchcache.errors import OutOfSpace
from torchcache.model import ChunkId
from torchcache.records import Location, chunk_key
from torchcache_server.store.chunk import StoredChunk
from torchcache_server.store.core import Core, Known
from torchcache_server.store.disk import UNREADABLE
from torchcache_server.store.segments import Segment

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


def find_in_memory(core: Core, chunk: ChunkId) -> StoredChunk | None:
    """`find` for who touches the payload in this process: what the disk can't read is a miss, and no SIGBUS."""
    found = find(core, chunk)
    if found is None or not found.payload.size:
        return found
    try:
        core.disk.populate(found.payload, 0, found.payload.size)
    except OSError as error:
        _log.warning("chunk %d of %s can't be read: %s", chunk.index, chunk.object, error)
        location = core.index.get(chunk_key(chunk))
        if error.errno in UNREADABLE and location is not None:
            forget_if_replaceable(core, chunk_key(chunk), location, is_readable=False)
        return None
    return found


def _at(core: Core, chunk: ChunkId, key: bytes, location: Location | None) -> StoredChunk | None:
    if location is None:
        return None
    segment = core.space.segments.get(location.segment)
    if segment is None or (core.watch.out_of_service and not core.is_kept(segment)):
        return None
    known = core.known.get(location)
    if known is not None and known.chunk_index == chunk.index and known.identity == chunk.object.encoded:
        core.touch(segment, key)
        return known.chunk
    try:
        record = segment.populated_record(core.disk, location.offset)
    except OSError as error:
        _log.warning("a record at %d in %s can't be read: %s", location.offset, segment.path, error)
        if error.errno in UNREADABLE:
            forget_if_replaceable(core, key, location, is_readable=False)
        return None
    if record is None:
        forget_if_replaceable(core, key, location)
    elif record.chunk_index != chunk.index or record.identity != chunk.object.encoded:
        _disbelieve(core, key, location)
    else:
        core.touch(segment, key)
        found = segment.chunk(location.offset, record)
        core.learn(location, segment, Known(chunk.index, record.identity, found))
        return found
    return None


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
        forget(core, key, location)


def forget_if_replaceable(core: Core, key: bytes, location: Location, *, is_readable: bool = True) -> None:
    """Takes a bad record out, but for one that must be kept: what is left of it may be all there is.

    What isn't readable isn't touched again.
    """
    segment = core.space.segments.get(location.segment)
    if segment is None:
        return
    if not core.is_kept(segment) or not core.index.owns(key, location):
        forget(core, key, location, is_readable=is_readable)
    elif core.damaged_kept.get(location) is None:
        core.damaged_kept[location] = segment.header.namespace
        _log.error(
            "a record at %d in %s is damaged; it belongs to %s, which isn't in the under-store yet: save again",
            location.offset,
            segment.path,
            segment.header.namespace,
        )


def forget(core: Core, key: bytes, location: Location, *, is_readable: bool = True) -> None:
    """Takes the record at `location` out, unless the chunk has been stored anew meanwhile."""
    core.known.pop(location, None)
    try:
        with core.index.writing() as writer:
            if writer.get(key) != location:
                return
            is_its_place = writer.owns(key, location)
            writer.delete(key)
    except OutOfSpace as error:
        # Found damaged again by the next who asks; counted as gone only once it is.
        _log.warning("a damaged chunk stays in the index: %s", error)
        return
    segment = core.space.segments.get(location.segment)
    if segment is None:
        return
    core.counts.add(corrupt=1)
    if not is_its_place:  # what lies there is another's, or no record at all: it stays as it is
        _log.warning("an index entry pointed to a place that isn't its chunk's, and is dropped")
        return
    record_bytes = _record_bytes(core, segment, location.offset) if is_readable else None
    with core.lock:
        segment.lose(record_bytes)
        is_empty = segment.sealed and not segment.writing and not segment.chunks
    _log.warning("a damaged record at %d in %s is dropped", location.offset, segment.path)
    segment.bury(core.disk, location.offset)
    if is_empty:
        core.remove([segment])


def _record_bytes(core: Core, segment: Segment, offset: int) -> int | None:
    """What a bad record takes; None if it doesn't even tell that any more."""
    try:
        record = segment.populated_record(core.disk, offset)
    except OSError:
        return None
    return record.record_bytes if record is not None else None
