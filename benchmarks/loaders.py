"""torch's DataLoader over the cache, over plain files by the same code, and over a dataset that does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Ground, ground, records_shape
from benchmarks.rounds import alternate

WORKERS: Final = 2
OURS: Final = "torchcache"
FILES: Final = "plain files"
CONSTANT: Final = "a constant"


class PlainFiles(Dataset[torch.Tensor]):
    """What one writes without a cache: a file a record."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(numpy.fromfile(self._paths[index], numpy.uint8))


class Constant(Dataset[torch.Tensor]):
    """The loader's own cost: always the same record."""

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self._record = torch.ones(size, dtype=torch.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._record


def measure(scale: Scale) -> Findings:
    """A round is an epoch, shuffled, with workers that live on from epoch to epoch."""
    shape = records_shape(scale)
    with ground(shape) as found:
        datasets: dict[str, Dataset[Any]] = {
            OURS: tc.CachedDataset.from_files(found.source, pool=found.warm.pool, output="tensor"),
            FILES: PlainFiles(sorted(found.source.iterdir())),
            CONSTANT: Constant(shape.count, shape.size),
        }
        _check(datasets[OURS], datasets[FILES])
        loaders = {name: _loader(dataset, found) for name, dataset in datasets.items()}
        with _ended(loaders):
            results = alternate(
                {name: _epoch(loader) for name, loader in loaders.items()}, rounds=scale.rounds
            )
    goals = {FILES: Goal(bound=2.0), CONSTANT: Goal(bound=0.95)}
    rows = [
        Row(
            what=f"DataLoader, {WORKERS} workers, batches of {shape.name}",
            unit="us a record",
            ours=us_each(results[OURS], shape.count),
            bare=us_each(results[name], shape.count),
            against=name,
            goal=goal,
        )
        for name, goal in goals.items()
    ]
    return Findings(
        title="Through torch's DataLoader",
        rows=rows,
        contenders={f"batches of {shape.name}": list(results.values())},
        note="One of the two goals is what is asked: the loader's own cost, a constant, is a floor for all.",
    )


def _loader(dataset: Dataset[Any], found: Ground) -> DataLoader[Any]:
    order = torch.Generator().manual_seed(1)
    return DataLoader(
        dataset,
        batch_size=found.shape.batch,
        shuffle=True,
        generator=order,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def _epoch(loader: DataLoader[Any]) -> Any:
    return lambda: sum(batch.numel() for batch in loader)


def _check(ours: Dataset[Any], files: Dataset[Any]) -> None:
    if not torch.equal(ours[3], files[3]):
        raise RuntimeError("the pool returned another record than the file holds")


@contextmanager
def _ended(loaders: dict[str, DataLoader[Any]]) -> Iterator[None]:
    """Workers end here and not when Python pleases."""
    try:
        yield
    finally:
        for loader in loaders.values():
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()
