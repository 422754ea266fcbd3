"""Policies, scrub and health of real servers, by what a user calls: the command, the pool, the metrics."""

from __future__ import annotations

import errno
import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from torchcache_server.process.config import from_settings
from torchcache_server.process.server import Server

from examples.ports import free_port
from tests.integration.server_process import ServerProcess
from tests.integration.test_server_process import save, wait_for_state
from tests.unit.store_parts import FailingDisk, find_payload, flip_bit, segment_files
from tests.waiting import until
from torchcache.cli.app import run
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError, OutOfSpace
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool import NamespaceStatus, Pool
from torchcache.wire.v1 import cache_pb2 as pb

MIB = 1024 * 1024
FILE_BYTES = 2 * MIB
FOLDERS = ("first", "second", "third")


def content(folder: str, number: int) -> bytes:
    return random.Random(f"{folder}/{number}").randbytes(FILE_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three folders of 32 MiB each, before a store of 64 MiB."""
    for folder in FOLDERS:
        (tmp_path / "source" / folder).mkdir(parents=True)
        for number in range(16):
            (tmp_path / "source" / folder / f"{number:02}").write_bytes(content(folder, number))
    return tmp_path / "source"


@pytest.fixture
def start(tmp_path: Path, home: Path, source: Path) -> Callable[..., ServerProcess]:
    def make(*arguments: object) -> ServerProcess:
        return ServerProcess(
            *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "64MiB"),
            *("--under-store", f"file=file://{source}", "--min-free", "0", *arguments),
            token_file=home / "token",
        )

    return make


class User:
    """A pool of one server, and its command."""

    def __init__(self, address: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pool: Pool = connect(address)
        self.address = address
        self.source = source
        self._capsys = capsys

    def command(self, *words: str, code: int = 0) -> Any:
        assert run([*words, "--json", "--pool", self.address]) == code, self._capsys.readouterr()
        return json.loads(self._capsys.readouterr().out)

    def words(self, *words: str) -> tuple[str, str]:
        assert run([*words, "--pool", self.address]) == 0
        return self._capsys.readouterr()

    def uri(self, folder: str) -> str:
        return f"file://{self.source}/{folder}"

    def objects(self, folder: str) -> list[ObjectInfo]:
        return [*self.pool.list(self.uri(folder))]

    def stage(self, folder: str) -> None:
        self.pool.stage(self.objects(folder), namespace=self.uri(folder))

    def held(self, folder: str) -> float:
        return self.pool.residency(self.objects(folder)).fraction

    def namespace(self, name: str) -> NamespaceStatus | None:
        [server] = self.pool.status()
        return next((n for n in server.namespaces if n.name == name), None)

    def read(self, folder: str) -> None:
        """Every byte, and right."""
        objects = self.objects(folder)
        got = self.pool.read([Extent(o) for o in objects], namespace=self.uri(folder))
        assert [bytes(view) for view in got] == [content(folder, number) for number in range(16)]


@pytest.fixture
def use(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[ServerProcess | Server], User]]:
    users = []

    def make(server: ServerProcess | Server) -> User:
        address = server.address if isinstance(server, ServerProcess) else server.control_address
        users.append(User(address, source, capsys))
        return users[-1]

    yield make
    for user in users:
        user.pool.close()


Use = Callable[[ServerProcess | Server], User]
Start = Callable[..., ServerProcess]


def test_what_is_pinned_stays_under_pressure_and_over_a_restart(start: Start, use: Use) -> None:
    """I6. The same without a pin goes: so it is the pin that keeps it."""
    with start() as server:
        user = use(server)
        user.read("first")
        user.read("second")
        assert user.held("first") < 1, "the store is too small for two: without a pin the older one yields"
        user.command("evict", user.uri("second"))
        user.command("pin", user.uri("first"))
        user.read("first")
        user.read("second")
        assert user.held("first") == 1
        assert server.stop()[0] == 0
    with start() as server:
        user = use(server)
        found = user.namespace(user.uri("first"))
        assert found is not None
        assert found.pinned
        user.read("third")
        assert user.held("first") == 1
        user.command("unpin", user.uri("first"))
        user.read("second")
        user.read("third")
        assert user.held("first") < 1


def test_what_goes_beyond_a_quota_passes_through(start: Start, use: Use) -> None:
    """F10."""
    quota = 20 * MIB
    with start() as server:
        user = use(server)
        user.command("limit", user.uri("first"), "--quota", str(quota))
        for _ in range(2):
            user.read("first")
        found = user.namespace(user.uri("first"))
        assert found is not None
        assert found.quota_bytes == quota
        assert 0 < found.bytes <= quota
        [status] = user.pool.status()
        assert status.passed_through > 0
        user.command("limit", user.uri("first"), "--quota", "none")
        user.read("first")
        assert user.held("first") == 1


def test_evict_frees_and_what_is_gone_is_fetched_again(start: Start, use: Use) -> None:
    with start() as server:
        user = use(server)
        user.stage("first")
        [before] = user.pool.status()
        freed = user.command("evict", user.uri("first"))["freed_bytes"]
        [after] = user.pool.status()
        assert freed >= 16 * FILE_BYTES
        assert before.used_bytes - after.used_bytes == freed
        assert user.held("first") == 0
        user.read("first")
        assert user.held("first") == 1
        user.command("pin", user.uri("first"))
        assert "unpin" in user.command("evict", user.uri("first"), code=2)["message"]
        assert user.held("first") == 1


def test_what_nobody_uses_is_dropped_after_its_time(start: Start, use: Use) -> None:
    with start() as server:
        user = use(server)
        user.read("first")
        user.command("limit", user.uri("first"), "--ttl", "1s")
        # Not asked for by residency: that might count as a use.
        until(lambda: user.pool.status()[0].expired_chunks == 16, "dropped")
        assert user.held("first") == 0
        user.command("limit", user.uri("first"), "--ttl", "none")
        user.read("first")
        assert user.held("first") == 1


def test_a_higher_priority_keeps_its_room(start: Start, use: Use) -> None:
    with start() as server:
        user = use(server)
        user.command("limit", user.uri("first"), "--priority", "5")
        user.stage("first")
        user.read("second")
        assert user.held("first") == 1
        user.command("limit", user.uri("second"), "--priority", "6")
        user.read("second")
        user.read("third")
        assert user.held("first") < 1


def test_a_checkpoint_that_is_durable_stays_if_it_is_pinned(start: Start, use: Use, source: Path) -> None:
    """I6."""
    with start() as server:
        user = use(server)
        save(server.client, "run/step-1", "id1", content("first", 0))
        wait_for_state(server.client, "run/step-1", pb.SAVE_STATE_DURABLE)
        name = "save:file/run/step-1@id1"
        done = user.command("pin", user.uri("run/step-1"))["namespaces"]
        assert [n["name"] for n in done] == [user.uri("run/step-1"), name]
        for limit in (["--quota", "1GB"], ["--ttl", "1d"], ["--priority", "1"]):
            assert (
                "is a checkpoint" in user.command("limit", user.uri("run/step-1"), *limit, code=2)["message"]
            )
            refused = user.command("limit", name, *limit, code=2)["message"]
            assert "lives as long as its checkpoint: it can be pinned" in refused
        for folder in FOLDERS:
            user.read(folder)
        found = user.namespace(name)
        assert found is not None
        assert (found.pinned, found.dirty, found.chunks) == (True, False, 1)
        user.command("unpin", name)
        user.command("unpin", user.uri("run/step-1"))
        assert user.command("evict", user.uri("run/step-1"))["freed_bytes"] >= FILE_BYTES
        assert (source / "run/step-1/__0_0.distcp").read_bytes() == content("first", 0)


def test_a_checkpoint_that_is_not_in_storage_is_not_evicted(start: Start, use: Use, source: Path) -> None:
    """F38, I6."""
    blocked = source / "run/step-1/__0_0.distcp"
    blocked.mkdir(parents=True)
    (blocked / "in the way").write_text("")
    with start("--drain-s", "0") as server:
        user = use(server)
        save(server.client, "run/step-1", "id1", b"shard")
        user.command("evict", user.uri("run/step-1"), code=2)
        assert server.client.read(
            [pb.ObjectRef(store="file", key="run/step-1/__0_0.distcp", version="save:id1", size=5)]
        ) == [b"shard"]


def test_status_shows_what_was_asked(start: Start, use: Use) -> None:
    with start() as server:
        user = use(server)
        user.stage("first")
        user.words("pin", user.uri("first"))
        out, _ = user.words("limit", user.uri("first"), "--quota", "48MB", "--ttl", "36h", "--priority", "-7")
        wanted = "pinned, priority -7, quota 48.0 MB, dropped when unused for 1 d 12 h"
        assert wanted in out
        out, err = user.words("status")
        [line] = [line for line in out.splitlines() if user.uri("first") in line]
        assert line.rstrip().endswith(wanted)
        assert "in service" in out
        assert err == ""
        [found] = user.command("status")["servers"]
        assert (found["out_of_service"], found["disk_errors"]) == ("", 0)
        assert found["free_bytes"] > 0
        assert found["overhead_bytes"] > 0


def test_names_are_bounded_and_refusals_reach_the_user(start: Start, use: Use) -> None:
    with start() as server:
        pool = use(server).pool
        for call in (lambda n: pool.set_policy(n, pinned=True), pool.evict):
            for name in ("", "n" * 10_000):
                with pytest.raises(ConfigurationError, match="namespace"):
                    call(name)  # type: ignore[operator]
        for given in ({"priority": 5000}, {"quota_bytes": -1}, {"ttl_s": -1.0}, {"ttl_s": float("inf")}):
            with pytest.raises(ConfigurationError):
                pool.set_policy("d", **given)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="on its way to storage"):
            pool.set_policy("put:file/x@y", pinned=True)
        [status] = pool.status()
        assert status.namespaces == ()


def test_the_scrub_finds_what_rotted_on_the_disk(start: Start, use: Use, tmp_path: Path) -> None:
    """F5, I1: without a reader; the reader after it gets the right bytes from storage."""
    with start("--scrub-rate", "0") as server:
        user = use(server)
        user.stage("first")
        [status] = user.pool.status()
        assert (status.scrub_rounds, status.scrubbed_bytes) == (0, 0)
        assert server.stop()[0] == 0
    rotten = content("first", 5)
    [where] = [f for f in segment_files(tmp_path / "store") if rotten[:64] in f.read_bytes()]
    flip_bit(where, find_payload(where, rotten[:64]) + 1_000_000)
    with start("--scrub-rate", "1GiB") as server:
        user = use(server)
        until(lambda: user.pool.status()[0].scrub_rounds >= 1, "a round of the scrub")
        [status] = user.pool.status()
        assert (status.corrupt, status.chunks) == (1, 15)
        assert status.scrubbed_bytes >= 15 * FILE_BYTES
        user.read("first")
        assert user.held("first") == 1


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {s.name: s.value for family in families for s in family.samples if not s.labels}


def test_a_disk_out_of_service_is_said_and_reads_go_on(
    tmp_path: Path, home: Path, source: Path, use: Use
) -> None:
    """F12, F15, I1, I4: status, its warning, the document and the metrics say so; every byte is right meanwhile."""
    disk, port = FailingDisk(), free_port(beside=1)
    config = from_settings(
        {
            "listen": "127.0.0.1:0",
            "store": tmp_path / "store",
            "capacity": "64MiB",
            "under_stores": {"file": f"file://{source}"},
            "scrub_rate": 0,
            "min_free": 0,
        }
    )
    server = Server(replace(config, metrics_port=port), disk=disk)
    try:
        user = use(server)
        user.read("first")
        assert metrics(port)["torchcache_store_out_of_service"] == 0
        disk.fail("pwritev", errno.EIO)
        for _ in range(3):
            user.read("second")
        out, err = user.words("status")
        assert "out of service: " in out
        assert err.startswith(
            f"torchcache: the disk of the server {server.control_address} is out of service: "
        )
        [found] = user.command("status")["servers"]
        assert "Input/output error" in found["out_of_service"]
        seen = metrics(port)
        assert seen["torchcache_store_out_of_service"] == 1
        assert seen["torchcache_store_disk_errors_total"] == found["disk_errors"] >= 3
        for name in ("spare_bytes", "dead_bytes", "overhead_bytes", "free_bytes", "damaged_kept"):
            assert seen[f"torchcache_store_{name}"] == pytest.approx(found[name], rel=0.5, abs=MIB)
        assert seen["torchcache_store_scrubbed_bytes_total"] == 0
        with pytest.raises(OutOfSpace):
            user.pool.write("samples:d@0", [(ObjectId("samples", "d/0", "0"), [b"x"])])
    finally:
        server.close()
