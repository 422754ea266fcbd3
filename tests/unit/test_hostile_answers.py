"""What a server that means harm may send on the flight lane ends in an error, with bounded memory, by the deadline."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from tests.conformance.standin import Script, StandIn
from torchcache.errors import DeadlineExceeded, IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.lanes.access import Access
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.flight import MAX_BATCH_BYTES, FlightLane
from torchcache.model import Extent, ObjectId
from torchcache.wire.codec import Piece

DATA = os.urandom(100_000)


def giant(_: Any, pieces: list[Piece]) -> Iterator[Piece]:
    """One message larger than any that is allowed."""
    yield pieces[0]._replace(data=pa.py_buffer(bytes(MAX_BATCH_BYTES + 1)))


def endless(_: Any, pieces: list[Piece]) -> Iterator[Piece]:
    """The right answer, again and again."""
    return itertools.repeat(pieces[0])


over = threading.Event()


def silent(_: Any, pieces: list[Piece]) -> Iterator[Piece]:
    """Half of nothing, and then no more until the client has gone."""
    over.wait(60)
    return iter(pieces)


def another(_: Any, pieces: list[Piece]) -> Iterator[Piece]:
    """An extent that nobody asked for."""
    yield pieces[0]._replace(extent=7)


@pytest.mark.hostile("pages")
@pytest.mark.parametrize(
    ("answer", "kinds", "deadline_s"),
    [
        (giant, (ServerUnavailable, IntegrityError), 60.0),
        (endless, (IntegrityError, DeadlineExceeded), 1.0),
        (silent, (DeadlineExceeded,), 1.0),
        (another, (IntegrityError,), 60.0),
    ],
)
def test_it_ends_in_an_error(
    answer: Any, kinds: tuple[type[TorchCacheError], ...], deadline_s: float
) -> None:
    over.clear()
    with StandIn(Script(tamper=answer)) as server:
        info = server.put(ObjectId("samples", "a", "1"), DATA)
        lane = FlightLane("127.0.0.1", server.data_port, server="here", access=Access(token="secret"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (outcome,) = lane.read([Extent(info)], [None], ReadOptions(), deadline=time.monotonic() + deadline_s)
        over.set()
        lane.close()
    assert isinstance(outcome, kinds), outcome
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 8 * MAX_BATCH_BYTES, "the stand-in is in this process too"
