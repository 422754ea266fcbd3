"""Prefetch by order in a real pool: counted is what the under-store was asked for, never how long it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DistributedSampler

import torchcache as tc
from tests.waiting import until
from torchcache.errors import ServerUnavailable
from torchcache.pool.orders import OrderKey

pytestmark = pytest.mark.usefixtures("no_hedges")

MIB = 1 << 20
COUNT = 48


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:03d}").write_bytes(os.urandom(8) * (MIB // 8))
    return folder


def asked(pool: tc.Pool) -> int:
    """Objects that the under-stores were asked for."""
    return sum(store.read_requests for server in pool.status() for store in server.under_stores)


def read(
    dataset: tc.CachedDataset,
    sampler: DistributedSampler[int],
    epoch: int,
    source: Path,
    midway: Callable[[], object] = lambda: None,
) -> None:
    sampler.set_epoch(epoch)
    order = list(sampler)
    for at in range(0, len(order), 4):
        if at == COUNT // 2:
            midway()
        for index, sample in zip(order[at : at + 4], dataset.__getitems__(order[at : at + 4]), strict=True):
            assert sample == (source / f"{index:03d}").read_bytes()


@pytest.mark.parametrize("lane", ["local", "flight"])
def test_an_epoch_that_was_prefetched_asks_storage_for_nothing(
    tmp_path: Path, source: Path, lane: str
) -> None:
    with tc.LocalPool(tmp_path / "pool", capacity=256 * MIB, servers=2, lane=lane) as pool:
        dataset = tc.CachedDataset.from_files(source, pool=pool)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3)
        prefetch = dataset.prefetch(sampler, 0)
        until(lambda: prefetch.wait(60))
        assert asked(pool) == COUNT
        assert prefetch.progress().missing == ()
        assert (prefetch.staged, prefetch.staged_bytes) == (COUNT, COUNT * MIB)
        status = [order for server in pool.status() for order in server.orders]
        assert sum(order.chunks for order in status) == COUNT
        assert sum(order.ahead_bytes for order in status) == COUNT * MIB
        read(dataset, sampler, 0, source)
        assert asked(pool) == COUNT
        # Servers hear of what was read from their files now and then.
        until(lambda: read(dataset, sampler, 0, source) or prefetch.progress().position >= COUNT * 3 // 4)
        prefetch.cancel()
        until(lambda: not any(server.orders for server in pool.status()))


def test_a_cache_of_half_is_used_as_well_with_the_order_known(tmp_path: Path, source: Path) -> None:
    """Belady asks for 120 objects, an LRU cache for all 192. How near it comes, the benchmark `half` says."""
    epochs = 4
    # By flight a server knows at once what was read; of its files it hears now and then.
    with tc.LocalPool(tmp_path / "pool", capacity=COUNT * MIB // 2 + 4 * MIB, lane="flight") as pool:

        def this_epoch_and_the_next_are_told() -> bool:
            return sum(order.chunks for server in pool.status() for order in server.orders) == 2 * COUNT

        dataset = tc.CachedDataset.from_files(source, pool=pool)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3)
        prefetch = dataset.prefetch(sampler, 0, epochs=None)
        until(this_epoch_and_the_next_are_told)
        for epoch in range(epochs):
            read(dataset, sampler, epoch, source, lambda: until(this_epoch_and_the_next_are_told))
        prefetch.cancel()
        found = asked(pool)
        print(f"{found} objects were asked for")
        assert found <= 170


def test_an_order_is_told_again_to_a_server_that_lost_it(tmp_path: Path, source: Path) -> None:
    with tc.LocalPool(tmp_path / "pool", capacity=256 * MIB) as pool:
        dataset = tc.CachedDataset.from_files(source, pool=pool)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
        prefetch = dataset.prefetch(sampler, 0)
        until(lambda: prefetch.wait(60))
        [server] = pool.status()
        [order] = server.orders
        pool.forget_order(server.server_id, OrderKey(order.namespace, order.order))
        until(lambda: any(s.orders for s in pool.status()))
        prefetch.cancel()


def test_a_prefetch_ends_with_its_pool_and_starts_no_server(tmp_path: Path, source: Path) -> None:
    local = tc.LocalPool(tmp_path / "pool", capacity=256 * MIB)
    with local as pool:
        dataset = tc.CachedDataset.from_files(source, pool=pool)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
        prefetch = dataset.prefetch(sampler, 0, epochs=None)
        until(lambda: prefetch.staged > 0)
    with pytest.raises(ServerUnavailable, match="closed"):
        while not prefetch.wait(60):
            time.sleep(0.01)
    assert not pool.is_open
    assert not (tmp_path / "pool" / "server-0" / "endpoint.json").exists()
