"""`torchcache serve --servers`: real processes, started, killed and stopped together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.ports import free_port
from tests.integration.described_saves import save
from tests.integration.server_process import START_S, command
from tests.waiting import until
from torchcache import Pool, connect
from torchcache.errors import TransientError
from torchcache.filesystem import TorchCacheFileSystem
from torchcache.model import Extent

POOL = "torchcache pool of 2 servers: "

UMASK = 0o027
"""Of the user who starts them."""


class Supervised:
    """Two servers under one supervisor, killed with all its children at the end if they still run."""

    def __init__(self, folder: Path, home: Path, port: int, *more: str) -> None:
        self.source = folder / "source"
        self.source.mkdir(exist_ok=True)
        self.store = folder / "store"
        self._token = home / "token"
        self.output: list[str] = []
        arguments = [
            *("--servers", "2", "--listen", f"127.0.0.1:{port}", "--store", self.store, "--capacity", "2GB"),
            *("--under-store", f"file=file://{self.source}", "--drain-s", "0.2", *more),
        ]
        self.process: Any = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=UMASK
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as said:
            self.output += said

    def wait_ready(self) -> str:
        """The address of the pool, once it is told."""
        until(lambda: any(line.startswith(POOL) for line in self.output))
        return next(line for line in self.output if line.startswith(POOL)).removeprefix(POOL).strip()

    def pool(self) -> Pool:
        return connect(self.wait_ready(), token=self._token.read_text().strip(), lane="flight")

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(pid) for task in tasks for pid in task.read_text().split())

    def end(self) -> int:
        code: int = self.process.wait(START_S)
        self._reader.join()
        return code

    def close(self) -> None:
        for pid in [*self.children(), self.process.pid] if self.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        self.end()


@pytest.fixture
def supervised(tmp_path: Path, home: Path) -> Iterator[Supervised]:
    made = Supervised(tmp_path, home, free_port_run())
    yield made
    made.close()


def free_port_run() -> int:
    """The first of four ports that are free."""
    while True:
        port = free_port(beside=3)
        if all(is_free(port + i) for i in range(4)):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def read_all(supervised: Supervised, pool: Pool, below: str = "") -> None:
    folder = supervised.source / below
    infos = list(pool.list(f"file://{folder}"))
    assert pool.read([Extent(info) for info in infos]) == [
        path.read_bytes() for path in sorted(folder.iterdir())
    ]


def test_they_are_one_pool_in_which_one_that_dies_is_started_again(supervised: Supervised) -> None:
    for number in range(20):
        (supervised.source / f"{number:02d}").write_bytes(os.urandom(5000))
    pool = supervised.pool()
    read_all(supervised, pool)
    first, second = pool.status()
    assert int(second.address.rpartition(":")[2]) == int(first.address.rpartition(":")[2]) + 2
    assert {Path(s.store_path) for s in (first, second)} == {supervised.store / f"server-{i}" for i in (0, 1)}
    assert [s.capacity_bytes for s in (first, second)] == [s.weight for s in (first, second)] == [10**9] * 2
    assert all(s.chunks for s in (first, second)), "each has its part"
    killed, other = supervised.children()
    before = {status.address: (status.instance, status.chunks) for status in pool.status()}
    os.kill(killed, signal.SIGKILL)
    read_all(supervised, pool)

    def after() -> dict[str, tuple[str, int]]:
        try:
            return {status.address: (status.instance, status.chunks) for status in pool.status()}
        except TransientError:
            return {}

    until(lambda: after().keys() == before.keys() and any(after()[a][0] != before[a][0] for a in before))
    assert killed not in supervised.children()
    assert other in supervised.children()
    changed = [address for address, (instance, _) in after().items() if instance != before[address][0]]
    assert len(changed) == 1, "the other went on"
    assert after()[changed[0]][1] >= before[changed[0]][1], "what it held is there"
    read_all(supervised, pool)
    pool.close()
    children = supervised.children()
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.end() == 0
    assert all(is_gone(pid) for pid in children)
    assert any("SIGKILL" in line and "started again" in line for line in supervised.output)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_left_shows_in_the_exit_code(supervised: Supervised) -> None:
    pool = supervised.pool()
    (supervised.source / "run" / "__0_0.distcp" / "in the way").mkdir(parents=True)
    save(pool, f"file://{supervised.source}/run", 1, 1000)
    pool.close()
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.end() == 1
    assert any("not yet in the under-store" in line for line in supervised.output)


def test_files_in_storage_get_the_mode_that_their_user_gives_and_the_rest_is_private(
    supervised: Supervised,
) -> None:
    shared = supervised.source / "shared"
    shared.mkdir()
    shared.chmod(0o2700)
    pool = supervised.pool()
    TorchCacheFileSystem(pool).pipe_file(f"file://{shared}/run/step/0", b"shard")
    read_all(supervised, pool, "shared/run/step")
    pool.close()
    supervised.process.send_signal(signal.SIGTERM)
    supervised.end()
    assert {path.name: path.stat().st_mode & 0o7777 for path in shared.rglob("*")} == {
        "run": 0o2777 & ~UMASK,
        "step": 0o2777 & ~UMASK,
        "0": 0o666 & ~UMASK,
    }
    assert shared.stat().st_mode & 0o7777 == 0o2700, "what was there stays as it is"
    held = [path for path in supervised.store.rglob("*") if path.is_file()]
    assert held
    assert not [path for path in held if path.stat().st_mode & 0o077]


def test_they_end_with_a_supervisor_that_is_killed(supervised: Supervised) -> None:
    supervised.wait_ready()
    children = supervised.children()
    supervised.process.kill()
    until(lambda: all(is_gone(pid) for pid in children))


def test_one_that_cannot_start_ends_all(tmp_path: Path, home: Path) -> None:
    port = free_port_run()
    with socket.create_server(("127.0.0.1", port + 2)):
        supervised = Supervised(tmp_path, home, port)
        assert supervised.end() == 2
    said = "".join(supervised.output)
    assert f"can't listen on 127.0.0.1:{port + 2}" in said
    assert "server-1 could not start" in said
    assert is_free(port)
