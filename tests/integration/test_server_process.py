"""A server process: start, work, refuse, drain, restart. Everything over real ports and with real signals."""

from __future__ import annotations

import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pyarrow.flight as fl
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.ports import free_port
from tests.integration.server_process import PlainClient, ServerProcess, assemble, refused
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.model import CHUNK_BYTES, ObjectId, ObjectInfo
from torchcache.wire.codec import decode_pieces
from torchcache.wire.status import error_from_flight, error_from_status
from torchcache.wire.v1 import cache_pb2 as pb

FILES = {"a.bin": b"a" * 100_000, "empty": b"", "large.bin": bytes(range(256)) * (CHUNK_BYTES // 200)}

HUGE_BYTES = 20 * CHUNK_BYTES
"""More than a connection buffers."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def start(tmp_path: Path, home: Path, source: Path) -> Callable[..., ServerProcess]:
    """Makes servers on one store, with one under-store `file`."""

    def make(*arguments: object, alone: bool = False) -> ServerProcess:
        return ServerProcess(
            *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
            *("--under-store", f"file=file://{source}", *arguments),
            token_file=home / "token",
            alone=alone,
        )

    return make


def test_it_serves_what_the_under_store_has_and_then_asks_it_no_more(
    start: Callable[..., ServerProcess],
) -> None:
    with start(alone=True) as server:
        refs = server.client.objects("file")
        assert [r.key for r in refs] == sorted(FILES)
        assert server.client.read(refs) == [FILES[r.key] for r in refs]
        (counted,) = server.client.status().under_stores
        assert counted.read_requests == 4  # one a chunk: two for the large one, one for the empty one
        assert server.client.read(refs, resident_only=True) == [FILES[r.key] for r in refs]
        status = server.client.status()
        assert status.under_stores[0] == counted
        assert status.read_calls == 2
        assert status.served_bytes == 2 * sum(map(len, FILES.values()))
        held = server.client.call("GetResidency", pb.ResidencyRequest(objects=refs))
        assert list(held.resident_objects) == [0, 1, 2]
        assert server.stop()[0] == 0


def test_what_was_filled_is_there_after_a_restart(start: Callable[..., ServerProcess]) -> None:
    with start() as server:
        refs = server.client.objects("file")
        server.client.read(refs)
        first = server.client.call("GetInfo", pb.InfoRequest())
        assert server.stop()[0] == 0
    with start() as server:
        second = server.client.call("GetInfo", pb.InfoRequest())
        assert (second.server_id, second.instance == first.instance) == (first.server_id, False)
        assert server.client.read(refs, resident_only=True) == [FILES[r.key] for r in refs]


def test_staging_and_samples(start: Callable[..., ServerProcess]) -> None:
    with start() as server:
        refs = server.client.objects("file")
        reply = server.client.call("Stage", pb.StageRequest(namespace="set", objects=refs))
        assert list(reply.errors) == ["", "", ""]
        sample = ObjectInfo(ObjectId("samples", "set/0", "0"), 6)
        server.client.put("samples:set@0", sample, b"sample")
        unsized = pb.ObjectRef(store="samples", key="set/0", version="0", size=-1)
        missing = pb.ObjectRef(store="samples", key="set/1", version="0", size=-1)
        got = server.client.read([unsized, missing])
        assert got[0] == b"sample"
        assert "NotResident" in str(got[1])
        held = server.client.call("GetResidency", pb.ResidencyRequest(objects=[unsized, missing]))
        assert list(held.resident_bytes) == [6, 0]
        assert list(held.resident_objects) == [0]
        names = {n.name for n in server.client.status().namespaces}
        assert {"set", "samples:set@0"} <= names


def test_a_source_that_changed_is_told(start: Callable[..., ServerProcess], source: Path) -> None:
    with start() as server:
        refs = server.client.objects("file")
        (source / "a.bin").write_bytes(b"other")
        (source / "large.bin").unlink()
        got = dict(zip((r.key for r in refs), server.client.read(refs), strict=True))
        assert "ObjectChanged" in str(got["a.bin"])
        assert "ObjectNotFound" in str(got["large.bin"])
        assert got["empty"] == b""


@pytest.mark.parametrize("taken", [0, 1])
def test_two_servers_never_share_a_port(tmp_path: Path, home: Path, source: Path, taken: int) -> None:
    """F20, for the control port and for the data port."""
    port = free_port(beside=1)
    more = ("--capacity", "1GB", "--under-store", f"file=file://{source}")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port + taken))
        other.listen()
        said = refused("--listen", f"127.0.0.1:{port}", "--store", tmp_path / "store", *more)
    assert f"can't listen on 127.0.0.1:{port + taken}: Address already in use" in said
    with ServerProcess(
        "--listen", f"127.0.0.1:{port}", "--store", tmp_path / "store", *more, token_file=home / "token"
    ) as server:
        assert server.address == f"127.0.0.1:{port}"
        assert server.data_port == port + 1
        again = refused("--listen", f"127.0.0.1:{port}", "--store", tmp_path / "other", *more)
        assert "Address already in use" in again


def test_two_servers_never_share_a_store(
    start: Callable[..., ServerProcess], tmp_path: Path, source: Path
) -> None:
    with start():
        said = refused(
            *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "1GB"),
            *("--under-store", f"file=file://{source}"),
            alone=True,
        )
    assert str(tmp_path / "store") in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "0.0.0.0:0"], "refusing to listen on 0.0.0.0 without TLS"),
        (["--under-store", "web=http://169.254.169.254/"], "web"),
        (["--under-store", "broken"], "NAME=URI"),
        (["--capacity", "much"], "'much' is not a size"),
        (["--capacity", "1KB"], "capacity"),
        (["--config", "/none.toml"], "/none.toml can't be read"),
        (["--listen", "127.0.0.1:99999"], "port 99999"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_refusals_at_start_are_clear(
    tmp_path: Path, source: Path, arguments: list[str], message: str
) -> None:
    valid = [
        "--store",
        str(tmp_path / "store"),
        "--capacity",
        "1GB",
        "--under-store",
        f"file=file://{source}",
    ]
    assert message in refused(*valid, *arguments)


def test_a_token_file_that_others_can_read_stops_the_start(tmp_path: Path, source: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 32)
    token.chmod(0o644)
    said = refused(
        *("--store", tmp_path / "store", "--capacity", "1GB", "--under-store", f"file=file://{source}"),
        *("--token-file", token),
    )
    assert "chmod 600" in said
    assert "x" * 32 not in said


def test_a_toml_file_does_the_same(tmp_path: Path, home: Path, source: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text(
        f"""
        listen = "127.0.0.1:0"
        store = "{tmp_path / "store"}"
        capacity = "1GB"
        token_file = "{tmp_path / "token"}"
        [under_stores]
        file = "file://{source}"
        """
    )
    with ServerProcess("--config", config, token_file=tmp_path / "token") as server:
        assert len(server.client.objects("file")) == 3
        assert server.client.status().capacity_bytes == 10**9
    with ServerProcess("--config", config, "--capacity", "2GB", token_file=tmp_path / "token") as server:
        assert server.client.status().capacity_bytes == 2 * 10**9, "options win over the file"


def unknown(client: PlainClient, method: str) -> Any:
    return client.channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", ""),)])
def test_control_needs_the_token(start: Callable[..., ServerProcess], metadata: Any) -> None:
    with start() as server:
        health = health_pb2_grpc.HealthStub(server.client.channel)
        for call, request in (
            (server.client.stub.GetInfo, pb.InfoRequest()),
            (health.Check, health_pb2.HealthCheckRequest()),
            (unknown(server.client, "/torchcache.v1.Control/Nothing"), b""),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=60, metadata=metadata)
            code, details = caught.value.code(), caught.value.details()
            assert code is grpc.StatusCode.UNAUTHENTICATED
            error = error_from_status(code, details)
            assert isinstance(error, ConfigurationError)
            assert server.client.token not in str(error)


def test_unknown_methods_are_denied_and_errors_keep_their_class(start: Callable[..., ServerProcess]) -> None:
    with start() as server:
        client = server.client
        for method in ("/torchcache.v1.Control/Nothing", "/grpc.health.v1.Health/Watch", "/x.Y/Z"):
            with pytest.raises(grpc.RpcError) as caught:
                unknown(client, method)(b"", timeout=60, metadata=client.metadata)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        bad = pb.SaveRef(store="file", path="/x", save_id="id")
        for request, message in (
            (("StatObject", pb.StatRequest(store="file", key="none")), "none"),
            (("StatObject", pb.StatRequest(store="other", key="a")), "no under-store 'other'; it has file"),
            (("SetCredentials", pb.CredentialsRequest(variables={"PATH": "/"})), "PATH"),
            (("SetCredentials", pb.CredentialsRequest(variables={})), "embedded pool"),
            (("ReserveSave", pb.ReserveSaveRequest(save=bad)), "can't be a checkpoint's path"),
            (("Stage", pb.StageRequest(namespace="save:x", objects=[])), "save:x"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.call(*request)
            error = error_from_status(caught.value.code(), caught.value.details())
            assert message in str(error)


def test_messages_are_bounded(start: Callable[..., ServerProcess]) -> None:
    with start() as server:
        ref = pb.ObjectRef(store="file", key="k" * 4000, version="v", size=1)
        with pytest.raises(grpc.RpcError) as caught:
            server.client.call("Stage", pb.StageRequest(namespace="n", objects=[ref] * 1500))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.client.status().capacity_bytes == 10**9, "the same server goes on"


def test_health_and_metrics(start: Callable[..., ServerProcess]) -> None:
    port = free_port(beside=1)
    with start("--metrics-port", port) as server:
        health = health_pb2_grpc.HealthStub(server.client.channel)
        for service in ("", "torchcache.v1.Control"):
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health.Check(request, timeout=60, metadata=server.client.metadata)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        server.client.read(server.client.objects("file"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            text = response.read().decode()
        assert "torchcache_store_capacity_bytes 1e+09" in text
        assert 'torchcache_saves{state="replicated"} 0.0' in text
        assert "torchcache_save_oldest_pending_seconds 0.0" in text
        assert "torchcache_copies_wanted 0.0" in text
        assert "torchcache_read_calls_total 1.0" in text
        assert 'torchcache_under_store_read_requests_total{under_store="file"} 4.0' in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_that_runs_is_finished_and_new_calls_are_refused(
    start: Callable[..., ServerProcess], source: Path, number: signal.Signals
) -> None:
    data = bytes(range(251)) * (HUGE_BYTES // 251)
    (source / "huge.bin").write_bytes(data)
    with start(alone=True) as server:
        refs = server.client.objects("file", "huge")
        reader = server.client.open(refs)
        pieces = list(decode_pieces(reader.read_chunk().data))
        server.process.send_signal(number)
        refusal = _refusal_of_a_read(server.client, refs)
        assert isinstance(refusal, ServerUnavailable)
        assert server.client.status().info.server_id == server.server_id, "status is answered to the end"
        with pytest.raises(grpc.RpcError) as caught:
            server.client.objects("file")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        pieces += [p for chunk in reader for p in decode_pieces(chunk.data)]
        assert assemble(1, pieces) == [data]
        assert server.process.wait(120) == 0


def _refusal_of_a_read(client: PlainClient, refs: Any) -> Exception | None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            client.read(refs[:0])
        except fl.FlightError as error:
            return error_from_flight(error)
    return None


def test_a_stream_that_nobody_reads_does_not_keep_it_beyond_the_drain(
    start: Callable[..., ServerProcess], source: Path
) -> None:
    (source / "huge.bin").write_bytes(bytes(HUGE_BYTES))
    with start("--drain-s", 0.5) as server:
        reader = server.client.open(server.client.objects("file", "huge"))
        reader.read_chunk()
        code, _ = server.stop()
        assert code == 0


def save(client: PlainClient, path: str, save_id: str, data: bytes) -> Any:
    """A checkpoint of one file, committed to the pool."""
    ref = pb.SaveRef(store="file", path=path, save_id=save_id)
    client.call("ReserveSave", pb.ReserveSaveRequest(save=ref, writer="test"))
    info = ObjectInfo(ObjectId("file", f"{path}/__0_0.distcp", f"save:{save_id}"), len(data))
    client.put(f"save:file/{path}@{save_id}", info, data)
    return client.call(
        "CommitSave",
        pb.CommitSaveRequest(
            save=ref,
            files=[pb.SavedFile(name="__0_0.distcp", size=len(data))],
            metadata=b"metadata",
            manifest=b"{}",
        ),
    )


def wait_for_state(client: PlainClient, path: str, state: int) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        reply = client.call("GetSave", pb.GetSaveRequest(store="file", path=path))
        if reply.state == state:
            return reply
        time.sleep(0.05)
    raise AssertionError(f"the save did not get to state {state}: {reply}")


def test_a_save_that_is_committed_is_uploaded_before_the_server_ends(
    start: Callable[..., ServerProcess], source: Path
) -> None:
    with start() as server:
        reply = save(server.client, "run/step-1", "id1", b"shard")
        assert reply.state in (pb.SAVE_STATE_COMMITTED, pb.SAVE_STATE_DURABLE)
        assert server.stop()[0] == 0
    assert (source / "run/step-1/__0_0.distcp").read_bytes() == b"shard"
    assert (source / "run/step-1/.metadata").read_bytes() == b"metadata"


def test_what_can_not_be_uploaded_is_said_and_goes_on_at_the_next_start(
    start: Callable[..., ServerProcess], source: Path
) -> None:
    """F36."""
    blocked = source / "run/step-1/__0_0.distcp"
    with start("--drain-s", 2) as server:
        blocked.mkdir(parents=True)
        (blocked / "in the way").write_text("")
        save(server.client, "run/step-1", "id1", b"shard")
        code, stderr = server.stop()
        assert code == 1
        assert f"not yet in the under-store: file://{source}/run/step-1" in stderr
    (blocked / "in the way").unlink()
    blocked.rmdir()
    with start() as server:
        assert (
            server.client.call("GetSave", pb.GetSaveRequest(store="file", path="run/step-1")).manifest
            == b"{}"
        )
        wait_for_state(server.client, "run/step-1", pb.SAVE_STATE_DURABLE)
        assert blocked.read_bytes() == b"shard"
        assert server.stop()[0] == 0


def test_a_killed_servers_save_is_there_after_the_restart(
    start: Callable[..., ServerProcess], source: Path
) -> None:
    with start() as server:
        save(server.client, "run/step-2", "id2", b"shard" * 1000)
        server.process.kill()
    with start() as server:
        wait_for_state(server.client, "run/step-2", pb.SAVE_STATE_DURABLE)
        (found,) = server.client.call("ListSaves", pb.ListSavesRequest(store="file", prefix="run/")).saves
        assert (found.save.path, found.manifest) == ("run/step-2", b"")
    assert (source / "run/step-2/__0_0.distcp").read_bytes() == b"shard" * 1000


def test_an_object_is_published_and_deleted(start: Callable[..., ServerProcess], source: Path) -> None:
    with start() as server:
        info = ObjectInfo(ObjectId("file", "new/object", "save:w1"), 5)
        server.client.put("put:file/new/object@w1", info, b"hello")
        request = pb.PublishRequest(store="file", key="new/object", write_id="w1", size=5, wait_s=30)
        reply = server.client.call("PublishObject", request)
        assert reply.done
        assert (source / "new/object").read_bytes() == b"hello"
        assert server.client.read([reply.object]) == [b"hello"]
        server.client.call("DeleteObject", pb.DeleteRequest(store="file", key="new/object"))
        assert not (source / "new/object").exists()


def test_a_second_signal_ends_it_at_once(start: Callable[..., ServerProcess], source: Path) -> None:
    (source / "huge.bin").write_bytes(bytes(HUGE_BYTES))
    with start("--drain-s", 600) as server:
        reader = server.client.open(server.client.objects("file", "huge"))
        reader.read_chunk()
        server.process.send_signal(signal.SIGTERM)
        assert isinstance(_refusal_of_a_read(server.client, []), ServerUnavailable)
        assert server.stop()[0] == 1
