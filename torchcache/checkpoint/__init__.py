"""Checkpoints: torch.distributed.checkpoint's StorageWriter and StorageReader over the pool.

The manifest alone (`torchcache.checkpoint.manifest`) needs no torch, so the two classes load at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "CacheStorageReader": "torchcache.checkpoint.reader",
    "CacheStorageWriter": "torchcache.checkpoint.writer",
}

if TYPE_CHECKING:
    from torchcache.checkpoint.reader import CacheStorageReader
    from torchcache.checkpoint.writer import CacheStorageWriter

__all__ = ["CacheStorageReader", "CacheStorageWriter"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
