"""Sockets in the file system: which of two is a server's, and whether strangers can have put one there.

Who listens on a socket gets the token from every client. So neither side uses one that anybody but its owner and root
could have made: it is no link, lies in a folder that only they write, and the way there leads neither through folders
where others may put another in its place nor over their links. Whoever owns a folder on the way is trusted.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from torchcache.errors import ConfigurationError

DATA: Final = ".data"
"""What is behind the name of a server's socket in that of the one on which it serves data."""

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def data_socket(path: str) -> str:
    """The socket for data of the server whose control socket is at `path`."""
    return path + DATA


def check_folder(path: str, *owners: int) -> None:
    """Raises ConfigurationError if others than root and `owners`, user ids, may put a socket at `path`."""
    folder = Path(path).parent
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigurationError(
            f"the folder {folder} of the socket can't be used: {error.strerror}"
        ) from None
    if found.st_uid not in (0, *owners):
        raise ConfigurationError(
            f"the folder {folder} of the socket belongs to user {found.st_uid}, who could put another in its place: "
            "take a folder of your own"
        )
    if found.st_mode & _OTHERS_WRITE:
        raise ConfigurationError(
            f"others may write the folder {folder} of the socket, and put another in its place: chmod go-w it, or "
            "take a folder of its own"
        )
    _check_way(folder, 0, *owners)


def _check_way(path: Path, *owners: int) -> None:
    """Raises ConfigurationError if others than `owners` may lead `path`, which is there, to another place."""
    for one in (*reversed(path.parents), path):
        found = one.lstat()
        if stat.S_ISLNK(found.st_mode):
            if found.st_uid not in owners:
                raise ConfigurationError(
                    f"{one}, on the way to the socket, is a link of user {found.st_uid}: take another"
                )
            _check_way(one.parent / one.readlink(), *owners)
        elif found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            raise ConfigurationError(
                f"others may write {one}, on the way to the socket, and put another in its place: chmod go-w it, or "
                "take a folder elsewhere"
            )


def check_socket(path: str, me: int | None = None) -> None:
    """Whether a client may show its token to who listens at `path`, now or, if nobody does, later.

    Raises ConfigurationError for what is no socket, or belongs to another user than `me` (default: this process's) and
    root, or may have been put there by others. Root takes everybody's. Without a socket the folder alone is looked at,
    and without that nothing: connecting tells. As a stranger may then make both, this is asked before every call, for
    gRPC connects anew by itself.
    """
    me = os.geteuid() if me is None else me
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        try:
            owner = Path(path).parent.stat().st_uid
        except FileNotFoundError:
            return
        check_folder(path, me, *([owner] if me == 0 else []))
        return
    except OSError as error:
        raise ConfigurationError(f"the socket {path} can't be used: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
        raise ConfigurationError(f"{path} is no socket but {kind}: give the path that the server listens on")
    if me != 0 and found.st_uid not in (0, me):
        raise ConfigurationError(
            f"the socket {path} belongs to user {found.st_uid}: the token is shown to servers of this user or root only"
        )
    check_folder(path, me, found.st_uid)
