"""The tree of a sample: nested Python values around its tensors and arrays, as tagged nodes.

======  ===================  ==================================================
tag     value                what follows the tag
======  ===================  ==================================================
N T F   None, True, False    nothing
i       int                  i64
I       int of more bits     length, two's complement
f c     float, complex       f64; two f64
s b     str, bytes           length, bytes (UTF-8, lone surrogates kept)
l u     list, tuple          count, nodes
d       dict                 count, pairs of nodes: key, value
r a     namedtuple,          str "module:qualname", count, pairs: str name, node
        dataclass
t       tensor               str dtype, count, u64 a dimension; bytes in a leaf
n       numpy array          node: dtype; count, u64 a dimension; bytes in a leaf
g       numpy scalar         node: dtype; length, bytes
======  ===================  ==================================================

Lengths and counts are u64. A reader trusts none of them: each is checked against the bytes that are left before
anything is made of it, so that memory stays in proportion to the record.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from torchcache.data import records
from torchcache.data.leaves import (
    Leaf,
    LeafReader,
    array_leaf,
    array_problem,
    dtype_description,
    dtype_from_description,
    tensor_leaf,
    tensor_problem,
)
from torchcache.errors import IntegrityError, UnsupportedSample

MAX_DEPTH: Final = 100

_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_C128 = struct.Struct("<dd")
_KEYS: Final = (str, int, float, bool, bytes, type(None))


class TreeWriter:
    """Writes one value into `tree` and lists its tensors and arrays, in order, in `leaves`."""

    def __init__(self) -> None:
        self.tree = bytearray()
        self.leaves: list[Leaf] = []
        self._path: list[str] = []

    def put(self, value: object) -> None:
        """Appends a node. Raises UnsupportedSample naming the path of what has no form."""
        write = _WRITERS.get(type(value))
        if write is not None:
            write(self, value)
        elif isinstance(value, np.generic):
            self._put_scalar(value)
        elif records.is_namedtuple(value):
            self._put_record(b"r", value, value._asdict())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            self._put_record(b"a", value, fields)
        else:
            raise self._unsupported(f"is a {_type_name(value)}, which has no form in the typed encoding")

    def _put_str(self, value: str) -> None:
        self._put_sized(b"s", value.encode("utf-8", "surrogatepass"))

    def _put_sized(self, tag: bytes, data: bytes) -> None:
        self.tree += tag + _U64.pack(len(data))
        self.tree += data

    def _put_int(self, value: int) -> None:
        if -(2**63) <= value < 2**63:
            self.tree += b"i" + _I64.pack(value)
        else:
            self._put_sized(b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def _put_sequence(self, tag: bytes, values: list[object] | tuple[object, ...]) -> None:
        self.tree += tag + _U64.pack(len(values))
        for index, value in enumerate(values):
            self._put_child(f"[{index}]", value)

    def _put_dict(self, values: dict[object, object]) -> None:
        self.tree += b"d" + _U64.pack(len(values))
        for key, value in values.items():
            if not _is_key(key):
                raise self._unsupported(
                    f"has a key of type {_type_name(key)}; keys may be str, bytes or numbers"
                )
            self.put(key)
            self._put_child(f"[{key!r}]", value)

    def _put_record(self, tag: bytes, value: object, fields: dict[str, Any]) -> None:
        problem = records.problem(value, fields)
        if problem:
            raise self._unsupported(f"is a {_type_name(value)}: {problem}")
        self.tree += tag
        self._put_str(records.reference(type(value)))
        self.tree += _U64.pack(len(fields))
        for name, child in fields.items():
            self._put_str(name)
            self._put_child(f".{name}", child)

    def _put_child(self, step: str, value: object) -> None:
        self._path.append(step)
        if len(self._path) > MAX_DEPTH:
            raise self._unsupported(
                f"lies more than {MAX_DEPTH} levels deep; does the sample contain itself?"
            )
        self.put(value)
        self._path.pop()

    def _put_tensor(self, tensor: torch.Tensor) -> None:
        problem = tensor_problem(tensor)
        if problem:
            raise self._unsupported(f"can't be stored: {problem}")
        self.tree += b"t"
        self._put_str(str(tensor.dtype).removeprefix("torch."))
        self._put_shape(tensor.shape)
        self.leaves.append(tensor_leaf(tensor))

    def _put_array(self, array: np.ndarray[Any, Any]) -> None:
        self._put_dtype(b"n", array)
        self._put_shape(array.shape)
        self.leaves.append(array_leaf(array))

    def _put_scalar(self, value: np.generic) -> None:
        self._put_dtype(b"g", value)
        data = value.tobytes()[: value.dtype.itemsize]  # numpy pads its empty str
        self.tree += _U64.pack(len(data)) + data

    def _put_dtype(self, tag: bytes, value: np.ndarray[Any, Any] | np.generic) -> None:
        problem = array_problem(value)
        if problem:
            raise self._unsupported(f"can't be stored: {problem}")
        self.tree += tag
        self.put(dtype_description(value.dtype))

    def _put_shape(self, shape: tuple[int, ...]) -> None:
        self.tree += struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape)

    def _unsupported(self, reason: str) -> UnsupportedSample:
        path = "sample" + "".join(self._path)
        return UnsupportedSample(
            f"{path} {reason}. Let dataset[i] return what the encoding knows (nested dict, list, tuple, namedtuple, "
            "dataclass of tensors, numpy arrays, bytes, str, numbers, None), or pass encode= and decode="
        )


_WRITERS: Final[dict[type, Callable[[TreeWriter, Any], None]]] = {
    type(None): lambda writer, value: writer.tree.extend(b"N"),
    bool: lambda writer, value: writer.tree.extend(b"T" if value else b"F"),
    int: TreeWriter._put_int,
    float: lambda writer, value: writer.tree.extend(b"f" + _F64.pack(value)),
    complex: lambda writer, value: writer.tree.extend(b"c" + _C128.pack(value.real, value.imag)),
    str: TreeWriter._put_str,
    bytes: lambda writer, value: writer._put_sized(b"b", value),
    list: lambda writer, value: writer._put_sequence(b"l", value),
    tuple: lambda writer, value: writer._put_sequence(b"u", value),
    dict: TreeWriter._put_dict,
    torch.Tensor: TreeWriter._put_tensor,
    np.ndarray: TreeWriter._put_array,
    np.memmap: TreeWriter._put_array,
}


class TreeReader:
    """Reads what TreeWriter wrote. Raises IntegrityError for what it can't have written."""

    def __init__(self, tree: memoryview, leaves: LeafReader) -> None:
        self._tree = tree
        self._leaves = leaves
        self._position = 0
        self._depth = 0

    def take(self) -> Any:
        """The next node's value."""
        tag = bytes(self._bytes(1))
        read = _READERS.get(tag)
        if read is None:
            raise IntegrityError(f"a stored sample has a node of unknown kind {tag!r}")
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise IntegrityError(f"a stored sample is nested more than {MAX_DEPTH} levels deep")
        value = read(self)
        self._depth -= 1
        return value

    def finish(self) -> None:
        """Raises IntegrityError unless tree and leaves have been read to their ends."""
        if self._position != len(self._tree):
            raise IntegrityError("a stored sample goes on behind its last node")
        self._leaves.finish()

    def _bytes(self, count: int) -> memoryview:
        end = self._position + count
        if end > len(self._tree):
            raise IntegrityError("a stored sample ends in the middle of a node")
        data = self._tree[self._position : end]
        self._position = end
        return data

    def _number(self) -> int:
        return int(_U64.unpack(self._bytes(8))[0])

    def _count(self, item_bytes: int) -> int:
        """A number of items that take at least `item_bytes` each."""
        count = self._number()
        if count * item_bytes > len(self._tree) - self._position:
            raise IntegrityError("a stored sample lists more than it holds")
        return count

    def _sized(self) -> memoryview:
        return self._bytes(self._number())

    def _str(self) -> str:
        return bytes(self._sized()).decode("utf-8", "surrogatepass")

    def _named(self) -> str:
        """A str that has a tag of its own."""
        if bytes(self._bytes(1)) != b"s":
            raise IntegrityError("a stored sample lacks a name where one belongs")
        return self._str()

    def _items(self) -> list[Any]:
        return [self.take() for _ in range(self._count(1))]

    def _dict(self) -> dict[Any, Any]:
        count = self._count(2)
        values: dict[Any, Any] = {}
        for _ in range(count):
            key = self.take()
            if not _is_key(key) or key in values:
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
        return struct.unpack(f"<{count}Q", self._bytes(8 * count))


_READERS: Final[dict[bytes, Callable[[TreeReader], Any]]] = {
    b"N": lambda reader: None,
    b"T": lambda reader: True,
    b"F": lambda reader: False,
    b"i": lambda reader: _I64.unpack(reader._bytes(8))[0],
    b"I": lambda reader: int.from_bytes(reader._sized(), "little", signed=True),
    b"f": lambda reader: _F64.unpack(reader._bytes(8))[0],
    b"c": lambda reader: complex(*_C128.unpack(reader._bytes(16))),
    b"s": TreeReader._str,
    b"b": lambda reader: bytes(reader._sized()),
    b"l": TreeReader._items,
    b"u": lambda reader: tuple(reader._items()),
    b"d": TreeReader._dict,
    b"r": lambda reader: reader._record(records.restore_namedtuple),
    b"a": lambda reader: reader._record(records.restore_dataclass),
    b"t": TreeReader._tensor,
    b"n": TreeReader._array,
    b"g": TreeReader._scalar,
}


def _is_key(key: object) -> bool:
    return all(map(_is_key, key)) if type(key) is tuple else type(key) in _KEYS


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
