"""One read, from its plan to its batches."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcache_server.service import reading
from torchcache_server.service.reading import Read, cut
from torchcache_server.service.requests import ReadPlan
from torchcache_server.store import StoredChunk

from tests.unit.service_parts import MemoryStore, ScriptedReadThrough, content, file_object
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    TorchCacheError,
)
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, SAMPLES, ChunkId, ObjectId, ObjectInfo
from torchcache.wire.codec import BATCH_BYTES, BATCH_ROWS, Piece, decode_pieces
from torchcache.wire.status import decode_error

Wanted = tuple[ObjectInfo, int, int]


def plan(extents: Sequence[Wanted], **changed: Any) -> ReadPlan:
    fields: dict[str, Any] = {
        "namespace": "n",
        "objects": [e[0] for e in extents],
        "object": list(range(len(extents))),
        "start": [e[1] for e in extents],
        "end": [e[2] for e in extents],
        "resident_only": False,
        "suspect": False,
        "timeout_s": 60.0,
    }
    return ReadPlan(**(fields | changed))


class Client:
    """Puts pieces together the way a client does, checking what the codec promises."""

    def __init__(self, extents: Sequence[Wanted]) -> None:
        self.extents = extents
        self.pieces: list[Piece] = []
        self.batches: list[pa.RecordBatch] = []

    def take(self, batches: Iterator[pa.RecordBatch]) -> Client:
        for batch in batches:
            self.batches.append(batch)
            self.pieces += decode_pieces(batch)
        return self

    def result(self, extent: int) -> bytes | TorchCacheError:
        _, start, end = self.extents[extent]
        out = bytearray()
        at = None
        for piece in self.pieces:
            if piece.extent != extent:
                continue
            if piece.error is not None:
                return decode_error(piece.error)
            piece.verify()
            assert piece.offset % BLOCK_BYTES == 0
            assert at is None or piece.offset == at, "pieces of an extent come in order and without gaps"
            at = piece.offset + piece.data.size
            end = piece.object_size if end < 0 else end
            low, high = max(start - piece.offset, 0), max(end - piece.offset, 0)
            out += memoryview(piece.data)[low:high]
        assert at is not None, "every extent has at least one row"
        return bytes(out)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def source(store: MemoryStore) -> ScriptedReadThrough:
    return ScriptedReadThrough(store)


def read(source: ScriptedReadThrough, extents: Sequence[Wanted], **changed: Any) -> Client:
    return Client(extents).take(Read(plan(extents, **changed), source).batches())  # type: ignore[arg-type]


def held(store: MemoryStore, key: str, size: int) -> tuple[ObjectInfo, bytes]:
    info, data = file_object(key, size), content(size, len(key))
    store.add(info, data)
    return info, data


@pytest.mark.parametrize(
    ("size", "start", "end"),
    [
        (100, 0, 100),
        (100, 10, 20),
        (100, 100, 100),
        (100, 50, 50),
        (0, 0, 0),
        (BLOCK_BYTES * 3 + 5, BLOCK_BYTES, BLOCK_BYTES * 2),
        (BLOCK_BYTES * 3 + 5, BLOCK_BYTES - 1, BLOCK_BYTES * 2 + 1),
        (CHUNK_BYTES, 0, CHUNK_BYTES),
        (CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES),
        (CHUNK_BYTES * 2 + 77, CHUNK_BYTES - 10, CHUNK_BYTES + 10),
        (CHUNK_BYTES * 2 + 77, 5, CHUNK_BYTES * 2 + 70),
    ],
)
def test_ranges(store: MemoryStore, source: ScriptedReadThrough, size: int, start: int, end: int) -> None:
    info, data = held(store, "k", size)
    assert read(source, [(info, start, end)]).result(0) == data[start:end]


def test_a_whole_chunk_carries_one_checksum_and_a_part_those_of_its_blocks(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    info, _ = held(store, "k", CHUNK_BYTES + BLOCK_BYTES * 3)
    whole, part = read(source, [(info, 0, CHUNK_BYTES + BLOCK_BYTES + 1)]).pieces
    assert (whole.whole, len(whole.digests), whole.offset) == (True, 8, 0)
    assert (part.whole, len(part.digests), part.offset) == (False, 16, CHUNK_BYTES)
    assert part.data.size == 2 * BLOCK_BYTES


def test_an_empty_object_is_one_whole_empty_piece(store: MemoryStore, source: ScriptedReadThrough) -> None:
    info, _ = held(store, "k", 0)
    (piece,) = read(source, [(info, 0, 0)]).pieces
    piece.verify()
    assert (piece.whole, piece.data.size, piece.object_size) == (True, 0, 0)


def test_pieces_are_views_of_the_stored_bytes(store: MemoryStore) -> None:
    info, _ = held(store, "k", BLOCK_BYTES * 4)
    chunk = store.chunks[ChunkId(info.id, 0)]
    piece = cut(0, chunk, 0, BLOCK_BYTES, BLOCK_BYTES * 2)
    assert piece.data.address == chunk.payload.address + BLOCK_BYTES


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_extents_of_any_objects_come_back(data: st.DataObject) -> None:
    store = MemoryStore()
    sizes = data.draw(st.lists(st.integers(0, 3 * BLOCK_BYTES + 9), min_size=1, max_size=4))
    objects = [held(store, "k" * (i + 1), size) for i, size in enumerate(sizes)]
    extents: list[Wanted] = []
    wanted: list[bytes] = []
    for _ in range(data.draw(st.integers(0, 8))):
        info, body = data.draw(st.sampled_from(objects))
        start = data.draw(st.integers(0, info.size))
        end = data.draw(st.integers(start, info.size))
        extents.append((info, start, end))
        wanted.append(body[start:end])
    client = read(ScriptedReadThrough(store), extents)
    assert [client.result(i) for i in range(len(extents))] == wanted


def test_a_sample_tells_its_size_itself(store: MemoryStore, source: ScriptedReadThrough) -> None:
    data = content(CHUNK_BYTES + 9)
    sample = ObjectInfo(ObjectId(SAMPLES, "set/1", "0"), -1)
    store.add(sample, data)
    client = read(
        source, [(sample, 0, -1), (sample, CHUNK_BYTES, -1), (sample, 3, 8), (sample, len(data) + 1, -1)]
    )
    assert client.result(0) == data
    assert client.result(1) == data[CHUNK_BYTES:]
    assert client.result(2) == data[3:8]
    assert isinstance(client.result(3), ConfigurationError)
    assert source.asked.count(ChunkId(sample.id, 0)) == 4


def test_a_sample_that_is_not_held_fails_alone(store: MemoryStore, source: ScriptedReadThrough) -> None:
    info, data = held(store, "k", 10)
    client = read(source, [(ObjectInfo(ObjectId(SAMPLES, "set/1", "0"), -1), 0, -1), (info, 0, 10)])
    assert isinstance(client.result(0), NotResident)
    assert client.result(1) == data


def test_arguments_reach_the_cache(source: ScriptedReadThrough) -> None:
    info = file_object("k", 10)
    client = read(source, [(info, 0, 10)], namespace="mine", resident_only=True, suspect=True)
    assert isinstance(client.result(0), NotResident)
    assert source.arguments == {("mine", True, True): 1}


def test_all_fills_start_before_the_first_batch_and_what_is_held_goes_first(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    cold = [file_object(f"cold-{i}", 100) for i in range(5)]
    warm, data = held(store, "warm", 50)
    extents = [(c, 0, 100) for c in cold] + [(warm, 0, 50)]
    client = Client(extents)
    batches = Read(plan(extents), source).batches()  # type: ignore[arg-type]
    client.take(iter([next(batches)]))
    assert len(source.fills) == 5
    assert client.result(5) == data
    for i, info in enumerate(cold):
        source.fill(info, 0, content(100, i))
    client.take(batches)
    assert [client.result(i) for i in range(5)] == [content(100, i) for i in range(5)]


def test_chunks_of_one_extent_stay_in_order_when_the_first_is_the_last_to_come(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    info, data = held(store, "k", 2 * CHUNK_BYTES + 5)
    del store.chunks[ChunkId(info.id, 0)]
    filler = threading.Thread(target=source.fill, args=(info, 0, data))
    filler.start()
    assert read(source, [(info, 0, info.size)]).result(0) == data
    filler.join()


def test_fills_ahead_are_bounded(source: ScriptedReadThrough, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", 30)
    objects = [file_object(f"k{i}", 10) for i in range(10)]
    extents = [(o, 0, 10) for o in objects]
    client = Client(extents)
    most = 0
    batches = Read(plan(extents), source).batches()  # type: ignore[arg-type]
    worker = threading.Thread(target=client.take, args=(batches,))
    worker.start()
    for i, info in enumerate(objects):
        source.fill(info, 0, content(10, i))
        most = max(most, len(source.fills) - i)
    worker.join(60)
    assert [client.result(i) for i in range(10)] == [content(10, i) for i in range(10)]
    assert 1 <= most <= 4


def test_look_ups_ahead_are_bounded(store: MemoryStore, source: ScriptedReadThrough) -> None:
    info, _ = held(store, "k", 10)
    extents = [(info, 0, 10)] * 5000
    batches = Read(plan(extents), source).batches()  # type: ignore[arg-type]
    next(batches)
    assert len(source.asked) <= reading.AHEAD_CHUNKS
    assert sum(b.num_rows for b in batches) == 5000 - BATCH_ROWS


def test_batches_are_closed_by_what_fills_them_and_by_the_end_of_a_round(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    info, _ = held(store, "k", 1_000_000)
    client = read(source, [(info, 0, info.size)] * 10)
    assert [b.num_rows for b in client.batches] == [3, 3, 2, 2]
    assert all(sum(p.data.size for p in decode_pieces(b)) < BATCH_BYTES + CHUNK_BYTES for b in client.batches)


@pytest.mark.parametrize("error", [ObjectNotFound("gone", object="s3://b/k"), ObjectChanged("other version")])
def test_a_fill_that_fails_fails_its_extent_alone(
    store: MemoryStore, source: ScriptedReadThrough, error: TorchCacheError
) -> None:
    warm, data = held(store, "warm", 50)
    cold = file_object("cold", 2 * CHUNK_BYTES)
    extents = [(cold, 0, cold.size), (warm, 0, 50), (cold, 0, 10)]
    client = Client(extents)
    worker = threading.Thread(target=client.take, args=(Read(plan(extents), source).batches(),))  # type: ignore[arg-type]
    worker.start()
    source.fill(cold, 0, error)
    source.fill(cold, 1, content(2 * CHUNK_BYTES))
    worker.join(60)
    got = client.result(0)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert client.result(1) == data
    assert sum(p.error is not None for p in client.pieces) == 2, "an extent that fails has one row"


def test_a_chunk_that_is_refused_fails_its_extent(store: MemoryStore, source: ScriptedReadThrough) -> None:
    info, _ = held(store, "k", 3 * CHUNK_BYTES)
    source.refused[ChunkId(info.id, 1)] = ObjectChanged("other")
    client = read(source, [(info, 0, info.size)])
    assert isinstance(client.result(0), ObjectChanged)
    assert client.pieces[-1].error is not None, "nothing of the extent follows its error"


def test_what_nobody_expected_is_an_error_without_its_text(
    source: ScriptedReadThrough, caplog: pytest.LogCaptureFixture
) -> None:
    info = file_object("k", 10)
    source.refused[ChunkId(info.id, 0)] = RuntimeError("secret detail")
    got = read(source, [(info, 0, 10)]).result(0)
    assert type(got) is TorchCacheError
    assert "secret detail" not in str(got)
    assert "secret detail" in caplog.text


def test_a_fill_that_does_not_come_fails_by_the_deadline(source: ScriptedReadThrough) -> None:
    client = read(source, [(file_object("a", 10), 0, 10), (file_object("b", 10), 0, 10)], timeout_s=0.05)
    assert isinstance(client.result(0), DeadlineExceeded)
    assert isinstance(client.result(1), DeadlineExceeded)


def test_another_size_than_the_readers_is_another_object(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    info, data = held(store, "k", 100)
    store.chunks[ChunkId(info.id, 0)] = StoredChunk.of(data, 200)
    assert isinstance(read(source, [(info, 0, 100)]).result(0), ObjectChanged)


def test_what_is_held_goes_out_while_the_rest_is_not_yet_looked_up(
    store: MemoryStore, source: ScriptedReadThrough
) -> None:
    info, _ = held(store, "k", 1_000_000)
    batches = Read(plan([(info, 0, info.size)] * 12), source).batches()  # type: ignore[arg-type]
    assert next(batches).num_rows == 3
    assert len(source.asked) == 3
    assert sum(b.num_rows for b in batches) == 9


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_disk_is_asked_for_little_at_a_time(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(reading, "SLOW_S", -1.0 if slow else 1000.0)
    store = MemoryStore()
    source = ScriptedReadThrough(store)
    infos = [file_object(f"k{i}", BATCH_BYTES // 8) for i in range(200)]
    for info in infos:
        store.add(info, content(info.size))
    looked_up = [0]
    for _ in Read(plan([(info, 0, info.size) for info in infos]), source).batches():  # type: ignore[arg-type]
        looked_up.append(len(source.asked))
    most = max(after - before for before, after in itertools.pairwise(looked_up))
    assert looked_up[-1] == len(infos)
    assert most == 8 if slow else most >= 64
