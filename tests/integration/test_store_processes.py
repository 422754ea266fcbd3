"""Harm done to the store of a live server, or of one that is stopped: its folder gone, its disk read-only or failing,
its index lost, no descriptors left. Reads go on, from the under-store where they must; saves are refused by a typed
error; the process lives. Faults F12, F13, F14, F15, F19, F39.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.own_mounts import OwnMount
from tests.integration.pool_server import Dataset, PoolServer
from tests.integration.server_process import refused
from tests.integration.store_process_parts import PlainStarter
from torchcache.connecting import connect
from torchcache.errors import NotCommitted, OutOfSpace, TorchCacheError
from torchcache.model import SAMPLES, ObjectId

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 1 << 20
SIZES = [100_000, 3 * MIB + 7, 9 * MIB, 1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    with PoolServer(tmp_path) as server:
        yield server


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    """The file that says how the disk of `failing` fails."""
    return tmp_path / "orders"


@pytest.fixture
def failing(tmp_path: Path, orders: Path) -> Iterator[PoolServer]:
    starter = PlainStarter(module="tests.integration.failing_disk_child", first=[str(orders)])
    with PoolServer(tmp_path, starter=starter) as server:
        yield server


def assert_only_passing_through(server: PoolServer, name: str) -> None:
    """What a server without a disk still does: reads right, saves refused, and three errors take the disk out."""
    for number in range(4):
        with pytest.raises(TorchCacheError, match="disk"):
            server.save(f"{name}/{number}", 1, 2 * MIB)
        with pytest.raises(NotCommitted):
            server.assert_loads(f"{name}/{number}", 1, 2 * MIB)
    Dataset(server, f"{name}-set", SIZES).read(server.pool)
    with pytest.raises(OutOfSpace, match="out of service"):
        server.pool.write("samples:s@0", [(ObjectId(SAMPLES, f"s/{name}", "0"), [b"sample"])])
    assert server.status.out_of_service


# ---- the disk goes away or fails ----


def test_the_store_folder_is_deleted_under_a_live_server(server: PoolServer) -> None:
    """F15"""
    dataset = Dataset(server, "set", SIZES)
    dataset.read(server.pool)
    shutil.rmtree(server.store)
    dataset.read(server.pool)
    assert_only_passing_through(server, "gone")
    dataset.read(server.pool)
    server.restart()
    assert dataset.resident(server.pool) == 0
    dataset.read(server.pool)
    server.save("run/step-1", 1, 2 * MIB)
    server.assert_loads("run/step-1", 1, 2 * MIB)


def test_the_store_is_made_read_only(tmp_path: Path) -> None:
    """F15: for every file that is opened from then on, as when a mount gives up. What was kept is kept."""
    with OwnMount(tmp_path / "disk", "256m") as disk:
        store = disk.folder / "store"
        starter = PlainStarter(through=disk.through)
        with PoolServer(tmp_path, store=store, starter=starter) as server:
            dataset = Dataset(server, "set", SIZES)
            dataset.read(server.pool)
            server.hinder_upload("run/kept")
            server.save("run/kept", 1, 5 * MIB)
            # The server holds the folder by a descriptor, so that what is put over it is met by the next start only.
            folders = [str(store / name) for name in ("segments", "records", "flags", "spares")] + [
                str(store)
            ]
            for folder in folders:
                disk.run("mount", "--bind", folder, folder)
                disk.run("mount", "-o", "remount,bind,ro", folder)
            dataset.read(server.pool)
            assert_only_passing_through(server, "read-only")
            dataset.read(server.pool)
            server.assert_loads("run/kept", 1, 5 * MIB)
            server.end(signal.SIGKILL)
            with pytest.raises(AssertionError, match=r"(?i)read-only file system"):
                server.start()
            assert "Traceback" not in server.log.read_text()
            for folder in reversed(folders):
                disk.run("umount", folder)
            server.start()
            server.assert_loads("run/kept", 1, 5 * MIB)
            dataset.read(server.pool)
            server.save("run/step-1", 1, 2 * MIB)


@pytest.mark.parametrize(
    "what", ["EIO pwritev", "EIO fsync", "EROFS create open rename", "EIO *", "ENODEV *"]
)
def test_a_disk_that_fails(failing: PoolServer, orders: Path, what: str) -> None:
    """F12, F13, F15. Once the disk is well again a restart finds all that was acknowledged."""
    dataset = Dataset(failing, "set", SIZES)
    dataset.read(failing.pool)
    failing.hinder_upload("run/kept")
    failing.save("run/kept", 1, 5 * MIB)
    orders.write_text(what)
    dataset.read(failing.pool)
    assert_only_passing_through(failing, "failing")
    dataset.read(failing.pool)
    orders.unlink()
    assert failing.status.out_of_service, "until a restart: what such a disk took is not to be known"
    failing.restart(signal.SIGKILL)
    assert not failing.status.out_of_service
    failing.assert_loads("run/kept", 1, 5 * MIB)
    dataset.read(failing.pool)
    failing.save("run/step-1", 1, 2 * MIB)
    failing.assert_loads("run/step-1", 1, 2 * MIB)


def test_a_disk_that_can_not_be_read(failing: PoolServer, orders: Path) -> None:
    """F12: what is resident and can't be read comes from the under-store, in the same request."""
    dataset = Dataset(failing, "set", SIZES)
    dataset.read(failing.pool)
    failing.restart()  # forgets what it has in memory of records
    orders.write_text("EIO pread populate")
    # By flight, so that the server reads it; by its files we would.
    with closing(connect(failing.address, token=failing.token, lane="flight")) as pool:
        for _ in range(4):
            dataset.read(pool)
    assert failing.status.disk_errors


def test_two_errors_are_no_reason_to_give_a_disk_up(failing: PoolServer, orders: Path) -> None:
    """F12"""
    for number in range(2):
        orders.write_text("EIO pwritev")
        with pytest.raises(TorchCacheError):
            failing.pool.write("samples:s@0", [(ObjectId(SAMPLES, f"s/{number}", "0"), [b"sample"])])
        orders.unlink()
    failing.save("run/step-1", 1, 2 * MIB)
    assert not failing.status.out_of_service


# ---- the index ----


def overwrite(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def overwrite_all_but_its_head(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8192] + random.Random(1).randbytes(len(data) - 8192))


def flip_bits(path: Path) -> None:
    data, chance = bytearray(path.read_bytes()), random.Random(1)
    for _ in range(40):
        data[chance.randrange(8192, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, 12_288)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("harm", "number"),
    [
        *((harm, signal.SIGTERM) for harm in (Path.unlink, overwrite, overwrite_all_but_its_head)),
        *((harm, signal.SIGTERM) for harm in (flip_bits, cut, empty)),
        *((harm, signal.SIGKILL) for harm in (Path.unlink, cut)),
    ],
)
def test_the_index_of_a_stopped_server_is_harmed(
    server: PoolServer, harm: Callable[[Path], None], number: signal.Signals
) -> None:
    """F6, F7: it is rebuilt from the segments, whether the stop was clean or not; nothing but time is lost."""
    dataset = Dataset(server, "set", [*SIZES, *range(20_000, 30_000, 100)])
    dataset.read(server.pool)
    server.hinder_upload("run/kept")
    server.save("run/kept", 1, 5 * MIB)
    server.end(number)
    harm(server.store / "index" / "data.mdb")
    server.start()
    assert dataset.resident(server.pool) == len(SIZES) + 100
    server.assert_loads("run/kept", 1, 5 * MIB)
    server.save("run/step-1", 1, 2 * MIB)
    assert server.status.corrupt == 0


def test_the_index_is_removed_under_a_live_server(server: PoolServer) -> None:
    """It goes on with the file it has open; the next start finds none, and rebuilds it."""
    dataset = Dataset(server, "set", SIZES)
    dataset.read(server.pool)
    shutil.rmtree(server.store / "index")
    server.hinder_upload("run/kept")
    server.save("run/kept", 1, 5 * MIB)
    more = Dataset(server, "more", SIZES)
    more.read(server.pool)
    for number in (signal.SIGTERM, signal.SIGKILL):
        server.restart(number)
        assert dataset.resident(server.pool) == more.resident(server.pool) == len(SIZES)
        server.assert_loads("run/kept", 1, 5 * MIB)


# ---- refused at the start ----

START = ("--listen", "127.0.0.1:0", "--capacity", "1GB")


def test_a_second_server_on_the_store_of_a_live_one_is_refused(server: PoolServer) -> None:
    """F20; and the first one does not notice."""
    dataset = Dataset(server, "set", SIZES)
    dataset.read(server.pool)
    said = refused(*START, "--store", server.store, "--under-store", f"file=file://{server.source}")
    assert f"the store {server.store} is in use by another server" in said
    assert dataset.resident(server.pool) == len(SIZES)
    server.save("run/step-1", 1, 2 * MIB)
    server.life.end()
    server.start()
    assert dataset.resident(server.pool) == len(SIZES)


def test_the_store_of_another_user_is_refused(tmp_path: Path) -> None:
    """Root makes one; whoever else runs this takes one of root's."""
    theirs = Path("/usr")
    if os.geteuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        os.chown(theirs, 12_345, -1)
    before = sorted(theirs.iterdir())
    said = refused(*START, "--store", theirs, "--under-store", f"file=file://{tmp_path}")
    assert "belongs to user" in said
    assert "choose a folder of your own" in said
    assert sorted(theirs.iterdir()) == before


def test_a_capacity_below_one_segment_is_refused(tmp_path: Path) -> None:
    """F39"""
    store, under_store = tmp_path / "store", f"file=file://{tmp_path}"
    said = refused(
        "--listen", "127.0.0.1:0", "--capacity", "4MiB", "--store", store, "--under-store", under_store
    )
    assert "a capacity of 4194304 bytes is less than one segment holds: give at least" in said
    assert not store.exists()


# ---- descriptors ----


LIMIT = 96


@contextmanager
def crowd(address: str) -> Iterator[None]:
    """Connections to a server that say nothing, more than it has descriptors for."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for number in range(2 * LIMIT):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((host, int(port) + number % 2))
        yield


def until_descriptors(server: PoolServer, enough: Callable[[int], bool]) -> None:
    """Until the server has so many open."""
    deadline = time.monotonic() + 120
    while not enough(count := len(list(Path(f"/proc/{server.life.pid}/fd").iterdir()))):
        assert time.monotonic() < deadline, f"{count} descriptors"
        time.sleep(0.02)


def test_a_server_without_descriptors_sheds_load_and_comes_back(tmp_path: Path) -> None:
    """F14: connections take all there are; those who were there meet typed errors at worst; then all is as before."""
    with PoolServer(
        tmp_path, starter=PlainStarter(through=["prlimit", f"--nofile={LIMIT}:{LIMIT}"])
    ) as server:
        dataset, cold = Dataset(server, "set", SIZES), Dataset(server, "cold", [200_000] * 40)
        dataset.read(server.pool)
        with crowd(server.address):
            until_descriptors(server, lambda count: count >= LIMIT - 3)
            assert dataset.resident(server.pool) == len(SIZES)
            with suppress(TorchCacheError):
                cold.read(server.pool, timeout_s=5)
            with suppress(TorchCacheError):
                server.pool.write("samples:s@0", [(ObjectId(SAMPLES, "s/1", "0"), [b"sample"])], timeout_s=5)
            assert dataset.resident(server.pool) == len(SIZES)
        until_descriptors(server, lambda count: count < LIMIT - 10)
        cold.read(server.pool)
        server.save("run/step-1", 1, 2 * MIB)
        server.assert_loads("run/step-1", 1, 2 * MIB)
        with closing(connect(server.address, token=server.token)) as newcomer:
            assert dataset.resident(newcomer) == len(SIZES)
        assert server.status.corrupt == 0
