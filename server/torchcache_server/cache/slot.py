"""One path as this server knows it: the values that `Slots` keeps, and their lock. See slots.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torchcache.errors import DeadlineExceeded, TorchCacheError
from torchcache_server.cache.saves import Copy, Deletion, Save, SaveKey


@dataclass(slots=True)
class Lease:
    """A save that is being written. Alive while its writer renews it; run out, it holds until the path is wanted."""

    save_id: str
    writer: str
    overwrite: bool
    replaceable: tuple[str, ...]  # manifest_digest of each manifest it may overwrite
    expires_s: float  # monotonic
    displaces: bool = False  # its claim took the place of another server's, of a committed save


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who reads a save, and until when (monotonic) that is believed."""

    save_id: str
    name: str
    expires_s: float


@dataclass(slots=True)
class Slot:
    """One path."""

    key: SaveKey
    lease: Lease | None = None
    save: Save | None = None
    committed_here: bool = False  # since this server started
    deletion: Deletion | None = None
    deletion_error: TorchCacheError | None = None  # what the last try, or the whole of it, ended with
    readers: dict[str, Reader] = field(default_factory=dict)
    uploaded: dict[str, str] = field(
        default_factory=dict
    )  # of `save`: shard name -> version in the under-store
    copies: dict[str, Copy] = field(default_factory=dict)  # by save id: of saves that other servers own
    dead_leases: set[str] = field(default_factory=set)  # save ids whose claim may still be in the under-store
    garbage: set[str] = field(
        default_factory=set
    )  # namespaces of replaced saves, to drop once no upload reads them
    _exclusive: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def exclusively(self, deadline: float) -> Iterator[None]:
        """Raises DeadlineExceeded if others are still at it at `deadline` (monotonic)."""
        if not self._exclusive.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded(
                f"{self.key} is busy: a save of it is being committed", object=str(self.key)
            )
        try:
            yield
        finally:
            self._exclusive.release()

    @property
    def pending_bytes(self) -> int:
        """Bytes of the committed save that aren't in the under-store yet."""
        if self.save is None or not self.save.must_be_kept:
            return 0
        return sum(size for name, size in self.save.files if name not in self.uploaded)

    @property
    def namespaces(self) -> set[str]:
        """The namespaces that are in use."""
        holders = (self.lease, self.save, self.deletion)
        ids = [*self.copies, *(holder.save_id for holder in holders if holder is not None)]
        return {self.key.namespace(save_id) for save_id in ids}
