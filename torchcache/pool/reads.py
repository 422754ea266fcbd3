"""Reading: one call a server for all it owns, side by side; what fails there is asked of the next."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from torchcache.errors import IntegrityError, NotResident, ServerUnavailable, TorchCacheError
from torchcache.lanes.base import Outcome, ReadOptions
from torchcache.model import STRIPE_BYTES, Extent, ObjectId
from torchcache.placement import placement_key
from torchcache.pool.buffers import allocate, targets
from torchcache.pool.hedging import Attempt, Calls
from torchcache.pool.probing import probe_those_out
from torchcache.pool.retry import Retry
from torchcache.pool.routing import Order, Part, advance, check_extents, next_step, placed, streams
from torchcache.pool.session import Session
from torchcache.wire.request_ids import new_request_id

_log = logging.getLogger(__name__)

CALL_EXTENTS: Final = 16_384
"""Extents in one call. Well below what a server takes."""

STREAM_BYTES: Final = 2 * STRIPE_BYTES
"""An extent of twice this or more is read by several calls to its server side by side, each of at least so much."""

_CORES: Final = os.cpu_count() or 1
STREAMS: Final = {"local": min(4, _CORES), "flight": max(1, min(4, _CORES // 2))}
"""Calls to one server at a time, by lane. One is bound by the core that copies, or receives, and verifies; with the
flight lane a core at the other end is busy too, which may be of this machine.
"""


def read_held(
    session: Session, server: str, extents: Sequence[Extent], namespace: str, deadline: float
) -> list[Outcome]:
    """See `Pool.read_held`."""
    check_extents(extents)
    members = session.first_members(Retry(session.budget, deadline), deadline)
    member = members.by_id.get(server)
    if member is None or member.address in members.missing:
        address = member.address if member is not None else server
        raise ServerUnavailable(f"the server {address} can't be reached", server=address)
    options = ReadOptions(namespace=namespace, resident_only=True, request_id=new_request_id())
    return member.lane.read(extents, [None] * len(extents), options, deadline=deadline)


class Reading:
    """One read: its parts still open, and the outcomes there are."""

    def __init__(
        self,
        session: Session,
        extents: Sequence[Extent],
        into: Sequence[memoryview] | None,
        options: ReadOptions,
        deadline: float,
    ) -> None:
        check_extents(extents)
        self._session = session
        self._extents = extents
        self._into = targets(extents, into)
        # Whoever is asked, and however often.
        self._options = options if options.request_id else replace(options, request_id=new_request_id())
        self._deadline = deadline
        self._retry = Retry(session.budget, deadline)
        self._members = session.first_members(self._retry, deadline)
        self._outcomes: list[Outcome | None] = [None] * len(extents)
        self._shared: set[int] = set()  # extents that several calls deliver parts of

    def run(self) -> list[Outcome]:
        """Every extent's bytes, or the error it ended with."""
        alone = (
            len(self._members.by_id) == 1
            and len(self._extents) <= CALL_EXTENTS
            and not any(
                info.size >= 2 * STREAM_BYTES and not 0 <= length < 2 * STREAM_BYTES
                for info, _, length in self._extents
            )
        )
        if self._session.health.anyone_out:
            probe_those_out(self._session, self._members, self._extents, self._options)
        parts = self._ask_only_server() if alone else self._plan()
        while parts:
            parts = self._follow_up(self._ask(parts))
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        lengths = [len(outcome) for outcome in outcomes if isinstance(outcome, memoryview)]
        self._session.count(extents=len(lengths), read_bytes=sum(lengths))
        return outcomes

    def _ask_only_server(self) -> list[Part]:
        """Asks the one server there is for everything; returns the parts to ask again: most often there are none."""
        (only,) = self._members.by_id
        numbers = range(len(self._extents))
        answers = self._calls().ask(Attempt(only, numbers, self._extents, self._into, self._options))
        self._outcomes = [answer if isinstance(answer, memoryview) else None for answer in answers]
        failed = [
            (Part(number, self._extents[number], self._into[number], (only,)), answer)
            for number, answer in enumerate(answers)
            if not isinstance(answer, memoryview)
        ]
        return self._follow_up(failed) if failed else []

    def _most_streams(self, server: str) -> int:
        return STREAMS.get(self._members.by_id[server].lane.name, 1)

    def _order(self, object: ObjectId) -> Order:
        """Who is asked for bytes of an object, by placement key."""
        ordering = self._session.ordering
        # Copies of a save aren't only where its key says, and what this machine has needs no network.
        order = ordering.nearest_first if object.is_save else ordering.order
        return partial(order, members=self._members)

    def _plan(self) -> list[Part]:
        parts: list[Part] = []
        for number, (extent, into) in enumerate(zip(self._extents, self._into, strict=True)):
            runs = streams(placed(extent, self._order(extent.object.id)), STREAM_BYTES, self._most_streams)
            if len(runs) == 1:
                parts.append(Part(number, extent, into, runs[0][1]))
            else:
                parts += self._share(number, runs)
        return parts

    def _share(self, number: int, runs: Sequence[tuple[Extent, Sequence[str], int]]) -> list[Part]:
        """The parts of an extent that several calls deliver, into one buffer."""
        extent, into = self._extents[number], self._into[number]
        length = extent.end - extent.offset
        whole = allocate(length) if into is None else into[:length]
        self._shared.add(number)
        self._outcomes[number] = whole.toreadonly() if into is None else whole
        parts = []
        for run, order, stream in runs:
            at = run.offset - extent.offset
            parts.append(Part(number, run, whole[at : at + run.length], order, stream=stream))
        return parts

    def _ask(self, parts: Sequence[Part]) -> list[tuple[Part, Outcome]]:
        """One call a server (and more for what is suspect there, or large), side by side."""
        groups: dict[tuple[str, bool, int], list[Part]] = {}
        for part in parts:
            groups.setdefault((part.server, part.suspect, part.stream), []).append(part)
        asked = [
            group[at : at + CALL_EXTENTS]
            for group in groups.values()
            for at in range(0, len(group), CALL_EXTENTS)
        ]
        answers = self._calls().run(asked)
        return [
            pair
            for call, answer in zip(asked, answers, strict=True)
            for pair in zip(call, answer, strict=True)
        ]

    def _calls(self) -> Calls:
        return Calls(self._session, self._members, self._options, self._deadline)

    def _follow_up(self, answers: Sequence[tuple[Part, Outcome]]) -> list[Part]:
        """Lands what came, and returns the parts to ask again."""
        again: list[Part] = []
        waiting: dict[int, TorchCacheError] = {}
        for part, outcome in answers:
            if isinstance(outcome, memoryview):
                if part.number not in self._shared:
                    self._outcomes[part.number] = outcome
                continue
            if part.suspect and isinstance(outcome, IntegrityError):
                part.damage = outcome
            step = next_step(part, outcome)
            if step == "next" and isinstance(outcome, IntegrityError):
                address = self._members.by_id[part.server].address
                _log.warning(
                    "%s is damaged at %s: another copy is read (request %s)",
                    part.extent.object.id,
                    address,
                    self._options.request_id,
                )
            if step == "final" or time.monotonic() >= self._deadline:
                absent = isinstance(outcome, NotResident)
                self._outcomes[part.number] = part.damage if absent and part.damage else outcome
                continue
            if step == "wait":
                waiting[part.number] = outcome
            advance(part, step)
            again.append(part)
        if waiting:
            self._wait(again, waiting)
        return [part for part in again if not isinstance(self._outcomes[part.number], TorchCacheError)]

    def _wait(self, again: Sequence[Part], waiting: dict[int, TorchCacheError]) -> None:
        """Pauses and looks anew who serves; where that is not worth it, the extents fail with their errors."""
        first = next(iter(waiting.values()))
        if not self._session.wait(self._retry, first, self._members, self._deadline):
            for number, error in waiting.items():
                self._outcomes[number] = error
            return
        self._members = self._session.current or self._members
        for part in again:
            id_ = part.extent.object.id
            order = list(self._order(id_)(placement_key(id_, part.extent.offset)))
            if order != list(part.order):
                part.order, part.turn = order, 0
