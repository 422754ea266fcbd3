"""Making room: whose segments go, and what is promised to fills that are on their way."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final

from torchcache.errors import OutOfSpace
from torchcache.records import PAGE_BYTES, page_aligned
from torchcache_server.store.compaction import compact
from torchcache_server.store.core import Core
from torchcache_server.store.eviction import (
    NEVER,
    SLACK,
    SLACK_SEGMENTS,
    Held,
    choose_victims,
    choose_yielding,
)
from torchcache_server.store.ordering import Order
from torchcache_server.store.segments import Segment
from torchcache_server.store.space import Namespace
from torchcache_server.store.writing import Short

LET_GO_S: Final = 5.0
"""How long what must be kept waits for readers to let go of what was evicted for it, where the disk is full."""

_PAUSE_S: Final = 0.01

_LOOK_AT: Final = 16
"""Segments of a dataset looked at when one of them is to yield. More costs time, and gains little."""

_log = logging.getLogger(__name__)


def refuse_if_out_of_service(core: Core) -> None:
    """Raises OutOfSpace if the disk takes nothing any more."""
    if core.watch.out_of_service:
        raise OutOfSpace(
            f"the disk of the store {core.folder.path} is out of service ({core.watch.out_of_service}); mend it and "
            "start the server again"
        )


def check_quota(core: Core, namespace: str, bytes: int) -> None:
    """Raises OutOfSpace if the namespace may not take so much more. Under `lock`."""
    owner = core.space.namespaces.get(namespace)
    if owner is None or owner.policy.quota_bytes is None or owner.kept:
        return
    held = owner.bytes + owner.promised_bytes
    if held + bytes > owner.policy.quota_bytes:
        raise OutOfSpace(
            f"{namespace!r} has used up its quota: {held} of {owner.policy.quota_bytes} bytes; raise it with "
            "torchcache limit"
        )


class Promise:
    """Room for a fill that is on its way. Whoever stores it says so; `release` gives back what wasn't used."""

    def __init__(self, core: Core, owner: Namespace, bytes: int) -> None:
        self._core = core
        self._owner = owner
        self.bytes = bytes

    def release(self) -> None:
        """May be called twice."""
        with self._core.lock:
            self._core.space.promised_bytes -= self.bytes
            self._owner.promised_bytes -= self.bytes
            self.bytes = 0
            self._core.space.forget_if_empty(self._owner.name)


def promise(
    core: Core, namespace: str, size_bytes: int, key: bytes, *, note: Callable[[Core, str, bytes], int]
) -> Promise:
    """Room for a chunk of `size_bytes`, before it is fetched. Raises OutOfSpace: it will have to pass through.

    `note` says when it is needed next: `note_use` where it is needed now too, `look_up_use` where it isn't yet.
    """
    refuse_if_out_of_service(core)
    bytes = page_aligned(size_bytes + PAGE_BYTES)
    space = core.space
    next_use = note(core, namespace, key)
    while True:
        with core.lock:
            check_quota(core, namespace, bytes)
            over = space.used_bytes + space.promised_bytes + bytes - space.capacity_bytes
            wanted = bytes + space.promised_bytes + core.min_free_bytes
            over_disk = wanted - core.free_bytes() - core.spares.bytes
            if over <= 0 and over_disk <= 0:
                owner = space.namespace(namespace)
                space.promised_bytes += bytes
                owner.promised_bytes += bytes
                return Promise(core, owner, bytes)
        make_room(core, namespace, Short(bytes, over, over_disk), next_use=next_use)


def note_use(core: Core, namespace: str, key: bytes) -> int:
    """Says that the chunk was asked for and is not here; returns when it is needed next."""
    order = _order(core, namespace)
    if order is None:
        return NEVER
    order.used(key)
    return order.next_use(key)


def look_up_use(core: Core, namespace: str, key: bytes) -> int:
    """When the chunk is needed next."""
    order = _order(core, namespace)
    return NEVER if order is None else order.next_use(key)


def _order(core: Core, namespace: str) -> Order | None:
    with core.lock:
        owner = core.space.namespaces.get(namespace)
        return owner.order if owner is not None else None


def make_room(core: Core, namespace: str, short: Short, *, next_use: int = NEVER) -> None:
    """Makes some of the room that is missing; the caller looks again whether it is enough.

    Segments of other namespaces go, then, where the order of reading is known, what the namespace itself needs farther
    in the future than `next_use`. Before them go spares, where it is the file system that is full, and what lies unused
    behind tails. Raises OutOfSpace if nothing may go.
    """
    if short.bytes <= core.space.capacity_bytes:
        with core.lock:
            if short.disk_bytes > 0 and core.spares.trim(short.disk_bytes):
                return
            on_its_way = 0 < short.disk_bytes <= core.spares.leaving_bytes
        if on_its_way and short.capacity_bytes <= 0:
            # Evicting more would free no more: readers still look at what has gone. A read that ends soon is no reason
            # to refuse a checkpoint; what is only cached can pass through.
            if _is_kept(core, namespace) and _readers_let_go(core):
                return
            raise OutOfSpace(
                f"the disk of the store {core.folder.path} is full until readers let go of what was evicted"
            )
        if _give_back_tails(core):
            return
        if evict_others(core, namespace, max(short.capacity_bytes, short.disk_bytes)):
            return
        if _yield_own(core, namespace, next_use):
            return
    if short.capacity_bytes <= 0:
        raise OutOfSpace(
            f"the file system of the store {core.folder.path} is full but for the {core.min_free_bytes} bytes that are "
            "to stay free; free some disk space, or give a smaller capacity"
        )
    raise OutOfSpace(
        f"the store {core.folder.path} is full: {core.space.used_bytes} of {core.space.capacity_bytes} bytes are used "
        f"and nothing may be evicted for {namespace!r}; raise the capacity"
    )


def _is_kept(core: Core, namespace: str) -> bool:
    with core.lock:
        owner = core.space.namespaces.get(namespace)
        return owner is not None and owner.kept


def _readers_let_go(core: Core) -> bool:
    """Waits until readers have let go of something that was evicted; False if none has within `LET_GO_S`."""
    with core.lock:
        before = core.spares.leaving_bytes
    until = time.monotonic() + LET_GO_S
    while time.monotonic() < until:
        with core.lock:
            if core.spares.leaving_bytes < before:
                return True
        time.sleep(_PAUSE_S)
    return False


def _give_back_tails(core: Core) -> bool:
    """Gives back what lies unused behind the tails of recycled segments; says whether there was any."""
    with core.lock:
        found = [
            s
            for s in core.space.segments.values()
            if s.floor_bytes > s.tail and s.floor_bytes > page_aligned(s.tail)  # the first is cheap
        ]
        cleared = [segment for segment in found if segment.clear_behind(core.disk)]
        for segment in cleared:
            core.space.trimmed(segment)
    return bool(cleared)


def evict_others(core: Core, namespace: str | None, need_bytes: int) -> bool:
    """Evicts at least `need_bytes` from other namespaces; False, and nothing is done, if that much can't go."""
    with core.lock:
        owner = core.space.namespaces.get(namespace) if namespace is not None else None
        priority = None if namespace is None else 0
        if owner is not None:
            # What exists nowhere else stands above everybody's wishes.
            priority = None if owner.kept else owner.policy.priority
        victims = choose_victims(
            core.space.candidates(namespace, priority),
            namespace=namespace,
            need_bytes=need_bytes,
            priority=priority,
        )
        segments = [core.space.segments[number] for number in victims or ()]
    if victims is None:
        return False
    evicted = core.remove(segments, unless_in_use=True)
    core.counts.add(evicted_chunks=sum(s.chunks for s in evicted))
    return any(s.dropped for s in segments)


def _yield_own(core: Core, namespace: str, next_use: int) -> bool:
    """Lets one segment of the namespace go for a chunk with `next_use`, what is needed sooner moved out of it."""
    with core.lock:
        owner = core.space.namespaces.get(namespace)
        if owner is None or owner.order is None or owner.protected:
            return False
        order = owner.order
        able = [s for s in owner.segments.values() if not s.writing and s is not owner.open]
        total = sum(s.live_bytes for s in owner.segments.values())
    looked_at = random.sample(able, min(len(able), _LOOK_AT))
    held = {s.number: _held(core, s, order) for s in looked_at}
    share = sum(one.bytes for records in held.values() for one in records) / max(1, total)
    chosen = choose_yielding(
        held,
        tails={s.number: s.tail for s in looked_at},
        now=order.now,
        next_use=next_use,
        slack_bytes=int(min(SLACK_SEGMENTS * core.space.segment_bytes, SLACK * total) * share),
    )
    if chosen is None:
        return False
    segment = next(s for s in looked_at if s.number == chosen.segment)
    return compact(core, segment, chosen.stay.__contains__) > 0


def _held(core: Core, segment: Segment, order: Order) -> list[Held]:
    """The segment's records. One takes as much as another here."""
    size = segment.live_bytes // max(1, segment.chunks)
    keys = [key for key, _ in core.index.members(segment.number)]
    return [Held(key, size, use) for key, use in zip(keys, order.next_uses(keys), strict=True)]
