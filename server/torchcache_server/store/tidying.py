"""What is done for the store now and then: what is too old goes, what is mostly dead is compacted."""

from __future__ import annotations

import logging
import time

from torchcache_server.store.compaction import compact
from torchcache_server.store.core import Core
from torchcache_server.store.foresight import Foresight
from torchcache_server.store.room import evict_others
from torchcache_server.store.segments import Segment

_log = logging.getLogger(__name__)


def tidy(core: Core) -> None:
    """One round. Cheap where nothing is to be done."""
    core.index.forget_dead_readers()
    if not core.watch.out_of_service:
        expire(core, time.monotonic())
        compact_dead(core)
        leave_free(core)
    forget_orders(core)


def forget_orders(core: Core) -> None:
    """Lets go the orders of readers that are gone."""
    with core.lock:
        for namespace in list(core.space.namespaces.values()):
            if isinstance(namespace.order, Foresight):
                namespace.order.expire()
                if not namespace.order:
                    namespace.order = None
                    core.space.forget_if_empty(namespace.name)


def expire(core: Core, now_s: float) -> None:
    """Drops the segments of namespaces that nobody has used for the time their policy gives them."""
    with core.lock:
        old = [
            n
            for n in core.space.namespaces.values()
            if n.policy.ttl_s is not None
            and not n.protected
            and now_s - n.used_s > n.policy.ttl_s
            and n.segments
        ]
        segments = [segment for namespace in old for segment in namespace.segments.values()]
    if not segments:
        return
    gone = core.remove(segments, unless_in_use=True)
    core.counts.add(expired_chunks=sum(s.chunks for s in gone))
    _log.info("%s: not used for the time they were given, dropped", ", ".join(n.name for n in old))


def compact_dead(core: Core) -> None:
    """Gives back the room of records that were quarantined, moved or replaced: of segments that are mostly that."""
    with core.lock:
        dead = [s for s in core.space.segments.values() if _is_mostly_dead(core, s)]
    for segment in dead:
        compact(core, segment, lambda _: True)


def leave_free(core: Core) -> None:
    """Evicts, where the file system has less left than it should, what isn't in use just now."""
    need_bytes = core.min_free_bytes - core.free_bytes()
    if need_bytes <= 0:
        return
    with core.lock:
        need_bytes -= core.spares.leaving_bytes  # evicting more would free no more
        need_bytes -= core.spares.trim(need_bytes)
        latest = max(core.space.namespaces.values(), key=lambda n: n.last_used, default=None)
    if need_bytes > 0 and latest is not None and evict_others(core, latest.name, need_bytes):
        with core.lock:
            core.spares.trim(need_bytes)
        _log.warning("the disk of %s is full: what was used longest ago is evicted", core.folder.path)


def _is_mostly_dead(core: Core, segment: Segment) -> bool:
    return (
        2 * segment.dead_bytes > segment.tail - segment.header.length > 0
        and not segment.writing
        and not core.is_kept(segment)
    )
