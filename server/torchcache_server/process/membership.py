"""A server's place in a pool's registry: announced when it serves, kept while it lives, withdrawn before it goes."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from torchcache.errors import TransientError
from torchcache.registry import Announcement, Registry

if TYPE_CHECKING:
    from etcd3gw.lease import Lease

LEASE_S: Final = 10
"""How long a server that died stays in the registry."""

_LOG = logging.getLogger(__name__)


class Membership:
    """Keeps `server` announced from construction until `close`, by a thread.

    While the registry doesn't answer, the server serves on: clients keep to the servers they last saw. It is announced
    again as soon as the registry is back, also one that has forgotten it.
    """

    def __init__(self, registry: Registry, server: Announcement, *, lease_s: int = LEASE_S) -> None:
        self._registry = registry
        self._server = server
        self._lease_s = lease_s
        self._lease: Lease | None = None
        self._away = False
        self._ending = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Withdraws the server. Where the registry can't be told, the lease ends by itself."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._thread.join()
        try:
            if self._lease is not None:
                self._registry.withdraw(self._lease)
        except TransientError as error:
            _LOG.warning("it leaves %s only when its lease ends: %s", self._registry.address, error)
        self._registry.close()

    def _run(self) -> None:
        while not self._ending.wait(self._lease_s / 4):
            self._renew()

    def _renew(self) -> None:
        try:
            if self._lease is None or not self._registry.keep(self._lease):
                self._lease = self._registry.announce(self._server, self._lease_s)
                _LOG.info("announced in %s as %s", self._registry.address, self._server.address)
        except TransientError as error:
            if not self._away:
                _LOG.warning("serving on without the registry: %s", error)
            self._away = True
        else:
            self._away = False
