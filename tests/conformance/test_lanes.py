"""The lanes' contract, held by the flight lane: to the server's stand-in, and to a real embedded server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.lane import LaneContract
from tests.conformance.lane_lies import LiesContract
from tests.conformance.lane_server import LaneServer
from tests.conformance.lane_source import SourceContract
from tests.conformance.lane_wire import WireContract
from tests.conformance.standin import StandIn
from torchcache.embedded import read_endpoint
from torchcache.lanes.access import Access
from torchcache.lanes.flight import FlightLane
from torchcache.local_pool import LocalPool

Doors = tuple[int, Access]


class FlightContract(LaneContract):
    @pytest.fixture
    def lane(self, doors: Doors) -> Iterator[FlightLane]:
        lane = FlightLane("127.0.0.1", doors[0], server="here", access=doors[1])
        yield lane
        lane.close()

    @pytest.fixture
    def deaf(self) -> Iterator[FlightLane]:
        lane = FlightLane("127.0.0.1", 1, server="nowhere", access=Access())
        yield lane
        lane.close()

    @pytest.fixture
    def stranger(self, doors: Doors) -> Iterator[FlightLane]:
        lane = FlightLane("127.0.0.1", doors[0], server="here", access=Access(token="wrong" * 5))
        yield lane
        lane.close()


class TestFlightToStandIn(FlightContract):
    @pytest.fixture(scope="class")
    @classmethod
    def doors(cls) -> Iterator[Doors]:
        with StandIn() as server:
            yield server.data_port, Access(token=server.script.token)


class TestFlightToServer(FlightContract):
    @pytest.fixture(scope="class")
    @classmethod
    def doors(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
        root: Path = tmp_path_factory.mktemp("pool")
        with LocalPool(root, capacity="256MB"):
            fields = read_endpoint(root / "server-0")
            assert fields is not None
            yield fields["data_port"], Access(token_file=root / "token")


class TestFlightWithSource(SourceContract):
    def make_lane(self, server: LaneServer) -> FlightLane:
        return FlightLane("127.0.0.1", server.proxy.port, server=server.address, access=server.access)


class TestFlightOverABadWire(WireContract):
    def make_lane(self, server: LaneServer) -> FlightLane:
        return FlightLane("127.0.0.1", server.proxy.port, server=server.address, access=server.access)


class TestFlightToALiar(LiesContract):
    def make_lane(self, liar: StandIn) -> FlightLane:
        return FlightLane("127.0.0.1", liar.data_port, server="liar", access=Access(token=liar.script.token))
