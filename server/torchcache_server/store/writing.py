"""Putting records into segments: room is taken under the lock, bytes are written outside, then they are indexed.

A record is in the index only once all its bytes are written, so that nobody finds a half one. Nothing here makes room
but by letting spares go.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchcache.errors import ConfigurationError, OutOfSpace, TorchCacheError
from torchcache.model import CHUNK_BYTES, ChunkId, block_digests, chunk_digest
from torchcache.records import (
    MAX_IDENTITY_BYTES,
    Location,
    RecordHeader,
    chunk_key,
    encode_record,
    file_name,
    folder_name,
    header_bytes,
    padding,
)
from torchcache_server.store.chunk import Payload, StoredChunk, byte_view
from torchcache_server.store.core import Core
from torchcache_server.store.disk import Bytes
from torchcache_server.store.segments import Segment, discard, new_header
from torchcache_server.store.space import Layout, Namespace, lay_out

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Draft:
    """A record on its way into the store, and the place it got. `moved_from` is where it lies now, if it is moved."""

    key: bytes
    header: RecordHeader
    payload: memoryview
    moved_from: Location | None = None
    segment: Segment | None = None
    offset: int = 0

    @property
    def stored(self) -> StoredChunk:
        """The chunk, once it is written."""
        if self.segment is None:
            raise TorchCacheError("a chunk was committed before it got a place")
        return self.segment.chunk(self.offset, self.header)


class Part(NamedTuple):
    """Room in one segment for some drafts, one behind the other."""

    segment: Segment
    offset: int
    drafts: Sequence[Draft]

    @property
    def size(self) -> int:
        return sum(d.header.record_bytes for d in self.drafts)


class Reserved(NamedTuple):
    """Room for a batch. `touched` are the segments that it goes to or that it filled up."""

    parts: list[Part]
    touched: list[Segment]


class Short(NamedTuple):
    """How much room is missing for a batch of `bytes`: of the capacity, and of the file system."""

    bytes: int
    capacity_bytes: int
    disk_bytes: int


def draft(chunk: ChunkId, object_size: int, payload: Payload) -> Draft:
    """Checksums and header of a new record. Raises ConfigurationError for what no record can hold."""
    view = byte_view(payload)
    header = _planned_header(chunk, object_size, len(view))
    header = header._replace(digest=chunk_digest(view), block_digests=block_digests(view))
    return Draft(chunk_key(chunk), header, view)


def planned(chunk: ChunkId, object_size: int, payload_bytes: int) -> Draft:
    """A record of which only the size is known: somebody else writes it. Raises as `draft`."""
    return Draft(chunk_key(chunk), _planned_header(chunk, object_size, payload_bytes), memoryview(b""))


def _planned_header(chunk: ChunkId, object_size: int, payload_bytes: int) -> RecordHeader:
    """The header but for its checksums."""
    identity = chunk.object.encoded
    if payload_bytes > CHUNK_BYTES:
        raise ConfigurationError(
            f"chunk {chunk.index} of {chunk.object} has {payload_bytes} bytes: cut it at {CHUNK_BYTES}"
        )
    if len(identity) > MAX_IDENTITY_BYTES:
        raise ConfigurationError(
            f"the name of object {chunk.object.key[:100]}… takes {len(identity)} bytes: at most "
            f"{MAX_IDENTITY_BYTES} are possible"
        )
    length = header_bytes(len(identity), payload_bytes)
    return RecordHeader(length, payload_bytes, chunk.index, object_size, 0, identity, b"")


def reserve(
    core: Core, namespace: str, drafts: Sequence[Draft], *, promised_bytes: int = 0, alone: bool = False
) -> Reserved | Short:
    """Takes room for the drafts, or says how much is missing. Raises OutOfSpace: the disk makes no segment.

    `promised_bytes` of it the caller was promised before. `alone`: in new segments, which are handed out, and take
    nothing else. Who got room calls `release` when all is over.
    """
    sizes = [d.header.record_bytes for d in drafts]
    space, spares = core.space, core.spares
    with core.lock:
        owner = space.namespace(namespace)
        room = None if alone else _open_segment(core, owner)
        layout = lay_out(
            sizes,
            tail=room.tail if room else 0,
            room_bytes=room.room_bytes if room else 0,
            start=new_header(namespace, 0, 0).length,
            segment_bytes=space.segment_bytes,
        )
        while True:
            ready = spares.ready(space.segment_bytes)[: layout.new_segments]
            taken = layout.taken_bytes(room, ready)
            growth = taken - sum(ready)  # beyond what segments and spares take now
            over = space.used_bytes + spares.bytes + growth - space.capacity_bytes
            if over <= 0 or not spares.trim(over):
                break
        used = space.used_bytes + space.promised_bytes - promised_bytes
        over_capacity = used + taken - space.capacity_bytes
        promised = space.promised_bytes - promised_bytes
        over_disk = growth and growth + promised + core.min_free_bytes - core.free_bytes()
        if over_capacity > 0 or over_disk > 0:
            if room is not None:
                core.rest(room)  # it may have been opened in vain
            space.forget_if_empty(namespace)
            return Short(layout.bytes, over_capacity, over_disk)
        try:
            return _take(core, owner, layout, drafts, alone=alone)
        except OSError as error:
            if room is not None:
                core.rest(room)
            raise OutOfSpace(f"the store can't make a segment: {error}; free some disk space") from error


def place(part: Part) -> None:
    """Gives each record of a part its place."""
    offset = part.offset
    for one in part.drafts:
        one.segment, one.offset = part.segment, offset
        offset += one.header.record_bytes


def write(core: Core, part: Part) -> None:
    """Writes the records of a part. Raises OSError."""
    place(part)
    buffers: list[Bytes] = []
    for one in part.drafts:
        buffers.append(encode_record(one.header, part.segment.header.nonce, one.offset))
        if one.header.payload_bytes:
            buffers.append(one.payload)
        if zeros := padding(one.header.payload_bytes):
            buffers.append(zeros)
    part.segment.write(core.disk, buffers, part.offset)
    part.segment.unsynced = True


def give_back(core: Core, reserved: Reserved, *, seal: bool) -> None:
    """Returns the room of a batch that failed. `seal`: whatever ails the segments, new records go elsewhere."""
    with core.lock:
        for part in reversed(reserved.parts):
            # Under the lock: nobody takes that room meanwhile.
            if core.space.give_back(part.segment, part.offset, part.size):
                part.segment.clear_behind(core.disk)
            else:  # others have taken what follows
                core.space.holed(part.segment, part.segment.clear(core.disk, part.offset, part.size))
            part.segment.sealed |= seal


def commit(core: Core, drafts: Sequence[Draft]) -> None:
    """Makes the records visible, but for those whose segment was dropped meanwhile, and those that came too late.

    A new one is too late if others stored the chunk first, a moved one if the chunk isn't where it was any more.
    Raises OutOfSpace, and then none is visible.
    """
    placed: list[Draft] = []
    late: list[Draft] = []
    mended: list[Location] = []
    with core.index.writing() as writer:
        for one in drafts:
            segment = one.segment
            if segment is None or segment.dropped:
                continue
            before = writer.get(one.key)
            if before is not None and before.segment not in core.space.segments:
                before = None
            if before in core.damaged_kept and one.moved_from is None:  # here is what mends it
                mended.append(before)
                before = None
            if before == one.moved_from:
                if not segment.listed:
                    writer.put_file(segment.header)
                writer.put(one.key, Location(segment.number, one.offset))
                placed.append(one)
            else:
                late.append(one)
    with core.lock:
        for one in placed:
            if one.segment is not None:
                one.segment.listed = True
                one.segment.gain(one.header.record_bytes)
            origin = core.space.segments.get(one.moved_from.segment) if one.moved_from else None
            if origin is not None:
                origin.lose(one.header.record_bytes)
        _lose_mended(core, mended)
    for one in late:
        # Else a rebuilt index might bring back a chunk whose better known record was quarantined or dropped.
        if one.segment is not None:
            one.segment.bury(core.disk, one.offset)


def _lose_mended(core: Core, places: Sequence[Location]) -> None:
    """Damaged records that others have taken the place of. Under `lock`."""
    for place in places:
        core.damaged_kept.pop(place, None)
        if place.segment in core.space.segments:
            core.space.segments[place.segment].lose(None)


def release(core: Core, reserved: Reserved) -> None:
    """The batch is over, well or not: its segments may rest, or be closed."""
    with core.lock:
        for part in reserved.parts:
            part.segment.writing.discard(part.offset)
            core.rest(part.segment)
    for segment in reserved.touched:
        core.close_if_done(segment)


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


def _take(core: Core, owner: Namespace, layout: Layout, drafts: Sequence[Draft], *, alone: bool) -> Reserved:
    """Makes the segments the layout asks for and takes the room. All or nothing: raises OSError."""
    made: list[Segment] = []
    try:
        for _ in range(layout.new_segments):
            made.append(_new_segment(core, owner.name, handed_out=alone))
    except OSError:
        for segment in made:
            segment.discard(core.disk)
        raise
    touched = [owner.open, *made]
    for segment in made:
        # Also if it takes nothing of what comes: of two records of a chunk the later has the higher number.
        if owner.open is not None:
            owner.open.sealed = True
        core.space.add(segment)
        segment.sealed = alone
        owner.open = None if alone else segment
        owner.names_unsynced = True
    parts = []
    for run in layout.runs:
        taker = touched[run.segment]
        if taker is None:
            raise TorchCacheError("a batch was laid out into a segment that isn't there")
        part = Part(taker, run.offset, drafts[run.first : run.last])
        core.space.take(taker, part.size)
        taker.writing.add(run.offset)
        parts.append(part)
    return Reserved(parts, [s for s in touched if s is not None])


def _new_segment(core: Core, namespace: str, *, handed_out: bool) -> Segment:
    """A spare that gets a new header, or a new file. Raises OSError.

    Its number is used up either way: a file that can't be removed again must not share it with another.
    """
    disk, file_bytes = core.disk, core.space.segment_bytes
    folder = os.path.join(core.folder.segments, folder_name(namespace))
    disk.make_dir(folder)
    header = new_header(namespace, core.space.next_number, file_bytes, handed_out=handed_out)
    core.space.next_number += 1
    path = os.path.join(folder, file_name(header.number, header.nonce))
    spare = core.spares.take(path, file_bytes)
    if spare is None:
        return Segment.create(disk, folder, header)
    fd, held_bytes = spare
    try:
        segment = Segment.begin(disk, path, fd, header)
        disk.unlock(fd)
    except OSError:
        discard(disk, path, fd)
        raise
    segment.floor_bytes = held_bytes
    return segment
