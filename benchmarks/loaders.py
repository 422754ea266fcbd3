"""torch's DataLoader over the cache, over plain files by the same code, and over a dataset that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import Ground, ground, records_shape
from benchmarks.rounds import alternate

WORKERS: Final = 2
OURS: Final = "torchcache"
FILES: Final = "plain files"
CONSTANT: Final = "a constant"
COLLATIONS: Final = {"tc.collate": tc.collate, "default_collate": default_collate}


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
    """A round is an epoch, shuffled, with workers that live on from epoch to epoch; with both ways to make a batch."""
    shape = records_shape(scale)
    with ground(shape) as found:
        datasets: dict[str, Dataset[Any]] = {
            OURS: tc.CachedDataset.from_files(found.source, pool=found.warm.pool, output="tensor"),
            FILES: PlainFiles(sorted(found.source.iterdir())),
            CONSTANT: Constant(shape.count, shape.size),
        }
        _check(datasets[OURS], datasets[FILES])
        loaders = {
            f"{name}, {collation}": _loader(dataset, found, collate)
            for collation, collate in COLLATIONS.items()
            for name, dataset in datasets.items()
        }
        with _ended(loaders):
            results = alternate(
                {name: _epoch(loader) for name, loader in loaders.items()}, rounds=scale.rounds
            )
    rows = [
        Row(
            what=f"DataLoader, {WORKERS} workers, batches of {shape.name}, {collation}",
            unit="us a record",
            ours=us_each(results[f"{OURS}, {collation}"], shape.count),
            bare=us_each(results[f"{other}, {collation}"], shape.count),
            against=other,
            goal=Goal(bound=bound),
        )
        for collation in COLLATIONS
        for other, bound in ((FILES, 2.0), (CONSTANT, 0.95))
    ]
    return Findings(
        title="Through torch's DataLoader",
        rows=rows,
        contenders={f"batches of {shape.name}": list(results.values())},
        note="Of two goals one is asked: a constant, which is the loader's own cost, is a floor for all.",
    )


def _loader(dataset: Dataset[Any], found: Ground, collate: Callable[[Any], Any]) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=found.shape.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=collate,
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
