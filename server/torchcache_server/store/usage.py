"""What a store holds, and what happened to it: for status and metrics."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torchcache_server.store.core import Core
from torchcache_server.store.policy import Policy

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamespaceUsage:
    """What a dataset or checkpoint holds. `bytes` of the disk; `kept`: not yet in the under-store."""

    name: str
    bytes: int
    chunks: int
    kept: bool
    policy: Policy = Policy()  # noqa: RUF009 - frozen

    @property
    def pinned(self) -> bool:
        return self.policy.pinned


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The store as it is, and what happened since it was opened.

    `used_bytes` is what segments take of the disk, of which `dead_bytes` are records that nobody finds any more;
    `spare_bytes` what files take that wait to become segments; `overhead_bytes` index and records; `free_bytes` what
    the file system has left. `damaged_kept` counts damaged records that exist nowhere else. `out_of_service` says why,
    if the disk is.
    """

    capacity_bytes: int
    used_bytes: int
    chunks: int
    segments: int
    hits: int
    misses: int
    corrupt: int
    evicted_chunks: int
    spare_bytes: int
    dead_bytes: int
    overhead_bytes: int
    free_bytes: int
    min_free_bytes: int
    recycled_segments: int
    compacted_bytes: int
    expired_chunks: int
    scrubbed_bytes: int
    scrub_rounds: int
    damaged_kept: int
    disk_errors: int
    out_of_service: str


def namespaces(core: Core) -> list[NamespaceUsage]:
    """All namespaces, by name. Under the store's lock."""
    found = sorted(core.space.namespaces.values(), key=lambda n: n.name)
    return [NamespaceUsage(n.name, n.bytes, n.chunks, n.kept, n.policy) for n in found]


def measured(core: Core) -> StoreUsage:
    """Totals and counters."""
    health = core.watch.health
    overhead = _taken_bytes(core, core.folder.index, core.folder.records, core.folder.flags)
    free = core.free_bytes()
    with core.lock:
        space, counts = core.space, core.counts
        segments = list(space.segments.values())
        return StoreUsage(
            capacity_bytes=space.capacity_bytes,
            used_bytes=space.used_bytes,
            chunks=sum(s.chunks for s in segments),
            segments=len(segments),
            hits=counts.hits,
            misses=counts.misses,
            corrupt=counts.corrupt,
            evicted_chunks=counts.evicted_chunks,
            spare_bytes=core.spares.bytes,
            dead_bytes=sum(s.dead_bytes for s in segments),
            overhead_bytes=overhead,
            free_bytes=free,
            min_free_bytes=core.min_free_bytes,
            recycled_segments=core.spares.recycled,
            compacted_bytes=counts.compacted_bytes,
            expired_chunks=counts.expired_chunks,
            scrubbed_bytes=counts.scrubbed_bytes,
            scrub_rounds=counts.scrub_rounds,
            damaged_kept=len(core.damaged_kept),
            disk_errors=health.errors,
            out_of_service=health.out_of_service,
        )


def _taken_bytes(core: Core, *folders: str) -> int:
    try:
        return sum(core.disk.taken_bytes(folder) for folder in folders)
    except OSError as error:
        _log.warning("what index and records take can't be told: %s", error)
        return 0
