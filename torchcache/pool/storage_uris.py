"""What users may write for a storage's URI, as the storage's own: by that, datasets have their names in the pool."""

from __future__ import annotations

from torchcache.model import ObjectId
from torchcache.pool.client import Pool
from torchcache.pool.objects import BY_NAME


def at_storage(pool: Pool, uri: str) -> str:
    """Of `torchcache://s3/bucket/x`, s3://bucket/x; others as they are. Asks the pool. Raises ConfigurationError."""
    return pool.uri(ObjectId(*pool.resolve(uri), "")) if uri.startswith(BY_NAME) else uri
