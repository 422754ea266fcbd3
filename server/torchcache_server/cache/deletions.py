"""How a checkpoint goes: noted here, then taken out of the under-store, its commit point first.

    note      a record of this server: from here on it tells nobody of the save, and any restart goes on deleting
    claim     nobody else writes the path meanwhile
    withdraw  the manifest, then the metadata, become empty: a reader finds the checkpoint whole or not at all
    remove    the shards, then the empty objects; the pool's own bytes; the claim; the record

What a server that never comes back leaves in the middle is shards without a manifest, and a claim that names them:
whoever is asked next to delete the path, or to save there, goes on from that.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Final

from torchcache.errors import AlreadyExists, NotCommitted, Overloaded, TorchCacheError, TransientError
from torchcache.save_names import CLAIM_NAME
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import (
    Keep,
    Refuse,
    Sighting,
    Take,
    Wait,
    already_there,
    decide_reserve,
    live_writer,
)
from torchcache_server.cache.readers import Readers
from torchcache_server.cache.saves import Deletion, SaveKey, manifest_digest, status_of_manifest
from torchcache_server.cache.slots import Slot, Slots
from torchcache_server.cache.small_objects import read_small, stat_even_empty, write_small
from torchcache_server.cache.upload_attempt import call_deadline
from torchcache_server.understore.base import UnderStore, object_uri

_log = logging.getLogger(__name__)

_PAGE: Final = 1000
_LOOKS: Final = 20


class Deletions:
    """Deletes saves: `request` in the caller's thread, `attempt` where uploads run, one at a time for each slot."""

    def __init__(
        self,
        slots: Slots,
        claims: ClaimBook,
        readers: Readers,
        *,
        lease_s: float,
        clock: Callable[[], float],
        check_running: Callable[[], None],
        drop: Callable[[str], object],
    ) -> None:
        self._slots = slots
        self._claims = claims
        self._readers = readers
        self._lease_s = lease_s
        self._clock = clock
        self._check_running = check_running
        self._drop = drop

    def request(self, under_store: UnderStore, key: SaveKey, save_id: str, *, deadline: float) -> None:
        """Notes that what lies at `key` is to go; of `save_id` alone, unless that is empty. May be repeated.

        Raises NotCommitted if there is nothing, or another save; AlreadyExists while one is being written; InUse while
        it is being read.
        """
        slot = self._slots.slot(key)
        with slot.exclusively(deadline):
            if slot.deletion is not None:
                self._slots.note_deletion_error(slot, None)
                return
            if slot.lease is not None and self._clock() < slot.lease.expires_s:
                raise live_writer(key, slot.lease.writer)
            deletion = self._find(under_store, slot, deadline)
            if save_id and deletion.save_id != save_id:
                raise NotCommitted(
                    f"{key} holds save {deletion.save_id}, not {save_id} any more", object=str(key)
                )
            self._readers.require_none(slot, deletion.save_id)
            if slot.lease is not None:
                self._slots.end_lease(slot)
            self._slots.begin_deletion(slot, deletion)
            self._mark_claim(under_store, slot, deadline)

    def _find(self, under_store: UnderStore, slot: Slot, deadline: float) -> Deletion:
        key, save = slot.key, slot.save
        published = read_small(under_store, key.manifest_key, deadline=deadline)
        if save is not None and not save.is_superseded:
            digest = manifest_digest(save.manifest)
            if published is None or save.wants_upload or manifest_digest(published.data) == digest:
                files = tuple(name for name, _ in save.files)
                return Deletion(key, save.save_id, files, (digest, *save.replaceable))
        if published is not None:
            found = status_of_manifest(key, published.data)
            return Deletion(key, found.save_id, (), (manifest_digest(published.data),))
        return self._find_remains(under_store, slot, deadline)

    def _find_remains(self, under_store: UnderStore, slot: Slot, deadline: float) -> Deletion:
        """Without a manifest only a claim tells of shards that somebody left. Raises NotCommitted."""
        seen = self._claims.look(under_store, slot.key, deadline=deadline)
        if seen is None:
            uri = object_uri(under_store.uri, slot.key.path)
            raise NotCommitted(f"there is no committed checkpoint at {uri}", object=uri)
        if isinstance(decision := self._decide(slot.key, seen), Refuse):
            raise decision.error
        return Deletion(slot.key, seen.claim.save_id, (), ())

    def attempt(self, slot: Slot, under_store: UnderStore) -> None:
        """Goes on with the slot's deletion to its end. Raises what stopped it; then it is to be called again."""
        deletion = slot.deletion
        if deletion is None:
            return
        try:
            self._run(slot, deletion, under_store)
        except AlreadyExists as error:
            _log.warning("%s is not deleted: %s", slot.key, error)
            self._end(slot, deletion, under_store, error)
        except TransientError:
            raise
        except TorchCacheError as error:
            self._slots.note_deletion_error(slot, error)
            raise

    def _run(self, slot: Slot, deletion: Deletion, under_store: UnderStore) -> None:
        if slot.save is not None:  # it could not be forgotten when the deletion was noted
            self._slots.forget_save(slot)
        self._take_claim(slot, under_store, call_deadline())
        self._withdraw_manifest(deletion, under_store)
        self._withdraw_metadata(deletion, under_store)
        for name in self._shards(deletion, under_store):
            self._delete(deletion, f"{deletion.key.path}/{name}", under_store)
        for key in (deletion.key.metadata_key, deletion.key.manifest_key):
            self._delete(deletion, key, under_store)
        for save_id in tuple(slot.spent):
            self._slots.end_spent(slot, save_id)
        for namespace in (*slot.garbage, deletion.key.namespace(deletion.save_id)):
            self._slots.drop(slot, namespace)
        self._drop(
            object_uri(under_store.uri, deletion.key.path)
        )  # what readers had of it from the under-store
        self._end(slot, deletion, under_store, None)
        _log.info("%s (save %s) is deleted", deletion.key, deletion.save_id)

    def _end(
        self, slot: Slot, deletion: Deletion, under_store: UnderStore, error: AlreadyExists | None
    ) -> None:
        with slot.exclusively(call_deadline()):
            self._claims.release(under_store, slot.key, {deletion.save_id}, deadline=call_deadline())
            self._slots.end_deletion(slot, error)

    # ---- the claim ----

    def _decide(self, key: SaveKey, seen: Sighting | None) -> Take | Keep | Wait | Refuse:
        return decide_reserve(
            seen,
            key=key,
            server_id=self._claims.server_id,
            overwrite=False,
            renewed=False,
            now_s=self._clock(),
        )

    def _mark_claim(self, under_store: UnderStore, slot: Slot, deadline: float) -> None:
        """Before the caller is told: a server that gets a copy only now must not find the save committed by the claim.

        Without a claim it doesn't count. Where it can't be done now, `attempt` does it.
        """
        deadline = min(deadline, time.monotonic() + self._lease_s / 2)
        try:
            if self._claims.look(under_store, slot.key, deadline=deadline) is not None:
                self._take_claim(slot, under_store, deadline)
        except TorchCacheError as error:
            _log.info("%s: the claim tells of its deletion later: %s", slot.key, error)

    def _take_claim(self, slot: Slot, under_store: UnderStore, deadline: float) -> None:
        """Writes it anew each time: to other servers it is that of a living writer. Raises AlreadyExists."""
        assert slot.deletion is not None  # noqa: S101 - narrows the type
        key, save_id = slot.key, slot.deletion.save_id
        for _ in range(_LOOKS):
            self._check_running()
            seen = self._claims.look(under_store, key, deadline=deadline)
            decision = self._decide(key, seen)
            if isinstance(decision, Refuse):
                raise decision.error
            if isinstance(decision, Wait):
                break
            try:
                self._claims.write(
                    under_store,
                    key,
                    save_id=save_id,
                    state="deleting",
                    writer=f"the deletion of save {save_id}",
                    replaces="" if seen is None else seen.version,
                    deadline=deadline,
                )
            except AlreadyExists:
                continue
            return
        raise Overloaded(f"{key} is claimed by another server; its deletion waits", object=str(key))

    def _hold(self, deletion: Deletion, under_store: UnderStore) -> None:
        """Before each step that no condition guards: the path is still ours, and others are told so in time."""
        self._check_running()
        self._claims.refresh(
            under_store, deletion.key, deletion.save_id, deadline=call_deadline(), state="deleting"
        )
        if not self._claims.holds(under_store, deletion.key, deletion.save_id, deadline=call_deadline()):
            raise AlreadyExists(
                f"{deletion.key} was taken over by another writer while it was being deleted",
                object=str(deletion.key),
            )

    # ---- the under-store ----

    def _withdraw_manifest(self, deletion: Deletion, under_store: UnderStore) -> None:
        key = deletion.key
        small = read_small(under_store, key.manifest_key, deadline=call_deadline())
        if small is None:
            return
        if manifest_digest(small.data) not in deletion.manifests:
            raise already_there(key, "another checkpoint, published since its deletion was asked for")
        write_small(under_store, key.manifest_key, b"", replaces=small.version, deadline=call_deadline())

    def _withdraw_metadata(self, deletion: Deletion, under_store: UnderStore) -> None:
        key = deletion.key.metadata_key
        self._hold(deletion, under_store)
        found = stat_even_empty(under_store, key, deadline=call_deadline())
        if found is not None and found.size:
            write_small(under_store, key, b"", replaces=found.id.version, deadline=call_deadline())

    def _shards(self, deletion: Deletion, under_store: UnderStore) -> list[str]:
        """Names of the shards: those the save is known to have, and what else is called like one of its part."""
        pattern = re.compile(rf"{deletion.key.part or '__[0-9]+'}_[0-9]+\.distcp")
        prefix = f"{deletion.key.path}/"
        listed = (key.removeprefix(prefix) for key in _keys(under_store, prefix))
        found = [name for name in listed if pattern.fullmatch(name) or name in deletion.files]
        return sorted(name for name in found if not name.endswith(CLAIM_NAME))

    def _delete(self, deletion: Deletion, key: str, under_store: UnderStore) -> None:
        self._hold(deletion, under_store)
        under_store.delete(key, deadline=call_deadline())


def _keys(under_store: UnderStore, prefix: str) -> Iterator[str]:
    start_after = ""
    while True:
        page = under_store.list(
            prefix, start_after=start_after, limit=_PAGE, deadline=time.monotonic() + 60.0
        )
        yield from (object.id.key for object in page.objects)
        if not page.truncated or not page.objects:
            return
        start_after = page.objects[-1].id.key
