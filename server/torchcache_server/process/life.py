"""What the log says of a server's life: how it serves from its start, and how it ends."""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Sequence
from typing import Final

from torchcache.addresses import is_loopback
from torchcache_server.store import StoreUsage

from .config import ServerConfig

_LOG = logging.getLogger(__name__)
_GB: Final = 1e9


def started(config: ServerConfig, *, version: str, address: str, data: str, usage: StoreUsage) -> str:
    """The line that says what runs: version, addresses, lanes, store, under-stores."""
    ports = f"data {data}"
    if config.metrics_port is not None:
        ports += f", metrics {config.metrics_host}:{config.metrics_port or 'any'}"
    door = "a token" if config.tls is None else "TLS and a token"
    if config.tls is not None and config.tls.client_ca is not None:
        door = "TLS, certificates of clients and a token"
    stores = ", ".join(f"{name}={uri}" for name, uri in config.under_stores)
    return (
        f"torchcache {version} serves on {address} ({ports}) behind {door}; lanes flight, and local for its own user "
        f"on this machine; store {config.store}: {usage.used_bytes / _GB:.1f} of {usage.capacity_bytes / _GB:.1f} GB "
        f"held, {usage.chunks} chunks; under-stores {stores}"
    )


def exposed(config: ServerConfig) -> str | None:
    """What to do about strangers who reach the data port; None if none do."""
    if is_loopback(config.host) or (config.tls is not None and config.tls.client_ca is not None):
        return None
    return (
        f"whoever reaches the data port at {config.host} can have this server take memory before a token is asked for: "
        "give --tls-client-ca, or see to it that only clients reach it, and bound the server's memory"
    )


def open_key(config: ServerConfig) -> str | None:
    """What to do about a private key that everybody may read whom its folder lets in; None if there is none."""
    if config.tls is None:
        return None
    mode = stat.S_IMODE(config.tls.key.stat().st_mode)
    if not mode & stat.S_IROTH:
        return None
    return (
        f"everybody whom its folder lets in may read the private key {config.tls.key} (mode {mode:04o}) "
        "and be this server to its clients: give it mode 0600, or, as a secret of Kubernetes, defaultMode 0440"
    )


class Ending:
    """Tells the log of an end, from where it begins."""

    def __init__(self, why: str, drain_s: float) -> None:
        self._began = time.monotonic()
        _LOG.info(
            "%s: nothing new is taken; what runs is finished and what waits is uploaded, for at most %g s",
            why,
            drain_s,
        )

    def drained(self, left: Sequence[str]) -> None:
        """`left`: the URIs of what isn't in the under-store yet."""
        for uri in left:
            _LOG.warning("not yet in the under-store: %s", uri)
        took_s = time.monotonic() - self._began
        if left:
            _LOG.warning(
                "drained for %.1f s; %d left; a server on the same store goes on with them", took_s, len(left)
            )
        else:
            _LOG.info("drained in %.1f s: all is in the under-stores", took_s)

    def ended(self, code: int) -> None:
        """All is closed; the process ends with this exit code."""
        _LOG.info("ended after %.1f s, with exit code %d", time.monotonic() - self._began, code)
