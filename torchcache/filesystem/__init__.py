"""fsspec over the pool: `torchcache://s3/bucket/key`, where the first segment is the name of an under-store."""

from torchcache.filesystem.filesystem import TorchCacheFileSystem

__all__ = ["TorchCacheFileSystem"]
