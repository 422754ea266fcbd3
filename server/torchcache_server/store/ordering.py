"""The order in which a dataset will be read, where somebody knows it. No I/O."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from torchcache_server.store.eviction import NEVER


class Order(Protocol):
    """What eviction asks of an order. Thread-safe. Positions count reads; `now` is where reading is."""

    @property
    def now(self) -> int: ...

    def __bool__(self) -> bool:
        """Whether anything is still to be read."""

    def used(self, key: bytes) -> None:
        """The chunk was read."""

    def next_use(self, key: bytes) -> int:
        """Position of its next use; NEVER if there is none."""

    def next_uses(self, keys: Sequence[bytes]) -> Sequence[int]:
        """`next_use` of many."""


class ReadingOrder:
    """For each chunk the positions in the order that are still to come.

    Readers work in parallel, so chunks needn't be read just in this order: each use takes the next of its own
    positions, and `now` is the farthest that was reached. Thread-safe.
    """

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._ahead: dict[bytes, deque[int]] = {}
        self.now = 0
        self._lock = threading.Lock()
        for position, key in enumerate(keys):
            self._ahead.setdefault(key, deque()).append(position)

    def __bool__(self) -> bool:
        return bool(self._ahead)

    def used(self, key: bytes) -> None:
        """The chunk was read."""
        with self._lock:
            ahead = self._ahead.get(key)
            if ahead is None:
                return
            self.now = max(self.now, ahead.popleft())
            if not ahead:
                del self._ahead[key]

    def next_use(self, key: bytes) -> int:
        """Position of its next use; NEVER if there is none."""
        with self._lock:
            ahead = self._ahead.get(key)
            return ahead[0] if ahead else NEVER

    def next_uses(self, keys: Sequence[bytes]) -> list[int]:
        """`next_use` of many."""
        return [self.next_use(key) for key in keys]
