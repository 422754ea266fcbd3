"""Where a checkpoint's bytes come from: the pool's copy of the save while it has one, else the under-store's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchcache.checkpoint.landing import Granule, granules_of
from torchcache.checkpoint.layout import granule_cover
from torchcache.checkpoint.manifest import Item
from torchcache.errors import (
    CheckpointError,
    IntegrityError,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.model import ByteRange, Extent, ObjectInfo
from torchcache.pool import Pool, SaveInfo
from torchcache.save_names import save_namespace, saved_file

_log = logging.getLogger(__name__)

_READ_S = 120.0
_LARGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bytes `part` of an item's payload, wanted in `into` (writable, as long as the part, which isn't empty)."""

    item: Item
    part: ByteRange
    into: memoryview

    def extent(self, file: ObjectInfo, part: ByteRange | None = None) -> Extent:
        """The part, or another one, as an extent of the item's file."""
        part = part or self.part
        item = self.item
        return Extent(file, item.start + item.payload_start + part.start, part.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFiles:
    """What the pool may hold of a save: its id, and its files with their sizes in bytes."""

    store: str
    path: str
    part: str
    save_id: str
    sizes: dict[str, int]
    borrowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, save: SaveInfo, sizes: dict[str, int]) -> SavedFiles:
        """The files of a save, given their sizes."""
        return cls(
            store=save.store,
            path=save.path,
            part=save.part,
            save_id=save.save_id,
            sizes=sizes,
            borrowed=save.borrowed,
        )

    def object(self, name: str) -> ObjectInfo:
        """A file as its writer stored it in the pool: this save's, or the one it is borrowed from."""
        path, save_id = self.borrowed.get(name, (self.path, self.save_id))
        return ObjectInfo(saved_file(self.store, path, name, save_id), self.sizes[name])


class Source:
    """The bytes of one checkpoint. Thread-safe.

    `saved` is None for a checkpoint that torchcache didn't write. `durable` says whether the under-store has the files.
    """

    def __init__(self, pool: Pool, uri: str, saved: SavedFiles | None, *, durable: bool) -> None:
        self._pool = pool
        self._uri = uri
        self._saved = saved
        self._durable = durable
        self._evicted: set[str] = set()
        self._saved_objects: dict[str, ObjectInfo] = {}
        self._stored: dict[str, ObjectInfo] = {}
        self._warned: dict[str, object] = {}

    def fetch(self, fetches: Sequence[Fetch]) -> None:
        """Fills the buffers of all `fetches`, in one read or two, and checks them against the manifest.

        Raises IntegrityError where no good copy is found, ObjectNotFound for a file that is gone, CheckpointError if
        another save took the path meanwhile.
        """
        stored: list[Fetch] = []
        resident: list[Fetch] = []
        for fetch in fetches:
            gone = self._saved is None or fetch.item.file in self._evicted
            (stored if gone else resident).append(fetch)
        if self._saved is not None and resident:
            stored += self._fetch_saved(self._saved, resident)
        if not stored:
            return
        try:
            self._fetch_stored(stored)
        except (IntegrityError, ObjectChanged, ObjectNotFound):
            # What isn't as the manifest says may be another save's.
            if self._saved is not None:
                self._require_unreplaced(self._saved)
            raise

    def require(self, item: Item) -> None:
        """Raises IntegrityError if an item reaches beyond the end of its file.

        Of a large one also if the file in the under-store isn't as large as the manifest says: memory is about to be
        made for it.
        """
        if self._saved is None:
            size = self.stored_object(item.file).size
        else:
            size = self._saved.sizes[item.file]
            if item.length > _LARGE_BYTES and self._durable:
                try:
                    self.stored_object(item.file)
                except TransientError:
                    pass  # the pool may have it all the same
        if item.start + item.length > size:
            raise IntegrityError(
                f"{item.name!r} should end at byte {item.start + item.length} of {self._uri}/{item.file}, which has "
                f"{size} bytes",
                object=f"{self._uri}/{item.file}",
            )

    def _fetch_saved(self, saved: SavedFiles, fetches: Sequence[Fetch]) -> list[Fetch]:
        """Reads from the pool's copy; returns those it has no good copy of. Warns of what is damaged."""
        fetches, unlike = self._land(saved, fetches)
        if not fetches:
            return []
        outcomes = self._pool.read_each(
            [f.extent(self._saved_object(saved, f.item.file)) for f in fetches],
            namespace=save_namespace(saved.store, saved.path, saved.save_id),
            into=[f.into for f in fetches],
            timeout_s=_READ_S,
        )
        missing: list[Fetch] = []
        damaged: list[Fetch] = []
        had: set[str] = set()
        problem: TorchCacheError | None = None
        for fetch, outcome in zip(fetches, outcomes, strict=True):
            try:
                if isinstance(outcome, TorchCacheError):
                    raise outcome
                fetch.item.verify(fetch.part, fetch.into)
                had.add(fetch.item.file)
            except (NotResident, IntegrityError, ServerUnavailable) as error:
                missing.append(fetch)
                problem = error
                # A server forgets what it finds damaged: then it is only gone.
                if isinstance(error, IntegrityError) or id(fetch) in unlike:
                    damaged.append(fetch)
        if problem is not None:
            self._require_durable(saved, problem)
        for fetch in damaged:
            self._warn_of_damage(fetch.item)
        self._evicted |= {f.item.file for f in missing} - had
        return missing

    def _warn_of_damage(self, item: Item) -> None:
        first = object()  # of all threads one finds its own; and what holds a lock can't be pickled
        if self._warned.setdefault(item.file, first) is not first:
            return
        _log.warning(
            "%s/%s is damaged in the pool (%s does not match its checksum): storage's copy is read",
            self._uri,
            item.file,
            item.name,
        )

    def _land(self, saved: SavedFiles, fetches: Sequence[Fetch]) -> tuple[list[Fetch], set[int]]:
        """Fills the buffers from what lanes lend; returns those fetches that have to be read in another way, and the
        ids of those of them whose bytes came and were wrong."""
        left: list[Fetch] = []
        granules: list[tuple[Fetch, Granule]] = []
        for fetch in fetches:
            found = granules_of(
                fetch.item, fetch.part, fetch.into, self._saved_object(saved, fetch.item.file)
            )
            if found is None:
                left.append(fetch)
            else:
                granules += [(fetch, granule) for granule in found]
        outcomes = iter(
            self._pool.read_each(
                [extent for _, granule in granules for extent in granule.extents],
                namespace=save_namespace(saved.store, saved.path, saved.save_id),
                into=[into for _, granule in granules for into in granule.targets],
                lend=True,
                timeout_s=_READ_S,
            )
        )
        failed: dict[int, Fetch] = {}
        unlike: set[int] = set()
        for fetch, granule in granules:
            came = [next(outcomes) for _ in granule.extents]
            if not granule.land(came):
                failed[id(fetch)] = fetch
                if all(isinstance(one, memoryview) for one in came):
                    unlike.add(id(fetch))
        return [*left, *failed.values()], unlike

    def _saved_object(self, saved: SavedFiles, name: str) -> ObjectInfo:
        """A file as the pool holds it: one value for all who read of it, so that its digest is made once."""
        found = self._saved_objects.get(name)
        if found is None:
            found = self._saved_objects[name] = saved.object(name)
        return found

    def _require_durable(self, saved: SavedFiles, problem: TorchCacheError) -> None:
        """The upload may have ended, and the pool's copy gone, since the checkpoint was opened."""
        if not self._durable:
            self._durable = self._require_unreplaced(saved).state == "durable"
        if not self._durable:
            raise problem

    def _require_unreplaced(self, saved: SavedFiles) -> SaveInfo:
        """What the pool says of the save now. Raises CheckpointError if another one has taken its path."""
        info = self._pool.get_save(saved.store, saved.path, saved.part, manifest=False)
        if info.save_id != saved.save_id:
            raise CheckpointError(
                f"{self._uri} was overwritten while it was being loaded; load it again", object=self._uri
            )
        return info

    def _fetch_stored(self, fetches: Sequence[Fetch]) -> None:
        """Reads from the under-store's files, in whole granules, so that every byte has a checksum to match."""
        covers = [granule_cover(f.part, f.item.payload_length) if f.item.digests else f.part for f in fetches]
        buffers = [
            f.into if cover == f.part else memoryview(bytearray(cover.length))
            for f, cover in zip(fetches, covers, strict=True)
        ]
        self._pool.read(
            [f.extent(self.stored_object(f.item.file), c) for f, c in zip(fetches, covers, strict=True)],
            namespace=self._uri,
            into=buffers,
            timeout_s=_READ_S,
        )
        for fetch, cover, buffer in zip(fetches, covers, buffers, strict=True):
            fetch.item.verify(cover, buffer)
            if buffer is not fetch.into:
                start = fetch.part.start - cover.start
                fetch.into[:] = buffer[start : start + fetch.part.length]

    def stored_object(self, name: str) -> ObjectInfo:
        """A file in the under-store, at the version it had when it was first asked for."""
        info = self._stored.get(name)
        if info is None:
            info = self._pool.stat(f"{self._uri}/{name}")
            if self._saved is not None and info.size != self._saved.sizes[name]:
                raise IntegrityError(
                    f"{self._uri}/{name} has {info.size} bytes, but the checkpoint's manifest says "
                    f"{self._saved.sizes[name]}: it was changed after it was saved",
                    object=f"{self._uri}/{name}",
                )
            self._stored[name] = info
        return info
