"""The token's file."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from torchcache_server.process.token_file import read_or_create_token

from torchcache.errors import ConfigurationError


def test_it_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    token = read_or_create_token(path)
    assert len(token) >= 32
    assert read_or_create_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_servers_that_start_together_agree(tmp_path: Path) -> None:
    path = tmp_path / "token"
    barrier = threading.Barrier(8)
    seen: list[str] = []

    def start() -> None:
        barrier.wait()
        seen.append(read_or_create_token(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_one_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    read_or_create_token(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=r"open to others .*chmod 600"):
        read_or_create_token(path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    read_or_create_token(tmp_path / "elsewhere")
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="can't be opened"):
        read_or_create_token(tmp_path / "token")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "token", 0o600)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_or_create_token(tmp_path / "token")


@pytest.mark.parametrize(
    "content", ["", "short", "a" * 5000, "two words, so no token", "x" * 20 + "\n" + "y" * 20]
)
def test_what_is_no_token_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="holds no token") as caught:
        read_or_create_token(path)
    assert not content or content not in str(caught.value)


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    read_or_create_token(path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        read_or_create_token(path)


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="can't be"):
        read_or_create_token(tmp_path / "file" / "token")
