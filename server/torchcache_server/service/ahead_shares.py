"""How much may be on its way from under-stores for the reads of one dataset, so that others' reads find room, too.

What is on its way, or has come and waits for a client that doesn't take it, is in the memory of fills, which is
bounded. A few clients that hang would hold all of it, and every read of something else would wait for them. So a
dataset may have three times what is left free: alone three quarters, of two that want much three sevenths each, and
there is always something left for the next. (Choudhury and Hahne, "Dynamic queue length thresholds", 1998.)
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from torchcache.model import CHUNK_BYTES

ALL_BYTES: Final = 512 * 1024 * 1024
"""What fills may hold together; see cache/read_through.py."""

TIMES_THE_FREE: Final = 3
"""What one may have, as a multiple of what nobody has."""


class AheadShare:
    """Of one read. `bytes` are on their way for it, or wait; it says so itself."""

    def __init__(self, shares: AheadShares, namespace: str) -> None:
        self._shares = shares
        self._namespace = namespace
        self.bytes = 0

    def left(self, most_bytes: int) -> int:
        """How many more it may ask for: `most_bytes` in all at most, and always a chunk."""
        left = min(most_bytes - self.bytes, self._shares.left(self._namespace))
        return max(min(most_bytes, CHUNK_BYTES) - self.bytes, left)

    def close(self) -> None:
        """The read is over."""
        self._shares.remove(self._namespace, self)


class AheadShares:
    """Of all reads that run. Thread-safe."""

    def __init__(self, all_bytes: int = ALL_BYTES) -> None:
        self._all_bytes = all_bytes
        self._lock = threading.Lock()
        self._known: defaultdict[str, set[AheadShare]] = defaultdict(set)

    def begin(self, namespace: str) -> AheadShare:
        """For a read; to be closed."""
        share = AheadShare(self, namespace)
        with self._lock:
            self._known[namespace].add(share)
        return share

    def left(self, namespace: str) -> int:
        """How many more bytes the reads of the namespace may ask for together. Below 0 if they have too many."""
        with self._lock:
            held = {name: sum(share.bytes for share in shares) for name, shares in self._known.items()}
        return TIMES_THE_FREE * (self._all_bytes - sum(held.values())) - held.get(namespace, 0)

    def remove(self, namespace: str, share: AheadShare) -> None:
        """See `AheadShare.close`."""
        with self._lock:
            self._known[namespace].discard(share)
            if not self._known[namespace]:
                del self._known[namespace]
