"""Little that unpacks to much: refused, or held to a bound, before the memory is gone."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from collections.abc import Callable

import pyarrow as pa
import pyarrow.flight as fl
import pyarrow.ipc
import pytest
import zstandard

from tests.hostile import http2
from tests.hostile.hostile_server import ADMIN, HostileServer, outcome, refusal
from tests.hostile.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, frame, message, request, start
from tests.unit.scripted_s3 import Line, Request
from torchcache.checkpoint.compression import decompress
from torchcache.data.formats import compression
from torchcache.errors import ConfigurationError, IntegrityError, TorchCacheError
from torchcache.wire.codec import WRITE_SCHEMA, encode_chunks
from torchcache.wire.v1 import cache_pb2 as pb

MIB = 1 << 20
ZEROS = bytes(64 * MIB)


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("mib", [17, 32, 64])
def test_a_write_that_unpacks_to_more_than_a_batch_is_refused(
    server: HostileServer, codec: str, mib: int
) -> None:
    """Arrow unpacks what is compressed; what comes of it is bounded as any batch is."""
    ref = pb.ObjectRef(store="samples", key="bomb", version="1", size=mib * MIB)
    command = pb.WriteRequest(namespace="hostile", objects=[ref]).SerializeToString()
    batch = encode_chunks([(0, 0, 0, pa.py_buffer(ZEROS[: mib * MIB]))])
    options = fl.FlightCallOptions(
        headers=[(b"authorization", f"Bearer {ADMIN}".encode())],
        timeout=20,
        write_options=pa.ipc.IpcWriteOptions(compression=codec),
    )

    def write() -> None:
        descriptor = fl.FlightDescriptor.for_command(command)
        writer, metadata = server.client.flight.do_put(descriptor, WRITE_SCHEMA, options)
        try:
            writer.write_batch(batch)
            writer.done_writing()
            metadata.read()
        finally:
            writer.close()

    error = refusal(write)
    assert isinstance(error, ConfigurationError)
    assert "are allowed" in str(error)


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", "br", ""])
@pytest.mark.parametrize("mib", [3, 64])
def test_a_compressed_request_is_not_unpacked(server: HostileServer, encoding: str, mib: int) -> None:
    """Control takes none that is compressed, whatever the sender says it is."""
    packed = message(gzip.compress(ZEROS[: mib * MIB]), compressed=1)
    block = request("/torchcache.v1.Control/GetInfo", ADMIN, ("grpc-encoding", encoding))
    call = frame(HEADERS, block, flags=END_HEADERS, stream=1)
    parts = [packed[at : at + 16_000] for at in range(0, len(packed), 16_000)]
    data = [frame(DATA, part, stream=1) for part in parts[:-1]]
    said = http2.send(
        server.address, [start(), call, *data, frame(DATA, parts[-1], flags=END_STREAM, stream=1)]
    )
    assert not any(kind == DATA and stream == 1 for kind, stream, _ in http2.frames(said))


def packed(body: bytes, **headers: str) -> Line:
    def line(held: Request) -> bool:
        held.reply(200, body, headers={"ETag": '"e"', **headers})
        return True

    return line


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize("call", ["list", "read", "stat"])
@pytest.mark.parametrize("encoding", ["gzip", "zstd", "deflate"])
def test_what_a_storage_packs_is_not_unpacked(server: HostileServer, encoding: str, call: str) -> None:
    body = zstandard.compress(ZEROS) if encoding == "zstd" else gzip.compress(ZEROS)
    server.s3.always = packed(body, **{"Content-Encoding": encoding})
    if call == "list":
        ask = pb.ListRequest(store="s3", prefix="bucket/")
        assert isinstance(
            outcome(lambda: server.client.call("ListObjects", ask, timeout_s=1.0)), TorchCacheError
        )
    elif call == "stat":
        found = server.client.call("StatObject", pb.StatRequest(store="s3", key="bucket/key"))
        assert found.size == len(body)
    else:
        ref = pb.ObjectRef(store="s3", key="bucket/bomb", version="e", size=len(ZEROS))
        (got,) = server.client.read([ref], timeout_s=1.0)
        assert '"error"' in str(got)[:200]


def nested(times: int) -> bytes:
    data = bytes(1 << 27)
    for _ in range(times):
        data = zstandard.compress(data)
    return data


SHARDS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zstd": ("zstd", lambda: nested(1)),
    "zstd of several frames": ("zstd", lambda: zstandard.compress(bytes(1 << 24)) * 8),
    "gzip": ("gzip", lambda: gzip.compress(bytes(1 << 27), 9)),
    "gzip of several members": ("gzip", lambda: gzip.compress(bytes(1 << 24), 9) * 8),
}


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_unpacks_without_end_is_refused(name: str) -> None:
    codec, make = SHARDS[name]
    bomb = make()
    tracemalloc.start()
    try:
        stream = compression.unpacked(io.BytesIO(bomb), codec, 1000, "shard")  # as if it were of 1000 bytes
        with pytest.raises(IntegrityError, match="a compression bomb"):
            while stream.read(MIB):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


FRAMES: dict[str, Callable[[], bytes]] = {
    "a tensor's": lambda: zstandard.compress(ZEROS),
    "a frame that doesn't say its size": lambda: zstandard.ZstdCompressor(write_content_size=False).compress(
        ZEROS
    ),
    "a frame in a frame": lambda: nested(2),
}


@pytest.mark.hostile("bombs")
@pytest.mark.parametrize("name", FRAMES)
def test_an_item_of_a_checkpoint_is_no_larger_than_its_tensor(name: str) -> None:
    blob = FRAMES[name]()
    tracemalloc.start()
    try:
        found = b""
        try:
            found = decompress(blob, tensor_bytes=1000, name="w")
        except IntegrityError as error:
            assert "refused" in str(error)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) <= MIB + 1000
    assert peak < 8 * MIB
