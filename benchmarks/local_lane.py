"""Records on one machine: CachedDataset beside preadv of the same bytes into buffers that are used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torchcache as tc
from benchmarks.bare_files import FlatFile, buffers
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Ground, check, ground, reader_into, records_shape
from benchmarks.rounds import alternate

Read = Callable[[list[int]], Sequence[Any]]

AS = {"into buffers": 1.2, "as bytes": 1.4, "as views": 2.0}
"""The forms a record can have, and how many times faster than preadv each is to be."""


def measure(scale: Scale) -> Findings:
    """All forms beside preadv, in turn, batch after batch of one request each."""
    shape = records_shape(scale)
    batches = shape.batches()
    with ground(shape) as found, FlatFile(found.flat, shape.size) as file:
        into = buffers(shape.batch, shape.size)
        readers = _readers(found, into)
        for read in readers.values():
            check(found, read)

        def ours(read: Read) -> Callable[[], int]:
            return lambda: sum(len(record) for batch in batches for record in read(batch))

        contenders = {f"torchcache, {form}": ours(read) for form, read in readers.items()}
        contenders["preadv"] = lambda: sum(file.read(batch, into) for batch in batches)
        results = alternate(contenders, rounds=scale.rounds)
        lanes = found.warm.pool.statistics().lanes
    rows = [
        Row(
            what=f"batches of {shape.name}, {form}",
            unit="us a record",
            ours=us_each(results[f"torchcache, {form}"], shape.count),
            bare=us_each(results["preadv"], shape.count),
            against="preadv into reused buffers",
            goal=Goal(bound=bound),
        )
        for form, bound in AS.items()
    ]
    return Findings(
        title="Records on one machine",
        rows=rows,
        contenders={shape.name: list(results.values())},
        details={"lanes": sorted(set(lanes.values()))},
    )


def _readers(found: Ground, into: Sequence[memoryview]) -> dict[str, Read]:
    pool = found.warm.pool
    as_bytes = tc.CachedDataset.from_files(found.source, pool=pool)
    as_views = tc.CachedDataset.from_files(found.source, pool=pool, decode=lambda view: view)
    return {
        "into buffers": reader_into(found, into),
        "as bytes": as_bytes.__getitems__,
        "as views": as_views.__getitems__,
    }
