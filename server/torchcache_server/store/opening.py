"""Opening a store: the index and the space, as the segments that are there bear them out."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping

import lmdb

from torchcache.errors import OutOfSpace
from torchcache_server.store.core import Core
from torchcache_server.store.disk import DiskCalls
from torchcache_server.store.folder import StoreFolder
from torchcache_server.store.index import Index, IndexWriter, Location, SegmentNote, record_key, remove_index
from torchcache_server.store.recovery import cut_tail, find_records
from torchcache_server.store.recycling import Spares
from torchcache_server.store.segments import SUFFIX, Segment, folder_name
from torchcache_server.store.space import Space

_log = logging.getLogger(__name__)


def open_core(folder: StoreFolder, disk: DiskCalls, space: Space, *, kept: Iterable[str] = ()) -> Core:
    """Everything of a store but its durable records. Raises OSError, OutOfSpace.

    `kept` are the namespaces that must not be lost: a damaged header of one of their segments is made again.
    """
    index, notes = _open_index(folder, space.capacity_bytes)
    try:
        spares = Spares(disk, folder.spares)
        spares.begin()
        core = Core(disk, folder, index, space, spares)
        _load_segments(core, notes, {folder_name(name): name for name in kept})
    except BaseException:
        index.close(None)
        raise
    for namespace in space.namespaces.values():
        # Goes on where the last server stopped, so that short lives don't each leave a file behind.
        *full, last = (namespace.segments[number] for number in sorted(namespace.segments))
        namespace.open = last
        namespace.names_unsynced = True
        for segment in full:
            segment.sealed = True
    core.clock = itertools.count(1 + max((n.last_used for n in space.namespaces.values()), default=0))
    return core


def _open_index(folder: StoreFolder, capacity_bytes: int) -> tuple[Index, dict[int, SegmentNote]]:
    """The index and its notes; a new, empty one where there is none that can be trusted."""
    if folder.was_clean:
        try:
            index = Index(folder.index, capacity_bytes=capacity_bytes)
            try:
                return index, index.notes()
            except lmdb.Error:
                index.close(None)
                raise
        except lmdb.Error as error:
            _log.warning("the index of %s is damaged and rebuilt: %s", folder.path, error)
    remove_index(folder.index)
    try:
        return Index(folder.index, capacity_bytes=capacity_bytes), {}
    except lmdb.Error as error:
        raise OutOfSpace(f"its index can't be made: {error}") from error


def _load_segments(core: Core, notes: dict[int, SegmentNote], kept: Mapping[str, str]) -> None:
    for segment, is_whole in _open_segments(core.disk, core.folder.segments, kept):
        note = notes.get(segment.number) if is_whole else None
        core.space.add(segment)
        if note is not None and segment.header.length <= note.tail <= segment.header.file_bytes:
            _believe(core, segment, note)
        else:
            _reread(core, segment)
        segment.close(core.disk)
        segment.unsynced = True  # who knows what the last server came to sync
    with core.index.writing() as writer:
        for number in notes.keys() - core.space.segments.keys():
            writer.delete_segment(number)


def _open_segments(disk: DiskCalls, root: str, kept: Mapping[str, str]) -> Iterator[tuple[Segment, bool]]:
    """Every sound segment file, by number, and whether it has its full length; the others are removed."""
    paths = [
        os.path.join(root, folder, name)
        for folder in disk.names(root)
        for name in disk.names(os.path.join(root, folder))
        if name.endswith(SUFFIX)
    ]
    for path in sorted(paths, key=os.path.basename):
        opened = Segment.open(disk, path, namespace=kept.get(os.path.basename(os.path.dirname(path))))
        if opened is None:
            _log.warning("segment %s has no sound header and is removed", path)
            disk.unlink(path)
        else:
            yield opened


def _believe(core: Core, segment: Segment, note: SegmentNote) -> None:
    core.space.take(segment, note.tail - segment.tail)
    segment.chunks, segment.live_bytes = note.chunks, note.live_bytes
    namespace = core.space.namespaces[segment.header.namespace]
    namespace.last_used = max(namespace.last_used, note.last_used)


def _reread(core: Core, segment: Segment) -> None:
    """Indexes a segment's records anew and cuts what lies behind the last."""
    tail = segment.tail
    with core.index.writing() as writer:
        writer.delete_segment(segment.number)
        for offset, record in find_records(core.disk, segment):
            _place(
                core.space,
                writer,
                record_key(record.identity, record.chunk_index),
                Location(segment.number, offset),
                record.record_bytes,
            )
            tail = offset + record.record_bytes
    core.space.take(segment, tail - segment.tail)
    cut_tail(core.disk, segment, tail)
    namespace = core.space.namespaces[segment.header.namespace]
    namespace.last_used = max(namespace.last_used, segment.number)


def _place(space: Space, writer: IndexWriter, key: bytes, location: Location, record_bytes: int) -> None:
    """Of two records of one chunk the later wins: the earlier was found damaged, or nobody has seen it."""
    before = writer.get(key)
    if before is not None and before > location:
        return
    writer.put(key, location)
    if before is not None and before.segment in space.segments:
        space.segments[before.segment].lose(None)
    space.segments[location.segment].gain(record_bytes)
