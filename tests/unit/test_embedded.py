"""The embedded pool's folder: locks, endpoints, capacity. Its processes are in tests/integration/test_processes.py."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchcache_server.process.endpoint import EndpointFile

from torchcache.embedded import default_capacity_bytes, make_folder, read_endpoint, running
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.presence import Presence, locked, pool_lock, used

GIB = 1024**3


def soon() -> float:
    return time.monotonic() + 60.0


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


@pytest.mark.parametrize(
    ("free_bytes", "expected"), [(100 * GIB, 10 * GIB), (5 * GIB, GIB), (GIB // 2, GIB // 2), (10 * GIB, GIB)]
)
def test_the_capacity_is_a_tenth_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, expected: int
) -> None:
    free(monkeypatch, free_bytes)
    assert default_capacity_bytes(tmp_path) == expected


def test_what_the_pool_holds_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 100 * GIB)
    segment = tmp_path / "server-0" / "store" / "segment"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(os.urandom(1024 * 1024))
    assert default_capacity_bytes(tmp_path) >= 10 * GIB + 1024 * 1024 // 10


def test_a_folder_that_everyone_may_write_to_is_refused(tmp_path: Path) -> None:
    """Anybody could put an endpoint there, and be sent the token."""
    make_folder(tmp_path / "made")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigurationError, match="everyone may write to the pool's folder"):
        make_folder(tmp_path / "open")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"control": 7}'])
def test_an_endpoint_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    assert read_endpoint(tmp_path) is None
    (tmp_path / "endpoint.json").write_text(text)
    assert read_endpoint(tmp_path) is None


PLACED: dict[str, Callable[[Path], object]] = {
    "a symlink": lambda path: path.symlink_to(path.parent / "outside"),
    "a pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "too much": lambda path: path.write_text(" " * (2 << 20)),
}


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("kind", PLACED)
def test_an_endpoint_that_is_no_file_of_ours_is_none(tmp_path: Path, kind: str) -> None:
    """Neither waited for nor followed: what it leads to could say that the servers are elsewhere."""
    (tmp_path / "outside").write_text('{"control": "192.0.2.1:7440", "instance": "i"}')
    PLACED[kind](tmp_path / "endpoint.json")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert read_endpoint(tmp_path) is None
    EndpointFile(tmp_path, {"instance": "i"}).remove()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert os.path.lexists(tmp_path / "endpoint.json"), "only the server's own is removed"


def test_an_endpoint_without_a_living_server_is_stale(tmp_path: Path) -> None:
    (tmp_path / "endpoint.json").write_text('{"control": "127.0.0.1:1"}')
    (tmp_path / "server.lock").touch()
    assert read_endpoint(tmp_path) is not None
    assert not running(tmp_path)


def test_the_pools_lock_is_one_process_wide_too(tmp_path: Path) -> None:
    with (
        pool_lock(tmp_path, soon()),
        pytest.raises(ServerUnavailable, match="attaching"),
        pool_lock(tmp_path, 0.0),
    ):
        pass
    with pool_lock(tmp_path, 0.0):
        pass


def test_a_child_forked_while_the_lock_was_held_does_not_keep_it(tmp_path: Path) -> None:
    wait, leave = os.pipe()
    with pool_lock(tmp_path, soon()):
        pid = os.fork()
        if pid == 0:
            os.read(wait, 1)
            os._exit(0)
    with pool_lock(tmp_path, 0.0):
        pass
    os.write(leave, b"x")
    os.waitpid(pid, 0)
    os.close(wait)
    os.close(leave)


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"pool.lock can't be opened"), pool_lock(tmp_path, soon()):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_presence_is_shared_and_ends_with_the_last(tmp_path: Path) -> None:
    one, other = Presence(), Presence()
    one.hold(tmp_path)
    one.hold(tmp_path)
    other.hold(tmp_path)
    assert not one.leave(tmp_path)
    assert other.leave(tmp_path)
    assert other.leave(tmp_path)


def test_presence_follows_a_folder_that_was_made_anew(tmp_path: Path) -> None:
    one = Presence()
    one.hold(tmp_path)
    (tmp_path / "clients.lock").unlink()
    assert not locked(tmp_path / "clients.lock")
    one.hold(tmp_path)
    assert used(tmp_path / "clients.lock")
    assert one.leave(tmp_path)
