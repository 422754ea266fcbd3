"""The store: chunks on a local disk."""

from torchcache_server.store.chunk import Payload, StoredChunk
from torchcache_server.store.disk import OS, DiskCalls
from torchcache_server.store.handing_out import Committed, HandedFile, HandedOut, Place
from torchcache_server.store.health import Health
from torchcache_server.store.policy import Policy
from torchcache_server.store.room import Promise
from torchcache_server.store.scrubbing import ScrubStep
from torchcache_server.store.store import Store
from torchcache_server.store.usage import NamespaceUsage, StoreUsage

__all__ = [
    "OS",
    "Committed",
    "DiskCalls",
    "HandedFile",
    "HandedOut",
    "Health",
    "NamespaceUsage",
    "Payload",
    "Place",
    "Policy",
    "Promise",
    "ScrubStep",
    "Store",
    "StoreUsage",
    "StoredChunk",
]
