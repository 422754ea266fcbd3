"""The data lane over real Flight on loopback, with the store and the fills scripted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from torchcache_server.service.admission import MAX_WRITERS, RETRY_AFTER_S, Admission
from torchcache_server.service.counters import ServiceCounters
from torchcache_server.service.data import DataServer
from torchcache_server.service.interceptors import flight_error
from torchcache_server.service.scopes import Tokens

from tests.unit.service_parts import MemoryStore, ScriptedReadThrough, content, file_object
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    OutOfSpace,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId, ObjectInfo, chunk_digest
from torchcache.tokens import parse_tokens
from torchcache.wire.codec import READ_SCHEMA, SERVER_ID, WRITE_SCHEMA, decode_pieces, encode_chunks
from torchcache.wire.status import decode_error, error_from_flight
from torchcache.wire.v1 import cache_pb2 as pb

TOKEN = "a-token-of-the-tests"


class Lane:
    """A server and a client of it."""

    def __init__(self, max_streams: int = 8) -> None:
        self.store = MemoryStore()
        self.source = ScriptedReadThrough(self.store)
        self.admission = Admission(max_streams)
        self.counters = ServiceCounters()
        self.server = DataServer(
            "grpc://127.0.0.1:0",
            tokens=Tokens(parse_tokens(TOKEN)),
            admission=self.admission,
            counters=self.counters,
            store=self.store,  # type: ignore[arg-type]
            read_through=self.source,  # type: ignore[arg-type]
        )
        self.client = fl.connect(f"grpc://127.0.0.1:{self.server.port}")

    def options(self, token: str | None = TOKEN, timeout_s: float = 60) -> Any:
        headers = [(b"authorization", f"Bearer {token}".encode())] if token is not None else []
        return fl.FlightCallOptions(headers=headers, timeout=timeout_s)

    def get(self, extents: Sequence[tuple[ObjectInfo, int, int]], **more: Any) -> Any:
        return self.client.do_get(fl.Ticket(read_request(extents, **more)), self.options())

    def put(
        self, namespace: str, infos: Sequence[ObjectInfo], batches: Sequence[Any], durable: bool = False
    ) -> Any:
        request = pb.WriteRequest(namespace=namespace, objects=[ref(i) for i in infos], durable=durable)
        descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())
        writer, metadata = self.client.do_put(descriptor, WRITE_SCHEMA, self.options())
        try:
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
            return pb.WriteReply.FromString(metadata.read().to_pybytes())
        finally:
            writer.close()

    def close(self) -> None:
        self.client.close()
        self.admission.close()
        self.server.shutdown()


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


def ref(info: ObjectInfo) -> pb.ObjectRef:
    return pb.ObjectRef(store=info.id.store, key=info.id.key, version=info.id.version, size=info.size)


def read_request(extents: Sequence[tuple[ObjectInfo, int, int]], namespace: str = "n", **more: Any) -> bytes:
    request = pb.ReadRequest(
        namespace=namespace,
        objects=[ref(e[0]) for e in extents],
        object=range(len(extents)),
        offset=[e[1] for e in extents],
        length=[e[2] for e in extents],
        **more,
    )
    return request.SerializeToString()


def refusal(call: Callable[[], Any]) -> TorchCacheError:
    with pytest.raises((fl.FlightError, pa.ArrowException)) as caught:
        call()
    return error_from_flight(caught.value)


def saved(name: str, size: int) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3", f"bucket/run/{name}", "save:abc"), size)


SAVE = "save:s3/bucket/run@abc"


def test_reads_come_back(lane: Lane) -> None:
    data = content(3 * CHUNK_BYTES + 17)
    info = file_object("k", len(data))
    lane.store.add(info, data)
    pieces = [p for chunk in lane.get([(info, 0, -1), (info, 100, 50)]) for p in decode_pieces(chunk.data)]
    for piece in pieces:
        piece.verify()
    assert b"".join(p.data.to_pybytes() for p in pieces if p.extent == 0) == data
    assert pieces[-1].data.to_pybytes()[100:150] == data[100:150]
    assert lane.admission.wait_until_idle(60)
    assert lane.counters.read_calls == 1
    assert lane.counters.served_bytes == sum(p.data.size for p in pieces)


def test_the_schema_comes_even_with_nothing(lane: Lane) -> None:
    reader = lane.get([])
    assert reader.schema.equals(READ_SCHEMA)
    assert reader.read_all().num_rows == 0


@pytest.mark.parametrize(
    "token",
    [
        None,
        "",
        "wrong",
        TOKEN + "x",
        TOKEN[:-1],
        TOKEN.upper(),
        f"{TOKEN}, {TOKEN}",
        f"Bearer {TOKEN}",
        " " + TOKEN,
    ],
)
def test_without_the_token_nothing_is_answered(lane: Lane, token: str | None) -> None:
    request = fl.Ticket(read_request([]))
    error = refusal(lambda: lane.client.do_get(request, lane.options(token)))
    assert isinstance(error, ConfigurationError)
    assert "refused the token" in str(error)
    assert TOKEN not in str(error)
    with pytest.raises(fl.FlightUnauthenticatedError):
        list(lane.client.list_flights(options=lane.options(token)))
    assert lane.source.asked == []


def test_a_token_twice_is_refused(lane: Lane) -> None:
    header = (b"authorization", f"Bearer {TOKEN}".encode())
    options = fl.FlightCallOptions(headers=[header, header], timeout=60)
    error = refusal(lambda: lane.client.do_get(fl.Ticket(read_request([])), options))
    assert "refused the token" in str(error)


def exchange(lane: Lane) -> Any:
    return lane.client.do_exchange(fl.FlightDescriptor.for_path("x"), lane.options())[1]


def test_other_flight_calls_are_denied(lane: Lane) -> None:
    for call in (
        lambda: list(lane.client.list_flights(options=lane.options())),
        lambda: list(lane.client.list_actions(options=lane.options())),
        lambda: list(lane.client.do_action(fl.Action("x", b""), options=lane.options())),
        lambda: lane.client.get_flight_info(fl.FlightDescriptor.for_path("x"), lane.options()),
        lambda: exchange(lane).read_chunk(),
    ):
        with pytest.raises(fl.FlightUnauthorizedError, match="no Flight call but do_get and do_put"):
            call()


@pytest.mark.parametrize("ticket", [b"", b"nonsense", b"\xff" * 100])
def test_foreign_tickets_are_refused_or_empty(lane: Lane, ticket: bytes) -> None:
    try:
        assert lane.client.do_get(fl.Ticket(ticket), lane.options()).read_all().num_rows == 0
    except fl.FlightError as error:
        assert isinstance(error_from_flight(error), ConfigurationError)


def test_an_extent_outside_its_object_is_refused(lane: Lane) -> None:
    error = refusal(lambda: lane.get([(file_object("k", 10), 5, 6)]))
    assert isinstance(error, ConfigurationError)
    assert error.object == "s3/k@v1"


def test_streams_are_bounded(lane: Lane) -> None:
    cold = file_object("cold", 10)
    readers = [lane.get([(cold, 0, 10)], namespace="n") for _ in range(6)]
    with lane.source.filling:  # beside the others there is room for less of one
        assert lane.source.filling.wait_for(lambda: len(lane.source.asked) == 6, 60)
    readers += [lane.get([(cold, 0, 10)], namespace="other") for _ in range(2)]
    with lane.source.filling:
        assert lane.source.filling.wait_for(lambda: len(lane.source.asked) == 8, 60)
    error = refusal(lambda: lane.get([(cold, 0, 10)], namespace="third").read_all())
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == RETRY_AFTER_S[0]  # through pyarrow; none has ended yet
    assert lane.admission.refused_streams == 1
    lane.source.fill(cold, 0, content(10))
    assert [r.read_all().num_rows for r in readers] == [1] * 8
    assert lane.admission.wait_until_idle(60)  # a stream has ended a little after its last batch
    assert lane.get([(cold, 0, 10)]).read_all().num_rows == 1
    assert lane.admission.wait_until_idle(60)


def test_writers_are_fewer_than_streams() -> None:
    """F35: of one dataset three quarters of them; who reads finds room beside them, and so do others who write."""
    admission = Admission()
    with ExitStack() as running:
        for _ in range(MAX_WRITERS * 3 // 4):
            running.enter_context(admission.write_stream("a"))
        with pytest.raises(Overloaded, match="open that write"), admission.write_stream("a"):
            pass
        for number in range(MAX_WRITERS // 4):
            running.enter_context(admission.write_stream(f"b{number}"))
        with pytest.raises(Overloaded, match="open that write"), admission.write_stream("c"):
            pass
        running.enter_context(admission.stream("a"))
        assert admission.streams == MAX_WRITERS + 1
    assert admission.refused_streams == 2
    with admission.write_stream("a"):
        assert admission.streams == 1


def test_who_finds_no_room_is_told_how_long_streams_last() -> None:
    now = [100.0]
    admission = Admission(1, clock=lambda: now[0])

    def hint() -> float | None:
        with admission.stream("a"), pytest.raises(Overloaded) as refused, admission.stream("b"):
            pass
        return refused.value.retry_after_s

    def last(seconds: float) -> None:
        for _ in range(100):
            with admission.stream("a"):
                now[0] += seconds

    assert hint() == RETRY_AFTER_S[0]
    last(0.2)
    assert hint() == pytest.approx(0.2, rel=0.01)
    last(30.0)
    assert hint() == RETRY_AFTER_S[1]


def test_a_dataset_that_is_much_read_leaves_a_quarter_to_others(lane: Lane) -> None:
    cold = file_object("cold", 10)
    readers = [lane.get([(cold, 0, 10)], namespace="greedy") for _ in range(6)]
    with lane.source.filling:
        assert lane.source.filling.wait_for(lambda: len(lane.source.asked) == 6, 60)
    error = refusal(lambda: lane.get([(cold, 0, 10)], namespace="greedy").read_all())
    assert isinstance(error, Overloaded)
    assert "6 streams open, 6 of them for greedy" in str(error)
    info = file_object("k", 100)
    lane.store.add(info, content(100))
    assert lane.get([(info, 0, -1)], namespace="modest").read_all().num_rows == 1
    lane.source.fill(cold, 0, content(10))
    assert [r.read_all().num_rows for r in readers] == [1] * 6
    assert lane.admission.wait_until_idle(60)


def test_a_client_that_leaves_gives_its_place_back(lane: Lane) -> None:
    info = file_object("k", 40 * CHUNK_BYTES)
    lane.store.add(info, content(info.size))
    for _ in range(10):  # more than there are places
        reader = lane.get([(info, 0, -1)])
        reader.read_chunk()
        reader.cancel()
        del reader
        deadline = time.monotonic() + 60
        while lane.admission.streams and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lane.admission.streams == 0


def test_draining_refuses_the_new_and_finishes_the_old(lane: Lane) -> None:
    cold = file_object("cold", 10)
    reader = lane.get([(cold, 0, 10)])
    with lane.source.filling:
        assert lane.source.filling.wait_for(lambda: bool(lane.source.asked), 60)
    lane.admission.begin_drain()
    assert not lane.admission.wait_until_idle(0.05)
    error = refusal(lambda: lane.get([(cold, 0, 10)]).read_all())
    assert isinstance(error, ServerUnavailable)
    lane.source.fill(cold, 0, content(10))
    assert reader.read_all().num_rows == 1
    assert lane.admission.wait_until_idle(60)


def test_closing_ends_a_stream_at_its_next_batch(lane: Lane) -> None:
    info = file_object("k", 64 * CHUNK_BYTES)
    lane.store.add(info, content(info.size))
    reader = lane.get([(info, 0, -1)])
    reader.read_chunk()
    lane.admission.close()
    error = refusal(reader.read_all)
    assert isinstance(error, ServerUnavailable)


def test_a_read_says_at_once_that_it_waits_for_the_source_and_who_it_is(lane: Lane) -> None:
    reader = lane.get([(file_object("cold", 10), 0, 10)], timeout_s=20)
    assert reader.schema.metadata == {SERVER_ID: lane.store.server_id.encode()}
    assert reader.read_chunk().data.num_rows == 0
    reader.cancel()


def test_a_read_gives_up_by_its_deadline(lane: Lane) -> None:
    reader = lane.get([(file_object("cold", 10), 0, 10)], timeout_s=0.1)
    (piece,) = [piece for chunk in reader for piece in decode_pieces(chunk.data)]
    assert piece.error is not None
    assert "DeadlineExceeded" in piece.error


def test_writes_are_stored_under_their_namespace(lane: Lane) -> None:
    big, small = saved("a", CHUNK_BYTES + 5), saved("b", 3)
    body = content(big.size)
    rows = [
        (0, 0, chunk_digest(body[:CHUNK_BYTES]), pa.py_buffer(body[:CHUNK_BYTES])),
        (0, 1, chunk_digest(body[CHUNK_BYTES:]), pa.py_buffer(body[CHUNK_BYTES:])),
        (1, 0, chunk_digest(b"abc"), pa.py_buffer(b"abc")),
    ]
    reply = lane.put(SAVE, [big, small], [encode_chunks(rows[:1]), encode_chunks(rows[1:])], durable=True)
    assert reply.bytes == big.size + 3
    assert lane.store.content(big) == body
    assert lane.store.content(small) == b"abc"
    assert lane.store.kept == [(SAVE, True)]
    assert lane.store.synced == [SAVE]
    assert lane.store.groups == [(SAVE, 3)], "one index transaction for batches that are small together"
    assert (lane.counters.write_calls, lane.counters.written_bytes) == (1, big.size + 3)


def test_samples_are_neither_kept_nor_synced(lane: Lane) -> None:
    sample = ObjectInfo(ObjectId("samples", "set/1", "0"), 4)
    row = (0, 0, chunk_digest(b"data"), pa.py_buffer(b"data"))
    assert lane.put("samples:set@0", [sample], [encode_chunks([row])]).bytes == 4
    assert lane.store.content(sample) == b"data"
    assert (lane.store.kept, lane.store.synced) == ([], [])


def test_an_empty_object_is_written_as_one_empty_chunk(lane: Lane) -> None:
    info = saved("empty", 0)
    assert lane.put(SAVE, [info], [encode_chunks([(0, 0, chunk_digest(b""), pa.py_buffer(b""))])]).bytes == 0
    assert lane.store.content(info) == b""


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ((0, 0, 1, b"abc"), IntegrityError),
        ((1, 0, None, b"abc"), ConfigurationError),
        ((0, 1, None, b"abc"), ConfigurationError),
        ((0, 0, None, b"ab"), ConfigurationError),
        ((0, 0, None, b"abcd"), ConfigurationError),
        ((0, 2**32 - 1, None, b"abc"), ConfigurationError),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    lane: Lane, row: tuple[Any, ...], kind: type[TorchCacheError]
) -> None:
    number, index, digest, data = row
    digest = chunk_digest(data) if digest is None else digest
    batch = encode_chunks([(number, index, digest, pa.py_buffer(data))])
    error = refusal(lambda: lane.put(SAVE, [saved("a", 3)], [batch]))
    assert type(error) is kind
    assert lane.store.chunks == {}


def test_clients_can_not_write_what_an_under_store_holds(lane: Lane) -> None:
    batch = encode_chunks([(0, 0, chunk_digest(b"abc"), pa.py_buffer(b"abc"))])
    error = refusal(lambda: lane.put("n", [file_object("k", 3)], [batch]))
    assert isinstance(error, ConfigurationError)
    assert lane.store.chunks == {}


def test_another_schema_is_refused(lane: Lane) -> None:
    request = pb.WriteRequest(namespace=SAVE, objects=[ref(saved("a", 3))])
    schema = pa.schema([("x", pa.int64())])

    def write() -> None:
        descriptor = fl.FlightDescriptor.for_command(request.SerializeToString())
        writer, metadata = lane.client.do_put(descriptor, schema, lane.options())
        try:
            writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
            writer.done_writing()
            metadata.read()
        finally:
            writer.close()

    error = refusal(write)
    assert isinstance(error, ConfigurationError)
    assert "another schema" in str(error)


def test_a_batch_that_is_too_large_is_refused(lane: Lane) -> None:
    info = saved("a", 5 * CHUNK_BYTES)
    part = content(CHUNK_BYTES)
    rows = [(0, i, chunk_digest(part), pa.py_buffer(part)) for i in range(5)]
    error = refusal(lambda: lane.put(SAVE, [info], [encode_chunks(rows)]))
    assert isinstance(error, ConfigurationError)
    assert "16777216 are allowed" in str(error)


def test_every_way_an_overload_leaves_says_when_to_come_again(lane: Lane) -> None:
    """Who raised it named no time: of a stream, and of one extent among others."""
    lane.store.error = Overloaded("too much is handed out")
    batch = encode_chunks([(0, 0, chunk_digest(b"abc"), pa.py_buffer(b"abc"))])
    whole = refusal(lambda: lane.put(SAVE, [saved("a", 3)], [batch]))
    cold = file_object("cold", 10)
    lane.source.refused[ChunkId(cold.id, 0)] = Overloaded("waited up to its deadline")
    [piece] = [piece for chunk in lane.get([(cold, 0, 10)]) for piece in decode_pieces(chunk.data)]
    assert piece.error is not None
    for told in (whole, decode_error(piece.error)):
        assert isinstance(told, Overloaded)
        assert told.retry_after_s is not None and told.retry_after_s > 0


@pytest.mark.parametrize(
    "error", [OutOfSpace("full", object="o"), DeadlineExceeded("late"), ServerUnavailable("no")]
)
def test_errors_of_the_store_arrive_as_themselves(lane: Lane, error: TorchCacheError) -> None:
    lane.store.error = error
    batch = encode_chunks([(0, 0, chunk_digest(b"abc"), pa.py_buffer(b"abc"))])
    got = refusal(lambda: lane.put(SAVE, [saved("a", 3)], [batch]))
    assert type(got) is type(error)
    assert (got.message, got.object) == (error.message, error.object)


def test_an_unexpected_error_is_logged_and_not_told(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    lane.store.error = RuntimeError("secret detail")
    batch = encode_chunks([(0, 0, chunk_digest(b"abc"), pa.py_buffer(b"abc"))])
    got = refusal(lambda: lane.put(SAVE, [saved("a", 3)], [batch]))
    assert type(got) is TorchCacheError
    assert "secret detail" not in str(got)
    assert "secret detail" in caplog.text


def test_reads_run_beside_each_other(lane: Lane) -> None:
    cold, warm = file_object("cold", 10), file_object("warm", 10)
    lane.store.add(warm, content(10))
    waiting = lane.get([(cold, 0, 10)])
    rows: list[int] = []
    thread = threading.Thread(target=lambda: rows.append(waiting.read_all().num_rows))
    thread.start()
    assert lane.get([(warm, 0, 10)]).read_all().num_rows == 1
    assert rows == []
    lane.source.fill(cold, 0, content(10))
    thread.join(60)
    assert rows == [1]


def test_what_a_client_sees_without_extra_info_is_told_by_class() -> None:
    error = flight_error(Overloaded("full"))
    assert isinstance(error, fl.FlightServerError | fl.FlightUnavailableError)
    assert "full" in str(error)
    bare = error_from_flight(fl.FlightUnavailableError("gone. gRPC client debug context: x"), server="h:1")
    assert isinstance(bare, ServerUnavailable)
    assert (bare.message, bare.server) == ("unavailable: gone", "h:1")
