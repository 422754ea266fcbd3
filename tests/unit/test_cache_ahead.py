"""Fetching ahead of use: readers come first, the order bounds what is kept, and what one forgot is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from torchcache_server.cache import ahead as module
from torchcache_server.cache.ahead import Piece, StageAhead, State, Wanted
from torchcache_server.cache.fill_queue import FillQueue, Need
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.store import Store

from tests.unit.scripted_under_store import ScriptedUnderStore, object_of
from tests.unit.test_cache_fill_queue import Held
from torchcache.errors import ConfigurationError, NotResident, ObjectChanged, Overloaded
from torchcache.marks import marks
from torchcache.model import ChunkId, ObjectId, ObjectInfo
from torchcache.records import chunk_key

MIB = 1024 * 1024
CHUNK = 2 * MIB


def held(need: Need) -> Held:
    made = Held()
    made.fill.need = need
    return made


def test_who_reads_comes_before_all_that_is_fetched_ahead() -> None:
    queue = FillQueue(threads=2, limit_bytes=100)
    ahead, demand = [held("soon") for _ in range(5)], [held("now") for _ in range(3)]
    try:
        for one in ahead:
            queue.submit(one.fill)
        assert ahead[0].started.wait(30)
        for one in demand:
            queue.submit(one.fill)
        assert demand[0].started.wait(30)
        # One of two threads is left to readers, and the other is theirs as soon as it is free.
        ahead[0].go.set()
        assert demand[1].started.wait(30)
        assert not any(one.started.is_set() for one in ahead[1:])
        demand[0].go.set()
        assert demand[2].started.wait(30)
        assert not any(one.started.is_set() for one in ahead[1:])
    finally:
        for one in (*ahead, *demand):
            one.go.set()
        for one in (*ahead, *demand):
            one.fill.future.result(30)
        queue.close()


def test_another_epochs_chunks_wait_while_a_reader_waits_for_storage() -> None:
    queue = FillQueue(threads=4, limit_bytes=100)
    demand, later = held("now"), held("later")
    later.go.set()
    try:
        queue.submit(demand.fill)
        assert demand.started.wait(30)
        queue.submit(later.fill)
        assert not later.started.wait(0.3)
        demand.go.set()
        later.fill.future.result(30)
    finally:
        demand.go.set()
        queue.close()


def test_what_a_reader_waits_for_is_no_longer_ahead() -> None:
    queue = FillQueue(threads=1, limit_bytes=100)
    running, first, wanted = held("now"), held("soon"), held("later")
    try:
        queue.submit(running.fill)
        assert running.started.wait(30)
        queue.submit(first.fill)
        queue.submit(wanted.fill)
        queue.extend(wanted.fill, time.monotonic() + 60)
        running.go.set()
        assert wanted.started.wait(30)
        assert not first.started.is_set()
    finally:
        for one in (running, first, wanted):
            one.go.set()
        first.fill.future.result(30)
        queue.close()


# ---- over a store ----


@pytest.fixture
def source() -> ScriptedUnderStore:
    return ScriptedUnderStore()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store", capacity_bytes=64 * MIB, segment_bytes=6 * MIB, min_free_bytes=0)
    yield store
    store.close()


@pytest.fixture
def reads(store: Store, source: ScriptedUnderStore) -> Iterator[ReadThrough]:
    reads = ReadThrough(store, {"s3": source})  # type: ignore[dict-item]
    yield reads
    source.answer.set()
    reads.close()


@pytest.fixture
def ahead(store: Store, reads: ReadThrough) -> StageAhead:
    return StageAhead(store, reads)


def objects(count: int) -> list[ObjectInfo]:
    return [object_of(CHUNK, str(number)) for number in range(count)]


def tell(ahead: StageAhead, order: Sequence[ObjectInfo], *, epoch: int = 0, running: bool = True) -> None:
    told = marks([chunk_key(ChunkId(info.id, 0)) for info in order])
    positions = np.arange(len(order), dtype=np.uint32)
    ahead.tell(Piece("data", "rank0", epoch, len(order), len(order), 0, told, positions, running))


def stage(
    ahead: StageAhead, order: Sequence[ObjectInfo], *, epoch: int = 0, places: Sequence[int] | None = None
) -> list[State]:
    """How it is with the chunks of an order, or those in some places of it, once nothing is coming any more."""
    until = time.monotonic() + 60
    wanted = [Wanted(order[at], 0, at) for at in (range(len(order)) if places is None else places)]
    while True:
        answer = ahead.stage("data", "rank0", epoch, wanted, running=None)
        assert answer is not None
        states = [state for state, _ in answer[2]]
        if State.COMING not in states or time.monotonic() > until:
            return states
        time.sleep(0.01)


def read(reads: ReadThrough, info: ObjectInfo) -> None:
    answer = reads.get("data", info, 0, deadline=time.monotonic() + 60)
    if not hasattr(answer, "payload"):
        answer.result(60)


def test_it_stages_in_order_as_far_as_half_the_store_and_goes_on_as_it_is_read(
    ahead: StageAhead, reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    order = objects(40)
    tell(ahead, order)
    states = stage(ahead, order)
    ready = states.count(State.HERE)
    assert states == [State.HERE] * ready + [State.LATER] * (40 - ready)
    assert ready == 16  # half of 64 MiB, in chunks of 2
    assert ahead.standings()[0].ahead_bytes == ready * CHUNK
    for info in order[:10]:
        read(reads, info)
    states = stage(ahead, order)
    assert states[:2] == [State.READ] * 2
    assert states.count(State.HERE) + states.count(State.READ) > ready
    assert len(source.reads) == len(set(source.reads)), "nothing was fetched twice"


def test_what_was_read_is_no_longer_ahead_in_whatever_order_it_came(
    ahead: StageAhead, reads: ReadThrough
) -> None:
    order = objects(20)
    tell(ahead, order)
    assert stage(ahead, order, places=[15]) == [State.HERE]
    assert stage(ahead, order, places=range(8)) == [State.HERE] * 8
    assert ahead.standings()[0].ahead_bytes == 9 * CHUNK
    for info in order[:10]:
        read(reads, info)
    assert ahead.standings()[0].ahead_bytes == CHUNK


def test_what_is_needed_sooner_never_yields_to_what_is_staged(
    ahead: StageAhead, store: Store, reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    order = objects(60)
    for info in order[:28]:  # the store is nearly full of what is read first
        read(reads, info)
    tell(ahead, order)
    states = stage(ahead, order)
    assert states[:28] == [State.HERE] * 28
    assert State.LATER in states
    assert all(store.contains(ChunkId(info.id, 0)) for info in order[:28])
    before = len(source.reads)
    assert stage(ahead, order) == states
    assert len(source.reads) == before, "what there is no room for isn't fetched to be thrown away"


def test_what_is_staged_is_not_counted_as_read(ahead: StageAhead, store: Store) -> None:
    order = objects(8)
    tell(ahead, order)
    assert stage(ahead, order) == [State.HERE] * 8
    standing = store.foresight("data").standing("rank0")
    assert standing is not None
    assert standing.position == 0


def test_a_reader_that_comes_for_what_is_on_its_way_shares_the_fetch(
    ahead: StageAhead, store: Store, reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    order = objects(4)
    tell(ahead, order)
    source.answer.clear()
    ahead.stage("data", "rank0", 0, [Wanted(order[0], 0, 0)], running=None)
    source.wait_for_reads(1)
    answer = reads.get("data", order[0], 0, deadline=time.monotonic() + 60)
    source.answer.set()
    assert answer.result(60).object_size == CHUNK  # type: ignore[union-attr]
    assert len(source.reads) == 1
    standing = store.foresight("data").standing("rank0")
    assert standing is not None and standing.position == 1


def test_what_fails_says_why_once_and_is_tried_again(ahead: StageAhead, source: ScriptedUnderStore) -> None:
    order = objects(2)
    tell(ahead, order)
    source.error = ObjectChanged("it changed")
    assert State.FAILED in stage(ahead, order)
    source.error = None
    until = time.monotonic() + 60
    while stage(ahead, order) != [State.HERE] * 2:
        assert time.monotonic() < until


def test_computed_samples_are_not_staged(ahead: StageAhead) -> None:
    sample = ObjectInfo(ObjectId("samples", "a/1", "0"), CHUNK)
    tell(ahead, [sample])
    answer = ahead.stage("data", "rank0", 0, [Wanted(sample, 0, 0)], running=None)
    assert answer is not None
    assert [(state, type(error)) for state, error in answer[2]] == [(State.FAILED, NotResident)]


def test_an_unknown_order_stages_nothing(ahead: StageAhead, source: ScriptedUnderStore, store: Store) -> None:
    assert ahead.stage("data", "rank0", 0, [Wanted(objects(1)[0], 0, 0)], running=None) is None
    assert not source.reads
    assert store.foresights() == {}


def test_a_forgotten_order_leaves_nothing(ahead: StageAhead, store: Store) -> None:
    tell(ahead, objects(3))
    assert len(ahead.standings()) == 1
    ahead.forget("data", "rank0")
    ahead.forget("data", "never told")
    assert ahead.standings() == []
    store.tidy()
    assert store.foresights() == {}
    assert store.namespaces() == []


def test_an_expired_order_leaves_nothing(
    ahead: StageAhead, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_S", -1.0)
    tell(ahead, objects(3))
    store.tidy()
    assert store.foresights() == {}


def test_pieces_follow_each_other(ahead: StageAhead, store: Store) -> None:
    def piece(first: int, numbers: list[int], total: int = 4) -> Piece:
        told = np.array(numbers, np.uint64)
        return Piece("data", "rank0", 0, 10, total, first, told, np.array(numbers, np.uint32), True)

    ahead.tell(piece(0, [0, 1]))
    assert store.foresights() == {}
    with pytest.raises(ConfigurationError, match="doesn't follow"):
        ahead.tell(piece(3, [3]))
    ahead.tell(piece(0, [0, 1]))
    ahead.tell(piece(2, [2, 3]))
    assert store.foresight("data").chunks == 4
    with pytest.raises(ConfigurationError, match="don't ascend"):
        ahead.tell(piece(0, [1, 0, 2, 3]))
    with pytest.raises(ConfigurationError, match="doesn't follow"):
        ahead.tell(piece(0, [0, 1, 2], total=2))


def test_orders_are_bounded(ahead: StageAhead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHUNKS", 10)
    tell(ahead, objects(6))
    with pytest.raises(Overloaded, match="as if nobody knew it"):
        tell(ahead, objects(6), epoch=1)
    ahead.forget("data", "rank0")
    tell(ahead, objects(6), epoch=1)
