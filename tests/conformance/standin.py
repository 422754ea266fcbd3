"""A server that keeps what it is given in a dict and can be told to lie: for what a real one can't be made to do.

Speaks the real wire (Flight and gRPC) on loopback ports of its own. Run as a program it prints its control port and
serves until it is killed.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import pyarrow as pa
import pyarrow.flight as fl

from torchcache.errors import ConfigurationError, NotResident, ObjectNotFound, TorchCacheError
from torchcache.model import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    ChunkId,
    ObjectId,
    ObjectInfo,
    block_cover,
    block_digests,
    chunk_digest,
)
from torchcache.wire.codec import READ_SCHEMA, Piece, decode_chunks, encode_pieces, failed_piece
from torchcache.wire.status import encode_error, status_code
from torchcache.wire.v1 import cache_pb2, cache_pb2_grpc

Tamper = Callable[[cache_pb2.ReadRequest, list[Piece]], list[Piece]]


@dataclass
class Script:
    """What the stand-in holds, what it was asked, and how it lies."""

    server_id: str = "standin"
    weight: float = 0.0
    token: str = "secret"
    objects: dict[ObjectId, bytes] = field(default_factory=dict)
    reads: list[cache_pb2.ReadRequest] = field(default_factory=list)
    writes: list[cache_pb2.WriteRequest] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    tamper: Tamper = lambda _, pieces: pieces
    stream: Callable[[Iterator[pa.RecordBatch]], Any] | None = (
        None  # from the batches to another stream of Flight's
    )
    fail_reads: list[Exception] = field(default_factory=list)
    fail_calls: list[TorchCacheError] = field(default_factory=list)
    break_after: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


def pieces_of(extent: int, data: bytes, start: int, end: int) -> Iterator[Piece]:
    """What a server sends for bytes [start, end) of an object."""
    first = min(start, max(len(data) - 1, 0)) // CHUNK_BYTES
    for index in range(first, max(first + 1, -(-end // CHUNK_BYTES))):
        offset = index * CHUNK_BYTES
        payload = data[offset : offset + CHUNK_BYTES]
        cover = block_cover(max(start - offset, 0), min(end - offset, len(payload)), len(payload))
        if cover.length == len(payload):
            digests = struct.pack("<Q", chunk_digest(payload))
            yield Piece(extent, len(data), offset, True, digests, pa.py_buffer(payload))
        else:
            part = payload[cover.start : cover.end]
            digests = block_digests(payload)[
                cover.start // BLOCK_BYTES * 8 : -(-cover.end // BLOCK_BYTES) * 8
            ]
            yield Piece(extent, len(data), offset + cover.start, False, digests, pa.py_buffer(part))


class _Door(fl.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow is untyped
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def start_call(self, info: Any, headers: Any) -> None:
        if list(headers.get("authorization", ())) != [f"Bearer {self._script.token}"]:
            text = encode_error(ConfigurationError("the server refused the token"))
            raise fl.FlightUnauthenticatedError(text, text.encode())


class _Data(fl.FlightServerBase):  # type: ignore[misc]  # pyarrow is untyped
    def __init__(self, script: Script) -> None:
        super().__init__("grpc://127.0.0.1:0", middleware={"token": _Door(script)})
        self._script = script

    def do_get(self, context: Any, ticket: Any) -> Any:
        request = cache_pb2.ReadRequest.FromString(ticket.ticket)
        with self._script.lock:
            self._script.reads.append(request)
            if self._script.fail_reads:
                raise self._script.fail_reads.pop(0)
        if self._script.stream is not None:
            return self._script.stream(self._batches(request))
        return fl.GeneratorStream(READ_SCHEMA, self._batches(request))

    def _batches(self, request: cache_pb2.ReadRequest) -> Iterator[pa.RecordBatch]:
        pieces: list[Piece] = []
        for extent, (number, offset, length) in enumerate(
            zip(request.object, request.offset, request.length, strict=True)
        ):
            ref = request.objects[number]
            data = self._script.objects.get(ObjectId(ref.store, ref.key, ref.version))
            if data is None:
                error = NotResident("not here", object=f"{ref.store}/{ref.key}")
                pieces.append(failed_piece(extent, encode_error(error)))
            elif offset + max(length, 0) > len(data):
                pieces.append(failed_piece(extent, encode_error(ConfigurationError("beyond the object"))))
            else:
                pieces += pieces_of(extent, data, offset, len(data) if length < 0 else offset + length)
        for sent, piece in enumerate(self._script.tamper(request, pieces)):
            if sent == self._script.break_after:
                self._script.break_after = None
                raise fl.FlightUnavailableError("broken off")
            yield encode_pieces([piece])

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        request = cache_pb2.WriteRequest.FromString(descriptor.command)
        with self._script.lock:
            self._script.writes.append(request)
            if self._script.fail_reads:
                raise self._script.fail_reads.pop(0)
        written = 0
        for received in reader:
            for number, index, digest, data in decode_chunks(received.data):
                ref = request.objects[number]
                id_ = ObjectId(ref.store, ref.key, ref.version)
                assert digest == chunk_digest(memoryview(data))
                assert data.size == ChunkId(id_, index).length(ref.size)
                held = bytearray(self._script.objects.get(id_, bytes(ref.size)))
                held[index * CHUNK_BYTES : index * CHUNK_BYTES + data.size] = memoryview(data)
                self._script.objects[id_] = bytes(held)
                written += data.size
        writer.write(pa.py_buffer(cache_pb2.WriteReply(bytes=written).SerializeToString()))


class StandIn:
    """A running stand-in, as a context manager."""

    def __init__(self, script: Script | None = None, *, port: int = 0) -> None:
        self.script = script or Script()
        self._asked_port = port

    def __enter__(self) -> Self:
        self._data = _Data(self.script)
        self._control = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        self._control.add_generic_rpc_handlers((_Handler(self),))
        self.port = self._control.add_insecure_port(f"127.0.0.1:{self._asked_port}")
        self._control.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.stop(0).wait()
        self._data.shutdown()

    @property
    def data_port(self) -> int:
        return int(self._data.port)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def put(self, id_: ObjectId, data: bytes) -> ObjectInfo:
        self.script.objects[id_] = data
        return ObjectInfo(id_, len(data))

    def answer(self, method: str, request: Any) -> Any:
        """The reply of a control call."""
        if method == "GetInfo":
            stores = [("s3", "s3://"), ("file", "file:///"), ("deep", "s3://bucket/deep")]
            return cache_pb2.InfoReply(
                server_id=self.script.server_id,
                weight=self.script.weight,
                instance="1",
                version="0",
                data_port=self.data_port,
                under_stores=[cache_pb2.UnderStoreInfo(name=n, uri=u) for n, u in stores],
            )
        if method == "ListObjects":
            keys = sorted(
                (k for k in self.script.objects if k.store == request.store), key=lambda k: k.key.encode()
            )
            found = [k for k in keys if k.key.startswith(request.prefix) and k.key > request.start_after]
            page = found[: min(request.limit, 3)]
            return cache_pb2.ListReply(objects=[self._ref(k) for k in page], truncated=len(page) < len(found))
        if method == "StatObject":
            for id_ in self.script.objects:
                if (id_.store, id_.key) == (request.store, request.key):
                    return self._ref(id_)
            raise ObjectNotFound("no such object", object=request.key)
        if method == "Stage":
            return cache_pb2.StageReply(errors=["" for _ in request.objects])
        if method == "GetResidency":
            held = [ObjectId(o.store, o.key, o.version) in self.script.objects for o in request.objects]
            return cache_pb2.ResidencyReply(
                resident_bytes=[o.size if h else 0 for o, h in zip(request.objects, held, strict=True)],
                resident_objects=[i for i, h in enumerate(held) if h],
            )
        replies = {
            "GetStatus": cache_pb2.StatusReply(
                info=self.answer("GetInfo", None), store_path="/nowhere", hits=3
            ),
            "SetPolicy": cache_pb2.NamespaceStatus(name="d", bytes=5, chunks=1, pinned=True, quota_bytes=7),
            "Evict": cache_pb2.EvictReply(freed_bytes=5),
            "PublishObject": cache_pb2.PublishReply(
                done=len([c for c in self.script.calls if c[0] == method]) > 1,
                object=cache_pb2.ObjectRef(store="s3", key="bucket/k", version="e", size=5),
            ),
            "DeleteObject": cache_pb2.DeleteReply(),
            "ReserveSave": cache_pb2.LeaseReply(lease_s=10),
            "RenewSave": cache_pb2.LeaseReply(lease_s=10),
            "AbandonSave": cache_pb2.AbandonSaveReply(),
            "CommitSave": cache_pb2.SaveReply(state=cache_pb2.SAVE_STATE_COMMITTED, pending_bytes=3),
            "GetSave": cache_pb2.SaveReply(state=cache_pb2.SAVE_STATE_DURABLE, manifest=b"{}"),
            "ListSaves": cache_pb2.ListSavesReply(
                saves=[cache_pb2.SaveReply(state=cache_pb2.SAVE_STATE_DURABLE)]
            ),
            "SetCredentials": cache_pb2.CredentialsReply(),
            "Drain": cache_pb2.DrainReply(done=True),
        }
        return replies[method]

    def _ref(self, id_: ObjectId) -> cache_pb2.ObjectRef:
        size = len(self.script.objects[id_])
        return cache_pb2.ObjectRef(store=id_.store, key=id_.key, version=id_.version, size=size)


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: StandIn) -> None:
        self._server = server

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method.rpartition("/")[2]
        headers = dict(handler_call_details.invocation_metadata)
        kind = getattr(cache_pb2, _REQUESTS[method])

        def call(request: Any, context: grpc.ServicerContext) -> Any:
            script = self._server.script
            if headers.get("authorization") != f"Bearer {script.token}":
                told = encode_error(ConfigurationError("the server refused the token"))
                context.abort(grpc.StatusCode.UNAUTHENTICATED, told)
            try:
                with script.lock:
                    script.calls.append((method, request))
                    if script.fail_calls and method != "GetInfo":
                        raise script.fail_calls.pop(0)
                return self._server.answer(method, request)
            except TorchCacheError as error:
                context.abort(status_code(error), encode_error(error))

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=kind.FromString,
            response_serializer=lambda reply: reply.SerializeToString(),
        )


_REQUESTS = {
    method.name: method.input_type.name for method in cache_pb2.DESCRIPTOR.services_by_name["Control"].methods
}
assert cache_pb2_grpc.ControlStub


if __name__ == "__main__":
    with StandIn() as standin:
        name = ObjectId("samples", "one", "0")
        standin.put(name, bytes(range(256)) * 1000)
        print(standin.port, standin.data_port, flush=True)
        sys.stdin.read()
