"""Moving records out of a segment, so that its file can go while they stay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from torchcache.errors import OutOfSpace
from torchcache.records import Location
from torchcache_server.store.core import Core
from torchcache_server.store.keeping import sync_names
from torchcache_server.store.segments import Segment
from torchcache_server.store.space import Namespace
from torchcache_server.store.writing import Draft, Short, commit, give_back, release, reserve, write

_MOVING: Final = -1
"""Among a segment's `writing`: it is being emptied, and nobody else may evict it."""

_BATCH_BYTES: Final = 8 * 1024 * 1024

_log = logging.getLogger(__name__)


def compact(core: Core, segment: Segment, stays: Callable[[bytes], bool]) -> int:
    """Moves the records whose keys `stays` says yes to into the namespace's open segment; the others go with the file.

    Returns the bytes that became free: 0, and nothing happened, if the segment is in use or must be kept, or there is
    no room to move to. What can't be read is lost: it is a miss from now on.
    """
    with core.moving:
        return _compact(core, segment, stays)


def _compact(core: Core, segment: Segment, stays: Callable[[bytes], bool]) -> int:
    with core.lock:
        if segment.dropped or segment.writing or core.is_kept(segment):
            return 0
        namespace = core.space.namespaces[segment.header.namespace]
        moves_all = namespace.policy.pinned  # it may have been pinned since the caller looked
        segment.sealed = True
        if namespace.open is segment:
            namespace.open = None
        segment.writing.add(_MOVING)
    core.close_if_done(segment)
    moved_to: list[Segment] = []
    try:
        entries = core.index.members(segment.number)
        staying = [(key, offset) for key, offset in entries if moves_all or stays(key)]
        if not _move(core, segment, staying, moved_to):
            return 0
    finally:
        with core.lock:
            segment.writing.discard(_MOVING)
    with namespace.sync_lock:  # no sync may take the file for one that stays
        if segment.synced and not _sync(core, namespace, moved_to):
            return 0
        removed = core.remove([segment])
    core.counts.add(evicted_chunks=len(entries) - len(staying))
    return segment.held_bytes if removed else 0


def _sync(core: Core, namespace: Namespace, moved_to: Sequence[Segment]) -> bool:
    """What was durable is so where it is now. False if the disk doesn't make it so, now or earlier."""
    try:
        for segment in moved_to:
            segment.sync(core.disk)
        sync_names(core, namespace)
    except OSError as error:
        _log.error("what was moved within %r can't be synced: %s; see to the disk", namespace.name, error)
        return False
    with core.lock:
        return not any(segment.sync_error for segment in namespace.segments.values())


def _move(
    core: Core, segment: Segment, entries: Sequence[tuple[bytes, int]], moved_to: list[Segment]
) -> bool:
    """False if not all that can be read could be moved; what was moved until then is where it is now.

    Where that is, is added to `moved_to`.
    """
    batch: list[Draft] = []
    size = 0
    for key, offset in entries:
        one = _draft(core, segment, key, offset)
        if one is not None:
            batch.append(one)
            size += one.header.record_bytes
        if size >= _BATCH_BYTES:
            if not _append(core, segment, batch, moved_to):
                return False
            batch, size = [], 0
    return not batch or _append(core, segment, batch, moved_to)


def _draft(core: Core, segment: Segment, key: bytes, offset: int) -> Draft | None:
    try:
        record = segment.populated_record(core.disk, offset)
    except OSError as error:
        _log.warning("a record at %d in %s can't be read, and isn't moved: %s", offset, segment.path, error)
        return None
    if record is None:
        return None
    start = offset + record.length
    # Its checksums come along as they are: damage stays what it is, and is found by whoever reads.
    payload = segment.view[start : start + record.payload_bytes]
    return Draft(key, record, payload, moved_from=Location(segment.number, offset))


def _append(core: Core, origin: Segment, drafts: Sequence[Draft], moved_to: list[Segment]) -> bool:
    namespace = origin.header.namespace
    try:
        # The file that is emptied counts as gone: a full store has no other room to move to.
        reserved = reserve(core, namespace, drafts, promised_bytes=origin.held_bytes)
    except OutOfSpace as error:
        _log.warning("nothing can be moved within %r: %s", namespace, error)
        return False
    if isinstance(reserved, Short):
        return False
    moved_to += [part.segment for part in reserved.parts]
    try:
        for part in reserved.parts:
            write(core, part)
        commit(core, drafts)
    except (OSError, OutOfSpace) as error:
        give_back(core, reserved, seal=isinstance(error, OSError))
        _log.warning("nothing can be moved within %r: %s", namespace, error)
        return False
    finally:
        release(core, reserved)
    core.counts.add(compacted_bytes=sum(d.header.record_bytes for d in drafts))
    return True
