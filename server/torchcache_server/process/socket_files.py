"""The two Unix sockets of a server that listens on a path: nobody else's, and never in the way of one that serves.

gRPC removes whatever socket it finds at the path that it is to bind, though another server may listen there. So that
is looked after here, under a lock that goes with the process.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Final

from torchcache.addresses import UNIX
from torchcache.errors import ConfigurationError
from torchcache.locks import LockFile
from torchcache.unix_sockets import check_folder, data_socket

LOCK: Final = ".lock"
PROBE_S: Final = 2.0


class SocketFiles:
    """The path, and the one for data beside it, held for this server until `close`."""

    def __init__(self, path: str) -> None:
        """Makes the folder if there is none, and removes what a server that has died left behind.

        Raises ConfigurationError if another server has the path, if something else is there, or if the folder isn't
        this user's alone to write.
        """
        self._files = (path, data_socket(path))
        folder = Path(path).parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"the folder {folder} can't be made: {error.strerror}. Let root make it for this user, with mode 0700, "
                "or choose a path in a folder of your own, such as $XDG_RUNTIME_DIR/torchcache"
            ) from None
        check_folder(path, os.geteuid())
        try:
            self._lock = LockFile(Path(path + LOCK))
        except OSError as error:
            raise ConfigurationError(f"the file {path}{LOCK} can't be used: {error.strerror}") from None
        try:
            if not self._lock.try_exclusive():
                raise _taken(path)
            for file in self._files:
                _clear(file)
        except BaseException:
            self._lock.close()
            raise

    def protect(self) -> None:
        """Once both are bound: only their owner may connect."""
        for file in self._files:
            Path(file).chmod(0o600)

    def close(self) -> None:
        """Removes them. Both servers must have ended."""
        for file in self._files:
            Path(file).unlink(missing_ok=True)
        self._lock.close()


def _clear(path: str) -> None:
    """Removes a socket on which nobody listens."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigurationError(f"{path} is there and no socket: choose another --listen, or remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except OSError as error:  # too many wait for an answer, or it isn't ours
            raise ConfigurationError(f"the socket {path} can't be taken: {error.strerror or error}") from None
    raise _taken(path)


def _taken(path: str) -> ConfigurationError:
    return ConfigurationError(f"another server listens on {UNIX}{path}: choose another --listen")
