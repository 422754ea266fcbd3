"""Reads the tree of a sample; see tree.py."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from torchcache.data import records
from torchcache.data.leaves import LeafReader, dtype_from_description
from torchcache.data.tree import C128, F64, I64, MAX_DEPTH, U64, is_key
from torchcache.errors import IntegrityError


class TreeReader:
    """Reads what TreeWriter wrote. Raises IntegrityError for what it can't have written."""

    def __init__(self, tree: memoryview, leaves: LeafReader) -> None:
        self._tree = tree
        self._leaves = leaves
        self._position = 0
        self._end = len(tree)
        self._depth = 0

    def take(self) -> Any:
        """The next node's value."""
        read = _READERS.get(self._tag())
        if read is None:
            raise IntegrityError("a stored sample has a node of unknown kind")
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise IntegrityError(f"a stored sample is nested more than {MAX_DEPTH} levels deep")
        value = read(self)
        self._depth -= 1
        return value

    def finish(self) -> None:
        """Raises IntegrityError unless tree and leaves have been read to their ends."""
        if self._position != self._end:
            raise IntegrityError("a stored sample goes on behind its last node")
        self._leaves.finish()

    def _advance(self, count: int) -> int:
        """Steps over `count` bytes, and returns where they start."""
        start = self._position
        self._position = start + count
        if self._position > self._end:
            raise IntegrityError("a stored sample ends in the middle of a node")
        return start

    def _tag(self) -> int:
        return self._tree[self._advance(1)]

    def _unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack_from(self._tree, self._advance(form.size))

    def _number(self) -> int:
        return int(self._unpack(U64)[0])

    def _count(self, item_bytes: int) -> int:
        """A number of items that take at least `item_bytes` each."""
        count = self._number()
        if count * item_bytes > self._end - self._position:
            raise IntegrityError("a stored sample lists more than it holds")
        return count

    def _sized(self) -> memoryview:
        size = self._number()
        start = self._advance(size)
        return self._tree[start : start + size]

    def _str(self) -> str:
        return bytes(self._sized()).decode("utf-8", "surrogatepass")

    def _named(self) -> str:
        """A str that has a tag of its own."""
        if self._tag() != _STR:
            raise IntegrityError("a stored sample lacks a name where one belongs")
        return self._str()

    def _items(self) -> list[Any]:
        return [self.take() for _ in range(self._count(1))]

    def _dict(self) -> dict[Any, Any]:
        count = self._count(2)
        values: dict[Any, Any] = {}
        for _ in range(count):
            key = self.take()
            if not is_key(key) or key in values:
                raise IntegrityError("a stored sample has a dict with an impossible key")
            values[key] = self.take()
        return values

    def _record(self, restore: Callable[[str, dict[str, Any]], Any]) -> Any:
        reference = self._named()
        fields = {}
        for _ in range(self._count(10)):
            name = self._named()
            fields[name] = self.take()
        return restore(reference, fields)

    def _tensor(self) -> torch.Tensor:
        return self._leaves.tensor(self._named(), self._shape())

    def _array(self) -> np.ndarray[Any, Any]:
        dtype = dtype_from_description(self.take())
        return self._leaves.array(dtype, self._shape())

    def _scalar(self) -> Any:
        dtype = dtype_from_description(self.take())
        data = bytearray(self._sized())
        if len(data) != dtype.itemsize:
            raise IntegrityError("a stored sample has a scalar of the wrong length")
        # An empty numpy str has no bytes, and numpy makes no array of such.
        return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]

    def _shape(self) -> tuple[int, ...]:
        count = self._count(8)
        return struct.unpack_from(f"<{count}Q", self._tree, self._advance(8 * count))


_STR: Final = ord("s")
_READERS: Final[dict[int, Callable[[TreeReader], Any]]] = {
    ord("N"): lambda reader: None,
    ord("T"): lambda reader: True,
    ord("F"): lambda reader: False,
    ord("i"): lambda reader: reader._unpack(I64)[0],
    ord("I"): lambda reader: int.from_bytes(reader._sized(), "little", signed=True),
    ord("f"): lambda reader: reader._unpack(F64)[0],
    ord("c"): lambda reader: complex(*reader._unpack(C128)),
    _STR: TreeReader._str,
    ord("b"): lambda reader: bytes(reader._sized()),
    ord("l"): TreeReader._items,
    ord("u"): lambda reader: tuple(reader._items()),
    ord("d"): TreeReader._dict,
    ord("r"): lambda reader: reader._record(records.restore_namedtuple),
    ord("a"): lambda reader: reader._record(records.restore_dataclass),
    ord("t"): TreeReader._tensor,
    ord("n"): TreeReader._array,
    ord("g"): TreeReader._scalar,
}
