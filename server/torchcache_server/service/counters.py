"""What was served since start, and how fast; what is known of copies."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

from .latencies import Latencies
from .passed_over import PassedOver

DATA_CALLS: Final = ("read", "read_filled", "write")
"""By Flight. "read_filled" had to wait for an under-store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCounts:
    """`wanted` and `held` are of the saves that wait for their upload here, as far as was found; the others add up."""

    wanted: int = 0
    held: int = 0
    made: int = 0
    mended_chunks: int = 0


@dataclass
class ServiceCounters:
    """Calls and bytes of the data lane, and what clients say: what they read themselves, and whom they pass over.

    Thread-safe to add to; reading one field needs no lock.
    """

    read_calls: int = 0
    write_calls: int = 0
    served_bytes: int = 0
    written_bytes: int = 0
    local_chunks: int = 0
    local_bytes: int = 0
    hedged_calls: int = 0
    latencies: Latencies = field(default_factory=lambda: Latencies(DATA_CALLS))
    passed_over: PassedOver = field(default_factory=PassedOver)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self,
        *,
        read_calls: int = 0,
        write_calls: int = 0,
        served_bytes: int = 0,
        written_bytes: int = 0,
        local_chunks: int = 0,
        local_bytes: int = 0,
        hedged_calls: int = 0,
    ) -> None:
        """Adds to several counters at once."""
        with self._lock:
            self.read_calls += read_calls
            self.write_calls += write_calls
            self.served_bytes += served_bytes
            self.written_bytes += written_bytes
            self.local_chunks += local_chunks
            self.local_bytes += local_bytes
            self.hedged_calls += hedged_calls
