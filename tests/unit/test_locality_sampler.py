"""LocalitySampler: the members of every global batch are torch's own; the ranks agree; most reads are local."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from tests.unit.sample_pool import SamplePool, pool
from torchcache import LocalitySampler
from torchcache.data import CachedDataset
from torchcache.data.locality import NOWHERE, handed_out
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.placement import Placement

__all__ = ["pool"]


def cached(pool: SamplePool, count: int, *, hosts: int, name: str = "numbers") -> CachedDataset:
    """Computed samples 0 to `count` - 1, in a pool with a server on each of so many hosts."""
    pool.addresses = {f"server {n}": f"node{n}:7440" for n in range(hosts)}
    return CachedDataset(list(range(count)), name=name, pool=pool)  # type: ignore[arg-type]


def ranks(dataset: Dataset[Any], world: int, **options: Any) -> list[LocalitySampler]:
    return [LocalitySampler(dataset, world, rank, **options) for rank in range(world)]


def torchs(dataset: Any, world: int, epoch: int, **options: Any) -> list[list[int]]:
    """What DistributedSampler itself gives each rank."""
    samplers = [DistributedSampler(dataset, world, rank, **options) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def batches(each: list[list[int]], size: int) -> list[Counter[int]]:
    """The global batches that ranks with these samples have."""
    return [Counter(i for mine in each for i in mine[at : at + size]) for at in range(0, len(each[0]), size)]


@settings(max_examples=60)
@given(
    count=st.integers(1, 90),
    nodes=st.integers(1, 4),
    each=st.integers(1, 3),
    batch=st.integers(1, 7),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_global_batch_has_the_members_that_torch_gives_it(
    count: int, nodes: int, each: int, batch: int, epoch: int, shuffle: bool, drop_last: bool
) -> None:
    world = nodes * each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchcache.data.cached.connect", lambda given: given)
        dataset = cached(SamplePool(), count, hosts=nodes)
    options = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
    ours = ranks(dataset, world, batch_size=batch, **options)
    for sampler in ours:
        sampler.set_epoch(epoch)
    given_out = [list(sampler) for sampler in ours]
    expected = torchs(dataset, world, epoch, **options)
    assert [len(mine) for mine in given_out] == [len(mine) for mine in expected] == list(map(len, ours))
    assert batches(given_out, batch) == batches(expected, batch)


def test_on_one_host_it_is_distributed_sampler(pool: SamplePool) -> None:
    dataset = cached(pool, 50, hosts=1)
    assert [list(sampler) for sampler in ranks(dataset, 3, batch_size=4)] == torchs(dataset, 3, 0)


@pytest.mark.parametrize("nodes", range(1, 9))
def test_most_reads_are_local(pool: SamplePool, nodes: int) -> None:
    """Beside a share of 1 / nodes that DistributedSampler has."""
    dataset = cached(pool, 8192, hosts=nodes)
    sampler = LocalitySampler(dataset, nodes * 2, 0, batch_size=64)
    share = sampler.local_share()
    print(f"{nodes} nodes: {share:.1%} of reads local, DistributedSampler {1 / nodes:.1%}")
    assert share > (0.9 if nodes > 1 else 0.9999)


def test_the_share_is_that_of_what_the_ranks_get(pool: SamplePool) -> None:
    dataset = cached(pool, 300, hosts=3)
    ours = ranks(dataset, 6, batch_size=8)
    nodes = {f"server {n}": n for n in range(3)}
    read = [(rank // 2, list(sampler)) for rank, sampler in enumerate(ours)]
    owners = dict(enumerate(dataset.owners(range(300), Placement(nodes))))
    local = sum(nodes[owners[index]] == node for node, mine in read for index in mine)
    assert local / 300 == pytest.approx(ours[0].local_share())


def test_ranks_get_alike_whatever_is_local() -> None:
    ranks = np.array([0, 0, 1, 1])
    nodes = np.array([1, 1, 1, 1, 1, NOWHERE, 0, NOWHERE])
    given = handed_out(nodes, ranks)
    assert np.bincount(given).tolist() == [2, 2, 2, 2]
    assert [ranks[rank] for rank in given[:4]] == [1, 1, 1, 1]  # the fifth finds no room there
    assert ranks[given[6]] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_where_it_stopped_with_forked_workers_too(
    pool: SamplePool, workers: int
) -> None:
    dataset = cached(pool, 61, hosts=2)
    numbers = list(range(61))  # what workers read: the sampler alone is of interest here

    def loaders() -> list[StatefulDataLoader]:
        samplers = ranks(dataset, 2, batch_size=4, seed=1)
        for sampler in samplers:
            sampler.set_epoch(3)
        return [StatefulDataLoader(numbers, 4, sampler=s, num_workers=workers) for s in samplers]

    for stop in (3,) if workers else (0, 3, 7):
        for whole, stopped, resumed in zip(loaders(), loaders(), loaders(), strict=True):
            expected = [batch.tolist() for batch in whole]
            reading = iter(stopped)
            assert [next(reading).tolist() for _ in range(stop)] == expected[:stop]
            resumed.load_state_dict(stopped.state_dict())
            assert [batch.tolist() for batch in resumed] == expected[stop:]


def test_a_state_within_a_batch_goes_on_with_the_same_placement_only(pool: SamplePool) -> None:
    first, again = (
        ranks(cached(pool, 40, hosts=2), 2, batch_size=4),
        ranks(cached(pool, 40, hosts=2), 2, batch_size=4),
    )
    reading = iter(first[0])
    had = [next(reading) for _ in range(6)]
    again[0].load_state_dict(first[0].state_dict())
    assert had + list(again[0]) == list(ranks(cached(pool, 40, hosts=2), 2, batch_size=4)[0])
    other = LocalitySampler(cached(pool, 40, hosts=1), 2, 0, batch_size=4)
    with pytest.raises(ConfigurationError, match="within a global batch"):
        other.load_state_dict(first[0].state_dict())
    assert sorted([*other, *ranks(cached(pool, 40, hosts=1), 2, batch_size=4)[1]]) == list(range(40))


@settings(max_examples=60)
@given(
    count=st.integers(1, 70),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=4),
    hosts=st.integers(1, 2),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_other_worlds_go_on_with_just_what_is_left(
    count: int, worlds: list[tuple[int, int]], hosts: int, drop_last: bool, data: st.DataObject
) -> None:
    """Ranks and batch sizes change several times in one epoch: the order is DistributedSampler's all the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchcache.data.cached.connect", lambda given: given)
        dataset = cached(SamplePool(), count, hosts=hosts)
    order = torchs(dataset, 1, 2, seed=4)[0]
    had: list[int] = []
    state: dict[str, Any] | None = None
    for world, batch in worlds:
        names = [f"node{rank % hosts}" for rank in range(world)] if hosts <= world else ["node0"] * world
        options = {"batch_size": batch, "seed": 4, "drop_last": drop_last, "hosts": names}
        now = ranks(dataset, world, **options)
        for sampler in now:
            sampler.set_epoch(2)
            if state is not None:
                sampler.load_state_dict(state)
        left = order[len(had) :]
        stop = data.draw(st.integers(0, len(left) // world // batch)) * batch
        passes = [iter(sampler) for sampler in now]
        had += [next(each) for _ in range(stop) for each in passes]
        assert Counter(had) == Counter(order[: len(had)])
        state = pickle.loads(pickle.dumps(data.draw(st.sampled_from(passes)).state_dict()))
        rest = Counter(i for each in passes for i in each)
        missing = Counter(order[len(had) :])
        if drop_last:
            assert rest <= missing
            assert (missing - rest).total() < world
        else:
            assert missing <= rest
            assert (rest - missing).total() < world


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_loaders_state_is_a_state_of_the_sampler(pool: SamplePool, batch_size: int | None) -> None:
    dataset = cached(pool, 20, hosts=1)

    def loader() -> StatefulDataLoader:
        sampler = LocalitySampler(dataset, 1, 0, batch_size=batch_size or 1)
        return StatefulDataLoader(list(range(20)), batch_size, sampler=sampler)

    stopped = loader()
    expected = torch.cat([torch.as_tensor(one).view(-1) for one in stopped]).tolist()
    at_the_end = stopped.state_dict()
    reading = iter(stopped)
    begun = stopped.state_dict()
    had = sum(torch.as_tensor(next(reading)).numel() for _ in range(2))
    within = stopped.state_dict()
    for state, left in ((at_the_end, expected), (begun, expected), (within, expected[had:])):
        sampler = LocalitySampler(dataset, 1, 0, batch_size=batch_size or 1)
        sampler.load_state_dict(state)
        assert list(sampler) == left
        assert list(sampler) == expected  # the next epoch
        again = loader()
        again.load_state_dict(state)
        again.load_state_dict(again.state_dict())  # saved anew before anything was read
        assert torch.cat([torch.as_tensor(one).view(-1) for one in again]).tolist() == left


def test_a_loader_without_a_state_of_its_sampler_is_refused(pool: SamplePool) -> None:
    dataset = cached(pool, 20, hosts=1)
    state = StatefulDataLoader(list(range(20)), 4, shuffle=True).state_dict()
    with pytest.raises(ConfigurationError, match="whose sampler has none"):
        LocalitySampler(dataset, 1, 0).load_state_dict(state)


@pytest.mark.parametrize("of_a_loader", [False, True])
def test_torchdatas_state_goes_on_when_it_is_told_how_many_ranks_there_were(
    pool: SamplePool, of_a_loader: bool
) -> None:
    dataset = cached(pool, 48, hosts=1)
    before = [StatefulDistributedSampler(dataset, 4, rank, seed=2) for rank in range(4)]
    had: list[int] = []
    for sampler in before:
        loader = StatefulDataLoader(list(range(48)), 1, sampler=sampler)
        reading = iter(loader)
        had += [int(next(reading)) for _ in range(3)]
        state = loader.state_dict() if of_a_loader else sampler.state_dict()
    after = ranks(dataset, 2, seed=2)
    for sampler in after:
        with pytest.raises(ConfigurationError, match="num_replicas"):
            sampler.load_state_dict(state)
        assert len(list(sampler)) == 24
        sampler.load_state_dict({**state, "num_replicas": 4})
    assert sorted([*had, *(i for sampler in after for i in sampler)]) == list(range(48))
    LocalitySampler(dataset, 2, 0).load_state_dict({"yielded": 0})  # nothing to lose


def test_between_batches_other_servers_may_go_on(pool: SamplePool) -> None:
    options = {"batch_size": 4, "seed": 2}
    before = ranks(cached(pool, 40, hosts=2), 2, **options)
    had = [[next(reading) for _ in range(8)] for reading in map(iter, before)]
    after = ranks(cached(pool, 40, hosts=1), 2, **options)
    for sampler in after:
        sampler.load_state_dict({"yielded": 8, "num_replicas": 2, "batch_size": 4, "placement": "another"})
    assert sorted(i for mine in [*had, *map(list, after)] for i in mine) == list(range(40))


def test_subsets_and_concatenations_lie_where_their_samples_do(pool: SamplePool) -> None:
    one, two = cached(pool, 20, hosts=3), cached(pool, 30, hosts=3, name="more")
    servers = list(pool.addresses)
    whole = ConcatDataset([Subset(one, [5, 3, 1]), two])
    placement = Placement(servers)
    expected = [one.owners([i], placement)[0] for i in (5, 3, 1)] + two.owners(range(30), placement)
    sampler = LocalitySampler(whole, 3, 0)
    found = sampler._nodes(np.arange(33))
    assert [servers[node] for node in found] == expected
    assert len(set(expected)) == 3


def test_it_pickles_and_feeds_a_loader(pool: SamplePool) -> None:
    dataset = cached(pool, 12, hosts=2)
    sampler = LocalitySampler(dataset, 2, 1, batch_size=3, shuffle=False)
    names = ["yielded", "start", "num_replicas", "batch_size", "placement"]
    assert list(pickle.loads(pickle.dumps(sampler.state_dict()))) == names
    read = [i for batch in DataLoader(list(range(12)), 3, sampler=sampler) for i in batch.tolist()]
    assert read == list(sampler)


@pytest.mark.parametrize(
    ("world", "options", "says"),
    [
        (3, {}, "3 ranks don't divide by the 2 hosts"),
        (2, {"hosts": ["node0"]}, "names 1 hosts"),
        (2, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_doesnt_fit_is_said(pool: SamplePool, world: int, options: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        LocalitySampler(cached(pool, 10, hosts=2), world, 0, **options)


def test_other_datasets_are_refused(pool: SamplePool) -> None:
    with pytest.raises(ConfigurationError, match="is for a CachedDataset"):
        LocalitySampler(list(range(5)), 2, 0)  # type: ignore[arg-type]


def test_a_pool_that_isnt_known_whole_is_refused(pool: SamplePool) -> None:
    dataset = cached(pool, 10, hosts=2)
    pool.addresses = ServerUnavailable("node1:7440 can't be reached")
    with pytest.raises(ServerUnavailable, match="node1"):
        LocalitySampler(dataset, 2, 0)


def test_hosts_may_be_addresses_where_servers_share_one(pool: SamplePool) -> None:
    dataset = cached(pool, 400, hosts=2)
    pool.addresses = {"server 0": "127.0.0.1:1", "server 1": "127.0.0.1:2"}
    apart = LocalitySampler(dataset, 2, 0, batch_size=32, hosts=["127.0.0.1:2", "127.0.0.1:1"])
    assert 0.8 < apart.local_share() < 1
    assert LocalitySampler(dataset, 2, 0, batch_size=32).local_share() == 1.0


def test_a_rank_that_runs_elsewhere_says_so(pool: SamplePool, caplog: pytest.LogCaptureFixture) -> None:
    dataset = cached(pool, 10, hosts=2)
    pool.lanes = {"node1:7440": "local", "node0:7440": "flight"}
    LocalitySampler(dataset, 2, 1)
    assert not caplog.text
    LocalitySampler(dataset, 2, 0)
    assert "runs on the host of node1:7440" in caplog.text
