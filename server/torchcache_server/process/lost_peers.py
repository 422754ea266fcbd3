"""Connections of clients that are gone without a word: the kernel asks, and closes what isn't answered.

A client whose cable was pulled, or whose host went down, ends its connections, or doesn't, and the server never hears
of it. gRPC's own default is to ask after two hours, and Flight's server can't be told otherwise. Sockets take after the
one that accepted them, so it is enough to tell that one.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

IDLE_S: Final = 20
"""How long nothing may come before the kernel asks."""
INTERVAL_S: Final = 5
PROBES: Final = 4
"""So many in a row may go without an answer."""

_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
)


def notice_lost_peers(ports: Collection[int]) -> int:
    """Connections that this process accepts at `ports` from now on end when their peer is gone.

    Returns at how many listening sockets that was set.
    """
    told = 0
    for listener in _listeners(ports):
        for level, option, value in _OPTIONS:
            listener.setsockopt(level, option, value)
        told += 1
    return told


def _listeners(ports: Collection[int]) -> Iterator[socket.socket]:
    """The process's own sockets that listen for TCP at one of `ports`, each open while it is looked at."""
    for entry in Path("/proc/self/fd").iterdir():
        # Of what kind it is shows only then: of a file, or of what was closed meanwhile, there is no such option.
        with suppress(OSError), socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM) as found:
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                address = found.getsockname()
                if isinstance(address, tuple) and address[1] in ports:
                    yield found
