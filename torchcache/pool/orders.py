"""The calls by which a reader tells servers its order, and has them fetch ahead of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchcache.errors import ServerUnavailable, TorchCacheError
from torchcache.lanes.flight import object_refs
from torchcache.marks import Marks
from torchcache.model import ObjectInfo
from torchcache.pool.session import Session
from torchcache.wire.status import decode_error
from torchcache.wire.v1 import cache_pb2

CALL_S: Final = 10.0
"""These calls wait for nothing on the server."""

PIECE_CHUNKS: Final = 250_000
"""Of an order in one message: 3 MB."""

State = Literal["here", "coming", "later", "read", "failed"]

_STATES: Final[dict[int, State]] = {
    cache_pb2.AHEAD_STATE_HERE: "here",
    cache_pb2.AHEAD_STATE_COMING: "coming",
    cache_pb2.AHEAD_STATE_LATER: "later",
    cache_pb2.AHEAD_STATE_READ: "read",
    cache_pb2.AHEAD_STATE_FAILED: "failed",
}


class OrderKey(NamedTuple):
    """Whose order of what. `order` is the reader's id: up to 64 letters, digits, - and _."""

    namespace: str
    order: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldOrder:
    """One epoch of one reader's order: chunk i is read by sample number `positions[i]`, ascending, of `length`.

    `running`: the epoch runs, or is the next that does.
    """

    key: OrderKey
    epoch: int
    length: int
    marks: Marks
    positions: NDArray[np.uint32]
    running: bool


class AheadChunk(NamedTuple):
    """A chunk to be fetched ahead, read by sample number `position`."""

    object: ObjectInfo
    chunk: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAhead:
    """How it is with the chunks that were asked for, `errors` by their places; where the server takes the reader to be.

    "later": all there is room for is needed sooner, or enough is ahead. "read": its time is over. `position` is -1
    before the epoch begins. `ahead_bytes` were fetched for the order and not yet read.
    """

    states: Sequence[State]
    errors: dict[int, TorchCacheError]
    epoch: int
    position: int
    ahead_bytes: int


def tell(session: Session, server: str, told: ToldOrder) -> None:
    """See `Pool.tell_order`."""
    for request in _pieces(told):
        _ask(session, server, "TellOrder", request)


def stage(
    session: Session,
    server: str,
    key: OrderKey,
    epoch: int,
    chunks: Sequence[AheadChunk],
    *,
    running: int | None,
) -> StagedAhead | None:
    """See `Pool.stage_ahead`."""
    refs, numbers = object_refs([chunk.object for chunk in chunks])
    request = cache_pb2.StageAheadRequest(
        namespace=key.namespace,
        order=key.order,
        epoch=epoch,
        objects=refs,
        object=numbers,
        chunk=[chunk.chunk for chunk in chunks],
        position=[chunk.position for chunk in chunks],
        running=running,
    )
    reply = _ask(session, server, "StageAhead", request)
    if not reply.known:
        return None
    states = [_STATES.get(state, "later") for state in reply.state][: len(chunks)]
    failed = [at for at, state in enumerate(states) if state == "failed"]
    errors = {at: decode_error(text) for at, text in zip(failed, reply.errors, strict=False)}
    return StagedAhead(
        states=states,
        errors=errors,
        epoch=reply.epoch,
        position=reply.position,
        ahead_bytes=reply.ahead_bytes,
    )


def forget(session: Session, server: str, key: OrderKey) -> None:
    """See `Pool.forget_order`."""
    request = cache_pb2.ForgetOrderRequest(namespace=key.namespace, order=key.order)
    _ask(session, server, "ForgetOrder", request)


def _pieces(told: ToldOrder) -> Iterator[cache_pb2.TellOrderRequest]:
    for first in range(0, len(told.marks), PIECE_CHUNKS):
        piece = slice(first, first + PIECE_CHUNKS)
        yield cache_pb2.TellOrderRequest(
            namespace=told.key.namespace,
            order=told.key.order,
            epoch=told.epoch,
            length=told.length,
            total=len(told.marks),
            first=first,
            marks=told.marks[piece].astype("<u8").tobytes(),
            positions=told.positions[piece].astype("<u4").tobytes(),
            running=told.running,
        )


def _ask(session: Session, server: str, method: str, request: Any) -> Any:
    """The server's reply, asked once: whoever tells orders tries again by himself."""
    deadline = time.monotonic() + CALL_S
    members = session.current  # never found anew: that would start an embedded pool that was just closed
    if members is None:
        raise ServerUnavailable("the pool was closed", server=server)
    member = members.by_id.get(server)
    if member is None:
        raise ServerUnavailable(f"the server {server} is no longer in the pool", server=server)
    return session.ask_member(member, method, request, deadline).reply
