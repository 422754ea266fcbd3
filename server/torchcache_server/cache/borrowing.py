"""Files that a save takes over from an earlier one as they lie here, instead of getting them again. See decision 23.

A server lends files of a save it has, its own or a copy, to one that is being written: it holds them as it holds what
that one writes, and looks at every byte before it says so. The commit then notes whose the files are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

from torchcache.errors import CheckpointError, ConfigurationError, IntegrityError, Overloaded
from torchcache_server.cache.saves import Save, SaveKey
from torchcache_server.cache.shard_source import require_intact
from torchcache_server.cache.slots import Loan, Slot, Slots
from torchcache_server.store import Store

_log = logging.getLogger(__name__)

LOAN_LEASES: Final = 60
"""What is lent to a save whose reservation isn't here, as on a server with a copy, is held for so many leases."""

_MOST_LOANS: Final = 16
_MOST_NAMESPACES: Final = 8
"""What one save may keep alive of others."""
MOST_READING: Final = 16
"""So many calls read files to lend at a time: each has one of the threads that leases are renewed by."""


class Borrowing:
    """The loans of one server. Thread-safe."""

    def __init__(self, store: Store, slots: Slots, *, lease_s: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._slots = slots
        self._lease_s = lease_s
        self._clock = clock
        self._reading = threading.BoundedSemaphore(MOST_READING)

    def lend(
        self,
        key: SaveKey,
        save_id: str,
        base: SaveKey,
        base_id: str,
        names: Collection[str],
        *,
        check: Callable[[], None],
    ) -> list[str]:
        """Those of the files `names` of the save `base_id` at `base` that are held from now on for `save_id` at `key`.

        Reads them; `check` is called before every chunk and raises to stop. None if the base isn't here. Raises
        ConfigurationError if it isn't of the same folder, Overloaded if too many are reading: ask again.
        """
        if key.run != base.run:
            raise ConfigurationError(f"{key} can't borrow from {base}: that isn't of the same run")
        if not self._reading.acquire(blocking=False):
            raise Overloaded(f"{MOST_READING} others borrow files here just now", object=str(key))
        try:
            slot = self._slots.slot(key)
            save = self._begin(slot, save_id, base, base_id)
            return self._hold(slot, save_id, save, names, check) if save is not None else []
        finally:
            self._reading.release()

    def _hold(
        self, slot: Slot, save_id: str, save: Save, names: Collection[str], check: Callable[[], None]
    ) -> list[str]:
        self._slots.settle(save.namespaces)
        intact = list(self._intact(save, names, check))
        with self._slots.changed:
            loan = slot.loans.get(save_id)
            if loan is None:  # the reservation has ended meanwhile
                return []
            slot.loans[save_id] = replace(loan, names=loan.names.union(intact))
        return intact

    def _begin(self, slot: Slot, save_id: str, base: SaveKey, base_id: str) -> Save | None:
        """The base, which isn't dropped from here on. None if it isn't here, or about to go."""
        with self._slots.changed:
            save = self._find(base, base_id)
            there = slot.loans.get(save_id)
            if (
                save is None
                or save.namespaces & self._slots.dropping
                or len(save.namespaces) > _MOST_NAMESPACES
            ):
                return None
            if there is None and len(slot.loans) >= _MOST_LOANS:
                return None
            if there is not None and there.base.save_id != base_id:
                return None
            if slot.lease is not None and slot.lease.save_id != save_id:
                return None
            if save_id in slot.copies or (slot.save is not None and slot.save.save_id == save_id):
                return None
            names = there.names if there is not None else frozenset()
            slot.loans[save_id] = Loan(save, names, self._clock() + LOAN_LEASES * self._lease_s)
        return save

    def _find(self, key: SaveKey, save_id: str) -> Save | None:
        slot = self._slots.find(key)
        if slot is None or slot.deletion is not None:
            return None
        if slot.save is not None and slot.save.save_id == save_id and not slot.save.is_superseded:
            return slot.save
        copy = slot.copies.get(save_id)
        return copy.save if copy is not None else slot.spent.get(save_id)

    def _intact(self, save: Save, names: Iterable[str], check: Callable[[], None]) -> Iterable[str]:
        objects = save.objects
        for name in names:
            object = objects.get(name)
            if object is None:
                continue
            try:
                require_intact(self._store, object, check)
            except IntegrityError as error:
                _log.warning("%s isn't lent from %s: %s", name, save.key, error)
            else:
                yield name

    def tidy(self, slot: Slot, *, deadline: float) -> None:
        """Ends the loans to saves that nobody came back for. Raises DeadlineExceeded."""
        for save_id, loan in tuple(slot.loans.items()):
            if self._has_lapsed(slot, save_id, loan):
                # Not amid a commit that has found them lent.
                with slot.exclusively(deadline):
                    if self._has_lapsed(slot, save_id, loan):
                        self._slots.end_loan(slot, save_id, only=loan)

    def _has_lapsed(self, slot: Slot, save_id: str, loan: Loan) -> bool:
        lease = slot.lease
        is_held = lease is not None and lease.save_id == save_id
        return not is_held and self._clock() >= loan.expires_s


def origins(slot: Slot, save_id: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Path and id of the saves that stored the files `names`. Raises CheckpointError if they weren't lent."""
    if not names:
        return {}
    loan = slot.loans.get(save_id)
    lacking = sorted(set(names) - (loan.names if loan is not None else set()))
    if loan is None or lacking:
        raise CheckpointError(
            f"{slot.key} can't be committed: its file {lacking[0]} was to be borrowed from an earlier save, and isn't "
            "lent (any more): save again",
            object=str(slot.key),
        )
    return {name: loan.base.origin(name) for name in names}
