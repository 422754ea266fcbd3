"""Which segments make room for others. Pure.

Epochs are cyclic: each pass touches every chunk of a dataset once. So within one dataset a resident chunk never yields
to another of the same dataset; least-recently-used would throw out just what comes next, and hit nothing. Among
datasets the one used longest ago yields. Data that is pinned, or not yet in the under-store, never does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment as eviction sees it. `last_used` orders namespaces: larger is more recent."""

    segment: int
    namespace: str
    bytes: int
    last_used: int
    protected: bool  # pinned, kept, or being written to


def choose_victims(
    candidates: Iterable[Candidate], *, namespace: str | None, need_bytes: int
) -> list[int] | None:
    """Segments whose going gives at least `need_bytes` to `namespace` (None: to nobody), in the order they should go.

    Takes no more of them than needed. None if there isn't enough that may go: then nothing should, in vain.
    """
    able = [c for c in candidates if not c.protected and c.namespace != namespace]
    victims: list[int] = []
    for candidate in sorted(able, key=lambda c: (c.last_used, c.segment)):
        if need_bytes <= 0:
            break
        victims.append(candidate.segment)
        need_bytes -= candidate.bytes
    return victims if need_bytes <= 0 else None
