"""The order of an epoch: which sample stands at a position. Pure.

It is a function of what the dataset holds, the seed and the epoch alone; which rank and worker reads a position is
decided elsewhere (iterable_position.py). Any position can be asked for at once: nothing is drawn one after the other.

No generator of numpy or torch is used, whose streams may change with a release: a state saved today must mean the same
order in a year. `mixed` is the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["none", "records", "blocks"]
"""Source order; all records anywhere; blocks (row groups, shards) anywhere and records within a window of them."""

Ints = NDArray[np.int64]

_TABLE = 1 << 16
"""Up to this size a permutation is a table; beyond, a Feistel network, which needs no memory."""

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderKey:
    """Which of the orders of one dataset. `window` is the number of samples mixed when blocks are shuffled."""

    shuffle: Shuffle
    seed: int
    epoch: int
    window: int


class Order:
    """The order of one epoch over the samples of `blocks`, which lie one behind the other.

    `blocks` holds the number of samples of each block; sample ids count through all of them in source order. Only for
    the shuffle "blocks" do the bounds between them matter.
    """

    def __init__(self, blocks: Ints, key: OrderKey) -> None:
        self._key = key
        self._starts = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self.count = int(self._starts[-1])
        if key.shuffle == "blocks":
            self._turns = permuted(np.arange(len(blocks)), len(blocks), derived(key.seed, key.epoch, 0))
            self._ends = np.cumsum(blocks[self._turns], dtype=np.int64)

    @property
    def reach(self) -> int:
        """How many positions one reads together; 0 if any number will do."""
        return self._key.window if self._key.shuffle == "blocks" else 0

    def ids(self, positions: Ints) -> Ints:
        """The samples at `positions`, each from 0 to `count` - 1."""
        key = self._key
        if key.shuffle == "none" or not len(positions):
            return positions
        if key.shuffle == "records":
            return permuted(positions, self.count, derived(key.seed, key.epoch, 1))
        places = self._mixed_in_windows(positions)
        turn = np.searchsorted(self._ends, places, side="right")
        block = self._turns[turn]
        found: Ints = self._starts[block + 1] - (self._ends[turn] - places)
        return found

    def window_end(self, position: int) -> int:
        """The first position behind the window of `position`."""
        if self._key.shuffle != "blocks":
            return self.count
        return min(self.count, (position // self._key.window + 1) * self._key.window)

    def _mixed_in_windows(self, positions: Ints) -> Ints:
        width = self._key.window
        windows = positions // width
        places = np.empty_like(positions)
        for window in np.unique(windows):
            here = windows == window
            first = int(window) * width
            size = min(width, self.count - first)
            key = derived(self._key.seed, self._key.epoch, 2 + int(window))
            places[here] = first + permuted(positions[here] - first, size, key)
        return places


def derived(seed: int, epoch: int, number: int) -> int:
    """A key of 64 bits for each purpose `number` of an epoch."""
    key = 0
    for part in (seed, epoch, number):
        word = np.array([(key + part * _GOLDEN + 1) & _MASK], dtype=np.uint64)
        key = int(mixed(word)[0])
    return key


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words whose result looks random."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(positions: Ints, size: int, key: int) -> Ints:
    """Where a pseudo-random permutation of [0, size) takes each of `positions`."""
    if size <= _TABLE:
        return _table(size, key)[positions]
    half = np.uint64((size.bit_length() + 1) // 2)
    # The network permutes a power of four; a walk through it from inside [0, size) comes back there.
    words = positions.astype(np.uint64)
    outside = np.ones(len(words), dtype=bool)
    while outside.any():
        words[outside] = _network(words[outside], half, key)
        outside = words >= np.uint64(size)
    return words.astype(np.int64)


@lru_cache(maxsize=32)
def _table(size: int, key: int) -> Ints:
    words = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return np.argsort(mixed(words), kind="stable")


def _network(words: NDArray[np.uint64], half: np.uint64, key: int) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & mask
    for number in range(_ROUNDS):
        round_key = np.uint64((key + number * _GOLDEN) & _MASK)
        left, right = right, left ^ (mixed(right + round_key) & mask)
    return (left << half) | right
