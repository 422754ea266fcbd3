"""Clocks that are a day off: of a server, and of a client. Nothing that must hold is judged by them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.pool_server import PoolServer
from tests.integration.store_process_parts import PlainStarter
from tests.waiting import until
from torchcache.errors import AlreadyExists

CLOCK = Path(__file__).with_name("wrong_clock")
ROOT = Path(__file__).parents[2]
DAY_S = 86_400
SIZE = 200_000
LEASE_S = 3.0


def off_by(seconds: int) -> Mapping[str, str]:
    """The environment of a Python process whose clock is wrong."""
    paths = [CLOCK, ROOT, ROOT / "server"]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), "CLOCK_IS_OFF_BY_S": str(seconds)}


@pytest.fixture(params=[DAY_S, -DAY_S], ids=["ahead", "behind"])
def seconds(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def server(tmp_path: Path, seconds: int) -> Iterator[PoolServer]:
    """Its clock is wrong."""
    with server_off_by(seconds, tmp_path) as server:
        yield server


def server_off_by(seconds: int, folder: Path, *, source: Path | None = None) -> PoolServer:
    folder.mkdir(exist_ok=True)
    through = ["env", *(f"{name}={value}" for name, value in off_by(seconds).items())]
    return PoolServer(
        folder, source=source, starter=PlainStarter(through=through), more=("--lease-s", str(LEASE_S))
    )


@pytest.fixture
def two_servers(tmp_path: Path, seconds: int) -> Iterator[tuple[PoolServer, PoolServer]]:
    """Over one under-store, their clocks two days apart. They meet in the claims there, each with a pool of its own."""
    with ExitStack() as stack:
        one = stack.enter_context(server_off_by(seconds, tmp_path / "one", source=tmp_path))
        other = stack.enter_context(server_off_by(-seconds, tmp_path / "other", source=tmp_path))
        yield one, other


def test_saves_at_a_server_whose_clock_is_wrong(server: PoolServer, seconds: int) -> None:
    """F22, I2, I4."""
    server.save("run/step-1", 1, SIZE)
    server.assert_loads("run/step-1", 1, SIZE)
    store, path = server.pool.resolve(f"file://{server.source}/run/step-1")
    until(lambda: server.pool.get_save(store, path).state == "durable")
    committed = server.pool.get_save(store, path).committed_unix_s
    assert abs(committed - time.time() - seconds) < DAY_S / 2, "its clock wasn't wrong at all"
    server.save("run/step-1", 2, SIZE, overwrite=True)
    server.assert_loads("run/step-1", 2, SIZE)


def test_leases_at_a_server_whose_clock_is_wrong(server: PoolServer) -> None:
    """F22, I3, I4: a writer that lives keeps its path, of one that doesn't the path is free again."""
    store, path = server.pool.resolve(f"file://{server.source}/run/step-1")
    server.pool.reserve_save(store, path, "", "first", overwrite=False, writer="first")

    with pytest.raises(AlreadyExists):
        asked_for_while_the_first_renews(server, server, store, path)
    server.pool.reserve_save(store, path, "", "third", overwrite=False, writer="third")
    with pytest.raises(AlreadyExists):
        server.pool.renew_save(store, path, "", "first")


def asked_for_while_the_first_renews(
    server: PoolServer, other: PoolServer, store: str, path: str, *, overwrite: bool = False
) -> None:
    """The first at `server`; the `other` is asked."""
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(
            other.pool.reserve_save, store, path, "", "second", overwrite=overwrite, writer="second"
        )
        while not asked.done():
            server.pool.renew_save(store, path, "", "first")
            time.sleep(0.1)
        asked.result()


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_writer_at_a_server_of_another_clock_is_let_live_and_die(
    two_servers: tuple[PoolServer, PoolServer], overwrite: bool
) -> None:
    """F22, I3, I4: what another server's claim is worth is told by its changes, not by any clock."""
    one, other = two_servers
    store, path = one.pool.resolve(f"file://{one.source}/run/step-1")
    one.pool.reserve_save(store, path, "", "first", overwrite=overwrite, writer="first")
    with pytest.raises(AlreadyExists, match=r"another save of .* is being written by first"):
        asked_for_while_the_first_renews(one, other, store, path, overwrite=overwrite)

    def is_taken_over() -> bool:  # not at once: the claim may be told once more that the first lives
        try:
            other.pool.reserve_save(store, path, "", "third", overwrite=overwrite, writer="third")
        except AlreadyExists:
            return False
        return True

    until(is_taken_over)
    other.pool.abandon_save(store, path, "", "third")
    other.save("run/step-1", 4, SIZE)
    until(lambda: other.pool.get_save(store, path).state == "durable")
    for server in two_servers:
        server.assert_loads("run/step-1", 4, SIZE)


def test_saves_at_servers_of_different_clocks(two_servers: tuple[PoolServer, PoolServer]) -> None:
    """F22, I2, I6: what waits for its upload isn't taken for dead by a clock, and what was saved last counts."""
    one, other = two_servers
    in_the_way = one.hinder_upload("run/step-1")
    one.save("run/step-1", 1, SIZE)
    with pytest.raises(AlreadyExists, match="not uploaded yet"):
        other.save("run/step-1", 2, SIZE)
    one.assert_loads("run/step-1", 1, SIZE)

    for number, server in enumerate((other, one, other), 3):
        server.save("run/step-1", number, SIZE, overwrite=True)
        server.assert_loads("run/step-1", number, SIZE)
    shutil.rmtree(in_the_way)
    store, path = one.pool.resolve(f"file://{one.source}/run/step-1")
    until(lambda: other.pool.get_save(store, path).state == "durable")
    for server in two_servers:
        until(lambda server=server: server.status.upload_pending_bytes == 0)
        server.assert_loads("run/step-1", 5, SIZE)


CLIENT = """\
import sys, time
from tests.integration.described_saves import load, save
from torchcache.connecting import connect

address, token, uri, number, size = sys.argv[1:]
pool = connect(address, token=token)
save(pool, uri, int(number), int(size), overwrite=True)
assert load(pool, uri, int(size)) == (int(number), [])
pool.close()
print(time.time())
"""


def test_a_client_whose_clock_is_wrong(tmp_path: Path, seconds: int) -> None:
    """F22, I2, I4: what was saved last counts, whatever the clocks of who saved it."""
    with PoolServer(tmp_path) as server:
        uri = f"file://{server.source}/run/step-1"
        server.save("run/step-1", 1, SIZE)
        ran = subprocess.run(
            [sys.executable, "-c", CLIENT, server.address, server.token, uri, "2", str(SIZE)],
            env=os.environ | off_by(seconds),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=300,
        )
        assert abs(float(ran.stdout) - time.time() - seconds) < DAY_S / 2, "its clock wasn't wrong at all"
        server.assert_loads("run/step-1", 2, SIZE)
        server.save("run/step-1", 3, SIZE, overwrite=True)
        server.assert_loads("run/step-1", 3, SIZE)
