"""Prefetch of CachedIterableDataset: the pool is told what will be read, and has it when it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

import torchcache as tc
from tests.e2e.sharded import COUNT, dataset_of, write_shards
from tests.waiting import until
from torchcache.data.formats import Raw
from torchcache.data.iterable_foretold import ShardParts, parts_in_order
from torchcache.data.iterable_pass import Epoch, Pass
from torchcache.data.iterable_position import Rest

pytestmark = pytest.mark.usefixtures("no_hedges")

KINDS = ["tar", "parquet", "jsonl.zst"]  # records are read alone; blocks; shards from their front


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tc.Pool]:
    with tc.LocalPool(tmp_path_factory.mktemp("pool")) as local_pool:
        yield local_pool


def asked(pool: tc.Pool) -> int:
    """How often the under-stores were asked for bytes."""
    return sum(store.read_requests for server in pool.status() for store in server.under_stores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.forks
def test_an_epoch_that_was_prefetched_asks_storage_for_nothing(
    pool: tc.Pool, tmp_path: Path, kind: str
) -> None:
    dataset = dataset_of(write_shards(tmp_path, kind), pool, shuffle=True, window=16)
    pool.evict(f"file://{tmp_path}")  # indexing has read them
    prefetch = dataset.prefetch(0, num_workers=2)
    until(lambda: prefetch.wait(60))
    before = asked(pool)
    progress = prefetch.progress()
    assert (progress.missing, progress.staged) == ((), progress.samples)
    assert dataset.residency().resident_objects == 4  # nothing is read of the one without samples
    loader = DataLoader(dataset, batch_size=4, num_workers=2)
    assert sorted(n for batch in loader for n in batch.tolist()) == list(range(COUNT))
    assert asked(pool) == before
    prefetch.cancel()


def firsts(values: Any) -> list[int]:
    return list(dict.fromkeys(np.asarray(values).tolist()))


@pytest.mark.parametrize("shuffle", [False, True, "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_is_what_is_read(pool: tc.Pool, tmp_path: Path, kind: str, shuffle: Any) -> None:
    """By any ranks and workers, from the begin of an epoch and from amid it; in order, where one worker reads."""
    dataset = dataset_of(write_shards(tmp_path, kind), pool, shuffle=shuffle, window=16)
    records: Any = dataset._records
    parts = ShardParts(records)
    for workers in (1, 2, 3):
        split = dataset._split(workers)
        for rest in (Rest(), Rest(((3, 20),), 41)):
            total = split.total(rest.left(COUNT), "pad")
            epoch = Epoch(number=4, seed=9, rest=rest, total=total, split=split)
            order = dataset._order(epoch, records)
            read = [
                ids
                for worker in range(workers)
                for ids in Pass(epoch, 0, worker)._parts(order, records.reading())
            ]
            told = parts_in_order(parts, order, epoch, 0)
            expected = firsts(parts.of(np.concatenate(read)))
            assert sorted(firsts(told)) == sorted(expected)
            if workers == 1:
                assert firsts(told) == expected
    for part, extent in enumerate(parts.extents(range(len(parts)))):
        assert 0 <= extent.offset <= extent.end <= extent.object.size, part


def test_the_parts_cover_the_shards(pool: tc.Pool, tmp_path: Path) -> None:
    """Row groups lie about where their rows say: end to end, from the begin of each shard to its end."""
    records: Any = dataset_of(write_shards(tmp_path, "parquet"), pool)._records
    extents = ShardParts(records).extents(range(len(ShardParts(records))))
    for info in records.shards()[:1] + records.shards()[2:]:  # the second has no rows
        mine = [extent for extent in extents if extent.object == info]
        ends = [extent.end for extent in mine]
        assert [extent.offset for extent in mine] == [0, *ends[:-1]]
        assert ends[-1] == info.size


def test_the_next_epochs_follow_and_the_rest_of_one_that_was_stopped(tmp_path: Path) -> None:
    """A cache of half, and each epoch's order is there before it begins."""
    size, count, each = 1 << 20, 48, 8
    for shard in range(count // each):
        (tmp_path / f"{shard}.raw").write_bytes(os.urandom(8) * (size * each // 8))
    capacity = count * size // 2 + (8 << 20)
    with tc.LocalPool(tmp_path / "pool", capacity=capacity, lane="flight") as pool:

        def make() -> tc.CachedIterableDataset:
            return tc.CachedIterableDataset(
                f"{tmp_path}/*.raw", format=Raw(record_bytes=size), shuffle=True, transform=len, pool=pool
            )

        def told() -> int:
            return sum(order.chunks for server in pool.status() for order in server.orders)

        dataset = make()
        prefetch = dataset.prefetch(0, epochs=None)
        until(lambda: told() == 2 * count)
        assert list(dataset) == [size] * count
        dataset.set_epoch(1)
        iterator = iter(dataset)
        assert [next(iterator) for _ in range(count // 2)] == [size] * (count // 2)
        until(lambda: any(o.epoch == 1 and o.position > 0 for s in pool.status() for o in s.orders))
        assert list(iterator) == [size] * (count // 2)
        prefetch.cancel()

        dataset.set_epoch(2)
        iterator = iter(dataset)
        for _ in range(20):
            next(iterator)
        again = make()
        again.load_state_dict(dataset.state_dict())
        prefetch = again.prefetch(2)
        until(lambda: prefetch.progress().samples == count - 20)
        prefetch.cancel()
        iterator.close()  # type: ignore[attr-defined]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_what_has_no_order_to_tell(pool: tc.Pool, tmp_path: Path) -> None:
    with pytest.raises(tc.ConfigurationError, match="IterableDataset"):
        tc.CachedIterableDataset(Endless(), name="endless", pool=pool).prefetch(0)
    dataset = dataset_of(write_shards(tmp_path, "tar"), pool)
    for arguments, message in (({"epochs": 0}, "epochs=0"), ({"num_workers": -1}, "num_workers=-1")):
        with pytest.raises(tc.ConfigurationError, match=message):
            dataset.prefetch(0, **arguments)
