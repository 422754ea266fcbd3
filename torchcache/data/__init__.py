"""Datasets behind the cache."""

from torchcache.data.batching import collate
from torchcache.data.buffer_pool import BufferPool
from torchcache.data.cached import CachedDataset
from torchcache.data.iterable import CachedIterableDataset
from torchcache.data.nodes import SourceNode
from torchcache.data.prefetch import Prefetch
from torchcache.data.sampler import LocalitySampler

__all__ = [
    "BufferPool",
    "CachedDataset",
    "CachedIterableDataset",
    "LocalitySampler",
    "Prefetch",
    "SourceNode",
    "collate",
]
