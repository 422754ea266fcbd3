"""Things that are no regular file of ours, put in the place of one while a server runs; and taken away again."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.hostile.hostile_server import HostileServer
from tests.waiting import until


def _mknod(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind() takes no path this long


KINDS: Final[dict[str, Callable[[Path, HostileServer], None]]] = {
    "a symlink out": lambda path, server: path.symlink_to(server.folder / "outside" / "secret"),
    "a symlink to a folder": lambda path, server: path.symlink_to(server.folder / "outside" / "sub"),
    "a symlink to nothing": lambda path, server: path.symlink_to(server.folder / "outside" / "new"),
    "a symlink to itself": lambda path, _: path.symlink_to(path.name),
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a socket": lambda path, _: _mknod(path),
    "a folder": lambda path, _: path.mkdir(),
    "a hard link out": lambda path, server: path.hardlink_to(server.folder / "outside" / "secret"),
}
"""What may lie there instead: how it is made."""


def take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # somebody may be writing into it
    else:
        path.unlink(missing_ok=True)


@contextmanager
def swapped(server: HostileServer, path: Path, kind: str) -> Iterator[None]:
    """For the time of the block something else is there. What the server put there meanwhile is taken away, too."""
    aside = path.with_name("aside-of-the-test")
    path.rename(aside)
    try:
        KINDS[kind](path, server)
        yield
    finally:
        take_away(path)
        aside.rename(path)


def _put(source: Path, path: Path) -> None:
    """Over what the server put there in between, if it did."""
    while True:
        try:
            source.rename(path)
            return
        except OSError:
            take_away(path)


@contextmanager
def swapping(server: HostileServer, path: Path, kind: str) -> Iterator[Callable[[], int]]:
    """The file and something else take turns, as fast as can be. Gives how often they have, and waits for the first."""
    other, aside = path.with_name("other-of-the-test"), path.with_name("aside-of-the-test")
    ended, turns = threading.Event(), [0]

    def turn() -> None:
        while not ended.is_set():
            KINDS[kind](other, server)
            path.rename(aside)
            _put(other, path)
            take_away(path)
            _put(aside, path)
            turns[0] += 1

    thread = threading.Thread(target=turn, name="swapping")
    thread.start()
    try:
        until(lambda: turns[0] > 0)
        yield lambda: turns[0]
    finally:
        ended.set()
        thread.join()
