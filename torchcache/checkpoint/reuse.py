"""What this process wrote lately, and which files of it the next save may take over. See decision 23. Free of torch.

A save takes over whole files: what else lies in them, values that went out of date, comes along, and is bounded.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from torchcache.checkpoint.layout import file_name
from torchcache.checkpoint.manifest import Item

LEAST_COMPARED_BYTES: Final = 16 * 1024
"""Smaller items aren't compared: they cost more to find than to send."""

MOST_STALE: Final = 0.25
"""Of the bytes that a save takes over at most so many are of no use to it."""

LEAST_TAKEN: Final = 0.5
"""Of what an earlier save stored at least so much is taken over: the pool keeps all of it, and shall need no more room
than if everything were written anew."""

_MOST_ORIGINS: Final = 2
_REMEMBERED: Final = 4

ItemKey = tuple[str, tuple[int, ...] | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptItem(Item):
    """An item in a file of an earlier save.

    The file is `file_bytes` long, and was stored by the save `origin`, with `origin_bytes` in all by this rank.
    """

    file_bytes: int
    origin: str
    origin_bytes: int

    @classmethod
    def of(cls, item: Item, *, file_bytes: int, origin: str, origin_bytes: int) -> KeptItem:
        values: dict[str, Any] = {one.name: getattr(item, one.name) for one in fields(Item)}
        return cls(**values, file_bytes=file_bytes, origin=origin, origin_bytes=origin_bytes)


class Written:
    """What one rank wrote in one save, by what it is."""

    def __init__(self, save_id: str, rank: int, part: str, items: Sequence[Item]) -> None:
        self.save_id = save_id
        self.rank = rank
        self.part = part
        self._items = {key_of(item): item for item in items if _is_comparable(item)}
        self._sizes: dict[str, int] = {}  # of the files that it stored
        for item in items if self._items else ():
            if not isinstance(item, KeptItem):
                self._sizes[item.file] = max(self._sizes.get(item.file, 0), item.start + item.length)
        self._bytes = sum(self._sizes.values())

    def find(self, name: str, offset: tuple[int, ...] | None, index: int | None) -> KeptItem | None:
        """The item as it was then, as one that may be kept."""
        item = self._items.get((name, offset, index))
        if item is None or isinstance(item, KeptItem):
            return item
        return KeptItem.of(
            item, file_bytes=self._sizes[item.file], origin=self.save_id, origin_bytes=self._bytes
        )


def _is_comparable(item: Item) -> bool:
    return item.kind == "tensor" and item.payload_length >= LEAST_COMPARED_BYTES


def key_of(item: Item) -> ItemKey:
    """What the item is, whatever its value."""
    return (item.name, item.offset, item.index)


@dataclass(frozen=True, slots=True)
class Base:
    """The last save that this process committed in a folder: where it lies, and the servers that have it.

    `lasts`: enough of it was as in the save before that the next should go to the same servers.
    """

    path: str
    save_id: str
    servers: tuple[str, ...]
    lasts: bool = False


class Memory:
    """What a process remembers of its saves. Thread-safe; a few at a time."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins anew: also in a child, which may have been forked while another thread held the lock."""
        self._lock = threading.Lock()
        self._written: OrderedDict[str, Written] = OrderedDict()
        self._bases: OrderedDict[tuple[str, str, str], Base] = OrderedDict()

    def note_written(self, written: Written, *, instead_of: str | None = None) -> None:
        """Whether the save it belongs to is ever committed is for the coordinator to know.

        `instead_of`: id of the save it was compared with. No other will be: either this one is committed, or the next
        borrows nothing.
        """
        with self._lock:
            self._written.pop(instead_of or "", None)
            self._written[written.save_id] = written
            _forget_oldest(self._written)

    def written(self, save_id: str, rank: int, part: str) -> Written | None:
        """What this process wrote in a save, as that rank."""
        with self._lock:
            found = self._written.get(save_id)
        return found if found is not None and (found.rank, found.part) == (rank, part) else None

    def note_committed(self, store: str, part: str, base: Base) -> None:
        """The next save in the folder may borrow from it."""
        with self._lock:
            key = (store, _folder(base.path), part)
            self._bases[key] = base
            self._bases.move_to_end(key)
            _forget_oldest(self._bases)

    def forget_base(self, store: str, path: str, part: str) -> None:
        """The next save in the folder of `path` borrows nothing, unless one is committed before."""
        with self._lock:
            self._bases.pop((store, _folder(path), part), None)

    def base(self, store: str, path: str, part: str) -> Base | None:
        """What a save at `path` may borrow from."""
        with self._lock:
            return self._bases.get((store, _folder(path), part))


MEMORY: Final = Memory()
"""This process's own."""

os.register_at_fork(after_in_child=MEMORY.forget)


def files_to_keep(unchanged: Sequence[KeptItem]) -> dict[str, int]:
    """Of the files in which these items lie those that are worth to be taken over, and their sizes.

    The cleanest first, as long as at most `MOST_STALE` of all of it is of no use; of the saves with most to take, and
    none of which less than `LEAST_TAKEN` would be.
    """
    kept = _cleanest(unchanged)
    taken: Counter[str] = Counter()
    for name, origin in {item.file: item.origin for item in unchanged if item.file in kept}.items():
        taken[origin] += kept[name]
    stored = {item.origin: item.origin_bytes for item in unchanged}
    mean = {origin for origin, bytes in taken.items() if bytes < LEAST_TAKEN * stored[origin]}
    return files_to_keep([item for item in unchanged if item.origin not in mean]) if mean else kept


def _cleanest(unchanged: Sequence[KeptItem]) -> dict[str, int]:
    used: Counter[str] = Counter()
    of_origin: Counter[str] = Counter()
    for item in unchanged:
        used[item.file] += item.length
        of_origin[item.origin] += item.length
    sizes = {item.file: item.file_bytes for item in unchanged}
    origins = {item.file: item.origin for item in unchanged}
    best = sorted(of_origin, key=lambda origin: (-of_origin[origin], origin))[:_MOST_ORIGINS]
    kept: dict[str, int] = {}
    all_bytes = stale_bytes = 0
    for name in sorted(used, key=lambda name: (-used[name] / sizes[name], name)):
        if origins[name] not in best:
            continue
        all_bytes += sizes[name]
        stale_bytes += sizes[name] - used[name]
        if stale_bytes > MOST_STALE * all_bytes:
            break
        kept[name] = sizes[name]
    return kept


def file_names(rank: int, taken: Mapping[str, int]) -> Iterator[str]:
    """Names for the files of a rank, one after the other, without those that it takes over."""
    names = (file_name(rank, number) for number in itertools.count())
    return (name for name in names if name not in taken)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _forget_oldest(entries: OrderedDict[Any, Any]) -> None:
    while len(entries) > _REMEMBERED:
        entries.popitem(last=False)
