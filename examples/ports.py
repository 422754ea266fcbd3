"""Free ports for servers that have to be told one, on a machine where others look for ports too."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST, _LEAST = 10_000, 2_000


def free_port(*, beside: int) -> int:
    """A port of loopback that is free now, together with the one `beside` it.

    Neither is one that the kernel gives to outgoing connections, where that leaves enough: so nobody takes it by
    accident before its server listens, or while it is away.
    """
    end = _end(beside)
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(_FIRST, end)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + beside))
            except OSError:
                continue
            return port


def _end(beside: int) -> int:
    try:
        outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        outgoing = 0
    end = outgoing - beside
    return end if end >= _FIRST + _LEAST else 65_536 - beside
