"""A data set twice as large as the cache: what of shuffled epochs comes from a real pool, by bytes."""

from __future__ import annotations

import random
from typing import Final

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale
from benchmarks.places import local_pool, memory_folder, write_files

OBJECT_BYTES: Final = 1 << 20
EPOCHS: Final = 3
_BATCH: Final = 16
_SEGMENT_SLACK: Final = 1.02
"""Of the capacity, for what segments take beside payload."""


def measure(scale: Scale) -> Findings:
    """What the under-store was asked for from the second epoch on, as part of what was read, is what missed."""
    count = 80 if scale.tiny else 1000
    with memory_folder() as root:
        write_files(root / "source", [OBJECT_BYTES] * count)
        capacity_bytes = int(count * OBJECT_BYTES / 2 * _SEGMENT_SLACK)
        with local_pool(root / "pool", capacity_bytes=capacity_bytes, own=True) as warm:
            dataset = tc.CachedDataset.from_files(root / "source", pool=warm.pool)
            _epoch(dataset, 0)
            before = _asked(warm.pool)
            for number in range(1, 1 + EPOCHS):
                _epoch(dataset, number)
            missed = _asked(warm.pool) - before
    hits = 1 - missed / (EPOCHS * count * OBJECT_BYTES)
    row = Row(
        what=f"{count:,} objects of 1 MiB, shuffled, a cache of half of them, {EPOCHS} epochs behind the first",
        unit="of the bytes",
        ours=hits,
        goal=Goal(bound=0.5, of="value"),
    )
    return Findings(title="A cache of half the data set", rows=[row])


def _epoch(dataset: tc.CachedDataset, number: int) -> None:
    order = random.Random(number).sample(range(len(dataset)), len(dataset))
    for at in range(0, len(order), _BATCH):
        dataset.__getitems__(order[at : at + _BATCH])


def _asked(pool: tc.Pool) -> int:
    """Bytes read from the under-stores so far."""
    return sum(store.read_bytes for server in pool.status() for store in server.under_stores)
