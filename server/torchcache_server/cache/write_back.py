"""The server's side of checkpoints, and of objects written through the pool.

A save is reserved, written, committed, uploaded:

    reserve    the path is free, or may be overwritten; nobody else writes it   lease here, claim in the under-store
    (put)      the shards come in by Flight, into the save's namespace
    commit     fsync, claim "committed", then the record: restorable from the pool from here on, over any restart
    upload     behind: shards, metadata, manifest; restorable from the under-store from the manifest on; claim released

The rules of each step stand where the step is: reservations.py, upload_plan.py; the claim's in claims.py.
"""

from __future__ import annotations

import builtins
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Final

from torchcache.errors import (
    DeadlineExceeded,
    IntegrityError,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.model import ObjectInfo
from torchcache_server.cache.borrowing import Borrowing
from torchcache_server.cache.catalogue import Catalogue
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import DEAD_AFTER_LEASES
from torchcache_server.cache.commits import Commits
from torchcache_server.cache.copies import Copies
from torchcache_server.cache.deletions import Deletions
from torchcache_server.cache.holdings import Holdings
from torchcache_server.cache.orphans import Orphans
from torchcache_server.cache.pending import Pending
from torchcache_server.cache.publish import Publisher
from torchcache_server.cache.readers import Readers
from torchcache_server.cache.reservations import Reservations
from torchcache_server.cache.saves import Save, SaveKey, SaveStatus
from torchcache_server.cache.slots import Slots
from torchcache_server.cache.uploader import Uploader
from torchcache_server.cache.work_queue import WorkQueue, retry_delay_s
from torchcache_server.store import Store
from torchcache_server.understore import UnderStore, choose, object_uri

__all__ = ["SaveKey", "SaveStatus", "WriteBack"]

_log = logging.getLogger(__name__)

_LONGEST_RETRY_S: Final = 10.0
"""Well below the time after which another server may take a claim that isn't 'committed' yet for dead."""
_MEND_S: Final = 60.0
"""An upload that failed for a reason that a changed setting may mend is tried so often."""
_CLOSE_S: Final = 10.0


class WriteBack:
    """Saves and published objects of one server. Thread-safe; runs its own threads until `close`.

    `lease_s`: a writer that hasn't renewed for so long may be taken for dead. `retry_s`: the pause after the first of
    several failures in a row. `max_pending_bytes`: with so many not uploaded yet, no further save is begun.
    `upload_threads` 0 runs no threads at all: a test calls `upload` and `tidy`. `clock` is time.monotonic, or that and
    an offset.
    """

    def __init__(
        self,
        store: Store,
        under_stores: Mapping[str, UnderStore],
        *,
        upload_threads: int = 4,
        lease_s: float = 10.0,
        retry_s: float = 1.0,
        max_pending_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._under_stores = dict(under_stores)
        self._lease_s = lease_s
        self._retry_s = retry_s
        self._clock = clock
        self._stopping = threading.Event()
        self._failures: dict[SaveKey, int] = {}
        self._slots = Slots(store)
        self._pending = Pending(self._slots, most_bytes=max_pending_bytes)
        self._claims = ClaimBook(store.server_id, lease_s=lease_s, clock=clock)
        self._reservations = Reservations(self._slots, self._claims, lease_s=lease_s, clock=clock)
        self._commits = Commits(store, self._slots, self._claims, lease_s=lease_s)
        self._copies = Copies(store, self._slots, self._claims, lease_s=lease_s)
        self._borrowing = Borrowing(store, self._slots, lease_s=lease_s, clock=clock)
        self._catalogue = Catalogue(self._slots, self._claims, self._copies)
        self._readers = Readers(self._slots, lease_s=lease_s, clock=clock)
        self._deletions = Deletions(
            self._slots,
            self._claims,
            self._readers,
            lease_s=lease_s,
            clock=clock,
            check_running=self._check_running,
            drop=store.drop,
        )
        self._publisher = Publisher(
            store, threads=upload_threads, retry_s=retry_s, check_running=self._check_running
        )
        self._orphans = Orphans(store, clock=clock)
        self.holdings = Holdings(store, self._slots, self._claims, under_store_of=self._under_store)
        self._shard_threads = ThreadPoolExecutor(max(1, upload_threads), thread_name_prefix="shard")
        self._uploader = Uploader(
            store,
            self._slots,
            self._claims,
            under_store_of=self._under_store,
            executor=self._shard_threads,
            check_running=self._check_running,
        )
        self._uploads: WorkQueue[SaveKey] = WorkQueue(self._work_on, threads=upload_threads, name="upload")
        self._janitor = threading.Thread(target=self._keep_tidy, name="save-janitor", daemon=True)
        for slot in self._slots.all():
            self._uploads.add(slot.key)
        if upload_threads:
            self._janitor.start()

    # ---- the calls of a writer ----

    def reserve(self, key: SaveKey, save_id: str, *, writer: str, overwrite: bool, deadline: float) -> float:
        """Reserves the path for one save; returns the lease: renew within so many seconds. May be repeated.

        A writer of the same path that may be dead is waited for. Raises AlreadyExists if the path holds a checkpoint
        and `overwrite` isn't set, or another writer is alive; DeadlineExceeded if that wasn't known in time: asking
        again goes on with the wait.
        """
        key.validate()
        self._pending.wait_for_room(key, save_id, deadline=deadline)
        self._reservations.reserve(
            self._under_store(key.store), key, save_id, writer=writer, overwrite=overwrite, deadline=deadline
        )
        return self._lease_s

    def renew(self, key: SaveKey, save_id: str) -> float:
        """Keeps the reservation alive for another `lease_s`, which it returns.

        Raises AlreadyExists if the path was taken over, CheckpointError if the reservation isn't known.
        """
        self._reservations.renew(key, save_id)
        return self._lease_s

    def commit(
        self,
        key: SaveKey,
        save_id: str,
        files: Sequence[tuple[str, int]],
        metadata: bytes,
        manifest: bytes,
        *,
        replicas: int = 1,
        borrowed: Collection[str] = (),
        deadline: float,
    ) -> SaveStatus:
        """Makes the save what the path holds, restorable from the pool; the upload follows behind. May be repeated.

        `files` are names relative to the path, and sizes; their bytes were put before. So were those of `metadata` and
        `manifest`, under their names, if both are empty here. `replicas` servers hold the save, with this one: the
        others have prepared it. `borrowed`: those of the files that were lent instead. What may be overwritten was
        settled by `reserve`.
        Raises AlreadyExists if the path was taken over meanwhile, CheckpointError if the reservation isn't known or
        bytes are missing; then nothing is committed.
        """
        key.validate()
        status = self._commits.commit(
            self._under_store(key.store),
            key,
            save_id,
            files=files,
            metadata=metadata,
            manifest=manifest,
            replicas=replicas,
            borrowed=borrowed,
            deadline=deadline,
        )
        self._uploads.add(key)
        return status

    def lend(
        self,
        key: SaveKey,
        save_id: str,
        base: SaveKey,
        base_id: str,
        names: Collection[str],
        *,
        deadline: float,
    ) -> builtins.list[str]:
        """Lends files of the save `base_id` at `base` to `save_id` at `key`, which is being written and may have them.

        Returns those of `names` that are here and intact. Raises ConfigurationError if the two aren't of one folder,
        under-store and part, DeadlineExceeded if not all were read in time.
        """
        key.validate()
        self._under_store(key.store)

        def check() -> None:
            self._check_running()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"{base} couldn't be read in time to be lent from", object=str(base))

        return self._borrowing.lend(key, save_id, base, base_id, names, check=check)

    def take_back(self, key: SaveKey, save_id: str, names: Collection[str], *, deadline: float) -> None:
        """Ends the loan of these files to a save that is being written, and will have them put, or do without."""
        key.validate()
        self._borrowing.take_back(key, save_id, names, deadline=deadline)

    def abandon(self, key: SaveKey, save_id: str) -> None:
        """Gives a reserved save up, and its bytes. A committed save, or one that isn't known, is left as it is."""
        deadline = time.monotonic() + self._lease_s
        self._reservations.abandon(self._under_store(key.store), key, save_id, deadline=deadline)

    def replaceable(self, key: SaveKey) -> tuple[str, ...]:
        """The manifest_digest of each manifest that the save reserved at `key` may overwrite."""
        return self._reservations.replaceable(key)

    def prepare_copy(
        self,
        key: SaveKey,
        save_id: str,
        files: Sequence[tuple[str, int]],
        metadata: bytes,
        manifest: bytes,
        *,
        replaceable: Sequence[str],
        overwrite: bool,
        writer: str,
        owner: str,
        borrowed: Collection[str] = (),
        committed_unix_s: float = 0.0,
        replicas: int = 2,
        deadline: float,
    ) -> None:
        """Makes this server hold a copy of the save that `owner`, another server, is about to commit. May be repeated.

        Arguments as of `commit`, and what `reserve` was told and `replaceable` told there. `committed_unix_s` is 0, or
        says when it was committed: then this is a copy made later, and `replicas` servers are to hold the save. Raises
        CheckpointError if bytes are missing, or those of the save that this server has are damaged.
        """
        key.validate()
        self._under_store(key.store)
        save = Save(
            key=key,
            save_id=save_id,
            files=tuple(files),
            metadata=metadata,
            manifest=manifest,
            overwrite=overwrite,
            replaceable=tuple(replaceable),
            state="committed",
            committed_unix_s=committed_unix_s or time.time(),
            writer=writer,
            replicas=replicas,
        )
        self._copies.prepare(save, owner, borrowed=borrowed, deadline=deadline)

    def confirm_copy(
        self, key: SaveKey, save_id: str, *, committed_unix_s: float, replicas: int, deadline: float
    ) -> None:
        """Says that the owner has committed the save. Raises CheckpointError if there is no copy of it."""
        self._copies.confirm(
            key, save_id, committed_unix_s=committed_unix_s, replicas=replicas, deadline=deadline
        )

    def drop_copy(self, key: SaveKey, save_id: str, *, deadline: float) -> None:
        """Drops the copy of a save that is given up or deleted; without an id, whichever is committed."""
        self._copies.drop(key, save_id, deadline=deadline)

    # ---- the calls of a reader ----

    def get(self, key: SaveKey, *, deadline: float, check_claim: bool = False) -> SaveStatus:
        """The checkpoint at `key`: the pool's, or what lies in the under-store. Raises NotCommitted.

        `check_claim` has the status say whether another server has committed a later save, and HeldElsewhere raised if
        one may have what isn't known here.
        """
        key.validate()
        under_store = self._under_store(key.store)
        return self._catalogue.get(under_store, key, deadline=deadline, check_claim=check_claim)

    def list(self, store: str, prefix: str, *, deadline: float) -> builtins.list[SaveStatus]:
        """Checkpoints whose path starts with `prefix`, saves that are being written included, ordered by path."""
        return self._catalogue.list(self._under_store(store), prefix, deadline=deadline)

    def hold(self, key: SaveKey, save_id: str, reader_id: str, name: str) -> float:
        """Keeps a save from being deleted while `reader_id` reads it: say it again within the seconds it returns.

        Raises NotCommitted if it is being deleted.
        """
        key.validate()
        return self._readers.hold(key, save_id, reader_id, name)

    def release(self, key: SaveKey, reader_id: str) -> None:
        """Ends what `hold` began."""
        self._readers.release(key, reader_id)

    # ---- deleting ----

    def delete(self, key: SaveKey, save_id: str, *, deadline: float, wait_s: float) -> bool:
        """Deletes the checkpoint at `key` if it is `save_id`, or whichever it is if that is empty.

        False if that takes longer than `wait_s`: it goes on; ask again. Raises NotCommitted if there is none,
        AlreadyExists if one is being written, InUse if it is being read, or what the deletion has met.
        """
        key.validate()
        under_store = self._under_store(key.store)
        slot = self._slots.slot(key)  # in hand, so that what the deletion meets isn't forgotten
        self._deletions.request(under_store, key, save_id, deadline=deadline)
        self._uploads.add(key)
        with self._slots.changed:
            self._slots.changed.wait_for(
                lambda: slot.deletion is None or slot.deletion_error is not None, max(0.0, wait_s)
            )
            error, left = slot.deletion_error, slot.deletion
        if error is not None:
            raise copy(error)
        return left is None

    # ---- objects written through the pool ----

    def publish(
        self, store: str, key: str, write_id: str, size: int, *, create_only: bool, wait_s: float
    ) -> ObjectInfo | None:
        """Uploads an object that was put before; None if that takes longer than `wait_s`: call again.

        Raises NotResident if its bytes aren't all here, AlreadyExists if it was to be created and is there.
        """
        return self._publisher.publish(
            self._under_store(store), key, write_id, size, create_only=create_only, wait_s=wait_s
        )

    # ---- the server's own ----

    def settle_pin(self, namespace: str) -> None:
        """The copy of a save was pinned, or unpinned: so is what it has borrowed."""
        self._slots.settle_pin(namespace)

    def is_save(self, namespace: str) -> bool:
        """Whether it is that of a committed save here, of which every byte may lie elsewhere."""
        return self._slots.is_save(namespace)

    @property
    def pending_bytes(self) -> int:
        """Bytes that are acknowledged or being published, and not in the under-store yet."""
        return self._pending.bytes + self._publisher.pending_bytes

    def counts(self) -> dict[str, int]:
        """How many saves this server holds in each state. "copy": of those that another server owns."""
        return self._pending.counts()

    def retry_failed(self) -> None:
        """Tries what failed or waits at once: a setting was changed."""
        self._uploads.hurry()

    def drain(self, timeout_s: float) -> builtins.list[str]:
        """Waits until everything is uploaded, at most so long; returns the URIs of what isn't."""
        deadline = time.monotonic() + timeout_s
        self._uploads.hurry()
        self._publisher.wait_until_idle(timeout_s)
        with self._slots.changed:
            self._slots.changed.wait_for(
                lambda: (
                    not any(
                        slot.copies or (slot.save and slot.save.is_under_way) for slot in self._slots.all()
                    )
                ),
                max(0.0, deadline - time.monotonic()),
            )
        left = [slot.key for slot in self._slots.all() if slot.save and slot.save.must_be_kept]
        left += [key for key in self._copies.held() if key not in left]
        return [self._uri(key) for key in left] + self._publisher.pending_uris()

    def close(self) -> None:
        """Stops uploading, between two chunks; what is committed goes on at the next start."""
        self._stopping.set()
        self._shard_threads.shutdown(wait=False, cancel_futures=True)
        self._uploads.close(timeout_s=_CLOSE_S)
        self._publisher.close(timeout_s=_CLOSE_S)
        if self._janitor.is_alive():
            self._janitor.join(_CLOSE_S)

    def upload(self, key: SaveKey) -> None:
        """One attempt to upload the save at `key`, in this thread, which no other may be making."""
        slot = self._slots.slot(key)
        if slot.deletion is not None:
            self._deletions.attempt(slot, self._under_store(key.store))
        else:
            self._uploader.attempt(slot)

    def tidy(self) -> None:
        """One round of the janitor: leases of dead writers, claims of dead saves, bytes that belong to nobody."""
        self._tidy_slots()
        self._forget_evicted()
        self._claims.forget_but(self._slots.forget_empty())
        self._publisher.tidy()
        self._orphans.sweep(self._publisher.namespaces | self._slots.used() | self._slots.guarded)

    # ---- inside ----

    def _tidy_slots(self) -> None:
        unreachable: set[str] = set()
        for slot in self._slots.all():
            self._readers.tidy(slot)
            if slot.key.store in unreachable:
                continue
            try:
                deadline = time.monotonic() + self._lease_s
                under_store = self._under_store(slot.key.store)
                self._reservations.tidy(under_store, slot, deadline=deadline)
                self._borrowing.tidy(slot, deadline=deadline)
                if self._copies.tend(under_store, slot, deadline=deadline) or slot.garbage:
                    self._uploads.add(slot.key)
            except TransientError:
                unreachable.add(slot.key.store)
            except TorchCacheError as error:
                _log.warning("%s can't be tidied: %s", slot.key, error)

    def _forget_evicted(self) -> None:
        """Of a durable save that eviction has taken, the under-store tells as much as its record."""
        seen = [(slot, slot.save, tuple(slot.spent.items())) for slot in self._slots.all()]
        # Behind that: what was all here by then, and isn't now, was evicted.
        resident = {usage.name for usage in self._store.namespaces()}
        for slot, save, spent in seen:
            for save_id in [save_id for save_id, one in spent if not one.namespaces & resident]:
                self._slots.end_spent(slot, save_id)
            if save is None or save.state != "durable" or save.claimed or save.namespaces & resident:
                continue
            with slot.exclusively(time.monotonic() + self._lease_s):
                if slot.save is save:
                    self._slots.forget_save(slot)

    def _under_store(self, name: str) -> UnderStore:
        return choose(self._under_stores, name)

    def _uri(self, key: SaveKey) -> str:
        under_store = self._under_stores.get(key.store)
        return object_uri(under_store.uri, key.path) if under_store is not None else str(key)

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise ServerUnavailable("the server is stopping; uploads go on when it is started again")

    def _work_on(self, key: SaveKey) -> float | None:
        """Called by the upload threads; says when to try again."""
        try:
            self.upload(key)
        except TorchCacheError as error:
            if isinstance(
                error, IntegrityError
            ):  # until a server that has a good copy has taken the upload over
                return DEAD_AFTER_LEASES * self._lease_s
            if not isinstance(error, TransientError):
                return _MEND_S
            _log.warning("the upload of %s is tried again: %s", key, error)
        except Exception:  # noqa: BLE001 - logged; what is acknowledged is never given up
            _log.exception("the upload of %s met an error nobody foresaw; it is tried again", key)
        else:
            self._failures.pop(key, None)
            return None
        self._failures[key] = self._failures.get(key, 0) + 1
        return retry_delay_s(self._failures[key], first_s=self._retry_s, longest_s=_LONGEST_RETRY_S)

    def _keep_tidy(self) -> None:
        while not self._stopping.wait(self._lease_s / 4):
            try:
                self.tidy()
            except Exception:  # noqa: BLE001 - logged; the next round may fare better
                _log.exception("the janitor of saves met an error nobody foresaw")
