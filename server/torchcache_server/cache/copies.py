"""Copies of saves that other servers own: taken, watched, and brought to their end if the owner is lost.

The writer sends every byte of a save to its owner and to the servers that hold copies, and before it commits at the
owner it has each of them *prepare*: find the copy whole, sync it, note it. So whatever the owner commits is held by all
of them already, over any restart. Then it *confirms*, for when the under-store can't tell what was committed.

What servers have to agree on, they do by the claim at the path: see copy_plan.py. So does a copy that is made again
because another was lost: it counts once the claim was seen to say that its save is committed. Who made it can't confirm
it, and may have learnt a moment too late that the save was deleted. See process/copy_keeper.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from torchcache.errors import AlreadyExists, CheckpointError, TorchCacheError
from torchcache_server.cache.borrowing import origins
from torchcache_server.cache.catalogue import status_of_copy
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import Sighting
from torchcache_server.cache.commits import make_durable, put_before, require_undamaged, require_whole
from torchcache_server.cache.copy_plan import Verdict, decide_takeover, is_left_open, judge
from torchcache_server.cache.saves import Copy, Save, SaveKey, SaveStatus, check_files, kind_of_manifest
from torchcache_server.cache.slots import Slot, Slots
from torchcache_server.cache.small_objects import read_small
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore

_log = logging.getLogger(__name__)

OPEN_LEASES: Final = 60
"""A copy whose save was never committed is dropped so many leases after its writer was last heard of."""
_SETTLE_S: Final = 5.0


class Copies:
    """The copies of one server. Thread-safe."""

    def __init__(self, store: Store, slots: Slots, claims: ClaimBook, *, lease_s: float) -> None:
        self._store = store
        self._slots = slots
        self._claims = claims
        self._lease_s = lease_s

    # ---- the calls of a writer ----

    def prepare(self, save: Save, owner: str, *, borrowed: Collection[str] = (), deadline: float) -> None:
        """Makes this server hold the save, of which it has the bytes, its own or lent ones. May be repeated.

        See WriteBack.prepare_copy.
        """
        slot = self._slots.slot(save.key)
        with slot.exclusively(deadline):
            if slot.save is not None and slot.save.save_id == save.save_id:
                require_undamaged(slot.save)
                return
            if save.save_id in slot.copies:
                return
            if not save.metadata and not save.manifest:
                metadata, manifest = put_before(self._store, save.key, save.save_id)
                save = replace(save, metadata=metadata, manifest=manifest)
            check_files(save.key, save.files, save.metadata, save.manifest)
            save = replace(save, borrowed=origins(slot, save.save_id, borrowed))
            require_whole(self._store, save)
            make_durable(self._store, save)
            self._slots.put_copy(slot, Copy(save, owner))
            self._slots.end_loan(slot, save.save_id)

    def confirm(
        self, key: SaveKey, save_id: str, *, committed_unix_s: float, replicas: int, deadline: float
    ) -> None:
        """The owner has committed the save: what it replaced goes. Raises CheckpointError if there is no copy of it."""
        slot = self._slots.slot(key)
        with slot.exclusively(deadline):
            copy = slot.copies.get(save_id)
            if copy is None:
                if slot.save is not None and slot.save.save_id == save_id:
                    return
                raise CheckpointError(f"there is no copy of save {save_id} of {key} here", object=str(key))
            save = replace(copy.save, committed_unix_s=committed_unix_s, replicas=replicas)
            self._slots.put_copy(slot, replace(copy, save=save, confirmed=True))
            for other in [one for one in slot.copies.values() if one.save.save_id != save_id]:
                if other.confirmed and other.save.committed_unix_s <= committed_unix_s:
                    self._slots.end_copy(slot, other.save.save_id)

    def drop(self, key: SaveKey, save_id: str, *, deadline: float) -> None:
        """Drops what is here of a save that was given up or deleted; without an id, all committed ones of the path."""
        slot = self._slots.slot(key)
        self._let_settle(slot, deadline)
        with slot.exclusively(deadline):
            for copy in tuple(slot.copies.values()):
                if copy.save.save_id == save_id or (not save_id and copy.confirmed):
                    self._slots.end_copy(slot, copy.save.save_id)
            self._forget_durable(slot, save_id)
            for spent in tuple(slot.spent):
                if not save_id or spent == save_id:
                    self._slots.end_spent(slot, spent)
            if save_id:
                self._slots.drop(slot, key.namespace(save_id))  # of one that was never prepared
                is_written_here = slot.lease is not None and slot.lease.save_id == save_id
                if not is_written_here:  # else there is no copy of it
                    self._slots.end_loan(slot, save_id)

    def _let_settle(self, slot: Slot, deadline: float) -> None:
        """A save that became durable a moment ago is about to give up its claim, and can be forgotten then."""

        def is_settled() -> bool:
            return slot.save is None or slot.save.state != "durable" or not slot.save.claimed

        with self._slots.changed:
            self._slots.changed.wait_for(is_settled, min(_SETTLE_S, max(0.0, deadline - time.monotonic())))

    def _forget_durable(self, slot: Slot, save_id: str) -> None:
        """A save of this server's own, which another one was asked to delete: of one that is durable any can."""
        save = slot.save
        if save is None or save.state != "durable" or save.claimed or save_id not in ("", save.save_id):
            return
        self._slots.forget_save(slot)
        for namespace in tuple(slot.garbage):
            self._slots.drop(slot, namespace)

    # ---- the calls of a reader ----

    def current(self, under_store: UnderStore, slot: Slot, *, deadline: float) -> SaveStatus | None:
        """The status of the copy that is what the path holds now; None if none is, or the under-store has it.

        While the under-store can't be reached, the last that was confirmed.
        """
        if not slot.copies:
            return None
        try:
            judged = self._judge(under_store, slot, deadline)
        except TorchCacheError as error:
            _log.warning("%s: the pool's own copy is served, unchecked: %s", slot.key, error)
            confirmed = [
                copy
                for copy in tuple(slot.copies.values())
                if copy.confirmed and not _is_passed_over(slot, copy.save.save_id)
            ]
            confirmed.sort(key=lambda copy: copy.save.committed_unix_s)
            return replace(status_of_copy(confirmed[-1]), uncertain=True) if confirmed else None
        return next((status_of_copy(copy) for copy, verdict, _ in judged if verdict == "current"), None)

    # ---- the server's own ----

    def held(self) -> list[SaveKey]:
        """The paths of copies that aren't known to be durable."""
        return [slot.key for slot in self._slots.all() if slot.copies]

    def tend(self, under_store: UnderStore, slot: Slot, *, deadline: float) -> bool:
        """Drops copies that have done their duty, and takes over what a lost owner left. True: there is an upload now.

        Raises TransientError if the under-store can't be reached.
        """
        if not slot.copies:
            return False
        for copy, verdict, seen in self._judge(under_store, slot, deadline):
            if verdict == "current" and not copy.confirmed:
                with slot.exclusively(deadline):
                    if slot.copies.get(copy.save.save_id) is copy:  # one that came since is judged by itself
                        self._slots.confirm_copy(slot, copy.save.save_id)
            now_s = self._claims.now_s()
            patience_s = OPEN_LEASES * self._lease_s
            left_open = verdict == "open" and is_left_open(seen, now_s=now_s, patience_s=patience_s)
            if left_open or verdict in ("durable", "gone"):
                with slot.exclusively(deadline):
                    if slot.copies.get(copy.save.save_id) is copy:  # it may have been confirmed meanwhile
                        _log.info("the copy of %s (save %s) goes: %s", slot.key, copy.save.save_id, verdict)
                        end = self._slots.spend_copy if verdict == "durable" else self._slots.end_copy
                        end(slot, copy.save.save_id)
            elif decide_takeover(copy, verdict, seen, server_id=self._claims.server_id, now_s=now_s):
                return self._take_over(under_store, slot, copy.save.save_id, deadline)
        return False

    def _judge(
        self, under_store: UnderStore, slot: Slot, deadline: float
    ) -> list[tuple[Copy, Verdict, Sighting | None]]:
        """The claim first, then the manifest: see copy_plan.py."""
        seen = self._claims.look(under_store, slot.key, deadline=deadline)
        manifest = read_small(under_store, slot.key.manifest_key, deadline=deadline)
        judged = []
        for copy in tuple(slot.copies.values()):
            kind = kind_of_manifest(copy.save, manifest.data if manifest is not None else None)
            verdict = judge(copy, seen, kind)
            if verdict == "current" and _is_passed_over(slot, copy.save.save_id):
                verdict = "open"
            judged.append((copy, verdict, seen))
        return judged

    def _take_over(self, under_store: UnderStore, slot: Slot, save_id: str, deadline: float) -> bool:
        """Makes the save this server's own, under the claim. False if somebody was faster."""
        with slot.exclusively(deadline):
            copy = slot.copies.get(save_id)
            if copy is None or slot.lease is not None or slot.deletion is not None:
                return False
            if _is_passed_over(slot, save_id):
                return False
            seen = self._claims.look(under_store, slot.key, deadline=deadline)
            take = decide_takeover(
                copy, "current", seen, server_id=self._claims.server_id, now_s=self._claims.now_s()
            )
            if take is None:
                return False
            try:
                self._claims.write(
                    under_store,
                    slot.key,
                    save_id=copy.save.save_id,
                    state="committed",
                    writer=copy.save.writer,
                    replaces=take.replaces,
                    deadline=deadline,
                )
            except AlreadyExists:
                return False
            _log.warning(
                "server %s is silent, which should upload %s (save %s): it is uploaded from the copy here",
                *(copy.owner, slot.key, copy.save.save_id),
            )
            was_this = seen is not None and seen.claim.save_id == copy.save.save_id
            was_committed = was_this and seen is not None and seen.claim.state == "committed"
            self._slots.begin_save(slot, replace(copy.save, unbroken=was_committed))
            self._slots.end_copy(slot, copy.save.save_id)
            return True


def _is_passed_over(slot: Slot, save_id: str) -> bool:
    """Whether a save is here that was committed in that one's place: the claim may not tell yet."""
    later = [copy.save for copy in tuple(slot.copies.values()) if copy.confirmed]
    if slot.save is not None and not slot.save.is_superseded:
        later.append(slot.save)
    return any(save.came_after(save_id) for save in later)
