"""Which format a store has and which server it belongs to: written in two files, each enough by itself.

The server's id stands in the claims of saves under way. A store that lost it would take its own for another server's,
and give up checkpoints that were acknowledged.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Final, NamedTuple

import xxhash

from torchcache_server.store.disk import UNREADABLE, DiskCalls, read_file, replace_file
from torchcache_server.store.layout import IDENTITY, IDENTITY_COPY, kind_of

FORMAT: Final = "torchcache store 2"
_FIRST_FORMAT: Final = "torchcache store 1"
DAMAGED: Final = "damaged"
NOTHING: Final = "nothing"
_NAMES: Final = (IDENTITY, IDENTITY_COPY)

_log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """`server_id` is None unless the store is of this format; `found` is its format, DAMAGED or NOTHING.

    `unsound`: names of the files that are missing or don't say the same.
    """

    server_id: str | None
    found: str
    unsound: tuple[str, ...]


def read_identity(disk: DiskCalls, root: str) -> Identity:
    """What the two files say. Changes nothing. Raises OSError."""
    read = [_read(disk, os.path.join(root, name)) for name in _NAMES]
    found = [form for _, form in read]
    other = [form for form in found if form not in (FORMAT, DAMAGED, NOTHING)]
    if other:  # if it wrote only one of the files, it doesn't know of the other
        return Identity(None, other[0], _NAMES)
    if FORMAT not in found:
        return Identity(None, DAMAGED if DAMAGED in found else NOTHING, _NAMES)
    server_id = read[found.index(FORMAT)][0]
    unsound = tuple(name for name, (id, _) in zip(_NAMES, read, strict=True) if id != server_id)
    return Identity(server_id, FORMAT, unsound)


def write_identity(disk: DiskCalls, root: str, server_id: str) -> None:
    """Writes both files. Raises OSError."""
    for name in _NAMES:
        write_one(disk, root, name, server_id)


def write_one(disk: DiskCalls, root: str, name: str, server_id: str) -> None:
    """Writes the file `name`, durably. Raises OSError."""
    fields = {"format": FORMAT, "server_id": server_id, "checksum": _checksum(FORMAT, server_id)}
    replace_file(disk, root, name, [json.dumps(fields).encode()])


def mend(disk: DiskCalls, root: str, identity: Identity) -> None:
    """Writes the file that is missing or damaged anew. Only an attempt: the other is enough."""
    for name in identity.unsound:
        try:
            write_one(disk, root, name, identity.server_id or "")
        except OSError as error:
            _log.error("%s is missing or damaged, and can't be written: %s", os.path.join(root, name), error)
        else:
            _log.warning("%s was missing or damaged: written anew", os.path.join(root, name))


def _read(disk: DiskCalls, path: str) -> tuple[str, str]:
    """The server's id, and the format found."""
    if kind_of(path) == "nothing":
        return "", NOTHING
    try:
        content = json.loads(read_file(disk, path))
        found, server_id = str(content["format"]), str(content["server_id"])
        # Every format but the first has a checksum.
        is_sound = content["checksum"] == _checksum(found, server_id) if found != _FIRST_FORMAT else True
        if server_id and is_sound:
            return server_id, found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    return "", DAMAGED


def _checksum(format: str, server_id: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{format}\n{server_id}".encode())
