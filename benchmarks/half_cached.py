"""A data set twice as large as the cache: what of shuffled epochs comes from a real pool, by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch.utils.data import DistributedSampler

import torchcache as tc
from benchmarks.eviction import belady
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
    many = 80 if scale.tiny else 4000
    stays, ordered = _hits(count, told=False), _hits(many, told=True)
    read = [chunk for epoch in range(EPOCHS + 1) for chunk in _shuffled(many, epoch)]
    best = belady(read, many // 2).hits / (EPOCHS * many)
    what = f"objects of 1 MiB, shuffled, a cache of half of them, {EPOCHS} epochs behind the first"
    rows = [
        Row(what=f"{count:,} {what}", unit="of the bytes", ours=stays, goal=Goal(bound=0.5, of="value")),
        Row(
            what=f"{many:,} {what}, fetched ahead by their order",
            unit="of the bytes",
            ours=ordered,
            bare=best,
            against="Belady",
            better="more",
            goal=Goal(bound=0.95),
        ),
    ]
    return Findings(title="A cache of half the data set", rows=rows)


def _hits(count: int, *, told: bool) -> float:
    with memory_folder() as root:
        write_files(root / "source", [OBJECT_BYTES] * count)
        capacity_bytes = int(count * OBJECT_BYTES / 2 * _SEGMENT_SLACK)
        with local_pool(root / "pool", capacity_bytes=capacity_bytes, own=True) as warm:
            dataset = tc.CachedDataset.from_files(root / "source", pool=warm.pool)
            prefetch = dataset.prefetch(_sampler(count), 0, epochs=None) if told else None
            _epoch(dataset, 0)
            before = _asked(warm.pool)
            for number in range(1, 1 + EPOCHS):
                _epoch(dataset, number)
            missed = _asked(warm.pool) - before
            if prefetch is not None:
                prefetch.cancel()
    return 1 - missed / (EPOCHS * count * OBJECT_BYTES)


def _sampler(count: int) -> DistributedSampler[int]:
    return DistributedSampler(range(count), num_replicas=1, rank=0)  # type: ignore[arg-type]  # it has a length


def _shuffled(count: int, epoch: int) -> Sequence[int]:
    sampler = _sampler(count)
    sampler.set_epoch(epoch)
    return list(sampler)


def _epoch(dataset: tc.CachedDataset, number: int) -> None:
    order = _shuffled(len(dataset), number)
    for at in range(0, len(order), _BATCH):
        dataset.__getitems__(order[at : at + _BATCH])


def _asked(pool: tc.Pool) -> int:
    """Bytes read from the under-stores so far."""
    return sum(store.read_bytes for server in pool.status() for store in server.under_stores)
