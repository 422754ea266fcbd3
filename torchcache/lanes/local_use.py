"""What a client read by itself, told to the server now and then: it can't see it, and must know who is in use."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Final

from torchcache.errors import TorchCacheError
from torchcache.lanes.local_store import LocalStore
from torchcache.lanes.local_unsaid import Send, Unsaid
from torchcache.marks import Marks, marks
from torchcache.model import CHUNK_BYTES, Extent
from torchcache.records import CHUNK_INDEX

EVERY_S: Final = 1.0
"""At most so often."""

CALL_S: Final = 2.0
"""How long a report may take, and closing a lane with it."""

EVERY_WANTED_S: Final = 0.1
"""The same, where the server wants to know which chunks: it stages and evicts by where reading is."""

MAX_EXTENTS: Final = 65_536
"""Remembered between two reports; of more, the server isn't told which chunks."""

MAX_MARKS: Final = 131_072
"""In a report: 1 MiB."""

_log = logging.getLogger(__name__)


class UseReports:
    """The reports of one lane. Thread-safe. Sending goes on beside the reads: a server that hangs stops none.

    `extents` and `bytes` are all that was read, `suspects` how many extents were found damaged,
    `writes` how many writes went into the store's files.
    """

    def __init__(self, store: LocalStore, send: Send) -> None:
        self._path = store.path
        self._unsaid = Unsaid(store, send)
        self.extents = 0
        self.suspects = 0
        self.bytes = 0
        self.writes = 0
        self._wants_marks: bool | None = None
        self.begin()
        self._due_s = time.monotonic() + EVERY_S
        _all.add(self)

    def begin(self) -> None:
        """Anew, in a forked child too: its locks may have been held by threads that aren't there, amid a read."""
        self._lock = threading.Lock()
        # Kept from the beginning: an order may have been told before the first read.
        self._extents: list[Extent] = []

    @property
    def _sending(self) -> threading.Lock:
        return self._unsaid.sending

    def add_suspects(self, extents: int) -> None:
        """Counts what was found damaged."""
        with self._lock:
            self.suspects += extents

    def add(self, extents: int, chunks: int, read_bytes: int, read: Iterable[Extent] = ()) -> None:
        """Counts what was read, `read` being the extents themselves, and reports if it is time."""
        with self._lock:
            if self._wants_marks is not False and len(self._extents) < MAX_EXTENTS:
                self._extents.extend(read)
            self.extents += extents
            self.bytes += read_bytes
            self._unsaid.add(chunks, read_bytes)
            if time.monotonic() < self._due_s or not self._sending.acquire(blocking=False):
                return
            self._due_s = time.monotonic() + (EVERY_WANTED_S if self._wants_marks else EVERY_S)
        try:
            threading.Thread(target=self._send, name="torchcache use report", daemon=True).start()
        except RuntimeError:  # the interpreter ends
            self._sending.release()

    def wrote(self) -> None:
        """Counts a write; the server knows of it."""
        with self._lock:
            self.writes += 1

    def close(self) -> None:
        """Reports what wasn't yet."""
        if self._sending.acquire(timeout=CALL_S):
            self._send()

    def _send(self) -> None:
        """Makes the call; holding `_sending`, which it gives back."""
        try:
            reply = self._unsaid.tell(time.monotonic() + CALL_S, self._taken_marks)
            if reply is not None:
                self._learn(wants_marks=bool(getattr(reply, "wants_marks", False)))
        except TorchCacheError as error:
            _log.debug("what was read from %s could not be reported: %s", self._path, error)
        finally:
            self._sending.release()

    def _taken_marks(self) -> bytes:
        with self._lock:
            read: list[Extent] = []
            if self._wants_marks:
                read, self._extents = self._extents, []
        return _marks(read)[:MAX_MARKS].astype("<u8").tobytes() if read else b""

    def _learn(self, *, wants_marks: bool) -> None:
        with self._lock:
            if wants_marks and not self._wants_marks:
                self._due_s = 0.0
            self._wants_marks = wants_marks
            if not wants_marks:
                self._extents = []


def _marks(read: Sequence[Extent]) -> Marks:
    """The marks of the chunks that the extents touch."""
    keys: list[bytes] = []
    for info, offset, length in read:
        end = info.size if length < 0 else offset + length
        first, last = offset // CHUNK_BYTES, max(offset, end - 1) // CHUNK_BYTES
        keys += [info.id.digest + CHUNK_INDEX.pack(index) for index in range(first, last + 1)]
    return marks(keys)


_all: Final[weakref.WeakSet[UseReports]] = weakref.WeakSet()


def _in_child() -> None:
    for reports in list(_all):
        reports.begin()


os.register_at_fork(after_in_child=_in_child)
