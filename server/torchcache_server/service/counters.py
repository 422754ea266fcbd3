"""What the data lane served since start."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class ServiceCounters:
    """Calls and bytes of the data lane, and what clients say they read themselves.

    Thread-safe to add to; reading one field needs no lock.
    """

    read_calls: int = 0
    write_calls: int = 0
    served_bytes: int = 0
    written_bytes: int = 0
    local_chunks: int = 0
    local_bytes: int = 0
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
    ) -> None:
        """Adds to several counters at once."""
        with self._lock:
            self.read_calls += read_calls
            self.write_calls += write_calls
            self.served_bytes += served_bytes
            self.written_bytes += written_bytes
            self.local_chunks += local_chunks
            self.local_bytes += local_bytes
