"""What this server knows of each path: its lease, its save, and their records in the store.

A `Slot` is guarded twice. `exclusively` admits one at a time to whatever changes the claim or the save, network and
fsync included. The fields themselves change only under `Slots.changed`, which is held for moments: a lease can be
renewed while its save is being committed. Records are written before the fields, so that a restart finds what was
acknowledged.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace

from torchcache.errors import TorchCacheError
from torchcache.model import SAVE_PREFIX, ObjectId
from torchcache_server.cache.save_records import (
    COPY,
    DELETION,
    LEASE,
    SAVE,
    UPLOADED,
    copy_key,
    decode_copy,
    decode_deletion,
    decode_lease,
    decode_save,
    decode_uploaded,
    encode_copy,
    encode_deletion,
    encode_lease,
    encode_save,
    encode_uploaded,
)
from torchcache_server.cache.saves import Copy, Deletion, Save, SaveKey
from torchcache_server.cache.slot import Lease, Loan, Reader, Slot
from torchcache_server.store import Store

__all__ = ["Lease", "Loan", "Reader", "Slot", "Slots"]

_log = logging.getLogger(__name__)


class Slots:
    """All slots, and their records. Writers of a slot hold it `exclusively`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._slots: dict[SaveKey, Slot] = {}
        self.changed = threading.Condition()
        """Guards the fields of all slots; notified when a lease or a save begins or ends."""
        self.dropping: set[str] = set()
        """Namespaces that are being dropped just now, under `changed`: nobody may begin to use them."""
        self._keeping = threading.Lock()
        """Held from looking who needs a namespace until the store was told. Taken before `changed`, never within."""
        self.guarded: frozenset[str] = frozenset()
        """Namespaces that nobody may drop: a record that can't be read may speak of them. They were there at the start,
        like whatever a record then spoke of."""
        self._load()

    def slot(self, key: SaveKey) -> Slot:
        """The slot of `key`, made if need be."""
        with self.changed:
            return self._slots.setdefault(key, Slot(key))

    def find(self, key: SaveKey) -> Slot | None:
        with self.changed:
            return self._slots.get(key)

    def all(self) -> list[Slot]:
        with self.changed:
            return list(self._slots.values())

    def forget_empty(self) -> frozenset[SaveKey]:
        """Forgets the paths of which nothing is known; returns those that are left.

        Not one that a thread has in hand, which may be about to note something there, or in whose lock another waits.
        """
        with self.changed:
            for key in [key for key, slot in self._slots.items() if slot.is_empty]:
                # Nobody can come by it meanwhile: that takes the lock.
                if (in_hand := weakref.ref(self._slots.pop(key))()) is not None:
                    self._slots[key] = in_hand
            return frozenset(self._slots)

    # ---- leases ----

    def note_lease(self, slot: Slot, save_id: str) -> None:
        """Remembers over restarts that a claim may come to lie in the under-store. Before it does."""
        self._write_leases(slot, slot.dead_leases | {save_id})

    def begin_lease(self, slot: Slot, lease: Lease) -> None:
        with self.changed:
            slot.lease = lease
            self.changed.notify_all()

    def end_lease(self, slot: Slot) -> None:
        """The save was given up or overtaken: its bytes go; its claim is among `dead_leases` until released."""
        with self.changed:
            lease, slot.lease = slot.lease, None
            if lease is None:
                return
            slot.dead_leases.add(lease.save_id)
            self.changed.notify_all()
        self.drop(slot, slot.key.namespace(lease.save_id))
        self.end_loan(slot, lease.save_id)

    def bury(self, slot: Slot, save_ids: set[str]) -> None:
        """The claims of `save_ids` aren't in the under-store any more."""
        left = slot.dead_leases - save_ids
        self._write_leases(slot, left | ({slot.lease.save_id} if slot.lease else set()))
        with self.changed:
            slot.dead_leases = left

    def _write_leases(self, slot: Slot, save_ids: set[str]) -> None:
        record_key = LEASE + slot.key.digest
        if not save_ids:
            self._store.delete_record(record_key)
            return
        self._store.put_record(record_key, encode_lease(slot.key, save_ids))

    # ---- saves ----

    def begin_save(self, slot: Slot, save: Save) -> None:
        """The commit point of the pool: when this returns, `save` is what the path holds, over any restart."""
        self._store.put_record(SAVE + slot.key.digest, encode_save(save))
        with self.changed:
            if slot.save is not None:
                slot.garbage |= slot.save.namespaces
            slot.save, slot.uploaded, slot.lease = save, {}, None
            slot.committed_here = True
            self.changed.notify_all()
        self.end_loan(slot, save.save_id)
        try:
            self._write_leases(slot, slot.dead_leases)
        except TorchCacheError as error:
            # The save is committed all the same; the next start knows its lease for ended.
            _log.warning("%s: the end of its lease can't be noted: %s", slot.key, error)

    def update_save(self, slot: Slot, save: Save) -> None:
        """`save` went on: it became durable, or failed, or lost its claim."""
        self._store.put_record(SAVE + slot.key.digest, encode_save(save))
        with self._keeping:  # or another one settles by what the save was, behind this
            self._settle(save.namespaces, slot, save)
            with self.changed:
                slot.save = save
                self.changed.notify_all()
        if save.state == "durable":
            self._store.delete_record(UPLOADED + slot.key.digest)

    def forget_save(self, slot: Slot) -> None:
        """What the under-store holds is somebody else's now."""
        self._store.delete_record(SAVE + slot.key.digest)
        self._store.delete_record(UPLOADED + slot.key.digest)
        with self.changed:
            if slot.save is not None:
                slot.garbage |= slot.save.namespaces
            slot.save, slot.uploaded = None, {}
            self.changed.notify_all()

    # ---- copies of saves that other servers own ----

    def put_copy(self, slot: Slot, copy: Copy) -> None:
        """When this returns, this server has the copy, over any restart."""
        self._store.put_record(copy_key(copy.save), encode_copy(copy))
        with self.changed:
            slot.copies[copy.save.save_id] = copy
            self.changed.notify_all()

    def confirm_copy(self, slot: Slot, save_id: str) -> None:
        """If there is such a copy: the claim said that its save is committed, and may not say so any more later."""
        copy = slot.copies.get(save_id)
        if copy is not None and not copy.confirmed:
            self.put_copy(slot, replace(copy, confirmed=True))

    def end_copy(self, slot: Slot, save_id: str) -> None:
        """The copy has done its duty, or nobody may want it any more; its bytes go, unless the save is here by now."""
        copy = slot.copies.get(save_id)
        if copy is None:
            return
        self._store.delete_record(copy_key(copy.save))
        with self.changed:
            slot.copies.pop(save_id, None)
            self.changed.notify_all()
        self._drop_all(slot, copy.save)

    def spend_copy(self, slot: Slot, save_id: str) -> None:
        """The copy isn't needed any more.

        Its bytes may still be lent, until room is needed for others, the next copy of the run is spent, or the server
        stops.
        """
        copy = slot.copies.get(save_id)
        if copy is None:
            return
        self._store.delete_record(copy_key(copy.save))
        with self.changed:
            slot.copies.pop(save_id, None)
            older = [
                (other, id)
                for other in self._slots.values()
                if other.key.run == slot.key.run
                for id in other.spent
            ]
            slot.spent[save_id] = replace(copy.save, metadata=b"", manifest=b"")
            self.changed.notify_all()
        self.settle(copy.save.namespaces)
        for other, id in older:
            self.end_spent(other, id)

    def end_spent(self, slot: Slot, save_id: str) -> None:
        """The bytes that a copy left go. One that isn't there is fine."""
        with self.changed:
            save = slot.spent.pop(save_id, None)
        if save is not None:
            self._drop_all(slot, save)

    # ---- files lent to saves that are being written ----

    def end_loan(self, slot: Slot, save_id: str, *, only: Loan | None = None) -> None:
        """The save holds by itself what it has borrowed, or isn't written any more. None, or another, is fine."""
        with self.changed:
            loan = slot.loans.get(save_id)
            if loan is None or (only is not None and loan is not only):
                return
            del slot.loans[save_id]
        self._let_go(slot, loan.namespaces)

    def change_loan(self, slot: Slot, save_id: str, change: Callable[[Loan], Loan]) -> bool:
        """What isn't lent any more is let go at once, and with its last file the loan. False if there is none."""
        with self.changed:
            before = slot.loans.get(save_id)
            if before is None:
                return False
            after = change(before)
            if after.files:
                slot.loans[save_id] = after
            else:
                del slot.loans[save_id]
        self._let_go(slot, before.namespaces - after.namespaces)
        return True

    def _let_go(self, slot: Slot, namespaces: Iterable[str]) -> None:
        try:
            for namespace in sorted(namespaces):
                self.drop(slot, namespace)
        except TorchCacheError as error:
            _log.warning("%s: what was lent to it stays for now: %s", slot.key, error)

    # ---- deletions ----

    def begin_deletion(self, slot: Slot, deletion: Deletion) -> None:
        """When this returns, the save is gone for whoever asks, over any restart; its bytes go behind."""
        self._store.put_record(DELETION + slot.key.digest, encode_deletion(deletion))
        with self.changed:
            slot.deletion, slot.deletion_error = deletion, None
        self.forget_save(slot)

    def note_deletion_error(self, slot: Slot, error: TorchCacheError | None) -> None:
        """The deletion stopped, and goes on later; or (None) is to go on now."""
        with self.changed:
            slot.deletion_error = copy(error)  # without its frames, which have the slot in hand
            self.changed.notify_all()

    def end_deletion(self, slot: Slot, error: TorchCacheError | None) -> None:
        """Everything of the save is gone, or the path is somebody else's now (`error`)."""
        if slot.save is None:  # a stop between two records may have left this one
            self._store.delete_record(UPLOADED + slot.key.digest)
        self._store.delete_record(DELETION + slot.key.digest)
        with self.changed:
            if slot.deletion is not None and error is not None:
                slot.garbage.add(slot.deletion.key.namespace(slot.deletion.save_id))
            slot.deletion, slot.deletion_error = None, copy(error)
            self.changed.notify_all()

    def note_uploaded(self, slot: Slot, save: Save, name: str, version: str | None) -> None:
        """Shard `name` of `save` lies in the under-store as `version` (None: not any more)."""
        with self.changed:
            if slot.save is None or slot.save.save_id != save.save_id:
                return
            if version is None:
                slot.uploaded.pop(name, None)
            else:
                slot.uploaded[name] = version
            record = encode_uploaded(save.save_id, slot.uploaded)
        # Two shards that end together may write their records in either order: after a restart one is uploaded again.
        self._store.put_record(UPLOADED + slot.key.digest, record)

    def find_uploaded(self, save: Save, name: str) -> ObjectId | None:
        """The same shard as another save of the run has brought it to the under-store; None if none is known to have.

        That save may be replaced or deleted at any time.
        """
        if name not in save.borrowed:
            return None
        with self.changed:
            for slot in self._slots.values():
                other, version = slot.save, slot.uploaded.get(name)
                if other is None or version is None or other.key == save.key or other.key.run != save.key.run:
                    continue
                if other.state == "durable" and other.origin(name) == save.origin(name):
                    return ObjectId(other.key.store, f"{other.key.path}/{name}", version)
        return None

    # ---- namespaces of the store ----

    def used(self) -> set[str]:
        """All namespaces that belong to somebody, or are about to go."""
        with self.changed:
            return set().union(*(slot.namespaces | slot.garbage for slot in self._slots.values()))

    def drop(self, slot: Slot, namespace: str) -> None:
        """Drops a namespace, unless somebody else uses it, or a record that can't be read may."""
        if namespace in self.guarded:
            _log.warning("%s stays: a record that can't be read may speak of it", namespace)
        else:
            with self._keeping:
                self._drop(slot, namespace)
        with self.changed:
            slot.garbage.discard(namespace)

    def _drop(self, slot: Slot, namespace: str) -> None:
        with self.changed:
            # A deletion doesn't use what it takes away itself.
            used = any(
                namespace in (other.held if other is slot else other.namespaces)
                for other in self._slots.values()
            )
            if not used:
                self.dropping.add(namespace)
        if used:
            self._settle([namespace])
            return
        try:
            self._store.drop(namespace)
        finally:
            with self.changed:
                self.dropping.discard(namespace)

    def _drop_all(self, slot: Slot, save: Save) -> None:
        for namespace in sorted(save.namespaces):
            self.drop(slot, namespace)

    def settle(self, namespaces: Iterable[str]) -> None:
        """Has the store keep what of these is needed and can't be had again, and no more.

        Also what is here of them for another path's sake: files may be borrowed.
        """
        with self._keeping:
            self._settle(namespaces)

    def _settle(self, namespaces: Iterable[str], slot: Slot | None = None, save: Save | None = None) -> None:
        """As if `slot` had `save`."""
        for namespace in sorted(namespaces):
            with self.changed:
                all_slots = list(self._slots.values())
                keep = any(one.must_keep(namespace, save if one is slot else None) for one in all_slots)
                is_known = any(one.stored(namespace) for one in all_slots)
                borrowers = [name for one in all_slots if (name := one.borrower(namespace)) is not None]
            # A user who pins a save means all of it.
            keep = keep or any(self._store.policy(borrower).pinned for borrower in borrowers)
            # Of a save whose own record can't be read nobody knows whether it may go.
            if keep or is_known or namespace not in self.guarded:
                self._store.keep(namespace, keep)

    def is_save(self, namespace: str) -> bool:
        """Whether it is that of a path's save."""
        return any(slot.save is not None and slot.save.namespace == namespace for slot in self.all())

    def settle_pin(self, namespace: str) -> None:
        """A save's namespace was pinned, or isn't any more."""
        for slot in self.all():
            save = slot.save
            if save is not None and save.namespace == namespace:
                self.settle(save.namespaces)

    # ---- start ----

    def _load(self) -> None:
        unread = self._read(SAVE, self._load_save)
        unread += self._read(LEASE, self._load_lease)
        by_digest = {slot.key.digest: slot for slot in self.all()}
        unread += self._read(UPLOADED, lambda digest, record: _load_uploaded(by_digest.get(digest), record))
        unread += self._read(DELETION, self._load_deletion)
        unread += self._read(COPY, self._load_copy)
        known = (SAVE, LEASE, UPLOADED, DELETION, COPY)
        unread += [key for key, _ in self._store.records(b"") if not key.startswith(known)]
        saved = {usage.name for usage in self._store.namespaces() if usage.name.startswith(SAVE_PREFIX)}
        if unread:
            _log.error(
                "%d records of saves can't be read, like %r: no save that is here now is dropped. Start the version of "
                "torchcache that wrote them",
                len(unread),
                unread[0],
            )
        if self._store.set_aside:
            _log.error(
                "%d records of saves were damaged and set aside: no save that is here now is dropped. Once you have "
                "what you want of them, remove the folder 'damaged' of the store and start again",
                len(self._store.set_aside),
            )
        if unread or self._store.set_aside:
            self.guarded = frozenset(saved)
        for name in sorted(saved.difference(self.guarded, *(slot.namespaces for slot in self.all()))):
            self._store.drop(name)
        self.settle(set().union(*(slot.held for slot in self.all())))

    def _read(self, kind: bytes, load: Callable[[bytes, bytes], None]) -> list[bytes]:
        """Hands each record of a kind to `load`, behind its key's digest; returns the keys of those it can't read."""
        unread = []
        for record_key, record in self._store.records(kind):
            try:
                load(record_key.removeprefix(kind), record)
            except ValueError:
                _log.exception("the record %r of a save can't be read", record_key)
                unread.append(record_key)
        return unread

    def _load_save(self, _: bytes, record: bytes) -> None:
        save = decode_save(record)
        self.slot(save.key).save = save

    def _load_deletion(self, _: bytes, record: bytes) -> None:
        deletion = decode_deletion(record)
        slot = self.slot(deletion.key)
        slot.deletion = deletion
        if slot.save is not None:  # the stop came between the two records
            self.forget_save(slot)

    def _load_copy(self, _: bytes, record: bytes) -> None:
        copy = decode_copy(record)
        slot = self.slot(copy.save.key)
        if slot.save is not None and slot.save.save_id == copy.save.save_id:
            # The stop came while the copy became this server's own save.
            self._store.delete_record(copy_key(copy.save))
        else:
            slot.copies[copy.save.save_id] = copy
            slot.dead_leases.discard(
                copy.save.save_id
            )  # the stop came in its commit: the claim tells how it ended

    def _load_lease(self, _: bytes, record: bytes) -> None:
        key, save_ids = decode_lease(record)
        slot = self.slot(key)
        # The stop may have come between the commit and the end of its lease.
        slot.dead_leases = save_ids - ({slot.save.save_id} if slot.save else set())


def _load_uploaded(slot: Slot | None, record: bytes) -> None:
    save_id, uploaded = decode_uploaded(record)
    if slot is not None and slot.save is not None and slot.save.save_id == save_id:
        slot.uploaded = uploaded
