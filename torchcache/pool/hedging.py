"""The calls of a read, side by side: a late one is asked of the next server too, a silent one is given up.

One thread decides, the one that reads; each call has a thread of its own, for as long as it takes. Only the first of
a call's attempts writes into the reader's buffers. A hedge brings its bytes in memory of its own; they are copied once
the first is ended, and writes nothing any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Final

from torchcache.errors import ServerUnavailable, TorchCacheError
from torchcache.lanes.base import Outcome, ReadOptions
from torchcache.lanes.copying import copy
from torchcache.lanes.flight import FlightLane
from torchcache.lanes.watch import Watch
from torchcache.model import Extent
from torchcache.pool.members import Members
from torchcache.pool.probing import payload_size
from torchcache.pool.routing import Part
from torchcache.pool.session import Session
from torchcache.wire.liveness import HEARTBEAT_S

HEDGED_BYTES: Final = 64 * 1024 * 1024
"""What is asked for twice at most: the second answer takes memory."""

BEAT_LIMIT_S: Final = 2.5 * HEARTBEAT_S
"""How long a server that has spoken may be silent."""

MOST_TOLD: Final = 64
"""Servers that are passed over, of which another is told: the most that it takes."""

GRACE_S: Final = 0.1
"""Silence has to go on for so long after it was noticed: it may have been us who slept."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One call to one server, for the extents at `places` among those of its `Call`."""

    server: str
    places: Sequence[int]
    extents: Sequence[Extent]
    into: Sequence[memoryview | None]
    options: ReadOptions
    watch: Watch | None = None
    size: int = 0
    doubted: float = 0.0  # the last sign before the silence that was noticed
    is_patient: bool = False  # its silence doesn't end it
    outcomes: list[Outcome] | None = None

    @property
    def brought_all(self) -> bool:
        return self.outcomes is not None and all(isinstance(o, memoryview) for o in self.outcomes)

    def end(self) -> None:
        """Nothing more is written into its buffers."""
        if self.watch is not None:
            self.watch.end()


@dataclass(slots=True, eq=False)
class Call:
    """What one server is asked for, by its first attempt; `hedges` ask others. `outcomes` is set when it is over."""

    parts: Sequence[Part]
    first: Attempt
    hedge_s: float = float("inf")  # how long the first is waited for alone
    hedges: Sequence[Attempt] = ()
    outcomes: list[Outcome] | None = None

    def hedge_at(self, now: float) -> float:
        """When others are to be asked too: what was not asked for yet isn't late."""
        watch = self.first.watch
        return min(watch.asked, now) + self.hedge_s if watch is not None else float("inf")

    @property
    def attempts(self) -> Iterable[Attempt]:
        return (self.first, *self.hedges)

    def settle(self) -> bool:
        """Takes the outcomes, if it can be known by now what they are. Whether the hedges won."""
        mine = self.first.outcomes
        hedged = all(hedge.outcomes is not None for hedge in self.hedges)
        if mine is not None and not any(isinstance(outcome, ServerUnavailable) for outcome in mine):
            self.outcomes = mine
        elif self.hedges and all(hedge.brought_all for hedge in self.hedges):
            self.first.end()
            self.outcomes = self._with_hedges([None] * len(self.parts))
            return True
        elif mine is not None and hedged:
            self.outcomes = self._with_hedges(mine)
        return False

    def _with_hedges(self, mine: Sequence[Outcome | None]) -> list[Outcome]:
        """`mine`, and where it has no bytes those of the hedges. The first attempt must have ended."""
        outcomes = list(mine)
        for hedge in self.hedges:
            for place, brought in zip(hedge.places, hedge.outcomes or (), strict=True):
                if isinstance(brought, memoryview) and not isinstance(outcomes[place], memoryview):
                    outcomes[place] = _landed(brought, self.first.into[place])
        return [outcome for outcome in outcomes if outcome is not None]


def _landed(brought: memoryview, into: memoryview | None) -> memoryview:
    if into is None:
        return brought
    target = into[: len(brought)]
    copy(brought, target)
    return target


class Calls:
    """Asks servers on behalf of one read."""

    def __init__(self, session: Session, members: Members, options: ReadOptions, deadline: float) -> None:
        self._session = session
        self._members = members
        passed_over = session.health.reasons()[:MOST_TOLD]
        self._options = replace(options, passed_over=passed_over) if passed_over else options
        self._deadline = deadline
        self._ended: SimpleQueue[tuple[Call, Attempt, list[Outcome] | BaseException]] = SimpleQueue()

    def run(self, groups: Sequence[Sequence[Part]]) -> list[list[Outcome]]:
        """Asks for each group of parts the server that they share; the outcomes of their parts."""
        calls = [self._call(parts) for parts in groups]
        # What can't be hedged needs nobody who waits for it.
        here = None if any(call.first.watch for call in calls) else calls[0]
        try:
            for call in calls:
                if call is not here:
                    self._start(call, call.first)
            if here is not None:
                here.first.outcomes = here.outcomes = self.ask(here.first)
            self._supervise([call for call in calls if call is not here])
        finally:
            for call in calls:
                for attempt in call.attempts:
                    if attempt.outcomes is None:
                        attempt.end()
        return [call.outcomes or [] for call in calls]

    def ask(self, attempt: Attempt) -> list[Outcome]:
        """One call to one server; what it says of its health is kept."""
        session, server, watch = self._session, attempt.server, attempt.watch
        health, count = session.health, len(attempt.extents)
        session.count(read_calls=1, suspects=count if attempt.options.suspect else 0)
        lane = self._members.by_id[server].lane
        began = time.monotonic()
        arguments = (attempt.extents, attempt.into, attempt.options)
        try:
            if watch is not None and isinstance(lane, FlightLane):
                outcomes = lane.read(*arguments, deadline=self._deadline, watch=watch)
            else:
                outcomes = lane.read(*arguments, deadline=self._deadline)
        except TorchCacheError as error:
            # Nothing could be asked: the process may not, or the token can't be read.
            return [error] * count
        failed = [outcome for outcome in outcomes if not isinstance(outcome, memoryview)]
        if any(isinstance(error, ServerUnavailable) for error in failed):
            # Some may have come by another lane. What we ended ourselves says nothing.
            if watch is None or not (watch.ended and watch.spoke):
                health.failed(server)
        elif watch is None or not watch.ended:
            health.answered(server, began)
            session.budget.earn()
            if watch is not None and not watch.filling and not failed:
                health.timed(server, attempt.size, watch.asked)
        return outcomes

    # ---- beginning ----

    def _call(self, parts: Sequence[Part]) -> Call:
        part = parts[0]
        extents, into = [part.extent for part in parts], [part.into for part in parts]
        options = replace(self._options, suspect=True) if part.suspect else self._options
        attempt = Attempt(part.server, range(len(parts)), extents, into, options)
        others = len(self._members.by_id) > 1
        if others and isinstance(self._members.by_id[part.server].lane, FlightLane):
            attempt.watch = Watch()
        return Call(parts, attempt)

    def _start(self, call: Call, attempt: Attempt) -> None:
        """In a thread of its own, a daemon only if the reader is one: the interpreter should not end under a call."""
        if attempt.watch is not None:
            attempt.size = payload_size(attempt.extents)
        if attempt.watch is not None and attempt is call.first:
            self._session.hedges.earn(len(call.parts))
            if not attempt.options.suspect and attempt.size <= HEDGED_BYTES:
                call.hedge_s = self._session.health.hedge_s(attempt.server, attempt.size)

        def work() -> None:
            try:
                self._ended.put((call, attempt, self.ask(attempt)))
            except BaseException as error:  # noqa: BLE001 - raised where the read waits
                self._ended.put((call, attempt, error))

        threading.Thread(target=work, name="torchcache-read").start()

    # ---- watching ----

    def _supervise(self, calls: Sequence[Call]) -> None:
        while waiting := [call for call in calls if call.outcomes is None]:
            now = time.monotonic()
            due = min(self._due(call, now) for call in waiting)
            try:
                call, attempt, outcomes = self._ended.get(timeout=max(0.0, min(due - now, 3600.0)))
            except Empty:
                for call in waiting:
                    self._look(call)
                continue
            if isinstance(outcomes, BaseException):
                raise outcomes
            if attempt.outcomes is None:  # else it was given up
                attempt.outcomes = outcomes
            self._settle(call)

    def _settle(self, call: Call) -> None:
        if call.outcomes is not None:
            return
        first = call.first
        if call.settle():
            self._session.count(hedges_won=1)
            if first.watch is not None:
                self._session.health.beaten(first.server, first.size, first.watch.asked)
        if call.hedges and call.outcomes is not None:
            if call.outcomes is first.outcomes:
                self._session.hedges.in_vain()
            else:
                self._session.hedges.helped()

    def _due(self, call: Call, now: float) -> float:
        """When to look at a call again."""
        limits = [self._silent_at(one, now) for one in call.attempts if one.outcomes is None]
        return min([call.hedge_at(now), *limits])

    def _silent_at(self, attempt: Attempt, now: float) -> float:
        """From when on the attempt's server is taken for silent, unless it speaks meanwhile."""
        watch = attempt.watch
        if watch is None or attempt.is_patient:
            return float("inf")
        limit_s = BEAT_LIMIT_S
        if not watch.spoke:
            limit_s = self._session.health.silence_s(attempt.server, attempt.size)
        grace_s = GRACE_S if attempt.doubted == watch.last_sign else 0.0
        return min(watch.last_sign, now) + limit_s + grace_s

    def _look(self, call: Call) -> None:
        now = time.monotonic()
        for attempt in call.attempts:
            if (
                attempt.outcomes is None
                and attempt.watch is not None
                and now >= self._silent_at(attempt, now)
            ):
                if attempt.doubted != attempt.watch.last_sign:
                    attempt.doubted = attempt.watch.last_sign
                else:
                    self._give_up(call, attempt)
        if call.outcomes is None and now >= call.hedge_at(now):
            call.hedge_s = float("inf")
            self._hedge(call)

    def _give_up(self, call: Call, attempt: Attempt) -> None:
        if not self._session.health.silent(attempt.server):
            # It is one of too many: they, or we, have other troubles. The connection's own pings will tell.
            attempt.is_patient = True
            return
        attempt.end()
        address = self._members.by_id[attempt.server].address
        error = ServerUnavailable(
            "the server gives no sign of life", server=address, request_id=attempt.options.request_id or None
        )
        attempt.outcomes = [error] * len(attempt.extents)
        self._settle(call)

    def _hedge(self, call: Call) -> None:
        """Asks the next servers in order for the same, if that is likely to help and not too much."""
        first = call.first
        if first.outcomes is not None or first.watch is None or first.watch.filling:
            return
        health = self._session.health
        places: dict[str, list[int]] = {}
        for place, part in enumerate(call.parts):
            following = [server for server in part.order[part.turn + 1 :] if not health.is_out(server)]
            if not following:
                return
            places.setdefault(following[0], []).append(place)
        if not self._session.hedges.spend(len(call.parts)):
            self._session.count(hedges_refused=1)
            return
        self._session.count(hedges=1, hedged_extents=len(call.parts))
        call.hedges = [self._second(first, server, where) for server, where in places.items()]
        for hedge in call.hedges:
            self._start(call, hedge)

    def _second(self, first: Attempt, server: str, places: Sequence[int]) -> Attempt:
        extents = [first.extents[place] for place in places]
        watch = Watch() if isinstance(self._members.by_id[server].lane, FlightLane) else None
        options = replace(first.options, lend=False, hedge=True)
        return Attempt(server, places, extents, [None] * len(places), options, watch)
