"""Many processes, one embedded pool: real servers, real forks, real SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow.flight as fl
import pytest

from tests.waiting import until
from torchcache import embedded
from torchcache.connecting import connect
from torchcache.embedded import read_endpoint
from torchcache.errors import ConfigurationError, NotResident, ServerUnavailable
from torchcache.lanes.connections import connections, grpc_threads
from torchcache.local_pool import LocalPool
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool
from torchcache.presence import locked, pool_lock

CONTENT = bytes(range(256)) * 500
IDS = [ObjectId("samples", f"d/{i}", "0") for i in range(8)]
EXTENTS = [Extent(ObjectInfo(id_, -1)) for id_ in IDS]
CAPACITY = "256MB"


def fill(pool: Pool) -> None:
    pool.write("samples:d@0", [(id_, [CONTENT]) for id_ in IDS])


def check(pool: Pool) -> int:
    """Reads everything in this process; the number of read calls so far."""
    assert all(bytes(view) == CONTENT for view in pool.read(EXTENTS, namespace="samples:d@0"))
    return pool.statistics().read_calls


def server_pids(root: Path) -> list[int]:
    """The processes that hold a server's lock in `root`, as the kernel tells."""
    found = []
    inodes = {path.stat().st_ino for path in root.glob("server-*/server.lock")}
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) in inodes:
            found.append(int(fields[4]))
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A pool's folder; no server may be left there."""
    yield tmp_path / "pool"
    for pid in server_pids(tmp_path / "pool"):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def pool(root: Path) -> Iterator[Pool]:
    with LocalPool(root, capacity=CAPACITY) as pool:
        yield pool


def run(script: str, root: Path, **options: str) -> subprocess.Popen[str]:
    """Another program that uses the pool in `root`."""
    head = f"""
        import os, sys, time
        from pathlib import Path
        from tests.integration.test_processes import *
        root = Path({str(root)!r})
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **options},
    )


def finish(process: subprocess.Popen[str], seconds: float = 150.0) -> str:
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


# ---- fork, spawn, forkserver, with a live pool in the parent ----


def work(pool: Pool, done: Connection) -> None:
    try:
        done.send(check(pool))
    except BaseException as error:
        done.send(error)


def read_in_child(start_method: str, pool: Pool) -> object:
    context = multiprocessing.get_context(start_method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(pool, send))
    process.start()
    send.close()
    assert receive.poll(120), f"a child by {start_method} hangs"
    answer: object = receive.recv()
    process.join(60)
    return answer


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_a_child_of_a_process_with_a_live_pool(pool: Pool, start_method: str) -> None:
    """F29. The child's statistics are its own."""
    fill(pool)
    check(pool)
    assert read_in_child(start_method, pool) == 1
    assert check(pool) == 2


def test_every_forked_child_works_whatever_the_parent_holds(pool: Pool) -> None:
    """Views, errors with their tracebacks and reader threads of the parent: none may keep gRPC alive."""
    fill(pool)
    held: list[object] = []
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            check(pool)

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        for _ in range(15):
            held.append(pool.read(EXTENTS))
            held += pool.read_each([Extent(ObjectInfo(ObjectId("samples", "none", "0"), -1))])
            try:
                pool.stat("file:///nowhere/to/be/found")
            except Exception as error:
                held.append(error)
            assert read_in_child("fork", pool) == 1
    finally:
        stop.set()
        reader.join()
    assert any(isinstance(one, NotResident) for one in held)


@pytest.mark.long
def test_two_thousand_forks_on_a_busy_machine(tmp_path: Path) -> None:
    """The last of gRPC's threads is started by one that ends: a fork came between the two, once in 200."""
    script = """
        with LocalPool(root, capacity=CAPACITY, lane="flight") as pool:
            fill(pool)
            stop = threading.Event()
            def keep_reading():
                while not stop.is_set():
                    check(pool)
            reader = threading.Thread(target=keep_reading)
            reader.start()
            try:
                assert [read_in_child("fork", pool) for _ in range(400)] == [1] * 400
            finally:
                stop.set()
                reader.join()
    """
    for process in [run(script, tmp_path / str(number)) for number in range(5)]:
        finish(process, seconds=1200)


def test_grpcs_threads_are_gone_before_a_fork(pool: Pool) -> None:
    check_threads: list[dict[str, str]] = []
    fill(pool)
    check(pool)
    assert grpc_threads()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(send, pickle.dumps(grpc_threads()))
        os._exit(0)
    os.waitpid(pid, 0)
    check_threads.append(pickle.loads(os.read(receive, 4096)))
    os.close(receive)
    os.close(send)
    assert check_threads == [{}]
    check(pool)


@pytest.mark.forks
def test_a_child_beside_foreign_flight_is_told_and_does_not_hang(
    root: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Flight client of somebody else, alive at the fork, makes every later one in the child hang."""
    fill(pool)
    fields = read_endpoint(root / "server-0")
    assert fields is not None
    foreign = fl.FlightClient(f"grpc://127.0.0.1:{fields['data_port']}")
    with pytest.raises(fl.FlightUnauthenticatedError):
        foreign.do_get(fl.Ticket(b"")).read_all()
    with monkeypatch.context() as patch:
        patch.setattr(connections, "_patience_s", 0.5)  # it doesn't go
        answer = read_in_child("fork", pool)
    assert isinstance(answer, ConfigurationError)
    assert "spawn or forkserver" in str(answer)
    foreign.close()
    del foreign
    until(lambda: not grpc_threads(), "the end of the foreign client's threads")
    assert read_in_child("fork", pool) == 1


# ---- who starts, who shares, who stays ----


def test_two_processes_starting_at_once_share_one_pool(root: Path) -> None:
    script = f"""
        from torchcache import server_process
        server_process.IDLE_S = 1.0
        with LocalPool(root, capacity={CAPACITY!r}) as pool:
            print(pool.status()[0].instance, flush=True)
            sys.stdin.readline()
    """
    processes = [run(script, root) for _ in range(3)]
    instances = {process.stdout.readline() for process in processes}  # type: ignore[union-attr]
    assert len(instances) == 1
    assert len(server_pids(root)) == 1
    for process in processes:
        finish(process)
    until(lambda: not server_pids(root), "the servers' end")


def test_what_was_written_is_there_for_the_next_pool(root: Path) -> None:
    with LocalPool(root, capacity=CAPACITY) as pool:
        fill(pool)
    assert not server_pids(root)
    with LocalPool(root, capacity=CAPACITY) as pool:
        check(pool)


def test_two_servers_make_one_pool(root: Path) -> None:
    with LocalPool(root, capacity=CAPACITY, servers=2) as pool:
        fill(pool)
        check(pool)
        status = pool.status()
        assert sum(server.chunks for server in status) == len(IDS)
        assert len(server_pids(root)) == 2
        with pytest.raises(ConfigurationError, match="runs with 2 servers, not 1"):
            LocalPool(root, servers=1).address  # noqa: B018
    assert not server_pids(root)


def test_the_pool_survives_who_started_it(root: Path) -> None:
    """SIGKILL of the process that started the server: another goes on, without a break."""
    starter = run(
        f"""
        pool = LocalPool(root, capacity={CAPACITY!r}).pool
        fill(pool)
        print("ready", flush=True)
        sys.stdin.readline()
        """,
        root,
    )
    assert starter.stdout is not None
    assert starter.stdout.readline() == "ready\n"
    with LocalPool(root, capacity=CAPACITY) as pool:
        before = pool.status()[0].instance
        starter.kill()
        starter.wait()
        check(pool)
        assert pool.status()[0].instance == before
    starter.communicate()


def test_a_killed_server_is_started_again(root: Path, pool: Pool) -> None:
    """F1: what was stored is there again; the caller only waits."""
    fill(pool)
    before = pool.status()[0].instance
    os.kill(server_pids(root)[0], signal.SIGKILL)
    check(pool)
    assert pool.status()[0].instance != before
    assert pool.statistics().retries > 0


def test_a_server_killed_amid_reads_is_not_noticed(root: Path) -> None:
    pool = LocalPool(root, capacity=CAPACITY, lane="flight").pool
    fill(pool)
    failed: list[BaseException] = []
    turns = 0
    stop = threading.Event()

    def keep_reading() -> None:
        nonlocal turns
        try:
            while not stop.is_set():
                check(pool)
                turns += 1
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=keep_reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(2):
            reached = turns + 3
            until(lambda reached=reached: turns >= reached or bool(failed), "reads")
            os.kill(server_pids(root)[0], signal.SIGKILL)
        reached = turns + 3
        until(lambda: turns >= reached or bool(failed), "reads after the last kill")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not failed


def test_what_is_held_is_read_on_while_the_server_is_dead(root: Path, pool: Pool) -> None:
    fill(pool)
    check(pool)
    os.kill(server_pids(root)[0], signal.SIGKILL)
    until(lambda: not server_pids(root), "the server is dead")
    check(pool)
    statistics = pool.statistics()
    assert (statistics.retries, statistics.local_extents) == (0, statistics.extents)
    assert not server_pids(root), "nobody needed it"


@pytest.mark.forks
def test_children_keep_the_pool_alive(root: Path) -> None:
    """A forked worker shares its parent's presence: closing the parent's pool leaves the servers to it."""
    local = LocalPool(root, capacity=CAPACITY)
    with local as pool:
        fill(pool)
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(receive, 1)
                os._exit(0 if check(pool) == 1 else 1)
            except BaseException:
                os._exit(2)
    assert len(server_pids(root)) == 1
    os.write(send, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(receive)
    os.close(send)


def test_an_idle_server_ends_and_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No orphan and no stale lock, also after SIGKILL of the last process that used the pool."""
    user = run(
        f"""
        from torchcache import server_process
        server_process.IDLE_S = 0.5
        pool = LocalPool(root, capacity={CAPACITY!r}).pool
        fill(pool)
        print("ready", flush=True)
        sys.stdin.readline()
        """,
        root,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "ready\n"
    time.sleep(1.5)  # three idle times
    assert len(server_pids(root)) == 1  # somebody is there
    user.kill()
    user.communicate()
    until(lambda: not server_pids(root), "the idle server's end")
    assert read_endpoint(root / "server-0") is None
    for name in ("pool.lock", "clients.lock", "server-0/server.lock"):
        assert not locked(root / name)
    with LocalPool(root, capacity=CAPACITY) as pool:
        check(pool)


def test_who_comes_while_a_server_leaves_gets_the_next(root: Path) -> None:
    local = LocalPool(root, capacity=CAPACITY)
    with local as pool:
        fill(pool)
        before = pool.status()[0].instance
        (pid,) = server_pids(root)
        os.kill(pid, signal.SIGTERM)
        until(lambda: check(pool) > 0 and pool.status()[0].instance != before, "the next server")
    assert not server_pids(root)


def test_a_server_that_cannot_start_says_why(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"server.log ends with: .*capacity"):
        LocalPool(root, capacity=1000).pool.status()


def test_a_pool_whose_lock_is_kept_is_an_error_in_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: somebody stopped while attaching."""
    root.mkdir()
    monkeypatch.setattr(embedded, "ATTACH_S", 0.2)
    with pool_lock(root, time.monotonic() + 5), pytest.raises(ServerUnavailable, match="attaching"):
        embedded.EmbeddedMembers(root=root).resolve(deadline=time.monotonic() + 60)


def test_connect_without_an_address(home: Path) -> None:
    script = """
        from torchcache import server_process
        server_process.IDLE_S = 0.5
        pool = connect()
        fill(pool)
        print(check(pickle.loads(pickle.dumps(pool))))
    """
    assert finish(run(script, home)) == "1\n"
    pools = list((home / "pools").iterdir())
    assert len(pools) == 1
    until(lambda: not server_pids(pools[0]), "the idle server's end")


def test_the_address_of_a_local_pool_serves_others(root: Path) -> None:
    local = LocalPool(root, capacity=CAPACITY)
    with local as pool:
        fill(pool)
        other = connect(local.address, token=(root / "token").read_text().strip())
        assert check(other) == 1
        other.close()
        assert (root / "token").stat().st_mode & 0o777 == 0o600


def test_new_credentials_reach_a_running_server(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "first")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with LocalPool(root, capacity=CAPACITY) as pool:
        fill(pool)
        digest = (read_endpoint(root / "server-0") or {})["credentials_digest"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
        check(LocalPool(root, capacity=CAPACITY).pool)
        assert (read_endpoint(root / "server-0") or {})["credentials_digest"] != digest
        assert len(server_pids(root)) == 1
