"""torchcache: the layer between object storage and PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names load their module at first use: `import torchcache` stays light, and needs no torch.
_HOMES = {
    "connect": "torchcache.connecting",
    "LocalPool": "torchcache.local_pool",
    "Pool": "torchcache.pool",
    "PoolCollector": "torchcache.pool.metrics",
    "TlsConfig": "torchcache.pool",
    "BufferPool": "torchcache.data",
    "CachedDataset": "torchcache.data",
    "CheckpointManager": "torchcache.checkpoint",
    "CachedIterableDataset": "torchcache.data",
    "collate": "torchcache.data",
    "LocalitySampler": "torchcache.data",
    "SourceNode": "torchcache.data",
    "CacheStorageReader": "torchcache.checkpoint",
    "CacheStorageWriter": "torchcache.checkpoint",
    "load_safetensors": "torchcache.checkpoint",
    "open_safetensors": "torchcache.checkpoint",
    "AlreadyExists": "torchcache.errors",
    "CheckpointError": "torchcache.errors",
    "ConfigurationError": "torchcache.errors",
    "DeadlineExceeded": "torchcache.errors",
    "InUse": "torchcache.errors",
    "IntegrityError": "torchcache.errors",
    "NotCommitted": "torchcache.errors",
    "NotResident": "torchcache.errors",
    "ObjectChanged": "torchcache.errors",
    "ObjectNotFound": "torchcache.errors",
    "OutOfSpace": "torchcache.errors",
    "Overloaded": "torchcache.errors",
    "ServerUnavailable": "torchcache.errors",
    "TorchCacheError": "torchcache.errors",
    "TransientError": "torchcache.errors",
    "UnsupportedSample": "torchcache.errors",
}

if TYPE_CHECKING:
    from torchcache.checkpoint import (
        CacheStorageReader,
        CacheStorageWriter,
        CheckpointManager,
        load_safetensors,
        open_safetensors,
    )
    from torchcache.connecting import connect
    from torchcache.data import (
        BufferPool,
        CachedDataset,
        CachedIterableDataset,
        LocalitySampler,
        SourceNode,
        collate,
    )
    from torchcache.errors import (
        AlreadyExists,
        CheckpointError,
        ConfigurationError,
        DeadlineExceeded,
        IntegrityError,
        InUse,
        NotCommitted,
        NotResident,
        ObjectChanged,
        ObjectNotFound,
        OutOfSpace,
        Overloaded,
        ServerUnavailable,
        TorchCacheError,
        TransientError,
        UnsupportedSample,
    )
    from torchcache.local_pool import LocalPool
    from torchcache.pool import Pool, TlsConfig
    from torchcache.pool.metrics import PoolCollector

__all__ = [
    "AlreadyExists",
    "BufferPool",
    "CacheStorageReader",
    "CacheStorageWriter",
    "CachedDataset",
    "CachedIterableDataset",
    "CheckpointError",
    "CheckpointManager",
    "ConfigurationError",
    "DeadlineExceeded",
    "InUse",
    "IntegrityError",
    "LocalPool",
    "LocalitySampler",
    "NotCommitted",
    "NotResident",
    "ObjectChanged",
    "ObjectNotFound",
    "OutOfSpace",
    "Overloaded",
    "Pool",
    "PoolCollector",
    "ServerUnavailable",
    "SourceNode",
    "TlsConfig",
    "TorchCacheError",
    "TransientError",
    "UnsupportedSample",
    "__version__",
    "collate",
    "connect",
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


def __dir__() -> list[str]:
    return sorted(__all__)
