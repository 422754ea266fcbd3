"""Too many connections, calls, streams, bytes: who comes after is served, or told to try again, in bounded memory.

F35.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from tests.hostile import http2
from tests.hostile.hostile_server import ADMIN, HostileServer, outcome
from tests.hostile.http2 import END_HEADERS, END_STREAM, HEADERS, SETTINGS, frame, message, request, start
from torchcache.errors import Overloaded, TorchCacheError
from torchcache.model import CHUNK_BYTES, chunk_digest
from torchcache.wire.codec import WRITE_SCHEMA, encode_chunks
from torchcache.wire.status import error_from_flight
from torchcache.wire.v1 import cache_pb2 as pb

PORTS = ("control", "data")
PATHS = {
    "control": "/torchcache.v1.Control/GetInfo",
    "data": "/arrow.flight.protocol.FlightService/DoGet",
}


def port(server: HostileServer, name: str) -> tuple[str, int]:
    return server.address if name == "control" else server.data_address


Opened = Callable[[tuple[str, int], str], Iterator[bytes]]


def silent(_: tuple[str, int], __: str) -> Iterator[bytes]:
    return iter(())


def slow(_: tuple[str, int], __: str) -> Iterator[bytes]:
    """Half a beginning, and the rest never."""
    yield http2.PREFACE[:10]


def begun(_: tuple[str, int], __: str) -> Iterator[bytes]:
    yield start()


def half_a_call(_: tuple[str, int], path: str) -> Iterator[bytes]:
    """Right, but its request never comes."""
    yield start() + frame(HEADERS, request(path, ADMIN), flags=END_HEADERS, stream=1)


def half_a_header(_: tuple[str, int], path: str) -> Iterator[bytes]:
    yield start() + frame(HEADERS, request(path, ADMIN)[:40], stream=1)


def no_window(_: tuple[str, int], path: str) -> Iterator[bytes]:
    """An answer is asked for that the server may not send."""
    yield http2.PREFACE + frame(SETTINGS, b"\0\4\0\0\0\0")
    headers = frame(HEADERS, request(path, ADMIN), flags=END_HEADERS, stream=1)
    yield headers + frame(http2.DATA, message(b""), flags=END_STREAM, stream=1)


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("to", PORTS)
@pytest.mark.parametrize("kind", [silent, slow, begun, half_a_call, half_a_header, no_window])
def test_connections_that_never_get_on_keep_nobody_out(server: HostileServer, kind: Opened, to: str) -> None:
    count = 40 if kind is half_a_call else 200  # with a token, such a call holds one of 64 threads
    with ExitStack() as open_:
        for _ in range(count):
            connection = open_.enter_context(socket.create_connection(port(server, to), timeout=20))
            for part in kind(port(server, to), PATHS[to]):
                connection.sendall(part)
        server.assert_unharmed()


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("to", PORTS)
def test_connections_that_come_and_go_leave_nothing(server: HostileServer, to: str) -> None:
    def descriptors() -> int:
        return sum(1 for _ in server.process_folder("fd"))

    before = descriptors()
    for _ in range(400):
        with socket.create_connection(port(server, to), timeout=20) as connection:
            connection.sendall(start())
    deadline = time.monotonic() + 30
    while (now := descriptors()) > before + 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now <= before + 8


@pytest.mark.hostile("exhaustion")
def test_writers_that_say_nothing_are_bounded(server: HostileServer) -> None:
    ref = pb.ObjectRef(store="samples", key="k", version="1", size=5)
    descriptor = fl.FlightDescriptor.for_command(
        pb.WriteRequest(namespace="hostile", objects=[ref]).SerializeToString()
    )
    writers = []
    for _ in range(70):
        writers.append(server.client.flight.do_put(descriptor, WRITE_SCHEMA, server.client.options))
    outcomes = []
    for writer, _ in writers:
        try:
            writer.close()
            outcomes.append(None)
        except fl.FlightError as error:
            outcomes.append(type(error_from_flight(error)))
    assert set(outcomes) <= {None, Overloaded}


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("times", [1, 4])
def test_a_stranger_brings_much(server: HostileServer, times: int) -> None:
    """To the data port; Flight hears a message out before it looks who sends it."""
    batch = pa.record_batch([pa.array([bytes(8 << 20)] * times, pa.large_binary())], names=["x"])
    descriptor = fl.FlightDescriptor.for_command(b"")
    with pytest.raises((fl.FlightUnauthenticatedError, OSError)):
        writer, metadata = server.client.flight.do_put(
            descriptor, batch.schema, fl.FlightCallOptions(timeout=20)
        )
        try:
            writer.write_batch(batch)
            metadata.read()
        finally:
            writer.close()


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("token", ["nobody's", "the administrator's"])
def test_a_control_message_beyond_the_bound_is_refused(server: HostileServer, token: str) -> None:
    metadata = server.client.metadata if token == "the administrator's" else ()
    with pytest.raises(grpc.RpcError) as caught:
        server.raw("Evict", bytes(5 << 20), metadata=metadata)
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)


@pytest.mark.hostile("exhaustion")
def test_many_objects_that_are_nowhere(server: HostileServer) -> None:
    objects = [pb.ObjectRef(store="samples", key=f"{n}", version="1", size=-1) for n in range(5000)]
    reply = server.client.call("GetResidency", pb.ResidencyRequest(objects=objects), timeout_s=60)
    assert not any(reply.resident_bytes)


@pytest.mark.hostile("exhaustion")
def test_as_many_extents_as_a_request_may_have(server: HostileServer) -> None:
    count = 65_536
    asked = pb.ReadRequest(
        namespace="n", objects=[server.ref], object=[0] * count, offset=[0] * count, length=[1] * count
    )
    batches = server.ticket(asked.SerializeToString())
    assert sum(batch.num_rows for batch in batches) == count


@pytest.mark.hostile("exhaustion")
def test_many_that_are_nowhere_to_be_staged(server: HostileServer) -> None:
    objects = [pb.ObjectRef(store="file", key=f"no/{n}", version="1-1", size=1) for n in range(2000)]
    reply = server.client.call("Stage", pb.StageRequest(namespace="n", objects=objects), timeout_s=60)
    assert all("ObjectNotFound" in error for error in reply.errors)


@pytest.mark.hostile("exhaustion")
def test_readers_without_number_are_bounded(server: HostileServer) -> None:
    """The holds of a save that isn't there are words in memory: of so many, each cut to so much."""
    save = pb.SaveRef(store="file", path="nowhere", save_id="1")
    for number in range(300):
        hold = pb.HoldSaveRequest(save=save, reader_id=f"r{number}", reader="x" * 100_000)
        server.client.call("HoldSave", hold)
    for number in range(300):
        server.client.call("HoldSave", pb.HoldSaveRequest(save=save, reader_id=f"r{number}", release=True))


@pytest.mark.hostile("exhaustion")
def test_samples_beyond_the_capacity_leave_what_there_is_room_for(server: HostileServer) -> None:
    data = bytes(CHUNK_BYTES)
    row = (0, 0, chunk_digest(data), pa.py_buffer(data))
    for number in range(80):
        ref = pb.ObjectRef(store="samples", key=f"s{number}", version="1", size=len(data))
        command = pb.WriteRequest(namespace=f"hostile-{number % 4}", objects=[ref]).SerializeToString()
        try:
            server.put_raw(command, [encode_chunks([row])])
        except fl.FlightError as error:
            assert isinstance(error_from_flight(error), TorchCacheError)
    status = server.client.status()
    for number in range(4):
        server.client.call("Evict", pb.EvictRequest(namespace=f"hostile-{number}"))
    assert status.used_bytes <= status.capacity_bytes


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("call", ["StatObject", "ListObjects"])
def test_a_storage_that_says_nothing_keeps_other_calls_alive(server: HostileServer, call: str) -> None:
    """As many calls as there are threads wait for it, each by its deadline; then others are served."""

    def stall(held: Any) -> bool:
        held.stall()
        return True

    server.s3.always = stall
    kind = (
        pb.StatRequest(store="s3", key="bucket/key")
        if call == "StatObject"
        else pb.ListRequest(store="s3", prefix="bucket/")
    )
    with ThreadPoolExecutor(40) as callers:
        found = list(
            callers.map(lambda _: outcome(lambda: server.client.call(call, kind, timeout_s=2)), range(40))
        )
    assert all(isinstance(each, TorchCacheError) for each in found)


@pytest.mark.hostile("exhaustion")
def test_reads_of_a_storage_that_says_nothing_end_by_their_deadline(server: HostileServer) -> None:
    """F24, I4."""

    def stall(held: Any) -> bool:
        held.stall()
        return True

    server.s3.always = stall
    refs = [pb.ObjectRef(store="s3", key=f"bucket/stalled-{n}", version="e", size=100) for n in range(8)]
    got = server.client.read(refs, timeout_s=1.5)
    assert all(isinstance(each, str) and '"error"' in each for each in got)


@pytest.mark.hostile("exhaustion")
def test_writes_that_break_off_store_nothing(server: HostileServer) -> None:
    data = bytes(CHUNK_BYTES)
    ref = pb.ObjectRef(store="samples", key="broken", version="1", size=2 * len(data))
    command = pb.WriteRequest(namespace="hostile", objects=[ref], durable=True).SerializeToString()
    for _ in range(20):
        descriptor = fl.FlightDescriptor.for_command(command)
        writer, _ = server.client.flight.do_put(descriptor, WRITE_SCHEMA, server.client.options)
        writer.write_batch(encode_chunks([(0, 0, 1, pa.py_buffer(data))]))
        with pytest.raises(fl.FlightError):
            writer.close()
    (held,) = server.client.read([pb.ObjectRef(store="samples", key="broken", version="1", size=-1)])
    assert "NotResident" in str(held)


@pytest.mark.hostile("exhaustion")
def test_what_is_gone_from_storage_leaves_nothing_in_memory(server: HostileServer) -> None:
    """F35, I5: a dataset that was deleted since it was listed, 1.6 GB of it."""

    def gone(held: Any) -> bool:
        held.reply(404)
        return True

    server.s3.always = gone
    refs = [
        pb.ObjectRef(store="s3", key=f"bucket/gone-{n}", version="e", size=CHUNK_BYTES) for n in range(400)
    ]
    got = server.client.read(refs, timeout_s=60)
    assert all(isinstance(each, str) and "ObjectNotFound" in each for each in got)


@pytest.mark.hostile("exhaustion")
def test_an_object_that_is_smaller_than_it_is_called_takes_no_memory(server: HostileServer) -> None:
    """F35: a ticket of two kilobytes that asks for two hundred petabytes."""
    claimed = 1 << 50
    ref = pb.ObjectRef(store="file", key=server.ref.key, version=server.ref.version, size=claimed)
    many = pb.ReadRequest(
        namespace="n", objects=[ref], object=[0] * 200, offset=[0] * 200, length=[claimed] * 200, timeout_s=3
    )
    outcome(lambda: server.ticket(many.SerializeToString()))
