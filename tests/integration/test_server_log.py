"""From a client's error to the server's log: the same id on both sides, whatever a client sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.integration.server_process import PlainClient, ServerProcess, refused
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError, IntegrityError, ObjectNotFound, TorchCacheError
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.wire.request_ids import HEADER, is_request_id
from torchcache.wire.v1 import cache_pb2 as pb


class LoggingServer(ServerProcess):
    """A server that logs all it can, as JSON."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "here").write_bytes(b"here" * 1000)
        self.log_file = folder / "log"
        super().__init__(
            *("--listen", "127.0.0.1:0", "--store", folder / "store", "--capacity", "64MB"),
            *("--under-store", f"data=file://{self.source}", "--token-file", folder / "token"),
            *("--log-format", "json", "--log-level", "debug", "--drain-s", "0"),
            token_file=folder / "token",
            log=self.log_file,
        )

    def lines(self, **having: object) -> list[dict[str, Any]]:
        """Of the log, which is JSON throughout; those with these fields. One may just be being written."""
        whole = self.log_file.read_text().rpartition("\n")[0]
        found = [json.loads(line) for line in whole.splitlines()]
        return [line for line in found if having.items() <= line.items()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggingServer]:
    running = LoggingServer(tmp_path_factory.mktemp("logging"))
    with running:
        yield running


def test_a_servers_life_is_in_its_log(server: LoggingServer, tmp_path: Path) -> None:
    (said,) = (line for line in server.lines(level="INFO") if " serves on " in line["message"])
    assert said["server"] == server.server_id
    store = server.log_file.with_name("store")
    for part in (
        *(server.address, f"data {server.data_port}", "behind a token", "lanes flight, and local"),
        *(f"store {store}: 0.0 of 0.1 GB held, 0 chunks", f"data=file://{server.source}"),
    ):
        assert part in said["message"]
    with LoggingServer(tmp_path) as another:
        code, _ = another.stop()
        told = [line["message"] for line in another.lines(logger="torchcache_server.process.life")]
    assert code == 0
    began, drained, ended = told
    assert began.startswith("told to stop: nothing new is taken")
    assert drained.startswith("drained in ")
    assert ended.endswith("exit code 0")


def test_an_error_leads_to_the_servers_lines(server: LoggingServer) -> None:
    root = f"file://{server.source}"
    pool = connect(server.address, token=server.client.token, lane="flight")
    try:
        with pytest.raises(ObjectNotFound) as called:
            pool.stat(f"{root}/absent")
        gone = ObjectInfo(ObjectId("data", "absent", "1-1"), 10)
        here = pool.stat(f"{root}/here")
        found, failed = pool.read_each([Extent(here), Extent(gone)], namespace=root)
    finally:
        pool.close()
    assert bytes(found) == b"here" * 1000  # type: ignore[arg-type]
    assert isinstance(failed, TorchCacheError)
    ids = [called.value.request_id or "", failed.request_id or ""]
    for error, request_id in zip((called.value, failed), ids, strict=True):
        assert f"request {request_id}" in str(error)
    [stat] = server.lines(request_id=ids[0], level="INFO")
    assert (stat["call"], stat["server"], stat["namespace"]) == (
        "StatObject",
        server.server_id,
        "data/absent",
    )
    assert stat["message"].startswith("StatObject failed: ObjectNotFound")
    assert stat["peer"].startswith("127.0.0.1:")
    [read] = server.lines(request_id=ids[1], level="INFO")
    assert (read["call"], read["namespace"]) == ("do_get", root)
    assert read["message"].startswith("do_get of 1 of 2 extents failed: ObjectNotFound")
    # What the read had to fetch was fetched by another thread, and is said of it.
    fetched = [line["message"] for line in server.lines(request_id=ids[1], level="DEBUG")]
    assert any("chunk 0 of data/here@" in text and "came from the under-store" in text for text in fetched)


def test_a_write_is_found_too(server: LoggingServer) -> None:
    """Refused in the midst of it: do_put has a handler of its own."""
    pool = connect(server.address, token=server.client.token, lane="flight")
    try:
        with pytest.raises((ConfigurationError, IntegrityError)) as caught:
            pool.write(f"file://{server.source}", [(ObjectId("data", "here", "1-1"), [b"not the source's"])])
    finally:
        pool.close()
    [line] = server.lines(request_id=caught.value.request_id, level="INFO")
    assert line["call"] == "do_put"


IDS = [" ", "x" * 16, "a b", '","level":"ERROR', "-rf", "\\u000a", "%0a", "Bearer x", ""]


@pytest.mark.hostile("wire")
@pytest.mark.parametrize("lane", ["control", "flight"])
@pytest.mark.parametrize("sent", [*([each] for each in IDS), ["one", "two"]], ids=repr)
def test_an_id_that_is_none_gets_into_no_line(server: LoggingServer, sent: list[str], lane: str) -> None:
    before = len(server.lines())
    ask(server.client, lane, sent)
    given = [line["request_id"] for line in server.lines()[before:]]
    assert given
    assert all(map(is_request_id, given))
    assert not set(given) & set(sent)


def test_a_status_has_its_counts(server: LoggingServer) -> None:
    status = server.client.status()
    assert status.filling_bytes == 0
    assert set(status.saves) == {"saving", "cached", "replicated", "durable", "failed", "copy"}


@pytest.mark.parametrize("lane", ["control", "flight"])
def test_a_clients_own_id_is_taken(server: LoggingServer, lane: str) -> None:
    ask(server.client, lane, [f"mine-{lane}"])
    assert server.lines(request_id=f"mine-{lane}")


def ask(client: PlainClient, lane: str, ids: list[str]) -> None:
    """A call that is logged, with these ids in its headers."""
    if lane == "control":
        metadata = [*client.metadata, *((HEADER, each) for each in ids)]
        with pytest.raises(grpc.RpcError):
            client.stub.StatObject(pb.StatRequest(store="data", key="none"), timeout=60, metadata=metadata)
        return
    headers = [(b"authorization", f"Bearer {client.token}".encode())]
    headers += [(HEADER.encode(), each.encode()) for each in ids]
    with suppress(fl.FlightError, pa.ArrowException):
        client.flight.do_get(fl.Ticket(b"\xff"), fl.FlightCallOptions(headers=headers, timeout=60)).read_all()


@pytest.mark.hostile("auth")
def test_a_stranger_is_told_of(server: LoggingServer) -> None:
    stranger = PlainClient(server.address, server.data_port, "canary-of-a-stranger")
    try:
        with pytest.raises(grpc.RpcError):
            stranger.status()
        with pytest.raises((fl.FlightError, pa.ArrowException)):
            stranger.flight.do_get(fl.Ticket(b""), stranger.options).read_all()
    finally:
        stranger.close()
    said = [line["message"] for line in server.lines(level="WARNING")]
    assert "a call refused: it has none of the server's tokens" in said
    assert "DO_GET refused: it has none of the server's tokens" in said
    assert "canary-of-a-stranger" not in server.log_file.read_text()


def test_what_keeps_a_server_from_starting_is_json_too(tmp_path: Path) -> None:
    said = refused("--store", tmp_path / "s", "--capacity", "1GB", "--log-format", "json")
    assert "under-store" in json.loads(said)["message"]
