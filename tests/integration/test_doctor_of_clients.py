"""`torchcache doctor` as a client's: a pool that is well, servers that aren't there, a token that isn't theirs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server_process import ServerProcess
from torchcache.cli.app import run

WRITER, READER = "a-token-for-all-of-it", "a-token-for-reading"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("doctored")
    (folder / "source").mkdir()
    (folder / "token").write_text(f"{WRITER}\nread {READER}\n")
    (folder / "token").chmod(0o600)
    running = ServerProcess(
        *("--listen", "127.0.0.1:0", "--store", folder / "store", "--capacity", "64MB", "--drain-s", "0"),
        *("--under-store", f"data=file://{folder}/source", "--token-file", folder / "token"),
        token_file=folder / "token",
        log=folder / "log",
    )
    with running:
        yield running


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "token"
    path.write_text(WRITER)
    path.chmod(0o600)
    monkeypatch.setenv("TORCHCACHE_TOKEN_FILE", str(path))
    return path


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy is not what is looked for."""
    for name in ("cli.client_doctor.ASK_S", "pool.probing.PROBE_S", "pool.roster.INFO_S"):
        monkeypatch.setattr(f"torchcache.{name}", 120.0)


def findings(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> dict[tuple[str, str], Any]:
    """What is found, by what is looked at."""
    assert run(["doctor", *arguments, "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["sound"] == (code == 0)
    return {(one["check"], one["about"]): one for one in said["findings"]}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("lane", ["local", "flight"])
def test_a_pool_that_is_well(
    server: ServerProcess,
    token: Path,
    lane: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCHCACHE_POOL", server.address)
    monkeypatch.setenv("TORCHCACHE_LANE", lane)
    found = findings(capsys, code=0)
    checks = ("reachability", "credentials", "clock", "version", "lanes", "disk")
    # The machine's own limits are what they are.
    assert {found[check, server.address]["state"] for check in checks} == {"ok"}
    assert found["lanes", server.address]["what"].startswith(lane)
    assert "writing" in found["credentials", server.address]["what"]
    assert found["credentials", str(token)]["state"] == "ok"
    token.write_text(READER)
    found = findings(capsys, "--client", code=0)
    assert "reading alone" in found["credentials", server.address]["what"]
    token.chmod(0o644)
    found = findings(capsys, "--client", code=1)
    assert "open to others" in found["credentials", server.address]["what"]
    assert found["credentials", str(token)]["advice"].startswith("chmod 600")


@pytest.mark.usefixtures("token")
def test_servers_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """One where nobody listens, one that is another program."""
    with socket.socket() as nobody, socket.create_server(("127.0.0.1", 0), backlog=8) as mute:
        nobody.bind(("127.0.0.1", 0))
        gone, other = (f"127.0.0.1:{each.getsockname()[1]}" for each in (nobody, mute))
        found = findings(capsys, "--pool", f"{gone},{other}", code=1)
    assert found["reachability", gone]["state"] == found["reachability", other]["state"] == "problem"
    assert found["reachability", gone]["advice"].startswith("nobody listens there")
    assert found["reachability", other]["advice"].startswith("something listens there")


@pytest.mark.usefixtures("patient")
def test_a_token_that_is_not_theirs(
    server: ServerProcess, token: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token.write_text("a-token-of-another-pool")
    found = findings(capsys, "--pool", server.address, code=1)
    assert found["credentials", server.address]["state"] == "problem"
    assert "refused the token" in found["credentials", server.address]["what"]
    token.unlink()
    found = findings(capsys, "--pool", server.address, code=1)
    assert found["credentials", str(token)]["state"] == "problem"


def test_stores_and_clients_are_looked_at_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--client", "--repair"]) == 2
    assert "are for stores" in capsys.readouterr().err
