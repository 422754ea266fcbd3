"""Opening a store: the index and the space, as the segments that are there bear them out."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

import lmdb
import numpy as np

from torchcache.errors import OutOfSpace
from torchcache.records import SUFFIX, Location, folder_name, parse_file_name
from torchcache_server.store.core import Core
from torchcache_server.store.disk import UNREADABLE, DiskCalls
from torchcache_server.store.folder import StoreFolder
from torchcache_server.store.index import PLACE, Index, SegmentNote, remove_index
from torchcache_server.store.layout import FLAGS
from torchcache_server.store.recovery import Scan, scan_and_cut
from torchcache_server.store.recycling import Spares
from torchcache_server.store.segments import Segment
from torchcache_server.store.space import Space

_SCAN_THREADS: Final = 16
_FEW_SEGMENTS: Final = 8  # fewer than these are scanned one after the other
_BATCH_BYTES: Final = 64 << 20  # of places go to the index at a time: 1.7 million
_TELL_EVERY_S: Final = 5
_NOWHERE: Final = Location(-1, 0)

_log = logging.getLogger(__name__)


def open_core(folder: StoreFolder, disk: DiskCalls, space: Space, *, kept: Iterable[str] = ()) -> Core:
    """Everything of a store but its durable records. Raises OSError, OutOfSpace.

    `kept` are the namespaces that must not be lost: a damaged header of one of their segments is made again.
    """
    index, notes = _open_index(folder, space.capacity_bytes)
    try:
        core = Core(disk, folder, index, space, Spares(disk, folder.spares))
        _load_segments(core, notes, {folder_name(name): name for name in kept})
        _sync_names(disk, folder.segments)
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
        # A client that knows nothing of the restart may still write into it.
        last.sealed |= last.header.handed_out
    core.remove(
        [s for s in space.segments.values() if s.header.handed_out and not s.chunks and not s.doubtful]
    )
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


def _sync_names(disk: DiskCalls, root: str) -> None:
    """Makes durable which segments there are, so that none that has gone comes back.

    Its number may be another's by then: numbers go on behind the highest that is there.
    """
    for folder in [*(os.path.join(root, name) for name in disk.names(root)), root]:
        try:
            disk.fsync_dir(folder)
        except OSError as error:
            _log.error("the names in %s can't be made durable: %s; see to the disk", folder, error)


def _load_segments(core: Core, notes: dict[int, SegmentNote], kept: Mapping[str, str]) -> None:
    doubtful: list[Segment] = []
    for segment, is_whole in _open_segments(core, kept):
        note = notes.get(segment.number) if is_whole else None
        core.space.add(segment)
        if note is not None and segment.header.length <= note.tail <= segment.header.file_bytes:
            _believe(core, segment, note)
        else:
            doubtful.append(segment)
        segment.close(core.disk)
        segment.unsynced = segment.synced = True  # who knows what the last server came to sync
    with core.index.writing() as writer:
        for number in notes.keys() - core.space.segments.keys():
            writer.delete_segment(number)
        for segment in doubtful:
            writer.delete_segment(segment.number)
    _reread(core, doubtful)
    with core.index.writing() as writer:
        writer.replace_files(segment.header for segment in core.space.segments.values())
    for segment in core.space.segments.values():
        segment.listed = True


def _open_segments(core: Core, kept: Mapping[str, str]) -> Iterator[tuple[Segment, bool]]:
    """Every sound segment file, by number, and whether it has its full length. `kept`: namespaces, by their folders.

    One without a sound header is removed, unless it is of a namespace that is kept: then it gets a new one. One that
    can't be read is left out, and left where it is: the disk may be better next time, and what is kept may be in it.
    Other segments are none the worse for it, and a checkpoint that is in those can still be uploaded; so the store
    opens without it, also if it is of a namespace that is kept.
    """
    disk, root = core.disk, core.folder.segments
    paths = [
        os.path.join(root, folder, name)
        for folder in disk.names(root)
        for name in disk.names(os.path.join(root, folder))
        if name.endswith(SUFFIX)
    ]
    doubtful = {name.partition(".")[0] for name in core.folder.set_aside(FLAGS)}
    for path in sorted(paths, key=os.path.basename):
        folder = os.path.basename(os.path.dirname(path))
        try:
            opened = Segment.open(disk, path, namespace=kept.get(folder))
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            _log.error("segment %s can't be read and is left out: %s; see to the disk", path, error)
            _reserve_number(core.space, path)
            continue
        if opened is None and folder in doubtful:
            _log.error("segment %s has no sound header, and may have to be kept: it is left out", path)
            _reserve_number(core.space, path)
        elif opened is None:
            _log.warning("segment %s has no sound header and is removed", path)
            disk.unlink(path)
        else:
            yield opened


def _reserve_number(space: Space, path: str) -> None:
    """Keeps a file's number from being given to a new one: of two records of a chunk the later must be told."""
    named = parse_file_name(os.path.basename(path))
    if named is not None:
        space.next_number = max(space.next_number, named[0] + 1)


def _believe(core: Core, segment: Segment, note: SegmentNote) -> None:
    core.space.take(segment, note.tail - segment.tail)
    segment.chunks, segment.live_bytes = note.chunks, note.live_bytes
    namespace = core.space.namespaces[segment.header.namespace]
    namespace.last_used = max(namespace.last_used, note.last_used)


def _reread(core: Core, segments: Sequence[Segment]) -> None:
    """Indexes the records of these segments anew and cuts what lies behind the last of each."""
    places = bytearray()
    with closing(_scans(core.disk, segments)) as scans:
        for segment, found in zip(segments, scans, strict=True):
            if isinstance(found, OSError):
                _leave_out(core, segment, found)
            else:
                _take_in(core, segment, found)
                places += found.places
            if len(places) >= _BATCH_BYTES:
                _place(core, places)
                places = bytearray()
    _place(core, places)


def _take_in(core: Core, segment: Segment, found: Scan) -> None:
    core.space.take(segment, found.tail - segment.tail)
    namespace = core.space.namespaces[segment.header.namespace]
    namespace.last_used = max(namespace.last_used, segment.number)
    if found.error is not None:
        segment.sealed = segment.doubtful = True
        _log.error(
            "parts of segment %s can't be read: %s; of its chunks %d are found; see to the disk",
            segment.path,
            found.error,
            len(found.places) // PLACE.itemsize,
        )


def _scans(disk: DiskCalls, segments: Sequence[Segment]) -> Generator[Scan | OSError, None, None]:
    """What each segment holds, in their order; or why it can't be read. Says how far it is, if that takes long."""
    if len(segments) < _FEW_SEGMENTS:
        for segment in segments:
            yield _scan(disk, segment)
        return
    told = time.monotonic()
    with ThreadPoolExecutor(_SCAN_THREADS, "recovery") as threads:
        scans = deque(threads.submit(_scan, disk, segment) for segment in segments)
        try:
            while scans:
                if time.monotonic() - told >= _TELL_EVERY_S:
                    told = time.monotonic()
                    done = len(segments) - len(scans)
                    _log.warning("recovering: %s of %s segments", f"{done:,}", f"{len(segments):,}")
                yield scans.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


def _scan(disk: DiskCalls, segment: Segment) -> Scan | OSError:
    try:
        segment.reopen(disk)
        try:
            return scan_and_cut(disk, segment)
        finally:
            segment.close(disk)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        return error


def _leave_out(core: Core, segment: Segment, error: OSError) -> None:
    """As `_open_segments` does with a file that can't be opened."""
    _log.error("segment %s can't be read and is left out: %s; see to the disk", segment.path, error)
    core.space.remove(segment)
    core.space.forget_if_empty(segment.header.namespace)


def _place(core: Core, found: bytearray) -> None:
    """Of two records of one chunk the later wins: the earlier was found damaged, or nobody has seen it."""
    places = np.sort(np.frombuffer(found, f"S{PLACE.itemsize}")).view(PLACE)
    keys = places["key"]
    latest = places[np.append(keys[1:] != keys[:-1], True)] if len(places) else places
    segments = core.space.segments
    with core.index.writing() as writer:
        before = writer.get_many(latest["key"].tolist())
        if before:
            wins = [
                before.get(key, _NOWHERE) < (segment, offset) for key, segment, offset, _ in latest.tolist()
            ]
            latest = latest[np.array(wins)]
            for key in before.keys() & set(latest["key"].tolist()):
                old = writer.delete(key)
                if old is not None and old.segment in segments:
                    segments[old.segment].lose(None)
        writer.put_all(latest)
    numbers, which, counts = np.unique(latest["segment"], return_inverse=True, return_counts=True)
    sizes = np.bincount(which, weights=latest["record_bytes"], minlength=len(numbers))
    for number, count, size in zip(numbers.tolist(), counts.tolist(), sizes.tolist(), strict=True):
        segments[number].gain(int(size), chunks=count)
