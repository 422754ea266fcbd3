"""Which server is asked for what, and who is asked next. Pure."""

from __future__ import annotations

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
from torchcache.placement import placement_key

Order = Callable[[bytes], Sequence[str]]
"""From a placement key to server ids, the owner first."""

Step = Literal["suspect", "next", "wait", "final"]


@dataclass(slots=True)
class Part:
    """The part of extent number `number` that one server is asked for. `turn` counts along `order`."""

    number: int
    extent: Extent
    into: memoryview | None
    order: Sequence[str]
    turn: int = 0
    suspect: bool = False

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


def merge_runs(pieces: Iterable[tuple[Extent, Sequence[str]]]) -> list[tuple[Extent, Sequence[str]]]:
    """Neighbouring pieces of one extent with the same order, joined again."""
    runs: list[tuple[Extent, Sequence[str]]] = []
    for extent, order in pieces:
        if runs and runs[-1][1] == order:
            last = runs[-1][0]
            runs[-1] = (Extent(last.object, last.offset, last.length + extent.length), order)
        else:
            runs.append((extent, order))
    return runs


def placed(extent: Extent, order: Order) -> list[tuple[Extent, Sequence[str]]]:
    """The extent by runs of stripes that go to the same servers in the same order."""
    parts = stripes(extent)
    if len(parts) == 1:
        return [(extent, order(placement_key(extent.object.id, extent.offset)))]
    return merge_runs((part, order(placement_key(part.object.id, part.offset))) for part in parts)


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
