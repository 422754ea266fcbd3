"""The servers of a pool as one process meets them: asked who they are, looked for again, kept while they are away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

from torchcache.errors import ServerUnavailable, TorchCacheError, TransientError
from torchcache.lanes.flight import FlightLane
from torchcache.lanes.local_use import UseReports
from torchcache.pool.control import ControlClient
from torchcache.pool.health import Health
from torchcache.pool.lane_choice import LaneName, choose_lane
from torchcache.pool.members import Endpoint, Member, Members, MemberSource, UnderStoreName
from torchcache.threads import Threads
from torchcache.wire.v1 import cache_pb2

_log = logging.getLogger(__name__)

INFO_S: Final = 5.0
"""How long one server may take to say who it is."""

ASKED_AT_ONCE: Final = 32

INFO_AGAIN_S: Final = 1.0
"""The same, of one that was silent when it was last asked."""

LOOK_AGAIN_S: Final = 5.0
"""How often servers that did not answer are asked again."""


class Roster:
    """Thread-safe. `asked` is called for each server that said who it is.

    `lanes` and `reasons` are of all servers there were, by their addresses; `uses` what their local lanes count.
    `silent` are the addresses of those that didn't answer when they were last asked how or who they are.
    """

    def __init__(
        self, source: MemberSource, lane: LaneName, health: Health, asked: Callable[[], object]
    ) -> None:
        self._source = source
        self._wanted_lane = lane
        self._health = health
        self._asked = asked
        self._lock = threading.Lock()
        self._resolving = threading.Lock()
        self._members: Members | None = None
        self._looking = False
        self._closed = False
        self.lanes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.uses: list[UseReports] = []
        self.silent: set[str] = set()

    @property
    def current(self) -> Members | None:
        """The servers as last seen."""
        return self._members

    def members(self, deadline: float) -> Members:
        """The servers, found out at first use. Raises ServerUnavailable if none answers."""
        found = self._members
        if found is None:
            self._closed = False  # it is used again, and not to be closed behind a look that was under way
            return self.refresh(found, deadline)
        self._look_in_time(found)
        return found

    def known(self) -> Members:
        """The servers as last seen. Raises ServerUnavailable if the pool isn't open, and leaves it so."""
        found = self._members
        if found is None:
            raise ServerUnavailable("the pool was closed")
        self._look_in_time(found)
        return found

    def _look_in_time(self, found: Members) -> None:
        holds_s = LOOK_AGAIN_S if found.missing else self._source.holds_s
        if holds_s is not None and time.monotonic() - found.seen_at > holds_s:
            self._look_behind(found, self._look)

    def meet_again(self) -> None:
        """A server isn't the one it was: it has started on other data, or its address was given to another."""
        if (seen := self._members) is not None:
            self._look_behind(seen, self.refresh)

    def _look_behind(self, seen: Members, look: Callable[[Members, float], object]) -> None:
        """Looks who serves by now, in a thread: the call that noticed it goes on with those it knows."""
        with self._lock:
            if self._looking:
                return
            self._looking = True

        def work() -> None:
            try:
                look(seen, time.monotonic() + INFO_S)
            except TorchCacheError as error:
                _log.warning("the pool's servers stay those that were known: %s", error)
                self._restamp(seen)
            finally:
                self._looking = False
                if self._closed:
                    self.close()

        threading.Thread(target=work, name="torchcache-members", daemon=True).start()

    def _look(self, seen: Members, deadline: float) -> None:
        """Meets the servers again if there are others than those `seen`, or of other weights, or some were missing."""
        known = {member.address: member.weight for member in seen.by_id.values()}
        announced = (
            {} if seen.missing else {e.address: e.weight for e in self._source.resolve(deadline=deadline)}
        )
        same = known.keys() == announced.keys()
        if same and all(weight in (0.0, known[address]) for address, weight in announced.items()):
            self._restamp(seen)
        else:
            self.refresh(seen, deadline)

    def _restamp(self, seen: Members) -> None:
        with self._resolving:
            if self._members is seen:
                self._members = replace(seen, seen_at=time.monotonic())

    def refresh(self, seen: Members | None, deadline: float) -> Members:
        """Asks anew who serves, unless another thread has done so since `seen`.

        Raises ServerUnavailable if none answers, or another thread is still asking at the deadline.
        """
        if not self._resolving.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ServerUnavailable(f"the servers of {self._source.description} are still being looked for")
        try:
            if self._members is not None and self._members is not seen:
                return self._members
            before = self._members
            found = self._members = self._find(deadline, before)
            self.silent = set(found.missing)
            self._health.members(found.by_id)
        finally:
            self._resolving.release()
        addresses = {member.address for member in found.by_id.values()}
        for member in before.by_id.values() if before else ():
            if member.address not in addresses:
                member.close()
        with self._lock:
            for member in found.by_id.values():
                self.lanes[member.address] = member.lane.name
                self.reasons[member.address] = member.lane_reason
        return found

    def _find(self, deadline: float, before: Members | None) -> Members:
        """Meets every server. One that was met before keeps its place while it is away: owners must not change."""
        known = {member.address: member for member in before.by_id.values()} if before else {}
        by_id: dict[str, Member] = {}
        missing: list[str] = []
        reason = ""
        for endpoint, asked in self._ask_who(self._source.resolve(deadline=deadline), deadline):
            try:
                member = self._member(endpoint, *asked.result(), known.get(endpoint.address))
                by_id[member.server_id] = member
            except TransientError as error:
                missing.append(endpoint.address)
                reason = f": {error.message}"
                if member_before := known.get(endpoint.address):
                    by_id[member_before.server_id] = member_before
                    self._health.failed(member_before.server_id)
            finally:
                del asked  # it holds the error, that holds this frame, and that all who called
        if not by_id:
            advice = (
                "" if self._source.embedded else "; is this the address of a `torchcache serve` that runs?"
            )
            raise ServerUnavailable(
                f"no server of the pool {self._source.description} can be reached{reason}{advice}",
                server=", ".join(missing) or None,
            )
        return Members(by_id, tuple(missing))

    def _ask_who(
        self, endpoints: Sequence[Endpoint], deadline: float
    ) -> list[tuple[Endpoint, Future[tuple[ControlClient, cache_pb2.InfoReply]]]]:
        """Asks all of them who they are, side by side: one that swallows packets costs its time only once."""
        until = min(deadline, time.monotonic() + INFO_S)

        def ask(endpoint: Endpoint) -> tuple[ControlClient, cache_pb2.InfoReply]:
            control = ControlClient(endpoint.address, self._source.access)
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
        self._asked()
        self._health.answered(info.server_id)
        stores = tuple(
            UnderStoreName(s.name, s.uri if s.uri.endswith("/") else s.uri + "/") for s in info.under_stores
        )
        flight = FlightLane(
            endpoint.host,
            info.data_port,
            server=endpoint.address,
            access=self._source.access,
            server_id=info.server_id,
            another=self.meet_again,
        )
        lane, reason = choose_lane(
            self._wanted_lane,
            info,
            flight,
            control,
            before=before.lane if before is not None else None,
            uses=self.uses,
        )
        return Member(info.server_id, control, lane, reason, stores, info.weight)

    def close(self) -> None:
        """Forgets the servers and closes the connections to them."""
        self._closed = True
        members, self._members = self._members, None
        for member in members.by_id.values() if members else ():
            member.close()
