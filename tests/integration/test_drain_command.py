"""`torchcache drain`: a server that ends in order because a call asked for it, seen from all sides (I2, I4)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.integration.self_describing import content, difference
from tests.integration.server_process import PlainClient, ServerProcess
from tests.waiting import until
from torchcache import Pool, connect
from torchcache.cli.app import run
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.model import Extent, ObjectInfo, chunk_digest
from torchcache.wire.codec import WRITE_SCHEMA, encode_chunks
from torchcache.wire.v1 import cache_pb2 as pb

ADMIN, WRITE, READ = (f"a-token-of-scope-{scope}" for scope in ("admin", "write", "read"))
SAVE = pb.SaveRef(store="file", path="run/step-1", save_id="id1")
SHARD = b"what is saved" * 1000
OBJECTS = 60


class Two:
    """Two servers over one folder, and a pool of them."""

    def __init__(self, folder: Path, closing_: ExitStack) -> None:
        self.source = folder / "source"
        self.source.mkdir()
        self.token_file = token_file = folder / "token"
        token_file.write_text(f"{ADMIN}\nwrite {WRITE}\nread {READ}\n")
        token_file.chmod(0o600)
        self.servers = [
            closing_.enter_context(
                ServerProcess(
                    *("--listen", "127.0.0.1:0", "--store", folder / f"store-{number}", "--capacity", "1GB"),
                    *("--under-store", f"file=file://{self.source}", "--token-file", token_file),
                    token_file=token_file,
                    log=folder / f"log-{number}",
                )
            )
            for number in range(2)
        ]
        self.first, self.second = self.servers
        self.address = ",".join(server.address for server in self.servers)
        self.pool = self.connect(ADMIN)
        closing_.callback(self.pool.close)
        self._log = folder / "log-0"

    def connect(self, token: str) -> Pool:
        return connect(self.address, token=token, lane="flight")

    @property
    def log(self) -> str:
        """Of the first."""
        return self._log.read_text()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    with ExitStack() as closing_:
        yield Two(tmp_path, closing_)


def put(client: PlainClient) -> tuple[fl.FlightStreamWriter, fl.FlightMetadataReader]:
    ref = pb.ObjectRef(store="samples", key="slow", version="1", size=len(SHARD))
    command = pb.WriteRequest(namespace="n", objects=[ref]).SerializeToString()
    opened: tuple[fl.FlightStreamWriter, fl.FlightMetadataReader] = client.flight.do_put(
        fl.FlightDescriptor.for_command(command), WRITE_SCHEMA, client.options
    )
    return opened


def begin_write(client: PlainClient) -> tuple[fl.FlightStreamWriter, fl.FlightMetadataReader]:
    """A stream of data that the server has taken, and that runs until it is told to end."""
    writer, metadata = put(client)
    assert pb.WriteReply.FromString(metadata.read().to_pybytes()).working, "it says so every second"
    return writer, metadata


def takes_nothing(client: PlainClient) -> bool:
    """Whether it refuses what is new. It does so a moment after it was told to drain."""
    try:
        put(client)[0].close()
    except fl.FlightError:
        return True
    return False


def commit_save(client: PlainClient) -> None:
    client.call("ReserveSave", pb.ReserveSaveRequest(save=SAVE, writer="test"))
    ref = pb.ObjectRef(
        store="file", key=f"{SAVE.path}/__0_0.distcp", version=f"save:{SAVE.save_id}", size=len(SHARD)
    )
    put = pb.WriteRequest(namespace=f"save:file/{SAVE.path}@{SAVE.save_id}", objects=[ref], durable=True)
    writer, metadata = client.flight.do_put(
        fl.FlightDescriptor.for_command(put.SerializeToString()), WRITE_SCHEMA, client.options
    )
    writer.write_batch(encode_chunks([(0, 0, chunk_digest(SHARD), pa.py_buffer(SHARD))]))
    writer.done_writing()
    metadata.read()
    writer.close()
    files = [pb.SavedFile(name="__0_0.distcp", size=len(SHARD))]
    client.call("CommitSave", pb.CommitSaveRequest(save=SAVE, files=files, metadata=b"m", manifest=b"{}"))


def test_what_runs_is_finished_and_no_read_fails(two: Two) -> None:
    """A client reads all the time; a stream is under way; a save is committed, whose upload nobody waited for."""
    for number in range(OBJECTS):
        (two.source / f"{number}").write_bytes(content(f"{number}", 0, 20_000))
    infos = [two.pool.stat(f"file://{two.source}/{number}") for number in range(OBJECTS)]
    ended, rounds = threading.Event(), [0]

    def read_on() -> None:
        while not ended.is_set():
            _read(two.pool, infos)
            rounds[0] += 1

    failures: list[BaseException] = []

    def reader() -> None:
        try:
            read_on()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        until(lambda: rounds[0] >= 2 or failures)
        writer, metadata = begin_write(two.first.client)
        commit_save(two.first.client)
        drained = subprocess.Popen(
            [
                *(sys.executable, "-m", "torchcache.cli", "drain", two.first.address),
                *("--wait", "--json", "--pool", two.address),
            ],
            env=os.environ | {"TORCHCACHE_TOKEN_FILE": str(two.token_file)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with drained:
            until(lambda: "told to stop" in two.log)
            before = rounds[0]
            until(lambda: rounds[0] >= before + 2 or failures)
            assert two.first.process.poll() is None, "it waits for the stream"
            # What was begun before is taken to its end.
            writer.write_batch(encode_chunks([(0, 0, chunk_digest(SHARD), pa.py_buffer(SHARD))]))
            writer.done_writing()
            assert pb.WriteReply.FromString(_last(metadata)).bytes == len(SHARD)
            writer.close()
            document = json.loads(drained.communicate(timeout=120)[0])
        assert document["done"] and document["left"] == []
        assert drained.returncode == 0
        assert two.first.process.wait(120) == 0
        before = rounds[0]
        until(lambda: rounds[0] >= before + 2 or failures)
    finally:
        ended.set()
        thread.join()
    assert not failures, failures
    assert (two.source / SAVE.path / "__0_0.distcp").read_bytes() == SHARD
    assert (two.source / SAVE.path / ".torchcache.json").read_bytes() == b"{}"


def _read(pool: Pool, infos: list[ObjectInfo]) -> None:
    for number, view in enumerate(pool.read([Extent(info) for info in infos], timeout_s=60)):
        assert not difference(f"{number}", 0, 0, view)


def _last(metadata: fl.FlightMetadataReader) -> bytes:
    """The reply behind those that only say that the server is at work."""
    while True:
        answer: bytes = metadata.read().to_pybytes()
        if not pb.WriteReply.FromString(answer).working:
            return answer


def test_it_is_told_how_far_the_server_is(two: Two) -> None:
    """By its id; at first what runs, at last that nothing is left. A server that isn't there any more isn't drained."""
    writer, _ = begin_write(two.second.client)
    states = two.pool.drain(two.second.server_id)
    first = next(states)
    assert (first.done, first.streams, first.address) == (False, 1, two.second.address)
    until(lambda: takes_nothing(two.second.client))
    writer.close()
    *_, last = states
    assert (last.done, last.left, last.streams) == (True, (), 0)
    assert two.second.process.wait(120) == 0
    with pytest.raises(ServerUnavailable, match="can't be reached"), closing(two.connect(ADMIN)) as pool:
        pool.drain(two.second.address)


def test_a_signal_that_follows_does_not_cut_it_short(two: Two) -> None:
    """Kubernetes sends one to whatever is to go. A second one does."""
    writer, metadata = begin_write(two.first.client)
    two.pool.drain(two.first.address)
    two.first.process.send_signal(signal.SIGTERM)
    assert next(two.pool.drain(two.first.address)).streams == 1
    writer.write_batch(encode_chunks([(0, 0, chunk_digest(SHARD), pa.py_buffer(SHARD))]))
    writer.done_writing()
    assert pb.WriteReply.FromString(_last(metadata)).bytes == len(SHARD)
    writer.close()
    assert two.first.process.wait(120) == 0


@pytest.mark.parametrize("server", ["127.0.0.1:1", "nobody"])
def test_a_server_of_another_pool_is_an_error(
    two: Two, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHCACHE_TOKEN_FILE", str(two.token_file))
    assert run(["drain", server, "--pool", two.address]) == 2
    assert f"the pool has no server {server!r}" in capsys.readouterr().err


def test_an_embedded_pool_is_not_drained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHCACHE_POOL", raising=False)
    assert run(["drain", "127.0.0.1:7440"]) == 2
    assert "--pool" in capsys.readouterr().err


@pytest.mark.parametrize("token", [WRITE, READ])
def test_it_takes_a_token_of_scope_admin(two: Two, token: str) -> None:
    with closing(two.connect(token)) as pool, pytest.raises(ConfigurationError, match="scope admin"):
        pool.drain(two.first.address)
    (two.source / "a").write_bytes(b"a")
    assert two.first.client.read(two.first.client.objects("file")) == [b"a"]
