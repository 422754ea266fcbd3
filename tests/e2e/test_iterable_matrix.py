"""The exactness matrix: whatever the format, workers and ranks, wherever one stops, whoever goes on, the rest is whole.

The readers of all ranks and workers run in this process, each an unpickled dataset that takes itself for a worker's, in
the order in which loaders ask them. That what real loaders do is the same, one cell of each way of reading shows here,
and test_iterable_dataset.py for one rank.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data._utils import worker as torch_worker
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from tests.e2e.sharded import COUNT, KINDS, dataset_of, write_shards
from tests.proofs import proof

WORKERS = (0, 1, 2, 4)
RANKS = (1, 2, 4)
CELLS = list(itertools.product(WORKERS, RANKS))
QUICK = ["tar", "parquet", "jsonl.zst"]
"""Of these, one of each way of reading, every cell in the quick run; of the other kinds some cells, with more stops."""


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


Step = Sequence[list[int]]
"""A batch of each rank."""
Steps = Sequence[Step]


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


def steps(loaders: list[Loader]) -> Iterator[Step]:
    """A batch of each rank. Raises ValueError if ranks aren't even."""
    return zip(*loaders, strict=True)  # type: ignore[arg-type]


def flat(found: Steps) -> list[int]:
    return [n for step in found for batch in step for n in batch]


def check(
    pattern: str,
    pool: tc.Pool,
    chance: random.Random,
    *,
    shuffle: bool | str,
    cells: Iterable[tuple[int, int]] = CELLS,
    stops: int = 1,
) -> Counter[str]:
    """One row of the matrix: worlds, each stopped somewhere, gone on by itself and by another. What was done."""
    done: Counter[str] = Counter()
    for workers, ranks in cells:
        batch = chance.choice([1, 3, 4])
        settings = {"shuffle": shuffle, "batch_size": chance.choice([None, batch])}
        world = World(pattern, pool, ranks, workers, batch, settings)
        other = World(pattern, pool, chance.choice(RANKS), chance.choice(WORKERS), 2, settings)
        done += check_world(world, other, chance, stops)
    return done


def check_world(world: World, other: World, chance: random.Random, stops: int = 1) -> Counter[str]:
    whole = list(steps(world.loaders()))
    counts = Counter(flat(whole))
    assert set(counts) == set(range(COUNT)), world
    assert counts.total() == -(-COUNT // world.ranks) * world.ranks, world
    for stop in sorted(chance.sample(range(len(whole) + 1), stops)):
        check_stop(world, other, chance, whole, stop)
    return Counter(cells=1, stops=stops, resumes=2 * stops)


def check_stop(world: World, other: World, chance: random.Random, whole: Steps, stop: int) -> None:
    """`whole`: the batches of an epoch that isn't stopped."""
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
    check_rest(front, list(steps(gone_on)), other.ranks, told)


def check_rest(front: Steps, rest: Steps, ranks: int, told: str) -> None:
    """Together they are the epoch, and what makes `ranks` even."""
    found = Counter(flat(rest))
    missing = Counter(range(COUNT)) - Counter(flat(front))
    assert set(missing) <= set(found), told
    assert (found - missing).total() < ranks, told


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


@pytest.mark.parametrize("kind", QUICK)
def test_the_rest_is_exactly_the_rest(pool: tc.Pool, tmp_path: Path, kind: str) -> None:
    check(write_shards(tmp_path, kind), pool, random.Random(kind), shuffle=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
def test_so_it_is_of_the_other_kinds(pool: tc.Pool, tmp_path: Path, kind: str) -> None:
    check_some(write_shards(tmp_path, kind), pool, kind, shuffle=True)


@pytest.mark.parametrize(("kind", "shuffle"), [("tar", "blocks"), ("parquet", "records"), ("jsonl", False)])
def test_in_an_order_that_was_asked_for(
    pool: tc.Pool, tmp_path: Path, kind: str, shuffle: bool | str
) -> None:
    check_some(write_shards(tmp_path, kind), pool, kind, shuffle=shuffle)


def check_some(pattern: str, pool: tc.Pool, seed: str, *, shuffle: bool | str) -> None:
    """A cell of one reader and one of several, with several stops each."""
    chance = random.Random(seed)
    cells = [(chance.choice([0, 1]), 1), (chance.choice([2, 4]), chance.choice([2, 4]))]
    check(pattern, pool, chance, shuffle=shuffle, cells=cells, stops=3)


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl.zst"])
@pytest.mark.forks
def test_real_loaders_of_several_ranks(pool: tc.Pool, tmp_path: Path, kind: str) -> None:
    """One kind of each way of reading: two ranks of two workers, stopped, and gone on by three of one."""
    pattern = write_shards(tmp_path, kind)

    def loaders(ranks: int, workers: int, state: Any = None) -> list[StatefulDataLoader[Any]]:
        made = []
        for rank in range(ranks):
            dataset = dataset_of(
                pattern, pool, shuffle=True, window=16, seed=9, num_replicas=ranks, rank=rank
            )
            if state is not None:
                dataset.load_state_dict(state)
            made.append(StatefulDataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=list))
        return made

    stop = random.Random(kind).randrange(1, 6)
    stopped = loaders(2, 2)
    running = [iter(loader) for loader in stopped]
    front = list(islice(zip(*running, strict=True), stop))
    states = [pickle.loads(pickle.dumps(loader.state_dict())) for loader in stopped]
    left = list(zip(*running, strict=True))
    check_rest(front, left, 2, f"stopped after {stop} batches")
    again = loaders(2, 2)
    for loader, state in zip(again, states, strict=True):
        loader.load_state_dict(state)
    assert list(zip(*again, strict=True)) == left
    gone_on = list(zip(*loaders(3, 1, states[1]), strict=True))
    check_rest(front, gone_on, 3, f"stopped after {stop} batches, gone on by three ranks")


@pytest.fixture(scope="module")
def seed() -> int:
    """Of all that is proven in this run."""
    chosen = random.randrange(1 << 32)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.long
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_format(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: bool, seed: int) -> None:
    prove(tmp_path, kind, pool, seed, shuffle=shuffle)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
@pytest.mark.parametrize("shuffle", ["blocks", "records"])
def test_of_every_order(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: str, seed: int) -> None:
    prove(tmp_path, kind, pool, seed, shuffle=shuffle)


def prove(folder: Path, kind: str, pool: tc.Pool, seed: int, *, shuffle: bool | str) -> None:
    """Every cell three times, with three stops each: the proof's figures."""
    pattern = write_shards(folder, kind)
    with proof("iterable-datasets", seed=seed) as figures:
        done: Counter[str] = Counter()
        for number in range(3):
            chance = random.Random(f"{seed} {kind} {shuffle} {number}")
            done += check(pattern, pool, chance, shuffle=shuffle, stops=3)
        figures.update(done)
