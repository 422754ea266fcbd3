"""What waits for its upload, and how much of it may."""

from __future__ import annotations

import time
from typing import Final

from torchcache.errors import Overloaded
from torchcache.model import ObjectId
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.slots import Slots

_WAIT_S: Final = 5.0
"""How long one call waits for uploads: the client calls again, and other calls want the thread."""
_LOOK_S: Final = 0.2


class Pending:
    """The saves of a server that aren't in the under-store yet. Thread-safe.

    `most_bytes`: with so many no further save is begun; None: any number.
    """

    def __init__(self, slots: Slots, *, most_bytes: int | None) -> None:
        self._slots = slots
        self._most_bytes = most_bytes

    @property
    def bytes(self) -> int:
        """Bytes that are acknowledged and for this server to upload."""
        return sum(slot.pending_bytes for slot in self._slots.all())

    @property
    def held_bytes(self) -> int:
        """Bytes that may not be evicted before they are uploaded, from here or by their owner."""
        held: dict[ObjectId, int] = {}  # a file that several have borrowed is held once
        for slot in self._slots.all():
            save = slot.save
            if save is not None and save.must_be_kept:
                uploaded = frozenset(slot.uploaded)
                held |= {one.id: one.size for name, one in save.objects.items() if name not in uploaded}
            for copy in tuple(slot.copies.values()):
                held |= {one.id: one.size for one in copy.save.objects.values()}
        return sum(held.values())

    def wait_for_room(self, key: SaveKey, save_id: str, *, deadline: float) -> None:
        """Backpressure: raises Overloaded while too much waits for its upload. A save that is begun isn't held up."""
        slot = self._slots.find(key)
        if slot is not None and slot.lease is not None and slot.lease.save_id == save_id:
            return
        until = min(deadline, time.monotonic() + _WAIT_S)
        while self._most_bytes is not None and (held := self.held_bytes) >= self._most_bytes:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise Overloaded(
                    f"{held} bytes of checkpoints wait for their upload, {self._most_bytes} may: the storage is slower "
                    "than the saves, or can't be reached; `torchcache checkpoint ls` says more",
                    object=str(key),
                )
            with self._slots.changed:
                self._slots.changed.wait(min(left_s, _LOOK_S))

    def counts(self) -> dict[str, int]:
        """How many saves there are in each state. "copy": of those that another server owns."""
        counts = dict.fromkeys(("saving", "cached", "replicated", "durable", "failed", "copy"), 0)
        for slot in self._slots.all():
            counts["copy"] += len(slot.copies)
            counts["saving"] += slot.lease is not None
            if slot.save is not None:
                in_pool = "replicated" if slot.save.replicas > 1 else "cached"
                counts[in_pool if slot.save.state == "committed" else slot.save.state] += 1
        return counts
