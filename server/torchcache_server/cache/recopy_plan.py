"""When a save that isn't durable wants another copy. Pure.

Most saves are durable long before anybody would look: the copies are only made again for those that wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What was seen of one save. Times are monotonic; `held` servers have it, of `wanted`, as far as was found."""

    began_s: float
    began_bytes: int  # that weren't uploaded then
    wanted: int
    held: int
    short_since_s: float | None = None  # since when it was found to be too few, each time

    def found(self, held: int, now_s: float) -> Watch:
        """So many servers have it by now."""
        if held >= self.wanted:
            return replace(self, held=held, short_since_s=None)
        return replace(
            self, held=held, short_since_s=now_s if self.short_since_s is None else self.short_since_s
        )


def begin(wanted: int, pending_bytes: int, now_s: float) -> Watch:
    """Of a save that is seen for the first time: it is held by as many as it should be until somebody has looked."""
    return Watch(began_s=now_s, began_bytes=pending_bytes, wanted=wanted, held=wanted)


def is_due(watch: Watch, pending_bytes: int, *, now_s: float, grace_s: float) -> bool:
    """Whether to ask who has the save: after the grace, unless the upload, as fast as it was, ends within another."""
    watched_s = now_s - watch.began_s
    if watch.wanted < 2 or watched_s < grace_s:
        return False
    rate = (watch.began_bytes - pending_bytes) / watched_s
    return rate <= 0 or pending_bytes > rate * grace_s


def is_short(watch: Watch, *, now_s: float, grace_s: float) -> bool:
    """Whether too few have had it for the grace: who was only restarted, or cut off, is back by then."""
    return watch.short_since_s is not None and now_s >= watch.short_since_s + grace_s
