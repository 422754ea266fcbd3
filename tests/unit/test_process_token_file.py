"""The token's file."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from torchcache_server.process.token_file import read_or_create_tokens

from torchcache.errors import ConfigurationError
from torchcache.tokens import MAX_TOKENS, Scope, ScopedToken, first_token, format_tokens, parse_tokens


def test_it_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    (token,) = read_or_create_tokens(path)
    assert len(token.secret) >= 32 and token.scope is Scope.ADMIN
    assert read_or_create_tokens(path) == (token,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_servers_that_start_together_agree(tmp_path: Path) -> None:
    path = tmp_path / "token"
    barrier = threading.Barrier(8)
    seen: list[tuple[ScopedToken, ...]] = []

    def start() -> None:
        barrier.wait()
        seen.append(read_or_create_tokens(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_one_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    read_or_create_tokens(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=r"open to others .*chmod 600"):
        read_or_create_tokens(path)


@pytest.mark.hostile("folders")
def test_a_link_is_refused(tmp_path: Path) -> None:
    read_or_create_tokens(tmp_path / "elsewhere")
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="can't be opened"):
        read_or_create_tokens(tmp_path / "token")


@pytest.mark.hostile("folders")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "token", 0o600)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_or_create_tokens(tmp_path / "token")


@pytest.mark.parametrize(
    "content",
    ["", "short", "a" * 5000, "two words, so no token", "x" * 20 + "\n" + "short", "read short"],
)
def test_what_is_no_token_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="holds no token") as caught:
        read_or_create_tokens(path)
    assert not content or content not in str(caught.value)


@pytest.mark.hostile("folders")
def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    read_or_create_tokens(path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        read_or_create_tokens(path)


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="can't be"):
        read_or_create_tokens(tmp_path / "file" / "token")


def test_tokens_have_scopes_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "token"
    admin, read, write = ("a" * 20, "r" * 20, "w" * 20)
    path.write_text(f"# of the pool\n{admin}\n\n  read   {read}\nwrite {write}\n")
    path.chmod(0o600)
    tokens = read_or_create_tokens(path)
    assert [(str(token.scope), token.secret) for token in tokens] == [
        ("admin", admin),
        ("read", read),
        ("write", write),
    ]
    assert parse_tokens(format_tokens(tokens)) == tokens
    assert admin not in repr(tokens)


@pytest.mark.parametrize(
    "text",
    [
        "reed " + "x" * 20,
        "READ " + "x" * 20,
        "read write " + "x" * 20,
        "read " + "x" * 20 + " more",
        "read:" + "x" * 5,
        "x" * 20 + "\n" + "ü" * 20,
        "x" * 20 + "\nread " + "x" * 20,
        "\n".join(f"{n:020}" for n in range(MAX_TOKENS + 1)),
        "x" * 20 + "\n" + "x" * 5000,
        "#" + "x" * 5,
    ],
)
def test_a_line_that_is_no_token_stops_the_start(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_tokens(text)
    assert "x" * 20 not in str(caught.value)


def test_a_client_sends_the_first_token_of_its_file() -> None:
    assert first_token("# mine\nread " + "r" * 20 + "\n" + "a" * 20) == "r" * 20
    assert first_token("alone") == "alone"
    assert first_token("\n# nothing\n") is None
