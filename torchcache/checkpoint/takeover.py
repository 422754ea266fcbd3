"""What a rank's save takes over from an earlier one, for as long as the pool has room for the rest of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from torchcache.checkpoint.ticket import Ticket
from torchcache.errors import OutOfSpace, TorchCacheError
from torchcache.pool import Pool

_log = logging.getLogger(__name__)

UPLOAD_S: Final = 300.0
"""A save that finds no room waits for so long for the upload of the one before."""
_LOOK_S: Final = 0.2


class Takeover:
    """Files of an earlier save that this one names as its own. Thread-safe.

    What is lent stays in the pool, of which a save that borrows nothing might have had the room. So where one finds no
    room it gives back what it was lent, to write that too; and where the save before borrowed, and so holds more than
    its own size, it waits until that is uploaded, and may go.
    """

    def __init__(
        self, pool: Pool, ticket: Ticket, files: Mapping[str, int], *, before: tuple[str, str] | None
    ) -> None:
        """`files`: names and bytes of those that were lent. `before`: path and id of the save to wait for."""
        self.files = dict(files)
        """Those that the save takes over: none once they were given back."""
        self._pool = pool
        self._ticket = ticket
        self._lock = threading.Lock()
        self._turn = 0
        self._before = before
        self._ways: list[Callable[[], bool]] = [self._give_back, self._wait_for_upload]

    def write(self, attempt: Callable[[bool], None]) -> None:
        """Calls `attempt`, anew when it found no room and some could be made. Raises what it raised last.

        It is told whether a lack of room counts that a server has for a copy: while there is something to give back.
        """
        while True:
            turn = self._turn
            try:
                return attempt(bool(self.files))
            except OutOfSpace as error:
                if not self._make_room(turn, error):
                    raise

    def _make_room(self, turn: int, error: OutOfSpace) -> bool:
        """Whether there may be more than there was at `turn`."""
        with self._lock:
            if self._turn != turn:  # another thread was faster
                return True
            while self._ways:
                if self._ways.pop(0)():
                    self._turn += 1
                    _log.info("%s is written on, which found no room: %s", self._ticket.uri, error)
                    return True
            return False

    def _give_back(self) -> bool:
        if not self.files:
            return False
        ticket = self._ticket
        save = (ticket.store, ticket.path, ticket.part, ticket.save_id)
        self._pool.return_files(save, sorted(self.files), servers=ticket.servers)
        self.files = {}
        return True

    def _wait_for_upload(self) -> bool:
        """Whether the save before, which has borrowed, isn't only in the pool any more."""
        if self._before is None:
            return False
        path, save_id = self._before
        until_s = time.monotonic() + UPLOAD_S
        waited = False
        try:
            while True:
                base = self._pool.get_save(self._ticket.store, path, self._ticket.part, manifest=False)
                if base.save_id != save_id or not (base.borrowed or waited):
                    return False
                if base.state != "committed" or time.monotonic() >= until_s:
                    return base.state == "durable"
                waited = True
                time.sleep(_LOOK_S)
        except TorchCacheError as error:
            _log.info("whether %s is uploaded isn't known: %s", path, error)
            return False
