"""All files beneath a folder, bytewise by key, from any key on: a listing like S3's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchcache.errors import ConfigurationError
from torchcache_server.understore.posix_files import TEMPORARY_PREFIX, Root


@dataclass(frozen=True, slots=True)
class _Window:
    """The keys that are wanted: those with `prefix`, behind `start_after`."""

    prefix: str
    start_after: str

    def wants(self, key: str) -> bool:
        return key.startswith(self.prefix) and key > self.start_after

    def may_want_below(self, folder: str) -> bool:
        """Whether a key that starts with `folder` (which ends in a slash) can be wanted."""
        fits = folder.startswith(self.prefix) or self.prefix.startswith(folder)
        return fits and (folder > self.start_after or self.start_after.startswith(folder))


def walk(root: Root, prefix: str, start_after: str) -> Iterator[tuple[str, os.stat_result]]:
    """Key and status of every file whose key starts with `prefix`, behind `start_after`, bytewise by key.

    Nothing under `prefix` gives nothing. Raises OSError, ConfigurationError.
    """
    folder = prefix.rpartition("/")[0]
    path = root.path_of(folder) if folder else root.path
    os.close(root.open())  # Says so if the root itself is missing.
    if folder and not (Path(path).is_dir() and root.is_beneath(path)):
        return
    yield from _walk(root, path, f"{folder}/" if folder else "", _Window(prefix, start_after), ())


def _walk(
    root: Root, path: str, folder: str, window: _Window, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.stat_result]]:
    try:
        status = Path(path).stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # A symlink that leads back up.
        # Code points sort as UTF-8 does; a folder sorts where its keys do, with the slash.
        entries = sorted(_entries(path, folder, window), key=lambda found: found[0])
    except (FileNotFoundError, NotADirectoryError):
        return  # Removed since the folder above was read.
    for key, entry in entries:
        if entry.is_symlink() and not root.is_beneath(entry.path):
            continue
        if key.endswith("/"):
            yield from _walk(root, entry.path, key, window, (*above, here))
            continue
        try:
            yield key, entry.stat()
        except FileNotFoundError:
            continue  # Removed since the folder was read.


def _entries(path: str, folder: str, window: _Window) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Key (for folders with a slash at the end) and entry of what is wanted in one folder."""
    with os.scandir(path) as entries:
        for entry in entries:
            key = folder + entry.name
            kind = _kind(entry)
            if kind == "folder":
                if window.may_want_below(f"{key}/"):
                    yield f"{_checked(key)}/", entry
            elif window.wants(key) and kind == "file" and not entry.name.startswith(TEMPORARY_PREFIX):
                yield _checked(key), entry


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "neither"]:
    """What an entry is, or its symlink leads to. Of links that lead in a circle there is nothing to list."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "neither"
        raise


def _checked(key: str) -> str:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"the file name {os.fsencode(key)!r} is not UTF-8; rename the file"
        ) from None
    return key
