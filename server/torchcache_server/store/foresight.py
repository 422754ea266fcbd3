"""What readers told of the order in which they will read a dataset: by whom, for how long, and what comes of it.

An order is one reader's: a rank's, of one dataset. It has epochs, of which the first that isn't over runs, and it is
forgotten once its reader hasn't said for a while that it is still there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from torchcache.marks import Marks, marks
from torchcache_server.store.epochs import Distances, Epoch
from torchcache_server.store.eviction import NEVER

_EPOCHS: Final = 3
"""Of an order: the one that runs, the next, and one that is just over."""

_NOTED: Final = 1 << 16
"""Uses noted down that nobody has asked about yet; the oldest are forgotten."""


@dataclass(slots=True)
class Told:
    """One reader's order. `until_s`: when it is forgotten, time.monotonic()."""

    until_s: float
    epochs: dict[int, Epoch] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return sum(epoch.count for epoch in self.epochs.values())


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a reader is: `position` samples into `epoch`; -1 before it begins. `left_s` until it is forgotten."""

    order: str
    epoch: int
    position: int
    length: int
    chunks: int
    left_s: float


class Foresight:
    """The orders of one dataset. Thread-safe. Distances count samples from where each reader is, so `now` is 0."""

    now = 0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, Told] = {}
        self._used: deque[bytes] = deque(maxlen=_NOTED)
        self._used_marks: deque[Marks] = deque(maxlen=_NOTED)

    def __bool__(self) -> bool:
        return bool(self._told)

    # ---- what readers say ----

    def tell(self, order: str, number: int, epoch: Epoch, lease_s: float) -> None:
        """Takes in epoch `number` of an order; one that was told before is replaced. The last three are kept."""
        with self._lock:
            self._settle()
            told = self._told.setdefault(order, Told(0.0))
            told.until_s = self._clock() + lease_s
            told.epochs[number] = epoch
            told.epochs = {n: told.epochs[n] for n in sorted(told.epochs)[-_EPOCHS:]}

    def renew(self, order: str, lease_s: float, *, running: int | None = None) -> bool:
        """The reader is still there, and maybe says which epoch runs; False if the order isn't known (any more)."""
        with self._lock:
            told = self._told.get(order)
            if told is None:
                return False
            told.until_s = self._clock() + lease_s
            if running in told.epochs and not told.epochs[running].begun:
                self._settle()
                told.epochs[running].begun = True
                told.epochs = {n: told.epochs[n] for n in told.epochs if n >= running}
            return True

    def forget(self, order: str) -> None:
        """The reader goes; unknown is fine."""
        with self._lock:
            self._told.pop(order, None)

    def expire(self) -> None:
        """Forgets the orders of readers that are gone."""
        now_s = self._clock()
        with self._lock:
            self._told = {order: told for order, told in self._told.items() if told.until_s > now_s}

    # ---- what was read ----

    def used(self, key: bytes) -> None:
        """The chunk was read. Cheap: what follows from it is found out when somebody asks."""
        self._used.append(key)

    def used_marks(self, chunks: Marks) -> None:
        """Chunks were read."""
        self._used_marks.append(chunks)

    def _settle(self) -> None:
        """Counts the uses noted down. Under the lock."""
        noted = [self._used.popleft() for _ in range(len(self._used))]
        seen = [self._used_marks.popleft() for _ in range(len(self._used_marks))]
        if noted:
            seen.append(marks(noted))
        if not seen or not self._told:
            return
        chunks, counts = np.unique(np.concatenate(seen), return_counts=True)
        for told in self._told.values():
            _take(told, chunks, counts.astype(np.int64))

    # ---- what is asked ----

    def next_use(self, key: bytes) -> int:
        """How many samples from now the chunk is needed; NEVER."""
        return self.next_uses([key])[0]

    def next_uses(self, keys: Sequence[bytes]) -> list[int]:
        """`next_use` of many."""
        if not keys:
            return []
        wanted = marks(keys)
        with self._lock:
            self._settle()
            found = np.full(len(wanted), NEVER, np.int64)
            for told in self._told.values():
                found = np.minimum(found, _to_come(told, wanted))
        return found.tolist()

    def standing(self, order: str) -> Standing | None:
        """Where the reader of an order is; None if it isn't known."""
        with self._lock:
            self._settle()
            told = self._told.get(order)
            return None if told is None else self._standing(order, told)

    def standings(self) -> list[Standing]:
        """Where all readers are."""
        with self._lock:
            self._settle()
            return [self._standing(order, told) for order, told in sorted(self._told.items())]

    @property
    def chunks(self) -> int:
        """Of all epochs of all orders: what bounds the memory they take."""
        with self._lock:
            return sum(told.chunks for told in self._told.values())

    def _standing(self, order: str, told: Told) -> Standing:
        begun = [number for number, epoch in told.epochs.items() if epoch.begun]
        read = [number for number in begun if told.epochs[number].now >= 0]
        number = (read[-1:] or begun[:1] or sorted(told.epochs)[:1] or [0])[0]
        epoch = told.epochs.get(number)
        position = epoch.now + 1 if epoch is not None and epoch.begun else -1
        length = epoch.length if epoch is not None else 0
        return Standing(order, number, position, length, told.chunks, told.until_s - self._clock())


def _take(told: Told, chunks: Marks, counts: Distances) -> None:
    """The uses go to the first epoch that still expects them."""
    before: Epoch | None = None
    for epoch in told.epochs.values():
        if before is not None and before.is_over:
            epoch.begun = True
        counts = epoch.used(chunks, counts)
        left = counts > 0
        chunks, counts, before = chunks[left], counts[left], epoch
        if not len(chunks):
            break
    over = [number for number, epoch in told.epochs.items() if epoch.begun][:-1]
    for number in over:
        later = told.epochs[min(n for n in told.epochs if n > number)]
        if later.now > later.length // 50:  # nobody comes late any more
            del told.epochs[number]


def _to_come(told: Told, wanted: Marks) -> Distances:
    found = np.full(len(wanted), NEVER, np.int64)
    offset = 0
    for epoch in told.epochs.values():
        there = epoch.to_come(wanted)
        found = np.minimum(found, np.where(there == NEVER, NEVER, there + offset))
        offset += epoch.left
    return found
