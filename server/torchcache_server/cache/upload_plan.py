"""What an upload does next, given what lies at the path. Pure.

The order is the point. Nobody may ever find a metadata file or a manifest beside shards that aren't all its own:

1. the claim says that the path is this save's (it alone decides between servers);
2. what an overwritten checkpoint left as manifest, then as metadata, is withdrawn;
3. the shards go up; 4. all of them are seen to lie there still; 5. metadata; 6. manifest.

Every step looks again before it acts, and every write is conditional on what was seen, so a step may be repeated after
a crash, a lost answer or an hour without network, by this server or after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchcache.errors import AlreadyExists
from torchcache_server.cache.claims import already_there
from torchcache_server.cache.saves import ManifestKind, Save


@dataclass(frozen=True, slots=True)
class Seen:
    """What lies at the path.

    `claim`: "peer" is of a server that has a copy of the same save, and uploads it, or where a later save is being
    written, and not committed yet. `metadata` other than ours tells nothing about whose it is. `uploaded`: the shards
    this save is known to have put there. `confirmed`: they were all seen to lie there still, behind the last of their
    uploads. `is_known`: nobody can have published since the claim was this save's.
    """

    claim: Literal["ours", "vacant", "peer", "foreign"]
    manifest: ManifestKind
    metadata: Literal["absent", "ours", "other"]
    uploaded: frozenset[str]
    confirmed: bool
    is_known: bool


@dataclass(frozen=True, slots=True)
class TakeClaim:
    """Make the claim ours: it isn't there, or doesn't say yet that the save is committed."""


@dataclass(frozen=True, slots=True)
class StandBy:
    """It is another server's turn: look again later."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Replace what was seen by an empty object."""

    what: Literal["manifest", "metadata"]


@dataclass(frozen=True, slots=True)
class UploadShards:
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConfirmShards:
    pass


@dataclass(frozen=True, slots=True)
class PutMetadata:
    pass


@dataclass(frozen=True, slots=True)
class PublishManifest:
    """The commit point of the under-store."""


@dataclass(frozen=True, slots=True)
class Finish:
    """It is durable."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    error: AlreadyExists


Step = (
    TakeClaim
    | StandBy
    | Withdraw
    | UploadShards
    | ConfirmShards
    | PutMetadata
    | PublishManifest
    | Finish
    | GiveUp
)


def next_step(save: Save, seen: Seen) -> Step:
    """The one thing to do now for a committed save that isn't durable yet."""
    if seen.manifest == "ours":
        return Finish()
    if seen.claim == "foreign":
        return GiveUp(
            AlreadyExists(
                f"the save {save.save_id} of {save.key} was superseded: another server took the path over before "
                "this save had been uploaded",
                object=str(save.key),
            )
        )
    if seen.manifest == "other" and not (save.overwrite and save.unbroken and seen.is_known):
        return GiveUp(already_there(save.key, "another checkpoint, published since this save was reserved"))
    if seen.claim == "vacant":
        return TakeClaim()
    if seen.claim == "peer":
        return StandBy()
    missing = tuple(name for name, _ in save.files if name not in seen.uploaded)
    return _clear_the_path(save, seen, missing) or _put(seen, missing)


def _clear_the_path(save: Save, seen: Seen, missing: tuple[str, ...]) -> Step | None:
    if seen.manifest in ("replaceable", "other"):
        # Other: a server that lost the claim to this save while it was publishing has ended that later.
        return Withdraw("manifest")
    if seen.metadata == "other":
        if not save.overwrite:
            return GiveUp(already_there(save.key, "metadata that another program wrote since"))
        return Withdraw("metadata")
    if seen.metadata == "ours" and missing:
        # Of an earlier attempt, or equal to the old checkpoint's: either way it must not stand beside other shards.
        return Withdraw("metadata")
    return None


def _put(seen: Seen, missing: tuple[str, ...]) -> Step:
    if missing:
        return UploadShards(missing)
    if not seen.confirmed:
        return ConfirmShards()
    if seen.metadata == "absent":
        return PutMetadata()
    return PublishManifest()
