"""What eviction keeps: hit rates of the store's policy, simulated, beside LRU and Belady's optimum.

Ours is the store's own choice of what yields
(`torchcache_server.store.eviction`), over segments as in the store; what it moves to rescue it is counted.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from torchcache_server.store.eviction import NEVER, SLACK_SEGMENTS, Held, choose_yielding
from torchcache_server.store.ordering import ReadingOrder

from benchmarks.findings import Findings, Goal, Row, Scale

SEGMENT_CHUNKS: Final = 20
LOOK_AT: Final = 16

Accesses = Sequence[int]


@dataclass(slots=True)
class Outcome:
    """Of one policy over one sequence. `moved` are chunks copied within the store."""

    hits: int = 0
    filled: int = 0
    moved: int = 0


def lru(accesses: Accesses, capacity: int) -> Outcome:
    """Keeps what was used last."""
    held: OrderedDict[int, None] = OrderedDict()
    outcome = Outcome()
    for chunk in accesses:
        if chunk in held:
            outcome.hits += 1
            held.move_to_end(chunk)
            continue
        if len(held) >= capacity:
            held.popitem(last=False)
        held[chunk] = None
        outcome.filled += 1
    return outcome


def belady(accesses: Accesses, capacity: int) -> Outcome:
    """The optimum: keeps what is needed next, and doesn't take in what is needed later than all that."""
    following = next_uses(accesses)
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    outcome = Outcome()
    for now, chunk in enumerate(accesses):
        outcome.hits += chunk in held
        if chunk not in held and len(held) >= capacity:
            while held.get(farthest[0][1]) != -farthest[0][0]:
                heappop(farthest)
            if -farthest[0][0] <= following[now]:
                continue
            del held[heappop(farthest)[1]]
        outcome.filled += chunk not in held
        held[chunk] = following[now]
        heappush(farthest, (-following[now], chunk))
    return outcome


def resident_stays(accesses: Accesses, capacity: int) -> Outcome:
    """Ours without an order: what is in stays in."""
    held: set[int] = set()
    outcome = Outcome()
    for chunk in accesses:
        if chunk in held:
            outcome.hits += 1
        elif len(held) < capacity:
            held.add(chunk)
            outcome.filled += 1
    return outcome


@dataclass(slots=True)
class _Segments:
    """Chunks in append-only segments, as the store has them."""

    chunks: dict[int, set[bytes]] = field(default_factory=dict)
    tails: dict[int, int] = field(default_factory=dict)
    place: dict[bytes, int] = field(default_factory=dict)
    last: int = -1

    def append(self, key: bytes) -> None:
        if self.tails.get(self.last, SEGMENT_CHUNKS) == SEGMENT_CHUNKS:
            self.last += 1
            self.chunks[self.last], self.tails[self.last] = set(), 0
        self.chunks[self.last].add(key)
        self.tails[self.last] += 1
        self.place[key] = self.last

    def drop(self, number: int) -> None:
        for key in self.chunks.pop(number):
            del self.place[key]
        del self.tails[number]


def farthest_yields(accesses: Accesses, capacity: int) -> Outcome:
    """Ours with the order known."""
    keys = [b"%d" % chunk for chunk in accesses]
    order = ReadingOrder(keys)
    chance = random.Random(0)
    held = _Segments()
    outcome = Outcome()
    for key in keys:
        order.used(key)
        if key in held.place:
            outcome.hits += 1
            continue
        while sum(held.tails.values()) >= capacity and _yield_one(held, order, key, chance, outcome):
            pass
        if sum(held.tails.values()) < capacity:
            held.append(key)
            outcome.filled += 1
    return outcome


def _yield_one(
    held: _Segments, order: ReadingOrder, key: bytes, chance: random.Random, outcome: Outcome
) -> bool:
    able = [number for number in held.chunks if number != held.last]
    looked_at = chance.sample(able, min(len(able), LOOK_AT))
    records = {n: [Held(k, 1, order.next_use(k)) for k in sorted(held.chunks[n])] for n in looked_at}
    share = sum(map(len, records.values())) / len(held.place)
    chosen = choose_yielding(
        records,
        tails=held.tails,
        now=order.now,
        next_use=order.next_use(key),
        slack_bytes=max(1, int(SLACK_SEGMENTS * SEGMENT_CHUNKS * share)),
    )
    if chosen is None:
        return False
    held.drop(chosen.segment)
    for stays in sorted(chosen.stay):
        held.append(stays)
    outcome.moved += len(chosen.stay)
    return True


def next_uses(accesses: Accesses) -> list[int]:
    """For each access the position of the next one of the same chunk; NEVER for the last."""
    following, seen = [NEVER] * len(accesses), dict[int, int]()
    for position in range(len(accesses) - 1, -1, -1):
        following[position] = seen.get(accesses[position], NEVER)
        seen[accesses[position]] = position
    return following


# ---- what is read ----


def shuffled_epochs(chunks: int, epochs: int, seed: int = 1) -> list[int]:
    """Each epoch all chunks once, in an order of its own."""
    chance = random.Random(seed)
    return [chunk for _ in range(epochs) for chunk in chance.sample(range(chunks), chunks)]


def many_samples_a_chunk(chunks: int, epochs: int, samples: int = 4, seed: int = 1) -> list[int]:
    """As shuffled epochs, of samples of which a chunk holds several."""
    return [sample % chunks for sample in shuffled_epochs(chunks * samples, epochs, seed)]


def half_each_epoch(chunks: int, epochs: int, seed: int = 1) -> list[int]:
    """Each epoch another random half."""
    chance = random.Random(seed)
    return [chunk for _ in range(epochs) for chunk in chance.sample(range(chunks), chunks // 2)]


def weighted(chunks: int, epochs: int, seed: int = 1) -> list[int]:
    """Drawn with replacement, some far more often than others."""
    weights = [1 / (1 + rank) ** 0.8 for rank in range(chunks)]
    return random.Random(seed).choices(range(chunks), weights, k=chunks * epochs)


READINGS: Final[dict[str, Callable[[int, int], list[int]]]] = {
    "shuffled epochs": shuffled_epochs,
    "shuffled, 4 samples a chunk": many_samples_a_chunk,
    "another half each epoch": half_each_epoch,
    "weighted, with replacement": weighted,
}


SHAPE: Final = (3000, 5)
TINY: Final = (100, 2)
"""Chunks, and epochs behind the first."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Hits of each policy as part of the reads; `moved` are chunks copied for each that was taken in."""

    reading: str
    lru: float
    ours: float
    ours_ordered: float
    belady: float
    moved: float


def rates(chunks: int, epochs: int) -> list[Rates]:
    """A cache of half the chunks. Shuffled epochs are counted from the second on: the first hits nothing."""
    found = []
    for name, reading in READINGS.items():
        accesses = reading(chunks, epochs + 1)
        counted = chunks * epochs if reading is shuffled_epochs else len(accesses)
        plain, stays, ordered, best = (
            policy(accesses, chunks // 2) for policy in (lru, resident_stays, farthest_yields, belady)
        )
        hits = (outcome.hits / counted for outcome in (plain, stays, ordered, best))
        found.append(Rates(name, *hits, ordered.moved / ordered.filled))
    return found


def measure(scale: Scale) -> Findings:
    """Ours beside LRU and, with the order known, beside Belady."""
    found = rates(*(TINY if scale.tiny else SHAPE))
    rows = [row for one in found for row in _rows(one)]
    moved = ", ".join(f"{one.moved:.1f} ({one.reading})" for one in found)
    return Findings(
        title="What eviction keeps, simulated",
        rows=rows,
        note=f"Chunks copied within the store for each taken in, the order known: {moved}.",
    )


def _rows(one: Rates) -> list[Row]:
    """Goals are set for shuffled epochs."""
    has_goals = one.reading == next(iter(READINGS))
    without = Row(
        what=one.reading,
        unit="hits",
        ours=one.ours,
        bare=one.lru,
        against="LRU",
        better="more",
        goal=Goal(bound=0.5, of="value") if has_goals else None,
    )
    ordered = Row(
        what=f"{one.reading}, order known",
        unit="hits",
        ours=one.ours_ordered,
        bare=one.belady,
        against="Belady",
        better="more",
        goal=Goal(bound=0.95) if has_goals else None,
    )
    return [without, ordered]
