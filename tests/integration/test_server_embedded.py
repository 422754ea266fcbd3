"""A server of the embedded pool: where it lives, how it is found, and that it goes when nobody needs it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.process.token_file import read_tokens

from tests.integration.server_process import PlainClient, command
from tests.waiting import until
from torchcache.environment import credentials_digest
from torchcache.model import ObjectId, ObjectInfo
from torchcache.wire.v1 import cache_pb2 as pb

_CLIENT = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_SH)
print("here", flush=True)
time.sleep(600)
"""


class Pool:
    """The folder of a pool, a process that uses it, and its one server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "server-0"
        self.clients: list[subprocess.Popen[str]] = []
        self.servers: list[subprocess.Popen[bytes]] = []

    def join(self) -> subprocess.Popen[str]:
        client = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, str(self.root / "clients.lock")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "here\n"
        self.clients.append(client)
        return client

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        server = subprocess.Popen(
            command(
                *("--embedded", self.root, "--index", 0, "--capacity", 10**9, "--idle-s", 0.5),
                *("--under-store", f"file=file://{self.root}/source", *arguments),
            ),
            start_new_session=True,
        )
        self.servers.append(server)
        return server

    def endpoint(self, server: subprocess.Popen[bytes]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                fields: dict[str, Any] = json.loads((self.folder / "endpoint.json").read_text())
                return fields
            except FileNotFoundError:
                time.sleep(0.02)
        raise AssertionError(f"no endpoint; the log: {self.log}")

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def connect(self, fields: dict[str, Any]) -> PlainClient:
        return PlainClient(fields["control"], fields["data_port"], read_tokens(self.root / "token")[0].secret)

    def end(self) -> None:
        processes: list[subprocess.Popen[Any]] = [*self.clients, *self.servers]
        for process in processes:
            process.kill()
            process.wait()
        for client in self.clients:
            assert client.stdout is not None
            client.stdout.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path / "pool")
    (made.root / "source").mkdir(parents=True)
    yield made
    made.end()


def test_it_says_where_it_is_and_what_it_logs(pool: Pool) -> None:
    pool.join()
    server = pool.start()
    fields = pool.endpoint(server)
    assert fields["pid"] == server.pid
    assert (pool.folder / "endpoint.json").stat().st_mode & 0o777 == 0o600
    client = pool.connect(fields)
    info = client.call("GetInfo", pb.InfoRequest())
    assert (info.server_id, info.instance, info.data_port) == (
        fields["server_id"],
        fields["instance"],
        fields["data_port"],
    )
    assert client.status().store_path == str(pool.folder / "store")
    client.close()
    until(lambda: f"listening on {fields['control']}" in pool.log)  # it says so once it can be found
    server.terminate()
    assert server.wait(120) == 0
    assert not (pool.folder / "endpoint.json").exists()


def test_it_goes_when_its_last_client_is_killed_and_not_before(pool: Pool) -> None:
    first, second = pool.join(), pool.join()
    server = pool.start()
    pool.endpoint(server)
    first.kill()
    first.wait()
    time.sleep(1.5)  # three idle times
    assert server.poll() is None
    second.kill()
    assert server.wait(120) == 0
    assert not (pool.folder / "endpoint.json").exists()
    with (pool.folder / "server.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_it_stays_while_a_client_attaches(pool: Pool) -> None:
    client = pool.join()
    server = pool.start()
    pool.endpoint(server)
    with (pool.root / "pool.lock").open("a") as attaching:
        fcntl.flock(attaching, fcntl.LOCK_EX)
        client.kill()
        client.wait()
        time.sleep(1.5)
        assert server.poll() is None
        assert (pool.folder / "endpoint.json").exists()
    assert server.wait(120) == 0


def test_it_goes_with_its_folder(pool: Pool) -> None:
    pool.join()
    server = pool.start()
    pool.endpoint(server)
    pool.root.rename(pool.root.with_name("moved"))
    assert server.wait(120) == 0


def test_after_sigkill_the_next_one_starts_and_has_the_contents(pool: Pool) -> None:
    pool.join()
    first = pool.start()
    fields = pool.endpoint(first)
    client = pool.connect(fields)
    sample = ObjectInfo(ObjectId("samples", "set/0", "0"), 6)
    client.put("samples:set@0", sample, b"sample")
    client.close()
    first.kill()
    first.wait()
    (pool.folder / "endpoint.json").unlink()
    again = pool.endpoint(pool.start())
    assert again["server_id"] == fields["server_id"]
    assert again["instance"] != fields["instance"]
    client = pool.connect(again)
    assert client.read([pb.ObjectRef(store="samples", key="set/0", version="0", size=-1)]) == [b"sample"]
    client.close()


def test_a_server_waits_for_the_one_before_it(pool: Pool) -> None:
    pool.join()
    first = pool.start()
    fields = pool.endpoint(first)
    second = pool.start()
    time.sleep(1)
    assert pool.endpoint(second) == fields, "the first goes on"
    first.terminate()
    assert first.wait(120) == 0
    assert pool.endpoint(second)["pid"] == second.pid


def test_an_upload_that_waits_is_left_to_the_next_server_when_a_client_comes(pool: Pool) -> None:
    client_process = pool.join()
    server = pool.start("--drain-s", 300)
    client = pool.connect(pool.endpoint(server))
    blocked = pool.root / "source/run/__0_0.distcp"
    ref = pb.SaveRef(store="file", path="run", save_id="id")
    client.call("ReserveSave", pb.ReserveSaveRequest(save=ref, writer="test"))
    client.put("save:file/run@id", ObjectInfo(ObjectId("file", "run/__0_0.distcp", "save:id"), 5), b"shard")
    blocked.mkdir(parents=True, exist_ok=True)
    (blocked / "in the way").write_text("")
    files = [pb.SavedFile(name="__0_0.distcp", size=5)]
    client.call("CommitSave", pb.CommitSaveRequest(save=ref, files=files, metadata=b"m", manifest=b"{}"))
    client_process.kill()
    deadline = time.monotonic() + 120
    while (pool.folder / "endpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pool.join()
    assert server.wait(120) == 1
    assert f"not yet in the under-store: file://{pool.root}/source/run" in pool.log
    client.close()
    (blocked / "in the way").unlink()
    blocked.rmdir()
    client = pool.connect(pool.endpoint(pool.start()))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not blocked.exists():
        time.sleep(0.05)
    assert blocked.read_bytes() == b"shard"
    client.close()


def test_credentials_are_taken_and_not_shown(pool: Pool) -> None:
    pool.join()
    server = pool.start("--under-store", "s3=s3://")
    fields = pool.endpoint(server)
    assert fields["credentials_digest"] == credentials_digest({})
    variables = {"AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": "canary-secret"}
    client = pool.connect(fields)
    client.call("SetCredentials", pb.CredentialsRequest(variables=variables))
    assert pool.endpoint(server) == fields | {"credentials_digest": credentials_digest(variables)}
    shown = str(client.status()) + pool.log + (pool.folder / "endpoint.json").read_text()
    assert "canary" not in shown
    client.close()


def test_a_wrong_setting_ends_in_the_log(pool: Pool) -> None:
    pool.join()
    server = pool.start("--under-store", "web=http://169.254.169.254/")
    assert server.wait(120) == 2
    assert "torchcache server: " in pool.log
    assert not (pool.folder / "endpoint.json").exists()


def test_a_log_that_grew_is_put_aside(pool: Pool) -> None:
    pool.join()
    pool.folder.mkdir()
    (pool.folder / "server.log").write_bytes(b"x" * 2_000_000)
    server = pool.start()
    pool.endpoint(server)
    assert len(pool.log) < 100_000
    assert (pool.folder / "server.log.1").stat().st_size == 2_000_000
