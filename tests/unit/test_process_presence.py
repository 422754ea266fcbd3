"""Locks that tell who is alive, and the watch of an embedded server."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from torchcache_server.process.endpoint import EndpointFile
from torchcache_server.process.presence import clients_present, wait_until_idle

from torchcache.locks import LockFile

_HOLD_SHARED = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_had_once(tmp_path: Path) -> None:
    with LockFile(tmp_path / "l") as first, LockFile(tmp_path / "l") as second:
        assert first.try_exclusive()
        assert not second.try_exclusive()
        assert not second.wait_exclusive(0.1)
        first.close()
        assert second.wait_exclusive(60)


def test_a_client_that_is_killed_is_not_there_anymore(tmp_path: Path) -> None:
    assert not clients_present(tmp_path)
    command = [sys.executable, "-c", _HOLD_SHARED, str(tmp_path / "clients.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"held\n"
        assert clients_present(tmp_path)
        client.kill()
    assert not clients_present(tmp_path)


def test_a_process_that_attaches_counts_as_there(tmp_path: Path) -> None:
    with LockFile(tmp_path / "pool.lock") as attaching:
        assert attaching.try_exclusive()
        assert clients_present(tmp_path)
    assert not clients_present(tmp_path)


def test_the_watch_ends_after_the_idle_time_and_leaves_under_the_lock(tmp_path: Path) -> None:
    under_lock: list[bool] = []

    def leave() -> None:
        with LockFile(tmp_path / "pool.lock") as lock:
            under_lock.append(not lock.try_exclusive())

    assert wait_until_idle(tmp_path, threading.Event(), leave, idle_s=0.1, poll_s=0.01)
    assert under_lock == [True]


def test_a_client_keeps_it_going(tmp_path: Path) -> None:
    stopping = threading.Event()
    outcome: list[bool] = []
    with LockFile(tmp_path / "clients.lock") as client:
        assert client.try_exclusive()
        watch = threading.Thread(
            target=lambda: outcome.append(
                wait_until_idle(tmp_path, stopping, lambda: None, idle_s=0.02, poll_s=0.01)
            )
        )
        watch.start()
        time.sleep(0.3)
        assert watch.is_alive()
        stopping.set()
        watch.join(60)
    assert outcome == [False]


def test_a_folder_that_is_removed_ends_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert wait_until_idle(root, threading.Event(), lambda: None, idle_s=60, poll_s=0.01)


def test_an_endpoint_is_its_writers_only(tmp_path: Path) -> None:
    mine = EndpointFile(tmp_path, {"instance": "a", "control": "127.0.0.1:1"})
    mine.write()
    mine.write(credentials_digest="d")
    path = tmp_path / "endpoint.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert '"credentials_digest": "d"' in path.read_text()
    EndpointFile(tmp_path, {"instance": "b"}).write()
    mine.remove()
    assert path.exists()
    EndpointFile(tmp_path, {"instance": "b"}).remove()
    assert [p.name for p in tmp_path.iterdir()] == []
