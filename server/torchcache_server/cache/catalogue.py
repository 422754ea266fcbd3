"""Which checkpoints there are: what this server has committed, and what lies in the under-store."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final, Protocol

from torchcache.errors import NotCommitted, ObjectNotFound, TransientError
from torchcache.save_names import MANIFEST_NAME
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import Sighting
from torchcache_server.cache.saves import (
    Copy,
    Save,
    SaveKey,
    SaveStatus,
    kind_of_manifest,
    manifest_digest,
    status_of_manifest,
)
from torchcache_server.cache.slots import Slot, Slots
from torchcache_server.cache.small_objects import read_small, stat_or_none
from torchcache_server.understore.base import UnderStore, object_uri

_log = logging.getLogger(__name__)

_PAGE: Final = 1000


def status_of(slot: Slot, save: Save) -> SaveStatus:
    """The status of the slot's save."""
    return SaveStatus(
        key=save.key,
        save_id=save.save_id,
        state=save.state,
        manifest=save.manifest,
        pending_bytes=slot.pending_bytes,
        total_bytes=save.total_bytes,
        error=save.error,
        committed_unix_s=save.committed_unix_s,
        durable_unix_s=save.durable_unix_s,
        replicas=save.replicas,
        borrowed=save.borrowed,
    )


def status_of_copy(copy: Copy) -> SaveStatus:
    """The status of a save of which this server only knows that it isn't in the under-store yet."""
    save = copy.save
    return SaveStatus(
        key=save.key,
        save_id=save.save_id,
        state="committed",
        manifest=save.manifest,
        pending_bytes=save.total_bytes,
        total_bytes=save.total_bytes,
        error=None,
        committed_unix_s=save.committed_unix_s,
        durable_unix_s=0.0,
        replicas=save.replicas,
        borrowed=save.borrowed,
    )


class HeldElsewhere(NotCommitted):
    """No checkpoint is known here, but the server `holder` may have a committed one: the claim is its own.

    `save_id` is that one's, if it is known to be committed.
    """

    def __init__(self, message: str, *, holder: str, save_id: str = "", object: str | None = None) -> None:
        super().__init__(message, object=object)
        self.holder = holder
        self.save_id = save_id


class Copies(Protocol):
    """What is asked of the copies that this server has of other servers' saves."""

    def current(self, under_store: UnderStore, slot: Slot, *, deadline: float) -> SaveStatus | None:
        """The status of the copy that is what the path holds now; None if none is, or the under-store has it."""


class Catalogue:
    """Answers from the pool where the pool has the newest, from the under-store else."""

    def __init__(self, slots: Slots, claims: ClaimBook, copies: Copies) -> None:
        self._slots = slots
        self._claims = claims
        self._copies = copies

    def get(
        self, under_store: UnderStore, key: SaveKey, *, deadline: float, check_claim: bool = False
    ) -> SaveStatus:
        """The checkpoint that a reader of `key` should load.

        A save that another server overwrote counts only while nothing of the other is there yet. `check_claim` has the
        status say whether another server has, or may have, committed a later one. Raises NotCommitted, HeldElsewhere if
        such a server may have one.

        The claim is looked at before what is here and what is published: a later save that is uploaded in between, and
        gives up its claim, is then found at the path.
        """
        seen, unseen = self._look(under_store, key, deadline) if check_claim else (None, None)
        claim = seen.claim if seen is not None and self._is_anothers(seen) else None
        later = seen.displaced if seen is not None else None
        try:
            status = self._copy(under_store, key, deadline) or self._own_or_published(
                under_store, key, deadline
            )
            if check_claim and unseen is None and not self._holds(seen, status):
                status = self._or_published_since(under_store, status, deadline)
        except NotCommitted as error:
            if unseen is not None:
                raise unseen from None
            holder = later.server_id if later is not None else claim.server_id if claim is not None else ""
            if holder in ("", self._claims.server_id):
                raise
            raise HeldElsewhere(
                error.message,
                holder=holder,
                save_id=later.save_id if later is not None else "",
                object=error.object,
            ) from None
        if unseen is not None:
            return replace(status, uncertain=True)  # better to resume from what is here than not at all
        if seen is not None and seen.claim.save_id == status.save_id:
            return status if seen.claim.state == "committed" else replace(status, uncertain=True)
        is_later = later is not None and later.save_id != status.save_id
        if is_later and later is not None and self._came_after(status, later.save_id):
            return replace(
                status, uncertain=True
            )  # the claim is behind: there may be more that it doesn't tell of
        # Whoever can't reach the under-store in time commits in its pool alone: then its claim still says "reserved".
        may_be_later = claim is not None and claim.state == "reserved"
        return replace(
            status,
            later_save_id=later.save_id if is_later and later is not None else "",
            uncertain=status.uncertain or may_be_later,
        )

    def _copy(self, under_store: UnderStore, key: SaveKey, deadline: float) -> SaveStatus | None:
        slot = self._slots.find(key)
        if slot is None or not slot.copies:
            return None
        return self._copies.current(under_store, slot, deadline=deadline)

    def _look(
        self, under_store: UnderStore, key: SaveKey, deadline: float
    ) -> tuple[Sighting | None, TransientError | None]:
        try:
            return self._claims.look(under_store, key, deadline=deadline), None
        except TransientError as error:
            return None, error

    def _came_after(self, status: SaveStatus, save_id: str) -> bool:
        slot = self._slots.find(status.key)
        if slot is None:
            return False
        here = [copy.save for copy in tuple(slot.copies.values())] + (
            [slot.save] if slot.save is not None else []
        )
        return any(save.save_id == status.save_id and save.came_after(save_id) for save in here)

    def _is_anothers(self, seen: Sighting) -> bool:
        return seen.claim.server_id != self._claims.server_id

    def _holds(self, seen: Sighting | None, status: SaveStatus) -> bool:
        """Whether by its claim nobody can have published anything later than this."""
        if seen is None or self._is_anothers(seen) or seen.claim.state != "committed":
            return False
        return seen.claim.save_id == status.save_id

    def _or_published_since(self, under_store: UnderStore, status: SaveStatus, deadline: float) -> SaveStatus:
        """What lies at the path, if another server has published it there while this one was to upload its save."""
        slot = self._slots.find(status.key)
        save = slot.save if slot is not None else None
        if save is None or save.state == "durable" or save.save_id != status.save_id:
            return status  # It was read from there.
        try:
            manifest = read_small(under_store, status.key.manifest_key, deadline=deadline)
        except TransientError as error:
            _log.warning("%s: the pool's own copy is served, unchecked: %s", status.key, error)
            return replace(status, uncertain=True)
        if manifest is None or kind_of_manifest(save, manifest.data) != "other":
            return status
        return status_of_manifest(status.key, manifest.data)

    def _own_or_published(self, under_store: UnderStore, key: SaveKey, deadline: float) -> SaveStatus:
        slot = self._slots.find(key)
        save = slot.save if slot is not None else None
        if slot is None or save is None:
            return self._published(under_store, key, deadline)
        if save.is_superseded:
            try:
                return self._published(under_store, key, deadline)
            except NotCommitted:
                return status_of(slot, save)
        still_there = save.state != "durable" or self._still_there(under_store, save, deadline)
        if still_there or still_there is None:
            return replace(status_of(slot, save), uncertain=still_there is None)
        with slot.exclusively(deadline):
            if slot.save is save:
                _log.info("%s was changed by somebody else: save %s is forgotten", key, save.save_id)
                self._slots.forget_save(slot)
        return self._own_or_published(under_store, key, deadline)

    def _still_there(self, under_store: UnderStore, save: Save, deadline: float) -> bool | None:
        """None: the under-store can't tell."""
        try:
            found = stat_or_none(under_store, save.key.manifest_key, deadline=deadline)
        except TransientError as error:
            # Not to know whether somebody overwrote it is better than not to resume.
            _log.warning("%s: the pool's own copy is served, unchecked: %s", save.key, error)
            return None
        return found is not None and found.id.version == save.manifest_version

    def _published(self, under_store: UnderStore, key: SaveKey, deadline: float) -> SaveStatus:
        manifest = read_small(under_store, key.manifest_key, deadline=deadline)
        if manifest is None:
            uri = object_uri(under_store.uri, key.path)
            raise NotCommitted(f"there is no committed checkpoint at {uri}", object=uri)
        slot = self._slots.find(key)
        deletion = slot.deletion if slot is not None else None
        if deletion is not None and manifest_digest(manifest.data) in deletion.manifests:
            uri = object_uri(under_store.uri, key.path)
            raise NotCommitted(f"the checkpoint at {uri} is being deleted", object=uri)
        return status_of_manifest(key, manifest.data)

    def list(self, under_store: UnderStore, prefix: str, *, deadline: float) -> list[SaveStatus]:
        """Checkpoints whose path starts with `prefix`, those being written included, ordered by path."""
        found: dict[SaveKey, SaveStatus] = {}
        for slot in self._slots.all():
            if slot.key.store == under_store.name and f"{slot.key.path}/".startswith(prefix):
                status = self._copies.current(under_store, slot, deadline=deadline) or self._own(slot)
                if status is not None:
                    found[slot.key] = status
        published = self._list_manifests(under_store, prefix, deadline)
        for key in [key for key, status in found.items() if status.state == "durable"]:
            if published.get(key) != self._version(key):
                del found[key]
        for key in published.keys() - found.keys():
            try:
                found[key] = self._published(under_store, key, deadline)
            except NotCommitted:
                continue  # Deleted, or withdrawn, just now.
        return [found[key] for key in sorted(found)]

    def _own(self, slot: Slot) -> SaveStatus | None:
        save, lease = slot.save, slot.lease
        if save is not None and not save.is_superseded:
            return status_of(slot, save)
        if lease is not None:
            return SaveStatus(slot.key, lease.save_id, "reserved", b"", 0, 0, None, 0.0, 0.0)
        return None

    def _version(self, key: SaveKey) -> str | None:
        slot = self._slots.find(key)
        return slot.save.manifest_version if slot is not None and slot.save is not None else None

    def _list_manifests(self, under_store: UnderStore, prefix: str, deadline: float) -> dict[SaveKey, str]:
        """Key and version of every published manifest under `prefix`."""
        found: dict[SaveKey, str] = {}
        start_after = ""
        while True:
            try:
                page = under_store.list(prefix, start_after=start_after, limit=_PAGE, deadline=deadline)
            except ObjectNotFound:
                if self._slots.all():
                    return found  # The bucket or folder isn't there yet; the pool's own saves are.
                raise
            for object in page.objects:
                if not object.size or not object.id.key.endswith(MANIFEST_NAME):
                    continue
                key = SaveKey.of_manifest(under_store.name, object.id.key)
                if key is not None:
                    found[key] = object.id.version
            if not page.truncated or not page.objects:
                return found
            start_after = page.objects[-1].id.key
