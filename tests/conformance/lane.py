"""What every lane must do, whatever bytes travel by: subclass `LaneContract` and say how to reach a server."""

from __future__ import annotations

import os
import random
import threading
import time

import pyarrow as pa
import pytest

from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    NotResident,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.lanes.base import Lane, Outcome, ReadOptions
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, Extent, ObjectId, ObjectInfo

NAMESPACE = "samples:lane@1"


def sample(key: str, size: int = -1) -> ObjectInfo:
    return ObjectInfo(ObjectId("samples", f"lane/{key}", "1"), size)


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def put(lane: Lane, info: ObjectInfo, data: bytes) -> None:
    count = max(1, -(-len(data) // CHUNK_BYTES))
    rows = [(0, i, pa.py_buffer(data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES])) for i in range(count)]
    sized = ObjectInfo(info.id, len(data))
    assert lane.write(NAMESPACE, [sized], rows, durable=False, deadline=soon()) == len(data)


def read(lane: Lane, extents: list[Extent], into: list[memoryview | None] | None = None) -> list[Outcome]:
    options = ReadOptions(namespace=NAMESPACE)
    return lane.read(extents, into or [None] * len(extents), options, deadline=soon())


class LaneContract:
    """The contract of `Lane`. The server behind it keeps what is written."""

    @pytest.fixture
    def lane(self) -> Lane:
        raise NotImplementedError

    @pytest.fixture
    def deaf(self) -> Lane:
        """A lane to a server that is not there."""
        raise NotImplementedError

    @pytest.fixture
    def stranger(self) -> Lane:
        """A lane to the same server, with a wrong token."""
        raise NotImplementedError

    def test_has_a_name(self, lane: Lane) -> None:
        assert lane.name

    @pytest.mark.parametrize(
        "size", [0, 1, 12, 13, BLOCK_BYTES, BLOCK_BYTES + 1, 114_660, CHUNK_BYTES, CHUNK_BYTES + 1]
    )
    def test_gives_back_what_was_written(self, lane: Lane, size: int) -> None:
        data = os.urandom(size)
        put(lane, sample(f"whole-{size}"), data)
        for known in (-1, size):
            (view,) = read(lane, [Extent(sample(f"whole-{size}", known))])
            assert isinstance(view, memoryview)
            assert view.readonly
            assert bytes(view) == data

    @pytest.mark.parametrize(
        ("start", "length"),
        [
            (0, 1),
            (1, 0),
            (BLOCK_BYTES - 1, 2),
            (CHUNK_BYTES - 5, 10),
            (CHUNK_BYTES, 3),
            (2 * CHUNK_BYTES + 7, -1),
            (2 * CHUNK_BYTES + 100, 0),
            (2 * CHUNK_BYTES + 100, -1),
            (100, 2 * CHUNK_BYTES),
        ],
    )
    def test_reads_ranges(self, lane: Lane, start: int, length: int) -> None:
        data = random.Random(7).randbytes(2 * CHUNK_BYTES + 100)  # what is written again must be the same
        put(lane, sample("ranges"), data)
        expected = data[start:] if length < 0 else data[start : start + length]
        for known in (-1, len(data)):
            (view,) = read(lane, [Extent(sample("ranges", known), start, length)])
            assert isinstance(view, memoryview)
            assert bytes(view) == expected

    def test_many_extents_in_one_call_keep_their_order(self, lane: Lane) -> None:
        data = {i: os.urandom(100 + i * 997) for i in range(50)}
        for i, content in data.items():
            put(lane, sample(f"many-{i}"), content)
        order = [49 - i // 2 for i in range(100)]
        views = read(lane, [Extent(sample(f"many-{i}")) for i in order])
        assert [bytes(view) for view in views if isinstance(view, memoryview)] == [data[i] for i in order]

    def test_fills_the_buffers_given(self, lane: Lane) -> None:
        small, large = os.urandom(1000), os.urandom(CHUNK_BYTES + 1000)
        put(lane, sample("into-small"), small)
        put(lane, sample("into-large"), large)
        memory = [bytearray(1500), bytearray(len(large))]
        views = read(
            lane,
            [Extent(sample("into-small")), Extent(sample("into-large", len(large)))],
            [memoryview(m) for m in memory],
        )
        assert [len(view) for view in views if isinstance(view, memoryview)] == [1000, len(large)]
        assert memory[0][:1000] == small
        assert memory[0][1000:] == bytes(500)
        assert memory[1] == large

    def test_one_missing_object_fails_alone(self, lane: Lane) -> None:
        put(lane, sample("there"), b"here I am")
        outcomes = read(lane, [Extent(sample("there")), Extent(sample("absent")), Extent(sample("there"), 5)])
        assert bytes(outcomes[0]) == b"here I am"  # type: ignore[arg-type]
        assert isinstance(outcomes[1], NotResident)
        assert bytes(outcomes[2]) == b"I am"  # type: ignore[arg-type]

    def test_an_extent_beyond_the_object_is_refused(self, lane: Lane) -> None:
        put(lane, sample("short"), b"0123456789")
        (outcome,) = read(lane, [Extent(sample("short"), 5, 6)])
        assert isinstance(outcome, ConfigurationError)

    def test_a_buffer_too_short_is_refused(self, lane: Lane) -> None:
        put(lane, sample("tight"), b"0123456789")
        (outcome,) = read(lane, [Extent(sample("tight"))], [memoryview(bytearray(9))])
        assert isinstance(outcome, ConfigurationError)

    def test_views_outlive_the_lane(self, lane: Lane) -> None:
        data = os.urandom(200_000)
        put(lane, sample("outlive"), data)
        (view,) = read(lane, [Extent(sample("outlive"))])
        lane.close()
        assert bytes(view) == data  # type: ignore[arg-type]
        (again,) = read(lane, [Extent(sample("outlive"))])
        assert bytes(again) == data  # type: ignore[arg-type]

    def test_a_server_that_is_not_there(self, deaf: Lane) -> None:
        outcomes = read(deaf, [Extent(sample("a")), Extent(sample("b"))])
        assert [type(outcome) for outcome in outcomes] == [ServerUnavailable, ServerUnavailable]
        with pytest.raises(ServerUnavailable):
            put(deaf, sample("a"), b"x")

    def test_a_wrong_token_is_refused(self, stranger: Lane) -> None:
        (outcome,) = read(stranger, [Extent(sample("a"))])
        assert isinstance(outcome, ConfigurationError)
        assert "token" in str(outcome)
        with pytest.raises(ConfigurationError, match="token"):
            put(stranger, sample("a"), b"x")

    def test_a_deadline_that_has_passed(self, lane: Lane) -> None:
        (outcome,) = lane.read([Extent(sample("late"))], [None], ReadOptions(), deadline=time.monotonic() - 1)
        assert isinstance(outcome, DeadlineExceeded)

    def test_threads_share_a_lane(self, lane: Lane) -> None:
        data = [os.urandom(50_000) for _ in range(8)]
        for i, content in enumerate(data):
            put(lane, sample(f"thread-{i}"), content)
        wrong: list[object] = []

        def work(first: int) -> None:
            for turn in range(10):
                i = (first + turn) % 8
                (view,) = read(lane, [Extent(sample(f"thread-{i}"))])
                if isinstance(view, TorchCacheError) or bytes(view) != data[i]:
                    wrong.append(view)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
