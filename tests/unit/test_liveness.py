"""A server that works long is waited for, with pings so quick that its silence would end the connection meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from torchcache_server.service import data, reading
from torchcache_server.service.admission import Admission
from torchcache_server.service.counters import ServiceCounters
from torchcache_server.service.data import DataServer
from torchcache_server.service.reading import Read
from torchcache_server.service.scopes import Tokens

from tests.unit.service_parts import MemoryStore, ScriptedReadThrough, content, file_object
from torchcache.errors import ServerUnavailable
from torchcache.lanes import flight
from torchcache.lanes.access import Access
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.tokens import parse_tokens

TOKEN = "a-token-of-the-tests"
PING_S = 0.1
BEATS = 12
"""Flight takes the fourth ping in a silence for abuse, and ends the connection."""

TRIES = 50
"""A machine that keeps the server's thread from its beats for so long shows nothing, and it is tried again."""


class Pulse:
    """Counts a server's beats, and says whether it was kept from any of them."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def beat(self) -> int:
        self._at.append(time.monotonic())
        return len(self._at)

    @property
    def kept_up(self) -> bool:
        ends = [*self._at, time.monotonic()]
        return any(later - one > 2 * PING_S for one, later in itertools.pairwise(ends))


class CountedWrites:
    """What answers a write; `enough` is set once it did so `BEATS` times."""

    def __init__(self) -> None:
        self.enough = threading.Event()
        self.pulse = Pulse()

    def around(self, writer: Any) -> CountedWrites:
        self._writer = writer
        return self

    def write(self, answer: pa.Buffer) -> None:
        self._writer.write(answer)
        if self.pulse.beat() == BEATS:
            self.enough.set()


class Served(DataServer):
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.source = ScriptedReadThrough(self.store)
        self.writes = CountedWrites()
        super().__init__(
            "grpc://127.0.0.1:0",
            tokens=Tokens(parse_tokens(TOKEN)),
            admission=Admission(),
            counters=ServiceCounters(),
            store=self.store,  # type: ignore[arg-type]
            read_through=self.source,  # type: ignore[arg-type]
        )

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        super().do_put(context, descriptor, reader, self.writes.around(writer))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for module in (data, reading):
        monkeypatch.setattr(module, "HEARTBEAT_S", PING_S)
    with Served() as server:
        yield server


@pytest.fixture
def lane(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlightLane]:
    options = dict(flight.CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": int(PING_S * 1000)}
    monkeypatch.setattr(flight, "CHANNEL_OPTIONS", tuple(options.items()))
    made = FlightLane("127.0.0.1", served.port, server="here", access=Access(token=TOKEN))
    yield made
    made.close()


def soon() -> float:
    return time.monotonic() + 60


def test_a_fill_that_takes_long_is_waited_for(
    served: Served, lane: FlightLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_come = Read._has_come
    for number in range(TRIES):
        cold, pulse = file_object(f"cold-{number}", 10), Pulse()

        def counted(read: Read, timeout_s: float, cold: ObjectInfo = cold, pulse: Pulse = pulse) -> bool:
            if pulse.beat() == BEATS:
                served.source.fill(cold, 0, content(10))
            return has_come(read, timeout_s)

        monkeypatch.setattr(Read, "_has_come", counted)
        (outcome,) = lane.read([Extent(cold)], [None], ReadOptions(namespace="n"), deadline=soon())
        if not (isinstance(outcome, ServerUnavailable) and pulse.kept_up):
            break
    assert outcome == content(10)
    assert pulse.beat() > BEATS


def test_a_sync_that_takes_long_is_waited_for(
    served: Served, lane: FlightLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = ObjectInfo(ObjectId("samples", "set/1", "0"), 4)
    rows = [(0, 0, pa.py_buffer(b"data"))]
    for _ in range(TRIES):
        writes = served.writes = CountedWrites()
        monkeypatch.setattr(served.store, "sync", lambda _, writes=writes: writes.enough.wait(60))
        try:
            written = lane.write("samples:set@0", [info], rows, durable=True, deadline=soon())
        except ServerUnavailable:
            if not writes.pulse.kept_up:
                raise
            writes.enough.set()
            continue
        break
    assert written == 4
    assert writes.enough.is_set()
    assert served.store.content(info) == b"data"
