"""torchdata's own tests of states, with our datasets in place of its dummies.

`python -m tests.torchdata_states FILE`: FILE is test/stateful_dataloader/test_state_dict.py of github.com/pytorch/data
at v0.11.0, a copy outside of this repository; it needs `parameterized` from PyPI. Prints the tests that fail, and how
many passed; exits with 1 if others fail than `KNOWN`.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch.utils.data import Dataset, IterableDataset, get_worker_info

import torchcache as tc
from tests.unit import shards

OF_DUMMIES: Final = (
    "TestDynamicStateIterableDataset_shard0",
    "TestDatasetIteratorStateDuplication_shard0",
    "TestFastStateDictRequestRoundRobin_shard3",
    "TestMultiEpochState_shard0",
    "TestSingleIterCalled_shard0",
    "TestInitialState_shard0.test_iteration_error",
)
"""What is tested here is the dummy itself: what its state holds, how often it is iterated. These aren't run."""

KNOWN: Final = ("TestSnapshotEnd_shard2.test_generator_no_state",)
"""Wants a second pass in the order of the first; a recording is dealt out to the workers anew."""


class Rows(Dataset[dict[str, Any]]):
    """Without a state, and without chance."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "strcol": f"strcol_{index}", "listcol": [index, index + 1, index + 2]}


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


class Parts(IterableDataset[int]):
    """So many numbers for each worker."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        if worker is None:
            return iter(range(sum(self._sizes)))
        start = sum(self._sizes[: worker.id])
        return iter(range(start, start + self._sizes[worker.id]))


class Number:
    """The transform: what a sample stands for; `slow` takes a second."""

    def __init__(self, kind: str, slow: int | None = None) -> None:
        self._kind = kind
        self._slow = slow

    def __call__(self, sample: Any) -> int:
        number = sample if isinstance(sample, int) else shards.NUMBER[self._kind](sample)
        if number == self._slow:
            time.sleep(1)
        return number


class Ours:
    """Makes our datasets, by the arguments of the dummies. Each way of reading is there once, and a recording."""

    def __init__(self, folder: Path, pool: tc.Pool) -> None:
        self._folder = folder
        self._pool = pool
        self._made = count()

    def rows(self, size: int, shuffle: bool, include_generator: bool = True) -> tc.CachedDataset:
        """`shuffle` draws a row by chance there: ours have no chance of their own."""
        return tc.CachedDataset(Rows(size), pool=self._pool)

    def slow_numbers(self, end: int, slow_index: int) -> tc.CachedDataset:
        return tc.CachedDataset(Numbers(end), transform=Number("", slow_index), pool=self._pool)

    def records(
        self, sizes: list[int], shuffle: bool = False, include_generator: bool = True
    ) -> tc.CachedIterableDataset:
        return self._shards("jsonl", "", sum(sizes), shuffle=shuffle)

    def blocks(self, samples: list[int], shuffle: bool, include_generator: bool) -> tc.CachedIterableDataset:
        return self._shards("parquet", "", len(samples), shuffle=shuffle)

    def streams(self, sizes: list[int], increment_epoch: bool = False) -> tc.CachedIterableDataset:
        return self._shards("tar", ".zst", sum(sizes))

    def slow_streams(self, start: int, end: int) -> tc.CachedIterableDataset:
        return self._shards("tar", ".zst", end - start, slow=(end - start + 1) // 2)

    def counted(self, length: int) -> tc.CachedIterableDataset:
        dataset = self._shards("tfrecord", "", length)
        dataset.length = length
        return dataset

    def recorded(self, sizes: list[int]) -> tc.CachedIterableDataset:
        """Each a recording of its own, as each dummy is a dataset of its own."""
        return tc.CachedIterableDataset(
            Parts(sizes), name="recorded", version=next(self._made), pool=self._pool
        )

    def _shards(
        self, kind: str, packing: str, size: int, *, shuffle: bool = False, slow: int | None = None
    ) -> tc.CachedIterableDataset:
        folder = self._folder / f"{kind}-{size}"
        if not folder.exists():
            folder.mkdir()
            for number, (first, stop) in enumerate(((0, size // 3), (size // 3, size))):
                data = shards.packed(shards.WRITERS[kind](range(first, stop)), packing)
                (folder / f"{number}.{kind}{packing}").write_bytes(data)
        return tc.CachedIterableDataset(
            str(folder), shuffle=shuffle, transform=Number(kind, slow), window=16, pool=self._pool
        )

    def put_in(self, module: ModuleType) -> None:
        """In place of the module's dummies."""
        for name, ours in {
            "DummyMapDataset": self.rows,
            "DummyIterableDataset": self.records,
            "DummyIteratorIterableDataset": self.blocks,
            "GeneratorIterable": self.streams,
            "GeneratorIterableNoState": self.recorded,
            "CountIterCallsIter": self.counted,
            "_TestSlowIndexDataset": self.slow_numbers,
            "_TestSlowIterableDataset": self.slow_streams,
        }.items():
            if not hasattr(module, name):
                raise SystemExit(f"{module.__file__} has no {name}: it isn't the file of v0.11.0")
            setattr(module, name, ours)


def loaded(file: Path) -> ModuleType:
    """The tests, as a module."""
    spec = importlib.util.spec_from_file_location("test_state_dict", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file")
    module = sys.modules["test_state_dict"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(test: Any) -> str:
    """Class and method; of a subtest, those of its test."""
    return str(getattr(test, "test_case", test).id()).partition(".")[2]


def tests_in(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    """All, the innermost."""
    return [
        found for one in suite for found in (tests_in(one) if isinstance(one, unittest.TestSuite) else [one])
    ]


def main(file: Path) -> None:
    module = loaded(file)
    tests = tests_in(unittest.defaultTestLoader.loadTestsFromModule(module))
    chosen = [test for test in tests if not name_of(test).startswith(OF_DUMMIES)]
    with tempfile.TemporaryDirectory() as folder, tc.LocalPool(Path(folder, "pool")) as pool:
        Ours(Path(folder), pool).put_in(module)
        result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(chosen))
    failed = {name_of(test) for test, _ in (*result.failures, *result.errors)}
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} pass, {len(result.skipped)} of them skipped; "
        f"{len(tests) - len(chosen)} test a dummy itself and aren't run"
    )
    for name in sorted(failed):
        print(f"  fails{' as is known' if name in KNOWN else ''}: {name}")
    raise SystemExit(1 if failed - set(KNOWN) else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
