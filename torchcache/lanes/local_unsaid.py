"""What a process has read by itself and no server was told of yet: told when it ends, at the latest.

Most scripts read for a second or two and end, and have dropped their datasets by then: what was read is kept for that
alone, without the lane and the store's files. A loader's worker ends by `os._exit`, behind multiprocessing's
finalizers, so the last word is one of those. Who is killed says nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any, Final

from torchcache.lanes.local_store import LocalStore
from torchcache.wire.v1 import cache_pb2

EXIT_S: Final = 0.5
"""How much later a process may end because of servers that don't answer, all of them together."""

MAX_NAMESPACES: Final = 4096
"""In a report: more the server refuses."""

_log = logging.getLogger(__name__)

Send = Callable[[cache_pb2.ReportUseRequest, float], Any]
"""Makes the call, by a deadline, a time.monotonic() value. It may raise TorchCacheError."""


class Unsaid:
    """Of one lane. Thread-safe."""

    def __init__(self, store: LocalStore, send: Send, leaving: Leaving | None = None) -> None:
        # Weakly: a store that nobody reads any more must not stay mapped.
        self._store = weakref.ref(store)
        self._told_count = store.count
        self._send = send
        self._leaving = leaving or at_exit
        self.begin()
        _all.add(self)

    def begin(self) -> None:
        """Anew, in a forked child too: of a thread that isn't there a lock is held for good."""
        self._lock = threading.Lock()
        self._chunks = 0
        self._bytes = 0
        self._names: set[str] = set()
        self.sending = threading.Lock()
        """Held by who tells: a server gets one report at a time."""

    def add(self, chunks: int, read_bytes: int) -> None:
        with self._lock:
            if not self._chunks:
                self._leaving.expect(self)
                self._names |= self._used()  # the store may be gone when it is told
            self._chunks += chunks
            self._bytes += read_bytes

    def tell(self, deadline: float, marks: Callable[[], bytes] = bytes) -> Any:
        """Makes the call, and returns its reply; None if there is nothing to tell. For who holds `sending`.

        Raises TorchCacheError; then all of it, but for the marks, is told the next time.
        """
        store = self._store()
        count = store.count if store is not None else self._told_count
        with self._lock:
            chunks, self._chunks = self._chunks, 0
            read_bytes, self._bytes = self._bytes, 0
            names, self._names = self._names, set()
        if not chunks:
            return None
        names |= self._used()
        request = cache_pb2.ReportUseRequest(
            namespaces=sorted(names)[:MAX_NAMESPACES], chunks=chunks, bytes=read_bytes, marks=marks()
        )
        try:
            reply = self._send(request, deadline)
        except BaseException:
            with self._lock:
                self._names |= names
            self.add(chunks, read_bytes)
            raise
        self._told_count = count
        with self._lock:
            if not self._chunks:
                self._leaving.forget(self)
        return reply

    def _used(self) -> set[str]:
        store = self._store()
        return store.used_since(self._told_count) if store is not None else set()

    def last_word(self, deadline: float) -> None:
        """Tells what there is, unless it can't be told in time."""
        if not self.sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
        try:
            self.tell(deadline)
        except Exception as error:  # noqa: BLE001 - whatever happens, the process ends
            _log.debug("what was read could not be reported: %s", error)
        finally:
            self.sending.release()


class Leaving:
    """Those of a process that have something to tell. Thread-safe."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Anew, in a forked child: what its parent has read is its parent's to tell."""
        self._lock = threading.Lock()
        self._unsaid: set[Unsaid] = set()
        self._registered = False

    def expect(self, unsaid: Unsaid) -> None:
        """It has something to tell."""
        with self._lock:
            self._unsaid.add(unsaid)
            if not self._registered:
                # In the process that it is made in; multiprocessing has the interpreter's end run it, too.
                Finalize(None, self.tell, exitpriority=0)
                self._registered = True

    def forget(self, unsaid: Unsaid) -> None:
        """It has nothing to tell any more."""
        with self._lock:
            self._unsaid.discard(unsaid)

    def tell(self) -> None:
        """Has all of them tell it, within EXIT_S."""
        with self._lock:
            unsaid = list(self._unsaid)
            self._registered = False  # for what is read by other finalizers
        deadline = time.monotonic() + EXIT_S
        for one in unsaid:
            one.last_word(deadline)


at_exit: Final = Leaving()

_all: Final[weakref.WeakSet[Unsaid]] = weakref.WeakSet()


def _in_child() -> None:
    at_exit.begin()
    for unsaid in list(_all):
        unsaid.begin()


os.register_at_fork(after_in_child=_in_child)
