"""Clients that write into the store's files: well, killed, stopped and continued; and servers that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from examples.ports import free_port
from tests.integration.local_writer_child import Job, namespace, object_id
from tests.integration.own_mounts import OwnMount
from tests.integration.pool_server import PoolServer
from tests.integration.self_describing import content, difference
from tests.integration.store_process_parts import Child, PlainStarter
from tests.integration.test_store_full import fill_up
from torchcache.connecting import connect
from torchcache.errors import NotResident
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 1 << 20
CAPACITY = "200MiB"
DISK = "64m"
SIZE = 30 * MIB + 77  # more than a segment
SOON_S = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    with PoolServer(
        tmp_path, capacity=CAPACITY, more=("--listen", f"127.0.0.1:{free_port(beside=1)}")
    ) as server:
        yield server


def child(server: PoolServer, key: str, *, through: Sequence[str] = (), **more: Any) -> Child:
    job = Job(address=server.address, token=server.token, key=key, size=SIZE, **more)
    return Child("tests.integration.local_writer_child", asdict(job), through=through)


def write(pool: Pool, key: str, size: int = SIZE) -> None:
    pool.write(namespace(key), [(object_id(key), [content(key, 0, size)])], durable=True)


def assert_there(pool: Pool, key: str, size: int = SIZE) -> None:
    """I1, I2: all of it, and every byte right."""
    [view] = pool.read([Extent(ObjectInfo(object_id(key), size))], namespace=namespace(key))
    assert not difference(key, 0, 0, view)
    assert len(view) == size


def is_there(pool: Pool, key: str) -> bool:
    extent = Extent(ObjectInfo(object_id(key), SIZE))
    [found] = pool.read_each([extent], namespace=namespace(key), resident_only=True)
    assert isinstance(found, NotResident) or not difference(key, 0, 0, memoryview(found))
    return not isinstance(found, NotResident)


def wait_until_nothing_is_used(server: PoolServer) -> None:
    """I5."""
    end = time.monotonic() + SOON_S
    while server.status.used_bytes and time.monotonic() < end:
        time.sleep(0.1)
    assert (server.status.used_bytes, server.status.segments) == (0, 0)
    assert not list((server.store / "segments").glob("*/*.segment"))


def test_what_was_written_into_the_files_is_read_by_every_lane(server: PoolServer) -> None:
    write(server.pool, "a")
    write(server.pool, "little", 1000)
    assert server.pool.statistics().lanes == {server.address: "local"}
    assert server.pool.statistics().local_writes == 1
    for lane in ("local", "flight"):
        with closing(connect(server.address, token=server.token, lane=lane)) as pool:
            assert_there(pool, "a")
            assert_there(pool, "little", 1000)
    server.restart(signal.SIGKILL)
    assert_there(server.pool, "a")


def test_a_checkpoint_is_written_into_the_files(server: PoolServer) -> None:
    server.save("run/step-1", 1, SIZE)
    server.assert_loads("run/step-1", 1, SIZE)
    server.save("run/step-1", 2, SIZE, overwrite=True)
    assert server.pool.statistics().local_writes >= 2
    server.restart(signal.SIGKILL)
    server.assert_loads("run/step-1", 2, SIZE)


@pytest.mark.parametrize(
    ("call", "after"),
    [
        ("open", 0),
        pytest.param("pwritev", 0, marks=pytest.mark.long),  # ten seconds, as the first and the third
        ("pwritev", 9),
        ("close", 0),
    ],
)
def test_of_a_client_that_is_killed_nothing_is_left(server: PoolServer, call: str, after: int) -> None:
    """Between the answer and the first byte, in the midst; and of one that was acknowledged everything is."""
    with closing(child(server, "k", signal="SIGKILL", call=call, after=after)) as killed:
        assert killed.answer(SOON_S, "write") == {"interrupted": after + 1}
        assert killed.process.wait(SOON_S) == -signal.SIGKILL
    if call == "close":
        assert_there(server.pool, "k")
        return
    wait_until_nothing_is_used(server)
    assert not is_there(server.pool, "k")
    write(server.pool, "k")
    assert_there(server.pool, "k")


def test_a_client_that_wakes_up_after_its_time_hurts_nobody(server: PoolServer) -> None:
    """It was stopped in the midst of a write, and goes on when its files have been given back."""
    write(server.pool, "before")
    server.pool.evict(namespace("before"))  # their files are used again
    with ExitStack() as closing_all:
        while True:
            zombie = closing_all.enter_context(
                closing(child(server, "z", signal="SIGSTOP", after=9, timeout_s=3))
            )
            answer = zombie.answer(SOON_S, "write")
            if answer.get("outcome") != "DeadlineExceeded":  # before it came to be stopped
                break
        assert answer == {"interrupted": 10}
        wait_until_nothing_is_used(server)
        for key in "abc":
            write(server.pool, key)
        zombie.process.send_signal(signal.SIGCONT)
        assert zombie.answer(SOON_S, "write")["outcome"] == "DeadlineExceeded"
        for key in "abc":
            assert_there(server.pool, key)
    assert not is_there(server.pool, "z")
    with closing(connect(server.address, token=server.token, lane="flight")) as pool:
        for key in "abc":
            assert_there(pool, key)


@pytest.mark.parametrize(("call", "after"), [("open", 0), ("pwritev", 9)])
def test_a_client_whose_server_is_killed_meanwhile_writes_again(
    server: PoolServer, call: str, after: int
) -> None:
    """It writes on into a file that the next server knows by now, and nothing of that server's is in there."""
    with closing(child(server, "s", signal="SIGSTOP", call=call, after=after)) as writer:
        assert writer.answer(SOON_S, "write") == {"interrupted": after + 1}
        server.restart(signal.SIGKILL)
        write(server.pool, "other")
        server.pool.write(namespace("s"), [(object_id("small"), [content("small", 0, MIB)])], durable=True)
        writer.process.send_signal(signal.SIGCONT)
        assert writer.answer(SOON_S, "write")["outcome"] == "written"
    assert_there(server.pool, "s")
    assert_there(server.pool, "other")
    assert is_small_there(server)
    server.restart(signal.SIGKILL)
    assert_there(server.pool, "s")
    assert is_small_there(server)


def is_small_there(server: PoolServer) -> bool:
    info = ObjectInfo(object_id("small"), MIB)
    [view] = server.pool.read([Extent(info)], namespace=namespace("s"))
    return not difference("small", 0, 0, view)


def test_a_disk_that_is_full_in_the_midst_of_a_write(tmp_path: Path) -> None:
    """F10: a typed error from the other lane, nothing is left, and it works once there is room."""
    with OwnMount(tmp_path / "disk", DISK) as disk:
        starter = PlainStarter(through=disk.through)
        server = PoolServer(tmp_path, store=disk.folder / "store", capacity=CAPACITY, starter=starter)
        with server:
            other = disk.seen / "somebody's"
            with closing(child(server, "f", through=disk.through, signal="SIGSTOP", after=5)) as writer:
                assert writer.answer(SOON_S, "write") == {"interrupted": 6}
                fill_up(other)
                writer.process.send_signal(signal.SIGCONT)
                assert writer.answer(SOON_S, "write") == {"outcome": "OutOfSpace", "local_writes": 0}
            assert server.status.used_bytes == 0
            other.unlink()
            with closing(child(server, "f", through=disk.through)) as writer:
                assert writer.answer(SOON_S, "write") == {"outcome": "written", "local_writes": 1}
            assert_there(server.pool, "f")


def test_a_process_that_forks_while_it_writes(server: PoolServer) -> None:
    """The fork waits: the child has none of the writer's locks, and both may write on."""
    threads = [threading.Thread(target=write, args=(server.pool, key)) for key in ("f", "g")]
    for thread in threads:
        thread.start()
    for _ in range(3):
        pid = os.fork()
        if not pid:
            os._exit(any(".segment" in os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()))
        assert os.waitpid(pid, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert_there(server.pool, "f")
    assert_there(server.pool, "g")
