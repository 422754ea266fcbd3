"""Planning makes objects by the ten thousand and drops none: looking among them for garbage takes half of its time."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

A_MOMENT_BYTES: Final = 256 * 1024 * 1024
"""Who saves or loads less is done so soon that the collector can wait for all of it."""

MANY_ITEMS: Final = 1000
"""From here on planning is long enough for the collector to notice."""

CALM_S: Final = 5.0
"""The collector waits no longer than this for a save or a load of many items."""

_lock = threading.RLock()  # whoever ends a truce may do so while an object goes, wherever that is
_blocks = 0
_was_enabled = False
_forks = 0


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Within the block Python's cyclic garbage collector doesn't run by itself, in any thread of the process.

    For moments of Python alone: nothing that waits for a disk or for somebody else belongs inside.
    """
    global _blocks, _was_enabled  # noqa: PLW0603 - the collector is the whole process's
    with _lock:
        forks = _forks
        if not _blocks:
            _was_enabled = gc.isenabled()
            gc.disable()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            if forks == _forks:  # else the child has let the collector go on already
                _blocks -= 1
                if not _blocks and _was_enabled:
                    gc.enable()


class Truce:
    """As `garbage_waits`, for what begins in one call and ends in another: until `end`, or for `limit_s` at most.

    The other call may never come, if something fails in between.
    """

    def __init__(self, limit_s: float) -> None:
        self._waiting = garbage_waits()
        self._waiting.__enter__()
        self._ending = threading.Lock()  # taken by the first who ends it
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """May be called more than once."""
        self._timer.cancel()
        self._end()

    def end_with(self, value: object) -> None:
        """Ends it when `value` goes: what was made with it has gone then too, and isn't looked at any more."""
        weakref.finalize(value, self.end).atexit = False

    def _end(self) -> None:
        if self._ending.acquire(blocking=False):
            self._waiting.__exit__(None, None, None)


def _in_child() -> None:
    """The threads that would have let the collector go on aren't here."""
    global _lock, _blocks, _forks  # noqa: PLW0603
    _lock = threading.RLock()
    if _blocks and _was_enabled:
        gc.enable()
    _blocks = 0
    _forks += 1


os.register_at_fork(after_in_child=_in_child)
