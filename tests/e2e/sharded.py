"""Shards as files, and datasets over them whose samples are numbers: for the tests of CachedIterableDataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchcache as tc
from tests.unit import shards
from torchcache.data import formats

COUNT = 97
SHARDS = 5
KINDS = [f"{name}{packing}" for name in shards.WRITERS for packing in ("", ".zst", ".gz")]


class Number:
    """The transform of the tests: the number that a sample stands for. Pickles."""

    def __init__(self, kind: str) -> None:
        self._name = kind.partition(".")[0]

    def __call__(self, sample: Any) -> int:
        return shards.NUMBER[self._name](sample)


def write_shards(folder: Path, kind: str) -> str:
    """Shards of unequal sizes, one of them empty, as files; their pattern."""
    name, _, packing = kind.partition(".")
    bounds = [0, 20, 20, 45, 50, COUNT]
    for i in range(SHARDS):
        data = shards.packed(shards.WRITERS[name](range(bounds[i], bounds[i + 1])), packing and f".{packing}")
        (folder / f"train-{i}.{kind}").write_bytes(data)
    return f"{folder}/train-{{0..{SHARDS - 1}}}.{kind}"


def dataset_of(pattern: str, pool: tc.Pool, **settings: Any) -> tc.CachedIterableDataset:
    """The dataset over `write_shards`'s pattern."""
    kind = pattern.rpartition("}.")[2]
    raw = formats.Raw(record_bytes=8, header_bytes=4) if kind.startswith("raw") else None
    return tc.CachedIterableDataset(pattern, format=raw, transform=Number(kind), pool=pool, **settings)
