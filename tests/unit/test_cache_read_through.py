from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from torchcache_server.cache.read_through import FILL_THREADS, ReadThrough
from torchcache_server.store import Store, StoredChunk
from torchcache_server.understore.retry import RetryBudget

from tests.unit.scripted_under_store import ScriptedUnderStore, content, object_of
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotResident,
    ObjectChanged,
    ServerUnavailable,
)
from torchcache.model import CHUNK_BYTES, ByteRange, ChunkId, ObjectId, ObjectInfo

MIB = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store", capacity_bytes=64 * MIB)
    yield store
    store.close()


@pytest.fixture
def source() -> ScriptedUnderStore:
    return ScriptedUnderStore()


@pytest.fixture
def reads(store: Store, source: ScriptedUnderStore) -> Iterator[ReadThrough]:
    read_through = ReadThrough(store, {"s3": source})  # type: ignore[dict-item]
    yield read_through
    source.answer.set()
    read_through.close()


def soon() -> float:
    return time.monotonic() + 60


def get(reads: ReadThrough, object: ObjectInfo, index: int = 0, *, suspect: bool = False) -> StoredChunk:
    """Once no flight of before can be joined any more: who waited for one may go on before it is forgotten."""
    until = time.monotonic() + 60
    while reads._flights:
        assert time.monotonic() < until
        time.sleep(0.001)
    answer = reads.get("data", object, index, deadline=soon(), suspect=suspect)
    return answer.result(30) if isinstance(answer, Future) else answer


def fill_up(store: Store) -> None:
    """Fills the store with data that may not go."""
    store.keep("kept", True)
    with pytest.raises(Exception, match="is full"):
        for number in range(1000):
            store.put("kept", ChunkId(ObjectId("s3", f"kept-{number}", "v"), 0), 4 * MIB, bytes(4 * MIB))


def damage(store: Store, tmp_path: Path) -> None:
    """Flips the bits of every byte of payload in the store's segments that a test put there."""
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and content(ByteRange(0, 1000)) in (data := path.read_bytes()):
            at = data.index(content(ByteRange(0, 1000)))
            with path.open("r+b") as file:
                file.seek(at)
                file.write(b"\xff" * 10)


def test_fills_once_and_serves_from_the_store(
    reads: ReadThrough, source: ScriptedUnderStore, store: Store
) -> None:
    object = object_of(2 * CHUNK_BYTES + 5)
    for _ in range(2):
        for index, length in enumerate((CHUNK_BYTES, CHUNK_BYTES, 5)):
            chunk = get(reads, object, index)
            start = index * CHUNK_BYTES
            assert chunk.payload.to_pybytes() == content(ByteRange(start, start + length))
            assert chunk.object_size == object.size
            assert chunk.is_intact()
    assert [found for _, found in source.reads] == [
        ByteRange(0, CHUNK_BYTES),
        ByteRange(CHUNK_BYTES, 2 * CHUNK_BYTES),
        ByteRange(2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 5),
    ]
    assert [usage.name for usage in store.namespaces()] == ["data"]


def test_a_resident_chunk_is_there_at_once(reads: ReadThrough) -> None:
    get(reads, object_of(10))
    assert isinstance(reads.get("data", object_of(10), 0, deadline=soon()), StoredChunk)


def test_many_at_once_are_like_one_by_one(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    cold = object_of(CHUNK_BYTES + 5)
    sample = ObjectInfo(ObjectId("samples", "set/0", "0"), -1)
    get(reads, cold, 1)
    wanted = [(cold, 1), (cold, 0), (sample, 0), (cold, 0)]
    resident, flight, error, same_flight = reads.get_many("data", wanted, deadline=soon())
    assert isinstance(resident, StoredChunk)
    assert isinstance(flight, Future)
    assert same_flight is flight
    assert flight.result(30).payload.size == CHUNK_BYTES
    assert isinstance(error, NotResident)
    assert len(source.reads) == 2
    (only,) = reads.get_many("data", [(object_of(7, "other"), 0)], deadline=soon(), resident_only=True)
    assert isinstance(only, NotResident)


def test_an_empty_object_has_one_empty_chunk(reads: ReadThrough) -> None:
    for _ in range(2):
        assert get(reads, object_of(0)).payload.size == 0


def test_a_stampede_makes_one_fetch(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    """64 readers of one cold object."""
    together = Barrier(64)
    source.answer.clear()

    def read(_: int) -> bytes:
        together.wait(60)
        answer = reads.get("data", object_of(1000), 0, deadline=soon())
        source.answer.set()
        return (answer.result(30) if isinstance(answer, Future) else answer).payload.to_pybytes()

    with ThreadPoolExecutor(64) as threads:
        assert set(threads.map(read, range(64))) == {content(ByteRange(0, 1000))}
    assert len(source.reads) == 1


def test_many_stampedes_make_one_fetch_each(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    """Without anything held back: the readers meet flights that are about to land, or have just."""
    together = Barrier(8)

    def read(_: int) -> None:
        for number in range(100):
            together.wait(60)
            answer = reads.get("data", object_of(10, f"key-{number}"), 0, deadline=soon())
            if isinstance(answer, Future):
                answer.result(30)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, range(8)))
    assert sorted(key for key, _ in source.reads) == sorted(f"key-{number}" for number in range(100))


def test_all_who_wait_get_the_error_and_the_next_tries_again(
    reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    source.answer.clear()
    source.error = ObjectChanged("it changed")
    futures = [reads.get("data", object_of(10), 0, deadline=soon()) for _ in range(3)]
    source.answer.set()
    for future in futures:
        assert isinstance(future, Future)
        with pytest.raises(ObjectChanged, match="it changed"):
            future.result(30)
    assert len(source.reads) == 1
    source.error = None
    assert get(reads, object_of(10)).payload.to_pybytes() == content(ByteRange(0, 10))


def test_an_impatient_first_reader_does_not_spoil_it_for_the_others(
    reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    source.answer.clear()
    first = reads.get("data", object_of(10), 0, deadline=time.monotonic() + 5)
    source.wait_for_reads(1)
    assert source.deadlines[0] > time.monotonic() + 10
    assert reads.get("data", object_of(10), 0, deadline=soon()) is first


def test_versions_are_kept_apart(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    get(reads, object_of(10))
    get(reads, ObjectInfo(ObjectId("s3", "key", "v2"), 10))
    assert len(source.reads) == 2


def test_a_full_store_passes_through(reads: ReadThrough, source: ScriptedUnderStore, store: Store) -> None:
    """F10."""
    fill_up(store)
    object = object_of(4 * MIB)
    for expected in (1, 2):
        chunk = get(reads, object)
        assert chunk.payload.to_pybytes() == content(ByteRange(0, 4 * MIB))
        assert chunk.is_intact()
        assert reads.passed_through == expected
    assert len(source.reads) == 2


def test_what_passes_through_is_bounded_by_its_readers(
    store: Store, source: ScriptedUnderStore, request: pytest.FixtureRequest
) -> None:
    """F35: the third fill waits for the memory of the first, which comes back with its last reader, uncollected."""
    fill_up(store)
    gc.disable()
    request.addfinalizer(gc.enable)
    reads = ReadThrough(store, {"s3": source}, fill_threads=4, inflight_bytes=8 * MIB)  # type: ignore[dict-item]
    request.addfinalizer(reads.close)
    answers = [reads.get("data", object_of(4 * MIB, f"key-{n}"), 0, deadline=soon()) for n in range(3)]
    held = [answers[n].result(30) for n in range(2)]  # type: ignore[union-attr]
    third = answers[2]
    assert isinstance(third, Future)
    assert len(source.reads) == 2
    assert not third.done()
    held.clear()
    answers.clear()
    assert third.result(30).payload.size == 4 * MIB


def test_bytes_under_way_are_bounded(
    store: Store, source: ScriptedUnderStore, request: pytest.FixtureRequest
) -> None:
    reads = ReadThrough(store, {"s3": source}, fill_threads=8, inflight_bytes=2 * MIB)  # type: ignore[dict-item]
    request.addfinalizer(reads.close)
    request.addfinalizer(source.answer.set)
    source.answer.clear()
    answers = [reads.get("data", object_of(MIB, f"key-{n}"), 0, deadline=soon()) for n in range(8)]
    source.wait_for_reads(2)
    source.answer.set()
    for answer in answers:
        assert isinstance(answer, Future)
        answer.result(30)
    assert source.most_under_way == 2


def test_as_many_small_objects_are_under_way_as_fill_a_long_line(
    reads: ReadThrough, source: ScriptedUnderStore
) -> None:
    """More than 200 MB/s and 50 ms ask for, in records of 114,660 B: some wait for the server's own work."""
    line = int(200e6 * 0.05 / 114_660)
    assert 1.4 * line < FILL_THREADS
    source.answer.clear()
    wanted = [(object_of(100, f"key-{n}"), 0) for n in range(2 * FILL_THREADS)]
    answers = reads.get_many("data", wanted, deadline=soon())
    source.wait_for_reads(FILL_THREADS)
    source.answer.set()
    for answer in answers:
        assert isinstance(answer, Future)
        answer.result(30)
    assert source.most_under_way == FILL_THREADS


@pytest.mark.parametrize(
    ("object", "said"),
    [
        (ObjectInfo(ObjectId("samples", "name/3", "0"), -1), "compute it again"),
        (ObjectInfo(ObjectId("s3", "run/__0_0.distcp", "save:1"), 10), "read it from the under-store"),
    ],
)
def test_what_has_nothing_behind_it_is_not_resident(
    reads: ReadThrough, source: ScriptedUnderStore, object: ObjectInfo, said: str
) -> None:
    with pytest.raises(NotResident, match=said):
        get(reads, object)
    assert source.reads == []


def test_a_read_that_is_to_stay_in_the_pool_does(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    with pytest.raises(NotResident, match=r"s3/key@v1 isn't resident.*stage it first"):
        reads.get("data", object_of(10), 0, deadline=soon(), resident_only=True)
    assert source.reads == []
    get(reads, object_of(10))
    found = reads.get("data", object_of(10), 0, deadline=soon(), resident_only=True)
    assert isinstance(found, StoredChunk)


def test_an_unknown_under_store_is_told(reads: ReadThrough) -> None:
    object = ObjectInfo(ObjectId("gcs", "key", "v"), 10)
    with pytest.raises(
        ConfigurationError, match=r"no under-store 'gcs'; it has s3: start it with --under-store gcs=URI"
    ):
        get(reads, object)


def test_an_unknown_size_is_told(reads: ReadThrough) -> None:
    with pytest.raises(ConfigurationError, match="size of s3/key@v1 is needed"):
        get(reads, object_of(-1))


def test_a_suspect_chunk_that_is_good_stays(
    reads: ReadThrough, source: ScriptedUnderStore, store: Store
) -> None:
    get(reads, object_of(1000))
    assert get(reads, object_of(1000), suspect=True).is_intact()
    assert len(source.reads) == 1
    assert store.usage().corrupt == 0


def test_a_suspect_chunk_that_is_bad_is_quarantined_and_filled_again(
    reads: ReadThrough, source: ScriptedUnderStore, store: Store, tmp_path: Path
) -> None:
    """F5."""
    get(reads, object_of(1000))
    damage(store, tmp_path)
    assert not get(reads, object_of(1000)).is_intact()
    chunk = get(reads, object_of(1000), suspect=True)
    assert chunk.is_intact()
    assert chunk.payload.to_pybytes() == content(ByteRange(0, 1000))
    assert len(source.reads) == 2
    assert store.usage().corrupt == 1
    assert get(reads, object_of(1000)).is_intact()


def test_a_suspect_chunk_that_was_never_there_is_filled(reads: ReadThrough) -> None:
    assert get(reads, object_of(1000), suspect=True).is_intact()


def test_a_damaged_sample_is_not_resident_any_more(reads: ReadThrough, store: Store, tmp_path: Path) -> None:
    sample = ObjectInfo(ObjectId("samples", "name/3", "0"), 1000)
    store.put("samples:name@0", ChunkId(sample.id, 0), 1000, content(ByteRange(0, 1000)))
    damage(store, tmp_path)
    with pytest.raises(NotResident, match="compute it again"):
        get(reads, sample, suspect=True)
    assert store.usage().corrupt == 1


def test_a_damaged_file_of_a_save_is_told_and_kept(reads: ReadThrough, store: Store, tmp_path: Path) -> None:
    """I6: it may be the only copy."""
    file = ObjectInfo(ObjectId("s3", "run/__0_0.distcp", "save:1"), 1000)
    store.put("save:s3/run@1", ChunkId(file.id, 0), 1000, content(ByteRange(0, 1000)))
    damage(store, tmp_path)
    with pytest.raises(IntegrityError, match="damaged on this server's disk"):
        get(reads, file, suspect=True)
    assert store.contains(ChunkId(file.id, 0))


def test_nothing_is_filled_after_closing(reads: ReadThrough) -> None:
    reads.close()
    with pytest.raises(ServerUnavailable, match="stopping"):
        get(reads, object_of(10))


def test_when_all_connections_to_storage_break_at_once_each_fetch_has_its_retry() -> None:
    budget = RetryBudget()
    assert all(budget.take() for _ in range(FILL_THREADS))
