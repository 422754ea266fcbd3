"""Servers that hang, or swallow what is sent: no reset says so, and the next in order is asked all the same."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.ports import free_port
from tests.integration.pausing import paused
from tests.integration.server_process import ServerProcess
from tests.waiting import until
from torchcache import Pool, connect
from torchcache.errors import ServerUnavailable, TransientError
from torchcache.model import Extent, ObjectId, ObjectInfo

DEADLINE_S = 60.0
"""Of a read. A server that doesn't answer would use it up, were it not found out."""

COUNT = 24


class Servers:
    """Two servers over one source, and a pool of both that knows them."""

    def __init__(self, folder: Path, home: Path, closing: ExitStack) -> None:
        self.source = folder / "source"
        self.source.mkdir()
        for number in range(COUNT):
            (self.source / f"{number:02d}").write_bytes(os.urandom(1000))
        self.token_file = home / "token"
        self.servers = [
            closing.enter_context(
                ServerProcess(
                    *("--listen", "127.0.0.1:0", "--store", folder / f"store-{number}", "--capacity", "1GB"),
                    *("--under-store", f"file=file://{self.source}"),
                    token_file=self.token_file,
                )
            )
            for number in range(2)
        ]
        self.pool = self.connect(*(server.address for server in self.servers))
        closing.callback(self.pool.close)

    def connect(self, *addresses: str) -> Pool:
        return connect(",".join(addresses), token=self.token_file.read_text().strip(), lane="flight")

    def read(self, pool: Pool) -> None:
        infos = list(pool.list(f"file://{self.source}"))
        views = pool.read([Extent(info) for info in infos], timeout_s=DEADLINE_S)
        assert views == [path.read_bytes() for path in sorted(self.source.iterdir())]


@pytest.fixture
def two(tmp_path: Path, home: Path) -> Iterator[Servers]:
    with ExitStack() as closing:
        yield Servers(tmp_path, home, closing)


@pytest.fixture
def swallowing() -> Iterator[str]:
    """An address whose queue of connections is full: the kernel drops what asks for one more."""
    with socket.socket() as listening, ExitStack() as closing:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(3):
            asking = closing.enter_context(socket.socket())
            asking.setblocking(False)
            asking.connect_ex(listening.getsockname())
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_hangs_is_passed_over(two: Servers) -> None:
    two.read(two.pool)  # connections are open, and both servers own some of the objects
    with paused(two.servers[0].process.pid):
        two.read(two.pool)
        two.read(two.pool)
    two.read(two.pool)


def test_a_server_that_hangs_is_no_reason_to_wait_when_it_is_the_only_one(two: Servers) -> None:
    alone = two.connect(two.servers[0].address)
    two.read(alone)
    infos = list(alone.list(f"file://{two.source}"))
    with paused(two.servers[0].process.pid), pytest.raises(ServerUnavailable):
        alone.read([Extent(info) for info in infos], timeout_s=150)
    alone.close()


def test_status_goes_on_without_a_server_that_hangs_and_has_it_again(two: Servers) -> None:
    hanging, other = (server.address for server in two.servers)
    assert len(two.pool.status()) == 2
    with paused(two.servers[0].process.pid):
        for _ in range(2):
            assert [status.address for status in two.pool.status()] == [other]
            assert two.pool.unreachable() == [hanging]
            assert two.pool.answers_s()[hanging] is None
    until(lambda: len(two.pool.status()) == 2 and two.pool.unreachable() == [])


def test_a_pool_is_of_use_with_an_address_that_swallows(two: Servers, swallowing: str) -> None:
    pool = two.connect(swallowing, two.servers[0].address)
    two.read(pool)
    assert pool.unreachable() == [swallowing]
    pool.close()
    nobody = two.connect(swallowing)
    with pytest.raises(ServerUnavailable, match="can be reached"):
        nobody.status()


def test_a_pool_that_is_away_keeps_nothing_of_its_callers_alive() -> None:
    """A read that fails holds no views for the collector to find: some who train have put it off."""

    class Kept:
        pass

    def ask() -> weakref.ref[Kept]:
        kept = Kept()
        info = ObjectInfo(ObjectId("file", "absent", "0"), 1)
        try:
            pool.read([Extent(info)], timeout_s=1.0)
        except TransientError:
            return weakref.ref(kept)
        raise AssertionError("somebody answered")

    pool = connect(f"127.0.0.1:{free_port(beside=1)}", token="absent")
    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()
        pool.close()
