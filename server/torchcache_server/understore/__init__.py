"""Under-stores: the sources of truth behind the cache. `create` makes one from its configured name and URI."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchcache.errors import ConfigurationError
from torchcache.model import SAMPLES
from torchcache_server.understore.base import Counters, Listing, UnderStore, object_uri, shown_uri

__all__ = ["Counters", "Listing", "UnderStore", "check_name", "choose", "create", "object_uri", "shown_uri"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def check_name(name: str) -> None:
    """Raises ConfigurationError for a name that no under-store may have."""
    if not _NAME.fullmatch(name) or name == SAMPLES:
        raise ConfigurationError(
            f"{name!r} can't name an under-store: use lower-case letters, digits, - and _, not {SAMPLES!r}"
        )


def choose(under_stores: Mapping[str, UnderStore], name: str, *, object: str | None = None) -> UnderStore:
    """The under-store called `name`. Raises ConfigurationError, naming those there are."""
    under_store = under_stores.get(name)
    if under_store is None:
        raise ConfigurationError(
            f"this server has no under-store {name!r}; it has {', '.join(sorted(under_stores)) or 'none'}: start it "
            f"with --under-store {name}=URI",
            object=object,
        )
    return under_store


def create(name: str, uri: str, *, umask: int | None = None) -> UnderStore:
    """The under-store `name` at `uri`: "s3://", "s3://bucket", "s3://bucket/prefix" or "file:///folder".

    Files and folders made in a file:// one get the mode that `umask` leaves; None: the process's own. Nothing is opened
    yet. Raises ConfigurationError for a name or URI that can't be meant.
    """
    check_name(name)
    scheme, separator, _ = uri.partition("://")
    if separator and scheme == "s3":
        from torchcache_server.understore.s3 import S3UnderStore

        return S3UnderStore(name, uri)
    if separator and scheme == "file":
        from torchcache_server.understore.posix import PosixUnderStore

        return PosixUnderStore(name, uri, umask=umask)
    raise ConfigurationError(
        f"under-store {name!r} has the URI {shown_uri(uri)!r}; known are s3://, s3://bucket/prefix and file:///folder"
    )
