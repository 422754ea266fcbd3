"""Each fault around the commit has one right outcome, with real servers and real writers (F30, F31, F32; I3).

The coordinator is killed at every point of its save; an older attempt wakes up after a newer one; a commit comes twice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import dying_writer_child
from tests.e2e.dying_writer_child import POINTS
from tests.e2e.forked import fork_server
from tests.integration.described_saves import load, save
from tests.integration.replica_servers import ReplicaServers, two_servers, uri_for, wait_for_save
from tests.waiting import until
from torchcache.errors import NotCommitted
from torchcache.pool import Pool, SaveInfo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZE = 2 * 1024 * 1024


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServers]:
    with two_servers(tmp_path_factory.mktemp("pool")) as servers:
        yield servers


@pytest.fixture
def uri(servers: ReplicaServers, request: pytest.FixtureRequest) -> str:
    return uri_for(servers, request.node.name)


class Writer:
    """A process that saves number 1 at `uri` until it does `what` to itself at `point`."""

    def __init__(self, servers: ReplicaServers, uri: str, point: str, what: signal.Signals) -> None:
        context = fork_server()
        self.told, say = context.Pipe(duplex=False)
        fields = (",".join(servers.addresses), servers.token, uri, 1, SIZE, point, int(what), say)
        self._process = context.Process(target=dying_writer_child.main, args=fields, daemon=True)
        self._process.start()
        say.close()

    def wait_killed(self) -> None:
        self._process.join(120)
        assert self._process.exitcode == -signal.SIGKILL

    def wait_stopped(self) -> None:
        state = Path(f"/proc/{self._process.pid}/stat")
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> str:
        """How the save ends that was stopped."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)
        assert self.told.poll(120)
        return str(self.told.recv())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(60)
        self.told.close()


def loads(servers: ReplicaServers, uri: str, number: int) -> None:
    assert load(servers.connect(), uri, SIZE) == (number, [])


def durable(servers: ReplicaServers, uri: str, number: int) -> None:
    wait_for_save(servers.pool, uri, lambda info: info.state == "durable")
    loads(servers, uri, number)
    until(lambda: not servers.kept(uri[7:]))


@pytest.mark.parametrize("point", POINTS)
def test_the_coordinator_dies(servers: ReplicaServers, uri: str, point: str) -> None:
    """Up to the commit there is nothing, and the path is free again; from the commit on there is all of it."""
    with Writer(servers, uri, point, signal.SIGKILL) as writer:
        writer.wait_killed()
    if list(POINTS).index(point) < list(POINTS).index("committed"):
        with pytest.raises(NotCommitted):
            servers.connect().get_save(*servers.pool.resolve(uri))
        save(servers.pool, uri, 2, SIZE)
        durable(servers, uri, 2)
    else:
        loads(servers, uri, 1)
        durable(servers, uri, 1)


@pytest.mark.parametrize("point", ["reserved", "written", "prepared"])
def test_an_older_attempt_wakes_up(servers: ReplicaServers, uri: str, point: str) -> None:
    with Writer(servers, uri, point, signal.SIGSTOP) as zombie:
        zombie.wait_stopped()
        save(servers.pool, uri, 2, SIZE)  # once the other's lease has run out
        assert zombie.go_on() == "AlreadyExists"
    durable(servers, uri, 2)


def test_a_commit_comes_twice(servers: ReplicaServers, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its answer was lost."""
    commit = Pool.commit_save

    def twice(pool: Pool, *where: str, **what: Any) -> SaveInfo:
        assert commit(pool, *where, **what).save_id == where[3]
        return commit(pool, *where, **what)

    monkeypatch.setattr(Pool, "commit_save", twice)
    save(servers.pool, uri, 1, SIZE)
    monkeypatch.undo()
    assert servers.pool.get_save(*servers.pool.resolve(uri)).replicas == 2
    loads(servers, uri, 1)
    durable(servers, uri, 1)
