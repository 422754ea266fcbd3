"""Datasets behind the cache."""

from torchcache.data.cached import CachedDataset
from torchcache.data.prefetch import Prefetch

__all__ = ["CachedDataset", "Prefetch"]
