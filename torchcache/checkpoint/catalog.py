"""Which checkpoints there are, in the pool and in storage. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torchcache.errors import CheckpointError, NotCommitted, ObjectNotFound
from torchcache.model import ObjectId, ObjectInfo
from torchcache.save_names import CLAIM_NAME, MANIFEST_NAME, METADATA_NAME

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

State = Literal["saving", "cached", "replicated", "durable", "failed", "stock", "unfinished"]

_STATES: Final[dict[str, State]] = {"reserved": "saving", "durable": "durable", "failed": "failed"}

_DATA = ".distcp"


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, or with `part` what one rank committed for itself.

    "saving": not committed yet. "cached": restorable from the pool, where one server has it. "replicated": `replicas`
    servers have it. "durable": restorable from storage. "failed": restorable from the pool, and its upload met an
    error. "stock": in storage, saved by torch without torchcache. "unfinished": in storage, being written or deleted by
    another pool, or left so. Sizes are bytes, 0 where they are not known. `waiting_s`: how long ago a save
    was committed that storage doesn't have yet, by this machine's clock.
    """

    uri: str
    part: str
    state: State
    save_id: str = ""
    bytes: int = 0
    pending_bytes: int = 0
    replicas: int = 0
    error: str = ""
    waiting_s: float = 0.0


def state_of(save: SaveInfo) -> State:
    """How far a save has come."""
    return _STATES.get(save.state, "replicated" if save.replicas > 1 else "cached")


def list_checkpoints(pool: Pool, uri: str) -> list[Checkpoint]:
    """The checkpoints at and below `uri`, by URI and part. Raises ObjectNotFound if its bucket or folder is missing."""
    folder = uri.rstrip("/")
    saves = {(save.path, save.part): save for save in [*_save_at(pool, folder), *pool.list_saves(folder)]}
    try:
        found = _stored(pool, pool.list(folder + "/"))
    except ObjectNotFound:
        if not saves:
            raise
        found = {}
    for save in saves.values():
        where = pool.uri(ObjectId(save.store, save.path, ""))
        stored = found.get((where, save.part))
        found[where, save.part] = Checkpoint(
            uri=where,
            part=save.part,
            state=state_of(save),
            save_id=save.save_id,
            bytes=save.total_bytes or (stored.bytes if stored else 0),
            pending_bytes=save.pending_bytes,
            replicas=0 if save.state in ("reserved", "durable") else save.replicas,
            error=str(save.error) if save.error else "",
            waiting_s=_waiting_s(save),
        )
    return [found[key] for key in sorted(found)]


def _waiting_s(save: SaveInfo) -> float:
    if save.state not in ("committed", "failed") or not save.committed_unix_s:
        return 0.0
    return max(0.0, time.time() - save.committed_unix_s)


def committed_parts(pool: Pool, uri: str) -> list[SaveInfo]:
    """The committed save at `uri`, or those of its parts, with their manifests.

    Raises NotCommitted if there is none, and CheckpointError if there is one of torch's own, without a manifest.
    """
    store, path = pool.resolve(uri.rstrip("/"))
    if whole := [save for save in _save_at(pool, uri.rstrip("/")) if save.state != "reserved"]:
        return whole
    here = [c for c in list_checkpoints(pool, uri) if pool.resolve(c.uri) == (store, path)]
    parts = [c.part for c in here if c.part and c.state not in ("saving", "stock")]
    if parts:
        return [pool.get_save(store, path, part) for part in parts]
    if any(c.state == "stock" for c in here):
        raise CheckpointError(
            f"{uri} was saved by torch without torchcache: there is no manifest with checksums to verify it against",
            object=uri,
        )
    raise NotCommitted(f"there is no committed checkpoint at {uri}", object=uri)


def _save_at(pool: Pool, uri: str) -> list[SaveInfo]:
    store, path = pool.resolve(uri)
    if not path:  # the root of an under-store is no checkpoint
        return []
    try:
        return [pool.get_save(store, path)]
    except NotCommitted:
        return []


def _stored(pool: Pool, objects: Iterable[ObjectInfo]) -> dict[tuple[str, str], Checkpoint]:
    """Checkpoints that lie in storage, by URI and part, from all objects there."""
    found: dict[tuple[str, str], Checkpoint] = {}
    data_bytes: dict[str, int] = {}
    claimed: set[tuple[str, str]] = set()
    for object in objects:
        folder, _, name = pool.uri(object.id).rpartition("/")
        if name.endswith(_DATA):
            data_bytes[folder] = data_bytes.get(folder, 0) + object.size
        if name.endswith(CLAIM_NAME):
            claimed.add((folder, name.removesuffix(CLAIM_NAME)))
        for suffix in (MANIFEST_NAME, METADATA_NAME):
            if name.endswith(suffix) and object.size:  # an empty one was withdrawn
                part = name.removesuffix(suffix)
                one = found.setdefault((folder, part), Checkpoint(uri=folder, part=part, state="stock"))
                if suffix == MANIFEST_NAME:
                    one.state = "durable"
    for folder, part in claimed - found.keys():
        found[folder, part] = Checkpoint(uri=folder, part=part, state="unfinished")
    for (folder, part), one in found.items():
        if not part:
            one.bytes = data_bytes.get(folder, 0)
    return found
