"""Small objects of an under-store, whole: claims, manifests, metadata."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchcache.errors import ObjectChanged, ObjectNotFound, Overloaded
from torchcache.model import ByteRange, ObjectInfo
from torchcache_server.understore.base import UnderStore, object_uri

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class SmallObject:
    """An object's bytes and the version they belong to."""

    data: bytes = field(repr=False)
    version: str


def stat_or_none(under_store: UnderStore, key: str, *, deadline: float) -> ObjectInfo | None:
    """What lies at `key`; None if nothing does, or a withdrawn (empty) object."""
    found = stat_even_empty(under_store, key, deadline=deadline)
    return found if found is not None and found.size else None


def stat_even_empty(under_store: UnderStore, key: str, *, deadline: float) -> ObjectInfo | None:
    """What lies at `key`; None if nothing does."""
    try:
        return under_store.stat(key, deadline=deadline)
    except ObjectNotFound:
        return None


def read_small(under_store: UnderStore, key: str, *, deadline: float) -> SmallObject | None:
    """The bytes at `key`, of one version; None if there are none.

    Raises Overloaded if the object changes faster than it can be read.
    """
    for _ in range(_ATTEMPTS):
        found = stat_or_none(under_store, key, deadline=deadline)
        if found is None:
            return None
        try:
            data = under_store.read(found, ByteRange(0, found.size), deadline=deadline)
        except (ObjectChanged, ObjectNotFound):
            continue
        return SmallObject(bytes(data), found.id.version)
    raise Overloaded("an object changes faster than it can be read", object=object_uri(under_store.uri, key))


def write_small(under_store: UnderStore, key: str, data: bytes, *, replaces: str, deadline: float) -> str:
    """Writes `data` if `replaces` is the version at `key` ("": nothing is there); returns the new version.

    Raises AlreadyExists if it isn't.
    """
    parts = iter([memoryview(data)] if data else [])
    return under_store.write(key, parts, len(data), replaces=replaces, deadline=deadline).id.version
