"""The copies of a save: which servers hold them, and what those are told. See wire/v1/cache.proto.

A copy that can't be had is no failure of the save: the reservation says how many there should be, the commit how many
there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.pool.members import Members
from torchcache.pool.reports import Reservation
from torchcache.pool.session import Session
from torchcache.threads import Threads
from torchcache.wire.v1 import cache_pb2

_log = logging.getLogger(__name__)

DEFAULT_REPLICAS: Final = 2
PREPARE_S: Final = 60.0
"""The bytes were put and synced before."""

TELL_S: Final = 10.0
"""For what may stay unsaid: the server finds out by itself."""


def replicas_wanted(asked: int | None, members: Members, *, embedded: bool) -> int:
    """How many servers shall hold a save. Raises ConfigurationError if there aren't so many.

    The servers of an embedded pool share a disk: a second copy there would save nothing.
    """
    if asked is None:
        return 1 if embedded else min(DEFAULT_REPLICAS, members.count)
    if asked > members.count:
        raise ConfigurationError(
            f"replicas={asked}, but the pool has {members.count} server{'s' if members.count > 1 else ''}"
        )
    return asked


def holders(
    session: Session, key: bytes, first: str, wanted: int, *, near: Sequence[str] = ()
) -> tuple[str, ...]:
    """Ids of the servers that shall hold a save which `first` commits: those next in order that can be reached, first
    those of them that are among `near`."""
    members = session.current
    order = session.ordering.order(key, members) if members is not None else []
    others = [server for server in order if server != first and not session.health.is_out(server)]
    others.sort(key=lambda server: server not in near)
    return (first, *others[: wanted - 1])


class Replicas:
    """The servers that hold a save, beside the one that commits it."""

    def __init__(self, session: Session, ref: cache_pb2.SaveRef, servers: Sequence[str]) -> None:
        self._session = session
        self._ref = ref
        self.servers = tuple(servers)

    def prepare(self, request: cache_pb2.CommitSaveRequest, of: Reservation, timeout_s: float) -> None:
        """Has each hold its copy, whole and synced; `servers` are those that do, afterwards."""
        if not self.servers:
            return
        prepared = cache_pb2.PrepareCopyRequest(
            save=self._ref,
            files=request.files,
            metadata=request.metadata,
            manifest=request.manifest,
            overwrite=of.overwrite,
            replaceable=of.replaceable,
            writer=of.writer,
            owner=of.servers[0],
        )
        self.servers = self._tell("PrepareCopy", prepared, min(timeout_s, PREPARE_S))

    def confirm(self, committed_unix_s: float) -> None:
        """Tells them that the save is committed."""
        request = cache_pb2.ConfirmCopyRequest(
            save=self._ref, committed_unix_s=committed_unix_s, replicas=1 + len(self.servers)
        )
        self._tell("ConfirmCopy", request, TELL_S)

    def drop(self) -> None:
        """Tells them that the save was given up or deleted."""
        self._tell("DropCopy", cache_pb2.DropCopyRequest(save=self._ref), TELL_S)

    def _tell(self, method: str, request: Any, timeout_s: float) -> tuple[str, ...]:
        """Asks all at a time; those that did it."""
        if not self.servers:
            return ()
        with Threads(len(self.servers), name="torchcache-replicas") as threads:
            told = [threads.submit(self._ask, server, method, request, timeout_s) for server in self.servers]
            return tuple(server for server, done in zip(self.servers, told, strict=True) if done.result())

    def _ask(self, server: str, method: str, request: Any, timeout_s: float) -> bool:
        members = self._session.current
        try:
            if members is None:
                return False
            self._session.ask_member(members.known(server), method, request, time.monotonic() + timeout_s)
        except TorchCacheError as error:
            level = logging.WARNING if method == "PrepareCopy" else logging.INFO
            _log.log(level, "%s of %s at server %s: %s", method, self._ref.path, server, error)
            return False
        return True
