"""The exactness matrix of map-style datasets: any kind, any workers and ranks, stopped anywhere, the rest is whole.

Real StatefulDataLoaders, whose position is that of their samplers, torchdata's or ours. Ranks are loaders of this
process.
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
from tests.proofs import proof

COUNT = 53
RANKS = (1, 2, 4)
WORKERS = (0, 1, 2, 4)
KINDS = ("files", "records", "computed")
OURS = "ours"
SAMPLERS = ("torchdata", OURS)

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
    sampler: str
    ranks: int
    workers: int
    batch: int
    settings: dict[str, Any]

    def loaders(self, state: dict[str, Any] | None = None) -> list[StatefulDataLoader[Any]]:
        """New ones, one a rank; over samplers that go on from `state`."""
        return [self._loader(rank, state) for rank in range(self.ranks)]

    def _loader(self, rank: int, state: dict[str, Any] | None) -> StatefulDataLoader[Any]:
        if self.sampler == OURS:
            sampler = tc.LocalitySampler(self.dataset, self.ranks, rank, seed=9, batch_size=self.batch)
        else:
            sampler = StatefulDistributedSampler(self.dataset, self.ranks, rank, seed=9)
        sampler.set_epoch(2)
        if state is not None:
            sampler.load_state_dict(state)
        return StatefulDataLoader(
            self.dataset, self.batch, sampler=sampler, num_workers=self.workers, **self.settings
        )

    def state_for(self, other: World, state: dict[str, Any], had: int) -> dict[str, Any] | None:
        """With what the samplers of `other` go on after `had` samples, a loader's state being `state`; None: can't."""
        if self.sampler == OURS:
            return state
        # torchdata's position is one number for all ranks
        return None if had % other.ranks else {"yielded": had // other.ranks}


Steps = list[tuple[list[int], ...]]


def steps(loaders: list[StatefulDataLoader[Any]]) -> Iterator[tuple[list[int], ...]]:
    """A batch of each rank. Raises ValueError if ranks aren't even."""
    for batches in zip(*loaders, strict=True):
        yield tuple(batch.tolist() for batch in batches)


def flat(found: Steps) -> list[int]:
    return [n for step in found for batch in step for n in batch]


def check_world(world: World, others: list[World], chance: random.Random) -> Counter[str]:
    """One stop of a world, gone on by itself and by others. What was done."""
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
    done = Counter(cells=1, stops=1, resumes=1)
    for other in others:
        state = world.state_for(other, chance.choice(states), had)  # any rank's is enough
        if state is not None:
            rest = Counter(flat(list(steps(other.loaders(state)))))
            assert set(missing) <= set(rest), (world, stop, other)
            assert (rest - missing).total() < other.ranks, (world, stop, other)
            done["resumes"] += 1
    return done


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_exactly_the_rest(datasets: dict[str, tc.CachedDataset], kind: str, sampler: str) -> None:
    chance = random.Random(kind)
    others = [World(datasets[kind], sampler, ranks, 0, 3, {}) for ranks in RANKS]
    for ranks, batch in itertools.product(RANKS, (1, 4)):
        check_world(World(datasets[kind], sampler, ranks, 0, batch, {}), others, chance)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_in_workers_that_persist(datasets: dict[str, tc.CachedDataset], sampler: str) -> None:
    chance = random.Random(4)
    settings = {"persistent_workers": True, "pin_memory": True}
    other = World(datasets["files"], sampler, 4, 0, 3, {})
    check_world(World(datasets["files"], sampler, 1, 2, 4, settings), [other], chance)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.forks
def test_with_workers(datasets: dict[str, tc.CachedDataset], workers: int) -> None:
    """Two ranks of them, gone on by others with other workers."""
    others = [World(datasets["files"], OURS, 3, 1, 4, {}), World(datasets["files"], OURS, 1, 0, 4, {})]
    check_world(World(datasets["files"], OURS, 2, workers, 4, {}), others, random.Random(workers))


@pytest.fixture(scope="module")
def seed() -> int:
    """Of all that is proven in this run."""
    chosen = random.randrange(1 << 32)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.forks
def test_of_any_workers(
    datasets: dict[str, tc.CachedDataset], sampler: str, kind: str, workers: int, method: str, seed: int
) -> None:
    chance = random.Random(f"{seed} {sampler} {kind} {workers} {method}")
    with proof("map-style-datasets", seed=seed) as figures:
        done: Counter[str] = Counter()
        for ranks in RANKS if method == "fork" else (1,):
            settings = {"multiprocessing_context": method, "persistent_workers": chance.random() < 0.5}
            others = [
                World(
                    datasets[kind],
                    sampler,
                    other_ranks,
                    other_workers := chance.choice(WORKERS) if method == "fork" else 0,
                    3,
                    {"multiprocessing_context": method} if other_workers else {},
                )
                for other_ranks in RANKS
            ]
            done += check_world(World(datasets[kind], sampler, ranks, workers, 4, settings), others, chance)
        figures.update(done)


@pytest.mark.long
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.forks
def test_a_chain_of_worlds(datasets: dict[str, tc.CachedDataset], kind: str, workers: int, seed: int) -> None:
    """Stopped again and again in one epoch, each time gone on by another world."""
    chance = random.Random(f"{seed} {kind} {workers}")
    for _ in range(3):
        missing, state = Counter(range(COUNT)), None
        while missing:
            world = World(datasets[kind], OURS, chance.choice(RANKS), workers, chance.choice((1, 2, 3)), {})
            loaders = world.loaders(state)
            left = missing.total()
            running = [iter(loader) for loader in loaders]
            for batches in itertools.islice(zip(*running, strict=True), chance.randrange(1, 6)):
                had = Counter(n for batch in batches for n in batch.tolist())
                extra = had - missing
                missing -= had
                assert not extra or (not missing and extra.total() < world.ranks), (seed, world)
            assert missing.total() < left, (seed, world)
            state = pickle.loads(pickle.dumps(chance.choice(loaders).state_dict()))
            del running
