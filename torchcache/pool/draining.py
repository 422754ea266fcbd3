"""A server that is told to end in order, watched until it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torchcache.errors import ConfigurationError, ServerUnavailable, TransientError
from torchcache.pool.members import Member
from torchcache.pool.retry import Retry
from torchcache.pool.session import Session
from torchcache.wire.v1 import cache_pb2

CALL_S: Final = 30.0
LOOK_S: Final = 1.0
"""How often it is asked how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """How far a server is that drains. `left`: URIs of what isn't in storage, once it is `done`; at most 1,000.

    `streams` of data that run, `pending_bytes` not in storage yet; the server gives up after `drain_s`.
    """

    address: str
    done: bool
    left: tuple[str, ...]
    drain_s: float
    streams: int
    pending_bytes: int


def drain(session: Session, server: str) -> Iterator[Drain]:
    """See `Pool.drain`. It has begun when this returns."""
    deadline = time.monotonic() + CALL_S
    member = _found(session, server, deadline)
    return _states(session, member, _ask(session, member, 0.0))


def _states(session: Session, member: Member, state: Drain) -> Iterator[Drain]:
    yield state
    while not state.done:
        state = _asked_again(session, member)
        yield state


def _asked_again(session: Session, member: Member) -> Drain:
    """One answer that doesn't come says nothing: the channel may have been closed since the server left the pool."""
    for pause_s in (LOOK_S / 4, LOOK_S, None):
        try:
            return _ask(session, member, LOOK_S)
        except TransientError as error:
            if pause_s is None:
                raise ServerUnavailable(
                    f"{member.address} drained, and can't be reached any more: its log says what is left, if it has "
                    "ended",
                    server=member.address,
                ) from error
            time.sleep(pause_s)
    raise AssertionError


def _ask(session: Session, member: Member, wait_s: float) -> Drain:
    request = cache_pb2.DrainRequest(wait_s=wait_s)
    # Not by the session's ask_member: that one isn't read from any more says nothing of its health.
    reply = member.control.call("Drain", request, deadline=time.monotonic() + CALL_S)
    session.count(control_calls=1)
    return Drain(
        address=member.address,
        done=reply.done,
        left=tuple(reply.left),
        drain_s=reply.drain_s,
        streams=reply.streams,
        pending_bytes=reply.pending_bytes,
    )


def _found(session: Session, server: str, deadline: float) -> Member:
    """The server of that address or id. Raises ConfigurationError if the pool has none, ServerUnavailable."""
    members = session.first_members(Retry(session.budget, deadline), deadline)
    for member in members.by_id.values():
        if server in (member.address, member.server_id):
            return member
    if server in members.missing:
        raise ServerUnavailable(f"{server} can't be reached: there is nothing to drain", server=server)
    there = ", ".join(sorted(member.address for member in members.by_id.values()))
    raise ConfigurationError(f"the pool has no server {server!r}: name one of {there}")
