"""What a user wants of a dataset's place in the pool: said to every server, since every one may hold a part of it."""

from __future__ import annotations

import math
import time
from typing import Any, Final

from torchcache.errors import ConfigurationError, ServerUnavailable, TorchCacheError, TransientError
from torchcache.placement import Placement
from torchcache.pool.members import Member, Members
from torchcache.pool.reports import NamespaceStatus, namespace_status
from torchcache.pool.retry import Retry
from torchcache.pool.session import Session
from torchcache.wire.v1 import cache_pb2

CALL_S: Final = 60.0
"""Evicting unlinks files: as long as that may take."""

_MOST: Final = {"priority": 2**31 - 1, "quota_bytes": 2**63 - 1}
"""What the wire can carry; what makes sense, the server says."""


def set_policy(
    session: Session,
    namespace: str,
    *,
    pinned: bool | None,
    priority: int | None,
    quota_bytes: int | None,
    ttl_s: float | None,
) -> dict[str, NamespaceStatus]:
    """See `Pool.set_policy`."""
    for name, value in (("priority", priority), ("quota_bytes", quota_bytes)):
        if value is not None and abs(value) > _MOST[name]:
            raise ConfigurationError(f"{name} of {value} is beyond what there can be")
    everybody = _Everybody(session)
    members = everybody.members
    shares = _shares(quota_bytes, members.placement, len(everybody.strangers))

    def request(number: int) -> cache_pb2.SetPolicyRequest:
        made = cache_pb2.SetPolicyRequest(
            namespace=namespace,
            priority=priority,
            quota_bytes=None if shares is None else shares[number],
            ttl_s=ttl_s,
        )
        if pinned is not None:
            made.pinned = pinned
        return made

    requests = {server: request(number) for number, server in enumerate(members.placement.members)}
    replies = everybody.tell("SetPolicy", requests, f"the policy of {namespace}")
    return {address: namespace_status(reply) for address, reply in replies.items()}


def evict(session: Session, namespace: str) -> int:
    """See `Pool.evict`."""
    everybody = _Everybody(session)
    requests = dict.fromkeys(everybody.members.by_id, cache_pb2.EvictRequest(namespace=namespace))
    replies = everybody.tell("Evict", requests, f"the eviction of {namespace}")
    return sum(reply.freed_bytes for reply in replies.values())


def _shares(quota_bytes: int | None, placement: Placement, strangers: int) -> list[int] | None:
    """What each server may hold, so that all together hold `quota_bytes`; of 0, no quota, every one gets 0.

    For each of `strangers`, which don't answer, a share is set aside too: it has it once it is told.
    """
    servers = len(placement.members)
    if not quota_bytes or quota_bytes < 0:
        return None if quota_bytes is None else [quota_bytes] * servers
    known_bytes = quota_bytes - strangers * (quota_bytes // (servers + strangers))
    each = [math.floor(share * known_bytes) for share in placement.shares()]
    more = known_bytes - sum(each)
    return [max(1, part + (number < more)) for number, part in enumerate(each)]


class _Everybody:
    """One call to every server there is. Those that can't be reached don't keep the others from being told."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._deadline = time.monotonic() + CALL_S
        self.members: Members = session.first_members(Retry(session.budget, self._deadline), self._deadline)
        met = {member.address for member in self.members.by_id.values()}
        self.strangers = [address for address in self.members.missing if address not in met]

    def tell(self, method: str, requests: dict[str, Any], what: str) -> dict[str, Any]:
        """The replies by server's address.

        Raises the error of the first server that refused, else ServerUnavailable with the servers that weren't reached.
        """
        replies: dict[str, Any] = {}
        unreached: dict[str, str] = dict.fromkeys(self.strangers, "no answer")
        refusals: list[TorchCacheError] = []
        for server, request in requests.items():
            member = self.members.by_id[server]
            try:
                replies[member.address] = self._tell_one(member, method, request)
            except TransientError as error:
                unreached[member.address] = error.message
            except TorchCacheError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        if unreached:
            reached = f"; it is at {', '.join(sorted(replies))}" if replies else ""
            reasons = sorted(set(unreached.values()))
            raise ServerUnavailable(
                f"{what} didn't get to {', '.join(sorted(unreached))}{reached}. Do it again once they answer: "
                f"{'; '.join(reasons)}",
                server=", ".join(sorted(unreached)),
            )
        return replies

    def _tell_one(self, member: Member, method: str, request: Any) -> Any:
        retry = Retry(self._session.budget, self._deadline)
        while True:
            try:
                return self._session.ask_member(member, method, request, self._deadline).reply
            except TransientError as error:
                if not self._session.wait(retry, error, self.members, self._deadline):
                    raise
                # It may have come back under another port, as servers of an embedded pool do.
                current = self._session.current
                member = current.by_id.get(member.server_id, member) if current else member
