"""CachedIterableDataset as the source of torchdata.nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchdata.nodes import Batcher, Loader, ParallelMapper, Prefetcher

import torchcache as tc
from tests.e2e.sharded import COUNT, dataset_of, write_shards


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


@pytest.fixture(params=["tar", "jsonl.zst"])
def pattern(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return write_shards(tmp_path, request.param)


def loader_over(pattern: str, pool: tc.Pool, **settings: Any) -> Loader[Any]:
    """Batches by threads, read ahead."""
    node = tc.SourceNode(dataset_of(pattern, pool, shuffle=True, window=16, **settings))
    return Loader(Prefetcher(ParallelMapper(Batcher(node, 4, drop_last=False), sorted, num_workers=2), 3))


def flat(batches: Any) -> list[int]:
    return [n for batch in batches for n in batch]


@pytest.mark.parametrize("stop", [0, 1, 9, 24])
def test_it_goes_on_exactly_and_then_into_the_next_epoch(pattern: str, pool: tc.Pool, stop: int) -> None:
    stopped = loader_over(pattern, pool)
    first = list(stopped)
    iterator = iter(stopped)
    front = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(stopped.state_dict()))
    rest = list(iterator)
    third = list(stopped)
    for epoch in (first, front + rest, third):
        assert sorted(flat(epoch)) == list(range(COUNT))
    assert first != front + rest != third

    resumed = loader_over(pattern, pool)
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    assert list(resumed) == third


def test_other_ranks_go_on(pattern: str, pool: tc.Pool) -> None:
    stopped = tc.SourceNode(dataset_of(pattern, pool, shuffle=True, window=16))
    front = [next(stopped) for _ in range(30)]
    state = stopped.state_dict()
    found = []
    for rank in range(3):
        settings = {"num_replicas": 3, "rank": rank, "uneven": "keep"}
        node = tc.SourceNode(dataset_of(pattern, pool, shuffle=True, window=16, **settings))
        node.reset(state)
        found += list(node)
    assert sorted(front + found) == list(range(COUNT))
