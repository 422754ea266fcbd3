"""Who reads which positions of an epoch, and what is left of it. Pure.

An epoch is the positions 0, 1, 2, ...; those from the number of samples on are the same samples once more, for ranks
that have to be even. What is left of an epoch is a `Rest`; its members are counted by *places*, 0 being the first that
is left. A `Split` deals the places out to ranks and workers. A reader goes through its share in order, so that its
position is a count; with the counts of all of them the next Rest follows, for any other split.

All ranks are taken to be in step, as training is: after a batch of one each has had a batch of the same size. Where
they aren't even, no worker of another rank has more than that of rank 0, and what it lacks are its last ones: so the
counts of rank 0 say what all have had.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from torchcache.data.iterable_order import Ints
from torchcache.errors import ConfigurationError

Uneven = Literal["pad", "drop", "keep"]
"""Of samples that don't divide by the ranks some are read twice, or are left out, or ranks differ by one."""

Interval = tuple[int, int]
"""From the first to before the second."""


@dataclass(frozen=True, slots=True)
class Rest:
    """The positions of an epoch that nobody has had: those in `runs`, in order and apart, and all from `start` on."""

    runs: tuple[Interval, ...] = ()
    start: int = 0

    def left(self, count: int) -> int:
        """How many of the positions below `count` are left."""
        return sum(stop - first for first, stop in self.runs_below(count))

    def runs_below(self, count: int) -> list[Interval]:
        """The runs of positions below `count`."""
        clipped = ((first, min(stop, count)) for first, stop in (*self.runs, (self.start, count)))
        return [(first, stop) for first, stop in clipped if first < stop]

    def positions(self, places: Ints) -> Ints:
        """The positions at `places`."""
        firsts = np.array([first for first, _ in self.runs] + [self.start], dtype=np.int64)
        lengths = np.array([stop - first for first, stop in self.runs], dtype=np.int64)
        ends = np.cumsum(lengths, dtype=np.int64)
        run = np.searchsorted(ends, places, side="right")
        before = np.concatenate([np.zeros(1, np.int64), ends])
        found: Ints = firsts[run] + places - before[run]
        return found

    def without(self, taken: Iterable[Interval]) -> Rest:
        """What is left when the places in `taken`, which may overlap, are had too."""
        kept, at = [], 0
        for first, stop in sorted(taken):
            if first > at:
                kept.append((at, first))
            at = max(at, stop)
        runs = [run for interval in kept for run in self._runs(interval)]
        start = int(self.positions(np.array([at]))[0])
        # Behind the last place taken lie the rest of its run and the runs after it.
        runs += [(max(first, start), stop) for first, stop in self.runs if stop > start]
        return Rest(tuple(_joined(runs)), max(start, self.start))

    def _runs(self, places: Interval) -> list[Interval]:
        found, at = [], 0
        for first, stop in (*self.runs, (self.start, self.start + places[1])):
            low, high = max(places[0], at), min(places[1], at + stop - first)
            if low < high:
                found.append((first + low - at, first + high - at))
            at += stop - first
        return found

    def plain(self) -> list[int]:
        """As numbers for a state: first and stop of each run, then `start`."""
        return [number for run in self.runs for number in run] + [self.start]

    @classmethod
    def of_plain(cls, numbers: Sequence[int]) -> Rest:
        """From `plain`. Raises ConfigurationError for anything else."""
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(numbers) % 2 == 0:
            raise ConfigurationError(
                "a dataset's state is damaged: what is left of the epoch is no list of runs"
            )
        bounds = itertools.pairwise(numbers[:-1])
        if any(a >= b for a, b in bounds) or (len(numbers) > 1 and numbers[-2] > numbers[-1]):
            raise ConfigurationError(
                "a dataset's state is damaged: what is left of the epoch is out of order"
            )
        return cls(tuple(zip(numbers[:-1:2], numbers[1::2], strict=True)), numbers[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How the places of a rest are dealt out to `ranks` times `workers` readers.

    Contiguous: each reader has one piece. Else they are dealt out in rounds: `ranks * run` places to the first worker
    of all ranks, one by one from rank to rank, then as many to the next workers. With `run` the batch size of the
    loader, which asks its workers in turn, batches are then those that one worker would make.
    """

    ranks: int
    workers: int
    run: int = 1
    contiguous: bool = False

    def with_workers(self, workers: int) -> Split:
        """The same with another number of workers."""
        return replace(self, workers=workers)

    def total(self, left: int, uneven: Uneven) -> int:
        """The places that are dealt out of `left`: all of them, or as many as `ranks` divides."""
        if uneven == "keep" or not left:
            return left
        return (left + (self.ranks - 1 if uneven == "pad" else 0)) // self.ranks * self.ranks

    def share(self, total: int, rank: int, worker: int) -> int:
        """How many places of `total` this reader has."""
        if self.contiguous:
            first, stop = self._piece(total, rank, worker)
            return stop - first
        block = self.ranks * self.run
        rounds, rest = divmod(total, self.workers * block)
        last = min(max(rest - worker * block, 0), block)
        return rounds * self.run + (last - rank + self.ranks - 1) // self.ranks

    def places(self, total: int, rank: int, worker: int, first: int, stop: int) -> Ints:
        """The places number `first` to before `stop` of this reader's share."""
        numbers = np.arange(first, stop, dtype=np.int64)
        if self.contiguous:
            return self._piece(total, rank, worker)[0] + numbers
        block, within = np.divmod(numbers, self.run)
        dealt: Ints = (block * self.workers + worker) * self.ranks * self.run + within * self.ranks + rank
        return dealt

    def taken(self, total: int, counts: Sequence[int]) -> list[Interval]:
        """The places of `total` that are had when worker i of every rank has had `counts[i]` of its share."""
        if self.contiguous:
            pieces = [
                (self._piece(total, rank, worker), count)
                for worker, count in enumerate(counts)
                for rank in range(self.ranks)
            ]
            return [(first, min(stop, first + count)) for (first, stop), count in pieces]
        block = self.ranks * self.run
        whole = min(count // self.run for count in counts)
        had = [(0, whole * self.workers * block)]
        for worker, count in enumerate(counts):
            for number in range(whole, -(-count // self.run)):
                first = (number * self.workers + worker) * block
                had.append((first, first + min(self.run, count - number * self.run) * self.ranks))
        return [(first, min(stop, total)) for first, stop in had if first < min(stop, total)]

    def _piece(self, total: int, rank: int, worker: int) -> Interval:
        first, stop = _part(total, self.ranks, rank)
        start, end = _part(stop - first, self.workers, worker)
        return first + start, first + end


def _part(count: int, parts: int, number: int) -> Interval:
    """Part `number` of `count`; the first ones are longer by one where it doesn't divide."""
    each, longer = divmod(count, parts)
    first = number * each + min(number, longer)
    return first, first + each + (number < longer)


def _joined(runs: Iterable[Interval]) -> list[Interval]:
    """Runs in order, those that touch made one."""
    joined: list[Interval] = []
    for first, stop in sorted(runs):
        if joined and joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined
