"""CachedDataset.from_files(record_bytes=): records of a fixed size within files."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset
from torchcache.data.samples import windows
from torchcache.errors import ConfigurationError, ObjectNotFound

__all__ = ["pool"]

URI = "s3://bucket/data"
SIZE = 7


def fill(pool: SamplePool, counts: list[int]) -> list[bytes]:
    """Files of so many records; returns the records."""
    pool.objects.clear()
    pool.resident.clear()
    files = [random.Random(i).randbytes(SIZE * count) for i, count in enumerate(counts)]
    for i, file in enumerate(files):
        pool.put(f"{URI}/{i:03d}.bin", file)
    whole = b"".join(files)
    return [whole[at : at + SIZE] for at in range(0, len(whole), SIZE)]


def from_files(pool: SamplePool, **arguments: Any) -> CachedDataset:
    return CachedDataset.from_files(URI, record_bytes=SIZE, pool=pool, **arguments)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_records_are_the_files_cut(pool: SamplePool, counts: list[int], chance: random.Random) -> None:
    records = fill(pool, counts)
    dataset = from_files(pool)
    assert len(dataset) == len(records)
    indices = [chance.randrange(len(records)) for _ in range(20)] if records else []
    assert dataset.__getitems__(indices) == [records[i] for i in indices]
    assert dataset.keys() == [f"{i:03d}.bin" for i, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("output", ["view", "numpy", "tensor"])
def test_a_batch_is_one_request(pool: SamplePool, output: str) -> None:
    records = fill(pool, [3, 0, 4])
    dataset = pickle.loads(pickle.dumps(from_files(pool, output=output)._samples))
    got = dataset.read([6, 0, 2, 3, 3])
    assert [bytes(sample) for sample in got] == [records[i] for i in (6, 0, 2, 3, 3)]


@pytest.mark.parametrize("output", ["numpy", "tensor"])
def test_records_that_follow_one_another_are_read_as_one(
    pool: SamplePool, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = fill(pool, [3, 0, 4, 2])
    dataset = from_files(pool, output=output)
    asked: list[list[tuple[str, int, int]]] = []
    read_each = pool.read_each

    def noted(extents: Any, **options: Any) -> Any:
        asked.append([(object.id.key[-7:], offset, length) for object, offset, length in extents])
        return read_each(extents, **options)

    monkeypatch.setattr(pool, "read_each", noted)
    order = [1, 2, 3, 4, 5, 4, 8, 7, 8]
    assert [bytes(memoryview(sample)) for sample in map(_array, dataset.__getitems__(order))] == [
        records[i] for i in order
    ]
    assert asked == [
        [
            ("000.bin", SIZE, 2 * SIZE),
            ("002.bin", 0, 3 * SIZE),
            ("002.bin", SIZE, SIZE),
            ("003.bin", SIZE, SIZE),
            ("003.bin", 0, 2 * SIZE),
        ]
    ]


def _array(sample: Any) -> Any:
    return sample if isinstance(sample, np.ndarray) else sample.numpy()


def test_a_torn_file_is_refused_by_name(pool: SamplePool) -> None:
    fill(pool, [3, 2])
    pool.put(f"{URI}/002.bin", bytes(3 * SIZE + 1))
    with pytest.raises(
        ConfigurationError, match=r"data/002.bin has 22 bytes, which is no whole number of records of 7"
    ):
        from_files(pool)
    assert len(from_files(pool, pattern="00[01].bin")) == 5


@pytest.mark.parametrize("size", [0, -7, 1.5, "7"])
def test_a_bad_size_is_refused(pool: SamplePool, size: Any) -> None:
    fill(pool, [1])
    with pytest.raises(ConfigurationError, match="record_bytes="):
        CachedDataset.from_files(URI, record_bytes=size, pool=pool)  # type: ignore[arg-type]


def test_staging_counts_records_and_fetches_each_file_once(pool: SamplePool) -> None:
    records = fill(pool, [3, 5, 2])
    dataset = from_files(pool)
    seen: list[tuple[int, int]] = []
    order = [9, 4, 0, 5, 8]
    dataset._samples.stage(order, on_progress=lambda n, size: seen.append((n, size)), cancelled=lambda: False)
    assert sum(n for n, _ in seen) == len(order)
    assert sum(size for _, size in seen) == SIZE * len(records)
    assert dataset.residency().fraction == 1.0
    assert [*windows(order)] == [order]


def test_a_position_over_records_of_another_size_is_refused(pool: SamplePool) -> None:
    fill(pool, [2])
    state = from_files(pool).state_dict()
    with pytest.raises(ConfigurationError, match="record_bytes was 7, is 14"):
        CachedDataset.from_files(URI, record_bytes=14, pool=pool).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="count was 2, is 1"):
        CachedDataset.from_files(URI, pool=pool).load_state_dict(state)  # type: ignore[arg-type]


def test_a_file_that_went_says_so(pool: SamplePool) -> None:
    fill(pool, [2, 2])
    dataset = from_files(pool)
    pool.delete(f"{URI}/001.bin")
    with pytest.raises(ObjectNotFound, match=r"data/001.bin is gone since this dataset was created"):
        dataset.__getitems__([0, 3])
    assert repr(dataset).endswith("record_bytes=7: 4 records in 2 objects, 28 bytes)")


def test_what_is_pickled_does_not_grow_with_the_files(pool: SamplePool) -> None:
    """Nor what a worker has for itself: the numbers of first records lie in a file that all map."""
    fill(pool, [1])
    few = len(pickle.dumps(from_files(pool)._samples.__dict__["_firsts"]))
    records = fill(pool, [2] * 300)
    samples = from_files(pool)._samples
    assert len(pickle.dumps(samples.__dict__["_firsts"])) == few
    assert pickle.loads(pickle.dumps(samples)).read([599, 0]) == [records[599], records[0]]
