"""What every lane must do, whatever bytes travel by: subclass `LaneContract` and say how to reach a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from tests.integration.self_describing import content, part
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    NotResident,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.lanes.base import Lane, Outcome, ReadOptions
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, STRIPE_BYTES, Extent, ObjectId, ObjectInfo

NAMESPACE = "samples:lane@1"

SMALL = [0, 1, 12, 13, 63, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 114_660]
LARGE = [
    *(CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES),
    *(STRIPE_BYTES - 1, STRIPE_BYTES, STRIPE_BYTES + 1, STRIPE_BYTES + CHUNK_BYTES + BLOCK_BYTES + 7),
]
SIZES = SMALL + LARGE
"""Around everything that an object may be cut at."""

RANGES_SIZE = STRIPE_BYTES + 2 * CHUNK_BYTES + 100
RANGES = [
    (0, 1),
    (1, 0),
    (5, 100),
    (BLOCK_BYTES - 1, 2),
    (BLOCK_BYTES, BLOCK_BYTES),
    (BLOCK_BYTES + 1, 3 * BLOCK_BYTES),
    (CHUNK_BYTES - 5, 10),
    (CHUNK_BYTES - BLOCK_BYTES, BLOCK_BYTES),
    (CHUNK_BYTES, 3),
    (CHUNK_BYTES, CHUNK_BYTES),
    (100, 2 * CHUNK_BYTES),
    (STRIPE_BYTES - 1, 2),
    (STRIPE_BYTES - 3 * CHUNK_BYTES + 7, 5 * CHUNK_BYTES - 14),
    (STRIPE_BYTES, CHUNK_BYTES + 1),
    (STRIPE_BYTES + 2 * CHUNK_BYTES + 7, -1),
    (RANGES_SIZE - 1, -1),
    (RANGES_SIZE, 0),
    (RANGES_SIZE, -1),
    (0, -1),
]
"""(offset, length) in an object of `RANGES_SIZE` bytes: within and across its blocks, chunks and stripes."""


def sample(key: str, size: int = -1) -> ObjectInfo:
    return ObjectInfo(ObjectId("samples", f"lane/{key}", "1"), size)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def put(lane: Lane, info: ObjectInfo, data: bytes) -> None:
    count = max(1, -(-len(data) // CHUNK_BYTES))
    rows = [(0, i, pa.py_buffer(data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES])) for i in range(count)]
    sized = ObjectInfo(info.id, len(data))
    assert lane.write(NAMESPACE, [sized], rows, durable=False, deadline=soon()) == len(data)


def read(
    lane: Lane,
    extents: Sequence[Extent],
    into: Sequence[memoryview | None] | None = None,
    *,
    options: ReadOptions | None = None,
    seconds: float = 60.0,
) -> list[Outcome]:
    chosen = options or ReadOptions(namespace=NAMESPACE)
    return lane.read(extents, into or [None] * len(extents), chosen, deadline=soon(seconds))


def good(outcome: Outcome) -> memoryview:
    """The bytes of an extent that may not have failed."""
    if isinstance(outcome, TorchCacheError):
        raise outcome
    return outcome


def until_well(again: Callable[[], list[Outcome]]) -> list[Outcome]:
    """What comes once nothing is transient any more: a channel may take its time to connect again."""
    end = soon(120)
    while True:
        outcomes = again()
        if not any(isinstance(outcome, TransientError) for outcome in outcomes):
            return outcomes
        assert time.monotonic() < end, outcomes
        time.sleep(0.02)


def put_sample(lane: Lane, key: str, size: int) -> bytes:
    """Writes bytes that say what they are; the same each time, as what is written again must be."""
    data = content(key, 0, size)
    put(lane, sample(key), data)
    return data


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

    @pytest.mark.parametrize("size", SIZES)
    def test_gives_back_what_was_written(self, lane: Lane, size: int) -> None:
        data = put_sample(lane, f"whole-{size}", size)
        for known in (-1, size):
            view = good(*read(lane, [Extent(sample(f"whole-{size}", known))]))
            assert view.readonly
            assert view == data

    @pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
    def test_reads_ranges(self, lane: Lane, known: bool) -> None:
        """Each by itself, and all in one call."""
        put_sample(lane, "ranges", RANGES_SIZE)
        info = sample("ranges", RANGES_SIZE if known else -1)
        extents = [Extent(info, start, length) for start, length in RANGES]
        alone = [read(lane, [extent])[0] for extent in extents]
        for (start, length), *views in zip(RANGES, alone, read(lane, extents), strict=True):
            end = RANGES_SIZE if length < 0 else start + length
            assert [good(view) for view in views] == [part("ranges", 0, start, end)] * 2, (start, length)

    def test_many_extents_in_one_call_keep_their_order(self, lane: Lane) -> None:
        """Duplicates too."""
        data = {i: put_sample(lane, f"many-{i}", 100 + i * 997) for i in range(50)}
        order = [49 - i // 2 for i in range(100)]
        views = read(lane, [Extent(sample(f"many-{i}")) for i in order])
        assert [good(view) for view in views] == [data[i] for i in order]

    def test_one_object_in_many_extents(self, lane: Lane) -> None:
        data = put_sample(lane, "cut", 2 * CHUNK_BYTES + 5)
        info = sample("cut", len(data))
        cuts = range(0, len(data), 97 * 1024)
        views = read(lane, [Extent(info, at, min(97 * 1024, len(data) - at)) for at in cuts])
        assert b"".join(good(view) for view in views) == data

    def test_fills_the_buffers_given(self, lane: Lane) -> None:
        """What is longer than its bytes stays as it was behind them."""
        sizes = [0, 1, 1000, BLOCK_BYTES + 1, CHUNK_BYTES + 1000]
        data = [put_sample(lane, f"into-{size}", size) for size in sizes]
        for known in (True, False):
            memory = [bytearray(b"\xee" * (size + 500)) for size in sizes]
            extents = [Extent(sample(f"into-{size}", size if known else -1)) for size in sizes]
            views = read(lane, extents, [memoryview(m) for m in memory])
            for view, buffer, right in zip(views, memory, data, strict=True):
                assert good(view) == right
                assert buffer == right + b"\xee" * 500

    def test_fills_buffers_with_ranges(self, lane: Lane) -> None:
        """Parts of one buffer, each longer than its bytes, and ends across blocks and chunks."""
        put_sample(lane, "ranges", RANGES_SIZE)
        info = sample("ranges", RANGES_SIZE)
        spans = [(start, RANGES_SIZE if n < 0 else start + n) for start, n in RANGES]
        memory = bytearray(b"\xee" * sum(end - start + 3 for start, end in spans))
        views, at = [], 0
        for start, end in spans:
            views.append(memoryview(memory)[at : at + end - start + 3])
            at += end - start + 3
        for outcome in read(lane, [Extent(info, a, b - a) for a, b in spans], views):
            good(outcome)
        assert memory == b"".join(part("ranges", 0, a, b) + b"\xee" * 3 for a, b in spans)

    def test_one_missing_object_fails_alone(self, lane: Lane) -> None:
        put(lane, sample("there"), b"here I am")
        memory = memoryview(bytearray(20))
        first, missing, last, into = read(
            lane,
            [
                Extent(sample("there")),
                Extent(sample("absent")),
                Extent(sample("there"), 5),
                Extent(sample("gone")),
            ],
            [None, None, None, memory],
        )
        assert good(first) == b"here I am"
        assert isinstance(missing, NotResident)
        assert "absent" in str(missing)
        assert good(last) == b"I am"
        assert isinstance(into, NotResident)

    @pytest.mark.parametrize(("start", "length"), [(5, 6), (11, 0), (11, -1), (0, 1 << 40), (1 << 40, -1)])
    def test_an_extent_beyond_the_object_is_refused(self, lane: Lane, start: int, length: int) -> None:
        put(lane, sample("short"), b"0123456789")
        outcome, beside = read(lane, [Extent(sample("short"), start, length), Extent(sample("short"))])
        assert isinstance(outcome, ConfigurationError)
        assert good(beside) == b"0123456789"

    @pytest.mark.parametrize("size", [10, CHUNK_BYTES + 10])
    def test_a_buffer_too_short_is_refused(self, lane: Lane, size: int) -> None:
        """And nothing is written behind its end."""
        data = put_sample(lane, f"tight-{size}", size)
        memory = bytearray(b"\xee" * (size + 100))
        tight = memoryview(memory)[: size - 1]
        outcome, beside = read(lane, [Extent(sample(f"tight-{size}"))] * 2, [tight, None])
        assert isinstance(outcome, ConfigurationError)
        assert memory[size - 1 :] == b"\xee" * 101
        assert good(beside) == data

    def test_views_outlive_the_lane(self, lane: Lane) -> None:
        data = put_sample(lane, "outlive", 200_000)
        view = good(*read(lane, [Extent(sample("outlive"))]))
        lane.close()
        assert view == data
        assert good(*read(lane, [Extent(sample("outlive"))])) == data

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
        (outcome,) = read(lane, [Extent(sample("late"))], seconds=-1)
        assert isinstance(outcome, DeadlineExceeded)
        with pytest.raises(DeadlineExceeded):
            lane.write(
                NAMESPACE, [sample("late", 1)], [(0, 0, pa.py_buffer(b"x"))], durable=False, deadline=soon(-1)
            )

    def test_threads_share_a_lane(self, lane: Lane) -> None:
        data = [put_sample(lane, f"thread-{i}", 50_000) for i in range(8)]
        wrong: list[object] = []

        def work(first: int) -> None:
            for turn in range(10):
                i = (first + turn) % 8
                (view,) = read(lane, [Extent(sample(f"thread-{i}"))])
                if isinstance(view, TorchCacheError) or view != data[i]:
                    wrong.append(view)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_what_is_written_again_changes_nothing(self, lane: Lane) -> None:
        data = put_sample(lane, "again", 30_000)
        view = good(*read(lane, [Extent(sample("again"))]))
        put_sample(lane, "again", 30_000)
        assert view == data == good(*read(lane, [Extent(sample("again"))]))

    def test_a_write_of_many_objects_in_one_call(self, lane: Lane) -> None:
        sizes = [i * 3001 for i in range(60)]
        data = [content(f"batch-{i}", 0, size) for i, size in enumerate(sizes)]
        infos = [sample(f"batch-{i}", size) for i, size in enumerate(sizes)]
        rows = [(i, 0, pa.py_buffer(d)) for i, d in enumerate(data)]
        for durable in (False, True):
            assert lane.write(NAMESPACE, infos, rows, durable=durable, deadline=soon()) == sum(sizes)
        assert [good(view) for view in read(lane, [Extent(info) for info in infos])] == data
