"""What this server knows of each path: its lease, its save, and their records in the store.

A `Slot` is guarded twice. `exclusively` admits one at a time to whatever changes the claim or the save, network and
fsync included. The fields themselves change only under `Slots.changed`, which is held for moments: a lease can be
renewed while its save is being committed. Records are written before the fields, so that a restart finds what was
acknowledged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from torchcache.errors import TorchCacheError
from torchcache.model import SAVE_PREFIX
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
from torchcache_server.cache.slot import Lease, Reader, Slot
from torchcache_server.store import Store

__all__ = ["Lease", "Reader", "Slot", "Slots"]

_log = logging.getLogger(__name__)


class Slots:
    """All slots, and their records. Writers of a slot hold it `exclusively`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._slots: dict[SaveKey, Slot] = {}
        self.changed = threading.Condition()
        """Guards the fields of all slots; notified when a lease or a save begins or ends."""
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
                slot.garbage.add(slot.save.namespace)
            slot.save, slot.uploaded, slot.lease = save, {}, None
            slot.committed_here = True
            self.changed.notify_all()
        try:
            self._write_leases(slot, slot.dead_leases)
        except TorchCacheError as error:
            # The save is committed all the same; the next start knows its lease for ended.
            _log.warning("%s: the end of its lease can't be noted: %s", slot.key, error)

    def update_save(self, slot: Slot, save: Save) -> None:
        """`save` went on: it became durable, or failed, or lost its claim."""
        self._store.put_record(SAVE + slot.key.digest, encode_save(save))
        self._store.keep(save.namespace, save.must_be_kept)
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
                slot.garbage.add(slot.save.namespace)
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
        self.drop(slot, copy.save.namespace)

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
            slot.deletion_error = error
            self.changed.notify_all()

    def end_deletion(self, slot: Slot, error: TorchCacheError | None) -> None:
        """Everything of the save is gone, or the path is somebody else's now (`error`)."""
        if slot.save is None:  # a stop between two records may have left this one
            self._store.delete_record(UPLOADED + slot.key.digest)
        self._store.delete_record(DELETION + slot.key.digest)
        with self.changed:
            if slot.deletion is not None and error is not None:
                slot.garbage.add(slot.deletion.key.namespace(slot.deletion.save_id))
            slot.deletion, slot.deletion_error = None, error
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

    def drop(self, slot: Slot, namespace: str) -> None:
        """Drops a namespace, unless another part of the same path uses it, or a record that can't be read may."""
        with self.changed:
            # A deletion doesn't use what it takes away itself.
            used = any(
                namespace in other.namespaces and not (other is slot and _only_deleted(slot, namespace))
                for other in self._slots.values()
            )
        if namespace in self.guarded:
            _log.warning("%s stays: a record that can't be read may speak of it", namespace)
        elif not used:
            self._store.drop(namespace)
        with self.changed:
            slot.garbage.discard(namespace)

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
        for slot in self.all():
            if slot.save is not None:
                self._store.keep(slot.save.namespace, slot.save.must_be_kept)
            for copy in slot.copies.values():
                self._store.keep(copy.save.namespace, True)

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


def _only_deleted(slot: Slot, namespace: str) -> bool:
    holders = [holder for holder in (slot.lease, slot.save) if holder is not None]
    return all(slot.key.namespace(holder.save_id) != namespace for holder in holders)


def _load_uploaded(slot: Slot | None, record: bytes) -> None:
    save_id, uploaded = decode_uploaded(record)
    if slot is not None and slot.save is not None and slot.save.save_id == save_id:
        slot.uploaded = uploaded
