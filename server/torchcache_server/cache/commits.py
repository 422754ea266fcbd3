"""The commit point of the pool: what must be true before a save is acknowledged, and in which order it is made true."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from torchcache.errors import AlreadyExists, CheckpointError, IntegrityError, TorchCacheError
from torchcache.model import SAVE_PREFIX, ObjectId
from torchcache_server.cache.borrowing import origins
from torchcache_server.cache.catalogue import status_of
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import Refuse, Take, Wait, already_there, decide_hold, taken_over
from torchcache_server.cache.reservations import lost_lease, replaceable_by
from torchcache_server.cache.saves import Copy, Save, SaveKey, SaveStatus, check_files, manifest_digest
from torchcache_server.cache.shard_source import missing_from, read_whole
from torchcache_server.cache.slots import Lease, Slot, Slots
from torchcache_server.cache.small_objects import read_small
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore

_log = logging.getLogger(__name__)


def put_before(store: Store, key: SaveKey, save_id: str) -> tuple[bytes, bytes]:
    """Metadata and manifest that were too large for a message, and so were put like the shards."""
    version = f"{SAVE_PREFIX}{save_id}"
    metadata = read_whole(store, ObjectId(key.store, key.metadata_key, version))
    manifest = read_whole(store, ObjectId(key.store, key.manifest_key, version))
    if not metadata or not manifest:
        raise CheckpointError(
            f"{key} can't be committed: its metadata and manifest were neither sent along nor put before",
            object=str(key),
        )
    return metadata, manifest


def require_whole(store: Store, save: Save) -> None:
    """Raises CheckpointError unless the store has every chunk of the save."""
    for name, object in save.objects.items():
        lack = missing_from(store, object)
        if lack is not None:
            raise CheckpointError(
                f"{save.key} can't be committed: of its file {name} {lack}", object=str(save.key)
            )


def require_undamaged(save: Save) -> None:
    """Raises CheckpointError if the upload of the save met a chunk that is damaged here, or gone."""
    if save.state == "failed" and isinstance(save.error, IntegrityError):
        raise CheckpointError(f"{save.key} is damaged here: {save.error.message}", object=str(save.key))


def make_durable(store: Store, save: Save) -> None:
    """Syncs the save's bytes, and has them stay: its own, and what it has borrowed."""
    for namespace in sorted(save.namespaces):
        store.sync(namespace)
        store.keep(namespace, True)


class Commits:
    """Commits reserved saves. Thread-safe."""

    def __init__(self, store: Store, slots: Slots, claims: ClaimBook, *, lease_s: float) -> None:
        self._store = store
        self._slots = slots
        self._claims = claims
        self._lease_s = lease_s

    def commit(
        self,
        under_store: UnderStore,
        key: SaveKey,
        save_id: str,
        *,
        files: Sequence[tuple[str, int]],
        metadata: bytes,
        manifest: bytes,
        replicas: int = 1,
        borrowed: Collection[str] = (),
        deadline: float,
    ) -> SaveStatus:
        """See WriteBack.commit."""
        slot = self._slots.find(key)
        if slot is None:
            raise lost_lease(key, None)
        with slot.exclusively(deadline):
            done, lease = slot.save, slot.lease
            if done is not None and done.save_id == save_id:
                if manifest and done.manifest != manifest:
                    raise AlreadyExists(
                        f"save {save_id} of {key} was committed with another manifest", object=str(key)
                    )
                return status_of(slot, done)
            if lease is None or lease.save_id != save_id:
                raise lost_lease(key, slot)
            if not metadata and not manifest:
                metadata, manifest = put_before(self._store, key, save_id)
            check_files(key, files, metadata, manifest)
            save = replace(
                _save_of(slot, lease, files, metadata, manifest),
                replicas=replicas,
                borrowed=origins(slot, save_id, borrowed),
            )
            require_whole(self._store, save)
            make_durable(self._store, save)
            if lease.displaces or slot.copies:
                told = self._claim_noted(under_store, slot, save, deadline)
            else:
                told = self._claim(under_store, save, deadline)
            save = replace(save, unbroken=told)
            self._slots.begin_save(slot, save)
            self._slots.end_copy(slot, save_id)
            return status_of(slot, save)

    def _claim_noted(self, under_store: UnderStore, slot: Slot, save: Save, deadline: float) -> bool:
        """With the claim goes what another server had committed: from then on there must be this save, after any crash.

        So it is noted before, like a copy of another's save, and counts once the claim says that it is committed.
        """
        self._slots.put_copy(slot, Copy(save, self._claims.server_id))
        try:
            return self._claim(under_store, save, deadline)
        except AlreadyExists:
            self._slots.end_copy(slot, save.save_id)
            raise

    def _claim(self, under_store: UnderStore, save: Save, deadline: float) -> bool:
        """Tells other servers, or learns from them that the path was taken over: raises AlreadyExists.

        False if they could not be told, or somebody had removed the claim.

        While the under-store can't be reached, or refuses us, the pool commits alone. Then a server that can reach it
        may still take the path over, and the upload finds out.
        """
        deadline = min(deadline, time.monotonic() + self._lease_s / 2)
        try:
            while (held := self._try_claim(under_store, save, deadline)) is None:
                pass
        except AlreadyExists:
            raise
        except TorchCacheError as error:
            _log.warning("%s is committed in the pool alone for now: %s", save.key, error)
            return False
        return held

    def _try_claim(self, under_store: UnderStore, save: Save, deadline: float) -> bool | None:
        """None if the claim changed between look and write: look again. False if there was none."""
        seen = self._claims.look(under_store, save.key, deadline=deadline)
        decision = decide_hold(
            seen,
            key=save.key,
            server_id=self._claims.server_id,
            save_id=save.save_id,
            committed=False,
            now_s=self._claims.now_s(),
        )
        if isinstance(decision, Refuse):
            raise decision.error
        if isinstance(decision, Wait):
            raise taken_over(save.key, f"server {decision.holder}")
        if seen is None:
            # Somebody removed our claim. If they published since, their checkpoint stays.
            there = read_small(under_store, save.key.manifest_key, deadline=deadline)
            if there is not None and manifest_digest(there.data) not in save.replaceable:
                raise already_there(save.key, "a checkpoint that was published since this save was reserved")
        if isinstance(decision, Take):
            try:
                self._claims.write(
                    under_store,
                    save.key,
                    save_id=save.save_id,
                    state="committed",
                    writer=save.writer,
                    replaces=decision.replaces,
                    deadline=deadline,
                )
            except AlreadyExists:
                return None
        return seen is not None


def _save_of(
    slot: Slot, lease: Lease, files: Sequence[tuple[str, int]], metadata: bytes, manifest: bytes
) -> Save:
    return Save(
        key=slot.key,
        save_id=lease.save_id,
        files=tuple(files),
        metadata=metadata,
        manifest=manifest,
        overwrite=lease.overwrite,
        replaceable=replaceable_by(slot, lease),
        state="committed",
        committed_unix_s=time.time(),
        writer=lease.writer,
    )
