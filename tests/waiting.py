"""How tests wait for what other processes and threads do: until it holds, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 150.0
"""More than a starved machine needs; a wait that takes it all is a failure."""


def until(
    holds: Callable[[], object], what: str = "what was waited for", *, seconds: float = PATIENCE_S
) -> None:
    """Returns once `holds()` is true; AssertionError if it isn't within `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.02)
