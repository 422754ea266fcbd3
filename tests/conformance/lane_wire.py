"""What every lane must do when the wire to the server is slow, stalled, cut or lies: right bytes, or a typed error."""

from __future__ import annotations

import random
from typing import Final

import pyarrow as pa
import pytest

from tests.conformance.lane import NAMESPACE, good, put, read, sample, soon, until_well
from tests.conformance.lane_server import LaneServer, ServerContract
from tests.integration.self_describing import content
from tests.proxy import Fault
from torchcache.errors import (
    DeadlineExceeded,
    NotResident,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.lanes.base import Lane, Outcome
from torchcache.model import CHUNK_BYTES, Extent

SIZES: Final = [90_000] * 10 + [CHUNK_BYTES + 7, 0, 13, 200_000]
STREAM_BYTES: Final = sum(SIZES)
SHORT_S: Final = 1.0


class WireContract(ServerContract):
    """Of a lane that reads what isn't resident, over `server.proxy`."""

    @pytest.fixture(scope="class")
    @classmethod
    def objects(cls, server: LaneServer) -> list[tuple[Extent, bytes]]:
        keys = [(f"wire/{number}", size) for number, size in enumerate(SIZES)]
        return [(Extent(server.make(key, size)), content(key, 0, size)) for key, size in keys]

    @staticmethod
    def cold_read(
        server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]], seconds: float = 60.0
    ) -> list[Outcome]:
        """Reads all of them, none of which is resident, half into buffers. Every byte that comes is right."""
        fault, server.proxy.fault = server.proxy.fault, None
        server.evict("wire")
        server.proxy.fault = fault
        memory = [memoryview(bytearray(len(data))) if n % 2 else None for n, (_, data) in enumerate(objects)]
        extents = [extent for extent, _ in objects]
        outcomes = read(lane, extents, memory, options=server.options("wire"), seconds=seconds)
        for outcome, (_, data) in zip(outcomes, objects, strict=True):
            assert isinstance(outcome, TorchCacheError) or outcome == data, "I1"
        return outcomes

    def assert_recovers(self, server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]]) -> None:
        """Without the fault all is well, once gRPC has connected again."""
        server.proxy.fault = None
        outcomes = until_well(lambda: self.cold_read(server, lane, objects))
        assert [good(outcome) for outcome in outcomes] == [data for _, data in objects]

    def test_a_slow_wire_is_only_slow(
        self, server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]]
    ) -> None:
        server.proxy.fault = Fault(kind="delay", delay_s=0.002)
        for outcome in self.cold_read(server, lane, objects):
            good(outcome)
        assert server.proxy.hits > 10

    @pytest.mark.parametrize("kind", ["reset", "end"])
    @pytest.mark.parametrize("after", [0, 9, 90_500, 400_000, STREAM_BYTES // 2, STREAM_BYTES - 100])
    def test_a_wire_that_is_cut(
        self,
        server: LaneServer,
        lane: Lane,
        objects: list[tuple[Extent, bytes]],
        kind: str,
        after: int,
    ) -> None:
        """F18: what came whole is good, the rest is ServerUnavailable, and the next call is well."""
        good(*self.cold_read(server, lane, objects[:1]))  # connects, so that the fault meets the answer
        server.proxy.fault = Fault(kind=kind, after=after)  # type: ignore[arg-type]
        outcomes = self.cold_read(server, lane, objects)
        assert server.proxy.hits == 1
        failed = {type(outcome) for outcome in outcomes if isinstance(outcome, TorchCacheError)}
        assert failed == {ServerUnavailable}
        self.assert_recovers(server, lane, objects)

    @pytest.mark.parametrize("after", [0, 1000, STREAM_BYTES // 2])
    def test_a_wire_that_stalls(
        self, server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]], after: int
    ) -> None:
        """I4: DeadlineExceeded by the deadline; and what came whole is good."""
        good(*self.cold_read(server, lane, objects[:1]))
        server.proxy.fault = Fault(kind="stall", after=after)
        outcomes = self.cold_read(server, lane, objects, seconds=SHORT_S)
        failed = {type(outcome) for outcome in outcomes if isinstance(outcome, TorchCacheError)}
        assert failed == {DeadlineExceeded}
        self.assert_recovers(server, lane, objects)

    def test_a_server_that_swallows_all(
        self, server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]]
    ) -> None:
        """Connections are accepted, and nothing ever comes: reads and writes end by their deadlines."""
        lane.close()
        server.proxy.fault = Fault(kind="stall", side="client")
        outcomes = self.cold_read(server, lane, objects[:2], seconds=SHORT_S)
        assert all(isinstance(outcome, DeadlineExceeded | ServerUnavailable) for outcome in outcomes)
        self.assert_recovers(server, lane, objects)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_bit_that_flips_on_the_wire(
        self, server: LaneServer, lane: Lane, objects: list[tuple[Extent, bytes]], seed: int
    ) -> None:
        """F5: in payload, checksums, Arrow's and gRPC's own words, wherever it is: no wrong byte, an error of ours."""
        chance = random.Random(seed)
        few = objects[:4]
        early = [chance.randrange(0, 1500) for _ in range(6)]  # heads; later it is payload nearly everywhere
        for after in early + [chance.randrange(0, 360_000) for _ in range(6)]:
            print(f"bit {after % 8} of byte {after}")
            server.proxy.fault = None
            self.assert_recovers(server, lane, few[:1])
            server.proxy.fault = Fault(kind="corrupt", after=after)
            self.cold_read(server, lane, few, seconds=SHORT_S)
            while not server.proxy.hits:  # the deadline came before the byte, on a machine that has no time
                self.cold_read(server, lane, few, seconds=SHORT_S)
            assert server.proxy.hits == 1
        self.assert_recovers(server, lane, objects)

    @pytest.mark.parametrize("kind", ["reset", "end", "corrupt", "stall"])
    @pytest.mark.parametrize("after", [600, 150_000])
    def test_a_write_over_a_bad_wire(self, server: LaneServer, lane: Lane, kind: str, after: int) -> None:
        """Acknowledged is there, whole. What isn't may be there or not, but never wrong; and may be written again."""
        self.assert_writes(lane, "before")
        data = content(f"bad-{kind}-{after}", 0, 300_000)
        info = sample(f"bad-{kind}-{after}", len(data))
        server.proxy.fault = Fault(kind=kind, after=after, side="client")  # type: ignore[arg-type]
        rows = [(0, 0, pa.py_buffer(data))]
        try:
            lane.write(NAMESPACE, [info], rows, durable=False, deadline=soon(SHORT_S))
            acknowledged = True
        except TorchCacheError as error:
            assert not isinstance(error, NotResident)
            acknowledged = False
        server.proxy.fault = None
        (outcome,) = until_well(lambda: read(lane, [Extent(info)]))
        assert outcome == data or (not acknowledged and isinstance(outcome, NotResident))
        put(lane, info, data)
        assert good(*read(lane, [Extent(info)])) == data

    @staticmethod
    def assert_writes(lane: Lane, key: str) -> None:
        data = content(key, 0, 5000)
        put(lane, sample(key), data)
        assert good(*read(lane, [Extent(sample(key))])) == data
