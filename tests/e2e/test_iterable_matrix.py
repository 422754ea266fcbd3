"""The exactness matrix: whatever the format, workers and ranks, wherever one stops, whoever goes on, the rest is whole.

The readers of all ranks and workers run in this process, each an unpickled dataset that takes itself for a worker's, in
the order in which loaders ask them. That what real loaders do is the same, test_iterable_dataset.py shows.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data._utils import worker as torch_worker

import torchcache as tc
from tests.e2e.sharded import COUNT, KINDS, dataset_of, write_shards

WORKERS = (0, 1, 2, 4)
RANKS = (1, 2, 4)
QUICK = ["tar", "parquet", "arrows", "tfrecord.gz", "raw", "jsonl.zst"]


@contextmanager
def as_worker(dataset: Any, worker: int, workers: int) -> Iterator[None]:
    """What a dataset's code finds when it runs in a worker; nothing of it for a loader without any."""
    torch_worker._worker_info = (
        torch_worker.WorkerInfo(id=worker, num_workers=workers, seed=worker, dataset=dataset)
        if workers
        else None
    )
    try:
        yield
    finally:
        torch_worker._worker_info = None


class Loader:
    """One rank's StatefulDataLoader, without its processes."""

    def __init__(self, dataset: tc.CachedIterableDataset, workers: int, batch: int) -> None:
        self._workers = workers
        self._batch = batch
        count = max(1, workers)
        self._datasets = [pickle.loads(pickle.dumps(dataset)) for _ in range(count)] if workers else [dataset]
        self._iterators: list[Iterator[int]] = []
        self._next = 0
        self._done = [False] * count

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for worker, dataset in enumerate(self._datasets):
            with as_worker(dataset, worker, self._workers):
                dataset.load_state_dict(state["_snapshot"]["_worker_snapshots"][str(worker)]["dataset_state"])
        self._next = state["next"]

    def __iter__(self) -> Iterator[list[int]]:
        for worker, dataset in enumerate(self._datasets):
            with as_worker(dataset, worker, self._workers):
                self._iterators.append(iter(dataset))
        while not all(self._done):
            worker, self._next = self._next, (self._next + 1) % len(self._datasets)
            if not self._done[worker]:
                with as_worker(self._datasets[worker], worker, self._workers):
                    batch = list(islice(self._iterators[worker], self._batch))
                self._done[worker] = len(batch) < self._batch
                if batch:
                    yield batch

    def state_dict(self) -> dict[str, Any]:
        states = {}
        for worker, dataset in enumerate(self._datasets):
            with as_worker(dataset, worker, self._workers):
                states[str(worker)] = {"dataset_state": dataset.state_dict()}
        return pickle.loads(pickle.dumps({"_snapshot": {"_worker_snapshots": states}, "next": self._next}))


@dataclass(frozen=True)
class World:
    """Ranks in step, each with a loader of so many workers."""

    pattern: str
    pool: tc.Pool
    ranks: int
    workers: int
    batch: int
    settings: dict[str, Any]

    def loaders(self, state: dict[str, Any] | None = None) -> list[Loader]:
        """New ones, one a rank; over datasets that go on from `state`."""
        found = []
        for rank in range(self.ranks):
            dataset = self.dataset(
                pool=self.pool, num_replicas=self.ranks, rank=rank, window=16, seed=9, **self.settings
            )
            if state is not None:
                dataset.load_state_dict(state)
            found.append(Loader(dataset, self.workers, self.batch))
        return found

    def dataset(self, **settings: Any) -> tc.CachedIterableDataset:
        """One reader's."""
        return dataset_of(self.pattern, **settings)


def steps(loaders: list[Loader]) -> Iterator[list[list[int]]]:
    """A batch of each rank. Raises ValueError if ranks aren't even."""
    return zip(*loaders, strict=True)  # type: ignore[arg-type]


def flat(found: list[list[list[int]]]) -> list[int]:
    return [n for step in found for batch in step for n in batch]


def check(pattern: str, pool: tc.Pool, chance: random.Random, *, shuffle: bool) -> None:
    """One row of the matrix: all worlds, each stopped somewhere, gone on by itself and by another."""
    for workers, ranks in itertools.product(WORKERS, RANKS):
        batch = chance.choice([1, 3, 4])
        settings = {"shuffle": shuffle, "batch_size": chance.choice([None, batch])}
        world = World(pattern, pool, ranks, workers, batch, settings)
        other = World(pattern, pool, chance.choice(RANKS), chance.choice(WORKERS), 2, settings)
        check_world(world, other, chance)


def check_world(world: World, other: World, chance: random.Random) -> None:
    whole = list(steps(world.loaders()))
    counts = Counter(flat(whole))
    assert set(counts) == set(range(COUNT)), world
    assert counts.total() == -(-COUNT // world.ranks) * world.ranks, world
    stop = chance.randrange(len(whole) + 1)
    told = f"{world}, stopped after {stop} batches, {other}"
    stopped = world.loaders()
    front = list(islice(steps(stopped), stop)) if stop else []
    assert front == whole[:stop], told
    states = [loader.state_dict() for loader in stopped]

    again = world.loaders()
    for loader, state in zip(again, states, strict=True):
        loader.load_state_dict(state)
    assert list(steps(again)) == whole[stop:], told

    gone_on = other.loaders(chance.choice(states))  # any rank's is enough
    rest = Counter(flat(list(steps(gone_on))))
    missing = Counter(range(COUNT)) - Counter(flat(front))
    assert set(missing) <= set(rest), told
    assert (rest - missing).total() < other.ranks, told  # what makes ranks even


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


@pytest.mark.parametrize("kind", QUICK)
def test_the_rest_is_exactly_the_rest(pool: tc.Pool, tmp_path: Path, kind: str) -> None:
    check(write_shards(tmp_path, kind), pool, random.Random(kind), shuffle=True)


@pytest.mark.long
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_format(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: bool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    pattern = write_shards(tmp_path, kind)
    for number in range(3):
        check(pattern, pool, random.Random(seed + number), shuffle=shuffle)
