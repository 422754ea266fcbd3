"""One pass of one reader over its share of an epoch: what it reads next, and the state from which another goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from torchcache.data.iterable_order import Ints, Order
from torchcache.data.iterable_position import Rest, Split
from torchcache.data.iterable_reading import Reading
from torchcache.threads import Threads

STATE: Final = 2
"""The version of states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """An epoch as all of its readers see it: what of it is left, and how many places of that are dealt out."""

    number: int
    seed: int
    rest: Rest
    total: int
    split: Split


class Pass:
    """A reader's way through its share. `count` is how many of its samples were handed out."""

    def __init__(self, epoch: Epoch, rank: int, worker: int, count: int = 0) -> None:
        self.epoch = epoch
        self.rank = rank
        self.worker = worker
        self.count = count
        self.share = epoch.split.share(epoch.total, rank, worker)

    @property
    def number(self) -> int:
        """The epoch's."""
        return self.epoch.number

    def state(self) -> dict[str, Any]:
        """Plain values, new ones at each call."""
        epoch, split = self.epoch, self.epoch.split
        return {
            "torchcache": STATE,
            "epoch": epoch.number,
            "seed": epoch.seed,
            "left": epoch.rest.plain(),
            "total": epoch.total,
            "split": [split.ranks, split.workers, split.run, int(split.contiguous)],
            "worker": self.worker,
            "count": self.count,
        }

    def samples(self, order: Order, reading: Reading) -> Iterator[tuple[int, Any]]:
        """(id, outcome) of what is left of the share, in order; the next part is read while one is handed out."""
        with Threads(1, name="torchcache-read-ahead") as threads:
            parts = self._parts(order, reading)
            ids = next(parts, None)
            coming = threads.submit(reading.fetch, ids) if ids is not None else None
            while ids is not None and coming is not None:
                here, outcomes = ids, coming.result()
                ids = next(parts, None)
                coming = threads.submit(reading.fetch, ids) if ids is not None else None
                for number, outcome in zip(here.tolist(), outcomes, strict=True):
                    self.count += 1
                    yield number, outcome

    def _parts(self, order: Order, reading: Reading) -> Iterator[Ints]:
        """The ids of the samples, in parts that are read at once: within a window of the order."""
        at = self.count
        step = order.reach or reading.at_once
        while at < self.share:
            stop = min(at + step, self.share)
            places = self.epoch.split.places(self.epoch.total, self.rank, self.worker, at, stop)
            positions = self.epoch.rest.positions(places) % order.count
            first = int(positions[0])
            beyond = (positions >= order.window_end(first)) | (
                positions < first
            )  # the epoch's end, and its padding
            ids = order.ids(positions[: int(beyond.argmax()) or len(positions)])
            length = reading.cut(ids)
            yield ids[:length]
            at += length
