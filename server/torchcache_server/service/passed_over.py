"""Which servers clients ask after all others, by what they say with their reads: people are to see it here."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

KEPT_S: Final = 60.0
"""How long the word of a client that reads no more is kept."""

MAX_CLIENTS: Final = 4096
"""Remembered; of more, those who spoke first are forgotten."""


class PassedOver:
    """Thread-safe. A client is one connection's end, and what it said last counts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, tuple[tuple[str, str], ...]]] = {}

    def heard(self, client: str, servers: Sequence[tuple[str, str]]) -> None:
        """`client` passes these servers over, each for its reason, and no others."""
        if not servers and client not in self._said:
            return
        with self._lock:
            self._said.pop(client, None)
            if servers:
                self._said[client] = (self._clock(), tuple(servers))
                while len(self._said) > MAX_CLIENTS:
                    del self._said[next(iter(self._said))]

    def counts(self) -> dict[tuple[str, str], int]:
        """How many clients pass a server over for a reason, by (id, reason)."""
        since = self._clock() - KEPT_S
        with self._lock:
            self._said = {client: said for client, said in self._said.items() if said[0] >= since}
            return dict(Counter(one for _, servers in self._said.values() for one in servers))
