"""What a server holds of saves that aren't durable yet.

For who sees to it that enough servers hold them, and that all of it is sound: see process/copy_keeper.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from torchcache.errors import IntegrityError, TorchCacheError
from torchcache.model import ChunkId, ObjectId, ObjectInfo, chunk_digest
from torchcache.save_names import save_namespace
from torchcache_server.cache.claim_book import ClaimBook
from torchcache_server.cache.saves import Save
from torchcache_server.cache.slots import Slots
from torchcache_server.store import Store
from torchcache_server.understore.base import UnderStore


@dataclass(frozen=True, slots=True)
class Waiting:
    """A save of this server's own that isn't durable yet, and how much of it isn't uploaded."""

    save: Save
    pending_bytes: int


class Holdings:
    """Thread-safe."""

    def __init__(
        self, store: Store, slots: Slots, claims: ClaimBook, *, under_store_of: Callable[[str], UnderStore]
    ) -> None:
        self._store = store
        self._slots = slots
        self._claims = claims
        self._under_store_of = under_store_of
        self._reported: set[ObjectId] = set()
        self._lock = threading.Lock()

    @property
    def server_id(self) -> str:
        return self._store.server_id

    @property
    def damaged_chunks(self) -> int:
        """So many are known to be damaged, and stay because nobody else may have them."""
        return self._store.usage().damaged_kept

    def report(self, chunk: ChunkId) -> None:
        """A reader found that a chunk of a save is damaged here."""
        with self._lock:
            self._reported.add(chunk.object)

    def take_reported(self) -> list[Save]:
        """The saves of which damage was reported since this was asked last."""
        with self._lock:
            reported, self._reported = self._reported, set()
        return [save for save in self.all() if any(one.id in reported for one in save.objects.values())]

    def waiting(self) -> list[Waiting]:
        """The server's own saves that aren't durable, the one that was committed first in front."""
        saves = [(slot.save, slot.pending_bytes) for slot in self._slots.all()]
        found = [Waiting(save, pending) for save, pending in saves if save is not None and save.must_be_kept]
        return sorted(found, key=lambda one: one.save.committed_unix_s)

    @property
    def oldest_s(self) -> float:
        """How long ago the one was committed that waits longest to be durable; 0.0 if none does."""
        waiting = self.waiting()
        return max(0.0, time.time() - waiting[0].save.committed_unix_s) if waiting else 0.0

    def all(self) -> list[Save]:
        """Its own saves that aren't durable, and its copies."""
        own = [one.save for one in self.waiting()]
        return own + [copy.save for slot in self._slots.all() for copy in tuple(slot.copies.values())]

    def is_wanted(self, save: Save) -> bool:
        """Whether it still is among `all`."""
        slot = self._slots.find(save.key)
        if slot is None or slot.deletion is not None:
            return False
        is_own = slot.save is not None and slot.save.save_id == save.save_id and slot.save.must_be_kept
        return is_own or save.save_id in slot.copies

    def is_responsible(self, save: Save, *, deadline: float) -> bool:
        """Whether it is this server, and no other, that brings the save to its end: the claim says so.

        While the under-store can't be asked, or refuses us, it goes on to be the one that it was.
        """
        try:
            return self._claims.holds(
                self._under_store_of(save.key.store), save.key, save.save_id, deadline=deadline
            )
        except TorchCacheError:
            return True

    def chunks(self, object: ObjectInfo) -> Iterator[tuple[int, pa.Buffer]]:
        """Number and bytes of each chunk, verified. Raises IntegrityError where one is damaged or gone."""
        if not object.size:
            yield 0, pa.py_buffer(b"")  # of which no uploader asks whether it is there
            return
        for index in range(object.chunk_count):
            payload = self._sound(object, index)
            if payload is None:
                raise IntegrityError(
                    f"chunk {index} of {object.id} is damaged, or gone", object=str(object.id)
                )
            yield index, payload

    def unsound(self, save: Save, check: Callable[[], None]) -> Iterator[tuple[str, int]]:
        """Name of the file and number of each chunk that is damaged, or gone. Reads all of the save.

        `check` is called for each chunk, and may raise.
        """
        for name, object in save.objects.items():
            for index in range(object.chunk_count if object.size else 0):
                check()
                if self._sound(object, index) is None:
                    yield name, index

    def _sound(self, object: ObjectInfo, index: int) -> pa.Buffer | None:
        chunk = ChunkId(object.id, index)
        stored = self._store.read(chunk)
        if stored is None or len(stored.payload) != chunk.length(object.size):
            return None
        return stored.payload if stored.is_intact() else None

    def mend(self, save: Save, name: str, index: int, payload: memoryview) -> None:
        """Puts `payload`, which another server holds and was verified, in the place of a chunk that is unsound here.

        The bad bytes go once there is room for the good ones. Raises IntegrityError if it can't be that chunk, or is
        none afterwards, OutOfSpace.
        """
        object = save.objects[name]
        chunk = ChunkId(object.id, index)
        path, save_id = save.origin(name)
        namespace = save_namespace(save.key.store, path, save_id)
        stored = self._store.lookup(chunk)  # also one of which only the payload can't be read
        if len(payload) != chunk.length(object.size) or (
            stored is not None and stored.digest != chunk_digest(payload)
        ):
            raise IntegrityError(
                f"chunk {index} of {object.id} is another at another server", object=str(object.id)
            )
        good, room = pa.py_buffer(payload), self._store.reserve(namespace, chunk, len(payload))
        try:
            if stored is not None:
                self._store.quarantine(chunk)
            self._store.put(namespace, chunk, object.size, good, promised=room)
        finally:
            room.release()
        self._store.sync(namespace)
        if self._sound(object, index) is None:
            raise IntegrityError(
                f"chunk {index} of {object.id} can't be read here, though good bytes were stored",
                object=str(object.id),
            )
