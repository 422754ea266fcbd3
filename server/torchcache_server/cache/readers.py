"""Who is reading which save: for as long as somebody is, it is not deleted.

A reader says so when it opens a save, and again while it reads; one that was killed is forgotten after a while. Kept in
memory only: a server that starts again is told anew, within the time a reader waits between two sayings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torchcache.errors import ConfigurationError, InUse, NotCommitted
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.slots import Reader, Slot, Slots

READ_LEASES: Final = 6
"""A reader that says nothing for so many leases is gone. Longer than a writer's: between opening and reading lies the
planning of all ranks."""

_MOST_READERS: Final = 100_000


class Readers:
    """The readers of all saves. Thread-safe."""

    def __init__(self, slots: Slots, *, lease_s: float, clock: Callable[[], float]) -> None:
        self._slots = slots
        self._lease_s = READ_LEASES * lease_s
        self._clock = clock

    def hold(self, key: SaveKey, save_id: str, reader_id: str, name: str) -> float:
        """Keeps the save from being deleted for so many seconds, which it returns. Raises NotCommitted if it is."""
        slot = self._slots.slot(key)
        with self._slots.changed:
            if slot.deletion is not None and slot.deletion.save_id == save_id:
                raise NotCommitted(f"{key} is being deleted", object=str(key))
            self._forget_gone(slot)
            if len(slot.readers) >= _MOST_READERS:
                raise ConfigurationError(f"{key} has too many readers", object=str(key))
            slot.readers[reader_id] = Reader(save_id, name, self._clock() + self._lease_s)
        return self._lease_s

    def release(self, key: SaveKey, reader_id: str) -> None:
        """The reader is done; one that isn't known is fine."""
        slot = self._slots.find(key)
        if slot is not None:
            with self._slots.changed:
                slot.readers.pop(reader_id, None)

    def tidy(self, slot: Slot) -> None:
        """Forgets those that are gone without a word."""
        if slot.readers:
            with self._slots.changed:
                self._forget_gone(slot)

    def require_none(self, slot: Slot, save_id: str) -> None:
        """Raises InUse, naming one, if somebody reads the save."""
        with self._slots.changed:
            self._forget_gone(slot)
            names = sorted(reader.name for reader in slot.readers.values() if reader.save_id == save_id)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InUse(
                f"{slot.key} is being read by {names[0]}{more}: delete it once that is done",
                object=str(slot.key),
            )

    def _forget_gone(self, slot: Slot) -> None:
        now = self._clock()
        for reader_id in [id for id, reader in slot.readers.items() if reader.expires_s <= now]:
            del slot.readers[reader_id]
