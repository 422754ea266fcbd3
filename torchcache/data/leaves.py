"""Tensors and arrays as bytes of a record, and back.

A tensor's node is its dtype's name and its shape; an array's is its numpy dtype (`dtype.str`, or `dtype.descr` if it
has fields) and its shape. Both are stored in C order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from torchcache.errors import IntegrityError

ALIGNMENT: Final = 64
"""Every leaf starts at a multiple of this many bytes: what torch's own allocator gives."""

_MAX_DIMENSIONS = 64
_MAX_BYTES = 2**62

_QUANTIZED = {"quint8", "qint8", "qint32", "quint4x2", "quint2x4"}
DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
"""Every dtype of this torch by name, quantized ones aside: those have more state than their bytes."""
for _name in _QUANTIZED:
    DTYPES.pop(_name, None)

# Bytes are moved as the plainest dtype of the same size: some dtypes have no copy kernel, others warn.
_CARRIERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class Leaf(NamedTuple):
    """Bytes to be laid into a record: how many, and how to copy them into a uint8 tensor of that size."""

    size_bytes: int
    copy_to: Callable[[torch.Tensor], object]


def align(offset: int) -> int:
    """The first multiple of ALIGNMENT at or behind `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def tensor_problem(tensor: torch.Tensor) -> str | None:
    """Why `tensor` can't be a leaf; None if it can."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"its layout is {tensor.layout}; only dense tensors are stored"
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        return f"its dtype is {tensor.dtype}; quantized tensors are not stored"
    if tensor.device.type != "cpu":
        return f"it lies on {tensor.device}; samples are stored from the CPU"
    if tensor.requires_grad:
        return "it requires grad; detach it"
    return None


def tensor_leaf(tensor: torch.Tensor) -> Leaf:
    """The bytes of a tensor that `tensor_problem` has nothing against, in C order."""
    plain = tensor.resolve_conj().resolve_neg()
    carrier = _CARRIERS[plain.element_size()]
    source = plain.view(carrier)

    def copy_to(target: torch.Tensor) -> None:
        if source.is_contiguous():
            np.copyto(target.numpy(), tensor_bytes(source))  # torch would start threads for it
        else:
            target.view(carrier).reshape(source.shape).copy_(source)

    return Leaf(source.numel() * source.element_size(), copy_to)


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The same bytes as an array, without a copy if the tensor is contiguous."""
    plain = tensor.resolve_conj().resolve_neg()
    flat = plain.view(_CARRIERS[plain.element_size()]).reshape(-1)
    return np.asarray(flat.contiguous().view(torch.uint8).numpy())


def array_problem(array: np.ndarray[Any, Any] | np.generic) -> str | None:
    """Why `array` can't be a leaf; None if it can."""
    dtype = array.dtype
    if dtype.hasobject:
        return "it holds Python objects"
    if dtype.itemsize == 0 and not isinstance(array, np.generic):
        return f"its dtype {dtype} has no bytes"
    try:
        known = dtype_from_description(dtype_description(dtype)) == dtype
    except (ValueError, TypeError):
        known = False
    return None if known else f"its dtype {dtype} is not one of numpy's own"


def array_leaf(array: np.ndarray[Any, Any]) -> Leaf:
    """The bytes of an array that `array_problem` has nothing against, in C order."""

    def copy_to(target: torch.Tensor) -> None:
        np.copyto(target.numpy(), np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    return Leaf(array.nbytes, copy_to)


def dtype_description(dtype: np.dtype[Any]) -> Any:
    """What `dtype_from_description` makes an equal dtype of: a str, or a list of tuples if it has fields."""
    return dtype.descr if dtype.names is not None else dtype.str


def dtype_from_description(description: Any) -> np.dtype[Any]:
    """The dtype described. Raises ValueError or TypeError for what describes none, or one that holds objects."""
    try:
        dtype = np.lib.format.descr_to_dtype(description)
    except (LookupError, AttributeError, ArithmeticError, SyntaxError) as error:
        # numpy takes its descriptions from files it trusts, and says so in whatever way it trips over others.
        raise ValueError(f"no dtype: {error}") from error
    if dtype.hasobject:
        raise ValueError("a dtype that holds Python objects")
    return dtype


class LeafReader:
    """Hands out a record's leaves in order, as tensors and arrays."""

    def __init__(self, memory: memoryview, start: int) -> None:
        """`memory` is the whole record, `start` the first byte behind its tree."""
        self._memory = memory
        self._position = start
        self._view = not memory.readonly and _address(memory) % ALIGNMENT == 0

    def tensor(self, dtype_name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The next leaf. Raises IntegrityError if it isn't there, or this torch has no such dtype."""
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise IntegrityError(
                f"a stored sample has a tensor of dtype {dtype_name!r}, which this torch has not"
            )
        start, end = self._advance(dtype.itemsize, shape)
        if start == end:
            return torch.empty(0, dtype=torch.uint8).view(dtype).reshape(shape)  # some dtypes warn when made
        if self._view:
            count = (end - start) // dtype.itemsize
            flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start)
        else:
            flat = torch.frombuffer(bytearray(self._memory[start:end]), dtype=dtype)
        return flat.reshape(shape)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The next leaf. Raises IntegrityError if it isn't there."""
        if dtype.itemsize == 0:
            raise IntegrityError(f"a stored sample has an array of dtype {dtype}, which has no bytes")
        start, end = self._advance(dtype.itemsize, shape)
        if start == end:
            return np.empty(shape, dtype=dtype)
        memory = self._memory[start:end] if self._view else bytearray(self._memory[start:end])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def finish(self) -> None:
        """Raises IntegrityError unless every byte of the record has been handed out."""
        if self._position != len(self._memory):
            raise IntegrityError("a stored sample has bytes that belong to nothing")

    def _advance(self, item_bytes: int, shape: tuple[int, ...]) -> tuple[int, int]:
        # The product over the dimensions without the zeros bounds the strides too.
        size = math.prod(shape) * item_bytes
        bound = size or math.prod(filter(None, shape)) * item_bytes
        if len(shape) > _MAX_DIMENSIONS or bound > _MAX_BYTES:
            raise IntegrityError("a stored sample has a tensor of impossible shape")
        start = align(self._position)
        end = start + size
        if end > len(self._memory):
            raise IntegrityError("a stored sample is shorter than the tensors it lists")
        self._position = end
        return start, end


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])
