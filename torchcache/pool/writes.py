"""Writing: objects to their owners, cut into calls of bounded size, several servers side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from torchcache.errors import OutOfSpace, ServerUnavailable, TorchCacheError, TransientError
from torchcache.lanes.base import Buffer, Passing
from torchcache.model import ObjectId
from torchcache.placement import placement_key
from torchcache.pool.buffers import WriteCall, write_calls
from torchcache.pool.members import Members
from torchcache.pool.retry import Retry
from torchcache.pool.session import Session
from torchcache.threads import Threads

_log = logging.getLogger(__name__)

Objects = Sequence[tuple[ObjectId, Sequence[Buffer]]]


class Writing:
    """One write. `timeout_s` bounds each of its calls.

    With `servers`, ids, all of it goes to each of them. The first must take it; of the others one that doesn't is
    warned of and left out; unless `all_copies`, if it hasn't the room. `passing`: of the one object that is written.
    """

    def __init__(
        self,
        session: Session,
        namespace: str,
        *,
        durable: bool,
        timeout_s: float,
        servers: Sequence[str] = (),
        all_copies: bool = False,
        passing: Passing | None = None,
    ) -> None:
        self._session = session
        self._servers = servers
        self._all_copies = all_copies
        self._passing = passing
        self._namespace = namespace
        self._durable = durable
        self._timeout_s = timeout_s

    def run(self, objects: Objects) -> None:
        """Stores `objects`. Raises the first error; what was stored by then stays."""
        if self._servers:
            for call in write_calls(objects, self._passing):
                self._write_copies(call)
            return
        deadline = time.monotonic() + self._timeout_s
        members = self._session.first_members(Retry(self._session.budget, deadline), deadline)
        by_owner: dict[str, list[tuple[ObjectId, Sequence[Buffer]]]] = {}
        for id_, parts in objects:
            owner = self._session.ordering.owner(placement_key(id_, 0), members)
            by_owner.setdefault(owner, []).append((id_, parts))
        if len(by_owner) <= 1:
            for group in by_owner.values():
                self._write_group(group)
            return
        with Threads(len(by_owner), name="torchcache-write") as threads:
            for done in [threads.submit(self._write_group, group) for group in by_owner.values()]:
                done.result()

    def _write_copies(self, call: WriteCall) -> None:
        first, *others = self._servers
        others = [one for one in others if (self._namespace, one) not in self._session.without_copy]
        if not others:
            self._write_call(call, first)
            return
        with Threads(len(others), name="torchcache-copy") as threads:
            copies = [threads.submit(self._write_copy, call, server) for server in others]
            self._write_call(call, first)
            for copy in copies:
                copy.result()

    def _write_copy(self, call: WriteCall, server: str) -> None:
        try:
            self._write_call(call, server, patient=False)
        except TorchCacheError as error:
            if self._all_copies and isinstance(error, OutOfSpace):
                raise
            self._session.without_copy.add((self._namespace, server))
            _log.warning("%s gets no copy at server %s: %s", self._namespace, server, error)

    def _write_group(self, objects: Objects) -> None:
        for call in write_calls(objects, self._passing):
            self._write_call(call)

    def _write_call(self, call: WriteCall, server: str = "", *, patient: bool = True) -> None:
        """One do_put, to `server` if that is given, tried again while its error is transient.

        A computed sample may go to the next server when its owner can't be reached; a file of a save may not, since
        all of a save must lie on the server that commits it. Unless `patient`, one that can't be reached isn't waited
        for.
        """
        deadline = time.monotonic() + self._timeout_s
        retry = Retry(self._session.budget, deadline)
        first = call.objects[0].id
        while True:
            members = self._session.first_members(retry, deadline)
            try:
                order = [server] if server else self._order(first, members)
                self._try_in_order(call, members, order, deadline)
                return
            except TransientError as error:
                if isinstance(error, ServerUnavailable) and not patient:
                    raise
                if not self._session.wait(retry, error, members, deadline):
                    raise

    def _order(self, id_: ObjectId, members: Members) -> list[str]:
        ordering, key = self._session.ordering, placement_key(id_, 0)
        return [ordering.owner(key, members)] if id_.is_save else ordering.order(key, members)

    def _try_in_order(self, call: WriteCall, members: Members, order: Sequence[str], deadline: float) -> None:
        for server in order:
            self._session.count(write_calls=1)
            try:
                written = members.known(server).lane.write(
                    self._namespace, call.objects, call.rows, durable=self._durable, deadline=deadline
                )
            except ServerUnavailable as error:
                self._session.health.failed(server)
                failure = error
                continue
            self._session.health.answered(server)
            self._session.budget.earn()
            self._session.count(written_bytes=written)
            return
        raise failure
