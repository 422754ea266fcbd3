"""The store: chunks on a local disk."""

from torchcache_server.store.chunk import Payload, StoredChunk
from torchcache_server.store.disk import OS, DiskCalls
from torchcache_server.store.store import NamespaceUsage, Store, StoreUsage

__all__ = ["OS", "DiskCalls", "NamespaceUsage", "Payload", "Store", "StoreUsage", "StoredChunk"]
