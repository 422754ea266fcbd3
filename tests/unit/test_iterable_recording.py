"""Recordings in a pool of memory: what is whole, what isn't, and what of it is gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.sample_pool import SamplePool
from torchcache.data.iterable_position import Split
from torchcache.data.iterable_recording import Part, Recording
from torchcache.errors import IntegrityError, OutOfSpace, ServerUnavailable


def recording(pool: SamplePool) -> Recording:
    return Recording(pool, None, "name", None)  # type: ignore[arg-type]


def record(
    pool: SamplePool, worker: int = 0, workers: int = 2, epoch: int = 0, stop: int | None = None
) -> None:
    part = Part(recording(pool), Split(ranks=1, workers=workers), 0, worker, epoch)
    samples = part.recorded(iter([{"w": worker, "n": n} for n in range(100)]))
    assert sum(1 for _ in zip(samples, range(stop or 1000), strict=False)) == (stop or 100)


def replayed(pool: SamplePool) -> Any:
    found = recording(pool).open()
    return None if found is None else found.reading().fetch(np.arange(found.count))


def test_whole_once_all_parts_of_one_pass_are() -> None:
    pool = SamplePool()
    record(pool, worker=0)
    assert replayed(pool) is None
    record(pool, worker=1, stop=99)  # cut short
    assert replayed(pool) is None
    record(pool, worker=1, epoch=1)  # of another epoch
    assert replayed(pool) is None
    record(pool, worker=0, workers=3)  # of another number of workers
    assert replayed(pool) is None
    record(pool, worker=1)
    assert replayed(pool) == [{"w": w, "n": n} for w in range(2) for n in range(100)]


def test_an_empty_part_is_a_part() -> None:
    pool = SamplePool()
    part = Part(recording(pool), Split(ranks=1, workers=1), 0, 0, 0)
    assert list(part.recorded(iter([]))) == []
    assert replayed(pool) == []


@pytest.mark.parametrize("which", ["/0", "/99"])
def test_what_was_partly_evicted_is_recorded_as_the_next_generation(which: str) -> None:
    pool = SamplePool()
    record(pool, workers=1)
    gone = next(o for o in pool.samples if o.key.endswith(which) and "/recorded/0/" in o.key)
    del pool.samples[gone]
    again = recording(pool)
    assert again.open() is None
    list(Part(again, Split(ranks=1, workers=1), 0, 0, 0).recorded(iter([1, 2])))
    assert replayed(pool) == [1, 2]


@pytest.mark.parametrize("error", [OutOfSpace("full"), ServerUnavailable("away")])
def test_a_pool_that_takes_nothing_stops_no_training(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool = SamplePool()
    pool.write_error = error
    record(pool, workers=1)
    assert caplog.text.count("is not recorded in this pass") == 1
    pool.write_error = None
    assert replayed(pool) is None


def test_lists_that_are_damaged() -> None:
    pool = SamplePool()
    made = recording(pool)
    made.put([("whole", memoryview(b"nonsense of no format at all"))])
    with pytest.raises(IntegrityError):
        made.found()
