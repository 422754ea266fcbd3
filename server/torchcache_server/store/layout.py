"""What lies where in a store's folder, and what has no business there. Reads names only, and changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from torchcache import records
from torchcache.records import SUFFIX
from torchcache_server.store.ledger import RECORD_SUFFIX

IDENTITY: Final = records.IDENTITY
IDENTITY_COPY: Final = "store-copy.json"
LOCK: Final = "store.lock"
CLEAN: Final = "clean"

SEGMENTS: Final = records.SEGMENTS
INDEX: Final = records.INDEX
RECORDS: Final = "records"
FLAGS: Final = "flags"
SPARES: Final = "spares"
DAMAGED: Final = "damaged"
"""Where `torchcache doctor --repair` puts records that can't be read. While anything is there, nothing is dropped that
it may speak of."""

FOLDERS: Final = (SEGMENTS, INDEX, RECORDS, FLAGS, SPARES)
LEDGERS: Final = (FLAGS, RECORDS)
ROOT_FILES: Final = (IDENTITY, IDENTITY_COPY, LOCK, CLEAN)
INDEX_FILES: Final = records.INDEX_FILES


class Oddity(NamedTuple):
    """A name of the store's that stands for something else than the store makes there."""

    path: str
    what: str


def kind_of(path: str) -> str:
    """What a path is, in words; "nothing" if there is none."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return "nothing"
    return _kind(mode)


def oddities(root: str) -> Iterator[Oddity]:
    """Symlinks, FIFOs, files in the place of folders and folders in the place of files: none is the store's work.

    Raises OSError.
    """
    for name in ROOT_FILES:
        yield from _unless(os.path.join(root, name), "a file")
    for name in (*FOLDERS, DAMAGED):
        folder = os.path.join(root, name)
        odd = list(_unless(folder, "a folder"))
        yield from odd
        if odd or not os.path.isdir(folder):
            continue
        if name == SEGMENTS:
            for inner in _entries(folder):
                if not inner.is_dir(follow_symlinks=False):
                    yield _oddity(inner, "a folder")
                else:
                    yield from _no_files(inner.path, SUFFIX)
        elif name == INDEX:
            for file in INDEX_FILES:
                yield from _unless(os.path.join(folder, file), "a file")
        else:
            yield from _no_files(folder, "" if name == SPARES else RECORD_SUFFIX)


def set_aside(root: str, kind: str) -> list[str]:
    """Names of the records of folder `kind` that were set aside as damaged. Raises OSError."""
    prefix = f"{kind}-"
    try:
        names = os.listdir(os.path.join(root, DAMAGED))
    except FileNotFoundError:
        return []
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _no_files(folder: str, suffix: str) -> Iterator[Oddity]:
    for entry in _entries(folder):
        if entry.name.endswith(suffix) and not entry.is_file(follow_symlinks=False):
            yield _oddity(entry, "a file")


def _unless(path: str, expected: str) -> Iterator[Oddity]:
    found = kind_of(path)
    if found not in ("nothing", expected):
        yield Oddity(path, f"is {found}, not {expected}")


def _oddity(entry: os.DirEntry[str], expected: str) -> Oddity:
    return Oddity(entry.path, f"is {_kind(entry.stat(follow_symlinks=False).st_mode)}, not {expected}")


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symlink"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "no ordinary file"
