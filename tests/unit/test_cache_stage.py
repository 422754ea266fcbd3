from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.cache.stage import resident_bytes, stage
from torchcache_server.store import Store

from tests.unit.scripted_under_store import ScriptedUnderStore, object_of
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    NotResident,
    ObjectChanged,
    OutOfSpace,
)
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId, ObjectInfo

MIB = 1024 * 1024
FILL_THREADS = 16


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
    sources: Any = {"s3": source}  # any, for it has only what is asked of it here
    read_through = ReadThrough(store, sources, fill_threads=FILL_THREADS)
    yield read_through
    source.answer.set()
    read_through.close()


def soon() -> float:
    return time.monotonic() + 60


def test_makes_objects_resident(reads: ReadThrough, source: ScriptedUnderStore, store: Store) -> None:
    objects = [object_of(10, "a"), object_of(2 * CHUNK_BYTES + 1, "b"), object_of(0, "c")]
    assert resident_bytes(store, objects) == [0, 0, 0]
    assert stage(reads, "data", objects, deadline=soon()) == [None] * 3
    assert resident_bytes(store, objects) == [object.size for object in objects]
    assert len(source.reads) == 5


def test_fetches_only_what_is_missing(reads: ReadThrough, source: ScriptedUnderStore, store: Store) -> None:
    object = object_of(CHUNK_BYTES + 7)
    store.put("data", ChunkId(object.id, 0), object.size, bytes(CHUNK_BYTES))
    assert resident_bytes(store, [object]) == [CHUNK_BYTES]
    assert stage(reads, "data", [object], deadline=soon()) == [None]
    assert stage(reads, "data", [object], deadline=soon()) == [None]
    assert len(source.reads) == 1


def test_stages_more_than_it_has_under_way_at_a_time(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    objects = [object_of(10, f"key-{number}") for number in range(200)]
    assert stage(reads, "data", objects, deadline=soon()) == [None] * 200
    assert len(source.reads) == 200


def test_one_failure_stops_no_other(reads: ReadThrough) -> None:
    objects = [
        object_of(10, "a"),
        ObjectInfo(ObjectId("gcs", "b", "v"), 2 * CHUNK_BYTES),
        ObjectInfo(ObjectId("samples", "c", "v"), 10),
        object_of(10, "d"),
    ]
    first, unknown, sample, last = stage(reads, "data", objects, deadline=soon())
    assert (first, last) == (None, None)
    assert isinstance(unknown, ConfigurationError)
    assert isinstance(sample, NotResident)


def test_says_why_an_object_is_not_there(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    source.error = ObjectChanged("it changed")
    (error,) = stage(reads, "data", [object_of(3 * CHUNK_BYTES)], deadline=soon())
    assert isinstance(error, ObjectChanged)


def test_says_that_there_was_no_room(reads: ReadThrough, store: Store) -> None:
    store.keep("kept", True)
    with pytest.raises(OutOfSpace):
        for number in range(1000):
            store.put("kept", ChunkId(ObjectId("s3", f"kept-{number}", "v"), 0), 4 * MIB, bytes(4 * MIB))
    (error,) = stage(reads, "data", [object_of(4 * MIB)], deadline=soon())
    assert isinstance(error, OutOfSpace)
    assert "raise its capacity" in error.message


def test_ends_by_its_deadline(reads: ReadThrough, source: ScriptedUnderStore) -> None:
    source.answer.clear()
    # While all threads wait, none takes what is too late by then, and says so before who waits for it.
    for number in range(FILL_THREADS):
        reads.get("data", object_of(10, f"held-{number}"), 0, deadline=soon())
    source.wait_for_reads(FILL_THREADS)
    objects = [object_of(10, f"key-{number}") for number in range(100)]
    errors = stage(reads, "data", objects, deadline=time.monotonic() + 0.05)
    assert {type(error) for error in errors} == {DeadlineExceeded}
