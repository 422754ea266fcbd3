"""The lanes' contracts, held by the local lane to real servers.

Faults of the wire it meets only with what it can't read itself: so those contracts read what isn't resident, and a hit
is shown to need neither wire nor server.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.lane import LaneContract, good, put_sample, read, sample
from tests.conformance.lane_lies import LiesContract
from tests.conformance.lane_server import LaneServer, ServerContract
from tests.conformance.lane_source import SourceContract
from tests.conformance.lane_wire import WireContract
from tests.conformance.standin import StandIn
from tests.integration.self_describing import content
from tests.proxy import Fault
from torchcache.errors import ConfigurationError, IntegrityError, NotResident, TorchCacheError
from torchcache.lanes.access import Access
from torchcache.lanes.base import Lane
from torchcache.lanes.flight import FlightLane
from torchcache.lanes.local import LocalLane
from torchcache.model import CHUNK_BYTES, Extent
from torchcache.pool.control import ControlClient
from torchcache.pool.lane_choice import choose_lane


def local_lane(
    server: LaneServer, *, access: Access | None = None, data_port: int | None = None
) -> LocalLane:
    """The lane that a pool would choose; what it asks of the server passes the proxy, or goes to `data_port`."""
    chosen = access or server.access
    flight = FlightLane("127.0.0.1", data_port or server.proxy.port, server=server.address, access=chosen)
    control = ControlClient(server.address, chosen)
    lane = choose_lane("local", server.info(), flight, control, before=None, uses=[]).lane
    assert isinstance(lane, LocalLane)
    return lane


class TestLocalToServer(ServerContract, LaneContract):
    def make_lane(self, server: LaneServer) -> Lane:
        return local_lane(server)

    @pytest.fixture
    def deaf(self, tmp_path: Path) -> Iterator[Lane]:
        """A server that was there, and whose store still is."""
        with LaneServer(tmp_path) as server:
            lane = local_lane(server)
            server.inner.end(signal.SIGKILL)
            yield lane
            lane.close()

    @pytest.fixture
    def stranger(self, server: LaneServer) -> Iterator[Lane]:
        """What it may read itself the file system says, and what it may ask for the token."""
        lane = local_lane(server, access=Access(token="wrong" * 5))
        yield lane
        lane.close()

    def test_a_hit_needs_neither_wire_nor_server(self, tmp_path: Path) -> None:
        """Nor does what is damaged or absent come wrong without them."""
        with LaneServer(tmp_path) as server:
            lane = local_lane(server)
            right = {
                size: put_sample(lane, f"alone-{size}", size) for size in (0, 13, 100_000, 2 * CHUNK_BYTES)
            }
            extents = [Extent(sample(f"alone-{size}")) for size in right]
            server.proxy.fault = Fault(kind="stall", side="client")
            assert [good(o) for o in read(lane, extents)] == list(right.values())
            server.inner.end(signal.SIGKILL)
            assert [good(o) for o in read(lane, extents)] == list(right.values())
            path, at = server.find(right[100_000])
            with path.open("r+b") as file:
                file.seek(at + 70_000)
                file.write(b"\0\0\0\0")
            outcomes = read(lane, extents, seconds=5)
            assert isinstance(outcomes[2], TorchCacheError)
            assert [good(o) for n, o in enumerate(outcomes) if n != 2] == [
                data for size, data in right.items() if size != 100_000
            ]
            lane.close()


class TestLocalWithSource(SourceContract):
    def make_lane(self, server: LaneServer) -> Lane:
        return local_lane(server)


class TestLocalOverABadWire(WireContract):
    def make_lane(self, server: LaneServer) -> Lane:
        return local_lane(server)


class TestLocalToALiar(LiesContract):
    """The liar answers for what the store hasn't got, which is all of it."""

    @pytest.fixture(scope="class")
    @classmethod
    def empty(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaneServer]:
        with LaneServer(tmp_path_factory.mktemp("empty")) as server:
            yield server

    @pytest.fixture
    def lane(self, liar: StandIn, empty: LaneServer) -> Iterator[Lane]:
        self._empty = empty
        lane = self.make_lane(liar)
        yield lane
        liar.script.tamper, liar.script.stream = lambda _, pieces: pieces, None
        lane.close()

    def make_lane(self, liar: StandIn) -> Lane:
        flight = FlightLane(
            "127.0.0.1", liar.data_port, server="liar", access=Access(token=liar.script.token)
        )
        return local_lane(self._empty).behind(flight)


class TestWhoMayReadTheStore:
    """The local lane is only for stores that are ours, here, and the server's own."""

    def test_a_store_of_another_user_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with LaneServer(tmp_path) as server:
            local_lane(server).close()
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
            with pytest.raises(ConfigurationError, match=r"belongs to user .* not to us, 12345"):
                local_lane(server)

    def test_a_store_that_took_the_place_of_the_servers_is_not_read(self, tmp_path: Path) -> None:
        """Also not by a lane that is open: what is asked for then comes from the server."""
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with LaneServer(tmp_path / "a") as one, LaneServer(tmp_path / "b") as other:
            info = one.make("moved/1", 50_000)
            lane = local_lane(one)
            options = one.options("moved")
            for _ in range(2):
                assert good(*read(lane, [Extent(info)], options=options)) == content("moved/1", 0, 50_000)
            one.inner.end(signal.SIGKILL)
            one.inner.store.rename(tmp_path / "away")
            other.inner.end(signal.SIGKILL)
            other.inner.store.rename(one.inner.store)
            lane.close()
            (outcome,) = read(lane, [Extent(info)], options=options, seconds=1)
            assert isinstance(outcome, TorchCacheError)
            assert not isinstance(outcome, IntegrityError | NotResident)
