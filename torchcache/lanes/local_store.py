"""A store on this machine, as a client sees it: its index, and its segments as far as they are mapped."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import lmdb

from torchcache.errors import ConfigurationError
from torchcache.kernel import kernel_id
from torchcache.lanes.local_index import LocalIndex
from torchcache.lanes.local_reclaim import Reclaim
from torchcache.lanes.local_records import Known, KnownRecords
from torchcache.lanes.local_segments import Mapped, MappedSegments
from torchcache.plain_files import read_plain
from torchcache.records import IDENTITY, LOCATION, SEGMENT_NUMBER
from torchcache.wire.v1 import cache_pb2

LOOK_S: Final = 0.1
"""How often it is looked whether the index is still the one at its place, and which segments have gone."""

_log = logging.getLogger(__name__)


class Found:
    """What a look-up found: places as the index has them, None where it has none; each known to be in memory, or not.

    `warm` are the records that are; the others have to be learnt. `count` is that of the look-up.
    """

    __slots__ = ("_mapped", "_records", "count", "places", "warm")

    def __init__(
        self, places: list[bytes | None], mapped: dict[bytes, Mapped], records: KnownRecords, count: int
    ) -> None:
        self.places = places
        self.warm: dict[bytes | None, Known] = records.warm
        self.count = count
        self._mapped = mapped
        self._records = records

    def learn(self, place: bytes | None) -> Known | None:
        """The record at a place, in memory from now on; None if there is no sound one.

        Raises OSError: the disk can't read it.
        """
        if place is None:
            return None
        mapped = self._mapped.get(place)
        return None if mapped is None else self._records.get(place, mapped, LOCATION.unpack(place)[1])


class LocalStore:
    """One per store and process, shared by all lanes to it. Thread-safe; opens at its first use, also after a fork."""

    def __init__(self, path: str, identity: tuple[int, int]) -> None:
        self.path = path
        self._identity = identity  # device and inode of the file that says whose store it is
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._index: LocalIndex | None = None
        self._segments = MappedSegments(self.path)
        self._reclaim = Reclaim()
        self._looked_s = float("-inf")
        self.records = KnownRecords()
        self.count = 0  # of look-ups

    def open(self) -> None:
        """Opens the index, which the first look-up does else. Raises lmdb.Error or OSError."""
        with self._lock:
            if self._index is None:
                self._index = self._opened()

    def look_up(self, keys: Sequence[bytes]) -> Found:
        """Finds chunks by their keys. Never raises: an index that can't be read knows none."""
        with self._lock:
            self.count += 1
            if self._reclaim.happened():
                self.records.cool()
            for _ in range(2):
                try:
                    return self._look_up(keys)
                except lmdb.MapResizedError:
                    self._close_index()  # and open it again with a map of the new size
                except (lmdb.Error, OSError) as error:
                    _log.debug("the index of %s can't be read: %s", self.path, error)
                    self._close_index()
                    break
            return Found([None] * len(keys), {}, self.records, self.count)

    def _look_up(self, keys: Sequence[bytes]) -> Found:
        index = self._current_index()
        mapped: dict[bytes, Mapped] = {}
        with index.begin() as txn:
            places = list(map(txn.get, keys))
            warm = self.records.warm
            for place in places:
                if place is None or place in warm or place in mapped:
                    continue
                segment = self._segments.get(
                    LOCATION.unpack(place)[0], index.file(txn, place[: SEGMENT_NUMBER.size])
                )
                if segment is not None:
                    mapped[place] = segment
        return Found(places, mapped, self.records, self.count)

    def used_since(self, count: int) -> set[str]:
        """Namespaces of segments that were read since `count` was that."""
        with self._lock:
            return self._segments.read_since(count)

    def close(self) -> None:
        """Closes the index and unmaps what nobody looks at; the next use opens them again."""
        with self._lock:
            self._close_index()
            self._drop_all()

    def _drop_all(self) -> None:
        self._segments.clear()
        self.records.clear()

    def _current_index(self) -> LocalIndex:
        """The open index, looked after now and then. Raises lmdb.Error or OSError."""
        now = time.monotonic()
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            if self._index is not None and not self._index.is_current():
                # By a server that was started after an unclean end. Segments that it left are found again.
                self._close_index()
            if self._index is not None:
                self._drop_removed(self._index)
        if self._index is None:
            self._index = self._opened()
        return self._index

    def _opened(self) -> LocalIndex:
        found = Path(self.path, IDENTITY).stat()
        if (found.st_dev, found.st_ino) != self._identity:
            raise FileNotFoundError(f"{self.path} is another store now")
        return LocalIndex(self.path)

    def _drop_removed(self, index: LocalIndex) -> None:
        """Lets go the segments that the server has removed, so that their room comes back."""
        gone = len(self._segments)
        with index.begin() as txn:
            for number in self._segments.numbers():
                if index.file(txn, SEGMENT_NUMBER.pack(number)) is None:
                    self._segments.drop(number)
        if len(self._segments) < gone:
            self.records.drop_gone()

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None

    # ---- fork ----

    def before_fork(self) -> None:
        """Leaves nothing open that two processes would share: of LMDB's readers one would free the other's slot."""
        self._lock.acquire()
        self._close_index()

    def after_fork_in_parent(self) -> None:
        """Goes on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Starts anew. What the parent had mapped stays mapped here where somebody looks at it."""
        self._begin()


_stores: weakref.WeakValueDictionary[tuple[int, int], LocalStore] = weakref.WeakValueDictionary()
_registering = threading.RLock()


def local_store(where: cache_pb2.LocalStore, server_id: str) -> LocalStore:
    """The store of that server, open.

    Raises ConfigurationError, which says why, if this process can't read it, or it may not be the very same.
    """
    if not where.path:
        raise ConfigurationError("the server doesn't say where its store is")
    here = kernel_id()
    if not here or here != where.kernel:
        raise ConfigurationError("the server runs on another machine, or in another container")
    try:
        found = _look_at(Path(where.path), server_id, (where.device, where.inode))
        found.open()
    except (OSError, ValueError, lmdb.Error) as error:
        raise ConfigurationError(f"the store {where.path} can't be read from here: {error}") from error
    return found


def _look_at(path: Path, server_id: str, identity: tuple[int, int]) -> LocalStore:
    """Raises ConfigurationError, OSError or ValueError unless it is that store, and ours."""
    found = (path / IDENTITY).stat()
    if (found.st_dev, found.st_ino) != identity:
        raise ConfigurationError(f"at {path} there is another store here than the server's")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"the store {path} belongs to user {found.st_uid}, not to us, {os.geteuid()}"
        )
    content = json.loads(read_plain(path / IDENTITY))
    if not isinstance(content, dict) or content.get("server_id") != server_id:
        raise ConfigurationError(f"the store {path} isn't that of the server")
    with _registering:
        store = _stores.get(identity)
        if store is None or store.path != str(path):
            store = _stores[identity] = LocalStore(str(path), identity)
        return store


class _ForkGate:
    """Takes every store there is through a fork."""

    def __init__(self) -> None:
        self._held: list[LocalStore] = []

    def before(self) -> None:
        _registering.acquire()
        self._held = list(_stores.values())
        for store in self._held:
            store.before_fork()

    def in_parent(self) -> None:
        for store in self._held:
            store.after_fork_in_parent()
        self._held = []
        _registering.release()

    def in_child(self) -> None:
        global _registering  # noqa: PLW0603 - it belongs to a thread that may be gone
        for store in self._held:
            store.after_fork_in_child()
        self._held = []
        _registering = threading.RLock()


_gate: Final = _ForkGate()
os.register_at_fork(before=_gate.before, after_in_parent=_gate.in_parent, after_in_child=_gate.in_child)
