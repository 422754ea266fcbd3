"""The coordinator's hold on a path while it saves: a reservation in the pool, renewed by a thread.

torch tells a writer when a save succeeded, never that it failed. So a lease also ends by itself when its save can't be
going on any more: the thread that saved has ended, or begins another save. A process that dies just stops renewing.
"""

from __future__ import annotations

import logging
import os
import threading

from torchcache.checkpoint.ticket import Ticket
from torchcache.errors import TorchCacheError, TransientError
from torchcache.pool import Pool

_log = logging.getLogger(__name__)
_of_thread = threading.local()

_LEAST_PAUSE_S = 0.05


class Lease:
    """A reservation that is renewed until `stop` or `abandon`."""

    def __init__(self, pool: Pool, ticket: Ticket, lease_s: float) -> None:
        self.ticket = ticket
        self.error: TorchCacheError | None = None
        """Why the reservation is lost, once it is."""
        self._pool = pool
        self._pause_s = _pause(lease_s)
        self._pid = os.getpid()
        self._owner = threading.current_thread()
        self._ended = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._renew, name="torchcache-lease", daemon=True)

    def start(self) -> None:
        """Starts renewing. The thread's previous save is over, so its path is given back, had it not been committed."""
        end_lease_of_thread()
        _of_thread.lease = self
        self._thread.start()

    def stop(self) -> None:
        """Stops renewing; the reservation stays until it runs out."""
        self._ended.set()

    def abandon(self) -> None:
        """Stops renewing and gives the path back, unless stopped before. Only for a save that no rank still writes."""
        self.release()
        if self._abandoned and self._pid == os.getpid():
            self._thread.join()

    def release(self) -> None:
        """As `abandon`, but leaves it to the thread."""
        if not self._ended.is_set():
            self._abandoned = True  # and stays so, however often it is told before the thread looks
            self._ended.set()

    def _renew(self) -> None:
        while not self._ended.wait(self._pause_s) and self._owner.is_alive():
            try:
                self._pause_s = _pause(self._renew_once())
            except TransientError as error:
                # It may come back before the lease has run out; and only the commit decides.
                _log.warning("the reservation of %s could not be renewed: %s", self.ticket.uri, error)
            except TorchCacheError as error:
                self.error = error
                return
        if self._abandoned or not self._ended.is_set():
            self._give_back()

    def _renew_once(self) -> float:
        ticket = self.ticket
        return self._pool.renew_save(
            ticket.store, ticket.path, ticket.part, ticket.save_id, server=next(iter(ticket.servers), "")
        )

    def _give_back(self) -> None:
        ticket = self.ticket
        try:
            self._pool.abandon_save(
                ticket.store, ticket.path, ticket.part, ticket.save_id, servers=ticket.servers
            )
        except TorchCacheError as error:
            _log.info("the reservation of %s was left to run out: %s", ticket.uri, error)


def end_lease_of_thread() -> None:
    """A thread runs one save at a time: when it begins another, or resets, its last one is over."""
    lease: Lease | None = getattr(_of_thread, "lease", None)
    _of_thread.lease = None
    if lease is not None and lease._pid == os.getpid():
        lease.abandon()


def _pause(lease_s: float) -> float:
    return max(lease_s / 3, _LEAST_PAUSE_S)
