"""An end of the server that was asked for by a call: how it is begun, and what those who asked are told of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from torchcache.errors import ConfigurationError

MAX_WAIT_S: Final = 5.0
"""A call holds a thread while it waits."""

LINGER_S: Final = 5.0
"""How long the end waits for who asked for it to come and hear how it ended."""


class Draining:
    """The drain that calls begin and wait for. Thread-safe."""

    def __init__(self, begin: Callable[[], object] | None = None, *, instead: str = "") -> None:
        """`begin` has the server drain, and its process end; None where that isn't for a call, with what to do
        `instead`."""
        self._begin = begin
        self._instead = instead
        self._changed = threading.Condition()
        self._left: list[str] | None = None
        self._is_asked_for = False
        self._is_told = False

    def begin(self) -> None:
        """Has the server drain; again is fine. Raises ConfigurationError where a call can't."""
        if self._begin is None:
            raise ConfigurationError(f"this server can't be drained by a call: {self._instead}")
        self._is_asked_for = True
        self._begin()

    def done(self, left: Sequence[str]) -> None:
        """All is finished that will be; `left`: URIs of what isn't in the under-store.

        Returns once somebody was told, if a call has begun it: who asks every now and then is elsewhere just now.
        """
        with self._changed:
            self._left = list(left)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_told or not self._is_asked_for, LINGER_S)

    def wait(self, timeout_s: float) -> list[str] | None:
        """What is left, once the server has drained; None if it hasn't within `timeout_s`, at most `MAX_WAIT_S`."""
        with self._changed:
            self._changed.wait_for(lambda: self._left is not None, min(max(timeout_s, 0.0), MAX_WAIT_S))
            if self._left is None:
                return None
            self._is_told = True
            self._changed.notify_all()
            return list(self._left)
