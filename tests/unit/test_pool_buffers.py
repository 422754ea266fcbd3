"""Cutting what is written, and the memory that reads land in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.errors import ConfigurationError
from torchcache.lanes.base import Scattered, tell
from torchcache.model import CHUNK_BYTES, ChunkId, Extent, ObjectId, ObjectInfo
from torchcache.pool import buffers
from torchcache.pool.buffers import CALL_BYTES, chunks, flat, targets, write_calls

NEAR_CHUNKS = st.builds(
    lambda count, by: max(0, count * CHUNK_BYTES + by), st.integers(0, 2), st.integers(-2, 2)
)


def sample(key: str) -> ObjectId:
    return ObjectId("samples", key, "0")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(NEAR_CHUNKS, st.integers(0, 100)), max_size=4))
def test_chunks_are_the_concatenation(sizes: list[int]) -> None:
    parts = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    cut = list(chunks([memoryview(part) for part in parts]))
    whole = b"".join(parts)
    assert b"".join(map(bytes, cut)) == whole
    info = ObjectInfo(sample("x"), len(whole))
    assert [c.size for c in cut] == [ChunkId(info.id, i).length(len(whole)) for i in range(info.chunk_count)]


def test_no_chunk_is_copied() -> None:
    large, other = pa.py_buffer(bytes(2 * CHUNK_BYTES + 10)), pa.py_buffer(b"tail")
    first, second, third = chunks([memoryview(large), memoryview(other)])
    assert isinstance(first, pa.Buffer) and isinstance(second, pa.Buffer)
    assert (first.address, second.address) == (large.address, large.address + CHUNK_BYTES)
    assert isinstance(third, Scattered)
    assert [(pa.py_buffer(part).address, len(part)) for part in third.parts] == [
        (large.address + 2 * CHUNK_BYTES, 10),
        (other.address, 4),
    ]


def test_many_small_buffers_become_one() -> None:
    [chunk] = chunks([memoryview(bytes([i])) for i in range(200)])
    assert isinstance(chunk, pa.Buffer)
    assert bytes(chunk) == bytes(range(200))


def test_what_is_copied_is_told_of_first_and_the_rest_by_who_sends_it() -> None:
    told: list[tuple[int, int]] = []
    parts = [memoryview(bytes(CHUNK_BYTES)), *(memoryview(bytes(2)) for _ in range(200))]
    whole, joined = chunks(parts, lambda offset, piece: told.append((offset, len(piece))))
    assert isinstance(joined, pa.Buffer)
    assert told == [(CHUNK_BYTES + 2 * i, 2) for i in range(200)]
    told.clear()
    tell(whole, 0)
    assert told == [(0, CHUNK_BYTES)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=40))
def test_calls_hold_every_chunk_once_and_stay_small(sizes: list[int]) -> None:
    objects = [(sample(str(i)), [bytes(size)]) for i, size in enumerate(sizes)]
    seen: list[tuple[ObjectId, int, int]] = []
    for call in write_calls(objects):
        assert call.rows
        assert sum(data.size for _, _, data in call.rows) <= CALL_BYTES
        assert len(set(call.objects)) == len(call.objects)
        seen += [(call.objects[place].id, index, data.size) for place, index, data in call.rows]
    assert seen == [(sample(str(i)), 0, size) for i, size in enumerate(sizes)]


def test_a_large_object_spans_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "CALL_BYTES", 2 * CHUNK_BYTES)
    size = 5 * CHUNK_BYTES + 1
    calls = list(write_calls([(sample("small"), [b"x"]), (sample("large"), [bytes(size)])]))
    rows = [(call.objects[place], index) for call in calls for place, index, _ in call.rows]
    large = ObjectInfo(sample("large"), size)
    assert rows == [(ObjectInfo(sample("small"), 1), 0), *((large, i) for i in range(6))]
    assert [len(call.rows) for call in calls] == [3, 2, 2], "what is tiny is no call of its own"


def test_a_buffer_of_any_shape_is_its_bytes() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(flat(memoryview(array))) == array.tobytes()
    assert bytes(flat(memoryview(np.empty((0, 3))))) == b""
    with pytest.raises(ConfigurationError, match="contiguous"):
        flat(memoryview(array.T))


def extents(*sizes: int) -> list[Extent]:
    return [Extent(ObjectInfo(sample(str(i)), size)) for i, size in enumerate(sizes)]


def test_buffers_that_do_not_fit_are_refused() -> None:
    good = memoryview(bytearray(8))
    assert targets(extents(8, 4), None) == [None, None]
    assert targets(extents(8, 4), [good, good]) == [good, good]
    with pytest.raises(ConfigurationError, match="1 buffers were given for 2"):
        targets(extents(8, 4), [good])
    with pytest.raises(ConfigurationError, match="9 bytes don't fit the buffer of 8"):
        targets(extents(9), [good])
    with pytest.raises(ConfigurationError, match="read-only"):
        targets(extents(4), [memoryview(b"1234")])
