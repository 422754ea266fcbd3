"""A pool in a real etcd: servers join, leave and die, etcd goes away and comes back empty; reads never notice."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from examples.etcd import Etcd
from tests.integration.pool_server import PoolServer
from tests.integration.self_describing import content, difference
from tests.waiting import until
from torchcache.connecting import connect
from torchcache.errors import ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool
from torchcache.pool.discovery import EtcdMembers
from torchcache.registry import Registry, RegistryAddress

pytestmark = pytest.mark.skipif(not Etcd.installed(), reason="no etcd here: apt-get install etcd-server")

SIZES = [300_000] * 24


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with Etcd(tmp_path / "etcd") as etcd:
        yield etcd


class World:
    """Servers that join one pool, over one source, with one token."""

    def __init__(self, folder: Path, etcd: Etcd, stack: ExitStack) -> None:
        self.address = etcd.address("train")
        self._folder = folder
        self._source = folder / "source"
        self._stack = stack
        self.servers: list[PoolServer] = []
        self.registry = stack.enter_context(closing(Registry(RegistryAddress.parse(self.address))))

    def join(self) -> PoolServer:
        folder = self._folder / f"host-{len(self.servers)}"
        folder.mkdir()
        if self.servers:
            shutil.copy(self._folder / "host-0/token", folder / "token")
        server = self._stack.enter_context(
            PoolServer(folder, source=self._source, more=("--join", self.address))
        )
        self.servers.append(server)
        return server

    def announced(self) -> list[str]:
        """Asked for until etcd finds the time to answer."""
        deadline = time.monotonic() + 150
        while True:
            try:
                return [one.address for one in self.registry.servers()]
            except ServerUnavailable:
                assert time.monotonic() < deadline

    def pool(self) -> Pool:
        source = EtcdMembers(
            registry=self.registry.address, access=Access(token=self.servers[0].token), holds_s=0.1
        )
        return self._stack.enter_context(closing(Pool(source)))

    def dataset(self, pool: Pool) -> list[tuple[str, ObjectInfo]]:
        found = []
        for number, size in enumerate(SIZES):
            (self._source / str(number)).write_bytes(content(str(number), 0, size))
            found.append((str(number), pool.stat(f"file://{self._source}/{number}")))
        return found


def check(pool: Pool, objects: list[tuple[str, ObjectInfo]]) -> None:
    for (key, info), data in zip(objects, pool.read([Extent(info) for _, info in objects]), strict=True):
        assert len(data) == info.size
        assert not difference(key, 0, 0, data)


@pytest.fixture
def world(tmp_path: Path, etcd: Etcd) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path, etcd, stack)
        for _ in range(2):
            world.join()
        yield world


def test_servers_join_leave_and_die_while_a_pool_reads(world: World) -> None:
    """F21: who joined is used, who left is not asked any more, who died is gone when its lease ends."""
    pool = world.pool()
    objects = world.dataset(pool)
    check(pool, objects)
    assert set(pool.statistics().lanes) == {server.address for server in world.servers}

    third = world.join()

    def used() -> bool:
        check(pool, objects)
        return third.address in pool.statistics().lanes

    until(used)
    leaver, dier = world.servers[0], world.servers[1]
    assert leaver.end(signal.SIGTERM) == 0
    assert leaver.address not in world.announced()
    check(pool, objects)
    dier.end(signal.SIGKILL)
    check(pool, objects)
    until(lambda: world.announced() == [third.address])

    def forgotten() -> bool:
        check(pool, objects)
        # Of a server that is only silent there is no status either.
        return [one.address for one in pool.status()] == [third.address] and not pool.unreachable()

    until(forgotten)


def test_etcd_goes_away_and_comes_back_empty(world: World, etcd: Etcd) -> None:
    """The last map is kept and used, also by those who come meanwhile; servers announce themselves again."""
    pool = world.pool()
    objects = world.dataset(pool)
    check(pool, objects)
    etcd.kill()
    looked = time.monotonic()
    while time.monotonic() - looked < 0.5:  # it is looked for several times
        check(pool, objects)
    check(world.pool(), objects)
    etcd.forget()
    etcd.start()
    until(lambda: set(world.announced()) == {server.address for server in world.servers})
    check(pool, objects)


def test_the_address_is_one_for_users(world: World) -> None:
    pool = connect(world.address, token=world.servers[0].token)
    assert {one.address for one in pool.status()} == {server.address for server in world.servers}
    pool.close()
