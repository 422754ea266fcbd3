"""One attempt to take a committed save to the under-store: looks, asks upload_plan what to do, does it, looks again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Final, Literal

from torchcache.errors import AlreadyExists, Overloaded, TransientError
from torchcache.model import ObjectInfo
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.claims import Keep, Refuse, Sighting, Take, Wait, decide_again, decide_hold
from torchcache_server.cache.saves import ManifestKind, Save, kind_of_manifest
from torchcache_server.cache.shard_source import write_out
from torchcache_server.cache.slots import Slot, Slots
from torchcache_server.cache.small_objects import read_small, stat_even_empty, write_small
from torchcache_server.cache.upload_plan import (
    ConfirmShards,
    Finish,
    GiveUp,
    PublishManifest,
    PutMetadata,
    Seen,
    StandBy,
    Step,
    TakeClaim,
    UploadShards,
    Withdraw,
    next_step,
)
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore

CALL_S: Final = 20.0
"""Deadline of a call that moves next to no bytes."""
_SLOWEST_BYTES_S: Final = 1024 * 1024
_STEPS: Final = 100
"""An attempt that took so many steps is fighting with somebody: it pauses, like after a failure."""


class Superseded(Exception):
    """A later save of this server took the slot. No failure; never leaves the upload."""


def call_deadline() -> float:
    return time.monotonic() + CALL_S


def write_deadline(size_bytes: int) -> float:
    """When the write of so many bytes is given up, to be tried again (monotonic)."""
    return call_deadline() + size_bytes / _SLOWEST_BYTES_S


Metadata = Literal["absent", "ours", "other"]


@dataclass(slots=True)
class Attempt:
    """Runs in one thread; the shards go up in those of `executor`. `check` raises to stop the attempt."""

    store: Store
    slots: Slots
    claims: ClaimBook
    under_store: UnderStore
    executor: Executor
    slot: Slot
    save: Save
    check: Callable[[], None]
    _manifest: tuple[str, ManifestKind] = ("", "absent")  # version and kind, as last seen
    _metadata: tuple[str, Metadata] = ("", "absent")
    _confirmed: bool = False

    def run(self) -> str:
        """Returns the manifest's version in the under-store once the save is durable.

        Raises Superseded, TransientError (try again), or what ended it for good.
        """
        for _ in range(_STEPS):
            step = next_step(self.save, self._look())
            if isinstance(step, Finish):
                return self._manifest[0]
            if isinstance(step, GiveUp):
                raise step.error
            if isinstance(step, StandBy):
                raise Overloaded(
                    f"{self.save.key} is being uploaded, or written anew, by way of another server of the pool",
                    object=str(self.save.key),
                )
            try:
                self._act(step)
            except AlreadyExists:
                continue  # What was seen has changed since.
        raise Overloaded(f"{self.save.key} keeps changing while it is uploaded", object=str(self.save.key))

    # ---- looking ----

    def _look(self) -> Seen:
        """Versions first, claim last: what is written later over these versions was seen while the claim was ours."""
        self._check()
        self._look_at_manifest()
        self._look_at_metadata()
        seen = self.claims.look(self.under_store, self.save.key, deadline=call_deadline())
        return Seen(
            claim=self._judge_claim(seen),
            is_known=self._is_known(seen),
            manifest=self._manifest[1],
            metadata=self._metadata[1],
            uploaded=frozenset(self.slot.uploaded),
            confirmed=self._confirmed,
        )

    def _judge_claim(self, seen: Sighting | None) -> Literal["ours", "vacant", "peer", "foreign"]:
        decision = self._decide_hold(seen)
        if isinstance(decision, Take):
            return "vacant"
        if isinstance(decision, Wait):
            return "peer"
        return "foreign" if isinstance(decision, Refuse) else "ours"

    def _decide_hold(self, seen: Sighting | None) -> Take | Keep | Wait | Refuse:
        if seen is not None and seen.claim.server_id != self.claims.server_id:
            named = seen.displaced
            if named is not None and self.save.came_after(named.save_id):
                return decide_again(seen, now_s=self.claims.now_s())
        return decide_hold(
            seen,
            key=self.save.key,
            server_id=self.claims.server_id,
            save_id=self.save.save_id,
            committed=True,
            now_s=self.claims.now_s(),
        )

    def _look_at_manifest(self) -> None:
        key = self.save.key.manifest_key
        found = stat_even_empty(self.under_store, key, deadline=call_deadline())
        version = "" if found is None else found.id.version
        if found is None or not found.size:
            self._manifest = (version, "absent")
        elif version != self._manifest[0]:
            small = read_small(self.under_store, key, deadline=call_deadline())
            self._manifest = (
                (version, "absent")
                if small is None
                else (small.version, kind_of_manifest(self.save, small.data))
            )

    def _look_at_metadata(self) -> None:
        key = self.save.key.metadata_key
        found = stat_even_empty(self.under_store, key, deadline=call_deadline())
        version = "" if found is None else found.id.version
        if found is None or not found.size:
            self._metadata = (version, "absent")
        elif version != self._metadata[0]:
            small = read_small(self.under_store, key, deadline=call_deadline())
            ours = small is not None and small.data == self.save.metadata
            self._metadata = (version if small is None else small.version, "ours" if ours else "other")

    # ---- acting; AlreadyExists of any of these means: look again ----

    def _act(self, step: Step) -> None:
        self._check()
        match step:
            case TakeClaim():
                self._take_claim()
            case Withdraw(what="manifest"):
                self._put(self.save.key.manifest_key, b"", replaces=self._manifest[0])
            case Withdraw():
                self._put(self.save.key.metadata_key, b"", replaces=self._metadata[0])
            case UploadShards(names):
                self._upload_shards(names)
            case ConfirmShards():
                self._confirm_shards()
            case PutMetadata():
                self._put(self.save.key.metadata_key, self.save.metadata, replaces=self._metadata[0])
            case PublishManifest():
                self._put(self.save.key.manifest_key, self.save.manifest, replaces=self._manifest[0])

    def _put(self, key: str, data: bytes, *, replaces: str) -> None:
        write_small(self.under_store, key, data, replaces=replaces, deadline=write_deadline(len(data)))

    def _take_claim(self) -> None:
        deadline = call_deadline()
        with self.slot.exclusively(deadline):
            self._check()
            seen = self.claims.look(self.under_store, self.save.key, deadline=deadline)
            decision = self._decide_hold(seen)
            if isinstance(decision, Take):
                is_known = self._is_known(seen)
                if self.save.unbroken and not is_known:
                    self.save = replace(self.save, unbroken=False)
                    self.slots.update_save(self.slot, self.save)
                self.claims.write(
                    self.under_store,
                    self.save.key,
                    save_id=self.save.save_id,
                    # Who may have published in between shows once the claim is taken: until then it isn't said that
                    # this save is what the path holds.
                    state="committed" if is_known else "reserved",
                    writer=self.save.writer,
                    replaces=decision.replaces,
                    deadline=deadline,
                )

    def _is_known(self, seen: Sighting | None) -> bool:
        """Whether nobody can have published since the claim was this save's: it is, or was taken by a writer who has
        not committed.
        """
        if seen is None:
            return False
        mine, over = (self.claims.server_id, self.save.save_id), seen.claim.over
        is_mine = (seen.claim.server_id, seen.claim.save_id) == mine
        return is_mine or (over is not None and (over.server_id, over.save_id) == mine)

    def _upload_shards(self, names: Sequence[str]) -> None:
        """All of them are tried, so that one that fails doesn't hold up the others; then the gravest failure counts."""
        self._confirmed = False
        objects = self.save.objects
        uploads = [self.executor.submit(self._upload_shard, name, objects[name]) for name in names]
        failures = [failure for upload in uploads if (failure := upload.exception()) is not None]
        if failures:
            raise min(failures, key=_mildness)

    def _upload_shard(self, name: str, object: ObjectInfo) -> None:
        self._check()
        key = f"{self.save.key.path}/{name}"  # not the object's own, if it is borrowed
        found = stat_even_empty(self.under_store, key, deadline=call_deadline())
        if not self.claims.holds(
            self.under_store, self.save.key, self.save.save_id, deadline=call_deadline()
        ):
            return  # Seen again, and judged, by the next look.
        replaces = "" if found is None else found.id.version
        written = self._copy_shard(name, key, object.size, replaces) or write_out(
            self.store,
            object,
            self.under_store,
            key,
            replaces=replaces,
            deadline=write_deadline(object.size),
            check=self._check,
        )
        self.slots.note_uploaded(self.slot, self.save, name, written.id.version)

    def _copy_shard(self, name: str, key: str, size: int, replaces: str) -> ObjectInfo | None:
        """A shard that lies in the under-store already, as another save's: the under-store may copy it by itself."""
        source = self.slots.find_uploaded(self.save, name)
        if source is None:
            return None
        return self.under_store.copy(
            ObjectInfo(source, size), key, replaces=replaces, deadline=write_deadline(size)
        )

    def _confirm_shards(self) -> None:
        """Catches whatever else writes to this path: a sleeping server's last write, a person with another tool."""
        for name, version in tuple(self.slot.uploaded.items()):
            key = f"{self.save.key.path}/{name}"
            found = stat_even_empty(self.under_store, key, deadline=call_deadline())
            if found is None or found.id.version != version:
                self.slots.note_uploaded(self.slot, self.save, name, None)
        self._confirmed = True

    def _check(self) -> None:
        self.check()
        if self.slot.save is None or self.slot.save.save_id != self.save.save_id:
            raise Superseded(self.save.save_id)


def _mildness(failure: BaseException) -> int:
    """Whatever ends the attempt for good comes first, then being superseded, then what a retry may mend."""
    if isinstance(failure, AlreadyExists):
        return 3
    if isinstance(failure, TransientError):
        return 2
    return 1 if isinstance(failure, Superseded) else 0
