"""SIGKILL of a job, of the server, or of both at random moments of saves and of retention (F2, F30, F32; I2, I3).

After each: what was acknowledged loads, bit for bit, whatever else is taken for a checkpoint is one, and nothing is
left behind that a later save doesn't take away.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchcache_server.understore.posix_files import TEMPORARY_PREFIX

import torchcache as tc
from tests.e2e.kill_manager_child import ELEMENTS, content
from tests.integration.pool_server import PoolServer
from tests.unit.checkpoint_states import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    with PoolServer(tmp_path) as server:
        yield server


class Job:
    """A process that saves; `saved` and `begun` are the last steps it told of."""

    def __init__(self, server: PoolServer, root: str, first: int, mode: str) -> None:
        command = [sys.executable, "-m", "tests.e2e.kill_manager_child", server.address, server.token]
        self.process = subprocess.Popen(
            [*command, root, str(first), mode], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.saved = self.begun = first - 1

    def follow(self, until_saved: int) -> None:
        """Reads what it tells until it has saved that step, or ended."""
        assert self.process.stdout is not None
        while self.saved < until_saved and (line := self.process.stdout.readline()):
            self._note(line)

    def _note(self, line: str) -> None:
        step, what = line.split()
        if what == "saved":
            self.saved = int(step)
        else:
            self.begun = int(step)

    def kill(self) -> None:
        self.process.kill()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._note(line)
        self.process.stdout.close()
        self.process.wait()


def loaded_step(manager: tc.CheckpointManager, step: int | None = None) -> int:
    found = {"a": torch.zeros(ELEMENTS, dtype=torch.int64), "b": {"c": None}, "step": None}
    number = manager.load(found, step)
    assert_same(found, content(number))
    return number


def check_kills(server: PoolServer, tmp_path: Path, seed: int, rounds: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    root = str(server.source / "run")
    step = acknowledged = 0
    for _ in range(rounds):
        job = Job(server, root, step + 1, chance.choice(["sync", "async"]))
        try:
            job.follow(until_saved=step + chance.randrange(1, 5))
            time.sleep(chance.random() * chance.choice([0.02, 0.3]))
            victim = chance.choice(["job", "server", "both"])
            if victim != "job":
                server.life.end(signal.SIGKILL)
        finally:
            job.kill()
        if victim != "job":
            server.pool.close()
            server.start()
        acknowledged = max(acknowledged, job.saved)
        with tc.CheckpointManager(root, keep_last=2, pool=server.pool, rng=False) as manager:
            latest = manager.latest()
            assert latest is not None and acknowledged <= latest <= job.begun
            for one in manager.list():
                if one.restorable:  # whatever is taken for one, is one
                    loaded_step(manager, one.step)
            assert loaded_step(manager) == latest
            step = job.begun
    with tc.CheckpointManager(root, keep_last=2, pool=server.pool, rng=False) as manager:
        for step in (step + 1, step + 2):  # noqa: B020 - the next two
            manager.save(step, content(step))
            manager.wait_durable(step)
        deadline = time.monotonic() + 150
        while len(manager.list()) > 2:  # a deletion that the kill came upon goes on by itself
            assert time.monotonic() < deadline, manager.list()
            time.sleep(0.2)
            manager.wait_durable()
        assert [(s.step, s.state) for s in manager.list()] == [(step - 1, "durable"), (step, "durable")]
    run = server.source / "run"
    kept = {f"step-{step - 1}", f"step-{step}"}
    while True:  # the claims of killed saves are released a little later
        files = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
        # A temporary file of a killed server goes with the next write to its folder, and there may be none.
        left = [path for path in files if not path.name.startswith(TEMPORARY_PREFIX)]
        if {path.parts[0] for path in left} == kept:
            return
        assert time.monotonic() < deadline, [path for path in left if path.parts[0] not in kept]
        time.sleep(0.2)


def test_kills_at_random_moments(server: PoolServer, tmp_path: Path) -> None:
    check_kills(server, tmp_path, seed=5, rounds=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_many_kills_at_random_moments(server: PoolServer, tmp_path: Path, seed: int) -> None:
    check_kills(server, tmp_path, seed=seed, rounds=5)
