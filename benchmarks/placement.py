"""How evenly stripes spread over servers, and how many move when one joins or leaves: simulated, by the product's hash.

No server runs: who owns what follows from names. Owners are counted by `placement_hashes`, and compared with
`torchcache.placement.Placement` for a part of the keys, each time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.placement_hashes import owners
from torchcache.model import STRIPE_BYTES, STRIPE_CHUNKS, ObjectId
from torchcache.placement import Placement, placement_key

Counts = NDArray[np.int64]

OBJECT_STRIPES: Final = 64
"""Of a file of 1 GiB."""

SLICES: Final = 100
"""Parts that are counted side by side; the first ones tell of fewer chunks."""

COMPARED: Final = 50
"""Keys of a slice whose owner is asked of the product, too."""

BALANCE: Final = Goal(bound=1.05, of="value", sense="at most")
WEIGHTS: Final = (1.0, 2.0, 4.0)
ASKED: Final = (4, 100, 1000)
"""Servers of the pools whose placement is timed."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Servers by id, and the weight of each, or None for servers that are alike."""

    servers: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    @staticmethod
    def of(count: int, weights: Sequence[float] | None = None) -> Pool:
        """So many, with ids as servers make them up. `weights` go round."""
        chance = random.Random(count)
        ids = sorted(f"{chance.getrandbits(128):032x}" for _ in range(count))
        each = tuple(weights[number % len(weights)] for number in range(count)) if weights else None
        return Pool(servers=tuple(ids), weights=each)

    def placement(self, without: int = -1) -> Placement:
        """The product's, of all servers but number `without`."""
        servers = [server for number, server in enumerate(self.servers) if number != without]
        return Placement(
            servers, dict(zip(self.servers, self.weights, strict=True)) if self.weights else None
        )

    def shares(self) -> NDArray[np.float64]:
        """What each server should own."""
        return np.array([float(share) for share in self.placement().shares()])


def keys_of(slice_: int, stripes: int) -> Iterator[bytes]:
    """Placement keys of `stripes` stripes of files that no other slice has."""
    for number in range(-(-stripes // OBJECT_STRIPES)):
        id_ = ObjectId("s3", f"bucket/{slice_:03d}/{number:06d}.tar", "0123456789abcdef0123456789abcdef")
        for stripe in range(min(OBJECT_STRIPES, stripes - number * OBJECT_STRIPES)):
            yield placement_key(id_, stripe * STRIPE_BYTES)


def counted(slice_: int, pool: Pool, stripes: int) -> Counts:
    """How many stripes of the slice each server owns. Raises RuntimeError if the product places one otherwise."""
    keys = list(keys_of(slice_, stripes))
    seeds = np.fromiter(map(xxhash.xxh3_64_intdigest, keys), np.uint64, stripes)
    found = owners(seeds, [server.encode() for server in pool.servers], pool.weights)
    gone = slice_ % len(pool.servers)
    placement, without = pool.placement(), pool.placement(without=gone)
    for at in range(0, stripes, max(1, stripes // COMPARED)):
        owner = pool.servers[found[at]]
        if placement.owner(keys[at]) != owner:
            raise RuntimeError(f"stripe {at} of slice {slice_} is the product's {placement.owner(keys[at])}")
        if found[at] != gone and without.owner(keys[at]) != owner:
            raise RuntimeError(f"stripe {at} of slice {slice_} moves though its owner stays")
    return np.bincount(found, minlength=len(pool.servers))


def measure(scale: Scale) -> Findings:
    """Pools of 2 to 1,000 servers that are alike, and one of weights; then what it costs to ask who owns a stripe."""
    chunks = 40_000 if scale.tiny else 100_000_000
    counts = (2, 5) if scale.tiny else (2, 4, 16, 100, 1000)
    stripes = chunks // STRIPE_CHUNKS // SLICES
    rows: list[Row] = []
    with ExitStack() as closing:
        side_by_side: Callable[..., Iterable[Counts]] = map
        if not scale.tiny:
            spawn = multiprocessing.get_context(
                "spawn"
            )  # a fork would take along what gRPC left in this process
            side_by_side = closing.enter_context(ProcessPoolExecutor(os.cpu_count(), spawn)).map

        def simulated(pool: Pool) -> Counts:
            return np.array(list(side_by_side(partial(counted, pool=pool, stripes=stripes), range(SLICES))))

        for count in counts:
            pool = Pool.of(count)
            found = simulated(pool)
            rows.append(_balance(f"{count:,} servers, {chunks:,} chunks", pool, found, BALANCE))
            rows.append(_moved(count, found))
        for part in (10, 1):
            what = f"{counts[-1]:,} servers, {chunks * part // SLICES:,} chunks"
            rows.append(_balance(what, pool, found[:part]))
        pool = Pool.of(counts[-1] if scale.tiny else 100, WEIGHTS)
        what = f"{len(pool.servers)} servers of weights 1, 2 and 4, {chunks:,} chunks"
        rows.append(_balance(what, pool, simulated(pool), BALANCE))
    rows += [row for count in ASKED for row in _asked(count, 20 if scale.tiny else 2000)]
    note = (
        f"Files of 1 GiB, four chunks a stripe. Of each pool {SLICES * COMPARED:,} stripes were placed by the product "
        "itself, too, with all servers and with one less: none was elsewhere, and none of a server that stayed moved."
    )
    return Findings(title="Placement, simulated", rows=rows, note=note)


def _balance(what: str, pool: Pool, slices: Counts, goal: Goal | None = None) -> Row:
    """The most that a server owns beyond what it should."""
    owned = slices.sum(axis=0)
    most = float((owned / (pool.shares() * owned.sum())).max())
    against = f"{owned.sum() // len(owned):,} stripes a server"
    return Row(what=f"{what}: most / share", unit="x", ours=most, against=against, goal=goal)


def _moved(count: int, slices: Counts) -> Row:
    """What a server owns is what moves when it joins as the last, or leaves."""
    owned = slices.sum(axis=0)
    return Row(
        what=f"{count:,} servers: the most that move when one joins or leaves",
        unit="% of stripes",
        ours=float(100 * owned.max() / owned.sum()),
        against=f"1/N: {100 / count:.3g} %",
        goal=Goal(bound=100 / count + 1, of="value", sense="at most"),
    )


def _asked(count: int, times: int) -> Iterator[Row]:
    placement = Pool.of(count).placement()
    keys = list(keys_of(0, times))
    for name, ask in (("owner", placement.owner), ("order", placement.order)):
        began = time.perf_counter()
        for key in keys:
            ask(key)
        took_s = time.perf_counter() - began
        yield Row(
            what=f"{count:,} servers: asking for a stripe's {name}", unit="us", ours=1e6 * took_s / times
        )
