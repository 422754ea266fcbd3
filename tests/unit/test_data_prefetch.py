"""Prefetch: the order foreseen is the one the sampler gives, and foreseeing changes nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler, SequentialSampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from tests.unit.sample_pool import SamplePool, pool
from torchcache.data import CachedDataset, foretelling
from torchcache.data.foretelling import Foreteller, OrderedPrefetch, ordered
from torchcache.data.prefetch import ComputedPrefetch, epoch_order
from torchcache.errors import ConfigurationError, ObjectNotFound, ServerUnavailable, TorchCacheError
from torchcache.marks import marks
from torchcache.model import CHUNK_BYTES, ChunkId
from torchcache.pool.orders import State
from torchcache.records import chunk_key

__all__ = ["pool"]

DATA = list(range(50))


class Unforeseeable(Sampler[int]):
    """Draws from all global generators."""

    def __iter__(self) -> Iterator[int]:
        draws = int(torch.randint(50, ())), random.randrange(50), int(np.random.randint(50))
        return iter(draws)


def distributed(kind: type[Any], rank: int = 0) -> Any:
    return kind(DATA, num_replicas=2, rank=rank, shuffle=True, seed=3)


@pytest.mark.parametrize("kind", [DistributedSampler, StatefulDistributedSampler])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_distributed_sampler_is_asked_for_the_epoch_and_left_where_it_was(
    kind: type[Any], rank: int
) -> None:
    sampler = distributed(kind, rank)
    sampler.set_epoch(1)
    foreseen = epoch_order(sampler, 2, ())
    assert sampler.epoch == 1
    sampler.set_epoch(2)
    assert foreseen == list(sampler)


def test_a_batch_sampler_is_asked_through() -> None:
    inner = distributed(DistributedSampler)
    foreseen = epoch_order(BatchSampler(inner, 4, drop_last=False), 5, ())
    inner.set_epoch(5)
    assert foreseen == list(inner)


def test_a_sampler_with_its_own_generator_gives_what_it_would_have() -> None:
    sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(7))
    foreseen = epoch_order(sampler, 0, ())
    assert foreseen == list(sampler)
    assert foreseen != list(sampler)


@pytest.mark.parametrize("sampler", [RandomSampler(DATA), Unforeseeable()], ids=["random", "global"])
def test_the_global_generators_are_put_back(sampler: Any) -> None:
    def draw() -> tuple[Any, ...]:
        return int(torch.randint(2**40, ())), random.random(), float(np.random.random())

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    epoch_order(sampler, 0, ())
    assert draw() == expected


def test_an_index_drawn_twice_is_staged_once() -> None:
    sampler = RandomSampler(
        DATA, replacement=True, num_samples=200, generator=torch.Generator().manual_seed(1)
    )
    foreseen = epoch_order(sampler, 0, ())
    assert len(foreseen) == len(set(foreseen))
    assert set(foreseen) == set(sampler)


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")

    def __len__(self) -> int:
        return 5


def test_the_dataset_is_not_copied_with_the_sampler() -> None:
    assert epoch_order(SequentialSampler(Uncopyable()), 0, ()) == [0, 1, 2, 3, 4]
    held = SequentialSampler(DATA)
    held.extra = Uncopyable()  # type: ignore[attr-defined]
    assert epoch_order(held, 0, (held.extra,)) == DATA  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="can't copy the sampler"):
        epoch_order(held, 0, ())


class Stage:
    """Stages on command, one index a step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.staged: list[int] = []
        self.steps = threading.Semaphore(0)
        self.error = error

    def __call__(
        self,
        indices: Sequence[int],
        advance: Callable[[int, int], None],
        cancelled: Callable[[], bool],
        on_missing: object,
    ) -> None:
        for index in indices:
            self.steps.acquire()
            if cancelled():
                return
            if self.error:
                raise self.error
            self.staged.append(index)
            advance(1, 10)


def test_it_runs_in_the_background_and_counts() -> None:
    stage = Stage()
    handle = ComputedPrefetch(stage, [4, 2, 7])
    assert not handle.done()
    assert handle.wait(0.01) is False
    assert repr(handle) == "Prefetch(0 of 3 samples, 0 bytes, running)"
    stage.steps.release(3)
    assert handle.wait() is True
    assert handle.done()
    assert stage.staged == [4, 2, 7]
    assert (handle.total, handle.staged, handle.staged_bytes) == (3, 3, 30)
    assert repr(handle) == "Prefetch(3 of 3 samples, 30 bytes, done)"


def test_it_can_be_cancelled() -> None:
    stage = Stage()
    handle = ComputedPrefetch(stage, range(100))
    handle.cancel()
    assert repr(handle).endswith("cancelled)")
    stage.steps.release(100)
    assert handle.wait() is True
    assert handle.staged == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ServerUnavailable("away"), ServerUnavailable), (KeyError("of the user"), TorchCacheError)],
)
def test_wait_raises_what_it_met(
    error: Exception, expected: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(error)
    stage.steps.release()
    with pytest.raises(expected, match=str(error.args[0])):
        ComputedPrefetch(stage, [1]).wait()
    assert "prefetch stopped" in caplog.text


def files(pool: SamplePool, count: int = 50) -> CachedDataset:
    for i in range(count):
        pool.put(f"s3://b/d/{i:02d}", bytes(i))
    return CachedDataset.from_files("s3://b/d", pool=pool)  # type: ignore[arg-type]


def read_in(sampler: Any, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def ahead(pool: SamplePool) -> list[int]:
    """Which samples were staged, in their order."""
    return [int(id_.key.rpartition("/")[2]) for id_ in pool.ahead]


def test_a_dataset_prefetches_in_the_samplers_order(pool: SamplePool) -> None:
    dataset = files(pool)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, seed=5)
    handle = dataset.prefetch(sampler, 3)
    assert handle.wait(60)
    order = read_in(sampler, 3)
    assert ahead(pool) == order
    assert (handle.total, handle.staged, handle.staged_bytes) == (25, 25, sum(order))
    assert dataset.residency().resident_objects == 25
    told = pool.told[3]
    assert (told.length, told.positions.tolist(), told.running) == (25, list(range(25)), False)
    keys = [chunk_key(ChunkId(pool.stat(f"s3://b/d/{i:02d}").id, 0)) for i in order]
    assert told.marks.tolist() == marks(keys).tolist()
    handle.cancel()


def test_the_epoch_that_runs_is_told_before_the_one_that_is_staged(pool: SamplePool) -> None:
    dataset = files(pool)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0, seed=5)
    sampler.set_epoch(2)
    handle = dataset.prefetch(sampler, 3)
    assert handle.wait(60)
    assert [(epoch, told.running) for epoch, told in sorted(pool.told.items())] == [(2, True), (3, False)]
    assert ahead(pool) == read_in(sampler, 3)
    handle.cancel()


def test_several_epochs_follow_each_other(pool: SamplePool) -> None:
    dataset = files(pool, 20)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
    handle = dataset.prefetch(sampler, 0, epochs=2)
    assert handle.wait(60)
    assert sorted(pool.told) == [0, 1]
    assert handle.progress().epoch == 1
    handle.cancel()


def test_the_time_that_is_left_is_that_of_the_epoch_which_is_staged(
    pool: SamplePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(foretelling, "time", SimpleNamespace(monotonic=lambda: now_s))
    dataset = files(pool, 16)
    foreteller: Any = Foreteller(pool, "s3://b/d", dataset._samples)  # type: ignore[arg-type]
    handle = ordered(lambda _: range(16), epoch=0, epochs=None, running=None)
    quarter: dict[str, State] = {f"b/d/{i:02d}": "coming" for i in range(4, 16)}
    states = {0: quarter, 1: quarter}
    stage_ahead = pool.stage_ahead

    def of_epoch(server: str, key: Any, epoch: int, chunks: Any, **options: Any) -> Any:
        pool.ahead_states = states[epoch]
        return stage_ahead(server, key, epoch, chunks, **options)

    monkeypatch.setattr(pool, "stage_ahead", of_epoch)

    def at(time_s: float) -> tuple[int, int, float | None]:
        nonlocal now_s
        now_s = time_s
        foreteller._round([handle])
        progress = handle.progress()
        return progress.epoch, progress.staged, progress.eta_s

    assert handle.progress().eta_s is None
    at(100)  # staging begins, and not when the prefetch was made
    assert at(110) == (0, 4, 30)
    states[0] = {}
    at(1000)
    assert at(1010) == (1, 4, 30)
    states[1] = {}
    assert at(1020) == (1, 16, 0)


def test_what_is_missing_is_said_with_its_reason(pool: SamplePool) -> None:
    dataset = files(pool, 16)
    pool.ahead_states = {"b/d/03": "failed", "b/d/04": "later"}
    handle = dataset.prefetch(SequentialSampler(dataset), 0)
    assert handle.wait(60) is False  # as far ahead as there is room
    reasons = {(one.server, one.why): one.chunks for one in handle.progress().missing}
    assert reasons == {
        ("127.0.0.1:7440", "it is gone"): 1,
        ("127.0.0.1:7440", "no room yet: what is there is needed sooner"): 1,
    }
    pool.ahead_states["b/d/04"] = "here"
    with pytest.raises(ObjectNotFound, match="it is gone"):
        while not handle.wait(60):
            time.sleep(0.01)
    assert handle.progress().staged == 15
    handle.cancel()


def test_an_order_that_is_refused_ends_the_prefetch(pool: SamplePool) -> None:
    dataset = files(pool, 5)
    pool.order_error = ConfigurationError("no such namespace")
    with pytest.raises(ConfigurationError, match="no such namespace"):
        dataset.prefetch(SequentialSampler(dataset), 0).wait(60)


def test_one_that_comes_while_the_thread_of_the_last_ends_does_not_end_with_it(pool: SamplePool) -> None:
    dataset = files(pool, 5)
    first = dataset.prefetch(SequentialSampler(dataset), 0)
    assert first.wait(60)
    foreteller: Any = dataset._foreteller  # any, for it is given another lock
    assert foreteller._thread is not None
    thread, lock = foreteller._thread, foreteller._lock
    leaving, next_one = threading.Event(), threading.Event()

    class HoldsUp:
        """The thread, once it has said under the lock that it leaves."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            leaves = foreteller._thread is None
            lock.release()
            if leaves and threading.current_thread() is thread:
                leaving.set()
                next_one.wait(60)

    foreteller._lock = HoldsUp()
    first.cancel()
    assert leaving.wait(60)
    second = dataset.prefetch(SequentialSampler(dataset), 1)
    next_one.set()
    thread.join(60)
    assert isinstance(second, OrderedPrefetch) and second.is_wanted
    assert second.wait(60)
    assert second.staged == 5
    second.cancel()


def test_an_unforeseeable_sampler_has_one_epoch(pool: SamplePool) -> None:
    dataset = files(pool, 5)
    with pytest.raises(ConfigurationError, match="follows from set_epoch"):
        dataset.prefetch(RandomSampler(dataset), 0, epochs=None)
    with pytest.raises(ConfigurationError, match="above 0"):
        dataset.prefetch(RandomSampler(dataset), 0, epochs=0)


def test_records_are_prefetched_by_the_chunks_they_lie_in(pool: SamplePool) -> None:
    pool.put("s3://b/r/0", bytes(2 * CHUNK_BYTES))
    size = CHUNK_BYTES * 2 // 8
    dataset = CachedDataset.from_files("s3://b/r", record_bytes=size, pool=pool)  # type: ignore[arg-type]
    handle = dataset.prefetch([7, 0, 6, 1], 0)
    assert handle.wait(60)
    id_ = pool.stat("s3://b/r/0").id
    one, two = marks([chunk_key(ChunkId(id_, index)) for index in (0, 1)]).tolist()
    assert pool.told[0].marks.tolist() == [two, one, two, one]
    assert handle.progress().missing == ()
    handle.cancel()


def test_computed_samples_are_prefetched_too(pool: SamplePool) -> None:
    dataset = CachedDataset([10, 11, 12], pool=pool)  # type: ignore[arg-type]
    assert dataset.prefetch(SequentialSampler(dataset), 0).wait()
    assert dataset.residency().fraction == 1.0
