"""Many clients on one server: idle ones cost little memory and no thread, busy ones a thread each and no more."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conformance.lane import soon
from tests.integration.server_process import ServerProcess
from torchcache.lanes.access import Access
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.connections import Connections
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool.control import ControlClient
from torchcache.wire.v1 import cache_pb2 as pb

MIB = 1024 * 1024
BUSY = 64
OBJECT_BYTES = 4 * MIB


class Client:
    """A process's worth of a client: its own connection for data and one for control."""

    def __init__(self, server: ServerProcess) -> None:
        host, _, port = server.address.rpartition(":")
        registry = Connections()
        access = Access(token=server.client.token)
        self.lane = FlightLane(host, server.data_port, server="here", access=access, registry=registry)
        self.control = ControlClient(f"{host}:{port}", access, registry=registry)

    def greet(self) -> None:
        self.control.call("GetInfo", pb.InfoRequest(), deadline=soon())

    def read(self, info: ObjectInfo, length: int = -1) -> memoryview:
        (outcome,) = self.lane.read(
            [Extent(info, 0, length)], [None], ReadOptions(namespace="n"), deadline=soon(120)
        )
        assert isinstance(outcome, memoryview), outcome
        return outcome

    def close(self) -> None:
        self.lane.close()
        self.control.close()


def memory_and_threads(server: ServerProcess) -> tuple[int, int]:
    """What the server's process holds of its own, in bytes, and how many threads it has."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["Threads"])


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"this process may open {hard} files, of {count} needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "count", [50, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_idle_clients_cost_little_and_busy_ones_are_served(tmp_path: Path, home: Path, count: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    data = os.urandom(OBJECT_BYTES)
    (source / "a").write_bytes(data)
    with ExitStack() as closing:
        closing.enter_context(descriptors(4 * count + 500))
        server = closing.enter_context(
            ServerProcess(
                *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
                *("--under-store", f"file=file://{source}"),
                token_file=home / "token",
                alone=True,
            )
        )
        (ref,) = server.client.objects("file")
        info = ObjectInfo(ObjectId(ref.store, ref.key, ref.version), ref.size)
        clients = [Client(server) for _ in range(count + BUSY)]
        for client in clients:
            closing.callback(client.close)
        idle, busy = clients[:count], clients[count:]
        for client in busy:  # pays what any use costs once
            client.greet()
            client.read(info, 1000)

        memory, threads = memory_and_threads(server)
        for client in idle:
            client.greet()
            client.read(info, 1000)
        with_idle, threads_with_idle = memory_and_threads(server)
        assert with_idle - memory <= 100 * MIB * count // 1000 + 16 * MIB
        assert threads_with_idle <= threads + 8, "no thread of its own for who asks nothing"

        wrong: list[object] = []
        start = threading.Barrier(BUSY)

        def work(client: Client) -> None:
            start.wait()
            for _ in range(4):
                try:
                    if client.read(info) != data:
                        wrong.append("other bytes")
                except Exception as error:
                    wrong.append(error)

        workers = [threading.Thread(target=work, args=(client,)) for client in busy]
        for worker in workers:
            worker.start()
        most = 0
        while any(worker.is_alive() for worker in workers):
            most = max(most, memory_and_threads(server)[1])
            workers[0].join(0.01)
        assert wrong == []
        assert most <= threads_with_idle + BUSY + 16
        for client in idle[:: max(1, count // 20)]:  # and those that did nothing meanwhile are still served
            assert client.read(info, 100) == data[:100]
