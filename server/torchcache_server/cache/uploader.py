"""Brings committed saves to their end, durable or failed, and gives their claims up. See upload_attempt.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from torchcache.errors import AlreadyExists, TorchCacheError, TransientError
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import Sighting
from torchcache_server.cache.saves import Save, SaveKey
from torchcache_server.cache.slots import Lease, Slot, Slots
from torchcache_server.cache.upload_attempt import Attempt, Superseded, call_deadline
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore

_log = logging.getLogger(__name__)


class Uploader:
    """Uploads saves, one attempt a call. Of one slot only one attempt may run at a time."""

    def __init__(
        self,
        store: Store,
        slots: Slots,
        claims: ClaimBook,
        *,
        under_store_of: Callable[[str], UnderStore],
        executor: Executor,
        check_running: Callable[[], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._claims = claims
        self._under_store_of = under_store_of
        self._executor = executor
        self._check_running = check_running

    def attempt(self, slot: Slot) -> None:
        """Brings the slot's save as far as it goes: durable, failed, or the TransientError that stopped it.

        A failure that a changed setting may mend is recorded and raised, so that the caller tries again some day.
        """
        for namespace in tuple(slot.garbage):
            self._slots.drop(slot, namespace)
        save = slot.save
        if save is not None and save.wants_upload:
            try:
                manifest_version = self._new_attempt(slot, save).run()
                self._finish(slot, save, manifest_version)
            except Superseded:
                return
            except TransientError:
                raise
            except TorchCacheError as error:
                self._fail(slot, save, error)
        if slot.save is not None and slot.save.claimed:
            self._settle_claim(slot, self._under_store_of(slot.key.store))

    def _new_attempt(self, slot: Slot, save: Save) -> Attempt:
        return Attempt(
            self._store,
            self._slots,
            self._claims,
            self._under_store_of(save.key.store),
            self._executor,
            slot,
            save,
            self._check_running,
        )

    def _fail(self, slot: Slot, save: Save, error: TorchCacheError) -> None:
        with slot.exclusively(call_deadline()):
            current = _current(slot, save)
            if current is None:
                return  # of one that was replaced the bytes may go meanwhile
            _log.error("the upload of %s (save %s) failed: %s", save.key, save.save_id, error)
            failed = current.failed(error)
            self._slots.update_save(slot, failed)
        if failed.may_mend:
            raise error

    def _finish(self, slot: Slot, save: Save, manifest_version: str) -> None:
        with slot.exclusively(call_deadline()):
            if (current := _current(slot, save)) is not None:
                self._slots.update_save(slot, current.durable(manifest_version, time.time()))
                _log.info("%s (save %s) is durable", save.key, save.save_id)

    def _settle_claim(self, slot: Slot, under_store: UnderStore) -> None:
        """The save needs its claim no longer: the lease behind it, if there is one, gets it; else it is released."""
        deadline = call_deadline()
        with slot.exclusively(deadline):
            save = slot.save
            if save is None or not save.claimed or save.wants_upload:
                return
            seen = self._claims.look(under_store, slot.key, deadline=deadline)
            own = seen is not None and seen.claim.server_id == self._claims.server_id
            if own and seen is not None and slot.lease is not None:
                self._hand_on(slot.lease, slot.key, under_store, seen, deadline)
            elif own:
                self._claims.release(under_store, slot.key, {save.save_id}, deadline=deadline)
            self._slots.update_save(slot, replace(save, claimed=False))

    def _hand_on(
        self, lease: Lease, key: SaveKey, under_store: UnderStore, seen: Sighting, deadline: float
    ) -> None:
        try:
            self._claims.write(
                under_store,
                key,
                save_id=lease.save_id,
                state="reserved",
                writer=lease.writer,
                replaces=seen.version,
                deadline=deadline,
                over=seen.claim.over,
            )
        except AlreadyExists:
            _log.info("%s: another server took the path over", key)


def _current(slot: Slot, save: Save) -> Save | None:
    """The save as it is by now; None if another has taken its place."""
    return slot.save if slot.save is not None and slot.save.save_id == save.save_id else None
