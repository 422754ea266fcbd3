"""The claim: one small object in the under-store through which servers agree who writes a path. Pure decisions.

The claim is a register that is only ever changed by conditional writes, so of two servers that want it exactly one
gets it, whatever their clocks say and however long either was asleep:

- *reserved*: a save is being written into some server's pool. That server rewrites the claim every `lease_s` for as
  long as the writer renews its lease. Who finds it unchanged for `DEAD_AFTER_LEASES` leases takes it over. If it was
  taken from a committed save, it says from which: that counts on, and gets the claim back if the writer gives up.
- *committed*: the save is restorable from that server's pool and is being uploaded. Only overwriting takes it over; or,
  once it hasn't been rewritten for as long as a reserved one, a server that has a copy of the same save.
- *deleting*: a checkpoint is being deleted; else as *reserved*.
- *released*: about to be deleted. A delete can't be conditional, so whoever finds it waits as for *reserved*: by then
  the delete is done, or its server is dead.

Time is only ever measured by the observer, on its monotonic clock, as "unchanged since I first saw it".
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from typing import Literal

from torchcache.errors import AlreadyExists
from torchcache_server.cache.saves import SaveKey

DEAD_AFTER_LEASES = 3
_WRITER_CHARACTERS = 200

ClaimState = Literal["reserved", "committed", "released", "deleting"]


@dataclass(frozen=True, slots=True)
class Displaced:
    """A committed save whose claim was taken by one that is being written, and is to overwrite it."""

    server_id: str
    save_id: str
    writer: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim says. `nonce` makes every write of it a new version, so that versions never repeat."""

    server_id: str
    save_id: str
    state: ClaimState
    writer: str  # host and process, for people
    lease_s: float
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    over: Displaced | None = None  # while reserved

    def encode(self) -> bytes:
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Claim:
        """Never fails: what can't be read is somebody's claim of unknown make, reserved by nobody we know."""
        try:
            fields = json.loads(data)
            state = fields["state"]
            return cls(
                server_id=str(fields["server_id"]),
                save_id=str(fields["save_id"]),
                state=state if state in ("committed", "released", "deleting") else "reserved",
                writer=str(fields["writer"])[:_WRITER_CHARACTERS],
                lease_s=min(max(float(fields["lease_s"]), 0.0), 3600.0),
                nonce=str(fields["nonce"]),
                over=_displaced_of(fields.get("over")) if state == "reserved" else None,
            )
        except (ValueError, TypeError, KeyError):
            return cls("", "", "reserved", "unknown", 10.0, "")


def _displaced_of(fields: object) -> Displaced | None:
    if not isinstance(fields, dict):
        return None
    return Displaced(
        str(fields["server_id"]), str(fields["save_id"]), str(fields["writer"])[:_WRITER_CHARACTERS]
    )


@dataclass(frozen=True, slots=True)
class Sighting:
    """A claim as it was last seen: its version, and since when (monotonic) it has not changed."""

    claim: Claim
    version: str
    since_s: float

    def is_committed_by_another(self, server_id: str) -> bool:
        return self.claim.state == "committed" and self.claim.server_id != server_id

    @property
    def displaced(self) -> Displaced | None:
        """The committed save that a writer passes over who takes the claim to overwrite it."""
        if self.claim.state == "committed":
            return Displaced(self.claim.server_id, self.claim.save_id, self.claim.writer)
        return self.claim.over

    @property
    def dead_at_s(self) -> float:
        """From when on whoever wrote it is taken for dead, unless it changes before."""
        return self.since_s + DEAD_AFTER_LEASES * self.claim.lease_s


@dataclass(frozen=True, slots=True)
class Take:
    """Write the claim, if its version is still `replaces` ("": if there is none)."""

    replaces: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Nothing to write: this server's claim covers the newcomer."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at `until_s` (monotonic) at the latest."""

    until_s: float
    holder: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Somebody else has the path."""

    error: AlreadyExists


def decide_reserve(
    seen: Sighting | None,
    *,
    key: SaveKey,
    server_id: str,
    uploading: str = "",
    overwrite: bool,
    renewed: bool,
    now_s: float,
    save_id: str | None = None,
) -> Take | Keep | Wait | Refuse:
    """What a server does that wants to reserve a path of which no lease is alive in the server itself.

    `uploading`: the id of a committed save of the path, in this server, that isn't durable yet: its claim must stay.
    `renewed`: the claim changed, but not its save, while the caller waited for it. `save_id`: the save's that wants the
    path, whose writer may have asked another server before, and got no answer.
    """
    if seen is None:
        return Take("")
    claim = seen.claim
    if claim.server_id == server_id:
        return Keep() if claim.save_id == uploading else Take(seen.version)
    committed = seen.displaced
    if committed is not None and committed.server_id != server_id and not overwrite:
        return Refuse(not_uploaded(key, committed))
    if claim.state == "committed":
        return Take(seen.version)
    # Of the same save: the other server hears no more of it.
    goes_on_here = claim.save_id == save_id and claim.state == "reserved"
    if renewed and not goes_on_here:
        return Refuse(live_writer(key, claim.writer))
    dead = goes_on_here or now_s >= seen.dead_at_s
    return Take(seen.version) if dead else Wait(seen.dead_at_s, claim.writer)


def decide_hold(
    seen: Sighting | None, *, key: SaveKey, server_id: str, save_id: str, committed: bool, now_s: float
) -> Take | Keep | Wait | Refuse:
    """What a server does that holds a path already, and goes on with save `save_id`: to commit or to upload it.

    Another server that has a copy may be uploading the same save, and is waited for while it lives. So is, once the
    save is `committed`, one where a later save is being written: that takes its place only by its own commit, to which
    it may never come. A claim that vanished may be taken again: whoever takes it now had to find it absent, and so
    can't have been passed over. What lies at the path is looked at after this.
    """
    if seen is None:
        return Take("")
    claim = seen.claim
    if claim.over is not None and save_id not in (claim.save_id, claim.over.save_id):
        return Refuse(taken_over(key, claim.over.writer))  # that save was committed later than this one
    if claim.server_id != server_id:
        is_open = committed and claim.state in ("reserved", "released")
        if claim.state == "deleting" or (claim.save_id != save_id and not is_open):
            return Refuse(taken_over(key, claim.writer))
        return Take(seen.version) if now_s >= seen.dead_at_s else Wait(seen.dead_at_s, claim.server_id)
    if claim.save_id == save_id and claim.state == "committed":
        return Keep()
    return Take(seen.version)


def decide_again(seen: Sighting, *, now_s: float) -> Take | Wait:
    """What a server does whose save was committed in place of the one that another server's claim names.

    That commit couldn't be told, and the claim goes on as before, or was taken from a writer that seemed dead. It is
    overwritten like any committed save's; who is to overwrite it, too, may be alive.
    """
    is_free = seen.claim.state == "committed" or now_s >= seen.dead_at_s
    return Take(seen.version) if is_free else Wait(seen.dead_at_s, seen.claim.server_id)


def not_uploaded(key: SaveKey, save: Displaced) -> AlreadyExists:
    return AlreadyExists(
        f"{key} holds a checkpoint that server {save.server_id} has not uploaded yet (written by {save.writer}): pass "
        "overwrite=True or another path",
        object=str(key),
    )


def live_writer(key: SaveKey, writer: str) -> AlreadyExists:
    return AlreadyExists(
        f"another save of {key} is being written by {writer}: let it finish, or save to another path",
        object=str(key),
    )


def taken_over(key: SaveKey, writer: str) -> AlreadyExists:
    return AlreadyExists(
        f"the save of {key} was superseded: {writer} took the path over after this save's lease had run out or with "
        "overwrite=True",
        object=str(key),
    )


def already_there(key: SaveKey, what: str) -> AlreadyExists:
    return AlreadyExists(f"{key} already holds {what}: pass overwrite=True or another path", object=str(key))
