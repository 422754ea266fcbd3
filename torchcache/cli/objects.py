"""Objects that a URI on the command line means."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torchcache.errors import ConfigurationError, ObjectNotFound
from torchcache.model import ObjectId, ObjectInfo

if TYPE_CHECKING:
    from torchcache.pool import Pool


def folder_uri(pool: Pool, uri: str) -> str:
    """The folder `uri` as the pool writes it, with a slash at the end: a path of the file system gets its scheme.

    Raises ConfigurationError.
    """
    if not uri.strip():  # a shell's unset variable; with its slash it would be all of this machine
        raise ConfigurationError("the URI is empty: write s3://bucket/folder, or an absolute path")
    return pool.uri(ObjectId(*pool.resolve(uri.rstrip("/") + "/"), ""))


def is_there(pool: Pool, uri: str) -> bool:
    """Whether storage has an object below the folder `uri`, or at it. True where it doesn't let us know."""
    try:
        return any(True for _ in pool.list(folder_uri(pool, uri))) or bool(pool.stat(uri.rstrip("/")))
    except ObjectNotFound:
        return False
    except ConfigurationError:  # it may not be listed, or is a bucket
        return True


def objects_under(pool: Pool, uri: str, *, pattern: str = "*") -> list[ObjectInfo]:
    """The objects below the folder `uri` whose path within it matches `pattern`, or the one object at `uri`.

    Raises ObjectNotFound if there is none.
    """
    folder = folder_uri(pool, uri)
    found = ((object, pool.uri(object.id).removeprefix(folder)) for object in pool.list(folder))
    # A key that ends in a slash is a folder's marker.
    objects = [o for o, path in found if not path.endswith("/") and path and fnmatchcase(path, pattern)]
    if objects:
        return objects
    if pattern == "*" and not uri.endswith("/"):
        try:
            return [pool.stat(uri)]
        except ObjectNotFound:
            pass
    matching = "" if pattern == "*" else f" that matches {pattern!r}"
    raise ObjectNotFound(f"there is nothing{matching} under {uri}", object=uri)
