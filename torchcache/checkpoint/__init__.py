"""Checkpoints over the pool: torch.distributed.checkpoint's StorageWriter and StorageReader, and safetensors files.

The manifest alone (`torchcache.checkpoint.manifest`) needs no torch, so what needs it loads at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "CheckpointManager": "torchcache.checkpoint.manager",
    "CacheStorageReader": "torchcache.checkpoint.reader",
    "CacheStorageWriter": "torchcache.checkpoint.writer",
    "Stager": "torchcache.checkpoint.stager",
    "Zstd": "torchcache.checkpoint.compression",
    "load_safetensors": "torchcache.checkpoint.safetensors",
    "open_safetensors": "torchcache.checkpoint.safetensors",
}

if TYPE_CHECKING:
    from torchcache.checkpoint.compression import Zstd
    from torchcache.checkpoint.manager import CheckpointManager
    from torchcache.checkpoint.reader import CacheStorageReader
    from torchcache.checkpoint.safetensors import load_safetensors, open_safetensors
    from torchcache.checkpoint.stager import Stager
    from torchcache.checkpoint.writer import CacheStorageWriter

__all__ = [
    "CacheStorageReader",
    "CacheStorageWriter",
    "CheckpointManager",
    "Stager",
    "Zstd",
    "load_safetensors",
    "open_safetensors",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
