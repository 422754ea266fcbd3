"""Which lane bytes travel by to a server: the best that works, unless one is asked for."""

from __future__ import annotations

import logging
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from torchcache.errors import ConfigurationError
from torchcache.lanes.base import Lane
from torchcache.lanes.local import LocalLane
from torchcache.lanes.local_store import local_store
from torchcache.lanes.local_use import UseReports
from torchcache.lanes.local_writing import LocalWriter
from torchcache.pool.control import ControlClient
from torchcache.wire.v1 import cache_pb2

LaneName = Literal["auto", "local", "flight"]

_NAMES: Final = get_args(LaneName)
_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A lane; `reason` says why it isn't the local one, empty if it is or wasn't wanted."""

    lane: Lane
    reason: str = ""


def lane_name(text: str) -> LaneName:
    """`text`, if it names a lane or "auto". Raises ConfigurationError."""
    if text not in _NAMES:
        raise ConfigurationError(f"lane={text!r}: give {', '.join(map(repr, _NAMES))}")
    return cast(LaneName, text)


def choose_lane(
    wanted: LaneName,
    info: cache_pb2.InfoReply,
    flight: Lane,
    control: ControlClient,
    *,
    before: Lane | None,
    uses: list[UseReports],
) -> Choice:
    """The lane to the server that gave `info`.

    `before` is the one there was until now. `uses` gets what a new local one counts.

    Raises ConfigurationError if "local" is wanted and can't be.
    """
    if wanted == "flight":
        return Choice(flight)
    try:
        store = local_store(info.local_store, info.server_id)
    except ConfigurationError as error:
        if wanted == "local":
            raise ConfigurationError(
                f"the local lane can't be used: {error.message}", server=control.address
            ) from error
        _log.debug("%s is read over the network: %s", control.address, error.message)
        return Choice(flight, error.message)
    if isinstance(before, LocalLane) and before.store is store:
        return Choice(before.behind(flight))

    def send(request: cache_pb2.ReportUseRequest, deadline: float) -> Any:
        return control.call("ReportUse", request, deadline=deadline)

    uses.append(UseReports(store, send))
    writer = LocalWriter(control, store.path, server=control.address)
    return Choice(LocalLane(store, flight, writer=writer, reports=uses[-1]))
