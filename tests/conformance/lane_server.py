"""A real server for the lanes' contracts: objects behind it, the disk under it, and the wire before it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.integration.pool_server import PoolServer
from tests.integration.self_describing import content
from tests.proxy import FaultyProxy
from torchcache.lanes.access import Access
from torchcache.lanes.base import Lane, ReadOptions
from torchcache.model import ObjectInfo
from torchcache.pool.control import ControlClient
from torchcache.wire.v1 import cache_pb2


class LaneServer:
    """One server; `proxy` stands before its data port, also over restarts. Context manager."""

    def __init__(self, folder: Path, *, capacity: str = "512MB") -> None:
        self.inner = PoolServer(folder, capacity=capacity)

    def __enter__(self) -> Self:
        self.inner.start()
        self.proxy = FaultyProxy(("127.0.0.1", self.data_port()))
        self.proxy.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.proxy.__exit__()
        self.inner.__exit__()

    def restart(self) -> None:
        """After a SIGKILL or an end; the server's ports are others then."""
        self.inner.start()
        self.proxy.target = ("127.0.0.1", self.data_port())

    @property
    def address(self) -> str:
        """Of the control port."""
        return self.inner.address

    @property
    def access(self) -> Access:
        return Access(token=self.inner.token)

    def info(self) -> cache_pb2.InfoReply:
        client = ControlClient(self.address, self.access)
        reply: cache_pb2.InfoReply = client.call(
            "GetInfo", cache_pb2.InfoRequest(), deadline=time.monotonic() + 60
        )
        return reply

    def data_port(self) -> int:
        return self.info().data_port

    # ---- what stands behind it ----

    def namespace(self, name: str) -> str:
        return f"file://{self.inner.source}/{name}"

    def options(self, name: str, *, resident_only: bool = False, suspect: bool = False) -> ReadOptions:
        return ReadOptions(namespace=self.namespace(name), resident_only=resident_only, suspect=suspect)

    def make(self, key: str, size: int, *, generation: int = 0) -> ObjectInfo:
        """An object of the source, as `<dataset>/<name>`: self-describing bytes; its place is taken if it is there."""
        path = self.inner.source / key
        path.parent.mkdir(exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(content(key, generation, size))
        # Another version even where the clock is too coarse to tell.
        os.utime(beside, ns=(time.time_ns(), time.time_ns() + generation * 1_000_000_000))
        beside.rename(path)
        return self.inner.pool.stat(f"file://{path}")

    def remove(self, key: str) -> None:
        (self.inner.source / key).unlink()

    def evict(self, name: str) -> None:
        """All of a dataset."""
        self.inner.pool.evict(self.namespace(name))

    # ---- the disk under it ----

    def segments(self) -> list[Path]:
        return sorted((self.inner.store / "segments").rglob("*.segment"))

    def find(self, data: bytes) -> tuple[Path, int]:
        """The segment that holds `data`, and where."""
        for path in self.segments():
            try:
                at = path.read_bytes().find(data)
            except FileNotFoundError:  # compacted meanwhile
                continue
            if at >= 0:
                return path, at
        raise AssertionError("no segment holds it")


class ServerContract:
    """What the contracts of a lane to a real server share. `server` lives as long as the class."""

    def make_lane(self, server: LaneServer) -> Lane:
        """A lane to the server; what of it goes over the wire passes `server.proxy`."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaneServer]:
        with LaneServer(tmp_path_factory.mktemp("lane")) as server:
            yield server

    @pytest.fixture
    def lane(self, server: LaneServer) -> Iterator[Lane]:
        lane = self.make_lane(server)
        yield lane
        server.proxy.fault = None
        lane.close()
