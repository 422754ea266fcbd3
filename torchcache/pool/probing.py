"""Trying servers that are out, beside the reads that would have gone to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final

from torchcache.errors import ConfigurationError, TorchCacheError, TransientError
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent
from torchcache.placement import placement_key
from torchcache.pool.members import Members
from torchcache.pool.routing import stripes
from torchcache.pool.session import Session
from torchcache.wire.v1 import cache_pb2

PROBE_S: Final = 5.0
PROBE_BYTES: Final = 16 * 1024 * 1024

EXTENT_BYTES: Final = 16 * 1024
"""What an extent costs, whatever its size, in bytes."""


def payload_size(extents: Sequence[Extent]) -> int:
    """What is asked for, for comparing times: bytes, with something for each extent; of unknown sizes only that."""
    lengths = sum([length if length >= 0 else max(info.size, 0) for info, _, length in extents])
    return lengths + EXTENT_BYTES * len(extents)


def probe_those_out(
    session: Session, members: Members, extents: Sequence[Extent], options: ReadOptions
) -> None:
    """Tries each server that is out, if it is time to, with what of `extents` it owns, if it does."""
    for server in session.health.due():
        owned = _owned(session, members, extents, server) if server in members.by_id else []
        if owned and session.health.take_probe(server):
            session.count(probes=1)
            arguments = (session, members, server, owned, options.namespace)
            threading.Thread(target=_probe, args=arguments, name="torchcache-probe").start()


def _owned(session: Session, members: Members, extents: Sequence[Extent], server: str) -> list[Extent]:
    """What of `extents` would be asked of the server: as much as it is usually asked for, but not without end."""
    owned: list[Extent] = []
    size = 0
    for part in (stripe for extent in extents for stripe in stripes(extent)):
        if session.ordering.owner(placement_key(part.object.id, part.offset), members) == server:
            owned.append(part)
            size += max(part.end - part.offset, 0)
            if size >= PROBE_BYTES:
                break
    return owned


def _probe(session: Session, members: Members, server: str, extents: list[Extent], namespace: str) -> None:
    """Meets it anew, for it may be another by now; then reads from it what it holds. Nothing is fetched for it."""
    deadline = time.monotonic() + PROBE_S
    took_s: float | None = None
    size = EXTENT_BYTES * len(extents)
    try:
        if session.current is None:
            return  # the pool was closed
        members = session.refresh(members, deadline)
        member = members.by_id.get(server)
        if member is None or member.address in members.missing:
            return
        began = time.monotonic()
        if isinstance(member.lane, FlightLane):
            options = ReadOptions(namespace=namespace, resident_only=True)
            found = member.lane.read(extents, [None] * len(extents), options, deadline=deadline)
            if any(isinstance(one, TransientError | ConfigurationError) for one in found):
                return
            size += sum(len(one) for one in found if isinstance(one, memoryview))
        else:
            session.ask_member(member, "GetInfo", cache_pb2.InfoRequest(), deadline)
        took_s = time.monotonic() - began
    except TorchCacheError:
        pass
    finally:
        session.health.probed(server, size, took_s)
