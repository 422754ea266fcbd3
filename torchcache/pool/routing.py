"""Which server is asked for what, and who is asked next. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotResident,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.model import STRIPE_BYTES, UNKNOWN_SIZE, Extent, ObjectInfo
from torchcache.placement import Placement, placement_key

Order = Callable[[bytes], Sequence[str]]
"""From a placement key to server ids, the owner first."""

Runs = list[tuple[Extent, Sequence[str]]]
"""Parts of an extent, in order, each with the servers to ask for it."""

Step = Literal["suspect", "next", "wait", "final"]


@dataclass(slots=True)
class Part:
    """The part of extent number `number` that one server is asked for. `turn` counts along `order`.

    Parts of different `stream` are asked for side by side. `damage` is what a server said that has it, damaged: it
    isn't absent because the next ones don't have it.
    """

    number: int
    extent: Extent
    into: memoryview | None
    order: Sequence[str]
    turn: int = 0
    suspect: bool = False
    damage: IntegrityError | None = None
    stream: int = 0

    @property
    def server(self) -> str:
        return self.order[self.turn]


def check_extents(extents: Iterable[Extent]) -> None:
    """Raises ConfigurationError unless each lies within its object."""
    for extent in extents:
        info, start, length = extent
        if start or length != -1:  # else it is all of the object: by far the most common
            _check_range(info, start, length)


def _check_range(info: ObjectInfo, start: int, length: int) -> None:
    size = info.size
    known = size != UNKNOWN_SIZE
    if start < 0 or length < -1 or (known and (start > size or start + max(length, 0) > size)):
        span = f"{length} bytes from {start}" if length >= 0 else f"the bytes from {start}"
        raise ConfigurationError(
            f"{span} were asked of an object of {size if known else 'unknown'} bytes",
            object=str(info.id),
        )


def stripes(extent: Extent) -> list[Extent]:
    """The extent, cut where its stripes end; whole if its object is placed whole or its size is unknown."""
    info = extent.object
    if info.size <= STRIPE_BYTES or info.id.is_sample or info.id.is_save:  # UNKNOWN_SIZE is small too
        return [extent]
    start, end = extent.offset, extent.end
    if end - start <= 0:
        return [extent]
    if start // STRIPE_BYTES == (end - 1) // STRIPE_BYTES:
        return [extent]
    cuts = [start, *range(start - start % STRIPE_BYTES + STRIPE_BYTES, end, STRIPE_BYTES), end]
    return [Extent(info, a, b - a) for a, b in pairwise(cuts)]


def merge_runs(pieces: Iterable[tuple[Extent, Sequence[str]]]) -> Runs:
    """Neighbouring pieces of one extent with the same order, joined again."""
    runs: Runs = []
    for extent, order in pieces:
        if runs and runs[-1][1] == order:
            last = runs[-1][0]
            runs[-1] = (Extent(last.object, last.offset, last.length + extent.length), order)
        else:
            runs.append((extent, order))
    return runs


def placed(extent: Extent, order: Order) -> Runs:
    """The extent by runs of stripes that go to the same servers in the same order."""
    parts = stripes(extent)
    if len(parts) == 1:
        return [(extent, order(placement_key(extent.object.id, extent.offset)))]
    return merge_runs((part, order(placement_key(part.object.id, part.offset))) for part in parts)


def main_owner(extent: Extent, placement: Placement) -> str:
    """The id of the server that owns the most bytes of the extent."""
    parts = stripes(extent)
    if len(parts) == 1:
        return placement.owner(placement_key(extent.object.id, extent.offset))
    shares: Counter[str] = Counter()
    for part in parts:
        shares[placement.owner(placement_key(part.object.id, part.offset))] += part.length
    return min(shares, key=lambda server: (-shares[server], server))


def streams(
    runs: Runs, least_bytes: int, most: Callable[[str], int]
) -> list[tuple[Extent, Sequence[str], int]]:
    """The runs with the stream that each is read by, from 0, cut where stripes begin.

    What one server has of the extent is shared by up to `most(server)` streams, if there are at least `least_bytes` for
    each.
    """
    shares: Counter[str] = Counter()
    for extent, order in runs:
        shares[order[0]] += extent.end - extent.offset
    before: Counter[str] = Counter()
    cut: list[tuple[Extent, Sequence[str], int]] = []
    for extent, order in runs:
        server = order[0]
        count = min(most(server), shares[server] // least_bytes)
        if count < 2:
            cut.append((extent, order, 0))
            continue
        share = -(-shares[server] // count)
        for stripe in stripes(extent):
            stream = before[server] // share
            before[server] += stripe.length
            last = cut[-1] if cut and stripe.offset > extent.offset else None
            if last is not None and last[2] == stream:
                joined = Extent(extent.object, last[0].offset, last[0].length + stripe.length)
                cut[-1] = (joined, order, stream)
            else:
                cut.append((stripe, order, stream))
    return cut


def next_step(part: Part, error: TorchCacheError) -> Step:
    """What to do about a part that failed: ask the same server to prove its disk, ask the next, wait, or give up.

    The bytes of a save are asked of every server before they count as absent: the owner may have changed since.
    """
    last = part.turn + 1 >= len(part.order)
    if isinstance(error, IntegrityError):
        return "suspect" if not part.suspect else "final" if last else "next"
    if isinstance(error, ServerUnavailable):
        return "wait" if last else "next"
    if isinstance(error, TransientError):
        return "wait"
    if isinstance(error, NotResident) and part.extent.object.id.is_save and not last:
        return "next"
    return "final"


def advance(part: Part, step: Step) -> None:
    """Takes the step; waiting starts again at the owner."""
    if step == "suspect":
        part.suspect = True
    elif step == "next":
        part.turn += 1
        part.suspect = False
    elif step == "wait":
        part.turn = 0
        part.suspect = False
