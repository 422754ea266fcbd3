"""Takes a stream's batches on a thread of its own, a few ahead of who works on them.

gRPC moves bytes only while somebody waits for them. Without this a server stands still while its client verifies.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T")

DEPTH: Final = 8
"""Items taken ahead: 16 MiB of batches."""


class _End:
    """Behind the last item: how the source ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ReadAhead(Generic[T]):
    """Iterates over `source`, which is taken on another thread. `close` always, and after it the source is free."""

    def __init__(self, source: Iterable[T], *, depth: int = DEPTH) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._pump, args=(source,), name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        self._thread.join()
        if item.error is not None:
            raise item.error

    def _pump(self, source: Iterable[T]) -> None:
        error: BaseException | None = None
        try:
            for item in source:
                if self._closed:
                    break
                self._queue.put(item)
        except BaseException as caught:  # noqa: BLE001 - raised again where the items are taken
            error = caught.with_traceback(None)  # its frames would keep the source alive
        self._queue.put(_End(error))

    def close(self) -> None:
        """Returns once the thread is done. Make the source end first, if it may still wait for something."""
        self._closed = True
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # whoever waits for room finds some
            except queue.Empty:
                continue
        self._thread.join()
