"""A reader's hold on a save: while somebody reads it, retention does not delete it. Free of torch."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torchcache.checkpoint.holder import holder_name
from torchcache.errors import NotCommitted, TorchCacheError

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

_log = logging.getLogger(__name__)

_LEAST_PAUSE_S = 0.05


class Hold:
    """Taken when a save is opened, renewed by a thread while it is read (`kept`), released after that.

    One that is never released, because its process died or its load was given up, ends by itself: within a minute.
    """

    def __init__(self, pool: Pool, save: SaveInfo) -> None:
        self._pool = pool
        self._save = save
        self._id = uuid.uuid4().hex
        self._lease_s = 0.0

    def take(self) -> None:
        """Raises NotCommitted if the save is being deleted. Where the pool can't be told, reading goes on so."""
        try:
            self._lease_s = self._pool.hold_save(self._save, self._id, holder_name())
        except NotCommitted:
            raise
        except TorchCacheError as error:
            _log.warning("%s is read without a hold on it: %s", self._save.path, error)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renews while the block runs, and releases at its end."""
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended,), name="torchcache-hold", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.release()

    def release(self) -> None:
        try:
            self._pool.release_save(self._save, self._id)
        except TorchCacheError as error:
            _log.info("the hold on %s was left to run out: %s", self._save.path, error)

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(max(self._lease_s / 3, _LEAST_PAUSE_S) if self._lease_s else None):
            try:
                self.take()
            except NotCommitted as error:
                _log.warning("%s may go while it is read: %s", self._save.path, error)
                return
