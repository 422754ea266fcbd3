"""A pool within one process: its servers, its statistics, and how a call is tried on them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torchcache.errors import ServerUnavailable, TorchCacheError, TransientError
from torchcache.placement import Placement
from torchcache.pool.health import Health
from torchcache.pool.lane_choice import LaneName
from torchcache.pool.members import Member, Members, MemberSource, Ordering
from torchcache.pool.reports import PoolStatistics
from torchcache.pool.retry import Retry, hedge_budget, retry_budget
from torchcache.pool.roster import ASKED_AT_ONCE, INFO_AGAIN_S, INFO_S, Roster
from torchcache.threads import Threads

_log = logging.getLogger(__name__)

PATIENT_LOOK: Final = 5
"""Of so many looks at a server that stays silent one gives it its full time: it may be slow, and not away."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A control call's reply, and the server that gave it."""

    member: Member
    reply: Any


class Session:
    """One process's live state of a pool. Thread-safe; never used in another process than the one that made it."""

    def __init__(self, source: MemberSource, lane: LaneName = "auto") -> None:
        self.source = source
        self.budget = retry_budget()
        self.hedges = hedge_budget()
        self.health = Health(self._health_changed)
        self.ordering = Ordering(self.health)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._roster = Roster(source, lane, self.health, lambda: self.count(control_calls=1))
        self.without_copy: set[tuple[str, str]] = set()
        """(namespace, server id): that server didn't take its copy of a save that is being written."""
        self._looks: Counter[str] = Counter()  # in vain, by address

    # ---- statistics ----

    def count(self, **counts: int) -> None:
        """Adds to the statistics."""
        with self._lock:
            for what, more in counts.items():  # Counter.update takes half as long again, twice a read
                self._counts[what] += more

    def statistics(self) -> PoolStatistics:
        """See `Pool.statistics`."""
        roster, uses = self._roster, self._roster.uses
        out = {self._address(server): why for server, why in self.health.out().items()}
        with self._lock:
            counts = self._counts + Counter(suspects=sum(use.suspects for use in uses))
        return PoolStatistics(
            lanes=dict(roster.lanes),
            lane_reasons=dict(roster.reasons),
            local_extents=sum(use.extents for use in uses),
            local_bytes=sum(use.bytes for use in uses),
            local_writes=sum(use.writes for use in uses),
            out=out,
            **counts,
        )

    def _address(self, server: str) -> str:
        members = self._roster.current
        member = members.by_id.get(server) if members else None
        return member.address if member else server

    def _health_changed(self, server: str, why: str) -> None:
        if why:
            self.count(put_out=1)
            _log.warning("reads pass over the server %s: %s", self._address(server), why)
        else:
            _log.warning("the server %s is read from again", self._address(server))

    def forget_copies(self, namespace: str) -> None:
        """The save of that namespace isn't being written any more."""
        self.without_copy = {one for one in self.without_copy if one[0] != namespace}

    # ---- members ----

    def first_members(self, retry: Retry, deadline: float) -> Members:
        """`members`, tried again while the pool can't be reached."""
        while True:
            try:
                return self.members(deadline)
            except TransientError as error:
                if not self.wait(retry, error, None, deadline):
                    raise

    def members(self, deadline: float) -> Members:
        """The servers, found out at first use. Raises ServerUnavailable if none answers."""
        return self._roster.members(deadline)

    def addresses(self, timeout_s: float, *, opens: bool = True) -> dict[str, str]:
        """All servers' addresses by their ids. Raises ServerUnavailable if there is one that hasn't said its id.

        And, unless it `opens` the pool, if that is closed.
        """
        members = self._members(timeout_s, opens=opens)
        found = {server_id: member.address for server_id, member in members.by_id.items()}
        if strangers := sorted(set(members.missing) - set(found.values())):
            raise ServerUnavailable(
                f"{', '.join(strangers)} can't be reached, so it can't be told what lies there",
                server=", ".join(strangers),
            )
        return found

    def placement(self, servers: Iterable[str], timeout_s: float, *, opens: bool = True) -> Placement:
        """Which of `servers`, by their ids, owns what. Raises ServerUnavailable if none answers; `opens` as above."""
        members = self._members(timeout_s, opens=opens)
        return Placement(servers, {id_: member.weight for id_, member in members.by_id.items()})

    def _members(self, timeout_s: float, *, opens: bool) -> Members:
        if not opens:
            return self._roster.known()
        deadline = time.monotonic() + timeout_s
        return self.first_members(Retry(self.budget, deadline), deadline)

    @property
    def current(self) -> Members | None:
        """The servers as last seen."""
        return self._roster.current

    def refresh(self, seen: Members | None, deadline: float) -> Members:
        """Asks anew who serves, unless another thread has done so since `seen`."""
        return self._roster.refresh(seen, deadline)

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
            self.health.failed(member.server_id)
            raise
        self.health.answered(member.server_id)
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
                members = self.current or members
                left = [server for server in left if server in members.by_id]

    def ask_all(self, method: str, request: Any, *, timeout_s: float) -> list[Asked]:
        """One control call to every server, side by side: the replies of those that answer.

        The others are `silent` from then on, and most often waited for only shortly. Raises an error of theirs if all
        are.
        """
        deadline = time.monotonic() + timeout_s
        members = self.first_members(Retry(self.budget, deadline), deadline)
        with Threads(ASKED_AT_ONCE, name="torchcache-ask") as threads:
            asked = [
                threads.submit(self._ask_in_time, member, members, method, request, deadline)
                for member in members.by_id.values()
            ]
            outcomes = [one.result() for one in asked]
        known = (self.current or members).by_id
        self._roster.silent.update(  # once all are through: who meets servers anew begins a new list
            known.get(member.server_id, member).address
            for member, outcome in zip(members.by_id.values(), outcomes, strict=True)
            if isinstance(outcome, TransientError)
        )
        answers = [one for one in outcomes if isinstance(one, Asked)]
        errors = [one for one in outcomes if isinstance(one, TransientError)]
        try:
            if not answers and errors:
                raise errors[-1]
            return answers
        finally:
            del asked, outcomes, errors  # an error holds this frame

    def _ask_in_time(
        self, member: Member, members: Members, method: str, request: Any, deadline: float
    ) -> Asked | TransientError | None:
        """The reply, or why there is none; None if the server has left the pool meanwhile."""
        address = member.address
        is_brief = address in self._roster.silent and (self._looks[address] + 1) % PATIENT_LOOK != 0
        until = deadline
        if len(members.by_id) > 1:
            until = min(deadline, time.monotonic() + (INFO_AGAIN_S if is_brief else INFO_S))
        retry = Retry(self.budget, until)
        while True:
            try:
                answer = self.ask_member(member, method, request, until)
            except TransientError as error:
                if is_brief or not self.wait(retry, error, members, until):
                    self._looks[address] += 1
                    return error
            else:
                self._looks.pop(address, None)
                self._roster.silent.discard(address)
                return answer
            members = self.current or members
            if (known := members.by_id.get(member.server_id)) is None:
                return None
            member = known
            # Another server that hangs may have taken all of the time to look anew.
            until = max(until, min(deadline, time.monotonic() + INFO_AGAIN_S))

    def silent(self) -> list[str]:
        """The addresses of servers that did not answer when they were last asked how, or who, they are."""
        members, silent = self.current, self._roster.silent
        if members is None:
            return []
        known = [*(member.address for member in members.by_id.values()), *members.missing]
        return [address for address in dict.fromkeys(known) if address in silent]

    def wait(self, retry: Retry, error: TorchCacheError, members: Members | None, deadline: float) -> bool:
        """Whether to try again after `error`; if so it has paused, and looked anew who serves."""
        if not retry.again(error):
            self.count(retries_refused=retry.refused)
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
        self._roster.close()
