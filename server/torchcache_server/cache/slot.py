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
    later_than: tuple[str, ...] = ()  # ids of committed saves that were there when it was reserved


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who reads a save, and until when (monotonic) that is believed."""

    save_id: str
    name: str
    expires_s: float


@dataclass(frozen=True, slots=True)
class Loan:
    """Files of `base`, another save, that are lent to one that is being written.

    `names` are known to be intact; `reading` are looked at just now, by a call each. No other file of `base` is held.
    """

    base: Save
    names: frozenset[str]
    expires_s: float  # monotonic; on the server that has the lease that counts
    put_bytes: int = 0  # of the save itself, when the loan was last seen to have run out
    reading: tuple[frozenset[str], ...] = ()

    @property
    def files(self) -> frozenset[str]:
        return self.names.union(*self.reading)

    @property
    def namespaces(self) -> frozenset[str]:
        """Where these files lie."""
        return self.base.namespaces_of(self.files)


@dataclass(slots=True, weakref_slot=True)
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
    loans: dict[str, Loan] = field(
        default_factory=dict
    )  # by save id: to saves that aren't committed, or copies
    spent: dict[str, Save] = field(
        default_factory=dict
    )  # by save id: copies that aren't needed, but may be lent
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
    def is_empty(self) -> bool:
        """Whether nothing is known of the path: one that is made anew would be the same."""
        one = (self.lease, self.save, self.deletion)
        many = (self.readers, self.copies, self.loans, self.spent, self.dead_leases, self.garbage)
        return not any(each is not None for each in one) and not any(many)

    @property
    def pending_bytes(self) -> int:
        """Bytes of the committed save that aren't in the under-store yet."""
        if self.save is None or not self.save.must_be_kept:
            return 0
        return sum(size for name, size in self.save.files if name not in self.uploaded)

    @property
    def namespaces(self) -> set[str]:
        """The namespaces that are in use."""
        deletion = self.deletion
        return self.held | ({self.key.namespace(deletion.save_id)} if deletion is not None else set())

    @property
    def held(self) -> set[str]:
        """The namespaces that are in use by what isn't being deleted."""
        lease, save = self.lease, self.save
        held = {self.key.namespace(lease.save_id)} if lease is not None else set()
        saves = [*tuple(self.spent.values()), *([save] if save is not None else [])]
        return held.union(self._held_for_others(), *(save.namespaces for save in saves))

    def must_keep(self, namespace: str, save: Save | None = None) -> bool:
        """Whether something of this path needs the namespace, and can't get it back. `save`: if that were its save."""
        lease, save = self.lease, save or self.save
        if lease is not None and self.key.namespace(lease.save_id) == namespace:
            return True
        if save is not None and save.must_be_kept and namespace in save.namespaces:
            return True
        return namespace in self._held_for_others()

    def stored(self, namespace: str) -> bool:
        """Whether it is that of a save of this path, committed or held as a copy."""
        saves = [self.save] if self.save is not None else []
        saves += [copy.save for copy in tuple(self.copies.values())]
        return any(save.namespace == namespace for save in saves)

    def borrower(self, namespace: str) -> str | None:
        """The namespace of this path's save, if that has borrowed files that lie in `namespace`."""
        save = self.save
        if save is None or save.namespace == namespace or namespace not in save.namespaces:
            return None
        return save.namespace

    def _held_for_others(self) -> frozenset[str]:
        # Taken out at once: others may change them meanwhile.
        copies, loans = tuple(self.copies.values()), tuple(self.loans.values())
        held = [copy.save.namespaces for copy in copies] + [loan.namespaces for loan in loans]
        return frozenset[str]().union(*held)
