"""Beyond the exactness matrix: several stops of an epoch, gone on from by other worlds; uneven ranks; recordings.

Readers are those of the matrix: all ranks and workers in this process, in the order in which loaders ask them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset

import torchcache as tc
from tests.e2e.sharded import COUNT, KINDS, write_shards
from tests.e2e.test_iterable_matrix import RANKS, WORKERS, Loader, World, check_world, flat
from tests.proofs import proof

UNEVEN = ("pad", "drop", "keep")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


class RecordedWorld(World):
    """Over a recording called `pattern`."""

    def dataset(self, **settings: Any) -> tc.CachedIterableDataset:
        return tc.CachedIterableDataset(Numbers(), name=self.pattern, **settings)


def in_step(loaders: list[Loader], steps: int | None) -> list[list[list[int]]]:
    """A batch of each rank that has one, `steps` times or to the end."""
    running = [iter(loader) for loader in loaders]
    found: list[list[list[int]]] = []
    while steps is None or len(found) < steps:
        step = [batch for batch in (next(one, None) for one in running) if batch]
        if not step:
            break
        found.append(step)
    return found


def check_chain(worlds: list[World], uneven: str, chance: random.Random) -> None:
    """An epoch that is stopped in all worlds but the last, and gone on from by the next."""
    had: Counter[int] = Counter()
    state: dict[str, Any] | None = None
    stops = []
    for world in worlds[:-1]:
        loaders = world.loaders(state)
        stops.append(chance.randrange(1 + COUNT // (world.ranks * world.batch * 2)))
        had += Counter(flat(in_step(loaders, stops[-1])))
        states = [loader.state_dict() for loader in loaders]
        state = states[0] if uneven == "keep" else chance.choice(states)
    told = f"{worlds}, stopped after {stops}"
    had += Counter(flat(in_step(worlds[-1].loaders(state), None)))
    twice, missing = had - Counter(range(COUNT)), Counter(range(COUNT)) - had
    most = max(world.ranks for world in worlds) - 1
    assert twice.total() <= (most if uneven == "pad" else 0), told
    assert missing.total() <= (most if uneven == "drop" else 0), told


def chains(
    kind: type[World], pattern: str, pool: tc.Pool, chance: random.Random, shuffle: Any
) -> Counter[str]:
    """One for each number of workers and ranks that begins an epoch, and each way to make ranks even. What was done."""
    done: Counter[str] = Counter()
    for workers, ranks, uneven in itertools.product(WORKERS, RANKS, UNEVEN):
        settings = {"shuffle": shuffle, "uneven": uneven}
        begins = kind(pattern, pool, ranks, workers, chance.choice([1, 3, 4]), settings)
        others = [
            kind(pattern, pool, chance.choice(RANKS), chance.choice(WORKERS), chance.choice([1, 2]), settings)
            for _ in range(3)
        ]
        check_chain([begins, *others], uneven, chance)
        done += Counter(epochs=1, stops=len(others), resumes=len(others))
    return done


@pytest.fixture(scope="module")
def seed() -> int:
    """Of all that is proven in this run."""
    chosen = random.randrange(1 << 32)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.long
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_many_stops(pool: tc.Pool, tmp_path: Any, kind: str, shuffle: bool, seed: int) -> None:
    with proof("epochs-of-many-stops", seed=seed) as figures:
        chance = random.Random(f"{seed} {kind} {shuffle}")
        figures.update(chains(World, write_shards(tmp_path, kind), pool, chance, shuffle))


@pytest.fixture
def recorded(pool: tc.Pool, request: pytest.FixtureRequest) -> str:
    """The name of a recording of all numbers."""
    name: str = request.node.name
    assert list(tc.CachedIterableDataset(Numbers(), name=name, pool=pool)) == [*range(COUNT)]
    return name


@pytest.mark.long
@pytest.mark.parametrize("shuffle", [True, "blocks", False])
def test_an_epoch_of_a_recording(pool: tc.Pool, recorded: str, shuffle: bool | str, seed: int) -> None:
    """Every cell of the matrix, against every other world, and chains."""
    chance = random.Random(f"{seed} {shuffle}")
    worlds = [
        RecordedWorld(recorded, pool, ranks, workers, chance.choice([1, 3, 4]), {"shuffle": shuffle})
        for workers, ranks in itertools.product(WORKERS, RANKS)
    ]
    with proof("recorded-datasets", seed=seed) as figures:
        done: Counter[str] = Counter()
        for world, other in itertools.product(worlds, worlds):
            done += check_world(world, other, chance)
        chains(RecordedWorld, recorded, pool, chance, shuffle)
        figures.update(done)
