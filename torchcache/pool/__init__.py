"""The client's side of a pool: ranges in, buffers out."""

from torchcache.lanes.access import TlsConfig
from torchcache.pool.client import Pool
from torchcache.pool.reports import (
    CopiesStatus,
    NamespaceStatus,
    PassedOver,
    PoolStatistics,
    Residency,
    SaveInfo,
    SaveState,
    ServerStatus,
    UnderStoreStatus,
)

__all__ = [
    "CopiesStatus",
    "NamespaceStatus",
    "PassedOver",
    "Pool",
    "PoolStatistics",
    "Residency",
    "SaveInfo",
    "SaveState",
    "ServerStatus",
    "TlsConfig",
    "UnderStoreStatus",
]
