"""A listing of all under a folder, folders side by side: S3 gives a thousand keys an answer, one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Final

from torchcache.model import ObjectInfo

THREADS: Final = 8
_PARTS_AHEAD: Final = 32
"""Answers that wait for the reader: of a thousand objects each at most."""


@dataclass(frozen=True, slots=True)
class FolderPart:
    """Some of a folder's own objects and of the folders in it; `token` leads to the next, if not empty."""

    objects: Sequence[ObjectInfo]
    folders: Sequence[str]
    token: str


Ask = Callable[[str, str], FolderPart | None]
"""The part of (prefix, token); None where folders can't be listed."""


class FolderListing:
    """Asks for folders, `THREADS` at a time, those found last first: few wait then, however many there are."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._waiting: deque[tuple[str, str]] = deque()
        self._busy = 0
        self._ended = False
        self._changed = threading.Condition()
        self._parts: Queue[Sequence[ObjectInfo] | BaseException | None] = Queue(_PARTS_AHEAD)

    def objects(self, folder: str, *, otherwise: Callable[[], Iterator[ObjectInfo]]) -> Iterator[ObjectInfo]:
        """All objects under `folder`, in no order; what `otherwise` gives where folders can't be listed."""
        first = self._ask(folder, "")
        if first is None:
            yield from otherwise()
            return
        yield from first.objects
        self._add(folder, first)
        if not self._waiting:
            return
        threads = [
            threading.Thread(target=self._work, name=f"torchcache-listing-{number}", daemon=True)
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                part = self._parts.get()
                if part is None:
                    left -= 1
                elif isinstance(part, BaseException):
                    raise part
                else:
                    yield from part
        finally:
            self._end()
            for thread in threads:
                while thread.is_alive():
                    while not self._parts.empty():
                        self._parts.get()
                    thread.join(0.01)

    def _work(self) -> None:
        try:
            while (task := self._take()) is not None:
                try:
                    part = self._ask(*task) or FolderPart((), (), "")
                    self._add(task[0], part)
                    if part.objects:
                        self._parts.put(part.objects)
                finally:
                    self._done()
        except BaseException as error:  # noqa: BLE001 - the reader raises it
            self._parts.put(error)
        finally:
            self._parts.put(None)

    def _take(self) -> tuple[str, str] | None:
        """A folder to ask for, once there is one; None when no more can come."""
        with self._changed:
            while not self._waiting and self._busy and not self._ended:
                self._changed.wait()
            if self._ended or not self._waiting:
                return None
            self._busy += 1
            return self._waiting.pop()

    def _add(self, folder: str, part: FolderPart) -> None:
        with self._changed:
            self._waiting.extend((found, "") for found in part.folders)
            if part.token:
                self._waiting.append((folder, part.token))
            self._changed.notify_all()

    def _done(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
