"""Waiting for what only the garbage collector frees."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 60.0


def until_collected(gone: Callable[[], bool]) -> bool:
    """Collects until it is `gone`; whether it went in time.

    Once may not do: another thread may hold a last reference still, and while another collects a collection does
    nothing.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        gc.collect()
        if gone():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
