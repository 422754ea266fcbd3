"""Which segments make room for others. Pure.

Epochs are cyclic: each pass touches every chunk of a dataset once. So within one dataset a resident chunk never yields
to another of the same dataset; least-recently-used would throw out just what comes next, and hit nothing. Among
datasets those of lower priority yield first, and of equal ones the one used longest ago. Data that is pinned, or not
yet in the under-store, never does.

Where the order of reading is known, what is needed farthest in the future yields, within the dataset too (Belady's
rule), and a chunk that is needed later than all of that is not kept at all. What yields is a segment: the one with the
most bytes among the farthest. What it holds beside them is moved, and so a segment that would have to be moved almost
whole doesn't yield.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

NEVER: Final = 1 << 62
"""The next use of what isn't needed any more: farther than all others."""

SLACK_SEGMENTS: Final = 10
"""How much counts as the farthest, in segments. More is less moving, and less like Belady."""

SLACK: Final = 0.125
"""The same, as the most of what a dataset holds: of a few segments ten would be all."""

_WORTH: Final = 0.7
"""A chunk is kept if its next use is at most this part of the way to the farthest."""

_MOST_MOVED: Final = 0.9
"""A segment of which a larger part would have to be moved doesn't yield."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment as eviction sees it. `last_used` orders namespaces: larger is more recent."""

    segment: int
    namespace: str
    bytes: int
    last_used: int
    protected: bool  # pinned, kept, or being written to
    priority: int = 0


def choose_victims(
    candidates: Iterable[Candidate], *, namespace: str | None, need_bytes: int, priority: int | None = None
) -> list[int] | None:
    """Segments whose going gives at least `need_bytes` to `namespace` (None: to nobody), in the order they should go.

    `priority` is the namespace's: nothing of a higher one yields to it. Takes no more segments than needed. None if
    there isn't enough that may go: then nothing should, in vain.
    """
    able = [
        c
        for c in candidates
        if not c.protected and c.namespace != namespace and (priority is None or c.priority <= priority)
    ]
    victims: list[int] = []
    for candidate in sorted(able, key=lambda c: (c.priority, c.last_used, c.segment)):
        if need_bytes <= 0:
            break
        victims.append(candidate.segment)
        need_bytes -= candidate.bytes
    return victims if need_bytes <= 0 else None


class Held(NamedTuple):
    """A record of a segment, as eviction by order sees it. `next_use` is a position in the order, or NEVER."""

    key: bytes
    bytes: int
    next_use: int


class Yielding(NamedTuple):
    """A segment that yields, and the keys of what is to be moved out of it before."""

    segment: int
    stay: frozenset[bytes]


def choose_yielding(
    segments: Mapping[int, Sequence[Held]],
    *,
    tails: Mapping[int, int],
    now: int,
    next_use: int,
    slack_bytes: int,
) -> Yielding | None:
    """The segment of one dataset that yields to a chunk with `next_use`; None if the chunk should pass through.

    `tails` are the bytes each segment takes, `now` is where reading is in its order, `slack_bytes` how much of what is
    given counts as the farthest.
    """
    far = sorted((held.next_use, held.bytes) for records in segments.values() for held in records)
    threshold = 0
    while far and slack_bytes > 0:
        threshold, size = far.pop()
        slack_bytes -= size
    if next_use - now >= _WORTH * (threshold - now):
        return None
    best, best_moved = None, 1.0
    for number, records in segments.items():
        moved = sum(held.bytes for held in records if held.next_use < threshold) / max(1, tails[number])
        if moved < best_moved:
            best, best_moved = number, moved
    if best is None or best_moved > _MOST_MOVED:
        return None
    return Yielding(best, frozenset(held.key for held in segments[best] if held.next_use < threshold))
