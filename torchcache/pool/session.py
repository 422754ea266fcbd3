"""A pool within one process: its servers, its statistics, and how a call is tried on them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final

from torchcache.errors import ServerUnavailable, TorchCacheError, TransientError
from torchcache.lanes.flight import FlightLane
from torchcache.lanes.local_use import UseReports
from torchcache.pool.control import ControlClient
from torchcache.pool.lane_choice import LaneName, choose_lane
from torchcache.pool.members import Endpoint, Member, Members, MemberSource, Ordering, UnderStoreName
from torchcache.pool.reports import PoolStatistics
from torchcache.pool.retry import Retry, RetryBudget
from torchcache.threads import Threads
from torchcache.wire.v1 import cache_pb2

_log = logging.getLogger(__name__)

INFO_S: Final = 5.0
"""How long one server may take to say who it is."""

ASKED_AT_ONCE: Final = 32

LOOK_AGAIN_S: Final = 5.0
"""How often servers that did not answer are asked again."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A control call's reply, and the server that gave it."""

    member: Member
    reply: Any


class Session:
    """One process's live state of a pool. Thread-safe; never used in another process than the one that made it."""

    def __init__(self, source: MemberSource, lane: LaneName = "auto") -> None:
        self.source = source
        self._wanted_lane = lane
        self.budget = RetryBudget()
        self.ordering = Ordering()
        self._lock = threading.Lock()
        self._resolving = threading.Lock()
        self._members: Members | None = None
        self._counts: Counter[str] = Counter()
        self._lanes: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._uses: list[UseReports] = []
        self._looking = False
        self._closed = False
        self.without_copy: set[tuple[str, str]] = set()
        """(namespace, server id): that server didn't take its copy of a save that is being written."""

    # ---- statistics ----

    def count(self, **counts: int) -> None:
        """Adds to the statistics."""
        with self._lock:
            self._counts.update(counts)

    def statistics(self) -> PoolStatistics:
        """See `Pool.statistics`."""
        with self._lock:
            counts = self._counts + Counter(suspects=sum(use.suspects for use in self._uses))
            return PoolStatistics(
                lanes=dict(self._lanes),
                lane_reasons=dict(self._reasons),
                local_extents=sum(use.extents for use in self._uses),
                local_bytes=sum(use.bytes for use in self._uses),
                local_writes=sum(use.writes for use in self._uses),
                **counts,
            )

    def forget_copies(self, namespace: str) -> None:
        """The save of that namespace isn't being written any more."""
        self.without_copy = {one for one in self.without_copy if one[0] != namespace}

    # ---- members ----

    def members(self, deadline: float) -> Members:
        """The servers, found out at first use. Raises ServerUnavailable if none answers."""
        found = self._members
        if found is None:
            return self.refresh(found, deadline)
        holds_s = LOOK_AGAIN_S if found.missing else self.source.holds_s
        if holds_s is not None and time.monotonic() - found.seen_at > holds_s:
            self._look_behind(found)
        return found

    def _look_behind(self, seen: Members) -> None:
        """Looks who serves by now, in a thread: the call that noticed it goes on with those it knows."""
        with self._lock:
            if self._looking:
                return
            self._looking = True

        def look() -> None:
            try:
                self._look(seen, time.monotonic() + INFO_S)
            except TorchCacheError as error:
                _log.warning("the pool's servers stay those that were known: %s", error)
                self._restamp(seen)
            finally:
                self._looking = False
                if self._closed:
                    self.close()

        threading.Thread(target=look, name="torchcache-members", daemon=True).start()

    def _look(self, seen: Members, deadline: float) -> None:
        """Meets the servers again if there are others than those `seen`, or some of them were missing."""
        known = {member.address for member in seen.by_id.values()}
        if not seen.missing and known == {e.address for e in self.source.resolve(deadline=deadline)}:
            self._restamp(seen)
        else:
            self.refresh(seen, deadline)

    def _restamp(self, seen: Members) -> None:
        with self._resolving:
            if self._members is seen:
                self._members = replace(seen, seen_at=time.monotonic())

    def first_members(self, retry: Retry, deadline: float) -> Members:
        """`members`, tried again while the pool can't be reached."""
        while True:
            try:
                return self.members(deadline)
            except TransientError as error:
                if not self.wait(retry, error, None, deadline):
                    raise

    @property
    def current(self) -> Members | None:
        """The servers as last seen."""
        return self._members

    def refresh(self, seen: Members | None, deadline: float) -> Members:
        """Asks anew who serves, unless another thread has done so since `seen`."""
        with self._resolving:
            if self._members is not None and self._members is not seen:
                return self._members
            before = self._members
            found = self._members = self._find(deadline, before)
        addresses = {member.address for member in found.by_id.values()}
        for member in before.by_id.values() if before else ():
            if member.address not in addresses:
                member.close()
        with self._lock:
            for member in found.by_id.values():
                self._lanes[member.address] = member.lane.name
                self._reasons[member.address] = member.lane_reason
        return found

    def _find(self, deadline: float, before: Members | None) -> Members:
        """Meets every server. One that was met before keeps its place while it is away: owners must not change."""
        known = {member.address: member for member in before.by_id.values()} if before else {}
        by_id: dict[str, Member] = {}
        missing: list[str] = []
        failure: TransientError | None = None
        for endpoint, asked in self._ask_who(self.source.resolve(deadline=deadline), deadline):
            try:
                member = self._member(endpoint, *asked.result(), known.get(endpoint.address))
                by_id[member.server_id] = member
            except TransientError as error:
                missing.append(endpoint.address)
                failure = error
                if member_before := known.get(endpoint.address):
                    by_id[member_before.server_id] = member_before
                    self.ordering.down(member_before.server_id)
        if not by_id:
            reason = f": {failure.message}" if failure else ""
            advice = (
                "" if self.source.embedded else "; is this the address of a `torchcache serve` that runs?"
            )
            raise ServerUnavailable(
                f"no server of the pool {self.source.description} can be reached{reason}{advice}",
                server=", ".join(missing) or None,
            )
        return Members(by_id, tuple(missing))

    def _ask_who(
        self, endpoints: Sequence[Endpoint], deadline: float
    ) -> list[tuple[Endpoint, Future[tuple[ControlClient, cache_pb2.InfoReply]]]]:
        """Asks all of them who they are, side by side: one that swallows packets costs its time only once."""
        until = min(deadline, time.monotonic() + INFO_S)

        def ask(endpoint: Endpoint) -> tuple[ControlClient, cache_pb2.InfoReply]:
            control = ControlClient(endpoint.address, self.source.access)
            return control, control.call("GetInfo", cache_pb2.InfoRequest(), deadline=until)

        with Threads(ASKED_AT_ONCE, name="torchcache-members") as threads:
            return [(endpoint, threads.submit(ask, endpoint)) for endpoint in endpoints]

    def _member(
        self,
        endpoint: Endpoint,
        control: ControlClient,
        info: cache_pb2.InfoReply,
        before: Member | None,
    ) -> Member:
        self.count(control_calls=1)
        self.ordering.up(info.server_id)
        stores = tuple(
            UnderStoreName(s.name, s.uri if s.uri.endswith("/") else s.uri + "/") for s in info.under_stores
        )
        flight = FlightLane(endpoint.host, info.data_port, server=endpoint.address, access=self.source.access)
        lane, reason = choose_lane(
            self._wanted_lane,
            info,
            flight,
            control,
            before=before.lane if before is not None else None,
            uses=self._uses,
        )
        return Member(info.server_id, control, lane, reason, stores)

    # ---- control calls ----

    def ask(
        self,
        method: str,
        request: Any,
        *,
        key: bytes,
        timeout_s: float,
        only_owner: bool = False,
        server: str = "",
    ) -> Asked:
        """One control call to the owner of `key`; unless `only_owner`, to the next if it can't be reached.

        `server` is the id of the only one to ask, if given.

        Tried again while the error is transient, the deadline far and the budget not spent.
        """
        deadline = time.monotonic() + timeout_s
        retry = Retry(self.budget, deadline)
        while True:
            members: Members | None = None
            try:
                members = self.members(deadline)
                owner = [server or self.ordering.owner(key, members)]
                order = owner if only_owner or server else self.ordering.order(key, members)
                return self._ask_in_order(members, order, method, request, deadline)
            except TransientError as error:
                if not self.wait(retry, error, members, deadline):
                    raise

    def _ask_in_order(
        self, members: Members, order: Sequence[str], method: str, request: Any, deadline: float
    ) -> Asked:
        for server in order:
            try:
                return self.ask_member(members.known(server), method, request, deadline)
            except ServerUnavailable as error:
                failure = error
        raise failure

    def ask_member(self, member: Member, method: str, request: Any, deadline: float) -> Asked:
        """One control call to one server, once."""
        self.count(control_calls=1)
        try:
            reply = member.control.call(method, request, deadline=deadline)
        except ServerUnavailable:
            self.ordering.down(member.server_id)
            raise
        self.ordering.up(member.server_id)
        self.budget.earn()
        return Asked(member, reply)

    def ask_each(
        self,
        method: str,
        request: Any,
        *,
        timeout_s: float,
        without: Callable[[Member, TransientError], None] | None = None,
    ) -> Iterator[Asked]:
        """One control call to every server. Raises the error of one that does not answer, after retries.

        Or calls `without` with it and goes on, if that is given.
        """
        deadline = time.monotonic() + timeout_s
        retry = Retry(self.budget, deadline)
        members = self.first_members(retry, deadline)
        left = list(members.by_id)
        while left:
            try:
                yield self.ask_member(members.by_id[left[0]], method, request, deadline)
                left.pop(0)
            except TransientError as error:
                if not self.wait(retry, error, members, deadline):
                    if without is None:
                        raise
                    without(members.by_id[left.pop(0)], error)
                members = self._members or members
                left = [server for server in left if server in members.by_id]

    def wait(self, retry: Retry, error: TorchCacheError, members: Members | None, deadline: float) -> bool:
        """Whether to try again after `error`; if so it has paused, and looked anew who serves."""
        if not retry.again(error):
            return False
        self.count(retries=1)
        if isinstance(error, ServerUnavailable) and members is not None:
            try:
                self.refresh(members, deadline)
            except TransientError:
                pass  # the next try meets it again
        return True

    def close(self) -> None:
        """Forgets the servers and closes the connections to them."""
        self._closed = True
        members, self._members = self._members, None
        for member in members.by_id.values() if members else ():
            member.close()
