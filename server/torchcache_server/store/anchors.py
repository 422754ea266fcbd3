"""Folders held by a descriptor: what is put in their place, or in that of a folder in them, is not followed (F15).

Looked up by path, so that everything above the seam goes on naming files by their paths. A held folder that is moved
stays the one that is meant. Nothing here costs more than one `openat` for each folder between the held one and a file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_held: Final[dict[str, int]] = {}

_spare: Final[list[int]] = []
"""Descriptors of nothing, for when there are no others: without one no file could be removed, and its room be had."""
_MOST_SPARE: Final = 4
_NONE_LEFT: Final = (errno.EMFILE, errno.ENFILE)


def hold(root: str) -> None:
    """Holds the folder at the absolute path `root`, which nobody else holds. Raises OSError; it may be no symlink."""
    _held[root] = os.open(root, _FOLDER | os.O_NOFOLLOW)
    _put_by()


def let_go(root: str) -> None:
    """Ends `hold`; nobody may be at work in the folder."""
    fd = _held.pop(root, None)
    if fd is not None:
        os.close(fd)


def held(path: str) -> int | str:
    """The descriptor of the folder at `path` if that is held, else `path`: for calls that take both and only look."""
    return _held.get(path, path)


@contextmanager
def parent(path: str) -> Iterator[tuple[int | None, str]]:
    """What to give `os` as `dir_fd` and as name for `path`; None and `path` itself where no held folder is above it.

    Raises OSError: ENOTDIR where a symlink stands for a folder below the held one. Errors get `path` as their file.
    """
    root = os.path.dirname(path)
    while root not in _held and root != os.path.dirname(root):
        root = os.path.dirname(root)
    if root not in _held:
        yield None, path
        return
    *between, name = path[len(root) + 1 :].split(os.sep)
    base = fd = _held[root]
    try:
        for folder in between:
            inner = _opened(folder, fd)
            if fd != base:
                os.close(fd)
            fd = inner
        yield fd, name
    except OSError as error:
        error.filename = path
        raise
    finally:
        if fd != base:
            os.close(fd)
            _put_by()


def _opened(folder: str, within: int) -> int:
    try:
        return os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=within)
    except OSError as error:
        if error.errno not in _NONE_LEFT:
            raise
        try:
            spare = _spare.pop()
        except IndexError:  # other threads have taken them just now
            raise error from None
    os.close(spare)
    return os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=within)


def _put_by() -> None:
    with suppress(OSError):
        while len(_spare) < _MOST_SPARE:
            _spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


@contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of the folder at `path`, for `os.fsync`, `os.listdir` and the like. Raises OSError as `parent`."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if path in _held:
        fd = os.open(".", flags, dir_fd=_held[path])
    else:
        with parent(path) as (folder, name):
            fd = os.open(name, flags if folder is None else flags | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)
