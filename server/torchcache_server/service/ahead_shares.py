"""How much may be on its way from under-stores for the reads of one dataset, so that others' reads find room, too.

What is on its way, or has come and waits for a client that doesn't take it, is in the memory of fills, which is
bounded. A few clients that hang would hold all of it, and every read of something else would wait for them.
"""

from __future__ import annotations

import threading
from typing import Final

from torchcache.model import CHUNK_BYTES

MOST_OF_ONE: Final = 384 * 1024 * 1024
"""Three quarters of what fills may hold in all."""


class AheadShare:
    """Of one read. `bytes` are on their way for it, or wait; it says so itself."""

    def __init__(self, shares: AheadShares, namespace: str) -> None:
        self._shares = shares
        self._namespace = namespace
        self.bytes = 0

    def left(self, most_bytes: int) -> int:
        """How many more it may ask for: `most_bytes` in all at most, and always a chunk."""
        others_bytes = self._shares.bytes(self._namespace) - self.bytes
        return min(most_bytes, max(CHUNK_BYTES, self._shares.most_bytes - others_bytes)) - self.bytes

    def close(self) -> None:
        """The read is over."""
        self._shares.remove(self._namespace, self)


class AheadShares:
    """Of all reads that run. Thread-safe."""

    def __init__(self, most_bytes: int = MOST_OF_ONE) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._known: dict[str, set[AheadShare]] = {}

    def begin(self, namespace: str) -> AheadShare:
        """For a read; to be closed."""
        share = AheadShare(self, namespace)
        with self._lock:
            self._known.setdefault(namespace, set()).add(share)
        return share

    def bytes(self, namespace: str) -> int:
        """On their way for all reads of the namespace."""
        with self._lock:
            return sum(share.bytes for share in self._known.get(namespace, ()))

    def remove(self, namespace: str, share: AheadShare) -> None:
        """See `AheadShare.close`."""
        with self._lock:
            known = self._known.get(namespace, set())
            known.discard(share)
            if not known:
                self._known.pop(namespace, None)
