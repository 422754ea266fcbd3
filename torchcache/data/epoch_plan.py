"""One epoch as it is told to servers and staged: what of it is here, coming, and still to be asked for. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from torchcache.data.chunk_table import ChunkTable, Ints, chunks_of
from torchcache.errors import TorchCacheError
from torchcache.model import ChunkId
from torchcache.pool.orders import AheadChunk, OrderKey, StagedAhead, ToldOrder

WINDOW: Final = 512
"""Chunks asked for at a time: some are coming, and behind them it must be known what is here already."""

HELD_UP: Final = 128
"""So many while not all of them can be had yet: twice what servers fetch of an order at a time."""

LATER: Final = 16
LATER_MOST: Final = 64
"""Of an epoch that hasn't begun, so many at a time, once those before are here: more where all were here already.

Servers fetch these only while nobody waits for storage, and go on to treat them so when the epoch has begun: whatever
is asked for then goes before them, though it is needed later. They would come when their reader waits for them.
"""


@dataclass(slots=True)
class Share:
    """What one server owns of an epoch. Chunks to be staged are numbered in the order of their first read."""

    server: str
    chunks: Ints  # all, by their numbers in the table, in the order of reading
    positions: Ints  # of the samples that read them
    firsts: Ints  # places in these two: each chunk once
    next: int = 0
    open: list[int] = field(default_factory=list)  # asked for and not yet here: numbers below `next`
    here: int = 0  # of these, here already, but behind what there is no room for yet
    is_held_up: bool = False  # not all that was asked for could be had
    is_late: bool = False  # and nothing is coming: there is no room for what comes next
    told: bool = False
    failed: dict[int, TorchCacheError] = field(default_factory=dict)
    trouble: TorchCacheError | None = None  # why the server can't be asked now
    asked_s: float = float("-inf")
    reached: tuple[int, int] = (0, -1)  # epoch and position, as the server sees it
    step: int = LATER  # how many to ask for next, of an epoch that hasn't begun
    ahead_bytes: int = 0

    def window(self, *, begun: bool) -> list[int]:
        """The chunks to ask for now, of an epoch that has begun, or hasn't."""
        if not begun:
            self._open(0 if self.open else self.step)
        elif not self.is_held_up:
            self._open(WINDOW - len(self.open))
        return self.open[:HELD_UP] if self.is_held_up else list(self.open)

    def _open(self, more: int) -> None:
        end = min(self.next + max(0, more), len(self.firsts))
        self.open += range(self.next, end)
        self.next = end

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be asked for."""
        return self.next == len(self.firsts) and not self.open

    @property
    def settled(self) -> int:
        """Chunks that are here, read already, or failed."""
        return self.next - len(self.open) + self.here


class EpochPlan:
    """An epoch of one reader's order, by the servers that own its chunks."""

    def __init__(
        self,
        key: OrderKey,
        epoch: int,
        order: Sequence[int] | Ints,
        table: ChunkTable,
        servers: Sequence[str],
        *,
        running: bool,
    ) -> None:
        """`running`: the epoch runs, or is the next that does."""
        self.key, self.epoch, self.running = key, epoch, running
        self._order = np.asarray(order, np.int64)
        self._table = table
        positions, chunks = table.of(self._order)
        owners = table.owners[chunks]
        self.shares: list[Share] = []
        for number, server in enumerate(servers):
            mine = np.flatnonzero(owners == number)
            if len(mine):
                _, first = np.unique(table.marks[chunks[mine]], return_index=True)
                self.shares.append(Share(server, chunks[mine], positions[mine], np.sort(first)))
        self.began_s: float | None = None  # when its staging began
        self.staged_bytes = 0
        self.fetched_chunks = 0
        self._coming: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._order)

    def window(self, share: Share) -> list[int]:
        """The chunks of a share to ask for now, by their numbers."""
        return share.window(begun=self.running or share.reached >= (self.epoch, 0))

    def told(self, share: Share) -> ToldOrder:
        """What the server is told."""
        return ToldOrder(
            key=self.key,
            epoch=self.epoch,
            length=len(self._order),
            marks=self._table.marks[share.chunks],
            positions=share.positions.astype(np.uint32),
            running=self.running,
        )

    def wanted(self, share: Share, numbers: Iterable[int]) -> list[AheadChunk]:
        """Chunks of a share as they are asked for."""
        places = share.firsts[list(numbers)]
        positions = share.positions[places]
        samples = self._order[positions]
        within = share.chunks[places] - self._table.firsts[samples]
        extents = self._table.extents(samples.tolist())
        return [
            AheadChunk(extent.object, chunks_of(extent)[k], position)
            for extent, k, position in zip(extents, within.tolist(), positions.tolist(), strict=True)
        ]

    def answered(
        self, share: Share, numbers: Sequence[int], wanted: Sequence[AheadChunk], reply: StagedAhead
    ) -> bool:
        """Takes in how it is with the chunks asked for, the first that are open; says whether something has changed.

        What is here behind something that there is no room for is asked for again: it is needed later than that, and
        may have to yield to it.
        """
        settled_before = share.settled
        still: list[int] = []
        here, is_behind = 0, False
        share.is_held_up = "later" in reply.states
        share.is_late = share.is_held_up and "coming" not in reply.states
        share.reached, share.ahead_bytes = (reply.epoch, reply.position), reply.ahead_bytes
        share.step = LATER if "coming" in reply.states else min(2 * share.step, LATER_MOST)
        for at, (number, chunk, state) in enumerate(zip(numbers, wanted, reply.states, strict=False)):
            is_behind = is_behind or state == "later"
            if state in ("coming", "later"):
                still.append(number)
                if state == "coming":
                    self._coming.add((share.server, number))
                continue
            if state == "here" and is_behind:
                still.append(number)
                here += 1
                continue
            if (share.server, number) in self._coming:
                self._coming.discard((share.server, number))
                self.fetched_chunks += state == "here"
            if state == "failed":
                share.failed[number] = reply.errors.get(at) or TorchCacheError("the server doesn't say why")
            else:
                id_ = ChunkId(chunk.object.id, chunk.chunk)
                self.staged_bytes += id_.length(chunk.object.size)
        share.open = still + share.open[len(numbers) :]
        share.here = here
        return share.settled > settled_before

    @property
    def is_done(self) -> bool:
        """Whether all of it is here, read already, or failed."""
        return all(share.is_done for share in self.shares)

    @property
    def staged(self) -> int:
        """Samples that are done, as their chunks are: exact at the end, else about."""
        chunks = sum(len(share.firsts) for share in self.shares)
        settled = sum(share.settled - len(share.failed) for share in self.shares)
        return len(self) * settled // chunks if chunks else len(self)

    def missing(self) -> Counter[tuple[str, str]]:
        """How many chunks aren't here, by server's id and why."""
        found: Counter[tuple[str, str]] = Counter()
        for share in self.shares:
            for error in share.failed.values():
                found[share.server, str(error)] += 1
            left = len(share.firsts) - share.settled
            if not left:
                continue
            if share.trouble is not None:
                why = str(share.trouble)
            elif share.is_late:
                why = "no room yet: what is there is needed sooner"
            else:
                why = "on its way"
            found[share.server, why] += left
        return found
