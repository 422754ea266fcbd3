"""A committed checkpoint, open to be read item by item, without a plan of torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from torchcache.checkpoint.hold import Hold
from torchcache.checkpoint.layout import GRANULE_BYTES, cut
from torchcache.checkpoint.manifest import Item, Manifest
from torchcache.checkpoint.source import Fetch, SavedFiles, Source
from torchcache.errors import NotCommitted
from torchcache.model import ByteRange
from torchcache.threads import Threads

if TYPE_CHECKING:
    from torchcache.pool import Pool

_READ_BYTES: Final = 8 * GRANULE_BYTES
_READERS: Final = min(4, os.cpu_count() or 1)


class OpenCheckpoint:
    """The checkpoint at `uri`, if torchcache saved it. Raises NotCommitted."""

    def __init__(self, pool: Pool, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._pool = pool
        save = pool.get_save(*pool.resolve(self.uri))
        if save.state == "reserved":
            raise NotCommitted(f"the checkpoint at {uri} is being written", object=uri)
        self.manifest = Manifest.decode(save.manifest, where=uri)
        self._hold = Hold(pool, save)
        self._hold.take()
        files = SavedFiles.of(save, self.manifest.files)
        self._source = Source(pool, self.uri, files, durable=save.state == "durable")

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs, the checkpoint isn't deleted."""
        with self._hold.kept():
            yield

    def fetch(self, item: Item, into: memoryview) -> None:
        """Fills `into` with the item's payload, several reads at a time, checked. Raises IntegrityError."""
        self._run(
            [
                Fetch(item, part, into[part.start : part.end])
                for part in cut(ByteRange(0, item.payload_length), _READ_BYTES)
            ]
        )

    def fetch_file(self, name: str, size: int, into: memoryview) -> None:
        """Fills `into` with a whole file; what its items' checksums say is the caller's to check."""
        whole = Item(
            name=name,
            offset=None,
            index=None,
            kind="bytes",
            dtype=None,
            shape=None,
            file=name,
            start=0,
            length=size,
            payload_start=0,
            payload_length=size,
            frame_digest=0,
            digests=(),
        )
        self.fetch(whole, into)

    def stock_metadata(self) -> Any:
        """torch's Metadata, as its own writer would have written it. Imports torch."""
        from torchcache.checkpoint.metadata import stock_metadata
        from torchcache.checkpoint.reader import CacheStorageReader

        metadata = CacheStorageReader(self.uri, pool=self._pool).read_metadata()
        manifest = self.manifest
        return stock_metadata(metadata, manifest.items, checkpoint_id=self.uri, save_id=manifest.save_id)

    def _run(self, fetches: Sequence[Fetch]) -> None:
        if len(fetches) < 2:
            for fetch in fetches:
                self._source.fetch([fetch])
            return
        with Threads(_READERS, name="torchcache-export") as threads:
            reads = [threads.submit(self._source.fetch, [fetch]) for fetch in fetches]
            try:
                for read in reads:
                    read.result()
            finally:
                for read in reads:
                    read.cancel()
