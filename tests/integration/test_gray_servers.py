"""Servers that hang, are slow, die or come back with other data: what is read is right, and who serves is told."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.ports import free_port
from tests.integration.pausing import paused
from tests.integration.self_describing import content, difference
from tests.integration.server_process import ServerProcess
from tests.proxy import Fault, FaultyProxy, Proxy
from tests.waiting import until
from torchcache import Pool, connect
from torchcache.lanes.base import Outcome
from torchcache.lanes.flight import FlightLane
from torchcache.model import CHUNK_BYTES, Extent, ObjectInfo
from torchcache.pool import PoolStatistics
from torchcache.threads import Threads

SERVERS = 3
SIZES = [*[20_000] * 60, 9_000_000]
PATIENCE_S = 120.0

Reads = list[tuple[str, bool]]
"""Of each read the server's address, and whether it was one that fetches nothing, as probes do."""


class Servers:
    """Some servers over one source; reached by way of proxies on another address, with the same ports."""

    def __init__(self, folder: Path, token_file: Path, closing: ExitStack) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        self._token_file = token_file
        self._closing = closing
        self.proxies: list[FaultyProxy] = []
        with Threads(SERVERS, name="start") as threads:
            started = [threads.submit(self.start, n, free_port(beside=1)) for n in range(SERVERS)]
            self.processes = [one.result() for one in started]
        for server in self.processes:
            for port, kind in (
                (int(server.address.rpartition(":")[2]), Proxy),
                (server.data_port, FaultyProxy),
            ):
                proxy = closing.enter_context(kind(("127.0.0.1", port), listen=("127.0.0.2", port)))
                if isinstance(proxy, FaultyProxy):
                    self.proxies.append(proxy)
        self.addresses = [one.address.replace("127.0.0.1", "127.0.0.2") for one in self.processes]
        self.pool = self.connect()
        self.objects = [self._object(number, size) for number, size in enumerate(SIZES)]

    def start(self, number: int, port: int) -> ServerProcess:
        return self._closing.enter_context(
            ServerProcess(
                *("--listen", f"127.0.0.1:{port}", "--store", self.store(number), "--capacity", "1GB"),
                *("--under-store", f"file=file://{self.source}"),
                token_file=self._token_file,
            )
        )

    def store(self, number: int) -> Path:
        return self.folder / f"store-{number}"

    def connect(self) -> Pool:
        pool = connect(",".join(self.addresses), token=self._token_file.read_text().strip(), lane="flight")
        self._closing.callback(pool.close)
        return pool

    def _object(self, number: int, size: int) -> tuple[str, ObjectInfo]:
        path = self.source / f"{number:03d}"
        path.write_bytes(content(path.name, 0, size))
        return path.name, self.pool.stat(f"file://{path}")

    def read(self) -> None:
        """All objects, into buffers and as views, of which every byte must be right (I1)."""
        extents = [Extent(info) for _, info in self.objects]
        into = [memoryview(bytearray(b"\xff" * (info.size + 8))) for _, info in self.objects]
        for given in (into, None):
            views = self.pool.read(extents, into=given, timeout_s=60)
            for (key, info), view in zip(self.objects, views, strict=True):
                assert len(view) == info.size
                assert not difference(key, 0, 0, view)
        for (_, info), buffer in zip(self.objects, into, strict=True):
            assert buffer[info.size :] == b"\xff" * 8

    @property
    def seen(self) -> PoolStatistics:
        return self.pool.statistics()

    def fetched(self, servers: Sequence[ServerProcess]) -> int:
        """Requests by which they asked the source: told by the servers themselves, not through the pool."""
        return sum(store.read_requests for one in servers for store in one.client.status().under_stores)

    def read_until_out(self, number: int) -> None:
        def is_out() -> bool:
            self.read()
            return self.addresses[number] in self.seen.out

        until(is_out)

    def read_until_back(self, number: int) -> None:
        def is_back() -> bool:
            self.read()
            return self.addresses[number] not in self.seen.out

        until(is_back)


@pytest.fixture
def three(tmp_path: Path, home: Path) -> Iterator[Servers]:
    with ExitStack() as closing:
        yield Servers(tmp_path, home / "token", closing)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What is asked of servers from now on, as it is asked."""
    asked: Reads = []
    read = FlightLane.read

    def spy(self: FlightLane, *arguments: object, **more: object) -> list[Outcome]:
        asked.append((self._server, arguments[2].resident_only))  # type: ignore[attr-defined]
        return read(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(FlightLane, "read", spy)
    return asked


def assert_only_probed(servers: Servers, number: int, reads: Reads) -> None:
    """While a server is out, nothing but probes goes there."""
    reads.clear()
    for _ in range(3):
        servers.read()
    assert servers.addresses[number] in servers.seen.out
    others = {address for address, is_probe in reads if not is_probe}
    assert servers.addresses[number] not in others
    assert others


def hedged_chunks(servers: Servers) -> int:
    """What was asked for twice, at most: of the extents of a hedge one is of several chunks."""
    seen = servers.seen
    return seen.hedged_extents + (-(-max(SIZES) // CHUNK_BYTES) - 1) * seen.hedges


def assert_hedges_within_bounds(servers: Servers) -> None:
    seen = servers.seen
    assert seen.hedged_extents <= 0.05 * (seen.extents + seen.hedged_extents) + 256 + len(SIZES)
    assert seen.hedges_won <= seen.hedges


def test_one_that_hangs_is_passed_over_and_comes_back(three: Servers, reads: Reads) -> None:
    """F17: also in the middle of answers. What the source is asked for is what the others lack, once."""
    for _ in range(10):
        three.read()
    before = three.fetched(three.processes)
    chunks = three.processes[0].client.status().chunks
    with paused(three.processes[0].process.pid):
        three.read_until_out(0)
        assert three.seen.hedges_won, "the first that met it had its answers from others"
        assert_only_probed(three, 0, reads)
        for other in three.processes[1:]:
            told = other.client.status().passed_over
            assert {one.server_id for one in told} == {three.processes[0].server_id}, "for people to see"
    three.read_until_back(0)
    reads.clear()
    three.read()
    assert (three.addresses[0], False) in reads
    assert_hedges_within_bounds(three)
    assert three.seen.probes
    if three.seen.put_out == 1:  # else the machine's mood was taken for another's fault
        assert three.fetched(three.processes) - before <= 1.1 * chunks + hedged_chunks(three)


def test_one_that_is_slow_is_passed_over_and_comes_back(three: Servers, reads: Reads) -> None:
    """F16."""
    for _ in range(10):
        three.read()
    three.proxies[1].fault = Fault(kind="delay", delay_s=2.0)
    three.read_until_out(1)
    assert_only_probed(three, 1, reads)
    answers_s = three.pool.answers_s()
    assert max(answers_s, key=lambda address: answers_s[address] or PATIENCE_S) == three.addresses[1]
    three.proxies[1].fault = None
    three.read_until_back(1)
    reads.clear()
    three.read()
    assert (three.addresses[1], False) in reads
    assert_hedges_within_bounds(three)


def test_one_that_is_killed_while_it_is_read_from(three: Servers) -> None:
    """F1: by several readers at once. The source is asked for what it held, once, and not by each of them."""
    three.read()
    lost = three.processes[2].client.status().chunks
    before = three.fetched(three.processes[:2])
    three.proxies[2].fault = Fault(kind="stall", after=100_000)  # in the middle of an answer
    killed = three.processes[2].process
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    three.proxies[2].cut()
    with Threads(4, name="reader") as readers:
        for done in [readers.submit(three.read) for _ in range(8)]:
            done.result()
    assert three.addresses[2] in three.seen.out
    assert_hedges_within_bounds(three)
    if three.seen.put_out == 1:  # else the machine's mood was taken for another's fault
        assert three.fetched(three.processes[:2]) - before <= 1.1 * lost + hedged_chunks(three)


def test_one_that_comes_back_with_other_data_is_met_anew(three: Servers) -> None:
    """F19: another store at the same address, between two reads. The client learns the id that placement goes by."""
    three.read()
    before = three.pool.servers()
    old = three.processes[0]
    old.stop(signal.SIGTERM)
    shutil.rmtree(three.store(0))
    new = three.start(0, int(old.address.rpartition(":")[2]))
    three.processes[0] = new
    three.proxies[0].target = ("127.0.0.1", new.data_port)

    def met() -> bool:
        three.read()
        return new.server_id in three.pool.servers()

    until(met)
    assert before.keys() - three.pool.servers().keys() == {old.server_id}
    three.read()
