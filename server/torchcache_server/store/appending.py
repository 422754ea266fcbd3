"""Putting chunks into the store: room is reserved under the lock, bytes are written outside, then they are indexed.

A record is in the index only once all its bytes are written, so that nobody finds a half one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from torchcache.errors import ConfigurationError, OutOfSpace, TorchCacheError
from torchcache.model import CHUNK_BYTES, ChunkId, block_digests, chunk_digest
from torchcache_server.store.chunk import Payload, StoredChunk, byte_view
from torchcache_server.store.core import Core
from torchcache_server.store.disk import Bytes
from torchcache_server.store.index import Location, chunk_key
from torchcache_server.store.record import (
    MAX_IDENTITY_BYTES,
    RecordHeader,
    encode_record,
    header_bytes,
    padding,
)
from torchcache_server.store.segments import Segment, folder_name, new_header
from torchcache_server.store.space import Layout, Namespace, check_name, lay_out

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Draft:
    """A chunk on its way into the store, and the place it got."""

    key: bytes
    header: RecordHeader
    payload: memoryview
    segment: Segment | None = None
    offset: int = 0


class _Part(NamedTuple):
    """Room in one segment for some drafts, one behind the other."""

    segment: Segment
    offset: int
    drafts: Sequence[Draft]

    @property
    def size(self) -> int:
        return sum(d.header.record_bytes for d in self.drafts)


class _Reserved(NamedTuple):
    """Room for a batch. `touched` are the segments that it goes to or that it filled up."""

    parts: list[_Part]
    touched: list[Segment]


def draft(chunk: ChunkId, object_size: int, payload: Payload) -> Draft:
    """Checksums and header of a new record. Raises ConfigurationError for what no record can hold."""
    view = byte_view(payload)
    identity = chunk.object.encoded
    if len(view) > CHUNK_BYTES:
        raise ConfigurationError(
            f"chunk {chunk.index} of {chunk.object} has {len(view)} bytes: cut it at {CHUNK_BYTES}"
        )
    if len(identity) > MAX_IDENTITY_BYTES:
        raise ConfigurationError(
            f"the name of object {chunk.object.key[:100]}… takes {len(identity)} bytes: at most "
            f"{MAX_IDENTITY_BYTES} are possible"
        )
    length = header_bytes(len(identity), len(view))
    digests = block_digests(view)
    header = RecordHeader(length, len(view), chunk.index, object_size, chunk_digest(view), identity, digests)
    return Draft(chunk_key(chunk), header, view)


def append(core: Core, namespace: str, drafts: Sequence[Draft]) -> list[StoredChunk]:
    """Stores the drafts, each of another chunk, in one index transaction.

    Raises OutOfSpace, and then none of them is stored.
    """
    check_name(namespace)
    reserved = _reserve(core, namespace, drafts)
    try:
        try:
            _write(core, namespace, reserved.parts)
            late = _commit(core, drafts)
        except OSError as error:
            _give_back(core, reserved, seal=error.errno not in _FULL)
            raise OutOfSpace(
                f"the store's disk takes no more: {error}; free some disk space or give a smaller capacity"
            ) from error
        except OutOfSpace:
            _give_back(core, reserved, seal=False)
            raise
        for segment, offset in late:
            # Else a rebuilt index might bring back a chunk whose better known record was quarantined or dropped.
            segment.bury(core.disk, offset)
    finally:
        _release(core, reserved)
    return [_stored(one) for one in drafts]


def _reserve(core: Core, namespace: str, drafts: Sequence[Draft]) -> _Reserved:
    sizes = [d.header.record_bytes for d in drafts]
    start = new_header(namespace, 0, 0).length
    space = core.space
    while True:
        with core.lock:
            owner = space.namespace(namespace)
            room = _open_segment(core, owner)
            layout = lay_out(
                sizes,
                tail=room.tail if room else 0,
                room_bytes=room.room_bytes if room else 0,
                start=start,
                segment_bytes=space.segment_bytes,
            )
            short = space.used_bytes + layout.bytes - space.capacity_bytes
            if short <= 0:
                try:
                    return _take(core, owner, layout, drafts)
                except OSError as error:
                    raise OutOfSpace(
                        f"the store can't make a segment: {error}; free some disk space"
                    ) from error
        if layout.bytes > space.capacity_bytes or not core.make_room(namespace, short):
            raise OutOfSpace(
                f"the store {core.folder.path} is full: {space.used_bytes} of {space.capacity_bytes} bytes are used "
                f"and nothing may be evicted for {namespace!r}; raise the capacity"
            )


def _open_segment(core: Core, owner: Namespace) -> Segment | None:
    """The segment that takes the namespace's next records, if there is one."""
    segment = owner.open
    if segment is not None and segment.room_bytes and segment.fd is None:
        try:
            segment.reopen(core.disk)
        except OSError as error:
            _log.warning("segment %s takes no more records: %s", segment.path, error)
            segment.sealed = True
    return segment


def _take(core: Core, owner: Namespace, layout: Layout, drafts: Sequence[Draft]) -> _Reserved:
    """Makes the segments the layout asks for and takes the room. All or nothing: raises OSError."""
    made: list[Segment] = []
    try:
        for ahead in range(layout.new_segments):
            made.append(_new_segment(core, owner.name, ahead))
    except OSError:
        for segment in made:
            segment.close(core.disk)
            core.disk.unlink(segment.path)
        raise
    touched = [owner.open, *made]
    for segment in made:
        if owner.open is not None:
            owner.open.sealed = True
        core.space.add(segment)
        owner.open = segment
        owner.names_unsynced = True
    parts = []
    for run in layout.runs:
        taker = touched[run.segment]
        if taker is None:
            raise TorchCacheError("a batch was laid out into a segment that isn't there")
        part = _Part(taker, run.offset, drafts[run.first : run.last])
        core.space.take(taker, part.size)
        taker.writing.add(run.offset)
        parts.append(part)
    owner.last_used = next(core.clock)
    return _Reserved(parts, [s for s in touched if s is not None])


def _new_segment(core: Core, namespace: str, ahead: int) -> Segment:
    folder = os.path.join(core.folder.segments, folder_name(namespace))
    core.disk.make_dir(folder)
    header = new_header(namespace, core.space.next_number + ahead, core.space.segment_bytes)
    return Segment.create(core.disk, folder, header)


def _write(core: Core, namespace: str, parts: Sequence[_Part]) -> None:
    """Writes all records. A disk that is full gets one more chance, after others' segments have gone."""
    for part in parts:
        buffers = _buffers(part)
        try:
            part.segment.write(core.disk, buffers, part.offset)
        except OSError as error:
            if error.errno not in _FULL or not core.make_room(namespace, part.size):
                raise
            _log.warning("the disk is full before the store is: others' segments were evicted")
            part.segment.write(core.disk, buffers, part.offset)
        part.segment.unsynced = True


def _buffers(part: _Part) -> list[Bytes]:
    buffers: list[Bytes] = []
    offset = part.offset
    for one in part.drafts:
        one.segment, one.offset = part.segment, offset
        buffers.append(encode_record(one.header, part.segment.header.nonce, offset))
        if one.header.payload_bytes:
            buffers.append(one.payload)
        if zeros := padding(one.header.payload_bytes):
            buffers.append(zeros)
        offset += one.header.record_bytes
    return buffers


def _give_back(core: Core, reserved: _Reserved, *, seal: bool) -> None:
    """Returns the room of a batch that failed. `seal`: whatever ails the segments, new records go elsewhere."""
    with core.lock:
        for part in reversed(reserved.parts):
            core.space.give_back(part.segment, part.offset, part.size)
            part.segment.sealed |= seal


def _commit(core: Core, drafts: Sequence[Draft]) -> list[tuple[Segment, int]]:
    """Makes the records visible, but for those whose segment was dropped meanwhile.

    Returns the places of records that came too late: others had stored the chunk first.
    """
    placed: list[Segment] = []
    late: list[tuple[Segment, int]] = []
    with core.index.writing() as writer:
        for one in drafts:
            segment = one.segment
            if segment is None or segment.dropped:
                continue
            before = writer.get(one.key)
            if before is None or before.segment not in core.space.segments:
                writer.put(one.key, Location(segment.number, one.offset))
                placed.append(segment)
            else:
                late.append((segment, one.offset))
    with core.lock:
        for segment in placed:
            segment.chunks += 1
    return late


def _release(core: Core, reserved: _Reserved) -> None:
    with core.lock:
        for part in reserved.parts:
            part.segment.writing.discard(part.offset)
            core.rest(part.segment)
    for segment in reserved.touched:
        core.close_if_done(segment)


def _stored(one: Draft) -> StoredChunk:
    if one.segment is None:
        raise TorchCacheError("a chunk was committed before it got a place")
    return one.segment.chunk(one.offset, one.header)
