"""A listing of all under a folder, side by side: S3 gives a thousand keys an answer, one after the other.

Folders are listed next to each other. One that turns out to be long is cut: at some key, from which on another thread
lists, while the first goes on up to there. Where the cuts are is guessed, and what lies beyond a range's end is left to
its neighbour, so that each key comes once, wherever they are.

What lies in many small folders is listed flat instead, as one: that takes a call a thousand keys, not one a folder.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import Queue
from typing import Final

from torchcache.errors import IntegrityError
from torchcache.model import ObjectInfo
from torchcache.pool.key_space import KeySpace

THREADS: Final = 8
CUT_FROM: Final = 4
"""Answers after which a folder is taken for a long one."""

WORTH_PARTS: Final = 4
"""What seems to have fewer left isn't cut."""

FLAT_OBJECTS: Final = 1000
"""Of an answer to a flat listing."""

_PARTS_AHEAD: Final = 32
"""Answers that wait for the reader: of a thousand objects each at most."""


@dataclass(frozen=True, slots=True)
class FolderPart:
    """Some of a folder's own objects and of the folders in it; `token` leads to the next, if not empty.

    `behind`: it can be asked for what comes behind a key.
    """

    objects: Sequence[ObjectInfo]
    folders: Sequence[str]
    token: str
    behind: bool = False


Ask = Callable[[str, str, str], FolderPart | None]
"""The part of (prefix, token, key): without a token the first, of what comes behind the key. None: it can't be told."""

ListFlat = Callable[[str], Iterator[ObjectInfo]]
"""All objects under a folder, one answer after the other."""


@dataclass(slots=True)
class _Folder:
    """A folder that is being listed. `space` is that of its names, once it is known to be long and can be cut."""

    prefix: str
    parts: int = 0
    ordered: bool = True  # its objects came by key
    folders: set[str] = field(default_factory=set)
    space: KeySpace | None = None
    cut: bool = False


@dataclass(slots=True, eq=False)
class _Range:
    """What of a folder comes behind the key `low`, up to `high` (None: to the end). `token` leads to the next part.

    `width`: how much of the space of names the last part took; 0 if that isn't known.
    """

    folder: _Folder
    low: str = ""
    high: str | None = None
    token: str = ""
    width: int = 0

    def parts_left(self) -> int:
        """How many there would be if names lay evenly; 0 if that isn't known."""
        space = self.folder.space
        if space is None or not self.width:
            return 0
        end = space.end if self.high is None else space.number(self._name(self.high))
        return max(0, end - space.number(self._name(self.low))) // self.width

    def cut(self) -> _Range | None:
        """Cuts it in two and returns the farther half; None if no cut is found."""
        space = self.folder.space
        high = None if self.high is None else self._name(self.high)
        at = space.middle(self._name(self.low), high) if space is not None else None
        if at is None:
            return None
        farther = _Range(self.folder, self.folder.prefix + at, self.high)
        self.high, self.folder.cut = farther.low, True
        return farther

    def _name(self, key: str) -> str:
        return key.removeprefix(self.folder.prefix)


class FolderListing:
    """Asks for folders, `THREADS` at a time, those found last first: few wait then, however many there are.

    Where folders can't be listed, or are many and small, it goes by `list_flat`.
    """

    def __init__(self, ask: Ask, list_flat: ListFlat) -> None:
        self._ask = ask
        self._list_flat = list_flat
        self._waiting: deque[_Range] = deque()
        self._long: list[_Range] = []  # those that may be cut
        self._busy = 0
        self._ended = False
        self._changed = threading.Condition()
        self._parts: Queue[Sequence[ObjectInfo] | BaseException | None] = Queue(_PARTS_AHEAD)

    def objects(self, folder: str) -> Iterator[ObjectInfo]:
        """All objects under `folder`, in no order.

        Raises IntegrityError where a storage that listed by key doesn't go on so.
        """
        first = self._ask(folder, "", "")
        flat = self._list_flat(folder) if first is None else self._flat_if_denser(folder, first)
        if flat is not None:
            yield from flat
        elif first is not None:
            yield from self._by_folders(folder, first)

    def _by_folders(self, folder: str, first: FolderPart) -> Iterator[ObjectInfo]:
        yield from self._taken(_Range(_Folder(folder)), first)
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
            while (task := self._next()) is not None:
                try:
                    folder = task.folder
                    part = self._ask(folder.prefix, task.token, "" if task.token else task.low)
                    flat = self._flat_if_denser(folder.prefix, part) if part and not folder.parts else None
                    if flat is not None:
                        self._put_all(flat)
                    elif objects := self._taken(task, part or FolderPart((), (), "")):
                        self._parts.put(objects)
                finally:
                    self._done()
        except BaseException as error:  # noqa: BLE001 - the reader raises it
            self._parts.put(error)
        finally:
            self._parts.put(None)

    def _flat_if_denser(self, prefix: str, part: FolderPart) -> Iterator[ObjectInfo] | None:
        """A flat listing of the folder whose first part is `part`, if it takes fewer answers, one after the other.

        It does if one answer has the objects of more folders than are asked for at a time.
        """
        if len(part.folders) <= THREADS:
            return None
        flat = self._list_flat(prefix)
        objects = [*islice(flat, FLAT_OBJECTS)]
        folders = {object.id.key.rpartition("/")[0] for object in objects}
        if len(objects) == FLAT_OBJECTS and len(folders) <= THREADS:
            return None
        return chain(objects, flat)

    def _put_all(self, objects: Iterator[ObjectInfo]) -> None:
        while not self._ended and (some := [*islice(objects, FLAT_OBJECTS)]):
            self._parts.put(some)

    def _next(self) -> _Range | None:
        """What to ask for, once there is something; None when no more can come."""
        with self._changed:
            while not self._ended:
                task = self._waiting.pop() if self._waiting else self._cut()
                if task is not None:
                    self._busy += 1
                    return task
                if not self._busy:
                    return None
                self._changed.wait()
            return None

    def _taken(self, task: _Range, part: FolderPart) -> Sequence[ObjectInfo]:
        """Takes in an answer; returns those of its objects that lie within the range."""
        with self._changed:
            folder, keys = task.folder, [object.id.key for object in part.objects]
            folder.parts += 1
            if not all(map(str.__lt__, [task.low, *keys], keys)):
                folder.ordered = False
                if folder.cut:
                    raise IntegrityError(f"the storage lists {folder.prefix} by key at first, and then not")
            count = len(keys)
            if task.high is not None:
                count = next((at for at, key in enumerate(keys) if key > task.high), count)
            if keys:
                task.low = max(task.low, keys[-1])
            task.token = part.token if count == len(keys) else ""
            if task.token:
                self._waiting.append(task)
                self._look_at_length(task, part, keys)
            elif task in self._long:
                self._long.remove(task)
            self._add_folders(folder, part)
            self._changed.notify_all()
            return part.objects[:count]

    def _look_at_length(self, task: _Range, part: FolderPart, keys: Sequence[str]) -> None:
        """Learns by what to guess cuts. Under the lock."""
        folder = task.folder
        names = [key.removeprefix(folder.prefix) for key in keys]
        if folder.space is None and folder.parts >= CUT_FROM and folder.ordered and part.behind and names:
            folder.space = KeySpace(names)
            self._long.append(task)
        if folder.space is not None and names:
            task.width = max(0, folder.space.number(names[-1]) - folder.space.number(names[0]))

    def _add_folders(self, folder: _Folder, part: FolderPart) -> None:
        """Under the lock. Which of two ranges shows a folder is the storage's choice, so both may."""
        found = [name for name in part.folders if name not in folder.folders]
        if part.behind:
            folder.folders.update(found)
        self._waiting.extend(_Range(_Folder(name)) for name in found)

    def _cut(self) -> _Range | None:
        """The farther half of the range that has most left, if it is worth a question. Under the lock."""
        for longest in sorted(self._long, key=_Range.parts_left, reverse=True):
            if longest.parts_left() < WORTH_PARTS:
                return None
            if (farther := longest.cut()) is not None:
                self._long.append(farther)
                return farther
        return None

    def _done(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
