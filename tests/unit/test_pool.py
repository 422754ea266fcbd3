"""The pool before stand-ins that can be told to fail and to lie."""

from __future__ import annotations

import os
import pickle
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.conformance.standin import Script, StandIn
from torchcache.connecting import connect
from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    NotCommitted,
    NotResident,
    ObjectNotFound,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.lanes.access import Access
from torchcache.lanes.base import Lane
from torchcache.model import CHUNK_BYTES, STRIPE_BYTES, Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement, placement_key
from torchcache.pool import Pool, reads, session
from torchcache.pool.control import ControlClient
from torchcache.pool.members import Endpoint, Member, Members, parse_address
from torchcache.pool.metrics import COUNTERS, PoolCollector
from torchcache.pool.session import Asked
from torchcache.wire.codec import Piece
from torchcache.wire.v1 import cache_pb2

pytestmark = pytest.mark.usefixtures("no_hedges")

LARGE = random.Random(3).randbytes(3 * STRIPE_BYTES + 12345)


def sample(number: int) -> ObjectId:
    return ObjectId("samples", f"d/{number}", "0")


def whole(id_: ObjectId) -> Extent:
    return Extent(ObjectInfo(id_, -1))


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as standin:
        yield standin


@pytest.fixture
def pool(server: StandIn) -> Iterator[Pool]:
    pool = connect(server.address, token="secret")
    yield pool
    pool.close()


@pytest.fixture
def servers() -> Iterator[dict[str, StandIn]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(StandIn(Script(server_id=name))) for name in ("a", "b", "c")}


@pytest.fixture
def wide(servers: dict[str, StandIn]) -> Iterator[Pool]:
    pool = connect(",".join(server.address for server in servers.values()), token="secret")
    yield pool
    pool.close()


def owners(id_: ObjectId, offset: int = 0) -> list[str]:
    return Placement("abc").order(placement_key(id_, offset))


def corrupt(pieces: list[Piece]) -> list[Piece]:
    return [p._replace(data=pa.py_buffer(bytes(p.data.size))) for p in pieces]


# ---- one server ----


def test_a_batch_is_one_call(server: StandIn, pool: Pool) -> None:
    data = [os.urandom(1000 + i) for i in range(300)]
    pool.write("samples:d@0", [(sample(i), [d[:100], d[100:]]) for i, d in enumerate(data)])
    views = pool.read([whole(sample(i)) for i in range(300)], namespace="samples:d@0")
    assert [bytes(view) for view in views] == data
    assert (len(server.script.reads), len(server.script.writes)) == (1, 1)
    assert server.script.reads[0].namespace == "samples:d@0"
    found = pool.statistics()
    assert (found.read_calls, found.write_calls, found.extents) == (1, 1, 300)
    assert found.read_bytes == found.written_bytes == sum(map(len, data))
    assert found.lanes == {server.address: "flight"}


def test_nothing_is_nothing(server: StandIn, pool: Pool) -> None:
    assert pool.read([]) == []
    pool.write("samples:d@0", [])
    pool.stage([], namespace="d")
    assert not server.script.calls


def test_errors_stand_in_their_extents_places(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"one")
    first, second = pool.read_each([whole(sample(0)), whole(sample(1))], resident_only=True)
    assert isinstance(first, NotResident)
    assert bytes(second) == b"one"  # type: ignore[arg-type]
    assert server.script.reads[0].resident_only
    with pytest.raises(NotResident):
        pool.read([whole(sample(1)), whole(sample(0))])


def test_damage_on_the_way_is_asked_for_once_more_as_suspect(server: StandIn, pool: Pool) -> None:
    """F5: the server gets the chance to prove its disk and to fetch anew."""
    server.put(sample(1), b"right")
    server.put(sample(2), b"right too")
    server.script.tamper = lambda request, pieces: (
        pieces if request.suspect else corrupt(pieces[:1]) + pieces[1:]
    )
    assert [bytes(v) for v in pool.read([whole(sample(1)), whole(sample(2))])] == [b"right", b"right too"]
    assert [(r.suspect, len(r.object)) for r in server.script.reads] == [(False, 2), (True, 1)]
    assert pool.statistics().suspects == 1


def test_a_server_is_down_for_who_got_nothing_though_others_got_theirs_by_another_lane(
    server: StandIn, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(sample(1), b"one")
    pool.read([whole(sample(1))])
    session = pool._session()
    assert session.current is not None
    (member,) = session.current.by_id.values()
    answer = [ServerUnavailable("gone"), memoryview(b"from the files")]
    monkeypatch.setattr(member.lane, "read", lambda *_, **__: answer)
    down: list[str] = []
    monkeypatch.setattr(session.health, "failed", down.append)
    first, second = pool.read_each([whole(sample(1)), whole(sample(2))], timeout_s=60)
    assert down
    assert (first, second) == (b"one", b"from the files"), "after another try"


def test_damage_that_stays_is_an_integrity_error(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    server.script.tamper = lambda _, pieces: corrupt(pieces)
    with pytest.raises(IntegrityError, match=r"samples/d/1@0.*" + server.address):
        pool.read([whole(sample(1))])
    assert len(server.script.reads) == 2


def test_an_answer_about_what_was_not_asked_is_an_integrity_error(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    server.script.tamper = lambda _, pieces: [p._replace(extent=7) for p in pieces]
    with pytest.raises(IntegrityError, match="extent 7"):
        pool.read([whole(sample(1))])


def test_a_stream_that_breaks_goes_on_with_what_is_missing(server: StandIn, pool: Pool) -> None:
    """F18."""
    for i in range(4):
        server.put(sample(i), b"x" * (i + 1))
    server.script.break_after = 3
    assert [len(v) for v in pool.read([whole(sample(i)) for i in range(4)])] == [1, 2, 3, 4]
    assert [len(r.object) for r in server.script.reads] == [4, 1]
    assert pool.statistics().retries == 1


@pytest.mark.parametrize("kind", [fl.FlightCancelledError, fl.FlightInternalError, fl.FlightUnavailableError])
def test_a_call_that_the_server_tears_is_made_again(
    server: StandIn, pool: Pool, kind: type[Exception]
) -> None:
    """A server that ends, or a connection that is reset, cancels what runs."""
    server.put(sample(1), b"right")
    server.script.fail_reads = [kind("torn")]
    assert bytes(pool.read([whole(sample(1))])[0]) == b"right"


def test_a_busy_server_is_asked_again(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    text = '{"error": "Overloaded", "message": "at its bound"}'
    server.script.fail_reads = [fl.FlightServerError(text, text.encode()) for _ in range(2)]
    assert bytes(pool.read([whole(sample(1))])[0]) == b"right"
    server.script.fail_calls = [Overloaded("at its bound")]
    assert len(pool.status()) == 1
    assert pool.statistics().retries == 3


def test_an_error_of_the_server_that_is_final_is_not_tried_again(server: StandIn, pool: Pool) -> None:
    text = '{"error": "ConfigurationError", "message": "no such under-store"}'
    server.script.fail_reads = [fl.FlightServerError(text, text.encode())]
    with pytest.raises(ConfigurationError, match="no such under-store"):
        pool.read([whole(sample(1))])
    assert len(server.script.reads) == 1


def test_into_returns_the_filled_parts(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    memory = bytearray(10)
    (view,) = pool.read([whole(sample(1))], into=[memoryview(memory)])
    assert (bytes(view), memory) == (b"right", b"right" + bytes(5))


def test_a_write_is_tried_again(server: StandIn, pool: Pool) -> None:
    text = '{"error": "ServerUnavailable", "message": "draining"}'
    server.script.fail_reads = [fl.FlightUnavailableError(text, text.encode())]
    pool.write("samples:d@0", [(sample(1), [b"kept"])])
    assert server.script.objects[sample(1)] == b"kept"
    assert pool.statistics().retries == 1


def test_a_full_store_is_said_at_once(server: StandIn, pool: Pool) -> None:
    text = '{"error": "OutOfSpace", "message": "the store is full of what must be kept"}'
    server.script.fail_reads = [fl.FlightServerError(text, text.encode())]
    with pytest.raises(TorchCacheError, match="the store is full"):
        pool.write("samples:d@0", [(sample(1), [b"kept"])])


# ---- objects ----


def test_listings_come_page_by_page(server: StandIn, pool: Pool) -> None:
    for key in ["b/f/3", "b/f/1", "b/f/2", "b/f/10", "b/f/é", "b/fother", "b/f/z"]:
        server.put(ObjectId("s3", key, "v"), key.encode())
    expected = ["b/f/1", "b/f/10", "b/f/2", "b/f/3", "b/f/z", "b/f/é"]
    for uri in ("s3://b/f", "s3://b/f/"):
        assert [info.id.key for info in pool.list(uri)] == expected
    assert [r.start_after for name, r in server.script.calls if name == "ListObjects"][:2] == ["", "b/f/2"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/key", ("s3", "bucket/key")),
        ("s3://bucket/deep/key", ("deep", "key")),
        ("s3://bucket/deep", ("deep", "")),
        ("s3://bucket/deeper", ("s3", "bucket/deeper")),
        ("file:///tmp/x y", ("file", "tmp/x y")),
        ("/tmp/x", ("file", "tmp/x")),
    ],
)
def test_a_uri_belongs_to_the_under_store_with_the_longest_root(
    pool: Pool, uri: str, expected: tuple[str, str]
) -> None:
    assert pool.resolve(uri) == expected


def test_a_uri_of_no_under_store_names_those_there_are(pool: Pool) -> None:
    with pytest.raises(ConfigurationError, match=r"'gs://b/k'.*file:///, s3://, s3://bucket/deep/"):
        pool.resolve("gs://b/k")


def test_an_object_has_its_uri(pool: Pool) -> None:
    assert pool.uri(ObjectId("deep", "k", "v")) == "s3://bucket/deep/k"
    assert pool.uri(ObjectId("s3", "b/k", "v")) == "s3://b/k"
    assert pool.uri(sample(1)) == "samples/d/1"


def test_stat_and_delete(server: StandIn, pool: Pool) -> None:
    info = server.put(ObjectId("s3", "b/k", "v"), b"12345")
    assert pool.stat("s3://b/k") == info
    with pytest.raises(ObjectNotFound, match="b/none"):
        pool.stat("s3://b/none")
    pool.delete("s3://b/k")
    assert server.script.calls[-1][1] == cache_pb2.DeleteRequest(store="s3", key="b/k")
    for uri in ("s3://b/folder/", "s3://"):
        with pytest.raises(ConfigurationError, match="folder"):
            pool.delete(uri)


def test_publishing_writes_the_bytes_then_waits_until_they_are_there(server: StandIn, pool: Pool) -> None:
    info = pool.publish("s3://bucket/k", [b"12", b"345"], create_only=True)
    assert info == ObjectInfo(ObjectId("s3", "bucket/k", "e"), 5)
    requests = [request for name, request in server.script.calls if name == "PublishObject"]
    assert len(requests) == 2
    assert requests[0].create_only
    (write,) = server.script.writes
    write_id = requests[0].write_id
    assert write.namespace == f"put:s3/bucket/k@{write_id}"
    assert server.script.objects[ObjectId("s3", "bucket/k", f"save:{write_id}")] == b"12345"


def test_staging_tells_its_progress(server: StandIn, pool: Pool) -> None:
    small = [ObjectInfo(ObjectId("s3", f"b/{i}", "v"), 1000) for i in range(300)]
    large = server.put(ObjectId("s3", "b/large", "v"), LARGE)
    seen: list[tuple[int, int]] = []
    pool.stage([*small, large], namespace="s3://b", on_progress=lambda *done: seen.append(done))
    assert [sum(column) for column in zip(*seen, strict=True)] == [301, 300 * 1000 + len(LARGE)]
    staged = [len(request.objects) for name, request in server.script.calls if name == "Stage"]
    assert sum(staged) == 300
    assert len(staged) == 3
    (touch,) = server.script.reads
    assert list(touch.offset) == list(range(0, len(LARGE), CHUNK_BYTES))
    assert set(touch.length) == {1}


def test_staging_tries_all_and_raises_the_first_error(server: StandIn, pool: Pool) -> None:
    small = [ObjectInfo(ObjectId("s3", f"b/{i}", "v"), 1000) for i in range(300)]
    server.script.fail_calls = [ObjectNotFound("vanished", object="s3://b/1")]
    seen: list[int] = []
    with pytest.raises(ObjectNotFound, match="vanished"):
        pool.stage(small, namespace="s3://b", on_progress=lambda objects, _: seen.append(objects))
    assert sum(seen) == 300


def test_staging_can_be_cancelled(server: StandIn, pool: Pool) -> None:
    small = [ObjectInfo(ObjectId("s3", f"b/{i}", "v"), 1000) for i in range(128 * 100)]
    pool.stage(small, namespace="s3://b", cancelled=lambda: True)
    assert sum(name == "Stage" for name, _ in server.script.calls) < 100


def test_an_error_in_on_progress_reaches_the_caller(pool: Pool) -> None:
    def fail(objects: int, size: int) -> None:
        raise RuntimeError("the bar broke")

    with pytest.raises(RuntimeError, match="the bar broke"):
        pool.stage([ObjectInfo(ObjectId("s3", "b/1", "v"), 1)], namespace="x", on_progress=fail)


def test_residency(server: StandIn, pool: Pool) -> None:
    held = [server.put(ObjectId("s3", f"b/{i}", "v"), bytes(100)) for i in range(3)]
    absent = ObjectInfo(ObjectId("s3", "b/absent", "v"), 300)
    found = pool.residency([*held, absent])
    assert (found.objects, found.resident_objects, found.bytes, found.resident_bytes) == (4, 3, 600, 300)
    assert found.fraction == 0.5
    server.put(sample(1), b"x")
    found = pool.residency([ObjectInfo(sample(1), -1), ObjectInfo(sample(2), -1)])
    assert (found.resident_objects, found.fraction) == (1, 0.5)
    assert pool.residency([]).fraction == 1.0


def test_status(server: StandIn, pool: Pool) -> None:
    (status,) = pool.status()
    assert (status.address, status.server_id, status.hits) == (server.address, "standin", 3)


def test_saves(server: StandIn, pool: Pool) -> None:
    reserved = pool.reserve_save("s3", "b/run", "", "id", overwrite=False, writer="me")
    assert (reserved.lease_s, reserved.servers, reserved.wanted) == (10.0, ("standin",), 1)
    assert pool.renew_save("s3", "b/run", "", "id") == 10.0
    info = pool.commit_save("s3", "b/run", "", "id", files=[("f", 3)], metadata=b"m", manifest=b"{}")
    assert (info.state, info.pending_bytes, info.error) == ("committed", 3, None)
    commit = server.script.calls[-1][1]
    assert (commit.save.path, commit.files[0].name, commit.metadata) == ("b/run", "f", b"m")
    assert pool.get_save("s3", "b/run").state == "durable"
    for folder, prefix in [("s3://b", "b/"), ("s3://b/run/step-1/", "b/run/step-1/"), ("s3://", "")]:
        assert [save.state for save in pool.list_saves(folder)] == ["durable"]
        assert server.script.calls[-1][1].prefix == prefix
    pool.abandon_save("s3", "b/run", "", "id")
    server.script.fail_calls = [NotCommitted("nothing at b/run"), AlreadyExists("taken")]
    with pytest.raises(NotCommitted):
        pool.get_save("s3", "b/run")
    with pytest.raises(AlreadyExists):
        pool.reserve_save("s3", "b/run", "", "id2", overwrite=False, writer="me")


# ---- several servers ----


def test_a_large_extent_is_read_by_several_calls_at_a_time(
    server: StandIn, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "STREAM_BYTES", STRIPE_BYTES)
    monkeypatch.setitem(reads.STREAMS, "flight", 3)
    large, small = ObjectId("s3", "b/large", "v"), ObjectId("s3", "b/small", "v")
    infos = [server.put(large, LARGE), server.put(small, b"small")]
    memory = bytearray(len(LARGE))
    got = pool.read([Extent(info) for info in infos], into=[memoryview(memory), memoryview(bytearray(9))])
    assert memory == LARGE
    assert [len(view) for view in got] == [len(LARGE), 5]
    assert bytes(pool.read([Extent(infos[0])])[0]) == LARGE
    calls = server.script.reads
    assert len(calls) == 6
    assert sum(len(call.offset) for call in calls) == 7  # the small one came with a part of the large one
    assert sum(sum(call.length) for call in calls) in (2 * len(LARGE) - 1, 2 * len(LARGE) + 5)


def test_one_part_that_fails_fails_its_extent_alone(
    server: StandIn, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "STREAM_BYTES", STRIPE_BYTES)
    monkeypatch.setitem(reads.STREAMS, "flight", 3)
    infos = [server.put(ObjectId("s3", f"b/{n}", "v"), LARGE) for n in range(2)]

    def tamper(request: cache_pb2.ReadRequest, pieces: list[Piece]) -> list[Piece]:
        names = [request.objects[request.object[piece.extent]].key for piece in pieces]
        bad = [name == "b/0" and p.offset >= 2 * STRIPE_BYTES for name, p in zip(names, pieces, strict=True)]
        return [corrupt([p])[0] if b else p for p, b in zip(pieces, bad, strict=True)]

    server.script.tamper = tamper
    first, second = pool.read_each([Extent(info) for info in infos])
    assert isinstance(first, IntegrityError)
    assert isinstance(second, memoryview)
    assert bytes(second) == LARGE


def test_an_extent_is_read_from_the_owners_of_its_stripes(servers: dict[str, StandIn], wide: Pool) -> None:
    id_ = ObjectId("s3", "b/large", "v")
    for server in servers.values():
        info = server.put(id_, LARGE)
    start, end = 5, len(LARGE) - 7
    assert bytes(wide.read([Extent(info, start, end - start)])[0]) == LARGE[start:end]
    memory = bytearray(len(LARGE))
    (view,) = wide.read([Extent(info)], into=[memoryview(memory)])
    assert memory == LARGE
    assert len(view) == len(LARGE)
    for name, server in servers.items():
        for request in server.script.reads:
            for offset, length in zip(request.offset, request.length, strict=True):
                for at in range(offset, offset + length, STRIPE_BYTES):
                    assert owners(id_, at)[0] == name
        assert len(server.script.reads) <= 2  # one a read
    assert wide.statistics().read_calls == sum(len(s.script.reads) for s in servers.values())


def test_samples_go_to_their_owners_and_come_from_there(servers: dict[str, StandIn], wide: Pool) -> None:
    wide.write("samples:d@0", [(sample(i), [b"%d" % i]) for i in range(60)])
    for name, server in servers.items():
        assert server.script.objects
        assert all(owners(id_)[0] == name for id_ in server.script.objects)
    views = wide.read([whole(sample(i)) for i in range(60)])
    assert [bytes(view) for view in views] == [b"%d" % i for i in range(60)]
    assert all(len(server.script.reads) == 1 for server in servers.values())


def test_a_server_of_more_weight_owns_more(servers: dict[str, StandIn], wide: Pool) -> None:
    weights = {"a": 1e9, "b": 1e9, "c": 6e9}
    for name, server in servers.items():
        server.script.weight = weights[name]
    wide.write("samples:d@0", [(sample(i), [b"x"]) for i in range(200)])
    placement = Placement("abc", weights)
    assert wide.placement(weights) == placement
    assert {one.server_id: one.weight for one in wide.status()} == weights
    for name, server in servers.items():
        assert all(placement.owner(placement_key(id_, 0)) == name for id_ in server.script.objects)
    assert len(servers["c"].script.objects) > 120


def test_an_owner_that_is_gone_is_stood_in_for(servers: dict[str, StandIn], wide: Pool) -> None:
    """F17: the next in order is asked, and then first."""
    id_ = ObjectId("s3", "b/k", "v")
    for server in servers.values():
        info = server.put(id_, b"content")
    wide.status()
    owner, second, third = owners(id_)
    servers[owner].__exit__(None, None, None)
    assert bytes(wide.read([Extent(info)])[0]) == b"content"
    assert bytes(wide.read([Extent(info)])[0]) == b"content"
    assert len(servers[second].script.reads) == 2
    assert not servers[third].script.reads
    assert wide.statistics().read_calls == 3  # the owner only once
    servers[owner].__enter__()


def test_other_servers_are_told_which_one_is_passed_over_and_why(
    servers: dict[str, StandIn], wide: Pool
) -> None:
    ids = [sample(i) for i in range(20)]
    for server in servers.values():
        infos = [server.put(id_, b"content") for id_ in ids]
    wide.read([Extent(info) for info in infos])
    gone = owners(ids[0])[0]
    servers[gone].__exit__(None, None, None)
    wide.read([Extent(info) for info in infos])
    others = [server for name, server in servers.items() if name != gone]
    before = [len(server.script.reads) for server in others]
    assert [one.server_id for s in others for r in s.script.reads[:1] for one in r.passed_over] == []
    wide.read([Extent(info) for info in infos])
    for server, count in zip(others, before, strict=True):
        for request in server.script.reads[count:]:
            told = tuple((one.server_id, one.reason) for one in request.passed_over)
            assert told == wide._session().health.reasons()
            assert [server_id for server_id, _ in told] == [gone]
    assert sum(len(server.script.reads) for server in others) > sum(before)
    servers[gone].__enter__()


def test_what_a_process_asked_of_a_pool_is_metrics_too(servers: dict[str, StandIn], wide: Pool) -> None:
    registry = CollectorRegistry()
    registry.register(PoolCollector(wide))
    wide.write("samples:d@0", [(sample(i), [b"abc"]) for i in range(20)])
    wide.read([whole(sample(i)) for i in range(20)])
    said = generate_latest(registry).decode()
    assert "torchcache_client_extents_total 20.0" in said
    assert "torchcache_client_read_bytes_total 60.0" in said
    assert 'torchcache_client_servers{lane="flight"} 3.0' in said
    for name in COUNTERS:
        assert f"torchcache_client_{name}_total {getattr(wide.statistics(), name)}.0" in said
    wide._session().health.failed("b")
    assert f'torchcache_client_server_passed_over{{server="{servers["b"].address}"}} 1.0' in (
        generate_latest(registry).decode()
    )


def test_what_the_budgets_refuse_is_counted(server: StandIn, pool: Pool) -> None:
    pool.status()
    budget = pool._session().budget
    while budget.spend():
        pass
    server.script.fail_calls += [ServerUnavailable("away")] * 3
    with pytest.raises(ServerUnavailable):
        pool.status()
    assert (pool.statistics().retries, pool.statistics().retries_refused) == (0, 1)


def test_damage_at_one_server_is_made_good_by_the_next(servers: dict[str, StandIn], wide: Pool) -> None:
    id_ = ObjectId("s3", "b/k", "v")
    for server in servers.values():
        info = server.put(id_, b"content")
    owner, second, _ = owners(id_)
    servers[owner].script.tamper = lambda _, pieces: corrupt(pieces)
    assert bytes(wide.read([Extent(info)])[0]) == b"content"
    assert [r.suspect for r in servers[owner].script.reads] == [False, True]
    assert [r.suspect for r in servers[second].script.reads] == [False]


def test_a_pool_works_with_the_servers_that_answer(servers: dict[str, StandIn]) -> None:
    pool = connect(f"127.0.0.1:1,{servers['a'].address}", token="secret")
    pool.write("samples:d@0", [(sample(i), [b"x"]) for i in range(5)])
    assert len(servers["a"].script.objects) == 5
    pool.close()


def test_files_of_a_save_never_go_to_another_than_their_owner(
    servers: dict[str, StandIn], wide: Pool
) -> None:
    id_ = ObjectId("s3", "run/step-1/__0_0.distcp", "save:1")
    wide.status()
    owner = owners(id_)[0]
    assert owners(ObjectId("s3", "run/step-1/.metadata", "save:1"))[0] == owner
    servers[owner].__exit__(None, None, None)
    with pytest.raises((ServerUnavailable, DeadlineExceeded)):
        wide.write("save:s3/run/step-1@1", [(id_, [b"x"])], timeout_s=1)
    assert not any(server.script.writes for server in servers.values())
    servers[owner].__enter__()


def test_residency_counts_what_servers_hold_together(servers: dict[str, StandIn], wide: Pool) -> None:
    infos = [ObjectInfo(sample(i), 3) for i in range(10)]
    wide.write("samples:d@0", [(info.id, [b"abc"]) for info in infos])
    assert wide.residency(infos).fraction == 1.0


def test_status_is_of_those_that_answer(server: StandIn) -> None:
    pool = connect(f"127.0.0.1:1,{server.address}", token="secret")
    assert [status.address for status in pool.status()] == [server.address]
    assert pool.unreachable() == ["127.0.0.1:1"]
    pool.close()


def test_status_goes_on_without_a_server_that_dies(servers: dict[str, StandIn], wide: Pool) -> None:
    assert len(wide.status()) == len(servers)
    assert wide.unreachable() == []
    gone = servers["b"]
    others = {server.address for server in servers.values()} - {gone.address}
    gone.__exit__(None, None, None)
    assert {status.address for status in wide.status()} == others
    assert wide.unreachable() == [gone.address]
    assert wide.answers_s()[gone.address] is None

    retries = wide.statistics().retries
    assert {status.address for status in wide.status()} == others
    assert wide.statistics().retries == retries, "who is known to be away is not waited for at each look"
    gone.__enter__()


def test_a_silent_server_gets_its_full_time_now_and_then(
    wide: Pool, servers: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may need two seconds where one is given, and be back all the same."""
    assert len(wide.status()) == len(servers)
    live, ask, given = wide._session(), wide._session().ask_member, []

    def late(member: Member, method: str, request: Any, deadline: float) -> Asked:
        if member.server_id != "b":
            return ask(member, method, request, deadline)
        given.append(deadline - time.monotonic())
        raise DeadlineExceeded("late")

    monkeypatch.setattr(session, "INFO_S", 1000.0)
    monkeypatch.setattr(live, "ask_member", late)
    monkeypatch.setattr(live, "wait", lambda *_: False)
    for _ in range(2 * session.PATIENT_LOOK):
        assert len(wide.status()) == len(servers) - 1
        assert wide.unreachable() == [servers["b"].address]
    full = [number for number, time_s in enumerate(given) if time_s > session.INFO_AGAIN_S]
    assert full == [0, session.PATIENT_LOOK - 1, 2 * session.PATIENT_LOOK - 1]
    monkeypatch.setattr(live, "ask_member", ask)
    assert len(wide.status()) == len(servers)
    assert wide.unreachable() == []


def test_a_server_that_comes_back_is_seen_beside_one_that_hangs(
    wide: Pool, servers: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that hangs takes all of the time that there is to look anew who serves."""
    assert len(wide.status()) == len(servers)

    def look(seen: Members | None, deadline: float) -> Members:
        time.sleep(max(0.0, deadline - time.monotonic()))
        raise ServerUnavailable("one hangs")

    monkeypatch.setattr(session, "INFO_S", 0.5)
    monkeypatch.setattr(session, "INFO_AGAIN_S", 60.0)
    monkeypatch.setattr(wide._session(), "refresh", look)
    servers["b"].script.fail_calls.append(ServerUnavailable("just restarted"))
    assert len(wide.status()) == len(servers)
    assert not servers["b"].script.fail_calls


def test_a_server_that_is_silent_stays_so_when_others_are_met_anew(
    wide: Pool, servers: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says who it is, but not how: it is among those that didn't answer."""
    assert len(wide.status()) == len(servers)
    live, ask, given_up = wide._session(), wide._session().ask_member, threading.Event()

    def asked(member: Member, method: str, request: Any, deadline: float) -> Asked:
        if member.server_id == "b":
            raise DeadlineExceeded("late")
        if member.server_id == "c":
            assert given_up.wait(60)
            live.refresh(live.current, time.monotonic() + 60)
        return ask(member, method, request, deadline)

    def wait(*_: Any) -> bool:
        given_up.set()
        return False

    monkeypatch.setattr(live, "ask_member", asked)
    monkeypatch.setattr(live, "wait", wait)
    assert len(wide.status()) == len(servers) - 1
    assert wide.unreachable() == [servers["b"].address]


# ---- no server ----


def test_no_server_at_all() -> None:
    pool = connect("127.0.0.1:1", token="secret")
    with pytest.raises(ServerUnavailable, match=r"127.0.0.1:1 can be reached: .*; is this the address"):
        pool.read([whole(sample(1))], timeout_s=1.5)
    with pytest.raises(ServerUnavailable, match=r"127.0.0.1:1"):
        pool.write("samples:d@0", [(sample(1), [b"x"])], timeout_s=1.5)


def test_a_wrong_token_is_said_at_once(server: StandIn) -> None:
    pool = connect(server.address, token="not-the-secret")
    with pytest.raises(ConfigurationError, match="refused the token"):
        pool.read([whole(sample(1))])


def test_a_token_file_that_is_not_there_is_said(server: StandIn, home: Path) -> None:
    pool = connect(server.address)
    with pytest.raises(ConfigurationError, match=f"{home / 'token'} doesn't exist"):
        pool.read([whole(sample(1))])


def test_a_pool_pickles_by_its_address(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    pool.read([whole(sample(1))])
    again = pickle.loads(pickle.dumps(pool))
    assert again.address == pool.address == server.address
    assert again.statistics().read_calls == 0
    assert bytes(again.read([whole(sample(1))])[0]) == b"right"
    again.close()


def test_a_lane_is_closed_while_its_server_can_still_be_told_something() -> None:
    """Else what it tells opens a channel again that nobody closes."""
    closed: list[str] = []

    class Closing:
        def __init__(self, what: str) -> None:
            self.what = what

        def close(self) -> None:
            closed.append(self.what)

    control, lane = cast(ControlClient, Closing("control")), cast(Lane, Closing("lane"))
    Member("id", control, lane, "", ()).close()
    assert closed == ["lane", "control"]


def test_a_pool_that_is_used_again_after_its_close_stays_open(server: StandIn, pool: Pool) -> None:
    server.put(sample(1), b"right")
    pool.read([whole(sample(1))])
    pool.close()
    pool.read([whole(sample(1))])
    roster = pool._session()._roster
    roster.meet_again()
    for thread in threading.enumerate():
        if thread.name == "torchcache-members":
            thread.join(60)
    assert roster.current is not None


class Announced:
    """A source that tells weights, and is asked again before each read."""

    access, embedded, holds_s, description = Access(token="secret"), False, 0.0, "announced"

    def __init__(self, servers: dict[str, StandIn]) -> None:
        self.servers = servers
        self.weights = dict.fromkeys(servers, 1.0)

    def resolve(self, *, deadline: float) -> list[Endpoint]:
        return [
            replace(parse_address(server.address)[0], weight=self.weights[name])
            for name, server in self.servers.items()
        ]


def test_a_server_that_is_announced_with_another_weight_is_met_again(servers: dict[str, StandIn]) -> None:
    for server in servers.values():
        server.script.weight = 1.0
    source = Announced(servers)
    pool = Pool(source)
    name, server = next(iter(servers.items()))
    server.put(sample(1), b"right")
    pool.servers()
    server.script.weight = source.weights[name] = 6.0
    deadline = time.monotonic() + 120
    while pool.placement(servers) != Placement(servers, source.weights) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert pool.placement(servers) == Placement(servers, source.weights)
    pool.close()
    for thread in threading.enumerate():
        if thread.name == "torchcache-members":
            thread.join(60)


def test_servers_are_asked_side_by_side_who_they_are(
    servers: dict[str, StandIn], wide: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until all are being asked: one after the other would never come to an end."""
    together = threading.Barrier(len(servers))
    call = ControlClient.call

    def ask(self: ControlClient, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "GetInfo":
            together.wait(60)
        return call(self, method, *arguments, **options)

    monkeypatch.setattr(ControlClient, "call", ask)
    assert len(wide.status()) == len(servers)
