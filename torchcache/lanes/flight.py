"""The flight lane: Arrow Flight do_get and do_put. Always available."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl
from google.protobuf.message import DecodeError

from torchcache.addresses import is_unix
from torchcache.errors import DeadlineExceeded, IntegrityError, ServerUnavailable, TorchCacheError
from torchcache.heap import keep_freed_memory
from torchcache.lanes.access import Access
from torchcache.lanes.assembly import Arrivals
from torchcache.lanes.base import Outcome, ReadOptions, Row, contiguous, tell
from torchcache.lanes.connections import Connections, connections
from torchcache.lanes.watch import Ended, Watch
from torchcache.model import CHUNK_BYTES, Extent, ObjectInfo, chunk_digest
from torchcache.unix_sockets import check_socket, data_socket
from torchcache.wire import liveness
from torchcache.wire.codec import BATCH_BYTES, BATCH_ROWS, SERVER_ID, WRITE_SCHEMA, encode_chunks
from torchcache.wire.request_ids import HEADER, new_request_id
from torchcache.wire.status import error_from_flight
from torchcache.wire.v1 import cache_pb2

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.use_local_subchannel_pool", 1),  # closing a channel closes its connection, shared with nobody
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    *liveness.CHANNEL_OPTIONS,
)
"""Of data and control channels alike."""

MAX_BATCH_BYTES: Final = 16 * 1024 * 1024
"""The largest message a server may send. Batches are closed at 2 MiB and hold at most one chunk more."""


class FlightLane:
    """Reads and writes through one server's Flight port, or the socket beside the one at the path `host`.

    `server` is how errors name the server.

    `another` is called when it isn't the server with `server_id` that answers, in a thread that must not be kept.
    """

    name = "flight"

    def __init__(
        self,
        host: str,
        port: int,
        *,
        server: str,
        access: Access,
        registry: Connections = connections,
        server_id: str = "",
        another: Callable[[], object] | None = None,
    ) -> None:
        self._location = (host, port)
        self._server = server
        self._access = access
        self._connections = registry
        self._key = ("flight", host, port, access)
        self._server_id = server_id.encode()
        self._another = another

    def read(
        self,
        extents: Sequence[Extent],
        into: Sequence[memoryview | None],
        options: ReadOptions,
        *,
        deadline: float,
        watch: Watch | None = None,
    ) -> list[Outcome]:
        """See `Lane.read`. Once `watch` has ended it, what came is good, and the rest carries some error."""
        request_id = options.request_id or new_request_id()
        arrivals = Arrivals(extents, into, self._server, request_id)
        failure: TorchCacheError | None = None
        try:
            request = read_request(extents, options, deadline)
            self._stream(arrivals, request, self._options(deadline, request_id), watch or Watch())
        except TorchCacheError as error:
            failure = error
        except Ended:
            failure = ServerUnavailable("the call was given up", server=self._server)
        except (pa.ArrowException, OSError) as error:
            failure = foreign(error, self._server)
        return arrivals.outcomes(failure)

    def _stream(
        self,
        arrivals: Arrivals,
        request: cache_pb2.ReadRequest,
        options: fl.FlightCallOptions,
        watch: Watch,
    ) -> None:
        """One do_get. No reference to the client or the stream may outlive the call, not even in a traceback."""
        with self._connections.call():
            client = reader = None
            try:
                client = self._client()
                watch.asking()
                reader = client.do_get(fl.Ticket(request.SerializeToString()), options)
                if not watch.opened(reader):
                    raise Ended
                self._meet(reader.schema.metadata or {})
                for received in reader:
                    if received.data is not None:
                        with watch.landing(received.data.num_rows):
                            arrivals.take(received.data)
            except BaseException:
                if reader is not None:
                    reader.cancel()
                raise
            finally:
                watch.closed()
                del client, reader

    def _meet(self, said: dict[bytes, bytes]) -> None:
        if self._another is not None and said.get(SERVER_ID, self._server_id) != self._server_id:
            self._another()

    def write(
        self,
        namespace: str,
        objects: Sequence[ObjectInfo],
        rows: Iterable[Row],
        *,
        durable: bool,
        deadline: float,
    ) -> int:
        """See `Lane.write`."""
        refs, _ = object_refs(objects)
        request = cache_pb2.WriteRequest(namespace=namespace, objects=refs, durable=durable)
        request_id = new_request_id()
        try:
            sent, reply = self._put(request, rows, self._options(deadline, request_id))
        except (pa.ArrowException, OSError) as error:
            raise foreign(error, self._server, request_id) from without_frames(error)
        if reply is None or reply.bytes != sent:
            raise IntegrityError(
                f"a write of {sent} bytes to {namespace} was not acknowledged",
                server=self._server,
                request_id=request_id,
            )
        return sent

    def _put(
        self, request: cache_pb2.WriteRequest, rows: Iterable[Row], options: fl.FlightCallOptions
    ) -> tuple[int, cache_pb2.WriteReply | None]:
        """One do_put: the bytes sent, and the server's answer."""
        with self._connections.call():
            client = writer = reader = None
            try:
                client = self._client()
                descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())
                writer, reader = client.do_put(descriptor, WRITE_SCHEMA, options)
                sent = 0
                try:
                    for batch, size in _batches(rows):
                        writer.write_batch(batch)
                        sent += size
                    writer.done_writing()
                    reply = _reply(reader)
                finally:
                    writer.close()  # raises what the server says, in place of "the stream is broken"
                return sent, reply
            finally:
                del client, writer, reader

    def close(self) -> None:
        """See `Lane.close`."""
        self._connections.drop(self._key)

    def _client(self) -> fl.FlightClient:
        """This process's, for one call."""
        host, _ = self._location
        if is_unix(host):
            check_socket(data_socket(host))
        return self._connections.channel(self._key, self._open)

    def _open(self) -> fl.FlightClient:
        keep_freed_memory()
        host, port = self._location
        options: list[tuple[str, int | str]] = [
            *CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", MAX_BATCH_BYTES),
        ]
        if is_unix(host):
            return fl.FlightClient(fl.Location.for_grpc_unix(data_socket(host)), generic_options=options)
        if self._access.tls is None:
            return fl.FlightClient(fl.Location.for_grpc_tcp(host, port), generic_options=options)
        ca, certificate, key = self._access.tls.contents()
        return fl.FlightClient(
            fl.Location.for_grpc_tls(host, port),
            tls_root_certs=ca,
            cert_chain=certificate,
            private_key=key,
            override_hostname=self._access.server_name(),
            generic_options=options,
        )

    def _options(self, deadline: float, request_id: str) -> fl.FlightCallOptions:
        bearer = self._access.bearer()
        headers = [(HEADER.encode(), request_id.encode())]
        if bearer:
            headers.append((b"authorization", bearer.encode()))
        return fl.FlightCallOptions(timeout=remaining(deadline, self._server), headers=headers)


def read_request(extents: Sequence[Extent], options: ReadOptions, deadline: float) -> cache_pb2.ReadRequest:
    """The ticket's message: every object once, the extents column by column."""
    refs, index = object_refs([e.object for e in extents])
    return cache_pb2.ReadRequest(
        namespace=options.namespace,
        objects=refs,
        object=index,
        offset=[e.offset for e in extents],
        length=[e.length for e in extents],
        resident_only=options.resident_only,
        suspect=options.suspect,
        hedge=options.hedge,
        passed_over=[cache_pb2.PassedOver(server_id=id_, reason=why) for id_, why in options.passed_over],
        timeout_s=max(0.001, deadline - time.monotonic()),
    )


def object_refs(objects: Sequence[ObjectInfo]) -> tuple[list[cache_pb2.ObjectRef], list[int]]:
    """References of the `objects`, one however often an instance comes, and the place of each among them."""
    places: dict[int, int] = {}  # by identity: to hash an ObjectInfo costs more than to name it twice
    refs: list[cache_pb2.ObjectRef] = []
    index = []
    for info in objects:
        place = places.setdefault(id(info), len(refs))
        if place == len(refs):
            store, key, version = info.id.fields
            refs.append(cache_pb2.ObjectRef(store=store, key=key, version=version, size=info.size))
        index.append(place)
    return refs, index


def remaining(deadline: float, server: str) -> float:
    """Seconds left of a call's deadline. Raises DeadlineExceeded if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the deadline passed before the server was asked", server=server)
    return left


def foreign(error: Exception, server: str, request_id: str | None = None) -> TorchCacheError:
    """Ours, for an error of pyarrow's. Our servers speak in extra_info; without it gRPC or Arrow itself does."""
    mapped: TorchCacheError
    if getattr(error, "extra_info", None) or not isinstance(error, _TORN + _UNREADABLE):
        mapped = error_from_flight(error, server=server)
    elif isinstance(error, _TORN):
        mapped = ServerUnavailable(f"the server broke off: {error}", server=server)
    else:
        mapped = IntegrityError(f"the server's answer can't be read: {error}", server=server)
    mapped.__cause__ = without_frames(error)
    mapped.request_id = request_id or mapped.request_id
    return mapped


_TORN: Final = (fl.FlightInternalError,)
_UNREADABLE: Final = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowSerializationError, OSError)


def without_frames(error: Exception) -> Exception:
    """The error, without the frames it passed: they hold channels, which must not outlive their call."""
    error.__context__ = None
    return error.with_traceback(None)


def _reply(reader: fl.FlightMetadataReader) -> cache_pb2.WriteReply | None:
    """The server's answer to a write, behind those that only say that it is at work."""
    while (answer := reader.read()) is not None:
        try:
            reply = cache_pb2.WriteReply.FromString(bytes(answer))
        except DecodeError:
            return None
        if not reply.working:
            return reply
    return None


def _batches(rows: Iterable[Row]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of WRITE_SCHEMA with their payload in bytes."""
    held: list[tuple[int, int, int, pa.Buffer]] = []
    size = 0
    for number, index, scattered in rows:
        tell(scattered, index * CHUNK_BYTES)
        data = contiguous(scattered)
        held.append((number, index, chunk_digest(memoryview(data)), data))
        size += data.size
        if size >= BATCH_BYTES or len(held) >= BATCH_ROWS:
            yield encode_chunks(held), size
            held, size = [], 0
    if held:
        yield encode_chunks(held), size
