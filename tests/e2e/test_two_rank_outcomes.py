"""Each fault around a commit of two ranks has one right outcome: real processes, servers and collectives.

(F30, F31, F32; I3.) One rank is killed, stopped or held at a named point; what the other then says is never more than
what there is.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from tests.e2e import two_rank_child
from tests.e2e.forked import fork_server
from tests.e2e.two_rank_child import POINTS, WORLD, Act, Job
from tests.integration.described_saves import state_of
from tests.integration.replica_servers import ReplicaServers, two_servers, uri_for, wait_for_save
from tests.waiting import PATIENCE_S, until
from torchcache.errors import NotCommitted

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZE = 1024 * 1024
AT_COMMIT = list(POINTS).index("committed")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServers]:
    with two_servers(tmp_path_factory.mktemp("pool")) as servers:
        yield servers


@pytest.fixture
def uri(servers: ReplicaServers, request: pytest.FixtureRequest) -> str:
    return uri_for(servers, request.node.name)


class Ranks:
    """The two processes of a job that saves `number` at `uri`. What one does at a point, it is given by `act`."""

    _numbers = itertools.count()

    def __init__(
        self,
        servers: ReplicaServers,
        uri: str,
        number: int,
        *,
        rank: int = 0,
        point: str = "",
        act: Act = "kill",
    ) -> None:
        context = fork_server()
        group = servers.folder / f"group-{next(self._numbers)}"
        job = Job(",".join(servers.addresses), servers.token, uri, number, SIZE, str(group))
        self._pipes: list[Connection] = []
        self._processes = []
        for each in range(WORLD):
            ours, theirs = context.Pipe()
            acts = (point, act) if each == rank else ("", "kill")
            process = context.Process(
                target=two_rank_child.main, args=(job, each, *acts, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def wait_killed(self, rank: int) -> None:
        self._processes[rank].join(PATIENCE_S)
        assert self._processes[rank].exitcode == -signal.SIGKILL

    def wait_stopped(self, rank: int) -> None:
        state = Path(f"/proc/{self._processes[rank].pid}/stat")
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def send(self, rank: int, what: signal.Signals) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, what)

    def told(self, rank: int) -> str:
        assert self._pipes[rank].poll(PATIENCE_S), f"rank {rank} says nothing"
        return str(self._pipes[rank].recv())

    def go_on(self, rank: int) -> None:
        self._pipes[rank].send("go on")

    def outcomes(self) -> list[str]:
        return [self.told(rank) for rank in range(WORLD)]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join(60)
        for pipe in self._pipes:
            pipe.close()


def save(servers: ReplicaServers, uri: str, number: int) -> list[str]:
    with Ranks(servers, uri, number) as ranks:
        return ranks.outcomes()


def loads(servers: ReplicaServers, uri: str, number: int) -> None:
    """Every bit of both ranks' tensors is of that save."""
    right = {
        f"{n}-{part}": t for part in range(2) for n, t in state_of(uri, number, SIZE).items() if n != "number"
    }
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in right.items()} | {
        "number": None
    }
    dcp.load(state, storage_reader=tc.CacheStorageReader(uri, pool=servers.connect()), no_dist=True)
    assert state.pop("number") == number
    assert [name for name in right if not torch.equal(state[name], right[name])] == []


def durable(servers: ReplicaServers, uri: str, number: int) -> None:
    """It is in storage, and nothing else of the path is left in the pool."""
    wait_for_save(servers.pool, uri, lambda info: info.state == "durable")
    loads(servers, uri, number)
    until(lambda: not servers.kept(uri[7:]))


def nothing_there(servers: ReplicaServers, uri: str) -> None:
    with pytest.raises(NotCommitted):
        servers.connect().get_save(*servers.pool.resolve(uri))


@pytest.mark.parametrize("point", POINTS)
def test_the_coordinator_dies(servers: ReplicaServers, uri: str, point: str) -> None:
    """Before the commit there is nothing, and the path is free for the next job; from it on there is all of it."""
    with Ranks(servers, uri, 1, rank=0, point=point) as ranks:
        ranks.wait_killed(0)
        assert ranks.told(1) not in ("saved", "AlreadyExists")  # which nobody told it
        if list(POINTS).index(point) >= AT_COMMIT:
            loads(servers, uri, 1)
            durable(servers, uri, 1)
            assert save(servers, uri, 2) == ["AlreadyExists"] * WORLD
            return
        nothing_there(servers, uri)
        assert save(servers, uri, 2) == ["saved"] * WORLD
        durable(servers, uri, 2)


@pytest.mark.parametrize("point", ["reserved", "half-written", "written"])
def test_a_rank_dies(servers: ReplicaServers, uri: str, point: str) -> None:
    """Nothing is committed, though the coordinator lives on, and the path is free."""
    with Ranks(servers, uri, 1, rank=1, point=point) as ranks:
        ranks.wait_killed(1)
        assert ranks.told(0) not in ("saved", "AlreadyExists")
        nothing_there(servers, uri)
        assert save(servers, uri, 2) == ["saved"] * WORLD
        durable(servers, uri, 2)


@pytest.mark.parametrize("point", ["reserved", "half-written", "written"])
def test_a_rank_of_an_older_attempt_writes_late(servers: ReplicaServers, uri: str, point: str) -> None:
    """Its coordinator is dead, and another job has saved the path: what it writes reaches nobody."""
    with Ranks(servers, uri, 1, rank=1, point=point, act="stop") as older:
        older.wait_stopped(1)
        older.send(0, signal.SIGKILL)
        assert save(servers, uri, 2) == ["saved"] * WORLD
        older.send(1, signal.SIGCONT)
        assert older.told(1) != "saved"
    loads(servers, uri, 2)
    durable(servers, uri, 2)


@pytest.mark.parametrize("point", ["reserved", "gathered", "prepared"])
def test_an_older_attempt_wakes_up(servers: ReplicaServers, uri: str, point: str) -> None:
    """With both its ranks: each is told that the path was taken over."""
    with Ranks(servers, uri, 1, rank=0, point=point, act="stop") as older:
        older.wait_stopped(0)
        assert save(servers, uri, 2) == ["saved"] * WORLD  # once the other's lease has run out
        older.send(0, signal.SIGCONT)
        assert older.outcomes() == ["AlreadyExists"] * WORLD
    durable(servers, uri, 2)


def test_a_commit_comes_twice(servers: ReplicaServers, uri: str) -> None:
    with Ranks(servers, uri, 1, rank=0, act="twice") as ranks:
        assert ranks.outcomes() == ["saved"] * WORLD
    assert servers.pool.get_save(*servers.pool.resolve(uri)).replicas == 2
    loads(servers, uri, 1)
    durable(servers, uri, 1)


@pytest.mark.parametrize("point", ["planned", "gathered"])
def test_a_second_job_meets_one_that_is_saving(servers: ReplicaServers, uri: str, point: str) -> None:
    """Two writers of one path: the first, which is alive and at whatever point, wins."""
    with Ranks(servers, uri, 1, rank=0, point=point, act="wait") as first:
        assert first.told(0) == "at"
        assert save(servers, uri, 2) == ["AlreadyExists"] * WORLD
        first.go_on(0)
        assert first.outcomes() == ["saved"] * WORLD
    durable(servers, uri, 1)


def test_two_jobs_save_one_path_at_once(servers: ReplicaServers, uri: str) -> None:
    with ExitStack() as stack:
        jobs = [stack.enter_context(Ranks(servers, uri, number)) for number in (1, 2)]
        outcomes = [job.outcomes() for job in jobs]
    assert sorted(outcomes) == [["AlreadyExists"] * WORLD, ["saved"] * WORLD]
    durable(servers, uri, 1 + outcomes.index(["saved"] * WORLD))
