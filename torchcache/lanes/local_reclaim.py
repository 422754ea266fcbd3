"""How to know that pages of mapped files are still in memory.

Touching a page that isn't stops every Python thread until the disk has answered, and ends the process by SIGBUS if the
disk can't. To have the kernel look at each record's pages costs as much as to verify it. So that is done once, and
again after it took pages from anybody: it says how many it took since it started, of all there are.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Final

LOOK_S: Final = 0.1
"""How often the kernel is asked at most."""

SHARE: Final = 64
"""Once one page in so many has been taken, any may have been; the kernel takes those first that nobody used lately."""

_COUNTS: Final = re.compile(
    rb"^(nr_inactive_file|nr_active_file|pgsteal_anon|pgsteal_file|drop_pagecache) (\d+)$", re.MULTILINE
)


class Reclaim:
    """Tells whether the kernel took pages from anybody on this machine. Not thread-safe."""

    def __init__(self, path: str = "/proc/vmstat") -> None:
        self._path = Path(path)
        self._before: tuple[int, int] | None = None
        self._looked_s = float("-inf")

    def happened(self) -> bool:
        """Whether it took a telling share since the last call that said so; always, where it doesn't tell."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        try:
            counts = {name: int(count) for name, count in _COUNTS.findall(self._path.read_bytes())}
            held = counts[b"nr_inactive_file"] + counts[b"nr_active_file"]
            taken, dropped = counts[b"pgsteal_file"] + counts[b"pgsteal_anon"], counts[b"drop_pagecache"]
        except (OSError, KeyError):
            return True
        if self._before is not None:
            taken_before, dropped_before = self._before
            if dropped == dropped_before and (taken - taken_before) * SHARE <= held:
                return False
        self._before = (taken, dropped)
        return True
