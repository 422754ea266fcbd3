"""The order of an epoch: every sample once, any position at once, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.data.iterable_order import Order, OrderKey, Shuffle, permuted

BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(lambda b: np.array(b, dtype=np.int64))
SHUFFLES: list[Shuffle] = ["none", "records", "blocks"]


def key(shuffle: Shuffle, seed: int = 0, epoch: int = 0, window: int = 16) -> OrderKey:
    return OrderKey(shuffle=shuffle, seed=seed, epoch=epoch, window=window)


def whole(order: Order) -> list[int]:
    return [int(i) for i in order.ids(np.arange(order.count))]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@given(BLOCKS, st.integers(-5, 2**70), st.integers(0, 2**40), st.integers(1, 50))
def test_every_sample_once(shuffle: Shuffle, blocks: np.ndarray, seed: int, epoch: int, window: int) -> None:
    order = Order(blocks, key(shuffle, seed, epoch, window))
    assert sorted(whole(order)) == list(range(int(blocks.sum())))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@given(BLOCKS, st.data())
def test_any_position_at_once(shuffle: Shuffle, blocks: np.ndarray, data: st.DataObject) -> None:
    order = Order(blocks, key(shuffle, 3, 1))
    asked = data.draw(st.lists(st.integers(0, order.count - 1))) if order.count else []
    expected = whole(order)
    assert order.ids(np.array(asked, dtype=np.int64)).tolist() == [expected[p] for p in asked]


@given(st.integers(1, 70_000), st.integers(0, 2**64 - 1))
def test_permutations_of_any_size_are_permutations(size: int, number: int) -> None:
    """Also those beyond the size of a table, which are walked."""
    assert np.array_equal(np.sort(permuted(np.arange(size), size, number)), np.arange(size))


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 100_003, 1 << 18])
def test_a_large_permutation_spreads(size: int) -> None:
    """Neighbours end up anywhere: a tenth of the positions has a tenth of each tenth of the samples."""
    found = permuted(np.arange(size), size, 12345)
    assert len(np.unique(found)) == size
    tenths = np.histogram(found[: size // 10], bins=10, range=(0, size))[0]
    assert np.abs(tenths - size / 100).max() < 5 * np.sqrt(size / 100)
    steps = np.abs(np.diff(found.astype(np.float64)))
    assert abs(steps.mean() - size / 3) < size / 100


def test_seeds_and_epochs_differ_and_repeat() -> None:
    blocks = np.full(10, 30)
    orders = {
        (shuffle, seed, epoch): tuple(whole(Order(blocks, key(shuffle, seed, epoch))))
        for shuffle in ("records", "blocks")
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    again = whole(Order(blocks, key("blocks", 2, 1)))
    assert tuple(again) == orders["blocks", 2, 1]


def test_the_order_is_that_of_the_first_release() -> None:
    """States that lie on disks mean these orders: they don't change."""
    blocks = np.array([3, 4, 5])
    assert whole(Order(blocks, key("none"))) == list(range(12))
    assert whole(Order(blocks, key("records", 7, 1))) == [9, 10, 3, 8, 1, 6, 11, 7, 0, 5, 4, 2]
    assert whole(Order(blocks, key("blocks", 7, 1, window=4))) == [6, 3, 5, 4, 8, 9, 10, 7, 0, 2, 1, 11]
    assert permuted(np.arange(5), 1_000_003, 99).tolist() == [572726, 164451, 33274, 40353, 235786]


def test_blocks_are_shuffled_and_mixed_only_within_windows() -> None:
    blocks = np.full(8, 10)
    order = Order(blocks, key("blocks", 1, 0, window=20))
    found = whole(order)
    for at in range(0, 80, 20):
        assert len({i // 10 for i in found[at : at + 20]}) == 2  # two whole blocks
        assert order.window_end(at) == order.window_end(at + 19) == at + 20
    assert found[:20] != sorted(found[:20])
    assert [i // 10 for i in found] != sorted(i // 10 for i in found)
