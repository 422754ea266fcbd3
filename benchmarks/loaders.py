"""torch's DataLoader over the cache, over plain files by the same code, and over a dataset that does nothing.

Each trains in a process of its own that has done nothing else: workers are forked from it, and what memory
costs them hangs on the state of the heap that they find.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import torchcache as tc
from benchmarks.findings import Findings, Goal, Row, Scale, us_each
from benchmarks.records import ground, records_shape
from benchmarks.rounds import Result, alternate
from torchcache.heap import keep_freed_memory

WORKERS: Final = 2
OURS: Final = "torchcache"
FILES: Final = "plain files"
TUNED: Final = "plain files, malloc keeps what is freed"
CONSTANT: Final = "a constant"
EPOCH_RECORDS: Final = 8192
"""Enough that the start of an epoch, when workers have nothing ready, is little of it."""

WARM_UP: Final = 4
"""Epochs until each worker has met nearly every record."""

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
    if not scale.tiny:
        shape = replace(shape, count=EPOCH_RECORDS)
    results: dict[str, Result] = {}
    with ground(shape) as found:
        datasets: dict[str, Dataset[Any]] = {
            OURS: tc.CachedDataset.from_files(found.source, pool=found.warm.pool, output="tensor"),
            FILES: PlainFiles(sorted(found.source.iterdir())),
            TUNED: PlainFiles(sorted(found.source.iterdir())),
            CONSTANT: Constant(shape.count, shape.size),
        }
        _check(datasets[OURS], datasets[FILES])
        for collation, collate in COLLATIONS.items():
            with ExitStack() as ending:
                epochs = {
                    f"{name}, {collation}": ending.enter_context(
                        _trainer(dataset, shape.batch, collate, tuned=name == TUNED)
                    )
                    for name, dataset in datasets.items()
                }
                results |= alternate(epochs, rounds=scale.rounds, warm_up=1 if scale.tiny else WARM_UP)
    rows = [
        Row(
            what=f"DataLoader, {WORKERS} workers, batches of {shape.name}, {collation}",
            unit="us a record",
            ours=us_each(results[f"{OURS}, {collation}"], shape.count),
            bare=us_each(results[f"{other}, {collation}"], shape.count),
            against=other,
            goal=None if bound is None else Goal(bound=bound),
        )
        for collation in COLLATIONS
        for other, bound in ((FILES, 2.0), (TUNED, None), (CONSTANT, 0.95))
    ]
    return Findings(
        title="Through torch's DataLoader",
        rows=rows,
        contenders={f"batches of {shape.name}": list(results.values())},
        note="Of two goals one is asked: a constant, which is the loader's own cost, is a floor for all.",
    )


@contextmanager
def _trainer(
    dataset: Dataset[Any], batch: int, collate: Callable[[Any], Any], *, tuned: bool
) -> Iterator[Callable[[], int]]:
    """A process that trains an epoch at each call, and says how many bytes it got."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe()
    trainer = context.Process(target=_train, args=(dataset, batch, collate, tuned, there))
    trainer.start()
    there.close()  # so that its end is seen here

    def epoch() -> int:
        here.send(None)
        return int(here.recv())

    try:
        yield epoch
    finally:
        here.close()
        trainer.join()


def _train(
    dataset: Dataset[Any], batch: int, collate: Callable[[Any], Any], tuned: bool, asked: Connection
) -> None:
    if tuned:
        keep_freed_memory()
    loader = DataLoader(
        dataset,
        batch_size=batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(1),
        num_workers=WORKERS,
        multiprocessing_context="fork",  # the default of whom a forkserver started is another one, of its own
        persistent_workers=True,
        collate_fn=collate,
    )
    with asked, suppress(EOFError):
        while True:
            asked.recv()
            asked.send(sum(part.numel() for part in loader))
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def _check(ours: Dataset[Any], files: Dataset[Any]) -> None:
    if not torch.equal(ours[3], files[3]):
        raise RuntimeError("the pool returned another record than the file holds")
