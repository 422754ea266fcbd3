"""What becomes of a copy of another server's save. Pure.

A server that holds a copy isn't told how the save goes on; it looks at the path's claim and manifest, in this order, so
that a save which ends in between is seen as durable, never as gone. The claim alone decides which of several saves of a
path is the one, and through it at most one server at a time uploads.
"""

from __future__ import annotations

from typing import Literal

from torchcache_server.cache.claims import Sighting, Take
from torchcache_server.cache.saves import Copy, ManifestKind

Verdict = Literal["durable", "current", "open", "gone"]
"""durable: the under-store has the save. current: it is what the path holds, though the under-store hasn't it yet.
open: its writer is still at it. gone: nobody may want it any more."""


def judge(copy: Copy, seen: Sighting | None, manifest: ManifestKind) -> Verdict:
    """What the copy is good for, by the claim and then the manifest at its path."""
    if manifest == "ours":
        return "durable"
    claim = None if seen is None else seen.claim
    if claim is None or claim.save_id != copy.save.save_id:
        return _judge_by_another(copy, seen, manifest)
    if claim.state == "committed":
        return "current"
    if claim.state == "reserved":
        # The owner may have committed while it could not reach the under-store; then its writer has told. Or it takes
        # the path again, and finds that another has published there.
        return "current" if copy.confirmed and manifest != "other" else "open"
    return "gone"


def _judge_by_another(copy: Copy, seen: Sighting | None, manifest: ManifestKind) -> Verdict:
    """By a claim for another save, or none."""
    claim = None if seen is None else seen.claim
    # Its owner couldn't tell the under-store of the commit that took the place of the one that is named.
    named = None if seen is None else seen.displaced
    is_behind = named is not None and copy.save.came_after(named.save_id)
    if claim is not None and claim.over is not None and not is_behind:
        return "current" if claim.over.save_id == copy.save.save_id else "gone"
    # Given up, or published over. But whoever replaces a save may die before it commits, and its claim is released:
    # better to bring back what was deleted while this server was down than to lose what was acknowledged.
    is_open = is_behind or claim is None or claim.state in ("reserved", "released")
    if copy.confirmed and is_open and manifest != "other":
        return "current"
    return "open" if is_behind else "gone"


def decide_takeover(
    copy: Copy, verdict: Verdict, seen: Sighting | None, *, server_id: str, now_s: float
) -> Take | None:
    """Whether to upload the save from here: when the server that should has been silent for too long."""
    if verdict != "current":
        return None
    if seen is None:
        return Take("")
    ours = seen.claim.server_id == server_id and seen.claim.save_id == copy.save.save_id
    return Take(seen.version) if ours or now_s >= seen.dead_at_s else None


def is_left_open(seen: Sighting | None, *, now_s: float, patience_s: float) -> bool:
    """Whether the writer of an open save, and its server, have been silent for so long that nobody will commit it."""
    return seen is not None and now_s >= seen.dead_at_s + patience_s
