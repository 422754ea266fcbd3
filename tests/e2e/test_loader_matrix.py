"""What loaders can be told, over CachedIterableDataset: whatever it is, the rest is exactly the rest."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from tests.e2e.sharded import COUNT, Number, dataset_of, write_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


def batches_of(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [n for batch in batches for n in batch]


SETTINGS: dict[str, dict[str, Any]] = {
    "persistent": {"persistent_workers": True, "pin_memory": True},
    "forkserver": {"multiprocessing_context": "forkserver", "persistent_workers": True},
    "spawn": {"multiprocessing_context": "spawn"},
    "ahead": {"prefetch_factor": 7},
}


def check(pattern: str, pool: tc.Pool, workers: int, chance: random.Random, settings: dict[str, Any]) -> None:
    """Two epochs, the second stopped somewhere, gone on by a loader that is told the same, and by one alone."""

    def make() -> tuple[tc.CachedIterableDataset, StatefulDataLoader[Any]]:
        dataset = dataset_of(pattern, pool, shuffle=True, window=16)
        return dataset, StatefulDataLoader(dataset, 4, num_workers=workers, **settings)

    dataset, loader = make()
    first = batches_of(loader)
    dataset.set_epoch(1)
    iterator, front = iter(loader), []
    for _ in range(chance.randrange(1, len(first))):
        front.append(next(iterator).tolist())
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = batches_of(iterator)
    assert sorted(flat(first)) == sorted(flat(front + rest)) == list(range(COUNT))
    assert front + rest != first
    del iterator

    same, resumed = make()
    resumed.load_state_dict(state)
    same.set_epoch(1)
    assert batches_of(resumed) == rest
    other, _ = make()
    other.load_state_dict(state)
    assert sorted(other) == sorted(flat(rest))


@pytest.mark.parametrize(("told", "workers"), [("persistent", 2), ("forkserver", 1)])
def test_the_rest_is_exactly_the_rest(pool: tc.Pool, tmp_path: Path, told: str, workers: int) -> None:
    check(write_shards(tmp_path, "tar"), pool, workers, random.Random(told), SETTINGS[told])


@pytest.mark.long
@pytest.mark.parametrize("told", SETTINGS)
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl.zst"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_of_every_reading(pool: tc.Pool, tmp_path: Path, kind: str, workers: int, told: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    check(write_shards(tmp_path, kind), pool, workers, random.Random(seed), SETTINGS[told])


class HeldUp:
    """A transform that waits in worker 0 for a file: until it is there, all batches are other workers'."""

    def __init__(self, kind: str, file: Path) -> None:
        self._number = Number(kind)
        self._file = file

    def __call__(self, sample: Any) -> int:
        info = get_worker_info()
        while info is not None and info.id == 0 and not self._file.exists():
            time.sleep(0.01)
        return self._number(sample)


def test_batches_out_of_order(pool: tc.Pool, tmp_path: Path) -> None:
    """Each sample comes once; torchdata then has no state of where it is, and an older one isn't taken for it."""
    go_on = tmp_path / "go-on"
    dataset = tc.CachedIterableDataset(
        write_shards(tmp_path, "tar"), shuffle=True, transform=HeldUp("tar", go_on), pool=pool
    )
    stopped = StatefulDataLoader(dataset, 4, num_workers=2, in_order=False)
    iterator = iter(stopped)
    front = [next(iterator).tolist()]  # worker 1's
    state = stopped.state_dict()
    go_on.touch()
    assert sorted(flat(front + batches_of(iterator))) == list(range(COUNT))
    with pytest.raises(tc.ConfigurationError, match="in_order=True"):
        dataset.load_state_dict(state)


def all_but_sevenths(sample: Any) -> int:
    number = Number("tar")(sample)
    if number % 7 == 0:
        raise ValueError(f"{number} is bad")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_counted_once_on_both_sides_of_a_stop(
    pool: tc.Pool, tmp_path: Path, workers: int
) -> None:
    pattern = write_shards(tmp_path, "tar")

    def make() -> tuple[tc.CachedIterableDataset, StatefulDataLoader[Any]]:
        dataset = tc.CachedIterableDataset(
            pattern, shuffle=True, transform=all_but_sevenths, on_error="skip", pool=pool
        )
        return dataset, StatefulDataLoader(dataset, 4, num_workers=workers)

    good = [n for n in range(COUNT) if n % 7]
    first, loader = make()
    iterator = iter(loader)
    front = [next(iterator).tolist() for _ in range(9)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = batches_of(iterator)
    assert sorted(flat(front + rest)) == good
    assert first.skipped == COUNT - len(good)
    second, resumed = make()
    resumed.load_state_dict(state)
    assert batches_of(resumed) == rest
    left = len([n for n in range(COUNT) if n % 7 == 0])
    assert 0 < second.skipped < left


_KILLED = """
import os, signal, sys, time
import torchcache as tc
from torchdata.stateful_dataloader import StatefulDataLoader

def make():
    if sys.argv[1] == "map":
        dataset = tc.CachedDataset.from_files(sys.argv[2], decode=len)
    else:
        dataset = tc.CachedIterableDataset(sys.argv[2], transform=lambda sample: int(sample["txt"]), shuffle=True)
    return StatefulDataLoader(dataset, batch_size=4, num_workers=2)

whole = [batch.tolist() for batch in make()]
loader = make()
iterator = iter(loader)
front, state = [], None
try:
    try:
        for batch in iterator:
            front, state = [*front, batch.tolist()], loader.state_dict()
            if len(front) == 3:
                os.kill(iterator._workers[0].pid, signal.SIGKILL)
    except OSError:  # of the killed worker's socket, and ahead of the signal of its death
        time.sleep(20)
    print("it ended without an error")
except RuntimeError as error:
    print(error)
loader = make()
loader.load_state_dict(state)
print(whole == front + [batch.tolist() for batch in loader])
"""


@pytest.mark.parametrize("kind", ["tar", pytest.param("map", marks=pytest.mark.long)])
def test_a_killed_worker_is_an_error_and_its_epoch_goes_on(tmp_path: Path, kind: str) -> None:
    """In a program of its own: torch raises from a signal handler, wherever the main thread is."""
    pattern = write_shards(tmp_path, "tar")
    if kind == "map":
        for number in range(40):
            (tmp_path / f"{number:02d}").write_bytes(bytes(number))
    source = str(tmp_path) if kind == "map" else pattern
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, kind, source],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    error, same = done.stdout.splitlines()
    assert "exited unexpectedly" in error or "killed by signal" in error
    assert same == "True"
