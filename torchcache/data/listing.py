"""From a listing of an under-store to a manifest, and from one manifest to the next: what has changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from torchcache.data.key_order import by_key, windows
from torchcache.data.manifest import Manifest, private_folder
from torchcache.data.progress import listing_progress
from torchcache.model import ObjectId, ObjectInfo
from torchcache.pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The keys, relative to the dataset's URI, that a refresh found new, gone, or of another version."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


class Listing:
    """The objects of a listing that are samples. `others` counts the rest, once it has been gone through."""

    def __init__(
        self, objects: Iterator[ObjectInfo], prefix: str, pattern: str, on_progress: Callable[[int], None]
    ) -> None:
        self._objects = objects
        self._prefix = prefix
        self._matches = re.compile(fnmatch.translate(pattern)).match
        self._on_progress = on_progress
        self.others = 0
        self.in_order = True
        """Whether keys came in order, bytewise, each once."""

    def __iter__(self) -> Iterator[ObjectInfo]:
        last = ""
        for count, object in enumerate(self._objects, 1):
            key = object.id.key
            # Python orders strings by code point, which is the order of their UTF-8 bytes.
            if key <= last:
                self.in_order = False
            last = key
            if not count % 1000:
                self._on_progress(count)
            if key.endswith("/"):
                continue  # a marker that consoles make for an empty folder
            if self._matches(key.removeprefix(self._prefix)):
                yield object
            else:
                self.others += 1


def listed(pool: Pool, uri: str, pattern: str, folder: Path) -> tuple[Manifest, int]:
    """The objects under `uri` that match, by key, bytewise; and how many didn't match.

    `folder` keeps the list. Raises IntegrityError for a listing that names an object twice, and what `Pool.list` does.
    """
    store, key = pool.resolve(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with private_folder(folder) as own:
        with listing_progress(uri) as advance:
            listing = Listing(pool.list_in_any_order(uri), prefix, pattern, advance)
            manifest = Manifest.write(store, listing, own)
        if listing.in_order:
            return manifest.moved_to(folder), listing.others
        # Folders are listed side by side. And not every S3 lists bytewise by key: SeaweedFS goes folder by folder.
        return Manifest.of_batches(store, by_key(manifest, own), folder), listing.others


def changes(old: Manifest, new: Manifest, prefix: str) -> Changes:
    """What is new, gone, or another in `new`. Both are by key, as `listed` makes them."""
    if old.digest == new.digest:
        return Changes()
    before, after = old.table()["id"], new.table()["id"]
    added, removed, changed = [], [], []
    for earlier, later in windows(old, new):
        gone = set(_keys_without(before[earlier], after[later]))
        come = set(_keys_without(after[later], before[earlier]))
        added += sorted(come - gone)
        removed += sorted(gone - come)
        changed += sorted(come & gone)
    return Changes(
        added=tuple(key.removeprefix(prefix) for key in added),
        removed=tuple(key.removeprefix(prefix) for key in removed),
        changed=tuple(key.removeprefix(prefix) for key in changed),
    )


def _keys_without(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> list[str]:
    """The keys of those `ids`, as they are encoded, that aren't among the others."""
    alone = ids.filter(pc.invert(pc.is_in(ids, value_set=others)))
    return [ObjectId.from_encoded(one.as_py()).key for one in alone]
