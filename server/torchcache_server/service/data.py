"""The data lane: Arrow Flight. do_get streams extents out of mapped segments, do_put takes chunks in.

Only translation: tickets become plans, plans become batches, errors become Flight errors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as fl

from torchcache.errors import ConfigurationError, IntegrityError
from torchcache.model import ChunkId, chunk_digest
from torchcache.wire.codec import READ_SCHEMA, SERVER_ID, WRITE_SCHEMA, decode_chunks
from torchcache.wire.liveness import HEARTBEAT_S
from torchcache.wire.v1 import cache_pb2
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import Store

from .admission import Admission
from .ahead_shares import AheadShares
from .counters import ServiceCounters
from .interceptors import DataAuthentication, flight_errors
from .reading import Read
from .request_log import Request, RequestLog, served_stepwise, serving
from .requests import ReadPlan, WritePlan, read_plan, write_plan
from .scopes import Tokens

GROUP_BYTES: Final = 8 * 1024 * 1024
"""Written chunks are stored in groups of about this much: one index transaction each."""

MAX_BATCH_BYTES: Final = 16 * 1024 * 1024

CALLER: Final = "caller"
"""The middleware that has seen a call's headers."""

Row = tuple[ChunkId, int, pa.Buffer]


class DataServer(fl.FlightServerBase):  # type: ignore[misc]  # pyarrow is untyped
    """Serves from construction on; `port` says where. Raises pyarrow.ArrowException if the address can't be bound."""

    def __init__(
        self,
        location: str,
        *,
        tokens: Tokens,
        admission: Admission,
        counters: ServiceCounters,
        store: Store,
        read_through: ReadThrough,
        tls: Mapping[str, Any] | None = None,
        log: RequestLog | None = None,
    ) -> None:
        """`tls` is how Flight has it: tls_certificates, verify_client, root_certificates."""
        self._admission = admission
        self._log = log or RequestLog()
        self._counters = counters
        self._shares = AheadShares()
        self._store = store
        self._schema = READ_SCHEMA.with_metadata({SERVER_ID: store.server_id})
        self._read_through = read_through
        super().__init__(location, middleware={CALLER: DataAuthentication(tokens, self._log)}, **(tls or {}))

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Streams the pieces of a ReadRequest as batches of `codec.READ_SCHEMA`."""
        request = _request("do_get", context)
        with serving(request), flight_errors("do_get", self._log):
            plan = read_plan(ticket.ticket)
        request.is_about(plan.namespace)
        return fl.GeneratorStream(self._schema, served_stepwise(request, self._batches(plan, context)))

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Stores the chunks of a WriteRequest; answers with a WriteReply once they have the durability asked for."""
        request, began = _request("do_put", context), time.perf_counter()
        with ExitStack() as running:
            running.enter_context(serving(request))
            running.callback(lambda: self._log.ended("do_put", time.perf_counter() - began))
            running.enter_context(flight_errors("do_put", self._log))
            if descriptor.command is None:
                raise ConfigurationError("a write needs a descriptor with a WriteRequest as its command")
            plan = write_plan(descriptor.command)
            request.is_about(plan.namespace)
            running.enter_context(self._admission.write_stream(plan.namespace))
            running.enter_context(self._counters.latencies.timed("write"))
            self._counters.add(write_calls=1)
            if reader.schema != WRITE_SCHEMA:
                raise ConfigurationError(f"a write came with another schema: {reader.schema}")
            with heartbeats(writer):
                if plan.is_save:
                    self._store.keep(plan.namespace, True)
                written = self._store_all(plan, reader)
                if plan.durable:
                    self._store.sync(plan.namespace)
            self._counters.add(written_bytes=written)
            writer.write(pa.py_buffer(cache_pb2.WriteReply(bytes=written).SerializeToString()))

    def _batches(self, plan: ReadPlan, context: Any) -> Generator[pa.RecordBatch, None, None]:
        # The slot is taken here and not in do_get: a generator that never starts is never closed either.
        with flight_errors("do_get", self._log), self._admission.stream(plan.namespace):
            self._counters.passed_over.heard(context.peer(), plan.passed_over)
            share = self._shares.begin(plan.namespace)
            read, began = Read(plan, self._read_through, share), time.perf_counter()
            try:
                for batch in read.batches():
                    self._admission.check_running()
                    yield batch
                    if context.is_cancelled():
                        return
            finally:
                share.close()
                self._counters.add(read_calls=1, served_bytes=read.sent_bytes, hedged_calls=int(plan.hedge))
                kind, took_s = "read_filled" if read.has_waited else "read", time.perf_counter() - began
                self._counters.latencies.add(kind, took_s)
                if read.failure is not None:
                    self._log.failed(
                        "do_get", read.failure, f" of {read.failures} of {len(plan.object)} extents"
                    )
                self._log.ended(
                    "do_get", took_s, lambda: f": {len(plan.object)} extents, {read.sent_bytes} bytes"
                )

    def _store_all(self, plan: WritePlan, reader: Any) -> int:
        """Stores what comes, in groups; how many bytes that was.

        A client may stop in the middle, and stay: nothing of what was stored is held while its next batch is awaited.
        """
        group: list[Row] = []
        size = written = 0
        while (rows := self._next_rows(plan, reader)) is not None:
            group += rows
            size += sum(row[2].size for row in rows)
            del rows
            if size >= GROUP_BYTES:
                self._store.put_many(plan.namespace, group)
                written += size
                group, size = [], 0
        if group:
            self._store.put_many(plan.namespace, group)
        return written + size

    def _next_rows(self, plan: WritePlan, reader: Any) -> list[Row] | None:
        """What the next batch brings; None behind the last."""
        while True:
            try:
                batch = reader.read_chunk().data
            except StopIteration:
                return None
            if batch is None:
                continue
            if batch.nbytes > MAX_BATCH_BYTES:
                raise ConfigurationError(f"a batch of {batch.nbytes} bytes: {MAX_BATCH_BYTES} are allowed")
            self._admission.check_running()
            return [checked_row(plan, *row) for row in decode_chunks(batch)]


def _request(call: str, context: Any) -> Request:
    return Request(context.get_middleware(CALLER).request_id, call, context.peer())


@contextmanager
def heartbeats(writer: Any) -> Iterator[None]:
    """Around what a write may wait for: the client hears every `HEARTBEAT_S` that the server is at work."""
    done = threading.Event()
    working = pa.py_buffer(cache_pb2.WriteReply(working=True).SerializeToString())

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                writer.write(working)
            except (pa.ArrowException, OSError):
                return  # the client is gone, which the write itself finds out

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def checked_row(plan: WritePlan, number: int, index: int, digest: int, data: pa.Buffer) -> Row:
    """The chunk a written row holds. Raises ConfigurationError if it is no chunk of the plan's objects, IntegrityError
    if its bytes are not those that were sent."""
    if number >= len(plan.objects):
        raise ConfigurationError("a written row points to an object that the request doesn't list")
    info = plan.objects[number]
    chunk = ChunkId(info.id, index)
    if index >= info.chunk_count or data.size != chunk.length(info.size):
        raise ConfigurationError(
            f"chunk {index} of {data.size} bytes does not fit an object of {info.size}", object=str(info.id)
        )
    if chunk_digest(memoryview(data)) != digest:
        raise IntegrityError("a chunk arrived damaged: write it again", object=str(info.id))
    return chunk, info.size, data
