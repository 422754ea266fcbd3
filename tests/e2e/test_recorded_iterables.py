"""CachedIterableDataset around an IterableDataset: recorded by the first full pass, replayed by later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc

COUNT = 50


class Squares(IterableDataset[Any]):
    """Splits itself over ranks and workers, and tells in a file whom it was asked by."""

    def __init__(self, log: Path, *, ranks: int = 1, rank: int = 0, count: int = COUNT) -> None:
        self.log, self.ranks, self.rank, self.count = log, ranks, rank, count

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        with self.log.open("a") as log:
            log.write("pass\n")
        for n in range(self.rank * workers + worker, self.count, self.ranks * workers):
            yield {"n": n, "square": torch.tensor(n * n)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


Make = Callable[..., tc.CachedIterableDataset]


@pytest.fixture
def make(pool: tc.Pool, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Datasets of one name, and of one log."""

    def made(*, ranks: int = 1, rank: int = 0, **settings: Any) -> tc.CachedIterableDataset:
        source = Squares(tmp_path / "log", ranks=ranks, rank=rank)
        return tc.CachedIterableDataset(
            source,
            name=request.node.name,
            transform=number,
            num_replicas=ranks,
            rank=rank,
            pool=pool,
            **settings,
        )

    return made


def number(sample: dict[str, Any]) -> int:
    assert sample["square"].item() == sample["n"] ** 2
    return int(sample["n"])


def passes(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def numbers(loader: Any) -> list[int]:
    return [int(n) for batch in loader for n in batch]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_first_pass_is_recorded_and_later_ones_replay_it(
    make: Make, tmp_path: Path, workers: int
) -> None:
    dataset = make(shuffle=True)
    with pytest.raises(TypeError, match="no length before it was recorded"):
        len(dataset)
    loader = DataLoader(dataset, batch_size=4, num_workers=workers)
    first = numbers(loader)
    assert sorted(first) == list(range(COUNT))
    recorded = passes(tmp_path)
    assert recorded == max(workers, 1)
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        again = numbers(loader)
        assert sorted(again) == list(range(COUNT)) and again != first
    later = make()  # another job, with other workers, in the order of the parts
    assert len(later) == COUNT and later.residency().fraction == 1.0
    assert sorted(numbers(DataLoader(later, batch_size=4, num_workers=1))) == list(range(COUNT))
    assert passes(tmp_path) == recorded


def test_ranks_record_together(make: Make, tmp_path: Path) -> None:
    """Each rank its own part, by its own workers; whole once the last has come to its end."""
    ranks = [make(ranks=2, rank=rank) for rank in range(2)]
    halves = [numbers(DataLoader(half, batch_size=4, num_workers=2)) for half in ranks]
    assert sorted(halves[0] + halves[1]) == list(range(COUNT))
    assert passes(tmp_path) == 4
    replayed = [list(half) for half in ranks]
    assert [len(half) for half in replayed] == [25, 25]
    assert sorted(replayed[0] + replayed[1]) == list(range(COUNT))
    assert len(make()) == COUNT
    assert passes(tmp_path) == 4


def test_a_pass_cut_short_records_nothing(make: Make, tmp_path: Path) -> None:
    dataset = make()
    for sample in dataset:
        if sample == 30:
            break
    loader = DataLoader(make(), batch_size=2, num_workers=2)
    for batch in loader:
        if 40 in batch.tolist():
            break
    with pytest.raises(TypeError, match="no length"):
        len(make())
    assert list(make()) == list(range(COUNT))
    assert passes(tmp_path) == 4
    assert list(make()) == list(range(COUNT))
    assert passes(tmp_path) == 4


def test_one_reader_alone_makes_no_recording(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank has recorded waits for the other, which may come in a later job."""
    monkeypatch.setattr("torchcache.data.iterable_recording.WAIT_S", 0.2)
    first = make(ranks=2, rank=0)
    assert list(first) == list(range(0, COUNT, 2))
    assert list(first) == list(range(0, COUNT, 2))  # not a replay, and not recorded twice
    assert passes(tmp_path) == 2
    assert list(make(ranks=2, rank=1)) == list(range(1, COUNT, 2))
    assert len(make()) == COUNT
    assert sorted([*first, *make(ranks=2, rank=1)]) == list(range(COUNT))
    assert passes(tmp_path) == 3


def test_a_replay_is_resumed_exactly(make: Make) -> None:
    numbers(DataLoader(make(), batch_size=4, num_workers=2))

    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(make(shuffle=True), batch_size=4, num_workers=2)

    whole = [batch.tolist() for batch in loader()]
    interrupted = loader()
    iterator = iter(interrupted)
    front = [next(iterator).tolist() for _ in range(5)]
    state = interrupted.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert front + [batch.tolist() for batch in resumed] == whole
    other = make(shuffle=True)
    other.load_state_dict(state)
    had = {n for batch in front for n in batch}
    assert sorted(other) == sorted(set(range(COUNT)) - had)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_recording_pass_itself_is_resumed(make: Make, tmp_path: Path, workers: int) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(make(), batch_size=4, num_workers=workers)

    interrupted = loader()
    iterator = iter(interrupted)
    front = [n for _ in range(3) for n in next(iterator).tolist()]
    state = interrupted.state_dict()
    del iterator
    resumed = loader()
    resumed.load_state_dict(state)
    assert sorted(front + numbers(resumed)) == list(range(COUNT))
    assert passes(tmp_path) == 2 * max(workers, 1)
    if workers:
        with pytest.raises(tc.ConfigurationError, match="same ranks and workers"):
            make().load_state_dict(state)


def test_what_was_evicted_is_recorded_again(make: Make, pool: tc.Pool, tmp_path: Path) -> None:
    dataset = make()
    assert list(dataset) == list(dataset)
    pool.evict("samples:test_what_was_evicted_is_recorded_again@0")
    with pytest.raises(tc.NotResident, match="no longer in the pool: make the dataset again"):
        list(dataset)
    assert list(make()) == list(range(COUNT))
    assert passes(tmp_path) == 2


def test_versions_and_wrong_arguments(make: Make, pool: tc.Pool, tmp_path: Path) -> None:
    list(make(version=1))
    with pytest.raises(TypeError):
        len(make(version=2))
    source = Squares(tmp_path / "log")
    with pytest.raises(tc.ConfigurationError, match="format= is for shards"):
        tc.CachedIterableDataset(source, format="tar", pool=pool)
    with pytest.raises(tc.ConfigurationError, match="must not be empty"):
        tc.CachedIterableDataset(source, name="x", version="", pool=pool)
    with pytest.raises(tc.ConfigurationError, match="only shards are staged"):
        make(version=1).stage()
    with pytest.raises(tc.ConfigurationError, match="before a full pass was made"):
        make(version=3).residency()
    with pytest.raises(
        TypeError, match=r"Squares is an IterableDataset: wrap it in torchcache\.CachedIterable"
    ):
        tc.CachedDataset(source, pool=pool)
    named = tc.CachedIterableDataset(Squares(tmp_path / "log", count=3), pool=pool)
    assert [sample["n"] for sample in named] == [sample["n"] for sample in named] == [0, 1, 2]


@pytest.mark.parametrize("stop", [0, 1])
def test_a_state_of_before_each_worker_began_goes_on(make: Make, stop: int) -> None:
    """The loader asks its workers for a state when they start."""
    stopped = StatefulDataLoader(make(), batch_size=4, num_workers=2)
    iterator = iter(stopped)
    front = [int(n) for _ in range(stop) for n in next(iterator)]
    state = stopped.state_dict()
    del iterator, stopped
    resumed = StatefulDataLoader(make(), batch_size=4, num_workers=2)
    resumed.load_state_dict(state)
    assert sorted(front + numbers(resumed)) == list(range(COUNT))
