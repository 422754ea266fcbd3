"""Trying servers that are out, beside the reads that would have gone to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final

from torchcache.errors import ConfigurationError, NotResident, TorchCacheError, TransientError
from torchcache.lanes.base import Lane, ReadOptions
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.placement import placement_key
from torchcache.pool.members import Members
from torchcache.pool.retry import Retry
from torchcache.pool.roster import ASKED_AT_ONCE
from torchcache.pool.routing import stripes
from torchcache.pool.session import Session
from torchcache.threads import Threads
from torchcache.wire.v1 import cache_pb2

PROBE_S: Final = 5.0
PROBE_BYTES: Final = 16 * 1024 * 1024

_NOTHING: Final = Extent(ObjectInfo(ObjectId("samples", "nothing", "0"), 1))

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


def answers_s(session: Session, timeout_s: float) -> dict[str, float | None]:
    """See `Pool.answers_s`."""
    deadline = time.monotonic() + timeout_s
    members = session.first_members(Retry(session.budget, deadline), deadline)
    until = min(deadline, time.monotonic() + PROBE_S)
    answering = [one for one in members.by_id.values() if one.address not in session.silent()]
    with Threads(ASKED_AT_ONCE, name="torchcache-answers") as threads:
        asked = {one.address: threads.submit(_answer_s, one.lane, until) for one in answering}
        took_s = {address: took.result() for address, took in asked.items()}
    return {one.address: took_s.get(one.address) for one in members.by_id.values()}


def _answer_s(lane: Lane, deadline: float) -> float | None:
    """Of the second read: the first may have to connect."""
    took_s = None
    if isinstance(lane, FlightLane):
        for _ in range(2):
            began = time.monotonic()
            (absent,) = lane.read([_NOTHING], [None], ReadOptions(resident_only=True), deadline=deadline)
            if not isinstance(absent, NotResident):
                return None
            took_s = time.monotonic() - began
    return took_s
