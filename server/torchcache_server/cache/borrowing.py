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
"""What is lent to a save whose reservation isn't here, as on a server with a copy, is held for so many leases after
it was asked for, or the save has grown."""

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
            save, wanted = self._begin(slot, save_id, base, base_id, names)
            return self._look_at(slot, save_id, save, wanted, check) if save is not None else []
        finally:
            self._reading.release()

    def _begin(
        self, slot: Slot, save_id: str, base: SaveKey, base_id: str, names: Collection[str]
    ) -> tuple[Save | None, frozenset[str]]:
        """The base, and those of its files that aren't dropped from here on. None if it isn't here, or about to go."""
        none: tuple[None, frozenset[str]] = None, frozenset()
        with self._slots.changed:
            save = self._find(base, base_id)
            there = slot.loans.get(save_id)
            if save is None or not self._may_borrow(slot, save_id, there, base_id):
                return none
            wanted = frozenset(names).intersection(name for name, _ in save.files)
            loan = there if there is not None else Loan(save, frozenset(), 0.0)
            expires_s = self._clock() + LOAN_LEASES * self._lease_s
            loan = replace(loan, expires_s=expires_s, reading=(*loan.reading, wanted))
            new = loan.namespaces - (there.namespaces if there is not None else frozenset())
            if not wanted or new & self._slots.dropping or len(loan.namespaces) > _MOST_NAMESPACES:
                return none
            slot.loans[save_id] = loan
        return save, wanted

    def _may_borrow(self, slot: Slot, save_id: str, there: Loan | None, base_id: str) -> bool:
        """Whether the save may have a loan of that base, besides the one that is `there`. It isn't committed yet."""
        if there is None and len(slot.loans) >= _MOST_LOANS:
            return False
        if there is not None and there.base.save_id != base_id:
            return False
        if slot.lease is not None and slot.lease.save_id != save_id:
            return False
        return save_id not in slot.copies and (slot.save is None or slot.save.save_id != save_id)

    def _look_at(
        self, slot: Slot, save_id: str, save: Save, wanted: frozenset[str], check: Callable[[], None]
    ) -> list[str]:
        """Those that are intact. The others are let go; all of them, if that can't be found out."""
        intact: frozenset[str] = frozenset()
        try:
            self._slots.settle(save.namespaces_of(wanted))
            intact = frozenset(self._intact(save, wanted, check))
        finally:
            is_lent = self._slots.change_loan(slot, save_id, lambda loan: _looked_at(loan, wanted, intact))
        return sorted(intact) if is_lent else []  # the reservation may have ended meanwhile

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

    def take_back(self, key: SaveKey, save_id: str, names: Collection[str], *, deadline: float) -> None:
        """Ends the loan of these files, if it is there. Raises DeadlineExceeded.

        Not amid a commit that has found them lent; and once that is done, there is no loan.
        """
        slot = self._slots.find(key)
        if slot is None:
            return
        given_back = frozenset(names)
        with slot.exclusively(deadline):
            self._slots.change_loan(slot, save_id, lambda loan: replace(loan, names=loan.names - given_back))

    def tidy(self, slot: Slot, *, deadline: float) -> None:
        """Ends the loans to saves that nobody came back for. Raises DeadlineExceeded."""
        for save_id, loan in tuple(slot.loans.items()):
            if self._has_lapsed(slot, save_id, loan):
                # Not amid a commit that has found them lent.
                with slot.exclusively(deadline):
                    if self._has_lapsed(slot, save_id, loan) and not self._grows(slot, save_id, loan):
                        self._slots.end_loan(slot, save_id, only=loan)

    def _grows(self, slot: Slot, save_id: str, loan: Loan) -> bool:
        """Whether the save was put more of since somebody looked last: then it is looked at again later."""
        namespace = slot.key.namespace(save_id)
        put_bytes = sum(usage.bytes for usage in self._store.namespaces() if usage.name == namespace)
        if put_bytes <= loan.put_bytes:
            return False
        with self._slots.changed:
            if slot.loans.get(save_id) is loan:
                expires_s = self._clock() + LOAN_LEASES * self._lease_s
                slot.loans[save_id] = replace(loan, expires_s=expires_s, put_bytes=put_bytes)
        return True

    def _has_lapsed(self, slot: Slot, save_id: str, loan: Loan) -> bool:
        lease = slot.lease
        is_held = lease is not None and lease.save_id == save_id
        return not is_held and self._clock() >= loan.expires_s


def _looked_at(loan: Loan, wanted: frozenset[str], intact: frozenset[str]) -> Loan:
    """Once the call that looks at `wanted`, this very set, is done. A loan that was begun since is left as it is."""
    reading = tuple(names for names in loan.reading if names is not wanted)
    return (
        loan
        if len(reading) == len(loan.reading)
        else replace(loan, names=loan.names | intact, reading=reading)
    )


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
