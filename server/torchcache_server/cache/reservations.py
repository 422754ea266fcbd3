"""Who may write a path: leases within this server, claims among servers.

A writer reserves its path before it writes, renews while it writes, and commits. What it must not meet is another
writer of the same path: in this server the lease tells, beyond it the claim in the under-store. A writer that was
killed stops renewing; whoever wants its path next waits until the lease would have run out, and takes the path over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torchcache.errors import AlreadyExists, CheckpointError, DeadlineExceeded, TorchCacheError
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import (
    Displaced,
    Refuse,
    Sighting,
    Take,
    Wait,
    already_there,
    decide_reserve,
    live_writer,
    taken_over,
)
from torchcache_server.cache.saves import SaveKey, is_mark, manifest_digest, mark_of, status_of_manifest
from torchcache_server.cache.slots import Lease, Slot, Slots
from torchcache_server.cache.small_objects import read_small, stat_or_none
from torchcache_server.understore.base import UnderStore

_log = logging.getLogger(__name__)

LAPSED_AFTER_LEASES = 6
"""So many leases after the last renewal the bytes of a save that nobody wants to replace are dropped."""

_POLLS_A_LEASE = 5
_OLDER_KEPT = 16


@dataclass(slots=True)
class _Patience:
    """What one caller of `reserve` has seen so far of those it waits for."""

    expiries: dict[str, float] = field(
        default_factory=dict
    )  # save id -> when its lease was to end at first sight
    sighting: Sighting | None = None

    def saw_lease_renewed(self, lease: Lease) -> bool:
        return lease.expires_s > self.expiries.setdefault(lease.save_id, lease.expires_s)

    def saw_claim_renewed(self, seen: Sighting | None) -> bool:
        first, self.sighting = self.sighting, seen
        return (
            first is not None
            and seen is not None
            and first.version != seen.version
            and (first.claim.server_id, first.claim.save_id) == (seen.claim.server_id, seen.claim.save_id)
            and seen.claim.state == "reserved"
        )


class Reservations:
    """Leases and claims of all paths. Thread-safe."""

    def __init__(
        self, slots: Slots, claims: ClaimBook, *, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self._slots = slots
        self._claims = claims
        self._lease_s = lease_s
        self._clock = clock

    def reserve(
        self,
        under_store: UnderStore,
        key: SaveKey,
        save_id: str,
        *,
        writer: str,
        overwrite: bool,
        deadline: float,
    ) -> None:
        """Grants the path to `save_id`, or raises AlreadyExists; waits for those who may be dead.

        Raises DeadlineExceeded if they may still be alive at `deadline`; asking again goes on with the wait.
        """
        slot = self._slots.slot(key)
        patience = _Patience()
        wanted = Lease(save_id, writer, overwrite, (), 0.0)
        while True:
            with slot.exclusively(deadline):
                wait = self._try_reserve(under_store, slot, wanted, patience, deadline)
            if wait is None:
                return
            now = self._clock()
            if now >= deadline:
                raise DeadlineExceeded(
                    f"{key} is reserved by {wait.holder}, and whether that writer lives wasn't known in time",
                    object=str(key),
                )
            with self._slots.changed:
                self._slots.changed.wait(
                    max(0.001, min(wait.until_s, deadline, now + self._lease_s / _POLLS_A_LEASE) - now)
                )

    def _try_reserve(
        self, under_store: UnderStore, slot: Slot, wanted: Lease, patience: _Patience, deadline: float
    ) -> Wait | None:
        """None once the path is ours."""
        if slot.save is not None and slot.save.save_id == wanted.save_id:
            return None  # a repeated call that was overtaken by its own commit
        if slot.deletion is not None:
            return Wait(self._clock() + self._lease_s, "the deletion of what was there")
        if slot.lease is not None:
            if slot.lease.save_id == wanted.save_id:
                self._extend(slot.lease)
                return None
            if patience.saw_lease_renewed(slot.lease):
                raise live_writer(slot.key, slot.lease.writer)
            if self._clock() < slot.lease.expires_s:
                return Wait(slot.lease.expires_s, slot.lease.writer)
        wanted.replaceable = self._existing(under_store, slot, wanted, deadline)
        if slot.lease is not None:
            _log.warning("%s: the lease of %s has run out; its save is dropped", slot.key, slot.lease.writer)
            self._slots.end_lease(slot)
        return self._take_claim(under_store, slot, wanted, patience, deadline)

    def _existing(
        self, under_store: UnderStore, slot: Slot, wanted: Lease, deadline: float
    ) -> tuple[str, ...]:
        """Digests of the manifests that `wanted` would replace. Raises AlreadyExists if it mustn't."""
        if not wanted.overwrite:
            if slot.save is not None and slot.save.wants_upload:
                raise already_there(slot.key, "a checkpoint, not uploaded yet")
            if stat_or_none(under_store, slot.key.manifest_key, deadline=deadline) is not None:
                raise already_there(slot.key, "a checkpoint")
            if stat_or_none(under_store, slot.key.metadata_key, deadline=deadline) is not None:
                raise already_there(slot.key, "a checkpoint that another program saved")
            return ()
        manifest = read_small(under_store, slot.key.manifest_key, deadline=deadline)
        return () if manifest is None else (manifest_digest(manifest.data),)

    def _take_claim(
        self, under_store: UnderStore, slot: Slot, wanted: Lease, patience: _Patience, deadline: float
    ) -> Wait | None:
        seen = self._claims.look(under_store, slot.key, deadline=deadline)
        decision = decide_reserve(
            seen,
            key=slot.key,
            server_id=self._claims.server_id,
            uploading=slot.save.save_id if slot.save is not None and slot.save.wants_upload else "",
            overwrite=wanted.overwrite,
            renewed=patience.saw_claim_renewed(seen),
            now_s=self._clock(),
            save_id=wanted.save_id,
        )
        if isinstance(decision, Refuse):
            raise decision.error
        if isinstance(decision, Wait):
            return decision
        wanted.later_than = _committed(slot, seen)
        self._slots.note_lease(slot, wanted.save_id)
        if seen is not None and seen.is_committed_by_another(self._claims.server_id):
            wanted.displaces = True
            self._slots.confirm_copy(slot, seen.claim.save_id)
        if isinstance(decision, Take):
            try:
                over = None if seen is None else seen.displaced
                self._write_claim(under_store, slot.key, wanted, decision.replaces, deadline, over=over)
            except AlreadyExists:
                return Wait(self._clock(), "another server")  # Somebody was faster: look again.
            except BaseException:
                # Whether the claim is there isn't known: it is looked after, and released if it is.
                with self._slots.changed:
                    slot.dead_leases.add(wanted.save_id)
                raise
            self._look_again(under_store, slot, wanted, deadline)
        self._extend(wanted)
        self._slots.begin_lease(slot, wanted)
        return None

    def _write_claim(
        self,
        under_store: UnderStore,
        key: SaveKey,
        lease: Lease,
        replaces: str,
        deadline: float,
        *,
        over: Displaced | None,
    ) -> None:
        self._claims.write(
            under_store,
            key,
            save_id=lease.save_id,
            state="reserved",
            writer=lease.writer,
            replaces=replaces,
            deadline=deadline,
            over=over,
        )

    def _look_again(self, under_store: UnderStore, slot: Slot, wanted: Lease, deadline: float) -> None:
        """Under the claim: the holder before us may have published just before it let go."""
        try:
            wanted.replaceable = self._existing(under_store, slot, wanted, deadline)
        except BaseException:
            with self._slots.changed:
                slot.dead_leases.add(wanted.save_id)
            # At once if it can be, so that nobody waits for it.
            self._release_dead(under_store, slot, deadline)
            raise

    def replaceable(self, key: SaveKey) -> tuple[str, ...]:
        """The manifest_digest of each manifest that the save reserved at `key` may overwrite."""
        slot = self._slots.find(key)
        with self._slots.changed:
            return () if slot is None or slot.lease is None else replaceable_by(slot, slot.lease)

    def renew(self, key: SaveKey, save_id: str) -> None:
        """Raises AlreadyExists if the path was taken over, CheckpointError if the save isn't known (any more)."""
        with self._slots.changed:
            slot = self._slots.find(key)
            if slot is not None and slot.lease is not None and slot.lease.save_id == save_id:
                self._extend(slot.lease)
                return
            if slot is not None and slot.save is not None and slot.save.save_id == save_id:
                return
        raise lost_lease(key, slot)

    def abandon(self, under_store: UnderStore, key: SaveKey, save_id: str, *, deadline: float) -> None:
        """Ends a save that isn't committed; of any other id, or a committed save, nothing changes."""
        slot = self._slots.find(key)
        if slot is None:
            return
        with slot.exclusively(deadline):
            if slot.lease is None or slot.lease.save_id != save_id:
                return
            self._slots.end_lease(slot)
            self._release_dead(under_store, slot, deadline)

    def _extend(self, lease: Lease) -> None:
        with self._slots.changed:
            lease.expires_s = self._clock() + self._lease_s

    # ---- looking after them ----

    def tidy(self, under_store: UnderStore, slot: Slot, *, deadline: float) -> None:
        """Shows other servers that the lease is alive, ends it long after it ran out, releases dead claims.

        Raises TransientError if the under-store can't be reached.
        """
        if slot.deletion is not None:
            return  # The claim is its own.
        lease = slot.lease
        if lease is not None and self._clock() < lease.expires_s:
            self._claims.refresh(under_store, slot.key, lease.save_id, deadline=deadline)
        self._show_upload(under_store, slot, deadline)
        if not slot.dead_leases and not self._has_lapsed(lease):
            return
        with slot.exclusively(deadline):
            if slot.lease is not None and self._has_lapsed(slot.lease):
                _log.warning("%s: the save of %s was never committed: dropped", slot.key, slot.lease.writer)
                self._slots.end_lease(slot)
            self._release_dead(under_store, slot, deadline)

    def _show_upload(self, under_store: UnderStore, slot: Slot, deadline: float) -> None:
        """Servers that have copies of the save take its upload over from one that is silent."""
        save = slot.save
        if save is None or save.state != "committed" or save.replicas < 2:
            return
        with slot.exclusively(deadline):  # whoever gives the claim up must not meet a new version of it
            if slot.save is save:
                self._claims.refresh(
                    under_store, slot.key, save.save_id, deadline=deadline, state="committed"
                )

    def _has_lapsed(self, lease: Lease | None) -> bool:
        lapse_s = (LAPSED_AFTER_LEASES - 1) * self._lease_s
        return lease is not None and self._clock() >= lease.expires_s + lapse_s

    def _release_dead(self, under_store: UnderStore, slot: Slot, deadline: float) -> None:
        dead = set(slot.dead_leases)
        if not dead:
            return

        def counts_on(over: Displaced) -> bool:
            """Unless the under-store has it, or it was this server's own, and isn't waiting for its upload."""
            if over.server_id == self._claims.server_id and not _awaits_upload(slot, over.save_id):
                return False
            manifest = read_small(under_store, slot.key.manifest_key, deadline=deadline)
            return manifest is None or status_of_manifest(slot.key, manifest.data).save_id != over.save_id

        try:
            self._claims.release(under_store, slot.key, dead, deadline=deadline, counts_on=counts_on)
        except TorchCacheError as error:
            _log.info("%s: the claim of a dead save is released later: %s", slot.key, error)
            return
        self._slots.bury(slot, dead)


def _awaits_upload(slot: Slot, save_id: str) -> bool:
    save = slot.save
    return save is not None and save.save_id == save_id and save.must_be_kept


def _committed(slot: Slot, seen: Sighting | None) -> tuple[str, ...]:
    """Ids of the saves that are known to be committed, by the claim or by the copies here."""
    displaced = seen.displaced if seen is not None else None
    copies = [copy.save.save_id for copy in tuple(slot.copies.values()) if copy.confirmed]
    return tuple(copies if displaced is None else dict.fromkeys([displaced.save_id, *copies]))


def replaceable_by(slot: Slot, lease: Lease) -> tuple[str, ...]:
    """The manifest_digest of each manifest that the lease's save may overwrite, the newest in front, and mark_of each
    save that it came after: while the under-store can't be told of a commit, claims name an older one.

    Of a path that is saved to over and over, those before the durable one are gone; but a server that lost the claim
    may publish one late, so some of them are kept.
    """
    replaceable = list(lease.replaceable)
    marks = [mark_of(save_id) for save_id in lease.later_than] if lease.overwrite else []
    save = slot.save
    if lease.overwrite and save is not None:
        # Its upload may have been stopped anywhere: its own manifest may be there, or what it was to overwrite.
        older = [digest for digest in save.replaceable if not is_mark(digest)]
        replaceable += [
            manifest_digest(save.manifest),
            *older[: _OLDER_KEPT if save.state == "durable" else None],
        ]
        if not save.is_superseded:
            marks.append(mark_of(save.save_id))
            marks += [] if save.state == "durable" else filter(is_mark, save.replaceable)
    return tuple(dict.fromkeys([*replaceable, *marks]))


def lost_lease(key: SaveKey, slot: Slot | None) -> CheckpointError:
    """The error of a writer whose lease isn't there any more."""
    holder = slot.lease if slot is not None else None
    if holder is not None:
        return taken_over(key, holder.writer)
    if slot is not None and slot.save is not None and slot.committed_here:
        return taken_over(key, f"save {slot.save.save_id}")
    # A save that was there when the server started may be what was to be overwritten.
    return CheckpointError(
        f"the reservation of {key} isn't known to the server any more (its lease ran out, or the server was "
        "restarted while the save was being written): save again",
        object=str(key),
    )
