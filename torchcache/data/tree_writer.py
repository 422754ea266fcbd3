"""Writes the tree of a sample; see tree.py."""

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
    array_leaf,
    array_problem,
    dtype_description,
    tensor_leaf,
    tensor_problem,
)
from torchcache.data.tree import C128, F64, I64, MAX_DEPTH, U64, is_key
from torchcache.errors import UnsupportedSample


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
            self._put_record(b"r", value, dict(zip(type(value)._fields, value, strict=False)))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            self._put_record(b"a", value, fields)
        else:
            raise self._unsupported(f"is a {_type_name(value)}, which has no form in the typed encoding")

    def _put_str(self, value: str) -> None:
        self._put_sized(b"s", value.encode("utf-8", "surrogatepass"))

    def _put_sized(self, tag: bytes, data: bytes) -> None:
        self.tree += tag + U64.pack(len(data))
        self.tree += data

    def _put_int(self, value: int) -> None:
        if -(2**63) <= value < 2**63:
            self.tree += b"i" + I64.pack(value)
        else:
            self._put_sized(b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def _put_sequence(self, tag: bytes, values: list[object] | tuple[object, ...]) -> None:
        self.tree += tag + U64.pack(len(values))
        for index, value in enumerate(values):
            self._put_child(f"[{index}]", value)

    def _put_dict(self, values: dict[object, object]) -> None:
        self.tree += b"d" + U64.pack(len(values))
        for key, value in values.items():
            if not is_key(key):
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
        self.tree += U64.pack(len(fields))
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
        self.tree += U64.pack(len(data)) + data

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
    float: lambda writer, value: writer.tree.extend(b"f" + F64.pack(value)),
    complex: lambda writer, value: writer.tree.extend(b"c" + C128.pack(value.real, value.imag)),
    str: TreeWriter._put_str,
    bytes: lambda writer, value: writer._put_sized(b"b", value),
    list: lambda writer, value: writer._put_sequence(b"l", value),
    tuple: lambda writer, value: writer._put_sequence(b"u", value),
    dict: TreeWriter._put_dict,
    torch.Tensor: TreeWriter._put_tensor,
    np.ndarray: TreeWriter._put_array,
    np.memmap: TreeWriter._put_array,
}


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
