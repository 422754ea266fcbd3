"""The exactness matrix of map-style datasets: any kind, any workers and ranks, stopped anywhere, the rest is whole.

Real StatefulDataLoaders, whose position is that of a StatefulDistributedSampler. Ranks are datasets of this process.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import torchcache as tc

COUNT = 53
RANKS = (1, 2, 4)

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:'pin_memory' argument:UserWarning"
)


class Squares:
    """A dataset that computes; the sample says which it is."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < COUNT:
            raise IndexError(index)
        return index * index


def root_of(square: int) -> int:
    return round(square**0.5)


def number_of(data: memoryview) -> int:
    return int.from_bytes(data, "little")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tc.CachedDataset]]:
    """Each kind over one pool, with samples that are their numbers."""
    files, records = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("records")
    for number in range(COUNT):
        (files / f"{number:03d}").write_bytes(number.to_bytes(2, "little"))
    for first, stop in ((0, 20), (20, 21), (21, COUNT)):
        (records / f"{first:03d}").write_bytes(b"".join(n.to_bytes(2, "little") for n in range(first, stop)))
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as pool:
        of = tc.CachedDataset.from_files
        yield {
            "files": of(files, decode=number_of, pool=pool),
            "records": of(records, decode=number_of, record_bytes=2, pool=pool),
            "computed": tc.CachedDataset(Squares(), transform=root_of, pool=pool),
        }


@dataclass(frozen=True)
class World:
    """Ranks in step, each with a loader of so many workers."""

    dataset: tc.CachedDataset
    ranks: int
    workers: int
    batch: int
    settings: dict[str, Any]

    def loaders(self, yielded: int | None = None) -> list[StatefulDataLoader[Any]]:
        """New ones, one a rank; from where each rank's sampler has given `yielded`."""
        return [self._loader(rank, yielded) for rank in range(self.ranks)]

    def _loader(self, rank: int, yielded: int | None) -> StatefulDataLoader[Any]:
        sampler = StatefulDistributedSampler(self.dataset, self.ranks, rank, seed=9)
        sampler.set_epoch(2)
        if yielded is not None:
            sampler.load_state_dict({"yielded": yielded})
        return StatefulDataLoader(
            self.dataset, self.batch, sampler=sampler, num_workers=self.workers, **self.settings
        )


Steps = list[tuple[list[int], ...]]


def steps(loaders: list[StatefulDataLoader[Any]]) -> Iterator[tuple[list[int], ...]]:
    """A batch of each rank. Raises ValueError if ranks aren't even."""
    for batches in zip(*loaders, strict=True):
        yield tuple(batch.tolist() for batch in batches)


def flat(found: Steps) -> list[int]:
    return [n for step in found for batch in step for n in batch]


def check_world(world: World, others: list[World], chance: random.Random) -> None:
    whole = list(steps(world.loaders()))
    counts = Counter(flat(whole))
    assert set(counts) == set(range(COUNT)), world
    assert counts.total() == -(-COUNT // world.ranks) * world.ranks, world
    stop = chance.randrange(len(whole) + 1)
    stopped = world.loaders()
    running = [iter(loader) for loader in stopped]
    front = [tuple(next(it).tolist() for it in running) for _ in range(stop)]
    assert front == whole[:stop], world
    states = [pickle.loads(pickle.dumps(loader.state_dict())) for loader in stopped]
    del running

    again = world.loaders()
    for loader, state in zip(again, states, strict=True):
        loader.load_state_dict(state)
    assert list(steps(again)) == whole[stop:], (world, stop)

    had = len(flat(front))
    missing = Counter(range(COUNT)) - Counter(flat(front))
    for other in others:
        if had % other.ranks == 0:  # a position of DistributedSampler's is the same number for each rank
            rest = Counter(flat(list(steps(other.loaders(had // other.ranks)))))
            assert set(missing) <= set(rest), (world, stop, other)
            assert (rest - missing).total() < other.ranks, (world, stop, other)


@pytest.mark.parametrize("kind", ["files", "records", "computed"])
def test_the_rest_is_exactly_the_rest(datasets: dict[str, tc.CachedDataset], kind: str) -> None:
    chance = random.Random(kind)
    others = [World(datasets[kind], ranks, 0, 3, {}) for ranks in RANKS]
    for ranks, batch in itertools.product(RANKS, (1, 4)):
        check_world(World(datasets[kind], ranks, 0, batch, {}), others, chance)


def test_in_workers_that_persist(datasets: dict[str, tc.CachedDataset]) -> None:
    chance = random.Random(4)
    settings = {"persistent_workers": True, "pin_memory": True}
    check_world(World(datasets["files"], 1, 2, 4, settings), [], chance)


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["files", "records", "computed"])
@pytest.mark.forks
def test_of_any_workers(datasets: dict[str, tc.CachedDataset], kind: str, workers: int, method: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    others = [World(datasets[kind], ranks, 0, 3, {}) for ranks in RANKS]
    for ranks in RANKS if method == "fork" else (1,):
        settings = {"multiprocessing_context": method, "persistent_workers": chance.random() < 0.5}
        check_world(World(datasets[kind], ranks, workers, 4, settings), others, chance)
