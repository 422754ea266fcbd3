"""Bytes of saves and writes that nobody will ever commit: their writer was killed, or overtaken unawares."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from torchcache.save_names import KEPT_PREFIXES
from torchcache_server.store import Store

_log = logging.getLogger(__name__)

ORPHAN_S: Final = 600.0
"""A namespace that belongs to nobody and hasn't grown for so long is dropped."""


class Orphans:
    """Drops namespaces of saves and writes that stay unused."""

    def __init__(self, store: Store, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}  # namespace -> its bytes, and since when it has so many

    def sweep(self, used: set[str]) -> None:
        """`used`: the namespaces that belong to somebody."""
        now = self._clock()
        still: dict[str, tuple[int, float]] = {}
        for usage in self._store.namespaces():
            if usage.name in used or not usage.name.startswith(KEPT_PREFIXES):
                continue
            bytes, since_s = self._seen.get(usage.name, (usage.bytes, now))
            if bytes != usage.bytes:
                since_s = now
            if now >= since_s + ORPHAN_S:
                _log.warning("%s belongs to nobody: dropped", usage.name)
                self._store.drop(usage.name)
            else:
                still[usage.name] = (usage.bytes, since_s)
        self._seen = still
