"""SIGKILL of ranks, the coordinator and servers at random moments of saves of two ranks to three servers.

(F1, F2, F19, F21, F30, F32, F37; I2, I3.)

After every kill: each acknowledged checkpoint loads bit for bit, and whatever else the pool takes for one is whole.
What one server took alone, with a warning, may have to wait for that server. At the end all of it is in the
under-store, a folder or a real S3, where torch's own reader finds it.
"""

from __future__ import annotations

import os
import random
import select
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e import kill_ranks_child
from tests.e2e.forked import fork_server
from tests.e2e.kill_ranks_child import WORLD, content
from tests.integration.replica_servers import ReplicaServers, wait_for_save
from tests.integration.store_process_parts import ForkingStarter
from tests.proofs import proof
from torchcache.errors import NotCommitted, ServerUnavailable
from torchcache.pool import Pool

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]

SERVERS: Final = 3
SILENCE_S: Final = 150.0

SEEDS: Final = range(*map(int, os.environ.get("KILL_SEEDS", "100:110").split(":")))
"""Of the long runs."""


class Ranks:
    """The ranks of one job, from their start to their end; `told` is what the coordinator said so far."""

    def __init__(self, folder: Path, servers: ReplicaServers, root: str, first: int, attempt: int) -> None:
        context = fork_server()
        group = folder / f"group-{attempt}"
        self._read, say = os.pipe()
        quiet = os.open(os.devnull, os.O_WRONLY)
        self.processes = []
        self._buffer = b""
        addresses = ",".join(servers.addresses)
        for rank in range(WORLD):
            pipe = say if rank == 0 else quiet
            fields = (rank, str(group), addresses, servers.token, root, first, attempt)
            process = context.Process(target=_rank, args=(*fields, _Descriptor(pipe)), daemon=True)
            process.start()
            self.processes.append(process)
        os.close(say)
        os.close(quiet)

    def lines(self, timeout_s: float) -> list[list[str]]:
        """What was told within the time, split into words; [] if nothing was. Raises EOFError at the end of it all."""
        readable, _, _ = select.select([self._read], [], [], timeout_s)
        if not readable:
            return []
        got = os.read(self._read, 1 << 16)
        if not got:
            raise EOFError
        *lines, self._buffer = (self._buffer + got).split(b"\n")
        return [line.decode().split(" ", 3) for line in lines]

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()

    def end(self) -> list[list[str]]:
        """Kills those that are left; what had been told."""
        for process in self.processes:
            process.kill()
        rest: list[list[str]] = []
        try:
            while True:
                rest += self.lines(SILENCE_S)
        except EOFError:
            pass
        for process in self.processes:
            process.join(60)
            process.close()
        os.close(self._read)
        return rest


class _Descriptor:
    """A descriptor that travels to the fork server's child."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import DupFd

        return (_received, (DupFd(self.number),))


def _received(duplicate: Any) -> int:
    return int(duplicate.detach())


def _rank(*arguments: Any) -> None:
    kill_ranks_child.main(*arguments)


class History:
    """What a run has begun and what was acknowledged, by step: the attempts at it. `alone`: by one server, and a
    warning said so."""

    def __init__(self) -> None:
        self.begun: dict[int, set[int]] = {}
        self.saved: dict[int, int] = {}
        self.alone: set[int] = set()
        self.failures: list[str] = []

    def note(self, lines: list[list[str]]) -> None:
        for what, step, attempt, *why in lines:
            if what == "begun":
                self.begun.setdefault(int(step), set()).add(int(attempt))
            elif what == "saved":
                self.saved[int(step)] = int(attempt)
                (self.alone.add if why else self.alone.discard)(int(step))
            else:
                self.failures.append(" ".join(why))

    @property
    def last(self) -> int:
        return max(self.begun, default=0)


def load(reader: Any) -> tuple[int, int]:
    """Step and attempt of the checkpoint, every bit of which was compared."""
    shapes = content(0, 0)
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in shapes.items()} | {
        "mark": None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    step, attempt = divmod(state.pop("mark"), 1000)
    for name, tensor in content(step, attempt).items():
        assert torch.equal(state[name], tensor), f"{name} of step {step}, attempt {attempt}"
    return step, attempt


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where a run's checkpoints end: `root`. Without `s3` that is a folder."""

    root: str
    under_store: str
    s3: SeaweedFS | None = None

    @classmethod
    def folder(cls, folder: Path) -> Storage:
        folder.mkdir()
        return cls(root=f"file://{folder}/run", under_store=f"file=file://{folder}")

    @classmethod
    def bucket(cls, s3: SeaweedFS) -> Storage:
        root = f"s3://{s3.make_bucket()}/run"
        return cls(root=root, under_store="s3=s3://", s3=s3)

    def fetch(self, scratch: Path) -> Path:
        """The run's folder, as somebody finds it who knows nothing of torchcache; `scratch` is for a copy."""
        if self.s3 is None:
            return Path(self.root.removeprefix("file://"))
        bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        pages = self.s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        for key in [entry["Key"] for page in pages for entry in page.get("Contents", ())]:
            file = scratch / key
            file.parent.mkdir(parents=True, exist_ok=True)
            self.s3.client.download_file(bucket, key, str(file))
        return scratch / prefix


class Run:
    """One seeded run: jobs that save, kills, and what must hold after each."""

    def __init__(self, seed: int, servers: ReplicaServers, folder: Path, storage: Storage) -> None:
        self.chance = random.Random(seed)
        self.servers = servers
        self._folder = folder
        self._storage = storage
        self.root = storage.root
        self.history = History()
        self.kills = {"rank": 0, "coordinator": 0, "server": 0}
        self.loads = 0
        self.waited = 0  # for a server that alone had what was acknowledged
        self.borrowed = 0  # so many of those loaded, not durable yet, had borrowed files
        self._jobs = 0
        self._job: Ranks | None = None

    def go(self, kills: int) -> None:
        try:
            while sum(self.kills.values()) < kills:
                self._follow(saves=self.chance.randrange(0, 3))
                self._kill(self.chance.choice(["rank", "coordinator", "server", "server", "both"]))
                self._check()
            self._end_job()
            self._revive()
            self._check_all_durable()
        finally:
            self._end_job()

    def _follow(self, saves: int) -> None:
        """Until the job has begun a save, and ended so many before; then to a random moment of it."""
        if self._job is None:
            self._jobs += 1
            first = (
                self.history.last if self.history.last not in self.history.saved else self.history.last + 1
            )
            self._job = Ranks(self._folder, self.servers, self.root, max(1, first), self._jobs)
        seen = 0
        deadline = time.monotonic() + SILENCE_S
        while True:
            assert time.monotonic() < deadline, (self.history.last, self.history.failures[-3:])
            lines = self._job.lines(1.0)
            self.history.note(lines)
            ended = sum(line[0] != "begun" for line in lines)
            seen += ended
            if seen >= saves and lines and lines[-1][0] == "begun":
                break
        time.sleep(self.chance.random() * self.chance.choice([0.02, 0.1, 0.3]))

    def _kill(self, victim: str) -> None:
        assert self._job is not None
        if victim in ("rank", "both"):
            self._job.kill(1)
            self.kills["rank"] += 1
        if victim == "coordinator":
            self._job.kill(0)
            self.kills["coordinator"] += 1
        if victim in ("server", "both"):
            up = self.servers.running
            if len(up) < SERVERS:  # what is acknowledged survives the loss of one
                self._revive()
                up = self.servers.running
            self.servers.end(self.chance.choice(up))
            self.kills["server"] += 1
        if victim != "server":
            self._end_job()
        if victim == "coordinator" or self.chance.random() < 0.5:
            self._revive()

    def _end_job(self) -> None:
        if self._job is not None:
            job, self._job = self._job, None
            self.history.note(job.end())

    def _revive(self) -> None:
        for number in range(SERVERS):
            if number not in self.servers.running:
                self.servers.start(number)

    def _check(self) -> None:
        """The last steps by a client that knows nothing yet; with a server down too."""
        pool = self.servers.connect()
        saved = sorted(self.history.saved)[-3:]
        for step in {*saved, self.history.last}:
            self._check_step(pool, step)
        pool.close()

    def _check_step(self, pool: Pool, step: int) -> None:
        acknowledged = self.history.saved.get(step)
        if step == self.history.last and self._job is not None and acknowledged is None:
            return  # it is being written
        uri = f"{self.root}/step-{step}"
        try:
            info = pool.get_save(*pool.resolve(uri))
        except ServerUnavailable:
            if step not in self.history.alone:
                assert acknowledged is None, f"step {step} was acknowledged"
                return
            self._revive()
            info = pool.get_save(*pool.resolve(uri))
            self.waited += 1
        except NotCommitted:
            assert acknowledged is None, f"step {step} was acknowledged"
            return
        found = load(tc.CacheStorageReader(uri, pool=pool))
        self.loads += 1
        self.borrowed += info.state != "durable" and bool(info.borrowed)
        if acknowledged is not None:
            assert found == (step, acknowledged)
        else:
            assert found[0] == step and found[1] in self.history.begun[step]

    def _check_all_durable(self) -> None:
        pool = self.servers.connect()
        for step, attempt in sorted(self.history.saved.items()):
            uri = f"{self.root}/step-{step}"
            wait_for_save(pool, uri, lambda info: info.state == "durable")
            assert load(tc.CacheStorageReader(uri, pool=pool)) == (step, attempt)
            self.loads += 1
        stored = self._storage.fetch(self._folder / "fetched")
        for step, attempt in sorted(self.history.saved.items()):
            assert load(FileSystemReader(stored / f"step-{step}")) == (step, attempt)
            self.loads += 1
        for folder in stored.iterdir():
            if any(file.stat().st_size for file in folder.glob(".torchcache.json")):
                step = int(folder.name.removeprefix("step-"))
                assert load(FileSystemReader(folder))[1] in self.history.begun[step]


@pytest.fixture(scope="module")
def starter() -> Iterator[ForkingStarter]:
    with ForkingStarter() as starter:
        yield starter


def check_kills(seed: int, kills: int, folder: Path, storage: Storage, starter: ForkingStarter) -> Run:
    print(f"seed {seed}, {storage.root}")
    with ExitStack() as stack:
        servers = ReplicaServers(
            folder, storage.under_store, count=SERVERS, starter=starter, keeps_copies=True
        )
        stack.enter_context(servers)
        run = Run(seed, servers, folder, storage)
        run.go(kills)
    print(
        f"{run.kills}, {len(run.history.saved)} acknowledged, {run.loads} loads; failed: {run.history.failures}"
    )
    assert run.loads
    return run


VICTIMS: Final = ("rank", "coordinator", "server")


def many_kills(
    folder: Path, storage_of: Callable[[Path], Storage], starter: ForkingStarter
) -> dict[str, int | float | str]:
    """Twenty kills of each seed, in figures."""
    runs = []
    for seed in SEEDS:
        run_folder = folder / str(seed)
        run_folder.mkdir()
        runs.append(check_kills(seed, 20, run_folder, storage_of(run_folder), starter))
    return {
        **{f"kills of a {victim}": sum(run.kills[victim] for run in runs) for victim in VICTIMS},
        "kills": sum(sum(run.kills.values()) for run in runs),
        "acknowledged": sum(len(run.history.saved) for run in runs),
        "loads": sum(run.loads for run in runs),
        "of them with borrowed files": sum(run.borrowed for run in runs),
        "of them behind the return of the only holder": sum(run.waited for run in runs),
        "first seed": SEEDS[0],
    }


def test_kills_of_ranks_and_servers(tmp_path: Path, starter: ForkingStarter) -> None:
    check_kills(11, 4, tmp_path, Storage.folder(tmp_path / "source"), starter)


@pytest.mark.long
def test_many_kills_of_ranks_and_servers(tmp_path: Path, starter: ForkingStarter) -> None:
    with proof("rank-kills") as figures:
        figures.update(many_kills(tmp_path, lambda folder: Storage.folder(folder / "source"), starter))


@pytest.mark.long
def test_many_kills_of_ranks_and_servers_over_s3(tmp_path: Path, s3_server: SeaweedFS) -> None:
    # Servers forked off a process have what that found in its environment when it started.
    with (
        proof("rank-kills-s3") as figures,
        environment(s3_server.environment()),
        ForkingStarter() as starter,
    ):
        figures.update(many_kills(tmp_path, lambda folder: Storage.bucket(s3_server), starter))
