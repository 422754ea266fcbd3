"""CachedIterableDataset over a real embedded pool and a real S3: formats, loaders, workers, resuming."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import torchcache as tc
from examples.seaweedfs import SeaweedFS
from tests.unit import shards
from torchcache.data import formats

COUNT = 97
SHARDS = 5
KINDS = [f"{name}{packing}" for name in shards.WRITERS for packing in ("", ".zst", ".gz")]


def format_of(kind: str) -> formats.Format | None:
    return formats.Raw(record_bytes=8, header_bytes=4) if kind.startswith("raw") else None


def number_of(kind: str) -> Any:
    return Number(kind.partition(".")[0])


class Number:
    """The transform of the tests: the number that a sample stands for. Pickles."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, sample: Any) -> int:
        return shards.NUMBER[self._name](sample)


def write_shards(folder: Path, kind: str, count: int = COUNT) -> str:
    """Shards of unequal sizes, one of them empty, as files; their pattern."""
    name, _, packing = kind.partition(".")
    bounds = [0, 20, 20, 45, 50, count]
    for i in range(SHARDS):
        data = shards.packed(shards.WRITERS[name](range(bounds[i], bounds[i + 1])), packing and f".{packing}")
        (folder / f"train-{i}.{kind}").write_bytes(data)
    return f"{folder}/train-{{0..{SHARDS - 1}}}.{kind}"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


def numbers(loader: Any) -> list[int]:
    return [int(n) for batch in loader for n in batch]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_format(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: bool) -> None:
    pattern = write_shards(tmp_path, kind)

    def make(**settings: Any) -> tc.CachedIterableDataset:
        return tc.CachedIterableDataset(
            pattern, format=format_of(kind), shuffle=shuffle, transform=number_of(kind), pool=pool, **settings
        )

    dataset = make(window=16)
    first = list(dataset)
    assert sorted(first) == list(range(COUNT))
    assert (first == list(range(COUNT))) is not shuffle
    dataset.set_epoch(1)
    assert (list(dataset) == first) is not shuffle
    stop = random.Random(kind).randrange(COUNT)
    iterator = iter(dataset)
    front = [next(iterator) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(dataset.state_dict()))
    rest = list(iterator)
    again = make(window=16)
    again.load_state_dict(state)
    assert list(again) == rest
    assert len(list(again)) == COUNT  # the next iteration is a whole one
    halves = [make(window=16, num_replicas=2, rank=rank, uneven="keep") for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert sorted([*front, *halves[0], *halves[1]]) == list(range(COUNT))
