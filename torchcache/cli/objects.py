"""Objects that a URI on the command line means."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torchcache.errors import ObjectNotFound

if TYPE_CHECKING:
    from torchcache.model import ObjectInfo
    from torchcache.pool import Pool


def objects_under(pool: Pool, uri: str, *, pattern: str = "*") -> list[ObjectInfo]:
    """The objects below the folder `uri` whose path within it matches `pattern`, or the one object at `uri`.

    Raises ObjectNotFound if there is none.
    """
    folder = uri.rstrip("/") + "/"
    objects = [o for o in pool.list(folder) if fnmatchcase(pool.uri(o.id).removeprefix(folder), pattern)]
    if objects:
        return objects
    if pattern == "*" and not uri.endswith("/"):
        try:
            return [pool.stat(uri)]
        except ObjectNotFound:
            pass
    matching = "" if pattern == "*" else f" that matches {pattern!r}"
    raise ObjectNotFound(f"there is nothing{matching} under {uri}", object=uri)
