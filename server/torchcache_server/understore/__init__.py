"""Under-stores: the sources of truth behind the cache. `create` makes one from its configured name and URI."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchcache.errors import ConfigurationError
from torchcache.model import SAMPLES
from torchcache_server.understore.base import Counters, Listing, UnderStore, object_uri

__all__ = ["Counters", "Listing", "UnderStore", "create", "object_uri"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def create(name: str, uri: str, *, credentials: Mapping[str, str] | None = None) -> UnderStore:
    """The under-store `name` at `uri`: "s3://", "s3://bucket", "s3://bucket/prefix" or "file:///folder".

    `credentials` are AWS_* variables for S3; None leaves them to boto3's own search. Nothing is opened yet. Raises
    ConfigurationError for a name or URI that can't be meant.
    """
    if not _NAME.fullmatch(name) or name == SAMPLES:
        raise ConfigurationError(
            f"{name!r} can't name an under-store: use up to 64 letters, digits, '-', '_' and '.', but not {SAMPLES!r}"
        )
    scheme, separator, _ = uri.partition("://")
    if separator and scheme == "s3":
        from torchcache_server.understore.s3 import S3UnderStore

        return S3UnderStore(name, uri, credentials=credentials)
    if separator and scheme == "file":
        from torchcache_server.understore.posix import PosixUnderStore

        return PosixUnderStore(name, uri)
    raise ConfigurationError(
        f"under-store {name!r} has the URI {uri!r}; known are s3://, s3://bucket/prefix and file:///folder"
    )
