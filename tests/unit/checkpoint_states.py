"""State dicts to save, what to load them into, and writers and readers on a pool in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.unit.checkpoint_pool import CheckpointPool
from torchcache.checkpoint import CacheStorageReader, CacheStorageWriter

URI = "s3://bucket/run/step-1"
KEY = ("s3", "bucket/run/step-1")


class Settings:
    """An object that pickles and is on no allow-list."""

    def __init__(self, value: int = 7) -> None:
        self.value = value


def state() -> dict[str, Any]:
    """Tensors of many kinds, nested objects of many kinds."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 30, generator=generator)
    return {
        "model": {
            "weight": weight,
            "half": weight.to(torch.bfloat16),
            "eighth": weight[:5].to(torch.float8_e4m3fn),
            "transposed": weight.t(),
            "rows": weight[10:20],
            "strided": weight[::2, ::3],
            "last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
            "complex": torch.tensor([1 + 2j, 3 - 1j]).conj(),
            "mask": torch.tensor([True, False, True]),
            "scalar": torch.tensor(3.25),
            "empty": torch.empty(0, 4),
            "parameter": torch.nn.Parameter(weight[:3] * 2),
        },
        "optimizer": {"lr": 0.1, "betas": [0.9, 0.999], "names": ("a", "b"), "none": None},
        "step": 12,
        "note": "half-way",
        "raw": b"\0\1",
    }


def blank(value: Any) -> Any:
    """The same structure with nothing in it."""
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, requires_grad=False)
    if isinstance(value, list | tuple):
        return type(value)(blank(inner) for inner in value)
    return None


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, inner in expected.items():
            assert_same(found[key], inner, f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        found, expected = (t.detach().resolve_conj().contiguous().flatten() for t in (found, expected))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), where
    else:
        assert type(found) is type(expected) and found == expected, where


def writer(pool: CheckpointPool, path: str = URI, **options: Any) -> CacheStorageWriter:
    made = CacheStorageWriter(path, **options)
    made._pool = pool  # type: ignore[assignment]
    return made


def reader(pool: CheckpointPool, path: str = URI, **options: Any) -> CacheStorageReader:
    made = CacheStorageReader(path, **options)
    made._pool = pool  # type: ignore[assignment]
    return made


def folder_of(pool: CheckpointPool, folder: Path, path: str = KEY[1]) -> Path:
    """What lies under a path of the pool's under-store, as files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for (_, key), data in pool.objects.items():
        if key.startswith(path + "/"):
            (folder / key.removeprefix(path + "/")).write_bytes(data)
    return folder


def adopt(pool: CheckpointPool, folder: Path, path: str = URI) -> None:
    """The files of a folder as objects of the pool's under-store."""
    for file in folder.iterdir():
        pool.put(f"{path}/{file.name}", file.read_bytes())
