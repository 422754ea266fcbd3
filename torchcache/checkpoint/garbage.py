"""Planning makes objects by the ten thousand and drops none: looking among them for garbage takes half of its time."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

A_MOMENT_BYTES: Final = 256 * 1024 * 1024
"""Who saves or loads less is done so soon that the collector can wait for all of it."""

_lock = threading.Lock()
_blocks = 0
_was_enabled = False


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Within the block Python's cyclic garbage collector doesn't run by itself, in any thread of the process.

    For moments of Python alone: nothing that waits for a disk or for somebody else belongs inside.
    """
    global _blocks, _was_enabled  # noqa: PLW0603 - the collector is the whole process's
    with _lock:
        if not _blocks:
            _was_enabled = gc.isenabled()
            gc.disable()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks and _was_enabled:
                gc.enable()


class Truce:
    """As `garbage_waits`, for what begins in one call and ends in another: until `end`, or for `limit_s` at most.

    The other call may never come, if something fails in between.
    """

    def __init__(self, limit_s: float) -> None:
        self._waiting = ExitStack()
        self._waiting.enter_context(garbage_waits())
        self._timer = threading.Timer(limit_s, self._waiting.close)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """May be called more than once."""
        self._timer.cancel()
        self._waiting.close()


def _in_child() -> None:
    """The threads that would have let the collector go on aren't here."""
    global _lock, _blocks  # noqa: PLW0603
    _lock = threading.Lock()
    if _blocks and _was_enabled:
        gc.enable()
    _blocks = 0


os.register_at_fork(after_in_child=_in_child)
