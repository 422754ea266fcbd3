"""A disk that is full in earnest: a tmpfs of 64 MiB under a server that believes in a gigabyte. Faults F10, F11."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.own_mounts import OwnMount, fill_up
from tests.integration.pool_server import Dataset, PoolServer
from tests.integration.store_process_parts import PlainStarter
from tests.proofs import proof
from torchcache.errors import NotCommitted, OutOfSpace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 1 << 20
DISK = "64m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[OwnMount]:
    with OwnMount(tmp_path / "disk", DISK) as mount:
        yield mount


@pytest.fixture
def server(tmp_path: Path, disk: OwnMount) -> Iterator[PoolServer]:
    starter = PlainStarter(through=disk.through)
    with PoolServer(tmp_path, store=disk.folder / "store", starter=starter) as server:
        yield server


@proof("full-disk", cases=1, disk="64 MiB")
def test_a_dataset_larger_than_the_disk_is_read_right(server: PoolServer, disk: OwnMount) -> None:
    """F10, I1: what there is no room for passes through, in the first epoch and in the next."""
    dataset = Dataset(server, "set", [5 * MIB + 77] * 20)
    for _ in range(2):
        dataset.read(server.pool)
    status = server.status
    assert status.passed_through
    held = dataset.resident(server.pool)
    assert held >= 5, "what was stored before the disk was full stays"
    assert status.used_bytes <= 64 * MIB
    server.restart()
    assert dataset.resident(server.pool) == held
    dataset.read(server.pool)


@proof("full-disk", cases=1, disk="64 MiB")
def test_a_save_that_does_not_fit_is_refused_and_one_that_does_is_taken(server: PoolServer) -> None:
    """F11, I2, I3, I6: cached chunks yield to a save; saves that aren't uploaded yield to nothing."""
    dataset = Dataset(server, "set", [4 * MIB] * 24)
    dataset.read(server.pool)
    in_the_way = server.hinder_upload("run/kept")
    server.save("run/kept", 1, 20 * MIB)
    server.hinder_upload("run/large")
    with pytest.raises(OutOfSpace):
        server.save("run/large", 1, 60 * MIB)
    with pytest.raises(NotCommitted):
        server.assert_loads("run/large", 1, 60 * MIB)
    dataset.read(server.pool)
    server.assert_loads("run/kept", 1, 20 * MIB)
    server.save("run/large", 2, 20 * MIB)
    server.assert_loads("run/large", 2, 20 * MIB)
    server.restart()
    server.assert_loads("run/kept", 1, 20 * MIB)
    server.assert_loads("run/large", 2, 20 * MIB)
    dataset.read(server.pool)
    (in_the_way / "in the way").rmdir()
    in_the_way.rmdir()
    assert server.status.corrupt == 0


@proof("full-disk", cases=1, disk="64 MiB")
def test_somebody_else_fills_the_disk_and_frees_it_again(server: PoolServer, disk: OwnMount) -> None:
    """F10, F11, I6: to the last page, while the server runs; and once there is room again it goes on, unstarted."""
    server.hinder_upload("run/kept")
    server.save("run/kept", 1, 12 * MIB)
    pid = server.life.pid
    fill_up(disk.seen / "theirs")
    dataset = Dataset(server, "set", [3 * MIB] * 8)
    dataset.read(server.pool)
    assert server.status.passed_through
    for number in range(3):
        with pytest.raises(OutOfSpace):
            server.save(f"run/refused-{number}", 1, 3 * MIB)
        with pytest.raises(NotCommitted):
            server.assert_loads(f"run/refused-{number}", 1, 3 * MIB)
    server.assert_loads("run/kept", 1, 12 * MIB)
    (disk.seen / "theirs").unlink()
    server.save("run/refused-1", 2, 3 * MIB)
    server.assert_loads("run/refused-1", 2, 3 * MIB)
    passed = server.status.passed_through
    dataset.read(server.pool)
    assert dataset.resident(server.pool) == 8
    assert server.status.passed_through == passed
    assert server.life.pid == pid
    server.assert_loads("run/kept", 1, 12 * MIB)


@proof("full-disk", cases=1, disk="64 MiB")
def test_a_server_killed_on_a_full_disk_starts_there(server: PoolServer, disk: OwnMount) -> None:
    """F1, F10: a start must need no room that isn't there, or say so; nothing acknowledged is lost."""
    server.hinder_upload("run/kept")
    server.save("run/kept", 1, 12 * MIB)
    dataset = Dataset(server, "set", [3 * MIB] * 8)
    dataset.read(server.pool)
    fill_up(disk.seen / "theirs")
    server.life.end()
    server.start()
    server.assert_loads("run/kept", 1, 12 * MIB)
    dataset.read(server.pool)
